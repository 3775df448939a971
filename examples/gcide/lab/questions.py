"""Multiple-choice questions made of text: definitions, last words, continuations.

Each has four options, one of them right, and is answered by comparing log-probabilities, as
zero-shot benchmarks are. Wrong options come from the same text and look like the right one: other
definitions of the same part of speech and a similar length, words as frequent, spans as long.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memdec.evaluation.measures import FUNCTION_WORDS

OPTIONS = 4
_NEAR = 12  # so many of the most similar candidates are drawn from
_PROMPT_WORDS = 60
_FEWEST_WORDS = 8  # before a last word, and in a continuation

# `Rash \Rash\, n. [L. rasus.] (Med.) 1. An eruption.` and `tadpole, polliwog: a larval frog`.
_ENTRIES = (
    re.compile(
        r"^(?P<prompt>(?P<head>[^\\]+?) \\[^\\]+\\,? (?P<kind>n\.|a\.|adj\.|adv\.|v\. [it]\.))"
        r"(?: (?:\[[^\[\]]*\]|\([^()]*\)|\d+\.))*"
        r" (?P<definition>[A-Z][^.;\[\]{}\\]{19,159})[.;]"
    ),
    re.compile(
        r"^(?P<prompt>(?P<head>[^\\:,]+)[^\\:]*:)(?P<kind>) (?P<definition>[a-z][^;:\n]{19,159})"
    ),
)
_WORD = re.compile(r"\S+")
_LAST_WORD = re.compile(r"\s(?P<word>[a-z]{4,})(?=[.;:](?:\s|$)|$)")


@dataclass(frozen=True)
class Question:
    """Options follow the prompt as they are, with the white space they begin with."""

    prompt: str
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class _Candidate:
    """A prompt with its right option; wrong ones are of the same kind and of a near size."""

    prompt: str
    option: str
    kind: str
    size: int


def definitions(documents: Sequence[str]) -> list[_Candidate]:
    """Which definition belongs to this headword?"""
    found = []
    for entry in documents:
        match = next(filter(None, (pattern.match(entry) for pattern in _ENTRIES)), None)
        if match is None or match["head"].lower() in match["definition"].lower():
            continue
        option = f" {match['definition']}"
        found.append(_Candidate(match["prompt"], option, match["kind"], len(option)))
    return found


def last_words(documents: Sequence[str]) -> list[_Candidate]:
    """Which word ends this sentence? Size is how often the text has the word."""
    counts = Counter(word for text in documents for word in re.findall(r"[a-z]+", text))
    found = []
    for text in documents:
        starts = [match.start() for match in _WORD.finditer(text)]
        for match in _LAST_WORD.finditer(text):
            before = [start for start in starts if start < match.start()]
            word = match["word"]
            if len(before) < _FEWEST_WORDS or word in FUNCTION_WORDS:
                continue
            prompt = text[before[-_PROMPT_WORDS:][0] : match.start()]
            found.append(_Candidate(prompt, match[0], "", counts[word]))
    return found


def continuations(documents: Sequence[str]) -> list[_Candidate]:
    """Which span of eight words goes on here? One question a sixty words of a document."""
    found = []
    for text in documents:
        ends = [0, *(match.end() for match in _WORD.finditer(text))]
        step = _PROMPT_WORDS + _FEWEST_WORDS
        for stop in range(min(2 * _FEWEST_WORDS, step), len(ends), step):
            middle = stop - _FEWEST_WORDS
            prompt = text[ends[max(middle - _PROMPT_WORDS, 0)] : ends[middle]].lstrip()
            found.append(_Candidate(prompt, text[ends[middle] : ends[stop]], "", 0))
    return found


TASKS: dict[str, Callable[[Sequence[str]], list[_Candidate]]] = {
    "definition": definitions,
    "last word": last_words,
    "continuation": continuations,
}


def make_questions(task: str, documents: Sequence[str], most: int, seed: int = 0) -> list[Question]:
    """At most so many questions of a task, the same for the same documents and seed.

    Fewer come back where the text has fewer candidates, and none where it has none of that task.
    """
    generator = random.Random(seed)
    candidates = TASKS[task](documents)
    generator.shuffle(candidates)
    kinds: dict[str, list[_Candidate]] = {}
    for candidate in candidates:
        kinds.setdefault(candidate.kind, []).append(candidate)
    for alike in kinds.values():
        alike.sort(key=lambda one: one.size)  # stable: equal sizes stay shuffled
    questions = []
    for right in candidates:
        wrong = _similar(right, kinds[right.kind], generator)
        if len(wrong) < OPTIONS - 1 or len(questions) == most:
            continue
        options = [right.option, *generator.sample(wrong, OPTIONS - 1)]
        generator.shuffle(options)
        questions.append(Question(right.prompt, tuple(options), options.index(right.option)))
    return questions


def _similar(right: _Candidate, alike: Sequence[_Candidate], generator: random.Random) -> list[str]:
    """Other options whose size is nearest, each once; `alike` is in order of size."""
    place = next(index for index, one in enumerate(alike) if one is right)
    nearby = list(alike[max(place - 4 * _NEAR, 0) : place + 4 * _NEAR + 1])
    generator.shuffle(nearby)  # no order among equals
    nearby.sort(key=lambda one: abs(one.size - right.size))
    options = dict.fromkeys(one.option for one in nearby if one.option != right.option)
    return list(options)[:_NEAR]
