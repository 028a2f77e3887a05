# SPDX-License-Identifier: Apache-2.0
"""`panda-ad audit`: for each version in use, the false-alarm rate that was promised and the one that good parts met."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panda_ad.errors import UserError
from panda_ad.monitor.log import LOG
from panda_ad.monitor.promise import Realized, Verdicts, confirmed_verdicts, realized
from panda_ad.monitor.promise_plot import plot
from panda_ad.params import Params
from panda_ad.registry.load import Model, load_model
from panda_ad.registry.monitoring import record_promise
from panda_ad.registry.names import model_name
from panda_ad.scoring.calibration import Threshold
from panda_ad.system.files import write_json, write_text

REPORTS = Path("monitoring/audit")
ALIASES = ("staging", "champion")
BROKEN = 5
"""Exit code of `panda-ad audit` where a promise is broken."""


@dataclass(frozen=True)
class Audit:
    """What became of a version's promise.

    Attributes
    ----------
    aliases : that point at it.  promised : its threshold, with rate and interval of the calibration.
    verdicts : of this version on parts that were confirmed good.  found : their rate of alarms.
    """

    category: str
    model: str
    version: str
    aliases: tuple[str, ...]
    promised: Threshold
    verdicts: Verdicts
    found: Realized

    @property
    def broken(self) -> bool:
        """Whether the realized rate is above the promised one, at the audit's confidence."""
        return self.found.at_least > self.promised.rate

    @property
    def verdict(self) -> str:
        """In words."""
        if not self.found.images:
            return "no good part confirmed yet"
        if self.broken:
            beyond = self.found.at_least > self.promised.interval[1]
            why = "beyond what its calibration allows for" if beyond else "within its calibration's own error"
            return f"BROKEN: at least {_percent(self.found.at_least)}, {why}"
        return "kept so far"

    def row(self) -> tuple[str, ...]:
        """Return its line of the table."""
        low, high = self.promised.interval
        f = self.found
        met = f"{_percent(f.rate)} [{_percent(f.interval[0])}, {_percent(f.interval[1])}]" if f.images else "-"
        return (
            f"{self.model} v{self.version}", ", ".join(f"@{alias}" for alias in self.aliases),
            _percent(self.promised.rate), f"[{_percent(low)}, {_percent(high)}]",
            f"{f.alarms} of {f.images}", met, self.verdict,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        f = self.found
        return {
            "model": self.model, "version": self.version, "aliases": list(self.aliases),
            "promised": self.promised.rate, "promised_interval": list(self.promised.interval),
            "alarms": f.alarms, "images": f.images, "interval": list(f.interval), "at_least": f.at_least,
            "broken": self.broken, "verdict": self.verdict,
            "sessions": [{"session": name, "alarms": int(v.alarms.sum()), "images": len(v)}
                         for name, v in self.verdicts.by_session()],
        }  # fmt: skip


HEADER = ("version", "at", "promised", "calibration's interval", "alarms on good parts", "realized [95 %]", "promise")


def audit_version(
    category: str, model: Model, aliases: tuple[str, ...], verdicts: Verdicts, confidence: float
) -> Audit:
    """Return the audit of a version from its verdicts on confirmed good parts."""
    promised = model.detector.threshold()
    return Audit(category, model.name, model.version, aliases, promised, verdicts, realized(verdicts, confidence))


def models_in_use(params: Params, category: str) -> dict[str, tuple[Model, tuple[str, ...]]]:
    """Return the versions at @staging and @champion, by number, with their aliases; UserError if there is none."""
    found: dict[str, tuple[Model, tuple[str, ...]]] = {}
    problem = None
    for alias in ALIASES:
        try:
            model = load_model(f"models:/{model_name(params.dataset, category)}@{alias}", None)
        except UserError as e:
            problem = problem or e
            continue
        found[model.version] = model, (*found.get(model.version, (model, ()))[1], alias)
    if not found and problem is not None:
        raise problem
    return found


def audit_category(
    params: Params, category: str, good: Mapping[str, str], log: Path = LOG, reports: Path = REPORTS
) -> tuple[list[Audit], Verdicts]:
    """Audit the versions in use of a category, write plot, table and figures, and tell the registry.

    Parameters
    ----------
    good : sha256 of the images of good parts -> session, or ''.

    Returns
    -------
    The audits, and the first verdict on each part, of whichever version was in place.
    """
    used, confidence = models_in_use(params, category), params.evaluate.confidence
    name = model_name(params.dataset, category)
    first, own = confirmed_verdicts(category, name, good, {v: m.detector.seen for v, (m, _) in used.items()}, log)
    audits = [audit_version(category, m, aliases, own[v], confidence) for v, (m, aliases) in used.items()]
    newest = audits[0]
    if len(first):
        title = f"{category}: false alarms promised and met, {len(first)} good parts"
        write_text(
            reports / f"{category}.svg", plot(title, first, newest.promised.rate, newest.promised.interval, confidence)
        )
    write_text(reports / f"{category}.csv", _csv(sessions_table(first, newest.promised.rate, confidence)))
    write_json(reports / f"{category}.json", [a.to_dict() for a in audits])
    for a in audits:
        record_promise(a.model, a.version, a.found.alarms, a.found.images, a.verdict)
    return audits, first


def sessions_table(verdicts: Verdicts, rate: float, confidence: float) -> list[tuple[str, ...]]:
    """Return a row per session, with a header: what the line saw at the time."""
    rows: list[tuple[str, ...]] = [
        ("session", "first logged", "version", "good parts", "alarms", "rate", "interval", "above the promise")
    ]
    for name, part in verdicts.by_session():
        r = realized(part, confidence)
        versions = ", ".join(f"v{v}" for v in dict.fromkeys(part.versions.tolist()))
        interval = f"[{_percent(r.interval[0])}, {_percent(r.interval[1])}]"
        said = "yes" if r.at_least > rate else "no"
        since = f"{part.times[0]}"[:16].replace("T", " ")
        rows.append((name, since, versions, str(r.images), str(r.alarms), _percent(r.rate), interval, said))
    return rows


def _csv(rows: list[tuple[str, ...]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
