"""Tokens a second, peak memory and how busy the GPU is: the memory's training against plain CE.

    python benchmarks/training_step.py                       # on a GPU: minutes
    python benchmarks/training_step.py --tiny --out now.json # anywhere: does it run

Three trainers take the same steps on the same model, the shape of SmolLM2-135M with random weights:
transformers' own with the model's own cross-entropy, BlockTrainer with cross-entropy alone, and
BlockTrainer with KL and cross-entropy, whose target rows are read from disk, checked and sent along.
Everything else is equal: arguments, batches, data loader. Each has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from gpu_busy import GpuBusy
from machine import file_name, machine_info
from safetensors.torch import save_file
from table import training_table
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from memdec.data.corpus import TokenStream
from memdec.data.targets import TargetStore
from memdec.training.batch_targets import BatchTargets, NoTargets, StoredTargets
from memdec.training.batches import BlockCollator
from memdec.training.block_trainer import BlockTrainer
from memdec.training.trainer import compile_blocks

CONTENDERS = ["transformers, CE", "memdec, CE", "memdec, KL and CE"]
SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
}
TINY = {
    **SMOLLM2_135M,
    "vocab_size": 1000,
    "hidden_size": 36,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
}
WARM_UP = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a model and blocks that a CPU can do")
    parser.add_argument("--block-size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16, help="blocks a step")
    parser.add_argument("--entries", type=int, default=64, help="entries of a target row")
    parser.add_argument("--steps", type=int, default=60, help="timed steps")
    parser.add_argument("--workers", type=int, default=0, help="processes that read the batches")
    parser.add_argument(
        "--compile",
        choices=["no", "yes", "both"],
        default="both",
        help="torch.compile the blocks of the model",
    )
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results, by the device's name"
    )
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # contender, compiled, data
    options = parser.parse_args()
    if options.tiny:
        options.block_size, options.batch, options.steps = 32, 2, 5
    if options.one is not None:
        contender, compiled, data = options.one
        print(json.dumps(measure(options, contender, compiled == "yes", Path(data))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as data:
        write_data(options, Path(data))
        for compiled in {"both": ["no", "yes"]}.get(options.compile, [options.compile]):
            for contender in options.contenders:
                command = [sys.executable, *sys.argv, "--one", contender, compiled, data]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print(rows[-1], flush=True)
    on_gpu = torch.cuda.is_available()
    machine = machine_info()
    model = "a tiny model" if options.tiny else "135 M parameters"
    result = {
        "machine_info": machine,
        "setting": (
            f"{model}, {options.batch} blocks of {options.block_size} tokens a step, "
            f"{options.entries} entries a target row, {options.workers} workers, "
            f"{'bfloat16' if on_gpu else 'float32'}, {options.steps} steps after {WARM_UP}"
        ),
        "training_step": rows,
    }
    name = file_name(machine["device"])
    out = options.out or Path(__file__).parent / "results" / f"training-step-{name}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(training_table(result))


def write_data(options: argparse.Namespace, folder: Path) -> None:
    """Random tokens and a target row for each position, laid out as the stage targets does."""
    model = TINY if options.tiny else SMOLLM2_135M
    blocks = 20 * options.batch
    positions = blocks * options.block_size
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, model["vocab_size"], positions + 1, np.int32)
    np.save(folder / "tokens.npy", tokens)
    spread = model["vocab_size"] // options.entries
    ids = generator.integers(0, spread, (positions, options.entries), np.int32)
    ids += spread * np.arange(options.entries, dtype=np.int32)
    probs = np.full(ids.shape, 1 / options.entries, np.float32)
    (folder / "targets").mkdir()
    shard = {
        "indptr": np.arange(positions + 1) * options.entries,
        "token_ids": ids.ravel(),
        "probs": probs.ravel(),
        "position": np.arange(positions),
        "label": tokens[1:].astype(np.int64),
    }
    tensors = {name: torch.from_numpy(array) for name, array in shard.items()}
    save_file(tensors, folder / "targets" / "targets-00000.safetensors")
    dtypes = {name: str(array.dtype) for name, array in shard.items()}
    manifest = {"params": {"shard_rows": positions}, "rows": positions, "dtypes": dtypes}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def measure(
    options: argparse.Namespace, contender: str, compiled: bool, folder: Path
) -> dict[str, object]:
    """Trains for some steps; times those after the warm-up."""
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(TINY if options.tiny else SMOLLM2_135M)))
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    stream = TokenStream((tokens,), np.zeros(1, np.int64))
    clock = Clock(options.steps)
    with tempfile.TemporaryDirectory() as work:
        arguments = TrainingArguments(
            output_dir=work,
            max_steps=WARM_UP + options.steps,
            per_device_train_batch_size=options.batch,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            optim="adamw_torch_fused" if on_gpu else "adamw_torch",
            logging_steps=10,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_num_workers=options.workers,
            dataloader_pin_memory=on_gpu,
            accelerator_config={"non_blocking": on_gpu},
        )
        trainer: Trainer
        if contender == "transformers, CE":
            trainer = Trainer(
                model,
                arguments,
                train_dataset=range(stream.blocks(options.block_size)),
                data_collator=BlockCollator(stream, options.block_size, NoTargets()),
                callbacks=[clock],
            )
        else:
            targets: BatchTargets = NoTargets()
            if contender == "memdec, KL and CE":
                artefact = SimpleNamespace(
                    path=folder,
                    manifest=json.loads((folder / "manifest.json").read_text()),
                    file=lambda name: folder / name,
                )
                targets = StoredTargets(
                    TargetStore(artefact), pin_memory=on_gpu and not options.workers
                )
            trainer = BlockTrainer(
                model,
                arguments,
                blocks=stream.blocks(options.block_size),
                collator=BlockCollator(stream, options.block_size, targets),
                alpha=0.0 if isinstance(targets, NoTargets) else 0.5,
                callbacks=[clock],
            )
        if compiled:
            compile_blocks(model)
        with clock.gpu.watch():
            trainer.train()
    step = clock.seconds / options.steps
    return {
        "contender": contender,
        "compiled": compiled,
        "tokens_per_second": options.batch * options.block_size / step,
        "step_seconds": step,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "gpu_busy": clock.gpu.share(clock.begin, clock.end),
    }


class Clock(TrainerCallback):
    """Seconds of the last `steps` steps, and how busy the GPU was within them."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.done = 0
        self.gpu = GpuBusy()
        self.begin = self.end = 0.0

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self.done += 1
        if self.done in (WARM_UP, WARM_UP + self.steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.begin, self.end = self.end, time.perf_counter()
            if self.done == WARM_UP and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
