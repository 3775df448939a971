"""``memdec info`` tells why anything fell back."""

from __future__ import annotations

from memdec import _native, info


def test_without_kernels_each_device_says_why(monkeypatch):
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "_import_error", "no compiler", raising=False)
    found = info.sections()
    assert found["built"] == {"native kernels": "none: no compiler"}
    on = {found["ops"][f"on {device}"] for device in ("cpu", "cuda")}
    assert on == {"plain PyTorch (no compiler)"}


def test_every_public_op_is_listed():
    from memdec import ops

    listed = info.sections()["ops"]["all of"].split(", ")
    assert listed == [name for name in ops.__all__ if name.islower()]


def test_values_stand_in_one_column(capsys):
    info.print_info()
    printed = capsys.readouterr().out
    values = {
        f"  {name}:": value for part in info.sections().values() for name, value in part.items()
    }
    columns = set()
    for line in printed.splitlines():
        for name, value in values.items():
            if line.startswith(name):
                columns.add(line.index(value, len(name)))
    assert len(columns) == 1
