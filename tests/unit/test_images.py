# SPDX-License-Identifier: Apache-2.0
"""Decoding of untrusted image files."""

import hashlib
import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from panda_ad.data import images
from panda_ad.data.images import batches, decode, picture, pixel_count, read_image
from panda_ad.data.masks import decode_mask, read_mask
from panda_ad.errors import UserError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def refused(data: bytes, reason: str, name: str = "line 3/größe ü.png") -> str:
    with pytest.raises(UserError) as e:
        decode(data, name)
    message = str(e.value)
    assert message.startswith(name + ": ") and reason in message and "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_the_same_pixels(kind):
    np.testing.assert_array_equal(decode(encode(Image.fromarray(RGB), kind), "x"), RGB)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_decode(kind):
    smooth = np.broadcast_to(np.linspace(0, 255, 20, dtype=np.uint8)[None, :, None], (12, 20, 3))
    out = decode(encode(Image.fromarray(np.ascontiguousarray(smooth)), kind, quality=95), "x")
    assert out.dtype == np.uint8 and np.abs(out.astype(int) - smooth).max() < 16


def test_empty_and_non_image():
    refused(b"", "empty")
    refused(b"The quick brown fox", "not an image")
    refused(encode(Image.fromarray(RGB), "GIF"), "not an image of a known format")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.9])
def test_truncated(kind, keep):
    data = encode(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    refused(data[: int(len(data) * keep)], "")


def test_bomb_is_refused_by_its_header(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    refused(png_header(10_001, 10_000), "10001 x 10000 pixels")
    refused(png_header(60_000, 60_000), "100,000,000")


def test_byte_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    refused(bytes(101), "MiB")
    (tmp_path / "a.png").write_bytes(bytes(5000))
    with pytest.raises(UserError, match="a.png"):
        read_image(tmp_path / "a.png")


def test_sixteen_bit_gray_uses_the_full_range():
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    expected = np.array([[0, 1, 128, 255]])
    for kind in ("PNG", "TIFF"):
        p = picture(encode(Image.fromarray(values), kind), "x")
        np.testing.assert_array_equal(p.rgb, np.repeat(expected[:, :, None], 3, 2))
        assert p.mode.startswith("I;16")
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(every), "PNG"), "x")[:, :, 1], np.rint(every / 257))
    pgm = b"P5 4 1 65535\n" + values.astype(">u2").tobytes()
    np.testing.assert_array_equal(decode(pgm, "x")[:, :, 0], expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_in_which_white_is_zero_is_no_negative(dtype):
    out = io.BytesIO()
    Image.fromarray(np.array([[0, np.iinfo(dtype).max]], dtype)).save(out, "TIFF", tiffinfo={262: 0})
    data = bytearray(out.getvalue())
    with Image.open(out) as image:
        assert image.tag_v2[262] == 0
        (at,), _ = image.tag_v2[273], image.load()
    size = np.dtype(dtype).itemsize
    data[at : at + 2 * size] = bytes(size) + bytes([255] * size)  # as stored: 0, which is white, then black
    np.testing.assert_array_equal(decode(bytes(data), "x")[:, :, 0], [[255, 0]])


def test_a_file_that_has_changed_since_it_was_hashed_is_refused(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(Image.new("L", (8, 8)), "PNG"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_image(path, digest).shape == (8, 8, 3)
    path.write_bytes(encode(Image.new("L", (8, 8), 9), "PNG"))
    with pytest.raises(UserError, match=r"a.png: has changed since .validate. read it; run .dvc repro. again"):
        read_image(path, digest)


def test_twelve_bit_tiff_is_scaled_from_its_own_range():
    packed = bytes([0xFF, 0xF0, 0x00])  # two 12-bit pixels: 4095, 0
    entries = [
        (256, 3, 2),
        (257, 3, 1),
        (258, 3, 12),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 200),
        (277, 3, 1),
        (278, 3, 1),
        (279, 4, 3),
    ]
    ifd = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHI", tag, kind, 1) + (struct.pack("<HH", v, 0) if kind == 3 else struct.pack("<I", v))
        for tag, kind, v in entries
    )
    data = (b"II*\0" + struct.pack("<I", 8) + ifd + bytes(4)).ljust(200, b"\0") + packed
    np.testing.assert_array_equal(decode(data, "x")[0, :, 0], [255, 0])


def test_palette_gray_alpha_cmyk_and_one_bit():
    gray = Image.fromarray(RGB[:, :, 0])
    np.testing.assert_array_equal(decode(encode(gray), "x"), np.repeat(RGB[:, :, :1], 3, 2))

    palette = Image.fromarray(RGB).quantize(16)
    np.testing.assert_array_equal(decode(encode(palette), "x"), np.asarray(palette.convert("RGB")))

    one_bit = Image.fromarray(RGB[:, :, 0] > 127)
    np.testing.assert_array_equal(decode(encode(one_bit), "x")[:, :, 1], np.where(RGB[:, :, 0] > 127, 255, 0))

    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    for kind in ("TIFF", "JPEG"):
        r, g, b = decode(encode(cmyk, kind), "x")[4, 4]
        assert r > 200 and g < 60 and b < 60, kind


def test_transparency_is_laid_over_white_and_in_masks_over_black():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[0, 1] = (0, 0, 0, 128)
    out = decode(encode(Image.fromarray(rgba)), "x")
    assert (
        out[0, 0].tolist() == [10, 20, 30]
        and out[1, 1].tolist() == [255, 255, 255]
        and abs(int(out[0, 1, 0]) - 127) <= 1
    )

    la = np.zeros((4, 4, 2), np.uint8)
    la[0, 0] = (200, 255)
    assert decode(encode(Image.fromarray(la, "LA")), "x")[:2, 0, 0].tolist() == [200, 255]

    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((0, 0), 1)
    assert decode(encode(palette, transparency=0), "x")[:2, 0, 0].tolist() == [9, 255]

    mask = np.zeros((4, 4, 4), np.uint8)
    mask[0, 0] = 255
    assert decode_mask(encode(Image.fromarray(mask)), "x").sum() == 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    """Against the definition: orientation o says where the stored row 0 and column 0 belong (EXIF 2.3, tag 274)."""
    stored = np.full((16, 32, 3), 40, np.uint8)
    stored[:8, :16] = 220  # bright: stored top left
    exif = Image.Exif()
    exif[274] = orientation
    out = decode(encode(Image.fromarray(stored), kind, exif=exif), "x")
    assert out.shape == ((16, 32, 3) if orientation < 5 else (32, 16, 3))
    h, w = out.shape[0] // 4, out.shape[1] // 4
    corner = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}[orientation]
    row, column = (h if corner[0] == "t" else -h), (w if corner[1] == "l" else -w)
    assert out[row, column, 0] > 180 and out[-row, -column, 0] < 80


def test_sixteen_bit_is_rotated_too():
    exif = Image.Exif()
    exif[274] = 6
    values = np.zeros((8, 16), np.uint16)
    values[0, 0] = 65535
    out = decode(encode(Image.fromarray(values), exif=exif), "x")
    assert out.shape == (16, 8, 3) and out[0, 7, 0] == 255


def test_float_and_32_bit_are_refused():
    refused(encode(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), "mode F")
    refused(encode(Image.fromarray(np.zeros((8, 8), np.int32)), "TIFF"), "mode I")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_animations_and_pages_are_refused(kind):
    first, second = Image.fromarray(RGB), Image.fromarray(RGB[::-1].copy())
    refused(encode(first, kind, save_all=True, append_images=[second]), "2 frames or pages")


def test_first_picture_of_a_multi_picture_photo():
    first, second = Image.new("RGB", (16, 16), (200, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 200))
    assert decode(encode(first, "MPO", save_all=True, append_images=[second]), "x")[8, 8, 0] > 150


def test_odd_names(tmp_path):
    for name in ("with space.png", "größe-測試.png", "a'b\"c,d.png", "no_extension"):
        Image.fromarray(RGB).save(tmp_path / name, "PNG")
        np.testing.assert_array_equal(read_image(tmp_path / name), RGB)
    with pytest.raises(UserError, match=r"gone\.png: cannot be read"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(UserError, match="cannot be read"):
        read_image(tmp_path)


def test_mask_is_binarized_at_half(tmp_path):
    Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8)).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png").tolist() == [[False, False, True, True]]


SEEDS = [encode(Image.fromarray(RGB), kind) for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")]


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_damaged_bytes_decode_or_are_refused_in_one_line(seed, edits, keep):
    data = bytearray(seed)
    for position, value in edits:
        data[position % len(data)] = value
    message, out = "x.png: ", np.zeros((1, 1, 3), np.uint8)
    try:
        out = decode(bytes(data[: max(1, int(keep * len(data)))] if keep > 0.5 else data), "x.png")
    except UserError as e:
        message = str(e)
    assert message.startswith("x.png: ") and "\n" not in message
    assert out.dtype == np.uint8 and out.ndim == 3 and out.shape[2] == 3 and out.size <= 3 * images.MAX_PIXELS


def test_pixels_are_counted_without_decoding(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(Image.fromarray(RGB)))
    assert pixel_count(path) == pixel_count(path.read_bytes()) == 12 * 20
    assert pixel_count(png_header(8000, 9000)) == 72_000_000
    assert [pixel_count(x) for x in (b"", b"no image", tmp_path / "nowhere.png", png_header(99_999, 99_999))] == [0] * 4


@given(st.lists(st.integers(0, 90_000_000), max_size=200))
def test_batches_hold_bounded_pixels_and_every_item_once(sizes):
    found = list(batches(sizes, lambda size: size))
    assert [size for batch in found for size in batch] == sizes
    assert all(0 < len(batch) <= 32 and (sum(batch) <= 64_000_000 or len(batch) == 1) for batch in found)
    assert all(len(a) == 32 or sum(a) + b[0] > 64_000_000 for a, b in itertools.pairwise(found)), (
        "no shorter than need be"
    )
