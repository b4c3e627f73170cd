"""Generated from chapters/10_toolbox.py by chapters/export.py; edit the chapter."""

__all__ = [
    "STYLE",
    "COLORS",
    "OUTCOMES",
    "ATTENTION",
    "RINGS",
    "save",
    "texts",
]


# ---------- chapters/10_toolbox.py · One style for figures

import io
import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from llama2lib import recipes

STYLE = {
    "figure.figsize": (5.6, 3.4), "figure.dpi": 110, "figure.constrained_layout.use": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.titlesize": "medium", "axes.titlelocation": "left", "legend.frameon": False,
    "svg.fonttype": "none", "svg.hashsalt": "llama2",
}
COLORS = {"7B": "#e69f00", "13B": "#009e73", "34B": "#56b4e9", "70B": "#0072b2", "ours": "#d55e00"}
OUTCOMES = {"win": "#7fbf7b", "tie": "0.82", "loss": "#af8dc3"}
ATTENTION = {"MHA": "#332288", "GQA": "#cc6677", "MQA": "#999933"}
RINGS = {"linestyle": "none", "marker": "o", "markersize": 7, "markerfacecolor": "none", "color": "0.35"}

def save(figure: Figure, name: str) -> None:
    "Write figures/`name`, a plain name ending in .png or .svg (else ValueError); at the smoke scale write nothing."
    if "/" in name or not name.endswith((".png", ".svg")):
        raise ValueError(f"expected a plain name like 'figure_07.png' or 'table_02.svg', found {name!r}")
    anonymous = {"Software": None} if name.endswith(".png") else {"Creator": None, "Date": None}
    buffer = io.BytesIO()
    with plt.rc_context({key: value for key, value in STYLE.items() if key.startswith("svg.")}):
        figure.savefig(buffer, format=name[-3:], metadata=anonymous)
    if recipes.scale() != "smoke":
        recipes.write_atomic(recipes.ROOT / "figures" / name, buffer.getvalue())

def texts(name: str, title: str, rows: Sequence[tuple[str, str]], indent: float = 0.15) -> None:
    "Save a figure of labelled texts, one below the other: answers side by side. `indent`: of the texts, of its width."
    lines = [(label, textwrap.wrap(text, 95) or [""]) for label, text in rows]
    below = sum(len(part) + 0.4 for _, part in lines)
    figure, ax = plt.subplots(figsize=(8, 0.5 + 0.2 * below), dpi=80)
    ax.axis("off")
    place = below
    for label, part in lines:
        ax.text(0, place, label, va="top", fontsize=8, weight="bold")
        ax.text(indent, place, "\n".join(part), va="top", fontsize=8)
        place -= len(part) + 0.4
    ax.set(ylim=(0, below + 0.5), xlim=(0, 1), title=title)
    save(figure, name)
