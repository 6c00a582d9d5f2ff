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
import functools
import math
import os
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
from lctr import ARCHITECTURES, HEADS, LCTR, MODEL_FLAGS, load_checkpoint, load_pretrained
from support.common import (autocast, choose_amp, last_line, open_device, progress, write_atomic,
                            write_json)
from support.figures import draw_loss, write_png
from support.runs import (PHASES, FlagError, Stop, adopt, check_data, cut_log, find_saved, lock,
                          log, process, read_log, say, tell_time, write_checkpoint)
from support.train_flags import read_flags
from support.weights import read_weights

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
SCORES_STUCK = 20  # logged steps with a mean score below .01 or above .99


# ---------------------------------------------------------------- flags


def parse_flags(argv: list[str] | None = None) -> Namespace:
    """The command line with every default filled in; one line and status 2 if a flag is wrong."""
    flags, parser = read_flags(argv, RECIPES, ARCHITECTURES)
    recipe, frozen = dict(RECIPES[flags.data]), flags.freeze_blocks
    if flags.arch or recipe["arch"]:
        recipe["arch"] = flags.arch or recipe["arch"]
        recipe |= zip(("embed_dim", "depth", "num_heads"), ARCHITECTURES[recipe["arch"]])
    for name, value in recipe.items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
    if flags.freeze_blocks is None:
        flags.freeze_blocks = flags.depth // 2 if flags.pretrained else 0
    if frozen is None:
        flags.freeze_blocks = min(flags.freeze_blocks, flags.depth)
    if flags.freeze_blocks > flags.depth:
        parser.error(f"--freeze-blocks: got {frozen}, the model has {flags.depth} blocks")
    if flags.data == "synthetic" and flags.root:
        parser.error("--root: the synthetic birds are drawn, not read: leave it out or give --data")
    if flags.data != "synthetic" and not flags.root:
        parser.error(f"--root: missing, --data {flags.data} needs its folder")
    if flags.batch_size < (parts := int(os.environ.get("WORLD_SIZE", 1)) * flags.accumulate):
        parser.error(f"--batch-size: {flags.batch_size} images do not split into {parts} parts")
    try:
        device = open_device(flags.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    try:
        with torch.device("meta"):
            build(vars(flags), num_classes=2)
    except ValueError as error:
        parser.error(f"--{str(error).replace('_', '-', 1)}")
    flags.device, flags.amp = str(device), choose_amp(flags.amp, device)
    if flags.workers is None:
        in_memory = device.type == "cpu" or flags.data == "synthetic"
        flags.workers = 0 if in_memory else min(8, os.cpu_count() or 1)
    flags.out = flags.out or f"runs/{flags.data}-{flags.head}-seed{flags.seed}"
    return flags


def build(config: dict, num_classes: int, **changes) -> LCTR:
    return LCTR(num_classes, **{flag: config[flag] for flag in MODEL_FLAGS} | changes)


# ---------------------------------------------------------------- schedule and optimizer


def folder_epochs(images: int, batch_size: int) -> int:
    """Epochs for a folder: about 6 sqrt(n) steps, 60 at 100 pictures and 424 at 5,000."""
    return max(1, round(6 * math.sqrt(images) / (images // batch_size)))


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


def loss_sum(logits: Tensor, batch: dict, num_classes: int, smoothing: float) -> Tensor:
    """Eq. 2 summed over images; columns beyond the classes are the birds' palette."""
    cross_entropy = functools.partial(
        F.cross_entropy, reduction="sum", label_smoothing=smoothing)
    loss = cross_entropy(logits[:, :num_classes], batch["label"])
    if logits.shape[1] > num_classes:
        loss = loss + cross_entropy(logits[:, num_classes:], batch["palette"])
    return loss


def gradients(parallel, stream, noises: list, num_classes: int, batch_size: int, config: dict,
              scaler) -> tuple[Tensor, list[str]]:
    """What one step computes: the gradient of Eq. 2's mean over the batch, by micro-batches.

    Returns this process's sums over images, in float64: the loss's share, right classes, and of
    each of the G scores its value and its square; and the images' paths.
    """
    device, (_, world) = torch.device(config["device"]), process()
    sums, paths = 0, []
    for i, noise in enumerate(noises, 1):
        batch = {key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                 for key, value in next(stream).items()}
        paths += batch["path"]
        # processes exchange gradients after the last micro-batch only
        alone = parallel.no_sync() if world > 1 and i < len(noises) else contextlib.nullcontext()
        with alone:
            with autocast(device, config["amp"]):
                logits = parallel(batch["image"], torch.from_numpy(noise).to(device))
                loss = loss_sum(logits, batch, num_classes, config["label_smoothing"]) / batch_size
            scaler.scale(loss * world).backward()  # DDP takes the mean over processes
        right = (logits[:, :num_classes].argmax(1) == batch["label"]).sum()
        part = [torch.stack([loss.detach().double(), right.double()])]
        cdm = getattr(getattr(parallel, "module", parallel), "cdm", None)
        if cdm is not None:
            scores = cdm.last_scores.double()  # (micro-batch, G)
            part += [scores.sum(0), scores.square().sum(0)]
        sums = sums + torch.cat(part)
    return sums, paths


def score_spread(sums: list[float], images: int) -> dict:
    """Of the scores' sums and squares (2G): mean over images and kernels, spread over images."""
    mean, square = np.array(sums).reshape(2, -1) / images
    spread = np.sqrt(np.maximum(square - mean**2, 0))
    return {"score_mean": float(mean.mean()), "score_std": float(spread.mean())}


# ---------------------------------------------------------------- one phase of training


def restore(saved: dict, model: LCTR, optimizer, scaler) -> tuple[int, dict, dict]:
    """Puts a checkpoint's state back; returns its step, its metrics and its epoch's sums."""
    try:
        model.load_state_dict(saved["model"])
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise ValueError("weights that are not finite")
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"])
        return int(saved["step"]), dict(saved["metrics"]), dict(saved["running"])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{saved['path']}: cannot go on from its state: {last_line(error)}") from None


def classify(model: LCTR, dataset, config: dict) -> float:
    """Top-1 accuracy in percent."""
    scores = evaluate.score(model, dataset, couplings=(), device=config["device"],
                            workers=config["workers"], amp=config["amp"])
    return evaluate.summarise(scores, evaluate.DEFAULT_THRESHOLD)["top1_cls"]


def fit(model: LCTR, phase: str, train_set, val_set, config: dict, saved: dict | None,
        stop: Stop, scored: int = 0) -> None:
    """Trains one phase, from `saved` on where given; leaves last.pt and best.pt.

    scored: how many images are evaluated afterwards, for the estimate of the time.
    """
    # sizes: of batches, of their micro-batches, of the run
    out, device, (rank, world) = Path(config["out"]), torch.device(config["device"]), process()
    parts = world * config["accumulate"]  # of a batch; this process computes `mine`
    mine = slice(rank * config["accumulate"], (rank + 1) * config["accumulate"])
    batch_size = min(config["batch_size"], len(train_set))
    if batch_size < parts:
        raise FlagError(f"--batch-size: {batch_size} images do not split into {parts} parts")
    epoch_steps = len(train_set) // batch_size
    main, prefix = phase == "main", "" if phase == "main" else "pretrain_"
    total, peak = epoch_steps * config[f"{prefix}epochs"], config[f"{prefix}lr"]
    total = min(total, config["max_steps"] or total) if main else total
    warmup = min(config["warmup_epochs"] * epoch_steps, total / 10)

    # optimizer, and the state that a checkpoint holds
    rates = (config["layer_decay"], config["freeze_blocks"]) if main else (1.0, 0)
    optimizer = adamw(model, config["weight_decay"], *rates)
    scaler = torch.amp.GradScaler(device.type, enabled=config["amp"] == "fp16")
    step, metrics, running = 0, {}, {"loss": 0.0, "right": 0, "steps": 0}
    if saved:
        step, metrics, running = restore(saved, model, optimizer, scaler)
    if config["compile"]:
        model.compile()
    parallel = DistributedDataParallel(model) if world > 1 else model
    say(f"{phase}: {len(train_set)} images, {total} steps of {batch_size} images ({world} "
        f"processes x {config['accumulate']} micro-batches), learning rate {peak:g} after "
        f"{warmup:.0f} steps, amp {config['amp']}, on {device}"
        + f", from step {step}" * bool(step))

    def checkpoint(name: str) -> None:
        state = {"model": model.state_dict(), "config": config, "classes": train_set.classes,
                 "phase": phase, "epoch": step // epoch_steps, "step": step, "metrics": metrics}
        if name == "last.pt":  # and what resuming needs
            state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                      "rng": torch.get_rng_state(), "running": running,
                      "data": {"images": len(train_set), "digest": data.digest(train_set)}}
        write_checkpoint(out / name, state)

    stream, stuck, started, first = None, 0, time.perf_counter(), step
    stop.in_steps = True
    for step in progress(range(step + 1, total + 1), phase, show=rank == 0):  # counted from 1
        # this epoch's batches, from this step on
        epoch, done = divmod(step - 1, epoch_steps)
        key = (config["seed"], PHASES.index(phase), epoch)
        if stream is None or done == 0:
            train_set.epoch = epoch + (config["pretrain_epochs"] if main else 0)
            batches = epoch_batches(len(train_set), batch_size, *key)[done:done + total - step + 1]
            lists = [part.tolist() for batch in batches
                     for part in np.array_split(batch, parts)[mine]]
            stream = iter(data.loader(train_set, lists, config["workers"]))
            model.train()

        # the gradient, over all processes
        lr = learning_rate(step - 1, total, warmup, peak)
        noise = np.random.default_rng((*key, step - 1)).random(
            (batch_size, config["depth"], 2), np.float32)
        sums, paths = gradients(parallel, stream, np.array_split(noise, parts)[mine],
                                len(train_set.classes), batch_size, config, scaler)
        scaler.unscale_(optimizer)
        trained = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        if config["clip_grad"]:
            torch.nn.utils.clip_grads_with_norm_(trained, config["clip_grad"], norm)
        sums = torch.cat([sums, sums.new_full((1,), stop.asked)])
        if world > 1:
            dist.all_reduce(sums)
        loss, right, *scores, asked = sums.tolist()
        norm = norm.item()
        if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
            kept = f"the last good state stays in {out / 'last.pt'}; " * (out / "last.pt").exists()
            raise FloatingPointError(
                f"{phase} step {step}: loss {loss}, gradient norm {norm}, learning rate {lr:.3g}: "
                f"not finite; {kept}images of this batch: {', '.join(paths)}")

        # the step
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        running = {"loss": running["loss"] + loss, "right": running["right"] + int(right),
                   "steps": running["steps"] + 1}

        # what is said and logged
        if step == first + 2:
            tell_time(time.perf_counter() - started, total - step, batch_size, scored)
        if step % LOG_EVERY == 0 or step == total:
            spread = score_spread(scores, batch_size) if scores else {}
            log(out, {"phase": phase, "epoch": epoch, "step": step, "loss": loss, "lr": lr,
                      "grad_norm": norm, **spread, "images_per_s":
                      batch_size * (step - first) / (time.perf_counter() - started)})
            dead = spread and not 0.01 <= spread["score_mean"] <= 0.99
            stuck = stuck + 1 if dead else 0
            if stuck == SCORES_STUCK:
                say("note: the CDM's scores are stuck at 0 or 1, so its kernels no longer differ "
                    "between images: a smaller --lr helps")

        # the epoch's end: mean loss, accuracy on val, checkpoints
        best = main and step == total and not val_set
        if step % epoch_steps == 0 or step == total:
            images = running["steps"] * batch_size
            entry = {"phase": phase, "epoch": epoch, "step": step,
                     "mean_loss": running["loss"] / running["steps"],
                     "train_top1": 100 * running["right"] / images}
            running = {"loss": 0.0, "right": 0, "steps": 0}
            if main and val_set and ((epoch + 1) % config["eval_every"] == 0 or step == total):
                stop.in_steps = False
                top1 = classify(model, val_set, config)
                stop.in_steps = True
                best = top1 >= metrics.get("best_top1_cls", 0)
                metrics = {"top1_cls": top1,
                           "best_top1_cls": max(top1, metrics.get("best_top1_cls", 0))}
                entry["val_top1_cls"] = top1
            log(out, entry)
            text = f"{phase} epoch {epoch + 1}: step {step}, mean loss {entry['mean_loss']:.3f}, "
            text += (f"val top-1 accuracy {metrics['top1_cls']:.1f} %" if "top1_cls" in metrics
                     else f"training accuracy {entry['train_top1']:.1f} %")
            say(text)
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


def load_data(flags: Namespace, has_val: bool) -> list:
    """The train, val and test sets, val None where there is none; their notes are printed."""
    load = functools.partial(
        data.load_dataset, flags.data, flags.root, img_size=flags.img_size, seed=flags.seed)
    sets = [load(split="train", limit=flags.limit_train),
            load(split="val", limit=flags.limit_test) if has_val else None,
            load(split="test", limit=flags.limit_test)]
    for note in dict.fromkeys(note for split in sets if split for note in split.notes):
        say(f"note: {note}")
    if len(sets[0].classes) < 2:
        raise ValueError(f"{flags.root or flags.data}: one class alone teaches nothing: need two")
    return sets


def finish(config: dict, val_set, test_set) -> None:
    """Evaluates best.pt at the chosen threshold and writes the report."""
    out, device = Path(config["out"]), torch.device(config["device"])
    model, best = load_checkpoint(out / "best.pt")
    model = model.to(device)
    score = functools.partial(evaluate.score, model, device=device, workers=config["workers"],
                              amp=config["amp"])
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
        write_png(out / "loss.png", draw_loss([e for e in read_log(out) if "loss" in e]))
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
        classes, batch_size = len(train_set.classes), min(flags.batch_size, len(train_set))
        if saved:
            check_data(saved, train_set.classes, len(train_set), data.digest(train_set))
        if config["epochs"] is None:
            config["epochs"] = folder_epochs(len(train_set), batch_size)
            say(f"{len(train_set)} training pictures: {config['epochs']} epochs (--epochs)")
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
            fit(model, "pretrain", train_set, None, config, saved, stop)
            if process()[0] == 0:
                content = (out / "last.pt").read_bytes()
                write_atomic(out / "pretrained.pt", lambda file: file.write(content))
            saved, backbone = None, {name: value for name, value in model.state_dict().items()
                                     if not name.startswith(HEADS)}
        scored = len(test_set) + (len(val_set) if val_set else 0)
        fit(start(flags.head, classes), "main", train_set, val_set, config, saved, stop, scored)
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
        except FlagError as error:
            print(f"train.py: error: {error}", file=sys.stderr)
            sys.exit(2)
        except OSError as error:
            reason = f"{error.filename or flags.out}: {error.strerror or error}"
            sys.exit(f"train.py: error: {reason}")
        except (ValueError, FloatingPointError, RuntimeError, MemoryError) as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            sys.exit(f"train.py: error: {line}")


if __name__ == "__main__":
    main()
