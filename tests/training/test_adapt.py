from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest
from killed import MOMENTS, contents, run_killed
from safetensors.torch import load_file

from memdec.errors import MemdecError
from memdec.training.adapt import AdaptConfig, adapt


@pytest.fixture(scope="module")
def config(tiny) -> AdaptConfig:
    return AdaptConfig(
        model=tiny.model,
        tokens=tiny.tokens,
        block_size=tiny.block_size,
        learning_rate=1e-2,
        epochs=2,
        validations=2,
        patience=0,
        device="cpu",
    )


@pytest.fixture(scope="module")
def adapted(config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("adapted") / "adapt"
    adapt(config, out)
    return out


def test_the_model_learns_and_its_best_validation_is_kept(adapted, tiny):
    from memdec.data.corpus import TokenCorpus
    from memdec.evaluation.forward import label_scores
    from memdec.modeling.loading import load_model, load_tokenizer

    curve = json.loads((adapted / "curve.json").read_text())
    best = json.loads((adapted / "manifest.json").read_text())["best"]
    assert best["nll"] == min(row["nll"] for row in curve) < curve[0]["nll"] - 0.5
    model = load_model(adapted / "model")
    validation = TokenCorpus.open(tiny.tokens).split("validation")
    scores = label_scores(
        model, validation, block_size=tiny.block_size, batch_blocks=4, vocab_size=62
    ).log_probs
    assert -scores.mean(dtype=float) == best["nll"]
    assert model.config.use_cache  # training must not switch the cache off for good
    assert len(load_tokenizer(adapted / "model")) == 62


def test_a_clock_that_jumps_back_costs_no_checkpoint(config, adapted, tmp_path, monkeypatch):
    from memdec.training.trainer import _Schedule

    on_save = _Schedule.on_save

    def save_and_turn_the_clock_back(self, args, state, control, **kwargs):
        on_save(self, args, state, control, **kwargs)
        for path in Path(args.output_dir).glob("checkpoint-*"):
            os.utime(path, (2e9 - state.global_step, 2e9 - state.global_step))

    monkeypatch.setattr(_Schedule, "on_save", save_and_turn_the_clock_back)
    adapt(config, tmp_path / "adapt")
    assert contents(tmp_path / "adapt").keys() == contents(adapted).keys()


def test_what_gets_its_name_lies_on_the_disk(config, tmp_path, monkeypatch):
    """After a power loss a file may be empty that was renamed before it was written back."""
    fsync, replace = os.fsync, os.replace
    written, named = {}, set()

    def remember(descriptor):
        fsync(descriptor)
        status = os.fstat(descriptor)
        written[status.st_ino] = status.st_mtime_ns, status.st_size

    def check(source, target):
        # The last file of a checkpoint stands for all of them.
        whole = source.parent if "checkpoint-" in source.parent.name else source
        for path in whole.rglob("*") if whole.is_dir() else [whole]:
            if path.is_file():
                status = path.stat()
                found = written.get(status.st_ino)
                assert found == (status.st_mtime_ns, status.st_size), path
        replace(source, target)
        named.add(target.parent.name.partition("-")[0] if whole == source.parent else target.name)

    monkeypatch.setattr(os, "fsync", remember)
    monkeypatch.setattr(os, "replace", check)
    adapt(config, tmp_path / "adapt")
    assert {"checkpoint", "best-0", "model", "manifest.json"} <= named


def test_the_train_loss_of_the_curve_is_a_mean_over_tokens(adapted):
    """An accumulated step counts tokens, not batches: the first losses are near log(vocabulary)."""
    curve = json.loads((adapted / "curve.json").read_text())
    assert 2.0 < curve[1]["train_loss"] < 4.5


@pytest.mark.slow
def test_a_compiled_model_is_saved_as_what_it_is(adapted, config, tmp_path):
    adapt(dataclasses.replace(config, compile=True, epochs=1, validations=1), tmp_path / "adapt")
    curve = json.loads((tmp_path / "adapt" / "curve.json").read_text())
    assert curve[-1]["nll"] < curve[0]["nll"] - 0.3
    weights = [
        load_file(path / "model/model.safetensors") for path in (adapted, tmp_path / "adapt")
    ]
    assert weights[0].keys() == weights[1].keys()


def test_the_same_seed_gives_the_same_bytes(adapted, config, tmp_path):
    adapt(config, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(adapted)
    adapt(dataclasses.replace(config, seed=1), tmp_path / "other")
    weights = "model/model.safetensors"
    assert contents(tmp_path / "other")[weights] != contents(adapted)[weights]


def test_killed_again_and_again_it_ends_with_the_same_bytes(adapted, config, tmp_path):
    out = tmp_path / "adapt"
    moments = [
        ("forward pass", 5),  # before the first checkpoint, at step 3
        ("forward pass", 15),  # behind the second, in the middle of an epoch
        ("part of a checkpoint", 3),  # the optimizer of step 9 is on disk, its schedule is not
        ("part of a checkpoint", 5),  # step 9 is whole, step 12 has just begun
        ("rename", 3),
        ("manifest", 1),  # the checkpoints are gone
    ]
    for moment, count in moments:
        assert run_killed(adapt, config, out, moment, count), (moment, count)
    adapt(config, out)
    assert contents(out) == contents(adapted)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_it_ends_with_the_same_bytes(moment, adapted, config, tmp_path):
    count, killed = 0, True
    while killed:
        count += 1
        out = tmp_path / str(count)
        killed = run_killed(adapt, config, out, moment, count)
        adapt(config, out)
        assert contents(out) == contents(adapted), count
    assert count > 1


def test_a_finished_stage_does_nothing_and_another_request_is_refused(adapted, config, capfd):
    before = {path: path.stat().st_mtime_ns for path in adapted.rglob("*")}
    adapt(config, adapted)
    assert "already done" in capfd.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in adapted.rglob("*")}
    assert {**before, adapted / ".lock": 0} == {**after, adapted / ".lock": 0}
    with pytest.raises(MemdecError, match=r"epochs = 2, this run has 4"):
        adapt(dataclasses.replace(config, epochs=4), adapted)


def test_it_stops_when_validation_gets_worse_and_a_rerun_does_not_go_on(config, tmp_path):
    hot = dataclasses.replace(config, learning_rate=1.0, epochs=9, patience=2)
    adapt(hot, tmp_path / "adapt")
    curve = json.loads((tmp_path / "adapt" / "curve.json").read_text())
    assert [row["step"] for row in curve] == [0, 3, 6]
    assert curve[0]["score"] == min(row["score"] for row in curve)
    assert run_killed(adapt, hot, tmp_path / "killed", "result", 1)
    adapt(hot, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "adapt")


@pytest.fixture
def small_disk(tmp_path):
    """A file system on which the model fits once, but no checkpoint of it."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a small file system")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_is_one_clear_line_and_more_space_is_enough(
    adapted, config, small_disk, tmp_path
):
    out = small_disk / "adapt"
    with pytest.raises(MemdecError, match=r"the disk is full: .* run the same command again"):
        adapt(config, out)
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    adapt(config, out)
    assert contents(out) == contents(adapted)


def test_a_loss_that_is_not_finite_is_an_error(config, tmp_path):
    with pytest.raises(MemdecError, match="smaller learning_rate"):
        adapt(dataclasses.replace(config, learning_rate=1e30), tmp_path / "adapt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 65}, "at most 64, the context of this gpt2, got 65"),
        ({"block_size": 100_000}, "block_size must be at most .* got 100000"),
        ({"model": "/nowhere/model"}, "no model at /nowhere/model"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"warmup_fraction": 1.0}, "warmup_fraction must be in"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(changes, message, config, tmp_path):
    with pytest.raises(MemdecError, match=message):
        adapt(dataclasses.replace(config, **changes), tmp_path / "adapt")
    assert not (tmp_path / "adapt").exists()
