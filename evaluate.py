"""Scores localisation and classification, and shows where the boxes are: of a data set, or of your own pictures.

    python evaluate.py --checkpoint runs/X/best.pt                                  # the run's own data set, test split
    python evaluate.py --checkpoint runs/X/best.pt --split val --threshold auto --gt-class
    python evaluate.py --checkpoint runs/tscam/best.pt runs/lctr/best.pt --out both # one table, one gallery (Figure 5)
    python evaluate.py --checkpoint runs/X/best.pt --images a.jpg folder/ --out seen

What every number means, and where the choices are made:

    class       the map is the predicted class's (Eq. 3), unless --gt-class asks for the label's; oracles use the label's
    map         one per coupling of class map, M~c and M^r: lctr.fuse; all couplings are scored from one forward pass
    box         resized to the network's input, stretched to [0, 1], value > threshold, the largest 8-connected component
    IoU         half-open boxes, best over the image's annotated boxes, above 0.5 for a hit
    frame       the whole image squashed to the network's input; --crop SIZE its centre, boxes clipped to it
    threshold   --threshold, the checkpoint's own, or the best on val; never the best on the split that is scored

`oracle` marks what picks its threshold on the scored split itself: the literature's MaxBoxAcc and MaxBoxAccV2.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import data
from lctr import COUPLINGS, LCTR, Localization, fuse, load_checkpoint

THRESHOLDS = [i / 100 for i in range(100)]  # of curves and oracles
DEFAULT_THRESHOLD = 0.2  # CAM's, for a checkpoint that names none
HIT = 0.5  # a box is right where its IoU exceeds this (paper, "Evaluation Metrics")
LABELS = {  # what a coupling is called in the literature, by head
    "cdm": {"none": "CDM's class map", "cls": "CDM", "relation": "LCTR"},
    "conv": {"none": "CAM", "cls": "TS-CAM", "relation": "TS-CAM + RPAM"},
    "token": {},
}
ATTENTION_LABELS = {"cls-only": "class attention alone", "relation-only": "patch relation alone"}


# ---------------------------------------------------------------- boxes


class Components(NamedTuple):
    """Connected components of M maps at T thresholds, those of one map and threshold in order of their first pixel."""

    cell: Tensor  # (R,): map * T + threshold
    pixels: Tensor  # (R,)
    box: Tensor  # (R, 4): half-open xyxy


def connected_components(maps: Tensor, thresholds: Tensor) -> Components:
    """All 8-connected components of `stretched map > threshold`: maps (M, H, W), thresholds (T,) ascending.

    Each map is stretched to [0, 1] first; one that is constant or not finite has no component. A mask is a list of runs,
    pixels side by side in a row, and never exists otherwise: as thresholds nest, a step of the map from 3 to 5 thresholds
    passed starts a run in masks 3 and 4. A run's key is its place in the stack of all masks, each with an empty column and
    row after its own, so that a step of `stride` leads to the next row and touching never crosses masks.
    """
    M, H, W = maps.shape
    T, stride, plane = len(thresholds), W + 1, (H + 1) * (W + 1)
    low, high = maps.amin((1, 2), True), maps.amax((1, 2), True)  # (M, 1, 1)
    stretched = ((maps - low) / (high - low)).nan_to_num(0, 0, 0)
    passed = F.pad(torch.bucketize(stretched, thresholds), (1, 1, 0, 1))  # (M, H+1, W+2): thresholds below the value
    before, after = passed[:, :, :-1].flatten(), passed[:, :, 1:].flatten()  # (M * plane): across each pixel's left edge

    start, end = steps_up(before, after, plane, T), steps_up(after, before, plane, T)  # (n) keys each: run i is [start, end)
    own = torch.arange(len(start), device=maps.device)
    above, touches = first_touching(start, end, -stride)
    root = follow(torch.where(touches, above, own))  # (n): each run climbs to one that has none above
    below, touches = first_touching(start, end, stride)
    a, b = root[own[touches]], root[below[touches]]  # touching runs: with the climb, all that are needed to connect
    while (apart := a != b).any():
        a, b = a[apart], b[apart]
        root = follow(root.scatter_reduce(0, torch.maximum(a, b), torch.minimum(a, b), "amin"))
        a, b = root[a], root[b]

    first = (root == own).nonzero()[:, 0]  # (R): a component's root is its first run
    component = torch.zeros_like(own).scatter_(0, first, torch.arange(len(first), device=maps.device))[root]  # (n)

    def over_runs(values: Tensor, reduce: str) -> Tensor:  # (n) -> (R)
        return values[first].scatter_reduce(0, component, values, reduce, include_self=reduce != "sum")

    row = start // stride % (H + 1)
    left, right = over_runs(start % stride, "amin"), over_runs(end % stride, "amax")
    box = torch.stack([left, row[first], right, over_runs(row, "amax") + 1], 1)
    return Components(start[first] // plane, over_runs(end - start, "sum"), box)


def steps_up(before: Tensor, after: Tensor, plane: int, T: int) -> Tensor:
    """Sorted keys of the steps from `before` to a larger `after`, one for each threshold that the step passes."""
    at = (after > before).nonzero()[:, 0]
    lowest, count = before[at], (after - before)[at]
    total = count.cumsum(0)
    first_key = at + (at // plane * (T - 1) + lowest - total + count) * plane  # less the places in the list before it
    keys = first_key.repeat_interleave(count)
    return (keys + plane * torch.arange(len(keys), device=at.device)).sort().values


def first_touching(start: Tensor, end: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """For each run the first run that touches it, corners included, in the row that lies `step` further; whether one does."""
    other = torch.searchsorted(end, start + step)
    exists = other < len(end)
    other = torch.where(exists, other, 0)
    return other, exists & (start[other] <= end + step)


def follow(parent: Tensor) -> Tensor:
    """Where each chain of parents ends."""
    while not torch.equal(parent, further := parent.index_select(0, parent)):
        parent = further
    return parent


def largest(components: Components, cells: int, height: int, width: int) -> Tensor:
    """The box (cells, 4) of each cell's component of most pixels, the first of equals; the whole image where it has none."""
    n = len(components.cell)
    order = components.pixels * n + torch.arange(n - 1, -1, -1, device=components.cell.device)
    best = order.new_full((cells,), -1).scatter_reduce(0, components.cell, order, "amax")
    found = best >= 0
    boxes = best.new_tensor([0, 0, width, height]).repeat(cells, 1)
    boxes[found] = components.box[n - 1 - best[found] % n] if n else boxes[found]
    return boxes


def map_chunks(maps: Tensor) -> Sequence[Tensor]:
    """Maps in groups whose runs fit a core's cache, or a GPU's memory."""
    return maps.split(max(1, 2 ** (24 if maps.is_cuda else 18) // maps[0].numel())) if len(maps) else []


def largest_boxes(maps: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The box of each map's largest component at each threshold: maps (B, H, W) -> (B, T, 4) int64, half-open xyxy.

    A map is stretched to [0, 1] by its own extremes, then value > threshold, the largest 8-connected component by pixel
    count (of equals the one whose first pixel in row order comes first), its box. A map that is constant or not finite, or
    a threshold that nothing exceeds, gives the whole image. Thresholds in any order. Raises ValueError for other shapes.
    """
    if maps.ndim != 3 or 0 in maps.shape[1:]:
        raise ValueError(f"maps: got shape {tuple(maps.shape)}, need (B, H, W)")
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    ascending, place = torch.tensor(thresholds, dtype=maps.dtype, device=maps.device).unique(return_inverse=True)
    boxes = [largest(connected_components(chunk, ascending), len(chunk) * len(ascending), *maps.shape[1:])
             for chunk in map_chunks(maps)]
    boxes = torch.cat(boxes) if boxes else maps.new_zeros(0, 4).long()  # (B * T, 4)
    return boxes.view(len(maps), len(ascending), 4)[:, place]


# ---------------------------------------------------------------- IoU


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of half-open xyxy boxes: a (..., 4), b (..., 4), broadcast -> (...).

    Widths are x1 - x0, with no pixel added. 0 where the union is empty; a box turned inside out is empty.
    """
    overlap = intersection(a, b)
    union = area(a) + area(b) - overlap
    return torch.where(union > 0, overlap / union, 0)


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Area (...) common to a (..., 4) and b (..., 4)."""
    return area(torch.cat(torch.broadcast_tensors(torch.maximum(a[..., :2], b[..., :2]),
                                                  torch.minimum(a[..., 2:], b[..., 2:])), -1))


def area(box: Tensor) -> Tensor:
    """(..., 4) -> (...) in float64, so that only equal boxes have an IoU of 1."""
    return (box[..., 2:].double() - box[..., :2].double()).clamp_min(0).prod(-1)


def to_input(boxes: Sequence[Tensor], view: Tensor, img_size: tuple[int, int]) -> Tensor:
    """B lists of annotated boxes (M_b, 4) in image pixels -> (B, M, 4) in the input's frame, clipped to it.

    view (B, 4) is the part of each image that the network sees. Lists shorter than the longest (at least 1) are filled up
    with boxes of no area. IoU is the same in both frames: each axis is scaled alone.
    """
    boxes = torch.nn.utils.rnn.pad_sequence([torch.zeros(1, 4), *boxes], batch_first=True)[1:].double()  # (B, M, 4)
    scale, origin = input_frame(view, img_size)
    side = torch.tensor([*img_size[::-1]] * 2, dtype=torch.float64)
    return ((boxes - origin) * scale).clamp_min(0).minimum(side)


def to_image(boxes: Tensor, view: Tensor, img_size: tuple[int, int]) -> Tensor:
    """Boxes (B, M, 4) in the input's frame -> float64 in pixels of the upright image."""
    scale, origin = input_frame(view, img_size)
    return boxes / scale + origin


def input_frame(view: Tensor, img_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    view = view.double()
    scale = torch.tensor([*img_size[::-1]]) / (view[:, 2:] - view[:, :2])  # (B, 2): input pixels per image pixel
    return scale.repeat(1, 2)[:, None], view[:, :2].repeat(1, 2)[:, None]  # (B, 1, 4) each


# ---------------------------------------------------------------- scoring: one forward pass, every coupling


class Scores(NamedTuple):
    """What one pass over n images leaves, in data set order: arrays over Q couplings and T thresholds, and no maps."""

    head: str
    img_size: tuple[int, int]  # (height, width) of the input
    couplings: tuple[str, ...]
    thresholds: list[float]  # ascending: THRESHOLDS and the one asked for
    gt_class: bool  # whose map `box` and `iou` are: the label's, or the predicted class's
    seconds: dict[str, float]  # spent in the forward pass and in boxes and IoU
    images: dict[str, np.ndarray | list]
    # index (n,), label (n,), top5 (n, min(5, C)), path, boxes [(M, 4)] and size (n, 2) as the data set has them, view (n, 4),
    # box (n, Q, T, 4) int16 in the input's frame, iou (n, Q, T) float32,
    # oracle (n, Q, T, 4) bool: the label's map, its largest box's IoU >= 0.5, any component's >= 0.3, 0.5, 0.7,
    # baseline (n, 2) float32: IoU of the whole image and of the centred box of half its area,
    # and, where asked for, class_map (n, h, w), predicted class's or label's, cls_map and relation_map (n, h, w)

    @property
    def annotated(self) -> np.ndarray:
        """(n,): which images have boxes, and so count for localisation."""
        return np.array([len(boxes) > 0 for boxes in self.images["boxes"]])


def head_of(model: LCTR) -> str:
    return "cdm" if hasattr(model, "cdm") else "conv" if hasattr(model, "head") else "token"


def couplings_of(model: LCTR) -> tuple[str, ...]:
    """The couplings that the model has maps for: a "token" head has no class maps."""
    return tuple(c for c in COUPLINGS if head_of(model) != "token" or c in ATTENTION_LABELS)


def default_coupling(model: LCTR) -> str:
    """Eq. 3's, or M^r alone on a "token" head."""
    return "relation" if "relation" in couplings_of(model) else "relation-only"


def coupling_label(head: str, coupling: str) -> str:
    return (LABELS[head] | ATTENTION_LABELS)[coupling]


@torch.no_grad()
def score(
    model: LCTR,
    dataset: torch.utils.data.Dataset,
    *,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    workers: int = 0,
    couplings: Sequence[str] | None = None,
    threshold: float | None = None,
    gt_class: bool = False,
    keep_maps: bool = False,
) -> Scores:
    """Classifies and localises every image of the data set once. Its model must be on `device`.

    couplings: those to score; None for all that the head has, () for classification alone. threshold: one to score besides
    THRESHOLDS. gt_class: `box` and `iou` come from the label's map. keep_maps: the maps on the patch grid stay too.
    Under torch.distributed each process takes its share and all get the whole result, the same for any number of them.
    """
    couplings = couplings_of(model) if couplings is None else tuple(couplings)
    thresholds = sorted({*THRESHOLDS, *([] if threshold is None else [threshold])})
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = list(range(rank, len(dataset), world))
    batches = [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]
    seconds, parts, was_training = {"forward": 0.0, "boxes": 0.0}, [], model.training
    model.eval()
    loaded = iter(data.loader(dataset, batches, workers))
    for indices in progress(batches, f"scoring {getattr(dataset, 'name', 'images')}", show=rank == 0):
        part = score_batch(model, next(loaded), device, couplings, thresholds, gt_class, keep_maps, seconds)
        parts.append(part | {"index": np.array(indices)})
    model.train(was_training)

    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, parts)
        parts = [part for share in gathered for part in share]
    if not parts:
        raise ValueError(f"{getattr(dataset, 'name', 'data set')}: no images to score")
    order = np.concatenate([part["index"] for part in parts]).argsort()
    images = {key: [part[key][i] for part in parts for i in range(len(part[key]))] if isinstance(value, list)
              else np.concatenate([part[key] for part in parts])[order] for key, value in parts[0].items()}
    images = {key: [value[i] for i in order] if isinstance(value, list) else value for key, value in images.items()}
    return Scores(head_of(model), model.img_size, couplings, thresholds, gt_class, seconds, images)


def score_batch(
    model: LCTR, batch: dict, device: str | torch.device, couplings: tuple[str, ...], thresholds: list[float],
    gt_class: bool, keep_maps: bool, seconds: dict[str, float],
) -> dict[str, np.ndarray | list]:
    """The `images` entries of Scores for one batch."""
    images, labels = batch["image"].to(device), batch["label"].to(device)
    started = now(device)
    seen = model.localize(images)  # the predicted class's maps
    wrong = (seen.classes[:, 0] != labels).nonzero()[:, 0]
    told = model.localize(images[wrong], labels[wrong, None])  # the label's, where it is another
    forwarded = now(device)
    truth = to_input(batch["boxes"], batch["view"], model.img_size)  # (B, M, 4)
    part = {"label": labels, "top5": seen.logits.topk(min(5, seen.logits.shape[1])).indices, "size": batch["size"],
            "view": batch["view"], "baseline": baseline_iou(truth, model.img_size)}
    if couplings:
        truth = truth.to(device)
        box, iou, any_iou = score_maps(stack_couplings(seen, couplings), truth, model.img_size, thresholds)
        oracle_box, oracle_iou, oracle_any = box.clone(), iou.clone(), any_iou.clone()
        if len(wrong) and (by_class := [c for c in couplings if c not in ATTENTION_LABELS]):
            at = wrong[:, None], torch.tensor([couplings.index(c) for c in by_class], device=wrong.device)
            oracle_box[at], oracle_iou[at], oracle_any[at] = score_maps(
                stack_couplings(told, by_class), truth[wrong], model.img_size, thresholds)
        part["oracle"] = torch.stack([oracle_iou >= 0.5, *(oracle_any >= bar for bar in (0.3, 0.5, 0.7))], -1)
        part["box"], part["iou"] = (oracle_box, oracle_iou) if gt_class else (box, iou)
    if keep_maps:
        part |= {"cls_map": seen.cls_map, "relation_map": seen.relation_map}
        if seen.class_maps is not None:
            part["class_map"] = seen.class_maps[:, 0].clone()
            if gt_class:
                part["class_map"][wrong] = told.class_maps[:, 0]
    part = {key: value.cpu().numpy() for key, value in part.items()} | {"path": batch["path"], "boxes": batch["boxes"]}
    seconds["forward"] += forwarded - started
    seconds["boxes"] += now(device) - forwarded
    return part


def now(device: str | torch.device) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def stack_couplings(localization: Localization, couplings: Sequence[str]) -> Tensor:
    """The first class's fused map under each coupling: (B, Q, h, w)."""
    return torch.stack([fuse(localization, coupling)[:, 0] for coupling in couplings], 1)


def enlarge(maps: Tensor, img_size: tuple[int, int]) -> Tensor:
    """Maps on the patch grid (B, Q, h, w), bilinear to the input's size (B, Q, H, W)."""
    return F.interpolate(maps.float(), img_size, mode="bilinear", align_corners=False)


def score_maps(
    maps: Tensor, truth: Tensor, img_size: tuple[int, int], thresholds: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Fused maps (B, Q, h, w) against annotated boxes (B, M, 4) in the input's frame, at ascending thresholds.

    Returns the largest component's box (B, Q, T, 4) int16, its IoU (B, Q, T) float32, and the best IoU of any component's
    box; each IoU is the best over the image's annotated boxes. A map without a component counts as the whole image.
    """
    (B, Q), T = maps.shape[:2], len(thresholds)
    maps = enlarge(maps, img_size).flatten(0, 1)  # (B*Q, H, W)
    truth = truth.repeat_interleave(Q, 0)  # (B*Q, M, 4)
    ascending = torch.tensor(thresholds, device=maps.device)
    found = []
    for chunk, chunk_truth in zip(map_chunks(maps), truth.split(len(map_chunks(maps)[0]))):
        components = connected_components(chunk, ascending)
        box = largest(components, len(chunk) * T, *img_size)  # (chunk * T, 4)
        iou = box_iou(box.view(-1, T, 1, 4), chunk_truth[:, None]).amax(-1).flatten()  # (chunk * T)
        component_iou = box_iou(components.box[:, None], chunk_truth[components.cell // T]).amax(-1)  # (R)
        found.append((box, iou, iou.scatter_reduce(0, components.cell, component_iou, "amax")))
    box, iou, any_iou = (torch.cat(column) for column in zip(*found))
    return box.view(B, Q, T, 4).short(), iou.view(B, Q, T).float(), any_iou.view(B, Q, T).float()


def baseline_iou(truth: Tensor, img_size: tuple[int, int]) -> Tensor:
    """truth (B, M, 4) -> (B, 2): IoU of two boxes that ignore the image, all of it and the centred one of half its area."""
    height, width = img_size
    low, high = (1 - math.sqrt(0.5)) / 2, (1 + math.sqrt(0.5)) / 2
    boxes = torch.tensor([[0, 0, 1, 1], [low, low, high, high]]) * torch.tensor([width, height] * 2)  # (2, 4)
    return box_iou(boxes[:, None], truth[:, None]).amax(-1).float()


# ---------------------------------------------------------------- metrics


FAILURES = ("wrong class", "one of several", "part of the object", "too much", "elsewhere")


def failure_kinds(scores: Scores, coupling: str, threshold: float) -> np.ndarray:
    """Why Top-1 localisation fails, by image: (n,) indices into FAILURES, -1 where it is right or the image has no boxes.

    The first that applies, so that the kinds' shares add up to 100 - top1_loc (those of TS-CAM's analysis):
      wrong class          the label is not the predicted class, whatever the box
      one of several       the box covers more than 30 % of each of two or more annotated boxes: it tells no object apart
      part of the object   more than half of the box lies in the annotated box that it meets best (by IoU)
      too much             the box covers more than 70 % of that annotated box
      elsewhere            all others
    """
    at = scores.couplings.index(coupling), threshold_index(scores, threshold)
    images = scores.images
    truth = to_input(images["boxes"], torch.from_numpy(images["view"]), scores.img_size)  # (n, M, 4)
    box = torch.from_numpy(images["box"][:, *at])[:, None].double()  # (n, 1, 4)
    overlap, best = intersection(box, truth), box_iou(box, truth).argmax(1, keepdim=True)  # (n, M), (n, 1)
    several = (overlap > 0.3 * area(truth)).sum(1) > 1
    in_box = overlap.gather(1, best)[:, 0]
    part, much = in_box > 0.5 * area(box)[:, 0], in_box > 0.7 * area(truth).gather(1, best)[:, 0]
    kinds = np.select([several, part, much], [1, 2, 3], 4)
    kinds = np.where(images["iou"][:, *at] > HIT, -1, kinds)
    kinds = np.where(images["top5"][:, 0] != images["label"], 0, kinds)
    return np.where(scores.annotated, kinds, -1)


def threshold_index(scores: Scores, threshold: float) -> int:
    if threshold not in scores.thresholds:
        raise ValueError(f"threshold: {threshold} was not scored: give it to score()")
    return scores.thresholds.index(threshold)


def summarise(scores: Scores, threshold: float) -> dict:
    """All metrics of a pass at one threshold, as metrics.json has them: percent, unrounded; mean_iou in [0, 1].

    top1_cls, top5_cls: the label is the predicted class, or among the five likeliest; over all n images. All others are over
    the n_boxes images with annotated boxes, None where there are none:
    gt_known: IoU > 0.5. top1_loc, top5_loc: gt_known and top1_cls, top5_cls (the paper's rule: one box per image, while
      TS-CAM's code gives each of the five classes a box of its own). mean_iou of that box. gt_known_curve: at each threshold.
    best_threshold: where gt_known_curve peaks: an oracle, shown beside the threshold in use.
    max_box_acc: IoU >= 0.5 of the label's map's largest component, at the best threshold, found after averaging over images.
    max_box_acc_v2: the same for any component, best threshold for each of IoU >= 0.3, 0.5, 0.7, then averaged. Oracles both.
    failures: the share of each of FAILURES. baselines: gt_known of two fixed boxes.
    """
    images, has = scores.images, scores.annotated
    correct = images["top5"] == images["label"][:, None]  # (n, 5)
    top1, top5 = correct[:, 0], correct.any(1)
    t, curve = threshold_index(scores, threshold), [scores.thresholds.index(value) for value in THRESHOLDS]
    metrics = {
        "n": len(has), "n_boxes": int(has.sum()), "head": scores.head, "threshold": threshold,
        "map_class": "label" if scores.gt_class else "predicted", "top1_cls": percent(top1), "top5_cls": percent(top5),
        "thresholds": THRESHOLDS, "couplings": {},
        "baselines": {"whole_image": percent(images["baseline"][has, 0] > HIT),
                      "centred_box": percent(images["baseline"][has, 1] > HIT)},
    }
    for q, coupling in enumerate(scores.couplings):
        iou = images["iou"][has, q]  # (n_boxes, T)
        hit = iou > HIT
        known = [percent(column) for column in hit[:, curve].T]
        oracle = images["oracle"][has, q][:, curve].mean(0) * 100 if has.any() else None  # (100, 4)
        kinds = failure_kinds(scores, coupling, threshold)[has]
        metrics["couplings"][coupling] = {
            "label": coupling_label(scores.head, coupling),
            "top1_loc": percent(hit[:, t] & top1[has]),
            "top5_loc": percent(hit[:, t] & top5[has]),
            "gt_known": percent(hit[:, t]),
            "mean_iou": float(iou[:, t].mean(dtype=np.float64)) if has.any() else None,
            "gt_known_curve": known,
            "max_box_acc": float(oracle[:, 0].max()) if has.any() else None,
            "max_box_acc_v2": float(oracle[:, 1:].max(0).mean()) if has.any() else None,
            "best_threshold": THRESHOLDS[int(np.argmax(known))] if has.any() else None,
            "failures": {name: percent(kinds == kind) for kind, name in enumerate(FAILURES)},
        }
    return metrics


def percent(hits: np.ndarray) -> float | None:
    return 100 * float(hits.mean()) if len(hits) else None


def best_threshold(scores: Scores, coupling: str) -> float:
    """The first of THRESHOLDS at which most images are localised (gt_known): for choosing on val, never on the test split."""
    if not scores.annotated.any():
        raise ValueError("threshold: auto needs annotated boxes, the images have none")
    return summarise(scores, THRESHOLDS[0])["couplings"][coupling]["best_threshold"]


def format_table(metrics: dict | Sequence[dict], chosen: str | None = None) -> str:
    """The metrics of one pass, or of several over the same images, as text to print."""
    several = [metrics] if isinstance(metrics, dict) else list(metrics)
    one = several[0]
    names = [m.get("name", "") for m in several]
    width = max(len(row["label"]) for m in several for row in m["couplings"].values()) if one["couplings"] else 0
    width = max(width, len("centred box of half the area")) + 2
    left = max(map(len, names)) + 2 if any(names) else 0

    def cells(*values: float | None, digits: int = 2) -> str:
        return "".join(f"{'-' if v is None else f'{v:.{digits}f}':>11}" for v in values)

    lines = [f"{one['n']} images" + (f", {one['n_boxes']} of them with boxes" if one["n_boxes"] < one["n"] else "")]
    for name, m in zip(names, several):
        lines.append(f"{name:{left}}top-1 classification {m['top1_cls']:.2f} %, top-5 {m['top5_cls']:.2f} %; "
                     f"boxes at threshold {m['threshold']:g}{m.get('threshold_from', '')}")
    whose = "the predicted class's map" if one["map_class"] == "predicted" else "the LABEL's map (--gt-class)"
    lines += ["", f"Localisation in %: box of the largest component of {whose}, IoU > 0.5; mean IoU of that box.",
              "Oracles: the label's map, the best threshold of these very images; best-thr is gt-known's.", "",
              f"{'':{left}}{'map':{width}}" + "".join(f"{title:>11}" for title in (
                  "top-1 loc", "top-5 loc", "gt-known", "mean IoU")) + f"{'| oracles:':>12}" + "".join(
                      f"{title:>11}" for title in ("MaxBoxAcc", "V2", "best-thr"))]
    for name, m in zip(names, several):
        for coupling, row in m["couplings"].items():
            lines.append(
                f"{name:{left}}{row['label']:{width}}" + cells(row["top1_loc"], row["top5_loc"], row["gt_known"])
                + cells(row["mean_iou"], digits=3) + f"{'|':>3}{'':9}" + cells(row["max_box_acc"], row["max_box_acc_v2"])
                + cells(row["best_threshold"]) + ("  *" if coupling == m.get("coupling", chosen) else ""))
    for name, key in (("whole image", "whole_image"), ("centred box of half the area", "centred_box")):
        lines.append(f"{'':{left}}{name:{width}}{'':22}" + cells(one["baselines"][key]))
    lines += ["", "Why top-1 localisation fails, in % of images:",
              f"{'':{left}}{'map':{width}}" + "".join(f"{kind:>20}" for kind in FAILURES)]
    for name, m in zip(names, several):
        for row in m["couplings"].values():
            lines.append(f"{name:{left}}{row['label']:{width}}" + "".join(
                f"{'-' if share is None else f'{share:.2f}':>20}" for share in row["failures"].values()))
    return "\n".join(lines)


# ---------------------------------------------------------------- files and progress


def write_atomic(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """write(file) fills a temporary file beside `path`, which takes its name once whole and on disk; else it stays as it was."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~current_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))


def write_png(path: str | Path, picture: Image.Image) -> None:
    write_atomic(path, lambda file: picture.save(file, "PNG", optimize=True))


def progress(items: Sequence | Iterable, label: str, show: bool = True) -> Iterator:
    """Passes items through and tells on standard error how far it is: on a terminal in one line that overwrites itself, with
    rate and time left; elsewhere in a plain line every 30 s, so that what is short says nothing."""
    total, started = len(items), time.monotonic()
    terminal = sys.stderr.isatty()
    told = started
    for done, item in enumerate(items, 1):
        yield item
        moment = time.monotonic()
        if not show or moment - told < (0.1 if terminal else 30) and not (terminal and done == total):
            continue
        told = moment
        rate = done / max(moment - started, 1e-9)
        left = f"{(total - done) / rate:.0f} s left" if done < total else f"{moment - started:.0f} s"
        text = f"{label}: {done}/{total}, {rate:.3g}/s, {left}"
        end = "" if terminal and done < total else "\n"
        print(f"\r\033[K{text}" if terminal else text, end=end, file=sys.stderr, flush=True)
