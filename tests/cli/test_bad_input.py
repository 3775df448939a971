"""Bad input: one clear line, exit status 1, nothing half-written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result


def refused(result: Result, out: Path, *expected: str) -> str:
    """Checks the one line and that `out` is not there; returns the line."""
    assert result.exit_code == 1, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == result.stderr.splitlines()[-1:]
    assert "Traceback" not in result.output
    for text in expected:
        assert text in errors[0]
    assert not out.exists()
    return errors[0]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def build(memdec: Callable[..., Result], tiny, out: Path) -> Callable[..., Result]:
    def run(corpus: Path, *arguments: object, base: str = tiny.model) -> Result:
        return memdec("build", "--base", base, "--corpus", corpus, "--out", out, *arguments)

    return run


def test_an_empty_corpus(build, out, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(build(tmp_path / "empty"), out, str(tmp_path / "empty"))
    (tmp_path / "empty" / "a.txt").write_text("  \n")
    refused(build(tmp_path / "empty"), out, str(tmp_path / "empty"))


def test_a_corpus_that_is_not_there(build, out, tmp_path):
    refused(build(tmp_path / "none"), out, str(tmp_path / "none"))


@pytest.mark.parametrize("content", [b"text \0 and more", b"text \xff\xfe and more"])
def test_a_file_that_is_not_text(build, out, tmp_path, content):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("words " * 50)
    (tmp_path / "docs" / "b.txt").write_bytes(content)
    refused(build(tmp_path / "docs"), out, "b.txt")


def test_a_corpus_shorter_than_one_block(memdec, tiny, out):
    result = memdec(
        *("adapt", "--model", tiny.model, "--tokens", tiny.tokens),
        *("--block-size", 100_000, "--device", "cpu", "--out", out),
    )
    refused(result, out, "100000", "block")


def test_a_model_that_is_not_there(build, tiny, out, tmp_path):
    refused(build(tiny.corpus, base=str(tmp_path / "none")), out, str(tmp_path / "none"))


def test_a_model_that_is_broken(build, tiny, out, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    refused(build(tiny.corpus, base=str(tmp_path / "broken")), out, str(tmp_path / "broken"))


def other_tokenizer(path: Path) -> Path:
    from memdec.demo.model import fresh_base, train_tokenizer

    tokenizer = train_tokenizer(["some other words"], 300)
    tokenizer.save_pretrained(path)
    fresh_base(tokenizer, layers=1, width=16, context=64, seed=0).save_pretrained(path)
    return path


def test_tokenizers_that_differ(memdec, tiny, out, tmp_path):
    other = other_tokenizer(tmp_path / "other")
    common = ("--tokens", tiny.tokens, "--block-size", 32, "--device", "cpu", "--out", out)
    refused(memdec("adapt", "--model", other, *common), out, str(other))
    refused(
        memdec("datastore", "--model", other, *common),
        out,
        "tokenizers of the tokens and the teacher",
    )
    evaluated = memdec("eval", "--base", tiny.model, "--memory", other, *common)
    refused(evaluated, out, "the tokenizers of memory and the tokens differ")


def test_a_full_disk(build, tiny, out, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = build(tiny.corpus, "--set", "prepare.documents=line")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: the disk is full: ")
    assert not list(out.rglob("*.tmp"))


def test_an_out_directory_of_another_run(memdec, tiny, tmp_path):
    out = tmp_path / "out"
    common = ("--tokens", tiny.tokens, "--datastore", tiny.datastore, "--device", "cpu")
    first = memdec("targets", *common, "--temperature", 1, "--k", 4, "--out", out)
    assert first.exit_code == 0, first.output
    before = (out / "manifest.json").read_bytes()
    again = memdec("targets", *common, "--temperature", 2, "--k", 4, "--out", out)
    assert again.exit_code == 1
    assert "option temperature = 1.0, this run has 2.0" in again.stderr
    assert (out / "manifest.json").read_bytes() == before
    other = memdec("datastore", "--model", tiny.model, "--tokens", tiny.tokens, "--out", out)
    assert other.exit_code == 1
    assert other.stderr.startswith("error: ")


def test_a_changed_input_is_refused_with_both_fingerprints(memdec, tiny, out, tmp_path):
    other = tmp_path / "tokens"
    prepared = memdec(
        *("prepare", "--tokenizer", tiny.model, "--corpus", tiny.corpus),
        *("--documents", "line", "--seed", 1, "--out", other),
    )
    assert prepared.exit_code == 0, prepared.output
    result = memdec(
        *("targets", "--tokens", other, "--datastore", tiny.datastore, "--k", 4),
        *("--temperature", 1, "--out", out),
    )
    from memdec.data.artefact import Artefact

    wanted, found = (Artefact.open(path, "tokens").fingerprint for path in (tiny.tokens, other))
    refused(result, out, wanted[:12], found[:12])


def test_k_larger_than_the_datastore(memdec, tiny, out):
    common = ("--tokens", tiny.tokens, "--datastore", tiny.datastore, "--temperature", 1)
    result = memdec("targets", *common, "--k", 1_000_000, "--out", out)
    refused(result, out, "k must be at most", "1000000")


@pytest.mark.parametrize("lmbda", ["1.5", "-0.1", "nan"])
def test_a_lmbda_outside_its_range(memdec, tiny, out, lmbda):
    common = ("--tokens", tiny.tokens, "--base", tiny.model, "--memory", tiny.model)
    result = memdec("eval", *common, "--lmbda", lmbda, "--out", out)
    refused(result, out, "lmbda must be in [0, 1], got")


def test_a_text_outside_without_a_name(memdec, build, tiny, out):
    common = ("--tokens", tiny.tokens, "--base", tiny.model, "--memory", tiny.model)
    evaluated = memdec("eval", *common, "--outside", "text.txt", "--out", out)
    refused(evaluated, out, "outside must be NAME=PATH", "got 'text.txt'")
    built = build(tiny.corpus, "--set", "eval.outside=text.txt")
    refused(built, out, "eval: outside must be a list [NAME=PATH, ...], got 'text.txt'")


@pytest.mark.parametrize("seed", [-1, 1 << 32])
@pytest.mark.parametrize("command", ["prepare", "datastore", "audit", "eval"])
def test_a_seed_that_numpy_does_not_take(memdec, tiny, out, command, seed):
    """Found out before hours of work, not where the seed is used."""
    given = {
        "prepare": ("--tokenizer", tiny.model, "--corpus", tiny.corpus, "--out", out),
        "datastore": ("--tokens", tiny.tokens, "--model", tiny.model, "--out", out),
        "audit": ("--tokens", tiny.tokens, "--targets", tiny.targets),
        "eval": (
            "--tokens",
            tiny.tokens,
            "--base",
            tiny.model,
            "--memory",
            tiny.model,
            "--out",
            out,
        ),
    }[command]
    refused(memdec(command, *given, "--seed", seed), out, f"seed must be in [0, {1 << 32})")


@pytest.mark.parametrize("device", ["meta", "mps", "gpu", ""])
def test_a_device_that_is_none(memdec, tiny, out, device):
    given = ("--tokens", tiny.tokens, "--model", tiny.model, "--block-size", 32, "--out", out)
    refused(memdec("datastore", *given, "--device", device), out, "device must be auto, cpu, cuda")


def test_an_unfinished_or_missing_input(memdec, tiny, out, tmp_path):
    result = memdec("datastore", "--model", tiny.model, "--tokens", tmp_path, "--out", out)
    refused(result, out, str(tmp_path))


def test_a_real_process_ends_alike(tmp_path):
    out = tmp_path / "out"
    command = ["prepare", "--tokenizer", "/no/model", "--corpus", str(tmp_path), "--out", str(out)]
    run = subprocess.run(
        [sys.executable, "-m", "memdec", *command], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: ")
    assert "/no/model" in line
    assert not out.exists()
