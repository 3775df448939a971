"""The gate: what it sees, and that it finds out when the memory is to be trusted."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from memdec.data.corpus import TokenStream
from memdec.errors import MemdecError
from memdec.evaluation.forward import LabelScores
from memdec.evaluation.gate import evidence_lmbda, fit_gate, gate_lmbda
from memdec.evaluation.mixture import best_lmbda, lmbda_curve, mix_log_probs
from memdec.modeling.gate import SHARE, confidence

VOCABULARY = 40
BLOCK = 500


def test_confidence_is_the_largest_probability_and_the_entropy():
    logits = 3 * torch.randn(2, 5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    logits[0, 0, 7:] = -torch.inf
    found = confidence(logits, vocab_size=30)
    log_probs = logits[..., :30].double().log_softmax(-1)
    probs = log_probs.exp()
    entropy = -torch.where(probs > 0, probs * log_probs, 0.0).sum(-1)
    assert found.shape == (2, 5, 2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[..., 0].double(), log_probs.amax(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[..., 1].double(), entropy, rtol=1e-5, atol=1e-6)


def test_labels_of_no_probability_fit_no_gate():
    impossible = LabelScores(np.full(10, -np.inf), np.zeros((10, 2), np.float32))
    with pytest.raises(MemdecError, match="each of 10 labels the probability 0"):
        fit_gate(impossible, impossible, stream(10), 10)


def test_confidence_does_not_depend_on_the_chunks(monkeypatch):
    logits = torch.randn(13, VOCABULARY, generator=torch.Generator().manual_seed(0))
    whole = confidence(logits)
    monkeypatch.setattr("memdec.modeling.gate._CHUNK_VALUES", 3 * VOCABULARY)
    torch.testing.assert_close(confidence(logits), whole, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_confidence_of_half_precision_is_that_of_the_same_numbers(dtype):
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(confidence(logits), confidence(logits.float()), rtol=0, atol=0)


def test_no_gradient_goes_through_the_confidence():
    logits = torch.randn(4, VOCABULARY, requires_grad=True)
    assert not confidence(logits).requires_grad


def stream(positions: int, documents: tuple[int, ...] = (1,), **options: bool) -> TokenStream:
    return TokenStream((np.zeros(positions + 1, np.int32),), np.array(documents), **options)


def split(seed: int, positions: int = 4000) -> tuple[LabelScores, LabelScores]:
    """Labels of which the memory knows every other one, and then says so; the base is always vague."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(VOCABULARY, (positions,), generator=generator)
    base = torch.randn(positions, VOCABULARY, generator=generator)
    memory = torch.randn(positions, VOCABULARY, generator=generator)
    base[torch.arange(positions), labels] += 2
    knows = torch.arange(positions) % 2 == 0
    memory[torch.arange(positions)[knows], labels[knows]] += 8
    rows = torch.arange(positions)
    found = [
        LabelScores(part.log_softmax(-1)[rows, labels].numpy(), confidence(part).numpy())
        for part in (base, memory)
    ]
    return found[0], found[1]


def nll(gate, base: LabelScores, memory: LabelScores) -> float:
    lmbda = gate_lmbda(gate, base, memory, stream(len(base.log_probs)), BLOCK)
    assert ((lmbda >= 0) & (lmbda <= 1)).all()
    return -float(mix_log_probs(base.log_probs, memory.log_probs, lmbda).mean())


def fitted(base: LabelScores, memory: LabelScores, **options: int):
    return fit_gate(base, memory, stream(len(base.log_probs)), BLOCK, **options)


def test_it_beats_the_best_fixed_lmbda_on_other_tokens():
    other = split(1)
    fixed = lmbda_curve(*(one.log_probs for one in other)).min()
    assert nll(fitted(*split(0)), *other) < fixed - 0.3


def test_it_loses_little_where_confidence_says_nothing():
    base, memory = split(0)
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(2, len(base.log_probs), 2)).astype(np.float32)
    parts = LabelScores(base.log_probs, noise[0]), LabelScores(memory.log_probs, noise[1])
    best = best_lmbda(base.log_probs, memory.log_probs)[1]
    assert nll(fitted(*parts), *parts) < best + math.log(2) / BLOCK + SHARE


def test_gains_before_a_token_count():
    """A memory that is right for a page and wrong for a page, and never says how sure it is."""
    right = np.arange(4000) // 50 % 2 == 0
    same = np.zeros((4000, 2), np.float32)
    base = LabelScores(np.full(4000, -3.0, np.float32), same)
    memory = LabelScores(np.where(right, -0.5, -6.0).astype(np.float32), same)
    best = best_lmbda(base.log_probs, memory.log_probs)[1]
    assert nll(fitted(base, memory), base, memory) < best - 0.3


def test_the_same_numbers_give_the_same_gate_and_another_seed_another():
    assert fitted(*split(0)) == fitted(*split(0))
    assert fitted(*split(0)) != fitted(*split(0), seed=1)


def test_labels_without_any_mass_do_not_count():
    base, memory = split(0)
    for one in (base, memory):
        one.log_probs[:5] = -np.inf
    memory.log_probs[5:10] = -np.inf
    base.log_probs[10:15] = -np.inf
    gate = fitted(base, memory)
    assert np.isfinite(gate_lmbda(gate, base, memory, stream(4000), BLOCK)).all()


def test_a_feature_that_never_changes_is_harmless():
    base, memory = split(0)
    assert base.confidence is not None
    base.confidence[:] = 0.5
    assert (
        nll(fitted(base, memory), base, memory)
        < lmbda_curve(base.log_probs, memory.log_probs).min()
    )


def test_no_lmbda_depends_on_a_label_that_is_not_known_yet():
    base, memory = split(0, 256)
    gate = fit_gate(base, memory, stream(256), 64)
    before = gate_lmbda(gate, base, memory, stream(256), 64)
    changed = dataclasses.replace(memory, log_probs=memory.log_probs.copy())
    changed.log_probs[100] -= 3
    after = gate_lmbda(gate, base, changed, stream(256), 64)
    assert np.array_equal(before[:101], after[:101])
    assert not np.isclose(before[101:128], after[101:128], rtol=1e-9).any()
    assert np.array_equal(before[128:], after[128:])  # another block, another context


@pytest.mark.parametrize("isolated", [False, True])
def test_evidence_begins_anew_in_a_document_that_is_isolated(isolated):
    base, memory = split(0, 200)
    both = stream(200, (1, 91), isolate_documents=isolated)  # its separator is read at position 90
    gate = fit_gate(base, memory, both, 128)
    found = gate_lmbda(gate, base, memory, both, 128)[90:128]
    rest = [LabelScores(one.log_probs[90:128], one.confidence[90:128]) for one in (base, memory)]
    alone = gate_lmbda(gate, *rest, stream(38), 128)
    assert np.allclose(found, alone, rtol=1e-12) == isolated


def test_evidence_bounds_what_is_lost_to_the_base():
    generator = np.random.default_rng(0)
    base = -generator.exponential(2, 4096)
    mixed = base - generator.exponential(1, 4096)  # worse everywhere
    weights = evidence_lmbda(base, mixed, stream(4096), 1024)
    found = np.log((1 - weights) * np.exp(base) + weights * np.exp(mixed))
    assert (base - found).mean() < math.log(2) / 1024 + SHARE


def test_a_gate_loses_no_more_than_that_on_text_it_has_never_seen():
    """Elsewhere the memory is as sure as at home, and always wrong."""
    base, memory = split(1)
    assert memory.confidence is not None
    gate = fitted(*split(0))
    lost = LabelScores(np.full(4000, -12.0, np.float32), memory.confidence)
    assert nll(gate, base, lost) + base.log_probs.mean() < math.log(2) / BLOCK + SHARE


def test_evidence_follows_the_better_one():
    base = np.full(1000, -4.0)
    mixed = np.where(np.arange(1000) < 500, -3.0, -5.0)  # the domain ends in the middle
    weights = evidence_lmbda(base, mixed, stream(1000), 1000)
    assert weights[0] == 0.5
    assert weights[20:500].min() > 0.99
    assert weights[520:].max() < 0.01


def test_a_label_that_neither_gives_any_mass_is_no_evidence():
    base, mixed = np.full(50, -4.0, np.float32), np.full(50, -4.0, np.float32)
    base[20] = mixed[20] = -np.inf
    assert np.allclose(evidence_lmbda(base, mixed, stream(50), 50), 0.5)
