"""The registered model's code: MLflow copies this file into the model and runs it there (models from code, nothing pickled).

Input: a column `image` of encoded image files (over REST: base64). Output per image: score, p_value, decision, anomalous, and with
the parameter `heatmap` the heat map as a base64 PNG at the image's size.
"""

import base64
import io

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel


class PandaModel(PythonModel):
    """Scores images with the bundle among the model's artifacts, through the package that travels with it."""

    def load_context(self, context):
        """Load the bundle. Torch is imported here, so that logging the model does not need it."""
        from panda_ad.scoring.bundle import load_bundle

        self.detector = load_bundle(context.artifacts["bundle"])

    def predict(self, context, model_input: pd.DataFrame, params=None) -> pd.DataFrame:
        """DataFrame with a column `image` of bytes (N rows) -> DataFrame with the verdicts, same index.

        Raises MlflowException (HTTP 400) naming the row whose image cannot be decoded.
        """
        from panda_ad.data.images import Decoding, batches, decode, pixel_count
        from panda_ad.errors import UserError

        heatmap = bool((params or {}).get("heatmap", False))
        if heatmap and self.detector.localizer is None:
            raise MlflowException("heatmap: this model was built without heat maps", error_code=INVALID_PARAMETER_VALUE)
        rows = []
        for batch in batches(enumerate(map(_file, model_input["image"])), lambda row: pixel_count(row[1])):
            try:
                images = [decode(data, f"row {i}", Decoding.of(self.detector.config)) for i, data in batch]
            except UserError as e:
                raise MlflowException(str(e), error_code=INVALID_PARAMETER_VALUE) from None
            for v in self.detector.score(images, heatmaps=heatmap):
                row = [v.score, v.p_value, "defect" if v.anomalous else "good", bool(v.anomalous)]
                rows.append(
                    [*row, _png(v.heatmap)] if heatmap else row
                )  # a heat map as it is takes more than its image
        columns = ["score", "p_value", "decision", "anomalous"] + (["heatmap"] if heatmap else [])
        return pd.DataFrame(rows, columns=columns, index=model_input.index)


def _file(value):
    """An image file's bytes: MLflow decodes base64 in `dataframe_split` and `dataframe_records` only, not in `inputs` and `instances`."""
    data = value.encode() if isinstance(value, str) else bytes(value)
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)  # in lines or not; no image file is base64
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
