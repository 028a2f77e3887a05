"""The data set's contract as a Great Expectations suite, and its Data Docs, readable without a network.

`checks.py` says what is wrong in words, image by image; the suite states the same contract once more, declaratively, on the same
rows. The two must agree: a failed expectation that no reason explains is an error of its own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from panda_ad.data.checks import MIN_SIDE, Checked
from panda_ad.data.images import MODES
from panda_ad.params import Params

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 200
"""Problems listed in the Data Docs; problems.csv has them all."""


@dataclass(frozen=True)
class Expectation:
    """One expectation's outcome.

    Attributes
    ----------
    unexpected : rows that break it (None for a table-level count).
    explained : it holds among the rows for which no reason to leave them out was found.
    """

    name: str
    description: str
    success: bool
    unexpected: int | None
    explained: bool


def validate(checked: Checked, params: Params, docs: Path) -> list[Expectation]:
    """Run the suite on `checked.rows` and write Data Docs to the folder `docs` (index.html and what it links to)."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    for unused in (
        "scipy.stats",
        "altair",
    ):  # a third of the import's time, for tests and plots of distributions, which the suite has none of
        _load_when_used(unused)
    import great_expectations as gx

    context = gx.get_context(mode="ephemeral")
    context.delete_data_docs_site("local_site")  # the default one, in a temporary folder
    context.variables.progress_bars = {"globally": False}
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.resolve())}
    index = {"class_name": "DefaultSiteIndexBuilder"}
    context.add_data_docs_site(
        "docs",
        {
            "class_name": "SiteBuilder",
            "show_how_to_buttons": False,
            "site_index_builder": index,
            "store_backend": store,
        },
    )
    asset = context.data_sources.add_pandas("images").add_dataframe_asset("manifest")
    suite = context.suites.add(
        gx.ExpectationSuite(name=params.dataset, expectations=_expectations(checked.rows, params))
    )
    batch = asset.add_batch_definition_whole_dataframe("all")
    definition = context.validation_definitions.add(gx.ValidationDefinition(name="manifest", data=batch, suite=suite))
    checkpoint = gx.Checkpoint(
        name="validate",
        validation_definitions=[definition],
        actions=[gx.checkpoint.UpdateDataDocsAction(name="docs", site_names=["docs"])],
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["path"]},
    )
    outcome = context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": _gx_rows(checked.rows)})
    results = next(iter(outcome.run_results.values())).results
    found = [_outcome(r) for r in results]
    if checked.problems and not all(e.success for e in found):
        usable = definition.run(batch_parameters={"dataframe": _gx_rows(checked.rows[checked.rows["problem"] == ""])})
        held = {r.expectation_config.description: bool(r.success) for r in usable.results}
        found = [replace(e, explained=held[e.description]) for e in found]
    _make_offline(docs, checked, params, found)
    return found


def _load_when_used(name: str) -> None:
    """Put off the import of a module until an attribute of it is asked for: importlib's recipe 'Implementing lazy imports'."""
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


def _gx_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows as Great Expectations reads them: '' as missing, and in `found_bad` why a row is bad.

    Texts are escaped, because its pages print them as they are: a file's name could be HTML.
    """
    import numpy as np

    frame = rows.assign(usable=(rows["problem"] == "").map({True: "yes", False: "no"})).rename(
        columns={"problem": "found_bad"}
    )
    for column in ("path", "mask", "defect", "found_bad"):
        frame[column] = [escape(text, quote=False) for text in frame[column]]
    numbers = frame.select_dtypes("Int64").columns
    frame[numbers] = frame[numbers].astype("float64")
    return frame.astype(object).where(frame.notna() & (frame != ""), None).astype({c: np.float64 for c in numbers})


def _expectations(rows: pd.DataFrame, params: Params) -> list[Any]:
    import great_expectations.expectations as gxe
    from great_expectations.expectations.row_conditions import Column

    suite: list[Any] = [
        gxe.ExpectColumnValuesToBeNull(column="found_bad", description="Nothing was found wrong with any file"),
        gxe.ExpectColumnValuesToNotBeNull(
            column="mode", row_condition=Column("sha256").is_not_null(), description="Every file decodes"
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="width", min_value=MIN_SIDE, description=f"Images are at least {MIN_SIDE} pixels wide"
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="height", min_value=MIN_SIDE, description=f"Images are at least {MIN_SIDE} pixels high"
        ),
        gxe.ExpectColumnValuesToBeInSet(column="mode", value_set=list(MODES), description="Pixel modes are known"),
        gxe.ExpectCompoundColumnsToBeUnique(
            column_list=["category", "pixels"],
            ignore_row_if="any_value_is_missing",
            description="No picture occurs twice in a category, within or across train and test",
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="label",
            value_set=[0],
            row_condition=Column("split").is_in(["train", "calibration"]),
            description="No defective image in train",
        ),
    ]
    if (rows["mask"] != "").any():
        missing = "either_value_is_missing"
        suite += [
            gxe.ExpectColumnPairValuesToBeEqual(
                column_A="mask_width",
                column_B="width",
                ignore_row_if=missing,
                description="Masks are as wide as their images",
            ),
            gxe.ExpectColumnPairValuesToBeEqual(
                column_A="mask_height",
                column_B="height",
                ignore_row_if=missing,
                description="Masks are as high as their images",
            ),
            gxe.ExpectColumnValuesToBeBetween(
                column="mask_marked", min_value=1, description="Masks mark at least one pixel"
            ),
        ]
    for category in params.categories:
        usable = (Column("category") == category) & (Column("usable") == "yes")
        for what, condition, least in (
            (
                "training images, with those held out for calibration",
                Column("split").is_in(["train", "calibration"]),
                params.data.min_train,
            ),
            ("training images left in the gallery", Column("split") == "train", 4),
            ("calibration images", Column("split") == "calibration", 1),
            ("normal test images", (Column("split") == "test") & (Column("label") == 0), 1),
            ("anomalous test images", (Column("split") == "test") & (Column("label") == 1), 1),
        ):
            suite.append(
                gxe.ExpectTableRowCountToBeBetween(
                    min_value=least,
                    row_condition=usable & condition,
                    description=f"{category}: at least {least} usable {what}",
                )
            )
    return suite


def _outcome(result: Any) -> Expectation:
    config = result.expectation_config
    raised = any(info.get("raised_exception") for info in _exceptions(result.exception_info))
    if raised:
        raise RuntimeError(f"Great Expectations could not evaluate {config.type}: {result.exception_info}")
    return Expectation(
        config.type,
        config.description or "",
        bool(result.success),
        result.result.get("unexpected_count"),
        bool(result.success),
    )


def _exceptions(info: dict[str, Any]) -> list[dict[str, Any]]:
    """Great Expectations gives either one exception record or a dict of them."""
    return [info] if "raised_exception" in info else [v for v in info.values() if isinstance(v, dict)]


# Nothing runs and nothing is fetched, whatever a file's name holds.
_POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; max-width: 1300px; padding: 0 1.5rem 3rem; }
table { border-collapse: collapse; margin: .5rem 0; } td, th { border: 1px solid #ddd; padding: .3rem .6rem; text-align: left; vertical-align: top; }
th { background: #f3f4f6; } h1, h2, h5, h6 { margin: .6rem 0; font-size: 1.05rem; } h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; }
a { color: #0b5cad; } ul, ol { padding-left: 1.2rem; } code { word-break: break-all; }
.alert { background: #eef1f4; border-radius: .3rem; padding: .3rem .8rem; margin-top: 1rem; }
.badge { background: #e4e7eb; border-radius: .3rem; padding: 0 .4rem; font-size: .9em; }
.text-success { color: #15803d; } .text-danger { color: #b91c1c; }
.fa-check-circle::before { content: "\\2713 "; } .fa-times::before { content: "\\2717 "; } .fa-exclamation-triangle::before { content: "! "; }
.fas { font-style: normal; font-weight: bold; }
.collapse { display: none; } .collapse:target { display: block; }
.row { display: block; } .card-header { font-weight: bold; } .nav { list-style: none; padding: 0; columns: 3; }
.breadcrumb { list-style: none; display: flex; gap: .6rem; padding: 0; } .breadcrumb-item + .breadcrumb-item::before { content: "/ "; }
.navbar { height: auto !important; } .show-scrollbars { max-width: 60rem; }
"""


def _make_offline(docs: Path, checked: Checked, params: Params, found: list[Expectation]) -> None:
    """Rewrite the pages to stand alone. As emitted they take styles, scripts and tables' contents from half a dozen CDNs."""
    shutil.rmtree(docs / "static", ignore_errors=True)
    for folder, name in (("expectations", "expectations.html"), ("validations", "results.html")):
        page = next((docs / folder).rglob("*.html"))  # the results' path holds the time of the run
        (docs / name).write_text(offline(page.read_text(encoding="utf-8")), encoding="utf-8")
        shutil.rmtree(docs / folder)
    # The emitted index is filled in by a script from a CDN; this one needs none, and says what was found.
    (docs / "index.html").write_text(_index(checked, params, found), encoding="utf-8")


def offline(html: str) -> str:
    """A Data Docs page without scripts, links to other hosts' files, forms and advertisements, in a style of its own."""
    for element in ("script", "footer", "form"):
        html = re.sub(rf"<{element}\b.*?</{element}\s*>", "", html, flags=re.S | re.I)
    html = re.sub(r"<link\b[^>]*>|<img\b[^>]*>", "", html, flags=re.S | re.I)
    # The filter card's buttons ran scripts; every row is shown.
    html = re.sub(
        r'<div class="card mb-3">\s*<div class="card-header p-2">\s*<strong>Actions</strong>.*?(?=<div class="card d-md-block)',
        "",
        html,
        flags=re.S,
    )
    html = re.sub(r'\son\w+="[^"]*"', "", html)
    html = re.sub(r'href="[^"#]*/index\.html"', 'href="index.html"', html)
    html = re.sub(r'href="[^"#]*/expectations/[^"]*"', 'href="expectations.html"', html)
    html = re.sub(r"background:\s*url\('http[^;]*;", "", html)
    return html.replace("</head>", f"{_POLICY}<style>{_STYLE}</style></head>", 1)


def _index(checked: Checked, params: Params, found: list[Expectation]) -> str:
    def table(head: list[str], body: list[list[object]]) -> str:
        cells = "".join("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>" for row in body)
        return "<table><tr>" + "".join(f"<th>{h}</th>" for h in head) + f"</tr>{cells}</table>"

    usable = checked.usable
    counts = [[*key, n] for key, n in usable.groupby(["category", "split", "defect"], sort=False).size().items()]
    bad: list[list[object]] = [list(p) for p in checked.blocking + checked.problems]
    links = '<li><a href="results.html">Results</a> and <a href="expectations.html">expectations</a> as Great Expectations shows them</li>'
    quarantined = bad and not checked.blocking and params.data.on_invalid == "quarantine"
    unexplained = not all(e.explained for e in found)
    status = (
        '<b class="text-danger">failed</b>'
        if unexplained or (bad and not quarantined)
        else '<b class="text-success">passed</b>'
    )
    status += ", bad files left out" if quarantined else ""
    outcomes: list[list[object]] = [
        ["✓" if e.success else "✗", e.description, "" if e.unexpected is None else e.unexpected] for e in found
    ]
    parts = [
        f"<h1>Data validation of {escape(params.dataset)}: {status}</h1>",
        f"<p>{len(usable)} rows of usable images, {len(checked.problems)} bad files, {len(checked.blocking)} shortages.</p><ul>{links}</ul>",
        "<h2>Expectations</h2>" + table(["", "expectation", "rows that break it"], outcomes),
    ]
    if bad:
        more = f"<p>... and {len(bad) - SHOWN} more in problems.csv</p>" if len(bad) > SHOWN else ""
        parts.append("<h2>Problems</h2>" + table(["path", "reason"], bad[:SHOWN]) + more)
    if checked.warnings:
        parts.append("<h2>Worth a look</h2><ul>" + "".join(f"<li>{escape(w)}</li>" for w in checked.warnings) + "</ul>")
    parts.append("<h2>Images</h2>" + table(["category", "split", "defect", "images"], counts))
    head = f'<!DOCTYPE html><html lang="en"><head><meta charset="UTF-8">{_POLICY}<title>Data validation of {escape(params.dataset)}</title><style>{_STYLE}</style></head>'
    return head + "<body>" + "\n".join(parts) + "</body></html>\n"
