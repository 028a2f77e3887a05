# SPDX-License-Identifier: Apache-2.0
"""ONNX networks in ONNX Runtime: one image a pass, one thread a pass, so that a result depends on the image alone.

A convolution's kernel, and with it the last bits of its result, depends on the size of the batch and on the number of
threads. With both at one, an image alone costs one image, and images run side by side, each in a thread.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# From 1.32 on, its import alone stores an identifier of the device under HOME, and what runs is reported to its maker.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

from panda_ad.errors import UserError
from panda_ad.system.cores import one_blas_thread

one_blas_thread()
onnxruntime.set_default_logger_severity(3)  # errors: what it warns of is said in a line of ours, or does no harm


@dataclass(frozen=True)
class Engine:
    """What computes a network.

    Attributes
    ----------
    name, version : of the distribution.
    precision : of the computation: fp32.
    """

    name: str
    version: str
    precision: str


def engine_for(precision: str) -> Engine:
    """Return the engine of a precision. UserError where there is none."""
    if precision != "fp32":
        raise UserError(f"backbone.precision: {precision} cannot be computed by ONNX Runtime on a processor; use fp32")
    return Engine("onnxruntime", onnxruntime.__version__, precision)


def check_engine(made: Mapping[str, str], where: str) -> None:
    """Raise UserError unless the engine and precision that a model was calibrated with are those here.

    Another version of the same engine is no other engine: it differs in the last bits.
    """
    here = Engine("onnxruntime", onnxruntime.__version__, "fp32")
    if (made["name"], made["precision"]) != (here.name, here.precision):
        raise UserError(
            f"{where}: calibrated with {made['name']} in {made['precision']}, "
            f"and {here.name} in {here.precision}, which is here, would score otherwise; build the model again"
        )


class Session:
    """A network that is ready to run.

    Parameters
    ----------
    model : an ONNX file's bytes; its first dimension is one image.
    name : what to call it in an error.

    Attributes
    ----------
    model : as given.
    outputs : their names, in order.

    Raises
    ------
    UserError
        The bytes are no network, or one of a newer ONNX than the engine reads.
    """

    def __init__(self, model: bytes, name: str):
        self.model = model
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as e:  # ONNX Runtime's kinds of errors have no public names
            reason = " ".join(str(e).split())
            newer = "opset" in reason.lower() or "ir_version" in reason.lower() or "ir version" in reason.lower()
            todo = "update onnxruntime" if newer else "build the model again"
            raise UserError(
                f"{name}: onnxruntime {onnxruntime.__version__} cannot run this network ({reason[:160]}); {todo}"
            ) from None
        self.outputs = tuple(output.name for output in self._session.get_outputs())
        self._input = self._session.get_inputs()[0].name

    def __call__(self, x: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        """Return some outputs of one image (1, ...)."""
        found: list[np.ndarray] = self._session.run(list(outputs), {self._input: x})
        return found
