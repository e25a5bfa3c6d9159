"""Builds hyperopt_ext._C: the kernels of every rule in csrc/rules, CPU only or CPU and CUDA."""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

INSTALL = "pip install --no-build-isolation ."

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit(
        "hyperopt_ext is compiled against the torch that it will run with, and this build sees none (by default, pip "
        f"builds in an environment of its own). Install torch first, then type: {INSTALL}"
    )

ROOT = Path(__file__).resolve().parent
GENERATED = ROOT / "build" / "rules"
FLAGS = [
    "-O3",
    "-g0",
    "-fopenmp",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",  # torch's headers
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fassociative-math",
    "-fno-signed-zeros",
]
WITH_CUDA = bool(torch.version.cuda) and (cpp_extension.CUDA_HOME is not None or os.environ.get("FORCE_CUDA") == "1")


def relative(path):
    return str(path.relative_to(ROOT))


def rule_sources(register, suffix):
    """One translation unit for each rule: `register` says what HX_REGISTER_RULE means in it."""
    GENERATED.mkdir(parents=True, exist_ok=True)
    for header in sorted((ROOT / "csrc" / "rules").glob("*.h")):
        source = GENERATED / (header.stem + suffix)
        text = f'#include "{register}"\n#include "rules/{header.name}"\n'
        if not source.exists() or source.read_text() != text:
            source.write_text(text)
        yield relative(source)


def extension():
    sources = [*map(relative, sorted(ROOT.glob("csrc/*.cpp")) + sorted(ROOT.glob("csrc/cpu/*.cpp")))]
    sources += rule_sources("cpu/register.h", "_cpu.cpp")
    cuda = sorted(ROOT.glob("csrc/cuda/*.cu"))
    if not (WITH_CUDA and cuda):
        return cpp_extension.CppExtension(
            "hyperopt_ext._C",
            sources,
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp"],
        )
    sources += [*map(relative, cuda), *rule_sources("cuda/register.cuh", "_cuda.cu")]
    return cpp_extension.CUDAExtension(
        "hyperopt_ext._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": FLAGS, "nvcc": ["-O3", "--expt-relaxed-constexpr"]},
        extra_link_args=["-fopenmp"],
    )


class Build(cpp_extension.BuildExtension):
    def build_extensions(self):
        compiler = cpp_extension.get_cxx_compiler()
        if shutil.which(compiler) is None:
            sys.exit(
                f"hyperopt_ext is built by a C++17 compiler, and there is no '{compiler}' here. Install one "
                f"(on Debian: apt-get install g++) or name yours in CXX, then type: {INSTALL}"
            )
        super().build_extensions()


setup(ext_modules=[extension()], cmdclass={"build_ext": Build})
