"""README against the project: its commands run, its names exist, its figures are those of docs/results."""

import contextlib
import importlib.util
import inspect
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from PIL import Image

import data
import evaluate
import kernels
import lctr
import train
from kernels import benchmark, reference
from test_data import cub, folder, ilsvrc, picture  # noqa: F401  the first three are fixtures
from test_evaluate import save_checkpoint
from test_lctr import LayerScaleViT
from test_train import torchrun

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "docs/results").glob("*.json"))}
SOURCES = {path.name: path.read_text() for path in (*ROOT.glob("*.py"), *(ROOT / "kernels").glob("*.py"))}

INDENTED, FENCED = re.compile(r"(?<=\n\n)(?: {4}.*\n)+"), re.compile(r"^```.*\n((?:.*\n)*?)```$", re.MULTILINE)
BLOCKS = [textwrap.dedent(block) for block in INDENTED.findall(README) + FENCED.findall(README)]
PROSE = FENCED.sub("", INDENTED.sub("", README))
SPANS = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", PROSE)]

# ---------------------------------------------------------------- commands

NO_COMMANDS = ("images (B, 3, H, W)\n", "mydata/train/<class>/")  # blocks: the figure, the layout of a folder
PROGRAMS = ("python", "python3", "pip", "torchrun", "cp")
LIMITS = {
    "train.py": "--embed-dim 12 --depth 1 --num-heads 2 --epochs 1 --batch-size 4 --limit-train 8 --limit-test 4 "
                "--device cpu",
    "evaluate.py": "--limit-test 4 --device cpu", "data.py": "", "lctr.py": "",
}
ARGUMENTS = {"[IMAGE]": "photo.jpg", "FILE": "backbone.pth", "CHECKPOINT": "runs/X/best.pt"}
BENCHMARK = """if True:
    import torch
    from kernels import benchmark
    small, launches = benchmark.Shape(S=1, d=16, h=2, w=3, D=16, C=3, G=2), benchmark.recorded_launches
    benchmark.traffic.__defaults__ = benchmark.times.__defaults__ = small, torch.bfloat16
    benchmark.SHAPES, benchmark.recorded_launches = (small,), lambda *case: launches(*case)[:1]
    benchmark.TIMED = benchmark.MEASURED = [benchmark.Work(task, 3, 32, 1) for task in ("train", "localize")]
    benchmark.main()"""


def commands() -> list[str]:
    """Each line of each block that is not known to be none, and what prose names with its program."""
    lines = [line for block in BLOCKS if not block.startswith(NO_COMMANDS) for line in block.splitlines()]
    lines += [span for span in SPANS if span.split()[0] in PROGRAMS]
    parts = [part.strip() for line in lines for part in line.split(" # ")[0].replace(".venv/bin/", "").split("&&")]
    return [part for part in dict.fromkeys(parts) if part]


@pytest.fixture
def place(tmp_path, cub, folder, ilsvrc, monkeypatch, without_pictures):  # noqa: F811
    """A working directory with all that README's commands name, in small."""
    shutil.copytree(cub, tmp_path / "PHOTOS")
    folder.rename(tmp_path / "mydata")
    picture(tmp_path / "photo.jpg")
    picture(tmp_path / "folder" / "picture.png")
    for name, head in (("X", "cdm"), ("lctr", "cdm"), ("tscam", "conv")):
        save_checkpoint(tmp_path / "runs" / name / "best.pt", head=head)
    torch.save(LayerScaleViT(12, 2, depth=1, patch=14, grid=(37, 37)).state_dict(), tmp_path / "vit_s14.pth")
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    deit = lctr.VisionTransformer(224, 16, 12, 1, 2).state_dict()
    torch.save({"model": deit}, tmp_path / "hub/checkpoints" / lctr.DEIT_FILES["deit_small"].split("/")[-1])
    (tmp_path / "docs/results").mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python(monkeypatch, script: str, *flags: str) -> None:
    """Runs a script as `python script flags` does, in this process."""
    monkeypatch.setattr(sys, "argv", [script, *flags])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, stop.code


@pytest.mark.parametrize("command", commands())
def test_command(command, place, monkeypatch):
    match shlex.split(command):
        case ["python3", "-m", "venv", _] | ["pip", "install", *_] | ["python", "-m", "pytest"]:  # CI runs these
            lines = [set(line.split()) for line in (ROOT / ".ci/run").read_text().splitlines()]
            assert any(set(command.split()) - {".venv"} <= line for line in lines)
        case ["python", ("train.py" | "evaluate.py" | "data.py" | "lctr.py") as script, *flags]:
            before = set(place.rglob("*"))
            python(monkeypatch, script, *(ARGUMENTS.get(flag, flag) for flag in flags), *LIMITS[script].split())
            made = {path.name for path in set(place.rglob("*")) - before}
            if script in ("train.py", "evaluate.py"):
                report = {"metrics.json", "gallery.png", "curve.png", "failures.png"}
                assert made >= ({"boxes.json"} if "--images" in flags else report)
            assert {"sheet.png", "backbone.pth"} & set(map(ARGUMENTS.get, flags, flags)) <= made
        case ["cp", *_]:
            python(monkeypatch, "train.py", *LIMITS["train.py"].split())
            subprocess.run(["bash", "-c", command], check=True)
            assert {path.name for path in (place / "docs").glob("*.png")} == {Path(shown).name for shown in pictures()}
        case ["torchrun", *words]:
            launch, flags = words[:words.index("train.py") + 1], words[words.index("train.py") + 1:]
            several = torch.distributed.run.parse_args(launch).nnodes != "1:1"
            flags = [flag for flag in flags if flag != "..."] + ["--root", "ILSVRC"] * ("..." in flags)
            train.parse_flags(flags)
            if not several:  # there is no second machine to run on
                flags = [str(place / flag) if (place / flag).exists() else flag for flag in flags]
                status, errors = torchrun(*flags, *LIMITS["train.py"].split(), "--out", place / "run")
                assert status == 0 and (place / "run/metrics.json").exists(), errors
        case ["python", "-m", "kernels.benchmark", *flags]:
            pytest.importorskip("triton")
            ended = subprocess.run([sys.executable, "-c", BENCHMARK, *flags], capture_output=True, text=True,
                                   env=os.environ | {"PYTHONPATH": str(ROOT)})
            if flags or torch.cuda.is_available():
                column = "images_per_s" if "--end-to-end" in flags else "kernel" if flags else "triton_ms"
                assert ended.returncode == 0 and column in ended.stdout, ended.stderr
            else:
                assert ended.returncode == 1 and "no GPU" in ended.stderr
        case ["python", "docs/study.py", *flags]:
            study = load_study()
            monkeypatch.setattr(study, "TABLES", {table: {"static head": (), "CDM": ()} for table in study.TABLES})
            regime = ["--regime", "species"] * ("--regime" not in flags)
            limits = ["--seeds", "1", *regime, "--out", "study", *LIMITS["train.py"].split()]
            monkeypatch.setattr(sys, "argv", ["docs/study.py", *flags, *limits])
            study.main()
            assert list(place.rglob("study.json"))
        case _:
            pytest.fail(f"no test knows how to run {command!r}")


def load_study():
    spec = importlib.util.spec_from_file_location("study", ROOT / "docs/study.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    return study


def pictures() -> list[str]:
    return re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)


def test_pictures_exist_and_all_are_shown():
    assert {ROOT / shown for shown in pictures()} == set((ROOT / "docs").glob("*.png"))
    for shown in pictures():
        with Image.open(ROOT / shown) as image:
            image.load()


# ---------------------------------------------------------------- names


def help_text(call, *argv) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script", "--help"])
        call(*argv)
    return text.getvalue()


HELP = {
    "train.py": help_text(train.parse_flags, ["--help"]), "evaluate.py": help_text(evaluate.parse_flags, ["--help"]),
    "data.py": help_text(data.main), "lctr.py": help_text(lctr.main), "kernels.benchmark": help_text(benchmark.main),
    "torchrun": torch.distributed.run.get_args_parser().format_help(),
}
CHOICES = {flag: values.split(",") for text in HELP.values()
           for flag, values in re.findall(r"(--[\w-]+) \{([^}]+)\}", text)}
MODULES = (lctr, kernels, train, evaluate, data, reference)


def keys(content) -> set[str]:
    return set(content).union(*map(keys, content.values())) if isinstance(content, dict) else set()


def are_flags(parts: list[str], helps: str) -> bool:
    """Flags that a help text names, each perhaps with a value: one of its choices, or anything where it has none."""
    return all(re.search(rf"{flag}(?![\w-])", helps) and (value.startswith("--") or value in CHOICES.get(flag, value))
               for flag, value in zip(parts, [*parts[1:], "--"]) if flag.startswith("--"))


def selects(file: str, expression: str) -> bool:
    """Whether each word of pytest's -k names a test of the file."""
    tests = re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text(), re.MULTILINE)
    return all(any(word in test for test in tests) for word in expression.strip('"').split(" or "))


def is_file(name: str) -> bool:
    """In the tree, or as a whole in a source: files of a run or a data set, endings, environment variables."""
    written = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)" if name[0].isalnum() else re.escape(name))
    return any(ROOT.glob(name)) or any(written.search(source) for source in SOURCES.values())


def is_code(name: str) -> bool:
    """A function, class or module of the project, perhaps with a parameter: kernels.use_backend(name)."""
    name, _, parameter = name.rstrip(")").partition("(")
    start, _, rest = name.partition(".")
    if start in ("rpam", "cdm"):
        pytest.importorskip("triton")
        return hasattr(importlib.import_module(f"kernels.{start}"), rest)
    for module, attributes in [(module, name) for module in MODULES] + [
            (module, rest) for module in MODULES if module.__name__ == start]:
        with contextlib.suppress(AttributeError):
            target = attribute(module, attributes)
            return not parameter or parameter in inspect.signature(target).parameters
    return False


def attribute(module, name: str):
    for part in name.split("."):
        module = getattr(module, part)
    return module


def exists(span: str) -> bool:
    first, *rest = span.split()
    if first in PROGRAMS:
        return True  # test_command's
    if first.startswith("--"):
        return are_flags(span.split(), "".join(HELP.values()))
    if rest and first in HELP:
        return are_flags(rest, HELP[first])
    if found := re.fullmatch(r"(test_\w+\.py) -k (.+)", span):
        return selects(*found.groups())
    if found := re.fullmatch(r"(\w+)=(None.*)", span):
        return found[1] in PARAMETERS and set(re.findall(r'"(\w+)"', found[2])) == {"triton", "torch"}
    if not re.fullmatch(r"\w[\w-]*(\.\w+)*(\(\w+\))?", span) or re.search(r"\.(py|pth?|jsonl?|npz|csv|png)$", span):
        return is_file(span)
    return span in WORDS or is_code(span)


PARAMETERS = set(inspect.signature(kernels.attention).parameters)
WORDS = {"auto", *PARAMETERS, *keys(RESULTS)}.union(*CHOICES.values())


def test_every_name_exists():
    spans = list(SPANS)
    for i, span in enumerate(spans):
        if span.startswith("..._"):  # rpam.aggregate_kernel, ..._backward_kernel
            spans[i] = spans[i - 1].removesuffix("_kernel") + span[3:]
    assert not [span for span in spans if not exists(span)]


def test_names_are_in_the_files_they_are_said_to_be_in():
    pairs = re.findall(r"`(\w+)\.py` `([\w.]+)`", PROSE)
    assert pairs
    for module, name in pairs:
        attribute(importlib.import_module(module), name)
    public = re.search(r"Every public function \((.*?)\)", PROSE, re.DOTALL)[1]
    assert {*re.findall(r"`(\w+)`", public), "use_backend"} == set(kernels.__all__)


def test_quoted_errors_are_the_projects():
    """Of Troubleshooting's symptoms; torch's own are named by their class or errno."""
    symptoms = [row[0] for row in table_rows("symptom")]
    quoted = [text for symptom in symptoms for text in re.findall(r'"([^"]+)"', symptom)]
    assert len(quoted) > 5
    for text in quoted:
        assert text in ("InvalidCxxCompiler", "EADDRINUSE") or any(text in source for source in SOURCES.values()), text


def test_equations_stand_where_the_table_says():
    rows = table_rows("paper")
    named = {equation for row in rows for equation in re.findall(r"Eq\. (\d)", row[0])}
    assert named == set(re.findall(r"Eq\. (\d)", README)) == set("123456")
    for equation, _, _, code in rows:
        if equation.startswith("Eq. "):
            texts = [inspect.getsource(attribute(importlib.import_module(module), name))
                     for module, name in re.findall(r"`(\w+)\.py` `([\w.]+)`", code)]
            for name in re.findall(r"`kernels\.(\w+)`", code):
                texts += [inspect.getsource(getattr(kernels, name)), inspect.getsource(getattr(reference, name))]
            assert any(re.search(rf"Eq\. (\d, )*{equation[4:]}\b", text) for text in texts), equation


# ---------------------------------------------------------------- figures


def tables() -> list[tuple[str, list[list[str]]]]:
    """(what README says before it, from its section's title on; header and rows) of each table."""
    found = []
    for match in re.finditer(r"(?:^ *\|.*\|\n)+", README, re.MULTILINE):
        before = README[:match.start()]
        section = before[max(before.rfind("\n## "), before.rfind("\n### "), 0):]
        lines = [re.split(r" *(?<!\\)\| *", line.strip())[1:-1] for line in match[0].splitlines()]
        found.append((section, [lines[0], *lines[2:]]))
    return found


def table_rows(first: str) -> list[list[str]]:
    """The rows of the one table whose header starts so."""
    (rows,) = [rows for _, (header, *rows) in tables() if header[0] == first]
    return rows


def shown_is(shown: str, *values: float) -> bool:
    """Whether the numbers in a cell are these, each rounded to as many digits as are shown."""
    numbers = re.findall(r"\d+(?:\.\d+)?", shown)
    digits = [len(number.partition(".")[2]) for number in numbers]
    return numbers == [f"{value:.{n}f}" for value, n in zip(values, digits)] and len(numbers) == len(values)


COLUMNS = {
    "Top-1 Loc": lambda row: [row["top1_loc"]], "Top-5 Loc": lambda row: [row["top5_loc"]],
    "GT-known": lambda row: [row["gt_known"]], "mean IoU": lambda row: [row["mean_iou"]],
    "best GT-known (oracle)": lambda row: [max(row["gt_known_curve"]), row["best_threshold"]],
    "MaxBoxAcc (oracle)": lambda row: [row["max_box_acc"]], "V2 (oracle)": lambda row: [row["max_box_acc_v2"]],
}
BASELINES = {"the whole image": "whole_image", "a centred box of half the area": "centred_box"}


def check_run(section: str, header: list[str], rows: list[list[str]]) -> None:
    """One run: a row per coupling and baseline, and what the text before the table says of it."""
    found = RESULTS[re.findall(r"`docs/results/(\w+)\.json`", section)[-1]]
    metrics, said = found["metrics"], " ".join(section.split())
    classified = re.search(r"[Tt]op-1 classification ([\d.]+) %, top-5 ([\d.]+) %", said)
    assert classified and shown_is(" ".join(classified.groups()), metrics["top1_cls"], metrics["top5_cls"])
    assert float(re.search(r"threshold\b.*?(\d\.\d+)", said)[1]) == metrics["threshold"]
    dates = re.findall(r"\d{4}-\d\d-\d\d", said)
    assert not dates or found["date"] in dates
    assert found["command"].lower() in re.sub(r"\s+", " ", README).lower()

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
    assert len(rows) == len(metrics["couplings"]) + len(BASELINES)


TENSORS = {"A": "attn", "dA": "grad_attn", "W": "weight", "dW": "grad_weight", "dP": "grad_sums"}


def check_traffic(section: str, header: list[str], rows: list[list[str]]) -> None:
    """Tensors by the names that README gives them; those left out are vectors, far below the others."""
    measured = {(row["kernel"], row["tensor"]): row for row in RESULTS["traffic"]["rows"]}
    for kernel, tensors, unique, issued, ratio in rows:
        kernel = re.sub(r"^\w+", r"\g<0>_kernel", kernel)
        names = {"conv_kernel, transposed": {"dY": "x", "dX": "out"}, "conv_weight_kernel": {"dY": "grad"},
                 "window_sums_backward_kernel": {"dX": "grad_x"}}.get(kernel, {}) | TENSORS
        used = [measured.pop((kernel, names.get(tensor, tensor))) for tensor in tensors.split(", ")]
        if unique.endswith(" each"):
            unique = ", ".join([unique.removesuffix(" each")] * len(used))
        assert shown_is(unique, *(row["least"] for row in used)) and shown_is(issued, *(row["issued"] for row in used))
        assert [row["unique"] for row in used] == [row["least"] for row in used]
        ratios = [row["issued"] / row["least"] for row in used]
        assert shown_is(ratio, *(ratios if "," in ratio else ratios[:1])), (kernel, ratio)
    assert all(row["unique"] < 20_000 for row in measured.values())
    least = benchmark.least_bytes(benchmark.Shape(), 2)
    assert all(row["least"] == least[row["kernel"]][row["tensor"]] for row in RESULTS["traffic"]["rows"])


COMPILED = {  # what README calls a kernel at DeiT-S sizes: words of its config
    "aggregate, rows of 197": "stride_i=197", "aggregate, rows of 208": "stride_i=208",
    "aggregate_backward, rows of 197": "stride_i=197", "attention, d 64": "D=64", "relation, d 64": "D=64",
    "conv": "OUT=200 G=4 KERNEL=3", "conv, transposed": "OUT=384 G=4 KERNEL=3", "conv_weight": "G=4 KERNEL=3",
    "window_sums": "KERNEL=3", "window_sums_backward": "KERNEL=3", "class_products": "G=4 TAPS=9",
}


def check_compile(section: str, header: list[str], rows: list[list[str]]) -> None:
    compiled = RESULTS["compile"]["rows"]
    targets = [column.split()[0] for column in header[1:]]
    assert {row["kernel"].removesuffix("_kernel") for row in compiled} == {name.split(",")[0] for name, *_ in rows}
    for name, *cells in rows:
        kernel, config = f"{name.split(',')[0]}_kernel", set(COMPILED[name].split())
        for target, cell in zip(targets, cells, strict=True):
            (row,) = [row for row in compiled if config <= set(row["config"].split())
                      and (row["kernel"], row["target"], row["dtype"]) == (kernel, target, "bfloat16")]
            shown = [row["registers"], row["tensor_core"] or "–", row["load_bytes"]]
            assert cell == " / ".join(map(str, shown[:3 if target.startswith("sm_") else 2])), (name, target)
    said = " ".join(section.split())
    number, *shared = re.search(r"\((\d+) kernels.*no spills.*at most (\d+), (\d+) and (\d+) KiB", said).groups()
    assert int(number) == len(compiled) and not any(row["spills"] for row in compiled)
    most = [max(row["shared"] for row in compiled if row["target"] == target) / 1024 for target in targets]
    assert shown_is(" ".join(shared), *most)


def check_speed(section: str, header: list[str], rows: list[list[str]]) -> None:
    measured = RESULTS["end_to_end"]
    assert measured["command"] in section and measured["machine"] in " ".join(section.split())
    for row, (work, ratio, lctr, floor, unit, images_per_s) in zip(measured["rows"], rows, strict=True):
        assert (work, unit) == (row["work"], row["unit"])
        for cell, key in ((ratio, "ratio"), (lctr, "lctr"), (floor, "floor"), (images_per_s, "images_per_s")):
            assert cell == "" if row[key] is None else shown_is(cell, row[key]), (work, key)


def test_the_compiled_kernels_are_the_shipped_ones():
    pytest.importorskip("triton")
    from kernels import cdm, rpam

    for name, blocks in (rpam.BLOCKS | cdm.BLOCKS).items():
        configs = [set(row["config"].split()) for row in RESULTS["compile"]["rows"] if row["kernel"] == name]
        for shipped in [blocks] if "num_warps" in blocks else blocks.values():
            assert any({f"{key}={value}" for key, value in shipped.items()} <= config for config in configs), name


CHECKS = {"map": check_run, "kernel/tensor": check_traffic, "kernel/sm_80": check_compile, "work": check_speed}
WORDS_ONLY = ("paper", "point", "kernel (`kernels/`)", "the paper's", "`--coupling`", "faults tried", "symptom")


@pytest.mark.parametrize("number", range(len(tables())))
def test_table(number):
    section, (header, *rows) = tables()[number]
    check = CHECKS.get(header[0]) or CHECKS.get("/".join(header[:2]))
    if check:
        check(section, header, rows)
    elif header[0] not in WORDS_ONLY:  # then docs/study.py printed it
        markdown = load_study().markdown
        lines = [line for title, result in RESULTS["study"].items() for line in markdown(title, result).split("\n")]
        for row in (header, *rows):
            assert f"| {' | '.join(row)} |" in lines, row


def test_results_say_where_they_come_from():
    for name, content in RESULTS.items():
        assert f"docs/results/{name}.json" in README
        for run in content.values() if name == "study" else [content]:
            assert re.match(r"python (-m )?[\w./]+", run["command"]) and re.fullmatch(r"[0-9a-f]{7,40}", run["commit"])
            assert re.fullmatch(r"\d{4}-\d\d-\d\d", run["date"]) and run["machine"]


def test_every_kind_of_table_is_there():
    headers = {header[0] for _, (header, *_) in tables()} | {"/".join(header[:2]) for _, (header, *_) in tables()}
    assert headers >= {*CHECKS, *WORDS_ONLY}
