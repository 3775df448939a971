"""The stage ``eval``: base, kNN-LM, memory and joint on the same held-out tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memdec.console import say
from memdec.data.artefact import Artefact, StageWriter, stage
from memdec.evaluation.options import EvalConfig

KIND = "eval"
RESULTS = "eval.json"
PASSAGE = "passage.json"


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
    from memdec.evaluation.summary import row_seconds, summarise
    from memdec.evaluation.tables import print_tables

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
        print_tables(artefact)
        return artefact


def _write_json(writer: StageWriter, name: str, value: Any) -> None:
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    writer.write(name, lambda file: file.write(text.encode()))
