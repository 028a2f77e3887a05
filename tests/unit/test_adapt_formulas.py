# SPDX-License-Identifier: Apache-2.0
"""Each formula of the paper against a naive reference, on tiny modules."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from panda_ad.adapt.batches import minibatches, shuffled
from panda_ad.adapt.collapse import collapsed, feature_statistics
from panda_ad.adapt.ewc import ElasticPenalty
from panda_ad.adapt.losses import NU, compactness, linear_classifier, outlier_exposure, soft_boundary
from panda_ad.adapt.plan import Plan, plan_training
from panda_ad.adapt.snapshots import snapshot_steps
from panda_ad.adapt.train import descend
from panda_ad.errors import UserError
from panda_ad.params import AdaptParams
from panda_ad.scoring.ses import ses_scores


def test_compactness():
    rng = np.random.default_rng(0)
    f, c = rng.normal(size=(5, 7)), rng.normal(size=7)
    naive = sum(sum((f[i, j] - c[j]) ** 2 for j in range(7)) / 7 for i in range(5)) / 5
    assert float(compactness(torch.tensor(f), torch.tensor(c))) == pytest.approx(naive, rel=1e-12)


def test_soft_boundary_is_the_least_of_deep_svdds_objective_over_the_radius():
    """R^2 + mean max(0, d - R^2) / nu over a grid of R^2; only the images outside the sphere have a gradient."""
    rng = np.random.default_rng(0)
    f = torch.tensor(rng.normal(size=(31, 4)), requires_grad=True)
    c = torch.tensor(rng.normal(size=4))
    d = ((f.detach() - c) ** 2).mean(dim=1).numpy()
    grid = np.linspace(0, d.max(), 20001)
    naive = min(r + np.maximum(0, d - r).mean() / NU for r in grid)
    loss = soft_boundary(f, c)
    assert float(loss.detach()) == pytest.approx(naive, rel=1e-3)
    loss.backward()
    outside = d > np.quantile(d, 1 - NU)
    assert 0 < outside.sum() <= 4 and ((f.grad != 0).any(dim=1).numpy() == outside).all()


def test_ewc_penalty_and_its_gradient():
    torch.manual_seed(0)
    head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    fisher = {k: torch.rand_like(v) for k, v in head.named_parameters()}
    star = {k: v.detach().clone() for k, v in head.named_parameters()}
    penalty = ElasticPenalty(head, fisher, 1e4)
    assert penalty.value() == 0
    with torch.no_grad():
        for p in head.parameters():
            p += torch.randn_like(p) * 0.01
    naive = 1e4 / 2 * sum((fisher[k] * (p - star[k]) ** 2).sum() for k, p in head.named_parameters())
    assert penalty.value() == pytest.approx(float(naive.detach()), rel=1e-5)
    expected = torch.autograd.grad(naive, list(head.parameters()))
    for p in head.parameters():
        p.grad = torch.ones_like(p)  # the compactness loss's part, which must stay
    penalty.add_gradient()
    for p, e in zip(head.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, 1 + e, rtol=1e-4, atol=1e-4)


def test_ewc_refuses_another_backbones_fisher():
    head = nn.Linear(3, 2)
    good = {k: torch.ones_like(v) for k, v in head.named_parameters()}
    with pytest.raises(UserError, match="bias is missing"):
        ElasticPenalty(head, {"weight": good["weight"]}, 1.0)
    with pytest.raises(UserError, match=r"weight is of shape \(3, 3\)"):
        ElasticPenalty(head, {**good, "weight": torch.ones(3, 3)}, 1.0)
    with pytest.raises(UserError, match="negative"):
        ElasticPenalty(head, {**good, "bias": torch.tensor([1.0, -1.0])}, 1.0)


def test_ses_by_hand():
    """Snapshot 0 scores the three images 2, 6, 4 (normal mean 2), snapshot 1 scores them 1, 1, 3 (mean 0.5)."""
    scores, decided = ses_scores(np.array([[2.0, 6.0, 4.0], [1.0, 1.0, 3.0]]), np.array([2.0, 0.5]))
    np.testing.assert_array_equal(scores, [2.0, 3.0, 6.0])
    np.testing.assert_array_equal(decided, [1, 0, 1])


def test_ses_ties_go_to_the_earlier_snapshot():
    assert ses_scores(np.ones((3, 1)), np.ones(3))[1][0] == 0


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 30))
def test_ses_of_an_image_does_not_depend_on_the_others(seed, snapshots, n):
    rng = np.random.default_rng(seed)
    scores, means, order = rng.random((snapshots, n)), rng.random(snapshots) + 0.1, rng.permutation(n)
    whole, decided = ses_scores(scores, means)
    np.testing.assert_array_equal(ses_scores(scores[:, order], means)[0], whole[order])
    alone = [ses_scores(scores[:, [i]], means) for i in range(n)]
    np.testing.assert_array_equal(np.concatenate([a[0] for a in alone]), whole)
    np.testing.assert_array_equal(np.concatenate([a[1] for a in alone]), decided)


def test_ses_refuses_a_mean_of_zero():
    with pytest.raises(UserError, match="snapshot 1: .* copies"):
        ses_scores(np.ones((2, 3)), np.array([1.0, 0.0]))


def test_snapshot_steps():
    assert snapshot_steps(90, 4) == [0, 30, 60, 90]
    assert snapshot_steps(90, 2) == [0, 90]
    assert snapshot_steps(90, 1) == [90]
    assert snapshot_steps(2, 5) == [0, 1, 2]


def test_outlier_loss_is_binary_cross_entropy():
    logits = torch.tensor([0.3, -1.2, 2.0, 0.5, -0.7])

    def probability(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    naive = [-math.log(1 - probability(x)) for x in logits[:2].tolist()] + [
        -math.log(probability(x)) for x in logits[2:].tolist()
    ]
    assert float(outlier_exposure(logits, torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0]))) == pytest.approx(
        sum(naive) / 5, rel=1e-6
    )


def test_linear_classifier_is_seeded():
    a, b = (linear_classifier(16, torch.Generator().manual_seed(3)) for _ in range(2))
    torch.testing.assert_close(a.weight, b.weight, rtol=0, atol=0)
    assert a.weight.shape == (1, 16) and 0 < float(a.weight.detach().abs().max()) <= 0.25


class Point(nn.Module):
    """A network that is one point, whatever it sees: compactness is then its squared distance to the center over its dimension."""

    def __init__(self, start: list[float]):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(start))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.p.expand(len(x), -1)


def descent(start: list[float], steps: int = 3, **changes) -> tuple[list[np.ndarray], list[dict[str, float]]]:
    """Train a point toward 0; return its path, and the history rows, one a step."""
    values = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.01, "clip_norm": 0.5} | changes
    params = AdaptParams.model_construct(method="compactness", precision="fp32", **values)
    plan = Plan(1, values["learning_rate"], steps, [steps], list(range(1, steps + 1)))
    network = Point(start)
    batches = itertools.repeat((torch.zeros(2, 1, 1, 1), torch.zeros(2)))
    path, rows = [network.p.detach().numpy().copy()], []
    for row in descend(network, None, batches, torch.zeros(len(start)), None, params, plan):
        path.append(network.p.detach().numpy().copy())
        rows.append(row)
    return path, rows


def test_descent_by_hand():
    """SGD with momentum; the loss's gradient is clipped to norm 0.5 before weight decay is added, as in the authors' code."""
    p, velocity = np.array([3.0, 4.0]), np.zeros(2)
    expected = [p]
    for _ in range(3):
        gradient = p.copy()  # of |p|^2 / 2
        gradient *= min(1.0, 0.5 / np.linalg.norm(gradient))
        velocity = 0.9 * velocity + gradient + 0.01 * p
        p = p - 0.1 * velocity
        expected.append(p)
    path, rows = descent([3.0, 4.0])
    np.testing.assert_allclose(path, expected, rtol=1e-5)
    first = {"step": 1, "epoch": 1 / 3, "loss": 12.5, "gradient_norm": 5, "clipped": 1}
    assert rows[0] == pytest.approx(first, rel=1e-5)


def test_a_small_gradient_is_not_clipped():
    path, rows = descent([0.03, 0.04], momentum=0.0, weight_decay=0.0)
    np.testing.assert_allclose(path[1], [0.027, 0.036], rtol=1e-5)
    assert rows[0]["clipped"] == 0


def test_rows_are_means_since_the_last_and_training_ends_where_the_reader_stops():
    params = AdaptParams.model_construct(
        method="compactness", precision="fp32", momentum=0.0, weight_decay=0.0, clip_norm=1e9
    )
    network, seen = Point([1.0]), 0

    def batches():
        nonlocal seen
        while True:
            seen += 1
            yield torch.zeros(2, 1, 1, 1), torch.zeros(2)

    rows = []
    for row in descend(network, None, batches(), torch.zeros(1), None, params, Plan(9, 0.05, 9, [9], [2, 4, 9])):
        rows.append(row)
        if row["step"] == 4:
            break
    assert [row["step"] for row in rows] == [2, 4] and seen == 4
    assert rows[0]["loss"] == pytest.approx((1 + 0.9**2) / 2)


def test_divergence_is_a_users_mistake():
    with pytest.raises(UserError, match="not finite at step .*lower adapt.learning_rate"):
        descent([1e30], learning_rate=1e30, clip_norm=1e38)


def test_plan_reads_null_as_the_papers():
    def plan(method: str, **changes) -> Plan:
        values = {"epochs": None, "learning_rate": None, "batch_size": 32, "snapshots": 4} | changes
        return plan_training(AdaptParams.model_construct(method=method, **values), 100)

    assert plan("ses") == Plan(15, 1e-2, 60, [0, 20, 40, 60], [6, 12, 18, 20, 24, 30, 36, 40, 42, 48, 54, 60])
    assert (plan("ewc").epochs, plan("oe").learning_rate, plan("oe").keep) == (50, 1e-1, [200])
    assert plan("compactness", epochs=2, learning_rate=0.5) == Plan(2, 0.5, 8, [8], [4, 8])


def test_batches_of_both_kinds_are_labelled():
    normal, outliers = (np.full((n, 2, 1, 1), value, np.float16) for n, value in ((5, 1.0), (3, 2.0)))
    batches = minibatches(normal, outliers, 4, torch.Generator().manual_seed(0), torch.device("cpu"))
    sizes = []
    for x, labels in itertools.islice(batches, 4):
        assert torch.equal(x[:, 0, 0, 0], labels + 1) and x.dtype == torch.float32
        sizes.append((int((labels == 0).sum()), int(labels.sum())))
    assert sizes == [(4, 3), (1, 3), (4, 3), (1, 3)]
    x, labels = next(minibatches(normal, None, 4, torch.Generator(), torch.device("cpu")))
    assert x.shape == (4, 2, 1, 1) and not labels.any()


def test_each_epoch_shows_each_row_once():
    batches = shuffled(10, 4, torch.Generator().manual_seed(0))
    epochs = [[next(batches) for _ in range(3)] for _ in range(2)]
    assert [len(b) for b in epochs[0]] == [4, 4, 2]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch)) == list(range(10))
    assert not np.array_equal(np.concatenate(epochs[0]), np.concatenate(epochs[1]))


@pytest.mark.parametrize(("n", "d"), [(50, 8), (6, 20)])
def test_feature_statistics(n, d):
    x = np.random.default_rng(0).normal(size=(n, d)) * np.linspace(1, 3, d)
    center = np.linspace(0, 1, d)
    found = feature_statistics(torch.tensor(x), torch.tensor(center))
    covariance = np.cov(x.T, bias=True)
    p = np.linalg.eigvalsh(covariance).clip(0)
    p = p[p > 1e-10] / p.sum()
    assert found["feature_variance"] == pytest.approx(np.trace(covariance) / d)
    assert found["effective_rank"] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert found["center_distance"] == pytest.approx(np.linalg.norm(x - center, axis=1).mean())


def test_collapse_is_seen():
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(100, 16)))
    start = feature_statistics(x, x.mean(dim=0))
    assert start["effective_rank"] == pytest.approx(16, rel=0.2)
    line = torch.tensor(np.outer(rng.normal(size=100), rng.normal(size=16)))
    assert feature_statistics(line, line.mean(dim=0))["effective_rank"] == pytest.approx(1)
    assert not collapsed(start, start)
    assert collapsed(feature_statistics(line, line.mean(dim=0)), start)  # rank
    assert collapsed(feature_statistics(x * 0.01, x.mean(dim=0)), start)  # variance
    point = feature_statistics(torch.zeros(100, 16), torch.zeros(16))
    assert point["effective_rank"] == 0 and collapsed(point, start)
    assert collapsed({k: math.nan for k in start}, start)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_feature_statistics_do_not_depend_on_order(seed):
    rng = np.random.default_rng(seed)
    x, c = rng.normal(size=(12, 5)), rng.normal(size=5)
    a, b = (feature_statistics(torch.tensor(v), torch.tensor(c)) for v in (x, x[rng.permutation(12)]))
    assert a == pytest.approx(b, rel=1e-9)
