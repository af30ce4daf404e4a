"""The command line: list, show, generate, profile, demo."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.diagnostics import EnvironmentProblem, OptforgeError, RuleError, UsageError
from ..core.version import __version__
from . import colour, completion

HELP = """Turn optimizer update rules into fused C and CUDA kernels.

RULE is the name of a built-in rule (see `optforge list`) or FILE.py:NAME, a rule in a file of yours. The file is read
and never executed, so a file that you did not write is safe to give. Transforms stand before a rule, with colons:
clip_by_global_norm:adam.

Exit codes: 0 done; 1 a check found a difference or a regression; 2 a mistake in what was asked or in a rule; 3
something is missing on this machine (a compiler, disk space, an optional package); 130 interrupted.
"""
INTERRUPTED = 130

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
debugging = False


def show_version(wanted: bool) -> None:
    """Answer --version."""
    if wanted:
        say(f"optforge {__version__}")
        raise typer.Exit


def say(text: str, painted: Callable[[str], str] | None = None) -> None:
    """Print on standard output; if nobody reads it any more, the command goes on to its own exit code.

    Where colours are shown it is `painted`.
    """
    try:
        print(painted(text) if painted and colour.shown(sys.stdout) else text, flush=True)
    except BrokenPipeError:
        silence()
    except OSError as problem:
        raise EnvironmentProblem(f"standard output cannot be written: {problem.strerror}") from None


def silence() -> None:
    """Send standard output nowhere from now on, what it still holds included."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the Python traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of every command."""
    global debugging
    debugging = debug


Store = Annotated[
    list[str] | None,
    typer.Option(metavar="ARRAY=FORMAT,…", help="Formats of p, g and state: f32, f64, bf16, f16; of state q8, uq8."),
]
Master = Annotated[
    str | None,
    typer.Option(
        metavar="f32|split",
        help="Round p from floats beside it, or from 16 bits more.",
        autocompletion=completion.one_of("f32", "split"),
    ),
]
Rounding = Annotated[
    str,
    typer.Option(
        metavar="nearest|stochastic",
        help="How bf16 and f16 arrays are rounded.",
        autocompletion=completion.one_of("nearest", "stochastic"),
    ),
]


@app.command("list", short_help="List the built-in rules.")
def list_rules(
    json: Annotated[bool, typer.Option("--json", help="Say it as JSON, for programs.")] = False,
) -> None:
    """List the built-in rules: name, state, bytes that a step moves per float32 element, and what each is.

    Behind them come the transforms, which stand before a rule, clip_by_global_norm:adam, and what else `optforge
    generate` writes.
    """
    from . import as_json

    if json:
        say(as_json.text(as_json.listed()))
        return
    from ..core.dtypes import F32
    from ..library.rule import BUILT_IN, TRANSFORMS
    from .companions import COMPANIONS

    rows = [("RULE", "STATE", "BYTES", "")]
    for name in BUILT_IN:
        rule = BUILT_IN[name]
        bytes_moved = F32.bytes * sum(rule.kernel().moved)
        rows.append((name, " ".join(rule.state) or "-", str(bytes_moved), rule.doc.partition("\n")[0]))
    widest = max(map(len, TRANSFORMS))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for k, row in enumerate(rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        say("  ".join([*cells, row[3]]).rstrip(), colour.row if k else colour.title)
    for heading, others in (("TRANSFORM, before a rule", TRANSFORMS), ("BESIDE THE RULES", COMPANIONS)):
        say(f"\n{heading}", colour.title)
        for name in others:
            say(f"{name.ljust(widest)}  {others[name].doc.partition(chr(10))[0]}", colour.row)


@app.command(short_help="Show one rule.")
def show(
    rule: Annotated[
        str,
        typer.Argument(metavar="RULE", help="A built-in rule, or FILE.py:NAME.", autocompletion=completion.names),
    ],
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A static option or a default.")
    ] = None,
    store: Store = None,
    master: Master = None,
    rounding: Rounding = "nearest",
    loop: Annotated[
        bool, typer.Option("--c", help="Show the C instead: the loop over elements, as it is emitted for float32.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Say it as JSON, for programs.")] = False,
) -> None:
    """Show a rule: its text, hyperparameters, state, scalars computed per step, and memory traffic.

    \b
    Examples:
      optforge show adam
      optforge show clip_by_global_norm:adam --c
      optforge show my_rule.py:my_rule --set nesterov=true
      optforge show adamw --store p=bf16,g=bf16 --master split
    """  # noqa: D301 - click reads the \b, which keeps lines as they are
    from ..core.formats import Wanted, parse_store
    from ..library.named import parse_settings
    from . import as_json
    from .describe import describe
    from .generate import rule as rule_named

    if loop and json:
        raise UsageError("--c shows a text, and --json is for programs: give one of them")
    found = rule_named(rule)
    wanted = Wanted(None, parse_store(store), master, rounding)
    settings = parse_settings(setting or [], [found])[found.name]
    if loop:
        say(found.loops(wanted, settings))
    elif json:
        say(as_json.text(as_json.described(found, settings, wanted)))
    else:
        say(describe(found, settings, wanted), colour.headings)


@app.command(short_help="Emit kernels as source files.")
def generate(
    rule: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RULE",
            help="Built-in rules, FILE.py:NAME, or plateau.",
            autocompletion=completion.names,
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All built-in rules, and plateau.")] = False,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="c|cuda",
            help="What to emit; may be repeated. Default: c.",
            autocompletion=completion.one_of("c", "cuda"),
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            metavar="f32|f64",
            help="Element types; may be repeated. Default: both.",
            autocompletion=completion.one_of("f32", "f64"),
        ),
    ] = None,
    store: Store = None,
    master: Master = None,
    rounding: Rounding = "nearest",
    suffix: Annotated[
        str | None, typer.Option(metavar="S", help="Ends the names of what --store is about, as bf16 does.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A static option, or another default; may be repeated."),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(metavar="P", help="Begins all emitted names and file names instead of the rule's name."),
    ] = None,
    single: Annotated[
        bool, typer.Option("--single", help="One pair of files for each rule, which needs no other file.")
    ] = False,
    bundle: Annotated[
        str | None, typer.Option(metavar="NAME", help="One pair of files, NAME.h and NAME.c, for all the rules.")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="project|python",
            help="A project: CMake package, C++ headers, examples, benchmark. Or a Python package of one rule.",
            autocompletion=completion.one_of("project", "python"),
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the files go; made if it is not there.")] = Path(
        "build"
    ),
    check: Annotated[
        bool,
        typer.Option("--check", help="Write nothing; show how the files in DIR differ from what would be emitted."),
    ] = False,
) -> None:
    """Emit the kernels of rules as source files, all of them or, on an error, none.

    \b
    Examples:
      optforge generate adam
      optforge generate adam --target cuda --out src/kernels
      optforge generate adam lamb --bundle optimizers --out src
      optforge generate my_rule.py:my_rule --dtype f32 --set lr=3e-4 --out src
      optforge generate adamw --store p=bf16,g=bf16 --master split
      optforge generate adamw lamb --layout project --out third_party/optforge
      optforge generate plateau --prefix my_plateau
      optforge generate --all --check

    Beside the rules' files stand optforge.h and optforge.c, which run the steps of all of them. With --single each
    rule's pair has that inside, with --bundle one pair has all; all give the same bits, and go into one program.
    --layout project adds what a C++ engine takes: headers of C++, a CMake package, examples, a benchmark; its README
    says how. --layout python is a package with the compiled kernel of one rule, which needs neither a compiler nor
    optforge where it is installed.

    plateau is no rule but a header for engines, which reduces a learning rate when a metric stops improving.

    With --check the exit code is 1 if a file is missing or differs. With --all as well, an emitted file in DIR that
    belongs to no rule counts too.
    """  # noqa: D301
    from ..core.formats import Wanted, parse_store
    from .generate import emit, select
    from .write import differences, write_all

    targets = target or ["c"]
    stored = Wanted(dtype or None, parse_store(store), master, rounding, suffix)
    files = emit(select(rule or [], every), targets, stored, setting or [], prefix, single, bundle, layout)
    if check:
        found = differences(out, files, set(targets) if every else set())
        for text in found:
            say(text, colour.difference)
        if found:
            raise typer.Exit(1)
        say(f"{len(files)} files in {out} are as they would be emitted")
    else:
        for path, changed in write_all(out, files, guarded=layout is not None):
            say(f"{'wrote' if changed else 'kept '} {path}")


@app.command(short_help="Measure kernels against the machine's limits, and against others.")
def profile(
    rule: Annotated[
        list[str],
        typer.Argument(
            metavar="RULE",
            help="Built-in rules, FILE.py:NAME, compositions.",
            autocompletion=completion.names,
        ),
    ],
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,…", help="Others to measure against: torch, optax, numba, numpy, deepspeed, all."),
    ] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE,…",
            help="Elements of a tensor (4096, 64k, 16M), a level (L1 L2 L3 memory), a network (gpt2 resnet50 many …).",
        ),
    ] = None,
    threads: Annotated[
        list[str] | None, typer.Option(metavar="N,…", help="Numbers of threads, or all. Default: 1 and all.")
    ] = None,
    target: Annotated[str, typer.Option(metavar="c|cuda", help="Where kernels run.")] = "c",
    dtype: Annotated[
        list[str] | None, typer.Option(metavar="f32|f64", help="Element types; may be repeated. Default: f32.")
    ] = None,
    store: Store = None,
    master: Master = None,
    rounding: Rounding = "nearest",
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A static option, or another default.")
    ] = None,
    isa: Annotated[
        list[str] | None, typer.Option(metavar="NAME,…", help="Instruction sets, such as x86-64-v3. Default: the best.")
    ] = None,
    seconds: Annotated[float, typer.Option(metavar="N", help="About how long to measure.")] = 100,
    json: Annotated[str | None, typer.Option(metavar="FILE|-", help="Write all that was measured, as JSON.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the pictures.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a report, one file that needs no other.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="OLD.json", help="Compare with an earlier run; exit code 1 if it got slower.")
    ] = None,
    threshold: Annotated[
        float, typer.Option(metavar="SHARE", help="How much slower is no regression yet, beyond the noise.")
    ] = 0.03,
) -> None:
    """Measure how fast kernels are, how far from the limits of this machine, and say what binds them.

    \b
    Examples:
      optforge profile adamw
      optforge profile adamw --against torch --html report.html
      optforge profile my_rule.py:my_rule --sizes 64k,16M --threads 1
      optforge profile clip_by_global_norm:adamw --store p=bf16,g=bf16 --json new.json --compare old.json

    The limits are measured in the same run, in turns with the kernel: the same arrays read and written without
    mathematics, and the rule's divisions and roots alone, which a core does in one unit. What is compared with others
    gives the same results first.
    """  # noqa: D301
    from ..core.formats import Wanted, parse_store
    from ..profile import command
    from ..profile.models import USUAL

    own = parse_store(store)
    stored = Wanted(dtype or (None if own else ["f32"]), own, master, rounding)
    own_sizes, own_threads = command.listed(sizes, "--sizes") or USUAL, command.numbers(threads)
    asked = command.Asked(
        rule, target, stored, setting or [], command.listed(against, "--against"), own_sizes, own_threads,
        command.listed(isa, "--isa") or None, seconds, json, png, html, compare, threshold,
    )  # fmt: skip
    made, found = command.profile(asked)
    say(command.said(made, asked))
    if found:
        raise typer.Exit(1)


@app.command(short_help="Train a small network, resume the training, compare every bit.")
def demo(
    out: Annotated[
        Path,
        typer.Option(
            metavar="PNG", help="Picture of the loss curves; beside it goes NAME-training.png, of one training."
        ),
    ] = Path("demo.png"),
    epochs: Annotated[int, typer.Option(metavar="N", min=1, help="Passes over the training images.")] = 40,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Of the initial parameters and the order of the images.")
    ] = 0,
    kernels: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Compile the emitted files in DIR instead of emitting anew.")
    ] = None,
) -> None:
    """Train a small network on handwritten digits with each of the seven rules, and compare every bit.

    Each rule runs through its compiled kernel; the same training is repeated on the NumPy reference, and the table
    says whether parameters and state had the same bits after every step.

    Then one training has all that goes around a step: clipping, a rate that falls on plateaus, a monitor that draws it,
    and a checkpoint in the middle. It is resumed from there, compiled and on the reference, and must end in the same
    bits.
    """
    from . import demo, demo_training

    if out.is_dir():
        raise UsageError(f"--out names a picture, and {out} is a directory; for one in it give {out / 'demo.png'}")
    beside = out.with_name(f"{out.stem}-training{out.suffix}")
    if beside.is_dir():
        raise UsageError(f"{beside}, the picture beside {out}, is a directory; give another --out")
    results = demo.run(epochs=epochs, seed=seed, picture=out, kernels=kernels)
    training = demo_training.run(epochs=epochs, seed=seed, picture=beside)
    if not training.passed or any(result.first_difference is not None for result in results):
        raise typer.Exit(1)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and end the process with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A name or a formula that the terminal's encoding lacks is no reason to fail.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    completion.prepare(os.environ)
    given = sys.argv[1:] if arguments is None else list(arguments)
    if "--debug" in given:  # behind a command it means the same
        given = ["--debug", *(argument for argument in given if argument != "--debug")]
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        sys.exit(guarded(lambda: app(given, prog_name="optforge")))


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Say a warning like an error: what it is about is in its text, not in the line that raised it."""
    complain(f"optforge: warning: {message}")


def complain(text: str) -> None:
    """Put a message on standard error, plain and unwrapped: the columns of a diagnostic must stand."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be closed
        text = text.removesuffix("\n")
        sys.stderr.write(f"{colour.message(text) if colour.shown(sys.stderr) else text}\n")


def guarded(run: Callable[[], Any]) -> int:
    """The exit code of a command; an error is one message on standard error."""
    code = 0
    try:
        run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.__context__, BrokenPipeError):  # said by a library; no check has failed
            code = 0
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as problem:
        code, text = explain(problem)
        if debugging:
            traceback.print_exc()
        else:
            complain(text)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        silence()
    return code


def explain(problem: Exception) -> tuple[int, str]:
    """The exit code and the message of an error."""
    missing = EnvironmentProblem.exit_code
    match problem:
        case RuleError():
            return problem.exit_code, str(problem)
        case OptforgeError():
            return problem.exit_code, f"optforge: error: {problem}"
        case OSError():
            where = f"{problem.filename}: " if problem.filename else ""
            return missing, f"optforge: error: {where}{problem.strerror or problem}"
        case ImportError():
            return (
                missing,
                f"optforge: error: {problem}; install optforge again: pip install --force-reinstall optforge",
            )
        case MemoryError():
            return missing, "optforge: error: the memory of this machine does not suffice"
    what = f"{type(problem).__name__}: {problem}"
    report = "this is a mistake in optforge; `optforge --debug …` shows where, please report it"
    return missing, f"optforge: error: {what}\n{report}"


if __name__ == "__main__":
    main()
