"""What annotations say of each data set: image paths, labels, boxes."""

import os
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from support.pictures.annotations import (nfc, notes_of, of_class, parse_box, read_boxes,
                                          read_table)
from support.pictures.decode import DataError
from support.pictures.folders import (flatten, images_below, list_classes, list_images,
                                      list_one_level, list_split)


def spread(n: int, limit: int | None) -> Sequence[int]:
    """Indices of `limit` of n samples, evenly spread; of all without a limit."""
    return range(n) if limit is None or limit >= n else [i * n // limit for i in range(limit)]


class Samples(NamedTuple):
    """What a reader of annotations returns: image i is folder / paths[i], of class
    classes[labels[i]]; boxes[i] is its list of (xmin, ymin, xmax, ymax).
    """
    classes: list[str]
    folder: Path
    paths: list[str]
    labels: Sequence[int]
    boxes: list[list]
    notes: list[str]
    # each image's file of boxes and the image size that it states; None where boxes.csv or CUB has
    # them, in pixels of the upright image
    annotations: list[tuple[Path | None, tuple[int, int] | None]] | None = None


def read_cub(root: Path, split: str, limit: int | None) -> Samples:
    """The official CUB_200_2011 folder, with any number of classes: classes.txt, images.txt,
    image_class_labels.txt, train_test_split.txt, bounding_boxes.txt (x y width height, in pixels of
    the upright image) and images/. Every image needs a line in each.
    """
    def box(text):
        x, y, width, height = map(float, text.split())
        return parse_box(x, y, x + width, y + height)

    classes = read_table(root / "classes.txt", "'<class id> <name>'", nfc)
    if classes.keys() != set(range(1, len(classes) + 1)):
        raise DataError(f"{root / 'classes.txt'}: found {len(classes)} ids from {min(classes)} to "
                        f"{max(classes)}, needs 1 to {len(classes)}")
    images = read_table(root / "images.txt", "'<image id> <path below images/>'", str)
    lines = {}
    for number, path in images.values():
        if lines.setdefault(path, number) != number:
            raise DataError(
                f"{root / 'images.txt'}:{number}: {path} is on line {lines[path]} already")

    def annotation(name, needed, parse):
        table = read_table(root / name, needed, parse)
        for key in table:
            if key not in images:
                raise DataError(
                    f"{root / name}:{table[key][0]}: image id {key} is not in images.txt")
        for key in images:
            if key not in table:
                raise DataError(
                    f"{root / name}: no line for image id {key} (images.txt:{images[key][0]})")
        return {key: value for key, (_, value) in table.items()}

    labels = annotation("image_class_labels.txt", "'<image id> <class id>', a class of classes.txt",
                        {str(key): key - 1 for key in classes}.__getitem__)
    splits = annotation("train_test_split.txt", "'<image id> <1 for train, 0 for test>'",
                        {"1": "train", "0": "test"}.__getitem__)
    boxes = annotation("bounding_boxes.txt",
                       "'<image id> <x> <y> <width> <height>', finite, the sizes above 0", box)

    keys = [key for key in images if splits[key] == split]
    keys, paths = [keys[i] for i in spread(len(keys), limit)], []
    for number, path in map(images.get, keys):
        forms = (path, nfc(path), unicodedata.normalize("NFD", path))
        spelt = next((form for form in forms if os.path.isfile(root / "images" / form)), None)
        if not spelt:
            raise DataError(f"{root / 'images' / path}: no such image (images.txt:{number})")
        paths.append(spelt)
    return Samples([classes[i + 1][1] for i in range(len(classes))], root / "images", paths,
                   [labels[key] for key in keys], [[boxes[key]] for key in keys], [])


def first(*candidates: Path) -> Path | None:
    return next((path for path in candidates if path.exists()), None)


def read_ilsvrc(
    root: Path, split: str, limit: int | None, classes: Sequence[str] | None = None
) -> Samples:
    """ILSVRC 2012 as the challenge lays it out (CLS-LOC); "test" is its validation set, "val" does
    not exist.

    images       train/<wnid>/*.JPEG, and val/*.JPEG or val/<wnid>/*.JPEG,
                 in root/ILSVRC/Data/CLS-LOC, root/Data/CLS-LOC or root
    annotations  for val only, <the image's name>.xml, flat or in folders, in
                 root/ILSVRC/Annotations/CLS-LOC/val, root/Annotations/CLS-LOC/val,
                 root/Annotations/val or beside the images; a flat val's labels are theirs
    classes      the lines "<wnid> <words>" of LOC_synset_mapping.txt in root or above it, else
                 train's folders, sorted; or those given, wnids or words
    frame        an XML's boxes are in pixels of a picture of its <size>: see place_boxes

    """
    images = first(root / "ILSVRC/Data/CLS-LOC", root / "Data/CLS-LOC") or root
    folder = images / ("train" if split == "train" else "val")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder: needs {images / 'train'}/<wnid>/*.JPEG and "
                        "val/*.JPEG beside it")
    (wnids, names), left_out = ilsvrc_classes(root, images, classes), defaultdict(list)
    if split == "train":
        paths, labels = flatten(list_images(folder, left_out, wnids, complete=True))
        kept = spread(len(paths), limit)
        labels = array("i", (labels[i] for i in kept))
        return Samples(names, folder, [paths[i] for i in kept], labels, [()] * len(kept),
                       notes_of(left_out))

    # the images of val, their class if they lie in class folders, and their annotations
    paths, class_of = list_one_level(folder, left_out, {".xml"}), {}
    if not paths:
        left_out.clear()
        paths, labels = flatten(list_images(folder, left_out, wnids, False, {".xml"}))
        class_of = {i: wnids[label] for i, label in enumerate(labels)}
    annotations = first(root / "ILSVRC/Annotations/CLS-LOC/val", root / "Annotations/CLS-LOC/val",
                        root / "Annotations/val") or folder
    files = find_annotations(annotations, folder, paths, left_out)
    if paths and not class_of and not any(files):
        raise DataError(f"{annotations}: no XML annotations, needs them for the labels of {folder}")

    # a flat val's image without an annotation has no label
    kept = [i for i, file in enumerate(files) if file or class_of]
    left_out["images have no annotation and are left out"] = [
        folder / path for path, file in zip(paths, files) if not file and not class_of]
    kept = [kept[i] for i in spread(len(kept), limit)]

    label_of, labels = {wnid: label for label, wnid in enumerate(wnids)}, array("i")
    boxes, sources = [], []
    for i in kept:
        wnid, rows, stated = class_of.get(i), [], None
        if files[i]:
            wnid, rows, stated = of_class(files[i], wnid)
        if wnid not in label_of:
            raise DataError(f"{files[i]}: class {wnid!r} is not one of the {len(wnids)} that "
                            "training has")
        labels.append(label_of[wnid])
        boxes.append(rows)
        sources.append((files[i], stated))
    return Samples(names, folder, [paths[i] for i in kept], labels, boxes, notes_of(left_out),
                   sources)


def find_annotations(
    place: Path, folder: Path, paths: Sequence[str], left_out: dict[str, list]
) -> list[Path | None]:
    """The XML file below `place` of each image in `folder`, by its name; None where it has none."""
    images, files = {}, {}
    for path in paths:
        twin = images.setdefault(nfc(Path(path).stem), path)
        if twin != path:
            raise DataError(f"{folder / path}: shares its name with {twin}, needs its own for its "
                            "annotation")
    for file in sorted(place.rglob("*.xml")):
        twin = files.setdefault(nfc(file.stem), file)
        if twin != file and nfc(file.stem) in images:
            raise DataError(f"{file}: is of the same image as {twin}, needs one of them")
    left_out["annotations have no image and are ignored"] = [
        files[stem] for stem in sorted(files.keys() - images.keys())]
    return [files.get(stem) for stem in images]


def ilsvrc_classes(
    root: Path, images: Path, given: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """The wnids in the order of their labels, and the names of their classes."""
    name = "LOC_synset_mapping.txt"
    mapping = first(root / name, root.resolve().parent / name)
    table = read_table(mapping, "'<wnid> <words>'", nfc, str) if mapping else {}
    words = {wnid: text for wnid, (_, text) in table.items()}
    if given and (not mapping or words.keys() >= set(given)):
        return list(given), list(given)
    if mapping:
        return list(words), list(words.values())
    wnids = list(list_classes(images / "train", defaultdict(list)))
    return wnids, wnids


def read_folder(
    root: Path, split: str, limit: int | None, classes: Sequence[str] | None = None
) -> Samples:
    """Your own: train/<class>/*, test/<class>/*, perhaps val/<class>/*; or <class>/* alone, split
    80 / 10 / 10 by a hash of each file's name. The classes are those given, else train's folders,
    sorted. boxes.csv, if any, has rows path,xmin,ymin,xmax,ymax, perhaps below a header of these
    words: the path from root, the box in pixels of the upright image, any number per image.
    """
    classes, folder, images, notes = list_split(root, split, classes)
    paths, labels = flatten(images)
    kept = spread(len(paths), limit)
    paths, labels = [paths[i] for i in kept], [labels[i] for i in kept]
    below = {nfc(os.path.relpath(path, root)) for path in images_below(root, defaultdict(list))}
    boxes, more = read_boxes(root, below)
    prefix = "" if folder == root else f"{split}/"
    boxes = [boxes.get(nfc(prefix + path), []) for path in paths]
    return Samples(classes, folder, paths, labels, boxes, notes + more)
