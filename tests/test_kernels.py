"""The Triton kernels, in Triton's interpreter, against their naive twins in float64; and how `kernels` dispatches.

Tolerances follow from the arithmetic, not from trial. With u the unit roundoff of a dtype (half its eps), a result that
passes `roundings` times through the storage dtype and sums `length` products in float32 is within

    (roundings * u(dtype) + (length + 16) * u(float32)) * magnitude

of the exact one, where magnitude is the same operation on absolute values (so that cancellation hides nothing) and 16
covers the few float32 operations around the sum. float16 also underflows: see near().
"""

import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import kernels
from kernels import reference

torch.set_num_threads(2)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
interpreted = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def near(actual, exact, magnitude, dtype, roundings, length, what=""):
    """Asserts the bound above, plus what each of the summands can lose by falling below the dtype's normal numbers."""
    limits = torch.finfo(dtype)
    relative = roundings * unit(dtype) + (length + 16) * unit(torch.float32)
    underflow = (length + roundings) * limits.smallest_normal * limits.eps * max(1.0, magnitude.detach().max().item())
    assert actual.shape == exact.shape, f"{what}: {tuple(actual.shape)} for {tuple(exact.shape)}"
    excess = (actual.double() - exact).abs() - relative * magnitude - underflow
    assert not actual.isnan().any() and excess.max() <= 0, f"{what}: off by {excess.max():.2g} more than allowed"


def random(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(size, generator=generator)


def check_twin(module, name, inputs, dtype, roundings, lengths, gradient_lengths, seed=0, **options):
    """One function of `module` on Triton against its twin: outputs, and every input's gradient under random upstream.

    For functions that are sums of products: the twin at absolute values, and its gradients, are the magnitudes.
    """

    def run(functions, convert, upstream, **options):
        leaves = [None if t is None else convert(t).requires_grad_() for t in inputs]
        outputs = getattr(functions, name)(*leaves, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [convert(u) for u in upstream] or [normal(*o.shape).to(o.dtype) for o in outputs]
        gradients = torch.autograd.grad(outputs, [t for t in leaves if t is not None], upstream)
        return [*outputs, *gradients], upstream

    normal = random(seed + 1)
    actual, upstream = run(module, torch.Tensor.detach, [], backend="triton", **options)
    exact, _ = run(reference, lambda t: t.detach().double(), upstream, **options)
    magnitude, _ = run(reference, lambda t: t.detach().double().abs(), upstream, **options)
    for i, (a, e, m, length) in enumerate(zip(actual, exact, magnitude, [*lengths, *gradient_lengths])):
        what = f"output {i}" if i < len(lengths) else f"gradient of input {i - len(lengths)}"
        near(a, e, m, dtype, roundings, length, f"{name}, {what}")


# --------------------------------------------------------------------------------------------------------- RPAM


class AttentionCase(NamedTuple):
    B: int = 2
    S: int = 3
    N: int = 67
    d: int = 24
    dtype: torch.dtype = torch.float32
    layout: str = "packed"
    seed: int = 0


ATTENTION_CASES = st.builds(
    AttentionCase,
    B=st.sampled_from([1, 2]), S=st.sampled_from([1, 2, 3, 5]), N=st.sampled_from([1, 2, 13, 31, 33, 64, 65, 67, 127]),
    d=st.sampled_from([16, 24, 32, 64, 80]), dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["packed", "contiguous", "mixed"]), seed=st.integers(0, 2**20),
)


def attention_inputs(case: AttentionCase):
    """q, k, v: views of one packed projection, contiguous, or each with strides of its own."""
    normal, T = random(case.seed), case.N + 1
    q, k, v = normal(case.B, T, 3, case.S, case.d).to(case.dtype).permute(2, 0, 3, 1, 4)
    if case.layout == "contiguous":
        return q.contiguous(), k.contiguous(), v.contiguous()
    if case.layout == "mixed":
        return q, k.mT.contiguous().mT, v.contiguous()
    return q, k, v


def check_attention(module, case: AttentionCase):
    """relation=True. A logit sums d products: error delta, relative in exp and again in its row's sum; A = exp / sum.

    So A is off by 2 delta + (T + 16) u(float32), and M^r, a product of two of them, by twice that and its own sums.
    """
    q, k, v = attention_inputs(case)
    out, cls_attn, relation = module.attention(q, k, v, relation=True, backend="triton")
    exact = reference.attention(q.double(), k.double(), v.double(), relation=True)
    T, u = case.N + 1, unit(torch.float32)
    logits = (q.double().abs() @ k.double().abs().mT / case.d**0.5).amax()
    delta = (case.d + 16) * u * float(logits)
    in_units = int(2 * delta / u) + T  # the error of A as a number of float32 roundings
    magnitude = reference.attention(q.double(), k.double(), v.double().abs())[0]
    near(out, exact[0], magnitude, case.dtype, 2, in_units + T, "out")  # P and the result pass through the dtype
    near(cls_attn, exact[1], exact[1], torch.float32, 0, in_units + case.S, "cls_attn")
    near(relation, exact[2], exact[2], torch.float32, 0, 2 * in_units + T + case.S, "relation")
    near(cls_attn.sum(1), torch.ones(case.B).double(), torch.ones(case.B), torch.float32, 0, in_units + T, "sum of M^c")


@interpreted
@given(ATTENTION_CASES)
def test_attention_equals_its_twin(case):
    check_attention(kernels, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_at_deit_shape(dtype):
    check_attention(kernels, AttentionCase(B=1, S=2, N=196, d=64, dtype=dtype))


def test_attention_with_the_widest_head():
    check_attention(kernels, AttentionCase(B=1, S=1, N=40, d=128))


def check_aggregate(module, case: AttentionCase):
    """Softmax rows as A, contiguous or with strides of their own; the gradient passes through A's dtype once."""
    T = case.N + 1
    attn = random(case.seed)(case.B, case.S, T, T).softmax(-1).to(case.dtype)
    if case.layout == "contiguous":
        attn = torch.nn.functional.pad(attn, (0, 5))[..., :T]  # rows padded
    if case.layout == "mixed":
        attn = attn.mT.contiguous().mT  # columns contiguous
    lengths = (case.S, 2 * case.S * T)
    check_twin(module, "aggregate_attention", [attn], case.dtype, 1, lengths, (2 * case.S * T,), case.seed)


@interpreted
@given(ATTENTION_CASES)
def test_aggregate_equals_its_twin(case):
    check_aggregate(kernels, case)


def test_aggregate_at_deit_shape():
    check_aggregate(kernels, AttentionCase(B=1, S=6, N=196))


@pytest.mark.parametrize("function", ["attention", "aggregate"])
def test_uniform_attention(function):
    """Equal logits: M^c is 1/(N+1) everywhere and M^r 1/(N+1)^2."""
    T = 38
    if function == "attention":
        q, k, v = torch.zeros(3, 1, 2, T, 16)
        _, cls_attn, relation = kernels.attention(q, k, v, relation=True, backend="triton")
    else:
        cls_attn, relation = kernels.aggregate_attention(torch.full((1, 2, T, T), 1 / T), backend="triton")
    near(cls_attn, torch.full((1, T), 1 / T).double(), cls_attn, torch.float32, 0, T)
    near(relation, torch.full((1, T - 1), 1 / T**2).double(), relation, torch.float32, 0, 4 * T)


def test_patches_permuted_permute_the_maps():
    case = AttentionCase(B=1, S=2, N=66, d=16)
    q, k, v = attention_inputs(case)
    order = torch.randperm(case.N, generator=torch.Generator().manual_seed(1))
    tokens = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + order])
    maps = kernels.attention(q, k, v, relation=True, backend="triton")
    permuted = kernels.attention(q[:, :, tokens], k[:, :, tokens], v[:, :, tokens], relation=True, backend="triton")
    u = case.d * unit(torch.float32) * 16  # logits are a few units in size
    torch.testing.assert_close(permuted[0], maps[0][:, :, tokens], rtol=u, atol=u)
    torch.testing.assert_close(permuted[1], maps[1][:, tokens], rtol=u, atol=0)
    torch.testing.assert_close(permuted[2], maps[2][:, order], rtol=2 * u, atol=0)


# ---------------------------------------------------------------------------------------------------------- CDM


class ConvCase(NamedTuple):
    B: int = 2
    D: int = 37
    C: int = 21
    G: int = 3
    h: int = 5
    w: int = 8
    k: int = 3
    dtype: torch.dtype = torch.float32
    layout: str = "tokens"
    bias: bool = True
    seed: int = 0


CONV_CASES = st.builds(
    ConvCase,
    B=st.sampled_from([1, 2]), D=st.sampled_from([1, 5, 33, 66]), C=st.sampled_from([1, 3, 21, 65]),
    G=st.sampled_from([1, 2, 3, 4, 5, 9]), h=st.sampled_from([1, 2, 7]), w=st.sampled_from([1, 3, 5, 19]),
    k=st.sampled_from([1, 3]), dtype=st.sampled_from(DTYPES), bias=st.booleans(), seed=st.integers(0, 2**20),
    layout=st.sampled_from(["tokens", "contiguous", "sliced"]),
)


def conv_inputs(case: ConvCase):
    """x as the token view, contiguous, or with every stride its own; scores, weight, bias as the model has them."""
    B, D, C, G, h, w, k, dtype, layout, bias, seed = case
    normal = random(seed)
    if layout == "tokens":
        x = normal(B, h * w + 1, D).to(dtype)[:, 1:].mT.unflatten(2, (h, w))
    elif layout == "contiguous":
        x = normal(B, D, h, w).to(dtype)
    else:
        x = normal(B, 2 * D, h + 1, 2 * w).to(dtype)[:, ::2, 1:, ::2]
    bias = normal(C).to(dtype) if bias else None
    return x, normal(B, G).sigmoid().to(dtype), (normal(G, C, D, k, k) / 4).to(dtype), bias


def check_conv(module, case: ConvCase, name: str = "dynamic_conv2d", **options):
    """The maps pass through the dtype twice: mixed kernel, output. The logits' steps are each rounded to it: window
    sums, GEMM, product with the score, sum over g, bias; and as many backward."""
    B, D, C, G, h, w, k = case[:7]
    P, taps = h * w, k * k
    roundings, length = (2, D * taps * G) if name == "dynamic_conv2d" else (6, D * taps * G * P)
    gradients = (C * taps * G * (1 if name == "dynamic_conv2d" else P), C * D * taps * P, B * P, B * P)
    check_twin(module, name, conv_inputs(case), case.dtype, roundings, (length,), gradients, case.seed, **options)


def check_class_maps(module, case: ConvCase, K: int = 3):
    """Mixed kernel, output, and output with bias each pass through the dtype."""
    inputs = conv_inputs(case)
    classes = torch.randint(case.C, (case.B, K), generator=torch.Generator().manual_seed(case.seed))
    double = [None if t is None else t.double() for t in inputs]
    exact = reference.class_maps(*double, classes)
    magnitude = reference.class_maps(*[None if t is None else t.abs() for t in double], classes)
    maps = module.class_maps(*inputs, classes, backend="triton")
    near(maps, exact, magnitude, case.dtype, 3, case.D * case.G * case.k**2, "class_maps")


@interpreted
@given(CONV_CASES)
def test_conv_equals_its_twin(case):
    check_conv(kernels, case)


@interpreted
@given(CONV_CASES, st.sampled_from(["gap", "padded"]))
def test_logits_equal_their_twin(case, pool):
    check_conv(kernels, case, "dynamic_conv_logits", pool=pool)


@interpreted
@given(CONV_CASES, st.sampled_from([1, 2, 5, 9]))
def test_class_maps_equal_their_twin(case, K):
    check_class_maps(kernels, case, K)


def test_logits_and_class_maps_at_deit_shape():
    case = ConvCase(B=2, D=384, C=200, G=4, h=14, w=14, dtype=torch.bfloat16)
    check_conv(kernels, case, "dynamic_conv_logits")
    check_class_maps(kernels, case)


def test_conv_at_deit_shape():
    check_conv(kernels, ConvCase(B=1, D=384, C=200, G=2, h=14, w=14, dtype=torch.bfloat16))


def test_conv_over_several_blocks_of_places():
    check_conv(kernels, ConvCase(B=1, D=16, C=5, G=2, h=9, w=31))


def test_one_hot_scores_are_plain_convolution():
    case = ConvCase()
    x, _, weight, bias = conv_inputs(case)
    maps = kernels.dynamic_conv2d(x, torch.eye(case.G)[[2, 0]], weight, bias, backend="triton")
    for b, g in enumerate((2, 0)):
        near(maps[b], *(
            torch.nn.functional.conv2d(f(x[b].double()), f(weight[g].double()), f(bias.double()), padding=1)
            for f in (lambda t: t, abs)
        ), torch.float32, 2, case.D * 9, "conv2d")


@pytest.mark.parametrize("name", ["dynamic_conv2d", "dynamic_conv_logits"])
def test_linear_in_the_scores(name):
    case = ConvCase(bias=False)
    x, scores, weight, _ = conv_inputs(case)
    function = lambda s: getattr(kernels, name)(x, s, weight, None, backend="triton")
    magnitude = getattr(reference, name)(*(t.double().abs() for t in (x, 2 * scores.abs() + 3, weight)), None)
    other = random(9)(*scores.shape)
    combined = (2 * function(scores).double() + function(other).double()).detach()
    near(function(2 * scores + other), combined, 8 * magnitude, torch.float32, 8, case.D * 9 * case.G, name)


def test_logits_are_the_mean_of_the_maps():
    case = ConvCase(w=9)
    inputs = conv_inputs(case)
    maps = kernels.dynamic_conv2d(*inputs, backend="triton").double()
    logits = kernels.dynamic_conv_logits(*inputs, backend="triton")
    magnitude = reference.dynamic_conv_logits(*(t.double().abs() for t in inputs))
    near(logits, maps.mean((2, 3)), magnitude, torch.float32, 8, case.D * 9 * case.G * 45, "logits")


# --------------------------------------------------------------------------------------------------- all functions


def calls(B: int = 3):
    """Every public function's Triton path on a batch: name -> (function of the batch's tensors, those tensors)."""
    q, k, v = attention_inputs(AttentionCase(B=B, S=2, N=34, d=16))
    x, scores, weight, bias = conv_inputs(ConvCase(B=B, D=9, C=7))
    classes = torch.tensor([[1, 6], [0, 0], [5, 2]])[:B]
    triton = {"backend": "triton"}
    return {
        "attention": (lambda *qkv: kernels.attention(*qkv, relation=True, **triton), (q, k, v)),
        "aggregate_attention": (lambda a: kernels.aggregate_attention(a, **triton), ((q @ k.mT).softmax(-1),)),
        "dynamic_conv2d": (lambda x, s: kernels.dynamic_conv2d(x, s, weight, bias, **triton), (x, scores)),
        "dynamic_conv_logits": (lambda x, s: kernels.dynamic_conv_logits(x, s, weight, bias, **triton), (x, scores)),
        "class_maps": (lambda x, s, c: kernels.class_maps(x, s, weight, bias, c, **triton), (x, scores, classes)),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_same_bits_again_and_a_batch_is_its_images(name):
    function, batch = calls()[name]
    as_tuple = lambda outputs: outputs if isinstance(outputs, tuple) else (outputs,)
    together, again = as_tuple(function(*batch)), as_tuple(function(*batch))
    images = [as_tuple(function(*(t[b : b + 1] for t in batch))) for b in range(3)]
    alone = [torch.cat(outputs) for outputs in zip(*images)]
    for a, b, c in zip(together, again, alone):
        assert torch.equal(a, b)
        if name == "dynamic_conv_logits":  # ends in torch's GEMM, which sums a batch's rows in another order
            torch.testing.assert_close(a, c, rtol=81 * unit(torch.float32), atol=81 * 8 * unit(torch.float32))
        else:
            assert torch.equal(a, c)


def test_gradients_have_the_same_bits_again():
    inputs = [t.requires_grad_() for t in conv_inputs(ConvCase(D=9, C=7))]
    losses = [kernels.dynamic_conv2d(*inputs, backend="triton").square().sum() for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*(torch.autograd.grad(loss, inputs) for loss in losses)))


def arguments(device="cpu"):
    """Every public function with its arguments, differentiable where the function is."""
    leaf = lambda *size: torch.randn(size, device=device).requires_grad_()
    x, scores, weight, bias = leaf(2, 9, 3, 5), leaf(2, 3), leaf(3, 7, 9, 3, 3), leaf(7)
    classes = torch.zeros(2, 4, dtype=torch.int64, device=device)
    return {
        "attention": (leaf(2, 2, 6, 16), leaf(2, 2, 6, 16), leaf(2, 2, 6, 16)),
        "aggregate_attention": (leaf(2, 3, 6, 6),),
        "dynamic_conv2d": (x, scores, weight, bias),
        "dynamic_conv_logits": (x, scores, weight, bias),
        "class_maps": (x, scores, weight, bias, classes),
    }


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", list(arguments()))
def test_forward_and_backward_on_the_meta_device(name, backend):
    """Shapes, strides and devices without data: a tensor made on another device than the inputs' would raise."""
    function = getattr(kernels, name)
    outputs = [function(*arguments(device)[name], backend=backend) for device in ("meta", "cpu")]
    outputs = [[o for o in out if o is not None] if isinstance(out, tuple) else [out] for out in outputs]
    for meta, real in zip(*outputs, strict=True):
        assert meta.device.type == "meta" and meta.dtype == real.dtype
        assert meta.shape == real.shape and meta.stride() == real.stride()
    inputs = [t for t in arguments("meta")[name] if t.requires_grad]
    outputs = function(*inputs, *arguments("meta")[name][len(inputs) :], backend=backend)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None]
    gradients = torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])
    assert all(g.device.type == "meta" and g.shape == t.shape for g, t in zip(gradients, inputs))


def test_inference_functions_on_the_meta_device():
    with torch.no_grad():
        out, cls_attn, relation = kernels.attention(*arguments("meta")["attention"], relation=True, backend="triton")
        maps = kernels.class_maps(*arguments("meta")["class_maps"], backend="triton")
    assert (out.shape, cls_attn.shape, relation.shape) == ((2, 2, 6, 16), (2, 6), (2, 5))
    assert maps.shape == (2, 4, 3, 5)


def test_operators_pass_torchs_own_checks():
    """opcheck: schema, autograd registration, fake against real outputs, and tracing with symbolic shapes."""
    from kernels import cdm, rpam

    given = arguments()
    x, scores, weight, _ = (t.detach() for t in given["dynamic_conv2d"])
    weight_last = weight.flatten(3).mT.contiguous().requires_grad_()
    maps = torch.randn(2, 7, 3, 5)
    for operator, inputs in (
        (rpam.aggregate_attention, given["aggregate_attention"]),
        (rpam.attention_relation, [t.detach() for t in given["attention"]]),
        (cdm.dynamic_conv2d_op, (*given["dynamic_conv2d"][:2], weight_last, given["dynamic_conv2d"][3])),
        (cdm.dynamic_conv2d_grad_x, (maps, scores, weight_last.detach())),
        (cdm.dynamic_conv2d_grad_weight, (maps, x, scores, weight_last.detach())),
        (cdm.window_sums, (given["dynamic_conv2d"][0], 3, True)),
        (cdm.window_sums_backward, (torch.randn(2, 9, 9), 3, 5, 3, False)),
        (cdm.class_products, (x, scores, weight, given["class_maps"][4])),
    ):
        torch.library.opcheck(operator, tuple(inputs))


@pytest.mark.parametrize("name", list(arguments()))
def test_compiles_in_one_graph(name, compile_whole):
    """Forward and backward."""
    inputs = arguments()[name]
    leaves = [t for t in inputs if t.requires_grad]

    def run(function):
        outputs = function(*inputs, backend="triton")
        outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None]
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])]

    function = getattr(kernels, name)
    for plain, compiled in zip(run(function), run(compile_whole(function))):
        torch.testing.assert_close(plain, compiled)


def test_use_backend():
    """Inner blocks and the keyword win over outer blocks; a block ends with an exception too."""
    attn = torch.rand(1, 1, 3, 3).softmax(-1)
    from kernels import meter

    def launched(**backend):
        with meter.measure() as launches:
            kernels.aggregate_attention(attn, **backend)
        return bool(launches)

    assert not launched()
    with kernels.use_backend("triton"):
        assert launched() and not launched(backend="torch")
        with kernels.use_backend("torch"):
            assert not launched() and launched(backend="triton")
        assert launched()
        with kernels.use_backend(None):
            assert not launched()
    with pytest.raises(KeyError), kernels.use_backend("triton"):
        raise KeyError
    assert not launched()


def test_kernels_come_without_triton_until_they_run():
    code = "import sys, torch, kernels as k; k.attention(*torch.ones(3, 1, 1, 2, 4)); sys.exit('triton' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.path.dirname(os.path.dirname(kernels.__file__))
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# --------------------------------------------------------------------------------------------------------- errors


def refused(error, words, function, *inputs, **options):
    with pytest.raises(error) as caught:
        function(*inputs, **options)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message


def test_errors_name_the_argument_what_it_got_and_needs(monkeypatch):
    given = {name: [t.detach() for t in inputs] for name, inputs in arguments().items()}
    q, k, v = given["attention"]
    x, scores, weight, bias = given["dynamic_conv2d"]
    attn, classes = given["aggregate_attention"][0], given["class_maps"][4]
    conv, maps = kernels.dynamic_conv2d, kernels.class_maps
    refused(ValueError, ["q", "(2, 6, 16)", "(B, S, N+1, d)"], kernels.attention, q[0], k[0], v[0])
    refused(ValueError, ["k", "(2, 2, 5, 16)", "(2, 2, 6, 16)"], kernels.attention, q, k[:, :, 1:], v)
    refused(ValueError, ["v", "float16", "float32"], kernels.attention, q, k, v.half())
    refused(ValueError, ["v", "meta", "cpu"], kernels.attention, q, k, v.to("meta"))
    refused(ValueError, ["q", "int64"], kernels.attention, q.long(), k.long(), v.long())
    refused(ValueError, ["attn", "(2, 3, 6, 5)"], kernels.aggregate_attention, attn[..., 1:])
    refused(ValueError, ["x", "(9, 3, 5)", "(B, D, h, w)"], conv, x[0], scores, weight, bias)
    refused(ValueError, ["weight", "(3, 7, 9, 2, 3)", "k 1 or 3"], conv, x, scores, weight[..., 1:, :], bias)
    refused(ValueError, ["weight", "(3, 7, 8, 3, 3)", "9"], conv, x, scores, weight[:, :, 1:], bias)
    refused(ValueError, ["scores", "(2, 2)", "(2, 3)"], conv, x, scores[:, 1:], weight, bias)
    refused(ValueError, ["bias", "(6,)", "(7,)"], conv, x, scores, weight, bias[1:])
    refused(ValueError, ["weight", "float16", "float32"], conv, x, scores, weight.half(), bias)
    refused(ValueError, ["classes", "(4,)", "(2, K)"], maps, x, scores, weight, bias, classes[0])
    refused(ValueError, ["classes", "float32", "int64"], maps, x, scores, weight, bias, classes.float())
    refused(ValueError, ["pool", "'max'", "gap"], kernels.dynamic_conv_logits, x, scores, weight, bias, "max")
    refused(ValueError, ["backend", "'cuda'", "triton"], conv, x, scores, weight, bias, backend="cuda")
    refused(ValueError, ["backend", "'cuda'"], kernels.use_backend("cuda").__enter__)

    refused(ValueError, ["attn", "float64", "float32"], kernels.aggregate_attention, attn.double(), backend="triton")
    wide = torch.randn(1, 1, 3, 129)
    refused(ValueError, ["q", "129", "128"], kernels.attention, wide, wide, wide, relation=True, backend="triton")
    q.requires_grad_()
    for backend in ("torch", "triton"):
        refused(RuntimeError, ["relation=True", "no_grad"], kernels.attention, q, k, v, relation=True, backend=backend)
    monkeypatch.delenv("TRITON_INTERPRET")
    refused(RuntimeError, ["x", "CPU tensor", "TRITON_INTERPRET"], conv, x, scores, weight, bias, backend="triton")


# ---------------------------------------------------------------------------------------------------------- model


def small_model():
    import lctr

    torch.manual_seed(0)
    model = lctr.LCTR(5, img_size=(24, 32), patch_size=8, embed_dim=24, depth=2, num_heads=2, num_kernels=3)
    return model.eval(), torch.randn(2, 3, 24, 32)


@pytest.mark.parametrize("classes", [None, "all"])
def test_localize_is_the_same_on_triton(classes):
    model, images = small_model()
    torch_path = model.localize(images, classes)
    with kernels.use_backend("triton"):
        triton_path = model.localize(images, classes)
    for a, b in zip(triton_path, torch_path):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_training_step_is_the_same_on_triton():
    model, images = small_model()

    def gradients():
        loss = torch.nn.functional.cross_entropy(model(images), torch.tensor([1, 4]))
        return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters()))))

    torch_path = gradients()
    with kernels.use_backend("triton"):
        triton_path = gradients()
    for name, gradient in torch_path.items():
        torch.testing.assert_close(triton_path[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
