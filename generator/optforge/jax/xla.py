"""Kernels as calls of XLA's foreign function interface, on the CPU: compiled, registered, bound to arrays of JAX."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.extend.core
import numpy as np
from jax.interpreters import batching, mlir

from ..core.diagnostics import EnvironmentProblem, UsageError
from ..core.formats import Storage
from ..core.ir import Kernel
from ..core.names import file_of
from ..emit import layout
from ..emit.c import render
from ..engines.c.compile import digest, library
from ..engines.c.engine import opened
from ..frontend.elaborate import elaborate
from ..frontend.lower import lower

if TYPE_CHECKING:
    from ..library.rule import Rule

HANDLER, HEADER, KERNELS = "xla-handler.c", "xla-c-api.h", "xla-kernels.h"
PLATFORM = "cpu"
GRAD_SCALE = -1  # its number among the traced hyperparameters

# ── the compiled side ───────────────────────────────────────────────────────────────────────────────────────────────


def lowered(rule: Rule, options: Mapping[str, bool | str], storages: Sequence[Storage]) -> Kernel:
    """The compiled form of a rule for arrays that are stored in several ways."""
    kernel = rule.kernel(**options)
    inexact = frozenset(name for own in storages for name in own.inexact)
    if not inexact:
        return kernel
    return lower(rule.name, kernel.hyperparameters, elaborate(rule.definition, options), inexact, storages[-1].moved)


@functools.cache
def target(rule: Rule, options: tuple[tuple[str, bool | str], ...], storages: tuple[Storage, ...]) -> str:
    """The name under which XLA knows the step of a rule; its attribute `kernel` counts the storages.

    Raises
    ------
    EnvironmentProblem
        It cannot be compiled or loaded, or this jaxlib lacks the header of the interface.
    """
    prefix = file_of(rule.name) if rule.name.isascii() else "rule"
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        text = header.read_text(encoding="utf-8")
    except OSError as problem:
        raise EnvironmentProblem(f"{header}: {problem.strerror}; this jaxlib lacks it: install another") from None
    kernels = ", ".join(f"&{prefix}_kernel_{storage.suffix}" for storage in storages)
    files = {
        **render(rule, lowered(rule, dict(options), storages), storages, prefix),
        HANDLER: layout.runtime_file(HANDLER),
        HEADER: text,
        KERNELS: f'#include "{prefix}.h"\n\nstatic const optforge_kernel *const kernels[] = {{{kernels}}};\n',
    }
    # The same text has the same name in every process, as the compiled programs that JAX may keep expect.
    name = f"optforge_{prefix}_{digest(text.encode() for item in sorted(files.items()) for text in item)[:32]}"
    with LOCK:
        if name not in REGISTERED:
            register(name, library(files))
            REGISTERED.add(name)
    return name


REGISTERED: set[str] = set()
LOCK = threading.Lock()


def register(name: str, path: Path) -> None:
    """Tell XLA of a compiled library."""
    import cffi

    ffi = cffi.FFI()
    ffi.cdef("int optforge_xla_step(void *);")
    try:
        handler = ffi.addressof(opened(ffi, path), "optforge_xla_step")
    except (OSError, AttributeError) as problem:
        raise EnvironmentProblem(f"the compiled kernel {path} cannot be loaded: {problem}") from None
    capsule = jax.ffi.pycapsule(int(ffi.cast("uintptr_t", handler)))
    jax.ffi.register_ffi_target(name, capsule, platform=PLATFORM)


# ── where a step can run ────────────────────────────────────────────────────────────────────────────────────────────

# An identity whose lowering refuses what the step is not for: at trace time no array tells.
placed_p = jax.extend.core.Primitive("optforge_placed")
placed_p.def_impl(lambda x: x)
placed_p.def_abstract_eval(lambda x: x)
batching.primitive_batchers[placed_p] = lambda args, dims: (placed_p.bind(*args), dims[0])


def place(context: Any, x: Any) -> Any:
    """Lower the identity, on one CPU alone.

    Raises
    ------
    UsageError
        The computation is for several devices, or for another kind.
    """
    platforms = context.platforms or context.module_context.platforms
    if [*platforms] != [PLATFORM]:
        raise UsageError(
            f"optforge.jax steps on the CPU, and this computation is compiled for {', '.join(platforms)}: "
            "give it arrays that are on jax.devices('cpu')[0]"
        )
    axes = context.module_context.axis_context
    devices: Any = getattr(axes, "num_devices", None) or getattr(getattr(axes, "mesh", None), "size", 1)
    if devices > 1:
        raise UsageError(
            f"optforge.jax steps on one device, and this computation is compiled for {devices}: an array in it is "
            "sharded or replicated over them"
        )
    return [x]


mlir.register_lowering(placed_p, place)

# ── a call ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Call:
    """A step over tensors, as it is traced.

    `kinds` has the number of each tensor's storage; `hyper` the values of all hyperparameters, of which those in
    `traced`, by their number, are operands instead; GRAD_SCALE among them is the loss scale.
    """

    name: str
    kinds: tuple[int, ...]
    hyper: tuple[float, ...]
    traced: tuple[int, ...] = ()
    grad_scale: float = 1.0
    skip_nonfinite: bool = False
    threads: int = 0
    seed: int = 0
    stats: bool = False

    def __call__(self, count: Any, numbers: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[Any]:
        """Bind it to the count, the traced numbers and the arrays of each tensor: p, g, the state.

        Returns
        -------
        list of arrays
            The count, the arrays of each tensor but g, and norms and counts where they are asked for.
        """
        operands = [placed_p.bind(count), *numbers]
        results, aliases = [like(count)], {0: 0}
        for row in rows:
            for k, own in enumerate(row):
                if k != 1:
                    aliases[len(operands)] = len(results)
                    results.append(like(own))
                operands.append(own)
        if self.stats:
            norm = np.float64 if jax.config.jax_enable_x64 else np.float32
            lines = len(rows) + 1
            results += [jax.ShapeDtypeStruct((lines, 5), norm), jax.ShapeDtypeStruct((lines, 3), np.int32)]
        call = jax.ffi.ffi_call(self.name, results, vmap_method="sequential", input_output_aliases=aliases)
        made: list[Any] = call(
            *operands,
            kernel=np.array(self.kinds, np.int32),
            hyper=np.array(self.hyper, np.float64),
            traced=np.array(self.traced, np.int32),
            grad_scale=np.float64(self.grad_scale),
            **{name: np.uint64(getattr(self, name)) for name in ("skip_nonfinite", "threads", "seed", "stats")},
        )
        return made


def like(array: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
