from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY, saved, tiny_model

from memdec.errors import MemdecError
from memdec.modeling.loading import load_model
from memdec.modeling.memory_init import initial_memory, keep_layers

TOKENS = torch.arange(14).reshape(2, 7) % VOCABULARY
BLOCKS = {"GPT2": "transformer.h", "OPT": "model.decoder.layers", "Bloom": "transformer.h"}
ARCHITECTURES = [
    "GPT2",
    "Llama",
    "Qwen2",
    "Mistral",
    "Gemma",
    "Gemma2",
    "Phi",
    "Mixtral",
    "OPT",
    "Bloom",
]


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return saved(tiny_model("Llama", num_hidden_layers=5, tie_word_embeddings=True), tmp_path / "t")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kept_layers_are_the_teachers_own_and_survive_saving(
    architecture: str, tmp_path: Path
) -> None:
    model = tiny_model(architecture, num_hidden_layers=5)
    short = keep_layers(model, 3)
    # The oracle: the same model with layers 1 and 3 taken out of its list by hand.
    name = BLOCKS.get(architecture, "model.layers")
    blocks = model.get_submodule(name)
    for number in (3, 1):
        del blocks[number]
    model.config.num_hidden_layers = 3
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in (0, 2, 4)]
    expected = model(TOKENS, use_cache=False).logits
    torch.testing.assert_close(logits(short), expected, rtol=0, atol=0)
    torch.testing.assert_close(logits(load_model(saved(short, tmp_path))), expected, rtol=0, atol=0)
    assert short.config.num_hidden_layers == 3


def test_layers_may_be_chosen_by_number() -> None:
    model = tiny_model("Llama", num_hidden_layers=5)
    expected = logits(keep_layers(model, 3))  # 0, 2 and 4
    torch.testing.assert_close(logits(keep_layers(model, [0, 2, 4])), expected, rtol=0, atol=0)
    assert not torch.equal(logits(keep_layers(model, [0, 1, 4])), expected)


@pytest.mark.parametrize("layers", [[], [0, 5], [2, 1], [1, 1], [-1, 2]])
def test_numbers_that_are_no_layers_are_refused(layers: list[int]) -> None:
    with pytest.raises(MemdecError, match="rising numbers from 0 to 4"):
        keep_layers(tiny_model("Llama", num_hidden_layers=5), layers)


def test_per_layer_lists_of_the_configuration_follow() -> None:
    model = tiny_model("Gemma2", num_hidden_layers=4)
    assert model.config.layer_types == ["sliding_attention", "full_attention"] * 2
    assert keep_layers(model, 2).config.layer_types == ["sliding_attention", "full_attention"]
    assert keep_layers(model, 3).config.layer_types == [
        model.config.layer_types[i] for i in (0, 2, 3)
    ]


def test_lists_that_only_happen_to_be_as_long_stay() -> None:
    model = tiny_model("Llama", num_hidden_layers=3, eos_token_id=[1, 7, 9])
    assert keep_layers(model, 2).config.eos_token_id == [1, 7, 9]


def test_a_cut_model_generates() -> None:
    short = keep_layers(tiny_model("Gemma2", num_hidden_layers=4), 2)
    ids = TOKENS[:1]
    for _ in range(6):
        ids = torch.cat([ids, short(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    generated = short.generate(TOKENS[:1], max_new_tokens=6, do_sample=False, eos_token_id=-1)
    assert generated.tolist() == ids.tolist()


def test_teacher_itself(teacher: Path) -> None:
    memory = initial_memory(teacher)
    assert memory.dtype == torch.float32
    torch.testing.assert_close(logits(memory), logits(load_model(teacher)), rtol=0, atol=0)


def test_all_layers_kept_is_the_model(teacher: Path) -> None:
    kept = initial_memory(teacher, layers=5)
    torch.testing.assert_close(logits(kept), logits(load_model(teacher)), rtol=0, atol=0)


def test_one_layer_is_the_first(teacher: Path) -> None:
    memory, whole = initial_memory(teacher, layers=1), load_model(teacher)
    weight = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(memory.state_dict()[weight], whole.state_dict()[weight])


def test_tied_embeddings_stay_tied(teacher: Path, tmp_path: Path) -> None:
    memory = initial_memory(teacher, layers=2)
    assert memory.lm_head.weight is memory.model.embed_tokens.weight
    again = load_model(saved(memory, tmp_path / "m"))
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_another_model(teacher: Path, tmp_path: Path) -> None:
    other = saved(tiny_model("GPT2", seed=3), tmp_path / "other")
    torch.testing.assert_close(
        logits(initial_memory(teacher, other)), logits(load_model(other)), rtol=0, atol=0
    )
    assert initial_memory(teacher, str(other), layers=2).config.n_layer == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fresh_has_the_architecture_and_the_sizes_asked_for(
    architecture: str, tmp_path: Path
) -> None:
    teacher = saved(tiny_model(architecture), tmp_path / "t")
    memory = initial_memory(teacher, "fresh", layers=2, width=16, seed=5)
    assert memory.config.model_type == load_model(teacher).config.model_type
    assert memory.config.num_hidden_layers == 2
    assert memory.config.hidden_size == 16
    result = logits(memory)
    assert result.shape == (2, 7, VOCABULARY)
    torch.testing.assert_close(
        logits(load_model(saved(memory, tmp_path / "m"))), result, rtol=0, atol=0
    )


def test_fresh_may_have_more_layers_than_the_teacher(tmp_path: Path) -> None:
    teacher = saved(tiny_model("Gemma2", num_hidden_layers=2), tmp_path)
    memory = initial_memory(teacher, "fresh", layers=6)
    assert len(memory.model.layers) == len(memory.config.layer_types) == 6


def test_fresh_weights_follow_the_seed_and_leave_the_random_state_alone(teacher: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    first = initial_memory(teacher, "fresh", seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(logits(initial_memory(teacher, "fresh", seed=1)), logits(first))
    assert not torch.equal(logits(initial_memory(teacher, "fresh", seed=2)), logits(first))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers must be from 1 to 5, the model's, got 0"),
        ({"layers": 6}, "layers must be from 1 to 5, the model's, got 6"),
        ({"init": "fresh", "layers": 0}, "layers must be at least 1, got 0"),
        ({"init": "fresh", "width": 12}, "width must be a multiple of 8, got 12"),
        ({"width": 16}, "width goes with a fresh memory only"),
        ({"init": "/no/such/model"}, "no model at /no/such/model"),
    ],
)
def test_bad_requests_are_refused(teacher: Path, options: dict, message: str) -> None:
    with pytest.raises(MemdecError, match=message):
        initial_memory(teacher, **options)
