"""The stage ``adapt``: a language model trained further on the domain, to be the teacher."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from memdec.config import option, require
from memdec.console import say
from memdec.data.artefact import Artefact
from memdec.training.options import LoopConfig

if TYPE_CHECKING:  # torch and transformers are slow to import, and --help needs the config alone
    from transformers import PreTrainedModel

    from memdec.data.corpus import TokenStream
    from memdec.training.trainer import Validate

KIND = "adapt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptConfig(LoopConfig):
    """Options of ``memdec adapt``."""

    model: str = option(help="model to adapt: directory, hub name or .gguf file")
    tokens: Path = option(help="directory of the stage prepare")
    block_size: int = option(1024, help="tokens of context in a block")

    def check(self) -> None:
        super().check()
        require(self.block_size >= 1, "block_size", "at least 1", self.block_size)


def adapt(config: AdaptConfig, out: Path) -> Artefact:
    """Trains a model on the train tokens and keeps the weights of its best validation.

    Writes ``model/``, an ordinary transformers directory with the tokenizer, and ``curve.json``, a
    row a validation (:func:`memdec.training.trainer.fit`) with its ``nll``.

    Raises:
        MemdecError: a tokenizer other than the tokens', a corpus shorter than a block, a block
            longer than the model's context, a model that cannot isolate documents, a loss that is no
            longer finite.
    """
    from memdec.data.corpus import TokenCorpus
    from memdec.evaluation.forward import check_blocks, check_model
    from memdec.modeling.loading import (
        compare_tokenizers,
        load_model,
        load_tokenizer,
        model_fingerprint,
    )
    from memdec.processes import join_processes, shared_stage
    from memdec.training.trainer import best_row, fit

    processes = join_processes(config.device)

    corpus = TokenCorpus.open(config.tokens)
    tokenizer = corpus.tokenizer()
    compare_tokenizers(load_tokenizer(config.model), tokenizer, (config.model, str(config.tokens)))
    isolated = config.isolate_documents
    train = corpus.split("train", isolate_documents=isolated)
    validation = corpus.split("validation", isolate_documents=isolated)
    check_blocks(train, config.block_size)
    params = {**config.training_params(), "block_size": config.block_size}
    inputs = {"model": model_fingerprint(config.model), "tokens": corpus.fingerprint}

    with shared_stage(processes, out, KIND, params, inputs) as writer:
        if writer.finished:
            say(f"adapt: already done in {out}")
            return Artefact.open(out, KIND)
        model = load_model(config.model)
        check_model(model, config.block_size, corpus.vocab_size, isolate_documents=isolated)
        curve = fit(
            processes,
            writer,
            "model",
            model,
            tokenizer,
            train,
            config,
            block_size=config.block_size,
            validate=validate_on(validation, config),
        )
        if processes.is_main_process:
            writer.finish(best=best_row(curve))
        processes.wait_for_everyone()
        return Artefact.open(out, KIND)


def validate_on(validation: TokenStream, config: AdaptConfig) -> Validate:
    """Scores a model by its mean nll on a stream."""
    from memdec.evaluation.forward import label_scores

    def validate(model: PreTrainedModel) -> dict[str, float]:
        scores = label_scores(
            model,
            validation,
            block_size=config.block_size,
            batch_blocks=config.batch_blocks,
            vocab_size=validation.vocab_size,
        ).log_probs
        nll = -float(scores.mean(dtype=float))
        return {"nll": nll, "score": nll}

    return validate
