# SPDX-License-Identifier: Apache-2.0
"""Image anomaly detection with pretrained features (PANDA, Reiss et al., CVPR 2021, arXiv 2010.05903)."""

__version__ = "0.1.0"
