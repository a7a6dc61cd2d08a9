"""jit: what cannot be built says why and what mends it, once, and the reference answers instead."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_fuse import jit

PREAMBLE = """
import json, sys, warnings
caught = []
warnings.showwarning = lambda m, category, *rest: caught.append((category.__name__, str(m)))
warnings.simplefilter("always")
import torch
from hf_fuse import jit
"""

# Uses every op twice, then says what came of it.
USE_OPS = (
    PREAMBLE
    + """
from hf_fuse import ops
from hf_fuse.ops import add_norm, bias_act, gated_act, rotary
x, row = torch.randn(3, 8), torch.ones(8)
heads, angles = torch.randn(1, 2, 3, 8), torch.randn(1, 3, 8)
for _ in range(2):
    assert torch.equal(add_norm(x, row, eps=1e-5, kind="layer", deltas=[x])[1],
                       torch.nn.functional.layer_norm(x + x, (8,), row, eps=1e-5))
    assert torch.equal(bias_act(x, row, "gelu"), torch.nn.functional.gelu(x + row))
    assert torch.equal(gated_act(x, x, "silu"), torch.nn.functional.silu(x) * x)
    assert rotary(heads, heads, angles, angles)[0].shape == heads.shape
asked_for = ""
try:
    add_norm(x, row, eps=1e-5, kind="layer", backend="cpu")
except RuntimeError as error:
    asked_for = str(error)
caught = [text for category, text in caught if category == "RuntimeWarning"]
failure = jit.failures["cpu"]
print(json.dumps({"warnings": caught, "reason": failure.reason, "fix": failure.fix,
                  "asked_for": asked_for, "loaded": jit.is_loaded("cpu")}))
"""
)

BUILD = (
    PREAMBLE
    + """
compiled, compile_ = [], jit._compile
jit._compile = lambda build: (compiled.append(build.backend), compile_(build))
loaded = jit.load("cpu")
ran = hasattr(torch.ops.hf_fuse, "add_norm")
print(json.dumps({"loaded": loaded, "ran": ran, "compiled": compiled, "warnings": caught}))
"""
)


def start(script: str, **environment: Any) -> subprocess.Popen:
    names = {k: v for k, v in os.environ.items() if not k.startswith("HF_FUSE_")}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**names, **{k: str(v) for k, v in environment.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process: subprocess.Popen) -> dict[str, Any]:
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return json.loads(stdout.splitlines()[-1])


def program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("case", ["missing", "broken", "cannot_compile", "unwritable_cache"])
def test_what_cannot_be_built_warns_once_and_the_reference_answers(
    case: str, tmp_path: Path
) -> None:
    environment: dict[str, Any] = {"HF_FUSE_CACHE": tmp_path / "cache"}
    if case == "missing":
        environment["CXX"] = "no-such-compiler"
        reason, fix = "'no-such-compiler' was not found", "Install g++"
    elif case == "broken":
        environment["CXX"] = shutil.which("false")
        reason, fix = "false --version failed", "Check the compiler's installation"
    elif case == "cannot_compile":
        answer = 'case "$*" in *-version*|*-v) echo "g++ 12.2.0";; *) echo "x.cpp:1: error: no" >&2'
        environment["CXX"] = program(tmp_path / "g++", f"{answer}; exit 1;; esac")
        reason, fix = "Compiling the cpu kernels failed: x.cpp:1: error: no", "HF_FUSE_VERBOSE=1"
    else:
        (tmp_path / "cache").write_text("a file where the folder should be")
        reason, fix = f"cache folder {tmp_path / 'cache'}", "Set HF_FUSE_CACHE"
    result = outcome(start(USE_OPS, **environment))
    assert not result["loaded"]
    assert reason in result["reason"]
    assert fix in result["fix"]
    assert len(result["warnings"]) == 1
    for part in ("cpu kernels are not available", reason, fix, "hf-fuse doctor"):
        assert part in result["warnings"][0]
    for part in ("'cpu' was asked for", reason, fix):
        assert part in result["asked_for"]


def test_a_disabled_backend_is_not_warned_of(tmp_path: Path) -> None:
    result = outcome(start(USE_OPS, HF_FUSE_CACHE=tmp_path, HF_FUSE_DISABLE="cuda, cpu"))
    assert result["warnings"] == []
    assert not result["loaded"]
    assert result["reason"] == "HF_FUSE_DISABLE names cpu."
    assert "'cpu' was asked for" in result["asked_for"]
    assert list(tmp_path.iterdir()) == []


def test_two_processes_build_once_past_what_a_dead_builder_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"HF_FUSE_CACHE": tmp_path, "HF_FUSE_CXX_FLAGS": "-O0"}  # quick to build
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    plan = jit.plan("cpu")
    plan.folder.mkdir(parents=True)
    # What a killed builder leaves: cpp_extension's own lock, and half a library.
    (plan.folder / "lock").touch()
    plan.library.write_bytes(b"\x7fELF")
    processes = [start(BUILD, **environment) for _ in range(2)]
    results = [outcome(p) for p in processes]
    assert [r["loaded"] for r in results] == [True, True]
    assert [r["ran"] for r in results] == [True, True]
    assert sorted(r["compiled"] for r in results) == [[], ["cpu"]]
    assert [r["warnings"] for r in results] == [[], []]
    assert plan.is_done


def test_key_names_all_that_the_binary_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(jit.SOURCES, tmp_path / "csrc"))
    monkeypatch.setattr(jit, "SOURCES", copy)
    monkeypatch.delenv("HF_FUSE_CXX_FLAGS", raising=False)
    keys = [jit.plan("cpu").key]
    assert jit.plan("cpu").key == keys[0]

    monkeypatch.setenv("HF_FUSE_CXX_FLAGS", "-O1")
    keys.append(jit.plan("cpu").key)
    monkeypatch.setattr(jit, "CXX_FLAGS", (*jit.CXX_FLAGS, "-g"))
    keys.append(jit.plan("cpu").key)
    for changed in (copy / "cpu" / "rotary.cpp", copy / "include" / "cpu.h"):
        changed.write_text(changed.read_text() + "\n")
        keys.append(jit.plan("cpu").key)
    monkeypatch.setenv("CXX", str(program(tmp_path / "g++", "echo another compiler")))
    keys.append(jit.plan("cpu").key)
    monkeypatch.setattr(torch, "__version__", "2.99")
    keys.append(jit.plan("cpu").key)
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: "another python")
    keys.append(jit.plan("cpu").key)
    assert len(set(keys)) == len(keys)


def test_without_pythons_headers_calls_go_through_the_dispatcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_headers = jit.plan("cpu")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    without = jit.plan("cpu")
    assert set(with_headers.sources) - set(without.sources) == {jit.SOURCES / "direct.cpp"}
    assert with_headers.key != without.key
    lines = {check.name: check.detail for check in jit.doctor(build=False)}
    assert lines["python headers"].startswith("not found")


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_FUSE_CACHE", str(tmp_path / "mine"))
    assert jit.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("HF_FUSE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert jit.cache_folder() == tmp_path / "xdg" / "hf_fuse"


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend must be 'cpu' or 'cuda', got 'tpu'"):
        jit.load("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_plan_says_what_to_install() -> None:
    with pytest.raises(jit.BuildError, match=r"no CUDA device.*Install a CUDA build of torch"):
        jit.plan("cuda")


def test_the_first_call_of_a_process_may_be_compiled() -> None:
    """Loading is not traced, and leaves no guard that it breaks itself."""
    script = """
import json, torch
from hf_fuse.ops import add_norm

x, weight = torch.randn(3, 64), torch.ones(64)

def norm():
    return add_norm(x, weight, eps=1e-5, kind="rms")[1]

compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
print(json.dumps({"same": torch.equal(compiled(), norm())}))
"""
    assert outcome(start(script)) == {"same": True}
