# SPDX-License-Identifier: Apache-2.0
"""The models in place, one per category, looked up in the registry now and then and never while a page waits."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from panda_ad.errors import UserError
from panda_ad.params import Params
from panda_ad.registry.load import Model
from panda_ad.registry.names import model_name
from panda_ad.registry.versions import download_version
from panda_ad.scoring.bundle import load_bundle

Look = Callable[[str], tuple[str, str, Path]]
"""A category's model in place: name, version, bundle folder. UserError where there is none."""

FRESH = 20.0
"""Seconds between two looks at the registry."""
_KEPT = 4
"""Detectors in memory at a time."""


class Models:
    """The registered version at an alias of each category; for several threads, one of which loads.

    Parameters
    ----------
    look : where models are found; by default the registry's versions at `alias`.
    """

    def __init__(self, params: Params, alias: str = "staging", look: Look | None = None) -> None:
        self._look_up = look or (lambda c: download_version(f"models:/{model_name(params.dataset, c)}@{alias}"))
        self._lock = threading.Lock()
        self._found: OrderedDict[str, Model] = OrderedDict()
        self._looked: dict[str, float] = {}
        self.problems: dict[str, str] = {}

    def known(self, category: str) -> Model | None:
        """Return the model as it was when it was last looked up, without looking; None if it never was."""
        return self._found.get(category)

    def stale(self, category: str) -> bool:
        """Whether it is time to look again."""
        return time.monotonic() - self._looked.get(category, -FRESH) >= FRESH

    def forget(self, category: str) -> None:
        """Look again at the next occasion: an alias was moved."""
        self._looked.pop(category, None)

    def current(self, category: str) -> Model:
        """Return the model in place.

        One that is known serves on while the registry does not answer; `problems` says so.

        Raises
        ------
        UserError
            There is none, or it cannot be loaded.
        """
        with self._lock:
            if self.stale(category) or category not in self._found:
                self._look(category)
            return self._found[category]

    def _look(self, category: str) -> None:
        known = self._found.get(category)
        try:
            name, version, folder = self._look_up(category)
            if known is None or (known.name, known.version) != (name, version):
                self._found[category] = Model(load_bundle(folder), name, version)
            self.problems.pop(category, None)
        except UserError as e:
            self.problems[category] = str(e)
            if known is None:
                raise
        self._looked[category] = time.monotonic()
        self._found.move_to_end(category)
        while len(self._found) > _KEPT:
            self._found.popitem(last=False)
