from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from killed import contents, run_killed
from safetensors.torch import load_file, save_file

from memdec.data.artefact import file_sha256
from memdec.data.targets import TargetsConfig, targets
from memdec.errors import MemdecError
from memdec.training.distill import TrainConfig, train


@pytest.fixture(scope="module")
def config(tiny) -> TrainConfig:
    return TrainConfig(
        tokens=tiny.tokens,
        targets=tiny.targets,
        base=tiny.model,
        teacher=tiny.model,
        memory_layers=2,
        learning_rate=1e-2,
        epochs=2,
        validations=2,
        device="cpu",
    )


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "train"
    train(config, out)
    return out


def test_the_memory_learns_and_helps_the_base(trained):
    from memdec.modeling.loading import load_model, load_tokenizer

    curve = json.loads((trained / "curve.json").read_text())
    best = json.loads((trained / "manifest.json").read_text())["best"]
    base_nll = -np.load(trained / "base.npy").mean(dtype=float)
    assert best["joint_nll"] == min(row["joint_nll"] for row in curve) < base_nll - 0.3
    assert 0 < best["lmbda"] <= 1
    assert load_model(trained / "memory").config.n_layer == 2
    assert len(load_tokenizer(trained / "memory")) == 62


def test_the_loss_is_alpha_kl_and_the_rest_cross_entropy(config, trained, tmp_path):
    row = json.loads((trained / "curve.json").read_text())[1]
    assert row["train_loss"] == pytest.approx(0.5 * row["train_kl"] + 0.5 * row["train_ce"])
    assert row["train_kl"] > 0
    for alpha, part in [(1.0, "train_kl"), (0.25, None)]:
        out = tmp_path / str(alpha)
        train(dataclasses.replace(config, alpha=alpha, epochs=1, validations=1), out)
        row = json.loads((out / "curve.json").read_text())[1]
        mixed = alpha * row["train_kl"] + (1 - alpha) * row["train_ce"]
        assert row["train_loss"] == pytest.approx(row[part] if part else mixed)


def test_gradient_accumulation_changes_rounding_only(config, tmp_path):
    """Eight blocks at once, or in four passes, are the same step (flash-linear-attention#539)."""
    losses = []
    for blocks, passes in [(8, 1), (2, 4)]:
        out = tmp_path / f"{blocks}"
        one_step = dataclasses.replace(
            config,
            memory_init=without_dropout(config.teacher, tmp_path / "init"),
            memory_layers=None,
            batch_blocks=blocks,
            gradient_accumulation=passes,
            epochs=1,
            validations=1,
        )
        train(one_step, out)
        losses.append(json.loads((out / "curve.json").read_text())[1])
    assert losses[0]["train_loss"] == pytest.approx(losses[1]["train_loss"], rel=1e-5)
    assert losses[0]["nll"] == pytest.approx(losses[1]["nll"], rel=1e-4)


def without_dropout(model: str, path: Path) -> str:
    if not path.exists():
        shutil.copytree(model, path)
        values = json.loads((path / "config.json").read_text())
        values |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        (path / "config.json").write_text(json.dumps(values))
    return str(path)


def test_the_same_seed_gives_the_same_bytes(trained, config, tmp_path):
    train(config, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(trained)


def test_killed_again_and_again_it_ends_with_the_same_bytes(trained, config, tmp_path):
    out = tmp_path / "train"
    moments = [
        ("rename", 3),  # the base's scores, before any training
        ("forward pass", 9),
        ("part of a checkpoint", 3),
        ("result", 1),
    ]
    for moment, count in moments:
        assert run_killed(train, config, out, moment, count), (moment, count)
    train(config, out)
    assert contents(out) == contents(trained)


@pytest.fixture(scope="module")
def kept(tiny, tmp_path_factory) -> Callable[..., Path]:
    """Makes targets of `tiny`, given what else is asked for."""
    root = tmp_path_factory.mktemp("kept")

    def make(name: str, **options: object) -> Path:
        if not (root / name).exists():
            given = {"tokens": tiny.tokens, "datastore": tiny.datastore, "k": 16, "device": "cpu"}
            targets(TargetsConfig(model=tiny.model, **given, **options), root / name)
        return root / name

    return make


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "memory" / "model.safetensors")


def test_neighbours_in_float32_train_what_their_targets_do(trained, config, kept, tmp_path):
    exact = kept("float32", keep="neighbours", distance_dtype="float32")
    train(dataclasses.replace(config, targets=exact), tmp_path / "train")
    for file in ("memory/model.safetensors", "curve.json", "base.npy"):
        assert (tmp_path / "train" / file).read_bytes() == (trained / file).read_bytes()


def test_neighbours_in_float16_train_nearly_the_same(trained, config, kept, tmp_path):
    narrow = dataclasses.replace(config, targets=kept("float16", keep="neighbours"))
    train(narrow, tmp_path / "train")
    curves = [json.loads((out / "curve.json").read_text()) for out in (tmp_path / "train", trained)]
    for one, other in zip(*curves, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    params = json.loads((tmp_path / "train" / "manifest.json").read_text())["params"]
    assert (params["k"], params["max_entries"]) == (16, None)


def test_another_temperature_and_k_are_those_of_fresh_targets(config, kept, tmp_path):
    chosen = {"temperature": 40.0, "k": 5, "max_entries": 3}
    fresh = tmp_path / "fresh"
    given = {"tokens": config.tokens, "datastore": config.tokens.parent / "datastore"}
    targets(TargetsConfig(**given, **chosen, device="cpu"), fresh)
    once = dataclasses.replace(config, epochs=1, validations=1)
    train(dataclasses.replace(once, targets=fresh), tmp_path / "wanted")
    exact = kept("float32", keep="neighbours", distance_dtype="float32")
    train(dataclasses.replace(once, targets=exact, **chosen), tmp_path / "found")
    train(dataclasses.replace(once, targets=exact), tmp_path / "other")
    wanted, found, other = (weights_of(tmp_path / name) for name in ("wanted", "found", "other"))
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    assert not all(torch.equal(other[name], weight) for name, weight in wanted.items())


def test_training_from_neighbours_is_killed_and_goes_on(config, kept, tmp_path):
    taught = dataclasses.replace(
        config, targets=kept("float16", keep="neighbours"), temperature=2.0, k=8
    )
    train(taught, tmp_path / "whole")
    for moment, count in [("forward pass", 9), ("part of a checkpoint", 3)]:
        assert run_killed(train, taught, tmp_path / "killed", moment, count), (moment, count)
    train(taught, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    with pytest.raises(MemdecError, match=r"option temperature = 2\.0, this run has 3\.0"):
        train(dataclasses.replace(taught, temperature=3.0), tmp_path / "whole")


@pytest.mark.parametrize(
    ("keep", "changes", "message"),
    [
        ("targets", {"temperature": 2.0}, "temperature goes with kept neighbours"),
        ("targets", {"k": 4}, "k goes with kept neighbours"),
        ("targets", {"max_entries": 4}, "max_entries goes with kept neighbours"),
        ("neighbours", {"k": 17}, "k must be at most 16, the neighbours that targets keeps"),
    ],
)
def test_what_the_targets_cannot_follow_is_refused(config, kept, tmp_path, keep, changes, message):
    given = kept("float16", keep="neighbours") if keep == "neighbours" else config.targets
    with pytest.raises(MemdecError, match=message):
        train(dataclasses.replace(config, targets=given, **changes), tmp_path / "train")
    assert not (tmp_path / "train").exists()


@pytest.mark.parametrize("keep", ["targets", "neighbours"])
@pytest.mark.parametrize("field", ["position", "label"])
def test_a_target_row_of_another_token_stops_the_training(
    field, keep, config, tiny, kept, tmp_path
):
    """Forks of the official code trained on rows that no longer matched, or trimmed them."""
    targets = tmp_path / "targets"
    made = kept("float16", keep="neighbours") if keep == "neighbours" else tiny.targets
    shutil.copytree(made, targets)
    (shard,) = targets.glob("targets/*.safetensors")
    tensors = load_file(shard)
    tensors[field] = tensors[field].clone()
    tensors[field][100] += 1
    save_file(tensors, shard)
    manifest = json.loads((targets / "manifest.json").read_text())
    name = str(shard.relative_to(targets))
    manifest["files"][name] = {"bytes": shard.stat().st_size, "sha256": file_sha256(shard)}
    (targets / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MemdecError, match="expected a target row of position 100 with label"):
        train(dataclasses.replace(config, targets=targets), tmp_path / "train")


def test_inputs_of_other_stages_are_refused(config, tiny, tmp_path):
    other = tiny.save_other_model(tmp_path / "other")
    with pytest.raises(
        MemdecError, match=r"targets was made with model \w{12}, this run has \w{12}"
    ):
        train(dataclasses.replace(config, teacher=other), tmp_path / "train")
    with pytest.raises(MemdecError, match="expected a directory of targets"):
        train(dataclasses.replace(config, targets=tiny.tokens), tmp_path / "train")
    assert not (tmp_path / "train").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"memory_layers": 0}, "memory_layers must be at least 1, got 0"),
        ({"memory_width": 16}, "memory_width goes with memory_init fresh only"),
        ({"temperature": 0.0}, "temperature must be from 1e-30 to 1e30, got 0.0"),
        ({"k": 0}, "k must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(changes, message, config):
    with pytest.raises(MemdecError, match=message):
        dataclasses.replace(config, **changes)


# Registered first, so that it runs last.
THREADS_AT_EXIT = """
import atexit, glob, sys

@atexit.register
def say_threads():
    names = {open(path).read().strip() for path in glob.glob("/proc/self/task/*/comm")}
    print("thread at exit:", "python", *names, file=sys.stderr)
"""


def test_two_processes_train_what_one_does(config, tmp_path):
    """`accelerate launch -m memdec train`: half the blocks each, and one of them writes."""
    alone = dataclasses.replace(
        config,
        memory_init=without_dropout(config.teacher, tmp_path / "init"),
        memory_layers=None,
        batch_blocks=4,
        gradient_accumulation=2,
    )
    train(alone, tmp_path / "alone")
    options = {**alone.to_mapping(), "batch_blocks": 2, "out": tmp_path / "together"}
    # Its launcher of processes, "multi_gpu", is torchrun and asks for no GPU.
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", *launch, "-m", "memdec", "train"]
    for name in ("tokens", "targets", "base", "teacher", "memory_init", "batch_blocks", "epochs"):
        command += ["--" + name.replace("_", "-"), str(options[name])]
    for name in ("gradient_accumulation", "validations", "learning_rate", "device", "out"):
        command += ["--" + name.replace("_", "-"), str(options[name])]
    (tmp_path / "sitecustomize.py").write_text(THREADS_AT_EXIT)
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path}
    for _ in range(2):  # the second run finds everything done
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "thread at exit: python" in done.stderr
        assert (
            "gloo" not in done.stderr.partition("thread at exit")[2]
        )  # it could abort the process
    assert done.stderr.count("already done") == 1
    curves = [
        json.loads((tmp_path / name / "curve.json").read_text()) for name in ("alone", "together")
    ]
    for one, two in zip(*curves, strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    assert not (tmp_path / "together" / "checkpoints").exists()


def test_a_memory_of_another_tokenizer_is_moved_to_the_tokens(config, tiny, tmp_path):
    from tokenizers import Tokenizer
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

    from memdec.modeling.loading import load_model, load_tokenizer

    other = str(tmp_path / "other")
    parts = json.loads(load_tokenizer(tiny.model).backend_tokenizer.to_str())
    words = parts["model"]["vocab"]  # the same words under other ids
    parts["model"]["vocab"] = {word: (i + 7) % len(words) for word, i in words.items()}
    parts["added_tokens"] = []
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
        eos_token="<end>",
        unk_token="<unknown>",
    )
    tokenizer.save_pretrained(other)
    GPT2LMHeadModel(load_model(tiny.model).config).save_pretrained(other)

    kept = dataclasses.replace(config, memory_init=other)
    with pytest.raises(MemdecError, match="tokenizers of memory_init and the tokens differ"):
        train(kept, tmp_path / "refused")
    moved = dataclasses.replace(kept, memory_vocabulary="mean")
    out = tmp_path / "moved"
    train(moved, out)
    curve = json.loads((out / "curve.json").read_text())
    assert min(row["nll"] for row in curve) < curve[0]["nll"] - 0.3
    assert load_tokenizer(out / "memory").get_vocab() == load_tokenizer(tiny.model).get_vocab()
    assert json.loads((out / "manifest.json").read_text())["params"]["memory_vocabulary"] == "mean"


def test_only_a_model_of_its_own_has_another_vocabulary(config):
    with pytest.raises(MemdecError, match="memory_vocabulary goes with a memory_init that is a"):
        dataclasses.replace(config, memory_vocabulary="random")
