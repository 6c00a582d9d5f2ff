"""A training run on a GPU, where a step that waits for the device is an error: else skipped."""

import json

import pytest

from helpers import on_a_gpu

CODE = """
import sys, torch, train

rate, calls = train.learning_rate, iter(range(1, 10**6))

def watch(step, *rest):
    # between the readings after steps 10 and 20 nothing waits
    mode = {12: "error", 20: "default"}.get(next(calls))
    if mode:
        torch.cuda.set_sync_debug_mode(mode)
    return rate(step, *rest)

train.learning_rate = watch
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("flags", [
    ["--amp", "bf16"], ["--amp", "fp16"], ["--amp", "bf16", "--cache", "off", "--workers", "2"],
    ["--amp", "bf16", "--compile", "on"], ["--amp", "bf16", "--accumulate", "2"]], ids=" ".join)
def test_no_step_waits_for_a_gpu(tmp_path, flags):
    (tmp_path / "watch.py").write_text(CODE)
    command = ("--device cuda --limit-train 960 --limit-test 40 --epochs 1 --pretrain-epochs 0 "
               "--freeze-blocks 0 --drop-path 0.1 --out").split()
    on_a_gpu(str(tmp_path / "watch.py"), *command, str(tmp_path / "run"), *flags)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [10, 20, 30]
