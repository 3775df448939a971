"""``memdec build`` end to end on a tiny model, run again, and refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from memdec.cli import make_app

STAGES = ["prepare", "adapt", "datastore", "targets", "train", "control", "eval"]
RECIPE = """
block_size: 32
device: cpu
prepare: {documents: line, validation_fraction: 0.15, test_fraction: 0.3}
adapt: {epochs: 2, learning_rate: 3.0e-3, gradient_accumulation: 1}
targets: {k: 16}
train: {epochs: 2, learning_rate: 3.0e-3, gradient_accumulation: 1}
eval: {bootstrap: 50, outside: [elsewhere=ELSEWHERE]}
"""


def arguments(tiny, root: Path) -> list[str]:
    recipe = root / "given.yaml"
    (root / "elsewhere.txt").write_text("never the small and often. " * 20)
    recipe.write_text(RECIPE.replace("ELSEWHERE", str(root / "elsewhere.txt")))
    given = ["--base", tiny.model, "--corpus", tiny.corpus, "--recipe", recipe, "--control"]
    return ["build", *map(str, given), "--out", str(root / "out")]


def files(out: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(out)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in out.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("built")
    result = CliRunner().invoke(make_app("build"), arguments(tiny, root))
    assert result.exit_code == 0, result.output
    return root, result


def test_every_stage_is_there_and_the_page(built):
    root, result = built
    assert sorted(item.name for item in (root / "out").iterdir()) == sorted(
        [*STAGES, "recipe.yaml", "report.html"]
    )
    for number, name in enumerate(STAGES, start=1):
        assert f"[{number}/7] {name}\n" in result.stderr
        assert f"[{number}/7] {name}: " in result.stderr
    assert " s in all; the report is " in result.stderr


def test_the_table_is_the_result_on_standard_output(built):
    _, result = built
    for name in ("base", "kNN-LM", "memory", "joint", "adapted", "fine-tuned"):
        assert name in result.stdout


def test_the_page_has_the_table_of_this_build(built):
    root, _ = built
    page = (root / "out" / "report.html").read_text()
    rows = re.findall(r"<tr[^>]*><td>([^<]*)</td>(.*?)</tr>", page)
    assert [name for name, _ in rows[:7]] == [name for name, _ in rows[7:14]]
    names = {"base", "kNN-LM", "memory", "joint", "joint, adaptive lmbda", "adapted", "fine-tuned"}
    assert {name for name, _ in rows[:7]} == names
    timing = json.loads((root / "out" / "train" / "timing.json").read_text())
    assert f"<td>{timing['seconds']:,.1f}</td>" in dict(rows[:7])["joint"]
    assert "elsewhere: perplexity" in page


def test_joint_beats_the_untrained_base(built):
    root, _ = built
    rows = json.loads((root / "out" / "eval" / "eval.json").read_text())["rows"]
    nll = {row["name"]: row["nll"] for row in rows}
    assert nll["joint"] < nll["base"] - 0.5


def test_the_written_recipe_builds_the_same(built, tiny, tmp_path):
    root, _ = built
    written = yaml.safe_load((root / "out" / "recipe.yaml").read_text())
    assert written["train"]["epochs"] == 2
    assert written["prepare"]["corpus"] == str(tiny.corpus)
    again = CliRunner().invoke(
        make_app("build"),
        ["build", "--recipe", str(root / "out" / "recipe.yaml"), "--out", str(root / "out")],
    )
    assert again.exit_code == 0, again.output


def test_a_finished_build_does_nothing_again(built, tiny):
    root, _ = built
    skipped = {"report.html", "recipe.yaml"}
    before = {name: file for name, file in files(root / "out").items() if name not in skipped}
    again = CliRunner().invoke(make_app("build"), arguments(tiny, root))
    assert again.exit_code == 0, again.output
    assert again.stderr.count("already done") == len(STAGES)
    after = {name: file for name, file in files(root / "out").items() if name not in skipped}
    changed = [name for name in before if before[name] != after[name]]
    assert [name for name in changed if not name.endswith(".lock")] == []


def test_a_changed_option_is_refused_by_its_stage(built, tiny):
    root, _ = built
    before = files(root / "out")
    again = CliRunner().invoke(make_app("build"), [*arguments(tiny, root), "--set", "targets.k=12"])
    assert again.exit_code == 1
    assert "targets was made with option k = 16, this run has 12" in again.stderr
    kept = {name for name in before if not name.endswith(".lock")}
    assert {name: files(root / "out")[name] for name in kept} == {
        name: before[name] for name in kept
    }


def test_a_directory_of_something_else_is_refused(memdec: Callable, tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    result = CliRunner().invoke(make_app("build"), arguments(tiny, tmp_path))
    assert result.exit_code == 1
    assert "holds thesis.txt, which is not of this command" in result.stderr
    assert [item.name for item in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("source", ["teacher", "mixture"])
def test_other_sources_of_targets(tiny, tmp_path, source):
    settings = (f"targets.source={source}", "targets.top_m=16", "train.epochs=1")
    given = arguments(tiny, tmp_path)
    given.remove("--control")
    recipe = tmp_path / "given.yaml"
    if source == "teacher":
        recipe.write_text(recipe.read_text().replace("targets: {k: 16}\n", ""))
    flags = [flag for text in settings for flag in ("--set", text)]
    result = CliRunner().invoke(make_app("build"), [*given, "--no-adapt", *flags])
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "out" / "targets" / "manifest.json").read_text())
    assert manifest["params"]["source"] == source
    assert (tmp_path / "out" / "datastore").exists() == (source == "mixture")
    assert ("kNN-LM" in result.stdout) == (source == "mixture")


def test_kept_neighbours_leave_temperature_and_k_to_training(tiny, tmp_path):
    given = arguments(tiny, tmp_path)
    given.remove("--control")
    settings = ("targets.keep=neighbours", "train.temperature=2.5", "train.k=8", "train.epochs=1")
    flags = [flag for text in settings for flag in ("--set", text)]
    result = CliRunner().invoke(make_app("build"), [*given, "--no-adapt", *flags])
    assert result.exit_code == 0, result.output
    params = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())["params"]
    assert (params["temperature"], params["k"], params["max_entries"]) == (2.5, 8, None)
    assert "kNN-LM" in result.stdout


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.temperature=2"], "train: temperature goes with kept neighbours"),
        (["targets.keep=neighbours", "train.k=17"], "train: k must be at most 16, the neighbours"),
    ],
)
def test_what_training_cannot_choose_is_refused_before_anything_runs(
    tiny, tmp_path, settings, message
):
    flags = [flag for text in settings for flag in ("--set", text)]
    result = CliRunner().invoke(make_app("build"), [*arguments(tiny, tmp_path), *flags])
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_text_outside_that_is_not_there_is_refused_before_anything_runs(tiny, tmp_path):
    flags = ["--set", "eval.outside=[gone=nowhere.txt]"]
    result = CliRunner().invoke(make_app("build"), [*arguments(tiny, tmp_path), *flags])
    assert result.exit_code == 1
    assert "found none at nowhere.txt" in result.stderr
    assert not (tmp_path / "out").exists()


def test_options_of_a_datastore_that_nobody_needs_are_refused(tiny, tmp_path):
    flags = ["--set", "targets.source=teacher", "--set", "datastore.nprobe=3"]
    result = CliRunner().invoke(make_app("build"), [*arguments(tiny, tmp_path), *flags])
    assert result.exit_code == 1
    assert "targets of source teacher need none" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_in_several_stages_it_ends_with_the_same_bytes(built, tiny, tmp_path, monkeypatch):
    root, _ = built
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "memdec", *arguments(tiny, tmp_path)]
    for stage in ("prepare", "adapt", "targets", "train", "eval"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (tmp_path / "out" / stage / "progress.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert not (tmp_path / "out" / stage / "manifest.json").exists()
    subprocess.run(command, check=True, capture_output=True)

    def kept(out: Path) -> dict[str, bytes]:
        # Logs and timing differ, and the page and the recipe name what was given.
        ignored = ("timing.json", ".lock", "log.jsonl", "report.html", "recipe.yaml")
        return {
            name: content for name, (_, content) in files(out).items() if not name.endswith(ignored)
        }

    found, expected = kept(tmp_path / "out"), kept(root / "out")
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
