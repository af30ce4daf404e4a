"""One rank of a training over gloo, which test_torch_sharded.py starts: `python torch_ranks.py RANK SIZE STORE WHAT`.

WHAT is JSON: what is trained, how many steps, where a checkpoint is saved and from where one is loaded. Rank 0 prints, as
JSON, the bits of all parameters, of the state and of the statistics of each step.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from typing import Any

warnings.simplefilter("ignore")  # PyTorch's own, at its imports

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

from optforge.torch import Optimizer  # noqa: E402

SHAPES = {
    "leaves": [(48, 1024), (12 * 1024,), (24, 2, 512), (0, 4)],
    "uneven": [(48, 1024), (7,), (33, 50), (3, 1000), ()],
}


def model(kind: str) -> Any:
    torch.manual_seed(3)
    made = nn.Module()
    for k, shape in enumerate(SHAPES[kind]):
        if shape:  # `fully_shard` takes no scalars
            made.register_parameter(f"p{k}", nn.Parameter(torch.randn(shape)))
    return made


def network() -> Any:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 5))


def gradient(p: Any, k: int, step: int, bad: int) -> Any:
    """A gradient of the whole parameter; at one step one has a NaN in its last element."""
    made = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + k))
    if step == bad and k == 0:
        made.view(-1)[-1] = float("nan")
    return made


def shard(full: Any, p: Any) -> Any:
    if not hasattr(p, "device_mesh"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, p.device_mesh, p.placements)


def whole(tensor: Any) -> Any:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def digest(tensors: Any) -> str:
    made = hashlib.sha256()
    for tensor in tensors:
        made.update(whole(tensor).detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def optimizer(params: Any, what: dict[str, Any]) -> Any:
    return Optimizer(params, what.get("rule", "clip_by_global_norm:adamw"), **what.get("how", {}))


def train(net: Any, opt: Any, what: dict[str, Any]) -> list[Any]:
    """Steps with given gradients, and what each tells."""
    told = []
    for step in range(*what["steps"]):
        for k, p in enumerate(net.parameters()):
            p.grad = shard(gradient(p, k, step, what.get("bad", 2)), p)
        if what.get("plain"):
            opt.step()
            continue
        stats = opt.step(stats=True)
        per_tensor = stats.per_tensor.grad_norm.tolist()
        told.append([stats.grad_norm.hex(), stats.update_norm.hex(), stats.skipped, [own.hex() for own in per_tensor]])
    return told


def fit(net: Any, opt: Any, what: dict[str, Any]) -> list[Any]:
    """Steps with the gradients of a loss."""
    losses = []
    for step in range(*what["steps"]):
        opt.zero_grad()
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        loss = (net(x) ** 2).mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


def result(net: Any, opt: Any, told: list[Any]) -> dict[str, Any]:
    entries = [opt.state[p] for p in net.parameters() if p.numel() and opt.state.get(p)]
    return {
        "told": told,
        "parameters": digest(net.parameters()),
        "state": digest(value for entry in entries for key, value in entry.items() if key != "step"),
        "steps": [float(entry["step"]) for entry in entries],
        "values": [whole(p).detach().flatten().tolist() for p in net.parameters()] if what_is_small(net) else [],
    }


def what_is_small(net: Any) -> bool:
    return sum(p.numel() for p in net.parameters()) < 10000


def alone(what: dict[str, Any]) -> dict[str, Any]:
    """The same in one process, without shards."""
    net = network() if what.get("fit") else model(what["model"])
    opt = optimizer(net.parameters(), what)
    return result(net, opt, (fit if what.get("fit") else train)(net, opt, what))


def main(rank: int, size: int, store: str, what: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = network() if what.get("fit") else model(what["model"])
    if what.get("fit") == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(net)
    else:
        wrapped = fully_shard(net, mesh=init_device_mesh("cpu", (size,)))
    opt = optimizer(net.parameters(), what)
    if "load" in what:
        restore(net, opt, what["load"])
    told = fit(wrapped, opt, what) if what.get("fit") else train(net, opt, what)
    found = result(net, opt, told)
    if "save" in what:
        save(net, opt, what["save"])
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    os._exit(0)  # as a process that is killed


def save(net: Any, opt: Any, path: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    state = dict(zip(("model", "optim"), get_state_dict(net, opt), strict=True))
    dcp.save(state, checkpoint_id=path)


def restore(net: Any, opt: Any, path: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    state = dict(zip(("model", "optim"), get_state_dict(net, opt), strict=True))
    dcp.load(state, checkpoint_id=path)
    set_state_dict(net, opt, model_state_dict=state["model"], optim_state_dict=state["optim"])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
