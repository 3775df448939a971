"""``memdec build``: every stage in order, from flags or a recipe."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml

from memdec.config import Config, option
from memdec.console import say
from memdec.data.artefact import Artefact
from memdec.data.corpus import ISOLATE_HELP
from memdec.errors import MemdecError
from memdec.recipe import SHARED, STAGES, Recipe, parse_setting, read_recipe, set_option

RECIPE = "recipe.yaml"
REPORT = "report.html"
OWN = {*STAGES, RECIPE, REPORT}  # what a build leaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildConfig(Config):
    """Options of ``memdec build``; a flag that is given wins over the recipe."""

    base: str | None = option(None, help="frozen model: directory, hub name or .gguf file")
    corpus: Path | None = option(None, help="text file or directory of text files")
    recipe: Path | None = option(None, help="YAML file: base, and a mapping of options per stage")
    teacher: str | None = option(None, help="model to adapt as teacher (default: the base)")
    adapt: bool | None = option(
        None, help="fine-tune the teacher on the domain first (default: yes)"
    )
    memory_layers: int | None = option(None, help="layers of the teacher that the memory keeps")
    control: bool | None = option(
        None, help="also fine-tune the base for as many epochs, to compare with (default: no)"
    )
    block_size: int | None = option(None, help="tokens of context in a block, for every stage")
    isolate_documents: bool | None = option(
        None, help=f"for every stage: {ISOLATE_HELP} (default: no)"
    )
    seed: int | None = option(None, help="seed of everything random, for every stage")
    device: str | None = option(None, help="auto, cpu, cuda or cuda:N, for every stage")
    set: tuple[str, ...] = option((), help="any other option, as STAGE.OPTION=VALUE; repeatable")

    def to_recipe(self) -> Recipe:
        """The recipe file, if any, with the flags put in."""
        values = read_recipe(self.recipe) if self.recipe else {}
        for name in ("base", "teacher", *SHARED):
            if getattr(self, name) is not None:
                values[name] = getattr(self, name)
        for name in ("adapt", "control"):
            wanted = getattr(self, name)
            if wanted is False or (wanted and not isinstance(values.get(name), dict)):
                values[name] = wanted
        if self.corpus is not None:
            set_option(values, "prepare", "corpus", str(self.corpus))
        if self.memory_layers is not None:
            set_option(values, "train", "memory_layers", self.memory_layers)
        for text in self.set:
            set_option(values, *parse_setting(text))
        return Recipe.from_mapping(values)


@dataclasses.dataclass(frozen=True)
class Step:
    """One stage, ready to run."""

    name: str
    run: Callable[[Any, Path], Artefact]
    config: Config


def build(config: BuildConfig, out: Path) -> None:
    """Runs all stages into directories of `out` named after them, then writes report.html.

    Raises:
        MemdecError: a bad recipe, an `out` of something else, or what a stage raises.
    """
    from memdec.report import write_report

    start = time.monotonic()
    recipe = config.to_recipe()
    steps = plan(recipe, out)
    refuse_strangers(out, OWN)
    run_steps(steps, recipe, out)
    title = f"A memory for {recipe.base}"
    write_report(out / "eval", out / REPORT, title=title, build=out)
    say(f"build: {time.monotonic() - start:.0f} s in all; the report is {out / REPORT}")


def plan(recipe: Recipe, out: Path) -> list[Step]:
    """The stages with their configurations, all of them checked before any of them runs.

    So are the texts that eval will look for at the end.

    Raises:
        MemdecError: an option that its stage does not have or that is out of range, or that another
            stage has otherwise and must not.
    """
    from memdec.data.corpus import PrepareConfig, prepare
    from memdec.data.datastore import DatastoreConfig, datastore
    from memdec.data.documents import text_files
    from memdec.data.targets import SEARCHED, TargetsConfig, targets
    from memdec.evaluation.evaluate import evaluate
    from memdec.evaluation.options import EvalConfig
    from memdec.training.adapt import AdaptConfig, adapt
    from memdec.training.distill import TrainConfig, train

    steps: list[Step] = []

    def add(
        name: str, run: Callable[[Any, Path], Artefact], kind: type[Config], **inputs: Any
    ) -> Any:
        fields = {field.name for field in dataclasses.fields(kind)}
        shared = {key: value for key, value in recipe.shared.items() if key in fields}
        try:
            config = kind.from_mapping({**inputs, **shared, **(recipe.stages[name] or {})})
        except MemdecError as error:
            raise MemdecError(f"{name}: {error}") from error
        steps.append(Step(name, run, config))
        return config

    base, tokens, others = recipe.base, out / "prepare", []
    teacher, epochs = recipe.teacher or base, 0
    add("prepare", prepare, PrepareConfig, tokenizer=base)
    if recipe.stages["adapt"] is not None:
        adapted = add("adapt", adapt, AdaptConfig, model=teacher, tokens=tokens)
        teacher, epochs = str(out / "adapt" / "model"), adapted.epochs
        others.append(f"adapted={teacher}")
    searched: dict[str, Any] = {"tokens": tokens}
    source = (recipe.stages["targets"] or {}).get("source", "knn")
    if source in SEARCHED:
        add("datastore", datastore, DatastoreConfig, model=teacher, tokens=tokens)
        searched["datastore"] = out / "datastore"
    elif recipe.stages["datastore"]:
        raise MemdecError(f"datastore: targets of source {source} need none; remove its options")
    made = add("targets", targets, TargetsConfig, model=teacher, **searched)
    taught = {"targets": out / "targets", "tokens": tokens, "base": base, "teacher": teacher}
    trained = add("train", train, TrainConfig, **taught)
    try:
        trained.check_kept(made.k if made.keep == "neighbours" else None)
    except MemdecError as error:
        raise MemdecError(f"train: {error}") from error
    if recipe.stages["control"] is not None:
        budget = {**(recipe.stages["adapt"] or {}), "epochs": epochs + trained.epochs}
        add("control", adapt, AdaptConfig, **{"model": base, "tokens": tokens, **budget})
        others.append(f"fine-tuned={out / 'control' / 'model'}")
    memory = str(out / "train" / "memory")
    models = {"memory": memory, "others": others, **searched, **taught}
    if source not in SEARCHED:  # no kNN-LM to compare with
        del models["targets"]
    evaluated = add("eval", evaluate, EvalConfig, **models)
    for path in evaluated.outside_texts().values():
        text_files(path)
    _check_isolation(steps)
    return steps


def _check_isolation(steps: Collection[Step]) -> None:
    """Finds at once what a stage would find hours later, in the results of those before it."""
    linked = ["datastore", "targets", "train", "eval"]
    if "datastore" not in {step.name for step in steps}:
        linked = ["targets", "train"]  # eval reads neither
    said = {s.name: vars(s.config)["isolate_documents"] for s in steps if s.name in linked}
    if len(set(said.values())) > 1:
        found = ", ".join(f"{name} has {value}" for name, value in said.items())
        raise MemdecError(f"isolate_documents must be the same for {', '.join(said)}; {found}")


def run_steps(steps: Collection[Step], recipe: Recipe, out: Path) -> None:
    """Runs the stages in order, tells which is at work and how long each took, keeps the recipe.

    Each stage refuses a directory of another run by itself; so an option that was wrong in a late
    stage can be changed without losing the early ones, and the recipe is written when all agree.
    """
    for number, step in enumerate(steps, start=1):
        say(f"[{number}/{len(steps)}] {step.name}")
        start = time.monotonic()
        step.run(step.config, out / step.name)
        say(f"[{number}/{len(steps)}] {step.name}: {time.monotonic() - start:.1f} s")
    temporary = out / f"{RECIPE}.tmp"
    temporary.write_text(yaml.safe_dump(recipe.to_mapping(), sort_keys=False))
    os.replace(temporary, out / RECIPE)


def refuse_strangers(out: Path, own: Collection[str]) -> None:
    """Raises :class:`MemdecError` when `out` holds anything that this command does not write."""
    if out.exists() and not out.is_dir():
        raise MemdecError(f"expected a directory for the results, {out} is a file")
    for item in sorted(out.iterdir()) if out.exists() else []:
        if item.name.removesuffix(".tmp") not in own:
            raise MemdecError(
                f"{out} is not empty and holds {item.name}, which is not of this command; "
                "choose another directory"
            )
