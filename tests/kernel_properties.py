"""What each operator must compute: a property, the cases that it is drawn from, and its bound.

check_X(kernels, case) compares X of the package `kernels`, or of a mutant of it, on Triton with its
naive twin in float64. The same properties hold wherever Triton runs: in its interpreter
(test_kernels.py), as PTX (machine/test_kernels_ptx.py), and compiled for a GPU:

    python tests/kernel_properties.py    # on a GPU, minutes: a line for each, "ok" or what is wrong

Bounds follow from the arithmetic, not from trial. With u the unit roundoff of a dtype (half its
eps), a result that passes `roundings` times through the storage dtype and sums `length` products in
float32 is within

    (roundings * u(dtype) + (length + 16) * u(float32)) * size

of the exact one, where size is the same operation on absolute values (so that cancellation hides
nothing) and 16 covers the few float32 operations around the sum. float16 also underflows.

The convolution sums up to millions of products of random signs, and that bound would allow any
result. Their roundings are independent: what holds of them is the root of the sum of their squares.
So there size is |exact| + 6 * spread, six standard deviations, with spread the root of the same
operation on squares; and a running sum's roundings grow with the root of its length.
"""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

# The same cases on every run. One that fails is not made smaller: each step would compile kernels.
DRAWN = settings(deadline=None, derandomize=True, database=None,
                 suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])


# ------------------------------------------------------------------------------------------- bounds


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def bound(size: Tensor, dtype: torch.dtype, roundings: int, length: float) -> Tensor:
    """The bound above, plus what each summand can lose below the dtype's normal numbers.

    A GPU's exponential gives 0 where float32's result is below its normal numbers.
    """
    relative = roundings * unit(dtype) + (length + 16) * unit(torch.float32)
    limits = torch.finfo(dtype)
    largest = max(1.0, size.max().item()) if size.numel() else 1.0
    underflow = (length + roundings) * limits.smallest_normal * limits.eps
    flushed = length * torch.finfo(torch.float32).smallest_normal
    return relative * size + (underflow + flushed) * largest


def spread(exact: Tensor, squares: Tensor) -> Tensor:
    """Six standard deviations of a sum of random signs."""
    return exact.abs() + 6 * squares.sqrt()


def assert_within(actual: Tensor, exact: Tensor, bound: Tensor, dtype: torch.dtype, what: str):
    assert actual.dtype == dtype, f"{what}: off by dtype: {actual.dtype}"
    assert actual.shape == exact.shape, f"{what}: {tuple(actual.shape)} for {tuple(exact.shape)}"
    actual = actual.detach().cpu().double()
    assert not actual.isnan().any(), f"{what}: off by NaN"
    if actual.numel():
        excess = ((actual - exact).abs() - bound).max()
        assert excess <= 0, f"{what}: off by {excess:.2g} too much"


@contextlib.contextmanager
def in_bounds():
    """Within it the interpreter's accesses must lie in the tensors that their launch was given: a
    stray one would read garbage, or end the process."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    spans = []

    def launch(self, *args, **kwargs):
        storages = [t.untyped_storage() for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        spans[:] = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
        return run(self, *args, **kwargs)

    def inside(pointers, mask):
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        found = [(addresses >= low) & (addresses < high) for low, high in spans]
        assert np.logical_or.reduce(found).all(), "an access is out of bounds"

    def masked_load(self, pointers, mask, *rest):
        inside(pointers, mask)
        return load(self, pointers, mask, *rest)

    def masked_store(self, pointers, value, mask, *rest):
        inside(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    run, load = GridExecutor.__call__, InterpreterBuilder.create_masked_load
    store = InterpreterBuilder.create_masked_store
    with (
        mock.patch.object(GridExecutor, "__call__", launch),
        mock.patch.object(InterpreterBuilder, "create_masked_load", masked_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", masked_store),
    ):
        yield


# ------------------------------------------------------------------------------------------- inputs


def random(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(size, generator=generator)


LAYOUTS = ("contiguous", "transposed", "sliced", "padded")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides: last two axes swapped in memory, every second element of
    a larger one, or rows with a gap."""
    if layout == "transposed" and tensor.ndim >= 2:
        return tensor.mT.contiguous().mT
    if layout == "sliced":
        larger = tensor.new_empty([2 * n for n in tensor.shape])
        larger[tuple(slice(None, None, 2) for _ in tensor.shape)] = tensor
        return larger[tuple(slice(None, None, 2) for _ in tensor.shape)]
    if layout == "padded":
        return torch.nn.functional.pad(tensor, (0, 5))[..., : tensor.shape[-1]]
    return tensor.contiguous()


def place(tensor: Tensor | None) -> Tensor | None:
    """On the device, with the strides and the offset that it has here: .to() would close gaps."""
    if tensor is None or DEVICE == "cpu":
        return tensor
    memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(DEVICE)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def squared(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double() ** 2


def with_gradients(function, convert, inputs, upstream) -> list[Tensor | None]:
    """The output, then each input's gradient under the upstream one, None for an input of None.

    convert: what is made of every input and of the upstream gradient.
    """
    leaves = [None if t is None else convert(t).detach().requires_grad_() for t in inputs]
    output = function(*leaves)
    given = [t for t in leaves if t is not None]
    gradients = iter(torch.autograd.grad(output, given, convert(upstream)))
    return [output, *(None if t is None else next(gradients) for t in leaves)]


# --------------------------------------------------------------------------------------------- RPAM


class AttentionCase(NamedTuple):
    B: int = 2
    S: int = 3
    N: int = 67
    d: int = 24
    dtype: torch.dtype = torch.float32
    layouts: tuple[str, ...] = ("packed",) * 3  # of q, k, v; A has the first
    scale: float = 1.0  # of q: how large logits get
    shift: float = 0.0  # lowers all logits by shift^2 / sqrt(d)
    same: bool = False  # one query and one value for all tokens: errors do not average out
    upstream: str = "contiguous"  # the upstream gradients' layout
    seed: int = 0


ANY_LAYOUT = st.sampled_from(["packed", *LAYOUTS])
ATTENTIONS = st.builds(
    AttentionCase,
    B=st.sampled_from([1, 2]), S=st.sampled_from([1, 2, 3]),
    N=st.sampled_from([1, 2, 13, 31, 33, 64, 65, 67, 127, 255, 256]),
    d=st.sampled_from([8, 16, 24, 32, 64, 80]), dtype=st.sampled_from(DTYPES),
    layouts=ANY_LAYOUT.map(lambda layout: (layout,) * 3) | st.tuples(*[ANY_LAYOUT] * 3),
    scale=st.sampled_from([1.0, 8.0, 64.0]), shift=st.sampled_from([0.0, 24.0]), same=st.booleans(),
    upstream=st.sampled_from(LAYOUTS), seed=st.integers(0, 2**20),
)


def attention_inputs(case: AttentionCase) -> list[Tensor]:
    """q, k, v (B, S, T, d): views of one packed projection, or with layouts of their own."""
    packed = random(case.seed)(case.B, case.N + 1, 3, case.S, case.d)
    if case.same:
        packed[:, :, 0::2] = packed[:, :1, 0::2].clone()
    packed[:, :, 0] *= case.scale
    packed[:, :, 0, :, 0] += case.shift
    packed[:, :, 1, :, 0] -= case.shift
    views = packed.to(case.dtype).permute(2, 0, 3, 1, 4)
    return [t if layout == "packed" else laid_out(t, layout)
            for t, layout in zip(views, case.layouts)]


def check_attention(kernels, case: AttentionCase) -> None:
    """Eq. 4 with both maps, from q, k and v.

    A logit sums d products: error delta, relative in exp and in its row's sum. A sum of T
    probabilities has T independent roundings: six standard deviations are below 6 sqrt(T) u. So A
    is off by 2 delta + 6 sqrt(T) u, and M^r, a product of two of them, by twice that and its sums.
    """
    q, k, v = attention_inputs(case)
    out, cls_attn, relation = kernels.attention(
        place(q), place(k), place(v), relation=True, backend="triton")
    exact = reference.attention(q.double(), k.double(), v.double(), relation=True)

    T, wide = case.N + 1, torch.float32
    logits = (q.double().abs() @ k.double().abs().mT / case.d**0.5).amax().item()
    sums = 6 * T**0.5
    in_units = 2 * (case.d + 16) * logits + sums  # the error of A as a number of float32 roundings
    sizes = reference.attention(q.double(), k.double(), v.double().abs())[0]
    assert_within(out, exact[0], bound(sizes, case.dtype, 2, in_units + T), case.dtype, "out")
    assert_within(
        cls_attn, exact[1], bound(exact[1], wide, 0, in_units + case.S), wide, "cls_attn")
    assert_within(
        relation, exact[2], bound(exact[2], wide, 0, 2 * in_units + sums + case.S), wide,
        "relation")


def check_class_row(kernels, case: AttentionCase) -> None:
    """M^c without M^r, and its gradients, which pass through the dtype once.

    A softmax's gradient A (g - sum A g) is at most max |g| A, and a logit's error delta enters A.
    """
    q, k, v = attention_inputs(case)
    upstream = laid_out(random(case.seed + 1)(case.B, case.N + 1), case.upstream)

    def run(convert, attention):
        return with_gradients(
            lambda q, k: attention(q, k, convert(v))[1], convert, (q, k), upstream)

    cls_attn, *gradients = run(place, functools.partial(kernels.attention, backend="triton"))
    exact, *exact_gradients = run(double, reference.attention)

    q, k, root = q.double(), k.double(), case.d**0.5
    logits = (q[:, :, :1].abs() @ k.abs().mT / root).amax().item()
    in_units = int(2 * (case.d + 16) * logits) + case.N
    wide = torch.float32
    assert_within(cls_attn, exact, bound(exact, wide, 0, in_units + case.S), wide, "cls_attn")
    rows = (q[:, :, :1] @ k.mT / root).softmax(-1)[:, :, 0]  # (B, S, T)
    g = 2 * upstream.abs().double().amax() * rows / case.S / root
    sizes = torch.zeros_like(q), g[..., None] * q[:, :, :1].abs()
    sizes[0][:, :, 0] = (g[..., None] * k.abs()).sum(2)
    for gradient, exact, size, name in zip(gradients, exact_gradients, sizes, "qk"):
        limit = bound(size, case.dtype, 2, 2 * in_units + case.N)
        assert_within(gradient, exact, limit, case.dtype, f"class row, gradient of {name}")


def check_aggregate_attention(kernels, case: AttentionCase) -> None:
    """Both maps from A, whose rows are softmaxes, so that nothing cancels."""
    T = case.N + 1
    attn = random(case.seed)(case.B, case.S, T, T).softmax(-1).to(case.dtype)
    attn = laid_out(attn, case.layouts[0])
    maps = kernels.aggregate_attention(place(attn), backend="triton")
    exact = reference.aggregate_attention(attn.double())
    lengths = case.S, 2 * case.S * T
    for actual, expected, length, what in zip(maps, exact, lengths, ("M^c", "M^r")):
        limit = bound(expected, case.dtype, 1, length)
        assert_within(actual, expected, limit, torch.float32, f"aggregate_attention, {what}")


# ---------------------------------------------------------------------------------------------- CDM


class ConvCase(NamedTuple):
    B: int = 2
    D: int = 37
    C: int = 21
    G: int = 3
    h: int = 5
    w: int = 8
    k: int = 3
    dtype: torch.dtype = torch.float32
    layouts: tuple[str, ...] = ("tokens", "contiguous", "contiguous", "contiguous")  # of the inputs
    bias: bool = True
    pool: str = "gap"
    K: int = 3  # requested classes
    level: float = 0.0  # added to x
    seed: int = 0


CONVOLUTIONS = st.builds(
    ConvCase,
    B=st.sampled_from([1, 2]), D=st.sampled_from([1, 5, 33, 66]), C=st.sampled_from([1, 3, 21, 65]),
    G=st.sampled_from([1, 2, 3, 4, 5, 9]), h=st.sampled_from([1, 2, 7]),
    w=st.sampled_from([1, 3, 5, 19]), k=st.sampled_from([1, 3]), dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(st.sampled_from(["tokens", *LAYOUTS]), *[st.sampled_from(LAYOUTS)] * 3),
    bias=st.booleans(), pool=st.sampled_from(["gap", "padded"]), K=st.sampled_from([1, 2, 5, 9]),
    level=st.just(0.0), seed=st.integers(0, 2**20),
)


def conv_inputs(case: ConvCase) -> list[Tensor | None]:
    """x (B, D, h, w) as the token view or with a layout of its own; scores, weight, bias."""
    B, D, C, G, h, w, k, dtype, layouts = case[:9]
    normal = random(case.seed)
    x = (normal(B, h * w + 1, D) + case.level).to(dtype)[:, 1:].mT.unflatten(2, (h, w))
    bias = normal(C).to(dtype) if case.bias else None
    inputs = x, normal(B, G).sigmoid().to(dtype), (normal(G, C, D, k, k) / 4).to(dtype), bias
    return [t if t is None or layout == "tokens" else laid_out(t, layout)
            for t, layout in zip(inputs, layouts)]


def requested_classes(case: ConvCase) -> Tensor:
    """Ids (B, K)."""
    generator = torch.Generator().manual_seed(case.seed)
    classes = torch.randint(case.C, (case.B, case.K), generator=generator)
    return laid_out(classes, case.layouts[1])


def check_dynamic_conv2d(kernels, case: ConvCase) -> None:
    """Eq. 6, all maps. They pass through the dtype twice: mixed kernel, output."""
    inputs = conv_inputs(case)
    maps = kernels.dynamic_conv2d(*map(place, inputs), backend="triton")
    exact = reference.dynamic_conv2d(*map(double, inputs))
    size = spread(exact, reference.dynamic_conv2d(*map(squared, inputs)))
    length = (case.D * case.G * case.k**2) ** 0.5
    assert_within(maps, exact, bound(size, case.dtype, 2, length), case.dtype, "dynamic_conv2d")


def check_class_maps(kernels, case: ConvCase) -> None:
    """Eq. 6 at the requested classes. Mixed kernel, output, and output with bias each pass through
    the dtype."""
    inputs, classes = conv_inputs(case), requested_classes(case)
    maps = kernels.class_maps(*map(place, inputs), place(classes), backend="triton")
    exact = reference.class_maps(*map(double, inputs), classes)
    size = spread(exact, reference.class_maps(*map(squared, inputs), classes))
    length = (case.D * case.G * case.k**2) ** 0.5
    assert_within(maps, exact, bound(size, case.dtype, 3, length), case.dtype, "class_maps")


def check_class_ids(kernels, case: ConvCase, backend: str = "triton") -> None:
    """Ids outside 0 .. C-1, half of all, give NaN; the others what they give without them.

    In CPU memory class_maps refuses such ids. On a GPU nobody reads them before the kernel runs.
    """
    inputs, known = conv_inputs(case), requested_classes(case)
    generator = torch.Generator().manual_seed(case.seed)
    unknown = torch.tensor([-1, case.C, 2**31 - 1, -(2**31), 2**32, -(2**40)])
    drawn = unknown[torch.randint(len(unknown), known.shape, generator=generator)]
    is_known = torch.rand(known.shape, generator=generator) < 0.5
    mixed = laid_out(known.where(is_known, drawn), case.layouts[1])
    with mock.patch.object(kernels, "check_classes"):
        alone, together = (
            kernels.class_maps(*map(place, inputs), place(ids), backend=backend).cpu()
            for ids in (known, mixed))
    assert together[~is_known].isnan().all(), "class_maps: off by an unknown class"
    assert torch.equal(together[is_known], alone[is_known]), "class_maps: off by its neighbours"


def check_dynamic_conv_logits(kernels, case: ConvCase) -> None:
    """The pool of Eq. 6 and its gradients. Each step is rounded to the dtype: window sums, GEMM,
    product with the score, sum over g, bias; and as many back."""
    inputs, P, taps = conv_inputs(case), case.h * case.w, case.k**2
    upstream = random(case.seed + 1)(case.B, case.C).to(case.dtype)
    options = dict(pool=case.pool)
    logits = functools.partial(kernels.dynamic_conv_logits, backend="triton", **options)
    naive = functools.partial(reference.dynamic_conv_logits, **options)
    found = with_gradients(logits, place, inputs, upstream)
    exact, squares = (
        with_gradients(naive, convert, inputs, upstream) for convert in (double, squared))

    B, D, C, G = case[:4]
    lengths = (D * taps * G * P, C * taps * G, C * D * taps * P, B * P, B * P)
    names = ("value", *(f"gradient of {name}" for name in ("x", "scores", "weight", "bias")))
    for a, e, s, length, name in zip(found, exact, squares, lengths, names):
        if e is not None:
            limit = bound(spread(e.detach(), s.detach()), case.dtype, 6, length**0.5)
            assert_within(a, e, limit, case.dtype, f"dynamic_conv_logits, {name}")


# -------------------------------------------------------------------------------------- all of them

PROPERTIES = {
    check_attention: ATTENTIONS, check_class_row: ATTENTIONS, check_aggregate_attention: ATTENTIONS,
    check_dynamic_conv2d: CONVOLUTIONS, check_dynamic_conv_logits: CONVOLUTIONS,
    check_class_maps: CONVOLUTIONS, check_class_ids: CONVOLUTIONS,
}
DEIT_SMALL = {
    ATTENTIONS: AttentionCase(B=2, S=6, N=196, d=64),
    CONVOLUTIONS: ConvCase(B=2, D=384, C=200, G=4, h=14, w=14),
}


def hold(check, dtype: torch.dtype, examples: int, keep=lambda case: True) -> None:
    """A property of PROPERTIES, for drawn cases that `keep` keeps."""
    @settings(DRAWN, max_examples=examples)
    @given(PROPERTIES[check].filter(keep))
    def drawn(case):
        check(kernels, case._replace(dtype=dtype))

    drawn()


NAMES = {f"{check.__name__}, {str(dtype)[6:]}": (check, dtype)
         for dtype in DTYPES for check in PROPERTIES}


def verdict(check, dtype: torch.dtype, examples: int) -> str:
    """Of a property where this process runs Triton, first at DeiT-S's shape if that is a GPU."""
    try:
        if DEVICE == "cuda":
            check(kernels, DEIT_SMALL[PROPERTIES[check]]._replace(dtype=dtype))
        hold(check, dtype, examples)
        return "ok"
    except Exception as error:  # the next property may still tell something
        message = str(error).strip() or type(error).__name__
        return message.splitlines()[0]


def main(examples: int = 12, processes: int = min(8, os.cpu_count())) -> None:
    """Every property in every dtype, side by side: most of the time goes into compiling."""
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"))
    with pool:
        verdicts = {name: pool.submit(verdict, *shard, examples) for name, shard in NAMES.items()}
        for name, future in verdicts.items():
            print(f"{name}: {future.result()}", flush=True)


if __name__ == "__main__":
    main()
