"""How every Triton kernel of this package is launched, addresses, and rounds its products."""

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
    """The tensor, copied if need be, so that 32 bits hold each offset inside its inner dimensions.

    A kernel adds the offsets of the `outer` first dimensions to its pointers, in 64 bits.
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
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "tf32x3"
    return "tf32" if matmul.allow_tf32 else "tf32x3"  # torch before 2.9
