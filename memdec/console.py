"""What a long run tells: one bar with rate and ETA on a terminal, plain lines elsewhere.

Everything goes to standard error, so that a command's result on standard output can be piped. Of the
processes that a launcher starts only the first talks.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from types import TracebackType
from typing import Self

_SECONDS_BETWEEN_LINES = 10.0
_SILENT = os.environ.get("RANK", "0") != "0"


def say(message: str) -> None:
    """One plain line for the person who runs the command."""
    if not _SILENT:
        print(message, file=sys.stderr, flush=True)


@functools.cache
def say_once(message: str) -> None:
    """:func:`say`, but a message that was said before is not said again."""
    say(message)


def on_terminal() -> bool:
    """Whether a bar has its place: a person watches, and this process is the one that talks."""
    return sys.stderr.isatty() and not _SILENT


def show_bytes(count: int) -> str:
    """A size as a person reads it, for example ``"1.5 GB"``."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


class Progress:
    """Progress over `total` units of work; `done` of them were finished in an earlier run.

    Args:
        description: what is going on, for example ``"keys of train"``.
        total: units of work in all.
        unit: name of a unit, for example ``"tokens"``.
        done: units that need no work any more; they do not count into the rate.
    """

    def __init__(self, description: str, total: int, unit: str, done: int = 0) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.count = done
        self._first = done
        self._start = time.monotonic()
        self._last_line = self._start
        self._note = ""
        self._bar = _terminal_bar(description, total, done) if on_terminal() else None

    def advance(self, units: int, note: str = "") -> None:
        """Adds finished units; `note` is a short extra such as ``"loss 3.21"``."""
        self.count += units
        self._note = note or self._note
        if self._bar is not None:
            task = self._bar.tasks[0]
            status = f"{self._rate():,.0f} {self.unit}/s {self._note}"
            self._bar.update(task.id, completed=self.count, status=status)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._line()

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if error is None:
            seconds = time.monotonic() - self._start
            new = self.count - self._first
            say(f"{self.description}: {new:,} {self.unit} in {_clock(seconds)}")

    def _rate(self) -> float:
        return (self.count - self._first) / max(time.monotonic() - self._start, 1e-9)

    def _line(self) -> None:
        rate = self._rate()
        left = (self.total - self.count) / rate if rate > 0 else 0.0
        say(
            f"{self.description}: {self.count:,} of {self.total:,} {self.unit}, "
            f"{rate:,.0f} {self.unit}/s, {_clock(left)} left {self._note}".rstrip()
        )


def _terminal_bar(description, total: int, done: int):  # type: ignore[no-untyped-def]
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    bar = Bar(*columns, console=Console(stderr=True))
    bar.add_task(description, total=total, completed=done, status="")
    return bar


def _clock(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
