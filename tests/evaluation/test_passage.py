from __future__ import annotations

import numpy as np
import pytest

from memdec.demo.model import train_tokenizer
from memdec.evaluation.passage import make_passage, pieces


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["plain words"], 300)


def test_a_character_cut_into_tokens_comes_with_the_last_of_them(tokenizer):
    text = "a \u201cb\u201d \U0001f600"
    tokens = tokenizer(text).input_ids
    found = pieces(tokenizer, tokens)
    assert len(found) == len(tokens) > len(text)
    assert "".join(found) == text
    assert {"\u201c", "\u201d", "\U0001f600"} <= set(found)


@pytest.mark.parametrize("shift", range(4))
def test_nothing_is_lost_in_a_long_text(tokenizer, shift):
    text = "x" * shift + "plain \U0001f600\u201d words " * 40  # cut wherever a group may end
    tokens = tokenizer(text).input_ids
    found = pieces(tokenizer, tokens)
    assert len(found) == len(tokens) > 4 * 64
    assert "".join(found) == text


def test_small_probabilities_keep_their_digits():
    scores = np.linspace(-50, -20, 3, dtype=np.float32)
    passage = make_passage(["a", "b", "c"], {"base": scores, "other": scores})
    assert list(passage) == ["tokens", "base"]
    np.testing.assert_allclose(passage["base"], np.exp(scores.astype(np.float64)), rtol=1e-7)
