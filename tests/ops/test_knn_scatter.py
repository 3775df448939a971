"""knn_scatter against its definition, and every sentence of its docstring."""

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from memdec.environment import environment
from memdec.ops import SparseTargets, knn_scatter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_neighbours(
    rows: int, k: int, vocab: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + k)
    distances = 10 * torch.rand(rows, k, generator=generator)
    tokens = torch.randint(0, vocab, (rows, k), generator=generator)
    return distances.to(device, dtype), tokens.to(device)


def assert_targets(
    ours: SparseTargets,
    distances: Tensor,
    tokens: Tensor,
    temperature: float = 1.0,
    max_entries: int | None = None,
) -> None:
    """Every promise about the result: values, order, indptr, spare slots, dropped mass."""
    truth, dropped = oracle.knn(distances, tokens, temperature, max_entries)
    rows, k = distances.shape
    slots = rows * min(k, max_entries or k)
    assert (ours.indptr.dtype, ours.indptr.shape) == (torch.int64, (rows + 1,))
    assert (ours.token_ids.dtype, ours.token_ids.shape) == (torch.int32, (slots,))
    assert (ours.probs.dtype, ours.probs.shape) == (torch.float32, (slots,))
    indptr, ids, probs = (part.tolist() for part in (ours.indptr, ours.token_ids, ours.probs))
    assert indptr[0] == 0
    for i, wanted in enumerate(truth):
        entries = list(zip(probs, ids, strict=True))[indptr[i] : indptr[i + 1]]
        assert entries == sorted(entries, key=lambda entry: (-entry[0], entry[1])), "order"
        found = {token: p for p, token in entries}
        assert len(found) == len(entries), "a token twice"
        assert all(p > 0 for p in found.values())
        for token in found.keys() | wanted.keys():
            p, q = found.get(token, 0.0), wanted.get(token, 0.0)
            # Float32 rounding, and of entries that just do or do not round to 0.
            assert abs(p - q) <= 1e-5 * q + 2e-38, (i, token)
        if wanted:
            assert math.fsum(found.values()) == pytest.approx(1.0, abs=1e-6)
    assert ids[indptr[-1] :] == [-1] * (slots - indptr[-1])
    assert probs[indptr[-1] :] == [0.0] * (slots - indptr[-1])
    if max_entries is None:
        assert ours.dropped_mass is None
    else:
        assert ours.dropped_mass.dtype == torch.float32
        np.testing.assert_allclose(ours.dropped_mass.cpu(), dropped, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("token_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "k", "vocab"),
    [(5, 16, 1000), (3, 64, 7), (1, 1, 10), (4, 1000, 50257), (3, 37, 1)],
    ids=["few repeats", "many repeats", "k = 1", "k = 1000", "one token"],
)
def test_matches_the_definition(
    rows: int,
    k: int,
    vocab: int,
    dtype: torch.dtype,
    token_dtype: torch.dtype,
    device: str,
    implementation: str,
) -> None:
    distances, tokens = random_neighbours(rows, k, vocab, device, dtype)
    ours = knn_scatter(distances, tokens.to(token_dtype), temperature=0.7)
    assert_targets(ours, distances, tokens, 0.7)


@pytest.mark.parametrize(("extreme", "same"), [(1e-310, 1e-12), (1e-40, 1e-12), (1e308, 1e12)])
def test_temperatures_that_float32_cannot_hold(
    extreme: float, same: float, device: str, implementation: str
) -> None:
    distances, tokens = random_neighbours(7, 20, 300, device)
    assert_targets(knn_scatter(distances, tokens, temperature=extreme), distances, tokens, same)


@pytest.mark.parametrize("k", [255, 256, 257, 511, 1023, 1025, 2048, 4095, 4096])
def test_k_around_powers_of_two(k: int, device: str, implementation: str) -> None:
    distances, tokens = random_neighbours(2, k, 300, device)
    assert_targets(knn_scatter(distances, tokens, temperature=3.0), distances, tokens, 3.0)


@pytest.mark.parametrize("k", [200, 1024, 4096])
def test_probabilities_that_differ_in_their_last_bits_are_in_order(
    k: int, device: str, implementation: str
) -> None:
    """Falling tokens for rising distances, a few units in the last place apart: no order is chance."""
    steps = torch.arange(k, device=device, dtype=torch.float32)
    distances = (1 + steps * 2**-23).expand(2, k).contiguous()
    tokens = torch.stack([k - 1 - steps, steps]).long()
    assert_targets(knn_scatter(distances, tokens), distances, tokens)


@pytest.mark.parametrize("rows", [2048, 2049, 5000])
def test_many_rows(rows: int, device: str, implementation: str) -> None:
    distances, tokens = random_neighbours(rows, 3, 4, device)
    tokens[::3] = -1
    assert_targets(knn_scatter(distances, tokens), distances, tokens)


@pytest.mark.filterwarnings("ignore:knn_scatter has a CUDA kernel:RuntimeWarning")
def test_k_above_4096(device: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA this is a documented fallback, so it is not for MEMDEC_REQUIRE_NATIVE=1."""
    monkeypatch.setattr(environment, "require_native", False)
    distances, tokens = random_neighbours(2, 5000, 3000, device)
    assert_targets(knn_scatter(distances, tokens, max_entries=700), distances, tokens, 1.0, 700)


def test_faiss_minus_one_ids_dropped(device: str, implementation: str) -> None:
    """FAISS pads with id -1 and the largest float when it finds fewer than k."""
    distances, tokens = random_neighbours(4, 8, 20, device)
    tokens[0, 5:] = -1
    distances[0, 5:] = torch.finfo(torch.float32).max
    tokens[1, 0] = -1  # the nearest one: not only at the end
    distances[1, 0] = 0
    tokens[2] = -1
    tokens[3, ::2] = -7
    ours = knn_scatter(distances, tokens)
    assert_targets(ours, distances, tokens)
    assert ours.indptr.diff()[2] == 0


def test_unsorted_neighbours_give_the_same_targets(device: str, implementation: str) -> None:
    """cuVS returns unsorted neighbours for k above 256 (cuvs#317)."""
    distances, tokens = random_neighbours(3, 300, 50, device)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0)).to(device)
    shuffled = knn_scatter(distances[:, order], tokens[:, order])
    assert_targets(shuffled, distances, tokens)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinite_distances_are_no_neighbours(
    dtype: torch.dtype, device: str, implementation: str
) -> None:
    distances, tokens = random_neighbours(4, 6, 20, device, dtype)
    distances[0, 2] = math.nan
    distances[1, 0] = math.inf
    distances[2] = math.inf
    distances[3] = math.nan
    ours = knn_scatter(distances, tokens)
    assert_targets(ours, distances, tokens)
    assert ours.indptr.diff()[2:].tolist() == [0, 0]


def test_far_neighbours_underflow_and_are_dropped(device: str, implementation: str) -> None:
    distances = torch.tensor([[0.0, 50, 200, 1e30], [1e30, 1e30, 3e38, 2e38]], device=device)
    tokens = torch.tensor([[4, 3, 2, 1], [4, 3, 2, 1]], device=device)
    ours = knn_scatter(distances, tokens)
    assert_targets(ours, distances, tokens)
    assert ours.indptr.tolist() == [0, 2, 4]


def test_distances_of_any_size_and_sign(device: str, implementation: str) -> None:
    """Inner products come as negative distances; only differences matter."""
    distances, tokens = random_neighbours(3, 9, 20, device)
    distances[1] -= 1e4
    distances[2] += 1e4
    assert_targets(knn_scatter(distances, tokens), distances, tokens)


def test_equal_distances_tie_by_token_id(device: str, implementation: str) -> None:
    tokens = torch.tensor([[9, 3, 7, 1]], device=device)
    ours = knn_scatter(torch.ones(1, 4, device=device), tokens)
    assert ours.token_ids.tolist() == [1, 3, 7, 9]
    assert ours.probs.tolist() == [0.25] * 4


def test_repeated_tokens_are_one_entry(device: str, implementation: str) -> None:
    tokens = torch.tensor([[5, 5, 2, 5, 2, 5]], device=device)
    ours = knn_scatter(torch.ones(1, 6, device=device), tokens)
    assert ours.indptr.tolist() == [0, 2]
    assert ours.token_ids.tolist() == [5, 2, -1, -1, -1, -1]
    torch.testing.assert_close(ours.probs[:2].cpu(), torch.tensor([2 / 3, 1 / 3]))


@pytest.mark.parametrize("max_entries", [1, 3, 16, 100])
def test_max_entries_keeps_the_most_probable(
    max_entries: int, device: str, implementation: str
) -> None:
    distances, tokens = random_neighbours(5, 16, 12, device)
    tokens[4] = -1
    ours = knn_scatter(distances, tokens, max_entries=max_entries)
    assert_targets(ours, distances, tokens, 1.0, max_entries)
    if max_entries == 3:
        assert (ours.dropped_mass[:4] > 0).all()
    if max_entries == 100:
        assert not ours.dropped_mass.any()


def test_strided_rows(device: str, implementation: str) -> None:
    distances, tokens = random_neighbours(4, 20, 12, device)
    ours = knn_scatter(distances[::2, 1:12], tokens[1:3, 3:14])
    assert_targets(ours, distances[::2, 1:12], tokens[1:3, 3:14])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("max_entries", [None, 2])
def test_nothing_in_nothing_out(
    shape: tuple[int, int], max_entries: int | None, device: str, implementation: str
) -> None:
    distances = torch.zeros(shape, device=device)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    assert_targets(
        knn_scatter(distances, tokens, max_entries=max_entries), distances, tokens, 1.0, max_entries
    )


def test_token_beyond_int32_is_never_taken_for_another(device: str, implementation: str) -> None:
    tokens = torch.tensor([[2**32 + 5, 5]], device=device)
    ours = knn_scatter(torch.ones(1, 2, device=device), tokens)
    assert ours.token_ids.tolist() == [5, 2**31 - 1]


def test_targets_are_constants(device: str, implementation: str) -> None:
    distances, tokens = random_neighbours(2, 4, 9, device)
    assert not knn_scatter(distances.requires_grad_(), tokens).probs.requires_grad


DISTANCES, TOKENS = torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "distances must be float32", (DISTANCES.double(), TOKENS), {}),
        (TypeError, "neighbor_tokens must be int64", (DISTANCES, TOKENS.short()), {}),
        (ValueError, "one shape", (DISTANCES, TOKENS[:2]), {}),
        (ValueError, "one shape", (DISTANCES[0], TOKENS[0]), {}),
        (ValueError, "distances must be contiguous", (DISTANCES.T, TOKENS.T), {}),
        (ValueError, "neighbor_tokens must be on cpu", (DISTANCES, TOKENS.to("meta")), {}),
        (ValueError, "temperature must be above 0", (DISTANCES, TOKENS), {"temperature": 0}),
        (ValueError, "temperature must be above 0", (DISTANCES, TOKENS), {"temperature": math.nan}),
        (ValueError, "max_entries must be at least 1", (DISTANCES, TOKENS), {"max_entries": 0}),
        (TypeError, "max_entries must be an int", (DISTANCES, TOKENS), {"max_entries": 2.0}),
    ],
)
def test_bad_arguments_are_named(
    error: type[Exception], message: str, arguments: tuple, options: dict
) -> None:
    with pytest.raises(error, match=message):
        knn_scatter(*arguments, **options)


def test_meta_tensors_have_shapes() -> None:
    ours = knn_scatter(DISTANCES.to("meta"), TOKENS.to("meta"), max_entries=2)
    assert [part.shape for part in (ours.indptr, ours.token_ids, ours.dropped_mass)] == [
        (4,),
        (6,),
        (3,),
    ]


def test_opcheck(device: str, implementation: str) -> None:
    distances, tokens = random_neighbours(3, 5, 9, device)
    torch.library.opcheck(torch.ops.memdec.knn_scatter, (distances, tokens, 0.5, 4))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool, device: str, implementation: str) -> None:
    def make(distances: Tensor, tokens: Tensor) -> SparseTargets:
        return knn_scatter(2 * distances, tokens, max_entries=4)[1:]

    torch.compiler.reset()
    compiled = torch.compile(make, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 6):
        distances, tokens = random_neighbours(rows, 5, 9, device)
        ours, wanted = compiled(distances, tokens), make(distances, tokens)
        assert isinstance(ours, SparseTargets)
        for name in ("indptr", "token_ids", "probs", "dropped_mass"):
            assert torch.equal(getattr(ours, name), getattr(wanted, name))


def test_repeats_bitwise(device: str, implementation: str) -> None:
    distances, tokens = random_neighbours(20, 500, 40, device)
    first, second = (knn_scatter(distances, tokens, max_entries=30) for _ in range(2))
    for name in ("indptr", "token_ids", "probs", "dropped_mass"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_random_neighbours(device: str, implementation: str, data: st.DataObject) -> None:
    rows, k = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 12))
    vocab = data.draw(st.integers(1, 12))
    temperature = data.draw(st.floats(0.01, 100.0))
    max_entries = data.draw(st.none() | st.integers(1, 14))
    values = st.one_of(st.floats(0, 1000, width=32), st.sampled_from([math.nan, math.inf, 1.0]))
    cell = st.tuples(values, st.integers(-1, vocab - 1))
    cells = data.draw(st.lists(cell, min_size=rows * k, max_size=rows * k))
    distances = torch.tensor([d for d, _ in cells]).reshape(rows, k).to(device)
    tokens = torch.tensor([t for _, t in cells], dtype=torch.int64).reshape(rows, k).to(device)
    ours = knn_scatter(distances, tokens, temperature=temperature, max_entries=max_entries)
    assert_targets(ours, distances, tokens, temperature, max_entries)
