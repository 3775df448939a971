"""Finds the layer whose input is the kNN key: the last block's feed-forward network.

The key of a position is the input of the last block's feed-forward network, as in kNN-LM
(arXiv 1911.00172, section 4.1) and Memory Decoder (arXiv 2508.09874). The layer is found by
structure, so that no table of architectures has to be kept.
"""

from __future__ import annotations

import re
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from memdec.errors import MemdecError


def find_feed_forward(
    model: PreTrainedModel, key_layer: str | None = None
) -> tuple[str, nn.Module]:
    """The submodule whose input is the key, and its name in ``model.named_modules()``.

    Looks at the longest list of blocks, takes the last block, and in it the one child that does not
    mix positions and holds matrices from the model's width to an inner width and back. Where the
    two matrices are children of the block itself (OPT), it is the first of them.

    Args:
        model: a decoder-only model.
        key_layer: the name of the submodule, where the search does not apply.

    Raises:
        MemdecError: no such name, or no or several candidates; the message lists them.
    """
    modules = dict(model.named_modules())
    if key_layer is not None and key_layer in modules:
        return key_layer, modules[key_layer]
    blocks = find_blocks(model)
    number, block = list(modules[blocks].named_children())[-1]
    block_name = f"{blocks}.{number}"
    children = dict(block.named_children())
    if key_layer is not None:
        known = ", ".join(f"{block_name}.{name}" for name in children)
        raise MemdecError(
            f"the model has no key layer {key_layer!r}; in its last block it has: {known}"
        )
    width = model.config.get_text_config().hidden_size
    found = [
        name
        for name, child in children.items()
        if not _mixes_positions(name, child) and _is_feed_forward(child, width)
    ] or _bare_feed_forward(children, width)
    if len(found) == 1:
        name = f"{block_name}.{found[0]}"
        return name, modules[name]
    listed = ", ".join(f"{block_name}.{name}" for name in found or children)
    raise MemdecError(
        f"cannot tell the feed-forward network in the last block of {type(model).__name__}; "
        f"name it with --key-layer (candidates: {listed})"
    )


def find_blocks(model: PreTrainedModel) -> str:
    """The name of the model's list of decoder blocks: the longest ModuleList outside any block.

    Raises:
        MemdecError: the model has none.
    """
    lists = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not re.search(r"\.\d+\.", f"{name}.")
    }
    if not lists:
        raise MemdecError(f"{type(model).__name__} has no list of decoder blocks")
    return max(lists, key=lambda name: lists[name])


class KeyRecorder:
    """Records the key layer's input during a model's forward pass.

    Use it as a context manager around forward passes; :attr:`keys` then holds the last pass's
    keys, ``[batch, length, width]`` in the model's dtype and on its device, detached.
    """

    def __init__(self, model: PreTrainedModel, key_layer: str | None = None) -> None:
        self.name, self._layer = find_feed_forward(model, key_layer)
        self.model = model
        self._shape = torch.Size()
        self._keys: Tensor | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def keys(self) -> Tensor:
        if self._keys is None:
            raise RuntimeError(f"no forward pass reached {self.name} yet")
        return self._keys

    def __enter__(self) -> Self:
        self._handles = [
            self.model.register_forward_pre_hook(self._start, with_kwargs=True),
            self._layer.register_forward_pre_hook(self._record, with_kwargs=True),
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keys = None
        self._shape = _first_tensor(args, kwargs).shape[:2]

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = _first_tensor(args, kwargs).detach()
        self._keys = hidden.reshape(*self._shape, hidden.shape[-1])  # OPT flattens the batch


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _mixes_positions(name: str, module: nn.Module) -> bool:
    """Whether it is an attention, or a state-space mixer, known by its convolution over time."""
    if "attn" in name.lower() or "attention" in f"{name} {type(module).__name__}".lower():
        return True
    return any(isinstance(part, nn.Conv1d) for part in module.modules())


def _is_feed_forward(module: nn.Module, width: int) -> bool:
    """Whether it leads from `width` to somewhere and back, in linear layers or stacked experts."""
    matrices = [p for p in module.parameters() if p.ndim >= 2 and width in p.shape[-2:]]
    return len(matrices) >= 2


def _bare_feed_forward(children: dict[str, nn.Module], width: int) -> list[str]:
    """The block's own first linear layer, when two of them lead from `width` to it again."""
    linears = {
        name: _in_out(c) for name, c in children.items() if isinstance(c, nn.Linear | Conv1D)
    }
    first = [
        name
        for name, (before, inner) in linears.items()
        if before == width and (inner, width) in linears.values()
    ]
    return first[:1]


def _in_out(linear: nn.Linear | Conv1D) -> tuple[int, int]:
    rows, columns = linear.weight.shape
    return (rows, columns) if isinstance(linear, Conv1D) else (columns, rows)
