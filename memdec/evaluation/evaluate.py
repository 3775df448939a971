"""The stage ``eval``: base, kNN-LM, memory and joint on the same held-out tokens."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Literal

from memdec.config import Config, option, require
from memdec.console import say
from memdec.data.artefact import Artefact, StageWriter, stage
from memdec.data.corpus import ISOLATE_HELP
from memdec.errors import MemdecError

KIND = "eval"
RESULTS = "eval.json"
PASSAGE = "passage.json"
ADAPTIVE = "joint, adaptive lmbda"  # the row with a lmbda a token

_OWN_NAMES = (
    *("base", "kNN-LM", "memory", "joint", "kNN", "tokens", "datastore", "targets"),
    *("validation", "test"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(Config):
    """Options of ``memdec eval``."""

    tokens: Path = option(help="directory of the stage prepare")
    base: str = option(help="frozen model: directory, hub name or .gguf file")
    memory: str = option(help="memory: a model directory, for example out/train/memory")
    datastore: Path | None = option(None, help="directory of the stage datastore, for the kNN-LM")
    targets: Path | None = option(None, help="directory of the stage targets: k and temperature")
    teacher: str | None = option(None, help="model whose keys the datastore holds (default: base)")
    others: tuple[str, ...] = option((), help="further models to compare, as name=directory")
    outside: tuple[str, ...] = option(
        (),
        help="texts outside the domain, as name=file or name=directory: one more pass of every "
        "model over each, as many tokens of it as the split has at most",
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
                taken = name in _OWN_NAMES or names.count(name) > 1
                if taken or not re.fullmatch(r"[\w.-]+=.+", text):
                    raise MemdecError(
                        f"{what} must be name=path with names of their own, got {text!r}"
                    )

    def other_models(self) -> dict[str, str]:
        """Name to directory."""
        return dict(text.split("=", 1) for text in self.others)

    def outside_texts(self) -> dict[str, Path]:
        """Name to file or directory."""
        return {name: Path(path) for name, path in (text.split("=", 1) for text in self.outside)}


def evaluate(config: EvalConfig, out: Path) -> Artefact:
    """Scores every contender on the same held-out tokens; prints and writes the table.

    lmbda is chosen on validation, for joint and kNN-LM each, and used on the reported split and on
    the texts outside the domain. So is the gate that gives each token a lmbda of its own
    (:func:`memdec.evaluation.gate.fit_gate`).

    Writes ``eval.json``::

        {"split": str, "positions": int, "resampled": "documents" | "blocks",
         "outside": {text: {"positions": int, "resampled": "documents" | "blocks"}},
         "datastore_bytes": int | None,
         "lmbda": {"joint": float, "kNN-LM": float},
         "gate": the fields of :class:`memdec.modeling.gate.Gate`,
         "rows": [{"name": "base" | "kNN-LM" | "memory" | "joint" | "joint, adaptive lmbda" | other,
                   "nll": float,
                   "perplexity": float, "interval": [low, high] (of perplexity, 95 %),
                   "gain": nats below base, "gain_interval": [low, high] (paired draws),
                   "lmbda": float | None (of the gate: its mean), "parameters": int,
                   "bytes": int,
                   "tail_gain": median of p / p_base over the tenth of the tokens that is rarest
                       in the train split,
                   "function_words": mean of |log p - log p_base| over function words | None
                       if there are none,
                   "outside": {text: {"nll", "perplexity", "interval", "gain", "gain_interval"}}}],
         "curves": {"lmbda": [...], "joint": {split: [nll]}, "kNN-LM": {split: [nll]}}
             (a text outside the domain is there as "outside-NAME"),
         "frequency": [{"bucket": "1-9", "low": 1, "high": 9 | None, "positions": int,
                        "nll": {name: float}}]}

    where an infinite value is None; ``passage.json`` with the probability of each of the first
    tokens of the split under ``base``, ``memory``, ``joint`` and ``kNN-LM``; ``scores/``, the
    float32 log-probability of each position's label per split and contender (a text outside the
    domain has a folder of its own), and ``confidence/``, what the gate sees of base and memory.
    ``timing.json`` has the seconds that scoring the reported split took, by row.

    Raises:
        MemdecError: an input that does not belong to the others, named with both fingerprints.
    """
    from memdec.evaluation.contenders import Contenders
    from memdec.evaluation.summary import print_table, row_seconds, summarise

    contenders = Contenders(config)
    params = config.to_mapping()
    for name in ("tokens", "base", "memory", "datastore", "targets", "teacher", "others"):
        del params[name]  # their content counts, by fingerprint, not where they lie
    del params["outside"], params["device"]
    if not config.isolate_documents:  # the manifest says so where they are
        del params["isolate_documents"]
    with stage(out, KIND, params, contenders.fingerprints()) as writer:
        if writer.finished:
            say(f"eval: already done in {out}")
            artefact = Artefact.open(out, KIND)
        else:
            scored = contenders.score(writer)
            results, passage = summarise(contenders, scored)
            _write_json(writer, RESULTS, results)
            _write_json(writer, PASSAGE, passage)
            artefact = writer.finish(timing=row_seconds(scored))
        print_table(artefact)
        return artefact


def _write_json(writer: StageWriter, name: str, value: Any) -> None:
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    writer.write(name, lambda file: file.write(text.encode()))
