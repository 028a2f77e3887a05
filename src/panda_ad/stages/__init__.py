"""The DVC stages, one module each: read files, call the core, write files. `python -m panda_ad.stages.NAME [CATEGORY]`."""

import gc

# Importing torch or Great Expectations makes some million objects that stay; the default threshold collects among them hundreds of times.
gc.set_threshold(100_000, 50, 50)
