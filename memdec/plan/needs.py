"""Disk, memory and time of each stage of a build, by arithmetic.

Disk is exact for tokens, keys and kept neighbours, an upper bound for targets. Memory is weights, optimizer, indexes
and the largest buffers. Time is floating-point operations over the rate of a matrix product measured
here, times the share of it that such a stage reached where it was measured (docs/design.md): good
to a factor of two or so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from memdec.build import Step
from memdec.data.contexts import first_search
from memdec.errors import MemdecError
from memdec.plan.index_needs import IndexNeed, IndexNeeds
from memdec.plan.machine import Machine

_RESERVE = 1 << 30  # what the process needs before anything is loaded, and torch on a GPU
_CUDA_RESERVE = 1 << 30  # of the host, for a process that uses a GPU
# The share of the matrix product's rate that forward and training reach, by device.
_REACHED = {"cpu": (0.8, 0.75), "cuda": (0.16, 0.12)}
_CHARACTERS_A_SECOND = 2e6  # that a tokenizer reads
# Values a token and unit of width that a forward pass holds: 14.6 in benchmarks/results/*-teacher.json.
_HELD = 15
_BYTES_A_SCORE = 10  # of the teacher: the logit in bfloat16, in float32, and its exponential


@dataclass(frozen=True)
class Corpus:
    """Token counts; estimated from a sample unless the tokens are there."""

    train: int
    held_out: int
    characters: int
    estimated: bool


@dataclass(frozen=True)
class Shape:
    """What counts of a model."""

    parameters: int
    layers: int
    width: int
    vocabulary: int
    context: int  # tokens it can see

    def of_layers(self, layers: int | None, in_layers: int) -> Shape:
        """With only some of its layers, which have `in_layers` of its parameters."""
        if layers is None or layers >= self.layers:
            return self
        less = in_layers * (self.layers - layers) // self.layers
        return replace(self, parameters=self.parameters - less, layers=layers)


@dataclass(frozen=True)
class Need:
    """What a stage needs: bytes it leaves, bytes while it runs, and seconds."""

    stage: str
    disk: int
    memory: int
    gpu_memory: int
    seconds: float
    working_disk: int = 0
    note: str = ""


def estimate(
    steps: dict[str, Step], teacher: str, base: str, corpus: Corpus, machine: Machine
) -> Iterator[Need]:
    """The needs of each step of a build, in order."""
    estimator = _Estimator(steps, teacher, base, corpus, machine)
    for name, step in steps.items():
        yield getattr(estimator, name)(step.config)


class _Estimator:
    def __init__(
        self, steps: dict[str, Step], teacher: str, base: str, corpus: Corpus, machine: Machine
    ) -> None:
        self.corpus = corpus
        self.machine = machine
        self.teacher, in_layers = _shape(teacher)
        self.base, _ = _shape(base)
        self.forward, self.training = _REACHED[machine.device]
        train: Any = steps["train"].config
        targets: Any = steps["targets"].config
        # What the memory begins as, which is read whole before some of its layers are kept.
        self.initial = self.student = self.teacher
        if train.memory_init in ("teacher", "fresh"):
            self.student = self.teacher.of_layers(train.memory_layers, in_layers)
        else:
            self.initial = self.student = _shape(train.memory_init)[0]
        store: Any = steps["datastore"].config if "datastore" in steps else None
        self.store = store
        self.k: int = targets.k
        if targets.drop_same_context:
            self.k = first_search(targets.k)
        self.block_size: int = store.block_size if store else targets.block_size or 1024
        self._check(targets, train)

    def _check(self, targets: Any, train: Any) -> None:
        """What the stages themselves would refuse, some of them after hours."""
        size = self.corpus.train
        if self.store is not None and targets.k > size:
            raise MemdecError(f"targets: k is {targets.k:,}, there are {size:,} train tokens")
        if self.block_size > size:
            raise MemdecError(f"block_size is {self.block_size:,}, there are {size:,} train tokens")
        if self.block_size > self.teacher.context:
            raise MemdecError(
                f"block_size is {self.block_size:,}, the teacher's context {self.teacher.context:,}"
            )
        layers = train.memory_layers
        if layers is not None and train.memory_init == "teacher" and layers > self.teacher.layers:
            raise MemdecError(
                f"train: memory_layers is {layers}, the teacher has {self.teacher.layers}"
            )

    def prepare(self, config: Any) -> Need:
        tokens = self.corpus.train + self.corpus.held_out
        characters = self.corpus.characters
        return Need("prepare", 4 * tokens, 2 * characters, 0, characters / _CHARACTERS_A_SECOND)

    def adapt(self, config: Any, name: str = "adapt") -> Need:
        model = self.teacher if name == "adapt" else self.base
        return self._trained(name, model, config, config.block_size)

    def control(self, config: Any) -> Need:
        return self.adapt(config, "control")

    def train(self, config: Any) -> Need:
        need = self._trained("train", self.student, config, self.block_size)
        if self.student is self.initial:
            return need
        both = 4 * (self.initial.parameters + self.student.parameters)  # before the one is let go
        made = self._need("train", 0, host=both, device=0, seconds=0.0)
        return replace(need, memory=max(need.memory, made.memory))

    def datastore(self, config: Any) -> Need:
        size, width = self.corpus.train, self.teacher.width
        index = self._index()
        if index.exact and not config.keep_keys:
            raise MemdecError(
                f"datastore: {size:,} keys get the index {index.spec}, which needs them kept"
            )
        keys = 2 * size * width if config.keep_keys else 0
        why = "asked for" if config.index != "auto" else f"{size:,} keys, exact up to a million"
        passes = 1 if index.exact or config.keep_keys else 2  # one for the index's sample
        tokens = config.batch_blocks * config.block_size
        model = self._forward_bytes(self.teacher, config.dtype, tokens, logits=0)
        made = index.to_build(beside=model + _RESERVE)
        forward = passes * self._forward_seconds(self.teacher, size, config.dtype)
        return self._need(
            "datastore",
            disk=keys + 4 * size + index.bytes,
            host=made.host,
            device=model + made.device,
            seconds=forward + made.seconds,
            note=f"index {index.spec}: {why}",
        )

    def targets(self, config: Any) -> Need:
        size = self.corpus.train
        entries = {
            "knn": config.k,
            "teacher": config.top_m,
            "mixture": config.k + config.top_m,
            "file": self.teacher.vocabulary,
        }[config.source]
        entries = min(entries, config.max_entries or entries, self.teacher.vocabulary)
        row = 8 * entries + 8 + 8 + 4 + (4 if config.max_entries or config.source != "knn" else 0)
        note = f"at most {entries} entries a row"
        if config.keep == "neighbours":
            row = self._neighbour_row(config)
            note = f"{config.k} neighbours a row"
        seconds, device, search = 0.0, 0, IndexNeed(0.0)
        if config.source in ("teacher", "mixture"):
            tokens = config.batch_blocks * self.block_size
            dtype = self.store.dtype if self.store else config.dtype  # as the keys were made
            seconds += self._forward_seconds(self.teacher, size, dtype)
            device += self._forward_bytes(self.teacher, dtype, tokens, logits=0)
            device += _BYTES_A_SCORE * tokens * self.teacher.vocabulary
        if self.store is not None:
            search = self._search(size, beside=device)
            if not self.store.keep_keys:
                seconds += self._forward_seconds(self.teacher, size, self.store.dtype)
        return self._need(
            "targets",
            size * row,
            search.host,
            device + search.device,
            seconds + search.seconds,
            note="; ".join(filter(None, (note, search.note))),
        )

    def _neighbour_row(self, config: Any) -> int:
        """Tokens, distances and their unit; position and label."""
        from memdec.data.neighbours import token_dtype

        narrow = config.distance_dtype == "float16"
        wide = token_dtype(self.teacher.vocabulary).itemsize + (2 if narrow else 4)
        return wide * config.k + (4 if narrow else 0) + 8 + 4

    def eval(self, config: Any) -> Need:
        # A text outside the domain is read as far as the reported split, about half of these.
        texts = len(config.outside)
        held_out = self.corpus.held_out * (2 + texts) // 2
        note = f"{texts} of its {2 + texts} passes a model are outside the domain" if texts else ""
        models = [self.base, self.student, *[self.teacher] * len(config.others)]
        seconds = sum(self._forward_seconds(model, held_out, config.dtype) for model in models)
        tokens = config.batch_blocks * config.block_size
        device = self._forward_bytes(self.base, config.dtype, tokens, logits=tokens)
        search = IndexNeed(0.0)
        if self.store is not None:
            search = self._search(held_out, beside=device)
            seconds += search.seconds + self._forward_seconds(self.teacher, held_out, config.dtype)
        # A score of each model and of the kNN-LM; two numbers of confidence of base and of memory.
        disk = 4 * held_out * (len(models) + 1 + 4)
        return self._need("eval", disk, search.host, device + search.device, seconds, note=note)

    def _index(self) -> IndexNeeds:
        from memdec.data.index import choose_index

        assert self.store is not None
        size, width = self.corpus.train, self.teacher.width
        spec = choose_index(self.store.index, size, width)
        return IndexNeeds(spec, size, width, self.machine)

    def _search(self, queries: int, beside: int) -> IndexNeed:
        assert self.store is not None
        return self._index().to_search(queries, self.k, self.store.nprobe, beside + _RESERVE)

    def _trained(self, name: str, model: Shape, config: Any, block_size: int) -> Need:
        """Weights, gradients and AdamW's two moments in float32; two checkpoints and the best."""
        dtype = (
            "float32" if config.dtype == "float32" or self.machine.device == "cpu" else "bfloat16"
        )
        tokens = config.batch_blocks * block_size
        activations = tokens * (40 * model.layers * model.width + 12 * model.vocabulary)
        rate = self.training * self.machine.rates[dtype]
        trained = 6 * model.parameters * self.corpus.train * config.epochs / rate
        validated = config.epochs * config.validations * self.corpus.held_out / 2
        return self._need(
            name,
            disk=4 * model.parameters,
            host=4 * model.parameters,
            device=16 * model.parameters + activations,
            seconds=trained + self._forward_seconds(model, round(validated), dtype),
            working_disk=28 * model.parameters,
        )

    def _forward_bytes(self, model: Shape, dtype: str, tokens: int, logits: int) -> int:
        bytes_a_weight = 4 if dtype == "float32" else 2
        return bytes_a_weight * (
            model.parameters + _HELD * tokens * model.width + 2 * logits * model.vocabulary
        )

    def _forward_seconds(self, model: Shape, tokens: int, dtype: str) -> float:
        rate = self.machine.rates["float32" if dtype == "float32" else "bfloat16"]
        return 2 * model.parameters * tokens / (self.forward * rate)

    def _need(
        self,
        stage: str,
        disk: int,
        host: int,
        device: int,
        seconds: float,
        working_disk: int = 0,
        note: str = "",
    ) -> Need:
        """`device` is the GPU's memory, or the host's where there is none."""
        if self.machine.device == "cuda":
            host += _RESERVE + _CUDA_RESERVE
            return Need(stage, disk, host, device + _RESERVE, seconds, working_disk, note)
        return Need(stage, disk, host + device + _RESERVE, 0, seconds, working_disk, note)


def _shape(name: str) -> tuple[Shape, int]:
    """A model's shape, and how many of its parameters are in its layers."""
    from memdec.modeling.key_layer import find_blocks
    from memdec.modeling.loading import load_shape

    model = load_shape(name)
    blocks = model.get_submodule(find_blocks(model))
    config = model.config.get_text_config()
    parameters = sum(weight.numel() for weight in model.parameters())
    in_layers = sum(weight.numel() for weight in blocks.parameters())
    layers = sum(1 for _ in blocks.children())
    context = getattr(config, "max_position_embeddings", None) or sys.maxsize
    return Shape(parameters, layers, config.hidden_size, config.vocab_size, context), in_layers
