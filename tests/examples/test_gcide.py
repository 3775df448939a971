"""examples/gcide end to end on a tiny model: rows, time limit, resuming, table."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from memdec.data.artefact import stage
from memdec.data.corpus import KIND, SPLITS, TokenCorpus
from memdec.errors import MemdecError
from memdec.evaluation.forward import LabelScores
from memdec.modeling.loading import load_model, model_fingerprint
from memdec.ops import SparseTargets

FOLDER = Path(__file__).parents[2] / "examples" / "gcide"
LOOP = {"batch_blocks": 4, "gradient_accumulation": 1, "learning_rate": 3.0e-3}
TAUGHT = {"epochs": 2, "alpha": 0.5}
ANSWERS = {"top_m": 8, "batch_blocks": 4, "dtype": "float32"}
SETTINGS = {
    "block_size": 32,
    "positions": 400,
    "adapt": {**LOOP, "epochs": 3},
    "datastore": {"index": "Flat"},
    "targets": {
        "knn": {"source": "knn", "k": 16},
        "mixture": {"seeds": "own", "neighbours": "knn", **ANSWERS},
        "ensemble": {"seeds": [0, 1], "tokens_of": "samples", "neighbours": "knn", **ANSWERS},
        "teacher": {"source": "teacher", "top_m": 8, "batch_blocks": 4},
        "residual": {"residual_of": "teacher", "lmbda": 0.7, "label_weight": 0.4},
        "samples": {"source": "teacher", "top_m": 8, "batch_blocks": 4}
        | {"sampled": {"rounds": 2, "batch": 8, "length": 64}},
    },
    "train": LOOP,
    "rows": [
        {"name": "base", "kind": "base", "seconds": 1},
        {"name": "DAPT", "kind": "adapted", "seconds": 1, "repeat": True},
        {"name": "kNN-LM", "kind": "knn", "keys": "adapted", "beside": "base", "seconds": 1},
        {"name": "1 layer", "kind": "memory", "targets": "mixture", "layers": 1, "seconds": 9000}
        | {"train": TAUGHT},
        {"name": "layer 1", "kind": "memory", "targets": "teacher", "layers": [1], "seconds": 1}
        | {"init": "base", "train": TAUGHT},
        {"name": "residual", "kind": "memory", "targets": "residual", "layers": 1, "seconds": 1}
        | {"train": {"epochs": 2, "alpha": 1.0}},
        {"name": "samples", "kind": "memory", "targets": "samples", "layers": 1, "seconds": 1}
        | {"train": TAUGHT},
        {"name": "tuned", "kind": "tuned", "seconds": 1, "train": {"epochs": 1}},
        {"name": "LoRA", "kind": "lora", "seconds": 1, "train": {"learning_rate": 1.0e-2}}
        | {"adapter": {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"}},
        {"name": "BM25", "kind": "retrieval", "seconds": 1, "dtype": "float32"}
        | {"stride": 8, "query_tokens": 8, "rooms": [12, 20]},
        {"name": "DAPT of two seeds", "kind": "ensemble", "seeds": [0, 1], "seconds": 1},
        {"name": "ensemble", "kind": "memory", "targets": "ensemble", "layers": 1, "seconds": 1}
        | {"train": {"epochs": 2, "alpha": 0.9}},
    ],
}


def run(tiny, root: Path, *more: str) -> dict:
    settings = root / "settings.yaml"
    settings.write_text(yaml.safe_dump(SETTINGS))
    arguments = ["--base", tiny.model, "--tokens", tiny.tokens, "--outside", f"else={tiny.tokens}"]
    arguments += ["--work", root / "work", "--result", root / "result.json"]
    arguments += ["--settings", settings, "--device", "cpu", *more]
    importlib.import_module("run").main([str(one) for one in arguments])
    path = more[more.index("--result") + 1] if "--result" in more else root / "result.json"
    return json.loads(Path(path).read_text())


@pytest.fixture(scope="module")
def results(gcide: None, tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict, Path]:
    """The result of a run with a limit, that of the run after it, and where the latter lies."""
    root = tmp_path_factory.mktemp("gcide")
    return run(tiny, root, "--minutes", "100"), run(tiny, root), root / "result.json"


def test_a_limit_leaves_out_what_would_pass_it(results: tuple[dict, dict, Path]) -> None:
    names = [row["name"] for row in results[0]["rows"]]
    assert names == [row["name"] for row in SETTINGS["rows"] if row["seconds"] < 6000]


def test_a_second_run_adds_what_is_missing(results: tuple[dict, dict, Path]) -> None:
    limited, whole, _ = results
    assert [row["name"] for row in whole["rows"]] == [row["name"] for row in SETTINGS["rows"]]
    kept = {row["name"]: row for row in whole["rows"]}
    assert [kept[row["name"]] for row in limited["rows"]] == limited["rows"]  # seconds too


def test_the_rows_tell_what_was_learned(results: tuple[dict, dict, Path]) -> None:
    rows = {row["name"]: row for row in results[1]["rows"]}
    base = rows["base"]["perplexity"]["alone"]["test"]["perplexity"]
    learned = ["DAPT", "kNN-LM", "1 layer", "residual", "samples", "LoRA", "DAPT of two seeds"]
    for name in [*learned, "ensemble"]:
        assert rows[name]["perplexity"]["joint"]["test"]["perplexity"] < 0.9 * base
    for row in rows.values():
        for texts in row["perplexity"].values():
            for found in texts.values():
                if found["perplexity"] is not None:
                    low, high = found["interval"]
                    assert low <= found["perplexity"] <= high
    memory = rows["1 layer"]
    assert memory["parameters"] < rows["DAPT"]["parameters"]
    assert memory["tail_gain"]["joint"] > 1
    stages = {"train", "adapt", "targets", "blended", "neighbours", "datastore"}
    assert set(memory["stage_seconds"]) == stages
    assert set(rows["ensemble"]["stage_seconds"]) == stages | {"sampled"}
    assert set(rows["samples"]["stage_seconds"]) == {"train", "adapt", "targets", "sampled"}
    assert [point["epoch"] for point in memory["curve"]] == [0, 1, 2]


def test_samples_lengthen_the_train_split_alone(
    results: tuple[dict, dict, Path], tiny: ModuleType
) -> None:
    before = TokenCorpus.open(tiny.tokens)
    after = TokenCorpus.open(results[2].parent / "work" / "sampled-samples")
    for name in ("validation", "test"):
        kept, found = before.split(name), after.split(name)
        assert np.array_equal(kept.read(0, len(kept)), found.read(0, len(found)))
        assert np.array_equal(kept.documents, found.documents)
    kept, found = before.split("train"), after.split("train")
    assert len(kept) < len(found) <= len(kept) + 2 * 8 * 64
    assert np.array_equal(kept.read(0, len(kept)), found.read(0, len(kept)))
    tokens = found.read(0, len(found))
    assert tokens[-1] == after.separator_id
    assert (tokens[found.documents] != after.separator_id).all()


def test_entries_leave_the_marks_of_sources_out() -> None:
    mark = importlib.import_module("entries").SOURCE
    entry = "Rash \\Rash\\, n. [L. rasus.] An eruption. [Obs.] [1913 Webster] To fall. [WordNet 1.5 +PJC]"
    left = "Rash \\Rash\\, n. [L. rasus.] An eruption. [Obs.] To fall."
    assert mark.sub("", entry) == left


def test_the_table_has_every_row_and_goal(results: tuple[dict, dict, Path]) -> None:
    done = subprocess.run(
        [sys.executable, FOLDER / "table.py", results[2]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for row in SETTINGS["rows"]:
        assert done.stdout.count(f"\n| {row['name']} |") == 3
    assert "± " not in done.stdout  # one seed
    _check_widths(done.stdout)


def _check_widths(printed: str) -> None:
    """Each table's rows are as wide as its head."""
    for table in printed.split("\n\n"):
        widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(widths) <= 1


def test_another_seed_runs_what_is_repeated_and_the_table_says_how_far_seeds_differ(
    results: tuple[dict, dict, Path], tiny: ModuleType
) -> None:
    path = results[2].with_name("result-1.json")
    other = run(tiny, path.parent, "--seed", "1", "--result", str(path))
    assert [row["name"] for row in other["rows"]] == ["DAPT"]
    values = [
        next(row for row in result["rows"] if row["name"] == "DAPT")["perplexity"]["alone"]["test"]
        for result in (results[1], other)
    ]
    first, second = (value["perplexity"] for value in values)
    assert first != second
    # The ensemble's second teacher is this one.
    found = json.loads((path.parent / "work/rows-ensemble/manifest.json").read_text())
    trained = model_fingerprint(path.parent / "work/seed-1/adapt/model")
    assert found["inputs"]["teacher 1"] == trained
    done = subprocess.run(
        [sys.executable, FOLDER / "table.py", path, results[2]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    mean, deviation = (first + second) / 2, abs(first - second) / math.sqrt(2)
    assert f"\n| DAPT | 2 | {mean:.2f} ± {deviation:.2f} |" in done.stdout
    _check_widths(done.stdout)


def test_a_row_that_fails_costs_no_other(
    results: tuple[dict, dict, Path], tiny: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(importlib.import_module("lab.rows").ROWS, "adapted", fail)
    path = results[2].with_name("failed.json")
    with pytest.raises(SystemExit, match="DAPT"):
        run(tiny, path.parent, "--row", "DAPT", "--row", "base", "--result", str(path))
    assert [row["name"] for row in json.loads(path.read_text())["rows"]] == ["base"]


def test_figures_are_drawn(results: tuple[dict, dict, Path], tmp_path: Path) -> None:
    importlib.import_module("figures").draw([results[2]], tmp_path)
    rows, cost = ((tmp_path / f"gcide-{name}.svg").read_text() for name in ("rows", "cost"))
    assert all(row["name"] in rows for row in SETTINGS["rows"][1:])
    sizes: dict[int, list[dict]] = {}
    for row in results[0]["rows"]:
        if row["setting"]["kind"] == "memory":
            sizes.setdefault(row["parameters"], []).append(row)
    assert any(len(alike) > 1 for alike in sizes.values())
    for alike in sizes.values():
        best = min(alike, key=lambda row: row["perplexity"]["gated"]["test"]["perplexity"])
        assert [row["name"] for row in alike if f">{row['name']}<" in cost] == [best["name"]]


def test_a_residual_completes_the_base_to_the_teacher() -> None:
    subtract = importlib.import_module("lab.residual").subtract
    taught = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.0, 0.0, 0.0, 1.0], [0.25, 0.25, 0.25, 0.25]])
    base = torch.tensor([[0.4, 0.2, 0.2, 0.2], [0.1, 0.1, 0.7, 0.1], [1.0, 0.0, 0.0, 0.0]])
    inside = taught > 0
    indptr = torch.tensor([0, *inside.sum(1).cumsum(0).tolist()])
    rows = SparseTargets(indptr, inside.nonzero()[:, 1].int(), taught[inside])
    found = subtract(rows, base.log(), 0.6)
    assert found.validate(4) is found
    dense = found.to_dense(4)
    torch.testing.assert_close(dense.sum(1), torch.ones(3))
    wanted = (taught - 0.6 * base).clamp(min=0)
    torch.testing.assert_close(dense, wanted / wanted.sum(1, keepdim=True))
    alike = subtract(rows, taught.log(), 1.0)  # nothing is left
    torch.testing.assert_close(alike.to_dense(4), taught)


def test_a_blend_is_the_weighed_sum_where_there_are_neighbours() -> None:
    blend = importlib.import_module("lab.blended").blend
    taught = torch.tensor([[0.6, 0.4, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0.3, 0.7]])
    values, tokens = taught.topk(2)
    near = torch.tensor([[0, 0.5, 0.5, 0], [0, 0, 0, 0]])  # none of the second, no third row
    inside = near > 0
    indptr = torch.tensor([0, *inside.sum(1).cumsum(0).tolist()])
    rows = SparseTargets(indptr, inside.nonzero()[:, 1].int(), near[inside])
    found = blend(values.log(), tokens, rows, 0.2)
    wanted = taught.clone()
    wanted[0] = 0.8 * taught[0] + 0.2 * near[0]
    torch.testing.assert_close(found.to_dense(4), wanted)


def test_an_ensemble_answers_the_mean_distribution(tiny: ModuleType, tmp_path: Path) -> None:
    models = [tiny.model, tiny.save_other_model(tmp_path / "other")]
    tokens = torch.arange(10).view(2, 5)
    with torch.no_grad():
        found = (
            importlib.import_module("lab.blended").Ensemble.load(models)(input_ids=tokens).logits
        )
        members = [load_model(model)(input_ids=tokens).logits.softmax(-1) for model in models]
    torch.testing.assert_close(found.exp(), (members[0] + members[1]) / 2)


def test_a_teacher_whose_logits_are_no_numbers_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    model = load_model(tiny.model)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    model.save_pretrained(tmp_path / "teacher")
    options = {"top_m": 8, "max_entries": None, "block_size": 32, "batch_blocks": 4}
    with pytest.raises(MemdecError, match="the teacher's logits at positions 0 to"):
        importlib.import_module("lab.blended").blended_rows(
            [str(tmp_path / "teacher")],
            TokenCorpus.open(tiny.tokens),
            None,
            tmp_path / "rows",
            lmbda=0.0,
            device="cpu",
            options={**options, "dtype": "float32"},
        )


def test_kept_scores_are_of_the_same_texts(tiny: ModuleType, tmp_path: Path) -> None:
    scores = importlib.import_module("lab.scores")
    text = importlib.import_module("lab.texts").Text
    stream = TokenCorpus.open(tiny.tokens).split("test")
    of_one = {"test": text(stream, 3)}
    answers = LabelScores(np.zeros(3, np.float32), np.zeros((3, 2), np.float32))
    file = scores.ScoreFile(tmp_path / "base.npz")
    file.write("model", {"test": answers, "more": answers})
    assert list(file.read("model", of_one)) == ["test"]
    assert file.read("another", of_one) is None
    assert file.read("model", {**of_one, "else": text(stream, 3)}) is None
    assert file.read("model", {"test": text(stream, 4)}) is None


def test_the_folder_of_work_may_be_relative(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = importlib.import_module("lab.experiment").Experiment(
        SETTINGS, str(tiny.model), tiny.tokens, {}, Path("work"), "cpu"
    )
    folder = experiment.folder({"name": "1 layer"})
    folder.mkdir(parents=True)
    (folder / "timing.json").write_text('{"seconds": 2}')
    assert experiment.seconds(folder) == experiment.seconds(folder.name) == 2


def test_sampling_into_reserved_memory_is_sampling(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = importlib.import_module("lab.sampled")
    model = load_model(tiny.model)

    def greedy(logits: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, None]:
        return logits.argmax(-1), None

    monkeypatch.setattr(sampled, "interpolate_sample", greedy)
    found = sampled._draw(model, 0, 62, 3, 12)
    wanted = model.generate(
        torch.zeros(1, 1, dtype=torch.int64), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert (found == wanted.numpy()).all()


def test_prepared_tokens_are_the_same_after_a_run_that_was_cut_off(tiny, tmp_path: Path) -> None:
    write_prepared = importlib.import_module("lab.texts").write_prepared
    corpus = TokenCorpus.open(tiny.tokens)
    cut_into = importlib.import_module("lab.texts").documents
    documents = {name: cut_into(corpus.split(name)) for name in SPLITS}

    def write(out: Path, given: dict) -> None:
        with stage(out, KIND, {}, {}) as writer:
            write_prepared(writer, corpus.tokenizer(), corpus.separator_id, given)

    with pytest.raises(TypeError):
        write(tmp_path / "twice", {**documents, "test": [None]})
    for out in ("once", "twice"):
        write(tmp_path / out, documents)
    once, twice = (TokenCorpus.open(tmp_path / out) for out in ("once", "twice"))
    assert once.fingerprint == twice.fingerprint
    train = corpus.split("train")
    assert np.array_equal(twice.split("train").read(0, len(train)), train.read(0, len(train)))


def test_prepared_tokens_may_have_ids_that_skip_some(tmp_path: Path) -> None:
    vocabulary = models.WordLevel({"<end>": 0, "far": 9}, unk_token="<end>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary))
    documents = {name: [np.array([9], dtype=np.int32)] for name in SPLITS}
    with stage(tmp_path, KIND, {}, {}) as writer:
        importlib.import_module("lab.texts").write_prepared(writer, tokenizer, 0, documents)
    assert TokenCorpus.open(tmp_path).split("train").read(0, 2).tolist() == [0, 9]
