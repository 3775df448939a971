"""From scores to the columns of the table."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scores import Text
from transformers import PreTrainedTokenizerBase

from memdec.data.corpus import TokenStream
from memdec.evaluation.bootstrap import interval, resampled_means, resampling_units

SAMPLES = 1000
# Articles, prepositions, pronouns, conjunctions, auxiliaries: words that say little of a domain.
FUNCTION_WORDS = frozenset(
    [
        "a",
        "about",
        "above",
        "after",
        "again",
        "against",
        "all",
        "also",
        "although",
        "am",
        "an",
        "and",
        "any",
        "are",
        "as",
        "at",
        "be",
        "because",
        "been",
        "before",
        "being",
        "below",
        "between",
        "both",
        "but",
        "by",
        "can",
        "could",
        "did",
        "do",
        "does",
        "down",
        "during",
        "each",
        "either",
        "else",
        "every",
        "for",
        "from",
        "had",
        "has",
        "have",
        "he",
        "her",
        "here",
        "hers",
        "him",
        "his",
        "how",
        "i",
        "if",
        "in",
        "into",
        "is",
        "it",
        "its",
        "itself",
        "may",
        "me",
        "might",
        "mine",
        "more",
        "most",
        "must",
        "my",
        "neither",
        "no",
        "nor",
        "not",
        "of",
        "off",
        "on",
        "once",
        "only",
        "or",
        "other",
        "our",
        "out",
        "over",
        "own",
        "rather",
        "shall",
        "she",
        "should",
        "since",
        "so",
        "some",
        "such",
        "than",
        "that",
        "the",
        "their",
        "them",
        "themselves",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "though",
        "through",
        "to",
        "too",
        "under",
        "until",
        "up",
        "upon",
        "us",
        "very",
        "was",
        "we",
        "were",
        "what",
        "when",
        "where",
        "whether",
        "which",
        "while",
        "who",
        "whom",
        "whose",
        "why",
        "will",
        "with",
        "within",
        "without",
        "would",
        "yet",
        "you",
        "your",
    ]
)


def perplexity(log_probs: np.ndarray, text: Text, block_size: int) -> dict[str, Any]:
    """nll, perplexity and its 95 % bootstrap interval; None where a probability is 0."""
    nll = -float(log_probs.mean(dtype=np.float64))
    if not math.isfinite(nll):
        return {"nll": None, "perplexity": None, "interval": None}
    _, units = resampling_units(text.positions, text.stream.documents, block_size)
    means = resampled_means(log_probs[:, None].astype(np.float64), units, SAMPLES, seed=0)
    low, high = interval(-means[:, 0])
    return {"nll": nll, "perplexity": math.exp(nll), "interval": [math.exp(low), math.exp(high)]}


def rarest_decile(train: TokenStream, labels: np.ndarray, vocab_size: int) -> np.ndarray:
    """The tenth of the positions whose labels are rarest in the train split, bool [positions]."""
    counts = np.bincount(train.read(0, len(train)), minlength=vocab_size)[labels]
    rarest = np.zeros(len(labels), bool)
    rarest[np.argsort(counts, kind="stable")[: max(len(labels) // 10, 1)]] = True
    return rarest


def function_words(tokenizer: PreTrainedTokenizerBase, labels: np.ndarray) -> np.ndarray:
    """Where the label begins a word and is a function word, bool [positions]."""
    ids = np.unique(labels)
    texts = [
        tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in ids.tolist()
    ]
    wanted = [text[:1] == " " and text[1:].lower() in FUNCTION_WORDS for text in texts]
    return np.isin(labels, ids[np.array(wanted, bool)])


def median_gain(base: np.ndarray, joint: np.ndarray, where: np.ndarray) -> float:
    """Median of ``p_joint / p_base`` over some positions."""
    return float(np.exp(np.median(joint[where].astype(np.float64) - base[where])))


def mean_change(base: np.ndarray, joint: np.ndarray, where: np.ndarray) -> float | None:
    """Mean of ``|log p_joint - log p_base|`` over some positions, None if there are none."""
    if not where.any():
        return None
    return float(np.abs(joint[where].astype(np.float64) - base[where]).mean())
