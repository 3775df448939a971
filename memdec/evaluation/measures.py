"""What a mixture does to rare tokens and to function words, beside the base."""

from __future__ import annotations

from typing import Any

import numpy as np

from memdec.data.corpus import TokenStream

# Articles, prepositions, pronouns, conjunctions, auxiliaries: words that say little of a domain.
_WORDS = """\
a about above after again against all also although am an and any are as at be because been
before being below between both but by can could did do does down during each either else
every for from had has have he her here hers him his how i if in into is it its itself may
me might mine more most must my neither no nor not of off on once only or other our out over
own rather shall she should since so some such than that the their them themselves then
there these they this those though through to too under until up upon us very was we were
what when where whether which while who whom whose why will with within without would yet
you your
"""
FUNCTION_WORDS = frozenset(_WORDS.split())
_SPACES = ("\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}", "\N{LOWER ONE EIGHTH BLOCK}")


def label_counts(train: TokenStream, labels: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each label occurs in the train split, int64 [positions]."""
    counts = np.zeros(vocab_size, np.int64)
    for shard in train.shards:
        counts += np.bincount(shard, minlength=vocab_size)
    return counts[labels]


def rarest_decile(train: TokenStream, labels: np.ndarray, vocab_size: int) -> np.ndarray:
    """The tenth of the positions whose labels are rarest in the train split, bool [positions].

    Of labels that are equally rare the first ones are taken.
    """
    counts = label_counts(train, labels, vocab_size)
    rarest = np.zeros(len(labels), bool)
    rarest[np.argsort(counts, kind="stable")[: max(len(labels) // 10, 1)]] = True
    return rarest


def function_words(tokenizer: Any, labels: np.ndarray) -> np.ndarray:
    """Where the label begins a word and is one of :data:`FUNCTION_WORDS`, bool [positions].

    A token begins a word where its piece begins with a space, as byte-level BPE (GPT-2, Llama 3,
    Qwen) and SentencePiece write it; with another tokenizer there are none.
    """
    ids = np.unique(labels)
    pieces = tokenizer.convert_ids_to_tokens(ids.tolist())
    wanted = [piece[:1] in _SPACES and piece[1:].lower() in FUNCTION_WORDS for piece in pieces]
    return np.isin(labels, ids[np.array(wanted, bool)])


def median_gain(base: np.ndarray, other: np.ndarray, where: np.ndarray) -> float:
    """Median of ``p_other / p_base`` over some positions, from log-probabilities [positions]."""
    with np.errstate(over="ignore", invalid="ignore"):  # base may give next to nothing, or nothing
        return float(np.exp(np.median(other[where].astype(np.float64) - base[where])))


def mean_change(base: np.ndarray, other: np.ndarray, where: np.ndarray) -> float | None:
    """Mean of ``|log p_other - log p_base|`` over some positions, None if there are none."""
    if not where.any():
        return None
    return float(np.abs(other[where].astype(np.float64) - base[where]).mean())
