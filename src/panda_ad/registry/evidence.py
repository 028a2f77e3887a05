# SPDX-License-Identifier: Apache-2.0
"""What the gate looks at, gathered from MLflow: scores of candidate and incumbent on the same test images."""

from __future__ import annotations

import hashlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from panda_ad.errors import UserError
from panda_ad.params import Params, plain_name
from panda_ad.registry.connection import first_line, require_server
from panda_ad.registry.facts import CONFIRMED, CONFIRMED_ALARMS, Evidence
from panda_ad.registry.runs import run_intervals
from panda_ad.registry.versions import bundle_of

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_TIMED = 20  # images


def gather(
    client: MlflowClient, params: Params, category: str, candidate: ModelVersion, incumbent: ModelVersion | None,
    champion: ModelVersion | None = None, best_before: float | None = None,
) -> Evidence:  # fmt: skip
    """Return the evidence for one decision; incumbent, champion and best_before are as in `Evidence`.

    If the test set has changed since the incumbent or the champion was evaluated, that version scores the candidate's
    test images through its own bundle. The images must then be in the working directory.

    Raises
    ------
    UserError
        An artifact is gone, or a test image is not here or differs from the one evaluated.
    """
    run = candidate.tags["panda.run"]
    scores = score_table(artifact(client, run, f"{plain_name(category)}/scores.csv"))
    metrics = _metrics(client, run, category) | run_intervals(client, run, category)
    theirs, their_threshold = _rival(client, params, category, incumbent, scores)
    champions, champions_threshold = _rival(client, params, category, champion, scores)
    known = frozenset[str]()
    if incumbent is not None:
        manifest = score_table(artifact(client, incumbent.run_id, "data/manifest.csv"))
        known = frozenset(manifest["sha256"][manifest["category"] == category])
    tests, defects, gate = frozenset[str](), frozenset[str](), params.gate
    if gate.must_catch or isinstance(gate.min_defect_auroc, dict) or isinstance(gate.min_defect_recall, dict):
        manifest = score_table(artifact(client, candidate.tags["panda.run"], "data/manifest.csv"))
        rows = manifest[manifest["split"] == "test"]
        tests = frozenset(rows["path"]) | frozenset(rows["sha256"])
        defects = frozenset(rows["defect"][rows["label"] == 1])
    return Evidence(
        scores=scores,
        threshold=metrics["threshold"],
        metrics=metrics,
        budget=float(candidate.tags["panda.budget"]),
        calibration=int(candidate.tags["panda.calibration_images"]),
        incumbent=theirs,
        incumbent_threshold=their_threshold,
        champion=champions,
        champion_threshold=champions_threshold,
        best_before=best_before,
        known=known,
        test_images=tests,
        test_defects=defects,
        confirmed=(int(candidate.tags.get(CONFIRMED_ALARMS, 0)), int(candidate.tags.get(CONFIRMED, 0))),
        bundle_mb=float(candidate.tags["panda.bundle_mb"]),
        latency_ms=None if params.gate.max_latency_ms is None else latency_ms(bundle_of(client, candidate)),
        seed=params.seed,
        resamples=params.evaluate.bootstrap,
    )


def _rival(
    client: MlflowClient, params: Params, category: str, version: ModelVersion | None, scores: pd.DataFrame
) -> tuple[pd.DataFrame | None, float | None]:
    """Return a version's score table on the images of `scores`, in their order, and its threshold.

    Without a version both are None.
    """
    if version is None:
        return None, None
    run = version.tags["panda.run"]
    metrics = _metrics(client, run, category)
    table = score_table(artifact(client, run, f"{plain_name(category)}/scores.csv"))
    table = align(table, scores) if same_images(table, scores) else rescore(bundle_of(client, version), params, scores)
    return table, float(metrics["threshold"])


def _metrics(client: MlflowClient, run: str, category: str) -> dict[str, float]:
    return json.loads(artifact(client, run, f"{plain_name(category)}/metrics.json"))


def artifact(client: MlflowClient, run_id: str, path: str) -> bytes:
    """Return the content of a run's artifact.

    Raises
    ------
    UserError
        The artifact is gone.
    Unavailable
        Its server does not answer.
    """
    from mlflow.exceptions import MlflowException

    try:
        with tempfile.TemporaryDirectory() as folder:  # MLflow's own would stay
            return Path(client.download_artifacts(run_id, path, folder)).read_bytes()
    except (MlflowException, OSError) as e:
        require_server()  # MLflow's errors do not tell a lost file from a lost server
        raise UserError(f"MLflow run {run_id}: {path} cannot be read ({first_line(e)}); publish again") from None


def rescore(bundle: Path, params: Params, rows: pd.DataFrame) -> pd.DataFrame:
    """Scores that a bundle gives the images of `rows` (path, sha256, label): its columns with `score` replaced."""
    from panda_ad.data.images import Decoding, batches, decode, pixel_count
    from panda_ad.data.layouts import image_root
    from panda_ad.scoring.bundle import load_bundle

    detector, root = load_bundle(bundle), image_root(params)
    scores: list[float] = []
    entries = zip(rows["path"].tolist(), rows["sha256"].tolist(), strict=True)
    for batch in batches(entries, lambda entry: pixel_count(root / entry[0])):
        images = []
        for path, sha256 in batch:
            try:
                data = (root / path).read_bytes()
            except OSError as e:
                raise UserError(
                    f"{root / path}: {e.strerror}; needed to compare on the new test set, get it with `dvc checkout`"
                ) from None
            if hashlib.sha256(data).hexdigest() != sha256:
                raise UserError(
                    f"{root / path}: not the image that was evaluated; "
                    "run `dvc repro`, or `dvc checkout` for the images of dvc.lock"
                )
            images.append(decode(data, path, Decoding.of(detector.config)))
        scores += [v.score for v in detector.score(images)]
    return rows.assign(score=scores)


def latency_ms(bundle: Path) -> float:
    """Return the median milliseconds that the detector takes for one decoded image on this machine.

    The images are thumbnails of its gallery.
    """
    from panda_ad.data.images import decode
    from panda_ad.scoring.bundle import load_bundle

    detector = load_bundle(bundle)
    image = decode(detector.thumbnails[0], "thumbnail")
    detector.score([image])
    times = []
    for _ in range(_TIMED):
        start = time.perf_counter()
        detector.score([image])
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times)


def score_table(content: bytes) -> pd.DataFrame:
    """Read what scores.csv or manifest.csv holds; floats exactly as written."""
    import pandas as pd

    return pd.read_csv(
        io.BytesIO(content),
        float_precision="round_trip",
        keep_default_na=False,
        dtype={"path": str, "sha256": str, "defect": str},
    )


def same_images(a: pd.DataFrame, b: pd.DataFrame) -> bool:
    """Whether two score tables are of the same images with the same labels."""
    keys = ["sha256", "label"]
    return sorted(map(tuple, a[keys].to_numpy().tolist())) == sorted(map(tuple, b[keys].to_numpy().tolist()))


def align(scores: pd.DataFrame, to: pd.DataFrame) -> pd.DataFrame:
    """`scores` in the order of `to`, by content; both of the same images, each once."""
    return scores.drop_duplicates("sha256").set_index("sha256").loc[to["sha256"]].reset_index()
