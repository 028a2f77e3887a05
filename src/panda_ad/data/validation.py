# SPDX-License-Identifier: Apache-2.0
"""Validate a data set: Great Expectations decides by the table in `expectations`, whose reasons are in words."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from panda_ad.data import torchvision_sets
from panda_ad.data.data_warnings import find_warnings
from panda_ad.data.expectations import COPIES, CountRule, ImageRule, count_rules, image_rules
from panda_ad.data.manifest import COLUMNS, split_calibration
from panda_ad.params import Params

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Expectation:
    """One expectation's outcome.

    Attributes
    ----------
    name : Great Expectations' name of it.
    unexpected : rows that break it (None for a table-level count).
    needed : False: a failure does not stop the pipeline.
    """

    name: str
    description: str
    success: bool
    unexpected: int | None
    needed: bool = True


@dataclass(frozen=True)
class Validation:
    """What was found.

    Attributes
    ----------
    rows : every row of `collect`, `problem` filled in for each bad one.
        Good training rows are split into train and calibration.
    problems : (path, reason) of each bad file; leaving them out is enough.
    left_out : those of `problems` that a published set has by nature, which stop nothing.
    shortages : (folder, reason) of what stays wrong without them: too few images.
    warnings : one line each, worth a look.
    expectations : the outcome of each.
    """

    rows: pd.DataFrame
    problems: list[tuple[str, str]]
    left_out: list[tuple[str, str]]
    shortages: list[tuple[str, str]]
    warnings: list[str]
    expectations: list[Expectation]

    @property
    def usable(self) -> pd.DataFrame:
        """The manifest: good rows, its columns only."""
        usable = self.rows.loc[self.rows["problem"] == "", COLUMNS]
        return usable.astype({"width": "int64", "height": "int64"}).reset_index(drop=True)

    def fatal(self, params: Params) -> list[tuple[str, str]]:
        """Return (path, reason) of what stops the pipeline: shortages always, bad files if they are not quarantined."""
        if params.data.on_invalid == "quarantine":
            return self.shortages
        return self.shortages + [problem for problem in self.problems if problem not in set(self.left_out)]


def validate(rows: pd.DataFrame, params: Params, warnings: list[str] | None = None) -> Validation:
    """Validate the rows of `collect`, whose warnings are `warnings`."""
    rows = rows.copy()
    rows["problem"] = ""
    rules = image_rules()
    suite = _Suite(params.dataset)
    outcomes, broken = suite.check_images(rules, rows)
    left_out = set()
    for rule, indices in zip(rules, broken, strict=True):
        candidates = rows.loc[[i for i in indices if rows.at[i, "problem"] == ""]]
        for index, reason in (rule.reasons(candidates) if len(candidates) else {}).items():
            rows.at[index, "problem"] = reason
            if rule.description == COPIES and params.data.layout in torchvision_sets.SETS:
                left_out.add((rows.at[index, "path"], reason))
    good = split_calibration(rows[rows["problem"] == ""], params.data.calibration_fraction, params.seed)
    rows.loc[good.index, "split"] = good["split"]
    bad = rows[rows["problem"] != ""]
    problems = sorted(set(zip(bad["path"], bad["problem"], strict=True)))
    training = {c: int(((good["category"] == c) & (good["split"] != "test")).sum()) for c in params.categories}
    counts = list(count_rules(params, training))
    found, failures = suite.check_counts(counts, good)
    shortages = [(rule.folder, reason) for rule, reason in failures if rule.needed]
    warnings = [*(warnings or []), *(reason for rule, reason in failures if not rule.needed)]
    if left_out:
        warnings.append(
            f"{len(left_out)} files of {params.data.layout} are copies of others in it and are left out "
            "(problems.csv lists them)"
        )
    warnings += find_warnings(good, params)
    return Validation(rows, problems, sorted(left_out), shortages, warnings, outcomes + found)


class _Suite:
    """Great Expectations, without files, progress bars and telemetry."""

    def __init__(self, name: str) -> None:
        os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
        os.environ.setdefault("DO_NOT_TRACK", "true")
        # a third of the import's time, for tests and plots of distributions, which the suite has none of
        for unused in ("scipy.stats", "altair"):
            _load_when_used(unused)
        import great_expectations as gx
        from great_expectations.data_context.types.base import DataContextConfig, InMemoryStoreBackendDefaults

        self._name = name
        # its own pages would go to a temporary folder that nobody removes
        stores = InMemoryStoreBackendDefaults(init_temp_docs_sites=False)
        context = gx.get_context(mode="ephemeral", project_config=DataContextConfig(store_backend_defaults=stores))
        context.variables.progress_bars = {"globally": False}
        asset = context.data_sources.add_pandas("images").add_dataframe_asset("manifest")
        self._whole = asset.add_batch_definition_whole_dataframe("all")

    def check_images(self, rules: list[ImageRule], rows: pd.DataFrame) -> tuple[list[Expectation], list[list[Any]]]:
        """Return the outcome of each rule, and the index of the rows that break it."""
        import great_expectations.expectations as gxe
        from great_expectations.expectations.row_conditions import Column

        expectations = []
        for rule in rules:
            where = {"row_condition": Column("split") == rule.split} if rule.split else {}
            kind = getattr(gxe, f"Expect{rule.expectation}")
            expectations.append(kind(**rule.arguments, **where, description=rule.description))
        results = self._run(expectations, rows)
        broken = [
            [row["row"] for row in result.result.get("unexpected_index_list") or []] if not result.success else []
            for result in results
        ]
        outcomes = [
            Expectation(r.expectation_config.type, rule.description, bool(r.success), r.result.get("unexpected_count"))
            for rule, r in zip(rules, results, strict=True)
        ]
        return outcomes, broken

    def check_counts(
        self, rules: list[CountRule], rows: pd.DataFrame
    ) -> tuple[list[Expectation], list[tuple[CountRule, str]]]:
        """Return the outcome of each rule, and the reason of each that usable rows break."""
        import great_expectations.expectations as gxe
        from great_expectations.expectations.row_conditions import Column

        descriptions = [f"{r.category}: at least {r.least} usable {r.description}" for r in rules]
        expectations: list[Any] = []
        for rule, description in zip(rules, descriptions, strict=True):
            count: Any = gxe.ExpectTableRowCountToBeBetween
            if rule.column:
                count = functools.partial(gxe.ExpectColumnUniqueValueCountToBeBetween, column=rule.column)
            chosen = (Column("category") == rule.category) & Column("split").is_in(list(rule.splits))
            chosen &= Column("label") == rule.label
            expectations.append(count(min_value=rule.least, row_condition=chosen, description=description))
        results = self._run(expectations, rows)
        outcomes = [
            Expectation(result.expectation_config.type, description, bool(result.success), None, rule.needed)
            for rule, result, description in zip(rules, results, descriptions, strict=True)
        ]
        failed = [
            (rule, rule.reason.format(n=result.result["observed_value"]))
            for rule, result in zip(rules, results, strict=True)
            if not result.success
        ]
        return outcomes, failed

    def _run(self, expectations: list[Any], rows: pd.DataFrame) -> list[Any]:
        """Return the results in the order of the expectations."""
        import great_expectations as gx

        batch = self._whole.get_batch(batch_parameters={"dataframe": _gx_rows(rows)})
        form = {"result_format": "COMPLETE", "unexpected_index_column_names": ["row"]}
        result = batch.validate(gx.ExpectationSuite(name=self._name, expectations=expectations), result_format=form)
        by_description = {r.expectation_config.description: r for r in result.results}
        for found in by_description.values():
            if any(info.get("raised_exception") for info in _exceptions(found.exception_info)):
                kind = found.expectation_config.type
                raise RuntimeError(f"Great Expectations could not evaluate {kind}: {found.exception_info}")
        return [by_description[e.description] for e in expectations]


def _gx_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows as Great Expectations reads them: '' as missing, numbers as float64, their index as a column."""
    import numpy as np

    frame = rows.drop(columns="thumb").assign(row=rows.index)
    numbers = frame.select_dtypes("Int64").columns
    frame[numbers] = frame[numbers].astype("float64")
    return frame.astype(object).where(frame.notna() & (frame != ""), None).astype({c: np.float64 for c in numbers})


def _exceptions(info: dict[str, Any]) -> list[dict[str, Any]]:
    """Return exception records; Great Expectations gives either one or a dict of them."""
    return [info] if "raised_exception" in info else [v for v in info.values() if isinstance(v, dict)]


def _load_when_used(name: str) -> None:
    """Put off the import of a module until an attribute of it is used.

    This is importlib's recipe 'Implementing lazy imports'.
    """
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        return
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
