# SPDX-License-Identifier: Apache-2.0
"""Cautions: what the gate's floors let pass and a person should know."""

import pytest

from panda_ad.registry.cautions import cautions, promise

GOOD = {
    "image_auroc": 0.98, "image_auroc_low": 0.95, "image_auroc_high": 1.0, "recall": 0.9, "false_alarm_rate": 0.05, "test_good": 40,
    "test_defect": 20,
}  # fmt: skip


def test_a_good_version_has_none():
    assert cautions(GOOD, 0.05) == [] and cautions({}, 0.05) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"recall": 0.12}, "it catches 12 % of the test set's defects"),
        ({"false_alarm_rate": 0.25}, "it alarms on 25 % of the good test images where 5 % are promised"),
        ({"image_auroc": 0.677, "image_auroc_low": 0.52, "image_auroc_high": 0.818}, "0.677 [0.520, 0.818] is hardly"),
        ({"test_defect": 1}, "the test set has only 1 defective image, so its figures say little"),
        ({"test_defect": 0, "recall": float("nan")}, "no defective test images: what it catches has not been measured"),
    ],
)
def test_each_weakness_is_named_once(change, said):
    (found,) = cautions(GOOD | change, 0.05)
    assert said in found


def test_a_single_false_alarm_is_no_reason():
    assert cautions(GOOD | {"test_good": 8, "false_alarm_rate": 1 / 8}, 0.05) == []


def test_a_test_set_of_good_images_alone_is_said_not_to_measure():
    (found,) = cautions({"false_alarm_rate": 0.0, "test_good": 30, "test_defect": 0}, 0.05)
    assert "no defective test images" in found
    assert len(cautions({"test_good": 0, "test_defect": 0}, 0.05)) == 2


def test_the_promise_says_what_it_is_of():
    said = promise({}, 0.05)
    assert said.startswith("5 % false alarms on parts photographed as those of the training were; what another")
    known = {"sessions": 6, "within_sessions_rate": 0.012, "unseen_session_rate": 0.05}
    ends = {"within_sessions_rate_low": 0.0, "within_sessions_rate_high": 0.041, "unseen_session_rate_low": 0.008}
    said = promise(known | ends | {"unseen_session_rate_high": 0.24}, 0.05)
    assert said == "false alarms within sessions 1.2 % [0, 4.1], on a session never seen 5 % [0.8, 24], by 6 sessions"
