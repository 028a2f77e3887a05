# SPDX-License-Identifier: Apache-2.0
"""How much faster `ses` on cached frozen activations is than the textbook run and the authors' loop, on this machine.

    PANDA_BENCH_DATA=data python -m benchmarks.compare_textbook --class airplane

The full run has 5,000 training and 10,000 test images and 15 epochs.

All three do the same protocol from image files, ours on an empty cache, in turn in one process: same network, class,
input size, training and test images, epochs and learning rate, and an evaluation before training and after each epoch.
Textbook and ours are of one precision (bfloat16 if the CPU has it, in the forward passes; ours evaluates adapted layers
in float32). The authors' loop is in float32 as they wrote it.
`--textbook-epochs 2` runs only so many epochs of the other two and multiplies; it says so in its output.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.textbook import LEARNING_RATE, Run, textbook
from panda_ad.benchmark.cells import Bench, read_cell
from panda_ad.benchmark.runner import make_settings, plan
from panda_ad.benchmark.sources import data_folder
from panda_ad.features.backbones import resolve_precision
from panda_ad.params import load_params, parse_params


def ours(dataset: str, run: Run, test: int | None) -> dict:
    """Run `ses` as the benchmark does, from image files, empty caches included.

    Return seconds, processor seconds and AUROC.
    """
    start, cpu = time.perf_counter(), time.process_time()
    precision = "bf16" if run.bf16 else "fp32"
    values = load_params().model_dump()
    values["backbone"] |= {
        "name": "embedded",
        "weights": "DEFAULT",
        "input_size": run.size,
        "precision": precision,
    }
    changes = {
        "epochs": run.epochs,
        "snapshots": run.epochs + 1,
        "learning_rate": LEARNING_RATE,
        "precision": precision,
    }
    settings = make_settings(
        parse_params(values), ["ses"], run.train, test, [f"ses.{k}={v}" for k, v in changes.items()], run.root.parent
    )
    jobs = plan([dataset], run.root.parent, ["ses"], "one-vs-rest", [run.normal], [0])
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(settings, run.root.parent, Path(folder) / "out", Path(folder) / "cache")
        cell = read_cell(bench.run(jobs[0][0])[0])
        spent = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        return {**spent, "ses": cell["auroc"], "auroc": cell["snapshot_auroc"]}


def extrapolated(found: dict, run: int, epochs: int) -> tuple[float, float]:
    """Return seconds, and seconds of processor, that all `epochs` would take, of which `run` were run."""
    parts = found["parts"]
    more = (epochs - run) * (parts["train"] / run + parts["evaluate"] / (run + 1))
    return found["seconds"] + more, found["cpu"] * (1 + more / found["seconds"])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset", default="cifar10", help="a set of class folders below PANDA_BENCH_DATA")
    parser.add_argument("--class", dest="normal", default="airplane")
    parser.add_argument("--size", type=int, default=64, help="network input, pixels")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--train", type=int, help="at most so many training images; default: all")
    parser.add_argument("--test-per-class", type=int, help="at most so many test images per class; default: all")
    parser.add_argument("--textbook-epochs", type=int, help="run so many of the others' epochs and extrapolate")
    parser.add_argument("--threads", type=int, help="threads of all; default: PyTorch's choice")
    parser.add_argument("--fp32", action="store_true", help="float32 even where the CPU has bfloat16")
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    root = data_folder() / a.dataset
    bf16 = not a.fp32 and resolve_precision("auto") == torch.bfloat16
    classes = sum(p.is_dir() for p in (root / "test").iterdir())
    test = None if a.test_per_class is None else a.test_per_class * classes
    run = Run(root, a.normal, a.size, a.epochs, a.train, a.test_per_class, bf16)
    fast = ours(a.dataset, run, test)
    some = a.textbook_epochs or a.epochs
    print(
        f"{a.dataset} {a.normal}, {a.size} px, {a.epochs} epochs, {torch.get_num_threads()} threads, "
        f"{'bfloat16' if bf16 else 'float32'}"
        + (f"; of the others {some} epochs were run, the rest extrapolated" if some < a.epochs else "")
    )
    for name, authors in (("textbook", False), ("authors' loop", True)):
        found = textbook(Run(root, a.normal, a.size, some, a.train, a.test_per_class, bf16, authors))
        seconds, cpu = extrapolated(found, some, a.epochs)
        figures = np.round(100 * np.array(found["auroc"]), 2).tolist()
        print(f"{name:14}{seconds:8.1f} s ({cpu:8.1f} s of processor)   kNN {figures}, SES {found['ses']}")
        print(f"  ours / this {fast['seconds'] / seconds:8.3f}   ({fast['cpu'] / cpu:8.3f})")
    figures = np.round(100 * np.array(fast["auroc"]), 2).tolist()
    print(
        f"{'panda-ad':14}{fast['seconds']:8.1f} s ({fast['cpu']:8.1f} s of processor)   "
        f"kNN {figures}, SES {fast['ses']}"
    )


if __name__ == "__main__":
    main()
