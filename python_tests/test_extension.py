"""Rules from outside the repository: built, loaded, used, and refused."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import pytest
import torch
from problems import Regression
from torch.utils import cpp_extension

import hyperopt_ext as hx
from hyperopt_ext import _build, extension
from hyperopt_ext.stack import RULES
from hyperopt_ext.testing import check_rule

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "adamax"

# SGD under another NAME.
RULE = """
#include "rule.h"
namespace hyperopt_ext {
struct Class {
  static constexpr char name[] = "NAME";
  enum { lr };
  static constexpr std::array hypers{Hyperparameter{"lr", 1e-3, 0, kInfinity, Space::linear, true}};
  static constexpr std::array<const char*, 0> state{};
  static constexpr std::array sets{bit(lr)};
  template <class H>
  HX_FN static auto prepare(const H& h, double) { return pack(get<lr>(h)); }
  template <class P, class W>
  HX_FN static auto penalty(const P&, const W& w) { return 0.0 * w; }
  template <class P, class E>
  HX_FN static auto advance(const P&, const E&) { return pack(); }
  template <class P, class E, class W>
  HX_FN static auto change(const P& p, const E& e, const W&) { return -(get<0>(p) * e); }
};
HX_REGISTER_RULE(Class)
}
"""


def rule_text(name, *changes):
    text = RULE.replace("NAME", name).replace("Class", name.title().replace("_", ""))
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.fixture(autouse=True)
def _built_here(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    header = tmp_path_factory.mktemp("rule") / "plain rule.h"
    header.write_text(rule_text("plain"))
    return header


@pytest.fixture(scope="module")
def plain(header):
    """The class of levels of a loaded rule."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(header.parent))
        level = hx.extension.load_rule(header)
        libraries = {path: path.stat().st_mtime_ns for path in header.parent.glob("**/*.so")}
        assert len(libraries) == 1
        assert hx.extension.load_rule(os.path.relpath(header)) is level  # finds what is there
        assert {path: path.stat().st_mtime_ns for path in header.parent.glob("**/*.so")} == libraries
    return level


def environment(**more):
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PYTHONPATH": path, "PATH": scripts, **more}


def test_the_example_passes_the_suite_of_the_library(tmp_path):
    """AdaMax, as a package in a folder of its own: alone, in towers, compiled, from a state dict, ..."""
    folder = shutil.copytree(
        EXAMPLE, tmp_path / "adamax", ignore=shutil.ignore_patterns("build", "*.so", "__pycache__")
    )
    for command in (
        ["setup.py", "--quiet", "build_ext", "--inplace"],
        ["-m", "pytest", "-q", "-p", "no:cacheprovider"],
    ):
        ran = subprocess.run([sys.executable, *command], cwd=folder, env=environment(), capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert "1 passed" in ran.stdout


def test_a_new_rule_is_short():
    def lines(path, comment):
        return [line for line in path.read_text().splitlines() if line.strip() and not line.strip().startswith(comment)]

    package = EXAMPLE / "hyperopt_adamax"
    assert len(lines(package / "adamax.h", "//")) <= 40
    assert len(lines(package / "__init__.py", "#")) <= 15


@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_loaded_rule_does_in_a_tower_what_a_built_in_one_does(plain, k):
    problems, optimizers = (Regression(20), Regression(20)), []
    for problem, sgd in zip(problems, (hx.SGD, plain), strict=True):
        levels = [hx.Adam(lr=1e-2), hx.Adam(lr=1e-3), hx.Adam(lr=1e-4)]
        levels[k] = sgd(lr=(0.05, 1e-3, 1e-5)[k])
        opt = hx.HyperOptimizer(problem.model.parameters(), hx.Stack(levels))
        problem.train(opt, range(20))
        optimizers.append(opt)
    for p, q in zip(*(problem.model.parameters() for problem in problems), strict=True):
        assert torch.equal(p, q)
    for built_in, loaded in zip(*(opt.hyperparameters() for opt in optimizers), strict=True):
        assert loaded == {name: built_in[name] for name in loaded}
    with pytest.raises(ValueError, match="is of the stack"):
        optimizers[0].load_state_dict(optimizers[1].state_dict())


def test_the_class_of_a_loaded_rule(plain):
    level = plain
    assert level.__name__ == "Plain"
    assert level() == level(lr=1e-3) == pickle.loads(pickle.dumps(level())) == copy.deepcopy(level())
    assert level(0.5, learn=()).lr == 0.5
    assert repr(level(0.5)) == "Plain(lr=0.5)"
    assert "lr: in [0, inf)" in level.__doc__
    with pytest.raises(TypeError, match="Plain has no argument 'momentum'"):
        level(momentum=0.9)
    with pytest.raises(ValueError, match=r"Plain: lr must be in \[0, inf\), not -1"):
        level(lr=-1)


@pytest.mark.parametrize("name", ["learn", "params", "betas", "initial_lr", "values", "rule", "lambda"])
def test_what_a_hyperparameter_cannot_be_called(monkeypatch, name):
    hypers = [{**RULES["sgd"]["hypers"][0], "name": name}]
    monkeypatch.setitem(RULES, "odd", {**RULES["sgd"], "name": "odd", "hypers": hypers})
    with pytest.raises(ValueError, match=f"rule 'odd': a hyperparameter cannot be called '{name}'"):
        extension.level_class("odd")


def test_a_loaded_rule_as_a_function(plain):
    w, lr = torch.ones(3), torch.tensor(0.1, requires_grad=True)
    [new], state = hx.functional.of(plain)([w], [w], None, {"lr": lr}, torch.tensor(1))
    assert state == {}
    (new**2).sum().backward()
    assert lr.grad.item() == pytest.approx(-5.4)


def test_check_rule_finds_what_is_wrong(plain):
    def twin(w, g, s, h, step):
        return w - h["lr"] * g * (1 + 1e-9), {}

    with pytest.raises(AssertionError, match="the parameters: the largest difference") as failure:
        check_rule(plain, twin=twin, hyper={"lr": 0.1})
    assert failure.value.__notes__ == ["in hyperopt_ext.testing: hypergradients_equal_autograd(plain, {}, 1)"]
    for arguments, error, words in (
        ({"level": plain()}, TypeError, r"level must be a class, as Plain, not Plain\(lr=0.001\)"),
        ({"hyper": {"lr": 0.1, "eps": 0.1}}, ValueError, "hyper must give lr, not lr, eps"),
        ({"twin": lambda w, *_: w}, TypeError, "twin must return the new w and the new state, not a Tensor"),
        ({"twin": lambda w, *_: (w, {"m": w})}, ValueError, "that twin returns must hold nothing, not m"),
    ):
        with pytest.raises(error, match=f"check_rule: .*{words}"):
            check_rule(**{"level": plain, "twin": twin, "hyper": {"lr": 0.1}, **arguments})


ONE_STATE = [
    ("array<const char*, 0> state{}", 'array<const char*, 1> state{"m"}'),
    ("<class P, class E>", "<class P, class E, class M>"),
    ("advance(const P&, const E&)", "advance(const P&, const E&, const M& m)"),
    ("<class P, class E, class W>", "<class P, class E, class W, class M>"),
    ("const E& e, const W&)", "const E& e, const W&, const M&)"),
]
BROKEN = {
    "no_name": ([('name[] = "', 'nam[] = "')], "the rule has no 'static constexpr char name[]"),
    "no_hypers": ([("hypers{", "hyper{")], "the rule has no 'static constexpr std::array hypers{"),
    "no_state": ([("state{}", "stat{}")], "the rule has no 'static constexpr std::array<const char*, N> state{"),
    "no_sets": ([("sets{", "set{")], "the rule has no 'static constexpr std::array sets{"),
    "no_prepare": ([("prepare(", "prepar(")], "the rule has no 'static auto prepare(h, step)'"),
    "no_penalty": ([("penalty(", "penalt(")], "the rule has no 'static auto penalty(p, w)'"),
    "no_advance": ([("advance(", "advanc(")], "the rule has no 'static auto advance(p, e, s...)'"),
    "no_change": ([("change(", "chang(")], "the rule has no 'static auto change(p, e, w, s...)'"),
    "not_static": ([("HX_FN static auto change", "HX_FN auto change")], "the rule has no 'static auto change("),
    "few_values": (ONE_STATE, "advance() returns fewer values than 'state' has names"),
    "unknown_bit": ([("sets{bit(lr)}", "sets{bit(1)}")], "each of 'sets' must be made of the bits of hyperparameters"),
    "a_number": ([("return 0.0 * w", "return 0.0")], "penalty() must return a dual number"),
    "few_names": ([*ONE_STATE, ('{"m"}', "{}"), ("pack()", "pack(m)")], "and as many as the array is long"),
    "taken_state": ([*ONE_STATE, ('{"m"}', '{"tick"}'), ("pack()", "pack(m)")], "a state cannot be called step, tick"),
    "out_of_order": (
        [("{ lr }", "{ other, lr }"), ("get<lr>(h)", "get<0>(h)"), ("bit(lr)", "bit(0)")],
        "the enum must name the hyperparameters in the order of 'hypers'",
    ),
    "out_of_bounds": ([("pack(get<lr>(h))", "pack(get<lr>(h) * get<1>(h))")], "that 'hypers' does not have"),
    "out_of_range": ([("1e-3, 0,", "-1e-3, 0,")], "a hyperparameter must have low <= initial < high"),
}


def test_what_a_rule_lacks_is_an_error_that_names_it(tmp_path):
    (tmp_path / "broken.h").write_text("\n".join(rule_text(name, *changes) for name, (changes, _) in BROKEN.items()))
    before = dict(RULES)
    with pytest.raises(RuntimeError, match=r"broken\.h does not compile:\n") as failure:
        hx.extension.load_rule("broken.h")
    for name, (_, message) in BROKEN.items():
        assert f"  {name.title().replace('_', '')}: " in str(failure.value)
        assert message in str(failure.value)
    assert len(str(failure.value).splitlines()) == 1 + len(BROKEN)
    assert before == RULES
    with pytest.raises(RuntimeError) as again:
        hx.extension.load_rule("broken.h")
    assert str(again.value) == str(failure.value)


def test_an_error_in_a_rule_is_shown_with_its_line(tmp_path):
    (tmp_path / "wrong.h").write_text(rule_text("wrong", ("* e); }", "* e + gradient); }")))
    with pytest.raises(RuntimeError, match=r"^wrong\.h does not compile:\n  wrong\.h:17: .*\bgradient\b"):
        hx.extension.load_rule("wrong.h")
    with pytest.raises(RuntimeError, match=r"a rule is made of \+ - \* /, sqrt, pow, max, sign, where and constant"):
        hx.extension.load_rule("wrong.h")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("by_sign", "get<0>(p) * sign(e)"),
        ("by_sign_of_w", "get<0>(p) * (e + 0.1 * sign(w))"),
        ("by_condition", "get<0>(p) * where(e.value > 0.1, 1.0, 0.0 * get<0>(p)) + 0.0 * e"),
        ("by_nothing_but_rounding", "where(e.value > 0.0, get<0>(p) * e / 3.0, get<0>(p) * (e / 3.0))"),
        ("by_condition_of_w", "get<0>(p) * where(w.value > 0.5, 2.0 * e, e) + 0.0 * w"),
    ],
)
def test_what_a_rule_reads_without_a_slope_is_kept(tmp_path, name, change):
    changes = [("const E& e, const W&)", "const E& e, const W& w)"), ("-(get<0>(p) * e)", f"-({change})")]
    (tmp_path / f"{name}.h").write_text(rule_text(name, *changes))
    level = hx.extension.load_rule(f"{name}.h")
    stack = level(lr=0.1) / hx.SGD(lr=1e-3)
    results = []
    p = torch.nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64))
    opt, tower = hx.HyperOptimizer([p], stack), hx.functional.tower(stack)
    params, state = tower.init({"p": p})
    for _ in range(5):
        p.grad = 2 * p.detach()
        opt.step()
        params, state = tower.step(params, {"p": 2 * params["p"]}, state)
        results.append([opt.hyperparameters()[0]["lr"].item(), tower.hyperparameters(state)[0]["lr"].item()])
    assert results[-1][0] != 0.1
    torch.testing.assert_close(*torch.tensor(results, dtype=torch.float64).T, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("letter", "change"),
    [
        ("e", "where(e.value > 0.1, 1.0, 0.0 * get<0>(p))"),
        ("e", "where(e.value * e.value < 1e-8, 1.0, 0.0 * get<0>(p))"),
        ("w", "where(w.value > 0.5, 2.0 * e, e)"),
        ("w", "where(w.value * w.value > 1e6, 2.0 * e, e)"),
    ],
)
def test_what_a_rule_reads_by_a_condition_alone_is_an_error(tmp_path, letter, change):
    changes = [("const E& e, const W&)", "const E& e, const W& w)"), ("-(get<0>(p) * e)", f"-(get<0>(p) * {change})")]
    (tmp_path / "hides.h").write_text(rule_text(f"hides_{letter}", *changes))
    words = (
        rf"'hides_{letter}' whose change\(\) depends on {letter} by a condition alone, .*; add 0\.0 \* {letter} to what"
    )
    with pytest.raises(ValueError, match=words):
        hx.extension.load_rule("hides.h")


def test_what_a_rule_includes_is_part_of_it(tmp_path):
    """Mended in the same process, it is compiled again; and a blank in the path hides no error."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    header, included = folder / "outer.h", folder / "inner.h"
    header.write_text('#include "inner.h"\n' + rule_text("outer", ("* e); }", "* e * kFactor); }")))
    included.write_text('#include "missing.h"\nconstexpr double kFactor = 2;\n')
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^outer\.h does not compile:\n  inner\.h:1: .*missing\.h"):
            hx.extension.load_rule(header)
    included.write_text("constexpr double kFactor = 2;\n")
    level = hx.extension.load_rule(header)
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    hx.HyperOptimizer([p], level(lr=0.5)).step()
    assert torch.equal(p.detach(), -torch.ones(2))
    assert extension._with_included([header]) == [header, included]


def test_a_build_that_ended_early_is_made_again(tmp_path, monkeypatch):
    (tmp_path / "early.h").write_text(rule_text("early"))

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cpp_extension, "_write_ninja_file_and_build_library", interrupt)
        with pytest.raises(KeyboardInterrupt):
            extension.build_rules(["early.h"])
    assert extension.load_rule("early.h")().lr == 1e-3


def test_a_folder_that_cannot_be_written_to(plain, header, monkeypatch, tmp_path):
    """What was built there is used; else the error says so."""

    def fail(*_, **__):
        raise OSError("Read-only file system")

    monkeypatch.setattr(extension.FileLock, "acquire", fail)
    folder = next(header.parent.glob("hyperopt_ext/plain_*"))
    assert extension.build_rules([header], build_directory=folder).is_file()
    (tmp_path / "other.h").write_text(rule_text("other"))
    with pytest.raises(RuntimeError, match=r"cannot be written to \(Read-only file system\); set TORCH_EXTENSIONS_DIR"):
        extension.build_rules(["other.h"])


def test_a_header_without_a_rule(tmp_path):
    (tmp_path / "none.h").write_text(rule_text("none").replace("HX_REGISTER_RULE(None)", ""))
    with pytest.raises(ValueError, match=r"none\.h registers no rule; is there an HX_REGISTER_RULE\(...\) in it\?"):
        extension.load_rule("none.h")


def test_what_is_about_lr_needs_one(monkeypatch):
    hypers = [{**RULES["sgd"]["hypers"][0], "name": "gain", "high": -1.0, "low": -3.0, "initial": -2.0}]
    monkeypatch.setitem(RULES, "gained", {**RULES["sgd"], "name": "gained", "hypers": hypers})
    level = extension.level_class("gained")
    for name, value in {"trust": 0.1, "growth": 1.1, "converge": (0.1, 10)}.items():
        with pytest.raises(ValueError, match=f"Gained: {name} is about lr, and rule 'gained' has none"):
            level(**{name: value})
    [(low, high)] = level().limits()
    assert low == -3
    assert -1.001 < high < -1


def test_several_rules_and_names_that_are_taken(tmp_path, plain):
    header = tmp_path / "two.h"
    header.write_text(rule_text("first") + rule_text("second"))
    with pytest.raises(ValueError, match=r"two\.h registers 2 rules: first, second; load_rule\(\) is for one"):
        hx.extension.load_rule("two.h")
    assert extension.level_class("second")(lr=0.1).rule == "second"

    header.write_text(rule_text("fresh") + rule_text("plain", ("1e-3", "1e-2")))
    with pytest.raises(ValueError, match=r"has a rule called 'plain', but this name is taken; to load a rule that was"):
        hx.extension.load_rule("two.h")
    assert "fresh" not in RULES  # all or none
    assert extension.level_class("plain")().lr == 1e-3


def shared_library(path, code):
    source = path.with_suffix(".cpp")
    source.write_text(code)
    subprocess.run([cpp_extension.get_cxx_compiler(), "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    return path


def test_a_library_of_other_headers_is_refused(tmp_path):
    code = 'static const char* own = "another digest"; extern "C" const void* hyperopt_ext_library() { return &own; }'
    with pytest.raises(RuntimeError, match=r"old\.so was compiled with the headers of another version of hyperopt_ext"):
        extension.load_rules(shared_library(tmp_path / "old.so", code))


def test_what_is_no_library(tmp_path):
    with pytest.raises(ValueError, match=r"empty\.so is no library of rules"):
        extension.load_rules(shared_library(tmp_path / "empty.so", ""))
    with pytest.raises(FileNotFoundError, match=r"there is no library .*missing\.so"):
        extension.load_rules("./missing.so")
    with pytest.raises(FileNotFoundError, match=r"there is no extension hyperopt_ext\._rules; was its package built"):
        extension.load_rules("hyperopt_ext._rules")
    with pytest.raises(FileNotFoundError, match=r"there is no header .*missing\.h"):
        extension.load_rule("missing.h")
    with pytest.raises(FileNotFoundError, match=r"there is no header .*missing\.h"):
        extension.rule_extension("package._rules", ["missing.h"])
    with pytest.raises(
        FileNotFoundError, match=r"there is no extension no_such_package\._rules; was its package built"
    ):
        extension.load_rules("no_such_package._rules")
    for make in (extension.build_rules, partial(extension.rule_extension, "package._rules")):
        with pytest.raises(TypeError, match=r"headers must be a list of paths, as \['plain.h'\]"):
            make("plain.h")
        with pytest.raises(ValueError, match="headers must name at least one header"):
            make([])
    with pytest.raises(ValueError, match="no rule is called 'unheard_of'; load_rule"):
        extension.level_class("unheard_of")


def test_the_compiler_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "plain.h").write_text(rule_text("uncompiled"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"there is no 'no-such-compiler' here\. Install one"):
        extension.load_rule("plain.h")


def test_a_build_that_was_killed_holds_nobody_up(plain, header):
    """It leaves torch's lock behind. Two processes at once: one builds, the other waits for it."""
    [folder] = header.parent.glob("hyperopt_ext/plain_*")
    (folder / "lock").touch()
    code = f"import hyperopt_ext as hx; print(hx.extension.load_rule({str(header)!r}).__name__)"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(header.parent), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=100)[0].split()[-1] for process in both] == [plain.__name__] * 2


OTHER_COMPILERS = {
    "nvcc": """
contract.h(133): error: static assertion failed with "hyperopt_ext: the rule has no 'static auto penalty(p, w)'"
    static_assert(penalised,
          detected during:
            instantiation of "__nv_bool hyperopt_ext::detail::has_step<R,P,I...>() [with R=hyperopt_ext::Mine, I=<>]"
            instantiation of "__nv_bool hyperopt_ext::keeps_contract<R>() [with R=hyperopt_ext::Mine]" at line 42
contract.h(163): error: static assertion failed with "hyperopt_ext: the rule has no 'char name[] = "..."'"
            instantiation of "__nv_bool hyperopt_ext::keeps_contract<R>() [with R=hyperopt_ext::Other<true>]" at line 42
2 errors detected in the compilation of "mine_cuda.cu".
""",
    "clang 14": r"""
contract.h:133:3: error: static_assert failed due to requirement 'x' "hyperopt_ext: the rule has no 'static auto penalty(p, w)'"
  static_assert(penalised,
mine.h:9:1: note: in instantiation of member function 'hyperopt_ext::Registration<hyperopt_ext::Mine>::Registration' requested here
contract.h:163:3: error: static_assert failed due to requirement 'name' "hyperopt_ext: the rule has no 'char name[] = \"...\"'"
mine.h:9:1: note: in instantiation of member function 'hyperopt_ext::Registration<hyperopt_ext::Other<true>>::Registration' requested here
register.h:117:86: note: expanded from macro 'HX_REGISTER_RULE'
#define HX_REGISTER_RULE(...) static const ::hyperopt_ext::Registration<__VA_ARGS__> HX_JOIN(registration, __COUNTER__);
2 errors generated.
""",  # noqa: E501
}


@pytest.mark.parametrize("compiler", OTHER_COMPILERS)
def test_errors_of_other_compilers_are_understood(compiler):
    assert extension._errors(OTHER_COMPILERS[compiler]).splitlines() == [
        "  Mine: the rule has no 'static auto penalty(p, w)'",
        "  Other<true>: the rule has no 'char name[] = \"...\"'",
    ]


def test_an_error_that_is_not_of_the_contract_is_shown_as_it_is():
    own = extension._errors('/a/mine.h(9): error: identifier "x" is undefined')
    assert own.splitlines()[0] == '  mine.h:9: identifier "x" is undefined'
    assert extension._errors("ninja: out of memory") == "ninja: out of memory"


def test_a_source_distribution_can_be_built(tmp_path):
    """It has every source and header, those of the other device included."""
    command = [
        sys.executable,
        "setup.py",
        "--quiet",
        "egg_info",
        "--egg-base",
        tmp_path,
        "sdist",
        "--dist-dir",
        tmp_path,
    ]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")}
    package = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "hyperopt_ext").rglob("*.py*") if path.suffix != ".pyc"
    }
    assert len(sources) > 30
    assert sources | package | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert not {name for name in names if name.startswith("build")}


def test_an_installed_package_has_the_headers(tmp_path):
    """All that rules are compiled with, so that its digest is that of the source tree."""
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)
    assert _build.digest(tmp_path / "hyperopt_ext" / "include") == _build.digest(ROOT / "csrc")
    for name in ("rule.h", "dual.h", "library.h", "contract.h", "cpu/register.h", "cpu/kernels.h"):
        assert (tmp_path / "hyperopt_ext" / "include" / name).is_file()
        assert (extension.include_path() / name).is_file()
    assert (tmp_path / "hyperopt_ext" / "testing" / "checks.py").is_file()
