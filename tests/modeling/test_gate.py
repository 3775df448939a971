"""A pair whose lmbda is a gate: every way of decoding, the cache, saving and loading."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, saved, tiny_model, tiny_tokenizer
from torch import Tensor

from memdec import MemoryDecoderForCausalLM
from memdec.errors import MemdecError
from memdec.modeling.gate import Gate
from memdec.modeling.loading import load_model
from memdec.ops import fused_interpolate

GATE = Gate(0.8, base_log_max=-2.0, base_entropy=0.4, memory_log_max=3.0, memory_entropy=-0.5)


def pair(base: str = "Llama", memory: str = "GPT2", **options: Any) -> MemoryDecoderForCausalLM:
    models = tiny_model(base), tiny_model(memory, seed=1)
    return MemoryDecoderForCausalLM.from_models(*models, **({"lmbda": GATE} | options))


def prompt(rows: int = 2, length: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def lmbda(base: Tensor, memory: Tensor) -> Tensor:
    """The definition, in float64."""
    features = []
    for logits in (base, memory):
        log_probs = logits.double().log_softmax(-1)
        features += [log_probs.amax(-1), -(log_probs.exp() * log_probs).sum(-1)]
    bias, *weights = dataclasses.astuple(GATE)
    return torch.sigmoid(bias + sum(w * f for w, f in zip(weights, features, strict=True)))


def generate(model: Any, ids: Tensor, **options: Any) -> list[list[int]]:
    options = {"attention_mask": torch.ones_like(ids), "eos_token_id": -1} | options
    torch.manual_seed(3)
    return model.generate(ids, max_new_tokens=10, **({"do_sample": False} | options)).tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5", None])
def test_a_gate_has_finite_numbers(value: Any) -> None:
    with pytest.raises(MemdecError, match="base_entropy of a gate must be a finite number"):
        dataclasses.replace(GATE, base_entropy=value)


@pytest.mark.parametrize("value", ["adaptive", dataclasses.asdict(GATE), None, float("nan")])
def test_what_is_neither_number_nor_gate_is_refused(value: Any) -> None:
    with pytest.raises(MemdecError, match=r"lmbda must be in \[0, 1\] or a Gate, got"):
        pair(lmbda=value)


def test_each_token_has_its_own_lmbda() -> None:
    model, ids = pair(), prompt()
    logits = model.base(ids).logits, model.memory(ids).logits
    weights = lmbda(*logits)
    assert weights.min() < 0.2
    assert weights.max() > 0.5
    torch.testing.assert_close(
        model(ids).logits, fused_interpolate(*logits, weights), rtol=1e-4, atol=1e-4
    )


def test_padding_columns_do_not_count() -> None:
    model = pair(tokenizer=tiny_tokenizer())
    ids = prompt() % 50
    logits = [part(ids).logits for part in (model.base, model.memory)]
    expected = fused_interpolate(
        *logits, lmbda(*(part[..., :50] for part in logits)), vocab_size=50
    )
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_narrower_memory() -> None:
    model, ids = pair(), prompt() % 48
    model.memory = tiny_model("GPT2", seed=1, vocab_size=48)
    torch.testing.assert_close(model(ids).logits.exp().sum(-1), torch.ones(2, 7), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 0.8, "top_k": 9},
        {"num_beams": 4},
        {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
        {"cache_implementation": "static"},
    ],
)
@pytest.mark.parametrize(("base", "memory"), [("Llama", "GPT2"), ("Gemma2", "Mistral")])
def test_the_cache_changes_nothing(base: str, memory: str, options: dict) -> None:
    model, ids = pair(base, memory), prompt()
    cached = generate(model, ids, **options)
    options.pop("cache_implementation", None)
    assert cached == generate(model, ids, use_cache=False, **options)


def test_greedy_follows_the_definition() -> None:
    model, ids = pair(), prompt()
    expected = ids
    for _ in range(10):
        logits = [
            part(expected, use_cache=False).logits[:, -1] for part in (model.base, model.memory)
        ]
        mixed = fused_interpolate(*logits, lmbda(*logits))
        expected = torch.cat([expected, mixed.argmax(-1, keepdim=True)], dim=1)
    assert generate(model, ids) == expected.tolist()
    assert generate(pair(lmbda=0.5), ids) != expected.tolist()


def test_left_padded_rows_equal_single_rows() -> None:
    model, row = pair(), prompt(1, 4)
    batch = torch.cat([torch.zeros(1, 3, dtype=torch.int64), row], dim=1)
    padded = generate(model, batch, attention_mask=(batch != 0).long())
    assert padded[0][7:] == generate(model, row)[0][4:]


def test_both_models_get_gradients_and_the_gate_none() -> None:
    model, ids = pair(), prompt()
    model(ids, labels=ids).loss.backward()
    for part in (model.base, model.memory):
        grads = [weight.grad for weight in part.parameters() if weight.ndim > 1]
        assert all(torch.isfinite(grad).all() and grad.abs().sum() > 0 for grad in grads)


def test_saved_and_loaded_equal(tmp_path: Path) -> None:
    base = load_model(saved(tiny_model("Llama"), tmp_path / "base", tiny_tokenizer()))
    model = MemoryDecoderForCausalLM.from_models(
        base, tiny_model("GPT2", seed=1), lmbda=GATE, tokenizer=tiny_tokenizer()
    )
    model.save_pretrained(tmp_path / "pair")
    assert json.loads((tmp_path / "pair" / "config.json").read_text())["lmbda"] == vars(GATE)
    again = MemoryDecoderForCausalLM.from_pretrained(tmp_path / "pair")
    ids = prompt() % 50
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert generate(again, ids) == generate(model, ids)


def test_the_configuration_may_change_from_a_number_to_a_gate() -> None:
    model, ids = pair(lmbda=0.0), prompt()
    model.config.lmbda = dataclasses.asdict(GATE)
    assert torch.equal(model(ids).logits, pair()(ids).logits)
    assert not torch.equal(model(ids).logits, pair(lmbda=0.0)(ids).logits)
