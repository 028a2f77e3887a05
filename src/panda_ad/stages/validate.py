"""Stage validate: read every image once, check the data set, write the manifest of what can be used.

In: the images under `data.root`. Out, in build/validation: manifest.csv, problems.csv (path, reason), report.json, data_docs/.
"""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from panda_ad.errors import UserError
from panda_ad.params import Params, load_params
from panda_ad.system.files import atomic_folder, write_json
from panda_ad.system.paths import MANIFEST
from panda_ad.system.stage import run_stage

if TYPE_CHECKING:
    from panda_ad.data.checks import Checked
    from panda_ad.data.validation import Expectation


def main() -> None:
    """Write build/validation.

    Raises
    ------
    UserError
        Bad files under `on_invalid: fail`, or too few good ones; all outputs are written before.
    """
    from panda_ad.data.checks import check
    from panda_ad.data.manifest import collect, write_manifest
    from panda_ad.data.validation import validate

    params = load_params()
    checked = check(collect(params), params)
    with atomic_folder(MANIFEST.parent) as folder:
        expectations = validate(checked, params, folder / "data_docs")
        write_manifest(checked.usable, folder / MANIFEST.name)
        _write_problems(checked, folder / "problems.csv")
        write_json(folder / "report.json", report(checked, expectations, params))
    for warning in checked.warnings:
        print(f"validate: {warning}")
    judge(checked, expectations, params, MANIFEST.parent / "problems.csv")
    dropped = (
        f", {len(checked.problems)} bad files left out (see {MANIFEST.parent / 'problems.csv'})"
        if checked.problems
        else ""
    )
    print(f"validate: {len(checked.usable)} images usable{dropped}")


def report(checked: Checked, expectations: list[Expectation], params: Params) -> dict[str, Any]:
    """What report.json holds: the outcome, counts by category, split and defect, expectations, and the hash of the data."""
    from panda_ad.data.manifest import data_hash

    usable = checked.usable
    counts: dict[str, dict[str, dict[str, int]]] = {
        c: {s: {} for s in ("train", "calibration", "test")} for c in params.categories
    }
    for key, n in sorted(Counter(zip(usable["category"], usable["split"], usable["defect"], strict=True)).items()):
        counts[key[0]][key[1]][key[2]] = n
    return {
        "dataset": params.dataset,
        "success": not fatal(checked, params) and all(e.explained for e in expectations),
        "on_invalid": params.data.on_invalid,
        "data_hash": data_hash(usable),
        "images": len(usable),
        "categories": counts,
        "bad_files": len(checked.problems),
        "shortages": [f"{path}: {reason}" for path, reason in checked.blocking],
        "warnings": checked.warnings,
        "expectations": [asdict(e) for e in expectations],
    }


def fatal(checked: Checked, params: Params) -> list[tuple[str, str]]:
    """(path, reason) of what stops the pipeline: shortages always, bad files where they are not quarantined."""
    return checked.blocking + (checked.problems if params.data.on_invalid == "fail" else [])


def judge(checked: Checked, expectations: list[Expectation], params: Params, listed: Path) -> None:
    """Raise UserError, one line, where the pipeline must not go on."""
    found = fatal(checked, params)
    if found:
        shown = "; ".join(" ".join(f"{path}: {reason}".split()) for path, reason in found[:3])
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        hint = ", or set data.on_invalid: quarantine to go on without them" if not checked.blocking else ""
        raise UserError(
            f"{len(found)} problem{'s' if len(found) > 1 else ''} in the data: {shown}{more}. All are in {listed}{hint}"
        )
    unexplained = [e.description for e in expectations if not e.explained]
    if unexplained:
        raise UserError(
            f"the data breaks an expectation: {'; '.join(unexplained)} (see {listed.parent / 'data_docs' / 'index.html'})"
        )


def _write_problems(checked: Checked, path: Path) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(["path", "reason"])
        writer.writerows(checked.blocking + checked.problems)


if __name__ == "__main__":
    run_stage("validate", main)
