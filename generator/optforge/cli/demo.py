"""The demonstration: a small network on handwritten digits, trained by every rule and checked against the reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from optforge import Optimizer
from optforge.cli.digits import BATCH, Digits, Floats, Network, batches, initial_parameters, load_digits
from optforge.core.diagnostics import EnvironmentProblem
from optforge.engines.c.engine import CTarget
from optforge.library.named import named_rule
from optforge.train.pictures import new_figure, require_place, save, tidy

SEED_RULES = ("sgd", "momentum", "nesterov", "adagrad", "adadelta", "rmsprop", "adam")

# One rate per rule, each where this network trains well; other rules keep their own default.
LEARNING_RATES = {
    "sgd": 0.1,  # nothing adds up, so more than the next two bear
    "momentum": 0.02,  # the velocity sums about 1 / (1 - 0.9) = 10 gradients
    "nesterov": 0.03,  # looking ahead damps the swings, which leaves room for a little more
    "adagrad": 0.01,  # the first step moves every parameter by lr, later ones by less and less
    "adadelta": 1.0,  # the rule finds its own scale; 1 takes it as it is
    "rmsprop": 0.001,  # every step moves a parameter by about lr, however small the gradient
    "adam": 0.002,  # as rmsprop, but averaging the gradient takes out noise
}

# Okabe and Ito's palette without its yellow, which is too faint on white.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
DASHES = ("-", "--", "-.")


@dataclass(frozen=True)
class Result:
    """What one rule did.

    Attributes
    ----------
    rule
        Name of the rule.
    losses
        Loss over the whole training set, before training and after every epoch.
    accuracy
        Fraction of the test images that the trained network names correctly.
    seconds_per_step
        Median time of the compiled optimizer's step, in seconds.
    first_difference
        First step, counted from 1, after which any bit of a parameter or of the state differed from the reference;
        None where there was none.
    """

    rule: str
    losses: tuple[float, ...]
    accuracy: float
    seconds_per_step: float
    first_difference: int | None

    @property
    def verdict(self) -> str:
        """How the trajectory compares with the reference, in words."""
        return "bit-identical" if self.first_difference is None else f"differs from step {self.first_difference}"


def same_bits(left: Any, right: Any) -> bool:
    """Whether two arrays or numbers have the same bits; any NaN equals any NaN."""
    left, right = np.asarray(left), np.asarray(right)
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    equal = left.view(f"u{left.itemsize}") == right.view(f"u{right.itemsize}")
    return bool(equal.all() or (equal | (np.isnan(left) & np.isnan(right))).all())


def same_trajectory(compiled: Optimizer, reference: Optimizer, parameters: Sequence[tuple[Floats, Floats]]) -> bool:
    """Whether parameters and state of two optimizers have the same bits."""
    pairs: list[tuple[Any, Any]] = list(parameters)
    for name, values in reference.state.items():
        other = compiled.state[name]
        pairs += [(other, values)] if isinstance(values, float) else zip(other, values, strict=True)
    return all(same_bits(left, right) for left, right in pairs)


def train(
    rule: str, digits: tuple[Digits, Digits], *, epochs: int, seed: int, target: str | CTarget, tick: Callable[[], None]
) -> Result:
    """Train with one rule on `target` and, in lock step, on the reference; `tick` is called after every epoch.

    Each of the two follows the gradients at its own parameters, so that a single wrong bit is never mended.
    """
    training, test = digits
    network, judge = Network(BATCH), Network(len(training.labels))
    parameters, reference_parameters = initial_parameters(seed), initial_parameters(seed)
    rate: dict[str, Any] = {"lr": LEARNING_RATES[rule]} if rule in LEARNING_RATES else {}
    # Emitted files are taken as an engine takes them, with their own defaults.
    known = named_rule(rule)
    defaults = target(known, known.kernel()).defaults() if isinstance(target, CTarget) else {}
    compiled = Optimizer(parameters, rule, target=target, **(defaults | rate))
    reference = Optimizer(reference_parameters, rule, target="numpy", **rate)
    both = list(zip(parameters, reference_parameters, strict=True))

    order = np.random.default_rng([seed, 2])
    losses = [judge.evaluate(parameters, training)[0]]
    seconds: list[float] = []
    first_difference = None
    for _ in range(epochs):
        for batch in batches(training, order):
            gradients = network.differentiate(parameters, batch)
            began = time.perf_counter()
            compiled.step(gradients)
            seconds.append(time.perf_counter() - began)
            if first_difference is None:
                reference.step(network.differentiate(reference_parameters, batch))
                if not same_trajectory(compiled, reference, both):
                    first_difference = len(seconds)
        losses.append(judge.evaluate(parameters, training)[0])
        tick()
    accuracy = Network(len(test.labels)).evaluate(parameters, test)[1]
    return Result(rule, tuple(losses), accuracy, float(np.median(seconds)), first_difference)


def tabulate(results: Sequence[Result]) -> Table:
    """Table of the results, one row per rule."""
    table = Table(title="Handwritten digits: one network, every rule", title_style="bold")
    table.add_column("rule")
    for heading in ("final loss", "test accuracy", "µs per step"):
        table.add_column(heading, justify="right")
    table.add_column("against reference")
    for result in results:
        style = "green" if result.first_difference is None else "bold red"
        table.add_row(
            Text(result.rule),
            f"{result.losses[-1]:.2g}",
            f"{result.accuracy:.1%}",
            f"{result.seconds_per_step * 1e6:.1f}",
            Text(result.verdict, style=style),
        )
    return table


def draw(results: Sequence[Result], picture: Path) -> None:
    """Write the loss curves to `picture` as a PNG; the file is there completely or not at all."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    # From the highest final loss to the lowest, so that the legend lists the curves as they end.
    for index, result in sorted(enumerate(results), key=lambda pair: -pair[1].losses[-1]):
        colour, dash = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
        axes.plot(range(len(result.losses)), result.losses, dash, color=colour, linewidth=2, label=result.rule)
    axes.set(title="Training loss on handwritten digits", xlabel="epoch", ylabel="mean cross-entropy", yscale="log")
    axes.margins(x=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, handlelength=3)
    tidy(axes)
    save(figure, picture)


def require_extra() -> None:
    """Fail before any training rather than after it."""
    try:
        import matplotlib.figure  # noqa: F401
        import sklearn.datasets  # noqa: F401
        import threadpoolctl  # noqa: F401
    except ImportError as problem:
        message = "the demo needs scikit-learn and matplotlib: pip install 'optforge[demo]'"
        raise EnvironmentProblem(message) from problem


def run(
    rules: Sequence[str] = SEED_RULES,
    *,
    epochs: int = 40,
    seed: int = 0,
    picture: Path | None,
    kernels: Path | None = None,
    console: Console | None = None,
) -> list[Result]:
    """Train one network with every rule, compare every step with the reference, and show what came out.

    Parameters
    ----------
    rules
        Names of the rules.
    epochs
        Passes over the training set, at least 1.
    seed
        Seed of the split, the initial parameters and the batch order; all rules share them.
    picture
        Where the loss curves go, as a PNG; None draws none.
    kernels
        Directory of emitted C files to compile; None generates them.
    console
        Where progress and the table go; standard output by default.

    Returns
    -------
    list of Result
        In the order of `rules`.

    Raises
    ------
    EnvironmentProblem
        scikit-learn or matplotlib is not installed, or there is no C compiler.
    OSError
        The picture cannot be written.
    """
    require_extra()
    console = console or Console()
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        require_place(picture)
    target = "c" if kernels is None else CTarget(kernels=kernels)
    digits = load_digits(seed)
    results = []
    from threadpoolctl import threadpool_limits

    columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
    # Matrices this small gain nothing from threads, which would wait for each other on a busy machine.
    with (
        threadpool_limits(1, user_api="blas"),
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("", total=epochs * len(rules))
        for rule in rules:
            progress.update(task, description=rule)
            result = train(rule, digits, epochs=epochs, seed=seed, target=target, tick=lambda: progress.advance(task))
            results.append(result)
            if not console.is_terminal:
                console.print(f"{rule}: {result.verdict}", markup=False, highlight=False, soft_wrap=True)
    console.print(tabulate(results))
    if picture is not None:
        draw(results, picture)
        console.print(f"loss curves: {picture}", markup=False, highlight=False, soft_wrap=True)
    return results
