"""A finished directory of the stage eval, written by hand: what the report reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from memdec.data.artefact import stage

TOKENS = ["The ", "<b>", "yield", " expression\n", "is ", "\u201cused\u201d"]


def results() -> dict[str, Any]:
    grid = [0.0, 0.25, 0.5, 0.75, 1.0]
    joint = [4.40, 3.70, 3.62, 3.65, 3.80]
    knn: list[float | None] = [4.40, 3.85, 3.80, 3.95, None]

    def row(name: str, nll: float, lmbda: float | None, parameters: int, size: int) -> dict:
        return {
            "name": name,
            "nll": nll,
            "perplexity": math.exp(nll),
            "interval": [math.exp(nll - 0.05), math.exp(nll + 0.05)],
            "gain": 4.40 - nll,
            "gain_interval": [4.35 - nll, 4.45 - nll],
            "lmbda": lmbda,
            "parameters": parameters,
            "bytes": size,
            "tail_gain": math.exp(4.40 - nll),
            "function_words": 4.40 - nll,
            "outside": {
                "python <3>": {"nll": 3.0 - nll / 10, "perplexity": math.exp(3.0 - nll / 10)}
            },
        }

    return {
        "split": "test",
        "positions": 12345,
        "resampled": "documents",
        "outside": {"python <3>": {"positions": 6789, "resampled": "blocks"}},
        "datastore_bytes": 24_490_368,
        "lmbda": {"joint": 0.5, "kNN-LM": 0.5},
        "rows": [
            row("base", 4.40, None, 1_377_408, 5_509_632),
            row("kNN-LM", 3.80, 0.5, 1_377_408, 30_000_000),
            row("memory", 3.80, None, 1_377_408, 5_509_632),
            row("joint", 3.62, 0.5, 2_754_816, 11_019_264),
            row("joint, adaptive lmbda", 3.58, 0.48, 2_754_816, 11_019_264),
            row("fine-tuned <base>", 3.66, None, 1_377_408, 5_509_632),
        ],
        "curves": {
            "lmbda": grid,
            "joint": {
                "validation": [nll + 0.1 for nll in joint],
                "test": joint,
                "outside-python <3>": [2.56, 2.6, 2.7, 3.0, 5.0],
            },
            "kNN-LM": {
                "validation": [None if nll is None else nll - 0.04 for nll in knn],
                "test": knn,
            },
        },
        "frequency": [
            {"bucket": bucket, "low": low, "high": low * 10 - 1, "positions": count, "nll": nll}
            for bucket, low, count, nll in [
                ("0", 0, 0, {"base": None, "kNN-LM": None, "memory": None, "joint": None}),
                ("1-9", 1, 820, {"base": 9.1, "kNN-LM": 8.0, "memory": 7.8, "joint": 7.9}),
                ("10-99", 10, 4100, {"base": 6.6, "kNN-LM": 5.2, "memory": 5.0, "joint": 4.9}),
                ("100+", 100, 7425, {"base": 2.7, "kNN-LM": 2.75, "memory": 2.6, "joint": 2.55}),
            ]
        ],
    }


def passage() -> dict[str, Any]:
    return {
        "tokens": TOKENS,
        "base": [0.2, 0.01, 0.0001, 0.5, 0.4, 0.3],
        "memory": [0.1, 0.01, 0.6, 0.9, 0.1, 0.3],
        "joint": [0.15, 0.01, 0.3, 0.7, 0.25, 0.3],
        "kNN-LM": [0.2, 0.0, 0.2, 0.6, 0.3, 0.3],
    }


def write_evaluation(path: Path, **replaced: Any) -> Path:
    """Writes the directory; `replaced` replaces parts of :func:`results`."""
    with stage(path, "eval", {"bootstrap": 1000, "split": "test"}, {}) as writer:
        for name, value in {
            "eval.json": {**results(), **replaced},
            "passage.json": passage(),
        }.items():
            text = json.dumps(value).encode()
            writer.write(name, lambda file, text=text: file.write(text))
        writer.finish({"base": 1.25, "joint": 2.5})
    return path
