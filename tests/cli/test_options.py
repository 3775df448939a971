"""A configuration becomes a command: flags, defaults, help, and how errors end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
import typer
from typer.testing import CliRunner

from memdec.cli.options import make_command
from memdec.config import Config, option, require
from memdec.environment import environment
from memdec.errors import MemdecError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleConfig(Config):
    corpus: Path = option(help="what to read")
    rate: float = option(5e-5, help="how fast")
    block_size: int = option(1024, help="how long")
    layers: int | None = option(None, help="how many")
    dtype: Literal["auto", "float32"] = option("auto", help="how exact")
    shuffle: bool = option(True, help="whether to shuffle")
    adapt: bool | None = option(None, help="whether to adapt")
    others: tuple[str, ...] = option((), help="what else")

    def check(self) -> None:
        require(self.rate > 0, "rate", "above 0", self.rate)


def invoke(run, *arguments: str, config: type[Config] | None = ExampleConfig):
    app = typer.Typer(rich_markup_mode=None)
    app.command()(make_command(config, run))
    return CliRunner().invoke(app, arguments)


def received(*arguments: str) -> ExampleConfig:
    seen = []
    result = invoke(lambda config: seen.append(config), *arguments)
    assert result.exit_code == 0, result.output
    return seen[0]


def test_defaults_are_the_dataclass_own():
    assert received("--corpus", "docs") == ExampleConfig(corpus=Path("docs"))


def test_every_kind_of_field_has_its_flag():
    given = received(
        *("--corpus", "docs", "--rate", "0.1", "--block-size", "8", "--layers", "2"),
        *("--dtype", "float32", "--no-shuffle", "--no-adapt", "--others", "a=b", "--others", "c=d"),
    )
    assert given == ExampleConfig(
        corpus=Path("docs"),
        rate=0.1,
        block_size=8,
        layers=2,
        dtype="float32",
        shuffle=False,
        adapt=False,
        others=("a=b", "c=d"),
    )


def test_help_shows_each_field_with_help_and_default():
    text = " ".join(invoke(print, "--help").output.split())
    for field in dataclasses.fields(ExampleConfig):
        assert f"--{field.name.replace('_', '-')}" in text
        assert field.metadata["help"] in text
    assert "[default: 1024]" in text
    assert "[default: shuffle]" in text


def test_out_is_a_flag_when_the_function_writes():
    seen = []
    run = lambda config, out: seen.append(out)  # noqa: E731
    assert invoke(run, "--corpus", "docs").exit_code == 2
    assert invoke(run, "--corpus", "docs", "--out", "there").exit_code == 0
    assert seen == [Path("there")]


def test_a_command_without_configuration():
    result = invoke(lambda: print("hello"), config=None)
    assert (result.exit_code, result.stdout) == (0, "hello\n")


def test_an_integer_is_the_exit_status():
    assert invoke(lambda config: 1, "--corpus", "docs").exit_code == 1
    assert invoke(lambda config: 0, "--corpus", "docs").exit_code == 0


def fail(error: BaseException):
    def run(config):
        raise error

    return run


def test_bad_options_are_one_line():
    result = invoke(print, "--corpus", "docs", "--rate", "-1")
    assert result.exit_code == 1
    assert result.stderr == "error: rate must be above 0, got -1.0\n"


@pytest.mark.parametrize("error", [MemdecError("bad\n text"), OSError("bad\n text")])
def test_an_error_is_one_line(error):
    result = invoke(fail(error), "--corpus", "docs")
    assert (result.exit_code, result.stderr, result.stdout) == (1, "error: bad text\n", "")


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(environment, "debug", True)
    result = invoke(fail(MemdecError("bad text")), "--corpus", "docs")
    assert isinstance(result.exception, MemdecError)


def test_a_defect_is_not_hidden():
    result = invoke(fail(AssertionError("ours")), "--corpus", "docs")
    assert isinstance(result.exception, AssertionError)


def test_an_interrupt_says_how_to_go_on():
    def stage(config, out):
        raise KeyboardInterrupt

    result = invoke(stage, "--corpus", "docs", "--out", "out")
    assert result.exit_code == 130
    assert result.stderr == "stopped; run the same command again to go on\n"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("block_size", "+-5", "an integer"),
        ("block_size", "5.0", "an integer"),
        pytest.param("rate", 10**400, "a number", id="huge"),
    ],
)
def test_what_is_no_number_is_named(name, value, expected):
    with pytest.raises(MemdecError, match=f"{name} must be {expected}, got "):
        ExampleConfig(**{"corpus": "c", name: value})


def test_an_interrupt_of_what_leaves_nothing_promises_nothing():
    result = invoke(fail(KeyboardInterrupt()), "--corpus", "docs")
    assert (result.exit_code, result.stderr) == (130, "stopped\n")
