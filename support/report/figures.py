"""Every picture: gallery, curve, failures, loss, and overlays on a user's own photographs.

Ground truth is red as in the paper. The predicted box is cyan: red and green differ least for
colour-blind readers, red and cyan differ in lightness too. All functions take arrays and text and
return a PIL image; write_png marks a file as this project's, is_ours reads the mark.
"""

import functools
import math
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
    """The text's words in lines of at most `width` pixels; a longer word is shortened."""
    lines = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and fit_text(joined, size, width) == joined:
            lines[-1] = joined
        else:
            lines.append(fit_text(word, size, width))
    return lines


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
    """A half-open box, drawn on its inside with a dark seam."""
    x0, y0, x1, y1 = (round(float(v)) for v in box)
    if x1 - x0 > 2 * width and y1 - y0 > 2 * width:
        draw.rectangle((x0 - 1, y0 - 1, x1, y1), outline=INK)
        draw.rectangle((x0 + width, y0 + width, x1 - 1 - width, y1 - 1 - width), outline=INK)
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
    "", and (panel, caption, the caption's colour) from left to right. A caption runs on below the
    panels to the right that have none. cell: the width that a panel is centred in.
    """
    step = cell + MARGIN
    width = max(MARGIN + step * max(len(panels) for _, panels in rows), 540)
    notes = wrap_text(note, 14, width - 2 * MARGIN)
    titles = [wrap_text(title, 15, width - 2 * MARGIN) for title, _ in rows]
    top = 40 + LINE * len(notes) + 36 * bool(columns)
    heights = [max((panel.height for panel, *_ in panels), default=0) for _, panels in rows]
    drops = [LINE * len(lines) + 12 * bool(lines) + (height + 30) * bool(height)
             for lines, height in zip(titles, heights)]
    sheet = Image.new("RGB", (width, top + sum(drops)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw_legend(sheet, annotated)
    for i, line in enumerate(notes):
        put(draw, (MARGIN, 32 + LINE * i), line, 14, GREY)
    for c, (title, product) in enumerate(columns):
        middle = MARGIN + step * c + cell / 2
        put(draw, (middle, top - 24), fit_text(title, 15, cell), 15, INK, "ms")
        put(draw, (middle, top - 7), fit_text(product, 12, cell), 12, GREY, "ms")

    for lines, (_, panels), height, drop in zip(titles, rows, heights, drops):
        y = top
        if lines:
            draw.line((MARGIN, y, width - MARGIN, y), GRID)
        for line in lines:
            put(draw, (MARGIN, y + 6), line, 15)
            y += LINE
        y += 12 * bool(lines)
        for c, (panel, caption, colour) in enumerate(panels):
            x = MARGIN + step * c
            sheet.paste(panel, (x + (cell - panel.width) // 2, y + (height - panel.height) // 2))
            following = [i for i, (_, text, _) in enumerate(panels) if text and i > c]
            room = (following[0] - c) * step - MARGIN if following else width - MARGIN - x
            put(draw, (x, y + height + 4), fit_text(caption, 13, room), 13, colour)
        top += drop
    return sheet


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
    first, rows = examples[0], []
    for i, label in enumerate(first.label):
        panels = [(draw_panel(first, i, None), class_name(classes, label), INK)]
        for model, names in zip(examples, titles):
            right = model.predicted[i] == label
            caption = f"taken for {class_name(classes, model.predicted[i])}"
            caption, colour = ("class right", GREY) if right else (caption, INK)
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
    return draw_sheet(note, annotated, [], rows or [("No failure among these images.", [])])


# ---------------------------------------------------------------- a user's own photographs

def draw_own(
    picture: Image.Image, view: Sequence[float], titles: Sequence[tuple[str, str]],
    heat: np.ndarray, boxes: Sequence[Sequence[float]], caption: str, note: str,
) -> Image.Image:
    """The undimmed photograph, then each map over the part that the network saw, with its box.

    titles: Q maps' names, and what is multiplied. heat (Q, H, W) in [0, 1], boxes (Q, 4) in the
    photograph's pixels; a single one is drawn on the photograph too.
    """
    scale = min(max(1, 480 / max(picture.size)), 720 / max(picture.size))
    size = [max(1, round(scale * side)) for side in picture.size]
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top, right, bottom = (round(scale * v) for v in view)
    left, top = min(left, size[0] - 1), min(top, size[1] - 1)  # of a thin picture a pixel is left
    seen = (left, top, max(right, left + 1), max(bottom, top + 1))
    panels, width = [(picture, caption, INK)], max(2, max(size) // 200)
    for values, box in zip(heat, boxes):
        panel = picture.copy()
        panel.paste(overlay(picture.crop(seen), values), seen[:2])
        draw_box(ImageDraw.Draw(panel), np.multiply(box, scale), CYAN, width)
        panels.append((panel, "", INK))
    if len(boxes) == 1:
        draw_box(ImageDraw.Draw(picture), np.multiply(boxes[0], scale), CYAN, width)

    # a wide photograph's maps stand below it, another's beside it
    columns = [("photograph", ""), *titles]
    rows = [("", panels)]
    if size[0] > 1.6 * size[1]:
        rows = [(title, [panel]) for (title, _), panel in zip(columns, panels)]
        columns = []
    return draw_sheet(note, False, columns, rows, max(size[0], CELL))


# ---------------------------------------------------------------- plots

ZOOM, WIDTH, HEIGHT = 3, 860, 520  # drawn threefold and reduced, so that lines are smooth
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 92, 64


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next((m for m in (1, 2, 5) if (high - low) / (m * step) <= 6), 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def draw_plot(
    title: str, note: str, x_label: str, x_range: tuple[float, float],
    y_range: tuple[float, float], key: Sequence[tuple], lines: Sequence[tuple],
    dots: Sequence[tuple], labels: Sequence[tuple],
) -> Image.Image:
    """Lines over a grid.

    key: (name, colour, width of its line). lines: (points, colour, width). dots: (x, y, colour,
    radius). labels: (x, y, text, the anchor of the text at x, y).
    """
    sheet = Image.new("RGB", (ZOOM * WIDTH, ZOOM * HEIGHT), PAPER)
    draw = ImageDraw.Draw(sheet)
    (x0, x1), (y0, y1) = x_range, y_range

    def at(x: float, y: float) -> tuple[float, float]:
        return (LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM))

    def line(points: Iterable[tuple[float, float]], colour: tuple, width: int) -> None:
        draw.line([(ZOOM * x, ZOOM * y) for x, y in points], colour, ZOOM * width, joint="curve")

    def text(x: float, y: float, words: str, anchor: str, size: int = 14, colour=GREY) -> None:
        put(draw, (ZOOM * x, ZOOM * y), words, ZOOM * size, colour, anchor)

    # titles, axes, and the lines' names
    text(LEFT, 26, title, "ls", 15, INK)
    text(LEFT, 47, fit_text(note, 13, WIDTH - LEFT - RIGHT), "ls", 13)
    text(WIDTH / 2, HEIGHT - 12, x_label, "ms", 15, INK)
    for y in ticks(y0, y1):
        line([at(x0, y), at(x1, y)], GRID, 1)
        text(LEFT - 8, at(x0, y)[1], f"{y:.6g}", "rm")
    for x in ticks(x0, x1):
        text(at(x, y0)[0], HEIGHT - BOTTOM + 9, f"{x:.6g}", "ma")
    line([at(x0, y0), at(x1, y0)], INK, 1)
    x = LEFT
    for name, colour, width in key:
        line([(x, 70), (x + 20, 70)], colour, width)
        text(x + 26, 70, name, "lm", 13, INK)
        x += 44 + font(13).getlength(name)

    # the lines themselves
    for points, colour, width in (entry for entry in lines if entry[0]):
        line([at(*point) for point in points], colour, width)
    for x, y, colour, radius in dots:
        (x, y), r = at(x, y), radius
        draw.ellipse([ZOOM * v for v in (x - r, y - r, x + r, y + r)], colour, PAPER, ZOOM)
    for x, y, words, anchor in labels:
        text(*np.add(at(x, y), (4, -4)), words, anchor, 13)
    return sheet.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def draw_curve(metrics: dict, coupling: str, note: str) -> Image.Image:
    """gt_known over thresholds, a line per coupling, a dot at the threshold in use."""
    key, lines, dots = [], [], []
    for name, row in metrics["couplings"].items():
        width = 4 if name == coupling else 2
        key.append((row["label"], LINES[name], width))
        lines.append((list(zip(metrics["thresholds"], row["gt_known_curve"])), LINES[name], width))
        dots.append((metrics["threshold"], row["gt_known"], LINES[name], 2 + width))
    centred = metrics["baselines"]["centred_box"]
    lines.insert(0, ([(0, centred), (1, centred)], GREY, 1))
    return draw_plot(
        "Images localised with IoU > 0.5 (GT-known), in %", note,
        "threshold of the min-max normalised map (dot: the one in use)", (0, 1), (0, 100), key,
        lines, dots, [(0.99, centred, "centred box", "rs")])


def draw_loss(log: Sequence[dict]) -> Image.Image:
    """The training loss over steps: log.jsonl's entries, of steps ("loss") and of epochs' ends.

    A second phase's steps are counted on from the first's, at a line that names it.
    """
    step_losses, epoch_losses, starts, offset = [], [], {}, 0
    for phase in dict.fromkeys(entry["phase"] for entry in log):
        entries = [entry for entry in log if entry["phase"] == phase]
        for series, name in ((step_losses, "loss"), (epoch_losses, "mean_loss")):
            series.append([(offset + entry["step"], entry[name]) for entry in entries
                           if math.isfinite(entry.get(name, math.nan))])
        starts[offset] = phase
        offset += max(entry["step"] for entry in entries)
    losses = [loss for points in step_losses + epoch_losses for _, loss in points] or [0.0]
    low, high = min(0.0, *losses), max(losses)
    high = high * 1.05 if high > low else low + 1
    starts = starts if len(starts) > 1 else {}
    lines = [([(start, low), (start, high)], GREY, 1) for start in starts]
    lines += [(points, LINES["none"], 1) for points in step_losses]
    lines += [(points, LINES["relation"], 3) for points in epoch_losses]
    dots = [(*point, LINES["relation"], 5) for points in epoch_losses for point in points]
    return draw_plot(
        "Training loss", f"{sum(map(len, step_losses))} logged steps", "step",
        (0, max(offset, 1)), (low, high),
        [("a step's loss", LINES["none"], 1),
         ("mean of an epoch, at its end", LINES["relation"], 3)],
        lines, dots if len(dots) < 30 else (),
        [(start, low, phase, "ls") for start, phase in starts.items()])
