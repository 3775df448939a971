"""Scores each contender of an evaluation: log p(label) at every held-out position."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from memdec.data.artefact import StageWriter, check_input, check_option
from memdec.data.corpus import SPLITS, TokenCorpus, TokenStream
from memdec.data.datastore import Datastore
from memdec.data.targets import TargetStore
from memdec.evaluation.forward import check_model, label_scores
from memdec.evaluation.knn_lm import score_neighbours
from memdec.evaluation.options import EvalConfig
from memdec.evaluation.outside import read_outside, stream_name
from memdec.modeling.loading import (
    compare_tokenizers,
    has_tokenizer,
    load_model,
    load_tokenizer,
    model_fingerprint,
    pick_device,
)

KNN = "kNN"
GATED = ("base", "memory")  # whose confidence the gate looks at


@dataclass(frozen=True)
class Scored:
    """What a contender scored and what it costs.

    Attributes:
        log_probs: float32 [positions] per split, and per text outside the domain
            (:func:`memdec.evaluation.outside.stream_name`); for kNN the neighbours alone, without
            the base.
        confidence: float32 [positions, 2] per split, of base and memory
            (:func:`memdec.modeling.gate.confidence`).
        seconds: for the reported split.
        parameters: of the models it needs beside the base.
        bytes: of those models, and of the datastore.
    """

    log_probs: dict[str, np.ndarray]
    confidence: dict[str, np.ndarray]
    seconds: float
    parameters: int
    bytes: int


class Contenders:
    """The models and the datastore of an evaluation, checked to belong together.

    Raises:
        MemdecError: another tokenizer, or a datastore of another teacher, of other tokens or with
            documents isolated otherwise.
    """

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        self.device = pick_device(config.device)
        self.corpus = TokenCorpus.open(config.tokens)
        self.models = {"base": config.base, "memory": config.memory, **config.other_models()}
        self.teacher = config.teacher or config.base
        isolated = config.isolate_documents
        self.streams: dict[str, TokenStream] = {
            split: self.corpus.split(split, isolate_documents=isolated)
            for split in dict.fromkeys(("validation", config.split))
        }
        self.datastore: Datastore | None = None
        tokenizer = self.corpus.tokenizer()
        for name, model in self.models.items():
            if has_tokenizer(model):
                compare_tokenizers(load_tokenizer(model), tokenizer, (name, "the tokens"))
        if config.datastore is not None and config.targets is not None:
            self.datastore = Datastore.open(config.datastore, str(self.device))
            self.targets = TargetStore.open(config.targets)
            check_input(self.datastore.artefact, "tokens", self.corpus.fingerprint)
            check_input(self.datastore.artefact, "model", model_fingerprint(self.teacher))
            check_input(self.targets.artefact, "datastore", self.datastore.fingerprint)
            check_option(self.datastore.artefact, "isolate_documents", isolated, False)
        longest = self.positions(config.split)
        self.outside: dict[str, str] = {}
        for name, path in config.outside_texts().items():
            text = read_outside(path, self.corpus, tokenizer, longest, isolate_documents=isolated)
            self.streams[stream_name(name)], self.outside[name] = text

    def fingerprints(self) -> dict[str, str]:
        """Of everything that is read, by name."""
        found = {name: model_fingerprint(model) for name, model in self.models.items()}
        found["tokens"] = self.corpus.fingerprint
        found |= {stream_name(name): text for name, text in self.outside.items()}
        if self.datastore is not None:
            found["datastore"] = self.datastore.fingerprint
            found["targets"] = self.targets.artefact.fingerprint
        return found

    def positions(self, name: str) -> int:
        """How many positions of a stream are evaluated: whole blocks, or all."""
        there, wanted = self.streams[name].positions, self.config.positions
        if wanted is None:
            return there
        whole_blocks = -(-wanted // self.config.block_size) * self.config.block_size
        return min(whole_blocks, there)

    @property
    def datastore_bytes(self) -> int | None:
        """What the datastore takes on disk."""
        if self.datastore is None:
            return None
        return sum(file["bytes"] for file in self.datastore.artefact.manifest["files"].values())

    def score(self, writer: StageWriter) -> dict[str, Scored]:
        """Scores by contender; a contender scored in an earlier run is read back."""
        scored = {
            name: self._keep(writer, name, model, self._score_model)
            for name, model in self.models.items()
        }
        if self.datastore is not None:
            scored[KNN] = self._keep(writer, KNN, self.teacher, self._score_knn)
        return scored

    def _keep(
        self,
        writer: StageWriter,
        name: str,
        model_name: str,
        score: Callable[[str, PreTrainedModel, str], dict[str, np.ndarray]],
    ) -> Scored:
        if writer.note(name) is None:
            model = load_model(model_name, device=self.device, dtype=self.config.dtype)
            check_model(
                model,
                self.config.block_size,
                self.corpus.vocab_size,
                isolate_documents=self.config.isolate_documents,
            )
            weights = list(model.parameters())
            facts: dict[str, float] = {
                "parameters": sum(weight.numel() for weight in weights),
                "bytes": sum(weight.numel() * weight.element_size() for weight in weights),
            }
            if name == KNN:
                facts = self._knn_size(facts)
            for split in self.streams:
                start = time.monotonic()
                arrays = score(name, model, split)
                if split == self.config.split:
                    facts["seconds"] = time.monotonic() - start
                for folder, array in arrays.items():
                    writer.write(_file(folder, split, name), partial(np.save, arr=array))
            writer.set_note(name, facts)

        def kept(folder: str) -> dict[str, np.ndarray]:
            files = {split: _file(folder, split, name) for split in self.streams}
            return {split: np.load(writer.file(file)) for split, file in files.items()}

        confidence = kept("confidence") if name in GATED else {}
        return Scored(kept("scores"), confidence, **writer.note(name))

    def _knn_size(self, teacher: dict[str, float]) -> dict[str, float]:
        """What the kNN-LM needs beside the base: the datastore, and a teacher other than the base."""
        stored = self.datastore_bytes
        assert stored is not None
        if model_fingerprint(self.teacher) == model_fingerprint(self.config.base):
            return {"parameters": 0, "bytes": stored}
        return {"parameters": teacher["parameters"], "bytes": teacher["bytes"] + stored}

    def _score_model(self, name: str, model: PreTrainedModel, split: str) -> dict[str, np.ndarray]:
        scores = label_scores(
            model,
            with_confidence=name in GATED,
            **self._pass_over(split),
            description=f"{name} on {split}",
        )
        scores.check(f"{name} on {split}")
        arrays = {"scores": scores.log_probs, "confidence": scores.confidence}
        return {folder: array for folder, array in arrays.items() if array is not None}

    def _score_knn(self, name: str, model: PreTrainedModel, split: str) -> dict[str, np.ndarray]:
        assert self.datastore is not None
        log_probs = score_neighbours(
            model,
            datastore=self.datastore,
            k=self.targets.k,
            temperature=self.targets.temperature,
            **self._pass_over(split),
            description=f"{name} on {split}",
        )
        return {"scores": log_probs}

    def _pass_over(self, split: str) -> dict[str, Any]:
        """What every pass over a stream is given."""
        return {
            "stream": self.streams[split],
            "block_size": self.config.block_size,
            "batch_blocks": self.config.batch_blocks,
            "vocab_size": self.corpus.vocab_size,
            "positions": self.positions(split),
        }


def _file(folder: str, stream: str, contender: str) -> str:
    """Where scores lie. Names of texts and of models may hold hyphens, so these do not part them."""
    between = "-" if stream in SPLITS else "/"
    return f"{folder}/{stream}{between}{contender}.npy"
