"""Recipes: what they may say, how flags change them, what the stages get."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from memdec.build import BuildConfig, plan
from memdec.errors import MemdecError
from memdec.recipe import Recipe


def recipe(tmp_path: Path, text: str, **flags: object) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return BuildConfig(recipe=path, **flags).to_recipe()


def configs(recipe: Recipe) -> dict:
    return {step.name: step.config for step in plan(recipe, Path("out"))}


def test_flags_alone():
    steps = configs(BuildConfig(base="gpt2", corpus=Path("docs")).to_recipe())
    assert list(steps) == ["prepare", "adapt", "datastore", "targets", "train", "eval"]
    assert (steps["prepare"].tokenizer, steps["prepare"].corpus) == ("gpt2", Path("docs"))
    assert steps["adapt"].model == "gpt2"
    assert steps["datastore"].model == "out/adapt/model"
    assert steps["targets"].model == "out/adapt/model"
    assert (steps["train"].teacher, steps["train"].base) == ("out/adapt/model", "gpt2")
    assert (steps["eval"].base, steps["eval"].memory) == ("gpt2", "out/train/memory")
    assert steps["eval"].others == ("adapted=out/adapt/model",)


def test_without_adapt_the_base_is_the_teacher():
    steps = configs(BuildConfig(base="gpt2", corpus=Path("docs"), adapt=False).to_recipe())
    assert "adapt" not in steps
    assert steps["datastore"].model == steps["train"].teacher == steps["eval"].teacher == "gpt2"
    assert steps["eval"].others == ()


def test_control_has_the_epochs_of_adapt_and_train_together(tmp_path):
    text = "{base: b, prepare: {corpus: c}, adapt: {epochs: 4}, train: {epochs: 5}, control: {}}"
    steps = configs(recipe(tmp_path, text))
    assert (steps["control"].epochs, steps["control"].model) == (9, "b")
    assert "fine-tuned=out/control/model" in steps["eval"].others


def test_shared_options_reach_every_stage_that_has_them(tmp_path):
    text = "{base: b, seed: 7, block_size: 64, prepare: {corpus: c}, eval: {block_size: 32}}"
    steps = configs(recipe(tmp_path, text, device="cpu"))
    assert {steps[name].seed for name in ("prepare", "adapt", "datastore", "train")} == {7}
    assert (steps["adapt"].block_size, steps["eval"].block_size) == (64, 32)
    assert {steps[name].device for name in steps if name != "prepare"} == {"cpu"}


def test_documents_are_isolated_in_every_stage_or_in_none(tmp_path):
    text = "{base: b, isolate_documents: true, prepare: {corpus: c}, control: {}}"
    steps = configs(recipe(tmp_path, text))
    isolated = {name for name in steps if getattr(steps[name], "isolate_documents", False)}
    assert isolated == {"adapt", "datastore", "targets", "train", "control", "eval"}
    undone = configs(recipe(tmp_path, text, isolate_documents=False))
    assert not any(getattr(undone[name], "isolate_documents", False) for name in undone)
    with pytest.raises(MemdecError, match="must be the same for datastore, targets, train, eval"):
        configs(recipe(tmp_path, text, set=("train.isolate_documents=false",)))
    teacher = ("targets.source=teacher", "eval.isolate_documents=false", "adapt.epochs=1")
    assert not configs(recipe(tmp_path, text, set=teacher))["eval"].isolate_documents


def test_flags_win_over_the_recipe(tmp_path):
    text = "{base: b, seed: 1, adapt: {epochs: 9}, train: {epochs: 9}, prepare: {corpus: c}}"
    flags = {"base": "other", "seed": 2, "corpus": Path("d"), "memory_layers": 3}
    steps = configs(recipe(tmp_path, text, set=("train.epochs=4",), **flags))
    assert (steps["prepare"].tokenizer, steps["prepare"].corpus) == ("other", Path("d"))
    assert (steps["train"].epochs, steps["train"].memory_layers, steps["train"].seed) == (4, 3, 2)
    assert steps["adapt"].epochs == 9
    assert "adapt" not in configs(recipe(tmp_path, text, adapt=False))


def test_adapt_flag_keeps_the_recipe_options_and_undoes_its_false(tmp_path):
    assert recipe(tmp_path, "{base: b, adapt: {epochs: 9}}", adapt=True).stages["adapt"] == {
        "epochs": 9
    }
    assert recipe(tmp_path, "{base: b, adapt: false}", adapt=True).stages["adapt"] == {}


def test_the_written_form_reads_back(tmp_path):
    text = "{base: b, teacher: t, seed: 3, adapt: false, control: {epochs: 2}, targets: {k: 5}}"
    first = recipe(tmp_path, text)
    assert recipe(tmp_path, yaml.safe_dump(first.to_mapping())) == first


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[base]", "expected a mapping in the recipe"),
        ("{base: b", "is not YAML"),
        ("{prepare: {corpus: c}}", "expected a base model"),
        ("{base: 3}", "base must be text, got 3"),
        ("{base: b, trian: {}}", "has no key 'trian'; did you mean 'train'?"),
        ("{base: b, train: 3}", "train must be a mapping of options in a recipe, got 3"),
        ("{base: b, train: false}", "train must be a mapping of options in a recipe, got False"),
        ("{base: b, prepare: {corpus: c}, train: {epoch: 1}}", "train: .*did you mean 'epochs'"),
        ("{base: b, prepare: {corpus: c}, eval: {lmbda: 2}}", "eval: lmbda must be in"),
        ("{base: b}", "prepare: give either corpus or dataset"),
    ],
)
def test_a_bad_recipe_is_refused(tmp_path, text, complaint):
    with pytest.raises(MemdecError, match=complaint):
        plan(recipe(tmp_path, text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_recipe_is_refused(tmp_path):
    with pytest.raises(MemdecError, match="cannot be read"):
        BuildConfig(recipe=tmp_path / "none.yaml").to_recipe()


@pytest.mark.parametrize("text", ["epochs=3", "train.epochs", "trian.epochs=3", "=3"])
def test_a_bad_setting_is_refused(text):
    with pytest.raises(
        MemdecError, match=r"expected --set STAGE.OPTION=VALUE with a stage of prepare, "
    ):
        BuildConfig(base="b", set=(text,)).to_recipe()
