"""What the emitted files of a rule say, whatever target of the C family they are for: names, comments, statuses."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING

from . import helpers
from .diagnostics import UsageError
from .dtypes import DTYPES, F64, DType
from .ir import Kernel
from .names import Names
from .render import comment

if TYPE_CHECKING:
    from .language import Rule

BROKEN = "the hyperparameters break: "


def chosen_dtypes(wanted: str | Iterable[str] | None) -> list[DType]:
    """The dtypes of these names, all of them where none is given, in the order of the table."""
    names = [*DTYPES] if wanted is None else [wanted] if isinstance(wanted, str) else [*wanted]
    for name in names:
        if name not in DTYPES:
            raise UsageError(f"there is no dtype {name!r} (there are {', '.join(DTYPES)})")
    if not names:
        raise UsageError("at least one dtype is needed")
    return [dtype for name, dtype in DTYPES.items() if name in names]


class Source:
    """What the templates show of one kernel.

    A target of the same family derives from it: its name, and how its file is built.
    """

    target = "c"
    build: tuple[str, ...] = ("cc -std=c99 -O2 -c {file}.c    (with -fopenmp a step runs on several threads)",)

    def __init__(
        self,
        rule: Rule,
        kernel: Kernel,
        dtypes: list[DType],
        prefix: str,
        given_prefix: str | None,
        settings: dict[str, object],
    ):
        self.rule, self.kernel, self.dtypes, self.file = rule, kernel, dtypes, prefix
        self.prefix = prefix = self.begin(prefix)
        self.given_prefix, self.settings = given_prefix, settings
        self.inline = self.inlined()
        self.flags: tuple[str, ...] = ()
        self.helpers: dict[str, str] = {}
        macros = {f"{prefix}_{macro}" for macro in ("API", "INLINE", "RESTRICT", "H")}
        self.hyper = Names(macros)
        self.hyper.enter((name, name) for name, _ in kernel.hyperparameters)
        self.fields = Names(macros)
        self.fields.enter((name, name) for name in ["p", "g", *(state.name for state in kernel.state)])
        self.size = self.fields.own("n")

    @staticmethod
    def begin(file: str) -> str:
        """What all names begin with, from the name of the files."""
        return file

    def inlined(self) -> str:
        """What begins the declaration of a small function."""
        return f"{self.prefix}_INLINE"

    def helper(self, role: str, kind: DType) -> str:
        """The name of an emitted function, which is emitted because it was asked for."""
        name = helpers.name(role, kind, self.prefix)
        self.helpers.setdefault(name, helpers.definition(role, kind, self.prefix, self.inline))
        return name

    # ── what the templates read ─────────────────────────────────────────────────────────────────────────────────

    def header_comment(self) -> str:
        """The comment at the head of both files."""
        rule, kernel = self.rule, self.kernel
        summary, _, rest = rule.doc.strip().partition("\n")
        read, written = kernel.moved
        traffic = ", ".join(f"{d.c} {d.bytes * (read + written)}" for d in self.dtypes)
        state = [
            f"{s.name}{' (one double per tensor)' if s.scalar else ''} starts as {s.initial}" for s in kernel.state
        ]
        options = {**rule.options, **{k: v for k, v in self.settings.items() if k in rule.options}}
        chosen = ", ".join(f"{name}={value}" for name, value in options.items())
        command = [
            "optforge generate",
            shlex.quote(rule.origin),
            f"--target {self.target}",
            *(f"--dtype {d.suffix}" for d in self.dtypes),
        ]
        command += [f"--set {shlex.quote(f'{name}={value}')}" for name, value in self.settings.items()]
        command += [f"--prefix {self.given_prefix}"] if self.given_prefix is not None else []
        command += self.flags
        lines = [f"{rule.name}: {summary}" if summary else f"{rule.name}: an optimizer's update rule"]
        if rest.strip():
            lines += ["", *rest.strip("\n").splitlines()]
        lines += ["", *(f"    {line}".rstrip() for line in rule.definition.formulas.splitlines())]
        lines += ["", "p is the parameter, g its gradient."]
        lines += [f"State: {'; '.join(state)}." if state else "The rule has no state."]
        lines += [f"Options: {chosen}."] if chosen else []
        lines += [f"Renamed for C: {', '.join(self.renamed())}."] if self.renamed() else []
        lines += [
            f"Memory traffic per element: {read} read, {written} written; in bytes: {traffic}.",
            *self.passes(),
            "",
            f"Build:     {self.build[0].format(file=self.file)}",
            *(f"           {line}" for line in self.build[1:]),
            f"Re-create: {' '.join(command)}",
            f"Rule hash: {rule.hash}",
            "",
            "Generated by optforge. This file may be used, changed and distributed without restriction.",
        ]
        return comment(lines)

    def passes(self) -> list[str]:
        """What each pass over memory reads and writes, where there are several."""
        usual = [phase for phase in self.kernel.phases if not phase.optional]
        if len(usual) == 1:
            return []
        return [
            f"    pass {k}: reads {' '.join(phase.loads)}, writes {' '.join(n for n, _ in phase.stores) or 'nothing'}"
            for k, phase in enumerate(usual, 1)
        ]

    def renamed(self) -> list[str]:
        """Fields of the structs that are not called as in the rule, or, for the size, as usual."""
        fields = [*self.hyper.of.items(), *self.fields.of.items()]
        listed = [f"{key} is {name}" for key, name in fields if isinstance(key, str) and key != name]
        return [*listed, *([f"the number of elements is {self.size}"] if self.size != "n" else [])]

    def hyper_comment(self) -> str:
        """The comment above the struct of hyperparameters."""
        lines = ["Hyperparameters; none may be NaN."]
        lines += [f"    {text}" for text in (assertion.text for assertion in self.kernel.asserts)]
        if len(lines) > 1:
            lines[0] = "Hyperparameters; none may be NaN, and a step checks that"
        return comment(lines)

    def hyper_fields(self) -> list[dict[str, str]]:
        """Name, default and comment of each hyperparameter."""
        if not self.kernel.hyperparameters:
            unused = self.hyper.own("unused")
            return [{"name": unused, "default": "0.0", "comment": " /* the rule has no hyperparameters */"}]
        return [
            {"name": self.hyper.of[name], "default": F64.constant(value), "comment": ""}
            for name, value in self.kernel.hyperparameters
        ]

    def assert_statuses(self) -> list[tuple[str, str]]:
        """Name and text of the status of each assert."""
        asserts = self.kernel.asserts
        names = [f"ERROR_ASSERT{'' if len(asserts) == 1 else f'_{k}'}" for k in range(1, len(asserts) + 1)]
        texts = [a.text + (f" ({a.message})" if a.message else "") for a in asserts]
        return [(name, BROKEN + text) for name, text in zip(names, texts, strict=True)]

    def arrays(self) -> list[str]:
        """All arrays of a tensor, in the order of the signature."""
        return ["p", "g", *(state.name for state in self.kernel.array_state)]

    def tensor_fields(self, dtype: DType) -> list[str]:
        """Declarations of the arrays in the struct of a tensor."""
        scalar = {state.name for state in self.kernel.scalar_state}
        fields = [f"{dtype.c} *{self.fields.of['p']}", f"const {dtype.c} *{self.fields.of['g']}"]
        for state in self.kernel.state:
            fields.append(f"{'double' if state.name in scalar else dtype.c} *{self.fields.of[state.name]}")
        return fields

    # ── initial state ───────────────────────────────────────────────────────────────────────────────────────────

    def init_needs_hyper(self) -> bool:
        """Whether a state starts as a hyperparameter."""
        return any(isinstance(s.initial, str) and s.initial not in ("p", "g") for s in self.kernel.state)

    def init_comment(self) -> str:
        """What the initialisation reads."""
        read = sorted({s.initial for s in self.kernel.state if s.initial in ("p", "g")}, key=str, reverse=True)
        return f", from {' and '.join(map(str, read))} at its first step" if read else ""
