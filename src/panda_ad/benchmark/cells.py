"""One job of the benchmark: adapt, score the test images, write a cell per method.

A cell is a JSON file: which data set, class, method, seed and settings; test labels and scores; AUROC. It is written
atomically when finished, so that a killed run resumes at the job it was in.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from panda_ad.adapt.convolution import small_convolutions
from panda_ad.adapt.fisher import cached_fisher, load_fisher, source_labels
from panda_ad.adapt.train import Adapted, adapt
from panda_ad.benchmark.protocols import OUTLIERS, Job, Settings, choose, choose_test, train_refs
from panda_ad.benchmark.sources import Images, Ref, as_item, read_labelled, read_set
from panda_ad.data.outliers import is_gray, outlier_item
from panda_ad.evaluation.image_metrics import auroc
from panda_ad.features.backbones import AdaptedLayers, load_backbone, resolve_precision
from panda_ad.features.cache import Activations, Item
from panda_ad.scoring.gallery import Gallery
from panda_ad.scoring.ses import ses_scores
from panda_ad.scoring.whitening import fit_whitening
from panda_ad.system.files import atomic_file, write_json
from panda_ad.system.processes import keep_freed_memory

_BATCH = 64  # images per forward pass: their maps stay in the cache, and the filters are made once for all passes


class Bench:
    """What the jobs of one process share: backbone, activation cache, items, raw features.

    Parameters
    ----------
    settings : see there.
    data : folder of the data sets.  out : folder of the results.  cache : folder of the activation caches.
    """

    def __init__(self, settings: Settings, data: Path, out: Path, cache: Path):
        keep_freed_memory()
        b = settings.backbone
        self.settings, self.data, self.out = settings, data, out
        self.backbone = load_backbone(b.name, b.weights)
        self.activations = Activations(self.backbone, b.size, resolve_precision(b.precision), cache, b.cache_gb)
        self.adapted = copy.deepcopy(self.backbone.adapted).to(memory_format=torch.contiguous_format)
        self._pretrained = copy.deepcopy(self.adapted.state_dict())
        self._items: dict[tuple, list[Item]] = {}

    def images(self, job: Job) -> Images:
        """The images of the job's data set or category."""
        return read_set(job.dataset, self.data)[job.category]

    def items(self, name: tuple, refs: Sequence[Ref]) -> list[Item]:
        """`refs` as items of the activation cache, their activations stored there; hashed once per `name`."""
        if name not in self._items:
            self._items[name] = [as_item(ref) for ref in refs]
            self.activations.warm(self._items[name], label=" ".join(map(str, name)))
        return self._items[name]

    def outliers(self, name: tuple, files: Sequence[Ref], like: np.ndarray) -> list[Item]:
        """Outlier images as items, at the resolution of the normal images, of which `like`, uint8 (H, W, 3), is one."""
        size, gray = (like.shape[0], like.shape[1]), is_gray(like)
        name = (*name, *size, gray)
        if name not in self._items:
            self._items[name] = [outlier_item(path, size, gray) for path in files if isinstance(path, Path)]
            self.activations.warm(self._items[name], label=" ".join(map(str, name)))
        return self._items[name]

    def layer2(self, items: Sequence[Item]) -> np.ndarray:
        """FrozenLayers activations, float16 (N, C2, h, w), in memory: 16 kB an image at 64 px."""
        return self.activations.view(items)[:]

    def train_items(self, job: Job) -> list[Item]:
        return self.items(
            (job.dataset, job.category, "train", *job.normal),
            train_refs(self.images(job), job.normal, self.settings.train),
        )

    def test_items(self, job: Job) -> tuple[list[Item], np.ndarray]:
        """The test images that every class of the set shares, and their labels for this job, bool (N,)."""
        images = self.images(job)
        chosen = choose_test(images, self.settings.test)
        items = self.items((job.dataset, job.category, "test"), [images.test[i] for i in chosen])
        return items, np.array([images.test_class[i] not in job.normal for i in chosen])

    def features(self, layer2: np.ndarray, state: Mapping[str, torch.Tensor] | None = None) -> np.ndarray:
        """Pooled features under a head, by default the pretrained one: (N, C2, h, w) -> float32 (N, D), normalized if the settings say so."""
        return self._normalized(head_features(self.with_state(self._pretrained if state is None else state), layer2))

    def _normalized(self, features: np.ndarray) -> np.ndarray:
        if not self.settings.gallery.normalize:
            return features
        return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)

    def raw(self, items: Sequence[Item]) -> np.ndarray:
        """Unadapted features float32 (N, D), computed once per list of images and kept on disk."""
        digest = hashlib.sha256("".join(item.key for item in items).encode()).hexdigest()[:24]
        path = self.out / "raw" / self.activations.folder.name / f"{digest}.npy"
        if not path.exists():
            values = head_features(self.with_state(self._pretrained), self.layer2(items))
            with atomic_file(path) as temporary, open(temporary, "wb") as f:
                np.save(f, values)
        return self._normalized(np.load(path))

    def with_state(self, state: Mapping[str, torch.Tensor]) -> AdaptedLayers:
        """The head with these weights."""
        self.adapted.load_state_dict(state, strict=False)
        return self.adapted

    def run(self, job: Job) -> list[Path]:
        """Compute the cells of a job that are missing, and write them; returns their files."""
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


@torch.no_grad()
def head_features(head: AdaptedLayers, layer2: np.ndarray) -> np.ndarray:
    """(N, C2, h, w) float16 -> (N, D) float32, in float32 and large batches."""
    starts = tqdm(range(0, len(layer2), _BATCH), desc="features", unit="batch", disable=None)
    with small_convolutions():
        parts = [head(torch.from_numpy(layer2[i : i + _BATCH]).float()) for i in starts]
    return torch.cat(parts).numpy()


Results = dict[str, tuple[np.ndarray, dict[str, Any]]]


def _raw(bench: Bench, job: Job, methods: Sequence[str]) -> Results:
    """DN2 and the baselines, all on the unadapted features."""
    from panda_ad.benchmark import baselines

    train, test = bench.raw(bench.train_items(job)), bench.raw(bench.test_items(job)[0])
    scorers = {
        "none": lambda: Gallery(train).score(test, bench.settings.gallery.k),
        "whitened": lambda: _whitened(train, test, bench.settings.gallery.k),
        "ocsvm": lambda: baselines.one_class_svm(train, test),
        "iforest": lambda: baselines.isolation_forest(train, test, job.seed),
        "gaussian": lambda: baselines.mahalanobis(train, test),
        "deep_svdd": lambda: baselines.deep_svdd(train, test, job.seed),
    }
    return {method: (scorers[method](), {}) for method in methods}


def _whitened(train: np.ndarray, test: np.ndarray, k: int) -> np.ndarray:
    whiten = fit_whitening(train)
    return Gallery(whiten(train)).score(whiten(test), k)


def _adapted(bench: Bench, job: Job, **more: Any) -> Adapted:
    layer2, precision = bench.layer2(bench.train_items(job)), torch.bfloat16 if bench.settings.bf16 else torch.float32
    params = bench.settings.adapt[job.family]
    return adapt(bench.backbone, layer2, params, seed=job.seed, precision=precision, **more)


def _knn(bench: Bench, job: Job, adapted: Adapted) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Scores (S, N) and mean leave-one-out score of the training images (S,) under each snapshot, and facts for the cell."""
    k = bench.settings.gallery.k
    train_items, (test_items, labels) = bench.train_items(job), bench.test_items(job)
    train, test = bench.layer2(train_items), bench.layer2(test_items)
    scores, means = [], []
    for step, state in zip(adapted.steps, adapted.snapshots, strict=True):
        raw = step == 0
        gallery = Gallery(bench.raw(train_items) if raw else bench.features(train, state))
        scores.append(gallery.score(bench.raw(test_items) if raw else bench.features(test, state), k))
        means.append(gallery.leave_one_out(k).mean())
    facts = {
        "steps": adapted.steps,
        "snapshot_auroc": [auroc(labels, s) for s in scores],
        "collapsed_at": adapted.collapsed_at,
    }
    return np.stack(scores), np.array(means), facts


def _trajectory(bench: Bench, job: Job, methods: Sequence[str]) -> Results:
    """SES over the snapshots of one training run, of which the last is plain compactness with a fixed number of steps."""
    scores, means, facts = _knn(bench, job, _adapted(bench, job))
    facts["train_means"] = means.tolist()
    return {method: (ses_scores(scores, means)[0] if method == "ses" else scores[-1], facts) for method in methods}


def _fisher(bench: Bench, job: Job) -> dict[str, torch.Tensor]:
    """EWC's Fisher diagonal: from a file; from a folder of labelled source images (once, kept on disk); or from the training images."""
    source, samples = bench.settings.fisher, bench.settings.adapt["ewc"].fisher_samples
    kept = bench.out / "fisher"
    if source is None:
        return cached_fisher(kept, bench.backbone, bench.layer2(bench.train_items(job)), samples=samples, seed=job.seed)
    if not source.is_dir():
        return load_fisher(source, bench.backbone)
    files, folders = read_labelled(source)
    labels = source_labels(folders, bench.backbone.fc.out_features if bench.backbone.fc else 0, str(source))
    chosen = np.random.default_rng(0).permutation(len(files))[:samples]
    images = bench.layer2(bench.items(("fisher", source.name), [files[i] for i in chosen]))
    return cached_fisher(kept, bench.backbone, images, labels[chosen], samples=samples, seed=0)


def _ewc(bench: Bench, job: Job, methods: Sequence[str]) -> Results:
    scores, _, facts = _knn(bench, job, _adapted(bench, job, fisher=_fisher(bench, job)))
    return {"ewc": (scores[-1], facts)}


def _oe(bench: Bench, job: Job, methods: Sequence[str]) -> Results:
    """The logit of outlier exposure's linear head on the adapted features."""
    assert bench.settings.outliers is not None
    files, _ = read_labelled(bench.settings.outliers)
    limit = None if bench.settings.train is None else OUTLIERS * bench.settings.train
    like = bench.train_items(job)[0].read()
    outliers = bench.outliers(
        ("outliers", str(bench.settings.outliers)), [files[i] for i in choose(len(files), limit, "outliers")], like
    )
    adapted = _adapted(bench, job, outliers=bench.layer2(outliers))
    assert adapted.classifier is not None
    # as they come, never normalized: so the classifier was trained
    features = head_features(bench.with_state(adapted.snapshots[-1]), bench.layer2(bench.test_items(job)[0]))
    weight, bias = adapted.classifier["weight"].numpy(), adapted.classifier["bias"].numpy()
    return {"oe": ((features @ weight.T + bias)[:, 0], {"steps": adapted.steps})}


_RUN = {"raw": _raw, "trajectory": _trajectory, "ewc": _ewc, "oe": _oe}


def read_cell(path: Path) -> dict[str, Any]:
    """A finished cell."""
    return json.loads(path.read_text())
