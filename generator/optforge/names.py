"""Names in emitted C: the author's as they are, with an underscore behind those that the language claims."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable

KEYWORDS = frozenset(
    # C up to C23
    """auto break case char const constexpr continue default do double else enum extern false float for goto if inline
    int long nullptr register restrict return short signed sizeof static static_assert struct switch thread_local true
    typedef typeof typeof_unqual union unsigned void volatile while alignas alignof bool asm fortran complex imaginary
    noreturn
    """
    # C++ up to C++26
    """and and_eq atomic_cancel atomic_commit atomic_noexcept bitand bitor catch char8_t char16_t char32_t class co_await
    co_return co_yield compl concept const_cast consteval constinit contract_assert decltype delete dynamic_cast explicit
    export friend mutable namespace new noexcept not not_eq operator or or_eq private protected public reflexpr
    reinterpret_cast requires static_cast synchronized template this throw try typeid typename using virtual wchar_t xor
    xor_eq
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
    # object-like macros of compilers and of the standard headers
    """linux unix i386 sun mips sparc vax hpux m68k NULL INFINITY NAN HUGE_VAL HUGE_VALF HUGE_VALL errno EDOM ERANGE
    EILSEQ EOF BUFSIZ stdin stdout stderr math_errhandling MATH_ERRNO MATH_ERREXCEPT DECIMAL_DIG I assert offsetof NDEBUG
    va_arg isnan isinf isfinite isnormal signbit fpclassify
    """.split()
)
MACROS = re.compile(
    r"(FLT|DBL|LDBL|M|FP|INT|UINT|INT\d+|UINT\d+|INTPTR|UINTPTR|INTMAX|UINTMAX|PTRDIFF|SIZE|SSIZE|CHAR|SCHAR|UCHAR|"
    r"SHRT|USHRT|LONG|ULONG|LLONG|ULLONG|WCHAR|WINT|SIG_ATOMIC|PATH|LINE|NAME)_[A-Z0-9_]+"
)
# What the emitted functions call; a local variable of such a name would hide it.
CALLED = frozenset(
    f"{name}{suffix}" for name in ["sqrt", "fabs", "exp", "log", "tanh", "pow", "fmod", "copysign", "main"] for suffix in ("", "f")
) | frozenset({"omp_get_max_threads", "omp_get_num_threads", "omp_get_thread_num"})


def claimed(name: str) -> bool:
    """Whether C, C++, CUDA or their macros claim a name wherever it stands."""
    return name in KEYWORDS or MACROS.fullmatch(name) is not None


class Names:
    """The names of one scope: each key has one, and no two keys have the same.

    Authors' names are entered first, and keep their spelling unless it is claimed; the templates' names, asked for
    afterwards by `own`, give way.
    """

    def __init__(self, claims: Iterable[str] = (), prefix: str = ""):
        self.claims, self.prefix = frozenset(claims), prefix
        self.used: dict[str, Hashable] = {}
        self.of: dict[Hashable, str] = {}

    def _free(self, name: str) -> bool:
        ours = bool(self.prefix) and name.startswith(f"{self.prefix}_")
        return name not in self.used and not claimed(name) and name not in self.claims and not ours

    def enter(self, wanted: Iterable[tuple[Hashable, str]]) -> None:
        """Give names to keys: first those that can have exactly what they want, then the others."""
        late = []
        for key, name in wanted:
            if key in self.of:
                continue
            if self._free(name):
                self._take(key, name)
            else:
                late.append((key, name))
        for key, name in late:
            if key not in self.of:
                self._take(key, self._version(name) if name in self.used else self._underscored(name))

    def own(self, name: str) -> str:
        """A name for the template's use, with underscores behind it until it is free."""
        if name not in self.of:
            self._take(name, self._underscored(name))
        return self.of[name]

    def _take(self, key: Hashable, name: str) -> None:
        self.used[name] = key
        self.of[key] = name

    def _underscored(self, name: str) -> str:
        while not self._free(name):
            name += "_"
        return name

    def _version(self, name: str) -> str:
        """The name numbered, for a name that is bound again as another variable."""
        k = 2
        while not self._free(f"{name}_{k}"):
            k += 1
        return f"{name}_{k}"
