# SPDX-License-Identifier: Apache-2.0
"""Promotion through the gate, and rollback.

The order of writes is such that a crash or a lost server at any point leaves the alias where it was or where it goes,
on a whole version that was evaluated:

1. the decision with every figure (artifact of the candidate's run, tags of the version);
2. the audit record: what is going to move, and why;
3. the alias itself, in one request: this is the move;
4. the record is marked as done.

A record left unmarked after 3 is marked by the next `promote` or `rollback`. Until then `audit.history` reads from the
alias whether the move was made. Where another checkout moves the same alias meanwhile, 2 is taken back (`moves`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from panda_ad.errors import GateRefused, UserError
from panda_ad.params import Params, plain_name
from panda_ad.params_file import load_params
from panda_ad.registry import audit
from panda_ad.registry.cautions import cautions
from panda_ad.registry.connection import connect, mlflow_errors
from panda_ad.registry.evidence import gather
from panda_ad.registry.facts import Rule
from panda_ad.registry.gate import evaluate_rules, refusal
from panda_ad.registry.moves import move_alias, settled, version_before
from panda_ad.registry.names import model_name
from panda_ad.registry.standing import standing
from panda_ad.registry.versions import find_version, registered
from panda_ad.system.files import write_json
from panda_ad.system.lock import repository_lock
from panda_ad.system.paths import BUILD

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

SOURCE = {"staging": "challenger", "champion": "staging"}
DERIVED = "panda.threshold_of"
"""Tag of a version that is another one with another threshold or gallery: the hash of the bundle that training made."""


@dataclass(frozen=True)
class Decision:
    """What the gate decided for one category, and what was done.

    Attributes
    ----------
    outcome : 'promoted', 'refused', 'unchanged' (the alias is there already), 'held back' (rolled back before),
        'rolled back', or of the version in place 'confirmed' and 'not confirmed'.
    version, incumbent : the candidate, and the version that it is compared with or takes over from.
        None if there is none.
    rules : every rule that was evaluated, with its figures; empty where none had to be.
    cautions : what a person should know of a version that keeps the rules.
    """

    category: str
    name: str
    to: str
    version: str
    incumbent: str | None
    outcome: str
    reason: str
    when: str = field(default_factory=audit.now)
    rules: list[Rule] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        caution = f"; caution: {'; '.join(self.cautions)}" if self.cautions else ""
        return f"{self.name} version {self.version}, @{self.to}: {self.outcome} ({self.reason}){caution}"


def promote(
    categories: str | Sequence[str] | None = None, to: str = "staging", in_place: bool = False
) -> list[Decision]:
    """Put `to` on each category's candidate if the gate lets it through.

    The candidate is @challenger for staging, and @staging for champion. Each decision is also left in
    build/decisions/<category>.json.

    Parameters
    ----------
    in_place : evaluate the version that `to` points at, such as one that was set by hand, against the one before it.
        Nothing moves.

    Raises
    ------
    GateRefused
        At least one category was refused; names each failed rule and by how much. The other categories were promoted.
    UserError
        Unknown category or target, nothing to promote, or MLflow does not answer.
    """
    if to not in SOURCE:
        raise UserError(f"--to {to}: staging or champion is expected")
    params = load_params()
    with repository_lock(f"promote to {to}"), mlflow_errors():
        chosen = [categories] if isinstance(categories, str) else list(categories or params.categories)
        _check(params, chosen)
        client = connect()
        decisions = []
        for category in chosen:
            decisions.append((_confirm if in_place else _promote)(client, params, category, to))
            write_json(BUILD / "decisions" / f"{category}.json", as_json(decisions[-1]))
    if refused := [d for d in decisions if d.outcome in ("refused", "not confirmed")]:
        said = {"refused": "not promoted to", "not confirmed": "does not keep the rules at"}
        raise GateRefused(
            "; ".join(f"{d.name} version {d.version} {said[d.outcome]} @{d.to}: {d.reason}" for d in refused)
        )
    return decisions


def _promote(client: MlflowClient, params: Params, category: str, to: str) -> Decision:
    name = model_name(params.dataset, category)
    model = settled(client, name, to)
    version, current = audit.held(model, SOURCE[to]), audit.held(model, to)
    if version is None:
        todo = "run `dvc repro` to publish one" if to == "staging" else "promote one to staging first"
        raise UserError(f"{name}: no version @{SOURCE[to]}; {todo}")
    candidate = client.get_model_version(name, version)
    known = Decision(category, name, to, version, current, "refused", "")
    if to == "staging" and (other := _not_what_is_here(category, candidate)):
        return replace(known, reason=other)
    by_hand = standing(client, model, to)
    if version == current:
        hint = f", {by_hand}: `panda-ad promote -c {category} --in-place` evaluates its rules" if by_hand else ""
        return replace(known, outcome="unchanged", reason=f"it is @{to} already{hint}")
    if when := audit.held_back(model, to).get(version):
        back = f"`panda-ad rollback {category} --to-version {version}` puts it back"
        return replace(known, outcome="held back", reason=f"it was rolled back on {when}; {back}")
    decision = by_rules(client, params, model, candidate, known)
    if by_hand:
        decision = replace(decision, reason=f"{decision.reason} ({by_hand})")
    record(client, decision, candidate)
    if decision.outcome == "promoted":
        move_alias(client, model, "promote", to, version, decision.reason)
    return decision


def _confirm(client: MlflowClient, params: Params, category: str, to: str) -> Decision:
    """Evaluate the version in place against the one before; where it keeps the rules, that goes on record."""
    name = model_name(params.dataset, category)
    model = settled(client, name, to)
    current = audit.held(model, to)
    if current is None:
        raise UserError(f"{name}: no version @{to}; `panda-ad promote` puts one there")
    before = version_before(client, model, to)
    candidate = client.get_model_version(name, current)
    decision = by_rules(client, params, model, candidate, Decision(category, name, to, current, before, "refused", ""))
    record(client, decision, candidate)
    if decision.outcome == "refused":
        back = f"; `panda-ad rollback {category}` goes back to version {before}" if before else ""
        return replace(decision, outcome="not confirmed", reason=decision.reason + back)
    audit.mark_done(client, name, audit.record(client, model, "confirm", to, (current, current), decision.reason))
    return replace(decision, outcome="confirmed")


def by_rules(
    client: MlflowClient, params: Params, model: RegisteredModel, candidate: ModelVersion, known: Decision
) -> Decision:
    """Return `known` with the rules' outcome: promoted or refused."""
    name, version, current = model.name, known.version, known.incumbent
    incumbent = None if current is None else client.get_model_version(name, current)
    holder = audit.held(model, "champion")
    champion = None if holder in (None, current, version) else client.get_model_version(name, holder)
    best = _best_before(client, model, candidate, known.to) if holder is None else None
    evidence = gather(client, params, known.category, candidate, incumbent, champion, best)
    rules = evaluate_rules(evidence, params.gate)
    failed = refusal(rules)
    against = f"against version {current}" if current else "first version, floors only"
    passed = f"{len(rules)} rule{'s' * (len(rules) > 1)} passed" if rules else "nothing measured that a rule is about"
    reason = failed or f"{passed}, {against}"
    outcome = "refused" if failed else "promoted"
    warned = cautions(evidence.metrics, evidence.budget)
    return replace(known, outcome=outcome, reason=reason, rules=rules, cautions=warned)


def _best_before(client: MlflowClient, model: RegisteredModel, candidate: ModelVersion, alias: str) -> float | None:
    """Return the highest image AUROC of the versions that were promoted to `alias` and not rolled back.

    Only figures on the candidate's test images count.
    """
    promoted = {m["to"] for m in audit.history(model) if m["alias"] == alias and m["action"] == "promote" and m["done"]}
    promoted -= {str(candidate.version), *audit.held_back(model, alias)}
    images = candidate.tags.get("panda.test_images", "")  # missing from versions published before there was this tag
    query = f"name = '{model.name}' AND tags.`panda.test_images` = '{images}'"
    same = client.search_model_versions(query) if images else []
    found = [v.tags for v in same if str(v.version) in promoted]
    return max((float(tags["panda.image_auroc"]) for tags in found if "panda.image_auroc" in tags), default=None)


def _not_what_is_here(category: str, challenger: ModelVersion) -> str:
    """Return why the challenger is not what `publish` last registered from here, '' if it is.

    Another checkout may have published since, or someone may have moved the alias by hand.
    """
    path = BUILD / "publish" / f"{category}.json"
    try:
        here = json.loads(path.read_text(encoding="utf-8"))["bundle"]
    except (OSError, ValueError, KeyError):  # nothing was published from here: there is nothing to differ from
        return ""
    if here in (challenger.tags.get("panda.bundle"), challenger.tags.get(DERIVED)):
        return ""
    again = f"`dvc repro --force --single-item publish@{category}` publishes the model here again"
    return f"@{SOURCE['staging']} holds another model than {path} says was published; {again}"


def record(client: MlflowClient, decision: Decision, candidate: ModelVersion) -> None:
    """Write every figure, before anything moves: an artifact of the run, and tags of the version."""
    path = f"{plain_name(decision.category)}/decisions/{decision.to}-version-{decision.version}.json"
    run = candidate.tags["panda.run"]
    client.log_dict(run, as_json(decision), path)
    prefix = f"gate.{decision.to}"
    tags = {prefix: f"{decision.outcome} {decision.when}", f"{prefix}.against": decision.incumbent or "none"}
    tags |= {f"{prefix}.run": run, f"{prefix}.caution": "; ".join(decision.cautions) or "none"}
    tags |= {f"{prefix}.{_tag(r.name)}": f"{'passed' if r.passed else 'FAILED'}: {r.text}" for r in decision.rules}
    for key in candidate.tags:  # figures of an earlier decision on the same version
        if key.startswith(f"{prefix}.") and key not in tags:
            client.delete_model_version_tag(candidate.name, candidate.version, key)
    for key, value in tags.items():
        client.set_model_version_tag(candidate.name, candidate.version, key, value)


def rollback(category: str, to_version: int | str | None = None) -> Decision:
    """Put @staging back to the version it held before, or to a given one, past the gate: a person decides.

    The version it leaves is held back: `promote` does not put it there again until a rollback names it.

    Raises
    ------
    UserError
        There is no version to go back to, or the alias holds it already.
    """
    alias = "staging"
    params = load_params()
    with repository_lock(f"rollback {category}"), mlflow_errors():
        _check(params, [category])
        name = model_name(params.dataset, category)
        client = connect()
        cut = audit.unfinished(registered(client, name), alias)
        model = settled(client, name, alias)
        current = audit.held(model, alias)
        if cut is not None and cut["action"] == "rollback" and str(to_version or current) == current:
            why = f"from version {cut['from']}, finished now: the move was made, its record was not marked"
            return Decision(category, name, alias, cut["to"], cut["from"], "rolled back", why)
        target = version_before(client, model, alias) if to_version is None else str(to_version)
        if target is None:
            raise UserError(
                f"{name}: @{alias} has held no version before version {current}; name one with --to-version"
            )
        if target == current:
            raise UserError(f"{name}: version {target} is @{alias} already")
        version = find_version(client, f"{name}/{target}")
        why = "asked for the version before" if to_version is None else audit.named(target)
        if version.tags.get(f"gate.{alias}", "").startswith("refused"):
            why += ", which the gate had refused"
        move_alias(client, model, "rollback", alias, target, why)
    return Decision(category, name, alias, target, current, "rolled back", f"from version {current}, {why}")


def as_json(decision: Decision) -> dict[str, Any]:
    """Return a decision as plain values; a figure that is no number is None."""
    value = asdict(decision)
    for rule in value["rules"]:
        rule |= {k: None for k in ("value", "limit", "by") if rule[k] != rule[k]}
    return value


def _check(params: Params, chosen: Sequence[str]) -> None:
    if unknown := [c for c in chosen if c not in params.categories]:
        has = ", ".join(params.categories)
        raise UserError(f"{', '.join(unknown)}: no such category in params.yaml, which has {has}")


def _tag(name: str) -> str:
    """Return a rule's name as part of a tag's."""
    return re.sub(r"[^\w.\- ]", ".", name)[:200]
