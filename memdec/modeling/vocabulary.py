"""A model for another tokenizer: new embeddings and output, every other weight kept.

This is how a memory moves to a base of another tokenizer (arXiv 2508.09874), after which
it is trained for a tenth of the time. New rows can start from the old ones: the mean of the old
tokens that spell a new one (Gee et al. 2022, "Fast Vocabulary Transfer").
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memdec.modeling.loading import vocabulary_size

Rows = Literal["mean", "random"]

# The vocabulary is padded to a multiple: tensor cores halve their pace at an odd one.
_WIDTH_OF = 64
_BEFORE = "\n"  # stands before a text; tokenizers join little to it


def transfer_vocabulary(
    model: PreTrainedModel,
    source: PreTrainedTokenizerBase,
    target: PreTrainedTokenizerBase,
    rows: Rows = "mean",
    *,
    seed: int = 0,
) -> PreTrainedModel:
    """Gives the model, in place, embeddings and an output for the tokens of `target`.

    Args:
        model: a decoder-only model of the tokenizer `source`, on the CPU.
        rows: ``"mean"``: a token that both have keeps its row, any other is the mean of the rows of
            the old tokens that spell it; ``"random"``: normal, as widely spread as the old ones.
        seed: of random rows.

    Returns:
        The model. Its vocabulary is the target's, padded to a multiple of 64, and its special tokens
        are the target's; embeddings and output are tied if they were.
    """
    width = -(-vocabulary_size(target) // _WIDTH_OF) * _WIDTH_OF
    old = [parameter.detach().clone() for parameter in _vocabulary_parameters(model)]
    model.resize_token_embeddings(width, mean_resizing=False)
    spelled = _spellings(source, target, width) if rows == "mean" else None
    generator = torch.Generator().manual_seed(seed)
    for parameter, before in zip(_vocabulary_parameters(model), old, strict=True):
        if spelled is not None:
            new = _means(before, spelled)
        else:
            new = torch.randn(parameter.shape, generator=generator) * before.float().std()
        with torch.no_grad():
            parameter.copy_(new)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (model.config.get_text_config(), model.generation_config):
            setattr(config, name, getattr(target, name))
    return model


def _vocabulary_parameters(model: PreTrainedModel) -> list[Tensor]:
    """Those with a row a token: embeddings, the output unless it is tied to them, its bias."""
    embeddings: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()
    found = [embeddings.weight]
    if output is not None:
        found += [] if output.weight is embeddings.weight else [output.weight]
        found += [] if getattr(output, "bias", None) is None else [output.bias]
    return found


def _spellings(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, width: int
) -> list[list[int]]:
    """For each new id the old ids that spell it; none where it has no text of its own."""
    known = source.get_vocab()
    spelled: list[list[int]] = [[] for _ in range(width)]
    others = []
    for token, index in target.get_vocab().items():
        if token in known:
            spelled[index] = [known[token]]
        else:
            others.append(index)
    texts = _texts(target, others)
    for index, text, ids in zip(others, texts, _encode(source, texts), strict=True):
        part_of_a_character = "\ufffd" in text
        spelled[index] = [] if part_of_a_character else ids
    return spelled


def _texts(tokenizer: PreTrainedTokenizerBase, indices: list[int]) -> list[str]:
    """Tokens' texts inside a line: at its beginning SentencePiece would drop a token's space."""
    before = _ids(tokenizer, "a")
    rows = [before, *([*before, index] for index in indices)]
    start, *texts = tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
    return [text.removeprefix(start) for text in texts]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Texts' ids inside a text: at its beginning SentencePiece would put a space before them."""
    before = _ids(tokenizer, _BEFORE)
    rows = [_BEFORE + text for text in texts]
    encoded = tokenizer(rows, add_special_tokens=False)["input_ids"] if rows else []
    return [
        ids[len(before) :] if ids[: len(before)] == before else _ids(tokenizer, text)
        for text, ids in zip(texts, encoded, strict=True)
    ]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _means(old: Tensor, spelled: list[list[int]]) -> Tensor:
    """The mean of the old rows of each entry; of all rows where there are none.

    A tokenizer may have tokens that its model has no rows for.
    """
    new = old.float().mean(dim=0).expand(len(spelled), *old.shape[1:]).clone()
    for index, ids in enumerate(spelled):
        if there := [one for one in ids if one < len(old)]:
            new[index] = old[there].float().mean(dim=0)
    return new
