"""The stage prepare: streams, splits, shards, and one clear line for bad input."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from data_tiny import (
    contents,
    documents,
    run_stage,
    set_small_shards,
    write_corpus,
    write_tokenizer,
)
from tokenizers import Tokenizer

from memdec.data.artefact import Artefact
from memdec.data.corpus import SPLITS, PrepareConfig, TokenCorpus, prepare
from memdec.errors import MemdecError
from memdec.modeling.loading import load_tokenizer


@pytest.fixture
def options(tiny):
    return {
        "tokenizer": str(tiny / "model"),
        "corpus": tiny / "corpus",
        "validation_fraction": 0.1,
        "test_fraction": 0.1,
    }


def texts_of(corpus: TokenCorpus, split: str) -> list[str]:
    """The documents of a split, cut out of its stream and decoded."""
    stream = corpus.split(split)
    tokens = stream.read(0, len(stream))
    ends = [*(stream.documents[1:] - 1), len(stream) - 1]
    assert tokens[0] == corpus.separator_id
    assert (tokens[ends] == corpus.separator_id).all()
    pieces = [tokens[start:end] for start, end in zip(stream.documents, ends, strict=True)]
    assert all(corpus.separator_id not in piece for piece in pieces)
    return [corpus.tokenizer().decode(piece) for piece in pieces]


def test_every_document_is_in_one_split_and_whole(corpus):
    found = [text for split in SPLITS for text in texts_of(corpus, split)]
    assert sorted(found) == sorted(documents(60))
    recorded = corpus.artefact.manifest["splits"]
    assert {split: recorded[split]["documents"] for split in SPLITS} == {
        split: len(texts_of(corpus, split)) for split in SPLITS
    }
    assert recorded["train"]["tokens"] == len(corpus.split("train"))


def test_shares_are_near_what_was_asked_for(corpus):
    sizes = {split: sum(map(len, texts_of(corpus, split))) for split in SPLITS}
    total = sum(sizes.values())
    assert 0.1 <= sizes["test"] / total < 0.15
    assert 0.1 <= sizes["validation"] / total < 0.15


def test_train_keeps_the_order_of_the_corpus(corpus):
    order = {text: number for number, text in enumerate(documents(60))}
    numbers = [order[text] for text in texts_of(corpus, "train")]
    assert numbers == sorted(numbers)


def test_the_seed_decides_the_split(options, corpus, tmp_path):
    prepare(PrepareConfig(**options), tmp_path / "same")
    prepare(PrepareConfig(**options, seed=1), tmp_path / "other")
    assert contents(tmp_path / "same") == contents(corpus.artefact.path)
    other = TokenCorpus.open(tmp_path / "other")
    assert texts_of(other, "test") != texts_of(corpus, "test")


def test_the_place_of_the_corpus_does_not_matter(options, corpus, tmp_path):
    moved = write_corpus(tmp_path / "elsewhere", documents(60))
    prepare(PrepareConfig(**{**options, "corpus": moved}), tmp_path / "tokens")
    assert TokenCorpus.open(tmp_path / "tokens").fingerprint == corpus.fingerprint


def test_blocks_cover_each_position_once_with_the_next_token_as_label(corpus):
    stream = corpus.split("train")
    tokens = stream.read(0, len(stream))
    blocks = [stream.block(number, 100) for number in range(stream.blocks(100))]
    np.testing.assert_array_equal(np.concatenate([inputs for inputs, _ in blocks]), tokens[:-1])
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in blocks]), tokens[1:])
    assert {len(inputs) for inputs, _ in blocks[:-1]} == {100}
    assert stream.positions == len(stream) - 1 == len(tokens) - 1
    with pytest.raises(IndexError):
        stream.block(len(blocks), 100)
    with pytest.raises(IndexError):
        stream.block(-1, 100)


def test_a_last_block_that_is_full(corpus):
    stream = corpus.split("test")
    assert stream.blocks(stream.positions) == 1
    assert len(stream.block(0, stream.positions)[0]) == stream.positions


def test_shards_read_as_one_stream(options, corpus, tmp_path, monkeypatch):
    set_small_shards(monkeypatch.setattr)
    prepare(PrepareConfig(**options), tmp_path)
    cut = TokenCorpus.open(tmp_path)
    assert cut.artefact.manifest["splits"]["train"]["shards"] > 4
    for split in SPLITS:
        whole, parts = corpus.split(split), cut.split(split)
        assert len(parts) == len(whole)
        np.testing.assert_array_equal(parts.documents, whole.documents)
        everything = whole.read(0, len(whole))
        edges = [0, 1, 299, 300, 301, 600, 950, len(whole) - 1, len(whole)]
        for start in edges:
            for stop in edges:
                if start <= stop <= len(whole):
                    np.testing.assert_array_equal(parts.read(start, stop), everything[start:stop])
    assert parts.read(0, 5).dtype == np.int32
    with pytest.raises(IndexError):
        parts.read(0, len(parts) + 1)


def test_what_was_read_is_a_copy(corpus):
    stream = corpus.split("train")
    stream.read(0, 5)[:] = -1
    assert (stream.read(0, 5) >= 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_a_giant_document_stays_in_train_and_spans_shards(options, tmp_path, monkeypatch, seed):
    set_small_shards(monkeypatch.setattr)
    giant = " ".join(documents(40, seed=5))
    write_corpus(tmp_path / "corpus", [*documents(20), giant])
    options = {**options, "corpus": tmp_path / "corpus", "seed": seed}
    prepare(PrepareConfig(**options), tmp_path / "tokens")
    corpus = TokenCorpus.open(tmp_path / "tokens")
    assert giant in texts_of(corpus, "train")
    assert corpus.artefact.manifest["splits"]["train"]["shards"] > 2


@pytest.mark.parametrize(
    ("count", "shares"),
    [(2, (0.1, 0.1)), (3, (0.005, 0.99)), (20, (0.99, 0.005))],
    ids=["a giant and two", "nearly all test", "nearly all validation"],
)
def test_every_split_gets_a_document(options, tmp_path, count, shares):
    giant = " ".join(documents(40, seed=5))
    write_corpus(tmp_path / "corpus", [*documents(count), giant])
    options = {**options, "corpus": tmp_path / "corpus"}
    options["validation_fraction"], options["test_fraction"] = shares
    prepare(PrepareConfig(**options), tmp_path / "tokens")
    splits = TokenCorpus.open(tmp_path / "tokens").artefact.manifest["splits"]
    assert all(splits[split]["documents"] > 0 for split in SPLITS)
    assert sum(splits[split]["documents"] for split in SPLITS) == count + 1


def test_max_tokens_takes_a_random_choice_of_documents(options, tmp_path):
    prepare(PrepareConfig(**options, max_tokens=700), tmp_path)
    corpus = TokenCorpus.open(tmp_path)
    found = [text for split in SPLITS for text in texts_of(corpus, split)]
    counted = [
        len(corpus.tokenizer()(text, add_special_tokens=False)["input_ids"]) for text in found
    ]
    assert sum(counted) >= 700
    assert sum(counted) - max(counted) < 700
    assert corpus.artefact.manifest["counts"]["documents_not_chosen"] == 60 - len(found)
    numbers = sorted(documents(60).index(text) for text in found)
    assert numbers != list(range(len(numbers)))  # not the head of the corpus


def test_max_tokens_leaves_enough_documents_to_split(options, tmp_path):
    prepare(PrepareConfig(**options, max_tokens=1), tmp_path)
    counts = TokenCorpus.open(tmp_path).artefact.manifest["splits"]
    assert [counts[split]["documents"] for split in SPLITS] == [1, 1, 1]


def test_a_separator_written_out_in_a_text_stays_text(options, tmp_path):
    texts = [f"{text} <eos> on" for text in documents(5)]
    write_corpus(tmp_path / "corpus", texts)
    prepare(PrepareConfig(**{**options, "corpus": tmp_path / "corpus"}), tmp_path / "tokens")
    corpus = TokenCorpus.open(tmp_path / "tokens")
    assert sorted(text for split in SPLITS for text in texts_of(corpus, split)) == sorted(texts)


def test_repeated_documents_and_paragraphs_are_counted(options, tmp_path):
    texts = [f"{text}\n\nshared" for text in documents(9)]
    write_corpus(tmp_path / "corpus", [*texts, texts[4]])
    config = PrepareConfig(
        **{**options, "corpus": tmp_path / "corpus"}, drop_repeated_paragraphs=True
    )
    counts = prepare(config, tmp_path / "tokens").manifest["counts"]
    assert counts["documents_repeated"] == 1
    assert counts["paragraphs_repeated"] == 8


def test_the_tokenizer_travels_with_the_tokens(options, corpus):
    original = load_tokenizer(options["tokenizer"])
    text = documents(1)[0]
    assert corpus.tokenizer()(text)["input_ids"] == original(text)["input_ids"]
    assert corpus.vocab_size == len(original)
    assert corpus.separator_id == original.eos_token_id


def test_ids_may_skip_some(tiny, options, tmp_path):
    tokenizer = load_tokenizer(options["tokenizer"])
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = parts["model"]["vocab"]
    vocabulary |= {token: index + 50 for token, index in vocabulary.items() if index >= 300}
    skipping = type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)), eos_token=tokenizer.eos_token
    )
    skipping.save_pretrained(tmp_path / "tokenizer")
    prepare(
        PrepareConfig(**{**options, "tokenizer": str(tmp_path / "tokenizer")}), tmp_path / "out"
    )
    stream = TokenCorpus.open(tmp_path / "out").split("train")
    assert stream.read(0, len(stream)).max() >= len(skipping)


def test_the_separator_can_be_given(options, tmp_path):
    prepare(PrepareConfig(**options, separator_id=7), tmp_path)
    stream = TokenCorpus.open(tmp_path).split("train")
    assert stream.read(0, 1).tolist() == [7]


@pytest.mark.parametrize(
    "special", [{"bos_token": "<b>", "pad_token": "<p>"}, {"pad_token": "<p>"}]
)
def test_without_eos_the_separator_is_bos_or_pad(options, tmp_path, special):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", **special)
    artefact = prepare(
        PrepareConfig(**{**options, "tokenizer": str(tokenizer)}), tmp_path / "tokens"
    )
    first = next(iter(special.values()))
    found = load_tokenizer(tokenizer).convert_ids_to_tokens(artefact.manifest["separator_id"])
    assert found == first


def test_nothing_written_tells_the_place_or_the_time(corpus, tiny):
    for name, content in contents(corpus.artefact.path).items():
        assert str(tiny).encode() not in content, name
    assert "seconds" not in (corpus.artefact.path / "manifest.json").read_text()


def test_a_stage_that_is_done_says_so_and_writes_nothing(options, corpus, tiny, capsys):
    before = contents(tiny / "tokens")
    run_stage("prepare", options, tiny / "tokens")
    assert f"prepare: already done in {tiny / 'tokens'}" in capsys.readouterr().err
    assert contents(tiny / "tokens") == before


def test_a_changed_corpus_is_refused_with_two_fingerprints(options, tmp_path):
    directory = write_corpus(tmp_path / "corpus", documents(10))
    options = {**options, "corpus": directory}
    first = prepare(PrepareConfig(**options), tmp_path / "tokens").manifest["inputs"]["corpus"]
    (directory / "0003.txt").write_text("something else")
    with pytest.raises(MemdecError) as refused:
        prepare(PrepareConfig(**options), tmp_path / "tokens")
    found = re.search(r"input corpus = (\w{12}), this run has (\w{12})", str(refused.value))
    assert found
    assert found[1] == first[:12] != found[2]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], r"holds no file whose name ends in"),
        (["", " \n"], r"has 0 distinct documents that are not empty, at least 3"),
        (["one", "two"], r"has 2 distinct documents .*the option documents"),
        (["one", "one", "one", "two"], r"has 2 distinct documents"),
    ],
)
def test_too_little_text(options, tmp_path, texts, message):
    write_corpus(tmp_path / "corpus", texts)
    with pytest.raises(MemdecError, match=message):
        prepare(PrepareConfig(**{**options, "corpus": tmp_path / "corpus"}), tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_results_in_the_corpus_are_refused(options, tmp_path):
    """A rerun would read them, such as the log.jsonl of a training beside, as text."""
    corpus = write_corpus(tmp_path / "corpus", documents(20))
    with pytest.raises(MemdecError, match=r"lies in the corpus"):
        prepare(PrepareConfig(**{**options, "corpus": corpus}), corpus / "memory" / "prepare")
    assert not (corpus / "memory").exists()


def test_results_may_be_hidden_in_the_corpus(options, tmp_path):
    """What begins with a dot is not read."""
    corpus = write_corpus(tmp_path / "corpus", documents(20))
    options = {**options, "corpus": corpus}
    found = [prepare(PrepareConfig(**options), corpus / ".memory" / out) for out in ("1", "2")]
    assert found[0].manifest == found[1].manifest


def test_a_file_that_is_not_text_leaves_nothing_behind(options, tmp_path):
    write_corpus(tmp_path / "corpus", documents(5))
    (tmp_path / "corpus" / "0002.txt").write_bytes(b"\0\1\2")
    with pytest.raises(MemdecError, match=r"0002\.txt is not text"):
        prepare(PrepareConfig(**{**options, "corpus": tmp_path / "corpus"}), tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_a_missing_tokenizer_is_one_line(options, tmp_path):
    missing = str(tmp_path / "no" / "model")
    with pytest.raises(MemdecError, match=f"no model at {missing}") as error:
        prepare(PrepareConfig(**{**options, "tokenizer": missing}), tmp_path / "tokens")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "tokens").exists()


def test_bad_options_are_refused(options, tmp_path):
    with pytest.raises(MemdecError, match="validation_fraction must be between 0 and 1, got 0"):
        PrepareConfig(**{**options, "validation_fraction": 0.0})
    with pytest.raises(MemdecError, match="test_fraction must be below 1, got 1"):
        PrepareConfig(**{**options, "validation_fraction": 0.5, "test_fraction": 0.5})
    with pytest.raises(MemdecError, match="max_tokens must be above 0"):
        PrepareConfig(**options, max_tokens=0)
    with pytest.raises(MemdecError, match="give either corpus or dataset"):
        PrepareConfig(**options, dataset="wikitext")
    with pytest.raises(MemdecError, match="give either corpus or dataset"):
        PrepareConfig(tokenizer="any")
    with pytest.raises(MemdecError, match=r"separator_id must be in \[0, 320\), got 320"):
        prepare(PrepareConfig(**options, separator_id=320), tmp_path / "tokens")


def test_an_unknown_split_is_refused(corpus):
    with pytest.raises(MemdecError, match="expected a split of train, validation, test"):
        corpus.split("dev")


def test_a_manifest_that_lost_a_shard_is_refused(corpus, options, tmp_path):
    prepare(PrepareConfig(**options), tmp_path)
    (tmp_path / "tokens" / "train-00000.npy").unlink()
    with pytest.raises(MemdecError, match=r"train-00000\.npy is missing"):
        TokenCorpus.open(tmp_path)


@pytest.mark.parametrize("token", [320, -1, 2**31 - 1])
def test_a_damaged_token_is_named_before_a_model_sees_it(options, tmp_path, token):
    prepare(PrepareConfig(**options), tmp_path)
    path = tmp_path / "tokens" / "train-00000.npy"
    tokens = np.load(path)
    tokens[41] = token
    np.save(path, tokens)
    stream = TokenCorpus.open(tmp_path).split("train")
    assert len(stream.read(0, 41)) == 41
    with pytest.raises(MemdecError, match=rf"token 41 of a split is {token}, .* in \[0, 320\)"):
        stream.read(30, 50)
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(MemdecError, match=r"train-00000\.npy is damaged: it holds no array"):
        TokenCorpus.open(tmp_path).split("train")


def test_the_manifest_is_plain_json_with_every_parameter(corpus):
    manifest = json.loads((corpus.artefact.path / "manifest.json").read_text())
    assert manifest == Artefact.open(corpus.artefact.path, "tokens").manifest
    fields = set(PrepareConfig(tokenizer="x", corpus="y").to_mapping())
    assert fields - set(manifest["params"]) == {"tokenizer", "corpus", "dataset", "dataset_subset"}
