"""The machine and the versions that a result of this folder's scripts names."""

from __future__ import annotations

import importlib.util
import platform

import torch

from memdec.info import sections


def machine_info(device: str | None = None) -> dict[str, str]:
    """Device, Python, versions by package, and FAISS with where it works, if it is there.

    `device` is where torch worked, by default on the GPU if there is one.
    """
    on_gpu = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    versions = {**sections()["versions"], "python": platform.python_version()}
    return {"device": name, **versions, **_faiss(on_gpu)}


def file_name(device: str) -> str:
    """The device's name as the names of result files have it."""
    return device.lower().replace(",", "").replace(" ", "-")


def _faiss(on_gpu: bool) -> dict[str, str]:
    if importlib.util.find_spec("faiss") is None:
        return {}
    from memdec.data.faiss_gpu import gpus_of
    from memdec.data.index import load_faiss

    where = "GPU" if on_gpu and gpus_of("cuda") else "CPU"
    return {"faiss": f"{load_faiss().__version__} on the {where}"}
