"""The stage ``train``: a memory distilled from the sparse targets, or the neighbours, of a kNN-LM."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from memdec.config import option, require, require_temperature
from memdec.console import say
from memdec.data.artefact import Artefact, StageWriter, check_input, check_option
from memdec.data.corpus import TokenCorpus
from memdec.data.targets import TargetStore
from memdec.errors import MemdecError
from memdec.training.options import LoopConfig

if TYPE_CHECKING:  # torch and transformers are slow to import, and --help needs the config alone
    from accelerate import PartialState
    from transformers import PreTrainedModel

    from memdec.training.batch_targets import BatchTargets
    from memdec.training.trainer import Validate

KIND = "train"

_NOT_A_MODEL = ("teacher", "fresh")
_OF_NEIGHBOURS = ("temperature", "k", "max_entries")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """Options of ``memdec train``."""

    tokens: Path = option(help="directory of the stage prepare")
    targets: Path = option(help="directory of the stage targets")
    base: str = option(help="frozen model the memory will sit beside; used in validation only")
    teacher: str = option(help="model whose keys made the targets")
    memory_init: str = option(
        "teacher", help="where the memory starts: teacher, fresh, or a model directory or hub name"
    )
    memory_layers: int | None = option(None, help="keep this many layers, evenly spaced")
    memory_width: int | None = option(None, help="width of a fresh memory")
    memory_vocabulary: Literal["own", "mean", "random"] = option(
        "own",
        help="embeddings and output of a memory_init with another tokenizer than the tokens': mean, "
        "of the old tokens that spell a new one, or random; own: the tokenizers must agree",
    )
    alpha: float = option(0.5, help="weight of the KL term; 1 - alpha is the cross-entropy's")
    temperature: float | None = option(
        None, help="of kept neighbours: divides the squared distances; by default that of targets"
    )
    k: int | None = option(None, help="of kept neighbours: so many of the nearest; by default all")
    max_entries: int | None = option(
        None, help="of kept neighbours: most tokens of a row's target; by default all"
    )
    learning_rate: float = option(1e-4, help="peak learning rate of AdamW")

    def check(self) -> None:
        super().check()
        require(0 <= self.alpha <= 1, "alpha", "in [0, 1]", self.alpha)
        for name in ("memory_layers", "memory_width", "k", "max_entries"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "at least 1", value)
        if self.temperature is not None:
            require_temperature(self.temperature)
        if self.memory_width is not None and self.memory_init != "fresh":
            raise MemdecError("memory_width goes with memory_init fresh only")
        if self.memory_vocabulary != "own" and self.memory_init in _NOT_A_MODEL:
            raise MemdecError(
                "memory_vocabulary goes with a memory_init that is a model of its own, "
                f"got {self.memory_init!r}"
            )

    def check_kept(self, neighbours: int | None) -> None:
        """Raises :class:`MemdecError` for an option that the targets cannot follow.

        Args:
            neighbours: how many of a row they keep; None where they are distributions.
        """
        for name in _OF_NEIGHBOURS:
            if neighbours is None and getattr(self, name) is not None:
                raise MemdecError(
                    f"{name} goes with kept neighbours (targets with keep=neighbours), "
                    "these targets are distributions already"
                )
        if self.k is not None and neighbours is not None:
            expected = f"at most {neighbours}, the neighbours that targets keeps"
            require(self.k <= neighbours, "k", expected, self.k)


def train(config: TrainConfig, out: Path) -> Artefact:
    """Trains a memory on ``alpha * KL(target || memory) + (1 - alpha) * CE`` (arXiv 2508.09874).

    The weights kept are those of the validation where base and memory together are best.

    Writes ``memory/``, an ordinary transformers directory with the tokenizer, ``base.npy``, the
    base's float32 log-probabilities on validation, and ``curve.json``, a row a validation
    (:func:`memdec.training.trainer.fit`) with the memory's ``nll``, and ``joint_nll`` at ``lmbda``.

    Raises:
        MemdecError: inputs that do not belong together, named with both fingerprints; a target row
            that is not of its position and label; a loss that is no longer finite.
    """
    from memdec.evaluation.forward import check_model
    from memdec.modeling.loading import (
        compare_tokenizers,
        has_tokenizer,
        load_tokenizer,
        model_fingerprint,
        tokenizer_fingerprint,
    )
    from memdec.modeling.memory_init import initial_memory
    from memdec.modeling.vocabulary import transfer_vocabulary
    from memdec.processes import join_processes, shared_stage
    from memdec.training.trainer import best_row, fit

    processes = join_processes(config.device)
    corpus = TokenCorpus.open(config.tokens)
    store = TargetStore.open(config.targets)
    check_input(store.artefact, "tokens", corpus.fingerprint)
    check_input(store.artefact, "model", model_fingerprint(config.teacher))
    isolated = config.isolate_documents
    check_option(store.artefact, "isolate_documents", isolated, False)
    tokenizer = corpus.tokenizer()
    models = {"base": config.base, "teacher": config.teacher}
    if config.memory_init not in _NOT_A_MODEL:
        models["memory_init"] = config.memory_init
    transferred = config.memory_vocabulary != "own"
    for name, model in models.items():
        if has_tokenizer(model) and not (transferred and name == "memory_init"):
            compare_tokenizers(load_tokenizer(model), tokenizer, (name, "the tokens"))
    params = config.training_params()
    for name in ("memory_layers", "memory_width", "alpha"):
        params[name] = getattr(config, name)
    if config.memory_init in _NOT_A_MODEL:
        params["memory_init"] = config.memory_init
    if transferred:  # the manifest says so where it is
        params["memory_vocabulary"] = config.memory_vocabulary
    targets, chosen = _batch_targets(config, store)
    params |= chosen
    inputs = {name: model_fingerprint(model) for name, model in models.items()}
    inputs |= {"tokens": corpus.fingerprint, "targets": store.artefact.fingerprint}
    if transferred:
        old_tokenizer = load_tokenizer(config.memory_init)
        inputs["memory_tokenizer"] = tokenizer_fingerprint(old_tokenizer)
    with shared_stage(processes, out, KIND, params, inputs) as writer:
        if writer.finished:
            say(f"train: already done in {out}")
            return Artefact.open(out, KIND)
        memory = initial_memory(
            config.teacher,
            config.memory_init,
            layers=config.memory_layers,
            width=config.memory_width,
            seed=config.seed,
        )
        if config.memory_vocabulary != "own":
            memory = transfer_vocabulary(
                memory, old_tokenizer, tokenizer, config.memory_vocabulary, seed=config.seed
            )
        check_model(memory, store.block_size, corpus.vocab_size, isolate_documents=isolated)
        curve = fit(
            processes,
            writer,
            "memory",
            memory,
            tokenizer,
            corpus.split("train", isolate_documents=isolated),
            config,
            block_size=store.block_size,
            validate=_joint_validation(config, processes, writer, corpus, store.block_size),
            targets=targets,
            alpha=config.alpha,
        )
        parameters = sum(weight.numel() for weight in memory.parameters())
        if processes.is_main_process:
            writer.finish(best=best_row(curve), parameters=parameters)
        processes.wait_for_everyone()
        return Artefact.open(out, KIND)


def _batch_targets(
    config: TrainConfig, store: TargetStore
) -> tuple[BatchTargets, dict[str, float | int | None]]:
    """Where the target rows come from, and what was chosen for them, for the manifest."""
    from memdec.modeling.loading import pick_device
    from memdec.training.batch_targets import StoredNeighbours, StoredTargets

    config.check_kept(store.k if store.keeps_neighbours else None)
    if not store.keeps_neighbours:
        on_gpu = pick_device(config.device).type == "cuda"
        return StoredTargets(store, pin_memory=on_gpu), {}
    neighbours = StoredNeighbours(
        store,
        k=config.k or store.k,
        temperature=config.temperature or store.temperature,
        max_entries=config.max_entries,
    )
    return neighbours, {name: getattr(neighbours, name) for name in _OF_NEIGHBOURS}


def _joint_validation(
    config: TrainConfig,
    processes: PartialState,
    writer: StageWriter,
    corpus: TokenCorpus,
    block_size: int,
) -> Validate:
    """Scores a memory by the nll of base and memory at the best lmbda on validation."""
    from memdec.evaluation.forward import check_model, label_scores
    from memdec.evaluation.mixture import best_lmbda
    from memdec.modeling.loading import load_model

    isolated = config.isolate_documents

    def score(model: PreTrainedModel, description: str | None = None) -> np.ndarray:
        return label_scores(
            model,
            corpus.split("validation", isolate_documents=isolated),
            block_size=block_size,
            batch_blocks=config.batch_blocks,
            vocab_size=corpus.vocab_size,
            description=description,
        ).log_probs

    if processes.is_main_process and not writer.has("base.npy"):
        base_model = load_model(config.base, device=config.device)
        check_model(base_model, block_size, corpus.vocab_size, isolate_documents=isolated)
        array = score(base_model, "base on validation")
        writer.write("base.npy", lambda file: np.save(file, array))
    processes.wait_for_everyone()
    base = np.load(writer.file("base.npy"))

    def validate(memory: PreTrainedModel) -> dict[str, float]:
        log_probs = score(memory)
        lmbda, joint_nll = best_lmbda(base, log_probs)
        nll = -float(log_probs.mean(dtype=np.float64))
        return {"nll": nll, "joint_nll": joint_nll, "lmbda": lmbda, "score": joint_nll}

    return validate
