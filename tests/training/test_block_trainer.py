"""A step is the same however its blocks are spread, and takes no logits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sharded_gradients
import step_equality
import torch
from safetensors.torch import load_file

from memdec.training import block_trainer
from memdec.training.block_trainer import BlockOrder, plain_output_layer

Weights = dict[str, torch.Tensor]


def trained(work: Path, batch: int, accumulation: int, **options: object) -> Weights:
    trainer = step_equality.make_trainer(work, batch, accumulation, **options)
    trainer.train()
    return {name: weight.detach() for name, weight in trainer.model.named_parameters()}


@pytest.fixture(scope="module")
def one_batch(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """Six blocks a step, at once."""
    return trained(tmp_path_factory.mktemp("one"), 6, 1)


def assert_same(ours: Weights, wanted: Weights) -> None:
    """To float32 rounding of eight steps; one miscounted token is 300 times as much."""
    for name, weight in wanted.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize(
    ("batch", "accumulation", "taught_by"),
    [(1, 6, "targets"), (2, 3, "neighbours"), (3, 2, "targets")],
)
def test_accumulated_micro_batches_are_one_batch(
    batch: int, accumulation: int, taught_by: str, one_batch: Weights, tmp_path: Path
) -> None:
    assert_same(trained(tmp_path, batch, accumulation, taught_by=taught_by), one_batch)


@pytest.mark.parametrize(
    ("processes", "batch", "accumulation", "taught_by"),
    [(2, 1, 3, "targets"), (3, 2, 1, "neighbours")],
)
def test_processes_with_uneven_shards_are_one_process(
    processes: int,
    batch: int,
    accumulation: int,
    taught_by: str,
    one_batch: Weights,
    tmp_path: Path,
) -> None:
    """19 blocks of two lengths: some process has fewer tokens, in the last step even none."""
    out = tmp_path / "weights.safetensors"
    command = step_equality.__file__, str(out), str(batch), str(accumulation), taught_by, "cpu"
    launch(processes, *command)
    assert_same(load_file(out), one_batch)


def test_a_sharded_model_has_the_same_gradients() -> None:
    launch(2, sharded_gradients.__file__, "cpu")


def launch(processes: int, *command: str) -> None:
    """Runs a script in several processes of this machine."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*run, str(processes), *command], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_training_makes_no_logits(
    one_batch: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gives the weights that the loss of whole logits gives."""
    whole = step_equality.make_trainer(tmp_path, 6, 1)
    whole.output_layer = None
    whole.train()
    assert_same(dict(whole.model.named_parameters()), one_batch)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("took the loss of whole logits")

    monkeypatch.setattr(block_trainer, "sparse_kl_loss", refuse)
    assert_same(trained(tmp_path, 6, 1), one_batch)


def test_a_compiled_model_takes_the_same_steps(
    one_batch: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    assert_same(trained(tmp_path, 6, 1, **options), one_batch)


def test_logits_that_are_changed_after_the_output_layer_are_noticed() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    model = step_equality.tiny_model()
    assert plain_output_layer(model) is model.lm_head
    capped = Gemma2Config(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    assert plain_output_layer(Gemma2ForCausalLM(capped)) is None  # capped at 30 by default


def test_the_order_has_every_block_once_and_fills_the_last_batch() -> None:
    order = BlockOrder(19, 6, seed=3)
    first = list(order)
    assert len(first) == len(order) == 24
    assert sorted(first[:19]) == list(range(19))
    assert first[19:] == [19] * 5
    assert list(BlockOrder(19, 1, seed=3)) == first[:19]
    order.set_epoch(1)
    assert list(order)[:19] != first[:19]
    assert list(BlockOrder(19, 6, seed=4))[:19] != first[:19]
