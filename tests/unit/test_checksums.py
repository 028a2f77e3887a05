# SPDX-License-Identifier: Apache-2.0
"""A bundle whose files are not those that were written together is refused in one line, never loaded with other numbers."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import noise
from tiny_bundle import make_bundle

from panda_ad.errors import UserError
from panda_ad.scoring.bundle import load_bundle
from panda_ad.scoring.checksums import CHECKSUMS

IMAGES = [noise(100 + i) for i in range(3)]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Two models of other images, with everything that a bundle can hold."""
    return [make_bundle(tmp_path_factory.mktemp("bundle"), seed) for seed in (0, 1000)]


@pytest.fixture
def copy(bundles, tmp_path):
    return Path(shutil.copytree(bundles[0], tmp_path / "copy"))


def names(folder) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def scores(folder) -> list[float]:
    return [verdict.score for verdict in load_bundle(folder).score(IMAGES)]


def refused(folder, text: str = "damaged bundle") -> None:
    with pytest.raises(UserError, match=text) as e:
        load_bundle(folder)
    assert "\n" not in str(e.value) and ("build it again" in str(e.value) or "dvc repro" in str(e.value))


def test_every_file_is_listed_as_sha256sum_reads_it(bundles):
    listed = [line.split("  ")[1] for line in (bundles[0] / CHECKSUMS).read_text().splitlines()]
    assert sorted([*listed, CHECKSUMS]) == names(bundles[0])
    assert {"bundle.json", "learned.safetensors", "gallery_0.faiss", "localizer/localizer.json"} < set(listed)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", CHECKSUMS], cwd=bundles[0], check=True)


def test_each_file_cut_short_changed_in_one_bit_exchanged_or_gone_is_refused(bundles, copy):
    rng = np.random.default_rng(0)
    for name in names(copy):
        file, whole, other = copy / name, (copy / name).read_bytes(), (bundles[1] / name).read_bytes()
        bit = bytearray(whole)
        bit[rng.integers(len(bit))] ^= 1 << rng.integers(8)
        for data in (whole[: len(whole) // 2], b"", bytes(bit), other):
            if data == whole:  # the localizer's settings are the same in both
                continue
            file.write_bytes(data)
            refused(copy)
        file.unlink()
        refused(copy, "not a bundle, checksums.sha256 is missing" if name == CHECKSUMS else f"'{name}' is missing")
        file.write_bytes(whole)
    assert scores(copy) == scores(bundles[0])


def test_a_file_that_does_not_belong_is_refused_and_one_of_the_file_server_is_not(bundles, copy):
    (copy / "Thumbs.db").write_bytes(b"x")
    (copy / ".nfs0001").write_bytes(b"x")
    assert scores(copy) == scores(bundles[0])
    shutil.copy(copy / "gallery_0.faiss", copy / "gallery_1.faiss")
    refused(copy, "'gallery_1.faiss' is none of its files")
