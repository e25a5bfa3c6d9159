"""Every CUDA source compiles for the GPUs that the library is made for, whole and without a spilled register."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from torch.utils import cpp_extension

from hyperopt_ext import _build

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FOLDER = ROOT / "build" / "nvcc"
ARCHITECTURES = (80, 90)
# A NaN, which is what the compiler makes of a number that nobody wrote; shared memory; stores of 16 bytes.
PTX = ("0f7FC00000", "0fFFC00000", "st.shared", "ld.shared", "st.global.cg.v4")

RULES = [(header.stem, f"rules/{header.name}") for header in sorted(CSRC.glob("rules/*.h"))]
UNITS = {
    **{path.stem: path.read_text() for path in sorted(CSRC.glob("cuda/*.cu"))},
    **{stem: f'#include "cuda/register.cuh"\n#include "{header}"\n' for stem, header in RULES},
}


def compile_unit(name: str) -> dict[str, Any]:
    """What nvcc says, and what became of each kernel; kept, so that a unit is compiled again only after a change."""
    kept = FOLDER / f"{name}-{_build.digest(CSRC)}.json"
    if not kept.exists():
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
        with TemporaryDirectory(dir=FOLDER) as intermediate:
            command += ["--keep", "--keep-dir", intermediate]
            result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr
            [ptx] = Path(intermediate).glob(f"*compute_{ARCHITECTURES[-1]}*.ptx")
            code = {entry[: entry.index("(")]: entry for entry in ptx.read_text().split(".entry ")[1:]}
        kept.write_text(
            json.dumps(
                {
                    "report": result.stderr + result.stdout,
                    "counts": {kernel: {what: text.count(what) for what in PTX} for kernel, text in code.items()},
                }
            )
        )
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


@pytest.mark.nvcc
@pytest.mark.parametrize("name", UNITS)
def test_a_unit_compiles_without_spills(name):
    report = compile_unit(name)["report"]
    assert "warning" not in report
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", report)
    assert {int(sm) for _, sm in kernels} == set(ARCHITECTURES)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) >= len(kernels)
    assert {n for pair in spills for n in map(int, pair)} == {0}


@pytest.mark.nvcc
@pytest.mark.parametrize("name", [name for name, _ in RULES])
def test_the_kernels_of_a_rule_hold_what_it_says(name):
    """nvcc leaves calls of host functions out of device code without a word; then a step is prepared by nobody."""
    for kernel, count in compile_unit(name)["counts"].items():
        assert count["0f7FC00000"] == count["0fFFC00000"] == 0, kernel
        if "Update" in kernel:
            assert all(count[what] > 0 for what in ("st.shared", "ld.shared", "st.global.cg.v4")), kernel
