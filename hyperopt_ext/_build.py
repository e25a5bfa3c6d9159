"""How a library of rules is compiled: what setup.py and :mod:`hyperopt_ext.extension` have in common.

Does not import ``hyperopt_ext``, which setup.py has yet to build.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

# Apple's compiler knows no OpenMP: torch's loops are serial there.
OPENMP_FLAGS = [] if sys.platform == "darwin" else ["-fopenmp"]
CXX_FLAGS = [
    "-O3",
    "-g0",
    *OPENMP_FLAGS,
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",  # torch's headers
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fassociative-math",
    "-fno-signed-zeros",
]
# A host function that a kernel calls is dropped with a warning else.
NVCC_FLAGS = ["-O3", "--expt-relaxed-constexpr", "-Werror", "cross-execution-space-call"]
NVCC_FLAGS += ["-Xcompiler", "-fvisibility=hidden"]
# What CUDA kernels are compiled for where there is no GPU and TORCH_CUDA_ARCH_LIST names none: sm_80, sm_90 and later.
ARCHITECTURE_FLAGS = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",
]

# What HX_REGISTER_RULE means in a unit, and the end of the unit's name.
_CPU = ("cpu/register.h", "_cpu.cpp")
_CUDA = ("cuda/register.cuh", "_cuda.cu")


def with_cuda() -> bool:
    """Whether kernels for CUDA are compiled: if torch has CUDA and there is a toolkit, GPU or not."""
    return bool(torch.version.cuda) and (cpp_extension.CUDA_HOME is not None or os.environ.get("FORCE_CUDA") == "1")


def nvcc_flags() -> list[str]:
    """Torch itself adds the architectures of TORCH_CUDA_ARCH_LIST, or else of the GPUs that it finds."""
    chosen = torch.cuda.is_available() or "TORCH_CUDA_ARCH_LIST" in os.environ
    return NVCC_FLAGS if chosen else NVCC_FLAGS + ARCHITECTURE_FLAGS


def headers(include: Path) -> list[Path]:
    """The headers that a rule is compiled with, under the folder that a rule includes them from."""
    return sorted(p for p in include.rglob("*") if p.suffix in (".h", ".cuh") and p.parent.name != "rules")


def digest(include: Path) -> str:
    """A digest of the headers, the same for the source tree and for an installed package."""
    content = hashlib.sha256()
    for path in headers(include):
        content.update(path.relative_to(include).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()[:16]


def write(path: Path, text: str) -> Path:
    """Writes a file, or leaves it alone if that is what it holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def units(folder: Path, include: Path, rules: Iterable[tuple[str, str]]) -> list[Path]:
    """Writes the translation units of a library of rules.

    Args:
        folder: where they are written to.
        include: the folder of the library's own headers.
        rules: for each header of rules, the stem of its units' names and how a unit includes it.
    """
    registers = [_CPU]
    if with_cuda():
        registers.append(_CUDA)
    text = f'#define HX_HEADERS "{digest(include)}"\n#include "library.h"\n'
    return [
        write(folder / "library.cpp", text),
        *(
            write(folder / (stem + suffix), f'#include "{register}"\n#include "{header}"\n')
            for register, suffix in registers
            for stem, header in rules
        ),
    ]


def built_in_rules(folder: Path, rules: Iterable[tuple[str, str]]) -> Path:
    """Writes the header that names all rules of the library: the CUDA tower is compiled with them."""
    return write(folder / "built_in_rules.h", "".join(f'#include "{header}"\n' for _, header in rules))


def missing_compiler() -> str | None:
    """What to do about a compiler that is not there."""
    compiler = cpp_extension.get_cxx_compiler()  # type: ignore[no-untyped-call]
    if shutil.which(shlex.split(compiler)[0]) is not None:
        return None
    return (
        f"rules are compiled by a C++17 compiler, and there is no '{compiler}' here. Install one (on Debian: apt-get "
        "install g++) or name yours in CXX"
    )


def extension(name: str, sources: Iterable[Path], include: Iterable[Path], **arguments: Any) -> Any:
    """The sources as an extension for ``setup()``, with CUDA if there are kernels for it among them."""
    files = [str(source) for source in sources]
    cuda = any(file.endswith(".cu") for file in files)
    kind: Any = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    return kind(
        name,
        files,
        include_dirs=[str(folder) for folder in include],
        define_macros=[("HX_WITH_CUDA", None)] if cuda else [],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": nvcc_flags()},
        extra_link_args=OPENMP_FLAGS,
        **arguments,
    )
