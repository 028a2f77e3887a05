# SPDX-License-Identifier: Apache-2.0
"""The paper's baselines on features whose answer is known."""

import numpy as np
import pytest

from panda_ad.benchmark import baselines


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Correlated normal training features, normal queries, anomalous queries: (M, D), (N, D), (N, D) float32."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(16, 16))

    def normal(n: int) -> np.ndarray:
        return (rng.normal(size=(n, 16)) @ mixing + 4).astype(np.float32)

    return normal(300), normal(60), (normal(60) + 3 * rng.normal(0, 4, (60, 16))).astype(np.float32)


METHODS = {
    "one_class_svm": baselines.one_class_svm,
    "isolation_forest": lambda train, queries: baselines.isolation_forest(train, queries, 0),
    "mahalanobis": baselines.mahalanobis,
    "deep_svdd": lambda train, queries: baselines.deep_svdd(train, queries, 0),
}


@pytest.mark.parametrize("name", METHODS)
def test_anomalies_score_higher_and_alone_as_in_company(name, data):
    train, normal, anomalous = data
    low, high = METHODS[name](train, normal), METHODS[name](train, anomalous)
    assert low.shape == (60,) and low.dtype == np.float64
    assert (high[:, None] > low[None]).mean() > 0.85  # AUROC
    np.testing.assert_allclose(METHODS[name](train, normal[:3]), low[:3], rtol=1e-4)


def test_mahalanobis_is_affine_invariant_with_many_samples():
    """With the covariance known, the score is the squared norm of the whitened query."""
    rng = np.random.default_rng(0)
    factor = np.array([[3.0, 0.0], [1.0, 0.5]])
    train = (rng.normal(size=(20000, 2)) @ factor.T).astype(np.float32)
    whitened = rng.normal(size=(20, 2)) * 3
    scores = baselines.mahalanobis(train, (whitened @ factor.T).astype(np.float32))
    np.testing.assert_allclose(scores, (whitened**2).sum(axis=1), rtol=0.1, atol=0.1)


def test_deep_svdd_contracts_normal_features(data):
    train, normal, _ = data
    long, short = baselines.deep_svdd(train, normal, 0, epochs=50), baselines.deep_svdd(train, normal, 0, epochs=1)
    assert long.mean() < 0.5 * short.mean()
    np.testing.assert_array_equal(baselines.deep_svdd(train, normal, 0), long)
