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
from collections.abc import Iterator, Mapping
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
            case = asked.get("case") or Author(asked["seed"], asked["number"], frozenset(asked["without"])).case()
            outcome = bench.run(case, asked.get("targets"))
            answers.write(json.dumps({**outcome, **({"case": case} if outcome else {})}) + "\n")
            answers.flush()


class Worker:
    """A worker process for some targets; started when it is asked, and again after it ended."""

    def __init__(self, targets: str, environment: Mapping[str, str] | None = None):
        self.targets, self.environment = targets, environment
        self.process: subprocess.Popen[str] | None = None
        self.answered = 0

    def ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What came of a case."""
        if self.process is None or self.answered >= CASES:
            self.start()
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        self.answered += 1
        try:
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
            ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
            line = self.process.stdout.readline() if ready else ""
        except BrokenPipeError:
            ready, line = [True], ""  # type: ignore[list-item]
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        said = ""
        self.process.kill()
        status = self.process.wait()
        self.log.seek(0)
        said = self.log.read()[-2000:]
        self.process = None
        what = f"ended with status {status}" if ready else f"gave no answer in {SECONDS} s"
        case = asked.get("case") or Author(asked["seed"], asked["number"], frozenset(asked["without"])).case()
        return {"kind": f"died: {self.targets} {what}", "message": f"the process {what}\n{said}", "case": case}

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
        "import sys",
        f"sys.path[:0] = [{str(HERE)!r}]",
        "import emulation",
        "kept = [flag for flag in emulation.FLAGS if flag != '-O1' and 'sanitize' not in flag]",
        "emulation.FLAGS = (*kept, '-O0')",
        "from emulation import nvcc",
        "nvcc.main(sys.argv[1:])",
    ]
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    script.chmod(0o755)
