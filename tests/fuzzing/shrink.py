"""Makes a failing case smaller while it fails in the same way."""

from __future__ import annotations

import ast
import copy
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from .author import Case

Fails = Callable[[Case], bool]


def shrink(case: Case, fails: Fails, seconds: float = 300) -> Case:
    """The smallest case that was found within the time."""
    end = time.monotonic() + seconds
    tried: set[str] = set()

    def accepted(candidate: Case) -> bool:
        key = json.dumps(candidate, sort_keys=True)
        if key in tried or time.monotonic() > end:
            return False
        tried.add(key)
        return fails(candidate)

    progress = True
    while progress and time.monotonic() < end:
        progress = False
        for candidates in (circumstances, chains, statements, signatures, expressions):
            again = True
            while again:
                again = False
                for candidate in candidates(case):
                    if size(candidate) < size(case) and accepted(candidate):
                        case, again, progress = candidate, True, True
                        break
    return case


def size(case: Case) -> tuple[int, int]:
    """What is to become smaller: the text, and what else is unusual."""
    tree = ast.parse(case["text"])
    nodes = sum(1 for part in tree.body if isinstance(part, ast.FunctionDef) for _ in ast.walk(part))
    rest = {name: value for name, value in case.items() if name != "text"}
    cost = 0
    for tensor in rest["tensors"]:
        cost += 20 + min(tensor["size"], 40) + tensor["size"] // 1000 + (tensor["values"] != "usual") * 5
        cost += (tensor["dtype"] != "float32") * 3
    for step in rest["steps"]:
        cost += (
            20
            + 5 * (len(step) - 1)
            + sum(5 * (flavour not in ("usual", None)) + (flavour is None) * 6 for flavour in step["grads"])
        )
    cost += sum(len(own) * 4 + 5 for own in rest["groups"]) + 4 * len(rest["settings"])
    cost += sum(len(own) * 4 + 2 for own in rest["configured"].values())
    cost += 3 * rest["skip_nonfinite"] + 3 * rest["zero_grads"] + 3 * (rest["threads"] is not None)
    cost += 0 if rest["compiler"] == "gcc -O0" else len(rest["compiler"])
    constants = sum(len(ast.unparse(n)) for n in ast.walk(tree) if isinstance(n, ast.Constant))
    return nodes * 10 + cost, constants + len(case["text"])


def circumstances(case: Case) -> Iterator[Case]:
    """Fewer steps, tensors, groups, options; plainer values."""
    for name, plain in (("skip_nonfinite", False), ("zero_grads", False), ("threads", None), ("compiler", "gcc -O0")):
        if case[name] != plain:
            yield {**case, name: plain}
    for k in range(len(case["steps"])):
        if len(case["steps"]) > 1:
            yield {**case, "steps": case["steps"][:k] + case["steps"][k + 1 :]}
    for k, step in enumerate(case["steps"]):
        for name in step:
            if name != "grads":
                yield with_step(case, k, {n: v for n, v in step.items() if n != name})
        for place, flavour in enumerate(step["grads"]):
            if flavour != "usual":
                yield with_step(
                    case, k, {**step, "grads": [*step["grads"][:place], "usual", *step["grads"][place + 1 :]]}
                )
    if case["groups"]:
        yield {**case, "groups": [], "tensors": [{**x, "group": 0} for x in case["tensors"]]}
        yield {
            **case,
            "groups": [],
            "settings": {**case["settings"], **case["groups"][-1]},
            "tensors": [{**x, "group": 0} for x in case["tensors"]],
        }
        for k, own in enumerate(case["groups"]):
            for name in own:
                rest = {n: v for n, v in own.items() if n != name}
                yield {**case, "groups": [*case["groups"][:k], rest, *case["groups"][k + 1 :]]}
    for k in range(len(case["tensors"])):
        own = case["tensors"][k]["group"]
        alone = case["groups"] and sum(x["group"] == own for x in case["tensors"]) == 1
        if len(case["tensors"]) > 1 and not alone:
            steps = [{**step, "grads": step["grads"][:k] + step["grads"][k + 1 :]} for step in case["steps"]]
            yield {**case, "tensors": case["tensors"][:k] + case["tensors"][k + 1 :], "steps": steps}
        elif alone and len(case["tensors"]) > 1:
            steps = [{**step, "grads": step["grads"][:k] + step["grads"][k + 1 :]} for step in case["steps"]]
            tensors = [
                {**x, "group": x["group"] - (x["group"] > own)} for place, x in enumerate(case["tensors"]) if place != k
            ]
            yield {
                **case,
                "tensors": tensors,
                "steps": steps,
                "groups": [g for place, g in enumerate(case["groups"]) if place != own],
            }
    for k, tensor in enumerate(case["tensors"]):
        for name, values in (("size", (1, 2, 5, 33, 1025)), ("dtype", ("float32",)), ("values", ("usual",))):
            for value in values:
                if tensor[name] != value and not (name == "size" and value > tensor[name]):
                    yield {
                        **case,
                        "tensors": [*case["tensors"][:k], {**tensor, name: value}, *case["tensors"][k + 1 :]],
                    }
    for name in case["settings"]:
        yield {**case, "settings": {n: v for n, v in case["settings"].items() if n != name}}
    for part, own in case["configured"].items():
        yield {**case, "configured": {n: v for n, v in case["configured"].items() if n != part}}
        yield {
            **case,
            "configured": {n: v for n, v in case["configured"].items() if n != part},
            "settings": {**case["settings"], **own},
        }


def with_step(case: Case, k: int, step: dict[str, Any]) -> Case:
    """The case with another step."""
    return {**case, "steps": [*case["steps"][:k], step, *case["steps"][k + 1 :]]}


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    """The rules and transforms of a file."""
    return [node for node in tree.body if isinstance(node, ast.FunctionDef)]


def written(case: Case, tree: ast.Module, **other: Any) -> Case:
    """The case with another text."""
    return {**case, **other, "text": ast.unparse(ast.fix_missing_locations(tree)) + "\n"}


def without_names(case: Case, names: set[str]) -> dict[str, Any]:
    """The settings of a case without some names."""
    kept = {n: v for n, v in case["settings"].items() if n not in names}
    groups = [{n: v for n, v in own.items() if n not in names} for own in case["groups"]]
    configured = {p: {n: v for n, v in own.items() if n not in names} for p, own in case["configured"].items()}
    steps = []
    for step in case["steps"]:
        step = dict(step)
        if "set" in step and set(step["set"]) & names:
            del step["set"]
        steps.append(step)
    return {"settings": kept, "groups": groups, "configured": configured, "steps": steps}


def chains(case: Case) -> Iterator[Case]:
    """Without a transform; then without the functions that nothing uses."""
    for name in case["chain"][:-1]:
        tree = ast.parse(case["text"])
        gone = next(node for node in functions(tree) if node.name == name)
        tree.body.remove(gone)
        names = {arg.arg for arg in (*gone.args.kwonlyargs, *gone.args.args)}
        other = without_names(case, names)
        other["configured"].pop(name, None)
        yield written(case, tree, chain=[n for n in case["chain"] if n != name], **other)


def blocks(node: ast.FunctionDef) -> Iterator[list[ast.stmt]]:
    """All lists of statements in a function."""
    for inner in ast.walk(node):
        for name in ("body", "orelse"):
            block = getattr(inner, name, None)
            if isinstance(block, list):
                yield block


def statements(case: Case) -> Iterator[Case]:
    """Without many statements, then without one, the last ones first; an `if` gives way to one of its branches."""
    for k, node in enumerate(functions(ast.parse(case["text"]))):
        number = len(node.body) - 1
        length = number
        while length > 1:
            for start in range(0, number, length):
                tree = ast.parse(case["text"])
                del functions(tree)[k].body[start : min(start + length, number)]
                yield written(case, tree)
            length //= 2
    count = sum(len(block) for node in functions(ast.parse(case["text"])) for block in blocks(node))
    for k in reversed(range(count)):
        for choice in range(3):
            tree = ast.parse(case["text"])
            places = [
                (block, place) for node in functions(tree) for block in blocks(node) for place in range(len(block))
            ]
            block, place = places[k]
            own = block[place]
            if isinstance(own, ast.Return):
                break
            if isinstance(own, ast.If) and choice < 2:
                block[place : place + 1] = own.body if choice == 0 else own.orelse
            elif choice == 2 or not isinstance(own, ast.If):
                del block[place]
            if not all(blocks_filled(node) for node in functions(tree)):
                continue
            yield written(case, tree)
            if not isinstance(own, ast.If):
                break


def blocks_filled(node: ast.FunctionDef) -> bool:
    """Whether each branch has a statement."""
    return all(inner.body for inner in ast.walk(node) if isinstance(inner, (ast.If, ast.FunctionDef)))


class Replaced(ast.NodeTransformer):
    """Puts an expression in place of a name."""

    def __init__(self, name: str, value: ast.expr):
        self.name, self.value = name, value

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id == self.name and isinstance(node.ctx, ast.Load):
            return copy.deepcopy(self.value)
        return node


def signatures(case: Case) -> Iterator[Case]:
    """Without a state, a hyperparameter or an option; with shorter names and plainer defaults."""
    tree = ast.parse(case["text"])
    for k, node in enumerate(functions(tree)):
        taken = len(node.args.args) - len(node.args.defaults)
        for place in range(len(node.args.defaults)):
            name = node.args.args[taken + place].arg
            scalar = node.args.args[taken + place].annotation is not None
            for value in ("1.0",) if scalar else ("g", "p", "1.0"):
                changed = ast.parse(case["text"])
                own = functions(changed)[k]
                own.args.args.pop(taken + place)
                own.args.defaults.pop(place)
                drop_return(own, name)
                for block in blocks(own):
                    block[:] = [s for s in block if not binds(s, name)]
                for statement in own.body[:-1]:
                    Replaced(name, ast.parse(value, mode="eval").body).visit(statement)
                if blocks_filled(own):
                    yield written(case, changed)
            for value in ("0.0", "1.0"):
                changed = ast.parse(case["text"])
                functions(changed)[k].args.defaults[place] = ast.parse(value, mode="eval").body
                yield written(case, changed)
        for place, (arg, default) in enumerate(zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)):
            values = ["1.0"] if default is None or is_option(default) else [ast.unparse(default), "1.0", "0.5"]
            for value in values:
                changed = ast.parse(case["text"])
                own = functions(changed)[k]
                own.args.kwonlyargs.pop(place)
                own.args.kw_defaults.pop(place)
                for statement in own.body[:-1]:
                    Replaced(arg.arg, ast.parse(value, mode="eval").body).visit(statement)
                yield written(case, changed, **without_names(case, {arg.arg}))
            if default is not None and not is_option(default):
                for value in ("1.0", "0.5", "2.0"):
                    changed = ast.parse(case["text"])
                    functions(changed)[k].args.kw_defaults[place] = ast.parse(value, mode="eval").body
                    yield written(case, changed)
        # Of p and g only what is needed.
        if node.name in case["chain"][:-1]:
            for name in ("p", "g"):
                changed = ast.parse(case["text"])
                own = functions(changed)[k]
                drop_return(own, name)
                if own.body[-1].value is not None and ast.unparse(own.body[-1].value) != "()":  # type: ignore[attr-defined]
                    yield written(case, changed)
                if taken == 2:
                    own.args.args = [arg for arg in own.args.args if arg.arg != name]
                    yield written(case, changed)
    yield from renamed(case)


def is_option(node: ast.expr) -> bool:
    """Whether a default makes a static option."""
    return isinstance(node, ast.Constant) and isinstance(node.value, (bool, str))


def binds(statement: ast.stmt, name: str) -> bool:
    """Whether a statement binds a name."""
    return (
        isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and statement.targets[0].id == name
    )


def drop_return(node: ast.FunctionDef, name: str) -> None:
    """A function that does not return the name."""
    last = node.body[-1]
    assert isinstance(last, ast.Return)
    if isinstance(last.value, ast.Tuple):
        kept = [value for value in last.value.elts if ast.unparse(value) != name]
        last.value = kept[0] if len(kept) == 1 else ast.Tuple(kept, ast.Load())


def renamed(case: Case) -> Iterator[Case]:
    """Plain names in place of odd ones, in all of the text at once."""
    tree = ast.parse(case["text"])
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
        n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)
    }
    bound = {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    bound |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    fresh = [name for name in "abcdefhijklmnqrsuvwxyz" if name not in used and name not in case["chain"]]
    for name in sorted(bound - {"p", "g", "t"}):
        if (len(name) == 1 and name.isascii()) or not fresh:
            continue
        changed = ast.parse(case["text"])
        for node in ast.walk(changed):
            if isinstance(node, ast.Name) and node.id == name:
                node.id = fresh[0]
            elif isinstance(node, ast.arg) and node.arg == name:
                node.arg = fresh[0]
            elif isinstance(node, ast.Constant) and node.value == name:
                node.value = fresh[0]
        swap = {name: fresh[0]}
        other = {
            "settings": {swap.get(n, n): v for n, v in case["settings"].items()},
            "groups": [{swap.get(n, n): v for n, v in own.items()} for own in case["groups"]],
            "configured": {p: {swap.get(n, n): v for n, v in own.items()} for p, own in case["configured"].items()},
            "steps": [
                {**s, "set": {swap.get(n, n): v for n, v in s["set"].items()}} if "set" in s else s
                for s in case["steps"]
            ],
        }
        yield written(case, changed, **other)
    for k, name in enumerate(case["chain"]):
        if name not in ("r", "f", "u") and len(name) > 1:
            changed = ast.parse(case["text"])
            new = next((n for n in ("r", "f", "u", "o") if n not in used and n not in case["chain"]), name)
            next(node for node in functions(changed) if node.name == name).name = new
            configured = {new if n == name else n: v for n, v in case["configured"].items()}
            yield written(
                case, changed, chain=[*case["chain"][:k], new, *case["chain"][k + 1 :]], configured=configured
            )


def places_of(tree: ast.Module) -> list[tuple[ast.AST, str, int | None]]:
    """Where expressions stand: the parent, its field, and the place in a list."""
    found: list[tuple[ast.AST, str, int | None]] = []
    for node in functions(tree):
        for statement in node.body[:-1]:
            for inner in ast.walk(statement):
                for name, value in ast.iter_fields(inner):
                    if isinstance(value, ast.expr) and name not in ("targets", "func"):
                        found.append((inner, name, None))
                    elif isinstance(value, list) and name in ("args", "values", "comparators"):
                        found += [(inner, name, k) for k, own in enumerate(value) if isinstance(own, ast.expr)]
    return found


def expressions(case: Case) -> Iterator[Case]:
    """A smaller expression in place of one: a part of it, or a name, or a number."""
    count = len(places_of(ast.parse(case["text"])))
    for k in range(count):
        tree = ast.parse(case["text"])
        parent, name, place = places_of(tree)[k]
        value = getattr(parent, name)
        value = value if place is None else value[place]
        if isinstance(value, ast.Name) or (isinstance(value, ast.Constant) and value.value in (1, 2)):
            continue
        inside = [
            n for n in ast.walk(value) if isinstance(n, ast.expr) and n is not value and not is_function(n, value)
        ]
        inside.sort(key=lambda n: -sum(1 for _ in ast.walk(n)))
        simple = [ast.parse(text, mode="eval").body for text in ("g", "p", "1.0", "2.0")]
        if isinstance(value, ast.Constant):
            simple = simple[2:]
        for other in [*simple, *inside[:12]]:
            tree = ast.parse(case["text"])
            parent, name, place = places_of(tree)[k]
            if place is None:
                setattr(parent, name, other)
            else:
                getattr(parent, name)[place] = other
            yield written(case, tree)


def is_function(node: ast.expr, tree: ast.AST) -> bool:
    """Whether a node is what a call calls."""
    return any(isinstance(inner, ast.Call) and inner.func is node for inner in ast.walk(tree))
