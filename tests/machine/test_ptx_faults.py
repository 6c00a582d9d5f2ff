"""Faults planted in the compiled code, one at a time: what the tests see of them.

    python tests/machine/test_ptx_faults.py            # plants them all: minutes to an hour
    pytest tests/machine/test_ptx_faults.py            # a few of one kernel's that must be seen
    pytest tests/machine/test_ptx_faults.py -m full    # a few of every other kernel's

docs/kernels.md says why the rest changes nothing.
"""

import functools
import itertools
import json
import os
import pathlib
import random
import re
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")  # as conftest.py has it
ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "docs/experiments")]

import pytest
import torch

pytest.importorskip("triton")

import kernels
import ptx
from kernel_properties import (
    AttentionCase, ConvCase, check_aggregate_attention, check_attention, check_class_maps,
    check_class_row, check_dynamic_conv2d, check_dynamic_conv_logits,
)
from record import about

TABLE = ROOT / "docs/results/ptx_faults.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TARGETS = (80, 90)


def later(match):
    """A wait that leaves one group more."""
    return re.sub(r"\d+;", lambda number: f"{int(number[0][:-1]) + 1};", match[0])


def farther(match):
    """16 lanes become 1."""
    return f"{match[1]}{2 * int(match[2]) % 31},"


FAULTS = {
    "barrier removed": (r"\bbar\.sync\s+0;", ""),
    "wait for copies removed": (r"\bcp\.async\.wait_group\s+\d+;", ""),
    "wait for copies one group late": (r"\bcp\.async\.wait_group\s+\d+;", later),
    "commit of copies removed": (r"\bcp\.async\.commit_group;", ""),
    "wait for products removed": (r"\bwgmma\.wait_group\.sync\.aligned\s+\d+;", ""),
    "wait for products one group late": (r"\bwgmma\.wait_group\.sync\.aligned\s+\d+;", later),
    "fence of shared memory removed": (r"\bfence\.proxy\.async\.shared::cta;", ""),
    "fence of registers removed": (r"\bwgmma\.fence\.sync\.aligned;", ""),
    "matrix not transposed": (r"\.x4\.trans\b", ".x4"),
    "load for the masked lanes only": (r"@(%p\d+) (?=ld\.global)", r"@!\1 "),
    "store for the masked lanes only": (r"@(%p\d+) (?=st\.global)", r"@!\1 "),
    "lanes of twice the distance": (r"(shfl\.sync\.bfly\.b32\s+\S+ \S+ )(\d+),", farther),
    "minus for plus": (r"\badd(\.rn)?\.f32", "sub.f32"),
    "minimum for maximum": (r"\bmax\.f32", "min.f32"),
    "selection turned": (r"(selp\.\w+\s+\S+ )(\S+), (\S+),", r"\1\3, \2,"),
    "or for and": (r"\band\.pred", "or.pred"),
}
MOST = 8  # places of a fault in one kernel, evenly spaced: loops are unrolled

HEAD = AttentionCase(B=2, S=2, N=69, d=32)  # what is compiled does not depend on B and N
TOGETHER = HEAD._replace(B=1, N=126, layouts=("contiguous",) * 3, same=True)
LARGE = HEAD._replace(B=1, N=125, scale=1000.0)  # logits
ODD = ConvCase(B=1, D=61, C=61, G=3, h=3, w=13)  # a little less than whole tiles
WHOLE = ConvCase(B=1, D=64, C=64, G=2, h=4, w=16, layouts=("contiguous",) * 4)
CASES = {  # a fault is seen if one of the check's cases that run the kernel fails
    "class row": (check_class_row, [HEAD, TOGETHER, LARGE]),
    "aggregate": (check_aggregate_attention, [HEAD, TOGETHER]),
    "attention": (check_attention, [HEAD, TOGETHER._replace(N=101), LARGE]),
    "long attention": (check_attention, [  # two passes in 16 bits too
        HEAD._replace(B=1, N=269), TOGETHER._replace(N=301, S=1)]),
    "conv": (check_dynamic_conv2d, [ODD, WHOLE]),
    "logits": (check_dynamic_conv_logits, [ODD, WHOLE]),
    "class maps": (check_class_maps, [ODD._replace(K=7), WHOLE._replace(D=192, K=7)]),
}
RUNS = [(name, dtype, sm) for sm in TARGETS for dtype in DTYPES for name in CASES
        if (name, dtype) != ("long attention", "float32")]


def mutants(code: str, fault: str, most: int) -> list[str]:
    pattern, replacement = FAULTS[fault]
    sites = list(re.finditer(pattern, code))
    sites = sites[::-(-len(sites) // most) or 1]
    return [code[:m.start()] + re.sub(pattern, replacement, code[m.start():], count=1)
            for m in sites]


def planted(name: str, dtype: str, sm: int):
    """((kernel, fault), a function that says whether it is seen) for each place in each kernel that
    the check's cases run."""
    check, cases = CASES[name]
    launched: dict[str, set] = {}  # PTX: the cases that run it
    for case in (case._replace(dtype=DTYPES[dtype]) for case in cases):
        def remember(code):
            launched.setdefault(code, set()).add(case)
            return code

        with ptx.emulated(sm, remember):
            check(kernels, case)

    def seen(code, mutant) -> bool:
        try:
            with ptx.emulated(sm, lambda launched: mutant if launched == code else launched):
                for case in sorted(launched[code], key=str):
                    check(kernels, case)
        except (AssertionError, ptx.Fault):
            return True
        return False

    most = 3 if check == check_attention else MOST  # whose cases take the longest
    for code, fault in itertools.product(launched, FAULTS):
        kernel = re.search(r"\.entry (\w+)", code)[1]
        for mutant in mutants(code, fault, most):
            yield (kernel, fault), functools.partial(seen, code, mutant)


def rows(name: str, dtype: str, sm: int) -> list[dict]:
    """A row per kernel and fault: how many were planted, and how many seen."""
    found: dict[tuple, dict] = {}
    for (kernel, fault), seen in planted(name, dtype, sm):
        row = found.setdefault((kernel, fault), {
            "sm": sm, "dtype": dtype, "check": name, "kernel": kernel, "fault": fault,
            "planted": 0, "seen": 0})
        row["planted"] += 1
        row["seen"] += seen()
    return list(found.values())


IN_DEFAULT_RUN = ("class maps", "bfloat16", 90)


@pytest.mark.parametrize("name, dtype, sm", [
    pytest.param(*run, marks=[] if run == IN_DEFAULT_RUN else pytest.mark.full) for run in RUNS])
def test_some_of_the_planted_faults_are_seen(name, dtype, sm):
    """Three kinds of those of which the table says that all of the kind in that kernel are seen."""
    certain = {(row["kernel"], row["fault"]) for row in json.loads(TABLE.read_text())["rows"]
               if (row["check"], row["dtype"], row["sm"]) == (name, dtype, sm)
               and row["planted"] == row["seen"]}
    faults = {where: seen for where, seen in planted(name, dtype, sm) if where in certain}
    for where in random.Random(0).sample(sorted(faults), 3):
        assert faults[where](), where


def main() -> None:
    found = [row for run in RUNS for row in rows(*run)]
    made = about("tests/machine/test_ptx_faults.py", [])
    TABLE.write_text(json.dumps(made | {"rows": found}, indent=1) + "\n")
    for fault in (*FAULTS, ""):
        planted, seen = (sum(row[key] for row in found if row["fault"] == fault or not fault)
                         for key in ("planted", "seen"))
        print(f"| {fault or 'in all'} | {planted} | {seen} |")


if __name__ == "__main__":
    main()
