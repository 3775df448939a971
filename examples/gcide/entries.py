"""Writes the entries of GCIDE, the collaborative Webster's dictionary, one entry a line.

    apt-get install dict-gcide
    python examples/gcide/entries.py > gcide.txt
    memdec build --recipe examples/gcide/recipe.yaml --base SmolLM2.gguf --corpus gcide.txt --out out/

About 9.9 million tokens of SmolLM2's tokenizer. The marks of the dictionary that a paragraph is from,
[1913 Webster] and the like, are left out: known before they come, they are one token in seven, and
would make every perplexity lower (docs/gcide.md). GCIDE is under the GPL: its text is read from the
installed package and never shipped here.
"""

from __future__ import annotations

import argparse
import gzip
import re
import string
from collections.abc import Iterator
from pathlib import Path

DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"  # of the index
SOURCE = re.compile(r" ?\[[^\[\]]*(?:Webster|WordNet|PJC)[^\[\]]*\]")


def number(text: str) -> int:
    """An offset or a length of the index (format: dictd(8))."""
    value = 0
    for digit in text:
        value = 64 * value + DIGITS.index(digit)
    return value


def entries(folder: Path) -> Iterator[str]:
    """The text of each entry in order, white space squeezed; headwords that share one give it once."""
    text = gzip.decompress((folder / "gcide.dict.dz").read_bytes())
    index = (folder / "gcide.index").read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t") for line in index)
    places = {(number(start), number(length)) for _, start, length in rows}
    for start, length in sorted(places):
        entry = " ".join(text[start : start + length].decode("utf-8", "replace").split())
        entry = SOURCE.sub("", entry)
        if entry and not entry.startswith("00-database"):  # what the dictionary says of itself
            yield entry


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("/usr/share/dictd"))
    print("\n".join(entries(parser.parse_args().folder)))
