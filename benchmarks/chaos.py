# SPDX-License-Identifier: Apache-2.0
"""Kill commands at random moments, run them again, and compare what they leave with an undisturbed run's.

    python benchmarks/chaos.py [--kills 200] [--seed 0] [--commands publish score]

In a temporary project with this repository's pipeline and one tiny category: each stage, publish, promote, score with
the verdict log, and ingest. A command is killed (SIGKILL, with its process group) at a moment drawn from its
undisturbed duration, and run again to its end.

- torn: between kill and second run a file was neither as before nor as after, or a registered version lacked files.
- failed: the second run did not succeed.
- lost, wrong: after the second run something was missing, or differed from the undisturbed run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
NAME = "panda-chaos-nut"
BIN = Path(sys.executable).parent
STAGES = ("validate", "extract", "adapt", "index", "evaluate", "publish")
COMMANDS: dict[str, list[str]] = {
    **{
        s: ["python", "-m", f"panda_ad.stages.{s}", *(["nut"] if s not in ("validate", "extract") else [])]
        for s in STAGES
    },
    "promote": ["panda-ad", "promote"],
    "score": ["panda-ad", "score", "../inbox", "--model", f"models:/{NAME}@staging", "--out", "verdicts.csv", "--log"],
    "ingest": ["panda-ad", "ingest", "../new", "--category", "nut"],
}
"""In the order in which an undisturbed run has them."""

WATCHED = ("build", "data", "data.dvc", "quarantine", "verdicts.csv", "monitoring")
# what names a time or an id of MLflow, or is a cache of its own
TIMED = re.compile(r"data_docs/|report\.html$|timings/|validation/report\.json$|publish/|decisions/|\.gitignore$")

REGISTRY = f"""
import json
from panda_ad.registry.audit import history
from panda_ad.registry.connection import connect
from panda_ad.registry.run_inputs import bundle_hash
from panda_ad.registry.versions import bundle_of
client, found = connect(), {{}}
for version in client.search_model_versions("name='{NAME}'"):
    run = client.get_run(version.run_id)
    whole = bundle_hash(bundle_of(client, version)) == version.tags["panda.bundle"]
    metrics = {{k: v for k, v in run.data.metrics.items() if "seconds/" not in k and "peak_mb/" not in k}}
    found[f"version {{version.version}}"] = [version.tags["panda.bundle"], whole, run.info.status, metrics]
if found:
    model = client.get_registered_model("{NAME}")
    found["aliases"] = {{k: str(v) for k, v in model.aliases.items()}}
    found["moves"] = [[m["action"], m["alias"], str(m["from"]), str(m["to"])] for m in history(model)]
print(json.dumps(found))
"""

State = dict[str, str]


@dataclass(frozen=True)
class Undisturbed:
    """What a command found and left, and how long it took."""

    before: State
    after: State
    seconds: float


def pictures(folder: Path, count: int, seed: int, hole: bool = False) -> None:
    """Write `count` images of 48 x 48 pixels of noise, with a bright spot where they have a hole."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = rng.integers(90, 130, (48, 48, 3), np.uint8)
        if hole:
            pixels[16:28, 16:28] = 250
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")


def make_project(project: Path) -> None:
    """Make a DVC project with this repository's pipeline and the category `nut`.

    Images to score and to add lie beside it.
    """
    category = project / "data/nut"
    pictures(category / "train/good", 24, seed=0)
    pictures(category / "test/good", 6, seed=1)
    pictures(category / "test/hole", 6, seed=2, hole=True)
    pictures(project.parent / "inbox", 12, seed=3)
    pictures(project.parent / "new", 8, seed=4)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params |= {"dataset": "chaos", "categories": ["nut"]}
    params["backbone"]["input_size"], params["adapt"]["epochs"], params["evaluate"]["bootstrap"] = 32, 1, 20
    params["gate"] |= {"min_image_auroc": None, "min_pixel_auroc": None, "false_alarm_risk": None}
    (project / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    for name in ("dvc.yaml", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(ROOT / "src", project / "src", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-c", "user.name=chaos", "-c", "user.email=chaos@localhost"]
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], ["dvc", "add", "-q", "data"], [*git, "add", "-A"]):
        call(command, project)
    call([*git, "commit", "-q", "-m", "Chaos"], project)


def environment(project: Path) -> dict[str, str]:
    """One thread, this project's code, and none of the caller's servers."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PREFECT_", "PANDA_", "DVC_"))}
    path = os.pathsep.join([str(BIN), kept.get("PATH", os.defpath)])
    own = {"PATH": path, "PYTHONPATH": str(project / "src"), "DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "true"}
    return {**kept, **own, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def call(command: Sequence[str], project: Path) -> str:
    """Run a command to its end and return what it printed; RuntimeError where it fails."""
    done = subprocess.run(command, cwd=project, env=environment(project), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def killed(command: Sequence[str], project: Path, seconds: float) -> bool:
    """Start a command and kill it with its process group after `seconds`; return whether it was still at work."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        command, cwd=project, env=environment(project), stdout=quiet, stderr=quiet, start_new_session=True
    )
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def state(project: Path, registry: bool) -> State:
    """Return what a user would find: files with their content, verdicts in the log, and what is registered."""
    found: State = {}
    for path in sorted(p for top in WATCHED for p in [project / top, *(project / top).rglob("*")] if p.is_file()):
        name = path.relative_to(project).as_posix()
        if path.name.endswith(".tmp") or any(part.endswith(".tmp") for part in path.parts) or TIMED.search(name):
            continue
        if path.suffix == ".parquet":
            for row in pq.read_table(path, columns=["path", "version", "score", "decision"]).to_pylist():
                key = f"verdict on {row.pop('path')}"
                found[key] = found.get(key, "") + json.dumps(row)  # a second one makes it differ
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    if registry:
        held = json.loads(call([sys.executable, "-c", REGISTRY], project).splitlines()[-1])
        found |= {f"registry: {key}": json.dumps(value, sort_keys=True) for key, value in held.items()}
    return found


def run_undisturbed(project: Path, snapshots: Path, last: str) -> dict[str, Undisturbed]:
    """Run the commands in order up to the last one wanted; `snapshots` gets the project as each found it."""
    known: dict[str, Undisturbed] = {}
    for name in list(COMMANDS)[: list(COMMANDS).index(last) + 1]:
        shutil.copytree(project, snapshots / name, symlinks=True)
        registry = name in ("publish", "promote")
        before, start = state(project, registry), time.monotonic()
        call(COMMANDS[name], project)
        known[name] = Undisturbed(before, state(project, registry), time.monotonic() - start)
    return known


def torn(now: State, known: Undisturbed) -> list[str]:
    """Return what is neither as before the command nor as after it."""
    bad = [
        k for k, v in now.items() if v not in (known.before.get(k), known.after.get(k)) and not k.startswith("registry")
    ]
    versions = {k: json.loads(v) for k, v in now.items() if k.startswith("registry: version")}
    return bad + [f"{k}: files missing" for k, (_, whole, *_) in versions.items() if not whole]


def trial(name: str, project: Path, snapshot: Path, known: Undisturbed, moment: float) -> Mapping[str, list[str]]:
    """Kill a command at a moment, run it again; return what was found wrong, by kind; 'killed' where it was at work."""
    shutil.rmtree(project)
    shutil.copytree(snapshot, project, symlinks=True)
    registry = name in ("publish", "promote")
    found: dict[str, list[str]] = {"killed": ["yes"]} if killed(COMMANDS[name], project, moment) else {}
    try:
        now = state(project, registry)
        if now == known.after:  # it was about to end: `score --log` would now rightly find nothing left to score
            return found
        found["torn"] = torn(now, known)
        call(COMMANDS[name], project)
    except Exception as e:  # a file that cannot be read is a finding too
        return found | {"failed": [str(e)]}
    after = state(project, registry)
    found["lost"] = [key for key in known.after if key not in after]
    found["wrong"] = [key for key, value in after.items() if value != known.after.get(key)]
    return found


def chaos(
    kills: int, seed: int, folder: Path, commands: Sequence[str] = tuple(COMMANDS)
) -> list[tuple[str, Counter[str]]]:
    """Kill each of `commands` in turn until there were so many trials.

    Return the counts of each, and print a line for every trial.
    """
    project, snapshots, rng = folder / "project", folder / "snapshots", random.Random(seed)
    make_project(project)
    known = run_undisturbed(project, snapshots, max(commands, key=list(COMMANDS).index))
    counts = {name: Counter[str]() for name in commands}
    for number in range(kills):
        name = commands[number % len(commands)]
        moment = rng.uniform(0.2, 1.0) * known[name].seconds
        found = trial(name, project, snapshots / name, known[name], moment)
        counts[name].update(trials=1, **{kind: bool(items) for kind, items in found.items()})
        bad = [f"{kind}: {'; '.join(items)}" for kind, items in found.items() if items and kind != "killed"]
        end = f"killed after {moment:.2f} s" if "killed" in found else "at its end before the kill"
        print(f"{number + 1} of {kills}, {name}, {end}: {'. '.join(bad) or 'as undisturbed'}", flush=True)
    return list(counts.items())


def main() -> int:
    """Print a table; exit status 1 where anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="panda-chaos-") as folder:
        counts = chaos(options.kills, options.seed, Path(folder), options.commands)
    kinds = ("trials", "killed", "torn", "failed", "lost", "wrong")
    for name, row in [*counts, ("all", sum((c for _, c in counts), Counter()))]:
        print(f"{name:10}" + "".join(f"{kind} {row[kind]:<8}" for kind in kinds))
    return int(any(row[kind] for _, row in counts for kind in kinds[2:]))


if __name__ == "__main__":
    sys.exit(main())
