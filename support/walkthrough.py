"""What `python lctr.py` does: prints each step of localize on one image, or exports a backbone."""

import argparse
import os
import sys
from collections.abc import Callable

import torch

from support import weights
from support.common import last_line, say, write_atomic
from support.pictures.views import load_image, normalise


def main(model_class: type, load_checkpoint: Callable, trace: Callable) -> None:
    """The three are lctr's: LCTR, load_checkpoint and trace."""
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
            model, _ = load_checkpoint(source)
            content = weights.export(model.state_dict(), model.num_heads, model.grid)
            write_atomic(path, lambda file: torch.save(content, file))
            height, width = model.img_size
            say(f"{path}: {len(content['model'])} parameters, input {height} x {width}")
            return

        torch.manual_seed(0)
        model = model_class(10, img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3)
        if flags.checkpoint:
            model, _ = load_checkpoint(flags.checkpoint)
        images = torch.randn(1, 3, *model.img_size)
        if flags.image:
            images = normalise(load_image(flags.image, model.img_size)[0])[None]  # (1, 3, H, W)
        for equation, name, symbols, value in trace(model.eval(), images):
            shape, low, high = str(tuple(value.shape)), value.min(), value.max()
            say(f"{equation:6} {name:37} {symbols:17} {shape:19} {low:9.3g} to {high:.3g}")
    except BrokenPipeError:  # such as by | head: nobody reads on
        sys.exit(1)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"lctr.py: error: {last_line(error)}")
