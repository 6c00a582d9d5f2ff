"""Files of weights: each convention gives the numbers of the network that wrote it, or one line.

The network that wrote them is helpers.LayerScaleViT, whose attention is written out there.
"""

import argparse
import collections
import json
import math
import pathlib
import re
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, SMALL_MODEL, LayerScaleViT, error_of, make_model, random_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lctr
from lctr import LCTR, MODEL_FLAGS, VisionTransformer, load_checkpoint, load_pretrained
from support import walkthrough, weights
from support.pictures.views import normalise

D, S, L, P, SIDE = 12, 2, 3, 4, 4  # width, heads, blocks, pixels of a patch, patches of a side
SIZE = dict(img_size=P * SIDE, patch_size=P, embed_dim=D, depth=L, num_heads=S)
SEVEN = list("abcdefg")
ones = torch.ones


def equal(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def save(tmp_path, content, name="vit.pth"):
    torch.save(content, tmp_path / name)
    return str(tmp_path / name)


def external():
    """A network of another project, with the head of its classifier."""
    torch.manual_seed(3)
    network = LayerScaleViT(D, S, L, P, (SIDE, SIDE))
    network.head = torch.nn.Linear(D, 7)
    return network


def dropped(state, value, *endings):
    """A network's state dict without entries of these endings, which are set to one value in it."""
    for key in [key for key in state if key.endswith(endings)]:
        state.pop(key).fill_(value)
    return state


def plain(network):
    """Its state dict without LayerScale, as DeiT's files have it."""
    return dropped(network.state_dict(), 1, "gamma", "mask_token")


def renamed(state, pattern, new):
    return {re.sub(pattern, new, key): value for key, value in state.items()}


# ---------------------------------------------------------------- conventions with the right value


def no_position_of_the_class_token(network):
    state = plain(network)
    state["pos_embed"][:, 0] = 0
    return state | {"pos_embed": state["pos_embed"][:, 1:]}


RIGHT = {
    "DeiT": plain,
    "under model": lambda network: {"model": plain(network), "epoch": 3},
    "under state_dict": lambda network: {"state_dict": plain(network), "arch": "vit"},
    "DINOv2's LayerScale": lambda network: network.state_dict(),
    "DeiT III's and EVA's LayerScale": lambda network: renamed(
        network.state_dict(), r"ls(\d).gamma", r"gamma_\1"),
    "no qkv bias": lambda network: dropped(plain(network), 0, "qkv.bias"),
    "no bias at all": lambda network: dropped(
        plain(network), 0, *(f"{name}.bias" for name in weights.LINEARS)),
    "DeiT III's positions": no_position_of_the_class_token,
    "DataParallel": lambda network: renamed(plain(network), "^", "module."),
    "torch.compile of DataParallel": lambda network: renamed(
        plain(network), "^", "_orig_mod.module."),
    "MAE's decoder": lambda network: plain(network) | {
        "mask_token": ones(1, 1, 8), "decoder_pos_embed": ones(1, 17, 8),
        "decoder_embed.weight": ones(8, D), "decoder_blocks.0.norm1.weight": ones(8)},
    "parameters": lambda network: collections.OrderedDict(
        (key, torch.nn.Parameter(value)) for key, value in plain(network).items()),
    "float64": lambda network: {key: value.double() for key, value in plain(network).items()},
    "views of larger tensors": lambda network: {
        key: torch.stack([value, value], -1)[..., 1] for key, value in plain(network).items()},
}


@pytest.mark.parametrize("convention", RIGHT)
def test_other_conventions_give_the_tokens_and_scores_of_their_network(tmp_path, convention):
    network, x = external(), random_images(2, (16, 16), torch.float32)
    content = RIGHT[convention](network)
    content = content if set(content) & {"model", "state_dict"} else {"model": content}
    path = save(tmp_path, content | {"num_heads": S})
    backbone = VisionTransformer(**SIZE)
    load_pretrained(backbone, path)
    classifier, _ = load_checkpoint(path)
    with torch.no_grad():
        tokens, attention = network(x)
        equal(backbone.forward_features(x)[0], tokens)
        equal(classifier(x), network.head(tokens[:, 0]))
        for block, A in zip(classifier.forward_features(x, "full")[1], attention):
            equal(block.full, A)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_half_precision_weights_are_read_as_float32(tmp_path, dtype, ending):
    state = {key: value.to(dtype) for key, value in plain(external()).items()}
    path = save(tmp_path, state)
    if ending == "safetensors":
        path = tmp_path / "vit.safetensors"
        path.write_bytes(safetensors(state))
    backbone, (classifier, _) = VisionTransformer(**SIZE), load_checkpoint(path)
    load_pretrained(backbone, path)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, state[key].float())
        assert torch.equal(value, classifier.state_dict()[key])


def test_a_distilled_deit_is_a_backbone_without_its_token_and_no_classifier(tmp_path):
    """Its scores are the mean of two heads, of which this project has one."""
    state = plain(external())
    cls, patches = state["pos_embed"].split((1, 16), 1)
    extra = {"dist_token": ones(1, 1, D), "head_dist.weight": ones(7, D), "head_dist.bias": ones(7)}
    path = save(tmp_path, {"model": state | extra | {
        "pos_embed": torch.cat([cls, ones(1, 1, D), patches], 1)}})
    backbone = VisionTransformer(**SIZE)
    report = load_pretrained(backbone, path)
    assert report.converted == ["pos_embed"] and set(extra) < set(report.ignored)
    equal(backbone.pos_embed.detach(), state["pos_embed"])
    error_of(lambda: load_checkpoint(path), "has dist_token, head_dist.weight, head_dist.bias",
             "does not compute", error=ValueError)


# ---------------------------------------------------------------- conventions that are refused


def blocks(name, value):
    """An entry of that name in each block."""
    return {f"blocks.{i}.{name}": value for i in range(L)}


def added(entries):
    return lambda state: state | entries


def without(pattern, entries={}):
    return lambda state: {key: value for key, value in state.items()
                          if not re.search(pattern, key)} | entries


REFUSED = {  # a change of DeiT's state dict, and what the error names
    "registers": (added({"register_tokens": ones(1, 4, D)}), "has register_tokens"),
    "norm_pre": (added({"norm_pre.weight": ones(D)}), "has norm_pre.weight"),
    "fc_norm": (without("^norm", {"fc_norm.weight": ones(D)}), "has fc_norm.weight"),
    "q_norm": (added(blocks("attn.q_norm.weight", ones(6))), "has blocks.0.attn.q_norm.weight"),
    "SwiGLU": (without("mlp", blocks("mlp.w12.weight", ones(96, D))),
               "has blocks.0.mlp.w12.weight"),
    "RMSNorm": (without("norm.*bias"), "lacks blocks.0.norm1.bias"),
    "relative positions": (added(blocks("attn.relative_position_bias_table", ones(9, 2))),
                           "has blocks.0.attn.relative_position_bias_table"),
    "positions on a grid (SAM)": (added({"pos_embed": ones(1, 4, 4, D)}), "pos_embed"),
    "RoPE": (added({"rope_embed.periods": ones(3)}), "has rope_embed.periods"),
    "DINOv3": (without("pos_embed", blocks("ls1.gamma", ones(D)) | {
        "storage_tokens": ones(1, 4, D), "rope_embed.periods": ones(3)}), "pos_embed"),
    "BEiT's biases": (added(blocks("attn.q_bias", ones(D))), "has blocks.0.attn.q_bias"),
    "BEiT's indices": (added(blocks("attn.relative_position_index", torch.zeros(9).int())),
                       "relative_position_index: found torch.int32"),
    "gates": (added(blocks("attn.gate.weight", ones(D))), "has blocks.0.attn.gate.weight"),
    "a third scale": (added(blocks("gamma_3", ones(D))), "has blocks.0.gamma_3"),
    "a scale of another width": (added(blocks("ls1.gamma", ones(13))), "has blocks.0.ls1.gamma"),
    "half a block more": (added({"blocks.3.norm1.weight": ones(D)}), "blocks.3."),
    "a block left out": (without(r"blocks\.1\."), "blocks."),
    "no class token (SigLIP)": (without("cls_token"), "lacks cls_token"),
    "a convolutional stem": (
        lambda state: renamed(state, "patch_embed.proj", "patch_embed.proj.0"), "patch_embed.proj"),
    "separate q, k and v": (without("qkv", blocks("attn.q_proj.weight", ones(D, D))),
                            "has blocks.0.attn.q_proj.weight"),
    "grey pictures": (added({"patch_embed.proj.weight": ones(D, 1, P, P)}), "(12, 1, 4, 4)"),
    "a 3-dimensional patch": (
        added({"patch_embed.proj.weight": ones(D, 3, 2, P, P)}), "patch_embed"),
    "a narrower MLP": (lambda state: {key: value[:24] if "fc1" in key else value
                                      for key, value in state.items()}, "fc1.weight: found shape"),
    "LoRA": (lambda state: renamed(state, "qkv", "qkv.base_layer"),
             "has blocks.0.attn.qkv.base_layer.weight"),
    "CLIP": (lambda state: renamed(state, "^", "visual.transformer."), "has visual.transformer."),
    "DINO": (lambda state: {"student": renamed(state, "^", "module.backbone."), "epoch": 100},
             "student: found a dict"),
    "Lightning": (lambda state: {"state_dict": renamed(state, "^", "net.")}, "has net."),
    "a ResNet": (lambda _: {"conv1.weight": ones(3), "layer1.0.conv1.weight": ones(3)}, "conv1"),
    "half of the shards": (without(r"blocks\.[12]|norm"), "lacks"),
    "a counter among the weights": (added({"epoch": 3}), "epoch: found a int, need a tensor"),
    "a number as a name": (added({3: ones(3)}), "has 3, which"),
    "one quantised layer": (added({"norm.weight": ones(D).to(torch.int8)}),
                            "found torch.int8, need a tensor of finite floating-point numbers"),
    "float8": (added({"norm.weight": ones(D).to(torch.float8_e4m3fn)}),
               "norm.weight: found torch.float8_e4m3fn"),
    "complex": (added({"norm.weight": ones(D) * 1j}), "found torch.complex64"),
    "sparse": (added({"blocks.0.attn.proj.weight": torch.eye(D).to_sparse()}),
               "blocks.0.attn.proj.weight: found NaN, infinity or no numbers"),
    "meta": (added({"norm.weight": ones(D, device="meta")}), "norm.weight: found"),
    "a file of NaN": (lambda state: {key: value * math.nan for key, value in state.items()},
                      "cls_token: found NaN"),
    "one infinity": (added({"norm.weight": ones(D).index_fill(0, torch.tensor([3]), math.inf)}),
                     "norm.weight: found NaN, infinity"),
    "beyond float32": (added({"norm.weight": ones(D).double() * 1e300}),
                       "norm.weight: found NaN, infinity"),
    "heads that are no number": (
        lambda state: {"model": state, "num_heads": "2"}, "num_heads: found '2'"),
    "no heads": (lambda state: {"model": state, "num_heads": 0}, "num_heads: found 0"),
    "-2 heads": (lambda state: {"model": state, "num_heads": -2}, "num_heads: found -2"),
    "10**9 heads": (lambda state: {"model": state, "num_heads": 10**9}, "num_heads: found 10"),
    "5 heads": (lambda state: {"model": state, "num_heads": 5}, "num_heads: found 5"),
    "NaN heads": (lambda state: {"model": state, "num_heads": math.nan}, "num_heads: found nan"),
    "an absurd grid": (lambda state: {"model": state, "grid": [10**9, 10**9]}, "pos_embed: found"),
    "a negative grid": (lambda state: {"model": state, "grid": [-4, -4]}, "grid: found [-4, -4]"),
    "a grid of three": (lambda state: {"model": state, "grid": (4, 2, 2)}, "grid: found (4, 2, 2)"),
    "another grid": (lambda state: {"model": state, "grid": (4, 5)}, "pos_embed: found"),
    "a mean alone": (lambda state: {"model": state, "mean": (0.5, 0.5, 0.5)}, "need both"),
    "a grey mean": (lambda state: {"model": state, "mean": 0.5, "std": 0.5}, "mean: found 0.5"),
    "no deviation": (lambda state: {"model": state, "mean": (0, 0, 0), "std": (1, 1, 0)},
                     "std: found (1, 1, 0), need 3 numbers above 0"),
}


LOADERS = {"checkpoint": load_checkpoint,
           "pretrained": lambda path: load_pretrained(VisionTransformer(**SIZE), path)}


@pytest.mark.parametrize("convention", REFUSED)
def test_what_this_model_does_not_compute_is_named(tmp_path, convention):
    change, words = REFUSED[convention]
    path = save(tmp_path, change(plain(external())))
    for load in LOADERS.values():
        error_of(lambda: load(path), path, words, error=ValueError)


def test_a_file_may_state_its_normalisation_as_troubleshooting_shows(tmp_path, monkeypatch):
    """docs/troubleshooting.md gives them for networks like timm's augreg."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    lines, = (block for block in re.findall(r"(?:^ {4}.*\n)+", page, re.MULTILINE)
              if "augreg" in block)
    monkeypatch.chdir(tmp_path)
    theirs, ours = (VisionTransformer(embed_dim=D, depth=1, num_heads=6) for _ in range(2))
    torch.save(theirs.state_dict(), "augreg.pth")
    exec(textwrap.dedent(lines), {})  # noqa: S102
    load_pretrained(ours, "stated.pth")
    pixels = torch.randint(256, (1, 3, 224, 224), dtype=torch.uint8)
    equal(ours.embed(normalise(pixels)), theirs.embed(pixels / 127.5 - 1))


# ---------------------------------------------------------------- a backbone and its report


def save_backbone(tmp_path, change=lambda state: state, **switches):
    """The path of one of this project's backbones, without its head, and its state dict."""
    state = {key: value for key, value in make_model(**SIZE | switches).float().state_dict().items()
             if not key.startswith("cdm.")}
    return save(tmp_path, change(state)), state


def test_a_report_says_what_became_of_each_parameter(tmp_path):
    path, state = save_backbone(tmp_path, lambda state: {
        "model": state | {"head.weight": ones(1000, D), "mask_token": ones(1, D)},
        "model_ema": state})
    model = LCTR(3, **SIZE)
    before = model.cdm.weight.clone()
    report = load_pretrained(model, path)
    assert sorted(report.loaded) == sorted(state) and not report.resized + report.converted
    assert report.ignored == ["head.weight", "mask_token"]
    assert {key.split(".")[0] for key in report.new} == {"cdm"}
    assert torch.equal(model.cdm.weight, before)
    assumed, other = report.notes
    for words in ("2 attention heads", "exact GELU", "norms before", "eps 1e-6", "ImageNet's mean"):
        assert words in assumed and words in str(report)
    assert other == "not taken: model_ema"


def test_a_report_assumes_nothing_that_the_file_says(tmp_path):
    path, _ = save_backbone(tmp_path, lambda state: {
        "model": state, "num_heads": S, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)})
    report = load_pretrained(VisionTransformer(**SIZE), path)
    assert report.converted == ["patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert "heads" not in str(report) and "ImageNet" not in str(report)


@pytest.mark.parametrize("change, words", [
    (added({"norm.weight": ones(13)}), "norm.weight: found shape (13,), need (12,)"),
    *((added({"pos_embed": ones(shape)}), f"pos_embed: found shape {shape}")
      for shape in ((2, 17, 12), (1, 17, 11), (16,), (), (1, 1, 12, 12))),
    *((added({"pos_embed": ones(1, n, 12)}), f"pos_embed: found {n} positions, need a square")
      for n in (19, 8, 1, 0)),
    *((added({"patch_embed.proj.weight": ones(shape)}), f"weight: found shape {shape}")
      for shape in ((12, 48), (12, 1, 4, 4), (12, 3, 0, 0), (12, 3, 4, 5), (13, 3, 4, 4))),
    (lambda s: {"cls_token": s["cls_token"], "blocks.0.ls2.gamma": ones(12)}, "lacks pos_embed"),
    (lambda s: {"cls_token": s["cls_token"], "dist_token": s["cls_token"]}, "lacks pos_embed"),
    (lambda s: s | {"module.norm.bias": ones(12)}, "norm.bias: found twice"),
    (lambda s: s | {"a\nb": ones(12)}, "has a\\nb"),
    (lambda s: {"model": None}, "found a NoneType, need a state dict"),
    (lambda s: {}, "lacks cls_token"),
    # shapes come first
    (added({"norm.weight": ones(13), "alien": ones(3)}), "norm.weight: found shape"),
    *((without(f"^{name}$"), f"lacks {name}") for name in (
        "cls_token", "pos_embed", "norm.weight", "blocks.0.norm1.bias", "patch_embed.proj.weight",
        "blocks.1.mlp.fc1.weight")),
], ids=str)
def test_shapes_and_names_that_do_not_fit_leave_the_model_as_it_was(tmp_path, change, words):
    path, _ = save_backbone(tmp_path, change)
    model = LCTR(3, **SIZE)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    error_of(lambda: load_pretrained(model, path), path, words, error=ValueError)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def config_of(height, width):
    return {"config": {"img_size": [P * height, P * width], "patch_size": P}}


@pytest.mark.parametrize("stored, beside, target", [  # grids: the file's, its own word, the model's
    ((6, 6), {}, (4, 4)), ((4, 4), {}, (2, 8)), ((3, 5), {"grid": (3, 5)}, (5, 3)),
    ((2, 8), {"grid": [2, 8]}, (4, 4)), ((3, 5), config_of(3, 5), (6, 5)),
    ((3, 3), {"config": {"img_size": "12", "patch_size": 0}}, (4, 4)), ((3, 5), {}, (3, 5)),
], ids=str)
def test_positions_are_resized_from_their_own_grid(tmp_path, stored, beside, target):
    """A square one, unless the file states another: 24 x 24 is not 18 x 32. An equal one stays."""
    path, state = save_backbone(tmp_path, lambda state: {"model": state} | beside,
                                img_size=[P * side for side in stored])
    model = LCTR(3, **SIZE | {"img_size": [P * side for side in target]})
    assert load_pretrained(model, path).resized == ["pos_embed"] * (stored != target)
    patches = state["pos_embed"][:, 1:].mT.unflatten(2, stored)  # (1, D, h', w')
    if stored != target:
        patches = F.interpolate(patches, target, mode="bicubic", align_corners=False)
    cls = state["pos_embed"][:, :1]
    equal(model.pos_embed.detach(), torch.cat([cls, patches.flatten(2).mT], 1))


def test_another_patch_size_is_resized_and_keeps_plain_patches(tmp_path):
    path, state = save_backbone(tmp_path, img_size=32, patch_size=8)
    model = LCTR(3, **SIZE)
    assert load_pretrained(model, path).resized == ["patch_embed.proj.weight"]
    weight = state["patch_embed.proj.weight"]
    expected = F.interpolate(weight, (4, 4), mode="bicubic", align_corners=False) * 4
    equal(model.patch_embed.proj.weight.detach(), expected)


@pytest.mark.parametrize("beside", [{"num_heads": 2}, {"config": {"num_heads": 2}}], ids=str)
def test_another_number_of_heads_is_refused_where_the_file_says_it(tmp_path, beside):
    path, _ = save_backbone(tmp_path, lambda state: {"model": state} | beside)
    model = LCTR(3, **SIZE | {"num_heads": 4})
    error_of(lambda: load_pretrained(model, path), "num_heads: found 2, need 4", error=ValueError)


# ---------------------------------------------------------------- files


def test_flags_and_numpy_scalars_beside_a_model_load_but_no_other_classes(tmp_path):
    """The authors' training script saves its flags and more beside the model, as DeiT's does."""
    state = plain(external())
    args = argparse.Namespace(
        lr=5e-5, seed=np.int64(0), best=np.float64(1.5), half=np.float16(1), on=np.bool_(True),
        data=pathlib.Path("CUB"), device=torch.device("cpu"), betas=(0.9, 0.99))
    everything = {"model": state, "optimizer": {"state": {}}, "lr_scheduler": {}, "epoch": 3,
                  "scaler": {}, "args": args}
    assert load_pretrained(VisionTransformer(**SIZE), save(tmp_path, everything)).loaded
    args.model = torch.nn.Linear(2, 2)
    error_of(lambda: load_pretrained(VisionTransformer(**SIZE), save(tmp_path, everything)),
             "it holds torch.nn.modules.linear.Linear", error=ValueError)


class RunsCode:
    def __reduce__(self):
        return open, (str(self.path), "w")


BROKEN = {
    "cut": lambda whole: whole[:len(whole) // 2], "empty": lambda _: b"",
    "a page": lambda _: b"<html>404</html>", "an index of shards": lambda _: b'{"weight_map": {}}',
    "a pointer to large storage": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha",
}


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("kind", [*BROKEN, "missing", "folder", "code", "list"])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_file_that_holds_no_weights_ends_in_one_line_and_runs_nothing(
        tmp_path, kind, load, ending):
    code, path = RunsCode(), tmp_path / f"x.{ending}"
    code.path = tmp_path / "exploded"
    whole, _ = save_backbone(tmp_path)
    if kind in BROKEN:
        path.write_bytes(BROKEN[kind](pathlib.Path(whole).read_bytes()))
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        save(tmp_path, {"model": code} if kind == "code" else [ones(3)], path.name)
    error_of(lambda: LOADERS[load](path), path, error=ValueError)
    assert not code.path.exists()


NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def safetensors(tensors):
    """The bytes of a .safetensors file with a metadata header."""
    header, content = {"__metadata__": {"format": "pt"}}, b""
    for key, value in tensors.items():
        raw = value.contiguous().view(torch.uint8).numpy().tobytes()
        header[key] = {"dtype": NAMES[value.dtype], "shape": list(value.shape),
                       "data_offsets": [len(content), len(content) + len(raw)]}
        content += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


@pytest.mark.parametrize("header", [
    *({"a\nb": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
      for dtype, shape, offsets in (
        ("F32", [3], [0, 8]), ("F32", [2], [0, 800]), ("F32", [1], [-8, -4]),
        ("F32", [2], [0., 8.]), ("F32", [2], [0]), ("F32", [-2], [8, 0]),
        ("F32", [-1, -2], [0, 8]), ("F32", [2**62], [0, 8]), ("F32", [2**70, 0], [0, 0]),
        ("F32", [2.0], [0, 8]), ("F32", 2, [0, 8]), ("F99", [2], [0, 8]),
        (["F32"], [2], [0, 8]), ("F8_E4M3", [8], [0, 8]))),
    {"a": {"dtype": "F32", "shape": [2]}}, {"a": 3}, [],
], ids=str)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, header):
    text, path = json.dumps(header).encode(), tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    error_of(lambda: load_pretrained(LCTR(3, **SIZE), path), "x.safetensors: ",
             "not a safetensors header", error=ValueError)
    path.write_bytes(safetensors({"norm.weight": ones(12)})[:-4])
    error_of(lambda: load_pretrained(LCTR(3, **SIZE), path), "norm.weight: ",
             "does not fit bytes 0 to 48 of 44", error=ValueError)


@settings(deadline=None, max_examples=80,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["checkpoint.pt", "backbone.safetensors"]), at=st.floats(0, 1),
       junk=st.none() | st.binary(min_size=1, max_size=40))
def test_a_damaged_file_works_or_ends_in_one_line(tmp_path, kind, at, junk):
    """Cut at a place, or with some bytes there replaced."""
    torch.save(FINE, tmp_path / "good.pt")
    load, content = load_checkpoint, bytearray((tmp_path / "good.pt").read_bytes())
    if kind == "backbone.safetensors":
        load = lambda path: load_pretrained(LCTR(3, **SIZE), path)
        content = bytearray(safetensors({"norm.weight": ones(12), "norm.bias": ones(12)}))
    at = int(at * len(content))
    content[at:None if junk is None else at + len(junk)] = junk or b""
    (tmp_path / kind).write_bytes(content)
    try:
        load(tmp_path / kind)
    except ValueError as error:
        assert kind in str(error) and "\n" not in str(error)


def test_deit_by_name_uses_the_hubs_cache_and_fails_in_one_line(monkeypatch):
    def no_network(url, **options):
        assert options["check_hash"] and options["weights_only"]
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    error_of(lambda: load_pretrained(LCTR(3), "deit_small"), "deit_small: cannot download https://",
             "cd65a155.pth", "put that file into", error=ValueError)


# ---------------------------------------------------------------- this project's checkpoints

CONFIG = SMALL_MODEL | SIZE | {"drop_path": 0.1}
WIDE = {"img_size": [12, 20]}


def checkpoint(changes=None, **config):
    """A checkpoint whose weights are those of a model with this config; changes: to its entries."""
    config = CONFIG | config
    model = make_model(**{flag: config[flag] for flag in MODEL_FLAGS}).float()
    return {"model": model.state_dict(), "config": config, "classes": SEVEN, "phase": "main",
            **(changes or {})}


@pytest.mark.parametrize("config", [
    {}, WIDE, {"img_size": (20, 12)}, {"head": "conv", "kernel_size": 1}, {"head": "token"},
    *({"scorer": scorer} for scorer in ("shared", "gap", "gmp")),
    {"erase": "minmax", "pool": "padded", "num_heads": 4, "drop_path": 0},
], ids=str)
def test_a_checkpoint_gives_its_own_model(tmp_path, config):
    content = checkpoint(**config)
    model, saved = load_checkpoint(save(tmp_path, content, "best.pt"))
    assert saved["classes"] == SEVEN and saved["phase"] == "main" and not model.training
    expected = make_model(**{flag: content["config"][flag] for flag in MODEL_FLAGS}).float()
    x = random_images(2, expected.img_size, torch.float32)
    assert torch.equal(model(x), expected(x))


FINE = checkpoint()
ABSURD = [0, -1, 10**30, 2.0, math.nan, "3", None, True, [], {}, [10**9, 10**9], ones(3)]


@pytest.mark.parametrize("value", ABSURD, ids=str)
@pytest.mark.parametrize("flag", [
    "patch_size", "embed_dim", "depth", "num_heads", "num_kernels", "kernel_size", "img_size",
    "head", "scorer", "erase", "pool"])
def test_an_absurd_config_is_named_before_anything_is_built(tmp_path, monkeypatch, flag, value):
    """But for choices that no shape gives: those are the model's to refuse."""
    words = f"{flag}: got" if flag in ("erase", "pool") else f"{flag}: found"
    if words.endswith("found"):
        monkeypatch.setattr(VisionTransformer, "__init__", lambda *_, **__: pytest.fail("built"))
    path = save(tmp_path, FINE | {"config": FINE["config"] | {flag: value}}, "best.pt")
    error_of(lambda: load_checkpoint(path), path, words, error=ValueError)


def config(**changes):
    return {"config": FINE["config"] | changes}


@pytest.mark.parametrize("changes, words", [
    (config(depth=4), "depth: found 4, its weights have 3"),
    (config(embed_dim=24), "embed_dim: found 24, its weights have 12"),
    (config(patch_size=8), "patch_size: found 8, its weights have 4"),
    (config(num_heads=5), "num_heads: found 5, need a divisor of 12"),
    (config(num_kernels=4), "num_kernels: found 4, its weights have 2"),
    (config(kernel_size=1), "kernel_size: found 1, its weights have 3"),
    (config(head="conv"), "head: found 'conv', its weights have cdm"),
    (config(scorer="shared"), "scorer: found 'shared', its weights have separate"),
    (config(drop_path=math.nan), "drop_path: found nan, need a number in [0, 1)"),
    (config(drop_path=1), "drop_path: found 1"), (config(drop_path="0"), "drop_path: found '0'"),
    (config(img_size=20), "img_size: found 20, need 16 patches of 4 x 4"),
    *((config(img_size=size), f"img_size: found {size!r}") for size in (
        [8, 16], "16", [16, 16, 1], -16, 16.0, [-16, -16], 10**9, [2, 128])),
    (config(erase="no"), "erase: got 'no'"),
    ({"classes": ["one"]}, "classes: found ['one'], need 7 names"),
    ({"classes": None}, "classes: found None"), ({"classes": "abcdefg"}, "found 'abcdefg'"),
    ({"classes": [1, 2, 3, 4, 5, 6, 7]}, "classes: found [1, 2"), ({"classes": []}, "found []"),
    ({"classes": ["many"] * 1000}, "classes: found ['many'"),
    ({"config": {}}, "lacks config's img_size"), ({"config": None}, "lacks config's img_size"),
    ({"model": {}}, "no ViT: has nothing"), ({"model": {"alien": ones(1)}}, "no ViT: has alien"),
    ({"model": FINE["model"] | {"alien": ones(1)}}, "has alien, which this model does not"),
    ({"model": FINE["model"] | {"norm.bias": ones(12) * math.nan}}, "norm.bias: found NaN"),
    ({"model": FINE["model"] | {"cdm.bias": ones(6)}}, "cdm.bias: found shape (6,), need (7,)"),
    ({"model": FINE["model"] | {"cdm.weight": ones(2, 0, 12, 3, 3)}}, "no head"),
    ({"model": 3}, "found a int, need a state dict"), ({"phase": "pretrain"}, "pretraining"),
    ({"model": ...}, "lacks model"), ({"classes": ...}, "lacks classes"),
    ({"phase": ...}, "lacks phase"),
], ids=lambda value: str(value)[:60])
def test_a_checkpoint_that_does_not_fit_is_named(tmp_path, changes, words):
    """A change to an entry; ... removes it."""
    content = {key: value for key, value in (FINE | changes).items() if value is not ...}
    path = save(tmp_path, content, "best.pt")
    error_of(lambda: load_checkpoint(path), path, words, error=ValueError)


# ---------------------------------------------------------------- the papers' own checkpoints


@pytest.mark.parametrize("scorer", ["separate", "gap", "gmp"])
def test_the_authors_checkpoint_is_scored_as_their_code_does(tmp_path, scorer):
    model = make_model(**SIZE | {"embed_dim": 64, "num_heads": 1}, pool="padded", scorer=scorer)
    state = model.float().state_dict()
    for ours, theirs in (("conv", "conv3x3"), ("score_avg", "CDM._routing_fn_two.fc"),
                         ("score_max", "CDM._routing_fn_two.fc2")):
        state = renamed(state, f"^cdm.{ours}", theirs)
    state = renamed(renamed(state, "^cdm", "CDM"), "^", "module.")
    path = save(tmp_path, {"model": state, "epoch": 7})
    loaded, saved = load_checkpoint(path)
    x = random_images(2, (16, 16), torch.float32)
    assert torch.equal(loaded(x), model(x))
    assert saved["config"]["pool"] == "padded" and saved["phase"] == "external"
    assert not load_pretrained(VisionTransformer(16, 4, 64, 3, 1), path).new


@pytest.mark.parametrize("head", ["conv", "token"])
def test_ts_cams_and_deits_checkpoints_are_scored(tmp_path, head):
    """Without a number of heads each is 64 wide."""
    model = make_model(**SIZE | {"embed_dim": 128, "num_heads": 2}, head=head).float()
    state = {key.replace("classifier.", "head."): value
             for key, value in model.state_dict().items()}
    path = save(tmp_path, {"model": state})
    x = random_images(2, (16, 16), torch.float32)
    assert torch.equal(load_checkpoint(path)[0](x), model(x))


@pytest.mark.parametrize("change, words", [
    (added({"pre_logits.fc.weight": ones(D, D)}), "has pre_logits.fc.weight"),
    (without("^head"), "no head"), (without("head.bias"), "lacks classifier.bias"),
    (added({"head.weight": ones(7, D, 5, 5)}), "kernel_size: got 5"),
    (added({"head.weight": ones(7, D, 1)}), "no head"),
    (added({"CDM.weight": ones(2, 7, D, 3, 3)}), "lacks cdm.bias, cdm.conv.weight"),
    (added({"head_dist.weight": ones(7, D)}), "has head_dist.weight"),
])
def test_another_head_is_refused(tmp_path, change, words):
    path = save(tmp_path, {"model": change(plain(external())), "num_heads": S})
    error_of(lambda: load_checkpoint(path), path, words, error=ValueError)


# ---------------------------------------------------------------- --export


def export(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["lctr.py", "--export", *map(str, arguments)])
    walkthrough.main(lctr.LCTR, lctr.load_checkpoint, lctr.trace)


@pytest.mark.parametrize("config", [
    WIDE, {"head": "token", "embed_dim": 96, "num_heads": 3}, {"head": "token"} | WIDE], ids=str)
def test_an_export_is_read_back_with_its_heads_and_grid(tmp_path, monkeypatch, config):
    """A form that timm's and DeiT's loaders take."""
    content = checkpoint(**config)
    export(monkeypatch, tmp_path / "vit.pth", save(tmp_path, content, "best.pt"))
    exported = torch.load(tmp_path / "vit.pth", weights_only=True)
    flags = {flag: content["config"][flag] for flag in MODEL_FLAGS}
    model = make_model(**flags).float()
    assert exported["num_heads"] == flags["num_heads"] and exported["grid"] == list(model.grid)
    assert set(exported["model"]) == {key.replace("classifier.", "head.")
                                      for key in content["model"] if not key.startswith("cdm.")}
    backbone = VisionTransformer(flags["img_size"], 4, flags["embed_dim"], 3, flags["num_heads"])
    report = load_pretrained(backbone, tmp_path / "vit.pth")
    assert not report.resized + report.converted and "attention heads" not in str(report)
    x = random_images(2, model.img_size, torch.float32)
    assert torch.equal(backbone.forward_features(x)[0], model.forward_features(x)[0])
    if flags["head"] == "token":
        assert torch.equal(load_checkpoint(tmp_path / "vit.pth")[0](x), model(x))


def test_an_export_replaces_no_file_and_fails_in_one_line(tmp_path, monkeypatch):
    path = save(tmp_path, FINE, "best.pt")
    for target, source, words in (
            (path, path, "best.pt: exists already"), ("a.pth", "none.pt", "none.pt"),
            (tmp_path / "nowhere" / "a.pth", path, "nowhere")):
        with pytest.raises(SystemExit, match="lctr.py: error: ") as caught:
            export(monkeypatch, target, source)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    assert load_checkpoint(path)
