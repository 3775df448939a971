"""``memdec generate``: continue prompts with base and memory, beside the base alone if wanted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from memdec.config import Config, option, require
from memdec.data.artefact import MANIFEST
from memdec.errors import MemdecError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from memdec import MemoryDecoderForCausalLM


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Config):
    """What to continue, with which models, and how to choose the next token."""

    base: str = option(help="base model: directory, hub name or .gguf file")
    memory: Path = option(help="the memory: what train wrote, or a model directory")
    prompt: tuple[str, ...] = option(help="text to continue; may be given several times")
    lmbda: float | None = option(
        None, help="weight of the memory; the one that train chose if not given"
    )
    compare: bool = option(False, help="print the base's own continuation before the joint one")
    max_new_tokens: int = option(64, help="tokens to add at most")
    sample: bool = option(False, help="draw tokens instead of taking the most probable one")
    temperature: float = option(1.0, help="with sample: divides the log-probabilities")
    top_k: int = option(0, help="with sample: draw among this many tokens; 0 for all")
    top_p: float = option(1.0, help="with sample: draw among the tokens that make up this mass")
    beams: int = option(1, help="beams to search; their text is printed when it is complete")
    seed: int = option(0, help="seed of the draws, set before each continuation")
    device: str = option("auto", help="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", help="of the weights; auto keeps the files'"
    )

    def check(self) -> None:
        require(len(self.prompt) > 0, "prompt", "given at least once", list(self.prompt))
        require(self.lmbda is None or 0 <= self.lmbda <= 1, "lmbda", "in [0, 1]", self.lmbda)
        require(self.max_new_tokens >= 1, "max_new_tokens", "at least 1", self.max_new_tokens)
        require(self.temperature > 0, "temperature", "above 0", self.temperature)
        require(self.top_k >= 0, "top_k", "0 or more", self.top_k)
        require(0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        require(self.beams >= 1, "beams", "at least 1", self.beams)


@dataclass(frozen=True)
class Continuation:
    """What followed a prompt; `base` is None unless the base was asked for too."""

    prompt: str
    joint: str
    base: str | None


def generate(config: GenerateConfig) -> list[Continuation]:
    """Prints each prompt with its continuation to standard output, as it comes.

    Raises:
        MemdecError: a model that is missing, tokenizers that differ, no known lmbda, a prompt
            without tokens or too long for one of the models.
    """
    from memdec import MemoryDecoderForCausalLM
    from memdec.modeling.loading import has_tokenizer, load_model, load_tokenizer, pick_device

    memory_path, lmbda = _memory_and_lmbda(config)
    if not has_tokenizer(config.base):
        raise MemdecError(f"there is no tokenizer beside the base {config.base}")
    device = pick_device(config.device)
    tokenizer = load_tokenizer(config.base)
    joint = MemoryDecoderForCausalLM.from_models(
        load_model(config.base, device=device, dtype=config.dtype),
        load_model(memory_path, device=device, dtype=config.dtype),
        lmbda=lmbda,
        tokenizer=tokenizer,
        memory_tokenizer=load_tokenizer(memory_path) if has_tokenizer(memory_path) else None,
    )
    prompts = [_encode(tokenizer, prompt, joint, config) for prompt in config.prompt]
    results = []
    for prompt, tokens in zip(config.prompt, prompts, strict=True):
        alone = None
        if config.compare:
            print("[base]")
            alone = _continue(joint.base, tokenizer, tokens, config)
            print(f"[base and memory, lmbda {lmbda:g}]")
        results.append(Continuation(prompt, _continue(joint, tokenizer, tokens, config), alone))
    return results


def _memory_and_lmbda(config: GenerateConfig) -> tuple[Path, float]:
    """The memory's model directory, and the weight given or recorded by its training."""
    path = config.memory
    if (path / MANIFEST).is_file():
        path = path / "memory"
    if config.lmbda is not None:
        return path, config.lmbda
    record = path.parent / MANIFEST
    try:
        return path, float(json.loads(record.read_text())["best"]["lmbda"])
    except (OSError, ValueError, KeyError, TypeError):
        raise MemdecError(
            f"no lmbda was given, and none is recorded by a training of {config.memory}"
        ) from None


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    joint: MemoryDecoderForCausalLM,
    config: GenerateConfig,
) -> Tensor:
    tokens = tokenizer(prompt, return_tensors="pt").input_ids.long()
    length = tokens.shape[1]
    if length == 0:
        raise MemdecError(f"the prompt {prompt!r} has no tokens")
    for name, model in (("base", joint.base), ("memory", joint.memory)):
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and length + config.max_new_tokens > limit:
            raise MemdecError(
                f"a prompt of {length} tokens and max_new_tokens {config.max_new_tokens} exceed "
                f"the {limit} positions of the {name}"
            )
    return tokens.to(joint.device)


def _continue(
    model: Any, tokenizer: PreTrainedTokenizerBase, tokens: Tensor, config: GenerateConfig
) -> str:
    import torch
    from transformers import TextStreamer

    options: dict[str, Any] = {"do_sample": config.sample, "num_beams": config.beams}
    if config.sample:
        options |= {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    if config.beams == 1:
        options["streamer"] = TextStreamer(tokenizer, skip_special_tokens=True)
    if tokenizer.pad_token_id is None:
        options["pad_token_id"] = tokenizer.eos_token_id
    torch.manual_seed(config.seed)
    whole = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=config.max_new_tokens,
        **options,
    )[0]
    if config.beams > 1:
        print(tokenizer.decode(whole, skip_special_tokens=True))
    return str(tokenizer.decode(whole[tokens.shape[1] :], skip_special_tokens=True))
