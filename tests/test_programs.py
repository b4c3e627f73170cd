"""pass@k, the runner for programs, and the readers of HumanEval and MBPP."""

import gzip
import json
import os
import time
import tracemalloc
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from llama2lib.programs import (
    Problem,
    pass_at_k,
    pass_rate,
    read_humaneval,
    read_mbpp,
    run_program,
    solve,
)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_program(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            draws = [min(draw) < c for draw in combinations(range(n), k)]
            assert pass_at_k(n, c, k) == float(Fraction(sum(draws), len(draws)))


def test_pass_at_k_needs_no_small_numbers():
    "The product form of Chen et al., and numbers whose binomials are far beyond a float."
    for n, c, k in ((200, 3, 100), (200, 199, 1), (1000, 10, 100)):
        product = 1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)) if n - c >= k else 1.0
        assert pass_at_k(n, c, k) == pytest.approx(product, rel=1e-9)
    assert pass_at_k(20_000, 1, 10_000) == 0.5
    assert pass_at_k(10**6, 1, 3) == 3e-6  # 1 - C(n-1, k) / C(n, k) in floats loses most digits
    assert pass_at_k(np.int64(10), np.int64(4), np.int64(1)) == 0.4


@pytest.mark.parametrize("n, c, k", [(5, 6, 1), (5, -1, 1), (5, 2, 6), (5, 2, 0), (0, 0, 1), (5, 2, -1)])
def test_impossible_counts_are_refused(n, c, k):
    with pytest.raises(ValueError, match=f"n = {n}, c = {c}, k = {k}: expected 0 <= c <= n"):
        pass_at_k(n, c, k)


def test_counts_are_whole_numbers():
    with pytest.raises(TypeError):
        pass_at_k(5, 1.5, 1)


def test_the_mean_over_problems_has_a_standard_error():
    mean, error = pass_rate([0, 10, 5, 5], 10, 1)
    assert mean == 0.5 and error == pytest.approx(np.std([0, 1, 0.5, 0.5], ddof=1) / 2)
    assert pass_rate([3], 10, 1) == (0.3, 0.0)


@pytest.mark.parametrize("code, reason", [
    ("x = [1, 2]\nassert sum(x) == 3", "passed"),
    ("assert 1 == 2, 'no'", "AssertionError: no"),
    ("def f(:", "SyntaxError: invalid syntax"),
    ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
    ("exit(0)", "ended before its last line"),
    ("import sys\nsys.exit()", "ended before its last line"),
    ("import os\nos._exit(0)", "ended before its last line"),
    ("raise SystemExit('bye')", "bye"),
    ("input()", "EOFError: EOF when reading a line"),
    ("import sys\nassert sys.stdin.read() == '' and sys.argv == ['program.py']", "passed"),
    ("if __name__ == '__main__':\n    assert False", "passed"),  # as it is with the benchmark's own exec
    ("import os\nos.kill(os.getpid(), 11)", "killed by SIGSEGV"),
    ("open('json.py', 'w').write('raise SystemExit')\nimport json\njson.dumps(1)", "passed"),
    ("data = bytearray(2 ** 29)", "MemoryError"),
    ("open('big', 'wb').write(bytes(2 ** 20))", "OSError: [Errno 27] File too large"),
    ("x = '\ud800'", "half a surrogate pair: not Unicode text"),
])  # fmt: skip
def test_a_program_passes_if_it_reaches_its_end(code, reason):
    outcome = run_program(code, timeout=20, memory=2**28, file_size=2**19)
    assert (outcome.reason, outcome.passed) == (reason, reason == "passed")


def test_a_program_has_an_empty_folder_and_almost_no_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "word")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "json.py").write_text("raise RuntimeError('not the standard library')")
    monkeypatch.chdir(tmp_path)
    code = "import json, os\nprint(os.getcwd())\nassert os.listdir() == ['program.py'] and 'SECRET' not in os.environ\n"
    outcome = run_program(code + "open('left', 'w').write('x')", timeout=20)
    assert outcome.passed, outcome
    assert not Path(outcome.output.strip()).exists() and sorted(os.listdir(tmp_path)) == ["json.py"]


def test_time_is_limited_for_a_program_and_its_children(tmp_path):
    mark = tmp_path / "alive"
    child = f"    while True:\n        open({str(mark)!r}, 'a').write('x')\n        time.sleep(0.02)\n"
    code = f"import os, time\nif not os.fork():\n{child}while True:\n    pass"
    start = time.monotonic()
    outcome = run_program(code, timeout=1.5)
    assert outcome == (False, "did not end in 1.5 s", "") and time.monotonic() - start < 15
    assert mark.exists()
    size = mark.stat().st_size
    time.sleep(0.3)
    assert mark.stat().st_size == size


def test_children_of_a_program_that_passed_end_with_it(tmp_path):
    mark = tmp_path / "alive"
    child = f"    while True:\n        open({str(mark)!r}, 'a').write('x')\n        time.sleep(0.02)\n"
    code = f"import os, time\nif not os.fork():\n{child}while not os.path.exists({str(mark)!r}):\n    time.sleep(0.01)"
    assert run_program(code, timeout=20).passed
    size = mark.stat().st_size
    time.sleep(0.3)
    assert mark.stat().st_size == size


def test_output_is_kept_in_part_and_blocks_nobody():
    outcome = run_program("print('ü' * 10 ** 6)\nprint('x' * 10 ** 6)", timeout=20, output=50)
    assert outcome.passed and outcome.output == "ü" * 50
    endless = run_program("while True:\n    print('x' * 10 ** 5)", timeout=1, output=50)
    assert not endless.passed and endless.output == "x" * 50
    tracemalloc.start()
    run_program("for _ in range(100):\n    print('x' * 10 ** 6)", timeout=20, output=50)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    both = run_program("import sys\nprint('out', flush=True)\nsys.stderr.write('error')", timeout=20)
    assert both.output == "out\nerror"


HUMANEVAL = {
    "task_id": "HumanEval/0", "prompt": 'def double(x):\n    """Twice x."""\n', "entry_point": "double",
    "canonical_solution": "    return 2 * x\n", "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}  # fmt: skip


def mbpp(n: int) -> dict:
    return {"task_id": n, "text": f"Write a function to add {n}.", "code": f"def add(x):\r\n  return x + {n}",
            "test_setup_code": "base = 1" if n == 12 else "", "challenge_test_list": [],
            "test_list": [f"assert add(1) == {1 + n}", f"assert add({'base' if n == 12 else 1}) > {n}"]}  # fmt: skip


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_humaneval_is_read_and_its_own_solution_passes(tmp_path):
    (problem,) = read_humaneval(lines(tmp_path / "HumanEval.jsonl", [HUMANEVAL]))
    assert problem.name == "HumanEval/0" and problem.prompt == HUMANEVAL["prompt"] and "\ndef" in problem.until
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(HUMANEVAL))
    assert read_humaneval(tmp_path / "HumanEval.jsonl.gz") == [problem]
    texts = [HUMANEVAL["canonical_solution"], "    return x\n", "   return 2 * x\n"]  # the last: three spaces
    passed = [run_program(problem.before + text + problem.tests, timeout=20).passed for text in texts]
    assert passed == [True, False, False]


def test_mbpp_is_read_with_its_solved_examples(tmp_path):
    rows = [mbpp(n) for n in (1, 2, 3, 4, 11, 12, 510, 511)]
    file = lines(tmp_path / "mbpp.jsonl", rows)
    problems = read_mbpp(file)
    assert [problem.name for problem in problems] == ["MBPP/11", "MBPP/12", "MBPP/510"]
    prompt = problems[0].prompt
    assert [prompt.count(f"to add {n}.") for n in (1, 2, 3, 4, 11, 12)] == [0, 1, 1, 1, 1, 0]
    assert prompt.count("[DONE]") == 3 and prompt.endswith("assert add(1) > 11\n[BEGIN]\n") and "\r" not in prompt
    assert "def add(x):\n  return x + 4\n[DONE]\n\nYou are" in prompt and problems[0].until == ("[DONE]",)
    assert read_mbpp(file, shots=0)[0].prompt.count("You are an expert") == 1
    for problem, row in zip(problems, rows[4:7], strict=True):
        assert run_program(problem.before + row["code"] + problem.tests, timeout=20).passed
        assert not run_program(problem.before + rows[0]["code"] + problem.tests, timeout=20).passed


@pytest.mark.parametrize("reader, rows, expected", [
    (read_humaneval, [HUMANEVAL, HUMANEVAL | {"test": None}], r"file\.jsonl:2: field 'test' is None; expected a str"),
    (read_humaneval, [[1]], r"file\.jsonl:1: field 'task_id' is \[1\]; expected a str"),
    (read_humaneval, [], "empty; expected a JSON object a line"),
    (read_mbpp, [mbpp(2), mbpp(3) | {"test_list": "x"}], r":2: field 'test_list' is 'x'; expected a list"),
    (read_mbpp, [mbpp(11)], "task_id 11 to 11; expected those that are solved, 2 to 4, and some from 11 to 510"),
    (read_mbpp, [mbpp(n) for n in (2, 3, 4)], "task_id 2 to 4; expected those that are solved"),
])  # fmt: skip
def test_files_of_another_format_are_refused(tmp_path, reader, rows, expected):
    with pytest.raises(ValueError, match=expected):
        reader(lines(tmp_path / "file.jsonl", rows))
    (tmp_path / "file.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"file\.jsonl:1: not JSON"):
        reader(tmp_path / "file.jsonl")


PROBLEMS = [Problem(f"P/{n}", "", "x = ", f"\nassert x == {n}\n", ()) for n in range(3)]


def test_programs_are_counted_by_problem_and_run_once(monkeypatch):
    ran = []

    def counting(code, *settings):
        ran.append(code)
        return run_program(code, 20)

    monkeypatch.setattr("llama2lib.programs.run_program", counting)
    texts = [["0", "1", "0", "0"], ["0", "0", "2", "2"], ["2", "1", "0", "("]]
    assert solve(PROBLEMS, lambda problems, samples: texts, 4) == [3, 0, 1]
    assert len(ran) == len(set(ran)) == 8


def test_the_wrong_number_of_texts_is_refused():
    with pytest.raises(ValueError, match=r"generate gave \[1, 2, 2\] texts; expected 2 a problem"):
        solve(PROBLEMS, lambda problems, samples: [["0"], ["0", "1"], ["0", "1"]], 2)
