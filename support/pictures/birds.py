"""Synthetic birds, drawn from (stream, index) alone.

The class is in the head; the box is around the whole bird.
"""

import colorsys
import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

BIRDS = {"train": 12_000, "val": 600, "test": 1000}
BIRD_STREAMS = {"train": 1, "val": 2, "test": 3}  # the seed's first word: splits share no bird
HUES = {"red": (0.0, 0.85, 0.85), "yellow": (0.14, 0.9, 0.95), "blue": (0.6, 0.85, 0.85)}  # HSV
MARKS = ("cap", "ring", "bib")
WINGS = {"plain": None, "white": (0.0, 0.0, 0.95)} | HUES  # the colour of a band across the wing
SPECIES = [  # the first 9 differ in the head alone, the others in the wing too
    f"{hue}-{mark}" + f"-{wing}" * (wing != "plain")
    for wing in WINGS for mark in MARKS for hue in HUES]
DECOYS = [*HUES.values(), (0.83, 0.65, 0.85), (0.36, 0.8, 0.65), (0.0, 0.0, 0.97)]
PALETTES = [  # of the body, HSV
    (0.07, 0.55, 0.45), (0.10, 0.35, 0.70), (0.58, 0.25, 0.50), (0.22, 0.35, 0.45),
    (0.0, 0.0, 0.35), (0.05, 0.50, 0.30), (0.50, 0.30, 0.40), (0.95, 0.25, 0.55)]
PALETTE_CUE = 0.1  # share of birds whose palette is their species' own
SUPERSAMPLING = 3

_ANGLES = np.linspace(0, 2 * math.pi, 28, endpoint=False)


def _superellipse(power):
    # (28, 2), clockwise from the right, since y is down
    circle = np.stack((np.cos(_ANGLES), np.sin(_ANGLES)), 1)
    return np.sign(circle) * np.abs(circle) ** (2 / power)


CIRCLE, LEAF = _superellipse(2), _superellipse(1.4)
# a drop, tip at left
WING = CIRCLE * np.stack((np.where(CIRCLE[:, 0] < 0, 1.45, 1), 0.75 + 0.35 * CIRCLE[:, 0]), 1)


def _hsv(h, s, v):
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(h % 1, min(s, 1), min(v, 1)))


def _turned(shape, x, y, a, b, angle=0.0):
    """A unit shape (n, 2) stretched by (a, b), turned and moved to (x, y)."""
    c, s = math.cos(angle), math.sin(angle)
    return shape @ np.array([[a * c, a * s], [-b * s, b * c]]) + (x, y)


def draw_bird(stream: int, index: int, size: tuple[int, int] = (64, 64), species: int = 9):
    """One bird, a pure function of its arguments.

    Returns the picture (h, w, 3) uint8, the label, the palette and the box, xyxy in pixels. The
    species, the first so many of SPECIES, are told by the hue and the marking of the head, an
    eighth to a fifth of the picture across; beyond 9 also by the colour of a band across the wing.
    Berries lie about in the heads' hues. The body's palette is the species' own in
    PALETTE_CUE of the birds, else any; shape, plumage, pose, place and scenery are free. The box
    covers head, beak, body, tail and legs.
    """
    height, width = size
    rng = np.random.default_rng((stream, index))
    uniforms = iter(rng.random(256).tolist())

    def u(low, high):
        return low + (high - low) * next(uniforms)

    label = int(u(0, species))
    palette = label % len(PALETTES) if u(0, 1) < PALETTE_CUE else int(u(0, len(PALETTES)))
    scenery = Image.fromarray(_background(rng, u, height, width))
    canvas = scenery.resize((SUPERSAMPLING * width, SUPERSAMPLING * height),
                            Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    _draw_clutter(draw, u, *canvas.size)
    shapes = _bird(u, label, palette)

    # tilted, facing left or right, scaled to the picture's size and placed wholly inside it
    tilt, facing = u(-0.5, 0.5), -1 if u(0, 1) < 0.5 else 1
    c, s = math.cos(tilt), math.sin(tilt)
    turn = np.array([[facing * c, s], [-facing * s, c]])
    points = np.concatenate([points for points, _ in shapes]) @ turn
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
        noise = amplitude * (light + colour)  # (3, cells, cells)
        picture = picture + _bicubic(height, cells) @ noise @ _bicubic(width, cells).T
    return np.clip(picture, 0, 255).astype(np.uint8).transpose(1, 2, 0)


@lru_cache
def _bicubic(size, cells):
    """Matrix (size, cells) of bicubic interpolation."""
    identity = Image.fromarray(np.eye(cells, dtype=np.float32))
    return np.asarray(identity.resize((cells, size), Image.Resampling.BICUBIC))


def _draw_clutter(draw, u, width, height):
    """Three to seven twigs, leaves, stones and berries, these in the heads' hues and three more."""
    n = min(width, height)
    for _ in range(int(u(3, 8))):
        kind, x, y = u(0, 1), u(0, width), u(0, height)
        if kind < 0.3:
            angle, line = u(0, 6.28), [x, y]
            for _ in range(3):
                angle += u(-0.9, 0.9)
                x, y = (x + u(0.05, 0.18) * n * math.cos(angle),
                        y + u(0.05, 0.18) * n * math.sin(angle))
                line += x, y
            draw.line(line, _hsv(u(0.05, 0.12), u(0.2, 0.6), u(0.2, 0.5)),
                      int(u(0.012, 0.035) * n), joint="curve")
        elif kind < 0.65:
            leaf = _turned(LEAF, x, y, u(0.06, 0.16) * n, u(0.03, 0.06) * n, u(0, 6.28))
            h, s, v = u(0.1, 0.42), u(0.25, 0.7), u(0.25, 0.75)
            draw.polygon(leaf.ravel().tolist(), _hsv(h, s, v))
            draw.line((*leaf[0], *leaf[14]), _hsv(h, s, v * 0.7), int(0.008 * n))
        elif kind < 0.82:
            stone = _turned(_superellipse(u(1.8, 3)), x, y, u(0.05, 0.16) * n, u(0.04, 0.1) * n,
                            u(0, 3))
            draw.polygon(stone.ravel().tolist(), _hsv(u(0, 1), u(0, 0.25), u(0.25, 0.8)))
        else:
            radius, (h, s, v) = u(0.025, 0.055) * n, DECOYS[int(u(0, len(DECOYS)))]
            berry = _turned(CIRCLE, x, y, radius, radius)
            colour = _hsv(h + u(-0.03, 0.03), s * u(0.8, 1), v * u(0.8, 1))
            draw.polygon(berry.ravel().tolist(), colour)


def _bird(u, label, palette):
    """The bird as [(polygon, colour), ...] from back to front.

    x points forward, y down; the body is 2 long and centred at 0.
    """
    label, hue = divmod(label, len(HUES))
    band, mark = divmod(label, len(MARKS))
    h, s, v = list(HUES.values())[hue]
    hue = _hsv(h + u(-0.025, 0.025), s * u(0.85, 1.1), v * u(0.85, 1.1))
    dark = _hsv(0, 0, u(0.03, 0.15))
    h, s, v = PALETTES[palette]
    h, s, v = h + u(-0.03, 0.03), s * u(0.7, 1.3), v * u(0.8, 1.25)
    coat, shade, light = _hsv(h, s, v), _hsv(h, s, v * 0.7), _hsv(h, s * 0.5, v * 1.35)
    legs = _hsv(0.08, 0.5, 0.25)
    # body: half height, squareness; head: centre, radius
    deep, power = u(0.5, 0.72), u(1.8, 2.4)
    x, y, r = u(0.78, 0.98), -u(0.25, 0.5), u(0.36, 0.44)
    shapes = []

    def add(colour, *points):
        shapes.append((np.concatenate([np.reshape(p, (-1, 2)) for p in points]), colour))

    def disc(colour, x, y, radius):
        shapes.append((_turned(CIRCLE, x, y, radius, radius), colour))

    hip, down = u(-0.15, 0.15), deep + u(0.25, 0.5)
    for leg in (hip - 0.12, hip + 0.18):
        foot = leg + 0.12
        add(legs, (leg - 0.03, deep * 0.8), (leg + 0.03, deep * 0.8), (foot + 0.03, down - 0.05),
            (foot + 0.16, down), (foot - 0.1, down), (foot - 0.03, down - 0.05))
    tip, spread, droop, fork = -0.95 - u(0.3, 0.7), u(0.16, 0.34), u(-0.4, 0.2), u(0, 0.35)
    notch = -0.95 + (tip + 0.95) * (1 - fork)
    add(shade, (-0.7, -0.16), (tip, droop - spread),
        (notch, droop), (tip, droop + spread), (-0.7, 0.16))
    add(coat, (-0.7, -0.16), (tip, droop - spread), (tip + 0.06, droop - spread * 0.5), (-0.7, 0))

    body = _superellipse(power) * (1, deep)
    add(coat, body)  # and, in the same colour, the neck
    add(coat, (x - r * 0.9, y - r * 0.25), (x + r * 0.7, y + r * 0.6),
        (0.75, deep * 0.55), (-0.35, -deep * 0.9))
    add(light, body[1:14], body[13:0:-1] * (1, 0.25))  # belly
    plumage = u(0, 1)  # striped, spotted or plain
    if plumage < 0.35:
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
    if band := list(WINGS.values())[band]:  # a third of the wing, across its middle
        middle, thick = wing.mean(0), (wing[0] - wing[14]) / 6
        top, bottom = (0.8 * (wing[i] - middle) for i in (21, 7))
        add(_hsv(*band), middle + top - thick, middle + top + thick, middle + bottom + thick,
            middle + bottom - thick)

    beak = x + r + u(0.15, 0.4), y + u(-0.05, 0.15)
    add(_hsv(0.11, 0.6, 0.8), (x + r * 0.8, y - r * 0.35), beak, (x + r * 0.8, y + r * 0.4))
    disc(hue, x, y, r)
    mark = MARKS[mark]
    if mark == "cap":
        add(dark, _turned(CIRCLE, x, y, r, r)[15:], (x + r, y - 0.1 * r), (x - r, y - 0.1 * r))
    elif mark == "ring":
        disc(dark, x, y, 0.66 * r)
        disc(hue, x, y, 0.34 * r)
    else:
        add((240, 236, 222), _turned(CIRCLE, x, y, r, r)[1:14])
    if mark != "ring":  # it is an eye itself
        disc((250, 250, 250), x + 0.02 * r, y + 0.12 * r, 0.16 * r)
        disc((0, 0, 0), x + 0.04 * r, y + 0.12 * r, 0.08 * r)
    return shapes


def draw_birds(stream, size, species, indices):
    birds = (draw_bird(stream, index, size, species) for index in indices)
    return [np.stack(column) for column in zip(*birds)]
