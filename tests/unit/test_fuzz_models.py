# SPDX-License-Identifier: Apache-2.0
"""Models and requests from outside, at random: every outcome is a verdict or one line. `make fuzz` tries far more inputs."""

import base64
import json
import math
import random
import shutil
import struct
import zlib
from pathlib import Path

import pytest
from conftest import noise
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fuzz import EXAMPLES, SEEDS, VALUES, damaged, fuzz, one_line
from tiny_bundle import make_bundle

from panda_ad.errors import UserError
from panda_ad.scoring.bundle import load_bundle
from panda_ad.scoring.checksums import CHECKSUMS, write_checksums

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(0)]
IMAGES = [noise(100), noise(101)]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Two models: one to damage and one to take files from, with what the first one's files hold and its scores."""
    folders = [make_bundle(tmp_path_factory.mktemp("bundle"), seed) for seed in (0, 1000)]
    whole = [{p.relative_to(f).as_posix(): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders]
    return folders[0], *whole, scores(folders[0])


def scores(folder) -> list[float]:
    return [verdict.score for verdict in load_bundle(folder).score(IMAGES)]


def spoil(name: str, whole: dict[str, bytes], other: dict[str, bytes], rng: random.Random) -> bytes | None:
    """A file cut short, changed in a bit or a block, doubled at its end, gone (None), or another one in its place."""
    data, kind = whole[name], rng.randrange(7)
    at = rng.randrange(len(data)) if rng.random() < 0.7 else rng.randrange(min(len(data), 400))  # headers come first
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 2:
        block = rng.choice((bytes(16), b"\xff" * 8, struct.pack("<q", 2**40), rng.randbytes(4)))
        return data[:at] + block + data[at + len(block) :]
    if kind == 3:
        return data + data[at:]
    if kind == 4:
        return None
    return other[name] if kind == 5 else whole[rng.choice(sorted(whole))]


@fuzz
@given(st.integers(0, 2**48))
def test_bundles(bundles, seed):
    """A file or two of a model are not what was written: the same scores, or one line."""
    folder, whole, other, expected = bundles
    rng = random.Random(seed)
    chosen = rng.sample(sorted(whole), rng.choice((1, 1, 2)))
    try:
        for name in chosen:
            put(folder / name, spoil(name, whole, other, rng))
        try:
            found = scores(folder)
        except UserError as e:
            one_line(e, f"{folder}: ")
            return
        assert found == expected
    finally:
        for name in chosen:
            put(folder / name, whole[name])


@settings(fuzz, max_examples=EXAMPLES // 10)  # each one that is no JSON loads a whole model
@given(st.integers(0, 2**48))
def test_bundles_with_checksums_of_their_own(bundles, seed):
    """A model that was written with such files, by a program with a fault or by hand: it loads, or one line says why not."""
    folder, whole, other, _ = bundles
    rng = random.Random(seed)
    name = rng.choice([n for n in sorted(whole) if n != CHECKSUMS and not n.endswith(".faiss")])
    try:
        put(folder / name, spoil(name, whole, other, rng))
        write_checksums(folder)
        try:
            load_bundle(folder)
        except UserError as e:
            one_line(e, str(folder))
    finally:
        for changed in (name, CHECKSUMS):
            put(folder / changed, whole[changed])


def put(path: Path, data: bytes | None) -> None:
    path.unlink(missing_ok=True)
    if data is not None:
        path.write_bytes(data)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The web application of `panda-ad serve` around a saved model, asked in this process."""
    import mlflow.pyfunc
    from starlette.testclient import TestClient

    from panda_ad.registry.model_files import save
    from panda_ad.registry.serve_app import Serving, application

    folder = tmp_path_factory.mktemp("served")
    (folder / "bundle").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("panda_ad.registry.serve_app.MAX_BODY", 100_000)
        patch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
        save(folder / "model", make_bundle(folder / "bundle"), SEEDS[0], "x", "0" * 32, "m-1")
        with TestClient(application(Serving(mlflow.pyfunc.load_model(str(folder / "model"))))) as client:
            yield client
    shutil.rmtree(folder)


def enormous(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is of that size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk


@st.composite
def images(draw) -> object:
    """An image as a client would send it, and as it should not."""
    data = draw(st.sampled_from(SEEDS))
    if draw(st.booleans()):
        data = damaged(data, draw(st.integers(0, 2**48)))
    if draw(st.integers(0, 15)) == 0:
        data = enormous(draw(st.sampled_from([1, 3000, 20_000, 2**31 - 1])), 9000)
    text = base64.b64encode(data).decode()
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(VALUES)
    if kind == 1:
        return {"b64": text}
    if kind == 2:
        return draw(st.sampled_from(["data:image/png;base64,", "data:,", "data:"])) + text
    if kind == 3:
        return text[: draw(st.integers(0, len(text)))]
    return text


@st.composite
def requests(draw) -> tuple[bytes, dict[str, str], int | None]:
    """Body, headers, and the number of images where the request is in order."""
    cells = draw(st.lists(images(), max_size=4))
    if draw(st.integers(0, 30)) == 0:
        cells = [cells[0] if cells else ""] * draw(st.sampled_from([64, 65, 5000]))
    column = draw(st.sampled_from(["image"] * 8 + ["Image", "", "x"]))
    formats = {
        "inputs": [cells, {column: cells}],
        "instances": [cells, [{column: cell} for cell in cells]],
        "dataframe_split": [{"columns": [column], "data": [[cell] for cell in cells]}],
        "dataframe_records": [[{column: cell} for cell in cells]],
    }
    name = draw(st.sampled_from(sorted(formats)))
    request: dict[str, object] = {name: draw(st.sampled_from(formats[name]))}
    kind = draw(st.integers(0, 9))
    if kind == 0:
        request = draw(st.dictionaries(st.sampled_from([*formats, "params", "x"]), VALUES, max_size=3))
    if kind == 1:
        request["params"] = draw(VALUES | st.dictionaries(st.sampled_from(["heatmap", "x"]), VALUES, max_size=2))
    if kind == 2:
        request["params"] = {"heatmap": draw(st.booleans())}
    body = json.dumps(request).encode()
    if kind == 3:
        body = damaged(body, draw(st.integers(0, 2**48)))
    if kind == 4:
        body = json.dumps(draw(VALUES)).encode()
    kinds = ["application/json"] * 9 + ["application/json; charset=utf-16", "text/csv", "text/plain", "x", ""]
    headers = {"content-type": draw(st.sampled_from(kinds))}
    in_order = kind in (2, 5, 6, 7, 8, 9) and not any(isinstance(cell, list) for cell in cells)
    return body, headers, len(cells) if in_order else None


@fuzz
@given(requests())
def test_requests(server, request):
    body, headers, count = request
    answer = server.post("/invocations", content=body, headers=headers)
    assert answer.status_code in (200, 400, 413, 415), (answer.status_code, answer.text)
    said = answer.json()
    if answer.status_code != 200:
        assert (
            set(said) == {"error_code", "message"} and 0 < len(said["message"]) <= 500 and "\n" not in said["message"]
        )
        return
    rows = said["predictions"]
    assert count is None or len(rows) == count
    for row in rows:
        if row["decision"] == "error":
            assert row["score"] is None and row["anomalous"] is None and row["error"] and "\n" not in row["error"]
        else:
            assert row["decision"] in ("good", "defect") and math.isfinite(row["score"]) and not row["error"]
