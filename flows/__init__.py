# SPDX-License-Identifier: Apache-2.0
"""The flows, and the only code that knows Prefect."""

import os

from panda_ad.system.surroundings import prepare

# Both before Prefect is imported, which reads its settings and looks for the user's home.
prepare()
# Without a server a flow starts one for itself; a busy machine needs more than Prefect's 20 seconds.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
