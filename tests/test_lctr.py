"""lctr.py against the paper's equations, written out naively here, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lctr
from lctr import LCTR, fuse, load_checkpoint, load_pretrained

SIZE = dict(img_size=(12, 20), patch_size=4, embed_dim=12, depth=3, num_heads=2)  # grid 3 x 5


def make(num_classes=7, *, dtype=torch.float64, **switches):
    torch.manual_seed(0)
    model = LCTR(num_classes, **{**SIZE, **switches}).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and attention far from zero, so that nothing cancels by chance
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
        layer = torch.nn.TransformerEncoderLayer(12, 2, 48, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True).double()
        layer.load_state_dict({
            "self_attn.in_proj_weight": block.attn.qkv.weight, "self_attn.in_proj_bias": block.attn.qkv.bias,
            "self_attn.out_proj.weight": block.attn.proj.weight, "self_attn.out_proj.bias": block.attn.proj.bias,
            "linear1.weight": block.mlp.fc1.weight, "linear1.bias": block.mlp.fc1.bias,
            "linear2.weight": block.mlp.fc2.weight, "linear2.bias": block.mlp.fc2.bias,
            **{f"norm{i}.{name}": getattr(getattr(block, f"norm{i}"), name) for i in (1, 2) for name in ("weight", "bias")},
        })
        layers.append(layer.eval())
    patches = F.unfold(x, 4, stride=4).mT @ model.patch_embed.proj.weight.flatten(1).T + model.patch_embed.proj.bias
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
        equal(relation[l].cls, full[l].cls), equal(relation[l].relation, full[l].relation), equal(cls[l].cls, full[l].cls)
        assert cls[l].relation is None and cls[l].full is None and relation[l].full is None


def test_training_gradient_is_that_of_materialised_attention():
    model, x, labels = make(), images(), torch.tensor([3, 5])
    gradients = []
    for attention in ("cls", "full"):
        model.zero_grad()
        forward = model.forward_features
        model.forward_features = lambda images, _, noise: forward(images, attention, noise)
        F.cross_entropy(model(x), labels).backward()
        del model.forward_features
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients):
        equal(a, b, 1e-10)
    assert all(g.abs().max() > 0 for g in gradients[0])  # attention maps are not detached: everything learns


def test_stochastic_depth_drops_whole_branches_more_often_in_later_blocks():
    model = make(drop_path=0.5).train()
    kept = model.stochastic_depth(4000, None)  # (B, L, 2)
    assert [kept[:, l].unique().tolist() for l in range(3)] == [[1.0], [0.0, pytest.approx(4 / 3)], [0.0, 2.0]]
    equal(kept.mean((0, 2)), torch.ones(3, dtype=kept.dtype), 0.05)
    x = images()
    all_dropped = model.forward_features(x, "cls", torch.zeros(2, 3, 2))[0]  # the first block's rate is 0
    model.eval()
    assert model.stochastic_depth(2, None) is None
    model.blocks = model.blocks[:1]
    equal(all_dropped, model.forward_features(x)[0])


# ---------------------------------------------------------------- RPAM, CDM and the maps


def naive(model, x, scorer="separate", erase="raw", pool="gap"):
    """The whole model from materialised attention, one equation a line: logits, all class maps, M~c, M^r."""
    tokens, blocks = model.forward_features(x, "full")
    mean = torch.stack([block.full.mean(1) for block in blocks]).mean(0)  # (B, N+1, N+1)
    M_c = mean[:, 0, 1:].reshape(-1, 3, 5)
    M_r = torch.stack([(A[:, 0, :, None] * A[:, :, 1:]).mean(1) for A in (b.full.mean(1) for b in blocks)]).mean(0)
    X = tokens[:, 1:].transpose(1, 2).reshape(len(x), -1, 3, 5)
    if hasattr(model, "head"):
        maps = F.conv2d(X, model.head.weight, model.head.bias, padding=model.head.weight.shape[-1] // 2)
    else:
        erased = M_c
        if erase == "minmax":
            erased = torch.stack([(m - m.min()) / (m.max() - m.min()) for m in M_c])
        cues = F.conv2d(X * (1 - erased)[:, None], model.cdm.conv.weight, model.cdm.conv.bias, padding=1)
        gap, gmp = cues.flatten(2).mean(2), cues.flatten(2).max(2).values
        S = {"gap": lambda c: c.score_avg(gap), "gmp": lambda c: c.score_max(gmp), "shared": lambda c: c.score_avg(gap + gmp),
             "separate": lambda c: c.score_avg(gap) + c.score_max(gmp)}[scorer](model.cdm).sigmoid()
        W = model.cdm.weight
        maps = torch.cat([F.conv2d(X[b:b + 1], sum(S[b, g] * W[g] for g in range(len(W))), model.cdm.bias,
                                   padding=W.shape[-1] // 2) for b in range(len(x))])  # Eq. 6
    pooled = F.avg_pool2d(maps, 3, 1, 1) if pool == "padded" else maps
    return pooled.mean((2, 3)), maps, M_c, M_r.reshape(-1, 3, 5)


@pytest.mark.parametrize("switches", [
    {}, {"scorer": "shared"}, {"scorer": "gap"}, {"scorer": "gmp"}, {"erase": "minmax"}, {"pool": "padded"},
    {"num_kernels": 1}, {"kernel_size": 1}, {"head": "conv"}, {"head": "conv", "kernel_size": 1, "pool": "padded"},
], ids=str)
def test_model_equals_the_equations(switches):
    model, x = make(**switches), images(3)
    logits, maps, M_c, M_r = naive(model, x, **{k: v for k, v in switches.items() if k in ("scorer", "erase", "pool")})
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


def test_token_head_is_a_linear_layer_on_the_class_token():
    model, x = make(head="token"), images()
    tokens, _ = model.forward_features(x)
    equal(model(x), tokens[:, 0] @ model.classifier.weight.T + model.classifier.bias)
    found = model.localize(x)
    assert torch.equal(found.classes, found.logits.argmax(1, keepdim=True)) and found.class_maps is None
    assert fuse(found, "relation-only").shape == (2, 1, 3, 5)
    with pytest.raises(ValueError, match='"token" head'):
        fuse(found, "relation")


def test_fuse_is_equation_3_and_its_ablations():
    found = make().localize(images(), torch.tensor([[1, 4, 4], [0, 2, 6]]))
    maps, M_c, M_r = found.class_maps, found.cls_map[:, None], found.relation_map[:, None]
    assert maps.min() < 0 < maps.max()
    expected = {"relation": maps.clamp_min(0) * M_r, "cls": maps.clamp_min(0) * M_c, "none": maps.clamp_min(0),
                "relation-only": M_r.expand(2, 3, 3, 5), "cls-only": M_c.expand(2, 3, 3, 5)}
    assert set(expected) == set(lctr.COUPLINGS)
    for coupling, value in expected.items():
        assert torch.equal(fuse(found, coupling), value)
    with pytest.raises(ValueError, match="coupling: got 'sum'"):
        fuse(found, "sum")


def test_reversal_erases_what_is_attended():
    model = make(erase="minmax")
    model.cdm.conv.weight.data.zero_()
    model.cdm.conv.weight.data[:, :, 1, 1] = torch.eye(12)
    model.cdm.conv.bias.data.zero_()
    seen = []
    model.cdm.conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features, cls_map = torch.ones(1, 12, 3, 5, dtype=torch.float64), torch.rand(1, 3, 5, dtype=torch.float64)
    model.cdm(features, cls_map)
    low, high = cls_map.flatten().argmin(), cls_map.flatten().argmax()
    assert (seen[0].flatten(2)[0, :, high] == 0).all() and (seen[0].flatten(2)[0, :, low] == 1).all()
    assert torch.isfinite(model.cdm(features, torch.full((1, 3, 5), 0.2, dtype=torch.float64))).all()  # a constant map


def test_initialisation_takes_each_kernels_own_fan_in():
    model = LCTR(50, embed_dim=24, depth=1, num_heads=2, img_size=32)
    bound = 1 / math.sqrt(24 * 9)  # kaiming uniform, a = sqrt 5: sqrt(6 / (1 + 5) / fan_in)
    assert 0.99 * bound < model.cdm.weight.abs().max() <= bound
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias") and name.startswith("cdm"))


@settings(max_examples=15, deadline=None)
@given(h=st.integers(1, 5), w=st.integers(1, 5), heads=st.integers(1, 3), G=st.integers(1, 3), head=st.sampled_from(["cdm", "conv"]))
def test_any_grid_width_and_head_count(h, w, heads, G, head):
    model = make(3, img_size=(4 * h, 4 * w), embed_dim=4 * heads, num_heads=heads, num_kernels=G, head=head)
    x = images(2, (4 * h, 4 * w))
    found = model.localize(x, "all")
    equal(found.class_maps.mean((2, 3)), found.logits), equal(model(x), found.logits)
    assert found.cls_map.shape == found.relation_map.shape == (2, h, w)


@pytest.mark.parametrize("change, words", [
    ({"img_size": 13}, "img_size: got 13"), ({"num_heads": 5}, "num_heads: got 5"), ({"head": "gap"}, "head: got 'gap'"),
    ({"kernel_size": 5}, "kernel_size: got 5"), ({"scorer": "max"}, "scorer"), ({"erase": "no"}, "erase"), ({"pool": "max"}, "pool"),
])
def test_switches_out_of_range_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        make(**change)


def test_wrong_input_is_named():
    model = make()
    with pytest.raises(ValueError, match=r"images: got shape \(2, 3, 12, 12\), need \(B, 3, 12, 20\)"):
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
    path, state = saved_backbone(tmp_path, lambda s: s | {"head.weight": torch.zeros(1000, 12)}, wrap)
    model = LCTR(3, **SIZE)
    before = model.cdm.weight.clone()
    report = load_pretrained(model, path)
    assert sorted(report.loaded) == sorted(state) and not report.resized and report.ignored == ["head.weight"]
    assert all(key.startswith("cdm.") for key in report.new) and torch.equal(model.cdm.weight, before)
    assert all(torch.equal(value.float(), model.state_dict()[key]) for key, value in state.items())


def test_load_pretrained_casts_half_precision_up_and_resizes_positions(tmp_path):
    path, state = saved_backbone(tmp_path, lambda s: {k: v.half() for k, v in s.items()}, img_size=24)  # grid 6 x 6
    model = LCTR(3, **SIZE)
    report = load_pretrained(model, path)
    assert report.resized == ["pos_embed"] and model.pos_embed.dtype == torch.float32
    grid = state["pos_embed"].half().float()[:, 1:].reshape(1, 6, 6, 12).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (3, 5), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).reshape(1, 15, 12)
    equal(model.pos_embed[:, 1:].detach(), expected)
    equal(model.pos_embed[:, :1].detach(), state["pos_embed"].half().float()[:, :1])


def test_load_pretrained_reports_what_the_file_lacks(tmp_path):
    path, _ = saved_backbone(tmp_path, lambda s: {k: v for k, v in s.items() if k != "blocks.1.mlp.fc2.bias"})
    assert "blocks.1.mlp.fc2.bias" in load_pretrained(LCTR(3, **SIZE), path).new


@pytest.mark.parametrize("change, words", [
    (lambda s: s | {"norm.weight": torch.zeros(13)}, r"norm.weight: found shape \(13,\), need \(12,\)"),
    (lambda s: s | {"pos_embed": torch.zeros(1, 18, 12)}, r"pos_embed: found shape \(1, 18, 12\)"),
    (lambda s: s | {"norm.bias": torch.full((12,), math.nan)}, "norm.bias: need a tensor of finite numbers"),
    (lambda s: s | {"norm.bias": "text"}, "norm.bias: need a tensor"),
    (lambda s: {"module." + k: v for k, v in s.items()}, "no parameter of a ViT backbone"),
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
    for name, content in {"cut.pth": whole[:len(whole) // 2], "empty.pth": b"", "page.pth": b"<html>404</html>"}.items():
        (tmp_path / name).write_bytes(content)
    for name in ("bomb.pth", "list.pth", "cut.pth", "empty.pth", "page.pth", "missing.pth", "."):
        for load in (lambda path: load_pretrained(LCTR(3, **SIZE), path), load_checkpoint):
            with pytest.raises(ValueError) as caught:
                load(str(tmp_path / name))
            assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    assert not bomb.path.exists()


def checkpoint(**changes):
    config = dict(img_size=[12, 20], patch_size=4, embed_dim=12, depth=3, num_heads=2, drop_path=0.1, head="cdm", num_kernels=4,
                  kernel_size=3, scorer="separate", erase="raw", pool="gap")
    return {"model": make(dtype=torch.float32).state_dict(), "config": config, "classes": list("abcdefg"), "phase": "main", **changes}


def test_load_checkpoint_rebuilds_the_model(tmp_path):
    torch.save(checkpoint(), tmp_path / "best.pt")
    model, saved = load_checkpoint(tmp_path / "best.pt")
    assert saved["classes"] == list("abcdefg") and not model.training
    x = images(dtype=torch.float32)
    assert torch.equal(model(x), make(dtype=torch.float32)(x))


@pytest.mark.parametrize("changes, words", [
    ({"classes": ["one"]}, "do not fit"), ({"config": {}}, "do not fit"), ({"config": None}, "do not fit"),
    ({"model": {}}, "do not fit"), ({"model": {"alien": torch.zeros(1)}}, "do not fit"), ({"phase": "pretrain"}, "pretraining"),
])
def test_load_checkpoint_refuses_what_does_not_fit(tmp_path, changes, words):
    torch.save(checkpoint(**changes), tmp_path / "best.pt")
    with pytest.raises(ValueError, match=words) as caught:
        load_checkpoint(tmp_path / "best.pt")
    assert "best.pt" in str(caught.value) and "\n" not in str(caught.value)
