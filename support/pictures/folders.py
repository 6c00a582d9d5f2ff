"""Pictures in folders: which there are, what is left out and why, and a split by name.

Names are compared in Unicode's form NFC: macOS writes "é" as two characters, other systems as one.
"""

import hashlib
import os
from array import array
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from support.pictures.annotations import nfc, notes_of
from support.pictures.decode import DataError
from support.report.figures import is_ours

# endings of the files in which photographs come, of those that decode.FORMATS opens
SUFFIXES = set(".apng .avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .jpx .mpo .pbm .pcx "
               ".pgm .png .pnm .ppm .psd .qoi .sgi .tga .tif .tiff .webp".split())
# of file managers, in any folder of pictures
LITTER = {"thumbs.db", "ehthumbs.db", ".ds_store", "desktop.ini", "__macosx", "@eadir", "@recycle",
          "#recycle", "$recycle.bin", "system volume information", "lost+found", "icon\r"}
SPLITS = ("train", "val", "test")
DEEPER = "images lie deeper than in a class's folder and are left out"
STRAY = "images lie outside the class folders and are left out"
BESIDE = "images lie beside train/, val/ and test/ and are left out"
HIDDEN = "hidden files or folders are left out"
UNREADABLE = "files are of a kind that is not read here and are left out"
DANGLING = "links lead nowhere and are left out"


def list_folder(
    folder: str | Path, left_out: dict[str, list], known: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """The names of the folders and of the images in a folder, sorted. left_out gathers the paths of
    all else under the reason why. known: endings or names of files that serve another purpose.
    """
    folders, images = [], []
    try:
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: (nfc(entry.name), entry.name))
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; needs to be a folder that can be opened"
                        ) from None
    for entry in entries:
        ending = os.path.splitext(entry.name)[1].lower()
        if entry.name.lower() in LITTER or not {entry.name.lower(), ending}.isdisjoint(known):
            continue
        if entry.name.startswith("."):
            left_out[HIDDEN].append(entry.path)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            left_out[DANGLING].append(entry.path)
        elif entry.is_dir():
            folders.append(entry.name)
        elif ending in SUFFIXES and entry.is_file():
            images.append(entry.name)
        else:
            left_out[UNREADABLE].append(entry.path)
    return folders, images


def images_below(
    folder: str | Path, left_out: dict[str, list], above: tuple = ()
) -> Iterator[str]:
    """The paths of all images in a folder, however deep; through links, but not back into a folder
    above.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    folders, images = list_folder(folder, left_out)
    yield from (os.path.join(folder, name) for name in images)
    for name in folders:
        yield from images_below(os.path.join(folder, name), left_out, (*above, real))


def find_images(places: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files as given, and the pictures in folders, however deep; notes on what is left out there.

    Pictures that evaluate.py wrote are not among those of a folder.
    """
    paths, left_out = [], defaultdict(list)
    for place in places:
        if os.path.isdir(place):
            below = images_below(place, left_out)
            paths += sorted(Path(path) for path in below if not is_ours(path))
        else:
            paths.append(Path(place))
    return paths, notes_of(left_out)


# ---------------------------------------------------------------- class folders


def list_classes(
    folder: Path, left_out: dict[str, list], known: Collection[str] = ()
) -> dict[str, str]:
    """{class: its folder's name}, the class in NFC; images beside the folders are left out."""
    folders, images = list_folder(folder, left_out, known)
    left_out[STRAY] += [str(folder / name) for name in images]
    names = {}
    for name in folders:
        if names.setdefault(nfc(name), name) != name:
            raise DataError(f"{folder / name}: is there twice, in two Unicode forms of its name: "
                            "needs one folder for a class")
    return names


def list_images(
    folder: Path, left_out: dict[str, list], classes: Sequence[str], complete: bool,
    known: Collection[str] = (),
) -> list[list[str]]:
    """The paths "<class folder>/<name>" of the images of each class. complete: every class must
    have some.
    """
    names, images = list_classes(folder, left_out, known), []
    for name in names.keys() - set(map(nfc, classes)):
        raise DataError(f"{folder / names[name]}: not one of the {len(classes)} classes that "
                        "training has")
    for name in classes:
        name, own_images = names.get(nfc(name), name), []
        if complete or name in names.values():
            own_images = list_one_level(folder / name, left_out)
        if complete and not own_images:
            raise DataError("; ".join([f"{folder / name}: no images in this class's folder",
                                       *notes_of(left_out)]))
        images.append([f"{name}/{image}" for image in own_images])
    return images


def list_one_level(
    folder: Path, left_out: dict[str, list], known: Collection[str] = ()
) -> list[str]:
    """The names of the images in a folder; those that lie deeper are left out."""
    folders, images = list_folder(folder, left_out, known)
    for name in folders:
        left_out[DEEPER] += images_below(folder / name, defaultdict(list))
    return images


def flatten(images: Sequence[list[str]]) -> tuple[list[str], array]:
    """The paths and the labels of images listed by class."""
    paths = [path for listed in images for path in listed]
    return paths, array("i", (label for label, listed in enumerate(images) for _ in listed))


# ---------------------------------------------------------------- a folder of one's own


def splits_of(root: Path) -> list[str]:
    """Which of train/, val/ and test/ a folder has; none where it is to be split by name.

    Beside other classes' folders, one that holds images itself is a class of that name.
    """
    def is_class(name: str) -> bool:
        folders, images = list_folder(root / name, defaultdict(list))
        return bool(images) and not folders

    splits = [split for split in SPLITS if os.path.lexists(root / split)]
    others = set(list_folder(root, defaultdict(list))[0]).difference(splits)
    plain = all(map(is_class, splits)) and any(map(is_class, others))
    return [] if plain else splits


def is_run(folder: Path) -> bool:
    """Whether train.py made a folder: a run, or runs/ without pictures of its own."""
    return os.path.exists(folder / ".lock") or (
        folder.name == "runs" and not list_folder(folder, defaultdict(list))[1])


def list_split(
    root: Path, split: str, classes: Sequence[str] | None
) -> tuple[list[str], Path, list[list[str]], list[str]]:
    """Of a folder's split: the classes, the folder that holds theirs, each one's images, notes."""
    layout = (f"needs {root / 'train'}/<class>/<image> and test/<class>/<image>, or "
              "<class>/<image> alone, to be split 80 / 10 / 10")
    splits, left_out, complete = splits_of(root), defaultdict(list), not classes
    for needed in (split,) if classes else ("train", split):
        if splits and needed not in splits:
            raise DataError(f"{root / needed}: no such folder, only {', '.join(splits)}: {layout}")

    # beside class folders may lie boxes.csv and the runs of train.py
    folders, beside = list_folder(root, defaultdict(list))
    folder, known = root / "train" if splits else root, {"boxes.csv"}
    known |= {name.lower() for name in folders if not splits and is_run(root / name)}
    classes = list(classes or list_classes(folder, defaultdict(list), known))
    if not classes:
        raise DataError(f"{folder}: no class folders: {layout}")

    if splits:
        images = list_images(root / split, left_out, classes, split == "train")
        left_out[BESIDE] += [str(root / name) for name in beside]
        for name in folders:
            if name not in SPLITS and not is_run(root / name):
                left_out[BESIDE] += images_below(root / name, defaultdict(list))
        return classes, root / split, images, notes_of(left_out)

    if not any(list_folder(root / name, defaultdict(list))[1] for name in folders):
        raise DataError(f"{root}: no images in its folders: {layout}")
    images = list_images(root, left_out, classes, complete, known)
    parts = split_by_name(images)
    sizes = ", ".join(f"{sum(map(len, listed))} {part}" for part, listed in parts.items())
    note = (f"{root} has no train/ and test/: the images of its {len(classes)} classes are split "
            f"80 / 10 / 10 by a hash of their names, at least one each to train, into {sizes}")
    return classes, root, parts[split], [note, *notes_of(left_out)]


def has_val(root: Path) -> bool:
    """Whether a folder has images to validate on."""
    try:
        splits = splits_of(root)
        return "val" in splits if splits else any(list_split(root, "val", None)[2])
    except DataError:  # which load_dataset will raise
        return False


def hash_of(path: str) -> float:
    """A number from 0 to 1 that follows from a file's name alone."""
    name = os.fsencode(nfc(os.path.basename(path)))
    return int.from_bytes(hashlib.sha256(name).digest()[:6], "big") / 2**48


def split_by_name(images: Sequence[list[str]]) -> dict[str, list[list[str]]]:
    """Images listed by class as {split: the same}: 80 / 10 / 10 by hash_of, so that a new image
    moves no other one. At least one of each class is train's; where test would have none at all,
    each class gives it one.
    """
    parts = []  # of each class: {path: split}
    for paths in images:
        part = {path: SPLITS[(hash_of(path) >= 0.8) + (hash_of(path) >= 0.9)] for path in paths}
        if paths and "train" not in part.values():
            part[min(paths, key=hash_of)] = "train"
        parts.append(part)
    if not any("test" in part.values() for part in parts):
        for part in parts:
            if len(part) > 1:
                part[max(part, key=hash_of)] = "test"
    return {split: [[path for path in part if part[path] == split] for part in parts]
            for split in SPLITS}
