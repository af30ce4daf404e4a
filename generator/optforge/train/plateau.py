"""Reduce the learning rate when a metric stops improving, with PyTorch's counting or with Keras'."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .schedules import not_negative, real, whole

MODES = ("min", "max")
COUNTINGS = ("torch", "keras")
EPS = {"torch": 1e-8, "keras": 0.0}  # what each library has


class ReduceLROnPlateau:
    """Multiplies the learning rates of an optimizer by a factor when a metric has not improved for some time.

    Call `step(metric)` after each evaluation. A metric improves the best so far where it is smaller by more than the
    threshold (`mode="max"`: larger); any other is a bad step. With `counting="torch"` the rates are reduced when more
    than `patience` bad steps follow each other, with `counting="keras"` when `patience` do (0 is as 1 there). So to
    reduce at the first step without improvement takes patience 0 with PyTorch's counting, and 1 with Keras'. The
    other differences:

    ====================  ===========================================  ==============================================
    counting              ``"torch"``                                  ``"keras"``
    ====================  ===========================================  ==============================================
    cooldown              counted down after the metric was judged,    counted down before; the step that ends it
                          so `cooldown` steps are no bad ones          counts already: `cooldown` - 1 steps do not
    a rate at its bound   is left alone, and waiting begins anew       is left alone, and goes on waiting
    ====================  ===========================================  ==============================================

    The defaults of all other arguments are PyTorch's. Keras' threshold (its min_delta) is absolute, and it leaves out
    no change, however small: `counting="keras", threshold_mode="abs", eps=0` is its class.

    Where the best metric is below 0, best·(1 ∓ threshold) is on its wrong side, so that an equal metric counts as
    better. This is PyTorch's formula; give `threshold_mode="abs"` for metrics that can be negative.

    Parameters
    ----------
    opt : Optimizer
        All of its groups are reduced. Its `lr` must be a number, not a schedule: a schedule already says what the rate
        is, and would overwrite what is reduced here.
    mode : str
        "min" where a smaller metric is better, "max" where a larger one is.
    factor : float
        Between 0 and 1.
    patience : int
        Bad steps that are waited for, from 0; see above.
    threshold : float
        From 0; below 1 where it is relative.
    threshold_mode : str
        "rel" for best·(1 ∓ threshold), "abs" for best ∓ threshold.
    cooldown : int
        Steps after a reduction in which bad steps are not counted.
    min_lr : float or sequence of float
        No rate is reduced below it; one for all groups, or one for each.
    eps : float
        A rate whose change would be no larger stays as it is.
    counting : str
        "torch" or "keras".

    Attributes
    ----------
    best : float
        The best metric so far; infinite before the first.
    num_bad_steps : int
        Bad steps since the last good one, reduction or cooldown.
    cooldown_left : int
        Steps of the cooldown that are still to come.

    Raises
    ------
    TypeError, ValueError
        An argument does not do; or the learning rate is a schedule.

    Examples
    --------
    >>> import numpy as np, optforge as of
    >>> opt = of.Optimizer([np.ones(3, np.float32)], "sgd", lr=0.5, target="numpy")
    >>> plateau = of.ReduceLROnPlateau(opt, patience=1)
    >>> for loss in (3.0, 2.0, 2.0, 2.0):
    ...     reduced = plateau.step(loss)
    >>> reduced, opt.lr
    (True, 0.05)
    """

    def __init__(
        self,
        opt: Any,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float | Sequence[float] = 0.0,
        eps: float = EPS["torch"],
        counting: str = "torch",
    ):
        self.mode = choice("mode", mode, MODES)
        self.counting = choice("counting", counting, COUNTINGS)
        self.factor = real("factor", factor)
        if not 0 < self.factor < 1:
            raise ValueError(f"factor is a number between 0 and 1, not {factor!r}")
        self.patience = whole("patience", patience)
        self.cooldown = whole("cooldown", cooldown)
        self.threshold = not_negative("threshold", threshold)
        self.threshold_mode = choice("threshold_mode", threshold_mode, ("rel", "abs"))
        if self.threshold_mode == "rel" and self.threshold >= 1:
            raise ValueError(f"a relative threshold is below 1, not {threshold!r}; threshold_mode='abs' takes any")
        self.eps = not_negative("eps", eps)
        self.opt = opt
        self.min_lrs = lower_bounds(min_lr, len(learning_rates(opt)))
        self.best = self._worst()
        self.num_bad_steps = 0
        self.cooldown_left = 0

    def _worst(self) -> float:
        return math.inf if self.mode == "min" else -math.inf

    def improves(self, metric: float) -> bool:
        """Whether a metric is better than the best so far by more than the threshold."""
        slack = self.threshold if self.mode == "max" else -self.threshold
        bound = self.best * (1 + slack) if self.threshold_mode == "rel" else self.best + slack
        return metric > bound if self.mode == "max" else metric < bound

    def step(self, metric: float) -> bool:
        """Judge a metric, and reduce the learning rates where it is time.

        Parameters
        ----------
        metric : float
            Anything with a float value. Infinity is a bad step where it is on the bad side, as a loss that overflowed.

        Returns
        -------
        bool
            Whether any learning rate was reduced.

        Raises
        ------
        TypeError
            The metric is None or no number; or the learning rate has become a schedule. Nothing was changed.
        ValueError
            The metric is NaN, or infinitely good; or the optimizer has another number of groups. Nothing was changed.
        """
        value = measured(metric, self.mode)
        rates = learning_rates(self.opt)
        if len(rates) != len(self.min_lrs):
            raise ValueError(
                f"the optimizer has {len(rates)} group(s) now, and had {len(self.min_lrs)}: "
                "make another ReduceLROnPlateau"
            )
        better = self.improves(value)
        bad, cooldown, due = self._count(better)
        reduced = self._reduce(rates) if due else False
        if due and (reduced or self.counting == "torch"):
            bad, cooldown = 0, self.cooldown
        if better:
            self.best = value
        self.num_bad_steps, self.cooldown_left = bad, cooldown
        return reduced

    def _count(self, better: bool) -> tuple[int, int, bool]:
        """Bad steps, steps of the cooldown, and whether it is time to reduce, after a metric that is better or not.

        PyTorch counts the cooldown down after it has judged the metric, Keras before.
        """
        cooling = self.cooldown_left > 0
        cooldown = self.cooldown_left - cooling
        counts = not better and not (cooling if self.counting == "torch" else cooldown > 0)
        bad = 0 if better else self.num_bad_steps + counts
        return bad, cooldown, counts and (bad > self.patience if self.counting == "torch" else bad >= self.patience)

    def _reduce(self, rates: list[float]) -> bool:
        """Give every group its smaller rate, all or, on an error, none; whether there was any."""
        smaller = [max(rate * self.factor, least) for rate, least in zip(rates, self.min_lrs, strict=True)]
        changed = {k: new for k, (rate, new) in enumerate(zip(rates, smaller, strict=True)) if rate - new > self.eps}
        done = []
        try:
            for k, new in changed.items():
                set_learning_rate(self.opt, k, new)
                done.append(k)
        except BaseException:
            for k in done:
                set_learning_rate(self.opt, k, rates[k])
            raise
        return bool(changed)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the arguments, as plain data that JSON can hold.

        The learning rates are not in it: they are in the optimizer's.

        Returns
        -------
        dict
            "mode" (str), "best" (float, or None before the first metric), "num_bad_steps" and "cooldown_left" (int).
        """
        return {
            "mode": self.mode,
            "best": self.best if math.isfinite(self.best) else None,
            "num_bad_steps": self.num_bad_steps,
            "cooldown_left": self.cooldown_left,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; the arguments stay this one's.

        Raises
        ------
        TypeError, ValueError
            It is no such dict, or is of the other mode; nothing was changed.
        """
        if not isinstance(saved, Mapping):
            raise TypeError(f"a state dict is a dict, not {saved!r}")
        missing = [name for name in ("mode", "best", "num_bad_steps", "cooldown_left") if name not in saved]
        if missing:
            raise ValueError(f"the state dict lacks {', '.join(map(repr, missing))}")
        if saved["mode"] != self.mode:
            raise ValueError(f"the state dict is of mode {saved['mode']!r}, this is {self.mode!r}")
        best = self._worst() if saved["best"] is None else real("best", saved["best"])
        bad, cooldown = (whole(name, saved[name]) for name in ("num_bad_steps", "cooldown_left"))
        self.best, self.num_bad_steps, self.cooldown_left = best, bad, cooldown

    def __repr__(self) -> str:
        return (
            f"<ReduceLROnPlateau mode={self.mode} factor={self.factor!r} patience={self.patience} "
            f"counting={self.counting} best={self.best!r} num_bad_steps={self.num_bad_steps}>"
        )


def choice(what: str, given: Any, accepted: Sequence[str]) -> str:
    """One of several strings."""
    if given not in accepted:
        raise ValueError(f"{what} is {' or '.join(map(repr, accepted))}, not {given!r}")
    return str(given)


def measured(metric: Any, mode: str) -> float:
    """A metric as a double."""
    try:
        if metric is None or isinstance(metric, (str, bytes)):
            raise TypeError
        value = float(metric)
    except (TypeError, ValueError):
        raise TypeError(f"the metric is a number, not {metric!r}") from None
    except OverflowError:
        value = math.inf if metric > 0 else -math.inf
    if math.isnan(value):
        raise ValueError("the metric is NaN, which is neither better nor worse; find out where it comes from")
    if value == (-math.inf if mode == "min" else math.inf):
        raise ValueError(f"the metric is {value}, which nothing could improve any more")
    return value


def lower_bounds(given: float | Sequence[float], groups: int) -> list[float]:
    """A lower bound of the rate for each group."""
    if isinstance(given, (list, tuple)):
        if len(given) != groups:
            raise ValueError(f"min_lr has {len(given)} numbers, and the optimizer {groups} group(s)")
        return [not_negative(f"min_lr[{k}]", own) for k, own in enumerate(given)]
    return [not_negative("min_lr", given)] * groups


# ── learning rates of an optimizer ──────────────────────────────────────────────────────────────────────────────────


def learning_rates(opt: Any) -> list[float]:
    """The learning rate of each group.

    Raises
    ------
    TypeError
        There is none, or one is a schedule.
    """
    try:
        rates = [group["lr"] for group in opt.groups] if hasattr(opt, "groups") else [opt.lr]
    except (AttributeError, KeyError):
        raise TypeError(f"{opt!r} has no learning rate 'lr' to reduce") from None
    # An Optimizer tells the value in use where it has a schedule, and keeps the schedule itself apart.
    scheduled = getattr(getattr(opt, "_hyper", None), "schedules", {})
    for k, rate in enumerate(rates):
        schedule = rate if callable(rate) else scheduled.get((k, "lr"))
        if schedule is not None:
            where = f" of group {k}" if len(rates) > 1 else ""
            raise TypeError(
                f"the learning rate{where} is a schedule, {schedule!r}, which would overwrite what is reduced; "
                "give the optimizer a number, or leave out ReduceLROnPlateau"
            )
    return [float(rate) for rate in rates]


def set_learning_rate(opt: Any, group: int, rate: float) -> None:
    """Give a group another learning rate."""
    if hasattr(opt, "groups"):
        opt.groups[group]["lr"] = rate
    else:
        opt.lr = rate
