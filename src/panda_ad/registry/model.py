# SPDX-License-Identifier: Apache-2.0
"""The registered model's code: MLflow copies this file into the model and runs it there.

This is a model from code: nothing is pickled. The input is a column `image` of encoded image files: bytes or, over
REST, base64, also as a data URL. The output per image is score, p_value, threshold, decision (good, defect, error),
anomalous, version, error, and with the parameter `heatmap` the heat map as a base64 PNG at the image's size. An image
that cannot be decoded gives its own row an error, no score and no verdict.
"""

import base64
import io
import os
import time
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

MAX_IMAGES, MAX_PIXELS, MAX_SECONDS = 64, 256_000_000, 45.0
"""Most of one request to a server: images, pixels of all of them together, and seconds, after which it is given up."""

_GROUP = 8  # images of a request between two looks at the clock


class Refusal(MlflowException):
    """A request refused in words, HTTP 413.

    MLflow's server puts the whole request before the text of an error; this one keeps its own.
    """

    status = 413

    @property
    def message(self):
        """Text of the error, as it was first given."""
        return self._text

    @message.setter
    def message(self, text):
        self._text = self.__dict__.get("_text", text)

    def get_http_status_code(self):
        """Return the HTTP status of the answer."""
        return self.status


class BadRequest(Refusal):
    """The same for what no model can answer, HTTP 400."""

    status = 400


class PandaModel(PythonModel):
    """Scores images with the bundle among the model's artifacts, through the package that travels with it."""

    def load_context(self, context):
        """Load the bundle. Torch is imported here, so that logging the model does not need it."""
        from panda_ad.scoring.bundle import load_bundle

        self.detector = load_bundle(context.artifacts["bundle"])
        self.version = _registered_as(Path(context.artifacts["bundle"]).parents[1])

    def predict(self, context, model_input: pd.DataFrame, params=None) -> pd.DataFrame:  # noqa: ARG002 - as MLflow calls it
        """Return the verdicts of a DataFrame with a column `image` (N rows) as a DataFrame of N rows.

        Raises
        ------
        Refusal
            A server is asked for more than one request may.
        BadRequest
            Heat maps are asked of a model that does not make them.
        """
        from panda_ad.data.images import batches, pixel_count

        heatmap = bool((params or {}).get("heatmap", False))
        if heatmap and self.detector.localizer is None:
            text = "heatmap: this model was built without heat maps"
            raise BadRequest(text, error_code=INVALID_PARAMETER_VALUE)
        files, index = _files(model_input["image"])
        limited = os.environ.get("_MLFLOW_IS_IN_SERVING_ENVIRONMENT") == "true"
        if limited:
            _check_size(len(files), sum(map(pixel_count, files)))
        started = time.monotonic()
        rows: list[list] = []
        for batch in batches(enumerate(files), lambda row: pixel_count(row[1])):
            for group in (batch[i : i + _GROUP] for i in range(0, len(batch), _GROUP)) if limited else (batch,):
                if limited and time.monotonic() - started > MAX_SECONDS:
                    raise _refusal(f"after {MAX_SECONDS:.0f} seconds {len(rows)} of {len(files)} images were done")
                rows += self._verdicts(group, heatmap)
        columns = ["score", "p_value", "threshold", "decision", "anomalous", "version", "error"]
        columns += ["heatmap"] if heatmap else []
        if any(row[6] for row in rows):  # None, not NaN, which is no JSON
            return pd.DataFrame(rows, columns=columns, index=index, dtype=object)
        return pd.DataFrame(rows, columns=columns, index=index)

    def _verdicts(self, batch, heatmap):
        """Rows for (number, file) pairs, in their order."""
        from panda_ad.data.images import Decoding, decode
        from panda_ad.errors import UserError

        images, rows = {}, {}
        for i, data in batch:
            try:
                images[i] = decode(data, f"row {i}", Decoding.of(self.detector.config))
            except UserError as e:
                rows[i] = [None, None, None, "error", None, self.version, str(e)] + [None] * heatmap
        verdicts = self.detector.score(list(images.values()), heatmaps=heatmap) if images else []
        threshold = float(self.detector.threshold().value)
        for i, v in zip(images, verdicts, strict=True):
            decision = "defect" if v.anomalous else "good"
            rows[i] = [v.score, v.p_value, threshold, decision, bool(v.anomalous), self.version, ""]
            rows[i] += [_png(v.heatmap)] if heatmap else []  # a heat map as it is takes more than its image
        return [rows[i] for i, _ in batch]


def _check_size(images, pixels):
    if images > MAX_IMAGES:
        raise _refusal(f"{images} images")
    if pixels > MAX_PIXELS:
        raise _refusal(f"{pixels:,} pixels")


def _refusal(found):
    most = f"at most {MAX_IMAGES} images, {MAX_PIXELS:,} pixels and {MAX_SECONDS:.0f} seconds of work"
    return Refusal(f"{found}: one request may hold {most}; send fewer images", error_code=INVALID_PARAMETER_VALUE)


def _registered_as(folder):
    """Return 'NAME version N' where MLflow notes in a model's folder what it was asked for, else ''."""
    import yaml

    try:
        meta = yaml.safe_load((folder / "registered_model_meta").read_text(encoding="utf-8"))
        return f"{meta['model_name']} version {meta['model_version']}"
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return ""


def _files(column):
    """Return the image files of a column, and an index for their rows.

    MLflow gives a request's list `inputs` as one cell.
    """
    cell: Any = column.iloc[0] if len(column) == 1 else None
    if isinstance(cell, list) or hasattr(cell, "tolist") and not isinstance(cell, str):
        return [_file(value) for value in cell], pd.RangeIndex(len(cell))
    return [_file(value) for value in column], column.index


def _file(value):
    """Return an image file's bytes: as they are, or decoded from base64.

    The base64 may be in lines or behind a data URL's 'data:image/png;base64,'. No image file is base64 itself.
    """
    if not isinstance(value, str | bytes | bytearray | memoryview):
        return b""
    data = value.encode() if isinstance(value, str) else bytes(value)
    if data[:5] == b"data:":
        data = data.partition(b",")[2]
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except ValueError:
        return data


def _png(heatmap):
    """Float32 (H, W) -> base64 PNG of 8 bits, its own smallest value black and largest white."""
    import numpy as np
    from PIL import Image

    low, high = float(heatmap.min()), float(heatmap.max())
    gray = np.round((heatmap - low) / max(high - low, 1e-12) * 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(gray).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode("ascii")


set_model(PandaModel())
