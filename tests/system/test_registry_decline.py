# SPDX-License-Identifier: Apache-2.0
"""Small steps down, each within the margin, come to an end."""

import pytest
from registry_project import NAME, aliases, read_rows, retrained, set_gate, write_rows

from panda_ad.errors import GateRefused
from panda_ad.registry.connection import connect
from panda_ad.registry.promote import _best_before, promote, rollback
from panda_ad.registry.versions import find_version, registered
from panda_ad.stages.publish import main as publish

MARGIN = 0.1


@pytest.fixture
def project(project):
    """A repository with a faultless version 1 at staging and a gate that looks at image AUROC alone; the working directory."""
    set_gate(
        project,
        margin=MARGIN,
        recall_margin=None,
        decision_margin=None,
        confidence=0.5,
        min_image_auroc=None,
        false_alarm_risk=None,
    )
    publish("fabric")
    promote()
    return project


def creep(folder):
    """Promote ever worse versions until one is refused; AUROC of the last that was promoted, and why the next one was not."""
    passed = 1.0
    for step in range(1, 12):
        retrained(folder, quality=1 - step * 0.08, weights=b"%d" % step)
        publish("fabric")
        try:
            promote()
        except GateRefused as e:
            return passed, str(e)
        passed = float(connect().get_model_version_by_alias(NAME, "staging").tags["panda.image_auroc"])
    raise AssertionError(f"nothing stopped it: AUROC {passed}")


def test_without_a_champion_the_best_version_before_is_the_measure(project):
    passed, reason = creep(project)
    assert aliases()["staging"] > 3 and 1 - 2 * MARGIN <= passed < 1 - MARGIN
    assert "image AUROC near the best promoted before: " in reason and "not worse" not in reason
    promote(to="champion")  # a person accepts what is in place, and that is the measure from here on
    assert promote()[0].outcome == "promoted"


def test_the_champion_stays_the_measure_while_staging_moves(project):
    promote(to="champion")
    passed, reason = creep(project)
    assert aliases()["staging"] > 2 and aliases()["champion"] == 1 and 1 - 1.5 * MARGIN <= passed < 1
    assert "image AUROC not worse than the champion's: " in reason and "near the best" not in reason


def test_versions_rolled_back_or_tested_on_other_images_are_no_measure(project):
    retrained(project, quality=0.5, weights=b"poor")
    publish("fabric")
    rollback("fabric", to_version=2)  # version 1 had looked too good
    retrained(project, quality=0.45, weights=b"fair")
    publish("fabric")
    assert promote()[0].outcome == "promoted"
    rollback("fabric", to_version=1)
    rows = read_rows(project / "build/validation/manifest.csv")
    for manifest, best in ((rows, 1.0), (rows[:-1], None)):
        write_rows(project / "build/validation/manifest.csv", manifest)
        retrained(project, weights=b"of %d images" % len(manifest))
        publish("fabric")
        client = connect()
        assert (
            _best_before(client, registered(client, NAME), find_version(client, f"{NAME}@challenger"), "staging")
            == best
        )
