"""Synthetic inspection images: what the sample data is made of (see scripts/make_sample.py)."""
