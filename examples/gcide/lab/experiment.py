"""The stages behind the rows, each run when a row first needs it, and the scores of what they make."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from lab.blended import Ensemble, blended_rows
from lab.residual import residual_targets
from lab.retrieval import Pieces, retrieve
from lab.sampled import extend_with_samples
from lab.scores import ScoreFile
from lab.texts import Text
from memdec.data.calibration import choose, teacher_forced
from memdec.data.corpus import TokenCorpus
from memdec.data.datastore import Datastore, DatastoreConfig, datastore
from memdec.data.targets import SEARCHED, TargetsConfig, TargetStore, targets
from memdec.evaluation.forward import LabelScores, label_scores
from memdec.evaluation.knn_lm import score_neighbours
from memdec.info import sections
from memdec.modeling.loading import (
    compare_tokenizers,
    load_model,
    load_shape,
    load_tokenizer,
    model_fingerprint,
    pick_device,
)
from memdec.modeling.memory_init import keep_layers
from memdec.training.adapt import AdaptConfig, adapt
from memdec.training.distill import TrainConfig, train

SCORING_BLOCKS = 8
KNN_K = 512


class Experiment:
    """One base, one domain, one seed, one folder of work.

    The seed is that of every training and sampling. What does not depend on it (the base, its scores,
    what was retrieved) lies in the folder itself, and so does all of seed 0; another seed has a folder
    in it.

    Attributes:
        how: how a text passes through a model, as :func:`memdec.evaluation.forward.label_scores`
            takes it: blocks, each a context of its own.
        texts: the held-out texts by name: ``validation``, ``test``, and those outside the domain.
        outside: names of the latter.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        base: str,
        tokens: Path,
        outside: Mapping[str, str],
        work: Path,
        device: str,
        seed: int = 0,
    ) -> None:
        self._arguments = (settings, base, tokens, outside, work, device)
        self.settings = settings
        self.tokens = tokens
        self.shared = work
        self.work = work / f"seed-{seed}" if seed else work
        self.seed = seed
        self.device = str(pick_device(device))
        self.corpus = TokenCorpus.open(tokens)
        self.outside = list(outside)
        self.base = self._as_directory(base)
        self.how = {
            "block_size": settings["block_size"],
            "batch_blocks": SCORING_BLOCKS,
            "vocab_size": self.corpus.vocab_size,
        }
        corpora = {name: TokenCorpus.open(path) for name, path in outside.items()}
        for name, other in corpora.items():
            compare_tokenizers(other.tokenizer(), self.corpus.tokenizer(), (name, str(tokens)))
        streams = {name: self.corpus.split(name) for name in ("validation", "test")}
        streams |= {name: other.split("test") for name, other in corpora.items()}
        most = settings["positions"]
        self.texts = {
            name: Text(stream, min(stream.positions, most)) for name, stream in streams.items()
        }
        self._inputs = {name: other.fingerprint for name, other in corpora.items()}
        self._kept: dict[str, Any] = {}

    def of_seed(self, seed: int) -> Experiment:
        """The same with another seed."""
        if seed == self.seed:
            return self
        return self._once(f"seed {seed}", lambda: Experiment(*self._arguments, seed))

    def facts(self) -> dict[str, Any]:
        """What every row shares; a result of other facts is of another experiment."""
        inputs = {"base": model_fingerprint(self.base), "tokens": self.corpus.fingerprint}
        return {
            "settings": {name: part for name, part in self.settings.items() if name != "rows"},
            "inputs": {**inputs, **self._inputs},
            "train_tokens": self.corpus.split("train").positions,
            "held_out": {name: text.positions for name, text in self.texts.items()},
            "outside": self.outside,
            "seed": self.seed,
        }

    def machine(self) -> dict[str, str]:
        on_gpu = self.device.startswith("cuda")
        return {
            "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
            **sections()["versions"],
            **{package: _version(package) for package in ("peft", "bm25s")},
        }

    def adapted(self) -> str:
        """The adapted teacher, which is also what plain fine-tuning gives."""
        return self._once("adapt", lambda: self._adapt({}, self.work / "adapt"))

    def tuned(self, setting: Mapping[str, Any]) -> str:
        """Plain fine-tuning with a row's own options, for comparison."""
        return self._adapt(setting["train"], self.folder(setting))

    def _adapt(self, changes: Mapping[str, Any], out: Path) -> str:
        adapt(self._adapt_config(changes), out)
        self._free()
        return str(out / "model")

    def lora(self, setting: Mapping[str, Any]) -> tuple[str, int]:
        """The base with a row's adapter merged into it, and the adapter's number of parameters."""
        from lab.lora import lora  # needs peft

        out = self.folder(setting)
        parameters = lora(self._adapt_config(setting["train"]), out, setting["adapter"])
        self._free()
        return str(out / "model"), parameters

    def _adapt_config(self, changes: Mapping[str, Any]) -> AdaptConfig:
        placement = {"device": self.device, "block_size": self.settings["block_size"]}
        options = {**self.settings["adapt"], **changes, **placement, "seed": self.seed}
        return AdaptConfig(model=self.base, tokens=self.tokens, **options)

    def datastore(self, keys: str) -> Datastore:
        """The keys of the ``adapted`` teacher or of the ``base``."""
        out = self.work / f"datastore-{keys}"

        def run() -> Datastore:
            options = {"block_size": self.settings["block_size"], **self.settings["datastore"]}
            options |= {"model": self.model(keys), "tokens": self.tokens, "device": self.device}
            datastore(DatastoreConfig(**options), out)
            return Datastore.open(out, self.device)

        return self._once(out.name, run)

    def targets(self, name: str) -> Path:
        """Targets of the settings' name."""
        options = dict(self.settings["targets"][name])
        out = self.work / f"targets-{name}"
        if "residual_of" in options:
            taught = TargetStore.open(self.targets(options.pop("residual_of")))
            return self._once(
                out.name,
                lambda: residual_targets(
                    self.base, taught, self.corpus, out, device=self.device, **options
                ),
            )
        tokens = self.tokens_of(name)
        for sampling in ("sampled", "tokens_of"):
            options.pop(sampling, None)
        if "seeds" in options:
            options = {"source": "file", "file": self._blended(name, tokens, options)}
        if options["source"] in SEARCHED:
            options["datastore"] = self.datastore("adapted").artefact.path
        else:
            options["block_size"] = self.settings["block_size"]

        def run() -> Path:
            config = TargetsConfig(
                tokens=tokens, model=self.adapted(), device=self.device, **options
            )
            return targets(config, out).path

        return self._once(out.name, run)

    def _blended(self, name: str, tokens: Path, options: dict[str, Any]) -> Path:
        """Rows of several teachers, or of one, with neighbours if `options` name targets of them."""
        options = {"max_entries": None, **options, "block_size": self.settings["block_size"]}
        seeds = options.pop("seeds")
        teachers = [self.of_seed(seed).adapted() for seed in self.seeds(seeds)]
        near, lmbda = None, 0.0
        if "neighbours" in options:
            near = TargetStore.open(self.targets(options.pop("neighbours")))
            lmbda = near.artefact.manifest["calibration"]["lmbda"]
        corpus = TokenCorpus.open(tokens)
        out = self.work / f"rows-{name}"
        rows = blended_rows(
            teachers, corpus, near, out, lmbda=lmbda, device=self.device, options=options
        )
        self._free()
        return rows

    def seeds(self, listed: Sequence[int] | str) -> list[int]:
        """Seeds as the settings list them: numbers, or ``own``."""
        return [self.seed] if listed == "own" else list(listed)

    def tokens_of(self, name: str) -> Path:
        """What the targets of that name are rows of: the train tokens, or samples too."""
        targets = self.settings["targets"]
        name = targets[name].get("tokens_of", name)
        options = targets[name].get("sampled")
        if options is None:
            return self.tokens
        out = self.work / f"sampled-{name}"
        options = {**options, "device": self.device, "seed": self.seed}
        teacher = self.adapted()
        return self._once(
            out.name, lambda: extend_with_samples(teacher, self.corpus, out, **options)
        )

    def memory(self, setting: Mapping[str, Any]) -> str:
        """Trains the memory of a row."""
        out = self.folder(setting)
        layers = setting.get("layers")
        start = {"adapted": "teacher", "base": self.base}[setting.get("init", "adapted")]
        if isinstance(layers, list):
            start, layers = self._chosen_layers(setting), None
        config = TrainConfig(
            tokens=self.tokens_of(setting["targets"]),
            targets=self.targets(setting["targets"]),
            base=self.base,
            teacher=self.adapted(),
            memory_init=start,
            memory_layers=layers,
            device=self.device,
            seed=self.seed,
            **{**self.settings["train"], **setting["train"]},
        )
        train(config, out)
        self._free()
        return str(out / "memory")

    def folder(self, setting: Mapping[str, Any]) -> Path:
        """Where a row's own training lies."""
        return self.work / f"train-{_file_name(setting['name'])}"

    def model(self, name: str) -> str:
        return {"base": lambda: self.base, "adapted": self.adapted}[name]()

    def scores(self, name: str, *models: str) -> dict[str, LabelScores]:
        """The answers of a model, or of several models' mean, to every text, made once.

        `name` is the file's.
        """
        work = self.shared if models == (self.base,) else self.work
        file = ScoreFile(work / "scores" / f"{_file_name(name)}.npz")
        fingerprint = " ".join(model_fingerprint(model) for model in models)
        found = file.read(fingerprint, self.texts)
        if found is None:
            if len(models) == 1:
                loaded = load_model(*models, device=self.device)
            else:
                loaded = Ensemble.load(models, device=self.device)
            found = {
                name: label_scores(
                    loaded, text.stream, positions=text.positions, with_confidence=True, **self.how
                )
                for name, text in self.texts.items()
            }
            file.write(fingerprint, found)
        return found

    def neighbours(self, keys: str) -> int:
        """How many of them count, of the datastore of `keys`."""
        return min(KNN_K, self.datastore(keys).size)

    def query_model(self, keys: str) -> PreTrainedModel:
        """The model of a datastore, in the dtype in which the keys were made."""
        dtype = self.datastore(keys).artefact.manifest["params"]["dtype"]
        return load_model(self.model(keys), device=self.device, dtype=dtype)

    def weigh_neighbours(self, keys: str, beside: np.ndarray, positions: int) -> dict[str, Any]:
        """``temperature`` and ``lmbda`` of a kNN-LM, chosen on the head of validation.

        Args:
            beside: log p(label) on validation of what the neighbours are mixed with.
            positions: of validation, at most.
        """
        store = self.datastore(keys)
        wanted = min(positions, len(beside))
        queries, _, labels = teacher_forced(
            self.model(keys), store, self.corpus, "validation", wanted
        )
        distances, ids = store.search(queries, self.neighbours(keys))
        return choose(beside[: len(queries)], distances, store.neighbor_tokens(ids), labels)

    def near(self, keys: str, temperature: float) -> dict[str, np.ndarray]:
        """Log p(label) among the nearest keys by text; rows at one temperature share a search."""

        def run() -> dict[str, np.ndarray]:
            store, model = self.datastore(keys), self.query_model(keys)
            options = {"k": self.neighbours(keys), "temperature": temperature, **self.how}
            return {
                name: score_neighbours(
                    model, text.stream, store, positions=text.positions, **options
                )
                for name, text in self.texts.items()
            }

        return self._once(f"near {keys} {temperature}", run)

    def retrieved(self, stride: int, query_tokens: int) -> dict[str, Pieces]:
        """Train entries found for every text by BM25."""
        inputs = {"tokens": self.corpus.fingerprint, **self._inputs}
        return retrieve(
            self.corpus,
            self.texts,
            self.shared / "retrieved",
            inputs,
            block_size=self.settings["block_size"],
            stride=stride,
            query_tokens=query_tokens,
        )

    def key_bytes(self) -> int:
        """Of a datastore of the train tokens, its keys in 16 bits."""
        width = load_shape(self.base).config.get_text_config().hidden_size
        return 2 * width * self.corpus.split("train").positions

    def seconds(self, folder: str | Path) -> float:
        """What a stage took, in the run that finished it."""
        return float(json.loads((self.work / folder / "timing.json").read_text())["seconds"])

    def curve(self, folder: str | Path) -> list[dict[str, float]]:
        """A row a validation of a training."""
        curve: list[dict[str, float]] = json.loads((self.work / folder / "curve.json").read_text())
        return curve

    def _once(self, name: str, run: Callable[[], Any]) -> Any:
        if name not in self._kept:
            self._kept[name] = run()
            self._free()
        return self._kept[name]

    @staticmethod
    def _free() -> None:
        """Gives the GPU's memory back: the next stage has other sizes."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _as_directory(self, base: str) -> str:
        """A .gguf file as a model directory, which loads in a second instead of twenty."""
        if not base.endswith(".gguf"):
            return base
        target = self.shared / "base"
        if not target.is_dir():
            temporary = target.with_suffix(f".{os.getpid()}.tmp")
            load_model(base).save_pretrained(temporary)
            load_tokenizer(base).save_pretrained(temporary)
            if not target.is_dir():  # another seed's run may have been faster
                temporary.rename(target)
        return str(target)

    def _chosen_layers(self, setting: Mapping[str, Any]) -> str:
        """A model directory with the layers that a row lists."""
        source = self.model(setting.get("init", "adapted"))
        target = self.work / f"init-{_file_name(setting['name'])}"
        if not target.is_dir():
            temporary = target.with_suffix(".tmp")
            keep_layers(load_model(source), setting["layers"]).save_pretrained(temporary)
            self.corpus.tokenizer().save_pretrained(temporary)
            temporary.rename(target)
        return str(target)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _file_name(name: str) -> str:
    return re.sub(r"\W+", "-", name.strip().lower())
