"""The whole pipeline with a real base, SmolLM2-135M, on text that every CPython has.

    MEMDEC_SMOLLM2_GGUF=SmolLM2-135M-Instruct.Q4_1.gguf pytest -m real_weights tests/test_real_weights.py

Minutes on two cores: the corpus is cut to a few thousand tokens, so it shows that every stage works
on real weights, not what a memory gains (docs/wordnet.md).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memdec.build import BuildConfig, build
from memdec.demo.text import topics


@pytest.mark.real_weights
@pytest.mark.timeout(1800)
def test_every_stage_on_a_real_base(smollm2: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, text in topics().items():
        (corpus / f"{name}.txt").write_text(text)
    settings = (
        "prepare.max_tokens=8000",
        "prepare.test_fraction=0.1",
        "prepare.validation_fraction=0.1",
        "datastore.batch_blocks=2",
        "targets.k=64",
        "targets.calibration_positions=256",
        "train.epochs=3",
        "train.batch_blocks=1",
        "train.learning_rate=3e-4",
    )
    out = tmp_path / "out"
    build(
        BuildConfig(
            base=str(smollm2),
            corpus=corpus,
            adapt=False,
            memory_layers=6,
            block_size=128,
            device="cpu",
            set=settings,
        ),
        out,
    )
    rows = {row["name"]: row for row in json.loads((out / "eval/eval.json").read_text())["rows"]}
    assert rows["kNN-LM"]["perplexity"] < rows["base"]["perplexity"]
    assert rows["joint"]["perplexity"] < rows["base"]["perplexity"]
    assert (out / "report.html").stat().st_size > 10_000
