"""Tiny random models of many architectures, with weights large enough to have opinions."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 53
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_OPTIONS = {
    "GPT2": _GPT,
    "GPTJ": _GPT | {"rotary_dim": 4},
    "Llama": _LLAMA,
    "Qwen2": _LLAMA,
    "Mistral": _LLAMA | {"sliding_window": 5},
    "Gemma": _LLAMA | {"head_dim": 8},
    "Gemma2": _LLAMA | {"head_dim": 8, "sliding_window": 5},
    "Phi": _LLAMA,
    "Mixtral": _LLAMA | {"num_local_experts": 4},
    "Qwen2Moe": _LLAMA
    | {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "GPTNeoX": {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
    "OPT": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    },
    "Bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 4},
}


def tiny_config(architecture: str, **changes: object) -> PreTrainedConfig:
    """A configuration of 3 layers of width 32; `changes` replace its fields."""
    options = {"vocab_size": VOCABULARY} | IDS | _OPTIONS[architecture] | changes
    return getattr(transformers, f"{architecture}Config")(**options)


def tiny_model(architecture: str, *, seed: int = 0, **changes: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:  # the usual 0.02 gives all tokens nearly the same probability
                weight.normal_(0, 0.3)
    return model


def tiny_tokenizer(
    words: int = 50, change: dict[int, str] | None = None
) -> PreTrainedTokenizerFast:
    """<pad>, <end>, <begin>, then one token a word: w3, w4, ...; `change` renames some."""
    tokens = ["<pad>", "<end>", "<begin>", *(f"w{i}" for i in range(3, words))]
    for index, token in (change or {}).items():
        tokens[index] = token
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=tokens[0], eos_token=tokens[1], bos_token=tokens[2]
    )


def saved(
    model: PreTrainedModel, path: Path, tokenizer: PreTrainedTokenizerFast | None = None
) -> Path:
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return path
