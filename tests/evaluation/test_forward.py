from __future__ import annotations

import numpy as np
import pytest
import torch

from memdec.data.corpus import TokenCorpus
from memdec.errors import MemdecError
from memdec.evaluation.forward import check_model, label_scores
from memdec.modeling.loading import load_model

VOCABULARY = 62


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(tiny.model)


@pytest.fixture(scope="module")
def stream(tiny):
    return TokenCorpus.open(tiny.tokens).split("test")


def test_every_block_is_a_context_of_its_own(model, stream, tiny):
    found = label_scores(
        model, stream, block_size=tiny.block_size, batch_blocks=3, vocab_size=VOCABULARY
    ).log_probs
    assert found.shape == (stream.positions,)
    assert found.dtype == np.float32
    expected = []
    for number in range(stream.blocks(tiny.block_size)):
        inputs, labels = stream.block(number, tiny.block_size)
        with torch.no_grad():
            logits = model(torch.from_numpy(inputs.astype(np.int64))[None]).logits[0]
        scores = logits[:, :VOCABULARY].double().log_softmax(-1)
        expected.append(scores[torch.arange(len(labels)), torch.from_numpy(labels).long()].numpy())
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-5)


def test_the_padding_of_the_logits_takes_no_mass(model, stream, tiny):
    options = {"block_size": tiny.block_size, "batch_blocks": 3}
    real = label_scores(model, stream, vocab_size=VOCABULARY, **options).log_probs
    padded = label_scores(model, stream, vocab_size=VOCABULARY + 2, **options).log_probs
    assert (real > padded).all()


def test_fewer_positions_are_the_head_of_all(model, stream, tiny):
    options = {"block_size": tiny.block_size, "batch_blocks": 3, "vocab_size": VOCABULARY}
    head = label_scores(model, stream, positions=2 * tiny.block_size, **options).log_probs
    np.testing.assert_allclose(
        head, label_scores(model, stream, **options).log_probs[: len(head)], rtol=1e-5
    )


def test_a_model_in_training_is_run_without_dropout_and_goes_on_training(model, stream, tiny):
    options = {"block_size": tiny.block_size, "batch_blocks": 3, "vocab_size": VOCABULARY}
    expected = label_scores(model, stream, **options).log_probs
    model.train()
    found = label_scores(model, stream, **options).log_probs
    assert model.training
    model.eval()
    np.testing.assert_array_equal(found, expected)


def test_a_block_beyond_the_context_and_a_narrow_model_are_refused(model):
    with pytest.raises(MemdecError, match="at most 64, the context of this gpt2, got 65"):
        check_model(model, 65, VOCABULARY)
    with pytest.raises(MemdecError, match="at least the tokenizer's 65 tokens, this gpt2 has 64"):
        check_model(model, 64, 65)
