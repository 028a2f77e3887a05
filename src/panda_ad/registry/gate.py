# SPDX-License-Identifier: Apache-2.0
"""The gate: rules that a candidate must pass before an alias moves to it.

The rules are pure functions of score tables and parameters. The candidate is compared with the version in place, and
with the champion, on the same test images. Each step may cost a margin, and a fixed point keeps many small steps from
adding up. Each rule is one function, one entry of params.yaml's `gate` (null: off), and one `Rule` in the decision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from panda_ad.evaluation.image_metrics import Metric, auroc, paired_bootstrap, recall_at_budget, youden
from panda_ad.evaluation.rates import lower_bound
from panda_ad.params import GateParams
from panda_ad.registry.cautions import promise
from panda_ad.registry.facts import Evidence, Rule
from panda_ad.scoring.calibration import alarms_chance

_FEW = 10
"""With fewer new good images than this, calibration is checked on all good test images."""


def evaluate_rules(evidence: Evidence, params: GateParams) -> list[Rule]:
    """Return the outcome of every rule that is switched on and has something to look at."""
    return [rule for check in RULES for rule in check(evidence, params)]


def image_auroc_not_worse(e: Evidence, params: GateParams) -> list[Rule]:
    """Image AUROC at most `margin` below the incumbent's, in a share `confidence` of paired resamples."""
    return _not_worse("image AUROC not worse", auroc, e, params.margin, params.confidence)


def recall_not_worse(e: Evidence, params: GateParams) -> list[Rule]:
    """Require the same for recall where the false-alarm budget is spent on the good test images."""
    return _not_worse(
        "recall at the false-alarm budget not worse",
        recall_at_budget(e.budget),
        e,
        params.recall_margin,
        params.confidence,
    )


def decisions_not_worse(e: Evidence, params: GateParams) -> list[Rule]:
    """Require the same for the share of defects caught less the share of good parts alarmed (Youden's J).

    Each version decides at its own threshold. Images with the wrong label spoil the threshold before they spoil the
    order of the scores: defects among the calibration images raise it, and AUROC does not see that.
    """
    return _not_worse(
        "defects caught less false alarms not worse",
        youden,
        e,
        params.decision_margin,
        params.confidence,
        decisions=True,
    )


def image_auroc_near_best(e: Evidence, params: GateParams) -> list[Rule]:
    """Require an image AUROC at most two `margin` below the best of the versions promoted before, without a champion.

    All are measured on the same test images. The limit is two margins, since the best of many is partly luck. It is a
    point estimate: the earlier versions' scores need not be at hand.
    """
    if params.margin is None or e.best_before is None or not e.both_kinds:
        return []
    return _at_least(
        "image AUROC near the best promoted before", auroc(e.labels, e.values), e.best_before - 2 * params.margin
    )


def image_auroc_floor(e: Evidence, params: GateParams) -> list[Rule]:
    """Image AUROC at least `min_image_auroc`."""
    return _at_least("image AUROC floor", auroc(e.labels, e.values), params.min_image_auroc) if e.both_kinds else []


def pixel_auroc_floor(e: Evidence, params: GateParams) -> list[Rule]:
    """Pixel AUROC at least `min_pixel_auroc`, where it was measured."""
    return (
        _at_least("pixel AUROC floor", e.metrics["pixel_auroc"], params.min_pixel_auroc)
        if "pixel_auroc" in e.metrics
        else []
    )


def defect_auroc_floor(e: Evidence, params: GateParams) -> list[Rule]:
    """AUROC of each kind of defect against the good images."""
    good = e.labels == 0
    if not good.any():
        return []
    return _per_defect(
        "AUROC floor of defect",
        e,
        params.min_defect_auroc,
        lambda kind: auroc(e.labels[good | kind], e.values[good | kind]),
    )


def defect_recall_floor(e: Evidence, params: GateParams) -> list[Rule]:
    """Share of each kind of defect above the threshold."""
    return _per_defect(
        "recall floor of defect", e, params.min_defect_recall, lambda kind: float((e.values[kind] > e.threshold).mean())
    )


def must_catch(e: Evidence, params: GateParams) -> list[Rule]:
    """Each listed image scores above the threshold. One that is no test image at all fails: it would guard nothing."""
    rules = []
    paths, hashes = e.scores["path"].to_numpy(), e.scores["sha256"].to_numpy()
    for entry in params.must_catch:
        own = np.flatnonzero((paths == entry) | (hashes == entry))
        if len(own):
            lowest = float(e.values[own].min())
            rules.append(
                _rule(
                    f"must catch {entry}", lowest, e.threshold, e.threshold - lowest, lowest > e.threshold, "score", ">"
                )
            )
        elif entry not in e.test_images:
            text = "not among the test images; give its path in the manifest or its sha256"
            rules.append(Rule(f"must catch {entry}", False, float("nan"), e.threshold, float("nan"), text))
    return rules


def calibration_holds(e: Evidence, params: GateParams) -> list[Rule]:
    """Require no more alarms on the newest good images than chance allows, given so many calibration images.

    If these images are exchangeable with the calibration set, the number of alarms among m of them is beta-binomial:
    the true false-alarm rate of the k-th largest of n calibration scores is Beta(k, n + 1 - k). The candidate is
    refused if so many alarms or more have a probability below `false_alarm_risk`. Where sessions calibrated, the test
    images may be of another one: the number is binomial at the upper end of what a session never seen may bring.
    """
    good = e.labels == 0
    if params.false_alarm_risk is None or not good.any():
        return []
    newest = good & ~e.scores["sha256"].isin(e.known).to_numpy()
    chosen = newest if e.known and newest.sum() >= _FEW else good
    m, alarms = int(chosen.sum()), int((e.values[chosen] > e.threshold).sum())
    sessions = int(e.metrics.get("sessions", 0))
    if sessions:
        from scipy.stats import binom

        chance = float(binom.sf(alarms - 1, m, e.metrics["unseen_session_rate_high"]))
    else:
        chance = alarms_chance(alarms, m, e.calibration, e.budget)
    limit = params.false_alarm_risk
    which = "newest good images" if chosen is newest else "good test images"
    text = f"{alarms} alarms on {m} {which}, chance {chance:.2g} (limit {limit:.2g})"
    text += f"; {promise(e.metrics, e.budget)}" if sessions else ""
    return [Rule("calibration holds", chance >= limit, chance, limit, max(0.0, limit - chance), text)]


def promise_kept(e: Evidence, params: GateParams) -> list[Rule]:
    """Require that the false-alarm rate which good parts have met in use is not certainly above the promised one.

    It looks at what `panda-ad audit` and monitoring have left on the version, so at versions that have been in use: on
    the way to @champion, and with `--in-place`.
    """
    alarms, images = e.confirmed
    if params.promise_confidence is None or not images:
        return []
    low = lower_bound(alarms, images, params.promise_confidence)
    text = (
        f"{alarms} alarms on {images} parts confirmed good in use: at least {low:.2%} with "
        f"{params.promise_confidence:.0%} confidence, {e.budget:.2%} are promised"
    )
    return [Rule("the promise is kept", low <= e.budget, low, e.budget, max(0.0, low - e.budget), text)]


def latency_ceiling(e: Evidence, params: GateParams) -> list[Rule]:
    """Median time of one image at most `max_latency_ms`."""
    return _at_most("latency", e.latency_ms, params.max_latency_ms, "ms")


def bundle_size_ceiling(e: Evidence, params: GateParams) -> list[Rule]:
    """Bundle at most `max_bundle_mb`."""
    return _at_most("bundle size", e.bundle_mb, params.max_bundle_mb, "MB")


RULES: tuple[Callable[[Evidence, GateParams], list[Rule]], ...] = (
    image_auroc_not_worse,
    recall_not_worse,
    decisions_not_worse,
    image_auroc_near_best,
    image_auroc_floor,
    pixel_auroc_floor,
    defect_auroc_floor,
    defect_recall_floor,
    must_catch,
    calibration_holds,
    promise_kept,
    latency_ceiling,
    bundle_size_ceiling,
)


def refusal(rules: list[Rule]) -> str:
    """Return the failed rules in one line."""
    return "; ".join(f"{r.name}: {r.text}" for r in rules if not r.passed)


def _not_worse(
    name: str, metric: Metric, e: Evidence, margin: float | None, confidence: float, decisions: bool = False
) -> list[Rule]:
    """Return the rules on a metric of labels and scores, against the version in place and against the champion.

    With `decisions` each version's threshold is subtracted from its scores.
    """
    rules: list[Rule] = []
    if not e.both_kinds:
        return rules
    rivals = (
        (name, e.incumbent, e.incumbent_threshold),
        (f"{name} than the champion's", e.champion, e.champion_threshold),
    )
    for title, rival, threshold in rivals:
        if margin is None or rival is None or (decisions and threshold is None):
            continue
        values, theirs = e.values, rival["score"].to_numpy(dtype=np.float64)
        if decisions:
            values, theirs = values - e.threshold, theirs - threshold
        ours, before = metric(e.labels, values), metric(e.labels, theirs)
        drops = -paired_bootstrap(metric, e.labels, values, theirs, e.resamples, e.seed)
        drop = float(np.quantile(drops, confidence))
        text = (
            f"{ours:.4f} against {before:.4f}; "
            f"with {confidence:.0%} confidence it falls by at most {drop:.4f} (margin {margin:.4f})"
        )
        passed = drop <= margin
        text += "" if passed else f", {drop - margin:.4f} too much"
        rules.append(Rule(title, passed, drop, margin, max(0.0, drop - margin), text))
    return rules


def _per_defect(
    name: str, e: Evidence, floor: float | Mapping[str, float] | None, measure: Callable[[np.ndarray], float]
) -> list[Rule]:
    if floor is None:
        return []
    kinds = e.scores["defect"].to_numpy()
    own = sorted(set(kinds[e.labels == 1]))
    limits = dict(floor) if isinstance(floor, Mapping) else dict.fromkeys(own, floor)
    rules: list[Rule] = []
    for kind in sorted(limits.keys() - e.test_defects - set(own)):  # it would guard nothing
        text = f"no such kind of defect in the test set of any category; this one has {', '.join(own) or 'none'}"
        rules.append(Rule(f"{name} {kind}", False, float("nan"), limits[kind], float("nan"), text))
    for kind in own:
        rules += _at_least(f"{name} {kind}", measure((kinds == kind) & (e.labels == 1)), limits.get(kind))
    return rules


def _at_least(name: str, value: float, limit: float | None) -> list[Rule]:
    return [] if limit is None else [_rule(name, value, limit, limit - value, value >= limit, "", ">=")]


def _at_most(name: str, value: float | None, limit: float | None, unit: str) -> list[Rule]:
    return (
        [] if limit is None or value is None else [_rule(name, value, limit, value - limit, value <= limit, unit, "<=")]
    )


def _rule(name: str, value: float, limit: float, by: float, passed: bool, unit: str, sign: str) -> Rule:
    text = f"{value:.4g}{f' {unit}' if unit else ''} (limit {sign} {limit:.4g})" + (
        "" if passed else f", off by {by:.4g}"
    )
    return Rule(name, passed, value, limit, 0.0 if passed else by, text)
