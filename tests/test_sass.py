"""What the machine code must show: a decoding step's first loads are under way before the kernel
waits for the one before it. ptxas moves plain loads below that wait: results stay right, and the
kernels no longer overlap.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_fuse.jit import NVCC_FLAGS, SOURCES

WAIT = "ACQBULK"  # griddepcontrol.wait
LOAD = re.compile(r"\bLDG\.E\.(\w+\.)*128")


def tool(name: str) -> str:
    found = shutil.which(name) or f"/usr/local/cuda/bin/{name}"
    if not Path(found).exists():
        pytest.skip(f"{name} is not here")
    return found


def kernels(source: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(name, instructions) of every kernel in csrc/cuda/`source`, built for sm_90a."""
    cubin = folder / "kernels.cubin"
    flags = [*NVCC_FLAGS, "-arch=sm_90a", f"-I{SOURCES / 'include'}", "-cubin"]
    subprocess.run(
        [tool("nvcc"), *flags, str(SOURCES / "cuda" / source), "-o", str(cubin)], check=True
    )
    sass = subprocess.run(
        [tool("cuobjdump"), "-sass", str(cubin)], check=True, capture_output=True, text=True
    ).stdout
    for part in sass.split("Function : ")[1:]:
        name, _, code = part.partition("\n")
        yield name, code.splitlines()


@pytest.mark.parametrize(
    ("source", "kernel", "expected"),
    [
        ("decode_linear.cu", "decode_linear_kernel", 5),
        ("decode_attention.cu", "decode_attention_kernel", 2),
    ],
    ids=["decode_linear", "decode_attention"],
)
def test_first_loads_come_before_the_wait(
    source: str, kernel: str, expected: int, tmp_path: Path
) -> None:
    seen = 0
    for name, code in kernels(source, tmp_path):
        if kernel not in name:
            continue
        seen += 1
        waits = [i for i, line in enumerate(code) if WAIT in line]
        assert waits, f"{name} does not wait"
        early = sum(bool(LOAD.search(line)) for line in code[: waits[0]])
        assert early >= expected, f"{name}: {early} wide loads before the wait"
    assert seen
