"""Generated from chapters/10_toolbox.py by chapters/export.py; edit the chapter."""

__all__ = [
    "ROOT",
    "SCALES",
    "scale",
    "cache_folder",
    "write_atomic",
    "by_scale",
    "seeds",
    "data_file",
    "source_digest",
    "cached",
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

def by_scale(*, smoke, laptop, a100):
    "The value for this run's scale."
    return {"smoke": smoke, "laptop": laptop, "a100": a100}[scale()]


def seeds(default: tuple[int, ...] = (0, 1, 2)) -> tuple[int, ...]:
    "Seeds of this run: `LLAMA2_SEEDS`, such as '3,4,5', or the default. ValueError if not distinct integers >= 0."
    text = os.environ.get("LLAMA2_SEEDS")
    if not text:
        return tuple(default)
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len({int(part) for part in parts}) < len(parts):
        raise ValueError(f"LLAMA2_SEEDS={text!r} must be distinct whole numbers separated by commas, such as '3,4,5'")
    return tuple(int(part) for part in parts)

def data_file(relative: str) -> Path | None:
    """A file below the folder `LLAMA2_DATA`; None if that is unset or the file is absent.

    NotADirectoryError if `LLAMA2_DATA` is set and is no folder.
    """
    folder = os.environ.get("LLAMA2_DATA")
    if not folder:
        return None
    if not Path(folder).expanduser().is_dir():
        raise NotADirectoryError(f"LLAMA2_DATA={folder!r} is not a folder; unset it to run without real data")
    path = Path(folder).expanduser() / relative
    return path if path.is_file() else None


# ---------- chapters/10_toolbox.py · What code is this?

import ast
import functools
import hashlib
import io
import json
import re
import tokenize


@functools.cache
def _code_text(source: str) -> str:
    "The source without comments, trailing blanks and blank lines; lines of multi-line strings are left alone."
    lines, in_string = source.split("\n"), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (row, column), (last_row, _) = token.start, token.end
        in_string.update(range(row, last_row))
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column]
    kept = (line if row in in_string else line.rstrip() for row, line in enumerate(lines, 1))
    return "\n".join(line for row, line in enumerate(kept, 1) if line or row in in_string)


@functools.cache
def _library_modules(source: str) -> set[str]:
    "Names of the llama2lib modules that a source imports, or names in a string (as a launcher does)."
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names.update(alias.name for alias in node.names)
            case ast.ImportFrom(module="llama2lib") | ast.ImportFrom(module=None, level=1):
                names.update(f"llama2lib.{alias.name}" for alias in node.names)
            case ast.ImportFrom(level=1):
                names.add(f"llama2lib.{node.module}")
            case ast.ImportFrom(module=str(module)):
                names.add(module)
            case ast.Attribute(value=ast.Name(id="llama2lib"), attr=name):
                names.add(f"llama2lib.{name}")
            case ast.Constant(value=str(text)) if re.fullmatch(r"llama2lib(\.\w+)+", text):
                names.add(text)
    found = {name.split(".")[1] for name in names if name.startswith("llama2lib.")}
    return {name for name in found if (ROOT / "llama2lib" / f"{name}.py").exists()}


def source_digest(source: str) -> str:
    """SHA-256 of a source text and, transitively, of the llama2lib modules it imports; comments do not count.

    The text must be Python (a py:percent chapter is: its prose is comments). SyntaxError or tokenize.TokenError if not.
    """
    texts, todo = {"": _code_text(source)}, set(_library_modules(source))
    while todo:
        name = todo.pop()
        text = (ROOT / "llama2lib" / f"{name}.py").read_text("utf-8")
        texts[name] = _code_text(text)
        todo |= _library_modules(text) - texts.keys()
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()


# ---------- chapters/10_toolbox.py · What can be kept?

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save


def _pack(value, tensors: dict[str, torch.Tensor], where: str):
    "The JSON form of a value; its tensors and arrays are added to `tensors`. ValueError names what cannot be stored."
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.generic) and type(value.item()) in (bool, int, float):
        return value.item()
    if isinstance(value, torch.Tensor | np.ndarray):
        kind = "__tensor__" if isinstance(value, torch.Tensor) else "__array__"
        try:
            tensor = torch.from_numpy(value.copy()) if kind == "__array__" else value.detach().cpu()
            tensor = tensor.clone(memory_format=torch.contiguous_format)
            save({"": tensor.reshape(-1)[:0]})
        except (TypeError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"{where}: cannot store a {type(value).__name__} of {value.dtype} ({error})") from error
        tensors[str(len(tensors))] = tensor
        return {kind: str(len(tensors) - 1)}
    if type(value) in (list, tuple):
        return [_pack(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if type(key) is not str or key in ("__tensor__", "__array__"):
                raise ValueError(f"{where}: the key {key!r} cannot be stored; keys are strings")
        return {key: _pack(item, tensors, f"{where}[{key!r}]") for key, item in value.items()}
    raise ValueError(f"{where}: cannot store a {type(value).__name__}; use tensors, arrays, dicts, lists, plain values")


def _unpack(value, tensors: dict[str, torch.Tensor]):
    "Undo `_pack`."
    match value:
        case {"__tensor__": name}:
            return tensors[name]
        case {"__array__": name}:
            return tensors[name].numpy()
        case dict():
            return {key: _unpack(item, tensors) for key, item in value.items()}
        case list():
            return [_unpack(item, tensors) for item in value]
    return value


def _checksum(text: str, tensors: dict[str, torch.Tensor]) -> str:
    "SHA-256 of a packed value: its JSON, and name, type, shape and bytes of its tensors."
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read_entry(path: Path):
    "The result stored in a cache entry; ValueError if the entry is damaged."
    try:
        with safe_open(path, framework="pt") as file:
            stored, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}
        if stored["sha256"] != _checksum(stored["result"], tensors):
            raise ValueError("its checksum differs")
        return _unpack(json.loads(stored["result"]), tensors)
    except Exception as error:  # the reader's errors are of many types, and all of them mean: rebuild
        raise ValueError(f"{type(error).__name__}: {error}") from error


# ---------- chapters/10_toolbox.py · Which code made it?

import dataclasses
import dis
import inspect
import textwrap
import types
from collections.abc import Callable


def _names_read(code: types.CodeType) -> set[str]:
    "Global names that a code object reads, those of functions and comprehensions inside it included."
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_names_read(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


def _unfolded(value):
    "A value with its dataclasses and paths as plain data, and dictionaries in order."
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _unfolded(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return [type(value).__qualname__, fields]
    if isinstance(value, dict):
        return [[str(key), _unfolded(item)] for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))]
    if type(value) in (list, tuple):
        return [_unfolded(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _fingerprint(value, where: str) -> str:
    "Checksum of a value by content; ValueError if it has state that cannot be stored."
    tensors: dict[str, torch.Tensor] = {}
    try:
        return _checksum(json.dumps(_pack(_unfolded(value), tensors, where)), tensors)
    except ValueError:
        raise ValueError(
            f"cached: {where} is a {type(value).__name__}, whose state cannot be part of the key; build it inside the "
            "function, or pass what it depends on as a plain value"
        ) from None


def _made_of(fn: types.FunctionType, parts: dict[str, str]) -> dict[str, str]:
    "Add to `parts` what a function consists of: sources, digests of llama2lib modules, checksums of values it reads."
    fn = inspect.unwrap(fn)
    if fn.__module__.startswith("llama2lib."):
        parts[fn.__module__] = source_digest(f"import {fn.__module__}")
        return parts
    try:
        source = textwrap.dedent(inspect.getsource(fn))
    except OSError:
        raise ValueError(f"cached: the source of {fn.__qualname__} cannot be found") from None
    if fn.__name__ == "<lambda>":
        raise ValueError(f"cached: give {source.strip()!r} a name with def; a lambda's source is not a unit of its own")
    parts[f"def {fn.__qualname__}"] = _code_text(source)
    for module in _library_modules(source):
        parts[f"llama2lib.{module}"] = source_digest(f"import llama2lib.{module}")
    read = {name: fn.__globals__[name] for name in _names_read(fn.__code__) & fn.__globals__.keys()}
    read |= {name: cell.cell_contents for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)}
    read |= {f"defaults of {fn.__qualname__}": [list(fn.__defaults__ or ()), fn.__kwdefaults__ or {}]}
    for name, value in read.items():
        home = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None) or ""
        if home.startswith("llama2lib."):  # its modules, functions, classes, and instances of its dataclasses
            parts[home] = source_digest(f"import {home}")
        if inspect.ismodule(value) or inspect.isbuiltin(value):
            continue
        if isinstance(value, type) and home == fn.__module__:
            raise ValueError(f"cached: {fn.__qualname__} uses the class {name}, defined beside it; move it to a module")
        if callable(value) and not isinstance(value, type) and home == fn.__module__:
            if f"def {value.__qualname__}" not in parts:
                _made_of(value, parts)
        elif not (isinstance(value, type) or inspect.isroutine(value) or hasattr(value, "__wrapped__")):
            parts[name] = _fingerprint(value, name)
    return parts

def cached(name: str, config, fn: Callable[[], dict]) -> dict:
    """`fn()`, kept in `cache_folder()` as name-<hash>.safetensors, and read from there the next time.

    The hash covers `config` (a dataclass, dict or plain value; tensors by content), the scale, the PyTorch version,
    and the code: all that `fn` can reach in llama2lib and in the notebook, with the values it reads there.
    Results are (nested) dicts and lists of tensors, numpy arrays, str, int, float (NaN and infinities kept), bool and
    None. Tensors come back detached, contiguous and on the CPU, tuples as lists, numpy scalars as Python numbers, also
    on the first call. A damaged entry is rebuilt, with a message; of concurrent writers the last one stays.
    ValueError: a bad name, something whose state cannot be part of the key, or a result that cannot be stored.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"cached: the name {name!r} is part of a file name; use letters, digits, '_', '-' and '.'")
    made_of = {"config": _fingerprint(config, "config")} | _made_of(fn, {})
    key = json.dumps([scale(), torch.__version__, made_of], sort_keys=True)
    path = cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.safetensors"
    if path.exists():
        try:
            return _read_entry(path)
        except ValueError as error:
            print(f"cached: {path.name} is damaged and is built again ({error})")
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_pack(fn(), tensors, f"cached {name!r}: result"))
    write_atomic(path, save(tensors, {"result": text, "sha256": _checksum(text, tensors)}))
    return _unpack(json.loads(text), tensors)
