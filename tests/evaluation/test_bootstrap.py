from __future__ import annotations

import numpy as np
import pytest

from memdec.evaluation.bootstrap import interval, resampled_means, resampling_units


def test_a_label_counts_to_its_document_with_the_separator_behind_it():
    starts = np.arange(1, 1 + 25 * 4, 4)  # sep, then 25 documents of three tokens and a sep
    kind, units = resampling_units(100, starts, 16)
    assert kind == "documents"
    np.testing.assert_array_equal(units, np.repeat(np.arange(25), 4))


def test_few_documents_are_cut_into_blocks():
    kind, units = resampling_units(100, np.array([1, 50]), 16)
    assert kind == "blocks"
    np.testing.assert_array_equal(units, np.arange(100) // 16)


def test_the_interval_is_that_of_the_mean_of_independent_units():
    generator = np.random.default_rng(0)
    units = np.repeat(np.arange(400), 5)
    values = np.repeat(generator.normal(3.0, 2.0, 400), 5)  # a document's tokens go together
    samples = resampled_means(values[:, None], units, 4000, seed=0)
    low, high = interval(samples[:, 0])
    error = values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_differences_are_paired_and_units_may_differ_in_size():
    generator = np.random.default_rng(0)
    units = np.sort(generator.integers(0, 50, 1000)) * 3 + 7  # numbers need not be consecutive
    values = generator.normal(size=1000)
    samples = resampled_means(np.stack([values, values - 0.25], axis=1), units, 100, seed=0)
    np.testing.assert_allclose(samples[:, 0] - samples[:, 1], 0.25)
    assert samples[:, 0].std() > 0.01


def test_the_seed_decides():
    values, units = np.random.default_rng(0).normal(size=(100, 1)), np.arange(100) // 5
    first, again, other = (resampled_means(values, units, 10, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
