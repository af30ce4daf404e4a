"""A process that runs cases, so that a kernel that crashes or hangs ends it and not the fuzzer."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import emulation

from .author import Author, Case

HERE = Path(__file__).parents[1]
SECONDS = 300  # for a case; only what hangs needs as long
CASES = 400  # before a worker is replaced: libraries are never unloaded


def serve(targets: str) -> None:
    """Answer cases on standard input, a line each, until it ends."""
    from .trial import Bench

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what kernels print is no answer
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        bench = Bench(targets.split(","), Path(directory))
        for line in sys.stdin:
            asked = json.loads(line)
            if "case" in asked:
                cases, outcomes = [asked["case"]], [bench.run(asked["case"], asked.get("targets"))]
            else:
                cases = [written(asked["seed"], number, asked["without"]) for number in asked["numbers"]]
                outcomes = bench.run_all(cases)
            told = [{**outcome, "case": case} if outcome else {} for case, outcome in zip(cases, outcomes, strict=True)]
            answers.write(json.dumps(told) + "\n")
            answers.flush()


def written(seed: int, number: int, without: Sequence[str]) -> Case:
    """A case of a seed."""
    return Author(seed, number, frozenset(without)).case()


class Worker:
    """A worker process for some targets; started when it is asked, and again after it ended."""

    def __init__(self, targets: str, environment: Mapping[str, str] | None = None):
        self.targets, self.environment = targets, environment
        self.process: subprocess.Popen[str] | None = None
        self.answered = 0

    def run(self, case: Case, targets: Sequence[str] | None = None) -> dict[str, Any]:
        """What came of a case, on some of the targets alone: {} or the kind and the message of a failure."""
        answers = self.ask({"case": case, "targets": targets}, 1)
        if isinstance(answers, str):
            return {**died(self.targets, answers), "case": case}
        return answers[0]

    def run_all(self, seed: int, numbers: Sequence[int], without: Sequence[str]) -> list[dict[str, Any]]:
        """What came of the cases of these numbers."""
        answers = self.ask({"seed": seed, "numbers": list(numbers), "without": list(without)}, len(numbers))
        if isinstance(answers, str):  # one of them has ended the process
            return [self.run(written(seed, number, without)) for number in numbers]
        return answers

    def ask(self, asked: dict[str, Any], count: int) -> list[dict[str, Any]] | str:
        """What the process answers; or how it ended, with what it said."""
        if self.process is None or self.answered >= CASES:
            self.start()
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        self.answered += count
        ready, line = True, ""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
            ready = bool(select.select([self.process.stdout], [], [], SECONDS + count * SECONDS / 10)[0])
            line = self.process.stdout.readline() if ready else ""
        if line:
            answers: list[dict[str, Any]] = json.loads(line)
            return answers
        self.process.kill()
        status = self.process.wait()
        self.log.seek(0)
        said = self.log.read()[-2000:]
        self.process = None
        return f"{f'ended with status {status}' if ready else 'gave no answer'}\n{said}"

    def start(self) -> None:
        """Start the process, anew if it runs."""
        self.stop()
        command = [sys.executable, str(HERE / "fuzz.py"), "--serve", self.targets]
        environment = {**(self.environment or os.environ), "OMP_WAIT_POLICY": "passive"}
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - kept with the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )
        self.answered = 0

    def stop(self) -> None:
        """End the process."""
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.wait()
            self.process = None


def died(targets: str, how: str) -> dict[str, Any]:
    """The outcome of a case that ended its process."""
    return {"kind": f"died: {targets} {how.splitlines()[0]}", "message": f"the process {how}"}


@contextlib.contextmanager
def workers(target: str) -> Iterator[list[Worker]]:
    """The processes that a target needs: NumPy and C in one, CUDA, emulated, in another."""
    directory = Path(tempfile.mkdtemp(prefix="fuzz-emulated-"))
    made = []
    if target in ("c", "all"):
        made.append(Worker("numpy,c"))
    if target == "numpy":
        made.append(Worker("numpy"))
    if target in ("cuda", "all"):
        emulation.build_driver(directory)
        fast_nvcc(directory)
        made.append(Worker("cuda", emulation.environment(directory)))
    try:
        yield made
    finally:
        for worker in made:
            worker.stop()
        shutil.rmtree(directory)


def fast_nvcc(directory: Path) -> None:
    """The emulated nvcc without optimisation and instrumentation: compiling takes most of the time."""
    script = directory / "nvcc"
    lines = [
        f"#!{sys.executable}",
        "import os, sys",
        "os.environ['OPTFORGE_TEST_STORE'] = ''",  # objects of so many rules are not kept
        f"sys.path[:0] = [{str(HERE)!r}]",
        "import emulation",
        "emulation.FLAGS = tuple(flag for flag in emulation.FLAGS if 'sanitize' not in flag)",
        "from emulation import nvcc",
        "nvcc.LEVEL = '-O0'",
        "nvcc.main(sys.argv[1:])",
    ]
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    script.chmod(0o755)
