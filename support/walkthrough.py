"""What `python lctr.py` does: prints each step of localize on one image, or exports a backbone."""

import argparse
import os
import sys

import torch
from torch import Tensor

from support import weights
from support.common import last_line, write_atomic
from support.pictures.views import load_image


@torch.no_grad()
def trace(lctr, model, images: Tensor) -> list[tuple[str, str, str, Tensor]]:
    """What localize computes for images (B, 3, H, W), naively: (equation, name, shape, value).

    lctr: the module, whose naive rpam and dynamic_conv2d are used.
    """
    tokens, maps = model.forward_features(images, "full")
    cls_attn, relation = lctr.rpam(maps[-1].full)
    found = model.localize(images)
    steps = [
        ("", "images", "(B, 3, H, W)", images),
        ("Eq. 1", "X_1: class token, patches, positions", "(B, N+1, D)", model.embed(images)),
        ("Eq. 4", "A_L: the last block's attention", "(B, S, N+1, N+1)", maps[-1].full),
        ("RPAM", "M_L^c: its class row, head mean", "(B, N+1)", cls_attn),
        ("RPAM", "M_L^r: its rows, weighted by M_L^c", "(B, N)", relation),
        ("Eq. 5", "M_*^r: patch relation map", "(B, h, w)", found.relation_map),
        ("CDM", "M~_*^c: class-token attention map", "(B, h, w)", found.cls_map),
        ("", "X_L: tokens after the final norm", "(B, N+1, D)", tokens),
    ]
    features = model.on_grid(tokens[:, 1:])  # X_L (B, D, h, w)
    if model.head_type == "cdm":
        scores, weight = model.classify(tokens, found.cls_map)[1], model.cdm.weight
        mixed = torch.einsum("bg,gcduv->bcduv", scores, weight)
        steps += [
            ("CDM", "1 - M~_*^c: reversed", "(B, h, w)", model.cdm.reverse(found.cls_map)),
            ("CDM", "X~_L: cues", "(B, D, h, w)", model.cdm.cues(features, found.cls_map)),
            ("CDM", "S_g: scores", "(B, G)", scores),
            ("Eq. 6", "W_g^e: kernels", "(G, C, D, k, k)", weight),
            ("Eq. 6", "sum_g S_g W_g^e: the image's kernel", "(B, C, D, k, k)", mixed),
            ("Eq. 6", "X_CDM: class maps", "(B, C, h, w)",
             lctr.dynamic_conv2d(features, scores, weight, model.cdm.bias)),
        ]
    elif model.head_type == "conv":
        steps += [
            ("", "W: the static kernel", "(C, D, k, k)", model.head.weight),
            ("", "class maps", "(B, C, h, w)", model.head(features)),
        ]
    steps += [
        ("Eq. 2", "logits", "(B, C)", found.logits),
        ("Eq. 2", "p: their softmax", "(B, C)", found.logits.softmax(1)),
    ]
    if model.head_type != "token":
        steps += [
            ("Eq. 3", "M_CDM: the predicted class's map", "(B, 1, h, w)", found.class_maps),
            ("Eq. 3", "M^fuse: ReLU(M_CDM) * M_*^r", "(B, 1, h, w)", lctr.fuse(found)),
        ]
    return steps


def main(lctr) -> None:
    """lctr: the module."""
    parser = argparse.ArgumentParser(
        description="Prints each step of LCTR on one image, or exports a checkpoint.")
    parser.add_argument("image", nargs="?", help="picture to localise in (default: random noise)")
    parser.add_argument(
        "--checkpoint", help="model to use (default: a small one with random weights)")
    parser.add_argument(
        "--export", nargs=2, metavar=("FILE", "CHECKPOINT"),
        help="write CHECKPOINT's backbone (and token head) to a new FILE, in timm's names")
    flags = parser.parse_args()
    try:
        if flags.export:
            path, source = flags.export
            if os.path.lexists(path):
                raise ValueError(f"{path}: exists already: need the name of a new file")
            model, _ = lctr.load_checkpoint(source)
            content = weights.export(model.state_dict(), model.num_heads, model.grid)
            write_atomic(path, lambda file: torch.save(content, file))
            height, width = model.img_size
            print(f"{path}: {len(content['model'])} parameters, input {height} x {width}")
            return
        torch.manual_seed(0)
        small = lctr.LCTR(10, img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3).eval()
        model = lctr.load_checkpoint(flags.checkpoint)[0] if flags.checkpoint else small
        images = torch.randn(1, 3, *model.img_size)
        if flags.image:
            images = load_image(flags.image, model.img_size)[0][None]  # (1, 3, H, W)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"lctr.py: error: {last_line(error)}")
    for equation, name, symbols, value in trace(lctr, model, images):
        shape, low, high = str(tuple(value.shape)), value.min(), value.max()
        print(f"{equation:6} {name:37} {symbols:17} {shape:19} {low:9.3g} to {high:.3g}")
