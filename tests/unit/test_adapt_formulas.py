"""Each formula of the paper against a naive reference, on tiny modules."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from panda_ad.adapt.collapse import collapsed, feature_statistics
from panda_ad.adapt.compactness import compactness_loss, descend, minibatches
from panda_ad.adapt.ewc import ElasticPenalty
from panda_ad.adapt.oe import linear_head, outlier_loss
from panda_ad.adapt.snapshots import snapshot_steps
from panda_ad.errors import UserError
from panda_ad.scoring.ses import ses_scores


def test_compactness_loss():
    rng = np.random.default_rng(0)
    f, c = rng.normal(size=(5, 7)), rng.normal(size=7)
    naive = sum(sum((f[i, j] - c[j]) ** 2 for j in range(7)) / 7 for i in range(5)) / 5
    assert float(compactness_loss(torch.tensor(f), torch.tensor(c))) == pytest.approx(naive, rel=1e-12)


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
    """AdaptedLayers 0 scores the three images 2, 6, 4 (normal mean 2), head 1 scores them 1, 1, 3 (mean 0.5)."""
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
    assert float(outlier_loss(logits, 2)) == pytest.approx(sum(naive) / 5, rel=1e-6)


def test_linear_head_is_seeded():
    a, b = (linear_head(16, torch.Generator().manual_seed(3)) for _ in range(2))
    torch.testing.assert_close(a.weight, b.weight, rtol=0, atol=0)
    assert a.weight.shape == (1, 16) and 0 < float(a.weight.abs().max()) <= 0.25


def quadratic(start: list[float], scale: float = 1.0, **options):
    """Run `descend` on scale/2 |p|^2 with a watch after each step; returns the parameter's path and what the watch saw."""
    p = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    path, seen = [p.detach().clone()], []

    def watch(step, since):
        path.append(p.detach().clone())
        seen.append(since)
        return False

    defaults = {
        "steps": 3,
        "learning_rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 0.01,
        "clip_norm": 0.5,
        "watch_at": [1, 2, 3],
    }
    descend([p], lambda: scale / 2 * p.square().sum(), watch=watch, **{**defaults, **options})
    return torch.stack(path), seen


def test_descent_by_hand():
    """SGD with momentum; the loss's gradient is clipped to norm 0.5 before weight decay is added, as in the authors' code."""
    p, velocity = np.array([3.0, 4.0]), np.zeros(2)
    expected = [p]
    for _ in range(3):
        gradient = p.copy()
        gradient *= min(1.0, 0.5 / np.linalg.norm(gradient))
        velocity = 0.9 * velocity + gradient + 0.01 * p
        p = p - 0.1 * velocity
        expected.append(p)
    path, seen = quadratic([3.0, 4.0])
    np.testing.assert_allclose(path.numpy(), expected, rtol=1e-5)
    assert seen[0].gradient_norm == pytest.approx(5) and seen[0].loss == pytest.approx(12.5) and seen[0].clipped == 1


def test_a_small_gradient_is_not_clipped():
    path, seen = quadratic([0.03, 0.04], momentum=0.0, weight_decay=0.0)
    np.testing.assert_allclose(path[1].numpy(), [0.027, 0.036], rtol=1e-12)
    assert seen[0].clipped == 0


def test_descent_does_not_depend_on_the_order_in_memory():
    """Gradients may lie otherwise than their parameter, which a loss may lay out anew before the first step."""
    start = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sgd = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.01, "clip_norm": 0.5}
    ends = []
    for order in (None, (2, 3, 1, 0), (0, 2, 3, 1)):
        p = nn.Parameter(start.clone())

        def loss(p=p, order=order):
            if order is not None:
                back = tuple(order.index(i) for i in range(4))
                p.data = p.data.permute(order).contiguous().permute(back)
            return (torch.arange(3).double() * p.square()).sum() / 2

        def add(p=p):
            p.grad = p.grad.contiguous() + 0.1

        descend([p], loss, steps=3, watch_at=[], watch=lambda step, since: False, add_gradient=add, **sgd)
        ends.append(p.detach().clone(memory_format=torch.contiguous_format))
    plain = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([plain], lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        plain.grad = torch.arange(3).double() * plain.detach() + 0.1
        nn.utils.clip_grad_norm_([plain], 0.5)
        optimizer.step()
    for end in ends:
        torch.testing.assert_close(end, plain.detach(), rtol=1e-9, atol=1e-12)


def test_descent_stops_when_told_and_reports_means():
    steps: list[int] = []
    p = nn.Parameter(torch.ones(1))
    sgd = {"learning_rate": 0.05, "momentum": 0.0, "weight_decay": 0.0, "clip_norm": 1e9}
    ticks: list[tuple[int, int]] = []

    def watch(step, since):
        steps.append(step)
        if step == 2:
            assert since.loss == pytest.approx((1 + 0.9**2) / 2)
        return step == 4

    descend(
        [p],
        lambda: p.square().sum(),
        steps=9,
        watch_at=[2, 4, 9],
        watch=watch,
        progress=lambda *t: ticks.append(t),
        **sgd,
    )
    assert steps == [2, 4] and ticks == [(i, 9) for i in range(1, 5)]


def test_divergence_is_a_users_mistake():
    with pytest.raises(UserError, match="not finite at step .*lower adapt.learning_rate"):
        quadratic([1.0], scale=1e200, learning_rate=1e100, clip_norm=1e308)


def test_each_epoch_shows_each_row_once():
    batches = minibatches(10, 4, torch.Generator().manual_seed(0))
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
