"""memdec audit: passes what targets wrote, and fails on each way of being wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_tiny import needs_faiss, run_stage, set_small_shards, write_model
from safetensors.torch import load_file, save_file

from memdec.data.artefact import file_sha256
from memdec.data.audit import AuditConfig, audit
from memdec.data.exact import ExactIndex
from memdec.data.targets import TargetsConfig, TargetStore, targets
from memdec.errors import MemdecError

VOCAB = 320


@pytest.fixture(scope="module")
def made(tiny, datastore_dir, tmp_path_factory) -> Path:
    """Targets in several shards, cut to 6 entries a row."""
    out = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        set_small_shards(patch.setattr)
        targets(make_config(tiny, datastore_dir), out)
    return out


def make_config(tiny: Path, datastore: Path, **other: Any) -> TargetsConfig:
    values: dict[str, Any] = {"k": 16, "temperature": 3.0, "max_entries": 6, "device": "cpu"}
    return TargetsConfig(datastore=datastore, tokens=tiny / "tokens", **{**values, **other})


def run(
    tiny: Path, datastore: Path | None, out: Path, **other: Any
) -> tuple[int, dict[str, Any], list[str]]:
    """Exit status, the report, and the names of the checks that failed."""
    report = out.parent / "report.json"
    values = {"rows": 100, "max_dropped_mass": 0.9, "device": "cpu", "report": report, **other}
    status = audit(AuditConfig(targets=out, tokens=tiny / "tokens", datastore=datastore, **values))
    result = json.loads(report.read_text())
    assert result["passed"] == (status == 0)
    return status, result, [check["name"] for check in result["checks"] if not check["passed"]]


def test_what_targets_wrote_may_be_trained_on(tiny, datastore_dir, made, capsys):
    status, result, failed = run(tiny, datastore_dir, made)
    assert (status, failed) == (0, [])
    assert result["recall"] == 1.0
    assert 0 < result["dropped_mass"] < 0.9
    assert result["targets"] == TargetStore.open(made).fingerprint
    names = [check["name"] for check in result["checks"]]
    assert names == [
        "files",
        "offsets",
        "positions",
        "labels",
        "token ids",
        "probabilities",
        "row sums",
        "mean dropped mass",
        "neighbours' order",
        "the position itself",
        "recall@16",
        "rows made again",
    ]
    assert "may be trained on" in capsys.readouterr().out


def test_the_sample_depends_on_the_seed_alone(tiny, datastore_dir, made):
    first, again, other = (
        run(tiny, datastore_dir, made, rows=20, seed=seed)[1]["dropped_mass"] for seed in (1, 1, 2)
    )
    assert first == again != other


def corrupted(made: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy with `change` done to every shard, and a manifest that agrees with it."""
    shutil.copytree(made, out)
    manifest = json.loads((out / "manifest.json").read_text())
    for name, record in manifest["files"].items():
        shard = load_file(out / name)
        change(shard)
        save_file({key: tensor.contiguous() for key, tensor in shard.items()}, out / name)
        record |= {"bytes": (out / name).stat().st_size, "sha256": file_sha256(out / name)}
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def roll(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(shard: dict[str, torch.Tensor]) -> None:
        shard[name] = shard[name].roll(1)

    return change


def scale(name: str, factor: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(shard: dict[str, torch.Tensor]) -> None:
        shard[name] = shard[name] * factor

    return change


def token_beyond_vocabulary(shard: dict[str, torch.Tensor]) -> None:
    shard["token_ids"][shard["indptr"][:-1]] = VOCAB


def repeated_token(shard: dict[str, torch.Tensor]) -> None:
    several = shard["indptr"].diff() > 1
    first = shard["indptr"][:-1][several]
    shard["token_ids"][first] = shard["token_ids"][first + 1]


def not_a_number(shard: dict[str, torch.Tensor]) -> None:
    shard["probs"][::50] = torch.nan


def other_tokens(shard: dict[str, torch.Tensor]) -> None:
    shard["token_ids"] = (shard["token_ids"] + 1) % VOCAB


def falling_offsets(shard: dict[str, torch.Tensor]) -> None:
    shard["indptr"][3] = 0


def fewer_entries(shard: dict[str, torch.Tensor]) -> None:
    shard["probs"] = shard["probs"][:-1]


def fewer_rows(shard: dict[str, torch.Tensor]) -> None:
    for name in ("indptr", "position", "label", "dropped_mass"):
        shard[name] = shard[name][:-1]
    for name in ("token_ids", "probs"):
        shard[name] = shard[name][: int(shard["indptr"][-1])]


def dropped_mass_of_nobody(shard: dict[str, torch.Tensor]) -> None:
    shard["dropped_mass"][:] = torch.nan


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (roll("position"), ["positions"]),
        (roll("label"), ["labels"]),
        (scale("probs", 0.9), ["row sums"]),
        (scale("probs", -1.0), ["probabilities", "row sums"]),
        (scale("dropped_mass", 1.9), ["mean dropped mass"]),
        (dropped_mass_of_nobody, ["mean dropped mass"]),
        (token_beyond_vocabulary, ["token ids"]),
        (repeated_token, ["token ids"]),
        (not_a_number, ["probabilities", "row sums"]),
        (other_tokens, ["rows made again"]),
        (falling_offsets, ["offsets"]),
        (fewer_entries, ["offsets"]),
        (fewer_rows, ["offsets"]),
    ],
)
def test_corrupt_rows_fail(tiny, datastore_dir, made, tmp_path, change, expected):
    out = corrupted(made, tmp_path / "targets", change)
    _, honest, _ = run(tiny, datastore_dir, made)
    limit = honest["dropped_mass"] * 1.5
    status, _, failed = run(tiny, datastore_dir, out, max_dropped_mass=limit)
    assert (status, failed) == (1, expected)


@pytest.fixture(scope="module")
def kept(tiny, datastore_dir, tmp_path_factory) -> Path:
    """The neighbours themselves, in several shards."""
    out = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        set_small_shards(patch.setattr)
        targets(make_config(tiny, datastore_dir, max_entries=None, keep="neighbours"), out)
    return out


def test_kept_neighbours_may_be_trained_on(tiny, datastore_dir, kept):
    status, result, failed = run(tiny, datastore_dir, kept)
    assert (status, failed) == (0, [])
    assert (result["recall"], result["dropped_mass"]) == (1.0, 0.0)
    names = [check["name"] for check in result["checks"]]
    assert names[:5] == ["files", "shapes", "positions", "labels", "distances"]
    assert names[-1] == "rows made again"


def backwards(shard: dict[str, torch.Tensor]) -> None:
    shard["distances"] = shard["distances"].flip(1)
    shard["tokens"] = shard["tokens"].int().flip(1).to(torch.uint16)


def other_neighbours(shard: dict[str, torch.Tensor]) -> None:
    shard["tokens"] = ((shard["tokens"].int() + 1) % VOCAB).to(torch.uint16)


def beyond_vocabulary(shard: dict[str, torch.Tensor]) -> None:
    shard["tokens"][:, 0] = VOCAB


def one_distance_fewer(shard: dict[str, torch.Tensor]) -> None:
    shard["distances"] = shard["distances"][:, 1:]


def one_row_fewer(shard: dict[str, torch.Tensor]) -> None:
    shard["units"] = shard["units"][1:]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (roll("position"), ["positions"]),
        (roll("label"), ["labels"]),
        (backwards, ["distances"]),
        (scale("distances", -1.0), ["distances"]),
        (scale("units", 0.5), ["rows made again"]),
        (other_neighbours, ["rows made again"]),
        (beyond_vocabulary, ["token ids"]),
        (one_distance_fewer, ["shapes"]),
        (one_row_fewer, ["shapes"]),
    ],
)
def test_corrupt_neighbours_fail(tiny, datastore_dir, kept, tmp_path, change, expected):
    out = corrupted(kept, tmp_path / "targets", change)
    status, _, failed = run(tiny, datastore_dir, out)
    assert (status, failed) == (1, expected)


def flip(path: Path) -> None:
    """Another bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damaged",
    [
        "targets/targets/targets-00001.safetensors",
        "datastore/keys/keys-00000.npy",
        "datastore/next_tokens.npy",
        "tokens/tokens/train-00000.npy",
    ],
)
def test_a_flipped_bit_anywhere_fails(tiny, datastore_dir, made, tmp_path, damaged):
    """Also where no row of the sample would show it, and of whatever it makes a number."""
    for name, path in {
        "targets": made,
        "datastore": datastore_dir,
        "tokens": tiny / "tokens",
    }.items():
        shutil.copytree(path, tmp_path / name)
    flip(tmp_path / damaged)
    status, result, failed = run(tmp_path, tmp_path / "datastore", tmp_path / "targets", rows=1)
    assert (status, failed) == (1, ["files"])
    assert result["checks"][0]["found"] == f"{tmp_path / damaged} is not, 1 in all"


def test_an_interrupted_audit_leaves_the_last_report(tiny, datastore_dir, made, monkeypatch):
    _, before, _ = run(tiny, datastore_dir, made)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("memdec.data.artefact.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, datastore_dir, made, seed=1)
    assert json.loads((made.parent / "report.json").read_text()) == before
    assert not list(made.parent.glob("*.tmp"))


def test_too_much_dropped_mass_fails(tiny, datastore_dir, made):
    assert run(tiny, datastore_dir, made, max_dropped_mass=0.001)[2] == ["mean dropped mass"]


def test_rows_that_count_the_position_itself_fail(tiny, datastore_dir, tmp_path, monkeypatch):
    find = ExactIndex.find
    with monkeypatch.context() as patch:
        patch.setattr(ExactIndex, "find", lambda self, queries, k, _: find(self, queries, k, None))
        targets(make_config(tiny, datastore_dir, max_entries=None), tmp_path / "targets")
    assert run(tiny, datastore_dir, tmp_path / "targets")[2] == ["rows made again"]


def answers(change: Callable[..., tuple[np.ndarray, np.ndarray]]) -> Callable[..., Any]:
    search = ExactIndex.search

    def changed(self: ExactIndex, queries: np.ndarray, k: int, exclude: np.ndarray) -> Any:
        return change(*search(self, queries, k, exclude), exclude)

    return changed


def reverse(distances, ids, _):
    return distances[:, ::-1].copy(), ids[:, ::-1].copy()


def find_self(distances, ids, own):
    """In place of the last neighbour, at an honest distance."""
    return np.c_[distances[:, :-1], distances[:, -1] + 1], np.c_[ids[:, :-1], own]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (reverse, ["neighbours' order"]),
        (find_self, ["the position itself"]),
    ],
)
def test_an_index_that_answers_wrongly_fails(
    tiny, datastore_dir, made, monkeypatch, change, expected
):
    monkeypatch.setattr(ExactIndex, "search", answers(change))
    assert set(expected) <= set(run(tiny, datastore_dir, made, min_recall=0)[2])


@needs_faiss
def test_an_index_that_finds_too_little_fails(tiny, tmp_path):
    values = {"model": str(tiny / "model"), "tokens": tiny / "tokens", "block_size": 32}
    values |= {"index": "IVF16,Flat", "nprobe": 1, "device": "cpu"}
    run_stage("datastore", values, tmp_path / "datastore")
    targets(make_config(tiny, tmp_path / "datastore"), tmp_path / "targets")
    status, result, failed = run(
        tiny, tmp_path / "datastore", tmp_path / "targets", min_recall=0.95
    )
    assert (status, failed) == (1, ["recall@16"])
    assert 0.1 < result["recall"] < 0.95
    status, _, failed = run(tiny, tmp_path / "datastore", tmp_path / "targets", min_recall=0.1)
    assert (status, failed) == (0, [])


def test_inputs_that_do_not_belong_together_are_refused(tiny, datastore_dir, made, tmp_path):
    with pytest.raises(MemdecError, match="was made with a datastore: give it"):
        run(tiny, None, made)
    values = {"model": str(write_model(tmp_path / "model", seed=1)), "tokens": tiny / "tokens"}
    run_stage("datastore", {**values, "block_size": 32, "device": "cpu"}, tmp_path / "datastore")
    with pytest.raises(MemdecError, match=r"made with datastore \w{12}, this run has \w{12}"):
        run(tiny, tmp_path / "datastore", made)


def test_a_report_with_no_place_to_go(tmp_path):
    with pytest.raises(MemdecError, match="report must be in a directory that is there"):
        AuditConfig(targets="a", tokens="b", report=tmp_path / "none" / "report.json")


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"min_recall": 1.1}, {"max_dropped_mass": -0.1}])
def test_bad_options(wrong):
    with pytest.raises(MemdecError, match=f"{next(iter(wrong))} must be"):
        AuditConfig(targets="a", tokens="b", **wrong)
