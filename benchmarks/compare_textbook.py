"""How much faster `ses` on cached frozen activations is than the textbook run, on this machine.

    PANDA_BENCH_DATA=data python -m benchmarks.compare_textbook --class airplane          # full: 5,000 train, 10,000 test, 15 epochs

Both do the same protocol from image files on an empty cache: same backbone, class, input size, training and test images,
epochs and learning rate. The textbook evaluates after each epoch, `ses` scores the snapshots it keeps (`--snapshots`).
`--textbook-epochs 2` runs only so many of the textbook's epochs and multiplies; it says so in its output.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.textbook import LEARNING_RATE, textbook
from panda_ad.benchmark.cells import Bench, read_cell
from panda_ad.benchmark.runner import make_settings, plan
from panda_ad.benchmark.sources import data_folder
from panda_ad.features.backbones import resolve_precision
from panda_ad.params import load_params, parse_params


def ours(
    dataset: str, normal: str, size: int, epochs: int, snapshots: int, train: int | None, test: int | None, bf16: bool
) -> dict:
    """`ses` as the benchmark runs it, from image files, empty caches included: seconds, processor seconds and AUROC."""
    start, cpu = time.perf_counter(), time.process_time()
    values = load_params().model_dump()
    values["backbone"] |= {"name": "embedded", "weights": "DEFAULT", "input_size": size}
    changes = [f"ses.precision={'bf16' if bf16 else 'fp32'}"]
    changes += [f"ses.epochs={epochs}", f"ses.learning_rate={LEARNING_RATE}", f"ses.snapshots={snapshots}"]
    params = parse_params(values)
    data = data_folder()
    settings = make_settings(params, ["ses"], train, test, changes, data)
    jobs = plan([dataset], data, ["ses"], "one-vs-rest", [normal], [0])
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(settings, data, Path(folder) / "out", Path(folder) / "cache")
        cell = read_cell(bench.run(jobs[0][0])[0])
        spent = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        return {**spent, "auroc": cell["auroc"], "train": cell["n_train"], "test": cell["n_test"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset", default="cifar10", help="a set of class folders below PANDA_BENCH_DATA")
    parser.add_argument("--class", dest="normal", default="airplane")
    parser.add_argument("--size", type=int, default=64, help="network input, pixels")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument(
        "--snapshots", type=int, default=6, help="heads that `ses` keeps and scores with, the unadapted one included"
    )
    parser.add_argument("--train", type=int, help="at most so many training images; default: all")
    parser.add_argument("--test-per-class", type=int, help="at most so many test images per class; default: all")
    parser.add_argument(
        "--textbook-epochs", type=int, help="run so many of the textbook's epochs and extrapolate; default: all of them"
    )
    parser.add_argument("--threads", type=int, help="threads of both; default: PyTorch's choice")
    parser.add_argument(
        "--fp32", action="store_true", help="ours trains its head in float32 even where the CPU has bfloat16"
    )
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    root = data_folder() / a.dataset
    bf16 = not a.fp32 and resolve_precision("auto") == torch.bfloat16
    classes = sum(p.is_dir() for p in (root / "test").iterdir())
    test = None if a.test_per_class is None else a.test_per_class * classes
    fast = ours(a.dataset, a.normal, a.size, a.epochs, a.snapshots, a.train, test, bf16)
    run = a.textbook_epochs if a.textbook_epochs is not None else a.epochs
    slow = textbook(root, a.normal, a.size, run, a.train, a.test_per_class, "embedded", "DEFAULT")
    seconds, cpu = slow["seconds"], slow["cpu"]
    if run < a.epochs:
        parts = slow["parts"]
        more = (a.epochs - run) * (parts["train"] / run + parts["evaluate"] / (run + 1))
        seconds, cpu = seconds + more, cpu * (1 + more / slow["seconds"])
        print(f"textbook: {run} of {a.epochs} epochs were run ({slow['seconds']:.1f} s); its total is extrapolated")
    print(
        f"{a.dataset} {a.normal}, {a.size} px, {a.epochs} epochs, {slow['train']} train, {slow['test']} test, {slow['threads']} threads"
    )
    after = np.round(100 * np.array(slow["auroc"][1:]), 2).tolist()
    head = "bfloat16" if bf16 else "float32"
    print(
        f"textbook  {seconds:8.1f} s ({cpu:8.1f} s of processor)   SES {100 * slow['ses']:.2f}; DN2 {100 * slow['auroc'][0]:.2f}, after each epoch {after}"
    )
    print(
        f"panda-ad  {fast['seconds']:8.1f} s ({fast['cpu']:8.1f} s of processor)   SES {100 * fast['auroc']:.2f}; head trained with {head} convolutions"
    )
    print(f"ratio     {fast['seconds'] / seconds:8.3f}   ({fast['cpu'] / cpu:8.3f})")


if __name__ == "__main__":
    main()
