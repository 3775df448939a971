"""Whether a model keeps the documents of a block apart when their positions begin again.

transformers' attention masks read it off the ``position_ids`` of a forward pass without a mask and
without a cache. Which models and which attention kernels go by it is found by trying.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from memdec.errors import MemdecError

_LENGTH = 16
_CUTS = (6, 9)  # where the second document of each row begins
_SHARE = 0.1  # of what documents change in each other where they are not kept apart


def check_isolation(model: PreTrainedModel) -> None:
    """Feeds the model two rows of two documents each, and the second documents alone.

    Rounding differs from one shape to another, in bfloat16 by much. So the measure is what the first
    document does to the second where positions do not begin again.

    Raises:
        MemdecError: the logits differ, or the model takes no position ids.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise _refusal(model, "it takes no position ids")
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and context < _LENGTH:
        raise _refusal(model, f"trying takes {_LENGTH} positions, its context is {context}")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (len(_CUTS), _LENGTH), generator=generator)
    tokens = tokens.to(model.device)
    positions = torch.arange(_LENGTH, device=model.device)
    starts = torch.tensor(_CUTS, device=model.device)[:, None]
    positions = torch.where(positions < starts, positions, positions - starts)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            together = _logits(model, tokens)
            apart = _logits(model, tokens, position_ids=positions)
            pairs = list(zip(tokens, _CUTS, strict=True))
            alone = [_logits(model, row[None, cut:])[0] for row, cut in pairs]
    finally:
        model.train(was_training)
    effect, error = (_difference(found, alone) for found in (together, apart))
    if not error <= _SHARE * effect:  # nor where either is NaN
        raise _refusal(
            model, f"logits of a document differ by {error:.2g} from those of the same one alone"
        )


def _logits(model: PreTrainedModel, tokens: Tensor, **inputs: Any) -> Tensor:
    return model(input_ids=tokens, use_cache=False, **inputs).logits.float()


def _difference(rows: Tensor, alone: list[Tensor]) -> float:
    differences = [
        (row[cut:] - wanted).abs().max()
        for row, cut, wanted in zip(rows, _CUTS, alone, strict=True)
    ]
    return float(torch.stack(differences).max())


def _refusal(model: PreTrainedModel, reason: str) -> MemdecError:
    attention = getattr(model.config, "_attn_implementation", None)
    return MemdecError(
        f"{type(model).__name__} (transformers {transformers.__version__}, attention {attention}) "
        f"does not isolate documents that share a block: {reason}; leave isolate_documents off"
    )
