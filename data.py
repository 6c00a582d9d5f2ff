"""Image-level labels to train with, boxes to score with: synthetic birds, CUB-200-2011, ILSVRC, a folder of your own.

    load_dataset(name, root, split, img_size)          a torch Dataset; dataset[i] is a dict:
        image   (3, H, W) float32, normalised by ImageNet's mean and standard deviation
        label   int, an index of dataset.classes
        boxes   (M, 4) float32, half-open xyxy in pixels of the upright original; M = 0 where nothing is annotated
        size    (width, height) of the upright original
        view    (x0, y0, x1, y1): the region of the original that `image` shows; x0 > x1 in a mirrored training picture
        path    str; for birds a name, since they have no file
        index   int, the place in the data set
        palette int, birds only: the body's colours, a second image-level label

Every random choice in training is a function of (seed, epoch, index): neither workers nor processes change a result.
What a data set had to clip, drop or leave unscored stands in dataset.notes. Anything wrong in a file raises DataError,
one line that names it.

    python data.py --data cub --root CUB_200_2011 --out sheet.png      # a contact sheet with boxes: check your own data
"""
from __future__ import annotations

import argparse
import colorsys
import csv
import hashlib
import math
import multiprocessing
import os
import signal
import sys
import warnings
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset

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
    """The picture upright (EXIF) and in RGB, whatever Pillow reads: its first frame, on white where it is transparent,
    16-bit and float pixels scaled to 8 bits. Raises DataError naming the file."""
    return _decode(path)[0]


def _decode(path, at_least=None, header_only=False) -> tuple[Image.Image | None, tuple[int, int]]:
    """The upright RGB picture and the size (width, height) of its upright original. at_least=(width, height) lets a
    JPEG come at 1/2, 1/4 or 1/8 of its size, which is cheap to decode, but no smaller than that."""
    try:
        with Image.open(path) as image:
            # EXIF orientations that exchange rows and columns; of a TIFF, Pillow gives the upright size
            sideways = image.getexif().get(0x0112) in (5, 6, 7, 8) and image.format != "TIFF"
            size = image.size[::-1] if sideways else image.size
            if header_only:
                return None, size
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


def random_view(size, img_size, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """The paper's augmentation as a region of the original: both sides resized to 256/224 of img_size (height, width),
    a random crop of img_size, mirrored half of the time (x0 > x1)."""
    (width, height), (h, w) = size, img_size
    H, W = round(h * 256 / 224), round(w * 256 / 224)
    top, left = int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1))
    x0, y0, x1, y1 = left * width / W, top * height / H, (left + w) * width / W, (top + h) * height / H
    return (x1, y0, x0, y1) if rng.random() < 0.5 else (x0, y0, x1, y1)


def fixed_view(size, img_size, crop: int | None = None) -> tuple[float, float, float, float]:
    """The whole picture, or with crop=SIZE its centre: img_size (height, width), the shorter side resized to SIZE."""
    (width, height), (h, w) = size, img_size
    if crop is None:
        return 0.0, 0.0, float(width), float(height)
    W, H = crop * width // min(size), crop * height // min(size)
    left, top = round((W - w) / 2), round((H - h) / 2)
    return left * width / W, top * height / H, (left + w) * width / W, (top + h) * height / H


def load_image(path: str | Path, img_size, crop: int | None = None, rng: np.random.Generator | None = None):
    """One file as the network's input: (image (3, H, W), view, size), seen through fixed_view, with an rng random_view.
    img_size is an int or (height, width)."""
    h, w = img_size = _pair(img_size)
    least = (round(w * 256 / 224), round(h * 256 / 224)) if rng else (crop, crop) if crop else (w, h)
    picture, size = _decode(path, least)
    view = random_view(size, img_size, rng) if rng else fixed_view(size, img_size, crop)
    return normalise(_resize(picture, size, view, img_size)), view, size


def _resize(picture: Image.Image, size, view, img_size) -> np.ndarray:
    """(H, W, 3) uint8: the view of a picture, mirrored where x0 > x1. The view is in pixels of an original of `size`,
    of which the picture may be a reduced copy."""
    sx, sy = picture.width / size[0], picture.height / size[1]
    left, right = sorted((view[0], view[2]))
    box = left * sx, view[1] * sy, min(right * sx, picture.width), min(view[3] * sy, picture.height)     # min: rounding
    pixels = np.asarray(picture.resize(img_size[::-1], Image.Resampling.BILINEAR, box))
    return pixels[:, ::-1] if view[0] > view[2] else pixels


def normalise(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().sub_(MEAN).div_(STD)


def denormalise(image: torch.Tensor) -> np.ndarray:
    """(3, H, W) or (B, 3, H, W), normalised -> (H, W, 3) or (B, H, W, 3) uint8, to look at."""
    pixels = image.detach().float().cpu() * STD + MEAN
    return pixels.round().clamp(0, 255).byte().movedim(-3, -1).numpy()


def clip_boxes(boxes: torch.Tensor, view) -> torch.Tensor:
    """(M, 4) xyxy cut to a view or to (0, 0, width, height). A box outside keeps its row, with no area: a sure miss."""
    x0, y0, x1, y1 = view
    return torch.stack((boxes[:, 0::2].clamp(x0, x1), boxes[:, 1::2].clamp(y0, y1)), 2).flatten(1)


def _pair(img_size) -> tuple[int, int]:
    return (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)


def _spread(n: int, limit: int | None) -> Sequence[int]:
    """Indices of `limit` of n samples, evenly spread; of all without a limit."""
    return range(n) if limit is None or limit >= n else [i * n // limit for i in range(limit)]


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic birds: the class is in the head, the box around the whole bird

BIRDS = {"train": 12_000, "val": 600, "test": 1000}
BIRD_STREAMS = {"train": 1, "val": 2, "test": 3}            # first word of each drawing's seed: splits share no bird
HUES = {"red": (0.0, 0.85, 0.85), "yellow": (0.14, 0.9, 0.95), "blue": (0.6, 0.85, 0.85)}                      # HSV
MARKS = ("cap", "ring", "bib")
SPECIES = [f"{hue}-{mark}" for mark in MARKS for hue in HUES]
DECOYS = [*HUES.values(), (0.83, 0.65, 0.85), (0.36, 0.8, 0.65), (0.0, 0.0, 0.97)]
PALETTES = [(0.07, 0.55, 0.45), (0.10, 0.35, 0.70), (0.58, 0.25, 0.50), (0.22, 0.35, 0.45), (0.0, 0.0, 0.35),
            (0.05, 0.50, 0.30), (0.50, 0.30, 0.40), (0.95, 0.25, 0.55)]                                          # HSV
PALETTE_CUE = 0.1                                           # share of birds whose palette is their species' own
SUPERSAMPLING = 3

_ANGLES = np.linspace(0, 2 * math.pi, 28, endpoint=False)


def _superellipse(power):
    circle = np.stack((np.cos(_ANGLES), np.sin(_ANGLES)), 1)        # (28, 2), clockwise from the right, since y is down
    return np.sign(circle) * np.abs(circle) ** (2 / power)


CIRCLE, LEAF = _superellipse(2), _superellipse(1.4)
WING = CIRCLE * np.stack((np.where(CIRCLE[:, 0] < 0, 1.45, 1), 0.75 + 0.35 * CIRCLE[:, 0]), 1)     # a drop, tip at left


def _hsv(h, s, v):
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(h % 1, min(s, 1), min(v, 1)))


def _turned(shape, x, y, a, b, angle=0.0):
    """A unit shape (n, 2) stretched by (a, b), turned and moved to (x, y)."""
    c, s = math.cos(angle), math.sin(angle)
    return shape @ np.array([[a * c, a * s], [-b * s, b * c]]) + (x, y)


def draw_bird(stream: int, index: int, size: tuple[int, int] = (64, 64)):
    """One bird, a pure function of its arguments: (picture (h, w, 3) uint8, label, palette, box xyxy in pixels).

    The species is the hue and the marking of the head, an eighth to a fifth of the picture across; berries lie about in
    the same hues. The body's palette is the species' own in PALETTE_CUE of the birds, else any; shape, plumage, pose,
    place and scenery are free. The box covers head, beak, body, tail and legs."""
    height, width = size
    rng = np.random.default_rng((stream, index))
    uniforms = iter(rng.random(256).tolist())

    def u(low, high):
        return low + (high - low) * next(uniforms)

    label = int(u(0, len(SPECIES)))
    palette = label % len(PALETTES) if u(0, 1) < PALETTE_CUE else int(u(0, len(PALETTES)))
    scenery = Image.fromarray(_background(rng, u, height, width))
    canvas = scenery.resize((SUPERSAMPLING * width, SUPERSAMPLING * height), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    _draw_clutter(draw, u, *canvas.size)
    shapes = _bird(u, label, palette)

    # tilted, facing left or right, scaled to the picture's size and placed wholly inside it
    tilt, facing = u(-0.5, 0.5), -1 if u(0, 1) < 0.5 else 1
    c, s = math.cos(tilt), math.sin(tilt)
    points = np.concatenate([points for points, _ in shapes]) @ np.array([[facing * c, s], [-facing * s, c]])
    low, extent = points.min(0), np.ptp(points, axis=0)
    scale = (u(0.5, 0.85) * np.array(canvas.size) / extent).min()
    corner = (np.array(canvas.size) - 1 - scale * extent) * (u(0.02, 0.98), u(0.02, 0.98))
    points = (points - low) * scale + corner
    flat, start = points.ravel().tolist(), 0
    for polygon, colour in shapes:
        draw.polygon(flat[start:start + polygon.size], colour)
        start += polygon.size

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

    def disc(colour, x, y, radius):
        shapes.append((_turned(CIRCLE, x, y, radius, radius), colour))

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
    add(coat, body)                                                             # and, in the same colour, the neck
    add(coat, (x - r * 0.9, y - r * 0.25), (x + r * 0.7, y + r * 0.6), (0.75, deep * 0.55), (-0.35, -deep * 0.9))
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
            a = u(-0.8, 0.6)
            disc(spot, a, u(-0.85, 0.85) * deep * (1 - a * a) ** 0.5, u(0.04, 0.08))
    wing = _turned(WING, u(-0.2, 0), u(-0.15, 0), u(0.5, 0.62), deep * u(0.5, 0.65), u(-0.25, 0.3))
    add(_hsv(h + 0.02, s, v * u(0.6, 0.75)), wing)
    add(_hsv(h + 0.02, s, v * 0.45), wing[11:18])

    beak = x + r + u(0.15, 0.4), y + u(-0.05, 0.15)
    add(_hsv(0.11, 0.6, 0.8), (x + r * 0.8, y - r * 0.35), beak, (x + r * 0.8, y + r * 0.4))
    disc(hue, x, y, r)
    mark = MARKS[label // len(HUES)]
    if mark == "cap":
        add(dark, _turned(CIRCLE, x, y, r, r)[15:], (x + r, y - 0.1 * r), (x - r, y - 0.1 * r))
    elif mark == "ring":
        disc(dark, x, y, 0.66 * r)
        disc(hue, x, y, 0.34 * r)
    else:
        add((240, 236, 222), _turned(CIRCLE, x, y, r, r)[1:14])
    if mark != "ring":                                                          # the ring is an eye itself
        disc((250, 250, 250), x + 0.02 * r, y + 0.12 * r, 0.16 * r)
        disc((0, 0, 0), x + 0.04 * r, y + 0.12 * r, 0.08 * r)
    return shapes


def _draw_birds(stream, size, indices):
    return [np.stack(column) for column in zip(*(draw_bird(stream, index, size) for index in indices))]


class Birds(Dataset):
    """Synthetic birds, drawn once, on all cores, and kept in memory: 12,000 of 64 x 64 take 150 MB. They are drawn at
    the network's size, so in training they are shifted (by up to 3/32 of it, reflected at the border) and mirrored; the
    resized crop that photographs get would only blur them."""

    def __init__(self, split: str, img_size, limit=None, crop=None, augment=False, seed=0):
        self.name, self.split, self.img_size, self.crop = "synthetic", split, img_size, crop
        self.classes, self.num_palettes, self.notes = SPECIES, len(PALETTES), []
        self.augment, self.seed, self.epoch = augment, seed, 0
        self.indices = _spread(BIRDS[split], limit)
        chunks = [self.indices[i:i + 250] for i in range(0, len(self.indices), 250)]
        draw = partial(_draw_birds, BIRD_STREAMS[split], img_size)
        processes = min(_cores(), len(chunks))
        if processes > 1:       # forked: spawned ones import torch first, and rerun a script without a __main__ guard
            with ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _ignore_interrupt) as pool:
                drawn = list(pool.map(draw, chunks))
        else:
            drawn = list(map(draw, chunks))
        self.pictures, self.labels, self.palettes, self.boxes = map(np.concatenate, zip(*drawn))
        self.pads = [round(side * 3 / 32) for side in img_size]                 # rows, columns
        self.reflected = [np.pad(np.arange(side), pad, mode="reflect") for side, pad in zip(img_size, self.pads)]

    annotated = property(lambda self: len(self))                # all birds have a box

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        (h, w), pixels = self.img_size, self.pictures[index]                    # (H, W, 3)
        if self.augment:
            rng = np.random.default_rng((self.seed, self.epoch, index))
            top, left = (int(rng.integers(2 * pad + 1)) for pad in self.pads)
            rows, columns = self.reflected[0][top:top + h], self.reflected[1][left:left + w]
            y, x = top - self.pads[0], left - self.pads[1]
            view = (x, y, x + w, y + h)
            if rng.random() < 0.5:
                columns, view = columns[::-1], (x + w, y, x, y + h)
            pixels = pixels.take(rows, 0).take(columns, 1)
        else:
            view = fixed_view((w, h), (h, w), self.crop)
            if self.crop:
                pixels = _resize(Image.fromarray(pixels), (w, h), view, (h, w))
        return {"image": normalise(pixels), "label": int(self.labels[index]), "palette": int(self.palettes[index]),
                "boxes": torch.from_numpy(self.boxes[index:index + 1]), "size": (w, h), "view": view, "index": index,
                "path": f"synthetic/{self.split}/{self.indices[index]:05d}"}


def _cores() -> int:
    """How many processes may draw: torchrun's share the machine, a daemonic one may have no children."""
    if not hasattr(os, "sched_getaffinity") or multiprocessing.current_process().daemon:
        return 1
    return len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _ignore_interrupt(*_):
    for number in (signal.SIGINT, signal.SIGTERM):              # both are the parent's to handle
        signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------------------------
# Image files: listings, annotations, and the data set over them

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".avif"}


class Paths:
    """A growing list of paths in one byte string: a million take tens of megabytes, and forked workers share them."""

    def __init__(self, paths=()):
        self.text, self.ends = bytearray(), array("q", [0])
        for path in paths:
            self.append(path)

    def append(self, path: str):
        self.text += os.fsencode(path)
        self.ends.append(len(self.text))

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)                             # ends a for loop
        return os.fsdecode(bytes(self.text[self.ends[index]:self.ends[index + 1]]))


class Samples(NamedTuple):
    """What a reader of annotations returns: image i is folder / paths[i], of class classes[labels[i]]; boxes[i] is its
    list of (xmin, ymin, xmax, ymax)."""
    classes: list[str]
    folder: Path
    paths: Paths
    labels: list[int]
    boxes: list[list]
    notes: list[str]


def _read(path: Path) -> str:
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if not text.strip():
        raise DataError(f"{path}: empty file")
    return text


def _box(*numbers) -> tuple[float, ...]:
    """xmin, ymin, xmax, ymax from their texts; ValueError where they are no box."""
    x0, y0, x1, y1 = box = tuple(map(float, numbers))
    if not (all(map(math.isfinite, box)) and x0 < x1 and y0 < y1):
        raise ValueError
    return box


def _names(folder: Path, folders: bool = False) -> list[str]:
    """The sorted names of a folder's image files, or of its folders; hidden ones left out."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and (
                entry.is_dir() if folders else os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file()))
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; needs to be a folder") from None


def _by_class(folder: Path, classes: list[str], complete: bool) -> tuple[Paths, array]:
    """Paths "<class>/<name>" and labels of the images in <folder>/<class>/. complete: every class must have some."""
    there, paths, labels = _names(folder, folders=True), Paths(), array("i")
    for name in there:
        if name not in classes:
            raise DataError(f"{folder / name}: not one of the {len(classes)} classes that training has")
    for label, name in enumerate(classes):
        names = _names(folder / name) if complete or name in there else []
        if complete and not names:
            raise DataError(f"{folder / name}: no images in this class's folder")
        for image in names:
            paths.append(f"{name}/{image}")
            labels.append(label)
    return paths, labels


def _table(path: Path, needed: str, parse) -> dict:
    """{id: (line number, value)} of lines "<id> <rest>"; parse(rest) raises ValueError or KeyError unless as needed."""
    rows = {}
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line.strip():
            try:
                key, rest = line.split(maxsplit=1)
                key, value = int(key), parse(rest.strip())
            except (ValueError, KeyError):
                raise DataError(f"{path}:{number}: found {line[:80]!r}, needs {needed}") from None
            if key in rows:
                raise DataError(f"{path}:{number}: id {key} is on line {rows[key][0]} already")
            rows[key] = number, value
    return rows


def read_cub(root: Path, split: str, limit: int | None) -> Samples:
    """The official CUB_200_2011 folder, with any number of classes: classes.txt, images.txt, image_class_labels.txt,
    train_test_split.txt, bounding_boxes.txt (x y width height) and images/. Every image needs a line in each."""
    def box(text):
        x, y, width, height = map(float, text.split())
        return _box(x, y, x + width, y + height)

    classes = _table(root / "classes.txt", "'<class id> <name>'", str)
    if classes.keys() != set(range(1, len(classes) + 1)):
        raise DataError(f"{root / 'classes.txt'}: found {len(classes)} ids from {min(classes)} to {max(classes)}, "
                        f"needs 1 to {len(classes)}")
    images = _table(root / "images.txt", "'<image id> <path below images/>'", str)
    lines = {}
    for number, path in images.values():
        if lines.setdefault(path, number) != number:
            raise DataError(f"{root / 'images.txt'}:{number}: {path} is on line {lines[path]} already")

    def annotation(name, needed, parse):
        table = _table(root / name, needed, parse)
        for key in table:
            if key not in images:
                raise DataError(f"{root / name}:{table[key][0]}: image id {key} is not in images.txt")
        for key in images:
            if key not in table:
                raise DataError(f"{root / name}: no line for image id {key} (images.txt:{images[key][0]})")
        return {key: value for key, (_, value) in table.items()}

    labels = annotation("image_class_labels.txt", "'<image id> <class id>', a class of classes.txt",
                        {str(key): key - 1 for key in classes}.__getitem__)
    splits = annotation("train_test_split.txt", "'<image id> <1 for train, 0 for test>'",
                        {"1": "train", "0": "test"}.__getitem__)
    boxes = annotation("bounding_boxes.txt", "'<image id> <x> <y> <width> <height>', finite, the sizes above 0", box)

    keys = [key for key in images if splits[key] == split]
    keys = [keys[i] for i in _spread(len(keys), limit)]
    for number, path in map(images.get, keys):
        if not os.path.isfile(root / "images" / path):
            raise DataError(f"{root / 'images' / path}: no such image (images.txt:{number})")
    names, paths = [classes[i + 1][1] for i in range(len(classes))], Paths(images[key][1] for key in keys)
    return Samples(names, root / "images", paths, [labels[key] for key in keys], [[boxes[key]] for key in keys], [])


def read_ilsvrc(root: Path, split: str, limit: int | None) -> Samples:
    """ILSVRC 2012 as the challenge lays it out (CLS-LOC); "test" is its validation set, "val" does not exist.

    images       train/<wnid>/*.JPEG, and val/*.JPEG or val/<wnid>/*.JPEG,
                 in root/ILSVRC/Data/CLS-LOC, root/Data/CLS-LOC or root
    annotations  for val only, <the image's name>.xml, flat or in folders, in root/ILSVRC/Annotations/CLS-LOC/val,
                 root/Annotations/CLS-LOC/val, root/Annotations/val or beside the images; a flat val's labels are theirs
    classes      the lines "<wnid> <words>" of LOC_synset_mapping.txt in root or above it, else train's folders, sorted
    """
    def first(*candidates):
        return next((path for path in candidates if path.exists()), None)

    images = first(root / "ILSVRC/Data/CLS-LOC", root / "Data/CLS-LOC") or root
    mapping = first(root / "LOC_synset_mapping.txt", root.resolve().parent / "LOC_synset_mapping.txt")
    if mapping:
        words = {}
        for number, line in enumerate(_read(mapping).strip().split("\n"), 1):
            wnid, _, rest = line.strip().partition(" ")
            if not rest or wnid in words:
                raise DataError(f"{mapping}:{number}: found {line[:80]!r}, needs '<wnid> <words>', each wnid once")
            words[wnid] = rest
        wnids, classes = list(words), list(words.values())
    else:
        wnids = classes = _names(images / "train", folders=True)
    if split == "train":
        paths, labels = _by_class(images / "train", wnids, complete=True)
        kept = _spread(len(paths), limit)
        paths, labels = Paths(paths[i] for i in kept), array("i", (labels[i] for i in kept))
        return Samples(classes, images / "train", paths, labels, [()] * len(kept), [])

    folder, names, notes = images / "val", _names(images / "val"), []
    paths, labels = (Paths(names), None) if names else _by_class(folder, wnids, complete=False)
    stems = {}
    for i, path in enumerate(paths):
        if (twin := stems.setdefault(Path(path).stem, i)) != i:
            raise DataError(f"{folder / path}: shares its name with {paths[twin]}, needs its own for its annotation")
    annotations = first(root / "ILSVRC/Annotations/CLS-LOC/val", root / "Annotations/CLS-LOC/val",
                        root / "Annotations/val")
    files = {file.stem: file for file in sorted((annotations or folder).rglob("*.xml"))}
    if labels is None and not files:
        raise DataError(f"{annotations or folder}: no XML annotations, needs them for the labels of {folder}")
    if orphans := sorted(files.keys() - stems.keys()):
        notes.append(f"{len(orphans)} annotations have no image and are ignored (the first: {files[orphans[0]]})")
    if labels is None and (bare := [i for stem, i in stems.items() if stem not in files]):
        notes.append(f"{len(bare)} images have no annotation and are left out (the first: {folder / paths[bare[0]]})")
    kept = [i for stem, i in stems.items() if labels is not None or stem in files]
    kept = [kept[i] for i in _spread(len(kept), limit)]
    label_of, kept_labels, boxes = {wnid: label for label, wnid in enumerate(wnids)}, array("i"), []
    for i in kept:
        file, wnid = files.get(Path(paths[i]).stem), None if labels is None else wnids[labels[i]]
        wnid, rows = _read_xml(file, wnid) if file else (wnid, [])
        if wnid not in label_of:
            raise DataError(f"{file}: class {wnid!r} is not one of the {len(wnids)} that training has")
        kept_labels.append(label_of[wnid])
        boxes.append(rows)
    return Samples(classes, folder, Paths(paths[i] for i in kept), kept_labels, boxes, notes)


def _read_xml(file: Path, wnid: str | None) -> tuple[str, list]:
    """(the image's class, its boxes): the boxes of class `wnid`, by default the first object's."""
    text, objects = _read(file), []
    if "<!DOCTYPE" in text:                                     # which may declare entities that expand without end
        raise DataError(f"{file}: found a document type declaration, needs a plain annotation")
    try:
        found = ElementTree.fromstring(text).findall("object")
    except ElementTree.ParseError as error:
        raise DataError(f"{file}:{error.position[0]}: not well-formed XML ({error})") from None
    for number, item in enumerate(found, 1):
        try:
            box = _box(*(item.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")))
            objects.append((item.findtext("name").strip(), box))
        except (ValueError, TypeError, AttributeError):
            raise DataError(f"{file}: object {number} needs a <name> and a <bndbox> of finite xmin < xmax, ymin < ymax"
                            ) from None
    wnid = wnid or (objects[0][0] if objects else None)
    boxes = [box for name, box in objects if name == wnid]
    if not boxes:
        raise DataError(f"{file}: found {len(objects)} objects, needs one of the image's class {wnid or ''}".rstrip())
    return wnid, boxes


def read_folder(root: Path, split: str, limit: int | None, classes: Sequence[str] | None = None) -> Samples:
    """Your own: train/<class>/*, test/<class>/*, perhaps val/<class>/*; the classes are train's folders, sorted.
    boxes.csv, if any, has rows path,xmin,ymin,xmax,ymax, the path from root, any number per image, perhaps below a
    header of these words."""
    classes = list(classes) if classes else _names(root / "train", folders=True)
    paths, labels = _by_class(root / split, classes, complete=split == "train")
    kept = _spread(len(paths), limit)
    paths, labels = Paths(paths[i] for i in kept), [labels[i] for i in kept]
    boxes, file, astray = {f"{split}/{path}": [] for path in paths}, root / "boxes.csv", []
    rows = csv.reader(_read(file).split("\n") if file.exists() else (), strict=True)
    try:
        for row in rows:
            name, *numbers = [field.strip() for field in row] or [""]
            if not any(row) or rows.line_num == 1 and [n.lower() for n in numbers] == ["xmin", "ymin", "xmax", "ymax"]:
                continue
            name = os.path.normpath(name.replace("\\", "/"))
            try:
                box = _box(*numbers)
            except ValueError:
                raise DataError(f"{file}:{rows.line_num}: found {','.join(row)[:80]!r}, needs path,xmin,ymin,xmax,ymax "
                                "with finite xmin < xmax, ymin < ymax") from None
            if name in boxes:
                boxes[name].append(box)
            elif not os.path.isfile(root / name):
                astray.append((rows.line_num, name))
    except csv.Error as error:
        raise DataError(f"{file}:{rows.line_num}: not a row of a CSV file ({error})") from None
    notes = []
    if astray:
        notes.append(f"{len(astray)} rows of {file} name no image (the first: line {astray[0][0]}, {astray[0][1]!r})")
    return Samples(classes, root / split, paths, labels, list(boxes.values()), notes)


class Pictures(Dataset):
    """Image files with a label each and any number of boxes."""

    def __init__(self, name, samples, split, img_size, crop, augment, seed):
        self.classes, self.folder, self.paths, labels, boxes, self.notes = samples
        if not len(labels):
            raise DataError(f"{self.folder}: no images for split {split!r} of {name}")
        self.name, self.split, self.img_size, self.crop = name, split, img_size, crop
        self.augment, self.seed, self.epoch = augment, seed, 0
        self.labels = np.array(labels, np.int32)
        self.first = np.cumsum([0, *map(len, boxes)])           # image i's boxes are rows first[i] to first[i + 1]
        self.boxes = torch.tensor([box for rows in boxes for box in rows], dtype=torch.float32).view(-1, 4)
        self.annotated = int((np.diff(self.first) > 0).sum())   # images that have a box
        if split != "train":
            self._check()

    def _check(self):
        """Opens every scored image's header: what is wrong with it or its boxes shows now, not after an hour."""
        sizes = torch.tensor([_decode(self.folder / path, header_only=True)[1] for path in self.paths])     # (n, 2)
        owner = torch.arange(len(self)).repeat_interleave(torch.tensor(np.diff(self.first)))                # (boxes,)
        cut = self.boxes.clamp(min=0).minimum(sizes.repeat(1, 2)[owner])                                    # (boxes, 4)
        left = (cut[:, 2:] > cut[:, :2]).all(1)
        if clipped := int((cut != self.boxes)[left].any(1).sum()):
            self.notes.append(f"{clipped} boxes reach beyond their images and are clipped")
        if outside := int((~left).sum()):
            self.notes.append(f"{outside} boxes lie outside their images and are left out")
        self.annotated = len(owner[left].unique())
        if unscored := len(self) - self.annotated:
            self.notes.append(f"{unscored} of {len(self)} {self.split} images have no box and are not scored")

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        path = self.folder / self.paths[index]
        rng = np.random.default_rng((self.seed, self.epoch, index)) if self.augment else None
        image, view, size = load_image(path, self.img_size, self.crop, rng)
        boxes = clip_boxes(self.boxes[self.first[index]:self.first[index + 1]], (0, 0, *size))
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
        return {"image": image, "label": int(self.labels[index]), "boxes": boxes, "size": size, "view": view,
                "index": index, "path": str(path)}


READERS = {"cub": read_cub, "ilsvrc": read_ilsvrc, "folder": read_folder}
DATASETS = ("synthetic", *READERS)


def has_split(name: str, root: str | Path | None, split: str) -> bool:
    """Whether there is such a split: train and test always, val for the birds and for a folder with val/."""
    has_val = name == "synthetic" or name == "folder" and bool(root) and os.path.isdir(Path(root) / "val")
    return split in ("train", "test") or split == "val" and has_val


def load_dataset(name: str, root: str | Path | None, split: str, img_size, *, limit: int | None = None,
                 crop: int | None = None, augment: bool | None = None, seed: int = 0,
                 classes: Sequence[str] | None = None) -> Dataset:
    """A data set as at the top of this file. img_size is an int or (height, width). limit keeps that many samples,
    evenly spread. augment, by default on for split="train", takes random views, from (seed, dataset.epoch, index): set
    epoch before each epoch. crop=SIZE is for test pictures (see fixed_view). classes: those of a folder
    that has no train/ of its own. Raises DataError."""
    augment, img_size = split == "train" if augment is None else augment, _pair(img_size)
    if name not in DATASETS:
        raise DataError(f"no data set {name!r}: needs one of {', '.join(DATASETS)}")
    if name != "synthetic" and not (root and os.path.isdir(root)):
        raise DataError(f"{root}: no such folder; {name} needs the data's")
    if not has_split(name, root, split):
        raise DataError(f"{name} has no split {split!r}")
    if crop is not None and crop < max(img_size):
        raise DataError(f"crop: found {crop}, needs at least the network's {max(img_size)} pixels")
    if name == "synthetic":
        return Birds(split, img_size, limit, crop, augment, seed)
    known = {"classes": classes} if name == "folder" else {}
    return Pictures(name, READERS[name](Path(root), split, limit, **known), split, img_size, crop, augment, seed)


def digest(dataset: Dataset) -> str:
    """A hash of the samples' paths below the data set's folder and of their labels."""
    if isinstance(dataset, Birds):
        paths = [f"{dataset.split}/{index}" for index in dataset.indices]
    else:
        paths = dataset.paths
    pairs = "".join(f"{path}\t{label}\n" for path, label in zip(paths, dataset.labels))
    return hashlib.sha256(os.fsencode(pairs)).hexdigest()


def collate(samples: list[dict]) -> dict:
    """A batch: image (B, 3, H, W), label, index and palette (B,) int64, size (B, 2) int64, view (B, 4) float32; boxes
    and path are lists."""
    batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    batch["image"] = torch.stack(batch["image"])
    for key in batch.keys() & {"label", "index", "palette", "size"}:
        batch[key] = torch.tensor(batch[key])
    batch["view"] = torch.tensor(batch["view"], dtype=torch.float32)
    return batch


def _pack(samples):
    batch = collate(samples)
    batch["counts"], batch["boxes"] = [len(boxes) for boxes in batch["boxes"]], torch.cat(batch["boxes"])
    return batch                                                # a tensor out of a worker costs a file descriptor


def loader(dataset: Dataset, batches: list[list[int]], workers: int = 0) -> Iterator[dict]:
    """Batches of these indices, in this order, whatever the number of workers; torch's random state is left alone."""
    loaded = DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=_pack,
                        generator=torch.Generator(), worker_init_fn=_ignore_interrupt,
                        pin_memory=torch.cuda.is_available())
    try:
        for batch in loaded:
            batch["boxes"] = list(batch["boxes"].split(batch.pop("counts")))
            yield batch
    except DataError as error:
        raise error.with_traceback(None)                        # whose frames would keep the workers


def main() -> None:
    parser = argparse.ArgumentParser(description="A contact sheet: 24 samples of a data set, with their boxes.")
    parser.add_argument("--data", choices=DATASETS, default="synthetic")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--split", choices=("train", "val", "test"), default="test")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    args = parser.parse_args()
    if args.data != "synthetic" and args.root is None:
        parser.error(f"--root: --data {args.data} needs the folder of the data")
    side = 192
    dataset = load_dataset(args.data, args.root, args.split, 64 if args.data == "synthetic" else side, limit=24)
    sheet = Image.new("RGB", (6 * side, -(-len(dataset) // 6) * side))
    for i, sample in enumerate(dataset[i] for i in range(len(dataset))):
        tile = Image.fromarray(denormalise(sample["image"])).resize((side, side))
        draw = ImageDraw.Draw(tile)
        x0, y0, x1, y1 = sample["view"]
        for box in (sample["boxes"].view(-1, 2, 2) - torch.tensor([x0, y0])) * side / torch.tensor([x1 - x0, y1 - y0]):
            draw.rectangle([*box.amin(0), *box.amax(0)], outline="red")
        draw.text((2, 2), dataset.classes[sample["label"]], fill="white", stroke_width=1, stroke_fill="black")
        sheet.paste(tile, (i % 6 * side, i // 6 * side))
    partial_file = args.out.with_name(f"partial-{args.out.name}")
    sheet.save(partial_file)
    partial_file.replace(args.out)
    print(*dataset.notes, f"{args.out}: {len(dataset)} samples, {len(dataset.classes)} classes", sep="\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: error: {error}")
