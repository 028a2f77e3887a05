# SPDX-License-Identifier: Apache-2.0
"""`panda-ad export`: a folder that scores on its own at a station, with a certificate that it scores the same.

The folder holds the model, the code that scores (a copy of this package, so that the two cannot drift apart), the
versions of the libraries, checksums, and some images with their scores, by which the station compares itself.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import requires, version
from pathlib import Path

import numpy as np

import panda_ad
from panda_ad.commands import station_score
from panda_ad.commands.score import score_files
from panda_ad.data.listing import image_files
from panda_ad.errors import GateRefused, UserError
from panda_ad.params_file import load_params
from panda_ad.registry.load import Model, load_model
from panda_ad.system.cores import side_by_side
from panda_ad.system.files import atomic_folder, digest_file, write_json, write_text
from panda_ad.system.processes import child_environment

CERTIFICATE = "certificate.json"
_MOST = 5000
_SAMPLE = 12


@dataclass(frozen=True)
class Certificate:
    """What the exported folder scored, beside what the project scores.

    Attributes
    ----------
    model : registered name and version, or the bundle's folder.
    images : compared, each scored by both.
    largest_difference : of the scores.
    verdicts_flipped : images that one calls good and the other defect, or only one can read.
    """

    model: str
    images: int
    largest_difference: float
    verdicts_flipped: int
    exported: str
    panda_ad: str
    python: str
    machine: str
    libraries: dict[str, str]

    @property
    def holds(self) -> bool:
        """Whether every score is the same number."""
        return self.verdicts_flipped == 0 and self.largest_difference == 0.0

    def __str__(self) -> str:
        """Say it in a line."""
        return (
            f"{self.images} images scored by the exported folder in a process of its own: largest difference "
            f"{self.largest_difference:g}, verdicts flipped {self.verdicts_flipped}"
        )


def export_model(model: str | None, bundle: Path | None, images: Sequence[Path], out: Path) -> str:
    """Do what the command line does: find model and images, export, and log the certificate. Return what to say.

    Raises
    ------
    UserError, GateRefused
        As `export`; no images are named, and those of the data set are not at hand.
    """
    loaded = load_model(model, bundle)
    if model is not None:
        from panda_ad.registry.versions import download_version

        bundle = download_version(model)[2]
    assert bundle is not None
    certificate = export(loaded, bundle, images or _data_set(loaded.detector.config.category), out)
    if loaded.name:
        from panda_ad.registry.certificate import attach

        attach(loaded.name, loaded.version, asdict(certificate))
    return f"{certificate.model}: {certificate}\n{out}: copy it to the station; README.txt says how to run it there"


def _data_set(category: str) -> list[Path]:
    """Return the category's images, those that trained and those that test. UserError where they are not here."""
    from panda_ad.stages.common import category_rows

    try:
        root = Path(load_params().data.root)
        files = [root / path for rows in category_rows(category).values() for path in rows["path"]]
    except (UserError, OSError) as e:
        raise UserError(f"no images to compare on ({e}); name some with --images") from None
    if gone := [file for file in files if not file.is_file()]:
        raise UserError(f"{len(gone)} of {len(files)} images of {category} are not here: dvc checkout, or --images")
    return files


def export(model: Model, bundle: Path, images: Sequence[Path], out: Path) -> Certificate:
    """Write the folder and certify it.

    Parameters
    ----------
    model : what is exported, loaded.  bundle : its folder.
    images : files or folders to compare on; at most 5,000 files, drawn at random.
    out : does not exist yet, or is an earlier export, whose place it takes.

    Raises
    ------
    UserError
        No images, or a folder `out` that is no export.
    GateRefused
        A score differs. Nothing is left at `out`.
    """
    if out.exists() and not (out / CERTIFICATE).is_file():
        raise UserError(f"--out {out}: exists, and is no export; name another folder")
    files = [file.resolve() for file in image_files(images)]
    if len(files) > _MOST:
        files = [files[i] for i in np.sort(np.random.default_rng(0).permutation(len(files))[:_MOST])]
    libraries = scoring_libraries()
    with atomic_folder(out) as folder:
        shutil.copytree(bundle, folder / "model", copy_function=shutil.copyfile)
        source = Path(panda_ad.__file__).parent
        shutil.copytree(source, folder / "panda_ad", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(station_score.__file__, folder / "score.py")
        write_text(folder / "requirements.txt", "".join(f"{name}=={number}\n" for name, number in libraries.items()))
        write_text(folder / "README.txt", _README)
        certificate = _certify(model, folder, files, libraries)
        if not certificate.holds:
            raise GateRefused(f"not exported: {certificate}")
        write_json(folder / CERTIFICATE, asdict(certificate))
        write_text(folder / station_score.CHECKSUMS, _checksums(folder))
    return certificate


def scoring_libraries() -> dict[str, str]:
    """Return the libraries that scoring needs, the package's first dependency group, and their versions here."""
    names = [re.split(r"[^A-Za-z0-9._-]", line)[0] for line in requires("panda-ad") or [] if "extra ==" not in line]
    return {name: version(name) for name in sorted(names)}


def _certify(model: Model, folder: Path, files: list[Path], libraries: dict[str, str]) -> Certificate:
    """Score files as the project does and as the folder does, and keep some of them as the station's sample."""
    with tempfile.TemporaryDirectory() as temporary:
        ours, theirs = Path(temporary) / "project.csv", Path(temporary) / "station.csv"
        score_files(files, Model(model.detector), ours)
        sample = folder / "sample"
        sample.mkdir()
        expected = station_score.read(ours)
        readable = [file for file in files if expected[str(file)]["score"]]
        if not readable:
            raise UserError(f"--images: none of {len(files)} can be read; nothing can be compared")
        chosen = [readable[i] for i in np.unique(np.linspace(0, len(readable) - 1, _SAMPLE).astype(int))]
        lines = ["path,score,decision"]
        for n, file in enumerate(chosen):
            name = f"{n:02d}{file.suffix.lower()}"
            shutil.copyfile(file, sample / name)
            lines.append(f"{name},{expected[str(file)]['score']},{expected[str(file)]['decision']}")
        write_text(folder / station_score.EXPECTED, "\n".join(lines) + "\n")
        write_text(folder / station_score.CHECKSUMS, _checksums(folder))
        command = [sys.executable, "-I", str(folder / "score.py"), *map(str, files), "--out", str(theirs)]
        done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), check=False)
        if not theirs.is_file():
            raise UserError(f"the exported folder does not score: {' '.join(done.stderr.split())[-300:]}")
        found = station_score.read(theirs)
    pairs = [(row, found[path]) for path, row in expected.items()]
    away = [abs(float(a["score"]) - float(b["score"])) for a, b in pairs if a["score"] and b["score"]]
    return Certificate(
        model=f"{model.name} version {model.version}" if model.name else "a bundle, not registered",
        images=len(readable),
        largest_difference=max(away, default=0.0),
        verdicts_flipped=sum(a["decision"] != b["decision"] for a, b in pairs),
        exported=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        panda_ad=panda_ad.__version__,
        python=platform.python_version(),
        machine=f"{platform.machine()}, {platform.system()}, {_processor()}",
        libraries=libraries,
    )


def _processor() -> str:
    """Return the processor's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _checksums(folder: Path) -> str:
    """Return a line for each file, as `sha256sum --check` reads it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != station_score.CHECKSUMS)
    digests = side_by_side(digest_file, files)
    return "".join(
        f"{digest}  {file.relative_to(folder).as_posix()}\n" for digest, file in zip(digests, files, strict=True)
    )


_README = """A model of panda-ad, to score pictures on this machine.

    python -m venv .venv && .venv/bin/pip install -r requirements.txt
    .venv/bin/python score.py --self-test
    .venv/bin/python score.py PICTURES --out verdicts.csv --heatmaps overlays

certificate.json says on how many images this folder was compared with the project it comes from.
No server, registry or network is needed. The folder can be copied anywhere.
"""
