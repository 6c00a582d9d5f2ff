"""lctr.py beyond the equations of test_equations.py: sizes, precisions, classes, errors."""

import functools
import math
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, error_of, make_model, random_images, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import lctr
from lctr import LCTR, fuse
from support import walkthrough

SIZE = dict(img_size=(12, 20), patch_size=4, embed_dim=12, depth=3, num_heads=2)  # grid 3 x 5
make = functools.partial(make_model, **SIZE)


def images(batch=2, size=(12, 20), dtype=torch.float64):
    return random_images(batch, size, dtype)


def equal(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- the model


def test_stochastic_depth_drops_whole_branches_more_often_in_later_blocks():
    noise = torch.rand(4000, 3, 2, dtype=torch.float64)
    scale = lctr.stochastic_depth(noise, 0.5)  # (B, L, 2)
    values = [scale[:, block].unique().tolist() for block in range(3)]
    assert values == [[1.0], [0.0, pytest.approx(4 / 3)], [0.0, 2.0]]
    equal(scale.mean((0, 2)), torch.ones(3, dtype=scale.dtype), 0.05)

    model, x = make(drop_path=0.5).train(), images()
    noise = torch.tensor([[[0.1, 0.9], [0.9, 0.1], [0.1, 0.9]],
                          [[0.9, 0.1], [0.1, 0.9], [0.9, 0.1]]])
    tokens = model.embed(x)
    for rate, block, drawn in zip((0, 0.25, 0.5), model.blocks, noise.unbind(1)):
        # each (B, 1, 1)
        attention_scale, mlp_scale = (drawn >= rate).double().T[:, :, None, None] / (1 - rate)
        tokens = tokens + attention_scale * block.attn(block.norm1(tokens), "cls")[0]
        tokens = tokens + mlp_scale * block.mlp(block.norm2(tokens))
    equal(model.forward_features(x, "cls", noise)[0], model.norm(tokens))
    equal(model.eval()(x), make()(x))


def test_stochastic_depth_draws_its_own_noise_where_none_is_given():
    model = make(drop_path=0.9).train()
    first, second = model(images()), model(images())
    assert not torch.equal(first, second)


def test_localize_gives_the_maps_of_the_requested_classes():
    model, x = make(), images(3)
    every = model.localize(x, "all")
    assert torch.equal(every.classes, torch.arange(7).expand(3, 7))
    predicted = every.logits.argmax(1, keepdim=True)
    requested = torch.tensor([[6, 0, -1], [2, 2, 1], [-1, 5, 3]])  # -1: the predicted class
    classes = torch.where(requested < 0, predicted, requested)
    for given_ids, ids in ((requested, classes), (None, predicted)):
        localization = model.localize(x, given_ids)
        assert torch.equal(localization.classes, ids)
        equal(localization.class_maps, torch.stack([m[c] for m, c in zip(every.class_maps, ids)]))


def test_token_head_is_a_linear_layer_on_the_class_token():
    model, x = make(head="token"), images()
    tokens, _ = model.forward_features(x)
    equal(model(x), tokens[:, 0] @ model.classifier.weight.T + model.classifier.bias)
    localization = model.localize(x)
    assert torch.equal(localization.classes, localization.logits.argmax(1, keepdim=True))
    assert localization.class_maps is None
    assert fuse(localization, "relation-only").shape == (2, 1, 3, 5)
    with pytest.raises(ValueError, match='"token" head'):
        fuse(localization, "relation")


def test_each_kernel_is_initialised_with_its_own_fan_in():
    model = LCTR(50, embed_dim=24, depth=1, num_heads=2, img_size=32)
    bound = 1 / math.sqrt(24 * 9)  # kaiming uniform, a = sqrt 5: sqrt(6 / (1 + 5) / fan_in)
    assert 0.99 * bound < model.cdm.weight.abs().max() <= bound
    biases = [p for name, p in model.named_parameters()
              if name.startswith("cdm") and name.endswith("bias")]
    assert len(biases) == 4 and not any(bias.any() for bias in biases)


@settings(max_examples=15, deadline=None)
@given(h=st.integers(1, 5), w=st.integers(1, 5), heads=st.integers(1, 3), G=st.integers(1, 3),
       head=st.sampled_from(["cdm", "conv"]))
def test_any_grid_width_and_head_count(h, w, heads, G, head):
    model = make(3, img_size=(4 * h, 4 * w), embed_dim=4 * heads, num_heads=heads, num_kernels=G,
                 head=head)
    x = images(2, (4 * h, 4 * w))
    every = model.localize(x, "all")
    equal(every.class_maps.mean((2, 3)), every.logits)
    equal(model(x), every.logits)
    assert every.cls_map.shape == every.relation_map.shape == (2, h, w)


def test_scores_start_at_one_half():
    model = LCTR(3, **SIZE).train()
    model(images(2, dtype=torch.float32))
    equal(model.cdm.last_scores, torch.full((2, 4), 0.5))


def test_scores_stay_alive_at_a_high_rate():
    """Thirty steps of the head alone on features as a real backbone's: rms 2.5, a common part."""
    torch.manual_seed(0)
    D, C, B = 96, 9, 32
    common, classes = 1.8 * torch.randn(D), 1.2 * torch.randn(C, D)
    model = LCTR(C, img_size=32, patch_size=8, embed_dim=D, depth=1, num_heads=3).train()
    groups = [{"params": p, "lr": (0.02 if n.startswith(("score", "conv.")) else 1) * 1e-3}
              for n, p in model.cdm.named_parameters()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    for _ in range(30):
        labels = torch.randint(C, (B,))
        features = common[:, None, None] + classes[labels][..., None, None]
        features = features + 1.2 * torch.randn(B, D, 4, 4)
        scores = model.cdm.scores(features, torch.full((B, 4, 4), 1 / 17))
        loss = F.cross_entropy(model.cdm.logits(features, scores), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 0.05 < scores.mean() < 0.95 and loss < math.log(C) - 0.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("head", ["cdm", "conv", "token"])
def test_a_model_of_another_precision_runs_throughout(head, dtype):
    """In training and at inference; its numbers are those of float32, to that precision."""
    exact, x = make(head=head, dtype=torch.float32), images(2, dtype=torch.float32)
    model = make(head=head, dtype=torch.float32).to(dtype)
    logits = model.train()(x.to(dtype))
    logits.sum().backward()
    assert logits.dtype == dtype and all(p.grad.isfinite().all() for p in model.parameters())
    tolerance = 1e-4 if dtype == torch.float64 else 0.1
    localization, expected = model.eval().localize(x.to(dtype), "all"), exact.localize(x, "all")
    for coupling in lctr.COUPLINGS if head != "token" else ("cls-only", "relation-only"):
        one, two = fuse(localization, coupling).float(), fuse(expected, coupling)
        assert (one - two).abs().max() < tolerance * two.abs().max()


@pytest.mark.parametrize("head", ["cdm", "conv", "token"])
def test_a_channels_last_model_computes_the_same(head):
    model, x = make(head=head), images()
    logits, maps = model(x), model.localize(x, "all").class_maps
    model = model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    equal(model(x), logits)
    if head != "token":
        equal(model.localize(x, "all").class_maps, maps)
    assert model.patch_embed.proj.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore")  # of the tracer about sizes, which it keeps
def test_a_traced_model_computes_the_same():
    """What ONNX's exporter without Dynamo exports."""
    class Localizer(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return fuse(self.model.localize(x))

    localizer, others = Localizer(make()), images().flip(0, 3)
    equal(torch.jit.trace(localizer, images())(others), localizer(others))


@pytest.mark.parametrize("head", ["cdm", "conv", "token"])
def test_no_images_and_no_classes_give_empty_results(head):
    model, nothing = make(head=head), torch.zeros(0, 3, 12, 20, dtype=torch.float64)
    ids = torch.zeros(0, 2, dtype=torch.int64)
    for classes, K in ((None, 1), ("all", 7), (ids, 2), (ids[:, :0], 0)):
        empty = model.localize(nothing, classes)
        assert empty.logits.shape == (0, 7) and empty.classes.shape == (0, K)
        assert empty.cls_map.shape == empty.relation_map.shape == (0, 3, 5)
        assert fuse(empty, "cls-only").shape == (0, K, 3, 5)
        assert head == "token" or fuse(empty).shape == (0, K, 3, 5)
    assert model(nothing).shape == (0, 7)
    predicted, none = model.localize(images()), model.localize(images(), ids.new_zeros(2, 0))
    equal(none.logits, predicted.logits)
    equal(none.relation_map, predicted.relation_map)
    assert none.classes.shape == (2, 0) and fuse(none, "cls-only").shape == (2, 0, 3, 5)
    assert head == "token" or fuse(none).shape == (2, 0, 3, 5)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("change, words", [
    ({"img_size": 13}, "img_size: got 13"), ({"num_heads": 5}, "num_heads: got 5"),
    ({"head": "gap"}, "head: got 'gap'"), ({"kernel_size": 5}, "kernel_size: got 5"),
    ({"scorer": "max"}, "scorer: got 'max'"), ({"erase": "no"}, "erase: got 'no'"),
    ({"pool": "max"}, "pool: got 'max'"),
])
def test_a_choice_that_does_not_exist_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        make(**change)


def test_wrong_input_is_named():
    model = make()
    size = "images: got shape (2, 3, 12, 12), need (B, 3, 12, 20)"
    error_of(lambda: model(images(2, (12, 12))), size, error=ValueError)
    pixels = torch.zeros(2, 3, 12, 20, dtype=torch.uint8)
    for call in (model, model.localize, model.forward_features):
        error_of(lambda: call(pixels), "images: got torch.uint8", "data.normalise",
                 error=ValueError)
    error_of(lambda: model.forward_features(images(), "all"), "attention: got 'all'",
             error=ValueError)
    error_of(lambda: fuse(model.localize(images()), "sum"), "coupling: got 'sum'",
             error=ValueError)


@pytest.mark.parametrize("classes, words", [
    (torch.zeros(2, dtype=torch.int64), "classes: got shape (2,), need (2, K)"),
    (torch.zeros(3, 1, dtype=torch.int64), "classes: got shape (3, 1), need (2, K)"),
    (torch.zeros(2, 1, 1, dtype=torch.int64), "classes: got shape (2, 1, 1), need (2, K)"),
    (torch.tensor(3), "classes: got shape (), need (2, K)"),
    (torch.tensor([[7], [0]]), "classes: got ids from 0 to 7, need 0 to 6"),
    (torch.zeros(2, 1), "classes: got torch.float32"), ("top", "classes: got 'top'"),
    ([[0], [1]], "classes: got [[0], [1]]"), (3, "classes: got 3"),
], ids=str)
@pytest.mark.parametrize("head", ["cdm", "conv"])
def test_class_ids_that_do_not_fit_are_named(head, classes, words):
    error_of(lambda: make(head=head).localize(images(2), classes), words, error=ValueError)


# ---------------------------------------------------------------- the file alone, the command line


def test_lctr_and_kernels_alone_in_a_folder_localise(tmp_path):
    shutil.copy(ROOT / "lctr.py", tmp_path)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    code = ("import torch, lctr; model = lctr.LCTR(3, img_size=32, embed_dim=12, depth=1, "
            "num_heads=2).eval(); print(lctr.fuse(model.localize(torch.randn(1, 3, 32, 32))).shape)"
            "; model.train()(torch.randn(2, 3, 32, 32)).sum().backward()")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.strip() == "torch.Size([1, 1, 2, 2])", run.stderr


def test_python_lctr_prints_every_step_of_one_image(tmp_path, capsys):
    Image.new("L", (50, 30), 99).save(tmp_path / "grey.png")
    run_script("lctr.py", str(tmp_path / "grey.png"))
    lines = capsys.readouterr().out.splitlines()
    equations = [int(line[4]) for line in lines if line.startswith("Eq.")]
    assert equations == [1, 4, 5, 6, 6, 2, 2, 3, 3]
    assert any("S_g" in line and "(1, 4)" in line for line in lines)
    grey = [(99 / 255 - mean) / std
            for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    assert f"{min(grey):.3g} to {max(grey):.3g}" in lines[0]


@pytest.mark.parametrize("head", ["cdm", "conv", "token"])
def test_symbolic_shapes_of_the_steps_are_their_shapes(head):
    model, x = make(head=head), images(1)
    sizes = {"1": 1, "3": 3, "B": 1, "H": 12, "W": 20, "h": 3, "w": 5, "N": 15, "N+1": 16, "D": 12,
             "S": 2, "C": 7, "k": 3, "G": 4 if head == "cdm" else 1}
    for _, name, symbols, value in lctr.trace(model, x):
        symbols = symbols.strip("()").split(", ")
        assert value.shape == tuple(sizes[symbol] for symbol in symbols), name


def test_a_picture_that_cannot_be_read_ends_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "page.png").write_bytes(b"<html>")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])

    def error_line(name):
        monkeypatch.setattr("sys.argv", ["lctr.py", str(tmp_path / name)])
        with pytest.raises(SystemExit, match="lctr.py: error: .") as caught:
            walkthrough.main(LCTR, lctr.load_checkpoint, lctr.trace)
        return str(caught.value)

    for name in ("page.png", "cut.png", "none.png", "."):
        assert name in error_line(name) and "\n" not in error_line(name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # as for a picture above Pillow's limit
    assert "whole.png" in error_line("whole.png")
