"""The rows: what each kind runs, and the numbers it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lab.experiment import Experiment
from lab.retrieval import score_retrieved
from lab.scores import perplexity
from lab.texts import documents
from memdec.data.targets import SEARCHED
from memdec.evaluation.forward import LabelScores
from memdec.evaluation.gate import evidence_lmbda, fit_gate, gate_lmbda
from memdec.evaluation.measures import function_words, mean_change, median_gain, rarest_decile
from memdec.evaluation.mixture import best_lmbda, mix_log_probs
from memdec.modeling.loading import load_model, load_shape

CALIBRATION = 8192  # positions of validation on which a temperature is chosen
HEAD = 16384  # positions of validation on which the room for retrieved entries is chosen

Setting = Mapping[str, Any]
Row = dict[str, Any]
ByText = dict[str, np.ndarray]  # log p(label) by name of the text


def base_row(experiment: Experiment, setting: Setting) -> Row:
    base = experiment.scores("base", experiment.base)
    return {
        "parameters": 0,
        "perplexity": {"alone": _perplexities(experiment, _label_scores(base))},
    }


def adapted_row(experiment: Experiment, setting: Setting) -> Row:
    """The teacher by itself is full fine-tuning; beside the base it is a memory like any other."""
    model = experiment.adapted()
    return _training(experiment, "adapt") | _model_row(experiment, setting, model)


def tuned_row(experiment: Experiment, setting: Setting) -> Row:
    """Fine-tuning with other options than the teacher's."""
    model = experiment.tuned(setting)
    training = _training(experiment, experiment.folder(setting))
    return training | _model_row(experiment, setting, model)


def lora_row(experiment: Experiment, setting: Setting) -> Row:
    """The base with an adapter merged into it; the parameters are the adapter's."""
    model, parameters = experiment.lora(setting)
    training = _training(experiment, experiment.folder(setting))
    return training | _model_row(experiment, setting, model, parameters=parameters)


def ensemble_row(experiment: Experiment, setting: Setting) -> Row:
    """The mean of the adapted teachers of several seeds, which a memory may learn."""
    seeds = [experiment.of_seed(seed) for seed in setting["seeds"]]
    models = [one.adapted() for one in seeds]
    seconds = sum(one.seconds("adapt") for one in seeds)
    return {"stage_seconds": {"train": seconds}} | _model_row(experiment, setting, *models)


def memory_row(experiment: Experiment, setting: Setting) -> Row:
    model = experiment.memory(setting)
    training = _training(experiment, experiment.folder(setting))
    training["stage_seconds"] |= _seconds_before(experiment, setting)
    return training | _model_row(experiment, setting, model)


def _training(experiment: Experiment, folder: str | Path) -> Row:
    """What a training left in its folder."""
    return {
        "stage_seconds": {"train": experiment.seconds(folder)},
        "curve": experiment.curve(folder),
    }


def _seconds_before(experiment: Experiment, setting: Setting) -> dict[str, float]:
    """Of all that the training of a memory needed; the labels alone need a start, and no targets."""
    name = setting["targets"]
    options = experiment.settings["targets"][name]
    seconds = {"adapt": experiment.seconds("adapt")}
    if setting["train"]["alpha"] > 0:
        seconds["targets"] = experiment.seconds(f"targets-{name}")
        if "seeds" in options:
            others = [experiment.of_seed(seed) for seed in experiment.seeds(options["seeds"])]
            seconds["adapt"] = sum(other.seconds("adapt") for other in others)
            seconds["blended"] = experiment.seconds(f"rows-{name}")
        if "neighbours" in options:
            seconds["neighbours"] = experiment.seconds(f"targets-{options['neighbours']}")
        if "neighbours" in options or options.get("source") in SEARCHED:
            seconds["datastore"] = experiment.seconds("datastore-adapted")
    if (samples := experiment.tokens_of(name)) != experiment.tokens:
        seconds["sampled"] = experiment.seconds(samples)
    return seconds


def retrieval_row(experiment: Experiment, setting: Setting) -> Row:
    """The base with train entries in its context; the room for them is chosen on validation."""
    base = _label_scores(experiment.scores("base", experiment.base))
    found = experiment.retrieved(setting["stride"], setting["query_tokens"])
    corpus, how = experiment.corpus, experiment.how
    model = load_model(experiment.base, device=experiment.device, dtype=setting["dtype"])
    entries = documents(corpus.split("train"))

    def scored(name: str, room: int, positions: int | None = None) -> np.ndarray:
        text, pieces = experiment.texts[name], found[name]
        if positions is not None:
            text, pieces = text.head(positions), pieces.head(positions)
        return score_retrieved(
            model,
            text,
            pieces,
            entries,
            base[name][: text.positions],
            separator=corpus.separator_id,
            vocab_size=corpus.vocab_size,
            block_size=how["block_size"],
            room=room,
            description=f"retrieval: {name}, {room} tokens",
        )

    head = min(HEAD, len(base["validation"]))
    tried = {room: -float(scored("validation", room, head).mean()) for room in setting["rooms"]}
    room = min(tried, key=lambda one: tried[one])
    alone = {name: scored(name, room) for name in experiment.texts}
    return {
        "parameters": 0,
        "text_bytes": 2 * corpus.split("train").positions,  # ids in 16 bits
        "room": room,
        "tried": [{"room": one, "nll": nll} for one, nll in tried.items()],
        "base_on_head": -float(base["validation"][:head].mean()),
        "perplexity": {"alone": _perplexities(experiment, alone)},
    }


def knn_row(experiment: Experiment, setting: Setting) -> Row:
    """Neighbours mixed with the base, or with the adapted model; gated by the evidence alone."""
    keys_model = experiment.model(setting["keys"])
    beside = _label_scores(
        experiment.scores(setting["beside"], experiment.model(setting["beside"]))
    )
    base = _label_scores(experiment.scores("base", experiment.base))
    chosen = experiment.weigh_neighbours(setting["keys"], beside["validation"], CALIBRATION)
    temperature = float(chosen["temperature"])
    near = experiment.near(setting["keys"], temperature)
    lmbda, _ = best_lmbda(beside["validation"], near["validation"])
    joint = {name: mix_log_probs(beside[name], near[name], lmbda) for name in near}
    block_size = experiment.how["block_size"]
    weights = {
        name: evidence_lmbda(base[name], joint[name], text.stream, block_size)
        for name, text in experiment.texts.items()
    }
    gated = {name: mix_log_probs(base[name], joint[name], weights[name]) for name in near}
    needs_teacher = "adapted" in (setting["keys"], setting["beside"])
    folders = [f"datastore-{setting['keys']}", *(["adapt"] if needs_teacher else [])]
    return {
        "stage_seconds": {folder: experiment.seconds(folder) for folder in folders},
        "parameters": load_shape(keys_model).num_parameters() if needs_teacher else 0,
        "key_bytes": experiment.key_bytes(),
        "lmbda": lmbda,
        "temperature": temperature,
        "mean_gate": {name: lmbda * float(weight.mean()) for name, weight in weights.items()},
        "perplexity": {
            "alone": _perplexities(experiment, near),
            "joint": _perplexities(experiment, joint),
            "gated": _perplexities(experiment, gated),
        },
        **_behaviour(experiment, base["test"], {"joint": joint["test"], "gated": gated["test"]}),
    }


ROWS: dict[str, Callable[[Experiment, Setting], Row]] = {
    "base": base_row,
    "adapted": adapted_row,
    "tuned": tuned_row,
    "lora": lora_row,
    "ensemble": ensemble_row,
    "retrieval": retrieval_row,
    "memory": memory_row,
    "knn": knn_row,
}


def _model_row(
    experiment: Experiment, setting: Setting, *models: str, parameters: int | None = None
) -> Row:
    """A model, or several's mean, alone, beside the base at the best lmbda, and at the gate's."""
    base = experiment.scores("base", experiment.base)
    scores = experiment.scores(_scores_name(setting), *models)
    alone, labels = _label_scores(scores), _label_scores(base)
    lmbda, _ = best_lmbda(labels["validation"], alone["validation"])
    block_size = experiment.how["block_size"]
    contexts = {name: (text.stream, block_size) for name, text in experiment.texts.items()}
    fitted_on = base["validation"], scores["validation"], *contexts["validation"]
    gate = fit_gate(*fitted_on, device=experiment.device)
    weights = {
        name: gate_lmbda(gate, base[name], one, *contexts[name]) for name, one in scores.items()
    }
    joint = {name: mix_log_probs(labels[name], alone[name], lmbda) for name in scores}
    gated = {name: mix_log_probs(labels[name], alone[name], weights[name]) for name in scores}
    if parameters is None:
        parameters = sum(load_shape(model).num_parameters() for model in models)
    return {
        "parameters": parameters,
        "keys_to_weights": experiment.key_bytes() / (2 * parameters),
        "lmbda": lmbda,
        "mean_gate": {name: float(weight.mean()) for name, weight in weights.items()},
        "perplexity": {
            "alone": _perplexities(experiment, alone),
            "joint": _perplexities(experiment, joint),
            "gated": _perplexities(experiment, gated),
        },
        **_behaviour(experiment, labels["test"], {"joint": joint["test"], "gated": gated["test"]}),
    }


def _label_scores(scores: Mapping[str, LabelScores]) -> ByText:
    return {name: one.log_probs for name, one in scores.items()}


def _scores_name(setting: Setting) -> str:
    return "adapted" if setting["kind"] == "adapted" else setting["name"]


def _perplexities(experiment: Experiment, log_probs: ByText) -> dict[str, Any]:
    block_size = experiment.how["block_size"]
    return {
        name: perplexity(values, experiment.texts[name], block_size)
        for name, values in log_probs.items()
    }


def _behaviour(experiment: Experiment, base: np.ndarray, mixtures: ByText) -> Row:
    """What mixtures do on the test split to the rarest tokens and to function words."""
    labels = experiment.texts["test"].labels
    train, corpus = experiment.corpus.split("train"), experiment.corpus
    rarest = rarest_decile(train, labels, corpus.vocab_size)
    words = function_words(corpus.tokenizer(), labels)
    return {
        "tail_gain": {name: median_gain(base, one, rarest) for name, one in mixtures.items()},
        "function_words": {name: mean_change(base, one, words) for name, one in mixtures.items()},
    }
