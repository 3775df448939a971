"""``memdec inspect``: what base, memory and the two together make of each token of a text."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memdec.config import option, require
from memdec.errors import MemdecError
from memdec.pair import ADAPTIVE, PairConfig, load_pair, open_evaluation

if TYPE_CHECKING:  # torch and transformers are slow to import, and --help needs the config alone
    from transformers import PreTrainedModel

    from memdec import MemoryDecoderForCausalLM
    from memdec.data.corpus import TokenStream
    from memdec.data.datastore import Datastore
    from memdec.data.targets import TargetStore
    from memdec.evaluation.inspection import Inspection

_LONGEST_BLOCK = 1024


@dataclass(frozen=True, kw_only=True)
class InspectConfig(PairConfig):
    """What to look at, with which models, and where to write it."""

    text: str | None = option(None, help="the text; without text and file, standard input is read")
    file: Path | None = option(None, help="read the text from this file")
    datastore: Path | None = option(None, help="directory of the stage datastore, for the kNN-LM")
    targets: Path | None = option(None, help="directory of the stage targets: k and temperature")
    teacher: str | None = option(None, help="model whose keys the datastore holds (default: base)")
    top: int | None = option(None, help="list only so many of the largest gains and of the losses")
    html: Path | None = option(None, help="also write a page with the coloured text")
    json: Path | None = option(None, help="also write every number")
    block_size: int | None = option(
        None, help="tokens a model sees at once (default: what the models can, at most 1024)"
    )
    stride: int | None = option(
        None, help="tokens from a block's start to the next one's (default: half a block)"
    )
    separator_id: int | None = option(
        None, help="token id before the text; by default the tokenizer's eos, bos or pad token"
    )

    def check(self) -> None:
        super().check()
        if self.text is not None and self.file is not None:
            raise MemdecError("give either text or file")
        for name in ("top", "block_size", "stride"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "at least 1", value)
        if (self.datastore is None) != (self.targets is None):
            raise MemdecError("the kNN-LM needs both datastore and targets, one of them was given")
        if self.teacher is not None and self.datastore is None:
            raise MemdecError("teacher goes with datastore")
        for name in ("html", "json"):
            path = getattr(self, name)
            # Scoring takes a while: it should not be lost.
            writable = path is None or (path.parent.is_dir() and not path.is_dir())
            require(writable, name, "a file in a directory that exists", str(path))


def inspect(config: InspectConfig) -> Inspection:
    """Prints a table of the text's tokens to standard output; writes the page and the numbers.

    A text longer than a block is read in blocks that overlap: each token is predicted in the first
    block that reaches it, so all but the first block's have ``block_size - stride`` tokens before
    them at least. The separator stands before the text, as before a document in training.

    Raises:
        MemdecError: as :func:`memdec.pair.load_pair`; a text without tokens; a block longer than a
            model's context; a datastore of another teacher, or targets of another datastore.
    """
    from memdec.data.corpus import separator_id
    from memdec.evaluation.inspection import Inspection
    from memdec.evaluation.passage import pieces
    from memdec.report.inspection import print_inspection, write_inspection

    text = _text(config)
    joint = load_pair(config)
    tokenizer: Any = joint.tokenizer
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    ids = ids["input_ids"]
    if not ids:
        raise MemdecError("the text has no tokens")
    tokens = np.array([separator_id(tokenizer, config.separator_id), *ids], np.int32)
    log_probs, lmbda = _score(config, joint, tokens)
    adaptive = config.lmbda == ADAPTIVE
    inspection = Inspection(pieces(tokenizer, ids), ids, log_probs, lmbda, adaptive)
    if config.html is not None:
        write_inspection(inspection, config.html, config.top)
    if config.json is not None:
        config.json.write_text(json.dumps(inspection.to_mapping(), allow_nan=False) + "\n")
    print_inspection(inspection, config.top)
    return inspection


def _text(config: InspectConfig) -> str:
    from memdec.data.documents import decode_text

    if config.text is not None:
        return config.text
    if config.file is not None:
        return decode_text(config.file.read_bytes(), config.file)
    return decode_text(sys.stdin.buffer.read(), "standard input")


def _score(
    config: InspectConfig, joint: MemoryDecoderForCausalLM, tokens: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Log-probabilities, float64 [positions] a row of the table, and the lmbda of each position."""
    from memdec.evaluation.forward import check_model, label_scores
    from memdec.evaluation.gate import gate_lmbda
    from memdec.evaluation.mixture import mix_log_probs
    from memdec.evaluation.overlap import score_overlapping
    from memdec.modeling.gate import Gate

    block_size = config.block_size or min(
        [_LONGEST_BLOCK, *map(_context, (joint.base, joint.memory))]
    )
    stride = config.stride or max(block_size // 2, 1)
    require(stride <= block_size, "stride", f"at most {block_size}, the block_size", stride)
    for model in (joint.base, joint.memory):  # a short text would not say so
        check_model(model, block_size, joint.config.tokenizer_size)
    options: dict[str, Any] = {"batch_blocks": 1, "vocab_size": joint.config.tokenizer_size}
    weight = joint.config.lmbda

    def both(stream: TokenStream, size: int) -> np.ndarray:
        """Log-probabilities of base and memory, and lmbda, float64 [positions, 3]."""
        gated = isinstance(weight, dict)
        passes = {"block_size": size, "with_confidence": gated, **options}
        base = label_scores(joint.base, stream, **passes)
        base.check("base")
        memory = label_scores(joint.memory, stream, **passes)
        memory.check("memory")
        if gated:
            lmbda = gate_lmbda(Gate.from_dict(weight), base, memory, stream, size)
        else:
            lmbda = np.full(stream.positions, weight)
        return np.column_stack([base.log_probs, memory.log_probs, lmbda])

    knn = None if config.datastore is None else _KnnLm(config, joint)
    base, memory, weights = score_overlapping(tokens, block_size, stride, both).T
    rows = {"base": base}
    if knn is not None:
        near = score_overlapping(tokens, block_size, stride, partial(knn, **options))
        rows["kNN-LM"] = mix_log_probs(base, near, knn.lmbda)
    rows["memory"] = memory
    rows["joint"] = mix_log_probs(base, memory, weights)
    return rows, weights


class _KnnLm:
    """The neighbours' probabilities of a text's tokens, and their weight `lmbda` in the kNN-LM."""

    def __init__(self, config: InspectConfig, joint: MemoryDecoderForCausalLM) -> None:
        from memdec.data.artefact import check_input
        from memdec.data.datastore import Datastore
        from memdec.data.targets import TargetStore
        from memdec.modeling.loading import (
            compare_tokenizers,
            has_tokenizer,
            load_model,
            load_tokenizer,
            model_fingerprint,
        )

        assert config.datastore is not None  # InspectConfig.check
        assert config.targets is not None
        teacher = config.teacher or config.base
        self.datastore: Datastore = Datastore.open(config.datastore, str(joint.device))
        self.targets: TargetStore = TargetStore.open(config.targets)
        check_input(self.datastore.artefact, "model", model_fingerprint(teacher))
        check_input(self.targets.artefact, "datastore", self.datastore.fingerprint)
        self.lmbda = _knn_lmbda(config, self.targets)
        self.teacher: Any = joint.base
        if teacher != config.base:
            if has_tokenizer(teacher):
                own: Any = joint.tokenizer
                compare_tokenizers(own, load_tokenizer(teacher), ("the base", "the teacher"))
            self.teacher = load_model(teacher, device=joint.device, dtype=config.dtype)

    def __call__(self, stream: TokenStream, block_size: int, **options: Any) -> np.ndarray:
        from memdec.evaluation.knn_lm import score_neighbours

        return score_neighbours(
            self.teacher,
            stream,
            self.datastore,
            k=self.targets.k,
            temperature=self.targets.temperature,
            block_size=block_size,
            **options,
        )


def _knn_lmbda(config: InspectConfig, targets: TargetStore) -> float:
    """A number that was given counts for the kNN-LM too, as in eval; else what was calibrated."""
    if isinstance(config.lmbda, float):
        return config.lmbda
    if config.evaluation is not None or config.lmbda == ADAPTIVE:
        chosen = open_evaluation(config)["lmbda"].get("kNN-LM")
        if chosen is not None:
            return float(chosen)
    if targets.artefact.manifest.get("calibration") is None:
        raise MemdecError(
            f"{config.targets} was made without choosing a lmbda for the kNN-LM: "
            "give lmbda or evaluation"
        )
    return targets.artefact.field(float, "calibration", "lmbda")


def _context(model: PreTrainedModel) -> int:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return _LONGEST_BLOCK if limit is None else limit
