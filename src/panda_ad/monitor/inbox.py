# SPDX-License-Identifier: Apache-2.0
"""Which images of a drop folder are to be scored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Set
from pathlib import Path

from panda_ad.monitor.log import LOG, holders
from panda_ad.system.files import digest_if_readable, write_text

CACHE = Path(".cache/inbox")
"""Per category what its images held when they were last read, by path, size, times and identity; safe to delete."""


def due(
    files: Iterable[Path],
    category: str,
    model: str,
    version: str,
    window: int,
    seen: Set[str] = frozenset(),
    log: Path = LOG,
) -> list[Path]:
    """Return the files of a drop folder that a version has to score, oldest first, each content once.

    These are the files whose content the log does not hold of any version, and among the newest `window` files those
    whose content it does not hold of this version. Images that the version was made from (sha256 in `seen`) are not
    among the newest: monitoring leaves them out.

    The newest files fill the drift window of a version that has just been promoted. Scoring everything again would take
    hours, and say nothing of today. The order is by the files' time of change, since the log's order is that of
    scoring. A file that cannot be read stays in: the scorer says why.

    Raises
    ------
    UserError
        A file of the log is damaged.
    """
    found = _stats(files)
    digests = _digests(found, category)
    by_content: dict[str, Path] = {}
    for file in sorted(found, key=lambda f: (found[f][1], f)):
        by_content.setdefault(digests[file] or f"unreadable {file}", file)
    newest = set([key for key in by_content if key not in seen][-window:])
    held = holders(category, log)
    return [
        file
        for key, file in by_content.items()
        if key not in held or (key in newest and (model, version) not in held[key])
    ]


def _stats(files: Iterable[Path]) -> dict[Path, tuple[int, int, int, int]]:
    """Return size, time of change in ns, and what a file put in its place cannot keep.

    A file that has gone meanwhile is left out.
    """
    found = {}
    for file in files:
        try:
            stat = file.stat()
        except OSError:
            continue
        found[file] = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    return found


def _digests(found: dict[Path, tuple[int, int, int, int]], category: str) -> dict[Path, str]:
    """Return the sha256 of each file, '' if it cannot be read.

    A file read the last time is not read again unless it has changed.
    """
    path = CACHE / f"{category}.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    digests = {}
    for file, stat in found.items():
        *then, digest = known.get(str(file), [""])
        digests[file] = digest if digest and then == [*stat] else digest_if_readable(file)
    now = {str(file): [*stat, digests[file]] for file, stat in found.items()}
    if now != known:
        write_text(path, json.dumps(now))
    return digests
