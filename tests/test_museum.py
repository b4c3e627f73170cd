"""The museum of chapter 11: every bug in it is still a line of the library, and its test still catches it.

The tests that exhibits name are run with the wrong line put into a copy of the library, in processes that are forked
from one that has imported PyTorch. Those that start processes themselves are slow: they run with MUSEUM=1 only.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jupytext
import pytest

ROOT = Path(__file__).parent.parent
CHAPTER = ROOT / "chapters" / "11_silent_bugs.py"
RUNNER = """
import gc, importlib, json, os, sys
from pathlib import Path
import hypothesis, pytest
for file in Path(os.environ["LIBRARY"], "llama2lib").glob("*.py"):
    importlib.import_module(f"llama2lib.{file.stem}")
for name in [name for name in sys.modules if name.split(".")[0] == "llama2lib"]:
    del sys.modules[name]  # what it has imported stays, the library itself comes from the copy
gc.freeze()
for line in sys.stdin:
    folder, *tests = json.loads(line)
    if (child := os.fork()) == 0:
        os.chdir(folder)
        sys.path[:] = [folder, *(path for path in sys.path if path not in ("", os.environ["LIBRARY"]))]
        options = ["-q", "-x", "-rA", "-p", "no:cacheprovider", "--tb=line"]
        with open("output", "w") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            code = pytest.main([*options, *tests])
            sys.stdout.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Bug(NamedTuple):
    "A wrong line of the chapter, and the test that it says forbids it."

    name: str
    module: str
    right: str
    wrong: str
    test: str


def text(node: ast.expr | None) -> str:
    assert isinstance(node, ast.Constant) and isinstance(node.value, str), "a test reads this: write it as a string"
    return node.value


def bugs() -> list[Bug]:
    "What the cells of the chapter give to `put_in` and `exhibit`."
    found = []
    for cell in jupytext.read(CHAPTER).cells:
        calls = {"put_in": [], "exhibit": []}
        for node in ast.walk(ast.parse(cell.source)) if cell.cell_type == "code" else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in calls:
                calls[node.func.id].append(node)
        for shown in calls["exhibit"]:
            assert calls["put_in"], f"{text(shown.args[1])}: no line is put in"
            wrong = calls["put_in"][0]
            named = {keyword.arg: keyword.value for keyword in wrong.keywords}
            lines = text(named["right"]), text(named["wrong"])
            found.append(Bug(text(shown.args[1]), text(wrong.args[0]), *lines, text(shown.args[4])))
    return found


def starts_processes(bug: Bug) -> bool:
    return "two_processes" in bug.test


BUGS, SLOW = bugs(), bool(os.environ.get("MUSEUM"))
each_bug = pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])


def function(test: str) -> ast.FunctionDef | None:
    file, _, name = test.partition("::")
    assert (ROOT / file).exists(), f"{file} does not exist"
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    return next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name), None)


def test_the_museum_has_at_least_twenty_exhibits_each_with_a_name_of_its_own():
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 20


@each_bug
def test_the_test_that_an_exhibit_names_exists(bug):
    assert function(bug.test) is not None, bug.test


@each_bug
def test_the_right_line_is_the_librarys(bug):
    code = (ROOT / "llama2lib" / f"{bug.module}.py").read_text("utf-8")
    assert bug.right in code and bug.right != bug.wrong
    compile(code.replace(bug.right, bug.wrong), bug.module, "exec")


@pytest.fixture(scope="module")
def runner():
    "Gives pytest's exit code for some tests of a folder, and their output."
    environment = {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "LIBRARY": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", RUNNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    ) as process:

        def run(folder: Path, *tests: str) -> tuple[int, str]:
            print(json.dumps([str(folder), *tests]), file=process.stdin, flush=True)
            return int(process.stdout.readline()), (folder / "output").read_text()

        yield run
        process.stdin.close()


def copied(folder: Path) -> Path:
    for name in ("llama2lib", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "benchmarks", "gpu"))
    return folder


def test_the_named_tests_pass_in_a_copy(runner, tmp_path):
    "Else it would mean nothing that they fail with a bug. Here some of them; the others pass on their own."
    names = sorted({bug.test for bug in BUGS if SLOW or not starts_processes(bug)})
    code, output = runner(copied(tmp_path), *(names if SLOW else names[::6]))
    assert code == pytest.ExitCode.OK, output[-3000:]


@each_bug
def test_the_named_test_fails_with_the_wrong_line(bug, runner, tmp_path):
    if starts_processes(bug) and not SLOW:
        pytest.skip("starts processes: with MUSEUM=1 only")
    file = copied(tmp_path) / "llama2lib" / f"{bug.module}.py"
    file.write_text(file.read_text("utf-8").replace(bug.right, bug.wrong), "utf-8")
    code, output = runner(tmp_path, bug.test)
    assert code == pytest.ExitCode.TESTS_FAILED and "\nFAILED" in output, output[-3000:]
