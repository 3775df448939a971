"""``memdec plan``: what every stage of a build needs and whether it fits, before any of it starts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdec.build import OWN, BuildConfig, refuse_strangers
from memdec.build import plan as plan_steps
from memdec.console import say, show_bytes
from memdec.data.artefact import MANIFEST
from memdec.plan.machine import Machine, measure_machine
from memdec.plan.needs import Corpus, Need, estimate

_SAMPLE_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Plan:
    """What a build would need of a machine, a need a stage, in order."""

    needs: list[Need]
    corpus: Corpus
    machine: Machine


def plan(config: BuildConfig, out: Path) -> int:
    """Prints what ``memdec build`` of the same options would need, and whether it fits.

    Returns:
        0 when everything fits, else 1: the command's exit status.

    Raises:
        MemdecError: as :func:`make_plan`.
    """
    made = make_plan(config, out)
    _print_table(made.needs, made.corpus, made.machine)
    problems = list(misfits(made.needs, made.machine))
    for problem in problems:
        say(f"does not fit: {problem}")
    if not problems:
        say("fits")
    return 1 if problems else 0


def make_plan(config: BuildConfig, out: Path) -> Plan:
    """What ``memdec build`` of the same options would need.

    Nothing is written and no weight is loaded. `out` is where the build would write; tokens that
    are there already are counted, otherwise a sample of the corpus is tokenised.

    Raises:
        MemdecError: what a build would refuse: a bad recipe, no such model or corpus, an `out` of
            something else, an index that FAISS does not know, fewer tokens than k or a block.
    """
    recipe = config.to_recipe()
    steps = {step.name: step for step in plan_steps(recipe, out)}
    refuse_strangers(out, OWN)
    machine = measure_machine(recipe.shared.get("device", "auto"), out)
    corpus = count_tokens(steps["prepare"].config, out)
    needs = estimate(steps, recipe.teacher or recipe.base, recipe.base, corpus, machine)
    return Plan(list(needs), corpus, machine)


def count_tokens(config: Any, out: Path) -> Corpus:
    """Token counts of the finished stage prepare in `out`, or estimated from a sample of the text."""
    from memdec.data.corpus import SPLITS, TokenCorpus, check_documents
    from memdec.data.documents import collect, read_corpus, read_dataset
    from memdec.modeling.loading import load_tokenizer

    if (out / "prepare" / MANIFEST).is_file():
        made = TokenCorpus.open(out / "prepare").artefact
        train, *others = (made.field(int, "splits", name, "tokens") for name in SPLITS)
        return Corpus(train - 1, sum(others), 0, estimated=False)
    if config.corpus is not None:
        texts = read_corpus(config.corpus, config.documents, config.text_field)
    else:
        texts = read_dataset(config.dataset, config.dataset_subset, config.text_field)
    found = collect(texts, config.drop_repeated_paragraphs)
    check_documents(found, config)
    documents = found.texts
    characters = sum(map(len, documents))
    tokenizer = load_tokenizer(config.tokenizer)
    sample: list[str] = []
    for index in random.Random(0).sample(range(len(documents)), len(documents)):
        sample.append(documents[index][:_SAMPLE_CHARACTERS])
        if sum(map(len, sample)) >= _SAMPLE_CHARACTERS:
            break
    ids = tokenizer(sample, add_special_tokens=False, split_special_tokens=True, verbose=False)
    counted = sum(len(row) for row in ids["input_ids"])
    tokens = counted * characters // sum(map(len, sample)) + len(documents)  # and separators
    tokens = min(tokens, config.max_tokens or tokens)
    held_out = round(tokens * (config.validation_fraction + config.test_fraction))
    return Corpus(tokens - held_out, held_out, characters, estimated=True)


def misfits(needs: list[Need], machine: Machine) -> Iterator[str]:
    """What cannot fit, and what would; one line each."""
    kept = 0
    for need in needs:
        if kept + need.disk + need.working_disk > machine.disk:
            found = f"{need.stage} needs {show_bytes(kept + need.disk + need.working_disk)} of disk"
            yield f"{found} with the stages before it, {show_bytes(machine.disk)} are free; {_less_disk(needs)}"
            break
        kept += need.disk
    for need in needs:
        for what, wanted, free in (
            ("memory", need.memory, machine.memory),
            ("GPU memory", need.gpu_memory, machine.gpu_memory),
        ):
            if wanted > free:
                yield (
                    f"{need.stage} needs {show_bytes(wanted)} of {what}, {show_bytes(free)} are free; "
                    + _LESS_MEMORY[need.stage]
                )


_LESS_MEMORY = {
    "prepare": "give less text (prepare.max_tokens)",
    "datastore": "set a smaller datastore.batch_blocks, or an index of fewer bytes a key, "
    "such as datastore.index=IVF4096,PQ64",
    "targets": "set a smaller targets.batch_blocks, or an index of fewer bytes a key",
    "eval": "set a smaller eval.batch_blocks",
    **{
        stage: f"set a smaller {stage}.batch_blocks or block_size, or take a smaller model"
        for stage in ("adapt", "train", "control")
    },
}


def _less_disk(needs: list[Need]) -> str:
    largest = max(needs, key=lambda need: need.disk + need.working_disk).stage
    return {
        "datastore": "set datastore.keep_keys=false and an index such as IVF4096,PQ64",
        "targets": "set targets.max_entries=32 (of kept neighbours a smaller k), or "
        "targets.source=teacher",
    }.get(largest, f"most is {largest}'s: take a smaller model or more disk")


def _print_table(needs: list[Need], corpus: Corpus, machine: Machine) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    known = "about " if corpus.estimated else ""
    table = Table(
        title=f"{known}{corpus.train:,} train and {corpus.held_out:,} held-out tokens",
        caption=f"free: {show_bytes(machine.disk)} of disk, {show_bytes(machine.memory)} of memory, "
        f"{show_bytes(machine.gpu_memory)} of GPU memory; times are rough",
        box=SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for header in ("disk", "while running", "memory", "GPU", "time"):
        table.add_column(header, justify="right", no_wrap=True)
    total = Need("all", sum(n.disk for n in needs), 0, 0, sum(n.seconds for n in needs))
    for need in [*needs, total]:
        sizes = (need.disk, need.working_disk, need.memory, need.gpu_memory)
        table.add_row(
            need.stage,
            *(show_bytes(size) if size else "" for size in sizes),
            _duration(need.seconds),
        )
    console = Console()
    console.print(table)
    for need in needs:
        if need.note:
            console.print(f"{need.stage}: {need.note}", highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
