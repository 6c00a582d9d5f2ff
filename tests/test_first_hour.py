"""The first hour of three users, by README's own commands, on small data."""

import json
import re
import shlex
import shutil

from helpers import ROOT, TINY, noise, run_script, torchrun

README = (ROOT / "README.md").read_text()


def readme(start: str) -> list[str]:
    """The flags of README's command that begins so."""
    lines = re.findall(r"^    (.*(?:\\\n.*)*)", README, re.MULTILINE)
    found = [line.replace("\\\n", "") for line in lines if line.startswith(start)]
    assert found, start
    return shlex.split(found[0])


def run(start: str, *changes: str) -> None:
    _, script, *flags = readme(start)
    run_script(script, *flags, *changes)


def test_a_student_looks_at_a_backbones_attention(place, capsys):
    run("python evaluate.py --checkpoint vit_s14.pth --images", "--device", "cpu")
    said = capsys.readouterr().out
    assert "no class was trained: attention alone" in said and "attention heads" in said
    entries = json.loads((place / "images/boxes.json").read_text())
    assert [entry["top5"] for entry in entries] == [[], []]
    assert all(0 <= entry["box"][0] < entry["box"][2] <= entry["size"][0] for entry in entries)
    assert len(list((place / "images").glob("*.png"))) == 2
    run("python evaluate.py --checkpoint deit_small --images", "--device", "cpu")
    assert "input 224 x 224" in capsys.readouterr().out


def test_a_practitioner_trains_on_class_folders_without_boxes(place, capsys):
    shutil.rmtree(place / "mydata")
    for name in ("moth", "wasp"):
        for i in range(40):
            path = place / "mydata" / name / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise(i).save(path)
    run("python data.py --data folder")
    assert (place / "sheet.png").exists()
    run("python train.py --data folder --root mydata", *TINY["train.py"].split(),
        "--limit-train", "30")
    said = capsys.readouterr().out
    assert re.search(r"note: .*split.* by .*name", said) and "minutes to go" in said
    assert "training accuracy" in said and "boxes.csv" in said  # and how to add boxes
    assert not re.search(r"^LCTR .* - +-", said, re.MULTILINE)  # no table of dashes
    folder = place / "runs/folder-cdm-seed0"
    assert json.loads((folder / "metrics.json").read_text())["n_boxes"] == 0
    assert {"gallery.png", "failures.png", "loss.png"} <= {p.name for p in folder.iterdir()}
    shutil.copytree(folder, place / "runs/X", dirs_exist_ok=True)
    run("python evaluate.py --checkpoint runs/X/best.pt --images photo.jpg --out predicted",
        "--device", "cpu")
    entry = json.loads((place / "predicted/boxes.json").read_text())[0]
    assert {name for name, _ in entry["top5"]} == {"moth", "wasp"}


def test_a_researcher_trains_resumes_and_compares_on_cub(place, capsys):
    tiny = TINY["train.py"].split()
    run("python train.py --data cub --root CUB_200_2011", *tiny)
    best = place / "runs/cub-cdm-seed0/best.pt"
    for name, head in (("lctr", "cdm"), ("tscam", "conv")):
        run("python train.py --data cub --root CUB_200_2011", *tiny, "--head", head, "--seed", "1")
        shutil.copy(place / f"runs/cub-{head}-seed1/best.pt", place / "runs" / name / "best.pt")
    capsys.readouterr()
    run("python train.py --data cub --root CUB_200_2011", *tiny, "--resume")
    assert "is finished" in capsys.readouterr().out and best.exists()
    run("python evaluate.py --checkpoint runs/tscam/best.pt runs/lctr/best.pt", "--device", "cpu")
    said = capsys.readouterr().out
    assert "TS-CAM + RPAM" in said and "LCTR" in said and "CDM" in said


def test_a_researcher_trains_on_ilsvrc_in_two_processes(place):
    flags = readme("torchrun --nproc_per_node=4 train.py --data ilsvrc")
    flags = flags[flags.index("train.py") + 1:]
    flags = [str(place / flag) if (place / flag).exists() else flag for flag in flags]
    status, errors = torchrun(*flags, *TINY["train.py"].split(), "--out", place / "run")
    assert status == 0, errors
    assert json.loads((place / "run/metrics.json").read_text())["n_boxes"] > 0
