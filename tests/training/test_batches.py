from __future__ import annotations

import numpy as np
import pytest
import torch

from memdec.data.corpus import TokenCorpus
from memdec.data.targets import TargetStore
from memdec.training.batch_targets import NoTargets, StoredTargets
from memdec.training.batches import IGNORE_INDEX, BlockCollator


@pytest.fixture(scope="module")
def stream(tiny):
    return TokenCorpus.open(tiny.tokens).split("train")


def test_a_batch_holds_the_blocks_and_pads_the_short_last_one(stream, tiny):
    last = stream.blocks(tiny.block_size) - 1
    length = stream.positions - last * tiny.block_size
    assert 0 < length < tiny.block_size
    batch = BlockCollator(stream, tiny.block_size, NoTargets())([last, 1])
    tokens = torch.from_numpy(stream.read(0, len(stream)).astype(np.int64))
    start = last * tiny.block_size
    assert torch.equal(batch["input_ids"][0, :length], tokens[start:-1])
    assert torch.equal(batch["labels"][0, :length], tokens[start + 1 :])
    assert (batch["labels"][0, length:] == IGNORE_INDEX).all()
    assert torch.equal(batch["input_ids"][1], tokens[tiny.block_size : 2 * tiny.block_size])
    assert torch.equal(batch["labels"][1], tokens[tiny.block_size + 1 : 2 * tiny.block_size + 1])


def test_each_label_has_its_own_target_row_and_padding_an_empty_one(stream, tiny):
    store = TargetStore.open(tiny.targets)
    last = stream.blocks(tiny.block_size) - 1
    collate = BlockCollator(stream, tiny.block_size, StoredTargets(store))
    batch = collate([2, last, 0])
    targets = collate.targets.of(batch)
    assert len(targets) == batch["labels"].numel()
    dense = targets.validate(64).to_dense(64).view(3, tiny.block_size, 64)
    for row, number in enumerate([2, last, 0]):
        start = number * tiny.block_size
        positions = np.arange(start, min(start + tiny.block_size, stream.positions))
        expected = store.gather(positions).targets.to_dense(64)
        assert torch.equal(dense[row, : len(positions)], expected)
        assert (dense[row, len(positions) :] == 0).all()
