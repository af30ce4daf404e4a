"""Formats that are asked for wrongly: what the command line and `rule.generate` say, and that nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import optforge as of
from optforge.cli import main
from optforge.core.diagnostics import UsageError

WRONG: dict[str, tuple[str, list[str], dict[str, Any], list[str]]] = {
    "an unknown array": (
        "adadelta",
        ["--store", "p=bf16,acc_dleta=bf16"],
        {"store": {"p": "bf16", "acc_dleta": "bf16"}},
        ["no array 'acc_dleta'", "did you mean 'acc_delta'", "p, g, acc, acc_delta"],
    ),
    "an unknown format": (
        "adamw",
        ["--store", "p=bf61"],
        {"store": {"p": "bf61"}},
        ["p:", "no format 'bf61'", "did you mean 'bf16'", "f32, f64, bf16, f16"],
    ),
    "f64 among others": (
        "adamw",
        ["--store", "p=f64,g=bf16"],
        {"store": {"p": "f64", "g": "bf16"}},
        ["p is f64", "g as bf16"],
    ),
    "a master beside floats": ("adamw", ["--master", "f32"], {"master": "f32"}, ["master", "bf16 or f16", "p is f32"]),
    "a master beside doubles": (
        "adamw",
        ["--store", "p=f64", "--master", "split"],
        {"store": {"p": "f64"}, "master": "split"},
        ["master", "p is f64"],
    ),
    "a split master beside f16": (
        "adamw",
        ["--store", "p=f16,g=f16", "--master", "split"],
        {"store": {"p": "f16", "g": "f16"}, "master": "split"},
        ["split", "p is bf16", "p is f16", "f32"],
    ),
    "a split master at random": (
        "adamw",
        ["--store", "p=bf16", "--master", "split", "--rounding", "stochastic"],
        {"store": {"p": "bf16"}, "master": "split", "rounding": "stochastic"},
        ["split", "nearest", "f32"],
    ),
    "an unknown master": (
        "adamw",
        ["--store", "p=bf16", "--master", "f64"],
        {"store": {"p": "bf16"}, "master": "f64"},
        ["master", "'f32' or 'split'", "'f64'"],
    ),
    "an unknown rounding": (
        "adamw",
        ["--store", "p=bf16", "--rounding", "up"],
        {"store": {"p": "bf16"}, "rounding": "up"},
        ["rounding", "'nearest' or 'stochastic'", "'up'"],
    ),
    "a format of scalar state": (
        "novograd",
        ["--store", "v=bf16"],
        {"store": {"v": "bf16"}},
        ["v is one double per tensor"],
    ),
    "two equal suffixes": (
        "adamw",
        ["--dtype", "f32", "--store", "p=bf16", "--suffix", "f32"],
        {"dtypes": ["f32"], "store": {"p": "bf16"}, "suffix": "f32"},
        ["'f32'", "another suffix"],
    ),
    "a suffix of nothing": ("adamw", ["--suffix", "x"], {"suffix": "x"}, ["suffix", "store"]),
    "a dtype that is a format": ("adamw", ["--dtype", "bf16"], {"dtypes": "bf16"}, ["no dtype 'bf16'", "store"]),
    "a suffix that is no identifier": (
        "adamw",
        ["--store", "p=bf16", "--suffix", "a-b"],
        {"store": {"p": "bf16"}, "suffix": "a-b"},
        ["suffix", "'a-b'"],
    ),
    "a suffix that is empty": (
        "adamw",
        ["--store", "p=bf16", "--suffix", ""],
        {"store": {"p": "bf16"}, "suffix": ""},
        ["suffix", "''"],
    ),
    "a suffix of floats": (
        "adamw",
        ["--store", "p=bf16", "--suffix", "f32"],
        {"store": {"p": "bf16"}, "suffix": "f32"},
        ["'f32'", "another suffix"],
    ),
    "a suffix that other names have": (
        "adamw",
        ["--store", "p=bf16", "--suffix", "with_f32"],
        {"store": {"p": "bf16"}, "suffix": "with_f32"},
        ["'with_f32'", "another suffix"],
    ),
    "floats beside floats": (
        "adamw",
        ["--dtype", "f32", "--store", "p=f32"],
        {"dtypes": ["f32"], "store": {"p": "f32"}},
        ["'f32'", "another suffix"],
    ),
}


def optforge(*arguments: object) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def refused(capsys: pytest.CaptureFixture[str], directory: Path, *arguments: object) -> str:
    """What a command that may not succeed says on standard error; it writes nothing."""
    assert optforge(*arguments, "--out", directory / "out") == 2
    assert not (directory / "out").exists()
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    return said.err


@pytest.mark.parametrize("what", WRONG)
def test_the_command_line_says_what_is_wrong(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, flags, _, words = WRONG[what]
    said = refused(capsys, tmp_path, "generate", name, *flags)
    for word in words:
        assert word in said, (word, said)


@pytest.mark.parametrize("what", WRONG)
def test_generate_raises_what_is_wrong(what: str) -> None:
    name, _, how, words = WRONG[what]
    with pytest.raises(UsageError) as found:
        of.rules[name].generate("c", **how)
    for word in words:
        assert word in str(found.value), (word, str(found.value))


@pytest.mark.parametrize("text", ["p", "p=", "=bf16", "p:bf16", "p=bf16,,g=bf16", "p=bf16,p=f16"])
def test_what_store_is_not(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--store" in refused(capsys, tmp_path, "generate", "adamw", "--store", text)


def test_a_rule_of_a_file_takes_every_format(tmp_path: Path) -> None:
    """Its text does not change, and what `--check` compares is what was written."""
    source = "from optforge import rule\n\n\n@rule\ndef mine(p, g, m=0.0, *, lr=0.1):\n    m = 0.9 * m + g\n"
    (tmp_path / "mine.py").write_text(source + "    p = p - lr * m\n    return p, m\n")
    for number, flags in enumerate(
        (
            ["--store", "p=bf16,g=bf16"],
            ["--store", "p=f16,g=f32,m=bf16", "--rounding", "stochastic"],
            ["--store", "p=bf16,g=bf16", "--master", "split"],
            ["--store", "p=f16", "--store", "g=f16", "--master", "f32", "--suffix", "half", "--dtype", "f64"],
        )
    ):
        command = ["generate", f"{tmp_path / 'mine.py'}:mine", *flags, "--out", tmp_path / f"out{number}"]
        assert optforge(*command) == 0
        assert optforge(*command, "--check") == 0
    text = (tmp_path / "out3" / "mine.h").read_text()
    assert "mine_step_half" in text
    assert "mine_step_f64" in text
    assert "--store p=f16,g=f16 --master f32 --suffix half" in text
