"""The rule as users hold it: `@rule` on a function, its attributes, and the five calls that turn it into files."""

from __future__ import annotations

import functools
import linecache
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from . import finding
from .diagnostics import Diagnostic, NotSupportedYet, RuleError, Text, nearest
from .elaborate import check, elaborate
from .ir import Kernel
from .lower import lower
from .options import choices, choose
from .parse import Definition
from .plain import plain_python


class Rule:
    """An update rule.

    Made by `@rule` from a function, or by `Rule.from_file` from a file that is read and never executed. Its text is
    compiled when something of it is first used; an error in it raises `RuleError` then.

    Attributes
    ----------
    name : str
        The function's name.
    doc : str
        Its docstring.
    function : callable
        The rule as plain Python on NumPy arrays: `function(p, g, *state, t=1, lr=0.1)` returns what the rule returns,
        new arrays, a tuple where there is state. State left out starts as the signature says.
    hyperparameters : Mapping[str, float]
        Names with their defaults.
    options : Mapping[str, bool | str]
        Static options with their defaults.
    state : Mapping[str, float | str]
        Names with their initial values: a number, or "p", "g" or the name of a hyperparameter.
    hash : str
        SHA-256 over the parsed form; comments and layout do not change it.
    """

    def __init__(self, name: str, definition: Callable[[], Definition]):
        self.name = name
        self._define = definition

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
        rule = cls(name, lambda: finding.parse_file(Path(path), name))
        rule.definition  # noqa: B018 - errors appear here
        return rule

    @functools.cached_property
    def definition(self) -> Definition:
        """The checked text."""
        definition = self._define()
        check(definition)
        return definition

    @property
    def doc(self) -> str:
        """The docstring."""
        return self.definition.doc

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
        """How the command line names the rule: a built-in name, or FILE.py:NAME without the directory."""
        file = Path(self.definition.text.file)
        return self.name if file.parent == Path(__file__).parent / "rules" else f"{file.name}:{self.name}"

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        """The rule as plain Python on NumPy arrays."""

        def settings(given: Mapping[str, object]) -> dict[str, Any]:
            hyperparameters, options = self.settings(given)
            return {**hyperparameters, **options}

        return plain_python(self.definition, settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)`."""
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<optforge rule {self.name}>"

    def settings(self, given: Mapping[str, object]) -> tuple[dict[str, float], dict[str, bool | str]]:
        """All hyperparameters and options of the rule, with the given ones in place of the defaults.

        Raises
        ------
        TypeError
            A name is not the rule's, or a value is no number.
        ValueError
            NaN, or an option that takes other values.
        """
        definition = self.definition
        known = [*definition.hyperparameters, *definition.options]
        for name in given:
            if name not in known:
                listed = f"; it has {', '.join(known)}" if known else "; it has none"
                raise TypeError(f"rule {self.name!r} has no hyperparameter {name!r}{nearest(name, known) or listed}")
        options = choose(definition, {name: value for name, value in given.items() if name in definition.options})
        hyperparameters = dict(definition.hyperparameters)
        for name, value in given.items():
            if name in hyperparameters:
                hyperparameters[name] = real(name, value)
        return hyperparameters, options

    def accepts(self, option: str) -> tuple[bool | str, ...]:
        """The values that a static option takes."""
        return choices(self.definition)[option]

    def kernel(self, /, **settings: object) -> Kernel:
        """The compiled form, with hyperparameter defaults and options replaced by `settings`."""
        hyperparameters, options = self.settings(settings)
        return lower(self.name, tuple(hyperparameters.items()), elaborate(self.definition, options))

    def generate(
        self,
        /,
        target: str = "c",
        dtypes: str | Iterable[str] | None = None,
        prefix: str | None = None,
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
        return self.emit(target, dtypes, prefix, settings)

    def emit(
        self, target: str, dtypes: str | Iterable[str] | None, prefix: str | None, settings: Mapping[str, object]
    ) -> dict[str, str]:
        """`generate`, for settings of any name."""
        from .targets import renderer

        return renderer(target)(self, self.kernel(**settings), dtypes, prefix, settings)


def real(name: str, value: object) -> float:
    """A hyperparameter's value as a double; NaN is refused."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        later = "; schedules are not supported yet" if callable(value) else ""
        raise TypeError(f"hyperparameter {name!r} is a number, not {value!r}{later}") from None
    except OverflowError:
        raise ValueError(f"hyperparameter {name!r} is beyond the range of a double") from None
    if number != number:
        raise ValueError(f"hyperparameter {name!r} is NaN")
    return number


def rule(function: Callable[..., Any]) -> Rule:
    """Make an update rule of a function; never raises, errors appear when the rule is used."""
    name = str(getattr(function, "__name__", repr(function)))
    code = getattr(function, "__code__", None)
    if not isinstance(code, types.CodeType):
        text = Text("<unknown>", ())
        return Rule(name, refused(text, 1, f"@rule stands on a function, not on {type(function).__name__} {name}"))
    # The text is taken now: later the file may be another one.
    lines = linecache.getlines(code.co_filename, getattr(function, "__globals__", None))
    text = Text(code.co_filename, tuple(line.rstrip("\r\n") for line in lines))
    if not lines:
        message = f"the text of rule {name!r} cannot be found"
        hint = "put the rule in a file; code run from a string keeps no text"
        return Rule(name, refused(text, code.co_firstlineno, message, hint))
    return Rule(name, lambda: finding.parse_function(text, name, code.co_firstlineno))


def refused(text: Text, line: int, message: str, hint: str = "") -> Callable[[], Definition]:
    """A definition that cannot be had."""

    def define() -> Definition:
        raise RuleError([Diagnostic(line, 1, message, hint, text=text)])

    return define


def transform(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a gradient transform of a function (not supported yet: using it raises)."""
    return unsupported_transform(str(getattr(function, "__name__", function)), function.__doc__)


def unsupported_transform(name: str, doc: str | None) -> Callable[..., Any]:
    """A transform's name, importable, that says it is to come."""

    def call(*args: Any, **kwargs: Any) -> Any:
        raise NotSupportedYet(f"{name}: transforms are not supported yet")

    call.__name__ = call.__qualname__ = name
    call.__doc__ = doc
    return call


TRANSFORMS = {
    name: unsupported_transform(name, f"{doc} (not supported yet).")
    for name, doc in {
        "add_weight_decay": "Add the decayed parameter to the gradient",
        "centralize": "Take the mean from the gradient",
        "clip_by_global_norm": "Bound the norm of all gradients together",
        "clip_by_norm": "Bound the norm of each tensor's gradient",
        "clip_by_value": "Bound each element of the gradient",
        "decoupled_weight_decay": "Decay the parameter itself",
    }.items()
}


class scalar:
    """Annotation of a state that is one double per tensor: `def nadam(p, g, mu: scalar = 1.0, …)`."""
