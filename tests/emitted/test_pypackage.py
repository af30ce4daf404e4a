"""The Python package of one rule: it builds a wheel, which trains where neither compiler nor generator is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

import optforge as of
from cli_runner import optforge, optforge_here
from conftest import require
from embedding import run, write
from native import quick

RULE = '''from optforge import norm, rule, scalar


@rule
def mine(p, g, first="g", m=0.0, s: scalar = 1.0, *, t, lr=0.25, decay=0.5):
    r"""A rule \\ with "quotes" of its own."""
    assert 0 <= decay < 1
    s = decay * s + norm(g) / t
    m = decay * m + first
    p = p - lr * m / (1 + s)
    return p, first, m, s
'''


def built(directory: Path, out: Path) -> Path:
    """The wheel of a package, built with the tools that are here."""
    require("gcc")
    pytest.importorskip("setuptools", minversion="70.1")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    compiler = {"CC": quick(require("gcc"), out.parent)}
    run([*command, "--disable-pip-version-check", "-w", out, "."], directory, compiler)
    [wheel] = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write(tmp_path_factory.mktemp("emitted"), {"my_rule.py": RULE})
    optforge(
        "generate", "my_rule.py:mine", "--layout", "python", "--set", "lr=0.125", "--out", "package", cwd=directory
    )
    return directory / "package"


@pytest.fixture(scope="module")
def wheel(emitted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(emitted, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the wheel and NumPy, and nothing else."""
    directory = tmp_path_factory.mktemp("installed")
    venv.create(directory, symlinks=True)
    site = directory / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    own = directory / "bin/python"
    run(
        [sys.executable, "-m", "pip", "--python", own, "install", "--quiet", "--no-deps", "--no-index", wheel],
        directory,
    )
    for name in ("numpy", "numpy.libs"):
        source = Path(sysconfig.get_path("purelib")) / name
        if source.exists():
            (site / name).symlink_to(source)
    return own


def trained(python: Path, code: str, directory: Path) -> str:
    """What code prints there, with an empty PATH."""
    write(directory, {"code.py": code})
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [python, "-W", "error", "code.py"]
    answer = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, env={**environment, "PATH": ""}, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_the_wheel(wheel: Path) -> None:
    assert wheel.name.startswith(f"optforge_mine-{of.__version__}-py3-none-")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"optforge_mine-{of.__version__}.dist-info/METADATA").decode()
    assert names == {"mine/__init__.py", "mine/_kernel.so", "mine/py.typed"}
    assert 'Summary: A rule \\ with "quotes" of its own.' in metadata


TRAINING = """
import copy, json, pickle, shutil
import numpy as np
import mine
assert shutil.which("cc") is None
for dtype in (np.float32, np.float64):
    random = np.random.default_rng(1)
    sizes = [(1200, 500), (3, 5), ()]
    weights = [np.asarray(random.standard_normal(n)).astype(dtype) for n in sizes]
    opt = mine.Optimizer(weights, decay=0.75, threads=THREADS)
    for step in range(4):
        grads = [np.asarray(random.standard_normal(n)).astype(dtype) for n in sizes]
        assert opt.step(grads) is None
        told = opt.step([np.asarray(g * 2) for g in grads], grad_scale=2.0, stats=True)
    print(json.dumps([[float(x).hex() for x in w.ravel()[:9]] for w in weights]), told.grad_norm.hex(), opt.t)
    print([float(s[0]).hex() for s in opt.state["s"]], told.skipped, told.nan)
"""


@pytest.mark.parametrize("threads", [1, 3])
def test_training_without_a_compiler(threads: int, python: Path, tmp_path: Path) -> None:
    """The bits of the reference."""
    told = trained(python, TRAINING.replace("THREADS", str(threads)), tmp_path).splitlines()
    own = of.Rule.from_file(write(tmp_path, {"my_rule.py": RULE}) / "my_rule.py", "mine")
    lines = []
    for dtype in (np.float32, np.float64):
        random = np.random.default_rng(1)
        sizes: list[tuple[int, ...]] = [(1200, 500), (3, 5), ()]
        weights = [np.asarray(random.standard_normal(n)).astype(dtype) for n in sizes]
        opt = of.Optimizer(weights, own, target="numpy", decay=0.75, lr=0.125)
        for _ in range(4):
            grads = [np.asarray(random.standard_normal(n)).astype(dtype) for n in sizes]
            opt.step(grads)
            stats = opt.step([np.asarray(g * 2) for g in grads], grad_scale=2.0, stats=True)
        assert stats is not None
        shown = json.dumps([[float(x).hex() for x in w.ravel()[:9]] for w in weights])
        lines += [f"{shown} {stats.grad_norm.hex()} {opt.t}", f"{[float(s).hex() for s in opt.state['s']]} False 0"]
    assert told == lines


def test_the_rest_of_its_optimizer(python: Path, tmp_path: Path) -> None:
    code = """
import copy, pickle
import numpy as np
import mine
assert mine.__doc__.startswith('mine: A rule \\\\ with "quotes" of its own.') and mine.instruction_set()
assert "lr : float" in mine.Optimizer.__doc__
assert mine.Optimizer.__init__.__kwdefaults__["lr"] == 0.125
random = np.random.default_rng(1)
weights = [random.standard_normal(n) for n in (40, 3)]
grads = [random.standard_normal(n) for n in (40, 3)]
opt = mine.Optimizer(weights, skip_nonfinite=True)
opt.step([grads[0], None])
assert opt.t == 1 and not opt.state["first"][1].any() and (opt.state["first"][0] == grads[0]).all()
before = weights[1].copy()
assert opt.step([grads[0], grads[1] * np.inf], stats=True).skipped and opt.t == 1 and (weights[1] == before).all()
opt.lr = 0.5
others = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), mine.Optimizer([w.copy() for w in weights])]
others[2].load_state_dict(opt.state_dict())
others[2].skip_nonfinite = True
for own in (opt, *others):
    own.step(grads)
    assert own.t == 2 and own.lr == 0.5
    assert all((a == b).all() for a, b in zip(own.params, opt.params))
    assert all((a == b).all() for a, b in zip(own.state["m"], opt.state["m"]))
assert others[0].params[0] is not weights[0] and opt.params[0] is weights[0]
zeroing = mine.Optimizer(weights, zero_grads=True)
zeroing.step(grads)
assert not grads[0].any() and not grads[1].any()

def refused(what, call, kind=ValueError):
    saved = copy.deepcopy(weights)
    try:
        call()
    except kind as problem:
        assert what in str(problem), problem
    else:
        raise AssertionError(what)
    assert all((a == b).all() for a, b in zip(saved, weights))

frozen = weights[0].copy()
frozen.flags.writeable = False
refused("2 parameters and 1 gradients", lambda: opt.step([grads[0]]))
refused("grads[1] is float32 (3,), and should be float64 (3,)", lambda: opt.step([grads[0], grads[1].astype("f4")]))
refused("grads[0] is float64 (3,)", lambda: opt.step([grads[1], grads[1]]))
refused("grads[0] is a list", lambda: opt.step([[1.0] * 40, grads[1]]), TypeError)
refused("two arrays of a tensor overlap", lambda: opt.step([weights[0], grads[1]]))
refused("grad_scale", lambda: opt.step(grads, grad_scale=0.0))
refused("not C-contiguous", lambda: mine.Optimizer([np.zeros(10)[::2]]))
refused("not C-contiguous and writable", lambda: mine.Optimizer([frozen]))
refused("all parameters are of one dtype", lambda: mine.Optimizer([weights[0], weights[1].astype("f4")]))
refused("all parameters are of one dtype", lambda: mine.Optimizer([np.zeros(3, "i4")]))
refused("threads is negative", lambda: mine.Optimizer(weights, threads=-1).step(grads))
refused("NaN", lambda: mine.Optimizer(weights, lr=float("nan")).step(grads))
refused("0 <= decay < 1", lambda: mine.Optimizer(weights, decay=1.0).step(grads))
refused("another rule", lambda: opt.load_state_dict({**opt.state_dict(), "hash": ""}))
refused("other parameters", lambda: mine.Optimizer(weights[:1]).load_state_dict(opt.state_dict()))
mine.Optimizer([]).step([])
print("good")
"""
    assert trained(python, code, tmp_path) == "good\n"


def test_it_is_typed(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    run([sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", "-p", "mine"], tmp_path)


def test_names_that_are_none_for_a_wheel(tmp_path: Path) -> None:
    write(tmp_path, {"my_rule.py": RULE.replace("def mine", "def β")})
    said = optforge_here("generate", "my_rule.py:β", "--layout", "python", cwd=tmp_path, code=2)
    assert "a wheel has a name of ASCII letters" in said
    optforge_here("generate", "my_rule.py:β", "--layout", "python", "--prefix", "beta", "--out", "own", cwd=tmp_path)
    assert 'name = "optforge-beta"' in (tmp_path / "own/pyproject.toml").read_text()


def test_a_rule_without_anything(tmp_path: Path) -> None:
    """No state, no hyperparameters."""
    write(
        tmp_path, {"my_rule.py": "from optforge import rule\n\n\n@rule\ndef bare(p, g):\n    p = p - g\n    return p\n"}
    )
    optforge_here("generate", "my_rule.py:bare", "--layout", "python", "--dtype", "f64", "--out", "own", cwd=tmp_path)
    compile((tmp_path / "own/src/bare/__init__.py").read_text(), "bare", "exec")
    run(["gcc", "-std=c99", "-O0", "-Wall", "-Wextra", "-Werror", "-Icsrc", "-c", "csrc/calls.c"], tmp_path / "own")
