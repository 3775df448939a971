from __future__ import annotations

import numpy as np
import pytest

from memdec.evaluation.overlap import overlapping_blocks, score_overlapping


@pytest.mark.parametrize("positions", [1, 7, 8, 9, 12, 13, 100])
@pytest.mark.parametrize("stride", [1, 4, 7, 8])
def test_every_position_counts_once_and_has_a_context(positions, stride):
    counted = []
    for start, first, stop in overlapping_blocks(positions, 8, stride):
        assert stop - start <= 8
        assert start == 0 or first - start >= 8 - stride
        counted += range(first, stop)
    assert counted == list(range(positions))


def test_blocks_without_overlap_are_those_of_an_evaluation():
    assert list(overlapping_blocks(20, 8, 8)) == [(0, 0, 8), (8, 8, 16), (16, 16, 20)]


def test_a_block_is_a_stream_of_its_tokens_and_labels():
    tokens = np.arange(14, dtype=np.int32)
    seen = []

    def score(stream, size):
        seen.append(stream.read(0, size + 1).tolist())
        assert stream.positions == size
        return stream.read(1, size + 1)

    np.testing.assert_array_equal(score_overlapping(tokens, 8, 4, score), np.arange(1, 14))
    assert seen == [list(range(9)), list(range(4, 13)), list(range(8, 14))]
