"""Trains LCTR from image labels alone, then evaluates it.

    python train.py                                    # synthetic birds, minutes on a 2-core CPU
    python train.py --data cub --root CUB_200_2011 --pretrained deit_small
    torchrun --nproc_per_node=4 train.py --data ilsvrc --root ILSVRC --pretrained deit_small
    python train.py --resume                           # goes on where the same command stopped

--data picks the defaults of all other flags (RECIPES below). The run folder gets config.json,
log.jsonl, last.pt, best.pt and the evaluation's metrics.json, predictions.jsonl and pictures;
after a pretraining phase also pretrained.pt, a backbone that --pretrained takes.

Every random choice is a function of the seed and of what it is drawn for (phase, epoch, step,
sample): neither --workers, --cache, nor a stop and --resume changes a result; the number of
processes and of micro-batches changes only how sums round.
"""

import contextlib
import functools
import math
import multiprocessing
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
from lctr import ARCHITECTURES, LCTR, MODEL_FLAGS, load_checkpoint, load_pretrained
from support.common import FlagError, autocast, one_line, progress
from support.report.figures import draw_loss, write_png
from support.runs.compiling import compile_mode, compiled
from support.runs.folder import (PHASES, Stop, any_process, begin, check_data, digest_of,
                                 find_saved, hold, log, process, read_log, restore, say,
                                 write_checkpoint)
from support.runs.train_flags import read_flags
from support.weights import HEADS, read_weights

PAPER = dict(  # "Implementation Details", CUB-200-2011; the warm-up is the authors' code's
    arch="small", img_size=224, patch_size=16, head="cdm", num_kernels=4, kernel_size=3,
    scorer="separate", erase="raw", pool="gap", drop_path=0.1, epochs=80, pretrain_epochs=0,
    patch_loss="none", batch_size=128, lr=5e-5, pretrain_lr=5e-4, layer_decay=1.0,
    freeze_blocks=0, weight_decay=5e-4, warmup_epochs=5.0, label_smoothing=0.0, clip_grad=0.0,
)
RECIPES = {
    # the pretraining stands for the paper's ImageNet: there the patch tokens learn to classify,
    # which the relation map, a mean of their attention, needs
    "synthetic": PAPER | dict(
        species=18, arch=None, img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3,
        epochs=1, pretrain_epochs=6, patch_loss="each", batch_size=32, lr=1e-3, pretrain_lr=1e-3,
        freeze_blocks=4, weight_decay=0.05, clip_grad=1.0, drop_path=0.0),
    "cub": PAPER,
    # few pictures: epochs by their number (folder_epochs), half of a pretrained backbone frozen
    "folder": PAPER | dict(
        epochs=None, batch_size=32, lr=3e-4, freeze_blocks=None, label_smoothing=0.1),
    "ilsvrc": PAPER | dict(epochs=14, batch_size=256, lr=5e-4),
}
GATE_RATE = 0.02  # of the head's rate: the layers that score the CDM's kernels; lctr.CDM says why
LOG_EVERY = 10  # steps
SAVE_EVERY = 30  # seconds between checkpoints at epochs' ends
WARMUP = 3  # steps that no estimate of time counts
SCORES_STUCK = 20  # logged steps with a mean score below .01 or above .99


# ---------------------------------------------------------------- schedule and optimizer

class Plan(NamedTuple):
    """What a phase does: `total` steps of `batch_size` images, over all processes."""

    phase: str
    images: int
    kinds: dict[str, int]  # the image labels that it trains on, and how many of each there are
    batch_size: int
    epoch_steps: int
    total: int
    warmup: float  # steps
    peak: float  # learning rate


def plan_phase(phase: str, train_set: data.Split, config: dict) -> Plan:
    """A data set smaller than a batch is one batch; an incomplete last batch is left out.

    Raises FlagError where a batch does not split into micro-batches.
    """
    batch_size = min(config["batch_size"], len(train_set))
    parts = process()[1] * config["accumulate"]
    if batch_size < parts:
        raise FlagError(f"--batch-size: {batch_size} images do not split into {parts} parts")
    epoch_steps = len(train_set) // batch_size
    kinds = {"label": len(train_set.classes)}
    if phase == "main":
        peak, total = config["lr"], epoch_steps * config["epochs"]
        total = min(total, config["max_steps"] or total)
    else:
        peak, total = config["pretrain_lr"], epoch_steps * config["pretrain_epochs"]
        if config["data"] == "synthetic" and config["palette_label"]:
            kinds["palette"] = train_set.num_palettes
    warmup = min(config["warmup_epochs"] * epoch_steps, total / 10)
    return Plan(phase, len(train_set), kinds, batch_size, epoch_steps, total, warmup, peak)


def folder_epochs(images: int, batch_size: int) -> int:
    """Epochs for a folder: about 6 sqrt(n) steps, 60 at 100 pictures and 424 at 5,000."""
    return max(1, round(6 * math.sqrt(images) / (images // min(images, batch_size))))


def learning_rate(step: int, total: int, warmup: float, peak: float) -> float:
    """Of a step in 0 .. total-1: linear over `warmup` steps, then a cosine to peak / 100."""
    if step < warmup:
        return peak * (step + 1) / (math.floor(warmup) + 1)
    share = (step - warmup) / (total - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


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
        undecayed = parameter.ndim < 2 or name in ("cls_token", "pos_embed")
        scale = layer_decay ** (depth + 1 - layer)
        if name.startswith(("cdm.score_", "cdm.conv.")):
            scale *= GATE_RATE
        key = (0.0 if undecayed else weight_decay, scale)
        groups.setdefault(key, []).append(parameter)
    groups = [{"params": p, "weight_decay": d, "scale": s} for (d, s), p in groups.items()]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), eps=1e-8, fused=True)


# ---------------------------------------------------------------- which images a step takes

def epoch_batches(samples: int, batch_size: int, *key: int) -> list[list[int]]:
    """The epoch's shuffled batches of sample indices; an incomplete last one is dropped."""
    order = np.random.default_rng(key).permutation(samples).tolist()
    return [order[i:i + batch_size] for i in range(0, samples - batch_size + 1, batch_size)]


def shares(items: np.ndarray | list, config: dict) -> list[np.ndarray]:
    """This process's micro-batches of a batch's items."""
    (rank, world), count = process(), config["accumulate"]
    return np.array_split(items, world * count)[rank * count:(rank + 1) * count]


def micro_batches(plan: Plan, first: int, config: dict) -> Iterator[list[tuple[int, int]]]:
    """Of each micro-batch of this process, after step `first`: its samples' (epoch, index)."""
    before = config["pretrain_epochs"] if plan.phase == "main" else 0  # views go on over phases
    key = config["seed"], PHASES.index(plan.phase)
    for epoch in range(first // plan.epoch_steps, math.ceil(plan.total / plan.epoch_steps)):
        batches = epoch_batches(plan.images, plan.batch_size, *key, epoch)
        for batch in batches[max(first - epoch * plan.epoch_steps, 0):]:
            for part in shares(batch, config):
                yield [(before + epoch, index) for index in part.tolist()]


# ---------------------------------------------------------------- what a step computes

class Classifier(nn.Module):
    """What DDP and torch.compile see: images (B, 3, H, W) -> a tuple of logits, of which the first
    are the model's (B, C).

    patch_loss: of a "token" head. "each" classifies every patch token with the class token's
    layer, (B, C, N), "mean" their mean, (B, C, 1), so that pretraining trains the patch tokens, as
    the paper's training of all blocks does through theirs; "none" leaves them out.
    """

    def __init__(self, model: LCTR, patch_loss: str):
        super().__init__()
        self.model, self.patch_loss = model, patch_loss

    def forward(self, images: Tensor, noise: Tensor | None) -> tuple[Tensor, ...]:
        if self.patch_loss == "none":
            return (self.model(images, noise),)
        tokens, _ = self.model.forward_features(images, "cls", noise)  # (B, N+1, D)
        patches = tokens[:, 1:]
        if self.patch_loss == "mean":
            patches = patches.mean(1, keepdim=True)  # (B, 1, D)
        return self.model.classifier(tokens[:, 0]), self.model.classifier(patches).mT


def loss_sum(logits: Tensor, labels: list[Tensor], sizes: list[int], smoothing: float) -> Tensor:
    """Eq. 2 summed over images, for each kind of label (B,) and its logits.

    logits (B, C) or (B, C, n), C the sum of sizes; the mean over n of an image's losses counts.
    """
    loss = 0
    for part, ids in zip(logits.split(sizes, 1), labels):
        if part.ndim == 3:
            ids = ids[:, None].expand(-1, part.shape[2])  # (B, n)
        loss = loss + F.cross_entropy(part, ids, reduction="sum", label_smoothing=smoothing)
    return loss / logits.shape[2:].numel()


# ---------------------------------------------------------------- one phase of training

def fit(model: LCTR, plan: Plan, train_set: data.Split, cache: data.Cache | None, val_set,
        config: dict, saved: dict | None, stop: Stop, later: float) -> None:
    """Trains one phase, from `saved` on where given; leaves last.pt and best.pt.

    later: what follows the phase, in steps, for the estimates of time.
    """
    out, device, (rank, world) = Path(config["out"]), torch.device(config["device"]), process()
    phase, main, sizes = plan.phase, plan.phase == "main", list(plan.kinds.values())

    # the optimizer, and where a checkpoint stood
    layer_decay, frozen = (config["layer_decay"], config["freeze_blocks"]) if main else (1.0, 0)
    optimizer = adamw(model, config["weight_decay"], layer_decay, frozen)
    scaler = torch.amp.GradScaler(device.type, enabled=config["amp"] == "fp16")
    first, metrics = 0, {}
    running = {"line": [], "epoch": []}  # a row of figures per step, since the log's last line
    if saved:
        first, metrics, running = restore(saved, model, optimizer, scaler)
    say(f"{phase}: {plan.images} images, {plan.total} steps of {plan.batch_size} images "
        f"({world} processes x {config['accumulate']} micro-batches), learning rate "
        f"{plan.peak:g} after {plan.warmup:.0f} steps, amp {config['amp']}, on {device}"
        + f", from step {first}" * bool(first))

    # the model as it is trained, and this process's batches, prepared while it computes
    classifier = Classifier(model, "none" if main else config["patch_loss"]).train()
    if first < plan.total and (mode := compile_mode(plan.total, config)):
        classifier = compiled(classifier, mode, plan.batch_size, config)
    parallel = DistributedDataParallel(classifier) if world > 1 else classifier
    keys = micro_batches(plan, first, config)
    batches = (map(cache.batch, keys) if cache
               else data.loader(train_set, keys, config["workers"]))

    pictures = {"images": plan.images, "digest": data.digest(train_set)}
    rows = []  # of figures, on the device: of the steps since the last reading
    stuck = 0
    written = -math.inf
    clock = first, time.perf_counter()
    stop.in_steps = True
    for step in progress(range(first + 1, plan.total + 1), phase, show=rank == 0, later=later,
                         warmup=WARMUP):
        epoch, done = divmod(step - 1, plan.epoch_steps)
        key = config["seed"], PHASES.index(phase), epoch
        lr = learning_rate(step - 1, plan.total, plan.warmup, plan.peak)

        # stochastic depth's noise (batch, L, 2): of the step, whoever computes which image
        noises = [None] * config["accumulate"]
        if config["drop_path"]:
            shape = plan.batch_size, config["depth"], 2
            noise = np.random.default_rng((*key, step - 1)).random(shape, np.float32)
            noises = [data.send(torch.from_numpy(part), device) for part in shares(noise, config)]

        # forward and backward: the gradient of the mean loss over the batch, by micro-batches
        row = 0
        for i, noise in enumerate(noises, 1):
            batch = next(batches)
            images = data.normalise(batch["image"].to(device, non_blocking=True))  # (B, 3, H, W)
            labels = [batch[kind].to(device, non_blocking=True) for kind in plan.kinds]
            # processes exchange gradients after the last micro-batch only
            alone = world > 1 and i < len(noises)
            with parallel.no_sync() if alone else contextlib.nullcontext():
                with autocast(device, config["amp"]):
                    logits = parallel(images, noise)
                    loss = sum(loss_sum(part, labels, sizes, config["label_smoothing"])
                               for part in logits) / plan.batch_size
                scaler.scale(loss * world).backward()  # DDP takes the mean over processes

            # what the log wants of it, left on the device
            hits = (logits[0][:, :sizes[0]].argmax(1) == labels[0]).sum()
            figures = [loss.detach()[None], hits[None]]
            if model.head_type == "cdm":
                scores = model.cdm.last_scores.float() - 0.5  # (B, G), near 0
                figures += [scores.sum(0), scores.square().sum(0)]
            row = row + torch.cat([figure.float() for figure in figures])

        # the step
        scaler.unscale_(optimizer)
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in trained])
        if config["clip_grad"]:
            nn.utils.clip_grads_with_norm_(trained, config["clip_grad"], norm)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        rows.append(torch.cat([row, norm[None]]))  # loss, hits, S_g - 1/2 and squares, norm

        # until something is to be logged or saved, the device works on and nobody waits for it
        late = rank == 0 and time.monotonic() - written > SAVE_EVERY
        stops, late = any_process(stop.requested, late)
        stop.step_ended()
        ends = done + 1 == plan.epoch_steps or step == plan.total
        every = config["checkpoint_every"]
        saves = stops or ends and (late or step == plan.total) or every and step % every == 0
        logs = step % LOG_EVERY == 0 or step == plan.total
        warm = step - first in (WARMUP, 2 * WARMUP)
        if not (saves or logs or ends or warm):
            continue

        # the steps' figures, summed over processes: the one wait for the device
        table = torch.stack(rows, 1)  # (figures, steps)
        if world > 1:
            dist.all_reduce(table[:-1])  # the norm is the same in all
        for number, values in enumerate(table.T.tolist(), step - len(rows) + 1):
            # fp16's scaler leaves out a step whose gradient overflows, so that one may pass
            overflow = not math.isfinite(values[-1]) and not scaler.is_enabled()
            if overflow or not math.isfinite(values[0]):
                raise FloatingPointError(not_finite(number, values, plan, train_set, config))
            running["line"].append(values)
            running["epoch"].append(values[:2])
        rows = []

        # what is logged and said
        now = time.perf_counter()
        rate = plan.batch_size * (step - clock[0]) / (now - clock[1])  # images a second
        if step - first == 2 * WARMUP:
            minutes = plan.batch_size * (plan.total - step + later) / rate / 60
            say(f"{rate:.3g} images/s: about {minutes:.1f} minutes to go, evaluation included")
        if logs:
            figures = mean_figures(running["line"], plan.batch_size)
            running["line"] = []
            log(out, {"phase": phase, "epoch": epoch, "step": step, **figures, "lr": lr,
                      "images_per_s": rate})
            stuck = 0 if 0.01 <= figures.get("score_mean", 0.5) <= 0.99 else stuck + 1
            if stuck == SCORES_STUCK:
                say("note: the CDM's scores are stuck at 0 or 1, so its kernels no longer differ "
                    "between images: a smaller --lr helps")
        if step - first == WARMUP:
            clock = step, now

        # an epoch's end: its mean loss and accuracy, also on val; the best model so far
        best = main and not val_set and step == plan.total
        if ends:
            losses, hits = zip(*running["epoch"])
            running["epoch"] = []
            entry = {"phase": phase, "epoch": epoch, "step": step,
                     "mean_loss": sum(losses) / len(losses),
                     "train_top1": 100 * sum(hits) / (len(hits) * plan.batch_size)}
            said = (f"{phase} epoch {epoch + 1}: step {step}, mean loss {entry['mean_loss']:.3f}, "
                    f"training accuracy {entry['train_top1']:.1f} %")
            if val_set and ((epoch + 1) % config["eval_every"] == 0 or step == plan.total):
                results = evaluated(model, val_set, config, couplings=())
                classifier.train()
                top1 = evaluate.summarise(results, evaluate.DEFAULT_THRESHOLD)["top1_cls"]
                former = metrics.get("best_top1_cls", 0)
                best = top1 >= former
                metrics = {"top1_cls": top1, "best_top1_cls": max(top1, former)}
                entry["val_top1_cls"] = top1
                said += f", val top-1 accuracy {top1:.1f} %"
            log(out, entry)
            say(said)

        # checkpoints: best.pt, and last.pt with what resuming needs
        state = {"model": model.state_dict(), "config": config, "classes": train_set.classes,
                 "phase": phase, "epoch": step // plan.epoch_steps, "step": step,
                 "metrics": metrics}
        if best:
            write_checkpoint(out / "best.pt", state)
        if saves:
            write_checkpoint(out / "last.pt", state | {
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                "rng": torch.get_rng_state(), "running": running, "data": pictures})
            written = time.monotonic()
        if stops:
            stop.end()
    stop.in_steps = False


# ---------------------------------------------------------------- what is said of steps

def mean_figures(rows: list[list[float]], batch_size: int) -> dict:
    """What a line of the log says of some steps (rows as in fit): means over steps and images.

    A gradient that is not finite, a step that fp16 leaves out, does not enter its norm's mean.
    score_mean, score_std: of the CDM's scores, over kernels, the second of their spread over
    images.
    """
    table = np.array(rows)
    norms = table[:, -1][np.isfinite(table[:, -1])]
    figures = {"loss": float(table[:, 0].mean()),
               "grad_norm": float(norms.mean()) if len(norms) else None}
    if table.shape[1] > 3:
        sums = table[:, 2:-1].sum(0) / (len(table) * batch_size)
        mean, square = sums.reshape(2, -1)  # of S_g - 1/2 and its square (G,)
        spread = np.sqrt(np.maximum(square - mean**2, 0))
        figures |= {"score_mean": float(0.5 + mean.mean()), "score_std": float(spread.mean())}
    return figures


def not_finite(step: int, row: list[float], plan: Plan, train_set, config: dict) -> str:
    """What is said of a step whose loss or gradient is no number: where, and of which pictures."""
    epoch, done = divmod(step - 1, plan.epoch_steps)
    key = config["seed"], PHASES.index(plan.phase), epoch
    batch = epoch_batches(plan.images, plan.batch_size, *key)[done]
    last = Path(config["out"]) / "last.pt"
    kept = f"the last good state stays in {last}; " * last.exists()
    return (f"{plan.phase} step {step}: loss {row[0]}, gradient norm {row[-1]}: not finite; {kept}"
            f"images of this batch: {', '.join(train_set.path(index) for index in batch)}")


# ---------------------------------------------------------------- the whole run

def load_data(flags: Namespace, has_val: bool) -> list:
    """The train, val and test sets, val None where there is none; their notes are printed."""
    load = functools.partial(
        data.load_dataset, flags.data, flags.root, img_size=flags.img_size, seed=flags.seed,
        species=flags.species)
    sets = [load(split="train", limit=flags.limit_train),
            load(split="val", limit=flags.limit_test) if has_val else None,
            load(split="test", limit=flags.limit_test)]
    for note in dict.fromkeys(note for split in sets if split for note in split.notes):
        say(f"note: {note}")
    if len(sets[0].classes) < 2:
        raise ValueError(f"{flags.root or flags.data}: one class alone teaches nothing: need two")
    return sets


def evaluated(model: LCTR, dataset, config: dict, **options) -> evaluate.Evaluation:
    return evaluate.evaluate_model(model, dataset, device=config["device"],
                                   workers=config["workers"], amp=config["amp"], **options)


def finish(config: dict, val_set, test_set) -> None:
    """Evaluates best.pt at the chosen threshold and writes the report."""
    out = Path(config["out"])
    model, best = load_checkpoint(out / "best.pt")
    model = model.to(config["device"])
    coupling, threshold = evaluate.default_coupling(model), config["threshold"]
    if threshold == "auto":
        val_results = evaluated(model, val_set, config, couplings=(coupling,))
        threshold = evaluate.DEFAULT_THRESHOLD
        if val_results.annotated.any():
            threshold = evaluate.best_threshold(val_results, coupling)
    results = evaluated(model, test_set, config, threshold=threshold)
    best["metrics"] = {**best["metrics"], "threshold": threshold}
    write_checkpoint(out / "best.pt", best)
    if process()[0] == 0:
        metrics = evaluate.summarise(results, threshold)
        write_png(out / "loss.png", draw_loss(read_log(out)))
        metrics = evaluate.report(out, model, test_set, results, metrics, coupling, threshold)
        say(f"\n{evaluate.format_table([metrics])}\n\nreport and pictures in {out}")
    last = read_weights(out / "last.pt")  # its word decides whether the run is finished
    last["metrics"] = {**last["metrics"], "finished": True}
    write_checkpoint(out / "last.pt", last)


def build(config: dict, num_classes: int, **changes) -> LCTR:
    return LCTR(num_classes, **{flag: config[flag] for flag in MODEL_FLAGS} | changes)


def start(config: dict, head: str, outputs: int, pretrained: str | None) -> LCTR:
    """A phase's model, new but for a backbone's weights."""
    torch.manual_seed(config["seed"])
    model = build(config, outputs, head=head)
    if pretrained:
        report = load_pretrained(model, pretrained)
        say(f"backbone from {pretrained}:\n{report}")
    return model.to(config["device"])


def train(flags: Namespace, stop: Stop) -> None:
    # what can be checked before the data is read
    config = {name: value for name, value in vars(flags).items() if name != "resume"}
    config["pretrained_digest"] = digest_of(flags.pretrained)
    has_val, out = data.has_split(flags.data, flags.root, "val"), Path(flags.out)
    if flags.threshold == "auto" and not has_val:
        raise FlagError(
            f"--threshold: auto needs a val split, {flags.data} has none: give a number")
    if flags.threshold is None:
        config["threshold"] = "auto" if has_val else evaluate.DEFAULT_THRESHOLD
    with hold(out, flags.resume):
        saved = find_saved(out, flags.resume, config)
        if saved and saved["metrics"].get("finished") and saved["path"] == out / "last.pt":
            say(f"{out} is finished: its metrics are in {out / 'metrics.json'}")
            return

        # the data, and whether the checkpoint was trained on it
        train_set, val_set, test_set = load_data(flags, has_val)
        if saved:
            check_data(saved, train_set.classes, len(train_set), data.digest(train_set))
        if config["epochs"] is None:
            config["epochs"] = folder_epochs(len(train_set), flags.batch_size)
            say(f"{len(train_set)} training pictures: {config['epochs']} epochs (--epochs)")
        pretrain, main = (plan_phase(phase, train_set, config) for phase in PHASES)
        begin(out, saved, config)
        device, cache = torch.device(flags.device), None
        if flags.cache == "on" or flags.cache == "auto" and data.cache_fits(train_set, device):
            cache = data.Cache(train_set, device)
        scored = len(test_set) + (len(val_set) if val_set else 0)
        later = scored / 2 / main.batch_size  # an image scored costs half of one trained on

        # pretraining with a "token" head, then the main phase on its backbone
        pretrained, backbone = None if saved else flags.pretrained, {}
        if pretrain.total and not (saved and saved["phase"] == "main"):
            model = start(config, "token", sum(pretrain.kinds.values()), pretrained)
            fit(model, pretrain, train_set, cache, None, config, saved, stop, main.total + later)
            write_checkpoint(out / "pretrained.pt", read_weights(out / "last.pt"))
            saved, pretrained = None, None
            backbone = {name: value for name, value in model.state_dict().items()
                        if not name.startswith(HEADS)}
        model = start(config, flags.head, len(train_set.classes), pretrained)
        model.load_state_dict(backbone, strict=False)
        fit(model, main, train_set, cache, val_set, config, saved, stop, later)
        finish(config, val_set, test_set)


def parse_flags(argv: list[str] | None = None) -> Namespace:
    """The command line with every default filled in; one line and status 2 if a flag is wrong."""
    flags, parser = read_flags(argv, RECIPES, ARCHITECTURES)
    try:
        with torch.device("meta"):
            build(vars(flags), num_classes=2)
    except ValueError as error:
        parser.error(f"--{str(error).replace('_', '-', 1)}")
    return flags


def main(argv: list[str] | None = None) -> None:
    with contextlib.suppress(AttributeError):  # a name that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    flags = parse_flags(argv)
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it, as in evaluate.py
    others = set(multiprocessing.active_children())
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
        finally:
            data.end_workers(others)


if __name__ == "__main__":
    main()
