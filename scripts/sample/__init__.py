# SPDX-License-Identifier: Apache-2.0
"""Synthetic inspection images: what the sample data is made of (see scripts/make_sample.py)."""
