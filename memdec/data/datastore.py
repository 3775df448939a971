"""The stage ``datastore``: one key a train position, searchable; and its reader.

A key is the input of the teacher's last feed-forward, as in kNN-LM (arXiv 1911.00172), in float16.
Row id == train position; the value of a row is the token that follows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from memdec.config import Config, option, require
from memdec.console import Progress, say
from memdec.data.artefact import Artefact, StageWriter, stage
from memdec.data.corpus import TokenCorpus, TokenStream, block_batches, rows_between
from memdec.errors import MemdecError

if TYPE_CHECKING:  # torch and transformers are slow to import, and --help needs the config alone
    from transformers import PreTrainedModel

    from memdec.data.index import ExactIndex, FaissIndex
    from memdec.modeling.key_layer import KeyRecorder

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
    key_layer: str | None = option(
        None, help="module whose input is the key; by default the last block's feed-forward"
    )
    index: str = option(
        "auto",
        help="Flat (exact), a FAISS factory string, or auto: Flat up to a million keys, else IVF",
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

    Raises:
        MemdecError: train tokens shorter than a block, another tokenizer, a model without a
            feed-forward that is found, an index that FAISS does not know.
    """
    from memdec.modeling.loading import model_fingerprint

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
    params["shard_positions"] = SHARD_POSITIONS
    inputs = {"model": model_fingerprint(config.model), "tokens": corpus.fingerprint}
    with stage(out, KIND, params, inputs) as writer:
        if writer.finished:
            say(f"datastore: already done in {out}")
            return Artefact.open(out, KIND)
        return _write(config, corpus, stream, writer)


def _write(
    config: DatastoreConfig, corpus: TokenCorpus, stream: TokenStream, writer: StageWriter
) -> Artefact:
    from memdec.data.index import EXACT, build_faiss, choose_index, write_faiss
    from memdec.evaluation.forward import check_model
    from memdec.modeling.key_layer import KeyRecorder
    from memdec.modeling.loading import load_model, pick_device

    _check_tokenizer(config.model, corpus)
    model = load_model(config.model, device=pick_device(config.device), dtype=config.dtype)
    check_model(model, config.block_size, corpus.vocab_size)
    recorder = KeyRecorder(model, config.key_layer)
    width = _forward(model, recorder, stream.read(0, 1)[None]).shape[1]
    index = choose_index(config.index, stream.positions, width)
    bounds = list(enumerate(_shard_bounds(stream.positions, config.block_size)))
    left = [(number, edges) for number, edges in bounds if not writer.has(_shard_name(number))]
    done = stream.positions - sum(stop - start for _, (start, stop) in left)
    with Progress("keys of train", stream.positions, "tokens", done) as progress:
        for number, (start, stop) in left:
            keys = np.empty((stop - start, width), np.float16)
            for first, last, rows in block_batches(
                start, stop, config.block_size, config.batch_blocks
            ):
                tokens = stream.read(first, last).reshape(rows, -1)
                keys[first - start : last - start] = _forward(model, recorder, tokens)
                progress.advance(last - first)
            _write_array(writer, _shard_name(number), keys)
    del model
    if not writer.has(NEXT_TOKENS):
        _write_array(writer, NEXT_TOKENS, stream.read(1, len(stream)))
    if index != EXACT and not writer.has(INDEX):
        shards = _open_keys(writer.path, len(bounds))
        built = build_faiss(index, shards, config.seed)
        writer.write(INDEX, lambda file: write_faiss(built, file))
    return writer.finish(
        size=stream.positions,
        width=width,
        dtype="float16",
        shards=len(bounds),
        index=index,
        key_layer=recorder.name,
    )


def _check_tokenizer(model: str, corpus: TokenCorpus) -> None:
    from memdec.modeling.loading import compare_tokenizers, has_tokenizer, load_tokenizer

    if has_tokenizer(model):
        compare_tokenizers(corpus.tokenizer(), load_tokenizer(model), ("the tokens", "the teacher"))


def _forward(model: PreTrainedModel, recorder: KeyRecorder, tokens: np.ndarray) -> np.ndarray:
    """Keys of `tokens` [rows, length], float16 [rows * length, width]."""
    import torch

    # The logits are not needed, and at 150,000 tokens they would be the largest thing in memory.
    accepted = inspect.signature(model.forward).parameters
    options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    input_ids = torch.from_numpy(tokens.astype(np.int64)).to(model.device)
    with recorder, torch.inference_mode():
        model(input_ids=input_ids, use_cache=False, **options)
    keys = recorder.keys.flatten(0, 1).half()
    if not bool(torch.isfinite(keys).all()):
        raise MemdecError(
            f"the input of {recorder.name} does not fit float16; name another layer with key_layer"
        )
    return keys.cpu().numpy()


def _write_array(writer: StageWriter, name: str, array: np.ndarray) -> None:
    writer.write(name, lambda file: np.save(file, array))


def _shard_bounds(positions: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Positions [start, stop) of each shard: whole blocks, at least one."""
    size = max(SHARD_POSITIONS // block_size, 1) * block_size
    for start in range(0, positions, size):
        yield start, min(start + size, positions)


def _shard_name(number: int) -> str:
    return f"keys/keys-{number:05d}.npy"


def _open_keys(path: Path, shards: int) -> list[np.ndarray]:
    # Mapped copy-on-write, since torch takes no read-only array; nobody writes.
    return [np.load(path / _shard_name(number), mmap_mode="c") for number in range(shards)]


@dataclass(frozen=True)
class Datastore:
    """What ``datastore`` wrote, opened for searching on `device`."""

    artefact: Artefact
    device: str

    @classmethod
    def open(cls, path: Path | str, device: str = "cpu") -> Datastore:
        return cls(Artefact.open(path, KIND), device)

    @property
    def fingerprint(self) -> str:
        return self.artefact.fingerprint

    @property
    def size(self) -> int:
        """Number of keys: one a train position."""
        return int(self.artefact.manifest["size"])

    @property
    def width(self) -> int:
        return int(self.artefact.manifest["width"])

    @property
    def block_size(self) -> int:
        return int(self.artefact.manifest["params"]["block_size"])

    @property
    def key_layer(self) -> str:
        """Name of the teacher's module whose input is the key."""
        return str(self.artefact.manifest["key_layer"])

    @cached_property
    def next_tokens(self) -> np.ndarray:
        """The token that follows each position, int32 [size], memory-mapped."""
        return np.load(self.artefact.file(NEXT_TOKENS), mmap_mode="r")

    def neighbor_tokens(self, ids: np.ndarray) -> np.ndarray:
        """The next tokens of rows that :meth:`search` found, int32; -1 where the id is."""
        return np.where(ids < 0, np.int32(-1), self.next_tokens[ids])

    def keys(self, start: int, stop: int) -> np.ndarray:
        """Keys of positions [start, stop), float16, as a new array."""
        return rows_between(self._shards, start, stop)

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
        require(1 <= k <= self.size, "k", f"in [1, {self.size}] (the datastore's size)", k)
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise MemdecError(
                f"queries must be [n, {self.width}], the datastore's width, got {queries.shape}"
            )
        return self._index.search(queries, k, exclude)

    @cached_property
    def _shards(self) -> list[np.ndarray]:
        return _open_keys(self.artefact.path, self.artefact.manifest["shards"])

    @cached_property
    def _index(self) -> ExactIndex | FaissIndex:
        from memdec.data.index import EXACT, ExactIndex, FaissIndex

        if self.artefact.manifest["index"] == EXACT:
            return ExactIndex(self._shards, self.device)
        nprobe = self.artefact.manifest["params"]["nprobe"]
        return FaissIndex(self.artefact.file(INDEX), nprobe)
