# SPDX-License-Identifier: Apache-2.0
"""The outcome of validation as one HTML page that loads and runs nothing."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment

from panda_ad.data.validation import Validation
from panda_ad.params import Params

SHOWN = 200
"""Problems listed; problems.csv has them all."""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="UTF-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Data validation of {{ dataset }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; max-width: 1100px; padding: 0 1.5rem 3rem; }
table { border-collapse: collapse; margin: .5rem 0; }
td, th { border: 1px solid #ddd; padding: .3rem .6rem; text-align: left; vertical-align: top; }
th { background: #f3f4f6; } td.number { text-align: right; } td { overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin: 1.5rem 0 .3rem; }
.passed { color: #15803d; } .failed { color: #b91c1c; } .missing { color: #92590a; }
</style>
</head>
<body>
{%- set outcome = 'failed' if fatal else 'passed' %}
<h1>Data validation of {{ dataset }}: <span class="{{ outcome }}">{{ outcome }}</span>
{%- if problems and not fatal %}, bad files left out{% endif %}</h1>
<p>{{ usable }} rows of usable images, {{ problems|length }} bad files, {{ shortages|length }} shortages.</p>
<h2>Expectations</h2>
<table>
<tr><th scope="col">outcome</th><th scope="col">expectation</th>
<th scope="col">rows that break it</th><th scope="col">in Great Expectations</th></tr>
{%- for e in expectations %}
<tr>{% if e.success %}<td class="passed">✓ met</td>
{%- elif e.needed %}<td class="failed">✗ broken</td>
{%- else %}<td class="missing">! missing</td>{% endif -%}
<td>{{ e.description }}</td><td class="number">{{ e.unexpected if e.unexpected is not none }}</td>
<td><code>{{ e.name }}</code></td></tr>
{%- endfor %}
</table>
{%- if shortages or problems %}
<h2>Problems</h2>
<table>
<tr><th scope="col">path</th><th scope="col">reason</th></tr>
{%- for path, reason in (shortages + problems)[:shown] %}
<tr><td>{{ path }}</td><td>{{ reason }}</td></tr>
{%- endfor %}
</table>
{%- if shortages|length + problems|length > shown %}
<p>... and {{ shortages|length + problems|length - shown }} more in problems.csv</p>
{%- endif %}
{%- endif %}
{%- if warnings %}
<h2>Worth a look</h2>
<ul>
{%- for line in warnings %}
<li>{{ line }}</li>
{%- endfor %}
</ul>
{%- endif %}
<h2>Images</h2>
<table>
<tr><th scope="col">category</th><th scope="col">split</th><th scope="col">defect</th><th scope="col">images</th></tr>
{%- for row in counts %}
<tr><td>{{ row[0] }}</td><td>{{ row[1] }}</td><td>{{ row[2] }}</td><td class="number">{{ row[3] }}</td></tr>
{%- endfor %}
</table>
</body>
</html>
"""


def render(found: Validation, params: Params) -> str:
    """Return the page. Names of files are escaped, whatever they hold."""
    usable = found.usable
    counts: Sequence[Sequence[object]] = [
        [*key, n] for key, n in usable.groupby(["category", "split", "defect"], sort=False).size().items()
    ]
    page = Environment(autoescape=True, keep_trailing_newline=True).from_string(_PAGE)
    return page.render(
        dataset=params.dataset,
        fatal=found.fatal(params),
        usable=len(usable),
        problems=found.problems,
        shortages=found.shortages,
        warnings=found.warnings,
        expectations=found.expectations,
        counts=counts,
        shown=SHOWN,
    )
