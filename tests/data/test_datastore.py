"""The stage datastore: which vectors are keys, what each is worth, and what is refused."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from data_tiny import contents, needs_faiss, run_stage, set_small_shards, write_model

from memdec.data.artefact import Artefact
from memdec.data.datastore import Datastore, DatastoreConfig, datastore
from memdec.errors import MemdecError
from memdec.modeling.loading import load_model


@pytest.fixture
def options(tiny):
    return {
        "model": str(tiny / "model"),
        "tokens": tiny / "tokens",
        "block_size": 32,
        "device": "cpu",
    }


@pytest.fixture(scope="session")
def store(datastore_dir):
    return Datastore.open(datastore_dir)


def expected_keys(model_name: str, stream, block_size: int) -> np.ndarray:
    """What the last block normalises for its feed-forward, one block of tokens at a time."""
    model = load_model(model_name)
    seen: list[torch.Tensor] = []
    layer = model.model.layers[-1].post_attention_layernorm
    layer.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with torch.no_grad():
        for number in range(stream.blocks(block_size)):
            inputs, _ = stream.block(number, block_size)
            model(input_ids=torch.from_numpy(inputs.astype(np.int64))[None])
    return torch.cat(seen).numpy()


def test_a_key_is_the_input_of_the_last_feed_forward_within_its_block(options, corpus, store):
    stream = corpus.split("train")
    expected = expected_keys(options["model"], stream, 32)
    assert store.size == stream.positions == len(expected)
    assert store.width == 16
    assert store.block_size == 32
    assert store.key_layer == "model.layers.1.mlp"
    # Half of float16's spacing, and a little for the shape of the batch.
    np.testing.assert_allclose(store.keys(0, store.size), expected, rtol=2**-11, atol=1e-5)


def test_a_row_is_worth_the_token_that_follows(corpus, store):
    stream = corpus.split("train")
    np.testing.assert_array_equal(store.next_tokens, stream.read(1, len(stream)))
    ids = np.array([[3, -1], [store.size - 1, 0]])
    tokens = store.neighbor_tokens(ids)
    assert tokens.dtype == np.int32
    assert tokens[0, 1] == -1
    assert tokens[1, 0] == stream.read(len(stream) - 1, len(stream))[0]


def test_a_key_finds_itself_unless_it_is_left_out(store):
    own = np.arange(0, store.size, 50)
    keys = store.keys(0, store.size)[own]
    distances, ids = store.search(keys, 3)
    twins = (store.keys(0, store.size)[ids[:, 0]] == keys).all(axis=1)
    assert twins.all()
    np.testing.assert_allclose(distances[:, 0], 0, atol=1e-4)
    assert not (store.search(keys, 3, exclude=own)[1] == own[:, None]).any()


def test_shards_hold_the_same_keys(options, store, tmp_path, monkeypatch):
    set_small_shards(monkeypatch.setattr)
    datastore(DatastoreConfig(**options), tmp_path)
    cut = Datastore.open(tmp_path)
    assert cut.artefact.manifest["shards"] > 5
    np.testing.assert_allclose(
        cut.keys(0, cut.size), store.keys(0, store.size), rtol=2**-10, atol=1e-5
    )
    np.testing.assert_array_equal(
        cut.keys(150, 170), np.concatenate([cut.keys(150, 160), cut.keys(160, 170)])
    )


@needs_faiss
def test_two_runs_write_the_same_bytes(options, tmp_path):
    for name in ("a", "b"):
        datastore(DatastoreConfig(**options, index="IVF8,Flat"), tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@needs_faiss
def test_a_faiss_index_searches_the_same_keys(options, store, tmp_path):
    datastore(DatastoreConfig(**options, index="IVF8,Flat", nprobe=8), tmp_path)
    indexed = Datastore.open(tmp_path)
    own = np.arange(0, store.size, 9)
    keys = store.keys(0, store.size)[own]
    distances, _ = indexed.search(keys, 20, exclude=own)
    np.testing.assert_allclose(distances, store.search(keys, 20, exclude=own)[0], atol=1e-3)


def test_another_key_layer_can_be_named(options, store, tmp_path):
    artefact = datastore(DatastoreConfig(**options, key_layer="model.layers.0.mlp"), tmp_path)
    assert artefact.manifest["key_layer"] == "model.layers.0.mlp"
    assert not np.allclose(Datastore.open(tmp_path).keys(0, 50), store.keys(0, 50), atol=0.1)


def test_a_layer_that_is_not_there_is_refused_with_what_is(options, tmp_path):
    with pytest.raises(MemdecError, match=r"no key layer 'h\.9\.mlp'.*model\.layers\.1\.mlp"):
        datastore(DatastoreConfig(**options, key_layer="h.9.mlp"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_corpus_shorter_than_one_block(options, corpus, tmp_path):
    positions = corpus.split("train").positions
    options = {**options, "block_size": positions + 1}
    with pytest.raises(MemdecError, match=f"has {positions} positions, shorter than one block of"):
        datastore(DatastoreConfig(**options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_blocks_longer_than_the_context(options, tmp_path):
    with pytest.raises(MemdecError, match="block_size must be at most 64"):
        datastore(DatastoreConfig(**{**options, "block_size": 65}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_model_and_missing_tokens(options, tmp_path):
    missing = str(tmp_path / "no" / "model")
    with pytest.raises(MemdecError, match=f"no model at {missing}"):
        datastore(DatastoreConfig(**{**options, "model": missing}), tmp_path / "out")
    with pytest.raises(MemdecError, match=r"expected a directory of tokens at .*, which is none"):
        datastore(DatastoreConfig(**{**options, "tokens": tmp_path}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_refused_with_the_first_difference(options, tiny, tmp_path):
    write_model(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    parts = json.loads(path.read_text())
    vocabulary = parts["model"]["vocab"]
    by_id = {token_id: token for token, token_id in vocabulary.items()}
    vocabulary[by_id[40]], vocabulary[by_id[41]] = 41, 40
    path.write_text(json.dumps(parts))
    with pytest.raises(
        MemdecError, match=r"tokenizers of the tokens and the teacher differ: id 40"
    ):
        datastore(
            DatastoreConfig(**{**options, "model": str(tmp_path / "model")}), tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_a_model_with_too_few_tokens(options, tmp_path):
    write_model(tmp_path / "model", vocab_size=300)
    with pytest.raises(MemdecError, match=r"at least the tokenizer's 320 tokens.* has 300"):
        datastore(
            DatastoreConfig(**{**options, "model": str(tmp_path / "model")}), tmp_path / "out"
        )


def test_keys_that_float16_cannot_hold(options, tmp_path):
    write_model(tmp_path / "model")
    model = load_model(str(tmp_path / "model"))
    with torch.no_grad():
        model.model.layers[-1].post_attention_layernorm.weight.fill_(1e6)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(MemdecError, match=r"input of model\.layers\.1\.mlp does not fit float16"):
        datastore(
            DatastoreConfig(**{**options, "model": str(tmp_path / "model")}), tmp_path / "out"
        )


def test_another_model_in_the_same_directory_is_refused_with_two_fingerprints(options, tmp_path):
    first = datastore(DatastoreConfig(**options), tmp_path / "out").manifest["inputs"]["model"]
    write_model(tmp_path / "model", seed=1)
    with pytest.raises(MemdecError) as refused:
        datastore(
            DatastoreConfig(**{**options, "model": str(tmp_path / "model")}), tmp_path / "out"
        )
    found = re.search(r"input model = (\w{12}), this run has (\w{12})", str(refused.value))
    assert found
    assert found[1] == first[:12] != found[2]


@needs_faiss
def test_an_index_that_faiss_does_not_know_leaves_nothing(options, tmp_path):
    with pytest.raises(MemdecError, match="FAISS makes no index of width 16 from 'Tree9'"):
        datastore(DatastoreConfig(**options, index="Tree9"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stage_that_is_done_says_so_and_loads_no_model(
    options, datastore_dir, capsys, monkeypatch
):
    before = contents(datastore_dir)
    monkeypatch.setattr("memdec.modeling.loading.load_model", None)
    run_stage("datastore", options, datastore_dir)
    assert "datastore: already done in" in capsys.readouterr().err
    assert contents(datastore_dir) == before


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one(store, k):
    with pytest.raises(MemdecError, match=rf"k must be in \[1, {store.size}\]"):
        store.search(store.keys(0, 2), k)


def test_k_above_the_size(store):
    assert store.search(store.keys(0, 2), store.size)[1].shape == (2, store.size)
    with pytest.raises(MemdecError, match=rf"\(the datastore's size\), got {store.size + 1}"):
        store.search(store.keys(0, 2), store.size + 1)


def test_queries_of_another_width(store):
    with pytest.raises(MemdecError, match=r"queries must be \[n, 16\].*got \(2, 15\)"):
        store.search(np.zeros((2, 15), np.float32), 1)


def test_nothing_written_tells_the_place(datastore_dir, tiny):
    for name, content in contents(datastore_dir).items():
        assert str(tiny).encode() not in content, name
    assert Artefact.open(datastore_dir, "datastore").manifest["dtype"] == "float16"


@pytest.mark.parametrize(
    ("read", "path", "kind"),
    [
        (lambda store: store.size, "size", "an integer"),
        (lambda store: store.key_layer, "key_layer", "text"),
        (lambda store: store.block_size, "params.block_size", "an integer"),
        (lambda store: store.keys(0, 1), "shards", "an integer"),
        (lambda store: store.keeps_keys, "params.keep_keys", "true or false"),
    ],
)
def test_a_manifest_edited_by_hand_is_named(datastore_dir, tmp_path, read, path, kind):
    shutil.copytree(datastore_dir, tmp_path / "edited")
    file = tmp_path / "edited" / "manifest.json"
    manifest = json.loads(file.read_text())
    *outer, last = path.split(".")
    (manifest[outer[0]] if outer else manifest)[last] = [7]
    file.write_text(json.dumps(manifest))
    with pytest.raises(MemdecError, match=re.escape(f"{file}: {path} must be {kind}, got [7]")):
        read(Datastore.open(tmp_path / "edited"))


@pytest.mark.parametrize("name", ["block_size", "nprobe", "batch_blocks"])
def test_numbers_below_one(options, name):
    with pytest.raises(MemdecError, match=f"{name} must be above 0, got 0"):
        DatastoreConfig(**{**options, name: 0})


@needs_faiss
@pytest.mark.parametrize("shards", ["one shard", "small shards"])
def test_keys_that_are_not_kept_give_the_same_index_and_targets(
    options, tiny, corpus, tmp_path, monkeypatch, shards
):
    """Read back in other parts than they are computed in, and by audit too."""
    from memdec.data.audit import AuditConfig, audit

    if shards == "small shards":
        set_small_shards(monkeypatch.setattr)
        monkeypatch.setattr("memdec.data.build_index._KEYS_A_CHUNK", 100)
        monkeypatch.setattr("memdec.data.keys._KEYS_A_READ", 70)
    options = {**options, "index": "IVF8,SQfp16", "nprobe": 2, "batch_blocks": 3}
    common = {"tokens": tiny / "tokens", "model": str(tiny / "model"), "device": "cpu"}
    for name, kept in (("kept", True), ("forgotten", False)):
        run_stage("datastore", {**options, "keep_keys": kept}, tmp_path / name)
        values = {**common, "datastore": tmp_path / name, "k": 9, "temperature": 2.0}
        run_stage("targets", values, tmp_path / f"targets of {name}")
    kept, forgotten = contents(tmp_path / "kept"), contents(tmp_path / "forgotten")
    assert sorted(forgotten) == ["index.faiss", "manifest.json", "next_tokens.npy"]
    for name in ("index.faiss", "next_tokens.npy"):
        assert kept[name] == forgotten[name]
    rows = contents(tmp_path / "targets of kept")
    again = contents(tmp_path / "targets of forgotten")
    del rows["manifest.json"], again["manifest.json"]  # they name the datastore
    assert rows == again
    assert len(rows) > (5 if shards == "small shards" else 0)
    store = Datastore.open(tmp_path / "forgotten").with_keys_of(common["model"], corpus)
    stored = Datastore.open(tmp_path / "kept")
    for start, stop in ((0, 40), (33, 35), (700, 1000), (10, 500)):
        assert np.array_equal(store.keys(start, stop), stored.keys(start, stop))
    given = {"targets": tmp_path / "targets of forgotten", "datastore": tmp_path / "forgotten"}
    given |= {"rows": 40, "min_recall": 0.0}
    assert audit(AuditConfig(**given, **common)) == 0


@needs_faiss
def test_keys_that_are_not_kept_are_asked_for_with_the_teacher_that_made_them(
    options, tiny, corpus, tmp_path
):
    values = {**options, "index": "IVF8,SQfp16", "keep_keys": False}
    run_stage("datastore", values, tmp_path / "out")
    store = Datastore.open(tmp_path / "out")
    with pytest.raises(MemdecError, match="keeps no keys: the teacher is needed"):
        store.keys(0, 1)
    with pytest.raises(MemdecError, match="keeps no keys: give the model that made them"):
        store.with_keys_of(None, corpus)
    other = write_model(tmp_path / "model", seed=1)
    with pytest.raises(MemdecError, match=r"made with model \w{12}, this run has \w{12}"):
        store.with_keys_of(str(other), corpus)


def test_exact_search_needs_its_keys(options, tmp_path):
    with pytest.raises(MemdecError, match="index Flat searches the keys themselves: keep them"):
        run_stage("datastore", {**options, "keep_keys": False}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
