"""Options of the stage ``eval``, and the names that its rows have."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from memdec.config import Config, option, require
from memdec.data.corpus import ISOLATE_HELP
from memdec.errors import MemdecError

JOINT_ADAPTIVE = "joint, adaptive lmbda"  # the row with a lmbda a token

_OWN_NAMES = (
    *("base", "kNN-LM", "memory", "joint", "kNN", "tokens", "datastore", "targets"),
    *("validation", "test"),
)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Config):
    """Options of ``memdec eval``."""

    tokens: Path = option(help="directory of the stage prepare")
    base: str = option(help="frozen model: directory, hub name or .gguf file")
    memory: str = option(help="memory: a model directory, for example out/train/memory")
    datastore: Path | None = option(None, help="directory of the stage datastore, for the kNN-LM")
    targets: Path | None = option(None, help="directory of the stage targets: k and temperature")
    teacher: str | None = option(None, help="model whose keys the datastore holds (default: base)")
    others: tuple[str, ...] = option(
        (), help="further models to compare, as NAME=PATH of a directory", item="NAME=PATH"
    )
    outside: tuple[str, ...] = option(
        (),
        help="texts outside the domain, as NAME=PATH of a file or directory: one more pass of "
        "every model over each, as many tokens of it as the split has at most",
        item="NAME=PATH",
    )
    split: Literal["validation", "test"] = option("test", help="split that the table reports")
    positions: int | None = option(
        None, help="evaluate only the first so many positions of a split, in whole blocks"
    )
    lmbda: float | None = option(
        None, help="weight of memory and of kNN (default: chosen on validation, for each)"
    )
    bootstrap: int = option(1000, help="bootstrap samples of the confidence intervals")
    block_size: int = option(1024, help="tokens of context in a block")
    isolate_documents: bool = option(False, help=ISOLATE_HELP)
    batch_blocks: int = option(4, help="blocks in one forward pass")
    device: str = option("auto", help="where to run: auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = option("float32", help="the weights' data type")
    seed: int = option(0, help="seed of the bootstrap")

    def check(self) -> None:
        for name in ("bootstrap", "block_size", "batch_blocks"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        if self.positions is not None:
            require(self.positions >= 1, "positions", "at least 1", self.positions)
        if self.lmbda is not None:
            require(0 <= self.lmbda <= 1, "lmbda", "in [0, 1]", self.lmbda)
        if (self.datastore is None) != (self.targets is None):
            raise MemdecError("the kNN-LM needs both datastore and targets, one of them was given")
        for what in ("others", "outside"):
            texts = getattr(self, what)
            names = [text.partition("=")[0] for text in texts]
            for name, text in zip(names, texts, strict=True):
                form = "NAME=PATH with a NAME of letters, digits, '_', '.' and '-'"
                require(re.fullmatch(r"[\w.-]+=.+", text) is not None, what, form, text)
                taken = name in _OWN_NAMES or names.count(name) > 1
                require(not taken, what, "NAME=PATH with names of their own", text)

    def other_models(self) -> dict[str, str]:
        """Name to directory."""
        return dict(text.split("=", 1) for text in self.others)

    def outside_texts(self) -> dict[str, Path]:
        """Name to file or directory."""
        return {name: Path(path) for name, path in (text.split("=", 1) for text in self.outside)}
