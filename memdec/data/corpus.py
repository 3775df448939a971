"""The stage ``prepare``: text in, one stream of token ids a split out; and its reader.

A split's stream is ``sep d1 sep d2 sep ... dn sep``, where sep is the document separator. Position
p, from 0 to length - 2, is the place that predicts ``stream[p + 1]``, its label. Every later stage
cuts the positions of a split into blocks with fixed boundaries, and a model sees no further back
than its block's start; with isolated documents, neither than the separator before its document.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from memdec.config import Config, option, require
from memdec.console import Progress, say
from memdec.data.artefact import Artefact, StageWriter, stage
from memdec.data.documents import Documents, collect, is_hidden, read_corpus, read_dataset
from memdec.data.stream_writer import StreamWriter, shard_name
from memdec.errors import MemdecError

KIND = "tokens"
SPLITS = ("train", "validation", "test")
SHARD_TOKENS = 1 << 24
ISOLATE_HELP = "a token attends to its own document only, where several share a block"

Split = Literal["train", "validation", "test"]

_CHARACTERS_A_BATCH = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Config):
    """What ``memdec prepare`` reads and how it splits it."""

    tokenizer: str = option(help="model directory, hub name or .gguf file that has the tokenizer")
    corpus: Path | None = option(
        None, help="a text file, or a directory of .txt, .text, .md, .rst and .jsonl files"
    )
    dataset: str | None = option(
        None, help="instead of a corpus: a data set of the package datasets, or a saved one"
    )
    dataset_subset: str | None = option(
        None, help="the data set's configuration, if it has several"
    )
    text_field: str = option("text", help="the field of a .jsonl line or data set row to read")
    documents: Literal["file", "line", "paragraph"] = option(
        "file", help="what one document is in a text file; splits never cut a document"
    )
    validation_fraction: float = option(0.05, help="share of the text held out to choose settings")
    test_fraction: float = option(0.05, help="share of the text held out to report on")
    drop_repeated_paragraphs: bool = option(
        False,
        help="drop every paragraph that occurred before; exact repeats of a document always go",
    )
    max_tokens: int | None = option(
        None, help="stop after a random choice of documents with this many tokens"
    )
    separator_id: int | None = option(
        None, help="token id between documents; by default the tokenizer's eos, bos or pad token"
    )
    seed: int = option(0, help="seed of the split by document")

    def check(self) -> None:
        if (self.corpus is None) == (self.dataset is None):
            raise MemdecError("give either corpus or dataset")
        for name in ("validation_fraction", "test_fraction"):
            require(0 < getattr(self, name) < 1, name, "between 0 and 1", getattr(self, name))
        held_out = self.validation_fraction + self.test_fraction
        require(held_out < 1, "validation_fraction + test_fraction", "below 1", held_out)
        if self.max_tokens is not None:
            require(self.max_tokens > 0, "max_tokens", "above 0", self.max_tokens)


def prepare(config: PrepareConfig, out: Path) -> Artefact:
    """Tokenises a corpus and splits it by document into train, validation and test.

    Raises:
        MemdecError: no text, something that is not text, too few documents to split, a tokenizer
            without a separator, an `out` in the corpus.
    """
    from memdec.modeling.loading import load_tokenizer, tokenizer_fingerprint

    tokenizer = load_tokenizer(config.tokenizer)
    separator = separator_id(tokenizer, config.separator_id)
    if config.corpus is not None:
        _check_apart(config.corpus, out)
        texts = read_corpus(config.corpus, config.documents, config.text_field)
    else:
        assert config.dataset is not None
        texts = read_dataset(config.dataset, config.dataset_subset, config.text_field)
    documents = collect(texts, config.drop_repeated_paragraphs)
    check_documents(documents, config)
    params = config.to_mapping()
    for name in ("tokenizer", "corpus", "dataset", "dataset_subset"):
        del params[name]  # their content counts, by fingerprint, not where they lie
    params["shard_tokens"] = SHARD_TOKENS
    inputs = {
        "corpus": documents.fingerprint,
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    with stage(out, KIND, params, inputs) as writer:
        if writer.finished:
            say(f"prepare: already done in {out}")
            return Artefact.open(out, KIND)
        return _write(config, writer, tokenizer, separator, documents)


def _check_apart(corpus: Path, out: Path) -> None:
    """Raises :class:`MemdecError` when a rerun would read results as text."""
    inner, outer = out.resolve(), corpus.resolve()
    if inner.is_relative_to(outer) and not is_hidden(inner, outer):
        raise MemdecError(f"{out} lies in the corpus {corpus}; choose a directory outside it")


def check_documents(documents: Documents, config: PrepareConfig) -> None:
    """Raises :class:`MemdecError` when there are too few to split."""
    if len(documents.texts) < len(SPLITS):
        raise MemdecError(
            f"{config.corpus or config.dataset} has {len(documents.texts)} distinct documents that "
            f"are not empty, at least {len(SPLITS)} are needed to split it; "
            "the option documents (line or paragraph) makes more of them"
        )


def _write(
    config: PrepareConfig,
    writer: StageWriter,
    tokenizer: Any,
    separator: int,
    documents: Documents,
) -> Artefact:
    from memdec.modeling.loading import vocabulary_size

    if not writer.has_directory("tokenizer"):
        writer.write_directory("tokenizer", tokenizer.save_pretrained)
    generator = random.Random(config.seed)
    order = list(range(len(documents.texts)))
    generator.shuffle(order)
    if config.max_tokens is not None:
        order = _up_to(config.max_tokens, tokenizer, documents.texts, order)
    members = _split(order, [len(text) for text in documents.texts], config)
    texts = {name: [documents.texts[index] for index in members[name]] for name in SPLITS}
    streams = {name: StreamWriter(writer, name, separator, SHARD_TOKENS) for name in SPLITS}
    done = {name: streams[name].documents_done for name in SPLITS}
    total = sum(len(text) for name in SPLITS for text in texts[name])
    finished = sum(len(text) for name in SPLITS for text in texts[name][: done[name]])
    splits = {}
    with Progress("tokenising", total, "characters", finished) as progress:
        for name, stream in streams.items():
            for text, tokens in tokenise(tokenizer, texts[name][done[name] :]):
                stream.add(tokens)
                progress.advance(len(text))
            splits[name] = {"documents": len(texts[name]), **stream.finish()}
    return writer.finish(
        splits=splits,
        separator_id=separator,
        vocab_size=vocabulary_size(tokenizer),
        dtype="int32",
        counts={**documents.counts, "documents_not_chosen": len(documents.texts) - len(order)},
    )


def separator_id(tokenizer: Any, given: int | None) -> int:
    """The id given, or that of the tokenizer's eos, bos or pad token.

    Raises:
        MemdecError: it has none of them, or no token of the id given.
    """
    from memdec.modeling.loading import vocabulary_size

    if given is not None:
        size = vocabulary_size(tokenizer)
        require(0 <= given < size, "separator_id", f"in [0, {size})", given)
        return given
    for token_id in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        if token_id is not None:
            return int(token_id)
    raise MemdecError("the tokenizer has no eos, bos or pad token: give separator_id")


def tokenise(tokenizer: Any, texts: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Each text with its token ids, int32. Nothing in a text is read as a special token."""
    batch: list[str] = []
    characters = 0
    for number, text in enumerate(texts, start=1):
        batch.append(text)
        characters += len(text)
        if characters >= _CHARACTERS_A_BATCH or number == len(texts):
            ids = tokenizer(
                batch, add_special_tokens=False, split_special_tokens=True, verbose=False
            )["input_ids"]
            for original, tokens in zip(batch, ids, strict=True):
                yield original, np.asarray(tokens, dtype=np.int32)
            batch, characters = [], 0


def _up_to(
    max_tokens: int, tokenizer: Any, texts: Sequence[str], order: Sequence[int]
) -> list[int]:
    """The head of `order` whose documents have `max_tokens` tokens, the last one whole."""
    total = 0
    chosen = 0
    for _, tokens in tokenise(tokenizer, [texts[index] for index in order]):
        if total >= max_tokens and chosen >= len(SPLITS):
            break
        total += len(tokens)
        chosen += 1
    return list(order[:chosen])


def _split(
    order: Sequence[int], lengths: Sequence[int], config: PrepareConfig
) -> dict[str, list[int]]:
    """Documents of each split: train in the order of the corpus, the others in random order.

    So the head of a held-out split is a fair sample of it. Shares are of characters, which are
    known before a token is made. A document longer than a held-out split's whole share stays in
    train, so a giant cannot empty it; and each split gets one of at least three documents.
    """
    total = sum(lengths[index] for index in order)
    rest = list(order)
    members = {}
    held_out = (("test", config.test_fraction, 2), ("validation", config.validation_fraction, 1))
    for name, share, splits_left in held_out:
        wanted = share * total
        chosen: list[int] = []
        size = 0
        for index in rest:
            if size >= wanted or len(chosen) == len(rest) - splits_left:
                break
            if lengths[index] <= wanted:
                chosen.append(index)
                size += lengths[index]
        chosen = chosen or [min(rest, key=lambda index: lengths[index])]
        taken = set(chosen)
        rest = [index for index in rest if index not in taken]
        members[name] = chosen
    members["train"] = sorted(rest)
    return members


def map_array(path: Path, mode: Literal["r", "c"]) -> np.ndarray:
    """An array of a .npy file, memory-mapped, read-only or copy-on-write.

    Raises:
        MemdecError: it is none.
    """
    try:
        return np.load(path, mmap_mode=mode)
    except (ValueError, EOFError) as error:
        raise MemdecError(f"{path} is damaged: it holds no array") from error


def rows_between(shards: Sequence[np.ndarray], start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of arrays that follow one another, as a new array."""
    bounds = np.cumsum([0, *map(len, shards)])
    if not 0 <= start <= stop <= bounds[-1]:
        raise IndexError(f"rows [{start}, {stop}) of {bounds[-1]}")
    first = int(np.searchsorted(bounds, start, side="right")) - 1
    last = int(np.searchsorted(bounds, stop, side="left"))
    parts = [
        shards[shard][max(start - bounds[shard], 0) : stop - bounds[shard]]
        for shard in range(first, last)
    ]
    return np.concatenate([shards[0][:0], *parts])


def block_batches(
    start: int, stop: int, block_size: int, batch_blocks: int
) -> Iterator[tuple[int, int, int]]:
    """Cuts positions [start, stop) into forward passes: (first, last, rows) of each.

    `batch_blocks` whole blocks each, a short last block alone. `start` must begin a block, so that
    the boundaries depend on nothing but the arguments.
    """
    whole = start + (stop - start) // block_size * block_size
    for first in range(start, whole, block_size * batch_blocks):
        last = min(first + block_size * batch_blocks, whole)
        yield first, last, (last - first) // block_size
    if whole < stop:
        yield whole, stop, 1


@dataclass(frozen=True)
class TokenStream:
    """One split's tokens, memory-mapped. ``len(stream)`` counts tokens."""

    shards: tuple[np.ndarray, ...]
    documents: np.ndarray  # int64, where each document's first token lies in the stream
    isolate_documents: bool = False  # whether a model sees a position's own document only
    vocab_size: int = 1 << 31

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    @property
    def positions(self) -> int:
        """Number of places that predict a token: one less than there are tokens."""
        return len(self) - 1

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens from `start` to before `stop`, int32, as a new array.

        Raises:
            MemdecError: an id that is none of the vocabulary, which a model would read out of bounds.
        """
        tokens = rows_between(self.shards, start, stop)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            place = int(np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))[0])
            raise MemdecError(
                f"token {start + place} of a split is {tokens[place]}, expected an id in "
                f"[0, {self.vocab_size}): the tokens are damaged, prepare them anew"
            )
        return tokens

    def inputs(self, start: int, stop: int, rows: int = 1) -> dict[str, np.ndarray]:
        """What a model is fed at positions [start, stop), cut into `rows` blocks of equal length.

        ``input_ids``, and ``position_ids`` of isolated documents; int64 [rows, length].
        """
        inputs = {"input_ids": self.read(start, stop).astype(np.int64).reshape(rows, -1)}
        if self.isolate_documents:
            inputs["position_ids"] = self.position_ids(start, stop, rows)
        return inputs

    def position_ids(self, start: int, stop: int, rows: int = 1) -> np.ndarray:
        """Distances from a position's separator, or its block's start if that is nearer.

        Where they do not rise by one, transformers' attention masks begin another document.

        Args:
            start, stop, rows: as in :meth:`inputs`; int64 [rows, length] comes back.
        """
        positions = np.arange(start, stop).reshape(rows, -1)
        separators = self.documents - 1
        own = separators[np.searchsorted(separators, positions, side="right") - 1]
        return positions - np.maximum(own, positions[:, :1])

    def blocks(self, block_size: int) -> int:
        """Number of blocks of `block_size` positions; the last may be shorter."""
        return -(-self.positions // block_size)

    def block(self, index: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of block `index`, int32, each one entry a position."""
        if not 0 <= index < self.blocks(block_size):
            raise IndexError(f"block {index} of {self.blocks(block_size)}")
        start = index * block_size
        tokens = self.read(start, min(start + block_size, self.positions) + 1)
        return tokens[:-1], tokens[1:]


@dataclass(frozen=True)
class TokenCorpus:
    """What ``prepare`` wrote, opened for reading."""

    artefact: Artefact

    @classmethod
    def open(cls, path: Path | str) -> TokenCorpus:
        return cls(Artefact.open(path, KIND))

    @property
    def fingerprint(self) -> str:
        return self.artefact.fingerprint

    @property
    def separator_id(self) -> int:
        return self.artefact.field(int, "separator_id")

    @property
    def vocab_size(self) -> int:
        """One more than the tokenizer's highest token id."""
        return self.artefact.field(int, "vocab_size")

    def tokenizer(self) -> Any:
        """The tokenizer the corpus was made with; the artefact holds it whole."""
        from memdec.modeling.loading import load_tokenizer

        return load_tokenizer(str(self.artefact.file("tokenizer")))

    def split(self, name: str, *, isolate_documents: bool = False) -> TokenStream:
        if name not in SPLITS:
            raise MemdecError(f"expected a split of {', '.join(SPLITS)}, got {name!r}")
        shards = range(self.artefact.field(int, "splits", name, "shards"))
        files = [self.artefact.file(shard_name(name, shard, ".npy")) for shard in shards]
        starts = [self.artefact.file(shard_name(name, shard, ".documents.npy")) for shard in shards]
        return TokenStream(
            tuple(map_array(path, "r") for path in files),
            np.concatenate([map_array(path, "r") for path in starts]),
            isolate_documents,
            self.vocab_size,
        )
