"""``memdec demo``: the whole job, offline, on a tiny model and Python's own documentation.

The base is made here from the docstrings of Python's library; the domain is pydoc's topics. That
proves the pipeline. It does not measure the method: for that, give ``memdec build`` a real model.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from memdec.build import RECIPE, REPORT, plan, refuse_strangers, run_steps
from memdec.config import Config, option
from memdec.console import say
from memdec.data.artefact import fingerprint, stage
from memdec.demo import text
from memdec.recipe import STAGES, Recipe

_BLOCK = 256
# Small vocabulary, small batches: a tiny model learns from the number of its steps.
_VOCABULARY = 4096
_LAYERS, _WIDTH = 3, 128
# A model this small gains nothing from more threads, and the same number everywhere gives the same
# result everywhere.
_THREADS = 2


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Config):
    """Options of ``memdec demo``."""

    device: str = option("cpu", help="auto, cpu, cuda or cuda:N")
    seed: int = option(0, help="seed of everything random")


def demo(config: DemoConfig, out: Path) -> int:
    """Makes base and memory in `out`, writes report.html, prints the table and three prompts.

    Returns:
        0 when joint beats base on the held-out tokens, else 1: the command's exit status.
    """
    import torch

    from memdec.demo.prompts import continuations
    from memdec.report import write_report

    begin = time.monotonic()
    torch.set_num_threads(_THREADS)
    refuse_strangers(out, {"start", "docstrings", "base", *STAGES, RECIPE, REPORT})
    base = _make_base(config, out)
    recipe = _recipe(config, out, base)
    run_steps(plan(recipe, out), recipe, out)
    results = json.loads((out / "eval" / "eval.json").read_text())
    perplexity = {row["name"]: row["perplexity"] for row in results["rows"]}
    shown = continuations(out, base, lmbda=results["lmbda"]["joint"], device=config.device)
    write_report(out / "eval", out / REPORT, shown, "memdec demo", out)
    say(f"demo: {time.monotonic() - begin:.0f} s in all; the report is {out / REPORT}")
    if perplexity["joint"] < perplexity["base"]:
        return 0
    say(
        f"demo: expected joint below base, got perplexity {perplexity['joint']:.2f} "
        f"against {perplexity['base']:.2f}"
    )
    return 1


def _make_base(config: DemoConfig, out: Path) -> Path:
    """Tokenizer and base, both from the docstrings; returns the base's directory."""
    from memdec.data.corpus import PrepareConfig, prepare
    from memdec.training.adapt import AdaptConfig, adapt

    start = out / "start"
    _write_start(config, start)
    prepare(
        PrepareConfig(tokenizer=str(start / "model"), corpus=start / "docstrings.jsonl"),
        out / "docstrings",
    )
    adapt(
        AdaptConfig(
            model=str(start / "model"),
            tokens=out / "docstrings",
            block_size=_BLOCK,
            epochs=1,
            batch_blocks=2,
            gradient_accumulation=1,
            learning_rate=3e-3,
            device=config.device,
            seed=config.seed,
        ),
        out / "base",
    )
    return out / "base" / "model"


def _write_start(config: DemoConfig, start: Path) -> None:
    """The texts as JSON lines, and a model of random weights with the tokenizer."""
    from memdec.demo.model import fresh_base, train_tokenizer

    docstrings, topics = text.docstrings(), text.topics()
    params = {
        "vocabulary": _VOCABULARY,
        "layers": _LAYERS,
        "width": _WIDTH,
        "context": _BLOCK,
        "seed": config.seed,
    }
    inputs = {"docstrings": fingerprint(docstrings), "topics": fingerprint(topics)}
    with stage(start, "demo", params, inputs) as writer:
        if writer.finished:
            say(f"demo: texts and tokenizer already in {start}")
            return
        writer.write("docstrings.jsonl", lambda file: text.write_lines(docstrings, file))
        writer.write("topics.jsonl", lambda file: text.write_lines(topics, file))
        tokenizer = train_tokenizer(docstrings.values(), _VOCABULARY)
        model = fresh_base(
            tokenizer, layers=_LAYERS, width=_WIDTH, context=2 * _BLOCK, seed=config.seed
        )

        def save(path: Path) -> None:
            tokenizer.save_pretrained(path)
            model.save_pretrained(path)

        writer.write_directory("model", save)
        writer.finish()


def _recipe(config: DemoConfig, out: Path, base: Path) -> Recipe:
    training = {"batch_blocks": 2, "gradient_accumulation": 1}
    return Recipe.from_mapping(
        {
            "base": str(base),
            "block_size": _BLOCK,
            "seed": config.seed,
            "device": config.device,
            "prepare": {
                "corpus": str(out / "start" / "topics.jsonl"),
                # A topic repeats whole paragraphs of others: held-out text would be known text.
                "drop_repeated_paragraphs": True,
                "validation_fraction": 0.1,
                "test_fraction": 0.15,
            },
            "adapt": {**training, "epochs": 2, "learning_rate": 1e-3},
            "targets": {"k": 256},
            "train": {**training, "epochs": 3, "learning_rate": 1e-3},
            "control": {},
        }
    )
