# SPDX-License-Identifier: Apache-2.0
"""One job of the benchmark: adapt, score the test images, write a cell per method.

Features, training and scoring are the functions that the stages call. A cell is a JSON file: which data set, class,
method, seed and settings; test labels and scores; AUROC. It is written atomically when finished, so that a killed run
resumes at the job it was in.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from panda_ad.adapt.train import Adapted
from panda_ad.benchmark import baselines
from panda_ad.benchmark.protocols import OUTLIERS, Job, Settings, choose, choose_test, train_files
from panda_ad.benchmark.sources import Images, read_set
from panda_ad.data.outliers import folder_files, plain_item
from panda_ad.evaluation.image_metrics import auroc
from panda_ad.features.backbones import load_backbone
from panda_ad.features.cache import Activations, Item
from panda_ad.features.export import export_network, with_snapshots
from panda_ad.features.images import CachedImages
from panda_ad.scoring.config import DetectorConfig
from panda_ad.scoring.detector import Detector, normalize
from panda_ad.scoring.fit import fit_galleries, out_of_fold, training_features
from panda_ad.scoring.folds import split_folds
from panda_ad.scoring.ses import ses_scores
from panda_ad.stages.adapt import adapt_images
from panda_ad.system.files import write_json
from panda_ad.system.processes import keep_freed_memory

Results = dict[str, tuple[np.ndarray, dict[str, Any]]]
"""Method -> scores of the test images (N,), and facts for its cell."""


class Bench:
    """What the jobs of one process share: the backbone, the activation cache, and which file is which of its items.

    Parameters
    ----------
    settings : see there.
    data : folder of the data sets.  out : folder of the results.  cache : folder of the activation caches.
    """

    def __init__(self, settings: Settings, data: Path, out: Path, cache: Path):
        keep_freed_memory()
        b = settings.params.backbone
        self.settings, self.data, self.out = settings, data, out
        self.backbone = load_backbone(b.name, b.weights)
        self.activations = Activations(export_network(self.backbone, b.size, b.precision), cache, b.cache_gb)
        self._items: dict[tuple[str, ...], list[Item]] = {}

    def images(self, job: Job) -> Images:
        """Return the images of the job's data set or category."""
        return read_set(job.dataset, self.data)[job.category]

    def items(self, name: tuple[str, ...], files: Sequence[Path]) -> list[Item]:
        """Return files as items of the activation cache, their activations stored there; hashed once per `name`."""
        if name not in self._items:
            self._items[name] = [plain_item(file) for file in files]
            self.activations.warm(self._items[name], label=" ".join(name))
        return self._items[name]

    def train_items(self, job: Job) -> list[Item]:
        """Return the job's normal training images."""
        files = train_files(self.images(job), job.normal, self.settings.train)
        return self.items((job.dataset, job.category, "train", *job.normal), files)

    def test_items(self, job: Job) -> tuple[list[Item], np.ndarray]:
        """Return the test images that every class of the set shares, and their labels for this job, bool (N,)."""
        images = self.images(job)
        chosen = choose_test(images, self.settings.test)
        items = self.items((job.dataset, job.category, "test"), [images.test[i] for i in chosen])
        return items, np.array([images.test_class[i] not in job.normal for i in chosen])

    def pretrained(self, items: Sequence[Item]) -> np.ndarray:
        """Return pretrained features float32 (N, D), which the activation cache keeps."""
        return np.concatenate(list(self.activations.pooled(items)))

    def features(self, items: Sequence[Item], adapted: Adapted, *, normalize: bool) -> list[np.ndarray]:
        """Return features of images under each snapshot, S times (N, D) float32, as stage `index` computes them."""
        cache, steps = self.activations, adapted.steps or [0]
        states = [state for state, step in zip(adapted.snapshots, adapted.steps, strict=True) if step > 0]
        network = with_snapshots(cache.network, self.backbone.adapted, states, steps)
        detector = Detector(DetectorConfig(normalize=normalize, whiten=False), network, (), np.empty(0))
        return training_features(detector, CachedImages(cache, items, (), self.pretrained(items)))

    def last_level(self, features: np.ndarray) -> np.ndarray:
        """Return what the deepest level adds to pooled features, (N, D) -> (N, C): what the paper compares."""
        layers, cache = self.backbone.adapted, self.activations
        if layers.feature_levels[-1] not in layers.levels:
            return features  # a single, frozen level
        maps = layers.maps(torch.zeros(1, *cache.shapes[cache.last]))
        width = maps[layers.levels.index(layers.feature_levels[-1])].shape[1]
        return np.ascontiguousarray(features[:, -width:])

    def adapt(self, job: Job) -> Adapted:
        """Train by the settings of the job's family."""
        params = self.settings.of(job.family, job.seed)
        items, outliers = self.train_items(job), []
        if job.family == "oe":
            files = folder_files(Path(params.adapt.outliers or ""), "oe.outliers")
            limit = None if self.settings.train is None else OUTLIERS * self.settings.train
            outliers = [files[i] for i in choose(len(files), limit, "outliers")]
        height, width = items[0].read().shape[:2]
        return adapt_images(self.backbone, self.activations, items, params, outliers, (height, width))

    def run(self, job: Job) -> list[Path]:
        """Compute the cells of a job that are missing, and write them; return their files."""
        missing = job.missing(self.out, self.settings)
        if not missing:
            return []
        start = time.perf_counter()
        results = _RUN[job.family](self, job, missing)
        seconds = time.perf_counter() - start
        _, labels = self.test_items(job)
        paths = []
        for method in missing:
            scores, more = results[method]
            path = job.cell_path(self.out, method, self.settings)
            cell = {
                "dataset": job.dataset,
                "protocol": job.protocol,
                "target": job.target,
                "method": method,
                "seed": job.seed,
                "settings": self.settings.facts(job.family),
                "key": self.settings.key(job.family),
                "n_train": len(self.train_items(job)),
                "n_test": len(labels),
                "auroc": auroc(labels, scores),
                "seconds": round(seconds, 1),  # of the whole job, shared by its methods
                **more,
                "labels": labels.astype(int).tolist(),
                "scores": [float(f"{s:.9g}") for s in scores],
            }
            write_json(path, cell)
            paths.append(path)
        return paths


def _raw(bench: Bench, job: Job, methods: Sequence[str]) -> Results:
    """DN2 as in the paper, its variants, and the baselines, all on the pretrained features."""
    (train,), (test,), _ = _features(bench, job, Adapted(), normalize=False)
    last = bench.last_level(train), bench.last_level(test)
    joined = normalize(train), normalize(test)
    used = joined if bench.settings.params.gallery.normalize else (train, test)
    scorers = {
        "none": lambda: _knn(bench, job, *last, whiten=False),
        "normalized": lambda: _knn(bench, job, *joined, whiten=False),
        "whitened": lambda: _knn(bench, job, *joined, whiten=True),
        "ocsvm": lambda: baselines.one_class_svm(*used),
        "iforest": lambda: baselines.isolation_forest(*used, job.seed),
        "gaussian": lambda: baselines.mahalanobis(*used),
        "deep_svdd": lambda: baselines.deep_svdd(*used, job.seed),
    }
    return {method: (scorers[method](), {}) for method in methods}


def _adapted(bench: Bench, job: Job, methods: Sequence[str]) -> Results:
    """Score by kNN under the snapshots of one training run, as `gallery` says.

    SES takes all of them; the last alone is the plain method.
    """
    adapted = bench.adapt(job)
    gallery = bench.settings.params.gallery.model_copy(update={"compression": "none"})
    train, test, labels = _features(bench, job, adapted, normalize=gallery.normalize)
    scores = fit_galleries(train, gallery, gallery.whiten, job.seed).score(test, gallery.k)
    folds = split_folds(len(train[0]), job.seed)
    means = out_of_fold(train, folds, gallery, gallery.whiten, job.seed).scores.mean(axis=1)
    facts = {
        "steps": adapted.steps,
        "snapshot_auroc": [auroc(labels, s) for s in scores],
        "collapsed_at": adapted.collapsed_at,
        "train_means": means.tolist(),
        "history": adapted.history,
    }
    if gallery.whiten:
        plain = fit_galleries(train, gallery, False, job.seed).score(test, gallery.k)
        facts["snapshot_auroc_not_whitened"] = [auroc(labels, s) for s in plain]
    return {method: (ses_scores(scores, means)[0] if method == "ses" else scores[-1], facts) for method in methods}


def _oe(bench: Bench, job: Job, _methods: Sequence[str]) -> Results:
    """Return the logit of outlier exposure's classifier on the adapted features.

    They are not normalized, as in training.
    """
    adapted = bench.adapt(job)
    assert adapted.classifier is not None
    features = bench.features(bench.test_items(job)[0], adapted, normalize=False)[-1]
    weight, bias = adapted.classifier["weight"].numpy(), adapted.classifier["bias"].numpy()
    return {"oe": ((features @ weight.T + bias)[:, 0], {"steps": adapted.steps})}


def _features(
    bench: Bench, job: Job, adapted: Adapted, *, normalize: bool
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Features of training and test images under each snapshot, S times (M, D) and (N, D), and test labels (N,)."""
    test_items, labels = bench.test_items(job)
    train, test = (
        bench.features(items, adapted, normalize=normalize) for items in (bench.train_items(job), test_items)
    )
    return train, test, labels


def _knn(bench: Bench, job: Job, train: np.ndarray, test: np.ndarray, *, whiten: bool) -> np.ndarray:
    """Return kNN scores (N,) of test features (N, D) by training features (M, D)."""
    gallery = bench.settings.params.gallery.model_copy(update={"compression": "none"})
    return fit_galleries([train], gallery, whiten, job.seed).score([test], gallery.k)[0]


_RUN = {"raw": _raw, "trajectory": _adapted, "ewc": _adapted, "oe": _oe}


def read_cell(path: Path) -> dict[str, Any]:
    """Return a finished cell."""
    return json.loads(path.read_text())
