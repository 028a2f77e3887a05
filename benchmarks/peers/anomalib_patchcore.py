# SPDX-License-Identifier: Apache-2.0
"""anomalib's PatchCore with the weights of the default network, fitted through its own Engine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
from anomalib.data import Folder
from anomalib.data.utils.synthetic import SyntheticAnomalyDataset
from anomalib.engine import Engine
from anomalib.models import MHPatchcore, Patchcore
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize

from panda_ad.features.pretrained import published

NETWORK = "tf_efficientnet_lite0"
LAYERS = ("blocks.2", "blocks.4")  # strides 8 and 16, as layer2 and layer3 of the ResNets that PatchCore was made with
COVERED = {"patchcore": Patchcore, "mh_patchcore": MHPatchcore}


@dataclass(frozen=True)
class Peer:
    """A fitted model.

    Attributes
    ----------
    model : Lightning module in eval mode.
    threshold : raw score at which anomalib's default rule raises an alarm: the best F1 on synthetic anomalies.
    """

    model: Any
    threshold: float

    @torch.inference_mode()
    def score(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return raw scores (N,) and maps (N, h, w) of images, uint8 (H, W, 3) of one size each call."""
        pixels = torch.stack([torch.from_numpy(x).permute(2, 0, 1).float() / 255 for x in images])
        found = self.model.model(self.model.pre_processor(pixels))
        maps = found.anomaly_map.reshape(len(images), *found.anomaly_map.shape[-2:])
        return found.pred_score.reshape(-1).numpy(), maps.numpy()

    def bytes(self) -> int:
        """Return the size of the model's tensors."""
        return sum(x.numel() * x.element_size() for x in self.model.model.state_dict().values())


def fit(kind: str, train: Sequence[Path], calibration: Sequence[Path], size: int, ratio: float) -> Peer:
    """Fit to the training files; the calibration files, half of them with synthetic anomalies, set its threshold."""
    transform = Compose(
        [
            Resize((size, size), interpolation=InterpolationMode.BICUBIC, antialias=True),
            Normalize(mean=[0.5] * 3, std=[0.5] * 3),  # what these weights were trained with
        ]
    )
    options: dict[str, Any] = {
        "backbone": NETWORK,
        "layers": list(LAYERS),
        "pre_processor": PreProcessor(transform=transform),
        "post_processor": PostProcessor(enable_normalization=False),
        "evaluator": False,
        "visualizer": False,
    }
    if kind == "patchcore":
        options["coreset_sampling_ratio"] = ratio
    with mock.patch.object(timm, "create_model", _with_our_weights(timm.create_model)):
        model = COVERED[kind](**options)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = Folder("train", _linked(train, root / "train"), val_split_mode="none", test_split_mode="none", **LOADING)
        held = Folder("held", _linked(calibration, root / "held"), val_split_mode="none", test_split_mode="none")
        for module in (data, held):
            module.setup()
        data.val_data = SyntheticAnomalyDataset.from_dataset(held.train_data)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        engine = Engine(default_root_dir=root, accelerator="cpu", **quiet)
        engine.fit(model=model, datamodule=data)
    return Peer(model.eval(), float(model.post_processor._image_threshold))


LOADING = {"train_batch_size": 8, "eval_batch_size": 8, "num_workers": 0}


def _linked(files: Sequence[Path], folder: Path) -> Path:
    folder.mkdir(parents=True)
    for i, file in enumerate(files):
        os.symlink(file.resolve(), folder / f"{i:05}{file.suffix}")
    return folder


def _with_our_weights(create: Any) -> Any:
    """Return timm's `create_model`, whose pretrained `NETWORK` has the weights of the data package, without a hub."""

    def created(name: str, pretrained: bool = False, **options: Any) -> Any:
        net = create(name, pretrained=False, **options)
        if not pretrained:
            return net
        assert name == NETWORK
        whole = create(name, pretrained=False)
        theirs, package = whole.state_dict(), _package_state()
        assert len(theirs) == len(package)
        renamed = {}
        for (key, old), value in zip(theirs.items(), package.values(), strict=True):
            assert old.shape == value.shape, key
            renamed[key.replace(".", "_")] = value
        state = {key: renamed[key.replace(".", "_")] for key in net.state_dict()}
        net.load_state_dict(state)
        return net

    return created


def _package_state() -> dict[str, torch.Tensor]:
    return dict(published("efficientnet_lite0", "DEFAULT"))
