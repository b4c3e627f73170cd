"""Generated from chapters/09_evaluation.py by chapters/export.py; edit the chapter."""

__all__ = [
    "pass_at_k",
    "PASSED",
    "Outcome",
    "run_program",
    "Problem",
    "json_rows",
    "read_humaneval",
    "read_mbpp",
    "solve",
    "pass_rate",
]


# ---------- chapters/09_evaluation.py · Programs that run

import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import index
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from llama2lib.continuations import over_ranks
from llama2lib.corpus import records


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k programs passes, where c of n did: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, eq. 1).

    ValueError unless 0 <= c <= n and 1 <= k <= n; TypeError for what is no whole number.
    """
    n, c, k = index(n), index(c), index(k)
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"n = {n}, c = {c}, k = {k}: expected 0 <= c <= n programs that pass, and 1 <= k <= n")
    choices = math.comb(n, k)
    return (choices - math.comb(n - c, k)) / choices

PASSED = 113  # exit status behind the last line of a program
_RUNNER = """
import os, resource, sys
memory, seconds, files = map(int, sys.argv[1:])
for limit, most in (
    (resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_FSIZE, files),
    (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0),
):
    try:
        resource.setrlimit(limit, (most, most))
    except (ValueError, OSError):
        pass  # macOS has no limit of memory
with open("program.py", encoding="utf-8") as file:
    source = file.read()
sys.argv = ["program.py"]
exec(compile(source, "program.py", "exec"), {"__name__": "program"})
sys.stdout.flush(), sys.stderr.flush()
os._exit(PASSED)
"""


class Outcome(NamedTuple):
    "Whether a program ran to its end; why not, in a line; and the beginning of what it wrote."

    passed: bool
    reason: str
    output: str


def run_program(
    code: str, timeout: float = 3.0, memory: int = 2**30, output: int = 4096, file_size: int = 2**24
) -> Outcome:
    """Run Python code in a process of its own, and see whether it reaches its end (POSIX).

    timeout: seconds, after which it and its children are killed; memory: bytes of address space; output: characters
    kept of what it writes to stdout and stderr; file_size: bytes of a file that it writes.
    The program has no input, an empty folder, and an environment of four variables. This is no sandbox: it stops
    accidents, not a program that means harm, which may still use the network and read files.
    """
    with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder:
        try:
            Path(folder, "program.py").write_text(code, "utf-8")
        except UnicodeEncodeError:
            return Outcome(False, "half a surrogate pair: not Unicode text", "")
        limits = [str(int(limit)) for limit in (memory, math.ceil(timeout) + 1, file_size)]
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _RUNNER.replace("PASSED", str(PASSED)), *limits],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}, start_new_session=True,
        )  # fmt: skip
        kept = bytearray()

        def read():
            with process.stdout as pipe:
                while chunk := pipe.read1(65536):
                    kept.extend(chunk[: 4 * output - len(kept)])

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass  # it has ended, and left no children
            process.wait()
        reader.join(1)
    text = bytes(kept).decode("utf-8", "replace")[:output]
    if status is None:
        return Outcome(False, f"did not end in {timeout:g} s", text)
    if status == PASSED:
        return Outcome(True, "passed", text)
    if status < 0:
        return Outcome(False, f"killed by {signal.Signals(-status).name}", text)
    last = text.strip().splitlines()[-1:] if status else ["ended before its last line"]
    return Outcome(False, (last or [f"exit status {status}"])[0][:200], text)

class Problem(NamedTuple):
    "What a model continues, up to one of the stops; the program is `before`, that continuation, and `tests`."

    name: str
    prompt: str
    before: str
    tests: str
    until: tuple[str, ...]


def json_rows(path: str | os.PathLike, **fields: type) -> list[dict]:
    "The objects of a JSONL file that have these fields. ValueError with file, line and field."
    rows = []
    for number, row in records(path):
        for name, kind in fields.items():
            if not isinstance(row, dict) or not isinstance(row.get(name), kind):
                found = f"{row.get(name)!r:.60}" if isinstance(row, dict) else f"{row!r:.60}"
                raise ValueError(f"{path}:{number}: field {name!r} is {found}; expected a {kind.__name__}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: empty; expected a JSON object a line")
    return rows


def read_humaneval(path: str | os.PathLike) -> list[Problem]:
    "The problems of HumanEval.jsonl, or .jsonl.gz. ValueError with file and line for another format."
    rows = json_rows(path, task_id=str, prompt=str, entry_point=str, test=str)
    until = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # Chen et al., section 2.1
    tests = [f"\n{row['test']}\ncheck({row['entry_point']})\n" for row in rows]
    return [Problem(row["task_id"], *[row["prompt"]] * 2, test, until) for row, test in zip(rows, tests, strict=True)]


def read_mbpp(path: str | os.PathLike, shots: int = 3) -> list[Problem]:
    """The problems of mbpp.jsonl that are for testing, 11 to 510, behind the solved ones from number 2 on.

    ValueError with file and line for another format, and where these are not in the file.
    """
    rows = {row["task_id"]: row for row in json_rows(path, task_id=int, text=str, code=str, test_list=list)}
    examples, problems = [rows.get(n) for n in range(2, 2 + shots)], [rows[n] for n in sorted(rows) if 11 <= n <= 510]
    if None in examples or not problems:
        expected = f"those that are solved, 2 to {1 + shots}, " if shots else ""
        raise ValueError(f"{path}: task_id {min(rows)} to {max(rows)}; expected {expected}and some from 11 to 510")

    def asked(row: dict) -> str:
        tests = "\n".join(row["test_list"])
        return f"You are an expert Python programmer, and here is your task: {row['text'].strip()} " \
               f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"  # fmt: skip

    solved = [asked(row) + row["code"].replace("\r\n", "\n").strip() + "\n[DONE]\n\n" for row in examples]
    return [
        Problem(
            f"MBPP/{row['task_id']}", "".join(solved) + asked(row), "",
            "\n".join(["", row.get("test_setup_code") or "", *row["test_list"], ""]), ("[DONE]",),
        )
        for row in problems
    ]  # fmt: skip


def solve(
    problems: Sequence[Problem],
    generate: Callable[[Sequence[Problem], int], list[list[str]]],
    samples: int,
    timeout: float = 3.0,
    memory: int = 2**30,
    workers: int | None = None,
) -> list[int]:
    """How many of so many programs pass, for each problem.

    generate: (problems, samples) -> for each problem its continuations. A program that occurs twice runs once.
    timeout, memory: of `run_program`; workers: programs that run at a time, by default one for each core. Under
    torchrun its processes divide the programs. ValueError for another number of continuations.
    """
    texts = generate(problems, samples)
    if [len(some) for some in texts] != [samples] * len(problems):
        raise ValueError(f"generate gave {[len(some) for some in texts][:5]} texts; expected {samples} a problem")
    programs = [[p.before + text + p.tests for text in some] for p, some in zip(problems, texts, strict=True)]
    distinct = sorted({program for some in programs for program in some})
    with ThreadPoolExecutor(workers or max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))) as pool:
        def run(some: Sequence[str]) -> list[bool]:
            ran = pool.map(lambda program: run_program(program, timeout, memory).passed, some)
            return list(tqdm(ran, total=len(some), desc="running programs", unit="program", leave=False))

        passed = dict(zip(distinct, over_ranks(distinct, run), strict=True))
    return [sum(passed[program] for program in some) for some in programs]


def pass_rate(counts: Sequence[int], samples: int, k: int) -> tuple[float, float]:
    "Mean of pass@k over problems, and its standard error, from how many of the samples passed in each."
    rates = np.array([pass_at_k(samples, count, k) for count in counts])
    return float(rates.mean()), float(rates.std(ddof=1) / len(rates) ** 0.5) if len(rates) > 1 else 0.0
