"""The operators on Triton, in its interpreter, against the equations; then what surrounds them.

First the properties of each operator: kernel_properties.py states them, with the cases that are
drawn and the bounds that follow from the arithmetic. Then gradients, strides, addresses, autocast,
torch.compile, dispatch and errors.
"""

import contextlib
import functools
import itertools
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import kernel_properties
import kernels
from kernel_properties import (
    DEIT_SMALL, DTYPES, LAYOUTS, PROPERTIES, AttentionCase, ConvCase, attention_inputs,
    check_aggregate_attention, check_attention, check_class_ids, check_class_maps, check_class_row,
    check_dynamic_conv2d, check_dynamic_conv_logits, hold, in_bounds, laid_out, unit,
)
from kernels import cdm, checks, reference, rpam

# --------------------------------------------------------------------------------------- properties

OPERATORS = ("attention", "aggregate_attention", "dynamic_conv2d", "dynamic_conv_logits",
             "class_maps")
each_operator = pytest.mark.parametrize("name", OPERATORS)
each_backend = pytest.mark.parametrize("backend", ["torch", "triton"])
each_property = pytest.mark.parametrize("check", PROPERTIES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
WIDEST_HEAD = AttentionCase(B=1, S=1, N=40, d=128)
LARGE_LOGITS = AttentionCase(B=1, scale=64.0)  # whose exp overflows without a row's maximum
LOW_LOGITS = AttentionCase(B=1, d=8, shift=24.0)  # and underflows
DEIT_HEADS = AttentionCase(B=1, S=2, N=196, d=64)
SEVERAL_BLOCKS = ConvCase(B=1, D=16, C=5, G=2, h=9, w=31)  # of positions
LARGE_SUMS = ConvCase(B=1, D=9, C=7, h=14, w=14, level=60.0)  # beyond float16
EXAMPLES = {  # cases that each property must hold for besides drawn ones
    check_attention: [WIDEST_HEAD, LARGE_LOGITS, LOW_LOGITS],
    check_class_row: [WIDEST_HEAD, LARGE_LOGITS, LOW_LOGITS, DEIT_HEADS],
    check_aggregate_attention: [DEIT_HEADS],
    check_dynamic_conv2d: [SEVERAL_BLOCKS, LARGE_SUMS],
    check_dynamic_conv_logits: [LARGE_SUMS, LARGE_SUMS._replace(pool="padded")],
    check_class_maps: [SEVERAL_BLOCKS, LARGE_SUMS],
    check_class_ids: [],
}


@each_dtype
@each_property
def test_operators_equal_the_equations(check, dtype):
    for case in EXAMPLES[check]:
        check(kernels, case._replace(dtype=dtype))
    hold(check, dtype, examples=6)


def test_class_ids_out_of_range_give_nan_maps_in_torch_too():
    check_class_ids(kernels, ConvCase(), backend="torch")


@pytest.mark.full
@each_property
def test_deit_small_in_the_interpreter(check):
    check(kernels, DEIT_SMALL[PROPERTIES[check]]._replace(B=1, dtype=torch.bfloat16))


@pytest.mark.full
def test_what_a_gpu_runs_on_a_cpu(capsys):
    kernel_properties.main(examples=1, processes=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{name}: ok" for name in kernel_properties.NAMES]


# ---------------------------------------------------------------------------- every public function

def arguments(name: str, B: int = 2, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """A public function's tensors, differentiable where the function is."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*size):
        return torch.randn(size, generator=generator).to(device, dtype).requires_grad_()

    if name == "attention":
        return [leaf(B, 2, 35, 16), leaf(B, 2, 35, 16), leaf(B, 2, 35, 16)]
    if name == "aggregate_attention":
        attn = torch.randn(B, 3, 6, 6, generator=generator).softmax(-1)
        return [attn.to(device, dtype).requires_grad_()]
    tensors = [leaf(B, 9, 3, 5), leaf(B, 3), leaf(3, 7, 9, 3, 3), leaf(7)]
    if name == "class_maps":
        classes = torch.tensor([[1, 6, 6], [0, 0, 4], [5, 2, 3]])
        tensors.append(classes[:B].to(device))
    return tensors


def detached(tensors):
    return [t.detach() for t in tensors]


def per_image(tensors, images):
    """The tensors of some images: what the images share, weight and bias, is left as it is."""
    B = len(tensors[0])
    shared = range(2, 4) if len(tensors) > 3 else ()
    return [t if i in shared else t[:B][images] for i, t in enumerate(tensors)]


def as_list(outputs) -> list[torch.Tensor]:
    """A function's outputs, without those that are None."""
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    return [o for o in outputs if o is not None]


def gradients(outputs, inputs) -> tuple[torch.Tensor, ...]:
    """Under an upstream from -1 to 1, for all inputs that require one."""
    outputs, leaves = as_list(outputs), [t for t in inputs if t.requires_grad]
    upstream = [torch.linspace(-1, 1, o.numel()).view(o.shape).to(o) for o in outputs]
    return torch.autograd.grad(outputs, leaves, upstream)


@each_backend
@each_operator
def test_gradients_are_those_of_the_equations(name, backend):
    """In float32, a few dozen terms."""
    inputs, exact_inputs = arguments(name), arguments(name, dtype=torch.float64)
    found = gradients(getattr(kernels, name)(*inputs, backend=backend), inputs)
    exact = gradients(getattr(reference, name)(*exact_inputs), exact_inputs)
    for actual, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@each_operator
def test_same_bits_again_and_a_batch_is_its_images(name):
    function = functools.partial(getattr(kernels, name), backend="triton")
    if name == "attention":
        function = functools.partial(function, relation=True)
    inputs = detached(arguments(name, B=3))
    together, again = as_list(function(*inputs)), as_list(function(*inputs))
    images = [as_list(function(*per_image(inputs, slice(b, b + 1)))) for b in range(3)]
    for a, b, alone in zip(together, again, zip(*images)):
        assert torch.equal(a, b)
        if name in ("dynamic_conv_logits", "attention"):
            # They end in torch's GEMM or exp2, which treat a batch's last rows differently.
            u = 81 * unit(torch.float32)
            torch.testing.assert_close(a, torch.cat(alone), rtol=u, atol=8 * u)
        else:
            assert torch.equal(a, torch.cat(alone))


@each_operator
def test_gradients_have_the_same_bits_again(name):
    inputs = arguments(name)
    first, second = (gradients(getattr(kernels, name)(*inputs, backend="triton"), inputs)
                     for _ in range(2))
    assert all(map(torch.equal, first, second))


@each_backend
@each_operator
def test_an_empty_batch(name, backend):
    """Empty outputs, and gradients of zeros for what all images share."""
    full = arguments(name)
    inputs = per_image(detached(full), slice(0, 0))
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]
    outputs = getattr(kernels, name)(*inputs, backend=backend)
    expected = getattr(kernels, name)(*detached(full), backend="torch")
    for o, e in zip(as_list(outputs), as_list(expected), strict=True):
        assert o.shape == (0, *e.shape[1:]) and o.dtype == e.dtype
    for leaf, gradient in zip(inputs, gradients(outputs, inputs)):
        assert gradient.shape == leaf.shape and not gradient.any()


@each_backend
def test_no_requested_classes(backend):
    *inputs, classes = detached(arguments("class_maps"))
    maps = kernels.class_maps(*inputs, classes[:, :0], backend=backend)
    assert maps.shape == (2, 0, 3, 5)


@pytest.mark.parametrize("ids", [[0, -1], [7, 3], [2**32, 0], [-(2**40), 5]])
def test_class_ids_out_of_range_are_an_error_in_cpu_memory(ids):
    *inputs, _ = detached(arguments("class_maps", B=1))
    refused(ValueError, ["classes", str(min(ids)), str(max(ids)), "0 to 6"],
            kernels.class_maps, *inputs, torch.tensor([ids]))


# ------------------------------------------------------------------------------ meta, torch.compile


@each_backend
@each_operator
def test_shapes_and_gradients_on_the_meta_device(name, backend):
    """Shapes, strides and devices without data. A tensor made on another device would raise."""
    function, inputs = getattr(kernels, name), arguments(name, device="meta")
    outputs = as_list(function(*inputs, backend=backend))
    reals = as_list(function(*arguments(name), backend=backend))
    for meta, real in zip(outputs, reals, strict=True):
        assert meta.device.type == "meta" and meta.dtype == real.dtype
        assert meta.shape == real.shape and meta.stride() == real.stride()
    for gradient, leaf in zip(gradients(outputs, inputs), inputs):
        assert gradient.device.type == "meta" and gradient.shape == leaf.shape


@pytest.mark.full
def test_operators_pass_torchs_own_checks():
    """opcheck: schema, autograd registration, fake against real outputs, symbolic shapes."""
    q, k, v = detached(arguments("attention"))
    leaf_x = arguments("dynamic_conv2d")[0]
    x, scores, weight, bias, classes = detached(arguments("class_maps"))
    for operator, inputs in (
        (rpam.aggregate_attention, detached(arguments("aggregate_attention"))),
        (rpam.attention_relation, (q, k, v)),
        (rpam.class_rows, (q[:, :, 0].requires_grad_(), k.clone().requires_grad_())),
        (rpam.class_rows_backward, (torch.randn(2, 35), torch.rand(2, 2, 35), q[:, :, 0], k)),
        (cdm.dynamic_conv2d, (x, scores, weight, bias)),
        (cdm.window_sums, (leaf_x, 3, True)),
        (cdm.window_sums_backward, (torch.randn(2, 9, 9), 3, 5, 3, False)),
        (cdm.class_products, (x, scores, weight, classes)),
    ):
        torch.library.opcheck(operator, inputs)


@pytest.mark.parametrize("amp", [
    pytest.param(False, id="float32", marks=pytest.mark.full), pytest.param(True, id="autocast")])
@each_operator
def test_compiles_in_one_graph(name, amp, compile_whole, monkeypatch):
    """Forward and backward, on torch 2.11 too, whose Dynamo cannot trace is_autocast_available."""
    monkeypatch.setattr(
        torch.amp, "is_autocast_available", lambda device: torch._dynamo.graph_break())
    inputs = arguments(name)

    def run(function):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            outputs = function(*inputs, backend="triton")
        return [*as_list(outputs), *gradients(outputs, inputs)]

    function = getattr(kernels, name)
    for plain, compiled in zip(run(function), run(compile_whole(function)), strict=True):
        torch.testing.assert_close(compiled, plain)


# ----------------------------------------------------------------------------------------- autocast


@each_backend
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


def run_under(context, cast, name, inputs, backend):
    """An operator's outputs and gradients, its backward pass outside of the context."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    with context:
        outputs = as_list(getattr(kernels, name)(*map(cast, leaves), backend=backend))
    return [*outputs, *gradients(outputs, leaves)]


@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "aggregate_attention"])
def test_autocast_casts_as_torchs_products_do(name, given):
    """All of them to bfloat16, but for float64, which stays. Results and gradients are those of
    inputs cast by hand, gradients in the leaves' dtype."""
    cast = torch.bfloat16 if given != torch.float64 else given
    inputs = arguments(name, dtype=given)
    for backend in ("torch", "triton")[: 1 + (given != torch.float64)]:
        automatic = run_under(
            torch.autocast("cpu", torch.bfloat16), lambda t: t, name, inputs, backend)
        by_hand = run_under(
            contextlib.nullcontext(),
            lambda t: t.to(cast) if t.is_floating_point() else t, name, inputs, backend)
        assert automatic[0].dtype == cast
        for a, b in zip(automatic, by_hand, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6 * b.abs().max().item())


# ------------------------------------------------------------------------------- strides, addresses


def test_upstream_gradients_may_have_any_strides():
    """Those of the operators inside, to which torch hands what the steps behind them left."""
    q, k, _ = arguments("attention")
    x = arguments("dynamic_conv2d")[0]
    for output, inputs in (
        (rpam.class_rows(q[:, :, 0], k)[0], (q, k)), (cdm.window_sums(x, 3, True), (x,)),
    ):
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        for layout in LAYOUTS:
            expected, found = (
                torch.autograd.grad(output, inputs, u, retain_graph=True)
                for u in (upstream, laid_out(upstream, layout)))
            assert all(map(torch.equal, expected, found)), layout


@pytest.mark.parametrize("dtype, d, layout, copied", [
    (torch.float32, 64, "packed", False), (torch.float32, 64, "padded", True),  # rows of 69
    (torch.float32, 61, "packed", True), (torch.float16, 64, "packed", False),
    (torch.float16, 60, "packed", True),  # of 120 bytes
    (torch.float32, 64, "sliced", True), (torch.float32, 64, "shifted", True),
])
def test_rows_off_16_bytes_are_copied_before_torchs_attention_on_cuda(
        dtype, d, layout, copied, monkeypatch, compile_whole):
    """Which has no kernel for them. Its own process has no GPU: these tensors only say so."""
    class OnCuda(torch.Tensor):
        is_cuda = True

    given = []
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda *qkv: given.extend(qkv) or qkv[0])
    qkv = attention_inputs(AttentionCase(d=d, dtype=dtype, layouts=(layout,) * 3))
    if layout == "shifted":
        qkv = [torch.nn.functional.pad(t, (4, 4))[..., 1 : 1 + d] for t in qkv]
    kernels.attention(*(t.as_subclass(OnCuda) for t in qkv), backend="torch")
    for before, after in zip(qkv, given, strict=True):
        assert torch.equal(before, after)
        assert torch.equal(compile_whole(checks.aligned)(before), before)
        assert (before.data_ptr() != after.data_ptr()) == copied
        starts = [start * after.itemsize for start in (*after.stride()[:3], after.storage_offset())]
        # rows that are no multiple of 16 bytes are torch's slow kernel's
        assert d * after.itemsize % 16 or not any(start % 16 for start in starts)


@pytest.fixture
def far(tmp_path):
    """The same values with what lies along an axis 2^30 + 8 elements apart, in a sparse file.

    Triton passes such a stride as a 32-bit number, and the third's offset does not fit in one.
    """
    numbers = itertools.count()

    def place(tensor, axis):
        strides = list(tensor.contiguous().stride())
        strides[axis] = 2**30 + 8
        memory = torch.from_file(
            str(tmp_path / str(next(numbers))), shared=True, dtype=tensor.dtype,
            size=(tensor.shape[axis] - 1) * strides[axis] + tensor.numel())
        return memory.as_strided(tensor.shape, strides).copy_(tensor)

    return place


def localisation(q, k, v):
    return kernels.attention(q, k, v, relation=True)


def training(q, k, v):
    """M^c and its gradients."""
    leaves = [q.requires_grad_(), k.requires_grad_()]
    cls_attn = kernels.attention(*leaves, v)[1]
    return [cls_attn, *gradients(cls_attn, leaves)]


@pytest.mark.parametrize("axis", [0, 1], ids=["images", "heads"])
@pytest.mark.parametrize("function, d", [
    pytest.param(localisation, 8, id="one pass"), pytest.param(localisation, 72, id="two passes"),
    (training, 8), (kernels.aggregate_attention, 8)])
def test_attention_of_images_and_heads_far_apart(function, d, axis, far):
    """Results and gradients are those of the same values side by side."""
    q, k, v = (t.half() for t in attention_inputs(AttentionCase(
        B=3, S=3, N=5, d=d, layouts=("contiguous",) * 3)))
    inputs = (q, k, v)
    if function is kernels.aggregate_attention:
        inputs = [(q @ k.mT).softmax(-1)]
    with in_bounds(), kernels.use_backend("triton"):
        far_apart = function(*(far(t, axis) for t in inputs))
        together = function(*inputs)
    assert all(map(torch.equal, far_apart, together))


@pytest.mark.parametrize("name", OPERATORS[2:])
def test_convolution_of_images_far_apart(name, far):
    x, *rest = (t.half() if t.is_floating_point() else t
                for t in detached(arguments(name, B=3)))
    with in_bounds():
        near, far_away = (
            getattr(kernels, name)(images, *rest, backend="triton") for images in (x, far(x, 0)))
    assert torch.equal(near, far_away)


def test_gradient_of_pooled_images_beyond_32_bits(far):
    """Image 2 of dX is written where it lies, 2^31 elements on: of each image the first block."""
    D, H, W, rows = 64, 2**12, 2**12, 32
    grad = torch.randn(3, D, 9, generator=torch.Generator().manual_seed(0)).half()
    grad[2] = grad[0]
    room = far(torch.zeros(3, rows, D).half(), 0)
    with in_bounds():
        cdm.window_sums_backward_kernel[(3, 1, 1)](
            grad, room, D, H, W, 3, False, BLOCK_D=D, BLOCK_P=rows, BLOCK_TAP=16, PRECISION="ieee")
    first, _, third = room.as_strided((3, rows, D), (H * W * D, D, 1))
    assert first.any() and torch.equal(first, third)


def test_offsets_inside_an_image_stay_below_32_bits():
    """Else the tensor is copied together, and refused where that does not help."""
    from kernels.launch import short_offsets

    wide = torch.empty(1, device="meta").as_strided((2, 3, 4), (1, 2**31, 1))
    assert short_offsets("x", wide, 1).stride() == (12, 4, 1)
    assert short_offsets("x", wide, 2) is wide  # a kernel adds a head's offset in 64 bits
    huge = torch.empty(1, device="meta").as_strided((1, 2**16, 2**16), (0, 2**16, 1))
    refused(ValueError, ["x", "65536", "2^31"], short_offsets, "x", huge, 1)


# ----------------------------------------------------------------------------------------- dispatch


def test_use_backend():
    """Inner blocks and the keyword win over outer blocks; a block ends with an exception too."""
    def triton_runs(**backend):
        with mock.patch.object(rpam, "launch") as launch:
            kernels.aggregate_attention(torch.ones(1, 1, 3, 3), **backend)
        return launch.called

    assert not triton_runs() and triton_runs(backend="triton")
    with kernels.use_backend("triton"), kernels.use_backend("torch"):
        assert not triton_runs() and triton_runs(backend="triton")
    with pytest.raises(KeyError), kernels.use_backend("triton"):
        assert triton_runs() and not triton_runs(backend="torch")
        with kernels.use_backend(None):
            assert not triton_runs()
        assert triton_runs()
        raise KeyError
    assert not triton_runs()


def python(code: str) -> str:
    """What a fresh Python without the interpreter prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.path.dirname(os.path.dirname(kernels.__file__))
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment,
                           capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_triton_is_not_imported_before_a_kernel_runs():
    assert python("import sys, torch, kernels as k; k.attention(*torch.ones(3, 1, 1, 2, 4)); "
                  "print('triton' in sys.modules)") == "False\n"


def test_dot_precision_follows_torchs_setting():
    """A setting is the process's: each in a child of its own."""
    expected = {
        "pass": "tf32x3", "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
        "torch.set_float32_matmul_precision('high')": "tf32",
        "torch.set_float32_matmul_precision('medium')": "tf32",
        "torch.set_float32_matmul_precision('highest')": "tf32x3",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
        "torch.backends.fp32_precision = 'tf32'": "tf32",
        "torch.backends.cudnn.allow_tf32 = False": "tf32x3",
        "torch.version.hip = '6'": "ieee",
    }
    found = python(
        "import os, torch\nfrom kernels.launch import dot_precision\n"
        f"for setting in {list(expected)}:\n"
        "    if not os.fork():\n"
        "        exec(setting)\n"
        "        print(dot_precision(), flush=True)\n"
        "        os._exit(0)\n"
        "    os.wait()\n")
    assert dict(zip(expected, found.split(), strict=True)) == expected


def test_launch_checks_the_grid_and_enters_the_tensors_device(monkeypatch):
    from kernels.launch import launch

    kernel, tensor, entered = mock.MagicMock(__name__="some_kernel"), torch.zeros(1), []
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: entered.append(t) or torch.no_grad())
    launch(kernel, (0, 5), tensor)
    assert not kernel.mock_calls
    launch(kernel, (2**31 - 1, 65535, 65535), tensor, B=7)
    kernel.__getitem__.assert_called_once_with((2**31 - 1, 65535, 65535))
    kernel.__getitem__().assert_called_once_with(tensor, B=7)
    assert entered == [tensor]
    for grid, axis in (((2**31,), "x"), ((1, 65536), "y"), ((1, 1, 65536), "z")):
        refused(ValueError, ["some_kernel", str(max(grid)), f"{axis} axis"], launch, kernel, grid,
                tensor)


# ------------------------------------------------------------------------------------------- errors


def refused(error, words, function, *inputs, **options):
    with pytest.raises(error) as caught:
        function(*inputs, **options)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message


def test_errors_name_the_argument_what_it_got_and_needs():
    q, k, v = detached(arguments("attention"))
    (attn,) = detached(arguments("aggregate_attention"))
    x, scores, weight, bias, classes = detached(arguments("class_maps"))
    attention, aggregate, conv, logits, maps = (getattr(kernels, name) for name in OPERATORS)
    for words, function, *inputs in (
        ("q: got shape (2, 35, 16), need (B, S, N+1, d)", attention, q[0], k[0], v[0]),
        ("k: got shape (2, 2, 34, 16), need q's (2, 2, 35, 16)", attention, q, k[:, :, 1:], v),
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
        ("classes: got torch.int64 of shape (3,), need int64 of (2, K)", maps, x, scores, weight,
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


def test_errors_of_what_triton_cannot_run(monkeypatch):
    q, k, v = detached(arguments("attention"))
    (attn,) = detached(arguments("aggregate_attention"))
    with kernels.use_backend("triton"):
        refused(ValueError, ["attn: got torch.float64", "float32"], kernels.aggregate_attention,
                attn.double())
        wide = torch.randn(1, 1, 3, 129)
        for relation in (True, False):
            refused(ValueError, ["q: got head dimension 129", "at most 128"], kernels.attention,
                    wide, wide, wide, relation)
    for backend in ("torch", "triton"):
        refused(RuntimeError, ["attention: relation=True has no gradient", "no_grad"],
                kernels.attention, q.requires_grad_(), k, v, relation=True, backend=backend)
    monkeypatch.delenv("TRITON_INTERPRET")
    refused(RuntimeError, ["attn: got a CPU tensor", "TRITON_INTERPRET"],
            kernels.aggregate_attention, attn, backend="triton")


# -------------------------------------------------------------------------------------------- model


def test_a_model_trains_and_localizes_the_same_on_triton():
    import lctr

    torch.manual_seed(0)
    model = lctr.LCTR(5, img_size=(24, 32), patch_size=8, embed_dim=24, depth=2, num_heads=2,
                      num_kernels=3).eval()
    images = torch.randn(2, 3, 24, 32)

    def run():
        loss = torch.nn.functional.cross_entropy(model(images), torch.tensor([1, 4]))
        steps = torch.autograd.grad(loss, list(model.parameters()))
        return [*steps, *model.localize(images), *model.localize(images, "all")]

    on_torch = run()
    with kernels.use_backend("triton"):
        on_triton = run()
    torch.testing.assert_close(on_triton, on_torch, rtol=1e-4, atol=1e-6)
