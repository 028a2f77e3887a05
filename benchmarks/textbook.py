"""PANDA as a textbook writes it, to measure against: no cache, one process, float32 throughout.

Every epoch decodes, resizes and normalizes each training image again and runs the whole network on it, frozen layers too,
and evaluates: features of all training and test images by the whole network, leave-one-out and test kNN scores. The score
is sample-wise early stopping over these evaluations (paper, section 3.3), the same as `ses` of panda-ad computes.

    python benchmarks/textbook.py DATA/cifar10 airplane --size 64 --epochs 15

DATA holds train/<class>/ and test/<class>/ with image files. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import faiss
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models import get_model

import panda_ad.features.backbones

LEARNING_RATE = 1e-2  # the paper's


class Images(Dataset):
    """Image files, decoded and transformed at each access."""

    def __init__(self, paths: list[Path], size: int):
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.Resize((size, size)),
                transforms.ToTensor(),
                transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self.paths[i]) as image:
            return self.transform(image.convert("RGB"))  # (3, size, size) float32


def load_network(name: str, weights: str) -> nn.Module:
    """torchvision's ResNet without its classifier: (B, 3, H, W) -> (B, D). `embedded` is the ResNet-18 inside panda-ad."""
    if name == "embedded":
        state = {k: v.float() for k, v in load_file(panda_ad.features.backbones.EMBEDDED).items()}
        network = get_model("resnet18", num_classes=state["fc.weight"].shape[0])
        network.load_state_dict(state, strict=False)
    else:
        network = get_model(name, weights=weights)
    network.fc = nn.Identity()
    network.requires_grad_(False)
    for part in (network.layer3, network.layer4):
        part.requires_grad_(True)
    return network.eval()  # batch-norm statistics stay fixed while training too


@torch.no_grad()
def features(network: nn.Module, images: Images) -> np.ndarray:
    """(N, D) float32."""
    return torch.cat([network(x) for x in DataLoader(images, batch_size=32)]).numpy()


def knn_scores(gallery: np.ndarray, queries: np.ndarray, k: int, skip: int = 0) -> np.ndarray:
    """Sum of squared L2 distances to the k nearest after leaving out the `skip` nearest (1: a training image itself), (N,)."""
    index = faiss.IndexFlatL2(gallery.shape[1])
    index.add(gallery)
    return index.search(queries, k + skip)[0][:, skip:].sum(axis=1)


def listing(root: Path, split: str, name: str, limit: int | None) -> list[Path]:
    """Image files of one class, the first `limit` of them."""
    paths = sorted(p for p in (root / split / name).iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return paths[:limit]


def textbook(
    root: Path, normal: str, size: int, epochs: int, train: int | None, test: int | None, name: str, weights: str
) -> dict:
    """Run it; `train` and `test` limit the images per class. Returns AUROC of each evaluation, of SES, and seconds of each part."""
    torch.manual_seed(0)
    seconds = {"train": 0.0, "evaluate": 0.0}
    start, cpu = time.perf_counter(), time.process_time()
    network = load_network(name, weights)
    classes = sorted(p.name for p in (root / "test").iterdir() if p.is_dir())
    train_images = Images(listing(root, "train", normal, train), size)
    test_paths = [(p, c != normal) for c in classes for p in listing(root, "test", c, test)]
    test_images = Images([p for p, _ in test_paths], size)
    labels = np.array([anomalous for _, anomalous in test_paths])

    aurocs, scaled = [], []

    def evaluate() -> np.ndarray:
        began = time.perf_counter()
        gallery = features(network, train_images)
        scores = knn_scores(gallery, features(network, test_images), k=2)
        aurocs.append(float(roc_auc_score(labels, scores)))
        scaled.append(scores / knn_scores(gallery, gallery, k=2, skip=1).mean())
        seconds["evaluate"] += time.perf_counter() - began
        return gallery

    center = torch.from_numpy(evaluate().mean(axis=0))
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-5)
    for _ in range(epochs):
        began = time.perf_counter()
        for x in DataLoader(train_images, batch_size=32, shuffle=True):
            loss = (network(x) - center).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1e-3)
            optimizer.step()
        seconds["train"] += time.perf_counter() - began
        evaluate()
    ses = float(roc_auc_score(labels, np.max(scaled, axis=0)))
    total, cpu = time.perf_counter() - start, time.process_time() - cpu
    counts = {
        "train": len(train_images),
        "test": len(test_images),
        "epochs": epochs,
        "threads": torch.get_num_threads(),
    }
    return {"seconds": total, "cpu": cpu, "parts": seconds, **counts, "auroc": aurocs, "ses": ses}


def main() -> None:
    parser = argparse.ArgumentParser(description="The textbook run of PANDA on one class.")
    parser.add_argument("root", type=Path, help="folder with train/<class>/ and test/<class>/")
    parser.add_argument("normal", help="the normal class")
    parser.add_argument("--size", type=int, default=64, help="network input, pixels")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--train", type=int, help="at most so many training images")
    parser.add_argument("--test", type=int, help="at most so many test images per class")
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--weights", default="DEFAULT")
    a = parser.parse_args()
    print(json.dumps(textbook(a.root, a.normal, a.size, a.epochs, a.train, a.test, a.backbone, a.weights)))


if __name__ == "__main__":
    main()
