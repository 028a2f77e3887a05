# SPDX-License-Identifier: Apache-2.0
"""PANDA as a textbook writes it and as its authors wrote it, to measure against: no cache, one process.

Every epoch decodes, resizes and normalizes each training image again and runs the whole network on it, frozen layers
too; after it features of all training and test images are computed by the whole network and the test images scored by
kNN.

- `textbook` scores the training images too, leave-one-out, for sample-wise early stopping over these evaluations
  (paper, section 3.2).
- `authors` is the loop of the authors' repository (panda.py): Resize by 256 / 224 (bicubic), CenterCrop, float32, no
  SES.

    python benchmarks/textbook.py DATA/cifar10 airplane --size 64 --epochs 15

DATA holds train/<class>/ and test/<class>/ with image files. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
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

from panda_ad.features.backbones import Backbone, load_backbone

LEARNING_RATE = 1e-2  # the paper's


@dataclass(frozen=True)
class Run:
    """What is run.

    `train` and `test` limit the images per class; `bf16` is for the textbook's forward passes (autocast).
    """

    root: Path
    normal: str
    size: int = 64
    epochs: int = 15
    train: int | None = None
    test: int | None = None
    bf16: bool = False
    authors: bool = False


class Images(Dataset):
    """Image files, decoded and transformed at each access."""

    def __init__(self, paths: list[Path], run: Run, backbone: Backbone):
        self.paths = paths
        entry = backbone.architecture
        resize: list = [transforms.Resize((run.size, run.size))]
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
        self.frozen, self.adapted, self.bf16 = backbone.frozen, backbone.adapted, run.bf16 and not run.authors
        self.adapted.requires_grad_(True)
        self.layout = torch.contiguous_format if run.authors else torch.channels_last
        self.to(memory_format=self.layout).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features (B, D) float32 of images (B, 3, H, W)."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return self.adapted(self.frozen(x.contiguous(memory_format=self.layout))[-1]).float()


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


def listing(root: Path, split: str, name: str, limit: int | None) -> list[Path]:
    """Return image files of one class, the first `limit` of them."""
    paths = sorted(p for p in (root / split / name).iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return paths[:limit]


def textbook(run: Run) -> dict:
    """Run it; return AUROC of each evaluation, of SES, and seconds of each part."""
    torch.manual_seed(0)
    seconds = {"train": 0.0, "evaluate": 0.0}
    start, cpu = time.perf_counter(), time.process_time()
    backbone = load_backbone("embedded")
    network = Whole(backbone, run)
    classes = sorted(p.name for p in (run.root / "test").iterdir() if p.is_dir())
    train_images = Images(listing(run.root, "train", run.normal, run.train), run, backbone)
    test_paths = [(p, c != run.normal) for c in classes for p in listing(run.root, "test", c, run.test)]
    test_images = Images([p for p, _ in test_paths], run, backbone)
    labels = np.array([anomalous for _, anomalous in test_paths])
    aurocs, scaled = [], []

    def evaluate() -> np.ndarray:
        began = time.perf_counter()
        gallery = features(network, train_images)
        scores = knn_scores(gallery, features(network, test_images), k=2)
        aurocs.append(float(roc_auc_score(labels, scores)))
        if not run.authors:
            scaled.append(scores / knn_scores(gallery, gallery, k=2, skip=1).mean())
        seconds["evaluate"] += time.perf_counter() - began
        return gallery

    center = torch.from_numpy(evaluate().mean(axis=0))
    parameters = list(network.adapted.parameters())
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-5)
    for _ in range(run.epochs):
        began = time.perf_counter()
        for x in DataLoader(train_images, batch_size=32, shuffle=True):
            loss = (network(x) - center).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1e-3)
            optimizer.step()
        seconds["train"] += time.perf_counter() - began
        evaluate()
    total, cpu = time.perf_counter() - start, time.process_time() - cpu
    counts = {"train": len(train_images), "test": len(test_images), "threads": torch.get_num_threads()}
    return {
        "seconds": total,
        "cpu": cpu,
        "parts": seconds,
        **counts,
        "auroc": aurocs,
        "ses": float(roc_auc_score(labels, np.max(scaled, axis=0))) if scaled else None,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="The textbook run of PANDA on one class.")
    parser.add_argument("root", type=Path, help="folder with train/<class>/ and test/<class>/")
    parser.add_argument("normal", help="the normal class")
    parser.add_argument("--size", type=int, default=64, help="network input, pixels")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--train", type=int, help="at most so many training images")
    parser.add_argument("--test", type=int, help="at most so many test images per class")
    parser.add_argument("--bf16", action="store_true", help="forward passes in bfloat16 (autocast)")
    parser.add_argument("--authors", action="store_true", help="the authors' loop")
    print(json.dumps(textbook(Run(**vars(parser.parse_args())))))


if __name__ == "__main__":
    main()
