# SPDX-License-Identifier: Apache-2.0
"""`panda-ad audit`, and which parts were confirmed good: labeled so in the data set, or decided on the page."""

from __future__ import annotations

import os
from collections.abc import Sequence

from panda_ad.commands.summary import columns
from panda_ad.monitor.budget import HEADER, REPORTS, Audit, audit_category, sessions_table
from panda_ad.monitor.check import chosen_categories
from panda_ad.monitor.promise import labeled_good
from panda_ad.params import Params
from panda_ad.params_file import load_params


def audit(categories: Sequence[str]) -> bool:
    """Print the audit of each category; return whether a promise is broken.

    Raises
    ------
    UserError
        No version is in use, the log is damaged, or MLflow does not answer.
    """
    params = load_params()
    audits: list[Audit] = []
    for category in chosen_categories(categories, params):
        found, first = audit_category(params, category, confirmed_good(params, category))
        audits += found
        print("\n".join(columns([HEADER, *(a.row() for a in found)])))
        if len(first):
            print(f"\n  {category}: each good part's first verdict, by session ({REPORTS / category}.svg, .csv)")
            print("\n".join(columns(sessions_table(first, found[0].promised.rate, params.evaluate.confidence))))
        print()
    return any(a.broken for a in audits)


def confirmed_good(params: Params, category: str) -> dict[str, str]:
    """Return the images of parts that a person called good: sha256 -> session, '' where it is not known.

    Where the page and the data set differ, the page's later decision that it is not good counts.
    """
    from panda_ad.inspect.decisions import DEFAULT, VARIABLE, open_decisions

    good = labeled_good(params, category)
    if not DEFAULT.is_file() and VARIABLE not in os.environ:
        return good
    decisions = open_decisions()
    try:
        for sha256, decision in decisions.standing(category).items():
            if decision.label == "good":
                good.setdefault(sha256, "")
            elif decision.label == "defect":
                good.pop(sha256, None)
    finally:
        decisions.close()
    return good
