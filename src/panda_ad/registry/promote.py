"""Promotion through the gate, and rollback.

Order of writes, so that a crash or a lost server at any point leaves the alias where it was or where it goes, on a whole, judged version:

1. the decision with every figure (artifact of the candidate's run, tags of the version);
2. the alias itself, in one request: this is the move;
3. @previous to the version that the alias left, MLflow's stage field for old dashboards, last the audit record.

After a crash before 2 the next `promote` decides and moves again. After 2 the next `promote` or `rollback`, whatever else it does, finds
a move without its record and first does the rest (`_catch_up`).
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from panda_ad.errors import GateRefused, UserError
from panda_ad.params import Params, load_params
from panda_ad.registry import audit
from panda_ad.registry.change import model_name, plain
from panda_ad.registry.connection import connect, find_version, mlflow_errors
from panda_ad.registry.evidence import gather
from panda_ad.registry.gate import Rule, judge, refusal
from panda_ad.registry.versions import registered
from panda_ad.system.files import write_json
from panda_ad.system.lock import repository_lock
from panda_ad.system.paths import BUILD

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

Target = Literal["staging", "champion"]
SOURCE = {"staging": "challenger", "champion": "staging"}
PREVIOUS = {"staging": "previous", "champion": "previous-champion"}
_STAGE = {"staging": "Staging", "champion": "Production"}
HELD_BACK = "panda.rolled_back."
_LATER = "recorded later: the move was made, its record was not"


@dataclass(frozen=True)
class Decision:
    """What the gate decided for one category, and what was done.

    Attributes
    ----------
    outcome : 'promoted', 'refused', 'unchanged' (the alias is there already) or 'held back' (rolled back before).
    version, incumbent : the candidate, and the version that `to` held (None: it held none).
    rules : every rule that was judged, with its figures; empty where none had to be.
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

    def __str__(self) -> str:
        return f"{self.name} version {self.version}, @{self.to}: {self.outcome} ({self.reason})"


def promote(categories: str | Sequence[str] | None = None, to: str = "staging") -> list[Decision]:
    """Put `to` on each category's candidate (@challenger for staging, @staging for champion) if the gate lets it through.

    Each decision is also left in build/decisions/<category>.json.

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
        chosen = (
            [categories]
            if isinstance(categories, str)
            else list(params.categories if categories is None else categories)
        )
        _check(params, chosen)
        client = connect()
        decisions = []
        for category in chosen:
            decisions.append(_promote(client, params, category, to))
            write_json(BUILD / "decisions" / f"{category}.json", as_json(decisions[-1]))
    if refused := [d for d in decisions if d.outcome == "refused"]:
        raise GateRefused(
            "; ".join(f"{d.name} version {d.version} not promoted to @{d.to}: {d.reason}" for d in refused)
        )
    return decisions


def _promote(client: MlflowClient, params: Params, category: str, to: str) -> Decision:
    name = model_name(params.dataset, category)
    model = registered(client, name)
    if _catch_up(client, model, to):
        model = registered(client, name)
    version, current = _at(model, SOURCE[to]), _at(model, to)
    if version is None:
        todo = "run `dvc repro` to publish one" if to == "staging" else "promote one to staging first"
        raise UserError(f"{name}: no version @{SOURCE[to]}; {todo}")
    candidate = client.get_model_version(name, version)
    if to == "staging" and (other := _not_what_is_here(category, candidate)):
        return Decision(category, name, to, version, current, "refused", other)
    if version == current:
        return Decision(category, name, to, version, current, "unchanged", f"it is @{to} already")
    if when := candidate.tags.get(f"{HELD_BACK}{to}"):
        back = f"`panda-ad rollback {category} --to-version {version}` puts it back"
        return Decision(category, name, to, version, current, "held back", f"it was rolled back on {when}; {back}")
    incumbent = None if current is None else client.get_model_version(name, current)
    holder = _at(model, "champion")
    champion = None if holder in (None, current, version) else client.get_model_version(name, holder)
    best = _best_before(client, model, candidate, to) if holder is None else None
    rules = judge(gather(client, params, category, candidate, incumbent, champion, best), params.gate)
    failed = refusal(rules)
    against = f"against version {current}" if current else "first version, floors only"
    reason = failed or f"{len(rules)} rules passed, {against}"
    decision = Decision(category, name, to, version, current, "refused" if failed else "promoted", reason, rules=rules)
    _record(client, decision, candidate)
    if not failed:
        client.set_registered_model_alias(name, to, version)
        _finish(client, model, "promote", to, current, version, reason)
    return decision


def _best_before(client: MlflowClient, model: RegisteredModel, candidate: ModelVersion, alias: str) -> float | None:
    """Highest image AUROC of the versions that were promoted to `alias` and not rolled back, as measured on the candidate's test images."""
    promoted = {m["to"] for m in audit.records(model) if m["alias"] == alias and m["action"] == "promote"} - {
        str(candidate.version)
    }
    images = candidate.tags.get("panda.test_images", "")  # missing from versions published before there was this tag
    same = (
        client.search_model_versions(f"name = '{model.name}' AND tags.`panda.test_images` = '{images}'")
        if images
        else []
    )
    found = [v.tags for v in same if str(v.version) in promoted and f"{HELD_BACK}{alias}" not in v.tags]
    return max((float(tags["panda.image_auroc"]) for tags in found if "panda.image_auroc" in tags), default=None)


def _not_what_is_here(category: str, challenger: ModelVersion) -> str:
    """Why the challenger is not what `publish` last registered from here (another checkout or a hand moved the alias); '' where it is."""
    path = BUILD / "publish" / f"{category}.json"
    try:
        here = json.loads(path.read_text(encoding="utf-8"))["bundle"]
    except (OSError, ValueError, KeyError):  # nothing was published from here: there is nothing to differ from
        return ""
    if challenger.tags.get("panda.bundle") == here:
        return ""
    again = f"`dvc repro --force --single-item publish@{category}` publishes the model here again"
    return f"@{SOURCE['staging']} holds another model than {path} says was published; {again}"


def _record(client: MlflowClient, decision: Decision, candidate: ModelVersion) -> None:
    """Every figure, before anything moves: an artifact of the run, and tags of the version."""
    path = f"{plain(decision.category)}/decisions/{decision.to}-version-{decision.version}.json"
    client.log_dict(candidate.tags["panda.run"], as_json(decision), path)
    prefix = f"gate.{decision.to}"
    tags = {prefix: f"{decision.outcome} {decision.when}", f"{prefix}.against": decision.incumbent or "none"}
    tags |= {f"{prefix}.{_tag(r.name)}": f"{'passed' if r.passed else 'FAILED'}: {r.text}" for r in decision.rules}
    for key in candidate.tags:  # figures of an earlier decision on the same version
        if key.startswith(f"{prefix}.") and key not in tags:
            client.delete_model_version_tag(candidate.name, candidate.version, key)
    for key, value in tags.items():
        client.set_model_version_tag(candidate.name, candidate.version, key, value)


def _finish(
    client: MlflowClient, model: RegisteredModel, action: str, alias: str, before: str | None, after: str, why: str
) -> None:
    """What follows a move of `alias`; the audit record comes last and says that all of it is done."""
    earlier = before if action == "promote" else audit.predecessor(audit.records(model), alias, after)
    if earlier is not None and _version(client, model.name, earlier) is not None:
        client.set_registered_model_alias(model.name, PREVIOUS[alias], earlier)
    elif action == "rollback" and PREVIOUS[alias] in model.aliases:
        client.delete_registered_model_alias(model.name, PREVIOUS[alias])
    _set_stage(client, model.name, alias, after)
    audit.record(client, model.name, action=action, alias=alias, before=before, after=after, why=why)


def _at(model: RegisteredModel, alias: str) -> str | None:
    """The version that an alias points at; None where it is not set."""
    version = model.aliases.get(alias)
    return None if version is None else str(version)


def _version(client: MlflowClient, name: str, number: str) -> ModelVersion | None:
    """A version; None where it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, number)
    except MlflowException as e:
        if e.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _catch_up(client: MlflowClient, model: RegisteredModel, alias: str) -> str | None:
    """Finish the move of `alias` that has no record, if there is one; its action, 'promote' or 'rollback', or None.

    Before it moves the alias, a rollback tags the version it leaves, and a promotion the version that it goes to. A move made by hand
    in MLflow counts as a promotion.
    """
    current = _at(model, alias)
    last = next((m for m in reversed(audit.records(model)) if m["alias"] == alias), {"to": None, "when": ""})
    if current is None or current == last["to"]:
        return None
    action = "promote"
    left = None if last["to"] is None else _version(client, model.name, last["to"])
    if left is not None and f"{HELD_BACK}{alias}" in left.tags:
        outcome, _, when = client.get_model_version(model.name, current).tags.get(f"gate.{alias}", "").partition(" ")
        action = "promote" if outcome == "promoted" and when > last["when"] else "rollback"
    _finish(client, model, action, alias, last["to"], current, _LATER)
    return action


def rollback(category: str, to_version: int | str | None = None, alias: str = "staging") -> Decision:
    """Put `alias` back to the version it held before, or to a given one, past the gate: a person decides.

    The version it leaves is held back: `promote` does not put it there again until a rollback names it.

    Raises
    ------
    UserError
        There is no version to go back to, or the alias holds it already.
    """
    if alias not in SOURCE:
        raise UserError(f"rollback of @{alias}: staging or champion is expected")
    params = load_params()
    with repository_lock(f"rollback {category}"), mlflow_errors():
        _check(params, [category])
        name = model_name(params.dataset, category)
        client = connect()
        model = registered(client, name)
        if caught_up := _catch_up(client, model, alias):
            model = registered(client, name)
        current, target = _at(model, alias), _at(model, PREVIOUS[alias]) if to_version is None else str(to_version)
        if current is not None and caught_up == "rollback" and (to_version is None or target == current):
            left = audit.records(model)[-1]["from"]
            return Decision(category, name, alias, current, left, "rolled back", f"from version {left}, {_LATER}")
        if target is None or (to_version is None and target == current):
            raise UserError(
                f"{name}: @{alias} has held no version before version {current}; name one with --to-version"
            )
        if target == current:
            raise UserError(f"{name}: version {target} is @{alias} already")
        version = find_version(client, f"{name}/{target}")
        why = f"asked for version {target}" if to_version is not None else "asked for the version before"
        if version.tags.get(f"gate.{alias}", "").startswith("refused"):
            why += ", which the gate had refused"
        if current is not None:
            client.set_model_version_tag(name, current, f"{HELD_BACK}{alias}", audit.now())
        if f"{HELD_BACK}{alias}" in version.tags:
            client.delete_model_version_tag(name, target, f"{HELD_BACK}{alias}")
        client.set_registered_model_alias(name, alias, target)
        _finish(client, model, "rollback", alias, current, target, why)
    return Decision(category, name, alias, target, current, "rolled back", f"from version {current}, {why}")


def as_json(decision: Decision) -> dict[str, Any]:
    """A decision as plain values; a figure that is no number is None."""
    value = asdict(decision)
    for rule in value["rules"]:
        rule |= {k: None for k in ("value", "limit", "by") if rule[k] != rule[k]}
    return value


def _check(params: Params, chosen: Sequence[str]) -> None:
    if unknown := [c for c in chosen if c not in params.categories]:
        raise UserError(
            f"{', '.join(unknown)}: no such category in params.yaml, which has {', '.join(params.categories)}"
        )


def _set_stage(client: MlflowClient, name: str, alias: str, version: str) -> None:
    """MLflow's own, deprecated, stage field for dashboards that read it; servers without it are left alone."""
    from mlflow.exceptions import MlflowException

    if alias == "staging" and _at(registered(client, name), "champion") == version:
        return  # one stage per version, and Production says more
    with contextlib.suppress(AttributeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            client.transition_model_version_stage(name, version, _STAGE[alias], archive_existing_versions=True)
        except MlflowException as e:
            if e.get_http_status_code() >= 500:  # a lost server is none without the field: the move stays unfinished
                raise


def _tag(name: str) -> str:
    """A rule's name as part of a tag's."""
    return re.sub(r"[^\w.\- ]", ".", name)[:200]
