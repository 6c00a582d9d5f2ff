"""Maps to boxes: connected components at many thresholds at once, IoU, and the frames of boxes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from support.common import minmax


class Components(NamedTuple):
    """Connected components of M maps at t thresholds.

    Those of one map and threshold are in order of their first pixel.
    """

    cell: Tensor  # (R,): map * t + threshold
    pixels: Tensor  # (R,)
    box: Tensor  # (R, 4): half-open xyxy


def connected_components(maps: Tensor, thresholds: Tensor) -> Components:
    """All 8-connected components of `normalised map > threshold`: maps (M, H, W), thresholds (t,).

    Thresholds ascend. Each map is min-max normalised first; one that is constant or not finite has
    no component.

    A mask is a list of runs, pixels side by side in a row, and never exists otherwise: as
    thresholds nest, a step of the map from 3 to 5 thresholds passed starts a run in masks 3 and 4.
    A run's key is its position in the stack of all masks, each with an empty column and row after
    its own, so that a step of `stride` leads to the next row and touching never crosses masks.
    """
    M, H, W = maps.shape
    t, stride, plane = len(thresholds), W + 1, (H + 1) * (W + 1)
    passed = torch.bucketize(minmax(maps).contiguous(), thresholds)  # (M, H, W)
    passed = F.pad(passed, (1, 1, 0, 1))  # (M, H+1, W+2)
    left, right = passed[:, :, :-1].flatten(), passed[:, :, 1:].flatten()  # (M * plane) of an edge

    start, end = steps_up(left, right, plane, t), steps_up(right, left, plane, t)  # (n): half-open
    itself = torch.arange(len(start), device=maps.device)
    above, touches = first_touching(start, end, -stride)
    root = follow(torch.where(touches, above, itself))  # (n): climbs to a run with none above
    below, touches = first_touching(start, end, stride)
    # with the climb, these pairs of touching runs are all that is needed to connect
    a, b = root[itself[touches]], root[below[touches]]
    while (apart := a != b).any():
        a, b = a[apart], b[apart]
        smaller, larger = torch.minimum(a, b), torch.maximum(a, b)
        root = follow(root.scatter_reduce(0, larger, smaller, "amin"))
        a, b = root[a], root[b]

    first = (root == itself).nonzero()[:, 0]  # (R): a component's root is its first run
    number = torch.arange(len(first), device=maps.device)
    component = torch.zeros_like(itself).scatter_(0, first, number)[root]  # (n)

    def over_runs(values: Tensor, reduce: str) -> Tensor:  # (n) -> (R)
        return values[first].scatter_reduce(
            0, component, values, reduce, include_self=reduce != "sum")

    row = start // stride % (H + 1)
    x0, x1 = over_runs(start % stride, "amin"), over_runs(end % stride, "amax")
    box = torch.stack([x0, row[first], x1, over_runs(row, "amax") + 1], 1)
    return Components(start[first] // plane, over_runs(end - start, "sum"), box)


def steps_up(before: Tensor, after: Tensor, plane: int, t: int) -> Tensor:
    """Sorted keys of the steps from `before` to a larger `after`, one per threshold passed."""
    at = (after > before).nonzero()[:, 0]
    lowest, count = before[at], (after - before)[at]
    total = count.cumsum(0)
    # less the number of keys before it in the list, which arange adds again
    first_key = at + (at // plane * (t - 1) + lowest - total + count) * plane
    keys = first_key.repeat_interleave(count)
    return (keys + plane * torch.arange(len(keys), device=at.device)).sort().values


def first_touching(start: Tensor, end: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """For each run the first that touches it in the row `step` further, and whether there is one.

    Corners touch.
    """
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
    """Each cell's box (cells, 4): that of its component with most pixels, the first of equals.

    A cell without a component gets the whole image.
    """
    n = len(components.cell)
    order = components.pixels * n + torch.arange(n - 1, -1, -1, device=components.cell.device)
    best = order.new_full((cells,), -1).scatter_reduce(0, components.cell, order, "amax")
    exists = best >= 0
    boxes = best.new_tensor([0, 0, width, height]).repeat(cells, 1)
    boxes[exists] = components.box[n - 1 - best[exists] % max(n, 1)]
    return boxes


def map_chunks(maps: Tensor) -> Sequence[Tensor]:
    """Maps in groups whose runs fit a core's cache, or a GPU's memory."""
    pixels = 2 ** (24 if maps.is_cuda else 18)
    return maps.split(max(1, pixels // (maps.shape[1] * maps.shape[2])))


def largest_boxes(maps: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The box of each map's largest component: maps (B, H, W) -> (B, t, 4) int64, half-open xyxy.

    A map is min-max normalised, then value > threshold, the largest 8-connected component by pixel
    count (of equals the one whose first pixel in row order comes first), its box. A map that is
    constant or not finite, or a threshold that nothing exceeds, gives the whole image. Thresholds
    in any order. Raises ValueError for other shapes.
    """
    if maps.ndim != 3 or 0 in maps.shape[1:]:
        raise ValueError(f"maps: got shape {tuple(maps.shape)}, need (B, H, W)")
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    ascending, position = torch.tensor(
        thresholds, dtype=maps.dtype, device=maps.device).unique(return_inverse=True)
    boxes = torch.cat([
        largest(connected_components(chunk, ascending), len(chunk) * len(ascending),
                *maps.shape[1:]) for chunk in map_chunks(maps)])  # (B * t, 4)
    return boxes.view(len(maps), len(ascending), 4)[:, position]


# ---------------------------------------------------------------- IoU


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of half-open xyxy boxes: a (..., 4), b (..., 4), broadcast -> (...).

    Widths are x1 - x0, with no pixel added. 0 where the union is empty; a box turned inside out is
    empty.
    """
    overlap = intersection(a, b)
    union = area(a) + area(b) - overlap
    return torch.where(union > 0, overlap / union, 0)


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Area (...) common to a (..., 4) and b (..., 4)."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    return area(torch.cat(torch.broadcast_tensors(low, high), -1))


def area(box: Tensor) -> Tensor:
    """(..., 4) -> (...) in float64, so that only equal boxes have an IoU of 1."""
    return (box[..., 2:].double() - box[..., :2].double()).clamp_min(0).prod(-1)


# ---------------------------------------------------------------- frames


def to_input(boxes: Sequence[Tensor], view: Tensor, img_size: tuple[int, int]) -> Tensor:
    """B lists of annotated boxes (M_b, 4) in image pixels -> (B, M, 4) in the input's frame.

    view (B, 4) is the part of each image that the network sees; boxes are clipped to it. Lists
    shorter than the longest (at least 1) are filled up with boxes of no area. IoU is the same in
    both frames: each axis is scaled alone.
    """
    padded = torch.nn.utils.rnn.pad_sequence([torch.zeros(1, 4), *boxes], batch_first=True)[1:]
    scale, origin = input_frame(view, img_size)
    side = torch.tensor([*img_size[::-1]] * 2, dtype=torch.float64)
    return ((padded.double() - origin) * scale).clamp_min(0).minimum(side)


def to_image(boxes: Tensor, view: Tensor, img_size: tuple[int, int]) -> Tensor:
    """Boxes (B, M, 4) in the input's frame -> float64 in pixels of the upright image."""
    scale, origin = input_frame(view, img_size)
    return boxes / scale + origin


def input_frame(view: Tensor, img_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Input pixels per image pixel, and where the view begins: (B, 1, 4) each."""
    view = view.double()
    scale = torch.tensor([*img_size[::-1]]) / (view[:, 2:] - view[:, :2])  # (B, 2)
    return scale.repeat(1, 2)[:, None], view[:, :2].repeat(1, 2)[:, None]


# ---------------------------------------------------------------- maps against annotated boxes


def enlarge(maps: Tensor, img_size: tuple[int, int]) -> Tensor:
    """Maps on the patch grid (B, Q, h, w), bilinear to the input's size (B, Q, H, W)."""
    return F.interpolate(maps.float(), img_size, mode="bilinear", align_corners=False)


def boxes_and_iou(
    maps: Tensor, ground_truth: Tensor, img_size: tuple[int, int], thresholds: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Fused maps (M, h, w), each against its image's annotated boxes (M, K, 4), input's frame.

    Returns the largest component's box (M, t, 4) int16, its IoU (M, t) float32, and the best IoU
    of any component's box; each IoU is the best over the image's annotated boxes. A map without a
    component counts as the whole image. Thresholds ascend.
    """
    M, t, parts = len(maps), len(thresholds), []
    ascending = torch.tensor(thresholds, device=maps.device)
    chunks = map_chunks(enlarge(maps[None], img_size)[0])  # of (M, H, W)
    for chunk, annotated in zip(chunks, ground_truth.split(len(chunks[0]))):
        components = connected_components(chunk, ascending)
        box = largest(components, len(chunk) * t, *img_size)  # (chunk * t, 4)
        iou = box_iou(box.view(-1, t, 1, 4), annotated[:, None]).amax(-1).flatten()  # (chunk * t)
        each = box_iou(components.box[:, None], annotated[components.cell // t]).amax(-1)  # (R)
        parts.append((box, iou, iou.scatter_reduce(0, components.cell, each, "amax")))
    box, iou, any_iou = map(torch.cat, zip(*parts))
    return box.view(M, t, 4).short(), iou.view(M, t).float(), any_iou.view(M, t).float()


def baseline_iou(ground_truth: Tensor, img_size: tuple[int, int]) -> Tensor:
    """ground_truth (B, M, 4) -> (B, 2): IoU of the whole image, and of its centred half by area."""
    height, width = img_size
    low, high = (1 - math.sqrt(0.5)) / 2, (1 + math.sqrt(0.5)) / 2
    boxes = torch.tensor([[0, 0, 1, 1], [low, low, high, high]])
    boxes = boxes * torch.tensor([width, height] * 2)  # (2, 4)
    return box_iou(boxes[:, None], ground_truth[:, None]).amax(-1).float()
