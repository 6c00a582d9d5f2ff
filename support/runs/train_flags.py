"""The flags of train.py."""

import os
from argparse import BooleanOptionalAction, Namespace

from support.common import (AMP, Parser, choose_amp, environment, img_size_flag, number,
                            open_device, threshold_flag)


def read_flags(argv: list[str] | None, recipes: dict, archs) -> tuple[Namespace, Parser]:
    """The command line with every default filled in; recipes: each --data's defaults."""
    parser = Parser(prog="train.py", description="Trains LCTR from image labels, then scores it.")
    positive, size, fraction = number(int, 1, 10**9), number(int, 1, 10**6), number(float, 0, 1)
    above_zero, group = number(float, 0, above=True), parser.add_argument_group

    def add(to, flag: str, text: str, **options) -> None:
        name = flag[2:].replace("-", "_")
        values = {data: recipe[name] for data, recipe in recipes.items() if name in recipe}
        if values:  # the same flag's default in each recipe
            parts = [f"{'/'.join(d for d in values if values[d] == value)} {value}"
                     for value in dict.fromkeys(values.values()) if value is not None]
            text += f" (default: {', '.join(parts)})" if parts else ""
        to.add_argument(flag, help=text, **options)

    to = group("data")
    add(to, "--data", "data set, which picks the defaults of all other flags (default: synthetic)",
        choices=recipes, default="synthetic")
    add(to, "--root", "folder of the data set; the synthetic birds need none")
    add(to, "--species", "how many kinds of birds, up to 45: beyond 9 the wing counts as well "
        "as the head", type=number(int, 2, 46))
    add(to, "--limit-train", "keep that many training images, spread evenly", type=positive)
    add(to, "--limit-test", "keep that many test and val images", type=positive)
    add(to, "--workers", "processes that load images (default: 8 on a GPU, 0 on a CPU)",
        type=number(int, 0, 1000))
    add(to, "--cache", "hold the training split decoded on the device: on, off, or auto, where it "
        "takes at most a quarter of the free memory (default: auto)",
        choices=("auto", "on", "off"), default="auto")
    to = group("model")
    add(to, "--arch", "DeiT's sizes: --embed-dim, --depth and --num-heads at once",
        choices=archs)
    add(to, "--img-size", "input in pixels: 224, or height x width as 160x224", type=img_size_flag)
    add(to, "--patch-size", "side of a patch in pixels", type=size)
    add(to, "--embed-dim", "width D of the tokens", type=size)
    add(to, "--depth", "number L of blocks", type=number(int, 1, 1000))
    add(to, "--num-heads", "number S of attention heads", type=size)
    add(to, "--pretrained", "backbone weights: a file, or deit_tiny, deit_small, deit_base")
    add(to, "--head", "cdm is LCTR, conv is TS-CAM, token is plain DeiT",
        choices=("cdm", "conv", "token"))
    add(to, "--num-kernels", "number G of the CDM's kernels, Table 6", type=size)
    add(to, "--kernel-size", "their side k, Table 7", type=int, choices=(1, 3))
    add(to, "--scorer", "which pools of the cues score them, Table 5",
        choices=("separate", "shared", "gap", "gmp"))
    add(to, "--erase", "M~c as it is, or min-max normalised, before it is reversed",
        choices=("raw", "minmax"))
    add(to, "--pool", "padded is the authors' 3 x 3 average before the pool",
        choices=("gap", "padded"))
    add(to, "--drop-path", "stochastic depth's rate in the last block", type=fraction)
    to = group("recipe")
    add(to, "--epochs", "passes over the training images; folder: by their number", type=positive)
    add(to, "--max-steps", "stop the main phase after that many steps", type=positive)
    add(to, "--pretrain-epochs", "epochs with a token head first", type=number(int, 0, 10**9))
    add(to, "--patch-loss", "pretraining also classifies the patch tokens' mean, or each of them",
        choices=("none", "mean", "each"))
    add(to, "--palette-label", "pretrain the birds on their body's palette too (default: yes)",
        action=BooleanOptionalAction, default=True)
    add(to, "--batch-size", "images per step, over all processes", type=positive)
    add(to, "--accumulate", "micro-batches of a batch, for small cards (default: 1)",
        type=positive, default=1)
    add(to, "--lr", "peak learning rate of head and final norm, never rescaled", type=above_zero)
    add(to, "--pretrain-lr", "the same for the pretraining epochs", type=above_zero)
    add(to, "--layer-decay", "each block's rate is the next one's times this, the "
        "embeddings' the first block's", type=above_zero)
    add(to, "--freeze-blocks", "that many first blocks and the embeddings stay as they are; "
        "folder: half of a pretrained backbone's", type=number(int, 0, 1000))
    add(to, "--weight-decay", "on all but biases, norms and embeddings", type=number(float, 0))
    add(to, "--warmup-epochs", "of linear warm-up, at most a tenth of the run",
        type=number(float, 0))
    add(to, "--label-smoothing", "of the cross-entropy", type=fraction)
    add(to, "--clip-grad", "largest norm of the gradient, 0 for any", type=number(float, 0))
    add(to, "--threshold", "of the box: in [0, 1), or auto, the best on val (default: auto where "
        "there is a val split, else 0.2)", type=threshold_flag)
    add(to, "--seed", "of every random choice (default: 0)", type=number(int, 0, 2**63), default=0)
    to = group("run")
    add(to, "--device", "cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    add(to, "--amp", "mixed precision (default: auto, bf16 or fp16 on a GPU, off on a CPU)",
        choices=("auto", *AMP), default="auto")
    add(to, "--compile", "train through torch.compile: auto on one GPU in bf16, without "
        "--accumulate, for 1,000 steps or more; it needs a C++ compiler (default: auto)",
        choices=("auto", "on", "off"), default="auto")
    add(to, "--resume", "continue the run in --out, or from FILE", nargs="?", const=True,
        metavar="FILE")
    to = group("output")
    add(to, "--out", "run folder (default: runs/<data>-<head>-seed<seed>)")
    add(to, "--eval-every", "epochs between evaluations on val (default: 1)", type=positive,
        default=1)
    add(to, "--checkpoint-every", "steps between checkpoints, besides every epoch's", type=positive)
    flags = parser.parse_args(argv)
    fill_in(flags, parser, recipes[flags.data], archs)
    return flags, parser


def fill_in(flags: Namespace, parser: Parser, recipe: dict, archs) -> None:
    """The recipe's values where the command line has none, and what can be checked at once."""
    recipe, frozen = dict(recipe), flags.freeze_blocks
    if flags.arch or recipe["arch"]:
        recipe["arch"] = flags.arch or recipe["arch"]
        recipe |= zip(("embed_dim", "depth", "num_heads"), archs[recipe["arch"]])
    if flags.data != "synthetic" and flags.species:
        parser.error("--species: of the synthetic birds alone")
    for name, value in recipe.items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
    if flags.freeze_blocks is None:  # "folder"
        flags.freeze_blocks = flags.depth // 2 if flags.pretrained else 0
    if frozen is None:
        flags.freeze_blocks = min(flags.freeze_blocks, flags.depth)
    if flags.freeze_blocks > flags.depth:
        parser.error(f"--freeze-blocks: got {frozen}, the model has {flags.depth} blocks")
    if flags.data == "synthetic" and flags.root:
        parser.error("--root: the synthetic birds are drawn, not read: leave it out or give --data")
    if flags.data != "synthetic" and not flags.root:
        parser.error(f"--root: missing, --data {flags.data} needs its folder")
    if flags.batch_size < (parts := environment("WORLD_SIZE", 1) * flags.accumulate):
        parser.error(f"--batch-size: {flags.batch_size} images do not split into {parts} parts")
    try:
        device = open_device(flags.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    flags.device, flags.amp = str(device), choose_amp(flags.amp, device)
    if flags.workers is None:
        in_memory = device.type == "cpu" or flags.data == "synthetic"
        flags.workers = 0 if in_memory else min(8, os.cpu_count() or 1)
    flags.out = flags.out or f"runs/{flags.data}-{flags.head}-seed{flags.seed}"
