"""Makes Triton's interpreter compute bfloat16 correctly, and cuts its overhead.

The interpreter keeps a bfloat16 as 16 bits in a uint16: its casts round wrongly, and its dot
multiplies the bits as integers. enable() corrects both. All other bfloat16 arithmetic stays wrong:
kernels cast to float32 right after a load. A quarter to a half of the interpreter's time goes into
overflow checks of integer operations: enable() turns them off.

`kernels` calls enable() before every kernel that the interpreter runs.
"""

import dataclasses

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder

_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def enable() -> None:
    """Does nothing the second time."""
    InterpreterBuilder.cast_impl = _cast_right
    InterpreterBuilder.create_fp_to_fp = (
        lambda self, source, dtype, rounding: _cast_right(self, source, dtype))
    if InterpreterBuilder.create_dot is _dot:
        InterpreterBuilder.create_dot = _dot_right
    options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
    interpreter_builder.options = options


def _widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits -> float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits, to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _cast_right(self, source, dtype):
    if source.dtype.scalar == dtype.scalar:
        return source
    if source.dtype.scalar == tl.bfloat16:
        source = TensorHandle(_widen(source.data), tl.float32)
    if dtype.scalar == tl.bfloat16:
        return TensorHandle(_narrow(source.data), tl.bfloat16)
    return _cast(self, source, dtype)


def _dot_right(self, a, b, acc, *options):
    """Products of 16-bit numbers are exact in float32, where numpy has a fast matmul for them."""
    a, b = (_cast_right(self, tile, tl.float32) for tile in (a, b))
    return _dot(self, a, b, acc, *options)
