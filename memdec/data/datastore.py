"""The stage ``datastore``: one key a train position, searchable; and its reader.

A key is the input of the teacher's last feed-forward, as in kNN-LM (arXiv 1911.00172), in float16.
Row id == train position; the value of a row is the token that follows. Keys need not be kept: an
index that compresses them answers without, and what asks for a key has the teacher compute it again.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from memdec.config import Config, option, require
from memdec.console import say
from memdec.data.artefact import Artefact, StageWriter, check_input
from memdec.data.corpus import ISOLATE_HELP, TokenCorpus, TokenStream, map_array
from memdec.data.shards import Shard, cut, write_shards
from memdec.errors import MemdecError

if TYPE_CHECKING:  # torch and transformers are slow to import, and --help needs the config alone
    import torch
    from accelerate import PartialState

    from memdec.data.exact import ExactIndex, Found
    from memdec.data.faiss_index import FaissIndex
    from memdec.data.keys import ComputedKeys, Keys
    from memdec.modeling.loading import Dtype

KIND = "datastore"
NEXT_TOKENS = "next_tokens.npy"
INDEX = "index.faiss"
SHARD_POSITIONS = 1 << 15


@dataclass(frozen=True, kw_only=True)
class DatastoreConfig(Config):
    """What ``memdec datastore`` reads and how it searches."""

    model: str = option(help="the teacher: model directory, hub name or .gguf file")
    tokens: Path = option(help="directory that prepare wrote")
    block_size: int = option(1024, help="tokens a model sees at once")
    isolate_documents: bool = option(False, help=ISOLATE_HELP)
    key_layer: str | None = option(
        None, help="module whose input is the key; by default the last block's feed-forward"
    )
    index: str = option(
        "auto",
        help="Flat (exact), a FAISS factory string, or auto: Flat up to a million keys, else IVF",
    )
    keep_keys: bool = option(
        True,
        help="keep the keys on disk; without, the index must not be Flat, and targets computes the "
        "keys again",
    )
    nprobe: int = option(64, help="inverted lists searched for a query, where the index has lists")
    batch_blocks: int = option(8, help="blocks in one forward pass")
    device: str = option("auto", help="auto, cpu or cuda")
    dtype: Literal["auto", "float32", "bfloat16"] = option("float32", help="of the teacher")
    seed: int = option(0, help="seed of the sample that trains the index")

    def check(self) -> None:
        for name in ("block_size", "nprobe", "batch_blocks"):
            require(getattr(self, name) > 0, name, "above 0", getattr(self, name))


def datastore(config: DatastoreConfig, out: Path) -> Artefact:
    """Runs the teacher over the train tokens and stores keys, next tokens and the index.

    Of several processes (``accelerate launch``) each computes and writes a share of the shards, to
    the bytes that one would write.

    Raises:
        MemdecError: train tokens shorter than a block, another tokenizer, a model without a
            feed-forward that is found, an index that FAISS does not know.
    """
    from memdec.modeling.loading import model_fingerprint
    from memdec.processes import join_processes, shared_stage

    processes = join_processes(config.device)
    corpus = TokenCorpus.open(config.tokens)
    stream = corpus.split("train")
    if stream.positions < config.block_size:
        raise MemdecError(
            f"the train split of {config.tokens} has {stream.positions} positions, shorter than "
            f"one block of {config.block_size}; give more text or a smaller block_size"
        )
    params = config.to_mapping()
    for name in ("model", "tokens", "device"):
        del params[name]
    if config.keep_keys:  # the manifest says so where they are not
        del params["keep_keys"]
    if not config.isolate_documents:  # the manifest says so where they are
        del params["isolate_documents"]
    params["shard_positions"] = SHARD_POSITIONS
    inputs = {"model": model_fingerprint(config.model), "tokens": corpus.fingerprint}
    with shared_stage(processes, out, KIND, params, inputs) as writer:
        if writer.finished:
            say(f"datastore: already done in {out}")
        else:
            _write(config, processes, corpus, stream, writer)
        return Artefact.open(out, KIND)


def _write(
    config: DatastoreConfig,
    processes: PartialState,
    corpus: TokenCorpus,
    stream: TokenStream,
    writer: StageWriter,
) -> None:
    from memdec.data.build_index import build_faiss, write_faiss
    from memdec.data.index import EXACT, choose_index
    from memdec.data.keys import StoredKeys
    from memdec.processes import own_device

    _check_tokenizer(config.model, corpus)
    shards = _shards(stream.positions, config.block_size, SHARD_POSITIONS)
    device = own_device(processes, config.device)
    computed = _computed_keys(replace(config, device=device), corpus, shards)
    keys: Keys = computed
    facts: dict[str, Any] = {"size": keys.size, "width": keys.width, "key_layer": computed.layer}
    index = choose_index(config.index, keys.size, keys.width)
    if index == EXACT and not config.keep_keys:
        raise MemdecError(
            f"index {EXACT} searches the keys themselves: keep them, or give an index that "
            "compresses them, such as IVF256,SQfp16"
        )
    if config.keep_keys:
        write_shards(
            processes, writer, shards, computed.of_shards, _save_keys, "keys of train", "tokens"
        )
        keys = StoredKeys(_open_keys(writer.path, len(shards)))
    del computed  # and with it the model, unless it has to compute the keys again
    work = writer.file("index.parts")
    built = None
    if index != EXACT and not writer.has(INDEX):
        built = build_faiss(processes, work, index, keys, config.seed, device)
    if processes.is_main_process:
        if not writer.has(NEXT_TOKENS):
            next_tokens = stream.read(1, len(stream))
            writer.write(NEXT_TOKENS, lambda file: np.save(file, next_tokens))
        if built is not None:
            writer.write(INDEX, partial(write_faiss, built))
        shutil.rmtree(work, ignore_errors=True)
        kept = len(shards) if config.keep_keys else 0
        writer.finish(dtype="float16", shards=kept, index=index, **facts)
    processes.wait_for_everyone()


def _save_keys(shard: Shard, parts: list[np.ndarray], file: IO[bytes]) -> None:
    np.save(file, np.concatenate(parts))


def _computed_keys(
    config: DatastoreConfig, corpus: TokenCorpus, shards: Sequence[Shard]
) -> ComputedKeys:
    from memdec.data.keys import ComputedKeys
    from memdec.evaluation.forward import check_model
    from memdec.modeling.key_layer import KeyRecorder
    from memdec.modeling.loading import load_model, pick_device

    model = load_model(config.model, device=pick_device(config.device), dtype=config.dtype)
    isolated = config.isolate_documents
    check_model(model, config.block_size, corpus.vocab_size, isolate_documents=isolated)
    recorder = KeyRecorder(model, config.key_layer)
    stream = corpus.split("train", isolate_documents=isolated)
    return ComputedKeys(recorder, stream, shards, config.block_size, config.batch_blocks)


def _check_tokenizer(model: str, corpus: TokenCorpus) -> None:
    from memdec.modeling.loading import compare_tokenizers, has_tokenizer, load_tokenizer

    if has_tokenizer(model):
        compare_tokenizers(corpus.tokenizer(), load_tokenizer(model), ("the tokens", "the teacher"))


def _shards(positions: int, block_size: int, length: int) -> list[Shard]:
    """Whole blocks, at least one, of `length` positions together."""
    return cut(positions, max(length // block_size, 1) * block_size, _shard_name)


def _shard_name(number: int) -> str:
    return f"keys/keys-{number:05d}.npy"


def _open_keys(path: Path, shards: int) -> list[np.ndarray]:
    # Mapped copy-on-write, since torch takes no read-only array; nobody writes.
    return [map_array(path / _shard_name(number), "c") for number in range(shards)]


@dataclass(frozen=True)
class Datastore:
    """What ``datastore`` wrote, opened for searching on `device`."""

    artefact: Artefact
    device: str
    computed: Keys | None = None

    @classmethod
    def open(cls, path: Path | str, device: str = "cpu") -> Datastore:
        return cls(Artefact.open(path, KIND), device)

    @property
    def keeps_keys(self) -> bool:
        return self.artefact.field(bool, "params", "keep_keys", default=True)

    def with_keys_of(self, model: str | None, corpus: TokenCorpus) -> Datastore:
        """The datastore itself if it keeps its keys, else one whose keys the teacher computes.

        Raises:
            MemdecError: no or another teacher, or other tokens than it was made with.
        """
        from memdec.modeling.loading import model_fingerprint

        if self.keeps_keys:
            return self
        if model is None:
            raise MemdecError(f"{self.artefact.path} keeps no keys: give the model that made them")
        check_input(self.artefact, "tokens", corpus.fingerprint)
        check_input(self.artefact, "model", model_fingerprint(model))
        params = self.artefact.manifest["params"]
        names = [field.name for field in fields(DatastoreConfig) if field.name in params]
        config = DatastoreConfig(
            **{name: params[name] for name in names},
            model=model,
            tokens=corpus.artefact.path,
            device=self.device,
        )
        shards = _shards(
            self.size,
            self.block_size,
            self.artefact.field(int, "params", "shard_positions"),
        )
        return replace(self, computed=_computed_keys(config, corpus, shards))

    @property
    def fingerprint(self) -> str:
        return self.artefact.fingerprint

    @property
    def size(self) -> int:
        """Number of keys: one a train position."""
        return self.artefact.field(int, "size")

    @property
    def width(self) -> int:
        return self.artefact.field(int, "width")

    @property
    def block_size(self) -> int:
        return self.artefact.field(int, "params", "block_size")

    @property
    def dtype(self) -> Dtype:
        """What the teacher computed in."""
        found: Any = self.artefact.field(str, "params", "dtype")
        return found

    @property
    def isolate_documents(self) -> bool:
        """Whether a key knows its own document only."""
        return self.artefact.field(bool, "params", "isolate_documents", default=False)

    @property
    def key_layer(self) -> str:
        """Name of the teacher's module whose input is the key."""
        return self.artefact.field(str, "key_layer")

    @cached_property
    def next_tokens(self) -> np.ndarray:
        """The token that follows each position, int32 [size], memory-mapped."""
        return map_array(self.artefact.file(NEXT_TOKENS), "c")  # as _open_keys

    def neighbor_tokens(self, ids: np.ndarray) -> np.ndarray:
        """The next tokens of rows that :meth:`search` found, int32; -1 where the id is."""
        return np.where(ids < 0, np.int32(-1), self.next_tokens[ids])

    def tokens_of(self, ids: torch.Tensor) -> torch.Tensor:
        """As :meth:`neighbor_tokens`, on the datastore's device."""
        import torch

        found = self._tokens_on_device[ids.clamp(min=0)]
        return torch.where(ids < 0, torch.full_like(found, -1), found)

    @cached_property
    def _tokens_on_device(self) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.next_tokens).to(self.device)

    def keys(self, start: int, stop: int) -> np.ndarray:
        """Keys of positions [start, stop), float16, as a new array.

        Raises:
            MemdecError: the datastore keeps none (:meth:`with_keys_of`).
        """
        return self._keys.read(start, stop)

    def search(
        self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest keys of each query.

        Args:
            queries: [n, width], any float dtype.
            k: neighbours a query, at most `size`.
            exclude: int64 [n], the id that each query must not find (itself); -1 is none.

        Returns:
            Squared L2 distances, float32 [n, k], and ids, int64 [n, k], in order of
            (distance, id). A query with fewer than k neighbours has (inf, -1) at its end.

        Raises:
            MemdecError: k is not in [1, size], or queries of another width.
        """
        self._check_search(queries, k)
        return self._index.search(queries, k, exclude)

    def find(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> Found:
        """As :meth:`search`, on the device; an exact search is only begun."""
        self._check_search(queries, k)
        return self._index.find(queries, k, exclude)

    def put(self, distances: np.ndarray, ids: np.ndarray) -> Found:
        """An answer of :meth:`search`, on the device."""
        import torch

        from memdec.data.exact import Found
        from memdec.data.in_flight import to_device

        device = torch.device(self.device)
        return Found(to_device(distances, device), to_device(ids, device), torch.tensor(False))

    def _check_search(self, queries: np.ndarray, k: int) -> None:
        require(1 <= k <= self.size, "k", f"in [1, {self.size}] (the datastore's size)", k)
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise MemdecError(
                f"queries must be [n, {self.width}], the datastore's width, got {queries.shape}"
            )

    @cached_property
    def _keys(self) -> Keys:
        from memdec.data.keys import StoredKeys

        if self.keeps_keys:
            shards = self.artefact.field(int, "shards")
            return StoredKeys(_open_keys(self.artefact.path, shards))
        if self.computed is None:
            raise MemdecError(f"{self.artefact.path} keeps no keys: the teacher is needed for them")
        return self.computed

    @cached_property
    def _index(self) -> ExactIndex | FaissIndex:
        from memdec.data.exact import ExactIndex
        from memdec.data.faiss_index import FaissIndex
        from memdec.data.index import EXACT

        if self.artefact.field(str, "index") == EXACT:
            shards = self.artefact.field(int, "shards")
            return ExactIndex(_open_keys(self.artefact.path, shards), self.device)
        nprobe = self.artefact.field(int, "params", "nprobe")
        return FaissIndex(self.artefact.file(INDEX), nprobe, self.device)
