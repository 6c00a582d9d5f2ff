"""train.py's model through torch.compile."""

import torch
from torch import nn

from support.common import autocast, last_line
from support.runs.folder import process, say

TRIALS = 3  # steps: CUDA graphs are recorded in the second and replayed in the third


def compile_mode(steps: int, config: dict) -> str | None:
    """--compile: "reduce-overhead", CUDA graphs, for a long phase on one GPU; "default"; None."""
    graphs = config["device"].startswith("cuda") and process()[1] == 1 and steps >= 1000
    # a graph's gradients lie where the next replay writes them, so none may be added up
    graphs = graphs and config["amp"] == "bf16" and config["accumulate"] == 1
    if config["compile"] == "off" or config["compile"] == "auto" and not graphs:
        return None
    return "reduce-overhead" if graphs else "default"


def compiled(classifier: nn.Module, mode: str, batch_size: int, config: dict) -> nn.Module:
    """The classifier compiled, after trial steps on blank images; as it was, with a note, where
    that fails under --compile auto. It must be train.py's Classifier.
    """
    device = torch.device(config["device"])
    count = -(-batch_size // (process()[1] * config["accumulate"]))  # of a micro-batch
    images = torch.zeros(count, 3, *classifier.model.img_size, device=device)
    noise = None
    if config["drop_path"]:
        noise = torch.ones(count, config["depth"], 2, device=device)
    say(f"compiling the model (--compile), mode {mode}")
    torch.compiler.reset()  # a former phase's graphs, and the memory that they hold
    try:
        whole = torch.compile(classifier, mode=mode)
        for _ in range(TRIALS):
            with autocast(device, config["amp"]):
                logits = whole(images, noise)
            sum(part.float().mean() for part in logits).backward()
            classifier.zero_grad(set_to_none=True)
        return whole
    except Exception as error:  # of any kind: compilers raise nearly anything
        if config["compile"] == "on":
            raise RuntimeError(f"--compile: {last_line(error)}: off trains without") from error
        say(f"note: the model does not compile, training goes on without ({last_line(error)})")
        classifier.zero_grad(set_to_none=True)
        return classifier
