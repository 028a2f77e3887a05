# SPDX-License-Identifier: Apache-2.0
"""Methods that the paper compares with, on the same features; used by the benchmark only.

Each takes the pretrained features of normal training images, float32 (M, D), and of test images, (N, D), and returns
anomaly scores (N,) float64, higher is more anomalous.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional


def one_class_svm(train: np.ndarray, queries: np.ndarray, nu: float = 0.1) -> np.ndarray:
    """One-class SVM with an RBF kernel (Schoelkopf et al., 2001), gamma 1 / (D var); negated decision function."""
    from sklearn.svm import OneClassSVM

    return -OneClassSVM(kernel="rbf", gamma="scale", nu=nu).fit(train).decision_function(queries)


def isolation_forest(train: np.ndarray, queries: np.ndarray, seed: int) -> np.ndarray:
    """Isolation forest (Liu et al., 2008) of 100 trees; scikit-learn's score, negated."""
    from sklearn.ensemble import IsolationForest

    return -IsolationForest(n_estimators=100, random_state=seed).fit(train).score_samples(queries)


def mahalanobis(train: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return the squared Mahalanobis distance to a Gaussian with a shrunk covariance.

    Shrinkage is that of Ledoit and Wolf (2004), so M < D works too.
    """
    from sklearn.covariance import LedoitWolf

    return LedoitWolf().fit(train.astype(np.float64)).mahalanobis(queries.astype(np.float64))


def deep_svdd(train: np.ndarray, queries: np.ndarray, seed: int, epochs: int = 50) -> np.ndarray:
    """Return the distances of Deep SVDD (Ruff et al., ICML 2018), one-class objective.

    The objective is mean ||phi(x) - c||^2 plus weight decay. As in the paper, the network has no bias terms and an
    unbounded activation (leaky ReLU), since biases could map everything to c. The center c is the mean of the
    untrained network's outputs, with components nearer to 0 than 0.1 moved to +-0.1. The optimizer is Adam with weight
    decay 1e-6 and learning rate 1e-4. Unlike the paper's, the network is a bias-free MLP (D, 256, 128) on the
    pretrained features that the other methods see, scaled by one number, in place of a LeNet on pixels with autoencoder
    pretraining.

    Returns
    -------
    ||phi(x) - c||^2 per query.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.from_numpy(np.ascontiguousarray(train, dtype=np.float32))
    scale = x.square().mean().sqrt().clamp(min=1e-12)
    x = x / scale
    layers = [nn.Linear(x.shape[1], 256, bias=False), nn.Linear(256, 128, bias=False)]
    network = nn.Sequential(layers[0], nn.LeakyReLU(0.1), layers[1])
    with torch.no_grad():
        for layer in layers:
            layer.weight.normal_(0, layer.in_features**-0.5, generator=generator)
        center = network(x).mean(dim=0)
        center = torch.where(center.abs() < 0.1, torch.where(center < 0, -0.1, 0.1), center)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, weight_decay=1e-6)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(200):
            optimizer.zero_grad()
            targets = center.expand(len(rows), -1)
            functional.mse_loss(network(x[rows]), targets, reduction="sum").div(len(rows)).backward()
            optimizer.step()
    with torch.no_grad():
        q = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32)) / scale
        return (network(q) - center).square().sum(dim=1).double().numpy()
