"""Shared by the tests of the ops: devices, kernel or reference, poisoned memory."""

from collections.abc import Iterator

import pytest
import torch

from memdec import _native
from memdec.environment import environment

# Without a GPU there are no tests for one, rather than a thousand skipped; test_cuda.py says so.
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN and huge integers, so that an element nobody wrote is noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "native"])
def implementation(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: str
) -> str:
    """Every test that takes it runs on the reference and, where they were built, the kernels."""
    if request.param == "reference":
        monkeypatch.setattr(_native, "kernels_for", lambda device_type: None)
    else:
        require_native(device)
    return request.param


@pytest.fixture
def native(device: str) -> None:
    """For what only the kernels can show."""
    require_native(device)


def require_native(device: str) -> None:
    reason = _native.why_missing(device)
    if reason is not None and environment.require_native:
        pytest.fail(f"MEMDEC_REQUIRE_NATIVE=1, but no native kernels for {device}: {reason}")
    if reason is not None:
        pytest.skip(f"no native kernels for {device}: {reason}")
