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
from typing import TypeVar

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

_Value = TypeVar("_Value")


def by_scale(*, smoke: _Value, laptop: _Value, a100: _Value) -> _Value:
    "The value for this run's scale. ValueError as of `scale`."
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


def _spelled(value, tensors: dict[str, torch.Tensor], where: str) -> str:
    """A configuration as text that differs where its contents do; tensors and arrays are added to `tensors`.

    A dataclass brings the code of its llama2lib module with it. ValueError names what cannot be stored.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        if not kind.__module__.startswith("llama2lib."):
            raise ValueError(f"{where} is a {kind.__name__}, not of llama2lib; pass its fields as a dict")
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return f"{kind.__qualname__} {source_digest(f'import {kind.__module__}')} {_spelled(fields, tensors, where)}"
    if isinstance(value, dict):
        items = sorted(value.items(), key=lambda pair: repr(pair[0]))
        parts = (f"{key!r}: {_spelled(item, tensors, f'{where}[{key!r}]')}" for key, item in items)
        return f"{{{', '.join(parts)}}}"
    if type(value) in (list, tuple):
        parts = (_spelled(item, tensors, f"{where}[{i}]") for i, item in enumerate(value))
        return f"{type(value).__name__}[{', '.join(parts)}]"
    return f"path {str(value)!r}" if isinstance(value, Path) else json.dumps(_pack(value, tensors, where))


def _fingerprint(value, where: str) -> str:
    "Checksum of a configuration by content; ValueError if it has state that cannot be stored."
    tensors: dict[str, torch.Tensor] = {}
    return _checksum(_spelled(value, tensors, f"cached: {where}"), tensors)


def _names_read(code: types.CodeType) -> set[str]:
    "Global names that a code object reads, those of functions and comprehensions inside it included."
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_names_read(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


def _code_of(fn, seen: dict[int, list]) -> dict[int, list]:
    "Sources and digests of all that a function reaches, by the function's id; ValueError for what hides data."
    where = getattr(fn, "__qualname__", repr(fn))
    if not isinstance(fn, types.FunctionType) or re.search(r"<lambda>|<locals>", where):
        raise ValueError(f"cached: {where} is not a function defined with def at the top level, which the key can see")
    if fn.__module__.startswith("llama2lib."):
        seen[id(fn)] = [source_digest(f"import {fn.__module__}")]
        return seen
    if hasattr(fn, "__wrapped__"):
        raise ValueError(f"cached: {where} is decorated; use the decorator inside it, where the key can see it")
    try:
        source = textwrap.dedent(inspect.getsource(fn))
    except OSError:
        raise ValueError(f"cached: the source of {where} cannot be found") from None
    defaults = _fingerprint([fn.__defaults__ or (), fn.__kwdefaults__ or {}], f"defaults of {where}")
    seen[id(fn)] = parts = [where, _code_text(source), defaults]
    modules = {f"llama2lib.{name}" for name in _library_modules(source)}
    for name in sorted(_names_read(fn.__code__) & fn.__globals__.keys()):
        value = fn.__globals__[name]
        home = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None) or ""
        code = inspect.ismodule(value) or isinstance(value, type) or inspect.isroutine(value)
        if not code or inspect.ismethod(value) or (isinstance(value, type) and home == fn.__module__):
            kind = f"the class {name}" if isinstance(value, type) else f"{name}, a {type(value).__name__}"
            raise ValueError(f"cached: {where} reads {kind}, from around it; pass what it needs in the configuration")
        if home.startswith("llama2lib."):
            modules.add(home)
        elif isinstance(value, types.FunctionType) and home == fn.__module__ and id(value) not in seen:
            _code_of(value, seen)
    parts += [source_digest(f"import {module}") for module in sorted(modules)]
    return seen

def cached(name: str, config, fn: Callable[..., dict]) -> dict:
    """`fn(config)`, kept in `cache_folder()` as name-<hash>.safetensors, and read from there the next time.

    `config`: a llama2lib dataclass, dict or plain value; tensors and arrays count by content. `fn`: a function defined
    with def, in llama2lib or in a notebook, that takes all its data from `config`.
    Results are (nested) dicts and lists of tensors, numpy arrays, str, int, float (NaN and infinities kept), bool and
    None. Tensors come back detached, contiguous and on the CPU, tuples as lists, numpy scalars as Python numbers, also
    on the first call. A damaged entry is rebuilt, with a message; of concurrent writers the last one stays.
    ValueError: a bad name, a function whose data the key cannot see, or a result that cannot be stored.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"cached: the name {name!r} is part of a file name; use letters, digits, '_', '-' and '.'")
    key = [scale(), torch.__version__, _fingerprint(config, "config"), list(_code_of(fn, {}).values())]
    path = cache_folder() / f"{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]}.safetensors"
    if path.exists():
        try:
            return _read_entry(path)
        except ValueError as error:
            print(f"cached: {path.name} is damaged and is built again ({error})")
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_pack(fn(config), tensors, f"cached {name!r}: result"))
    write_atomic(path, save(tensors, {"result": text, "sha256": _checksum(text, tensors)}))
    return _unpack(json.loads(text), tensors)
