# SPDX-License-Identifier: Apache-2.0
"""Pictures as cameras, phones and broken copies produce them: decoded rightly, refused in one line, or doubted aloud."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import make_mvtec, noise, save
from PIL import Image

from panda_ad.data import images
from panda_ad.data.damage import doubt
from panda_ad.data.images import Decoding, decode, picture, read_image
from panda_ad.data.manifest import collect
from panda_ad.data.masks import decode_mask, read_mask
from panda_ad.data.validation import validate
from panda_ad.errors import UserError

RNG = np.random.default_rng(0)
SMOOTH = np.asarray(
    Image.fromarray(RNG.integers(60, 200, (30, 40, 3), np.uint8)).resize((320, 240), Image.Resampling.BICUBIC)
)


def encode(array, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(buffer, kind, **options)
    return buffer.getvalue()


def doubt_of(data: bytes) -> str:
    return doubt(data, decode(data, "x"))


def found_in(make_params, **data):
    params = make_params(["nut"], data={"root": "data", **data})
    rows, warnings = collect(params)
    return validate(rows, params, warnings)


def with_exif(jpeg: bytes, entries: list[bytes], tail: bytes = b"") -> bytes:
    ifd = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", 0) + tail
    payload = b"Exif\0\0II*\0\x08\0\0\0" + ifd
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


# exif and alpha


@pytest.mark.parametrize("value", [(-1, 0), (0, 0), (2**31 - 1, -1)])
def test_an_exif_field_that_cannot_be_stored_harms_nothing(value):
    turned = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
    jpeg = encode(SMOOTH, quality=90)
    data = with_exif(jpeg, [turned, struct.pack("<HHII", 0x11A, 10, 1, 8 + 2 + 24 + 4)], struct.pack("<ii", *value))
    np.testing.assert_array_equal(decode(data, "x"), np.rot90(decode(jpeg, "x"), -1))


def test_exif_that_is_noise_harms_nothing():
    jpeg = encode(SMOOTH, quality=90)
    for seed in range(50):
        payload = b"Exif\0\0" + np.random.default_rng(seed).integers(0, 256, 60, np.uint8).tobytes()
        data = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]
        np.testing.assert_array_equal(decode(data, "x"), decode(jpeg, "x"))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_there_is_not_turns_nothing(orientation):
    data = with_exif(encode(SMOOTH), [struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0)])
    assert decode(data, "x").shape == SMOOTH.shape


def test_an_alpha_channel_of_zeros_is_ignored():
    transparent = np.dstack([SMOOTH, np.zeros(SMOOTH.shape[:2], np.uint8)])
    np.testing.assert_array_equal(decode(encode(transparent, "PNG"), "x"), SMOOTH)
    gray = np.dstack([SMOOTH[..., 0], np.zeros(SMOOTH.shape[:2], np.uint8)])
    np.testing.assert_array_equal(decode(encode(Image.fromarray(gray, "LA"), "PNG"), "x")[..., 1], SMOOTH[..., 0])
    mask = np.zeros((8, 8, 4), np.uint8)
    mask[2:4, 2:4, :3] = 255
    assert decode_mask(encode(mask, "PNG"), "x").sum() == 4


def test_transparent_pictures_are_no_copies_of_each_other(make_params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_mvtec(Path("data"))
    for i in range(3):
        rgba = np.dstack([noise(800 + i), np.zeros((16, 16), np.uint8)])
        Image.fromarray(rgba).save(f"data/nut/train/good/t{i}.png")
    assert not found_in(make_params).problems


# 16 bits


def test_a_gray_range_is_scaled_to_black_and_white():
    values = np.array([[500, 1000, 2000, 3000, 4000]], np.uint16)
    decoding = Decoding(gray_range=(1000, 3000))
    for kind in ("PNG", "TIFF"):
        p = picture(encode(values, kind), "x", decoding=decoding)
        assert p.rgb[0, :, 0].tolist() == [0, 0, 128, 255, 255] and p.values == (500, 4000)
    np.testing.assert_array_equal(decode(encode(SMOOTH, "PNG"), "x", decoding), SMOOTH), "8 bits have their own range"


@pytest.mark.parametrize(("low", "high", "advised"), [(752, 3376, 4095), (500, 560, 1023), (0, 250, 255)])
def test_a_range_that_is_not_filled_is_warned_of_with_a_way_out(low, high, advised, make_params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_mvtec(Path("data"))
    for i in range(3):
        values = np.random.default_rng(i).integers(low, high + 1, (16, 16)).astype(np.uint16)
        values[0, :2] = low, high
        Image.fromarray(values).save(f"data/nut/train/good/s{i}.tif")
    (line,) = [w for w in found_in(make_params).warnings if "16-bit" in w]
    assert f"hold values from {low} to {high}" in line and f"data.gray_range, e.g. [0, {advised}]" in line
    found = found_in(make_params, gray_range=[low, high])
    assert not [w for w in found.warnings if "16-bit" in w or "beyond" in w]
    beyond = found_in(make_params, gray_range=[low, high - 1])
    assert [w for w in beyond.warnings if f"3 images hold values from {low} to {high}, beyond data.gray_range" in w]


def test_a_gray_range_is_checked(make_params):
    with pytest.raises(
        UserError, match=r"data.gray_range: \[lowest, highest\] 16-bit gray is expected, found \[9, 9\]"
    ):
        make_params(["nut"], data={"gray_range": [9, 9]})
    with pytest.raises(UserError, match="data.gray_range"):
        make_params(["nut"], data={"gray_range": [0, 70000]})


# halves


def test_a_jpeg_whose_data_ends_early():
    jpeg = encode(SMOOTH, quality=90)
    for share in (0.3, 0.5, 0.9):
        assert "one flat gray" in doubt_of(jpeg[: int(share * len(jpeg))] + b"\xff\xd9")
    turned = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
    assert "one flat gray" in doubt_of(with_exif(jpeg[: len(jpeg) // 2] + b"\xff\xd9", [turned])), "where it is now"
    assert "one flat gray" in doubt_of(encode(SMOOTH[..., 0])[:9000] + b"\xff\xd9")


def test_a_jpeg_that_is_damaged_in_the_middle():
    jpeg = bytearray(encode(SMOOTH, quality=90))
    jpeg[len(jpeg) // 2 : len(jpeg) // 2 + 200] = b"\x55" * 200
    assert "one byte many times over" in doubt_of(bytes(jpeg))


def test_a_jpeg_with_data_left_over():
    jpeg = encode(SMOOTH, quality=90)
    middle = len(jpeg) // 2
    assert "goes on where the picture ends" in doubt_of(jpeg[:middle] + jpeg[middle - 2000 : middle] + jpeg[middle:])


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM"])
def test_a_copy_that_broke_off(kind):
    data = encode(SMOOTH, kind)
    assert "zeros" in doubt_of(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


@pytest.mark.parametrize("gray", [False, True])
def test_a_progressive_jpeg_whose_last_scans_are_missing(gray):
    """Cut off and ended again it decodes, whole but coarse."""
    data = encode(np.ascontiguousarray(SMOOTH[..., 0]) if gray else SMOOTH, quality=90, progressive=True)
    last = data.rfind(b"\xff\xda")
    for cut in (last, len(data) // 2):
        assert "last scans are missing" in doubt_of(data[:cut] + b"\xff\xd9")


def png_with(raw: bytes, depth: int, color: int) -> bytes:
    """A PNG of SMOOTH's size with these rows."""
    height, width = SMOOTH.shape[:2]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)), (b"PLTE", bytes(range(240)))]
    chunks += [(b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks
    )


@pytest.mark.parametrize(
    ("depth", "color", "row"), [(8, 0, 1), (8, 2, 3), (16, 2, 6), (8, 6, 4), (8, 3, 1), (16, 4, 4)]
)
def test_a_png_that_lacks_rows(depth, color, row):
    """Pillow leaves them empty, without a word."""
    height, width = SMOOTH.shape[:2]
    rows = [b"\0" + RNG.integers(0, 80, width * row, np.uint8).tobytes() for _ in range(height // 2)]
    assert doubt_of(png_with(b"".join(rows), depth, color)) == "its PNG data ends before its last row"
    flat = [b"\0" + bytes(width * row)] * (height - len(rows))
    assert doubt_of(png_with(b"".join(rows + flat), depth, color)) == "", "black below is what it shows"


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"optimize": True}, {"subsampling": 0}, {"restart_marker_rows": 1}]
)
@pytest.mark.parametrize("quality", [30, 75, 95])
def test_whole_jpegs_are_not_doubted(options, quality):
    noisy = np.clip(SMOOTH.astype(int) + RNG.integers(-9, 9, SMOOTH.shape), 0, 255).astype(np.uint8)
    half = SMOOTH.copy()
    half[100:] = 250
    for array in (SMOOTH, noisy, half, SMOOTH[..., 0]):
        data = encode(np.ascontiguousarray(array), quality=quality, **options)
        assert doubt_of(data) == "" and doubt_of(data + b"a camera's own trailer") == ""
    for gray in (0, 128):
        data = encode(np.full((64, 64, 3), gray, np.uint8), quality=quality, **options)
        assert doubt_of(data).startswith("it holds next to nothing")


def test_ten_bits_in_sixteen_bit_color_are_next_to_nothing():
    """Pillow keeps the high byte of each channel: four levels of 256."""
    values = RNG.integers(0, 1024, (20, 20, 3)).astype(">u2")
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0))]
    parts += [(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in values))), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in parts]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    assert "values of a few bits in 16" in doubt_of(data)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "PPM"])
def test_whole_pictures_are_not_doubted(kind):
    assert doubt_of(encode(SMOOTH, kind)) == ""


def test_a_half_picture_is_named_by_validate(make_params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_mvtec(Path("data"))
    jpeg = encode(SMOOTH)
    Path("data/nut/train/good/half.jpg").write_bytes(jpeg[: len(jpeg) // 2] + b"\xff\xd9")
    assert any("may be damaged" in w and "nut/train/good/half.jpg" in w for w in found_in(make_params).warnings)


# large ones


def test_more_megapixels_may_be_allowed(monkeypatch, tmp_path):
    data = encode(np.zeros((1000, 1100), np.uint8), "PNG")
    with pytest.raises(
        UserError, match=r"1100 x 1000 pixels, more than the 1,000,000 .* data.max_megapixels raises that"
    ):
        decode(data, "x", Decoding(max_megapixels=1))
    assert decode(data, "x", Decoding(max_megapixels=2)).shape == (1000, 1100, 3)
    monkeypatch.setattr(images, "MAX_BYTES", 100 * len(data) - 1)
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(UserError, match="data.max_megapixels raises that"):
        read_image(tmp_path / "a.png", decoding=Decoding(max_megapixels=1))
    assert read_image(tmp_path / "a.png", decoding=Decoding(max_megapixels=3)).shape == (1000, 1100, 3)


def test_the_limit_of_megapixels_is_that_of_masks_too(make_params, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = make_mvtec(Path("data"), defective=1)
    path = save(np.full((1000, 1100), 255, np.uint8), folder / "ground_truth/crack/000_mask.png")
    assert read_mask(path, decoding=Decoding(max_megapixels=2)).all()
    ((name, problem),) = found_in(make_params, max_megapixels=1).problems
    assert name == "nut/test/crack/000.png"
    assert "its mask" in problem and "more than the 1,000,000 pixels" in problem


def test_inverted_masks_are_a_warning(make_params, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = make_mvtec(Path("data"))
    assert not [w for w in found_in(make_params).warnings if "masks mark" in w]
    for file in (folder / "ground_truth/crack").iterdir():
        save(255 - np.asarray(Image.open(file)), file)
    (warning,) = [w for w in found_in(make_params).warnings if "masks mark" in w]
    assert "3 masks mark more than half of their image, as inverted ones do: nut/test/crack/000.png" in warning


def test_a_pointer_of_git_lfs_says_what_to_do():
    with pytest.raises(UserError, match="x.png: only a pointer of Git LFS; run `git lfs pull`"):
        decode(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "x.png")


def test_heic_says_what_to_do():
    with pytest.raises(UserError, match=r"phone.heic: HEIC, AVIF or a film, which is not read; save it as one of PNG"):
        decode(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200), "phone.heic")


# near copies


def test_a_training_picture_saved_again_in_test_is_named(make_params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_mvtec(Path("data"))
    for file in Path("data").rglob("*/good/*.png"):
        rng = np.random.default_rng(int(file.stem) + 100 * ("train" in file.parts))
        part = np.clip(SMOOTH.astype(int) + rng.integers(-20, 20, (1, 1, 3)) + rng.normal(0, 8, SMOOTH.shape), 0, 255)
        save(part.astype(np.uint8), file)
    assert not [w for w in found_in(make_params).warnings if "nearly copies" in w]
    Image.open("data/nut/train/good/003.png").save("data/nut/test/good/again.jpg", quality=85)
    Image.open("data/nut/train/good/004.png").resize((640, 480)).save("data/nut/test/good/larger.jpg", quality=90)
    (line,) = [w for w in found_in(make_params).warnings if "nearly copies" in w]
    assert "2 test images" in line and "nut/test/good/again.jpg of nut/train/good/003.png" in line
    assert "nut/test/good/larger.jpg of nut/train/good/004.png" in line


# one color of a PNG that is transparent, previews of camera raw


def png_with_clear_color(depth: int, color: int, row: bytes, clear: bytes) -> bytes:
    """Two pixels beside each other; `color` as in PNG's header, 0 gray and 2 RGB."""
    header = struct.pack(">IIBBBBB", 2, 1, depth, color, 0, 0, 0)
    parts = ((b"IHDR", header), (b"tRNS", clear), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("depth", "row", "clear"),
    [(16, b"\0\5\x80\x80", 5), (8, b"\5\x80", 5), (4, b"\x58", 5), (2, b"\x60", 1), (1, b"\x40", 0)],
)
def test_a_transparent_gray_is_white_at_any_depth(depth, row, clear):
    pixels = decode(png_with_clear_color(depth, 0, row, struct.pack(">H", clear)), "x")[0, :, 0]
    assert pixels[0] == 255 and pixels[1] == {16: 128, 8: 128, 4: 136, 2: 170, 1: 255}[depth]
    none = decode(png_with_clear_color(depth, 0, row, struct.pack(">H", 0 if depth > 1 else 1)), "x")[0, :, 0]
    assert none[0] < 100


def test_transparent_gray_everywhere_is_one_that_nobody_meant():
    pixels = decode(png_with_clear_color(16, 0, b"\x40\x40\x40\x40", b"\x40\x40"), "x")
    assert np.all(pixels == 64)


def test_a_transparent_color_of_sixteen_bits_is_refused():
    with pytest.raises(UserError, match=r"x\.png: one of its colors of 16 bits is transparent"):
        decode(png_with_clear_color(16, 2, bytes(12), bytes(6)), "x.png")
    assert np.all(decode(png_with_clear_color(8, 2, bytes(3) + b"\x40" * 3, bytes(6)), "x")[0] == [[255], [64]])


def test_the_preview_of_a_camera_raw_is_no_picture():
    with pytest.raises(UserError, match=r"x\.nef: camera raw, of which only the preview"):
        decode(encode(SMOOTH, "TIFF", tiffinfo={254: 1}), "x.nef")
    np.testing.assert_array_equal(decode(encode(SMOOTH, "TIFF", tiffinfo={254: 0}), "x"), SMOOTH)
