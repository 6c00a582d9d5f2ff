"""What the tests of the kernels share: cases, their inputs, and checks of a function and its twin.

A check takes the package to test, `kernels` or a mutant of it, and calls it with backend="triton":
in Triton's interpreter, or compiled where device="cuda".

Tolerances follow from the arithmetic, not from trial. With u the unit roundoff of a dtype (half its
eps), a result that passes `roundings` times through the storage dtype and sums `length` products in
float32 is within

    (roundings * u(dtype) + (length + 16) * u(float32)) * magnitude

of the exact one, where magnitude is the same operation on absolute values (so that cancellation
hides nothing) and 16 covers the few float32 operations around the sum. float16 also underflows: see
near().
"""

from typing import NamedTuple

import torch

from kernels import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def near(actual, exact, magnitude, dtype, roundings, length, what="", stored=None):
    """The bound above, plus what each summand can lose below the dtype's normal numbers.

    `stored` is the dtype that the result must have, `dtype` where it is not given.
    """
    assert actual.dtype == (stored or dtype), f"{what}: off by dtype: {actual.dtype}"
    actual = actual.detach().cpu().double()
    limits = torch.finfo(dtype)
    relative = roundings * unit(dtype) + (length + 16) * unit(torch.float32)
    largest = max(1.0, magnitude.detach().max().item()) if magnitude.numel() else 1.0
    underflow = (length + roundings) * limits.smallest_normal * limits.eps * largest
    assert actual.shape == exact.shape, f"{what}: {tuple(actual.shape)} for {tuple(exact.shape)}"
    if actual.numel():
        excess = ((actual - exact).abs() - relative * magnitude - underflow).max()
        assert not actual.isnan().any() and excess <= 0, f"{what}: off by {excess:.2g} too much"


def random(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(size, generator=generator)


LAYOUTS = ("contiguous", "transposed", "sliced", "padded")


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
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


def check_twin(module, name, inputs, dtype, roundings, lengths, gradient_lengths, seed=0,
               device="cpu", wanted=None, stored=(), **options):
    """Outputs of one function on Triton, and gradients under random upstream, against its twin's.

    For functions that are sums of products: the twin at absolute values, and its gradients, are the
    magnitudes. wanted: the inputs whose gradients are asked for, all of them if None.
    """
    given = [i for i, t in enumerate(inputs) if t is not None]
    wanted = given if wanted is None else [i for i in given if i in wanted]

    def run(functions, convert, upstream, **options):
        leaves = [None if t is None else convert(t) for t in inputs]
        for i in wanted:
            leaves[i].requires_grad_()
        outputs = getattr(functions, name)(*leaves, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [convert(u) for u in upstream] or [
            normal(*o.shape).to(o.dtype).to(o.device) for o in outputs]
        if not wanted:
            return outputs, [], upstream
        gradients = torch.autograd.grad(outputs, [leaves[i] for i in wanted], upstream)
        return outputs, gradients, upstream

    def on_device(tensor):
        return tensor.detach().to(device) if device != "cpu" else tensor.detach()

    def double(tensor):
        return tensor.detach().cpu().double()

    normal = random(seed + 1)
    actual, gradients, upstream = run(module, on_device, [], backend="triton", **options)
    exact, exact_gradients, _ = run(reference, double, upstream, **options)
    sizes, size_gradients, _ = run(reference, lambda t: double(t).abs(), upstream, **options)
    for i, (a, e, m, length) in enumerate(zip(actual, exact, sizes, lengths, strict=True)):
        near(a, e, m, dtype, roundings, length, f"{name}, output {i}", *stored)
    lengths = [gradient_lengths[i] for i in wanted]
    for i, a, e, m, length in zip(wanted, gradients, exact_gradients, size_gradients, lengths):
        assert a.dtype == inputs[i].dtype, f"{name}: off by dtype"
        near(a, e, m, dtype, roundings, length, f"{name}, gradient of input {i}", a.dtype)


# ------------------------------------------------------------------------------------ RPAM


class AttentionCase(NamedTuple):
    B: int = 2
    S: int = 3
    N: int = 67
    d: int = 24
    dtype: torch.dtype = torch.float32
    layouts: tuple[str, ...] = ("packed",) * 3  # of q, k, v; A has the first
    scale: float = 1.0  # of q: how large scores get
    shift: float = 0.0  # lowers all scores by shift^2 / sqrt(d)
    seed: int = 0


def attention_inputs(case: AttentionCase):
    """q, k, v: views of one packed projection, but for those with a layout of their own."""
    normal, T = random(case.seed), case.N + 1
    packed = normal(case.B, T, 3, case.S, case.d)
    packed[:, :, 0] *= case.scale
    packed[:, :, 0, :, 0] += case.shift
    packed[:, :, 1, :, 0] -= case.shift
    views = packed.to(case.dtype).permute(2, 0, 3, 1, 4)
    return [t if layout == "packed" else laid_out(t, layout)
            for t, layout in zip(views, case.layouts)]


def check_attention(module, case: AttentionCase, device="cpu"):
    """relation=True. A logit sums d products: error delta, relative in exp and in its row's sum.

    So A is off by 2 delta + (T + 16) u(float32), and M^r, a product of two of them, by twice that
    and its own sums.
    """
    q, k, v = attention_inputs(case)
    on_device = [t.to(device) if device != "cpu" else t for t in (q, k, v)]
    out, cls_attn, relation = module.attention(*on_device, relation=True, backend="triton")
    exact = reference.attention(q.double(), k.double(), v.double(), relation=True)
    T, u = case.N + 1, unit(torch.float32)
    logits = (q.double().abs() @ k.double().abs().mT / case.d**0.5).amax()
    delta = (case.d + 16) * u * float(logits)
    in_units = int(2 * delta / u) + T  # the error of A as a number of float32 roundings
    sizes = reference.attention(q.double(), k.double(), v.double().abs())[0]
    wide = torch.float32
    near(out, exact[0], sizes, case.dtype, 2, in_units + T, "out")  # P and the result are rounded
    near(cls_attn, exact[1], exact[1], wide, 0, in_units + case.S, "cls_attn")
    near(relation, exact[2], exact[2], wide, 0, 2 * in_units + T + case.S, "relation")
    ones = torch.ones(case.B).double()
    near(cls_attn.sum(1), ones, ones, wide, 0, in_units + T, "sum of M^c")


def check_class_row(module, case: AttentionCase, device="cpu"):
    """relation=False: M^c and its gradients, which pass through the dtype once.

    A softmax's gradient A (g - sum A g) is at most max |g| A, and a score's error delta enters A.
    """
    inputs = attention_inputs(case)[:2]
    upstream = random(case.seed + 1)(case.B, case.N + 1)

    def run(attention, convert, **options):
        q, k = (convert(t).detach().requires_grad_() for t in inputs)
        cls_attn = attention(q, k, convert(inputs[1]), **options)[1]
        loss = (cls_attn * upstream.to(cls_attn)).sum()
        return cls_attn, torch.autograd.grad(loss, (q, k)), (q, k)

    cls_attn, gradients, _ = run(module.attention, lambda t: t.to(device), backend="triton")
    exact, exact_gradients, (q, k) = run(reference.attention, lambda t: t.cpu().double())
    logits = (q[:, :, :1].abs() @ k.abs().mT / case.d**0.5).amax().item()
    in_units = int(2 * (case.d + 16) * logits) + case.N
    near(cls_attn, exact, exact, torch.float32, 0, in_units + case.S, "cls_attn")
    rows = (q[:, :, :1] @ k.mT / case.d**0.5).softmax(-1)[:, :, 0].detach()  # (B, S, T)
    g = 2 * upstream.abs().double().amax() * rows / case.S / case.d**0.5
    sizes = (torch.zeros_like(q), (g[..., None] * q[:, :, :1].abs()))
    sizes[0][:, :, 0] = (g[..., None] * k.abs()).sum(2)
    for name, a, e, m in zip("qk", gradients, exact_gradients, sizes):
        near(a, e, m.detach(), case.dtype, 2, 2 * in_units + case.N, f"gradient of {name}")


def check_aggregate(module, case: AttentionCase, device="cpu"):
    """Softmax rows as A, with strides of its own; its gradient passes through its dtype once."""
    T = case.N + 1
    attn = random(case.seed)(case.B, case.S, T, T).softmax(-1).to(case.dtype)
    attn = laid_out(attn, case.layouts[0])
    check_twin(module, "aggregate_attention", [attn], case.dtype, 1, (case.S, 2 * case.S * T),
               (2 * case.S * T,), case.seed, device, stored=(torch.float32,))


# ------------------------------------------------------------------------------------- CDM


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
    seed: int = 0


def conv_inputs(case: ConvCase):
    """x as the token view or with a layout of its own; scores, weight, bias."""
    B, D, C, G, h, w, k, dtype, layouts, bias, seed = case
    normal = random(seed)
    x = normal(B, h * w + 1, D).to(dtype)[:, 1:].mT.unflatten(2, (h, w))
    bias = normal(C).to(dtype) if bias else None
    inputs = x, normal(B, G).sigmoid().to(dtype), (normal(G, C, D, k, k) / 4).to(dtype), bias
    return [t if t is None or layout == "tokens" else laid_out(t, layout)
            for t, layout in zip(inputs, layouts)]


def check_conv(module, case: ConvCase, name: str = "dynamic_conv2d", device="cpu", wanted=None,
               **options):
    """The maps pass through the dtype twice: mixed kernel, output. The logits' steps are each
    rounded to it: window sums, GEMM, product with the score, sum over g, bias; and as many back."""
    B, D, C, G, h, w, k = case[:7]
    P, taps = h * w, k * k
    maps = name == "dynamic_conv2d"
    roundings, length = (2, D * taps * G) if maps else (6, D * taps * G * P)
    gradients = (C * taps * G * (1 if maps else P), C * D * taps * P, B * P, B * P)
    check_twin(module, name, conv_inputs(case), case.dtype, roundings, (length,), gradients,
               case.seed, device, wanted, **options)


def check_class_maps(module, case: ConvCase, K: int = 3, device="cpu"):
    """Mixed kernel, output, and output with bias each pass through the dtype."""
    inputs = conv_inputs(case)
    generator = torch.Generator().manual_seed(case.seed)
    classes = torch.randint(case.C, (case.B, K), generator=generator)
    classes = laid_out(classes, case.layouts[1])
    double = [None if t is None else t.double() for t in inputs]
    exact = reference.class_maps(*double, classes)
    sizes = reference.class_maps(*[None if t is None else t.abs() for t in double], classes)
    given = [t if t is None or device == "cpu" else t.to(device) for t in (*inputs, classes)]
    maps = module.class_maps(*given, backend="triton")
    near(maps, exact, sizes, case.dtype, 3, case.D * case.G * case.k**2, "class_maps")


# name: check of (module, device), for the compiled kernels on a GPU and whatever else runs them
CHECKS = {
    f"{name}, {str(dtype).removeprefix('torch.')}": (check, dtype)
    for dtype in DTYPES
    for name, check in {
        "attention, one pass": lambda m, t, d: check_attention(m, AttentionCase(dtype=t), d),
        "attention, two passes": lambda m, t, d: check_attention(
            m, AttentionCase(1, 2, 300, 64, dtype=t), d),
        "attention at DeiT-S's shape": lambda m, t, d: check_attention(
            m, AttentionCase(2, 6, 196, 64, dtype=t), d),
        "attention, the widest head": lambda m, t, d: check_attention(
            m, AttentionCase(1, 2, 40, 128, dtype=t), d),
        "attention, large scores": lambda m, t, d: check_attention(
            m, AttentionCase(scale=12.0, dtype=t), d),
        "attention, all scores low": lambda m, t, d: check_attention(
            m, AttentionCase(1, 2, 300, 8, shift=20.0, dtype=t), d),
        "class_row": lambda m, t, d: check_class_row(m, AttentionCase(dtype=t), d),
        "aggregate": lambda m, t, d: check_aggregate(m, AttentionCase(2, 6, 196, dtype=t), d),
        "conv": lambda m, t, d: check_conv(m, ConvCase(D=37, C=70, G=5, dtype=t), device=d),
        "conv, 1 x 1": lambda m, t, d: check_conv(m, ConvCase(k=1, dtype=t), device=d),
        "logits": lambda m, t, d: check_conv(
            m, ConvCase(dtype=t), "dynamic_conv_logits", device=d),
        "padded logits": lambda m, t, d: check_conv(
            m, ConvCase(dtype=t), "dynamic_conv_logits", device=d, pool="padded"),
        "class_maps": lambda m, t, d: check_class_maps(m, ConvCase(C=70, dtype=t), 9, d),
    }.items()
}


def main() -> None:
    """Every check on compiled kernels, on the first GPU: a line each, "ok" or what is wrong."""
    import kernels

    for name, (check, dtype) in CHECKS.items():
        try:
            check(kernels, dtype, "cuda")
            print(f"{name}: ok", flush=True)
        except Exception as error:  # the next check may still tell something
            message = str(error).strip() or type(error).__name__
            print(f"{name}: {message.splitlines()[0]}", flush=True)


if __name__ == "__main__":
    main()
