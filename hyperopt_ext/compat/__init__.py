"""Presets with the conventions of other packages."""

from hyperopt_ext.compat import gdtuo

__all__ = ["gdtuo"]
