# SPDX-License-Identifier: Apache-2.0
"""The DVC stages, one module each: read files, call the core, write files.

Each is run as `python -m panda_ad.stages.NAME [CATEGORY]`.
"""

import gc

# Importing torch or Great Expectations makes some million objects that stay.
# The default threshold collects among them hundreds of times.
gc.set_threshold(100_000, 50, 50)
