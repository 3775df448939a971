"""Prints the tables of results of run.py: the rows, their cost, and how far the goals are.

    python examples/gcide/table.py examples/gcide/results/h*.json

Results that differ in their seed alone are one: the tables are those of the least seed, and one more
gives mean and standard deviation over the seeds.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]
Row = Mapping[str, Any]


def tables(paths: Iterable[Path]) -> str:
    """The tables of every experiment, in the order of its first result."""
    experiments: dict[str, list[Result]] = {}
    for path in paths:
        result = json.loads(path.read_text())
        shared = [result[fact] for fact in ("inputs", "settings", "train_tokens", "held_out")]
        shared.append(result["machine"]["device"])
        experiments.setdefault(json.dumps(shared, sort_keys=True), []).append(result)
    return "\n\n".join(
        _tables(sorted(results, key=lambda result: result.get("seed", 0)))
        for results in experiments.values()
    )


def _tables(results: Sequence[Result]) -> str:
    """Of one experiment's results, by seed."""
    result = results[0]
    rows = {row["name"]: row for row in result["rows"]}
    parts = [[_head(result)], _main(rows), _cost(rows), _outside(result, rows)]
    if len(results) > 1:
        parts.append(_seeds(results))
    return "\n\n".join("\n".join(part) for part in [*parts, _goals(result)])


def _head(result: Result) -> str:
    train, test = result["train_tokens"], result["held_out"]["test"]
    return f"{train:,} train tokens, {test:,} test tokens; {machine(result)}"


def machine(result: Mapping[str, Any]) -> str:
    """What a result was measured on."""
    found = result["machine"]
    return f"{found['device']}, torch {found['torch']}, transformers {found['transformers']}."


def _main(rows: Mapping[str, Row]) -> Iterator[str]:
    """Perplexity on the test split."""
    yield "| | alone | 95 % interval | joint | 95 % interval | lmbda | joint, lmbda a token | 95 % interval |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, row in rows.items():
        cells = [
            _perplexity(row, "alone"),
            _interval(row, "alone"),
            _perplexity(row, "joint"),
            _interval(row, "joint"),
            _number(row.get("lmbda")),
            _perplexity(row, "gated"),
            _interval(row, "gated"),
        ]
        yield f"| {name} | {' | '.join(cells)} |"


def _cost(rows: Mapping[str, Row]) -> Iterator[str]:
    """What a row needs beside the base, and the GPU's seconds that went into it."""
    yield "| | weights | MB in 16 bits | keys / weights | training s | stages before, s |"
    yield "|---|---|---|---|---|---|"
    for name, row in rows.items():
        kept = kept_bytes(row)
        cells = [
            f"{row['parameters'] / 1e6:.1f} M" if row["parameters"] else "",
            f"{kept / 1e6:,.0f}" if kept else "",
            _number(row.get("keys_to_weights"), 1),
            *_seconds(row),
        ]
        yield f"| {name} | {' | '.join(cells)} |"


def kept_bytes(row: Row) -> int:
    """What a row needs beside the base, or in its place: weights in 16 bits, keys, text."""
    return int(2 * row["parameters"] + row.get("key_bytes", 0) + row.get("text_bytes", 0))


def _seeds(results: Sequence[Result]) -> Iterator[str]:
    """Mean and standard deviation of the perplexity of rows that several seeds have."""
    columns = [("alone", "test"), ("joint", "test"), ("gated", "test")]
    columns += [("gated", text) for text in results[0]["outside"]]
    heads = ["alone", "joint", "lmbda a token"]
    heads += [f"{text}: lmbda a token" for text in results[0]["outside"]]
    yield f"| | seeds | {' | '.join(heads)} |"
    yield "|---" * (2 + len(heads)) + "|"
    for name in [row["name"] for row in results[0]["rows"]]:
        found = [row for result in results for row in result["rows"] if row["name"] == name]
        if len(found) > 1:
            cells = [_spread([_value(row, how, text) for row in found]) for how, text in columns]
            yield f"| {name} | {len(found)} | {' | '.join(cells)} |"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def _outside(result: Result, rows: Mapping[str, Row]) -> Iterator[str]:
    """Perplexity outside the domain, and what happens to rare tokens and function words."""
    texts = result["outside"]
    heads = [f"{text}: {how}" for text in texts for how in ("alone", "joint", "lmbda a token")]
    heads += ["rare tokens, joint", "lmbda a token", "function words, joint", "lmbda a token"]
    yield f"| | {' | '.join(heads)} |"
    yield "|---" * (1 + len(heads)) + "|"
    for name, row in rows.items():
        cells = [
            _perplexity(row, how, text) for text in texts for how in ("alone", "joint", "gated")
        ]
        cells += [
            _number(row.get(measure, {}).get(how))
            for measure in ("tail_gain", "function_words")
            for how in ("joint", "gated")
        ]
        yield f"| {name} | {' | '.join(cells)} |"


def _goals(result: Result) -> Iterator[str]:
    """The goals, each at the memory that is best on validation."""
    rows = result["rows"]
    base = next((row for row in rows if row["setting"]["kind"] == "base"), None)
    yield "| goal | of | aim | constant lmbda | lmbda a token |"
    yield "|---|---|---|---|---|"
    for layers, aim in ((8, 12.5), (30, 8.4)):
        best = _best(rows, layers)
        if best is None:
            continue
        of = best["name"]
        found = f"{_perplexity(best, 'joint')} | {_perplexity(best, 'gated')}"
        yield f"| perplexity of a memory of {layers} layers | {of} | {aim} | {found} |"
        for text in result["outside"] if base is not None else ():
            rises = [
                f"{100 * (_value(best, how, text) / _value(base, 'alone', text) - 1):+.1f} %"
                for how in ("joint", "gated")
            ]
            yield f"| {text} against the base | {of} | within 1 % | {' | '.join(rises)} |"
        for measure, name, aim_text in (
            ("tail_gain", "median gain of the rarest tenth", "3 times"),
            ("function_words", "mean change of function words", "at most 0.2"),
        ):
            found = " | ".join(_number(best[measure][how]) for how in ("joint", "gated"))
            yield f"| {name} | {of} | {aim_text} | {found} |"


def _best(rows: list[Row], layers: int) -> Row | None:
    memories = [
        row
        for row in rows
        if row["setting"]["kind"] == "memory" and _layers(row["setting"]) == layers
    ]
    return min(memories, key=lambda row: _value(row, "joint", "validation"), default=None)


def _layers(setting: Mapping[str, Any]) -> int:
    layers = setting["layers"]
    return len(layers) if isinstance(layers, list) else layers


def _seconds(row: Row) -> tuple[str, str]:
    """Of the training, and of all that was made for it; other rows may have needed that too."""
    stages = dict(row.get("stage_seconds", {}))
    train = stages.pop("train", None)
    return _number(train, 0), _number(sum(stages.values()) if stages else None, 0)


def _value(row: Row, how: str, text: str) -> float:
    return float(row["perplexity"][how][text]["perplexity"])


def _perplexity(row: Row, how: str, text: str = "test") -> str:
    found = row["perplexity"].get(how, {}).get(text)
    return "" if found is None else _number(found["perplexity"], missing="infinite")


def _interval(row: Row, how: str) -> str:
    found = row["perplexity"].get(how, {}).get("test") or {"interval": None}
    return " to ".join(_number(end) for end in found["interval"] or ())


def _number(value: float | None, digits: int = 2, missing: str = "") -> str:
    return missing if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    print(tables(Path(name) for name in sys.argv[1:]))
