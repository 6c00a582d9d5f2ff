"""Triton's interpreter must be chosen before triton is imported; without it the kernels cannot run on a CPU."""

import os

os.environ["TRITON_INTERPRET"] = "1"
