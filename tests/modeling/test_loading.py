from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import saved, tiny_model, tiny_tokenizer
from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

from memdec.errors import MemdecError
from memdec.modeling import loading
from memdec.modeling.loading import (
    compare_tokenizers,
    has_tokenizer,
    load_model,
    load_tokenizer,
    model_fingerprint,
    pick_device,
    tokenizer_fingerprint,
)

TOKENS = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return saved(tiny_model("Llama"), tmp_path / "model", tiny_tokenizer())


def test_loads_a_directory_as_float32_in_evaluation_mode(directory: Path) -> None:
    saved(tiny_model("GPT2").bfloat16(), directory)
    model = load_model(directory)
    assert model.dtype == torch.float32
    assert not model.training
    assert load_model(directory, dtype="auto").dtype == torch.bfloat16
    assert load_model(str(directory), dtype="bfloat16").dtype == torch.bfloat16


def test_loaded_model_gives_the_saved_models_logits(directory: Path) -> None:
    expected = tiny_model("Llama")(TOKENS).logits
    torch.testing.assert_close(load_model(directory)(TOKENS).logits, expected, rtol=0, atol=0)


def test_loaded_model_knows_its_full_path(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory.parent)
    assert load_model("model").config.name_or_path == str(directory)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/model", "no model at /no/such/model: there is no such directory"),
        ("./nowhere", "no model at ./nowhere"),
        ("/no/such.gguf", "no such .gguf file"),
    ],
)
def test_missing_model_is_one_clear_line(name: str, message: str) -> None:
    for use in (load_model, load_tokenizer, model_fingerprint):
        with pytest.raises(MemdecError, match=re.escape(message)) as caught:
            use(name)
        assert "\n" not in str(caught.value)


def test_file_is_not_a_model(directory: Path) -> None:
    with pytest.raises(MemdecError, match=r"config\.json is a file, expected a model directory"):
        load_model(directory / "config.json")


def test_empty_directory_is_not_a_model(tmp_path: Path) -> None:
    for use in (load_model, load_tokenizer, model_fingerprint):
        with pytest.raises(MemdecError, match=re.escape(str(tmp_path))) as caught:
            use(tmp_path)
        assert "\n" not in str(caught.value)


def test_cut_weight_file_is_one_clear_line(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(MemdecError, match="cannot be loaded"):
        load_model(directory)


def test_missing_weights_are_not_made_up(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MemdecError, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj"):
        load_model(directory)


def test_hub_name_is_downloaded_once_without_what_loading_does_not_need(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot(name: str, **patterns: list[str]) -> str:
        asked.append((name, patterns))
        return str(directory)

    monkeypatch.setattr(loading, "snapshot_download", snapshot)
    loading._hub_snapshot.cache_clear()
    model = load_model("someone/model")
    assert model_fingerprint("someone/model") == model_fingerprint(directory)
    assert load_tokenizer("someone/model").eos_token == "<end>"
    assert model.config.name_or_path == "someone/model"
    assert [name for name, _ in asked] == ["someone/model"]
    assert "*.bin" not in asked[0][1]["allow_patterns"]
    loading._hub_snapshot.cache_clear()


def test_unreachable_hub_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(name: str, **patterns: list[str]) -> str:
        raise OSError("no route to the hub.\nPlease check your connection.")

    monkeypatch.setattr(loading, "snapshot_download", snapshot)
    with pytest.raises(MemdecError, match=r"no model 'someone/else'.*no route to the hub$"):
        load_model("someone/else")


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        (
            "bert",
            lambda: BertLMHeadModel(
                BertConfig(
                    vocab_size=50,
                    hidden_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    intermediate_size=16,
                )
            ),
        ),
        (
            "t5",
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            ),
        ),
    ],
)
def test_models_that_look_ahead_are_refused(kind: str, model: object, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(MemdecError, match=f"is a {kind} model, expected a decoder-only"):
        load_model(tmp_path)


def test_fingerprint_follows_weights_and_configuration_not_place(
    directory: Path, tmp_path: Path
) -> None:
    original = model_fingerprint(directory)
    copied = shutil.copytree(directory, tmp_path / "elsewhere")
    config = json.loads((copied / "config.json").read_text())
    config["transformers_version"] = "9.9.9"
    (copied / "config.json").write_text(json.dumps(config))
    assert model_fingerprint(copied) == original
    (copied / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert model_fingerprint(copied) != original
    assert model_fingerprint(saved(tiny_model("Llama", seed=1), directory)) != original


def test_fingerprint_covers_every_shard(tmp_path: Path) -> None:
    tiny_model("Llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    original = model_fingerprint(tmp_path)
    shards[-1].write_bytes(shards[-1].read_bytes() + b" ")
    assert model_fingerprint(tmp_path) != original
    shards[-1].unlink()
    with pytest.raises(MemdecError, match=shards[-1].name):
        model_fingerprint(tmp_path)


def test_tokenizer_fingerprint_survives_saving(directory: Path) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer_fingerprint(load_tokenizer(directory)) == tokenizer_fingerprint(tokenizer)
    other = tiny_tokenizer(change={9: "other"})
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


def test_has_tokenizer(directory: Path, tmp_path: Path) -> None:
    assert has_tokenizer(directory)
    assert not has_tokenizer(saved(tiny_model("GPT2"), tmp_path / "bare"))


@pytest.mark.parametrize("architecture", ["GPT2", "Llama"])
def test_a_model_without_a_tokenizer_gets_none(architecture: str, tmp_path: Path) -> None:
    """transformers makes an empty one for some kinds of models."""
    bare = saved(tiny_model(architecture), tmp_path / "bare")
    with pytest.raises(MemdecError, match=r"no tokenizer at .*bare: expected tokenizer\.json or"):
        load_tokenizer(bare)


def test_equal_tokenizers_compare_quietly(directory: Path) -> None:
    compare_tokenizers(load_tokenizer(directory), tiny_tokenizer())


def test_different_tokenizers_name_the_first_differing_tokens() -> None:
    other = tiny_tokenizer(change={7: "x", 9: "y", 11: "z", 12: "u"})
    expected = (
        "the tokenizers of A and B differ: id 7 is 'w7' in A and 'x' in B, "
        "id 9 is 'w9' in A and 'y' in B, id 11 is 'w11' in A and 'z' in B, and 1 more"
    )
    with pytest.raises(MemdecError, match=re.escape(expected)):
        compare_tokenizers(tiny_tokenizer(), other, ("A", "B"))


def test_longer_tokenizer_differs() -> None:
    with pytest.raises(MemdecError, match="id 50 is absent in the base and 'w50' in the memory"):
        compare_tokenizers(tiny_tokenizer(50), tiny_tokenizer(51))


def test_added_tokens_count() -> None:
    other = tiny_tokenizer()
    other.add_tokens(["<extra>"])
    with pytest.raises(MemdecError, match="'<extra>'"):
        compare_tokenizers(tiny_tokenizer(), other)


def test_pick_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(MemdecError, match="'cuda' asked for, torch sees no GPU"):
        pick_device("cuda")
    with pytest.raises(MemdecError, match="device must be auto, cpu, cuda or cuda:N, got 'tpu9x'"):
        pick_device("tpu9x")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto") == torch.device("cuda")
    with pytest.raises(MemdecError, match="'cuda:1' asked for, torch sees 1 GPU"):
        pick_device("cuda:1")
