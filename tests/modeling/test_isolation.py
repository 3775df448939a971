"""Which models keep documents of one block apart by positions that begin again."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from memdec.errors import MemdecError
from memdec.modeling.isolation import check_isolation

MASKED = ["GPT2", "GPTJ", "Llama", "Qwen2", "Mistral", "Gemma", "Gemma2", "Phi", "GPTNeoX"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", MASKED)
def test_masked_attention_keeps_documents_apart(
    architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture).to(dtype).train()
    check_isolation(model)
    assert model.training
    # As a version that does not read documents off the positions.
    for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
        without_positions(monkeypatch, model, name)
    with pytest.raises(MemdecError, match="logits of a document differ by"):
        check_isolation(model)


def without_positions(monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module, name: str) -> None:
    module = __import__(type(model).__module__, fromlist=[name])
    if hasattr(module, name):
        made = getattr(module, name)

        def masks(*args: object, **kwargs: object) -> object:
            return made(*args, **{**kwargs, "position_ids": None})

        monkeypatch.setattr(module, name, masks)


def test_a_mask_alone_is_not_enough_for_learned_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("GPT2")
    table = model.transformer.wpe.forward
    rising = torch.arange(64)
    monkeypatch.setattr(
        model.transformer.wpe,
        "forward",
        lambda ids: table(rising[: ids.shape[-1]].expand_as(ids)),
    )
    with pytest.raises(MemdecError, match="logits of a document differ"):
        check_isolation(model)


def test_a_model_that_is_not_told_positions_is_refused() -> None:
    with pytest.raises(MemdecError, match=r"BloomForCausalLM .*it takes no position ids; leave"):
        check_isolation(tiny_model("Bloom"))
    with pytest.raises(MemdecError, match="MambaForCausalLM"):
        check_isolation(tiny_model("Mamba"))


def test_a_model_whose_mask_does_not_follow_positions_is_refused() -> None:
    with pytest.raises(MemdecError, match=r"OPTForCausalLM .*attention sdpa.*differ by"):
        check_isolation(tiny_model("OPT"))


def test_a_context_too_short_to_try_is_refused() -> None:
    with pytest.raises(MemdecError, match="trying takes 16 positions, its context is 8"):
        check_isolation(tiny_model("GPT2", n_positions=8))


def test_logits_that_are_no_numbers_are_refused() -> None:
    model = tiny_model("Llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(MemdecError, match="differ by nan"):
        check_isolation(model)
