"""Writes WordNet's glosses of animals and plants as text, one gloss a line.

    apt-get install wordnet-base
    python examples/wordnet/glosses.py > glosses.txt
    memdec build --recipe examples/wordnet/recipe.yaml --base SmolLM2.gguf --corpus glosses.txt \
        --out out/

A line reads like "collie: a silky-coated sheepdog ...". Repeats are dropped by `prepare`. WordNet's
licence allows any use; its text is read from the installed package and never shipped here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

ANIMALS, PLANTS = "05", "20"  # numbers of WordNet's lexicographer files


def glosses(data_noun: Path, files: tuple[str, ...] = (ANIMALS, PLANTS)) -> Iterator[str]:
    """One line a synset: its words and its gloss (format: WordNet's wndb(5WN))."""
    with open(data_noun, encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("  "):
                continue  # the licence, at the head of the file
            record, _, gloss = line.partition("|")
            _, file, _, count, *rest = record.split()
            if file in files:
                words = [rest[2 * i].replace("_", " ") for i in range(int(count, 16))]
                yield f"{', '.join(words)}: {gloss.strip()}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "data_noun", type=Path, nargs="?", default=Path("/usr/share/wordnet/data.noun")
    )
    print("\n".join(glosses(parser.parse_args().data_noun)))
