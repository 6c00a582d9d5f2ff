"""Which files a script may write: only its own are replaced. And their names."""

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

from support.common import FlagError, printable, write_json
from support.report.figures import is_ours

MANIFEST = "manifest.json"  # in each folder of outputs: {"written_by", "files"}
WRITTEN_BY = "evaluate.py"
REPORT_FILES = ("predictions.jsonl", "metrics.json", "gallery.png", "curve.png", "failures.png")
RUN_FILES = ("last.pt", "best.pt", "pretrained.pt", "config.json", "log.jsonl")  # train.py's


def listed(out: Path) -> set[str]:
    """The files that the folder's manifest lists as the script's."""
    try:
        content = json.loads((out / MANIFEST).read_text())
        return {MANIFEST, *content["files"]} if content["written_by"] == WRITTEN_BY else set()
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def claim(folders: dict[Path, Sequence[str]], inputs: Sequence[Path] = ()) -> None:
    """Makes the folders and lists the files about to be written in each one's manifest.

    Raises FlagError, before anything is made, for a run of train.py, and where a file is there that
    the script did not write (a picture without its mark, another file that the manifest does not
    list) or that is an input.
    """
    inputs = {path.resolve() for path in inputs}
    for out, names in folders.items():
        if any(os.path.lexists(out / name) for name in RUN_FILES):
            raise FlagError(f"--out: {printable(out)} holds a run of train.py: need another "
                            f"folder, such as {printable(out / 'evaluate')}")
        known = listed(out)
        for file in (out / name for name in (*names, MANIFEST)):
            own = is_ours(file) if file.suffix == ".png" else file.name in known
            if os.path.lexists(file) and (not own or file.resolve() in inputs):
                what = "is an input" if own else "was not written by this script"
                raise FlagError(f"--out: {printable(file)} exists and {what}, so it is not "
                                "replaced: need another folder")
    for out, names in folders.items():
        files = sorted({*listed(out), *names} - {MANIFEST})
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / MANIFEST, {"written_by": WRITTEN_BY, "files": files})
        except OSError as error:
            raise FlagError(f"--out: {printable(out)}: {error.strerror or error}") from None


def output_names(paths: Sequence[Path]) -> list[str]:
    """A picture's file name for each path: a.jpg and b/a.png become a.png and a-2.png."""
    names, used = [], set()
    for path in paths:
        stem = os.fsencode(path.stem)[:200].decode(errors="ignore")  # a file system takes 255 bytes
        numbered = (f"{stem}-{count}" for count in itertools.count(2))
        name = next(name for name in itertools.chain([stem or "picture"], numbered)
                    if name.casefold() not in used)  # some file systems ignore case
        used.add(name.casefold())
        names.append(f"{name}.png")
    return names


def run_names(paths: Sequence[str]) -> list[str]:
    """A short name for each checkpoint: its folder's, numbered where two have the same."""
    names = [Path(path).resolve().parent.name for path in paths]
    return names if len(set(names)) == len(names) else [f"{i}-{n}" for i, n in enumerate(names, 1)]
