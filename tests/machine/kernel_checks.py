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

The convolution sums up to millions of products of random signs, and that bound would allow any
result. Their roundings are independent: what holds of them is the root of the sum of their squares.
So there magnitude is |exact| + 6 * spread, six standard deviations, with spread the root of the
same operation on squares; and a running sum's roundings grow with the root of its length.
"""

import importlib
from typing import NamedTuple

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

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


def place(tensor: torch.Tensor | None, device: str) -> torch.Tensor | None:
    """On the device, with the strides and the offset that it has here: .to() would close gaps."""
    if tensor is None or device == "cpu":
        return tensor
    memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def sizes_of(exact, squares):
    """Six standard deviations of a sum of random signs."""
    return exact.abs() + 6 * squares.sqrt()


def check_twin(module, name, inputs, dtype, roundings, lengths, gradient_lengths, seed=0,
               device="cpu", wanted=None, stored=None, random_signs=True, **options):
    """Outputs of one function on Triton, and gradients under random upstream, against its twin's.

    For functions that are sums of products: the twin, and its gradients, at squares or absolute
    values give the magnitudes. wanted: the inputs whose gradients are asked for, None: all.
    """
    given = [i for i, t in enumerate(inputs) if t is not None]
    wanted = given if wanted is None else [i for i in given if i in wanted]

    def run(functions, convert, upstream, **options):
        leaves = [None if t is None else convert(t.detach()) for t in inputs]
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

    def double(tensor):
        return tensor.cpu().double()

    normal, on_device = random(seed + 1), lambda t: place(t, device)
    actual, gradients, upstream = run(module, on_device, [], backend="triton", **options)
    exact, exact_gradients, _ = run(reference, double, upstream, **options)
    power = 2 if random_signs else 1
    sizes, size_gradients, _ = run(
        reference, lambda t: double(t).abs() ** power, upstream, **options)

    def compare(actual, exact, size, length, what, stored):
        magnitude = sizes_of(exact, size) if random_signs else size
        near(actual, exact, magnitude, dtype, roundings, length ** (1 / power), what, stored)

    for i, (a, e, m, length) in enumerate(zip(actual, exact, sizes, lengths, strict=True)):
        compare(a, e, m, length, f"{name}, output {i}", stored)
    for i, a, e, m in zip(wanted, gradients, exact_gradients, size_gradients, strict=True):
        what = f"{name}, gradient of input {i}"
        compare(a, e, m, gradient_lengths[i], what, inputs[i].dtype)


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
    same: bool = False  # one query and one value for all tokens: errors do not average out
    wanted: str = "qk"  # whose gradients are asked for of class_row
    seed: int = 0


def attention_inputs(case: AttentionCase):
    """q, k, v: views of one packed projection, but for those with a layout of their own."""
    normal, T = random(case.seed), case.N + 1
    packed = normal(case.B, T, 3, case.S, case.d)
    if case.same:
        packed[:, :, 0::2] = packed[:, :1, 0::2].clone()
    packed[:, :, 0] *= case.scale
    packed[:, :, 0, :, 0] += case.shift
    packed[:, :, 1, :, 0] -= case.shift
    views = packed.to(case.dtype).permute(2, 0, 3, 1, 4)
    return [t if layout == "packed" else laid_out(t, layout)
            for t, layout in zip(views, case.layouts)]


def check_attention(module, case: AttentionCase, device="cpu"):
    """relation=True. A logit sums d products: error delta, relative in exp and in its row's sum.

    A sum of T probabilities has T independent roundings: six standard deviations are below
    6 sqrt(T) u(float32). So A is off by 2 delta + 6 sqrt(T) u, and M^r, a product of two of them,
    by twice that and its own sums.
    """
    q, k, v = attention_inputs(case)
    given = (place(t, device) for t in (q, k, v))
    out, cls_attn, relation = module.attention(*given, relation=True, backend="triton")
    exact = reference.attention(q.double(), k.double(), v.double(), relation=True)
    T, u = case.N + 1, unit(torch.float32)
    logits = (q.double().abs() @ k.double().abs().mT / case.d**0.5).amax()
    delta = (case.d + 16) * u * float(logits)
    sums = 6 * T**0.5
    in_units = 2 * delta / u + sums  # the error of A as a number of float32 roundings
    sizes = reference.attention(q.double(), k.double(), v.double().abs())[0]
    wide = torch.float32
    near(out, exact[0], sizes, case.dtype, 2, in_units + T, "out")  # P and the result are rounded
    near(cls_attn, exact[1], exact[1], wide, 0, in_units + case.S, "cls_attn")
    near(relation, exact[2], exact[2], wide, 0, 2 * in_units + sums + case.S, "relation")
    ones = torch.ones(case.B).double()
    near(cls_attn.sum(1), ones, ones, wide, 0, in_units + sums, "sum of M^c")


def check_class_row(module, case: AttentionCase, device="cpu"):
    """relation=False: M^c and its gradients, which pass through the dtype once.

    A softmax's gradient A (g - sum A g) is at most max |g| A, and a score's error delta enters A.
    """
    inputs = attention_inputs(case)[:2]
    upstream = random(case.seed + 1)(case.B, case.N + 1)

    def run(attention, convert, **options):
        q, k = (convert(t).detach() for t in inputs)
        leaves = [dict(q=q, k=k)[name].requires_grad_() for name in case.wanted]
        cls_attn = attention(q, k, convert(inputs[1]), **options)[1]
        loss = (cls_attn * upstream.to(cls_attn)).sum()
        return cls_attn, torch.autograd.grad(loss, leaves), (q.detach(), k.detach())

    cls_attn, gradients, _ = run(module.attention, lambda t: place(t, device), backend="triton")
    exact, exact_gradients, (q, k) = run(reference.attention, torch.Tensor.double)
    logits = (q[:, :, :1].abs() @ k.abs().mT / case.d**0.5).amax().item()
    in_units = int(2 * (case.d + 16) * logits) + case.N
    near(cls_attn, exact, exact, torch.float32, 0, in_units + case.S, "cls_attn")
    rows = (q[:, :, :1] @ k.mT / case.d**0.5).softmax(-1)[:, :, 0]  # (B, S, T)
    g = 2 * upstream.abs().double().amax() * rows / case.S / case.d**0.5
    sizes = dict(q=torch.zeros_like(q), k=g[..., None] * q[:, :, :1].abs())
    sizes["q"][:, :, 0] = (g[..., None] * k.abs()).sum(2)
    for name, a, e in zip(case.wanted, gradients, exact_gradients):
        length = 2 * in_units + case.N
        near(a, e, sizes[name], case.dtype, 2, length, f"gradient of {name}")


def check_aggregate(module, case: AttentionCase, device="cpu"):
    """Softmax rows as A, with strides of its own; its gradient passes through its dtype once."""
    T = case.N + 1
    attn = random(case.seed)(case.B, case.S, T, T).softmax(-1).to(case.dtype)
    attn = laid_out(attn, case.layouts[0])
    check_twin(module, "aggregate_attention", [attn], case.dtype, 1, (case.S, 2 * case.S * T),
               (2 * case.S * T,), case.seed, device, stored=torch.float32, random_signs=False)


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
    pool: str = "gap"
    K: int = 3  # requested classes
    wanted: tuple[int, ...] | None = None  # the inputs whose gradients are asked for: all
    level: float = 0.0  # added to x
    seed: int = 0


def conv_inputs(case: ConvCase):
    """x as the token view or with a layout of its own; scores, weight, bias."""
    B, D, C, G, h, w, k, dtype, layouts = case[:9]
    normal = random(case.seed)
    x = (normal(B, h * w + 1, D) + case.level).to(dtype)[:, 1:].mT.unflatten(2, (h, w))
    bias = normal(C).to(dtype) if case.bias else None
    inputs = x, normal(B, G).sigmoid().to(dtype), (normal(G, C, D, k, k) / 4).to(dtype), bias
    return [t if t is None or layout == "tokens" else laid_out(t, layout)
            for t, layout in zip(inputs, layouts)]


def check_conv(module, case: ConvCase, device="cpu"):
    """The maps pass through the dtype twice: mixed kernel, output. torch computes gradients."""
    check_twin(module, "dynamic_conv2d", conv_inputs(case), case.dtype, 2,
               (case.D * case.k**2 * case.G,), (), case.seed, device, wanted=())


def check_logits(module, case: ConvCase, device="cpu"):
    """Each step is rounded to the dtype: window sums, GEMM, product with the score, sum over g,
    bias; and as many back."""
    B, D, C, G, h, w, k = case[:7]
    P, taps = h * w, k * k
    check_twin(module, "dynamic_conv_logits", conv_inputs(case), case.dtype, 6,
               (D * taps * G * P,), (C * taps * G, C * D * taps * P, B * P, B * P), case.seed,
               device, case.wanted, pool=case.pool)


def check_class_maps(module, case: ConvCase, device="cpu"):
    """Mixed kernel, output, and output with bias each pass through the dtype."""
    inputs = conv_inputs(case)
    generator = torch.Generator().manual_seed(case.seed)
    classes = torch.randint(case.C, (case.B, case.K), generator=generator)
    classes = laid_out(classes, case.layouts[1])
    double = [None if t is None else t.double() for t in inputs]
    exact = reference.class_maps(*double, classes)
    squares = reference.class_maps(*[None if t is None else t**2 for t in double], classes)
    maps = module.class_maps(*(place(t, device) for t in (*inputs, classes)), backend="triton")
    length = (case.D * case.G * case.k**2) ** 0.5
    near(maps, exact, sizes_of(exact, squares), case.dtype, 3, length, "class_maps")


def check_class_ids(module, case: ConvCase, device="cpu"):
    """Ids outside 0 .. C-1, half of all, give NaN; the others what they give without them.

    Asked of the operator inside, for class_maps refuses such ids in CPU memory.
    """
    x, scores, weight, _ = (place(t, device) for t in conv_inputs(case))
    generator = torch.Generator().manual_seed(case.seed)
    known = torch.randint(case.C, (case.B, case.K), generator=generator)
    unknown = torch.tensor([-1, case.C, 2**31 - 1, -(2**31), 2**32, -(2**40)])
    drawn = unknown[torch.randint(len(unknown), known.shape, generator=generator)]
    is_known = torch.rand(known.shape, generator=generator) < 0.5
    mixed = laid_out(known.where(is_known, drawn), case.layouts[1])
    operator = importlib.import_module(f"{module.__name__}.cdm").class_products
    alone, found = (operator(x, scores, weight, place(ids, device)).cpu().unflatten(1, (case.K, -1))
                    for ids in (known, mixed))  # (B, K, k*k, h*w)
    assert found[~is_known].isnan().all(), "class_products: off by an unknown class"
    assert torch.equal(found[is_known], alone[is_known]), "class_products: off by its neighbours"


# ------------------------------------------------------------------------------------- properties

ATTENTION = st.builds(
    AttentionCase,
    B=st.sampled_from([1, 2]), S=st.sampled_from([1, 2, 3, 5]),
    N=st.sampled_from([1, 2, 13, 31, 33, 64, 65, 67, 127, 255, 256]),
    d=st.sampled_from([8, 16, 24, 32, 64, 80]), dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(["packed", *LAYOUTS])] * 3),
    scale=st.sampled_from([1.0, 8.0]), shift=st.sampled_from([0.0, 12.0]), same=st.booleans(),
    wanted=st.sampled_from(["qk", "q", "k"]), seed=st.integers(0, 2**20),
)
CONVOLUTION = st.builds(
    ConvCase,
    B=st.sampled_from([1, 2]), D=st.sampled_from([1, 5, 33, 66]), C=st.sampled_from([1, 3, 21, 65]),
    G=st.sampled_from([1, 2, 3, 4, 5, 9]), h=st.sampled_from([1, 2, 7]),
    w=st.sampled_from([1, 3, 5, 19]), k=st.sampled_from([1, 3]), dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(st.sampled_from(["tokens", *LAYOUTS]), *[st.sampled_from(LAYOUTS)] * 3),
    bias=st.booleans(), pool=st.sampled_from(["gap", "padded"]), K=st.sampled_from([1, 2, 5, 9]),
    wanted=st.none() | st.sets(st.integers(0, 3), min_size=1).map(tuple), level=st.just(0.0),
    seed=st.integers(0, 2**20),
)
PROPERTIES = {
    "attention": (ATTENTION, check_attention),
    "class row": (ATTENTION, check_class_row),
    "aggregate": (ATTENTION, check_aggregate),
    "conv": (CONVOLUTION, check_conv),
    "logits": (CONVOLUTION, check_logits),
    "class maps": (CONVOLUTION, check_class_maps),
    "class ids": (CONVOLUTION, check_class_ids),
}
DEIT_SMALL = (AttentionCase(B=2, S=6, N=196, d=64), ConvCase(B=2, D=384, C=200, G=4, h=14, w=14))


def hold(name: str, run, examples: int, keep=lambda case: True) -> None:
    """run(check, case) for drawn cases of a property that `keep` keeps.

    A case that fails is not made smaller: each step would compile kernels for minutes.
    """
    cases, check = PROPERTIES[name]

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(cases.filter(keep))
    def drawn(case):
        run(check, case)

    drawn()


NAMES = [f"{name}, {dtype}" for name in PROPERTIES for dtype in ("float32", "float16", "bfloat16")]


def main(device: str = "cuda", examples: int = 12) -> None:
    """Every property on compiled kernels, on the first GPU: a line each, "ok" or what is wrong."""
    import kernels

    for line in NAMES:
        name, dtype = line.split(", ")

        def run(check, case):
            check(kernels, case._replace(dtype=getattr(torch, dtype)), device)

        try:
            cases, check = PROPERTIES[name]
            if device == "cuda":
                run(check, DEIT_SMALL[cases is not ATTENTION])
            hold(name, run, examples)
            print(f"{line}: ok", flush=True)
        except Exception as error:  # the next property may still tell something
            message = str(error).strip() or type(error).__name__
            print(f"{line}: {message.splitlines()[0]}", flush=True)


if __name__ == "__main__":
    main()
