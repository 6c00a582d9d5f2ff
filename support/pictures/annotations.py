"""Files of annotations: read whole, checked line by line, and boxes brought into the frame of the
upright picture. Anything wrong is a DataError.
"""

import csv
import io
import math
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from support.common import printable
from support.pictures.decode import DataError, Decoded


WIDE = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"<\0": "utf-16-le", b"\0<": "utf-16-be"}
SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030"}  # what files that declare these really hold


def encoding_of(content: bytes) -> str:
    """What a file's first bytes or its XML declaration say, else UTF-8."""
    if content[:2] in WIDE:
        return WIDE[content[:2]]
    declared = re.match(rb"\s*<\?xml[^>]*?\sencoding\s*=\s*[\"']([\w.-]+)", content)
    name = declared[1].decode().lower() if declared else "utf-8"
    if name.startswith(("utf", "ucs")):  # no wide ones, whatever is declared
        return "utf-8-sig"
    return SUPERSETS.get(name, name)


def read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        text = content.decode(encoding_of(content))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, LookupError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text, nor in an encoding that it "
                        f"declares ({error})") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def notes_of(remarks: dict[str, list]) -> list[str]:
    """A note for each remark: how many names it is made of, and the first."""
    return [f"{len(names)} {remark} (the first: {printable(names[0])})"
            for remark, names in remarks.items() if names]


def parse_box(*numbers) -> tuple[float, ...]:
    """xmin, ymin, xmax, ymax from their texts; ValueError where they are no box."""
    x0, y0, x1, y1 = box = tuple(map(float, numbers))
    if not (all(map(math.isfinite, box)) and x0 < x1 and y0 < y1):
        raise ValueError
    return box


# ---------------------------------------------------------------- tables, CSV, XML


def read_table(path: Path, needed: str, parse, kind: type = int) -> dict:
    """{id: (line number, value)} of lines "<id> <rest>", the id of a kind; parse(rest) raises
    ValueError or KeyError unless as needed.
    """
    rows = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                key, rest = line.split(maxsplit=1)
                key, value = kind(key), parse(rest.strip())
            except (ValueError, KeyError):
                raise DataError(f"{path}:{number}: found {line[:80]!r}, needs {needed}") from None
            if key in rows:
                raise DataError(f"{path}:{number}: id {key} is on line {rows[key][0]} already")
            rows[key] = number, value
    if not rows:
        raise DataError(f"{path}: empty file, needs lines {needed}")
    return rows


def read_boxes(root: Path, known: Collection[str]) -> tuple[dict[str, list], list[str]]:
    """Of root/boxes.csv: {path below root, in NFC: its boxes}, and notes. known: the paths of the
    images below root.
    """
    file, boxes, astray = root / "boxes.csv", {}, []
    text = read_text(file) if os.path.lexists(file) else ""
    rows = csv.reader(io.StringIO(text), strict=True)
    try:
        for row in rows:
            name, *numbers = row = [field.strip() for field in row] or [""]
            is_header = [number.lower() for number in numbers] == ["xmin", "ymin", "xmax", "ymax"]
            if not any(row) or is_header and not boxes:
                continue
            try:
                box = parse_box(*numbers)
            except ValueError:
                raise DataError(
                    f"{file}:{rows.line_num}: found {','.join(row)[:80]!r}, needs "
                    "path,xmin,ymin,xmax,ymax with finite xmin < xmax, ymin < ymax") from None
            path = below(root, name)
            boxes.setdefault(path, []).append(box)
            if path not in known:
                astray.append(f"line {rows.line_num}, {name[:200]!r}")
    except csv.Error as error:
        raise DataError(f"{file}:{rows.line_num}: not a row of a CSV file ({error})") from None
    values = [value for listed in boxes.values() for box in listed for value in box]
    if values and 0 <= min(values) and max(values) <= 1:
        raise DataError(f"{file}: all its values lie within 0 and 1, which looks normalised: needs "
                        "pixels of the upright picture")
    return boxes, notes_of({f"rows of {file} name no image": astray})


def nfc(name: str) -> str:
    """With accented letters as one character each, which other systems write as two."""
    return unicodedata.normalize("NFC", name)


def below(root: Path, name: str) -> str:
    """A path of boxes.csv, relative to root or absolute, as one relative to root."""
    base = nfc(os.path.abspath(root))
    return os.path.relpath(os.path.join(base, nfc(name.replace("\\", "/"))), base)


def read_objects(
    file: Path, from_one: bool = False, left_out: list[str] | None = None
) -> tuple[list[tuple[str, tuple]], tuple[int, int] | None, str]:
    """An XML annotation as ILSVRC and Pascal VOC have it: a (class, box) for each object; its
    <size>, None where it is missing or 0; <folder>/<filename>.

    from_one: boxes count pixels from 1 and have their last ones inside; half-open boxes from 0
    are returned. left_out: gathers the objects that have no box, which are errors without it.
    """
    text, objects = read_text(file), []
    try:
        annotation = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise DataError(f"{file}:{error.position[0]}: not well-formed XML ({error})") from None
    for number, item in enumerate(annotation.findall("object"), 1):
        try:
            x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{side}"))
                              for side in ("xmin", "ymin", "xmax", "ymax"))
            box = parse_box(x0 - from_one, y0 - from_one, x1, y1)
            objects.append((item.findtext("name").strip(), box))
        except (ValueError, TypeError, AttributeError):
            if left_out is None:
                raise DataError(
                    f"{file}: object {number} needs a <name> and a <bndbox> of finite xmin < xmax, "
                    "ymin < ymax") from None
            left_out.append(f"{file}: object {number}")
    stated = read_size(annotation.findtext("size/width"), annotation.findtext("size/height"))
    names = [annotation.findtext(tag, "").strip() for tag in ("folder", "filename")]
    return objects, stated, "/".join(names)


def read_size(width, height) -> tuple[int, int] | None:
    """(width, height) of a picture as its annotation states them; None unless both are numbers
    above 0.
    """
    try:
        sides = int(float(width)), int(float(height))
    except (ValueError, OverflowError, TypeError):
        return None
    return sides if min(sides) > 0 else None


def of_class(file: Path, wnid: str | None) -> tuple[str, list, tuple[int, int] | None]:
    """(the image's class, its boxes, its stated size): the boxes of class `wnid`, by default the
    first object's.
    """
    objects, stated, _ = read_objects(file)
    wnid = wnid or (objects[0][0] if objects else None)
    boxes = [box for name, box in objects if name == wnid]
    if not boxes:
        raise DataError(f"{file}: found {len(objects)} objects, needs one of the image's class "
                        f"{wnid or ''}".rstrip())
    return wnid, boxes, stated


# ---------------------------------------------------------------- frames

UNSTATED = "annotations state no size of their image: their boxes are taken as they are"
SCALED = ("images have another size than their annotation states, in the same aspect: their boxes "
          "are scaled")
FRAME_UNKNOWN = ("images are turned or mirrored by EXIF in a way that no stated size shows: their "
                 "boxes are taken as the upright picture's")
STORED_FRAME = ("images turned by EXIF have boxes that reach beyond them but not beyond the "
                "picture as stored: needs boxes of the upright picture")
DARK = ("images are nearly black, no value above 16 of 255, as 12-bit values in 16-bit files are: "
        "taken as they are")


def turn_box(box: Sequence[float], size: tuple[int, int], orientation: int) -> tuple[float, ...]:
    """A box in a stored picture of that size, in the picture that EXIF's orientation 5 to 8 makes
    of it.
    """
    (x0, y0, x1, y1), (w, h) = box, size
    return {5: (y0, x0, y1, x1), 6: (h - y1, x0, h - y0, x1),
            7: (h - y1, w - x1, h - y0, w - x0), 8: (y0, w - x1, y1, w - x0)}[orientation]


def scale_box(box: Sequence[float], sx: float, sy: float) -> tuple[float, ...]:
    x0, y0, x1, y1 = box
    return x0 * sx, y0 * sy, x1 * sx, y1 * sy


def same_aspect(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether b is a times some number, each side rounded to within a pixel."""
    return max((b[i] - 1) / a[i] for i in (0, 1)) <= min((b[i] + 1) / a[i] for i in (0, 1))


def place_boxes(
    boxes: Sequence[tuple], stated: tuple[int, int] | None, decoded: Decoded, where, picture
) -> tuple[list, str]:
    """Boxes of a picture in pixels of its upright form, and what there is to say about them.

    stated is the (width, height) that their annotation, `where`, has for the picture: the upright
    one's; the stored one's, where the boxes turn with the picture; the upright one's with width and
    height swapped, where nothing but this statement is wrong; or that of a larger or smaller copy
    of either, where the boxes are scaled. Raises DataError where it is none of these.
    """
    stored, upright, orientation = decoded.stored, decoded.size, decoded.orientation
    if not stated:
        return boxes, UNSTATED
    if stated == upright[::-1] != stored:
        return boxes, ""

    # the picture that has the boxes, as it was annotated or in another size
    frames = [stated] if stated in (upright, stored) else [upright, stored]
    frame = next((frame for frame in frames if same_aspect(stated, frame)), None)
    if not frame:
        turned = f", {upright[0]} x {upright[1]} upright" * (upright != stored)
        raise DataError(f"{where}: states a size of {stated[0]} x {stated[1]}, but {picture} is "
                        f"{stored[0]} x {stored[1]}{turned}: needs boxes of that picture, or of a "
                        "copy in the same aspect")

    # scaled to it, then turned with it
    boxes = [scale_box(box, frame[0] / stated[0], frame[1] / stated[1]) for box in boxes]
    if frame != upright:
        boxes = [turn_box(box, stored, orientation) for box in boxes]
    if frame != stated:
        return boxes, SCALED
    return boxes, FRAME_UNKNOWN if orientation > 1 and stored == upright and boxes else ""


def place_all(
    boxes: Sequence[list], decoded: Sequence[Decoded], pictures: Iterable,
    annotations: Sequence[tuple] | None,
) -> tuple[list[list], list[str]]:
    """The boxes of many pictures, placed, and notes. annotations: a (file, stated size) for each
    picture, without a file where it has none; None for boxes that are the upright picture's.
    """
    placed, remarks = [], {}
    for i, (rows, image, picture) in enumerate(zip(boxes, decoded, pictures)):
        file, remark = picture, ""
        if annotations is None:
            remark = STORED_FRAME if fit_stored_alone(rows, image) else ""
        elif annotations[i][0]:
            file, stated = annotations[i]
            rows, remark = place_boxes(rows, stated, image, file, picture)
        placed.append(rows)
        if remark:
            remarks.setdefault(remark, []).append(file)
        if image.dark:
            remarks.setdefault(DARK, []).append(picture)
    return placed, notes_of(remarks)


def fit_stored_alone(boxes: list, decoded: Decoded) -> bool:
    """Whether boxes lie within a picture as stored, but not within the upright one."""
    def fit(size):
        return all(x0 >= 0 and y0 >= 0 and x1 <= size[0] and y1 <= size[1]
                   for x0, y0, x1, y1 in boxes)

    return decoded.stored != decoded.size and fit(decoded.stored) and not fit(decoded.size)
