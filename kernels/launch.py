"""How every Triton kernel of this package is launched, addresses, and rounds its products.

A kernel becomes an operator of torch by torch.library.custom_op, so that torch.compile and
torch.export take it as one node instead of tracing into its launch. Such an operator has up to
seven parts: the function that launches the kernel, and the same for its gradient; register_fake for
each, which gives shapes, dtypes and strides without data; what the forward pass saves and how the
gradient is called with it; and register_autograd, which joins these. rpam.py and cdm.py keep the
last five at their ends.
"""

import torch
from torch import Tensor


def launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """kernel[grid](*arguments, **options) on the device of its first argument.

    The grid's first axis may be long: it is the batch's. CUDA limits the other two.
    """
    if 0 in grid:  # an empty batch: nothing to do, and CUDA refuses such a grid
        return
    for size, limit, axis in zip(grid, (2**31 - 1, 65535, 65535), "xyz"):
        if size > limit:
            raise ValueError(f"{kernel.__name__}: got {size} programs along the grid's {axis} "
                             f"axis, need at most {limit}: pass smaller tensors")
    with torch.cuda.device_of(arguments[0]):  # does nothing for CPU tensors
        kernel[grid](*arguments, **options)


def short_offsets(name: str, tensor: Tensor, outer: int) -> Tensor:
    """The tensor such that an index within its dimensions from `outer` on has a 32-bit offset.

    Copied where its strides are too long. Raises ValueError where it has too many elements. What
    remains, the offset of the first `outer` dimensions, a kernel computes in 64 bits.
    """

    def reach(t: Tensor) -> int:
        return sum((n - 1) * stride for n, stride in zip(t.shape[outer:], t.stride()[outer:]))

    if reach(tensor) >= 2**31:
        tensor = tensor.contiguous()
    if reach(tensor) >= 2**31:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, the Triton kernels need fewer "
                         f"than 2^31 elements in its last {tensor.ndim - outer} dimensions")
    return tensor


def dot_precision() -> str:
    """How tl.dot multiplies float32 tiles.

    "tf32x3" is as exact as float32; "tf32" is taken only where the user allows torch TF32 too.
    AMD's compiler knows neither: "ieee".
    """
    if torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
