"""Where the kernels come from, what is said when there are none, and what an import costs."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from memdec import _native
from memdec.environment import Environment, environment
from memdec.ops import fused_interpolate

ROW = torch.zeros(1, 4)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "_import_error", "No module named 'memdec._C'", raising=False)
    monkeypatch.setattr(_native, "_in_use", {})
    monkeypatch.setattr(_native, "_said", set())
    monkeypatch.setattr(environment, "require_native", False)


def test_fallback_gives_the_same_result_and_is_said_once(without_kernels: None) -> None:
    with pytest.warns(RuntimeWarning, match="no native kernels for cpu tensors: No module named"):
        out = fused_interpolate(ROW, ROW, 0.5)
    torch.testing.assert_close(out, torch.full((1, 4), 0.25).log())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_interpolate(ROW, ROW, 0.5)


def test_require_native_turns_every_fallback_into_an_error(
    without_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "require_native", True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="MEMDEC_REQUIRE_NATIVE=1"):
            fused_interpolate(ROW, ROW, 0.5)


def test_other_devices_have_no_kernels() -> None:
    assert _native.why_missing("xpu") is not None


def test_simd_level_comes_from_the_environment(
    native: None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _native._C.simd_level()
    monkeypatch.setattr(_native, "_in_use", {})
    monkeypatch.setattr(environment, "simd", "sse9")
    with pytest.raises(ValueError, match=r"MEMDEC_SIMD must be one of baseline.*got 'sse9'"):
        fused_interpolate(ROW, ROW, 0.5)
    monkeypatch.setattr(environment, "simd", "baseline")
    try:
        fused_interpolate(ROW, ROW, 0.5)
        assert _native._C.simd_level() == "baseline"
    finally:
        _native._C.set_simd_level(before)


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no transparent huge pages"
)
def test_large_results_ask_for_huge_pages(native: None) -> None:
    rows = torch.zeros(64, 2**18)  # 64 MB: more than malloc takes from a heap
    out = fused_interpolate(rows, rows, 0.5)
    assert "hg" in memory_flags(out[32].data_ptr())
    assert "hg" not in memory_flags(rows[32].data_ptr())


def memory_flags(address: int) -> list[str]:
    """The VmFlags of the mapping that holds the address, see proc_pid_smaps(5)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            begin, end = (int(bound, 16) for bound in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return rest.split()
    raise AssertionError(f"{address:x} is not mapped")


@pytest.mark.parametrize(
    ("value", "flag"), [(None, False), ("", False), ("0", False), ("1", True), ("yes", True)]
)
def test_environment_is_read(
    value: str | None, flag: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MEMDEC_REQUIRE_NATIVE", "MEMDEC_CHECK_VALUES", "MEMDEC_SIMD", "MEMDEC_DEBUG"):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert Environment.read() == Environment(flag, flag, value or None, flag)


def test_importing_the_ops_is_light() -> None:
    code = (
        "import sys, memdec.ops; "
        "heavy = ['transformers', 'faiss', 'matplotlib', 'datasets', 'typer', 'rich']; "
        "print([name for name in heavy if name in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_importing_memdec_imports_no_torch() -> None:
    assert run_python("import sys, memdec; print('torch' in sys.modules)") == "False"


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def test_a_source_tree_without_kernels_is_named(tmp_path):
    shutil.copytree(
        Path(_native.__file__).parent,
        tmp_path / "memdec",
        ignore=shutil.ignore_patterns("_C*", "__pycache__"),
    )
    code = """
import sys
# An editable install finds its own memdec._C, whatever package asks for it.
sys.meta_path = [one for one in sys.meta_path if "__editable__" not in one.__module__]
from memdec import _native
print(_native.why_missing("cpu"))
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith(f"no memdec._C in {tmp_path / 'memdec'}, is it a source tree")
