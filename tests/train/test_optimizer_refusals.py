"""What an Optimizer refuses: the exception says what is wrong and where, and nothing has changed."""

from __future__ import annotations

import array
import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import optforge as of
from optforge import Optimizer, RuleError, rule, scalar
from optforge.core.diagnostics import ScalarError, UsageError
from optimizing import (
    SETTINGS,
    TARGETS,
    Elsewhere,
    Exporter,
    FakeTensor,
    Judge,
    bits,
    brittle,
    everything,
    nadam,
    small,
)


@contextmanager
def refused(error: type[Exception], message: str, *unchanged: Any) -> Iterator[None]:
    """Exactly this exception is raised, with a message of one line that matches, and the bits stay as they are."""
    before = [everything(each) if isinstance(each, Optimizer) else bits(each) for each in unchanged]
    with pytest.raises(error, match=message) as refusal:
        yield
    assert type(refusal.value) is error
    assert "\n" not in str(refusal.value)
    assert [everything(each) if isinstance(each, Optimizer) else bits(each) for each in unchanged] == before


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def trained(target: str) -> Optimizer:
    """An Optimizer in the middle of training, the last of whose tensors has not started."""
    opt = Optimizer(small(1), nadam, target=target, **SETTINGS)
    for seed in (2, 3):
        opt.step([*small(seed)[:5], None if target != "cuda" else small(seed)[5]])
    return opt


# ── parameters ──────────────────────────────────────────────────────────────────────────────────────────────────────


def read_only() -> Any:
    fixed = np.ones(3)
    fixed.setflags(write=False)
    return fixed


BAD_ARRAYS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "int": (lambda: np.ones(3, int), TypeError, "is int64; it must be float32, float64, bfloat16 or float16"),
    "bits": (lambda: np.ones(3, np.uint16), TypeError, "is uint16"),
    "other byte order": (lambda: np.ones(3, np.dtype("f8").newbyteorder()), TypeError, "is [<>]f8"),
    "complex": (lambda: np.ones(3, complex), TypeError, "is complex128"),
    "object": (lambda: np.ones(3, object), TypeError, "is object"),
    "masked": (lambda: np.ma.ones(3), TypeError, "is a masked array"),
    "list": (lambda: [1.0, 2.0, 3.0], TypeError, "is a list"),
    "string": (lambda: "abc", TypeError, "is a str"),
    "float": (lambda: 1.0, TypeError, "is a float"),
    "on a device": (lambda: Elsewhere(np.ones(3)), TypeError, "is an Elsewhere"),
    "not contiguous": (lambda: np.ones(6)[::2], ValueError, "is not C-contiguous"),
    "unaligned": (lambda: np.frombuffer(bytearray(25), float, 3, 1), ValueError, "is not aligned"),
}


@pytest.mark.parametrize("name", [*BAD_ARRAYS, "read-only", "None"])
def test_a_bad_parameter(name: str) -> None:
    more = {
        "read-only": (read_only, ValueError, "is read-only"),
        "None": (lambda: None, TypeError, "is a NoneType"),
    }
    make, error, message = {**BAD_ARRAYS, **more}[name]
    fine = np.ones(3)
    with refused(error, rf"^params\[1\] {message}", fine):
        Optimizer([fine, make()], "sgd", target="numpy")
    with refused(error, rf"^params\['b'\] {message}", fine):
        Optimizer({"a": fine, "b": make()}, "sgd", target="numpy")


BAD_PARAMS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "array": (lambda: np.ones(3), TypeError, "^params must be a list, tuple or dict of arrays, not an ndarray$"),
    "tensor": (lambda: Exporter(np.ones(3)), TypeError, "^params must be .*, not an Exporter$"),
    "buffer": (lambda: array.array("f", [1.0]), TypeError, "^params must be .*, not an array$"),
    "string": (lambda: "weights", TypeError, "^params must be .*, not a str$"),
    "bytes": (lambda: b"weights", TypeError, "^params must be .*, not a bytes$"),
    "number": (lambda: 1.0, TypeError, "^params must be .*, not a float$"),
    "None": (lambda: None, TypeError, "^params must be .*, not a NoneType$"),
    "set": (lambda: {FakeTensor(np.ones(3))}, TypeError, "^params must be .*, not a set$"),
    "keys": (lambda: {"a": np.ones(3)}.keys(), TypeError, "^params must be .*, not a dict_keys$"),
    "empty list": (list, ValueError, "^params is empty"),
    "empty dict": (dict, ValueError, "^params is empty"),
    "empty generator": (lambda: iter(()), ValueError, "^params is empty"),
    "nested": (lambda: [[np.ones(3)]], TypeError, r"^params\[0\] is a list"),
    "named": (lambda: {"a": np.ones(3)}.items(), TypeError, "^params must be .*, not a dict_items$"),
}


@pytest.mark.parametrize("name", BAD_PARAMS)
def test_bad_parameters(name: str) -> None:
    make, error, message = BAD_PARAMS[name]
    with refused(error, message):
        Optimizer(make(), "sgd", target="numpy")


def test_parameters_that_overlap() -> None:
    memory = np.ones(10)
    with refused(ValueError, r"^params\[0\] and params\[2\] overlap in memory$", memory):
        Optimizer([memory[:5], np.ones(2), memory[4:]], "sgd", target="numpy")
    with refused(ValueError, r"^params\['a'\] and params\['b'\] overlap in memory$", memory):
        Optimizer({"a": memory, "b": memory}, "sgd", target="numpy")
    Optimizer([memory[:5], memory[5:], memory[3:3]], "sgd", target="numpy")


# ── what else is given at construction ──────────────────────────────────────────────────────────────────────────────

BAD_SETTINGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lrr": 0.1}, TypeError, "^rule 'nadam' has no hyperparameter 'lrr'; did you mean 'lr'[?]$"),
    ({"nestrov": True}, TypeError, "no hyperparameter 'nestrov'; did you mean 'nesterov'[?]$"),
    ({"zzz": 1}, TypeError, "no hyperparameter 'zzz'; it has lr, beta, psi, floor, nesterov, average$"),
    ({"t": 3}, TypeError, "no hyperparameter 't'"),
    ({"lr": math.nan}, ValueError, "^hyperparameter 'lr' is NaN$"),
    ({"lr": float("nan")}, ValueError, "^hyperparameter 'lr' is NaN$"),
    ({"lr": "x"}, TypeError, "^hyperparameter 'lr' is a number, not 'x'$"),
    ({"lr": None}, TypeError, "^hyperparameter 'lr' is a number, not None$"),
    ({"lr": 1j}, TypeError, "^hyperparameter 'lr' is a number, not 1j$"),
    ({"lr": [0.1]}, TypeError, "^hyperparameter 'lr' is a number, not "),
    ({"lr": 10**400}, ValueError, "^hyperparameter 'lr' is beyond the range of a double$"),
    ({"beta": 1.0}, ValueError, r"^rule 'nadam' needs 0 <= beta < 1; given are beta=1\.0$"),
    ({"floor": -1}, ValueError, r"^rule 'nadam' needs floor > 0; given are floor=-1\.0$"),
    ({"nesterov": 1}, UsageError, "^option 'nesterov' of rule 'nadam' takes True or False, not 1$"),
    ({"nesterov": None}, UsageError, "^option 'nesterov' .* not None$"),
    ({"average": "fast"}, UsageError, "^option 'average' of rule 'nadam' takes 'slow' or 'off', not 'fast'$"),
    ({"threads": 0}, ValueError, "^threads is a number from 1, not 0$"),
    ({"threads": -1}, ValueError, "^threads is a number from 1, not -1$"),
    ({"threads": 1.5}, TypeError, r"^threads is None or a whole number, not 1\.5$"),
    ({"threads": True}, TypeError, "^threads is None or a whole number, not True$"),
    ({"threads": "2"}, TypeError, "^threads is None or a whole number, not '2'$"),
    ({"target": "nump"}, UsageError, "^there is no target 'nump'; did you mean 'numpy'[?]$"),
    ({"target": 5}, TypeError, "^target is .*, not an int$"),
    ({"target": None}, TypeError, "^target is .*, not a NoneType$"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD_SETTINGS, ids=lambda value: str(value)[:30])
def test_a_bad_setting(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    params = small(1)
    with refused(error, message, params):
        Optimizer(params, nadam, **{"target": "numpy", **settings})


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("adma", UsageError, "^there is no rule 'adma'; did you mean 'adam'[?]$"),
        ("", UsageError, "^there is no rule ''; there are .*adam"),
        (None, TypeError, "^a rule is made by @rule, or is the name of a built-in one, not a NoneType$"),
        (nadam.function, TypeError, "^a rule is made by @rule.*, not a function: write @rule .* above nadam$"),
        (of.Rule, TypeError, "^a rule is made by @rule.*, not a type$"),
        (5, TypeError, "^a rule is made by @rule.*, not an int$"),
    ],
)
def test_a_bad_rule(given: Any, error: type[Exception], message: str) -> None:
    with refused(error, message):
        Optimizer(small(1), given, target="numpy")


@rule
def broken(p, g, *, lr=0.1):
    """Not a rule of the language."""
    for _ in range(3):
        p = p - lr * g
    return p


@pytest.mark.parametrize("clashing", ["method", "attribute"])
def test_a_hyperparameter_that_could_not_be_read(clashing: str) -> None:
    given, name = {"method": (hiding_method, "_prepare"), "attribute": (hiding_attribute, "_plan")}[clashing]
    with refused(UsageError, f"^the Optimizer uses the name '{name}' of rule 'hiding_{clashing}' itself"):
        Optimizer(small(1), given, target="numpy")


@rule
def hiding_method(p, g, *, _prepare=0.1):
    """A name that is in use."""
    p = p - _prepare * g
    return p


@rule
def hiding_attribute(p, g, *, _plan=True):
    """A name that is in use."""
    p = p - g if _plan else p + g
    return p


def test_a_rule_that_was_refused() -> None:
    params = small(1)
    before = bits(params)
    with pytest.raises(RuleError, match=r"test_optimizer_refusals\.py:\d+:5: error: "):
        Optimizer(params, broken, target="numpy")
    assert bits(params) == before


@pytest.mark.parametrize("name", ["skip_nonfinite", "zero_grads"])
@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_switches_are_truth_values(name: str, value: object) -> None:
    with refused(TypeError, f"^{name} is True or False, not {value!r}$"):
        Optimizer(small(1), nadam, target="numpy", **{name: value})


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), 1e-320, 10**400])
def test_a_loss_scale_is_positive_with_a_finite_inverse(value: float, trained: Optimizer) -> None:
    with refused(ValueError, "^grad_scale is a positive number with a finite inverse, not ", trained):
        trained.step(small(2), grad_scale=value)


def test_a_loss_scale_is_a_number(trained: Optimizer) -> None:
    with refused(TypeError, "^grad_scale is a number, not 'x'$", trained):
        trained.step(small(2), grad_scale="x")


def test_a_hyperparameter_that_no_assert_can_judge() -> None:
    with refused(ScalarError, "division by zero"):
        Optimizer(small(1), inverse, target="numpy", lr=0)
    opt = Optimizer(small(1), inverse, target="numpy", lr=0.5)
    with refused(ScalarError, "division by zero", opt):
        opt.lr = 0


@rule
def inverse(p, g, *, lr=0.1):
    """An assert that has no value at 0."""
    assert 1 / lr > 0
    p = p - lr * g
    return p


# ── attributes ──────────────────────────────────────────────────────────────────────────────────────────────────────

BAD_VALUES: list[tuple[str, Any, type[Exception], str]] = [
    ("lr", math.nan, ValueError, "^hyperparameter 'lr' is NaN$"),
    ("lr", "x", TypeError, "^hyperparameter 'lr' is a number, not 'x'$"),
    ("lr", None, TypeError, "^hyperparameter 'lr' is a number, not None$"),
    ("beta", 1, ValueError, r"^rule 'nadam' needs 0 <= beta < 1; given are beta=1\.0$"),
    ("floor", 0.0, ValueError, r"^rule 'nadam' needs floor > 0; given are floor=0\.0$"),
    ("nesterov", False, ValueError, "^option 'nesterov' was fixed when the kernel was generated"),
    ("nesterov", True, ValueError, "^option 'nesterov' was fixed when the kernel was generated"),
    ("average", "off", ValueError, "^option 'average' was fixed"),
    ("lrr", 1, AttributeError, "^'lrr' is not a hyperparameter; did you mean 'lr'[?] "),
    ("gamma", 1, AttributeError, r"^'gamma' is not a hyperparameter \(there are lr, beta, psi, floor, t\)$"),
    ("params", [], AttributeError, "^'params' of an Optimizer cannot be set$"),
    ("rule", "adam", AttributeError, "^'rule' of an Optimizer cannot be set$"),
    ("state", {}, AttributeError, "^'state' of an Optimizer cannot be set$"),
    ("step", None, AttributeError, "^'step' of an Optimizer cannot be set$"),
    ("threads", 2, AttributeError, "^'threads' of an Optimizer cannot be set$"),
    ("target", "c", AttributeError, "^'target' of an Optimizer cannot be set$"),
    ("t", -1, ValueError, "^t counts steps, and cannot be -1$"),
    ("t", 2**63, ValueError, "^t counts steps, and cannot be 9223372036854775808$"),
    ("t", 1.0, TypeError, r"^t is a whole number, not 1\.0$"),
    ("t", True, TypeError, "^t is a whole number, not True$"),
    ("t", "1", TypeError, "^t is a whole number, not '1'$"),
    ("t", None, TypeError, "^t is a whole number, not None$"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_VALUES, ids=lambda value: str(value)[:30])
def test_a_bad_attribute(name: str, value: Any, error: type[Exception], message: str) -> None:
    opt = Optimizer(small(1), nadam, target="numpy", **SETTINGS)
    opt.step(small(2))
    before = opt.params, opt.rule, opt.threads, opt.target, opt.nesterov, opt.average
    with refused(error, message, opt):
        setattr(opt, name, value)
    after = opt.params, opt.rule, opt.threads, opt.target, opt.nesterov, opt.average
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_an_attribute_that_is_not_there() -> None:
    opt = Optimizer(small(1), nadam, target="numpy")
    with refused(AttributeError, "^Optimizer has no attribute 'lrr'; did you mean 'lr'[?]$"):
        opt.lrr  # noqa: B018
    with refused(AttributeError, "^Optimizer has no attribute 'gamma'$"):
        opt.gamma  # noqa: B018
    assert not hasattr(Optimizer.__new__(Optimizer), "lr")


def test_two_optimizers_do_not_share_state(trained: Optimizer) -> None:
    with refused(TypeError, r"^two Optimizers cannot share .*copy\.deepcopy\(\)", trained):
        copy.copy(trained)


# ── gradients ───────────────────────────────────────────────────────────────────────────────────────────────────────


def wrong(k: int, gradient: Any, grads: list[Any] | None = None) -> list[Any]:
    """Gradients of `small` arrays of which one is another."""
    grads = small(4) if grads is None else grads
    grads[k] = gradient
    return grads


@pytest.mark.parametrize("name", BAD_ARRAYS)
@pytest.mark.parametrize("k", [0, 4, 5], ids=["first", "double", "not started"])
def test_a_bad_gradient(name: str, k: int, trained: Optimizer) -> None:
    make, error, message = BAD_ARRAYS[name]
    for _ in range(2):
        with refused(error, rf"^grads\[{k}\] {message}", trained):
            trained.step(wrong(k, make()))


@pytest.mark.parametrize(
    ("k", "make", "error", "message"),
    [
        (0, lambda: np.ones((7, 5), "f4"), ValueError, r"has the shape \(7, 5\), its parameter \(5, 7\)"),
        (0, lambda: np.ones(35, "f4"), ValueError, r"has the shape \(35,\), its parameter \(5, 7\)"),
        (1, lambda: np.ones(1), ValueError, r"has the shape \(1,\), its parameter \(\)"),
        (2, lambda: np.ones((3, 0), "f4"), ValueError, r"has the shape \(3, 0\), its parameter \(0, 3\)"),
        (0, lambda: np.ones((5, 7)), TypeError, "is float64, its parameter float32"),
        (4, lambda: np.ones(33, "f4"), TypeError, "is float32, its parameter float64"),
    ],
)
def test_a_gradient_unlike_its_parameter(
    k: int, make: Callable[[], Any], error: type[Exception], message: str, trained: Optimizer
) -> None:
    with refused(error, rf"^grads\[{k}\] {message}", trained):
        trained.step(wrong(k, make()))


def test_a_gradient_that_overlaps_what_is_written(trained: Optimizer) -> None:
    p = trained.params
    m, slow = trained.state["m"], trained.state["slow"]
    with refused(ValueError, r"^grads\[0\] and params\[0\] overlap in memory$", trained):
        trained.step(wrong(0, p[0]))
    with refused(ValueError, r"^grads\[4\] and params\[4\] overlap in memory$", trained):
        trained.step(wrong(4, p[4].view(np.recarray)))
    with refused(ValueError, r"^grads\[3\] and params\[0\] overlap in memory$", trained):
        trained.step(wrong(3, p[0].reshape(-1)[34:]))
    with refused(ValueError, r"^grads\[0\] and state\['m'\]\[0\] overlap in memory$", trained):
        trained.step(wrong(0, m[0]))
    with refused(ValueError, r"^grads\[3\] and state\['slow'\]\[0\] overlap in memory$", trained):
        trained.step(wrong(3, slow[0].reshape(-1)[:1]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: [], ValueError, "^grads has 0 arrays, params has 6$"),
        (lambda: (), ValueError, "^grads has 0 arrays, params has 6$"),
        (lambda: iter(()), ValueError, "^grads has 0 arrays, params has 6$"),
        (lambda: small(4)[:5], ValueError, "^grads has 5 arrays, params has 6$"),
        (lambda: [*small(4), None], ValueError, "^grads has 7 arrays, params has 6$"),
        (lambda: dict(enumerate(small(4))), TypeError, "^grads must be a list or tuple .*, not a dict$"),
        (lambda: np.ones((6, 2)), TypeError, "^grads must be a list or tuple .*, not an ndarray$"),
        (lambda: array.array("f", [1.0] * 6), TypeError, "^grads must be a list or tuple .*, not an array$"),
        (lambda: b"sixsix", TypeError, "^grads must be a list or tuple .*, not a bytes$"),
        (lambda: "sixsix", TypeError, "^grads must be a list or tuple .*, not a str$"),
        (lambda: None, TypeError, "^grads must be a list or tuple .*, not a NoneType$"),
        (lambda: 1.0, TypeError, "^grads must be a list or tuple .*, not a float$"),
        (lambda: set(map(FakeTensor, small(4))), TypeError, "^grads must be a list or tuple .*, not a set$"),
        (lambda: [small(4)], ValueError, "^grads has 1 arrays, params has 6$"),
    ],
)
def test_gradients_of_another_structure(
    make: Callable[[], Any], error: type[Exception], message: str, target: str, trained: Optimizer
) -> None:
    with refused(error, message, trained):
        trained.step(make())
    fresh = Optimizer(small(1), nadam, target=target, **SETTINGS)
    with refused(error, message, fresh):
        fresh.step(make())
    assert fresh.t == 0


def test_gradients_with_other_keys(target: str) -> None:
    opt = Optimizer({"w": np.ones(2), "b": np.ones(1)}, "adam", target=target, lr=0.1)
    fine = {"w": np.ones(2), "b": np.ones(1)}
    opt.step(fine)
    with refused(ValueError, "^grads lacks the key 'b'; None leaves a tensor alone$", opt):
        opt.step({"w": fine["w"]})
    with refused(ValueError, "^grads has the key 'c', which params has not$", opt):
        opt.step({**fine, "c": None})
    for other in (list(fine.values()), tuple(fine.values()), list(fine), None, "wb"):
        with refused(TypeError, "^params is a dict, so grads must be one with the same keys, not an? ", opt):
            opt.step(other)
    with refused(ValueError, r"^grads\['b'\] has the shape \(2,\), its parameter \(1,\)$", opt):
        opt.step({"w": fine["w"], "b": np.ones(2)})
    opt.step(fine)
    assert opt.t == 2


def test_training_goes_on_as_if_nothing_had_been_refused(target: str) -> None:
    opt, judge = Optimizer(small(1), nadam, target=target, **SETTINGS), Judge(small(1), nadam, **SETTINGS)
    for seed in range(2, 6):
        grads = small(seed)
        with pytest.raises(TypeError):
            opt.step(wrong(5, "x"))
        opt.step(grads)
        with pytest.raises(ValueError, match="overlap"):
            opt.step(wrong(0, opt.params[0], list(grads)))
        with pytest.raises(ValueError, match="needs 0 <= beta"):
            opt.beta = 7
        opt.step(grads)
        judge.step(grads)
        judge.step(grads)
        assert judge.agrees(opt)


# ── scalars without value ───────────────────────────────────────────────────────────────────────────────────────────

VALUELESS: list[tuple[str, float, str]] = [
    ("divisor", 0.0, "the scalar 'one' has no value at t=3: division by zero .*divisor=0.0"),
    ("divisor", -0.0, "the scalar 'one' has no value at t=3: division by zero"),
    ("modulus", 0.0, "the scalar 'one' has no value at t=3: division by zero"),
    ("exponent", 400.0, "the scalar 'two' has no value at t=3: pow.* overflows"),
    ("radicand", -1.0, r"the scalar 'two' has no value at t=3: sqrt\(-1.0\) is not defined"),
    ("base", -2.0, "the scalar 'two' has no value at t=3: .* is complex"),
    ("logged", 0.0, r"the scalar 'three' has no value at t=3: log\(0.0\) is not defined"),
    ("logged", -1.0, r"the scalar 'three' has no value at t=3: log\(-1.0\) is not defined"),
    ("raised", 1e3, "the scalar 'three' has no value at t=3: exp.* overflows"),
]


@pytest.mark.parametrize("dtypes", ["f", "d", "fd"])
@pytest.mark.parametrize(("name", "value", "message"), VALUELESS)
def test_a_scalar_without_value(name: str, value: float, message: str, dtypes: str, target: str) -> None:
    def arrays(seed: int) -> list[Any]:
        return [a for a in small(seed) if a.dtype.char in dtypes]

    opt, judge = Optimizer(arrays(1), brittle, target=target), Judge(arrays(1), brittle)
    for seed in (2, 3):
        grads = [*arrays(seed)[:-1], None]
        opt.step(grads)
        judge.step(grads)
    usual = getattr(opt, name)
    setattr(opt, name, value)
    # Of two tensors the second has not taken a step yet.
    for grads, t in ((arrays(4), 3), ([None, *arrays(4)[1:]], 1 if dtypes == "d" else 3)):
        with refused(ScalarError, f"^{message.replace('t=3', f't={t}')}", opt):
            opt.step(grads)
    setattr(opt, name, usual)
    opt.step(arrays(4))
    judge.step(arrays(4))
    assert judge.agrees(opt)


@pytest.mark.parametrize("late", range(6))
def test_scalar_state_that_leaves_a_scalar_without_value(late: int, target: str) -> None:
    """One tensor, of either dtype and in any place, is a step ahead of the others."""
    opt, judge = Optimizer(small(1), brittle, target=target), Judge(small(1), brittle)
    schedule = [[g if k == late else None for k, g in enumerate(small(2))], small(3), small(4)]
    for grads in schedule:
        opt.step(grads)
        judge.step(grads)
    assert opt.state["left"] == [0.0 if k == late else 1.0 for k in range(6)]
    message = rf"^params\[{late}\]: the scalar 'rate' has no value at t=4: division by zero .*left=0\.0"
    with refused(ScalarError, message, opt):
        opt.step(small(5))
    rest = [None if k == late else g for k, g in enumerate(small(5))]
    opt.step(rest)
    judge.step(rest)
    assert judge.agrees(opt)


def test_a_first_step_that_fails_starts_nothing(target: str) -> None:
    opt, judge = Optimizer(small(1), fading, target=target), Judge(small(1), fading)
    opt.step([*small(2)[:5], None])
    judge.step([*small(2)[:5], None])
    opt.lr = 0
    with refused(ScalarError, "^the scalar 'inverse_rate' has no value at t=2", opt):
        opt.step(small(3))
    opt.lr = judge.settings["lr"] = 0.5
    opt.step(small(4))
    judge.step(small(4))
    assert judge.agrees(opt)


@rule
def fading(p, g, own="p", seen="g", rate="lr", left: scalar = "lr", *, lr=0.1):
    """State that starts as something else than a number, and takes over old values of other arrays."""
    inverse_rate = 1 / lr
    previous = p
    p = p - g / inverse_rate + rate * (own - seen) * left
    seen = own
    own = previous
    left = left / 2
    return p, own, seen, rate, left


def test_what_is_not_asked_for_is_not_evaluated(target: str) -> None:
    """Branches, `and` and `or` of scalars; also where the scalar was taken out of an expression of elements."""
    for nothing in (0.0, 0.25, -0.25):
        opt, judge = Optimizer(small(1), brittle, target=target), Judge(small(1), brittle, nothing=nothing)
        opt.nothing = nothing
        for seed in (2, 3):
            opt.step(small(seed))
            judge.step(small(seed))
            assert judge.agrees(opt)
