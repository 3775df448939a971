"""The gate: what it sees, and that it finds out when the memory is to be trusted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memdec.evaluation.gate import fit_gate
from memdec.evaluation.mixture import best_lmbda, lmbda_curve, mix_log_probs
from memdec.modeling.gate import Gate, confidence

VOCABULARY = 40


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


def split(seed: int, positions: int = 4000):
    """Labels of which the memory knows every other one, and then says so; the base is always vague."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(VOCABULARY, (positions,), generator=generator)
    base = torch.randn(positions, VOCABULARY, generator=generator)
    memory = torch.randn(positions, VOCABULARY, generator=generator)
    base[torch.arange(positions), labels] += 2
    knows = torch.arange(positions) % 2 == 0
    memory[torch.arange(positions)[knows], labels[knows]] += 8
    rows = torch.arange(positions)
    log_probs = [part.log_softmax(-1)[rows, labels].numpy() for part in (base, memory)]
    return (*log_probs, confidence(base).numpy(), confidence(memory).numpy())


def nll(gate: Gate, base, memory, base_confidence, memory_confidence) -> float:
    lmbda = gate.lmbda(torch.from_numpy(base_confidence), torch.from_numpy(memory_confidence))
    assert ((lmbda >= 0) & (lmbda <= 1)).all()
    return -float(mix_log_probs(base, memory, lmbda.numpy()).mean())


def test_it_beats_the_best_fixed_lmbda_on_other_tokens():
    gate = fit_gate(*split(0))
    other = split(1)
    assert nll(gate, *other) < lmbda_curve(*other[:2]).min() - 0.3
    assert gate.memory_log_max > 0  # the surer the memory, the more weight it gets


def test_it_is_no_worse_than_a_fixed_lmbda_where_confidence_says_nothing():
    base, memory, *_ = split(0)
    noise = np.random.default_rng(0).normal(size=(2, len(base), 2)).astype(np.float32)
    assert nll(fit_gate(base, memory, *noise), base, memory, *noise) <= best_lmbda(base, memory)[1]


def test_the_same_numbers_give_the_same_gate():
    assert fit_gate(*split(0)) == fit_gate(*split(0))


def test_labels_without_any_mass_do_not_count():
    given = split(0)
    base, memory = given[0].copy(), given[1].copy()
    base[:5] = memory[:5] = -np.inf
    memory[5:10] = -np.inf
    gate = fit_gate(base, memory, *given[2:])
    assert np.isfinite(list(vars(gate).values())).all()


def test_a_feature_that_never_changes_is_harmless():
    base, memory, base_confidence, memory_confidence = split(0)
    base_confidence[:] = 0.5
    gate = fit_gate(base, memory, base_confidence, memory_confidence)
    given = (base, memory, base_confidence, memory_confidence)
    assert nll(gate, *given) < lmbda_curve(base, memory).min()
