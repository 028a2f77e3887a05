# SPDX-License-Identifier: Apache-2.0
"""A version's certificates: that an exported folder scores as the version does."""

from __future__ import annotations

from collections.abc import Mapping

from panda_ad.params import plain_name
from panda_ad.registry.connection import connect, mlflow_errors
from panda_ad.registry.versions import find_version


def attach(model: str, number: str, certificate: Mapping[str, object]) -> str:
    """Log a certificate to the run of a registered version; return its path there.

    Parameters
    ----------
    model, number : name and version.
    certificate : as JSON has it; a later one of the same moment takes its place.
    """
    with mlflow_errors():
        client = connect()
        version = find_version(client, f"models:/{model}/{number}")
        when = "".join(c for c in str(certificate["exported"]) if c.isdigit())
        path = f"{plain_name(version.tags['panda.category'])}/certificates/version-{number}-{when}.json"
        client.log_dict(version.tags["panda.run"], dict(certificate), path)
        client.set_model_version_tag(model, number, "panda.certificate", str(certificate["exported"]))
    return path
