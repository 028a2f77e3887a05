# SPDX-License-Identifier: Apache-2.0
"""Eight weeks of a plant, with its people's commands, in a throw-away clone: what was noticed, retrained, let through.

    python benchmarks/simulate_operation.py [--category capsule] [--weeks 8] [--keep FOLDER] [--small]

The model starts from the sample without one kind of defect. On each of a week's five days parts are photographed (the
sample's generator), scored with the version at @staging into the verdict log, and tested for drift; at its end
inspectors label what they looked at, `panda-ad ingest` adds it as a session, the budget is audited, and the weekly
retraining runs through the gate. In week 4 the lamp is changed for good, in week 6 a new kind of defect appears, in
week 7 a batch of defects is labeled good by mistake. Commands run in this process one after another, so that libraries
are loaded once. With --small the features are not adapted and there are no heat maps: other figures, in a third of
the time.
"""

from __future__ import annotations

import argparse
import json
import os
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
from typer.testing import CliRunner

from panda_ad.cli import app
from panda_ad.errors import UserError
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
DAYS = 5
TRAINED, TESTED = 30, 10  # of the good ones, added to training and to the test set
MISLABELED = 45


@dataclass
class Week:
    """What happened in a week, for the table."""

    number: int
    event: str
    drift: str = ""
    found: list[str] = field(default_factory=list)
    checks: int = 0
    promise: str = "-"
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
    parser.add_argument("--small", action="store_true", help="no adaptation, no heat maps")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="panda-ad-") as temporary:
        plant = Plant((options.keep or Path(temporary) / "plant").absolute(), options.category, options.small)
        print(
            "| week | what happens | alarms on good / bad parts | new alarms of monitoring | promise | retrained "
            "| AUROC: new, in place | caught less false alarms: new, in place | gate | at staging |\n"
            "|---|---|---|---|---|---|---|---|---|---|",
            flush=True,
        )
        weeks = [plant.start()] + [plant.week(number) for number in range(1, options.weeks + 1)]
        print(f"\n{sum(week.seconds for week in weeks):.0f} s in all\n\n{plant.audit()}")
        for week in weeks:
            for note in week.notes:
                print(f"week {week.number}: {note}")


class Plant:
    """A clone of the repository with one category, and what its people do there."""

    def __init__(self, folder: Path, category: str, small: bool):
        self.folder, self.category = folder, category
        self.checked = ""
        self.earlier: list[Path] = []  # last week's photographs, still in the inbox
        self.model = f"panda-plant-{category}"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        for key, value in (("user.name", "simulation"), ("user.email", "simulation@example.org")):
            subprocess.run(["git", "-C", str(folder), "config", key, value], check=True)
        params: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
        params |= {"dataset": "plant", "categories": [category]}
        params["monitor"] |= {"window": GOOD + BAD}  # a week
        params["data"] |= {"sessions": "folder"}
        if small:
            params["adapt"]["method"], params["localize"]["method"] = "none", "none"
            params["verdict"]["score"] = "features"
        (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        write_dataset(folder / "data", seed=7, categories=[category], held_back=[NEW_KIND[category]])
        self.call("dvc", "add", "--quiet", "data")
        self.commit("The plant's first data")
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder / "src")  # of stages, which are processes of their own

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
        self.work(week, good, bad)
        poison = number == POISONED
        if poison:
            week.event = f"{MISLABELED} defects labeled good by mistake"
        if number == LIGHT_FROM:
            good[:0] = self.photograph_good(number, light, "session", SESSION)
            week.notes.append(f"{SESSION} more good parts were photographed under the new lamp and labeled")
        trained = TRAINED + len(good) - GOOD
        session = ("--category", self.category, "--label", "good", "--session", f"week {number}")
        self.panda("ingest", *map(str, good[:trained]), *session)
        self.panda("ingest", *map(str, good[trained : trained + TESTED]), *session, "--split", "test")
        for kind, pictures in bad.items():
            masks = self.inbox(number) / "masks" / kind
            added = pictures[:2] if kind != NEW_KIND[self.category] else pictures
            self.panda("ingest", *map(str, added), "--category", self.category,
                       "--label", "defect", "--kind", kind, "--masks", str(masks))  # fmt: skip
        self.commit(f"Week {number}: what the inspectors labeled")
        week.promise = self.promise()
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

    def work(self, week: Week, good: list[Path], bad: dict[str, list[Path]]) -> None:
        """Score and monitor, day by day: verdicts of the version in place, into the log; what has changed."""
        everything = [*good, *(p for pictures in bad.values() for p in pictures)]
        order = np.random.default_rng([SEED, week.number]).permutation(len(everything))
        called: dict[str, str] = {}
        photographed: list[Path] = []
        for day, parts in enumerate(np.array_split(order, DAYS), 1):
            photographed += [everything[i] for i in parts]
            self.score([*self.earlier, *photographed], called)
            self.monitor(week, day)
        self.earlier = everything
        week.drift = "; ".join(week.found) or "none"
        pictures = sum(bad.values(), [])
        rates = [np.mean([called[str(p)] == "defect" for p in part]) for part in (good, pictures)]
        week.alarms = f"{rates[0]:.0%} / {rates[1]:.0%}"
        new = NEW_KIND[self.category]
        if week.number == NEW_KIND_FROM:
            week.notes.append(
                f"of the new kind {np.mean([called[str(p)] == 'defect' for p in bad[new]]):.0%} "
                "were called defect before it was ever seen"
            )

    def score(self, inbox: list[Path], called: dict[str, str]) -> None:
        """Score what is new in the inbox, or new to the version in place; keep each image's first verdict."""
        verdicts = self.folder / "verdicts.csv"
        self.panda(
            "score", *map(str, inbox), "--model", f"models:/{self.model}@staging", "--log", "--out", str(verdicts)
        )
        for row in verdicts.read_text().splitlines()[1:]:
            path, decision = row.split(",")[0:4:3]
            called.setdefault(path, decision)

    def monitor(self, week: Week, day: int) -> None:
        """Say what is new about the photographs, and what is over."""
        self.panda("monitor", "-c", self.category, expect=(0, 2, 5))
        path = self.folder / "monitoring/reports" / f"{self.category}.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"checked": ""}
        if found["checked"] == self.checked:  # there were too few images to check
            return
        self.checked = found["checked"]
        week.checks += 1
        if found["findings"]:
            week.found.append(f"day {day}: {'; '.join(found['findings'])}")
        week.notes += [f"day {day}: over: {'; '.join(alarm['findings'])}: {alarm['end']}" for alarm in found["ended"]]

    def promise(self) -> str:
        """Return what the audit says of the version in place."""
        self.panda("audit", "-c", self.category, expect=(0, 5))
        (found,) = json.loads((self.folder / "monitoring/audit" / f"{self.category}.json").read_text())
        return f"{found['alarms']} of {found['images']}: {found['verdict']}"

    def audit(self) -> str:
        """Return the last audit's table."""
        return self.panda("audit", "-c", self.category, expect=(0, 5))

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
        """Run a command of panda-ad in this process; its output."""
        done = CliRunner().invoke(app, list(arguments))
        code = done.exception.exit_code if isinstance(done.exception, UserError) else done.exit_code
        if code not in expect:
            sys.exit(f"panda-ad {' '.join(arguments[:6])}: exit code {code}\n{done.output[-2000:]}\n{done.exception!r}")
        return done.output

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
        week.promise,
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
