from __future__ import annotations

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model

from memdec.errors import MemdecError
from memdec.modeling.key_layer import KeyRecorder, find_feed_forward

# Architecture, its key layer, and the normalisation whose output that layer reads.
CASES = [
    ("GPT2", "transformer.h.2.mlp", "transformer.h.2.ln_2"),
    ("GPTJ", "transformer.h.2.mlp", "transformer.h.2.ln_1"),
    ("Llama", "model.layers.2.mlp", "model.layers.2.post_attention_layernorm"),
    ("Qwen2", "model.layers.2.mlp", "model.layers.2.post_attention_layernorm"),
    ("Mistral", "model.layers.2.mlp", "model.layers.2.post_attention_layernorm"),
    ("Gemma", "model.layers.2.mlp", "model.layers.2.post_attention_layernorm"),
    ("Gemma2", "model.layers.2.mlp", "model.layers.2.pre_feedforward_layernorm"),
    ("Phi", "model.layers.2.mlp", "model.layers.2.input_layernorm"),
    ("Mixtral", "model.layers.2.mlp", "model.layers.2.post_attention_layernorm"),
    ("Qwen2Moe", "model.layers.2.mlp", "model.layers.2.post_attention_layernorm"),
    ("GPTNeoX", "gpt_neox.layers.2.mlp", "gpt_neox.layers.2.post_attention_layernorm"),
    ("OPT", "model.decoder.layers.2.fc1", "model.decoder.layers.2.final_layer_norm"),
    ("Bloom", "transformer.h.2.mlp", "transformer.h.2.post_attention_layernorm"),
]
TOKENS = torch.arange(14).reshape(2, 7) % VOCABULARY


@pytest.mark.parametrize(("architecture", "layer", "norm"), CASES)
def test_keys_are_the_input_of_the_last_feed_forward(
    architecture: str, layer: str, norm: str
) -> None:
    model = tiny_model(architecture)
    outputs = []
    model.get_submodule(norm).register_forward_hook(lambda *args: outputs.append(args[-1]))
    with KeyRecorder(model) as recorder, torch.no_grad():
        model(TOKENS)
        assert recorder.name == layer
        assert recorder.keys.shape == (2, 7, 32)
        torch.testing.assert_close(recorder.keys, outputs[0].reshape(2, 7, 32), rtol=0, atol=0)


def test_experts_listed_in_a_block_are_not_taken_for_blocks() -> None:
    model = tiny_model("Mixtral", num_local_experts=8)
    assert find_feed_forward(model)[0] == "model.layers.2.mlp"


def test_named_key_layer_overrides_the_search() -> None:
    model = tiny_model("Llama")
    name, module = find_feed_forward(model, "model.layers.1.mlp")
    assert name == "model.layers.1.mlp"
    assert module is model.model.layers[1].mlp


def test_named_key_layer_needs_no_list_of_blocks() -> None:
    model = tiny_model("Llama")
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    assert find_feed_forward(model, "model.layers.2.mlp")[0] == "model.layers.2.mlp"
    with pytest.raises(MemdecError, match="has no list of decoder blocks"):
        find_feed_forward(model)


def test_unknown_key_layer_is_refused_with_the_last_blocks_children() -> None:
    with pytest.raises(MemdecError, match=r"'model.layers.9.mlp'.*model\.layers\.2\.mlp"):
        find_feed_forward(tiny_model("Llama"), "model.layers.9.mlp")


def test_state_space_block_without_feed_forward_is_refused() -> None:
    with pytest.raises(MemdecError, match=r"--key-layer \(candidates: .*layers\.2\.mixer"):
        find_feed_forward(tiny_model("Mamba"))


def test_two_candidates_are_refused_and_both_named() -> None:
    model = tiny_model("Llama")
    block = model.model.layers[-1]
    block.second = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Linear(8, 32))
    with pytest.raises(MemdecError, match=r"layers\.2\.mlp, model\.layers\.2\.second"):
        find_feed_forward(model)


def test_recorder_holds_the_last_pass_and_lets_go_on_exit() -> None:
    model = tiny_model("Llama")
    recorder = KeyRecorder(model)
    with torch.no_grad():
        with recorder:
            with pytest.raises(RuntimeError, match="no forward pass"):
                _ = recorder.keys
            model(input_ids=TOKENS)
            first = recorder.keys
            model(input_ids=TOKENS[:1, :3])
            assert recorder.keys.shape == (1, 3, 32)
        model(input_ids=TOKENS)
    assert recorder.keys.shape == (1, 3, 32)
    assert first.shape == (2, 7, 32)


def test_keys_are_detached_from_training() -> None:
    model = tiny_model("Llama")
    with KeyRecorder(model) as recorder:
        model(TOKENS)
    assert not recorder.keys.requires_grad
