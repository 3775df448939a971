"""Plug and play: one memory beside several bases of its tokenizer, none of which it has seen.

    python examples/gcide/bases.py --base SmolLM2.gguf --tokens gcide --work work --result parts.json

The base itself, its adapted copy, the base with layers left out, and with weights rounded: the
perplexity of each alone, and with the memory at the lmbda that is best on validation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lab.command import memory_setting, open_experiment, part_parser, write_part
from lab.experiment import Experiment
from lab.memories import trained_memory
from lab.scores import perplexity
from lab.tuning import adapted
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from memdec.console import say
from memdec.evaluation.forward import label_scores
from memdec.evaluation.mixture import best_lmbda, mix_log_probs
from memdec.modeling.key_layer import find_blocks
from memdec.modeling.loading import load_model
from memdec.modeling.memory_init import keep_layers

GROUP = 64  # weights that share a scale and an offset

ByText = dict[str, np.ndarray]  # log p(label) on validation and test


def main(arguments: Sequence[str] | None = None) -> None:
    options = part_parser(__doc__.splitlines()[0]).parse_args(arguments)
    experiment = open_experiment(options)
    path = trained_memory(experiment, memory_setting(experiment, options.memory))
    memory = _log_probs(experiment, load_model(path, device=experiment.device))
    block_size, test = experiment.settings["block_size"], experiment.texts["test"]
    rows = []
    for name, make in variants(experiment):
        base = _log_probs(experiment, make())
        lmbda, _ = best_lmbda(base["validation"], memory["validation"])
        joint = mix_log_probs(base["test"], memory["test"], lmbda)
        found = {
            how: perplexity(values, test, block_size)
            for how, values in (("alone", base["test"]), ("joint", joint))
        }
        rows.append({"name": name, "lmbda": lmbda, **found})
        say(f"{name}: {found['alone']['perplexity']:.2f}, {found['joint']['perplexity']:.2f}")
    part = {
        "memory": options.memory,
        "group": GROUP,
        "memory_alone": perplexity(memory["test"], test, block_size),
        "rows": rows,
    }
    write_part(options.result, "bases", experiment, part)


def variants(experiment: Experiment) -> Iterator[tuple[str, Callable[[], PreTrainedModel]]]:
    """Names and makers of the bases, each on the experiment's device."""

    def base(dtype: Any = "float32") -> PreTrainedModel:
        return load_model(experiment.base, device=experiment.device, dtype=dtype)

    def short(layers: int) -> PreTrainedModel:
        return keep_layers(load_model(experiment.base), layers).to(experiment.device)

    def rounded(bits: int) -> PreTrainedModel:
        return round_weights(base(), bits, GROUP)

    total = load_model(experiment.base).config.get_text_config().num_hidden_layers
    yield "base", base
    yield "adapted copy", lambda: load_model(adapted(experiment), device=experiment.device)
    for layers in (total * 5 // 6, total * 2 // 3):  # 25 and 20 of 30
        yield f"{layers} of {total} layers", lambda layers=layers: short(layers)
    yield "bfloat16", lambda: base("bfloat16")
    for bits in (8, 4, 3):
        yield f"int{bits} weights", lambda bits=bits: rounded(bits)


@torch.no_grad()
def round_weights(model: PreTrainedModel, bits: int, group: int) -> PreTrainedModel:
    """Rounds the blocks' matrices, in place, to `bits` bits a weight.

    Round to nearest between the smallest and the largest weight of each group of `group` inputs (of
    all inputs, where they are no multiple of it). The values are those of a quantised model; they
    stay in their dtype, so nothing becomes smaller or faster.
    """
    for layer in model.get_submodule(find_blocks(model)).modules():
        if not isinstance(layer, nn.Linear | Conv1D):
            continue
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        width = group if weight.shape[1] % group == 0 else weight.shape[1]
        groups = weight.reshape(-1, width).float()
        low, high = groups.aminmax(dim=1, keepdim=True)
        step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
        weight.copy_((((groups - low) / step).round() * step + low).view(weight.shape))
    return model


def _log_probs(experiment: Experiment, model: PreTrainedModel) -> ByText:
    texts = {name: experiment.texts[name] for name in ("validation", "test")}
    return {
        name: label_scores(model, text.stream, positions=text.positions, **experiment.how).log_probs
        for name, text in texts.items()
    }


if __name__ == "__main__":
    main()
