"""The CUDA kernels on the host, run thread by thread: their block code, or the PTX that nvcc makes of it.

``load("emulated")`` compiles the block code with a C++ compiler, ``load("ptx")`` what ``ptx.py`` makes of the PTX;
each is built once (``build/emulated``, ``build/ptx``) and defines operators, as ``torch.ops.hyperopt_ext_ptx``.
``emulated()`` makes the optimizer and the functional form use them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import subprocess
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from filelock import FileLock
from ptx import translate
from torch.utils import cpp_extension

from hyperopt_ext import _C, _build
from hyperopt_ext.stack import Stack

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FLAGS = ["-O1", "-g0", "-fno-math-errno", "-fvisibility=hidden", "-Wno-unused", "-DHX_EMULATE_CUDA"]
# The machine's arithmetic is that of the PTX then: integers wrap, and a product is added exactly where it says so.
PTX_FLAGS = [*FLAGS, "-DHX_RUN_PTX", "-w", "-fwrapv", "-ffp-contract=off", "-fno-strict-aliasing"]
RULES = [(header.stem, f"rules/{header.name}") for header in sorted(CSRC.glob("rules/*.h"))]
# Sources for nvcc, by name.
UNITS = {stem: f'#include "cuda/register.cuh"\n#include "{header}"\n' for stem, header in RULES}
UNITS |= {path.stem: f'#include "cuda/{path.name}"\n' for path in sorted(CSRC.glob("cuda/*.cu"))}


def compiled(name: str) -> tuple[str, str]:
    """A unit compiled by nvcc for sm_80 and sm_90: what it says, and the PTX; kept until something changes."""
    folder = ROOT / "build" / "nvcc"
    log, ptx = (folder / f"{name}-{_build.digest(CSRC)}.{end}" for end in ("log", "ptx"))
    _build.built_in_rules(folder, RULES)
    with FileLock(folder / f"{name}.lock"):
        if not log.exists():
            source = _build.write(folder / f"{name}.cu", UNITS[name])
            folders = [CSRC, CSRC / "cuda", folder, *cpp_extension.include_paths()]
            with TemporaryDirectory(dir=folder) as kept:
                command = ["nvcc", source, *_build.NVCC_FLAGS, *cpp_extension.COMMON_NVCC_FLAGS, "-std=c++17"]
                command += ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", *(f"-I{folder}" for folder in folders)]
                command += ["-gencode=arch=compute_80,code=[sm_80,sm_90]", "-Xptxas", "-v", "--threads", "2"]
                command += ["-fatbin", "-o", f"{kept}/{name}.fatbin", "--keep", "--keep-dir", kept]
                result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
                assert result.returncode == 0, result.stderr
                [text] = Path(kept).glob("*.ptx")
                text.rename(ptx)
            log.write_text(result.stderr + result.stdout)
    return log.read_text(), ptx.read_text()


@functools.cache
def load(kind: str) -> ctypes.CDLL:
    folder = ROOT / "build" / kind
    _build.built_in_rules(folder, RULES)
    units = {f"{name}_cu.cpp": text for name, text in UNITS.items()}
    if kind == "ptx":
        units["ptx.cpp"], code = translate(compiled(name)[1] for name in UNITS)
    host = [CSRC / name for name in ("ops.cpp", "pass.cpp", "tower.cpp", "cuda/passes.cpp")]
    content = hashlib.sha256(b"".join(source.read_bytes() for source in host)).hexdigest()
    defines = f'#define HX_HEADERS "{_build.digest(CSRC)}"\n#define HX_KIND "{kind}"\n'
    units["emulation.cpp"] = f'{defines}#include "{ROOT}/python_tests/emulation.cpp"  // linked with {content}\n'
    linked: list[str] = []
    if kind != "emulated":  # what is not of the kernels is compiled once
        load("emulated")
        linked = [str(ROOT / "build" / "emulated" / f"{source.stem}.o") for source in host]
        host = []
    sources = [_build.write(folder / name, text) for name, text in units.items()]
    cpp_extension.load(
        f"hyperopt_ext_{kind}",
        [str(source) for source in sources + host],
        extra_include_paths=[str(CSRC), str(folder), str(ROOT / "python_tests")],
        extra_cflags=PTX_FLAGS if kind == "ptx" else FLAGS,
        extra_ldflags=linked,
        build_directory=str(folder),
        is_python_module=False,
    )
    library = ctypes.CDLL(str(folder / f"hyperopt_ext_{kind}.so"))
    if kind == "ptx":
        library.load_code.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        library.load_code(*code.buffer_info())
    library.emulate.argtypes = [ctypes.c_void_p]
    library.emulated_built_in.argtypes = [ctypes.c_char_p]
    library.emulate(_C.library())
    return library


@contextlib.contextmanager
def replaced_places(place_of: Callable[[str, int], int]) -> Iterator[None]:
    """place_of(name, place) is the place of a rule among those that the tower is compiled with; -1: it is none."""
    plan_of = Stack.plan
    width, rule, built_in = len(_C.PLAN), _C.PLAN.index("rule"), _C.PLAN.index("built_in")
    names = [info["name"] for info in _C.rules()]

    def plan(stack: Stack) -> list[int]:
        plan = plan_of(stack)
        for start in range(0, len(plan), width):
            plan[start + built_in] = place_of(names[plan[start + rule]], plan[start + built_in])
        return plan

    with mock.patch.object(Stack, "plan", plan):
        yield


@contextlib.contextmanager
def emulated(foreign: Collection[str] = (), order: int = 0, kind: str = "emulated") -> Iterator[None]:
    """Operators are those of the emulation; the tower is treated as if the rules in `foreign` were not built in.

    `order` is that of blocks and threads: 0 by number, 1 the reverse, 2 random.
    """
    library = load(kind)

    def place(name: str, _: int) -> int:
        return -1 if name in foreign else library.emulated_built_in(name.encode())

    with (
        mock.patch.object(torch.ops, "hyperopt_ext", getattr(torch.ops, f"hyperopt_ext_{kind}")),
        replaced_places(place),
    ):
        library.emulate_order(order)
        try:
            yield
        finally:
            library.emulate_order(0)
