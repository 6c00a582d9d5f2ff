"""The flags of evaluate.py."""

import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from support.common import (AMP, Parser, choose_amp, img_size_flag, number, open_device,
                            threshold_flag)

# flags that do nothing with --images, and those that then serve --threshold auto alone
WITH_IMAGES_UNUSED = ("split", "gt_class", "save_maps")
FOR_AUTO_THRESHOLD = ("data", "root", "limit_test", "workers")


def parse_flags(argv: Sequence[str] | None, description: str, datasets, couplings) -> Namespace:
    """datasets, couplings: the names to choose from."""
    parser = Parser(prog="evaluate.py", description=description,
                    epilog="Data set, frame and threshold come from the checkpoint by default.")
    group = parser.add_argument_group("data")
    group.add_argument("--data", choices=datasets,
                       help="data set to evaluate on (default: what the checkpoint was trained on)")
    group.add_argument("--root", metavar="DIR",
                       help="the data set's folder (default: the checkpoint's)")
    group.add_argument("--split", choices=("test", "val", "train"),
                       help="part of the data set to evaluate on (default: test)")
    group.add_argument("--limit-test", type=number(int, 1), metavar="N",
                       help="that many images alone, spread evenly over the split (default: all)")
    group.add_argument("--images", nargs="+", metavar="PATH",
                       help="localise in these photographs or folders instead of a data set")
    group.add_argument("--crop", type=number(int, 1), metavar="SIZE", help="shorter side resized "
                       "to SIZE, then the centre (default: the whole image, squashed)")
    group = parser.add_argument_group("model")
    group.add_argument("--checkpoint", nargs="+", required=True, metavar="FILE",
                       help="of train.py, the authors' LCTR, TS-CAM or DeiT; several are compared. "
                       "With --images also a backbone, or deit_tiny, deit_small, deit_base")
    group.add_argument("--img-size", type=img_size_flag, metavar="SIZE", help="input, as 224 or "
                       "160x224, to which positions are resized (default: the checkpoint's)")
    group = parser.add_argument_group("recipe")
    group.add_argument("--coupling", choices=couplings, help="which maps are multiplied for the "
                       "boxes (default: relation, Eq. 3; relation-only where no class map is)")
    group.add_argument("--threshold", type=threshold_flag, metavar="VALUE",
                       help="of the box: a number in [0, 1), or auto, the best on val (default: "
                       "the checkpoint's, else 0.2)")
    group.add_argument("--gt-class", action="store_true",
                       help="evaluate the label's map (default: the predicted class's)")
    group = parser.add_argument_group("run")
    group.add_argument("--batch-size", type=number(int, 1), default=64, metavar="N",
                       help="images in one forward pass (default: 64; photographs go one by one)")
    group.add_argument("--workers", type=number(int, 0), metavar="N",
                       help="processes that load images (default: 0, none besides this one)")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    group.add_argument("--amp", choices=("auto", *AMP), default="auto", help="precision of the "
                       "forward pass (default: auto, bf16 or fp16 on a GPU, off on a CPU)")
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="DIR",
                       help="folder of the results (default: evaluate/ beside the checkpoint; with "
                       "--images images/, ./images for a downloaded one)")
    group.add_argument("--save-maps", action="store_true", help="also write every map, to maps.npz")
    flags = parser.parse_args(argv)
    check_flags(flags, parser)
    return flags


def check_flags(flags: Namespace, parser: Parser) -> None:
    """What can be checked without a file; the defaults that depend on others; the device."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("torchrun: one process evaluates, so start it with python evaluate.py")
    unused = WITH_IMAGES_UNUSED + FOR_AUTO_THRESHOLD * (flags.threshold != "auto")
    for name in unused if flags.images else ():
        if getattr(flags, name) not in (None, False):
            parser.error(f"--{name.replace('_', '-')}: does nothing with --images")
    if "" in [*flags.checkpoint, *(flags.images or ())]:
        parser.error("--checkpoint, --images: got an empty name")
    if flags.images and len(flags.checkpoint) > 1:
        parser.error("--images: takes one --checkpoint")
    first = Path(flags.checkpoint[0])
    beside = first.parent if os.path.exists(first) or not flags.images else Path()
    flags.out = flags.out or beside / ("images" if flags.images else "evaluate")
    flags.split, flags.workers = flags.split or "test", flags.workers or 0
    try:
        flags.device = open_device(flags.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    flags.amp = choose_amp(flags.amp, flags.device)
