"""What PyCUDA itself does with the emulated driver; run by test_emulation.py in a process of its own."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pycuda.driver as cuda
from pycuda import gpuarray

n = 1000
x = np.linspace(-1, 1, n, dtype=np.float32)


def refused(call: object, *arguments: object) -> str:
    """The message of the error that a call raises."""
    try:
        call(*arguments)  # type: ignore[operator]
    except cuda.Error as error:
        return str(error)
    raise AssertionError(f"{call} raised nothing")


assert "initialization error" in refused(cuda.Device, 0)
cuda.init()
device = cuda.Device(0)
assert device.compute_capability() == (9, 0) and device.warp_size == 32 and device.multiprocessor_count > 0
assert "invalid device context" in refused(cuda.mem_alloc, 4)

context = device.retain_primary_context()
context.push()
try:
    image = Path(sys.argv[1]).read_bytes()
    module = cuda.module_from_buffer(image)
    assert module.get_function("where").max_threads_per_block == 1024
    assert "named symbol not found" in refused(module.get_function, "absent")
    assert "image is invalid" in refused(cuda.module_from_buffer, b"// PTX")
    assert "not supported" in refused(cuda.TextureReference)

    os.environ["OPTFORGE_EMULATION_REFUSE"] = "cuMemAlloc_v2:2"
    assert "out of memory" in refused(cuda.mem_alloc, 4)
    del os.environ["OPTFORGE_EMULATION_REFUSE"]

    # One struct as the only argument, as bytes, on the default stream and on another.
    source, target = cuda.mem_alloc(x.nbytes), cuda.mem_alloc(x.nbytes)
    cuda.memcpy_htod(source, x)
    work = struct.pack("PPPPN", int(source), int(target), 0, 0, n)
    kernel = module.get_function("arithmetic").prepare([f"{len(work)}s"])
    stream = cuda.Stream()
    for where in (None, stream):
        cuda.memset_d32(target, 0, n)
        kernel.prepared_async_call((1, 1), (256, 1, 1), where, work)
        result = np.empty_like(x)
        cuda.Context.synchronize()
        cuda.memcpy_dtoh(result, target)
        assert np.array_equal(result, x * np.float32(3) + x)

    for size in (16, 24, 32, 40, 264, 4000):
        words = np.arange(size // 8 - 1, dtype=np.uint64) ** 3
        out = gpuarray.to_gpu(np.zeros_like(words))
        kernel = module.get_function(f"sized_{size}").prepare([f"{size}s"])
        kernel.prepared_call((1,), (1, 1, 1), struct.pack("P", int(out.gpudata)) + words.tobytes())
        assert np.array_equal(out.get(), words)

    y = gpuarray.zeros(4, np.float32)  # a kernel that PyCUDA generates, compiled by the emulated nvcc
    module.get_function("several")(y, np.float64(0.5), np.int32(2), np.float32(3), block=(32, 1, 1), grid=(1, 1))
    assert y.get().tolist() == [0, 0, 3.5, 0]

    # Unaligned views, memory of the host, events.
    shifted = gpuarray.GPUArray(n - 1, np.float32, gpudata=int(source) + 4)
    assert np.array_equal(shifted.get(), x[1:])
    locked = cuda.pagelocked_empty(n, np.float32)
    start, end = cuda.Event(), cuda.Event()
    start.record(stream)
    cuda.memcpy_dtoh_async(locked, source, stream)
    end.record(stream)
    end.synchronize()
    assert end.query() and end.time_since(start) >= 0 and stream.is_done()
    assert np.array_equal(locked, x) and stream.handle == int(stream.handle) != 0

    # A kernel reads page-locked memory when its turn comes: overwritten too early, it shows where work is lazy.
    cuda.memcpy_htod_async(source, locked, stream)
    locked[:] = 5
    stream.synchronize()
    cuda.memcpy_dtoh(result, source)
    assert np.array_equal(result, np.full_like(x, 5) if "OPTFORGE_EMULATION_LAZY" in os.environ else x)
    end.record(stream)
    while not end.query():
        pass

    # The current context is known to whatever else calls the driver.
    driver, current = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    assert driver.cuCtxGetCurrent(ctypes.byref(current)) == 0 and current.value == context.handle
    del y, out, shifted, locked, source, target, start, end, stream, kernel, module
finally:
    cuda.Context.pop()
    context.detach()
print("done")
