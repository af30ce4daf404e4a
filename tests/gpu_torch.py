"""Steps in threads, and over PyTorch's tensors on a GPU, beside the C target in every bit; gpu.py runs each part.

    python tests/gpu_torch.py PART

Each part is a process of its own, because its end is a result as well: a context that is left in a wrong state ends the
process with SIGABRT. Exit codes: 0 shown, 1 something else was found, 3 this machine cannot show it; a line says which.
"""

from __future__ import annotations

import gc
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import optforge as of

sys.path.insert(0, str(Path(__file__).parent / "support"))
from data import same
from optforge.core.diagnostics import PerformanceWarning
from optforge.engines.cuda.device import device

STEPS = 5
SIZES = (7, 4097, 0, 32769)


class Impossible(Exception):
    """This machine lacks what the part is about."""


def pytorch() -> Any:
    """PyTorch, with a device that it can use.

    Raises
    ------
    Impossible
        There is none.
    """
    try:
        import torch
    except ImportError as problem:
        raise Impossible(f"PyTorch cannot be imported: {problem}") from None
    if not torch.cuda.is_available():
        raise Impossible(f"PyTorch {torch.__version__} has no CUDA, or no device")
    try:
        torch.ones(1, device=place(0)).add(1).item()
    except RuntimeError as problem:
        raise Impossible(f"PyTorch {torch.__version__} has no kernels for this device: {problem}") from None
    return torch


def place(number: int) -> str:
    """A device, as PyTorch names it."""
    return f"cuda:{number}"


def in_thread(do: Callable[[], object]) -> None:
    """Do something in a thread that ends with it, and raise what it raises."""
    problems = []

    def work() -> None:
        try:
            do()
        except BaseException as problem:
            problems.append(problem)
        gc.collect()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if problems:
        raise problems[0]


class Network:
    """A small network whose parameters PyTorch holds on a device, and the same steps by the C target on the host.

    Parameters
    ----------
    number : int
        The device.
    named : bool
        Whether parameters and gradients are given by name.
    moving : bool
        Whether gradients have other memory at each step.
    stream : pycuda.driver.Stream, optional
        On which steps are enqueued.
    """

    def __init__(self, number: int = 0, named: bool = False, moving: bool = False, stream: Any = None, **how: Any):
        self.torch, self.number, self.named, self.moving = pytorch(), number, named, moving
        nn = self.torch.nn
        self.torch.manual_seed(5)
        layers = nn.Linear(19, 301), nn.Tanh(), nn.Linear(301, 33), nn.Tanh(), nn.Linear(33, 1)
        self.model = nn.Sequential(*layers).to(place(number))
        self.rng = np.random.default_rng(7)
        rule = of.clip_by_global_norm(max_norm=0.02) >> of.rules.adamw
        self.params = dict(self.model.named_parameters())
        assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in self.params.values())
        copies = {name: self.host(p).copy() for name, p in self.params.items()}
        self.reference = of.Optimizer(copies, rule, target="c", **how)
        target = of.CudaTarget(device=number, stream=stream)
        self.optimizer = of.Optimizer(self.given(self.params), rule, target=target, **how)
        self.zeroed = how.get("zero_grads", False)
        self.kept: list[Any] = []
        self.ahead: list[dict[str, Any]] = []  # gradients of steps that the reference has not done
        self.addresses: set[tuple[int, ...]] = set()

    def given(self, tensors: dict[str, Any]) -> Any:
        """Tensors by name, or in a list."""
        return tensors if self.named else list(tensors.values())

    def host(self, tensor: Any) -> Any:
        """The elements of a tensor, when all that was enqueued for it is done."""
        if tensor.is_cuda:
            self.torch.cuda.synchronize(tensor.device)
        return tensor.detach().cpu().numpy()

    def backward(self) -> None:
        """Gradients of a loss."""
        if self.moving:
            self.kept.append([p.grad for p in self.params.values()])  # or they would get the same memory again
            self.model.zero_grad(set_to_none=True)
        elif self.params["0.weight"].grad is not None:
            self.model.zero_grad(set_to_none=False)
        inputs = self.torch.tensor(
            self.rng.standard_normal((8, 19)), dtype=self.torch.float32, device=place(self.number)
        )
        loss = self.model(inputs).square().mean()
        loss.backward()

    def step(self) -> None:
        """One step on the device, with the gradients that are there; nothing here waits for it."""
        grads = {name: p.grad for name, p in self.params.items()}
        self.ahead.append({name: g.clone() for name, g in grads.items()})
        self.optimizer.step(self.given(grads))
        self.addresses.add(tuple(g.data_ptr() for g in grads.values()))

    def compare(self) -> None:
        """Parameters and state, when the reference has done the same steps."""
        for copies in self.ahead:
            self.reference.step({name: self.host(g) for name, g in copies.items()})
        self.ahead.clear()
        if self.zeroed:
            assert not any(self.host(p.grad).any() for p in self.params.values())
        for name, p in self.params.items():
            assert same(self.host(p), self.reference.params[name]), f"other bits in {name}, t = {self.reference.t}"
        for name, expected in self.reference.state.items():
            own = self.optimizer.state[name]
            for key, array in zip(expected, own.values() if self.named else own, strict=True):
                assert same(np.asarray(array), expected[key]), f"other bits in {name} of {key}, t = {self.reference.t}"

    def train(self, steps: int = STEPS) -> None:
        """Several steps, compared after each."""
        for _ in range(steps):
            self.backward()
            self.step()
            self.compare()


# ── parts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def threads() -> str:
    """Optimizers over arrays of PyCUDA that are made, stepped, read and dropped in threads; the first of the process too."""
    from gpu_parts import Twin

    rule = of.clip_by_global_norm >> of.rules.adam

    def whole() -> None:
        twin = Twin(rule, SIZES, True, skip_nonfinite=True)
        for stats in (False, True, False):
            twin.step(stats=stats)

    in_thread(whole)
    in_thread(whole)
    whole()
    twin = Twin(rule, SIZES, True)
    twin.step()

    def read() -> None:
        for own, expected in zip(twin.optimizer.state["m"], twin.reference.state["m"], strict=True):
            twin.compare(own, expected, "read in a thread")

    for do in (read, twin.step, read):
        in_thread(do)
    twin.step(stats=False)
    return "four optimizers, three of which a thread made or stepped, have the bits of the reference"


def parameters() -> str:
    """Parameters that require gradients, in a list, with gradients that stay where they are."""
    for how in ({}, {"zero_grads": True}, {"skip_nonfinite": True}):
        network = Network(**how)
        network.train()
        assert len(network.addresses) == 1
    return f"{STEPS} steps of a network, three times, have the bits of the C target"


def dictionary() -> str:
    """Parameters and gradients by name; state that PyTorch takes without a copy."""
    network = Network(named=True)
    network.train()
    for name, m in network.optimizer.state["m"].items():
        tensor = network.torch.as_tensor(m, device=place(0))
        assert same(network.host(tensor), network.reference.state["m"][name])
    return f"{STEPS} steps over parameters by name have the bits of the C target"


def moving() -> str:
    """Gradients that PyTorch makes anew for each step."""
    network = Network(moving=True)
    network.train()
    assert len(network.addresses) == STEPS, f"gradients were at {len(network.addresses)} places in {STEPS} steps"
    network.kept.clear()  # from here on PyTorch gives out memory again
    network.train()
    return f"{2 * STEPS} steps with gradients that move have the bits of the C target"


def thread() -> str:
    """An optimizer that is made, stepped and dropped in a thread, while PyTorch goes on; and state read in a thread."""
    torch = pytorch()
    in_thread(lambda: Network().train())
    assert torch.ones(1000, device=place(0)).sum().item() == 1000
    network = Network()
    network.train(2)
    in_thread(network.compare)
    in_thread(network.train)
    network.train(2)
    del network
    gc.collect()
    assert torch.ones(1000, device=place(0)).sum().item() == 1000
    return "steps and state in threads have the bits of the C target, and PyTorch goes on"


def streams() -> str:
    """Gradients from a stream of PyTorch's, which waits for steps as they wait for it; and steps in a stream of PyCUDA's."""
    torch = pytorch()
    side, main = torch.cuda.Stream(), torch.cuda.default_stream()
    network = Network()
    for _ in range(STEPS):
        side.wait_stream(main)
        with torch.cuda.stream(side):
            network.backward()
            main.wait_stream(side)
            network.step()  # enqueued on the default stream, whatever stream PyTorch uses here
    network.compare()
    own = device(0)
    with own:
        stream = own.drv.Stream()
    network = Network(stream=stream)
    with torch.cuda.stream(torch.cuda.ExternalStream(stream.handle)):
        network.train()
    return f"{STEPS} steps with a stream of PyTorch's, and in one of PyCUDA's, have the bits of the C target"


def devices() -> str:
    """Steps on two devices in turns, and what PyTorch takes for the current device."""
    torch = pytorch()
    if torch.cuda.device_count() < 2:
        raise Impossible("PyTorch sees one device, and this needs two")
    assert torch.cuda.current_device() == 0
    networks = [Network(1), Network(0), Network(1, named=True)]
    for _ in range(STEPS):
        for network in networks:
            network.train(1)
            assert torch.cuda.current_device() == 0
            assert torch.ones(1, device="cuda").device.index == 0
    in_thread(lambda: networks[0].train(1))
    with torch.cuda.device(1):
        networks[1].train(1)
        assert torch.cuda.current_device() == 1
    assert torch.cuda.current_device() == 0
    return f"{STEPS} steps on two devices in turns have the bits of the C target, and the current device stays"


PARTS: dict[str, Callable[[], str]] = {
    "threads": threads,
    "parameters": parameters,
    "dictionary": dictionary,
    "moving": moving,
    "thread": thread,
    "streams": streams,
    "devices": devices,
}


def main(names: list[str]) -> int:
    """The command."""
    if len(names) != 1 or names[0] not in PARTS:
        print(f"usage: gpu_torch.py PART, one of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warnings.simplefilter("error", PerformanceWarning)  # nothing is to be copied from the host
        try:
            shown = PARTS[names[0]]()
        except Impossible as problem:
            print(f"skipped: {' '.join(str(problem).split())}")
            return 3
        gc.collect()
    left = sum("could not be cleaned up" in str(warning.message) for warning in said)
    print(f"shown: {shown}{f'; {left} objects of PyCUDA were not freed' if left else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
