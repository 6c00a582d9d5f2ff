"""lctr.py against the paper's equations, written out naively here, in float64."""

import json
import math
import re
import textwrap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import kernels
import lctr
from helpers import ROOT
from lctr import LCTR, VisionTransformer, fuse, load_checkpoint, load_pretrained
from support import walkthrough

SIZE = dict(img_size=(12, 20), patch_size=4, embed_dim=12, depth=3, num_heads=2)  # grid 3 x 5


def make(num_classes=7, *, dtype=torch.float64, **switches):
    torch.manual_seed(0)
    model = LCTR(num_classes, **{**SIZE, **switches}).to(dtype)
    with torch.no_grad():
        # biases and attention far from zero, so that nothing cancels by chance
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def images(batch=2, size=(12, 20), dtype=torch.float64):
    return torch.randn(batch, 3, *size, dtype=dtype, generator=torch.Generator().manual_seed(1))


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


# ---------------------------------------------------------------- weights from files


def saved_backbone(tmp_path, change=lambda state: state, wrap=lambda state: state, **switches):
    """A headless state dict on disk, as DeiT's files are."""
    state = {k: v for k, v in make(**switches).state_dict().items() if not k.startswith("cdm.")}
    torch.save(wrap(change(state)), tmp_path / "vit.pth")
    return str(tmp_path / "vit.pth"), state


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s}])
def test_load_pretrained_takes_the_backbone_and_reports_the_rest(tmp_path, wrap):
    path, state = saved_backbone(tmp_path, lambda s: s | {"head.weight": torch.zeros(1000, 12)},
                                 wrap)
    model = LCTR(3, **SIZE)
    before = model.cdm.weight.clone()
    report = load_pretrained(model, path)
    assert sorted(report.loaded) == sorted(state) and not report.resized
    assert report.ignored == ["head.weight"]
    assert all(key.startswith("cdm.") for key in report.new)
    assert torch.equal(model.cdm.weight, before)
    assert all(torch.equal(value.float(), model.state_dict()[key]) for key, value in state.items())


def test_load_pretrained_casts_half_precision_up_and_resizes_positions(tmp_path):
    # grid 6 x 6
    path, state = saved_backbone(tmp_path, lambda s: {k: v.half() for k, v in s.items()},
                                 img_size=24)
    model = LCTR(3, **SIZE)
    report = load_pretrained(model, path)
    assert report.resized == ["pos_embed"] and model.pos_embed.dtype == torch.float32
    grid = state["pos_embed"].half().float()[:, 1:].reshape(1, 6, 6, 12).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (3, 5), mode="bicubic", align_corners=False)
    expected = expected.permute(0, 2, 3, 1).reshape(1, 15, 12)
    equal(model.pos_embed[:, 1:].detach(), expected)
    equal(model.pos_embed[:, :1].detach(), state["pos_embed"].half().float()[:, :1])


def test_a_missing_linear_bias_is_zero(tmp_path):
    path, _ = saved_backbone(tmp_path, lambda s: {
        k: v for k, v in s.items() if k != "blocks.1.mlp.fc2.bias"})
    model = LCTR(3, **SIZE)
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias.fill_(1)
    assert "blocks.1.mlp.fc2.bias" in load_pretrained(model, path).converted
    assert not model.blocks[1].mlp.fc2.bias.any()


@pytest.mark.parametrize("name, shape", [
    ("reg_token", (1, 4, 12)), ("register_tokens", (1, 4, 12)), ("storage_tokens", (1, 4, 12)),
    ("norm_pre.weight", (12,)), ("fc_norm.weight", (12,)), ("blocks.0.attn.q_norm.weight", (6,)),
    ("blocks.1.attn.norm.weight", (12,)), ("blocks.1.mlp.norm.weight", (48,)),
    ("blocks.0.mlp.fc1_g.weight", (48, 12)), ("blocks.0.mlp.w12.weight", (96, 12)),
    ("blocks.0.attn.relative_position_bias_table", (9, 2)), ("rope_embed.periods", (3,)),
    ("blocks.3.norm1.weight", (12,)), ("blocks.0.attn1.qkv.weight", (36, 12)),
    ("blocks.0.attn.gate.weight", (12,)), ("blocks.0.gamma_3", (12,)),
])
def test_a_backbone_that_computes_something_else_is_refused(tmp_path, name, shape):
    path, state = saved_backbone(tmp_path, lambda s: s | {name: torch.ones(shape)}, img_size=16)
    classifier = {"head.weight": torch.ones(5, 12), "head.bias": torch.ones(5)}
    torch.save(state | classifier | {name: torch.ones(shape)}, tmp_path / "whole.pth")
    for load in (lambda: load_pretrained(LCTR(3, **SIZE), path),
                 lambda: load_checkpoint(tmp_path / "whole.pth")):
        words = f"{re.escape(name)}.*does not compute|lacks blocks.3.norm1.bias"
        with pytest.raises(ValueError, match=words) as error:
            load()
        assert "\n" not in str(error.value)


def test_a_distilled_deit_is_not_scored_without_its_second_head(tmp_path):
    state = make(img_size=16, head="token").state_dict()
    state = {key.replace("classifier.", "head."): value for key, value in state.items()}
    torch.save({"model": state | {
        "head_dist.weight": state["head.weight"], "head_dist.bias": state["head.bias"],
        "dist_token": state["cls_token"], "pos_embed": torch.zeros(1, 18, 12)}},
        tmp_path / "distilled.pth")
    with pytest.raises(ValueError, match="has head_dist.weight, .*dist_token.*does not compute"):
        load_checkpoint(tmp_path / "distilled.pth")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.",
                                    "module._orig_mod."])
def test_wrappers_prefixes_are_dropped(tmp_path, prefix):
    path, state = saved_backbone(tmp_path, lambda s: {prefix + k: v for k, v in s.items()})
    assert sorted(load_pretrained(LCTR(3, **SIZE), path).loaded) == sorted(state)


def test_inputs_from_minus_one_to_one_fold_into_the_patch_projection(tmp_path):
    """docs/faults.md gives these lines for weights of such networks (augreg)."""
    page = (ROOT / "docs/faults.md").read_text()
    blocks = re.findall(r"(?:^ {4}.*\n)+", page, re.MULTILINE)
    lines = next(block for block in blocks if "2 * std" in block)
    path, _ = saved_backbone(tmp_path, lambda s: {k: v.float() for k, v in s.items()})
    foreign = VisionTransformer(**SIZE)
    load_pretrained(foreign, path)
    names = {"state": torch.load(path, weights_only=True), "torch": torch}
    exec(textwrap.dedent(lines), names)
    torch.save(names["state"], tmp_path / "folded.pth")
    ours = VisionTransformer(**SIZE)
    load_pretrained(ours, tmp_path / "folded.pth")
    pixels = torch.randint(0, 256, (12, 20, 3), dtype=torch.uint8)
    normalised = data.normalise(pixels.numpy())
    expected = foreign.embed(pixels.permute(2, 0, 1)[None] / 127.5 - 1)
    equal(ours.embed(normalised[None]).detach(), expected.detach(), 1e-5)


@pytest.mark.parametrize("name", [
    "cls_token", "pos_embed", "norm.weight", "norm.bias", "blocks.0.norm1.bias",
    "blocks.2.attn.qkv.weight", "patch_embed.proj.weight", "blocks.1.mlp.fc1.weight",
])
def test_a_backbone_that_lacks_a_parameter_is_refused(tmp_path, name):
    path, _ = saved_backbone(tmp_path, lambda s: {k: v for k, v in s.items() if k != name})
    with pytest.raises(ValueError, match=f"lacks {re.escape(name)}"):
        load_pretrained(LCTR(3, **SIZE), path)


@pytest.mark.parametrize("name", [
    "head.weight", "head_dist.weight", "mask_token", "pre_logits.fc.weight",
    "decoder_embed.weight"])
def test_what_no_backbone_computes_is_ignored(tmp_path, name):
    path, _ = saved_backbone(tmp_path, lambda s: s | {name: torch.ones(2, 12)})
    assert load_pretrained(LCTR(3, **SIZE), path).ignored == [name]


@pytest.mark.parametrize("names", [("ls1.gamma", "ls2.gamma"), ("gamma_1", "gamma_2")])
def test_a_layer_scale_is_folded_under_each_name(tmp_path, names):
    gamma = torch.linspace(0.1, 2, 12)
    path, state = saved_backbone(tmp_path, lambda s: s | {
        f"blocks.{i}.{name}": gamma for i in range(3) for name in names})
    model = LCTR(3, **SIZE)
    load_pretrained(model, path)
    for linear in ("attn.proj", "mlp.fc2"):
        weight = state[f"blocks.1.{linear}.weight"].float()
        equal(model.state_dict()[f"blocks.1.{linear}.weight"], gamma[:, None] * weight)


def test_positions_without_a_class_token_get_a_zero(tmp_path):
    path, state = saved_backbone(
        tmp_path, lambda s: s | {"pos_embed": s["pos_embed"][:, 1:]}, img_size=16)
    model = LCTR(3, **SIZE | {"img_size": 16})
    load_pretrained(model, path)
    assert not model.pos_embed[:, 0].any()
    equal(model.pos_embed[:, 1:].detach(), state["pos_embed"][:, -16:].float())


def test_another_number_of_heads_is_refused_where_the_file_says_it(tmp_path):
    torch.save(checkpoint(), tmp_path / "best.pt")
    with pytest.raises(ValueError, match="num_heads: found 2, need 4"):
        load_pretrained(LCTR(3, **SIZE | {"num_heads": 4}), tmp_path / "best.pt")


def test_the_authors_training_checkpoint_with_its_flags_loads(tmp_path):
    import argparse

    import numpy as np

    path, _ = saved_backbone(tmp_path)
    args = argparse.Namespace(lr=5e-5, model="deit_small", seed=np.int64(0), best=np.float64(1.5))
    torch.save({"model": torch.load(path), "optimizer": {"state": {}}, "lr_scheduler": {},
                "epoch": 3, "scaler": {}, "args": args}, tmp_path / "all.pth")
    assert not load_pretrained(LCTR(3, **SIZE), tmp_path / "all.pth").ignored


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


def test_a_bfloat16_model_runs_throughout():
    for head in ("cdm", "conv", "token"):
        model = make(head=head, dtype=torch.float32).bfloat16()
        x = images(2, dtype=torch.bfloat16)
        assert model(x).dtype == torch.bfloat16
        assert fuse(model.localize(x), "relation-only").isfinite().all()


def test_class_ids_of_one_dimension_are_refused():
    with pytest.raises(ValueError, match=r"classes: got shape \(2,\), need \(2, K\)"):
        make().localize(images(2), torch.zeros(2, dtype=torch.int64))


def test_the_signed_map_of_ts_cam():
    found = make(head="conv").localize(images(2))
    signed = fuse(found, "cls", relu=False)
    equal(signed, found.class_maps * found.cls_map[:, None])
    equal(fuse(found, "cls"), found.class_maps.relu() * found.cls_map[:, None])


@pytest.mark.parametrize("change, words", [
    (lambda s: s | {"norm.weight": torch.zeros(13)},
     r"norm.weight: found shape \(13,\), need \(12,\)"),
    *((lambda s, shape=shape: s | {"pos_embed": torch.zeros(shape)},
       f"pos_embed: found shape {re.escape(str(shape))}")
      for shape in ((1, 18, 12), (2, 17, 12), (1, 17, 11), (1, 1, 12), (1, 0, 12), (16,), ())),
    (lambda s: s | {"patch_embed.proj.weight": torch.zeros(12, 48)},
     r"weight: found shape \(12, 48\)"),
    (lambda s: s | {"patch_embed.proj.weight": torch.zeros(12, 1, 4, 4)},
     r"weight: found shape \(12, 1, 4, 4\)"),
    (lambda s: s | {"patch_embed.proj.weight": torch.zeros(12, 3, 0, 0)},
     r"weight: found shape \(12, 3, 0, 0\)"),
    (lambda s: s | {"blocks.0.ls1.gamma": torch.ones(13)},
     r"blocks.0.ls1.gamma: found shape \(13,\), need \(12,\)"),
    (lambda s: {"cls_token": s["cls_token"], "blocks.0.ls2.gamma": torch.ones(12)},
     "lacks pos_embed"),
    (lambda s: {"cls_token": s["cls_token"], "dist_token": s["cls_token"]}, "lacks pos_embed"),
    (lambda s: {"blocks.x.bias": torch.zeros(12), "norm.bias": torch.zeros(13)},
     r"norm.bias: found shape \(13,\)"),
    (lambda s: s | {"norm.bias": torch.full((12,), math.nan)},
     "norm.bias: need a tensor of finite numbers"),
    (lambda s: s | {"norm.bias": "text"}, "norm.bias: found str, need a tensor"),
    (lambda s: s | {"norm.bias": torch.zeros(12, dtype=torch.int8)}, "found torch.int8"),
    (lambda s: s | {"norm.bias": torch.zeros(12, dtype=torch.complex64)}, "found torch.complex64"),
    (lambda s: s | {"norm.bias": torch.zeros(12).to_sparse()}, "norm.bias: found"),
    (lambda s: {"teacher": s, "student": s}, "teacher: found dict"),  # DINO's training checkpoint
    (lambda s: {"net." + k: v for k, v in s.items()}, "no parameter of a ViT: .*net.cls_token"),
    (lambda s: {"vit.encoder.layer.0.attention.attention.query.weight": torch.zeros(12, 12)},
     "no parameter of a ViT: has vit.encoder.layer.0"),
    (lambda s: {"layer1.0.conv1.weight": torch.zeros(3)},
     "no parameter of a ViT: has layer1.0.conv1.weight, needs cls_token"),
])
def test_load_pretrained_refuses_what_does_not_fit(tmp_path, change, words):
    path, _ = saved_backbone(tmp_path, change)
    model = LCTR(3, **SIZE)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=words) as caught:
        load_pretrained(model, path)
    assert path in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Bomb:
    def __reduce__(self):
        return open, (str(self.path), "w")


def test_files_that_are_not_weights_end_in_one_line_and_run_nothing(tmp_path):
    good, _ = saved_backbone(tmp_path)
    whole = open(good, "rb").read()
    bomb = Bomb()
    bomb.path = tmp_path / "exploded"
    torch.save({"model": bomb}, tmp_path / "bomb.pth")
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    for name, content in (("cut.pth", whole[:len(whole) // 2]), ("empty.pth", b""),
                          ("page.pth", b"<html>404</html>")):
        (tmp_path / name).write_bytes(content)
    for name in ("bomb.pth", "list.pth", "cut.pth", "empty.pth", "page.pth", "missing.pth", "."):
        for load in (lambda path: load_pretrained(LCTR(3, **SIZE), path), load_checkpoint):
            with pytest.raises(ValueError) as caught:
                load(str(tmp_path / name))
            assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    assert not bomb.path.exists()


CONFIG = SIZE | dict(img_size=[12, 20], drop_path=0.1, head="cdm", num_kernels=4, kernel_size=3,
                     scorer="separate",
                     erase="raw", pool="gap")


def checkpoint(**changes):
    model = make(dtype=torch.float32).state_dict()
    return {"model": model, "config": CONFIG, "classes": list("abcdefg"), "phase": "main",
            **changes}


def test_load_checkpoint_rebuilds_the_model(tmp_path):
    torch.save(checkpoint(), tmp_path / "best.pt")
    model, saved = load_checkpoint(tmp_path / "best.pt")
    assert saved["classes"] == list("abcdefg") and not model.training
    x = images(dtype=torch.float32)
    assert torch.equal(model(x), make(dtype=torch.float32)(x))


@pytest.mark.parametrize("changes, words", [
    ({"classes": ["one"]}, "do not fit"), ({"config": {}}, "do not fit"),
    ({"config": None}, "do not fit"),
    ({"config": CONFIG | {"patch_size": 0}}, "do not fit"),
    ({"config": CONFIG | {"img_size": []}}, "do not fit"),
    *(({"config": CONFIG | {name: value}}, "do not fit its config") for name in (
        "img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_kernels", "kernel_size")
      for value in (10**9, -1, 0, "12", math.nan, None, [10**9, 10**9])),
    ({"config": CONFIG | {"head": "conv"}}, "lacks head.weight"),
    ({"classes": ["many"] * 10**6}, "do not fit"),
    ({"model": {}}, "do not fit"), ({"model": {"alien": torch.zeros(1)}}, "do not fit"),
    ({"phase": "pretrain"}, "pretraining"),
])
def test_load_checkpoint_refuses_what_does_not_fit(tmp_path, changes, words):
    torch.save(checkpoint(**changes), tmp_path / "best.pt")
    with pytest.raises(ValueError, match=words) as caught:
        load_checkpoint(tmp_path / "best.pt")
    assert "best.pt" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["model", "classes", "phase"])
def test_load_checkpoint_names_what_is_missing(tmp_path, key):
    torch.save({name: value for name, value in checkpoint().items() if name != key},
               tmp_path / "best.pt")
    with pytest.raises(ValueError, match=f"best.pt: no {key} in it"):
        load_checkpoint(tmp_path / "best.pt")


@settings(max_examples=60, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1), at=st.floats(0, 1), junk=st.binary(min_size=1, max_size=40),
       kind=st.sampled_from(["cut", "write"]))
def test_a_damaged_checkpoint_works_or_ends_in_one_line(tmp_path, cut, at, junk, kind):
    if not (tmp_path / "good.pt").exists():
        torch.save(checkpoint(), tmp_path / "good.pt")
    content = bytearray((tmp_path / "good.pt").read_bytes())
    if kind == "cut":
        content = content[:int(cut * len(content))]
    else:
        place = int(at * (len(content) - len(junk)))
        content[place:place + len(junk)] = junk
    (tmp_path / "bad.pt").write_bytes(content)
    try:
        load_checkpoint(tmp_path / "bad.pt")
    except ValueError as error:
        assert str(tmp_path / "bad.pt") in str(error) and "\n" not in str(error)


# ------------------------------------------------------ foreign weights, each in its own convention


class LayerScaleViT(torch.nn.Module):
    """DINOv2's convention: each residual branch is multiplied by a vector; attention written here,
    to compare.
    """

    def __init__(self, D=12, heads=2, depth=3, patch=4, grid=(3, 5)):
        super().__init__()
        nn, self.heads, self.grid = torch.nn, heads, grid
        self.cls_token = nn.Parameter(torch.randn(1, 1, D))
        self.mask_token = nn.Parameter(torch.randn(1, D))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + grid[0] * grid[1], D))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, D, patch, patch)})
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "norm1": nn.LayerNorm(D, eps=1e-6),
            "attn": nn.ModuleDict({"qkv": nn.Linear(D, 3 * D), "proj": nn.Linear(D, D)}),
            "ls1": nn.ParameterDict({"gamma": torch.randn(D)}), "norm2": nn.LayerNorm(D, eps=1e-6),
            "mlp": nn.ModuleDict({"fc1": nn.Linear(D, 4 * D), "fc2": nn.Linear(4 * D, D)}),
            "ls2": nn.ParameterDict({"gamma": torch.randn(D)}),
        }) for _ in range(depth))
        self.norm = nn.LayerNorm(D, eps=1e-6)

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        attention = []
        for block in self.blocks:
            q, k, v = block["attn"]["qkv"](block["norm1"](x)).chunk(3, -1)
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
            attention.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1))
            out = (attention[-1] @ v).transpose(1, 2).flatten(2)
            x = x + block["ls1"]["gamma"] * block["attn"]["proj"](out)
            x = x + block["ls2"]["gamma"] * block["mlp"]["fc2"](
                F.gelu(block["mlp"]["fc1"](block["norm2"](x))))
        return self.norm(x), attention


def test_layer_scale_is_folded_exactly(tmp_path):
    torch.manual_seed(3)
    foreign = LayerScaleViT()
    torch.save(foreign.state_dict(), tmp_path / "dino.pth")
    model = LCTR(3, **SIZE).eval()
    report = load_pretrained(model, tmp_path / "dino.pth")
    assert len(report.converted) == 12 and report.ignored == ["mask_token"]
    x = images(dtype=torch.float32)
    with torch.no_grad():
        (tokens, blocks), (expected, attention) = model.forward_features(x, "full"), foreign(x)
    equal(tokens, expected, 1e-5)
    for block, A in zip(blocks, attention):
        equal(block.full, A, 1e-5)


def test_a_distilled_deit_loses_its_extra_token_and_head(tmp_path):
    extra = torch.randn(1, 1, 12)

    def distil(s):
        pos_embed = torch.cat([s["pos_embed"][:, :1], extra, s["pos_embed"][:, 1:]], 1)
        return s | {"pos_embed": pos_embed, "dist_token": extra,
                    "head_dist.weight": torch.zeros(9, 12)}

    path, state = saved_backbone(tmp_path, distil, lambda s: {"model": s})
    model = LCTR(3, **SIZE)
    report = load_pretrained(model, path)
    assert report.converted == ["pos_embed"]
    assert report.ignored == ["dist_token", "head_dist.weight"]
    equal(model.pos_embed.detach(), state["pos_embed"].float())


def test_another_patch_size_is_resized_and_keeps_plain_patches(tmp_path):
    # the same grid of larger patches
    path, state = saved_backbone(tmp_path, img_size=(24, 40), patch_size=8)
    model = LCTR(3, **SIZE)
    assert load_pretrained(model, path).resized == ["patch_embed.proj.weight"]
    expected = F.interpolate(state["patch_embed.proj.weight"].float(), (4, 4), mode="bicubic",
                             align_corners=False) * 4
    equal(model.patch_embed.proj.weight.detach(), expected)


def test_a_grid_that_is_not_square_is_known_from_this_projects_config(tmp_path):
    torch.save(checkpoint(), tmp_path / "best.pt")
    grid = checkpoint()["model"]["pos_embed"][:, 1:].reshape(1, 3, 5, 12).permute(0, 3, 1, 2)
    # the second has as many places, in another order
    for size, (h, w) in (((24, 20), (6, 5)), ((20, 12), (5, 3))):
        model = LCTR(3, **SIZE | {"img_size": size})
        report = load_pretrained(model, tmp_path / "best.pt")
        assert report.resized == ["pos_embed"] and "cdm.weight" in report.ignored
        expected = F.interpolate(grid, (h, w), mode="bicubic", align_corners=False).flatten(2).mT
        equal(model.pos_embed[:, 1:].detach(), expected)


def test_a_square_number_of_positions_is_a_square_grid(tmp_path):
    """As 24 x 24 in a file for 384 px, loaded into 18 x 32: as many, in other places."""
    path, state = saved_backbone(tmp_path, img_size=16)  # 4 x 4
    model = LCTR(3, **SIZE | {"img_size": (8, 32)})  # 2 x 8
    assert load_pretrained(model, path).resized == ["pos_embed"]
    square = state["pos_embed"].float()[:, 1:].mT.unflatten(2, (4, 4))
    expected = F.interpolate(square, (2, 8), mode="bicubic", align_corners=False).flatten(2).mT
    equal(model.pos_embed[:, 1:].detach(), expected)


@pytest.mark.parametrize("config", [
    None, {}, {"img_size": 24}, {"img_size": "12", "patch_size": 4},
    {"img_size": [12], "patch_size": 4},
    {"img_size": 24, "patch_size": 0},
], ids=str)
def test_a_config_that_says_no_grid_leaves_a_square_one(tmp_path, config):
    torch.save({"model": make(img_size=24).state_dict(), "config": config}, tmp_path / "vit.pth")
    assert load_pretrained(LCTR(3, **SIZE), tmp_path / "vit.pth").resized == ["pos_embed"]


@pytest.mark.parametrize("scorer", ["separate", "gap", "gmp"])
def test_the_authors_checkpoint_is_scored_as_their_code_does(tmp_path, scorer):
    model = make(img_size=16, embed_dim=64, num_heads=1, pool="padded", scorer=scorer,
                 dtype=torch.float32)
    renamed = {"cdm.conv.": "conv3x3.", "cdm.score_avg.": "CDM._routing_fn_two.fc.",
               "cdm.score_max.": "CDM._routing_fn_two.fc2.", "cdm.": "CDM."}
    state = {}
    for key, value in model.state_dict().items():
        prefix = next((own for own in renamed if key.startswith(own)), "")
        state["module." + renamed.get(prefix, "") + key.removeprefix(prefix)] = value
    torch.save({"model": state, "epoch": 7}, tmp_path / "lctr.pth")
    loaded, saved = load_checkpoint(tmp_path / "lctr.pth")
    x = images(2, (16, 16), torch.float32)
    assert torch.equal(loaded(x), model(x)) and saved["config"]["pool"] == "padded"
    assert saved["phase"] == "external"
    assert not load_pretrained(VisionTransformer(16, 4, 64, 3, 1), tmp_path / "lctr.pth").new


@pytest.mark.parametrize("head", ["conv", "token"])
def test_ts_cams_and_deits_checkpoints_are_scored(tmp_path, head):
    model = make(img_size=16, embed_dim=128, num_heads=2, head=head, dtype=torch.float32)
    state = {key.replace("classifier.", "head."): value
             for key, value in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "model.pth")
    x = images(2, (16, 16), torch.float32)
    assert torch.equal(load_checkpoint(tmp_path / "model.pth")[0](x), model(x))


def safetensors(tensors, names={torch.float32: "F32", torch.float16: "F16",
                                torch.bfloat16: "BF16"}):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for key, value in tensors.items():
        raw = value.contiguous().view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[key] = {"dtype": names[value.dtype], "shape": list(value.shape),
                       "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_hold_the_same_numbers(tmp_path, dtype):
    state = {k: v.to(dtype) for k, v in make().state_dict().items() if not k.startswith("cdm.")}
    (tmp_path / "vit.safetensors").write_bytes(safetensors(state))
    model = LCTR(3, **SIZE)
    load_pretrained(model, tmp_path / "vit.safetensors")
    assert all(torch.equal(model.state_dict()[key], value.float()) for key, value in state.items())


def test_a_safetensors_file_cut_short_says_so(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(safetensors({"norm.weight": torch.ones(12)})[:-4])
    with pytest.raises(ValueError, match="norm.weight: .* does not fit bytes 0 to 48 of 44"):
        load_pretrained(LCTR(3, **SIZE), tmp_path / "x.safetensors")


@settings(max_examples=150, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_safetensors_file_works_or_ends_in_one_line(tmp_path, at, byte, cut):
    whole = bytearray(safetensors({"norm.weight": torch.ones(12), "norm.bias": torch.zeros(12)}))
    if cut:
        whole = whole[:at % len(whole)]
    else:
        whole[at % len(whole)] = byte
    (tmp_path / "x.safetensors").write_bytes(whole)
    try:
        load_pretrained(LCTR(3, **SIZE), tmp_path / "x.safetensors")
    except ValueError as error:
        assert "x.safetensors: " in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("header", [
    *({"a\nb": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
      for dtype, shape, offsets in (
        ("F32", [3], [0, 8]), ("F32", [2], [0, 800]), ("F32", [1], [-8, -4]),
        ("F32", [2], [0., 8.]), ("F32", [2], [0]), ("F32", [-2], [8, 0]),
        ("F32", [-1, -2], [0, 8]), ("F32", [2**62], [0, 8]), ("F32", [2**70, 0], [0, 0]),
        ("F32", [2.0], [0, 8]), ("F32", 2, [0, 8]), ("F99", [2], [0, 8]), (["F32"], [2], [0, 8]))),
    {"a": {"dtype": "F32", "shape": [2]}}, {"a": 3}, [],
], ids=str)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    with pytest.raises(ValueError, match="x.safetensors: .*not a safetensors header") as caught:
        load_pretrained(LCTR(3, **SIZE), tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


def test_deit_by_name_uses_the_hubs_cache_and_fails_in_one_line(tmp_path, monkeypatch):
    def no_network(url, **options):
        assert options["check_hash"] and options["weights_only"]
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    words = r"deit_small: cannot download https://.*cd65a155.pth .*put that"
    with pytest.raises(ValueError, match=words) as caught:
        load_pretrained(LCTR(3), "deit_small")
    assert "\n" not in str(caught.value)


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


def test_export_writes_what_load_pretrained_takes(tmp_path, monkeypatch, capsys):
    torch.save(checkpoint(), tmp_path / "best.pt")
    call(monkeypatch, "--export", tmp_path / "vit.pth", tmp_path / "best.pt")
    content = torch.load(tmp_path / "vit.pth", weights_only=True)
    assert (content["num_heads"], content["grid"]) == (2, [3, 5])
    names = {key for key in checkpoint()["model"] if not key.startswith("cdm.")}
    assert set(content["model"]) == names
    report = load_pretrained(VisionTransformer(**SIZE | {"img_size": (12, 20)}),
                             tmp_path / "vit.pth")
    assert not report.ignored and not report.resized
    with pytest.raises(SystemExit, match="exists already"):
        call(monkeypatch, "--export", tmp_path / "best.pt", tmp_path / "best.pt")
    with pytest.raises(SystemExit, match="lctr.py: error: .*none.pt"):
        call(monkeypatch, "--export", tmp_path / "a.pth", tmp_path / "none.pt")
    with pytest.raises(SystemExit, match="lctr.py: error: .*nowhere"):
        call(monkeypatch, "--export", tmp_path / "nowhere" / "a.pth", tmp_path / "best.pt")


def test_an_exported_token_head_is_scored_by_name(tmp_path, monkeypatch):
    sizes = dict(img_size=16, embed_dim=64, num_heads=1, head="token")
    model = make(dtype=torch.float32, **sizes)
    torch.save(checkpoint(model=model.state_dict(), config=CONFIG | sizes), tmp_path / "best.pt")
    call(monkeypatch, "--export", tmp_path / "deit.pth", tmp_path / "best.pt")
    x = images(2, (16, 16), torch.float32)
    assert torch.equal(load_checkpoint(tmp_path / "deit.pth")[0](x), model(x))


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
