"""`optforge profile`: one short run, what it writes, and mistakes, which are found before anything is measured."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cli_runner import optforge
from conftest import require
from optforge import cli
from optforge.core.diagnostics import EnvironmentProblem, UsageError
from optforge.profile import charts, command, compare, document, page, peers, table, why

MINE = '''
from optforge import clip_by_global_norm, rule, sqrt


@rule
def mine(p, g, m=0.0, *, lr=1e-3, beta=0.9):
    """Momentum of <b>mine</b> & yours."""
    m = beta * m + g
    p = p - lr * m / sqrt(1 + m * m)
    return p, m


bounded = clip_by_global_norm(max_norm=2.0) >> mine
'''
RUN = ("--sizes", "lenet", "--threads", "1", "--seconds", "1")


@dataclass(frozen=True)
class Run:
    """What a run left."""

    directory: Path
    out: str
    document: dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    require("gcc")
    pytest.importorskip("matplotlib")
    directory = tmp_path_factory.mktemp("profile")
    (directory / "rules.py").write_text(MINE)
    files = ("--json", "run.json", "--png", "run.png", "--html", "run.html")
    out = optforge("profile", "rules.py:bounded", "adamw", "--against", "numpy", *RUN, *files, cwd=directory)
    return Run(directory, out, json.loads((directory / "run.json").read_text("utf-8")))


def test_the_document(run: Run) -> None:
    """Complete and of the schema, and read again as it was written."""
    made = run.document
    assert (made["schema"], made["version"]) == ("optforge-profile", 1)
    document.check(made)
    assert document.read(run.directory / "run.json") == made
    assert [rule["name"] for rule in made["rules"]] == ["clip_by_global_norm_mine", "adamw"]
    rows = [(row["rule"], row["work"], row["size"]["name"], row["threads"]) for row in made["rows"]]
    works = [("step", "lenet"), ("phase", "lenet")]
    assert rows == [(rule["name"], *work, 1) for rule in made["rules"] for work in works]
    for row in made["rows"]:
        assert row["ns"]["low"] <= row["ns"]["value"] <= row["ns"]["high"]
        assert row["bytes"] == (24 if "mine" in row["rule"] else 28 if row["work"] == "step" else 32)
        assert row["why"].endswith(".") and row["binds"] in page.ENGLISH
        low = row["rounds"]["low"]
        assert {*low} == {"kernel", "traffic", "divider"} and len({len(times) for times in low.values()}) == 1
        assert len(row["rounds"]["busy"]) == len(low["kernel"]) >= 3
    clipped = next(row for row in made["rows"] if row["rule"] != "adamw" and row["work"] == "step")
    assert [phase["reads"] for phase in clipped["phases"]] == [["g"], ["p", "g", "m"]]


def test_others_beside_it(run: Run) -> None:
    """Both ways to have gradients; a norm over all tensors is beyond a text that sees one at a time, which is said."""
    compared = [(row["rule"], row["size"]["name"], row["gradients"]) for row in run.document["peers"]]
    assert compared == [("adamw", "lenet", kind) for kind in ("same", "new")]
    assert all(result["apart"] <= 1 for row in run.document["peers"] for result in row["results"])
    assert any("reduces over all tensors together" in note for note in run.document["notes"])


def test_the_table(run: Run) -> None:
    for text in ("adamw, f32: step 28, phase 32 bytes per element", "Bandwidth of this machine", "of limit", "NumPy"):
        assert text in run.out
    assert max(map(len, table.kernels("x", run.document["rows"]).splitlines())) <= 110


class Page(HTMLParser):
    """What a page refers to, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.outside.append(str(value))


def test_the_page_stands_alone(run: Run) -> None:
    """It asks for nothing from elsewhere, is made for phones too, and what users wrote is text in it."""
    text = (run.directory / "run.html").read_text("utf-8")
    parsed = Page()
    parsed.feed(text)
    assert parsed.outside == [] and "script" not in parsed.tags and "table" in parsed.tags
    assert "@import" not in text and not re.search(r"url\((?!['\"]?#)", text)
    assert '<meta name="viewport"' in text
    assert "Momentum of &lt;b&gt;mine&lt;/b&gt; &amp; yours." in text and "<b>mine</b>" not in text
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 2 * (2 + 3)
    for picture in pictures:
        root = ET.fromstring(picture)
        assert root.get("viewBox") and root.get("width") is None
    for row in run.document["rows"]:
        assert table.digits(row["ns"]["value"]) in text


def test_charts_are_the_same_for_the_same_document(run: Run) -> None:
    """So pages differ where figures do."""
    [_, (title, draw), *_] = charts.of_rule(run.document, "adamw", "f32")
    assert title == charts.AGAINST and charts.svg(draw, charts.NARROW) == charts.svg(draw, charts.NARROW)


def test_the_picture(run: Run) -> None:
    assert (run.directory / "run.png").read_bytes().startswith(b"\x89PNG")


def test_compare_with_itself(run: Run) -> None:
    """An earlier run is read, and one that was a fifth faster is a regression, with exit code 1."""
    arguments = ("profile", "adamw", "--sizes", "lenet", "--threads", "1", "--seconds", "1", "--compare")
    before = json.loads(json.dumps(run.document))
    for row in before["rows"]:
        row["rounds"]["low"]["kernel"] = [0.5 * min(row["rounds"]["low"]["kernel"])] * 20
        row["rounds"]["low"]["divider"] = [min(row["rounds"]["low"]["divider"])] * 20
        row["rounds"]["low"]["traffic"] = [min(row["rounds"]["low"]["traffic"])] * 20
        row["traffic_ns"], row["divider_ns"] = 0.2, 0.4
    (run.directory / "faster.json").write_text(json.dumps(before))
    out = optforge(*arguments, "faster.json", "--json", "-", cwd=run.directory, code=1)
    compared = json.loads(out[out.index("{") :])["compared"]
    assert len(compared["rows"]) == 2 and any(row["slower"] for row in compared["rows"])
    assert "by more than 3% and the noise" in compared["text"]


def test_a_comparison_that_cannot_be_made_loses_nothing(run: Run) -> None:
    """What was measured is written, and what does not do of the other run is found before anything is measured."""
    other = json.loads(json.dumps(run.document))
    for row in other["rows"]:
        row["rule"] = "another"
    (run.directory / "other.json").write_text(json.dumps(other))
    arguments = ("profile", "sgd", "--sizes", "512", "--threads", "1", "--seconds", "1", "--json", "kept.json")
    optforge(*arguments, "--compare", "other.json", cwd=run.directory, code=2)
    assert document.read(run.directory / "kept.json")["rows"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda own: own["machine"].pop("processor"),
        lambda own: own["rows"][0]["rounds"].pop("low"),
        lambda own: own["rows"][0]["rounds"]["low"].update(kernel=["a"] * 9),
        lambda own: own["rows"][0]["size"].pop("name"),
        lambda own: own["rows"][0]["rounds"].update(laps="x"),
        lambda own: own["rows"][0]["size"].update(name=[1]),
    ],
)
def test_a_profile_that_was_changed_is_refused(damage: Callable[[Any], Any], run: Run, tmp_path: Path) -> None:
    other = json.loads(json.dumps(run.document))
    for row in other["rows"]:  # enough turns of an undisturbed machine
        row["contended"], row["rounds"]["low"] = False, {k: 4 * v for k, v in row["rounds"]["low"].items()}
    damage(other)
    (tmp_path / "x.json").write_text(json.dumps(other))
    with pytest.raises(UsageError, match=r"x\.json is no profile as it was written"):
        compare.read(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("adamwx",), 2, "did you mean 'adamw'?"),
        (("adamw", "--sizes", "L9"), 2, "--sizes L9: there is no such size; there are L1, L2"),
        (("adamw", "--threads", "0"), 2, "--threads 0: give whole numbers"),
        (("adamw", "--threads", "two"), 2, "--threads two"),
        (("adamw", "--against", "touch"), 2, "did you mean 'torch'?"),
        (("adamw", "--seconds", "0"), 2, "--seconds"),
        (("adamw", "--sizes", ""), 2, "--sizes is empty: give it a value, or leave it out"),
        (("adamw", "--threads", ","), 2, "--threads is empty"),
        (("adamw", "--json", "no/x.json"), 3, "no, where the profile is to go, is no directory"),
        (("adamw", "--threshold", "-1"), 2, "--threshold"),
        (("adamw", "--dtype", "f16"), 2, "there is no dtype 'f16'"),
        (("adamw", "--isa", "avx9"), 2, "--isa avx9: this machine and build have"),
        (("adamw", "--store", "p=bf16,g=bf16", "--against", "numpy"), 2, "--against compares float32 arrays"),
        (("adamw", "--compare", "none.json"), 2, "none.json"),
        (("adamw", "--compare", "bad.json"), 2, "bad.json is no JSON"),
        (("adamw", "--compare", "other.json"), 2, "other.json is no profile"),
        (("adamw", "--compare", "version.json"), 2, "has version 99 of the schema"),
        (("adamw", "--compare", "short.json"), 2, "rows is missing or is no list"),
        (("adamw", "--json", "nowhere/x.json"), 3, "nowhere"),
        (("adamw", "--set", "lr=x"), 2, "'x' is not a number"),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...],
    code: int,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command.run, "measure", lambda *_: pytest.fail("it measures"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "other.json").write_text('{"schema": "other"}')
    (tmp_path / "version.json").write_text('{"schema": "optforge-profile", "version": 99}')
    parts = {name: kind() for name, kind in document.PARTS.items() if name != "rows"}
    (tmp_path / "short.json").write_text(json.dumps({"schema": "optforge-profile", "version": 1, **parts}))
    with pytest.raises(SystemExit) as end:
        cli.main(["profile", *arguments])
    said = capsys.readouterr()
    assert end.value.code == code and not said.out
    assert says in said.err and "Traceback" not in said.err


def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that is asked for and is not there is an error; `all` are those that are."""
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name != "numpy" else True)
    with pytest.raises(EnvironmentProblem, match="pip install optax jax"):
        peers.chosen(["numpy", "optax"])
    assert [*peers.chosen(["all"])] == ["numpy"]
    with pytest.raises(UsageError, match="there are torch, "):
        peers.chosen(["x"])


# ── the sentence ────────────────────────────────────────────────────────────────────────────────────────────────────


def row(**changes: Any) -> dict[str, Any]:
    usual = {
        "rule": "adamw", "store": "f32", "work": "step", "size": {"name": "16M", "tensors": 1, "elements": 1 << 24},
        "threads": 1, "isa": "x86-64-v3", "cache": "warm", "level": "memory", "bytes": 28, "gbs": 40.0,
        "sums": 0, "operations": {"mul": 8, "div": 2, "sqrt": 1}, "ns": {"value": 1.0, "low": 0.99, "high": 1.01},
        "traffic_ns": 0.95, "divider_ns": 0.4, "share": {"value": 0.95}, "contended": False,
        "code": [{"vectorised": True, "unvectorised": ()}],
    }  # fmt: skip
    return usual | changes


IN_CACHE = {"level": "L2", "traffic_ns": 0.2, "share": {"value": 0.4}}


@pytest.mark.parametrize(
    ("changes", "binds", "says"),
    [
        ({}, "memory", "28 bytes of an element are moved at 40.0 GB/s, 95% of what"),
        ({"level": "L2"}, "memory", "The bandwidth of L2 binds"),
        ({**IN_CACHE, "divider_ns": 0.93}, "divider", "2 divisions and 1 root of an element take 0.93 of 1.00 ns"),
        ({**IN_CACHE, "size": {"tensors": 10_000, "elements": 640_000}}, "tensors", "38 ns for each"),
        ({**IN_CACHE, "code": [{"vectorised": False, "unvectorised": ("sqrt",)}]}, "code", "vectors of sqrt"),
        ({**IN_CACHE, "operations": {"exp": 1, "mul": 2}}, "functions", "(exp)"),
        (
            {**IN_CACHE, "work": "phase", "sums": 4},
            "statistics",
            "at least 0.60 are neither traffic nor division, but 4 totals",
        ),
        ({**IN_CACHE, "sums": 1}, "statistics", "1 total in double"),
        (IN_CACHE, "arithmetic", "Neither memory (20%) nor divider (40%)"),
        (IN_CACHE, "arithmetic", "operations of an element in x86-64-v3 together"),
        ({**IN_CACHE, "store": "f32_m_q8"}, "arithmetic", "in x86-64-v3, and conversions of formats, together"),
        ({"contended": True, "threads": 2}, "noise", "measure again"),
        ({"cache": "cold"}, "memory", "Memory binds"),
        ({"cache": "cold", "traffic_ns": 0.6, "size": {"tensors": 1, "elements": 1000}}, "cold", "400 ns of 1000 are"),
        ({"contended": True}, "memory", "Memory binds"),
        ({"contended": True, "ns": {"value": 1.0, "low": 0.8, "high": 1.3}}, "noise", "measure again"),
    ],
)
def test_why(changes: dict[str, Any], binds: str, says: str) -> None:
    own = row(**changes)
    assert why.binds(own) == binds
    assert says in why.why(own)


def test_rows_are_told_apart_where_they_are_named() -> None:
    one, two, cold = row(), row(threads=2), row(cache="cold")
    assert [table.place(own, [one]) for own in (one, cold)] == ["step 16M", "step 16M cold"]
    rows = [one, two, cold]
    assert [table.place(own, rows) for own in rows] == [
        "step 16M 1 thread",
        "step 16M 2 threads",
        "step 16M 1 thread cold",
    ]


def test_a_call_is_told_from_larger_tensors() -> None:
    small = row(**IN_CACHE, size={"name": "1k", "tensors": 1, "elements": 1000})
    large = row(**IN_CACHE, ns={"value": 0.5, "low": 0.5, "high": 0.5})
    assert why.binds(small, [small, large]) == "call"
    assert "500 ns of 1000 pass before the first element" in why.why(small, [small, large])
    assert why.binds(small, [small]) == "arithmetic"
