# SPDX-License-Identifier: Apache-2.0
"""The bundle: a detector as files. Safetensors, faiss and JSON, no pickle."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from panda_ad.errors import UserError
from panda_ad.features.image_statistics import NAMES, Reference
from panda_ad.features.network import load_network
from panda_ad.scoring.bundle_formats import FORMAT, check_format
from panda_ad.scoring.checksums import CHECKSUMS, damage, write_checksums
from panda_ad.scoring.config import DetectorConfig
from panda_ad.scoring.detector import Detector
from panda_ad.scoring.gallery import Gallery
from panda_ad.scoring.image_score import RobustScale
from panda_ad.scoring.localize.localizer import load_localizer
from panda_ad.scoring.whitening import Whitening
from panda_ad.system.files import write_json, write_text

_SEEN = "seen.txt"
_NETWORK, _LEARNED = "network", "learned.safetensors"


def save_bundle(detector: Detector, folder: Path) -> None:
    """Write a detector into an existing, empty folder."""
    (folder / _NETWORK).mkdir()
    detector.network.save(folder / _NETWORK)
    save_file(_learned(detector), folder / _LEARNED)
    for s, gallery in enumerate(detector.galleries):
        gallery.save(folder / f"gallery_{s}.faiss")
    offsets = np.cumsum([0, *map(len, detector.thumbnails)])
    data = np.frombuffer(b"".join(detector.thumbnails) or b"\0", np.uint8)
    save_file({"jpeg": data, "offsets": offsets}, folder / "thumbnails.safetensors")
    if detector.reference is not None:
        save_file(asdict(detector.reference), folder / "reference.safetensors", {"statistics": ",".join(NAMES)})
    if detector.seen:
        write_text(folder / _SEEN, "".join(f"{key}\n" for key in sorted(detector.seen)))
    if detector.localizer is not None:
        (folder / "localizer").mkdir()
        detector.localizer.save(folder / "localizer")
    limit = asdict(detector.threshold())
    known = {"sessions": list(detector.sessions), "within": detector.within.tolist()} if detector.sessions else {}
    write_json(folder / "calibration.json", {"scores": detector.calibration.tolist(), "threshold": limit, **known})
    write_json(
        folder / "bundle.json",
        {
            "format": FORMAT,
            "architecture": detector.network.facts.name,
            "input_size": list(detector.network.size),
            "engine": asdict(detector.network.facts.engine),
            "steps": list(detector.network.steps),
            **detector.config.model_dump(mode="json"),
            "scales": [asdict(scale) for scale in detector.scales or ()],
            "train_means": detector.train_means.tolist(),
            "images": list(detector.images),
        },
    )
    write_checksums(folder)


def load_bundle(folder: Path | str, false_alarm_rate: float | None = None) -> Detector:
    """Read what `save_bundle` wrote, optionally with another false-alarm rate.

    Raises
    ------
    UserError
        The bundle is missing, damaged or of another format.
    """
    folder = Path(folder)
    try:
        if found := damage(folder):
            raise UserError(f"{folder}: damaged bundle, {found}; build it again, or pull or copy it again")
        facts = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
        check_format(facts, folder)
        (folder / CHECKSUMS).stat()
        return _load(folder, facts, {} if false_alarm_rate is None else {"false_alarm_rate": false_alarm_rate})
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


def _load(folder: Path, facts: dict[str, Any], changes: dict[str, Any]) -> Detector:
    config = DetectorConfig(**{k: v for k, v in facts.items() if k in DetectorConfig.model_fields} | changes)
    calibration = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    network, learned = load_network(folder / _NETWORK), load_file(folder / _LEARNED)
    snapshots = range(len(network.steps))
    whitenings = [
        Whitening(learned[f"whitening.{s}.mean"], learned[f"whitening.{s}.matrix"]) for s in snapshots if config.whiten
    ]
    classifier = {name: learned[f"classifier.{name}"] for name in ("weight", "bias") if f"classifier.{name}" in learned}
    scales = [RobustScale(scale["center"], scale["spread"]) for scale in facts["scales"]]
    thumbnails = load_file(folder / "thumbnails.safetensors")
    data, offsets = thumbnails["jpeg"].tobytes(), thumbnails["offsets"].tolist()
    seen = folder / _SEEN
    return Detector(
        config,
        network,
        galleries=tuple(Gallery.load(folder / f"gallery_{s}.faiss") for s in snapshots),
        train_means=np.array(facts["train_means"], dtype=np.float64),
        whitenings=tuple(whitenings),
        classifier=classifier or None,
        localizer=load_localizer(folder / "localizer") if (folder / "localizer").exists() else None,
        scales=(scales[0], scales[1]) if config.score == "both" else None,
        calibration=np.array(calibration["scores"], dtype=np.float64),
        sessions=tuple(calibration.get("sessions", ())),
        within=np.array(calibration.get("within", ()), dtype=np.float64),
        reference=_reference(folder / "reference.safetensors"),
        images=tuple(facts["images"]),
        thumbnails=tuple(data[a:b] for a, b in zip(offsets, offsets[1:], strict=False)),
        seen=frozenset(seen.read_text().split()) if seen.exists() else frozenset(),
    )


def _learned(detector: Detector) -> dict[str, np.ndarray]:
    """Return the arrays of learned.safetensors: outlier exposure's classifier, and a whitening per snapshot."""
    arrays = {f"classifier.{name}": np.ascontiguousarray(v) for name, v in (detector.classifier or {}).items()}
    for s, whitening in enumerate(detector.whitenings):
        arrays |= {f"whitening.{s}.{name}": np.ascontiguousarray(v) for name, v in asdict(whitening).items()}
    return arrays


def _reference(path: Path) -> Reference | None:
    """Return None where the bundle is from before monitoring, or knows other statistics than this version."""
    if not path.exists():
        return None
    with safe_open(path, "np") as f:
        if (f.metadata() or {}).get("statistics") != ",".join(NAMES):
            return None
        return Reference(f.get_tensor("statistics"), f.get_tensor("features"))
