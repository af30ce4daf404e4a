"""Random rules against an oracle: runs them on NumPy, in C and on an emulated GPU, and compares every bit.

    python tests/fuzz.py                              # 1,000 rules on the targets numpy and c
    python tests/fuzz.py --n 10000 --seed 5           # more, and others
    python tests/fuzz.py --n 200 --target cuda        # the CUDA target, on the emulation; `all` is both
    python tests/fuzz.py --keep-going                 # go on behind a failure; at the end a count of each kind

Run it after a change of anything between a rule's text and the emitted files, and with another seed now and then. Rule k
of a seed is the same whatever else is run (and until `fuzzing/author.py` changes). `make test` runs a few hundred of them.

What happens to each rule:

* `fuzzing/author.py` writes a text, a rule with up to three transforms before it, from the whole of the language: names
  bound again and again, names that C, C++, CUDA and their macros claim, names of other parts, reductions over reductions,
  scalar state, static options, conditions in each other; and circumstances: sizes, dtypes, special values, groups,
  missing gradients, grad_scale, skip_nonfinite, zero_grads, statistics, threads, settings that change between steps, a
  compiler with its flags (gcc or clang, -O0 to -O3 -march=native, half of them with -Wall -Wextra -Werror).
* `fuzzing/oracle.py` evaluates the text with Python's `ast` on NumPy arrays and Python floats. It shares nothing with
  optforge. exp, log and tanh have an error bound instead of bits: of elements they are only used where no last bit of
  them can show, as in sign(tanh(x)); of scalars they have the bits of the platform's libm, on the emulated GPU as well.
* `fuzzing/trial.py` runs it on the targets and compares parameters, state, t, gradients and statistics with the oracle
  after each step, in bits, and `rule.function` where there is no reduction over all tensors. Where the oracle has an
  error, every target must have one and must have left everything as it was; where it has none, no target may.

What fails is made smaller (`fuzzing/shrink.py`) while its kind stays the same, which is the text in front of the colon and
behind it, and is printed with the command that repeats it. A text that the language refuses is a mistake of the author:
it is counted and shown, and is an error where it is more than 2 % of all. Exit code 1 says that something failed.

    python tests/fuzz.py --save DIR …                 # keeps the small cases as JSON
    python tests/fuzz.py --case DIR/0-17-numpy-c.json # runs one of them again

A kind that is known and not mended yet hides others. `--keep-going` counts it and goes on (`--each 3` shrinks the first
three of a kind), and `--without` leaves out what it needs: foreign (letters beyond Latin, Greek and Cyrillic), zero (state
that starts as -0.0), arrays (transforms that bind a p or g which they do not return), warnings (-Wall -Wextra -Werror).
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "support"))

from fuzzing.shrink import shrink
from fuzzing.worker import Worker, serve, workers

BATCH = 32  # rules that are compiled together


def main(arguments: list[str] | None = None) -> int:
    """Run cases; 0 where none failed, 1 where one did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000, help="number of rules")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first rule")
    parser.add_argument("--target", choices=("numpy", "c", "cuda", "all"), default="c")
    parser.add_argument("--keep-going", action="store_true", help="go on behind a failure")
    parser.add_argument(
        "--shrink", type=float, default=300, metavar="SECONDS", help="time for making a failure smaller"
    )
    parser.add_argument("--each", type=int, default=1, help="with --keep-going, how many of a kind are made smaller")
    parser.add_argument("--without", default="", metavar="NAMES", help="leave out features: foreign,arrays,…")
    parser.add_argument("--case", type=Path, help="run the case of a JSON file")
    parser.add_argument("--save", type=Path, help="a directory for the cases that fail, as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.serve:
        serve(asked.serve)
        return 0
    with workers(asked.target) as running:
        return Session(asked, running).run()


class Session:
    """A run over cases."""

    def __init__(self, asked: argparse.Namespace, running: list[Worker]):
        self.asked, self.running = asked, running
        self.kinds: collections.Counter[str] = collections.Counter()
        self.where: dict[str, list[int]] = collections.defaultdict(list)
        self.done = 0
        self.start = time.monotonic()

    def run(self) -> int:
        """All cases."""
        asked = self.asked
        if asked.case:
            case = json.loads(asked.case.read_text(encoding="utf-8"))
            return int(self.judge([worker.run(case) for worker in self.running], "the case"))
        without = [name for name in asked.without.split(",") if name]
        numbers = range(asked.first, asked.first + asked.n)
        for start in range(0, len(numbers), BATCH):
            batch = numbers[start : start + BATCH]
            answers = [worker.run_all(asked.seed, batch, without) for worker in self.running]
            for number, *own in zip(batch, *answers, strict=True):
                if self.judge(own, f"rule {number}", number) and not asked.keep_going:
                    return 1
            self.progress()
        return self.summary()

    def judge(self, answers: list[dict[str, Any]], name: str, number: int = 0) -> bool:
        """What came of a case on all workers; whether it failed."""
        self.done += 1
        failed = False
        for worker, answer in zip(self.running, answers, strict=True):
            kind = answer.get("kind")
            if kind is None:
                continue
            refused = kind.startswith("refused")
            self.kinds[kind] += 1
            self.where[kind].append(number)
            if self.kinds[kind] <= self.asked.each:
                self.show(worker, answer, name, number)
            failed = failed or not refused
            if refused:
                break
        return failed

    def show(self, worker: Worker, answer: dict[str, Any], name: str, number: int) -> None:
        """Make a failure small, and print it."""
        kind, case = answer["kind"], answer["case"]
        refused = kind.startswith("refused")
        last = answer
        # Where the reference is wrong as well, nothing needs to be compiled.
        alone = " numpy c" in kind
        wanted = kind.replace(" numpy c", " numpy") if alone else kind

        def fails(candidate: dict[str, Any]) -> bool:
            nonlocal last
            got = worker.run(candidate, ["numpy"] if alone else None)
            if got.get("kind") == wanted:
                last = got
                return True
            return False

        print(f"\n══ {name} of seed {self.asked.seed}: {kind}", file=sys.stderr, flush=True)
        small = case if refused else shrink(case, fails, self.asked.shrink)
        if self.asked.save:
            self.asked.save.mkdir(parents=True, exist_ok=True)
            path = self.asked.save / f"{self.asked.seed}-{number}-{worker.targets.replace(',', '-')}.json"
            path.write_text(json.dumps(small, indent=1, ensure_ascii=False), encoding="utf-8")
        rest = {key: value for key, value in small.items() if key != "text"}
        text = "\n".join(line for line in small["text"].split("\n") if not line.startswith("from optforge"))
        without = f" --without {self.asked.without}" if self.asked.without else ""
        print(f"══ {name} of seed {self.asked.seed}: {kind}")
        print(text.strip())
        print(json.dumps(rest, ensure_ascii=False))
        print(last["message"].strip()[-1500:])
        if not self.asked.case:
            target = self.asked.target
            print(
                f"again: python tests/fuzz.py --seed {self.asked.seed} --first {number} --n 1 --target {target}{without}"
            )
        print(flush=True)

    def progress(self) -> None:
        """How far it is, on standard error."""
        if not self.asked.quiet:
            passed = time.monotonic() - self.start
            failures = sum(count for kind, count in self.kinds.items() if not kind.startswith("refused"))
            rate = 60 * self.done / max(passed, 1e-3)
            end = "\r" if sys.stderr.isatty() else "\n"
            if end == "\r" or self.done % (4 * BATCH) == 0:
                text = f"{self.done}/{self.asked.n} rules, {failures} failures, {rate:.0f} a minute"
                print(text, end=end, file=sys.stderr, flush=True)

    def summary(self) -> int:
        """Counts of each kind; the exit code."""
        refused = sum(count for kind, count in self.kinds.items() if kind.startswith("refused"))
        for kind, count in self.kinds.most_common():
            numbers = ", ".join(map(str, self.where[kind][:8]))
            print(f"{count:6d}  {kind}   ({numbers}{', …' if count > 8 else ''})")
        passed = time.monotonic() - self.start
        print(f"{self.done} rules in {passed:.0f} s, {refused} of them refused, which is a mistake of the author")
        if refused > max(2, 0.02 * self.done):
            print("more than 2 % of the texts are refused")
            return 1
        return int(any(not kind.startswith("refused") for kind in self.kinds))


if __name__ == "__main__":
    sys.exit(main())
