"""A frozen base and its memory as one transformers model (arXiv 2508.09874, equation 6)."""

from __future__ import annotations

import copy
import dataclasses
from numbers import Real
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from memdec.config import require
from memdec.errors import MemdecError
from memdec.modeling.cache import CACHE, MemoryDecoderCache
from memdec.modeling.gate import Gate, lmbda_of
from memdec.modeling.gated_pass import GatedPass
from memdec.modeling.loading import (
    Dtype,
    compare_tokenizers,
    has_tokenizer,
    lasting_name,
    load_model,
    load_tokenizer,
    vocabulary_size,
)
from memdec.modeling.members import has_key_value_cache, readable_ids, run_member
from memdec.ops import fused_interpolate

BASE = "base"
MEMORY = "memory"
_NEEDS_IDS = "input_ids are needed: the memory cannot read the base's embeddings"


class MemoryDecoderConfig(PreTrainedConfig):
    """How base and memory go together.

    Args:
        lmbda: the memory's weight in the mixture, in [0, 1], or a
            :class:`memdec.modeling.gate.Gate`, or its fields, which gives each token a weight of
            its own.
        base_name: directory, hub name or .gguf file of the base; None when it is saved beside.
        tokenizer_size: one more than the tokenizer's highest id; columns of the logits from there on
            are padding. None: all are real.
        vocab_size: width of the base's logits.
    """

    model_type = "memory_decoder"

    def __init__(
        self,
        lmbda: float | Gate | dict[str, Any] = 0.5,
        base_name: str | None = None,
        tokenizer_size: int | None = None,
        vocab_size: int = 0,
        **kwargs: Any,
    ) -> None:
        self.lmbda = lmbda
        self.base_name = base_name
        self.tokenizer_size = tokenizer_size
        self.vocab_size = vocab_size
        super().__init__(**kwargs)


class MemoryDecoderForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model whose next-token distribution is ``(1 - lmbda) base + lmbda memory``.

    Made by :meth:`from_models` or :meth:`from_pretrained`. ``generate`` is transformers' own, with
    everything it offers. Base and memory are used as they are, on one device, and stay available
    as ``model.base`` and ``model.memory``; ``model.config.lmbda`` may be changed at any time.
    """

    config_class = MemoryDecoderConfig
    main_input_name = "input_ids"
    _supports_sdpa = True  # nothing of its own attends; base and memory each have their setting
    base: Any  # a PreTrainedModel that is a GenerationMixin, which Python has no type for
    memory: Any

    def __init__(
        self,
        config: MemoryDecoderConfig,
        base: PreTrainedModel,
        memory: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__(config)
        for name, model in ((BASE, base), (MEMORY, memory)):
            if not has_key_value_cache(model):
                raise MemdecError(
                    f"the {name} must be a decoder-only model with a key-value cache, "
                    f"got {type(model).__name__}"
                )
        self.base = base
        self.memory = memory
        self.tokenizer = tokenizer
        self.generation_config = copy.deepcopy(base.generation_config)
        self._is_stateful = base._is_stateful or memory._is_stateful
        self._gate: tuple[dict[str, Any], Gate] | None = None

    @classmethod
    def from_models(
        cls,
        base: PreTrainedModel,
        memory: PreTrainedModel,
        *,
        lmbda: float | Gate,
        tokenizer: PreTrainedTokenizerBase | None = None,
        memory_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Self:
        """Puts two models side by side; neither is changed.

        Args:
            base: any decoder-only model.
            memory: a decoder-only model of the same tokenizer, on the base's device; its output
                may have another width.
            lmbda: the memory's weight, in [0, 1], or a gate that chooses one for each token.
            tokenizer: the base's; its ids say which columns of the logits are real tokens.
            memory_tokenizer: the memory's; compared with `tokenizer` when both are given.

        Raises:
            MemdecError: a name in place of a model or tokenizer, `lmbda` out of range, tokenizers that
                differ (the message names the first differing tokens), a model without a key-value
                cache.
        """
        for name, model in (("base", base), ("memory", memory)):
            require(not isinstance(model, (str, Path)), name, "a model that is loaded", model)
        for name, given in (("tokenizer", tokenizer), ("memory_tokenizer", memory_tokenizer)):
            # A name has a length too, which would pass for the number of tokens.
            require(not isinstance(given, (str, Path)), name, "a tokenizer that is loaded", given)
        if not isinstance(lmbda, Gate):
            in_range = isinstance(lmbda, Real) and 0 <= lmbda <= 1
            require(in_range, "lmbda", "in [0, 1] or a Gate", lmbda)
        if tokenizer is not None and memory_tokenizer is not None:
            compare_tokenizers(tokenizer, memory_tokenizer)
        base_name = base.config.name_or_path
        config = MemoryDecoderConfig(
            lmbda=dataclasses.asdict(lmbda) if isinstance(lmbda, Gate) else float(lmbda),
            base_name=lasting_name(base_name) if base_name else None,
            tokenizer_size=None if tokenizer is None else vocabulary_size(tokenizer),
            vocab_size=base.config.get_text_config().vocab_size,
        )
        return cls(config, base, memory, tokenizer or memory_tokenizer)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        directory: str | Path,
        *,
        base: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: Dtype | torch.dtype = "auto",
        attn_implementation: str | None = None,
        device_map: Any = None,
        config: MemoryDecoderConfig | None = None,
        **kwargs: Any,
    ) -> Self:
        """Loads what :meth:`save_pretrained` wrote, and compares the tokenizers that lie there.

        Once `memdec.modeling` is imported, AutoModelForCausalLM does the same.

        Args:
            directory: the saved pair.
            base: where the base is now, if it has moved.
            device: of both models, as :func:`memdec.modeling.loading.pick_device` reads it.
            dtype: of both models' weights; ``"auto"`` keeps those of the files.
            attn_implementation: of both models, as transformers names it; None leaves the choice to
                each.
            device_map: the same as `device`, for callers who know transformers alone; also
                ``{"": device}``.
            config: in place of the saved one.
            kwargs: what AutoModelForCausalLM passes on beside that, unless the caller asked for it.

        Raises:
            MemdecError: no such directory, no base where it should be, tokenizers that differ.
            TypeError: an argument of transformers' own method that means nothing here, or `device`
                beside `device_map`.
            ValueError: a `device_map` of several devices.
        """
        # The auto class leaves most of its own at None or False; 0 is a value that somebody gave.
        own = {"adapter_kwargs", *(name for name in kwargs if name.startswith("_"))}
        own |= {name for name, value in kwargs.items() if value is None or value is False}
        if asked := kwargs.keys() - own:
            raise TypeError(
                "a base and memory are loaded with base, device or device_map, dtype and "
                f"attn_implementation, got {', '.join(sorted(asked))}"
            )
        if device_map is not None:
            if device != "cpu":
                raise TypeError("device and device_map are one argument, got both")
            device = _one_device(device_map)
        directory = Path(directory)
        if not (directory / MEMORY).is_dir():
            raise MemdecError(f"expected a saved base and memory at {directory}, which is none")
        config = config or MemoryDecoderConfig.from_pretrained(directory)
        base = base or (directory / BASE if config.base_name is None else config.base_name)
        # The auto class hands an attention over in the configuration. That of a pair says sdpa,
        # which each model chooses by itself where it can.
        if attn_implementation is None and config._attn_implementation != "sdpa":
            attn_implementation = config._attn_implementation
        options: Any = {"device": device, "dtype": dtype}
        options["attn_implementation"] = attn_implementation
        model = cls.from_models(
            load_model(base, **options),
            load_model(directory / MEMORY, **options),
            lmbda=_lmbda(config),
            tokenizer=_tokenizer_of(base),
            memory_tokenizer=_tokenizer_of(directory / MEMORY),
        )
        model.config.tokenizer_size = config.tokenizer_size
        model.generation_config = GenerationConfig.from_pretrained(directory)
        return model

    def save_pretrained(  # type: ignore[override]
        self, directory: str | Path, *, save_base: bool = False, **kwargs: Any
    ) -> None:
        """Saves the memory whole and the base by its name or path.

        ``directory/memory`` is an ordinary transformers model directory, and so is
        ``directory/base`` with `save_base`. The tokenizer lies beside each and in `directory`.
        Further arguments go to the models' own method.

        Raises:
            ValueError: the base has no name, and `save_base` is not set.
        """
        config = copy.deepcopy(self.config)
        if isinstance(config.lmbda, Gate):
            config.lmbda = dataclasses.asdict(config.lmbda)
        if save_base:
            config.base_name = None
        elif config.base_name is None:
            raise ValueError("the base has no name or path to load it by; pass save_base=True")
        directory = Path(directory)
        for name in (BASE, MEMORY) if save_base else (MEMORY,):
            getattr(self, name).save_pretrained(directory / name, **kwargs)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(directory / name)
        config.save_pretrained(directory)
        self.generation_config.save_pretrained(directory)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: MemoryDecoderCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: MemoryDecoderCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass of both models.

        Args:
            input_ids: ``[batch, length]`` int64; an id beyond the memory's embedding is fed to the
                memory as its padding id.
            attention_mask: ``[batch, past + length]``, as for any transformers model; to both.
            position_ids: ``[batch, length]``; to both.
            cache: what an earlier pass returned.
            use_cache: whether to return a cache; None leaves it to the base's configuration.
            labels: ``[batch, length]``; shifted here, -100 is ignored.
            logits_to_keep: as in transformers, 0 keeps all; to both, but with a gate, which needs
                all positions, of the result alone.
            past_key_values: the name of `cache` in transformers before 5.24.
            kwargs: to the base alone, such as pixel values or ``output_hidden_states``.

        Returns:
            ``logits`` are the mixture's log-probabilities ``[batch, kept, base's width]`` in
            float32, ``loss`` their mean nll at the labels; hidden states and attentions are the
            base's.

        With a gate a pass goes on from the evidence in `cache`, so that an earlier pass with a gate
        must have filled it, and it may be cropped by fewer positions than that pass kept logits of.
        The mask must be ``[batch, past + length]`` or None.
        """
        if input_ids is None:
            raise ValueError(_NEEDS_IDS)
        if cache is not None and past_key_values is not None:
            raise TypeError("cache and past_key_values are one argument, got both")
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, MemoryDecoderCache):
            raise TypeError(
                "cache must be a MemoryDecoderCache, as an earlier pass returns it, "
                f"got {type(cache).__name__}"
            )
        if use_cache is None:
            use_cache = getattr(self.base.config.get_text_config(), "use_cache", True)
        shared = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }
        weight: Any = self._weight()
        gated = None
        if isinstance(weight, Gate):
            gated = GatedPass(weight, cache, input_ids, attention_mask, position_ids)
            shared["logits_to_keep"] = 0
        base_cache = memory_cache = None
        if cache is not None:
            base_cache, memory_cache = cache.base, cache.memory
        base = run_member(self.base, input_ids, base_cache, shared, **kwargs)
        memory_ids = readable_ids(input_ids, self.memory, self.base)
        memory = run_member(self.memory, memory_ids, memory_cache, shared)
        width = base.logits.shape[-1]
        real = min(self.config.tokenizer_size or width, width)
        logits = base.logits, memory.logits
        after = _paired(base.get(CACHE), memory.get(CACHE))
        evidence = None  # without a gate that of an earlier pass is no longer of what is there
        if gated is not None:
            states = gated.states(*logits, real)
            evidence = gated.evidence(*logits, states, logits_to_keep)
            counted = isinstance(logits_to_keep, int)
            kept = slice(-logits_to_keep, None) if counted else logits_to_keep
            logits = logits[0][:, kept], logits[1][:, kept]
            weight = lmbda_of(states[:, kept])
        for one in (cache, after):
            if one is not None:
                one.evidence = evidence
        log_probs = fused_interpolate(*logits, weight, vocab_size=real)
        loss = None
        if labels is not None:
            loss = torch.nn.functional.nll_loss(
                log_probs[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=log_probs,
            hidden_states=base.get("hidden_states"),
            attentions=base.get("attentions"),
            **{CACHE: after},
        )

    def _weight(self) -> float | Gate:
        """The configuration's; a gate is made of its fields once, not at every token."""
        fields = self.config.lmbda
        if not isinstance(fields, dict):
            return fields
        if self._gate is None or self._gate[0] != fields:
            self._gate = copy.deepcopy(fields), _lmbda(self.config)
        return self._gate[1]

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.base.get_input_embeddings()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses: it would change the base, and leave the memory and the configuration as they are."""
        raise NotImplementedError(
            "base and memory keep their vocabulary: resize the models before from_models"
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The base's, which knows its own extra inputs."""
        return self.base.prepare_inputs_for_generation(*args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """What ``generate`` may be given is what the base takes, except embeddings for ids."""
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(_NEEDS_IDS)
        self.base._validate_model_kwargs(model_kwargs)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """Each model makes its cache, of the kind ``cache_implementation`` asks for."""
        if model_kwargs.get(CACHE) is not None:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]
            return
        caches = []
        for model in (self.base, self.memory):
            made: dict[str, Any] = {}
            model._prepare_cache_for_generation(generation_config, made, *args)
            caches.append(made.get(CACHE))
        if (pair := _paired(*caches)) is not None:  # None under the key would not mean no cache
            model_kwargs[CACHE] = pair


def _one_device(device_map: Any) -> str | torch.device:
    """The device that a device_map names for a whole model."""
    named = device_map
    if isinstance(named, dict) and len(named) == 1:
        named = named.get("")
    if isinstance(named, int) and not isinstance(named, bool):
        named = f"cuda:{named}"
    if isinstance(named, torch.device):
        return named
    if not isinstance(named, str) or named in ("balanced", "balanced_low_0", "sequential"):
        raise ValueError(
            "device_map must name one device for both models, such as 'auto' or 'cuda:0', "
            f"got {device_map!r}"
        )
    return named


def _lmbda(config: Any) -> Any:
    """A number, or the gate that the configuration holds, perhaps as its fields."""
    return Gate.from_dict(config.lmbda) if isinstance(config.lmbda, dict) else config.lmbda


def _paired(base: Cache | None, memory: Cache | None) -> MemoryDecoderCache | None:
    return None if base is None or memory is None else MemoryDecoderCache(base, memory)


def _tokenizer_of(name: str | Path) -> PreTrainedTokenizerBase | None:
    return load_tokenizer(name) if has_tokenizer(name) else None


# So that AutoModelForCausalLM loads a saved pair, and pipelines know that one generates text.
AutoConfig.register(MemoryDecoderConfig.model_type, MemoryDecoderConfig)
AutoModelForCausalLM.register(MemoryDecoderConfig, MemoryDecoderForCausalLM)
