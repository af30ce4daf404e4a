"""The package: what the wheel holds, that it works outside the checkout, and what its names are."""

from __future__ import annotations

import email
import importlib
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

import optforge as of
from optforge.cli.companions import COMPANIONS
from optforge.library.rule import Rule
from places import ROOT

CHECKOUT = ROOT
HEAVY = ("numpy", "jinja2", "cffi", "typer", "click", "rich", "filelock", "platformdirs")


def python(code: str, **options: object) -> str:
    """What code prints in a fresh Python."""
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout  # type: ignore[call-overload,no-any-return]


# ── the wheel ───────────────────────────────────────────────────────────────────────────────────────────────────────


def build(out: Path, *what: str) -> Path:
    """Build with the tools that are here, nothing is downloaded; the only wheel in `out`."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *what, str(CHECKOUT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    return build(tmp_path_factory.mktemp("wheel"), "--wheel")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment into which the wheel alone is installed.

    It borrows the dependencies of this one, but not what stands here in development.
    """
    directory = tmp_path_factory.mktemp("installed")
    venv.create(directory, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = directory / "lib" / version / "site-packages"
    commands = directory / "bin"
    command = [sys.executable, "-m", "pip", "--python", str(commands / "python"), "install", "--no-deps", "--no-index"]
    subprocess.run([*command, "--quiet", "--disable-pip-version-check", str(wheel)], check=True)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return commands


def outside(command: list[object], cwd: Path) -> str:
    """What a command prints that runs outside the checkout and knows nothing of it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    run = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


def test_contents_of_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {
        f"optforge/{path.relative_to(CHECKOUT / 'generator' / 'optforge').as_posix()}"
        for path in (CHECKOUT / "generator" / "optforge").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    expected |= {
        f"optforge/templates/{path.relative_to(CHECKOUT / 'templates').as_posix()}"
        for path in (CHECKOUT / "templates").rglob("*")
        if path.is_file()
    }
    assert any(name.endswith(".j2") for name in expected)
    assert {f"optforge/templates/runtime/optforge.{ending}" for ending in "hc"} <= expected
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {name.partition(".dist-info/")[2] for name in names if ".dist-info/" in name} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
    }


def test_metadata_of_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        about = f"optforge-{of.__version__}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{about}/METADATA"))
        license = archive.read(f"{about}/licenses/LICENSE").decode()
        commands = archive.read(f"{about}/entry_points.txt").decode()
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    assert (metadata["Name"], metadata["Version"]) == ("optforge", of.__version__)
    assert project["version"] == of.__version__
    assert metadata["Requires-Python"] == project["requires-python"]
    assert metadata["License-Expression"] == "MIT"
    assert license == (CHECKOUT / "LICENSE").read_text()
    assert metadata.get_payload(decode=True).decode() == (CHECKOUT / "README.md").read_text()  # type: ignore[union-attr]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "optforge = optforge.cli:main" in commands


def test_the_source_distribution_gives_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    through_source = build(tmp_path)
    assert len(list(tmp_path.glob("*.tar.gz"))) == 1
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(through_source) as two:
        assert {name: one.read(name) for name in one.namelist()} == {name: two.read(name) for name in two.namelist()}


def test_the_wheel_alone_is_used(installed: Path, tmp_path: Path) -> None:
    code = "import optforge, optforge.emit.text, sys; print(optforge.__file__, optforge.emit.text.TEMPLATES, *sys.path)"
    file, templates, *paths = outside([installed / "python", "-c", code], tmp_path).split()
    package = Path(file).parent
    assert package.is_relative_to(installed.parent)
    assert Path(templates) == package.resolve() / "templates"
    assert str(CHECKOUT / "generator") not in paths


def test_the_command_line_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    listed = outside([installed / "optforge", "list"], tmp_path)
    assert [line.split()[0] for line in listed.partition("\n\n")[0].splitlines()[1:]] == list(of.rules)
    assert outside([installed / "python", "-m", "optforge", "list"], tmp_path) == listed
    outside([installed / "optforge", "generate", "--all", "--out", "emitted"], tmp_path)
    expected = {file: text for name in of.rules for file, text in of.rules[name].generate().items()}
    expected |= COMPANIONS["plateau"].emit("c", None)
    assert {path.name: path.read_text() for path in (tmp_path / "emitted").iterdir()} == expected


def test_a_step_with_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = """
        import numpy as np, optforge as of
        p = np.linspace(-1, 1, 100, dtype=np.float32)
        opt = of.Optimizer([p], of.rules.adam, lr=0.1)
        for _ in range(3):
            opt.step([np.cos(p)])
        print(p.tobytes().hex())
        """
    code = re.sub(r"^        ", "", code, flags=re.MULTILINE)
    found = outside([installed / "python", "-W", "error", "-c", code], tmp_path)
    p = np.linspace(-1, 1, 100, dtype=np.float32)
    opt = of.Optimizer([p], "adam", target="numpy", lr=0.1)
    for _ in range(3):
        opt.step([np.cos(p)])
    assert found.strip() == p.tobytes().hex()


# ── names of the package ────────────────────────────────────────────────────────────────────────────────────────────


def test_importing_is_light() -> None:
    code = "import optforge, sys; list(optforge.rules); 'adam' in optforge.rules; print(*sys.modules)"
    modules = set(python(code).split())
    assert "optforge" in modules
    assert not modules & set(HEAVY)
    assert {name for name in modules if name.startswith("optforge.")} == {
        "optforge.core",
        "optforge.core.catalogue",
        "optforge.core.version",
        "optforge.rules",
        "optforge.transforms",
    }


def test_every_public_name_is_there() -> None:
    assert len(set(of.__all__)) == len(of.__all__)
    assert {"Optimizer", "Rule", "RuleError", "rule", "rules", "scalar", "sqrt", "where"} <= set(of.__all__)
    for name in of.__all__:
        assert getattr(of, name) is getattr(of, name)
        assert name in dir(of)
    assert "__version__" in dir(of)


def test_each_public_name_can_be_imported_first() -> None:
    """Each in a process of its own, where the order of imports could matter; it has NumPy already, which takes long."""
    assert not failing([f"from optforge import {name}; assert {name} is not None" for name in of.__all__])


def failing(statements: list[str]) -> list[str]:
    """Those of some statements that fail, each in a process of its own."""
    codes = python(ALONE.format(statements=statements)).split()
    return [statement for statement, code in zip(statements, codes, strict=True) if code != "0"]


ALONE = """
import os
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a process that forks has no threads
import numpy
for statement in {statements}:
    if (child := os.fork()) == 0:
        code = 1
        try:
            exec(statement)
            code = 0
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_star_import() -> None:
    assert python("from optforge import *; print(rule, rules.adam, Optimizer, sqrt(4.0))").endswith(" 2.0\n")


def test_a_name_that_is_not_there() -> None:
    for name in ("Optimiser", "_private", "numpy", "os"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(of, name)
    with pytest.raises(ImportError, match="Optimiser"):
        exec("from optforge import Optimiser")


# ── the built-in rules ──────────────────────────────────────────────────────────────────────────────────────────────


def test_rules_by_attribute_index_and_iteration() -> None:
    names = list(of.rules)
    assert names == sorted(names)
    assert len(of.rules) == len(names) >= 8
    assert dir(of.rules) == names
    for name in names:
        rule = of.rules[name]
        assert isinstance(rule, Rule)
        assert rule is getattr(of.rules, name)
        assert rule is getattr(importlib.import_module(f"optforge.rules.{name}"), name)
        assert rule.name == name
        assert name in of.rules
        assert hasattr(of.rules, name)


def test_a_rule_is_never_a_module() -> None:
    ways = [
        "import optforge.rules.adam; rule = optforge.rules.adam",
        "import optforge.rules.adam as rule",
        "from optforge.rules import adam as rule",
        "from optforge.rules.adam import adam as rule",
        "import optforge as of; rule = of.rules.adam; import optforge.rules.adam; assert of.rules.adam is rule",
        "import optforge as of; rule = of.rules['adam']; from optforge.rules import adam; assert adam is rule",
        "import optforge as of; from optforge.rules.adam import adam; rule = of.rules['adam']; assert adam is rule",
        "import optforge.rules, importlib; importlib.import_module('optforge.rules.adam'); rule = optforge.rules.adam",
        "import optforge.rules.sgd, optforge as of; rule = of.rules.adam",
    ]
    same = "import optforge; assert optforge.rules.adam is rule and rule.name == 'adam' and type(rule) is optforge.Rule"
    assert not failing([f"{way}\n{same}" for way in ways])


def test_an_unknown_rule() -> None:
    with pytest.raises(AttributeError, match=r"there is no rule 'adm'; did you mean 'adam'\?"):
        _ = of.rules.adm
    with pytest.raises(KeyError, match=r"there is no rule 'adm'; did you mean 'adam'\?"):
        of.rules["adm"]
    with pytest.raises(ImportError, match="adm"):
        exec("from optforge.rules import adm")
    with pytest.raises(ValueError, match=r"'adm'; did you mean 'adam'\?"):
        of.Optimizer([np.zeros(1)], "adm")
    for name in ("zzz", "__wrapped__", "_adam"):
        assert not hasattr(of.rules, name)
        assert name not in of.rules
    for name in ("importlib", "annotations", "Catalogue"):  # what the module itself uses
        assert name not in of.rules
        with pytest.raises(KeyError):
            of.rules[name]
