from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="module")
def gcide(one_thread: None) -> Iterator[None]:
    """The files of examples/gcide import one another by name, as a script's do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "examples" / "gcide")
        yield
