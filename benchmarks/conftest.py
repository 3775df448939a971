"""What every benchmark here shares: device, contenders, one way to time, what is recorded.

    pytest benchmarks/ --benchmark-only                      # CUDA if there is one, else the CPU
    pytest benchmarks/ --benchmark-only --benchmark-json=now.json
    python benchmarks/table.py now.json

Every contender of a shape is timed in one run, over buffers that the last-level cache has
forgotten, and only after its result was compared with the reference.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sources import kernel_sources_sha256

import memdec
from memdec import _native


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("memdec")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption(
        "--compiled", action="store_true", help="time torch.compile on the CPU too (slow to start)"
    )


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    return pytestconfig.getoption("--device")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`contender` runs over eager, compiled, the module's RIVALS and memdec; `shape` over its SHAPES."""
    device = metafunc.config.getoption("--device")
    if "contender" in metafunc.fixturenames:
        compiled = device == "cuda" or metafunc.config.getoption("--compiled")
        rivals = getattr(metafunc.module, "RIVALS", [])
        names = ["eager", *(["compiled"] if compiled else []), *rivals, "memdec"]
        metafunc.parametrize("contender", names)
    if "shape" in metafunc.fixturenames:
        shapes = metafunc.module.SHAPES[device]
        metafunc.parametrize("shape", shapes, ids=["x".join(map(str, s)) for s in shapes])


def _flush_caches(device: str) -> Callable[[], None]:
    """Overwrites more memory than the last-level cache holds."""
    size = 256 * 2**20 if device == "cuda" else 64 * 2**20
    scratch = torch.empty(size, dtype=torch.uint8, device=device)

    def flush() -> None:
        scratch.zero_()

    return flush


@pytest.fixture(scope="session")
def copy_bandwidth(device: str) -> float:
    """Bytes a second of a large copy on the device, read and written bytes counted."""
    source = torch.ones(2**30 if device == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(20):
        seconds.append(_seconds(lambda: target.copy_(source), device))
    return 2 * source.numel() / statistics.median(seconds)


@pytest.fixture(scope="session")
def read_bandwidth(device: str) -> float:
    """Bytes a second of a large read: the sum of a vector of float32."""
    source = torch.ones(2**28 if device == "cuda" else 2**26, device=device)
    seconds = [_seconds(source.sum, device) for _ in range(20)]
    return source.nbytes / statistics.median(seconds)


def _seconds(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # a millisecond, in which the host runs ahead
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _seconds_in_graph(another: Callable[[], Callable[[], Any]], floor_bytes: int) -> float:
    """Median time of a call inside of a CUDA graph of calls over rotating buffers."""
    count = max(
        2, min(200, 3 * torch.cuda.get_device_properties().L2_cache_size // floor_bytes + 1)
    )
    calls = [another() for _ in range(count)]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    seconds = [_seconds(graph.replay, "cuda") / count for _ in range(11)]
    del kept
    return statistics.median(seconds)


class Contest:
    """Times one contender of one shape and records what the table needs."""

    def __init__(self, benchmark: Any, device: str, copy_bandwidth: float) -> None:
        self.benchmark = benchmark
        self.device = device
        self.copy_bandwidth = copy_bandwidth

    def run(
        self,
        op: str,
        case: str,
        contender: str,
        run: Callable[[], Any],
        check: Callable[[Any], None],
        floor_bytes: int,
        another: Callable[[], Callable[[], Any]] | None = None,
        goal: dict[str, float] | None = None,
        bandwidth: float | None = None,
    ) -> None:
        """Checks `run`'s result, then times it.

        Args:
            op, case, contender: the row and column of the table.
            run: one call, gradients included where they belong to the case.
            check: raises when the result is wrong.
            floor_bytes: bytes that must move: each input read once, each output written once.
            another: makes `run` over new buffers. Given for calls so short that CUDA events would
                time their launch: on CUDA the time is then that of a graph of many such calls,
                over more memory than the cache holds, divided by their number.
            goal: what memdec shall reach on this device, as table.py reads it: "share" of the floor,
                "seconds", "times_eager", "times_dense", and so on.
            bandwidth: what the floor's bytes move at; by default that of a copy.
        """
        check(run())
        flush = _flush_caches(self.device)
        extra = self.benchmark.extra_info
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            extra["peak_extra_bytes"] = torch.cuda.max_memory_allocated() - before
            if another is None:
                device_seconds = []
                for _ in range(30):
                    flush()
                    device_seconds.append(_seconds(run, self.device))
                extra["device_seconds"] = statistics.median(device_seconds)
            else:
                extra["device_seconds"] = _seconds_in_graph(another, floor_bytes)
        extra.update(op=op, case=case, contender=contender, floor_bytes=floor_bytes)
        if contender.startswith("memdec") and goal:
            extra["goal"] = goal
        extra["bandwidth"] = bandwidth or self.copy_bandwidth

        def once() -> None:
            run()
            if self.device == "cuda":
                torch.cuda.synchronize()

        rounds = 20 if self.device == "cuda" else 7
        self.benchmark.pedantic(once, setup=flush, rounds=rounds, warmup_rounds=1)


@pytest.fixture
def contest(benchmark: Any, device: str, copy_bandwidth: float) -> Contest:
    torch.manual_seed(0)
    torch.compiler.reset()  # else many shapes reach the recompile limit, and run eagerly
    return Contest(benchmark, device, copy_bandwidth)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Device and versions instead of names of the machine."""
    on_cuda = config.getoption("--device") == "cuda"
    cpu = machine_info.get("cpu", {})
    name = torch.cuda.get_device_name() if on_cuda else cpu.get("brand_raw", platform.machine())
    machine_info.clear()
    machine_info.update(
        device=name,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        memdec=memdec.__version__,
        kernel_sources=kernel_sources_sha256("cuda" if on_cuda else "cpu"),
    )
    if not on_cuda and _native.kernels_for("cpu") is not None:
        machine_info["simd"] = _native._C.simd_level()


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list, output_json: dict
) -> None:
    """Medians are kept, single rounds and commit data are not: the file is committed."""
    output_json.pop("commit_info", None)
    for bench in output_json["benchmarks"]:
        bench["stats"].pop("data", None)
