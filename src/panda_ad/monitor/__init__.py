"""Watching a model at work: image statistics, the verdict log, drift against the calibration images, a report.

Modules: `statistics` (what a photograph is like), `log` (verdicts as Parquet), `record` (from scoring into the log), `drift` (tests
and names), `check` (a category's recent window), `report` (one HTML page).
"""
