"""README and docs/ against the project: commands run, names exist, figures are those stored."""

import contextlib
import importlib
import io
import json
import re
import shlex
import textwrap

import pytest
import study
from helpers import ROOT, TINY, run_script, torchrun
from PIL import Image

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs/results.md").read_text()
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
STORED = {path.stem: json.loads(path.read_text())
          for path in sorted((ROOT / "docs/results").glob("*.json"))}

# ---------------------------------------------------------------- commands

BLOCKS = [textwrap.dedent(block) for block in re.findall(r"(?<=\n\n)(?: {4}.*\n)+", README)]
PROSE = re.sub(r"(?<=\n\n)(?: {4}.*\n)+", "", README)
SPANS = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", PROSE)]


def commands() -> list[str]:
    """The commands of README's blocks, and those that its prose names."""
    lines = [line for block in BLOCKS if not block.startswith("@")
             for line in block.replace("\\\n", "").splitlines()]
    lines += [span for span in SPANS if span.startswith("python ")]
    parts = [part.strip() for line in lines
             for part in line.split(" # ")[0].replace(".venv/bin/", "").split("&&")]
    return [part for part in dict.fromkeys(parts) if part]


def in_small(command: str):
    marks = pytest.mark.full if command.startswith("torchrun") else ()
    return pytest.param(command, marks=marks)


@pytest.mark.parametrize("command", [in_small(command) for command in commands()])
def test_readmes_command_runs(command, place):
    """In a folder that holds all that README names, with flags that make the work small."""
    words = shlex.split(command)
    (place / "runs/X").rename(place / "runs/folder-cdm-seed0")
    match words:
        case ["git", "clone", *_] | ["cd", "lctr"]:
            pass
        case ["python3", "-m", "venv", _] | ["pip", "install", *_] | ["python", "-m", "pytest"]:
            lines = [set(line.split()) for line in (ROOT / ".ci/run").read_text().splitlines()]
            assert any(set(words) - {".venv"} <= line for line in lines)  # CI runs it
        case ["python", "docs/speed.py"]:
            run_help("docs/speed.py")
        case ["python", script, *flags]:
            flags = ["photo.jpg" if flag == "[IMAGE]" else flag for flag in flags]
            if "--convert" in flags:  # which replaces no file
                (place / "mydata/boxes.csv").unlink()
            if script == "evaluate.py" and "--images" not in flags:
                (place / "runs/cub-cdm-seed0").mkdir()
                (place / "runs/lctr/best.pt").rename(place / "runs/cub-cdm-seed0/best.pt")
                flags += ["--limit-test", "4"]
            out = ["--out", "made"] if script == "train.py" else []
            run_script(script, *flags, *TINY[script].split(), *out)
            made = {path.name for path in place.rglob("*")}
            expected = {"train.py": {"metrics.json", "gallery.png", "best.pt"},
                        "evaluate.py": {"boxes.json"} if "--images" in flags else {"metrics.json"},
                        "data.py": {"boxes.csv"}, "lctr.py": set()}
            assert expected[script] <= made
        case ["torchrun", *_]:
            flags = words[words.index("train.py") + 1:]
            flags = [str(place / flag) if (place / flag).exists() else flag for flag in flags]
            tiny = TINY["train.py"].split()
            status, errors = torchrun(*flags, *tiny, "--out", place / "run")
            assert status == 0 and (place / "run/metrics.json").exists(), errors
        case _:
            pytest.fail(f"no test knows how to run {command!r}")


# ---------------------------------------------------------------- names and links


def run_help(script: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        run_script(script, "--help")
    return text.getvalue()


def attribute(module: str, name: str):
    value = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value


def test_readmes_names_exist():
    pairs = re.findall(r"`(\w+)\.py` `([\w.]+)`", PROSE)
    assert len(pairs) > 5
    for module, name in pairs:
        attribute(module, name)
    helps = "".join(map(run_help, ("train.py", "evaluate.py", "data.py")))
    for flag in re.findall(r"(?<!\S)`?(--[a-z][\w-]+)", README.replace("--nproc_per_node", "")):
        assert re.search(rf"{flag}(?![\w-])", helps), flag
    for path in re.findall(r"`((?:kernels|support|tests|docs)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path


def test_links_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text()):
            assert target.startswith("https://") or (document.parent / target).exists(), target


def test_pictures_are_shown_and_open():
    shown = {(document.parent / name).resolve() for document in DOCUMENTS
             for name in re.findall(r"!\[[^]]+\]\(([^)]+)\)", document.read_text())}
    assert shown == set((ROOT / "docs").glob("*.png"))
    for path in shown:
        with Image.open(path) as image:
            image.load()


def test_each_equation_has_its_code_and_its_test():
    tests = (ROOT / "tests/test_equations.py").read_text()
    rows = table_rows(README, "paper")
    assert {row[0] for row in rows} >= {f"Eq. {number}" for number in range(1, 7)}
    for equation, _, _, test in rows:
        start = re.fullmatch(r"`(test_\w+_)\.\.\.`", test)[1]
        assert f"def {start}" in tests, equation


# ---------------------------------------------------------------- figures


def table_rows(text: str, first: str) -> list[list[str]]:
    """The rows of the one table whose header starts so."""
    tables = []
    for match in re.finditer(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        header, _, *rows = [re.split(r" *(?<!\\)\| *", line.strip())[1:-1]
                            for line in match[0].splitlines()]
        if header[0] == first:
            tables.append(rows)
    (rows,) = tables
    return rows


def cell(value: dict) -> str:
    return f"{value['mean']:.1f} ± {value['std']:.1f}"


PHOTOS = next(iter(STORED["photos"].values()))  # the first table is README's
HEADS = {"cdm": ("CDM's class map", "CDM", "LCTR", "CDM, class attention alone",
                 "CDM, patch relation alone"),
         "conv": ("CAM", "TS-CAM", "TS-CAM + RPAM", "static head, class attention alone",
                  "static head, patch relation alone")}
COUPLINGS = "none", "cls", "relation", "cls-only", "relation-only"


def test_figures_of_readme_are_those_stored():
    *rows, top1, boxes = table_rows(README, "map (`--coupling`)")
    birds = STORED["birds"]["summary"]
    for i, (title, *cells) in enumerate(rows):
        assert f"`{COUPLINGS[i]}`" in title
        photos = [PHOTOS["rows"][HEADS[head][i]]["gt_known"] for head in ("cdm", "conv")]
        assert cells == [cell(birds["gt_known"][COUPLINGS[i]]), *map(cell, photos)], title
    photos = [PHOTOS["rows"][HEADS[head][0]]["top1_cls"] for head in ("cdm", "conv")]
    assert top1 == ["Top-1 classification", cell(birds["top1_cls"]), *map(cell, photos)]
    centred = [STORED["birds"]["runs"][0]["baselines"], PHOTOS["baselines"], PHOTOS["baselines"]]
    assert boxes[1:] == [f"{stored['centred_box']:.1f}" for stored in centred]


def test_figures_of_the_results_page_are_those_stored():
    birds = STORED["birds"]
    for title, *cells in table_rows(RESULTS, "birds: GT-known"):
        coupling = re.search(r"`([\w-]+)`", title)[1]
        runs = " ".join(f"{run['gt_known'][coupling]:.1f}" for run in birds["runs"])
        figures = [birds["summary"][key][coupling]
                   for key in ("gt_known", "top1_loc", "best_gt_known")]
        assert cells == [runs, *map(cell, figures)], title

    rows = table_rows(RESULTS, "photos: GT-known")
    assert [row[0] for row in rows] == list(PHOTOS["rows"])
    for title, *cells in rows:
        stored = PHOTOS["rows"][title]
        runs = stored["gt_known_by_seed"]
        assert cells == [cell(stored["gt_known"]), f"{min(runs):.1f} to {max(runs):.1f}",
                         cell(stored["best_gt_known"]), cell(stored["top1_loc"])], title

    assert study.what_rpam_needs(STORED["study"], "").partition("\n\n")[2].strip() in RESULTS


def test_intervals_of_the_findings_are_those_stored():
    birds, photos = STORED["birds"]["summary"]["gains"], PHOTOS["differences"]
    whole, head = (STORED["study"][f"Table 8, {regime}, trained"]["differences"]
                   for regime in ("whole bird", "head only"))
    rpam, both = "RPAM with the CDM (LCTR - CDM)", "the CDM with RPAM (LCTR - TS-CAM + RPAM)"
    for gain in (whole[rpam], head[rpam], birds["relation - cls-only"], birds["relation - cls"],
                 photos["patch relation alone - class attention alone"], photos[rpam],
                 photos["RPAM with a static head (TS-CAM + RPAM - TS-CAM)"], whole[both],
                 photos[both]):
        mean, low, high = (f"{gain[key]:.1f}".replace("-", "−")
                           for key in ("mean", "low", "high"))
        words = " ".join(README.split())
        assert re.search(rf"{mean} [^()]*\({low} to {high}\)", words), (mean, low, high)


def test_results_say_where_they_come_from():
    text = "".join(path.read_text() for path in DOCUMENTS)
    for name, content in STORED.items():
        assert f"{name}.json" in text, name
        for run in [content] if "command" in content else content.values():
            assert re.match(r"python (-m )?[\w./]+", run["command"])
            assert re.fullmatch(r"[0-9a-f]{7,40}", run["commit"])
            assert re.fullmatch(r"\d{4}-\d\d-\d\d", run["date"]) and run["machine"]
