"""Rules and transforms as users hold them: `@rule` and `@transform` on functions, and what is made of them."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self, cast

from .. import rules, transforms
from ..core.diagnostics import Diagnostic, RuleError, Text, UsageError
from ..core.formats import Storage, Wanted
from ..core.ir import Kernel
from ..core.tracebacks import SHORT
from ..frontend import files
from ..frontend.compose import Composition, compose
from ..frontend.elaborate import check, elaborate
from ..frontend.lower import lower
from ..frontend.options import choices
from ..frontend.parse import Definition
from ..frontend.plain_python import plain_python
from ..frontend.settings import configure, settings

if TYPE_CHECKING:
    from ..core.dtypes import DType
    from ..emit.layout import RuleText


class OfItself:
    """An attribute that an instance has by what it declares, and its class by what the class is."""

    def __init__(self, own: Callable[[Any], Any], of_class: Callable[[Any], Any]):
        self.own, self.of_class = own, of_class

    def __get__(self, instance: Declared | None, owner: type[Declared]) -> Any:
        if instance is None:
            return self.of_class(owner)
        try:
            return self.own(instance)
        except RuleError as problem:  # `help` and completion do without
            raise AttributeError(str(problem)) from None


class Declared:
    """What rules and transforms have in common: a text that declares state, hyperparameters and options."""

    kind = "rule"

    def __init__(self, name: str, definition: Callable[[], Composition]):
        self.name = name
        self._define = definition
        self._kernels: dict[tuple[tuple[str, bool | str], ...], Kernel] = {}  # by the options

    @functools.cached_property
    def definition(self) -> Composition:
        """The checked text."""
        with SHORT:
            definition = self._define()
            check(definition)
        return definition

    __signature__ = OfItself(lambda rule: signature(rule.definition), lambda _: None)

    def __init_subclass__(cls) -> None:
        about = cls.__doc__
        cls.__doc__ = OfItself(lambda rule: described(rule), lambda _: about)  # type: ignore[assignment]

    @property
    def __name__(self) -> str:
        return self.name

    @property
    def doc(self) -> str:
        """The docstring."""
        return self.definition.doc

    @property
    def formulas(self) -> str:
        """The body, as the author wrote it."""
        return self.definition.formulas

    @property
    def hyperparameters(self) -> Mapping[str, float]:
        """Names with their defaults."""
        return types.MappingProxyType(dict(self.definition.hyperparameters))

    @property
    def options(self) -> Mapping[str, bool | str]:
        """Static options with their defaults."""
        return types.MappingProxyType(dict(self.definition.options))

    @property
    def state(self) -> Mapping[str, float | str]:
        """Names with their initial values."""
        return types.MappingProxyType({state.name: state.initial for state in self.definition.state})

    @property
    def hash(self) -> str:
        """SHA-256 over the parsed form."""
        return self.definition.hash

    @property
    def origin(self) -> str:
        """How the command line names it: built-in names, or FILE.py:NAME without the directory, with colons between."""
        return ":".join(map(origin, self.definition.parts))

    def __repr__(self) -> str:
        return f"<optforge {self.kind} {self.name}>"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> Any:
        definition = self.definition
        parts = [(part.kind, part.text, part.name, first_line(part.node)) for part in definition.parts]
        return restored, (type(self), self.name, parts, dict(definition.settings))

    def settings(self, given: Mapping[str, object]) -> tuple[dict[str, float], dict[str, bool | str]]:
        """All hyperparameters and options, with the given ones in place of the defaults.

        Raises
        ------
        TypeError
            A name is not the rule's, or a value is no number.
        ValueError
            NaN, or an option that takes other values.
        """
        with SHORT:
            return settings(self.definition, given)

    def accepts(self, option: str) -> tuple[bool | str, ...]:
        """The values that a static option takes."""
        return choices(self.definition)[option]


class Rule(Declared):
    """An update rule, maybe with transforms before it.

    Made by `@rule` from a function, by `transform >> rule`, or by `Rule.from_file` from a file that is read and never
    executed. Its text is compiled when something of it is first used; an error in it raises `RuleError` then.

    Attributes
    ----------
    name : str
        The function's name; of a composition the names of its parts, `clip_by_global_norm_adam`.
    doc : str
        Its docstring.
    function : callable
        The rule as plain Python on NumPy arrays: `function(p, g, *state, t=1, lr=0.1)` returns what the rule returns,
        new arrays, a tuple where there is state. State left out starts as the signature says. Reductions over all
        tensors see this one.
    hyperparameters : Mapping[str, float]
        Names with their defaults.
    options : Mapping[str, bool | str]
        Static options with their defaults.
    state : Mapping[str, float | str]
        Names with their initial values: a number, or "p", "g" or the name of a hyperparameter.
    hash : str
        SHA-256 over the parsed form; comments and layout do not change it.
    """

    @classmethod
    def from_file(cls, path: str | Path, name: str) -> Rule:
        """The rule `name` of a Python file, which is parsed and not executed.

        Raises
        ------
        RuleError
            The text was refused.
        UsageError
            There is no such file, or no such rule in it.
        """
        with SHORT:
            return rule_of(files.parse_file(Path(path), name, BUILT_IN, TRANSFORMS), f"{path}:{name}")

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        """The rule as plain Python on NumPy arrays."""

        def settings(given: Mapping[str, object]) -> dict[str, Any]:
            hyperparameters, options = self.settings(given)
            return {**hyperparameters, **options}

        return plain_python(self.definition, settings, signature(self.definition))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)`."""
        with SHORT:
            return self.function(*args, **kwargs)

    def __rshift__(self, other: object) -> NoReturn:
        raise TypeError(f"{self.name} is a rule, and a rule is last in a composition: transform >> {self.name}")

    def kernel(self, /, **settings: object) -> Kernel:
        """The compiled form, with hyperparameter defaults and options replaced by `settings`."""
        with SHORT:
            hyperparameters, options = self.settings(settings)
        key = tuple(options.items())
        if key not in self._kernels:
            self._kernels[key] = lower(self.name, tuple(hyperparameters.items()), elaborate(self.definition, options))
        return replace(self._kernels[key], hyperparameters=tuple(hyperparameters.items()))

    def stored(self, wanted: Wanted, settings: Mapping[str, object]) -> tuple[Kernel, tuple[Storage, ...]]:
        """The compiled form for arrays that are stored as is wanted, and how they are."""
        kernel = self.kernel(**settings)
        storages = wanted.storages(kernel)
        inexact = frozenset(name for own in storages for name in own.inexact)
        return self.rounded(inexact, storages[-1].moved, settings) if inexact else kernel, storages

    def rounded(
        self,
        inexact: frozenset[str],
        cost: Callable[[Iterable[str], Iterable[str]], float],
        settings: Mapping[str, object],
    ) -> Kernel:
        """The compiled form where these arrays are rounded when they are stored; `cost` is that of a pass."""
        hyperparameters, options = self.settings(settings)
        program = elaborate(self.definition, options)
        return lower(self.name, tuple(hyperparameters.items()), program, inexact, cost)

    def golden(self, kernel: Kernel, dtype: DType) -> int:
        """What the self-test of a kernel of this rule has to find: a short training on the reference, as one number."""
        from ..engines.golden import golden

        return golden(kernel, dtype)

    def generate(
        self,
        /,
        target: str = "c",
        dtypes: str | Iterable[str] | None = None,
        prefix: str | None = None,
        *,
        store: Mapping[str, str] | None = None,
        master: str | None = None,
        rounding: str = "nearest",
        suffix: str | None = None,
        **settings: object,
    ) -> dict[str, str]:
        """The emitted source.

        Parameters
        ----------
        target : str
            "c".
        dtypes : str or iterable of str, optional
            Element types, of "f32" and "f64"; both if left out.
        prefix : str, optional
            Begins every emitted name and the file names; the rule's name if left out.
        store : mapping of str to str, optional
            The formats of arrays, of "f32", "f64", "bf16" and "f16": {"p": "bf16", "g": "bf16"}. Those left out are
            f32. Dtypes are emitted beside it only if they are given.
        master : str, optional
            "f32" or "split": p is rounded from floats beside it, or from itself and the 16 bits that it leaves.
        rounding : str
            "nearest", or "stochastic".
        suffix : str, optional
            Ends the names of what is emitted for `store`; told from the formats if left out, as in adam_step_bf16.
        **settings
            Static options, and other defaults of hyperparameters.

        Returns
        -------
        dict
            File name to text.

        Raises
        ------
        RuleError
            The rule's text was refused.
        UsageError
            There is no such target or dtype, or the prefix is no C identifier.
        """
        with SHORT:
            return self.emit(target, Wanted(listed(dtypes), store, master, rounding, suffix), prefix, settings)

    def emit(
        self,
        target: str,
        wanted: Wanted,
        prefix: str | None,
        settings: Mapping[str, object],
        single: bool = False,
    ) -> dict[str, str]:
        """`generate`, for settings of any name; `single` files need no others."""
        from .targets import renderer

        every = {**self.definition.settings, **settings}
        return renderer(target)(self, *self.stored(wanted, every), prefix, every, single)

    def loops(self, wanted: Wanted, settings: Mapping[str, object]) -> str:
        """The loops over elements of the emitted C, for the first of its dtypes, as they stand in the file."""
        from ..emit.c import loops

        every = {**self.definition.settings, **settings}
        return loops(self, *self.stored(wanted, every), every)

    def text(self, wanted: Wanted, settings: Mapping[str, object], flags: tuple[str, ...]) -> RuleText:
        """What the rule's part of a bundle in C says."""
        from ..emit.c import rule_text

        every = {**self.definition.settings, **settings}
        return rule_text(self, *self.stored(wanted, every), None, every, flags)


class Transform(Declared):
    """A change of the gradient, or of the parameter, before a rule sees it.

    Made by `@transform` from a function. `transform(max_norm=1.0)` is the transform with another default or static
    option; `transform >> rule` is a rule, whose one kernel does both, and `transform >> transform` a transform.

    Attributes
    ----------
    name, doc, hyperparameters, options, state, hash
        As of a `Rule`.
    """

    kind = "transform"

    def __call__(self, /, *args: Any, **given: object) -> Transform:
        """The transform with other defaults of hyperparameters, or other static options.

        Raises
        ------
        TypeError, ValueError
            As of `Rule.settings`.
        """
        if args:
            raise TypeError(f"transform {self.name} takes settings by name, such as {self.example()}, and no arrays")
        with SHORT:
            made = configure(self.definition, given)
        return Transform(self.name, lambda: made)

    def example(self) -> str:
        """A call of it."""
        first = next(iter(self.hyperparameters.items()), ("name", 1.0))
        return f"{self.name}({first[0]}={first[1]!r})"

    def __rshift__(self, other: object) -> Any:
        if not isinstance(other, (Rule, Transform)):
            raise TypeError(f"behind a transform comes a transform or a rule, not {other!r}")
        return type(other)(f"{self.name}_{other.name}", lambda: compose(self.definition, other.definition))


def listed(dtypes: str | Iterable[str] | None) -> str | list[str] | None:
    """Dtypes as they may be given: one, several, or none."""
    return dtypes if dtypes is None or isinstance(dtypes, str) else [*dtypes]


def rule_of(composition: Composition, asked: str) -> Rule:
    """A rule of what was found in a file or put together.

    Raises
    ------
    UsageError
        It is a transform.
    """
    if composition.last.kind != "rule":
        raise UsageError(f"{asked!r} is a transform; a rule is needed behind it, as in {asked}:adam")
    made = Rule(composition.name, lambda: composition)
    made.definition  # noqa: B018 - errors appear here
    return made


def signature(composition: Composition) -> inspect.Signature:
    """The parameters of a rule or transform as a function on arrays."""
    kind, default = inspect.Parameter, inspect.Parameter.empty
    taken = ("p", "g") if composition.last.kind == "rule" else composition.last.takes
    parameters = [kind(name, kind.POSITIONAL_OR_KEYWORD) for name in taken]
    parameters += [kind(state.name, kind.POSITIONAL_OR_KEYWORD, default=state.initial) for state in composition.state]
    if composition.time:
        parameters.append(kind("t", kind.KEYWORD_ONLY, default=default))
    for name, value in {**composition.hyperparameters, **composition.options}.items():
        parameters.append(kind(name, kind.KEYWORD_ONLY, default=value))
    return inspect.Signature(parameters)


def described(declared: Declared) -> str:
    """The signature and the docstring, for `help`."""
    return f"{declared.name}{signature(declared.definition)}\n\n{declared.doc}".strip()


def first_line(node: ast.FunctionDef) -> int:
    """Where a function begins, with its decorators."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def restored(
    kind: type[Declared], name: str, parts: Iterable[tuple[str, Text, str, int]], settings: Mapping[str, object]
) -> Declared:
    """A rule or transform from its pickle, which has the texts."""
    made = kind(name, lambda: Composition(tuple(files.parse_function(*part) for part in parts), settings))
    made.definition  # noqa: B018 - errors appear here
    return made


def origin(part: Definition) -> str:
    """How the command line names a rule or transform."""
    file = Path(part.text.file)
    built_in = file.parent.parent == Path(__file__).parent.parent and file.parent.name in ("rules", "transforms")
    return part.name if built_in else f"{file.name}:{part.name}"


def rule(function: Callable[..., Any]) -> Rule:
    """Make an update rule of a function; never raises, errors appear when the rule is used.

    Parameters
    ----------
    function : callable
        In the rule language: `p, g`, state with its initial values, `*`, hyperparameters with their defaults. It is
        compiled from its text, so it stands in a file or in a cell of a notebook.

    Returns
    -------
    Rule

    Examples
    --------
    >>> @rule
    ... def sgd(p, g, *, lr=0.01):
    ...     p = p - lr * g
    ...     return p
    """
    return Rule(*decorated("rule", function))


def transform(function: Callable[..., Any]) -> Transform:
    """Make a gradient transform of a function; never raises, errors appear when it is used.

    Parameters
    ----------
    function : callable
        In the rule language; it takes `p` or `g` or both, may have state and hyperparameters, and returns what it
        changes. A keyword without a default, such as `lr`, is the rule's.

    Returns
    -------
    Transform

    Examples
    --------
    >>> @transform
    ... def halve(g):
    ...     g = g / 2
    ...     return g
    """
    return Transform(*decorated("transform", function))


def decorated(kind: str, function: Callable[..., Any]) -> tuple[str, Callable[[], Composition]]:
    """Name and definition of a function under @rule or @transform."""
    name = str(getattr(function, "__name__", repr(function)))
    code = getattr(function, "__code__", None)
    if not isinstance(code, types.CodeType):
        text = Text("<unknown>", ())
        return name, refused(text, 1, f"@{kind} stands on a function, not on {type(function).__name__} {name}")
    # The text is taken now: later the file may be another one.
    lines = linecache.getlines(code.co_filename, getattr(function, "__globals__", None))
    text = Text(code.co_filename, tuple(line.rstrip("\r\n") for line in lines))
    if not lines:
        message = f"the text of {kind} {name!r} cannot be found"
        hint = f"put the {kind} in a file; code run from a string keeps no text"
        return name, refused(text, code.co_firstlineno, message, hint)
    return name, lambda: Composition((files.parse_function(kind, text, name, code.co_firstlineno),))


def refused(text: Text, line: int, message: str, hint: str = "") -> Callable[[], Composition]:
    """A definition that cannot be had."""

    def define() -> Composition:
        raise RuleError([Diagnostic(line, 1, message, hint, text=text)])

    return define


class scalar:
    """Annotation of a state that is one double per tensor: `def nadam(p, g, mu: scalar = 1.0, …)`."""


# The packages stand as mappings.
BUILT_IN = cast("Mapping[str, Rule]", rules)
TRANSFORMS = cast("Mapping[str, Transform]", transforms)
