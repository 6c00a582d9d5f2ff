"""lctr.py against the paper's equations, written out naively here, in float64."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import error_of, make_model, random_images
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import kernels
import lctr
from lctr import LCTR, fuse
from support import walkthrough

SIZE = dict(img_size=(12, 20), patch_size=4, embed_dim=12, depth=3, num_heads=2)  # grid 3 x 5
make = functools.partial(make_model, **SIZE)


def images(batch=2, size=(12, 20), dtype=torch.float64):
    return random_images(batch, size, dtype)


def equal(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- the transformer


def test_tokens_equal_torchs_own_encoder():
    model, x = make(), images()
    layers = []
    for block in model.blocks:
        layer = torch.nn.TransformerEncoderLayer(12, 2, 48, 0.0, "gelu", 1e-6, batch_first=True,
                                                 norm_first=True)
        layer.load_state_dict({
            "self_attn.in_proj_weight": block.attn.qkv.weight,
            "self_attn.in_proj_bias": block.attn.qkv.bias,
            "self_attn.out_proj.weight": block.attn.proj.weight,
            "self_attn.out_proj.bias": block.attn.proj.bias,
            "linear1.weight": block.mlp.fc1.weight, "linear1.bias": block.mlp.fc1.bias,
            "linear2.weight": block.mlp.fc2.weight, "linear2.bias": block.mlp.fc2.bias,
            "norm1.weight": block.norm1.weight, "norm1.bias": block.norm1.bias,
            "norm2.weight": block.norm2.weight, "norm2.bias": block.norm2.bias,
        }, assign=True)
        layers.append(layer.eval())
    projection = model.patch_embed.proj.weight.flatten(1).T
    patches = F.unfold(x, 4, stride=4).mT @ projection + model.patch_embed.proj.bias
    tokens = torch.cat([model.cls_token.expand(2, -1, -1), patches], 1) + model.pos_embed  # Eq. 1
    with torch.no_grad():
        for layer in layers:
            tokens = layer(tokens)
        equal(model.forward_features(x)[0], model.norm(tokens))


def test_the_three_kinds_of_attention_agree_and_full_is_a_softmax():
    model, x = make(), images()
    tokens, full = model.forward_features(x, "full")
    with torch.no_grad():
        relation_tokens, relation = model.forward_features(x, "relation")
    cls_tokens, cls = model.forward_features(x, "cls")
    equal(cls_tokens, tokens), equal(relation_tokens, tokens)
    for l in range(3):
        A = full[l].full
        assert A.shape == (2, 2, 16, 16)
        equal(A.sum(-1), torch.ones(2, 2, 16, dtype=A.dtype))
        mean = A.mean(1)
        equal(full[l].cls, mean[:, 0])
        equal(full[l].relation, torch.einsum("bi,bij->bj", mean[:, 0], mean[:, :, 1:]) / 16)
        equal(cls[l].cls, full[l].cls)
        equal(relation[l].cls, full[l].cls), equal(relation[l].relation, full[l].relation)
        assert cls[l].relation is None and cls[l].full is None and relation[l].full is None


def test_stochastic_depth_drops_whole_branches_more_often_in_later_blocks():
    model = make(drop_path=0.5).train()
    kept = model.stochastic_depth(4000, None)  # (B, L, 2)
    assert [kept[:, l].unique().tolist() for l in range(3)] == [[1.0], [0.0, pytest.approx(4 / 3)],
                                                                [0.0, 2.0]]
    equal(kept.mean((0, 2)), torch.ones(3, dtype=kept.dtype), 0.05)
    x, noise = images(), torch.tensor([[[0.1, 0.9], [0.9, 0.1], [0.1, 0.9]],
                                       [[0.9, 0.1], [0.1, 0.9], [0.9, 0.1]]])
    tokens = model.embed(x)
    for rate, block, drawn in zip((0, 0.25, 0.5), model.blocks, noise.unbind(1)):
        # each (B, 1, 1)
        attention_kept, mlp_kept = (drawn >= rate).double().T[:, :, None, None] / (1 - rate)
        tokens = tokens + attention_kept * block.attn(block.norm1(tokens), "cls")[0]
        tokens = tokens + mlp_kept * block.mlp(block.norm2(tokens))
    equal(model.forward_features(x, "cls", noise)[0], model.norm(tokens))
    assert model.eval().stochastic_depth(2, None) is None


# ---------------------------------------------------------------- RPAM, CDM and the maps


def naive(model, x, scorer="separate", erase="raw", pool="gap"):
    """The whole model from materialised attention, one equation a line: logits, all class maps,
    M~c, M^r.
    """
    tokens, blocks = model.forward_features(x, "full")
    mean = torch.stack([block.full.mean(1) for block in blocks]).mean(0)  # (B, N+1, N+1)
    M_c = mean[:, 0, 1:].reshape(-1, 3, 5)
    M_r = torch.stack([(A[:, 0, :, None] * A[:, :, 1:]).mean(1)
                       for A in (b.full.mean(1) for b in blocks)]).mean(0)
    X = tokens[:, 1:].transpose(1, 2).reshape(len(x), -1, 3, 5)
    if hasattr(model, "head"):
        maps = F.conv2d(X, model.head.weight, model.head.bias,
                        padding=model.head.weight.shape[-1] // 2)
    else:
        erased = M_c
        if erase == "minmax":
            erased = torch.stack([(m - m.min()) / (m.max() - m.min()) for m in M_c])
        cues = F.conv2d(X * (1 - erased)[:, None], model.cdm.conv.weight, model.cdm.conv.bias,
                        padding=1)
        gap, gmp = cues.flatten(2).mean(2), cues.flatten(2).max(2).values
        S = {"gap": lambda c: c.score_avg(gap), "gmp": lambda c: c.score_max(gmp),
             "shared": lambda c: c.score_avg(gap + gmp),
             "separate": lambda c: c.score_avg(gap) + c.score_max(gmp)}[scorer](model.cdm).sigmoid()
        W = model.cdm.weight
        maps = torch.cat([F.conv2d(X[b:b + 1], sum(S[b, g] * W[g] for g in range(len(W))),
                                   model.cdm.bias,
                                   padding=W.shape[-1] // 2) for b in range(len(x))])  # Eq. 6
    pooled = F.avg_pool2d(maps, 3, 1, 1) if pool == "padded" else maps
    return pooled.mean((2, 3)), maps, M_c, M_r.reshape(-1, 3, 5)


@pytest.mark.parametrize("switches", [
    {}, {"scorer": "shared"}, {"scorer": "gap"}, {"scorer": "gmp"}, {"erase": "minmax"},
    {"pool": "padded"},
    {"num_kernels": 1}, {"kernel_size": 1}, {"head": "conv"},
    {"head": "conv", "kernel_size": 1, "pool": "padded"},
], ids=str)
def test_model_equals_the_equations(switches):
    model, x = make(**switches), images(3)
    logits, maps, M_c, M_r = naive(model, x,
                                   **{k: v for k, v in switches.items()
                                      if k in ("scorer", "erase", "pool")})
    equal(model(x), logits)
    found = model.localize(x)
    equal(found.logits, logits), equal(found.cls_map, M_c), equal(found.relation_map, M_r)
    assert torch.equal(found.classes, logits.argmax(1, keepdim=True))
    equal(found.class_maps, torch.stack([m[c] for m, c in zip(maps, found.classes)]))
    everything = model.localize(x, "all")
    assert torch.equal(everything.classes, torch.arange(7).expand(3, 7))
    equal(everything.class_maps, maps)
    asked = torch.tensor([[6, 0, -1], [2, 2, 1], [-1, 5, 3]])
    ids = torch.where(asked < 0, logits.argmax(1, keepdim=True), asked)
    found = model.localize(x, asked)
    assert torch.equal(found.classes, ids)
    equal(found.class_maps, torch.stack([m[c] for m, c in zip(maps, ids)]))


@pytest.mark.parametrize("switches", [{}, {"erase": "minmax", "pool": "padded"}, {"head": "conv"}],
                         ids=str)
def test_training_gradient_is_that_of_the_equations(switches):
    """All parameters learn; the CDM's gradient reaches the attention, whose maps are not detached.
    """
    model, x, labels = make(**switches), images(), torch.tensor([3, 5])
    expected = naive(model, x, **{k: v for k, v in switches.items() if k != "head"})[0]
    gradients = [torch.autograd.grad(F.cross_entropy(logits, labels), list(model.parameters()))
                 for logits in (model(x), expected)]
    for gradient, right in zip(*gradients):
        assert right.abs().max() > 0
        equal(gradient, right, 1e-10)


def test_token_head_is_a_linear_layer_on_the_class_token():
    model, x = make(head="token"), images()
    tokens, _ = model.forward_features(x)
    equal(model(x), tokens[:, 0] @ model.classifier.weight.T + model.classifier.bias)
    found = model.localize(x)
    assert torch.equal(found.classes, found.logits.argmax(1, keepdim=True))
    assert found.class_maps is None
    assert fuse(found, "relation-only").shape == (2, 1, 3, 5)
    with pytest.raises(ValueError, match='"token" head'):
        fuse(found, "relation")


def test_fuse_is_equation_3_and_its_ablations():
    found = make().localize(images(), torch.tensor([[1, 4, 4], [0, 2, 6]]))
    maps, M_c, M_r = found.class_maps, found.cls_map[:, None], found.relation_map[:, None]
    assert maps.min() < 0 < maps.max()
    expected = {"relation": maps.clamp_min(0) * M_r, "cls": maps.clamp_min(0) * M_c,
                "none": maps.clamp_min(0),
                "relation-only": M_r.expand(2, 3, 3, 5), "cls-only": M_c.expand(2, 3, 3, 5)}
    assert set(expected) == set(lctr.COUPLINGS)
    for coupling, value in expected.items():
        assert torch.equal(fuse(found, coupling), value)
    with pytest.raises(ValueError, match="coupling: got 'sum'"):
        fuse(found, "sum")


def test_reversal_erases_what_is_attended():
    cls_map = torch.rand(2, 3, 5, dtype=torch.float64) * torch.tensor([0.1, 1.0])[:, None, None]
    equal(make().cdm.reverse(cls_map), 1 - cls_map)
    reverse = make(erase="minmax").cdm.reverse
    for before, after in zip(cls_map, reverse(cls_map)):  # each image by its own range
        assert after.flatten()[before.argmax()] == 0 and after.flatten()[before.argmin()] == 1
    # a constant map erases nothing
    equal(reverse(torch.full_like(cls_map, 0.2)), torch.ones_like(cls_map))


def test_initialisation_takes_each_kernels_own_fan_in():
    model = LCTR(50, embed_dim=24, depth=1, num_heads=2, img_size=32)
    bound = 1 / math.sqrt(24 * 9)  # kaiming uniform, a = sqrt 5: sqrt(6 / (1 + 5) / fan_in)
    assert 0.99 * bound < model.cdm.weight.abs().max() <= bound
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias")
                   and name.startswith("cdm"))


@settings(max_examples=15, deadline=None)
@given(h=st.integers(1, 5), w=st.integers(1, 5), heads=st.integers(1, 3), G=st.integers(1, 3),
       head=st.sampled_from(["cdm", "conv"]))
def test_any_grid_width_and_head_count(h, w, heads, G, head):
    model = make(3, img_size=(4 * h, 4 * w), embed_dim=4 * heads, num_heads=heads, num_kernels=G,
                 head=head)
    x = images(2, (4 * h, 4 * w))
    found = model.localize(x, "all")
    equal(found.class_maps.mean((2, 3)), found.logits), equal(model(x), found.logits)
    assert found.cls_map.shape == found.relation_map.shape == (2, h, w)


@pytest.mark.parametrize("change, words", [
    ({"img_size": 13}, "img_size: got 13"), ({"num_heads": 5}, "num_heads: got 5"),
    ({"head": "gap"}, "head: got 'gap'"), ({"kernel_size": 5}, "kernel_size: got 5"),
    ({"scorer": "max"}, "scorer: got 'max'"), ({"erase": "no"}, "erase: got 'no'"),
    ({"pool": "max"}, "pool: got 'max'"),
])
def test_switches_out_of_range_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        make(**change)


def test_wrong_input_is_named():
    model = make()
    with pytest.raises(ValueError,
                       match=r"images: got shape \(2, 3, 12, 12\), need \(B, 3, 12, 20\)"):
        model(images(2, (12, 12)))
    with pytest.raises(ValueError, match="attention: got 'all'"):
        model.forward_features(images(), "all")
    with pytest.raises(ValueError, match="classes: got 'top'"):
        model.localize(images(), "top")


def test_a_cdm_stays_alive_at_a_high_rate():
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
        optimizer.step(), optimizer.zero_grad()
    assert 0.05 < scores.mean() < 0.95 and loss < math.log(C) - 0.3


def test_new_scores_are_one_half():
    model = LCTR(3, **SIZE).train()
    model(images(2, dtype=torch.float32))
    equal(model.cdm.last_scores, torch.full((2, 4), 0.5))


def test_the_naive_definitions_are_the_kernels():
    attn = torch.rand(2, 3, 7, 7, dtype=torch.float64).softmax(-1)
    for ours, fast in zip(lctr.rpam(attn), kernels.aggregate_attention(attn)):
        equal(ours, fast)
    sizes = (2, 5, 3, 4), (2, 3), (3, 6, 5, 3, 3), (6,)
    operands = [torch.randn(size, dtype=torch.float64) for size in sizes]
    equal(lctr.dynamic_conv2d(*operands), kernels.dynamic_conv2d(*operands))


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
    found, expected = model.eval().localize(x.to(dtype), "all"), exact.localize(x, "all")
    for coupling in lctr.COUPLINGS if head != "token" else ("cls-only", "relation-only"):
        one, two = fuse(found, coupling).float(), fuse(expected, coupling)
        assert (one - two).abs().max() < tolerance * two.abs().max()


@pytest.mark.parametrize("head", ["cdm", "conv", "token"])
def test_no_images_and_no_classes_give_empty_results(head):
    model, nothing = make(head=head), torch.zeros(0, 3, 12, 20, dtype=torch.float64)
    ids = torch.zeros(0, 2, dtype=torch.int64)
    for classes, K in ((None, 1), ("all", 7), (ids, 2), (ids[:, :0], 0)):
        found = model.localize(nothing, classes)
        assert found.logits.shape == (0, 7) and found.classes.shape == (0, K)
        assert found.cls_map.shape == found.relation_map.shape == (0, 3, 5)
        assert fuse(found, "cls-only").shape == (0, K, 3, 5)
        assert head == "token" or fuse(found).shape == (0, K, 3, 5)
    assert model(nothing).shape == (0, 7)
    whole, found = model.localize(images()), model.localize(images(), ids.new_zeros(2, 0))
    equal(found.logits, whole.logits), equal(found.relation_map, whole.relation_map)
    assert found.classes.shape == (2, 0) and fuse(found, "cls-only").shape == (2, 0, 3, 5)
    assert head == "token" or fuse(found).shape == (2, 0, 3, 5)


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
def test_classes_that_are_none_are_named(head, classes, words):
    error_of(lambda: make(head=head).localize(images(2), classes), words, error=ValueError)


def test_the_signed_map_of_ts_cam():
    found = make(head="conv").localize(images(2))
    signed = fuse(found, "cls", relu=False)
    equal(signed, found.class_maps * found.cls_map[:, None])
    equal(fuse(found, "cls"), found.class_maps.relu() * found.cls_map[:, None])


# ---------------------------------------------------------------- the command line


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["lctr.py", *map(str, arguments)])
    walkthrough.main(lctr)


def test_trace_prints_every_step_of_one_image(tmp_path, monkeypatch, capsys):
    Image.new("L", (50, 30), 99).save(tmp_path / "grey.png")
    call(monkeypatch, tmp_path / "grey.png")
    lines = capsys.readouterr().out.splitlines()
    equations = [int(line[4]) for line in lines if line.startswith("Eq.")]
    assert equations == [1, 4, 5, 6, 6, 6, 2, 2, 3, 3]
    assert any("S_g" in line and "(1, 4)" in line for line in lines)
    grey = [(99 / 255 - mean) / std
            for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    assert f"{min(grey):.3g} to {max(grey):.3g}" in lines[0]


@pytest.mark.parametrize("head", ["cdm", "conv", "token"])
def test_traced_steps_are_what_localize_computes(head):
    model, x = make(head=head), images(1)
    sizes = {"1": 1, "3": 3, "B": 1, "H": 12, "W": 20, "h": 3, "w": 5, "N": 15, "N+1": 16, "D": 12,
             "S": 2, "C": 7,
             "k": 3, "G": 4 if head == "cdm" else 1}
    steps = {name.split(":")[0]: value for _, name, _, value in walkthrough.trace(lctr, model, x)}
    for _, name, symbols, value in walkthrough.trace(lctr, model, x):
        assert value.shape == tuple(sizes[symbol]
                                    for symbol in symbols.strip("()").split(", ")), name
    found = model.localize(x)
    equal(steps["logits"], found.logits), equal(steps["p"].sum(), torch.tensor(1.0, dtype=x.dtype))
    equal(steps["M_*^r"], found.relation_map), equal(steps["M~_*^c"], found.cls_map)
    if head != "token":
        equal(steps["M^fuse"], fuse(found))
        maps, kernel = (("X_CDM", steps["sum_g S_g W_g^e"][0]) if head == "cdm"
                        else ("class maps", model.head.weight))
        equal(steps[maps], model.localize(x, "all").class_maps)
        features = model.on_grid(steps["X_L"][:, 1:])
        equal(F.conv2d(features, kernel, padding=1).mean((2, 3)),
              found.logits - (model.cdm if head == "cdm" else model.head).bias)
    if head == "cdm":
        equal(steps["1 - M~_*^c"], 1 - found.cls_map)


def test_a_picture_that_cannot_be_read_ends_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "page.png").write_bytes(b"<html>")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    for name in ("page.png", "cut.png", "none.png", "."):
        with pytest.raises(SystemExit, match="lctr.py: error: .") as caught:
            call(monkeypatch, tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # as for a picture above Pillow's limit
    with pytest.raises(SystemExit, match="lctr.py: error: .*whole.png"):
        call(monkeypatch, tmp_path / "whole.png")
