"""Text files of annotations: read whole, checked line by line. Anything wrong is a DataError."""

import math
from pathlib import Path
from xml.etree import ElementTree

from support.pictures import DataError


def read_text(path: Path) -> str:
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if not text.strip():
        raise DataError(f"{path}: empty file")
    return text


def parse_box(*numbers) -> tuple[float, ...]:
    """xmin, ymin, xmax, ymax from their texts; ValueError where they are no box."""
    x0, y0, x1, y1 = box = tuple(map(float, numbers))
    if not (all(map(math.isfinite, box)) and x0 < x1 and y0 < y1):
        raise ValueError
    return box


def read_table(path: Path, needed: str, parse) -> dict:
    """{id: (line number, value)} of lines "<id> <rest>"; parse(rest) raises ValueError or KeyError
    unless as needed.
    """
    rows = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
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


def read_xml(file: Path, wnid: str | None) -> tuple[str, list]:
    """(the image's class, its boxes): the boxes of class `wnid`, by default the first object's."""
    text, objects = read_text(file), []
    # which may declare entities that expand without end
    if "<!DOCTYPE" in text:
        raise DataError(f"{file}: found a document type declaration, needs a plain annotation")
    try:
        found = ElementTree.fromstring(text).findall("object")
    except ElementTree.ParseError as error:
        raise DataError(f"{file}:{error.position[0]}: not well-formed XML ({error})") from None
    for number, item in enumerate(found, 1):
        try:
            box = parse_box(*(item.findtext(f"bndbox/{side}")
                       for side in ("xmin", "ymin", "xmax", "ymax")))
            objects.append((item.findtext("name").strip(), box))
        except (ValueError, TypeError, AttributeError):
            raise DataError(
                f"{file}: object {number} needs a <name> and a <bndbox> of finite xmin < xmax, "
                "ymin < ymax") from None
    wnid = wnid or (objects[0][0] if objects else None)
    boxes = [box for name, box in objects if name == wnid]
    if not boxes:
        raise DataError(
    f"{file}: found {len(objects)} objects, needs one of the image's class {wnid or ''}".rstrip())
    return wnid, boxes
