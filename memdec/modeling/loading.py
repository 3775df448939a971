"""Loads models and tokenizers by directory, hub name or .gguf file, and says which ones they are."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from memdec.console import on_terminal
from memdec.data.artefact import file_sha256, fingerprint
from memdec.errors import MemdecError
from memdec.modeling.quiet import no_library_bars

Dtype = Literal["float32", "bfloat16", "auto"]

# How transformers itself looks for weights, in its order of preference.
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
_LEGACY_WEIGHT_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

# What transformers raises for files that are missing, cut, of another shape or an unknown kind.
_LIBRARY_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


def pick_device(device: str) -> torch.device:
    """``"auto"`` is the GPU if there is one, else the CPU; anything else is a torch device name."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        picked = None
    if picked is None or picked.type not in ("cpu", "cuda"):
        raise MemdecError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise MemdecError(f"device {device!r} asked for, torch sees {_gpus()}")
    return picked


def load_model(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: Dtype | torch.dtype = "float32",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Loads a decoder-only model in evaluation mode.

    Args:
        name: a transformers model directory, a hub name, or the path of a .gguf file (whose
            weights are dequantised; the result can be saved like any other model).
        device: where to put it, as :func:`pick_device` reads it.
        dtype: of the weights; ``"auto"`` keeps the dtype of the files.
        attn_implementation: as transformers names it; None leaves the choice to the model.

    Raises:
        MemdecError: no such model, or not a decoder-only language model.
    """
    device = pick_device(device) if isinstance(device, str) else device
    source, options = _source(name)
    with _quiet_unless_terminal(), _one_line_errors("model", name):
        _decoder_config(name, source, options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            **options,
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers fills these with random numbers
        raise MemdecError(f"{name} lacks {len(missing)} weights of its model, such as {missing[0]}")
    if options:
        _forget_quantisation(model)
    # What the model was asked for by: a directory alone would not name a .gguf file or hub model.
    model.config.name_or_path = lasting_name(name)
    return model.eval().to(device)


def lasting_name(name: str | Path) -> str:
    """`name` as it means the same model from any working directory: a local path absolute."""
    return str(Path(name).resolve() if Path(name).exists() else name)


def load_shape(name: str | Path) -> PreTrainedModel:
    """The model of :func:`load_model` without its weights, on the device ``meta``, to count by.

    Raises:
        MemdecError: no such model, or not a decoder-only language model.
    """
    source, options = _source(name)
    with _quiet_unless_terminal(), _one_line_errors("model", name), torch.device("meta"):
        return AutoModelForCausalLM.from_config(_decoder_config(name, source, options))


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that lies beside a model, named as for :func:`load_model`.

    Raises:
        MemdecError: there is none.
    """
    source, options = _source(name)
    if not has_tokenizer(name):  # transformers would make an empty one of the model's kind
        raise MemdecError(f"no tokenizer at {name}: expected {' or '.join(_TOKENIZER_FILES)} in it")
    with _one_line_errors("tokenizer", name):
        return AutoTokenizer.from_pretrained(source, **options)


def has_tokenizer(name: str | Path) -> bool:
    """Whether a tokenizer lies beside the model (a .gguf file carries its own)."""
    source, options = _source(name)
    return bool(options) or any((source / file).is_file() for file in _TOKENIZER_FILES)


def model_fingerprint(name: str | Path) -> str:
    """SHA-256 over a model's configuration and weights, as 64 hexadecimal digits.

    The same weights under another path have the same fingerprint. Every weight file is read once
    a process (about 1 GB a second).

    Raises:
        MemdecError: no such model.
    """
    source, options = _source(name)
    if options:
        return _digest(source / options["gguf_file"])
    config = _read_json(source / "config.json")
    for key in ("_name_or_path", "transformers_version"):  # say who saved it, not what it is
        config.pop(key, None)
    weights = {file.name: _digest(file) for file in _weight_files(source)}
    return fingerprint({"config": config, "weights": weights})


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest token id: ids may skip some, and then exceed ``len(tokenizer)``."""
    return max(len(tokenizer), *(index + 1 for index in tokenizer.get_vocab().values()))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over all that decides how text becomes token ids.

    What a chat template or a padding side does has no part in it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return fingerprint({"vocabulary": tokenizer.get_vocab()})
    parts = json.loads(backend.to_str())
    names = ("model", "normalizer", "pre_tokenizer", "added_tokens")
    return fingerprint({name: parts.get(name) for name in names})


def compare_tokenizers(
    first: PreTrainedTokenizerBase,
    second: PreTrainedTokenizerBase,
    names: tuple[str, str] = ("the base", "the memory"),
) -> None:
    """Checks that every token id means the same token in both.

    Raises:
        MemdecError: they differ; the message shows the first differing ids.
    """
    ours = {index: token for token, index in first.get_vocab().items()}
    theirs = {index: token for token, index in second.get_vocab().items()}
    differing = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    if not differing:
        return
    shown = ", ".join(
        f"id {i} is {_token(ours, i)} in {names[0]} and {_token(theirs, i)} in {names[1]}"
        for i in differing[:3]
    )
    more = f", and {len(differing) - 3:,} more" if len(differing) > 3 else ""
    raise MemdecError(f"the tokenizers of {names[0]} and {names[1]} differ: {shown}{more}")


def _decoder_config(name: str | Path, source: Path, options: dict[str, Any]) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(source, **options)
    if config.model_type == "memory_decoder":
        raise MemdecError(
            f"{name} is a saved base and memory, expected one model, such as {name}/memory"
        )
    if not _is_decoder_only(config):
        raise MemdecError(
            f"{name} is a {config.model_type} model, expected a decoder-only language model"
        )
    return config


def _is_decoder_only(config: PreTrainedConfig) -> bool:
    if getattr(config, "is_encoder_decoder", False):
        return False
    # BERT and its kin load as causal models, yet look ahead unless is_decoder is set.
    return config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(
        config, "is_decoder", False
    )


def _token(vocabulary: dict[int, str], index: int) -> str:
    return repr(vocabulary[index]) if index in vocabulary else "absent"


def _source(name: str | Path) -> tuple[Path, dict[str, Any]]:
    """The local directory of a model, and the extra arguments of from_pretrained."""
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise MemdecError(f"no model at {name}: there is no such .gguf file")
        if importlib.util.find_spec("gguf") is None:
            raise MemdecError(f"reading {name} needs the package gguf: pip install gguf")
        return path.parent, {"gguf_file": path.name}
    if path.is_dir():
        return path, {}
    if path.is_file():
        raise MemdecError(f"{name} is a file, expected a model directory, hub name or .gguf file")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(name)):
        raise MemdecError(f"no model at {name}: there is no such directory")
    return _hub_snapshot(str(name)), {}


@lru_cache
def _hub_snapshot(name: str) -> Path:
    """Downloads (or finds in the cache) what loading a hub model needs."""

    def download(*patterns: str) -> Path:
        ignored = ["*/*", "consolidated*"]
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=ignored))

    try:
        path = download("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
        return path if any(path.glob("*.safetensors")) else download("*.json", "*.txt", "*.bin")
    except (OSError, ValueError) as error:
        raise MemdecError(
            f"no model {name!r}: there is no such directory, and the hub answered: {_line(error)}"
        ) from error


def _weight_files(directory: Path) -> list[Path]:
    for name in (*_WEIGHT_FILES, *_LEGACY_WEIGHT_FILES):
        path = directory / name
        if path.is_file() and path.suffix == ".json":
            return [
                directory / file for file in sorted(set(_read_json(path)["weight_map"].values()))
            ]
        if path.is_file():
            return [path]
    raise MemdecError(f"no model at {directory}: expected {' or '.join(_WEIGHT_FILES)} in it")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MemdecError(f"no model at {path.parent}: {path.name}: {_line(error)}") from error


def _digest(path: Path) -> str:
    try:
        status = path.stat()
    except OSError as error:
        raise MemdecError(f"no model at {path.parent}: {path.name}: {error.strerror}") from error
    return _digest_of(path, status.st_size, status.st_mtime_ns)


@lru_cache
def _digest_of(path: Path, size: int, modified: int) -> str:
    return file_sha256(path)


def _forget_quantisation(model: PreTrainedModel) -> None:
    """Makes a model read from a .gguf file savable: its weights are plain floats by now."""
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


@contextmanager
def _one_line_errors(what: str, name: str | Path) -> Iterator[None]:
    try:
        yield
    except _LIBRARY_ERRORS as error:
        raise MemdecError(f"the {what} of {name} cannot be loaded: {_line(error)}") from error


def _quiet_unless_terminal() -> AbstractContextManager[None]:
    """Keeps the libraries' loading bars out of plain logs."""
    return nullcontext() if on_terminal() else no_library_bars()


def _line(error: Exception) -> str:
    """The first line of a library's message, which may have many."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".:")


def _gpus() -> str:
    count = torch.cuda.device_count()
    return "no GPU" if count == 0 else f"{count} GPU{'s' if count > 1 else ''}"
