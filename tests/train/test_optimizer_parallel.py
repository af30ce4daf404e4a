"""Threads and processes around steps: forks, Python threads, the interpreter's lock, the end of a process."""

from __future__ import annotations

import hashlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from optforge import Optimizer
from optimizing import SETTINGS, large, nadam

DEADLINE = 60.0  # seconds after which a child counts as hanging


def trained(threads: int | None, steps: int = 2, seed: int = 1) -> Optimizer:
    """An Optimizer after some steps, with arrays that are large enough for several threads."""
    opt = Optimizer(large(seed), nadam, threads=threads, **SETTINGS)
    for k in range(steps):
        opt.step(large(seed + 2 + k))
    return opt


def digest(opt: Optimizer) -> bytes:
    """The bits of parameters and state."""
    total = hashlib.sha256()
    for values in (opt.params, *opt.state.values()):
        for value in values:
            total.update(np.asarray(value).tobytes())
    return total.digest()


def in_child(work: Callable[[], bytes]) -> bytes:
    """What a forked child answers."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Newer Pythons warn of a fork where there are threads, which is what is tested here.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            os.write(writer, work())
        finally:
            os._exit(0)
    os.close(writer)
    answered, _, _ = select.select([reader], [], [], DEADLINE)
    if not answered:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        assert answered, "the child hangs"
        return os.read(reader, 1000)
    finally:
        os.close(reader)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("threads", [None, 2])
def test_a_forked_child_steps_with_the_same_bits(threads: int | None) -> None:
    opt = trained(threads)

    def go_on() -> bytes:
        opt.step(large(9))
        return digest(opt)

    def start_anew() -> bytes:
        return digest(trained(threads, 3))

    def fork_again() -> bytes:
        return in_child(start_anew)

    children = [in_child(go_on), in_child(start_anew), in_child(fork_again)]
    own = digest(trained(threads, 3))
    opt.step(large(9))
    assert children == [digest(opt), own, own]


def test_python_threads_step_optimizers_of_their_own() -> None:
    serial = [digest(trained(1, seed=seed)) for seed in range(4)]
    for threads in (1, 3):
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda seed, threads=threads: digest(trained(threads, seed=seed)), range(4)))
        assert together == serial


@contextmanager
def counting() -> Iterator[list[int]]:
    """A thread that counts whenever it may run, while no thread takes the interpreter's lock from another."""
    count, done = [0], threading.Event()

    def run() -> None:
        while not done.is_set():
            count[0] += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    counter = threading.Thread(target=run)
    sys.setswitchinterval(1000)
    try:
        counter.start()
        yield count
    finally:
        done.set()
        sys.setswitchinterval(interval)
        counter.join()


def test_other_python_threads_run_during_a_step() -> None:
    """The counter can only count where the step lets go of the lock."""
    params, grads = [np.ones(500_000)], [np.ones(500_000)]
    opt = Optimizer(params, "adam", threads=1, lr=0.1)
    opt.step(grads)
    with counting() as count:
        before = count[0]
        for _ in range(500):
            opt.step(grads)
            if count[0] != before:
                return
    pytest.fail("no other thread ran during 500 steps")


ENDING = """
import gc
import numpy as np
from optforge import Optimizer

for k in range(3):
    opt = Optimizer([np.ones(200_000)], "adam", threads=2, lr=0.1)
    opt.step([np.ones(200_000)])
    del opt
    gc.collect()
last = Optimizer([np.ones(200_000)], "adam", threads=2, lr=0.1)
last.step([np.ones(200_000)])
"""


@pytest.mark.parametrize("waiting", ["active", "passive"])
def test_threads_outlive_their_optimizer(waiting: str) -> None:
    """OpenMP's threads wait, spinning or asleep, in code that must not be unloaded."""
    environment = {**os.environ, "OMP_WAIT_POLICY": waiting, "OMP_NUM_THREADS": "2"}
    answer = subprocess.run([sys.executable, "-c", ENDING], env=environment, capture_output=True, timeout=DEADLINE)
    assert (answer.returncode, answer.stderr) == (0, b"")
