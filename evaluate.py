"""Scores localisation and classification, and shows where the boxes are: of a data set, or of your own pictures.

    python evaluate.py --checkpoint runs/X/best.pt                                  # the run's own data set, test split
    python evaluate.py --checkpoint runs/X/best.pt --split val --threshold auto --gt-class
    python evaluate.py --checkpoint runs/tscam/best.pt runs/lctr/best.pt --out both # one table, one gallery (Figure 5)
    python evaluate.py --checkpoint runs/X/best.pt --images a.jpg folder/ --out seen

What every number means, and where the choices are made:

    class       the map is the predicted class's (Eq. 3), or with --gt-class the label's; oracles use the label's
    map         one per coupling of class map, M~c and M^r: lctr.fuse; all couplings are scored from one forward pass
    box         resized to the input's size, stretched to [0, 1], value > threshold, the largest 8-connected component
    IoU         half-open boxes, best over the image's annotated boxes, above 0.5 for a hit
    frame       the whole image squashed to the network's input; --crop SIZE its centre, boxes clipped to it
    threshold   --threshold, the checkpoint's own, or the best on val; never the best on the split that is scored

`oracle` marks what picks its threshold on the scored split itself: the literature's MaxBoxAcc and MaxBoxAccV2.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
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

    Each map is stretched to [0, 1] first; one that is constant or not finite has no component. A mask is a list of
    runs, pixels side by side in a row, and never exists otherwise: as thresholds nest, a step of the map from 3 to 5
    thresholds passed starts a run in masks 3 and 4. A run's key is its place in the stack of all masks, each with an
    empty column and row after its own, so that a step of `stride` leads to the next row and touching never crosses
    masks.
    """
    M, H, W = maps.shape
    T, stride, plane = len(thresholds), W + 1, (H + 1) * (W + 1)
    low, high = maps.amin((1, 2), True), maps.amax((1, 2), True)  # (M, 1, 1)
    stretched = ((maps - low) / (high - low)).nan_to_num(0, 0, 0)
    passed = F.pad(torch.bucketize(stretched.contiguous(), thresholds), (1, 1, 0, 1))  # (M, H+1, W+2)
    before, after = passed[:, :, :-1].flatten(), passed[:, :, 1:].flatten()  # (M * plane): left and right of an edge

    start, end = steps_up(before, after, plane, T), steps_up(after, before, plane, T)  # (n) keys each, half-open runs
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
    """For each run the first that touches it, corners included, in the row `step` further, and whether there is one."""
    other = torch.searchsorted(end, start + step)
    exists = other < len(end)
    other = torch.where(exists, other, 0)
    return other, exists & (start.index_select(0, other) <= end + step)


def follow(parent: Tensor) -> Tensor:
    """Where each chain of parents ends."""
    while not torch.equal(parent, further := parent.index_select(0, parent)):
        parent = further
    return parent


def largest(components: Components, cells: int, height: int, width: int) -> Tensor:
    """Each cell's box (cells, 4): its component of most pixels, the first of equals; the whole image if it has none."""
    n = len(components.cell)
    order = components.pixels * n + torch.arange(n - 1, -1, -1, device=components.cell.device)
    best = order.new_full((cells,), -1).scatter_reduce(0, components.cell, order, "amax")
    found = best >= 0
    boxes = best.new_tensor([0, 0, width, height]).repeat(cells, 1)
    boxes[found] = components.box[n - 1 - best[found] % max(n, 1)]
    return boxes


@contextlib.contextmanager
def one_thread():
    """For hundreds of small operations: to share each among threads costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def map_chunks(maps: Tensor) -> Sequence[Tensor]:
    """Maps in groups whose runs fit a core's cache, or a GPU's memory."""
    return maps.split(max(1, 2 ** (24 if maps.is_cuda else 18) // maps[0].numel())) if len(maps) else []


@one_thread()
def largest_boxes(maps: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The box of each map's largest component at each threshold: maps (B, H, W) -> (B, T, 4) int64, half-open xyxy.

    A map is stretched to [0, 1] by its own extremes, then value > threshold, the largest 8-connected component by pixel
    count (of equals the one whose first pixel in row order comes first), its box. A map that is constant or not finite,
    or a threshold that nothing exceeds, gives the whole image. Thresholds in any order. Raises ValueError for other
    shapes.
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

    view (B, 4) is the part of each image that the network sees. Lists shorter than the longest (at least 1) are filled
    up with boxes of no area. IoU is the same in both frames: each axis is scaled alone.
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
    # index (n,), label (n,), top5 (n, min(5, C)); path, boxes [(M, 4)], size (n, 2), view (n, 4) as the data set has
    # them; box (n, Q, T, 4) int16 in the input's frame, iou (n, Q, T) float32;
    # oracle (n, Q, T, 4) bool: the label's map, its largest box's IoU >= 0.5, any component's >= 0.3, 0.5, 0.7;
    # baseline (n, 2) float32: IoU of the whole image and of the centred box of half its area;
    # where asked for, class_map (n, h, w), the predicted class's or the label's, cls_map and relation_map (n, h, w)

    @property
    def annotated(self) -> np.ndarray:
        """(n,): which images have boxes, and so count for localisation."""
        return np.array([len(boxes) > 0 for boxes in self.images["boxes"]])


def couplings_of(model: LCTR) -> tuple[str, ...]:
    """The couplings that the model has maps for: a "token" head has no class maps."""
    return tuple(c for c in COUPLINGS if model.head_type != "token" or c in ATTENTION_LABELS)


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

    couplings: those to score; None for all that the head has, () for classification alone. threshold: one to score
    besides THRESHOLDS. gt_class: `box` and `iou` come from the label's map. keep_maps: the maps on the patch grid stay
    too. Under torch.distributed each process takes its share and all get the whole result, the same for any number of
    them.
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
    return Scores(model.head_type, model.img_size, couplings, thresholds, gt_class, seconds, images)


def score_batch(
    model: LCTR, batch: dict, device: str | torch.device, couplings: tuple[str, ...], thresholds: list[float],
    gt_class: bool, keep_maps: bool, seconds: dict[str, float],
) -> dict[str, np.ndarray | list]:
    """The `images` entries of Scores for one batch."""
    images, labels = batch["image"].to(device), batch["label"].to(device)
    started = now(device)
    classes = torch.stack([torch.full_like(labels, -1), labels], 1)  # (B, 2): the predicted one, the label
    localization = model.localize(images, classes)
    forwarded = now(device)
    truth = to_input(batch["boxes"], batch["view"], model.img_size)  # (B, M, 4)
    part = {"label": labels, "top5": localization.logits.topk(min(5, localization.logits.shape[1])).indices,
            "size": batch["size"], "view": batch["view"], "baseline": baseline_iou(truth, model.img_size)}
    if couplings:
        truth = truth.to(device).repeat_interleave(len(couplings), 0)  # (B*Q, M, 4)
        maps, label_maps = stack_couplings(localization, couplings).flatten(0, 1).unbind(1)  # (B*Q, h, w) each
        found = score_maps(maps, truth, model.img_size, thresholds)
        told, other = [values.clone() for values in found], (maps != label_maps).flatten(1).any(1)
        if other.any():  # the label is another class than the predicted one, and the coupling looks at the class
            for values, others in zip(told, score_maps(label_maps[other], truth[other], model.img_size, thresholds)):
                values[other] = others
        found, told = ([values.unflatten(0, (-1, len(couplings))) for values in three] for three in (found, told))
        (box, iou, _), (_, told_iou, told_any) = told if gt_class else found, told
        oracle = torch.stack([told_iou >= 0.5, *(told_any >= bar for bar in (0.3, 0.5, 0.7))], -1)  # (B, Q, T, 4)
        part |= {"box": box, "iou": iou, "oracle": oracle}
    if keep_maps:
        part |= {"cls_map": localization.cls_map, "relation_map": localization.relation_map}
        if localization.class_maps is not None:
            part["class_map"] = localization.class_maps[:, int(gt_class)]
    part = {key: value.cpu().numpy() for key, value in part.items()} | {"path": batch["path"], "boxes": batch["boxes"]}
    seconds["forward"] += forwarded - started
    seconds["boxes"] += now(device) - forwarded
    return part


def now(device: str | torch.device) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def stack_couplings(localization: Localization, couplings: Sequence[str]) -> Tensor:
    """The fused maps of K classes under each of Q couplings: (B, Q, K, h, w)."""
    return torch.stack([fuse(localization, coupling) for coupling in couplings], 1)


def enlarge(maps: Tensor, img_size: tuple[int, int]) -> Tensor:
    """Maps on the patch grid (B, Q, h, w), bilinear to the input's size (B, Q, H, W)."""
    return F.interpolate(maps.float(), img_size, mode="bilinear", align_corners=False)


@one_thread()
def score_maps(
    maps: Tensor, truth: Tensor, img_size: tuple[int, int], thresholds: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Fused maps (M, h, w), each against its image's annotated boxes (M, K, 4) in the input's frame.

    Returns the largest component's box (M, T, 4) int16, its IoU (M, T) float32, and the best IoU of any component's
    box; each IoU is the best over the image's annotated boxes. A map without a component counts as the whole image.
    """
    M, T, found = len(maps), len(thresholds), []
    ascending = torch.tensor(thresholds, device=maps.device)
    chunks = map_chunks(enlarge(maps[None], img_size)[0])  # of (M, H, W)
    for chunk, chunk_truth in zip(chunks, truth.split(len(chunks[0]))):
        components = connected_components(chunk, ascending)
        box = largest(components, len(chunk) * T, *img_size)  # (chunk * T, 4)
        iou = box_iou(box.view(-1, T, 1, 4), chunk_truth[:, None]).amax(-1).flatten()  # (chunk * T)
        component_iou = box_iou(components.box[:, None], chunk_truth[components.cell // T]).amax(-1)  # (R)
        found.append((box, iou, iou.scatter_reduce(0, components.cell, component_iou, "amax")))
    box, iou, any_iou = (torch.cat(column) for column in zip(*found))
    return box.view(M, T, 4).short(), iou.view(M, T).float(), any_iou.view(M, T).float()


def baseline_iou(truth: Tensor, img_size: tuple[int, int]) -> Tensor:
    """truth (B, M, 4) -> (B, 2): IoU of two boxes that ignore the image: all of it, and its centred half by area."""
    height, width = img_size
    low, high = (1 - math.sqrt(0.5)) / 2, (1 + math.sqrt(0.5)) / 2
    boxes = torch.tensor([[0, 0, 1, 1], [low, low, high, high]]) * torch.tensor([width, height] * 2)  # (2, 4)
    return box_iou(boxes[:, None], truth[:, None]).amax(-1).float()


# ---------------------------------------------------------------- metrics


FAILURES = ("wrong class", "one of several", "part of the object", "too much", "elsewhere")


def failure_kinds(scores: Scores, coupling: str, threshold: float) -> np.ndarray:
    """Why Top-1 localisation fails, by image: (n,) indices into FAILURES, -1 where right or without boxes.

    The first that applies, so that the kinds' shares add up to 100 - top1_loc (those of TS-CAM's analysis):
      wrong class          the label is not the predicted class, whatever the box
      one of several       the box covers more than 30 % of each of two or more annotated boxes
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

    top1_cls, top5_cls: the label is the predicted class, or among the five likeliest; over all n images. All others are
    over the n_boxes images with annotated boxes, None where there are none:
    gt_known: IoU > 0.5. top1_loc, top5_loc: gt_known and top1_cls, top5_cls (the paper's rule: one box per image, while
      TS-CAM's code gives each of the five classes a box of its own). mean_iou of that box. gt_known_curve: at each
      threshold.
    best_threshold: where gt_known_curve peaks: an oracle, shown beside the threshold in use.
    max_box_acc: IoU >= 0.5 of the label's map's largest component, at the best threshold, found after averaging over
    images.
    max_box_acc_v2: the same for any component, best threshold for each of IoU >= 0.3, 0.5, 0.7, then averaged. Oracles
    both.
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
    """The first of THRESHOLDS with the highest gt_known: to choose on val, never on the test split."""
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
                     f"boxes at threshold {m['threshold']:g}"
                     + (f" ({m['threshold_from']})" if "threshold_from" in m else ""))
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
                + cells(row["mean_iou"], digits=3) + f"{'|':>3}{'':9}"
                + cells(row["max_box_acc"], row["max_box_acc_v2"], row["best_threshold"])
                + ("  *" if coupling == m.get("coupling", chosen) else ""))
    for name, key in (("whole image", "whole_image"), ("centred box of half the area", "centred_box")):
        lines.append(f"{'':{left}}{name:{width}}{'':22}" + cells(one["baselines"][key]))
    lines += ["", "Why top-1 localisation fails, in % of images:",
              f"{'':{left}}{'map':{width}}" + "".join(f"{kind:>{len(kind) + 2}}" for kind in FAILURES)]
    for name, m in zip(names, several):
        for row in m["couplings"].values():
            lines.append(f"{name:{left}}{row['label']:{width}}" + "".join(
                f"{'-' if share is None else f'{share:.2f}':>{len(kind) + 2}}"
                for kind, share in row["failures"].items()))
    return "\n".join(lines)


# ---------------------------------------------------------------- files and progress


def write_atomic(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """write(file) fills a temporary file beside `path`, renamed once it is on disk; else `path` stays as it was."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))


def write_png(path: str | Path, picture: Image.Image) -> None:
    write_atomic(path, lambda file: picture.save(file, "PNG"))


def progress(items: Sequence, label: str, show: bool = True) -> Iterator:
    """Passes items through and tells on standard error how far it is: on a terminal in one line that overwrites itself,
    with rate and time left; elsewhere in a plain line every 30 s, so that what is short says nothing."""
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


# ---------------------------------------------------------------- pictures

CELL = 176  # pixels of a panel's longer side
MARGIN = 8
INK, PAPER, GREY, GRID = (32, 33, 36), (255, 255, 255), (110, 112, 118), (226, 227, 230)
RED, GREEN = (255, 45, 55), (60, 235, 90)
HEAT = np.array([(8, 10, 56), (44, 40, 140), (116, 52, 178), (196, 72, 160), (244, 124, 104), (254, 190, 92),
                 (253, 250, 178)])
LINES = {"none": (140, 140, 146), "cls": (230, 140, 0), "relation": (0, 100, 200), "cls-only": (0, 150, 110),
         "relation-only": (190, 80, 160)}  # told apart without red and green


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def heat_colours(values: np.ndarray) -> np.ndarray:
    """[0, 1] (...) -> uint8 (..., 3), dark blue to pale yellow, evenly in lightness."""
    place = np.clip(values, 0, 1)[..., None] * (len(HEAT) - 1)
    low = np.minimum(place.astype(int), len(HEAT) - 2)
    low_colour, high_colour = HEAT[low[..., 0]], HEAT[low[..., 0] + 1]
    return (low_colour + (high_colour - low_colour) * (place - low)).round().astype(np.uint8)


def stretch(maps: Tensor) -> Tensor:
    """Each map (..., H, W) to [0, 1]; a constant one to 0."""
    low, high = maps.amin((-2, -1), True), maps.amax((-2, -1), True)
    return ((maps - low) / (high - low)).nan_to_num(0, 0, 0)


def overlay(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """A map (H, W) in [0, 1] in colours over the picture, the more opaque the higher."""
    colours = Image.fromarray(heat_colours(heat)).resize(picture.size, Image.Resampling.BILINEAR)
    opacity = Image.fromarray((255 * (0.45 + 0.3 * np.clip(heat, 0, 1))).astype(np.uint8)).resize(picture.size)
    return Image.composite(colours, Image.blend(picture, picture.convert("L").convert("RGB"), 0.5), opacity)


def draw_box(draw: ImageDraw.ImageDraw, box: Iterable[float], colour: tuple[int, int, int], width: int) -> None:
    """A half-open box, drawn on its inside with a dark seam."""
    x0, y0, x1, y1 = (round(float(v)) for v in box)
    if x1 - x0 > 2 * width and y1 - y0 > 2 * width:
        draw.rectangle((x0 - 1, y0 - 1, x1, y1), outline=INK)
        draw.rectangle((x0 + width, y0 + width, x1 - 1 - width, y1 - 1 - width), outline=INK)
    draw.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=colour, width=width)


def fit_text(text: str, size: int, width: float) -> str:
    """The text, shortened where it is wider than `width` pixels."""
    if font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def panel_size(view: Tensor) -> tuple[int, int]:
    """(width, height) at which the part of an image that the network sees fills a cell."""
    width, height = (float(view[2] - view[0]), float(view[3] - view[1]))
    return tuple(max(1, round(CELL * side / max(width, height))) for side in (width, height))


class Seen(NamedTuple):
    """A few images with what one model sees in them; boxes in the input's frame."""

    picture: np.ndarray  # (n, H, W, 3) uint8
    view: Tensor  # (n, 4)
    label: list[int]
    predicted: list[int]
    truth: list[Tensor]  # (M, 4)
    heat: Tensor  # (n, Q, H, W) in [0, 1]
    box: Tensor  # (n, Q, 4)
    iou: Tensor  # (n, Q)


@torch.no_grad()
def look(
    model: LCTR, dataset: torch.utils.data.Dataset, indices: Sequence[int], couplings: Sequence[str], threshold: float,
    gt_class: bool,
) -> Seen:
    """Localises the images again, for pictures: scoring keeps no maps."""
    batch = data.collate([dataset[int(i)] for i in indices])
    images = batch["image"].to(next(model.parameters()).device)
    classes = batch["label"] if gt_class else torch.full_like(batch["label"], -1)
    localization = model.localize(images, classes.to(images.device)[:, None])
    maps = enlarge(stack_couplings(localization, couplings)[:, :, 0], model.img_size)  # (n, Q, H, W)
    box = largest_boxes(maps.flatten(0, 1), [threshold]).view(*maps.shape[:2], 4).cpu()
    truth = to_input(batch["boxes"], batch["view"], model.img_size)  # (n, M, 4)
    iou = box_iou(box[:, :, None], truth[:, None]).amax(-1)
    return Seen(data.denormalise(batch["image"]), batch["view"], batch["label"].tolist(),
                localization.logits.argmax(1).tolist(), [t[:len(b)] for t, b in zip(truth, batch["boxes"])],
                stretch(maps).cpu(), box, iou)


def draw_panel(seen: Seen, i: int, q: int | None) -> Image.Image:
    """Image i as coupling q sees it (None: as it is): annotated boxes red, the predicted one green, IoU in white."""
    height, width = seen.picture.shape[1:3]
    panel = Image.fromarray(seen.picture[i]).resize(panel_size(seen.view[i]), Image.Resampling.BICUBIC)
    scale = torch.tensor([panel.width / width, panel.height / height]).repeat(2)
    if q is not None:
        panel = overlay(panel, seen.heat[i, q].numpy())
    draw = ImageDraw.Draw(panel)
    for box in seen.truth[i]:
        draw_box(draw, box * scale, RED, 2)
    if q is not None:
        draw_box(draw, seen.box[i, q] * scale, GREEN, 2)
        if len(seen.truth[i]):
            iou = f"{100 * seen.iou[i, q]:.1f}"
            draw.text((panel.width - 6, 4), iou, PAPER, font(17), "ra", stroke_width=2, stroke_fill=INK)
    return panel


def evenly(n: int, k: int) -> list[int]:
    """k of n places, evenly spread: neither the best nor the first."""
    k = min(n, k)
    return [(2 * i + 1) * n // (2 * k) for i in range(k)]


def draw_gallery(
    seen: Sequence[Seen], titles: Sequence[Sequence[str]], classes: Sequence[str], note: str
) -> Image.Image:
    """The paper's Figure 4: a row per image, its input, then a map for each model's couplings; titles[model][q]."""
    columns = [(None, None, "input")] + [(s, q, title) for s, row in zip(seen, titles) for q, title in enumerate(row)]
    rows, top, line = len(seen[0].label), 64, 22
    step, drop = CELL + MARGIN, CELL + line + MARGIN
    sheet = Image.new("RGB", (MARGIN + step * len(columns), top + drop * rows), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw_legend(draw, (MARGIN, 8), note, sheet.width)
    for c, (model, q, title) in enumerate(columns):
        x = MARGIN + step * c
        draw.text((x + CELL / 2, top - 6), fit_text(title, 15, CELL), INK, font(15), "ms")
        for i in range(rows):
            panel = draw_panel(model or seen[0], i, q)
            y = top + drop * i
            sheet.paste(panel, (x + (CELL - panel.width) // 2, y + (CELL - panel.height) // 2))
            if q is None:
                name = fit_text(classes[seen[0].label[i]], 13, CELL)
                draw.text((x + CELL / 2, y + CELL + 4), name, INK, font(13), "ma")
            elif q == 0:
                right, said = model.predicted[i] == model.label[i], f"taken for {classes[model.predicted[i]]}"
                draw.text((x, y + CELL + 4), "class right" if right else fit_text(said, 13, 2 * CELL),
                          GREY if right else (200, 30, 40), font(13))
    return sheet


def draw_legend(draw: ImageDraw.ImageDraw, place: tuple[int, int], note: str, width: int) -> None:
    x, y = place
    for colour, text in ((RED, "annotated"), (GREEN, "predicted")):
        draw.rectangle((x, y + 2, x + 16, y + 14), outline=colour, width=3)
        draw.text((x + 22, y), text, INK, font(14))
        x += 34 + font(14).getlength(text)
    draw.text((x + 8, y), fit_text(note, 14, width - x - MARGIN), GREY, font(14))


def draw_failures(
    groups: Sequence[tuple[str, Seen | None]], classes: Sequence[str], note: str, per_row: int
) -> Image.Image:
    """A titled row per kind of failure; groups: (title, its examples)."""
    top, line, head = 40, 22, 28
    step = CELL + MARGIN
    heights = [head + (CELL + line + MARGIN if seen else 0) for _, seen in groups]
    sheet = Image.new("RGB", (MARGIN + step * per_row, top + sum(heights) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw_legend(draw, (MARGIN, 8), note, sheet.width)
    y = top
    for (title, seen), height in zip(groups, heights):
        draw.line((MARGIN, y, sheet.width - MARGIN, y), GRID)
        draw.text((MARGIN, y + 5), title, INK, font(16))
        for i in range(len(seen.label) if seen else 0):
            x, panel = MARGIN + step * i, draw_panel(seen, i, 0)
            sheet.paste(panel, (x + (CELL - panel.width) // 2, y + head + (CELL - panel.height) // 2))
            caption = classes[seen.label[i]]
            if seen.predicted[i] != seen.label[i]:
                caption = f"{caption} as {classes[seen.predicted[i]]}"
            draw.text((x + CELL / 2, y + head + CELL + 4), fit_text(caption, 13, CELL), INK, font(13), "ma")
        y += height
    return sheet


def draw_curve(metrics: dict, coupling: str) -> Image.Image:
    """gt_known over thresholds, a line per coupling, a dot at the threshold in use. Drawn threefold, then reduced."""
    zoom, width, height = 3, 860, 520
    left, right, top, bottom = 70, 24, 46, 64
    sheet = Image.new("RGB", (zoom * width, zoom * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    curves = {c: row["gt_known_curve"] for c, row in metrics["couplings"].items()}

    def at(threshold: float, accuracy: float) -> tuple[float, float]:
        x, y = left + threshold * (width - left - right), top + (1 - accuracy / 100) * (height - top - bottom)
        return zoom * x, zoom * y

    def text(x: float, y: float, words: str, anchor: str, size: int = 14, colour=INK) -> None:
        draw.text((x, y), words, colour, font(zoom * size), anchor)

    for tick in range(0, 101, 20):
        draw.line((*at(0, tick), *at(1, tick)), GRID, zoom)
        text(*np.add(at(0, tick), (-8 * zoom, 0)), str(tick), "rm", colour=GREY)
    for tick in range(0, 11, 2):
        draw.line((*at(tick / 10, 0), *np.add(at(tick / 10, 0), (0, 5 * zoom))), INK, zoom)
        text(*np.add(at(tick / 10, 0), (0, 9 * zoom)), f"{tick / 10:.1f}", "ma", colour=GREY)
    draw.line((*at(0, 0), *at(1, 0)), INK, zoom)
    text(*at(0, 100 + 100 * 18 / (height - top - bottom)), "Images localised with IoU > 0.5 (GT-known), in %", "lb", 15)
    text(zoom * (left + (width - left - right) / 2), zoom * (height - 12), "threshold of the stretched map", "ms", 15)
    baseline = metrics["baselines"]["centred_box"]
    if baseline is not None:
        for step in range(0, 100, 2):
            draw.line((*at(step / 100, baseline), *at(step / 100 + 0.01, baseline)), GREY, zoom)
        text(*np.add(at(1, baseline), (0, -3 * zoom)), "centred box", "rb", 12, GREY)
    for c, curve in curves.items():
        if curve[0] is not None:
            points = [at(t, a) for t, a in zip(metrics["thresholds"], curve)]
            draw.line(points, LINES[c], zoom * (4 if c == coupling else 2), joint="curve")
    for c, row in metrics["couplings"].items():
        if row["gt_known"] is not None:
            (x, y), r = at(metrics["threshold"], row["gt_known"]), zoom * (6 if c == coupling else 4)
            draw.ellipse((x - r, y - r, x + r, y + r), LINES[c], PAPER, zoom)
    longest = max((font(zoom * 14).getlength(row["label"]) for row in metrics["couplings"].values()), default=0)
    x, y = zoom * (width - right - 8) - longest, zoom * (top + 10)
    frame = (x - 44 * zoom, y - 6 * zoom, zoom * (width - right), y + zoom * (22 * len(curves) + 2))
    draw.rectangle(frame, PAPER, GRID, zoom)
    for row_number, (c, row) in enumerate(metrics["couplings"].items()):
        middle = y + zoom * (22 * row_number + 8)
        draw.line((x - 36 * zoom, middle, x - 8 * zoom, middle), LINES[c], zoom * (4 if c == coupling else 2))
        text(x, middle, row["label"], "lm")
    return sheet.resize((width, height), Image.Resampling.LANCZOS)


# ---------------------------------------------------------------- reports


def report(
    out: str | Path, model: LCTR, dataset: torch.utils.data.Dataset, scores: Scores, metrics: dict, coupling: str,
    threshold: float, **about: object,
) -> None:
    """Writes predictions.jsonl, gallery.png, curve.png, failures.png and, last, metrics.json into the folder `out`.

    about: what else metrics.json shall say (checkpoint, data, split, frame, where the threshold came from).
    """
    out, training = Path(out), model.training
    out.mkdir(parents=True, exist_ok=True)
    model.eval()
    lines = (json.dumps(line) + "\n" for line in predictions(scores, coupling, threshold))
    write_text(out / "predictions.jsonl", "".join(lines))

    note = f"boxes at threshold {threshold:g}, {'label' if scores.gt_class else 'predicted class'}'s map, IoU in %"
    n = len(scores.images["label"])
    seen = look(model, dataset, evenly(n, 8), scores.couplings, threshold, scores.gt_class)
    titles = [coupling_label(scores.head, c) for c in scores.couplings]
    write_png(out / "gallery.png", draw_gallery([seen], [titles], dataset.classes, note))
    write_png(out / "curve.png", draw_curve(metrics, coupling))

    kinds, groups, per_row = failure_kinds(scores, coupling, threshold), [], 6
    for kind, name in enumerate(FAILURES):
        failed = np.flatnonzero(kinds == kind)
        share = metrics["couplings"][coupling]["failures"][name]
        title = f"{name}: {'-' if share is None else f'{share:.1f}'} % of images ({len(failed)})"
        examples = failed[evenly(len(failed), per_row)]
        groups.append((title, look(model, dataset, examples, [coupling], threshold, scores.gt_class)
                       if len(failed) else None))
    note = f"{coupling_label(scores.head, coupling)}, {note}"
    write_png(out / "failures.png", draw_failures(groups, dataset.classes, note, per_row))
    write_text(out / "metrics.json", json.dumps(metrics | {"coupling": coupling} | about, indent=2) + "\n")
    model.train(training)


def predictions(scores: Scores, coupling: str, threshold: float) -> Iterator[dict]:
    """predictions.jsonl, an entry per image: boxes are xyxy in the upright image's pixels; iou None without any."""
    at, images = (scores.couplings.index(coupling), threshold_index(scores, threshold)), scores.images
    box = torch.from_numpy(images["box"][:, *at])[:, None]  # (n, 1, 4)
    box = to_image(box, torch.from_numpy(images["view"]), scores.img_size)[:, 0].tolist()
    for i, boxes in enumerate(images["boxes"]):
        yield {"path": images["path"][i], "label": int(images["label"][i]), "top5": images["top5"][i].tolist(),
               "box": box[i], "boxes": boxes.tolist(), "iou": float(images["iou"][i, *at]) if len(boxes) else None}


def save_maps(path: str | Path, scores: Scores) -> None:
    """maps.npz, for scoring of your own: cls_map M~c and relation_map M^r (n, h, w), label (n,), path (n,), and, where
    the head has them, class_map (n, h, w) before any ReLU, with `class` (n,), the class it belongs to."""
    images = scores.images
    arrays = {key: images[key] for key in ("class_map", "cls_map", "relation_map", "label") if key in images}
    arrays |= {"path": np.array(images["path"]), "class": images["label"] if scores.gt_class else images["top5"][:, 0]}
    write_atomic(path, lambda file: np.savez(file, **arrays))


# ---------------------------------------------------------------- your own pictures


def find_images(places: Sequence[str], out: Path) -> list[Path]:
    """Files as given, and in folders, however deep, all with an ending that Pillow knows; none below `out`."""
    endings, out, found = Image.registered_extensions(), out.resolve(), []
    for place in map(Path, places):
        if not place.is_dir():
            found.append(place)
            continue
        found += [path for path in sorted(place.rglob("*"))
                  if path.suffix.lower() in endings and path.is_file() and not path.resolve().is_relative_to(out)]
    return found


def own_pictures(
    model: LCTR, classes: Sequence[str], paths: Sequence[Path], out: Path, coupling: str, threshold: float,
    crop: int | None, batch_size: int,
) -> int:
    """Writes an overlay PNG per picture and boxes.json; returns how many could not be read, named and skipped."""
    device, entries, used, unreadable = next(model.parameters()).device, [], set(), 0
    for first in range(0, len(paths), batch_size):
        batch = []
        for path in paths[first:first + batch_size]:
            try:
                batch.append((path, *data.load_image(path, model.img_size, crop)))
            except data.DataError as error:
                unreadable += 1
                print(f"evaluate.py: skipped: {error}", file=sys.stderr)
        if not batch:
            continue
        localization = model.localize(torch.stack([image for _, image, _, _ in batch]).to(device))
        maps = enlarge(stack_couplings(localization, [coupling])[:, 0], model.img_size)[:, 0]  # (B, H, W)
        boxes = largest_boxes(maps, [threshold]).cpu()  # (B, 1, 4)
        boxes = to_image(boxes, torch.tensor([view for _, _, view, _ in batch]), model.img_size)[:, 0]  # (B, 4)
        top = localization.logits.softmax(1).cpu().topk(min(5, len(classes)))
        for (path, _, view, size), heat, box, chances, ids in zip(batch, stretch(maps).cpu(), boxes, *top):
            top5 = [[classes[c], p] for c, p in zip(ids.tolist(), chances.tolist())]
            endings = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))  # a.jpg and b/a.png: a, a-2
            name = next(path.stem + ending for ending in endings if path.stem + ending not in used)
            used.add(name)
            write_png(out / f"{name}.png", draw_own(data.open_image(path), heat.numpy(), box, view, top5[0]))
            entries.append({"path": str(path), "size": list(size), "top5": top5, "box": box.tolist()})
            print(f"{path} -> {out / name}.png: {top5[0][0]} ({100 * top5[0][1]:.1f} %), "
                  f"box {' '.join(f'{v:.0f}' for v in box)}")
    write_text(out / "boxes.json", json.dumps(entries, indent=2) + "\n")
    return unreadable


def draw_own(picture: Image.Image, heat: np.ndarray, box: Tensor, view: tuple, best: tuple[str, float]) -> Image.Image:
    """The whole picture, the map over the part that the network saw, the box, class and probability."""
    scale = min(max(1, 480 / max(picture.size)), 1280 / max(picture.size))
    picture = picture.resize([max(1, round(scale * side)) for side in picture.size], Image.Resampling.BICUBIC)
    left, top, right, bottom = (round(scale * v) for v in view)
    left, top = min(left, picture.width - 1), min(top, picture.height - 1)  # of a thin picture a pixel is left
    corner = [left, top, max(right, left + 1), max(bottom, top + 1)]
    picture.paste(overlay(picture.crop(corner), heat), corner[:2])
    draw, unit = ImageDraw.Draw(picture), max(2, max(picture.size) // 240)
    draw_box(draw, box * scale, GREEN, unit)
    text = fit_text(f"{best[0]} {100 * best[1]:.0f} %", 8 * unit, picture.width - 4 * unit)
    draw.text((2 * unit, 2 * unit), text, PAPER, font(8 * unit), stroke_width=max(2, unit // 2), stroke_fill=INK)
    return picture


# ---------------------------------------------------------------- the script


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"evaluate.py: error: {message}\n")


def threshold_flag(text: str) -> float | str:
    try:
        value = text if text == "auto" else float(text)
    except ValueError:
        value = -1
    if value != "auto" and not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, need auto or a number in [0, 1)")
    return value


def count_flag(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text}, need a whole number of at least {least}")
        return int(text)
    return parse


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0], epilog="Flags not given come from the checkpoint.")
    add = parser.add_argument
    add("--checkpoint", nargs="+", required=True, metavar="FILE", help="of train.py; several are compared")
    add("--data", choices=data.DATASETS, help="data set; default: what it was trained on")
    add("--root", help="the data set's folder")
    add("--split", choices=("test", "val", "train"), default="test")
    add("--limit-test", type=count_flag(1), metavar="N", help="that many images, spread evenly over the split")
    add("--images", nargs="+", metavar="PATH", help="pictures or folders of your own instead of a data set")
    add("--coupling", choices=COUPLINGS, help="of the report's boxes; default relation (Eq. 3)")
    add("--threshold", type=threshold_flag,
        help="number in [0, 1), or auto: the best on val; default: the checkpoint's, else 0.2")
    add("--gt-class", action="store_true", help="score the label's map instead of the predicted class's")
    add("--crop", type=count_flag(1), metavar="SIZE",
        help="shorter side to SIZE, centre crop; default: the whole image, squashed")
    add("--out", type=Path, help="folder; default: evaluate/ beside the checkpoint")
    add("--save-maps", action="store_true", help="also maps.npz")
    add("--profile", action="store_true", help="print the time of the forward pass and of scoring")
    add("--batch-size", type=count_flag(1), default=64)
    add("--workers", type=count_flag(0), default=0, help="processes that load images")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags = parser.parse_args(argv)
    flags.out = flags.out or Path(flags.checkpoint[0]).parent / "evaluate"
    if flags.images and len(flags.checkpoint) > 1:
        parser.error("--images: takes one --checkpoint")
    if any(place.exists() and not place.is_dir() for place in (flags.out, *flags.out.parents)):
        parser.error(f"--out: {flags.out} is or lies in a file, need a folder")
    try:
        device = torch.zeros(1, device=flags.device).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Triton's choice
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: {flags.device}: {str(error).splitlines()[0]}")
    return flags


def data_source(flags: argparse.Namespace, checkpoint: dict) -> tuple[str | None, str | None]:
    """The data set's name and folder: the flags', else the checkpoint's own."""
    config = checkpoint["config"]
    name = flags.data or config.get("data")
    return name, flags.root or (config["root"] if name and name == config.get("data") else None)


def load_split(
    flags: argparse.Namespace, checkpoint: dict, path: str, img_size: tuple[int, int], split: str
) -> torch.utils.data.Dataset:
    """The split to score, of the checkpoint's data set unless flags say otherwise; the classes must be its own."""
    name, root = data_source(flags, checkpoint)
    if name is None:
        raise argparse.ArgumentError(None, f"--data: missing, {path} names no data set")
    if root is None and name != "synthetic":
        raise argparse.ArgumentError(None, f"--root: {name} needs the data set's folder")
    dataset = data.load_dataset(name, root, split, img_size, limit=flags.limit_test, crop=flags.crop, augment=False)
    known, found = checkpoint["classes"], dataset.classes
    if checkpoint["phase"] == "foreign" and len(known) == len(found):
        known = found  # the file has no names to compare
    if list(known) != list(found):
        i = next((i for i, (a, b) in enumerate(zip(known, found)) if a != b), min(len(known), len(found)))
        names = [repr(classes[i]) if i < len(classes) else "nothing" for classes in (known, found)]
        raise ValueError(f"{path}: its {len(known)} classes are not the {len(found)} of {name} {split}: "
                         f"class {i} is {names[0]} there, {names[1]} here")
    if not len(dataset):
        raise ValueError(f"{name} {split}: no images")
    return dataset


def choose_threshold(
    flags: argparse.Namespace, model: LCTR, checkpoint: dict, path: str, coupling: str
) -> tuple[float, str]:
    """The threshold and where it came from."""
    if flags.threshold is None:
        own = checkpoint.get("metrics", {}).get("threshold")
        if own is None:
            return DEFAULT_THRESHOLD, "CAM's, since the checkpoint names none"
        return own, "the checkpoint's own"
    if flags.threshold != "auto":
        return flags.threshold, "--threshold"
    val_set = load_split(flags, checkpoint, path, model.img_size, "val")
    scores = score(model, val_set, batch_size=flags.batch_size, device=flags.device, workers=flags.workers,
                   couplings=[coupling])
    return best_threshold(scores, coupling), f"the best gt-known of {len(val_set)} val images"


def run_names(paths: Sequence[str]) -> list[str]:
    """A short name for each checkpoint: its run's folder, with the file's where that is not enough."""
    short = [Path(path).resolve().parent.name for path in paths]
    names = short if len(set(short)) == len(short) else [f"{s}-{Path(path).stem}" for s, path in zip(short, paths)]
    return names if len(set(names)) == len(names) else [f"{i}-{name}" for i, name in enumerate(names, 1)]


def evaluate(flags: argparse.Namespace) -> int:
    """Everything that the flags ask for; returns the exit status."""
    loaded = [(path, *load_checkpoint(path)) for path in flags.checkpoint]
    for path, model, checkpoint in loaded:
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise ValueError(f"{path}: weights that are not finite")
        if flags.coupling and flags.coupling not in couplings_of(model):
            raise argparse.ArgumentError(None, f"--coupling: {path} has a {model.head_type} head, whose couplings are "
                                               f"{', '.join(couplings_of(model))}")
        if flags.crop and flags.crop < max(model.img_size):
            raise argparse.ArgumentError(None, f"--crop: got {flags.crop}, need at least "
                                               f"{max(model.img_size)}, the side of {path}'s input")
        name, root = data_source(flags, checkpoint)
        if flags.threshold == "auto" and not (name and data.has_split(name, root, "val")):
            raise argparse.ArgumentError(None, f"--threshold: auto needs a val split, {name} has none: give a number")
        if list(checkpoint["classes"]) != list(loaded[0][2]["classes"]):
            raise ValueError(f"{path}: its classes are not those of {flags.checkpoint[0]}")
    flags.out.mkdir(parents=True, exist_ok=True)

    names, all_metrics, seen, titles = run_names(flags.checkpoint), [], [], []
    for name, (path, model, checkpoint) in zip(names, loaded):
        model = model.to(flags.device).eval()
        coupling = flags.coupling or default_coupling(model)
        dataset = None if flags.images else load_split(flags, checkpoint, path, model.img_size, flags.split)
        threshold, source = choose_threshold(flags, model, checkpoint, path, coupling)
        print(f"{path}: {coupling_label(model.head_type, coupling)} ({coupling}), threshold {threshold:g} ({source}), "
              f"on {flags.device}")
        if flags.images:
            paths = find_images(flags.images, flags.out)
            unreadable = own_pictures(model, checkpoint["classes"], paths, flags.out, coupling, threshold, flags.crop,
                                      flags.batch_size)
            print(f"{len(paths) - unreadable} pictures and boxes.json in {flags.out}"
                  + f", {unreadable} could not be read" * bool(unreadable))
            return 1 if unreadable or not paths else 0

        scores = score(model, dataset, batch_size=flags.batch_size, device=flags.device, workers=flags.workers,
                       threshold=threshold, gt_class=flags.gt_class, keep_maps=flags.save_maps)
        metrics = summarise(scores, threshold) | {"coupling": coupling}
        about = {"threshold_from": source, "checkpoint": str(path), "data": dataset.name, "split": flags.split,
                 "frame": f"centre crop of {flags.crop}" if flags.crop else "whole image"}
        folder = flags.out / name if len(loaded) > 1 else flags.out
        report(folder, model, dataset, scores, metrics, coupling, threshold, **about)
        if flags.save_maps:
            save_maps(folder / "maps.npz", scores)
        if flags.profile:
            n = len(scores.images["label"])
            forward, boxes = (1e3 * scores.seconds[part] / n for part in ("forward", "boxes"))
            print(f"{name}: per image {forward:.2f} ms for the forward pass, {boxes:.2f} ms for boxes and IoU: "
                  f"{len(scores.couplings)} couplings, {len(scores.thresholds)} thresholds, predicted class and label")
        all_metrics.append(metrics | about | ({"name": name} if len(loaded) > 1 else {}))
        if len(loaded) > 1:
            shown = [c for c in scores.couplings if c in ("cls", "relation", coupling) or scores.head == "token"]
            seen.append(look(model, dataset, evenly(len(dataset), 8), shown, threshold, flags.gt_class))
            titles.append([f"{name}: {coupling_label(scores.head, c)}" for c in shown])

    if len(loaded) > 1:
        write_text(flags.out / "metrics.json", json.dumps(dict(zip(names, all_metrics)), indent=2) + "\n")
        write_png(flags.out / "gallery.png", draw_gallery(seen, titles, loaded[0][2]["classes"], "IoU in %"))
    first = all_metrics[0]
    print(f"\n{first['data']} {first['split']}, {first['frame']}\n{format_table(all_metrics)}\n\n"
          f"report and pictures in {flags.out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse_flags(argv)
    try:
        return evaluate(flags)
    except argparse.ArgumentError as error:  # a flag that does not fit what the checkpoint holds
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    except (ValueError, RuntimeError) as error:
        print(f"evaluate.py: error: {str(error).splitlines()[0]}", file=sys.stderr)
    except OSError as error:
        print(f"evaluate.py: error: {error.filename or flags.out}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("evaluate.py: stopped", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
