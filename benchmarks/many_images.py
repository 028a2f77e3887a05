# SPDX-License-Identifier: Apache-2.0
"""Whether everyone gives the same verdicts: one process, clusters with a worker killed, REST, an exported folder.

    python benchmarks/many_images.py BUNDLE IMAGES [--count 20000] [--served models:/NAME@staging] [--station FOLDER]
        [--spark PYTHON]

The table has rows lost and doubled, the largest difference to `panda-ad score`, and images per second with the start of
all processes in it. `--served` is that bundle as registered in the project of the working directory; `--station` is an
export of it; `--spark` is a Python that has pyspark too, which scores with the served model by examples/spark.py.
"""

from __future__ import annotations

import argparse
import base64
import csv
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import psutil
from pyarrow import parquet

from panda_ad.data.listing import image_files

_CLI = [sys.executable, "-m", "panda_ad.cli"]
_PORT = 5078
_SPARK = Path(__file__).parents[1] / "examples" / "spark.py"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--served")
    parser.add_argument("--station", type=Path)
    parser.add_argument("--spark", help="a Python with pyspark; needs --served")
    parser.add_argument("--workers", default="1,2,4")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "in").mkdir()
        for i, file in enumerate(image_files([args.images])[: args.count]):
            (folder / "in" / f"{i:06d}{file.suffix}").symlink_to(file.resolve())
        score = [*_CLI, "score", str(folder / "in"), "--bundle", str(args.bundle)]
        alone, seconds = _table([*score, "--out", str(folder / "alone.csv")], folder / "alone.csv")
        print("| who | lost | doubled | largest difference | images/s |\n| --- | --- | --- | --- | --- |")
        _say("`panda-ad score`", alone, alone, seconds)
        found, seconds = _parts(score, folder / "here", None)
        _say("`--parts`, one process", alone, found, seconds)
        for n in args.workers.split(","):
            found, seconds = _parts(score, folder / f"of{n}", n)
            _say(f"`--parts`, {n} workers, one killed", alone, found, seconds)
        if args.station:
            out = folder / "station.csv"
            command = [sys.executable, str(args.station / "score.py"), str(folder / "in"), "--out", str(out)]
            _say("an exported folder", alone, *_table(command, out))
        if args.served:
            _say("REST, 16 images a request", alone, *_rest(args.served, sorted((folder / "in").iterdir())))
        if args.spark:
            out = folder / "spark.csv"
            command = [args.spark, str(_SPARK), args.served, str(folder / "in"), str(out)]
            _say("Spark, two local workers", alone, *_table(command, out))


def _say(who: str, expected: list[tuple[str, float]], found: list[tuple[str, float]], seconds: float) -> None:
    names = Counter(name for name, _ in found)
    known = dict(found)
    lost = sum(name not in names for name, _ in expected)
    doubled = sum(count - 1 for count in names.values())
    away = max(abs(score - known[name]) for name, score in expected if name in known)
    print(f"| {who} | {lost} | {doubled} | {away:g} | {len(expected) / seconds:.1f} |", flush=True)


def _table(command: list[str], out: Path) -> tuple[list[tuple[str, float]], float]:
    start = time.perf_counter()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    with open(out, newline="", encoding="utf-8") as f:
        return [(Path(row["path"]).name, float(row["score"])) for row in csv.DictReader(f)], seconds


def _parts(score: list[str], out: Path, workers: str | None) -> tuple[list[tuple[str, float]], float]:
    """Score in parts; of workers, one is killed at a random moment."""
    start = time.perf_counter()
    more = [] if workers is None else ["--cluster", workers]
    process = subprocess.Popen([*score, "--parts", str(out), *more], stderr=subprocess.DEVNULL)
    if workers is not None:
        while len(list(out.glob("*.parquet"))) < random.randrange(2, 8) and process.poll() is None:
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        random.choice([p for p in children if "spawn_main" in " ".join(p.cmdline())]).kill()
    assert process.wait() == 0
    seconds = time.perf_counter() - start
    rows = [
        row for file in out.glob("*.parquet") for row in parquet.read_table(file, columns=["path", "score"]).to_pylist()
    ]
    return [(Path(row["path"]).name, row["score"]) for row in rows], seconds


def _rest(model: str, files: list[Path]) -> tuple[list[tuple[str, float]], float]:
    server = subprocess.Popen([*_CLI, "serve", model, "--port", str(_PORT)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    server.stdout.readline()
    found: list[tuple[str, float]] = []
    lock, batches = threading.Lock(), [files[i : i + 16] for i in range(0, len(files), 16)]

    def client() -> None:
        while True:
            with lock:
                if not batches:
                    return
                batch = batches.pop()
            body = json.dumps({"inputs": [base64.b64encode(file.read_bytes()).decode() for file in batch]}).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{_PORT}/invocations", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=120) as answer:
                rows = json.loads(answer.read())["predictions"]
            found.extend((file.name, row["score"]) for file, row in zip(batch, rows, strict=True))

    start = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    server.terminate()
    server.wait()
    return found, seconds


if __name__ == "__main__":
    main()
