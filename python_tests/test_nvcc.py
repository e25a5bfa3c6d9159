"""Every CUDA source compiles for the GPUs that the library is made for, without a spilled register.

What it becomes is run in ``test_device.py``.
"""

from __future__ import annotations

import re
import subprocess

import pytest
from emulation import CSRC, RULES, UNITS, compiled
from torch.utils import cpp_extension

from hyperopt_ext import _build


@pytest.mark.nvcc
@pytest.mark.parametrize("name", UNITS)
def test_a_unit_compiles_without_spills(name):
    report, _ = compiled(name)
    assert "warning" not in report
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", report)
    assert {int(sm) for _, sm in kernels} == {80, 90}
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) >= len(kernels)
    assert {n for pair in spills for n in map(int, pair)} == {0}


@pytest.mark.nvcc
def test_a_function_that_is_not_for_devices_is_an_error(tmp_path):
    """nvcc would drop the calls with a warning, and the kernels would do something else."""
    text = (CSRC / "rules" / "sgd.h").read_text().replace("HX_FN static auto change", "static auto change")
    header = tmp_path / "host.h"
    header.write_text(text.replace("../rule.h", "rule.h").replace("HX_REGISTER_RULE(MomentumSGD", "// "))
    (tmp_path / "host.cu").write_text('#include "cuda/register.cuh"\n#include "host.h"\n')
    folders = [f"-I{folder}" for folder in (CSRC, tmp_path, *cpp_extension.include_paths())]
    command = ["nvcc", "host.cu", "-ptx", *_build.NVCC_FLAGS, "-std=c++17", "-arch=sm_90", *folders]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert re.search(r"error.*calling a __host__ function.*is not allowed", result.stdout + result.stderr)


@pytest.mark.nvcc
@pytest.mark.parametrize("name", [name for name, _ in RULES])
def test_updates_read_and_write_16_bytes_at_a_time(name):
    """All but the ragged ends: nvcc has been seen to make four stores of one."""
    updates = [kernel for kernel in compiled(name)[1].split(".entry ")[1:] if "Update" in kernel.partition("(")[0]]
    assert updates
    for kernel in updates:
        widths = {kind: len(re.findall(rf"{kind}\.global(?:\.cg)?\.v[24]\.", kernel)) for kind in ("ld", "st")}
        # Each loop over elements has a whole run, and four elements of a ragged one.
        scalars = len(re.findall(r"st\.global\.(?:f32|f64|u16)", kernel))
        assert widths["ld"] > 0
        assert widths["st"] * 4 >= scalars, kernel.partition("(")[0]
