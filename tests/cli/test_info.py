"""``memdec info`` tells why anything fell back."""

from __future__ import annotations

from memdec import _native, info


def test_without_kernels_each_op_says_why(monkeypatch):
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "_import_error", "no compiler", raising=False)
    found = info.sections()
    assert found["built"] == {"native kernels": "none: no compiler"}
    assert set(found["ops"].values()) == {
        "cpu plain PyTorch (no compiler); cuda plain PyTorch (no compiler)"
    }


def test_an_op_is_listed_for_each_public_function():
    from memdec import ops

    assert list(info.sections()["ops"]) == [name for name in ops.__all__ if name.islower()]
