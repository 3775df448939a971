"""Sources of targets other than neighbours, each against dense float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_tiny import contents, set_small_shards, stage_in_child, start, write_model
from safetensors.torch import save_file

from memdec.data.audit import AuditConfig, audit
from memdec.data.corpus import TokenCorpus
from memdec.data.targets import TargetsConfig, TargetStore, targets
from memdec.errors import MemdecError
from memdec.modeling.loading import load_model

VOCAB = 320
BLOCK = 32


def make(out: Path, tiny: Path, **values: Any) -> TargetStore:
    options = {"tokens": tiny / "tokens", "model": str(tiny / "model"), "device": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        set_small_shards(patch.setattr)
        targets(TargetsConfig(**{**options, **values}), out)
    return TargetStore.open(out)


def dense(store: TargetStore) -> torch.Tensor:
    rows = store.gather(np.arange(len(store))).targets
    return rows.validate(VOCAB).to_dense(VOCAB).double()


@pytest.fixture(scope="module")
def teacher_probs(tiny, corpus: TokenCorpus) -> torch.Tensor:
    """The teacher's distribution at each train position in float64, each block on its own."""
    model = load_model(tiny / "model").double()
    stream = corpus.split("train")
    rows = []
    for number in range(stream.blocks(BLOCK)):
        inputs = torch.from_numpy(stream.block(number, BLOCK)[0].astype(np.int64))
        with torch.no_grad():
            rows.append(model(input_ids=inputs[None]).logits[0, :, :VOCAB].softmax(-1))
    return torch.cat(rows)


@pytest.fixture(scope="module")
def neighbours(tiny, datastore_dir, tmp_path_factory) -> torch.Tensor:
    out = tmp_path_factory.mktemp("knn") / "targets"
    return dense(make(out, tiny, datastore=datastore_dir, k=16, temperature=3.0))


def test_the_teachers_own_distribution(tiny, corpus, teacher_probs, tmp_path):
    store = make(tmp_path / "out", tiny, source="teacher", top_m=5, block_size=BLOCK)
    kept, ids = teacher_probs.topk(5)
    found = dense(store)
    assert store.artefact.manifest["shards"] > 5
    assert (store.block_size, store.source) == (BLOCK, "teacher")
    torch.testing.assert_close(
        found.gather(1, ids), kept / kept.sum(1, keepdim=True), rtol=1e-4, atol=1e-6
    )
    rows = store.gather(np.arange(len(store)))
    torch.testing.assert_close(
        rows.targets.dropped_mass.double(), 1 - kept.sum(1), rtol=0, atol=1e-5
    )
    stream = corpus.split("train")
    assert rows.labels.tolist() == stream.read(1, len(stream)).tolist()


def test_all_tokens_are_the_whole_distribution(tiny, teacher_probs, tmp_path):
    store = make(tmp_path / "out", tiny, source="teacher", top_m=VOCAB, block_size=BLOCK)
    torch.testing.assert_close(dense(store), teacher_probs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lmbda", [0.0, 0.3, 1.0])
def test_the_mixture(tiny, datastore_dir, teacher_probs, neighbours, tmp_path, lmbda):
    options = {"datastore": datastore_dir, "k": 16, "temperature": 3.0, "lmbda": lmbda}
    store = make(tmp_path / "out", tiny, source="mixture", top_m=VOCAB, **options)
    expected = (1 - lmbda) * teacher_probs + lmbda * neighbours
    torch.testing.assert_close(dense(store), expected, rtol=1e-4, atol=1e-6)
    assert store.artefact.manifest["lmbda"] == lmbda
    assert store.artefact.manifest["calibration"] is None


def test_the_mixtures_dropped_mass(tiny, datastore_dir, teacher_probs, neighbours, tmp_path):
    """Both the teacher's tail beyond top_m and what max_entries cuts off."""
    options = {"datastore": datastore_dir, "k": 16, "temperature": 3.0, "lmbda": 0.25}
    store = make(tmp_path / "out", tiny, source="mixture", top_m=8, max_entries=4, **options)
    kept, ids = teacher_probs.topk(8)
    part = torch.zeros_like(teacher_probs).scatter(1, ids, kept)
    most = (0.75 * part + 0.25 * neighbours).topk(4).values
    rows = store.gather(np.arange(len(store))).targets
    assert (rows.indptr.diff() == 4).all()
    torch.testing.assert_close(rows.dropped_mass.double(), 1 - most.sum(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        dense(store).topk(4).values, most / most.sum(1, keepdim=True), rtol=1e-3, atol=1e-6
    )


def test_a_position_without_neighbours_has_the_teachers_part_alone(tiny, datastore_dir, corpus):
    from memdec.data.datastore import Datastore
    from memdec.data.sources import KnnSource, MixtureSource, TeacherSource

    class Lonely(KnnSource):
        def find(self, start, stop):
            found = super().find(start, stop)
            found.distances[1], found.ids[1] = torch.inf, -1
            return found

    model, stream = load_model(tiny / "model"), corpus.split("train")
    teacher = TeacherSource(model, stream, VOCAB, 20, BLOCK, 4)
    knn = Lonely(Datastore.open(datastore_dir), 16, 3.0, None)
    (mixed,) = MixtureSource(teacher, knn, 0.4).rows(0, BLOCK)
    (alone,) = teacher.rows(0, BLOCK)
    torch.testing.assert_close(mixed[1:2].to_dense(VOCAB), alone[1:2].to_dense(VOCAB))
    torch.testing.assert_close(mixed.dropped_mass[1], alone.dropped_mass[1])
    assert (mixed.to_dense(VOCAB)[2] - alone.to_dense(VOCAB)[2]).abs().sum() > 0.1


@pytest.mark.parametrize(
    "given", [{}, {"temperature": 2.0}, {"lmbda": 0.35}, {"temperature": 2.0, "lmbda": 0.35}]
)
def test_what_is_not_given_is_chosen_on_validation(tiny, datastore_dir, tmp_path, given):
    options = {"datastore": datastore_dir, "k": 16, "calibration_positions": 100, **given}
    manifest = make(tmp_path / "out", tiny, source="mixture", **options).artefact.manifest
    chosen = manifest["calibration"]
    for name in ("temperature", "lmbda"):
        expected = given[name] if name in given else chosen[name]
        assert manifest[name] == expected
    if len(given) < 2:
        tried = {row["temperature"] for row in chosen["tried"]}
        assert len(tried) == (1 if "temperature" in given else 18)
        assert chosen["nll"] == min(row["nll"] for row in chosen["tried"])
        assert chosen["nll"] < chosen["teacher_nll"]
        if "lmbda" in given:
            assert {row["lmbda"] for row in chosen["tried"]} == {0.35}


@pytest.fixture
def user_file(corpus, teacher_probs, tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Rows of three tokens each, out of order, and one empty row."""
    kept, ids = teacher_probs.topk(3)
    lengths = torch.full((len(kept),), 3)
    lengths[5] = 0
    real = torch.repeat_interleave(lengths > 0, 3)
    stream = corpus.split("train")
    arrays = {
        "indptr": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        "token_ids": ids.flip(1).flatten()[real].int(),
        "probs": (kept / kept.sum(1, keepdim=True)).flip(1).flatten()[real].float(),
        "label": torch.from_numpy(stream.read(1, len(stream))),
    }
    save_file(arrays, tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors", arrays


def test_rows_of_a_users_file(tiny, user_file, tmp_path):
    path, arrays = user_file
    store = make(tmp_path / "out", tiny, source="file", file=path, block_size=BLOCK)
    rows = store.gather(np.arange(len(store))).targets
    for name in ("indptr", "token_ids", "probs"):
        assert torch.equal(getattr(rows, name), arrays[name])
    assert rows.dropped_mass is None
    assert store.block_size == BLOCK


def wrong_label(arrays):
    arrays["label"][7] += 1


def one_row_more(arrays):
    arrays["indptr"] = torch.cat([arrays["indptr"], arrays["indptr"][-1:]])


def no_sum(arrays):
    arrays["probs"][30] *= 0.5


def no_token(arrays):
    arrays["token_ids"][30] = VOCAB


def falling(arrays):
    arrays["indptr"][20] = 0


def doubles(arrays):
    arrays["probs"] = arrays["probs"].double()


def no_labels(arrays):
    del arrays["label"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrong_label, r"1 labels are not the train tokens; at position 7 expected \d+, got \d+"),
        (one_row_more, r"indptr must have shape \[\d+\], the train split's, got \[\d+\]"),
        (no_sum, r"must sum to 1 or be empty, row 11 sums to 0\."),
        (no_token, "token ids must be from 0 to 319, got 320"),
        (falling, "indptr must rise"),
        (doubles, "probs must be torch.float32, got torch.float64"),
        (no_labels, "label must be torch.int32, got no such array"),
    ],
)
def test_a_users_file_that_does_not_fit_is_refused(tiny, user_file, tmp_path, change, message):
    path, arrays = user_file
    change(arrays)
    save_file(arrays, path)
    with pytest.raises(MemdecError, match=message):
        make(tmp_path / "out", tiny, source="file", file=path)


def test_a_file_that_is_none(tiny, tmp_path):
    with pytest.raises(MemdecError, match="cannot be read"):
        make(tmp_path / "out", tiny, source="file", file=tmp_path / "none")
    (tmp_path / "text").write_text("not arrays")
    with pytest.raises(MemdecError, match="cannot be read as safetensors"):
        make(tmp_path / "out", tiny, source="file", file=tmp_path / "text")


def test_audit_of_targets_without_and_with_a_datastore(tiny, datastore_dir, tmp_path):
    given = {"tokens": tiny / "tokens", "max_dropped_mass": 1.0, "rows": 50, "device": "cpu"}
    make(tmp_path / "teacher", tiny, source="teacher", top_m=8, block_size=BLOCK)
    assert audit(AuditConfig(targets=tmp_path / "teacher", **given)) == 0
    with pytest.raises(MemdecError, match="without a datastore: give none"):
        audit(AuditConfig(targets=tmp_path / "teacher", datastore=datastore_dir, **given))
    options = {"datastore": datastore_dir, "k": 16, "temperature": 3.0, "lmbda": 0.4}
    make(tmp_path / "mixture", tiny, source="mixture", **options)
    given["datastore"] = datastore_dir
    assert audit(AuditConfig(targets=tmp_path / "mixture", **given)) == 0


def test_killed_and_run_on_gives_the_same_bytes(tiny, datastore_dir, tmp_path):
    values = {"tokens": tiny / "tokens", "model": str(tiny / "model"), "device": "cpu"}
    values |= {"source": "mixture", "datastore": datastore_dir, "k": 16, "top_m": 8}
    for out, steps in (("whole", 0), ("killed", 6), ("killed", 9), ("killed", 0)):
        child = start(stage_in_child, "targets", values, tmp_path / out, steps)
        child.join()
        assert (child.exitcode == 0) == (steps == 0)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source": "teacher", "datastore": "d"}, "datastore does not go with source teacher"),
        ({"source": "teacher", "temperature": 1.0}, "temperature does not go with source teacher"),
        ({"source": "teacher", "model": None}, "source teacher needs model"),
        ({"source": "mixture"}, "source mixture needs datastore"),
        ({"datastore": "d", "lmbda": 0.5}, "lmbda does not go with source knn"),
        ({"source": "file"}, "source file needs file"),
        ({"source": "mixture", "datastore": "d", "lmbda": 1.5}, r"lmbda must be in \[0, 1\]"),
        ({"source": "teacher", "top_m": 0}, "top_m must be above 0"),
        ({"source": "dense"}, "source must be one of"),
    ],
)
def test_options_that_do_not_go_together(wrong, message):
    with pytest.raises(MemdecError, match=message):
        TargetsConfig(**{"tokens": "t", "model": "m", **wrong})


def test_a_teacher_that_does_not_fit(tiny, datastore_dir, tmp_path):
    with pytest.raises(MemdecError, match="top_m must be at most 320"):
        make(tmp_path / "out", tiny, source="teacher", top_m=321, block_size=BLOCK)
    with pytest.raises(MemdecError, match="block_size must be at most 64"):
        make(tmp_path / "out", tiny, source="teacher", block_size=128)
    with pytest.raises(MemdecError, match="block_size must be 32, the datastore's, got 16"):
        make(tmp_path / "out", tiny, datastore=datastore_dir, k=16, block_size=16)
    other = str(write_model(tmp_path / "model", seed=1))
    options = {"source": "mixture", "datastore": datastore_dir, "model": other}
    with pytest.raises(MemdecError, match="the datastore was made with the teacher"):
        make(tmp_path / "out", tiny, **options)
