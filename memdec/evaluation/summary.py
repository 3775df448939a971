"""From scores to the results: table, intervals, lmbda curves, gate, gains by frequency, passage."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from memdec.data.artefact import TIMING, Artefact
from memdec.data.corpus import TokenCorpus, TokenStream
from memdec.evaluation.bootstrap import interval, resampled_means, resampling_units
from memdec.evaluation.contenders import GATED, KNN, Scored
from memdec.evaluation.forward import LabelScores
from memdec.evaluation.gate import fit_gate, gate_lmbda
from memdec.evaluation.mixture import LMBDAS, best_lmbda, lmbda_curve, mix_log_probs
from memdec.evaluation.passage import make_passage, pieces
from memdec.modeling.loading import pick_device

if TYPE_CHECKING:
    from memdec.evaluation.evaluate import EvalConfig

# What the base is mixed with, and under which name: at one lmbda, and at one a token.
_MIXTURES = {"joint": "memory", "kNN-LM": KNN}
ADAPTIVE = "joint, adaptive lmbda"
_PASSAGE_TOKENS = 400
_BUCKET_STARTS = (0, 1, 10, 100, 1_000, 10_000)


def summarise(
    config: EvalConfig, corpus: TokenCorpus, scored: Mapping[str, Scored]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of eval.json and of passage.json, see :func:`memdec.evaluation.evaluate`."""
    stream = corpus.split(config.split)
    mixtures = {name: part for name, part in _MIXTURES.items() if part in scored}
    base = scored["base"].log_probs
    fixed = {
        name: best_lmbda(base["validation"], scored[part].log_probs["validation"])[0]
        if config.lmbda is None
        else config.lmbda
        for name, part in mixtures.items()
    }
    gate = fit_gate(
        *_gate_inputs(config, corpus, scored, "validation"), device=pick_device(config.device)
    )
    lmbdas = {name: np.asarray(lmbda) for name, lmbda in fixed.items()}
    lmbdas[ADAPTIVE] = gate_lmbda(gate, *_gate_inputs(config, corpus, scored, config.split))
    mixtures[ADAPTIVE] = mixtures["joint"]
    log_probs = _reported(scored, mixtures, lmbdas, config.split)
    positions = len(log_probs["base"])
    resampled, units = resampling_units(positions, stream.documents, config.block_size)
    table = np.stack(list(log_probs.values()), axis=1).astype(np.float64)
    samples = -resampled_means(table, units, config.bootstrap, config.seed)
    rows: list[dict[str, Any]] = []
    base_nll = -float(log_probs["base"].mean(dtype=np.float64))
    for column, (name, values) in enumerate(log_probs.items()):
        parts = ["base", mixtures[name]] if name in mixtures else [name]
        nll = -float(values.mean(dtype=np.float64))
        rows.append(
            {
                "name": name,
                "nll": _finite(nll),
                "perplexity": _finite(_exp(nll)),
                "interval": [_finite(_exp(end)) for end in interval(samples[:, column])],
                "gain": _finite(base_nll - nll),
                "gain_interval": [
                    _finite(end) for end in interval(samples[:, 0] - samples[:, column])
                ],
                "lmbda": float(lmbdas[name].mean()) if name in lmbdas else None,
                "parameters": sum(scored[part].parameters for part in parts),
                "bytes": sum(scored[part].bytes for part in parts),
            }
        )
    labels = stream.read(1, positions + 1)
    results = {
        "split": config.split,
        "positions": positions,
        "resampled": resampled,
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


def _gate_inputs(
    config: EvalConfig, corpus: TokenCorpus, scored: Mapping[str, Scored], split: str
) -> tuple[LabelScores, LabelScores, TokenStream, int]:
    """What base and memory say of a split, and where its contexts begin."""
    base, memory = (
        LabelScores(scored[name].log_probs[split], scored[name].confidence[split]) for name in GATED
    )
    stream = corpus.split(split, isolate_documents=config.isolate_documents)
    return base, memory, stream, config.block_size


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
    first = ("base", "kNN-LM", "memory", "joint", ADAPTIVE)
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
    frequencies = _train_counts(corpus)[labels]
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


def _train_counts(corpus: TokenCorpus) -> np.ndarray:
    """How often each token id occurs in the train split."""
    counts = np.zeros(corpus.vocab_size, np.int64)
    for shard in corpus.split("train").shards:
        counts += np.bincount(shard, minlength=corpus.vocab_size)
    return counts


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
    return {**seconds, ADAPTIVE: seconds["joint"]}


def print_table(artefact: Artefact) -> None:
    """The table on standard output."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    results = json.loads(artefact.file("eval.json").read_text())
    seconds = json.loads(artefact.file(TIMING).read_text())
    table = Table(
        title=f"{results['positions']:,} held-out tokens ({results['split']})",
        caption=f"95 %: bootstrap over {results['resampled']}; gain: nats a token below base",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),  # the usual two would cut the names off at 80 columns
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("", overflow="fold")
    for header in ("perplexity", "95 %", "gain", "lmbda", "weights", "MB", "s"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in results["rows"]:
        table.add_row(
            row["name"],
            _number(row["perplexity"]),
            " - ".join(map(_number, row["interval"])),
            _number(row["gain"], 3),
            "" if row["lmbda"] is None else f"{row['lmbda']:.2f}",
            f"{row['parameters'] / 1e6:,.2f} M",
            f"{row['bytes'] / 1e6:,.1f}",
            f"{seconds[row['name']]:.1f}",
        )
    Console().print(table)


def _number(value: float | None, digits: int = 2) -> str:
    return "inf" if value is None else f"{value:.{digits}f}"
