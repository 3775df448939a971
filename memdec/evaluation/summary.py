"""From scores to the results: table, intervals, lmbda curves, gate, gains by frequency, passage."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from memdec.data.corpus import TokenCorpus, TokenStream
from memdec.evaluation.bootstrap import interval, resampled_means, resampling_units
from memdec.evaluation.contenders import GATED, KNN, Contenders, Scored
from memdec.evaluation.forward import LabelScores
from memdec.evaluation.gate import fit_gate, gate_lmbda
from memdec.evaluation.measures import (
    function_words,
    label_counts,
    mean_change,
    median_gain,
    rarest_decile,
)
from memdec.evaluation.mixture import LMBDAS, best_lmbda, lmbda_curve, mix_log_probs
from memdec.evaluation.options import JOINT_ADAPTIVE, EvalConfig
from memdec.evaluation.outside import stream_name
from memdec.evaluation.passage import make_passage, pieces

# What the base is mixed with, and under which name: at one lmbda, and at one a token.
_MIXTURES = {"joint": "memory", "kNN-LM": KNN}
_PASSAGE_TOKENS = 400
_BUCKET_STARTS = (0, 1, 10, 100, 1_000, 10_000)


def summarise(
    contenders: Contenders, scored: Mapping[str, Scored]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of eval.json and of passage.json, see :func:`memdec.evaluation.evaluate`."""
    config, corpus = contenders.config, contenders.corpus
    mixtures = {name: part for name, part in _MIXTURES.items() if part in scored}
    base = scored["base"].log_probs
    fixed = {
        name: best_lmbda(base["validation"], scored[part].log_probs["validation"])[0]
        if config.lmbda is None
        else config.lmbda
        for name, part in mixtures.items()
    }
    gate = fit_gate(*_gate_inputs(contenders, scored, "validation"), device=contenders.device)
    mixtures[JOINT_ADAPTIVE] = mixtures["joint"]

    def reported(stream: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Log-probabilities of every row, and the lmbdas of the mixtures."""
        lmbdas = {name: np.asarray(lmbda) for name, lmbda in fixed.items()}
        lmbdas[JOINT_ADAPTIVE] = gate_lmbda(gate, *_gate_inputs(contenders, scored, stream))
        return _reported(scored, mixtures, lmbdas, stream), lmbdas

    log_probs, lmbdas = reported(config.split)
    stream = contenders.streams[config.split]
    resampled, measured = _measured(log_probs, stream, config)
    outside = {
        text: _measured(reported(name)[0], contenders.streams[name], config)
        for text, name in ((text, stream_name(text)) for text in contenders.outside)
    }
    positions = len(log_probs["base"])
    labels = stream.read(1, positions + 1)
    behaviour = _behaviour(corpus, labels, log_probs)
    rows: list[dict[str, Any]] = []
    for name in log_probs:
        parts = ["base", mixtures[name]] if name in mixtures else [name]
        rows.append(
            {
                "name": name,
                **measured[name],
                "lmbda": float(lmbdas[name].mean()) if name in lmbdas else None,
                "parameters": sum(scored[part].parameters for part in parts),
                "bytes": sum(scored[part].bytes for part in parts),
                **behaviour[name],
                "outside": {text: found[name] for text, (_, found) in outside.items()},
            }
        )
    results = {
        "split": config.split,
        "positions": positions,
        "resampled": resampled,
        "outside": {
            text: {
                "positions": len(scored["base"].log_probs[stream_name(text)]),
                "resampled": units,
            }
            for text, (units, _) in outside.items()
        },
        "datastore_bytes": contenders.datastore_bytes,
        "lmbda": fixed,
        "gate": dataclasses.asdict(gate),
        "rows": rows,
        "curves": {
            "lmbda": LMBDAS.round(6).tolist(),
            **{name: _curves(scored, mixtures[name]) for name in fixed},
        },
        "frequency": _by_frequency(corpus, labels, log_probs),
    }
    head = {name: values[:_PASSAGE_TOKENS] for name, values in log_probs.items()}
    # Not chosen by hand: the first tokens of the split.
    tokens = pieces(corpus.tokenizer(), labels[:_PASSAGE_TOKENS].tolist())
    return results, make_passage(tokens, head)


def _measured(
    log_probs: Mapping[str, np.ndarray], stream: TokenStream, config: EvalConfig
) -> tuple[str, dict[str, dict[str, Any]]]:
    """What the bootstrap draws, and by row: nll, perplexity, gain over base, intervals."""
    positions = len(log_probs["base"])
    resampled, units = resampling_units(positions, stream.documents, config.block_size)
    table = np.stack(list(log_probs.values()), axis=1).astype(np.float64)
    samples = -resampled_means(table, units, config.bootstrap, config.seed)
    nlls = {name: -float(values.mean(dtype=np.float64)) for name, values in log_probs.items()}
    measured = {}
    for column, (name, nll) in enumerate(nlls.items()):
        gains = samples[:, 0] - samples[:, column]
        measured[name] = {
            "nll": _finite(nll),
            "perplexity": _finite(_exp(nll)),
            "interval": [_finite(_exp(end)) for end in interval(samples[:, column])],
            "gain": _finite(nlls["base"] - nll),
            "gain_interval": [_finite(end) for end in interval(gains)],
        }
    return resampled, measured


def _behaviour(
    corpus: TokenCorpus, labels: np.ndarray, log_probs: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float | None]]:
    """What each row does to the rarest tokens and to function words, beside base."""
    base = log_probs["base"]
    rarest = rarest_decile(corpus.split("train"), labels, corpus.vocab_size)
    words = function_words(corpus.tokenizer(), labels)
    found: dict[str, dict[str, float | None]] = {}
    for name, values in log_probs.items():
        change = mean_change(base, values, words)
        found[name] = {
            "tail_gain": _finite(median_gain(base, values, rarest)),
            "function_words": None if change is None else _finite(change),
        }
    return found


def _gate_inputs(
    contenders: Contenders, scored: Mapping[str, Scored], stream: str
) -> tuple[LabelScores, LabelScores, TokenStream, int]:
    """What base and memory say of a stream, and where its contexts begin."""
    base, memory = (
        LabelScores(scored[name].log_probs[stream], scored[name].confidence[stream])
        for name in GATED
    )
    return base, memory, contenders.streams[stream], contenders.config.block_size


def _reported(
    scored: Mapping[str, Scored],
    mixtures: Mapping[str, str],
    lmbdas: Mapping[str, np.ndarray],
    split: str,
) -> dict[str, np.ndarray]:
    """Log-probabilities of the rows in the order of the table: base first, the others last."""
    base = scored["base"].log_probs[split]
    found = {name: one.log_probs[split] for name, one in scored.items() if name != KNN}
    for name, part in mixtures.items():
        found[name] = mix_log_probs(base, scored[part].log_probs[split], lmbdas[name])
    first = ("base", "kNN-LM", "memory", "joint", JOINT_ADAPTIVE)
    order = [name for name in first if name in found]
    return {name: found[name] for name in [*order, *(name for name in found if name not in first)]}


def _curves(scored: Mapping[str, Scored], part: str) -> dict[str, list[float | None]]:
    base = scored["base"].log_probs
    return {
        split: [_finite(nll) for nll in lmbda_curve(base[split], values).tolist()]
        for split, values in scored[part].log_probs.items()
    }


def _by_frequency(
    corpus: TokenCorpus, labels: np.ndarray, log_probs: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Mean nll over the labels that occur so often in the train split."""
    frequencies = label_counts(corpus.split("train"), labels, corpus.vocab_size)
    buckets = []
    ends = [start - 1 for start in _BUCKET_STARTS[1:]]
    for low, high in zip(_BUCKET_STARTS, [*ends, None], strict=True):
        inside = (frequencies >= low) & (frequencies <= (math.inf if high is None else high))
        count = int(inside.sum())
        buckets.append(
            {
                "bucket": f"{low:,}+" if high is None else f"{low:,}-{high:,}" if high else "0",
                "low": low,
                "high": high,
                "positions": count,
                "nll": {
                    name: _finite(-float(values[inside].mean(dtype=np.float64))) if count else None
                    for name, values in log_probs.items()
                },
            }
        )
    return buckets


def _exp(value: float) -> float:
    """exp without an OverflowError."""
    return math.exp(value) if value < 700 else math.inf


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def row_seconds(scored: Mapping[str, Scored]) -> dict[str, float]:
    """Seconds that scoring the reported split took, by row of the table."""
    seconds = {name: one.seconds for name, one in scored.items() if name != KNN}
    for name, part in _MIXTURES.items():
        if part in scored:
            seconds[name] = scored["base"].seconds + scored[part].seconds
    return {**seconds, JOINT_ADAPTIVE: seconds["joint"]}
