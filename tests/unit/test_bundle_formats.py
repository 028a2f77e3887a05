# SPDX-License-Identifier: Apache-2.0
"""A bundle of another format is refused in one line that says what to do: it would score otherwise than it was calibrated."""

import json
import shutil

import pytest

from panda_ad.errors import UserError
from panda_ad.scoring.bundle import load_bundle
from panda_ad.scoring.bundle_formats import FORMAT


@pytest.mark.parametrize(
    ("format", "said"),
    [
        (FORMAT + 1, "is newer than this panda-ad's .*; update panda-ad"),
        (FORMAT - 1, "is of an earlier panda-ad.*`panda-ad run` makes the model anew"),
        (2, "is of an earlier panda-ad.*`panda-ad run` makes the model anew"),
    ],
)
def test_another_format_is_refused_before_anything_else_is_read(tmp_path, format, said):
    (tmp_path / "bundle.json").write_text(json.dumps({"format": format}))
    with pytest.raises(UserError, match=f"bundle format {format} {said}") as e:
        load_bundle(tmp_path)
    assert "\n" not in str(e.value)
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match=r"not a bundle, bundle.json is missing"):
        load_bundle(tmp_path)
