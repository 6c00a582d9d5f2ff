"""README against the project: its commands run, its names exist, its figures are stored."""

import contextlib
import importlib
import inspect
import io
import json
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from helpers import ROOT, TINY, run_script, torchrun
from PIL import Image

import data
import evaluate
import kernels
import lctr
import train
from kernels import reference
from support import weights

README = (ROOT / "README.md").read_text()
RESULTS = {path.stem: json.loads(path.read_text())
           for path in sorted((ROOT / "docs/results").glob("*.json"))}
BLOCKS = [textwrap.dedent(block)
          for block in re.findall(r"(?<=\n\n)(?: {4}.*\n)+", README)]
PROSE = re.sub(r"(?<=\n\n)(?: {4}.*\n)+", "", README)
SPANS = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", PROSE)]
PROGRAMS = ("python", "python3", "pip", "torchrun")
SNIPPET = next(block for block in BLOCKS if block.startswith("import "))

# ---------------------------------------------------------------- commands

ARGUMENTS = {"[IMAGE]": "photo.jpg", "FILE": "backbone.pth", "CHECKPOINT": "runs/X/best.pt"}


def commands() -> list[str]:
    """Each line of each block of commands, and what prose names with its program."""
    lines = [line for block in BLOCKS if block != SNIPPET
             for line in block.replace("\\\n", "").splitlines()]
    lines += [span for span in SPANS if span.split()[0] in PROGRAMS]
    parts = [part.strip() for line in lines
             for part in line.split(" # ")[0].replace(".venv/bin/", "").split("&&")]
    return [part for part in dict.fromkeys(parts) if part]


@pytest.mark.parametrize("command", commands())
def test_command(command, place):
    match shlex.split(command):
        case ["python3", "-m", "venv", _] | ["pip", "install", *_] | ["python", "-m", "pytest"]:
            lines = [set(line.split()) for line in (ROOT / ".ci/run").read_text().splitlines()]
            assert any(set(command.split()) - {".venv"} <= line for line in lines)  # CI runs it
        case ["python", ("train.py" | "evaluate.py" | "data.py" | "lctr.py") as script, *flags]:
            if "--convert" in flags:  # it replaces no file
                (place / "mydata/boxes.csv").unlink()
            before = set(place.rglob("*"))
            tiny = [] if "--resume" in flags else TINY[script].split()
            if "--resume" in flags:
                run_script("train.py", *TINY["train.py"].split())
                tiny = TINY["train.py"].split()
            if script == "evaluate.py" and "--images" not in flags:
                tiny += ["--limit-test", "4"]
            run_script(script, *(ARGUMENTS.get(flag, flag) for flag in flags), *tiny)
            made = {path.name for path in set(place.rglob("*")) - before}
            if script in ("train.py", "evaluate.py"):
                report = {"metrics.json", "gallery.png"}
                assert made >= ({"boxes.json"} if "--images" in flags else report)
            written = {Path(ARGUMENTS.get(flag, flag)).name for flag in flags}
            assert {"sheet.png", "backbone.pth", "boxes.csv"} & written <= made
        case ["torchrun", *words]:
            flags = words[words.index("train.py") + 1:]
            flags = [str(place / flag) if (place / flag).exists() else flag for flag in flags]
            tiny = TINY["train.py"].split()
            status, errors = torchrun(*flags, *tiny, "--out", place / "run")
            assert status == 0 and (place / "run/metrics.json").exists(), errors
        case ["python", "docs/speed.py" | "docs/experiments/study.py" | "docs/experiments/gate.py" | "docs/experiments/seeds.py", *_]:
            assert help_of(command.split()[1])  # their own tests run them
        case _:
            pytest.fail(f"no test knows how to run {command!r}")


def test_the_snippet_gives_a_box(place):
    names = {}
    exec(SNIPPET, names)  # noqa: S102
    assert names["box"].shape == (1, 1, 4)
    assert len(SNIPPET.strip().splitlines()) <= 6


def test_pictures_exist_and_all_are_shown():
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    documents = "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    for path in (ROOT / "docs").glob("*.png"):
        assert f"docs/{path.name}" in shown or path.name in documents, path
    for name in shown:
        with Image.open(ROOT / name) as image:
            image.load()


# ---------------------------------------------------------------- names


def help_of(script: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        run_script(script, "--help")
    return text.getvalue()


HELP = "".join(map(help_of, ("train.py", "evaluate.py", "data.py", "lctr.py", "docs/speed.py")))
HELP += torch.distributed.run.get_args_parser().format_help()
SOURCES = "".join(path.read_text() for path in ROOT.rglob("*.py") if ".venv" not in path.parts)
MODULES = (lctr, kernels, train, evaluate, data, reference)


def attribute(module, name: str):
    for part in name.split("."):
        module = getattr(module, part)
    return module


def is_code(name: str) -> bool:
    """A function, class or module of the project: kernels.attention, LCTR.localize."""
    start, _, rest = name.partition(".")
    for module in MODULES:
        for path in (name, rest if module.__name__ == start else name):
            with contextlib.suppress(AttributeError):
                return attribute(module, path) is not None
    return False


def exists(span: str) -> bool:
    first = span.split()[0]
    if first in PROGRAMS:
        return True  # test_command's
    if first.startswith("--"):
        return all(re.search(rf"{flag}(?![\w-])", HELP) for flag in re.findall(r"--[\w-]+", span))
    if span.startswith(("mydata/", "runs/")):
        return True  # the reader's own folders
    return bool(list(ROOT.glob(span))) or is_code(span) or span in SOURCES or span in HELP


def test_every_name_exists():
    assert not [span for span in SPANS if not exists(span)]


def test_names_are_in_the_files_they_are_said_to_be_in():
    pairs = re.findall(r"`(\w+)\.py` `([\w.]+)`", PROSE)
    assert len(pairs) > 5
    for module, name in pairs:
        attribute(importlib.import_module(module), name)


def test_links_lead_somewhere():
    documents = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for document in documents:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text()):
            assert target.startswith("https://") or (document.parent / target).exists(), target


def test_equations_stand_where_the_table_says():
    rows = table_rows("paper")
    named = {equation for row in rows for equation in re.findall(r"Eq\. (\d)", row[0])}
    assert named == set("123456")
    for equation, _, _, code in rows:
        if equation.startswith("Eq. "):
            texts = [inspect.getsource(attribute(importlib.import_module(module), name))
                     for module, name in re.findall(r"`(\w+)\.py` `([\w.]+)`", code)]
            texts += [inspect.getsource(getattr(kernels, name))
                      for name in re.findall(r"`kernels\.(\w+)`", code)]
            assert any(re.search(rf"Eq\. (\d, )*{equation[4:]}\b", text) for text in texts), code


# ---------------------------------------------------------------- figures


def tables(text: str = README) -> list[list[list[str]]]:
    """Header and rows of each table."""
    found = []
    for match in re.finditer(r"(?:^ *\|.*\|\n)+", text, re.MULTILINE):
        lines = [re.split(r" *(?<!\\)\| *", line.strip())[1:-1] for line in match[0].splitlines()]
        found.append([lines[0], *lines[2:]])
    return found


def table_rows(first: str) -> list[list[str]]:
    """The rows of the one table whose header starts so."""
    (rows,) = [rows for header, *rows in tables() if header[0] == first]
    return rows


def shown_is(shown: str, *values: float) -> bool:
    """Whether the numbers in a cell are these, each rounded to as many digits as are shown."""
    numbers = re.findall(r"\d+(?:\.\d+)?", shown)
    digits = [len(number.partition(".")[2]) for number in numbers]
    rounded = [f"{value:.{n}f}" for value, n in zip(values, digits)]
    return numbers == rounded and len(numbers) == len(values)


COLUMNS = {
    "Top-1 Loc": lambda row: [row["top1_loc"]], "Top-5 Loc": lambda row: [row["top5_loc"]],
    "GT-known": lambda row: [row["gt_known"]], "mean IoU": lambda row: [row["mean_iou"]],
    "best (oracle)": lambda row: [max(row["gt_known_curve"]), row["best_threshold"]],
    "MaxBoxAcc": lambda row: [row["max_box_acc"]], "V2": lambda row: [row["max_box_acc_v2"]],
}
BASELINES = {"the whole image": "whole_image", "a centred box of half the area": "centred_box"}


def test_birds():
    metrics, said = RESULTS["birds"]["metrics"], " ".join(README.split())
    pattern = r"Top-1 classification ([\d.]+) %, top-5 ([\d.]+) %, threshold ([\d.]+)"
    numbers = re.search(pattern, said).groups()
    assert shown_is(" ".join(numbers), metrics["top1_cls"], metrics["top5_cls"],
                    metrics["threshold"])
    (header, *rows), = [table for table in tables() if table[0][0] == "map of birds"]
    assert len(rows) == len(metrics["couplings"]) + len(BASELINES)
    for label, *cells in rows:
        if label in BASELINES:
            row = {"gt_known": metrics["baselines"][BASELINES[label]]}
        else:
            name, coupling = re.fullmatch(r"(.+) \(`(.+)`\)", label).groups()
            row = metrics["couplings"][coupling]
            assert name == row["label"]
        for column, cell in zip(header[1:], cells, strict=True):
            if cell or label not in BASELINES:
                assert shown_is(cell, *COLUMNS[column](row)), (label, column, cell)


PHOTOGRAPHS = {  # README's rows: head, coupling
    "TS-CAM (`--head conv`)": ("conv", "cls"), "TS-CAM + RPAM": ("conv", "relation"),
    "CDM's class map alone": ("cdm", "none"), "CDM": ("cdm", "cls"), "LCTR": ("cdm", "relation"),
}


def test_photographs():
    found = RESULTS["photos"]
    rows = table_rows("map of photographs")
    assert [row[0] for row in rows] == list(PHOTOGRAPHS)
    for label, seeds, mean, top1_loc, best in rows:
        head, coupling = PHOTOGRAPHS[label]
        runs = [run["gt_known"][coupling] for run in found["runs"] if run["head"] == head]
        assert shown_is(seeds, *runs) and len(runs) == 3
        for cell, key in ((mean, "gt_known"), (top1_loc, "top1_loc"), (best, "best_gt_known")):
            assert shown_is(cell, found["means"][head][key][coupling]), (label, key)


def test_photographs_as_a_folder():
    text = " ".join(README.split())
    shown = re.search(r"LCTR reaches ([\d.]+), TS-CAM \+ RPAM ([\d.]+), TS-CAM ([\d.]+)\.", text)
    means = RESULTS["photos_folder"]["means"]
    for cell, head, coupling in zip(shown.groups(), ("cdm", "conv", "conv"),
                                    ("relation", "relation", "cls")):
        assert shown_is(cell, means[head]["gt_known"][coupling])


def test_results_say_where_they_come_from():
    documents = README + "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    for name, content in RESULTS.items():
        assert f"results/{name}.json" in documents or f"{name}.json" in documents, name
        for run in content.values() if name == "study" else [content]:
            assert re.match(r"python (-m )?[\w./]+", run["command"])
            assert re.fullmatch(r"[0-9a-f]{7,40}", run["commit"])
            assert re.fullmatch(r"\d{4}-\d\d-\d\d", run["date"]) and run["machine"]


def test_sizes_that_a_reader_can_trust():
    """The files that people read stay short enough to be read."""
    limits = {"lctr.py": 450, "train.py": 430, "evaluate.py": 700, "data.py": 550,
              "kernels/__init__.py": 200, "README.md": 220}
    for name, most in limits.items():
        lines = (ROOT / name).read_text().splitlines()
        assert len(lines) <= most, name
    folders = ("", "support", "kernels", "docs", "tests")
    wide = [f"{path.relative_to(ROOT)}:{number}" for folder in folders
            for path in (ROOT / folder).glob("*.py")
            for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    assert not wide
