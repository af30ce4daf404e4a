"""`optforge profile`: what is asked for, checked before anything is measured; then measured, and said."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.diagnostics import UsageError
from ..core.formats import Wanted as Stored
from ..library.named import named, parse_settings
from ..library.rule import Rule
from ..train.pictures import require_matplotlib, require_place
from . import charts, compare, document, kernels, machine, models, page, peers, run, table, why
from .kernels import Compiled
from .limits import WORKS, Needs
from .machine import Moment

MOST_THREADS = 1024
TARGETS = ("c", "cuda")
OWN_SHARE = 0.55  # of the time, where there are others
OTHERS = ("L2", "many", "resnet50", "gpt2")  # of the usual sizes, those that others are compared on
PEER_COPIES = 6  # of all arrays, that a comparison takes


@dataclass(frozen=True)
class Asked:
    """The arguments of the command."""

    rules: Sequence[str]
    target: str
    stored: Stored
    settings: Sequence[str]
    against: Sequence[str]
    sizes: Sequence[str]
    threads: Sequence[int] | None
    isas: Sequence[str] | None
    seconds: float
    json: str | None
    png: Path | None
    html: Path | None
    compare: Path | None
    threshold: float


def listed(texts: Sequence[str] | None, option: str) -> list[str]:
    """Words that may be separated by commas or come in several options, each once.

    Raises
    ------
    UsageError
        The option is given, and has no word.
    """
    words = [word.strip() for text in texts or () for word in text.split(",")]
    if texts and not any(words):
        raise UsageError(f"{option} is empty: give it a value, or leave it out")
    return [*dict.fromkeys(word for word in words if word)]


def numbers(texts: Sequence[str] | None) -> list[int] | None:
    """Numbers of threads; "all" is that of the cores.

    Raises
    ------
    UsageError
        One is no number of threads.
    """
    found = []
    for word in listed(texts, "--threads"):
        if word != "all" and not (word.isascii() and word.isdigit() and 1 <= int(word) <= MOST_THREADS):
            raise UsageError(f"--threads {word}: give whole numbers from 1 to {MOST_THREADS}, or all")
        found.append(machine.cores() if word == "all" else int(word))
    return sorted(set(found)) or None


def check(asked: Asked) -> None:
    """Find what does not do before anything is measured.

    Raises
    ------
    UsageError, EnvironmentProblem, OSError
        It does not.
    """
    if asked.target not in TARGETS:
        raise UsageError(f"--target {asked.target}: kernels run on {' or '.join(TARGETS)}")
    if not 1 <= asked.seconds < 1e6:
        raise UsageError("--seconds is from 1 to a million")
    if not 0 <= asked.threshold < 10:
        raise UsageError("--threshold is a share, such as 0.03 for 3 %")
    if asked.png or asked.html:
        require_matplotlib()
    for place in (asked.json if asked.json != "-" else None, asked.png, asked.html):
        if place is not None:
            require_place(place, "the profile")


def profile(asked: Asked) -> tuple[dict[str, Any], bool]:
    """Check, measure, write; gives the document, and whether a check found something.

    That is a kernel that has become slower than in the run that `--compare` names, or another library whose results
    differ.
    """
    check(asked)
    before = compare.read(asked.compare) if asked.compare else None
    rules = [named(name) for name in dict.fromkeys(asked.rules)]
    if len({rule.name for rule in rules}) < len(rules):
        raise UsageError("two of the rules have the same name: measure them one at a time")
    chosen = parse_settings(asked.settings, rules)
    models.models(asked.sizes, machine.caches(), 16)  # raises where a size is none
    others = peers.chosen(asked.against)
    made = (
        measured_on_gpu(asked, rules, chosen) if asked.target == "cuda" else measured_here(asked, rules, chosen, others)
    )
    document.check(made)
    mistake = None  # which costs nobody what was measured
    if before is not None:
        try:
            changes, notes = compare.compare(before, made, asked.threshold)
        except UsageError as problem:
            mistake = problem
        else:
            made["compared"] = {
                "with": str(asked.compare),
                "threshold": asked.threshold,
                "text": compare.text(changes, notes, asked.threshold),
                "rows": [own.as_dict() for own in changes],
            }
    if asked.json and asked.json != "-":
        document.write(made, Path(asked.json))
    if asked.png:
        charts.png(made, asked.png)
    if asked.html:
        page.write(made, asked.html)
    if mistake is not None:
        raise mistake
    slower = any(row["slower"] for row in made.get("compared", {}).get("rows", []))
    return made, slower or any(note.startswith(peers.DIFFER) for note in made["notes"])


def check_sets(wanted: Sequence[str] | None, own: Compiled) -> None:
    """Raise UsageError where an instruction set is none of this machine."""
    known = own.sets()
    for name in wanted or ():
        if name not in known:
            raise UsageError(f"--isa {name}: this machine and build have {', '.join(known)}")


def measured_here(
    asked: Asked, rules: Sequence[Rule], chosen: dict[str, dict[str, object]], others: dict[str, peers.Peer]
) -> dict[str, Any]:
    """The document of kernels in C, and of others beside them."""
    compiled = [kernels.compiled(rule, asked.stored, chosen[rule.name]) for rule in rules]
    check_sets(asked.isas, compiled[0])
    if others and not any(needed.storage.suffix == "f32" for own in compiled for needed in own.needs):
        raise UsageError("--against compares float32 arrays: leave --store out, or give --dtype f32 as well")
    start, notes = Moment.now(), Notes()
    own_share = OWN_SHARE if others else 1.0
    wanted = run.Wanted(compiled, asked.sizes, asked.threads, asked.isas, own_share * asked.seconds)

    def of(resident: int) -> list[models.Model]:
        return models.models(asked.sizes, machine.caches(), resident)

    every = run.cases(wanted, of, notes.add)
    if not every:
        raise UsageError("nothing is left to measure: " + "; ".join(notes.texts))
    about = machine.describe(compiled[0].isa)
    with bar() as progress:
        found, bandwidths = run.measure(wanted, every, lambda text, share: progress(text, own_share * share))
        rows = [run.row(own, about) for own in found]
        plans = against(asked, compiled, chosen, of, notes.add) if others else []
        left = 1 - own_share

        def on(text: str, share: float) -> None:
            progress(text, left * share)

        compared = [*peers.measure(plans, others, left * asked.seconds, on, notes.add, about)]
    about["busy"] = Moment.now().busy(start)
    needed = [(own.rule, own.needs) for own in compiled]
    return assembled(asked, start, about, bandwidths, needed, rows, compared, notes)


def measured_on_gpu(asked: Asked, rules: Sequence[Rule], chosen: dict[str, dict[str, object]]) -> dict[str, Any]:
    """The document of kernels on a GPU."""
    if asked.against:
        raise UsageError("--against is for --target c; benchmarks/gpu.py measures PyTorch on a GPU")
    for option, given in (("--threads", asked.threads), ("--isa", asked.isas)):
        if given:
            raise UsageError(f"{option} is for --target c: leave it out")
    from . import cuda

    gpu = cuda.Gpu()
    start, notes = Moment.now(), Notes()
    about = machine.describe(gpu.isa) | {"gpu": gpu.about()}
    about |= {"processor": about["gpu"]["name"], "host": about["processor"], "memory": about["gpu"]["memory"]}
    about["caches"] = {"L2": about["gpu"]["l2"]} if "l2" in about["gpu"] else {}
    needed = [(rule, cuda.needed(rule, asked.stored, chosen[rule.name])) for rule in rules]
    every = cuda.plans(
        [(rule, own, dict(chosen[rule.name])) for rule, own in needed],
        lambda resident: models.models(asked.sizes, about["caches"], resident),
        about["gpu"]["free"],
        notes.add,
    )
    if not every:
        raise UsageError("nothing is left to measure: " + "; ".join(notes.texts))
    with bar() as progress:
        rows, bandwidths = cuda.measure(gpu, every, asked.seconds, progress)
    about["busy"] = 0.0
    return assembled(asked, start, about, bandwidths, needed, rows, [], notes)


class Notes:
    """What is to be said beside the figures, each once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, text: str) -> None:
        """Say something."""
        if text not in self.texts:
            self.texts.append(text)


def assembled(
    asked: Asked,
    start: Moment,
    about: dict[str, Any],
    bandwidths: list[dict[str, Any]],
    needed: Sequence[tuple[Rule, Sequence[Needs]]],
    rows: list[dict[str, Any]],
    compared: list[dict[str, Any]],
    notes: Notes,
) -> dict[str, Any]:
    """The document, with what follows from the rows."""
    for row in rows:
        row["binds"], row["why"] = why.binds(row, rows), why.why(row, rows)
    return {
        "schema": document.SCHEMA,
        "version": document.VERSION,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": about,
        "settings": {
            "target": asked.target,
            "rules": list(asked.rules),
            "sizes": list(asked.sizes),
            "threads": asked.threads,
            "set": list(asked.settings),
            "seconds": asked.seconds,
            "took": Moment.now().clock - start.clock,
        },
        "bandwidth": bandwidths,
        "rules": [about_rule(rule, own) for rule, own in needed],
        "rows": rows,
        "peers": compared,
        "notes": notes.texts,
    }


def against(
    asked: Asked,
    compiled: Sequence[Compiled],
    chosen: dict[str, dict[str, object]],
    of: Callable[[int], list[models.Model]],
    note: Callable[[str], None],
) -> list[peers.Plan]:
    """The comparisons with others: each rule on each model, on as many threads as it may have."""
    found = []
    threads, usual = max(asked.threads or [machine.cores()]), tuple(asked.sizes) == models.USUAL
    for own in compiled:
        resident = next((needed.resident for needed in own.needs if needed.storage.suffix == "f32"), 0)
        found_models = [model for model in of(resident) if model.name in OTHERS] if usual else of(resident)
        for model in found_models if resident else []:
            if PEER_COPIES * resident * model.elements > run.ROOM * machine.available():
                note(f"{model.label} was not compared with others: their arrays need more memory than is available")
                continue
            weight = 1 + min(model.elements / 2**24, 8)
            found.append(peers.Plan(own, dict(chosen[own.rule.name]), model, threads, weight))
    return found


def summary(doc: str) -> str:
    """The first line of a rule's docstring; of a composition, a line for each part too."""
    first, _, rest = doc.partition("\n")
    return "\n".join([first, *rest.split("\n")[1:]]) if " >> " in first else first


def about_rule(rule: Rule, every: Sequence[Needs]) -> dict[str, Any]:
    """What a rule is, and what it needs in each way to store its arrays."""
    return {
        "name": rule.name,
        "hash": rule.hash,
        "doc": summary(rule.doc),
        "text": rule.definition.formulas,
        "stores": [
            {
                "store": needed.storage.suffix,
                "resident": needed.resident,
                "bytes": {work: needed.bytes(work) for work in WORKS},
                "operations": {work: dict(needed.operations(work)) for work in WORKS},
            }
            for needed in every
        ],
    }


@contextmanager
def bar() -> Iterator[Callable[[str, float], None]]:
    """A progress bar on standard error, where that is a terminal: called with what is done now, and its share."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(30), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}", markup=False), console=console, transient=True) as shown:
        task = shown.add_task("", total=1.0)
        done = 0.0

        def progress(text: str, share: float) -> None:
            nonlocal done
            shown.update(task, completed=done, description=text)
            done += share

        yield progress


def said(made: dict[str, Any], asked: Asked) -> str:
    """What goes to standard output."""
    return document.as_text(made).rstrip() if asked.json == "-" else table.text(made)
