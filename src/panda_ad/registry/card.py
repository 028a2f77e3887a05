"""The model card: what a version is, written from facts at hand only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from panda_ad.registry.change import plain


def model_card(
    *,
    name: str,
    bundle: Mapping[str, Any],
    metrics: Mapping[str, float],
    intervals: Mapping[str, Sequence[float]],
    counts: Mapping[str, int],
    tags: Mapping[str, str],
    size_mb: float,
    confidence: float,
) -> str:
    """Markdown for the version's page.

    Parameters
    ----------
    bundle : content of bundle.json.  metrics, intervals : of metrics.json and intervals.json.
    counts : images per split and kind, e.g. {'train': 96, 'calibration': 24, 'test good': 30, 'test crack': 12}.
    tags : the run's: commit, data hash, change.
    """
    facts = bundle.get("provenance", {})
    rate = bundle.get("false_alarm_rate", 0.0)
    size = " x ".join(map(str, bundle.get("input_size", [])))
    calibration = counts.get("calibration", 0)
    lines = [
        f"# {name}",
        "",
        f"Tells good from defective images of **{bundle.get('category', '')}** (data set {bundle.get('dataset', '')}), "
        "and where they differ from good ones. Trained on good images only (PANDA, Reiss et al. 2021).",
        "",
        "## Figures on the test set",
        "",
    ]
    for key, title in _FIGURES.items():
        if key in metrics:
            ends = intervals.get(key)
            interval = "" if ends is None else f" ({_percent(confidence)} interval {ends[0]:.4f} to {ends[1]:.4f})"
            lines.append(f"- {title} **{metrics[key]:.4f}**{interval}")
    lines += [
        "",
        f"Curves, pictures with heat maps and what each threshold costs: `{plain(str(bundle.get('category', '')))}/report.html` of the run.",
        "",
        "## Data",
        "",
        f"Training: {counts.get('train', 0)} good images, {calibration} more held out for the threshold. Test: "
        + ", ".join(f"{n} {kind.removeprefix('test ')}" for kind, n in counts.items() if kind.startswith("test "))
        + f". Data hash `{tags.get('panda.data', '')[:16]}`.",
        "",
        "## Model",
        "",
        f"Backbone {facts.get('backbone', bundle.get('architecture', ''))} (weights {facts.get('weights', '?')}), adaptation "
        f"`{bundle.get('method', '?')}`, snapshots: {len(bundle.get('steps', []))}, k = {bundle.get('k', '?')}, input {size} pixels, "
        f"{size_mb:.1f} MB.",
        "",
        "## Threshold",
        "",
        f"Score > {metrics.get('threshold', float('nan')):.6g} counts as a defect: chosen on {calibration} good images held out of "
        f"training so that at most {_percent(rate)} of good parts raise an alarm. Test images played no part in it.",
        "",
        "## Limits",
        "",
        *_limits(metrics, calibration, rate, facts),
        "",
        "## Intended use",
        "",
        "Visual inspection of the kind of part and the camera set-up that the training images show, as an aid with a person or a second "
        "check behind it. Not for other parts or cameras without new good images, and not as the only safeguard where a missed defect "
        "can hurt someone.",
        "",
        "## Reproduce",
        "",
        f"Commit `{tags.get('mlflow.source.git.commit', 'none')}`"
        + (" **with uncommitted changes**" if tags.get("panda.git_dirty") == "true" else "")
        + f", change `{tags.get('panda.change', '')[:16]}`:",
        "",
        f"    git checkout {tags.get('mlflow.source.git.commit', 'COMMIT')}",
        "    dvc pull data.dvc",
        f"    dvc repro evaluate@{bundle.get('category', '')}",
        "",
        f"or, with every figure compared, `panda-ad reproduce {name} VERSION`.",
    ]
    return "\n".join(lines) + "\n"


_FIGURES = {
    "image_auroc": "image AUROC",
    "average_precision": "average precision",
    "fpr_at_95_tpr": "false alarms where 95 % of defects are found",
    "pixel_auroc": "pixel AUROC",
    "au_pro": "AU-PRO (to 30 % false positives)",
    "pixel_f1": "best pixel F1",
    "recall": "defects found at the threshold",
    "false_alarm_rate": "false alarms at the threshold",
}


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _limits(metrics: Mapping[str, float], calibration: int, rate: float, facts: Mapping[str, Any]) -> list[str]:
    limits = [
        "- Knows only what the good training images show: a new light, lens or material looks like a defect to it."
    ]
    if rate and calibration + 1 < 1 / rate:
        limits.append(
            f"- {calibration} calibration images are too few to hold {_percent(rate)} false alarms; it takes {round(1 / rate) - 1}."
        )
    if "recall" in metrics and metrics["recall"] < 1:
        limits.append(f"- At its threshold it misses {_percent(1 - metrics['recall'])} of the test set's defects.")
    if "pixel_auroc" not in metrics:
        limits.append("- Its heat maps were not measured: no masks in the test set, or no localizer.")
    if facts.get("collapsed_at") is not None:
        limits.append(f"- Features collapsed at step {facts['collapsed_at']} of the adaptation.")
    return limits
