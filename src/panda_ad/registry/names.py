# SPDX-License-Identifier: Apache-2.0
"""How a category is called in MLflow's registry; `params.plain_name` is how in its runs."""

from __future__ import annotations


def model_name(dataset: str, category: str) -> str:
    """Return the name of the registered model."""
    return f"panda-{dataset}-{category}"
