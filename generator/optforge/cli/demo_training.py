"""The second part of the demonstration: one training with all that goes around a step, interrupted and resumed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from optforge import Monitor, Optimizer, ReduceLROnPlateau, clip_by_global_norm
from optforge.cli.demo import require_extra, same_bits
from optforge.cli.digits import BATCH, Digits, Network, batches, initial_parameters, load_digits
from optforge.library.named import named_rule

RULE = clip_by_global_norm(max_norm=1.0) >> named_rule("adam")
RATE = 0.02  # ten times what suits this network: there is something to clip, and to reduce
RESUMED_ON = {"c": "the compiled kernel", "numpy": "the NumPy reference"}


@dataclass(frozen=True)
class Outcome:
    """What became of the training.

    Attributes
    ----------
    reductions
        Epochs, counted from 1, after which the plateau reduced the rate.
    losses
        Loss over the whole training set, after every epoch.
    accuracy
        Fraction of the test images that the trained network names correctly.
    differences
        For each target on which the training was resumed, what did not end in the same bits; nothing where all did.
    """

    reductions: tuple[int, ...]
    losses: tuple[float, ...]
    accuracy: float
    differences: dict[str, tuple[str, ...]]

    @property
    def passed(self) -> bool:
        """Whether every resumed training ended in the bits of the uninterrupted one."""
        return not any(self.differences.values())


class Training:
    """An optimizer over a network's parameters, with its plateau.

    Parameters
    ----------
    digits, network, judge
        What all trainings share: the training images, the network for a batch and the one for all of them.
    seed
        Of the initial parameters and the order of the batches.
    target
        What the optimizer runs on.
    """

    def __init__(self, digits: Digits, network: Network, judge: Network, seed: int, target: str):
        self.digits, self.network, self.judge, self.seed = digits, network, judge, seed
        self.opt = Optimizer(initial_parameters(seed), RULE, lr=RATE, target=target)
        # Training ends near a loss of 0, so there is always some progress: less than a fifth in 3 epochs is too little.
        self.plateau = ReduceLROnPlateau(self.opt, factor=0.5, patience=2, threshold=0.2)
        self.losses: list[float] = []
        self.reductions: list[int] = []

    def run(self, epochs: Iterable[int], monitor: Monitor, after: Callable[[int], None] = lambda epoch: None) -> None:
        """Train for these epochs, counted from 1; `after` is called at the end of each."""
        opt = self.opt
        for epoch in epochs:
            # The order of an epoch follows from its number, so that a resumed training sees the same batches.
            for batch in batches(self.digits, np.random.default_rng([self.seed, 2, epoch])):
                grads = self.network.differentiate(opt.params, batch)
                wanted = monitor.wants(opt)
                stats = opt.step(grads, stats=wanted)
                monitor.update(opt, stats, loss=self.loss() if wanted else None)
            self.losses.append(self.loss())
            if self.plateau.step(self.losses[-1]):
                self.reductions.append(epoch)
            after(epoch)

    def loss(self) -> float:
        """Loss over the whole training set."""
        return self.judge.evaluate(self.opt.params, self.digits)[0]

    def differences(self, other: Training) -> tuple[str, ...]:
        """What has not the same bits as in another training."""
        mine, theirs = self.opt, other.opt
        pairs = {
            "parameters": (mine.params, theirs.params),
            **{f"state {name}": (mine.state[name], theirs.state[name]) for name in mine.state},
            "steps": ([mine.t], [theirs.t]),
            "learning rate": ([mine.lr], [theirs.lr]),
        }
        found = [name for name, (left, right) in pairs.items() if not all(map(same_bits, left, right))]
        found += ["plateau"] if self.plateau.state_dict() != other.plateau.state_dict() else []
        return tuple(found)


def run(*, epochs: int = 40, seed: int = 0, picture: Path | None, console: Console | None = None) -> Outcome:
    """Train once, with a checkpoint in the middle, resume from it, and compare the ends.

    Gradients are clipped by their global norm, the rate falls where the loss no longer does, and a Monitor watches.

    Parameters
    ----------
    epochs
        Passes over the training set; at least 2 are made, so that there is a middle.
    seed
        Seed of the split, the initial parameters and the batch order.
    picture
        Where the Monitor's picture goes, as a PNG; None draws none.
    console
        Where progress and result go; standard output by default.

    Raises
    ------
    EnvironmentProblem
        scikit-learn or matplotlib is not installed, or there is no C compiler.
    OSError
        The picture or the checkpoint cannot be written.
    """
    require_extra()
    console = console or Console()
    epochs = max(2, epochs)
    middle = epochs // 2
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)

    def say(text: str, verdict: str = "", style: str = "") -> None:
        console.print(Text.assemble(text, (verdict, style)), soft_wrap=True)

    from threadpoolctl import threadpool_limits

    digits, test = load_digits(seed)
    network, judge = Network(BATCH), Network(len(digits.labels))
    every = len(digits.labels) // BATCH  # steps of an epoch
    say("\nA whole training: clipped gradients, Adam, ReduceLROnPlateau, Monitor, and a checkpoint in the middle")
    # As in the comparison of the rules: threads would only wait for each other.
    with threadpool_limits(1, user_api="blas"), tempfile.TemporaryDirectory(prefix="optforge-demo-") as directory:
        checkpoint = Path(directory) / "middle.safetensors"
        straight = Training(digits, network, judge, seed, "c")

        def after(epoch: int) -> None:
            if epoch == middle:
                straight.opt.save(checkpoint, plateau=straight.plateau)

        # A table that stays in its place on a terminal; elsewhere so many lines would hide the result.
        with Monitor(every, plot=picture, show=console.is_terminal, console=console) as monitor:
            straight.run(range(1, epochs + 1), monitor, after)

        differences = {}
        for target in RESUMED_ON:
            resumed = Training(digits, network, judge, seed, target)
            resumed.opt.load(checkpoint, plateau=resumed.plateau)
            with Monitor(every, show=False) as monitor:
                resumed.run(range(middle + 1, epochs + 1), monitor)
            differences[target] = straight.differences(resumed)
    accuracy = Network(len(test.labels)).evaluate(straight.opt.params, test)[1]
    outcome = Outcome(tuple(straight.reductions), tuple(straight.losses), accuracy, differences)
    say(f"final loss {outcome.losses[-1]:.2g}, test accuracy {accuracy:.1%}, {straight.opt.t} steps")
    say(f"learning rate: {RATE:g} at first, {straight.opt.lr:g} at the end, reduced {len(outcome.reductions)} times")
    for target, name in RESUMED_ON.items():
        found = differences[target]
        verdict = f"differs in {', '.join(found)}" if found else "ends in the same bits"
        say(f"resumed after epoch {middle} of {epochs} with {name}: ", verdict, "bold red" if found else "green")
    if picture is not None:
        say(f"loss, learning rate and norms: {picture}")
    return outcome
