# SPDX-License-Identifier: Apache-2.0
"""How long `panda-ad watch` takes from a file's arrival to its verdict on the disk.

    python benchmarks/watch.py BUNDLE IMAGES [--count 200] [--settle 0.0]

Files are renamed into the folder one by one, with pauses of 0.1 to 0.5 s; a file is there from its rename on.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import numpy as np

from panda_ad.data.listing import image_files


def main() -> None:
    """Print the quantiles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--settle", type=float, default=0.0)
    args = parser.parse_args()
    files, rng = image_files([args.images]), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        inbox, table, arrived = Path(temporary) / "in", Path(temporary) / "watch.csv", {}
        inbox.mkdir()
        command = [sys.executable, "-m", "panda_ad.cli", "watch", str(inbox), "--bundle", str(args.bundle)]
        process = subprocess.Popen(
            [*command, "--out", str(table), "--settle", str(args.settle)], stdout=subprocess.DEVNULL
        )
        while not table.exists():
            time.sleep(0.1)
        for i in range(args.count):
            file = files[i % len(files)]
            target = inbox / f"{i:05d}{file.suffix}"
            shutil.copyfile(file, Path(temporary) / "copy")
            (Path(temporary) / "copy").rename(target)
            arrived[str(target)] = time.time()
            time.sleep(rng.uniform(0.1, 0.5))
        time.sleep(args.settle + 2)
        process.send_signal(signal.SIGTERM)
        process.wait()
        with open(table, newline="", encoding="utf-8") as f:
            took = [datetime.fromisoformat(row["time"]).timestamp() - arrived[row["path"]] for row in csv.DictReader(f)]
    low, middle, high = (1000 * np.quantile(took, q) for q in (0.05, 0.5, 0.95))
    print(f"{len(took)} of {args.count} files: 5 %, median, 95 % {low:.0f}, {middle:.0f}, {high:.0f} ms")


if __name__ == "__main__":
    main()
