"""Transforms as a language: their own rules, names that clash, compositions in files and on the command line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from data import DTYPES, same
from native import defaults
from optforge import cli, mean, norm, scalar, sqrt, where
from optforge.core.diagnostics import RuleError, UsageError
from optimizing import TARGETS, everything

Run = Callable[..., tuple[int, str, str]]


# ── transforms of one's own ─────────────────────────────────────────────────────────────────────────────────────────


@of.transform
def smoothed(p, g, trail=0.0, start="p", first="g", rate: scalar = 1.0, *, t, lr, keep=0.5, pull=0.01, form="both"):
    """Everything that a transform may have: state of each kind, time, the rule's own rate, options."""
    assert 0 <= keep < 1
    rate = rate * keep
    trail = keep * trail + (1 - keep / t) * g
    first = first + 0.25 * (g - first)
    m = trail + rate * first
    if form != "gradient":
        p = p - lr * pull * (p - start)
    g = where(m > 0, m, 0.5 * m) + 0 * mean(g)
    return p, g, trail, start, first, rate


@of.rule
def ending(p, g, m=0.0, twin="g", *, t, lr=0.1, beta=0.5):
    """A rule whose local names are also those of the transform."""
    rate = lr / t
    m = beta * m + g + 0.125 * twin
    p = p - rate * m
    return p, m, twin


def by_hand(p: Any, g: Any, state: dict[str, Any], t: int, lr: float, form: str) -> tuple[Any, dict[str, Any]]:
    """`smoothed` before `ending`, with its defaults otherwise."""
    d = p.dtype.type
    new = dict(state)
    if t == 1:
        new |= {"trail": 0 * p, "start": p.copy(), "first": g.copy(), "rate": 1.0, "m": 0 * p}
    new["rate"] = new["rate"] * 0.5
    new["trail"] = d(0.5) * new["trail"] + d(1 - 0.5 / t) * g
    new["first"] = new["first"] + d(0.25) * (g - new["first"])
    m = new["trail"] + d(new["rate"]) * new["first"]
    if form == "both":
        p = p - d(lr * 0.01) * (p - new["start"])
    g = np.where(m > 0, m, d(0.5) * m) + d(0)
    if t == 1:
        new["twin"] = g.copy()
    new["m"] = d(0.5) * new["m"] + g + d(0.125) * new["twin"]
    return p - d(lr / t) * new["m"], new


@pytest.mark.parametrize("form", ["both", "gradient"])
def test_a_transform_with_everything(form: str) -> None:
    """Plain Python, the targets, and the same by hand."""
    made = smoothed >> ending if form == "both" else smoothed(form=form) >> ending
    assert list(made.state.items()) == [
        ("m", 0.0),
        ("twin", "g"),
        ("trail", 0.0),
        ("start", "p"),
        ("first", "g"),
        ("rate", 1.0),
    ]
    assert list(made.hyperparameters) == ["lr", "beta", "keep", "pull"]
    rng = np.random.default_rng(3)
    for dtype in DTYPES:
        p = rng.standard_normal(1500).astype(dtype)
        live = {target: p.copy() for target in TARGETS}
        opts = {target: of.Optimizer([live[target]], made, target=target, lr=0.3) for target in TARGETS}
        plain: Any = (p.copy(),)
        expected, state = p.copy(), {}
        for t in range(1, 4):
            g = rng.standard_normal(1500).astype(dtype)
            expected, state = by_hand(expected, g, state, t, 0.3, form)
            plain = made(plain[0], g, *plain[1:], t=t, lr=0.3)
            assert same(plain[0], expected)
            for target in TARGETS:
                opts[target].step([g])
                assert same(live[target], expected), target
                for name, value in zip(made.state, plain[1:], strict=True):
                    assert same(value, state[name]), name
                    if name != "start" or form == "both":  # what the option never touches takes no memory
                        assert same(opts[target].state[name][0], value), (target, name)


def test_a_transform_of_the_parameter_alone() -> None:
    @of.transform
    def shrunk(p, *, lr, share=0.5):
        p = p * (1 - lr * share)
        return p

    p, g = np.full(3, 8.0), np.full(3, 1.0)
    assert (shrunk >> of.rules.sgd)(p, g, lr=0.5).tolist() == [5.5] * 3
    for target in TARGETS:
        live = p.copy()
        of.Optimizer([live], shrunk >> of.rules.sgd, target=target, lr=0.5).step([g])
        assert live.tolist() == [5.5] * 3


def test_a_rule_may_see_the_parameter_a_transform_left() -> None:
    """`p` behind a transform that changes it is the changed one, in norms as well."""

    @of.transform
    def doubled(p, g):
        p = 2 * p
        g = g + p
        return p, g

    @of.rule
    def normed(p, g, *, lr=1.0):
        p = p - lr * g / norm(p)
        return p

    p, g = np.array([3.0, 4.0]), np.array([4.0, 2.0])
    expected = np.array([6.0, 8.0]) - np.array([10.0, 10.0]) / 10.0
    assert same((doubled >> normed)(p, g), expected)
    for target in TARGETS:
        live = p.copy()
        told = of.Optimizer([live], doubled >> normed, target=target).step([g], stats=True)
        assert same(live, expected)
        assert told.update_norm == np.sqrt(4.0 + 9.0)  # of what the transform did too


def test_attributes_of_transforms() -> None:
    assert of.transforms["clip_by_norm"] is of.transforms.clip_by_norm is of.clip_by_norm
    assert list(of.transforms) == sorted(of.transforms)
    assert {"clip_by_norm", "transform", "Transform", "transforms"} <= set(dir(of))
    assert repr(of.clip_by_norm) == "<optforge transform clip_by_norm>"
    assert of.clip_by_norm.doc.startswith("Scale the gradient of each tensor")
    assert of.clip_by_global_norm.options == {"form": "threshold"}
    assert of.clip_by_global_norm.accepts("form") == ("threshold", "pytorch", "lasagne")
    both = of.centralize >> of.clip_by_norm
    assert isinstance(both, of.Transform)
    assert both.name == "centralize_clip_by_norm"
    assert both(max_norm=2.0).hyperparameters == {"max_norm": 2.0}
    left, right = both >> of.rules.sgd, of.centralize >> (of.clip_by_norm >> of.rules.sgd)
    assert isinstance(left, of.Rule)
    assert left.hash == right.hash
    assert left.hash != (of.clip_by_norm >> of.centralize >> of.rules.sgd).hash
    assert left.origin == "centralize:clip_by_norm:sgd"
    with pytest.raises(AttributeError, match="there is no transform 'clip_by_nor'; did you mean 'clip_by_norm'"):
        of.transforms.clip_by_nor  # noqa: B018


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


@of.transform
def again(g, m=0.0, *, lr=0.5, share=0.5):
    """State and a hyperparameter that rules have too."""
    m = share * m + g
    g = m * lr
    return g, m


@of.transform
def optional(g, *, nesterov=True):
    if nesterov:
        g = g * 2
    return g


@of.transform
def borrowing(g, *, beta1):
    g = g * beta1
    return g


CLASHES: dict[str, tuple[Callable[[], Any], str]] = {
    "hyperparameter": (
        lambda: of.add_weight_decay >> of.rules.adamw,
        "'add_weight_decay' and 'adamw' both have 'weight_decay'",
    ),
    "lr": (lambda: again >> of.rules.sgd, "'again' and 'sgd' both have 'lr'"),
    "state": (lambda: again >> of.rules.adam, "'again' and 'adam' both have 'm'"),
    "of transforms": (lambda: of.clip_by_norm >> of.clip_by_global_norm >> of.rules.sgd, "both have 'max_norm'"),
    "twice": (
        lambda: of.clip_by_norm >> of.clip_by_norm(max_norm=2.0) >> of.rules.sgd,
        "'clip_by_norm' is there twice",
    ),
    "an option": (lambda: optional >> optional >> of.rules.sgd, "'optional' is there twice, and so is its 'nesterov'"),
    "borrowed": (
        lambda: borrowing >> of.rules.sgd,
        "takes 'beta1' from its rule, and rule 'sgd' has no hyperparameter 'beta1'",
    ),
}


@pytest.mark.parametrize(("make", "message"), CLASHES.values(), ids=CLASHES)
def test_names_that_mean_two_things(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        of.Optimizer([np.ones(3)], make(), target="numpy")


def test_a_transform_without_names_may_be_there_twice() -> None:
    p, g = np.zeros(2), np.array([1.0, 3.0])
    of.Optimizer([p], of.centralize >> of.centralize >> of.rules.sgd, target="numpy", lr=1.0).step([g])
    assert p.tolist() == [1.0, -1.0]


def test_a_borrowed_name_is_the_rule_s() -> None:
    made = borrowing >> of.rules.adam
    assert list(made.hyperparameters) == list(of.rules.adam.hyperparameters)
    borrowed_from_another = borrowing >> smoothed_beta >> of.rules.sgd
    assert borrowed_from_another.hyperparameters["beta1"] == 0.25


@of.transform
def smoothed_beta(g, *, beta1=0.25):
    g = g * beta1
    return g


def test_operands_that_are_refused() -> None:
    with pytest.raises(TypeError, match="adam is a rule, and a rule is last in a composition"):
        of.rules.adam >> of.clip_by_norm
    with pytest.raises(TypeError, match="adam is a rule, and a rule is last in a composition"):
        of.rules.adam >> of.rules.sgd
    for other in (3, "adam", sqrt, None):
        with pytest.raises(TypeError, match="behind a transform comes a transform or a rule"):
            of.clip_by_norm >> other
    with pytest.raises(TypeError, match="a rule is made by @rule"):
        of.Optimizer([np.ones(3)], of.clip_by_norm, target="numpy")  # type: ignore[arg-type]


def test_settings_that_are_refused() -> None:
    clip = of.clip_by_global_norm
    with pytest.raises(
        TypeError, match=re.escape("takes settings by name, such as clip_by_global_norm(max_norm=50.0), and no arrays")
    ):
        clip(np.ones(3), np.ones(3))
    with pytest.raises(TypeError, match="has no hyperparameter 'max_nrm'; did you mean 'max_norm'"):
        clip(max_nrm=1.0)
    with pytest.raises(TypeError, match="has no hyperparameter 'lr'"):
        of.decoupled_weight_decay(lr=1.0)
    with pytest.raises(ValueError, match="hyperparameter 'max_norm' is NaN"):
        clip(max_norm=float("nan"))
    with pytest.raises(TypeError, match="hyperparameter 'max_norm' is a number, not 'big'"):
        clip(max_norm="big")
    with pytest.raises(ValueError, match="takes 'threshold' or 'pytorch' or 'lasagne', not 'tensorflow'"):
        clip(form="tensorflow")
    for value in (0, -1.0):
        with pytest.raises(ValueError, match="needs max_norm > 0"):
            of.Optimizer([np.ones(3)], clip(max_norm=value) >> of.rules.sgd, target="numpy")
        opt = of.Optimizer([np.ones(3)], clip >> of.rules.sgd, target="numpy")
        with pytest.raises(ValueError, match="needs max_norm > 0"):
            opt.max_norm = value
        assert opt.max_norm == 50.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def mine(x):\n    return x", "a transform's first parameters are p, g, or one of them"),
        ("def mine(g, p):\n    return g", "'p' comes first"),
        ("def mine(p):\n    g = p\n    return g", "returns what it changes of p and g"),
        ("def mine(g):\n    p = g\n    return p", "returns what it changes of p and g"),
        ("def mine(g, m=0.0):\n    g = m\n    return g", "returns what it changes of p and g, and every state"),
        ("def mine(p, g):\n    return g, p", "in the order of the signature"),
        ("def mine(g, m='p'):\n    m = g\n    return g, m", "state 'm' cannot start as 'p'"),
        ("def mine(g, *, lr):\n    assert g > lr\n    return g", "an assert is about hyperparameters"),
        ("def mine(g, *, lr):\n    lr = 2\n    return g", "hyperparameter 'lr' cannot be rebound"),
        ("def mine(g, *, stats=1.0):\n    return g", "'stats' is reserved"),
        ("def mine(g, *, t=1):\n    return g", "t has no default"),
        ("def mine(g):\n    g = q\n    return g", "unknown name 'q'"),
    ],
)
def test_transforms_that_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"from optforge import rules, transform\n\n\n@transform\n{text}\n\n\nmade = mine >> rules.sgd\n")
    with pytest.raises(RuleError) as refused:
        of.Rule.from_file(path, "made")
    assert message in str(refused.value)
    assert "^" in str(refused.value)


def test_an_error_shows_when_the_composition_is_used() -> None:
    @of.transform
    def wrong(g):
        g = g + unknown  # noqa: F821
        return g

    made = wrong >> of.rules.sgd
    with pytest.raises(RuleError, match="unknown name 'unknown'"):
        made.kernel()


# ── compositions in files ───────────────────────────────────────────────────────────────────────────────────────────

FILE = """
raise SystemExit("executed")
import optforge
import optforge as of
from optforge import clip_by_global_norm, clip_by_norm, clip_by_norm as clip
from optforge import norm, rule, rules, transform
from optforge import rules as book


@rule
def mine(p, g, *, lr=0.1):
    p = p - lr * g
    return p


@of.transform
def double(g, *, by=2.0):
    g = g * by
    return g


named = clip(max_norm=3.0)
both = named >> double
NAME = {}
"""
SPELLED: dict[str, tuple[str, dict[str, float]]] = {
    "clip(max_norm=2.0) >> mine": ("clip_by_norm_mine", {"max_norm": 2.0}),
    "clip_by_norm >> rules.adam": ("clip_by_norm_adam", {"max_norm": 1.0}),
    'clip_by_norm(max_norm=2) >> rules["adam"]': ("clip_by_norm_adam", {"max_norm": 2.0}),
    "of.clip_by_norm >> of.rules.adam": ("clip_by_norm_adam", {"max_norm": 1.0}),
    'of.clip_by_norm >> of.rules["lamb"]': ("clip_by_norm_lamb", {"max_norm": 1.0}),
    "optforge.clip_by_norm(max_norm=1e-3) >> optforge.rules.sgd": ("clip_by_norm_sgd", {"max_norm": 1e-3}),
    "clip >> book.sgd": ("clip_by_norm_sgd", {"max_norm": 1.0}),
    "named >> mine": ("clip_by_norm_mine", {"max_norm": 3.0}),
    "both >> mine": ("clip_by_norm_double_mine", {"max_norm": 3.0, "by": 2.0}),
    "both(by=-1/4) >> mine": ("clip_by_norm_double_mine", {"max_norm": 3.0, "by": -0.25}),
    "double >> (clip >> mine)": ("double_clip_by_norm_mine", {"max_norm": 1.0, "by": 2.0}),
    "(double >> clip)(max_norm=2**3) >> mine": ("double_clip_by_norm_mine", {"max_norm": 8.0, "by": 2.0}),
    "clip(max_norm=2.0)(max_norm=3.0) >> mine": ("clip_by_norm_mine", {"max_norm": 3.0}),
    'clip_by_global_norm(form="lasagne", max_norm=7.0) >> double() >> mine': (
        "clip_by_global_norm_double_mine",
        {"max_norm": 7.0, "by": 2.0},
    ),
    "mine": ("mine", {}),
    "rules.adam": ("adam", {}),
}


@pytest.mark.parametrize("text", SPELLED)
def test_compositions_in_a_file(text: str, tmp_path: Path) -> None:
    """Read and not executed."""
    path = tmp_path / "mine.py"
    path.write_text(FILE.format(text))
    name, hyper = SPELLED[text]
    made = of.Rule.from_file(path, "NAME")
    assert made.name == name
    own = {k: v for k, v in made.hyperparameters.items() if k in ("max_norm", "by")}
    assert own == hyper
    if "form" in text:
        assert made.options == {"form": "lasagne"}
    assert made.kernel().name == name


def test_a_composition_of_a_file_is_the_imported_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FILE.format('clip_by_global_norm(max_norm=2.0, form="pytorch") >> rules.adam'))
    read = of.Rule.from_file(path, "NAME")
    made = of.clip_by_global_norm(max_norm=2.0, form="pytorch") >> of.rules.adam
    assert read.hash == made.hash
    assert read.generate() == made.generate()
    a = of.Optimizer([np.ones(5)], read, target="numpy")
    b = of.Optimizer([np.ones(5)], made, target="numpy")
    for opt in (a, b):
        opt.step([np.arange(5.0)])
    b.load_state_dict(a.state_dict())
    assert everything(a) == everything(b)
    assert a.max_norm == 2.0


# The text, where the caret stands (the text under it), and what is said.
REFUSED: dict[str, tuple[str, str]] = {
    "mine >> clip": ("mine", "a rule is last in a composition"),
    "rules.adam >> mine": ("rules.adam", "a rule is last in a composition"),
    "clip >> norm": ("norm", "'NAME' is not a rule, nor a composition"),
    "clip >> 3": ("3", "'NAME' is not a rule, nor a composition"),
    "clip >> nothing": ("nothing", "'NAME' is not a rule, nor a composition"),
    "clip >> rules.adm": ("rules.adm", "'NAME' is not a rule, nor a composition"),
    "clip >> rules": ("rules", "'NAME' is not a rule, nor a composition"),
    "clip >> rules.adam.function": ("rules.adam.function", "'NAME' is not a rule, nor a composition"),
    "clip + mine": ("clip + mine", "'NAME' is not a rule, nor a composition"),
    "clip << mine": ("clip << mine", "'NAME' is not a rule, nor a composition"),
    "[clip, mine]": ("[clip, mine]", "'NAME' is not a rule, nor a composition"),
    "clip >> mine if True else mine": ("clip >> mine if True else mine", "'NAME' is not a rule, nor a composition"),
    "print('x') or clip >> mine": ("print('x') or clip >> mine", "'NAME' is not a rule, nor a composition"),
    "clip(2.0) >> mine": ("clip(2.0)", "'NAME' is not a rule, nor a composition"),
    "clip(max_norm=bound) >> mine": ("bound", "the setting 'max_norm' must be literal arithmetic"),
    "clip(max_norm=float('2')) >> mine": ("float('2')", "the setting 'max_norm' must be literal arithmetic"),
    "clip(max_norm=1/0) >> mine": ("1/0", "division by zero"),
    "clip(max_norm=1e999) >> mine": ("1e999", "the constant overflows a double"),
    "clip(**{'max_norm': 1}) >> mine": ("{'max_norm': 1}", "settings are written out"),
    "clip(max=2.0) >> mine": ("clip", "transform 'clip_by_norm' has no hyperparameter 'max'"),
    "clip(max_norm='x') >> mine": ("clip", "hyperparameter 'max_norm' is a number, not 'x'"),
    "clip_by_global_norm(form='x') >> mine": (
        "clip_by_global_norm",
        "takes 'threshold' or 'pytorch' or 'lasagne', not 'x'",
    ),
    "clip >> clip >> mine": ("clip >> clip", "'clip_by_norm' is there twice"),
    "clip >> clip_by_global_norm >> mine": ("clip >> clip_by_global_norm", "both have 'max_norm'"),
    "of.add_weight_decay >> rules.lamb": ("of.add_weight_decay >> rules.lamb", "both have 'weight_decay'"),
    "NAME": ("NAME = NAME", "'NAME' is not a rule"),
    "clip >> NAME": ("NAME = clip >> NAME", "'NAME' is not a rule"),
}


@pytest.mark.parametrize("text", REFUSED)
def test_compositions_that_are_refused_in_a_file(text: str, tmp_path: Path) -> None:
    """With the line, and the caret under what is meant; nothing is executed."""
    path = tmp_path / "mine.py"
    path.write_text(FILE.format(text))
    under, message = REFUSED[text]
    with pytest.raises(RuleError) as refused:
        of.Rule.from_file(path, "NAME")
    head, line, caret, *_ = str(refused.value).split("\n")
    number = FILE.split("\n").index("NAME = {}") + 1
    assert head.startswith(f"{path}:{number}:{caret.index('^') + 1}: error: ")
    assert message in head
    assert line == f"NAME = {text}"
    assert line[caret.index("^") : caret.rindex("^") + 1] == under


def test_transforms_alone_are_no_rule(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FILE.format("clip >> double"))
    for name in ("NAME", "named", "double"):
        with pytest.raises(UsageError, match=f"mine.py:{name}' is a transform; a rule is needed behind it"):
            of.Rule.from_file(path, name)
    with pytest.raises(UsageError, match="has no rule 'nam'"):
        of.Rule.from_file(path, "nam")


def test_a_local_function_hides_what_the_package_has(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        FILE.replace("def double", "def clip_by_norm").replace("double", "clip_by_norm").format("clip_by_norm >> mine")
    )
    assert of.Rule.from_file(path, "NAME").hyperparameters == {"lr": 0.1, "by": 2.0}


# ── the command line ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in a directory that has mine.py; gives the exit code and what was printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE.format("clip(max_norm=2.0) >> double >> mine"))

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(list(arguments))
        said = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, said.out, said.err

    return run


def test_show_a_composition(run: Run) -> None:
    code, out, err = run("show", "clip_by_global_norm:adam")
    assert (code, err) == (0, "")
    assert out.startswith("clip_by_global_norm_adam: clip_by_global_norm >> adam.\n")
    for line in (
        "    # clip_by_global_norm",
        "    # adam",
        "    max_norm = 50.0",
        "    form = threshold    (threshold or pytorch or lasagne)",
        "    phase 1: reads g, writes -, adds up squares of g: 4 bytes (float), 8 bytes (double)",
        "    phase 2: reads p g m v, writes p m v: 28 bytes (float), 56 bytes (double)",
        "    together: 32 bytes (float), 64 bytes (double)",
        f"Hash: {(of.clip_by_global_norm >> of.rules.adam).hash}",
    ):
        assert f"\n{line}\n" in out


@pytest.mark.parametrize(
    ("name", "phases", "together"),
    [("lamb", [24, 16], 40), ("lars", [8, 20], 28), ("novograd", [4, 20], 24)],
)
def test_show_the_passes(name: str, phases: list[int], together: int, run: Run) -> None:
    code, out, _ = run("show", name)
    assert code == 0
    assert [int(b) for b in re.findall(r"\n    phase \d: .*: (\d+) bytes \(float\)", out)] == phases
    assert [int(b) for b in re.findall(r"\n    phase \d: .* (\d+) bytes \(double\)", out)] == [2 * b for b in phases]
    assert f"\n    together: {together} bytes (float), {2 * together} bytes (double)\n" in out
    kernel = of.rules[name].kernel()
    assert 4 * (kernel.moved[0] + kernel.moved[1]) == together
    usual = [phase for phase in kernel.phases if not phase.optional]
    assert [4 * (len(phase.loads) + len(phase.stores)) for phase in usual] == phases


def test_generate_a_composition_of_a_file(run: Run, tmp_path: Path) -> None:
    assert run("generate", "mine.py:NAME", "--out", "a")[0] == 0
    assert run("generate", "clip_by_norm:mine.py:double:mine.py:mine", "--set", "max_norm=2.0", "--out", "b")[0] == 0
    made = of.Rule.from_file("mine.py", "NAME")
    assert made.origin == "clip_by_norm:mine.py:double:mine.py:mine"
    for name, text in made.generate().items():
        assert (tmp_path / "a" / name).read_text() == text
        assert (tmp_path / "b" / name).read_text() == text
    emitted = (tmp_path / "b" / f"{made.name}.h").read_text()
    assert "optforge generate clip_by_norm:mine.py:double:mine.py:mine" in emitted
    assert "--set max_norm=2.0" in emitted
    assert run("generate", "mine.py:NAME", "--out", "a", "--check")[0] == 0
    assert run("generate", "mine.py:NAME", "--set", "by=3", "--out", "a", "--check")[0] == 1


MISTAKES: dict[str, tuple[str, str]] = {
    "a rule first": ("adam:clip_by_norm", "adam is a rule, and a rule is last in a composition"),
    "two rules": ("adam:sgd", "adam is a rule, and a rule is last in a composition"),
    "no rule": ("clip_by_norm", "'clip_by_norm' is a transform; a rule is needed behind it, as in clip_by_norm:adam"),
    "unknown rule": ("clip_by_norm:adm", "there is no rule 'adm'; did you mean 'adam'?"),
    "unknown transform": ("clip_by_nrm:adam", "there is no transform 'clip_by_nrm'; did you mean 'clip_by_norm'?"),
    "a clash": ("add_weight_decay:adamw", "'add_weight_decay' and 'adamw' both have 'weight_decay'"),
    "twice": ("clip_by_norm:mine.py:NAME", "'clip_by_norm' is there twice"),
    "nothing behind": ("clip_by_norm:", "''"),
    "nothing before": (":adam", "''"),
    "a file alone": ("clip_by_norm:mine.py", "mine.py:NAME"),
    "transforms of a file": ("mine.py:both", "'mine.py:both' is a transform"),
    "a rule of a file first": ("mine.py:mine:adam", "is a rule, and a rule is last in a composition"),
}


@pytest.mark.parametrize(("name", "message"), MISTAKES.values(), ids=MISTAKES)
def test_compositions_that_the_command_line_refuses(name: str, message: str, run: Run, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run("generate", name)
    assert (code, out) == (2, "")
    assert err.startswith("optforge: error: ")
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


def test_settings_of_a_composition(run: Run, tmp_path: Path) -> None:
    code, _, err = run("generate", "clip_by_global_norm:adam", "--set", "max_norm=-3")
    assert code == 2
    assert "max_norm > 0" in err
    assert (
        run("generate", "clip_by_global_norm:adam", "--set", "form=lasagne", "--set", "max_norm=3", "--prefix", "x")[0]
        == 0
    )
    text = (tmp_path / "build" / "x.c").read_text()
    assert text == (of.clip_by_global_norm >> of.rules.adam).generate(prefix="x", max_norm=3.0, form="lasagne")["x.c"]
    assert defaults(text)["max_norm"] == 3.0
    assert "Options: form=lasagne." in (tmp_path / "build" / "x.h").read_text()
