"""Generated from chapters/10_toolbox.py by chapters/export.py; edit the chapter."""

__all__ = [
    "ROOT",
    "SCALES",
    "scale",
    "cache_folder",
    "write_atomic",
]


# ---------- chapters/10_toolbox.py · Recipes: scale and cache

import os
from difflib import get_close_matches
from pathlib import Path
from secrets import token_hex

import llama2lib

ROOT = Path(llama2lib.__file__).resolve().parent.parent  # the repository: figures/, chapters/ and the cache live here
SCALES = ("smoke", "laptop", "a100")


def scale() -> str:
    "The scale of this run, from `LLAMA2_SCALE`: 'smoke', 'laptop' (default) or 'a100'. ValueError if misspelt."
    value = os.environ.get("LLAMA2_SCALE", "laptop")
    if value not in SCALES:
        close = get_close_matches(value.lower(), SCALES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"LLAMA2_SCALE={value!r} is not one of {', '.join(SCALES)}{hint}")
    return value

def cache_folder() -> Path:
    "Where trained models and results are kept: `LLAMA2_CACHE`, or .cache/llama2lib in the repository. May not exist."
    return Path(os.environ.get("LLAMA2_CACHE") or ROOT / ".cache" / "llama2lib").expanduser()

def write_atomic(path: str | Path, data: str | bytes) -> None:
    "Write a file (text as UTF-8) whole or not at all: a kill leaves the old content. Makes the folder if needed."
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
