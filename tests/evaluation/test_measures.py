from __future__ import annotations

import numpy as np
import pytest

from memdec.data.corpus import TokenStream
from memdec.evaluation.measures import (
    function_words,
    label_counts,
    mean_change,
    median_gain,
    rarest_decile,
)


class Pieces:
    """A tokenizer of whole words."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.pieces[token] for token in ids]


def train(*shards: list[int]) -> TokenStream:
    return TokenStream(tuple(np.array(shard, np.int32) for shard in shards), np.array([1]))


def test_counts_are_of_every_shard() -> None:
    found = label_counts(train([1, 1, 2], [2, 1]), np.array([2, 1, 0, 2]), 5)
    assert found.tolist() == [2, 3, 0, 2]


def test_the_rarest_tenth() -> None:
    labels = np.array([0] * 17 + [1, 2, 2])
    rarest = rarest_decile(train([0, 0, 0, 2, 2]), labels, 3)
    assert np.flatnonzero(rarest).tolist() == [17, 18]  # of the equally rare the first
    assert rarest_decile(train([0]), np.array([0, 0]), 1).sum() == 1  # never none


@pytest.mark.parametrize("space", ["\u0120", "\u2581"])  # byte-level BPE, SentencePiece
def test_function_words_begin_a_word(space: str) -> None:
    tokenizer = Pieces(f"{space}The", "the", f"{space}fish", f"{space}of", space, f"{space}often")
    found = function_words(tokenizer, np.array([0, 1, 2, 3, 4, 5, 3]))
    assert found.tolist() == [True, False, False, True, False, False, True]


def test_gain_and_change() -> None:
    base, other = np.log([0.1, 0.2, 0.5, 0.4]), np.log([0.2, 0.1, 0.5, 0.1])
    where = np.array([True, True, True, False])
    assert median_gain(base, other, where) == pytest.approx(1.0)
    assert mean_change(base, other, where) == pytest.approx(2 / 3 * np.log(2))
    assert mean_change(base, other, np.zeros(4, bool)) is None
