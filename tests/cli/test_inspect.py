"""``memdec inspect``: the numbers are the models', the page is safe, bad requests are refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from memdec import MemoryDecoderForCausalLM
from memdec.cli import make_app
from memdec.data.corpus import TokenCorpus
from memdec.evaluation.evaluate import evaluate
from memdec.evaluation.inspection import Inspection
from memdec.evaluation.options import EvalConfig
from memdec.modeling.gate import Gate
from memdec.modeling.loading import load_model, load_tokenizer
from memdec.report.inspection import write_inspection
from memdec.training.adapt import AdaptConfig, adapt

VOCABULARY = 62
TEXT = "w3 w10 w17 w24 w31 nonsense w5"


@pytest.fixture(scope="module")
def build(tiny, tmp_path_factory) -> Path:
    """A directory as `build` makes them: train with its memory, and eval beside it."""
    root = tmp_path_factory.mktemp("build")
    options = {"tokens": tiny.tokens, "block_size": tiny.block_size, "device": "cpu"}
    adapt(AdaptConfig(model=tiny.model, learning_rate=3e-3, epochs=1, **options), root / "adapt")
    memory = root / "train" / "memory"
    shutil.copytree(root / "adapt" / "model", memory)
    (root / "train" / "manifest.json").write_text(json.dumps({"best": {"lmbda": 0.6}}))
    stages = {"datastore": tiny.datastore, "targets": tiny.targets}
    evaluate(
        EvalConfig(base=tiny.model, memory=str(memory), bootstrap=50, **stages, **options),
        root / "eval",
    )
    return root


@pytest.fixture
def inspect(memdec, tiny, build, tmp_path):
    """Runs the command on the tiny models; gives the result, and what it wrote as JSON."""

    def run(*arguments: object, text: str | None = TEXT, **replaced: object) -> tuple[Any, dict]:
        given = {"base": tiny.model, "memory": build / "train", "device": "cpu"} | replaced
        flags = [part for name, value in given.items() for part in (f"--{name}", value)]
        flags += [] if text is None else ["--text", text]
        path = tmp_path / "numbers.json"
        result = memdec("inspect", *flags, "--json", path, *arguments)
        return result, json.loads(path.read_text()) if result.exit_code == 0 else {}

    return run


def encode(tiny, text: str) -> list[int]:
    """With the separator before the text."""
    return [0, *load_tokenizer(tiny.model)(text).input_ids]


def expected_scores(model: Any, ids: list[int]) -> np.ndarray:
    """Log-probabilities of ids[1:] in one pass, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0, :, :VOCABULARY].double()
    return logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]].numpy()


def test_the_numbers_are_those_of_the_models(inspect, tiny, build):
    result, found = inspect("--lmbda", 0.3)
    assert result.exit_code == 0, result.output
    ids = encode(tiny, TEXT)
    assert found["ids"] == ids[1:]
    assert "".join(found["tokens"]) == load_tokenizer(tiny.model).decode(ids[1:])
    base = expected_scores(load_model(tiny.model), ids)
    memory = expected_scores(load_model(build / "train" / "memory"), ids)
    joint = np.log(0.7 * np.exp(base) + 0.3 * np.exp(memory))
    expected = {"base": base, "memory": memory, "joint": joint}
    assert list(found["log_probs"]) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found["log_probs"][name], values, rtol=1e-5)
        assert found["perplexity"][name] == pytest.approx(np.exp(-values.mean()), rel=1e-5)
        assert f"{name} {np.exp(-values.mean()):.2f}" in result.stdout
    assert found["lmbda"] == [0.3] * len(base)


def test_the_table_has_a_row_for_each_token(inspect):
    result, found = inspect()
    rows = re.findall(r"^ *(\d+) +(\S+) .* ([+-]\d\.\d\d) *$", result.stdout, flags=re.MULTILINE)
    change = np.subtract(found["log_probs"]["joint"], found["log_probs"]["base"])
    assert [int(row[0]) for row in rows] == list(range(len(change)))
    assert [row[1].strip("␣") for row in rows] == [token.strip() for token in found["tokens"]]
    np.testing.assert_allclose([float(row[2]) for row in rows], change, atol=0.0051)


def test_one_token_is_not_called_several(inspect):
    assert "Perplexity of this token: base " in inspect(text="w3")[0].stdout


def test_lmbda_is_the_trainings_then_the_evaluations(inspect, build):
    assert set(inspect()[1]["lmbda"]) == {0.6}
    chosen = json.loads((build / "eval" / "eval.json").read_text())["lmbda"]["joint"]
    assert set(inspect("--evaluation", build / "eval")[1]["lmbda"]) == {chosen}


@pytest.mark.parametrize("block", [(), ("--block-size", 4, "--stride", 2)])
def test_adaptive_takes_the_gate_beside_the_training(inspect, tiny, build, block):
    result, found = inspect("--lmbda", "adaptive", *block)
    assert "mean lmbda" in result.stdout
    assert len(set(found["lmbda"])) == len(found["lmbda"])
    gate = Gate.from_dict(json.loads((build / "eval" / "eval.json").read_text())["gate"])
    joint = MemoryDecoderForCausalLM.from_models(
        load_model(tiny.model),
        load_model(build / "train" / "memory"),
        lmbda=gate,
        tokenizer=load_tokenizer(tiny.model),
    )
    ids = torch.tensor(encode(tiny, TEXT))
    pieces = [(0, 0, 7)] if block == () else [(0, 0, 4), (2, 4, 6), (4, 6, 7)]
    expected = []
    with torch.no_grad():
        for start, first, stop in pieces:
            logits = joint(ids[None, start:stop]).logits[0]
            labels = ids[start + 1 : stop + 1]
            expected += logits[torch.arange(len(labels)), labels][first - start :].tolist()
    np.testing.assert_allclose(found["log_probs"]["joint"], expected, rtol=1e-4)


def test_what_made_the_memory_is_found_from_inside_its_directory(inspect, build, monkeypatch):
    expected = inspect()[1], inspect("--lmbda", "adaptive")[1]
    for inside, memory in ((build / "train", "memory"), (build / "train" / "memory", ".")):
        monkeypatch.chdir(inside)
        found = (inspect(memory=memory)[1], inspect("--lmbda", "adaptive", memory=memory)[1])
        assert found == expected


@pytest.mark.parametrize("lmbda", [(), ("--lmbda", "adaptive"), ("--lmbda", 0.25)])
def test_every_column_is_the_evaluations_own(inspect, tiny, build, lmbda, tmp_path):
    """On the head of the test split, where the text starts as the stream does."""
    evaluation = build / "eval"
    given = {"datastore": tiny.datastore, "targets": tiny.targets}
    if lmbda == ("--lmbda", 0.25):
        evaluation = tmp_path / "eval"
        options = {"tokens": tiny.tokens, "block_size": tiny.block_size, "device": "cpu"}
        memory = str(build / "train" / "memory")
        config = EvalConfig(base=tiny.model, memory=memory, lmbda=0.25, **given, **options)
        evaluate(config, evaluation)
    passage = json.loads((evaluation / "passage.json").read_text())
    stream = TokenCorpus.open(tiny.tokens).split("test")
    length = min(int(stream.documents[1]) - 2, tiny.block_size)
    text = load_tokenizer(tiny.model).decode(stream.read(1, length + 1))
    _, found = inspect("--evaluation", evaluation, *lmbda, text=text, **given)
    assert list(found["log_probs"]) == ["base", "kNN-LM", "memory", "joint"]
    for name in ("base", "memory", "kNN-LM"):
        values = np.exp(found["log_probs"][name])
        np.testing.assert_allclose(values, passage[name][:length], rtol=1e-4, err_msg=name)
    if lmbda != ("--lmbda", "adaptive"):
        values = np.exp(found["log_probs"]["joint"])
        np.testing.assert_allclose(values, passage["joint"][:length], rtol=1e-4)


def test_without_an_evaluation_the_knn_lm_is_weighed_as_the_targets_were(inspect, tiny):
    given = {"datastore": tiny.datastore, "targets": tiny.targets}
    chosen = json.loads((tiny.targets / "manifest.json").read_text())["calibration"]["lmbda"]
    _, found = inspect(**given)
    _, other = inspect("--lmbda", chosen, **given)
    assert found["log_probs"]["kNN-LM"] == other["log_probs"]["kNN-LM"]


def test_a_file_and_standard_input_are_read_alike(inspect, memdec, tiny, build, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    _, expected = inspect()
    assert inspect("--file", tmp_path / "text.txt", text=None)[1] == expected
    arguments = ["--base", tiny.model, "--memory", build / "train", "--json", tmp_path / "in.json"]
    command = ["inspect", *map(str, arguments)]
    result = CliRunner().invoke(make_app("inspect"), command, input=TEXT)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "in.json").read_text()) == expected


def test_a_text_longer_than_the_window_is_read_in_overlapping_blocks(inspect, tiny):
    text = " ".join(f"w{7 * i % 60}" for i in range(149))  # the window is 64
    result, found = inspect(text=text)
    assert result.exit_code == 0, result.output
    ids = encode(tiny, text)
    model = load_model(tiny.model)
    blocks = [(0, 0, 64), (32, 64, 96), (64, 96, 128), (96, 128, 149)]
    parts = [expected_scores(model, ids[a : c + 1])[b - a :] for a, b, c in blocks]
    np.testing.assert_allclose(found["log_probs"]["base"], np.concatenate(parts), rtol=1e-4)
    _, found = inspect("--block-size", 50, "--stride", 50, text=text)
    parts = [expected_scores(model, ids[a : a + 51]) for a in (0, 50, 100)]
    np.testing.assert_allclose(found["log_probs"]["base"], np.concatenate(parts), rtol=1e-4)


def test_top_lists_the_largest_gains_and_losses(inspect, tmp_path):
    result, found = inspect("--top", 2, "--html", tmp_path / "page.html", "--lmbda", 1)
    change = np.subtract(found["log_probs"]["joint"], found["log_probs"]["base"])
    assert (change < 0).any()
    order = np.argsort(change).tolist()
    losses = [index for index in order if change[index] < 0][:2]
    expected = [*reversed(order[-2:]), *losses]
    shown = re.findall(r"^ *(\d+) +\S+ .*[+-]\d+\.\d\d *$", result.stdout, flags=re.MULTILINE)
    assert list(map(int, shown)) == expected
    page = (tmp_path / "page.html").read_text()
    assert list(map(int, re.findall(r"<tr><td>(\d+)</td>", page))) == expected
    passage = re.search(r'<p class="passage">(.*?)</p>', page, flags=re.DOTALL)[1]
    assert len(re.findall("<span", passage)) == len(change)  # whole all the same


def test_the_page_is_one_file_with_every_number(inspect, tmp_path):
    _, found = inspect("--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"<(script|link|img|iframe)|@import|src=|url\((?!#)", page)
    assert "prefers-color-scheme: dark" in page
    assert "<unknown>" not in page
    assert "&lt;unknown&gt;" in page
    for row in found["log_probs"].values():
        for score in row:
            assert f"<td>{100 * np.exp(score):.3g} %</td>" in page


def test_whatever_a_token_holds_is_escaped(tmp_path):
    tokens = ["<script>alert('x')</script>", ' "quoted"', "&amp;", "\x1b[31m", "\n", ""]
    scores = {name: np.full(6, -1.0) for name in ("base", "memory")}
    scores["joint"] = np.array([-1.0, -4.5, -0.5, -1.0, -1.05, -np.inf])
    inspection = Inspection(tokens, list(range(6)), scores, np.full(6, 0.5), False)
    write_inspection(inspection, tmp_path / "page.html", None)
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "\x1b" not in re.sub(r'<p class="passage">.*?</p>', "", page, flags=re.DOTALL)
    assert page.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;") == 2
    assert page.count("&amp;amp;") == 2
    assert re.findall(r'<td class="left">(.*?)</td>', page)[3:] == ["\\x1b[31m", "↵", "…"]
    passage = re.search(r'<p class="passage">(.*?)</p>', page, flags=re.DOTALL)[1]
    spans = re.findall(r"<span (.*?) title=", passage)
    lost = [index for index, span in enumerate(spans) if "less" in span]
    assert lost == [1, 5]  # not by colour alone
    assert "(0,158,115" in spans[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--file", "/no/such/file"), "give either text or file"),
        (("--top", 0), "top must be at least 1, got 0"),
        (("--stride", 40, "--block-size", 32), "stride must be at most 32, the block_size, got 40"),
        (("--block-size", 65), "block_size must be at most 64, the context of this gpt2, got 65"),
        (("--lmbda", "1.5"), "lmbda must be in [0, 1] or adaptive, got 1.5"),
        (("--lmbda", "often"), "lmbda must be a number or one of 'adaptive' or nothing"),
        (("--datastore", "x"), "needs both datastore and targets, one of them was given"),
        (("--teacher", "x"), "teacher goes with datastore"),
        (("--separator-id", 99), "separator_id must be in [0, 62), got 99"),
        (("--html", "/no/such/directory/page.html"), "html must be a file in a directory that"),
        (("--html", "/tmp"), "html must be a file in a directory that exists, got '/tmp'"),
    ],
)
def test_bad_requests_are_refused(inspect, arguments, message):
    result, _ = inspect(*arguments)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the text has no tokens"), (b"a\0b", "NUL byte at 1"), (b"\xff", "bad byte at 0")],
)
def test_bad_texts_are_refused(inspect, tmp_path, content, message):
    (tmp_path / "text").write_bytes(content)
    result, _ = inspect("--file", tmp_path / "text", text=None)
    assert result.exit_code == 1
    assert message in result.stderr
    missing, _ = inspect("--file", tmp_path / "none", text=None)
    assert missing.exit_code == 1
    assert missing.stderr == f"error: {tmp_path / 'none'}: No such file or directory\n"


def test_logits_that_are_no_numbers_are_refused(inspect, memdec, tiny, tmp_path):
    broken = load_model(tiny.model)
    with torch.no_grad():
        broken.transformer.ln_f.bias.fill_(torch.nan)
    broken.save_pretrained(tmp_path / "broken")
    result, _ = inspect("--lmbda", 0.5, memory=tmp_path / "broken")
    assert "the logits of memory are no numbers at position 0" in result.stderr
    models = ("--base", tiny.model, "--memory", tmp_path / "broken", "--tokens", tiny.tokens)
    options = ("--block-size", tiny.block_size, "--device", "cpu", "--out", tmp_path / "eval")
    result = memdec("eval", *models, *options)
    assert "error: the logits of memory on validation are no numbers at position 0" in result.stderr


def test_models_that_do_not_go_together_are_refused(inspect, tiny, build, tmp_path):
    other = tiny.save_other_model(tmp_path / "other")
    stages = {"datastore": tiny.datastore, "targets": tiny.targets}
    result, _ = inspect("--lmbda", "adaptive", base=other)
    assert "was made with base" in result.stderr
    result, _ = inspect(**stages, base=other)
    assert "datastore was made with model" in result.stderr
    result, _ = inspect("--teacher", other, **stages)
    assert "datastore was made with model" in result.stderr
    result, _ = inspect(memory=build / "adapt" / "model")
    assert "no lmbda was given, and none is recorded" in result.stderr
    result, _ = inspect("--lmbda", "adaptive", memory=other)
    assert "lmbda adaptive needs an evaluation" in result.stderr
    assert str(tmp_path.parent / "eval") in result.stderr
