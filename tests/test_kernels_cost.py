"""What LCTR costs over a plain ViT, in operations counted rather than timed; and that torch.compile takes it whole."""

import pytest
import torch

from kernels.benchmark import PlainViT, Work, operations
from lctr import LCTR

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


@pytest.mark.parametrize("task, num_classes, img_size, limit",
                         [("train", 200, 224, 1.08), ("train", 1000, 224, 1.09), ("localize", 200, 224, 1.10),
                          ("localize", 1000, 224, 1.10), ("localize", 200, 448, 1.10)])
def test_operations_are_the_least(task, num_classes, img_size, limit):
    work, N = Work(task, num_classes, img_size, 2), (img_size // 16) ** 2
    floor, ours = operations(work, PlainViT), operations(work, LCTR)
    assert floor == 2 * (backbone(N) + 2 * D * num_classes)
    assert ours == 2 * (backbone(N) + additions(N, num_classes) + relation(N) * (task == "localize"))
    class_rows = 2 * L * 2 * (N + 1) * D  # computed elementwise, so not counted
    assert ours + class_rows <= limit * floor


@pytest.mark.parametrize("num_classes", (200, 1000))
def test_backward_is_twice_the_forward(num_classes):
    """But for what needs no gradient: the images', and the window sums' constant factors."""
    work, N = Work("train", num_classes, 224, 2), 196
    twice = 3 * operations(work, LCTR) - 2 * (2 * N * 3 * 16 * 16 * D + 2 * N * D * k * k)
    assert operations(work, LCTR, backward=True) == twice


def test_compiles_in_one_graph():
    """fullgraph=True raises where torch.compile would break the graph; without a code generator, so that no compiler
    is needed. In training with stochastic depth, gradients included, and in localize."""
    torch.manual_seed(0)
    model = LCTR(5, img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, drop_path=0.5)
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 2, 2)
    forward, localize = (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (model, model.localize))

    def gradients(logits):
        return [logits, *torch.autograd.grad(logits.logsumexp(1).sum(), list(model.parameters()))]

    torch.testing.assert_close(gradients(forward(images, noise)), gradients(model(images, noise)))
    model.eval()
    for classes in (None, "all", torch.tensor([[0, -1], [4, 2], [-1, 1]])):
        torch.testing.assert_close(localize(images, classes), model.localize(images, classes))
