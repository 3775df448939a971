from __future__ import annotations

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from memdec.cli import make_app


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """All tests of this folder."""


@pytest.fixture
def memdec() -> Callable[..., Result]:
    """Runs a command in this process: ``memdec("eval", "--out", path)``."""

    def run(name: str, *arguments: object) -> Result:
        return CliRunner().invoke(make_app(name), [name, *map(str, arguments)])

    return run
