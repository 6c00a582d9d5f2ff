"""Pictures in class folders: which there are, what is left out and why, and a split by name."""

import hashlib
import os
from array import array
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from support.pictures.annotations import nfc, notes_of
from support.pictures.decode import DataError

SUFFIXES = set(".apng .avif .bmp .dib .gif .jfif .jp2 .jpe .jpeg .jpg .mpo .pbm .pgm .png .pnm "
               ".ppm .qoi .tga .tif .tiff .webp".split())  # what Pillow decodes
# of file managers, in any folder of pictures
LITTER = {"thumbs.db", ".ds_store", "desktop.ini", "__macosx", "@eadir"}
SPLITS = ("train", "val", "test")
DEEPER = "images lie deeper than in a class's folder and are left out"
STRAY = "images lie outside the class folders and are left out"
BESIDE = "images lie beside train/, val/ and test/ and are left out"
HIDDEN = "hidden files or folders are left out"
UNREADABLE = "files have an ending that Pillow cannot read and are left out"
NO_ENDING = "files have no ending and are left out"
DANGLING = "links lead nowhere and are left out"
SPECIAL = "entries are neither files nor folders and are left out"


class Listing(NamedTuple):
    """What a folder holds: sorted names of folders and of images, and what is left out and why."""

    folders: list[str]
    images: list[str]
    left_out: dict[str, list[str]]  # reason: paths


def list_folder(folder: Path, known: Collection[str] = ()) -> Listing:
    """known: endings or names of files that serve another purpose."""
    found = Listing([], [], {})
    try:
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; needs to be a folder") from None
    for entry in entries:
        ending = os.path.splitext(entry.name)[1].lower()
        if entry.name.lower() in LITTER or not {entry.name.lower(), ending}.isdisjoint(known):
            continue
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # of a link to itself
            is_folder = is_file = False
        if entry.name.startswith("."):
            reason = HIDDEN
        elif is_folder:
            found.folders.append(entry.name)
            continue
        elif is_file and ending in SUFFIXES:
            found.images.append(entry.name)
            continue
        elif is_file:
            reason = UNREADABLE if ending else NO_ENDING
        else:
            reason = DANGLING if entry.is_symlink() else SPECIAL
        found.left_out.setdefault(reason, []).append(entry.path)
    return found


def images_below(folder: Path) -> list[str]:
    """The paths of all images in a folder, however deep, through links but not back up."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.join(os.path.realpath(place), "")
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and name.lower() not in LITTER
            and not real.startswith(os.path.join(os.path.realpath(os.path.join(place, name)), "")))
        found += (os.path.join(place, name) for name in sorted(files)
                  if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
                  and os.path.isfile(os.path.join(place, name)))
    return found


def add_left_out(total: dict[str, list], more: dict[str, list]) -> None:
    for reason, paths in more.items():
        total.setdefault(reason, []).extend(paths)


def list_classes(folder: Path, known: Collection[str] = ()) -> Listing:
    """The class folders in a folder; images beside them are left out. A link that leads nowhere is
    an error unless it was an image's.
    """
    found = list_folder(folder, known)
    for path in found.left_out.get(DANGLING, ()):
        if os.path.splitext(path)[1].lower() not in SUFFIXES:
            raise DataError(f"{path}: this link leads nowhere, needs to lead to a class's folder")
    add_left_out(found.left_out, {STRAY: [str(folder / name) for name in found.images]})
    return found


def list_images(
    folder: Path, classes: Sequence[str], complete: bool, known: Collection[str] = ()
) -> tuple[list[list[str]], list[str]]:
    """The names of the images in <folder>/<class>/ for each class, and notes on what is left out.
    complete: every class must have some.
    """
    there, images = list_classes(folder, known), []
    for name in there.folders:
        if name not in classes:
            raise DataError(f"{folder / name}: not one of the {len(classes)} classes that training "
                            "has")
    for name in classes:
        found = Listing([], [], {})
        if complete or name in there.folders:
            found = list_folder(folder / name, known)
            deeper = [path for sub in found.folders for path in images_below(folder / name / sub)]
            add_left_out(found.left_out, {DEEPER: deeper})
        if complete and not found.images:
            about = "; ".join(notes_of(found.left_out))
            raise DataError(f"{folder / name}: no images in this class's folder"
                            + f": {about}" * bool(about))
        images.append(found.images)
        add_left_out(there.left_out, found.left_out)
    return images, notes_of(there.left_out)


def list_flat(folder: Path, known: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """The names of the images in a folder, and notes on what is left out."""
    found = list_folder(folder, known)
    deeper = [path for sub in found.folders for path in images_below(folder / sub)]
    add_left_out(found.left_out, {DEEPER: deeper})
    return found.images, notes_of(found.left_out)


def flatten(images: Sequence[list[str]], classes: Sequence[str]) -> tuple[list[str], array]:
    """Paths "<class>/<name>" and labels of images listed by class."""
    paths = [f"{name}/{image}" for name, listed in zip(classes, images) for image in listed]
    labels = array("i", (label for label, listed in enumerate(images) for _ in listed))
    return paths, labels


# ---------------------------------------------------------------- a folder of one's own


def layout(root: Path) -> str:
    return (f"needs {root / 'train'}/<class>/<image> and test/<class>/<image>, or <class>/<image> "
            "alone, to be split 80 / 10 / 10")


def splits_of(root: Path) -> list[str]:
    """Which of train/, val/ and test/ a folder has; none where it is to be split by name."""
    for split in SPLITS:
        if (root / split).is_symlink() and not os.path.isdir(root / split):
            raise DataError(f"{root / split}: this link leads nowhere, needs to lead to a folder")
    return [split for split in SPLITS if os.path.isdir(root / split)]


def no_classes(root: Path) -> set[str]:
    """What may lie beside plain class folders: boxes.csv, and train.py's runs."""
    runs = os.path.isdir(root / "runs") and not list_folder(root / "runs").images
    return {"boxes.csv", "runs"} if runs else {"boxes.csv"}


def class_names(root: Path, classes: Sequence[str] | None) -> list[str]:
    """The classes of a folder: those given, else the names of train's folders, or of its own."""
    if classes:
        return list(classes)
    splits = splits_of(root)
    if splits and "train" not in splits:
        raise DataError(f"{root / 'train'}: no such folder, only {', '.join(splits)}: "
                        + layout(root))
    folder, known = (root / "train", ()) if splits else (root, no_classes(root))
    names = list_classes(folder, known).folders
    if not names:
        raise DataError(f"{folder}: no class folders: {layout(root)}")
    return names


def list_split(
    root: Path, split: str, classes: Sequence[str] | None
) -> tuple[list[str], Path, list[list[str]], list[str]]:
    """Of a folder's split: the classes, the folder that holds theirs, each one's images, notes."""
    splits, names = splits_of(root), class_names(root, classes)
    if not splits:
        images, notes = list_unsplit(root, names, not classes)
        parts = split_by_name(images)
        sizes = (f"{sum(map(len, listed))} {part}" for part, listed in parts.items())
        notes.insert(0, f"{root} has no train/ and test/: the images of its {len(names)} classes "
                     "are split 80 / 10 / 10 by a hash of their names, into " + ", ".join(sizes))
        return names, root, parts[split], notes
    if split not in splits:
        raise DataError(f"{root / split}: no such folder, only {', '.join(splits)}: "
                        + layout(root))
    images, notes = list_images(root / split, names, split == "train")
    there = list_folder(root)
    beside = [str(root / name) for name in there.images]
    for name in there.folders:
        beside += images_below(root / name) if name not in SPLITS else []
    return names, root / split, images, notes + notes_of({BESIDE: beside})


def list_unsplit(
    root: Path, classes: Sequence[str], complete: bool
) -> tuple[list[list[str]], list[str]]:
    """The images of each class of a folder without splits, and notes."""
    filled = [name for name in list_classes(root).folders if list_folder(root / name).images]
    if not filled:
        raise DataError(f"{root}: no images in its folders: {layout(root)}")
    return list_images(root, classes, complete, no_classes(root))


def has_val(root: Path) -> bool:
    """Whether a folder has images to validate on."""
    try:
        splits = splits_of(root)
        if splits or not root.is_dir():
            return "val" in splits
        images, _ = list_unsplit(root, class_names(root, None), True)
        return any(split_by_name(images)["val"])
    except DataError:  # which load_dataset will raise
        return False


def image_names(root: Path) -> set[str]:
    """The paths below root, normalised, of the images of all its splits."""
    splits, names = splits_of(root), set()
    for path in images_below(root):
        parts = os.path.relpath(path, root).split(os.sep)
        if len(parts) == 3 and parts[0] in splits if splits else len(parts) == 2:
            names.add(nfc("/".join(parts)))
    return names


def place_of(name: str) -> float:
    """A number from 0 to 1 that follows from a file's name alone."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:6], "big") / 2**48


def split_by_name(images: Sequence[list[str]]) -> dict[str, list[list[str]]]:
    """Images listed by class as {split: the same}: 80 / 10 / 10 by place_of, so that a new image
    moves no other one. At least one of each class is train's; where test would have none at all,
    each class gives it one.
    """
    parts = []  # of each class: {name: split}
    for names in images:
        part = {name: SPLITS[(place_of(name) >= 0.8) + (place_of(name) >= 0.9)] for name in names}
        if names and "train" not in part.values():
            part[min(names, key=place_of)] = "train"
        parts.append(part)
    if not any("test" in part.values() for part in parts):
        for part in parts:
            if len(part) > 1:
                part[max(part, key=place_of)] = "test"
    return {split: [[name for name in part if part[name] == split] for part in parts]
            for split in SPLITS}
