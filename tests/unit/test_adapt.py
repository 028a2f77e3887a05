# SPDX-License-Identifier: Apache-2.0
"""Adaptation of the embedded backbone on a few images."""

import copy
import functools
import io
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from panda_ad.adapt import losses
from panda_ad.adapt.batches import pooled
from panda_ad.adapt.collapse import feature_statistics
from panda_ad.adapt.fisher import estimate_fisher
from panda_ad.adapt.metric import Metric
from panda_ad.adapt.train import adapt
from panda_ad.errors import UserError
from panda_ad.features.architectures import architecture
from panda_ad.features.backbones import Backbone, load_backbone
from panda_ad.features.export import export_network, with_snapshots
from panda_ad.params import METHODS as ALL
from panda_ad.params import AdaptParams
from panda_ad.params_file import load_params
from panda_ad.scoring.detector import normalize
from panda_ad.scoring.gallery import Gallery
from panda_ad.scoring.ses import ses_scores
from panda_ad.scoring.whitening import fit_whitening
from panda_ad.stages.adapt import fit_metric

ROOT = Path(__file__).parents[2]
METHODS = tuple(name for name, method in ALL.items() if method.loss)


def params(method: str = "compactness", **changes) -> AdaptParams:
    """Four steps: 10 images, batches of 5, 2 epochs."""
    values = {
        "method": method,
        "epochs": 2,
        "batch_size": 5,
        "learning_rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-5,
        "clip_norm": 1e-3,
    }
    values |= {
        "snapshots": 3,
        "ewc_lambda": 1e4,
        "fisher": None,
        "fisher_samples": 2,
        "outliers": "folder",
        "on_collapse": "warn",
    }
    return AdaptParams(**(values | changes))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("embedded")


@pytest.fixture(scope="module")
def layer2() -> np.ndarray:
    """FrozenLayers activations of 10 'images' at 32 px, float16 (10, 128, 4, 4); like real ones they are not negative."""
    return np.abs(np.random.default_rng(0).normal(0, 1, (10, 128, 4, 4))).astype(np.float16)


@pytest.fixture(scope="module")
def outliers() -> np.ndarray:
    return np.abs(np.random.default_rng(1).normal(0.5, 1, (7, 128, 4, 4))).astype(np.float16)


@pytest.fixture(scope="module")
def adapted(backbone, layer2, outliers) -> dict:
    """Each method's result, and the backbone's state before and after."""
    before = copy.deepcopy(backbone.state_dict())
    given = {"outliers": outliers, "fisher": estimate_fisher(backbone, layer2, samples=2, seed=0)}
    results = {m: adapt(backbone.adapted, layer2, params(m), seed=0, **given) for m in METHODS}
    return {**results, "before": before, "after": backbone.state_dict()}


def with_state(backbone: Backbone, state: dict) -> torch.nn.Module:
    head = copy.deepcopy(backbone.adapted)
    head.load_state_dict(state, strict=False)
    return head


def test_the_pretrained_backbone_is_bit_identical_after_training(adapted):
    assert adapted["before"].keys() == adapted["after"].keys()
    for name, value in adapted["before"].items():
        assert torch.equal(value, adapted["after"][name]), name


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_trains_and_batch_norm_statistics_do_not(adapted, backbone, method):
    state, base = adapted[method].snapshots[-1], backbone.adapted.state_dict()
    assert set(state) == {k for k in base if not k.endswith("num_batches_tracked")}
    for name, value in state.items():
        assert value.dtype == torch.float32
        statistic = name.endswith(("running_mean", "running_var"))
        assert torch.equal(value, base[name]) == statistic, name


def test_steps_and_history(adapted):
    for method in METHODS:
        assert adapted[method].steps == ([0, 2, 4] if ALL[method].snapshots else [4]), method
        history = adapted[method].history
        assert [row["step"] for row in history] == [0, 2, 4]  # once an epoch
        assert history[-1]["epoch"] == 2 and np.isfinite(history[-1]["loss"])
        assert {"center_distance", "feature_variance", "effective_rank"} <= set(history[0])
    assert adapted["ewc"].history[-1]["penalty"] > 0


def test_the_first_ses_snapshot_is_the_pretrained_head(adapted, backbone):
    for name, value in adapted["ses"].snapshots[0].items():
        assert torch.equal(value, backbone.adapted.state_dict()[name])


def test_ses_follows_compactness(adapted):
    """Same seed, same steps: SES only keeps more of the way."""
    for name, value in adapted["compactness"].snapshots[0].items():
        assert torch.equal(value, adapted["ses"].snapshots[-1][name]), name


def test_ses_with_one_snapshot_equals_compactness_up_to_scale(backbone, layer2):
    one, plain = (adapt(backbone.adapted, layer2, params(m, snapshots=1), seed=0) for m in ("ses", "compactness"))
    assert one.steps == plain.steps == [4]
    gallery = Gallery(pooled(with_state(backbone, plain.snapshots[0]), layer2).numpy())
    queries = pooled(with_state(backbone, one.snapshots[0]), layer2[::-1].copy()).numpy() + 0.1
    scores = gallery.score(queries, 2)
    mean = gallery.leave_one_out(2).mean()
    np.testing.assert_allclose(ses_scores(scores[None], np.array([mean]))[0] * mean, scores, rtol=1e-14)


def test_one_step_by_hand(backbone, layer2):
    """The first step against autograd written out: eval mode, clip, weight decay, learning rate."""
    result = adapt(backbone.adapted, layer2, params(batch_size=10, epochs=1), seed=0)
    head = copy.deepcopy(backbone.adapted).requires_grad_(True)
    features = head(torch.from_numpy(layer2).float())
    center = features.detach().mean(dim=0)
    loss = ((features - center) ** 2).sum(dim=1).mean() / 512
    assert result.history[-1]["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    named = dict(head.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()))
    norm = torch.sqrt(sum(g.square().sum() for g in gradients))
    assert result.history[-1]["gradient_norm"] == pytest.approx(float(norm), rel=1e-3)
    assert norm > 1e-3
    for (name, p), g in zip(named.items(), gradients, strict=True):
        expected = -0.1 * (g * (1e-3 / norm) + 5e-5 * p.detach())
        found = result.snapshots[0][name] - p.detach()
        assert float((found - expected).norm()) <= 0.01 * float(expected.norm()) + 1e-7 * float(p.detach().norm()), name


def test_training_lowers_the_loss(backbone, layer2):
    result = adapt(backbone.adapted, layer2, params(epochs=10, learning_rate=0.3), seed=0)
    assert result.history[-1]["center_distance"] < 0.99 * result.history[0]["center_distance"]


@pytest.mark.slow
def test_a_stronger_penalty_keeps_the_head_closer(backbone, layer2):
    fisher = {k: torch.ones_like(p) for k, p in backbone.adapted.named_parameters()}

    def distance(strength: float) -> float:
        result = adapt(
            backbone.adapted,
            layer2,
            params("ewc", ewc_lambda=strength, epochs=8, weight_decay=0.0),
            seed=0,
            fisher=fisher,
        )
        base = backbone.adapted.state_dict()
        return float(sum((v - base[k]).square().sum() for k, v in result.snapshots[0].items()))

    free, held = distance(0.0), distance(1e4)
    assert held < 0.5 * free
    plain = adapt(backbone.adapted, layer2, params(epochs=8, weight_decay=0.0), seed=0)
    base = backbone.adapted.state_dict()
    assert free == pytest.approx(
        float(sum((v - base[k]).square().sum() for k, v in plain.snapshots[0].items())), rel=1e-6
    )


@pytest.mark.slow
def test_outlier_exposure_learns_to_tell_them_apart(backbone, layer2, outliers):
    result = adapt(backbone.adapted, layer2, params("oe", epochs=15, learning_rate=1.0), seed=0, outliers=outliers)
    head, classifier = with_state(backbone, result.snapshots[0]), result.classifier
    assert classifier is not None and classifier["weight"].shape == (1, 512) and classifier["bias"].shape == (1,)

    def logits(x: np.ndarray) -> np.ndarray:
        return (pooled(head, x) @ classifier["weight"][0] + classifier["bias"]).numpy()

    assert (logits(outliers)[:, None] > logits(layer2)[None]).mean() > 0.95  # AUROC; the outlier is the higher
    assert result.collapsed_at is None


def test_equal_seeds_give_equal_weights(backbone, layer2, adapted):
    again = adapt(backbone.adapted, layer2, params("ses"), seed=0)
    other = adapt(backbone.adapted, layer2, params("ses"), seed=1)
    assert all(torch.equal(v, adapted["ses"].snapshots[-1][k]) for k, v in again.snapshots[-1].items())
    assert not all(torch.equal(v, adapted["ses"].snapshots[-1][k]) for k, v in other.snapshots[-1].items())
    assert again.history == adapted["ses"].history


def test_rows_come_by_integer_arrays_from_a_memory_map(backbone, layer2, adapted, tmp_path):
    np.save(tmp_path / "layer2.npy", layer2)
    mapped = adapt(backbone.adapted, np.load(tmp_path / "layer2.npy", mmap_mode="r"), params("ses"), seed=0)
    assert all(torch.equal(v, adapted["ses"].snapshots[-1][k]) for k, v in mapped.snapshots[-1].items())


def test_bfloat16_training_goes_the_same_way(backbone, layer2):
    states = [
        adapt(backbone.adapted, layer2, params(epochs=4, precision=p), seed=0).snapshots[0] for p in ("fp32", "bf16")
    ]
    base = backbone.adapted.state_dict()
    a, b = (torch.cat([(s[k] - base[k]).flatten() for k in s]) for s in states)
    assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.95


def test_method_none(backbone, layer2):
    result = adapt(backbone.adapted, layer2, params("none"), seed=0)
    assert result.snapshots == [] and result.steps == [] and result.classifier is None


def test_users_mistakes(backbone, layer2):
    with pytest.raises(UserError, match="no normal training images"):
        adapt(backbone.adapted, layer2[:0], params(), seed=0)
    with pytest.raises(UserError, match=r"adapt\.outliers"):
        adapt(backbone.adapted, layer2, params("oe"), seed=0, outliers=layer2[:0])


@pytest.mark.parametrize("epochs", [1, 2])
def test_training_that_leaves_the_numbers_is_one_clear_line(backbone, layer2, epochs):
    """Found at the next step's gradient, or where there is none, at the features."""
    with pytest.raises(UserError, match=r"not finite .*lower adapt\.learning_rate"):
        adapt(backbone.adapted, layer2, params(epochs=epochs, batch_size=10, learning_rate=1e20), seed=0)


@pytest.mark.parametrize("whiten", [False, True])
def test_training_compares_what_scoring_compares(backbone, layer2, whiten):
    """The watch's first row is of features as scoring would compare them, and training draws these together."""
    gallery = load_params(ROOT / "params.yaml").gallery.model_copy(update={"normalize": True, "whiten": whiten})
    metric = functools.partial(fit_metric, gallery=gallery)
    result = adapt(backbone.adapted, layer2, params(epochs=10, learning_rate=1.0), seed=0, metric=metric)
    features = normalize(pooled(backbone.adapted, layer2).numpy())
    compared = fit_whitening(features)(features) if whiten else features
    start, end = result.history[0]["center_distance"], result.history[-1]["center_distance"]
    assert start == pytest.approx(float(np.linalg.norm(compared - compared.mean(axis=0), axis=1).mean()), rel=1e-4)
    assert end < 0.99 * start
    assert result.provenance["as_scored"] and set(result.snapshots[0]) == {
        k for k in backbone.adapted.state_dict() if not k.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize(("normalizes", "whitens"), itertools.product([False, True], repeat=2))
def test_the_metric_is_that_of_scoring(normalizes, whitens):
    gallery = load_params(ROOT / "params.yaml").gallery.model_copy(update={"normalize": normalizes, "whiten": whitens})
    features = np.random.default_rng(0).normal(1, 2, (20, 6)).astype(np.float32)
    metric = fit_metric(torch.from_numpy(features), gallery)
    others = np.random.default_rng(1).normal(1, 2, (4, 6)).astype(np.float32)
    scaled, other = (normalize(x) if normalizes else x for x in (features, others))
    expected = fit_whitening(scaled)(other) if whitens else other
    np.testing.assert_allclose(metric(torch.from_numpy(others)), expected, rtol=1e-4, atol=1e-5)
    assert not list(metric.parameters())


def test_outlier_exposure_sees_features_as_they_come(backbone, layer2, outliers, adapted):
    again = adapt(
        backbone.adapted, layer2, params("oe"), seed=0, metric=lambda _: Metric(normalize=True), outliers=outliers
    )
    assert all(torch.equal(v, adapted["oe"].snapshots[0][k]) for k, v in again.snapshots[0].items())


class Narrow(torch.nn.Module):
    """Adapted layers of no known network: float32 (B, 6, h, w) -> (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Conv2d(6, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(x).mean(dim=(2, 3))


@pytest.mark.parametrize("method", METHODS)
def test_any_module_from_activations_to_features_trains(method):
    layers = Narrow()
    x, other = (np.random.default_rng(i).normal(size=(9, 6, 3, 3)).astype(np.float16) for i in (0, 1))
    fisher = {name: torch.ones_like(p) for name, p in layers.named_parameters()}
    result = adapt(layers, x, params(method), seed=0, outliers=other, fisher=fisher)
    assert not torch.equal(result.snapshots[-1]["mix.weight"], layers.mix.weight.detach())


def test_networks_other_than_resnets_adapt():
    """EfficientNet-Lite with random weights: its classifier begins with a convolution, its adapted layers have names of their own."""
    torch.manual_seed(0)
    backbone = Backbone("efficientnet_lite0", architecture("efficientnet_lite0").build(3).state_dict())
    x = np.random.default_rng(0).random((6, 3, 64, 64), np.float32)
    pretrained = export_network(backbone, (64, 64))
    frozen = pretrained.activations(x)["stage5"]
    fisher = estimate_fisher(backbone, frozen, samples=2, seed=0)
    assert set(fisher) == {name for name, _ in backbone.adapted.named_parameters()}
    assert sum(float(value.sum()) for value in fisher.values()) > 0
    result = adapt(backbone.adapted, frozen, params("ewc"), seed=0, fisher=fisher)
    network = with_snapshots(pretrained, backbone.adapted, result.snapshots[-1:], result.steps[-1:])
    found, expected = (
        network.features({"stage5": frozen})[0],
        pooled(with_state(backbone, result.snapshots[-1]), frozen),
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_names_a_loss_with_a_source(name):
    loss = getattr(losses, ALL[name].loss)
    assert "PANDA" in loss.__doc__ or "et al." in loss.__doc__


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_only(backbone, layer2, monkeypatch, terminal):
    written = io.StringIO()
    monkeypatch.setattr(written, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", written)
    adapt(backbone.adapted, layer2, params(), seed=0)
    assert ("compactness: 100%" in written.getvalue() and "step/s" in written.getvalue()) == terminal


@pytest.mark.parametrize(
    ("method", "on_collapse", "kept"),
    [("ses", "warn", "all"), ("ses", "fallback", "good"), ("compactness", "fallback", "good")],
)
def test_collapse_is_reported_and_falls_back(backbone, layer2, method, on_collapse, kept):
    """Weight decay alone, far too strong, shrinks every feature; the head before that is kept."""
    settings_ = params(method, epochs=10, weight_decay=0.2, learning_rate=0.3, on_collapse=on_collapse)
    result = adapt(backbone.adapted, layer2, settings_, seed=0)
    assert result.collapsed_at is not None and 0 < result.collapsed_at <= 20
    if kept == "all":
        assert result.steps == [0, 10, 20]
        return
    good = result.provenance["fell_back_to"]
    assert result.steps[-1] == good < result.collapsed_at
    before = [row for row in result.history if row["step"] == good][0]
    features = pooled(with_state(backbone, result.snapshots[-1]), layer2)
    center = pooled(backbone.adapted, layer2).double().mean(dim=0).float()
    assert feature_statistics(features, center)["feature_variance"] == pytest.approx(
        before["feature_variance"], rel=1e-5
    )


def test_scores_do_not_depend_on_batch_or_order(backbone, layer2, adapted):
    """The way the detector takes: the adapted layers as ONNX, one image a pass, then the gallery."""
    pretrained = export_network(backbone, (32, 32))
    network = with_snapshots(pretrained, backbone.adapted, adapted["ses"].snapshots[-1:], [1])
    rng = np.random.default_rng(0)
    queries = np.abs(rng.normal(0, 1.1, (11, 128, 4, 4))).astype(np.float16)
    gallery = Gallery(network.features({"layer2": layer2})[0])

    def scores(x: np.ndarray) -> np.ndarray:
        return gallery.score(network.features({"layer2": x})[0], 2)

    expected = scores(queries)
    for batch in (1, 4, 11):
        order = rng.permutation(len(queries))
        found = np.concatenate([scores(queries[order[i : i + batch]]) for i in range(0, len(order), batch)])
        np.testing.assert_array_equal(found, expected[order])
