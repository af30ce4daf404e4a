"""Rules as optax's gradient transformations, and as fused steps, in JAX: the same kernels under `jit`.

>>> import optforge.jax as ofj
>>> opt = ofj.adamw(lr=3e-4, weight_decay=0.1)         # or ofj.Optimizer(rule, …), for any rule
>>> state = opt.init(params)
>>> params, state = opt.step(params, grads, state)     # in place where the buffers are donated

`opt` is a pair (init, update) as well, which `optax.chain` and the like take.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..core import formats
from ..core.diagnostics import UsageError
from ..core.dtypes import DTYPES
from ..core.formats import FORMATS, Format, Storage
from ..core.ir import Kernel, State
from ..core.scalars import check_hyperparameters
from ..core.tracebacks import SHORT
from ..frontend.settings import check_seed
from ..library.named import named_rule
from ..library.rule import BUILT_IN, Rule
from ..train.optimizer import check_threads, loss_scale
from . import xla

__all__ = ["Optimizer", "OptimizerState", "Stats", "constructor", "doubles"]

STORED: dict[Any, Format] = {
    jnp.dtype(dtype): FORMATS[name]
    for dtype, name in ((jnp.float32, "f32"), (jnp.float64, "f64"), (jnp.bfloat16, "bf16"), (jnp.float16, "f16"))
}
DTYPE = {own.name: dtype for dtype, own in STORED.items()}
WORD = jnp.dtype(jnp.uint32)
LARGEST = float(jnp.finfo(jnp.float32).max)

Leaves = list[tuple[str, Any]]


class OptimizerState(NamedTuple):
    """What goes from step to step.

    Attributes
    ----------
    count : int32
        Steps that were applied.
    state : dict
        The rule's state by name, each in the structure of the parameters. Where a state is one number per tensor, its
        leaf has the two halves of that double as uint32, which `doubles` reads. A master beside a parameter of 16 bits
        is "p_master" or "p_low".
    """

    count: Any
    state: dict[str, Any]


class Stats(NamedTuple):
    """What a step tells of itself, as `optforge.Stats` does: arrays, float32 (float64 under x64) and int32.

    `per_tensor` has the same names, with an entry for each leaf of the parameters, in the order of `jax.tree.leaves`.
    """

    grad_norm: Any
    clipped_grad_norm: Any
    param_norm: Any
    update_norm: Any
    max_update_ratio: Any
    nan: Any
    inf: Any
    skipped: Any
    per_tensor: Any = None


class Pair(NamedTuple):
    """What optax takes for a GradientTransformation."""

    init: Callable[..., Any]
    update: Callable[..., Any]


class Optimizer(Pair):
    """A rule as an optax GradientTransformation, with a fused step.

    Parameters
    ----------
    rule : Rule or str
        A rule, or the name of a built-in one, or of a composition: "clip_by_global_norm:adamw".
    threads : int, optional
        Largest number of threads of a step on the CPU, which never changes its bits.
    skip_nonfinite : bool
        Whether a step with a NaN or an infinity in any gradient, after unscaling, changes nothing, the count included.
    store : mapping of str to str, optional
        Formats of state, of "f32", "bf16" and "f16": {"m": "bf16"}. State is f32 where it is left out, f64 beside
        parameters in float64.
    master : str, optional
        "f32" or "split": parameters in 16 bits are rounded from floats beside them, or from themselves and the 16 bits
        that they leave.
    rounding : str
        "nearest", or "stochastic" for what is stored in 16 bits, by the `seed`.
    seed : int
    **settings
        Hyperparameters and static options. A hyperparameter is a number, which keeps the bits of a double; an array
        of shape (), traced or not, which has those of its dtype; or a schedule, a function of the count of steps that
        were applied, which JAX traces: 0 at the first step, as optax counts.

    Attributes
    ----------
    init : callable
        `init(params)` gives the OptimizerState of a pytree of float32, float64, bfloat16 or float16 arrays.
    update : callable
        `update(grads, state, params)` gives (updates, state), where `optax.apply_updates(params, updates)` are the
        parameters behind the step. They have the bits of `step` wherever a parameter changes by less than its half.
    step : callable
        `step(params, grads, state, *, grad_scale=None, stats=False)` gives (params, state), or (params, state, Stats)
        with `stats`. Called outside of `jit` it takes over the buffers of `params` and `state`, which are gone then; in
        a `jit` of yours donate them to it: `jax.jit(train_step, donate_argnums=…)`. Gradients are multiplied by
        1 / `grad_scale`, a number or an array, before anything sees them.
    rule : Rule

    Raises
    ------
    TypeError, ValueError
        A setting is none of the rule, or has no value for it. At the time of tracing: an array is of a dtype that does
        not do, or gradients, state and parameters differ in structure or shape, or an array is on several devices.
    RuleError
        The rule's text was refused.
    EnvironmentProblem
        The kernel cannot be compiled here.

    Notes
    -----
    A step runs where its arrays are, on the CPU or on an NVIDIA GPU. What is only known then, such as an assert of the
    rule over traced hyperparameters, or a scalar x/0, is an error of JAX, from which nothing of a donated buffer comes
    back; on a GPU it is one of a later step, and the step itself changes nothing.

    Examples
    --------
    >>> import jax.numpy as jnp, optforge.jax as ofj
    >>> opt = ofj.Optimizer("sgd", lr=0.5)
    >>> params = {"w": jnp.ones(3)}
    >>> params, state = opt.step(params, {"w": jnp.ones(3)}, opt.init(params))
    >>> params["w"].tolist(), int(state.count)
    ([0.5, 0.5, 0.5], 1)
    """

    rule: Rule
    step: Callable[..., Any]

    def __new__(
        cls,
        rule: Rule | str,
        /,
        *,
        threads: int | None = None,
        skip_nonfinite: bool = False,
        store: Mapping[str, str] | None = None,
        master: str | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        **settings: Any,
    ) -> Optimizer:
        """Check the settings, and bind the functions to them."""
        with SHORT:
            if not isinstance(skip_nonfinite, (bool, np.bool_)):
                raise TypeError(f"skip_nonfinite is True or False, not {skip_nonfinite!r}")
            check_threads(threads)
            check_seed(seed)
            rule = named_rule(rule)
            asked = Asked(dict(store or {}), master, rounding)
            hyper, options = chosen(rule, settings)
            call = xla.Call(
                rule,
                tuple(sorted(options.items())),
                skip_nonfinite=bool(skip_nonfinite),
                threads=threads or 0,
                seed=int(seed),
            )
            steps = Steps(rule, hyper, options, asked, call)
            asked.check(steps.kernel)
        made = super().__new__(cls, steps.init, steps.update)
        made.rule, made.step = rule, Step(steps)
        return made

    def __repr__(self) -> str:
        return f"<optforge.jax.Optimizer of {self.rule.name}>"


def constructor(rule: Rule | str) -> Callable[..., Optimizer]:
    """A function of the hyperparameters of a rule that makes its Optimizer, as `optax.inject_hyperparams` wants it.

    `optforge.jax.adamw` is `constructor("adamw")`, and so for every built-in rule.
    """
    with SHORT:
        own = named_rule(rule)
        kind = inspect.Parameter.KEYWORD_ONLY
        taken = [inspect.Parameter(name, kind, default=value) for name, value in own.hyperparameters.items()]
        taken += [inspect.Parameter(name, kind, default=value) for name, value in own.options.items()]

    def construct(*values: Any, **settings: Any) -> Optimizer:
        with SHORT:
            if values:
                first = next(iter(own.hyperparameters), "threads")
                raise TypeError(f"settings of {own.name} have names: write {first}={values[0]!r}")
            return Optimizer(own, **settings)

    construct.__name__ = construct.__qualname__ = own.name
    construct.__doc__ = f"{own.doc}\n\nSettings are as of `optforge.jax.Optimizer`."
    construct.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    return construct


def __getattr__(name: str) -> Any:
    if name not in BUILT_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, constructor(name))


def __dir__() -> list[str]:
    return sorted([*__all__, *BUILT_IN])


def doubles(tree: Any) -> Any:
    """State that is one number per tensor, as Python floats in the same structure: `doubles(state.state["mu"])`."""
    return jax.tree.map(lambda words: np.asarray(words, np.uint32).view(np.float64).item(), tree)


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────────


def chosen(rule: Rule, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bool | str]]:
    """Hyperparameters, numbers, arrays and schedules, and options, checked as far as they are known.

    Raises
    ------
    TypeError, ValueError
        A name is none of the rule's, a value is none, or an assert of the rule does not hold.
    """
    later = {
        name: value
        for name, value in given.items()
        if name not in rule.options and (callable(value) or isinstance(value, jax.Array))
    }
    known = {name: value for name, value in given.items() if name not in later}
    numbers, options = rule.settings({**known, **{name: rule.hyperparameters.get(name, 0.0) for name in later}})
    for name, value in later.items():
        if not callable(value):
            check_number(f"hyperparameter {name!r}", value)
    kernel = rule.kernel(**options)
    asserts = tuple(
        own for own in kernel.asserts if not any(e.op == "hyper" and e.value in later for e in own.condition.walk())
    )
    check_hyperparameters(replace(kernel, asserts=asserts), numbers)
    return {**numbers, **later}, options


def check_number(what: str, value: Any) -> None:
    """Raise TypeError where an array is no real number."""
    if value.shape != () or not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
        raise TypeError(f"{what} is a number, or an array of shape (), not {value.dtype} of shape {value.shape}")


def at(name: str, value: Any, count: Any) -> Any:
    """The value of a hyperparameter behind so many steps: a double, or an array.

    Raises
    ------
    TypeError
        A schedule cannot be traced, or gives no number.
    """
    if not callable(value):
        return value
    of = f"the schedule of hyperparameter {name!r}"
    try:
        made = value(count)
    except (jax.errors.ConcretizationTypeError, TypeError) as problem:
        raise TypeError(
            f"{of} cannot be traced: under jit the count is an array, so write it with jax.numpy, or take a schedule "
            "of optax (those of optforge.schedules are for optforge.Optimizer)"
        ) from problem
    if isinstance(made, jax.Array):
        check_number(of, made)
        return made
    try:
        number = float(made)
    except (TypeError, ValueError):
        raise TypeError(f"{of} gives {made!r}, which is no number") from None
    if math.isnan(number):
        raise ValueError(f"{of} gives NaN")
    return number


def operand(number: jax.Array) -> jax.Array:
    """A traced number as the kernel reads it."""
    return number.astype(jnp.float64 if number.dtype == jnp.float64 else jnp.float32)


@dataclass(frozen=True)
class Asked:
    """How arrays shall be stored, beside the dtypes that parameters and gradients have."""

    store: Mapping[str, str]
    master: str | None
    rounding: str

    def check(self, kernel: Kernel) -> None:
        """Raise UsageError where it is nothing for this kernel, whatever the parameters are."""
        for name in ("p", "g"):
            if name in self.store:
                raise UsageError(f"{name} is stored as the array that is given: leave it out of store")
        for name, own in self.store.items():
            if own in FORMATS and FORMATS[own].scales:
                raise UsageError(f"{name} is {own}, which is not for JAX: choose bf16 for it here")
        narrow = self.master is not None or self.rounding != "nearest"
        self.storage(kernel, FORMATS["bf16" if narrow else "f32"], None)

    def storage(self, kernel: Kernel, p: Format, g: Format | None) -> Storage:
        """How the arrays of a tensor with this parameter and gradient are stored."""
        store = {"p": p.name, "g": (g or p).name, **self.store}
        stochastic = self.rounding if any(FORMATS[name].narrow for name in store.values() if name in FORMATS) else ""
        others = [state.name for state in kernel.scalar_state]
        master = self.master if p.narrow else None
        return formats.storage(kernel.arrays, store, master, stochastic or "nearest", None, others)


# ── pytrees ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def leaves(tree: Any, what: str) -> tuple[Leaves, Any]:
    """The arrays of a pytree with their paths, and its structure.

    Raises
    ------
    TypeError
        A leaf is no array, or it is the state where something else is expected.
    UsageError
        One is on several devices.
    """
    if isinstance(tree, OptimizerState) and what != "state":
        raise TypeError(
            f"{what} is the state of an optimizer: write step(params, grads, state), or update(grads, state, params)"
        )
    found, structure = jax.tree_util.tree_flatten_with_path(tree)
    named = [(f"{what}{jax.tree_util.keystr(path)}", leaf) for path, leaf in found]
    for path, leaf in named:
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(f"{path} is no array, but {type(leaf).__name__}")
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and len(leaf.devices()) > 1:
            raise UsageError(f"{path} is on {len(leaf.devices())} devices; optforge.jax steps on one")
    return named, structure


def format_of(path: str, leaf: Any) -> Format:
    """The format of an array.

    Raises
    ------
    TypeError
        It is of another dtype, or JAX would make another of it.
    """
    own = STORED.get(leaf.dtype)
    if own is None:
        name = "float0" if leaf.dtype == jax.dtypes.float0 else leaf.dtype
        raise TypeError(f"{path} is {name}; parameters and gradients are float32, float64, bfloat16 or float16")
    if own.name == "f64" and not jax.config.jax_enable_x64:
        raise TypeError(
            f"{path} is float64, of which JAX makes float32 unless jax_enable_x64 is set: do either yourself"
        )
    return own


def fitting(tree: Any, what: str, params: Leaves, structure: Any) -> Leaves:
    """The leaves of a pytree that has the structure of the parameters.

    Raises
    ------
    ValueError
        It has not.
    """
    found, own = leaves(tree, what)
    if own == structure:
        return found
    of_params = {path.removeprefix("params") for path, _ in params}
    of_own = {path.removeprefix(what) for path, _ in found}
    lacking, more = (
        [path for path, _ in listed if path.removeprefix(prefix) not in other]
        for listed, prefix, other in ((params, "params", of_own), (found, what, of_params))
    )
    said = [f"there is {more[0]} and no params{more[0].removeprefix(what)}"] if more else []
    said += [f"there is {lacking[0]} and no {what}{lacking[0].removeprefix('params')}"] if lacking else []
    raise ValueError(f"{what} and params are different pytrees: {', and '.join(said) or f'{own} and {structure}'}")


def check_shape(path: str, leaf: Any, shape: Sequence[int], dtype: Any, why: str) -> None:
    """Raise ValueError where an array is not what it has to be."""
    if tuple(leaf.shape) != tuple(shape) or jnp.dtype(leaf.dtype) != dtype:
        now = f"{leaf.dtype} of shape {tuple(leaf.shape)}"
        raise ValueError(f"{path} is {now}, and {why} is {dtype} of shape {tuple(shape)}")


# ── steps ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Steps:
    """The functions of an Optimizer."""

    rule: Rule
    hyper: Mapping[str, Any]
    options: Mapping[str, bool | str]
    asked: Asked
    call: xla.Call

    @functools.cached_property
    def kernel(self) -> Kernel:
        """The compiled form, which state is told from."""
        return self.rule.kernel(**self.options)

    def init(self, params: Any) -> OptimizerState:
        """The state before the first step."""
        with SHORT:
            found, structure = leaves(params, "params")
            kernel = self.kernel
            storages = [self.storage(path, own := format_of(path, p), own) for path, p in found]
            state = {
                own.name: [self.begin(own, p, storage) for (_, p), storage in zip(found, storages, strict=True)]
                for own in kernel.state
            }
            for name in {storage.beside.name for storage in storages if storage.beside}:
                state[name] = [master(p, storage) for (_, p), storage in zip(found, storages, strict=True)]
            trees = {name: built(structure, own) for name, own in state.items()}
            return OptimizerState(jnp.zeros((), jnp.int32), trees)

    def begin(self, state: State, p: Any, storage: Storage) -> jax.Array:
        """A state before the first step; one that begins as the gradient is begun by the kernel."""
        initial = state.initial
        value: Any = 0.0 if initial == "g" else self.hyper.get(str(initial), initial)
        if callable(value):
            value = at(str(initial), value, jnp.zeros((), jnp.int32))
        if state.scalar:  # an array is known in full at the first step, and read then
            number = 0.0 if isinstance(value, jax.Array) else value
            return jnp.asarray(np.array([number], np.float64).view(np.uint32))
        dtype = DTYPE[storage[state.name].name]
        return jnp.array(p, dtype) if isinstance(value, str) else jnp.full(p.shape, value, dtype)

    def update(self, grads: Any, state: Any, params: Any = None) -> tuple[Any, OptimizerState]:
        """What is to be added to the parameters, and the state behind the step."""
        with SHORT:
            if params is None:
                raise ValueError("update needs the parameters: update(grads, state, params)")
            new, state = self.step(params, grads, state)
            return jax.tree.map(lambda new, old: new - old, new, params), state

    def step(
        self,
        params: Any,
        grads: Any,
        state: Any,
        grad_scale: jax.Array | None = None,
        number: float | None = None,
        stats: bool = False,
    ) -> tuple[Any, ...]:
        """The parameters and the state behind a step; its `grad_scale` is an array, or else a `number`."""
        found, structure = leaves(params, "params")
        formats_of_p = [format_of(path, p) for path, p in found]
        given = fitting(grads, "grads", found, structure)
        for (path, g), (of, p) in zip(given, found, strict=True):
            format_of(path, g)
            check_shape(path, g, p.shape, jnp.dtype(g.dtype), of)
        storages = [self.storage(path, p, format_of(path, g)) for p, (path, g) in zip(formats_of_p, given, strict=True)]
        kernel = self.kernel
        columns = self.columns(state, storages, found, structure)
        # The order of storages is that of their names, so that equal trees have one library.
        kinds = {own.suffix: own for own in storages or [formats.plain(DTYPES["f32"], kernel.arrays)]}
        order = sorted(kinds)
        numbers, traced, hyper = [], [], []
        for k, (of, _) in enumerate(kernel.hyperparameters):
            value = at(of, self.hyper[of], state.count)
            if isinstance(value, jax.Array):
                numbers.append(operand(value))
                traced.append(k)
            hyper.append(0.0 if isinstance(value, jax.Array) else value)
        if grad_scale is not None:
            check_number("grad_scale", grad_scale)
            numbers.append(operand(grad_scale))
            traced.append(xla.GRAD_SCALE)
        rows = [
            [p, g, *(columns[own][k] for own in columns if columns[own][k] is not None)]
            for k, ((_, p), (_, g)) in enumerate(zip(found, given, strict=True))
        ]
        call = replace(
            self.call,
            storages=tuple(kinds[suffix] for suffix in order),
            kinds=tuple(order.index(own.suffix) for own in storages),
            arrays=tuple(map(len, rows)),
            hyper=tuple(hyper),
            traced=tuple(traced),
            grad_scale=number or 1.0,
            stats=stats,
            wide=bool(jax.config.jax_enable_x64),
        )
        made = iter(call(state.count, numbers, rows))
        count, new = next(made), []
        behind: dict[str, list[Any]] = {own: [] for own in columns}
        for k in range(len(rows)):
            new.append(next(made))
            for own, column in columns.items():
                behind[own].append(None if column[k] is None else next(made))
        after = OptimizerState(count, {own: built(structure, arrays) for own, arrays in behind.items()})
        both = (built(structure, new), after)
        return (*both, told(*made)) if stats else both

    def storage(self, path: str, p: Format, g: Format) -> Storage:
        """How the arrays of a tensor are stored; a mistake names it."""
        try:
            return self.asked.storage(self.kernel, p, g)
        except UsageError as problem:
            raise UsageError(f"{path}: {problem}") from None

    def columns(self, state: Any, storages: Sequence[Storage], params: Leaves, structure: Any) -> dict[str, list[Any]]:
        """The state by name in the order of the kernel: an array for each tensor, None where it has none.

        Raises
        ------
        TypeError, ValueError
            It is none of this rule over these parameters.
        """
        if not isinstance(state, OptimizerState):
            raise TypeError(f"the state is what init(params) gives, not {type(state).__name__}")
        check_shape("state.count", state.count, (), jnp.dtype(jnp.int32), "the count of steps")
        kernel = self.kernel
        names = [own.name for own in kernel.state] + sorted({own.beside.name for own in storages if own.beside})
        if sorted(state.state) != sorted(names):
            has, needed = (", ".join(sorted(own)) or "none" for own in (state.state, names))
            raise ValueError(f"the state is {has}, and rule {self.rule.name!r} over these parameters has {needed}")
        columns: dict[str, list[Any]] = {}
        for name in names:
            needs = [forms(kernel, name, p.shape, own) for (_, p), own in zip(params, storages, strict=True)]
            holders = [param for param, need in zip(params, needs, strict=True) if need]
            expected = jax.tree.structure(built(structure, [need and 0 for need in needs]))
            found = iter(fitting(state.state[name], f"state.state[{name!r}]", holders, expected))
            columns[name] = []
            for (of, _), need in zip(params, needs, strict=True):
                path, own = next(found) if need else ("", None)
                if need:
                    check_shape(path, own, *need, f"what {of} needs")
                columns[name].append(own)
        return columns


def forms(kernel: Kernel, name: str, shape: Sequence[int], storage: Storage) -> tuple[Any, Any] | None:
    """The shape and dtype of a state of a tensor that is stored so, or of its master; None where it has none."""
    if storage.beside is not None and name == storage.beside.name:
        return shape, jnp.dtype(storage.beside.format.numpy)
    if name in (own.name for own in kernel.scalar_state):
        return (2,), WORD
    return (shape, DTYPE[storage[name].name]) if name in kernel.arrays else None


def built(structure: Any, arrays: Sequence[Any]) -> Any:
    """A pytree of arrays in the structure of the parameters, without those that are None."""
    return jax.tree.unflatten(structure, arrays)


def master(p: Any, storage: Storage) -> jax.Array | None:
    """What stands beside a parameter before the first step, if anything does."""
    if storage.master == "split":
        return jnp.zeros(p.shape, jnp.uint16)
    return jnp.array(p, jnp.float32) if storage.master else None


def told(norms: jax.Array, counts: jax.Array) -> Stats:
    """Statistics from their rows."""

    def row(k: Any) -> Stats:
        return Stats._make([*(norms[k, j] for j in range(5)), counts[k, 0], counts[k, 1], counts[k, 2] != 0, None])

    return row(0)._replace(per_tensor=row(slice(1, None)))


class Step:
    """The fused step, compiled for itself where it is called outside of `jit`."""

    def __init__(self, steps: Steps):
        self.steps = steps
        self.compiled = jax.jit(steps.step, static_argnames=("number", "stats"), donate_argnums=(0, 2))

    def __call__(
        self, params: Any, grads: Any, state: Any, *, grad_scale: Any = None, stats: bool = False
    ) -> tuple[Any, ...]:
        """The parameters and the state behind a step, and its Stats if they are asked for."""
        with SHORT:
            number = None
            if not isinstance(stats, (bool, np.bool_)):
                raise TypeError(f"stats is True or False, and known when the step is traced, not {stats!r}")
            if grad_scale is not None and not isinstance(grad_scale, jax.Array):
                number, grad_scale = loss_scale(grad_scale), None
                if number <= LARGEST and np.float32(number) == number:  # another one is no other program then
                    number, grad_scale = None, jnp.float32(number)
            every = jax.tree.leaves((params, grads, state, grad_scale))
            if any(isinstance(leaf, jax.core.Tracer) for leaf in every):
                return self.steps.step(params, grads, state, grad_scale, number=number, stats=stats)
            for tree, what in ((params, "params"), (grads, "grads"), (state, "state")):
                leaves(tree, what)
            made: tuple[Any, ...] = self.compiled(params, grads, state, grad_scale, number=number, stats=stats)
            return made
