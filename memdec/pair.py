"""The options of every command that puts a base and a memory together, and how they are loaded."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from memdec.config import Config, option, require
from memdec.data.artefact import MANIFEST, Artefact, check_input
from memdec.errors import MemdecError
from memdec.evaluation.evaluate import KIND, RESULTS

if TYPE_CHECKING:  # torch and transformers are slow to import, and --help needs the config alone
    from memdec import MemoryDecoderForCausalLM
    from memdec.modeling.gate import Gate

ADAPTIVE = "adaptive"


@dataclass(frozen=True, kw_only=True)
class PairConfig(Config):
    """Which base and memory, and how they are weighed."""

    base: str = option(help="base model: directory, hub name or .gguf file")
    memory: Path = option(help="the memory: what train wrote, or a model directory")
    lmbda: float | Literal["adaptive"] | None = option(
        None,
        help="weight of the memory, or adaptive: one for each token, by the gate that eval fitted; "
        "the one that eval, if given, or train chose if not given",
    )
    evaluation: Path | None = option(
        None, help="what eval wrote; for adaptive by default the directory eval beside train"
    )
    device: str = option("auto", help="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", help="of the weights; auto keeps the files'"
    )

    def check(self) -> None:
        number = self.lmbda if isinstance(self.lmbda, float) else 0
        require(0 <= number <= 1, "lmbda", f"in [0, 1] or {ADAPTIVE}", self.lmbda)

    @property
    def memory_model(self) -> Path:
        """The memory's model directory, absolute: what made it is looked for around it."""
        memory = Path(os.path.abspath(self.memory))
        return memory / "memory" if (memory / MANIFEST).is_file() else memory


def load_pair(config: PairConfig) -> MemoryDecoderForCausalLM:
    """Base and memory as one model, with the base's tokenizer.

    Raises:
        MemdecError: a model or the base's tokenizer is missing, tokenizers that differ, no known
            lmbda, an evaluation of other models.
    """
    from memdec import MemoryDecoderForCausalLM
    from memdec.modeling.loading import has_tokenizer, load_model, load_tokenizer, pick_device

    if not os.path.exists(config.memory):
        raise MemdecError(f"no model at {config.memory}: there is no such directory")
    lmbda = _lmbda(config)
    if not has_tokenizer(config.base):
        raise MemdecError(f"there is no tokenizer beside the base {config.base}")
    device = pick_device(config.device)
    memory = config.memory_model
    return MemoryDecoderForCausalLM.from_models(
        load_model(config.base, device=device, dtype=config.dtype),
        load_model(memory, device=device, dtype=config.dtype),
        lmbda=lmbda,
        tokenizer=load_tokenizer(config.base),
        memory_tokenizer=load_tokenizer(memory) if has_tokenizer(memory) else None,
    )


def open_evaluation(config: PairConfig) -> dict[str, Any]:
    """The results of the evaluation given, or of the one beside the training that made the memory.

    Raises:
        MemdecError: there is none, or it was made with other models.
    """
    from memdec.modeling.loading import model_fingerprint

    path = config.evaluation or config.memory_model.parent.parent / "eval"
    if config.evaluation is None and not path.exists():
        raise MemdecError(
            f"lmbda adaptive needs an evaluation of {config.memory}, and there is none at {path}: "
            "run eval, or give evaluation"
        )
    artefact = Artefact.open(path, KIND)
    check_input(artefact, "base", model_fingerprint(config.base))
    check_input(artefact, "memory", model_fingerprint(config.memory_model))
    return json.loads(artefact.file(RESULTS).read_text())


def _lmbda(config: PairConfig) -> float | Gate:
    """What was given, or chosen by the evaluation or by the memory's training."""
    if isinstance(config.lmbda, float):
        return config.lmbda
    if config.lmbda == ADAPTIVE:
        from memdec.modeling.gate import Gate

        return Gate.from_dict(open_evaluation(config).get("gate", {}))
    if config.evaluation is not None:
        return float(open_evaluation(config)["lmbda"]["joint"])
    record = config.memory_model.parent / MANIFEST
    try:
        return float(json.loads(record.read_text())["best"]["lmbda"])
    except (OSError, ValueError, KeyError, TypeError):
        raise MemdecError(
            f"no lmbda was given, and none is recorded by a training of {config.memory}"
        ) from None
