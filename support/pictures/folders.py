"""Pictures in folders: which there are, what is left out and why, and a split by name.

Names are compared in Unicode's form NFC: macOS writes "é" as two characters, other systems as one.
"""

import hashlib
import os
from array import array
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from support.pictures.annotations import nfc, notes_of
from support.pictures.decode import DataError
from support.report.figures import is_ours

# endings of the files in which photographs come, of those that decode.FORMATS opens
SUFFIXES = set(".apng .avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .jpx .mpo .pbm .pcx .pgm "
               ".png .pnm .ppm .psd .qoi .sgi .tga .tif .tiff .webp".split())
# of file managers, in any folder of pictures
LITTER = {"thumbs.db", "ehthumbs.db", ".ds_store", "desktop.ini", "__macosx", "@eadir", "@recycle",
          "#recycle", "$recycle.bin", "system volume information", "lost+found", "icon\r"}
SPLITS = ("train", "val", "test")
DEEPER = "images lie deeper than in a class's folder and are left out"
STRAY = "images lie outside the class folders and are left out"
BESIDE = "images lie beside train/, val/ and test/ and are left out"
HIDDEN = "hidden files or folders are left out"
UNREADABLE = "files have an ending that is not read here and are left out"
NO_ENDING = "files have no ending and are left out"
DANGLING = "links lead nowhere and are left out"
SPECIAL = "entries are neither files nor folders and are left out"
CLOSED = "folders cannot be opened and are left out"


class Listing(NamedTuple):
    """What a folder holds: sorted names of folders and of images, and what is left out and why."""

    folders: list[str]
    images: list[str]
    left_out: dict[str, list[str]]  # reason: paths


def list_folder(folder: str | Path, known: Collection[str] = ()) -> Listing:
    """known: endings or names of files that serve another purpose."""
    listing = Listing([], [], {})
    try:
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: (nfc(entry.name), entry.name))
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
            listing.folders.append(entry.name)
            continue
        elif is_file and ending in SUFFIXES:
            listing.images.append(entry.name)
            continue
        elif is_file:
            reason = UNREADABLE if ending else NO_ENDING
        else:
            reason = DANGLING if entry.is_symlink() else SPECIAL
        listing.left_out.setdefault(reason, []).append(entry.path)
    return listing


def list_below(folder: str | Path, above: tuple = ()) -> tuple[list[str], dict[str, list[str]]]:
    """The paths of all images in a folder, however deep, and what is left out; through links, but
    not back into a folder above.
    """
    real = os.path.realpath(folder)
    if real in above:
        return [], {}
    try:
        listing = list_folder(folder)
    except DataError:  # nobody asked for this one
        return [], {CLOSED: [str(folder)]}
    paths = [os.path.join(folder, name) for name in listing.images]
    for name in listing.folders:
        deeper, left_out = list_below(os.path.join(folder, name), (*above, real))
        paths += deeper
        add_left_out(listing.left_out, left_out)
    return paths, listing.left_out


def add_left_out(total: dict[str, list], more: dict[str, list]) -> None:
    for reason, paths in more.items():
        total.setdefault(reason, []).extend(paths)


def find_images(places: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files as given, and the pictures in folders, however deep; notes on what is left out there.

    Pictures that evaluate.py wrote are not among those of a folder.
    """
    paths, left_out = [], {}
    for place in places:
        if os.path.isdir(place):
            below, more = list_below(place)
            paths += sorted(Path(path) for path in below if not is_ours(path))
            add_left_out(left_out, more)
        else:
            paths.append(Path(place))
    return paths, notes_of(left_out)


# ---------------------------------------------------------------- class folders


def by_name(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """{a name in NFC: as the folder has it}."""
    spelt = {nfc(name): name for name in names}
    if len(spelt) < len(names):
        twin = next(name for name in names if spelt[nfc(name)] != name)
        raise DataError(f"{folder / twin}: has its name twice, in two Unicode forms: needs one "
                        "folder for a class")
    return spelt


def list_classes(folder: Path, known: Collection[str] = ()) -> Listing:
    """The class folders in a folder; images beside them are left out. A link that leads nowhere is
    an error unless it was an image's.
    """
    listing = list_folder(folder, known)
    for path in listing.left_out.get(DANGLING, ()):
        if os.path.splitext(path)[1].lower() not in SUFFIXES:
            raise DataError(f"{path}: this link leads nowhere, needs to lead to a class's folder")
    add_left_out(listing.left_out, {STRAY: [str(folder / name) for name in listing.images]})
    return listing


def list_images(
    folder: Path, classes: Sequence[str], complete: bool, known: Collection[str] = ()
) -> tuple[list[list[str]], list[str]]:
    """The paths "<class folder>/<name>" of the images of each class, and notes on what is left out.
    complete: every class must have some.
    """
    class_folders, _, left_out = list_classes(folder, known)
    spelt, images = by_name(folder, class_folders), []
    for name in spelt.keys() - set(map(nfc, classes)):
        raise DataError(f"{folder / spelt[name]}: not one of the {len(classes)} classes that "
                        "training has")
    for name in classes:
        name, listing = spelt.get(nfc(name), name), Listing([], [], {})
        if complete or name in class_folders:
            listing = list_one_level(folder / name)
        if complete and not listing.images:
            notes = "; ".join(notes_of(listing.left_out))
            raise DataError(f"{folder / name}: no images in this class's folder"
                            + f": {notes}" * bool(notes))
        images.append([f"{name}/{image}" for image in listing.images])
        add_left_out(left_out, listing.left_out)
    return images, notes_of(left_out)


def list_one_level(folder: Path, known: Collection[str] = ()) -> Listing:
    """A folder whose deeper images are left out."""
    listing = list_folder(folder, known)
    deeper = [path for name in listing.folders for path in list_below(folder / name)[0]]
    add_left_out(listing.left_out, {DEEPER: deeper})
    return listing


def flatten(images: Sequence[list[str]]) -> tuple[list[str], array]:
    """The paths and the labels of images listed by class."""
    paths = [path for listed in images for path in listed]
    return paths, array("i", (label for label, listed in enumerate(images) for _ in listed))


# ---------------------------------------------------------------- a folder of one's own


def layout(root: Path) -> str:
    return (f"needs {root / 'train'}/<class>/<image> and test/<class>/<image>, or <class>/<image> "
            "alone, to be split 80 / 10 / 10")


def is_class(folder: Path) -> bool:
    """Whether a folder holds images and no folders."""
    listing = list_folder(folder)
    return bool(listing.images) and not listing.folders


def splits_of(root: Path) -> list[str]:
    """Which of train/, val/ and test/ a folder has; none where it is to be split by name.

    Beside other classes' folders, one that holds images itself is a class of that name.
    """
    for split in SPLITS:
        if (root / split).is_symlink() and not os.path.isdir(root / split):
            raise DataError(f"{root / split}: this link leads nowhere, needs to lead to a folder")
    splits = [split for split in SPLITS if os.path.isdir(root / split)]
    others = set(list_folder(root).folders) - set(SPLITS) if splits else ()
    if any(is_class(root / name) for name in others) and all(
            is_class(root / split) for split in splits):
        return []
    return splits


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
    return list(map(nfc, names))


def list_split(
    root: Path, split: str, classes: Sequence[str] | None
) -> tuple[list[str], Path, list[list[str]], list[str]]:
    """Of a folder's split: the classes, the folder that holds theirs, each one's images, notes."""
    splits, names = splits_of(root), class_names(root, classes)
    if not splits:
        images, notes = list_unsplit(root, names, not classes)
        parts = split_by_name(images)
        if not any(parts[split]):
            raise DataError(f"{root}: no images for split {split!r}: its {len(names)} classes have "
                            f"{sum(map(len, images))}, of which train takes at least one each: "
                            "needs more")
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
        beside += list_below(root / name)[0] if name not in SPLITS else []
    return names, root / split, images, notes + notes_of({BESIDE: beside})


def list_unsplit(
    root: Path, classes: Sequence[str], complete: bool
) -> tuple[list[list[str]], list[str]]:
    """The images of each class of a folder without splits, and notes."""
    if not any(list_folder(root / name).images for name in list_classes(root).folders):
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
    """The paths below root, in NFC, of the images of all its splits."""
    names = set()
    for split in splits_of(root) or [""]:
        for name in list_folder(root / split).folders:
            names |= {nfc(os.path.join(split, name, image))
                      for image in list_folder(root / split / name).images}
    return names


def place_of(path: str) -> float:
    """A number from 0 to 1 that follows from a file's name alone."""
    name = os.fsencode(nfc(os.path.basename(path)))
    return int.from_bytes(hashlib.sha256(name).digest()[:6], "big") / 2**48


def split_by_name(images: Sequence[list[str]]) -> dict[str, list[list[str]]]:
    """Images listed by class as {split: the same}: 80 / 10 / 10 by place_of, so that a new image
    moves no other one. At least one of each class is train's; where test would have none at all,
    each class gives it one.
    """
    parts = []  # of each class: {path: split}
    for paths in images:
        part = {path: SPLITS[(place_of(path) >= 0.8) + (place_of(path) >= 0.9)] for path in paths}
        if paths and "train" not in part.values():
            part[min(paths, key=place_of)] = "train"
        parts.append(part)
    if not any("test" in part.values() for part in parts):
        for part in parts:
            if len(part) > 1:
                part[max(part, key=place_of)] = "test"
    return {split: [[path for path in part if part[path] == split] for part in parts]
            for split in SPLITS}
