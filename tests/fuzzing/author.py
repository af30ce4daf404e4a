"""Writes random rules and transforms, and the circumstances under which they run: a case, which is plain JSON."""

from __future__ import annotations

import ast
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .oracle import Program, Tensor, Undefined, Walk, parts_of

Case = dict[str, Any]

IMPORTS = (
    "from optforge import rule, transform, scalar, where, sqrt, abs, sign, minimum, maximum, exp, log, tanh\n"
    "from optforge import norm, sum, mean, max_abs, global_norm, global_sum\n"
)

FUNCTIONS = ("sqrt", "abs", "sign", "minimum", "maximum", "exp", "log", "tanh", "where")
REDUCTIONS = ("norm", "sum", "mean", "max_abs", "global_norm", "global_sum")

ORDINARY = "a b d e h old prev new u x y z n s w k i j q r tmp acc step_size ratio trust rate m v mu nu buf avg".split()
# What C, C++, CUDA, their macros or the emitted files may claim.
CLAIMED = """RAND_MAX M_PI MAXFLOAT linux unix int double float char long signed unsigned auto register restrict inline static
    template typename new_ this operator namespace tensor tensors lanes lane count size sizes options hyper stats work
    leaf chunk total totals sums partial row rows thread threads_ block blockIdx threadIdx errno NAN INFINITY I EOF p_ g_ m_
    v_ p_2 x_2 a_2 change old_p grad_of p_then g_else g_of scale unscale status failed t_ control starting part whole plan
    zero one half dim3 warpSize min max powf sqrtf fabs pow fmod copysign main isnan signbit NULL typeof _Bool
    _Complex __line__ __x _ __ _0 FLT_MAX DBL_MIN INT_MAX L l O f d F g2 p0 real kind base exponent argument below result
    uint32_t size_t std cudaStream_t float4 half2 near far small IN OUT ERROR k_ k_t pass_no first last pool omp n_ i_ c
    phases passes workspace list_ kernel functor row_ tile state_ steps_ squares value g_squares p_norm norm_of_g
    one_minus_b scalar_ scalar_2 seen grad clipped param update""".split()
# Names that the Optimizer keeps for itself.
RESERVED = """params rule target threads skip_nonfinite zero_grads store master rounding seed groups step state state_dict
    load_state_dict save load stats""".split()
FOREIGN = "名 _u540d 梯度 β μ̂ λ ℓ ñ ё 数2 x名 ᾱ 𝛽 _u1d6fd ﬁ µ θ_t π é ü_ 率 한글 א".split()
COMMON = "mine_"  # most rules are called so, with a number behind it
RULE_NAMES = """math string stdint float_ stddef limits omp optforge k linux main n x tensor
    int8 M_PI RAND_MAX assert_ errno complex time std β_rule 规则 rms_decay p_ adam sgd lamb""".split()
TRANSFORM_NAMES = "first second third soften clip_ norm_ damp scale w mix n x 变 m int tensor lr_".split()
HYPER = "lr beta beta1 beta2 eps lam decay c k bound weight ρ gamma alpha".split()

NUMBERS = """0 1 2 3 0.5 0.1 0.9 2.0 3.7 1e-3 1e-8 0.25 10 (1-1e-8) (1/3) (2*0.5) (1+1) 1.0 0.0 -0.0 1e30 1e-30 5e-324 1e-40
    16777217 9007199254740992 1e-7 0x10 1_000 3.4028235e38 1e39 2.2250738585072014e-308 .5 5. 1E2 7 0.30000000000000004""".split()
USUAL = "1 2 0.5 0.1 0.9 3.7 0.25 1.5 0.01 3 0.75".split()

SIZES = (0, 1, 2, 3, 5, 17, 31, 32, 33, 70, 100)
LARGE = (1023, 1024, 1025, 4095, 4096, 4097)
HUGE = (32767, 32768, 32769, 70000)


def telling() -> list[float]:
    """Numbers whose powers tell pow(x, 2) from x * x, pow(x, 0.5) from sqrt(x), and so on: one in a thousand does."""
    random_ = random.Random(0)
    found: list[float] = []
    others: list[tuple[float, Callable[[float], float]]] = [
        (2.0, lambda x: x * x),
        (0.5, math.sqrt),
        (-1.0, lambda x: 1 / x),
        (3.0, lambda x: x * x * x),
    ]
    for power, other in others:
        wanted = len(found) + 6
        for _ in range(20000):
            x = random_.uniform(0.1, 3)
            if x**power != other(x) and len(found) < wanted:
                found.append(x)
    return found


TELLING = telling()


@dataclass
class Scope:
    """What names mean at a place of a text: "E" element, "S" scalar; those of hyperparameters and t are scalars too."""

    kinds: dict[str, str]
    fixed: tuple[str, ...]
    switches: dict[str, tuple[Any, ...]]
    scalar_states: tuple[str, ...] = ()
    hidden: frozenset[str] = frozenset()  # functions whose names are locals

    def elements(self) -> list[str]:
        return [name for name, kind in self.kinds.items() if kind == "E"]

    def scalars(self) -> list[str]:
        return [*self.fixed, *(name for name, kind in self.kinds.items() if kind == "S")]


@dataclass
class Writer:
    """Expressions and statements. `rough` is how often a form is taken that may have no value."""

    random: random.Random
    rough: float = 0.05
    reducing: float = 0.1
    everywhere: float = 0.3  # of the reductions those over all tensors
    switching: float = 0.1
    scope: Scope = field(default_factory=lambda: Scope({}, (), {}))
    reduced: int = 0

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def has(self, *functions: str) -> bool:
        return not self.scope.hidden & set(functions)

    def number(self) -> str:
        return str(self.pick(*NUMBERS) if self.chance(0.25) else self.pick(*USUAL))

    # ── scalars ─────────────────────────────────────────────────────────────────────────────────────────────────

    def scalar(self, depth: int, fixed: bool = False) -> str:
        """An expression that is no constant; `fixed`: of hyperparameters alone."""
        names = [n for n in self.scope.fixed if n != "t"] if fixed else self.scope.scalars()
        if not names:
            return self.reduction(depth - 1) if not fixed else "(1 + 1)"
        if depth <= 0 or self.chance(0.2):
            # What was bound last is the most interesting.
            return str(self.pick(*names, *names[-2:]))
        if not fixed and self.chance(self.reducing):
            return self.reduction(depth - 1)
        a = self.scalar(depth - 1, fixed)
        b = self.number() if self.chance(0.35) else self.scalar(depth - 1, fixed)
        if self.chance(0.15):
            a, b = b, a
            if a == b:
                b = self.scalar(0, fixed)
        if self.scope.switches and self.chance(self.switching):
            return f"({a} if {self.static()} else {b})"
        forms: list[Callable[[], str]] = [
            lambda: f"({a} + {b})",
            lambda: f"({a} - {b})",
            lambda: f"({a} * {b})",
            lambda: f"(-{self.scalar(depth - 1, fixed)})",
            lambda: f"({self.scalar(depth - 1, fixed)} / {self.away(b)})",
            lambda: f"({self.scalar(depth - 1, fixed)} % {self.away(b)})",
            lambda: self.power(depth - 1, fixed),
            lambda: self.called(depth - 1, fixed),
            lambda: self.called(depth - 1, fixed),
            lambda: f"({a} if {self.condition(depth - 1, fixed)} else {b})",
        ]
        return str(self.pick(*forms)())

    def away(self, text: str) -> str:
        """The number, away from 0 as a rule."""
        if self.chance(self.rough):
            return f"({text})"
        if not self.has("abs"):
            return f"(1.5 + ({text}) ** 2)"
        return f"(abs({text}) + {self.pick('0.5', '1', '1e-2', '2.0')})"

    def power(self, depth: int, fixed: bool) -> str:
        a, b = self.scalar(depth, fixed), self.scalar(depth - 1, fixed)
        if self.chance(self.rough):
            return f"({a}) ** ({b})"
        whole = [f"({a}) ** 2", f"({a}) ** 2.0", f"({a} + {b}) ** 2", f"({a}) ** 3"]
        whole += [f"({a}) ** ({self.pick('1 + 1', '2 * 1', '3 - 1', '4 / 2')})"] * 2
        if self.has("abs", "minimum"):
            positive = f"(abs({a}) + {self.pick('0.1', '0.5', '1e-3')})"
            whole += [
                f"{positive} ** {self.pick('0.5', '-1', '-0.5', '(1/3)', '1.5', '(2 - 0)', '2', '0')}",
                f"{positive} ** minimum({b}, 3)",
                f"{self.pick('2', '0.9', '0.5', '1.01')} ** minimum({a}, 5)",
            ]
        named = [n for n in self.scope.fixed if n != "t"]
        if named:
            k = self.pick(*named)
            whole += [f"abs({a}) ** {k}" if self.has("abs") and self.chance(0.7) else f"({a}) ** {k}"] * 2
            # The plain forms are those in which one in a thousand values shows another rounding: see `telling`.
            whole += [f"{k} ** ({self.pick('1 + 1', '2 * 1')})", f"{k} ** {self.pick('2', '3', '0.5', '-1')}"]
            if not fixed and self.has("max_abs") and self.scope.elements() and self.reducing:
                whole += [f"max_abs({self.element(0)}) ** {self.pick(k, '(1 + 1)', '2', '0.5', '-1')}"] * 2
            if "t" in self.scope.fixed and not fixed:
                whole += [f"{k} ** t", f"(1 - {k} ** t)", f"{k} ** (t - 1)"]
        return f"({self.pick(*whole)})"

    def called(self, depth: int, fixed: bool) -> str:
        a, b = self.scalar(depth, fixed), self.scalar(depth - 1, fixed)
        if self.chance(0.2):
            b = self.number()
        rough = self.chance(self.rough)
        forms = {
            ("sqrt", "abs"): f"sqrt({a})" if rough else f"sqrt(abs({a}))",
            ("abs",): f"abs({a})",
            ("sign",): f"sign({a})",
            ("maximum",): f"maximum({a}, {b})",
            ("minimum",): f"minimum({b}, {a})",
            ("exp", "minimum"): f"exp({a})" if rough else f"exp(minimum({a}, {self.pick('3', '0.5')}))",
            ("log", "abs"): f"log({a})" if rough else f"log(abs({a}) + {self.pick('0.5', '1', '1e-3')})",
            ("tanh",): f"tanh({a})",
        }
        allowed = [text for names, text in forms.items() if self.has(*names)]
        return str(self.pick(*allowed)) if allowed else a

    def reduction(self, depth: int) -> str:
        """A reduction over an element."""
        names = [name for name in REDUCTIONS if self.has(name)]
        names = [n for n in names if n.startswith("global") == self.chance(self.everywhere)] or names
        if not names or not self.scope.elements():
            return str(self.pick(*self.scope.scalars())) if self.scope.scalars() else "(0.5 + 0.25)"
        self.reduced += 1
        inner = self.element(min(depth, 2)) if depth > 0 and self.chance(0.6) else self.element(0)
        return f"{self.pick(*names)}({inner})"

    def condition(self, depth: int, fixed: bool = False) -> str:
        a, b = self.scalar(min(depth, 1), fixed), self.scalar(0, fixed) if self.chance(0.4) else self.number()
        sign = self.pick("<", "<=", ">", ">=", "==", "!=", "<", ">")
        simple = f"{a} {sign} {b}"
        if depth <= 0:
            return f"({simple})"
        forms: list[Callable[[], str]] = [
            lambda: f"({simple})",
            lambda: f"({simple})",
            lambda: f"({simple} and {self.condition(depth - 1, fixed)})",
            lambda: f"({simple} or {self.condition(depth - 1, fixed)})",
            lambda: f"(not {self.condition(depth - 1, fixed)})",
            lambda: f"({self.number()} {self.pick('<', '<=')} {a} {self.pick('<', '<=', '>', '!=')} {b})",
            lambda: f"({b} > {a} >= {self.scalar(0, fixed)} < {self.number()})",
        ]
        if self.scope.switches and self.chance(self.switching) and not fixed:
            static = self.static()
            forms = [
                lambda: f"({static} and {simple})",
                lambda: f"({simple} or {static})",
                lambda: f"(not {static} or {self.condition(depth - 1, fixed)})",
            ]
        return str(self.pick(*forms)())

    def static(self, depth: int = 1) -> str:
        """A condition on options."""
        name = self.pick(*self.scope.switches)
        values = self.scope.switches[name]
        if isinstance(values[0], bool):
            simple = self.pick(name, name, f"not {name}")
        else:
            value = self.pick(*values)
            simple = self.pick(f'{name} == "{value}"', f'{name} != "{value}"', f'"{value}" == {name}')
        if depth and self.chance(0.2):
            return f"({simple} {self.pick('and', 'or')} {self.static(depth - 1)})"
        return f"({simple})"

    # ── elements ────────────────────────────────────────────────────────────────────────────────────────────────

    def element(self, depth: int) -> str:
        names = self.scope.elements()
        if not names:
            return "where(0 < 1, 0, 1)"  # never: p or g is always an element
        if depth <= 0 or self.chance(0.1):
            return str(self.pick(*names, *names[-2:]))
        a, b = self.element(depth - 1), self.element(depth - 1 if self.chance(0.4) else 0)
        s = self.number() if self.chance(0.25) else self.scalar(min(depth - 1, 2))
        if self.scope.switches and self.chance(self.switching):
            return f"({a} if {self.static()} else {b})"
        other = self.pick(b, s)
        forms = [
            f"({a} + {b})", f"({a} - {b})", f"({a} * {b})", f"({s} * {a})", f"({a} * {s})", f"({a} + {s})", f"({a} - {s})",
            f"({s} - {a})", f"({a}) ** {self.pick('2', '2.0', '2')}", f"(-{a})", f"({s} * {a} + {b})",
        ]  # fmt: skip
        if self.chance(0.08):
            return f"({a} if {self.condition(depth - 1)} else {b})"
        if self.has("where") and self.chance(0.08):
            return f"where({self.mask(depth - 1)}, {self.pick(a, s)}, {other})"
        if self.chance(self.rough):
            forms += [
                f"({a} / {b})",
                f"({a} / {s})",
                f"({s} / {a})",
                f"({a}) ** 0.5",
                f"({a}) ** -1",
                f"({a}) ** (-1.0)",
            ]
            if self.has("sqrt"):
                forms.append(f"sqrt({a})")
        if self.has("abs"):
            forms += [f"({a} / {self.away(b)})", f"({s} / {self.away(a)})", f"(abs({a})) ** 0.5", f"abs({a})"]
            forms += [f"({self.away(a)}) ** -1", f"({a} / {self.away(s)})"]
            if self.has("sqrt"):
                forms += [f"sqrt(abs({a}))", f"{a} / (sqrt(({b}) ** 2) + 0.1)"]
        if self.has("sign"):
            forms.append(f"sign({a})")
        if self.has("maximum"):
            forms.append(f"maximum({a}, {other})")
        if self.has("minimum"):
            forms += [f"minimum({other}, {a})"]
            if self.has("maximum"):
                forms.append(f"minimum(maximum({a}, -abs({s})), abs({s}))" if self.has("abs") else f"maximum({a}, 0)")
        if self.chance(0.1):
            forms = [*forms, *self.insensitive(a) * 3]
        return str(self.pick(*forms))

    def insensitive(self, a: str) -> list[str]:
        """exp, log and tanh of elements, where no last bit of them matters."""
        forms = {
            ("sign", "tanh"): f"sign(tanh({a}))",
            ("sign", "exp", "maximum"): f"sign(exp(maximum({a}, -10)))",
            ("sign", "log", "abs"): f"sign(log(abs({a}) + 2))",
            ("maximum", "tanh"): f"maximum(tanh({a}), 2)",
            ("minimum", "exp"): f"minimum(exp({a}), -1)",
        }
        return [text for names, text in forms.items() if self.has(*names)]

    def mask(self, depth: int) -> str:
        a = self.element(max(depth, 0))
        b = self.pick(self.element(0), self.number(), self.scalar(min(depth, 1)), "0")
        sign = self.pick("<", "<=", ">", ">=", "==", "!=")
        return f"{a} {sign} {b}" if self.chance(0.8) else f"{b} {sign} {a}" if b != a else f"{a} == {a}"


@dataclass
class Declared:
    """What a part declares, before its body is written."""

    kind: str
    name: str
    takes: list[str]
    changes: list[str]
    states: list[tuple[str, str, bool]] = field(default_factory=list)
    hyper: dict[str, str] = field(default_factory=dict)
    options: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    borrowed: list[str] = field(default_factory=list)
    time: bool = False


class Author:
    """Writes case number `number` of a seed. `without` are features to leave out."""

    def __init__(self, seed: int, number: int, without: frozenset[str] = frozenset()):
        self.random = random.Random(f"{seed}:{number}")
        self.seed, self.number = self.random.randrange(1 << 30), number
        self.without = without
        self.writer = Writer(self.random)
        self.storing: set[str] = set()  # the arrays among the state of the part that is written
        self.settled: set[str] = set()  # those that are to end as they are
        self.taken: set[str] = {"p", "g", "t", *RESERVED}

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def name(self, pool: list[str], odd: float = 0.15) -> str:
        """A name that nothing else of the composition declares."""
        name = self.any_name(pool, odd)
        tries = 0
        while name in self.taken:
            tries += 1
            name = self.any_name(pool, odd) if tries < 20 else f"{self.pick(*pool)}{tries}"
        self.taken.add(name)
        return name

    def any_name(self, pool: list[str], odd: float = 0.15) -> str:
        name = self.pick(*pool)
        if self.chance(odd):
            name = self.pick(*CLAIMED, *(() if "foreign" in self.without else FOREIGN * 2))
        # Python takes identifiers in their normal form.
        return ast.parse(name).body[0].value.id  # type: ignore[attr-defined, no-any-return]

    # ── texts ───────────────────────────────────────────────────────────────────────────────────────────────────

    def case(self) -> Case:
        """The text, and the circumstances."""
        writer = self.writer
        writer.rough = self.pick(0.0, 0.02, 0.05, 0.25)
        writer.reducing = self.pick(0.0, 0.05, 0.15, 0.3)
        writer.everywhere = self.pick(0.0, 0.0, 0.3, 0.6)
        odd = self.pick(0.0, 0.1, 0.1, 0.5)
        number = self.pick(0, 0, 0, 1, 1, 1, 2, 2, 3)
        names: list[str] = []
        while len(names) <= number:
            pool = RULE_NAMES if not names else TRANSFORM_NAMES
            name = self.pick(*pool)
            if not names and self.chance(0.8):
                name = f"{COMMON}{self.number}"
            if name not in names and (name.isascii() or "foreign" not in self.without):
                names.append(name)
        names.reverse()
        parts = [self.declare("transform", name, odd) for name in names[:-1]] + [self.declare("rule", names[-1], odd)]
        hyper = [h for part in parts for h in part.hyper]
        for part in parts[:-1]:
            others = [h for h in hyper if h not in part.hyper]
            if others and self.chance(0.3):
                part.borrowed = [self.pick(*others)]
        texts = [self.write(part, parts, odd) for part in parts]
        self.random.shuffle(texts)
        text = ast.unparse(ast.parse(IMPORTS + "\n".join(texts)))
        return self.circumstances(text, parts)

    def declare(self, kind: str, name: str, odd: float) -> Declared:
        """A signature."""
        both = kind == "rule" or self.chance(0.6)
        takes = ["p", "g"] if both else [self.pick("g", "g", "g", "p")]
        changes = ["p"] if kind == "rule" else takes if self.chance(0.4) else [self.pick("g", *takes)]
        changes = [name for name in changes if name in takes] or takes
        made = Declared(kind, name, takes, changes)
        for _ in range(self.pick(0, 1, 1, 2, 3) if kind == "rule" else self.pick(0, 1, 2)):
            short = HYPER if kind == "rule" else [*HYPER, *ORDINARY]
            default = self.pick(
                "0.1", "0.9", "0.5", "1e-3", "2", "2.0", "1 - 1e-8", "1/3", "0.07", "1.5", "0.0", "3", "1e-8", "2.0"
            )
            made.hyper[self.name(short, odd)] = default
        for _ in range(self.pick(0, 0, 1, 1, 2, 3) if kind == "rule" else self.pick(0, 0, 0, 1, 2)):
            scalar = self.chance(0.35)
            initial = [
                self.pick(
                    "0.0", "0", "0.1", "1.0", "-1/3", "1e-3", "0.0" if "zero" in self.without else "-0.0", "2", "3"
                )
            ]
            if made.hyper:
                initial.append(f'"{self.pick(*made.hyper)}"')
            if not scalar:
                initial += [f'"{name}"' for name in takes]
            made.states.append((self.name(ORDINARY, odd), self.pick(*initial), scalar))
        for _ in range(self.pick(0, 0, 0, 1, 2)):
            values = self.pick((False, True), (True, False), ("one", "two"), ("one", "two", "three"))
            made.options[self.name(["fancy", "form", "mode", "nesterov", "way"], odd)] = values
        made.time = self.chance(0.4)
        return made

    def write(self, part: Declared, parts: list[Declared], odd: float) -> str:
        """The text of a function."""
        writer = self.writer
        kinds = dict.fromkeys(part.takes, "E") | {name: "S" if s else "E" for name, _, s in part.states}
        fixed = (*part.hyper, *part.borrowed, *(["t"] if part.time else []))
        hidden = frozenset(self.pick(*REDUCTIONS, *FUNCTIONS) for _ in range(self.pick(0, 0, 0, 0, 0, 0, 0, 0, 1, 2)))
        own = {*kinds, *fixed, *part.options}
        hidden = (hidden | (own & {*FUNCTIONS, *REDUCTIONS})) if hidden or own & {*FUNCTIONS, *REDUCTIONS} else hidden
        scalar_states = tuple(name for name, _, s in part.states if s)
        self.storing, self.settled = {name for name, _, s in part.states if not s}, set()
        writer.scope = Scope(kinds, fixed, part.options, scalar_states, hidden)
        # Locals may have any name but those of hyperparameters and options; the names of other parts above all.
        foreign = [
            n
            for other in parts
            if other is not part
            for n in (*other.hyper, *other.options, *(s for s, _, _ in other.states), other.name)
        ]
        forbidden = {*fixed, *part.options, "t", *{*FUNCTIONS, *REDUCTIONS} - hidden}
        if "arrays" in self.without:
            forbidden |= {"p", "g"} - set(part.changes)
        pool = [*ORDINARY, *[name for name in (*foreign, *foreign, part.name, *hidden) if name not in forbidden]]
        if part.kind == "transform" and "arrays" not in self.without:
            pool += [name for name in ("p", "g") * 4 if name not in part.takes]
        pool = [name for name in pool if name not in forbidden]

        lines: list[str] = []
        if part.kind == "rule" and part.hyper and self.chance(0.25):
            for _ in range(self.pick(1, 1, 2)):
                lines.append(f"assert {writer.condition(2, fixed=True)}{self.pick('', '', ', ' + repr('too large'))}")
        lines += self.block(pool, forbidden, odd, self.pick(1, 2, 3, 4, 6, 9), 0)
        lines += self.ending(part)
        parameters = [*part.takes]
        for name, initial, scalar in part.states:
            parameters.append(f"{name}: scalar = {initial}" if scalar else f"{name}={initial}")
        keywords = [*part.borrowed, *(f"{n}={v}" for n, v in part.hyper.items())]
        keywords += [f"{n}={values[0]!r}" for n, values in part.options.items()]
        if part.time:
            keywords.insert(0, "t")
        if keywords:
            parameters += ["*", *keywords]
        returned = ", ".join([*part.changes, *(name for name, _, _ in part.states)])
        body = "\n".join(f"    {line}" for line in [*lines, f"return {returned}"])
        return f"@{part.kind}\ndef {part.name}({', '.join(parameters)}):\n{body}\n"

    def block(self, pool: list[str], forbidden: set[str], odd: float, length: int, depth: int) -> list[str]:
        """Statements."""
        scope = self.writer.scope
        lines: list[str] = []
        for _ in range(length):
            kind = self.random.random()
            if scope.switches and depth < 2 and kind < 0.12:
                lines += self.branches(pool, forbidden, odd, depth)
            elif kind < (0.22 if self.storing else 0.14) and self.writer.reducing:
                lines += self.reload(pool, forbidden, odd)
            elif kind < 0.3:
                lines += self.chain(pool, forbidden, odd)
            elif kind < 0.55:
                lines.append(self.assign(self.target(pool, forbidden, odd, "S"), "S"))
            else:
                lines.append(self.assign(self.target(pool, forbidden, odd, "E"), "E"))
        return lines

    def target(self, pool: list[str], forbidden: set[str], odd: float, kind: str) -> str:
        """What is bound: again what there is, or anew."""
        scope = self.writer.scope
        arrays = [name for name in ("p", "g") if name in scope.kinds]
        bound = [name for name, own in scope.kinds.items() if own == kind and name not in scope.fixed]
        bound = [name for name in bound if name not in forbidden]
        if bound and self.chance(0.4):
            return str(self.pick(*bound))
        while True:
            name = self.any_name(pool, odd)
            if name in forbidden or (name in scope.scalar_states and kind != "S"):
                continue
            if kind == "S" and scope.elements() == [name]:
                continue
            if kind == "S" and name in arrays and self.chance(0.9):
                continue  # seldom: the parameter, or the gradient, as a number
            return name

    def assign(self, name: str, kind: str) -> str:
        """`name = expression` of a kind."""
        writer = self.writer
        depth = self.pick(1, 1, 2, 2, 3)
        value = writer.scalar(depth) if kind == "S" else writer.element(depth)
        if kind == "S" and self.chance(writer.reducing):
            value = writer.reduction(2)
        if kind == "S" and value.startswith("("):
            value = f"{value}"
        self.rebind(name, kind)
        return f"{name} = {value}"

    def rebind(self, name: str, kind: str) -> None:
        kinds = self.writer.scope.kinds
        kinds.pop(name, None)
        kinds[name] = kind  # last

    def chain(self, pool: list[str], forbidden: set[str], odd: float) -> list[str]:
        """A value kept under another name while its own is bound again, once or twice."""
        scope = self.writer.scope
        names = [name for name in scope.elements() if name not in forbidden]
        lines: list[str] = []
        if not names:
            return lines
        m = self.pick(*names)
        for _ in range(self.pick(1, 1, 2)):
            old = self.target(pool, forbidden, odd, "E")
            if old == m or scope.kinds.get(m) != "E":
                continue
            lines.append(f"{old} = {m}")
            self.rebind(old, "E")
            lines.append(self.assign(m, "E"))
        return lines

    def reload(self, pool: list[str], forbidden: set[str], odd: float) -> list[str]:
        """An array with an earlier meaning, a last one that a reduction is over, and all of them read behind that."""
        writer, scope = self.writer, self.writer.scope
        names = [name for name in scope.elements() if name not in forbidden]
        if not names:
            return []
        stored = [name for name in names if name in self.storing]
        m = self.pick(*stored) if stored and self.chance(0.8) else self.pick(*names)
        old, kept, n, t = (self.target(pool, forbidden, odd, kind) for kind in "EESE")
        if "p" in names and self.chance(0.6):
            t = "p"
        if len({m, old, kept, n, t} | set(scope.scalar_states)) < 5 + len(scope.scalar_states):
            return []
        lines = [f"{old} = {m}"]
        self.rebind(old, "E")
        lines.append(f"{m} = {writer.element(1)}")
        lines.append(f"{kept} = {m}")
        self.rebind(kept, "E")
        lines.append(f"{m} = {self.pick('0.9', '0.5')} * {old} + {writer.element(1)}")
        self.rebind(m, "E")
        names = [name for name in REDUCTIONS if writer.has(name)]
        lines.append(f"{n} = {self.pick(*names)}({m})")
        self.rebind(n, "S")
        lines.append(f"{t} = {n} * {self.pick(m, m, old)} * {kept} + {writer.element(1)}")
        self.rebind(t, "E")
        self.settled.add(m)
        return lines

    def branches(self, pool: list[str], forbidden: set[str], odd: float, depth: int) -> list[str]:
        """if, elif, else on static options."""
        scope = self.writer.scope
        before, ends, lines = dict(scope.kinds), [], []
        words = ["if", *self.pick([], [], ["elif"], ["elif", "elif"]), *self.pick([], ["else"], ["else"])]
        for word in words:
            scope.kinds = dict(before)
            test = "" if word == "else" else f" {self.writer.static()}"
            lines.append(f"{word}{test}:")
            lines += [f"    {line}" for line in self.block(pool, forbidden, odd, self.pick(1, 1, 2), depth + 1)]
            if lines[-1].endswith(":"):  # a chain of none
                lines.append(f"    {self.assign(self.target(pool, forbidden, odd, 'E'), 'E')}")
            ends.append(scope.kinds)
        if words[-1] != "else":
            ends.append(before)
        first, *others = ends
        scope.kinds = {name: kind for name, kind in first.items() if all(o.get(name) == kind for o in others)}
        if not scope.elements():
            scope.kinds = before
        return lines

    def ending(self, part: Declared) -> list[str]:
        """Updates that use what was computed."""
        writer, scope = self.writer, self.writer.scope
        lines = []
        for name, _, scalar in part.states:
            if scalar and self.chance(0.7):
                own = name if scope.kinds.get(name) == "S" else "0.5"
                value = self.pick(
                    f"0.5 * {own} + {writer.scalar(1)}",
                    writer.scalar(2),
                    f"minimum({own} + 1, 5)" if writer.has("minimum") else own,
                )
                lines.append(f"{name} = {value}")
                self.rebind(name, "S")
            elif not scalar and scope.kinds.get(name) == "E" and self.chance(0.2 if name in self.settled else 0.6):
                lines.append(f"{name} = {writer.pick(f'0.9 * {name} + {writer.element(1)}', writer.element(2))}")
                self.rebind(name, "E")
        step = self.pick(f"0.1 * {writer.element(1)}", f"{writer.scalar(1)} * {writer.element(1)}", writer.element(2))
        for name in part.changes:
            if part.kind == "rule" or scope.kinds.get(name) != "E" or self.chance(0.6):
                own = name if scope.kinds.get(name) == "E" else writer.element(1)
                lines.append(f"{name} = {own} {self.pick('-', '-', '-', '+', '*') if self.chance(0.9) else '/'} {step}")
                self.rebind(name, "E")
        return lines

    # ── circumstances ───────────────────────────────────────────────────────────────────────────────────────────

    def value(self) -> float:
        """A hyperparameter."""
        usual = self.pick(0.1, 0.5, 0.9, 1.0, 2.0, 0.01, 3.0, 0.25, 1.5, 1e-3, self.random.uniform(0, 2))
        odd = self.pick(0.0, -0.0, -1.0, 1e-300, 1e38, 1e300, math.inf, -2.0, 5e-324, 1e-45)
        usual = self.pick(*TELLING) if self.chance(0.3) else usual
        return float(odd if self.chance(0.04) else usual)

    def circumstances(self, text: str, parts: list[Declared]) -> Case:
        """Arrays, groups, steps, options, compiler."""
        hyper = [name for part in parts for name in part.hyper]
        options = {n: values for part in parts for n, values in part.options.items()}
        settings: dict[str, Any] = {name: self.value() for name in hyper if self.chance(0.5)}
        settings |= {
            name: self.pick(*self.accepted(text, name, values)) for name, values in options.items() if self.chance(0.6)
        }
        configured = {}
        for part in parts[:-1]:
            own = {
                name: settings.pop(name)
                for name in [*part.hyper, *part.options]
                if name in settings and self.chance(0.3)
            }
            if own:
                configured[part.name] = own
        number = self.pick(1, 1, 2, 2, 3, 4)
        dtypes = self.pick(["float32"], ["float32"], ["float64"], ["float32", "float64"])
        groups: list[dict[str, float]] = []
        if hyper and self.chance(0.25):
            groups = [{name: self.value() for name in hyper if self.chance(0.5)} for _ in range(self.pick(1, 2, 3))]
        tensors = [
            {
                "size": self.pick(*SIZES)
                if self.chance(0.9)
                else self.pick(*LARGE)
                if self.chance(0.95)
                else self.pick(*HUGE),
                "dtype": self.pick(*dtypes),
                "group": self.random.randrange(len(groups) or 1),
                "values": self.flavour(0.2),
            }
            for _ in range(number)
        ]
        tensors.sort(key=lambda tensor: tensor["group"])
        groups = [own for k, own in enumerate(groups) if any(tensor["group"] == k for tensor in tensors)]
        for tensor in tensors:
            tensor["group"] = 0
        if groups:
            places = (
                sorted(self.random.sample(range(1, number), min(len(groups) - 1, number - 1))) if number > 1 else []
            )
            groups = groups[: len(places) + 1]
            for k, tensor in enumerate(tensors):
                tensor["group"] = sum(k >= place for place in places)
        steps = []
        scaled, observed = self.chance(0.2), self.pick(0.0, 0.0, 0.5, 1.0)
        missing = self.pick(0.0, 0.0, 0.0, 0.3)
        for _ in range(self.pick(1, 2, 2, 3, 4)):
            step: dict[str, Any] = {"grads": [None if self.chance(missing) else self.flavour(0.15) for _ in tensors]}
            if scaled and self.chance(0.7):
                step["grad_scale"] = self.pick(2.0, 65536.0, 3.0, 0.1, 1e-3)
            if self.chance(observed):
                step["stats"] = True
            if hyper and steps and self.chance(0.1):
                step["set"] = {self.pick(*hyper): self.value()}
            steps.append(step)
        case: Case = {
            "text": text,
            "chain": [part.name for part in parts],
            "configured": configured,
            "settings": settings,
            "groups": groups,
            "tensors": tensors,
            "steps": steps,
            "skip_nonfinite": self.chance(0.25),
            "zero_grads": self.chance(0.2),
            "threads": self.pick(None, 1, 2, 3),
            "compiler": self.compiler(),
            "data": self.seed,
        }
        return self.held(case)

    def accepted(self, text: str, name: str, values: tuple[Any, ...]) -> list[Any]:
        """The values that an option takes: of strings the default and those that it is compared with."""
        if isinstance(values[0], bool):
            return list(values)
        tree = ast.parse(text)
        found = {values[0]}
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                if any(isinstance(side, ast.Name) and side.id == name for side in sides):
                    found |= {
                        side.value for side in sides if isinstance(side, ast.Constant) and isinstance(side.value, str)
                    }
        return sorted(found)

    def flavour(self, share: float) -> str:
        """What kind of values an array has."""
        return str(
            self.pick("edges", "edges", "huge", "tiny", "zeros", "large", "telling", "telling")
            if self.chance(share)
            else "usual"
        )

    def compiler(self) -> str:
        """Mostly what compiles fast."""
        name = self.pick("clang", "clang", "clang", "gcc")
        level = "-O0"
        if self.chance(0.04):
            level = self.pick("-O1", "-O2", "-O3", "-O3 -march=native")
        warnings = " -Wall -Wextra -Werror" if self.chance(0.5) and "warnings" not in self.without else ""
        return f"{name} {level}{warnings}"

    def held(self, case: Case) -> Case:
        """The case with asserts that hold, most often: the condition turned round where it does not."""
        if "assert " not in case["text"] or self.chance(0.05):
            return case
        tree = ast.parse(case["text"])
        for part, hyper in settled(case):
            node = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == part.name)
            kept: list[ast.stmt] = []
            for statement in node.body:
                if isinstance(statement, ast.Assert):
                    verdicts = set()
                    for own in hyper:
                        try:
                            verdicts.add(bool(verdict(part, statement, own)))
                        except Undefined:
                            verdicts.add(None)
                    if verdicts == {False}:
                        statement.test = ast.UnaryOp(ast.Not(), statement.test)
                    elif verdicts != {True}:
                        continue
                kept.append(statement)
            node.body = kept
        return {**case, "text": ast.unparse(ast.fix_missing_locations(tree))}


def settled(case: Case) -> Any:
    """Each part of a case with the hyperparameters that its groups have over all steps."""
    found = parts_of(case["text"])
    defaults: dict[str, Any] = {}
    for name in case["chain"]:
        defaults |= {**found[name].hyper, **found[name].options, **case["configured"].get(name, {})}
    rows = [{**defaults, **case["settings"], **group} for group in case["groups"] or [{}]]
    for step in case["steps"]:
        rows += [{**row, **step.get("set", {})} for row in rows[-len(case["groups"] or [{}]) :]]
    return [(found[name], rows) for name in case["chain"]]


def verdict(part: Any, statement: ast.Assert, hyper: dict[str, Any]) -> Any:
    """Whether an assert holds."""
    program = Program([part], {name: hyper[name] for name in part.options})
    program.part, program.names = part, {}
    tensor = Tensor(np.zeros(0), {}, hyper=hyper)
    return Walk([tensor])(program.node(statement.test), tensor)
