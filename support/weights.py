"""Files of weights: reading them, other projects' names and conventions, and checks.

Takes and returns plain state dicts and configs; lctr.load_pretrained and lctr.load_checkpoint
build models of them. Nothing inside a file is ever executed.
"""

import argparse
import contextlib
import json
import math
import os
import pathlib
import re
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.common import last_line, pair

# what content of another kind raises
LOAD_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

# ---------------------------------------------------------------- reading files

DEIT_FILES = {  # torch.hub checks the hash that the name carries
    name: f"https://dl.fbaipublicfiles.com/deit/{name}_patch16_224-{digest}.pth"
    for name, digest in
    (("deit_tiny", "a1311bcf"), ("deit_small", "cd65a155"), ("deit_base", "b5f2ef4d"))
}
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}
# what training scripts save beside a model, harmless to build: their flags, numpy's scalars, paths
_scalar = np.float64(0).__reduce__()[0]
SAFE_GLOBALS = [
    argparse.Namespace, np.dtype, pathlib.PosixPath, pathlib.WindowsPath,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u4", "u8", "?")),
    (_scalar, "numpy.core.multiarray.scalar"), (_scalar, "numpy._core.multiarray.scalar"),
]


def read_weights(path: str) -> dict:
    """The dict in a file of weights. Raises ValueError naming the file."""
    path = str(path)
    if path in DEIT_FILES:
        return download(path)
    try:
        if path.endswith(".safetensors"):
            return read_safetensors(path)
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except Exception as error:  # a damaged file fails in many ways inside torch
        alien = re.search(r"GLOBAL (\S+)", str(error))
        reason = error if path.endswith(".safetensors") else type(error).__name__
        if alien:
            reason = f"it holds {alien[1]}, which is no tensor or plain type"
        raise ValueError(f"{path}: not a file of weights that can be read without running code "
                         f"({reason})") from None
    if not isinstance(content, dict):
        found = type(content).__name__
        raise ValueError(f"{path}: found a {found}, need a state dict or a checkpoint")
    return content


def download(name: str) -> dict:
    """The state dict of an official DeiT file, from torch.hub's cache where it lies there."""
    url, folder = DEIT_FILES[name], os.path.join(torch.hub.get_dir(), "checkpoints")
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network, no disk; a wrong hash
        raise ValueError(f"{name}: cannot download {url} ({last_line(error)}): put that file into "
                         f"{folder}, or give the path of one") from None


def read_safetensors(path: str) -> dict[str, Tensor]:
    """A header's length (8 bytes, little-endian), a JSON header, raw tensors."""
    content = np.fromfile(path, np.uint8)
    length = int.from_bytes(content[:8].tobytes(), "little")
    if not 2 <= length <= len(content) - 8:
        raise ValueError(f"its header claims {length} bytes, the file has {len(content)}")
    data, tensors = torch.from_numpy(content[8 + length:]), {}
    try:
        header = json.loads(content[8:8 + length].tobytes())
        header.pop("__metadata__", None)
        for key, entry in header.items():
            dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"]
            start, end = entry["data_offsets"]
            size = math.prod(shape) * dtype.itemsize
            if not 0 <= start <= end <= len(data) or end - start != size:
                raise ValueError(f"{key}: {dtype} of shape {shape} does not fit bytes {start} to "
                                 f"{end} of {len(data)}")
            raw = data[start:end].clone()  # offsets need not be aligned
            tensors[key] = raw.view(dtype).view(shape)
    except LOAD_ERRORS as error:
        raise ValueError(f"not a safetensors header ({type(error).__name__}: {last_line(error)})"
                         ) from None
    return tensors


# ---------------------------------------------------------------- names and conventions

HEADS = ("cdm.", "head.", "classifier.")
IGNORED = (*HEADS, "head_dist.", "dist_token", "mask_token", "pre_logits.", "decoder_", "decoder.")
LINEARS = ("patch_embed.proj", ".attn.qkv", ".attn.proj", ".mlp.fc1", ".mlp.fc2")
AUTHORS_NAMES = {  # prefixes in the authors' LCTR -> ours
    "conv3x3.": "cdm.conv.",
    "CDM._routing_fn_two.fc.": "cdm.score_avg.",
    "CDM._routing_fn_two.fc2.": "cdm.score_max.",
    "CDM.": "cdm.",
}
LAYER_SCALES = {  # x + gamma * (W x + b), under DINOv2's and timm's names, BEiT's and DeiT III's
    ".ls1.gamma": ".attn.proj", ".gamma_1": ".attn.proj",
    ".ls2.gamma": ".mlp.fc2", ".gamma_2": ".mlp.fc2",
}


def own_names(content: dict, source: str) -> dict[str, Tensor]:
    """The state dict in a file's content, under this project's names; finite tensors alone."""
    state, own = content.get("model", content.get("state_dict", content)), {}
    if not isinstance(state, dict):
        raise ValueError(f"{source}: found a {type(state).__name__}, need a state dict")
    for key, value in state.items():
        found = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
        if not isinstance(key, str) or not plain or not value.is_floating_point():
            raise ValueError(f"{source}: {key}: found {found}, need a tensor of finite numbers")
        if not value.isfinite().all():
            raise ValueError(f"{source}: {key}: need a tensor of finite numbers")
        while key.startswith(("module.", "_orig_mod.")):  # DataParallel, torch.compile
            key = key.partition(".")[2]
        prefix = next((prefix for prefix in AUTHORS_NAMES if key.startswith(prefix)), "")
        key = AUTHORS_NAMES.get(prefix, "") + key.removeprefix(prefix)
        if key in own:
            raise ValueError(f"{source}: {key}: found twice")
        own[key] = value
    return own


def convert(state: dict[str, Tensor], source: str) -> list[str]:
    """Other conventions to ours, exactly and in place; returns the names of what it changed."""
    converted = []
    try:
        for key in [key for key in state if key.endswith(".attn.q_bias")]:  # k has none
            attn = key.removesuffix("q_bias")
            if f"{attn}v_bias" in state and f"{attn}qkv.bias" not in state:
                q, v = state.pop(key), state.pop(f"{attn}v_bias")
                state[f"{attn}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
                converted.append(f"{attn}qkv.bias")
        for key in [key for key in state if key.endswith(tuple(f"{n}.weight" for n in LINEARS))]:
            bias = key.removesuffix("weight") + "bias"
            if bias not in state:  # exactly zero
                state[bias] = torch.zeros(len(state[key]))
                converted.append(bias)
        for key in list(state):
            suffix = next((suffix for suffix in LAYER_SCALES if key.endswith(suffix)), None)
            linear = suffix and key.removesuffix(suffix) + LAYER_SCALES[suffix]
            if not linear or f"{linear}.weight" not in state:
                continue
            gamma = state.pop(key).float()  # (D)
            if gamma.shape != state[f"{linear}.weight"].shape[:1]:
                need = f"({len(state[f'{linear}.weight'])},)"
                raise ValueError(f"{source}: {key}: found shape {tuple(gamma.shape)}, need {need}")
            for name, scale in ((f"{linear}.weight", gamma[:, None]), (f"{linear}.bias", gamma)):
                if name in state:
                    state[name] = state[name].float() * scale
                    converted.append(name)
        if "dist_token" in state and "pos_embed" in state:  # its position follows the class token's
            cls, _, patches = state["pos_embed"].tensor_split((1, 2), 1)
            state["pos_embed"] = torch.cat([cls, patches], 1)  # (1, 1 + h'*w', D)
            converted.append("pos_embed")
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(f"{source}: {key}: does not fit its other parameters ({last_line(error)})"
                         ) from None
    return converted


def said(content: dict) -> dict:
    """What a file says of its network besides weights: num_heads and grid (h', w'), where known."""
    found, config = {}, content.get("config")
    with contextlib.suppress(*LOAD_ERRORS):  # --export's form
        h, w = content["grid"]
        found["grid"] = (int(h), int(w))
    with contextlib.suppress(*LOAD_ERRORS):  # train.py's
        h, w = (side // config["patch_size"] for side in pair(config["img_size"]))
        found["grid"] = (h, w)
    for holder in (content, config):
        if isinstance(holder, dict) and isinstance(holder.get("num_heads"), int):
            found["num_heads"] = holder["num_heads"]
    return found


def square(n: int) -> tuple[int, int] | None:
    """(side, side) of a grid of n positions, None where it is not square."""
    side = math.isqrt(max(n, 0))
    return (side, side) if side > 0 and side * side == n else None


def find_grid(entries: int, grid: tuple | None, target: tuple) -> tuple[tuple, bool] | None:
    """The grid of a pos_embed of so many entries, and whether one more is the class token's.

    grid: what the file says; else a square one; else `target`, the model's. None where nothing
    fits. DeiT III has no entry for the class token.
    """
    for with_cls in (True, False):
        n = entries - with_cls
        for candidate in (grid,) if grid else (square(n), target if with_cls else None):
            if candidate and math.prod(candidate) == n and n > (not with_cls):
                return candidate, with_cls
    return (target, False) if not grid and entries == math.prod(target) else None


def resize_pos_embed(pos_embed: Tensor, grid: tuple | None, target: tuple) -> Tensor:
    """(1, 1 + h'*w', D), or without the class token's entry, -> (1, 1 + h*w, D), bicubically."""
    (h, w), with_cls = find_grid(pos_embed.shape[1], grid, target)
    if not with_cls:
        pos_embed = F.pad(pos_embed, (0, 0, 1, 0))  # the class token's is zero
    if (h, w) == target:
        return pos_embed
    patches = pos_embed[:, 1:].mT.unflatten(2, (h, w))  # (1, D, h', w')
    patches = F.interpolate(patches, target, mode="bicubic", align_corners=False)  # (1, D, h, w)
    return torch.cat([pos_embed[:, :1], patches.flatten(2).mT], 1)


def resize_patches(weight: Tensor, size: int) -> Tensor:
    """(D, 3, P', P') -> (D, 3, P, P), bicubically, scaled: a plain patch keeps its embedding."""
    if weight.shape[-1] == size:
        return weight
    scale = (weight.shape[-1] / size) ** 2
    return F.interpolate(weight, (size, size), mode="bicubic", align_corners=False) * scale


# ---------------------------------------------------------------- a backbone


class LoadReport(NamedTuple):
    """What load_pretrained did with each parameter, and notes on what a file cannot tell."""

    loaded: list[str]  # taken as they are
    resized: list[str]
    converted: list[str]  # from another convention
    new: list[str]  # the model's heads
    ignored: list[str]  # in the file
    notes: list[str]

    def __str__(self) -> str:
        lines = [f"  {name:9} {len(keys):3}  {', '.join(keys[:4])}{', ...' * (len(keys) > 4)}"
                 for name, keys in self._asdict().items() if keys and name != "notes"]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def shortly(names: list[str]) -> str:
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def check_names(needed, found) -> None:
    """Raises ValueError where a parameter is missing, or one is left that would change the maps."""
    missing = [key for key in needed if key not in found]
    unknown = [key for key in found if key not in needed]
    if len(missing) == len(needed):
        raise ValueError(f"no parameter of a ViT: has {shortly(unknown) or 'nothing'}, needs "
                         f"{shortly(missing)}")
    parts = [f"lacks {shortly(missing)}"] * bool(missing)
    parts += [f"has {shortly(unknown)}, which this model does not compute"] * bool(unknown)
    if parts:
        raise ValueError(f"another network than this model: {'; '.join(parts)}")


def untold(num_heads: int, guessed: bool) -> list[str]:
    """The notes on what a state dict cannot tell, and what is therefore assumed."""
    heads = f"{num_heads} attention heads, " * guessed
    return [f"assumed, since the file cannot tell: {heads}exact GELU, norms before each branch, "
            "their eps 1e-6, inputs normalised by ImageNet's mean and standard deviation"]


def fit_backbone(
    content: dict, own: dict[str, Tensor], grid: tuple[int, int], num_heads: int, source: str
) -> tuple[dict[str, Tensor], LoadReport]:
    """The entries of a model's state dict `own` that a file's content gives, and the report."""
    state, about = own_names(content, source), said(content)
    converted = convert(state, source)
    if about.get("num_heads", num_heads) != num_heads:
        raise ValueError(f"{source}: num_heads: found {about['num_heads']}, need {num_heads}")
    needed = [key for key in own if not key.startswith(HEADS)]
    ignored = [key for key in state if key not in needed and key.startswith(IGNORED)]
    new = [key for key in own if key.startswith(HEADS)]
    report = LoadReport([], [], [], new, ignored, untold(num_heads, "num_heads" not in about))

    update = {}
    for key in needed:
        before = own[key]
        if key not in state:
            continue
        found = value = state[key].float()
        with contextlib.suppress(*LOAD_ERRORS):  # no grid, no patches: the shape is named below
            if key == "pos_embed":
                value = resize_pos_embed(found, about.get("grid"), grid)
            elif key == "patch_embed.proj.weight":
                value = resize_patches(found, before.shape[-1])
        if value.shape != before.shape:
            raise ValueError(f"{source}: {key}: found shape {tuple(found.shape)}, need "
                             f"{tuple(before.shape)}")
        kind = report.resized if value is not found else report.loaded
        (report.converted if value is found and key in converted else kind).append(key)
        update[key] = value
    try:
        check_names(needed, [key for key in state if key not in ignored])
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return update, report


# ---------------------------------------------------------------- whole models


def architecture(state: dict[str, Tensor], about: dict) -> dict:
    """The sizes of a ViT, read off its parameters; 64-wide heads where the file does not say."""
    embed_dim, _, _, patch_size = state["patch_embed.proj.weight"].shape
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    grid, _ = find_grid(state["pos_embed"].shape[1], about.get("grid"), (0, 0))
    return dict(
        patch_size=patch_size, embed_dim=embed_dim, depth=len(blocks),
        num_heads=about.get("num_heads", max(1, embed_dim // 64)),
        img_size=[patch_size * side for side in grid])


def read_checkpoint(path: str) -> dict:
    """A checkpoint's dict. Raises ValueError naming the file.

    Of one without a config, of the authors' LCTR, TS-CAM or DeiT, sizes are read off the shapes,
    classes are numbered, and phase is "external".
    """
    checkpoint = read_weights(path)
    if "config" not in checkpoint:
        return external(checkpoint, str(path))
    missing = [key for key in ("model", "classes", "phase") if key not in checkpoint]
    if missing:
        raise ValueError(f"{path}: no {', '.join(missing)} in it: need a checkpoint of train.py")
    if checkpoint["phase"] != "main":
        raise ValueError(f"{path}: still in its pretraining phase: let train.py --resume finish it")
    return checkpoint


def assemble(build, checkpoint: dict, flags: tuple[str, ...], path: str) -> nn.Module:
    """build(num_classes, **config) with the checkpoint's weights, in float32.

    Names and sizes are compared before time or memory is taken. Raises ValueError naming the file.
    """
    state, config = checkpoint["model"], checkpoint["config"]
    try:
        blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
        if config["depth"] != len(blocks):
            raise ValueError(f"depth is {config['depth']!r} there, {len(blocks)} blocks here")
        with torch.device("meta"):
            model = build(len(checkpoint["classes"]), **{flag: config[flag] for flag in flags})
        check_names(model.state_dict(), state)
        model.load_state_dict({key: value.float().clone() for key, value in state.items()},
                              assign=True)
    except LOAD_ERRORS as error:
        reason = f"its weights do not fit its config: {last_line(error)}"
        raise ValueError(f"{path}: {reason}") from None
    return model


def external(content: dict, path: str) -> dict:
    """read_checkpoint for the files of the authors' LCTR, TS-CAM and DeiT."""
    state, about = own_names(content, path), said(content)
    try:
        convert(state, path)
        state = {key: value for key, value in state.items()
                 if not key.startswith(("mask_token", "decoder"))}  # of pretraining alone
        config = architecture(state, about) | {
            "drop_path": 0.0, "num_kernels": 4, "kernel_size": 3, "scorer": "separate",
            "erase": "raw", "pool": "gap"}
        if "cdm.weight" in state:
            G, C, _, k, _ = state["cdm.weight"].shape
            average, maximum = "cdm.score_avg.weight" in state, "cdm.score_max.weight" in state
            scorer = "separate" if average and maximum else "gap" if average else "gmp"
            config |= {"head": "cdm", "num_kernels": G, "kernel_size": k, "scorer": scorer,
                       "pool": "padded"}
        elif state["head.weight"].ndim == 4:
            C, _, k, _ = state["head.weight"].shape
            config |= {"head": "conv", "kernel_size": k}
        else:
            C = len(state["head.weight"])
            config |= {"head": "token"}
            state["classifier.weight"] = state.pop("head.weight")
            state["classifier.bias"] = state.pop("head.bias")
    except LOAD_ERRORS as error:
        raise ValueError(f"{path}: not a checkpoint of train.py, LCTR, TS-CAM or DeiT "
                         f"({last_line(error)}): has {shortly(list(state))}") from None
    return {"model": state, "config": config, "classes": [f"class {i}" for i in range(C)],
            "phase": "external", "metrics": {}}


def export(state: dict[str, Tensor], num_heads: int, grid: tuple[int, int]) -> dict:
    """A backbone, and a token head if there is one, as timm's and DeiT's loaders take them."""
    model = {key.replace("classifier.", "head."): value for key, value in state.items()
             if not key.startswith(("cdm.", "head."))}
    return {"model": model, "num_heads": num_heads, "grid": list(grid)}
