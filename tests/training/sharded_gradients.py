"""Gradients of a model that FSDP2 shards over two processes, against those of one: a script.

python -m torch.distributed.run --nproc-per-node 2 sharded_gradients.py DEVICE; an error is a failure.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from step_equality import BLOCK, Blocks, rows, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM

from memdec.training.batches import MODEL_INPUTS, BlockCollator
from memdec.training.block_trainer import loss_for_logits


def backward(model: LlamaForCausalLM, blocks: list[int], scale: float) -> None:
    collator = BlockCollator(Blocks(isolate_documents=True), BLOCK, rows("neighbours"))
    batch = {name: array.to(model.device) for name, array in collator(blocks).items()}
    arguments = {"targets": collator.targets.of(batch), "labels": batch["labels"], "normalizer": 50}
    with loss_for_logits(model.lm_head, arguments):
        fed = {name: batch[name] for name in MODEL_INPUTS}
        parts = model(**fed, use_cache=False).logits
    (scale * parts.loss).backward()


def model_of(tied: bool) -> LlamaForCausalLM:
    model = tiny_model()
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def main(device: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for tied in (True, False):
        whole, sharded = model_of(tied).to(device), model_of(tied).to(device)
        backward(whole, [0, 1, 2, 3], 1.0)
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh)
        if not tied:
            fully_shard(sharded.lm_head, mesh=mesh)
        # Its weights are gone again when the model returns: the loss must be taken within.
        fully_shard(sharded, mesh=mesh, reshard_after_forward=True)
        share = [[0, 1, 2], [3]][dist.get_rank()]
        backward(sharded, share, float(dist.get_world_size()))  # FSDP averages
        wanted = dict(whole.named_parameters())
        for name, weight in sharded.named_parameters():
            gradient = weight.grad.full_tensor()
            torch.testing.assert_close(gradient, wanted[name].grad, rtol=1e-5, atol=1e-7)


if __name__ == "__main__":
    main(*sys.argv[1:])
    dist.destroy_process_group()
    os._exit(0)  # FSDP keeps the group alive, and gloo's threads could abort the interpreter's end
