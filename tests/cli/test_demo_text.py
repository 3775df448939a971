"""What the demo starts from: text of this Python, a tokenizer and a model made of it."""

from __future__ import annotations

import io
import json
import sys

import pytest

from memdec.demo import text
from memdec.demo.model import fresh_base, train_tokenizer
from memdec.errors import MemdecError


@pytest.fixture(scope="module")
def documents() -> dict[str, str]:
    return text.docstrings()


def test_docstrings_are_those_of_the_library(documents):
    import json.encoder
    import textwrap

    assert len(documents) > 200
    assert list(documents) == sorted(documents)
    assert textwrap.dedent.__doc__.split("\n")[0] in documents["textwrap.py"]
    assert json.encoder.JSONEncoder.__doc__.strip()[:60] in documents["json/encoder.py"]


def test_tests_and_installed_packages_are_left_out(documents):
    assert not [name for name in documents if "/test/" in f"/{name}" or "-packages/" in name]


def test_topics_are_sorted_and_long():
    found = text.topics()
    assert list(found) == sorted(found)
    assert "assert" in found
    assert sum(map(len, found.values())) > 100_000


def test_no_topics_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(MemdecError, match=r"expected the module pydoc_data.topics"):
        text.topics()


def test_lines_hold_every_document():
    file = io.BytesIO()
    given = {"a": "one\ntwo", "b": "drei \u00fc"}
    text.write_lines(given, file)
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    assert {line["name"]: line["text"] for line in lines} == given


def test_the_tokenizer_is_exact_and_repeatable(documents):
    few = list(documents.values())[:60]
    tokenizer = train_tokenizer(few, 512)
    assert len(tokenizer) == 512
    odd = "def f(\u00e9):\n\treturn 1  # \u65e5\u672c \U0001f600"
    assert tokenizer.decode(tokenizer(odd).input_ids) == odd
    again = train_tokenizer(few, 512)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_the_fresh_base_depends_on_the_seed_alone():
    import torch

    tokenizer = train_tokenizer(["some text of few words"], 300)
    sizes = {"layers": 1, "width": 16, "context": 32}
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = fresh_base(tokenizer, **sizes, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    same, other = (fresh_base(tokenizer, **sizes, seed=seed) for seed in (3, 4))
    assert all(
        torch.equal(left, right)
        for left, right in zip(first.parameters(), same.parameters(), strict=True)
    )
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
