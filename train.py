"""Trains LCTR from image labels alone, then evaluates it.

    python train.py                                    # synthetic birds, from scratch, minutes on a 2-core CPU
    python train.py --data cub --root CUB_200_2011 --pretrained deit_small_patch16_224-cd65a155.pth
    torchrun --nproc_per_node=4 train.py --data ilsvrc --root ILSVRC --pretrained ...
    python train.py --resume                           # goes on where the same command was stopped

--data picks the defaults of all other flags (RECIPES below); --help lists them. The run folder gets config.json,
log.jsonl, last.pt, best.pt and the evaluation's metrics.json, predictions.jsonl, gallery.png, curve.png, failures.png;
after a pretraining phase also pretrained.pt, a backbone that --pretrained takes, to compare heads on the same one.

Every random choice is a function of the seed and of what it is drawn for (phase, epoch, step, sample), so that neither
--workers, nor a stop and --resume, nor the number of processes changes what is computed.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
from lctr import ARCHITECTURES, HEADS, LCTR, MODEL_FLAGS, load_backbone, load_checkpoint, load_pretrained, read_weights

PAPER = dict(  # "Implementation Details", CUB-200-2011; the warm-up is the released code's
    arch="small", img_size=224, patch_size=16, head="cdm", num_kernels=4, kernel_size=3, scorer="separate",
    erase="raw", pool="gap", drop_path=0.1, epochs=80, pretrain_epochs=0, batch_size=128, lr=5e-5, pretrain_lr=5e-4,
    weight_decay=5e-4, warmup_epochs=5.0, label_smoothing=0.0, clip_grad=0.0, backbone_lr_scale=1.0,
)
RECIPES = {
    "synthetic": PAPER | dict(
        arch=None, img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3, epochs=2, pretrain_epochs=6,
        batch_size=32, lr=1e-3, pretrain_lr=1e-3, weight_decay=0.05, clip_grad=1.0, backbone_lr_scale=0.3,
        drop_path=0.0,
    ),
    "cub": PAPER,
    "folder": PAPER,
    "ilsvrc": PAPER | dict(epochs=14, batch_size=256, lr=5e-4),
}
FREE_FLAGS = ("out", "workers", "device", "eval_every", "checkpoint_every", "resume")  # may change on --resume
PHASES = ("pretrain", "main")
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
LOG_EVERY = 10  # steps


# ---------------------------------------------------------------- flags


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line with every default filled in; ends with one line and status 2 where a flag is wrong."""

    def number(kind: type, low: float, high: float = math.inf, *, open_low: bool = False):
        need = f"a {'whole ' * (kind is int)}number {'above' if open_low else 'from'} {low:g}"
        need += f" and below {high:g}" * (high < math.inf)

        def parse(text: str) -> float:
            with contextlib.suppress(ValueError):
                value = kind(text)
                if (low < value if open_low else low <= value) and value < high:
                    return value
            raise argparse.ArgumentTypeError(f"got {text}, need {need}")

        return parse

    def img_size(text: str) -> int | list[int]:
        sides = [size(side) for side in text.split("x")]
        if len(sides) > 2:
            raise argparse.ArgumentTypeError(f"got {text}, need pixels as 224, or height x width as 160x224")
        return sides[0] if len(sides) == 1 else sides

    def threshold(text: str) -> float | str:
        return text if text == "auto" else fraction(text)

    positive, size = number(int, 1, 10**9), number(int, 1, 10**6)
    fraction, above_zero = number(float, 0, 1), number(float, 0, open_low=True)
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="--data picks the defaults marked *.", allow_abbrev=False
    )
    parser.error = lambda message: parser.exit(2, f"train.py: error: {message}\n")
    add = parser.add_argument
    add("--data", choices=RECIPES, default="synthetic")
    add("--root", help="folder of the data set (synthetic needs none)")
    add("--arch", choices=ARCHITECTURES, help="DeiT's sizes: embed-dim, depth and num-heads at once *")
    add("--img-size", type=img_size, help="network input in pixels: 224, or height x width as 160x224 *")
    add("--patch-size", type=size, help="*")
    add("--embed-dim", type=size, help="*")
    add("--depth", type=number(int, 1, 1000), help="*")
    add("--num-heads", type=size, help="*")
    add("--pretrained", help="file of backbone weights: DeiT, timm ViT, or a checkpoint of this script")
    add("--head", choices=("cdm", "conv", "token"), help="cdm is LCTR, conv TS-CAM, token plain DeiT *")
    add("--num-kernels", type=size, help="G, Table 6 *")
    add("--kernel-size", type=int, choices=(1, 3), help="Table 7 *")
    add("--scorer", choices=("separate", "shared", "gap", "gmp"), help="Table 5 *")
    add("--erase", choices=("raw", "minmax"), help="whether M~c is stretched to [0, 1] before it is reversed *")
    add("--pool", choices=("gap", "padded"), help="padded: the released code's 3 x 3 average before the pool *")
    add("--drop-path", type=fraction, help="stochastic depth's rate in the last block *")
    add("--epochs", type=positive, help="*")
    add("--pretrain-epochs", type=number(int, 0, 10**9), help="epochs with a token head first *")
    add("--palette-label", action=argparse.BooleanOptionalAction, default=True,
        help="pretrain the synthetic birds on their body's palette besides their species (default: yes)")
    add("--batch-size", type=positive, help="images per step, over all processes *")
    add("--accumulate", type=positive, default=1, help="pieces that a batch is computed in, for small cards")
    add("--lr", type=above_zero, help="peak learning rate, never rescaled *")
    add("--pretrain-lr", type=above_zero, help="the same for the pretraining epochs *")
    add("--backbone-lr-scale", type=above_zero, help="times --lr is the backbone's rate in the main phase *")
    add("--weight-decay", type=number(float, 0), help="on all but biases, norms and embeddings *")
    add("--warmup-epochs", type=number(float, 0), help="at most a tenth of the run *")
    add("--label-smoothing", type=fraction, help="*")
    add("--clip-grad", type=number(float, 0), help="largest norm of the gradient, 0 for any *")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="auto: bf16 or fp16 on CUDA, else off")
    add("--compile", action="store_true", help="train through torch.compile, which needs a C++ compiler on a CPU")
    add("--workers", type=number(int, 0, 1000), help="processes that load images (default: 8 on CUDA, 0 on a CPU)")
    add("--seed", type=number(int, 0, 2**63), default=0)
    add("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    add("--out", help="run folder (default: runs/<data>-<head>-seed<seed>)")
    add("--resume", nargs="?", const=True, metavar="FILE", help="continue the run in --out, or from FILE")
    add("--max-steps", type=positive, help="stop the main phase after that many steps")
    add("--limit-train", type=positive, help="keep that many training images, spread evenly")
    add("--limit-test", type=positive, help="the same for test and val")
    add("--eval-every", type=positive, default=1, help="epochs between evaluations on val")
    add("--checkpoint-every", type=positive, help="steps between checkpoints, besides every epoch's")
    add("--threshold", type=threshold, help="of the box: in [0, 1), or auto = best on val; without a val split 0.2")
    flags = parser.parse_args(argv)

    recipe = dict(RECIPES[flags.data])
    if flags.arch or recipe["arch"]:
        recipe["arch"] = flags.arch or recipe["arch"]
        recipe |= zip(("embed_dim", "depth", "num_heads"), ARCHITECTURES[recipe["arch"]])
    for name, value in recipe.items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
    if flags.data == "synthetic" and flags.root:
        parser.error("argument --root: the synthetic birds are drawn, not read: leave it out or give --data")
    if flags.data != "synthetic" and not flags.root:
        parser.error(f"argument --root: missing, --data {flags.data} needs its folder")
    flags.device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if flags.device == "cuda":
        flags.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun's processes take a GPU each
    try:
        device = torch.device(flags.device)
        torch.empty(0, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Triton's and NCCL's choice
    except (RuntimeError, AssertionError) as error:
        parser.error(f"argument --device: {str(error).splitlines()[0]}")
    try:
        with torch.device("meta"):
            build(vars(flags), num_classes=2)
    except ValueError as error:
        parser.error(f"argument --{str(error).replace('_', '-', 1)}")
    if flags.amp == "auto":
        flags.amp = ("off" if device.type == "cpu" else
                     "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16")
    if flags.workers is None:
        flags.workers = 0 if device.type == "cpu" or flags.data == "synthetic" else min(8, os.cpu_count() or 1)
    flags.out = flags.out or f"runs/{flags.data}-{flags.head}-seed{flags.seed}"
    return flags


def build(config: dict, num_classes: int, **changes) -> LCTR:
    return LCTR(num_classes, **{flag: config[flag] for flag in MODEL_FLAGS} | changes)


# ---------------------------------------------------------------- one phase of training


def epoch_batches(samples: int, batch_size: int, *key: int) -> list[list[int]]:
    """The epoch's shuffled batches of sample indices; the last incomplete one is dropped, unless it is the only one."""
    order = np.random.default_rng(key).permutation(samples).tolist()
    batch_size = min(batch_size, samples)
    return [order[i:i + batch_size] for i in range(0, samples - batch_size + 1, batch_size)]


def learning_rate(step: int, total: int, warmup: float, peak: float) -> float:
    """Of a step in 0 .. total-1: linear warm-up over `warmup` steps, then a cosine down to peak / 100."""
    if step < warmup:
        return peak * (step + 1) / (math.floor(warmup) + 1)
    progress = (step - warmup) / (total - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def adamw(model: LCTR, weight_decay: float, backbone_scale: float, pretrained: bool) -> torch.optim.AdamW:
    """The paper's AdamW; biases, norms and embeddings are not decayed. A group's `scale` multiplies its learning rate:
    backbone_scale for all but the head, and less for some of a pretrained file's layers.

    Adam's step ignores how large a weight is. A LayerScale folded into a pretrained projection leaves it far below
    ViT's initial 0.02, and full steps would wreck it: its rate shrinks in proportion, as if it were not folded.
    """
    folded = [linear for block in model.blocks for linear in (block.attn.proj, block.mlp.fc2)] if pretrained else []
    scales = {parameter: min(1.0, linear.weight.detach().square().mean().sqrt().item() / 0.02)
              for linear in folded for parameter in linear.parameters()}
    groups = {}
    for name, parameter in model.named_parameters():
        decay = 0.0 if parameter.ndim < 2 or name in ("cls_token", "pos_embed") else weight_decay
        is_head = name.startswith(HEADS)
        scale = 1.0 if is_head else backbone_scale * scales.get(parameter, 1.0)
        group = {"params": [], "weight_decay": decay, "scale": scale}
        groups.setdefault((decay, is_head, name if parameter in scales else None), group)["params"].append(parameter)
    return torch.optim.AdamW(groups.values(), lr=0.0, betas=(0.9, 0.99), eps=1e-8, fused=True)


def loss_sum(logits: Tensor, batch: dict, num_classes: int, smoothing: float) -> Tensor:
    """Eq. 2 summed over images. Columns beyond the classes are the birds' second label, the palette, in pretraining."""
    cross_entropy = functools.partial(F.cross_entropy, reduction="sum", label_smoothing=smoothing)
    loss = cross_entropy(logits[:, :num_classes], batch["label"])
    if logits.shape[1] > num_classes:
        loss = loss + cross_entropy(logits[:, num_classes:], batch["palette"])
    return loss


def on_device(batch: dict, device: torch.device) -> dict:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def process() -> tuple[int, int]:
    """(rank, number of processes) under torchrun, (0, 1) without."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def say(text: str) -> None:
    if process()[0] == 0:
        print(text, flush=True)


def log(out: Path, entry: dict) -> None:
    if process()[0] == 0:
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")


def write_checkpoint(path: Path, checkpoint: dict) -> None:
    """The former file stays until the new one is whole and on disk; no process goes on before it is."""
    rank, world = process()
    if rank == 0:
        evaluate.write_atomic(path, lambda file: torch.save(checkpoint, file))
    if world > 1:
        dist.barrier()


def fit(model: LCTR, phase: str, train_set, val_set, config: dict, saved: dict | None) -> None:
    """Trains one phase, from `saved` on where given; leaves last.pt and, where it was the best on val, best.pt."""
    out, device, (rank, world) = Path(config["out"]), torch.device(config["device"]), process()
    pieces = world * config["accumulate"]  # of a batch; this process computes `mine`
    mine = slice(rank * config["accumulate"], (rank + 1) * config["accumulate"])
    batch_size = min(config["batch_size"], len(train_set))
    if batch_size < pieces:
        raise ValueError(f"--batch-size: {batch_size} images do not split into {world} x {config['accumulate']} pieces")
    steps_per_epoch = len(train_set) // batch_size
    prefix = "" if phase == "main" else "pretrain_"
    total, peak = steps_per_epoch * config[f"{prefix}epochs"], config[f"{prefix}lr"]
    if phase == "main" and config["max_steps"]:
        total = min(total, config["max_steps"])
    warmup = min(config["warmup_epochs"] * steps_per_epoch, total / 10)

    backbone_scale = config["backbone_lr_scale"] if phase == "main" else 1.0
    optimizer = adamw(model, config["weight_decay"], backbone_scale, pretrained=config["pretrained"] is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=config["amp"] == "fp16")
    step, metrics = 0, {}
    if saved:
        try:
            model.load_state_dict(saved["model"])
            if not all(parameter.isfinite().all() for parameter in model.parameters()):
                raise ValueError("weights that are not finite")
            optimizer.load_state_dict(saved["optimizer"])
            scaler.load_state_dict(saved["scaler"])
            torch.set_rng_state(saved["rng"])
            step, metrics = int(saved["step"]), dict(saved["metrics"])
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise ValueError(f"{saved['path']}: cannot go on from its state: {reason}") from None
    if config["compile"]:
        model.compile()
    parallel = DistributedDataParallel(model) if world > 1 else model
    say(f"{phase}: {len(train_set)} images, {total} steps of {batch_size} images ({world} processes x "
        f"{config['accumulate']} pieces), learning rate {peak:g} after {warmup:.0f} steps, amp {config['amp']}, "
        f"on {device}" + f", from step {step}" * bool(step))

    def checkpoint(name: str) -> None:
        write_checkpoint(out / name, {
            "model": model.state_dict(), "config": config, "classes": train_set.classes, "phase": phase,
            "epoch": step // steps_per_epoch, "step": step, "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(), "rng": torch.get_rng_state(), "metrics": metrics,
        })

    while step < total:
        epoch, done = divmod(step, steps_per_epoch)
        train_set.epoch = epoch + (config["pretrain_epochs"] if phase == "main" else 0)
        key = (config["seed"], PHASES.index(phase), epoch)
        batches = epoch_batches(len(train_set), batch_size, *key)[done:done + total - step]
        parts = [part.tolist() for batch in batches for part in np.array_split(batch, pieces)[mine]]
        stream = iter(data.loader(train_set, parts, config["workers"]))
        model.train()
        for _ in evaluate.progress(batches, f"{phase} epoch {epoch + 1}", show=rank == 0):
            started = time.perf_counter()
            lr = learning_rate(step, total, warmup, peak)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            noise = np.random.default_rng((*key, step)).random((batch_size, config["depth"], 2), np.float32)
            noises = np.array_split(noise, pieces)[mine]
            loss, paths = torch.zeros((), device=device), []
            for part, part_noise in enumerate(noises, 1):
                batch = on_device(next(stream), device)
                paths += batch["path"]
                wait = parallel.no_sync() if world > 1 and part < len(noises) else contextlib.nullcontext()
                with wait, torch.autocast(device.type, AMP[config["amp"]], enabled=config["amp"] != "off"):
                    logits = parallel(batch["image"], torch.from_numpy(part_noise).to(device))
                    part_loss = loss_sum(logits, batch, len(train_set.classes), config["label_smoothing"]) / batch_size
                    scaler.scale(part_loss * world).backward()  # DDP takes the mean over processes
                loss += part_loss.detach()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
            if config["clip_grad"]:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), config["clip_grad"], norm)
            seen = torch.stack([loss, torch.full_like(loss, Interrupt.asked)])  # (2)
            if world > 1:
                dist.all_reduce(seen)
            loss, interrupted, norm = *seen.tolist(), norm.item()
            if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
                raise FloatingPointError(
                    f"{phase} step {step + 1}: loss {loss}, gradient norm {norm}, learning rate {lr:.3g}: not finite; "
                    f"the last good state stays in {out / 'last.pt'}; images of this batch: {', '.join(paths)}")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % LOG_EVERY == 0 or step == total:
                log(out, {"phase": phase, "epoch": epoch, "step": step, "loss": loss, "lr": lr, "grad_norm": norm,
                          "images_per_s": batch_size / (time.perf_counter() - started)})
            if step % steps_per_epoch and step < total:  # an epoch's end saves below
                if interrupted or config["checkpoint_every"] and step % config["checkpoint_every"] == 0:
                    checkpoint("last.pt")
                if interrupted:
                    raise KeyboardInterrupt

        best = phase == "main" and step == total and not val_set
        if phase == "main" and val_set and ((epoch + 1) % config["eval_every"] == 0 or step == total):
            scores = evaluate.score(model, val_set, couplings=(), device=device, workers=config["workers"])
            top1_cls = evaluate.summarise(scores, evaluate.DEFAULT_THRESHOLD)["top1_cls"]
            best = top1_cls >= metrics.get("best_top1_cls", 0)
            metrics = {"top1_cls": top1_cls, "best_top1_cls": max(top1_cls, metrics.get("best_top1_cls", 0))}
            log(out, {"phase": phase, "epoch": epoch, "step": step, "val_top1_cls": top1_cls})
        if best:
            checkpoint("best.pt")
        checkpoint("last.pt")
        say(f"{phase} epoch {epoch + 1}: step {step}, loss {loss:.3f}"
            + (f", val top-1 accuracy {metrics['top1_cls']:.1f} %" if metrics else ""))
        if interrupted:
            raise KeyboardInterrupt


# ---------------------------------------------------------------- the whole run


class Interrupt:
    """Ctrl-C asks the loop to stop after its step; the second one stops at once."""

    asked = False

    @classmethod
    def ask(cls, *_) -> None:
        cls.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def find_saved(flags: argparse.Namespace, config: dict) -> dict | None:
    """The checkpoint to go on from, with its path, or None for a fresh run."""
    out, last = Path(flags.out), Path(flags.out) / "last.pt"
    path = Path(flags.resume) if isinstance(flags.resume, str) else last
    elsewhere = path.parent.resolve() != out.resolve()
    if last.exists() and (elsewhere or not flags.resume):
        raise ValueError(f"--out: {out} already holds a run: continue it with --resume, or give another folder")
    if not flags.resume or flags.resume is True and not last.exists():
        return None
    saved = read_weights(path)
    if saved.get("phase") not in PHASES or not isinstance(saved.get("config"), dict):
        raise ValueError(f"{path}: no phase or config in it: need a checkpoint that train.py wrote")
    differences = [f"--{name.replace('_', '-')} was {saved['config'].get(name)!r}, is {value!r}"
                   for name, value in config.items() if name not in FREE_FLAGS and saved["config"].get(name) != value]
    if differences:
        raise ValueError(f"--resume: flags differ from those of {path}: {'; '.join(differences)}")
    if elsewhere and dist.is_initialized():
        dist.barrier()  # every process has seen that there was no last.pt
    if elsewhere and process()[0] == 0:
        out.mkdir(parents=True, exist_ok=True)
        best, log = path.parent / "best.pt", path.parent / "log.jsonl"
        if saved["phase"] == "main" and not best.exists():
            best = path  # it came alone
        for former, name in ((best, "best.pt"), (log, "log.jsonl"), (path, "last.pt")):
            if former.exists():
                evaluate.write_atomic(out / name, lambda file: file.write(former.read_bytes()))
    return saved | {"path": path}


def cut_log(out: Path, saved: dict | None) -> None:
    """Keeps the lines that the checkpoint knows of: what came after it will be computed, and logged, again."""
    path = out / "log.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut short by a kill
            entry = json.loads(line)
            if saved and (PHASES.index(entry["phase"]), entry["step"]) <= (PHASES.index(saved["phase"]), saved["step"]):
                kept.append(line + "\n")
    evaluate.write_atomic(path, lambda file: file.write("".join(kept).encode()))


def train(flags: argparse.Namespace) -> None:
    config = {name: value for name, value in vars(flags).items() if name != "resume"}
    has_val = data.has_split(flags.data, flags.root, "val")
    if flags.threshold is None:
        config["threshold"] = "auto" if has_val else evaluate.DEFAULT_THRESHOLD
    elif flags.threshold == "auto" and not has_val:
        raise ValueError(f"--threshold: auto needs a val split, {flags.data} has none: give a number")
    out = Path(flags.out)
    saved = find_saved(flags, config)
    if saved and saved["phase"] == "main" and (out / "metrics.json").exists():
        say(f"{out} is finished: its metrics are in {out / 'metrics.json'}")
        return

    if process()[0] == 0:
        out.mkdir(parents=True, exist_ok=True)
    load = functools.partial(data.load_dataset, flags.data, flags.root, img_size=flags.img_size, seed=flags.seed)
    train_set = load(split="train", limit=flags.limit_train)
    val_set = load(split="val", limit=flags.limit_test) if has_val else None
    test_set = load(split="test", limit=flags.limit_test)
    for note in dict.fromkeys(note for split in (train_set, val_set, test_set) if split for note in split.notes):
        say(f"note: {note}")

    if process()[0] == 0:
        (out / "metrics.json").unlink(missing_ok=True)
        cut_log(out, saved)
        evaluate.write_atomic(out / "config.json", lambda file: file.write(json.dumps(config, indent=2).encode()))

    device, classes, backbone = torch.device(flags.device), len(train_set.classes), None

    def start(head: str, outputs: int) -> LCTR:
        """A phase's model as it begins: new from the seed, but for what is pretrained here or in a file."""
        torch.manual_seed(flags.seed)
        model = build(config, outputs, head=head)
        if backbone:
            load_backbone(model, backbone, "pretraining")
        elif flags.pretrained and not saved:
            say(f"backbone from {flags.pretrained}:\n{load_pretrained(model, flags.pretrained)}")
        return model.to(device)

    if flags.pretrain_epochs and not (saved and saved["phase"] == "main"):
        palettes = train_set.num_palettes if flags.data == "synthetic" and flags.palette_label else 0
        model = start("token", classes + palettes)
        fit(model, "pretrain", train_set, None, config, saved)
        if process()[0] == 0:
            evaluate.write_atomic(out / "pretrained.pt", lambda file: file.write((out / "last.pt").read_bytes()))
        backbone, saved = model.state_dict(), None
    model = start(flags.head, classes)
    fit(model, "main", train_set, val_set, config, saved)

    model, best = load_checkpoint(out / "best.pt")
    model = model.to(device)
    score = functools.partial(evaluate.score, model, device=device, workers=flags.workers)
    coupling, threshold = evaluate.default_coupling(model), config["threshold"]
    if threshold == "auto":
        val_scores = score(val_set, couplings=(coupling,))
        threshold = evaluate.DEFAULT_THRESHOLD
        if val_scores.annotated.any():
            threshold = evaluate.best_threshold(val_scores, coupling)
    scores = score(test_set, threshold=threshold)
    best["metrics"] = {**best["metrics"], "threshold": threshold}
    write_checkpoint(out / "best.pt", best)
    if process()[0] == 0:
        metrics = evaluate.summarise(scores, threshold)
        evaluate.report(out, model, test_set, scores, metrics, coupling, threshold)
        print(f"\n{evaluate.format_table(metrics, coupling)}")
        print(f"\npictures: {out / 'gallery.png'}, curve.png, failures.png")


def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    Interrupt.asked = False
    former = signal.signal(signal.SIGINT, Interrupt.ask)
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it
    try:
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group("nccl" if flags.device.startswith("cuda") else "gloo")
        train(flags)
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        last = Path(flags.out) / "last.pt"
        print(f"train.py: interrupted: the same command with --resume goes on from {last}", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        sys.exit(f"train.py: error: {error.filename or flags.out}: {error.strerror or error}")
    except (ValueError, FloatingPointError, RuntimeError, MemoryError) as error:
        sys.exit(f"train.py: error: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
    finally:
        signal.signal(signal.SIGINT, former)


if __name__ == "__main__":
    main()
