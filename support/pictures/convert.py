"""Boxes of COCO, Pascal VOC or YOLO annotations as boxes.csv. Anything wrong is a DataError.

    coco  a JSON file: images (id, file_name, perhaps width and height), annotations (image_id,
          bbox: x, y, width, height in pixels, perhaps category_id), perhaps categories
    voc   a folder of XML files, however deep: <bndbox> counts pixels from 1, and its last ones are
          inside the box; <size> says in which frame
    yolo  a folder of text files, however deep: lines "<class> <x> <y> <width> <height>", the centre
          and the sides as shares of the upright picture; classes.txt may name the classes

An annotation belongs to the picture below root that has its file's name; of several, to the one
that shares most folder names with it. Where a picture's own folder is named like a class of the
annotations, the boxes of that class alone are kept, as ILSVRC's are.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from support.pictures.annotations import (UNTOLD, misfit, nfc, notes_of, parse_box, place_boxes,
                                 read_objects, read_size, read_text)
from support.pictures.folders import SUFFIXES, list_below
from support.pictures.decode import DataError, Decoded, decode

UNMATCHED = "annotations are of no image below --root and are left out"
OTHER_CLASS = "boxes are of another class than their image's folder and are left out"
CROWD = "boxes are of a crowd (iscrowd) and are left out"
SEVERAL = ("images have boxes of several classes, none of which is named like their folder: all "
           "are kept")
NO_AREA = "boxes have no area and are left out"


class Annotation(NamedTuple):
    """Of one picture, not yet found."""

    where: str  # what an error names
    names: list[str]  # paths that the picture may have, the likeliest first, perhaps without ending
    # of the picture found: (class, box in pixels of the upright picture), and a note's reason
    read: Callable[[Decoded, str], tuple[list[tuple[str, tuple]], str]]


def convert(form: str, source: Path, root: Path) -> tuple[str, list[str]]:
    """The text of boxes.csv, and notes."""
    left_out: dict[str, list] = {}
    annotations, classes = READERS[form](source, left_out)
    found, classes = match(annotations, root, left_out), set(map(plain, classes))
    rows, boxed = [], 0
    for picture in sorted(found):
        where, _, read = found[picture]
        if os.fsencode(picture).decode("utf-8", "ignore") != picture:
            raise DataError(f"{root / picture}: needs a name in UTF-8, as boxes.csv is")
        boxes, reason = read(decode(root / picture, header_only=True), root / picture)
        own = plain(Path(picture).parent.name)
        kept = [box for name, box in boxes if own not in classes or plain(name) == own]
        several = own not in classes and len({name for name, _ in boxes}) > 1
        for why, count in ((reason, bool(reason)), (OTHER_CLASS, len(boxes) - len(kept)),
                           (SEVERAL, several)):
            if count:
                left_out.setdefault(why, []).extend([where] * count)
        rows += [(picture, *box) for box in kept]
        boxed += bool(kept)
    notes = notes_of(left_out)
    if not rows:
        about = "".join(f"; {note}" for note in notes)
        raise DataError(f"{source}: no box is of an image below {root}{about}")
    if all(0 <= value <= 1 for _, *box in rows for value in box):
        raise DataError(f"{source}: all boxes lie within 0 and 1, which looks normalised: needs "
                        "pixels")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "xmin", "ymin", "xmax", "ymax"])
    writer.writerows([name, *(f"{value:.10g}" for value in box)] for name, *box in rows)
    return text.getvalue(), [*notes, f"{len(rows)} boxes of {boxed} images"]


def plain(name: str) -> str:
    """A class's name as another tool may write it."""
    return name.casefold().replace("_", " ").replace("-", " ").strip()


# ---------------------------------------------------------------- which picture


def stem_of(name: str) -> str:
    """A picture's name without its ending, if it has one."""
    stem, ending = os.path.splitext(os.path.basename(nfc(name)))
    return stem if ending.lower() in SUFFIXES else stem + ending


def match(
    annotations: Iterable[Annotation], root: Path, left_out: dict[str, list]
) -> dict[str, Annotation]:
    """{picture's path below root: its annotation}. Of two annotations for a picture the one that
    shares more folder names with it has it.
    """
    by_stem, found = {}, {}
    for path in (os.path.relpath(path, root) for path in list_below(root)[0]):
        by_stem.setdefault(stem_of(path), []).append(path)

    def shared(picture: str, name: str) -> tuple[int, bool]:
        picture, name = nfc(picture), nfc(name)
        folders = set(name.split("/")[:-1]) & set(picture.split("/")[:-1])
        return len(folders), os.path.basename(picture) == os.path.basename(name)

    for annotation in annotations:
        name = next((name for name in annotation.names if stem_of(name) in by_stem), None)
        if name is None:
            left_out.setdefault(UNMATCHED, []).append(annotation.where)
            continue
        scores = {picture: shared(picture, name) for picture in by_stem[stem_of(name)]}
        score = max(scores.values())
        picture, *others = [picture for picture in scores if scores[picture] == score]
        if others:
            raise DataError(f"{annotation.where}: is of {root / picture} or of {root / others[0]}: "
                            "needs names that tell them apart")
        if picture in found:
            before, rival = found[picture]
            if score == before:
                raise DataError(f"{annotation.where}: is of {root / picture}, as {rival.where} is: "
                                "needs one of them")
            loser = rival if score > before else annotation
            left_out.setdefault(UNMATCHED, []).append(loser.where)
            if loser is annotation:
                continue
        found[picture] = score, annotation
    return {picture: annotation for picture, (_, annotation) in found.items()}


# ---------------------------------------------------------------- the three forms


def placed(where: str, stated, boxes: list, found: Decoded, picture) -> tuple[list, str]:
    """(class, box) of a picture, brought into its upright frame."""
    try:
        rows, reason = place_boxes([box for _, box in boxes], stated, found)
    except ValueError:
        raise misfit(where, stated, picture, found) from None
    return [(name, box) for (name, _), box in zip(boxes, rows)], reason


def read_coco(file: Path, left_out: dict[str, list]) -> tuple[list[Annotation], Iterable[str]]:
    try:
        content = json.loads(read_text(file))
    except ValueError as error:
        raise error if isinstance(error, DataError) else DataError(
            f"{file}: not a JSON file ({error})") from None
    except RecursionError:
        raise DataError(f"{file}: lists within lists without end, needs COCO's") from None

    def entries(key: str, **needed: type | tuple) -> list[dict]:
        listed = content.get(key) if isinstance(content, dict) else None
        if not isinstance(listed, list):
            raise DataError(f"{file}: needs a list {key!r}, as COCO has it")
        for i, entry in enumerate(listed):
            for name, kind in needed.items():
                if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
                    raise DataError(f"{file}: {key}[{i}] has no {name!r}, as COCO has it")
        return listed

    key = int, str
    categories = entries("categories", id=key, name=str) if "categories" in content else []
    names, images = {entry["id"]: entry["name"] for entry in categories}, {}
    for i, entry in enumerate(entries("images", id=key, file_name=str)):
        where = f"{file}: images[{i}]"
        if entry["id"] in images:
            raise DataError(f"{where}: id {entry['id']} is another image's")
        stated = read_size(entry.get("width") or 0, entry.get("height") or 0, where)
        images[entry["id"]] = f"{where} {entry['file_name']!r}", entry["file_name"], stated, []
    for i, entry in enumerate(entries("annotations", image_id=key, bbox=list)):
        where = f"{file}: annotations[{i}]"
        if entry["image_id"] not in images:
            raise DataError(f"{where}: image_id {entry['image_id']} is not in images")
        try:
            x, y, width, height = entry["bbox"]
            if entry.get("iscrowd"):
                left_out.setdefault(CROWD, []).append(where)
            elif width == 0 or height == 0:
                left_out.setdefault(NO_AREA, []).append(where)
            else:
                box, category = parse_box(x, y, x + width, y + height), entry.get("category_id")
                name = names.get(category, "") if isinstance(category, key) else ""
                images[entry["image_id"]][-1].append((name, box))
        except (ValueError, TypeError, OverflowError):
            raise DataError(f"{where}: bbox is {str(entry['bbox'])[:80]}, needs x, y, width, height"
                            " in pixels") from None
    return [Annotation(where, [name.replace("\\", "/")], partial(placed, where, stated, boxes))
            for where, name, stated, boxes in images.values() if boxes], list(names.values())


def files_below(folder: Path, ending: str) -> list[Path]:
    files = [file for file in sorted(folder.rglob(f"*{ending}"))
             if not file.name.startswith(".") and not file.is_dir()]
    if not files:
        raise DataError(f"{folder}: no {ending} files, needs a folder of them")
    return files


def read_voc(folder: Path, _) -> tuple[list[Annotation], Iterable[str]]:
    annotations, classes = [], set()
    for file in files_below(folder, ".xml"):
        boxes, stated, name = read_objects(file, from_one=True)
        classes.update(name for name, _ in boxes)
        if boxes:
            own = str(file.relative_to(folder).with_suffix(""))
            annotations.append(Annotation(str(file), [own, name.replace("\\", "/")],
                                          partial(placed, file, stated, boxes)))
    return annotations, classes


def read_yolo(folder: Path, _) -> tuple[list[Annotation], Iterable[str]]:
    files, names = files_below(folder, ".txt"), folder / "classes.txt"
    classes = [line.strip() for line in read_text(names).split("\n")] if names in files else []
    return [Annotation(str(file), [str(file.relative_to(folder).with_suffix(""))],
                       partial(yolo_boxes, file, classes))
            for file in files if file != names], classes


def yolo_boxes(file: Path, classes: list[str], found: Decoded, _) -> tuple[list, str]:
    boxes, (width, height) = [], found.size
    lines = read_text(file).split("\n") if file.read_bytes().strip() else ()
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                label, *shares = line.split()
                x, y, w, h = map(float, shares)
                if not label.isdecimal() or not all(0 <= share <= 1 for share in (x, y, w, h)):
                    raise ValueError
                box = parse_box(max(x - w / 2, 0) * width, max(y - h / 2, 0) * height,
                                min(x + w / 2, 1) * width, min(y + h / 2, 1) * height)
                boxes.append((classes[int(label)] if classes else label, box))
            except (ValueError, IndexError):
                raise DataError(
                    f"{file}:{number}: found {line[:80]!r}, needs '<class> <x> <y> <width> "
                    "<height>', the last four from 0 to 1") from None
    return boxes, UNTOLD if found.orientation > 1 else ""


READERS = {"coco": read_coco, "voc": read_voc, "yolo": read_yolo}
