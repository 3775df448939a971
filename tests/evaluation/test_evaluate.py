from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from killed import contents, run_killed

from memdec import MemoryDecoderForCausalLM
from memdec.data.corpus import TokenCorpus
from memdec.data.datastore import Datastore
from memdec.data.targets import TargetStore
from memdec.errors import MemdecError
from memdec.evaluation.evaluate import evaluate
from memdec.evaluation.forward import LabelScores
from memdec.evaluation.gate import fit_gate, gate_lmbda
from memdec.evaluation.options import JOINT_ADAPTIVE, EvalConfig
from memdec.modeling.gate import Gate
from memdec.modeling.key_layer import KeyRecorder
from memdec.modeling.loading import load_model, load_tokenizer
from memdec.ops import fused_interpolate, knn_scatter
from memdec.training.adapt import AdaptConfig, adapt


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory) -> EvalConfig:
    root = tmp_path_factory.mktemp("models")
    options = {"tokens": tiny.tokens, "block_size": tiny.block_size, "device": "cpu"}
    adapt(AdaptConfig(model=tiny.model, learning_rate=1e-2, **options), root / "memory")
    return EvalConfig(
        base=tiny.model,
        memory=str(root / "memory" / "model"),
        datastore=tiny.datastore,
        targets=tiny.targets,
        others=(f"same={tiny.model}",),
        bootstrap=200,
        **options,
    )


@pytest.fixture(scope="module")
def evaluated(config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "eval"
    evaluate(config, out)
    return out


@pytest.fixture(scope="module")
def results(evaluated) -> dict:
    return json.loads((evaluated / "eval.json").read_text())


def rows(results: dict) -> dict[str, dict]:
    return {row["name"]: row for row in results["rows"]}


def test_every_contender_is_scored_on_the_same_tokens(results, tiny):
    assert list(rows(results)) == ["base", "kNN-LM", "memory", "joint", JOINT_ADAPTIVE, "same"]
    assert results["split"] == "test"
    assert results["positions"] == TokenCorpus.open(tiny.tokens).split("test").positions
    for row in results["rows"]:
        assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))
        assert row["interval"][0] < row["perplexity"] < row["interval"][1]
        assert row["gain_interval"][0] <= row["gain"] <= row["gain_interval"][1]
    assert rows(results)["joint"]["nll"] < rows(results)["base"]["nll"] - 0.5
    assert rows(results)["same"]["gain_interval"] == [0.0, 0.0]


def test_joint_is_what_the_pair_finds_block_by_block(config, results, tiny):
    expected = nll_of_the_pair(config, tiny, results["lmbda"]["joint"])
    assert rows(results)["joint"]["nll"] == pytest.approx(expected, rel=1e-5)


def test_the_adaptive_row_is_what_the_pair_finds_with_the_gate(config, results, tiny):
    row = rows(results)[JOINT_ADAPTIVE]
    expected = nll_of_the_pair(config, tiny, Gate.from_dict(results["gate"]))
    assert row["nll"] == pytest.approx(expected, rel=1e-5)
    assert row["parameters"] == rows(results)["joint"]["parameters"]


def nll_of_the_pair(config, tiny, lmbda: float | Gate) -> float:
    """On the test split, over the distributions that generation draws from."""
    models = load_model(config.base), load_model(config.memory)
    tokenizer = load_tokenizer(config.base)
    pair = MemoryDecoderForCausalLM.from_models(*models, lmbda=lmbda, tokenizer=tokenizer)
    stream = TokenCorpus.open(tiny.tokens).split("test")
    total = 0.0
    for number in range(stream.blocks(tiny.block_size)):
        inputs, labels = (
            torch.from_numpy(part.astype(np.int64))
            for part in stream.block(number, tiny.block_size)
        )
        with torch.no_grad():
            log_probs = pair(inputs[None]).logits[0]
        total -= log_probs[torch.arange(len(labels)), labels].double().sum().item()
    return total / stream.positions


def test_the_gate_is_fitted_on_validation(evaluated, results, tiny):
    def scores(split: str) -> list[LabelScores]:
        files = [f"{split}-base.npy", f"{split}-memory.npy"]
        folders = [evaluated / "scores", evaluated / "confidence"]
        return [LabelScores(*(np.load(folder / file) for folder in folders)) for file in files]

    corpus = TokenCorpus.open(tiny.tokens)
    gate = fit_gate(*scores("validation"), corpus.split("validation"), tiny.block_size)
    assert gate == Gate.from_dict(results["gate"])
    lmbda = gate_lmbda(gate, *scores("test"), corpus.split("test"), tiny.block_size)
    assert rows(results)[JOINT_ADAPTIVE]["lmbda"] == pytest.approx(lmbda.mean())


def test_the_knn_lm_is_the_mixture_with_dense_targets(config, results, tiny):
    stream = TokenCorpus.open(tiny.tokens).split("test")
    store, targets = Datastore.open(tiny.datastore), TargetStore.open(tiny.targets)
    model = load_model(config.base)
    lmbda = results["lmbda"]["kNN-LM"]
    total = 0.0
    for number in range(stream.blocks(tiny.block_size)):
        inputs, labels = stream.block(number, tiny.block_size)
        with torch.no_grad(), KeyRecorder(model) as recorder:
            logits = model(torch.from_numpy(inputs.astype(np.int64))[None]).logits[0, :, :62]
        distances, ids = store.search(recorder.keys[0].numpy(), targets.k)
        knn = knn_scatter(
            torch.from_numpy(distances),
            torch.from_numpy(store.neighbor_tokens(ids)),
            temperature=targets.temperature,
        ).to_dense(62)
        mixed = (1 - lmbda) * logits.double().softmax(-1) + lmbda * knn.double()
        total -= mixed[torch.arange(len(labels)), torch.from_numpy(labels).long()].log().sum()
    assert rows(results)["kNN-LM"]["nll"] == pytest.approx(
        float(total) / stream.positions, rel=1e-4
    )


def test_lmbda_is_chosen_on_validation(results):
    for name in ("joint", "kNN-LM"):
        curve = results["curves"][name]["validation"]
        finite = [math.inf if nll is None else nll for nll in curve]
        assert results["lmbda"][name] == results["curves"]["lmbda"][int(np.argmin(finite))]
        reported = results["curves"][name]["test"]
        at = results["curves"]["lmbda"].index(results["lmbda"][name])
        assert reported[at] == pytest.approx(rows(results)[name]["nll"])
        assert reported[0] == pytest.approx(rows(results)["base"]["nll"])


def test_the_frequency_buckets_hold_every_position_once(results):
    buckets = results["frequency"]
    assert sum(bucket["positions"] for bucket in buckets) == results["positions"]
    for name, row in rows(results).items():
        parts = [b["positions"] * b["nll"][name] for b in buckets if b["positions"]]
        assert sum(parts) / results["positions"] == pytest.approx(row["nll"])
    assert all(b["low"] == 0 or b["high"] is None or b["low"] <= b["high"] for b in buckets)


def test_the_passage_is_the_head_of_the_split(evaluated, results, tiny):
    passage = json.loads((evaluated / "passage.json").read_text())
    corpus = TokenCorpus.open(tiny.tokens)
    labels = corpus.split("test").read(1, 11).tolist()
    assert "".join(passage["tokens"][:10]) == corpus.tokenizer().decode(labels)
    assert all(passage["tokens"][:10])
    scores = np.load(evaluated / "scores" / "test-base.npy")
    np.testing.assert_allclose(passage["base"][:10], np.exp(scores[:10]), atol=1e-7)
    lmbda = results["lmbda"]["joint"]
    mixed = (1 - lmbda) * np.array(passage["base"]) + lmbda * np.array(passage["memory"])
    np.testing.assert_allclose(passage["joint"], mixed, atol=1e-7)


def test_sizes_and_seconds_of_each(evaluated, results, tiny):
    parameters = sum(weight.numel() for weight in load_model(tiny.model).parameters())
    by_name = rows(results)
    assert by_name["base"]["parameters"] == parameters
    assert by_name["base"]["bytes"] == 4 * parameters
    assert by_name["joint"]["parameters"] == 2 * parameters
    stored = sum((tiny.datastore / name).stat().st_size for name in ["keys/keys-00000.npy"])
    assert by_name["kNN-LM"]["bytes"] > 4 * parameters + stored
    seconds = json.loads((evaluated / "timing.json").read_text())
    assert set(by_name) <= set(seconds)
    assert seconds["joint"] == pytest.approx(seconds["base"] + seconds["memory"])


def test_the_same_request_gives_the_same_bytes_and_a_rerun_prints_the_table(
    evaluated, config, tmp_path, capsys
):
    evaluate(config, tmp_path / "eval")
    assert contents(tmp_path / "eval") == contents(evaluated)
    capsys.readouterr()
    evaluate(config, evaluated)
    printed = capsys.readouterr()
    assert "already done" in printed.err
    assert "joint" in printed.out


def test_killed_it_goes_on_with_the_contenders_that_are_left(evaluated, config, tmp_path):
    out = tmp_path / "eval"
    for moment, count in [("rename", 10), ("rename", 15), ("manifest", 1)]:
        assert run_killed(evaluate, config, out, moment, count), (moment, count)
    evaluate(config, out)
    assert contents(out) == contents(evaluated)


def test_kept_neighbours_give_the_knn_lm_its_k_and_temperature(config, results, tiny, tmp_path):
    from memdec.data.targets import TargetsConfig, targets

    given = {"tokens": tiny.tokens, "datastore": tiny.datastore, "model": tiny.model, "k": 16}
    targets(TargetsConfig(**given, keep="neighbours", device="cpu"), tmp_path / "kept")
    kept = dataclasses.replace(config, targets=tmp_path / "kept", others=())
    evaluate(kept, tmp_path / "eval")
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert rows(found)["kNN-LM"]["nll"] == rows(results)["kNN-LM"]["nll"]


def test_a_given_lmbda_is_used_and_kNN_is_optional(config, tmp_path):
    given = dataclasses.replace(
        config, lmbda=0.25, datastore=None, targets=None, others=(), positions=100
    )
    evaluate(given, tmp_path / "eval")
    results = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert results["lmbda"] == {"joint": 0.25}
    assert list(rows(results)) == ["base", "memory", "joint", JOINT_ADAPTIVE]
    assert results["positions"] == 128  # whole blocks of 32


def test_a_knn_lm_that_gives_a_label_no_mass_is_infinite_not_a_crash(config, tmp_path):
    evaluate(dataclasses.replace(config, lmbda=1.0, others=()), tmp_path / "eval")
    results = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert rows(results)["kNN-LM"]["nll"] is None
    assert rows(results)["joint"]["nll"] == pytest.approx(rows(results)["memory"]["nll"])


def test_a_datastore_of_another_teacher_is_refused(config, tmp_path):
    other = dataclasses.replace(config, teacher=config.memory)
    with pytest.raises(MemdecError, match=r"datastore was made with model \w{12}, this run has"):
        evaluate(other, tmp_path / "eval")
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lmbda": 1.5}, r"lmbda must be in \[0, 1\], got 1.5"),
        ({"targets": None}, "needs both datastore and targets"),
        ({"others": ("joint=x",)}, "names of their own, got 'joint=x'"),
        ({"others": ("x",)}, "others must be NAME=PATH .*, got 'x'"),
        ({"outside": {"x": "a"}}, r"outside must be a list \[NAME=PATH, \.\.\.\], got {'x': 'a'}"),
        ({"outside": ({"x": "a"},)}, "outside must be NAME=PATH, got {'x': 'a'}"),
        ({"outside": ("x y=a",)}, "NAME of letters, digits, '_', '.' and '-', got 'x y=a'"),
        ({"outside": ("x=a", "x=b")}, "outside must be NAME=PATH with names of their own"),
        ({"outside": ("test=a",)}, "names of their own, got 'test=a'"),
        ({"bootstrap": 0}, "bootstrap must be at least 1"),
    ],
)
def test_bad_options_are_refused(changes, message, config):
    with pytest.raises(MemdecError, match=message):
        dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def elsewhere(config, tmp_path_factory) -> tuple[EvalConfig, Path]:
    """An evaluation with a short text outside the domain and one longer than the split."""
    root = tmp_path_factory.mktemp("elsewhere")
    (root / "short.txt").write_text("w1 w3 w2 w50 w9 " * 3)
    lines = [
        json.dumps({"text": f"w{number % 60} w{number % 59} w{number % 53} w7"})
        for number in range(2000)
    ]
    (root / "long.jsonl").write_text("\n".join(lines))
    outside = (f"short={root / 'short.txt'}", f"long={root / 'long.jsonl'}")
    given = dataclasses.replace(config, others=(), outside=outside)
    evaluate(given, root / "eval")
    return given, root / "eval"


def test_a_text_outside_the_domain_is_scored_like_the_split(elsewhere, results):
    config, out = elsewhere
    found = json.loads((out / "eval.json").read_text())
    corpus = TokenCorpus.open(config.tokens)
    text = "w1 w3 w2 w50 w9 " * 3
    separator = corpus.separator_id
    ids = [separator, *corpus.tokenizer()(text)["input_ids"], separator]
    assert found["outside"]["short"]["positions"] == len(ids) - 1
    assert found["outside"]["long"]["positions"] == found["positions"]  # and no more
    logits = []
    for name in (config.base, config.memory):
        model = load_model(name)
        with torch.no_grad():
            blocks = torch.tensor(ids[:-1]).split(config.block_size)
            logits.append(torch.cat([model(block[None]).logits[0] for block in blocks]))
    labels = torch.tensor(ids[1:])
    for name, lmbda in (("base", 0.0), ("memory", 1.0), ("joint", found["lmbda"]["joint"])):
        mixed = fused_interpolate(*logits, lmbda, vocab_size=corpus.vocab_size)
        expected = -mixed[torch.arange(len(labels)), labels].mean()
        row = rows(found)[name]["outside"]["short"]
        assert row["nll"] == pytest.approx(float(expected), rel=1e-4)
        assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))
    for name, row in rows(found).items():
        assert set(row["outside"]) == {"short", "long"}
        inside = {key: value for key, value in row.items() if key != "outside"}
        before = rows(results)[name]
        assert inside == {key: before[key] for key in inside}  # nothing else changes
        assert before["outside"] == {}


def test_another_text_outside_the_domain_is_another_evaluation(elsewhere, tmp_path):
    config, out = elsewhere
    (tmp_path / "other.txt").write_text("w5 w4 w3")
    other = dataclasses.replace(config, outside=(f"short={tmp_path / 'other.txt'}",))
    with pytest.raises(MemdecError, match="was made with input outside-"):
        evaluate(other, out)
    (tmp_path / "other.txt").write_text(" ")
    with pytest.raises(MemdecError, match=r"other.txt holds no text"):
        evaluate(other, tmp_path / "eval")
    gone = dataclasses.replace(config, outside=("gone=nowhere",))
    with pytest.raises(MemdecError, match="found none at nowhere"):
        evaluate(gone, tmp_path / "eval")


def test_no_hyphen_in_a_name_confuses_texts_and_models(config, tmp_path):
    """memory on t-x is not x-memory on t; the first is read back when the run goes on."""
    (tmp_path / "t.txt").write_text("w1 w3 w2")
    (tmp_path / "t-x.txt").write_text("w5 w7 w1 w5 w4")
    given = dataclasses.replace(
        config,
        others=(f"x-memory={config.memory}",),
        outside=(f"t={tmp_path / 't.txt'}", f"t-x={tmp_path / 't-x.txt'}"),
        datastore=None,
        targets=None,
    )
    evaluate(given, tmp_path / "eval")
    found = sorted(tmp_path.glob("eval/scores/**/*.npy"))
    assert len(found) == (2 + 2) * 3
    sizes = {str(file.relative_to(tmp_path)): len(np.load(file)) for file in found}
    assert sizes["eval/scores/outside-t/x-memory.npy"] == 4
    assert sizes["eval/scores/outside-t-x/memory.npy"] == 6


def test_a_base_that_gives_next_to_nothing_has_results(config, tmp_path):
    model = load_model(config.base)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1e6)
    model.save_pretrained(tmp_path / "base")
    given = dataclasses.replace(config, base=str(tmp_path / "base"), datastore=None, targets=None)
    evaluate(given, tmp_path / "eval")
    by_name = rows(json.loads((tmp_path / "eval" / "eval.json").read_text()))
    assert by_name["base"]["perplexity"] is None
    assert by_name["memory"]["tail_gain"] is None


def test_what_happens_to_rare_tokens_and_to_function_words(evaluated, results, tiny):
    by_name = rows(results)
    assert by_name["base"]["tail_gain"] == by_name["same"]["tail_gain"] == 1
    corpus = TokenCorpus.open(tiny.tokens)
    labels = corpus.split("test").read(1, results["positions"] + 1)
    scores = {n: np.load(evaluated / "scores" / f"test-{n}.npy") for n in ("base", "memory")}
    change = scores["memory"] - scores["base"]
    train = corpus.split("train")
    counts = np.bincount(train.read(0, len(train)), minlength=corpus.vocab_size)[labels]
    rarest = np.argsort(counts, kind="stable")[: len(labels) // 10]
    assert by_name["memory"]["tail_gain"] == pytest.approx(
        np.exp(np.median(change[rarest])), rel=1e-5
    )
    # The tokenizer has whole words without their space: no function word is known.
    assert {row["function_words"] for row in results["rows"]} == {None}
