"""Hides the progress bars of the model libraries: from plain logs, and where a bar of ours is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from threading import Lock
from typing import Any

from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.utils import logging

_GGUF_READER: Any = None
with suppress(ImportError):  # a bar is no reason to fail where transformers reads otherwise
    _GGUF_READER = import_module("transformers.modeling_gguf_pytorch_utils")
_turn = Lock()
_inside = 0
_hidden = ExitStack()


@contextmanager
def no_library_bars() -> Iterator[None]:
    """No bar of transformers or its hub within; afterwards their settings are what they were.

    Of threads that overlap, the first hides the bars and the last brings them back.
    """
    global _inside
    with _turn:
        if _inside == 0:
            _hidden.enter_context(_hide())
        _inside += 1
    try:
        yield
    finally:
        with _turn:
            _inside -= 1
            if _inside == 0:
                _hidden.close()


@contextmanager
def _hide() -> Iterator[None]:
    shown, hub_shown = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    # The reader of .gguf files has a bar that no setting reaches: it gets the one that obeys.
    stubborn = getattr(_GGUF_READER, "tqdm", None)
    logging.disable_progress_bar()
    if stubborn is not None:
        _GGUF_READER.tqdm = logging.tqdm
    try:
        yield
    finally:
        if stubborn is not None:
            _GGUF_READER.tqdm = stubborn
        if shown:
            logging.enable_progress_bar()
        (enable_progress_bars if hub_shown else disable_progress_bars)()
