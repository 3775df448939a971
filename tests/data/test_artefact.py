"""A stage's directory: whole files, honest records, and no moment at which a kill does harm."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_tiny import contents

from memdec.data.artefact import LOCK, Artefact, clear_disk_errors, fingerprint, joined_stage, stage
from memdec.errors import MemdecError

PARAMS = {"k": 3, "spec": None}
INPUTS = {"tokens": fingerprint("tokens")}


def write_all(path: Path, params: dict = PARAMS, inputs: dict = INPUTS) -> None:
    """A stage with two files, a note, a directory and a manifest field."""
    with stage(path, "example", params, inputs) as writer:
        if writer.finished:
            return
        for number in range(2):
            name = f"shards/part-{number}.bin"
            if not writer.has(name):
                writer.write(name, lambda file, number=number: file.write(bytes([number]) * 1000))
        if writer.note("choice") is None:
            writer.set_note("choice", 0.25)
        if not writer.has_directory("model"):
            writer.write_directory("model", write_model)
        writer.finish(choice=writer.note("choice"))


def write_model(directory: Path) -> None:
    (directory / "config.json").write_text("{}")
    (directory / "inner").mkdir()
    (directory / "inner" / "weights.bin").write_bytes(b"weights")


def change(path, place, value):
    """Puts a value into the manifest by hand."""
    manifest = json.loads((path / "manifest.json").read_text())
    *outer, last = place
    within = manifest
    for name in outer:
        within = within[name]
    within[last] = value
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_finished_stage_is_opened_with_its_manifest(tmp_path):
    write_all(tmp_path / "out")
    artefact = Artefact.open(tmp_path / "out", "example")
    assert artefact.manifest["choice"] == 0.25
    assert artefact.manifest["params"] == PARAMS
    assert artefact.manifest["inputs"] == INPUTS
    assert sorted(artefact.manifest["files"]) == [
        "model/config.json",
        "model/inner/weights.bin",
        "shards/part-0.bin",
        "shards/part-1.bin",
    ]
    assert artefact.file("shards/part-1.bin").read_bytes() == b"\1" * 1000


def test_a_finished_stage_is_not_written_again(tmp_path):
    write_all(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"}
    write_all(tmp_path)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"}
    assert before == after


def test_the_same_request_elsewhere_has_the_same_bytes_and_fingerprint(tmp_path):
    write_all(tmp_path / "a")
    write_all(tmp_path / "b" / "c")
    assert contents(tmp_path / "a") == contents(tmp_path / "b" / "c")
    first, second = (Artefact.open(tmp_path / name, "example") for name in ("a", "b/c"))
    assert first.fingerprint == second.fingerprint


def test_the_fingerprint_follows_content_and_parameters(tmp_path):
    write_all(tmp_path / "a")
    write_all(tmp_path / "b", params={**PARAMS, "k": 4})
    with stage(tmp_path / "c", "example", PARAMS, INPUTS) as writer:
        writer.write("shards/part-0.bin", lambda file: file.write(b"other"))
        writer.finish(choice=0.25)
    prints = {Artefact.open(tmp_path / name, "example").fingerprint for name in "abc"}
    assert len(prints) == 3


@pytest.mark.parametrize("finish", [True, False])
def test_another_option_or_input_is_refused_with_both_values(tmp_path, finish):
    if finish:
        write_all(tmp_path)
    else:
        with stage(tmp_path, "example", PARAMS, INPUTS) as writer:
            writer.write("one", lambda file: file.write(b"1"))
    with pytest.raises(MemdecError, match=r"option k = 3, this run has 4"):
        write_all(tmp_path, params={**PARAMS, "k": 4})
    other = fingerprint("other tokens")
    message = f"input tokens = {INPUTS['tokens'][:12]}, this run has {other[:12]}"
    with pytest.raises(MemdecError, match=message):
        write_all(tmp_path, inputs={"tokens": other})
    with (
        pytest.raises(MemdecError, match="kind example, this run has other"),
        stage(tmp_path, "other", PARAMS, INPUTS),
    ):
        pass


def test_a_directory_with_something_else_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(MemdecError, match=r"not empty.*thesis\.txt"):
        write_all(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(MemdecError, match="cannot make the directory"):
        write_all(tmp_path / "out")


def test_two_writers_at_once_are_refused(tmp_path):
    with (
        stage(tmp_path, "example", PARAMS, INPUTS),
        pytest.raises(MemdecError, match="another process"),
        stage(tmp_path, "example", PARAMS, INPUTS),
    ):
        pass


def test_a_refusal_before_anything_was_finished_leaves_nothing(tmp_path):
    with pytest.raises(MemdecError), stage(tmp_path / "out", "example", PARAMS, INPUTS):
        raise MemdecError("k is too large")
    assert not (tmp_path / "out").exists()
    write_all(tmp_path / "out", params={**PARAMS, "k": 1})


def test_a_refusal_is_told_where_the_directory_is_a_link(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").symlink_to("scratch")
    with (
        pytest.raises(MemdecError, match="bad"),
        stage(tmp_path / "out", "example", PARAMS, INPUTS),
    ):
        raise MemdecError("bad input")
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_is_one_clear_line_and_the_rerun_keeps_what_was_finished(tmp_path):
    def full(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill() -> None:
        with stage(tmp_path, "example", PARAMS, INPUTS) as writer:
            writer.write("shards/part-0.bin", lambda file: file.write(bytes(1000)))
            writer.write("shards/part-1.bin", full)

    with pytest.raises(MemdecError, match=r"the disk is full: .*part-1\.bin could not be written"):
        fill()
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["part-0.bin"]
    kept = (tmp_path / "shards" / "part-0.bin").stat().st_mtime_ns
    write_all(tmp_path)
    assert (tmp_path / "shards" / "part-0.bin").stat().st_mtime_ns == kept


def test_what_numpy_says_of_a_full_disk_is_understood(tmp_path):
    """It writes arrays itself and says how many numbers are missing, and not why."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with (
        pytest.raises(MemdecError, match=r"the disk is full: .*keys\.npy could not be written"),
        clear_disk_errors(tmp_path / "keys.npy"),
        open("/dev/full", "wb") as full,
    ):
        np.save(full, np.zeros(10**6))


def test_a_failed_directory_leaves_no_part_of_it(tmp_path):
    def failing(directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        raise ValueError("no weights")

    with (
        pytest.raises(ValueError, match="no weights"),
        stage(tmp_path, "example", PARAMS, INPUTS) as writer,
    ):
        writer.write_directory("model", failing)
    assert not list(tmp_path.glob("model*"))


@pytest.mark.parametrize("change", ["cut", "remove"])
def test_a_cut_or_missing_file_is_named(tmp_path, change):
    write_all(tmp_path)
    path = tmp_path / "shards" / "part-1.bin"
    if change == "cut":
        path.write_bytes(b"\1" * 999)
    else:
        path.unlink()
    with pytest.raises(MemdecError, match=r"part-1\.bin .*its record says 1000") as error:
        Artefact.open(tmp_path, "example")
    assert str(error.value).endswith(f"; remove {tmp_path} and run the stage again")
    with pytest.raises(MemdecError, match=r"part-1\.bin"):
        write_all(tmp_path)


def test_opening_what_is_not_there_or_not_done_or_another_kind(tmp_path):
    with pytest.raises(MemdecError, match=r"expected a directory of example at .*, which is none"):
        Artefact.open(tmp_path / "nowhere", "example")
    with stage(tmp_path / "half", "example", PARAMS, INPUTS) as writer:
        writer.write("one", lambda file: file.write(b"1"))
    with pytest.raises(MemdecError, match="is unfinished: run its stage again"):
        Artefact.open(tmp_path / "half", "example")
    write_all(tmp_path / "done")
    with pytest.raises(MemdecError, match=r"expected a directory of other, .* is one of example"):
        Artefact.open(tmp_path / "done", "other")


def test_another_format_version_and_a_broken_manifest_are_named(tmp_path):
    write_all(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(MemdecError, match="has format 99"):
        Artefact.open(tmp_path, "example")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(MemdecError, match=r"manifest\.json cannot be read as JSON"):
        Artefact.open(tmp_path, "example")
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(MemdecError, match=r"manifest\.json holds no JSON object"):
        Artefact.open(tmp_path, "example")
    del manifest["files"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MemdecError, match=r"manifest\.json has no 'files'"):
        Artefact.open(tmp_path, "example")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("files",), [], "files must be a mapping, got []"),
        (("files", "shards/part-0.bin"), 3, "files.shards/part-0.bin must be a mapping, got 3"),
        (
            ("files", "shards/part-0.bin", "bytes"),
            "x",
            "files.shards/part-0.bin.bytes must be an integer, got 'x'",
        ),
        (
            ("files", "shards/part-0.bin", "sha256"),
            5,
            "files.shards/part-0.bin.sha256 must be text, got 5",
        ),
        (("params",), "none", "params must be a mapping, got 'none'"),
        (("inputs",), None, "inputs must be a mapping, got None"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(tmp_path, place, value, message):
    write_all(tmp_path)
    change(tmp_path, place, value)
    expected = re.escape(f"{tmp_path / 'manifest.json'}: {message}")
    with pytest.raises(MemdecError, match=expected):
        Artefact.open(tmp_path, "example")
    with pytest.raises(MemdecError, match=expected):
        write_all(tmp_path)


def test_a_field_is_read_as_its_type_or_named(tmp_path):
    write_all(tmp_path)
    artefact = Artefact.open(tmp_path, "example")
    assert artefact.field(float, "choice") == 0.25
    assert artefact.field(int, "params", "missing", default=3) == 3
    with pytest.raises(MemdecError, match=r"manifest\.json has no 'missing'"):
        artefact.field(int, "missing")
    with pytest.raises(MemdecError, match=r"manifest\.json: choice must be an integer, got 0\.25"):
        artefact.field(int, "choice")
    with pytest.raises(MemdecError, match=r"manifest\.json: choice must be a mapping, got 0\.25"):
        artefact.field(int, "choice", "within")


def test_files_that_changed_at_the_same_length_are_found(tmp_path):
    write_all(tmp_path)
    artefact = Artefact.open(tmp_path, "example")
    assert artefact.changed_files() == []
    (tmp_path / "shards" / "part-1.bin").write_bytes(b"\1" * 500 + b"\0" + b"\1" * 499)
    assert Artefact.open(tmp_path, "example").changed_files() == ["shards/part-1.bin"]


def test_a_manifest_holds_no_time_and_no_place(tmp_path):
    write_all(tmp_path)
    text = (tmp_path / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert "seconds" not in text
    assert json.loads((tmp_path / "timing.json").read_text())["seconds"] >= 0


# Between two calls that change the directory it stays as it is, so a kill before each is every kill.

_CALLS = ("replace", "fsync", "unlink", "rename", "mkdir", "rmdir")


def _killed_at(path: Path, step: int) -> None:
    count = 0

    def counted(call: Callable) -> Callable:
        def run(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return run

    for name in _CALLS:
        setattr(os, name, counted(getattr(os, name)))
    write_all(path)


def test_a_kill_at_every_step_changes_nothing_in_the_end(tmp_path):
    write_all(tmp_path / "undisturbed")
    expected = contents(tmp_path / "undisturbed")
    step = 0
    while True:
        step += 1
        path = tmp_path / str(step)
        child = os.fork()
        if child == 0:
            _killed_at(path, step)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        write_all(path)
        assert contents(path) == expected, f"killed at step {step}"
    assert step > 20  # so many moments were tried


def test_a_directory_that_can_only_be_read(tmp_path):
    """A finished stage is, with another request it is refused, and nothing else can begin there.

    So it is where the directory is shared, and the lock another user's.
    """
    write_all(tmp_path / "done")
    (tmp_path / "done" / LOCK).unlink()
    for name in ("done", "empty"):
        (tmp_path / name / LOCK).mkdir(parents=True)  # whoever may write: this cannot be opened
    before = contents(tmp_path)
    with stage(tmp_path / "done", "example", PARAMS, INPUTS, shared=True) as writer:
        assert writer.finished
        with joined_stage(tmp_path / "done", 1) as other:
            assert other.finished
    with (
        pytest.raises(MemdecError, match="k"),
        stage(tmp_path / "done", "example", {**PARAMS, "k": 4}, INPUTS),
    ):
        pass
    with (
        pytest.raises(MemdecError, match=r"cannot write in .*empty: Is a directory"),
        stage(tmp_path / "empty", "example", PARAMS, INPUTS),
    ):
        pass
    assert contents(tmp_path) == before
