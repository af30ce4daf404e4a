"""Runs a case on the targets and on the oracle, and says where they differ."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import itertools
import json
import operator
import os
import re
import shutil
import subprocess
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import optforge as of
from compiling import objects
from data import same, special
from optforge.engines.c import compile as building
from optforge.engines.c import engine as c

from .author import COMMON, TELLING, Case
from .oracle import Optimizer, Undefined

FLAGS = (*building.FLAGS, *building.OPTIONAL_FLAGS)
RUNTIME = "optforge.c"
WARNED = "_-Wall_-Wextra_-Werror"  # what ends the name of a compiler that is to find nothing
SELFTEST = 18  # OPTFORGE_ERROR_SELFTEST
Array = np.ndarray[Any, np.dtype[Any]]


class Failure(Exception):
    """A case shows something wrong. `kind` is the same for failures that are most likely of one cause."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind, self.message = kind, message


def values(flavour: str, size: int, dtype: str, rng: np.random.Generator) -> Array:
    """An array of a flavour."""
    kind = np.dtype(dtype)
    own = rng.standard_normal(size) * rng.choice([0.01, 0.3, 1.0, 3.0], size=size)
    if flavour == "huge":
        own = own * (1e37 if kind == np.float32 else 1e300)
    elif flavour == "tiny":
        own = own * (1e-44 if kind == np.float32 else 1e-321)
    elif flavour == "large":
        own = own * 1e4
    elif flavour == "zeros":
        own = np.where(rng.random(size) < 0.5, 0.0, -0.0)
    elif flavour == "telling" and size:
        own = np.full(size, rng.choice(TELLING))
    made = own.astype(kind)
    if flavour == "edges" and size:
        edges = special(dtype)
        chosen = rng.random(size) < rng.choice([0.02, 0.3])
        made = np.where(chosen, rng.choice(edges, size=size), made)
    return np.ascontiguousarray(made)


def compilers(directory: Path) -> None:
    """Directory of scripts that run a compiler with flags behind those of optforge."""
    for name in ("gcc", "clang"):
        for level in ("-O0", "-O1", "-O2", "-O3", "-O3 -march=native"):
            for warn in ("", " -Wall -Wextra -Werror"):
                native = "" if "native" in level else " -march=x86-64" if os.uname().machine == "x86_64" else ""
                script = directory / f"{name} {level}{warn}".replace(" ", "_")
                # clang's OpenMP is a package of its own; where it is not there, everything would be compiled twice.
                drop = 'for a; do shift; [ "$a" = -fopenmp ] || set -- "$@" "$a"; done\n' if name == "clang" else ""
                script.write_text(f'#!/bin/sh\n{drop}exec {name} "$@"{native} {level}{warn}\n', encoding="utf-8")
                script.chmod(0o755)


def runtime(script: Path, directory: Path) -> str:
    """The object of the runtime, once for each compiler and its flags; its warnings are errors always."""
    strict = script.with_name(script.name.removesuffix(WARNED) + WARNED)
    return objects([strict, *FLAGS], [RUNTIME], directory)[0]


class Collected(Exception):
    """Carries what would be compiled."""

    def __init__(self, files: dict[str, str]):
        super().__init__()
        self.files = files


class Together:
    """Compiles the C of many rules in one go, and gives the loader the library: this is for speed alone.

    It stands in for `optforge.engines.c.compile.promised`; what it has not built goes there.
    """

    def __init__(self, directory: Path):
        self.directory, self.usual, self.load = directory, c.promised, c.load
        self.built: dict[str, Path] = {}
        self.only_collect = False
        c.promised, c.load = self.promised, self.loaded
        self.compile_files, building.compile_files = building.compile_files, self.compiled

    def loaded(self, path: Path, prefix: str) -> c.Library:
        """A library loaded, whose self-test is one more case: of the rule on the reference, with its defaults."""
        library = self.load(path, prefix)
        status = getattr(ctypes.CDLL(str(path)), f"{prefix}_selftest")()
        if status == SELFTEST:
            raise Failure("selftest", "the self-test of the compiled rule finds other bits than the reference")
        return library

    def promised(self, stem: str, identity: Iterable[bytes], files: Callable[[], Mapping[str, str]]) -> Path:
        """The library with these files in it."""
        made = dict(files())
        if self.only_collect:
            raise Collected(made)
        return self.built.get(json.dumps(made, sort_keys=True)) or self.usual(stem, identity, lambda: made)

    def compiled(self, compiler: Any, files: Mapping[str, str], place: Path, own: Sequence[str]) -> Path:
        """What is compiled of some files; the runtime, which is compiled alone, has been for other rules."""
        if RUNTIME not in files:
            return self.compile_files(compiler, files, place, own)
        for name, text in files.items():
            (place / name).write_text(text, encoding="utf-8")
        return Path(shutil.copy(runtime(Path(compiler.command[0]), place), place / "runtime.o"))

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Nothing is compiled meanwhile, but raised."""
        self.only_collect = True
        try:
            yield
        finally:
            self.only_collect = False

    def compile(self, emitted: Mapping[int, dict[str, str]], cases: Sequence[Case]) -> None:
        """Build what has one compiler and different names."""
        self.built = {}
        groups: dict[str, list[dict[str, str]]] = {}
        for k, files in emitted.items():
            groups.setdefault(cases[k]["compiler"], []).append(files)
        for compiler, rules in groups.items():
            place = Path(tempfile.mkdtemp(dir=self.directory))
            texts: dict[str, str] = {}
            taken = []
            for files in rules:
                if all(texts.get(name, text) == text for name, text in files.items()):
                    texts |= files
                    taken.append(files)
            for name, text in texts.items():
                (place / name).write_text(text, encoding="utf-8")
            own = [name for name in texts if name.endswith(".c") and name != RUNTIME]
            (place / "all.c").write_text("".join(f'#include "{name}"\n' for name in own), encoding="utf-8")
            script = self.directory / compiler.replace(" ", "_")
            command = [script, *FLAGS, "all.c", runtime(script, place), "-shared", "-o", "all.so", "-lm"]
            answer = subprocess.run(command, cwd=place, capture_output=True, check=False)
            if answer.returncode == 0:
                self.built |= {json.dumps(files, sort_keys=True): place / "all.so" for files in taken}


class Bench:
    """Where cases run: a directory for texts, compilers and kernels.

    `targets` are those that are compared with the oracle.
    """

    def __init__(self, targets: Sequence[str], directory: Path):
        self.all, self.targets, self.directory = targets, targets, directory
        self.cache = directory / "cache"
        self.cache.mkdir(mode=0o700)
        os.environ["OPTFORGE_CACHE_DIR"] = str(self.cache)
        compilers(directory)
        self.together = Together(directory) if "c" in targets else None

    def run_all(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
        """What came of each of several cases, of which most are compiled together, as that takes less time."""
        if self.together:
            self.together.compile({k: files for k, case in enumerate(cases) if (files := self.emitted(case))}, cases)
        return [self.run(case) for case in cases]

    def emitted(self, case: Case) -> dict[str, str] | None:
        """The C of a case that can stand in one file with that of others; None where anything is in the way."""
        assert self.together is not None
        if not case["chain"][-1].startswith(COMMON):
            return None
        try:
            with self.together.collecting(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rule, _, _ = self.rule(case)
                params = [np.zeros(1, x["dtype"]) for x in case["tensors"]]
                self.made(case, rule, "c", params)
        except Collected as collected:
            return collected.files
        except Exception:
            return None  # and shows again when the case is run
        return None

    def run(self, case: Case, targets: Sequence[str] | None = None) -> dict[str, Any]:
        """What came of a case, on some of the targets alone: {} or the kind and the message of a failure."""
        self.targets = targets or self.all
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.attempt(case)
        except Failure as failure:
            return {"kind": failure.kind, "message": failure.message}
        except Exception as problem:
            text = "".join(traceback.format_exception(problem))
            return {"kind": crash(problem), "message": text}
        finally:
            for left in self.cache.iterdir():
                if left.is_file() and not left.name.startswith("optforge-"):  # the runtime, which all rules share
                    left.unlink()
        return {}

    def attempt(self, case: Case) -> None:
        """Run a case; raises where something is wrong."""
        params = [
            values(x["values"], x["size"], x["dtype"], np.random.default_rng([case["data"], k, 0]))
            for k, x in enumerate(case["tensors"])
        ]
        rule, options, settings = self.rule(case)
        oracle = oracle_of(case, params, options, settings)
        holds = fulfilled(oracle)
        os.environ["CC"] = str(self.directory / case["compiler"].replace(" ", "_"))
        live = {}
        refused = {}
        for target in self.targets:
            try:
                live[target] = self.made(case, rule, target, [p.copy() for p in params])
            except of.RuleError as problem:
                raise Failure(refusal(str(problem)), str(problem)) from None
            except of.EnvironmentProblem as problem:
                raise Failure(compiling(target, str(problem)), str(problem)) from None
            except (ValueError, ArithmeticError) as problem:
                if isinstance(problem, of.UsageError):
                    raise Failure(f"refused: {str(problem)[:60]}", str(problem)) from None
                refused[target] = f"{type(problem).__name__}: {problem}"
        if refused or not holds:
            if holds or len(refused) < len(self.targets):
                raise Failure("assert", f"asserts hold: {holds}; refused by {refused}")
            return
        plain = Plain(rule, case, params, options, oracle) if function_applies(case, oracle) else None
        for number, step in enumerate(case["steps"], 1):
            for name, value in step.get("set", {}).items():
                for own in oracle.groups:
                    own[name] = value
                try:
                    for opt in live.values():
                        for group in opt.groups:
                            group[name] = value
                except (ValueError, ArithmeticError) as problem:
                    if fulfilled(oracle):
                        raise Failure("assert", f"{name} = {value!r}: {problem}") from None
                    return
                if not fulfilled(oracle):
                    raise Failure("assert", f"{name} = {value!r} is taken against an assert")
            grads = [
                None
                if flavour is None
                else values(flavour, x["size"], x["dtype"], np.random.default_rng([case["data"], k, number]))
                for k, (x, flavour) in enumerate(zip(case["tensors"], step["grads"], strict=True))
            ]
            if not self.step(case, step, live, oracle, grads, number, plain):
                break
        wrong = {target: text for target, opt in live.items() if (text := absent(opt, oracle))}
        if wrong:
            raise Failure(f"states: {' '.join(wrong)}", str(wrong))

    def step(
        self,
        case: Case,
        step: Mapping[str, Any],
        live: Mapping[str, Any],
        oracle: Optimizer,
        grads: Sequence[Array | None],
        number: int,
        plain: Plain | None,
    ) -> bool:
        """One step everywhere; whether there can be another."""
        scale = step.get("grad_scale")
        asked = {} if scale is None else {"grad_scale": scale}
        before = [(x.p, x.states, x.started) for x in oracle.tensors]
        try:
            expected = oracle.step(grads, scale)
            problem = ""
        except Undefined as undefined:
            expected, problem = None, f"undefined: {undefined}"
        wrong: dict[str, str] = {}
        errors: dict[str, str] = {}
        for target, opt in live.items():
            given = [None if g is None else g.copy() for g in grads]
            snapshot = kept(opt)
            try:
                told = opt.step(grouped(case, given), stats=step.get("stats", False), **asked)
            except ArithmeticError as raised:
                errors[target] = f"{type(raised).__name__}: {raised}"
                changed = unlike(snapshot, kept(opt))
                left = all(g is None or same(g, h) for g, h in zip(given, grads, strict=True))
                if changed or not left:
                    raise Failure(
                        f"changed by an error: {target}", f"step {number}: {changed or 'gradients'} of {target}"
                    ) from None
                continue
            if expected is not None:
                difference = compared(opt, told, given, grads, oracle, expected, case)
                if difference:
                    wrong[target] = difference
        if expected is None:
            if len(errors) < len(live):
                missing = sorted(live.keys() - errors)
                raise Failure(f"no error: {' '.join(missing)}", f"step {number}: {problem}; errors: {errors}")
            return False
        if errors:
            raise Failure(f"error: {' '.join(sorted(errors))}", f"step {number}: {errors}, where the oracle has none")
        if plain is not None and not wrong:
            difference = plain.step(before, grads, oracle, number)
            if difference:
                wrong["function"] = difference
        if wrong:
            raise Failure(f"bits: {' '.join(wrong)}", f"step {number}: {wrong}")
        return True

    def rule(self, case: Case) -> tuple[of.Rule, dict[str, Any], dict[str, Any]]:
        """The rule of a case, imported from a file; its options, and the settings of its hyperparameters."""
        # The name stands in the emitted files, which are to be the same whenever the text is.
        path = self.directory / f"case_{hashlib.sha256(case['text'].encode()).hexdigest()[:16]}.py"
        path.write_text(case["text"], encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        parts = [getattr(module, name) for name in case["chain"]]
        path.unlink()
        given = dict(case["settings"])
        for own in case["configured"].values():
            given |= own
        parts = [part(**case["configured"][part.name]) if part.name in case["configured"] else part for part in parts]
        try:
            made = functools.reduce(operator.rshift, parts)
            options = {name: given.get(name, value) for name, value in made.options.items()}
        except of.RuleError as problem:
            raise Failure(refusal(str(problem)), str(problem)) from None
        except of.UsageError as problem:
            raise Failure(f"refused: {str(problem)[:60]}", str(problem)) from None
        return made, options, {name: value for name, value in given.items() if name not in options}

    def made(self, case: Case, rule: of.Rule, target: str, params: list[Array]) -> Any:
        """An optimizer."""
        if case["groups"]:
            given: Any = [
                {"params": [p for p, x in zip(params, case["tensors"], strict=True) if x["group"] == k], **own}
                for k, own in enumerate(case["groups"])
            ]
        else:
            given = params
        how = {"skip_nonfinite": case["skip_nonfinite"], "zero_grads": case["zero_grads"], "threads": case["threads"]}
        return of.Optimizer(given, rule, target=target, **how, **case["settings"])


def oracle_of(
    case: Case, params: Sequence[Array], options: Mapping[str, Any], settings: Mapping[str, float]
) -> Optimizer:
    """The oracle of a case."""
    groups = [{**settings, **own} for own in case["groups"] or [{}]]
    group_of = [x["group"] for x in case["tensors"]]
    return Optimizer(
        case["text"], case["chain"], options, groups, params, group_of, skip_nonfinite=case["skip_nonfinite"]
    )


def fulfilled(oracle: Optimizer) -> bool:
    """Whether all asserts hold, and have a value."""
    try:
        return oracle.asserted()
    except Undefined:
        return False


def grouped(case: Case, arrays: Sequence[Any]) -> Any:
    """Arrays in the structure of the parameters."""
    if not case["groups"]:
        return list(arrays)
    return [
        [own for own, x in zip(arrays, case["tensors"], strict=True) if x["group"] == k]
        for k in range(len(case["groups"]))
    ]


def flat(case: Case, nested: Any) -> list[Any]:
    """The inverse of `grouped`."""
    return [own for group in nested for own in group] if case["groups"] else list(nested)


def kept(opt: Any) -> dict[str, Any]:
    """Copies of all that a step changes."""
    own = {"t": float(opt.t)}
    listed = len(opt.groups) > 1 or (opt.params and isinstance(opt.params[0], list))
    for name, nested in {"p": opt.params, **opt.state}.items():
        for k, x in enumerate(itertools.chain(*nested) if listed else nested):
            own[f"{name} {k}"] = np.array(as_host(x))
    return own


def as_host(x: Any) -> Any:
    """An array of the host, or a float as it is."""
    return x if isinstance(x, (float, np.ndarray)) else np.asarray(x)


def unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The names of what differs."""
    return [name for name in a if not same(a[name], b[name])]


def compared(
    opt: Any, told: Any, given: Sequence[Any], grads: Sequence[Any], oracle: Optimizer, expected: Any, case: Case
) -> str:
    """Where an optimizer differs from the oracle, "" nowhere."""
    if opt.t != oracle.t:
        return f"t is {opt.t}, not {oracle.t}"
    own_params = flat(case, opt.params)
    for k, tensor in enumerate(oracle.tensors):
        if not same(own_params[k], tensor.p):
            return f"p of tensor {k}: {first(own_params[k], tensor.p)}"
    state = opt.state
    for name in [name for name in state if name in oracle.program.states]:
        for k, (own, tensor) in enumerate(zip(flat(case, state[name]), oracle.tensors, strict=True)):
            if tensor.started and not same(as_host(own), tensor.states[name]):
                return f"state {name} of tensor {k}: {first(as_host(own), tensor.states[name])}"
    for k, (g, before) in enumerate(zip(given, grads, strict=True)):
        if g is not None and not same(g, np.zeros_like(before) if case["zero_grads"] else before):
            return f"gradient of tensor {k}"
    if told is not None:
        for name, value in expected.totals.items():
            if not same(float(told[name]), float(value)):
                return f"statistic {name} is {told[name]!r}, not {value!r}"
        for name, each in expected.each.items():
            own = told.per_tensor[name].astype(np.float64)
            if not same(own, each):
                return f"statistic {name} of each tensor is {own}, not {each}"
    return ""


def absent(opt: Any, oracle: Optimizer) -> str:
    """Which states are there against the language, or are not, "" none."""
    own, expected = sorted(opt.state), sorted(oracle.program.states)
    return "" if own == expected else f"there are states {own}, not {expected}"


def first(own: Any, expected: Any) -> str:
    """The first place where two arrays differ."""
    own, expected = np.asarray(own), np.asarray(expected)
    if own.shape != expected.shape or own.dtype != expected.dtype:
        return f"{own.dtype}{own.shape}, not {expected.dtype}{expected.shape}"
    places = [k for k in range(own.size) if not same(own.reshape(-1)[k], expected.reshape(-1)[k])]
    k = places[0]
    return f"[{k}] is {own.reshape(-1)[k]!r}, not {expected.reshape(-1)[k]!r} ({len(places)} of {own.size} differ)"


def function_applies(case: Case, oracle: Optimizer) -> bool:
    """Whether rule.function has the meaning of a step: without reductions over all tensors, scale and skipped steps."""
    everywhere = any(name.startswith("global") for name in oracle.program.reductions())
    return not everywhere and not case["skip_nonfinite"] and not any("grad_scale" in step for step in case["steps"])


class Plain:
    """rule.function beside the oracle, a tensor at a time."""

    def __init__(
        self, rule: of.Rule, case: Case, params: Sequence[Array], options: Mapping[str, Any], oracle: Optimizer
    ):
        self.rule, self.case, self.options = rule, case, options

    def step(self, before: Sequence[Any], grads: Sequence[Any], oracle: Optimizer, number: int) -> str:
        """Where the function differs from what the oracle has become, "" nowhere."""
        program = oracle.program
        for k, ((p, states, started), g) in enumerate(zip(before, grads, strict=True)):
            if g is None:
                continue
            tensor = oracle.tensors[k]
            hyper = oracle.groups[oracle.group_of[k]]
            given = dict(states) if started else {}
            if started:  # state that is absent is of no matter, but the function wants it
                given |= {
                    name: 0.0 if self.scalar(name) else np.zeros_like(p)
                    for name in self.rule.state
                    if name not in given
                }
            time = {"t": tensor.t} if self.rule.definition.time else {}
            try:
                returned = self.rule.function(p, g, **given, **hyper, **self.options, **time)
            except (ArithmeticError, ValueError, TypeError) as problem:
                # Plain Python evaluates what nothing needs, and raises where a reduction decides.
                if program.everything_lives and not any(node.depends for node in program.bindings):
                    return f"tensor {k}: {type(problem).__name__}: {problem}"
                continue
            values = returned if isinstance(returned, tuple) else (returned,)
            names = ["p", *self.rule.state]
            for name, value in zip(names, values, strict=True):
                wanted = tensor.p if name == "p" else tensor.states.get(name)
                if wanted is not None and not same(value, wanted):
                    return f"{name} of tensor {k}: {first(value, wanted)}"
        return ""

    def scalar(self, name: str) -> bool:
        """Whether a state is scalar."""
        return any(state.name == name and state.scalar for state in self.rule.definition.state)


# ── kinds of failure ────────────────────────────────────────────────────────────────────────────────────────────────


def general(text: str) -> str:
    """A message without what differs from case to case: names, numbers, paths."""
    text = re.sub(r"/\S+", "", text)
    text = re.sub(r"'[^']*'|‘[^’]*’|\"[^\"]*\"", "…", text)
    return re.sub(r"\d+", "#", text)[:110].strip()


def refusal(text: str) -> str:
    """The kind of a text that the language refuses."""
    found = re.search(r"error: (.*)", text)
    return f"refused: {general(found[1] if found else text)}"


def compiling(target: str, text: str) -> str:
    """The kind of emitted text that does not compile."""
    found = re.search(r"error: (.*)", text) or re.search(r"(undefined .*)", text)
    return f"compile {target}: {general(found[1] if found else text)}"


def crash(problem: BaseException) -> str:
    """The kind of an exception that should not be."""
    frames = traceback.extract_tb(problem.__traceback__)
    place = next((f"{Path(f.filename).name}:{f.name}" for f in reversed(frames) if "optforge" in f.filename), "")
    return f"crash: {type(problem).__name__} in {place or frames[-1].name}: {general(str(problem))}"[:160]


def bench_directory() -> Path:
    """A directory that only this process uses."""
    return Path(tempfile.mkdtemp(prefix="fuzz-"))
