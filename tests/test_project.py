"""The project's own machinery: exporter, notebooks, requirements, Makefile, imports that point one way."""

import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted(ROOT.glob("chapters/[0-9][0-9]_*.py"))


def run(script: Path, *arguments: str):
    environment = os.environ | {"LLAMA2_SCALE": "laptop"}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.fixture
def clone(tmp_path) -> Path:
    "A project with one chapter, and the real scripts."
    (tmp_path / "chapters").mkdir()
    for script in ("export.py", "notebooks.py"):
        shutil.copy(ROOT / "chapters" / script, tmp_path / "chapters")
    shutil.copy(ROOT / "jupytext.toml", tmp_path)
    (tmp_path / "chapters" / "01_demo.py").write_text(
        "# %% [markdown]\n# # Demo\n\n# %%\n#| default_exp demo\n\n# %%\n#| export\nimport math\n\n\n"
        "def area(r):\n    return math.pi * r * r\n\n\n# %% [markdown]\n# ## Command line\n\n"
        "# %%\n#| export\ndef cli():\n    print(area(1))\n\n\n# %%\n#| export other\n_HIDDEN, SHOWN = 1, 2\n\n"
        "# %%\narea(2)\n"
    )
    return tmp_path


def test_marked_cells_become_modules_with_their_section(clone):
    assert run(clone / "chapters/export.py").returncode == 0
    text = (clone / "llama2lib/demo.py").read_text()
    assert "chapters/01_demo.py · Demo" in text and "chapters/01_demo.py · Command line" in text
    assert '__all__ = [\n    "area",\n    "cli",\n]' in text and "area(2)" not in text
    assert text.endswith('if __name__ == "__main__":\n    cli()\n')
    assert '__all__ = [\n    "SHOWN",\n]' in (clone / "llama2lib/other.py").read_text()
    ran = subprocess.run([sys.executable, "-m", "llama2lib.demo"], cwd=clone, capture_output=True, text=True)
    assert ran.stdout.startswith("3.14")


@pytest.mark.parametrize("change", ["edited", "missing", "left over"])
def test_the_check_names_what_is_stale(clone, change):
    run(clone / "chapters/export.py")
    assert run(clone / "chapters/export.py", "--check").returncode == 0
    file = clone / "llama2lib" / ("old.py" if change == "left over" else "demo.py")
    file.unlink() if change == "missing" else file.write_text("# something else\n")
    checked = run(clone / "chapters/export.py", "--check")
    assert checked.returncode == 1 and file.name in checked.stderr
    run(clone / "chapters/export.py")
    assert run(clone / "chapters/export.py", "--check").returncode == 0


def test_a_misspelt_directive_is_refused(clone):
    chapter = clone / "chapters/01_demo.py"
    chapter.write_text(chapter.read_text().replace("#| export other", "#| exprot other"))
    ran = run(clone / "chapters/export.py")
    assert ran.returncode == 1 and "01_demo.py, section 'Command line'" in ran.stderr and "exprot" in ran.stderr


def test_every_command_names_itself_and_says_what_it_does():
    "All but the ledger's, which is a target of the Makefile."
    for file in sorted((ROOT / "llama2lib").glob("*.py")):
        commands = [node for node in ast.parse(file.read_text("utf-8")).body if getattr(node, "name", None) == "cli"]
        for cli in commands if file.stem != "ledger" else ():
            name = f"python -m llama2lib.{file.stem}"
            assert [ast.literal_eval(default) for default in cli.args.defaults] == [name], file.name
            usage, _, about = ast.get_docstring(cli).partition(": ")
            assert usage.startswith(f"{name} ") and about, file.name


def test_the_pair_check_sees_an_edited_chapter_and_an_unexecuted_notebook(clone):
    script = clone / "chapters/notebooks.py"
    assert "no notebook" in run(script, "check").stderr
    notebook = clone / "chapters/01_demo.ipynb"
    subprocess.run([sys.executable, "-m", "jupytext", "--to", "ipynb", str(clone / "chapters/01_demo.py")], check=True)
    assert "not executed" in run(script, "check").stderr and "no outputs" in run(script, "check").stderr
    content = nbformat.read(notebook, as_version=4)
    for number, cell in enumerate(c for c in content.cells if c.cell_type == "code"):
        cell.execution_count = number + 1
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="12.57")]
    content.metadata["llama2lib"] = {"scale": "laptop"}
    nbformat.write(content, notebook)
    assert run(script, "check").returncode == 0
    content.cells[-1].outputs[0]["text"] = "/home/someone/file"
    nbformat.write(content, notebook)
    assert "path of the machine" in run(script, "check").stderr
    content.cells[-1].source = "area(3)"
    nbformat.write(content, notebook)
    assert "not the chapter's" in run(script, "check").stderr


def test_a_notebook_is_built_executed_and_rebuilt_when_its_prose_or_code_changes(clone):
    script, chapter = clone / "chapters/notebooks.py", clone / "chapters/01_demo.py"
    built = run(script, "build")
    assert built.returncode == 0, built.stderr
    notebook = nbformat.read(clone / "chapters/01_demo.ipynb", as_version=4)
    assert "12.5" in notebook.cells[-1].outputs[0]["data"]["text/plain"]
    assert run(script, "check").returncode == 0 and "up to date" in run(script, "build").stdout
    chapter.write_text(chapter.read_text().replace("# # Demo", "# # Circles"))
    assert run(script, "stale").stdout == "" and "not the chapter's" in run(script, "check").stderr
    assert "MB" in run(script, "build").stdout and run(script, "check").returncode == 0
    chapter.write_text(chapter.read_text().replace("area(2)", "area(None)"))
    assert run(script, "stale").stdout == "01_demo\n"
    failed = run(script, "build")
    assert failed.returncode == 1 and "01_demo.py stopped; the notebook was not written" in failed.stderr


def test_figures_are_in_the_notebook_whatever_backend_the_environment_names(clone, monkeypatch):
    "The Makefile names one without a window, for scripts."
    monkeypatch.setenv("MPLBACKEND", "agg")
    chapter = clone / "chapters/01_demo.py"
    chapter.write_text("# %%\nimport matplotlib.pyplot as plt\n\nfig, ax = plt.subplots()\n")
    assert run(clone / "chapters/notebooks.py", "build").returncode == 0
    notebook = nbformat.read(clone / "chapters/01_demo.ipynb", as_version=4)
    assert "image/png" in notebook.cells[0].outputs[0]["data"]


def test_every_chapter_has_an_executed_notebook_with_outputs():
    "nbval passes a notebook without outputs in silence."
    assert CHAPTERS
    for chapter in CHAPTERS:
        notebook = nbformat.read(chapter.with_suffix(".ipynb"), as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source]
        assert sum(bool(cell.outputs) for cell in code) >= 1, chapter.name
        assert all(cell.execution_count for cell in code), chapter.name
        assert chapter.with_suffix(".ipynb").stat().st_size < 1.5e6, chapter.name


def test_the_conda_file_installs_what_pyproject_asks_for():
    "environment.yml: Python at the same minimum, and everything else through pip from pyproject's own lists."
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line.strip("- \n") for line in (ROOT / "environment.yml").read_text().splitlines()]
    assert f"python{project['requires-python']}" in lines
    installs = [re.fullmatch(r"e \.\[(.+)\]", line) for line in lines]
    extras = [name for match in installs if match for name in match.group(1).split(",")]
    assert extras and set(extras) <= set(project["optional-dependencies"])
    assert "c constraints.txt" in lines and "pip" in lines


def test_constraints_pin_what_pyproject_allows():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    requirements = {r.name: r for r in map(Requirement, wanted)}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            assert name in requirements and version in requirements[name].specifier, line


def test_every_make_target_of_the_readme_exists_and_help_lists_them():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    named = set(re.findall(r"make ([a-z-]+)", (ROOT / "README.md").read_text()))
    wanted = {
        "tour",
        "test",
        "test-gpu",
        "export",
        "notebooks",
        "chapters",
        "stale",
        "ledger",
        "bench",
        "clean",
        "help",
    }
    assert wanted | named <= targets
    assert all(re.search(rf"^{target} ", listed, re.M) for target in wanted | named)


def test_every_name_is_defined():
    "The linter's rule is off, since it takes jaxtyping's shapes for names; here shapes are left out."
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "F821", "--output-format", "json"]
    ran = subprocess.run([*command, "chapters", "llama2lib", "tests"], capture_output=True, text=True, cwd=ROOT)
    undefined, lines = [], functools.cache(lambda file: Path(file).read_text().splitlines())
    for found in json.loads(ran.stdout):
        file, row, column = found["filename"], found["location"]["row"], found["location"]["column"] - 1
        line = lines(file)[row - 1]
        shapes = (match.span(1) for match in re.finditer(r"\[[\w. |]+, (\"[^\"]*\")\]", line))
        if not any(first < column < last for first, last in shapes):
            undefined.append(f"{Path(file).name}:{row}: {found['message']}")
    assert not undefined


def test_imports_point_one_way():
    "toolbox ← model, tokenizer, checkpoint ← generation, corpus ← training; nobody imports a later stage."
    order = ["recipes", "grids", "appendix", "paper", "inventory", "stats", "plots", "launch", "ledger", "claims"]
    order += ["model", "tokenizer", "formats"]
    order += ["checkpoint", "generation", "world", "grammar", "synthetic", "judge"]
    order += ["corpus", "cleaning", "shards", "optim", "distributed", "pretrain", "ablations", "scaling"]
    order += ["roofline", "plan", "serving", "dialog", "sft", "mini", "chat", "preferences", "reward"]
    order += ["mini_rewards", "rollout", "pairs", "rejection", "ppo", "desk", "screen", "annotate", "rlhf", "mini_rlhf"]
    order += ["gatt", "mini_gatt", "composition", "red_team", "safety", "distillation", "tools", "mini_safety"]
    order += ["carbon", "continuations", "harness", "programs", "evaluate", "suffix_index", "contamination"]
    order += ["tallies", "human_eval", "card"]
    for file in ROOT.glob("llama2lib/*.py"):
        if file.stem == "__init__":
            continue
        assert file.stem in order, f"say where {file.stem} stands"
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module == "llama2lib":
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llama2lib."):
                names = [node.module.split(".")[1]]
            elif isinstance(node, ast.Import):
                names = [a.name.split(".")[1] for a in node.names if a.name.startswith("llama2lib.")]
            for name in names:
                assert order.index(name) < order.index(file.stem), f"{file.name} imports {name}"
