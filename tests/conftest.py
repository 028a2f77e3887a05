"""Fixtures shared by the tests."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """Root of this checkout."""
    return Path(__file__).resolve().parents[1]
