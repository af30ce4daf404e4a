"""Kernels as calls of XLA's foreign function interface: a primitive of JAX, compiled where it is lowered."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching, mlir

from ..core.diagnostics import EnvironmentProblem, UsageError
from ..core.formats import Storage
from ..core.ir import Kernel
from ..core.names import file_of
from ..emit import c, cuda, layout
from ..engines.c.compile import digest, library
from ..engines.c.engine import opened
from ..engines.cuda import nvcc
from ..frontend.elaborate import elaborate
from ..frontend.lower import lower

if TYPE_CHECKING:
    from ..library.rule import Rule

CALL, HEADER, KERNELS = "xla-call.h", "xla-c-api.h", "xla-kernels.h"
GRAD_SCALE = -1  # its number among the traced hyperparameters
OLDEST = (7, 5)  # compute capability that is compiled for where no device tells its own

# ── a call ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Call:
    """A step over tensors, as it is traced.

    `kinds` has the number of each tensor's storage, and `arrays` how many arrays it has; `hyper` the values of all
    hyperparameters, of which those in `traced`, by their number, are operands instead; GRAD_SCALE among them is the
    loss scale. Statistics are in float64 where they are `wide`.
    """

    rule: Rule
    options: tuple[tuple[str, bool | str], ...] = ()
    storages: tuple[Storage, ...] = ()
    kinds: tuple[int, ...] = ()
    arrays: tuple[int, ...] = ()
    hyper: tuple[float, ...] = ()
    traced: tuple[int, ...] = ()
    grad_scale: float = 1.0
    skip_nonfinite: bool = False
    threads: int = 0
    seed: int = 0
    stats: bool = False
    wide: bool = False

    def __call__(self, count: Any, numbers: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[Any]:
        """Bind it to the count, the traced numbers and the arrays of each tensor: p, g, the state.

        Returns
        -------
        list of arrays
            The count, the arrays of each tensor but g, and norms and counts where they are asked for.
        """
        made: list[Any] = step_p.bind(count, *numbers, *(array for row in rows for array in row), call=self)
        return made

    def kept(self) -> Iterator[int]:
        """The operands that are results as well, in the same memory."""
        yield 0
        place = 1 + len(self.traced)
        for arrays in self.arrays:
            yield place
            yield from range(place + 2, place + arrays)
            place += arrays

    def results(self, *operands: Any) -> list[Any]:
        """The shapes and dtypes of the results."""
        made = [operands[k].update(weak_type=False) for k in self.kept()]
        if self.stats:
            rows, norm = len(self.kinds) + 1, np.dtype(np.float64 if self.wide else np.float32)
            made += [jax.core.ShapedArray((rows, 5), norm), jax.core.ShapedArray((rows, 3), np.dtype(np.int32))]
        return made

    def attributes(self) -> dict[str, Any]:
        """What a handler is told beside the arrays."""
        return {
            "kernel": np.array(self.kinds, np.int32),
            "hyper": np.array(self.hyper, np.float64),
            "traced": np.array(self.traced, np.int32),
            "grad_scale": np.float64(self.grad_scale),
            **{name: np.uint64(getattr(self, name)) for name in ("skip_nonfinite", "threads", "seed", "stats")},
        }


# ── the compiled side ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Platform:
    """Where a step can run: what XLA calls it, the file of its handler, and how that becomes a library."""

    name: str
    handler: str
    declared: str  # of what is in the library, for cffi
    render: Callable[..., dict[str, str]]
    infix: str  # in the names of kernels
    library: Callable[[Mapping[str, str]], Path]


def for_devices(files: Mapping[str, str]) -> Path:
    """The library of the CUDA handler, for the oldest of the devices that JAX has here."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:  # none: it is lowered for those of another machine
        devices = []
    found = [own.compute_capability.split(".") for own in devices]
    capability = min(((int(major), int(minor)) for major, minor in found), default=OLDEST)
    return nvcc.library(files, PLATFORMS["cuda"].handler, capability)


STEP = "int optforge_xla_step(void *);"
PLATFORMS = {
    "cpu": Platform("cpu", "xla-handler.c", STEP, c.render, "", library),
    "cuda": Platform(
        "CUDA",
        "xla-handler.cu",
        f"{STEP} size_t optforge_xla_scratch_size(uint64_t, size_t);",
        cuda.render,
        "_cuda",
        for_devices,
    ),
}


@dataclass(frozen=True)
class Target:
    """A handler that XLA knows by a name, and its library."""

    name: str
    library: Any


def lowered(rule: Rule, options: Mapping[str, bool | str], storages: Sequence[Storage]) -> Kernel:
    """The compiled form of a rule for arrays that are stored in several ways."""
    kernel = rule.kernel(**options)
    inexact = frozenset(name for own in storages for name in own.inexact)
    if not inexact:
        return kernel
    return lower(rule.name, kernel.hyperparameters, elaborate(rule.definition, options), inexact, storages[-1].moved)


def prefix_of(rule: Rule) -> str:
    """What the names of a rule's kernels begin with."""
    return file_of(rule.name) if rule.name.isascii() else "rule"


def sources(
    platform: Platform, rule: Rule, options: tuple[tuple[str, bool | str], ...], storages: Sequence[Storage]
) -> dict[str, str]:
    """The handler of a rule on a platform with all that it includes: file names to text.

    Raises
    ------
    EnvironmentProblem
        This jaxlib lacks the header of the interface.
    """
    prefix = prefix_of(rule)
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        text = header.read_text(encoding="utf-8")
    except OSError as problem:
        raise EnvironmentProblem(f"{header}: {problem.strerror}; this jaxlib lacks it: install another") from None
    return {
        **platform.render(rule, lowered(rule, dict(options), storages), storages, prefix),
        platform.handler: layout.runtime_file(platform.handler),
        CALL: layout.runtime_file(CALL),
        HEADER: text,
        KERNELS: listed(rule, prefix, platform.infix, storages),
    }


@functools.cache
def target(
    platform: Platform, rule: Rule, options: tuple[tuple[str, bool | str], ...], storages: tuple[Storage, ...]
) -> Target:
    """The step of a rule on a platform; the attribute `kernel` of a call counts the storages.

    Raises
    ------
    EnvironmentProblem
        It cannot be compiled or loaded.
    """
    files = sources(platform, rule, options, storages)
    # The same text has the same name in every process, as the compiled programs that JAX may keep expect.
    key = digest(part.encode() for item in sorted(files.items()) for part in item)[:32]
    name = f"optforge{platform.infix}_{prefix_of(rule)}_{key}"
    with LOCK:
        if name not in REGISTERED:
            REGISTERED[name] = Target(name, registered(name, platform, platform.library(files)))
    return REGISTERED[name]


REGISTERED: dict[str, Target] = {}
LOCK = threading.Lock()


def listed(rule: Rule, prefix: str, infix: str, storages: Sequence[Storage]) -> str:
    """The header that names a rule and lists its kernels for a handler; that of CUDA is one source with them."""
    names = ", ".join(f"&{prefix}{infix}_kernel_{storage.suffix}" for storage in storages)
    return (
        f'#include "{prefix}.{"cu" if infix else "h"}"\n\nstatic const char rule_name[] = "{rule.name}";\n'
        f"static const optforge{infix}_kernel *const kernels[] = {{{names}}};\n"
    )


def registered(name: str, platform: Platform, path: Path) -> Any:
    """Tell XLA of a compiled library; what cffi knows of it."""
    import cffi

    ffi = cffi.FFI()
    ffi.cdef(platform.declared)
    try:
        loaded = opened(ffi, path)
        handler = ffi.addressof(loaded, "optforge_xla_step")
    except (OSError, AttributeError) as problem:
        raise EnvironmentProblem(f"the compiled kernel {path} cannot be loaded: {problem}") from None
    capsule = jax.ffi.pycapsule(int(ffi.cast("uintptr_t", handler)))
    jax.ffi.register_ffi_target(name, capsule, platform=platform.name)
    return loaded


# ── the primitive ───────────────────────────────────────────────────────────────────────────────────────────────────

step_p = jax.extend.core.Primitive("optforge_step")
step_p.multiple_results = True
step_p.def_abstract_eval(lambda *operands, call: call.results(*operands))


@functools.lru_cache(maxsize=128)
def compiled(call: Call) -> Any:
    """A step that is called outside of any `jit`."""
    return jax.jit(functools.partial(step_p.bind, call=call))


step_p.def_impl(lambda *operands, call: compiled(call)(*operands))


def refuse_derivative(primals: Any, tangents: Any, call: Call) -> Any:
    """Raise ValueError: there is none."""
    raise ValueError(f"a step of optforge.jax (rule {call.rule.name!r}) cannot be differentiated")


def one_after_another(operands: Sequence[Any], dims: Sequence[Any], call: Call) -> tuple[list[Any], list[int]]:
    """Steps of all that is batched, in turn."""
    batched = [k for k, dim in enumerate(dims) if dim is not None]

    def one(own: Sequence[Any]) -> list[Any]:
        every = list(operands)
        for k, operand in zip(batched, own, strict=True):
            every[k] = operand
        made: list[Any] = step_p.bind(*every, call=call)
        return made

    made = jax.lax.map(one, [jnp.moveaxis(operands[k], dims[k], 0) for k in batched])
    return made, [0] * len(made)


def lower_step(context: Any, *operands: Any, call: Call) -> Sequence[Any]:
    """A step as a custom call, on one device alone.

    Raises
    ------
    UsageError
        The computation is for several devices, or for a kind on which there are no steps.
    EnvironmentProblem
        The kernel cannot be compiled.
    """
    platforms = [*(context.platforms or context.module_context.platforms)]
    if len(platforms) != 1 or platforms[0] not in PLATFORMS:
        raise UsageError(
            f"optforge.jax steps on CPUs and on NVIDIA's GPUs, and this computation is compiled for "
            f"{', '.join(platforms)}: give it arrays that are on jax.devices('cpu')[0]"
        )
    axes = context.module_context.axis_context
    devices: Any = getattr(axes, "num_devices", None) or getattr(getattr(axes, "mesh", None), "size", 1)
    if devices > 1:
        raise UsageError(
            f"optforge.jax steps on one device, and this computation is compiled for {devices}: an array in it is "
            "sharded or replicated over them"
        )
    platform = PLATFORMS[platforms[0]]
    own = target(platform, call.rule, call.options, call.storages)
    results = list(context.avals_out)
    if platform.infix:  # workspace, which XLA knows of, so that a step allocates nothing
        sizes = [operand.size for operand in context.avals_in]
        places = [1 + len(call.traced) + sum(call.arrays[:k]) for k in range(len(call.arrays))]
        size = own.library.optforge_xla_scratch_size(sum(sizes[place] for place in places), len(places))
        results.append(jax.core.ShapedArray((size,), np.dtype(np.uint8)))
    aliases = {operand: result for result, operand in enumerate(call.kept())}
    rule = jax.ffi.ffi_lowering(own.name, operand_output_aliases=aliases)
    made = rule(context.replace(avals_out=results), *operands, **call.attributes())
    return list(made)[: len(context.avals_out)]


ad.primitive_jvps[step_p] = refuse_derivative
batching.primitive_batchers[step_p] = one_after_another
mlir.register_lowering(step_p, lower_step)
