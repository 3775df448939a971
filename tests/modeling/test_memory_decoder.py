from __future__ import annotations

import json
import logging
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from operations import Operations
from tiny_models import VOCABULARY, saved, tiny_config, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    StaticCache,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from memdec import MemoryDecoderForCausalLM
from memdec.errors import MemdecError
from memdec.modeling.cache import CACHE, MemoryDecoderCache
from memdec.modeling.loading import load_model, load_shape

LMBDA = 0.4
# (base, memory): absolute and rotary positions, sliding windows of 5 in either, no positions at all
PAIRS = [
    ("Llama", "GPT2"),
    ("GPT2", "Llama"),
    ("Gemma2", "Qwen2"),
    ("Phi", "Mistral"),
    ("Bloom", "OPT"),
]


def pair(base: str = "Llama", memory: str = "GPT2", **options: Any) -> MemoryDecoderForCausalLM:
    models = tiny_model(base), tiny_model(memory, seed=1)
    return MemoryDecoderForCausalLM.from_models(*models, **({"lmbda": LMBDA} | options))


def prompt(rows: int = 2, length: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def mixture(base: Tensor, memory: Tensor, lmbda: float = LMBDA) -> Tensor:
    """The definition, in float64."""
    first = math.log(1 - lmbda) + base.double().log_softmax(-1)
    return torch.logaddexp(first, math.log(lmbda) + memory.double().log_softmax(-1))


def greedy(model: MemoryDecoderForCausalLM, ids: Tensor, steps: int) -> Tensor:
    """Greedy decoding by the definition: both models anew at every step, without any cache."""
    for _ in range(steps):
        logits = [m(ids, use_cache=False).logits[:, -1] for m in (model.base, model.memory)]
        ids = torch.cat([ids, mixture(*logits).argmax(-1, keepdim=True)], dim=1)
    return ids


def generate(model: Any, ids: Tensor, steps: int = 10, **options: Any) -> Any:
    options = {"attention_mask": torch.ones_like(ids), "eos_token_id": -1} | options
    return model.generate(ids, max_new_tokens=steps, **({"do_sample": False} | options))


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


# ---- forward ----


@pytest.mark.parametrize(("base", "memory"), PAIRS)
def test_logits_are_the_mixtures_log_probabilities(base: str, memory: str) -> None:
    model, ids = pair(base, memory), prompt()
    result = model(ids).logits
    expected = mixture(model.base(ids).logits, model.memory(ids).logits)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.log_softmax(-1), result, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("lmbda", "name"), [(0.0, "base"), (1.0, "memory")])
def test_at_the_ends_it_is_one_of_its_parents(lmbda: float, name: str) -> None:
    model, ids = pair(lmbda=lmbda), prompt()
    parent = getattr(model, name)
    torch.testing.assert_close(
        model(ids).logits, parent(ids).logits.log_softmax(-1), rtol=1e-5, atol=1e-5
    )
    assert generate(model, ids).tolist() == generate(parent, ids).tolist()


def test_lmbda_may_be_changed_later() -> None:
    model, ids = pair(), prompt()
    model.config.lmbda = 0.0
    expected = model.base(ids).logits.log_softmax(-1)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4])])
def test_logits_to_keep_goes_to_both(keep: int | Tensor) -> None:
    model, ids = pair(), prompt()
    whole = model(ids).logits
    expected = whole[:, keep] if isinstance(keep, Tensor) else whole[:, -keep:]
    shapes = []
    for part in (model.base, model.memory):
        part.register_forward_hook(lambda *args: shapes.append(args[-1].logits.shape[1]))
    torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, expected)
    assert shapes == [expected.shape[1]] * 2


def test_labels_give_the_mixtures_nll_and_gradients() -> None:
    model, ids = pair(), prompt()
    labels = ids.clone()
    labels[0, :4] = -100
    output = model(ids, labels=labels)
    log_probs = mixture(model.base(ids).logits, model.memory(ids).logits)[:, :-1]
    scores = log_probs.gather(-1, ids[:, 1:, None])[..., 0]
    expected = -scores[labels[:, 1:] != -100].mean()
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=1e-5)
    output.loss.backward()
    for part in (model.base, model.memory):
        assert all(weight.grad.abs().sum() > 0 for weight in part.parameters() if weight.ndim > 1)


def test_tuple_output() -> None:
    model, ids = pair(), prompt()
    loss, logits, _ = model(ids, labels=ids, return_dict=False)
    assert loss.ndim == 0
    torch.testing.assert_close(logits, model(ids).logits)


def test_neither_model_is_changed() -> None:
    base, memory = tiny_model("Llama"), tiny_model("GPT2", seed=1, vocab_size=60)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (base, memory)]
    base_logits = base(prompt()).logits
    model = MemoryDecoderForCausalLM.from_models(base, memory, lmbda=0.5)
    generate(model, prompt())
    assert model.base is base
    assert model.memory is memory
    for part, weights in zip((base, memory), before, strict=True):
        assert part.state_dict().keys() == weights.keys()
        assert all(torch.equal(part.state_dict()[k], v) for k, v in weights.items())
    assert torch.equal(base(prompt()).logits, base_logits)


# ---- vocabularies of different widths ----


def test_columns_the_memory_lacks_keep_the_bases_share() -> None:
    model = pair()
    model.memory = tiny_model("GPT2", seed=1, vocab_size=48)
    ids = prompt() % 48
    result = model(ids).logits
    base = model.base(ids).logits.double().log_softmax(-1)
    torch.testing.assert_close(
        result[..., 48:].double(), base[..., 48:] + math.log(1 - LMBDA), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(result.exp().sum(-1), torch.ones(2, 7), rtol=0, atol=1e-5)


def test_columns_beyond_the_tokenizer_take_no_mass() -> None:
    model = MemoryDecoderForCausalLM.from_models(
        tiny_model("Llama"),
        tiny_model("GPT2", vocab_size=60),
        lmbda=LMBDA,
        tokenizer=tiny_tokenizer(),
    )
    result = model(prompt() % 50).logits
    assert result.shape[-1] == VOCABULARY
    assert torch.isneginf(result[..., 50:]).all()
    torch.testing.assert_close(result.exp().sum(-1), torch.ones(2, 7), rtol=0, atol=1e-5)


def test_a_token_behind_skipped_ids_takes_mass() -> None:
    parts = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    parts["model"]["vocab"]["w49"] = 52
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)))
    result = pair(tokenizer=tokenizer)(prompt()).logits
    assert result[..., 52].isfinite().all()
    assert torch.isneginf(result[..., 53:]).all()


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"pad_token_id": 5, "eos_token_id": 6}, 5),
        ({"pad_token_id": None, "eos_token_id": 6}, 6),
        ({"pad_token_id": None, "eos_token_id": [6, 7]}, 6),
        ({"pad_token_id": 52, "eos_token_id": 6}, 6),
        ({"pad_token_id": None, "eos_token_id": None}, 0),
    ],
)
def test_ids_beyond_the_memorys_embedding_are_fed_as_padding(special: dict, expected: int) -> None:
    memory = tiny_model("GPT2", seed=1, vocab_size=40, **special)
    model = MemoryDecoderForCausalLM.from_models(tiny_model("Llama"), memory, lmbda=1.0)
    ids = torch.tensor([[3, 39, 40, 52, 7]])
    replaced = torch.tensor([[3, 39, expected, expected, 7]])
    expected_log_probs = memory(replaced).logits.log_softmax(-1)
    torch.testing.assert_close(
        model(ids).logits[..., :40], expected_log_probs, rtol=1e-5, atol=1e-5
    )


def test_compiles_as_one_graph_without_a_warning() -> None:
    model, ids = pair("Llama", "Bloom"), prompt()
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Dynamo")
        result = compiled(ids).logits
    torch.testing.assert_close(result, model(ids).logits)


# ---- generation ----


@pytest.mark.parametrize(("base", "memory"), PAIRS)
def test_greedy_generation_follows_the_definition(base: str, memory: str) -> None:
    model, ids = pair(base, memory), prompt()
    assert generate(model, ids).tolist() == greedy(model, ids, 10).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
        {"do_sample": True, "temperature": 0.8, "top_k": 9, "top_p": 0.9},
        {"repetition_penalty": 1.5},
    ],
)
@pytest.mark.parametrize(("base", "memory"), [("Llama", "GPT2"), ("Gemma2", "Mistral")])
def test_the_cache_changes_nothing(base: str, memory: str, options: dict) -> None:
    model, ids = pair(base, memory), prompt()
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(generate(model, ids, use_cache=use_cache, **options).tolist())
    assert results[0] == results[1]


def operations_of_a_token(model: Any, rows: int) -> int:
    counts = []
    for steps in (4, 5):
        with Operations() as operations:
            generate(model, prompt(rows), steps)
        counts.append(operations.count)
    return counts[1] - counts[0]


def test_a_token_costs_what_both_models_cost_whatever_the_batch() -> None:
    """Where launches are what takes the time, more of them would be the pair's own loss."""
    model = pair()
    apart = [operations_of_a_token(one, 1) for one in (model.base, model.memory)]
    together = [operations_of_a_token(model, rows) for rows in (1, 32)]
    assert together[0] == together[1]
    assert max(apart) < together[0] < sum(apart)


def test_beams_find_what_greedy_misses() -> None:
    model, ids = pair(), prompt(rows=1)

    # All 53 ** 2 continuations of two tokens can be scored; as many beams must find the best.
    tails = torch.cartesian_prod(torch.arange(VOCABULARY), torch.arange(VOCABULARY))
    every = torch.cat([ids.expand(len(tails), -1), tails], dim=1)
    with torch.no_grad():
        log_probs = model(every).logits[:, 6:-1].gather(-1, tails[..., None])[..., 0]
    best = every[log_probs.sum(-1).argmax()].tolist()
    assert generate(model, ids, steps=2, num_beams=VOCABULARY)[0].tolist() == best
    assert generate(model, ids, steps=2)[0].tolist() != best


def test_sampling_draws_from_the_mixture() -> None:
    model, ids = pair(), prompt(rows=1)
    torch.manual_seed(0)
    drawn = generate(model, ids, steps=1, do_sample=True, top_k=0, num_return_sequences=4_000)[
        :, -1
    ]
    expected = model(ids).logits[0, -1].exp()
    found = torch.bincount(drawn, minlength=VOCABULARY) / len(drawn)
    deviation = (found - expected).abs() / (expected / len(drawn)).sqrt().clamp(min=1e-4)
    assert deviation.max() < 5  # standard deviations; either parent alone is far outside
    for parent in (model.base, model.memory):
        alone = parent(ids).logits[0, -1].softmax(-1)
        assert (found - alone).abs().sum() > 0.1


@pytest.mark.parametrize(("base", "memory"), PAIRS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_left_padded_rows_equal_single_rows(base: str, memory: str, options: dict) -> None:
    model = pair(base, memory)
    rows = [prompt(1, length) for length in (3, 8, 5)]
    batch, mask = torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 8, dtype=torch.int64)
    for i, row in enumerate(rows):
        batch[i, 8 - row.shape[1] :] = row
        mask[i, 8 - row.shape[1] :] = 1
    together = generate(model, batch, attention_mask=mask, **options)
    for i, row in enumerate(rows):
        alone = generate(model, row, **options)
        assert together[i, 8:].tolist() == alone[0, row.shape[1] :].tolist()


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_left_padding_gives_the_same_probabilities(implementation: str) -> None:
    model, row = pair(), prompt(1, 4)
    model.generation_config.cache_implementation = implementation
    batch = torch.cat([torch.zeros(1, 3, dtype=torch.int64), row], dim=1)
    options = {"return_dict_in_generate": True, "output_logits": True, "steps": 6}
    padded = generate(model, batch, attention_mask=(batch != 0).long(), **options)
    alone = generate(model, row, **options)
    for one, other in zip(padded.logits, alone.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_stops_at_eos_and_at_exactly_the_number_of_new_tokens() -> None:
    model, ids = pair(), prompt(rows=1)
    free = generate(model, ids, steps=10)
    assert free.shape == (1, 17)
    eos = int(free[0, 11])
    first = (free[0, 7:] == eos).nonzero()[0, 0]
    stopped = generate(model, ids, steps=10, eos_token_id=eos, pad_token_id=0)
    assert stopped[0].tolist() == free[0, : 7 + first + 1].tolist()


def test_rows_that_ended_are_padded() -> None:
    model, ids = pair(), prompt()
    free = generate(model, ids, steps=10)
    eos = int(free[0, 9])
    stopped = generate(model, ids, steps=10, eos_token_id=eos, pad_token_id=0)
    for row, whole in zip(stopped.tolist(), free.tolist(), strict=True):
        ends = [i for i in range(7, 17) if whole[i] == eos]
        end = ends[0] + 1 if ends else 17
        expected = whole[:end] + [0] * (17 - end)
        assert row == expected[: len(row)]
        assert set(expected[len(row) :]) <= {0}


def test_streams_the_tokens_it_returns() -> None:
    model, ids, streamer = pair(), prompt(rows=1), Collect()
    result = generate(model, ids, streamer=streamer)
    assert streamer.tokens == result[0].tolist()
    assert streamer.ended


def test_generation_config_is_the_bases() -> None:
    base, memory = tiny_model("Llama"), tiny_model("GPT2", seed=1)
    base.generation_config.max_new_tokens = 3
    memory.generation_config.max_new_tokens = 5
    model = MemoryDecoderForCausalLM.from_models(base, memory, lmbda=LMBDA)
    ids = prompt(rows=1)
    result = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False)
    assert result.shape[1] == ids.shape[1] + 3
    model.generation_config.max_new_tokens = 4
    assert base.generation_config.max_new_tokens == 3


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_cache_implementation_is_followed_by_both(implementation: str) -> None:
    model, ids = pair("Gemma2", "GPT2"), prompt()
    result = generate(model, ids, cache_implementation=implementation, return_dict_in_generate=True)
    assert result.sequences.tolist() == greedy(model, ids, 10).tolist()
    kind = {"static": "StaticCache", "dynamic": "DynamicCache"}[implementation]
    cache = getattr(result, CACHE)
    assert [type(cache.base).__name__, type(cache.memory).__name__] == [kind, kind]


def test_cache_implementation_may_come_from_the_base() -> None:
    model, ids = pair(), prompt()
    model.generation_config.cache_implementation = "static"
    assert generate(model, ids).tolist() == greedy(model, ids, 10).tolist()


def test_prompt_in_chunks() -> None:
    model, ids = pair("Gemma2", "GPT2"), prompt(2, 11)
    chunked = generate(model, ids, prefill_chunk_size=4)
    assert chunked.tolist() == greedy(model, ids, 10).tolist()


@pytest.mark.parametrize("help_from", ["the prompt", "a model"])
@pytest.mark.parametrize(("base", "memory"), [("Llama", "GPT2"), ("Gemma2", "Mistral")])
def test_assisted_generation_rolls_both_caches_back(base: str, memory: str, help_from: str) -> None:
    model = pair(base, memory)
    ids = prompt(1, 5).repeat(1, 3)
    options = {"prompt_lookup_num_tokens": 4} if help_from == "the prompt" else {}
    if help_from == "a model":
        options["assistant_model"] = tiny_model("Llama", seed=2)
    assert generate(model, ids, **options).tolist() == greedy(model, ids, 10).tolist()


# ---- the cache ----


def test_conversation_goes_on_from_the_returned_cache() -> None:
    model, ids = pair("Gemma2", "GPT2"), prompt(1, 9)
    first = generate(model, ids, steps=4, return_dict_in_generate=True)
    more = torch.cat([first.sequences, prompt(1, 3)], dim=1)
    second = generate(model, more, steps=4, **{CACHE: getattr(first, CACHE)})
    assert second.tolist() == greedy(model, more, 4).tolist()


def test_cache_in_steps_by_hand_then_cropped_and_reordered() -> None:
    model, ids = pair(), prompt()
    whole = model(ids).logits
    cache = getattr(model(ids[:, :5]), CACHE)
    assert cache.get_seq_length() == cache.memory.get_seq_length() == 5
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0]))
    rest = model(ids.flip(0)[:, 3:], **{CACHE: cache})
    torch.testing.assert_close(rest.logits, whole.flip(0)[:, 3:], rtol=1e-4, atol=1e-4)
    assert getattr(rest, CACHE).memory.get_seq_length() == 7


def test_cache_is_reset_as_one() -> None:
    model, ids = pair(), prompt()
    # Static caches: in transformers 5.17 a dynamic one keeps its length.
    cache = MemoryDecoderCache(
        *(StaticCache(m.config, max_cache_len=9) for m in (model.base, model.memory))
    )
    model(ids.flip(0), **{CACHE: cache})
    cache.reset()
    again = model(ids, **{CACHE: cache})
    torch.testing.assert_close(again.logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_cache_that_has_no_layers_yet() -> None:
    model, ids = pair(), prompt()
    cache = MemoryDecoderCache(DynamicCache(), DynamicCache())
    model(ids[:, :5], **{CACHE: cache})
    assert cache.base.get_seq_length() == cache.memory.get_seq_length() == 5
    rest = model(ids[:, 5:], **{CACHE: cache}).logits
    torch.testing.assert_close(rest, model(ids).logits[:, 5:], rtol=1e-4, atol=1e-4)


def test_no_cache_when_none_is_wanted() -> None:
    assert getattr(pair()(prompt(), use_cache=False), CACHE) is None


def test_a_cache_of_one_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"MemoryDecoderCache.*got DynamicCache"):
        pair()(prompt(), **{CACHE: DynamicCache()})


def test_both_names_of_the_cache_are_taken_but_not_together() -> None:
    model, ids = pair(), prompt()
    whole = model(ids).logits
    for name in ("cache", "past_key_values"):
        cache = getattr(model(ids[:, :5]), CACHE)
        rest = model(ids[:, 5:], **{name: cache}).logits
        torch.testing.assert_close(rest, whole[:, 5:], rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="one argument, got both"):
        model(ids, cache=cache, past_key_values=cache)


# ---- further inputs ----


def test_further_arguments_go_to_the_base_alone() -> None:
    model, ids = pair(), prompt()
    given = []
    model.memory.register_forward_pre_hook(lambda *a: given.append(a[-1]), with_kwargs=True)
    output = model(ids, output_hidden_states=True)
    assert "output_hidden_states" not in given[0]
    expected = model.base(ids, output_hidden_states=True).hidden_states
    assert len(output.hidden_states) == len(expected)
    torch.testing.assert_close(output.hidden_states[-1], expected[-1])


def test_image_goes_to_the_base_alone() -> None:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = LlavaConfig(vision_config=vision, text_config=tiny_config("Llama"), image_token_id=52)
    torch.manual_seed(0)
    base = LlavaForConditionalGeneration(config).eval()
    model = MemoryDecoderForCausalLM.from_models(
        base, tiny_model("GPT2", seed=1, vocab_size=50), lmbda=LMBDA
    )
    ids = torch.tensor([[3, 52, 52, 52, 52, 4, 5]])
    images = {"pixel_values": torch.randn(1, 3, 8, 8)}
    text = torch.where(ids < 50, ids, 0)
    wide = torch.full((1, 7, VOCABULARY), -math.inf)
    wide[..., :50] = model.memory(text).logits
    expected = mixture(base(ids, **images).logits, wide)
    torch.testing.assert_close(model(ids, **images).logits.double(), expected, rtol=1e-5, atol=1e-5)
    with_image = generate(model, ids, **images)
    model.config.lmbda = 0.0
    assert generate(model, ids, **images).tolist() == generate(base, ids, **images).tolist()
    assert with_image.shape == (1, 17)


def test_unknown_generation_argument_is_refused() -> None:
    with pytest.raises(ValueError, match="no_such_option"):
        generate(pair(), prompt(), no_such_option=1)


def test_embeddings_instead_of_ids_are_refused() -> None:
    model = pair()
    with pytest.raises(ValueError, match="input_ids are needed"):
        model(inputs_embeds=torch.zeros(1, 2, 32))
    for ids in ({}, {"input_ids": prompt()[:1]}):
        with pytest.raises(ValueError, match="input_ids are needed"):
            model.generate(**ids, inputs_embeds=torch.zeros(1, 2, 32))


# ---- making, saving, loading ----


def test_a_name_in_place_of_a_model_is_refused() -> None:
    with pytest.raises(MemdecError, match="base must be a model that is loaded, got 'gpt2'"):
        MemoryDecoderForCausalLM.from_models("gpt2", tiny_model("GPT2"), lmbda=0.5)


@pytest.mark.parametrize("name", ["tokenizer", "memory_tokenizer"])
def test_a_name_in_place_of_a_tokenizer_is_refused(name: str) -> None:
    with pytest.raises(MemdecError, match=f"{name} must be a tokenizer that is loaded, got 'gpt2'"):
        pair(**{name: "gpt2"})


def test_resizing_is_refused_before_it_changes_the_base() -> None:
    model = pair()
    with pytest.raises(NotImplementedError, match="before from_models"):
        model.resize_token_embeddings(10)
    assert model.base.get_input_embeddings().weight.shape[0] == VOCABULARY


@pytest.mark.parametrize("lmbda", [-0.1, 1.1, math.nan])
def test_lmbda_outside_the_unit_interval_is_refused(lmbda: float) -> None:
    with pytest.raises(MemdecError, match=r"lmbda must be in \[0, 1\]"):
        pair(lmbda=lmbda)


def test_tokenizers_that_differ_are_refused() -> None:
    with pytest.raises(MemdecError, match="id 9 is 'w9' in the base and 'other' in the memory"):
        pair(tokenizer=tiny_tokenizer(), memory_tokenizer=tiny_tokenizer(change={9: "other"}))


def test_model_without_a_key_value_cache_is_refused() -> None:
    with pytest.raises(MemdecError, match=r"the memory must be a decoder-only model.*Mamba"):
        pair("Llama", "Mamba")


@pytest.fixture
def saved_base(tmp_path: Path) -> Path:
    return saved(tiny_model("Llama"), tmp_path / "llama", tiny_tokenizer())


def joint_of(base: Path) -> MemoryDecoderForCausalLM:
    return MemoryDecoderForCausalLM.from_models(
        AutoModelForCausalLM.from_pretrained(base).eval(),
        tiny_model("GPT2", seed=1),
        lmbda=LMBDA,
        tokenizer=tiny_tokenizer(),
    )


@pytest.mark.parametrize("save_base", [False, True])
def test_saved_pair_loads_equal(saved_base: Path, tmp_path: Path, save_base: bool) -> None:
    model, ids = joint_of(saved_base), prompt() % 50
    model.generation_config.max_new_tokens = 6
    model.save_pretrained(tmp_path / "pair", save_base=save_base)
    assert (tmp_path / "pair" / "base").is_dir() == save_base
    if save_base:
        saved_base.rename(tmp_path / "gone")
    again = MemoryDecoderForCausalLM.from_pretrained(tmp_path / "pair")
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert again.config.lmbda == LMBDA
    assert again.generation_config.max_new_tokens == 6
    assert len(again.tokenizer) == 50
    assert generate(again, ids).tolist() == generate(model, ids).tolist()


def test_auto_classes_and_pipelines_know_a_saved_pair(saved_base: Path, tmp_path: Path) -> None:
    model, ids = joint_of(saved_base), prompt() % 50
    model.save_pretrained(tmp_path / "pair")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pair", dtype=torch.bfloat16)
    assert isinstance(again, MemoryDecoderForCausalLM)
    assert {again.base.dtype, again.memory.dtype} == {torch.bfloat16}
    again.config.lmbda = 0.25
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pair", config=again.config)
    assert again.config.lmbda == 0.25
    with pytest.raises(TypeError, match="attn_implementation, got revision, trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "pair", revision="main", trust_remote_code=True
        )
    with pytest.raises(TypeError, match="attn_implementation, got lmbda"):
        MemoryDecoderForCausalLM.from_pretrained(tmp_path / "pair", lmbda=0.0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pair")
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    options = {"max_new_tokens": 5, "do_sample": False}
    write = pipeline("text-generation", model=str(tmp_path / "pair"))
    [result] = write("w5 w9 w12", return_tensors=True, **options)
    ids = tokenizer("w5 w9 w12", return_tensors="pt").input_ids
    assert result["generated_token_ids"] == model.generate(ids, **options)[0].tolist()


@pytest.mark.parametrize("load", [AutoModelForCausalLM, MemoryDecoderForCausalLM])
def test_an_attention_that_is_asked_for_is_that_of_both(
    saved_base: Path, tmp_path: Path, load: Any
) -> None:
    joint_of(saved_base).save_pretrained(tmp_path / "pair")
    for name in ("eager", "sdpa", None):
        found = load.from_pretrained(tmp_path / "pair", attn_implementation=name)
        for model in (found.base, found.memory):
            assert model.config._attn_implementation == (name or "sdpa")


def test_a_pair_with_a_model_that_has_one_attention(tmp_path: Path) -> None:
    """What the configuration of a pair says of attention is no wish of anybody's."""
    pair("Llama", "Bloom").save_pretrained(tmp_path / "pair", save_base=True)
    first = MemoryDecoderForCausalLM.from_pretrained(tmp_path / "pair")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pair", config=first.config)
    assert again.memory.config._attn_implementation == "eager"


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}, torch.device("cpu")])
def test_a_device_map_of_one_device(saved_base: Path, tmp_path: Path, place: Any) -> None:
    model, ids = joint_of(saved_base), prompt() % 50
    model.save_pretrained(tmp_path / "pair")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pair", device_map=place)
    assert again.base.device == again.memory.device
    torch.testing.assert_close(again(ids.to(again.device)).logits.cpu(), model(ids).logits)


@pytest.mark.parametrize("place", ["balanced", {"base": 0, "memory": 1}, {"base": 0}])
def test_a_device_map_of_several_devices_is_refused(
    saved_base: Path, tmp_path: Path, place: Any
) -> None:
    joint_of(saved_base).save_pretrained(tmp_path / "pair")
    with pytest.raises(ValueError, match="device_map must name one device for both models"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "pair", device_map=place)


def test_device_and_device_map_are_one_argument(saved_base: Path, tmp_path: Path) -> None:
    joint_of(saved_base).save_pretrained(tmp_path / "pair")
    with pytest.raises(TypeError, match="device and device_map are one argument"):
        MemoryDecoderForCausalLM.from_pretrained(tmp_path / "pair", device="auto", device_map="cpu")


def test_pipelines_take_a_pair_without_complaint(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    pipeline("text-generation", model=pair(), tokenizer=tiny_tokenizer())
    assert "not supported" not in caplog.text


def test_saved_memory_is_an_ordinary_model_directory(saved_base: Path, tmp_path: Path) -> None:
    model = joint_of(saved_base)
    model.save_pretrained(tmp_path / "pair")
    memory = AutoModelForCausalLM.from_pretrained(tmp_path / "pair" / "memory")
    torch.testing.assert_close(
        memory(prompt()).logits, model.memory(prompt()).logits, rtol=0, atol=0
    )


def test_base_without_a_name_must_be_saved_too(tmp_path: Path) -> None:
    model = pair()
    with pytest.raises(ValueError, match="save_base=True"):
        model.save_pretrained(tmp_path / "pair")
    assert not (tmp_path / "pair").exists()
    model.save_pretrained(tmp_path / "pair", save_base=True)
    again = MemoryDecoderForCausalLM.from_pretrained(tmp_path / "pair")
    torch.testing.assert_close(again(prompt()).logits, model(prompt()).logits, rtol=0, atol=0)


def test_base_by_a_relative_path_is_found_from_elsewhere(
    saved_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved_base.parent)
    joint_of(Path(saved_base.name)).save_pretrained("pair")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = MemoryDecoderForCausalLM.from_pretrained(tmp_path / "pair")
    assert again.config.base_name == str(saved_base)


def test_base_that_has_moved(saved_base: Path, tmp_path: Path) -> None:
    model = joint_of(saved_base)
    model.save_pretrained(tmp_path / "pair")
    moved = saved_base.rename(tmp_path / "moved")
    with pytest.raises(MemdecError, match=re.escape(f"no model at {saved_base}")):
        MemoryDecoderForCausalLM.from_pretrained(tmp_path / "pair")
    again = MemoryDecoderForCausalLM.from_pretrained(tmp_path / "pair", base=moved)
    ids = prompt() % 50
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    again.save_pretrained(tmp_path / "pair2")
    MemoryDecoderForCausalLM.from_pretrained(tmp_path / "pair2")


def test_loading_compares_the_tokenizers_that_lie_there(saved_base: Path, tmp_path: Path) -> None:
    joint_of(saved_base).save_pretrained(tmp_path / "pair")
    tiny_tokenizer(change={4: "other"}).save_pretrained(saved_base)
    with pytest.raises(MemdecError, match="id 4 is 'other' in the base and 'w4' in the memory"):
        MemoryDecoderForCausalLM.from_pretrained(tmp_path / "pair")


def test_a_directory_without_a_pair_is_refused(saved_base: Path) -> None:
    with pytest.raises(MemdecError, match="expected a saved base and memory"):
        MemoryDecoderForCausalLM.from_pretrained(saved_base)


@pytest.mark.parametrize("load", [load_model, load_shape])
def test_a_pair_in_place_of_one_model_is_refused(
    load: Callable[[Path], Any], saved_base: Path, tmp_path: Path
) -> None:
    joint_of(saved_base).save_pretrained(tmp_path / "pair")
    with pytest.raises(MemdecError, match="is a saved base and memory, expected one model"):
        load(tmp_path / "pair")
