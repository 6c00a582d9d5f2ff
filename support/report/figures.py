"""Every picture: gallery, curve, failures, loss, and overlays on a user's own photographs.

Ground truth is red as in the paper. The predicted box is cyan: red and green differ least for
colour-blind readers, red and cyan differ in lightness too. All functions take arrays and text and
return a PIL image; write_png marks a file as this project's, is_ours reads the mark.
"""

import functools
import itertools
import math
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from support.common import write_atomic

CELL = 176  # pixels of a panel's longer side
MARGIN = 8
LINE = 20  # pixels from one line of text to the next
INK, PAPER, GREY, GRID = (32, 33, 36), (255, 255, 255), (110, 112, 118), (226, 227, 230)
RED, CYAN = (255, 45, 55), (60, 240, 255)  # ground truth, predicted
HEAT = np.array([(8, 10, 56), (44, 40, 140), (116, 52, 178), (196, 72, 160), (244, 124, 104),
                 (254, 190, 92), (253, 250, 178)])
LINES = {"none": (140, 140, 146), "cls": (230, 140, 0), "relation": (0, 100, 200),
         "cls-only": (0, 150, 110), "relation-only": (190, 80, 160)}  # differ in lightness too
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


# ---------------------------------------------------------------- text: Pillow's font has ASCII

@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def unaccented(text: str) -> str:
    """In one line, without accents and other marks above or below a letter."""
    decomposed = unicodedata.normalize("NFKD", " ".join(text.split()))
    return "".join(c for c in decomposed if not unicodedata.combining(c))


def class_name(classes: Sequence[str], c: int) -> str:
    """The class's name without accents, or its number where the font cannot write the rest."""
    name = unaccented(str(classes[c]))
    return name if name.isascii() and name.isprintable() and name else f"class {c}"


def fit_text(text: str, size: int, width: float) -> str:
    """The text, shortened where it is wider than `width` pixels; what is not ASCII is escaped."""
    text = unaccented(text).encode("ascii", "backslashreplace").decode()
    if font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def wrap_text(text: str, size: int, width: float) -> list[str]:
    """The text in lines of about `width` pixels."""
    return [fit_text(line, size, width) for line in textwrap.wrap(text, int(1.95 * width / size))]


def put(draw, position, text: str, size: int, colour=INK, anchor: str | None = None, **options):
    draw.text(position, text, colour, font(size), anchor, **options)


# ---------------------------------------------------------------- maps and boxes


def heat_colours(values: np.ndarray) -> np.ndarray:
    """[0, 1] (...) -> uint8 (..., 3), dark blue to pale yellow, evenly in lightness."""
    positions = np.linspace(0, 1, len(HEAT))
    colours = [np.interp(values, positions, channel) for channel in HEAT.T]
    return np.stack(colours, -1).round().astype(np.uint8)


def overlay(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """A map (H, W) in [0, 1] in colours over the picture, the more opaque the higher."""
    colours = Image.fromarray(heat_colours(heat))
    colours = colours.resize(picture.size, Image.Resampling.BILINEAR)
    opacity = (255 * (0.45 + 0.3 * np.clip(heat, 0, 1))).astype(np.uint8)
    grey = Image.blend(picture, picture.convert("L").convert("RGB"), 0.5)
    return Image.composite(colours, grey, Image.fromarray(opacity).resize(picture.size))


def draw_box(draw: ImageDraw.ImageDraw, box: Iterable[float], colour: tuple, width: int) -> None:
    """A half-open box, drawn on its inside between two dark seams."""
    x0, y0, x1, y1 = (round(float(v)) for v in box)
    draw.rectangle((x0 - 1, y0 - 1, max(x1, x0), max(y1, y0)), outline=INK, width=width + 2)
    draw.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=colour, width=width)


def draw_legend(sheet: Image.Image, annotated: bool) -> None:
    """The boxes' colours and the map's colour bar, in the first line of a sheet."""
    draw, x, y = ImageDraw.Draw(sheet), MARGIN, MARGIN
    for colour, text in [(RED, "annotated")] * annotated + [(CYAN, "predicted")]:
        draw_box(draw, (x, y + 1, x + 19, y + 16), colour, 3)
        put(draw, (x + 25, y), text, 14)
        x += 38 + round(font(14).getlength(text))
    put(draw, (x, y), "map: low", 14)
    x += 6 + round(font(14).getlength("map: low"))
    bar = Image.fromarray(heat_colours(np.linspace(0, 1, 72)[None].repeat(12, 0)))
    sheet.paste(bar, (x, y + 3))
    put(draw, (x + 78, y), "high", 14)


def draw_sheet(
    note: str, annotated: bool, columns: Sequence[tuple[str, str]],
    rows: Sequence[tuple[str, Sequence[tuple]]], cell: int = CELL,
) -> Image.Image:
    """Rows of panels below a legend and a note.

    columns: a title and a smaller one above each panel of the first row, or none. rows: a title, or
    "", and the row's panels (see draw_row). cell: the width that a panel is centred in.
    """
    step = cell + MARGIN
    width = max(MARGIN + step * max((len(panels) for _, panels in rows), default=0), 540)
    lines = wrap_text(note, 14, width - 2 * MARGIN)
    head = Image.new("RGB", (width, 40 + LINE * len(lines) + 36 * bool(columns)), PAPER)
    draw = ImageDraw.Draw(head)
    draw_legend(head, annotated)
    for i, line in enumerate(lines):
        put(draw, (MARGIN, 32 + LINE * i), line, 14, GREY)
    for c, (title, product) in enumerate(columns):
        middle = MARGIN + step * c + cell / 2
        put(draw, (middle, head.height - 24), fit_text(title, 15, cell), 15, INK, "ms")
        put(draw, (middle, head.height - 7), fit_text(product, 12, cell), 12, GREY, "ms")

    strips = [head, *(draw_row(title, panels, cell, width) for title, panels in rows)]
    sheet = Image.new("RGB", (width, sum(strip.height for strip in strips)), PAPER)
    y = 0
    for strip in strips:
        sheet.paste(strip, (0, y))
        y += strip.height
    return sheet


def draw_row(title: str, panels: Sequence[tuple], cell: int, width: int) -> Image.Image:
    """A title, if any, above panels from left to right: (panel, caption, the caption's colour).

    A caption runs on below the panels to the right that have none.
    """
    lines = wrap_text(title, 15, width - 2 * MARGIN)
    drop, height = LINE * len(lines) + 12 * bool(lines), max(panel.height for panel, *_ in panels)
    row = Image.new("RGB", (width, drop + height + 30), PAPER)
    draw = ImageDraw.Draw(row)
    if lines:
        draw.line((MARGIN, 0, width - MARGIN, 0), GRID)
    for i, line in enumerate(lines):
        put(draw, (MARGIN, 6 + LINE * i), line, 15)
    for c, (panel, caption, colour) in enumerate(panels):
        x = MARGIN + (cell + MARGIN) * c
        row.paste(panel, (x + (cell - panel.width) // 2, drop + (height - panel.height) // 2))
        without = itertools.takewhile(lambda panel: not panel[1], panels[c + 1:])
        room = cell + (cell + MARGIN) * len(list(without))
        put(draw, (x, drop + height + 4), fit_text(caption, 13, room), 13, colour)
    return row


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


def draw_panel(examples: Examples, i: int, q: int | None) -> Image.Image:
    """Image i under map q with both boxes and the IoU; q None: as it is, with annotated boxes.

    It has the shape of the part of the image that the network sees, and fills a cell.
    """
    x0, y0, x1, y1 = examples.view[i]
    size = [max(1, round(CELL * side / max(x1 - x0, y1 - y0))) for side in (x1 - x0, y1 - y0)]
    height, width = examples.picture.shape[1:3]
    scale = np.array([size[0] / width, size[1] / height] * 2)
    panel = Image.fromarray(examples.picture[i]).resize(size, Image.Resampling.BICUBIC)
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


def draw_gallery(
    examples: Sequence[Examples], titles: Sequence[Sequence[tuple[str, str]]],
    classes: Sequence[str], note: str,
) -> Image.Image:
    """The paper's Figure 4: a row per image, its input, then a map for each model's couplings.

    titles[model][q]: the map's name, and which maps are multiplied.
    """
    first, rows = examples[0], []
    for i, label in enumerate(first.label):
        panels = [(draw_panel(first, i, None), class_name(classes, label), INK)]
        for model, names in zip(examples, titles):
            caption = f"predicted: {class_name(classes, model.predicted[i])}"
            colour = GREY if model.predicted[i] == label else INK
            panels += [(draw_panel(model, i, q), caption * (q == 0), colour)
                       for q in range(len(names))]
        rows.append(("", panels))
    columns = [("input", ""), *(title for names in titles for title in names)]
    return draw_sheet(note, any(map(len, first.ground_truth)), columns, rows)


def draw_failures(
    groups: Sequence[tuple[str, Examples]], classes: Sequence[str], note: str
) -> Image.Image:
    """A titled row for each kind of failure that occurs; groups: (title, its examples)."""
    rows = []
    for title, examples in groups:
        panels = []
        for i, (label, predicted) in enumerate(zip(examples.label, examples.predicted)):
            caption = class_name(classes, label)
            caption += f" as {class_name(classes, predicted)}" * (predicted != label)
            panels.append((draw_panel(examples, i, 0), caption, INK))
        rows.append((title, panels))
    annotated = any(len(boxes) for _, examples in groups for boxes in examples.ground_truth)
    return draw_sheet(note if rows else "No image fails. " + note, annotated, [], rows)


# ---------------------------------------------------------------- a user's own photographs

def draw_own(
    picture: Image.Image, view: Sequence[float], titles: Sequence[tuple[str, str]],
    heat: np.ndarray, boxes: Sequence[Sequence[float]], caption: str, note: str,
) -> Image.Image:
    """The undimmed photograph, then each map over the part that the network saw, with its box.

    titles: Q maps' names, and what is multiplied. heat (Q, H, W) in [0, 1], boxes (Q, 4) in the
    photograph's pixels; a single one is drawn on the photograph too.
    """
    scale = 560 / max(picture.size)
    size = [max(1, round(scale * side)) for side in picture.size]
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top, right, bottom = (round(scale * v) for v in view)
    left, top = min(left, size[0] - 1), min(top, size[1] - 1)  # of a thin picture a pixel is left
    seen = (left, top, max(right, left + 1), max(bottom, top + 1))
    panels = [(picture, caption, INK)]
    for values, box in zip(heat, boxes):
        panel = picture.copy()
        panel.paste(overlay(picture.crop(seen), values), seen[:2])
        draw_box(ImageDraw.Draw(panel), np.multiply(box, scale), CYAN, 3)
        panels.append((panel, "", INK))
    if len(boxes) == 1:
        draw_box(ImageDraw.Draw(picture), np.multiply(boxes[0], scale), CYAN, 3)
    columns = [("photograph", ""), *titles]
    return draw_sheet(note, False, columns, [("", panels)], max(size[0], CELL))


# ---------------------------------------------------------------- plots

ZOOM, WIDTH, HEIGHT = 3, 860, 520  # drawn threefold and reduced, so that lines are smooth
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 92, 64


def ticks(high: float) -> list[float]:
    """About five round numbers from 0 to high."""
    step = 10 ** math.floor(math.log10(high / 4))
    step *= next((m for m in (1, 2, 5) if high / (m * step) <= 6), 10)
    return [i * step for i in range(math.floor(high / step + 1e-9) + 1)]


def draw_plot(
    title: str, note: str, x_label: str, x_max: float, y_max: float, lines: Sequence[tuple],
    dots: Sequence[tuple], labels: Sequence[tuple],
) -> Image.Image:
    """Lines over a grid, both axes from 0.

    lines: (name, one or more points, colour, width); each name stands once above the plot, ""
    nowhere. dots: (x, y, colour). labels: (x, y, text, the anchor of the text at x, y).
    """
    sheet = Image.new("RGB", (ZOOM * WIDTH, ZOOM * HEIGHT), PAPER)
    draw = ImageDraw.Draw(sheet)

    def at(x: float, y: float) -> tuple[float, float]:
        return (LEFT + x / x_max * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - y / y_max * (HEIGHT - TOP - BOTTOM))

    def line(points: Iterable[tuple[float, float]], colour: tuple, width: int) -> None:
        draw.line([(ZOOM * x, ZOOM * y) for x, y in points], colour, ZOOM * width, joint="curve")

    def text(x: float, y: float, words: str, anchor: str, size: int = 14, colour=GREY) -> None:
        put(draw, (ZOOM * x, ZOOM * y), words, ZOOM * size, colour, anchor)

    # titles, axes, and the lines' names
    text(LEFT, 26, title, "ls", 15, INK)
    text(LEFT, 47, fit_text(note, 13, WIDTH - LEFT - RIGHT), "ls", 13)
    text(WIDTH / 2, HEIGHT - 12, x_label, "ms", 15, INK)
    for y in ticks(y_max):
        line([at(0, y), at(x_max, y)], GRID if y else INK, 1)
        text(LEFT - 8, at(0, y)[1], f"{y:.6g}", "rm")
    for x in ticks(x_max):
        text(at(x, 0)[0], HEIGHT - BOTTOM + 9, f"{x:.6g}", "ma")
    x = LEFT
    for name, (colour, width) in {name: rest for name, _, *rest in lines if name}.items():
        line([(x, 70), (x + 20, 70)], colour, width)
        text(x + 26, 70, name, "lm", 13, INK)
        x += 44 + font(13).getlength(name)

    # the lines themselves
    for _, points, colour, width in lines:
        line([at(*point) for point in points], colour, width)
    for *point, colour in dots:
        x, y = at(*point)
        draw.ellipse([ZOOM * v for v in (x - 5, y - 5, x + 5, y + 5)], colour, PAPER, ZOOM)
    for x, y, words, anchor in labels:
        text(*np.add(at(x, y), (4, -4)), words, anchor, 13)
    return sheet.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def draw_curve(metrics: dict, coupling: str, note: str) -> Image.Image:
    """gt_known over thresholds, a line per coupling, a dot at the threshold in use."""
    centred, dots = metrics["baselines"]["centred_box"], []
    lines = [("", [(0, centred), (1, centred)], GREY, 1)]
    for name, row in metrics["couplings"].items():
        points = list(zip(metrics["thresholds"], row["gt_known_curve"]))
        lines.append((row["label"], points, LINES[name], 4 if name == coupling else 2))
        dots.append((metrics["threshold"], row["gt_known"], LINES[name]))
    return draw_plot(
        "Images localised with IoU > 0.5 (GT-known), in %", note,
        "threshold of the min-max normalised map (dot: the one in use)", 1, 100, lines, dots,
        [(0.99, centred, "centred box", "rs")])


def draw_loss(log: Sequence[dict]) -> Image.Image:
    """The training loss over steps: log.jsonl's entries, of steps ("loss") and of epochs' ends.

    A second phase's steps are counted on from the first's; a line at each phase's start names it.
    """
    steps, epochs, starts, offset = [], [], {}, 0
    for phase in dict.fromkeys(entry["phase"] for entry in log):
        entries = [entry for entry in log if entry["phase"] == phase]
        for series, name in ((steps, "loss"), (epochs, "mean_loss")):
            series.append([(offset + entry["step"], entry[name]) for entry in entries
                           if math.isfinite(entry.get(name, math.nan))])
        starts[offset] = phase
        offset += max(entry["step"] for entry in entries)
    high = 1.05 * max((loss for points in steps + epochs for _, loss in points), default=0) or 1
    lines = [("", [(start, 0), (start, high)], GREY, 1) for start in starts]
    lines += [("a step's loss", points, LINES["none"], 1) for points in steps if points]
    lines += [("mean of an epoch, at its end", points, LINES["relation"], 3)
              for points in epochs if points]
    dots = [(*point, LINES["relation"]) for points in epochs for point in points]
    return draw_plot(
        "Training loss", f"{sum(map(len, steps))} logged steps", "step", max(offset, 1), high,
        lines, dots if len(dots) < 30 else (),
        [(start, 0, phase, "ls") for start, phase in starts.items()])
