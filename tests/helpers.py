"""What several test files build and compare: pictures, data sets, checkpoints, runs of a script."""

import csv
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import data
from lctr import LCTR, MODEL_FLAGS, VisionTransformer
from support import weights

ROOT = Path(__file__).parent.parent

# ---------------------------------------------------------------- pictures


def picture(path, size=(40, 30), colour=(200, 60, 30), **options):
    """A picture of one colour, saved at `path`, whose folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def noise(seed, size=(24, 20)):
    """A picture (width, height) of random colours."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))


def exif(orientation):
    """EXIF with an orientation alone, for Image.save."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def block_picture(size, block):
    """Black, with a white block (x0, y0, x1, y1)."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[block[1]:block[3], block[0]:block[2]] = 255
    return Image.fromarray(pixels)


def where_white(image):
    """(x0, y0, x1, y1) of what is brighter than the middle grey in an image (3, H, W)."""
    rows, columns = np.nonzero(image.numpy().mean(0) > 127)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


# ---------------------------------------------------------------- data sets in small

CUB_CLASSES = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")


def make_cub(root, draw=picture, classes=CUB_CLASSES):
    """CUB's layout: 4 images a class, every other one to train on; box i is (i, 2, i+10, 22)."""
    files = {name: [] for name in
             ("images", "image_class_labels", "train_test_split", "bounding_boxes")}
    for i in range(4 * len(classes)):
        label = i // 4
        name = f"{classes[label]}/{classes[label][4:]}_{i:04d}_{i * 7}.jpg"
        draw(root / "images" / name)
        rests = name, label + 1, 1 - i % 2, f"{i}.0 2.0 10.0 20.0"
        for lines, rest in zip(files.values(), rests):
            lines.append(f"{i + 1} {rest}\n")
    files["classes"] = [f"{i} {name}\n" for i, name in enumerate(classes, 1)]
    for name, lines in files.items():
        (root / f"{name}.txt").write_text("".join(lines))
    return root


WNIDS = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish, Carassius auratus",
         "n02012849": "crane"}


def xml(wnid, *boxes, size="<size><width>50</width><height>40</height></size>"):
    """ILSVRC's annotation of one image."""
    sides = ("xmin", "ymin", "xmax", "ymax")
    objects = "".join(
        f"<object><name>{wnid}</name><difficult>0</difficult><bndbox>"
        + "".join(f"<{side}>{value}</{side}>" for side, value in zip(sides, box))
        + "</bndbox></object>" for box in boxes)
    return f"<annotation><folder>val</folder>{size}{objects}</annotation>\n"


def write_ilsvrc(images, annotations, flat, mapping=None):
    """Official names; train has 2 images a class, val 2, with 1 and 2 boxes; all are 50 x 40."""
    number = 0
    for wnid in WNIDS:
        for i in (10, 9):
            picture(images / "train" / wnid / f"{wnid}_{i}.JPEG", (50, 40))
        for boxes in [[(1, 2, 30, 40)], [(0, 0, 10, 10), (5, 6, 50, 40)]]:
            number += 1
            stem = f"ILSVRC2012_val_{number:08d}"
            picture(images / "val" / ("" if flat else wnid) / f"{stem}.JPEG", (50, 40))
            annotations.mkdir(parents=True, exist_ok=True)
            (annotations / f"{stem}.xml").write_text(xml(wnid, *boxes))
    if mapping:
        lines = (f"{wnid} {words}\n" for wnid, words in reversed(WNIDS.items()))
        mapping.write_text("".join(lines))


def make_ilsvrc(root):
    write_ilsvrc(root / "Data/CLS-LOC", root / "Annotations/CLS-LOC/val", True,
                 root / "LOC_synset_mapping.txt")
    return root


def make_folder(root):
    """A folder of one's own: names with spaces, quotes, other alphabets; grey and CMYK pictures."""
    for name in ("train/chat noir/a b.JPG", "train/Ünïcode/猫.png", "test/chat noir/a, b.JPEG",
                 'test/chat noir/the "cat".Png', "test/Ünïcode/猫 2.webp",
                 "test/Ünïcode/unboxed.jpg", "val/Ünïcode/v.bmp"):
        picture(root / name, (60, 40))
    Image.new("CMYK", (60, 40)).save(root / "test/chat noir/a, b.JPEG")
    Image.new("L", (60, 40)).save(root / "train/chat noir/grey.tif")
    for name in ("train/chat noir/Thumbs.db", "train/.DS_Store", "train/chat noir/.hidden.jpg"):
        (root / name).write_text("no image")
    with open(root / "boxes.csv", "w", newline="") as file:
        csv.writer(file).writerows([
            ("path", "xmin", "ymin", "xmax", "ymax"),
            ("test/chat noir/a, b.JPEG", 1, 2, 30.5, 40),
            ('test/chat noir/the "cat".Png', 1, 1, 2, 2),
            ("test/Ünïcode/猫 2.webp", 0, 0, 60, 40),
            ('test/chat noir/the "cat".Png', 3, 3, 9, 9), ("train/Ünïcode/猫.png", 4, 4, 8, 8),
            ("val/Ünïcode/v.bmp", 1, 1, 9, 9)])
    return root


def same_samples(a, b):
    """Whether two samples of a data set are equal, tensors bit for bit."""
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key]
        for key in a)


# ---------------------------------------------------------------- models and checkpoints

SMALL_MODEL = dict(
    img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=3, drop_path=0.0, head="cdm",
    num_kernels=2, kernel_size=3, scorer="separate", erase="raw", pool="gap")


def save_checkpoint(path, metrics=None, classes=tuple(data.SPECIES[:9]), **changes):
    """A checkpoint as train.py writes it, of a small untrained model on the birds."""
    config = SMALL_MODEL | dict(data="synthetic", root=None) | changes
    torch.manual_seed(3)
    model = LCTR(len(classes), **{flag: config[flag] for flag in MODEL_FLAGS})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "config": config, "classes": list(classes),
                "phase": "main", "epoch": 1, "step": 1, "metrics": metrics or {}}, path)
    return path


def make_model(num_classes=7, dtype=torch.float64, **switches):
    """An LCTR in eval mode, its biases and attention far from zero: nothing cancels by chance."""
    torch.manual_seed(0)
    model = LCTR(num_classes, **switches).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def random_images(batch, size, dtype=torch.float64):
    """Images (B, 3, height, width)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *size, dtype=dtype, generator=generator)


class LayerScaleViT(torch.nn.Module):
    """DINOv2's convention: each residual branch is multiplied by a vector."""

    def __init__(self, D=12, heads=2, depth=3, patch=4, grid=(3, 5)):
        super().__init__()
        nn, self.heads, self.grid = torch.nn, heads, grid
        self.cls_token = nn.Parameter(torch.randn(1, 1, D))
        self.mask_token = nn.Parameter(torch.randn(1, D))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + grid[0] * grid[1], D))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, D, patch, patch)})
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "norm1": nn.LayerNorm(D, eps=1e-6),
            "attn": nn.ModuleDict({"qkv": nn.Linear(D, 3 * D), "proj": nn.Linear(D, D)}),
            "ls1": nn.ParameterDict({"gamma": torch.randn(D)}),
            "norm2": nn.LayerNorm(D, eps=1e-6),
            "mlp": nn.ModuleDict({"fc1": nn.Linear(D, 4 * D), "fc2": nn.Linear(4 * D, D)}),
            "ls2": nn.ParameterDict({"gamma": torch.randn(D)}),
        }) for _ in range(depth))
        self.norm = nn.LayerNorm(D, eps=1e-6)

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        attention = []
        for block in self.blocks:
            q, k, v = block["attn"]["qkv"](block["norm1"](x)).chunk(3, -1)
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
            attention.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1))
            out = (attention[-1] @ v).transpose(1, 2).flatten(2)
            x = x + block["ls1"]["gamma"] * block["attn"]["proj"](out)
            hidden = F.gelu(block["mlp"]["fc1"](block["norm2"](x)))
            x = x + block["ls2"]["gamma"] * block["mlp"]["fc2"](hidden)
        return self.norm(x), attention


# ---------------------------------------------------------------- boxes, naively


def flood_fill(normalised: np.ndarray, threshold: float) -> list[tuple[int, tuple]]:
    """(pixels, box) of each 8-connected component of one map, in order of first pixel."""
    left = set(zip(*np.nonzero(normalised > np.asarray(threshold, normalised.dtype))))
    components = []
    while left:
        component, frontier = [], [min(left)]
        while frontier:
            y, x = frontier.pop()
            if (y, x) in left:
                left.remove((y, x))
                component.append((y, x))
                frontier += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        ys, xs = zip(*component)
        components.append((len(component), (min(xs), min(ys), max(xs) + 1, max(ys) + 1)))
    return components


def normalise(m: Tensor) -> np.ndarray:
    low, high = m.min(), m.max()
    return ((m - low) / (high - low)).numpy() if high > low else torch.zeros_like(m).numpy()


def naive_boxes(maps: Tensor, thresholds: list[float]) -> Tensor:
    whole = 0, (0, 0, maps.shape[2], maps.shape[1])
    boxes = [max(flood_fill(normalise(m), t), key=lambda found: found[0], default=whole)[1]
             for m in maps for t in thresholds]
    return torch.tensor(boxes).view(len(maps), len(thresholds), 4)


def naive_iou(a, b) -> float:
    overlap = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = sum(max(0, c[2] - c[0]) * max(0, c[3] - c[1]) for c in (a, b)) - overlap
    return overlap / union if union > 0 else 0.0


# ---------------------------------------------------------------- running the scripts


def call(capsys, script, *flags):
    """(exit status, standard output, standard error) of script.main(flags)."""
    try:
        status = script.main([str(flag) for flag in flags])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    if isinstance(status, str):  # python prints it and exits with 1
        return 1, out, f"{err}{status}\n"
    return status or 0, out, err


def script_error(result, script, status=1):
    """The one line on standard error with which a call() ended."""
    found, _, err = result
    prefix = f"{script.__name__}.py: error: "
    assert (found, err.count("\n")) == (status, 1) and err.startswith(prefix), err
    return err


def error_of(function, *parts, error=data.DataError):
    """The one line of the error that function() raises, in which all parts occur."""
    with pytest.raises(error) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message and all(str(part) in message for part in parts), message
    return message


def spawn(*arguments, **environment):
    """Another python, with as many threads as this one: their number decides how sums round."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=os.environ | threads | environment,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def on_a_gpu(*arguments) -> str:
    """What another python prints, one that may see a GPU: without one the test is skipped.

    The tests' own process sees none, and has Triton's interpreter: conftest.py.
    """
    hidden = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment["PYTHONPATH"] = str(ROOT)

    def run(*arguments):
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, text=True,
                              capture_output=True)

    if not (torch.version.cuda or torch.version.hip) or run(
            "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())").returncode:
        pytest.skip("there is no GPU")
    ended = run(*arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def torchrun(*arguments, script="train.py"):
    """(exit status, standard error) of a script in two processes."""
    run = spawn("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script,
                "--device", "cpu", *arguments)
    try:
        return run.wait(120), run.stderr.read()
    finally:
        run.terminate()


# ---------------------------------------------------------------- README's commands, in small

TINY = {  # what makes a run of a script short
    "train.py": "--embed-dim 12 --depth 1 --num-heads 2 --epochs 1 --batch-size 4 --limit-train 8 "
                "--limit-test 4 --freeze-blocks 0 --device cpu",
    "evaluate.py": "--device cpu", "data.py": "", "lctr.py": "",
}


def run_script(script: str, *flags: str) -> None:
    """Runs a script as `python script flags` does, in this process."""
    with mock.patch.object(sys, "argv", [script, *flags]):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            assert not stop.code, stop.code


def make_place(root):
    """All that README's commands name beside their data sets, in small, below `root`."""
    picture(root / "photo.jpg")
    picture(root / "folder" / "picture.png")
    name = "test/chat noir/a, b.JPEG"
    (root / "labels.json").write_text(json.dumps({
        "images": [{"id": 7, "file_name": name, "width": 60, "height": 40}],
        "annotations": [{"image_id": 7, "bbox": [1, 2, 30, 20], "category_id": 1}],
        "categories": [{"id": 1, "name": "chat noir"}]}))
    for name, head in (("X", "cdm"), ("lctr", "cdm"), ("tscam", "conv")):
        save_checkpoint(root / "runs" / name / "best.pt", head=head)
    backbone = LayerScaleViT(12, 2, depth=1, patch=14, grid=(37, 37))
    torch.save(backbone.state_dict(), root / "vit_s14.pth")
    (root / "hub/checkpoints").mkdir(parents=True)
    deit = VisionTransformer(224, 16, 12, 1, 2).state_dict()
    downloaded = weights.DEIT_FILES["deit_small"].split("/")[-1]
    torch.save({"model": deit}, root / "hub/checkpoints" / downloaded)
