"""Target rows from a file: the user's own, or those that the Memory Decoder authors' code wrote.

Either has a row for each train position, in order, and the label beside each row, by which rows and
tokens are known to match.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memdec.data.artefact import file_sha256, fingerprint
from memdec.data.corpus import TokenCorpus, TokenStream
from memdec.data.sources import Source
from memdec.errors import MemdecError
from memdec.ops import SparseTargets

_SUM_TOLERANCE = 1e-3
_FILE_DTYPES = {
    "indptr": torch.int64,
    "token_ids": torch.int32,
    "probs": torch.float32,
    "label": torch.int32,
}
_ARROW_SUFFIX = ".arrow"
_ROWS_A_READ = 1 << 12


def open_file(path: Path, corpus: TokenCorpus) -> Source:
    """The source that reads `path`: an Arrow file or directory, or else safetensors.

    Raises:
        MemdecError: a file that cannot be read or does not fit the corpus.
    """
    if path.is_dir() or path.suffix == _ARROW_SUFFIX:
        return ArrowSource(path, corpus)
    return FileSource(path, corpus)


def content_fingerprint(path: Path) -> str:
    """SHA-256 of the file, or of the names and contents of a directory's Arrow files."""
    try:
        if path.is_dir():
            return fingerprint([[file.name, file_sha256(file)] for file in _arrow_files(path)])
        return file_sha256(path)
    except OSError as error:
        raise MemdecError(f"{path} cannot be read: {error.strerror}") from error


class FileSource:
    """Rows of the user's own, from a safetensors file.

    ``indptr`` int64 [positions + 1], ``token_ids`` int32 and ``probs`` float32 as in
    :class:`memdec.ops.SparseTargets`, a row for each train position, and ``label`` int32
    [positions], the token that follows each.

    Raises:
        MemdecError: no such file, an array that is missing, of another dtype or length, a label
            that is not the corpus's.
    """

    def __init__(self, path: Path, corpus: TokenCorpus) -> None:
        self._path = path
        self._vocab_size = corpus.vocab_size
        arrays = _read_arrays(path)
        stream = corpus.split("train")
        lengths = {"indptr": stream.positions + 1, "label": stream.positions}
        for name, expected in lengths.items():
            if arrays[name].shape != (expected,):
                raise MemdecError(
                    f"{path}: {name} must have shape [{expected}], the train split's, "
                    f"got {list(arrays[name].shape)}"
                )
        _check_labels(path, arrays["label"].numpy(), stream)
        self._targets = SparseTargets(arrays["indptr"], arrays["token_ids"], arrays["probs"])

    def rows(self, start: int, stop: int) -> Iterator[SparseTargets]:
        rows = self._targets[start:stop]
        try:
            rows = rows.compact().validate(self._vocab_size)
        except (ValueError, RuntimeError) as error:
            raise MemdecError(f"{self._path}: rows {start} to {stop}: {error}") from error
        _row_sums(self._path, rows, start)
        yield rows


class ArrowSource:
    """Rows that the Memory Decoder authors' code wrote (its ``knn_utils/saveKNNMulti.py``).

    An Arrow IPC stream, memory-mapped, or a directory of them that `datasets` saved. Columns:
    ``token_id`` list of int32 and ``prob`` list of float16, the distribution's entries above 0;
    ``id_cnt`` int32, their number; ``label`` int32. Rounding to float16 is made up for: a row is
    divided by its sum, as that code's trainer does, and entries that became 0 are dropped.

    That code writes a row for every token that has a label and a predecessor in its window, in
    order. These are the train positions where its windows are ``stream[b * B : (b + 1) * B + 1]`` of
    the train split, for blocks of B; text that it tokenised and joined itself has no separators and
    other rows.

    Raises:
        MemdecError: pyarrow is missing, no such stream, other columns, another number of rows than
            train positions, a label that is not the corpus's.
    """

    def __init__(self, path: Path, corpus: TokenCorpus) -> None:
        self._path = path
        self._vocab_size = corpus.vocab_size
        self._table = _read_table(path)
        labels = self._table.column("label").to_numpy()
        stream = corpus.split("train")
        if len(labels) != stream.positions:
            both = min(len(labels), stream.positions)
            differing = np.flatnonzero(labels[:both] != stream.read(1, both + 1))
            same = int(differing[0]) if len(differing) else both
            raise MemdecError(
                f"{path}: expected {stream.positions} rows, one for each position of the train "
                f"split, got {len(labels)}; the labels of the first {same} agree"
            )
        _check_labels(path, labels, stream)

    def rows(self, start: int, stop: int) -> Iterator[SparseTargets]:
        for first in range(start, stop, _ROWS_A_READ):
            yield self._rows(first, min(first + _ROWS_A_READ, stop))

    def _rows(self, start: int, stop: int) -> SparseTargets:
        part = self._table.slice(start, stop - start)
        self._check_batches(part, start, stop)
        lists = {name: part.column(name).combine_chunks() for name in ("token_id", "prob")}
        lengths = {name: lists[name].value_lengths().to_numpy(False) for name in lists}
        lengths["id_cnt"] = part.column("id_cnt").to_numpy()
        wrong = (lengths["token_id"] != lengths["id_cnt"]) | (lengths["prob"] != lengths["id_cnt"])
        if wrong.any():
            first = int(wrong.argmax())
            found = ", ".join(f"{name} {lengths[name][first]}" for name in lengths)
            raise MemdecError(
                f"{self._path}: row {start + first} must have as many tokens and probabilities as "
                f"id_cnt says, got {found}"
            )
        entries = [lists[name].flatten() for name in ("token_id", "prob")]
        if any(column.null_count for column in entries):
            raise MemdecError(f"{self._path}: rows {start} to {stop}: an entry is missing")
        ids, probs = (column.to_numpy(False) for column in entries)
        kept = probs != 0
        strange = ids[kept & ((ids < 0) | (ids >= self._vocab_size))]
        if len(strange):  # before they are narrowed to what they are not
            raise MemdecError(
                f"{self._path}: rows {start} to {stop}: token ids must be from 0 to "
                f"{self._vocab_size - 1}, got {strange[0]}"
            )
        ends = np.cumsum([0, *kept])[np.cumsum([0, *lengths["id_cnt"]])]
        rows = SparseTargets(
            torch.from_numpy(ends),
            torch.from_numpy(ids[kept].astype(np.int32)),
            torch.from_numpy(probs[kept].astype(np.float32)),
        )
        sums = _row_sums(self._path, rows, start)
        scaled = rows.probs / torch.repeat_interleave(sums, rows.indptr.diff())
        rows = SparseTargets(rows.indptr, rows.token_ids, scaled.float())
        try:
            return rows.validate(self._vocab_size)
        except ValueError as error:
            raise MemdecError(f"{self._path}: rows {start} to {stop}: {error}") from error

    def _check_batches(self, part: Any, start: int, stop: int) -> None:
        """Offsets that a damaged file has would be followed to anywhere in memory."""
        from pyarrow import ArrowInvalid

        try:
            part.validate(full=True)
        except ArrowInvalid as error:
            raise MemdecError(f"{self._path}: rows {start} to {stop}: {error}") from error


def _check_labels(path: Path, labels: np.ndarray, stream: TokenStream) -> None:
    expected = stream.read(1, len(stream))
    wrong = np.flatnonzero(labels != expected)
    if len(wrong):
        first = int(wrong[0])
        raise MemdecError(
            f"{path}: {len(wrong)} labels are not the train tokens; at position {first} "
            f"expected {expected[first]}, got {labels[first]}"
        )


def _row_sums(path: Path, rows: SparseTargets, start: int) -> torch.Tensor:
    """The sum of each row, float64, checked to be 1 where there are entries."""
    lengths = rows.indptr.diff()
    owner = torch.repeat_interleave(torch.arange(len(rows)), lengths)
    sums = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, owner, rows.probs.double())
    right = ((sums - 1).abs() <= _SUM_TOLERANCE) | (lengths == 0)
    wrong = torch.nonzero(~right)  # also where a sum is NaN
    if len(wrong):
        first = int(wrong[0])
        raise MemdecError(
            f"{path}: a row must sum to 1 or be empty, row {start + first} sums to "
            f"{sums[first]:.4f}"
        )
    return sums


def _read_arrays(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of a user's file, memory-mapped, names and dtypes checked."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise MemdecError(f"{path} cannot be read as safetensors: {error}") from error
    for name, dtype in _FILE_DTYPES.items():
        found = arrays[name].dtype if name in arrays else "no such array"
        if found != dtype:
            raise MemdecError(f"{path}: {name} must be {dtype}, got {found}")
    return arrays


def _read_table(path: Path) -> Any:
    """A pyarrow.Table of the streams at `path`, memory-mapped, names and types checked."""
    try:
        import pyarrow as arrow
    except ImportError:
        raise MemdecError(
            f"reading {path} needs the package pyarrow: pip install pyarrow"
        ) from None
    parts = []
    for file in _arrow_files(path):
        try:
            parts.append(arrow.ipc.open_stream(arrow.memory_map(str(file))).read_all())
        except (OSError, arrow.ArrowException) as error:
            raise MemdecError(f"{file} cannot be read as an Arrow stream: {error}") from error
    kinds = arrow.types
    columns = {
        "id_cnt": (False, kinds.is_integer, "integers"),
        "token_id": (True, kinds.is_integer, "lists of integers"),
        "prob": (True, kinds.is_floating, "lists of floats"),
        "label": (False, kinds.is_integer, "integers"),
    }
    for part in parts:
        for name, (listed, is_kind, expected) in columns.items():
            count = part.column_names.count(name)
            if count != 1:
                found = f"{count} such columns" if count else "no such column"
                raise MemdecError(f"{path}: {name} must be {expected}, got {found}")
            found = part.schema.field(name).type
            is_list = kinds.is_list(found) or kinds.is_large_list(found)
            if is_list != listed or not is_kind(found.value_type if is_list else found):
                raise MemdecError(f"{path}: {name} must be {expected}, got {found}")
            if part.column(name).null_count:
                raise MemdecError(f"{path}: {name} must be {expected}, got missing values")
    try:
        return arrow.concat_tables([part.select(list(columns)) for part in parts])
    except arrow.ArrowInvalid as error:
        raise MemdecError(f"{path}: its files must have columns of the same types") from error


def _arrow_files(path: Path) -> list[Path]:
    """The file itself, or those of a directory that `datasets` saved, in its order."""
    if not path.is_dir():
        return [path]
    try:
        state = json.loads((path / "state.json").read_text())
        files = [path / file["filename"] for file in state["_data_files"]]
        if not files:
            raise ValueError("it names no file")
        return files
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MemdecError(
            f"{path} is not a directory that datasets saved (save_to_disk): {error}"
        ) from error
