"""interpolate_sample: the right token for a seed, the right distribution over many, the filters."""

import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from budget import assert_within_budget
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from memdec.environment import environment
from memdec.ops import fused_interpolate, interpolate_sample
from memdec.ops.interpolate_sample import uniform

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "one row": (1, 1000),
    "V = 1": (3, 1),
    "no leading dimension": (130,),
    "odd V, so rows lose their 16-byte alignment": (5, 5003),
    "three dimensions": (2, 3, 517),
}
FILTERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "plain": {},
    "cool": {"temperature": 0.7},
    "hot": {"temperature": 1.8},
    "nearly greedy": {"temperature": 0.01},
    "top-k": {"top_k": 50},
    "top-k beyond what is sorted": {"top_k": 700, "temperature": 0.9},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.05},
    "hot top-p": {"top_p": 0.7, "temperature": 1.5},
    "cool top-p": {"top_p": 0.9, "temperature": 0.7},
    "all": {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 1.2},
}


# Log-probabilities of a flat row that differ by less may stand in another order in float32.
SWAPPED = 4e-6

# What a GPU reads a row for as often as it takes, in as many blocks as few rows leave free; top-p
# and min-p alone where very many tokens remain.
OFTEN_READ: dict[str, dict[str, Any]] = {
    "cool top-p": {"top_p": 0.9, "temperature": 0.7},
    "cool min-p": {"min_p": 0.01, "temperature": 0.7},
    "top-p": {"top_p": 0.9},
    "min-p": {"min_p": 0.5},
    "top-k beyond what is sorted": {"top_k": 600},
    "all": {"top_k": 600, "top_p": 0.9, "min_p": 0.02, "temperature": 1.2},
}


def random_case(
    shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    base = 3 * torch.randn(shape, generator=generator)
    memory = 3 * torch.randn(shape, generator=generator)
    return base.to(device, dtype), memory.to(device, dtype)


def seeded(device: str, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def uniforms(shape: tuple[int, ...], device: str, seed: int = 0) -> Tensor:
    """What a generator of this seed draws a row."""
    generator = seeded(device, seed)
    seeds = torch.randint(-(2**63), 2**63 - 1, shape, device=device, generator=generator)
    return uniform(seeds).cpu()


def share_before(
    log_probs: np.ndarray, token: int, tie: float = 0.0, **options: Any
) -> tuple[float, float]:
    """Where the token lies among the filtered tokens, laid side by side: (0, 0) if it is not kept.

    With `tie`, where it lies together with those whose log-probability differs by no more.
    """
    n = log_probs.size
    falling = np.lexsort((np.arange(n), -log_probs))
    if options.get("temperature") == 0:
        return (0.0, 1.0) if token == falling[0] else (0.0, 0.0)
    weights = np.exp((log_probs[falling] - log_probs.max()) / options.get("temperature", 1.0))
    weights[options.get("top_k", n) :] = 0
    mass_before = np.concatenate([[0], weights.cumsum()[:-1]])
    weights[mass_before >= options.get("top_p", 1.0) * weights.sum()] = 0
    weights[weights < options.get("min_p", 0.0)] = 0
    filtered = options.keys() & {"top_p", "min_p"} or options.get("top_k", n) < n
    if not filtered:
        weights, falling = weights[np.argsort(falling)], np.arange(n)
    alike = falling == token
    if tie:
        alike = np.abs(log_probs[falling] - log_probs[token]) <= tie
    first, last = np.nonzero(alike)[0][[0, -1]]
    if weights[alike].max() == 0:
        return 0.0, 0.0
    end = weights[: last + 1].sum() / weights.sum()
    return end - weights[first : last + 1].sum() / weights.sum(), end


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_token_and_log_prob_of_a_seed(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    filters: dict[str, Any],
    device: str,
    implementation: str,
) -> None:
    check_draws(*random_case(shape, device, dtype), filters, device)


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_wide_rows(
    dtype: torch.dtype, filters: dict[str, Any], device: str, implementation: str
) -> None:
    check_draws(*random_case((3, 50257), device, dtype), filters, device)


def check_draws(
    base: Tensor, memory: Tensor, filters: dict[str, Any], device: str, tie: float = 0.0
) -> None:
    """Every row's token is the one that its uniform number falls into, by the oracle's float64.

    Up to 1e-5: there are a hundred thousand float32 probabilities. `tie` as in share_before.
    """
    tokens, log_probs = interpolate_sample(base, memory, 0.3, generator=seeded(device), **filters)
    lead = base.shape[:-1]
    assert (tokens.shape, tokens.dtype) == (lead, torch.int64)
    assert (log_probs.shape, log_probs.dtype) == (lead, torch.float32)
    truth = oracle.interpolate(base, memory, 0.3)
    assert_within_budget(log_probs, truth.gather(-1, tokens.cpu()[..., None])[..., 0])
    drawn = uniforms(lead, device).reshape(-1).tolist()
    rows = truth.reshape(-1, base.shape[-1]).numpy()
    for row, token, u in zip(rows, tokens.reshape(-1).tolist(), drawn, strict=True):
        start, end = share_before(row, token, tie, **filters)
        assert end > start, "a token that the filters leave out"
        if filters.get("temperature") != 0:
            assert start - 1e-5 <= u <= end + 1e-5


def draw(base: Tensor, memory: Tensor, seeds: Tensor, **filters: Any) -> tuple[Tensor, Tensor]:
    """With given seeds, one a row."""
    vocab = base.shape[-1]
    options = {"temperature": 1.0, "top_k": vocab, "top_p": 1.0, "min_p": 0.0} | filters
    op = torch.ops.memdec.interpolate_sample
    return op(base, memory, 0.3, None, 1.0, vocab, seeds, *options.values())


def flat_and_peaked(rows: int, vocab: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """By turns: of the flat rows a nucleus is most of the vocabulary."""
    base, memory = random_case((min(rows, 20), vocab), device)
    base[::2] *= 0.03
    memory[::2] *= 0.03
    return tuple(x.to(dtype).repeat(-(-rows // 20), 1)[:rows] for x in (base, memory))


@pytest.mark.parametrize("filters", OFTEN_READ.values(), ids=OFTEN_READ)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 151936), (4, 151936), (40, 50257)])
def test_rows_that_are_read_often(
    rows: int, vocab: int, dtype: torch.dtype, filters: dict[str, Any], device: str, native: None
) -> None:
    base, memory = flat_and_peaked(rows, vocab, device, dtype)
    check_draws(base, memory, filters, device, tie=SWAPPED)


@pytest.mark.parametrize("filters", OFTEN_READ.values(), ids=OFTEN_READ)
@pytest.mark.parametrize("vocab", [50257, 151936])
def test_a_row_draws_the_same_among_any_number_of_rows(
    vocab: int, filters: dict[str, Any], device: str, native: None
) -> None:
    """However many blocks a row gets: on an H100 the 1000 rows one each, the others 2 to 16."""
    most = 1000 if device == "cuda" else 16
    base, memory = flat_and_peaked(most, vocab, device, torch.bfloat16)
    seeds = torch.arange(most, device=device)
    tokens, log_probs = draw(base, memory, seeds, **filters)
    for rows in (1, 4, 16, 28, 40, 300):
        for first in (0, max(0, most - rows)):
            part = slice(first, first + rows)
            few = draw(base[part], memory[part], seeds[part], **filters)
            assert torch.equal(few[0], tokens[part])
            assert torch.equal(few[1], log_probs[part])


@pytest.mark.parametrize("filters", [{}, *OFTEN_READ.values()], ids=["plain", *OFTEN_READ])
@pytest.mark.parametrize("rows", [1, 16])
def test_rows_that_lie_differently(
    rows: int, filters: dict[str, Any], device: str, native: None
) -> None:
    """Other phases in 16 bytes, then other dtypes."""
    vocab = 50257
    wide, memory = flat_and_peaked(rows, vocab + 1, device, torch.bfloat16)
    base, memory = wide[:, 1:], memory[:, :-1]
    for pair in ((base, memory), (base.float(), memory), (base, memory.half())):
        check_draws(*pair, filters, device, tie=SWAPPED)


@pytest.mark.parametrize("filters", [{"top_p": 1e-30}, {"top_p": 0.5}, {"min_p": 1.0}], ids=str)
@pytest.mark.parametrize("temperature", [1e-30, 0.7, 1.0, 1e30])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 151936), (3, 1), (3, 5), (20, 50257)])
def test_filters_and_temperatures_at_their_ends(
    rows: int,
    vocab: int,
    temperature: float,
    filters: dict[str, Any],
    device: str,
    implementation: str,
) -> None:
    """One token that counts, or all alike; of a team most blocks may have no token at all."""
    base, memory = flat_and_peaked(rows, vocab, device, torch.bfloat16)
    check_draws(base, memory, {"temperature": temperature, **filters}, device, tie=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 151936), (5, 50257), (70, 50257)])
def test_very_many_equal_tokens(
    rows: int, vocab: int, temperature: float, device: str, implementation: str
) -> None:
    """The cut goes through tokens that only their id tells apart."""
    equal = torch.zeros(rows, vocab, device=device, dtype=torch.bfloat16)
    options = {"temperature": temperature, "top_p": 0.5}
    tokens, _ = interpolate_sample(equal, equal, 0.3, generator=seeded(device), **options)
    wanted = (uniforms((rows,), device) * math.ceil(vocab / 2)).long()
    assert torch.equal(tokens.cpu(), wanted)
    tokens, _ = interpolate_sample(
        equal, equal, 0.3, generator=seeded(device), top_k=9999, temperature=temperature
    )
    assert torch.equal(tokens.cpu(), (uniforms((rows,), device) * 9999).long())
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(0, 3, (rows, vocab), generator=generator).to(device, torch.bfloat16)
    check_draws(steps, steps, options, device)


@pytest.mark.parametrize("filters", OFTEN_READ.values(), ids=OFTEN_READ)
@pytest.mark.parametrize("shift", [0, 1])
def test_wide_rows_without_a_distribution(
    shift: int, filters: dict[str, Any], device: str, native: None
) -> None:
    """Rows beside them are as they are without them, also where most tokens are masked."""
    wide, memory = flat_and_peaked(6, 50257 + shift, device, torch.bfloat16)
    base, memory = wide[:, shift:], memory[:, : memory.shape[1] - shift]
    base[0, 40_000] = math.nan
    base[1] = -math.inf
    base[2, :50_000] = memory[2, :50_000] = -math.inf
    memory[4, 0] = math.nan
    seeds = torch.arange(6, device=device)
    tokens, log_probs = draw(base, memory, seeds, **filters)
    assert tokens[[0, 1, 4]].tolist() == [0, 0, 0]
    assert log_probs.isnan().tolist() == [True, True, False, False, True, False]
    assert tokens[2] >= 50_000
    for good in (slice(2, 4), slice(5, 6)):
        alone = draw(base[good], memory[good], seeds[good], **filters)
        assert torch.equal(alone[0], tokens[good])
        check_draws(base[good], memory[good], filters, device, tie=SWAPPED)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("filters", OFTEN_READ.values(), ids=OFTEN_READ)
@pytest.mark.parametrize("rows", [1, 4, 40, 300])
def test_a_draw_in_a_cuda_graph_is_that_of_its_seeds(rows: int, filters: dict[str, Any]) -> None:
    base, memory = flat_and_peaked(rows, 50257, "cuda", torch.bfloat16)
    seeds = torch.arange(rows, device="cuda")
    draw(base, memory, seeds, **filters)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, log_probs = draw(base, memory, seeds, **filters)
    for _ in range(3):
        seeds += 1000
        base.copy_(base.roll(1, -1))
        graph.replay()
        wanted = draw(base, memory, seeds, **filters)
        assert torch.equal(tokens, wanted[0])
        assert torch.equal(log_probs, wanted[1])


@pytest.mark.parametrize("lmbda", [0.0, 0.4, 1.0])
def test_greedy_takes_the_lower_of_equal_tokens(
    lmbda: float, device: str, implementation: str
) -> None:
    base = torch.zeros(4, 60000, device=device, dtype=torch.bfloat16)
    base[0, [7, 30000, 59999]] = 5
    base[1, [40000, 41000]] = 5
    base[2, 59999] = 5
    tokens, _ = interpolate_sample(base, base, lmbda, temperature=0)
    assert tokens.tolist() == [7, 40000, 59999, 0]
    assert interpolate_sample(base, base, lmbda, top_k=1)[0].tolist() == [7, 40000, 59999, 0]


@pytest.mark.parametrize("vocab", [500, 50257])
def test_top_k_keeps_exactly_k_of_equal_tokens(
    vocab: int, device: str, implementation: str
) -> None:
    """More tokens reach the k-th one's probability than there is room for."""
    base = torch.zeros(1, vocab, device=device).expand(150, vocab)
    tokens, _ = interpolate_sample(base, base, 0.5, top_k=20, generator=seeded(device))
    assert set(tokens.tolist()) == set(range(20))


def test_top_k_in_one_group_of_columns(device: str, implementation: str) -> None:
    base = torch.full((1, 50257), -3.0, device=device)
    base[0, 1000:1100] = torch.arange(100.0, device=device) / 100
    base = base.expand(300, -1)
    tokens, _ = interpolate_sample(base, base, 0.5, top_k=60, temperature=2.0)
    assert tokens.min() >= 1040
    assert tokens.max() <= 1099
    assert len(set(tokens.tolist())) > 50


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_distribution_is_that_of_transformers(
    filters: dict[str, Any], device: str, implementation: str
) -> None:
    """Pearson's chi-squared over 12,000 draws, against the processors of transformers."""
    vocab, draws = 211, 12_000
    base, memory = random_case((1, vocab), device)
    rows = base.expand(draws, -1), memory.expand(draws, -1)
    tokens, _ = interpolate_sample(*rows, 0.4, generator=seeded(device, 1), **filters)
    scores = fused_interpolate(base.cpu(), memory.cpu(), 0.4)
    if filters.get("temperature") == 0:
        assert set(tokens.tolist()) == {int(scores.argmax())}
        return
    ids = torch.zeros(1, 1, dtype=torch.long)
    makers = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    for name, maker in makers.items():
        if name in filters:
            scores = maker(filters[name])(ids, scores)
    wanted = torch.softmax(scores.double(), -1)[0]
    counts = torch.bincount(tokens.cpu(), minlength=vocab)
    assert counts[wanted == 0].sum() == 0
    # Tokens that are expected fewer than 20 times count as one.
    rare = wanted * draws < 20
    expected = torch.cat([wanted[~rare], wanted[rare].sum()[None]]) * draws
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    seen = expected > 0
    statistic = ((observed - expected)[seen].square() / expected[seen]).sum()
    freedom = int(seen.sum()) - 1
    # Five standard deviations of the statistic.
    assert statistic <= freedom + 5 * math.sqrt(2 * max(freedom, 1))


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("rows", [3, 300])
def test_padding_and_masked_tokens_are_never_drawn(
    rows: int, filters: dict[str, Any], device: str, implementation: str
) -> None:
    base, memory = random_case((rows, 700), device)
    base[:, 640:] = memory[:, 600:] = 50  # padding
    base[:, ::2] = memory[:, ::2] = -math.inf
    memory = memory[:, :650]
    tokens, log_probs = interpolate_sample(base, memory, 0.5, vocab_size=640, **filters)
    assert tokens.max() < 640
    assert (tokens % 2 == 1).all()
    mixed = fused_interpolate(base, memory, 0.5, vocab_size=640)
    torch.testing.assert_close(log_probs, mixed.gather(-1, tokens[:, None])[:, 0])


@pytest.mark.parametrize("extreme", [1e-310, 1e-40, 1e-30, 1e30, 1e39, 1e308])
def test_temperatures_that_float32_cannot_hold(
    extreme: float, device: str, implementation: str
) -> None:
    base, memory = random_case((300, 700), device)
    base[:, ::2] = memory[:, ::2] = -math.inf
    best = interpolate_sample(base, memory, 0.5, temperature=0)[0]
    tokens, log_probs = interpolate_sample(base, memory, 0.5, temperature=extreme)
    assert log_probs.isfinite().all()
    assert (tokens % 2 == 1).all()
    assert torch.equal(tokens, best) if extreme < 1 else tokens.unique().numel() > 100


def test_the_smallest_nucleus_is_the_greatest_token(device: str, implementation: str) -> None:
    base, memory = random_case((30, 700), device)
    best = interpolate_sample(base, memory, 0.5, temperature=0)[0]
    for top_p in (1e-30, 1e-40, 5e-324):
        assert torch.equal(interpolate_sample(base, memory, 0.5, top_p=top_p)[0], best)


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16,) * 2])
def test_weights_a_row_and_rows_without_a_distribution(
    dtypes: tuple[torch.dtype, torch.dtype],
    filters: dict[str, Any],
    device: str,
    implementation: str,
) -> None:
    base, memory = (x.to(d) for x, d in zip(random_case((7, 3000), device), dtypes, strict=True))
    lmbda = torch.tensor([0.0, 1.0, 0.3, 1.5, math.nan, 0.5, 0.5], device=device)
    memory[0] = base[1] = math.nan  # of weight 0
    base[5, 17] = math.nan
    memory[6] = -math.inf
    tokens, log_probs = interpolate_sample(
        base, memory, lmbda, memory_temperature=1.5, generator=seeded(device), **filters
    )
    assert tokens[3:].tolist() == [0, 0, 0, 0]
    assert log_probs[3:].isnan().all()
    truth = oracle.interpolate(base, memory, lmbda, 1.5)[:3]
    found = tokens[:3].cpu()[:, None]
    assert_within_budget(log_probs[:3], truth.gather(-1, found)[:, 0])
    drawn = uniforms((7,), device)[:3].tolist()
    for row, token, u in zip(truth.numpy(), found[:, 0].tolist(), drawn, strict=True):
        start, end = share_before(row, token, **filters)
        assert end > start
        assert filters.get("temperature") == 0 or start - 1e-5 <= u <= end + 1e-5


def test_strided_and_misaligned_rows(device: str, implementation: str) -> None:
    wide_base, wide_memory = random_case((2, 5, 1203), device, torch.bfloat16)
    base, memory = wide_base[:, 1:, 3:1203], wide_memory[:, :-1, :1200]
    for filters in FILTERS.values():
        ours, wanted = (
            interpolate_sample(*inputs, 0.6, generator=seeded(device), **filters)
            for inputs in ((base, memory), (base.contiguous(), memory.contiguous()))
        )
        assert torch.equal(ours[0], wanted[0])
        torch.testing.assert_close(ours[1], wanted[1])


def test_a_draw_is_repeatable_and_rows_are_independent(device: str, implementation: str) -> None:
    base = torch.zeros(2, 200, 100, device=device)
    first, second = (interpolate_sample(base, base, 0.5)[0] for _ in range(2))
    assert (first == second).float().mean() < 0.1
    assert first.unique().numel() > 80
    assert (first[0] == first[1]).float().mean() < 0.1
    torch.manual_seed(3)
    a = interpolate_sample(base, base, 0.5)[0]
    torch.manual_seed(3)
    assert torch.equal(a, interpolate_sample(base, base, 0.5)[0])
    by_generator = [
        interpolate_sample(base, base, 0.5, generator=seeded(device, 8))[0] for _ in "ab"
    ]
    assert torch.equal(*by_generator)


def test_greedy_draws_no_random_number(device: str, implementation: str) -> None:
    base = torch.zeros(3, 10, device=device)
    generator = seeded(device)
    before = generator.get_state()
    interpolate_sample(base, base, 0.5, temperature=0, generator=generator)
    assert torch.equal(before, generator.get_state())


def test_uniform_numbers_are_uniform() -> None:
    u = uniform(torch.arange(-50_000, 50_000))
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, 100, 0, 1)
    assert ((counts - 1000).square() / 1000).sum() <= 99 + 5 * math.sqrt(198)


def test_nothing_is_differentiable(device: str, implementation: str) -> None:
    base, memory = random_case((3, 50), device)
    tokens, log_probs = interpolate_sample(base.requires_grad_(), memory, 0.5)
    assert not tokens.requires_grad
    assert not log_probs.requires_grad


def test_no_rows(device: str, implementation: str) -> None:
    base = torch.empty(0, 4, 20, device=device)
    tokens, log_probs = interpolate_sample(base, base, 0.5, top_k=3)
    assert tokens.shape == log_probs.shape == (0, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, "temperature must be above 0 and finite, got -1"),
        ({"temperature": math.nan}, ValueError, "temperature must be above 0"),
        ({"temperature": "hot"}, TypeError, "temperature must be an int or a float, got str"),
        (
            {"temperature": torch.zeros(())},
            TypeError,
            "temperature must be an int or a float, got Tensor",
        ),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 2.0}, TypeError, "top_k must be an int, got float"),
        ({"top_p": 0.0}, ValueError, "top_p must be above 0"),
        ({"top_p": 1.5}, ValueError, "top_p must be from 0 to 1, got 1.5"),
        ({"min_p": -0.1}, ValueError, "min_p must be from 0 to 1, got -0.1"),
        ({"generator": 7}, TypeError, "generator must be a torch.Generator, got int"),
        ({"vocab_size": 21}, ValueError, "vocab_size must be from 1 to 20"),
        ({"lmbda": 1.1}, ValueError, "lmbda must be from 0 to 1, got 1.1"),
        ({"memory_temperature": 0.0}, ValueError, "memory_temperature must be above 0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    base = torch.zeros(2, 20)
    lmbda = options.pop("lmbda", 0.5)
    with pytest.raises(error, match=message):
        interpolate_sample(base, base, lmbda, **options)


def test_values_are_checked_where_asked_for(
    device: str, monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    monkeypatch.setattr(environment, "check_values", True)
    base = torch.zeros(2, 20, device=device)
    with pytest.raises(ValueError, match="lmbda must be from 0 to 1"):
        interpolate_sample(base, base, torch.tensor([0.5, 1.5], device=device))


def test_opcheck(device: str, implementation: str) -> None:
    base, memory = random_case((3, 70), device)
    seeds = torch.arange(3, device=device)
    lmbda = torch.tensor([0.2, 0.5, 1.0], device=device)
    op = torch.ops.memdec.interpolate_sample.default
    for weight, filters in ((None, (1.0, 70, 1.0, 0.0)), (lmbda, (0.6, 5, 0.9, 0.1))):
        torch.library.opcheck(op, (base, memory, 0.5, weight, 1.5, 69, seeds, *filters))
    torch.library.opcheck(op, (base, memory, 0.5, None, 1.0, 70, None, 0.0, 70, 1.0, 0.0))
