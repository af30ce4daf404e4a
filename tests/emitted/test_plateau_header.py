"""The emitted plateau.h: as an engine includes it, with the learning rates of the Python class to the bit."""

from __future__ import annotations

import itertools
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest

from conftest import require
from optforge import ReduceLROnPlateau
from optforge.cli.companions import COMPANIONS
from optforge.cli.generate import emit
from optforge.core.diagnostics import UsageError
from optforge.core.formats import Wanted
from plateaus import SETTINGS, One, both_bounds, metrics

WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror")
C = ("gcc", "-std=c99")
CXX = ("g++", "-std=c++11", "-Wold-style-cast", "-Wsign-conversion")
CLANG = ("clang", "-std=c99", "-Wsign-conversion")
BUILDS = {
    "c99": (*C, "-O2", "-Wsign-conversion"),
    "c++11": (*CXX, "-O2"),
    "c99-O0": (*C, "-O0"),
    "gnu17": ("gcc", "-std=gnu17", "-O2"),  # where contraction to FMA is the default
    "native": ("gcc", "-std=gnu17", "-O3", "-march=native"),
    "c++20": ("g++", "-std=c++20", "-O3", "-march=native"),
    "clang": (*CLANG, "-O2"),
}

# Reads a line of settings, then metrics; answers each with status, rate, best, bad steps and cooldown.
DRIVER = r"""
#include "P.h"
#include "P.h"
#include <inttypes.h>
#include <stdio.h>

int main(void) {
    P_options options;
    P_state state;
    double lr, metric;
    int keras, defaults;
    if (scanf("%d %d %lf", &keras, &defaults, &lr) != 3)
        return 2;
    if (keras)
        P_options_init_keras(&options);
    else
        P_options_init(&options);
    if (!defaults) {
        if (scanf("%lf %lf %lf %lf %" SCNu64 " %" SCNu64 " %d %d", &options.factor, &options.threshold, &options.min_lr,
                  &options.eps, &options.patience, &options.cooldown, &options.mode, &options.threshold_mode) != 8)
            return 3;
    }
    int status = P_init(&state, lr, &options);
    printf("%d %s\n", status, P_strerror(status));
    while (status == P_OK && scanf("%lf", &metric) == 1) {
        const int done = P_step(&state, metric);
        printf("%d %a %a %" PRIu64 " %" PRIu64 "\n", done, P_lr(&state), state.best, state.bad_steps, state.cooldown_left);
    }
    return 0;
}
"""


def build(directory: Path, how: tuple[str, ...], prefix: str = "plateau", source: str = DRIVER) -> Path:
    """A program that includes the header; any warning is an error."""
    compiler, *flags = how
    path = require(compiler)
    given = None if prefix == "plateau" else prefix
    for name, text in emit([COMPANIONS["plateau"]], ["c"], Wanted(), [], given).items():
        (directory / name).write_text(text)
    main = directory / ("main.cpp" if "++" in compiler else "main.c")
    main.write_text(source.replace("P_", f"{prefix}_").replace("P.h", f"{prefix}.h"))
    command = [path, *flags, *WARNINGS, main.name, "-o", "main"]
    answer = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return directory / "main"


def answers(program: Path, *lines: str) -> list[list[str]]:
    """What a program says to these lines, each answer in words."""
    done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


def configured(rate: float, counting: str, settings: dict[str, Any]) -> str:
    """The first line for the program."""
    mode, threshold_mode = settings["mode"] == "max", settings["threshold_mode"] == "abs"
    numbers = [settings[name].hex() for name in ("factor", "threshold", "min_lr", "eps")]
    counts = [settings["patience"], settings["cooldown"], int(mode), int(threshold_mode)]
    return " ".join(map(str, [int(counting == "keras"), 0, rate.hex(), *numbers, *counts]))


@pytest.fixture(scope="module")
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, built in one way."""
    return build(tmp_path_factory.mktemp("built"), BUILDS[request.param])


@pytest.mark.parametrize("program", BUILDS, indirect=True)
@pytest.mark.parametrize("counting", ["torch", "keras"])
def test_the_same_rates_to_the_bit(program: Path, counting: str) -> None:
    reduced = 0
    for seed, given in enumerate(SETTINGS):
        settings = given | {"min_lr": both_bounds(given)[seed % 2]}
        series = list(metrics(seed, 200, settings["mode"]))
        said, *steps = answers(program, configured(0.1, counting, settings), *map(float.hex, series))
        assert said == ["0", "done"]
        ours = One(0.1)
        plateau = ReduceLROnPlateau(ours, counting=counting, **settings)
        for metric, (status, *found) in zip(series, steps, strict=True):
            done = plateau.step(metric)
            rate, best = map(float.fromhex, found[:2])
            assert (rate, best) == (ours.lr, plateau.best)
            assert [int(count) for count in found[2:]] == [plateau.num_bad_steps, plateau.cooldown_left]
            assert int(status) == -done
            reduced += done
    assert reduced > 400


@pytest.mark.parametrize("program", ["c99"], indirect=True)
@pytest.mark.parametrize("counting", ["torch", "keras"])
def test_the_defaults(program: Path, counting: str) -> None:
    series = [1.0, 0.99995, 0.9998, *[0.9999] * 130]
    _, *steps = answers(program, f"{int(counting == 'keras')} 1 {(0.02).hex()}", *map(float.hex, series))
    ours = One(0.02)
    own = {"threshold_mode": "abs", "eps": 0} if counting == "keras" else {}
    plateau = ReduceLROnPlateau(ours, counting=counting, **own)
    for metric, found in zip(series, steps, strict=True):
        plateau.step(metric)
        assert float.fromhex(found[1]) == ours.lr
    assert ours.lr < 1e-12 if counting == "keras" else 1e-9 < ours.lr < 1e-8  # PyTorch's eps ends it


@pytest.mark.parametrize("program", ["c99", "c++11"], indirect=True)
def test_mistakes_change_nothing(program: Path) -> None:
    settings: dict[str, Any] = {
        "factor": 0.5,
        "threshold": 0.1,
        "min_lr": 0.0,
        "eps": 0.0,
        "patience": 3,
        "cooldown": 0,
        "mode": "min",
        "threshold_mode": "abs",
    }
    _, good, *refused, after = answers(program, configured(0.1, "torch", settings), "1", "nan", "-inf", "-nan", "2")
    assert [status for status, *_ in refused] == ["9"] * 3
    assert all(state == good[1:] for _, *state in refused)
    assert after[0] == "0" and after[3] == "1"
    for change, status in [
        ({"factor": 1.0}, 4),
        ({"factor": 0.0}, 4),
        ({"factor": math.nan}, 4),
        ({"threshold": -1.0}, 5),
        ({"threshold": math.inf}, 5),
        ({"threshold": 1.0, "threshold_mode": "rel"}, 5),
        ({"min_lr": -1e-9}, 6),
        ({"min_lr": math.nan}, 6),
        ({"eps": -1e-9}, 7),
        ({"eps": math.inf}, 7),
    ]:
        ((found, *text),) = answers(program, configured(0.1, "torch", settings | change))
        assert int(found) == status
        assert next(iter(change)) in text
    for rate in (math.nan, math.inf, -math.inf):
        ((found, *text),) = answers(program, configured(rate, "torch", settings))
        assert (found, " ".join(text)) == ("8", "the learning rate is not finite")


MISUSE = r"""
#include "P.h"
#include <string.h>

#define EXPECT(condition) if (!(condition)) return __LINE__

int main(void) {
    P_options options;
    P_state state, before;
    EXPECT(P_init(NULL, 0.1, NULL) == P_ERROR_NULL);
    EXPECT(P_step(NULL, 0.1) == P_ERROR_NULL);
    memset(&state, 0, sizeof state);
    EXPECT(P_step(&state, 0.1) == P_ERROR_SIZE);
    memset(&options, 0, sizeof options);
    EXPECT(P_init(&state, 0.1, &options) == P_ERROR_SIZE);
    EXPECT(state.size == 0);
    P_options_init(&options);
    EXPECT(options.size == sizeof options && P_check(&options) == P_OK);
    options.mode = 2;
    EXPECT(P_init(&state, 0.1, &options) == P_ERROR_CHOICE);
    options.mode = P_MAX;
    options.counting = -1;
    EXPECT(P_init(&state, 0.1, &options) == P_ERROR_CHOICE);
    options.counting = P_KERAS;
    options.threshold_mode = 7;
    EXPECT(P_init(&state, 0.1, &options) == P_ERROR_CHOICE);
    options.threshold_mode = P_REL;
    options.patience = 1;
    EXPECT(P_init(&state, 0.5, &options) == P_OK);
    before = state;
    EXPECT(P_step(&state, HUGE_VAL) == P_ERROR_METRIC);
    EXPECT(memcmp(&state, &before, sizeof state) == 0);
    EXPECT(P_step(&state, -HUGE_VAL) == P_REDUCED && state.best == -HUGE_VAL);
    EXPECT(P_step(&state, 1.0) == P_OK);
    before = state;                                  /* a copy resumes */
    EXPECT(P_step(&state, 1.0) == P_REDUCED);
    EXPECT(P_step(&before, 1.0) == P_REDUCED);
    EXPECT(memcmp(&state, &before, sizeof state) == 0);
    state.lr = 3.0;                                  /* the rate may be set */
    EXPECT(P_step(&state, 1.0) == P_REDUCED && P_lr(&state) == 3.0 * 0.1);
    EXPECT(strcmp(P_strerror(P_REDUCED), "the learning rate was reduced") == 0);
    EXPECT(strcmp(P_strerror(99), "unknown status") == 0);
    EXPECT(P_init(&state, 0.1, NULL) == P_OK && state.options.patience == 10);
    return 0;
}
"""


@pytest.mark.parametrize(("how", "prefix"), [(C, "plateau"), (CXX, "plateau"), (C, "_mine"), (CXX, "patience" * 12)])
def test_misuse_and_a_prefix(how: tuple[str, ...], prefix: str, tmp_path: Path) -> None:
    program = build(tmp_path, (*how, "-O1"), prefix, MISUSE)
    done = subprocess.run([program], check=False)
    assert done.returncode == 0, f"line {done.returncode}"


def test_two_prefixes_in_one_file(tmp_path: Path) -> None:
    for name, text in emit([COMPANIONS["plateau"]], ["c"], Wanted(), [], "other").items():
        (tmp_path / name).write_text(text)
    source = '#include "P.h"\n#include "other.h"\nint main(void) { return P_OK + other_OK; }\n'
    for how in (C, CXX):
        build(tmp_path, how, source=source)


@pytest.mark.parametrize("flag", ["-ffast-math", "-ffinite-math-only"])
def test_fast_math_is_refused(flag: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"include plateau\.h in files compiled without -ffast-math"):
        build(tmp_path, (*C, flag))


# ── as text ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_text() -> None:
    ((name, text),) = emit([COMPANIONS["plateau"]], ["c"], Wanted(), [], None).items()
    assert name == "plateau.h"
    assert text.startswith("/* plateau: Reduces a learning rate when a metric stops improving.\n")
    assert " * Re-create: optforge generate plateau\n" in text
    assert " * Generated by optforge. This file may be used, changed and distributed without restriction.\n" in text
    assert not any(line != line.rstrip() or len(line) > 120 for line in text.splitlines())
    assert "\n\n\n" not in text and text.endswith("#endif /* plateau_H */\n")
    ((name, other),) = emit([COMPANIONS["plateau"]], ["c"], Wanted(), [], "mine").items()
    assert name == "mine.h"
    assert " * Re-create: optforge generate plateau --prefix mine\n" in other
    names = other.replace("state plateau;", "").replace("&plateau", "").replace("generate plateau", "")
    assert "plateau" not in names


def test_what_is_refused() -> None:
    plateau = COMPANIONS["plateau"]
    with pytest.raises(UsageError, match="the prefix '9' is no C identifier"):
        emit([plateau], ["c"], Wanted(), [], "9")
    with pytest.raises(UsageError, match="there is nothing to set"):
        emit([plateau], ["c"], Wanted(), ["patience=3"], None)
    with pytest.raises(UsageError, match="there is no target 'd'"):
        emit([plateau], ["d"], Wanted(), [], None)
    for first, second in itertools.permutations([plateau, plateau]):
        with pytest.raises(UsageError, match="--prefix names the files of one rule"):
            emit([first, second], ["c"], Wanted(), [], "mine")
