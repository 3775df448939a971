"""The training loop of the adapted teacher, the memory and the demo's base: transformers' Trainer.

Total batch arithmetic: an optimizer step takes ``batch_blocks * gradient_accumulation`` blocks of
``block_size`` tokens from each process; an epoch has ``ceil(blocks / that)`` steps. Loss and gradient
of a step are the mean over its tokens, however they are spread over forward passes and processes.

A checkpoint counts once its ``curve.json`` is there, which gets its name last, when all files have
reached the disk. So a run that was killed goes on from the last whole checkpoint and, on the CPU, ends
with the bytes of an undisturbed run.
Of several processes all validate, so that none waits, and the main one decides and writes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from memdec.console import Progress
from memdec.data.artefact import StageWriter, clear_disk_errors, sync_files
from memdec.data.corpus import TokenStream
from memdec.errors import MemdecError
from memdec.modeling.key_layer import find_blocks
from memdec.modeling.loading import pick_device
from memdec.modeling.quiet import no_library_bars
from memdec.training.batch_targets import BatchTargets, NoTargets
from memdec.training.batches import BlockCollator
from memdec.training.block_trainer import BlockTrainer
from memdec.training.options import LoopConfig

CURVE = "curve.json"

# What a validation returns: numbers by name; "score" is the one to minimise.
Validate = Callable[[PreTrainedModel], dict[str, float]]


def fit(
    processes: PartialState,
    writer: StageWriter,
    name: str,
    model: PreTrainedModel,
    tokenizer: Any,
    stream: TokenStream,
    config: LoopConfig,
    *,
    block_size: int,
    validate: Validate,
    targets: BatchTargets | None = None,
    alpha: float = 0.0,
) -> list[dict[str, float]]:
    """Trains `model` in place and writes the weights of its best validation.

    Args:
        processes: those that call this together, each with the same arguments.
        writer: gets the model directory `name`, with the tokenizer, and ``curve.json``. Checkpoints
            and ``log.jsonl`` lie beside them; the checkpoints go when all is written.
        model: float32 weights; moved to the device.
        stream: the train tokens.
        validate: scores the model; called before the first step and ``validations`` times an epoch.
        targets: of each batch; None trains on cross-entropy alone.
        alpha: weight of the KL term, 0 without targets.

    Returns:
        The curve: per validation ``step``, ``epoch``, ``train_loss`` since the last one (and its
        parts ``train_kl`` and ``train_ce``, with targets), and what `validate` returned.

    Raises:
        MemdecError: the loss is no longer finite.
    """
    work = writer.file("checkpoints")
    if not writer.has_directory(name):
        with clear_disk_errors(work):
            best, curve = _train(
                processes,
                work,
                model,
                stream,
                config,
                block_size=block_size,
                validate=validate,
                targets=targets or NoTargets(),
                alpha=alpha,
                log=writer.file("log.jsonl"),
            )
        text = json.dumps(curve, indent=1) + "\n"

        def copy(path: Path) -> None:
            shutil.copytree(best, path, dirs_exist_ok=True)
            tokenizer.save_pretrained(path)

        if processes.is_main_process:
            writer.write(CURVE, lambda file: file.write(text.encode()))
            writer.write_directory(name, copy)
    if processes.is_main_process:
        shutil.rmtree(work, ignore_errors=True)
    processes.wait_for_everyone()
    return json.loads(writer.file(CURVE).read_text())


def best_row(curve: list[dict[str, float]]) -> dict[str, float]:
    """The validation whose weights are kept: the least score, the first of equals."""
    return min(curve, key=lambda row: row["score"])


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """One progress bar is ours; the bar of each saved model would tear it."""
    verbosity = logging.get_verbosity()
    try:
        with no_library_bars():
            yield
    finally:
        logging.set_verbosity(verbosity)


@_quiet_transformers()
def _train(
    processes: PartialState,
    work: Path,
    model: PreTrainedModel,
    stream: TokenStream,
    config: LoopConfig,
    *,
    block_size: int,
    validate: Validate,
    targets: BatchTargets,
    alpha: float,
    log: Path,
) -> tuple[Path, list[dict[str, float]]]:
    """Trains from the last whole checkpoint in `work` on; returns the best weights and the curve."""
    device = torch.device(pick_device(config.device))
    if device.index is not None:
        torch.cuda.set_device(device)  # Trainer takes the current one
    on_gpu = device.type == "cuda"
    blocks = stream.blocks(block_size)
    blocks_a_step = config.batch_blocks * config.gradient_accumulation * processes.num_processes
    steps_per_epoch = math.ceil(blocks / blocks_a_step)
    total_steps = steps_per_epoch * config.epochs
    work.mkdir(parents=True, exist_ok=True)
    if processes.is_main_process:
        _remove_parts(work)
    processes.wait_for_everyone()
    checkpoint, curve = _last_checkpoint(work)
    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_blocks,
        gradient_accumulation_steps=config.gradient_accumulation,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup_fraction * total_steps),
        eval_strategy="no",
        save_strategy="no",  # the schedule below decides when to validate and to save
        logging_steps=10,
        logging_nan_inf_filter=False,
        report_to=list(config.report_to) or "none",
        log_level="error",
        disable_tqdm=True,
        remove_unused_columns=False,
        # A batch is read and sent while the GPU works on the one before.
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu},
        use_cpu=device.type == "cpu",
        use_cache=True,  # else the saved configuration would switch the cache off for good
        seed=config.seed,
        data_seed=config.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process drives one device, never DataParallel
    trainer = BlockTrainer(
        model,
        arguments,
        blocks=blocks,
        collator=BlockCollator(stream, block_size, targets),
        alpha=alpha,
        arithmetic=_arithmetic(device, config.dtype),
    )
    if config.compile:
        compile_blocks(model)
    trainer.remove_callback(PrinterCallback)
    schedule = _Schedule(
        trainer,
        model,
        validate,
        curve,
        every=math.ceil(steps_per_epoch / config.validations),
        patience=config.patience,
        work=work,
    )
    if not curve:
        schedule.validate_now(step=0, epoch=0.0)
    if curve[-1]["step"] < total_steps and not schedule.exhausted():
        trained = round(curve[-1]["epoch"] * stream.positions)
        total = config.epochs * stream.positions
        with Progress("training", total, "tokens", done=trained) as progress:
            trainer.add_callback(schedule)
            trainer.add_callback(_Reporter(progress, stream.positions, log))
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return schedule.best_weights(), curve


def compile_blocks(model: PreTrainedModel) -> None:
    """Compiles a model's decoder blocks in place.

    One compilation serves all of them, and none reaches the output layer, in whose place a step takes
    its loss: Trainer's own ``torch_compile`` traces a whole model several times until it stops there.
    """
    for block in model.get_submodule(find_blocks(model)).children():
        block.compile()


def _arithmetic(
    device: torch.device, dtype: str
) -> Callable[[], contextlib.AbstractContextManager]:
    """Autocast is ours: accelerate's would copy the logits of a validation to float32."""
    reduced = dtype == "bfloat16" or (
        dtype == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=reduced)


class _Schedule(TrainerCallback):
    """Validates, saves and stops; what it knows is the curve, which travels with each checkpoint."""

    def __init__(
        self,
        trainer: BlockTrainer,
        model: PreTrainedModel,
        validate: Validate,
        curve: list[dict[str, float]],
        *,
        every: int,
        patience: int,
        work: Path,
    ) -> None:
        self.trainer = trainer
        self.model = model
        self.validate = validate
        self.curve = curve
        self.every = every
        self.patience = patience
        self.work = work

    def validate_now(self, step: int, epoch: float) -> None:
        row = {"step": step, "epoch": epoch}
        if step > 0:
            sums = self.trainer.accelerator.reduce(self.trainer.loss_sums, "sum")
            loss, kl, ce = (sums / (step - self.curve[-1]["step"])).tolist()
            row |= {"train_loss": loss}
            if self.trainer.alpha > 0:
                row |= {"train_kl": kl, "train_ce": ce}
            self.trainer.loss_sums.zero_()
        # Uncompiled: a validation's last batches have shapes of their own, each a compilation.
        with self.trainer.arithmetic(), torch.compiler.set_stance("force_eager"):
            row |= self.validate(self.model)
        (row,) = broadcast_object_list([row])  # one decision for all processes
        if not math.isfinite(row["score"]):
            raise MemdecError(
                f"the loss on validation is {row['score']} after {step} steps; "
                "try a smaller learning_rate"
            )
        self.curve.append(row)
        # The state of a sharded model is gathered from all processes.
        weights = self.trainer.accelerator.get_state_dict(self.model)
        if best_row(self.curve) is row and self.trainer.is_world_process_zero():
            # Renamed when whole; the former best goes only after the next checkpoint is whole.
            temporary = self.work / "best.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            self.model.save_pretrained(temporary, state_dict=weights)
            sync_files(temporary)
            shutil.rmtree(self.best_weights(), ignore_errors=True)
            os.replace(temporary, self.best_weights())

    def best_weights(self) -> Path:
        return self.work / f"best-{best_row(self.curve)['step']}"

    def exhausted(self) -> bool:
        since_best = sum(row["step"] > best_row(self.curve)["step"] for row in self.curve)
        return 0 < self.patience <= since_best

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self.validate_now(state.global_step, state.epoch)
            control.should_log = control.should_save = True
            control.should_training_stop |= self.exhausted()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.accelerator.wait_for_everyone()  # each process writes a part
        if not state.is_world_process_zero:
            return
        marker = self.work / f"checkpoint-{state.global_step}" / CURVE
        temporary = marker.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.curve))
        sync_files(marker.parent)
        os.replace(temporary, marker)
        # What came before goes now, and not by Trainer's limit, which trusts a clock that may jump.
        kept = {marker.parent, self.best_weights()}
        for path in {*self.work.glob("checkpoint-*"), *self.work.glob("best-*")} - kept:
            shutil.rmtree(path)


def _remove_parts(work: Path) -> None:
    """Removes checkpoints that a killed run left half-written."""
    for path in work.glob("checkpoint-*"):
        if not (path / CURVE).is_file():
            shutil.rmtree(path)


def _last_checkpoint(work: Path) -> tuple[Path | None, list[dict[str, float]]]:
    """The newest whole checkpoint and its curve."""
    whole = list(work.glob("checkpoint-*"))
    if not whole:
        return None, []
    newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]))
    return newest, json.loads((newest / CURVE).read_text())


class _Reporter(TrainerCallback):
    """Progress for the person, ``log.jsonl`` for plots."""

    def __init__(self, progress: Progress, positions: int, log: Path) -> None:
        self.progress = progress
        self.positions = positions
        self.log = log

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.advance(round(state.epoch * self.positions) - self.progress.count)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.progress.advance(0, f"loss {logs['loss']:.3f}")
        if state.is_world_process_zero:
            with open(self.log, "a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
