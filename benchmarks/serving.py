# SPDX-License-Identifier: Apache-2.0
"""What a server gives to many clients, beside what the same processor gives to a batch.

    python benchmarks/serving.py models:/panda-sample-fabric@staging IMAGES [--clients 8] [--requests 2000] [--move]

Run in a project's folder. Each client sends one image a request, without pauses, over a connection that stays. `--move`
puts the alias on another version and back every ten seconds meanwhile. Scores are compared with the command line's.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from panda_ad.data.images import read_image
from panda_ad.data.listing import image_files
from panda_ad.registry.connection import connect
from panda_ad.registry.load import load_model
from panda_ad.registry.versions import find_version

_PORT = 5077
_MOVE_SECONDS = 10.0


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("images", type=Path)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--move", action="store_true")
    args = parser.parse_args()
    files = image_files([args.images])[:500]
    detector = load_model(args.model, None).detector
    detector.score([read_image(files[0])])
    start = time.perf_counter()
    expected = [verdict.score for verdict in detector.score([read_image(file) for file in files])]
    batch = len(files) / (time.perf_counter() - start)
    command = [sys.executable, "-m", "panda_ad.cli", "serve", args.model, "--port", str(_PORT)]
    start = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    assert server.stdout is not None
    print(server.stdout.readline().strip(), f"after {time.perf_counter() - start:.1f} s")
    bodies = [json.dumps({"inputs": [base64.b64encode(file.read_bytes()).decode()]}).encode() for file in files]
    stop = threading.Event()
    mover = threading.Thread(target=_move, args=(args.model, stop)) if args.move else None
    try:
        if mover is not None:
            mover.start()
        _load(bodies, expected, args.clients, args.requests, batch, args.move)
    finally:
        stop.set()
        if mover is not None:
            mover.join()
        server.terminate()
        server.wait()


def _load(bodies: list[bytes], expected: list[float], clients: int, requests: int, batch: float, moved: bool) -> None:
    statuses: Counter[int] = Counter()
    versions: Counter[str] = Counter()
    took: list[float] = []
    wrong = 0

    def client(first: int) -> None:
        nonlocal wrong
        connection = http.client.HTTPConnection("127.0.0.1", _PORT, timeout=120)
        connection.connect()  # header and body are two packets, and the second must not wait for an answer to the first
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(first, requests, clients):
            start = time.perf_counter()
            connection.request("POST", "/invocations", bodies[i % len(bodies)], {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
            took.append(time.perf_counter() - start)
            statuses[response.status] += 1
            if response.status == 200:
                (row,) = json.loads(content)["predictions"]
                versions[row["version"]] += 1
                wrong += not moved and row["score"] != expected[i % len(bodies)]

    client(requests - 1)  # the first answer is slower
    took.clear()
    statuses.clear()
    versions.clear()
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    rate = len(took) / (time.perf_counter() - start)
    middle, high = (1000 * np.quantile(took, q) for q in (0.5, 0.95))
    print(f"{clients} clients, {len(took)} requests: {dict(statuses)}, {dict(versions)}, {wrong} scores differ")
    print(f"{rate:.1f} images/s served, {batch:.1f} in a batch: {rate / batch:.2f}")
    print(f"median {middle:.0f}, p95 {high:.0f} ms")


def _move(model: str, stop: threading.Event) -> None:
    """Move an alias between its version and another one, and back at the end."""
    client = connect()
    held = find_version(client, model)
    alias = re.sub(r".*@", "", model)
    numbers = sorted((str(v.version) for v in client.search_model_versions(f"name = '{held.name}'")), key=int)
    other = next(number for number in reversed(numbers) if number != str(held.version))
    at = 0
    try:
        while not stop.wait(_MOVE_SECONDS):
            at = 1 - at
            client.set_registered_model_alias(held.name, alias, (str(held.version), other)[at])
    finally:
        client.set_registered_model_alias(held.name, alias, str(held.version))


if __name__ == "__main__":
    main()
