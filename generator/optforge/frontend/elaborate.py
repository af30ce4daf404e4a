"""Composition to Program: choose the static options, give every expression its type, refuse what has none."""

from __future__ import annotations

import ast
import unicodedata
from collections.abc import Mapping, Set

from ..core import bounds
from ..core.bounds import enumerated
from ..core.diagnostics import Reporter, nearest, printable
from ..core.functions import FUNCTIONS, IMPORTABLE, REDUCTIONS
from ..core.ir import Assert, Expr, Let, Program, Type
from .compose import Composition
from .literals import OPERATORS, fold_checked, is_two, number
from .options import Options, choices, configurations
from .parse import Definition, stores
from .unsupported import INSTEAD

POISON = Expr("poison", Type.POISON)
COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.Gt: "gt",
    ast.GtE: "ge",
    ast.Eq: "eq",
    ast.NotEq: "ne",
}


def check(composition: Composition) -> None:
    """Raise RuleError with the errors of the parts under every choice of their options."""
    for part in composition.parts:
        reporter = Reporter(part.text)
        every = list(configurations(Composition((part,))))
        for name, values in choices(Composition((part,))).items():
            if len(values) > bounds.OPTION_STRINGS:
                what = f"option {name!r} is compared with {len(values):,} strings"
                reporter.error(part.node, what, f"an option takes at most {bounds.OPTION_STRINGS}")
        reporter.check()
        if len(every) * part.nodes > bounds.CHECKED_NODES:
            many = f"{len(every)} choices of its options and {part.nodes:,} nodes of syntax"
            most = f"their product is at most {bounds.CHECKED_NODES:,}: drop options, or shorten the {part.kind}"
            reporter.error(part.node, f"the {part.kind} is too large to be checked: it has {many}", most)
            reporter.check()
        for options in every:
            Elaborator(part, options, reporter, [], scope(part, {})).run()
        reporter.check()


def elaborate(composition: Composition, options: Options) -> Program:
    """A rule with its transforms under one choice of their options, which have been checked."""
    unscale = element(Expr("unscale", Type.SCALAR))
    lets = [Let("g", 0, Expr("mul", Type.ELEMENT, (Expr("load", Type.ELEMENT, value="g"), unscale)))]
    arrays = {"p": Expr("load", Type.ELEMENT, value="p"), "g": lets[0].ref}
    seen = arrays["g"]
    outputs: dict[str, Expr] = {}
    asserts: list[Assert] = []
    touched: set[str] = set()
    for k, part in enumerate(composition.parts):
        reporter = Reporter(part.text)
        seen = arrays["g"]
        others = {state.name for other in composition.parts if other is not part for state in other.state}
        earlier = {name for other in composition.parts[:k] for name in other.locals}
        # A p or g that a transform binds and does not return is a local of its own.
        arrays_of_rule = part.changes if part.kind == "transform" else ("p", "g")
        taken = (others | earlier | {"p", "g"}) - {*arrays_of_rule, *(state.name for state in part.state)}
        elaborator = Elaborator(part, options, reporter, lets, scope(part, arrays), taken)
        elaborator.run()
        reporter.check()
        arrays |= {name: elaborator.stored(name) for name in part.changes}
        outputs |= {state.name: elaborator.stored(state.name) for state in part.state}
        asserts += elaborator.asserts
        touched |= elaborator.touched & {state.name for state in part.state}
    stored = (("p", arrays["p"]), *((state.name, outputs[state.name]) for state in composition.state))
    state = tuple(state for state in composition.state if state.name in touched)
    return Program(tuple(lets), stored, tuple(asserts), state, lets[0].ref, seen)


def scope(part: Definition, arrays: Mapping[str, Expr]) -> dict[str, Expr]:
    """What the names of a part's parameters and state mean at its begin."""
    names = {name: arrays.get(name, Expr("load", Type.ELEMENT, value=name)) for name in part.takes}
    for state in part.state:
        kind = (
            Expr("state", Type.SCALAR, value=state.name)
            if state.scalar
            else Expr("load", Type.ELEMENT, value=state.name)
        )
        names[state.name] = kind
    return names


class Elaborator:
    """One walk through the body of a rule or a transform.

    `lets` is extended; `names` are the meanings of parameters and state. Locals that are in `taken`, by another part's
    use, are told apart by the part's name.
    """

    def __init__(
        self,
        definition: Definition,
        options: Options,
        reporter: Reporter,
        lets: list[Let],
        names: dict[str, Expr],
        taken: Set[str] = frozenset(),
    ):
        self.definition, self.reporter, self.lets, self.names = definition, reporter, lets, names
        self.taken = taken
        self.options = {name: options[name] for name in definition.options}
        declared = [*definition.hyperparameters, *definition.borrowed]
        self.fixed = {name: Expr("hyper", Type.SCALAR, value=name) for name in declared}
        if definition.time:
            self.fixed["t"] = Expr("time", Type.SCALAR)
        self.scalar_states = {state.name for state in definition.state if state.scalar}
        self.bound_somewhere = set(definition.locals)
        self.touched: set[str] = set()
        self.asserts: list[Assert] = []
        self.asserting = False

    def run(self) -> None:
        """Walk; errors are with the reporter."""
        for state in self.definition.state:
            if state.initial == "g" and not state.scalar and "g" in self.names:
                begin = Expr("starting", Type.CONDITION)
                self.let(state.name, Expr("select", Type.ELEMENT, (begin, self.names["g"], self.names[state.name])))
        self.block(self.definition.body[:-1])
        for name in (*self.definition.changes, *(state.name for state in self.definition.state)):
            self.stored(name)

    def error(self, node: ast.AST, message: str, hint: str = "") -> Expr:
        """Record an error; its expression is poison, so that it is reported once."""
        self.reporter.error(node, message, hint)
        return POISON

    # ── statements ──────────────────────────────────────────────────────────────────────────────────────────────

    def block(self, statements: tuple[ast.stmt, ...] | list[ast.stmt]) -> None:
        """Statements in order; of an `if` the branch that the options choose."""
        for statement in statements:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)]):
                    self.bind(statement.targets[0], name, statement.value)
                case ast.If():
                    chosen = self.static(statement.test)
                    if chosen is None:
                        self.error(
                            statement.test, "`if` decides on static options only", self.static_hint(statement.test)
                        )
                        self.block([*statement.body, *statement.orelse])
                    else:
                        self.block(statement.body if chosen else statement.orelse)
                case ast.Assert():
                    self.check_assert(statement)
                case ast.Return():
                    pass  # misplaced, and reported when the rule was read
                case _:
                    self.refuse_statement(statement)

    def static_hint(self, test: ast.expr) -> str:
        """What to write instead of an `if` whose condition is not static."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            test = test.operand
        match test:
            case ast.Name(id=name) if name in self.fixed and name != "t":
                return f"{name}=False in the signature makes it a static option"
            case ast.Compare(left=ast.Name(id=name), ops=[ast.In() | ast.NotIn()]) if name in self.options:
                return f'write {name} == "…" or {name} == "…"'
            case ast.Compare(left=ast.Name(id=name)) if name in self.options:
                flag = isinstance(self.options[name], bool)
                return f"write `if {name}` or `if not {name}`" if flag else f'write {name} == "…"'
        return "choose by a comparison of elements with where(mask, a, b), by one of scalars with `a if c else b`"

    def refuse_statement(self, statement: ast.stmt) -> None:
        """Say what is wrong with a statement, and what to write; nothing is said of what it would have bound."""
        for name in {name for node in ast.walk(statement) for name in stores(node)} - set(self.fixed):
            self.names[name] = POISON
        match statement:
            case ast.AugAssign(target=ast.Name(id=name)):
                operator = ast.unparse(ast.BinOp(ast.Name("x"), statement.op, ast.Name("y"))).split()[1]
                hint = f"write {name} = {name} {operator} …"
                self.error(statement, "augmented assignment is not part of the language", hint)
            case ast.Assign(targets=[ast.Tuple() | ast.List(), *_]):
                self.error(statement, "tuple assignment is not part of the language", "assign a name a line")
            case ast.Assign(targets=[_, _, *_]):
                self.error(statement, "an assignment has one target", "assign a name a line")
            case ast.Expr(value=ast.Call(func=ast.Name(id="print"))):
                hint = 'return what you want to see as state, and read opt.state["name"] after a step'
                self.error(statement, "a rule is compiled, and prints nothing", hint)
            case ast.Assign() | ast.AugAssign():
                target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
                what = "a subscript" if isinstance(target, ast.Subscript) else "an attribute"
                hint = "assign to a name; p and the state are stored from what the rule returns"
                self.error(target, f"{what} cannot be assigned", hint)
            case _:
                self.refuse(statement)

    def refuse(self, node: ast.AST, place: ast.AST | None = None) -> Expr:
        """An error for syntax outside of the language."""
        what, hint = INSTEAD.get(type(node), (type(node).__name__.lower(), ""))
        return self.error(place or node, f"{what} is not part of the language", hint)

    def bind(self, target: ast.expr, name: str, value: ast.expr) -> None:
        """`name = value`."""
        expr = self.expression(value)
        if name in self.options:
            self.error(target, f"option {name!r} cannot be rebound", "bind another name")
        elif name in self.fixed:
            what = "t, the step count," if name == "t" else f"hyperparameter {name!r}"
            self.error(target, f"{what} cannot be rebound", "bind another name")
        elif name in self.scalar_states and expr.type not in (Type.SCALAR, Type.POISON):
            hint = f"drop `: scalar` from {name!r}, or bind another name"
            self.error(value, f"{name!r} is scalar state and cannot hold {an(expr.type)}", hint)
            self.names[name] = POISON
        else:
            self.touched.add(name)
            self.let(name, expr)

    def let(self, name: str, expr: Expr) -> None:
        """Bind a name."""
        own = name
        if name in self.taken:
            own = f"{self.definition.name}_{name}"
            while own in self.taken or own in self.bound_somewhere:
                own += "_"
        let = Let(own, len(self.lets), expr)
        self.lets.append(let)
        self.names[name] = let.ref

    def check_assert(self, statement: ast.Assert) -> None:
        """`assert condition on hyperparameters`."""
        self.asserting = True
        condition = self.condition(statement.test)
        self.asserting = False
        message = ""
        if statement.msg is not None:
            if isinstance(statement.msg, ast.Constant) and isinstance(statement.msg.value, str):
                message = printable(statement.msg.value)
            else:
                hint = "values are not filled in: say in words what has to hold"
                self.error(statement.msg, "the message of an assert is a plain string", hint)
        if isinstance(condition, bool):
            if condition:
                return
            condition = Expr("const", Type.CONDITION, value=False)
        if condition is not POISON:
            self.asserts.append(Assert(condition, self.text_of(statement.test), message))

    def text_of(self, node: ast.expr) -> str:
        """The author's text of an expression, on one line."""
        if node.lineno != node.end_lineno or node.end_col_offset is None:
            return ast.unparse(node)
        line = self.definition.text.at(node.lineno).encode(errors="replace")
        return line[node.col_offset : node.end_col_offset].decode(errors="replace") or ast.unparse(node)

    def stored(self, name: str) -> Expr:
        """The value that an output ends with, as it is stored."""
        expr = self.names[name]
        if expr.type in (Type.MASK, Type.CONDITION):
            place = self.definition.body[-1]
            return self.error(
                place, f"{name!r} ends as {an(expr.type)}, which cannot be stored", "store where(mask, 1, 0)"
            )
        return expr if name in self.scalar_states else element(expr)

    # ── static conditions ───────────────────────────────────────────────────────────────────────────────────────

    def static(self, node: ast.expr) -> bool | None:
        """The value of a condition on static options alone; None for any other expression."""
        match node:
            case ast.Constant(value=bool(value)):
                return value
            case ast.Name(id=name) if name in self.options and isinstance(self.options[name], bool):
                return bool(self.options[name])
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                negated = self.static(operand)
                return None if negated is None else not negated
            case ast.BoolOp(op=op, values=nodes):
                values = [self.static(n) for n in nodes]
                if None in values:
                    return None
                return all(values) if isinstance(op, ast.And) else any(values)
            case ast.Compare(left=left, ops=[ast.Eq() | ast.NotEq() as op], comparators=[right]):
                a, b = self.static_value(left), self.static_value(right)
                if a is None or b is None:
                    return None
                if type(a) is not type(b):
                    self.error(
                        node, f"{a!r} and {b!r} are never equal", "a bool option is true or false, any other a string"
                    )
                return (a == b) == isinstance(op, ast.Eq)
        return None

    def static_value(self, node: ast.expr) -> bool | str | None:
        """An option's value, or a string or truth value written out."""
        match node:
            case ast.Name(id=name) if name in self.options:
                return self.options[name]
            case ast.Constant(value=(bool() | str()) as value):
                return value
        return None

    # ── scalar conditions ───────────────────────────────────────────────────────────────────────────────────────

    def condition(self, node: ast.expr, instead: str = "use it in where(mask, a, b)") -> Expr | bool:
        """A condition that holds for all elements or for none; a bool where the options decide it."""
        chosen = self.static(node)
        if chosen is not None:
            return chosen
        expr = self.expression(node)
        if expr.type in (Type.CONDITION, Type.POISON):
            return expr
        if expr.type is Type.MASK:
            return self.error(node, "a comparison of elements decides element by element", instead)
        return self.error(node, f"{an(expr.type)} is not a condition", "compare it, for example with != 0")

    def boolean(self, node: ast.BoolOp) -> Expr:
        """`and`, `or` over scalar conditions; parts that the options decide are folded."""
        op = "and" if isinstance(node.op, ast.And) else "or"
        result: Expr | None = None
        for part in node.values:
            value = self.static(part)
            if value is None:
                expr = self.expression(part)
                if expr.type is Type.MASK:
                    return self.error(
                        part, f"`{op}` does not combine comparisons of elements", "nest where(mask, where(…), b)"
                    )
                if expr.type not in (Type.CONDITION, Type.POISON):
                    return self.error(part, f"{an(expr.type)} is not a condition", "compare it, for example with != 0")
            elif value == (op == "or"):
                expr = truth(value)
            else:
                continue
            result = expr if result is None else combine(op, Type.CONDITION, result, expr)
            if expr.op == "const":
                break  # whatever follows is not evaluated
        return truth(op == "and") if result is None else result

    def comparison(self, node: ast.Compare) -> Expr:
        """A comparison: of scalars (chained too) a condition, of elements a mask."""
        for operator in node.ops:
            if type(operator) not in COMPARISONS:
                return self.refuse(operator, node)
        for side in (node.left, *node.comparators):
            if isinstance(side, ast.Constant) and isinstance(side.value, str):
                return self.error(node, "a string is compared with a static option only, by == or !=")
        sides = [self.expression(side) for side in (node.left, *node.comparators)]
        for value, place in zip(sides, (node.left, *node.comparators), strict=True):
            if value.type in (Type.MASK, Type.CONDITION):
                return self.error(place, f"{an(value.type)} cannot be compared")
        if POISON in sides:
            return POISON
        pairs = list(zip(node.ops, sides, sides[1:], strict=False))
        if any(value.type is Type.ELEMENT for value in sides):
            if len(pairs) > 1:
                return self.error(
                    node, "comparisons of elements are not chained", "nest where(a < b, where(b < c, …), …)"
                )
            return combine(COMPARISONS[type(pairs[0][0])], Type.MASK, *map(element, sides))
        result: Expr | None = None
        for operator, a, b in pairs:
            part = combine(COMPARISONS[type(operator)], Type.CONDITION, a, b)
            result = part if result is None else combine("and", Type.CONDITION, result, part)
        assert result is not None
        return result

    # ── expressions ─────────────────────────────────────────────────────────────────────────────────────────────

    def expression(self, node: ast.expr) -> Expr:
        """The typed form of an expression."""
        if self.reporter.full:
            return POISON
        match node:
            case ast.Constant():
                return self.constant(node)
            case ast.Name():
                return self.name(node)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self.negation(node, self.expression(operand))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                condition = self.condition(operand, "leave `not` out, and swap the branches of where(mask, a, b)")
                if isinstance(condition, bool):
                    return truth(not condition)
                return combine("not", Type.CONDITION, condition)
            case ast.UnaryOp():
                return self.refuse(node.op, node)
            case ast.BinOp():
                return self.arithmetic(node)
            case ast.BoolOp():
                return self.boolean(node)
            case ast.Compare():
                chosen = self.static(node)
                return self.comparison(node) if chosen is None else truth(chosen)
            case ast.IfExp():
                return self.selection(node)
            case ast.Call():
                return self.call(node)
            case ast.Attribute():
                hint = f"a rule knows only names; its functions are {LISTED}"
                if node.attr in IMPORTABLE:
                    hint = f"write {node.attr}(…), imported from optforge"
                if node.attr in INSTEAD_OF_FUNCTIONS:
                    hint = f"{INSTEAD_OF_FUNCTIONS[node.attr]}; {hint}"
                return self.error(node, "an attribute is not part of the language", hint)
        return self.refuse(node)

    def constant(self, node: ast.Constant) -> Expr:
        """A literal number."""
        if isinstance(node.value, bool):
            return truth(node.value)
        value = number(node, self.reporter)
        return POISON if value is None else Expr("const", Type.SCALAR, value=value)

    def name(self, node: ast.Name) -> Expr:
        """A name: a parameter, the latest binding of a local, a hyperparameter."""
        name = node.id
        if name in self.options:
            hint = "options decide `if`, and `a if option else b`"
            return self.error(node, f"option {name!r} is static and has no value in a formula", hint)
        if self.asserting and (name in self.names or name == "t"):
            hint = "it is checked when they are set, before there is a step"
            return self.error(node, f"an assert is about hyperparameters, and {name!r} is none", hint)
        if name in self.fixed:
            return self.fixed[name]
        if name in self.names:
            self.touched.add(name)
            return self.names[name]
        if name == "t":
            hint = "list it behind the *: def name(p, g, *, t, lr=1e-3)"
            return self.error(node, "the step count t is not in the signature", hint)
        if name in self.bound_somewhere:
            hint = "bind it before, on every path that the options can choose"
            return self.error(node, f"{name!r} is read before it is bound", hint)
        known = [*self.fixed, *self.names, *self.options]
        if name in self.language_names():
            return self.error(node, f"{name!r} is a function", f"call it: {name}(…)")
        look = look_alike(name, known)
        if look:
            return self.error(node, f"unknown name {name!r}", look)
        hint = "a rule knows its own parameters and locals; module constants become hyperparameters"
        return self.error(node, f"unknown name {name!r}{nearest(name, known)}", hint)

    def language_names(self) -> dict[str, str]:
        """Names that call something, as this file spells them."""
        own = {name: name for name in IMPORTABLE}
        return own | {alias: name for alias, name in self.definition.aliases.items() if name in own}

    def negation(self, node: ast.UnaryOp, operand: Expr) -> Expr:
        """`-x`."""
        if operand.op == "const" and operand.type is Type.SCALAR:
            return Expr("const", Type.SCALAR, value=-number_of(operand))
        if operand.type in (Type.MASK, Type.CONDITION):
            return self.error(node.operand, f"{an(operand.type)} is not a number", MASK_HINT)
        return combine("neg", operand.type, operand)

    def arithmetic(self, node: ast.BinOp) -> Expr:
        """`a op b`, in the order written."""
        a, b = self.expression(node.left), self.expression(node.right)
        if type(node.op) not in OPERATORS:
            return self.refuse(node.op, node)
        op = OPERATORS[type(node.op)]
        for side, place in ((a, node.left), (b, node.right)):
            if side.type in (Type.MASK, Type.CONDITION):
                return self.error(place, f"{an(side.type)} is not a number", MASK_HINT)
        if a is POISON or b is POISON:
            return POISON
        if op == "pow":
            return self.power(node, a, b)
        if a.type is Type.SCALAR and b.type is Type.SCALAR:
            if a.op == b.op == "const":
                value = fold_checked(node, op, number_of(a), number_of(b), self.reporter)
                return POISON if value is None else Expr("const", Type.SCALAR, value=value)
            return combine(op, Type.SCALAR, a, b)
        if op == "mod":
            return self.error(node, "% is defined for scalars only")
        return combine(op, Type.ELEMENT, element(a), element(b))

    def power(self, node: ast.BinOp, base: Expr, exponent: Expr) -> Expr:
        """`base ** exponent`: of elements only the powers that are exact."""
        if exponent.type is Type.ELEMENT:
            return self.error(node, "an exponent is a scalar", GENERAL_POWER)
        if is_two(node.right):
            return combine("square", base.type, base)
        if base.type is Type.SCALAR:
            return combine("pow", Type.SCALAR, base, exponent)
        match exponent:
            case Expr(op="const", value=2.0):
                return combine("square", Type.ELEMENT, base)
            case Expr(op="const", value=0.5):
                return combine("sqrt", Type.ELEMENT, base)
            case Expr(op="const", value=-1.0):
                return combine("div", Type.ELEMENT, element(Expr("const", Type.SCALAR, value=1.0)), base)
            case Expr(op="const", value=float(value)):
                hint = power_hint(value)
            case _:
                hint = GENERAL_POWER
        return self.error(node, "elements have the powers 2, 0.5 and -1 only", hint)

    def selection(self, node: ast.IfExp) -> Expr:
        """`a if condition else b`."""
        condition = self.condition(node.test)
        if isinstance(condition, bool):
            return self.expression(node.body if condition else node.orelse)
        a, b = self.expression(node.body), self.expression(node.orelse)
        for side, place in ((a, node.body), (b, node.orelse)):
            if side.type in (Type.MASK, Type.CONDITION):
                return self.error(place, f"{an(side.type)} cannot be a branch")
        if POISON in (a, b, condition):
            return POISON
        if a.type is not b.type:
            hint = "both must be scalars or both elements; as an element the scalar s is where(g == g, s, s)"
            return self.error(node, f"the branches differ: {an(a.type)} and {an(b.type)}", hint)
        return Expr("select", a.type, (condition, a, b))

    def call(self, node: ast.Call) -> Expr:
        """A function of the table, or `where`."""
        if isinstance(node.func, ast.Attribute):
            return self.expression(node.func)
        if not isinstance(node.func, ast.Name):
            return self.error(node.func, "only functions of the language can be called")
        name = node.func.id
        known = self.language_names()
        if name in self.bound_somewhere or name in self.names or name in self.fixed or name in self.options:
            return self.error(
                node.func, f"{name!r} is a value in this rule and cannot be called", "give the value another name"
            )
        if name not in known:
            message = f"unknown function {name!r}{nearest(name, known)}"
            hint = INSTEAD_OF_FUNCTIONS.get(name, f"a rule cannot call helper functions; there are {LISTED}")
            return self.error(node.func, message, hint)
        if node.keywords:
            hint = "pass them by position"
            if known[name] in REDUCTIONS:
                hint = f"it is over the whole tensor, without axes: write {name}(x)"
            return self.error(node.keywords[0].value, f"{name}() takes no keyword arguments", hint)
        for arg in node.args:
            if isinstance(arg, ast.Starred):
                return self.refuse(arg)
        name = known[name]
        if name == "where":
            return self.where(node)
        function = REDUCTIONS[name] if name in REDUCTIONS else FUNCTIONS[name]
        if len(node.args) != len(function.parameters):
            expected = f"{name}({', '.join(function.parameters)})"
            hint = "it is over the whole tensor, without axes" if name in REDUCTIONS else ""
            message = f"{expected} takes {len(function.parameters)} argument(s), not {len(node.args)}"
            return self.error(node, message, hint)
        args = [self.expression(arg) for arg in node.args]
        for value, place in zip(args, node.args, strict=True):
            if value.type in (Type.MASK, Type.CONDITION):
                return self.error(place, f"{an(value.type)} is not a number", MASK_HINT)
        if name in REDUCTIONS:
            return self.reduction(node, name, args[0])
        if all(arg.type is Type.SCALAR for arg in args):
            return combine(name, Type.SCALAR, *args)
        return combine(name, Type.ELEMENT, *map(element, args))

    def reduction(self, node: ast.Call, name: str, value: Expr) -> Expr:
        """A reduction of elements to a scalar."""
        if value.type is Type.SCALAR:
            hint = "abs(s) of a scalar s needs no reduction" if name in ("norm", "max_abs", "global_norm") else ""
            return self.error(node.args[0], f"{name}() is over elements, and this is a scalar", hint)
        return POISON if value is POISON else Expr("reduce", Type.SCALAR, (value,), name)

    def where(self, node: ast.Call) -> Expr:
        """`where(mask, a, b)`, with the elements' dtype."""
        if len(node.args) != 3:
            return self.error(node, f"where(mask, a, b) takes 3 arguments, not {len(node.args)}")
        chosen = self.static(node.args[0])
        mask = truth(chosen) if chosen is not None else self.expression(node.args[0])
        a, b = self.expression(node.args[1]), self.expression(node.args[2])
        if mask.type.uniform:
            return self.error(
                node.args[0], "where() chooses by elements, and this is a scalar", "write a if condition else b"
            )
        if mask.type is Type.ELEMENT:
            return self.error(node.args[0], "where() chooses by a comparison", "compare, for example with != 0")
        for side, place in ((a, node.args[1]), (b, node.args[2])):
            if side.type in (Type.MASK, Type.CONDITION):
                return self.error(place, f"{an(side.type)} cannot be a branch")
        return combine("where", Type.ELEMENT, mask, element(a), element(b))


LISTED = ", ".join([*FUNCTIONS, "where", *REDUCTIONS])
COUNTED = "the number of elements is sum(where(x == x, 1, 1)), and mean(x) divides by it"
INSTEAD_OF_FUNCTIONS = {
    "clip": "write minimum(maximum(x, low), high)",
    "clamp": "write minimum(maximum(x, low), high)",
    "expm1": "write exp(x) - 1",
    "isfinite": "write where(x - x == 0, a, b), which chooses a where x is finite",
    "isinf": "write where(x - x != 0, where(x == x, a, b), b), which chooses a where x is infinite",
    "isnan": "write where(x != x, a, b), which chooses a where x is NaN",
    "log1p": "write log(1 + x)",
    "rsqrt": "write 1 / sqrt(x)",
    "sigmoid": "write 1 / (1 + exp(-x))",
    "float": "leave it out: scalars are doubles",
    "len": COUNTED,
    "max": "write maximum(a, b)",
    "min": "write minimum(a, b)",
    "numel": COUNTED,
    "pi": "write 3.141592653589793",
    "pow": "write a ** b",
    "size": COUNTED,
    "square": "write x**2",
}
GENERAL_POWER = "where x is positive, x**y is exp(y * log(x)); where it has a sign, take abs(x) and multiply by sign(x)"
MASK_HINT = "choose numbers by it: where(mask, 1, 0)"


def power_hint(exponent: float) -> str:
    """How to write a power of elements, which may have any sign."""
    if exponent == 3:
        return "write x * x * x"
    if exponent == 4:
        return "write (x**2)**2, or x2 = x**2 and then x2 * x2"
    if exponent.is_integer():
        return f"multiply: x2 = x**2 and then x2 * x2 is x**4{', and 1 / y for a negative one' * (exponent < 0)}"
    return GENERAL_POWER


def an(kind: Type) -> str:
    """A type as messages name it."""
    names = {
        Type.SCALAR: "a scalar",
        Type.CONDITION: "a scalar condition",
        Type.ELEMENT: "an element",
        Type.MASK: "a comparison of elements",
    }
    return names.get(kind, "nothing")


def combine(op: str, kind: Type, *args: Expr) -> Expr:
    """An operation, or poison where an operand is."""
    return POISON if POISON in args else Expr(op, kind, args)


def element(expr: Expr) -> Expr:
    """The expression as an element: a scalar is rounded, here and once."""
    return Expr("round", Type.ELEMENT, (expr,)) if expr.type is Type.SCALAR else expr


def truth(value: bool) -> Expr:
    """A constant condition."""
    return Expr("const", Type.CONDITION, value=value)


def number_of(expr: Expr) -> float:
    """The value of a constant."""
    assert isinstance(expr.value, float)
    return expr.value


def look_alike(name: str, known: list[str]) -> str:
    """A hint where a name consists of letters that look like those of another alphabet."""
    foreign = [c for c in name if not c.isascii()]
    if not foreign:
        return ""
    named = ", ".join(f"U+{ord(c):04X} {unicodedata.name(c, 'unnamed')}" for c in foreign)
    return f"it is not ASCII: {named}; known are {enumerated(list(map(repr, known)))}"
