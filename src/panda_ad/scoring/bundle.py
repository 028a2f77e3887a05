"""The bundle: a detector as files. Safetensors, faiss and JSON, no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from panda_ad.adapt.snapshots import pack_snapshots, unpack_snapshots
from panda_ad.errors import UserError
from panda_ad.features.backbones import Backbone
from panda_ad.features.image_statistics import NAMES, Reference
from panda_ad.scoring.detector import Detector, with_state
from panda_ad.scoring.gallery import Gallery
from panda_ad.scoring.image_score import PixelStatistics, RobustScale
from panda_ad.scoring.whitening import Whitening
from panda_ad.system.files import write_json, write_text

if TYPE_CHECKING:
    from panda_ad.scoring.localize.localizer import Localizer

FORMAT = 4
"""Version of the bundle's layout; a bundle of a newer one is refused. 1 knew no whitening, 2 no tiles, 3 no score but the features'; the oldest
that says all is written."""
_SEEN = "seen.txt"


def save_bundle(detector: Detector, folder: Path) -> None:
    """Write a detector into an existing, empty folder."""
    backbone, config = detector.backbone, detector.config
    tensors = {f"backbone.{k}": _smallest(v) for k, v in backbone.tensors().items()}
    adapted = [head.state_dict() for head, step in zip(detector.heads, config["steps"], strict=True) if step > 0]
    tensors |= {f"heads.{k}": v for k, v in pack_snapshots(backbone.adapted.state_dict(), adapted).items()}
    tensors |= {f"classifier.{k}": v for k, v in (detector.classifier or {}).items()}
    for s, whitening in enumerate(detector.whitenings):
        tensors |= {f"whitening.{s}.{k}": torch.from_numpy(v) for k, v in vars(whitening).items()}
    save_file(tensors, folder / "weights.safetensors")
    for s, gallery in enumerate(detector.galleries):
        gallery.save(folder / f"gallery_{s}.faiss")
    offsets = np.cumsum([0, *map(len, detector.thumbnails)])
    data = np.frombuffer(b"".join(detector.thumbnails) or b"\0", np.uint8).copy()
    save_file({"jpeg": torch.from_numpy(data), "offsets": torch.from_numpy(offsets)}, folder / "thumbnails.safetensors")
    if detector.reference is not None:
        tensors = {k: torch.from_numpy(v) for k, v in vars(detector.reference).items()}
        save_file(tensors, folder / "reference.safetensors", {"statistics": ",".join(NAMES)})
    if detector.usual is not None:
        save_file({k: torch.from_numpy(v) for k, v in vars(detector.usual).items()}, folder / "usual.safetensors")
    if detector.seen:
        write_text(folder / _SEEN, "".join(f"{key}\n" for key in sorted(detector.seen)))
    if detector.localizer is not None:
        (folder / "localizer").mkdir()
        detector.localizer.save(folder / "localizer")
    write_json(
        folder / "calibration.json", {"scores": detector.calibration.tolist(), "threshold": vars(detector.threshold())}
    )
    tiled = detector.localizer is not None and detector.localizer.tiles > 1
    version = FORMAT if config["score"] != "features" else 3 if tiled else 2
    scales = {} if detector.scales is None else {"scales": [vars(scale) for scale in detector.scales]}
    head = {"format": version, "architecture": backbone.name, **config, **scales}
    write_json(
        folder / "bundle.json", {**head, "train_means": detector.train_means.tolist(), "images": detector.images}
    )


def load_bundle(folder: Path | str, false_alarm_rate: float | None = None) -> Detector:
    """Read what `save_bundle` wrote, optionally with another false-alarm rate. UserError where it is missing, damaged or too new."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
        if config["format"] > FORMAT:
            raise UserError(
                f"{folder}: bundle format {config['format']} is newer than this panda-ad's ({FORMAT}); update panda-ad"
            )
        if false_alarm_rate is not None:
            config["false_alarm_rate"] = false_alarm_rate
        calibration = np.array(
            json.loads((folder / "calibration.json").read_text(encoding="utf-8"))["scores"], dtype=np.float64
        )
        groups: dict[str, dict[str, Tensor]] = {"backbone": {}, "heads": {}, "classifier": {}, "whitening": {}}
        with safe_open(folder / "weights.safetensors", "pt") as f:
            for key in f.keys():  # noqa: SIM118  (safe_open is no mapping)
                group, name = key.split(".", 1)
                groups[group][name] = f.get_tensor(key)
        with safe_open(folder / "thumbnails.safetensors", "pt") as f:
            data, offsets = f.get_tensor("jpeg").numpy().tobytes(), f.get_tensor("offsets").tolist()
        backbone = Backbone(config.pop("architecture"), groups["backbone"])
        adapted = iter(unpack_snapshots(backbone.adapted.state_dict(), groups["heads"]))
        heads = [
            backbone.adapted if step == 0 else with_state(backbone.adapted, next(adapted)) for step in config["steps"]
        ]
        galleries = [Gallery.load(folder / f"gallery_{s}.faiss") for s in range(len(heads))]
        white = groups["whitening"]
        whitened = range(len(heads) if config.setdefault("whiten", False) else 0)
        whitenings = [Whitening(white[f"{s}.mean"].numpy(), white[f"{s}.matrix"].numpy()) for s in whitened]
        localizer = _load_localizer(folder / "localizer")
        usual = _load_usual(folder / "usual.safetensors", config.setdefault("score", "features") != "features")
        reference = _load_reference(folder / "reference.safetensors")
        seen = frozenset((folder / _SEEN).read_text().split()) if (folder / _SEEN).exists() else frozenset()
        images, means = config.pop("images"), np.array(config.pop("train_means"))
        found = tuple(RobustScale(s.get("center", s.get("centre")), s["spread"]) for s in config.pop("scales", []))
        scales = (found[0], found[1]) if config["score"] == "both" else None
        config.pop("format")
    except UserError:
        raise
    except FileNotFoundError as e:
        raise UserError(
            f"{folder}: not a bundle, {Path(str(e.filename or folder)).name} is missing; run `dvc repro` to build one"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, StopIteration, SafetensorError) as e:
        raise UserError(
            f"{folder}: damaged bundle ({type(e).__name__}: {' '.join(str(e).split())[:120]}); build it again"
        ) from None
    thumbnails = [data[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]
    classifier = groups["classifier"] or None
    return Detector(
        config,
        backbone,
        heads,
        galleries,
        means,
        classifier,
        calibration,
        localizer,
        images,
        thumbnails,
        whitenings,
        reference,
        usual,
        scales,
        seen,
    )


def _load_reference(path: Path) -> Reference | None:
    """None where the bundle is from before monitoring, or knows other statistics than this version."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as f:
        if (f.metadata() or {}).get("statistics") != ",".join(NAMES):
            return None
        return Reference(f.get_tensor("statistics").numpy(), f.get_tensor("features").numpy())


def _load_usual(path: Path, needed: bool) -> PixelStatistics | None:
    if not path.exists() and not needed:
        return None
    return PixelStatistics(**{k: v.numpy() for k, v in load_file(path).items()})


def _load_localizer(folder: Path) -> Localizer | None:
    if not folder.exists():
        return None
    from panda_ad.scoring.localize.localizer import load_localizer

    return load_localizer(folder)


def _smallest(value: Tensor) -> Tensor:
    """float16 where that loses nothing (the embedded weights), else float32."""
    half = value.half()
    return half.contiguous() if torch.equal(half.float(), value) else value.contiguous()
