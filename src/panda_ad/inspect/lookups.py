# SPDX-License-Identifier: Apache-2.0
"""What the registry says of each category, kept for seconds, and where MLflow's and Prefect's own pages are."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

from panda_ad.registry.in_place import InPlace, in_place
from panda_ad.registry.names import model_name

SERVERS = Path(".prefect/ui.json")
"""Where `panda-ad ui` says under which addresses its servers answer."""

FRESH = 10.0
"""Seconds for which what the registry said is shown again."""


class Lookups:
    """What the registry says of each category of a data set; for several threads."""

    def __init__(self, dataset: str) -> None:
        self._dataset, self._lock = dataset, threading.Lock()
        self._found: dict[str, tuple[float, InPlace]] = {}

    def get(self, category: str) -> InPlace:
        """Return it. UserError where there is no such model, or MLflow does not answer."""
        with self._lock:
            when, found = self._found.get(category, (-FRESH, None))
            if found is None or time.monotonic() - when > FRESH:
                found = in_place(model_name(self._dataset, category), category, servers()[0])
                self._found[category] = (time.monotonic(), found)
            return found

    def forget(self, category: str) -> None:
        """Look again next time."""
        self._found.pop(category, None)


def servers() -> tuple[str, str]:
    """Return the addresses of MLflow and Prefect that `panda-ad ui` serves now; '' where it does not."""
    try:
        known = json.loads(SERVERS.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "", ""
    mlflow, prefect = (str(known.get(name, "")) for name in ("mlflow", "prefect"))
    return _address(mlflow), _address(prefect)


def _address(text: str) -> str:
    return text if urlsplit(text).scheme in ("http", "https") else ""
