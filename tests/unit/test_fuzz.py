# SPDX-License-Identifier: Apache-2.0
"""What comes from outside, at random: every outcome is a value or one UserError line. `make fuzz` tries far more inputs."""

import io
import os
import random
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import REPO, make_mvtec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from panda_ad.data.damage import doubt
from panda_ad.data.images import Decoding, decode
from panda_ad.data.layouts import list_entries
from panda_ad.data.manifest import COLUMNS, data_hash, load_manifest
from panda_ad.data.masks import mask_levels
from panda_ad.errors import UserError
from panda_ad.params import Params
from panda_ad.params_file import load_params, parse_params

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(0)]
EXAMPLES = int(os.environ.get("PANDA_FUZZ", "200"))
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 40, 3), np.uint8)
RAW = yaml.safe_load((REPO / "params.yaml").read_text(encoding="utf-8"))
TEXT = (REPO / "params.yaml").read_text(encoding="utf-8")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def seeds() -> list[bytes]:
    """Small files of every format, mode and compression that is decoded."""
    exif = Image.Exif()
    exif[0x112], exif[0x10F] = 6, "maker"
    rgb, gray = Image.fromarray(PIXELS), Image.fromarray(PIXELS[..., 0])
    deep = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 200)
    alpha = Image.fromarray(np.dstack([PIXELS, PIXELS[..., :1]]))
    found = [encoded(image, kind) for image in (rgb, gray) for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")]
    found += [encoded(deep, kind) for kind in ("PNG", "TIFF", "PPM")] + [
        encoded(alpha, kind) for kind in ("PNG", "TIFF", "WEBP")
    ]
    found += [encoded(rgb, "TIFF", compression=name) for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")]
    found += [encoded(rgb, kind, exif=exif) for kind in ("JPEG", "PNG", "TIFF", "WEBP")]
    found += [
        encoded(rgb, "JPEG", progressive=True),
        encoded(rgb.convert("CMYK"), "JPEG"),
        encoded(rgb.quantize(9), "PNG"),
    ]
    found += [encoded(rgb.quantize(9), "BMP"), encoded(gray.convert("1"), "TIFF"), encoded(gray.convert("1"), "PPM")]
    return found


SEEDS = seeds()


def damaged(data: bytes, seed: int) -> bytes:
    """Bytes changed, cut, doubled, zeroed, exchanged with another file's, or numbers in them made extreme."""
    rng, out = random.Random(seed), bytearray(data)
    for _ in range(rng.randint(1, 6)):
        if not out:
            break
        at, length = rng.randrange(len(out)), rng.choice((1, 2, 4, 16, 200))
        kind = rng.randrange(7)
        if kind == 0:
            out[at] = rng.randrange(256)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            out[at:at] = out[at : at + length]
        elif kind == 3:
            out[at : at + length] = bytes(length)
        elif kind == 4:
            other = rng.choice(SEEDS)
            start = rng.randrange(len(other))
            out[at : at + length] = other[start : start + length]
        elif kind == 5:
            del out[at : at + length]
        else:
            extreme = rng.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 65535, 100_000))
            out[at : at + 4] = struct.pack(rng.choice((">I", "<I")), extreme)
    return bytes(out)


def one_line(error: UserError, start: str = "") -> None:
    assert "\n" not in str(error) and str(error) and str(error).startswith(start)


@fuzz
@given(st.sampled_from(SEEDS), st.integers(0, 2**48))
def test_images(data, seed):
    data = damaged(data, seed)
    try:
        rgb = decode(data, "x.png", Decoding(max_megapixels=1))
    except UserError as e:
        one_line(e, "x.png: ")
        return
    assert rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == 3 and rgb.size
    assert "\n" not in doubt(data, rgb)


@fuzz
@given(st.lists(st.sampled_from(SEEDS), max_size=3), st.integers(0, 2**48))
def test_masks(parts, seed):
    parts = [damaged(part, seed + i) if (seed + i) % 3 else part for i, part in enumerate(parts)]
    try:
        levels = mask_levels(parts, "m.png")
    except UserError as e:
        one_line(e)
        return
    assert levels.dtype == np.uint8 and levels.ndim == 2 and levels.size


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["auto", "fail", "nut"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
PLACES = [(section, key) for section, inner in RAW.items() for key in (inner if isinstance(inner, dict) else [None])]


@fuzz
@given(st.lists(st.tuples(st.sampled_from(PLACES), VALUES), min_size=1, max_size=3), st.booleans())
def test_parameters(changes, drop):
    raw = {section: dict(inner) if isinstance(inner, dict) else inner for section, inner in RAW.items()}
    for (section, key), value in changes:
        if key is None or not isinstance(raw.get(section), dict):
            raw[section] = value
        elif drop:
            raw[section].pop(key, None)
        else:
            raw[section][key] = value
    try:
        assert isinstance(parse_params(raw), Params)
    except UserError as e:
        one_line(e)


NOISE = st.sampled_from(
    [
        "\t",
        "\x00",
        "[",
        "{",
        "&a ",
        "*a",
        "!!python/object:os.system ",
        "2001-99-99",
        "0x",
        "- ",
        ": ",
        "'",
        "\ufeff",
        "1e999",
        ".nan",
    ]
    + [
        "9" * 5000,
        "[" * 3000,
        "? ",
        "<<: *x",
        "!!binary x",
        "!!timestamp 9",
        "\x85",
        "%TAG",
        "---\n",
        "1_0",
        "0o9",
        "~",
        "=",
        "\ud800",
    ]
)


@fuzz
@given(st.lists(st.tuples(st.integers(0, len(TEXT)), NOISE | st.text(max_size=5)), min_size=1, max_size=4))
def test_parameter_files(edits):
    text = TEXT
    for at, noise in edits:
        text = text[:at] + noise + text[at:]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "params.yaml")
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            assert isinstance(load_params(path), Params)
        except UserError as e:
            one_line(e)


ROW = {
    "path": "nut/a.png", "sha256": "0" * 64, "width": "9", "height": "9", "mode": "L", "category": "nut", "split": "test", "label": "0",
    "defect": "good", "mask": "", "pixels": "1", "mask_sha256": "", "session": "",
}  # fmt: skip
CELLS = st.text(max_size=8) | st.sampled_from(
    ["-1", "1e400", "9" * 30, "nan", "", "train", '"', "\n", ",", "\x00", "1.5", "０"]
)


@fuzz
@given(
    st.lists(st.dictionaries(st.sampled_from(COLUMNS), CELLS, max_size=2), max_size=4),
    st.lists(st.sampled_from(COLUMNS), max_size=1),
    st.integers(0, 2**32),
)
def test_manifests(changes, dropped, seed):
    columns = [c for c in COLUMNS if c not in dropped]
    lines = [",".join(columns)]
    for change in changes:
        row = {**ROW, **change}
        lines.append(",".join('"' + row[c].replace('"', '""') + '"' for c in columns))
    data = ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
    rng = random.Random(seed)
    if rng.random() < 0.5:
        at = rng.randrange(len(data))
        data = data[:at] + rng.choice([b'"', b"\n", b"\x00", b"\xff", b",", b""]) + data[at + rng.randrange(3) :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "manifest.csv")
        path.write_bytes(data)
        try:
            rows = load_manifest(path)
        except UserError as e:
            one_line(e)
            return
    assert set(rows["label"]) <= {0, 1} and ("mask_sha256" not in rows or len(data_hash(rows)) == 64)
    assert set(rows["split"]) <= {"train", "calibration", "test"} and (rows[["width", "height"]] > 0).all(axis=None)


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=6).filter(
    lambda name: name not in (".", "..")
)
FOLDERS = st.sampled_from(
    ["train", "test", "validation", "ground_truth", "Masks", "good", "GOOD", "ok", "hole", "Hole", "@eaDir", "000"]
)
FILES = st.sampled_from(["000.png", "000_mask.png", "000.jpg", "000.json", "x", "y.heic", "000_mask.xml", ".hidden"])


@fuzz
@given(st.lists(st.tuples(st.lists(FOLDERS | NAMES, max_size=3), FILES | NAMES), max_size=8))
def test_folders(files):
    """No image is lost in silence: each that can be seen is an entry, is named in a warning, or lies in a folder that is."""
    root = Path(tempfile.mkdtemp())
    try:
        nut = make_mvtec(root, train=1, good=1, defective=1)
        for folders, name in files:
            path = nut.joinpath(*folders, name)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"\x89PNG\r\n\x1a\n")
            except OSError:  # a folder where a file is, or a name too long
                continue
        params = parse_params({**RAW, "categories": ["nut"], "data": {**RAW["data"], "root": str(root)}})
        try:
            listing = list_entries(params, root)
        except UserError as e:
            one_line(e)
            return
        assert all("\n" not in entry.problem for entry in listing.entries)
        covered = {e.path for e in listing.entries} | {e.mask for e in listing.entries}
        said = " ".join(listing.warnings)
        assert "\n" not in said
        for path in (p for p in nut.rglob("*") if p.is_file() and p.suffix.lower() == ".png"):
            parts = path.relative_to(root).as_posix().split("/")
            hidden = any(part.startswith(".") or part.lower() == "@eadir" for part in parts)
            above = {"/".join(parts[:n]) for n in range(1, len(parts) + 1)}
            assert (
                hidden
                or covered & above
                or "passed over" in said
                or any(" ".join(str(root / a).split()) in said for a in above)
            ), path
    finally:
        shutil.rmtree(root)
