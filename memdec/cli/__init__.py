"""The command line: ``memdec COMMAND``. Each command is a library call with its configuration."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

import memdec
from memdec.cli.options import make_command


@dataclass(frozen=True)
class Command:
    """Where a command's configuration and function are; its module is loaded when it is run."""

    help: str
    module: str
    function: str
    config: str | None


COMMANDS = {
    "build": Command(
        "Run every stage: from a base and a folder of text to a memory.",
        "memdec.build",
        "build",
        "BuildConfig",
    ),
    "plan": Command(
        "Say what a build would need, and whether it fits.",
        "memdec.plan",
        "plan",
        "BuildConfig",
    ),
    "demo": Command(
        "Run everything offline on a tiny model and Python's docs.",
        "memdec.demo",
        "demo",
        "DemoConfig",
    ),
    "prepare": Command(
        "Turn text into token shards, split by document.",
        "memdec.data.corpus",
        "prepare",
        "PrepareConfig",
    ),
    "adapt": Command(
        "Fine-tune a model on the domain, to be the teacher.",
        "memdec.training.adapt",
        "adapt",
        "AdaptConfig",
    ),
    "datastore": Command(
        "Store and index the teacher's keys of the train text.",
        "memdec.data.datastore",
        "datastore",
        "DatastoreConfig",
    ),
    "targets": Command(
        "Turn neighbours into next-token distributions.",
        "memdec.data.targets",
        "targets",
        "TargetsConfig",
    ),
    "audit": Command(
        "Check a sample of the targets before training on them.",
        "memdec.data.audit",
        "audit",
        "AuditConfig",
    ),
    "train": Command(
        "Train the memory on the targets.",
        "memdec.training.distill",
        "train",
        "TrainConfig",
    ),
    "eval": Command(
        "Compare base, kNN-LM, memory and joint on held-out text.",
        "memdec.evaluation.evaluate",
        "evaluate",
        "EvalConfig",
    ),
    "generate": Command(
        "Continue a prompt with base and memory.",
        "memdec.generation",
        "generate",
        "GenerateConfig",
    ),
    "inspect": Command(
        "Show what the memory changes at each token of a text.",
        "memdec.inspection",
        "inspect",
        "InspectConfig",
    ),
    "info": Command(
        "Print versions, what was built, and what is in use.",
        "memdec.info",
        "print_info",
        None,
    ),
}


def make_app(chosen: str | None) -> typer.Typer:
    """The application with the flags of command `chosen`.

    The other commands have their one line of help only: loading a stage's module loads torch and
    transformers, which ``memdec --help`` should not wait for.
    """
    app = typer.Typer(
        name="memdec",
        help="Distil a kNN-LM retriever into a small model beside any frozen language model.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,  # the framed tables cut long flags off at 80 columns
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    for name, command in COMMANDS.items():
        function = _load(command) if name == chosen else _unchosen
        app.command(name, help=command.help)(function)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command ``memdec``."""
    if not sys.stderr.isatty():
        # Model libraries draw bars, which are noise in a log; those of memdec become lines there.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    make_app(arguments[0] if arguments else None)(arguments, prog_name="memdec")


def _load(command: Command):  # type: ignore[no-untyped-def]
    module = importlib.import_module(command.module)
    config = getattr(module, command.config) if command.config else None
    return make_command(config, getattr(module, command.function))


def _print_version(asked: bool) -> None:
    if asked:
        print(f"memdec {memdec.__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """The options that go before a command."""


def _unchosen() -> None:
    raise AssertionError("only the chosen command is run")
