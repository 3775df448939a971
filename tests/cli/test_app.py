"""The command line as a whole."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import memdec
from memdec.cli import COMMANDS, make_app


def test_help_loads_no_library_that_is_slow_to_load():
    code = (
        "import sys; from memdec.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: print(end.code)\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-2:] == ["0", "[]"]
    for name, command in COMMANDS.items():
        assert name in run.stdout
        assert command.help in " ".join(run.stdout.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_flag_for_each_field(name):
    result = CliRunner().invoke(make_app(name), [name, "--help"])
    assert result.exit_code == 0, result.output
    if COMMANDS[name].config:
        config = getattr(importlib.import_module(COMMANDS[name].module), COMMANDS[name].config)
        for field in dataclasses.fields(config):
            assert f"--{field.name.replace('_', '-')}" in result.output
            assert field.metadata["help"]


def test_no_arguments_show_the_help():
    result = CliRunner().invoke(make_app(None), [])
    assert "Usage: memdec" in result.output


def test_version():
    result = CliRunner().invoke(make_app("--version"), ["--version"])
    assert result.exit_code == 0
    assert result.output == f"memdec {memdec.__version__}\n"


def test_version_of_a_source_tree_that_is_not_installed(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert memdec.__version__ == "0+unknown"


def test_an_unknown_command_is_refused():
    result = CliRunner().invoke(make_app("predict"), ["predict"])
    assert result.exit_code == 2
    assert "predict" in result.stderr


def test_python_m_memdec_info():
    run = subprocess.run(
        [sys.executable, "-m", "memdec", "info"], capture_output=True, text=True, check=True
    )
    import torch

    lines = dict(line.strip().split(":", 1) for line in run.stdout.splitlines() if ":" in line)
    assert lines["torch"].strip() == torch.__version__
    for name in ("fused_interpolate", "knn_scatter", "sparse_kl_loss", "token_log_probs"):
        assert name in lines["all of"].strip().split(", ")
    for device in ("cpu", "cuda"):
        assert lines[f"on {device}"].strip().startswith(("native", "plain PyTorch ("))
