"""The Optimizer: a rule applied to arrays, step after step."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np

from ..core.diagnostics import InterruptedStep, UsageError, nearest
from ..core.formats import FORMAT_OF, FORMATS, MASTERS, Storage, spelled, storage, with_beside, without_beside
from ..core.functions import Array
from ..core.ir import Kernel, State
from ..core.tracebacks import MISTAKES, SHORT, shorten
from ..engines.arrays import TAKEN, address, is_bits, kind, teller
from ..engines.host import HOST, Host
from ..engines.inputs import Inputs
from ..engines.memory import Scales
from ..engines.stats import RECORD, Stats
from ..engines.tensor import How, Progress, Tensor
from ..frontend.settings import check_seed, double
from ..library import targets
from ..library.named import named_rule
from ..library.rule import Rule
from . import checkpoint, copying, resume
from .groups import Group, chosen, settle, within
from .hyperparameters import Hyperparameters
from .resume import steps_taken
from .structure import Structure, structured

MOST_THREADS = 1024  # more are never of use, and starting them can end the process


@dataclass(frozen=True)
class Begun:
    """A step that writes more than its engine does: what to do once it is applied, or to undo where it is not.

    Attributes
    ----------
    t : int
        Its number.
    values : array
        The hyperparameters before it.
    tensors : list of Tensor
        Those that it is the first step of.
    before : list of pairs
        State that begins with it, and what was there.
    """

    t: int
    values: Array
    tensors: list[Tensor]
    before: list[tuple[Any, Any]]


class Optimizer:
    """Applies an update rule to parameters, in place.

    Parameters
    ----------
    params : list, tuple or dict of arrays, or a list of groups
        float32, float64, bfloat16 or float16, C-contiguous, writable: NumPy arrays, or CPU arrays that share memory
        through DLPack or the buffer protocol (PyTorch CPU tensors). Any other iterable of arrays is taken as a list. A
        group is a dict of "params", such a collection, and of hyperparameters that it does not have from `settings`.
    rule : Rule or str
        A rule, or the name of a built-in one, or of a composition: "clip_by_global_norm:adamw".
    target : str
        "c" for the compiled kernel, "cuda" for one on a GPU, "numpy" for the reference; or a callable that takes a
        rule and its kernel and gives an engine, such as `CudaTarget(device=1)`.
    threads : int, optional
        Largest number of threads of a step, which never changes its bits; OpenMP's own choice if left out. In a forked
        child it is 1.
    skip_nonfinite : bool
        Whether a step with a NaN or an infinity in any gradient, after unscaling, changes nothing: parameters, state
        and `t` stay, and the statistics say so.
    zero_grads : bool
        Whether a step, a skipped one too, sets the gradients to zero when it is done with them, in the same pass.
    store : dict of str to str, optional
        The formats of state, by name: "f32" (as a rule), "bf16" or "f16", "q8" or (for what is never negative) "uq8";
        "f64" where parameters are. Parameters and
        gradients have those of their arrays; {"p": "bf16"} takes arrays of uint16 as the bits of bfloat16 numbers.
        Everything is computed in float32, or float64 where parameters are, and rounded when it is stored.
    master : str, optional
        What bfloat16 or float16 parameters are rounded from, so that small steps are not lost: "f32", float32 beside
        each, or "split", the 16 bits that a bfloat16 parameter leaves of a float32. It is in `state` as "p_master" or
        "p_low".
    rounding : str
        Of arrays of 16 bits, but a parameter beside a master: "nearest", or "stochastic", up with a probability of
        what is dropped, by bits that depend on `seed`, step, tensor, array and element alone.
    seed : int
        Of stochastic rounding, 64 bits.
    **settings
        Hyperparameters, and static options of the rule. Each is an attribute as well: `opt.lr = 1e-4` holds from the
        next step on, for all groups. A hyperparameter may be a schedule: a function of the step count t, an int from
        1, which is called once before each step for each group, and when it is given or `t` is set; read, it then gives
        the value of the last step, before the first step that of the first.

    Attributes
    ----------
    params : list, tuple or dict
        The arrays that were passed; where there are groups, a list with such a collection for each. `grads` and state
        have the same structure.
    groups : list of Group
        The parameter groups, one where none were given: `opt.groups[1]["lr"]`. Where groups differ in a hyperparameter,
        reading it from the optimizer itself is a ValueError.
    rule : Rule
    target : str
    threads : int or None
    skip_nonfinite, zero_grads : bool
    store, master, rounding, seed
        As they were given.

    Raises
    ------
    TypeError
        An argument is no array, is of another dtype, or is no hyperparameter of the rule.
    ValueError
        An array's layout or a hyperparameter's value does not do, or two parameters overlap.
    RuleError
        The rule's text was refused.
    EnvironmentProblem
        The kernel cannot be compiled here.

    Examples
    --------
    >>> import numpy as np, optforge as of
    >>> w = np.ones(3, np.float32)
    >>> opt = of.Optimizer([w], "sgd", lr=0.5, target="numpy")
    >>> opt.step([np.ones(3, np.float32)])
    >>> w
    array([0.5, 0.5, 0.5], dtype=float32)
    """

    params: Any
    rule: Rule
    target: str | Callable[..., Any]
    threads: int | None
    skip_nonfinite: bool
    zero_grads: bool
    store: dict[str, str]
    master: str | None
    rounding: str
    seed: int

    _hyper: Hyperparameters
    _structure: Structure
    _space: Host
    _inputs: Inputs

    def __init__(
        self,
        /,
        params: Iterable[Any] | Mapping[Any, Any],
        rule: Rule | str,
        *,
        target: str | Callable[..., Any] = "c",
        threads: int | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        store: Mapping[str, str] | None = None,
        master: str | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        **settings: Any,
    ):
        with SHORT:
            for name, value in (("skip_nonfinite", skip_nonfinite), ("zero_grads", zero_grads)):
                if not isinstance(value, (bool, np.bool_)):
                    raise TypeError(f"{name} is True or False, not {value!r}")
            if store is not None and not isinstance(store, Mapping):
                raise TypeError(f"store is a dict of arrays and their formats, {{'m': 'bf16'}}, not {kind(store)}")
            check_seed(seed)
            check_threads(threads)
            make = engine(target)
            structure, owners, own = structured(params)
            self._set(rule=named_rule(rule), target=target, threads=threads, params=structure.build(owners))
            self._set(skip_nonfinite=bool(skip_nonfinite), zero_grads=bool(zero_grads))
            rows, options = settle(self.rule, settings, own, structure.grouped)
            self._set(store=dict(store or {}), master=master, rounding=rounding, seed=int(seed))
            self._set(_options=options, _space=make.space() if hasattr(make, "space") else HOST)
            arrays = self._parameters(structure.paths, owners)
            # The kernel has the rule's own defaults, so that other hyperparameters need no other library.
            kernel = self._stored(arrays)
            hyper = Hyperparameters(kernel, rows)
            most = min(threads or 0, MOST_THREADS)
            self._set(_kernel=kernel, _names=hyper.names, _hyper=hyper, _values=hyper.values)
            self._set(_structure=structure, _listed=structure.listed, _common=settings)
            progress = Progress(len(owners))
            self._set(_progress=progress, _count=progress.count, _begun=None)
            usual = How(most, 1.0, self.skip_nonfinite, self.zero_grads, progress=progress)
            usual = replace(usual, master=master or "", stochastic=rounding == "stochastic", seed=self.seed)
            self._set(_usual=usual, _how=usual)
            self._set(_tensors=self._make_tensors(structure.paths, owners, arrays, self._rows(), 0))
            Inputs(self._tensors, self._space, self.zero_grads)  # finds overlaps, before anything is compiled
            self._set(_engine=make(self.rule, kernel))
            self._set(_inputs=getattr(self._engine, "inputs", Inputs)(self._tensors, self._space, self.zero_grads))
            self._set(_plan=None, _starting=(), _places=(), _plain=False, _tell=None)
            for name in (*hyper.names, *options):
                if name in self.__dict__ or hasattr(type(self), name):
                    raise UsageError(
                        f"the Optimizer uses the name {name!r} of rule {self.rule.name!r} itself; choose another"
                    )

    def _set(self, **attributes: Any) -> None:
        """Set own attributes; plain assignment is for hyperparameters and `t`."""
        for name, value in attributes.items():
            object.__setattr__(self, name, value)

    def _parameters(self, paths: Sequence[tuple[int, str]], owners: Sequence[Any]) -> list[Any]:
        """The arrays of parameters in the space, checked."""
        found = []
        for owner, (_, path) in zip(owners, paths, strict=True):
            label = f"params{path}"
            array = self._space.parameter(owner, label)
            if is_bits(owner) and "p" not in self.store:
                hint = "if it holds bfloat16 numbers, say so by store={'p': 'bf16'}"
                raise TypeError(f"{label} is uint16; it must be {TAKEN}; {hint}")
            own = FORMAT_OF[array.dtype].name
            if self.store.get("p", own) != own:
                raise TypeError(f"{label} is {spelled(array.dtype)}, and store says that p is {self.store['p']}")
            found.append(array)
        return found

    def _storages(self, kernel: Kernel, arrays: Iterable[Any]) -> list[Storage]:
        """How the arrays of a kernel are stored, for each dtype that parameters have."""
        scalar = [state.name for state in kernel.scalar_state]
        own = {name: format for name, format in self.store.items() if name not in ("p", "g")}
        found = []
        for p in dict.fromkeys(FORMAT_OF[array.dtype].name for array in arrays) or ["f32"]:
            store = {**dict.fromkeys(kernel.arrays, "f64"), **own} if p == "f64" else own
            found.append(storage(kernel.arrays, {**store, "p": p}, self.master, self.rounding, "own", scalar))
        return found

    def _stored(self, arrays: Sequence[Any]) -> Kernel:
        """The kernel for parameters of these dtypes."""
        kernel = self.rule.kernel(**self._options)
        storages = self._storages(kernel, arrays)
        inexact = frozenset(name for own in storages for name in own.inexact)
        if inexact:
            kernel = self.rule.rounded(inexact, storages[0].moved, self._options)
        return with_beside(kernel, self.master, storages[0].scaled)

    def _make_tensors(
        self,
        paths: Sequence[tuple[int, str]],
        owners: Sequence[Any],
        arrays: Sequence[Any],
        rows: Sequence[Mapping[str, float]],
        before: int,
    ) -> list[Tensor]:
        """Tensors with their state allocated and, where it is a number, initialised; there are some `before` them."""
        space, kernel = self._space, self._kernel
        flats = [array.reshape(-1) for array in arrays]
        beside = MASTERS[self.master].name if self.master else ""
        scaled = tuple(name for name, format in self.store.items() if FORMATS[format].scales)
        rule = without_beside(kernel, self.master or "", scaled)
        own_state = [state.name for state in rule.array_state]
        by_format = {own["p"].name: own for own in self._storages(rule, arrays)}
        dtypes = []
        for array in arrays:
            stored = by_format[FORMAT_OF[array.dtype].name]
            dtypes.append([stored[name].numpy for name in own_state])
            dtypes[-1] += [stored.beside.format.numpy] if stored.beside is not None else []
            dtypes[-1] += [Scales for _ in scaled]
        names = [state.name for state in kernel.array_state]
        tensors = []
        for number, ((group, path), owner, array, flat, own) in enumerate(
            zip(paths, owners, arrays, flats, space.allocate(flats, dtypes), strict=True), before
        ):
            state_arrays = dict(zip(names, own, strict=True))
            tensor = Tensor(path, group, owner, array.shape, flat, state_arrays, {}, {}, space=space, stream=number)
            tensor.beside = state_arrays[beside] if beside else None
            tensor.place(flat)
            for state in self._kernel.state:
                if state.scalar:
                    tensor.scalars[state.name] = space.number()
                zero = repr(state.initial) == "0.0" and not tensor.is_scaled(state.name)  # which is what new memory has
                if state.initial != "g" and not zero:
                    self._begin(tensor, state, rows[group])
                place = tensor.scalars if state.scalar else tensor.arrays
                tensor.addresses[state.name] = address(place[state.name])
            tensors.append(tensor)
        return tensors

    def _begin(self, tensor: Tensor, state: State, hyperparameters: Mapping[str, float]) -> None:
        """Let a state start, unless it starts as the gradient."""
        own = tensor.scalars[state.name] if state.scalar else tensor.arrays[state.name]
        value = hyperparameters.get(str(state.initial), state.initial)
        self._space.begin(own, tensor.p if value == "p" else value, tensor.scales(state.name))

    def add_group(self, group: Mapping[str, Any]) -> None:
        """Add a parameter group, whose state starts at its first gradients.

        Parameters
        ----------
        group : dict
            "params", a list, tuple or dict of arrays, and its own hyperparameters; those that it has not are what the
            Optimizer was made with. `params`, gradients and state have one entry more from here on; where there were
            no groups, what there was is the first of two.

        Raises
        ------
        TypeError, ValueError
            As of the Optimizer; nothing was changed then.
        """
        with SHORT:
            self._settle()
            if not isinstance(group, Mapping) or "params" not in group:
                raise TypeError(f"a group is {{'params': …, hyperparameters}}, not {kind(group)}")
            added, owners, own = structured([group])
            before, hyper = self._structure, self._hyper
            structure = Structure((*before.branches, *added.branches), True)
            number, paths = len(before.branches), structure.paths
            rows: list[dict[str, Any]] = [hyper.of(k) for k in range(number)]
            for (k, name), schedule in hyper.schedules.items():
                rows[k][name] = schedule
            common = {name: value for name, value in self._common.items() if name not in self._options}
            with within(f"groups[{number}]: "):
                for name in self._options:
                    if name in own[0]:
                        raise ValueError(f"option {name!r} is fixed in the kernel, which all groups share")
                rows.append(chosen(self.rule, {**common, **own[0]})[0])
            hyper = Hyperparameters(self._kernel, rows)
            hyper.replace(hyper.at(max(int(self._count[0]), 1)), hyper.schedules)
            old = [
                replace(tensor, path=path)
                for tensor, (_, path) in zip(self._tensors, paths[: len(self._tensors)], strict=True)
            ]
            arrays = self._parameters(paths[len(old) :], owners)
            if self._stored([*(tensor.p for tensor in old), *arrays]).inexact != self._kernel.inexact:
                raise ValueError(
                    f"groups[{number}]: its parameters are stored otherwise: give it an Optimizer of its own"
                )
            rows = [hyper.of(k) for k in range(number + 1)]
            new = self._make_tensors(paths[len(old) :], owners, arrays, rows, len(old))
            tensors = [*old, *new]
            changed = {"_structure": structure, "_listed": False, "_hyper": hyper, "_values": hyper.values}
            inputs = type(self._inputs)(tensors, self._space, self.zero_grads)
            progress = self._progress.with_more(len(new))
            changed |= {"_tensors": tensors, "_inputs": inputs, "_plan": None, "_progress": progress}
            changed |= {"_usual": replace(self._usual, progress=progress)}
            changed["params"] = structure.build(tensor.owner for tensor in tensors)
            self.__dict__.update(changed)  # all of it, or nothing

    # ── stepping ────────────────────────────────────────────────────────────────────────────────────────────────

    def step(self, grads: Any, *, grad_scale: float | None = None, stats: bool = False) -> Stats | None:
        """One step with these gradients.

        Parameters
        ----------
        grads : list, tuple or dict of arrays
            In the structure of `params`, each with the shape of its parameter and any dtype of these, float64 where the
            parameter is, C-contiguous; None leaves its tensor alone, and out of the norms, and its own count
            of steps, the t of the rule, where it is. Where all are None nothing changes but `t`. They may be other
            arrays at each step; none is kept beyond it (but by target "cuda").
        grad_scale : float, optional
            The loss scale: gradients are multiplied by 1 / grad_scale, rounded to their dtype, before anything sees
            them.
        stats : bool
            Whether to give statistics, which are taken in the passes that happen anyway.

        Returns
        -------
        Stats or None
            The statistics, if they were asked for.

        Raises
        ------
        TypeError, ValueError
            A gradient does not fit, `grad_scale` is no positive number, or a schedule gives no value that the rule
            takes; nothing was written, and `t` stays.
        ScalarError
            A scalar of the rule has no value at this step, such as x/0; likewise.
        InterruptedStep
            An earlier step, or a load, was interrupted in the midst of it.

        Notes
        -----
        An exception from outside, such as the KeyboardInterrupt of Ctrl-C, finds a step done, with `t` and all state,
        or not begun. On a GPU alone, where a step is several launches, it can find it half done: `step`, `save` and `t`
        are errors then, until `load` or `load_state_dict`.
        """
        try:
            if self._begun is not None or self._progress.unfinished:
                self._resolve()
            # A list has the structure of parameters without groups and names, which is usual.
            listed = grads if type(grads) is list and self._listed else self._structure.flatten(grads, "grads")
            if len(listed) != len(self._tensors):
                raise ValueError(f"grads has {len(listed)} arrays, params has {len(self._tensors)}")
            return self._step(listed, grad_scale, stats)
        except MISTAKES as problem:
            shorten(problem)
            raise

    def _step(self, listed: Sequence[Any], grad_scale: float | None, stats: bool) -> Stats | None:
        """`step`, with a gradient or None for each tensor in order, where no step is open."""
        if not self._inputs.take(listed, self._plan):
            self._prepare()
        how = self._how
        if grad_scale is not None or stats:
            scale = 1.0 if grad_scale is None else loss_scale(grad_scale)
            records = np.zeros(len(self._places) + 1, RECORD) if stats else None
            how = replace(how, grad_scale=scale, stats=records)
        before = self._count[0]
        try:
            if not self._plain:
                self._unusual_step(how)
            else:
                applied = self._plan.step(self._values, before + 1, how) is False
                if applied and not self._progress.undecided and self._count[0] == before:
                    self._count[0] = before + 1  # the engine has counted it, unless there was nothing to do
        finally:
            self._inputs.release()
            if self._tell is not None or self.zero_grads:
                self._tell_of_changes(before, listed)
        return Stats(how.stats, self._places, len(self._tensors)) if stats else None

    def _tell_of_changes(self, before: int, grads: Sequence[Any]) -> None:
        """Tell the library of the tensors which were written to by a step behind so many."""
        progress = self._progress
        if self._tell is not None and (self._count[0] != before or progress.undecided or progress.unfinished):
            self._tell()
        tell = teller(array for array in grads if array is not None) if self.zero_grads else None
        if tell is not None:
            tell()

    def _prepare(self) -> None:
        """Make the plan of steps with the arrays that were taken."""
        self._set(_plan=None)  # what belongs to a plan is replaced with it, or there is none
        inputs, progress = self._inputs, self._progress
        if not progress.are_taking_part(inputs.places):
            self._settle()
            progress.take_part(inputs.places)
        behind = progress.behind(inputs.places)
        if not (self.rule.definition.time or self._usual.stochastic):
            behind[:] = 0  # nobody asks
        tensors = inputs.stepped
        starting = [tensor for tensor in tensors if not tensor.started]
        how = self._usual
        if starting:
            how = replace(how, starting=np.array([not tensor.started for tensor in tensors], np.uint8))
        plan = self._engine.plan(inputs, behind)
        tell = inputs.teller(tensor.owner for tensor in tensors)
        self._set(_tell=tell, _starting=starting, _places=inputs.places, _how=how)
        self._set(_plain=not (starting or self._hyper.schedules), _plan=plan)

    def _unusual_step(self, how: How) -> None:
        """A step with schedules, or the first of some tensors, whose state starts now; undone if it changes nothing.

        State that starts as the gradient is begun by the kernel, which knows the gradient as the rule sees it.
        """
        t = self.t + 1
        scheduled = self._hyper.at(t)
        beginning = [
            (tensor, state, tensor.scalars[state.name] if state.scalar else tensor.arrays[state.name])
            for tensor in self._starting
            for state in self._kernel.state
            if isinstance(state.initial, str) and state.initial != "g"
        ]
        scales = [tensor.scales(state.name) for tensor, state, _ in beginning]
        every = [*(own for _, _, own in beginning), *(own for own in scales if own is not None)]
        before = [(own, self._space.copy(own)) for own in every]
        self._set(_begun=Begun(t, self._values.copy(), self._starting, before))
        try:
            self._values[...] = scheduled
            rows = self._rows()
            for tensor, state, _ in beginning:
                self._begin(tensor, state, rows[tensor.group])
            if self._plan.step(self._values, t, how) is False and not self._progress.undecided:
                self._count[0] = t
        finally:
            if not self._progress.unfinished:
                self._resolve()

    def _resolve(self) -> None:
        """Take a step that was begun for done or for not begun, whichever it is: by what the engine has counted.

        It can be interrupted, and then begins anew.
        """
        unfinished = self._progress.unfinished
        if unfinished:
            what = f"{unfinished} of this optimizer was interrupted, and a part of it may have been done"
            raise InterruptedStep(f"{what}: give it a whole state by load(…) or load_state_dict(…)")
        begun = self._begun
        if begun is None:
            return
        if self._progress.undecided:
            self._learn()
        if self._count[0] == begun.t:
            for tensor in begun.tensors:
                tensor.started = True
            self._set(_starting=[], _how=self._usual, _plain=not self._hyper.schedules)
        else:
            self._values[...] = begun.values
            for own, old in begun.before:
                self._space.write(own, old)
        self._set(_begun=None)

    def _learn(self) -> None:
        """Learn how many steps were applied, where a device decided that."""
        self._count[0] = self._engine.applied()
        self._progress.undecided = False

    # ── reading and setting ─────────────────────────────────────────────────────────────────────────────────────

    @property
    def t(self) -> int:
        """Steps taken; setting it to n makes the next step n + 1, for each tensor too, and resets no state."""
        self._settle()
        return int(self._count[0])

    def _settle(self) -> None:
        """Know which steps were applied.

        Raises
        ------
        InterruptedStep
            Of one a part was.
        """
        if self._begun is not None or self._progress.unfinished:
            self._resolve()
        if self._progress.undecided:
            self._learn()

    @property
    def state(self) -> dict[str, Any]:
        """State by name in the structure of `params`, as live arrays, and as floats where it is scalar."""
        if not self._progress.unfinished:
            self._settle()
        return {
            state.name: self._structure.build(
                tensor.number(state.name) if state.scalar else tensor.shown(state.name) for tensor in self._tensors
            )
            for state in self._kernel.state
        }

    @property
    def groups(self) -> list[Group]:
        """The parameter groups, one where none were given, with "params" and hyperparameters that can be set."""
        return [Group(self, k) for k in range(len(self._values))]

    def _rows(self) -> list[dict[str, float]]:
        """The hyperparameters of each group."""
        return [self._hyper.of(k) for k in range(len(self._values))]

    def _assign(self, groups: Iterable[int], name: str, value: Any) -> None:
        """Set a hyperparameter of some groups."""
        self._settle()
        self._hyper.assign(groups, name, value, max(self.t, 1) if callable(value) else 1)
        self._set(_plain=not (self._starting or self._hyper.schedules))

    def __getattr__(self, name: str) -> Any:
        # Called for what is not an ordinary attribute: hyperparameters and options.
        own = self.__dict__
        if name in own.get("_names", ()):
            if own["_begun"] is not None and not own["_progress"].unfinished:
                self._resolve()
            values = own["_hyper"].column(name)
            if values.count(values[0]) < len(values):
                each = ", ".join(map(repr, values))
                raise ValueError(f"{name!r} differs between the groups ({each}); read opt.groups[k][{name!r}]")
            return values[0]
        if name in own.get("_options", ()):
            return own["_options"][name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{nearest(name, own.get('_names', ()))}")

    def __setattr__(self, name: str, value: Any) -> None:
        with SHORT:
            if name in self._names:
                self._assign(range(len(self._values)), name, value)
            elif name in self._options:
                raise ValueError(f"option {name!r} was fixed when the kernel was generated; make another Optimizer")
            elif name == "t":
                t = steps_taken(value)
                self._settle()
                values = self._hyper.at(max(t, 1))
                self._set(_plan=None)
                self._hyper.replace(values, self._hyper.schedules)
                self._progress.begin(t, t)
            elif name in self.__dict__ or hasattr(type(self), name):
                raise AttributeError(f"{name!r} of an Optimizer cannot be set")
            else:
                known = [*self._names, "t"]
                raise AttributeError(
                    f"{name!r} is not a hyperparameter{nearest(name, known)} (there are {', '.join(known)})"
                )

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._names, *self._options]

    def __repr__(self) -> str:
        values = {name: self._hyper.column(name) for name in self._names}
        alike = {name: own[0] if own.count(own[0]) == len(own) else own for name, own in values.items()}
        settings = [f"{name}={value!r}" for name, value in {**alike, **self._options}.items()]
        groups = f" in {len(self._values)} groups" if self._structure.grouped else ""
        t = "t=?" if self._progress.unfinished else f"t={self.t}"
        about = ", ".join([f"{self.rule.name} of {len(self._tensors)} tensor(s){groups}", t, *settings])
        return f"<Optimizer {about}>"

    def __copy__(self) -> NoReturn:
        raise TypeError("two Optimizers cannot share their parameters and state: copy.deepcopy() copies both")

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimizer:
        return copying.deep(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copying.made, (type(self), copying.recipe(self))

    # ── resuming ────────────────────────────────────────────────────────────────────────────────────────────────

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs besides the parameters, as copies.

        Returns
        -------
        dict
            "rule" and "hash" (str), "options", "hyperparameters" (or "groups", a list with those of each, where there
            are groups), "t" (int), "steps" (how many each tensor has taken, in the structure of `params`), "state"
            (name to copies in that structure) and "started" (whether each tensor has had a step). Where there are
            schedules, "schedules" has a dict for each group: name to what the schedule's `to_dict()` gives, or to None
            for one that has no such method: of that one only the present value is saved, and a warning says so.
        """
        return resume.state_dict(self)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; the next step has the bits that it would have had there.

        A hyperparameter that was a number there is that number here; one that was a schedule with a `to_dict()` is the
        same schedule; one that was another function of t keeps the schedule that it has here, and where it has none
        here, it stays at the value that it had there, with a warning.

        Raises
        ------
        TypeError, ValueError
            It is of another rule, other options or other shapes; nothing was changed, and the message says all that
            does not fit.
        """
        with SHORT:
            resume.checked(self, saved).apply(self)

    def save(self, path: str | os.PathLike[str], /, **companions: Any) -> None:
        """Write a checkpoint: parameters, state, hyperparameters, schedules and t, in the safetensors format.

        The file is written beside the old one, which it replaces when it is complete: a process that is killed at any
        time leaves one of the two. What it was writing is removed by the next `save` to the same path.

        Parameters
        ----------
        path : path
        **companions
            Other objects to save with it, by names of your choice, such as `plateau=plateau` for a ReduceLROnPlateau:
            what their `state_dict()` gives, as JSON: dicts with text as keys, lists, text, numbers, True, False and
            None; tuples come back as lists. `opt.load(path, plateau=plateau)` gives it to their `load_state_dict`.

        Raises
        ------
        OSError
            The file cannot be written; an earlier one is as it was.
        TypeError
            A companion has no `state_dict` or no `load_state_dict`.
        ValueError
            A key of `params` or the state of a companion cannot be written down.

        Warns
        -----
        UserWarning
            A hyperparameter is a function of t without a `to_dict()`: only its present value is saved.
        """
        with SHORT:
            checkpoint.save(self, path, companions)

    load = checkpoint.Load()


def loss_scale(value: Any) -> float:
    """A loss scale: a positive number with a finite inverse."""
    try:
        number = double(value)
    except (TypeError, ValueError):
        raise TypeError(f"grad_scale is a number, not {value!r}") from None
    except OverflowError:
        number = math.inf
    if not (number > 0 and math.isfinite(number) and math.isfinite(1 / number)):
        raise ValueError(f"grad_scale is a positive number with a finite inverse, not {value!r}")
    return number


def check_threads(threads: Any) -> None:
    """Raise where this is no number of threads."""
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, (int, np.integer)):
        raise TypeError(f"threads is None or a whole number, not {threads!r}")
    if threads < 1:
        raise ValueError(f"threads is a number from 1, not {threads}")


def engine(target: Any) -> Callable[..., Any]:
    """What makes the engine of a target."""
    if isinstance(target, str):
        return targets.engine(target)
    if not callable(target):
        raise TypeError(f"target is the name of a target, or a callable that gives an engine, not {kind(target)}")
    return target  # type: ignore[no-any-return]
