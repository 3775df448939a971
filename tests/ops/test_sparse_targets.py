"""SparseTargets: slices, joins, moves and checks."""

import dataclasses

import pytest
import torch
from torch.utils import _pytree

from memdec.ops import SparseTargets


def example(device: str = "cpu") -> SparseTargets:
    """Three rows, the second empty, and two spare slots."""
    return SparseTargets(
        torch.tensor([0, 2, 2, 5], device=device),
        torch.tensor([4, 1, 0, 2, 3, -1, -1], dtype=torch.int32, device=device),
        torch.tensor([0.75, 0.25, 0.5, 0.25, 0.25, 0.0, 0.0], device=device),
        torch.tensor([0.1, 0.0, 0.2], device=device),
    )


DENSE = torch.tensor([[0, 0.25, 0, 0, 0.75], [0, 0, 0, 0, 0], [0.5, 0, 0.25, 0.25, 0]])


def test_length_and_dense(device: str) -> None:
    targets = example(device)
    assert len(targets) == 3
    assert torch.equal(targets.to_dense(5).cpu(), DENSE)
    assert targets.to_dense(7).shape == (3, 7)


@pytest.mark.parametrize(
    "rows", [slice(0, 3), slice(1, 3), slice(2, 3), slice(-1, None), slice(2, 1), slice(5, 9)]
)
def test_slices_share_the_buffers(rows: slice, device: str) -> None:
    targets = example(device)
    part = targets[rows]
    assert len(part) == len(DENSE[rows])
    assert torch.equal(part.to_dense(5).cpu(), DENSE[rows])
    assert part.token_ids is targets.token_ids
    assert part.indptr.untyped_storage().data_ptr() == targets.indptr.untyped_storage().data_ptr()
    assert torch.equal(part.dropped_mass, targets.dropped_mass[rows])


def test_only_slices_of_step_1() -> None:
    with pytest.raises(TypeError, match="slice of rows"):
        example()[1]
    with pytest.raises(ValueError, match="step 1"):
        example()[::2]


def test_compact_trims_both_ends(device: str) -> None:
    part = example(device)[1:].compact()
    assert part.indptr.tolist() == [0, 0, 3]
    assert part.token_ids.tolist() == [0, 2, 3]
    assert part.probs.tolist() == [0.5, 0.25, 0.25]
    assert torch.equal(part.to_dense(5).cpu(), DENSE[1:])


def test_compact_shares_no_buffer() -> None:
    targets = example()
    targets.compact().probs.zero_()
    assert targets.probs[0] == 0.75


def test_cat_keeps_rows_in_order(device: str) -> None:
    targets = example(device)
    joined = SparseTargets.cat([targets[2:], targets, targets[1:1], targets[:1]])
    assert torch.equal(joined.to_dense(5).cpu(), torch.cat([DENSE[2:], DENSE, DENSE[:1]]))
    assert joined.token_ids.shape == (10,)
    assert joined.dropped_mass.tolist() == pytest.approx([0.2, 0.1, 0.0, 0.2, 0.1])


def test_cat_of_parts_with_and_without_dropped_mass() -> None:
    whole = dataclasses.replace(example(), dropped_mass=None)
    assert SparseTargets.cat([whole, whole]).dropped_mass is None
    mixed = SparseTargets.cat([whole, example()])
    assert mixed.dropped_mass.tolist() == pytest.approx([0, 0, 0, 0.1, 0.0, 0.2])
    with pytest.raises(ValueError, match="at least one part"):
        SparseTargets.cat([])


def test_to_moves_every_part(device: str) -> None:
    moved = example().to(device)
    for part in (moved.indptr, moved.token_ids, moved.probs, moved.dropped_mass):
        assert part.device.type == device
    assert dataclasses.replace(example(), dropped_mass=None).to(device).dropped_mass is None


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        example().probs = torch.zeros(7)


def test_pytree_round_trip() -> None:
    leaves, spec = _pytree.tree_flatten({"targets": example()})
    assert [leaf.dtype for leaf in leaves] == [
        torch.int64,
        torch.int32,
        torch.float32,
        torch.float32,
    ]
    back = _pytree.tree_unflatten(leaves, spec)["targets"]
    assert isinstance(back, SparseTargets)
    assert torch.equal(back.to_dense(5), DENSE)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "indptr int64", {"indptr": torch.tensor([0, 2], dtype=torch.int32)}),
        (ValueError, "rows \\+ 1", {"indptr": torch.tensor([], dtype=torch.int64)}),
        (ValueError, "must rise", {"indptr": torch.tensor([2, 0])}),
        (ValueError, "must rise", {"indptr": torch.tensor([-1, 2])}),
        (ValueError, "must rise", {"indptr": torch.tensor([0, 3])}),
        (ValueError, "one shape", {"probs": torch.ones(3)}),
        (ValueError, "got 9", {"token_ids": torch.tensor([9, 1], dtype=torch.int32)}),
        (ValueError, "got -1", {"token_ids": torch.tensor([-1, 1], dtype=torch.int32)}),
        (ValueError, "distinct", {"token_ids": torch.tensor([1, 1], dtype=torch.int32)}),
        (ValueError, "probs must", {"probs": torch.tensor([1.5, 0.0])}),
        (ValueError, "probs must", {"probs": torch.tensor([float("nan"), 0.0])}),
        (ValueError, "one device", {"probs": torch.ones(2, device="meta")}),
    ],
)
def test_validate_names_what_is_wrong(
    error: type[Exception], message: str, changes: dict[str, torch.Tensor]
) -> None:
    good = SparseTargets(
        torch.tensor([0, 2]), torch.tensor([3, 1], dtype=torch.int32), torch.tensor([0.5, 0.5])
    )
    assert good.validate(vocab_size=4) is good
    with pytest.raises(error, match=message):
        dataclasses.replace(good, **changes).validate(vocab_size=4)


def test_dense_refuses_a_token_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="token ids must be from 0 to 3, got 4"):
        example().to_dense(4)
