# %% [markdown]
# ## Recipes: scale and cache
#
# Every chapter runs at one of three scales, and keeps what it trained so that a second run costs seconds. This module
# knows nothing of what is trained; each stage defines its own recipe.

# %%
#| export recipes
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


# %%
#| export recipes
def cache_folder() -> Path:
    "Where trained models and results are kept: `LLAMA2_CACHE`, or .cache/llama2lib in the repository. May not exist."
    return Path(os.environ.get("LLAMA2_CACHE") or ROOT / ".cache" / "llama2lib").expanduser()


# %%
#| export recipes
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

# %%
assert scale() in SCALES and (ROOT / "llama2lib").is_dir()
write_atomic(cache_folder() / "example.txt", "whole or not at all\n")
(cache_folder() / "example.txt").read_text()

# %% [markdown]
# A value that depends on the scale is written with its three choices side by side. Experiments take their seeds from
# `LLAMA2_SEEDS`, so that a claim can be judged again on seeds that were not looked at before.

# %%
#| export recipes
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


# %%
print(f"{scale()}: {by_scale(smoke=10, laptop=300, a100=500_000)} steps, seeds {seeds()}")

# %% [markdown]
# Real data is optional: `LLAMA2_DATA` names a folder, and a cell that finds nothing there says so in a line and goes
# on. A folder that was named but does not exist is a mistake, and stops.

# %%
#| export recipes
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


# %%
print(data_file("no/such/file.jsonl") or "no/such/file.jsonl is not there; this cell would use the synthetic task")

# %% [markdown]
# ### What code is this?
#
# A cached result is worth keeping only while the code that made it is the code we have. The digest of a source covers
# its own text and every `llama2lib` module it imports, directly or not. Comments and layout do not count; docstrings
# and all other strings do. Comments are found as tokens, so a `#` inside a string stays.

# %%
#| export recipes
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


# %%
assert source_digest("x = 1  # one") == source_digest("# a number\n\nx = 1\n")
assert source_digest("x = '# one'") != source_digest("x = '# two'")
assert source_digest("x = '''a\n\nb'''") != source_digest("x = '''a\nb'''")
source_digest("from llama2lib.recipes import cached")[:16]

# %% [markdown]
# ### What can be kept?
#
# Results are dicts of tensors, arrays and plain values. Everything that is not a tensor becomes JSON; tensors and
# arrays go beside it into one safetensors file whose header holds that JSON and a checksum. One file means that there
# is no half of an entry: it is written under another name, then renamed.

# %%
#| export recipes
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
    if type(value) is dict:
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


# %% [markdown]
# ### Which code made it?
#
# A library function stands for its module's digest. A function from a notebook or script has no module of its own that
# could be digested (cells come and go), so we walk what it really uses: its compiled body, the defaults, the variables
# it closes over, and every global it names; helper functions in the same way, library code by digest, plain values,
# tensors and configurations by value. Anything else, such as a model or an open generator, has a state we cannot see:
# it is refused, because a stale hit is worse than an error.

# %%
#| export recipes
import dataclasses
import dis
import importlib.util
import inspect
import sys
import sysconfig
import types


def _bytecode(code: types.CodeType) -> list:
    "What a code object does, in a form that does not depend on names of files or numbers of lines."
    def constant(value):
        if isinstance(value, types.CodeType):
            return _bytecode(value)
        if isinstance(value, tuple | frozenset):
            parts = [json.dumps(constant(item)) for item in value]
            return [type(value).__name__, *(sorted(parts) if isinstance(value, frozenset) else parts)]
        return [type(value).__name__, repr(value)]

    names = [code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars]
    arguments = [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags]
    body = [code.co_code.hex(), getattr(code, "co_exceptiontable", b"").hex()]
    return [body, arguments, [list(group) for group in names], [constant(item) for item in code.co_consts]]


def _globals_of(code: types.CodeType) -> set[str]:
    "The global names that a code object loads, those of nested functions included."
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_globals_of(item) for item in code.co_consts if isinstance(item, types.CodeType)))


def _imports_of(code: types.CodeType) -> set[str]:
    "Modules that a code object imports when it runs, and llama2lib modules that it names in a string."
    steps = [(i.opname, i.argval) for i in dis.get_instructions(code)]
    names = {name for step, name in steps if step == "IMPORT_NAME"}
    if "llama2lib" in names:
        names |= {f"llama2lib.{name}" for step, name in steps if step == "IMPORT_FROM"}
    names |= {item for item in code.co_consts if isinstance(item, str) and re.fullmatch(r"llama2lib(\.\w+)+", item)}
    return names.union(*(_imports_of(item) for item in code.co_consts if isinstance(item, types.CodeType)))


def _origin(module: str) -> str:
    "Where a module comes from: 'book' (llama2lib), 'library' (installed or built in) or 'own' (a notebook or script)."
    root = module.split(".")[0]
    if root == "llama2lib":
        return "book"
    try:
        spec = None if root == "__main__" else importlib.util.find_spec(root)
    except ValueError:  # a module made by hand
        spec = None
    if spec is None or spec.origin in ("built-in", "frozen"):
        return "own" if spec is None else "library"
    installed = tuple(str(Path(sysconfig.get_path(key)).resolve()) for key in ("stdlib", "purelib", "platlib"))
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])
    return "library" if all(str(Path(place).resolve()).startswith(installed) for place in places) else "own"


class _Fingerprint:
    "Collects the parts of a cache key, each object once. `where` is how the reader would find it."

    def __init__(self):
        self.parts, self.seen, self.keep = [], set(), []

    def add(self, value, where: str):
        if id(value) in self.seen:
            return self.parts.append([where, "seen before"])
        match value:
            case types.FunctionType():
                self.once(value)
                self.function(value, where)
            case types.MethodType():
                self.add(value.__func__, where)
                self.add(value.__self__, f"{where}.__self__")
            case functools.partial():
                self.add(value.func, where)
                self.add(list(value.args), f"{where}'s arguments")
                self.add(value.keywords, f"{where}'s keywords")
            case types.ModuleType():
                self.module(value.__name__, where)
            case type():
                self.once(value)
                self.cls(value, where)
            case types.BuiltinFunctionType() if not isinstance(value.__self__, types.ModuleType | type | None):
                self.parts.append([where, value.__name__])
                self.add(value.__self__, f"{where}.__self__")
            case types.BuiltinFunctionType() | np.ufunc() | torch.dtype() | torch.device():
                self.parts.append([where, str(getattr(value, "__qualname__", value))])
            case dict() if type(value) is dict:
                for key, item in sorted(value.items(), key=lambda pair: repr(pair[0])):
                    self.parts.append([where, type(key).__name__, repr(key)])
                    self.add(item, f"{where}[{key!r}]")
            case list() | tuple() if type(value) in (list, tuple):
                self.parts.append([where, type(value).__name__, len(value)])
                for i, item in enumerate(value):
                    self.add(item, f"{where}[{i}]")
            case Path():
                self.parts.append([where, "path", str(value)])
            case _ if isinstance(value, functools._lru_cache_wrapper):
                self.add(value.__wrapped__, where)
            case _ if dataclasses.is_dataclass(value):
                self.add(type(value), f"type of {where}")
                for field in dataclasses.fields(value):
                    self.add(getattr(value, field.name), f"{where}.{field.name}")
            case _:
                tensors = {}
                try:
                    text = json.dumps(_pack(value, tensors, where))
                except ValueError:
                    raise ValueError(
                        f"cached: {where} is a {type(value).__name__}, whose state cannot be part of the key; build it "
                        "inside the function, or pass what it depends on as a plain value"
                    ) from None
                self.parts.append([where, type(value).__name__, _checksum(text, tensors)])

    def once(self, value):
        self.seen.add(id(value))
        self.keep.append(value)

    def module(self, name: str, where: str):
        match _origin(name):
            case "book" if name == "llama2lib":
                raise ValueError(f"cached: {where} is the whole of llama2lib; import its modules by name")
            case "book":
                self.parts.append([where, source_digest(f"import {name}")])
            case "library":
                self.parts.append([where, name])
            case _:
                raise ValueError(f"cached: {where} is the module {name}; import the functions you use from it by name")

    def function(self, fn: types.FunctionType, where: str):
        home = fn.__globals__.get("__name__", "__main__")
        self.parts.append([where, fn.__qualname__])
        match _origin(home):
            case "library":  # such as torch.no_grad() around a function of ours
                self.module(home, where)
                return self.add(getattr(fn, "__wrapped__", None), where)
            case "book":
                self.module(home, where)
            case _:
                self.code(fn.__code__, fn.__globals__, where)
        self.add([fn.__defaults__, fn.__kwdefaults__], f"defaults of {where}")
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            self.add(cell.cell_contents, f"{name} (closed over by {where})")

    def code(self, code: types.CodeType, space: dict, where: str):
        self.parts.append([where, _bytecode(code)])
        for name in sorted(_globals_of(code) & space.keys()):
            self.add(space[name], name)
        for name in sorted(_imports_of(code) - {"llama2lib"}):
            self.module(name, f"{name} (imported by {where})")

    def cls(self, cls: type, where: str):
        self.parts.append([where, cls.__qualname__])
        if _origin(cls.__module__) != "own":
            return self.module(cls.__module__, where)
        try:
            if "<locals>" in cls.__qualname__:
                raise OSError("its surroundings are not known")
            source = inspect.getsource(cls)
        except (OSError, TypeError):
            raise ValueError(f"cached: the source of the class {where} cannot be found; define it in a file") from None
        self.code(compile(source, "<class>", "exec"), vars(sys.modules[cls.__module__]), where)


# %% [markdown]
# The key also holds the scale and the version of PyTorch. What a function reads from files or from the environment is
# not seen: put it (or a digest of it) into `config`.

# %%
#| export recipes
from collections.abc import Callable


def cached(name: str, config, fn: Callable[[], dict]) -> dict:
    """`fn()`, kept in `cache_folder()` as name-<hash>.safetensors, and read from there the next time.

    The hash covers `config` (a dataclass, dict or plain value; tensors by content), the scale, the PyTorch version,
    and the code: `fn` with its defaults and closed-over variables, and all it can reach in llama2lib and the notebook.
    Results are (nested) dicts and lists of tensors, numpy arrays, str, int, float (NaN and infinities kept), bool and
    None. Tensors come back detached, contiguous and on the CPU, tuples as lists, numpy scalars as Python numbers, also
    on the first call. A damaged entry is rebuilt, with a message; of concurrent writers the last one stays.
    ValueError: a bad name, something whose state cannot be part of the key, or a result that cannot be stored.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"cached: the name {name!r} is part of a file name; use letters, digits, '_', '-' and '.'")
    fingerprint = _Fingerprint()
    fingerprint.add(config, "config")
    fingerprint.add(fn, "fn")
    key = json.dumps([scale(), torch.__version__, fingerprint.parts])
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


# %%
def squares(n: int) -> dict:
    print("computing")
    return {"squares": torch.arange(n) ** 2, "mean": (n - 1) * (2 * n - 1) / 6}


first = cached("example", {"n": 4}, lambda: squares(4))
again = cached("example", {"n": 4}, lambda: squares(4))  # prints nothing: the same code, the same configuration
assert torch.equal(first["squares"], again["squares"]) and first["mean"] == again["mean"] == 3.5

# %%
generator = torch.Generator()
try:
    cached("example", {"n": 4}, lambda: {"noise": torch.randn(4, generator=generator)})
except ValueError as error:
    print(error)
