"""The memory before training: another model, some of a model's layers, or a fresh small one."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from memdec.config import require
from memdec.errors import MemdecError
from memdec.modeling.key_layer import find_blocks
from memdec.modeling.loading import load_model


def initial_memory(
    teacher: str | Path,
    init: str | Path = "teacher",
    *,
    layers: int | None = None,
    width: int | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """The memory to train, float32 on the CPU, in evaluation mode.

    Args:
        teacher: the teacher's directory, hub name or .gguf file.
        init: ``"teacher"``; the name of another model; or ``"fresh"``, random weights in the
            teacher's architecture and vocabulary.
        layers: how many layers. Of a trained model these are its own, evenly spaced, the first and
            the last among them; a fresh model has that many. None: all.
        width: the hidden size of a fresh model, a multiple of the teacher's head size; the inner
            size and the number of heads follow in proportion. None: the teacher's.
        seed: of a fresh model's weights.

    Raises:
        MemdecError: no such model; `layers` or `width` out of range; an architecture whose layers
            cannot be left out or whose width cannot be changed.
    """
    if width is not None and init != "fresh":
        raise MemdecError("width goes with a fresh memory only: a trained model has its own")
    source = load_model(teacher if init in ("teacher", "fresh") else init)
    if init == "fresh":
        return _fresh(source.config, layers, width, seed)
    return source if layers is None else keep_layers(source, layers)


def keep_layers(model: PreTrainedModel, layers: int | Sequence[int]) -> PreTrainedModel:
    """A model of some of the model's layers; embeddings and output are kept, tied if they were.

    Args:
        layers: how many, evenly spaced, the first and the last among them (one alone is the first);
            or the layers' own numbers, in rising order.

    Raises:
        MemdecError: `layers` out of range, or layers that do not fit the shortened configuration.
    """
    name = find_blocks(model)
    total = len(list(model.get_submodule(name).children()))
    if isinstance(layers, int):
        require(1 <= layers <= total, "layers", f"from 1 to {total}, the model's", layers)
        kept = [round(i * (total - 1) / max(layers - 1, 1)) for i in range(layers)]
    else:
        kept = list(layers)
        rising = kept == sorted({number for number in kept if 0 <= number < total}) != []
        require(rising, "layers", f"rising numbers from 0 to {total - 1}", kept)
    config = copy.deepcopy(model.config)
    _shorten(config.get_text_config(), kept, total)
    weights = {}
    for key, tensor in model.state_dict().items():
        if not key.startswith(f"{name}."):
            weights[key] = tensor
            continue
        number, rest = key.removeprefix(f"{name}.").split(".", 1)
        if int(number) in kept:
            weights[f"{name}.{kept.index(int(number))}.{rest}"] = tensor
    try:
        short = _from_config(config, model.dtype)
        short.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        raise MemdecError(
            f"{type(model).__name__} cannot be cut to {len(kept)} of its {total} layers: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from error
    short.generation_config = copy.deepcopy(model.generation_config)
    return short


def _shorten(config: PreTrainedConfig, kept: list[int], total: int) -> None:
    """Keeps those layers in the count and in every list that has one entry a layer."""
    for key, value in config.to_dict().items():
        of_layers = key != "architectures" and not key.endswith("token_id")
        if of_layers and isinstance(value, list | tuple) and len(value) == total:
            setattr(config, key, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)


def _fresh(
    config: PreTrainedConfig, layers: int | None, width: int | None, seed: int
) -> PreTrainedModel:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    total = text.num_hidden_layers
    if layers is not None:
        require(layers >= 1, "layers", "at least 1", layers)
        _shorten(text, [i * total // layers for i in range(layers)], total)
    if width is not None:
        _resize(text, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return _from_config(config, torch.float32)
        except (RuntimeError, ValueError) as error:
            raise MemdecError(
                f"a fresh {config.model_type} cannot have {layers or total} layers of width "
                f"{text.hidden_size}: {error}"
            ) from error


def _resize(config: PreTrainedConfig, width: int) -> None:
    """Changes the hidden size; heads keep their size, the inner size keeps its ratio."""
    old_width, old_heads = config.hidden_size, config.num_attention_heads
    head = old_width // old_heads
    require(width >= head and width % head == 0, "width", f"a multiple of {head}", width)
    config.hidden_size = width
    config.num_attention_heads = width // head
    if getattr(config, "num_key_value_heads", None) is not None:
        groups = math.gcd(config.num_attention_heads, config.num_key_value_heads)
        config.num_key_value_heads = groups
    for name in ("intermediate_size", "n_inner", "ffn_dim"):
        if getattr(config, name, None) is not None:
            setattr(config, name, getattr(config, name) * width // old_width)


def _from_config(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
