"""What LCTR costs over a plain ViT, in operations and memory counted rather than timed; that
torch.compile takes it whole; and that attention comes out the same in any pieces."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import checks, reference, torch_path
from lctr import LCTR
from speed import PlainViT, Work, operations

D, L, S, G, k = 384, 12, 6, 4, 3  # DeiT-S


def backbone(N: int) -> int:
    """Of an image's N patches, with MLPs four times as wide."""
    T = N + 1
    block = 2 * T * D * (3 * D + D + 4 * D + 4 * D) + 4 * T * T * D  # linear layers; Q K^T and A V
    return 2 * N * 3 * 16 * 16 * D + L * block


def additions(N: int, C: int) -> int:
    """Of an image, to the forward pass: the cues, their two scores, the window sums, the logits."""
    return 2 * N * D * D * 9 + 2 * 2 * D * G + 2 * N * D * k * k + 2 * D * k * k * G * C


def relation(N: int) -> int:
    """Of an image, to localize besides: M^c A for each head, and the predicted class's map."""
    return L * 2 * S * (N + 1) ** 2 + 2 * N * D * k * k


@pytest.mark.parametrize("task, num_classes, img_size, limit", [
    ("train", 200, 224, 1.08), ("train", 1000, 224, 1.09), ("localize", 200, 224, 1.10),
    ("localize", 1000, 224, 1.10), ("localize", 200, 448, 1.10),
])
def test_operations_are_the_least(task, num_classes, img_size, limit):
    work, N = Work(task, num_classes, img_size, 2), (img_size // 16) ** 2
    floor, ours = operations(work, PlainViT), operations(work, LCTR)
    assert floor == 2 * (backbone(N) + 2 * D * num_classes)
    maps = relation(N) if task == "localize" else 0
    assert ours == 2 * (backbone(N) + additions(N, num_classes) + maps)
    class_rows = 2 * L * 2 * (N + 1) * D  # computed elementwise, so not counted
    assert ours + class_rows <= limit * floor


@pytest.mark.parametrize("num_classes", (200, 1000))
def test_backward_is_twice_the_forward(num_classes):
    """But for what needs no gradient: the images', and the window sums' constant factors."""
    work, N = Work("train", num_classes, 224, 2), 196
    twice = 3 * operations(work, LCTR) - 2 * (2 * N * 3 * 16 * 16 * D + 2 * N * D * k * k)
    assert operations(work, LCTR, backward=True) == twice


def test_compiles_in_one_graph(compile_whole):
    """In training with stochastic depth, gradients included, and in localize."""
    torch.manual_seed(0)
    model = LCTR(5, img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, drop_path=0.5)
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 1, 2)
    forward, localize = map(compile_whole, (model, model.localize))

    def gradients(logits):
        return [logits, *torch.autograd.grad(logits.logsumexp(1).sum(), list(model.parameters()))]

    torch.testing.assert_close(gradients(forward(images, noise)), gradients(model(images, noise)))
    model.eval()
    for classes in (None, "all", torch.tensor([[0, -1], [4, 2], [-1, 1]])):
        torch.testing.assert_close(localize(images, classes), model.localize(images, classes))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("rows", (1, 8, 17))
def test_attention_in_pieces_equals_its_twin(rows, dtype, monkeypatch):
    """With u the dtype's unit roundoff, P and the result each pass through it; sums of 64 products
    and fewer, and the logits' errors, cost at most another 64 roundings of float32."""
    monkeypatch.setattr(torch_path, "ROWS", rows)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 17, 3, 3, 8).to(dtype).permute(2, 0, 3, 1, 4)
    exact = reference.attention(q.double(), k.double(), v.double(), relation=True)
    sizes = reference.attention(q.double(), k.double(), v.double().abs(), relation=True)
    wide = torch.promote_types(dtype, torch.float32)
    outputs = kernels.attention(q, k, v, relation=True, backend="torch")
    for number, (actual, expected, size) in enumerate(zip(outputs, exact, sizes)):
        stored = wide if number else dtype
        bound = 64 * torch.finfo(wide).eps + (0 if number else torch.finfo(dtype).eps)
        assert actual.dtype == stored and actual.shape == expected.shape
        assert ((actual.double() - expected).abs() / size).max() <= bound


def test_torchs_fused_attention_gets_rows_that_start_at_16_bytes(compile_whole):
    """On CUDA it stops at others. One packed projection is not copied."""
    numbers = torch.randn(2 * 5 * 3 * 3 * 69 + 1)
    packed = numbers[:1440].view(2, 5, 3, 3, 16).permute(2, 0, 3, 1, 4)
    assert all(checks.aligned(t) is t for t in packed)
    padded = numbers[:-1].view(3, 2, 3, 5, 69)[..., :64]
    for t in (padded, packed[0].mT, numbers[1:1441].view(2, 3, 5, 3, 16)):
        copy = checks.aligned(t)
        assert torch.equal(copy, t) and copy.is_contiguous() and copy.data_ptr() % 16 == 0
        assert copy.data_ptr() != t.data_ptr()
        assert torch.equal(compile_whole(checks.aligned)(t), t)


def test_heads_are_summed_in_float32():
    """Where A is uniform a thousand rows add the same: bfloat16 would stop at 256 of them."""
    q = torch.zeros(1, 1, 1024, 8, dtype=torch.bfloat16)
    relation = kernels.attention(q, q, q, relation=True, backend="torch")[2]
    torch.testing.assert_close(1024**2 * relation, torch.ones(1, 1023))


@pytest.mark.parametrize("side", (14, 28, 40))
def test_localisation_never_holds_a_blocks_attention(side):
    """At 224, 448 and 640 px no tensor is larger than the features or some rows of one head."""
    largest, B = 0, 8

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            output = function(*args, **kwargs or {})
            if isinstance(output, torch.Tensor):  # promote_types gives a number
                largest = max(largest, output.untyped_storage().nbytes() // output.element_size())
            return output

    T = side**2 + 1
    q, k, v = (torch.empty(B, T, S, D // S).transpose(1, 2) for _ in range(3))
    with torch.no_grad(), Watch():
        kernels.attention(q, k, v, relation=True, backend="torch")
    assert largest <= max(B * T * D, torch_path.ROWS * T) < B * S * T**2
