"""The stage ``targets``: a sparse next-token distribution for every train position; and its reader.

Row i of the targets belongs to train position i. What it is the distribution of, the option source
says (:mod:`memdec.data.sources`). Instead of the distributions of neighbours the neighbours
themselves can be kept (:mod:`memdec.data.neighbours`): then training chooses temperature and k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from memdec.config import Config, option, require, require_temperature
from memdec.console import say
from memdec.data.artefact import Artefact, StageWriter, check_option
from memdec.data.calibration import calibrate
from memdec.data.contexts import contexts_of
from memdec.data.corpus import ISOLATE_HELP, TokenCorpus
from memdec.data.datastore import Datastore
from memdec.data.shards import Shard, cut, write_shards
from memdec.errors import MemdecError

if TYPE_CHECKING:  # torch is slow to import, and --help needs the config alone
    import torch
    from accelerate import PartialState

    from memdec.data.neighbours import Neighbours
    from memdec.data.sources import Source
    from memdec.ops import SparseTargets

    Rows = SparseTargets | Neighbours

KIND = "targets"
SHARD_ROWS = 1 << 14


_USED_BY_ALL = ("tokens", "source", "block_size", "isolate_documents", "device")
# The options that each source uses beside those.
_USED = {
    "knn": (
        *("datastore", "model", "k", "temperature", "max_entries", "calibration_positions"),
        "drop_same_context",
        *("keep", "distance_dtype"),
    ),
    "teacher": ("model", "top_m", "batch_blocks", "dtype"),
    "mixture": (
        *("datastore", "model", "k", "temperature", "max_entries", "calibration_positions"),
        *("drop_same_context", "top_m", "lmbda", "batch_blocks"),
    ),
    "file": ("file", "model"),
}
SEARCHED = ("knn", "mixture")  # the sources that need a datastore
_INPUTS = ("datastore", "model", "file")  # their content counts, by fingerprint
_BLOCK_SIZE = 1024


@dataclass(frozen=True, kw_only=True)
class TargetsConfig(Config):
    """What ``memdec targets`` reads and what its rows are the distribution of."""

    tokens: Path = option(help="directory that prepare wrote, the one the datastore was made of")
    source: Literal["knn", "teacher", "mixture", "file"] = option(
        "knn",
        help="knn: what followed the nearest keys; teacher: its own most probable tokens; "
        "mixture: both, as a kNN-LM answers; file: rows of your own",
    )
    datastore: Path | None = option(
        None, help="directory that datastore wrote; for the sources knn and mixture"
    )
    model: str | None = option(
        None,
        help="the teacher; needed unless the source is knn, the keys kept and the temperature given",
    )
    file: Path | None = option(
        None,
        help="for the source file: .safetensors of indptr, token_ids, probs and label, or .arrow "
        "(or a saved data set) of id_cnt, token_id, prob and label, as the authors' code writes",
    )
    keep: Literal["targets", "neighbours"] = option(
        "targets",
        help="of the source knn: distributions at one temperature, or the neighbours, of which "
        "train makes targets at any temperature and any smaller k",
    )
    k: int = option(1024, help="neighbours of a position")
    temperature: float | None = option(
        None, help="divides the squared distances; by default chosen on the validation split"
    )
    lmbda: float | None = option(
        None,
        help="weight of the neighbours in a mixture; by default chosen on the validation split",
    )
    top_m: int = option(64, help="tokens of the teacher's own distribution that are kept")
    max_entries: int | None = option(
        None, help="keep this many of the most probable tokens of a row; by default all"
    )
    drop_same_context: int = option(
        0,
        help="leave out neighbours whose last so many tokens are the position's own: the same text "
        "elsewhere in the corpus (0: keep them)",
    )
    distance_dtype: Literal["float16", "float32"] = option(
        "float16", help="of kept neighbours' distances; float16 counts from a row's nearest"
    )
    calibration_positions: int = option(4096, help="validation positions to choose settings on")
    block_size: int | None = option(
        None, help="tokens the teacher sees at once; by default the datastore's, else 1024"
    )
    isolate_documents: bool = option(False, help=ISOLATE_HELP + "; as in the datastore")
    batch_blocks: int = option(8, help="blocks in one forward pass of the teacher")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "float32", help="of the teacher; for the source mixture the datastore's"
    )
    device: str = option("auto", help="auto, cpu or cuda")

    def check(self) -> None:
        for name in ("k", "calibration_positions", "top_m", "batch_blocks"):
            require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        require(
            self.drop_same_context >= 0, "drop_same_context", "at least 0", self.drop_same_context
        )
        if self.temperature is not None:
            require_temperature(self.temperature)
        for name in ("max_entries", "block_size"):
            value = getattr(self, name)
            require(value is None or value > 0, name, "above 0", value)
        require(self.lmbda is None or 0 <= self.lmbda <= 1, "lmbda", "in [0, 1]", self.lmbda)
        used = (*_USED_BY_ALL, *_USED[self.source])
        for field in fields(self):
            if field.name not in used and getattr(self, field.name) != field.default:
                raise MemdecError(f"{field.name} does not go with source {self.source}")
        if self.keep == "neighbours" and self.max_entries is not None:
            raise MemdecError("max_entries does not go with kept neighbours: give it to train")
        if self.keep == "targets" and self.distance_dtype != "float16":
            raise MemdecError("distance_dtype goes with kept neighbours only")
        for name in _INPUTS:
            optional = name == "model" and self.source == "knn"
            if name in used and not optional and getattr(self, name) is None:
                raise MemdecError(f"source {self.source} needs {name}")
        if self.temperature is None and self.source == "knn" and self.model is None:
            raise MemdecError(
                "give the model (the teacher) to choose the temperature with, or a temperature"
            )


def targets(config: TargetsConfig, out: Path) -> Artefact:
    """Stores a distribution, or the neighbours, for every train position.

    Of several processes (``accelerate launch``) each makes and writes a share of the shards, to the
    bytes that one would write.

    Raises:
        MemdecError: a datastore of other tokens, of another teacher, of other blocks or with documents
            isolated otherwise, k above its size, a file of other tokens.
    """
    from memdec.data.file_sources import content_fingerprint
    from memdec.modeling.loading import model_fingerprint
    from memdec.processes import join_processes, own_device, shared_stage

    processes = join_processes(config.device)
    config = replace(config, device=own_device(processes, config.device))
    corpus = TokenCorpus.open(config.tokens)
    store = None
    inputs = {"tokens": corpus.fingerprint}
    block_size = config.block_size or _BLOCK_SIZE
    if config.datastore is not None:
        store = Datastore.open(config.datastore, config.device)
        made_of = store.artefact.manifest["inputs"]
        _refuse_other("tokens", config.tokens, made_of["tokens"], corpus.fingerprint)
        if config.model is not None:
            found = model_fingerprint(config.model)
            _refuse_other("the teacher", config.model, made_of["model"], found)
        require(
            config.k <= store.size, "k", f"at most {store.size}, the datastore's size", config.k
        )
        expected = f"{store.block_size}, the datastore's"
        require(config.block_size in (None, store.block_size), "block_size", expected, block_size)
        block_size = store.block_size
        check_option(store.artefact, "isolate_documents", config.isolate_documents, False)
        length = config.drop_same_context
        expected = f"at most {block_size}, what a key has seen"
        require(length <= block_size, "drop_same_context", expected, length)
        inputs |= {"datastore": store.fingerprint, "model": made_of["model"]}
    else:
        assert config.model is not None  # TargetsConfig.check
        inputs["model"] = model_fingerprint(config.model)
    if config.file is not None:
        inputs["file"] = content_fingerprint(config.file)
    # The model is the teacher, for the stage train to compare with its own.
    with shared_stage(processes, out, KIND, _params(config, block_size), inputs) as writer:
        if writer.finished:
            say(f"targets: already done in {out}")
        else:
            _write(config, processes, corpus, store, block_size, writer)
        return Artefact.open(out, KIND)


def _params(config: TargetsConfig, block_size: int) -> dict[str, Any]:
    values = config.to_mapping()
    unsaid = {"targets": ("keep", "distance_dtype"), "neighbours": ("max_entries",)}[config.keep]
    used = [name for name in _USED[config.source] if name not in (*_INPUTS, *unsaid)]
    params = {name: values[name] for name in used}
    if not config.drop_same_context:  # the manifest says so where they are dropped
        params.pop("drop_same_context", None)
    if config.isolate_documents:
        params["isolate_documents"] = True
    params["shard_rows"] = SHARD_ROWS
    if config.source != "knn":
        params |= {"source": config.source, "block_size": block_size}
    if "batch_blocks" in params:  # no forward pass is cut by a shard
        params["shard_rows"] = max(SHARD_ROWS // block_size, 1) * block_size
    return params


def _refuse_other(what: str, name: Path | str, expected: str, found: str) -> None:
    if expected != found:
        raise MemdecError(
            f"the datastore was made with {what} {expected[:12]}, {name} has {found[:12]}"
        )


def _write(
    config: TargetsConfig,
    processes: PartialState,
    corpus: TokenCorpus,
    store: Datastore | None,
    block_size: int,
    writer: StageWriter,
) -> None:
    chosen = _choose(config, processes, corpus, store, writer)
    stream = corpus.split("train")
    shards = cut(stream.positions, _params(config, block_size)["shard_rows"], _shard_name)
    source = _source(config, corpus, store, block_size, chosen)

    def rows(shards: Sequence[Shard]) -> Iterator[Rows]:
        for shard in shards:
            yield from source.rows(shard.start, shard.stop)

    def save(shard: Shard, parts: list[Rows], file: IO[bytes]) -> None:
        positions = np.arange(shard.start, shard.stop)
        _save_shard(parts, positions, stream.read(shard.start + 1, shard.stop + 1), file)

    write_shards(processes, writer, shards, rows, save, config.keep, "rows")
    if processes.is_main_process:
        if config.source != "mixture":
            del chosen["lmbda"]
        _finish(writer, shards, block_size, chosen)
    processes.wait_for_everyone()


def _finish(
    writer: StageWriter, shards: Sequence[Shard], block_size: int, chosen: dict[str, Any]
) -> None:
    opened = [_open_shard(writer.file(shard.name)) for shard in shards]
    facts: dict[str, Any] = {}
    if "token_ids" in opened[0]:  # distributions
        dropped = [arrays["dropped_mass"] for arrays in opened if "dropped_mass" in arrays]
        mean = np.concatenate(dropped).mean(dtype=np.float64) if dropped else 0.0
        facts["mean_dropped_mass"] = float(mean)
        facts["entries"] = sum(len(arrays["token_ids"]) for arrays in opened)
    writer.finish(
        rows=sum(map(len, shards)),
        block_size=block_size,
        shards=len(shards),
        dtypes={name: str(array.dtype) for name, array in opened[0].items()},
        **chosen,
        **facts,
    )


def _choose(
    config: TargetsConfig,
    processes: PartialState,
    corpus: TokenCorpus,
    store: Datastore | None,
    writer: StageWriter,
) -> dict[str, Any]:
    """Temperature and lmbda, given or chosen on validation, and how they were chosen, if so."""
    from accelerate.utils import broadcast_object_list

    chosen = {"temperature": config.temperature, "lmbda": config.lmbda, "calibration": None}
    wanted = {"knn": ("temperature",), "mixture": ("temperature", "lmbda")}
    open_ones = [name for name in wanted.get(config.source, ()) if chosen[name] is None]
    if not open_ones:
        return chosen
    calibration = writer.note("calibration")
    if calibration is None and processes.is_main_process:
        assert config.model is not None  # TargetsConfig.check
        assert store is not None
        calibration = calibrate(
            config.model,
            store,
            corpus,
            config.k,
            config.calibration_positions,
            temperature=config.temperature,
            lmbda=config.lmbda,
            contexts=contexts_of(config.drop_same_context, corpus),
        )
        writer.set_note("calibration", calibration)
    (calibration,) = broadcast_object_list([calibration])
    return {**chosen, "calibration": calibration} | {name: calibration[name] for name in open_ones}


def _source(
    config: TargetsConfig,
    corpus: TokenCorpus,
    store: Datastore | None,
    block_size: int,
    chosen: dict[str, Any],
) -> Source:
    from memdec.data.file_sources import open_file
    from memdec.data.sources import (
        KnnSource,
        MixtureSource,
        NeighbourSource,
        TeacherSource,
    )
    from memdec.modeling.loading import load_model, pick_device

    if config.source == "file":
        assert config.file is not None  # TargetsConfig.check
        return open_file(config.file, corpus)
    knn = None
    if store is not None:
        store = store.with_keys_of(config.model, corpus)
        contexts = contexts_of(config.drop_same_context, corpus)
        knn = KnnSource(store, config.k, chosen["temperature"], config.max_entries, contexts)
    if config.source == "knn":
        assert knn is not None
        if config.keep == "neighbours":
            return NeighbourSource(knn, corpus.vocab_size, config.distance_dtype)
        return knn
    assert config.model is not None
    dtype = config.dtype if store is None else store.dtype
    teacher = TeacherSource(
        load_model(config.model, device=pick_device(config.device), dtype=dtype),
        corpus.split("train", isolate_documents=config.isolate_documents),
        corpus.vocab_size,
        config.top_m,
        block_size,
        config.batch_blocks,
    )
    return teacher if knn is None else MixtureSource(teacher, knn, chosen["lmbda"])


def _save_shard(
    parts: list[Rows], positions: np.ndarray, labels: np.ndarray, file: IO[bytes]
) -> None:
    import torch
    from safetensors.torch import save

    cat: Any = type(parts[0]).cat  # one source, one type
    tensors = {name: tensor for name, tensor in vars(cat(parts)).items() if tensor is not None}
    tensors |= {"position": torch.from_numpy(positions), "label": torch.from_numpy(labels)}
    file.write(save(tensors))


def _shard_name(number: int) -> str:
    return f"targets/targets-{number:05d}.safetensors"


def _open_shard(path: Path) -> dict[str, np.ndarray]:
    """Every array of a shard, memory-mapped: safetensors maps what it gives to torch."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise MemdecError(f"{path} is damaged: {error}") from error


@dataclass(frozen=True)
class TargetRows:
    """Targets of n positions, on the CPU, with the position and the label stored beside each."""

    targets: SparseTargets
    positions: torch.Tensor  # int64 [n]
    labels: torch.Tensor  # int64 [n]


@dataclass(frozen=True)
class NeighbourRows:
    """Neighbours of n positions, and the position and the label stored beside each."""

    neighbours: Neighbours
    positions: torch.Tensor  # int64 [n]
    labels: torch.Tensor  # int64 [n]


class TargetStore:
    """What ``targets`` wrote, memory-mapped. ``len(store)`` counts rows."""

    def __init__(self, artefact: Artefact) -> None:
        self.artefact = artefact
        self._rows_a_shard = artefact.field(int, "params", "shard_rows")
        self._shards: dict[int, dict[str, np.ndarray]] = {}

    @classmethod
    def open(cls, path: Path | str) -> TargetStore:
        return cls(Artefact.open(path, KIND))

    def __len__(self) -> int:
        return self.artefact.field(int, "rows")

    @property
    def fingerprint(self) -> str:
        return self.artefact.fingerprint

    @property
    def block_size(self) -> int:
        """The context that the teacher had, and the memory is trained with."""
        return self.artefact.field(int, "block_size")

    @property
    def source(self) -> str:
        """What the distributions are of, as in :class:`TargetsConfig`."""
        return self.artefact.field(str, "params", "source", default="knn")

    @property
    def keeps_neighbours(self) -> bool:
        """Whether temperature and k are open; :meth:`gather` takes those of the stage."""
        return self.artefact.manifest["params"].get("keep") == "neighbours"

    @property
    def k(self) -> int:
        return self.artefact.field(int, "params", "k")

    @property
    def drop_same_context(self) -> int:
        """Tokens in which a neighbour's context had to differ; 0 where none was left out."""
        return self.artefact.field(int, "params", "drop_same_context", default=0)

    @property
    def temperature(self) -> float:
        """What divided the squared distances, given or chosen."""
        return self.artefact.field(float, "temperature")

    def gather(self, positions: np.ndarray, *, pin_memory: bool = False) -> TargetRows:
        """Rows of the given train positions, int64 [n], in that order; one copy for each run of them.

        The positions and labels returned are those that were stored with the rows, for the caller
        to compare with the batch they are meant for.

        Args:
            pin_memory: entries are copied straight into pinned memory, which torch keeps and gives out
                again; new memory for megabytes of them a batch is thousands of page faults.

        Raises:
            IndexError: a position outside [0, len(store)).
        """
        import torch

        from memdec.ops import SparseTargets

        if self.keeps_neighbours:
            found = self.gather_neighbours(positions)
            targets = found.neighbours.to_targets(self.temperature).compact()
            return TargetRows(targets, found.positions, found.labels)
        # Begun with empty arrays of the right dtypes: there may be no position.
        parts = [{name: array[:0] for name, array in self.shard(0).items() if name != "indptr"}]
        lengths = [np.empty(0, np.int64)]
        for number, rows in self._runs(positions):
            shard = self.shard(number)
            indptr = shard["indptr"][rows.start : rows.stop + 1]
            lengths.append(np.diff(indptr))
            entries = slice(indptr[0], indptr[-1])
            places = {
                name: entries if name in ("token_ids", "probs") else rows for name in parts[0]
            }
            parts.append({name: shard[name][place] for name, place in places.items()})
        joined = {}
        for name in parts[0]:
            arrays = [part[name] for part in parts]
            dtype = torch.from_numpy(np.empty(0, arrays[0].dtype)).dtype
            joined[name] = torch.empty(sum(map(len, arrays)), dtype=dtype, pin_memory=pin_memory)
            np.concatenate(arrays, out=joined[name].numpy())
        targets = SparseTargets(
            torch.from_numpy(np.concatenate([[0], np.cumsum(np.concatenate(lengths))])),
            joined["token_ids"],
            joined["probs"],
            joined.get("dropped_mass"),
        )
        return TargetRows(targets, joined["position"].long(), joined["label"].long())

    def gather_neighbours(self, positions: np.ndarray, k: int | None = None) -> NeighbourRows:
        """As :meth:`gather`, the kept neighbours: of each row the `k` nearest, or all.

        Raises:
            IndexError: a position outside [0, len(store)).
        """
        import torch

        from memdec.data.neighbours import Neighbours

        shard = self.shard(0)
        parts = {name: [array[:0]] for name, array in shard.items()}
        for number, rows in self._runs(positions):
            for name, array in self.shard(number).items():
                parts[name].append(array[rows])
        for name in ("distances", "tokens"):
            parts[name] = [part[:, :k] for part in parts[name]]
        joined = {name: torch.from_numpy(np.concatenate(arrays)) for name, arrays in parts.items()}
        neighbours = Neighbours(joined["distances"], joined["tokens"], joined.get("units"))
        return NeighbourRows(neighbours, joined["position"].long(), joined["label"].long())

    def _runs(self, positions: np.ndarray) -> Iterator[tuple[int, slice]]:
        """Shard and rows in it of each run of consecutive positions, in order."""
        if len(positions) and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"positions must be in [0, {len(self)}), got {positions}")
        numbers, local = np.divmod(positions, self._rows_a_shard)
        ends = np.flatnonzero((np.diff(positions) != 1) | (np.diff(numbers) != 0))
        firsts = [0, *(ends + 1).tolist()] if len(positions) else []
        lasts = [*ends.tolist(), len(positions) - 1]
        for first, last in zip(firsts, lasts, strict=False):
            yield int(numbers[first]), slice(int(local[first]), int(local[last]) + 1)

    def shard(self, number: int) -> dict[str, np.ndarray]:
        """The arrays of one shard, memory-mapped, by name."""
        if number not in self._shards:
            self._shards[number] = _open_shard(self.artefact.file(_shard_name(number)))
        return self._shards[number]
