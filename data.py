"""Image-level labels to train with, boxes to score with: synthetic birds, CUB-200-2011, ILSVRC, a
folder of your own.

    load_dataset(name, root, split, img_size)          a torch Dataset; dataset[i] is a dict:
        image   (3, H, W) uint8; normalise(images) makes the network's input of it
        label   int, an index of dataset.classes
        boxes   (M, 4) float32, half-open xyxy in pixels of the upright original; M may be 0
        size    (width, height) of the upright original
        view    (x0, y0, x1, y1): the region of it that `image` shows; x0 > x1 where it is mirrored
        path    str; for birds a name, since they have no file
        index   int, the place in the data set
        palette int, birds only: the body's colours, a second image-level label

Every random choice in training is a function of (seed, epoch, index): neither workers nor processes
change a result. What a data set had to clip, drop or leave unscored stands in dataset.notes.
Anything wrong in a file raises DataError, one line that names it.

    # a contact sheet with boxes: check your own data
    python data.py --data cub --root CUB_200_2011 --out sheet.png
    # boxes.csv from annotations of other tools
    python data.py --convert coco FILE|voc DIR|yolo DIR --root mydata --out mydata/boxes.csv
"""

import contextlib
import hashlib
import math
import multiprocessing
import multiprocessing.queues
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset

from support.common import (Parser, free_memory, last_line, local_processes, one_line, pair,
                            progress, say, write_text)
from support.pictures.annotations import nfc, place_all
from support.pictures.birds import BIRD_STREAMS, BIRDS, PALETTES, SPECIES, draw_birds
from support.pictures.convert import READERS as CONVERTERS
from support.pictures.convert import convert
from support.pictures.decode import DataError, open_image
from support.pictures.folders import has_val
from support.pictures.readers import read_cub, read_folder, read_ilsvrc, spread
from support.pictures.views import (as_tensor, check_images, clip_boxes, fixed_view, load_image,
                                    load_whole, load_wholes, normalise, resize_view, whole_size)
from support.report.figures import class_name, fit_text, is_ours, put, write_png

# what other projects import
__all__ = ["DataError", "collate", "has_split", "load_dataset", "load_image", "loader",
           "normalise", "open_image"]

LOADING_TIMEOUT = 600  # seconds for a batch

# ---------------------------------------------------------------- views in training


class Split(Dataset):
    """A split of a data set: dataset[index], or dataset[epoch, index] where views are random.

    A training view is img_size (h, w) cut out of the stored picture of whole_size (H, W), which a
    photograph is resized to, and mirrored half of the time. It may reach `margin` (rows, columns)
    beyond the stored picture, which is reflected there.
    """

    margin = (0, 0)

    def __len__(self):
        return len(self.labels)

    def random_crop(self, epoch: int, index: int) -> tuple[int, int, bool]:
        """(top, left, mirrored) in the stored picture: a function of (seed, epoch, index)."""
        rng = np.random.default_rng((self.seed, epoch, index))
        top, left = (int(rng.integers(whole + 2 * margin - side + 1)) - margin
                     for whole, margin, side in zip(self.whole_size, self.margin, self.img_size))
        return top, left, bool(rng.random() < 0.5)

    def random_view(self, pixels: np.ndarray, size, epoch: int, index: int) -> tuple:
        """A stored picture (H, W, 3) of an original of `size` -> its view (h, w, 3), and where the
        original shows it.
        """
        (h, w), (H, W) = self.img_size, self.whole_size
        top, left, mirrored = self.random_crop(epoch, index)
        rows, columns = reflect(np.arange(top, top + h), H), reflect(np.arange(left, left + w), W)
        x0, x1 = left * size[0] / W, (left + w) * size[0] / W
        y0, y1 = top * size[1] / H, (top + h) * size[1] / H
        if mirrored:
            x0, x1, columns = x1, x0, columns[::-1]
        return pixels.take(rows, 0).take(columns, 1), (x0, y0, x1, y1)


def reflect(positions, side: int):
    """Positions (array or tensor) beyond 0 to side - 1 reflected at the border."""
    return side - 1 - abs(side - 1 - abs(positions))


# ---------------------------------------------------------------- synthetic birds


class Birds(Split):
    """Synthetic birds, drawn once, on all cores, and kept in memory: 12,000 of 64 x 64 take 150 MB.
    They are drawn at the network's size, so in training they are shifted (by up to 3/32 of it,
    reflected at the border) and mirrored; the resized crop that photographs get would only blur
    them.
    """

    def __init__(self, split: str, img_size, limit=None, crop=None, augment=False, seed=0,
                 species=9):
        if not 2 <= species <= len(SPECIES):
            raise DataError(f"species: got {species}, needs 2 to {len(SPECIES)}")
        self.name, self.split, self.img_size, self.crop = "synthetic", split, img_size, crop
        self.classes, self.num_palettes, self.notes = SPECIES[:species], len(PALETTES), []
        self.augment, self.seed, self.whole_size = augment, seed, img_size
        self.margin = tuple(round(side * 3 / 32) for side in img_size)
        self.indices = spread(BIRDS[split], limit)
        draw = partial(draw_birds, BIRD_STREAMS[split], img_size, species)
        drawn = in_processes(draw, self.indices, "drawing birds")
        self.pictures, self.labels, self.palettes, self.boxes = map(np.concatenate, zip(*drawn))

    def stored(self) -> Iterator[np.ndarray]:
        yield self.pictures

    annotated = property(lambda self: len(self))  # all birds have a box

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        (h, w), pixels = self.img_size, self.pictures[index]  # (H, W, 3)
        if self.augment:
            pixels, view = self.random_view(pixels, (w, h), epoch, index)
        else:
            view = fixed_view((w, h), (h, w), self.crop)
            if self.crop:
                pixels = resize_view(Image.fromarray(pixels), (w, h), view, (h, w))
        return {"image": as_tensor(pixels), "label": int(self.labels[index]),
                "palette": int(self.palettes[index]),
                "boxes": torch.from_numpy(self.boxes[index:index + 1]), "size": (w, h),
                "view": view, "index": index, "path": self.path(index)}

    def path(self, index: int) -> str:
        return f"synthetic/{self.split}/{self.indices[index]:05d}"


def in_processes(
    work: Callable[[Sequence], object], items: Sequence, label: str, each: int = 250
) -> Iterator:
    """work(some items), so many at a time, on all cores, in order."""
    chunks = [items[i:i + each] for i in range(0, len(items), each)]
    processes = min(_cores(), len(chunks))
    shown = progress(chunks, f"{label}, {each} each", os.environ.get("RANK", "0") == "0")
    if processes < 2:
        yield from map(work, shown)
        return
    # forked: spawned ones import torch first, and rerun a script without a __main__ guard
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, fork, _leave_signals) as pool:
        results = pool.map(work, chunks)
        for _ in shown:
            yield next(results)


def _cores() -> int:
    """How many processes may work: torchrun's share the machine, a daemonic one may have no
    children.
    """
    if not hasattr(os, "sched_getaffinity") or multiprocessing.current_process().daemon:
        return 1
    return len(os.sched_getaffinity(0)) // local_processes()


def _leave_signals(*_):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the parent's to handle
        signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------- image files


class Pictures(Split):
    """Image files with a label each and any number of boxes."""

    def __init__(self, name, samples, split, img_size, crop, augment, seed):
        self.classes, self.folder, paths, labels, boxes, self.notes, annotations = samples
        if not len(labels):
            raise DataError("; ".join([f"{self.folder}: no images for split {split!r} of {name}",
                                       *self.notes]))
        self.name, self.split, self.img_size, self.crop = name, split, img_size, crop
        self.augment, self.seed, self.whole_size = augment, seed, whole_size(img_size)
        # bytes in one array: 1.3 million paths take 60 MB, which forked workers share
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.array(labels, np.int32)
        if split != "train" or not augment:
            boxes = self._check(boxes, annotations)
        self.annotated = sum(len(rows) > 0 for rows in boxes)
        # image i's boxes are rows first[i] to first[i + 1]
        self.first = np.cumsum([0, *map(len, boxes)])
        self.boxes = torch.tensor([box for rows in boxes for box in rows],
                                  dtype=torch.float32).view(-1, 4)

    def _check(self, boxes: list[list], annotations) -> list[list]:
        """Decodes every scored image as scoring will: a broken one shows now, not after an hour of
        training. Returns the boxes in pixels of the upright images, clipped to them.
        """
        paths = [self.folder / os.fsdecode(path) for path in self.paths]
        work = partial(check_images, img_size=self.img_size, crop=self.crop)
        pictures = list(chain(*in_processes(work, paths, f"checking {self.split} images")))
        boxes, notes = place_all(boxes, pictures, paths, annotations)
        self.notes += notes
        inside, clipped, outside = [], 0, 0
        for rows, decoded in zip(boxes, pictures):
            rows = torch.tensor(rows, dtype=torch.float32).view(-1, 4)
            cut = clip_boxes(rows, (0, 0, *decoded.size))
            kept = (cut[:, 2:] > cut[:, :2]).all(1)
            outside += int((~kept).sum())
            clipped += int((cut != rows)[kept].any(1).sum())
            inside.append(cut[kept].tolist())
        if clipped:
            self.notes.append(f"{clipped} boxes reach beyond their images and are clipped")
        if outside:
            self.notes.append(f"{outside} boxes lie outside their images and are left out")
        if unscored := sum(not rows for rows in inside):
            self.notes.append(f"{unscored} of {len(self)} {self.split} images have no box and are "
                              "not scored")
        return inside

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        path = self.path(index)
        if self.augment:
            pixels, size = load_whole(path, self.whole_size)
            pixels, view = self.random_view(pixels, size, epoch, index)
            image = as_tensor(pixels)
        else:
            image, view, size = load_image(path, self.img_size, self.crop)
        boxes = self.boxes[self.first[index]:self.first[index + 1]]
        return {"image": image, "label": int(self.labels[index]), "boxes": boxes, "size": size,
                "view": view, "index": index, "path": path}

    def path(self, index: int) -> str:
        return str(self.folder / os.fsdecode(self.paths[index]))

    def stored(self) -> Iterator[np.ndarray]:
        """All whole pictures, some (n, H, W, 3) uint8 at a time, decoded on all cores."""
        paths = [self.path(index) for index in range(len(self))]
        decode = partial(load_wholes, img_size=self.whole_size)
        return in_processes(decode, paths, f"decoding {self.split} images", 64)


READERS = {"cub": read_cub, "ilsvrc": read_ilsvrc, "folder": read_folder}
DATASETS = ("synthetic", *READERS)


def has_split(name: str, root: str | Path | None, split: str) -> bool:
    """Whether there is such a split: train and test always, val for the birds and for a folder with
    val/ or enough images to split.
    """
    if split == "val":
        return name == "synthetic" or name == "folder" and bool(root) and has_val(Path(root))
    return split in ("train", "test")


def load_dataset(
    name: str, root: str | Path | None, split: str, img_size, *, limit: int | None = None,
    crop: int | None = None, augment: bool | None = None, seed: int = 0,
    classes: Sequence[str] | None = None, species: int = 9,
) -> Dataset:
    """A data set as at the top of this file. img_size is an int or (height, width). limit keeps
    that many samples, evenly spread. augment, by default on for split="train", takes random
    views, functions of (seed, epoch, index): dataset[epoch, index]. crop=SIZE is for test
    pictures (see fixed_view). classes: those of a folder or of ILSVRC without a train/.
    species: how many kinds of birds, the length of `classes` where these are given. Raises
    DataError.
    """
    augment, img_size = split == "train" if augment is None else augment, pair(img_size)
    if name not in DATASETS:
        raise DataError(f"no data set {name!r}: needs one of {', '.join(DATASETS)}")
    if name != "synthetic" and not (root and os.path.isdir(root)):
        raise DataError(f"{root}: no such folder; {name} needs the data's")
    if not has_split(name, root, split):
        raise DataError(f"{name} has no split {split!r}")
    if crop is not None and crop < max(img_size):
        raise DataError(f"crop: got {crop}, needs at least the network's {max(img_size)} pixels")
    if name == "synthetic":
        species = len(classes) if classes else species
        return Birds(split, img_size, limit, crop, augment, seed, species)
    known = {} if name == "cub" else {"classes": classes}
    samples = READERS[name](Path(root), split, limit, **known)
    return Pictures(name, samples, split, img_size, crop, augment, seed)


def digest(dataset: Dataset) -> str:
    """A hash of the samples' paths below the data set's folder and of their labels."""
    if isinstance(dataset, Birds):
        paths = [f"{dataset.split}/{index}" for index in dataset.indices]
    else:
        paths = map(os.fsdecode, dataset.paths)
    pairs = "".join(f"{nfc(path)}\t{label}\n" for path, label in zip(paths, dataset.labels))
    return hashlib.sha256(os.fsencode(pairs)).hexdigest()


def collate(samples: list[dict]) -> dict:
    """A batch: image (B, 3, H, W) uint8, label, index and palette (B,) int64, size (B, 2) int64,
    view (B, 4) float32; boxes and path are lists.
    """
    batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    batch["image"] = torch.stack(batch["image"])
    for key in batch.keys() & {"label", "index", "palette", "size"}:
        batch[key] = torch.tensor(batch[key])
    batch["view"] = torch.tensor(batch["view"], dtype=torch.float32)
    return batch


def _pack(samples):
    batch = collate(samples)
    batch["counts"] = [len(boxes) for boxes in batch["boxes"]]
    batch["boxes"] = torch.cat(batch["boxes"])  # a tensor out of a worker costs a file descriptor
    return batch


def loader(dataset: Dataset, batches: Iterable[list], workers: int = 0) -> Iterator[dict]:
    """Batches of these indices, or pairs (epoch, index), in this order, whatever the number of
    workers, which live until the last batch; torch's random state is left alone.

    Raises DataError for a broken file, RuntimeError where a worker dies or takes too long.
    """
    others = set(multiprocessing.active_children())
    if workers:
        _allow_files(64 + 32 * workers)
    loaded = DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=_pack,
                        generator=torch.Generator(), worker_init_fn=_start_worker,
                        pin_memory=torch.cuda.is_available(),
                        timeout=LOADING_TIMEOUT if workers else 0)
    try:
        for batch in loaded:
            batch["boxes"] = list(batch["boxes"].split(batch.pop("counts")))
            yield batch
    except DataError as error:
        # whose frames would keep the workers
        raise error.with_traceback(None)
    except (RuntimeError, OSError, MemoryError, KeyboardInterrupt) as error:
        end_workers(others)
        if not workers or isinstance(error, KeyboardInterrupt):
            raise
        raise RuntimeError(
            f"--workers: a process that loads images failed ({last_line(error)[:200]}): fewer "
            "need less memory, shared memory (/dev/shm) and open files; 0 needs none") from None


def end_workers(others: set) -> None:
    """Kills this process's children but `others`: those that load images leave SIGTERM, by which
    Python ends its children, to the run, and a stuck one would be waited for.
    """
    for worker in set(multiprocessing.active_children()) - others:
        with contextlib.suppress(RuntimeError):  # torch's, about its death
            worker.kill()
            worker.join()


def _start_worker(_):
    """A batch that cannot be sent ends its worker, and so the run: it would be waited for."""
    _leave_signals()
    multiprocessing.queues.Queue._on_queue_feeder_error = lambda *_: os._exit(1)


def _allow_files(count: int) -> None:
    """Lets this process open so many files. Raises RuntimeError where it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != hard < count:
        raise RuntimeError(f"--workers: they need {count} open files, of which ulimit -n allows "
                           f"{hard}: fewer of them need less, 0 none")
    if resource.RLIM_INFINITY != soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


class Cache:
    """A training split's stored pictures, decoded once and held on a device.

    Its batches are the loader's, bit for bit: views are index arithmetic.
    """

    def __init__(self, split: Split, device: torch.device):
        self.split, self.device, done = split, device, 0
        shape = len(split), 3, *split.whole_size
        self.pictures = torch.empty(shape, dtype=torch.uint8, device=device)
        for chunk in split.stored():  # (n, H, W, 3)
            chunk = torch.from_numpy(chunk).to(device)
            self.pictures[done:done + len(chunk)] = chunk.permute(0, 3, 1, 2)
            done += len(chunk)
        labels = {"label": split.labels, "palette": getattr(split, "palettes", None)}
        self.labels = {name: torch.from_numpy(ids).to(device, torch.int64)
                       for name, ids in labels.items() if ids is not None}

    def batch(self, keys: list[tuple[int, int]]) -> dict:
        """Of each (epoch, index): image (B, 3, h, w) uint8, label and palette (B,)."""
        (h, w), (H, W) = self.split.img_size, self.split.whole_size
        views = [(index, *self.split.random_crop(epoch, index)) for epoch, index in keys]
        index, top, left, mirrored = send(torch.tensor(views), self.device).unbind(1)  # each (B,)
        rows = reflect(top[:, None] + torch.arange(h, device=self.device), H)  # (B, h)
        columns = reflect(left[:, None] + torch.arange(w, device=self.device), W)  # (B, w)
        columns = torch.where(mirrored[:, None] > 0, columns.flip(1), columns)
        images = self.pictures.index_select(0, index)  # (B, 3, H, W)
        images = images.gather(2, rows[:, None, :, None].expand(-1, 3, -1, W))  # (B, 3, h, W)
        images = images.gather(3, columns[:, None, None].expand(-1, 3, h, -1))  # (B, 3, h, w)
        return {"image": images} | {name: ids[index] for name, ids in self.labels.items()}


def cache_fits(split: Split, device: torch.device) -> bool:
    """Whether a Cache takes at most a quarter of what is free for this process on the device."""
    return 3 * len(split) * math.prod(split.whole_size) <= free_memory(device) / 4


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device, without waiting for what that computes."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def contact_sheet(name: str, root: Path | None, split: str, out: Path) -> None:
    side = 192
    dataset = load_dataset(name, root, split, 64 if name == "synthetic" else side, limit=24,
                           augment=False)
    sheet = Image.new("RGB", (6 * side, -(-len(dataset) // 6) * side))
    for i in range(len(dataset)):
        sample = dataset[i]
        tile = Image.fromarray(sample["image"].permute(1, 2, 0).numpy()).resize((side, side))
        draw = ImageDraw.Draw(tile)
        for box in sample["boxes"] * side / torch.tensor(sample["size"] * 2):
            draw.rectangle(box.tolist(), outline="red")
        label = fit_text(class_name(dataset.classes, sample["label"]), 12, side - 4)
        put(draw, (2, 2), label, 12, "white", stroke_width=1, stroke_fill="black")
        sheet.paste(tile, (i % 6 * side, i // 6 * side))
    write_png(out, sheet)
    summary = f"{out}: {len(dataset)} samples, {len(dataset.classes)} classes"
    say("\n".join([*dataset.notes, summary]))


def convert_boxes(form: str, source: Path, root: Path, out: Path) -> None:
    text, notes = convert(form, source, root)
    write_text(out, text)
    say("\n".join(notes))
    if out.resolve() != (root / "boxes.csv").resolve():
        say(f"{out}: is read where it lies as {root / 'boxes.csv'}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="data.py", description="A contact sheet: 24 samples of a data set, with "
                    "their boxes. Or boxes.csv from other annotations.")
    parser.add_argument("--data", choices=DATASETS, help="data set to show (default: synthetic)")
    parser.add_argument("--root", type=Path, metavar="DIR", help="folder of the data set")
    parser.add_argument("--split", choices=("train", "val", "test"),
                        help="part of the data set to show (default: test)")
    parser.add_argument("--convert", nargs=2, metavar=("FORM", "PATH"), help="write boxes.csv for "
                        "the images below --root from coco FILE, voc DIR or yolo DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE",
                        help="a PNG, or with --convert a CSV that does not exist yet")
    args = parser.parse_args(argv)
    form, source = args.convert or (None, None)
    if form not in (None, *CONVERTERS):
        parser.error(f"--convert: got {form}, need one of {', '.join(CONVERTERS)}, and a path")
    if form and (args.data or args.split):
        parser.error("--convert: takes --root and --out alone")
    if (form or args.data not in (None, "synthetic")) and not (args.root and args.root.is_dir()):
        parser.error(f"--root: got {args.root}, need the folder of the data")
    if not args.out.parent.is_dir():
        parser.error(f"--out: {args.out.parent}: no such folder")
    if os.path.lexists(args.out) and (form or not is_ours(args.out)):
        parser.error(f"--out: {args.out} exists and is not replaced, need another name")
    with contextlib.suppress(AttributeError):  # a name that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if form:
            convert_boxes(form, Path(source), args.root, args.out)
        else:
            contact_sheet(args.data or "synthetic", args.root, args.split or "test", args.out)
    except (OSError, ValueError) as error:
        sys.exit(f"data.py: error: {one_line(error, args.out)}")


if __name__ == "__main__":
    main()
