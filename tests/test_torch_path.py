"""The operators in torch: in any pieces, exact in each dtype, without A in memory; and that
torch.compile takes the model whole."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import reference, torch_path
from lctr import LCTR


def test_the_model_compiles_in_one_graph(compile_whole):
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

    D, S, T = 384, 6, side**2 + 1  # DeiT-S
    q, k, v = (torch.empty(B, T, S, D // S).transpose(1, 2) for _ in range(3))
    with torch.no_grad(), Watch():
        kernels.attention(q, k, v, relation=True, backend="torch")
    assert largest <= max(B * T * D, torch_path.ROWS * T) < B * S * T**2
