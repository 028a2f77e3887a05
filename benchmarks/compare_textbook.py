# SPDX-License-Identifier: Apache-2.0
"""How much faster `ses` on cached frozen activations is than the textbook run and the authors' loop, on this machine.

    PANDA_BENCH_DATA=data python -m benchmarks.compare_textbook --class airplane

The full run has 5,000 training and 10,000 test images and 15 epochs.

All three do the same protocol from image files, ours on an empty cache, in turn in one process: same network and
weights, files, input size, epochs, learning rate, loss and score (the paper's, not normalized), float32, and an
evaluation before training and after each epoch.
`--textbook-epochs 2` runs only so many epochs of the other two and multiplies; it says so in its output.
Processor time is what counts on a machine that others use too.
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
from panda_ad.benchmark.protocols import Job, Settings, choose_test, train_files
from panda_ad.benchmark.runner import make_settings, plan
from panda_ad.benchmark.sources import data_folder, read_set
from panda_ad.features.backbones import load_backbone
from panda_ad.params_file import load_params, parse_params


def settings_of(args: argparse.Namespace, data: Path) -> Settings:
    """Return the settings of `ses` under the paper's protocol."""
    values = load_params().model_dump()
    values["backbone"] |= {"input_size": args.size, "precision": "fp32"}
    values["gallery"] |= {"normalize": False, "whiten": False}
    changes = {"epochs": args.epochs, "snapshots": args.epochs + 1, "learning_rate": LEARNING_RATE, "precision": "fp32"}
    return make_settings(
        parse_params(values), ["ses"], args.train, args.test, [f"ses.{k}={v}" for k, v in changes.items()], data
    )


def files_of(job: Job, settings: Settings, data: Path) -> tuple[list[Path], list[Path], np.ndarray]:
    """Return training files, test files, and which of these are anomalous, as the benchmark chooses them."""
    images = read_set(job.dataset, data)[job.category]
    chosen = choose_test(images, settings.test)
    labels = np.array([images.test_class[i] not in job.normal for i in chosen])
    return train_files(images, job.normal, settings.train), [images.test[i] for i in chosen], labels


def ours(job: Job, settings: Settings, data: Path) -> dict:
    """Run `ses` as the benchmark does, from image files, empty caches included.

    Return seconds, processor seconds and AUROC.
    """
    start, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(settings, data, Path(folder) / "out", Path(folder) / "cache")
        cell = read_cell(bench.run(job)[0])
        spent = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        return {**spent, "ses": cell["auroc"], "auroc": cell["snapshot_auroc"]}


def extrapolated(found: dict, run: int, epochs: int) -> float:
    """Return processor seconds that all `epochs` would take, of which `run` were run."""
    parts = found["parts"]
    return found["cpu"] + (epochs - run) * (parts["train"] / run + parts["evaluate"] / (run + 1))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset", default="cifar10", help="a set of class folders below PANDA_BENCH_DATA")
    parser.add_argument("--class", dest="normal", default="airplane")
    parser.add_argument("--size", type=int, default=128, help="network input, pixels")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--train", type=int, help="at most so many training images; default: all")
    parser.add_argument("--test", type=int, help="at most so many test images; default: all")
    parser.add_argument("--textbook-epochs", type=int, help="run so many of the others' epochs and extrapolate")
    parser.add_argument("--threads", type=int, help="threads of all; default: PyTorch's choice")
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    data, some = data_folder(), a.textbook_epochs or a.epochs
    settings = settings_of(a, data)
    job = plan([a.dataset], data, ["ses"], "one-vs-rest", [a.normal], [0])[0][0]
    train, test, labels = files_of(job, settings, data)
    backbone = settings.params.backbone
    print(
        f"{a.dataset} {a.normal}, {backbone.name}, {a.size} px, {len(train)} training and {len(test)} test images, "
        f"{a.epochs} epochs, {torch.get_num_threads()} threads, float32"
        + (f"; of the others {some} epochs were run, the rest extrapolated" if some < a.epochs else "")
    )
    fast = ours(job, settings, data)
    _show("panda-ad", fast, fast["cpu"])
    for name, authors in (("textbook", False), ("authors' loop", True)):
        network = load_backbone(backbone.name, backbone.weights)
        found = textbook(Run(train, test, labels, a.size, some, authors), network)
        cpu = extrapolated(found, some, a.epochs)
        _show(name, found, cpu)
        print(f"  ours / this: {fast['cpu'] / cpu:.3f} of the processor time")


def _show(name: str, found: dict, cpu: float) -> None:
    figures = ", ".join(f"{100 * value:.2f}" for value in found["auroc"])
    ses = "" if found["ses"] is None else f", SES {100 * found['ses']:.2f}"
    print(f"{name:14}{cpu:8.1f} s of processor   kNN {figures}{ses}", flush=True)


if __name__ == "__main__":
    main()
