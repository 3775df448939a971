from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from typer.testing import CliRunner, Result

from memdec.cli import make_app


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def memdec() -> Callable[..., Result]:
    """Runs a command in this process: ``memdec("eval", "--out", path)``."""

    def run(name: str, *arguments: object) -> Result:
        return CliRunner().invoke(make_app(name), [name, *map(str, arguments)])

    return run
