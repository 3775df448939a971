"""Targets that the Memory Decoder authors' code wrote, in the schema of its saveKNNMulti.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_sources import BLOCK, VOCAB, dense, make

from memdec.data.audit import AuditConfig, audit
from memdec.errors import MemdecError

pa = pytest.importorskip("pyarrow")

SCHEMA = pa.schema(
    [
        pa.field("id_cnt", pa.int32()),
        pa.field("token_id", pa.list_(pa.int32())),
        pa.field("prob", pa.list_(pa.float16())),
        pa.field("label", pa.int32()),
    ]
)
Rows = dict[str, list[Any]]


def official_rows(probs: torch.Tensor, labels: list[int]) -> Rows:
    """A row's entries above 0 by falling probability, in float16, as that code makes them."""
    rows: Rows = {name: [] for name in SCHEMA.names}
    for row, label in zip(probs, labels, strict=True):
        ids = row.nonzero()[:, 0]
        ids = ids[row[ids].argsort(descending=True)]
        rows["id_cnt"].append(len(ids))
        rows["token_id"].append(ids.tolist())
        rows["prob"].append(row[ids].half().numpy())
        rows["label"].append(label)
    return rows


def write_stream(path: Path, rows: Rows, schema: Any = SCHEMA, batch: int = 150) -> Path:
    """Batch by batch, the last one short."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for start in range(0, len(rows["id_cnt"]), batch):
            arrays = [
                pa.array(rows[field.name][start : start + batch], field.type) for field in schema
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return path


@pytest.fixture(scope="module")
def probs(corpus) -> torch.Tensor:
    """Distributions of 1 to 40 entries, some of them nothing in float16."""
    generator = torch.Generator().manual_seed(0)
    positions = corpus.split("train").positions
    scores = torch.randn(positions, VOCAB, generator=generator).double() * 4
    widths = torch.randint(1, 41, (positions, 1), generator=generator)
    ranks = scores.argsort(descending=True).argsort()
    return scores.masked_fill(ranks >= widths, -torch.inf).softmax(1)


@pytest.fixture
def rows(corpus, probs) -> Rows:
    stream = corpus.split("train")
    return official_rows(probs, stream.read(1, len(stream)).tolist())


def test_rows_are_the_distributions(tiny, rows, probs, tmp_path):
    path = write_stream(tmp_path / "knn_gpt2_train_1600.arrow", rows)
    store = make(tmp_path / "out", tiny, source="file", file=path, block_size=BLOCK)
    assert (store.block_size, store.source) == (BLOCK, "file")
    found = store.gather(np.arange(len(store))).targets
    assert (found.probs > 0).all()
    sums = dense(store).sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-6)
    torch.testing.assert_close(dense(store), probs, rtol=1e-3, atol=1e-7)
    options = {"tokens": tiny / "tokens", "rows": 200, "device": "cpu"}
    assert audit(AuditConfig(targets=tmp_path / "out", **options)) == 0


def test_a_saved_data_set_is_read_in_its_order(tiny, rows, tmp_path):
    """As save_to_disk writes it: several streams, and a state that names them."""
    saved = tmp_path / "saved"
    saved.mkdir()
    names = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    for name, part in zip(names, (slice(0, 321), slice(321, None)), strict=True):
        write_stream(saved / name, {key: values[part] for key, values in rows.items()})
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (saved / "state.json").write_text(json.dumps(state))
    one = write_stream(tmp_path / "one.arrow", rows)
    stores = [
        make(tmp_path / name, tiny, source="file", file=file, block_size=BLOCK)
        for name, file in (("first", saved), ("second", one))
    ]
    assert torch.equal(dense(stores[0]), dense(stores[1]))
    (saved / "state.json").unlink()
    with pytest.raises(MemdecError, match="saved is not a directory that datasets saved"):
        make(tmp_path / "out", tiny, source="file", file=saved)


def test_a_file_that_changed_is_not_the_same_request(tiny, rows, tmp_path):
    path = write_stream(tmp_path / "knn.arrow", rows)
    make(tmp_path / "out", tiny, source="file", file=path)
    write_stream(path, rows, batch=100)
    with pytest.raises(MemdecError, match="was made with input file = "):
        make(tmp_path / "out", tiny, source="file", file=path)


def drop_first(rows: Rows) -> None:
    """Rows of text that was joined without the separator that leads it."""
    for values in rows.values():
        del values[0]


def drop_last(rows: Rows) -> None:
    """Rows of text whose last, short block was left out."""
    for values in rows.values():
        del values[-1]


def swap(rows: Rows) -> None:
    """Rows that processes gathered in another order."""
    label = rows["label"]
    first = next(i for i in range(40, len(label)) if label[i] != label[i + 1])
    for values in rows.values():
        values[first], values[first + 1] = values[first + 1], values[first]


def other_count(rows: Rows) -> None:
    rows["id_cnt"][9] += 1


def cut_tokens(rows: Rows) -> None:
    rows["token_id"][9] = rows["token_id"][9][:-1]


def no_sum(rows: Rows) -> None:
    rows["prob"][30] = rows["prob"][30] / 2


def no_number(rows: Rows) -> None:
    rows["prob"][30] = rows["prob"][30] * np.float16("nan")


def no_token(rows: Rows) -> None:
    rows["token_id"][30][0] = VOCAB


def no_int32(rows: Rows) -> None:
    """The token itself, if 32 bits were all that is looked at."""
    rows["token_id"][30][0] += 2**32


def twice(rows: Rows) -> None:
    number = next(i for i, ids in enumerate(rows["token_id"]) if len(ids) > 1)
    rows["token_id"][number][1] = rows["token_id"][number][0]


def missing(rows: Rows) -> None:
    rows["prob"][30] = None


def missing_inside(rows: Rows) -> None:
    rows["token_id"][30] = [None, *rows["token_id"][30][1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_first, r"expected (\d+) rows, one for each .*, got \d+; the labels of the first \d "),
        (drop_last, r"expected \d+ rows, .*, got (\d+); the labels of the first \1 agree"),
        (swap, r"2 labels are not the train tokens; at position \d+ expected \d+, got \d+"),
        (other_count, r"row 9 must have as many .* token_id \d+, prob \d+, id_cnt \d+"),
        (cut_tokens, "row 9 must have as many tokens and probabilities as id_cnt says"),
        (no_sum, r"must sum to 1 or be empty, row 30 sums to 0\.5"),
        (no_number, "row 30 sums to nan"),
        (no_token, "token ids must be from 0 to 319, got 320"),
        (twice, "token_ids must be distinct within a row"),
        (no_int32, r"token ids must be from 0 to 319, got 4294967\d\d\d"),
        (missing, "prob must be lists of floats, got missing values"),
        (missing_inside, r"rows \d+ to \d+: an entry is missing"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tiny, rows, tmp_path, change, message):
    change(rows)
    place = SCHEMA.get_field_index("token_id")
    wide = SCHEMA.set(place, pa.field("token_id", pa.list_(pa.int64())))
    path = write_stream(tmp_path / "knn.arrow", rows, wide if change is no_int32 else SCHEMA)
    with pytest.raises(MemdecError, match=message):
        make(tmp_path / "out", tiny, source="file", file=path)


@pytest.mark.parametrize(
    ("field", "kind", "message"),
    [
        ("label", None, "label must be integers, got no such column"),
        ("id_cnt", pa.float32(), "id_cnt must be integers, got float"),
        ("prob", pa.list_(pa.int32()), r"prob must be lists of floats, got list<.*int32>"),
        ("token_id", pa.string(), "token_id must be lists of integers, got string"),
    ],
)
def test_other_columns_are_refused(tiny, tmp_path, field, kind, message):
    place = SCHEMA.get_field_index(field)
    schema = SCHEMA.set(place, pa.field(field, kind)) if kind else SCHEMA.remove(place)
    rows: Rows = {"id_cnt": [1.0], "token_id": [[1]], "prob": [[np.float16(1)]], "label": [1]}
    if kind == pa.string():
        rows["token_id"] = ["1"]
    if kind == pa.list_(pa.int32()):
        rows["prob"] = [[1]]
    path = write_stream(tmp_path / "knn.arrow", rows, schema)
    with pytest.raises(MemdecError, match=message):
        make(tmp_path / "out", tiny, source="file", file=path)


def test_a_data_set_that_does_not_fit_together_is_refused(tiny, rows, tmp_path):
    place = SCHEMA.get_field_index("token_id")
    wide = SCHEMA.set(place, pa.field("token_id", pa.large_list(pa.int32())))
    write_stream(tmp_path / "one.arrow", rows)
    write_stream(tmp_path / "two.arrow", rows, wide)
    write_stream(tmp_path / "twice.arrow", rows, SCHEMA.append(SCHEMA.field("label")))
    cases = {
        "must have columns of the same types": ["one.arrow", "two.arrow"],
        "label must be integers, got 2 such columns": ["twice.arrow"],
        "is not a directory that datasets saved .*: it names no file": [],
    }
    for message, names in cases.items():
        state = {"_data_files": [{"filename": name} for name in names]}
        (tmp_path / "state.json").write_text(json.dumps(state))
        with pytest.raises(MemdecError, match=message):
            make(tmp_path / "out", tiny, source="file", file=tmp_path)


def test_offsets_of_a_damaged_file_are_not_followed(tiny, rows, tmp_path):
    path = write_stream(tmp_path / "knn.arrow", rows, batch=10**6)
    lengths = [len(ids) for ids in rows["token_id"]]
    ends = np.cumsum([0, *lengths], dtype=np.int32)
    content = bytearray(path.read_bytes())
    place = content.index(ends.tobytes())
    content[place + 400 : place + 404] = np.int32(2**30).tobytes()
    path.write_bytes(content)
    with pytest.raises(MemdecError, match=r"rows 0 to \d+: .* offset"):
        make(tmp_path / "out", tiny, source="file", file=path)


def test_what_is_no_stream_is_refused(tiny, tmp_path):
    (tmp_path / "text.arrow").write_text("not a stream")
    with pytest.raises(MemdecError, match=r"text\.arrow cannot be read as an Arrow stream"):
        make(tmp_path / "out", tiny, source="file", file=tmp_path / "text.arrow")
    with pytest.raises(MemdecError, match=r"none\.arrow cannot be read: No such file"):
        make(tmp_path / "out", tiny, source="file", file=tmp_path / "none.arrow")


def test_without_pyarrow_it_is_said_what_is_missing(tiny, rows, tmp_path, monkeypatch):
    path = write_stream(tmp_path / "knn.arrow", rows)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MemdecError, match=r"needs the package pyarrow: pip install pyarrow"):
        make(tmp_path / "out", tiny, source="file", file=path)
