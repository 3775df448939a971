"""Training on two GPUs: DDP and FSDP2 through NCCL, and through accelerate's launcher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_gradients
import step_equality
import torch
from safetensors.torch import load_file
from test_block_trainer import launch
from test_distill import without_dropout

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def test_two_gpus_with_uneven_shards_are_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    launch(1, step_equality.__file__, str(one), "6", "1", "neighbours", "cuda")
    launch(2, step_equality.__file__, str(two), "1", "3", "neighbours", "cuda")
    wanted = load_file(one)
    for name, weight in load_file(two).items():
        if name != "loss_sums":  # each process has its own
            torch.testing.assert_close(weight, wanted[name], rtol=1e-4, atol=1e-6)


def test_a_sharded_model_has_the_same_gradients() -> None:
    launch(2, sharded_gradients.__file__, "cuda")


SHARDED = [
    "--use_fsdp",
    "--fsdp_version",
    "2",
    "--fsdp_auto_wrap_policy",
    "TRANSFORMER_BASED_WRAP",
    "--fsdp_state_dict_type",
    "FULL_STATE_DICT",
]


@pytest.mark.parametrize("options", [["--multi_gpu"], SHARDED], ids=["ddp", "fsdp2"])
def test_accelerate_launch_trains_the_same_memory(options: list[str], tiny, tmp_path: Path) -> None:
    """As one process with twice the blocks in a forward pass."""
    start = str(without_dropout(tiny.model, tmp_path / "start"))

    options_of_train = {
        **{
            "tokens": tiny.tokens,
            "targets": tiny.targets,
            "base": tiny.model,
            "teacher": tiny.model,
        },
        **{"memory-init": start, "device": "cuda", "dtype": "float32", "epochs": 2},
        **{"learning-rate": 1e-2, "gradient-accumulation": 1},
    }

    def curve(name: str, launcher: list[str], batch_blocks: int) -> list[dict[str, float]]:
        command = [sys.executable, "-m", *launcher, "memdec", "train"]
        out = {"batch-blocks": batch_blocks, "out": tmp_path / name}
        for option, value in {**options_of_train, **out}.items():
            command += [f"--{option}", str(value)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((tmp_path / name / "curve.json").read_text())

    launcher = ["accelerate.commands.launch", "--num_processes", "2", *options, "-m"]
    one, two = curve("one", [], 4), curve("two", launcher, 2)
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for ours, wanted in zip(two, one, strict=True):
        assert ours["nll"] == pytest.approx(wanted["nll"], rel=1e-3)
    memory = load_file(tmp_path / "two" / "memory" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in memory.values())
