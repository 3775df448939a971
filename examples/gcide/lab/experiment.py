"""An experiment: its base, its texts, its settings, and the folder in which all that is made lies."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lab.texts import Text
from memdec.data.corpus import TokenCorpus
from memdec.info import sections
from memdec.modeling.loading import (
    compare_tokenizers,
    load_model,
    load_tokenizer,
    model_fingerprint,
    pick_device,
)

SCORING_BLOCKS = 8


class Experiment:
    """One base, one domain, one seed, one folder of work.

    The seed is that of every training and sampling. What does not depend on it (the base, its scores,
    what was retrieved) lies in the folder itself, and so does all of seed 0; another seed has a folder
    in it.

    Attributes:
        how: how a text passes through a model, as :func:`memdec.evaluation.forward.label_scores`
            takes it: blocks, each a context of its own.
        texts: the held-out texts by name: ``validation``, ``test``, and those outside the domain.
        outside: fingerprints of the latter's corpora by name.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        base: str,
        tokens: Path,
        outside: Mapping[str, str],
        work: Path,
        device: str,
        seed: int = 0,
    ) -> None:
        work = work.resolve()  # stages are named by their path, or by their name in it
        self._arguments = (settings, base, tokens, outside, work, device)
        self.settings = settings
        self.tokens = tokens
        self.shared = work
        self.work = work / f"seed-{seed}" if seed else work
        self.seed = seed
        self.device = str(pick_device(device))
        self.corpus = TokenCorpus.open(tokens)
        self.base = base
        if base.endswith(".gguf"):  # as a directory it loads in a second instead of twenty
            self.base = model_directory(
                work / "base", lambda: (load_model(base), load_tokenizer(base))
            )
        self.how = {
            "block_size": settings["block_size"],
            "batch_blocks": SCORING_BLOCKS,
            "vocab_size": self.corpus.vocab_size,
        }
        corpora = {name: TokenCorpus.open(path) for name, path in outside.items()}
        for name, other in corpora.items():
            compare_tokenizers(other.tokenizer(), self.corpus.tokenizer(), (name, str(tokens)))
        streams = {name: self.corpus.split(name) for name in ("validation", "test")}
        streams |= {name: other.split("test") for name, other in corpora.items()}
        most = settings["positions"]
        self.texts = {
            name: Text(stream, min(stream.positions, most)) for name, stream in streams.items()
        }
        self.outside = {name: other.fingerprint for name, other in corpora.items()}
        self._made: dict[Any, Any] = {}

    def of_seeds(self, seeds: Sequence[int] | str) -> list[Experiment]:
        """The same with each of these seeds, listed as settings do: numbers, or ``own``."""
        return [self] if seeds == "own" else [self._of_seed(seed) for seed in seeds]

    def _of_seed(self, seed: int) -> Experiment:
        if seed == self.seed:
            return self
        return self.once(f"seed {seed}", lambda: Experiment(*self._arguments, seed))

    def facts(self) -> dict[str, Any]:
        """What every row shares; a result of other facts is of another experiment."""
        inputs = {"base": model_fingerprint(self.base), "tokens": self.corpus.fingerprint}
        return {
            "settings": {name: part for name, part in self.settings.items() if name != "rows"},
            "inputs": {**inputs, **self.outside},
            "train_tokens": self.corpus.split("train").positions,
            "held_out": {name: text.positions for name, text in self.texts.items()},
            "outside": list(self.outside),
            "seed": self.seed,
        }

    def machine(self) -> dict[str, str]:
        on_gpu = self.device.startswith("cuda")
        return {
            "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
            **sections()["versions"],
            **{package: _version(package) for package in ("peft", "bm25s")},
        }

    def once(self, key: Path | str, make: Callable[[], Any]) -> Any:
        """What `make` gives, made when it is first asked for; `key` is most often its folder."""
        if key not in self._made:
            self._made[key] = make()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # the next stage has other sizes
        return self._made[key]

    def folder(self, setting: Mapping[str, Any], stage: str = "train") -> Path:
        """Where a row's own training lies, or another stage of its own."""
        return self.work / f"{stage}-{file_name(setting['name'])}"

    def seconds(self, folder: str | Path) -> float:
        """What a stage took, in the run that finished it."""
        return float(json.loads((self.work / folder / "timing.json").read_text())["seconds"])

    def curve(self, folder: str | Path) -> list[dict[str, float]]:
        """A row a validation of a training."""
        curve: list[dict[str, float]] = json.loads((self.work / folder / "curve.json").read_text())
        return curve


def model_directory(out: Path, make: Callable[[], tuple[PreTrainedModel, Any]]) -> str:
    """A model and its tokenizer where they are missing, whole or not at all."""
    if not out.is_dir():
        temporary = out.with_suffix(f".{os.getpid()}.tmp")
        for part in make():
            part.save_pretrained(temporary)
        if not out.is_dir():  # another seed's run may have been faster
            temporary.rename(out)
    return str(out)


def file_name(name: str) -> str:
    """A name of the settings as part of a file's."""
    return re.sub(r"\W+", "-", name.strip().lower())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
