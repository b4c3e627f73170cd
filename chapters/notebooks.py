"""Build, check and date the notebooks: chapters/NN_name.ipynb from chapters/NN_name.py.

    python chapters/notebooks.py build [NN …]   execute the chapters whose notebook is stale (or those named)
    python chapters/notebooks.py check          fail when a pair's sources differ, or a notebook was never executed
    python chapters/notebooks.py stale          list the notebooks that are older than their chapter or its modules

The direction is always .py → .ipynb. A notebook keeps a digest of the code it was executed with: its own cells and
every llama2lib module that they reach, comments left out.
"""

import os
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm import tqdm

from llama2lib.recipes import ROOT, scale, source_digest, write_atomic

CHAPTERS = Path(__file__).resolve().parent
WIDGET = "application/vnd.jupyter.widget-view+json"  # a bar that only lives while its cell runs
INLINE = "module://matplotlib_inline.backend_inline"  # figures into the notebook, whatever the environment says
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def chapters(names: list[str]) -> list[Path]:
    found = sorted(CHAPTERS.glob("[0-9][0-9]_*.py"))
    chosen = [f for f in found if not names or any(f.name.startswith(name) for name in names)]
    if not chosen:
        raise SystemExit(f"no chapter begins with {' or '.join(names)}")
    return chosen


def sources(cells) -> list[tuple]:
    return [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in cells if c.source]


def digest(chapter: Path) -> str:
    return source_digest(chapter.read_text("utf-8"))


def read(notebook: Path):
    return nbformat.read(notebook, as_version=4) if notebook.exists() else None


def paired(chapter: Path):
    "The chapter as a notebook without outputs; cells that did not change keep their ids."
    notebook = jupytext.read(chapter)
    old = read(chapter.with_suffix(".ipynb"))
    ids = {}
    for cell in old.cells if old else []:
        ids.setdefault((cell.cell_type, cell.source), []).append(cell.id)
    used = set()
    for number, cell in enumerate(notebook.cells):
        known = ids.get((cell.cell_type, cell.source), [])
        cell["id"] = known.pop(0) if known else f"{chapter.stem[:2]}-{number}"
        while cell["id"] in used:
            cell["id"] += "x"
        used.add(cell["id"])
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    return notebook


def tidy(notebook):
    "Leave out what differs between machines and runs: times, progress bars, this computer's paths."
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        outputs = cell.get("outputs", [])
        cell["outputs"] = [o for o in outputs if o.get("name") != "stderr" and WIDGET not in o.get("data", {})]
        for output in cell["outputs"]:
            if "text" in output:
                output["text"] = output["text"].replace(str(ROOT), ".")
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})


def build(names: list[str]):
    for chapter in chapters(names):
        wanted, old = digest(chapter), read(chapter.with_suffix(".ipynb"))
        if not names and old and old.metadata.get("llama2lib", {}).get("digest") == wanted and not problems(chapter):
            print(f"{chapter.stem}: up to date")
            continue
        notebook = paired(chapter)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        with tqdm(total=len(code), desc=chapter.stem, unit="cell") as bar:
            client = NotebookClient(
                notebook,
                timeout=None,
                resources={"metadata": {"path": str(CHAPTERS)}},
                on_cell_executed=lambda cell, cell_index, execute_reply, bar=bar: bar.update(),
            )
            try:
                client.execute(env=os.environ | {"LLAMA2_SCALE": scale(), "MPLBACKEND": INLINE})
            except CellExecutionError as error:
                raise SystemExit(f"{chapter.name} stopped; the notebook was not written.\n{error}") from None
        tidy(notebook)
        notebook.metadata["llama2lib"] = {"digest": wanted, "scale": scale()}
        text = nbformat.writes(notebook) + "\n"
        write_atomic(chapter.with_suffix(".ipynb"), text)
        print(f"{chapter.stem}: {len(text) / 1e6:.2f} MB")


def problems(chapter: Path) -> list[str]:
    notebook = read(chapter.with_suffix(".ipynb"))
    if notebook is None:
        return [f"{chapter.stem}: no notebook; run 'make notebooks'"]
    found = []
    if sources(notebook.cells) != sources(jupytext.read(chapter).cells):
        found.append(f"{chapter.stem}: the notebook's cells are not the chapter's; run 'make notebooks'")
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source]
    if any(cell.execution_count is None for cell in code):
        found.append(f"{chapter.stem}: cells were not executed")
    outputs = [o for cell in code for o in cell.outputs]
    if not outputs:
        found.append(f"{chapter.stem}: no outputs at all, so nbval would compare nothing")
    if any(o.output_type == "error" for o in outputs):
        found.append(f"{chapter.stem}: an output is an error")
    if re.search(r"/(root|home|tmp|Users|work)/", str(outputs)):
        found.append(f"{chapter.stem}: an output shows a path of the machine it ran on")
    if notebook.metadata.get("llama2lib", {}).get("scale") != "laptop":
        found.append(f"{chapter.stem}: executed at another scale than laptop")
    return found


def main():
    match sys.argv[1:]:
        case ["build", *names]:
            build(names)
        case ["check"]:
            found = [problem for chapter in chapters([]) for problem in problems(chapter)]
            sys.exit("\n".join(found) if found else 0)
        case ["stale"]:
            for chapter in chapters([]):
                notebook = read(chapter.with_suffix(".ipynb"))
                if notebook is None or notebook.metadata.get("llama2lib", {}).get("digest") != digest(chapter):
                    print(chapter.stem)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
