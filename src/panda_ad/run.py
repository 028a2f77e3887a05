"""`panda-ad run`: data, pipeline, promotion, summary. What has not changed is not done again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from panda_ad.errors import GateRefused, UserError
from panda_ad.lock import repository_lock
from panda_ad.params import Params, load_params
from panda_ad.processes import Group

BUILD = Path("build")
DECISIONS = BUILD / "decisions"


def run() -> None:
    """Run all; GateRefused at the end where a category was not promoted, UserError where a stage failed."""
    params = load_params()
    with repository_lock("panda-ad run"):
        if Path("data.dvc").exists() and params.data.root == "data" and not Path("data").exists():
            dvc("pull", "--quiet", "data.dvc")
        dvc("repro")
        from panda_ad.registry.promote import promote

        refusals = []
        for category in params.categories:
            try:
                promote([category])
            except GateRefused as e:
                refusals.append(str(e))
    print(summary(params))
    if refusals:
        raise GateRefused("; ".join(refusals))


def dvc(*arguments: str) -> None:
    """Run DVC as a child that ends with this process; UserError where it fails (its own output has said why)."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}", "DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "dvc", *arguments]
    if sys.stdout.isatty():  # progress bars draw on the terminal itself
        status = subprocess.run(command, env=env, check=False).returncode
    else:
        with Group(command, env=env) as child:
            for line in child.lines():
                print(line, flush=True)
            status = child.wait()
    if status != 0:
        raise UserError(f"`dvc {' '.join(arguments)}` failed; what it printed above says why, and running again resumes there")


def summary(params: Params | None = None) -> str:
    """The last run's figures as text; UserError where there are none yet."""
    params = params or load_params()
    lines = [f"{'category':14} {'image AUROC [95 %]':24} {'pixel AUROC':>11} {'AU-PRO':>7} {'threshold':>10} {'model':34} aliases"]
    for category in params.categories:
        try:
            m = json.loads((BUILD / "evaluation" / category / "metrics.json").read_text())
            version = json.loads((BUILD / "publish" / f"{category}.json").read_text())
        except FileNotFoundError as e:
            raise UserError(f"{e.filename}: not there yet; run `make run`") from None
        auroc = f"{m['image_auroc']:.4f} [{m['image_auroc_low']:.4f}, {m['image_auroc_high']:.4f}]"
        pixel, pro = (f"{m[k]:.4f}" if k in m else "-" for k in ("pixel_auroc", "au_pro"))
        name = f"{version['model_name']} v{version['version']}"
        lines.append(f"{category:14} {auroc:24} {pixel:>11} {pro:>7} {m['threshold']:>10.4g} {name:34} {', '.join(aliases(version['model_name'], version['version']))}")
    lines += ["", f"{'stage':24} {'seconds':>8} {'peak MB':>8}"]
    for file in sorted((BUILD / "timings").glob("*.json"), key=lambda f: f.stat().st_mtime):
        t = json.loads(file.read_text())
        lines.append(f"{t['stage'] + (f'@{t['category']}' if t['category'] else ''):24} {t['seconds']:>8.1f} {t['peak_mb']:>8}")
    lines += [""]
    return "\n".join(lines)
