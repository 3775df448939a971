"""Targets for a memory that will stand beside a base: what the base does not say already.

The mixture ``(1 - lmbda) * p_base + lmbda * p_memory`` equals a teacher's distribution T where the
memory answers ``(T - (1 - lmbda) * p_base) / lmbda``. So its targets are that difference, negative
parts left out, normalised. T is a row of other targets with some weight on the label itself: a label
that the base foresees is then no lesson either, as it would be in a cross-entropy of its own.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
from safetensors.torch import save
from transformers import PreTrainedModel

from lab.blended import blend
from memdec.console import Progress
from memdec.data.artefact import stage
from memdec.data.corpus import TokenCorpus, block_batches
from memdec.data.targets import KIND, TargetStore
from memdec.modeling.loading import load_model, model_fingerprint
from memdec.ops import SparseTargets

_LEAST = 1e-3  # of a row's mass
_BLOCKS = 8  # in one forward pass of the base


def residual_targets(
    base: str,
    taught: TargetStore,
    corpus: TokenCorpus,
    out: Path,
    *,
    lmbda: float,
    label_weight: float,
    device: str,
) -> Path:
    """Writes the artefact of a stage ``targets``, shard by shard, from another one.

    Args:
        taught: the teacher's rows; its shards must hold whole blocks, as those of mixtures do.
        lmbda: the weight that the memory is expected to have.
        label_weight: of the label in T.
    """
    params = {**taught.artefact.manifest["params"], "source": "residual"}
    params |= {"lmbda": lmbda, "label_weight": label_weight}
    inputs = {**taught.artefact.manifest["inputs"], "taught": taught.fingerprint}
    inputs["base"] = model_fingerprint(base)
    names = [name for name in taught.artefact.manifest["files"] if name.endswith(".safetensors")]
    with stage(out, KIND, params, inputs) as writer:
        if writer.finished:
            return out
        model = load_model(base, device=device)
        with Progress(f"residual of {taught.source}", len(taught), "rows") as progress:
            for number, name in enumerate(sorted(names)):
                shard = {key: torch.from_numpy(a) for key, a in taught.shard(number).items()}
                if not writer.has(name):
                    rows = _residual(model, shard, corpus, taught.block_size, lmbda, label_weight)
                    kept = {"position": shard["position"], "label": shard["label"]}
                    writer.write(name, partial(_save, rows=rows, kept=kept))
                progress.advance(len(shard["label"]))
        facts = taught.artefact.manifest
        dtypes = {key: kind for key, kind in facts["dtypes"].items() if key != "dropped_mass"}
        same = {key: facts[key] for key in ("rows", "block_size", "shards", "temperature")}
        writer.finish(**same, dtypes=dtypes)
    return out


def _save(file: IO[bytes], rows: SparseTargets, kept: dict[str, torch.Tensor]) -> None:
    arrays = {name: tensor for name, tensor in vars(rows).items() if tensor is not None}
    file.write(save({**arrays, **kept}))


@torch.inference_mode()
def _residual(
    model: PreTrainedModel,
    shard: dict[str, torch.Tensor],
    corpus: TokenCorpus,
    block_size: int,
    lmbda: float,
    label_weight: float,
) -> SparseTargets:
    """One shard's rows."""
    stream = corpus.split("train")
    first = int(shard["position"][0])
    parts = []
    cuts = block_batches(first, first + len(shard["label"]), block_size, _BLOCKS)
    for start, stop, blocks in cuts:
        tokens = torch.from_numpy(stream.read(start, stop).astype(np.int64)).to(model.device)
        logits = model(input_ids=tokens.view(blocks, -1), use_cache=False).logits.flatten(0, 1)
        log_probs = logits[:, : corpus.vocab_size].float().log_softmax(dim=1)
        rows = slice(start - first, stop - first)
        targets = SparseTargets(
            shard["indptr"][rows.start : rows.stop + 1], shard["token_ids"], shard["probs"]
        )
        label = shard["label"][rows, None].to(model.device)
        sure = torch.zeros(label.shape, device=model.device)  # log 1
        taught = blend(sure, label, targets.compact().to(model.device), 1 - label_weight)
        parts.append(subtract(taught, log_probs, 1 - lmbda).to("cpu"))
    return SparseTargets.cat(parts)


def subtract(rows: SparseTargets, log_probs: torch.Tensor, weight: float) -> SparseTargets:
    """Rows less ``weight * exp(log_probs)``, without what is negative, normalised.

    Args:
        rows: compact, [n] rows.
        log_probs: [n, vocabulary].

    A row of which nothing is left but rounding stays as it was.
    """
    owner = torch.repeat_interleave(
        torch.arange(len(rows), device=rows.indptr.device), rows.indptr.diff()
    )
    left = (rows.probs - weight * log_probs[owner, rows.token_ids.long()].exp()).clamp(min=0)
    sums = torch.zeros(len(rows), device=left.device).index_add_(0, owner, left)
    left = torch.where(sums[owner] > _LEAST, left / sums[owner], rows.probs)
    kept = left > 0
    counts = torch.zeros_like(rows.indptr).index_add_(0, owner[kept] + 1, kept[kept].long())
    return SparseTargets(counts.cumsum(0), rows.token_ids[kept], left[kept])
