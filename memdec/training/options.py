"""Options that adapting a teacher and training a memory share."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from memdec.config import Config, option, require
from memdec.data.corpus import ISOLATE_HELP


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig(Config):
    """Options that every trained model has."""

    epochs: int = option(3, help="passes over the train tokens")
    learning_rate: float = option(5e-5, help="peak learning rate of AdamW")
    warmup_fraction: float = option(0.05, help="share of the steps that the warm-up takes")
    weight_decay: float = option(0.01, help="weight decay of AdamW")
    isolate_documents: bool = option(False, help=ISOLATE_HELP)
    batch_blocks: int = option(4, help="blocks in one forward pass")
    gradient_accumulation: int = option(2, help="forward passes in one optimizer step")
    validations: int = option(1, help="validations, each with a checkpoint, per epoch")
    patience: int = option(2, help="stop after this many validations without a gain (0: never)")
    device: str = option("auto", help="where to train: auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", help="arithmetic of the forward pass; weights and optimizer stay float32"
    )
    compile: bool = option(
        False, help="compile the model's blocks: faster steps after a slow start"
    )
    report_to: tuple[str, ...] = option((), help="trackers of transformers, for example wandb")
    seed: int = option(0, help="seed of the data order, dropout and fresh weights")

    def check(self) -> None:
        for name in ("epochs", "batch_blocks", "gradient_accumulation", "validations"):
            value = getattr(self, name)
            require(value >= 1, name, "at least 1", value)
        require(self.learning_rate > 0, "learning_rate", "above 0", self.learning_rate)
        require(0 <= self.warmup_fraction < 1, "warmup_fraction", "in [0, 1)", self.warmup_fraction)
        require(self.weight_decay >= 0, "weight_decay", "at least 0", self.weight_decay)
        require(self.patience >= 0, "patience", "at least 0", self.patience)

    def training_params(self) -> dict[str, Any]:
        """The options that shape the weights, for the manifest."""
        placement = ("device", "report_to")
        params = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(LoopConfig)
            if field.name not in placement
        }
        if not self.isolate_documents:  # the manifest says so where they are
            del params["isolate_documents"]
        return params
