"""The CUDA kernels on the host: the library's block code, compiled by a C++ compiler and run thread by thread.

``load()`` builds it once (``build/emulation``) and defines ``torch.ops.hyperopt_ext_emulated``; ``emulated()`` makes
the optimizer and the functional form use it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch.utils import cpp_extension

from hyperopt_ext import _C, _build
from hyperopt_ext.stack import Stack

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FLAGS = ["-O1", "-g0", "-fno-math-errno", "-fvisibility=hidden", "-Wno-unused", "-DHX_EMULATE_CUDA"]


@functools.cache
def load() -> ctypes.CDLL:
    folder = ROOT / "build" / "emulation"
    rules = [(header.stem, f"rules/{header.name}") for header in sorted(CSRC.glob("rules/*.h"))]
    _build.built_in_rules(folder, rules)
    digest = f'#define HX_HEADERS "{_build.digest(CSRC)}"\n'
    units = {f"{stem}.cpp": f'#include "cuda/register.cuh"\n#include "{header}"\n' for stem, header in rules}
    units |= {f"{name}_cu.cpp": f'#include "cuda/{name}.cu"\n' for name in ("vectors", "tower")}
    units["emulation.cpp"] = f'{digest}#include "{ROOT}/python_tests/emulation.cpp"\n'
    sources = [_build.write(folder / name, text) for name, text in units.items()]
    sources += [CSRC / name for name in ("ops.cpp", "pass.cpp", "tower.cpp", "cuda/passes.cpp")]
    cpp_extension.load(
        "hyperopt_ext_emulated",
        [str(source) for source in sources],
        extra_include_paths=[str(CSRC), str(folder)],
        extra_cflags=FLAGS,
        build_directory=str(folder),
        is_python_module=False,
    )
    library = ctypes.CDLL(str(folder / "hyperopt_ext_emulated.so"))
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
def emulated(foreign: Collection[str] = (), order: int = 0) -> Iterator[None]:
    """Operators are those of the emulation; the tower is treated as if the rules in `foreign` were not built in.

    `order` is that of blocks and threads: 0 by number, 1 the reverse, 2 random.
    """
    library = load()

    def place(name: str, _: int) -> int:
        return -1 if name in foreign else library.emulated_built_in(name.encode())

    with (
        mock.patch.object(torch.ops, "hyperopt_ext", torch.ops.hyperopt_ext_emulated),
        replaced_places(place),
    ):
        library.emulate_order(order)
        try:
            yield
        finally:
            library.emulate_order(0)
