"""Generated from chapters/10_toolbox.py by chapters/export.py; edit the chapter."""

__all__ = [
    "Grid",
    "number",
    "parse",
    "column",
]


# ---------- chapters/10_toolbox.py · The paper's numbers, once

Grid = dict[str, dict[str, float | None]]


def number(text: str) -> float | None:
    "A printed cell as a number: `-` is an empty cell, `2/3` a fraction, a cell of digits an int."
    if text == "-":
        return None
    if "/" in text:
        top, bottom = text.split("/")
        return int(top) / int(bottom)
    return int(text) if text.isdigit() else float(text)

def parse(text: str) -> dict[str, Grid]:
    """Read grids, as {table: {row: {column: value}}}.

    A header line is `Table 7, Table 8 | columns of 7 | columns of 8`; one without a name continues it. Lines that start
    with `#` are remarks. A row that comes twice, or has more or fewer cells than the header, raises ValueError.
    """
    tables: dict[str, Grid] = {}
    names, header = [], []
    for line in filter(None, text.splitlines()):
        row, *groups = (part.strip() for part in line.split("|"))
        cells = [group.split() for group in groups]
        if line.startswith("#"):
            continue
        if not row:
            header = [above + more for above, more in zip(header, cells, strict=True)]
        elif row.startswith(("Table ", "Figure ")):
            names, header = row.split(", "), cells
        elif [len(group) for group in cells] != [len(group) for group in header] or len(cells) != len(names):
            raise ValueError(f"{row}: expected as many cells as columns in {names}, {header}, found {line!r}")
        else:
            for name, columns, values in zip(names, header, cells, strict=True):
                grid = tables.setdefault(name, {})
                if row in grid:
                    raise ValueError(f"{name}: the row {row!r} comes twice")
                grid[row] = dict(zip(columns, map(number, values), strict=True))
    return tables

def column(grid: Grid, name: str) -> dict[str, float | None]:
    "One column of a grid, {row: cell}; rows whose header lacks the column are left out."
    return {row: cells[name] for row, cells in grid.items() if name in cells}
