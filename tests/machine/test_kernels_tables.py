"""docs/kernels.md shows docs/results/compile.json and ptx_faults.json, and names all kernels."""

import json
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/kernels.md").read_text()
COMPILED = json.loads((ROOT / "docs/results/compile.json").read_text())["rows"]
KERNELS = {
    name
    for file in ("rpam.py", "cdm.py")
    for name in re.findall(r"^def (\w+_kernel)\(", (ROOT / "kernels" / file).read_text(), re.M)
}


def table(*header: str) -> list[list[str]]:
    lines = PAGE.split(f"| {' | '.join(header)} |\n")[1].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_compile_table():
    shown = table("kernel", "config", "sm_80", "sm_90", "gfx942")
    assert {kernel for kernel, *_ in shown} == KERNELS
    for kernel, config, *cells in shown:
        for target, cell in zip(("sm_80", "sm_90", "gfx942"), cells, strict=True):
            (row,) = [
                row for row in COMPILED if set(config.split()) <= set(row["config"].split())
                and (row["kernel"], row["target"], row["dtype"]) == (kernel, target, "bfloat16")
            ]
            found = [row[key] for key in ("registers", "tensor_core", "load_bytes")]
            assert cell == " / ".join(map(str, found)), (kernel, target)


def test_planted_faults():
    rows = json.loads((ROOT / "docs/results/ptx_faults.json").read_text())["rows"]
    planted, seen = (sum(row[key] for row in rows) for key in ("planted", "seen"))
    assert {row["kernel"] for row in rows} == KERNELS
    assert f"{planted} faults, of which {seen} are seen" in " ".join(PAGE.split())


def test_compiled_counts_and_limits():
    assert f"({len(COMPILED)} in all" in PAGE and not any(row["spills"] for row in COMPILED)
    most = [max(row["shared"] for row in COMPILED if row["target"] == target) // 1024
            for target in ("sm_80", "sm_90", "gfx942")]
    assert "at most {}, {} and {} KiB".format(*most) in PAGE
