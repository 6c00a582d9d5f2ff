"""The operators in Triton, by torch_path's names. Imported only where they run: a CPU user needs no
triton."""

import os

from .cdm import class_products, dynamic_conv2d, window_sums
from .rpam import aggregate_attention, attention_relation, class_row

__all__ = [
    "aggregate_attention", "attention_relation", "class_row", "class_products", "dynamic_conv2d",
    "window_sums",
]

if os.environ.get("TRITON_INTERPRET") == "1":
    from . import interpreter

    interpreter.enable()
