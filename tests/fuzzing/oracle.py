"""The rule language, evaluated from a rule's own text on NumPy arrays and Python floats.

Nothing here is shared with the generator: the text is walked with Python's `ast`, one binding after the other, for all
tensors at once. What the language says, and where it is done:

* A scalar is a double. Meeting an element it is rounded once to the tensor's dtype (`rounded`); each operation on
  elements is rounded to it, in the order written.
* `x ** 2`, with the literal 2 or 2.0, is x * x; any other power of scalars is Python's.
* Where Python raises or turns complex, a scalar into which no reduction enters ends the step with `Undefined`; one that
  depends on a reduction has IEEE's value, and so has whatever a reduction decides the evaluation of: nobody can know
  before the first write.
* A binding that no output needs is not evaluated; of `a if c else b`, `and` and `or` only what Python evaluates is.
* Static options are resolved when the text is read. State that what is left never names is absent.
* exp, log and tanh of elements have an error bound instead of bits: rules that are compared in bits use them only where
  their last bits cannot matter.
"""

from __future__ import annotations

import ast
import ctypes
import ctypes.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oracles import _tree
from oracles._phase import largest, update_ratio

Array = np.ndarray[Any, np.dtype[Any]]


class Undefined(ArithmeticError):
    """A scalar has no value, so that the step is an error."""


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Node:
    """An expression with its names resolved; `depends` says whether a reduction enters it."""

    op: str
    args: tuple[Node, ...] = ()
    value: Any = None
    depends: bool = False


@dataclass(frozen=True)
class State:
    """A state as the signature declares it."""

    name: str
    initial: float | str
    scalar: bool


@dataclass
class Part:
    """A rule or a transform: its signature, and its body."""

    kind: str
    name: str
    takes: list[str]
    states: list[State]
    hyper: dict[str, float]
    options: dict[str, bool | str]
    body: list[ast.stmt]
    changes: list[str]


def literal(node: ast.expr) -> Any:
    """The value of a default: literal arithmetic on doubles, a string or a truth value."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, (bool, str)) else float(node.value)
    if isinstance(node, ast.UnaryOp):
        return -literal(node.operand)
    assert isinstance(node, ast.BinOp)
    a, b = literal(node.left), literal(node.right)
    return PYTHON[type(node.op)](a, b)


PYTHON: dict[type[ast.operator], Callable[[float, float], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Mod: lambda a, b: a % b,
    ast.Pow: lambda a, b: a**b,
}


def parts_of(text: str) -> dict[str, Part]:
    """The rules and transforms of a file by name."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            decorator = node.decorator_list[0]
            assert isinstance(decorator, ast.Name)
            found[node.name] = part_of(decorator.id, node)
    return found


def part_of(kind: str, node: ast.FunctionDef) -> Part:
    """One function."""
    arguments = node.args
    taken = len(arguments.args) - len(arguments.defaults)
    states = [
        State(arg.arg, literal(default), arg.annotation is not None)
        for arg, default in zip(arguments.args[taken:], arguments.defaults, strict=True)
    ]
    keywords = {
        arg.arg: literal(default)
        for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if default is not None
    }
    last = node.body[-1]
    assert isinstance(last, ast.Return) and last.value is not None
    returned = [n.id for n in ast.walk(last.value) if isinstance(n, ast.Name)]
    return Part(
        kind,
        node.name,
        [arg.arg for arg in arguments.args[:taken]],
        states,
        {name: value for name, value in keywords.items() if not isinstance(value, (bool, str))},
        {name: value for name, value in keywords.items() if isinstance(value, (bool, str))},
        node.body[:-1],
        [name for name in ("p", "g") if name in returned],
    )


REDUCTIONS = {
    "norm": _tree.norm,
    "sum": _tree.sum_,
    "mean": _tree.mean,
    "max_abs": _tree.max_abs,
    "global_norm": _tree.global_norm,
    "global_sum": _tree.global_sum,
}
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
}


@dataclass
class Program:
    """Parts in the order in which they run, under chosen options: bindings in the order of the text.

    `outputs` are the nodes of p, of the gradient as the rule sees it and of each state that is present.
    """

    parts: Sequence[Part]
    options: Mapping[str, bool | str]
    bindings: list[Node] = field(default_factory=list)
    outputs: dict[str, Node] = field(default_factory=dict)
    asserts: list[Node] = field(default_factory=list)
    states: dict[str, tuple[State, Part]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.arrays = {"p": Node("load", value="p"), "g": Node("load", value="g")}
        seen = self.arrays["g"]
        touched: set[str] = set()
        ends: dict[str, Node] = {}
        for part in self.parts:
            seen = self.arrays["g"]
            self.names: dict[str, Node] = {name: self.arrays[name] for name in part.takes}
            self.touched: set[str] = set()
            self.part = part
            for state in part.states:
                if state.initial == "g":
                    begin = Node("begun", (self.arrays["g"], Node("load", value=state.name)))
                    self.names[state.name] = self.bind(begin)
                else:
                    self.names[state.name] = Node("load", value=state.name)
            self.block(part.body)
            self.arrays |= {name: self.names[name] for name in part.changes}
            ends |= {state.name: self.names[state.name] for state in part.states}
            touched |= {state.name for state in part.states} & self.touched
        self.outputs = {"p": self.arrays["p"], "seen g": seen}
        for part in [self.parts[-1], *self.parts[:-1]]:
            for state in part.states:
                if state.name in touched:
                    self.outputs[state.name] = ends[state.name]
                    self.states[state.name] = (state, part)
        self.live: set[int] = set()
        pending = list(self.outputs.values())
        while pending:
            node = pending.pop()
            pending += node.args
            if node.op == "ref" and node.value not in self.live:
                self.live.add(node.value)
                pending.append(self.bindings[node.value])

    @property
    def everything_lives(self) -> bool:
        """Whether each binding is needed by an output."""
        return len(self.live) == len(self.bindings)

    def reductions(self) -> set[str]:
        """The names of the reductions that bindings use."""
        found, pending = set(), [*self.bindings]
        while pending:
            node = pending.pop()
            pending += node.args
            if node.op == "reduce":
                found.add(node.value)
        return found

    def bind(self, node: Node) -> Node:
        """A new binding; what reads it."""
        self.bindings.append(node)
        return Node("ref", value=len(self.bindings) - 1, depends=node.depends)

    def block(self, statements: Sequence[ast.stmt]) -> None:
        """Statements, of an `if` the branch that the options choose."""
        for statement in statements:
            if isinstance(statement, ast.Assign):
                (target,) = statement.targets
                assert isinstance(target, ast.Name)
                bound = self.bind(self.node(statement.value))
                self.names[target.id] = bound
                self.touched.add(target.id)
            elif isinstance(statement, ast.If):
                chosen = self.node(statement.test)
                assert chosen.op == "truth"
                self.block(statement.body if chosen.value else statement.orelse)
            elif isinstance(statement, ast.Assert):
                self.asserts.append(self.node(statement.test))
            else:
                assert isinstance(statement, ast.Expr)

    def node(self, node: ast.expr) -> Node:
        """An expression, its names resolved."""
        match node:
            case ast.Constant(value=bool(value)):
                return Node("truth", value=value)
            case ast.Constant(value=str(value)):
                return Node("string", value=value)
            case ast.Constant(value=value):
                return Node("number", value=float(value))  # type: ignore[arg-type]
            case ast.Name(id=name):
                return self.named(name)
            case ast.UnaryOp(op=ast.USub()):
                return self.made("neg", self.node(node.operand))
            case ast.UnaryOp(op=ast.Not()):
                inner = self.node(node.operand)
                return Node("truth", value=not inner.value) if inner.op == "truth" else self.made("not", inner)
            case ast.BinOp(op=ast.Pow(), right=ast.Constant(value=2 | 2.0)):
                return self.made("square", self.node(node.left))
            case ast.BinOp(op=op):
                return self.made("binary", self.node(node.left), self.node(node.right), value=type(op))
            case ast.BoolOp(op=op, values=values):
                return self.boolean(isinstance(op, ast.And), values)
            case ast.Compare(left=left, ops=ops, comparators=others):
                sides = [self.node(side) for side in (left, *others)]
                if any(side.op in ("string", "truth") for side in sides):
                    equal = sides[0].value == sides[1].value
                    return Node("truth", value=equal == isinstance(ops[0], ast.Eq))
                return self.made("compare", *sides, value=tuple(map(type, ops)))
            case ast.IfExp(test=test, body=a, orelse=b):
                condition = self.node(test)
                if condition.op == "truth":
                    return self.node(a if condition.value else b)
                return self.made("choose", condition, self.node(a), self.node(b))
            case ast.Call(func=ast.Name(id=name), args=args):
                inner = [self.node(arg) for arg in args]
                if name in REDUCTIONS:
                    return Node("reduce", tuple(inner), name, depends=True)
                return self.made("call", *inner, value=name)
        raise AssertionError(ast.dump(node))

    def made(self, op: str, *args: Node, value: Any = None) -> Node:
        """A node, which depends on a reduction where a part does."""
        return Node(op, args, value, any(arg.depends for arg in args))

    def boolean(self, conjunction: bool, values: Sequence[ast.expr]) -> Node:
        """`and` or `or`, without what static options decide."""
        kept: list[Node] = []
        for value in values:
            part = self.node(value)
            if part.op != "truth":
                kept.append(part)
            elif part.value != conjunction:
                kept.append(part)
                break
        if not kept:
            return Node("truth", value=conjunction)
        return kept[0] if len(kept) == 1 else self.made("and" if conjunction else "or", *kept)

    def named(self, name: str) -> Node:
        """What a name means here."""
        if name in self.part.options:
            value = self.options[name]
            return Node("truth" if isinstance(value, bool) else "string", value=value)
        if name in self.names:
            self.touched.add(name)
            return self.names[name]
        return Node("time") if name == "t" else Node("hyper", value=name)


# ── evaluating ──────────────────────────────────────────────────────────────────────────────────────────────────────


LIBM = ctypes.CDLL(ctypes.util.find_library("m"))
for _name in ("pow", "exp", "log", "tanh", "sqrt"):
    getattr(LIBM, _name).restype = ctypes.c_double
LIBM.pow.argtypes = (ctypes.c_double, ctypes.c_double)


def libm(name: str, x: float) -> float:
    """A function of the platform's library, which raises nowhere."""
    return float(getattr(LIBM, name)(ctypes.c_double(x)))


def ieee(kind: type[ast.operator], a: float, b: float) -> float:
    """Arithmetic on doubles with IEEE's value where Python raises."""
    if kind is ast.Div:
        return _tree.divide(a, b)
    if kind is ast.Mod:
        return math.nan if b == 0 else a % b
    if kind is ast.Pow:
        return float(LIBM.pow(a, b))
    return float(PYTHON[kind](a, b))


def checked(kind: type[ast.operator], a: float, b: float) -> float:
    """Arithmetic on doubles as Python does it."""
    try:
        value = PYTHON[kind](a, b)
    except (ZeroDivisionError, OverflowError) as problem:
        raise Undefined(str(problem)) from None
    if isinstance(value, complex):
        raise Undefined("complex")
    return float(value)


def scalar_function(name: str, args: Sequence[float], quiet: bool) -> float:
    """A function of the language on doubles."""
    a = args[0]
    if name in ("minimum", "maximum"):
        b = args[1]
        if math.isnan(a) or math.isnan(b):
            return math.nan
        return a if (a < b if name == "minimum" else a > b) else b
    if name == "abs":
        return abs(a)
    if name == "sign":
        return math.nan if math.isnan(a) else 1.0 if a > 0 else -1.0 if a < 0 else 0.0
    if quiet:
        return libm(name, a)
    try:
        return float(getattr(math, name)(a))
    except (ValueError, OverflowError) as problem:
        raise Undefined(f"{name}({a!r}): {problem}") from None


def element_function(name: str, args: Sequence[Array]) -> Array:
    """A function of the language on arrays of one dtype."""
    a = args[0]
    if name in ("minimum", "maximum"):
        b = args[1]
        taken = a < b if name == "minimum" else a > b
        nan = np.asarray(math.nan, a.dtype)
        return np.where(np.isnan(a) | np.isnan(b), nan, np.where(taken, a, b))
    if name == "sign":
        return np.where(np.isnan(a), a, np.where(a > 0, 1, np.where(a < 0, -1, 0)).astype(a.dtype))
    result: Array = {"sqrt": np.sqrt, "abs": np.abs, "exp": np.exp, "log": np.log, "tanh": np.tanh}[name](a)
    return result


@dataclass
class Tensor:
    """A parameter with its state; `hyper` are the hyperparameters of its group at this step."""

    p: Array
    states: dict[str, Any]
    started: bool = False
    g: Array | None = None
    hyper: Mapping[str, float] = field(default_factory=dict)
    values: dict[int, Any] = field(default_factory=dict)
    t: int = 0


class Walk:
    """Evaluates expressions for the tensors of a step; those of its bindings are kept with the tensors."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = tensors
        self.totals: dict[int, float] = {}

    def run(self, program: Program) -> None:
        """Evaluate the bindings that are needed, in order, each for all tensors."""
        for k, node in enumerate(program.bindings):
            if k in program.live:
                self.gather(node)
                for tensor in self.tensors:
                    tensor.values[k] = self(node, tensor)

    def gather(self, node: Node, quiet: bool = False) -> None:
        """Evaluate the reductions over all tensors inside of an expression, the inner ones first."""
        late = quiet
        for arg in node.args:
            self.gather(arg, late)
            late = late or node.op in ("choose", "and", "or")
        if node.op == "reduce" and node.value.startswith("global"):
            arrays = [self(node.args[0], tensor, quiet) for tensor in self.tensors]
            self.totals[id(node)] = REDUCTIONS[node.value](arrays)  # type: ignore[operator]

    def __call__(self, node: Node, tensor: Tensor, quiet: bool = False) -> Any:
        """The value of an expression: a float, a bool, or an array. `quiet`: with IEEE's value where Python raises."""
        args, quiet_here = node.args, quiet or node.depends
        match node.op:
            case "number" | "truth":
                return node.value
            case "hyper":
                return tensor.hyper[node.value]
            case "time":
                return float(tensor.t)
            case "load":
                return {"p": tensor.p, "g": tensor.g, **tensor.states}[node.value]
            case "begun":
                return self(args[1] if tensor.started else args[0], tensor)
            case "ref":
                return tensor.values[node.value]
            case "reduce":
                if id(node) in self.totals:
                    return self.totals[id(node)]
                return REDUCTIONS[node.value](self.element(self(args[0], tensor, quiet), tensor))
            case "choose":
                taken = args[1] if self(args[0], tensor, quiet) else args[2]
                return self(taken, tensor, quiet or args[0].depends)
            case "and" | "or":
                late, value = quiet, node.op == "and"
                for arg in args:
                    value = self(arg, tensor, late)
                    late = late or arg.depends
                    if value != (node.op == "and"):
                        break
                return value
            case "not":
                return not self(args[0], tensor, quiet)
            case "compare":
                return self.compare(node, tensor, quiet)
        values = [self(arg, tensor, quiet) for arg in args]
        if any(isinstance(value, np.ndarray) for value in values):
            with np.errstate(all="ignore"):
                return self.elementwise(node, values, tensor)
        match node.op:
            case "neg":
                return -values[0]
            case "square":
                return values[0] * values[0]
            case "binary":
                return (ieee if quiet_here else checked)(node.value, *values)
        return scalar_function(node.value, values, quiet_here)

    def compare(self, node: Node, tensor: Tensor, quiet: bool) -> Any:
        """A comparison, maybe chained."""
        late = quiet
        left = self(node.args[0], tensor, late)
        late = late or node.args[0].depends
        for k, (kind, arg) in enumerate(zip(node.value, node.args[1:], strict=True)):
            # The first two sides are evaluated in any case, the others where what stands before them holds.
            right = self(arg, tensor, quiet if k == 0 else late)
            late = late or arg.depends
            if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
                with np.errstate(all="ignore"):
                    return COMPARISONS[kind](self.element(left, tensor), self.element(right, tensor))
            if not COMPARISONS[kind](left, right):
                return False
            left = right
        return True

    def elementwise(self, node: Node, values: Sequence[Any], tensor: Tensor) -> Array:
        """An operation on elements, to whose dtype scalars are rounded first."""
        if node.op == "call" and node.value == "where":
            result: Array = np.where(values[0], *(self.element(value, tensor) for value in values[1:]))
            return result
        own = [self.element(value, tensor) for value in values]
        match node.op:
            case "neg":
                return np.negative(own[0])
            case "square":
                return np.multiply(own[0], own[0])
            case "call":
                return element_function(node.value, own)
        if node.value is ast.Pow:
            return {0.5: np.sqrt, -1.0: lambda x: np.divide(x.dtype.type(1), x)}[values[1]](own[0])  # type: ignore[no-any-return, operator]
        function = {ast.Add: np.add, ast.Sub: np.subtract, ast.Mult: np.multiply, ast.Div: np.divide}[node.value]
        return function(own[0], own[1])  # type: ignore[no-any-return]

    def element(self, value: Any, tensor: Tensor) -> Array:
        """A value as an array of the tensor's shape and dtype."""
        if isinstance(value, np.ndarray):
            return value
        with np.errstate(all="ignore"):
            return np.full(tensor.p.shape, tensor.p.dtype.type(value))


# ── steps ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Outcome:
    """What a step leaves beside arrays: whether it was skipped, and the statistics, in total and of each tensor."""

    skipped: bool
    totals: dict[str, float]
    each: dict[str, Array]


NORMS = ("grad_norm", "clipped_grad_norm", "param_norm", "update_norm")


class Optimizer:
    """Tensors that take steps as the language says.

    `settings` are those of the transforms, by name of the part; `groups` the hyperparameters of each group.
    """

    def __init__(
        self,
        text: str,
        chain: Sequence[str],
        options: Mapping[str, bool | str],
        groups: Sequence[Mapping[str, float]],
        params: Sequence[Array],
        group_of: Sequence[int],
        *,
        skip_nonfinite: bool = False,
    ):
        found = parts_of(text)
        parts = [found[name] for name in chain]
        declared = {name: value for part in parts for name, value in part.options.items()}
        self.program = Program(parts, {**declared, **options})
        defaults = {name: value for part in parts for name, value in part.hyper.items()}
        self.groups = [{**defaults, **own} for own in groups]
        self.group_of, self.skips = list(group_of), skip_nonfinite
        self.tensors = [Tensor(p.copy(), {}) for p in params]
        self.t = 0

    def asserted(self) -> bool:
        """Whether all asserts hold for the hyperparameters of each group.

        Raises
        ------
        Undefined
            One has no value.
        """
        for own in self.groups:
            tensor = Tensor(np.zeros(0), {}, hyper=own)
            walk = Walk([tensor])
            for node in self.program.asserts:
                if not walk(node, tensor):
                    return False
        return True

    def step(self, grads: Sequence[Array | None], grad_scale: float | None = None) -> Outcome:
        """One step; nothing has changed where it raises.

        Raises
        ------
        Undefined
            A scalar has no value.
        """
        places = [k for k, g in enumerate(grads) if g is not None]
        active = []
        for k in places:
            tensor = self.tensors[k]
            g = grads[k]
            assert g is not None
            if grad_scale is not None:
                with np.errstate(all="ignore"):
                    g = np.multiply(g, g.dtype.type(1.0 / grad_scale))
            hyper = self.groups[self.group_of[k]]
            states = dict(tensor.states) if tensor.started else self.begun(tensor, hyper)
            active.append(Tensor(tensor.p, states, tensor.started, g, hyper, t=tensor.t + 1))
        unscaled = [tensor.g for tensor in active]
        nan = [int(np.isnan(g).sum()) for g in unscaled]
        inf = [int(np.isinf(g).sum()) for g in unscaled]
        norms: dict[str, list[Array]] = {"grad_norm": unscaled}  # type: ignore[dict-item]
        skipped = self.skips and sum(nan) + sum(inf) > 0
        # A scalar without a value ends a step that would be skipped as well: that is found before anything else.
        walk = Walk(active)
        walk.run(self.program)
        ends = [{name: walk(node, x) for name, node in self.program.outputs.items()} for x in active]
        if not skipped:
            after = [walk.element(end["p"], x) for end, x in zip(ends, active, strict=True)]
            norms["clipped_grad_norm"] = [walk.element(end["seen g"], x) for end, x in zip(ends, active, strict=True)]
            norms["param_norm"] = after
            with np.errstate(all="ignore"):
                norms["update_norm"] = [
                    # What is returned as it was read has not moved, not even where it is infinite.
                    np.zeros_like(new) if self.program.outputs["p"].op == "load" else np.subtract(new, x.p)
                    for new, x in zip(after, active, strict=True)
                ]
            for k, end, x, new in zip(places, ends, active, after, strict=True):
                own = self.tensors[k]
                own.p, own.started, own.t = new.copy(), True, own.t + 1
                own.states = {
                    name: end[name] if state.scalar else walk.element(end[name], x).copy()
                    for name, (state, _) in self.program.states.items()
                }
            self.t += 1
        return self.told(norms, nan, inf, skipped, places)

    def begun(self, tensor: Tensor, hyper: Mapping[str, float]) -> dict[str, Any]:
        """The initial state of a tensor; that which starts as the gradient is begun by its binding."""
        states: dict[str, Any] = {}
        for name, (state, _) in self.program.states.items():
            if state.initial == "p":
                states[name] = tensor.p
                continue
            value = 0.0 if state.initial == "g" else hyper.get(state.initial, state.initial)  # type: ignore[arg-type]
            with np.errstate(all="ignore"):
                states[name] = value if state.scalar else np.full_like(tensor.p, value)
        return states

    def told(
        self, norms: Mapping[str, list[Array]], nan: list[int], inf: list[int], skipped: bool, places: list[int]
    ) -> Outcome:
        """The statistics."""
        totals: dict[str, float] = {}
        each: dict[str, list[Any]] = {}
        for name in NORMS:
            if name in norms:
                totals[name] = _tree.global_norm(norms[name])
                each[name] = [_tree.norm(x) for x in norms[name]]
            else:
                totals[name] = 0.0 if name == "update_norm" else math.nan
                each[name] = [totals[name]] * len(places)
        if skipped:
            each["max_update_ratio"] = [0.0] * len(places)
        else:
            pairs = zip(each["update_norm"], each["param_norm"], strict=True)
            each["max_update_ratio"] = [update_ratio(u, n) for u, n in pairs]
        totals["max_update_ratio"] = largest(each["max_update_ratio"])
        totals |= {"nan": sum(nan), "inf": sum(inf), "skipped": int(skipped)}
        each |= {"nan": list(nan), "inf": list(inf), "skipped": [int(skipped)] * len(places)}
        whole = {}
        for name, values in each.items():
            own = np.full(len(self.tensors), 0.0 if name in ("nan", "inf", "skipped") else math.nan)
            own[places] = values
            whole[name] = own
        return Outcome(skipped, totals, whole)
