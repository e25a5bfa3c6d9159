"""Small training problems, and what "equal" means: those that an extension's author has, too."""

from hyperopt_ext.testing.problems import Regression, assert_same, float64_by_default, relative_error

__all__ = ["Regression", "assert_same", "float64_by_default", "relative_error"]
