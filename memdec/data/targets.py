"""The stage ``targets``: a sparse next-token distribution for every train position; and its reader.

Row i of the targets is the kNN distribution of train position i: what followed its k nearest keys,
itself left out by id, each weighing ``exp(-squared distance / temperature)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memdec.config import Config, option, require
from memdec.console import Progress, say
from memdec.data.artefact import Artefact, StageWriter, stage
from memdec.data.calibration import calibrate
from memdec.data.corpus import TokenCorpus
from memdec.data.datastore import Datastore
from memdec.errors import MemdecError

if TYPE_CHECKING:  # torch is slow to import, and --help needs the config alone
    import torch

    from memdec.ops import SparseTargets

KIND = "targets"
SHARD_ROWS = 1 << 14

_ROWS_A_SEARCH = 1024


@dataclass(frozen=True, kw_only=True)
class TargetsConfig(Config):
    """What ``memdec targets`` reads and which neighbours it counts."""

    datastore: Path = option(help="directory that datastore wrote")
    tokens: Path = option(help="directory that prepare wrote, the one the datastore was made of")
    model: str | None = option(
        None, help="the teacher that made the datastore; needed to choose the temperature"
    )
    k: int = option(1024, help="neighbours of a position")
    temperature: float | None = option(
        None, help="divides the squared distances; by default chosen on the validation split"
    )
    max_entries: int | None = option(
        None, help="keep this many of the most probable tokens of a row; by default all"
    )
    calibration_positions: int = option(4096, help="validation positions to choose temperature on")
    device: str = option("auto", help="auto, cpu or cuda")

    def check(self) -> None:
        for name in ("k", "calibration_positions"):
            require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        for name in ("temperature", "max_entries"):
            value = getattr(self, name)
            require(value is None or value > 0, name, "above 0", value)
        if self.temperature is None and self.model is None:
            raise MemdecError(
                "give the model (the teacher) to choose the temperature with, or a temperature"
            )


def targets(config: TargetsConfig, out: Path) -> Artefact:
    """Searches the datastore for every train position and stores the distributions.

    Raises:
        MemdecError: a datastore of other tokens or of another teacher, k above its size.
    """
    from memdec.modeling.loading import model_fingerprint, pick_device

    corpus = TokenCorpus.open(config.tokens)
    store = Datastore.open(config.datastore, str(pick_device(config.device)))
    made_of = store.artefact.manifest["inputs"]
    _refuse_other("tokens", config.tokens, made_of["tokens"], corpus.fingerprint)
    if config.model is not None:
        found = model_fingerprint(config.model)
        _refuse_other("the teacher", config.model, made_of["model"], found)
    require(config.k <= store.size, "k", f"at most {store.size}, the datastore's size", config.k)
    params = config.to_mapping()
    for name in ("datastore", "tokens", "model", "device"):
        del params[name]
    params["shard_rows"] = SHARD_ROWS
    inputs = {
        "datastore": store.fingerprint,
        "tokens": corpus.fingerprint,
        "model": made_of["model"],  # the teacher, for the stage train to compare with its own
    }
    with stage(out, KIND, params, inputs) as writer:
        if writer.finished:
            say(f"targets: already done in {out}")
            return Artefact.open(out, KIND)
        return _write(config, corpus, store, writer)


def _refuse_other(what: str, name: Path | str, expected: str, found: str) -> None:
    if expected != found:
        raise MemdecError(
            f"the datastore was made with {what} {expected[:12]}, {name} has {found[:12]}"
        )


def _write(
    config: TargetsConfig, corpus: TokenCorpus, store: Datastore, writer: StageWriter
) -> Artefact:
    temperature, calibration = _temperature(config, corpus, store, writer)
    stream = corpus.split("train")
    bounds = [
        (start, min(start + SHARD_ROWS, store.size)) for start in range(0, store.size, SHARD_ROWS)
    ]
    names = [_shard_name(number) for number in range(len(bounds))]
    left = [
        (name, edges) for name, edges in zip(names, bounds, strict=True) if not writer.has(name)
    ]
    done = store.size - sum(stop - start for _, (start, stop) in left)
    with Progress("targets", store.size, "rows", done) as progress:
        for name, (start, stop) in left:
            parts = []
            for first in range(start, stop, _ROWS_A_SEARCH):
                rows = np.arange(first, min(first + _ROWS_A_SEARCH, stop))
                parts.append(_neighbours_to_targets(store, rows, config, temperature))
                progress.advance(len(rows))
            labels = stream.read(start + 1, stop + 1)
            _write_shard(writer, name, parts, np.arange(start, stop), labels)
    shards = [_open_shard(writer.file(name)) for name in names]
    dropped = [shard["dropped_mass"] for shard in shards if "dropped_mass" in shard]
    return writer.finish(
        rows=store.size,
        block_size=store.block_size,
        entries=sum(len(shard["token_ids"]) for shard in shards),
        shards=len(shards),
        dtypes={name: str(array.dtype) for name, array in shards[0].items()},
        temperature=temperature,
        calibration=calibration,
        mean_dropped_mass=float(np.concatenate(dropped).mean(dtype=np.float64)) if dropped else 0.0,
    )


def _temperature(
    config: TargetsConfig, corpus: TokenCorpus, store: Datastore, writer: StageWriter
) -> tuple[float, dict[str, Any] | None]:
    """The temperature, and how it was chosen if it was not given."""
    if config.temperature is not None:
        return config.temperature, None
    calibration = writer.note("calibration")
    if calibration is None:
        assert config.model is not None  # TargetsConfig.check
        calibration = calibrate(config.model, store, corpus, config.k, config.calibration_positions)
        writer.set_note("calibration", calibration)
    return calibration["temperature"], calibration


def _neighbours_to_targets(
    store: Datastore, rows: np.ndarray, config: TargetsConfig, temperature: float
) -> SparseTargets:
    """Targets of consecutive train positions; each row's own key is left out of its search."""
    import torch

    from memdec.ops import knn_scatter

    keys = store.keys(int(rows[0]), int(rows[-1]) + 1)
    distances, ids = store.search(keys, config.k, exclude=rows)
    return knn_scatter(
        torch.from_numpy(distances).to(store.device),
        torch.from_numpy(store.neighbor_tokens(ids)).to(store.device),
        temperature=temperature,
        max_entries=config.max_entries,
    ).to("cpu")


def _write_shard(
    writer: StageWriter,
    name: str,
    parts: list[SparseTargets],
    positions: np.ndarray,
    labels: np.ndarray,
) -> None:
    import torch
    from safetensors.torch import save

    from memdec.ops import SparseTargets

    rows = SparseTargets.cat(parts)
    tensors = {
        "indptr": rows.indptr,
        "token_ids": rows.token_ids,
        "probs": rows.probs,
        "position": torch.from_numpy(positions),
        "label": torch.from_numpy(labels),
    }
    if rows.dropped_mass is not None:
        tensors["dropped_mass"] = rows.dropped_mass
    writer.write(name, lambda file: file.write(save(tensors)))


def _shard_name(number: int) -> str:
    return f"targets/targets-{number:05d}.safetensors"


def _open_shard(path: Path) -> dict[str, np.ndarray]:
    """Every array of a shard, memory-mapped: safetensors maps what it gives to torch."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118


@dataclass(frozen=True)
class TargetRows:
    """Targets of n positions, on the CPU, with the position and the label stored beside each."""

    targets: SparseTargets
    positions: torch.Tensor  # int64 [n]
    labels: torch.Tensor  # int64 [n]


class TargetStore:
    """What ``targets`` wrote, memory-mapped. ``len(store)`` counts rows."""

    def __init__(self, artefact: Artefact) -> None:
        self.artefact = artefact
        self._rows_a_shard = int(artefact.manifest["params"]["shard_rows"])
        self._shards: dict[int, dict[str, np.ndarray]] = {}

    @classmethod
    def open(cls, path: Path | str) -> TargetStore:
        return cls(Artefact.open(path, KIND))

    def __len__(self) -> int:
        return int(self.artefact.manifest["rows"])

    @property
    def fingerprint(self) -> str:
        return self.artefact.fingerprint

    @property
    def block_size(self) -> int:
        """The context that the teacher had, and the memory is trained with."""
        return int(self.artefact.manifest["block_size"])

    @property
    def k(self) -> int:
        return int(self.artefact.manifest["params"]["k"])

    @property
    def temperature(self) -> float:
        """What divided the squared distances, given or chosen."""
        return float(self.artefact.manifest["temperature"])

    def gather(self, positions: np.ndarray) -> TargetRows:
        """Rows of the given train positions, int64 [n], in that order; one copy for each run of them.

        The positions and labels returned are those that were stored with the rows, for the caller
        to compare with the batch they are meant for.

        Raises:
            IndexError: a position outside [0, len(store)).
        """
        import torch

        from memdec.ops import SparseTargets

        if len(positions) and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"positions must be in [0, {len(self)}), got {positions}")
        names = ["token_ids", "probs", "position", "label"]
        if "dropped_mass" in self.artefact.manifest["dtypes"]:
            names.append("dropped_mass")
        # Begun with empty arrays of the right dtypes: there may be no position.
        shard = self._shard(0)
        lengths = [np.empty(0, np.int64)]
        parts = {name: [shard[name][:0]] for name in names}
        for number, rows in self._runs(positions):
            shard = self._shard(number)
            indptr = shard["indptr"][rows.start : rows.stop + 1]
            lengths.append(np.diff(indptr))
            for name in names:
                slots = slice(indptr[0], indptr[-1]) if name in ("token_ids", "probs") else rows
                parts[name].append(shard[name][slots])
        joined = {name: torch.from_numpy(np.concatenate(parts[name])) for name in names}
        targets = SparseTargets(
            torch.from_numpy(np.concatenate([[0], np.cumsum(np.concatenate(lengths))])),
            joined["token_ids"],
            joined["probs"],
            joined.get("dropped_mass"),
        )
        return TargetRows(targets, joined["position"].long(), joined["label"].long())

    def _runs(self, positions: np.ndarray) -> Iterator[tuple[int, slice]]:
        """Shard and rows in it of each run of consecutive positions, in order."""
        numbers, local = np.divmod(positions, self._rows_a_shard)
        ends = np.flatnonzero((np.diff(positions) != 1) | (np.diff(numbers) != 0))
        firsts = [0, *(ends + 1).tolist()] if len(positions) else []
        lasts = [*ends.tolist(), len(positions) - 1]
        for first, last in zip(firsts, lasts, strict=False):
            yield int(numbers[first]), slice(int(local[first]), int(local[last]) + 1)

    def _shard(self, number: int) -> dict[str, np.ndarray]:
        if number not in self._shards:
            self._shards[number] = _open_shard(self.artefact.file(_shard_name(number)))
        return self._shards[number]
