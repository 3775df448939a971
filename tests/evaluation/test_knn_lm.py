from __future__ import annotations

import numpy as np
import torch

from memdec.evaluation.knn_lm import knn_label_log_probs
from memdec.ops import knn_scatter

VOCABULARY = 20


def test_it_is_the_probability_that_the_targets_hold():
    generator = np.random.default_rng(0)
    distances = generator.exponential(5.0, (200, 16)).astype(np.float32)
    tokens = generator.integers(0, VOCABULARY, (200, 16)).astype(np.int32)
    labels = generator.integers(0, VOCABULARY, 200)
    tokens[distances > 12] = -1
    distances[distances > 12] = np.inf
    targets = knn_scatter(torch.from_numpy(distances), torch.from_numpy(tokens), temperature=2.0)
    expected = targets.to_dense(VOCABULARY).numpy()[np.arange(200), labels]
    found = np.exp(knn_label_log_probs(distances, tokens, labels, 2.0))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert (expected == 0).any()


def test_far_neighbours_at_a_low_temperature_do_not_underflow():
    distances = np.array([[1e6, 1e6 + 1]], np.float32)
    found = knn_label_log_probs(distances, np.array([[3, 4]]), np.array([4]), 0.5)
    np.testing.assert_allclose(found, [-np.log1p(np.exp(2.0))], rtol=1e-6)


def test_a_label_without_a_neighbour_and_a_row_without_neighbours_have_no_mass():
    distances = np.array([[1.0, 2.0], [np.inf, np.inf]], np.float32)
    tokens = np.array([[3, 4], [-1, -1]])
    found = knn_label_log_probs(distances, tokens, np.array([5, 3]), 1.0)
    np.testing.assert_array_equal(found, [-np.inf, -np.inf])
