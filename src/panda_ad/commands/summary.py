# SPDX-License-Identifier: Apache-2.0
"""`panda-ad summary`: the figures of what was made here last, what the gate said of it, and what is in place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from panda_ad.errors import UserError
from panda_ad.evaluation.intervals import Intervals, read_intervals
from panda_ad.params import Params
from panda_ad.params_file import load_params
from panda_ad.system.paths import BUILD

_HEADER = (
    "category", "image AUROC [95 %]", "caught", "false alarms", "pixel AUROC", "AU-PRO", "threshold",
    "registered", "aliases",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What was made here of a category.

    Attributes
    ----------
    metrics, intervals : of its evaluation.  model, version : as registered.  aliases : that point at this version.
    lines : what the gate said, what is in place, and what to be careful of.
    staged : whether @staging is set, on this version or another.
    """

    category: str
    metrics: Mapping[str, float]
    intervals: Intervals
    model: str
    version: str
    aliases: Sequence[str]
    lines: Sequence[str]
    staged: bool


def summary(params: Params | None = None) -> str:
    """Return the last run's figures as text; UserError if there are none yet."""
    params = params or load_params()
    trained = [found for category in params.categories if (found := _trained(params, category)) is not None]
    if not trained:
        path = BUILD / "publish" / f"{params.categories[0]}.json"
        raise UserError(f"{path}: not there yet; run `make run`")
    said: dict[str, list[str]] = {}  # what holds for several categories is said once
    for t in trained:
        for line in t.lines:
            said.setdefault(line, []).append(t.category)
    never = sorted(set(params.categories) - {t.category for t in trained}, key=params.categories.index)
    return "\n".join(
        [
            "",
            *columns([_HEADER, *(_row(t) for t in trained)]),
            *(f"  {category}: never trained here; `panda-ad run` does it" for category in never),
            "",
            "gate",
            *(f"  {', '.join(categories)}: {line}" for line, categories in said.items()),
            "",
            "last run of each stage",
            *columns(_stages(params)),
            "",
            "where to look",
            *_places(trained),
        ]
    )


def _trained(params: Params, category: str) -> Trained | None:
    """Return what build/ and the registry have of a category; None if it was never published from here."""
    from panda_ad.registry.cautions import cautions, promise
    from panda_ad.registry.connection import connect, mlflow_errors
    from panda_ad.registry.overview import overview
    from panda_ad.registry.versions import registered

    folder = BUILD / "evaluation" / category
    metrics, published = _read(folder / "metrics.json"), _read(BUILD / "publish" / f"{category}.json")
    if not metrics or not published:
        return None
    intervals, version = read_intervals(folder), str(published["version"])
    with mlflow_errors():
        client = connect()
        model = registered(client, published["model_name"])
        lines = overview(client, model, category, version)
    ends = {f"{k}_{end}": v for k, pair in intervals.items() for end, v in zip(("low", "high"), pair, strict=True)}
    lines.append(f"promise: {promise({**metrics, **ends}, params.verdict.false_alarm_rate)}")
    lines += [f"caution: {text}" for text in cautions({**metrics, **ends}, params.verdict.false_alarm_rate)]
    aliases = [f"@{a}" for a, v in sorted(model.aliases.items()) if str(v) == version]
    return Trained(category, metrics, intervals, model.name, version, aliases, lines, "staging" in model.aliases)


def _read(path: Any) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _row(t: Trained) -> tuple[str, ...]:
    """Return a category's line of the table."""
    ends = t.intervals.get("image_auroc")
    auroc = _figure(t.metrics, "image_auroc") + ("" if ends is None else f" [{ends[0]:.4f}, {ends[1]:.4f}]")
    shares = [f"{100 * t.metrics[k]:.0f} %" if k in t.metrics else "-" for k in ("recall", "false_alarm_rate")]
    pixels = [_figure(t.metrics, k) for k in ("pixel_auroc", "au_pro")]
    threshold = f"{t.metrics['threshold']:.4g}" if "threshold" in t.metrics else "-"
    return (t.category, auroc, *shares, *pixels, threshold, f"{t.model} v{t.version}", ", ".join(t.aliases))


def _figure(metrics: Mapping[str, float], name: str) -> str:
    return f"{metrics[name]:.4f}" if name in metrics else "-"


def _stages(params: Params) -> list[tuple[str, ...]]:
    """Return time and memory of each stage's last run, in the order in which they ended."""
    files = sorted((BUILD / "timings").glob("*.json"), key=lambda f: f.stat().st_mtime)
    rows: list[tuple[str, ...]] = [("stage", "seconds", "peak MB")]
    for t in map(_read, files):
        if t["category"] in (None, *params.categories):
            name = t["stage"] if t["category"] is None else f"{t['stage']}@{t['category']}"
            rows.append((name, f"{t['seconds']:.1f}", f"{t['peak_mb']:.0f}"))
    return rows


def _places(trained: Sequence[Trained]) -> list[str]:
    """Return where reports, servers and the registry are, and how to score with what there is."""
    from panda_ad.registry.connection import tracking_uri, without_credentials

    staged = next((t for t in trained if t.staged), None)
    model = (
        f"--bundle build/bundle/{trained[0].category}" if staged is None else f"--model models:/{staged.model}@staging"
    )
    return [
        *(f"  report     build/evaluation/{t.category}/report.html" for t in trained),
        "  UIs        make ui   (MLflow http://127.0.0.1:5000, Prefect http://127.0.0.1:4200/deployments)",
        f"  registry   {without_credentials(tracking_uri())}",
        f"  score      .venv/bin/panda-ad score FOLDER {model} --heatmaps overlays",
    ]


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return rows of text, each column as wide as its widest entry."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
