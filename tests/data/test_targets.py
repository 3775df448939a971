"""The stage targets: each row against a float64 oracle, and rows that stay with their positions."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from data_tiny import (
    contents,
    documents,
    needs_faiss,
    run_stage,
    set_small_shards,
    write_corpus,
    write_model,
)

from memdec.data.datastore import Datastore
from memdec.data.targets import TargetsConfig, TargetStore, targets
from memdec.errors import MemdecError

VOCAB = 320
TEMPERATURE = 3.0


@pytest.fixture
def options(tiny, datastore_dir):
    return {"datastore": datastore_dir, "tokens": tiny / "tokens", "k": 16, "device": "cpu"}


@pytest.fixture(scope="session")
def made(tiny, datastore_dir, tmp_path_factory):
    """Targets in several shards, with k = 16 and a given temperature."""
    out = tmp_path_factory.mktemp("targets")
    with pytest.MonkeyPatch.context() as patch:
        set_small_shards(patch.setattr)
        config = TargetsConfig(
            datastore=datastore_dir,
            tokens=tiny / "tokens",
            k=16,
            temperature=TEMPERATURE,
            device="cpu",
        )
        targets(config, out)
    return TargetStore.open(out)


def oracle(store: Datastore, k: int, temperature: float) -> np.ndarray:
    """Dense float64 targets: all distances, self left out, equal distances by id."""
    keys = store.keys(0, store.size).astype(np.float64)
    squares = np.square(keys).sum(1)
    distances = squares[:, None] + squares[None] - 2 * keys @ keys.T
    np.fill_diagonal(distances, np.inf)
    dense = np.zeros((store.size, VOCAB))
    for row, order in enumerate(np.argsort(distances.round(9), axis=1, kind="stable")[:, :k]):
        weights = np.exp(-(distances[row, order] - distances[row, order[0]]) / temperature)
        np.add.at(dense[row], store.next_tokens[order], weights / weights.sum())
    return dense


def test_every_row_is_the_distribution_of_its_neighbours(made, datastore_dir):
    store = Datastore.open(datastore_dir)
    rows = made.gather(np.arange(len(made)))
    assert len(made) == store.size
    np.testing.assert_allclose(
        rows.targets.to_dense(VOCAB).numpy(), oracle(store, 16, TEMPERATURE), atol=1e-4
    )


def test_rows_carry_the_position_and_the_label_they_belong_to(made, corpus):
    positions = np.random.default_rng(0).permutation(len(made))
    rows = made.gather(positions)
    stream = corpus.split("train")
    assert rows.positions.tolist() == positions.tolist()
    assert rows.labels.tolist() == stream.read(1, len(stream))[positions].tolist()
    assert rows.positions.dtype == rows.labels.dtype == torch.int64


def test_gathered_rows_do_not_depend_on_the_order_asked_for(made):
    everything = made.gather(np.arange(len(made))).targets.to_dense(VOCAB)
    positions = np.array([130, 5, 127, 128, 5, len(made) - 1, 0])  # both sides of a shard's edge
    rows = made.gather(positions)
    assert torch.equal(rows.targets.validate(VOCAB).to_dense(VOCAB), everything[positions])
    assert made.artefact.manifest["shards"] > 5


def test_no_row_and_rows_that_are_not_there(made):
    rows = made.gather(np.empty(0, np.int64))
    assert len(rows.targets) == 0
    assert rows.targets.indptr.tolist() == [0]
    for wrong in (-1, len(made)):
        with pytest.raises(IndexError, match=r"positions must be in \[0"):
            made.gather(np.array([0, wrong]))


def test_shards_are_plain_safetensors(made):
    from safetensors.torch import load_file

    shard = load_file(made.artefact.file("targets/targets-00001.safetensors"))
    dtypes = {name: tensor.dtype for name, tensor in shard.items()}
    assert dtypes == {
        "indptr": torch.int64,
        "token_ids": torch.int32,
        "probs": torch.float32,
        "position": torch.int64,
        "label": torch.int32,
    }
    assert shard["position"].tolist() == list(range(128, 256))
    assert len(shard["token_ids"]) == shard["indptr"][-1]  # no spare slot on disk


def test_one_shard_or_many_hold_the_same_rows(options, made, tmp_path):
    targets(TargetsConfig(**options, temperature=TEMPERATURE), tmp_path)
    whole = TargetStore.open(tmp_path)
    assert whole.artefact.manifest["shards"] == 1
    positions = np.arange(len(made))
    torch.testing.assert_close(
        whole.gather(positions).targets.to_dense(VOCAB),
        made.gather(positions).targets.to_dense(VOCAB),
        rtol=0,
        atol=1e-5,
    )


def test_max_entries_keeps_the_most_probable(options, made, tmp_path):
    config = TargetsConfig(**options, temperature=TEMPERATURE, max_entries=3)
    manifest = targets(config, tmp_path).manifest
    positions = np.array([700, 3, 44])
    cut = TargetStore.open(tmp_path).gather(positions).targets
    dense = made.gather(positions).targets.to_dense(VOCAB)
    kept, ids = dense.topk(3)
    assert (cut.indptr.diff() <= 3).all()
    torch.testing.assert_close(cut.dropped_mass, 1 - kept.sum(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        cut.to_dense(VOCAB).gather(1, ids), kept / kept.sum(1, keepdim=True), rtol=0, atol=1e-5
    )
    assert 0 < manifest["mean_dropped_mass"] < 1
    assert manifest["entries"] <= 3 * len(made)


def test_a_temperature_is_chosen_on_validation_and_recorded(options, tiny, tmp_path):
    config = TargetsConfig(**options, model=str(tiny / "model"), calibration_positions=100)
    manifest = targets(config, tmp_path).manifest
    chosen = manifest["calibration"]
    assert TargetStore.open(tmp_path).temperature == manifest["temperature"]
    assert chosen["temperature"] == manifest["temperature"]
    assert chosen["positions"] == 100
    assert chosen["nll"] == min(row["nll"] for row in chosen["tried"])
    assert chosen["nll"] <= chosen["teacher_nll"]
    assert 0 <= chosen["lmbda"] <= 1
    assert len({row["temperature"] for row in chosen["tried"]}) == len(chosen["tried"]) > 10


def test_the_chosen_temperature_predicts_validation_as_recorded(options, tiny, corpus, tmp_path):
    """The whole way again in float64: teacher, keys, search and mixture."""
    from memdec.modeling.loading import load_model

    config = TargetsConfig(**options, model=str(tiny / "model"))
    chosen = targets(config, tmp_path).manifest["calibration"]
    store = Datastore.open(options["datastore"])
    stream = corpus.split("validation")
    model = load_model(tiny / "model").double()
    seen = []
    model.model.layers[-1].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    nll = 0.0
    for number in range(stream.blocks(32)):
        inputs, labels = (torch.from_numpy(a.astype(np.int64)) for a in stream.block(number, 32))
        with torch.no_grad():
            p_teacher = model(input_ids=inputs[None]).logits[0].softmax(-1).numpy()
        for row, label in enumerate(labels.tolist()):
            query = seen[-1][0, row].numpy()
            distances = np.square(store.keys(0, store.size) - query).sum(1)
            order = np.argsort(distances, kind="stable")[:16]
            weights = np.exp(-(distances[order] - distances[order[0]]) / chosen["temperature"])
            share = weights[store.next_tokens[order] == label].sum() / weights.sum()
            lmbda = chosen["lmbda"]
            nll -= np.log((1 - lmbda) * p_teacher[row, label] + lmbda * share)
    assert chosen["positions"] == stream.positions
    assert nll / stream.positions == pytest.approx(chosen["nll"], rel=1e-4)


def test_a_given_temperature_is_not_chosen(made):
    assert made.temperature == TEMPERATURE
    assert made.artefact.manifest["calibration"] is None
    assert made.k == 16


def test_k_as_large_as_the_datastore_leaves_one_neighbour_fewer(options, tmp_path, corpus):
    size = corpus.split("train").positions
    targets(TargetsConfig(**{**options, "k": size}, temperature=1e6), tmp_path)
    # At this temperature each neighbour weighs the same: what remains is how often a token occurs
    # at the other positions.
    labels = corpus.split("train").read(1, size + 1)
    dense = TargetStore.open(tmp_path).gather(np.array([17])).targets.to_dense(VOCAB)[0].numpy()
    others = np.bincount(np.delete(labels, 17), minlength=VOCAB) / (size - 1)
    np.testing.assert_allclose(dense, others, atol=1e-5)


def test_k_larger_than_the_datastore(options, corpus, tmp_path):
    size = corpus.split("train").positions
    message = f"k must be at most {size}, the datastore's size, got {size + 1}"
    with pytest.raises(MemdecError, match=message):
        targets(TargetsConfig(**{**options, "k": size + 1}, temperature=1.0), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_faiss
def test_an_index_that_finds_too_few_neighbours(options, tiny, tmp_path):
    """FAISS answers -1 where its lists run dry; such a neighbour has no token and no weight."""
    values = {"model": str(tiny / "model"), "tokens": tiny / "tokens", "block_size": 32}
    values |= {"index": "IVF64,Flat", "nprobe": 1, "device": "cpu"}
    run_stage("datastore", values, tmp_path / "datastore")
    store = Datastore.open(tmp_path / "datastore")
    own = np.arange(store.size)
    missing = store.search(store.keys(0, store.size), 100, exclude=own)[1] < 0
    assert missing.any()
    options = {**options, "datastore": tmp_path / "datastore", "k": 100}
    targets(TargetsConfig(**options, temperature=1.0), tmp_path / "out")
    rows = TargetStore.open(tmp_path / "out").gather(own).targets.validate(VOCAB)
    sums = rows.to_dense(VOCAB).sum(1)
    empty = torch.from_numpy(missing.all(axis=1))
    torch.testing.assert_close(sums, (~empty).float(), rtol=0, atol=1e-5)
    assert torch.equal(rows.indptr.diff() == 0, empty)


def test_contexts_longer_than_what_a_key_has_seen(options, tmp_path):
    """Nothing is gained by them, and a million tokens a row would fill the memory."""
    config = TargetsConfig(**options, temperature=1.0, drop_same_context=33)
    with pytest.raises(MemdecError, match="drop_same_context must be at most 32"):
        targets(config, tmp_path / "out")


def test_two_runs_write_the_same_bytes(options, tiny, tmp_path):
    for name in ("a", "b"):
        targets(TargetsConfig(**options, model=str(tiny / "model")), tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    for name, content in contents(tmp_path / "a").items():
        assert str(tiny).encode() not in content, name


def test_a_datastore_of_other_tokens_is_refused_with_two_fingerprints(options, tiny, tmp_path):
    write_corpus(tmp_path / "corpus", documents(20, seed=9))
    values = {"tokenizer": str(tiny / "model"), "corpus": tmp_path / "corpus"}
    run_stage("prepare", values, tmp_path / "tokens")
    with pytest.raises(MemdecError) as refused:
        targets(
            TargetsConfig(**{**options, "tokens": tmp_path / "tokens"}, temperature=1.0),
            tmp_path / "out",
        )
    assert re.search(r"was made with tokens \w{12}, .*tokens has \w{12}", str(refused.value))
    assert not (tmp_path / "out").exists()


def test_a_datastore_of_another_teacher_is_refused_with_two_fingerprints(options, tmp_path):
    write_model(tmp_path / "model", seed=1)
    with pytest.raises(MemdecError, match=r"made with the teacher \w{12}, .*model has \w{12}"):
        targets(TargetsConfig(**options, model=str(tmp_path / "model")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_options_in_the_same_directory_are_refused(options, tmp_path):
    targets(TargetsConfig(**options, temperature=1.0), tmp_path)
    with pytest.raises(MemdecError, match=r"option temperature = 1\.0, this run has 2\.0"):
        targets(TargetsConfig(**options, temperature=2.0), tmp_path)


def test_a_stage_that_is_done_says_so(options, tmp_path, capsys):
    config = TargetsConfig(**options, temperature=1.0)
    targets(config, tmp_path)
    before = contents(tmp_path)
    targets(config, tmp_path)
    assert "targets: already done in" in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": 0}, "k must be above 0"),
        ({"temperature": 0.0}, "temperature must be from 1e-30 to 1e30, got 0.0"),
        ({"temperature": float("inf")}, "temperature must be from 1e-30"),
        ({"max_entries": 0}, "max_entries must be above 0"),
        ({"calibration_positions": 0}, "calibration_positions must be above 0"),
        ({"temperature": None}, "give the model"),
    ],
)
def test_bad_options(options, wrong, message):
    with pytest.raises(MemdecError, match=message):
        TargetsConfig(**{**options, "temperature": 1.0, **wrong})
