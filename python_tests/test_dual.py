"""The dual numbers of csrc/dual.h by themselves: values and slopes, also where a slope is infinite or not defined."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent

# name: value and slope, as functions of x
EXPECTED = {
    "pow0": (lambda x: 1.0, lambda x: 0.0),
    "pow0.5": (math.sqrt, lambda x: 0.5 / math.sqrt(x) if x else 0.0),  # by convention
    "pow1": (lambda x: x, lambda x: 1.0),
    "pow2": (lambda x: x**2, lambda x: 2 * x),
    "pow7": (lambda x: x**7, lambda x: 7 * x**6),
    "exp2": (lambda x: 2**x, lambda x: 2**x * math.log(2)),
    "sqrt": (math.sqrt, lambda x: 0.5 / math.sqrt(x) if x else 0.0),  # by convention
    "max": (lambda x: 0.5 if x < 0.5 else x, lambda x: 0.0 if x < 0.5 else 1.0),  # of equal ones, the first
    "sign": (lambda x: x if math.isnan(x) else (x > 0) - (x < 0), lambda x: 0.0),
    "ratio": (lambda x: (1 - x * x) / (x + 4), lambda x: -(x * x + 8 * x + 1) / (x + 4) ** 2),
}


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    program = tmp_path_factory.mktemp("dual") / "dual"
    source = ROOT / "python_tests" / "dual.cpp"
    compiler = [cpp_extension.get_cxx_compiler(), "-std=c++17", "-I", ROOT / "csrc", source, "-o", program]
    subprocess.run(list(map(str, compiler)), check=True)
    lines = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    return [(name, *map(float, numbers)) for name, *numbers in map(str.split, lines)]


@pytest.mark.parametrize("name", EXPECTED)
def test_values_and_slopes(printed, name):
    rows = [row[1:] for row in printed if row[0] == name]
    assert rows
    value_at, slope_at = EXPECTED[name]
    for x, value, slope, plain in rows:
        assert value == pytest.approx(value_at(x), rel=1e-15, nan_ok=True), x
        assert slope == pytest.approx(slope_at(x), rel=1e-15, nan_ok=True), x
        assert plain == pytest.approx(value, rel=1e-15, nan_ok=True), x
