"""Data sets with image-level labels for training and boxes for scoring: synthetic birds, CUB-200-2011, ILSVRC, your own folder.

    load_dataset(name, root, split, img_size)          a torch Dataset; dataset[i] is a dict:
        image   (3, H, W) float32, normalised by ImageNet's mean and standard deviation
        label   int, an index of dataset.classes
        boxes   (M, 4) float32, half-open xyxy in pixels of the upright original; M = 0 where nothing is annotated
        size    (width, height) of the upright original
        view    (x0, y0, x1, y1): the region of the original that `image` shows; x0 > x1 in a mirrored training picture
        path    str; for birds a name, since they have no file
        index   int, the place in the data set
        palette int, birds only: the body's colours, a second image-level label

Every random choice in training is a function of (seed, epoch, index), so that neither workers nor processes change a result.
What a data set had to clip, drop or leave unscored stands in dataset.notes. Anything wrong in a file raises DataError, one line
that names it.

    python data.py --data cub --root CUB_200_2011 --out sheet.png          # a contact sheet with boxes: check your own data
"""
from __future__ import annotations

import argparse
import colorsys
import math
import multiprocessing
import os
import signal
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset

DATASETS = ("synthetic", "cub", "ilsvrc", "folder")
MEAN = 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)      # ImageNet's, for pixels in 0..255
STD = 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
warnings.filterwarnings("ignore", module="PIL")                     # what matters arrives as an exception


class DataError(ValueError):
    """A file of a data set is wrong. The message is one line; out of a DataLoader worker's traceback, its last one."""

    def __init__(self, message: str):
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.DataError: "))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: any file -> upright RGB -> a view of it -> the network's input

def open_image(path: str | Path) -> Image.Image:
    """The picture upright (EXIF) and in RGB, whatever Pillow reads: its first frame, over white where it is transparent,
    16-bit and float pixels scaled to 8 bits. Raises DataError naming the file."""
    return _decode(path)[0]


def _decode(path: str | Path, at_least: tuple[int, int] = None) -> tuple[Image.Image, tuple[int, int]]:
    """The upright RGB picture and its upright original size (width, height). With at_least=(width, height), a JPEG may
    come smaller than its original (1/2, 1/4 or 1/8, decoded so, which is cheap) but not smaller than that."""
    try:
        with Image.open(path) as image:
            sideways = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)       # EXIF orientation: rows are columns
            size = image.size[::-1] if sideways else image.size
            if at_least:
                image.draft(None, at_least[::-1] if sideways else at_least)
            return _rgb(ImageOps.exif_transpose(image)), size
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except Exception as error:                              # Pillow's plugins raise nearly anything on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read as an image ({reason[:200]})") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":                               # 16-bit, 32-bit and float grey: Pillow would clip at 255
        pixels = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
        ranges = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535) if image.mode == "F" else (255, 65535)
        top = next((r for r in ranges if pixels.max() <= r), pixels.max())
        image = Image.fromarray(np.clip(pixels * (255 / top), 0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def train_view(size, img_size, rng) -> tuple[float, float, float, float]:
    """The paper's augmentation as a region of the original: both sides resized to 256/224 of img_size (height, width), a
    random crop of img_size, mirrored half of the time (x0 > x1)."""
    (width, height), (h, w) = size, img_size
    H, W = round(h * 256 / 224), round(w * 256 / 224)
    top, left, mirrored = rng.integers(H - h + 1), rng.integers(W - w + 1), rng.random() < 0.5
    x0, y0, x1, y1 = left * width / W, top * height / H, (left + w) * width / W, (top + h) * height / H
    return (x1, y0, x0, y1) if mirrored else (x0, y0, x1, y1)


def test_view(size, img_size, crop: int | None = None) -> tuple[float, float, float, float]:
    """The whole picture, or with crop=SIZE the centre: the shorter side resized to SIZE, img_size (height, width) cut out."""
    width, height = size
    if crop is None:
        return 0.0, 0.0, float(width), float(height)
    W, H = (crop, crop * height // width) if width < height else (crop * width // height, crop)
    (h, w) = img_size
    top, left = round((H - h) / 2), round((W - w) / 2)
    return left * width / W, top * height / H, (left + w) * width / W, (top + h) * height / H


def load_image(path: str | Path, img_size, crop: int | None = None):
    """The test transform of one file: (image (3, H, W), view, size). img_size is an int or (height, width)."""
    img_size = _pair(img_size)
    image, size = _decode(path, _at_least(img_size, crop, augment=False))
    view = test_view(size, img_size, crop)
    return normalise(_show(image, size, view, img_size)), view, size


def _at_least(img_size, crop, augment):
    h, w = (round(s * 256 / 224) for s in img_size) if augment else (crop, crop) if crop else img_size
    return w, h


def _show(image: Image.Image, size, view, img_size) -> np.ndarray:
    """The view, given in pixels of a picture of `size`, resized to img_size: (H, W, 3) uint8."""
    x0, y0, x1, y1 = view
    sx, sy = image.width / size[0], image.height / size[1]          # below 1 where a JPEG was decoded at reduced scale
    box = min(x0, x1) * sx, y0 * sy, min(max(x0, x1) * sx, image.width), min(y1 * sy, image.height)
    pixels = np.asarray(image.resize(img_size[::-1], Image.Resampling.BILINEAR, box=box))
    return pixels[:, ::-1] if x0 > x1 else pixels


def normalise(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().sub_(MEAN).div_(STD)


def denormalise(image: torch.Tensor) -> np.ndarray:
    """(3, H, W) or (B, 3, H, W), normalised -> (H, W, 3) or (B, H, W, 3) uint8, to look at."""
    pixels = image.detach().float().cpu() * STD + MEAN
    return pixels.round().clamp(0, 255).byte().movedim(-3, -1).numpy()


def clip_boxes(boxes: torch.Tensor, view) -> torch.Tensor:
    """(M, 4) xyxy cut to a view or to (0, 0, width, height). A box outside keeps its row, with no area: a certain miss."""
    x0, y0, x1, y1 = view
    return torch.stack((boxes[:, 0::2].clamp(x0, x1), boxes[:, 1::2].clamp(y0, y1)), 2).flatten(1)


def _pair(img_size) -> tuple[int, int]:
    return (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic birds: the class is in the head, the box around the whole bird

BIRDS = {"train": 12_000, "val": 600, "test": 1000}
BIRD_STREAMS = {"train": 1, "val": 2, "test": 3}            # first word of each drawing's seed: splits share no bird
HUES = {"red": (0.0, 0.85, 0.85), "yellow": (0.14, 0.9, 0.95), "blue": (0.6, 0.85, 0.85)}                      # HSV
MARKS = ("cap", "ring", "bars")
SPECIES = [f"{hue}-{mark}" for mark in MARKS for hue in HUES]
DECOYS = [*HUES.values(), (0.83, 0.65, 0.85), (0.36, 0.8, 0.65), (0.0, 0.0, 0.97)]
PALETTES = [(0.07, 0.55, 0.45), (0.10, 0.35, 0.70), (0.58, 0.25, 0.50), (0.22, 0.35, 0.45), (0.0, 0.0, 0.35),
            (0.05, 0.50, 0.30), (0.50, 0.30, 0.40), (0.95, 0.25, 0.55)]                                          # HSV
PALETTE_CUE = 0.75                                          # share of birds whose palette is their species' own
SUPERSAMPLING = 3

_ANGLES = np.linspace(0, 2 * math.pi, 28, endpoint=False)


def _superellipse(power):
    circle = np.stack((np.cos(_ANGLES), np.sin(_ANGLES)), 1)        # (28, 2), clockwise from the right, since y is down
    return np.sign(circle) * np.abs(circle) ** (2 / power)


CIRCLE, LEAF = _superellipse(2), _superellipse(1.4)
WING = CIRCLE * np.stack((np.where(CIRCLE[:, 0] < 0, 1.45, 1), 0.75 + 0.35 * CIRCLE[:, 0]), 1)     # a drop, its tip at the left


def _hsv(h, s, v):
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(h % 1, min(s, 1), min(v, 1)))


def _turned(shape, x, y, a, b, angle=0.0):
    """A unit shape (n, 2) stretched by (a, b), turned and moved to (x, y)."""
    c, s = math.cos(angle), math.sin(angle)
    return shape @ np.array([[a * c, a * s], [-b * s, b * c]]) + (x, y)


def draw_bird(stream: int, index: int, size: tuple[int, int] = (64, 64)):
    """One bird, a pure function of its arguments: (picture (h, w, 3) uint8, label, palette, box xyxy in pixels).

    The species is the hue and the marking of the head, about an eighth of the picture across; berries lie about in the same
    hues. The body's palette goes with the species PALETTE_CUE of the time and is any of the eight otherwise; shape, pose, place,
    plumage and scenery are free. The box covers head, beak, body, tail and legs."""
    height, width = size
    rng = np.random.default_rng((stream, index))
    uniforms = iter(rng.random(400).tolist())

    def u(low, high):
        return low + (high - low) * next(uniforms)

    label = int(u(0, len(SPECIES)))
    palette = label % len(PALETTES) if u(0, 1) < PALETTE_CUE else int(u(0, len(PALETTES)))
    scenery = Image.fromarray(_background(rng, u, height, width))
    canvas = scenery.resize((SUPERSAMPLING * width, SUPERSAMPLING * height), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    _draw_clutter(draw, u, *canvas.size)
    shapes = _bird(u, label, palette)

    # pose: tilt, facing, scale, place; the bird never leaves the picture
    tilt, facing = u(-0.5, 0.5), -1 if u(0, 1) < 0.5 else 1
    c, s = math.cos(tilt), math.sin(tilt)
    points = np.concatenate([points for points, _ in shapes]) @ np.array([[facing * c, s], [-facing * s, c]])
    low, extent = points.min(0), np.ptp(points, axis=0)
    scale = (u(0.5, 0.85) * np.array(canvas.size) / extent).min()
    corner = (canvas.size - scale * extent) * (u(0.02, 0.98), u(0.02, 0.98))
    points = (points - low) * scale + corner
    flat, end = points.ravel().tolist(), 0
    for p, colour in shapes:
        start, end = end, end + p.size
        draw.polygon(flat[start:end], fill=colour)

    grain = rng.standard_normal((height, width, 1), np.float32) * u(1, 5)
    picture = np.clip(np.asarray(canvas.reduce(SUPERSAMPLING)) + grain, 0, 255).astype(np.uint8)
    box = np.concatenate((points.min(0), points.max(0) + 1)) / SUPERSAMPLING
    return picture, label, palette, box.astype(np.float32)


def _background(rng, u, height, width):
    """Smooth colour noise of three grain sizes around one colour: (h, w, 3) uint8."""
    base = np.array(_hsv(u(0.05, 0.6), u(0.1, 0.5), u(0.35, 0.85)), np.float32).reshape(3, 1, 1)
    tint, picture = 0.4 + 0.6 * base / 255, base
    for cells, amplitude in ((3, u(10, 35)), (8, u(5, 25)), (24, u(3, 14))):
        light = tint * rng.standard_normal((1, cells, cells), np.float32)
        colour = 0.3 * rng.standard_normal((3, cells, cells), np.float32)
        noise = amplitude * (light + colour)                                    # (3, cells, cells)
        picture = picture + _bicubic(height, cells) @ noise @ _bicubic(width, cells).T
    return np.clip(picture, 0, 255).astype(np.uint8).transpose(1, 2, 0)


@lru_cache
def _bicubic(size, cells):
    """Matrix (size, cells) of bicubic interpolation."""
    return np.asarray(Image.fromarray(np.eye(cells, dtype=np.float32)).resize((cells, size), Image.Resampling.BICUBIC))


def _draw_clutter(draw, u, width, height):
    """Three to seven twigs, leaves, stones and berries; the berries in the heads' hues and a few more."""
    n = min(width, height)
    for _ in range(int(u(3, 8))):
        kind, x, y = u(0, 1), u(0, width), u(0, height)
        if kind < 0.3:
            angle, line = u(0, 6.28), [x, y]
            for _ in range(3):
                angle += u(-0.9, 0.9)
                x, y = x + u(0.05, 0.18) * n * math.cos(angle), y + u(0.05, 0.18) * n * math.sin(angle)
                line += x, y
            draw.line(line, _hsv(u(0.05, 0.12), u(0.2, 0.6), u(0.2, 0.5)), int(u(0.012, 0.035) * n), joint="curve")
        elif kind < 0.65:
            leaf = _turned(LEAF, x, y, u(0.06, 0.16) * n, u(0.03, 0.06) * n, u(0, 6.28))
            h, s, v = u(0.1, 0.42), u(0.25, 0.7), u(0.25, 0.75)
            draw.polygon(leaf.ravel().tolist(), _hsv(h, s, v))
            draw.line((*leaf[0], *leaf[14]), _hsv(h, s, v * 0.7), int(0.008 * n))
        elif kind < 0.82:
            stone = _turned(_superellipse(u(1.8, 3)), x, y, u(0.05, 0.16) * n, u(0.04, 0.1) * n, u(0, 3))
            draw.polygon(stone.ravel().tolist(), _hsv(u(0, 1), u(0, 0.25), u(0.25, 0.8)))
        else:
            radius, (h, s, v) = u(0.025, 0.055) * n, DECOYS[int(u(0, len(DECOYS)))]
            berry = _turned(CIRCLE, x, y, radius, radius)
            draw.polygon(berry.ravel().tolist(), _hsv(h + u(-0.03, 0.03), s * u(0.8, 1), v * u(0.8, 1)))


def _bird(u, label, palette):
    """The bird as [(polygon, colour), ...] from back to front; x forward, y down, the body 2 long and centred at 0."""
    h, s, v = list(HUES.values())[label % len(HUES)]
    hue, dark = _hsv(h + u(-0.025, 0.025), s * u(0.85, 1.1), v * u(0.85, 1.1)), _hsv(0, 0, u(0.03, 0.15))
    h, s, v = PALETTES[palette]
    h, s, v = h + u(-0.03, 0.03), s * u(0.7, 1.3), v * u(0.8, 1.25)
    coat, shade, light, legs = _hsv(h, s, v), _hsv(h, s, v * 0.7), _hsv(h, s * 0.5, v * 1.35), _hsv(0.08, 0.5, 0.25)
    deep, power = u(0.5, 0.72), u(1.8, 2.4)                                     # body: half height, squareness
    x, y, r = u(0.78, 0.98), -u(0.25, 0.5), u(0.36, 0.44)                       # head: centre, radius
    shapes = []

    def add(colour, *points):
        shapes.append((np.concatenate([np.reshape(p, (-1, 2)) for p in points]), colour))

    hip, down = u(-0.15, 0.15), deep + u(0.25, 0.5)
    for leg in (hip - 0.12, hip + 0.18):
        foot = leg + 0.12
        add(legs, (leg - 0.03, deep * 0.8), (leg + 0.03, deep * 0.8), (foot + 0.03, down - 0.05), (foot + 0.16, down),
            (foot - 0.1, down), (foot - 0.03, down - 0.05))
    tip, spread, droop, fork = -0.95 - u(0.3, 0.7), u(0.16, 0.34), u(-0.4, 0.2), u(0, 0.35)
    notch = -0.95 + (tip + 0.95) * (1 - fork)
    add(shade, (-0.7, -0.16), (tip, droop - spread), (notch, droop), (tip, droop + spread), (-0.7, 0.16))
    add(coat, (-0.7, -0.16), (tip, droop - spread), (tip + 0.06, droop - spread * 0.5), (-0.7, 0))

    body = _superellipse(power) * (1, deep)
    add(coat, body)
    add(coat, (x - r * 0.9, y - r * 0.25), (x + r * 0.7, y + r * 0.6), (0.75, deep * 0.55), (-0.35, -deep * 0.9))     # neck
    add(light, body[1:14], body[13:0:-1] * (1, 0.25))                           # belly
    plumage = u(0, 1)
    if plumage < 0.35:                                                          # striped, spotted or plain
        pitch, lean = u(0.22, 0.34), u(0, 0.12)
        for a in np.arange(-0.85, 0.7, pitch).tolist():
            half = deep * 0.97 * (1 - max(abs(a), abs(a + 0.09 + lean)) ** power) ** (1 / power)
            add(shade, (a, -half), (a + 0.09, -half), (a + 0.09 + lean, half), (a + lean, half))
    elif plumage < 0.7:
        spot = _hsv(h, s * 0.6, v * 1.4)
        for _ in range(14):
            a, size = u(-0.8, 0.6), u(0.04, 0.08)
            add(spot, _turned(CIRCLE, a, u(-0.85, 0.85) * deep * (1 - a * a) ** 0.5, size, size))
    wing = _turned(WING, u(-0.2, 0), u(-0.15, 0), u(0.5, 0.62), deep * u(0.5, 0.65), u(-0.25, 0.3))
    add(_hsv(h + 0.02, s, v * u(0.6, 0.75)), wing)
    add(_hsv(h + 0.02, s, v * 0.45), wing[11:18])

    add(_hsv(0.11, 0.6, 0.8), (x + r * 0.8, y - r * 0.35), (x + r + u(0.15, 0.4), y + u(-0.05, 0.15)), (x + r * 0.8, y + r * 0.4))
    head = _turned(CIRCLE, x, y, r, r)
    add(hue, head)
    mark = MARKS[label // len(HUES)]
    if mark == "cap":
        add(dark, np.stack((head[:, 0], np.minimum(head[:, 1], y - r * 0.1)), 1))
    elif mark == "ring":
        add(dark, _turned(CIRCLE, x, y, r * 0.66, r * 0.66))
        add(hue, _turned(CIRCLE, x, y, r * 0.34, r * 0.34))
    else:
        for centre in (-0.45, 0.3):
            a, b, half = x + (centre - 0.14) * r, x + (centre + 0.14) * r, math.sqrt(1 - (abs(centre) + 0.12) ** 2) * r
            add(dark, (a, y - half), (b, y - half), (b, y + half), (a, y + half))
    if mark != "ring":
        add((250, 250, 250), _turned(CIRCLE, x + 0.02 * r, y + 0.12 * r, 0.16 * r, 0.16 * r))
        add((0, 0, 0), _turned(CIRCLE, x + 0.04 * r, y + 0.12 * r, 0.08 * r, 0.08 * r))
    return shapes


def _draw_birds(stream, size, indices):
    return [np.stack(column) for column in zip(*(draw_bird(stream, int(i), size) for i in indices))]


class Birds(Dataset):
    """Synthetic birds, drawn once and kept in memory. They are rendered at the network's size, so training shifts and mirrors
    them (by 3/32 of the size, reflected at the border) where photographs are resized and cropped: no pixel is resampled."""

    def __init__(self, split: str, img_size, limit=None, crop=None, augment=False, seed=0):
        self.name, self.classes, self.num_palettes, self.notes = "synthetic", SPECIES, len(PALETTES), []
        self.split, self.img_size, self.crop, self.augment, self.seed, self.epoch = split, img_size, crop, augment, seed, 0
        self.indices = _spread(BIRDS[split], limit)
        chunks = np.array_split(self.indices, max(1, len(self.indices) // 250))
        draw = partial(_draw_birds, BIRD_STREAMS[split], img_size)
        cores = _spare_cores()
        if cores > 1 and len(chunks) > 1:
            # forked: spawned processes would import torch, and rerun a caller's script that has no __main__ guard
            with ProcessPoolExecutor(cores, multiprocessing.get_context("fork"), _ignore_interrupt) as pool:
                drawn = list(pool.map(draw, chunks))
        else:
            drawn = list(map(draw, chunks))
        self.pictures, self.labels, self.palettes, self.boxes = (np.concatenate(column) for column in zip(*drawn))
        pads = [round(n * 3 / 32) for n in img_size]
        self.reflected = [np.pad(np.arange(n), pad, mode="reflect") for n, pad in zip(img_size, pads)]   # rows, columns

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        (h, w), pixels = self.img_size, self.pictures[index]
        size = (w, h)
        if self.augment:
            rows, columns = self.reflected
            rng = np.random.default_rng((self.seed, self.epoch, index))
            top, left, mirrored = rng.integers(len(rows) - h + 1), rng.integers(len(columns) - w + 1), rng.random() < 0.5
            x, y = left - (len(columns) - w) // 2, top - (len(rows) - h) // 2
            columns = columns[left:left + w]
            view = (x + w, y, x, y + h) if mirrored else (x, y, x + w, y + h)
            pixels = pixels.take(rows[top:top + h], 0).take(columns[::-1] if mirrored else columns, 1)
        else:
            view = test_view(size, self.img_size, self.crop)
            if self.crop:
                pixels = _show(Image.fromarray(pixels), size, view, self.img_size)
        return {"image": normalise(pixels), "label": int(self.labels[index]), "palette": int(self.palettes[index]),
                "boxes": torch.from_numpy(self.boxes[index:index + 1]), "size": size, "view": view, "index": index,
                "path": f"synthetic/{self.split}/{self.indices[index]:05d}.png"}


def _spare_cores() -> int:
    """Processes that this one may start: a process of torchrun's shares the machine, a daemonic one may have no children."""
    if not hasattr(os, "sched_getaffinity") or multiprocessing.current_process().daemon:
        return 1
    return len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _ignore_interrupt(*_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)                # Ctrl-C is the parent's to handle


def _spread(n: int, limit: int | None) -> np.ndarray:
    """Indices of `limit` of n samples, evenly spread."""
    return np.arange(n) if limit is None or limit >= n else np.arange(limit) * n // limit


# ---------------------------------------------------------------------------------------------------------------------
# Image files with annotations

class Pictures(Dataset):
    """Image files: `paths` below `root`, their labels, and for each an (M, 4) list of boxes."""

    def __init__(self, name, root, paths, labels, boxes, classes, split, img_size, crop, augment, seed):
        self.name, self.root, self.classes, self.notes = name, Path(root), classes, []
        self.split, self.img_size, self.crop, self.augment, self.seed, self.epoch = split, img_size, crop, augment, seed, 0
        self.paths, self.labels = paths, np.asarray(labels, np.int32)
        self.first = np.cumsum([0, *map(len, boxes)])           # image i's boxes are rows first[i] to first[i + 1]
        self.boxes = np.array([b for rows in boxes for b in rows], np.float32).reshape(-1, 4)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        path = self.root / self.paths[index]
        image, size = _decode(path, _at_least(self.img_size, self.crop, self.augment))
        if self.augment:
            view = train_view(size, self.img_size, np.random.default_rng((self.seed, self.epoch, index)))
        else:
            view = test_view(size, self.img_size, self.crop)
        boxes = torch.from_numpy(self.boxes[self.first[index]:self.first[index + 1]])
        boxes = clip_boxes(boxes, (0, 0, *size))
        return {"image": normalise(_show(image, size, view, self.img_size)), "label": int(self.labels[index]),
                "boxes": boxes, "size": size, "view": view, "index": index, "path": str(path)}


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if not any(map(str.strip, lines)):
        raise DataError(f"{path}: empty file")
    return lines


def _table(path: Path, needed: str, parse) -> dict:
    """{id: (line number, value)} of lines "<id> <rest>"; parse(rest) raises ValueError where `rest` is not as needed."""
    rows = {}
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            key, rest = line.split(maxsplit=1)
            key, value = int(key), parse(rest.strip())
        except ValueError:
            raise DataError(f"{path}:{number}: found {line[:80]!r}, needs {needed}") from None
        if key in rows:
            raise DataError(f"{path}:{number}: id {key} again, first on line {rows[key][0]}")
        rows[key] = number, value
    return rows


def _cub_box(text):
    x, y, width, height = map(float, text.split())
    if not (all(map(math.isfinite, (x, y, width, height))) and width > 0 and height > 0):
        raise ValueError
    return x, y, x + width, y + height


def _cub_flag(text):
    return {"0": False, "1": True}.get(text) if text in "01" else int("")


def _cub(root: Path, split: str):
    """The official CUB_200_2011 folder, any number of classes: images.txt, image_class_labels.txt, train_test_split.txt,
    bounding_boxes.txt (x y width height), classes.txt and images/."""
    classes = _table(root / "classes.txt", "'<class id> <name>'", str)
    if sorted(classes) != list(range(1, len(classes) + 1)):
        raise DataError(f"{root / 'classes.txt'}: class ids must be 1 to {len(classes)}, each once")
    images = _table(root / "images.txt", "'<image id> <path below images/>'", str)
    labels = _table(root / "image_class_labels.txt", "'<image id> <class id>'", int)
    train = _table(root / "train_test_split.txt", "'<image id> <1 for training, 0 for test>'", _cub_flag)
    boxes = _table(root / "bounding_boxes.txt", "'<image id> <x> <y> <width> <height>', finite, sizes above 0", _cub_box)
    for name, table in (("image_class_labels", labels), ("train_test_split", train), ("bounding_boxes", boxes)):
        for key in table.keys() - images.keys():
            raise DataError(f"{root / name}.txt:{table[key][0]}: image id {key} is not in images.txt")
        for key in images.keys() - table.keys():
            raise DataError(f"{root / name}.txt: no line for image id {key} (images.txt:{images[key][0]})")
    for key, (line, label) in labels.items():
        if label not in classes:
            raise DataError(f"{root / 'image_class_labels.txt'}:{line}: class id {label} is not in classes.txt")
    keys = [key for key in images if train[key][1] == (split == "train")]
    return (["images/" + images[key][1] for key in keys], [labels[key][1] - 1 for key in keys],
            [[boxes[key][1]] for key in keys], [classes[i + 1][1] for i in range(len(classes))])


def has_split(name: str, root: str | Path | None, split: str) -> bool:
    """Whether there is such a split: train and test always, val for the birds and for a folder with val/."""
    return split in ("train", "test") or split == "val" and (
        name == "synthetic" or name == "folder" and (Path(root) / "val").is_dir())


def load_dataset(name: str, root: str | Path | None, split: str, img_size, *, limit: int | None = None,
                 crop: int | None = None, augment: bool | None = None, seed: int = 0) -> Dataset:
    """A data set of this module's docstring. img_size is an int or (height, width). limit keeps that many samples, evenly
    spread. augment, by default for split="train", turns on the random views of (seed, dataset.epoch, index); set epoch before
    each epoch. crop=SIZE shows the centre of test pictures (see test_view). Raises DataError."""
    if name not in DATASETS:
        raise DataError(f"no data set {name!r}: needs one of {', '.join(DATASETS)}")
    if not has_split(name, root, split):
        raise DataError(f"{name} has no split {split!r}")
    augment, img_size = split == "train" if augment is None else augment, _pair(img_size)
    if crop is not None and crop < max(img_size):
        raise DataError(f"crop: found {crop}, needs at least the network's {max(img_size)} pixels")
    if name == "synthetic":
        return Birds(split, img_size, limit, crop, augment, seed)
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    paths, labels, boxes, classes = {"cub": _cub}[name](root, split)
    kept = _spread(len(paths), limit)
    return Pictures(name, root, [paths[i] for i in kept], [labels[i] for i in kept], [boxes[i] for i in kept], classes, split,
                    img_size, crop, augment, seed)


def collate(samples: list[dict]) -> dict:
    """A batch: image (B, 3, H, W), label, index and palette (B,) int64, size (B, 2) int64, view (B, 4) float32; boxes and path
    are lists."""
    batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    batch["image"] = torch.stack(batch["image"])
    for key in batch.keys() & {"label", "index", "palette", "size"}:
        batch[key] = torch.tensor(batch[key])
    batch["view"] = torch.tensor(batch["view"], dtype=torch.float32)
    return batch


def loader(dataset: Dataset, batches: list[list[int]], workers: int = 0) -> DataLoader:
    """The batches of these indices, in this order, whatever the number of workers; torch's random state is left alone."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate, generator=torch.Generator(),
                      worker_init_fn=_ignore_interrupt, pin_memory=torch.cuda.is_available())
