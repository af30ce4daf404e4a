"""`list` and `show` for programs: JSON, and the loop in C as it stands in the emitted file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optforge import cli, rules, transforms
from optforge.library.named import named

DONE, MISTAKE = 0, 2


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = DONE) -> str:
    """What a command prints; its error where it must fail."""
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    out, err = capsys.readouterr()
    assert end.value.code == code, err
    assert bool(err) == (code != DONE)
    return err or out


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    listed = json.loads(said(capsys, "list", "--json"))
    assert [own["name"] for own in listed["rules"]] == list(rules)
    assert [own["name"] for own in listed["transforms"]] == list(transforms)
    assert [own["name"] for own in listed["companions"]] == ["plateau"]
    moved = {own["name"]: own["bytes_per_element"] for own in listed["rules"]}
    assert {name: moved[name] for name in ("sgd", "adam", "lamb", "novograd")} == {
        **{"sgd": 12, "adam": 28, "lamb": 40, "novograd": 24}
    }
    for own in listed["rules"]:
        rule = rules[own["name"]]
        assert own["state"] == list(rule.state)
        assert own["hyperparameters"] == rule.hyperparameters
        assert own["summary"] == rule.doc.splitlines()[0]
    clip = next(own for own in listed["transforms"] if own["name"] == "clip_by_global_norm")
    assert (clip["hyperparameters"], clip["options"]) == ({"max_norm": 50.0}, {"form": "threshold"})


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    shown = json.loads(said(capsys, "show", "clip_by_global_norm:novograd", "--set", "form=pytorch", "--json"))
    rule = named("clip_by_global_norm:novograd")
    assert (shown["name"], shown["origin"]) == ("clip_by_global_norm_novograd", "clip_by_global_norm:novograd")
    assert (shown["hash"], shown["formulas"]) == (rule.hash, rule.formulas)
    assert shown["hyperparameters"] == rule.hyperparameters
    assert shown["options"]["form"] == {"value": "pytorch", "accepts": ["threshold", "pytorch", "lasagne"]}
    assert shown["state"] == [
        {"name": "m", "per": "element", "initial": 0.0},
        {"name": "v", "per": "tensor", "initial": 0.0},
    ]
    step, tensor = shown["scalars"][0], shown["scalars"][-1]
    assert (step["per"], step["behind_phase"]) == ("step", 1)
    assert (tensor["per"], tensor["behind_phase"]) == ("tensor", 2)
    assert any(line.startswith("g_norm = sqrt(") for line in tensor["formulas"])
    single, double = shown["storages"]
    assert [phase["reads"] for phase in single["phases"]] == [["g"], ["g"], ["p", "g", "m"]]
    assert single["phases"][-1] == {"reads": ["p", "g", "m"], "writes": ["p", "m"], "bytes_per_element": 20}
    assert (single["bytes_per_element"], double["bytes_per_element"]) == (28, 56)


def test_show_of_arrays_as_they_are_stored(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--store", "p=bf16,g=bf16", "--master", "split", "--json")
    (own,) = json.loads(said(capsys, "show", "adamw", *arguments))["storages"]
    assert own["formats"] == {"p": "bf16", "g": "bf16", "m": "f32", "v": "f32"}
    assert (own["suffix"], own["master"], own["rounding"], own["bytes_per_element"]) == (
        "bf16_split",
        "split",
        "nearest",
        26,
    )


def test_json_is_that_of_every_parser(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = '@rule\ndef far(p, g, *, lr=0.1):\n    """Größe \u202e."""\n    p = p - lr * g\n    return p\n'
    (tmp_path / "far.py").write_text(f"from optforge import rule\n{text}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    out = said(capsys, "show", "far.py:far", "--set", "lr=inf", "--json")
    assert out.isascii()
    shown = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert shown["hyperparameters"] == {"lr": "inf"}
    assert shown["doc"] == "Größe \u202e."


@pytest.mark.parametrize("name", ["adam", "lamb", "novograd", "clip_by_global_norm:adamw"])
def test_the_loop_is_the_one_of_the_file(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rule = named(name)
    emitted = rule.generate("c")[f"{rule.name}.c"]
    out = said(capsys, "show", name, "--c")
    assert out in emitted
    assert out.count("for (size_t i = 0; i < n; i++) {") == (2 if name == "lamb" else 1)
    assert "double *OPTFORGE_RESTRICT" not in out
    assert emitted.replace(out, "").count("for (size_t i = 0; i < n; i++) {") == out.count("for (size_t i")  # of double


def test_the_loop_has_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    clipped = said(capsys, "show", "clip_by_global_norm:sgd", "--c")
    always = said(capsys, "show", "clip_by_global_norm:sgd", "--c", "--set", "form=pytorch")
    assert "? g_then : g" in clipped
    assert "?" not in always


def test_c_and_json_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert "give one of them" in said(capsys, "show", "adam", "--c", "--json", code=MISTAKE)


def test_a_mistake_is_no_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "show", "adma", "--json", code=MISTAKE).startswith("optforge: error: ")
