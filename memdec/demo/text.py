"""Real text that every machine with CPython has: docstrings of its library, and pydoc's topics."""

from __future__ import annotations

import ast
import importlib
import json
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from memdec.console import Progress
from memdec.errors import MemdecError

# Installed packages differ from machine to machine; tests and vendored tools say little in prose.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}


def docstrings() -> dict[str, str]:
    """The docstrings of each module of the running Python's library, joined, by file name.

    Modules come in order of their names. A file that this Python cannot parse is left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED & set(path.relative_to(root).parts)
    ]
    documents = {}
    with Progress("docstrings of the library", len(files), "files") as progress:
        for path in files:
            text = "\n\n".join(_docstrings(path))
            if text:
                documents[path.relative_to(root).as_posix()] = text
            progress.advance(1)
    if not documents:
        raise MemdecError(f"expected the sources of Python's library in {root}, found none")
    return documents


def topics() -> dict[str, str]:
    """pydoc's topics, the texts behind ``help("assert")``, by name."""
    try:
        found: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise MemdecError(
            "expected the module pydoc_data.topics, which CPython ships; this Python lacks it"
        ) from error
    return dict(sorted(found.items()))


def write_lines(documents: Mapping[str, str], file: IO[bytes]) -> None:
    """Writes one JSON object a line, with the fields ``name`` and ``text``."""
    for name, text in documents.items():
        file.write(json.dumps({"name": name, "text": text}).encode() + b"\n")


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text
