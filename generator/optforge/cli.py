"""The command line: list, show, generate, demo."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .diagnostics import EnvironmentProblem, OptforgeError, UsageError

HELP = """Turn optimizer update rules into fused C kernels.

RULE is the name of a built-in rule (see `optforge list`) or FILE.py:NAME, a rule in a file of yours. The file is read
and never executed, so a file that you did not write is safe to give.

Exit codes: 0 done; 1 a check found a difference; 2 a mistake in what was asked or in a rule; 3 something is missing on
this machine (a compiler, disk space, an optional package).
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
debugging = False


def show_version(wanted: bool) -> None:
    """Answer --version."""
    if wanted:
        print(f"optforge {__version__}")
        raise typer.Exit


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


@app.command("list")
def list_rules() -> None:
    """List the built-in rules: name, state, bytes moved per float32 element, and what each is."""
    from . import rules
    from .dtypes import F32

    rows = [("RULE", "STATE", "BYTES", "")]
    for name in rules:
        rule = rules[name]
        bytes_moved = F32.bytes * sum(rule.kernel().moved)
        rows.append((name, " ".join(rule.state) or "-", str(bytes_moved), rule.doc.partition("\n")[0]))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip())


@app.command()
def show(
    rule: Annotated[str, typer.Argument(metavar="RULE", help="A built-in rule, or FILE.py:NAME.")],
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A static option or a default.")
    ] = None,
) -> None:
    """Show a rule: its text, hyperparameters, state, scalars computed per step, and memory traffic."""
    from .catalogue import named, parse_settings
    from .describe import describe

    found = named(rule)
    print(describe(found, parse_settings(setting or [], [found])[found.name]))


@app.command()
def generate(
    rule: Annotated[list[str] | None, typer.Argument(metavar="RULE…", help="Built-in rules, or FILE.py:NAME.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All built-in rules.")] = False,
    target: Annotated[list[str] | None, typer.Option(metavar="c", help="What to emit; may be repeated.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(metavar="f32|f64", help="Element types; may be repeated. Default: both.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A static option, or another default; may be repeated."),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(metavar="P", help="Begins all emitted names and file names instead of the rule's name."),
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

    Examples:

      optforge generate adam

      optforge generate my_rule.py:my_rule --dtype f32 --set lr=3e-4 --out src/kernels

      optforge generate --all --check
    """
    from .catalogue import emit, select
    from .write import differences, write_all

    rules = select(rule or [], every)
    files = emit(rules, target or ["c"], dtype or ["f32", "f64"], setting or [], prefix)
    if check:
        found = differences(out, files, set(target or ["c"]) if every else set())
        for text in found:
            print(text)
        if found:
            raise typer.Exit(1)
        print(f"{len(files)} files in {out} are as they would be emitted")
    else:
        for path, changed in write_all(out, files):
            print(f"{'wrote' if changed else 'kept '} {path}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="PNG", help="Where the picture of the loss curves goes.")] = Path(
        "demo.png"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Of the initial parameters and the order of the images.")] = 0,
    kernels: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Compile the emitted files in DIR instead of emitting anew.")
    ] = None,
) -> None:
    """Train a small network on handwritten digits with each of the seven rules, and compare every bit.

    Each rule runs through its compiled kernel; the same training is repeated on the NumPy reference, and the table
    says whether parameters and state had the same bits after every step.
    """
    from .demo import run

    results = run(epochs=epochs, seed=seed, picture=out, kernels=kernels)
    if any(result.first_difference is not None for result in results):
        raise typer.Exit(1)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and end the process with its exit code."""
    sys.exit(guarded(lambda: app(arguments, standalone_mode=True)))


def guarded(run: Callable[[], Any]) -> int:
    """The exit code of a command; an error is one message on standard error."""
    try:
        run()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BrokenPipeError:
        # The reader of the output has gone; keep Python from complaining when it flushes at exit.
        sys.stdout = None
        return 0
    except (OptforgeError, TypeError, ValueError, OSError, RecursionError) as problem:
        if debugging:
            raise
        code, text = explain(problem)
        # Plain and unwrapped: a diagnostic's columns must stand.
        sys.stderr.write(text if text.endswith("\n") else f"{text}\n")
        return code
    return 0


def explain(problem: BaseException) -> tuple[int, str]:
    """The exit code and the message of an error."""
    from .diagnostics import RuleError

    if isinstance(problem, RuleError):
        return problem.exit_code, str(problem)
    if isinstance(problem, OptforgeError):
        return problem.exit_code, f"optforge: error: {problem}"
    if isinstance(problem, OSError):
        where = f"{problem.filename}: " if problem.filename else ""
        return EnvironmentProblem.exit_code, f"optforge: error: {where}{problem.strerror or problem}"
    return UsageError.exit_code, f"optforge: error: {problem}"


if __name__ == "__main__":
    main()
