# SPDX-License-Identifier: Apache-2.0
"""From scoring to the verdict log: which images are new, and what is kept of each."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from panda_ad.data.listing import printable
from panda_ad.features.image_statistics import image_statistics
from panda_ad.monitor.log import LOG, Entry, append, known
from panda_ad.scoring.verdict import Verdict
from panda_ad.system.files import digest_file


class Recorder:
    """Collects the verdicts of one scoring run of a registered version and writes them to the log in one piece.

    Parameters
    ----------
    category, model, version : what is logged, e.g. 'fabric', 'panda-sample-fabric', '3'.
    threshold : that decided.
    log : the log's folder.
    """

    def __init__(self, category: str, model: str, version: str, threshold: float, log: Path = LOG) -> None:
        self.category, self.model, self.version, self.threshold, self.log = category, model, version, threshold, log
        self._digests: dict[Path, str] = {}
        self._entries: list[Entry] = []

    def fresh(self, files: Iterable[Path]) -> list[Path]:
        """Return the files whose content the log does not hold of this version, each content once.

        A file that cannot be read stays in: the scorer says why.
        """
        seen = known(self.category, self.model, self.version, self.log)
        found = []
        for file in files:
            try:
                digest = digest_file(file)
            except OSError:
                digest = ""
            if not digest:
                found.append(file)
            elif digest not in seen:
                seen.add(digest)
                self._digests[file] = digest
                found.append(file)
        return found

    def add(self, file: Path, rgb: np.ndarray, verdict: Verdict) -> None:
        """Keep the verdict of one of `fresh`'s files, whose pixels are uint8 (H, W, 3)."""
        if verdict.features is None:
            raise ValueError("log: a verdict without features")
        self._entries.append(
            Entry(
                datetime.now(UTC), printable(str(file)), self._digests.get(file) or digest_file(file),
                self.category, self.model, self.version,
                verdict.score, verdict.p_value, verdict.anomalous, self.threshold,
                image_statistics(rgb), verdict.features,
            )
        )  # fmt: skip

    def write(self) -> Path | None:
        """Append what was kept to the log; the file, or None if nothing was new."""
        return append(self._entries, self.log)
