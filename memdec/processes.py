"""The processes that work on a stage together (``accelerate launch``, ``torchrun``).

All compute; the main one holds the stage's directory. A single process is the same with nobody to
wait for. A launcher that starts them ends the others when one of them fails.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from memdec.data.artefact import StageWriter, joined_stage, stage
from memdec.errors import MemdecError
from memdec.modeling.loading import pick_device

# What the main process does alone, such as training an index, may take hours.
_PATIENCE = timedelta(days=1)


def join_processes(device: str) -> PartialState:
    """The processes of this run: one, unless a launcher started several."""
    processes = PartialState(cpu=pick_device(device).type == "cpu", timeout=_PATIENCE)
    if processes.backend == "gloo":
        _leave_at_exit()
    return processes


@functools.cache
def _leave_at_exit() -> None:
    """gloo's threads outlive a short run's interpreter, and then abort the process; once is enough.

    NCCL is left alone: where one process has failed, leaving would wait for it.
    """
    atexit.register(_leave)


def _leave() -> None:
    gc.collect()  # a trainer that is left in a cycle keeps the group, and so its threads, alive
    PartialState().destroy_process_group()


def own_device(processes: PartialState, device: str) -> str:
    """Where this process computes: the device asked for, or of several processes each its own GPU."""
    return str(pick_device(device) if processes.num_processes == 1 else processes.device)


@contextlib.contextmanager
def shared_stage(
    processes: PartialState,
    path: Path,
    kind: str,
    params: Mapping[str, object],
    inputs: Mapping[str, str],
) -> Iterator[StageWriter]:
    """:func:`stage` of the main process, joined by the others; each gets a writer.

    All writers start from the same records; what one writes, the main one's ``finish`` gathers.

    Raises:
        MemdecError: in all of them, where the main process cannot open the stage.
    """
    with contextlib.ExitStack() as opened:
        refusal = None
        if processes.is_main_process:
            shared = processes.num_processes > 1
            try:
                writer = opened.enter_context(stage(path, kind, params, inputs, shared=shared))
            except MemdecError as error:
                refusal = str(error)
        (refusal,) = broadcast_object_list([refusal])
        if refusal is not None:
            raise MemdecError(refusal)
        if not processes.is_main_process:
            writer = opened.enter_context(joined_stage(path, processes.process_index))
        processes.wait_for_everyone()  # until all have read the records as they are
        yield writer
