"""Documents that share a block, isolated: each stage sees what it sees of a document alone.

What is expected is made from the tokens: cut at every separator and at every block's start, and fed
piece by piece.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from memdec.data.corpus import TokenCorpus, TokenStream
from memdec.data.datastore import Datastore, DatastoreConfig, datastore
from memdec.data.targets import TargetsConfig, TargetStore, targets
from memdec.errors import MemdecError
from memdec.evaluation.evaluate import evaluate
from memdec.evaluation.forward import label_scores
from memdec.evaluation.options import EvalConfig
from memdec.modeling.key_layer import KeyRecorder
from memdec.modeling.loading import load_model
from memdec.training.adapt import AdaptConfig, adapt
from memdec.training.distill import TrainConfig, train

VOCABULARY = 62
ISOLATED = {"isolate_documents": True}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model_dir(request: pytest.FixtureRequest, tiny, tmp_path_factory) -> str:
    """Random weights large enough for one document to change what follows in another."""
    path = tmp_path_factory.mktemp("models") / request.param
    shutil.copytree(tiny.model, path)
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}
    if request.param == "gpt2":
        config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2, **ends)
        GPT2LMHeadModel(config).save_pretrained(path)
    else:
        shape = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
        layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
        LlamaForCausalLM(
            LlamaConfig(vocab_size=64, tie_word_embeddings=True, **shape, **layers, **ends)
        ).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def corpus(tiny) -> TokenCorpus:
    return TokenCorpus.open(tiny.tokens)


def pieces(corpus: TokenCorpus, stream: TokenStream, block_size: int) -> list[tuple[int, int]]:
    """Positions [start, stop) of every document's part in every block."""
    tokens = stream.read(0, stream.positions)
    starts = np.flatnonzero(tokens == corpus.separator_id).tolist()
    bounds = sorted({*starts, *range(0, len(tokens), block_size), len(tokens)})
    return list(itertools.pairwise(bounds))


def alone(
    model: torch.nn.Module, corpus: TokenCorpus, stream: TokenStream, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and keys of every position, each piece fed by itself."""
    tokens = torch.from_numpy(stream.read(0, len(stream)).astype(np.int64))
    logits, keys = [], []
    with torch.no_grad(), KeyRecorder(model) as recorder:
        for start, stop in pieces(corpus, stream, block_size):
            logits.append(model(input_ids=tokens[None, start:stop]).logits[0])
            keys.append(recorder.keys[0])
    return torch.cat(logits), torch.cat(keys)


def test_positions_begin_again_at_documents_and_blocks(corpus, tiny):
    stream = corpus.split("train", isolate_documents=True)
    inputs = stream.inputs(tiny.block_size, 5 * tiny.block_size, 4)
    expected = np.concatenate(
        [np.arange(stop - start) for start, stop in pieces(corpus, stream, tiny.block_size)]
    )
    assert inputs["position_ids"].shape == (4, tiny.block_size)
    assert (
        inputs["position_ids"].ravel().tolist()
        == expected[tiny.block_size : 5 * tiny.block_size].tolist()
    )
    assert "position_ids" not in corpus.split("train").inputs(0, tiny.block_size)


def test_log_probs_are_those_of_each_document_alone(model_dir, corpus, tiny):
    model = load_model(model_dir)
    options = {"block_size": tiny.block_size, "batch_blocks": 3, "vocab_size": VOCABULARY}
    stream = corpus.split("test", isolate_documents=True)
    logits, _ = alone(model, corpus, stream, tiny.block_size)
    scores = logits[:, :VOCABULARY].double().log_softmax(-1)
    labels = torch.from_numpy(stream.read(1, len(stream)).astype(np.int64))
    expected = scores.gather(1, labels[:, None])[:, 0].numpy()
    np.testing.assert_allclose(
        label_scores(model, stream, **options).log_probs, expected, atol=2e-5
    )
    packed = label_scores(model, corpus.split("test"), **options).log_probs
    assert np.abs(packed - expected).max() > 1.0  # what a document does to the next one


@pytest.fixture(scope="module")
def made(model_dir, tiny, tmp_path_factory) -> dict[str, Path]:
    """An isolated datastore, and targets of each source that reads one or makes a forward pass."""
    root = tmp_path_factory.mktemp("made")
    given: dict[str, Any] = {"tokens": tiny.tokens, "device": "cpu", "model": model_dir} | ISOLATED
    datastore(DatastoreConfig(block_size=tiny.block_size, **given), root / "datastore")
    store = {"datastore": root / "datastore", "k": 16}
    targets(TargetsConfig(**store, **given), root / "knn")
    mine = {"source": "teacher", "top_m": VOCABULARY, "block_size": tiny.block_size}
    targets(TargetsConfig(**mine, **given), root / "teacher")
    return {name: root / name for name in ("datastore", "knn", "teacher")}


def test_keys_are_those_of_each_document_alone(made, model_dir, corpus, tiny):
    stream = corpus.split("train")
    _, keys = alone(load_model(model_dir), corpus, stream, tiny.block_size)
    store = Datastore.open(made["datastore"])
    found = torch.from_numpy(store.keys(0, store.size))
    torch.testing.assert_close(found, keys.half(), rtol=2e-3, atol=1e-3)


def test_keys_that_are_not_kept_are_the_same(made, model_dir, corpus, tiny, tmp_path):
    pytest.importorskip("faiss")
    given = {"tokens": tiny.tokens, "device": "cpu", "model": model_dir} | ISOLATED
    index = {"index": "IVF4,SQfp16", "keep_keys": False, "block_size": tiny.block_size}
    datastore(DatastoreConfig(**index, **given), tmp_path / "index")
    store = Datastore.open(tmp_path / "index").with_keys_of(model_dir, corpus)
    kept = Datastore.open(made["datastore"])
    assert np.array_equal(store.keys(0, store.size), kept.keys(0, kept.size))


def test_the_teachers_rows_are_those_of_each_document_alone(made, model_dir, corpus, tiny):
    stream = corpus.split("train")
    logits, _ = alone(load_model(model_dir), corpus, stream, tiny.block_size)
    rows = TargetStore.open(made["teacher"]).gather(np.arange(stream.positions)).targets
    expected = logits[:, :VOCABULARY].double().softmax(-1)
    torch.testing.assert_close(rows.to_dense(VOCABULARY).double(), expected, rtol=1e-4, atol=1e-6)


def test_the_calibration_sees_documents_alone(made, model_dir, corpus, tiny):
    chosen = TargetStore.open(made["knn"]).artefact.manifest["calibration"]
    stream = corpus.split("validation", isolate_documents=True)
    scores = label_scores(
        load_model(model_dir),
        stream,
        block_size=tiny.block_size,
        batch_blocks=4,
        vocab_size=VOCABULARY,
    ).log_probs
    assert chosen["positions"] == stream.positions
    assert chosen["teacher_nll"] == pytest.approx(-scores.mean(dtype=float), rel=1e-5)


@pytest.fixture(scope="module")
def train_config(made, model_dir, tiny) -> TrainConfig:
    return TrainConfig(
        tokens=tiny.tokens,
        targets=made["knn"],
        base=model_dir,
        teacher=model_dir,
        epochs=1,
        learning_rate=1e-3,
        device="cpu",
        **ISOLATED,
    )


def test_adapting_training_and_evaluating(made, train_config, model_dir, corpus, tiny, tmp_path):
    given = {"tokens": tiny.tokens, "block_size": tiny.block_size, "device": "cpu", **ISOLATED}
    adapt(AdaptConfig(model=model_dir, epochs=1, **given), tmp_path / "adapt")
    train(train_config, tmp_path / "train")
    options = {"block_size": tiny.block_size, "batch_blocks": 4, "vocab_size": VOCABULARY}
    stream = corpus.split("validation", isolate_documents=True)
    base = label_scores(load_model(model_dir), stream, **options).log_probs
    np.testing.assert_allclose(np.load(tmp_path / "train" / "base.npy"), base, atol=1e-5)
    for stage, name in (("adapt", "model"), ("train", "memory")):
        best = json.loads((tmp_path / stage / "manifest.json").read_text())["best"]
        trained = label_scores(load_model(tmp_path / stage / name), stream, **options).log_probs
        assert best["nll"] == pytest.approx(-trained.mean(dtype=float), rel=1e-5)
        assert best["nll"] < -base.mean(dtype=float)
    memory = str(tmp_path / "train" / "memory")
    stores = {"datastore": made["datastore"], "targets": made["knn"]}
    config = EvalConfig(base=model_dir, memory=memory, bootstrap=20, **stores, **given)
    evaluate(config, tmp_path / "eval")
    test = corpus.split("test", isolate_documents=True)
    found = np.load(tmp_path / "eval" / "scores" / "test-base.npy")
    np.testing.assert_allclose(
        found, label_scores(load_model(model_dir), test, **options).log_probs, atol=1e-5
    )
    for directory in (*made.values(), *(tmp_path / name for name in ("adapt", "train", "eval"))):
        params = json.loads((directory / "manifest.json").read_text())["params"]
        assert params["isolate_documents"] is True


def test_results_of_the_other_setting_are_refused(made, train_config, model_dir, tiny, tmp_path):
    differs = r"was made with option isolate_documents = {}, this run has {}; stages that read"
    given: dict[str, Any] = {"tokens": tiny.tokens, "device": "cpu"}
    knn = {"model": model_dir, "datastore": made["datastore"], "k": 16}
    with pytest.raises(MemdecError, match="datastore " + differs.format(True, False)):
        targets(TargetsConfig(**knn, **given), tmp_path / "out")
    with pytest.raises(MemdecError, match="knn " + differs.format(True, False)):
        train(dataclasses.replace(train_config, isolate_documents=False), tmp_path / "out")
    both = {"base": model_dir, "memory": model_dir, "block_size": tiny.block_size, **given}
    stores = {"datastore": made["datastore"], "targets": made["knn"]}
    with pytest.raises(MemdecError, match="datastore " + differs.format(True, False)):
        evaluate(EvalConfig(**both, **stores), tmp_path / "out")
    # And what was made without, as it always was.
    knn = {"model": tiny.model, "datastore": tiny.datastore, "k": 16}
    with pytest.raises(MemdecError, match="datastore " + differs.format(False, True)):
        targets(TargetsConfig(**knn, **given, **ISOLATED), tmp_path / "out")
    packed = {"targets": tiny.targets, "teacher": tiny.model, "base": tiny.model}
    with pytest.raises(MemdecError, match="targets " + differs.format(False, True)):
        train(dataclasses.replace(train_config, **packed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_manifests_of_documents_that_share_a_block_do_not_name_it(tiny):
    for directory in (tiny.datastore, tiny.targets):
        assert "isolate" not in (directory / "manifest.json").read_text()


def test_a_model_that_cannot_is_refused_before_anything_is_written(tiny, tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    shutil.copytree(tiny.model, tmp_path / "bloom")
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    given = {"tokens": tiny.tokens, "model": str(tmp_path / "bloom"), "device": "cpu"}
    given |= {"block_size": tiny.block_size, **ISOLATED}
    message = "BloomForCausalLM .*does not isolate documents that share a block"
    with pytest.raises(MemdecError, match=message):
        datastore(DatastoreConfig(**given), tmp_path / "out")
    with pytest.raises(MemdecError, match=message):
        adapt(AdaptConfig(**given), tmp_path / "out")
    with pytest.raises(MemdecError, match=message):
        targets(TargetsConfig(source="teacher", **given), tmp_path / "out")
    assert not (tmp_path / "out").exists()
