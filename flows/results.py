# SPDX-License-Identifier: Apache-2.0
"""What a flow run leaves in the Prefect UI: a table of figures per category, a summary with links."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.states import State

from panda_ad.evaluation.intervals import Intervals, read_intervals
from panda_ad.registry.connection import without_credentials


@dataclass(frozen=True)
class GateResult:
    """What the gate decided about a category.

    Attributes
    ----------
    decision : str
        promoted, unchanged, held back, refused, failed, or not asked (switched off, or no new version).
    reason : str
        One line.
    """

    category: str
    decision: str
    reason: str

    @classmethod
    def of(cls, category: str, state: State | None) -> GateResult:
        """Return the result of a promotion's task; None: there was none.

        The message of a decision repeats category, version and outcome, which stand beside it. So its reason alone is
        taken.
        """
        if state is None:
            return cls(category, "not asked", "promotion was switched off for this run")
        decision = str(state.name).lower() if state.is_final() else "not asked"
        recorded = _decision(category)
        if recorded.get("outcome") == decision:
            return cls(category, decision, str(recorded["reason"]))
        return cls(category, decision, " ".join(str(state.message or "").split()))

    def in_short(self) -> str:
        """Return the reason as a table's cell has room for it: of a refusal the names of the rules that failed."""
        rules = _decision(self.category).get("rules", []) if self.decision == "refused" else []
        failed = [rule["name"] for rule in rules if not rule["passed"]]
        return f"{len(failed)} of {len(rules)} rules failed: {', '.join(failed)}" if failed else self.reason


def publish_artifacts(gates: Sequence[GateResult], states: Mapping[str, State]) -> None:
    """Create the artifacts of a run.

    `retrain-results` (table: figures per category), `retrain-summary` (Markdown), and per category `gate-<category>`
    (table: every rule with its figure) and `mlflow-<category>` (link). A category with a failed stage has no figures:
    those on disk are of an earlier run.

    Parameters
    ----------
    states : the final state per stage, e.g. of `adapt@fabric`.
    """
    failed = {name.partition("@")[2] for name, state in states.items() if not state.is_completed()}
    finished = [gate.category for gate in gates if gate.category not in failed]
    rows = [_row(gate, gate.category in finished) for gate in gates]
    short = [row | {"why": gate.in_short()} for row, gate in zip(rows, gates, strict=True)]
    links = {category: link for category in sorted(finished) if (link := _mlflow_link(category))}
    create_table_artifact(short, key="retrain-results", description="Figures per category, and what the gate decided.")
    create_markdown_artifact(_summary(rows, states, links), key="retrain-summary", description="The run in short.")
    for category, link in links.items():
        create_link_artifact(
            link,
            link_text=f"MLflow: registered version of {category}",
            key=f"mlflow-{artifact_key(category)}",
            description="Card, figures and report.",
        )
    for gate in gates:
        if gate.decision in ("promoted", "refused"):
            rules = _decision(gate.category).get("rules", [])
            table = [
                {"rule": r["name"], "passed": "yes" if r["passed"] else "NO", "figures": r["text"], **_rounded(r)}
                for r in rules
            ]
            create_table_artifact(
                table, key=f"gate-{artifact_key(gate.category)}", description=f"{gate.category}: {gate.in_short()}"
            )


def _summary(rows: Sequence[Mapping[str, Any]], states: Mapping[str, State], links: Mapping[str, str]) -> str:
    """Return categories, stages and links of a run, as Markdown."""
    lines = ["| category | image AUROC | gate | why |", "| --- | --- | --- | --- |"]
    lines += [f"| {r['category']} | {r['image AUROC']} | **{r['gate']}** | {cell(r['why'])} |" for r in rows]
    lines += ["", "| stage | state | message |", "| --- | --- | --- |"]
    lines += [f"| {name} | {state.name} | {cell(str(state.message or ''))} |" for name, state in states.items()]
    lines += ["", *(f"- [MLflow: {c}'s registered version and its run]({link})" for c, link in links.items())]
    return "\n".join(lines)


def _row(gate: GateResult, finished: bool) -> dict[str, Any]:
    evaluation = Path("build/evaluation") / gate.category
    metrics = _read(evaluation / "metrics.json") if finished else {}
    intervals = read_intervals(evaluation) if finished else {}
    published = _read(Path("build/publish") / f"{gate.category}.json") if finished else {}
    return {
        "category": gate.category,
        "image AUROC": _figure(metrics, intervals, "image_auroc"),
        "pixel AUROC": _figure(metrics, intervals, "pixel_auroc"),
        "threshold": _figure(metrics, intervals, "threshold"),
        "version": str(published.get("version", "")),
        "gate": gate.decision,
        "why": gate.reason,
    }


def _rounded(rule: Mapping[str, Any]) -> dict[str, Any]:
    """Return value and limit of a rule to four digits; build/decisions and MLflow have them all."""
    return {k: float(f"{rule[k]:.4g}") if isinstance(rule[k], float) else rule[k] for k in ("value", "limit")}


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON file's content, {} where its stage has not run yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _decision(category: str) -> dict[str, Any]:
    """Return the gate's last decision; {} before the first."""
    return _read(Path("build/decisions") / f"{category}.json")


def _figure(metrics: Mapping[str, Any], intervals: Intervals, name: str) -> str:
    """Return e.g. '0.912 [0.880, 0.940]', '' if there is no such figure (no masks, no stage)."""
    value, ends = metrics.get(name), intervals.get(name)
    if not isinstance(value, int | float):
        return ""
    return f"{value:.4g}" if ends is None else f"{value:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]"


def _mlflow_link(category: str) -> str | None:
    """Return the address of the category's registered version without credentials, None before it is published."""
    published = _read(Path("build/publish") / f"{category}.json")
    if "version" not in published:
        return None
    server = without_credentials(os.environ.get("MLFLOW_TRACKING_URI", "")).rstrip("/")
    if not server.startswith(("http://", "https://")):
        server = "http://127.0.0.1:5000"  # where `make ui` shows the local store
    return f"{server}/#/models/{quote(published['model_name'])}/versions/{published['version']}"


def artifact_key(category: str) -> str:
    """Return a category as part of an artifact's key: lower-case letters, digits and dashes."""
    plain = unicodedata.normalize("NFKD", category).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or category.encode("utf-8").hex()


def cell(text: str) -> str:
    """Return text as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")
