"""Rules from outside this repository: an optimizer of your own in one C++ header.

``csrc/rule.h`` says what a rule is. From it come the kernels, the hypergradients, the tower, autograd and
torch.compile, as for the rules that are built in::

    Adamax = hx.extension.load_rule("adamax.h")              # compiled once, then cached
    opt = hx.HyperOptimizer(model.parameters(), Adamax(lr=2e-3) / hx.SGD(lr=1e-5))
    step = hx.functional.of(Adamax)                          # one step as a function

:func:`hyperopt_ext.testing.check_rule` puts it through the tests of the built-in ones. A package that ships rules
compiles them in its setup.py (:func:`rule_extension`) and loads them where it is imported (:func:`load_rules`).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import keyword
import os
import re
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import fields, make_dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from hyperopt_ext import _C
from hyperopt_ext.levels import Betas
from hyperopt_ext.stack import RULES, Level

__all__ = ["Betas", "build_rules", "include_path", "level_class", "load_rule", "load_rules", "rule_extension"]

# Of a param group: what a hyperparameter cannot be called.
_TAKEN = ("params", "param_names", "stack", "tower", "maximize", "nonfinite", "betas", "initial_lr", "optimizer")
# What to add to a compiler's own words about a rule.
_HINT = "(a rule is made of + - * /, sqrt, pow, max, sign, where and constant, as the head of rule.h says)"


def include_path() -> Path:
    """The folder that a rule finds ``rule.h`` in."""
    package = Path(__file__).resolve().parent
    installed = package / "include"
    return installed if installed.exists() else package.parent / "csrc"


def load_rule(header: str | os.PathLike[str], *, verbose: bool = False) -> type[Any]:
    """Compiles the rule in a header, loads it, and makes its class of levels (:func:`level_class`).

    The first call takes some 15 seconds and needs a C++17 compiler and ninja; later ones, in any process, find what it
    built, unless the header has changed, or one that it includes in quotes.

    Args:
        header: the path of a C++ header that registers one rule.
        verbose: shows what the compiler is told, and all that it says. Default: False.

    Raises:
        FileNotFoundError: there is no such header.
        RuntimeError: it does not compile: the message says what is missing, or where the error is.
        ValueError: the rule's name is taken, or there are several rules in the header.
    """
    names = load_rules(build_rules([header], verbose=verbose))
    if len(names) != 1:
        if not names:
            raise ValueError(f"{header} registers no rule; is there an HX_REGISTER_RULE(...) in it?")
        raise ValueError(
            f"{header} registers {len(names)} rules: {', '.join(names)}; load_rule() is for one. "
            "Load several with load_rules(build_rules([...])), and make their classes with level_class(), or write one "
            "whose rule_for() chooses between them"
        )
    return level_class(names[0])


def build_rules(
    headers: Sequence[str | os.PathLike[str]],
    *,
    build_directory: str | os.PathLike[str] | None = None,
    verbose: bool = False,
) -> Path:
    """Compiles headers of rules to one shared library, unless that was done before, and returns its path.

    Args:
        headers: the paths of the headers; each may register several rules.
        build_directory: where to build. Default: a folder of this library in that of torch's extensions,
            ``TORCH_EXTENSIONS_DIR`` or ``~/.cache/torch_extensions``.
        verbose: as in :func:`load_rule`.

    Raises:
        FileNotFoundError: a header does not exist.
        RuntimeError: they do not compile, or the folder cannot be written to.
    """
    from torch.utils import cpp_extension

    from hyperopt_ext import _build

    paths = [path.resolve() for path in _paths(headers)]
    if missing := _build.missing_compiler():
        raise RuntimeError(missing)

    # The name stands for all that is compiled, so that another content is another library.
    include = include_path()
    files = _with_included(paths)
    content = [torch.__version__, _build.digest(include), *map(str, files), *(path.read_text() for path in files)]
    key = hashlib.sha256("\0".join(content).encode()).hexdigest()[:16]
    name = f"{_identifier(paths[0].stem)}_{key}"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    folder = Path(build_directory or Path(root, "hyperopt_ext", name)).resolve()
    library = folder / f"{name}{cpp_extension.LIB_EXT}"
    lock = FileLock(folder / "building")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        if library.is_file():  # built before the folder became read-only, or by another user
            return library
        raise RuntimeError(
            f"{folder} cannot be written to ({error}); set TORCH_EXTENSIONS_DIR to another one"
        ) from None
    try:
        with _ninja_on_path():
            # torch waits until the file "lock" is gone: for ever, if the process that made it was killed. A FileLock
            # ends with its process; while this one holds it, nobody else builds here.
            (folder / "lock").unlink(missing_ok=True)
            cpp_extension.load(
                name,
                [str(source) for source in _build.units(folder, include, _includes(paths))],
                extra_cflags=[*_build.CXX_FLAGS],
                extra_cuda_cflags=_build.nvcc_flags(),
                extra_ldflags=[*_build.OPENMP_FLAGS],
                extra_include_paths=[str(include)],
                build_directory=str(folder),
                is_python_module=False,
                verbose=verbose,
            )
    except BaseException as error:
        cpp_extension.JIT_EXTENSION_VERSIONER.entries.pop(name, None)  # else torch takes it for built
        if not isinstance(error, RuntimeError | OSError):
            raise
        names = ", ".join(path.name for path in paths)
        raise RuntimeError(f"{names} does not compile:\n{_errors(str(error))}") from None
    finally:
        lock.release()
    return library


def _paths(headers: Sequence[str | os.PathLike[str]]) -> list[Path]:
    if isinstance(headers, str | os.PathLike):
        raise TypeError(f"headers must be a list of paths, as [{os.fspath(headers)!r}]")
    paths = [Path(header) for header in headers]
    if not paths:
        raise ValueError("headers must name at least one header")
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"there is no header {path.resolve()}")
    return paths


def _with_included(headers: Sequence[Path]) -> list[Path]:
    """The headers, and those that they include from beside them."""
    files = list(headers)
    for path in files:  # which grows meanwhile
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE):
            included = Path(os.path.normpath(path.parent / name))
            if included.is_file() and included not in files:
                files.append(included)
    return files


def _includes(headers: Sequence[Path]) -> list[tuple[str, str]]:
    """The stem of a header's units, and how they include it."""
    return [(f"{_identifier(header.stem)}_{i}", header.resolve().as_posix()) for i, header in enumerate(headers)]


def _identifier(stem: str) -> str:
    """For ninja, which takes no blanks in the names of what it makes."""
    return re.sub(r"\W", "_", stem)


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """The ninja of the running Python counts even if its environment is not activated."""
    before = os.environ["PATH"]
    if shutil.which("ninja") is None:
        os.environ["PATH"] = before + os.pathsep + sysconfig.get_path("scripts")
    try:
        yield
    finally:
        os.environ["PATH"] = before


# g++ names a rule before what is wrong with it, nvcc and clang after that.
_RULE = re.compile(r"\[with R ?= ?(?:\w+::)*([\w<>]+)|Registration<(?:\w+::)+([\w<>]+)>::")
_ERROR = re.compile(r"^(.+?)[:(](\d+)\S* (?:fatal )?error:? (.*)")


def _errors(output: str) -> str:
    """The errors in a compiler's output: what a rule lacks, or what its author is likely to have to correct."""
    missing: list[str] = []
    unnamed: list[str] = []
    others: list[str] = []
    rule = "  "
    for line in output.splitlines():
        if where := _RULE.search(line):
            rule = f"  {where[1] or where[2]}: "
            missing += [rule + message for message in unnamed]
            unnamed = []
        if found := _ERROR.search(line):
            before, ours, message = found[3].partition("hyperopt_ext: ")
            if not ours:
                others.append(f"  {Path(found[1]).name}:{found[2]}: {found[3]}")
            elif before.endswith("failed: "):  # g++
                missing.append(rule + message)
            else:  # in quotes, but for newer clang
                unnamed.append(message.removesuffix('"').replace('\\"', '"'))
    errors = list(dict.fromkeys(others or [*missing, *(f"  {message}" for message in unnamed)]))[:20]
    return "\n".join([*errors, *([f"  {_HINT}"] if others else [])]) or output


def load_rules(library: str | os.PathLike[str]) -> tuple[str, ...]:
    """Loads the rules of a shared library, and returns their names. To load it again does nothing.

    Not while another thread takes a step: load them first.

    Args:
        library: a path, or the dotted name of an extension made by :func:`rule_extension`: what a package that ships
            rules calls where it is imported, ``load_rules("my_package._rules")``.

    Raises:
        FileNotFoundError: there is no such library.
        RuntimeError: it is of other headers than the running hyperopt_ext, and must be built again.
        ValueError: it is no library of rules, or the name of one of them is taken.
    """
    path = Path(library)
    if isinstance(library, str) and re.fullmatch(r"\w+(\.\w+)*", library) and not path.exists():
        try:
            spec = find_spec(library)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{library}.".startswith(f"{error.name}."):
                raise  # the package is there, and lacks something
            spec = None
        if spec is None or spec.origin is None:
            raise FileNotFoundError(f"there is no extension {library}; was its package built?")
        path = Path(spec.origin)
    if not path.is_file():
        raise FileNotFoundError(f"there is no library {path}")
    try:
        handle = ctypes.CDLL(str(path.resolve())).hyperopt_ext_library
    except (OSError, AttributeError) as error:
        raise ValueError(f"{path} is no library of rules: {error}") from None
    handle.restype = ctypes.c_void_p
    try:
        names = _C.add_rules(handle())
    except (RuntimeError, ValueError) as error:
        raise type(error)(f"{path} {error}") from None
    RULES.update((rule["name"], rule) for rule in _C.rules())
    return tuple(names)


@cache
def level_class(rule: str) -> type[Any]:
    """A class of levels for a loaded rule, made of what the rule says of itself.

    Its arguments are the rule's hyperparameters, in the rule's order and with its defaults (``beta1`` and ``beta2`` as
    ``betas``), and those of :class:`hyperopt_ext.Level`. Where a method has variants, or its Python face should have a
    signature to read, write a class as in ``hyperopt_ext/levels.py`` instead; :class:`Betas` is the base of one that
    has betas.

    Raises:
        ValueError: no such rule is loaded, or a hyperparameter has the name of something else.
    """
    if rule not in RULES:
        raise ValueError(f"no rule is called {rule!r}; load_rule() loads one from its header")
    hypers = {h["name"]: h["initial"] for h in RULES[rule]["hypers"]}
    for name in hypers:
        if name in _TAKEN or name in {f.name for f in fields(Level)} or hasattr(Level, name) or keyword.iskeyword(name):
            raise ValueError(f"rule {rule!r}: a hyperparameter cannot be called {name!r}, which means something else")
    arguments: dict[str, Any] = dict(hypers)
    base: type[Level] = Level
    if {"beta1", "beta2"} <= set(hypers):
        base, at = Betas, min(list(hypers).index(name) for name in ("beta1", "beta2"))
        betas = arguments.pop("beta1"), arguments.pop("beta2")
        others = list(arguments.items())
        arguments = dict([*others[:at], ("betas", betas), *others[at:]])
    lines = [
        f"    {h['name']}: in [{h['low']:g}, {h['high']:g}), moved in the coordinate {h['space']}"
        f"{', learned by default' * h['learned']}. Default: {h['initial']:g}."
        for h in RULES[rule]["hypers"]
    ]
    state = ", ".join(RULES[rule]["state"]) or "none"
    return make_dataclass(
        "".join(word.capitalize() for word in rule.split("_")),
        [(name, tuple[float, float] if name == "betas" else float, value) for name, value in arguments.items()],
        bases=(base,),
        namespace={
            "__doc__": "\n".join(
                [f"The rule {rule!r}, with the hyperparameters", "", *lines, "", f"State per parameter: {state}."]
            ),
            "__module__": __name__,
            "__reduce__": lambda self: (_level, (rule, {f.name: getattr(self, f.name) for f in fields(self)})),
            "rule_for": classmethod(lambda cls, names, **structure: rule),
        },
        frozen=True,
        eq=False,
        repr=False,
    )


def _level(rule: str, arguments: dict[str, Any]) -> Level:
    """Reads a pickled level, whose class no module holds."""
    level: Level = level_class(rule)(**arguments)
    return level


def rule_extension(name: str, headers: Sequence[str | os.PathLike[str]]) -> Any:
    """What a package that ships rules gives to ``setup()``, to compile them when it is built::

        setup(
            packages=["my_package"],
            ext_modules=[rule_extension("my_package._rules", ["my_package/my_rule.h"])],
            cmdclass={"build_ext": torch.utils.cpp_extension.BuildExtension},
        )

    and in ``my_package/__init__.py``::

        load_rules("my_package._rules")

    It must be built against the hyperopt_ext that it will run with (``pip install --no-build-isolation``).

    Args:
        name: the dotted name of the library, which is no module to import.
        headers: paths of the headers, relative to setup.py.
    """

    from hyperopt_ext import _build

    paths = _paths(headers)
    sources = _build.units(Path("build", name), include_path(), _includes(paths))
    return _build.extension(name, sources, [include_path()], depends=[str(path) for path in _with_included(paths)])
