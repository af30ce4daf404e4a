"""State dicts of the 8-bit optimizers of bitsandbytes, of which Adam and AdamW have a rule's formula.

Its `state1` and `state2` are m as q8 and v as uq8, `absmax1` and `absmax2` their scales, beside the maps that codes are
meant by. Of small tensors they are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core import blocks
from ..core.diagnostics import UsageError
from ..core.formats import FORMATS

if TYPE_CHECKING:
    from ..engines.tensor import Tensor
    from .optimizer import Optimizer

STORE = {"m": "q8", "v": "uq8"}  # in the order of their numbers
WRAPPED = "__bnb_optimizer_quant_state__"  # where newer versions have an entry's arrays
SETTINGS = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}  # of groups, that other optimizers have a use for
NAME = "Adam8bit or AdamW8bit of bitsandbytes"
DECAY = (
    "weight_decay={}: on CUDA it decays after the step and adamw before it; to go on with what is here, set it to 0 in "
    "the groups of the state dict, and weight_decay of the rule afterwards"
)


def is_eight(opt: Optimizer) -> bool:
    """Whether state is in blocks of 8 bits, so that the other side is bitsandbytes.

    Raises
    ------
    UsageError
        It is, and otherwise than there.
    """
    found = {name: own for name, own in opt.store.items() if FORMATS[own].scales}
    if not found:
        return False
    if opt.rule.name not in ("adam", "adamw"):
        raise UsageError(
            f"no 8-bit optimizer of bitsandbytes has the formula of rule {opt.rule.name!r} (adam and adamw are {NAME}; "
            "its momentum has the rate outside of the velocity, its RMSprop and Adagrad eps outside of the root)"
        )
    if found != STORE:
        told = ", ".join(f"{name}={own}" for name, own in found.items())
        raise UsageError(f"{NAME} has m=q8, v=uq8, and the store here is {told}")
    return True


def unwrapped(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a tensor with its arrays on one level."""
    inner = entry.get(WRAPPED)
    return {**entry, **(inner if isinstance(inner, Mapping) else {})}


def state_of(tensor: Tensor, entry: Mapping[str, Any], label: str, array: Any, problems: list[str]) -> dict[str, Any]:
    """State and scales of a tensor from its entry, which is empty where it has had no step; what does not fit is noted.

    What is float32 there is stored in blocks here, to nearest.
    """
    made: dict[str, Any] = {}
    for number, (name, own) in enumerate(STORE.items(), 1):
        values = np.zeros(tensor.shape, np.float32)
        if entry and entry.get(f"state{number}") is None:
            problems.append(f"{label} has no 'state{number}'")
        elif entry:
            values = array(entry[f"state{number}"], f"{label}['state{number}']")
        if values.shape != tensor.shape or values.dtype not in (np.uint8, np.float32):
            what = f"{values.dtype} of shape {values.shape}"
            problems.append(f"{label}['state{number}'] is {what}, not uint8 or float32 of shape {tensor.shape}")
        elif values.dtype == np.float32:
            codes, made[name + blocks.SCALES] = FORMATS[own].store(values)
            made[name] = codes.reshape(tensor.shape)
        else:
            scales, map_ = (entry.get(f"{key}{number}") for key in ("absmax", "qmap"))
            scales, map_ = (np.zeros(0) if given is None else array(given, label) for given in (scales, map_))
            if scales.shape != (blocks.blocks(values.size),) or scales.dtype != np.float32:
                wanted = blocks.blocks(values.size)
                problems.append(
                    f"{label} has {scales.size} scales of {values.size} elements, not {wanted}, one for 256"
                )
            if map_.shape != (256,) or not np.allclose(map_, blocks.table(own == "q8"), rtol=1e-6, atol=0):
                problems.append(f"{label}['qmap{number}'] is not its dynamic map, which {own} is")
            made[name], made[name + blocks.SCALES] = values, scales
    return made


def entry_of(tensor: Tensor, steps: int, number: Any) -> dict[str, Any]:
    """The entry of a tensor."""
    entry: dict[str, Any] = {"step": steps}
    for place, (name, own) in enumerate(STORE.items(), 1):
        entry[f"state{place}"] = number(tensor.arrays[name].reshape(tensor.shape).view(np.uint8).copy())
        entry[f"absmax{place}"] = number(tensor.arrays[name + blocks.SCALES].copy())
        entry[f"qmap{place}"] = number(blocks.table(own == "q8").copy())
    return entry
