"""The parts of examples/gcide that read a run's work: cloze, bases, transfer, decoding; tiny."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from memdec import MemoryDecoderForCausalLM
from memdec.data.corpus import PrepareConfig, TokenCorpus, prepare
from memdec.modeling.loading import load_model

FOLDER = Path(__file__).parents[2] / "examples" / "gcide"
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MEMORY = "2 layers"
LOOP = {"batch_blocks": 4, "gradient_accumulation": 1, "learning_rate": 3.0e-3}
SETTINGS = {
    "block_size": 64,
    "positions": 1500,
    "adapt": {**LOOP, "epochs": 8},
    "datastore": {"index": "Flat"},
    "targets": {"teacher": {"source": "teacher", "top_m": 8, "batch_blocks": 4}},
    "train": LOOP,
    "rows": [
        {"name": MEMORY, "kind": "memory", "targets": "teacher", "layers": 2, "seconds": 1}
        | {"train": {"epochs": 4, "alpha": 0.5, "learning_rate": 3.0e-3}},
    ],
}
USES = {"water": "desert", "warmth": "north", "boars": "forest", "dye": "valley", "fish": "harbour"}


@dataclass(frozen=True)
class Place:
    """Where a tiny dictionary, its base and another tokenizer lie."""

    root: Path
    base: str
    tokens: Path
    outside: Path
    tokenizer: Path

    def run(self, part: str, *more: str) -> dict:
        settings = self.root / "settings.yaml"
        settings.write_text(yaml.safe_dump(SETTINGS))
        arguments = ["--base", self.base, "--tokens", self.tokens, "--settings", settings]
        arguments += ["--outside", f"WordNet={self.outside}", "--work", self.root / "work"]
        arguments += ["--memory", MEMORY, "--result", self.root / "parts.json"]
        arguments += ["--device", "cpu", *more]
        importlib.import_module(part).main([str(one) for one in arguments])
        return json.loads((self.root / "parts.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def _few_neighbours(gcide: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("lab.neighbours"), "KNN_K", 64)
        yield


def entry(generator: random.Random, number: int) -> tuple[str, str]:
    """An entry as GCIDE prints it, and as WordNet's glosses are written."""
    kinds = ("vessel", "garment", "weapon", "dance", "grain", "insect")
    use = generator.choice(list(USES))
    head = "".join(generator.choice(("ba", "ko", "ri", "tu", "len")) for _ in range(3)) + str(
        number
    )
    kind, size = generator.choice(kinds), generator.choice(("small", "large", "broad"))
    gloss = f"a {size} {kind} used for {use} in the {USES[use]}"
    return f"{head.title()} \\{head.title()}\\, n. [L. {head}us.] A{gloss[1:]}. See {kind}.", (
        f"{head}: {gloss}"
    )


def trained_tokenizer(lines: list[str], size: int) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("parts")
    generator = random.Random(0)
    entries, glosses = zip(*(entry(generator, number) for number in range(300)), strict=True)
    tokenizer = trained_tokenizer([*entries, *glosses], 420)
    base, other = root / "model", root / "tokenizer"
    tokenizer.save_pretrained(base)
    trained_tokenizer(list(entries)[:150], 360).save_pretrained(other)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=448,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(base)
    for name, lines in (("gcide", entries), ("wordnet", glosses)):
        corpus = root / f"{name}.txt"
        corpus.write_text("\n".join(lines) + "\n")
        shares = {"validation_fraction": 0.15, "test_fraction": 0.3}
        prepare(
            PrepareConfig(tokenizer=str(base), corpus=corpus, documents="line", **shares),
            root / name,
        )
    return Place(root, str(base), root / "gcide", root / "wordnet", other)


@pytest.fixture(scope="module")
def cloze(place: Place) -> dict:
    return place.run("cloze", "--questions", "200")["cloze"]


def test_every_text_has_its_tasks_and_each_model_an_accuracy(cloze: dict) -> None:
    tasks = {(one["text"], one["task"]) for one in cloze["tasks"]}
    assert {("test", "definition"), ("WordNet", "definition")} <= tasks
    assert {("test", "continuation"), ("WordNet", "last word")} <= tasks
    for one in cloze["tasks"]:
        for model in cloze["models"]:
            for found in one["models"][model].values():
                low, high = found["interval"]
                assert 0 <= low <= found["accuracy"] <= high <= 1
        assert one["models"]["base"]["plain"]["from_base"] == 0


def test_what_was_learned_shows_in_the_domain(cloze: dict) -> None:
    tasks = {(one["text"], one["task"]): one["models"] for one in cloze["tasks"]}
    found = tasks["test", "last word"]
    for name in ("DAPT", "joint", "joint, lmbda a token", "kNN-LM"):
        assert found[name]["plain"]["from_base_interval"][0] > 0


def test_scores_of_options_are_those_of_the_text_alone(place: Place, cloze: dict) -> None:
    """Neither padding, nor batches, nor the row's place may count."""
    module = importlib.import_module("cloze")
    question = importlib.import_module("lab.questions").Question
    model = load_model(place.base)
    corpus = TokenCorpus.open(place.tokens)
    tokenizer = corpus.tokenizer()
    asked = [
        question("Bakori", (" a small", " garment used", " in", " of the north"), 0),
        question("Riba \\Riba\\, n. A broad dance used", (" for", " x", " feasts", " y"), 1),
    ]
    sequences = module.Sequences.of(asked, tokenizer, corpus.separator_id)
    found = module.score_sequences(model, sequences, corpus.vocab_size)
    label = found.log_probs.reshape(sequences.scored.shape)
    row = 0
    for one in asked:
        for option in one.options:
            ids = [corpus.separator_id, *tokenizer.encode(one.prompt + option)]
            logits = model(torch.tensor([ids])).logits[0, :, : corpus.vocab_size]
            log_probs = logits.log_softmax(dim=1).tolist()
            count = len(ids) - 1 - len(tokenizer.encode(one.prompt))
            wanted = sum(log_probs[i - 1][ids[i]] for i in range(len(ids) - count, len(ids)))
            assert label[row][sequences.scored[row]].sum() == pytest.approx(wanted, rel=1e-4)
            assert sequences.scored[row].sum() == count
            assert sequences.characters[row] == len(option)
            row += 1


def test_questions_are_the_same_again_and_have_one_right_answer() -> None:
    module = importlib.import_module("lab.questions")
    generator = random.Random(1)
    entries = [entry(generator, number)[0] for number in range(100)]
    for task in module.TASKS:
        asked = module.make_questions(task, entries, 30)
        assert asked == module.make_questions(task, entries, 30)
        assert len(asked) == 30
        assert {one.answer for one in asked} == {0, 1, 2, 3}
        for one in asked:
            assert len(set(one.options)) == 4
            whole = one.prompt + one.options[one.answer]
            assert task == "definition" or any(whole in text for text in entries)
    definition = module.make_questions("definition", entries, 30)[0]
    assert definition.prompt.endswith("\\, n.")
    assert definition.options[0].startswith(" A ")


def test_an_accuracy_has_wilsons_interval_and_a_paired_difference() -> None:
    accuracy = importlib.import_module("cloze").accuracy
    correct, base = np.arange(100) < 30, np.arange(100) < 20
    found = accuracy(correct, base)
    assert found["accuracy"] == 0.3
    assert found["interval"] == pytest.approx([0.2189, 0.3958], abs=1e-4)
    assert found["from_base"] == pytest.approx(0.1)
    low, high = found["from_base_interval"]
    assert (low + high) / 2 == pytest.approx(0.1)
    assert high - low == pytest.approx(2 * 1.96 * 0.03)


def test_a_memory_helps_bases_it_has_not_seen(place: Place) -> None:
    found = place.run("bases")["bases"]
    names = [row["name"] for row in found["rows"]]
    assert names == ["base", "adapted copy", "2 of 3 layers", "2 of 3 layers", "bfloat16"] + [
        f"int{bits} weights" for bits in (8, 4, 3)
    ]
    for row in found["rows"]:
        assert row["joint"]["nll"] <= row["alone"]["nll"] + 1e-3
    assert found["rows"][0]["joint"]["nll"] < found["rows"][0]["alone"]["nll"] - 0.3


def test_rounding_leaves_few_values_and_is_near(place: Place) -> None:
    module = importlib.import_module("bases")
    model = load_model(place.base)
    weight = model.model.layers[0].mlp.down_proj.weight  # 64 inputs
    before, embeddings = weight.clone(), model.get_input_embeddings().weight.clone()
    module.round_weights(model, 2, 16)
    groups, old = weight.reshape(-1, 16), before.reshape(-1, 16)
    assert max(len(group.unique()) for group in groups) == 4
    step = (old.amax(1) - old.amin(1)) / 3
    assert ((groups - old).abs().amax(1) <= step / 2 + 1e-6).all()
    assert torch.equal(model.get_input_embeddings().weight, embeddings)


def test_a_memory_moves_to_another_tokenizer(place: Place) -> None:
    samples = ("--base-samples", "1", "32", "64")
    found = place.run("transfer", "--tokenizer", str(place.tokenizer), *samples)["transfer"]
    bits = {row["name"]: row["bits"] for row in found["rows"]}
    assert bits["means"] < bits["means, not trained"]
    assert bits["means"] < bits["random weights"]
    assert bits["means"] < bits["random embeddings and output"]
    assert found["tokens_seen"]["moved"] < 0.5 * found["tokens_seen"]["memory"]
    joint = {row["name"]: row["bits"] for row in found["joint"]["rows"]}
    assert joint["means"] < found["joint"]["base"]
    before, after = TokenCorpus.open(place.tokens), place.root / "work" / "transfer" / "tokens"
    documents = importlib.import_module("lab.texts").documents
    texts = [
        [corpus.tokenizer().decode(one) for one in documents(corpus.split("test"))]
        for corpus in (before, TokenCorpus.open(after))
    ]
    assert texts[0] == texts[1]


def test_every_contender_is_timed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ("--prompt", "8", "--retrieved", "16", "--new", "4", "--repeats", "1")
    module = importlib.import_module("decoding")
    monkeypatch.setattr(module, "BATCHES", (1, 2))
    result = place.run("decoding", *sizes)
    rows = result["decoding"]["rows"]
    assert {(row["path"], row["name"], row["batch"]) for row in rows} == {
        (path, name, batch)
        for batch in (1, 2)
        for path, names in {
            "generate": ("base", "in-context retrieval", "base and memory"),
            "loop": ("base", "in-context retrieval", "base and memory", "kNN-LM"),
            "graph": ("base", "in-context retrieval", "base and memory"),
        }.items()
        for name in names
    }
    assert all(row["first"] > 0 for row in rows)
    tiny = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1}
    tiny |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    monkeypatch.setattr(module, "QWEN_7B", module.QWEN_7B | tiny)
    monkeypatch.setattr(module, "QWEN_05B", module.QWEN_05B | tiny | {"vocab_size": 448})
    monkeypatch.setattr(module, "QWEN_TOKENS", 440)
    shapes = place.run("decoding", "--shapes", *sizes)["decoding of other shapes"]["rows"]
    assert {row["path"] for row in shapes} == {"generate", "graph"}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_every_path_makes_the_same_tokens(place: Place, device: str) -> None:
    module: ModuleType = importlib.import_module("decoding")
    base = load_model(place.base, device=device)
    torch.manual_seed(1)
    memory = LlamaForCausalLM(base.config).eval().to(device)
    corpus = TokenCorpus.open(place.tokens)
    pair = MemoryDecoderForCausalLM.from_models(
        base, memory, lmbda=module.LMBDA, tokenizer=corpus.tokenizer()
    )
    tokens = torch.from_numpy(corpus.split("test").read(0, 48).astype(np.int64))
    tokens = tokens.view(3, 16).to(device)
    for models_, model in (([base], base), ([base, memory], pair)):
        static = module.StaticLoop(models_, corpus.vocab_size)
        wanted = module.generating(model)(tokens, 6)
        assert torch.equal(module.looping(model)(tokens, 6), wanted)
        assert torch.equal(static(tokens, 6), wanted)
        assert torch.equal(static(tokens, 6), wanted)  # the caches start anew


def test_the_tables_have_every_row(place: Place, cloze: dict) -> None:
    result = place.root / "parts.json"
    done = subprocess.run(
        [sys.executable, FOLDER / "part_tables.py", result], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads(result.read_text())
    for task in cloze["tasks"]:
        assert done.stdout.count(f"| {task['task']} | {task['questions']} |") >= 2
    for name in parts.keys() & {"bases", "transfer"}:
        for row in parts[name]["rows"]:
            assert f"| {row['name']} |" in done.stdout
    tables = done.stdout.split("\n\n")
    for table in tables:
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) <= 1


def test_lm_eval_takes_the_pair_and_the_questions(
    place: Place, cloze: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    place.run("cloze", "--questions", "30", "--write", str(place.root / "questions"))
    arguments = ["--base", place.base, "--memory", place.root / "work" / "train-2-layers"]
    arguments += ["--tasks", place.root / "questions" / "test-definition.jsonl"]
    arguments += ["--max-length", 256, "--device", "cpu"]
    importlib.import_module("harness").main([str(one) for one in arguments])
    assert capsys.readouterr().out.count("test-definition") == 2
