"""Every picture: gallery, curve, failures, loss, and overlays on a user's own photographs.

Ground truth is red as in the paper. The predicted box is cyan: red and green differ least for
colour-blind readers, red and cyan differ in lightness too. All functions take arrays and text and
return a PIL image; write_png marks a file as this project's, is_ours reads the mark.
"""

import functools
import math
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from support.common import write_atomic

CELL = 176  # pixels of a panel's longer side
MARGIN = 8
INK, PAPER, GREY, GRID = (32, 33, 36), (255, 255, 255), (110, 112, 118), (226, 227, 230)
RED, CYAN = (255, 45, 55), (60, 240, 255)  # ground truth, predicted
HEAT = np.array([(8, 10, 56), (44, 40, 140), (116, 52, 178), (196, 72, 160), (244, 124, 104),
                 (254, 190, 92), (253, 250, 178)])
LINES = {"none": (140, 140, 146), "cls": (230, 140, 0), "relation": (0, 100, 200),
         "cls-only": (0, 150, 110), "relation-only": (190, 80, 160)}  # told apart without hue too
MARK = "evaluate.py of LCTR"  # the PNG text "Software" of every picture written here


def write_png(path: str | Path, picture: Image.Image) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", MARK)
    write_atomic(path, lambda file: picture.save(file, "PNG", pnginfo=info))


def is_ours(path: str | Path) -> bool:
    """Whether a file is a picture that write_png wrote."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get("Software") == MARK
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


# ---------------------------------------------------------------- text in any script


def missing_glyphs(font: ImageFont.FreeTypeFont, text: str) -> frozenset[str]:
    """The characters that a font draws as .notdef, its empty box."""

    def shape(character: str) -> tuple:
        mask = font.getmask(character)
        return mask.size, bytes(mask)

    notdef = shape("\uffff")  # no character, so no font has it
    return frozenset(c for c in set(text) if not c.isspace() and shape(c) == notdef)


@functools.cache
def system_fonts() -> list[Path]:
    """The font files of this machine, upright sans-serif ones first."""
    home = Path.home()
    places = {"darwin": ["/System/Library/Fonts", "/Library/Fonts", home / "Library/Fonts"],
              "win32": ["C:/Windows/Fonts"]}
    places = places.get(sys.platform, ["/usr/share/fonts", "/usr/local/share/fonts",
                                       home / ".fonts", home / ".local/share/fonts"])
    found = [path for place in places for path in Path(place).rglob("*")
             if path.suffix.lower() in (".ttf", ".otf", ".ttc")]
    styles = ("bold", "italic", "oblique", "serif", "mono", "condensed", "light", "thin", "black",
              "math")
    return sorted(found, key=lambda path: (
        sum(style in path.name.lower() for style in styles), "sans" not in path.name.lower(),
        path.name))


@functools.cache
def font_file(missing: frozenset[str]) -> Path | None:
    """The first system font that has these characters, and letters and digits besides."""
    for path in system_fonts():
        try:
            font = ImageFont.truetype(path, 16)
            if not missing_glyphs(font, "aA0%" + "".join(missing)):
                return path
        except (OSError, ValueError):  # a broken font
            continue
    return None


@functools.lru_cache(4096)
def font(size: int, text: str = "") -> ImageFont.FreeTypeFont:
    """Pillow's own font, or a system font where that one lacks a character of the text."""
    own = ImageFont.load_default(size)
    missing = missing_glyphs(own, text)
    path = font_file(missing) if missing else None
    return ImageFont.truetype(path, size) if path else own


@functools.lru_cache(4096)
def writable(name: str, fallback: str) -> str:
    """The name in one line if some font can draw it, else without accents, else `fallback`."""
    name = " ".join(name.encode("utf-8", "replace").decode().split())
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    for text in (name, plain):
        if text.strip() and text.isprintable() and not missing_glyphs(font(16, text), text):
            return text
    return fallback


def class_name(classes: Sequence[str], c: int) -> str:
    return writable(str(classes[c]), f"class {c}")


def fit_text(text: str, size: int, width: float) -> str:
    """The text, shortened where it is wider than `width` pixels."""
    face = font(size, text)
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def wrap_text(text: str, size: int, width: float) -> list[str]:
    """The text's words in lines of at most `width` pixels; a longer word is shortened."""
    lines, face = [], font(size, text)
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and face.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(fit_text(word, size, width))
    return lines


def put(draw, place, text: str, size: int, colour=INK, anchor: str | None = None, **options):
    draw.text(place, text, colour, font(size, text), anchor, **options)


# ---------------------------------------------------------------- maps and boxes


def heat_colours(values: np.ndarray) -> np.ndarray:
    """[0, 1] (...) -> uint8 (..., 3), dark blue to pale yellow, evenly in lightness."""
    position = np.clip(values, 0, 1)[..., None] * (len(HEAT) - 1)
    low = np.minimum(position.astype(int), len(HEAT) - 2)
    low_colour, high_colour = HEAT[low[..., 0]], HEAT[low[..., 0] + 1]
    return (low_colour + (high_colour - low_colour) * (position - low)).round().astype(np.uint8)


def overlay(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """A map (H, W) in [0, 1] in colours over the picture, the more opaque the higher."""
    colours = Image.fromarray(heat_colours(heat))
    colours = colours.resize(picture.size, Image.Resampling.BILINEAR)
    opacity = (255 * (0.45 + 0.3 * np.clip(heat, 0, 1))).astype(np.uint8)
    grey = Image.blend(picture, picture.convert("L").convert("RGB"), 0.5)
    return Image.composite(colours, grey, Image.fromarray(opacity).resize(picture.size))


def draw_box(draw: ImageDraw.ImageDraw, box: Iterable[float], colour: tuple, width: int) -> None:
    """A half-open box, drawn on its inside with a dark seam."""
    x0, y0, x1, y1 = (round(float(v)) for v in box)
    if x1 - x0 > 2 * width and y1 - y0 > 2 * width:
        draw.rectangle((x0 - 1, y0 - 1, x1, y1), outline=INK)
        draw.rectangle((x0 + width, y0 + width, x1 - 1 - width, y1 - 1 - width), outline=INK)
    draw.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=colour, width=width)


def legend_lines(note: str, width: int) -> list[str]:
    return wrap_text(note, 14, width - 2 * MARGIN)


def draw_legend(sheet: Image.Image, note: str, annotated: bool, x: int = MARGIN, y: int = 8) -> int:
    """Boxes' colours, the map's colour bar, and below them a note; returns where it ends."""
    draw = ImageDraw.Draw(sheet)
    boxes = [(RED, "annotated")] * annotated + [(CYAN, "predicted")]
    for colour, text in boxes:
        draw.rectangle((x, y + 1, x + 18, y + 15), fill=GREY)
        draw_box(draw, (x, y + 1, x + 19, y + 16), colour, 3)
        put(draw, (x + 25, y), text, 14)
        x += 38 + round(font(14).getlength(text))
    put(draw, (x, y), "map: low", 14)
    x += 6 + round(font(14).getlength("map: low"))
    bar = Image.fromarray(heat_colours(np.linspace(0, 1, 72)[None].repeat(12, 0)))
    sheet.paste(bar, (x, y + 3))
    put(draw, (x + 78, y), "high", 14)
    for line in legend_lines(note, sheet.width):
        y += 20
        put(draw, (MARGIN, y), line, 14, GREY)
    return y + 24


# ---------------------------------------------------------------- gallery and failures


@dataclass
class Examples:
    """A few images with what one model finds in them; boxes in the input's frame."""

    picture: np.ndarray  # (n, H, W, 3) uint8
    view: Sequence[Sequence[float]]  # (n, 4): the part of each image that the network sees
    label: list[int]
    predicted: list[int]
    ground_truth: list[np.ndarray]  # (M, 4)
    heat: np.ndarray  # (n, Q, H, W) in [0, 1]
    box: np.ndarray  # (n, Q, 4)
    iou: np.ndarray  # (n, Q)


def panel_size(view: Sequence[float]) -> tuple[int, int]:
    """(width, height) at which the part of an image that the network sees fills a cell."""
    width, height = (float(view[2] - view[0]), float(view[3] - view[1]))
    return tuple(max(1, round(CELL * side / max(width, height))) for side in (width, height))


def draw_panel(examples: Examples, i: int, q: int | None) -> Image.Image:
    """Image i under map q with both boxes and the IoU; q None: as it is, with annotated boxes."""
    height, width = examples.picture.shape[1:3]
    panel = Image.fromarray(examples.picture[i])
    panel = panel.resize(panel_size(examples.view[i]), Image.Resampling.BICUBIC)
    scale = np.array([panel.width / width, panel.height / height] * 2)
    if q is not None:
        panel = overlay(panel, examples.heat[i, q])
    draw = ImageDraw.Draw(panel)
    for box in examples.ground_truth[i]:
        draw_box(draw, box * scale, RED, 2)
    if q is not None:
        draw_box(draw, examples.box[i, q] * scale, CYAN, 2)
        if len(examples.ground_truth[i]):
            iou = f"{100 * examples.iou[i, q]:.1f}"
            put(draw, (panel.width - 6, 4), iou, 17, PAPER, "ra", stroke_width=2, stroke_fill=INK)
    return panel


def evenly(n: int, k: int) -> list[int]:
    """k of n positions, evenly spread: neither the best nor the first."""
    k = min(n, k)
    return [(2 * i + 1) * n // (2 * k) for i in range(k)]


def draw_gallery(
    examples: Sequence[Examples], titles: Sequence[Sequence[tuple[str, str]]],
    classes: Sequence[str], note: str,
) -> Image.Image:
    """The paper's Figure 4: a row per image, its input, then a map for each model's couplings.

    titles[model][q]: the map's name, and which maps are multiplied.
    """
    columns = [(None, None, ("input", ""))]
    columns += [(e, q, title) for e, row in zip(examples, titles) for q, title in enumerate(row)]
    rows, line = len(examples[0].label), 22
    step, drop = CELL + MARGIN, CELL + line + MARGIN
    width = max(MARGIN + step * len(columns), 3 * step)
    top = 74 + 20 * len(legend_lines(note, width))
    sheet = Image.new("RGB", (width, top + drop * rows), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw_legend(sheet, note, any(len(boxes) for boxes in examples[0].ground_truth))
    for c, (model, q, (title, product)) in enumerate(columns):
        x = MARGIN + step * c
        put(draw, (x + CELL / 2, top - 24), fit_text(title, 15, CELL), 15, INK, "ms")
        put(draw, (x + CELL / 2, top - 7), fit_text(product, 12, CELL), 12, GREY, "ms")
        for i in range(rows):
            panel = draw_panel(model or examples[0], i, q)
            y = top + drop * i
            sheet.paste(panel, (x + (CELL - panel.width) // 2, y + (CELL - panel.height) // 2))
            if q is None:
                name = fit_text(class_name(classes, examples[0].label[i]), 13, CELL)
                put(draw, (x + CELL / 2, y + CELL + 4), name, 13, INK, "ma")
            elif q == 0:
                right = model.predicted[i] == model.label[i]
                text = f"taken for {class_name(classes, model.predicted[i])}"
                text = "class right" if right else fit_text(text, 13, min(2, len(titles[0])) * CELL)
                put(draw, (x, y + CELL + 4), text, 13, GREY if right else INK)
    return sheet


def draw_failures(
    groups: Sequence[tuple[str, Examples]], classes: Sequence[str], note: str, per_row: int
) -> Image.Image:
    """A titled row for each kind of failure that occurs; groups: (title, its examples)."""
    step, line = CELL + MARGIN, 22
    width = MARGIN + step * per_row
    titles = [wrap_text(title, 15, width - 2 * MARGIN) for title, _ in groups]
    heights = [12 + 20 * len(lines) + CELL + line + MARGIN for lines in titles]
    annotated = any(len(boxes) for _, e in groups for boxes in e.ground_truth)
    top = 36 + 20 * len(legend_lines(note, width))
    sheet = Image.new("RGB", (width, top + (sum(heights) or 40) + MARGIN), PAPER)
    draw, y = ImageDraw.Draw(sheet), top
    draw_legend(sheet, note, annotated)
    if not groups:
        put(draw, (MARGIN, y + 8), "No failure among these images.", 15)
    for lines, (_, examples), height in zip(titles, groups, heights):
        draw.line((MARGIN, y, width - MARGIN, y), GRID)
        for i, text in enumerate(lines):
            put(draw, (MARGIN, y + 5 + 20 * i), text, 15)
        first = y + 12 + 20 * len(lines)
        for i, label in enumerate(examples.label):
            x, panel = MARGIN + step * i, draw_panel(examples, i, 0)
            sheet.paste(panel, (x + (CELL - panel.width) // 2, first + (CELL - panel.height) // 2))
            caption = class_name(classes, label)
            if examples.predicted[i] != label:
                predicted = examples.predicted[i]  # perhaps no font has both scripts
                caption = writable(f"{caption} as {class_name(classes, predicted)}",
                                   f"class {label} as class {predicted}")
            caption = fit_text(caption, 13, CELL)
            put(draw, (x + CELL / 2, first + CELL + 4), caption, 13, INK, "ma")
        y += height
    return sheet


# ---------------------------------------------------------------- curves


class Plot:
    """Axes with a grid, drawn threefold and reduced at the end, so that lines are smooth."""

    ZOOM, WIDTH, HEIGHT = 3, 860, 520
    LEFT, RIGHT, TOP, BOTTOM = 70, 24, 66, 64

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float]):
        self.x_range, self.y_range = x_range, y_range
        self.sheet = Image.new("RGB", (self.ZOOM * self.WIDTH, self.ZOOM * self.HEIGHT), PAPER)
        self.draw = ImageDraw.Draw(self.sheet)

    def at(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        width, height = self.WIDTH - self.LEFT - self.RIGHT, self.HEIGHT - self.TOP - self.BOTTOM
        return (self.ZOOM * (self.LEFT + (x - x0) / (x1 - x0) * width),
                self.ZOOM * (self.TOP + (y1 - y) / (y1 - y0) * height))

    def text(self, place, words: str, anchor: str, size: int = 14, colour=INK, shift=(0, 0)):
        place = np.add(place, np.multiply(shift, self.ZOOM))
        put(self.draw, tuple(place), words, self.ZOOM * size, colour, anchor)

    def axes(self, x_ticks, y_ticks, x_label: str, title: str, note: str) -> None:
        (x0, x1), y0 = self.x_range, self.y_range[0]
        for tick, name in y_ticks:
            self.draw.line((*self.at(x0, tick), *self.at(x1, tick)), GRID, self.ZOOM)
            self.text(self.at(x0, tick), name, "rm", colour=GREY, shift=(-8, 0))
        for tick, name in x_ticks:
            x, y = self.at(tick, y0)
            self.draw.line((x, y, x, y + 5 * self.ZOOM), INK, self.ZOOM)
            self.text((x, y), name, "ma", colour=GREY, shift=(0, 9))
        self.draw.line((*self.at(x0, y0), *self.at(x1, y0)), INK, self.ZOOM)
        self.text((0, 0), title, "ls", 15, shift=(self.LEFT, 26))
        note = fit_text(note, 13, self.WIDTH - self.LEFT - self.RIGHT)
        self.text((0, 0), note, "ls", 13, GREY, shift=(self.LEFT, 48))
        self.text((0, 0), x_label, "ms", 15, shift=(self.WIDTH / 2, self.HEIGHT - 12))

    def line(self, points, colour, width: int) -> None:
        points = [self.at(*point) for point in points]
        self.draw.line(points, colour, self.ZOOM * width, joint="curve")

    def dot(self, x: float, y: float, colour, radius: int) -> None:
        (x, y), r = self.at(x, y), self.ZOOM * radius
        self.draw.ellipse((x - r, y - r, x + r, y + r), colour, PAPER, self.ZOOM)

    def key(self, entries: Sequence[tuple[str, tuple, int]]) -> None:
        """The lines' names, (name, colour, width) each, in the upper right corner."""
        zoom = self.ZOOM
        longest = max((font(zoom * 14).getlength(name) for name, _, _ in entries), default=0)
        x, y = zoom * (self.WIDTH - self.RIGHT - 8) - longest, zoom * (self.TOP + 10)
        corner = zoom * (self.WIDTH - self.RIGHT), y + zoom * (22 * len(entries) + 2)
        self.draw.rectangle((x - 44 * zoom, y - 6 * zoom, *corner), PAPER, GRID, zoom)
        for row, (name, colour, width) in enumerate(entries):
            middle = y + zoom * (22 * row + 8)
            self.draw.line((x - 36 * zoom, middle, x - 8 * zoom, middle), colour, zoom * width)
            self.text((x, middle), name, "lm")

    def finish(self) -> Image.Image:
        return self.sheet.resize((self.WIDTH, self.HEIGHT), Image.Resampling.LANCZOS)


def draw_curve(metrics: dict, coupling: str, note: str = "") -> Image.Image:
    """gt_known over thresholds, a line per coupling, a dot at the threshold in use."""
    plot, rows = Plot((0, 1), (0, 100)), metrics["couplings"]
    plot.axes([(i / 5, f"{i / 5:.1f}") for i in range(6)],
              [(i, str(i)) for i in range(0, 101, 20)],
              "threshold of the min-max normalised map (dot: the one in use)",
              "Images localised with IoU > 0.5 (GT-known), in %", note)
    baseline = metrics["baselines"]["centred_box"]
    if baseline is not None:
        for i in range(0, 100, 2):
            plot.line([(i / 100, baseline), (i / 100 + 0.01, baseline)], GREY, 1)
        plot.text(plot.at(1, baseline), "centred box", "rb", 12, GREY, shift=(0, -3))
    widths = {c: 4 if c == coupling else 2 for c in rows}
    for c, row in rows.items():
        if row["gt_known"] is not None:
            points = list(zip(metrics["thresholds"], row["gt_known_curve"]))
            plot.line(points, LINES[c], widths[c])
    for c, row in rows.items():
        if row["gt_known"] is not None:
            plot.dot(metrics["threshold"], row["gt_known"], LINES[c], 2 + widths[c])
    plot.key([(row["label"], LINES[c], widths[c]) for c, row in rows.items()])
    return plot.finish()


def ticks(low: float, high: float) -> list[tuple[float, str]]:
    """About five round numbers between two, with their text."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next((m for m in (1, 2, 5) if (high - low) / (m * step) <= 6), 10)
    first = math.ceil(low / step - 1e-9)
    return [(i * step, f"{i * step:.6g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def draw_loss(log: Sequence[dict]) -> Image.Image:
    """The training loss over steps: log.jsonl's entries, of steps ("loss") and of epochs' ends.

    A second phase's steps are counted on from a dashed line, which names it.
    """
    series, starts, offset = [], {}, 0
    for phase in dict.fromkeys(entry["phase"] for entry in log):
        entries = [entry for entry in log if entry["phase"] == phase]
        series.append([[(offset + entry["step"], entry[key]) for entry in entries
                        if math.isfinite(entry.get(key, math.nan))]
                       for key in ("loss", "mean_loss")])
        starts[offset] = phase
        offset += max(entry["step"] for entry in entries)
    losses = [loss for phase in series for points in phase for _, loss in points] or [0.0]
    low, high = min(0.0, *losses), max(losses)
    plot = Plot((0, max(offset, 1)), (low, high * 1.05 if high > low else low + 1))
    note = f"{sum(len(steps) for steps, _ in series)} logged steps"
    plot.axes(ticks(*plot.x_range), ticks(*plot.y_range), "step", "Training loss", note)
    for start, name in starts.items() if len(starts) > 1 else ():
        for i in range(0, 100, 2):
            y0, y1 = (low + part / 100 * (plot.y_range[1] - low) for part in (i, i + 1))
            plot.line([(start, y0), (start, y1)], GREY, 1)
        plot.text(plot.at(start, low), name, "lb", 13, GREY, shift=(5, -4))
    for steps, epochs in series:
        for points, colour, width in (steps, LINES["none"], 1), (epochs, LINES["relation"], 3):
            if points:
                plot.line(points, colour, width)
        for x, y in epochs if len(epochs) < 30 else ():
            plot.dot(x, y, LINES["relation"], 5)
    plot.key([("a step's loss", LINES["none"], 1),
              ("mean of an epoch, at its end", LINES["relation"], 3)])
    return plot.finish()


# ---------------------------------------------------------------- a user's own photographs


def draw_own(
    picture: Image.Image, view: Sequence[float],
    maps: Sequence[tuple[str, np.ndarray, Sequence[float]]], lines: Sequence[str],
) -> Image.Image:
    """The undimmed photograph, then each map over the part that the network saw, boxes on all.

    maps: (name, values (H, W) in [0, 1], box in the photograph's pixels). lines: what stands below.
    """
    scale = min(max(1, 480 / max(picture.size)), 720 / max(picture.size))
    size = [max(1, round(scale * side)) for side in picture.size]
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top, right, bottom = (round(scale * v) for v in view)
    left, top = min(left, size[0] - 1), min(top, size[1] - 1)  # of a thin picture a pixel is left
    corner = [left, top, max(right, left + 1), max(bottom, top + 1)]
    panels = [("photograph", picture)]
    width = max(2, max(size) // 200)
    for name, heat, box in maps:
        panel = picture.copy()
        panel.paste(overlay(picture.crop(corner), heat), corner[:2])
        draw_box(ImageDraw.Draw(panel), np.multiply(box, scale), CYAN, width)
        panels.append((name, panel))
    if len(maps) == 1:
        draw_box(ImageDraw.Draw(picture), np.multiply(maps[0][2], scale), CYAN, width)

    stacked = size[0] > 1.6 * size[1]
    column = max(size[0], 180)  # room for a title above a thin picture
    across, down = (1, len(panels)) if stacked else (len(panels), 1)
    width = max(MARGIN + across * (column + MARGIN), 480)
    lines = [line for text in lines for line in wrap_text(text, 15, width - 2 * MARGIN)]
    drop = 26 + size[1] + MARGIN
    sheet = Image.new("RGB", (width, down * drop + 40 + 22 * len(lines)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (name, panel) in enumerate(panels):
        x = MARGIN + (0 if stacked else i * (column + MARGIN))
        y = i * drop if stacked else 0
        put(draw, (x, y + 5), fit_text(name, 15, max(column, width if stacked else 0)), 15, GREY)
        sheet.paste(panel, (x, y + 26))
    y = down * drop + 4
    y = draw_legend(sheet, "", False, y=y)
    for line in lines:
        put(draw, (MARGIN, y), line, 15)
        y += 22
    return sheet
