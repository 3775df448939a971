"""The datastores of an experiment, and the kNN-LM that each makes (arXiv 1911.00172)."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedModel

from lab.experiment import Experiment
from lab.tuning import model_named
from memdec.data.calibration import choose, teacher_forced
from memdec.data.datastore import Datastore, DatastoreConfig, datastore
from memdec.evaluation.knn_lm import score_neighbours
from memdec.modeling.loading import load_model

KNN_K = 512


def open_datastore(experiment: Experiment, keys: str) -> Datastore:
    """The keys of the ``adapted`` teacher or of the ``base``; made where they are missing."""
    out = experiment.work / f"datastore-{keys}"

    def run() -> Datastore:
        options = {"block_size": experiment.settings["block_size"]}
        options |= {"model": model_named(experiment, keys), "tokens": experiment.tokens}
        options |= {"device": experiment.device, **experiment.settings["datastore"]}
        datastore(DatastoreConfig(**options), out)
        return Datastore.open(out, experiment.device)

    return experiment.once(out, run)


def k_of(store: Datastore) -> int:
    """How many neighbours count."""
    return min(KNN_K, store.size)


def query_model(experiment: Experiment, keys: str) -> PreTrainedModel:
    """The model of a datastore, in the dtype in which the keys were made."""
    dtype = open_datastore(experiment, keys).artefact.manifest["params"]["dtype"]
    return load_model(model_named(experiment, keys), device=experiment.device, dtype=dtype)


def weigh_neighbours(
    experiment: Experiment, keys: str, beside: np.ndarray, positions: int
) -> dict[str, Any]:
    """``temperature`` and ``lmbda`` of a kNN-LM, chosen on the head of validation.

    Args:
        beside: log p(label) on validation of what the neighbours are mixed with.
        positions: of validation, at most.
    """
    store = open_datastore(experiment, keys)
    wanted = min(positions, len(beside))
    queries, _, labels = teacher_forced(
        model_named(experiment, keys), store, experiment.corpus, "validation", wanted
    )
    distances, ids = store.search(queries, k_of(store))
    return choose(beside[: len(queries)], distances, store.neighbor_tokens(ids), labels)


def neighbour_log_probs(
    experiment: Experiment, keys: str, temperature: float
) -> dict[str, np.ndarray]:
    """Log p(label) among the nearest keys by text; rows at one temperature share a search."""

    def run() -> dict[str, np.ndarray]:
        store, asking = open_datastore(experiment, keys), query_model(experiment, keys)
        options = {"k": k_of(store), "temperature": temperature, **experiment.how}
        return {
            name: score_neighbours(asking, text.stream, store, positions=text.positions, **options)
            for name, text in experiment.texts.items()
        }

    return experiment.once(f"neighbours of {keys} at {temperature}", run)
