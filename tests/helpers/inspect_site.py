# SPDX-License-Identifier: Apache-2.0
"""A small inspector's page: a fitted model, scored images in the log, decisions in SQLite, and a client with a session."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from conftest import noise, save
from starlette.testclient import TestClient

from panda_ad.features.backbones import load_backbone
from panda_ad.features.export import export_network
from panda_ad.features.images import DecodedImages
from panda_ad.inspect.access import Access
from panda_ad.inspect.app import create_app
from panda_ad.inspect.decisions import open_decisions
from panda_ad.inspect.models import Models
from panda_ad.inspect.scorer import Scorer
from panda_ad.inspect.site import Site
from panda_ad.monitor.record import Recorder
from panda_ad.params import Params
from panda_ad.params_file import load_params
from panda_ad.scoring.bundle import load_bundle, save_bundle
from panda_ad.scoring.config import DetectorConfig, FitParams
from panda_ad.scoring.fit import fit_detector

ROOT = Path(__file__).resolve().parents[2]
HERE = "http://127.0.0.1"


def part(seed: int, size: int = 32) -> np.ndarray:
    """A good part: gray noise of few levels."""
    return np.random.default_rng(seed).integers(110, 140, (size, size, 3), dtype=np.uint8)


def scratched(seed: int, size: int = 32) -> np.ndarray:
    """The same with a bright spot."""
    pixels = part(seed, size)
    pixels[size // 4 : size // 2, size // 4 : size // 2] = 255
    return pixels


def make_bundle(folder: Path, size: int = 32) -> Path:
    """A small model with heat maps, of good parts."""
    params = load_params(ROOT / "params.yaml")
    backbone = load_backbone("embedded")
    network = export_network(backbone, (32, 32))
    good = [part(i, size) for i in range(40)]
    fit = FitParams(gallery=params.gallery, localize=params.localize, verdict=params.verdict)
    folder.mkdir(parents=True, exist_ok=True)
    save_bundle(fit_detector(network, DecodedImages(network, good), fit, DetectorConfig(category="nut")), folder)
    return folder


def score_into_log(bundle: Path, images: Mapping[str, np.ndarray], version: str = "3") -> None:
    """Write images to inbox/nut/NAME.png of the working directory, and their verdicts into its log."""
    detector = load_bundle(bundle)
    recorder = Recorder("nut", "panda-x-nut", version, detector.threshold().value)
    for name, pixels in images.items():
        path = save(pixels, Path(f"inbox/nut/{name}.png"))
        if recorder.fresh([path]):
            recorder.add(path, pixels, detector.score([pixels])[0])
    recorder.write()


def make_site(params: Params, bundle: Path, access: Access | None = None, version: str = "3") -> Site:
    """A page in the working directory whose model in place is `bundle`."""
    models = Models(params, look=lambda _category: ("panda-x-nut", version, bundle))
    return Site(params, access or Access(), open_decisions(), models, Scorer(models))


class Inspector:
    """A person with a browser, without the browser."""

    def __init__(self, site: Site, who: str = "Anna", token: str = "") -> None:
        app = create_app(site, "k" * 64, ["127.0.0.1"])
        self.http = TestClient(app, base_url=HERE, follow_redirects=True, headers={"accept": "text/html"})
        if who:
            self.post("/me", who=who, token=token)

    def get(self, path: str, **more):
        return self.http.get(path, **more)

    def csrf(self) -> str:
        return re.search(r'name="csrf" value="([^"]+)"', self.get("/me").text).group(1)

    def post(self, path: str, **fields: str):
        return self.http.post(path, data={"csrf": self.csrf(), **fields}, headers={"origin": HERE})

    def form(self, page: str) -> dict[str, str]:
        """Hidden fields of the page's form of decisions."""
        part = page.partition('id="decide"')[2].partition("</form>")[0]
        return dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', part))

    def decide(self, label: str, kind: str = "", page: str | None = None):
        """Decide what a page shows, by default the queue's first image."""
        fields = self.form(page or self.get("/queue/nut").text)
        return self.post("/queue/nut/decide", **fields | {"label": label, "kind": kind})


__all__ = ["HERE", "Inspector", "make_bundle", "make_site", "noise", "part", "score_into_log", "scratched"]
