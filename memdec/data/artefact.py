"""A stage's directory: files written whole or not at all, a manifest, and what makes a rerun safe.

While a stage runs, ``progress.json`` lists its request (kind, parameters, fingerprints of the
inputs) and the files finished so far. When it ends, ``manifest.json`` takes its place. Running the
same request again goes on where it stopped, or does nothing; a different request is refused.
Seconds live in ``timing.json``, so every other file depends on inputs and seed alone.

Several processes may write one stage: each records what it finished in a file of its own
(``progress-1.json``), which the process that opened the stage gathers when it ends or is run again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from memdec.config import convert
from memdec.errors import MemdecError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
TIMING = "timing.json"
LOCK = ".lock"

T = TypeVar("T")


@dataclass(frozen=True)
class Artefact:
    """A finished artefact, opened for reading."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str, kind: str) -> Artefact:
        """Opens a finished artefact and checks that every file has its recorded size.

        Raises:
            MemdecError: nothing there, another kind, an unfinished stage, a missing or cut file.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            state = (
                "is unfinished: run its stage again" if (path / PROGRESS).exists() else "is none"
            )
            raise MemdecError(f"expected a directory of {kind} at {path}, which {state}")
        manifest = _read_json(path / MANIFEST)
        if manifest.get("kind") != kind:
            raise MemdecError(
                f"expected a directory of {kind}, {path} is one of {manifest.get('kind')}"
            )
        if manifest.get("format") != FORMAT_VERSION:
            raise MemdecError(
                f"{path} has format {manifest.get('format')}, this memdec reads {FORMAT_VERSION}"
            )
        artefact = cls(path, manifest)
        for part in ("params", "inputs"):
            artefact.field(dict, part)
        for name in artefact.field(dict, "files"):
            _check_size(path, name, artefact.field(int, "files", name, "bytes"))
            artefact.field(str, "files", name, "sha256")
        return artefact

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest, which holds the SHA-256 of every file."""
        return fingerprint(self.manifest)

    def field(self, expected: type[T], *names: str, default: T | None = None) -> T:
        """A value of the manifest, under `names` from the outside in.

        Args:
            default: where the last of them is not there; None is an error then.

        Raises:
            MemdecError: it is not there or of another type than `expected`.
        """
        return _field(self.path / MANIFEST, self.manifest, expected, *names, default=default)

    def file(self, name: str) -> Path:
        return self.path / name

    def changed_files(self) -> list[str]:
        """Files whose bytes are not those that were written, by SHA-256. Reads them all."""
        records = self.manifest["files"].items()
        return [
            name for name, record in records if file_sha256(self.file(name)) != record["sha256"]
        ]


def check_input(artefact: Artefact, name: str, found: str) -> None:
    """Checks that `artefact` was made from what goes with it now.

    Raises:
        MemdecError: its input `name` has another fingerprint than `found`, or it has no such input.
    """
    expected = artefact.manifest["inputs"].get(name)
    if expected is None:
        raise MemdecError(f"{artefact.path} was made without {name}, this run has {_short(found)}")
    if expected != found:
        raise MemdecError(
            f"{artefact.path} was made with {name} {_short(expected)}, this run has {_short(found)}"
        )


def check_option(artefact: Artefact, name: str, found: Any, default: Any) -> None:
    """Checks that `artefact` was made with the option that goes with it now.

    Args:
        default: the option's, where the manifest does not name it.

    Raises:
        MemdecError: it was made with another value than `found`.
    """
    expected = artefact.manifest["params"].get(name, default)
    if expected != found:
        raise MemdecError(
            f"{artefact.path} was made with option {name} = {expected}, this run has {found}; "
            "stages that read one another's results need the same"
        )


class StageWriter:
    """Writes one artefact; made by :func:`stage` or :func:`joined_stage`.

    Several threads may write files of their own.
    """

    def __init__(self, path: Path, progress: dict[str, Any], records: str = PROGRESS) -> None:
        self.path = path
        self.finished = False
        self._progress = progress
        self._records = records
        self._recording = threading.Lock()
        self._start = time.monotonic()

    def has(self, name: str) -> bool:
        """Whether the file was finished, by this process or before it began."""
        return name in self._progress["files"]

    def file(self, name: str) -> Path:
        return self.path / name

    def note(self, key: str) -> Any:
        """A value recorded by :meth:`set_note`, or None."""
        return self._progress["notes"].get(key)

    def set_note(self, key: str, value: Any) -> None:
        """Records a small JSON value that a rerun should find, for example a chosen temperature."""
        with self._recording:
            self._progress["notes"][key] = value
            self._save_progress()

    def write(self, name: str, write: Callable[[IO[bytes]], object]) -> None:
        """Writes one file through a temporary name; `write` gets the open binary file."""
        target = self.path / name
        temporary = target.with_name(target.name + ".tmp")
        with clear_disk_errors(target):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(temporary, "wb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        self._record(name)

    def write_directory(self, name: str, write: Callable[[Path], object]) -> None:
        """Writes a directory of files (a model) through a temporary name."""
        target = self.path / name
        temporary = target.with_name(target.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        with clear_disk_errors(target):
            try:
                temporary.mkdir(parents=True)
                write(temporary)
                sync_files(temporary)
                shutil.rmtree(target, ignore_errors=True)  # left by a run killed before recording
                os.replace(temporary, target)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        files = sorted(path for path in target.rglob("*") if path.is_file())
        self._progress["notes"][f"directory {name}"] = len(files)  # saved by the next line
        self._record(*(str(path.relative_to(self.path)) for path in files))

    def has_directory(self, name: str) -> bool:
        return self.note(f"directory {name}") is not None

    def finish(self, timing: Mapping[str, float] | None = None, **fields: Any) -> Artefact:
        """Writes timing and manifest; `fields` (counts, dtypes, choices) go into the manifest."""
        self._gather()
        manifest = {**self._progress["request"], **fields}
        manifest["files"] = dict(sorted(self._progress["files"].items()))
        seconds = {"seconds": time.monotonic() - self._start, **(timing or {})}
        write_json(self.path / TIMING, seconds)
        write_json(self.path / MANIFEST, manifest)
        _remove_joined_records(self.path)
        (self.path / PROGRESS).unlink(missing_ok=True)
        self.finished = True
        return Artefact(self.path, _read_json(self.path / MANIFEST))

    def _gather(self) -> None:
        """Takes over what the processes that joined have recorded."""
        for records in sorted(self.path.glob("progress-*.json")):
            found = _read_json(records)
            for part in ("files", "notes"):
                self._progress[part] = {**found[part], **self._progress[part]}

    def _record(self, *names: str) -> None:
        found = {}
        for name in names:
            path = self.path / name
            found[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        with self._recording:
            self._progress["files"] |= found
            self._save_progress()

    def _save_progress(self) -> None:
        write_json(self.path / self._records, self._progress, indent=None)


@contextmanager
def stage(
    path: Path | str,
    kind: str,
    params: Mapping[str, Any],
    inputs: Mapping[str, str],
    *,
    shared: bool = False,
) -> Iterator[StageWriter]:
    """Opens a stage's directory for writing, alone.

    Args:
        path: the directory; made if missing.
        kind: what it will hold, for example ``"datastore"``.
        params: every parameter that shapes the result, as JSON types.
        inputs: name to fingerprint of everything that is read.
        shared: once it is open, others may write along (:func:`joined_stage`).

    Yields:
        A writer. ``writer.finished`` is true when the same request was finished before: read it
        with :meth:`Artefact.open` and do nothing.

    Raises:
        MemdecError: the directory holds something else, or another process writes it.

    A :class:`MemdecError` before anything was finished removes the directory again.
    """
    path = Path(path)
    request = _as_json(
        {"format": FORMAT_VERSION, "kind": kind, "params": dict(params), "inputs": dict(inputs)}
    )
    strangers = sorted(item.name for item in path.iterdir()) if path.is_dir() else []
    known = {MANIFEST, PROGRESS, LOCK, TIMING}
    if strangers and not known & set(strangers):
        raise MemdecError(
            f"{path} is not empty and not a {kind} directory (it holds {strangers[0]}); "
            "choose another directory"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MemdecError(f"cannot make the directory {path}: {error.strerror}") from error
    lock = _open_lock(path)
    if lock is None:
        yield _finished_writer(path, request)
        return
    with lock:
        _lock(lock, fcntl.LOCK_EX, path)
        writer = _open_writer(path, request)
        if shared:
            _lock(lock, fcntl.LOCK_SH, path)
        try:
            yield writer
        except MemdecError:
            _remove_if_nothing_done(path)
            raise


@contextmanager
def joined_stage(path: Path, member: int) -> Iterator[StageWriter]:
    """A further writer of a stage that another process holds open as shared.

    It knows the files and notes that were recorded before it joined. While it lives, nobody else can
    open the stage, also when the process that opened it has died; a finished one it leaves alone.

    Args:
        member: number of this process, at least 1 and its own.
    """
    records = f"progress-{member}.json"
    if (path / MANIFEST).exists():  # nothing is left to write, perhaps nothing can be
        writer = StageWriter(path, {"files": {}, "notes": {}}, records)
        writer.finished = True
        yield writer
        return
    with open(path / LOCK, "a") as lock:
        _lock(lock, fcntl.LOCK_SH, path)
        yield StageWriter(path, _read_json(path / PROGRESS), records)


def _open_lock(path: Path) -> IO[str] | None:
    """None where a finished artefact can only be read: nobody writes it, so none is needed."""
    try:
        return open(path / LOCK, "w")
    except OSError as error:
        if (path / MANIFEST).exists():
            return None
        raise MemdecError(f"cannot write in {path}: {error.strerror}") from error


def _lock(file: IO[str], kind: int, path: Path) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError:
        raise MemdecError(f"another process is writing {path}; wait for it to end") from None


def _remove_joined_records(path: Path) -> None:
    for records in path.glob("progress-*.json*"):  # with what a kill left half-written
        records.unlink()


def _remove_if_nothing_done(path: Path) -> None:
    """A stage that refuses its input leaves no directory behind, unless something was finished."""
    if {item.name for item in path.iterdir()} <= {PROGRESS, LOCK}:
        (path / PROGRESS).unlink(missing_ok=True)
        (path / LOCK).unlink()
        with suppress(OSError):  # a link or a mount point stays
            path.rmdir()


def _open_writer(path: Path, request: dict[str, Any]) -> StageWriter:
    if (path / MANIFEST).exists():
        writer = _finished_writer(path, request)
        _remove_joined_records(path)  # left by a run killed right after its manifest
        (path / PROGRESS).unlink(missing_ok=True)
        return writer
    if (path / PROGRESS).exists():
        progress = _read_json(path / PROGRESS)
        found = _field(path / PROGRESS, progress, dict, "request")
        _refuse_other_request(path / PROGRESS, found, request)
        writer = StageWriter(path, progress)
        writer._gather()
        for name, record in progress["files"].items():
            _check_size(path, name, record["bytes"])
        writer._save_progress()
        _remove_joined_records(path)
        return writer
    writer = StageWriter(path, {"request": request, "files": {}, "notes": {}})
    writer._save_progress()
    return writer


def _finished_writer(path: Path, request: dict[str, Any]) -> StageWriter:
    manifest = _read_json(path / MANIFEST)
    _refuse_other_request(path / MANIFEST, manifest, request)
    Artefact.open(path, request["kind"])
    writer = StageWriter(path, {"request": request, "files": manifest["files"], "notes": {}})
    writer.finished = True
    return writer


def _refuse_other_request(file: Path, found: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    path = file.parent
    for part in ("format", "kind"):
        if found.get(part) != request[part]:
            raise MemdecError(
                f"{path} was made with {part} {found.get(part)}, this run has {request[part]}; "
                "choose another directory"
            )
    for part, what in (("inputs", "input"), ("params", "option")):
        old, new = _field(file, found, dict, part, default={}), request[part]
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                before, now = _short(old.get(key)), _short(new.get(key))
                raise MemdecError(
                    f"{path} was made with {what} {key} = {before}, this run has {now}; "
                    "choose another directory, or remove this one"
                )


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form, as 64 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def _check_size(path: Path, name: str, expected: int) -> None:
    file = path / name
    found = file.stat().st_size if file.is_file() else None
    if found != expected:
        state = "is missing" if found is None else f"has {found} bytes"
        raise MemdecError(
            f"{file} {state}, its record says {expected}; remove {path} and run the stage again"
        )


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _field(path: Path, found: Any, expected: type[T], *names: str, default: T | None = None) -> T:
    """The value under `names` in what `path` holds, checked as :meth:`Artefact.field` says."""
    *outer, last = names
    for depth, name in enumerate(outer, 1):
        found = convert(f"{path}: {'.'.join(outer[:depth])}", found[name], dict)
    if default is not None and last not in found:
        return default
    value: T = convert(f"{path}: {'.'.join(names)}", found[last], expected)
    return value


class _Record(dict[str, Any]):
    """A JSON object of a file; what it lacks is said with the file's name."""

    def __init__(self, path: Path, pairs: Iterable[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise MemdecError(f"{self._path} has no {key!r}: it is not as memdec wrote it")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(), object_pairs_hook=partial(_Record, path))
    except (OSError, ValueError) as error:
        raise MemdecError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise MemdecError(f"{path} holds no JSON object: it is not as memdec wrote it")
    return found


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with clear_disk_errors(path):
        try:
            with open(temporary, "w") as file:
                file.write(json.dumps(value, indent=indent, sort_keys=True) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def sync_files(directory: Path) -> None:
    """Returns when the files lie on the disk: a name given afterwards is none of an empty file.

    So it is after a power loss too.
    """
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


@contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
    """Turns the error of a full disk, which libraries word in their own ways, into one clear line."""
    try:
        yield
    except Exception as error:
        if _is_full_disk(error, path):
            raise MemdecError(
                f"the disk is full: {path} could not be written; finished files are kept, "
                "free some space and run the same command again"
            ) from error
        raise


def _is_full_disk(error: Exception, path: Path) -> bool:
    if isinstance(error, OSError):
        short = error.errno is None and "requested and" in str(error)  # NumPy's, without a reason
        return short or error.errno in (errno.ENOSPC, errno.EDQUOT)
    if "inline_container" in str(error):  # torch.save does not say why it could not write
        return shutil.disk_usage(path.parent).free < 1 << 20
    return "No space left on device" in str(error)  # safetensors
