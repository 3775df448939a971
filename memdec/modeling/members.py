"""What a pair asks of either of its two models, whatever its architecture."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from memdec.modeling.cache import CACHE


def has_key_value_cache(model: PreTrainedModel) -> bool:
    """Whether it is a decoder-only model that a pair can hold.

    A recurrent model has a cache too, but a state instead of tokens in it.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    recurrent = kinds is not None and set(kinds) == {"linear_attention"}
    return CACHE in _parameters(type(model).forward) and not recurrent


def run_member(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: Cache | None,
    shared: dict[str, Any],
    **kwargs: Any,
) -> Any:
    """One pass of a model, with what is `shared` by both of a pair and with further arguments."""
    if "position_ids" not in _parameters(type(model).forward):
        # Bloom and MPT place tokens by the mask alone.
        shared = {name: value for name, value in shared.items() if name != "position_ids"}
    return model(input_ids=input_ids, **{CACHE: cache}, **shared, **kwargs, return_dict=True)


def readable_ids(input_ids: Tensor, model: PreTrainedModel, other: PreTrainedModel) -> Tensor:
    """Token ids of `other` for `model`: those beyond its embedding become its padding id."""
    known = _embedding_rows(model)
    if known >= _embedding_rows(other):
        return input_ids
    return torch.where(input_ids < known, input_ids, _padding_id(model, known))


# A dictionary, since torch.compile warns of functools' caches. A pair fills it when it is made.
_known_parameters: dict[Callable[..., Any], frozenset[str]] = {}


def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    """A function's arguments; looking them up anew would cost at every token."""
    if forward not in _known_parameters:
        _known_parameters[forward] = frozenset(inspect.signature(forward).parameters)
    return _known_parameters[forward]


def _embedding_rows(model: PreTrainedModel) -> int:
    return next(model.get_input_embeddings().parameters()).shape[0]


def _padding_id(model: PreTrainedModel, known: int) -> int:
    """The model's pad id, else its eos id, else 0."""
    config = model.config.get_text_config()
    for ids in (config.pad_token_id, config.eos_token_id):
        first = ids[0] if isinstance(ids, list) and ids else ids
        if isinstance(first, int) and 0 <= first < known:
            return first
    return 0
