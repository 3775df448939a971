"""The memories of an experiment: the text and the targets that each learns, and its training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lab.blended import blended_rows
from lab.experiment import Experiment, model_directory
from lab.neighbours import open_datastore
from lab.residual import residual_targets
from lab.sampled import extend_with_samples
from lab.tuning import adapted, model_named
from memdec.data.corpus import TokenCorpus
from memdec.data.targets import SEARCHED, TargetsConfig, TargetStore, targets
from memdec.modeling.loading import load_model
from memdec.modeling.memory_init import keep_layers
from memdec.training.distill import TrainConfig, train


def trained_memory(experiment: Experiment, setting: Mapping[str, Any]) -> str:
    """The memory of a row: a model directory."""
    out = experiment.folder(setting)

    def run() -> str:
        layers = setting.get("layers")
        start = {"adapted": "teacher", "base": experiment.base}[setting.get("init", "adapted")]
        if isinstance(layers, list):
            start, layers = _chosen_layers(experiment, setting), None
        config = TrainConfig(
            tokens=tokens_of(experiment, setting["targets"]),
            targets=targets_of(experiment, setting["targets"]),
            base=experiment.base,
            teacher=adapted(experiment),
            memory_init=start,
            memory_layers=layers,
            device=experiment.device,
            seed=experiment.seed,
            **{**experiment.settings["train"], **setting["train"]},
        )
        train(config, out)
        return str(out / "memory")

    return experiment.once(out, run)


def _chosen_layers(experiment: Experiment, setting: Mapping[str, Any]) -> str:
    """A model directory with the layers that a row lists."""
    source = model_named(experiment, setting.get("init", "adapted"))

    def chosen() -> tuple[PreTrainedModel, Any]:
        return keep_layers(load_model(source), setting["layers"]), experiment.corpus.tokenizer()

    return model_directory(experiment.folder(setting, "init"), chosen)


def tokens_of(experiment: Experiment, name: str) -> Path:
    """What the targets of that name are rows of: the train tokens, or samples too."""
    settings = experiment.settings["targets"]
    name = settings[name].get("tokens_of", name)
    options = settings[name].get("sampled")
    if options is None:
        return experiment.tokens
    out = experiment.work / f"sampled-{name}"
    options = {**options, "device": experiment.device, "seed": experiment.seed}
    teacher = adapted(experiment)
    return experiment.once(
        out, lambda: extend_with_samples(teacher, experiment.corpus, out, **options)
    )


def targets_of(experiment: Experiment, name: str) -> Path:
    """The targets that the settings describe under that name."""
    out = experiment.work / f"targets-{name}"

    def run() -> Path:
        options = dict(experiment.settings["targets"][name])
        placement = {"device": experiment.device}
        if "residual_of" in options:
            taught = TargetStore.open(targets_of(experiment, options.pop("residual_of")))
            options |= placement
            return residual_targets(experiment.base, taught, experiment.corpus, out, **options)
        tokens = tokens_of(experiment, name)
        for sampling in ("sampled", "tokens_of"):
            options.pop(sampling, None)
        if "seeds" in options:
            options = {"source": "file", "file": _blended(experiment, name, tokens, options)}
        if options["source"] in SEARCHED:
            options["datastore"] = open_datastore(experiment, "adapted").artefact.path
        else:
            options["block_size"] = experiment.settings["block_size"]
        options |= {"tokens": tokens, "model": adapted(experiment), **placement}
        return targets(TargetsConfig(**options), out).path

    return experiment.once(out, run)


def _blended(experiment: Experiment, name: str, tokens: Path, options: dict[str, Any]) -> Path:
    """Rows of several teachers, or of one, with neighbours if `options` name targets of them."""
    block_size = experiment.settings["block_size"]
    options = {"max_entries": None, **options, "block_size": block_size}
    teachers = [adapted(other) for other in experiment.of_seeds(options.pop("seeds"))]
    near, lmbda = None, 0.0
    if "neighbours" in options:
        near = TargetStore.open(targets_of(experiment, options.pop("neighbours")))
        lmbda = near.artefact.manifest["calibration"]["lmbda"]
    corpus = TokenCorpus.open(tokens)
    out, device = experiment.work / f"rows-{name}", experiment.device
    return experiment.once(
        out,
        lambda: blended_rows(
            teachers, corpus, near, out, lmbda=lmbda, device=device, options=options
        ),
    )


def seconds_before(experiment: Experiment, setting: Mapping[str, Any]) -> dict[str, float]:
    """Of all that the training of a memory needed; the labels alone need a start, and no targets."""
    name = setting["targets"]
    options = experiment.settings["targets"][name]
    seconds = {"adapt": experiment.seconds("adapt")}
    if setting["train"]["alpha"] > 0:
        seconds["targets"] = experiment.seconds(f"targets-{name}")
        if "seeds" in options:
            teachers = experiment.of_seeds(options["seeds"])
            seconds["adapt"] = sum(one.seconds("adapt") for one in teachers)
            seconds["blended"] = experiment.seconds(f"rows-{name}")
        if "neighbours" in options:
            seconds["neighbours"] = experiment.seconds(f"targets-{options['neighbours']}")
        if "neighbours" in options or options.get("source") in SEARCHED:
            seconds["datastore"] = experiment.seconds("datastore-adapted")
    if (samples := tokens_of(experiment, name)) != experiment.tokens:
        seconds["sampled"] = experiment.seconds(samples)
    return seconds
