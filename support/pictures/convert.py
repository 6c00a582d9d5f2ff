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
picture; what is no box is left out and counted.
"""

import csv
import io
import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from support.pictures.annotations import (FRAME_UNKNOWN, nfc, notes_of, parse_box, place_boxes,
                                          read_objects, read_size, read_text, wrong_size)
from support.pictures.decode import DataError, Decoded, decode
from support.pictures.folders import SUFFIXES, images_below

UNMATCHED = "annotations are of no image below --root and are left out"
UNUSABLE = "files or images cannot be used and are left out"
NO_BOX = "boxes have no area, no numbers, another unit or no known class and are left out"
INCOMPLETE = "entries lack what COCO has and are left out"
OTHER_CLASS = "boxes are of another class than their image's folder and are left out"
CROWD = "boxes are of a crowd (iscrowd) and are left out"
SEVERAL = ("images have boxes of several classes, none of which is named like their folder: all "
           "are kept")
OUTSIDE = "boxes lie outside their images and are left out"
BEYOND = "boxes reach beyond their images and are cut"
WRONG_UNIT = ("most boxes do not lie within their images: are they in another unit, or corners "
              "where widths and heights are needed?")

Remarks = dict[str, list]  # {what there is to say: of which files, lines or images}


class Annotation(NamedTuple):
    """What a file says of one picture, whichever that is."""

    where: str  # what an error names
    names: list[str]  # paths that the picture may have, the likeliest first, perhaps without ending
    # of the matching picture: (class, box in pixels of the upright picture), and a remark
    read: Callable[[Decoded, Path], tuple[list[tuple[str, tuple]], str]]


def convert(form: str, source: Path, root: Path) -> tuple[str, list[str]]:
    """The text of boxes.csv, and notes."""
    remarks: Remarks = defaultdict(list)
    annotations, classes = READERS[form](source, remarks)
    classes, rows = set(map(comparable, classes)), []
    for picture, annotation in sorted(match(annotations, root, remarks).items()):
        try:
            if os.fsencode(picture).decode("utf-8", "ignore") != picture:
                raise DataError(f"{root / picture}: needs a name in UTF-8, as boxes.csv is")
            decoded = decode(root / picture, header_only=True)
            boxes, remark = annotation.read(decoded, root / picture)
        except DataError as error:
            remarks[UNUSABLE].append(error)
            continue
        if remark:
            remarks[remark].append(annotation.where)

        # the boxes of the class that the picture's folder names, cut to the picture
        own = comparable(Path(picture).parent.name)
        kept = [box for name, box in boxes if own not in classes or comparable(name) == own]
        remarks[OTHER_CLASS] += [annotation.where] * (len(boxes) - len(kept))
        if own not in classes and len({name for name, _ in boxes}) > 1:
            remarks[SEVERAL].append(annotation.where)
        for box in kept:
            cut = cut_box(box, decoded.size)
            if cut is None:
                remarks[OUTSIDE].append(annotation.where)
                continue
            if max(abs(a - b) for a, b in zip(cut, box)) > 1:  # more than rounding
                remarks[BEYOND].append(annotation.where)
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


def match(
    annotations: Iterable[Annotation], root: Path, remarks: Remarks
) -> dict[str, Annotation]:
    """{picture's path below root: its annotation}. Of two annotations for a picture the one that
    shares more folder names with it has it.
    """
    by_stem, matched = {}, {}
    for path in images_below(root, defaultdict(list)):
        path = os.path.relpath(path, root)
        by_stem.setdefault(stem_of(path), []).append(path)
    for annotation in annotations:
        name = next((name for name in annotation.names if stem_of(name) in by_stem), None)
        if name is None:
            remarks[UNMATCHED].append(annotation.where)
            continue

        # the picture that is most like it
        scores = {picture: likeness(picture, name) for picture in by_stem[stem_of(name)]}
        score = max(scores.values())
        picture, *others = [picture for picture in scores if scores[picture] == score]
        if others:
            raise DataError(f"{annotation.where}: is of {root / picture} or of {root / others[0]}: "
                            "needs names that tell them apart")

        # which may have an annotation already
        rival_score, rival = matched.get(picture, ((-1, False), None))
        if score == rival_score:
            raise DataError(f"{annotation.where}: is of {root / picture}, as {rival.where} is: "
                            "needs one of them")
        loser = annotation if score < rival_score else rival
        if loser:
            remarks[UNMATCHED].append(loser.where)
        if loser is not annotation:
            matched[picture] = score, annotation
    return {picture: annotation for picture, (_, annotation) in matched.items()}


# ---------------------------------------------------------------- COCO


def placed(where: str, sides, boxes: list, decoded: Decoded, picture: Path) -> tuple[list, str]:
    """(class, box) of a picture, brought into its upright frame. sides: the stated ones, or 0."""
    stated = read_size(*sides, where)
    try:
        rows, remark = place_boxes([box for _, box in boxes], stated, decoded)
    except ValueError:
        raise wrong_size(where, stated, picture, decoded) from None
    return [(name, box) for (name, _), box in zip(boxes, rows)], remark


def coco_box(entry: dict) -> tuple[float, ...]:
    """The bbox of a COCO annotation, else its polygons' extent; TypeError, ValueError, LookupError
    or OverflowError where it has none.
    """
    if entry.get("bbox"):
        x, y, width, height = entry["bbox"]
        return parse_box(x + 0.0, y + 0.0, x + 0.0 + width, y + 0.0 + height)  # of no texts
    xs = [x for polygon in entry["segmentation"] for x in polygon[0::2]]
    ys = [y for polygon in entry["segmentation"] for y in polygon[1::2]]
    return parse_box(min(xs), min(ys), max(xs), max(ys))


def read_coco(file: Path, remarks: Remarks) -> tuple[list[Annotation], Iterable[str]]:
    text = read_text(file)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not a JSON file ({error})") from None

    def entries(key: str, **needed: type | tuple) -> Iterable[tuple[str, dict]]:
        """(where an entry is, the entry) for those of a list that have what is needed."""
        listed = content.get(key) if isinstance(content, dict) else None
        if not isinstance(listed, list):
            raise DataError(f"{file}: needs a list {key!r}, as COCO has it")
        for i, entry in enumerate(listed):
            where, entry = f"{file}: {key}[{i}]", entry if isinstance(entry, dict) else {}
            lacks = [name for name, kind in needed.items() if not isinstance(entry.get(name), kind)]
            if lacks:
                remarks[INCOMPLETE].append(f"{where} has no {lacks[0]!r}")
            else:
                yield where, entry

    # the classes, and the images with their boxes, by their ids
    ids = int, str
    categories = entries("categories", id=ids, name=str) if "categories" in content else ()
    names, images = {entry["id"]: entry["name"] for _, entry in categories}, {}
    for where, entry in entries("images", id=ids, file_name=str):
        if entry["id"] in images:
            raise DataError(f"{where}: id {entry['id']} is another image's")
        sides = entry.get("width") or 0, entry.get("height") or 0
        images[entry["id"]] = f"{where} {entry['file_name']!r}", entry["file_name"], sides, []

    for where, entry in entries("annotations", image_id=ids):
        category = entry.get("category_id")
        name = names.get(category, "") if isinstance(category, ids) else ""
        try:
            if entry.get("iscrowd"):
                remarks[CROWD].append(where)
            elif entry["image_id"] not in images:
                remarks[UNMATCHED].append(f"{where}: image_id {entry['image_id']}")
            else:
                images[entry["image_id"]][-1].append((name, coco_box(entry)))
        except (TypeError, ValueError, LookupError, OverflowError):
            remarks[NO_BOX].append(f"{where}: bbox {str(entry.get('bbox'))[:80]}")
    return [Annotation(where, [name.replace("\\", "/")], partial(placed, where, sides, boxes))
            for where, name, sides, boxes in images.values() if boxes], names.values()


# ---------------------------------------------------------------- Pascal VOC and YOLO


def files_below(folder: Path, ending: str) -> list[Path]:
    files = [file for file in sorted(folder.rglob(f"*{ending}"))
             if not file.name.startswith(".") and not file.is_dir()]
    if not files:
        raise DataError(f"{folder}: no {ending} files, needs a folder of them")
    return files


def read_voc(folder: Path, remarks: Remarks) -> tuple[list[Annotation], Iterable[str]]:
    annotations, classes = [], set()
    for file in files_below(folder, ".xml"):
        try:
            boxes, stated, name = read_objects(file, from_one=True, left_out=remarks[NO_BOX])
        except DataError as error:
            remarks[UNUSABLE].append(error)
            continue
        classes.update(name for name, _ in boxes)
        if boxes:
            own = str(file.relative_to(folder).with_suffix(""))
            annotations.append(Annotation(str(file), [own, name.replace("\\", "/")],
                                          partial(placed, file, stated or (0, 0), boxes)))
    return annotations, classes


def read_yolo(folder: Path, remarks: Remarks) -> tuple[list[Annotation], Iterable[str]]:
    annotations, names = [], {}  # names: of each folder of files
    for file in files_below(folder, ".txt"):
        path = file.relative_to(folder)
        if path.name != "classes.txt":
            if path.parent not in names:
                levels = len(path.parts) + 2  # up to two above `folder`
                names[path.parent] = yolo_names(file.absolute().parents[:levels])
            annotations.append(Annotation(str(file), [str(path.with_suffix(""))], partial(
                yolo_boxes, file, names[path.parent], remarks)))
    return annotations, {name for listed in names.values() for name in listed.values()}


def yolo_names(places: Iterable[Path]) -> dict[int, str]:
    """{number: class} of the first classes.txt or YAML file in these folders; else empty."""
    for place in places:
        if (place / "classes.txt").is_file():
            lines = read_text(place / "classes.txt").rstrip().split("\n")
            return {number: line.strip() for number, line in enumerate(lines)}
        for file in sorted([*place.glob("*.yaml"), *place.glob("*.yml")]):
            names = yaml_names(file.read_text("utf-8-sig", "replace")) if file.is_file() else {}
            if names:
                return names
    return {}


def yaml_names(text: str) -> dict[int, str]:
    """The names: of YOLO's data.yaml, a list or number: name, in brackets or one a line."""
    _, *parts = re.split(r"^names[ \t]*:", text, maxsplit=1, flags=re.MULTILINE)
    if not parts:
        return {}
    brackets = re.match(r"\s*[\[{](.*?)[\]}]", parts[0], re.DOTALL)
    if brackets:
        entries = re.findall(r"""(?:\d+\s*:\s*)?(?:"[^"]*"|'[^']*'|[^,\s][^,]*)""", brackets[1])
    else:
        entries = itertools.takewhile(re.compile(r"\s*(-|['\"]?\d+['\"]?\s*:|#|$)").match,
                                      parts[0].split("\n"))
    names = {}
    for entry in entries:
        parts = re.fullmatch(r"""\s*(?:-\s+)?(?:['"]?(\d+)['"]?\s*:\s+)?"""
                             r"""(?:"([^"]*)"|'([^']*)'|([^#\s].*?))\s*(?:\s#.*)?""", entry)
        if parts:
            number, *forms = parts.groups()
            names[int(number or len(names))] = next(filter(None, forms), "")
    return names


def yolo_boxes(
    file: Path, names: dict[int, str], remarks: Remarks, decoded: Decoded, _
) -> tuple[list, str]:
    boxes = []
    lines = read_text(file).split("\n") if file.read_bytes().strip() else ()
    for number, line in enumerate(lines, 1):
        try:
            boxes += [yolo_box(line, names, decoded.size)] if line.strip() else []
        except (ValueError, OverflowError, LookupError):
            remarks[NO_BOX].append(f"{file}:{number}: {line[:80]!r}")
    return boxes, FRAME_UNKNOWN if decoded.orientation > 1 else ""


def yolo_box(line: str, names: dict[int, str], size: tuple[int, int]) -> tuple[str, tuple]:
    """(class, box in pixels) of a line: a box, perhaps with a confidence behind it, or a polygon.
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
    x0, y0, x1, y1 = corners
    box = parse_box(x0 * size[0], y0 * size[1], x1 * size[0], y1 * size[1])
    return names[number] if names else str(number), box


READERS = {"coco": read_coco, "voc": read_voc, "yolo": read_yolo}
