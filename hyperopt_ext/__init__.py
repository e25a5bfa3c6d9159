"""Hyperoptimizer towers for PyTorch at the speed of fused kernels.

import hyperopt_ext as hx
opt = hx.HyperOptimizer(model.parameters(), hx.Adam(lr=1e-3) / hx.SGD(lr=1e-5))
"""

from importlib.util import find_spec
from pathlib import Path

import torch  # the extension module needs its libraries

if find_spec("hyperopt_ext._C") is None:
    raise ImportError(
        f"hyperopt_ext is imported from its sources, {Path(__file__).parent}, where the extension is not built: start "
        "Python in another folder if it is installed, or build it here, by pip install --no-build-isolation -e ."
    )

from hyperopt_ext import compat, extension, functional
from hyperopt_ext.levels import SGD, AdaBelief, Adadelta, Adagrad, Adam, AdamW, AMSGrad, Lion, NAdam, RMSprop
from hyperopt_ext.optimizer import HyperOptimizer
from hyperopt_ext.presets import adam_hd, auto, sgd_hd, sgdn_hd
from hyperopt_ext.recorder import Recorder, summary
from hyperopt_ext.stack import Level, Stack
from hyperopt_ext.wrap import Wrap

del Path, find_spec, torch

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "AMSGrad",
    "AdaBelief",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "HyperOptimizer",
    "Level",
    "Lion",
    "NAdam",
    "RMSprop",
    "Recorder",
    "Stack",
    "Wrap",
    "adam_hd",
    "auto",
    "compat",
    "extension",
    "functional",
    "sgd_hd",
    "sgdn_hd",
    "summary",
]
