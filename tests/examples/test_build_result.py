"""What the examples keep of a build, the tables they print of it and the pictures they draw."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from memdec.build import BuildConfig, build

EXAMPLES = Path(__file__).parents[2] / "examples"


def script(name: str, *arguments: object) -> str:
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def kept(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kept")
    (root / "else.txt").write_text("w1 w3 w2 w50 w9 " * 20)
    settings = ("prepare.documents=line", "targets.k=16", "adapt.epochs=1", "train.epochs=1")
    shares = ("prepare.validation_fraction=0.15", "prepare.test_fraction=0.3")
    outside = (f"eval.outside=[else={root / 'else.txt'}]", "eval.bootstrap=50")
    given = (*settings, *shares, *outside)
    config = BuildConfig(
        base=tiny.model, corpus=tiny.corpus, block_size=32, device="cpu", set=given
    )
    build(config, root / "out")
    script("collect.py", root / "out", root / "result.json")
    return root / "result.json"


def test_the_printed_tables_are_those_of_the_page(kept: Path) -> None:
    page = (kept.parent / "out" / "report.html").read_text()
    lines = script("table.py", kept).splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 2 * (1 + 6)
    for row in rows:
        tag = "th" if row.startswith("|  |") else "td"
        cells = row.removeprefix("| ").removesuffix(" |").split(" | ")
        assert "".join(f"<{tag}>{cell.strip()}</{tag}>" for cell in cells) in page


def test_the_pictures(kept: Path) -> None:
    script("pictures.py", kept, kept.parent / "some")
    names = ["frequency", "lmbda", "outside", "passage", "training"]
    drawn = sorted(kept.parent.glob("some-*.svg"))
    assert [path.name for path in drawn] == [f"some-{name}.svg" for name in names]
    for path in drawn:
        assert path.read_text().startswith("<svg")
        assert "currentColor" not in path.read_text()
    tokens = json.loads(kept.read_text())["passage"]["tokens"]
    assert f"{tokens[1]}</text>" in drawn[3].read_text()
