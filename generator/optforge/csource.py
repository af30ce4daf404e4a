"""What the emitted files of a rule say, whatever target of the C family they are for: names, comments, statuses."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from . import helpers
from .dtypes import F64, DType
from .ir import Kernel
from .names import Names
from .render import comment, status_lines, wrapped

if TYPE_CHECKING:
    from .language import Rule

STATUSES = (
    ("OK", "done"),
    ("ERROR_NULL", "a pointer is NULL"),
    ("ERROR_SIZE", "a tensor has more elements than memory can hold"),
    ("ERROR_ALIGNMENT", "an array is not aligned to its elements"),
    ("ERROR_OVERLAP", "two arrays of a tensor overlap"),
    ("ERROR_TIME", "t counts the steps from 1"),
    ("ERROR_NAN", "a hyperparameter is NaN"),
    ("ERROR_SCALAR", "a scalar has no value: division by zero, overflow, root of a negative number"),
    ("ERROR_GRAD_SCALE", "grad_scale is not a positive number with a finite inverse"),
    ("ERROR_WORKSPACE", "the workspace is too small, or not aligned to doubles"),
    ("ERROR_PART", "a part is not in its tensor, or does not begin and end between chunks"),
    ("ERROR_GROUP", "a tensor's group is none of the groups"),
    ("ERROR_PHASE", "the phases to be done are not among those of a step"),
)
SKIPPED = "a gradient is NaN or infinite, so nothing was changed, and t does not advance"
BROKEN = "the hyperparameters break: "
ASSERTS_FROM = 100  # status codes of the rule's own asserts


class Source:
    """What the templates show of one kernel.

    A target of the same family derives from it: its name, the statuses that its calls return, how its file is built.
    """

    target = "c"
    statuses: tuple[tuple[str, str], ...] = STATUSES
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

    def shared_context(self, asserts: list[tuple[str, str]]) -> dict[str, Any]:
        """What all targets of the family show alike."""
        statuses = [(name, code, text) for code, (name, text) in enumerate(self.statuses)]
        statuses += [(name, ASSERTS_FROM + k, text) for k, (name, text) in enumerate(asserts)]
        statuses.append(("SKIPPED", -1, SKIPPED))
        return {
            "prefix": self.prefix,
            "comment": self.header_comment(),
            "size": self.size,
            "statuses": status_lines(self.prefix, statuses, unsaid=BROKEN),
            "hyper_comment": self.hyper_comment(),
            "hyper_fields": self.hyper_fields(),
            "scalar_state_comment": "\n * Scalar state is one double per tensor." if self.kernel.scalar_state else "",
            "init_comment": self.init_comment(),
            "starting": self.starting(),
            "init_needs_hyper": self.init_needs_hyper(),
            "optional": self.kernel.phases[0].optional,
            "phases": len(self.kernel.phases),
        }

    def starting(self) -> bool:
        """Whether the kernel itself begins state that starts as the gradient."""
        return any(s.initial == "g" for s in self.kernel.state)

    def header_comment(self) -> str:
        """The comment at the head of both files."""
        rule, kernel = self.rule, self.kernel
        summary, _, rest = rule.doc.strip().partition("\n")
        read, written = kernel.moved
        state = [
            f"{s.name}{' (one double per tensor)' if s.scalar else ''} starts as {s.initial}" for s in kernel.state
        ]
        options = {**rule.options, **{k: v for k, v in self.settings.items() if k in rule.options}}
        chosen = ", ".join(f"{name}={value}" for name, value in options.items())
        command = [
            "optforge generate",
            shlex.quote(rule.origin),
            f"--target {self.target}",
            *self.emitted_flags(),
        ]
        command += [f"--set {shlex.quote(f'{name}={value}')}" for name, value in self.settings.items()]
        command += [f"--prefix {self.given_prefix}"] if self.given_prefix is not None else []
        command += self.flags
        lines = wrapped(f"{rule.name}: {summary}" if summary else f"{rule.name}: an optimizer's update rule")
        if rest.strip():
            lines += ["", *(part for line in rest.strip("\n").splitlines() for part in wrapped(line))]
        lines += ["", *(f"    {line}".rstrip() for line in rule.definition.formulas.splitlines())]
        lines += ["", "p is the parameter, g its gradient."]
        lines += [f"State: {'; '.join(state)}." if state else "The rule has no state."]
        lines += [f"Options: {chosen}."] if chosen else []
        lines += [f"Renamed for C: {', '.join(self.renamed())}."] if self.renamed() else []
        lines += [
            f"Memory traffic per element: {read} read, {written} written; in bytes: {self.traffic()}.",
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

    def traffic(self) -> str:
        """Bytes that a step moves per element, for each dtype."""
        return ", ".join(f"{d.c} {d.bytes * sum(self.kernel.moved)}" for d in self.dtypes)

    def emitted_flags(self) -> list[str]:
        """The options of the command line that say what is emitted."""
        return [f"--dtype {d.suffix}" for d in self.dtypes]

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
