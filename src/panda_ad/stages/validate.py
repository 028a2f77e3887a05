# SPDX-License-Identifier: Apache-2.0
"""Stage validate: read every image once, check the data set, write the manifest of what can be used.

In: the images under `data.root`. Out, in build/validation: manifest.csv, problems.csv (path, reason), report.json,
data_docs/index.html.
"""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from panda_ad.errors import UserError
from panda_ad.params import Params
from panda_ad.params_file import load_params
from panda_ad.system.files import atomic_folder, write_json, write_text
from panda_ad.system.paths import MANIFEST
from panda_ad.system.stage import run_stage

if TYPE_CHECKING:
    from panda_ad.data.validation import Validation

_NAMED = 3
"""Problems that the error line names; problems.csv has them all."""


def main() -> None:
    """Write build/validation.

    Raises
    ------
    UserError
        Bad files under `on_invalid: fail`, or too few good ones; all outputs are written before.
    """
    from panda_ad.data.data_docs import render
    from panda_ad.data.manifest import collect, write_manifest
    from panda_ad.data.validation import validate

    params = load_params()
    rows, warnings = collect(params)
    found = validate(rows, params, warnings)
    with atomic_folder(MANIFEST.parent) as folder:
        write_text(folder / "data_docs" / "index.html", render(found, params))
        write_manifest(found.usable, folder / MANIFEST.name)
        _write_problems(found, folder / "problems.csv")
        write_json(folder / "report.json", report(found, params))
    for warning in found.warnings:
        print(f"validate: {warning}")
    problems = MANIFEST.parent / "problems.csv"
    require_usable(found, params, problems)
    dropped = f", {len(found.problems)} bad files left out (see {problems})" if found.problems else ""
    print(f"validate: {len(found.usable)} images usable{dropped}")


def report(found: Validation, params: Params) -> dict[str, Any]:
    """Return what report.json holds.

    It is the outcome, counts by category, split and defect, expectations, and the hash of the data.
    """
    from panda_ad.data.manifest import data_hash

    usable = found.usable
    counts: dict[str, dict[str, dict[str, int]]] = {
        c: {s: {} for s in ("train", "calibration", "test")} for c in params.categories
    }
    for key, n in sorted(Counter(zip(usable["category"], usable["split"], usable["defect"], strict=True)).items()):
        counts[key[0]][key[1]][key[2]] = n
    return {
        "dataset": params.dataset,
        "success": not found.fatal(params),
        "on_invalid": params.data.on_invalid,
        "data_hash": data_hash(usable),
        "images": len(usable),
        "categories": counts,
        "bad_files": len(found.problems),
        "shortages": [f"{path}: {reason}" for path, reason in found.shortages],
        "warnings": found.warnings,
        "expectations": [asdict(e) for e in found.expectations],
    }


def require_usable(found: Validation, params: Params, listed: Path) -> None:
    """Raise UserError, one line, where the pipeline must not go on; `listed` is the file that has all problems."""
    fatal = found.fatal(params)
    if not fatal:
        return
    shown = "; ".join(" ".join(f"{path}: {reason}".split()) for path, reason in fatal[:_NAMED])
    more = f"; and {len(fatal) - _NAMED} more" if len(fatal) > _NAMED else ""
    hint = ", or set data.on_invalid: quarantine to go on without them" if not found.shortages else ""
    count = f"{len(fatal)} problem{'s' if len(fatal) > 1 else ''}"
    raise UserError(f"{count} in the data: {shown}{more}. All are in {listed}{hint}")


def _write_problems(found: Validation, path: Path) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(["path", "reason"])
        writer.writerows(found.shortages + found.problems)


if __name__ == "__main__":
    run_stage("validate", main)
