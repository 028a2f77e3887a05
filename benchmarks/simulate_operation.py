# SPDX-License-Identifier: Apache-2.0
"""Eight weeks of a plant, with its people's commands, in a throw-away clone: what was noticed, retrained, let through.

    python benchmarks/simulate_operation.py [--category capsule] [--weeks 8] [--keep FOLDER]

The model starts from the sample without one kind of defect. Each week's parts are photographed (the sample's
generator), scored with the version at @staging into the verdict log, and tested for drift; inspectors then label what
they looked at, `panda-ad ingest` adds it, and the weekly retraining runs through the gate. In week 4 the lamp is
changed for good, in week 6 a new kind of defect appears, in week 7 a batch of defects is labeled good by mistake.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from panda_ad.system.processes import child_environment

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from make_sample import DEFECTS, JPEG_QUALITY, defective_image, image_rng, normal_images, write_dataset  # noqa: E402

SEED = 11
NEW_KIND = {"capsule": "dent", "fabric": "stain", "grid": "rust"}
LIGHT_FROM, LIGHT = 4, 0.7
SESSION = 90  # good parts photographed and labeled under the new lamp, besides the week's
NEW_KIND_FROM = 6
POISONED = 7
GOOD, BAD = 60, 12  # parts photographed in a week
TRAINED, TESTED = 30, 10  # of the good ones, added to training and to the test set
MISLABELED = 45


@dataclass
class Week:
    """What happened in a week, for the table."""

    number: int
    event: str
    drift: str = ""
    alarms: str = ""
    retrained: str = ""
    auroc: str = ""
    decisions: str = ""
    gate: str = ""
    staging: str = ""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def main() -> None:
    """Parse the command line, simulate, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--category", default="capsule", choices=sorted(NEW_KIND))
    parser.add_argument("--weeks", type=int, default=8)
    parser.add_argument("--keep", type=Path, help="simulate in this new folder and leave it there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="panda-ad-") as temporary:
        plant = Plant(options.keep or Path(temporary) / "plant", options.category)
        print(
            "| week | what happens | alarms on good / bad parts | drift found | retrained | AUROC: new, in place "
            "| caught less false alarms: new, in place | gate | at staging |\n|---|---|---|---|---|---|---|---|---|",
            flush=True,
        )
        weeks = [plant.start()] + [plant.week(number) for number in range(1, options.weeks + 1)]
        print(f"\n{sum(week.seconds for week in weeks):.0f} s in all")
        for week in weeks:
            for note in week.notes:
                print(f"week {week.number}: {note}")


class Plant:
    """A clone of the repository with one category, and what its people do there."""

    def __init__(self, folder: Path, category: str):
        self.folder, self.category = folder, category
        self.model = f"panda-plant-{category}"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        for key, value in (("user.name", "simulation"), ("user.email", "simulation@example.org")):
            subprocess.run(["git", "-C", str(folder), "config", key, value], check=True)
        params: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
        params |= {"dataset": "plant", "categories": [category]}
        params["monitor"] |= {"window": GOOD + BAD}  # a week
        (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        write_dataset(folder / "data", seed=7, categories=[category], held_back=[NEW_KIND[category]])
        self.call("dvc", "add", "--quiet", "data")
        self.commit("The plant's first data")

    def start(self) -> Week:
        """Week 0: the first model."""
        week = Week(0, "first model, without the kind of defect that comes later")
        self.retrain(week)
        return told(week)

    def week(self, number: int) -> Week:
        """Photograph, score, look for drift, label, retrain."""
        week = Week(number, "as before")
        light = LIGHT if number >= LIGHT_FROM else 0.0
        kinds = [k for k in DEFECTS[self.category] if k != NEW_KIND[self.category] or number >= NEW_KIND_FROM]
        if number == LIGHT_FROM:
            week.event = "new lamp: dimmer, warmer, one-sided"
        if number == NEW_KIND_FROM:
            week.event = f"a new kind of defect, {NEW_KIND[self.category]}"
        start = time.perf_counter()
        good = self.photograph_good(number, light)
        bad = {
            kind: self.photograph_bad(number, kind, light, BAD // len(kinds) + (kind == NEW_KIND[self.category]) * 6)
            for kind in kinds
        }
        self.score(week, good, bad)
        self.monitor(week)
        poison = number == POISONED
        if poison:
            week.event = f"{MISLABELED} defects labeled good by mistake"
        if number == LIGHT_FROM:
            good[:0] = self.photograph_good(number, light, "session", SESSION)
            week.notes.append(f"{SESSION} more good parts were photographed under the new lamp and labeled")
        trained = TRAINED + len(good) - GOOD
        self.panda("ingest", *map(str, good[:trained]), "--category", self.category, "--label", "good")
        self.panda(
            "ingest",
            *map(str, good[trained : trained + TESTED]),
            "--category",
            self.category,
            "--label",
            "good",
            "--split",
            "test",
        )
        for kind, pictures in bad.items():
            masks = self.inbox(number) / "masks" / kind
            added = pictures[:2] if kind != NEW_KIND[self.category] else pictures
            self.panda("ingest", *map(str, added), "--category", self.category,
                       "--label", "defect", "--kind", kind, "--masks", str(masks))  # fmt: skip
        self.commit(f"Week {number}: what the inspectors labeled")
        if poison:
            wrong = [
                p
                for i, kind in enumerate(kinds)
                for p in self.photograph_bad(100 + i, kind, light, MISLABELED // len(kinds))
            ]
            said = self.panda("ingest", *map(str, wrong), "--category", self.category, "--label", "good")
            week.notes += [line for line in said.splitlines() if "defect" in line][:2]
            self.commit(f"Week {number}: a batch with the wrong label")
            batch = subprocess.check_output(["git", "-C", str(self.folder), "rev-parse", "HEAD"], text=True).strip()
        self.retrain(week)
        if poison and "refused" in week.gate:  # what the people do when the gate has told them
            subprocess.run(
                ["git", "-C", str(self.folder), "revert", "--no-edit", batch], check=True, capture_output=True
            )
            self.call("dvc", "checkout", "--quiet", "data.dvc")
            week.notes.append("the batch was taken back: git revert, dvc checkout")
        week.seconds += time.perf_counter() - start
        return told(week)

    def inbox(self, number: int) -> Path:
        """Where a week's photographs lie."""
        return self.folder / "inbox" / f"week-{number}"

    def photograph_good(self, number: int, light: float, name: str = "good", count: int = GOOD) -> list[Path]:
        """Good parts of a week."""
        folder = self.inbox(number) / name
        folder.mkdir(parents=True)
        parts = normal_images(self.category, count, SEED, f"week {number}/{name}", light)
        return [save(rgb, folder / f"{number}-{name}-{i:03d}.jpg") for i, rgb in enumerate(parts)]

    def photograph_bad(self, number: int, kind: str, light: float, count: int) -> list[Path]:
        """Make a week's parts with one kind of defect, and their masks."""
        folder, masks = self.inbox(number) / kind, self.inbox(number) / "masks" / kind
        for f in (folder, masks):
            f.mkdir(parents=True)
        files = []
        for i in range(count):
            rgb, mask = defective_image(
                self.category, kind, image_rng(SEED, self.category, f"week {number}/{kind}", i), light
            )
            files.append(save(rgb, folder / f"{number}-{kind}-{i:03d}.jpg"))
            Image.fromarray(mask).save(masks / f"{number}-{kind}-{i:03d}_mask.png")
        return files

    def score(self, week: Week, good: list[Path], bad: dict[str, list[Path]]) -> None:
        """Verdicts of the version in place, into the log."""
        verdicts = self.folder / "verdicts.csv"
        everything = [*good, *(p for pictures in bad.values() for p in pictures)]
        self.panda(
            "score", *map(str, everything), "--model", f"models:/{self.model}@staging", "--log", "--out", str(verdicts)
        )
        called = dict(line.split(",")[0:4:3] for line in verdicts.read_text().splitlines()[1:])
        rates = [np.mean([called[str(p)] == "defect" for p in pictures]) for pictures in (good, sum(bad.values(), []))]
        week.alarms = f"{rates[0]:.0%} / {rates[1]:.0%}"
        new = NEW_KIND[self.category]
        if week.number == NEW_KIND_FROM:
            week.notes.append(
                f"of the new kind {np.mean([called[str(p)] == 'defect' for p in bad[new]]):.0%} "
                "were called defect before it was ever seen"
            )

    def monitor(self, week: Week) -> None:
        """Say what the week's photographs have that the calibration images have not."""
        self.panda("monitor", "-c", self.category, expect=(0, 5))
        found = json.loads((self.folder / "monitoring/reports" / f"{self.category}.json").read_text())
        week.drift = "; ".join(found["findings"]) or "none"

    def retrain(self, week: Week) -> None:
        """`panda-ad run`: the stages whose inputs changed, then the gate."""
        start = time.perf_counter()
        self.panda("run", expect=(0, 3))
        seconds = time.perf_counter() - start
        decision = json.loads((self.folder / "build/decisions" / f"{self.category}.json").read_text())
        metrics = json.loads((self.folder / f"build/evaluation/{self.category}/metrics.json").read_text())
        report = json.loads((self.folder / "build/validation/report.json").read_text())
        counts = report["categories"][self.category]
        images = sum(sum(counts[split].values()) for split in ("train", "calibration"))
        week.retrained = f"{images} normal images, {seconds:.0f} s"
        texts = {rule["name"]: rule["text"].partition(";")[0].replace(" against", ",") for rule in decision["rules"]}
        week.auroc = texts.get("image AUROC not worse", f"{metrics['image_auroc']:.4f}")
        balance = metrics["recall"] - metrics["false_alarm_rate"]
        week.decisions = texts.get("defects caught less false alarms not worse", f"{balance:.4f}")
        week.gate = f"version {decision['version']} {decision['outcome']}: {decision['reason']}"
        week.staging = self.staging()
        self.commit(f"Week {week.number}: retrained", "dvc.lock")

    def staging(self) -> str:
        """Return the version in place."""
        program = (
            "from panda_ad.registry.connection import connect; "
            f"print(connect().get_model_version_by_alias({self.model!r}, 'staging').version)"
        )
        return "v" + self.call(sys.executable, "-c", program).strip().splitlines()[-1]

    def panda(self, *arguments: str, expect: tuple[int, ...] = (0,)) -> str:
        """Run panda-ad."""
        return self.call(sys.executable, "-m", "panda_ad.cli", *arguments, expect=expect)

    def call(self, *command: str, expect: tuple[int, ...] = (0,)) -> str:
        """Run a command in the plant with the plant's code; its output."""
        environment = child_environment({"PYTHONPATH": str(self.folder / "src")})
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in expect:
            sys.exit(
                f"{' '.join(command[:6])}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        return done.stdout + done.stderr

    def commit(self, subject: str, *files: str) -> None:
        """Commit the data's version, or some files, with git."""
        subprocess.run(["git", "-C", str(self.folder), "add", *(files or ("data.dvc", "params.yaml"))], check=True)
        subprocess.run(["git", "-C", str(self.folder), "commit", "--quiet", "--allow-empty", "-m", subject], check=True)


def save(rgb: np.ndarray, path: Path) -> Path:
    """Write a photograph."""
    Image.fromarray(rgb).save(path, quality=JPEG_QUALITY)
    return path


def told(week: Week) -> Week:
    """Print a week's row."""
    cells = (
        str(week.number),
        week.event,
        week.alarms or "-",
        week.drift or "-",
        week.retrained,
        week.auroc,
        week.decisions,
        week.gate,
        week.staging,
    )
    print("| " + " | ".join(cells) + " |", flush=True)
    return week


if __name__ == "__main__":
    main()
