"""A gate's states against the recurrence that defines them, a position at a time in Python."""

from __future__ import annotations

import math
import random

import pytest
import torch
from operations import Operations
from tiny_models import VOCABULARY, tiny_model
from torch import Tensor
from torch.testing import assert_close

from memdec import MemoryDecoderForCausalLM
from memdec.modeling.gate import FEATURES, SHARE, Gate, Told, posterior

GATE = Gate(
    ((0.3, -0.2, 0.1, 0.4, 0.9, -0.5), (-0.6, 0.2, 0.5, -0.1, 0.3, 0.8)),
    (0.1, -0.3),
    (1.2, 0.7),
    0.2,
)
LENGTHS = (1, 2, 3, 7, 64, 1001)
INF, NAN = math.inf, math.nan
# Each model's log-probabilities: like the other's, far from them, none at all, no number.
SCORES = [(-1.0, -2.5), (-3.0, -2.0), (-0.1, -300.0), (-300.0, -0.1), (-1.0, -INF), (-INF, -1.0)]
SCORES += [(-INF, -INF), (NAN, -1.0)]
WEIGHTS = (20, 20, 1, 1, 1, 1, 1, 1)


def told(rows: int, length: int, seed: int = 0) -> Told:
    draw = random.Random(seed)
    scores = [draw.choices(SCORES, WEIGHTS, k=length) for _ in range(rows)]
    base, memory = torch.tensor(scores).unbind(-1)
    sure = torch.tensor([[[-draw.random() for _ in range(4)]] * length for _ in range(rows)])
    continues = [[draw.random() < 0.95 for _ in range(length)] for _ in range(rows)]
    return Told(base, memory, sure, torch.tensor(continues))


def states_before(rows: int) -> Tensor:
    return torch.tensor([[0.7, 0.9, -2.0, 1.5]], dtype=torch.float64).repeat(rows, 1)


def clamped(value: float, largest: float) -> float:
    return 0.0 if math.isnan(value) else max(-largest, min(largest, value))


def next_weight(weight: float, gain: float, continues: bool) -> float:
    if not continues:
        return 0.5
    memory = weight * math.exp(clamped(gain, 50.0))
    return SHARE / 2 + (1 - SHARE) * memory / (memory + 1 - weight)


def expected_row(row: Told, before: Tensor | None) -> list[list[float]]:
    """`Gate.states` of one row in Python's floats."""
    last = None if before is None else before[0].item()
    weight, *means = (0.5, 0.0, 0.0) if before is None else before[1:].tolist()
    found = []
    parts = (part.tolist() for part in (row.base, row.memory, row.confidence, row.continues))
    for base, memory, sure, continues in zip(*parts, strict=True):
        gain = memory - base
        small = clamped(gain, 5.0)
        means = [
            k * mean + (1 - k) * small if continues else 0.0
            for k, mean in zip((0.8, 0.98), means, strict=True)
        ]
        inputs = [*sure, *means]
        hidden = [
            math.tanh(bias + sum(w * x for w, x in zip(weights, inputs, strict=True)))
            for weights, bias in zip(GATE.hidden_weight, GATE.hidden_bias, strict=True)
        ]
        logit = GATE.output_bias
        logit += sum(w * x for w, x in zip(GATE.output_weight, hidden, strict=True))
        used = 1 / (1 + math.exp(-(logit if last is None else last)))
        mixed = 1 - used + used * math.exp(0.0 if math.isnan(gain) else gain)
        weight = next_weight(weight, math.log(mixed), continues)
        found.append([logit, weight, *means])
        last = logit
    return found


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_states_follow_the_recurrence(length: int, goes_on: bool) -> None:
    parts, before = told(3, length), states_before(3) if goes_on else None
    rows = [
        expected_row(Told(*fields), None if before is None else before[row])
        for row, fields in enumerate(
            zip(parts.base, parts.memory, parts.confidence, parts.continues, strict=True)
        )
    ]
    expected = torch.tensor(rows, dtype=torch.float64)
    assert_close(GATE.states(parts, before), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("before", [None, 1e-3, 0.9995])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("size", [0.1, 3.0, 40.0, 1000.0, INF])
def test_the_posterior_follows_the_recurrence(
    size: float, length: int, before: float | None
) -> None:
    draw = random.Random(length)
    gains = [draw.choice([-size, -0.5, 0.5, size]) for _ in range(length)]
    continues = [draw.random() < 0.99 for _ in range(length)]
    weight, expected = before or 0.5, []
    for gain, same in zip(gains, continues, strict=True):
        weight = next_weight(weight, gain, same)
        expected.append(weight)
    at_first = None if before is None else torch.tensor([before], dtype=torch.float64)
    given = torch.tensor([gains], dtype=torch.float64)
    found = posterior(given, torch.tensor([continues]), at_first)
    assert_close(found[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gain", [-50.0, 50.0, -7.0, 7.0, 0.01])
def test_one_sided_evidence_neither_overflows_nor_vanishes(gain: float) -> None:
    expected, weight = [], 0.5
    for place in range(20_000):
        weight = next_weight(weight, gain if place < 15_000 else -gain, True)
        expected.append(weight)
    gains = torch.full((1, 20_000), gain, dtype=torch.float64)
    gains[:, 15_000:] *= -1
    found = posterior(gains, torch.ones(1, 20_000, dtype=torch.bool))
    assert_close(found[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 2, 31, 63])
def test_states_go_on_where_they_stopped(cut: int) -> None:
    whole = told(2, 64)
    fields = (whole.base, whole.memory, whole.confidence, whole.continues)
    first, second = (
        Told(*(part[:, places] for part in fields)) for places in (slice(cut), slice(cut, None))
    )
    states = GATE.states(first)
    rest = GATE.states(second, states[:, -1])
    found = torch.cat([states, rest], dim=1)
    assert_close(found, GATE.states(whole), rtol=0, atol=1e-12)


def test_what_is_no_number_counts_at_its_own_position_only() -> None:
    parts = told(1, 20)
    parts.confidence[0, 8] = NAN
    parts.base[0, 8] = NAN
    found = GATE.states(parts)
    assert found.shape == (1, 20, FEATURES - 2)
    assert found.isnan().nonzero().tolist() == [[0, 8, 0]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 1001), (130, 1024)])  # a grid's limit
def test_a_graph_of_a_gpu_gives_the_states_too(rows: int, length: int) -> None:
    parts, before = told(rows, length), states_before(rows)
    there = Told(*(part.cuda() for part in vars(parts).values()))
    before_there = before.cuda()
    GATE.states(there, before_there)  # the gate's constants are there from now on
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = GATE.states(there, before_there)
    graph.replay()
    expected = GATE.states(parts, before)
    assert_close(found.cpu(), expected, rtol=0, atol=1e-12)


def operations(model: MemoryDecoderForCausalLM, ids: Tensor) -> int:
    with torch.no_grad(), Operations() as counted:
        model(ids)
    return counted.count


def test_the_operations_of_a_pass_grow_with_the_logarithm_of_its_length() -> None:
    """Where launches are what takes the time, a prompt's must not be as many as its tokens."""
    models = (tiny_model("Llama", seed=seed, max_position_embeddings=1024) for seed in (0, 1))
    model = MemoryDecoderForCausalLM.from_models(*models, lmbda=GATE)
    ids = torch.arange(1024)[None] % VOCABULARY
    model(ids[:, :4])  # the gate's constants are there from now on
    counts = [operations(model, ids[:, :length]) for length in (4, 64, 1024)]
    assert counts[0] < counts[1]
    assert counts[2] - counts[1] <= counts[1] - counts[0]
