"""The rows: what each kind runs, and the numbers it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lab.experiment import Experiment
from lab.memories import seconds_before, trained_memory
from lab.neighbours import neighbour_log_probs, weigh_neighbours
from lab.retrieval import retrieve, score_retrieved
from lab.scores import perplexity, score
from lab.texts import documents
from lab.tuning import adapted, model_named, tuned, tuning_config
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
    base = score(experiment, "base", experiment.base)
    return {
        "parameters": 0,
        "perplexity": {"alone": _perplexities(experiment, _label_scores(base))},
    }


def adapted_row(experiment: Experiment, setting: Setting) -> Row:
    """The teacher by itself is full fine-tuning; beside the base it is a memory like any other."""
    model = adapted(experiment)
    return _training(experiment, "adapt") | _model_row(experiment, setting, model)


def tuned_row(experiment: Experiment, setting: Setting) -> Row:
    """Fine-tuning with other options than the teacher's."""
    out = experiment.folder(setting)
    model = tuned(experiment, out, **setting["train"])
    return _training(experiment, out) | _model_row(experiment, setting, model)


def lora_row(experiment: Experiment, setting: Setting) -> Row:
    """The base with an adapter merged into it; the parameters are the adapter's."""
    from lab.lora import lora  # needs peft

    out = experiment.folder(setting)
    config = tuning_config(experiment, **setting["train"])
    parameters = experiment.once(out, lambda: lora(config, out, setting["adapter"]))
    found = _model_row(experiment, setting, str(out / "model"), parameters=parameters)
    return _training(experiment, out) | found


def ensemble_row(experiment: Experiment, setting: Setting) -> Row:
    """The mean of the adapted teachers of several seeds, which a memory may learn."""
    seeds = experiment.of_seeds(setting["seeds"])
    models = [adapted(one) for one in seeds]
    seconds = sum(one.seconds("adapt") for one in seeds)
    return {"stage_seconds": {"train": seconds}} | _model_row(experiment, setting, *models)


def memory_row(experiment: Experiment, setting: Setting) -> Row:
    model = trained_memory(experiment, setting)
    training = _training(experiment, experiment.folder(setting))
    training["stage_seconds"] |= seconds_before(experiment, setting)
    return training | _model_row(experiment, setting, model)


def _training(experiment: Experiment, folder: str | Path) -> Row:
    """What a training left in its folder."""
    return {
        "stage_seconds": {"train": experiment.seconds(folder)},
        "curve": experiment.curve(folder),
    }


def retrieval_row(experiment: Experiment, setting: Setting) -> Row:
    """The base with train entries in its context; the room for them is chosen on validation."""
    base = _label_scores(score(experiment, "base", experiment.base))
    corpus, block_size = experiment.corpus, experiment.how["block_size"]
    found = retrieve(
        corpus,
        experiment.texts,
        experiment.shared / "retrieved",
        {"tokens": corpus.fingerprint, **experiment.outside},
        block_size=block_size,
        stride=setting["stride"],
        query_tokens=setting["query_tokens"],
    )
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
            block_size=block_size,
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
    keys, partner = setting["keys"], setting["beside"]
    beside = _label_scores(score(experiment, partner, model_named(experiment, partner)))
    base = _label_scores(score(experiment, "base", experiment.base))
    chosen = weigh_neighbours(experiment, keys, beside["validation"], CALIBRATION)
    temperature = float(chosen["temperature"])
    near = neighbour_log_probs(experiment, keys, temperature)
    lmbda, _ = best_lmbda(beside["validation"], near["validation"])
    joint = {name: mix_log_probs(beside[name], near[name], lmbda) for name in near}
    block_size = experiment.how["block_size"]
    weights = {
        name: evidence_lmbda(base[name], joint[name], text.stream, block_size)
        for name, text in experiment.texts.items()
    }
    gated = {name: mix_log_probs(base[name], joint[name], weights[name]) for name in near}
    needs_teacher = "adapted" in (keys, partner)
    folders = [f"datastore-{keys}", *(["adapt"] if needs_teacher else [])]
    return {
        "stage_seconds": {folder: experiment.seconds(folder) for folder in folders},
        "parameters": load_shape(adapted(experiment)).num_parameters() if needs_teacher else 0,
        "key_bytes": _key_bytes(experiment),
        "lmbda": lmbda,
        "temperature": temperature,
        "mean_gate": {name: lmbda * float(weight.mean()) for name, weight in weights.items()},
        **_against_base(experiment, base, near, joint, gated),
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
    base = score(experiment, "base", experiment.base)
    name = "adapted" if setting["kind"] == "adapted" else setting["name"]
    scores = score(experiment, name, *models)
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
        "keys_to_weights": _key_bytes(experiment) / (2 * parameters),
        "lmbda": lmbda,
        "mean_gate": {name: float(weight.mean()) for name, weight in weights.items()},
        **_against_base(experiment, labels, alone, joint, gated),
    }


def _label_scores(scores: Mapping[str, LabelScores]) -> ByText:
    return {name: one.log_probs for name, one in scores.items()}


def _perplexities(experiment: Experiment, log_probs: ByText) -> dict[str, Any]:
    block_size = experiment.how["block_size"]
    return {
        name: perplexity(values, experiment.texts[name], block_size)
        for name, values in log_probs.items()
    }


def _against_base(
    experiment: Experiment, base: ByText, alone: ByText, joint: ByText, gated: ByText
) -> Row:
    """Perplexities; on test, what mixtures with the base do to the rarest tokens and function words."""
    labels = experiment.texts["test"].labels
    train, corpus = experiment.corpus.split("train"), experiment.corpus
    rarest = rarest_decile(train, labels, corpus.vocab_size)
    words = function_words(corpus.tokenizer(), labels)
    mixtures = {"joint": joint, "gated": gated}
    pairs = {how: (base["test"], found["test"]) for how, found in mixtures.items()}
    return {
        "perplexity": {
            how: _perplexities(experiment, found)
            for how, found in {"alone": alone, **mixtures}.items()
        },
        "tail_gain": {how: median_gain(*pair, rarest) for how, pair in pairs.items()},
        "function_words": {how: mean_change(*pair, words) for how, pair in pairs.items()},
    }


def _key_bytes(experiment: Experiment) -> int:
    """Of a datastore of the train tokens, its keys in 16 bits."""
    width = load_shape(experiment.base).config.get_text_config().hidden_size
    return 2 * width * experiment.corpus.split("train").positions
