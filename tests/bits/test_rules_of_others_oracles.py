"""The most intricate rules of others beside oracles written from their papers: several tensors, plain loops, float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import optforge as of
from others import SIZES, spread, start
from rules_of_others import RULES, settings

STEPS = 12
ALLOWED = 24  # of eps, of the parameter and of the largest update of its tensor; the farthest are 9 apart

Arrays = list[Any]
# What an oracle does: takes parameters and hyperparameters, then gradients again and again, giving parameters.
Oracle = Iterator[Arrays]


def prodigy(p: Arrays, h: dict[str, float], grads: Iterator[Arrays]) -> Oracle:
    """Algorithm 4 of the paper, in which D-estimates are weighted by d² / d0."""
    x0 = [x.copy() for x in p]
    m, v, s = ([np.zeros_like(x) for x in p] for _ in range(3))
    d = largest = h["d0"]
    r = 0.0
    for g in grads:
        decay = math.sqrt(h["beta2"])
        weight = d * d * h["lr"] / h["d0"]
        r = decay * r + weight * sum(float(np.dot(own, a - x)) for own, a, x in zip(g, x0, p, strict=True))
        s = [decay * own + weight * k for own, k in zip(s, g, strict=True)]
        m = [h["beta1"] * own + (1 - h["beta1"]) * d * k for own, k in zip(m, g, strict=True)]
        v = [h["beta2"] * own + (1 - h["beta2"]) * (d * k) ** 2 for own, k in zip(v, g, strict=True)]
        before, length = d, sum(float(np.abs(own).sum()) for own in s)
        estimate = h["d_coef"] * r / length
        if d == h["d0"]:
            d = max(d, estimate)
        largest = max(largest, estimate)
        d = min(largest, d * h["growth_rate"])
        rate = before * h["lr"]
        p = [
            x - rate * h["weight_decay"] * x - rate * a / (np.sqrt(b) + d * h["eps"])
            for x, a, b in zip(p, m, v, strict=True)
        ]
        yield p


def swats(p: Arrays, h: dict[str, float], grads: Iterator[Arrays]) -> Oracle:
    """Algorithm 1 of the paper, with a phase for each tensor."""
    tensors = [{"m": 0.0, "a": 0.0, "v": 0.0, "mean": 0.0, "rate": None} for _ in p]
    for t, g in enumerate(grads, 1):
        after = []
        for x, k, own in zip(p, g, tensors, strict=True):
            own["m"] = h["beta1"] * own["m"] + (1 - h["beta1"]) * k
            own["a"] = h["beta2"] * own["a"] + (1 - h["beta2"]) * k * k
            if own["rate"] is not None:
                own["v"] = h["beta1"] * own["v"] + k
                after.append(x - (1 - h["beta1"]) * own["rate"] * own["v"])
                continue
            root = math.sqrt(1 - h["beta2"] ** t) / (1 - h["beta1"] ** t)
            step = -h["lr"] * root * own["m"] / (np.sqrt(own["a"]) + h["eps"])
            after.append(x + step)
            if (along := float(np.dot(step, k))) != 0:
                gamma = float(np.dot(step, step)) / -along
                own["mean"] = h["beta2"] * own["mean"] + (1 - h["beta2"]) * gamma
                corrected = own["mean"] / (1 - h["beta2"] ** t)
                if t > 1 and corrected > 0 and abs(corrected - gamma) < h["tolerance"]:
                    own["rate"] = corrected
        p = after
        yield p


def schedule_free_adamw(p: Arrays, h: dict[str, float], grads: Iterator[Arrays]) -> Oracle:
    """x, y and z as in the paper, of which the rule keeps y and z."""
    z, x = [k.copy() for k in p], [k.copy() for k in p]
    v = [np.zeros_like(k) for k in p]
    total = largest = 0.0
    y = p
    for t, g in enumerate(grads, 1):
        rate = h["lr"] * min(1, t / h["warmup_steps"])
        largest = max(largest, rate)
        weight = t ** h["r"] * largest ** h["weight_lr_power"]
        total += weight
        v = [h["beta2"] * own + (1 - h["beta2"]) * k * k for own, k in zip(v, g, strict=True)]
        for k in range(len(p)):
            direction = g[k] / (np.sqrt(v[k] / (1 - h["beta2"] ** t)) + h["eps"]) + h["weight_decay"] * y[k]
            z[k] = z[k] - rate * direction
            x[k] = x[k] + weight / total * (z[k] - x[k])
        y = [(1 - h["beta1"]) * a + h["beta1"] * b for a, b in zip(z, x, strict=True)]
        yield y


def timm_lamb(p: Arrays, h: dict[str, float], grads: Iterator[Arrays]) -> Oracle:
    """The paper's Algorithm 2, under a bound on the norm of all gradients."""
    m, v = ([np.zeros_like(x) for x in p] for _ in range(2))
    for t, g in enumerate(grads, 1):
        length = math.sqrt(sum(float(np.dot(k, k)) for k in g))
        g = [k * (h["max_grad_norm"] / max(length, h["max_grad_norm"])) for k in g]
        after = []
        for i, x in enumerate(p):
            m[i] = h["beta1"] * m[i] + (1 - h["beta1"]) * g[i]
            v[i] = h["beta2"] * v[i] + (1 - h["beta2"]) * g[i] ** 2
            r = (m[i] / (1 - h["beta1"] ** t)) / (np.sqrt(v[i] / (1 - h["beta2"] ** t)) + h["eps"])
            u = r + h["weight_decay"] * x
            after.append(x - h["lr"] * float(np.linalg.norm(x)) / float(np.linalg.norm(u)) * u)
        p = after
        yield p


def dadapt_adam(p: Arrays, h: dict[str, float], grads: Iterator[Arrays]) -> Oracle:
    """Algorithm 5 of the paper."""
    m, v, s = ([np.zeros_like(x) for x in p] for _ in range(3))
    d, r, decay = h["d0"], 0.0, math.sqrt(h["beta2"])
    for g in grads:
        rate = d * h["lr"]
        g = [k + h["weight_decay"] * x for k, x in zip(g, p, strict=True)]
        inner = sum(float(np.dot(k, own / (np.sqrt(b) + h["eps"]))) for k, own, b in zip(g, s, v, strict=True))
        r = decay * r + (1 - decay) * rate * inner
        m = [h["beta1"] * own + (1 - h["beta1"]) * rate * k for own, k in zip(m, g, strict=True)]
        v = [h["beta2"] * own + (1 - h["beta2"]) * k**2 for own, k in zip(v, g, strict=True)]
        s = [decay * own + (1 - decay) * rate * k for own, k in zip(s, g, strict=True)]
        estimate = r / ((1 - decay) * sum(float(np.abs(own).sum()) for own in s))
        d = max(d, min(estimate, d * h["growth_rate"]))
        p = [x - a / (np.sqrt(b) + h["eps"]) for x, a, b in zip(p, m, v, strict=True)]
        yield p


def adopt(p: Arrays, h: dict[str, float], grads: Iterator[Arrays]) -> Oracle:
    """Algorithm 2 of the paper, its clipping at the fourth root of the steps before."""
    v = []
    m = [np.zeros_like(x) for x in p]
    for t, g in enumerate(grads):
        g = [k + h["weight_decay"] * x for k, x in zip(g, p, strict=True)]
        if t == 0:
            v = [k**2 for k in g]
        else:
            limit = t**0.25
            for i, k in enumerate(g):
                m[i] = h["beta1"] * m[i] + (1 - h["beta1"]) * np.clip(
                    k / np.maximum(np.sqrt(v[i]), h["eps"]), -limit, limit
                )
                v[i] = h["beta2"] * v[i] + (1 - h["beta2"]) * k**2
            p = [x - h["lr"] * own for x, own in zip(p, m, strict=True)]
        yield p


def centralized_ranger(p: Arrays, h: dict[str, float], grads: Iterator[Arrays]) -> Oracle:
    """RAdam's Algorithm 2 on gradients without their mean, within Lookahead's Algorithm 1."""
    m, v = ([np.zeros_like(x) for x in p] for _ in range(2))
    slow = [x.copy() for x in p]
    b1, b2 = h["beta1"], h["beta2"]
    for t, g in enumerate(grads, 1):
        for i, k in enumerate(g):
            k = k - k.mean()
            m[i] = b1 * m[i] + (1 - b1) * k
            v[i] = b2 * v[i] + (1 - b2) * k * k
            most = 2 / (1 - b2) - 1
            length = most - 2 * t * b2**t / (1 - b2**t)
            step = m[i] / (1 - b1**t)
            if length > h["N_sma_threshhold"]:
                r = math.sqrt((length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length))
                step = r * step * math.sqrt(1 - b2**t) / (np.sqrt(v[i]) + h["eps"])
            p[i] = (1 - h["lr"] * h["weight_decay"]) * p[i] - h["lr"] * step
            if t % h["k"] == 0:
                slow[i] = (1 - h["alpha"]) * slow[i] + h["alpha"] * p[i]
                p[i] = slow[i].copy()
        yield p


def ademamix(p: Arrays, h: dict[str, float], grads: Iterator[Arrays]) -> Oracle:
    """The paper's Algorithm 1, whose β3 is that of a half-life that grows linearly."""
    fast, slow, v = ([np.zeros_like(x) for x in p] for _ in range(3))
    for t, g in enumerate(grads, 1):
        share = min(t / h["T"], 1)
        half_life = [math.log(0.5) / math.log(h[b]) for b in ("β1", "β3")]
        β3 = 0.5 ** (1 / ((1 - share) * half_life[0] + share * half_life[1]))
        for i, k in enumerate(g):
            fast[i] = h["β1"] * fast[i] + (1 - h["β1"]) * k
            slow[i] = β3 * slow[i] + (1 - β3) * k
            v[i] = h["β2"] * v[i] + (1 - h["β2"]) * k * k
            root = np.sqrt(v[i] / (1 - h["β2"] ** t)) + h["eps"]
            mixed = fast[i] / (1 - h["β1"] ** t) + h["α"] * share * slow[i]
            p[i] = p[i] - h["lr"] * (mixed / root + h["weight_decay"] * p[i])
        yield p


def irprop(p: Arrays, h: dict[str, float], grads: Iterator[Arrays]) -> Oracle:
    """Riedmiller and Braun's Rprop, element by element, without the way back."""
    step = [np.full_like(x, h["delta_0"]) for x in p]
    last = [np.zeros_like(x) for x in p]
    for g in grads:
        for x, k, own, before in zip(p, g, step, last, strict=True):
            for j in range(x.size):
                slope = k[j]
                if before[j] * slope > 0:
                    own[j] = min(own[j] * h["η_plus"], h["delta_max"])
                elif before[j] * slope < 0:
                    own[j] = max(own[j] * h["η_minus"], h["delta_min"])
                    slope = 0.0
                x[j] -= math.copysign(own[j], slope) if slope != 0 else 0.0
                before[j] = slope
        yield p


def mars_adamw(p: Arrays, h: dict[str, float], grads: Iterator[Arrays]) -> Oracle:
    """The paper's Algorithm 2, with the gradient before in the place of the one at the weights before."""
    m, v = ([np.zeros_like(x) for x in p] for _ in range(2))
    last: Arrays = []
    b1, b2 = h["β1"], h["β2"]
    for t, g in enumerate(grads, 1):
        last = last or g
        for i, k in enumerate(g):
            c = k + h["γ"] * b1 / (1 - b1) * (k - last[i])
            c = c / max(float(np.linalg.norm(c)), 1)
            m[i] = b1 * m[i] + (1 - b1) * c
            v[i] = b2 * v[i] + (1 - b2) * c**2
            u = m[i] / (1 - b1**t) / (np.sqrt(v[i] / (1 - b2**t)) + h["eps"])
            p[i] = p[i] - h["lr"] * (u + h["weight_decay"] * p[i])
        last = g
        yield p


ORACLES: dict[str, tuple[Callable[..., Oracle], dict[str, Any]]] = {
    "prodigy": (prodigy, {}),
    "swats": (swats, {}),
    "schedule_free_adamw": (schedule_free_adamw, {}),
    "timm_lamb": (timm_lamb, {}),
    "dadapt_adam": (dadapt_adam, {}),
    "adopt": (adopt, {}),
    "centralized_ranger": (centralized_ranger, {}),
    "ademamix": (ademamix, {}),
    "irprop": (irprop, {}),
    "mars_adamw": (mars_adamw, {}),
}


@pytest.mark.parametrize("name", ORACLES)
def test_rule_equals_its_oracle(name: str) -> None:
    oracle, options = ORACLES[name]
    rng = np.random.default_rng(11)
    first = start(rng, np.float64)
    steps = [[spread(rng, size, np.float64) for size in SIZES] for _ in range(STEPS)]
    optimizer = of.Optimizer([p.copy() for p in first], RULES[name], target="numpy", **settings(name), **options)
    longest = [0.0] * len(first)
    expected = oracle([p.copy() for p in first], settings(name), iter(steps))
    for t, (grads, theirs) in enumerate(zip(steps, expected, strict=True), 1):
        before = [p.copy() for p in optimizer.params]
        optimizer.step([g.copy() for g in grads])
        for k, (own, other) in enumerate(zip(optimizer.params, theirs, strict=True)):
            longest[k] = max(longest[k], float(np.abs(own - before[k]).max()))
            unit = np.finfo(own.dtype).eps * (np.maximum(np.abs(own), np.abs(before[k])) + longest[k])
            assert (np.abs(own - other) <= ALLOWED * unit).all(), f"step {t}, size {own.size}"
    assert longest[-1] > 1e-3
