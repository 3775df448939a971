"""A .gguf file as base: a tiny one written here, and SmolLM2-135M (real_weights).

The fixture ``smollm2`` says where that comes from.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from tiny_models import tiny_model
from transformers.utils import logging

from memdec import MemoryDecoderForCausalLM
from memdec.modeling import quiet
from memdec.modeling.key_layer import KeyRecorder
from memdec.modeling.loading import (
    compare_tokenizers,
    has_tokenizer,
    load_model,
    load_tokenizer,
    model_fingerprint,
    tokenizer_fingerprint,
)
from memdec.modeling.memory_init import initial_memory, keep_layers
from memdec.modeling.quiet import no_library_bars

IDS = torch.tensor([[3, 4, 5, 9, 8, 7]])


def write_gguf(path: Path, model: torch.nn.Module) -> None:
    """A Llama as llama.cpp keeps it, with a tokenizer of single letters and the merges "ab" and "cd"."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    tokens = ["<end>", *(chr(ord("a") + i) for i in range(26)), "ab", "cd"]
    tokens += [f"<{i}>" for i in range(config.vocab_size - len(tokens))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b", "c d"])
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        part = name.split(".")[-2]
        if part in heads:  # llama.cpp interleaves the two halves that are rotated together
            rows, columns = weight.shape
            halves = weight.reshape(heads[part], 2, rows // heads[part] // 2, columns)
            weight = halves.swapaxes(1, 2).reshape(rows, columns)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[torch.nn.Module, Path]:
    model = tiny_model("Llama", vocab_size=64)
    write_gguf(tmp_path / "tiny.gguf", model)
    return model, tmp_path / "tiny.gguf"


def test_gguf_loads_and_can_be_saved_like_any_model(
    tiny: tuple[torch.nn.Module, Path], tmp_path: Path
) -> None:
    original, path = tiny
    model = load_model(path)
    torch.testing.assert_close(model(IDS).logits, original(IDS).logits, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=0)
    assert "gguf" not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize("terminal", [False, True])
def test_gguf_draws_a_bar_on_a_terminal_only(
    tiny: tuple[torch.nn.Module, Path],
    terminal: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, path = tiny
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    load_model(path)
    drawn = capsys.readouterr().err
    assert ("GGUF" in drawn) == terminal, drawn
    assert terminal or drawn == ""


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("of_hub", [False, True])
def test_loading_leaves_the_libraries_bars_as_they_were(
    tiny: tuple[torch.nn.Module, Path],
    shown: bool,
    of_hub: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, path = tiny
    before = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    try:
        set_bars(shown, of_hub)
        load_model(path)
        assert logging.is_progress_bar_enabled() == shown
        assert are_progress_bars_disabled() != of_hub
        capsys.readouterr()
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        load_model(path)
        assert "GGUF" in capsys.readouterr().err  # the reader's own bar is back as well
    finally:
        set_bars(*before)


def test_bars_come_back_after_threads_that_overlap() -> None:
    before = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    first, second = no_library_bars(), no_library_bars()
    try:
        set_bars(True, True)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not logging.is_progress_bar_enabled()
        second.__exit__(None, None, None)
        assert logging.is_progress_bar_enabled()
        assert not are_progress_bars_disabled()
    finally:
        set_bars(*before)


def test_bars_are_hidden_where_transformers_has_another_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers.modeling_gguf_pytorch_utils", None)
    monkeypatch.delattr(transformers, "modeling_gguf_pytorch_utils", raising=False)
    fresh = runpy.run_path(str(Path(quiet.__file__)))
    before = logging.is_progress_bar_enabled()
    with fresh["no_library_bars"]():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled() == before


def set_bars(shown: bool, of_hub: bool) -> None:
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    (enable_progress_bars if of_hub else disable_progress_bars)()


def test_gguf_carries_its_tokenizer(tiny: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    _, path = tiny
    assert has_tokenizer(path)
    tokenizer = load_tokenizer(str(path))
    assert tokenizer("abc").input_ids == [27, 3]
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    compare_tokenizers(tokenizer, again)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)


def test_gguf_as_base_of_a_saved_pair(tiny: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    _, path = tiny
    tokenizer = load_tokenizer(path)
    joint = MemoryDecoderForCausalLM.from_models(
        load_model(path), initial_memory(path, layers=2), lmbda=0.3, tokenizer=tokenizer
    )
    joint.save_pretrained(tmp_path / "pair")
    again = MemoryDecoderForCausalLM.from_pretrained(tmp_path / "pair", dtype="float32")
    torch.testing.assert_close(again(IDS).logits, joint(IDS).logits, rtol=0, atol=0)


def test_gguf_fingerprint_follows_its_bytes(tiny: tuple[torch.nn.Module, Path]) -> None:
    _, path = tiny
    original = model_fingerprint(path)
    copy = path.with_name("copy.gguf")
    copy.write_bytes(path.read_bytes())
    assert model_fingerprint(copy) == original
    copy.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert model_fingerprint(copy) != original


@pytest.mark.real_weights
def test_smollm2_as_base_teacher_and_memory(smollm2: Path, tmp_path: Path) -> None:
    path = smollm2
    base, tokenizer = load_model(path), load_tokenizer(path)
    assert sum(weight.numel() for weight in base.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with KeyRecorder(base) as recorder, torch.no_grad():
        logits = base(ids).logits
    assert recorder.name == "model.layers.29.mlp"
    assert recorder.keys.shape == (1, ids.shape[1], 576)
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"

    memory = keep_layers(base, 6)
    assert memory.lm_head.weight is memory.model.embed_tokens.weight
    joint = MemoryDecoderForCausalLM.from_models(base, memory, lmbda=0.1, tokenizer=tokenizer)
    joint.save_pretrained(tmp_path / "pair")
    again = MemoryDecoderForCausalLM.from_pretrained(tmp_path / "pair", dtype="float32")
    with torch.no_grad():
        log_probs = joint(ids).logits
        torch.testing.assert_close(again(ids).logits, log_probs, rtol=0, atol=0)
    torch.testing.assert_close(
        log_probs.exp().sum(-1), torch.ones_like(ids) * 1.0, rtol=1e-5, atol=0
    )
    text = tokenizer.decode(joint.generate(ids, max_new_tokens=5, do_sample=False)[0])
    assert text.startswith("The capital of France is Paris")
