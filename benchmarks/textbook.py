# SPDX-License-Identifier: Apache-2.0
"""PANDA as a textbook writes it and as its authors wrote it, to measure against: no cache, one process.

Every epoch decodes, resizes and normalizes each training image again and runs the whole network on it, frozen layers
too; after it features of all training and test images are computed by the whole network and the test images scored by
kNN. All in float32.

- `textbook` scores the training images too, leave-one-out, for sample-wise early stopping over these evaluations
  (paper, section 3.2). It resizes as our pipeline does.
- `authors` is the loop of the authors' repository (panda.py): Resize by 256 / 224 (bicubic), CenterCrop, tensors in
  PyTorch's default layout, no SES.

`benchmarks/compare_textbook.py` runs both.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from panda_ad.features.backbones import Backbone

LEARNING_RATE = 1e-2  # the paper's


@dataclass(frozen=True)
class Run:
    """What is run.

    Attributes
    ----------
    train : files of normal training images.
    test : files of test images.
    labels : bool (N,), which of these are anomalous.
    size : network input, pixels a side.
    epochs : of training; features are evaluated before it and after each.
    authors : the authors' loop.
    """

    train: list[Path]
    test: list[Path]
    labels: np.ndarray
    size: int
    epochs: int
    authors: bool = False


class Images(Dataset):
    """Image files, decoded and transformed at each access."""

    def __init__(self, paths: list[Path], run: Run, backbone: Backbone):
        self.paths = paths
        entry = backbone.architecture
        mode = transforms.InterpolationMode(entry.interpolation)
        resize: list = [transforms.Resize((run.size, run.size), mode)]
        if run.authors:
            larger = transforms.Resize(round(run.size * 256 / 224), transforms.InterpolationMode.BICUBIC)
            resize = [larger, transforms.CenterCrop(run.size)]
        self.transform = transforms.Compose(
            [*resize, transforms.ToTensor(), transforms.Normalize(entry.mean, entry.std)]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self.paths[i]) as image:
            return self.transform(image.convert("RGB"))  # (3, size, size) float32


class Whole(nn.Module):
    """The whole network: (B, 3, H, W) -> (B, D) float32; batch-norm statistics stay fixed while training too."""

    def __init__(self, backbone: Backbone, run: Run):
        super().__init__()
        self.frozen, self.adapted = backbone.frozen, backbone.adapted
        self.adapted.requires_grad_(True)
        self.layout = torch.contiguous_format if run.authors else torch.channels_last
        self.to(memory_format=self.layout).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features (B, D) float32 of images (B, 3, H, W)."""
        return self.adapted(self.frozen(x.contiguous(memory_format=self.layout))[-1])


@torch.no_grad()
def features(network: nn.Module, images: Images) -> np.ndarray:
    """Return features (N, D) float32."""
    return torch.cat([network(x) for x in DataLoader(images, batch_size=32)]).numpy()


def knn_scores(gallery: np.ndarray, queries: np.ndarray, k: int, skip: int = 0) -> np.ndarray:
    """Return the sum of squared L2 distances to the k nearest, (N,), after leaving out the `skip` nearest.

    `skip` is 1 if the queries are in the gallery, so a training image does not find itself.
    """
    index = faiss.IndexFlatL2(gallery.shape[1])
    index.add(gallery)
    return index.search(queries, k + skip)[0][:, skip:].sum(axis=1)


def textbook(run: Run, backbone: Backbone) -> dict:
    """Run it, which trains `backbone`; return AUROC of each evaluation, of SES, and seconds of each part."""
    torch.manual_seed(0)
    parts = {"train": 0.0, "evaluate": 0.0}  # processor seconds
    start, cpu = time.perf_counter(), time.process_time()
    network = Whole(backbone, run)
    train_images, test_images = Images(run.train, run, backbone), Images(run.test, run, backbone)
    aurocs, scaled = [], []

    def evaluate() -> np.ndarray:
        began = time.process_time()
        gallery = features(network, train_images)
        scores = knn_scores(gallery, features(network, test_images), k=2)
        aurocs.append(float(roc_auc_score(run.labels, scores)))
        if not run.authors:
            scaled.append(scores / knn_scores(gallery, gallery, k=2, skip=1).mean())
        parts["evaluate"] += time.process_time() - began
        return gallery

    center = torch.from_numpy(evaluate().mean(axis=0))
    parameters = list(network.adapted.parameters())
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-5)
    for _ in range(run.epochs):
        began = time.process_time()
        for x in DataLoader(train_images, batch_size=32, shuffle=True):
            loss = (network(x) - center).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1e-3)
            optimizer.step()
        parts["train"] += time.process_time() - began
        evaluate()
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "parts": parts,
        "auroc": aurocs,
        "ses": float(roc_auc_score(run.labels, np.max(scaled, axis=0))) if scaled else None,
    }
