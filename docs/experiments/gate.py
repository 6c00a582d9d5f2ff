"""What the CDM's scores do: heads alone, on a frozen backbone.

    python docs/experiments/gate.py --root PHOTOS --pretrained vit_s14.pth [--json FILE]

PHOTOS has CUB's layout. The backbone's tokens and maps are computed once; then each head trains
on them for 240 steps of 32 images with train.py's optimizer and schedule, with three seeds.
"standardised" is a CDM whose score layers read pools with the batch's mean and variance taken out
of each channel, and learn at the head's full rate: they see nothing but what images differ in.
docs/results/gate.json holds such a run, 20 minutes on a CPU core.
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data
import evaluate
import train
from lctr import LCTR, Localization, fuse, mean_over_blocks
from record import about
from support.boxes import to_input
from support.common import progress, write_json
from support.weights import read_weights

RATE, SEEDS, STEPS, BATCH = 1e-3, (0, 1, 2), 240, 32
THRESHOLD = 0.1  # TS-CAM's on CUB
COUPLINGS = ("none", "cls", "relation")


@torch.no_grad()
def read(model: LCTR, dataset) -> dict:
    """Tokens (n, N+1, D), both attention maps (n, h, w), labels (n,) and boxes of a data set."""
    batches = [list(range(i, min(i + BATCH, len(dataset)))) for i in range(0, len(dataset), BATCH)]
    parts = []
    for batch in progress(list(data.loader(dataset, batches, 0)), "backbone"):
        tokens, maps = model.forward_features(data.normalise(batch["image"]), "relation")
        parts.append({
            "tokens": tokens, "label": batch["label"],
            "cls_map": model.on_grid(mean_over_blocks(maps, "cls")[:, 1:]),
            "relation_map": model.on_grid(mean_over_blocks(maps, "relation")),
            "boxes": to_input(batch["boxes"], batch["view"], model.img_size)[:, :1]})
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def standardise(model: LCTR) -> None:
    """Puts a batch norm without parameters in front of each of the CDM's score layers."""
    cdm = model.cdm
    for name in ("score_avg", "score_max"):
        layer = getattr(cdm, name)
        norm = nn.BatchNorm1d(layer.in_features, affine=False)
        setattr(cdm, name, nn.Sequential(norm, layer))


def fit(model: LCTR, images: dict, seed: int, gate_rate: float) -> dict:
    """Trains the head; its loss over the last ten steps and the range of its mean score."""
    optimizer = train.adamw(model, train.PAPER["weight_decay"], 1.0, len(model.blocks))
    for group in optimizer.param_groups:
        if group["scale"] == train.GATE_RATE:
            group["scale"] = gate_rate
    count = len(images["label"])
    batches = itertools.chain.from_iterable(
        train.epoch_batches(count, min(BATCH, count), seed, epoch) for epoch in itertools.count())
    losses, means = [], []
    model.train()
    for step, batch in zip(range(STEPS), batches):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, STEPS, STEPS / 10, RATE) * group["scale"]
        logits, scores = model.classify(images["tokens"][batch], images["cls_map"][batch])
        loss = F.cross_entropy(logits, images["label"][batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        means.append(scores.mean().item())
    return {"loss": float(np.mean(losses[-10:])), "score_mean": [min(means), max(means)]}


@torch.no_grad()
def test(model: LCTR, images: dict, mean_scores: bool = False) -> dict:
    """Accuracy and boxes in percent; mean_scores: each image's scores replaced by their mean."""
    features = model.on_grid(images["tokens"][:, 1:])
    logits, scores = model.eval().classify(images["tokens"], images["cls_map"])
    found = {"score_std": scores.std(0).mean().item()}
    if mean_scores:
        scores = scores.mean(0, keepdim=True).expand_as(scores).contiguous()
        logits = model.conv_head.logits(features, scores)
    classes = logits.argmax(1, keepdim=True)
    maps = model.class_maps(images["tokens"], scores, classes)
    localization = Localization(logits, classes, maps, images["cls_map"], images["relation_map"])
    found["top1_cls"] = percent(classes[:, 0] == images["label"])
    for coupling in COUPLINGS:
        big = evaluate.enlarge(fuse(localization, coupling)[:, 0][None], model.img_size)[0]
        box = evaluate.largest_boxes(big, [THRESHOLD])  # (n, 1, 4)
        found[coupling] = percent(evaluate.box_iou(box, images["boxes"])[:, 0] > evaluate.HIT)
    return found


def percent(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="photographs in CUB's layout")
    parser.add_argument("--pretrained", required=True, help="a file of a ViT's weights")
    parser.add_argument("--img-size", type=int, default=196)
    parser.add_argument("--json", metavar="FILE", help="where the rows go")
    flags = parser.parse_args()
    try:
        sets = [data.load_dataset("cub", flags.root, split, flags.img_size, augment=False)
                for split in ("train", "test")]
        content = read_weights(flags.pretrained)
        backbone, found = evaluate.backbone(flags.pretrained, content, flags.img_size)
    except (OSError, ValueError) as error:
        sys.exit(f"gate.py: error: {error}")
    train_images, test_images = (read(backbone, dataset) for dataset in sets)
    rows = []
    for seed, head in itertools.product(SEEDS, ("conv", "cdm", "standardised")):
        torch.manual_seed(seed)
        kind = "conv" if head == "conv" else "cdm"
        model = LCTR(len(sets[0].classes), **found["config"] | {"head": kind})
        gate_rate = train.GATE_RATE
        if head == "standardised":
            standardise(model)
            gate_rate = 1.0
        row = {"seed": seed, "head": head, **fit(model, train_images, seed, gate_rate),
               "test": test(model, test_images)}
        if kind == "cdm":
            row["test_with_mean_scores"] = test(model, test_images, mean_scores=True)
        rows.append(row)
        print(row, flush=True)
    if flags.json:
        made = about("docs/experiments/gate.py", sys.argv[1:], gpu=False)
        write_json(flags.json, made | {"rows": rows})


if __name__ == "__main__":
    main()
