from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_models import saved, tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from memdec.modeling.loading import load_model
from memdec.modeling.vocabulary import transfer_vocabulary


def byte_tokenizer(*merges: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE: the end token, all bytes, and merges such as "t h"."""
    tokens = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pairs = [tuple(merge.split()) for merge in merges]
    tokens += ["".join(pair) for pair in pairs]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def sentence_tokenizer(*merges: str) -> PreTrainedTokenizerFast:
    """As SentencePiece's of Llama 2: a space is "▁", and stands before every text."""
    tokens = ["<unk>", "<end>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += "abcdefghijklmnopqrstuvwxyz"
    pairs = [tuple(merge.split()) for merge in merges]
    tokens += ["".join(pair) for pair in pairs]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(vocabulary, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>")


OLD = byte_tokenizer("t h", "th e", "a n", "Ġ an")
NEW = byte_tokenizer("a n", "t h", "Ġ th", "Ġth e", "an d")


def ids(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> list[int]:
    return [tokenizer.get_vocab()[token] for token in tokens]


@pytest.mark.parametrize("tied", [True, False])
def test_shared_tokens_keep_their_rows_and_others_are_means(tied: bool) -> None:
    model = tiny_model("Llama", vocab_size=len(OLD), tie_word_embeddings=tied)
    before = [model.get_input_embeddings().weight.clone()]
    before += [] if tied else [model.get_output_embeddings().weight.clone()]
    inner = model.model.layers[0].mlp.down_proj.weight.clone()
    moved = transfer_vocabulary(model, OLD, NEW)
    after = [moved.get_input_embeddings().weight]
    after += [] if tied else [moved.get_output_embeddings().weight]
    assert (moved.get_output_embeddings().weight is after[0]) == tied
    for old, new in zip(before, after, strict=True):
        shared = ["<end>", "a", "Ġ", "th", "an"]
        torch.testing.assert_close(new[ids(NEW, shared)], old[ids(OLD, shared)])
        for token, pieces in {"Ġth": ["Ġ", "th"], "Ġthe": ["Ġ", "the"], "and": ["an", "d"]}.items():
            torch.testing.assert_close(new[ids(NEW, [token])[0]], old[ids(OLD, pieces)].mean(dim=0))
    assert torch.equal(moved.model.layers[0].mlp.down_proj.weight, inner)


def test_random_rows_are_as_wide_as_the_old_ones_and_repeatable() -> None:
    def rows(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = tiny_model("Llama", vocab_size=len(OLD), tie_word_embeddings=True)
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
        return transfer_vocabulary(model, OLD, NEW, "random", seed=seed).lm_head.weight.detach()

    assert torch.equal(rows(1), rows(1))
    assert not torch.equal(rows(1), rows(2))
    assert 0.28 < float(rows(1).std()) < 0.32


@pytest.mark.parametrize("architecture", ["GPT2", "Phi", "OPT", "Gemma2"])
def test_the_moved_model_is_of_the_new_tokenizer_and_survives_saving(
    architecture: str, tmp_path: Path
) -> None:
    model = tiny_model(architecture, vocab_size=len(OLD))
    moved = transfer_vocabulary(model, OLD, NEW).eval()
    assert moved.config.vocab_size == moved.get_input_embeddings().weight.shape[0]
    assert moved.config.vocab_size >= len(NEW)
    assert moved.config.vocab_size % 64 == 0
    assert moved.config.eos_token_id == NEW.eos_token_id
    tokens = torch.tensor([NEW.encode("and the hand")])
    expected = moved(tokens).logits
    found = load_model(saved(moved, tmp_path))(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_part_of_a_character_starts_from_the_mean_of_all() -> None:
    whole = byte_tokenizer()
    other = byte_tokenizer("â Ĥ")  # two of the three bytes of the euro sign
    model = tiny_model("Llama", vocab_size=len(whole), tie_word_embeddings=True)
    before = model.get_input_embeddings().weight.clone()
    moved = transfer_vocabulary(model, whole, other)
    row = moved.get_input_embeddings().weight[ids(other, ["âĤ"])[0]]
    torch.testing.assert_close(row, before.mean(dim=0))


@pytest.mark.parametrize(
    ("source", "target", "pieces"),
    [
        (
            byte_tokenizer("t h", "th e", "Ġ the", "i n"),
            sentence_tokenizer("t h", "th e", "▁ the", "i n", "in g", "▁ in"),
            {"▁the": ["Ġthe"], "the": ["the"], "ing": ["in", "g"], "▁in": ["Ġ", "in"], "▁": ["Ġ"]},
        ),
        (
            sentence_tokenizer("t h", "th e", "▁ the", "i n", "▁ in"),
            byte_tokenizer("t h", "th e", "Ġ the", "i n", "in g", "Ġ a"),
            {"Ġthe": ["▁the"], "the": ["the"], "ing": ["in", "g"], "Ġa": ["▁", "a"], "Ġ": ["▁"]},
        ),
    ],
)
def test_a_space_before_a_word_is_kept_between_kinds_of_tokenizers(
    source: PreTrainedTokenizerFast, target: PreTrainedTokenizerFast, pieces: dict[str, list[str]]
) -> None:
    model = tiny_model("Llama", vocab_size=len(source), tie_word_embeddings=True)
    before = model.get_input_embeddings().weight.clone()
    after = transfer_vocabulary(model, source, target).get_input_embeddings().weight
    for token, old in pieces.items():
        row = after[ids(target, [token])[0]]
        torch.testing.assert_close(row, before[ids(source, old)].mean(dim=0))


def test_a_token_that_the_model_has_no_row_for_spells_nothing() -> None:
    longer = byte_tokenizer("t h", "th e", "a n", "Ġ an")
    longer.add_tokens(["hand"])
    model = tiny_model("Llama", vocab_size=len(OLD), tie_word_embeddings=True)
    before = model.get_input_embeddings().weight.clone()
    after = transfer_vocabulary(model, longer, longer).get_input_embeddings().weight
    torch.testing.assert_close(after[: len(OLD)], before)
    torch.testing.assert_close(after[ids(longer, ["hand"])[0]], before.mean(dim=0))


def test_ids_of_the_new_tokenizer_may_skip_some() -> None:
    parts = json.loads(NEW.backend_tokenizer.to_str())
    parts["model"]["vocab"]["and"] = 500
    skipping = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)))
    model = tiny_model("Llama", vocab_size=len(OLD), tie_word_embeddings=True)
    before = model.get_input_embeddings().weight.clone()
    after = transfer_vocabulary(model, OLD, skipping).get_input_embeddings().weight
    assert len(after) == 512
    torch.testing.assert_close(after[500], before[ids(OLD, ["an", "d"])].mean(dim=0))
