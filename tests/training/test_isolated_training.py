"""A step on documents that share blocks, isolated, is a step on the documents one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import step_equality
import torch
from safetensors.torch import load_file
from step_equality import BLOCK, VOCAB, Blocks, rows, tiny_model
from test_block_trainer import assert_same, launch, trained
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from memdec.ops import SparseTargets
from memdec.training.batches import IGNORE_INDEX, BlockCollator
from memdec.training.trainer import compile_blocks

ALPHA = 0.4
NUMBERS = [0, 1, 2, 4]  # the first is short


def model_of(architecture: str) -> PreTrainedModel:
    if architecture == "llama":
        return tiny_model(initializer_range=0.3)
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}
    drop = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": BLOCK}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **shape, **ends, **drop))


def one_by_one(model: PreTrainedModel) -> torch.Tensor:
    """The loss of each document in a forward pass of its own, by PyTorch's own functions."""
    total, counted = torch.zeros(()), 0
    for number in NUMBERS:
        inputs, labels = Blocks().block(number, BLOCK)
        positions = torch.arange(number * BLOCK, number * BLOCK + len(inputs))
        found = rows().read(positions.numpy(), labels.astype("int64"))
        targets = SparseTargets(
            found["target_indptr"], found["target_ids"], found["target_probs"]
        ).to_dense(VOCAB)
        length = 3 + number % 5  # as Blocks.position_ids has it
        for start in range(0, len(inputs), length):
            part = slice(start, start + length)
            tokens = torch.from_numpy(inputs[part]).long()
            scores = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
            kl = torch.nn.functional.kl_div(scores, targets[part], reduction="sum")
            wanted = torch.from_numpy(labels[part]).long()
            ce = torch.nn.functional.nll_loss(scores, wanted, reduction="sum")
            total, counted = total + ALPHA * kl + (1 - ALPHA) * ce, counted + len(tokens)
    return total / counted


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize(
    "how",
    [
        "plain",
        "from logits",
        "gradient checkpointing",
        pytest.param("compiled blocks", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_loss_is_that_of_documents_one_by_one(
    architecture: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_equality, "tiny_model", lambda: model_of(architecture))
    trainer = step_equality.make_trainer(tmp_path, len(NUMBERS), 1, isolated=True)
    trainer.alpha = ALPHA
    wanted_of = model_of(architecture)
    expected = one_by_one(wanted_of)
    if how == "from logits":
        trainer.output_layer = None
    if how == "gradient checkpointing":
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    if how == "compiled blocks":
        torch.compiler.reset()
        compile_blocks(trainer.model)
    batch = trainer.data_collator(NUMBERS)
    counted = batch["labels"].ne(IGNORE_INDEX).sum()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=counted)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    ours, wanted = gradients(trainer.model, loss), gradients(wanted_of, expected)
    for name, gradient in wanted.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)
    packed = BlockCollator(Blocks(), BLOCK, trainer.targets)(NUMBERS)
    together = trainer.compute_loss(trainer.model, packed, num_items_in_batch=counted)
    assert abs(together - expected) > 0.01


@pytest.fixture(scope="module")
def one_batch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return trained(tmp_path_factory.mktemp("one"), 6, 1, isolated=True)


def test_accumulated_micro_batches_are_one_batch(one_batch, tmp_path: Path) -> None:
    assert_same(trained(tmp_path / "parts", 2, 3, isolated=True), one_batch)
    packed = trained(tmp_path / "packed", 6, 1)
    assert any((packed[name] - weight).abs().max() > 1e-4 for name, weight in one_batch.items())


def test_processes_with_uneven_shards_are_one_process(one_batch, tmp_path: Path) -> None:
    out = tmp_path / "weights.safetensors"
    launch(2, step_equality.__file__, str(out), "1", "3", "targets", "cpu", "isolated")
    assert_same(load_file(out), one_batch)


def test_a_compiled_model_takes_the_same_steps(one_batch, tmp_path: Path) -> None:
    torch.compiler.reset()
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    assert_same(trained(tmp_path, 6, 1, isolated=True, **options), one_batch)
