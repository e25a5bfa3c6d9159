"""Builds hyperopt_ext._C: the kernels of every rule in csrc/rules, CPU only or CPU and CUDA."""

import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

from setuptools import setup
from setuptools.command.build_py import build_py

INSTALL = "pip install --no-build-isolation ."

try:
    from torch.utils import cpp_extension
except ImportError:
    sys.exit(
        "hyperopt_ext is compiled against the torch that it will run with, and this build sees none (by default, pip "
        f"builds in an environment of its own). Install torch first, then type: {INSTALL}"
    )

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
build = SimpleNamespace(**runpy.run_path(str(ROOT / "hyperopt_ext" / "_build.py")))


def extension():
    rules = [(header.stem, f"rules/{header.name}") for header in sorted(CSRC.glob("rules/*.h"))]
    generated = ROOT / "build" / "rules"
    sources = [*sorted(CSRC.glob("*.cpp")), *sorted(CSRC.glob("cpu/*.cpp")), *build.units(generated, CSRC, rules)]
    if build.with_cuda():
        sources += [*sorted(CSRC.glob("cuda/*.cpp")), *sorted(CSRC.glob("cuda/*.cu"))]
        build.built_in_rules(generated, rules)
    return build.extension(
        "hyperopt_ext._C",
        [source.relative_to(ROOT) for source in sources],
        [CSRC, generated],
        depends=[str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*.*"))],  # an sdist holds what this names
    )


class BuildExtension(cpp_extension.BuildExtension):
    def build_extensions(self):
        if missing := build.missing_compiler():
            sys.exit(f"{missing}, then type: {INSTALL}")
        super().build_extensions()


class BuildPy(build_py):
    """Adds the headers that rules outside this repository are compiled with."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for header in build.headers(CSRC):
                target = Path(self.build_lib, "hyperopt_ext", "include", header.relative_to(CSRC))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(header, target)


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension, "build_py": BuildPy})
