# SPDX-License-Identifier: Apache-2.0
"""Versions of a bundle's layout: which can be read, and what renews the others.

1 to 5  PyTorch computed the network.
6       ONNX Runtime does, and Pillow resizes. A heat map per level, whose peak is the map score.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from panda_ad.errors import UserError

FORMAT = 6
"""Version of the bundle's layout that is written, and the only one that is read."""


def check_format(config: Mapping[str, Any], where: object) -> None:
    """Refuse a bundle of another format, since it would score otherwise than it was calibrated.

    Raises UserError, which says what to do.
    """
    found = config["format"]
    if found > FORMAT:
        raise UserError(f"{where}: bundle format {found} is newer than this panda-ad's ({FORMAT}); update panda-ad")
    if found < FORMAT:
        raise UserError(
            f"{where}: bundle format {found} is of an earlier panda-ad, which scored otherwise ({FORMAT} now); "
            "`panda-ad run` makes the model anew"
        )
