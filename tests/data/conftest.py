from __future__ import annotations

from pathlib import Path

import pytest
from data_tiny import documents, run_stage, write_corpus, write_model

from memdec.data.corpus import TokenCorpus


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """All tests of this folder."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with corpus/, model/ (with its tokenizer) and tokens/."""
    directory = tmp_path_factory.mktemp("tiny")
    write_corpus(directory / "corpus", documents(60))
    write_model(directory / "model")
    values = {"tokenizer": str(directory / "model"), "corpus": directory / "corpus"}
    values |= {"validation_fraction": 0.1, "test_fraction": 0.1}
    run_stage("prepare", values, directory / "tokens")
    return directory


@pytest.fixture(scope="session")
def corpus(tiny: Path) -> TokenCorpus:
    return TokenCorpus.open(tiny / "tokens")


@pytest.fixture(scope="session")
def datastore_dir(tiny: Path) -> Path:
    """An exact datastore of the tiny corpus, block size 32."""
    values = {"model": str(tiny / "model"), "tokens": tiny / "tokens", "block_size": 32}
    run_stage("datastore", {**values, "device": "cpu"}, tiny / "datastore")
    return tiny / "datastore"
