"""The Optimizer that PyTorch's users hold: param_groups and state as torch.optim has them, our kernels under them."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..core.diagnostics import UsageError
from ..core.tracebacks import MISTAKES, SHORT, shorten
from ..engines.stats import Stats
from ..frontend.settings import check_seed
from ..library.rule import Rule
from ..train.optimizer import check_threads
from .formulas import RUN, Formula, formula
from .stepper import How, Stepper
from .tensors import Moved

TARGETS = ("c", "cuda", "numpy")
Loss = Any
profiling: Callable[[], bool] = torch.autograd._profiler_enabled
try:  # what looks at each call of Python, where `torch.compile` is at work
    watcher: Callable[[], object] = torch._C._dynamo.eval_frame.get_eval_frame_callback
except AttributeError:
    watcher = torch.compiler.is_compiling


class Optimizer(torch.optim.Optimizer):  # type: ignore[misc]
    """An update rule as an optimizer of PyTorch.

    Parameters
    ----------
    params : iterable of tensors, of (name, tensor), or of dicts
        As of every optimizer of PyTorch: `model.parameters()`, `model.named_parameters()`, or parameter groups, dicts
        of "params" and of hyperparameters of their own. Float32, float64, bfloat16 or float16, dense in memory in any
        order of dimensions (channels-last), on the CPU; DTensors of `fully_shard` too.
    rule : Rule or str
        A rule; the name of a built-in one, "adamw"; a composition, "clip_by_global_norm:adamw"; "FILE.py:NAME"; or the
        name of an optimizer of torch.optim, whose formula, settings and defaults it has then: "AdamW", "SGD",
        "RMSprop", "Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "Rprop", "ASGD".
    lr : float or tensor, optional
        A hyperparameter like the others of `settings`, which may stand third, as in torch.optim.
    target : str, optional
        "c", "cuda" or "numpy", the reference; where parameters are decides between the first two if it is left out.
    threads : int, optional
        Largest number of threads of a step, which never changes its bits.
    skip_nonfinite : bool
        Whether a step with a NaN or an infinity in any gradient, after unscaling, changes nothing.
    zero_grads : bool
        Whether a step sets the gradients to zero when it is done with them, in the same pass.
    store, master, rounding, seed
        How arrays are stored: as of `optforge.Optimizer`.
    **settings
        Hyperparameters and static options of the rule. `betas=(b1, b2)` are a rule's beta1 and beta2, which may be
        given so too; in `param_groups` they are "betas". `foreach` and `fused` are taken and mean nothing.

    Attributes
    ----------
    param_groups : list of dict
        What steps go by, with whatever schedulers and users write there. Static options are the same in all groups.
    state : dict
        For each parameter that has had a step, "step" and the rule's state by name, as live tensors laid out as the
        parameter; for a rule whose formula is PyTorch's by PyTorch's names ("exp_avg").
    rule : Rule

    Raises
    ------
    TypeError, ValueError
        A setting is none of the rule, or has no value for it, or a parameter does not do.
    RuleError
        The rule's text was refused.
    EnvironmentProblem
        The kernel cannot be compiled here.

    Examples
    --------
    >>> import torch
    >>> from optforge.torch import Optimizer
    >>> w = torch.nn.Parameter(torch.ones(3))
    >>> opt = Optimizer([w], "SGD", lr=0.5, momentum=0.9)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.tolist()
    [0.5, 0.5, 0.5]
    """

    param_groups: list[dict[str, Any]]
    rule: Rule
    _formula: Formula
    _how: How
    _stepper: Stepper | None
    _step_supports_amp_scaling = True  # GradScaler leaves the scale to `step`

    def __init__(
        self,
        params: Iterable[Any],
        rule: Rule | str,
        lr: Any = None,
        *,
        target: str | None = None,
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
            if isinstance(params, str):
                raise TypeError(f"the parameters come first: Optimizer(params, {params!r})")
            if isinstance(params, torch.nn.Module):
                raise TypeError("params is a model: write Optimizer(model.parameters(), …), or named_parameters()")
            if target not in (None, *TARGETS):
                raise UsageError(f"target is {' or '.join(map(repr, TARGETS))}, not {target!r}")
            check_threads(threads)
            check_seed(seed)
            given = {**settings, **({} if lr is None else {"lr": lr})}
            self._formula = formula(rule, given)
            self._how = How(target, threads, bool(skip_nonfinite), bool(zero_grads), dict(store or {}), master)
            self._how.rounding, self._how.seed = rounding, int(seed)
            self.rule, self._stepper = self._formula.rule, None
            self._formula.check_names(given)
            check_run(given)
            defaults = self._formula.take(given, self._formula.defaults)
            super().__init__(params, {k: v for k, v in defaults.items() if k not in RUN})
            self._stepper = Stepper(self._formula, self._how, self.param_groups, {})

    # ── parameter groups and state ──────────────────────────────────────────────────────────────────────────────────

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group: "params", a tensor or several, maybe with names, and its own hyperparameters.

        Raises
        ------
        TypeError, ValueError
            A parameter or a hyperparameter does not do; nothing was changed then.
        """
        with SHORT:
            if isinstance(param_group, dict) and "params" in param_group:
                where = f"param_groups[{len(self.param_groups)}]: "
                own = {name: value for name, value in param_group.items() if name not in ("params", "param_names")}
                self._formula.check_names(own, where, others=True)
                check_run(own)
                taken = self._formula.take(own, self.defaults, where)
                flat = self._formula.flat
                param_group = {k: v for k, v in param_group.items() if k not in own and k not in RUN}
                param_group |= {k: v for k, v in taken.items() if k not in RUN and k not in flat}
            super().add_param_group(param_group)
            if self._stepper is not None:  # else the first groups are being taken
                try:
                    self._stepper = self._renewed()
                except BaseException:
                    del self.param_groups[-1]
                    raise

    @property
    def state(self) -> Any:
        """For each parameter that has had a step, its state by name."""
        if self._stepper is not None:
            self._stepper.show(self._state)
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        self._state, self._stepper = state, None

    def _renewed(self) -> Stepper:
        """What steps the groups as they are now, with the state that there is."""
        return Stepper(self._formula, self._how, self.param_groups, self.state)

    # ── steps ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def step(
        self, closure: Callable[[], Loss] | None = None, *, grad_scale: Any = None, stats: bool = False
    ) -> Loss | Stats | None:
        """One step with the gradients that the parameters have.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model anew, calls `backward` and gives the loss.
        grad_scale : float or tensor, optional
            The loss scale: gradients are multiplied by 1 / grad_scale before anything sees them.
        stats : bool
            Whether to give statistics, which are taken in the passes that happen anyway.

        Returns
        -------
        loss, Stats or None
            What the closure gave; with `stats` a Stats, and with both the pair of them.

        Raises
        ------
        TypeError, ValueError
            A gradient or a hyperparameter does not do; nothing was written.
        """
        if watcher():
            return uncompiled_step(self, closure, grad_scale, stats)
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or profiling()
        ):
            given = {} if grad_scale is None else {"grad_scale": grad_scale}
            given |= {"stats": stats} if stats else {}
            return hooked_step(self, **given) if closure is None else hooked_step(self, closure, **given)
        return self._step(closure, grad_scale, stats)

    step.hooked = True  # type: ignore[attr-defined] # PyTorch need not wrap it

    def _step(self, closure: Callable[[], Loss] | None = None, grad_scale: Any = None, stats: bool = False) -> Any:
        """`step`, between the hooks."""
        loss: Loss = None
        told: Stats | None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            stepper, own = self._stepper, self.__dict__
            if stepper is None or not stepper.serves(self.param_groups, self._state):
                stepper = self._stepper = self._renewed()
            if "found_inf" in own:  # GradScaler has looked at the gradients
                grad_scale = product(own.get("grad_scale"), grad_scale)
                if getattr(own["found_inf"], "is_cuda", False):  # the device finds the same, without being waited for
                    stepper.skip_from_here()
                elif own["found_inf"] is not None and float(whole(own["found_inf"])) != 0:
                    told = stepper.skip()
                    return loss if not stats else told if closure is None else (loss, told)
            if grad_scale is not None:
                grad_scale = float(whole(grad_scale))
            try:
                told = stepper.step(grad_scale, stats)
            except Moved:
                stepper = self._stepper = self._renewed()
                told = stepper.step(grad_scale, stats)
        except MISTAKES as problem:
            shorten(problem)
            raise
        if not stats:
            return loss
        return told if closure is None else (loss, told)

    # ── resuming ────────────────────────────────────────────────────────────────────────────────────────────────────

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, of this class or of the optimizer of PyTorch with the same formula.

        Where both have names (`named_parameters()`), state goes to the parameter of its name, whatever groups they are
        in, and a group has the hyperparameters of the saved group that its parameters were in.

        Raises
        ------
        TypeError, ValueError
            It does not fit; nothing was changed.
        """
        with SHORT:
            saved = dict(state_dict)
            for hook in self._optimizer_load_state_dict_pre_hooks.values():
                changed = hook(self, saved)
                saved = saved if changed is None else changed
            groups, state = loaded(self._formula, self.param_groups, saved)
            stepper = Stepper(self._formula, self._how, groups, state)
            self.param_groups, self._state, self._stepper = groups, defaultdict(dict, state), stepper
            for hook in self._optimizer_load_state_dict_post_hooks.values():
                hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "defaults": self.defaults,
            "state": self.state,
            "param_groups": self.param_groups,
            "formula": self._formula,
            "how": self._how,
        }

    def __setstate__(self, saved: dict[str, Any]) -> None:
        saved = dict(saved)
        self._formula, self._how = saved.pop("formula"), saved.pop("how")
        self.rule, self.state = self._formula.rule, saved.pop("state")
        super().__setstate__(saved)
        self.defaults.pop("differentiable", None)

    def __repr__(self) -> str:
        return f"{self._formula.name} {super().__repr__()}"


hooked_step = torch.optim.Optimizer.profile_hook_step(Optimizer._step)


def uncompiled_step(opt: Optimizer, closure: Any, grad_scale: Any, stats: bool) -> Any:
    """A step inside of what `torch.compile` compiles, which runs as it is.

    The decorator on `step` itself would load the compiler at the import, which takes two seconds.
    """
    return torch.compiler.disable(Optimizer.step)(opt, closure, grad_scale=grad_scale, stats=stats)


def whole(value: Any) -> Any:
    """A number that may be a DTensor."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def product(one: Any, two: Any) -> Any:
    """The product of scales, each of which may not be given."""
    return one if two is None else two if one is None else one * two


def check_run(given: Mapping[str, Any]) -> None:
    """Raise ValueError where steps are to be run as they are not."""
    if given.get("differentiable"):
        raise ValueError("differentiable=True: kernels write in place, and no gradient goes through a step")


@dataclass(frozen=True)
class Place:
    """A parameter of a state dict: its group there, and its number."""

    group: int
    number: Any


def loaded(
    own: Formula, groups: Sequence[Mapping[str, Any]], saved: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[Any, Any]]:
    """Groups and state as a state dict has them, for the parameters of some groups.

    Raises
    ------
    TypeError, ValueError
        It is no state dict, or its groups do not fit.
    """
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= set(saved):
        has = f"; this one has {', '.join(map(repr, [*saved][:3]))} …" if isinstance(saved, Mapping) else ""
        raise TypeError(f"the state dict of an optimizer has 'state' and 'param_groups'{has}")
    theirs = saved["param_groups"]
    pairs = places(groups, theirs)
    found: list[dict[str, Any]] = []
    for k, group in enumerate(groups):
        sources = list(dict.fromkeys(place.group for place in pairs[k]))
        given = [hyper(own, theirs[source]) for source in sources] or [hyper(own, group)]
        if any(different(one, given[0]) for one in given[1:]):
            raise ValueError(
                f"the parameters of param_groups[{k}] were in groups {sources}, whose hyperparameters differ: "
                "give the parameters the groups that they had"
            )
        fresh = {name: copied(value) for name, value in given[0].items()}
        fresh["params"] = group["params"]
        if "param_names" in group:
            fresh["param_names"] = list(group["param_names"])
        elif sources and "param_names" in theirs[sources[0]]:
            fresh["param_names"] = list(theirs[sources[0]]["param_names"])
        found.append(fresh)
    state, params = {}, [p for group in groups for p in group["params"]]
    for p, place in zip(params, itertools.chain.from_iterable(pairs), strict=True):
        entry = saved["state"].get(place.number)
        if entry:
            state[p] = dict(entry)
    known = {place.number for row in pairs for place in row}
    lost = [number for number, entry in saved["state"].items() if number not in known and entry]
    if lost:
        raise ValueError(f"it has the state of {', '.join(map(repr, lost))}, which are no parameters here")
    return found, state


def places(groups: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> list[list[Place]]:
    """For each group where each of its parameters is in a state dict: by names, or by the order."""
    sizes, given = ([len(group["params"]) for group in each] for each in (groups, theirs))
    if sizes == given:
        return [[Place(k, number) for number in group["params"]] for k, group in enumerate(theirs)]
    if not all("param_names" in group for group in (*groups, *theirs)):
        what = f"the state dict has groups of {given} parameters, here are {sizes}"
        raise ValueError(f"{what}: with named_parameters(), there and here, other groups are found by their names")
    by_name = {
        name: Place(k, number)
        for k, group in enumerate(theirs)
        for name, number in zip(group["param_names"], group["params"], strict=True)
    }
    names = [name for group in groups for name in group["param_names"]]
    missing = [name for name in names if name not in by_name]
    more = sorted(by_name.keys() - set(names))
    if missing or more:
        parts = [f"it lacks {', '.join(map(repr, missing))}"] if missing else []
        parts += [f"it has {', '.join(map(repr, more))}, not to be found here"] if more else []
        raise ValueError(f"the state dict is of other parameters: {'; '.join(parts)}")
    return [[by_name[name] for name in group["param_names"]] for group in groups]


def hyper(own: Formula, group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group has beside its parameters, but for how PyTorch is to run it."""
    differing = [f"{name}={group[name]!r}" for name, value in own.others.items() if group.get(name, value) != value]
    if differing:
        raise ValueError(f"it is of another formula than {own.name}: {', '.join(differing)}")
    left = ("params", "param_names", *RUN)
    missing = {name: value for name, value in own.missing.items() if name not in group}
    options = {name: own.defaults[name] for name in own.options if name not in group}
    return {**missing, **options, **{name: value for name, value in group.items() if name not in left}}


def different(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether hyperparameters of groups differ."""
    return one.keys() != other.keys() or any(bool(one[name] != other[name]) for name in one)


def copied(value: Any) -> Any:
    """A value of a group that nobody else has."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
