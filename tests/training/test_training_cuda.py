from __future__ import annotations

import json

import pytest
import torch

from memdec.training.adapt import AdaptConfig, adapt
from memdec.training.distill import TrainConfig, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_stages_learn_on_the_gpu(dtype, tiny, tmp_path):
    loop = {"learning_rate": 1e-2, "epochs": 2, "device": "cuda", "dtype": dtype}
    adapt(
        AdaptConfig(model=tiny.model, tokens=tiny.tokens, block_size=tiny.block_size, **loop),
        tmp_path / "adapt",
    )
    train(
        TrainConfig(
            tokens=tiny.tokens, targets=tiny.targets, base=tiny.model, teacher=tiny.model, **loop
        ),
        tmp_path / "train",
    )
    for stage in ("adapt", "train"):
        curve = json.loads((tmp_path / stage / "curve.json").read_text())
        assert curve[-1]["nll"] < curve[0]["nll"] - 0.3
