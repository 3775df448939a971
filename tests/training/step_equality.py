"""Trains a tiny model for a few steps and saves its weights: a script for one process or several.

python step_equality.py OUT BATCH ACCUMULATION TAUGHT_BY DEVICE [isolated], on its own or under
torch.distributed.run. A step takes BATCH * ACCUMULATION * processes blocks; the blocks differ in length,
so shards are uneven. TAUGHT_BY is "targets" or "neighbours", the same ones; isolated, documents of some
tokens that share a block do not see each other.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from memdec.data.neighbours import Neighbours
from memdec.data.targets import NeighbourRows, TargetRows
from memdec.processes import join_processes
from memdec.training.batch_targets import BatchTargets, StoredNeighbours, StoredTargets
from memdec.training.batches import BlockCollator
from memdec.training.block_trainer import BlockTrainer

BLOCK, VOCAB, BLOCKS = 16, 61, 19  # 19 blocks: the last step of an epoch is short


@dataclass(frozen=True)
class Blocks:
    """The part of TokenStream that a collator reads; every third block is short."""

    isolate_documents: bool = False
    positions = BLOCKS * BLOCK

    def blocks(self, block_size: int) -> int:
        return BLOCKS

    def block(self, number: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
        length = BLOCK if number % 3 else 5
        tokens = np.random.default_rng(number).integers(0, VOCAB, length + 1, np.int32)
        return tokens[:-1], tokens[1:]

    def position_ids(self, start: int, stop: int) -> np.ndarray:
        return np.arange(stop - start)[None] % (3 + start // BLOCK % 5)


class Store:
    """The part of TargetStore that training reads: a few neighbours of each position."""

    artefact = SimpleNamespace(path="none")

    def gather_neighbours(self, positions: np.ndarray, k: int | None = None) -> NeighbourRows:
        tokens, distances = np.empty((len(positions), 6), np.int32), np.empty((len(positions), 6))
        labels = np.empty(len(positions), np.int64)
        for row, position in enumerate(positions):
            generator = np.random.default_rng(position)
            tokens[row], distances[row] = generator.integers(0, VOCAB, 6), generator.random(6)
            labels[row] = Blocks().block(position // BLOCK, BLOCK)[1][position % BLOCK]
        distances = torch.from_numpy(distances).float().sort().values
        options = {"vocab_size": VOCAB, "dtype": "float16"}
        found = Neighbours.pack(distances, torch.from_numpy(tokens), **options)
        return NeighbourRows(found, torch.from_numpy(positions), torch.from_numpy(labels))

    def gather(self, positions: np.ndarray, *, pin_memory: bool = False) -> TargetRows:
        rows = self.gather_neighbours(positions)
        targets = rows.neighbours.to_targets(1.0).compact()
        return TargetRows(targets, rows.positions, rows.labels)


def rows(taught_by: str = "targets") -> BatchTargets:
    if taught_by == "neighbours":
        return StoredNeighbours(Store(), k=6, temperature=1.0, max_entries=None)
    return StoredTargets(Store())


def tiny_model(**config: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            **config,
        )
    )


def make_trainer(
    work: Path,
    batch: int,
    accumulation: int,
    taught_by: str = "targets",
    device: str = "cpu",
    isolated: bool = False,
    **options: object,
) -> BlockTrainer:
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        learning_rate=1e-2,
        # Its steps do not blow rounding up: Adam divides a gradient near zero by its own size.
        optim="sgd",
        max_grad_norm=1.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        **options,
    )
    collator = BlockCollator(Blocks(isolated), BLOCK, rows(taught_by))
    return BlockTrainer(tiny_model(), arguments, blocks=BLOCKS, collator=collator, alpha=0.4)


def main(
    out: str, batch: str, accumulation: str, taught_by: str, device: str, isolated: str = ""
) -> None:
    join_processes(device)  # and leave them at exit
    with tempfile.TemporaryDirectory() as work:
        trainer = make_trainer(
            Path(work), int(batch), int(accumulation), taught_by, device, bool(isolated)
        )
        trainer.train()
        if trainer.is_world_process_zero():
            model = trainer.accelerator.unwrap_model(trainer.model)
            weights = {name: weight.clone() for name, weight in model.named_parameters()}
            save_file({**weights, "loss_sums": trainer.loss_sums}, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
