"""Blocks of the train stream as batches, with what their targets are made of."""

from __future__ import annotations

import numpy as np
import torch

from memdec.data.corpus import TokenStream
from memdec.training.batch_targets import BatchTargets

IGNORE_INDEX = -100
MODEL_INPUTS = ("input_ids", "position_ids")  # what of a batch a model is fed


class BlockCollator:
    """Block numbers in, one batch out.

    ``input_ids`` and ``labels`` are int64 [batch, length], and so are the ``position_ids`` of isolated
    documents; a short last block is padded at its end with ignored labels, which no earlier position
    sees. The number after the last block's stands for an empty block. `targets` has a row for every
    label, empty where it is ignored.
    """

    def __init__(self, stream: TokenStream, block_size: int, targets: BatchTargets) -> None:
        self.stream = stream
        self.block_size = block_size
        self.targets = targets

    def __call__(self, numbers: list[int]) -> dict[str, torch.Tensor]:
        blocks = [self._block(number) for number in numbers]
        length = max(1, *(len(inputs) for inputs, _ in blocks))
        input_ids = np.zeros((len(blocks), length), np.int64)
        labels = np.full((len(blocks), length), IGNORE_INDEX, np.int64)
        positions = np.full((len(blocks), length), -1, np.int64)
        isolated = self.stream.isolate_documents
        position_ids = np.tile(np.arange(length), (len(blocks), 1)) if isolated else None
        for row, (number, (inputs, expected)) in enumerate(zip(numbers, blocks, strict=True)):
            start = number * self.block_size
            input_ids[row, : len(inputs)] = inputs
            labels[row, : len(inputs)] = expected
            stop = start + len(inputs)
            positions[row, : len(inputs)] = np.arange(start, stop)
            if position_ids is not None:
                position_ids[row, : len(inputs)] = self.stream.position_ids(start, stop)
        batch = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
        if position_ids is not None:
            batch["position_ids"] = torch.from_numpy(position_ids)
        return batch | self.targets.read(positions.ravel(), labels.ravel())

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if number == self.stream.blocks(self.block_size):
            return np.empty(0, np.int32), np.empty(0, np.int32)
        return self.stream.block(number, self.block_size)
