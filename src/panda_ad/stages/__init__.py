"""The DVC stages, one module each: read files, call the core, write files. `python -m panda_ad.stages.NAME [CATEGORY]`."""
