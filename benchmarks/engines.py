# SPDX-License-Identifier: Apache-2.0
"""The default network in PyTorch (batches of 1 and 8) and in ONNX Runtime (batch 1), in turn, one process, one thread.

python benchmarks/engines.py [--name efficientnet_lite0] [--size 224] [--rounds 8]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from panda_ad.features.backbones import load_backbone
from panda_ad.features.export import export_network

_BATCH = 8


def main() -> None:
    """Print processor time an image, and the largest difference between the two.

    The difference is relative to each output's largest value.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="efficientnet_lite0")
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    backbone = load_backbone(args.name)
    network = export_network(backbone, (args.size, args.size))
    images = torch.randn(_BATCH, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    batch = images.contiguous(memory_format=torch.channels_last)

    def theirs(x: torch.Tensor) -> torch.Tensor:
        return backbone.adapted(backbone.frozen(x)[-1])

    def ours(i: int) -> np.ndarray:
        return network.features(network.activations(images[i : i + 1].numpy()))[0]

    calls: dict[str, Callable[[], object]] = {
        f"PyTorch, {_BATCH} at a time": lambda: theirs(batch),
        "PyTorch, one at a time": lambda: [theirs(batch[i : i + 1]) for i in range(_BATCH)],
        "ONNX Runtime, one at a time": lambda: [ours(i) for i in range(_BATCH)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        expected = theirs(batch).numpy()
        found = np.concatenate([ours(i) for i in range(_BATCH)])
        for _ in range(args.rounds):
            for name, call in calls.items():
                seconds[name].append(timed(call))
    for name, values in seconds.items():
        print(f"{name}: {statistics.median(values) / _BATCH * 1e3:.1f} ms of processor an image")
    print(f"pooled features differ by {np.abs(found - expected).max() / np.abs(expected).max():.1e}, float16 between")


def timed(call: Callable[[], object]) -> float:
    """Processor time of a call, seconds."""
    start = time.process_time()
    call()
    return time.process_time() - start


if __name__ == "__main__":
    main()
