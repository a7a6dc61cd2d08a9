"""Builds the kernels on the user's machine, once, and loads them. The only place that compiles.

`load("cpu")` and `load("cuda")` return whether that backend's ops are there. The first call on a
machine compiles (seconds), later ones find the library in the cache. A build that fails is
remembered with its reason and its fix, warns once, and leaves the plain-torch reference of every op
in its place.

Environment
    HF_FUSE_CACHE           folder of the built libraries (default: ~/.cache/hf_fuse)
    HF_FUSE_DISABLE         comma-separated backends not to build: "cuda", "cpu" or "cpu,cuda"
    HF_FUSE_HIDDEN_SIZES    hidden sizes to specialise the CUDA norm kernels for, e.g. "768,2560"
    HF_FUSE_CXX_FLAGS       more flags for the C++ compiler, after ours
    HF_FUSE_NVCC_FLAGS      more flags for nvcc, after ours
    HF_FUSE_VERBOSE         "1" shows the compiler's output
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

SOURCES = Path(__file__).resolve().parent.parent / "csrc"
if not (SOURCES / "bindings.cpp").exists():  # installed as a wheel: csrc is a subpackage
    SOURCES = Path(__file__).resolve().parent / "csrc"

DIRECT = "direct.cpp"  # built into the CPU library where Python's headers are

CXX_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fopenmp-simd",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wno-attributes",
)
NVCC_FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden")

# The hidden sizes of the supported model families; a row of these sizes needs no bounds checks.
HIDDEN_SIZES = (768, 1024, 1280, 1600, 2048, 2560, 3072, 4096, 5120, 8192)


class BuildError(RuntimeError):
    """A backend could not be built: `reason` in one line, `fix` in one line."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(f"{reason} {fix}")
        self.reason, self.fix = reason, fix


@dataclass(frozen=True)
class Build:
    """What one backend's library is made of."""

    backend: str
    sources: tuple[Path, ...]
    cflags: tuple[str, ...]
    cuda_flags: tuple[str, ...]
    compilers: tuple[str, ...]
    prelude: str = ""  # included before each CUDA source

    @property
    def key(self) -> str:
        """Names everything the binary depends on, so a stale library is never loaded."""
        digest = hashlib.sha256()
        headers = sorted((SOURCES / "include").iterdir())
        for path in (*self.sources, *headers):
            digest.update(path.name.encode() + path.read_bytes())
        cpu = _cpu_features() if "-march=native" in self.cflags else ""
        python = sysconfig.get_config_var("SOABI") if SOURCES / DIRECT in self.sources else ""
        versions = (self.compilers, torch.__version__, cpu, python)
        for part in (self.cflags, self.cuda_flags, self.prelude, *versions):
            digest.update(repr(part).encode())
        return digest.hexdigest()[:16]

    @property
    def folder(self) -> Path:
        return cache_folder() / f"{self.backend}-{self.key}"

    @property
    def library(self) -> Path:
        return self.folder / f"hf_fuse_{self.backend}.so"

    @property
    def is_done(self) -> bool:
        """Whether the library is whole: the linker may be writing it, or have been killed."""
        return self.library.exists() and self._done.exists()

    def mark_done(self) -> None:
        self._done.touch()

    @property
    def _done(self) -> Path:
        return self.folder / ".done"


failures: dict[str, BuildError] = {}
_loaded: dict[str, bool] = {}

# csrc/direct.cpp as a Python module, once the CPU ops are loaded; None where it could not be built.
direct: Any = None


def cache_folder() -> Path:
    """Where the built libraries live."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hf_fuse"
    return Path(os.environ.get("HF_FUSE_CACHE") or default)


def load(backend: str) -> bool:
    """Build (if needed) and load the ops of `backend`, "cpu" or "cuda". True when they are there.

    A failure is kept in `failures[backend]` and warned of once; it is not tried again in this
    process.
    """
    if backend not in ("cpu", "cuda"):
        raise ValueError(f"hf_fuse.jit.load: backend must be 'cpu' or 'cuda', got {backend!r}")
    if backend not in _loaded:
        try:
            _load(backend)
            _loaded[backend] = True
        except BuildError as error:
            _loaded[backend] = False
            failures[backend] = error
            if backend not in _disabled():
                warnings.warn(
                    f"hf_fuse: the {backend} kernels are not available; the plain torch "
                    f"reference runs instead. "
                    f"{error} (`hf-fuse doctor` says more.)",
                    RuntimeWarning,
                    stacklevel=2,
                )
    return _loaded[backend]


def is_loaded(backend: str) -> bool:
    """Whether the ops of `backend` are there now; builds nothing."""
    return _loaded.get(backend, False)


def _load(backend: str) -> None:
    if backend in _disabled():
        raise BuildError(f"HF_FUSE_DISABLE names {backend}.", "Unset it to build the kernels.")
    if backend == "cuda" and not load("cpu"):  # the CPU library defines the schemas
        raise BuildError("The C++ part could not be built.", failures["cpu"].fix)
    build = plan(backend)
    if not build.is_done:
        with _locked(build.folder):
            if not build.is_done:
                _compile(build)
                build.mark_done()
    torch.ops.load_library(str(build.library))
    if SOURCES / DIRECT in build.sources:
        global direct
        direct = _import(build.library)


def _import(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(library.stem, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plan(backend: str) -> Build:
    """What `load(backend)` would build. Raises BuildError when a tool is missing."""
    extra_cxx = tuple(os.environ.get("HF_FUSE_CXX_FLAGS", "").split())
    bindings = sorted(SOURCES.glob("*bindings.cpp"))
    if backend == "cpu":
        sources = (*bindings, *sorted((SOURCES / "cpu").glob("*.cpp")))
        if _python_headers():
            sources = (SOURCES / DIRECT, *sources)  # first: it takes the longest
        return Build("cpu", sources, CXX_FLAGS + extra_cxx, (), (_version_of(*_cxx()),))
    if not torch.cuda.is_available():
        raise BuildError(
            "torch sees no CUDA device.", "Install a CUDA build of torch and an NVIDIA driver."
        )
    extra_nvcc = tuple(os.environ.get("HF_FUSE_NVCC_FLAGS", "").split())
    sizes = os.environ.get("HF_FUSE_HIDDEN_SIZES") or ",".join(map(str, HIDDEN_SIZES))
    prelude = f"#define HF_FUSE_HIDDEN_SIZES {sizes}\n"  # nvcc splits a -D at its commas
    cuda_flags = (*NVCC_FLAGS, *_gencode(), *extra_nvcc)
    cflags = (*CXX_FLAGS, "-DHF_FUSE_CUDA", "-DUSE_CUDA", *extra_cxx)
    sources = (*bindings, *sorted((SOURCES / "cuda").glob("*.cu")))
    compilers = (_version_of(*_cxx()), _version_of(_nvcc()))
    return Build("cuda", sources, cflags, cuda_flags, compilers, prelude)


def _python_headers() -> bool:
    return Path(sysconfig.get_paths()["include"], "Python.h").exists()


def _gencode() -> tuple[str, ...]:
    """The present GPUs' own architectures; 9.0a on Hopper, for the instructions only it has."""
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    names = sorted(f"{major}{minor}{'a' if major == 9 else ''}" for major, minor in capabilities)
    return tuple(f"-gencode=arch=compute_{n},code=sm_{n}" for n in names)


def _compile(build: Build) -> None:
    from torch.utils import cpp_extension

    if shutil.which("ninja") is None:
        _add_own_scripts_to_path()
    if shutil.which("ninja") is None:
        raise BuildError("ninja was not found.", "Install it: pip install ninja.")
    with_cuda = build.backend == "cuda"
    cuda_flags = list(build.cuda_flags)
    if build.prelude:
        (build.folder / "prelude.h").write_text(build.prelude)
        cuda_flags += ["-include", str(build.folder / "prelude.h")]
    try:
        cpp_extension.load(
            name=build.library.stem,
            sources=[str(s) for s in build.sources],
            extra_cflags=list(build.cflags),
            extra_cuda_cflags=cuda_flags,
            extra_include_paths=[str(SOURCES / "include")],
            build_directory=str(build.folder),
            with_cuda=with_cuda,
            is_python_module=False,
            verbose=os.environ.get("HF_FUSE_VERBOSE") == "1",
        )
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        build.library.unlink(missing_ok=True)
        raise BuildError(
            f"Compiling the {build.backend} kernels failed: {_first_error(str(error))}",
            "Set HF_FUSE_VERBOSE=1 to see the compiler's output.",
        ) from error


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next(
        (line for line in lines if "error" in line.lower() and "Error building" not in line),
        lines[0] if lines else "no output",
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One builder at a time. The lock is the kernel's, so it goes with a builder that is killed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".build-lock").open("w")
    except OSError as error:
        raise BuildError(
            f"The cache folder {folder} cannot be written: {error.strerror}.",
            "Set HF_FUSE_CACHE to a folder that can.",
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        # cpp_extension's own lock file outlives a killed builder and would be waited for without
        # end.
        (folder / "lock").unlink(missing_ok=True)
        yield


def _disabled() -> set[str]:
    return {
        name.strip() for name in os.environ.get("HF_FUSE_DISABLE", "").split(",") if name.strip()
    }


def _cxx() -> tuple[str, ...]:
    command = os.environ.get("CXX", "c++").split()
    if shutil.which(command[0]) is None:
        raise BuildError(
            f"The C++ compiler {command[0]!r} was not found.",
            "Install g++ (Debian, Ubuntu: apt-get install g++), or set CXX.",
        )
    return tuple(command)


def _nvcc() -> str:
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = Path(CUDA_HOME or "/usr/local/cuda") / "bin" / "nvcc"
    found = str(nvcc) if nvcc.exists() else shutil.which("nvcc")
    if found is None:
        raise BuildError(
            "nvcc was not found.",
            f"Install the CUDA toolkit {torch.version.cuda}, or set CUDA_HOME to it.",
        )
    return found


def _version_of(*command: str) -> str:
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(
            f"{command[0]} --version failed: {error}.", "Check the compiler's installation."
        ) from error
    return done.stdout.strip().replace("\n", " ")


@functools.cache
def _cpu_features() -> str:
    """What -march=native means here; a cache shared between machines must not mix them up."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()}"


def _add_own_scripts_to_path() -> None:
    """A Python started by its full path has its ninja beside it, not on PATH."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


@dataclass(frozen=True)
class Check:
    """One line of `hf-fuse doctor`."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def doctor(build: bool = True) -> list[Check]:
    """What is on this machine, what is missing, and how to mend it. With `build`, builds what can
    be built.
    """
    checks = [
        Check("python", True, platform.python_version()),
        Check("torch", True, torch.__version__),
    ]
    checks.append(_tool("c++ compiler", lambda: _version_of(*_cxx()).split(" Copyright")[0]))
    checks.append(_tool("ninja", _ninja_version))
    if torch.cuda.is_available():
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        checks.append(
            Check("gpu", True, f"{name}, compute capability {capability[0]}.{capability[1]}")
        )
        checks.append(_tool("nvcc", lambda: _version_of(_nvcc()).rsplit("Build ", 1)[-1]))
    else:
        checks.append(Check("gpu", True, "none that torch sees: the CPU kernels are used"))
    headers = "found" if _python_headers() else "not found: a call on CPU costs some 5 µs more"
    checks.append(Check("python headers", True, headers))
    folder = cache_folder()
    writable = os.access(
        folder if folder.exists() else next(p for p in folder.parents if p.exists()), os.W_OK
    )
    checks.append(
        Check(
            "cache folder",
            writable,
            str(folder),
            "" if writable else "Set HF_FUSE_CACHE to a folder that can be written.",
        )
    )
    backends = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    checks.extend(_built(backend, build) for backend in backends)
    return checks


def _built(backend: str, build: bool) -> Check:
    if not build:
        try:
            there = plan(backend).is_done
        except BuildError as error:
            return Check(f"{backend} kernels", False, error.reason, error.fix)
        return Check(
            f"{backend} kernels",
            True,
            "built" if there else "not built yet; the first patch builds them",
        )
    if load(backend):
        return Check(f"{backend} kernels", True, f"built: {plan(backend).library.parent.name}")
    return Check(f"{backend} kernels", False, failures[backend].reason, failures[backend].fix)


def _tool(name: str, probe: Callable[[], str]) -> Check:
    try:
        return Check(name, True, probe())
    except BuildError as error:
        return Check(name, False, error.reason, error.fix)


def _ninja_version() -> str:
    if shutil.which("ninja") is None:
        _add_own_scripts_to_path()
    if shutil.which("ninja") is None:
        raise BuildError("ninja was not found.", "Install it: pip install ninja.")
    return _version_of("ninja")
