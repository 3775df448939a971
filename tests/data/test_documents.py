"""Which documents are read from what, and which are dropped."""

from __future__ import annotations

import json
import sys

import pytest

from memdec.data.documents import collect, read_corpus, read_dataset
from memdec.errors import MemdecError


def read(path, unit="file", field="text"):
    return list(read_corpus(path, unit, field))


def test_a_directory_is_read_in_sorted_order_whatever_the_order_of_writing(tmp_path):
    for name in ("z.txt", "a/b.md", "a.rst", "a/c/d.TEXT", "b.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert read(tmp_path) == ["a/b.md", "a/c/d.TEXT", "a.rst", "b.txt", "z.txt"]


def test_other_names_and_hidden_ones_are_not_read(tmp_path):
    (tmp_path / "kept.txt").write_text("kept")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "notes.txt").write_text("hidden")
    assert read(tmp_path) == ["kept"]


def test_a_link_to_a_directory_is_named_and_not_read(tmp_path, capsys):
    for name in ("corpus/kept.txt", "elsewhere/other.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    corpus = tmp_path / "corpus"
    (corpus / "linked.txt").symlink_to(corpus / "kept.txt")
    (corpus / "linked").symlink_to(tmp_path / "elsewhere")
    (corpus / "loop").symlink_to(corpus)
    assert read(corpus) == ["corpus/kept.txt", "corpus/kept.txt"]
    said = capsys.readouterr().err.splitlines()
    assert sorted(line.partition(" ")[0] for line in said) == [
        str(corpus / "linked"),
        str(corpus / "loop"),
    ]


def test_a_single_file_may_have_any_name(tmp_path):
    (tmp_path / "README").write_text("text")
    assert read(tmp_path / "README") == ["text"]


def test_a_hidden_parent_of_the_corpus_does_not_hide_it(tmp_path):
    directory = tmp_path / ".cache" / "corpus"
    directory.mkdir(parents=True)
    (directory / "a.txt").write_text("text")
    assert read(directory) == ["text"]


def test_lines_and_paragraphs(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\r\n \r\n\r\nthree\n")
    assert read(path) == ["one\ntwo\n \n\nthree\n"]
    assert read(path, "line") == ["one", "two", "three"]
    assert read(path, "paragraph") == ["one\ntwo", "three\n"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone")
    assert read(path) == ["one"]


def test_json_lines_are_documents_whatever_the_unit(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [{"body": "one\n\ntwo"}, {"body": "three", "other": 1}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    for unit in ("file", "line", "paragraph"):
        assert read(path, unit, "body") == ["one\n\ntwo", "three"]


@pytest.mark.parametrize(
    "line",
    [
        '{"other": "x"}',
        '{"text": 3}',
        '["text"]',
        "text",
        '{"text',
        pytest.param("[" * 10**5, id="deep"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(MemdecError, match=r"a\.jsonl, line 2: expected .* text field 'text'"):
        read(path)


def test_half_a_surrogate_pair_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00 is whole"}\n{"text": "half \\ud83d"}')
    with pytest.raises(MemdecError, match=r"a\.jsonl, line 2: its text is not Unicode"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text\0more", r"a\.txt is not text: it holds a NUL byte at 4"),
        ("caf\u00e9".encode("latin-1"), r"a\.txt is not UTF-8 text: bad byte at 3"),
        ("text".encode("utf-16"), r"a\.txt is not text"),
    ],
)
def test_what_is_not_text_is_named(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(MemdecError, match=message):
        read(tmp_path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(MemdecError, match=r"found none at .*nowhere"):
        read(tmp_path / "nowhere")
    (tmp_path / "a.pdf").write_bytes(b"")
    with pytest.raises(MemdecError, match=r"holds no file whose name ends in \.txt"):
        read(tmp_path)


def test_exact_repeats_and_empty_documents_are_dropped_and_counted():
    documents = collect(["one", "two", " \n", "one", "One"], drop_repeated_paragraphs=False)
    assert documents.texts == ["one", "two", "One"]
    assert documents.counts == {
        "documents_read": 5,
        "documents_empty": 1,
        "documents_repeated": 1,
        "paragraphs_repeated": 0,
    }


def test_repeated_paragraphs_are_dropped_on_request():
    texts = ["first\n\nshared  words\n\nlast", "shared\nwords", "shared words\n\nown"]
    assert collect(texts, drop_repeated_paragraphs=False).texts == texts
    documents = collect(texts, drop_repeated_paragraphs=True)
    assert documents.texts == ["first\n\nshared  words\n\nlast", "own"]
    assert documents.counts["paragraphs_repeated"] == 2
    assert documents.counts["documents_empty"] == 1


def test_the_fingerprint_follows_every_document_and_their_order():
    prints = [collect(texts, False).fingerprint for texts in (["a", "b"], ["b", "a"], ["ab"])]
    assert len(set(prints)) == 3
    assert collect(["a", "b"], False).fingerprint == prints[0]


def test_a_saved_data_set_is_read_by_row(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"body": ["one\ntwo", "three"], "number": [1, 2]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    name = str(tmp_path / "saved")
    assert list(read_dataset(name, None, "body")) == ["one\ntwo", "three"]
    with pytest.raises(MemdecError, match=r"no field 'text'; it has \['body', 'number'\]"):
        list(read_dataset(name, None, "text"))
    with pytest.raises(MemdecError, match="has no text in row 0, field 'number': 1"):
        list(read_dataset(name, None, "number"))


def test_a_missing_data_set_and_a_missing_package(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    with pytest.raises(MemdecError, match="could not be loaded"):
        list(read_dataset(str(tmp_path / "nowhere"), None, "text"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MemdecError, match="pip install datasets"):
        list(read_dataset("any", None, "text"))
