# SPDX-License-Identifier: Apache-2.0
"""Image anomaly detection with pretrained features (PANDA, Reiss et al., CVPR 2021, arXiv 2010.05903)."""

import os

# read by OpenMP and OpenBLAS when they are loaded: images run side by side, each on one thread, and threads that
# wait must not spin, which on a busy machine takes the cores from those that work
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

__version__ = "0.1.0"
