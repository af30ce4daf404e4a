"""Names in emitted C: the author's as they are, with an underscore behind those that the language claims."""

from __future__ import annotations

import itertools
import re
from collections.abc import Hashable, Iterable
from pathlib import Path

from .diagnostics import UsageError
from .functions import FUNCTIONS

KEYWORDS = frozenset(
    # C up to C23
    """auto break case char const constexpr continue default do double else enum extern false float for goto if inline
    int long nullptr register restrict return short signed sizeof static static_assert struct switch thread_local true
    typedef typeof typeof_unqual union unsigned void volatile while alignas alignof bool asm fortran complex imaginary
    noreturn
    """
    # C++ up to C++26
    """and and_eq atomic_cancel atomic_commit atomic_noexcept bitand bitor catch char8_t char16_t char32_t class
    co_await co_return co_yield compl concept const_cast consteval constinit contract_assert decltype delete
    dynamic_cast explicit export friend mutable namespace new noexcept not not_eq operator or or_eq private protected
    public reflexpr reinterpret_cast requires static_cast synchronized template this throw try typeid typename using
    virtual wchar_t xor xor_eq
    """
    # CUDA and HIP
    """threadIdx blockIdx blockDim gridDim warpSize __global__ __device__ __host__ __shared__ __constant__ __managed__
    __restrict__ __forceinline__ __noinline__ __launch_bounds__ __syncthreads __syncwarp half half2 float2 float3 float4
    double2 double3 double4 int2 int3 int4 uint2 uint3 uint4 dim3 cudaStream_t
    """
    # types of the headers in use
    """size_t ptrdiff_t max_align_t int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t intptr_t uintptr_t
    intmax_t uintmax_t float_t double_t
    """
    # object-like macros: of other machines and headers here; of compilers, C, C++, POSIX and CUDA in macros.txt
    """i386 sun mips sparc vax hpux m68k near far small hyper interface IN OUT ERROR DELETE DOMAIN SING OVERFLOW
    UNDERFLOW PLOSS TLOSS HUGE NDEBUG I assert offsetof va_arg isnan isinf isfinite isnormal signbit fpclassify signgam
    errno
    """.split()
) | frozenset((Path(__file__).parent / "macros.txt").read_text("utf-8").split())
# Macros that come in families. (Each is free again with an underscore behind it.)
MACROS = re.compile(
    r"(FLT|DBL|LDBL|M|FP|INT|UINT|INT\d+|UINT\d+|INTPTR|UINTPTR|INTMAX|UINTMAX|PTRDIFF|SIZE|SSIZE|CHAR|SCHAR|UCHAR|"
    r"SHRT|USHRT|LONG|ULONG|LLONG|ULLONG|WCHAR|WINT|SIG_ATOMIC|PATH|LINE|NAME)_[A-Z0-9_]*[A-Z0-9]|"
    r"M_[A-Z0-9]|M_[A-Z0-9]\w*[^\W_]|"
    r"(PRI|SCN)[diouxX]([0-9]+|MAX|PTR|(LEAST|FAST)[0-9]+)|cu(da)?[A-Z]\w*[^\W_]"
)
# What the emitted functions call; a local variable of such a name would hide it.
CALLED = frozenset(
    f"{name}{suffix}"
    for name in ["pow", "fmod", "copysign", "main", *(row.c for row in FUNCTIONS.values() if row.library)]
    for suffix in ("", "f")
) | frozenset({"omp_get_max_threads", "omp_get_num_threads", "omp_get_thread_num"})

# Headers of C, POSIX and CUDA, and what they include, and the runtime's: no rule's file may have such a name.
HEADERS = frozenset(
    """alloca assert builtin_types byteswap channel_descriptor complex ctype cuda cuda_bf16 cuda_device_runtime_api
    cuda_fp16 cuda_runtime cuda_runtime_api device_atomic_functions device_launch_parameters device_types
    driver_functions driver_types endian errno features fenv float inttypes iso646 library_types limits locale
    malloc math memory omp optforge pthread sched setjmp signal sm_20_atomic_functions sm_20_intrinsics sm_30_intrinsics
    sm_32_atomic_functions sm_32_intrinsics sm_35_atomic_functions sm_35_intrinsics sm_60_atomic_functions
    sm_61_intrinsics stdalign stdarg stdatomic stdbit stdbool stdckdint stddef stdint stdio stdlib stdnoreturn
    string strings surface_indirect_functions surface_types texture_indirect_functions texture_types tgmath threads
    time uchar unistd values varargs vector_functions vector_types wchar wctype xlocale
    """.split()
)

# What C and C++ keep for themselves, and what compilers predefine: __LINE__. (An underscore behind it frees it.)
RESERVED = re.compile(r"(_[A-Z]|__|optforge_|OPTFORGE_)\w*[^\W_]|_[A-Z]|__\w*[^\W_]__")


def claimed(name: str) -> bool:
    """Whether C, C++, CUDA or their macros claim a name wherever it stands."""
    return name in KEYWORDS or any(pattern.fullmatch(name) for pattern in (MACROS, RESERVED))


def file_of(rule: str) -> str:
    """What the emitted files and names of a rule begin with: its name, freed of the names of system headers."""
    name = spelled(rule)
    return f"{name}_" if name in HEADERS else name


def check_prefix(prefix: str | None, what: str = "prefix") -> None:
    """Raise UsageError where emitted names cannot begin with this; None is the name of what is emitted."""
    if prefix is not None and (not re.fullmatch(r"[A-Za-z_]\w*", prefix, re.ASCII) or claimed(prefix)):
        raise UsageError(f"the {what} {prefix!r} is no C identifier")
    if prefix in HEADERS:
        raise UsageError(f"the {what} {prefix!r} would write {prefix}.h, which hides another header: take another")


# Letters that C99 allows in identifiers (its annex D: Latin, Greek, Cyrillic) and that compilers accept as they are.
LETTERS = re.compile(
    "[A-Za-z0-9_\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01f5\u0386\u0388-\u038a\u038c"
    "\u038e-\u03a1\u03a3-\u03ce\u0401-\u040c\u040e-\u044f]"
)


def spelled(name: str) -> str:
    """A Python identifier in letters that C compilers accept: any other is written by its number, as _u1d6fd."""
    return "".join(c if LETTERS.match(c) else f"_u{ord(c):04x}" for c in name)


class Names:
    """The names of one scope: each key has one, and no two keys have the same.

    Authors' names are entered first, and keep their spelling unless it is claimed; the templates' names, asked for
    afterwards by `own`, give way.
    """

    def __init__(self, claims: Iterable[str] = (), prefix: str = ""):
        self.claims, self.prefix = frozenset(claims), prefix
        self.used: dict[str, Hashable] = {}
        self.of: dict[Hashable, str] = {}
        self.numbered: dict[str, int] = {}  # numbers below are taken

    def _free(self, name: str) -> bool:
        # No emitted name ends with an underscore, so that a claimed one is free with an underscore behind it.
        ours = bool(self.prefix) and name.startswith(f"{self.prefix}_") and not name.endswith("_")
        return name not in self.used and not claimed(name) and name not in self.claims and not ours

    def enter(self, wanted: Iterable[tuple[Hashable, str]]) -> None:
        """Give names to keys: first those that can have exactly what they want, then the others."""
        late = []
        for key, wish in wanted:
            if key in self.of:
                continue
            name = spelled(wish)
            if self._free(name):
                self._take(key, name)
            else:
                late.append((key, name))
        for key, name in late:
            if key not in self.of:
                self._take(key, self._version(name) if name in self.used else self._underscored(name))

    def own(self, name: str) -> str:
        """A name for the template's use, with underscores behind it until it is free."""
        key = ("own", name)
        if key not in self.of:
            self._take(key, self._underscored(name))
        return self.of[key]

    def _take(self, key: Hashable, name: str) -> None:
        self.used[name] = key
        self.of[key] = name

    def _underscored(self, name: str) -> str:
        while not self._free(name):
            name += "_"
        return name

    def _version(self, name: str) -> str:
        """The name numbered, for a name that is bound again as another variable."""
        for k in itertools.count(self.numbered.get(name, 2)):
            self.numbered[name] = k
            for candidate in (f"{name}_{k}", f"{name}_{k}_"):
                if self._free(candidate):
                    return candidate
        raise AssertionError
