"""A pair whose lmbda is a gate: every way of decoding, the cache, saving and loading."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, saved, tiny_model, tiny_tokenizer
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from memdec import MemoryDecoderForCausalLM
from memdec.data.corpus import TokenStream
from memdec.errors import MemdecError
from memdec.evaluation.forward import label_scores
from memdec.evaluation.gate import gate_lmbda
from memdec.evaluation.mixture import mix_log_probs
from memdec.modeling.cache import CACHE, MemoryDecoderCache
from memdec.modeling.gate import Gate
from memdec.modeling.loading import load_model
from memdec.ops import fused_interpolate


def a_gate(seed: int = 0) -> Gate:
    """A random one that neither trusts nor distrusts all."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator).tolist() for shape in ((8, 6), 8, 8)]
    names = ("hidden_weight", "hidden_bias", "output_weight")
    return Gate.from_dict(dict(zip(names, weights, strict=True)) | {"output_bias": 0.5})


GATE = a_gate()


def pair(base: str = "Llama", memory: str = "GPT2", **options: Any) -> MemoryDecoderForCausalLM:
    models = tiny_model(base), tiny_model(memory, seed=1)
    return MemoryDecoderForCausalLM.from_models(*models, **({"lmbda": GATE} | options))


def prompt(rows: int = 2, length: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def lmbda(base: Tensor, memory: Tensor, ids: Tensor) -> Tensor:
    """The definition for rows without padding, a token at a time, in float64."""
    return torch.stack([_of_row(*row) for row in zip(base, memory, ids, strict=True)])


def _of_row(base: Tensor, memory: Tensor, ids: Tensor) -> Tensor:
    found = []
    means, weight, last = [0.0, 0.0], 0.5, None
    scores = [logits.detach().double().log_softmax(-1) for logits in (base, memory)]
    for place, token in enumerate(ids.tolist()):
        if last is not None:
            told = [float(one[place - 1, token].exp()) for one in scores]
            gain = max(min(math.log(told[1] / told[0]), 5.0), -5.0)
            means = [
                keep * mean + (1 - keep) * gain
                for keep, mean in zip((0.8, 0.98), means, strict=True)
            ]
            mixed = (1 - last) * told[0] + last * told[1]
            weight = weight * mixed / (weight * mixed + (1 - weight) * told[0])
            weight = 1e-3 / 2 + (1 - 1e-3) * weight
        features = []
        for one in scores:
            entropy = -float((one[place].exp() * one[place]).sum())
            features += [float(one[place].max()), entropy]
        hidden = torch.tensor(GATE.hidden_weight).double() @ torch.tensor(features + means).double()
        hidden = torch.tanh(hidden + torch.tensor(GATE.hidden_bias))
        score = float((hidden * torch.tensor(GATE.output_weight)).sum()) + GATE.output_bias
        last = 1 / (1 + math.exp(-score))
        found.append(last * weight)
    return torch.tensor(found)


def generate(model: Any, ids: Tensor, **options: Any) -> list[list[int]]:
    options = {"attention_mask": torch.ones_like(ids), "eos_token_id": -1} | options
    torch.manual_seed(3)
    return model.generate(ids, max_new_tokens=10, **({"do_sample": False} | options)).tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5", None])
def test_a_gate_has_finite_numbers(value: Any) -> None:
    with pytest.raises(MemdecError, match="a number of a gate must be finite, got"):
        dataclasses.replace(GATE, output_bias=value)
    with pytest.raises(MemdecError, match="a number of a gate must be finite, got"):
        dataclasses.replace(GATE, hidden_bias=(value, *GATE.hidden_bias[1:]))


def test_a_gate_has_numbers_that_fit() -> None:
    with pytest.raises(MemdecError, match="the sizes of a gate must be those of 6 features"):
        dataclasses.replace(GATE, hidden_weight=GATE.hidden_weight[1:])
    with pytest.raises(MemdecError, match="the sizes of a gate must be those of 6 features"):
        dataclasses.replace(GATE, hidden_weight=tuple(row[1:] for row in GATE.hidden_weight))


@pytest.mark.parametrize("saved", [None, [1, 2], {}, {"bias": 0.3, "base_log_max": -2.0}])
def test_what_was_saved_as_another_gate_is_refused(saved: Any) -> None:
    with pytest.raises(MemdecError, match=r"expected a gate with hidden_weight, .* fit it anew"):
        Gate.from_dict(saved)


@pytest.mark.parametrize("saved", [{}, {"bias": 0.3, "base_log_max": -2.0}])
def test_a_pair_whose_gate_is_another_refuses_to_run(saved: dict) -> None:
    model = pair()
    model.config.lmbda = saved
    with pytest.raises(MemdecError, match=r"expected a gate with hidden_weight, .* fit it anew"):
        model(prompt())


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_weight": 3},
        {"hidden_weight": [1.0] * 8},
        {"hidden_bias": None},
        {"output_weight": {"a": 1.0}},
        {"hidden_weight": [], "hidden_bias": [], "output_weight": []},
        {"output_bias": 10**400},
    ],
)
def test_what_is_no_network_is_refused(changes: dict) -> None:
    with pytest.raises(MemdecError, match="of a gate must be"):
        Gate.from_dict(dataclasses.asdict(GATE) | changes)


@pytest.mark.parametrize("value", ["adaptive", dataclasses.asdict(GATE), None, float("nan")])
def test_what_is_neither_number_nor_gate_is_refused(value: Any) -> None:
    with pytest.raises(MemdecError, match=r"lmbda must be in \[0, 1\] or a Gate, got"):
        pair(lmbda=value)


def test_each_token_has_its_own_lmbda() -> None:
    model, ids = pair(), prompt(2, 30)
    logits = model.base(ids).logits, model.memory(ids).logits
    weights = lmbda(*logits, ids)
    assert weights.max() > 0.5
    assert weights.min() < 0.2
    torch.testing.assert_close(
        model(ids).logits, fused_interpolate(*logits, weights), rtol=1e-4, atol=1e-4
    )


def test_the_evaluation_of_a_text_is_that_of_its_tokens_one_by_one() -> None:
    model, ids = pair(), prompt(1, 40)
    stream = TokenStream((ids[0].numpy().astype(np.int32),), np.array([1]))
    options = {"block_size": 39, "batch_blocks": 1, "vocab_size": VOCABULARY}
    scores = [
        label_scores(part, stream, with_confidence=True, **options)
        for part in (model.base, model.memory)
    ]
    weights = gate_lmbda(GATE, *scores, stream, 39)
    expected = mix_log_probs(*(one.log_probs for one in scores), weights)
    cache, found = None, []
    for place in range(39):
        result = model(ids[:, place : place + 1], **{CACHE: cache})
        cache = getattr(result, CACHE)
        found.append(result.logits[0, 0, ids[0, place + 1]].item())
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_padding_columns_do_not_count() -> None:
    model = pair(tokenizer=tiny_tokenizer())
    ids = prompt() % 50
    logits = [part(ids).logits for part in (model.base, model.memory)]
    weights = lmbda(*(part[..., :50] for part in logits), ids)
    expected = fused_interpolate(*logits, weights, vocab_size=50)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_narrower_memory() -> None:
    model, ids = pair(), prompt() % 48
    model.memory = tiny_model("GPT2", seed=1, vocab_size=48)
    ids[:, 3] = 50  # no token of the memory
    torch.testing.assert_close(model(ids).logits.exp().sum(-1), torch.ones(2, 7), rtol=0, atol=1e-5)
    memory = pad(model.memory(torch.where(ids < 48, ids, 0)).logits, (0, 5), value=-1e4)
    weights = lmbda(model.base(ids).logits, memory.clamp(min=-60), ids)
    expected = fused_interpolate(model.base(ids).logits, memory, weights)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 0.8, "top_k": 9},
        {"num_beams": 4},
        {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
    ],
)
@pytest.mark.parametrize(("base", "memory"), [("Llama", "GPT2"), ("Gemma2", "Mistral")])
def test_the_cache_changes_nothing(base: str, memory: str, options: dict) -> None:
    model, ids = pair(base, memory), prompt()
    cached = generate(model, ids, **options)
    for name in ("cache_implementation", "prefill_chunk_size"):
        options.pop(name, None)
    assert cached == generate(model, ids, use_cache=False, **options)


def test_greedy_follows_the_definition() -> None:
    model, ids = pair(), prompt()
    expected = ids
    for _ in range(10):
        logits = [part(expected, use_cache=False).logits for part in (model.base, model.memory)]
        mixed = fused_interpolate(*(one[:, -1] for one in logits), lmbda(*logits, expected)[:, -1])
        expected = torch.cat([expected, mixed.argmax(-1, keepdim=True)], dim=1)
    assert generate(model, ids) == expected.tolist()
    assert generate(pair(lmbda=0.5), ids) != expected.tolist()


@pytest.mark.parametrize("help_from", ["the prompt", "a model"])
@pytest.mark.parametrize(("base", "memory"), [("Llama", "GPT2"), ("Gemma2", "Mistral")])
def test_assisted_generation_rolls_the_evidence_back(
    base: str, memory: str, help_from: str
) -> None:
    model, ids = pair(base, memory), prompt(1, 5).repeat(1, 3)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
    if help_from == "a model":
        options = {"assistant_model": tiny_model("Llama", seed=2)}
    assert generate(model, ids, **options) == generate(model, ids, use_cache=False)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 2}])
def test_left_padded_rows_equal_single_rows(options: dict) -> None:
    model, rows = pair(), prompt(2, 9)
    batch = torch.stack([pad(rows[0, :6], (3, 0)), rows[1]])
    padded = generate(model, batch, attention_mask=(batch != 0).long(), **options)
    assert padded[0][9:] == generate(model, rows[:1, :6], **options)[0][6:]
    assert padded[1][9:] == generate(model, rows[1:], **options)[0][9:]


@pytest.mark.parametrize(("base", "memory"), [("Llama", "GPT2"), ("Bloom", "OPT")])
def test_padding_on_either_side_changes_no_probability(base: str, memory: str) -> None:
    model, row = pair(base, memory), prompt(1, 8)
    alone = model(row).logits
    for sides in ((3, 0), (0, 3), (2, 2)):
        batch, mask = pad(row, sides), pad(torch.ones_like(row), sides)
        places = (mask.cumsum(-1) - 1).clamp(min=0) if base == "Llama" else None  # or by the mask
        found = model(batch, attention_mask=mask, position_ids=places).logits
        torch.testing.assert_close(found[mask.bool()], alone[0], rtol=1e-4, atol=1e-4)


def test_documents_that_share_a_row_have_evidence_of_their_own() -> None:
    model, ids = pair("Llama", "Qwen2"), prompt(1, 20)
    places = torch.cat([torch.arange(12), torch.arange(8)])[None]
    together = model(ids, position_ids=places, use_cache=False).logits
    for part in (slice(0, 12), slice(12, 20)):
        alone = model(ids[:, part]).logits
        torch.testing.assert_close(together[:, part], alone, rtol=1e-4, atol=1e-4)


def test_a_conversation_goes_on_from_the_returned_cache() -> None:
    model, ids = pair("Gemma2", "GPT2"), prompt(1, 9)
    options = {"attention_mask": None, "eos_token_id": -1, "do_sample": False}
    first = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, **options)
    more = torch.cat([first.sequences, prompt(1, 3)], dim=1)
    assert generate(model, more, **{CACHE: getattr(first, CACHE)}) == generate(model, more)


def test_the_cache_is_cropped_and_its_rows_are_chosen_with_the_evidence() -> None:
    model, ids = pair(), prompt(3, 12)
    cache = getattr(model(ids[:, :9]), CACHE)
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_select_indices(torch.tensor([1, 2]))
    cache.batch_repeat_interleave(2)
    rows = ids[[0, 0, 1, 1]]
    rest = model(rows[:, 6:], logits_to_keep=2, **{CACHE: cache}).logits
    torch.testing.assert_close(rest, model(rows).logits[:, -2:], rtol=1e-4, atol=1e-4)


def test_a_cache_given_goes_on_by_itself() -> None:
    model, ids = pair(), prompt()
    cache = MemoryDecoderCache(DynamicCache(), DynamicCache())
    model(ids[:, :5], **{CACHE: cache})
    rest = model(ids[:, 5:], **{CACHE: cache}).logits
    torch.testing.assert_close(rest, model(ids).logits[:, 5:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [0, 3, torch.tensor([1, 4])])
def test_logits_to_keep(keep: Any) -> None:
    model, ids = pair(), prompt()
    kept = keep if isinstance(keep, Tensor) else slice(-keep, None)
    found = model(ids, logits_to_keep=keep)
    torch.testing.assert_close(found.logits, model(ids).logits[:, kept], rtol=1e-4, atol=1e-4)
    more = model(ids[:, :1], **{CACHE: getattr(found, CACHE)}).logits
    whole = model(torch.cat([ids, ids[:, :1]], dim=1)).logits[:, -1:]
    torch.testing.assert_close(more, whole, rtol=1e-4, atol=1e-4)


def test_a_cache_without_the_evidence_is_refused() -> None:
    model, ids = pair(lmbda=0.5), prompt()
    cache = getattr(model(ids), CACHE)
    model.config.lmbda = dataclasses.asdict(GATE)
    with pytest.raises(ValueError, match="cannot go on from a cache that was filled without one"):
        model(ids, **{CACHE: cache})
    cache = getattr(model(ids, logits_to_keep=2), CACHE)
    cache.crop(-2)
    with pytest.raises(ValueError, match=r"from the last 2 of 7 positions.*the cache holds 5"):
        model(ids, **{CACHE: cache})


def test_a_pass_without_a_gate_leaves_no_evidence_of_what_it_replaced() -> None:
    model, ids = pair(), prompt()
    cache = getattr(model(ids), CACHE)
    cache.crop(-3)
    model.config.lmbda = 0.5
    model(ids[:, :3], **{CACHE: cache})  # as many tokens as before, but others
    model.config.lmbda = GATE
    with pytest.raises(ValueError, match="cannot go on from a cache that was filled without one"):
        model(ids[:, :1], **{CACHE: cache})


def test_a_mask_that_does_not_tell_the_padding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_mask as \[batch, past \+ length\]"):
        pair()(prompt(), attention_mask=torch.ones(2, 1, 7, 7))


def test_compiles_without_a_warning() -> None:
    model, ids = pair(), prompt()
    compiled = torch.compile(model.forward, backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Dynamo")
        result = compiled(ids).logits
    torch.testing.assert_close(result, model(ids).logits)


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
    assert json.loads((tmp_path / "pair" / "config.json").read_text())["lmbda"] == json.loads(
        json.dumps(dataclasses.asdict(GATE))
    )
    again = MemoryDecoderForCausalLM.from_pretrained(tmp_path / "pair")
    ids = prompt() % 50
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert generate(again, ids) == generate(model, ids)


def test_a_gate_that_is_changed_counts_from_then_on() -> None:
    model, ids = pair(), prompt()
    before = model(ids).logits
    model.config.lmbda["output_bias"] = -2.0
    found = model(ids).logits
    assert not torch.equal(found, before)
    assert torch.equal(found, pair(lmbda=dataclasses.replace(GATE, output_bias=-2.0))(ids).logits)
    model.config.lmbda = dataclasses.asdict(GATE)
    assert torch.equal(model(ids).logits, before)


def test_a_gate_that_was_put_in_later_is_saved(tmp_path: Path) -> None:
    model = pair(lmbda=0.5)
    model.config.lmbda = GATE
    model.save_pretrained(tmp_path, save_base=True)
    found = MemoryDecoderForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(found(prompt()).logits, pair()(prompt()).logits)


@pytest.mark.parametrize("gate", [GATE, dataclasses.asdict(GATE)])
def test_the_configuration_may_change_from_a_number_to_a_gate(gate: Any) -> None:
    model, ids = pair(lmbda=0.0), prompt()
    model.config.lmbda = gate
    assert torch.equal(model(ids).logits, pair()(ids).logits)
    assert not torch.equal(model(ids).logits, pair(lmbda=0.0)(ids).logits)
