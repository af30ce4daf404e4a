"""The CUDA target through PyCUDA and an emulated driver, each test in a process of its own: errors, arrays, calls, end."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import require
from forking import Forking
from places import TESTS

START = """
import warnings
import numpy as np
import optforge as of
from data import same
from optforge.core.diagnostics import EnvironmentProblem
from optimizing import FakeTensor, bits
rng = np.random.default_rng(3)
shapes = [((5, 7), "f4"), ((33,), "f8"), ((0, 3), "f4"), ((4099,), "f4")]
def arrays(kind=np.asarray):
    return [kind(rng.standard_normal(shape).astype(dtype)) for shape, dtype in shapes]
def failing(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except (EnvironmentProblem, ValueError, TypeError) as problem:
        print(type(problem).__name__, "|", problem)
    else:
        print("nothing was raised")
def make(rule="adam", target="cuda", params=None, **named):
    return of.Optimizer(arrays() if params is None else params, rule, target=target, **named)
"""
IMPORTS = """
import atexit
from pycuda import gpuarray
import pycuda.driver as drv
from optforge.engines.cuda.device import device
from optforge.engines.cuda.engine import CudaTarget
"""
DEVICE = """
gpu = device(0)
gpu.context.push()  # for the arrays that are made here; the optimizer leaves it as it finds it
atexit.register(gpu.context.pop)
def up(array):
    return gpuarray.to_gpu(array)
def beside(params, opt, rule, steps=3, **named):
    "Steps of an optimizer beside those of the reference."
    other = of.Optimizer([np.asarray(p.get() if hasattr(p, "get") else p).copy() for p in params], rule, target="numpy", **named)
    for _ in range(steps):
        grads = arrays()
        opt.step([up(g) for g in grads])
        other.step(grads)
        assert all(same(p.get(), q) for p, q in zip(params, other.params))
    return other
"""


class Process:
    """What a piece of code says in a process of its own, with the emulated driver before any other.

    It goes on behind the imports of another process, unless it has a beginning of its own.
    """

    def __init__(self, forking: Forking):
        self.forking, self.variables = forking, forking.variables

    def __call__(self, code: str, begin: str = "", code_of_exit: int = 0, **variables: str) -> str:
        if begin:
            own, command = {**self.variables, **variables}, [sys.executable, "-W", "error", "-c", begin + START + code]
            answer = subprocess.run(command, env=own, capture_output=True, text=True, check=False, timeout=120)
        else:
            answer = self.forking(textwrap.dedent(code), variables)
        assert answer.returncode == code_of_exit, answer.stderr
        if code_of_exit == 0:
            assert not answer.stderr
        else:
            self.said = answer.stderr
        return answer.stdout

    def on_device(self, code: str, **variables: str) -> str:
        return self(DEVICE + textwrap.dedent(code), **variables)


@pytest.fixture(scope="module")
def process(emulated_cuda: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    require("pycuda")
    path = [*filter(None, [os.environ.get("PYTHONPATH")]), str(TESTS), str(TESTS / "support")]
    variables = {**emulated_cuda, "PYTHONPATH": os.pathsep.join(path)}
    forking = Forking(START + IMPORTS, variables, tmp_path_factory.mktemp("said"), "-W", "error")
    yield Process(forking)
    forking.end()


# ── what is missing ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_pycuda(process: Process) -> None:
    said = process(
        "failing(make)", begin="import sys; sys.modules['pycuda'] = None; sys.modules['pycuda.driver'] = None\n"
    )
    assert said.startswith('EnvironmentProblem | target "cuda" needs PyCUDA, which cannot be imported')
    assert "pip install 'optforge[cuda]'" in said


def test_without_a_driver(process: Process) -> None:
    begin = """
import builtins
original = builtins.__import__
def imported(name, *arguments):
    if name.startswith("pycuda"):
        raise ImportError("libcuda.so.1: cannot open shared object file: No such file or directory")
    return original(name, *arguments)
builtins.__import__ = imported
"""
    said = process("failing(make)", begin=begin)
    assert "needs NVIDIA's driver, and there is none: libcuda.so.1: cannot open" in said


@pytest.mark.parametrize(
    ("variables", "words"),
    {
        "init": ({"OPTFORGE_EMULATION_REFUSE": "cuInit:3"}, ["NVIDIA's driver does not start", "initialization error"]),
        "no device": ({"OPTFORGE_EMULATION_DEVICES": "0"}, ['target "cuda" needs a CUDA device, and this machine has none']),
        "too old": ({"OPTFORGE_EMULATION_CAPABILITY": "61"}, ["is too old: its compute capability is 6.1, and 7.0 is needed"]),
        "no context": ({"OPTFORGE_EMULATION_REFUSE": "cuDevicePrimaryCtxRetain:2"}, ["CUDA device 0", "cannot be used"]),
        "no nvcc": ({"NVCC": "nvcc-that-is-not"}, ["there is no 'nvcc-that-is-not', which the variable NVCC names", "set NVCC"]),
        "nvcc fails": ({"NVCC": "false"}, ["nvcc failed:", "$ "]),
        "memory": ({"OPTFORGE_EMULATION_REFUSE": "cuMemAlloc_v2:2"}, ["CUDA device 0", "bytes left, and", "are needed"]),
        "module": ({"OPTFORGE_EMULATION_REFUSE": "cuModuleLoadDataEx:200"}, ["the compiled kernel", "cannot be loaded", "of CUDA 13.0"]),
    }.values(),
)  # fmt: skip
def test_what_the_machine_has_not(variables: dict[str, str], words: list[str], process: Process) -> None:
    said = process("warnings.simplefilter('ignore')\nfailing(make)", **variables)
    assert said.startswith("EnvironmentProblem | ")
    for word in words:
        assert word in said


# ── arrays ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_arrays_that_are_refused(process: Process) -> None:
    said = process.on_device(
        """
        class Fake:
            def __init__(self, array, device=None, **interface):
                own = array.__cuda_array_interface__
                self.__cuda_array_interface__ = {**own, **interface}
                self.array = array
                if device is not None:
                    self.device = type("Device", (), {"type": "cuda", "index": device})()
        x = up(np.zeros((4, 6), "f4"))
        for wrong in (
            Fake(x, device=1),
            Fake(x, strides=(48, 4)),
            Fake(x, typestr="<i4"),
            Fake(x, data=(int(x.gpudata), True)),
            Fake(x, data=(int(x.gpudata) + 2, False)),
        ):
            failing(make, params=[wrong])
        opt = make(params=[x])
        failing(opt.step, [up(np.zeros((6, 4), "f4"))])
        failing(opt.step, [up(np.zeros((4, 6), "f8"))])
        failing(opt.step, [Fake(x, device=3)])
        failing(make, target=CudaTarget(1), params=[x])
        assert opt.t == 0
        opt.step([Fake(up(np.ones((4, 6), "f4")), device=0, strides=(24, 4))])
        """
    ).splitlines()
    for line, word in zip(
        said,
        ("is on CUDA device 1, this optimizer on 0", "is not C-contiguous (strides (48, 4))", "is int32; it must be float32, float64, bfloat16 or float16",
         "that may only be read", "is not aligned to its elements", "has the shape (6, 4), its parameter (4, 6)",
         "is float64, its parameter float32", "is on CUDA device 3", "there is no CUDA device 1; there are 1"),
        strict=True,
    ):  # fmt: skip
        assert word in line


@pytest.mark.parametrize("lazy", [{}, {"OPTFORGE_EMULATION_LAZY": "1"}], ids=["eager", "lazy"])
def test_arrays_of_every_kind_are_updated_in_place(lazy: dict[str, str], process: Process) -> None:
    process.on_device(
        """
        # PyCUDA's arrays: the same memory, and live state on the device.
        params = [up(p) for p in arrays()]
        before = [int(p.gpudata) for p in params if p.size]
        opt = of.Optimizer(params, "adam", target="cuda")
        state = opt.state["m"]
        assert all(hasattr(m, "__cuda_array_interface__") for m in state)
        other = beside(params, opt, "adam")
        assert [int(p.gpudata) for p in params if p.size] == before
        for own, expected, m, n in zip(params, other.params, state, other.state["m"]):
            assert same(own.get(), expected) and same(m.get(), n)

        # An object like a PyTorch tensor, whose memory moves.
        class Tensor(FakeTensor):
            @property
            def __cuda_array_interface__(self):
                return self.array.__cuda_array_interface__
            def data_ptr(self):
                return int(self.array.ptr) if self.array.size else 0
            def get(self):
                return self.array.get()
        params = [Tensor(up(p)) for p in arrays()]
        opt = of.Optimizer(params, "novograd", target="cuda")
        reference = of.Optimizer([p.get() for p in params], "novograd", target="numpy")
        for t in range(4):
            grads = arrays()
            opt.step([Tensor(up(g)) for g in grads])
            reference.step(grads)
            for p, expected in zip(params, reference.params):
                assert same(p.get(), expected), t
            old = params[3].array
            params[3].array = up(old.get())
            old.fill(7)

        # NumPy's: copied at each step, and one warning for each optimizer.
        for rule in ("adam", "lamb"):
            params = arrays()
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                opt = of.Optimizer(params, rule, target="cuda", zero_grads=True)
                reference = of.Optimizer([p.copy() for p in params], rule, target="numpy")
                for _ in range(3):
                    grads = arrays()
                    reference.step([g.copy() for g in grads])
                    opt.step(grads)
                    assert all(same(p, q) for p, q in zip(params, reference.params))
                    assert not any(g.any() for g in grads)
            assert [w.category.__name__ for w in said] == ["PerformanceWarning"]
        """,
        **lazy,
    )


def test_arrays_of_16_bits_on_the_device(process: Process) -> None:
    """As PyCUDA has them, with gradients of another format in between, beside a master, and at random."""
    said = process.on_device(
        """
        from optforge.core.formats import FORMATS
        def some(format):
            return [FORMATS[format].store(rng.standard_normal(shape).astype("f4")) for shape, _ in shapes]
        def check(opt, other):
            for name, tree in {"p": other.params, **other.state}.items():
                own = opt.params if name == "p" else opt.state[name]
                for a, b in zip(own, tree):
                    assert a.get().tobytes() == np.asarray(b).tobytes(), (name, opt.t)
        how = dict(store=dict.fromkeys("pmv", "bf16"), master="f32", rounding="stochastic", seed=2**64 - 1)
        start = some("bf16")
        opt = of.Optimizer([up(p) for p in start], "adam", target="cuda", **how)
        other = of.Optimizer([p.copy() for p in start], "adam", target="numpy", **how)
        for format in ("f32", "f32", "f16", "f32"):
            grads = some(format)
            told = opt.step([up(g) for g in grads], stats=True)
            said = other.step(grads, stats=True)
            assert (told.param_norm, told.update_norm) == (said.param_norm, said.update_norm)
            check(opt, other)
        opt.step([None, *[up(g) for g in grads[1:]]])
        other.step([None, *grads[1:]])
        opt.step([up(g) for g in grads])
        other.step(grads)
        check(opt, other)
        failing(opt.step, [up(np.zeros((5, 7))), *[up(g) for g in grads[1:]]])
        failing(make, params=[up(np.zeros(4, np.uint16))])
        """
    ).splitlines()
    assert "grads[0] is float64, its parameter bfloat16" in said[0] and "say so by store={'p': 'bf16'}" in said[1]


def test_state_of_8_bits_on_the_device(process: Process) -> None:
    """It begins, steps, is saved and goes to another target as on the reference."""
    process.on_device(
        """
        def check(opt, other):
            for name, tree in {"p": other.params, **other.state}.items():
                own = opt.params if name == "p" else opt.state[name]
                for a, b in zip(own, tree):
                    assert (a.dtype, a.shape, a.get().tobytes()) == (b.dtype, b.shape, b.tobytes()), (name, opt.t)
        def some():
            return [rng.standard_normal(shape).astype("f4") for shape, _ in shapes]
        how, start = dict(store={"m": "q8", "v": "uq8"}), some()
        opt = of.Optimizer([up(p) for p in start], "lamb", target="cuda", **how)
        other = of.Optimizer([p.copy() for p in start], "lamb", target="numpy", **how)
        check(opt, other)
        for k in range(3):
            grads = some()
            told = opt.step([up(g) for g in grads], stats=True)
            said = other.step(grads, stats=True)
            assert (told.param_norm, told.update_norm) == (said.param_norm, said.update_norm)
            check(opt, other)
        again = of.Optimizer([up(p) for p in other.params], "lamb", target="cuda", **how)
        again.load_state_dict(other.state_dict())
        other.load_state_dict(opt.state_dict())
        again.step([up(g) for g in grads])
        other.step(grads)
        check(again, other)
        """
    )


def test_checkpoints_go_between_targets(process: Process) -> None:
    process.on_device(
        """
        import threading
        warnings.simplefilter("ignore")
        start, grads = arrays(), [arrays() for _ in range(8)]
        expected = of.Optimizer([p.copy() for p in start], "novograd", target="numpy")
        for g in grads:
            expected.step(g)
        kept = None
        params = start
        for k, target in enumerate(("cuda", "numpy", "c", "cuda")):
            own = [up(p) for p in params] if target == "cuda" else [p.copy() for p in params]
            opt = of.Optimizer(own, "novograd", target=target)
            if kept is not None:
                opt.load_state_dict(kept)
            for g in grads[2 * k : 2 * k + 2]:
                opt.step([up(x) for x in g] if target == "cuda" else g)
            kept = opt.state_dict()
            params = [p.get() if target == "cuda" else p for p in own]
        assert all(same(p, q) for p, q in zip(params, expected.params))
        assert bits(kept["state"] if "state" in kept else kept) == bits(
            expected.state_dict()["state"] if "state" in kept else expected.state_dict())

        # Another thread, two optimizers of different rules, a stream of PyCUDA's.
        stream = drv.Stream()
        one, two = [up(p) for p in arrays()], [up(p) for p in arrays()]
        first = of.Optimizer(one, "adam", target=CudaTarget(stream=stream))
        second = of.Optimizer(two, "lamb", target="cuda")
        references = [of.Optimizer([p.get() for p in own], rule, target="numpy") for own, rule in ((one, "adam"), (two, "lamb"))]
        failed = []
        def work():
            try:
                for _ in range(3):
                    grads = arrays()
                    gpu.context.push()
                    own = [up(g) for g in grads]
                    drv.Context.pop()
                    for opt, reference in zip((first, second), references):
                        opt.step(own)
                        reference.step(grads)
                gpu.context.push()
                del own
                drv.Context.pop()
            except BaseException as problem:
                failed.append(problem)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not failed, failed
        stream.synchronize()
        for own, reference in zip((one, two), references):
            assert all(same(p.get(), q) for p, q in zip(own, reference.params))
        """
    )


def test_threads_that_use_a_device_may_end(process: Process) -> None:
    """The context is current nowhere after a call; memory is freed from any thread, without a warning."""
    process(
        """
        import threading
        from optforge.engines.cuda.device import device
        import pycuda.driver as drv
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=of.PerformanceWarning)
        kept, failed = [], []
        def work():
            try:
                params = arrays()
                reference = of.Optimizer([p.copy() for p in params], "adam", target="numpy")
                opt = of.Optimizer(params, "adam", target="cuda", skip_nonfinite=True)
                for stats in (False, True, False):
                    grads = arrays()
                    opt.step([g.copy() for g in grads], stats=stats)
                    reference.step(grads)
                assert all(same(p, q) for p, q in zip(params, reference.params))
                m = opt.state["m"]
                assert all(same(np.asarray(a), b) for a, b in zip(m, reference.state["m"]))
                assert same(m[3][1:5].get(), reference.state["m"][3][1:5])
                try:
                    drv.Context.get_device()
                except drv.LogicError:
                    pass
                else:
                    raise AssertionError("a context was left current")
                kept.append(opt)
                assert opt.t == 3
            except BaseException as problem:
                failed.append(problem)
        for _ in range(2):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert not failed, failed
        def drop():
            kept.pop()
        thread = threading.Thread(target=drop)
        thread.start()
        thread.join()
        kept[0].step(arrays())
        assert kept.pop().t == 4
        """
    )


def test_tensors_that_require_gradients(process: Process) -> None:
    """PyTorch's refuse `__cuda_array_interface__` with an error that `hasattr` lets through."""
    process.on_device(
        """
        class Tensor:
            def __init__(self, array, requires_grad=True):
                self.array, self.requires_grad = array, requires_grad
            def detach(self):
                return Tensor(self.array, False)
            def data_ptr(self):
                return int(self.array.gpudata or 0)
            @property
            def __cuda_array_interface__(self):
                if self.requires_grad:
                    raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad.")
                return self.array.__cuda_array_interface__
        params = [up(p) for p in arrays()]
        reference = of.Optimizer([p.get() for p in params], "adam", target="numpy")
        opt = of.Optimizer([Tensor(p) for p in params], "adam", target="cuda")
        for _ in range(3):
            grads = arrays()
            opt.step([Tensor(up(g), False) for g in grads])
            reference.step(grads)
        assert all(same(p.get(), q) for p, q in zip(params, reference.params))
        """
    )


# ── calls of the driver ─────────────────────────────────────────────────────────────────────────────────────────────

WAITS = {"cuCtxSynchronize", "cuStreamSynchronize", "cuEventSynchronize", "cuMemcpyDtoH_v2", "cuMemcpyDtoHAsync_v2",
         "cuMemcpyHtoD_v2", "cuMemFree_v2", "cuMemAlloc_v2", "cuModuleUnload", "cuStreamQuery", "cuEventQuery"}  # fmt: skip


SWITCHES = {"cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"}


@pytest.mark.parametrize(("rule", "launches"), [("adam", 2 + 1), ("lamb", 2 * 2 + 2)])
def test_a_plain_step_never_waits(rule: str, launches: int, process: Process, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    process.on_device(
        f"""
        import os
        from pathlib import Path
        trace = Path({str(trace)!r})
        params, grads = [up(p) for p in arrays()], [up(g) for g in arrays()]
        opt = of.Optimizer(params, {rule!r}, target="cuda")
        for _ in range(3):
            opt.step(grads)
        os.environ["OPTFORGE_EMULATION_TRACE"] = str(trace)
        for _ in range(20):
            opt.step(grads)
        del os.environ["OPTFORGE_EMULATION_TRACE"]
        """
    )
    calls = Counter(trace.read_text().split())
    assert not WAITS & set(calls), calls
    assert calls["cuLaunchKernel"] == 20 * launches, calls
    assert calls["cuMemcpyHtoDAsync_v2"] <= 3, calls  # scalars of ever more steps go together
    assert set(calls) <= {"cuLaunchKernel", "cuMemcpyHtoDAsync_v2", "cuFuncSetBlockShape", *SWITCHES}, calls


def test_other_gradients_cost_one_copy_of_their_addresses(process: Process, tmp_path: Path) -> None:
    """For each of the two dtypes, and no launch more."""
    trace = tmp_path / "trace"
    process.on_device(
        f"""
        import os
        trace = {str(trace)!r}
        params = [up(p) for p in arrays()]
        opt = of.Optimizer(params, "adam", target="cuda")
        reference = of.Optimizer([p.get() for p in params], "adam", target="numpy")
        kept = [arrays() for _ in range(24)]
        given = [[up(g) for g in grads] for grads in kept]
        for k, grads in enumerate(given):
            if k == 4:
                os.environ["OPTFORGE_EMULATION_TRACE"] = trace
            opt.step(grads)
        del os.environ["OPTFORGE_EMULATION_TRACE"]
        for grads in kept:
            reference.step(grads)
        assert all(same(p.get(), q) for p, q in zip(params, reference.params))
        """
    )
    calls = Counter(trace.read_text().split())
    assert not WAITS & set(calls), calls
    assert (calls["cuMemcpyHtoDAsync_v2"], calls["cuLaunchKernel"]) == (20 * 2, 20 * 3), calls


def test_another_gradient_may_be_missing_at_each_step(process: Process) -> None:
    """Of a rule without t, so that the others are as many and as they were."""
    process.on_device(
        """
        params = [up(p) for p in arrays()]
        opt = of.Optimizer(params, "sgd", target="cuda")
        reference = of.Optimizer([p.get() for p in params], "sgd", target="numpy")
        for missing in (1, 2, 3, 2, 0):
            grads = arrays()
            given = [up(g) for g in grads]
            grads[missing] = given[missing] = None
            opt.step(given)
            reference.step(grads)
            assert all(same(p.get(), q) for p, q in zip(params, reference.params)), missing
        """
    )


def test_the_second_process_compiles_nothing(process: Process, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    cache = {"OPTFORGE_CACHE_DIR": str(tmp_path)}
    code = (
        "opt = of.Optimizer([up(p) for p in arrays()], 'adagrad', target='cuda')\nopt.step([up(g) for g in arrays()])"
    )
    process.on_device(code, **cache)
    real = process.variables["NVCC"]  # which stays the same command, for that is part of what is cached
    before = Path(real).read_text()
    try:
        Path(real).write_text(before.replace("exec ", 'case "$*" in *-cubin*) exit 9;; esac\nexec ', 1))
        process.on_device(code, **cache)
        process.on_device(
            "failing(lambda: of.Optimizer([up(p) for p in arrays()], 'adadelta', target='cuda').step([up(g) for g in arrays()]))",
            **cache,
        )
    finally:
        Path(real).write_text(before)


def test_the_end_is_clean(process: Process) -> None:
    """Without an error of the driver's, whatever is alive at the end; also after an exception."""
    code = "params = [up(p) for p in arrays()]\nopt = of.Optimizer(params, 'adam', target='cuda')\nopt.step([up(g) for g in arrays()])\n"
    process.on_device(code + "print('done')")
    process(DEVICE + code + "raise SystemExit(3)", code_of_exit=3)
    assert not process.said
    process(DEVICE + code + "raise ValueError('of the user')", code_of_exit=1)
    assert process.said.rstrip().endswith("ValueError: of the user") and process.said.count("Error") == 1
