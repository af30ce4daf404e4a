"""Kernel to C: the `.h` and `.c` of a rule, C99 with OpenMP where the compiler has it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from . import helpers
from .diagnostics import UsageError
from .dtypes import DTYPES, F64, DType
from .emit import Printer
from .ir import Expr, Kernel, Let, State, Type
from .names import CALLED, Names, claimed, spelled
from .render import c_string, comment, comment_text, fold, render_template

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
)
BROKEN = "the hyperparameters break: "
ASSERTS_FROM = 100  # status codes of the rule's own asserts


def render(
    rule: Rule,
    kernel: Kernel,
    dtypes: str | Iterable[str] | None = None,
    prefix: str | None = None,
    settings: Mapping[str, object] | None = None,
) -> dict[str, str]:
    """The files of a kernel: name to text."""
    wanted = DTYPES if dtypes is None else [dtypes] if isinstance(dtypes, str) else dtypes
    chosen = [known_dtype(name) for name in wanted]
    chosen = [dtype for dtype in DTYPES.values() if dtype in chosen]
    if not chosen:
        raise UsageError("at least one dtype is needed")
    own = spelled(rule.name) if prefix is None else prefix
    if prefix is not None and (not re.fullmatch(r"[A-Za-z_]\w*", prefix, re.ASCII) or claimed(prefix)):
        raise UsageError(f"the prefix {prefix!r} is no C identifier")
    context = Source(rule, kernel, chosen, own, prefix, dict(settings or {})).context()
    return {
        f"{own}.h": fold(render_template("kernel.h.j2", context)),
        f"{own}.c": fold(render_template("kernel.c.j2", context)),
    }


def known_dtype(name: str) -> DType:
    """The dtype of this name."""
    if name not in DTYPES:
        raise UsageError(f"there is no dtype {name!r} (there are {', '.join(DTYPES)})")
    return DTYPES[name]


def leaves(expressions: Iterable[Expr]) -> list[Expr]:
    """The scalars that expressions read, each once, in order."""
    found: dict[Expr, None] = {}
    for expr in expressions:
        for e in expr.walk():
            if e.type.uniform and e.op in ("hyper", "time", "state", "ref"):
                found[e] = None
    return list(found)


class Source:
    """What the templates show of one kernel."""

    def __init__(
        self,
        rule: Rule,
        kernel: Kernel,
        dtypes: list[DType],
        prefix: str,
        given_prefix: str | None,
        settings: dict[str, object],
    ):
        self.rule, self.kernel, self.dtypes, self.prefix = rule, kernel, dtypes, prefix
        self.given_prefix, self.settings = given_prefix, settings
        (self.phase,) = kernel.phases
        self.helpers: dict[str, str] = {}
        self.let = {let.id: let for let in (*kernel.step_scalars, *kernel.tensor_scalars, *self.phase.lets)}

        macros = {f"{prefix}_{macro}" for macro in ("API", "INLINE", "RESTRICT", "H")}
        self.hyper = Names(macros)
        self.hyper.enter((name, name) for name, _ in kernel.hyperparameters)
        self.fields = Names(macros)
        self.fields.enter((name, name) for name in ["p", "g", *(state.name for state in kernel.state)])
        self.size = self.fields.own("n")

        # Scalars that cross from one emitted function to another.
        in_elements = [*(let.expr for let in self.phase.lets), *(expr for _, expr in self.phase.stores)]
        self.per_element = leaves(in_elements)
        per_tensor = leaves(let.expr for let in kernel.tensor_scalars)
        stored = leaves(expr for _, expr in kernel.state_stores)
        late = {let.id for let in kernel.tensor_scalars}
        crossing = dict.fromkeys([*self.per_element, *per_tensor, *stored])
        self.early = [e for e in crossing if not (e.op == "state" or (e.op == "ref" and e.value in late))]
        used_late = dict.fromkeys([*self.per_element, *stored])
        self.late = [e for e in used_late if e not in self.early]
        self.scalars = Names()
        self.scalars.enter((e, self.spelled(e)) for e in [*self.early, *self.late])

    def spelled(self, leaf: Expr) -> str:
        """The author's name of a scalar."""
        if leaf.op == "time":
            return "t"
        return self.let[leaf.value].name if isinstance(leaf.value, int) else str(leaf.value)

    def helper(self, role: str, kind: DType) -> str:
        """The name of an emitted function, which is emitted because it was asked for."""
        name = helpers.name(role, kind, self.prefix)
        self.helpers.setdefault(name, helpers.definition(role, kind, self.prefix))
        return name

    # ── what the templates read ─────────────────────────────────────────────────────────────────────────────────

    def context(self) -> dict[str, Any]:
        """The variables of both templates."""
        asserts = self.assert_statuses()
        dtypes = [self.per_dtype(dtype) for dtype in self.dtypes]
        scalars = self.step_scalars(asserts)
        tensor_scalars = self.tensor_scalars()
        statuses = [(name, code, text) for code, (name, text) in enumerate(STATUSES)]
        statuses += [(name, ASSERTS_FROM + k, text) for k, (name, text) in enumerate(asserts)]
        entries = [
            f"{self.prefix}_{name} = {code}{',' * (k < len(statuses))}" for k, (name, code, _) in enumerate(statuses, 1)
        ]
        widest = max(map(len, entries))
        return {
            "prefix": self.prefix,
            "comment": self.header_comment(),
            "size": self.size,
            "statuses": [
                {
                    "name": name,
                    "literal": c_string(text),
                    "line": f"{entry:<{widest}} /* {comment_text(text.removeprefix(BROKEN))} */",
                }
                for entry, (name, code, text) in zip(entries, statuses, strict=True)
            ],
            "hyper_comment": self.hyper_comment(),
            "hyper_fields": self.hyper_fields(),
            "scalar_state_comment": " Scalar state is one double per tensor." if self.kernel.scalar_state else "",
            "init_comment": self.init_comment(),
            "init_parameter": f", const {self.prefix}_hyper *h" if self.init_needs_hyper() else "",
            "dtypes": dtypes,
            "scalars": scalars,
            "tensor_scalars": tensor_scalars,
            "helpers": list(self.helpers.values()),
            "roots": [
                dtype
                for dtype in self.dtypes
                if any(e.op == "sqrt" and not e.type.uniform for let in self.phase.lets for e in let.expr.walk())
            ],
        }

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
            "--target c",
            *(f"--dtype {d.suffix}" for d in self.dtypes),
        ]
        command += [f"--set {shlex.quote(f'{name}={value}')}" for name, value in self.settings.items()]
        command += [f"--prefix {self.given_prefix}"] if self.given_prefix is not None else []
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
            "",
            f"Build:     cc -std=c99 -O2 -c {self.prefix}.c    (with -fopenmp a step runs on several threads)",
            f"Re-create: {' '.join(command)}",
            f"Rule hash: {rule.hash}",
            "",
            "Generated by optforge. This file may be used, changed and distributed without restriction.",
        ]
        return comment(lines)

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

    # ── scalars ─────────────────────────────────────────────────────────────────────────────────────────────────

    def step_scalars(self, asserts: list[tuple[str, str]]) -> dict[str, Any]:
        """The function that computes the scalars of a step."""
        lets = self.kernel.step_scalars
        fields = [*self.early, *self.late]
        scope = Names(CALLED | {"NULL"}, self.prefix)
        scope.enter((Expr("hyper", Type.SCALAR, value=name), name) for name, _ in self.kernel.hyperparameters)
        scope.enter([(Expr("time", Type.SCALAR), "t")])
        scope.enter((let.ref, let.name) for let in lets)
        hyper, steps, out, failed = (scope.own(name) for name in ("h", "step", "s", "failed"))
        printer = Printer(F64, lambda e: scope.of[e], self.helper, f"&{failed}")
        lines = [f"const {self.c_type(let.expr)} {scope.of[let.ref]} = {printer(let.expr)};" for let in lets]
        asserted = [
            {"condition": printer(assertion.condition), "status": name}
            for assertion, (name, _) in zip(self.kernel.asserts, asserts, strict=True)
        ]
        reads = [
            f"const double {scope.of[Expr('hyper', Type.SCALAR, value=name)]} = {hyper}->{self.hyper.of[name]};"
            for name, _ in self.kernel.hyperparameters
        ]
        known = [scope.of[Expr("hyper", Type.SCALAR, value=name)] for name, _ in self.kernel.hyperparameters]
        nan = [f"{name} != {name}" for name in known]
        time = Expr("time", Type.SCALAR)
        if time in leaves(let.expr for let in lets) or time in self.early:
            reads.append(f"const double {scope.of[time]} = (double){steps};")
        if not reads:
            reads.append(f"(void){hyper};")
        struct = f"{self.prefix}_scalars"
        return {
            "fields": [f"{self.c_type(e)} {self.scalars.of[e]}" for e in fields],
            "hyper": hyper,
            "steps": steps,
            "failed": failed,
            "can_fail": any(f"&{failed}" in text for text in [*lines, *(a["condition"] for a in asserted)]),
            "reads": reads,
            "nan": " || ".join(nan),
            "asserts": asserted,
            "lines": lines,
            "writes": [f"{out}->{self.scalars.of[e]} = {scope.of[e]};" for e in self.early],
            "out": f"{struct} *{out}, " if fields else "",
            "fill": f"{struct} *s, " if fields else "",
            "in": f"const {struct} *s, " if fields else "",
            "pass": "s, " if fields else "",
            "address": "&s, " if fields else "",
        }

    def tensor_scalars(self) -> dict[str, Any] | None:
        """The function that computes the scalars of a tensor; None where there are none."""
        lets = self.kernel.tensor_scalars
        if not self.late:
            return None
        states = [Expr("state", Type.SCALAR, value=state.name) for state in self.kernel.scalar_state]
        inputs = leaves(let.expr for let in lets)
        states = [state for state in states if state in [*inputs, *self.late]]
        scope = Names(CALLED, self.prefix)
        scope.enter((e, self.spelled(e)) for e in states)
        scope.enter((e, self.spelled(e)) for e in inputs)
        scope.enter((let.ref, let.name) for let in lets)
        out, failed = scope.own("s"), scope.own("failed")
        printer = Printer(F64, lambda e: scope.of[e], self.helper, f"&{failed}")
        lines = [f"const {self.c_type(let.expr)} {scope.of[let.ref]} = {printer(let.expr)};" for let in lets]
        parameters = [f"{self.prefix}_scalars *{out}", *(f"double {scope.of[e]}" for e in states)]
        arguments = ["&own", *(f"*x->{self.fields.of[str(e.value)]}" for e in states)]
        return {
            "parameters": ", ".join(parameters),
            "arguments": ", ".join(arguments),
            "failed": failed,
            "can_fail": any(f"&{failed}" in line for line in lines),
            "reads": [
                f"const {self.c_type(e)} {scope.of[e]} = {out}->{self.scalars.of[e]};"
                for e in inputs
                if e in self.early
            ],
            "lines": lines,
            "writes": [f"{out}->{self.scalars.of[e]} = {scope.of[e]};" for e in self.late],
        }

    @staticmethod
    def c_type(scalar: Expr) -> str:
        """The C type of a scalar."""
        return "int" if scalar.type is Type.CONDITION else "double"

    # ── elements ────────────────────────────────────────────────────────────────────────────────────────────────

    def per_dtype(self, dtype: DType) -> dict[str, Any]:
        """What the templates show once per dtype."""
        phase, real = self.phase, dtype.c
        arrays = [a for a in self.arrays() if a in phase.loads or a in dict(phase.stores)]
        scope = Names(CALLED, self.prefix)
        scope.enter((("element", name), name) for name in arrays)
        scope.enter((self.variable(let), let.name) for let in phase.lets)
        scope.enter((e, self.spelled(e)) for e in self.per_element)
        index, count, s = (scope.own(name) for name in ("i", "n", "s"))
        array = {name: scope.own(f"{scope.of['element', name]}_") for name in arrays}

        def leaf(e: Expr) -> str:
            if e.op == "load":
                return scope.of["element", e.value]
            if e.type.uniform:
                return scope.of[e]
            return scope.of[self.variable(self.let[e.value])] if isinstance(e.value, int) else ""

        printer = Printer(dtype, leaf, self.helper)
        bindings = [self.variable(let) for let in phase.lets]
        loaded = [("element", name) for name in phase.loads]
        loads = [
            f"{'' if key in bindings else 'const '}{real} {scope.of[key]} = {array[key[1]]}[{index}];" for key in loaded
        ]
        lines = []
        declared = set(loaded)
        for let, variable in zip(phase.lets, bindings, strict=True):
            value = printer(let.expr)
            if value == scope.of[variable] and variable in declared:
                continue  # x = x
            kind = ""
            if variable not in declared:
                kind = "int " if let.expr.type is Type.MASK else f"{real} "
                kind = f"const {kind}" if bindings.count(variable) == 1 else kind
                declared.add(variable)
            lines.append(f"{kind}{scope.of[variable]} = {value};")
        stores = [f"{array[name]}[{index}] = {printer(expr)};" for name, expr in phase.stores]
        written = dict(phase.stores)
        parameters = [f"const {self.prefix}_scalars *{s}"] if self.early or self.late else []
        parameters += [f"size_t {count}"]
        parameters += [
            f"{'' if name in written else 'const '}{real} *{self.prefix}_RESTRICT {array[name]}" for name in arrays
        ]
        passed = [f"x->{self.fields.of[name]} + i" for name in arrays]
        first = ["s"] if self.early or self.late else []
        scalars = []
        for e in self.per_element:
            cast = f"({real})" if e.type is Type.SCALAR and dtype is not F64 else ""
            kind = real if e.type is Type.SCALAR else "int"
            scalars.append(f"const {kind} {scope.of[e]} = {cast}{s}->{self.scalars.of[e]};")
        if (self.early or self.late) and not scalars:
            scalars.append(f"(void){s};")
        return {
            "c": real,
            "suffix": dtype.suffix,
            "fields": self.tensor_fields(dtype),
            "parameters": ", ".join(parameters),
            "block_arguments": ", ".join([*first, f"{self.prefix}_BLOCK_SIZE", *passed]),
            "rest_arguments": ", ".join([*first, "end - i", *passed]),
            "scalars": scalars,
            "index": index,
            "count": count,
            "loads": loads,
            "lines": lines,
            "stores": stores,
            "arrays": ", ".join(f"x->{self.fields.of[name]}" for name in self.arrays()),
            "scalars_of_state": ", ".join(f"x->{self.fields.of[s.name]}" for s in self.kernel.scalar_state),
            "array_inits": self.array_inits(dtype),
            "scalar_inits": [
                f"*tensor->{self.fields.of[s.name]} = {self.initial(s, F64)};" for s in self.kernel.scalar_state
            ],
            "state_stores": [
                f"*x->{self.fields.of[name]} = {self.stored_scalar(expr)};" for name, expr in self.kernel.state_stores
            ],
        }

    def arrays(self) -> list[str]:
        """All arrays of a tensor, in the order of the signature."""
        return ["p", "g", *(state.name for state in self.kernel.array_state)]

    @staticmethod
    def variable(let: Let) -> tuple[str, str]:
        """The C variable of an element binding; bindings of one name share it."""
        return ("mask" if let.expr.type is Type.MASK else "element", let.name)

    def tensor_fields(self, dtype: DType) -> list[str]:
        """Declarations of the arrays in the struct of a tensor."""
        scalar = {state.name for state in self.kernel.scalar_state}
        fields = [f"{dtype.c} *{self.fields.of['p']}", f"const {dtype.c} *{self.fields.of['g']}"]
        for state in self.kernel.state:
            fields.append(f"{'double' if state.name in scalar else dtype.c} *{self.fields.of[state.name]}")
        return fields

    def stored_scalar(self, expr: Expr) -> str:
        """The new value of a scalar state."""
        if expr.op == "const":
            return Printer.constant(expr, F64)[0]
        return f"{'own' if self.late else 's'}.{self.scalars.of[expr]}"

    # ── initial state ───────────────────────────────────────────────────────────────────────────────────────────

    def init_needs_hyper(self) -> bool:
        """Whether a state starts as a hyperparameter."""
        return any(isinstance(s.initial, str) and s.initial not in ("p", "g") for s in self.kernel.state)

    def init_comment(self) -> str:
        """What the initialisation reads."""
        read = sorted({s.initial for s in self.kernel.state if s.initial in ("p", "g")}, key=str, reverse=True)
        return f", from {' and '.join(map(str, read))} at its first step" if read else ""

    def array_inits(self, dtype: DType) -> list[str]:
        """Assignments to the elements of the state arrays."""
        return [f"tensor->{self.fields.of[s.name]}[i] = {self.initial(s, dtype)};" for s in self.kernel.array_state]

    def initial(self, state: State, dtype: DType) -> str:
        """The initial value of a state."""
        if state.initial in ("p", "g"):
            return f"tensor->{self.fields.of[state.initial]}[i]"
        if isinstance(state.initial, str):
            return f"{'' if dtype is F64 else f'({dtype.c})'}h->{self.hyper.of[state.initial]}"
        return dtype.constant(state.initial)
