"""Text in, documents out: files, JSON lines or a `datasets` data set, without repeats."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from memdec.console import say_once
from memdec.errors import MemdecError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".jsonl")

DocumentUnit = Literal["file", "line", "paragraph"]

_SURROGATE = re.compile("[\ud800-\udfff]")
_PARAGRAPH_BREAK = re.compile(r"\n[ \t]*(?:\n[ \t]*)+")


@dataclass(frozen=True)
class Documents:
    """Distinct, non-empty documents in the order of the corpus.

    Attributes:
        texts: the documents.
        fingerprint: SHA-256 over every document read, repeats included.
        counts: what was read and what was dropped.
    """

    texts: list[str]
    fingerprint: str
    counts: dict[str, int]


def collect(texts: Iterable[str], drop_repeated_paragraphs: bool) -> Documents:
    """Drops empty documents, exact repeats of a document and, if asked, repeated paragraphs.

    Of a repeat the first occurrence stays. Paragraphs are compared without regard to white space.
    """
    digest = hashlib.sha256()
    kept: list[str] = []
    seen: set[bytes] = set()
    seen_paragraphs: set[bytes] = set()
    read = empty = repeated = repeated_paragraphs = 0
    for text in texts:
        read += 1
        name = _digest(text)
        digest.update(name)
        if name in seen:
            repeated += 1
            continue
        seen.add(name)
        if drop_repeated_paragraphs:
            paragraphs = list(filter(str.strip, _PARAGRAPH_BREAK.split(text)))
            fresh = [item for item in paragraphs if _first_time(item, seen_paragraphs)]
            repeated_paragraphs += len(paragraphs) - len(fresh)
            text = "\n\n".join(fresh)
        if text.strip():
            kept.append(text)
        else:
            empty += 1
    counts = {
        "documents_read": read,
        "documents_empty": empty,
        "documents_repeated": repeated,
        "paragraphs_repeated": repeated_paragraphs,
    }
    return Documents(kept, digest.hexdigest(), counts)


def read_corpus(corpus: Path, unit: DocumentUnit, text_field: str) -> Iterator[str]:
    """The documents of a file, or of every text file under a directory in sorted order.

    In a directory only names that end in one of ``TEXT_SUFFIXES`` count, and hidden ones do not; a
    corpus that is one file may have any name. A line of a ``.jsonl`` file is one document.

    Raises:
        MemdecError: nothing there, nothing that is text, or a line that is no JSON object with
            the text field.
    """
    for path in text_files(corpus):
        text = decode_text(path.read_bytes(), path)
        if path.suffix.lower() == ".jsonl":
            yield from _json_lines(path, text, text_field)
        elif unit == "file":
            yield text
        else:
            parts = text.split("\n") if unit == "line" else _PARAGRAPH_BREAK.split(text)
            yield from filter(str.strip, parts)


def text_files(corpus: Path) -> list[Path]:
    """The files that :func:`read_corpus` reads. Links to directories are named and left out."""
    if corpus.is_file():
        return [corpus]
    if not corpus.is_dir():
        raise MemdecError(f"expected a text file or a directory of them, found none at {corpus}")
    seen = [path for path in corpus.rglob("*") if not is_hidden(path, corpus)]
    for path in seen:
        if path.is_symlink() and path.is_dir():
            say_once(f"{path} is a link to a directory, which is not read")
    found = [path for path in seen if path.suffix.lower() in TEXT_SUFFIXES and path.is_file()]
    if not found:
        raise MemdecError(
            f"{corpus} holds no file whose name ends in {', '.join(TEXT_SUFFIXES)}; "
            "name a single file to read it whatever it is called"
        )
    return sorted(found, key=lambda path: path.relative_to(corpus).parts)


def is_hidden(path: Path, corpus: Path) -> bool:
    """Whether a name on the way from `corpus` to `path` begins with a dot: nothing there is read."""
    return any(part.startswith(".") for part in path.relative_to(corpus).parts)


def read_dataset(name: str, subset: str | None, text_field: str) -> Iterator[str]:
    """The rows of a `datasets` data set's train split: a hub name or a directory saved to disk."""
    try:
        import datasets
    except ImportError:
        raise MemdecError(
            "reading a data set needs the package datasets: pip install datasets"
        ) from None
    try:
        if (Path(name) / "state.json").is_file():
            rows = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(name, subset, split="train")
    except Exception as error:  # whatever the library raises, the person gave a wrong name
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MemdecError(f"the data set {name!r} could not be loaded: {reason}") from error
    if text_field not in rows.column_names:
        raise MemdecError(
            f"the data set {name!r} has no field {text_field!r}; it has {rows.column_names}"
        )
    for number, row in enumerate(rows):
        if not isinstance(row[text_field], str):
            raise MemdecError(
                f"the data set {name!r} has no text in row {number}, field {text_field!r}: "
                f"{row[text_field]!r}"
            )
        yield row[text_field]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _first_time(paragraph: str, seen: set[bytes]) -> bool:
    name = _digest(" ".join(paragraph.split()))
    if name in seen:
        return False
    seen.add(name)
    return True


def decode_text(content: bytes, source: Path | str) -> str:
    """The text of a file, its line ends as ``\\n``.

    Raises:
        MemdecError: a NUL byte, or not UTF-8; the message names `source`.
    """
    if b"\0" in content:
        raise MemdecError(f"{source} is not text: it holds a NUL byte at {content.index(0):,}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MemdecError(f"{source} is not UTF-8 text: bad byte at {error.start:,}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json_lines(path: Path, text: str, text_field: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)[text_field]
        except (ValueError, TypeError, KeyError, RecursionError):
            value = None
        if isinstance(value, str) and _SURROGATE.search(value):
            raise MemdecError(
                f"{path}, line {number}: its text is not Unicode, it has half a surrogate pair"
            )
        if not isinstance(value, str):
            raise MemdecError(
                f"{path}, line {number}: expected a JSON object with a text field {text_field!r}, "
                f"got {line.strip()[:60]!r}"
            )
        yield value
