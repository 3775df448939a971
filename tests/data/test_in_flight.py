"""Results come in order, each when the next has been started, and errors with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_tiny import contents, run_stage, set_small_shards

from memdec.data.datastore import Datastore
from memdec.data.exact import ExactIndex
from memdec.data.in_flight import InFlight, in_order, to_device
from memdec.data.targets import TargetStore
from memdec.errors import MemdecError
from memdec.ops import knn_scatter

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_the_next_is_started_before_a_result_is_taken(count):
    events = []

    def start():
        for number in range(count):
            events.append(f"start {number}")
            yield InFlight([torch.tensor(number)], int)

    for number in in_order(start()):
        events.append(f"take {number}")
    numbers = range(count)
    assert [event for event in events if "start" in event] == [f"start {n}" for n in numbers]
    assert [event for event in events if "take" in event] == [f"take {n}" for n in numbers]
    for number in numbers[:-1]:
        assert events.index(f"start {number + 1}") < events.index(f"take {number}")


def test_an_error_comes_in_place_of_the_result():
    flights = [
        InFlight([torch.zeros(1)], len, {"one": torch.tensor(False), "two": torch.tensor(wrong)})
        for wrong in (False, True)
    ]
    assert flights[0].result() == 1
    with pytest.raises(MemdecError, match="two"):
        flights[1].result()


@needs_cuda
def test_a_search_is_begun_without_waiting_for_the_gpu():
    """From the queries to the rows on the host, up to the moment when they are asked for."""
    keys = np.random.default_rng(0).standard_normal((3000, 24)).astype(np.float16)
    own = np.arange(2000)
    index = ExactIndex([keys], "cuda")
    tokens = torch.arange(3000, dtype=torch.int32, device="cuda")
    expected = index.search(keys[own], 20, own)

    def begin() -> InFlight:
        found = index.find(keys[own], 20, own)
        rows = knn_scatter(found.distances, tokens[found.ids])
        return InFlight([found.distances, found.ids, rows.probs], lambda *parts: parts)

    begin().result()  # what is done once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        flight = begin()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    distances, ids, _ = flight.result()
    np.testing.assert_array_equal(distances.numpy(), expected[0])
    np.testing.assert_array_equal(ids.numpy(), expected[1])


@needs_cuda
def test_arrays_that_go_away_reach_the_gpu_whole():
    for number in range(50):
        moved = to_device(np.full(1 << 20, number), torch.device("cuda"))
        assert bool((moved == number).all())


@needs_cuda
@pytest.mark.parametrize("source", ["knn", "mixture", "teacher"])
def test_a_gpu_writes_the_rows_of_the_cpu_and_the_same_bytes_each_time(
    source, tiny, datastore_dir, tmp_path, monkeypatch
):
    """Shards, passes and searches follow each other quickly; none may get another's numbers."""
    set_small_shards(monkeypatch.setattr)
    common = {"model": str(tiny / "model"), "tokens": tiny / "tokens"}
    for out, device in (("cpu", "cpu"), ("gpu", "cuda"), ("again", "cuda")):
        keys = {**common, "block_size": 32, "batch_blocks": 2, "device": device}
        run_stage("datastore", keys, tmp_path / out / "keys")
        values = {**common, "source": source, "block_size": 32, "device": device}
        if source != "teacher":
            values |= {"datastore": tmp_path / out / "keys", "k": 16, "temperature": 3.0}
        if source == "mixture":
            values["lmbda"] = 0.3
        run_stage("targets", values, tmp_path / out / "targets")
    assert contents(tmp_path / "gpu") == contents(tmp_path / "again")
    own = np.arange(Datastore.open(tmp_path / "cpu" / "keys").size)
    keys = [Datastore.open(tmp_path / out / "keys").keys(0, len(own)) for out in ("cpu", "gpu")]
    np.testing.assert_allclose(*keys, rtol=2**-8, atol=1e-3)
    rows = [
        TargetStore.open(tmp_path / out / "targets").gather(own).targets.to_dense(320)
        for out in ("cpu", "gpu")
    ]
    difference = (rows[0] - rows[1]).abs().sum(1) / 2
    assert difference.median() < 1e-3
    assert (difference < 0.05).float().mean() > 0.98  # a key that rounds otherwise
