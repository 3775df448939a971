"""The processes that train together (``accelerate launch``, ``torchrun``): one writes, all compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from accelerate import PartialState

from memdec.data.artefact import StageWriter, stage
from memdec.modeling.loading import pick_device


def join_processes(device: str) -> PartialState:
    """The processes of this run: one, unless a launcher started several."""
    return PartialState(cpu=pick_device(device).type == "cpu")


@contextlib.contextmanager
def shared_stage(
    processes: PartialState,
    path: Path,
    kind: str,
    params: Mapping[str, object],
    inputs: Mapping[str, str],
) -> Iterator[StageWriter]:
    """:func:`stage` of the main process; the others get a writer that they may only read.

    The main process's error ends the others through their launcher.
    """
    if processes.is_main_process:
        with stage(path, kind, params, inputs) as writer:
            processes.wait_for_everyone()
            yield writer
    else:
        processes.wait_for_everyone()
        yield StageWriter.watch(path)
