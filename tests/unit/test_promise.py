# SPDX-License-Identifier: Apache-2.0
"""The audited budget: bounds that may be looked at often, verdicts on confirmed good parts, plot and table."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from panda_ad.evaluation.image_metrics import binomial_interval
from panda_ad.evaluation.rates import lower_bound
from panda_ad.features.image_statistics import NAMES
from panda_ad.monitor.budget import sessions_table
from panda_ad.monitor.log import Entry, append
from panda_ad.monitor.promise import confirmed_verdicts, realized
from panda_ad.monitor.promise_plot import plot

START = datetime(2026, 3, 1, tzinfo=UTC)


@given(st.integers(1, 400), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_the_bound_lies_below_the_rate_and_below_one_that_may_be_looked_at_once(images, share, confidence):
    alarms = round(share * images)
    low = lower_bound(alarms, images, confidence)
    assert 0 <= low <= alarms / images
    assert low <= binomial_interval(alarms, images, confidence)[0] + 1e-9
    assert low <= lower_bound(alarms, images, confidence - 0.1) + 1e-9


def test_the_bound_holds_however_often_one_looks():
    """Of 400 streams looked at after each of 300 images at most 5 % are ever wrongly above; one-time bounds are far oftener."""
    rng = np.random.default_rng(0)
    counts = np.cumsum(rng.random((400, 300)) < 0.1, axis=1)
    known = {}

    def ever(bound) -> float:
        wrong = 0
        for row in counts:
            for n in range(5, 301, 5):
                k = int(row[n - 1])
                if (k, n) not in known:
                    known[k, n] = bound(k, n)
                if known[k, n] > 0.1:
                    wrong += 1
                    break
        return wrong / len(counts)

    assert ever(lambda k, n: lower_bound(k, n, 0.95)) <= 0.05
    known.clear()
    assert ever(lambda k, n: binomial_interval(k, n, 0.9)[0]) > 0.1


def entry(number: int, version: str, anomalous: bool, hours: float) -> Entry:
    values = dict.fromkeys(NAMES, 0.5)
    when = START + timedelta(hours=hours)
    return Entry(
        when, f"{number}.png", f"{number:064x}", "fabric", "m", version, 1.0, 0.5, anomalous, 2.0, values, np.zeros(3)
    )


@pytest.fixture
def log(tmp_path):
    """Parts 0 to 9 scored by version 1, which alarms on even ones; 5 to 14 by version 2 a day later, which alarms on 14."""
    append([entry(n, "1", n % 2 == 0, n) for n in range(10)], tmp_path)
    append([entry(n, "2", n == 14, 24 + n) for n in range(5, 15)], tmp_path)
    return tmp_path


def test_verdicts_on_parts_that_proved_good(log):
    good = {f"{n:064x}": "week 1" if n < 8 else "" for n in range(15) if n != 3}
    first, own = confirmed_verdicts("fabric", "m", good, {"2": {f"{n:064x}" for n in (5, 6)}}, log)
    assert len(first) == 14 and (np.diff(first.times) > np.timedelta64(0)).all()
    assert first.versions.tolist() == ["1"] * 9 + ["2"] * 5 and first.alarms.sum() == 5 + 1
    assert [(name, len(part)) for name, part in first.by_session()] == [
        ("week 1", 7),
        ("2026-03-01", 2),
        ("2026-03-02", 5),
    ]
    assert len(own["2"]) == 8, "without those that it was made from"
    assert realized(own["2"], 0.95).alarms == 1 and realized(first, 0.95).rate == pytest.approx(6 / 14)
    nothing, _ = confirmed_verdicts("fabric", "m", {}, {}, log)
    assert len(nothing) == 0 and np.isnan(realized(nothing, 0.95).rate)
    assert len(confirmed_verdicts("fabric", "other", good, {}, log)[0]) == 0


def test_table_and_plot_say_which_session_is_above_the_promise(log):
    append([entry(100 + n, "2", n < 15, 100) for n in range(16)], log)
    good = {f"{n:064x}": "lamp <new>" if n >= 100 else "before" for n in [*range(15), *range(100, 116)]}
    first, _ = confirmed_verdicts("fabric", "m", good, {}, log)
    rows = sessions_table(first, 0.2, 0.95)
    assert [row[0] for row in rows] == ["session", "before", "lamp <new>"]
    assert [row[-1] for row in rows[1:]] == ["no", "yes"] and rows[2][2:5] == ("v2", "16", "15")
    root = ElementTree.fromstring(plot("fabric", first, 0.2, (0.1, 0.3), 0.95))
    colors = [e.get("fill") for e in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert len(colors) == 2 and colors[0] != colors[1]
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "lamp <new> (15 of 16)" in texts and {"v1", "v2"} <= set(texts)
    assert any("promised, 20 %" in text for text in texts)
