"""``memdec generate``: continue prompts with base and memory, beside the base alone if wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memdec.config import option, require, require_temperature
from memdec.errors import MemdecError
from memdec.pair import ADAPTIVE, PairConfig, load_pair

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from memdec import MemoryDecoderForCausalLM


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(PairConfig):
    """What to continue, and how to choose the next token."""

    prompt: tuple[str, ...] = option(help="text to continue; may be given several times")
    compare: bool = option(False, help="print the base's own continuation before the joint one")
    max_new_tokens: int = option(64, help="tokens to add at most")
    sample: bool = option(False, help="draw tokens instead of taking the most probable one")
    temperature: float = option(1.0, help="with sample: divides the log-probabilities")
    top_k: int = option(0, help="with sample: draw among this many tokens; 0 for all")
    top_p: float = option(1.0, help="with sample: draw among the tokens that make up this mass")
    beams: int = option(1, help="beams to search; their text is printed when it is complete")
    seed: int = option(0, help="seed of the draws, set before each continuation")

    def check(self) -> None:
        super().check()
        require(len(self.prompt) > 0, "prompt", "given at least once", list(self.prompt))
        require(self.max_new_tokens >= 1, "max_new_tokens", "at least 1", self.max_new_tokens)
        require_temperature(self.temperature)
        require(self.top_k >= 0, "top_k", "0 or more", self.top_k)
        require(0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        require(self.beams >= 1, "beams", "at least 1", self.beams)
        drawing = (self.temperature, self.top_k, self.top_p)
        if not self.sample and drawing != (1.0, 0, 1.0):
            raise MemdecError("temperature, top_k and top_p are of the draw: give sample too")


@dataclass(frozen=True)
class Continuation:
    """What followed a prompt; `base` is None unless the base was asked for too."""

    prompt: str
    joint: str
    base: str | None


def generate(config: GenerateConfig) -> list[Continuation]:
    """Prints each prompt with its continuation to standard output, as it comes.

    Raises:
        MemdecError: as :func:`memdec.pair.load_pair`; a prompt without tokens or too long for one of
            the models.
    """
    joint = load_pair(config)
    tokenizer = joint.tokenizer
    assert tokenizer is not None  # load_pair
    lmbda = joint.config.lmbda
    shown = f"{lmbda:g}" if isinstance(lmbda, float) else ADAPTIVE
    prompts = [_encode(tokenizer, prompt, joint, config) for prompt in config.prompt]
    results = []
    for prompt, tokens in zip(config.prompt, prompts, strict=True):
        alone = None
        if config.compare:
            print("[base]")
            alone = _continue(joint.base, tokenizer, tokens, config)
            print(f"[base and memory, lmbda {shown}]")
        results.append(Continuation(prompt, _continue(joint, tokenizer, tokens, config), alone))
    return results


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
