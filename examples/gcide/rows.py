"""The rows: what each kind runs, and the numbers it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from experiment import Experiment
from measures import function_words, mean_change, median_gain, perplexity, rarest_decile

from memdec.data.calibration import choose, teacher_forced
from memdec.data.datastore import Datastore
from memdec.evaluation.forward import LabelScores
from memdec.evaluation.gate import evidence, fit_gate, gate_lmbda
from memdec.evaluation.knn_lm import score_neighbours
from memdec.evaluation.mixture import best_lmbda, mix_log_probs
from memdec.modeling.loading import load_model, load_shape

KNN_K = 512
CALIBRATION = 8192  # positions of validation on which a temperature is chosen

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
    return {
        "stage_seconds": {"train": experiment.seconds("adapt")},
        "curve": experiment.curve("adapt"),
    } | _model_row(experiment, setting, model)


def tuned_row(experiment: Experiment, setting: Setting) -> Row:
    """Fine-tuning with other options than the teacher's."""
    model = experiment.tuned(setting)
    folder = experiment.folder(setting)
    return {
        "stage_seconds": {"train": experiment.seconds(folder)},
        "curve": experiment.curve(folder),
    } | _model_row(experiment, setting, model)


def memory_row(experiment: Experiment, setting: Setting) -> Row:
    model = experiment.memory(setting)
    folders = {"train": experiment.folder(setting), "adapt": "adapt"}
    folders["targets"] = f"targets-{setting['targets']}"
    if (samples := experiment.tokens_of(setting["targets"])) != experiment.tokens:
        folders["sampled"] = samples
    return {
        "stage_seconds": {stage: experiment.seconds(folder) for stage, folder in folders.items()},
        "curve": experiment.curve(folders["train"]),
    } | _model_row(experiment, setting, model)


def knn_row(experiment: Experiment, setting: Setting) -> Row:
    """Neighbours mixed with the base, or with the adapted model; gated by the evidence alone."""
    store = experiment.datastore(setting["keys"])
    keys_model = experiment.model(setting["keys"])
    beside = _label_scores(
        experiment.scores(setting["beside"], experiment.model(setting["beside"]))
    )
    base = _label_scores(experiment.scores("base", experiment.base))
    k = min(KNN_K, store.size)
    temperature = _temperature(experiment, store, keys_model, beside["validation"], k)
    dtype = store.artefact.manifest["params"]["dtype"]  # queries as the keys were made
    model = load_model(keys_model, device=experiment.device, dtype=dtype)
    near = {
        name: score_neighbours(
            model,
            text.stream,
            store,
            k=k,
            temperature=temperature,
            positions=text.positions,
            **experiment.how,
        )
        for name, text in experiment.texts.items()
    }
    lmbda, _ = best_lmbda(beside["validation"], near["validation"])
    joint = {name: mix_log_probs(beside[name], near[name], lmbda) for name in near}
    block_size = experiment.how["block_size"]
    weights = {
        name: evidence(base[name], joint[name], text.stream, block_size)
        for name, text in experiment.texts.items()
    }
    gated = {name: mix_log_probs(base[name], joint[name], weights[name]) for name in near}
    needs_teacher = setting["keys"] != "base"
    return {
        "stage_seconds": {"datastore": experiment.seconds(f"datastore-{setting['keys']}")},
        "parameters": model.num_parameters() if needs_teacher else 0,
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
    "memory": memory_row,
    "knn": knn_row,
}


def _model_row(experiment: Experiment, setting: Setting, model: str) -> Row:
    """A model alone, beside the base at the best lmbda, and at the gate's."""
    base = experiment.scores("base", experiment.base)
    scores = experiment.scores(_scores_name(setting), model)
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
    parameters = load_shape(model).num_parameters()
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


def _temperature(
    experiment: Experiment, store: Datastore, model: str, beside: np.ndarray, k: int
) -> float:
    """The one at which neighbours and what they stand beside are best on the head of validation."""
    wanted = min(CALIBRATION, len(beside))
    keys, _, labels = teacher_forced(model, store, experiment.corpus, "validation", wanted)
    distances, ids = store.search(keys, k)
    tokens = store.neighbor_tokens(ids)
    return float(choose(beside[: len(keys)], distances, tokens, labels)["temperature"])


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
