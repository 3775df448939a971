"""Targets of several teachers, and of the neighbours where those are known.

Teachers of other seeds err in other places, and the mean of their distributions predicts better than
any of them; a single model can learn that mean (Hinton et al. 2015; Furlanello et al. 2018). A row is

    (1 - lmbda) * mean of the teachers + lmbda * neighbours

With one teacher and neighbours at every position these are the rows of the source ``mixture``, here
from a search that was made before, so that targets with and without neighbours share it. Neighbours
may end early: text that a teacher wrote has none, and there the teachers' part is all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from transformers.modeling_outputs import CausalLMOutput

from memdec.console import Progress
from memdec.data.artefact import stage
from memdec.data.corpus import TokenCorpus
from memdec.data.sources import TeacherSource, Top
from memdec.data.targets import TargetStore
from memdec.errors import MemdecError
from memdec.modeling.loading import load_model, model_fingerprint
from memdec.ops import SparseTargets, knn_scatter

ROWS = "rows.safetensors"


class Ensemble(torch.nn.Module):
    """Models of one vocabulary as one, whose logits are the log of their mean distribution."""

    def __init__(self, members: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.members = torch.nn.ModuleList(members)
        self.config = members[0].config

    @classmethod
    def load(cls, models: Sequence[str], **options: Any) -> Ensemble:
        """`options` are those of :func:`memdec.modeling.loading.load_model`."""
        return cls([load_model(model, **options) for model in models])

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    def forward(self, **inputs: Any) -> CausalLMOutput:
        """Logits float32 [blocks, length, vocabulary], a block's float32 values at a time."""
        answers = [member(**inputs).logits for member in self.members]
        mean = torch.stack([_log_mean(blocks) for blocks in zip(*answers, strict=True)])
        return CausalLMOutput(logits=mean)


def _log_mean(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Log of the mean of the softmaxes of logits [length, vocabulary]."""
    total = logits[0].float().log_softmax(dim=-1)
    for one in logits[1:]:
        total = torch.logaddexp(total, one.float().log_softmax(dim=-1))
    return total - np.log(len(logits))


def blended_rows(
    teachers: Sequence[str],
    corpus: TokenCorpus,
    neighbours: TargetStore | None,
    out: Path,
    *,
    lmbda: float,
    device: str,
    options: Mapping[str, Any],
) -> Path:
    """Writes rows for the source ``file`` of the stage ``targets``; returns that file.

    Args:
        neighbours: targets of neighbours alone, of the head of this corpus's train split.
        lmbda: the neighbours' weight.
        options: ``top_m``, of the teachers' mean; ``max_entries`` of a row; ``block_size``,
            ``batch_blocks`` and ``dtype`` of the forward passes.
    """
    inputs = {"tokens": corpus.fingerprint}
    inputs |= {f"teacher {i}": model_fingerprint(name) for i, name in enumerate(teachers)}
    if neighbours is not None:
        inputs["neighbours"] = neighbours.fingerprint
    with stage(out, "rows", {"lmbda": lmbda, **options}, inputs) as writer:
        if writer.finished:
            return out / ROWS
        stream = corpus.split("train")
        source = TeacherSource(
            Ensemble.load(teachers, device=device, dtype=options["dtype"]),
            stream,
            corpus.vocab_size,
            options["top_m"],
            options["block_size"],
            options["batch_blocks"],
        )
        parts = []
        with Progress("blending", stream.positions, "rows") as progress:
            for top in source.top(0, stream.positions):
                for message, wrong in top.errors.items():
                    if wrong:
                        raise MemdecError(message)
                near = _near(neighbours, top)
                rows = blend(top.log_probs, top.tokens, near, lmbda, options["max_entries"])
                parts.append(rows.to("cpu"))
                progress.advance(top.stop - top.start)
        rows = SparseTargets.cat(parts)
        arrays = {name: getattr(rows, name) for name in ("indptr", "token_ids", "probs")}
        arrays["label"] = torch.from_numpy(stream.read(1, stream.positions + 1))
        writer.write(ROWS, lambda file: file.write(save(arrays)))
        writer.finish(rows=len(rows))
    return out / ROWS


def _near(neighbours: TargetStore | None, top: Top) -> SparseTargets | None:
    """The neighbours' rows of the positions of `top` that have any."""
    stop = 0 if neighbours is None else min(top.stop, len(neighbours))
    if stop <= top.start:
        return None
    return neighbours.gather(np.arange(top.start, stop)).targets.to(top.tokens.device)


def blend(
    log_weights: torch.Tensor,
    tokens: torch.Tensor,
    near: SparseTargets | None,
    lmbda: float,
    max_entries: int | None = None,
) -> SparseTargets:
    """Rows of weight ``1 - lmbda`` with those of `near`, of weight `lmbda`; compact.

    Args:
        log_weights: log-probabilities of `tokens`, both [rows, entries].
        near: the head of as many rows. Where one is empty, or missing, the others are alone.
    """
    if near is not None:
        lengths = near.indptr.diff()
        owner = torch.repeat_interleave(torch.arange(len(near), device=tokens.device), lengths)
        slot = torch.arange(len(owner), device=tokens.device) - near.indptr[owner]
        shape = (len(tokens), int(lengths.max()))
        near_weights = log_weights.new_full(shape, -torch.inf)
        near_tokens = tokens.new_full(shape, -1)
        near_weights[owner, slot] = near.probs.log() + float(np.log(lmbda))
        near_tokens[owner, slot] = near.token_ids.to(tokens.dtype)
        share = log_weights.new_zeros(len(tokens), 1)
        share[: len(near), 0] = torch.where(lengths > 0, float(np.log1p(-lmbda)), 0.0)
        log_weights = torch.cat([log_weights + share, near_weights], dim=1)
        tokens = torch.cat([tokens, near_tokens], dim=1)
    return knn_scatter(-log_weights, tokens, max_entries=max_entries).compact()
