"""transformers' Trainer for blocks of a token stream and their sparse targets.

Arguments, callbacks, trackers, checkpoints and resuming are Trainer's own. What is added here: the
loss, taken from the hidden states so that no logits exist; its divisor, the counted tokens of the
whole optimizer step over all forward passes and processes; and an order of the blocks that depends
on the seed and the epoch alone. So a step is the same for one process or several, whether its blocks
pass at once or bit by bit.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from memdec.ops import SparseKLOutput, linear_sparse_kl_loss, sparse_kl_loss
from memdec.training.batches import IGNORE_INDEX, MODEL_INPUTS, BlockCollator


class BlockTrainer(Trainer):
    """Trainer whose loss is ``alpha * KL(target || model) + (1 - alpha) * CE`` on unshifted labels.

    Args:
        model: a causal language model. The loss takes its place between the output layer's input and
            its weights; a model that changes the logits after its output layer (a soft cap, a
            scale), or has none that is linear, is trained through its logits instead.
        args: Trainer's.
        blocks: how many blocks an epoch has.
        collator: makes a batch of block numbers, and knows where its targets come from.
        alpha: weight of the KL term.
        arithmetic: a context around each forward pass, for example ``torch.autocast``, where
            ``args`` does not choose it.
        rest: Trainer's other arguments.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        blocks: int,
        collator: BlockCollator,
        alpha: float,
        arithmetic: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        **rest: Any,
    ) -> None:
        super().__init__(
            model, args, data_collator=collator, train_dataset=_BlockNumbers(blocks), **rest
        )
        self.blocks = blocks
        self.targets = collator.targets
        self.alpha = alpha
        self.arithmetic = arithmetic
        # The loss is already divided by the tokens of the whole step.
        self.model_accepts_loss_kwargs = True
        self.output_layer = plain_output_layer(model)
        # Sums of loss, kl and ce of the batches seen here, for whoever reports them.
        self.loss_sums = torch.zeros(3, device=self.args.device)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        """Trainer would draw the order from a random state that the number of processes changes."""
        processes = self.args.world_size
        together = 1 if processes == 1 else processes * self.args.train_batch_size
        return BlockOrder(self.blocks, together, self.args.seed)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The batches of one step and its counted tokens in all processes, without a shift."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        counts = [batch["labels"].ne(IGNORE_INDEX).sum() for batch in batches]
        counted = torch.stack(counts).sum().to(device)
        return batches, self.accelerator.reduce(counted, "sum")

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        arguments: dict[str, Any] = {
            "targets": self.targets.of(inputs),
            "labels": inputs["labels"],
            "alpha": self.alpha,
            "ignore_index": IGNORE_INDEX,
            "normalizer": num_items_in_batch,
        }
        fed = {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
        with self.arithmetic():
            if self.output_layer is None:
                logits = model(**fed, use_cache=False).logits
                parts = sparse_kl_loss(logits, **arguments)
            else:
                with loss_for_logits(self.output_layer, arguments):
                    parts = model(**fed, use_cache=False).logits
        self.loss_sums += torch.stack([parts.loss.detach(), parts.kl, parts.ce])
        # The divisor is that of all processes, over which data-parallel wrappers average gradients.
        return parts.loss * (1 if num_items_in_batch is None else self.accelerator.num_processes)


def plain_output_layer(model: PreTrainedModel) -> torch.nn.Linear | None:
    """The layer whose result is the model's logits as they are; None without such a linear layer."""
    layer = model.get_output_embeddings()
    if type(layer) is not torch.nn.Linear:
        return None
    # In place of its result, values that a cap or a scale would change.
    values = torch.linspace(-50, 50, layer.out_features, device=model.device)
    hook = layer.register_forward_hook(lambda module, inputs, result: values.expand_as(result))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
            logits = model(input_ids=token, use_cache=False).logits
    finally:
        hook.remove()
        model.train(was_training)
    return layer if torch.equal(logits.flatten(), values) else None


@contextlib.contextmanager
def loss_for_logits(layer: torch.nn.Linear, arguments: dict[str, Any]) -> Iterator[None]:
    """Inside, the model's ``logits`` are the `SparseKLOutput` of its hidden states.

    Within the model's own forward pass, where wrappers (DDP, FSDP) have the weights ready and see the
    loss as a result of theirs.
    """

    @torch.compiler.disable  # a compiled model ends at its last layer
    def loss(hidden: torch.Tensor) -> SparseKLOutput:
        return linear_sparse_kl_loss(hidden, layer.weight, bias=layer.bias, **arguments)

    layer.forward = loss  # type: ignore[method-assign]
    try:
        yield
    finally:
        del layer.forward


class BlockOrder(torch.utils.data.Sampler[int]):
    """Every block number once, shuffled, then `blocks`, an empty one, until the last batch is full.

    Args:
        together: blocks that all processes take in one forward pass; the length is a multiple of it.
        seed: with the epoch, all that the order depends on.
    """

    def __init__(self, blocks: int, together: int, seed: int) -> None:
        self.blocks = blocks
        self.together = together
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.blocks // self.together) * self.together

    def __iter__(self) -> Iterator[int]:
        yield from np.random.default_rng([self.seed, self.epoch]).permutation(self.blocks).tolist()
        yield from [self.blocks] * (len(self) - self.blocks)


class _BlockNumbers(torch.utils.data.Dataset[int]):
    """Block i is i: the collator reads it."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, number: int) -> int:
        return number
