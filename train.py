"""Trains LCTR from image labels alone, then evaluates it.

    python train.py                                    # synthetic birds, minutes on a 2-core CPU
    python train.py --data cub --root CUB_200_2011 --pretrained deit_small
    torchrun --nproc_per_node=4 train.py --data ilsvrc --root ILSVRC --pretrained deit_small
    python train.py --resume                           # goes on where the same command stopped

--data picks the defaults of all other flags (RECIPES below). The run folder gets config.json,
log.jsonl, last.pt, best.pt and the evaluation's metrics.json, predictions.jsonl and pictures;
after a pretraining phase also pretrained.pt, a backbone that --pretrained takes.

Every random choice is a function of the seed and of what it is drawn for (phase, epoch, step,
sample): neither --workers, nor a stop and --resume, nor the number of processes changes a result.
"""

import contextlib
import math
import os
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
from lctr import ARCHITECTURES, LCTR, MODEL_FLAGS, load_checkpoint, load_pretrained
from support.common import (FlagError, autocast, one_line, progress, write_atomic, write_json)
from support.report.figures import draw_loss, write_png
from support.runs.folder import (PHASES, Stop, adopt, check_data, check_finite, count_stuck,
                          cut_log, find_saved, load_data, lock, log, log_epoch, process, read_log,
                          restore, say, say_plan, score_spread, write_checkpoint)
from support.runs.train_flags import read_flags
from support.weights import HEADS, read_weights

PAPER = dict(  # "Implementation Details", CUB-200-2011; the warm-up is the authors' code's
    arch="small", img_size=224, patch_size=16, head="cdm", num_kernels=4, kernel_size=3,
    scorer="separate", erase="raw", pool="gap", drop_path=0.1, epochs=80, pretrain_epochs=0,
    batch_size=128, lr=5e-5, pretrain_lr=5e-4, layer_decay=1.0, freeze_blocks=0,
    weight_decay=5e-4, warmup_epochs=5.0, label_smoothing=0.0, clip_grad=0.0,
)
RECIPES = {
    "synthetic": PAPER | dict(
        arch=None, img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3, epochs=1,
        pretrain_epochs=6, batch_size=32, lr=1e-3, pretrain_lr=1e-3, freeze_blocks=4,
        weight_decay=0.05, clip_grad=1.0, drop_path=0.0),
    "cub": PAPER,
    # few pictures: epochs by their number (folder_epochs), half of a pretrained backbone frozen
    "folder": PAPER | dict(
        epochs=None, batch_size=32, lr=3e-4, freeze_blocks=None, label_smoothing=0.1),
    "ilsvrc": PAPER | dict(epochs=14, batch_size=256, lr=5e-4),
}
GATE_RATE = 0.02  # of the head's rate: the layers that score the CDM's kernels; lctr.CDM says why
LOG_EVERY = 10  # steps
NOTHING = {"loss": 0.0, "right": 0, "steps": 0}  # an epoch's sums, at its start


# ---------------------------------------------------------------- flags

def build(config: dict, num_classes: int, **changes) -> LCTR:
    return LCTR(num_classes, **{flag: config[flag] for flag in MODEL_FLAGS} | changes)


def parse_flags(argv: list[str] | None = None) -> Namespace:
    """The command line with every default filled in; one line and status 2 if a flag is wrong."""
    flags, parser = read_flags(argv, RECIPES, ARCHITECTURES)
    try:
        with torch.device("meta"):
            build(vars(flags), num_classes=2)
    except ValueError as error:
        parser.error(f"--{str(error).replace('_', '-', 1)}")
    return flags


# ---------------------------------------------------------------- schedule and optimizer

class Plan(NamedTuple):
    """What a phase does: `total` steps of `batch_size` images, over all processes."""

    batch_size: int
    epoch_steps: int
    total: int
    warmup: float  # steps
    peak: float  # learning rate


def plan_phase(phase: str, images: int, config: dict) -> Plan:
    """A data set smaller than a batch is one batch; an incomplete last batch is left out.

    Raises FlagError where a batch does not split into micro-batches.
    """
    batch_size, parts = min(config["batch_size"], images), process()[1] * config["accumulate"]
    if batch_size < parts:
        raise FlagError(f"--batch-size: {batch_size} images do not split into {parts} parts")
    prefix, epoch_steps = "" if phase == "main" else "pretrain_", images // batch_size
    total = epoch_steps * config[f"{prefix}epochs"]
    if phase == "main":
        total = min(total, config["max_steps"] or total)
    warmup = min(config["warmup_epochs"] * epoch_steps, total / 10)
    return Plan(batch_size, epoch_steps, total, warmup, config[f"{prefix}lr"])


def folder_epochs(images: int, batch_size: int) -> int:
    """Epochs for a folder: about 6 sqrt(n) steps, 60 at 100 pictures and 424 at 5,000."""
    return max(1, round(6 * math.sqrt(images) / (images // min(images, batch_size))))


def epoch_batches(samples: int, batch_size: int, *key: int) -> list[list[int]]:
    """The epoch's shuffled batches of sample indices; an incomplete last one is dropped."""
    order = np.random.default_rng(key).permutation(samples).tolist()
    return [order[i:i + batch_size] for i in range(0, samples - batch_size + 1, batch_size)]


def learning_rate(step: int, total: int, warmup: float, peak: float) -> float:
    """Of a step in 0 .. total-1: linear over `warmup` steps, then a cosine to peak / 100."""
    if step < warmup:
        return peak * (step + 1) / (math.floor(warmup) + 1)
    progress = (step - warmup) / (total - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def layer_of(name: str, depth: int) -> int:
    """0 for the embeddings, 1 to depth for the blocks, depth + 1 for the final norm and heads."""
    if name.startswith(("patch_embed.", "cls_token", "pos_embed")):
        return 0
    return 1 + int(name.split(".")[1]) if name.startswith("blocks.") else depth + 1


def adamw(model: LCTR, weight_decay: float, layer_decay: float, frozen: int) -> torch.optim.AdamW:
    """The paper's AdamW. A group's `scale` times the scheduled rate is its learning rate.

    The embeddings and the first `frozen` blocks, if any, get no gradient and no group. Biases,
    norms and embeddings are not decayed.
    """
    depth, groups = len(model.blocks), {}
    for name, parameter in model.named_parameters():
        layer = layer_of(name, depth)
        parameter.requires_grad_(not frozen or layer > frozen)
        if not parameter.requires_grad:
            continue
        embedding = parameter.ndim < 2 or name in ("cls_token", "pos_embed")
        scale = layer_decay ** (depth + 1 - layer)
        if name.startswith(("cdm.score_", "cdm.conv.")):
            scale *= GATE_RATE
        key = (0.0 if embedding else weight_decay, scale)
        groups.setdefault(key, []).append(parameter)
    groups = [{"params": p, "weight_decay": d, "scale": s} for (d, s), p in groups.items()]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), eps=1e-8, fused=True)


# ---------------------------------------------------------------- one step

def shares(items: np.ndarray | list, config: dict) -> list[np.ndarray]:
    """This process's micro-batches of a batch's items."""
    (rank, world), count = process(), config["accumulate"]
    return np.array_split(items, world * count)[rank * count:(rank + 1) * count]


def loss_sum(logits: Tensor, batch: dict, num_classes: int, smoothing: float) -> Tensor:
    """Eq. 2 summed over images; columns beyond the classes are the birds' palette."""
    options = {"reduction": "sum", "label_smoothing": smoothing}
    loss = F.cross_entropy(logits[:, :num_classes], batch["label"], **options)
    if logits.shape[1] > num_classes:
        loss = loss + F.cross_entropy(logits[:, num_classes:], batch["palette"], **options)
    return loss


def gradients(parallel, optimizer, scaler, stream, noise: np.ndarray, num_classes: int,
              config: dict, asked: bool) -> tuple[dict, int, bool, list[str]]:
    """What one step computes: the gradient of Eq. 2's mean over the batch, by micro-batches.

    noise (batch, L, 2): stochastic depth's. Returns, over all processes, what the log needs, how
    many images were classified right and whether any process was asked to stop; and the paths of
    this process's images.
    """
    device, (_, world), batch_size = torch.device(config["device"]), process(), len(noise)
    model, noises = getattr(parallel, "module", parallel), shares(noise, config)
    sums, paths = 0, []  # in float64: the loss, right images, each score and its square
    for i, part_noise in enumerate(noises, 1):
        batch = {key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                 for key, value in next(stream).items()}
        paths += batch["path"]
        # processes exchange gradients after the last micro-batch only
        alone = parallel.no_sync() if world > 1 and i < len(noises) else contextlib.nullcontext()
        with alone:
            with autocast(device, config["amp"]):
                images = data.normalise(batch["image"])
                logits = parallel(images, torch.from_numpy(part_noise).to(device))
                loss = loss_sum(logits, batch, num_classes, config["label_smoothing"]) / batch_size
            scaler.scale(loss * world).backward()  # DDP takes the mean over processes
        right = (logits[:, :num_classes].argmax(1) == batch["label"]).sum()
        part = [torch.stack([loss.detach().double(), right.double()])]
        if hasattr(model, "cdm"):
            scores = model.cdm.last_scores.double()  # (micro-batch, G)
            part += [scores.sum(0), scores.square().sum(0)]
        sums = sums + torch.cat(part)
    scaler.unscale_(optimizer)
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained])
    if config["clip_grad"]:
        torch.nn.utils.clip_grads_with_norm_(trained, config["clip_grad"], norm)
    sums = torch.cat([sums, sums.new_full((1,), asked)])
    if world > 1:
        dist.all_reduce(sums)
    loss, right, *scores, asked = sums.tolist()
    found = {"loss": loss, "grad_norm": norm.item(), **score_spread(scores, batch_size)}
    return found, int(right), bool(asked), paths


# ---------------------------------------------------------------- one phase of training

def epoch_stream(train_set, plan: Plan, key: tuple, done: int, passed: int, config: dict):
    """This process's micro-batches of an epoch, from its step `done` on; key: of its shuffling."""
    batches = epoch_batches(len(train_set), plan.batch_size, *key)[done:]
    lists = [[(passed, index) for index in part.tolist()]
             for batch in batches for part in shares(batch, config)]
    return iter(data.loader(train_set, lists, config["workers"]))


def score(model: LCTR, dataset, config: dict, **options) -> evaluate.Evaluation:
    return evaluate.evaluate_model(model, dataset, device=config["device"],
                                   workers=config["workers"], amp=config["amp"], **options)


def fit(model: LCTR, phase: str, train_set, val_set, config: dict, saved: dict | None,
        stop: Stop, later: float) -> None:
    """Trains one phase, from `saved` on where given; leaves last.pt and best.pt.

    later: what follows the phase, in steps, for the estimates of time.
    """
    # plan, optimizer, and where a checkpoint stood
    out, device, (rank, world) = Path(config["out"]), torch.device(config["device"]), process()
    plan, main = plan_phase(phase, len(train_set), config), phase == "main"
    rates = (config["layer_decay"], config["freeze_blocks"]) if main else (1.0, 0)
    optimizer = adamw(model, config["weight_decay"], *rates)
    scaler = torch.amp.GradScaler(device.type, enabled=config["amp"] == "fp16")
    first, metrics, running = 0, {}, NOTHING
    if saved:
        first, metrics, running = restore(saved, model, optimizer, scaler)
    if config["compile"]:
        model.compile()
    parallel = DistributedDataParallel(model) if world > 1 else model
    say_plan(phase, plan, len(train_set), first, config)

    def checkpoint(name: str) -> None:
        state = {"model": model.state_dict(), "config": config, "classes": train_set.classes,
                 "phase": phase, "epoch": step // plan.epoch_steps, "step": step,
                 "metrics": metrics}
        if name == "last.pt":  # and what resuming needs
            state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                      "rng": torch.get_rng_state(), "running": running,
                      "data": {"images": len(train_set), "digest": data.digest(train_set)}}
        write_checkpoint(out / name, state)

    stream, stuck, started = None, 0, time.perf_counter()
    stop.in_steps = True
    for step in progress(range(first + 1, plan.total + 1), phase, rank == 0, later):  # from 1
        # this step's rate, and the gradient of its batch
        lr = learning_rate(step - 1, plan.total, plan.warmup, plan.peak)
        epoch, done = divmod(step - 1, plan.epoch_steps)
        key = (config["seed"], PHASES.index(phase), epoch)
        if stream is None or done == 0:
            passed = epoch + (config["pretrain_epochs"] if main else 0)
            stream = epoch_stream(train_set, plan, key, done, passed, config)
            model.train()
        noise = np.random.default_rng((*key, step - 1)).random(
            (plan.batch_size, config["depth"], 2), np.float32)
        found, right, asked, paths = gradients(
            parallel, optimizer, scaler, stream, noise, len(train_set.classes), config, stop.asked)
        found["lr"] = lr
        check_finite(found, f"{phase} step {step}", out / "last.pt", paths, scaler.is_enabled())

        # the step
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        running = {"loss": running["loss"] + found["loss"], "right": running["right"] + right,
                   "steps": running["steps"] + 1}

        # what is said, logged and saved
        rate = plan.batch_size * (step - first) / (time.perf_counter() - started)  # images a second
        if step == first + 2:
            minutes = plan.batch_size * (plan.total - step + later) / rate / 60
            say(f"{rate:.3g} images/s: about {minutes:.1f} minutes to go, evaluation included")
        if step % LOG_EVERY == 0 or step == plan.total:
            log(out, {"phase": phase, "epoch": epoch, "step": step, **found, "images_per_s": rate})
            stuck = count_stuck(found, stuck)
        if step % plan.epoch_steps == 0 or step == plan.total:
            top1, best = None, main and not val_set and step == plan.total
            if val_set and ((epoch + 1) % config["eval_every"] == 0 or step == plan.total):
                stop.in_steps = False  # Ctrl-C ends an evaluation at once
                scores = score(model, val_set, config, couplings=())
                stop.in_steps = True
                top1 = evaluate.summarise(scores, evaluate.DEFAULT_THRESHOLD)["top1_cls"]
                best = top1 >= metrics.get("best_top1_cls", 0)
                record = top1 if best else metrics["best_top1_cls"]
                metrics = {"top1_cls": top1, "best_top1_cls": record}
            log_epoch(out, phase, epoch, step, running, plan.batch_size, top1)
            running = NOTHING
            if best:
                checkpoint("best.pt")
            checkpoint("last.pt")
        elif asked or config["checkpoint_every"] and step % config["checkpoint_every"] == 0:
            checkpoint("last.pt")
        if asked:
            stop.raised = True
            raise KeyboardInterrupt
    stop.in_steps = False


# ---------------------------------------------------------------- the whole run

def finish(config: dict, val_set, test_set) -> None:
    """Evaluates best.pt at the chosen threshold and writes the report."""
    out = Path(config["out"])
    model, best = load_checkpoint(out / "best.pt")
    model = model.to(config["device"])
    coupling, threshold = evaluate.default_coupling(model), config["threshold"]
    if threshold == "auto":
        val_scores = score(model, val_set, config, couplings=(coupling,))
        threshold = evaluate.DEFAULT_THRESHOLD
        if val_scores.annotated.any():
            threshold = evaluate.best_threshold(val_scores, coupling)
    scores = score(model, test_set, config, threshold=threshold)
    best["metrics"] = {**best["metrics"], "threshold": threshold}
    write_checkpoint(out / "best.pt", best)
    if process()[0] == 0:
        metrics = evaluate.summarise(scores, threshold)
        write_png(out / "loss.png", draw_loss(read_log(out)))
        evaluate.report(out, model, test_set, scores, metrics, coupling, threshold)
        print(f"\n{evaluate.format_table(metrics, coupling)}\n\nreport and pictures in {out}")
    last = read_weights(out / "last.pt")  # its word decides whether the run is finished
    last["metrics"] = {**last["metrics"], "finished": True}
    write_checkpoint(out / "last.pt", last)


def train(flags: Namespace, stop: Stop) -> None:
    # what can be checked before the data is read
    config = {name: value for name, value in vars(flags).items() if name != "resume"}
    has_val, out = data.has_split(flags.data, flags.root, "val"), Path(flags.out)
    if flags.threshold == "auto" and not has_val:
        raise FlagError(
            f"--threshold: auto needs a val split, {flags.data} has none: give a number")
    if flags.threshold is None:
        config["threshold"] = "auto" if has_val else evaluate.DEFAULT_THRESHOLD
    with contextlib.ExitStack() as held:
        if out.is_dir():
            held.enter_context(lock(out))
        saved = find_saved(out, flags.resume, config)
        if saved and saved["metrics"].get("finished") and saved["path"] == out / "last.pt":
            say(f"{out} is finished: its metrics are in {out / 'metrics.json'}")
            return

        # the data, and whether the checkpoint was trained on it
        train_set, val_set, test_set = load_data(flags, has_val)
        classes = len(train_set.classes)
        if saved:
            check_data(saved, train_set.classes, len(train_set), data.digest(train_set))
        if config["epochs"] is None:
            config["epochs"] = folder_epochs(len(train_set), flags.batch_size)
            say(f"{len(train_set)} training pictures: {config['epochs']} epochs (--epochs)")
        main_phase = plan_phase("main", len(train_set), config)
        if not out.is_dir():
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock(out))
        if process()[0] == 0:
            if saved:
                adopt(saved, out)
            cut_log(out, saved)
            write_json(out / "config.json", config)

        # pretraining with a "token" head, then the main phase on its backbone
        device, backbone = torch.device(flags.device), {}
        scored = len(test_set) + (len(val_set) if val_set else 0)
        later = scored / 2 / main_phase.batch_size  # an image scored costs half of one trained on

        def start(head: str, outputs: int) -> LCTR:
            torch.manual_seed(flags.seed)
            model = build(config, outputs, head=head)
            if backbone:
                model.load_state_dict(backbone, strict=False)
            elif flags.pretrained and not saved:
                report = load_pretrained(model, flags.pretrained)
                say(f"backbone from {flags.pretrained}:\n{report}")
            return model.to(device)

        if flags.pretrain_epochs and not (saved and saved["phase"] == "main"):
            birds = flags.data == "synthetic" and flags.palette_label
            model = start("token", classes + (train_set.num_palettes if birds else 0))
            fit(model, "pretrain", train_set, None, config, saved, stop, main_phase.total + later)
            if process()[0] == 0:
                content = (out / "last.pt").read_bytes()
                write_atomic(out / "pretrained.pt", lambda file: file.write(content))
            saved, backbone = None, {name: value for name, value in model.state_dict().items()
                                     if not name.startswith(HEADS)}
        fit(start(flags.head, classes), "main", train_set, val_set, config, saved, stop, later)
        finish(config, val_set, test_set)


def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it, as in evaluate.py
    with Stop() as stop:
        try:
            if "WORLD_SIZE" in os.environ:
                dist.init_process_group("nccl" if flags.device.startswith("cuda") else "gloo")
            train(flags, stop)
            if dist.is_initialized():
                dist.destroy_process_group()
        except KeyboardInterrupt:
            last = Path(flags.out) / "last.pt"
            how = (f"the same command with --resume goes on from {last}" if last.exists()
                   else "nothing was saved yet")
            print(f"train.py: interrupted: {how}", file=sys.stderr)
            sys.exit(130)
        except (OSError, ValueError, FloatingPointError, RuntimeError, MemoryError) as error:
            print(f"train.py: error: {one_line(error, flags.out)}", file=sys.stderr)
            sys.exit(2 if isinstance(error, FlagError) else 1)


if __name__ == "__main__":
    main()
