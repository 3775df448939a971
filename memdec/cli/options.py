"""From a configuration dataclass to a command: one flag a field, its help and default included."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from memdec.config import Config
from memdec.console import say
from memdec.environment import environment
from memdec.errors import MemdecError

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended


def make_command(config: type[Config] | None, run: Callable[..., object]) -> Callable[..., None]:
    """A function for ``typer.Typer.command`` that builds `config` from flags and calls `run`.

    Args:
        config: the dataclass whose fields become flags; None for a command without any.
        run: called with the configuration, and with ``--out`` when it has a parameter ``out``. An
            integer that it returns is the exit status.
    """
    parameters = _config_parameters(config) if config else []
    writes = "out" in inspect.signature(run).parameters
    if writes:
        flag = typer.Option(
            help="directory to write; the same command goes on there", show_default=False
        )
        parameters.append(_parameter("out", Path, flag))

    def command(**values: Any) -> None:
        arguments = {"out": values.pop("out")} if writes else {}
        with_config = (lambda: run(config(**values), **arguments)) if config else run
        raise typer.Exit(run_reporting_errors(with_config, goes_on=writes))

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def run_reporting_errors(run: Callable[[], object], goes_on: bool) -> int:
    """Calls `run` and returns the exit status; an error becomes one line on standard error.

    `goes_on` says whether the command, when it is run again, goes on where Ctrl-C ended it.

    ``MEMDEC_DEBUG=1`` lets the error through with its traceback.
    """
    try:
        result = run()
    except BrokenPipeError:
        raise  # the reader of a pipe has seen enough: typer ends the program quietly
    except (MemdecError, OSError) as error:
        if environment.debug:
            raise
        print("error:", " ".join(_message(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("stopped; run the same command again to go on" if goes_on else "stopped")
        return INTERRUPTED
    return result if isinstance(result, int) else 0


def _message(error: MemdecError | OSError) -> str:
    """The error's, of the system's errors without the number."""
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, (str, Path)):
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _config_parameters(config: type[Config]) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(config)
    parameters = []
    for field in dataclasses.fields(config):
        help_text = field.metadata.get("help", "")
        if field.default is dataclasses.MISSING:
            flag = typer.Option(help=help_text, show_default=False)
            parameters.append(_parameter(field.name, _flag_type(hints[field.name]), flag))
        else:
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            flag = typer.Option(help=help_text, show_default=default not in (None, []))
            parameters.append(_parameter(field.name, _flag_type(hints[field.name]), flag, default))
    return parameters


def _parameter(
    name: str, hint: Any, flag: Any, default: Any = inspect.Parameter.empty
) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, flag]
    )


def _flag_type(hint: Any) -> Any:
    """The type that typer parses for a field; what it does not know is text, and Config converts."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        choices = [choice for choice in typing.get_args(hint) if choice is not type(None)]
        inner = _flag_type(choices[0]) if len(choices) == 1 else str
        return inner | None if type(None) in typing.get_args(hint) else inner
    if origin is tuple:
        return list[_flag_type(typing.get_args(hint)[0])]  # type: ignore[misc]
    return hint
