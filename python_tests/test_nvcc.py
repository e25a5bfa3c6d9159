"""Every CUDA source compiles for the GPUs that the library is made for, without a spilled register."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from hyperopt_ext import _build

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FOLDER = ROOT / "build" / "nvcc"
ARCHITECTURES = (80, 90)

RULES = [(header.stem, f"rules/{header.name}") for header in sorted(CSRC.glob("rules/*.h"))]
UNITS = {
    **{path.stem: path.read_text() for path in sorted(CSRC.glob("cuda/*.cu"))},
    **{stem: f'#include "cuda/register.cuh"\n#include "{header}"\n' for stem, header in RULES},
}


def compile_unit(name: str) -> str:
    """What nvcc says; kept, so that a unit is compiled again only after a change."""
    log = FOLDER / f"{name}-{_build.digest(CSRC)}.log"
    if not log.exists():
        _build.built_in_rules(FOLDER, RULES)
        source = _build.write(FOLDER / f"{name}.cu", UNITS[name])
        targets = [flag for sm in ARCHITECTURES for flag in ("-gencode", f"arch=compute_{sm},code=sm_{sm}")]
        folders = [CSRC, CSRC / "cuda", FOLDER, *cpp_extension.include_paths()]
        command = [
            "nvcc",
            "-c",
            source,
            "-o",
            FOLDER / f"{name}.o",
            *_build.NVCC_FLAGS,
            *cpp_extension.COMMON_NVCC_FLAGS,
        ]
        command += [
            "-std=c++17",
            "-Xcompiler",
            "-fPIC",
            "-Xptxas",
            "-v",
            "--threads",
            str(len(ARCHITECTURES)),
            *targets,
        ]
        command += ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", *(f"-I{folder}" for folder in folders)]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        log.write_text(result.stderr + result.stdout)
    return log.read_text()


@pytest.mark.nvcc
@pytest.mark.parametrize("name", UNITS)
def test_a_unit_compiles_without_spills(name):
    report = compile_unit(name)
    assert "warning" not in report
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", report)
    assert {int(sm) for _, sm in kernels} == set(ARCHITECTURES)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) >= len(kernels)
    assert {n for pair in spills for n in map(int, pair)} == {0}
