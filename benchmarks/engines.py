# SPDX-License-Identifier: Apache-2.0
"""The default network in PyTorch (micro-batches of 8) and in ONNX Runtime (batch 1), in turn, one process, one thread.

python benchmarks/engines.py [--size 224] [--rounds 8]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from panda_ad.features.backbones import MICRO_BATCH, Backbone, load_backbone


class AllLevels(nn.Module):
    """Levels of the frozen layers, then pooled features: what scoring reads of one snapshot."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.frozen, self.adapted = backbone.frozen, backbone.adapted

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) float32 -> the levels and (B, D)."""
        levels = self.frozen(x)
        return (*levels, self.adapted(levels[-1]))


def main() -> None:
    """Print processor time an image, and the largest difference between the two.

    The difference is relative to each output's largest value.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    network = AllLevels(load_backbone("efficientnet_lite0")).eval()
    images = torch.randn(MICRO_BATCH, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        torch.onnx.export(network, (images[:1],), file, dynamo=True, external_data=False, input_names=["image"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    batch = images.contiguous(memory_format=torch.channels_last)
    singles = [{"image": images[i : i + 1].numpy()} for i in range(MICRO_BATCH)]
    seconds: dict[str, list[float]] = {"PyTorch": [], "ONNX Runtime": []}
    with torch.inference_mode():
        ours = network(batch)
        theirs = [np.concatenate(parts) for parts in zip(*(session.run(None, x) for x in singles), strict=True)]
        for _ in range(args.rounds):
            seconds["PyTorch"].append(timed(lambda: network(batch)))
            seconds["ONNX Runtime"].append(timed(lambda: [session.run(None, x) for x in singles]))
    worst = max(float(np.abs(a.numpy() - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True))
    slow, fast = (statistics.median(values) for values in seconds.values())
    print(f"PyTorch: {slow / MICRO_BATCH * 1e3:.1f} ms an image, {slow * 1e3:.1f} ms for one, padded to {MICRO_BATCH}")
    print(f"ONNX Runtime: {fast / MICRO_BATCH * 1e3:.1f} ms an image, alone or not")
    print(
        f"{slow / fast:.1f} times the throughput, {slow / fast * MICRO_BATCH:.0f} times for one; differ by {worst:.1e}"
    )


def timed(call: Callable[[], object]) -> float:
    """Processor time of a call, seconds."""
    start = time.process_time()
    call()
    return time.process_time() - start


if __name__ == "__main__":
    main()
