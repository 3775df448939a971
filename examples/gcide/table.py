"""Prints the tables of a result of run.py: the rows, and how far the goals are.

python examples/gcide/table.py examples/gcide/results/*.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]
Row = Mapping[str, Any]


def tables(path: Path) -> str:
    result = json.loads(path.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    return "\n".join(
        [_head(result), "", *_main(rows), "", *_outside(result, rows), "", *_goals(result)]
    )


def _head(result: Result) -> str:
    machine, held_out = result["machine"], result["held_out"]
    return (
        f"{result['train_tokens']:,} train tokens, {held_out['test']:,} test tokens; "
        f"{machine['device']}, torch {machine['torch']}, transformers {machine['transformers']}."
    )


def _main(rows: Mapping[str, Row]) -> Iterator[str]:
    yield "| | alone | joint | 95 % interval | lmbda | joint, lmbda a token | 95 % interval | weights | training s | stages before, s | keys / weights |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for name, row in rows.items():
        cells = [
            _perplexity(row, "alone"),
            _perplexity(row, "joint"),
            _interval(row, "joint"),
            _number(row.get("lmbda")),
            _perplexity(row, "gated"),
            _interval(row, "gated"),
            f"{row['parameters'] / 1e6:.1f} M" if row["parameters"] else "",
            *_seconds(row),
            _number(row.get("keys_to_weights"), 1),
        ]
        yield f"| {name} | {' | '.join(cells)} |"


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
    found = row["perplexity"].get(how, {}).get("test")
    return "" if found is None else " to ".join(_number(end) for end in found["interval"])


def _number(value: float | None, digits: int = 2, missing: str = "") -> str:
    return missing if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    print("\n\n".join(tables(Path(name)) for name in sys.argv[1:]))
