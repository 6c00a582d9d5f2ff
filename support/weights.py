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
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.common import last_line, pair, printable
from support.pictures.annotations import nfc
from support.pictures.views import MEAN, STD

# what a file raises whose content is of another kind
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
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
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
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = error if path.endswith(".safetensors") else type(error).__name__
        if refused:
            reason = f"it holds {refused[1]}, which is no tensor or plain type"
        raise ValueError(f"{path}: not a file of weights that can be read without running code "
                         f"({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found a {type(content).__name__}, need a state dict or a "
                         "checkpoint")
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
PRETRAINING = ("mask_token", "decoder_", "decoder.")  # parts that serve pretraining alone
IGNORED = (*HEADS, *PRETRAINING, "head_dist.", "dist_token", "pre_logits.")  # in a backbone's file
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
STATEMENTS = {  # what a file may state beside its weights: how many numbers, above what, of a type
    "num_heads": (1, 0, int, "a whole number above 0"),
    "grid": (2, 0, int, "2 whole numbers above 0"),
    "mean": (3, -math.inf, float, "3 numbers"),
    "std": (3, 0, float, "3 numbers above 0"),
}


def shown(value: object) -> str:
    return printable(repr(value))[:60]


def defect(value: object) -> str:
    """What is wrong with an entry of a state dict; nothing with a tensor of finite numbers."""
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        return str(value.dtype) if isinstance(value, Tensor) else f"a {type(value).__name__}"
    with contextlib.suppress(*LOAD_ERRORS):  # sparse and meta tensors
        if value.float().isfinite().all():
            return ""
    return "NaN, infinity or no numbers"


def find_state(content: dict, source: str) -> dict[str, Tensor]:
    """The state dict in a file's content, in float32 under this project's names.

    Raises ValueError for an entry that is not a tensor of finite numbers. Integers are refused
    too: they may be quantised weights.
    """
    entries, state = content.get("model", content.get("state_dict", content)), {}
    if not isinstance(entries, dict):
        raise ValueError(f"{source}: found a {type(entries).__name__}, need a state dict")
    for key, value in entries.items():
        wrong = defect(value)
        if wrong:
            raise ValueError(f"{source}: {printable(key)[:100]}: found {wrong}, need a tensor of "
                             "finite floating-point numbers")
        key = re.sub(r"^(module\.|_orig_mod\.)+", "", str(key))  # DataParallel, torch.compile
        prefix = next((prefix for prefix in AUTHORS_NAMES if key.startswith(prefix)), "")
        key = AUTHORS_NAMES.get(prefix, "") + key.removeprefix(prefix)
        if key in state:
            raise ValueError(f"{source}: {key}: found twice")
        state[key] = value.float()
    return state


def find_statements(content: dict, source: str) -> dict:
    """What a file states of its network besides weights, where it does: see STATEMENTS.

    grid: (h', w') of its positions. mean, std: what its pictures, in 0 to 1, were normalised by.
    """
    about = {name: content[name] for name in STATEMENTS if name in content}
    config = content.get("config")
    if isinstance(config, dict):  # train.py's
        if "num_heads" in config:
            about["num_heads"] = config["num_heads"]
        with contextlib.suppress(*LOAD_ERRORS):
            h, w = (side // config["patch_size"] for side in pair(config["img_size"]))
            about["grid"] = h, w
    for name, stated in about.items():
        count, low, kind, need = STATEMENTS[name]
        numbers = [stated] if count == 1 else stated
        fits = isinstance(numbers, (list, tuple)) and len(numbers) == count and all(
            type(number) in (int, kind) and low < number < math.inf for number in numbers)
        if not fits:
            raise ValueError(f"{source}: {name}: found {shown(stated)}, need {need}")
    if ("mean" in about) != ("std" in about):
        raise ValueError(f"{source}: found one of mean and std, need both")
    return about


def convert(state: dict[str, Tensor], about: dict) -> list[str]:
    """Other conventions to this project's, exactly and in place; returns the names of what changed.

    about: what the file states. What does not have its convention's shapes is left alone, and then
    fits no model.
    """
    before = dict(state)

    # a linear layer without a bias has one of zeros
    for key in before:
        name, _, kind = key.rpartition(".")
        if kind == "weight" and name.endswith(LINEARS) and f"{name}.bias" not in state:
            state[f"{name}.bias"] = torch.zeros(state[key].shape[:1])

    # LayerScale is folded into the layer before it
    for key in before:
        suffix = next((suffix for suffix in LAYER_SCALES if key.endswith(suffix)), "")
        linear = key.removesuffix(suffix) + LAYER_SCALES.get(suffix, "")
        weight, bias = state.get(f"{linear}.weight"), state.get(f"{linear}.bias")
        if suffix and weight is not None and bias.shape == state[key].shape == weight.shape[:1]:
            gamma = state.pop(key)  # (D)
            state[f"{linear}.weight"] = gamma[:, None] * weight
            state[f"{linear}.bias"] = gamma * bias

    # the position of a distillation token, which follows the class token's, is dropped
    positions, patches = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    if "dist_token" in state and positions is not None and positions.ndim == 3:
        cls, _, rest = positions.tensor_split((1, 2), 1)
        state["pos_embed"] = torch.cat([cls, rest], 1)  # (1, 1 + h'*w', D)

    # another normalisation of pictures: W (p - m) / s + b for pixels p = M + S x, x our input
    if "mean" in about and patches is not None and patches.shape[1:2] == (3,):
        mean, std = (torch.tensor(about[name]).view(3, 1, 1) for name in ("mean", "std"))
        state["patch_embed.proj.weight"] = patches * (STD / 255 / std)
        state["patch_embed.proj.bias"] = (
            state["patch_embed.proj.bias"] + (patches * ((MEAN / 255 - mean) / std)).sum((1, 2, 3)))
    return [key for key, value in state.items() if value is not before.get(key)]


def read_state(content: dict, source: str) -> tuple[dict[str, Tensor], list[str], dict]:
    """A file's state dict in this project's conventions, the names of what that changed, and what
    the file states.
    """
    state, about = find_state(content, source), find_statements(content, source)
    return state, convert(state, about), about


# ---------------------------------------------------------------- sizes


def find_grid(
    entries: int, grid: tuple | None, target: tuple | None, source: str
) -> tuple[tuple, bool]:
    """The grid of a pos_embed of so many entries, and whether one more is the class token's.

    grid: what the file states; else a square one; else `target`, the model's. DeiT III has no entry
    for the class token.
    """
    for with_cls in (True, False):
        side = math.isqrt(max(entries - with_cls, 0))
        for choice in [grid] if grid else [(side, side), target]:
            if choice and math.prod(choice) + with_cls == entries > 1:
                return choice, with_cls
    need = f"{grid[0]} x {grid[1]}" if grid else "a square"
    raise ValueError(f"{source}: pos_embed: found {entries} positions, need {need}, with or "
                     "without one for the class token")


def resize_pos_embed(
    pos_embed: Tensor, grid: tuple[int, int], target: tuple[int, int], with_cls: bool = True
) -> Tensor:
    """(1, 1 + h'*w', D), or without the class token's entry, -> (1, 1 + h*w, D), bicubically."""
    if not with_cls:
        pos_embed = F.pad(pos_embed, (0, 0, 1, 0))  # the class token's is zero
    if tuple(grid) == tuple(target):
        return pos_embed
    patches = pos_embed[:, 1:].mT.unflatten(2, grid)  # (1, D, h', w')
    patches = F.interpolate(patches, target, mode="bicubic", align_corners=False)  # (1, D, h, w)
    return torch.cat([pos_embed[:, :1], patches.flatten(2).mT], 1)


def sizes(state: dict[str, Tensor], source: str) -> dict:
    """The flags of a ViT that the shapes of its parameters give."""
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    match {key: tuple(value.shape) for key, value in state.items()}:
        case {"patch_embed.proj.weight": (D, _, _, P), "pos_embed": (_, _, _)} if D and P:
            return {"patch_size": P, "embed_dim": D, "depth": depth}
    raise ValueError(f"{source}: no ViT: has {summary(state)}, needs patch_embed.proj.weight "
                     "(D, 3, P, P) and pos_embed (1, N+1, D)")


def resize(
    state: dict[str, Tensor], patches: tuple, grid: tuple | None, target: tuple, source: str
) -> list[str]:
    """Positions and patches to a model's grid, `target`, and to its patches (D, 3, P, P), in place;
    returns the names of what changed. grid: what the file states. Other shapes are left alone.
    """
    before, (D, _, _, P) = dict(state), patches
    positions, weight = before.get("pos_embed"), before.get("patch_embed.proj.weight")
    if positions is not None and positions.ndim == 3 and positions.shape[::2] == (1, D):
        stored, with_cls = find_grid(positions.shape[1], grid, target, source)
        state["pos_embed"] = resize_pos_embed(positions, stored, target, with_cls)
    if weight is not None and weight.numel() and weight.shape == (D, 3, *weight.shape[-1:] * 2):
        side = weight.shape[-1]
        if side != P:  # scaled: a patch of one colour keeps its embedding
            weight = F.interpolate(weight, (P, P), mode="bicubic", align_corners=False)
            state["patch_embed.proj.weight"] = weight * (side / P) ** 2
    return [key for key, value in state.items() if value is not before[key]]


def architecture(state: dict[str, Tensor], about: dict, source: str) -> dict:
    """The flags of a ViT; 64-wide heads and a square grid where the file states nothing else."""
    flags = sizes(state, source)
    D = flags["embed_dim"]
    grid, _ = find_grid(state["pos_embed"].shape[1], about.get("grid"), None, source)
    S = about.get("num_heads", max(1, D // 64))
    if D % S:
        raise ValueError(f"{source}: num_heads: found {S}, need a divisor of the width {D}")
    return flags | {"num_heads": S, "img_size": [flags["patch_size"] * side for side in grid]}


def head_sizes(state: dict[str, Tensor], source: str) -> tuple[int, dict]:
    """The number of classes, and the flags of a head that the shapes of its parameters give."""
    match {key: tuple(value.shape) for key, value in state.items()}:
        case {"cdm.weight": (G, C, _, k, _)} if C:
            layers = ["cdm.score_avg.weight" in state, "cdm.score_max.weight" in state]
            scorer = "separate" if all(layers) else "gap" if layers[0] else "gmp"
            return C, {"head": "cdm", "num_kernels": G, "kernel_size": k, "scorer": scorer}
        case {"head.weight": (C, _, k, _)} if C:
            return C, {"head": "conv", "kernel_size": k}
        case {"classifier.weight": (C, _)} if C:
            return C, {"head": "token"}
    raise ValueError(f"{source}: no head that gives class scores: has {summary(state)}, needs "
                     "cdm.weight (G, C, D, k, k), head.weight (C, D, k, k) or (C, D)")


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


def summary(names: Iterable[str]) -> str:
    names = [printable(name)[:100] for name in names]
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3) or "nothing"


def check_fit(state: dict[str, Tensor], needed: dict[str, Tensor], source: str) -> None:
    """Raises ValueError unless a file's state dict has the names and shapes of the `needed` one, a
    model's, and no others: any other parameter would change what the network computes.
    """
    for key in needed:
        if key in state and state[key].shape != needed[key].shape:
            shapes = tuple(state[key].shape), tuple(needed[key].shape)
            raise ValueError(f"{source}: {key}: found shape {shapes[0]}, need {shapes[1]}")
    missing = [key for key in needed if key not in state]
    unknown = [key for key in state if key not in needed]
    differences = [f"lacks {summary(missing)}"] * bool(missing)
    differences += [f"has {summary(unknown)}, which this model does not compute"] * bool(unknown)
    if differences:
        raise ValueError(f"{source}: another network than this model: {'; '.join(differences)}")


def fit_backbone(
    content: dict, model: dict[str, Tensor], grid: tuple[int, int], num_heads: int, source: str,
) -> tuple[dict[str, Tensor], LoadReport]:
    """The entries of the state dict `model` that a file's content gives, and the report."""
    state, converted, about = read_state(content, source)
    if about.get("num_heads", num_heads) != num_heads:
        raise ValueError(f"{source}: num_heads: found {about['num_heads']}, need {num_heads}")

    # the file's backbone, in the model's sizes
    backbone = {key: value for key, value in model.items() if not key.startswith(HEADS)}
    ignored = [key for key in state if key not in backbone and key.startswith(IGNORED)]
    update = {key: value for key, value in state.items() if key not in ignored}
    patches = model["patch_embed.proj.weight"].shape
    resized = resize(update, patches, about.get("grid"), grid, source)
    check_fit(update, backbone, source)

    # what became of each parameter, and what the file cannot tell
    converted = [key for key in backbone if key in converted and key not in resized]
    loaded = [key for key in backbone if key not in resized and key not in converted]
    new = [key for key in model if key not in backbone]
    heads = f"{num_heads} attention heads, " * ("num_heads" not in about)
    inputs = ", pictures normalised by ImageNet's mean and std" * ("mean" not in about)
    notes = [f"assumed, since the file does not tell: {heads}exact GELU, norms before each branch, "
             f"their eps 1e-6{inputs}"]
    notes += [f"not taken: {name}" for name in ("model_ema", "state_dict_ema") if name in content]
    return update, LoadReport(loaded, resized, converted, new, ignored, notes)


# ---------------------------------------------------------------- whole models


def read_checkpoint(path: str, flags: tuple[str, ...]) -> dict:
    """A checkpoint's dict, its config checked against its weights. Raises ValueError naming it.

    flags: what the config must hold. Of a file without a config, of the authors' LCTR, TS-CAM or
    DeiT, sizes are read off the shapes, classes are numbered, and phase is "external".
    """
    checkpoint, path = read_weights(path), str(path)
    if "config" not in checkpoint:
        return external(checkpoint, path)
    config = checkpoint["config"] if isinstance(checkpoint["config"], dict) else {}
    missing = [key for key in ("model", "classes", "phase") if key not in checkpoint]
    missing += [f"config's {flag}" for flag in flags if flag not in config]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}: need a checkpoint of train.py")
    if checkpoint["phase"] != "main":
        raise ValueError(f"{path}: of a pretraining phase: let train.py --resume finish the run, or "
                         "give the file to --pretrained")
    state = find_state(checkpoint, path)
    check_config(config, checkpoint["classes"], state, path)
    return checkpoint | {"model": state, "classes": list(map(nfc, checkpoint["classes"]))}


def check_config(config: dict, classes: list, state: dict[str, Tensor], path: str) -> None:
    """Raises ValueError where a config has other sizes than its weights, before it is built."""
    flags, (C, head) = sizes(state, path), head_sizes(state, path)
    if config["scorer"] == "shared" and head.get("scorer") == "gap":  # of the same shapes
        head["scorer"] = "shared"
    for name, value in (flags | head).items():
        if type(config[name]) is not type(value) or config[name] != value:
            raise ValueError(f"{path}: {name}: found {shown(config[name])}, its weights have "
                             f"{value}")

    # what shapes do not give: the sides of an image, the number of heads, a rate, names
    D, P, N = flags["embed_dim"], flags["patch_size"], state["pos_embed"].shape[1] - 1
    size, S, rate = config["img_size"], config["num_heads"], config["drop_path"]
    sides = size if isinstance(size, (list, tuple)) else [size, size]
    whole = len(sides) == 2 and all(type(side) is int and side > 0 == side % P for side in sides)
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    for name, value, fits, need in (
        ("img_size", size, whole and math.prod(sides) == N * P * P, f"{N} patches of {P} x {P}"),
        ("num_heads", S, type(S) is int and S > 0 == D % S, f"a divisor of {D}"),
        ("drop_path", rate, type(rate) in (int, float) and 0 <= rate < 1, "a number in [0, 1)"),
        ("classes", classes, named and len(classes) == C, f"{C} names"),
    ):
        if not fits:
            raise ValueError(f"{path}: {name}: found {shown(value)}, need {need}")


def assemble(build, checkpoint: dict, flags: tuple[str, ...], path: str) -> nn.Module:
    """build(num_classes, **config) with a checkpoint's weights. Raises ValueError naming the file.

    It is built without memory for its parameters, which become the checkpoint's.
    """
    state, config = checkpoint["model"], checkpoint["config"]
    try:
        with torch.device("meta"):
            model = build(len(checkpoint["classes"]), **{flag: config[flag] for flag in flags})
    except ValueError as error:  # of flags that no shape gives
        raise ValueError(f"{path}: {last_line(error)}") from None
    check_fit(state, model.state_dict(), path)
    model.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    return model


def external(content: dict, path: str) -> dict:
    """read_checkpoint for the files of the authors' LCTR, TS-CAM and DeiT."""
    state, _, about = read_state(content, path)
    config = architecture(state, about, path)
    grid, with_cls = find_grid(state["pos_embed"].shape[1], about.get("grid"), None, path)
    state["pos_embed"] = resize_pos_embed(state["pos_embed"], grid, grid, with_cls)
    if "head.weight" in state and state["head.weight"].ndim == 2:  # DeiT's
        state = {re.sub("^head\\.", "classifier.", key): value for key, value in state.items()}
    C, head = head_sizes(state, path)
    config |= {"drop_path": 0.0, "num_kernels": 4, "kernel_size": 3, "scorer": "separate",
               "erase": "raw", "pool": "padded" if head["head"] == "cdm" else "gap"} | head
    model = {key: value for key, value in state.items() if not key.startswith(PRETRAINING)}
    return {"model": model, "config": config, "classes": [f"class {i}" for i in range(C)],
            "phase": "external", "metrics": {}}


def export(state: dict[str, Tensor], num_heads: int, grid: tuple[int, int]) -> dict:
    """A backbone, and a token head if there is one, as timm's and DeiT's loaders take them."""
    model = {key.replace("classifier.", "head."): value for key, value in state.items()
             if not key.startswith(("cdm.", "head."))}
    return {"model": model, "num_heads": num_heads, "grid": list(grid)}
