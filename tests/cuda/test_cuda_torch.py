"""Tensors of PyTorch on a GPU, as far as an emulated device shows it: there its memory is that of the host.

So tensors on the CPU stand for those on a device; streams, which PyTorch has none of here, are not shown.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import require

SCRIPT = '''
import contextlib, copy, ctypes, os, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
from optforge.torch import Optimizer, cuda, stepper

def tensor(self, array):
    """PyTorch's view of device memory, which is the host's."""
    size = max(array.nbytes, 1)
    buffer = (ctypes.c_char * size).from_address(int(array.ptr)) if array.nbytes else bytearray(size)
    return torch.frombuffer(buffer, dtype=torch.float32 if array.dtype == np.float32 else torch.float64, count=array.size)

def train(steps, on_device, rule, zero=False, **how):
    stepper.on_gpu = lambda p: on_device
    torch.manual_seed(1)
    shapes = [(37, 50), (33,), (), (2, 3, 5, 5)]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    params[3].data = params[3].data.contiguous(memory_format=torch.channels_last)
    opt = Optimizer(params, rule, lr=0.01, zero_grads=zero, **how)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    told = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for k, p in enumerate(params):
            p.grad = None if step == 1 and k == 1 else torch.randn(p.shape, generator=generator)
        if step == 2:
            params[0].grad[3, 4] = float("nan")
        if step == 3:
            saved = copy.deepcopy(opt.state_dict())
            opt = Optimizer(params, rule, lr=5.0, zero_grads=zero, **how)
            opt.load_state_dict(saved)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9, last_epoch=2)
        stats = opt.step(stats=True)
        told.append((stats.grad_norm if stats.grad_norm == stats.grad_norm else None, stats.skipped))
        assert not zero or not any(p.grad is not None and p.grad.any() for p in params)
        scheduler.step()
    values = [p.detach() for p in params]
    state = [value for p in params for value in opt.state[p].values()]
    assert opt.state[params[3]]["exp_avg" if "exp_avg" in opt.state[params[3]] else "m"].stride() == params[3].stride()
    return told, [v.numpy().tobytes() for v in (*values, *state)]

cuda.in_order = lambda device: contextlib.nullcontext()
cuda.DeviceTensorSpace.tensor = tensor
rules = [("clip_by_global_norm:AdamW", True), ("novograd", False)]
for rule, zero in rules if os.environ.get("OPTFORGE_TEST_FULL") else rules[:1]:
    how = {"skip_nonfinite": True}
    host, device = (train(6, on_device, rule, zero, **how) for on_device in (False, True))
    assert host[0] == device[0], (rule, host[0], device[0])
    assert host[1] == device[1], rule
    assert [skipped for _, skipped in host[0]] == [False, False, True, False, False, False]
print("same")
'''


def test_tensors_are_stepped_on_a_device_with_the_bits_of_the_host(
    emulated_cuda: dict[str, str], tmp_path: Path
) -> None:
    """Norms, the skipped step, state through a state dict, a gradient that is missing once, channels-last."""
    require("pycuda")
    require("torch")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, **emulated_cuda, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.strip() == "same"
