"""`panda-ad run`: data, pipeline, promotion, summary. What has not changed is not done again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from panda_ad.data.links import refuse_links
from panda_ad.errors import GateRefused, UserError
from panda_ad.evaluation.intervals import read_intervals
from panda_ad.params import Params, load_params
from panda_ad.system.lock import repository_lock
from panda_ad.system.paths import BUILD
from panda_ad.system.processes import Group, child_environment


def run() -> None:
    """Run all; GateRefused at the end where a category was not promoted, UserError where a stage failed."""
    params = load_params()
    with repository_lock("panda-ad run"):
        root = Path(params.data.root)
        if Path("data.dvc").exists() and params.data.root == "data" and not root.exists():
            fetch_images("data.dvc")
        if root.is_dir():
            refuse_links(root)
        dvc("repro")
        from panda_ad.registry.promote import promote

        refused = None
        try:
            promote(params.categories)
        except GateRefused as e:
            refused = e
    print(summary(params))
    if refused is not None:
        raise refused


def fetch_images(tracked: str) -> None:
    """Get the images that a .dvc file records from the remote. UserError where no remote has them, which DVC says nothing of."""
    try:
        dvc("pull", "--quiet", tracked)
    except UserError:
        listed = subprocess.run(
            [sys.executable, "-m", "dvc", "remote", "list"],
            env=child_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        remotes = ", ".join(
            " (".join(line.split("\t")[:2]) + ")" for line in listed.stdout.splitlines() if line.strip()
        )
        where = f"the remote, {remotes}, lacks them" if remotes else "no remote is set (`dvc remote add -d NAME PLACE`)"
        raise UserError(
            f"{tracked}: its images are not here and could not be fetched: {where}, or it does not answer. Where they are, run "
            f"`dvc push {tracked}`; or copy them to {tracked.removesuffix('.dvc')}/ and run `dvc add {tracked.removesuffix('.dvc')}`"
        ) from None


@contextmanager
def dvc_meanwhile(
    *arguments: str, folder: Path | str | None = None, extra: Mapping[str, str] | None = None
) -> Iterator[None]:
    """`dvc` as a child beside what the block does; the block's end waits for it, an exception in the block ends it."""
    with Group([sys.executable, "-m", "dvc", *arguments], cwd=folder, env=child_environment(extra)) as child:
        yield
        for line in child.lines():
            print(line, flush=True)
        _check(arguments, child.wait())


def dvc(*arguments: str, folder: Path | str | None = None, extra: Mapping[str, str] | None = None) -> None:
    """Run DVC as a child that ends with this process; UserError where it fails (its own output has said why).

    Parameters
    ----------
    folder : where it runs; None: here.  extra : environment variables beside this process's.
    """
    if sys.stdout.isatty():  # progress bars draw on the terminal itself
        command = [sys.executable, "-m", "dvc", *arguments]
        _check(arguments, subprocess.run(command, cwd=folder, env=child_environment(extra), check=False).returncode)
    else:
        with dvc_meanwhile(*arguments, folder=folder, extra=extra):
            pass


def _check(arguments: Sequence[str], status: int) -> None:
    if status != 0:
        raise UserError(
            f"`dvc {' '.join(arguments)}` failed; what it printed above says why, and running again resumes there"
        )


def summary(params: Params | None = None) -> str:
    """The last run's figures as text; UserError where there are none yet."""
    from panda_ad.registry.change import model_name
    from panda_ad.registry.connection import connect, mlflow_errors, tracking_uri, without_credentials

    params = params or load_params()
    with mlflow_errors():
        client = connect()
        models = {c: client.get_registered_model(model_name(params.dataset, c)) for c in params.categories}
    table = [
        (
            "category",
            "image AUROC [95 %]",
            "caught",
            "false alarms",
            "pixel AUROC",
            "AU-PRO",
            "threshold",
            "registered",
            "aliases",
        )
    ]
    gate = []
    for category in params.categories:
        try:
            m = json.loads((BUILD / "evaluation" / category / "metrics.json").read_text())
            published = json.loads((BUILD / "publish" / f"{category}.json").read_text())
        except FileNotFoundError as e:
            raise UserError(f"{e.filename}: not there yet; run `make run`") from None
        ends = read_intervals(BUILD / "evaluation" / category).get("image_auroc")
        auroc = f"{m['image_auroc']:.4f}" + ("" if ends is None else f" [{ends[0]:.4f}, {ends[1]:.4f}]")
        pixel, pro = (f"{m[k]:.4f}" if k in m else "-" for k in ("pixel_auroc", "au_pro"))
        version = str(published["version"])
        aliases = ", ".join(f"@{a}" for a, v in sorted(models[category].aliases.items()) if str(v) == version)
        caught, alarms = f"{100 * m['recall']:.0f} %", f"{100 * m['false_alarm_rate']:.0f} %"
        table.append(
            (
                category,
                auroc,
                caught,
                alarms,
                pixel,
                pro,
                f"{m['threshold']:.4g}",
                f"{models[category].name} v{version}",
                aliases,
            )
        )
        decision = BUILD / "decisions" / f"{category}.json"
        if decision.exists():
            d = json.loads(decision.read_text())
            gate.append(f"  {category}: version {d['version']} {d['outcome']} ({d['reason']})")
    timings = [
        json.loads(f.read_text()) for f in sorted((BUILD / "timings").glob("*.json"), key=lambda f: f.stat().st_mtime)
    ]
    stages = [("stage", "seconds", "peak MB")]
    for t in timings:
        if t["category"] in (None, *params.categories):
            name = t["stage"] if t["category"] is None else f"{t['stage']}@{t['category']}"
            stages.append((name, f"{t['seconds']:.1f}", f"{t['peak_mb']:.0f}"))
    where = [
        *(f"  report     build/evaluation/{category}/report.html" for category in params.categories),
        "  UIs        make ui   (MLflow http://127.0.0.1:5000, Prefect http://127.0.0.1:4200/deployments)",
        f"  registry   {without_credentials(tracking_uri())}",
        f"  score      .venv/bin/panda-ad score FOLDER --model models:/{models[params.categories[0]].name}@staging --heatmaps overlays",
    ]
    return "\n".join(
        [
            "",
            *_columns(table),
            "",
            "gate",
            *gate,
            "",
            "last run of each stage",
            *_columns(stages),
            "",
            "where to look",
            *where,
        ]
    )


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of text, each column as wide as its widest entry."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
