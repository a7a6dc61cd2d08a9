"""What the machine code must show, which ptxas is free to undo while results stay right: a decoding
step's first loads are under way before the kernel waits for the one before it, later loads are
spread among the products, and the kernel of all layers is short and has no local memory: its code
is run once a layer, and shared memory leaves it next to no L1.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from hf_fuse.jit import NVCC_FLAGS, SOURCES

WAIT = "ACQBULK"  # griddepcontrol.wait
LOAD = re.compile(r"\bLDG\.E\.(\w+\.)*128")
WEIGHTS = re.compile(r"\bLDG\.E\.(\w+\.)*128\.CONSTANT")  # after the wait
LOCAL = re.compile(r"\b(LDL|STL)\b")
PRODUCT = re.compile(r"\b(FFMA|FMUL)\b")
ADDRESS = re.compile(r"\s*/\*([0-9a-f]{4,})\*/")
# The kernels of one sequence under a norm: dtype, norm, layout, loads, batch, jobs.
NORMED = re.compile(r"__nv_bfloat16L\w+NormKindE[12]EL\w+LayoutE[012]ELi[124]ELi1ELi")


def tool(name: str) -> str:
    found = shutil.which(name) or f"/usr/local/cuda/bin/{name}"
    if not Path(found).exists():
        pytest.skip(f"{name} is not here")
    return found


@cache
def machine_code(source: str) -> str:
    """Of csrc/cuda/`source`, built for sm_90a."""
    disassembler = tool("cuobjdump")
    flags = [*NVCC_FLAGS, "-arch=sm_90a", f"-I{SOURCES / 'include'}", "-cubin"]
    with TemporaryDirectory() as folder:
        cubin = f"{folder}/kernels.cubin"
        subprocess.run(
            [tool("nvcc"), *flags, str(SOURCES / "cuda" / source), "-o", cubin], check=True
        )
        return subprocess.run(
            [disassembler, "-sass", cubin], check=True, capture_output=True, text=True
        ).stdout


def kernels(source: str) -> Iterator[tuple[str, list[str]]]:
    """(name, instructions) of every kernel in csrc/cuda/`source`."""
    for part in machine_code(source).split("Function : ")[1:]:
        name, _, code = part.partition("\n")
        yield name, [line for line in code.splitlines() if ADDRESS.match(line)]


@pytest.mark.parametrize(
    ("source", "kernel", "expected"),
    [
        ("decode_linear_bfloat16.cu", "decode_linear_kernel", 5),
        ("decode_linear_bfloat16.cu", "decode_linear_sum_kernel", 8),
        ("decode_matmul_bfloat16.cu", "decode_matmul_kernel", 8),
        ("decode_attention.cu", "decode_attention_kernel", 2),
    ],
    ids=["decode_linear", "decode_linear_sum", "decode_matmul", "decode_attention"],
)
def test_first_loads_come_before_the_wait(source: str, kernel: str, expected: int) -> None:
    seen = 0
    for name, code in kernels(source):
        if kernel not in name:
            continue
        seen += 1
        waits = [i for i, line in enumerate(code) if WAIT in line]
        assert waits, f"{name} does not wait"
        early = sum(bool(LOAD.search(line)) for line in code[: waits[0]])
        assert early >= expected, f"{name}: {early} wide loads before the wait"
    assert seen


def test_later_rows_are_loaded_between_the_products() -> None:
    seen = 0
    for name, code in kernels("decode_linear_bfloat16.cu"):
        if not NORMED.search(name):
            continue
        seen += 1
        loads = [i for i, line in enumerate(code) if WEIGHTS.search(line)]
        end = next(i for i in range(loads[-1], len(code)) if "BRA" in code[i])
        top = int(code[end].split("BRA")[1].split("0x")[1].split()[0].rstrip(";"), 16)
        start = next(i for i, line in enumerate(code) if address(line) == top)
        products = [i for i in range(start, end) if PRODUCT.search(code[i])]
        before = sum(i < loads[2] for i in products) / len(products)
        assert before < 0.6, f"{name}: {before:.0%} of the products before the third load"
    assert seen


def test_all_layers_in_short_code_without_local_memory() -> None:
    seen = 0
    for name, code in kernels("decode_layers_bfloat16.cu"):
        seen += 1
        assert len(code) < 4500, f"{name}: {len(code)} instructions"
        local = sum("LDL" in line or "STL" in line for line in code)
        assert local <= 32, f"{name}: {local} accesses to local memory"
        products = [i for i, line in enumerate(code) if "HMMA" in line]
        spans = pairwise(products)
        inside = sum(LOCAL.search("".join(code[a:b])) is not None for a, b in spans if b - a < 40)
        assert not inside, f"{name}: local memory among the products"
    assert seen == 4


def address(line: str) -> int:
    found = ADDRESS.match(line)
    return int(found[1], 16) if found else -1
