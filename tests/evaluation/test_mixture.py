from __future__ import annotations

import numpy as np
import pytest

from memdec.evaluation.mixture import LMBDAS, best_lmbda, lmbda_curve, mix_log_probs


def test_it_is_the_log_of_the_weighted_sum():
    generator = np.random.default_rng(0)
    base, other = generator.random((2, 50)).astype(np.float32)
    mixed = mix_log_probs(np.log(base), np.log(other), 0.3)
    np.testing.assert_allclose(np.exp(mixed), 0.7 * base + 0.3 * other, rtol=1e-6)


def test_at_either_end_the_other_has_no_influence():
    base = np.array([-1.0, -2.0, -np.inf], np.float32)
    other = np.array([-3.0, -np.inf, -np.inf], np.float32)
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(mix_log_probs(base, other, 0.0), base)
        np.testing.assert_array_equal(mix_log_probs(base, other, 1.0), other)
        np.testing.assert_array_equal(mix_log_probs(base, other, 0.5)[2], -np.inf)


def test_the_best_lmbda_is_the_share_of_tokens_that_the_other_knows():
    base = np.log([0.9] * 70 + [1e-9] * 30)
    other = np.log([1e-9] * 70 + [0.9] * 30)
    lmbda, nll = best_lmbda(base, other)
    assert lmbda == pytest.approx(0.3)
    assert nll == lmbda_curve(base, other)[15] == lmbda_curve(base, other).min()
    assert best_lmbda(base, base) == (0.0, pytest.approx(-base.mean()))
    assert LMBDAS[0] == 0.0
    assert LMBDAS[-1] == 1.0
