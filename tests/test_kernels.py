"""The Triton kernels in Triton's interpreter, against their naive twins; how `kernels` dispatches.

kernel_checks.py has the checks, and how their tolerances follow from the arithmetic.
"""

import itertools
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

import kernel_checks
import kernels
from kernel_checks import (
    DTYPES, PROPERTIES, AttentionCase, ConvCase, attention_inputs, check_aggregate, check_attention,
    check_class_maps, check_conv, check_logits, conv_inputs, hold, near, random, unit,
)
from kernels import reference

torch.set_num_threads(2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROPERTIES)
def test_kernels_equal_their_twins(name, dtype):
    hold(name, lambda check, case: check(kernels, case._replace(dtype=dtype)), examples=12)


def test_what_a_gpu_runs(capsys):
    """test_kernels_gpu.py's process, on a CPU: a line for each property. Strides are kept."""
    kernel_checks.main("cpu:0", examples=1)
    assert capsys.readouterr().out.splitlines() == [f"{name}: ok" for name in kernel_checks.NAMES]
    for layout in kernel_checks.LAYOUTS:
        tensor = kernel_checks.laid_out(torch.rand(2, 3, 4, 5)[:, 1:], layout)
        placed = kernel_checks.place(tensor, "meta")
        assert placed.device.type == "meta" and placed.shape == tensor.shape
        assert placed.stride() == tensor.stride(), layout


# ------------------------------------------------------------------------------------ RPAM


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_at_deit_shape(dtype):
    check_attention(kernels, AttentionCase(B=1, S=2, N=196, d=64, dtype=dtype))


def test_attention_with_the_widest_head():
    check_attention(kernels, AttentionCase(B=1, S=1, N=40, d=128))


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
        attn = torch.full((1, 2, T, T), 1 / T)
        cls_attn, relation = kernels.aggregate_attention(attn, backend="triton")
    exact = torch.full((1, T), 1 / T).double()
    near(cls_attn, exact, exact, torch.float32, 0, T)
    near(relation, exact[:, 1:] / T, exact[:, 1:] / T, torch.float32, 0, 4 * T)


def test_patches_permuted_permute_the_maps():
    case = AttentionCase(B=1, S=2, N=66, d=16)
    qkv = attention_inputs(case)
    order = torch.randperm(case.N, generator=torch.Generator().manual_seed(1))
    tokens = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + order])
    maps = kernels.attention(*qkv, relation=True, backend="triton")
    permuted = kernels.attention(*(t[:, :, tokens] for t in qkv), relation=True, backend="triton")
    u = case.d * unit(torch.float32) * 16  # logits are a few units in size
    torch.testing.assert_close(permuted[0], maps[0][:, :, tokens], rtol=u, atol=u)
    torch.testing.assert_close(permuted[1], maps[1][:, tokens], rtol=u, atol=0)
    torch.testing.assert_close(permuted[2], maps[2][:, order], rtol=2 * u, atol=0)


# ------------------------------------------------------------------------------------- CDM


def test_logits_and_class_maps_at_deit_shape():
    case = ConvCase(B=2, D=384, C=200, G=4, h=14, w=14, dtype=torch.bfloat16)
    check_logits(kernels, case)
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
        operands = [t.double() for t in (x[b], weight[g], bias)]
        exact = torch.nn.functional.conv2d(*operands, padding=1)
        size = torch.nn.functional.conv2d(*map(torch.abs, operands), padding=1)
        near(maps[b], exact, size, torch.float32, 2, case.D * 9, "conv2d")


@pytest.mark.parametrize("name", ["dynamic_conv2d", "dynamic_conv_logits"])
def test_linear_in_the_scores(name):
    case = ConvCase(bias=False)
    x, scores, weight, _ = conv_inputs(case)
    function = lambda s: getattr(kernels, name)(x, s, weight, None, backend="triton")
    sizes = (t.double().abs() for t in (x, 2 * scores.abs() + 3, weight))
    size = 8 * getattr(reference, name)(*sizes, None)
    other = random(9)(*scores.shape)
    combined = 2 * function(scores).double() + function(other).double()
    actual = function(2 * scores + other)
    near(actual, combined, size, torch.float32, 8, case.D * 9 * case.G, name)


def test_logits_are_the_mean_of_the_maps():
    case = ConvCase(w=9)
    inputs = conv_inputs(case)
    maps = kernels.dynamic_conv2d(*inputs, backend="triton").double()
    logits = kernels.dynamic_conv_logits(*inputs, backend="triton")
    magnitude = reference.dynamic_conv_logits(*(t.double().abs() for t in inputs))
    near(logits, maps.mean((2, 3)), magnitude, torch.float32, 8, case.D * 9 * case.G * 45, "logits")


# ------------------------------------------------------------------------------------ all functions


def as_list(outputs) -> list[torch.Tensor]:
    """A function's outputs, without those that are None."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [o for o in outputs if o is not None]


def gradients(outputs, inputs) -> tuple[torch.Tensor, ...]:
    """Under an upstream of ones, for all inputs that require one."""
    outputs, leaves = as_list(outputs), [t for t in inputs if t.requires_grad]
    return torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])


def calls(B: int = 3):
    """name -> (a public function on Triton, of the batch's tensors; those tensors)."""
    q, k, v = attention_inputs(AttentionCase(B=B, S=2, N=34, d=16))
    x, scores, weight, bias = conv_inputs(ConvCase(B=B, D=9, C=7))
    classes = torch.tensor([[1, 6], [0, 0], [5, 2]])[:B]

    def on_triton(name, *shared, **options):
        function = getattr(kernels, name)
        # classes follow what the images share
        return lambda *batch: function(*batch[:2], *shared, *batch[2:], **options, backend="triton")

    return {
        "attention": (on_triton("attention", relation=True), (q, k, v)),
        "aggregate_attention": (on_triton("aggregate_attention"), ((q @ k.mT).softmax(-1),)),
        "dynamic_conv2d": (on_triton("dynamic_conv2d", weight, bias), (x, scores)),
        "dynamic_conv_logits": (on_triton("dynamic_conv_logits", weight, bias), (x, scores)),
        "class_maps": (on_triton("class_maps", weight, bias), (x, scores, classes)),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_same_bits_again_and_a_batch_is_its_images(name):
    function, batch = calls()[name]
    together, again = as_list(function(*batch)), as_list(function(*batch))
    images = [as_list(function(*(t[b : b + 1] for t in batch))) for b in range(3)]
    alone = [torch.cat(outputs) for outputs in zip(*images)]
    for a, b, c in zip(together, again, alone):
        assert torch.equal(a, b)
        if name in ("dynamic_conv_logits", "attention"):
            # They end in torch's GEMM or exp2, which treat a batch's last rows differently.
            u = 81 * unit(torch.float32)
            torch.testing.assert_close(a, c, rtol=u, atol=8 * u)
        else:
            assert torch.equal(a, c)


def test_gradients_have_the_same_bits_again():
    inputs = [t.requires_grad_() for t in conv_inputs(ConvCase(D=9, C=7))]
    losses = [kernels.dynamic_conv_logits(*inputs, backend="triton").square().sum()
              for _ in range(2)]
    first, second = (torch.autograd.grad(loss, inputs) for loss in losses)
    assert all(map(torch.equal, first, second))


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
    """Shapes, strides and devices without data. A tensor made on another device would raise."""
    function, inputs = getattr(kernels, name), arguments("meta")[name]
    outputs = as_list(function(*inputs, backend=backend))
    reals = as_list(function(*arguments("cpu")[name], backend=backend))
    for meta, real in zip(outputs, reals, strict=True):
        assert meta.device.type == "meta" and meta.dtype == real.dtype
        assert meta.shape == real.shape and meta.stride() == real.stride()
    for gradient, leaf in zip(gradients(tuple(outputs), inputs), inputs):
        assert gradient.device.type == "meta" and gradient.shape == leaf.shape


def test_inference_functions_on_the_meta_device():
    given = arguments("meta")
    with torch.no_grad(), kernels.use_backend("triton"):
        out, cls_attn, relation = kernels.attention(*given["attention"], relation=True)
        maps = kernels.class_maps(*given["class_maps"])
    assert (out.shape, cls_attn.shape, relation.shape) == ((2, 2, 6, 16), (2, 6), (2, 5))
    assert maps.shape == (2, 4, 3, 5)


def test_operators_pass_torchs_own_checks():
    """opcheck: schema, autograd registration, fake against real outputs, symbolic shapes."""
    from kernels import cdm, rpam

    given = arguments()
    q, k, v = (t.detach() for t in given["attention"])
    leaf_x = given["dynamic_conv2d"][0]
    x, scores, weight, bias = (t.detach() for t in given["dynamic_conv2d"])
    for operator, inputs in (
        (rpam.aggregate_attention, given["aggregate_attention"]),
        (rpam.attention_relation, (q, k, v)),
        (rpam.class_scores, (q[:, :, 0].requires_grad_(), k.clone().requires_grad_())),
        (rpam.class_scores_backward, (torch.randn(2, 2, 6), q[:, :, 0], k)),
        (cdm.dynamic_conv2d, (x, scores, weight, bias)),
        (cdm.window_sums, (leaf_x, 3, True)),
        (cdm.window_sums_backward, (torch.randn(2, 9, 9), 3, 5, 3, False)),
        (cdm.class_products, (x, scores, weight, given["class_maps"][4])),
    ):
        torch.library.opcheck(operator, inputs)


@pytest.mark.parametrize("name", list(arguments()))
def test_compiles_in_one_graph(name, compile_whole):
    """Forward and backward."""
    inputs = arguments()[name]

    def run(function):
        outputs = function(*inputs, backend="triton")
        return [*as_list(outputs), *gradients(outputs, inputs)]

    function = getattr(kernels, name)
    for plain, compiled in zip(run(function), run(compile_whole(function))):
        torch.testing.assert_close(plain, compiled)


def test_use_backend(monkeypatch):
    """Inner blocks and the keyword win over outer blocks; a block ends with an exception too."""
    from kernels import rpam

    attn, launches = torch.rand(1, 1, 3, 3).softmax(-1), []
    monkeypatch.setattr(rpam, "launch", lambda *_, **options: launches.append(options))

    def launched(**backend):
        launches.clear()
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
    code = ("import sys, torch, kernels as k; k.attention(*torch.ones(3, 1, 1, 2, 4)); "
            "sys.exit('triton' in sys.modules)")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.path.dirname(os.path.dirname(kernels.__file__))
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# ------------------------------------------------------- what surrounds the arithmetic


@pytest.mark.parametrize("wanted", [
    subset for n in range(1, 5) for subset in itertools.combinations(range(4), n)
])
def test_any_of_the_gradients(wanted):
    check_logits(kernels, ConvCase(D=9, C=7, wanted=wanted))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["attention", "dynamic_conv2d", "class_maps"])
def test_any_of_the_gradients_beside_torchs_own(name, backend):
    """Of functions whose gradients torch computes in part or altogether."""
    inputs = [t.detach() for t in arguments()[name]]
    differentiable = [i for i, t in enumerate(inputs) if t.is_floating_point()]
    for wanted in itertools.chain.from_iterable(
            itertools.combinations(differentiable, n) for n in (1, 2, 3, 4)):
        def run(functions, convert, **options):
            leaves = [convert(t).clone() if i in differentiable else t
                      for i, t in enumerate(inputs)]
            for i in wanted:
                leaves[i].requires_grad_()
            outputs = [o for o in as_list(getattr(functions, name)(*leaves, **options))
                       if o.requires_grad]
            upstream = [torch.linspace(-1, 1, o.numel()).view(o.shape).to(o) for o in outputs]
            return torch.autograd.grad(outputs, [leaves[i] for i in wanted], upstream,
                                       allow_unused=True)

        exact = run(reference, torch.Tensor.double)
        found = run(kernels, torch.Tensor.clone, backend=backend)
        for i, a, e in zip(wanted, found, exact, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5, msg=f"{wanted}: {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("check", [check_conv, check_logits, check_class_maps])
def test_sums_beyond_float16(check, dtype):
    """196 positions of 60, each up to nine times in a padded pool."""
    case = ConvCase(B=1, D=9, C=7, h=14, w=14, level=60.0, dtype=dtype)
    for pool in ("gap", "padded"):
        check(kernels, case._replace(pool=pool))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["attention", "aggregate_attention"])
def test_maps_are_float32_under_autocast(name, backend):
    """And as exact as that, for inputs that autocast has rounded to bfloat16."""
    q, k, v = (t.bfloat16() for t in attention_inputs(AttentionCase(N=40, d=16)))
    inputs = (q, k, v) if name == "attention" else ((q @ k.mT).float().softmax(-1),)
    options = {"relation": True} if name == "attention" else {}
    exact = getattr(reference, name)(*(t.double() for t in inputs), **options)
    with torch.autocast("cpu", torch.bfloat16):
        given = [t.float() for t in inputs]
        outputs = getattr(kernels, name)(*given, **options, backend=backend)
    for actual, expected in zip(outputs[-2:], exact[-2:]):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["dynamic_conv2d", "dynamic_conv_logits", "class_maps"])
def test_autocast_casts_and_backward_runs_outside(name, backend):
    """Results and gradients are those of inputs cast by hand, gradients in the leaves' dtype."""
    case = ConvCase(D=9, C=7)
    classes = (torch.tensor([[1, 6], [0, 0]]),) * (name == "class_maps")

    def run(cast, context):
        leaves = [t.requires_grad_() for t in conv_inputs(case)]
        with context:
            output = getattr(kernels, name)(*map(cast, leaves), *classes, backend=backend)
        assert output.dtype == torch.bfloat16
        return output, *torch.autograd.grad(output.float().square().sum(), leaves)

    automatic = run(lambda t: t, torch.autocast("cpu", torch.bfloat16))
    by_hand = run(lambda t: t.bfloat16(), torch.autocast("cpu", enabled=False))
    for a, b in zip(automatic, by_hand):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6 * b.abs().max().item())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["attention", "aggregate_attention", "dynamic_conv2d",
                                  "dynamic_conv_logits", "class_maps"])
def test_an_empty_batch(name, backend):
    """Empty outputs, and gradients of zeros for what all images share."""
    full = arguments()[name]
    shared = 1 if name in ("attention", "aggregate_attention") else 2
    inputs = [t.detach()[:0] for t in full] if shared == 1 else [
        t.detach()[:0] if i in (0, 1, 4) else t.detach() for i, t in enumerate(full)]
    expected = getattr(kernels, name)(*(t.detach() for t in full), backend="torch")
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]
    outputs = getattr(kernels, name)(*inputs, backend=backend)
    for o, e in zip(as_list(outputs), as_list(expected), strict=True):
        assert o.shape == (0, *e.shape[1:]) and o.dtype == e.dtype
    for leaf, gradient in zip(inputs, gradients(outputs, inputs)):
        assert gradient.shape == leaf.shape and not gradient.any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_requested_classes(backend):
    inputs = [t.detach() for t in conv_inputs(ConvCase())]
    none = torch.empty(2, 0, dtype=torch.int64)
    assert kernels.class_maps(*inputs, none, backend=backend).shape == (2, 0, 5, 8)


@pytest.mark.parametrize("ids", [[0, -1], [21, 3], [2**32, 0], [-(2**40), 5]])
def test_class_ids_out_of_range(ids):
    """ValueError in CPU memory; below that check the kernel and torch read nothing and give NaN."""
    from kernels import cdm, torch_path

    case = ConvCase(B=1)
    inputs, classes = conv_inputs(case), torch.tensor([ids])
    refused(ValueError, ["classes", str(min(ids)), str(max(ids)), "0 to 20"],
            kernels.class_maps, *inputs, classes)
    valid = [i for i in range(2) if 0 <= ids[i] < case.C]
    for products in (cdm.class_products, torch_path.class_products):
        pairs = products(*inputs[:3], classes).unflatten(1, (2, 9))
        for i in range(2):
            assert pairs[:, i].isfinite().all() if i in valid else pairs[:, i].isnan().all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_unknown_classes_on_a_gpu_are_nan(backend, monkeypatch):
    """There nobody reads the ids before the kernel runs. The known ones are as ever."""
    inputs = conv_inputs(ConvCase(B=1))
    known, mixed = torch.tensor([[3, 20, 5, 0]]), torch.tensor([[3, -1, 21, 0]])
    expected = kernels.class_maps(*inputs, known, backend=backend)
    monkeypatch.setattr(kernels, "check_classes", lambda *_: None)
    found = kernels.class_maps(*inputs, mixed, backend=backend)
    assert found[:, 1:3].isnan().all()
    torch.testing.assert_close(found[:, [0, 3]], expected[:, [0, 3]])


def far(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with images 2^31 elements apart, in memory that nobody touches in between."""
    stride = 2**31 + 8
    larger = torch.empty((len(tensor) - 1) * stride + tensor[0].numel(), dtype=tensor.dtype)
    view = larger.as_strided(tensor.shape, (stride, *tensor[0].contiguous().stride()))
    return view.copy_(tensor)


@pytest.mark.parametrize("name", ["attention", "class_row", "aggregate_attention", "dynamic_conv2d",
                                  "dynamic_conv_logits", "class_maps"])
def test_images_far_apart(name):
    """Offsets beyond 32 bits: the results are those of the same values side by side."""
    def run(place):
        if name in ("attention", "class_row", "aggregate_attention"):
            q, k, v = (t.half() for t in attention_inputs(
                AttentionCase(S=1, N=5, d=8, layouts=("contiguous",) * 3)))
            if name == "aggregate_attention":
                return kernels.aggregate_attention(
                    place((q @ k.mT).softmax(-1)), backend="triton")
            q, k, v = map(place, (q, k, v))
            return kernels.attention(q, k, v, relation=name == "attention", backend="triton")[:2]
        x, *rest = (t.half() for t in conv_inputs(ConvCase(D=3, C=2, h=2, w=2)))
        classes = (torch.tensor([[1], [0]]),) * (name == "class_maps")
        return (getattr(kernels, name)(place(x), *rest, *classes, backend="triton"),)

    for near_by, far_away in zip(run(lambda t: t), run(far)):
        assert torch.equal(near_by, far_away)


def test_offsets_inside_an_image_stay_below_32_bits():
    """Else the tensor is copied together, and refused where that does not help."""
    from kernels.launch import short_offsets

    wide = torch.empty(1, device="meta").as_strided((2, 3, 4), (1, 2**31, 1))
    assert short_offsets("x", wide, 1).stride() == (12, 4, 1)
    assert short_offsets("x", wide, 2) is wide  # a kernel adds a head's offset in 64 bits
    huge = torch.empty(1, device="meta").as_strided((1, 2**16, 2**16), (0, 2**16, 1))
    refused(ValueError, ["x", "65536", "2^31"], short_offsets, "x", huge, 1)


class Launched:
    """A kernel that remembers the grid and the current device."""

    __name__ = "some_kernel"
    grid = None

    def __getitem__(self, grid):
        self.grid = grid
        return lambda *arguments, **options: None


def test_launch_checks_the_grid_and_enters_the_tensors_device(monkeypatch):
    from kernels.launch import launch

    kernel, entered = Launched(), []
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: entered.append(t) or torch.no_grad())
    tensor = torch.zeros(1)
    launch(kernel, (0, 5), tensor)
    assert kernel.grid is None
    launch(kernel, (2**31 - 1, 65535, 65535), tensor)
    assert kernel.grid == (2**31 - 1, 65535, 65535) and entered == [tensor]
    for grid, axis in (((2**31,), "x"), ((1, 65536), "y"), ((1, 1, 65536), "z")):
        refused(ValueError, ["some_kernel", str(max(grid)), f"{axis} axis"], launch, kernel, grid,
                tensor)


def test_the_batch_is_on_the_grids_first_axis(monkeypatch):
    """The one that may be long: the other axes stay the same for a batch of 1 and of 3."""
    from kernels import cdm, rpam

    grids = {}

    def record(kernel, grid, *arguments, **options):
        grids.setdefault(kernel.__name__, []).append(grid)

    monkeypatch.setattr(cdm, "launch", record)
    monkeypatch.setattr(rpam, "launch", record)
    for B in (1, 3):
        for function, batch in calls(B).values():
            function(*batch)
            if len(batch) != 3:
                leaves = [t.requires_grad_() for t in batch]
                gradients(function(*leaves), leaves)
    assert len(grids) == 7
    for name, (one, *_, three) in grids.items():
        assert three == (3 * one[0], *one[1:]), name


@pytest.mark.parametrize("setting, expected", [
    ("pass", "tf32x3"), ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
    ("torch.set_float32_matmul_precision('high')", "tf32"),
    ("torch.set_float32_matmul_precision('medium')", "tf32"),
    ("torch.set_float32_matmul_precision('highest')", "tf32x3"),
    ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
    ("torch.backends.fp32_precision = 'tf32'", "tf32"),
    ("torch.backends.cudnn.allow_tf32 = False", "tf32x3"), ("torch.version.hip = '6'", "ieee"),
])
def test_dot_precision_follows_torchs_setting(setting, expected):
    code = f"import torch; {setting}; from kernels.launch import dot_precision as d; print(d())"
    environment = os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(kernels.__file__))}
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True,
                           text=True, env=environment)
    assert ended.stdout.strip() == expected, ended.stderr


def test_dot_precision_before_torch_2_9(monkeypatch):
    from kernels import launch

    class Matmul:
        allow_tf32 = True

    monkeypatch.setattr(torch.backends.cuda, "matmul", Matmul)
    assert launch.dot_precision() == "tf32"
    Matmul.allow_tf32 = False
    assert launch.dot_precision() == "tf32x3"


# ------------------------------------------------------------------------------------------- errors


def refused(error, words, function, *inputs, **options):
    with pytest.raises(error) as caught:
        function(*inputs, **options)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message


def test_errors_name_the_argument_what_it_got_and_needs(monkeypatch):
    given = {name: [t.detach() for t in inputs] for name, inputs in arguments().items()}
    q, k, v = given["attention"]
    (attn,), (x, scores, weight, bias, classes) = given["aggregate_attention"], given["class_maps"]
    attention, aggregate, conv, logits, maps = (getattr(kernels, name) for name in given)
    for words, function, *inputs in (
        ("q: got shape (2, 6, 16), need (B, S, N+1, d)", attention, q[0], k[0], v[0]),
        ("k: got shape (2, 2, 5, 16), need q's (2, 2, 6, 16)", attention, q, k[:, :, 1:], v),
        ("v: got torch.float16 on cpu, q is torch.float32", attention, q, k, v.half()),
        ("v: got torch.float32 on meta, q is torch.float32 on cpu", attention, q, k, v.to("meta")),
        ("q: got torch.int64", attention, q.long(), k.long(), v.long()),
        ("attn: got shape (2, 3, 6, 5)", aggregate, attn[..., 1:]),
        ("x: got shape (9, 3, 5), need (B, D, h, w)", conv, x[0], scores, weight, bias),
        ("k, k) with k 1 or 3", conv, x, scores, weight[..., 1:, :], bias),
        ("weight: got shape (3, 7, 8, 3, 3), need (G, C, 9", logits, x, scores, weight[:, :, 1:],
         bias),
        ("scores: got shape (2, 2), need (2, 3)", conv, x, scores[:, 1:], weight, bias),
        ("scores: got torch.int64 on cpu, need floating", conv, x, scores.long(), weight, bias),
        ("scores: got torch.float32 on meta", conv, x, scores.to("meta"), weight, bias),
        ("bias: got shape (6,), need (7,)", conv, x, scores, weight, bias[1:]),
        ("weight: got torch.float16", conv, x, scores, weight.half(), bias),
        ("classes: got torch.int64 of shape (4,), need int64 of (2, K)", maps, x, scores, weight,
         bias, classes[0]),
        ("classes: got torch.float32", maps, x, scores, weight, bias, classes.float()),
        ("classes: got a tensor on meta, x is on cpu", maps, x, scores, weight, bias,
         classes.to("meta")),
        ("pool: got 'max', need \"gap\"", logits, x, scores, weight, bias, "max"),
    ):
        for backend in ("torch", "triton"):
            refused(ValueError, [words], function, *inputs, backend=backend)
    refused(ValueError, ["backend: got 'cuda', need \"triton\""], conv, x, scores, weight, bias,
            backend="cuda")
    refused(ValueError, ["backend: got 'cuda'"], kernels.use_backend("cuda").__enter__)

    with kernels.use_backend("triton"):
        refused(ValueError, ["attn: got torch.float64", "float32"], aggregate, attn.double())
        wide = torch.randn(1, 1, 3, 129)
        for relation in (True, False):
            refused(ValueError, ["q: got head dimension 129", "at most 128"], attention, wide, wide,
                    wide, relation)
    for backend in ("torch", "triton"):
        refused(RuntimeError, ["attention: relation=True has no gradient", "no_grad"], attention,
                q.requires_grad_(), k, v, relation=True, backend=backend)
    monkeypatch.delenv("TRITON_INTERPRET")
    refused(RuntimeError, ["x: got a CPU tensor", "TRITON_INTERPRET"], conv, x, scores, weight,
            bias, backend="triton")


# -------------------------------------------------------------------------------------------- model


def small_model():
    import lctr

    torch.manual_seed(0)
    model = lctr.LCTR(5, img_size=(24, 32), patch_size=8, embed_dim=24, depth=2, num_heads=2,
                      num_kernels=3)
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

    names, parameters = zip(*model.named_parameters())

    def step():
        loss = torch.nn.functional.cross_entropy(model(images), torch.tensor([1, 4]))
        return dict(zip(names, torch.autograd.grad(loss, parameters)))

    torch_path = step()
    with kernels.use_backend("triton"):
        triton_path = step()
    for name, gradient in torch_path.items():
        torch.testing.assert_close(triton_path[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
