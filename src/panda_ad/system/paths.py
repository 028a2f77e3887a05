# SPDX-License-Identifier: Apache-2.0
"""Folders of a project, relative to its root: where stages write, and where caches lie."""

from pathlib import Path

BUILD = Path("build")
MANIFEST = BUILD / "validation" / "manifest.csv"
FEATURES = BUILD / "features"
NETWORK = BUILD / "network"
CACHE = Path(".cache")
LOG = Path("monitoring/log")
