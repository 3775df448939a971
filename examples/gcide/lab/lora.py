"""Low-rank adaptation of the base (LoRA, arXiv 2106.09685): a rival that is cheap to keep.

The loop, the data and the choice of the best validation are those of ``memdec adapt``; only the
adapter learns. Needs the package peft (``pip install 'memdec[rivals]'``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model

from memdec.data.artefact import stage
from memdec.data.corpus import TokenCorpus
from memdec.modeling.loading import load_model, model_fingerprint
from memdec.processes import join_processes
from memdec.training.adapt import AdaptConfig, validate_on
from memdec.training.trainer import best_row, fit


def lora(config: AdaptConfig, out: Path, adapter: Mapping[str, Any]) -> int:
    """Trains an adapter; ``model/`` holds the base with it merged, ``adapter/`` the adapter alone.

    Args:
        adapter: options of peft's ``LoraConfig``.

    Returns:
        The adapter's number of parameters.
    """
    corpus = TokenCorpus.open(config.tokens)
    tokenizer = corpus.tokenizer()
    params = {**config.training_params(), "block_size": config.block_size, "adapter": dict(adapter)}
    inputs = {"model": model_fingerprint(config.model), "tokens": corpus.fingerprint}

    with stage(out, "lora", params, inputs) as writer:
        model = get_peft_model(
            load_model(config.model), LoraConfig(task_type="CAUSAL_LM", **adapter)
        )
        parameters = model.num_parameters(only_trainable=True)
        if writer.finished:
            return parameters
        curve = fit(
            join_processes(config.device),
            writer,
            "adapter",
            model,
            tokenizer,
            corpus.split("train"),
            config,
            block_size=config.block_size,
            validate=validate_on(corpus.split("validation"), config),
        )

        def merge(path: Path) -> None:
            whole = PeftModel.from_pretrained(load_model(config.model), out / "adapter")
            whole.merge_and_unload().save_pretrained(path)
            tokenizer.save_pretrained(path)

        writer.write_directory("model", merge)
        writer.finish(best=best_row(curve), parameters=parameters)
    return parameters
