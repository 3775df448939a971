"""memdec plan: its sizes are those of the real thing, and what cannot fit is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from memdec import plan as plan_module
from memdec.build import BuildConfig
from memdec.build import plan as plan_steps
from memdec.errors import MemdecError
from memdec.modeling.loading import load_shape
from memdec.modeling.memory_init import initial_memory
from memdec.plan import count_tokens, misfits, plan
from memdec.plan.machine import Machine
from memdec.plan.needs import Corpus, Need, Shape, _shape, estimate

needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="no FAISS")

GB = 10**9
CPU = Machine("cpu", 10**12, 64 * GB, 0, {"float32": 1e11, "bfloat16": 1e11, "host": 1e11})
GPU = Machine("cuda", 10**13, 10**12, 80 * GB, {"float32": 5e13, "bfloat16": 6e14, "host": 1e12})


def config(tiny, *settings: str, **other) -> BuildConfig:
    given = ("prepare.documents=line", "prepare.validation_fraction=0.15")
    given += ("prepare.test_fraction=0.3", "targets.k=16", *settings)
    return BuildConfig(
        base=tiny.model, corpus=tiny.corpus, block_size=tiny.block_size, set=given, **other
    )


def needs(
    tiny, *settings: str, corpus: Corpus | None = None, machine: Machine = CPU
) -> dict[str, Need]:
    recipe = config(tiny, *settings).to_recipe()
    steps = {step.name: step for step in plan_steps(recipe, Path("out"))}
    corpus = corpus or count_tokens(steps["prepare"].config, tiny.tokens.parent / "none")
    return {n.stage: n for n in estimate(steps, tiny.model, tiny.model, corpus, machine)}


def on_disk(path: Path, *kinds: str) -> int:
    return sum(file.stat().st_size for kind in kinds for file in path.rglob(kind))


def finished(tiny) -> Corpus:
    from memdec.data.corpus import TokenCorpus

    splits = TokenCorpus.open(tiny.tokens).artefact.manifest["splits"]
    held_out = splits["validation"]["tokens"] + splits["test"]["tokens"]
    return Corpus(splits["train"]["tokens"] - 1, held_out, 0, estimated=False)


def test_tokens_are_estimated_from_the_text(tiny):
    steps = plan_steps(config(tiny).to_recipe(), Path("out"))
    found, real = count_tokens(steps[0].config, tiny.tokens.parent / "none"), finished(tiny)
    assert found.estimated
    assert found.train + found.held_out == pytest.approx(real.train + real.held_out, rel=0.02)
    assert found.train == pytest.approx(real.train, rel=0.1)


def test_tokens_that_are_there_are_counted(tiny, tmp_path):
    (tmp_path / "prepare").symlink_to(tiny.tokens)
    steps = plan_steps(config(tiny).to_recipe(), tmp_path)
    assert count_tokens(steps[0].config, tmp_path) == finished(tiny)


def test_the_disk_is_what_the_stages_write(tiny):
    found = needs(tiny, corpus=finished(tiny))
    header = 200
    assert found["prepare"].disk == pytest.approx(
        on_disk(tiny.tokens, "*-?????.npy"), abs=4 * header
    )
    written = on_disk(tiny.datastore, "*.npy")
    assert found["datastore"].disk == pytest.approx(written, abs=2 * header)
    written = on_disk(tiny.targets, "*.safetensors")
    assert written - 1000 <= found["targets"].disk <= 6 * written


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_disk_of_kept_neighbours(tiny, tmp_path, dtype):
    from memdec.data.targets import TargetsConfig, targets

    kept = {"keep": "neighbours", "distance_dtype": dtype, "k": 16, "temperature": 1.0}
    given = {"datastore": tiny.datastore, "tokens": tiny.tokens, "device": "cpu"}
    targets(TargetsConfig(**given, **kept), tmp_path)
    settings = ("targets.keep=neighbours", f"targets.distance_dtype={dtype}")
    found = needs(tiny, *settings, corpus=finished(tiny))["targets"]
    header = 500
    assert found.disk == pytest.approx(on_disk(tmp_path, "*.safetensors"), abs=header)
    assert found.note == "16 neighbours a row"


def test_texts_outside_the_domain_are_counted(tiny):
    path = str(tiny.corpus)
    without = needs(tiny)["eval"]
    found = needs(tiny, f"eval.outside=[one={path}, two={path}]")["eval"]
    assert found.seconds == pytest.approx(2 * without.seconds, rel=0.01)
    assert found.note == "2 of its 4 passes a model are outside the domain"


@needs_faiss
@pytest.mark.parametrize("spec", ["IVF8,SQfp16", "IVF16,PQ4x4", "IVF8,Flat", "HNSW8"])
def test_the_disk_of_an_index_and_no_keys(tiny, tmp_path, spec):
    from memdec.data.datastore import DatastoreConfig, datastore

    settings = {"index": spec, "keep_keys": False, "block_size": tiny.block_size, "device": "cpu"}
    datastore(DatastoreConfig(model=tiny.model, tokens=tiny.tokens, **settings), tmp_path)
    settings = (f"datastore.index={spec}", "datastore.keep_keys=false")
    found = needs(tiny, *settings, corpus=finished(tiny))["datastore"].disk
    written = on_disk(tmp_path, "index.faiss", "next_tokens.npy")
    assert found == pytest.approx(written, rel=0.05, abs=2000)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_memory_of_fewer_layers(tiny, layers):
    shape, in_layers = _shape(tiny.model)
    memory = initial_memory(tiny.model, layers=layers)
    found = shape.of_layers(layers, in_layers)
    real = sum(weight.numel() for weight in memory.parameters())
    config = memory.config
    assert found == Shape(
        real, layers, config.hidden_size, config.vocab_size, config.max_position_embeddings
    )


def test_a_memory_is_cut_from_a_model_that_was_read_whole(tiny):
    """On a GPU, whose host holds weights alone, the model and its part are there at once."""
    shape, in_layers = _shape(tiny.model)
    of_one = shape.of_layers(1, in_layers).parameters
    cut = needs(tiny, "train.memory_layers=1", machine=GPU)["train"].memory
    whole = needs(tiny, machine=GPU)["train"].memory
    assert cut - whole == 4 * of_one > 0


def test_a_shape_has_no_weights(tiny):
    assert {weight.device for weight in load_shape(tiny.model).parameters()} == {
        torch.device("meta")
    }


@needs_faiss
def test_the_index_it_would_choose_and_why(tiny):
    few = needs(tiny, corpus=Corpus(10**6, 10**4, 0, False))["datastore"]
    many = needs(tiny, corpus=Corpus(10**7, 10**4, 0, False))["datastore"]
    asked = needs(tiny, "datastore.index=IVF64,Flat", corpus=Corpus(10**6, 10**4, 0, False))
    assert few.note == "index Flat: 1,000,000 keys, exact up to a million"
    assert many.note == "index IVF16384,SQfp16: 10,000,000 keys, exact up to a million"
    assert asked["datastore"].note == "index IVF64,Flat: asked for"


def test_exact_search_costs_the_square_of_the_tokens(tiny):
    once, twice = (
        needs(tiny, corpus=Corpus(size, 100, 0, False))["targets"] for size in (250_000, 500_000)
    )
    assert twice.seconds == pytest.approx(4 * once.seconds, rel=0.01)
    assert twice.disk == 2 * once.disk


def test_a_gpu_takes_what_the_host_would(tiny):
    corpus = Corpus(500_000, 100, 0, False)
    host, gpu = (needs(tiny, corpus=corpus, machine=machine) for machine in (CPU, GPU))
    for name in ("adapt", "datastore", "targets", "train"):
        assert host[name].gpu_memory == 0
        # The host has CUDA to hold, and nothing of what the GPU holds.
        assert gpu[name].memory - (1 << 30) < host[name].memory
        assert gpu[name].gpu_memory > 1 << 30
        assert gpu[name].seconds < host[name].seconds


def test_the_targets_of_the_teacher_need_no_search(tiny):
    recipe = config(tiny, "targets.source=teacher", "targets.top_m=16", "targets.k=1024")
    steps = {step.name: step for step in plan_steps(recipe.to_recipe(), Path("out"))}
    corpus = Corpus(500_000, 100, 0, False)
    found = {n.stage: n for n in estimate(steps, tiny.model, tiny.model, corpus, CPU)}
    assert "datastore" not in found
    assert found["targets"].note == "at most 16 entries a row"
    assert found["targets"].seconds < needs(tiny, corpus=corpus)["targets"].seconds


def test_what_cannot_fit(tiny):
    found = list(needs(tiny, corpus=Corpus(10**6, 100, 0, False)).values())
    assert list(misfits(found, CPU)) == []
    (line,) = misfits(found, dataclasses.replace(CPU, disk=100_000_000))
    assert re.fullmatch(
        r"targets needs \d+\.\d MB of disk with the stages before it, 100\.0 MB are free; "
        r"set targets.max_entries=32 \(of kept neighbours a smaller k\), or targets.source=teacher",
        line,
    )
    lines = list(misfits(found, dataclasses.replace(CPU, memory=GB)))
    assert re.match(r"adapt needs 1\.\d GB of memory, 1\.0 GB are free; set a smaller", lines[0])
    assert [text.split()[0] for text in lines] == ["adapt", "datastore", "targets", "train", "eval"]


def test_gpu_memory_that_is_too_small(tiny):
    machine = dataclasses.replace(GPU, gpu_memory=2 * GB)
    found = needs(tiny, corpus=Corpus(500_000, 100, 0, False), machine=machine)
    (line,) = (text for text in misfits(list(found.values()), machine) if "targets" in text)
    assert "of GPU memory, 2.0 GB are free" in line


def test_the_command(tiny, tmp_path, memdec, monkeypatch):
    recipe = tmp_path / "given.yaml"
    recipe.write_text("prepare: {documents: line}\ntargets: {k: 16}\nblock_size: 32\ndevice: cpu\n")
    given = ["--base", tiny.model, "--corpus", tiny.corpus, "--recipe", recipe]
    result = memdec("plan", *given, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "fits" in result.stderr
    for stage in ("prepare", "adapt", "datastore", "targets", "train", "eval"):
        assert stage in result.stdout
    assert not (tmp_path / "out").exists()
    small = dataclasses.replace(CPU, memory=10**6)
    monkeypatch.setattr(plan_module, "measure_machine", lambda *_: small)
    result = memdec("plan", *given, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "does not fit: adapt needs" in result.stderr


@needs_faiss
def test_the_command_with_an_index(tiny, tmp_path, memdec):
    """The measured machine has every rate that the arithmetic asks for."""
    given = ["--base", tiny.model, "--corpus", tiny.corpus, "--out", tmp_path / "out"]
    given += ["--set", "prepare.documents=line", "--block-size", 32, "--device", "cpu"]
    result = memdec("plan", *given, "--set", "datastore.index=IVF8,Flat")
    assert result.exit_code == 0, result.output
    assert "index IVF8,Flat: asked for" in result.stdout


@needs_faiss
@pytest.mark.parametrize("source", ["knn", "mixture"])
def test_a_gpu_search_beside_the_teacher(tiny, monkeypatch, source):
    """What the teacher holds is not there for the copy; the plan says which of them gives way."""
    monkeypatch.setattr("memdec.data.faiss_gpu.takes", lambda *_: True)
    corpus = Corpus(10**7, 100, 0, False)
    settings = {"knn": (), "mixture": ("targets.source=mixture", "targets.batch_blocks=4096")}[
        source
    ]
    roomy = dataclasses.replace(GPU, faiss_gpus=(0,))
    found = needs(tiny, *settings, corpus=corpus, machine=roomy)["targets"]
    assert found.note.endswith("a row; FAISS searches a copy on the GPU")
    alone = needs(tiny, *settings, corpus=corpus, machine=GPU)["targets"]
    assert alone.note.endswith("FAISS searches on the CPU: the one installed has no GPU")
    copy = found.gpu_memory - alone.gpu_memory
    assert copy > 10**7 * 2 * 32
    tight = dataclasses.replace(roomy, gpu_memory=copy + (1 << 30))
    found = needs(tiny, *settings, corpus=corpus, machine=tight)["targets"]
    assert ("a copy needs" in found.note) == (source == "mixture")
    assert found.gpu_memory <= max(tight.gpu_memory, alone.gpu_memory)


@needs_faiss
def test_copies_that_are_left_out_need_more_neighbours(tiny, monkeypatch):
    monkeypatch.setattr("memdec.data.faiss_gpu.takes", lambda *_: True)
    machine = dataclasses.replace(GPU, faiss_gpus=(0,))
    corpus = Corpus(10**7, 100, 0, False)
    for setting, note in (("targets.k=1800", "a copy"), ("targets.drop_same_context=8", "2267")):
        given = ("targets.k=1800", setting)
        assert note in needs(tiny, *given, corpus=corpus, machine=machine)["targets"].note


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("targets.k=5000",), r"targets: k is 5,000, there are [\d,]+ train tokens"),
        (("prepare.max_tokens=40",), r"block_size is 32, there are [\d,]+ train tokens"),
        (("train.memory_layers=4",), "train: memory_layers is 4, the teacher has 3"),
        (("prepare.documents=file",), "has 1 distinct documents .* at least 3 are needed"),
    ],
)
def test_what_a_stage_would_refuse_later(tiny, settings, message):
    with pytest.raises(MemdecError, match=message):
        plan(config(tiny, *settings, device="cpu"), Path("out"))


def test_blocks_longer_than_the_context(tiny):
    given = dataclasses.replace(config(tiny), block_size=65)
    with pytest.raises(MemdecError, match="block_size is 65, the teacher's context 64"):
        plan(given, Path("out"))


def test_a_directory_of_something_else(tiny, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(MemdecError, match=r"holds thesis\.tex, which is not of this command"):
        plan(config(tiny), tmp_path)


def test_keys_that_an_exact_index_needs(tiny):
    with pytest.raises(MemdecError, match="get the index Flat, which needs them kept"):
        plan(config(tiny, "datastore.keep_keys=false", device="cpu"), Path("out"))
