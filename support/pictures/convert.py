"""Boxes of COCO, Pascal VOC or YOLO annotations as boxes.csv. Anything wrong is a DataError.

    coco  a JSON file: images (id, file_name, perhaps width and height), annotations (image_id;
          bbox: x, y, width, height in pixels, or else the polygons of segmentation; perhaps
          category_id), perhaps categories
    voc   a folder of XML files, however deep: <bndbox> counts pixels from 1, and its last ones are
          inside the box; <size> says in which frame
    yolo  a folder of text files, however deep: lines "<class> <x> <y> <width> <height>", the centre
          and the sides as shares of the upright picture, or "<class> <x> <y> <x> <y> ...", a
          polygon; classes.txt or names: in a YAML file, beside them or above, may name the classes

An annotation belongs to the picture below root that has its file's name; of several, to the one
that shares most folder names with it. Where a picture's own folder is named like a class of the
annotations, the boxes of that class alone are kept, as ILSVRC's are. Boxes are cut to their
picture; what is no box, or of no picture alone, is left out and counted.
"""

import csv
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from support.pictures.annotations import (nfc, notes_of, parse_box, place_boxes, read_objects,
                                          read_size, read_text, scale_box)
from support.pictures.decode import DataError, decode
from support.pictures.folders import SUFFIXES, images_below

UNMATCHED = "annotations have no image below --root that is theirs alone and are left out"
UNUSABLE = "files or images cannot be used and are left out"
NO_BOX = ("boxes have no area, no numbers, another unit, no known class or image, or are of a "
          "crowd, and are left out")
OTHER_CLASS = "boxes are of another class than their image's folder and are left out"
SEVERAL = ("images have boxes of several classes, none of which is named like their folder: all "
           "are kept")
OUTSIDE = "boxes lie outside their images and are left out"
BEYOND = "boxes reach beyond their images and are cut"
WRONG_UNIT = ("most boxes do not lie within their images: are they in another unit, or corners "
              "where widths and heights are needed?")

SHARES = "shares"  # a frame: 0 to 1 of the upright picture's width and height
Remarks = dict[str, list]  # {what there is to say: of which files, lines or images}


class Annotation(NamedTuple):
    """What a file says of one picture, whichever that is."""

    where: str  # what notes and errors name
    names: list[str]  # paths that the picture may have, the likeliest first, perhaps without ending
    boxes: list[tuple[str, tuple]]  # (class, (xmin, ymin, xmax, ymax)), at least one
    stated: tuple[int, int] | str | None  # the size of the picture that has the boxes, or SHARES


def convert(form: str, source: Path, root: Path) -> tuple[str, list[str]]:
    """The text of boxes.csv, and notes."""
    remarks: Remarks = defaultdict(list)
    annotations, classes = READERS[form](source, remarks)
    classes, rows = set(map(comparable, classes)), []
    for picture, (where, _, labelled, stated) in sorted(match(annotations, root, remarks).items()):
        names, boxes = zip(*labelled)
        try:
            if os.fsencode(picture).decode("utf-8", "ignore") != picture:
                raise DataError(f"{root / picture}: needs a name in UTF-8, as boxes.csv is")
            decoded = decode(root / picture, header_only=True)
            if stated == SHARES:
                stated = decoded.size
                boxes = [scale_box(box, *stated) for box in boxes]
            boxes, remark = place_boxes(boxes, stated, decoded, where, root / picture)
        except DataError as error:
            remarks[UNUSABLE].append(error)
            continue
        if remark:
            remarks[remark].append(where)

        # the boxes of the class that the picture's folder names, cut to the picture
        own = comparable(Path(picture).parent.name)
        kept = [box for name, box in zip(names, boxes)
                if own not in classes or comparable(name) == own]
        remarks[OTHER_CLASS] += [where] * (len(boxes) - len(kept))
        if own not in classes and len(set(names)) > 1:
            remarks[SEVERAL].append(where)
        for box in kept:
            cut = cut_box(box, decoded.size)
            if cut is None:
                remarks[OUTSIDE].append(where)
                continue
            if max(abs(a - b) for a, b in zip(cut, box)) > 1:  # more than rounding
                remarks[BEYOND].append(where)
            rows.append((picture, *cut))

    notes = notes_of(remarks)
    if len(remarks[OUTSIDE]) + len(remarks[BEYOND]) > (len(rows) + len(remarks[OUTSIDE])) / 2:
        notes.append(WRONG_UNIT)
    if not rows:
        raise DataError("; ".join([f"{source}: no box is of an image below {root}", *notes]))
    if all(0 <= value <= 1 for _, *box in rows for value in box):
        raise DataError(f"{source}: all boxes lie within 0 and 1, which looks normalised: needs "
                        "pixels")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "xmin", "ymin", "xmax", "ymax"])
    writer.writerows([name, *(f"{value:.10g}" for value in box)] for name, *box in rows)
    images = {picture for picture, *_ in rows}
    return text.getvalue(), [*notes, f"{len(rows)} boxes of {len(images)} images"]


def comparable(name: str) -> str:
    """A class's name without what other tools may write differently."""
    return nfc(nfc(name).casefold()).replace("_", " ").replace("-", " ").strip()


def cut_box(box: tuple[float, ...], size: tuple[int, int]) -> tuple[float, ...] | None:
    """A box cut to its picture, None where it lies outside."""
    x0, y0, x1, y1 = box
    cut = max(x0, 0), max(y0, 0), min(x1, size[0]), min(y1, size[1])
    return cut if cut[0] < cut[2] and cut[1] < cut[3] else None


# ---------------------------------------------------------------- which picture


def stem_of(name: str) -> str:
    """A picture's name without its ending, if it has one."""
    stem, ending = os.path.splitext(os.path.basename(nfc(name)))
    return stem if ending.lower() in SUFFIXES else stem + ending


def likeness(picture: str, name: str) -> tuple[int, bool]:
    """How many folders' names a picture's path shares with an annotation's, and whether the file's
    own name is the same.
    """
    picture, name = nfc(picture), nfc(name)
    shared = set(name.split("/")[:-1]) & set(picture.split("/")[:-1])
    return len(shared), os.path.basename(picture) == os.path.basename(name)


def only_best(scores: dict):
    """The key with the highest score; None where several have it, or there is none."""
    best = max(scores.values(), default=None)
    keys = [key for key in scores if scores[key] == best]
    return keys[0] if len(keys) == 1 else None


def match(
    annotations: Sequence[Annotation], root: Path, remarks: Remarks
) -> dict[str, Annotation]:
    """{picture's path below root: its annotation}, where each is the other's only best."""
    by_stem = defaultdict(list)
    for path in images_below(root, defaultdict(list)):
        by_stem[stem_of(path)].append(os.path.relpath(path, root))

    # the picture that is most like an annotation, then the annotation that is most like a picture
    claims = defaultdict(dict)  # {picture: {an annotation's index: their likeness}}
    for i, annotation in enumerate(annotations):
        name = next((name for name in annotation.names if stem_of(name) in by_stem), "")
        scores = {path: likeness(path, name) for path in by_stem.get(stem_of(name), ())}
        picture = only_best(scores)
        if picture:
            claims[picture][i] = scores[picture]
    matched = {picture: only_best(scores) for picture, scores in claims.items()}
    left_out = set(range(len(annotations))).difference(matched.values())
    remarks[UNMATCHED] += [annotations[i].where for i in sorted(left_out)]
    return {picture: annotations[i] for picture, i in matched.items() if i is not None}


# ---------------------------------------------------------------- COCO


def coco_box(entry: dict) -> tuple[float, ...]:
    """The bbox of a COCO annotation, else its polygons' extent; TypeError, ValueError, LookupError
    or OverflowError where it has none, or is of a crowd.
    """
    if entry.get("iscrowd"):
        raise ValueError
    if entry.get("bbox"):
        x, y, width, height = map(float, entry["bbox"])
        return parse_box(x, y, x + width, y + height)
    xs = [x for polygon in entry["segmentation"] for x in polygon[0::2]]
    ys = [y for polygon in entry["segmentation"] for y in polygon[1::2]]
    return parse_box(min(xs), min(ys), max(xs), max(ys))


def read_coco(file: Path, remarks: Remarks) -> tuple[list[Annotation], Iterable[str]]:
    text = read_text(file)
    try:
        content = json.loads(text)
        listed, entries = list(content["images"]), list(content["annotations"])
        names = {entry["id"]: str(entry.get("name")) for entry in content.get("categories") or ()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: needs JSON with lists of images, annotations and perhaps "
                        f"categories, as COCO has them ({type(error).__name__}: {error})") from None

    images = {}  # by their ids
    for i, entry in enumerate(listed):
        where = f"{file}: images[{i}]"
        try:
            key, name = entry["id"], entry["file_name"].replace("\\", "/")
            if key in images:
                raise DataError(f"{where}: id {key} is that of {images[key].where}")
            stated = read_size(entry.get("width"), entry.get("height"))
            images[key] = Annotation(f"{where} {name!r}", [name], [], stated)
        except (LookupError, TypeError, AttributeError):
            remarks[UNUSABLE].append(f"{where} needs an id and a file_name")

    for i, entry in enumerate(entries):
        try:
            name, box = names.get(entry.get("category_id"), ""), coco_box(entry)
            images[entry["image_id"]].boxes.append((name, box))
        except (TypeError, ValueError, LookupError, OverflowError, AttributeError):
            remarks[NO_BOX].append(f"{file}: annotations[{i}]: {str(entry)[:120]}")
    return [image for image in images.values() if image.boxes], names.values()


# ---------------------------------------------------------------- Pascal VOC and YOLO


def files_below(folder: Path, ending: str) -> list[Path]:
    files = [file for file in sorted(folder.rglob(f"*{ending}")) if file.name[0] != "."]
    if not files:
        raise DataError(f"{folder}: no {ending} files, needs a folder of them")
    return files


def read_voc(folder: Path, remarks: Remarks) -> tuple[list[Annotation], Iterable[str]]:
    annotations = []
    for file in files_below(folder, ".xml"):
        try:
            boxes, stated, name = read_objects(file, from_one=True, left_out=remarks[NO_BOX])
        except DataError as error:
            remarks[UNUSABLE].append(error)
            continue
        if boxes:
            own = str(file.relative_to(folder).with_suffix(""))
            names = [own, name.replace("\\", "/")]
            annotations.append(Annotation(str(file), names, boxes, stated))
    return annotations, {name for annotation in annotations for name, _ in annotation.boxes}


def read_yolo(folder: Path, remarks: Remarks) -> tuple[list[Annotation], Iterable[str]]:
    annotations, names = [], {}  # names: of each folder of files
    for file in files_below(folder, ".txt"):
        path, boxes = file.relative_to(folder), []
        if path.name == "classes.txt":
            continue
        if path.parent not in names:
            levels = len(path.parts) + 2  # up to two above `folder`
            names[path.parent] = yolo_names(file.absolute().parents[:levels])
        try:
            lines = read_text(file).split("\n")
        except DataError as error:
            remarks[UNUSABLE].append(error)
            continue
        for number, line in enumerate(lines, 1):
            try:
                boxes += [yolo_box(line, names[path.parent])] if line.strip() else []
            except (ValueError, OverflowError, LookupError):
                remarks[NO_BOX].append(f"{file}:{number}: {line[:80]!r}")
        if boxes:
            annotations.append(Annotation(str(file), [str(path.with_suffix(""))], boxes, SHARES))
    return annotations, {name for listed in names.values() for name in listed.values()}


def yolo_names(places: Iterable[Path]) -> dict[int, str]:
    """{number: class} of the first classes.txt or YAML file in these folders; else empty."""
    for place in places:
        if (place / "classes.txt").is_file():
            lines = read_text(place / "classes.txt").rstrip().split("\n")
            return {number: line.strip() for number, line in enumerate(lines)}
        for file in sorted([*place.glob("*.yaml"), *place.glob("*.yml")]):
            names = yaml_names(file.read_text("utf-8-sig", "replace"))
            if names:
                return names
    return {}


def yaml_names(text: str) -> dict[int, str]:
    """The names: of YOLO's data.yaml, a list or number: name, in brackets or one a line."""
    start = r"^['\"]?names['\"]?[ \t]*:"
    block = re.search(start + r"(.*?)(?=^['\"\w]|\Z)", text, re.MULTILINE | re.DOTALL)
    if not block:
        return {}
    brackets = re.match(r"\s*[\[{](.*?)[\]}]", block[1], re.DOTALL)
    if brackets:
        entries = re.findall(r"""(?:\d+\s*:\s*)?(?:"[^"]*"|'[^']*'|[^,\s][^,]*)""", brackets[1])
    else:
        entries = block[1].split("\n")
    pattern = (r"""\s*(?:-\s+)?(?:['"]?(\d+)['"]?\s*:\s+)?"""
               r"""(?:"([^"]*)"|'([^']*)'|([^#\s].*?))\s*(?:\s#.*)?""")
    found = filter(None, (re.fullmatch(pattern, entry) for entry in entries))
    return {int(entry[1] or i): entry[2] or entry[3] or entry[4] or ""
            for i, entry in enumerate(found)}


def yolo_box(line: str, names: dict[int, str]) -> tuple[str, tuple]:
    """(class, box in shares) of a line: a box, perhaps with a confidence behind it, or a polygon.
    ValueError, OverflowError or LookupError where it is neither.
    """
    label, *shares = map(float, line.split())
    if len(shares) in (4, 5):
        x, y, w, h = shares[:4]
        corners = x - w / 2, y - h / 2, x + w / 2, y + h / 2
    elif len(shares) >= 6 and len(shares) % 2 == 0:
        corners = min(shares[0::2]), min(shares[1::2]), max(shares[0::2]), max(shares[1::2])
    else:
        raise ValueError
    number = int(label)
    if number != label or number < 0 or not all(-1 <= share <= 2 for share in shares):
        raise ValueError  # larger ones are pixels
    return names[number] if names else str(number), parse_box(*corners)


READERS = {"coco": read_coco, "voc": read_voc, "yolo": read_yolo}
