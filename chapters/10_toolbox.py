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
# The key also holds the scale and the version of PyTorch. What a function reads from files, from the environment or
# from the global random state is not seen: put it (or a digest of it) into `config`, and seed inside the function.

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

# %% [markdown]
# ## Stats: intervals and agreement
#
# The ledger judges a claim by an interval, not by a number. Every function here returns the estimate with its interval.
#
# ### How often does one model win?
#
# The paper's Figures 2 and 11 show win / (win + loss), so ties are left out by default. Figures 1 and 12 show ties too:
# counted, a tie is half a win for each side. The interval is Wilson's, which stays within 0 and 1 and is sound for
# small counts. Ties vary less than wins do, so with ties it is a little too wide.

# %%
#| export stats
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    "An estimate and the ends of its confidence interval, in the estimate's unit."

    value: float
    low: float
    high: float


def win_rate_interval(wins: int, losses: int, ties: int = 0, confidence: float = 0.95) -> Interval:
    """Win rate (wins + ties / 2) / (wins + losses + ties) with Wilson's score interval; all in 0..1.

    Leave `ties` out for the paper's win / (win + loss), Figures 2 and 11. ValueError: a negative count, or all are 0.
    """
    n = wins + losses + ties
    if min(wins, losses, ties) < 0 or n == 0:
        raise ValueError(f"win rate of {wins} wins, {losses} losses, {ties} ties: counts must be >= 0 and not all 0")
    rate, z = (wins + ties / 2) / n, stats.norm.ppf((1 + confidence) / 2)
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    return Interval(rate, float(max(centre - half, 0)), float(min(centre + half, 1)))


# %%
for wins, losses in [(0, 5), (7, 3), (1500, 1100), (40, 0)]:  # SciPy has the formula for whole counts, without ties
    expected = stats.binomtest(wins, wins + losses).proportion_ci(method="wilson")
    assert np.allclose(win_rate_interval(wins, losses)[1:], expected)
win_rate_interval(60, 40), win_rate_interval(60, 40, ties=100)

# %% [markdown]
# ### Is a better than b?
#
# Scores of two models on the same prompts, for several training seeds, form two tables with a row per seed and a column
# per prompt. Their difference varies for two reasons: another seed would have trained other models, and other prompts
# could have been asked. The bootstrap draws seeds with replacement, then prompts with replacement. All seeds answered
# the same prompts, so a draw of prompts is used for all seeds: an odd prompt is odd for every seed, and drawing prompts
# anew for each seed would average that away.

# %%
#| export stats
def paired_interval(a, b, confidence: float = 0.95, n_resamples: int = 4000, seed: int = 0) -> Interval:
    """Mean of a - b with its interval, by a crossed bootstrap: seeds, then prompts shared by the seeds.

    a, b: scores [seeds, prompts] of the same prompts, or [prompts] for one seed (the interval then says nothing about
    seeds). Percentile interval; deterministic given `seed`. ValueError: unequal shapes, no scores, one not finite.
    """
    a, b = (np.atleast_2d(np.asarray(x, dtype=np.float64)) for x in (a, b))
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"paired scores are [seeds, prompts] and of one shape, not {a.shape} and {b.shape}")
    if a.size == 0 or not np.isfinite(a - b).all():
        raise ValueError("paired scores must be finite and at least one; drop a prompt from both tables, on purpose")
    difference, generator = a - b, np.random.default_rng(seed)
    (n_seeds, n_prompts), means = difference.shape, []
    for block in np.array_split(np.arange(n_resamples), -(-n_resamples * n_prompts // 1_000_000)):
        seeds = generator.multinomial(n_seeds, [1 / n_seeds] * n_seeds, len(block))  # how often each one is drawn
        prompts = generator.multinomial(n_prompts, [1 / n_prompts] * n_prompts, len(block))
        means.append(np.einsum("rs,sp,rp->r", seeds, difference, prompts, optimize=True) / difference.size)
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(difference.mean()), float(low), float(high))


# %%
random = np.random.default_rng(0)
scores = random.normal(size=(3, 200))
better = paired_interval(scores + 0.1 + random.normal(0, 0.3, (3, 200)), scores)
assert better.low < better.value < better.high
assert paired_interval(scores, scores + 0.25)[1:] == (-0.25, -0.25)  # no spread in, no spread out
better

# %% [markdown]
# Does a 95 % interval hold the truth 95 times in 100? We draw experiments whose true difference is 0, with more and
# more variation between seeds, and count. Three seeds are few: the bootstrap sees two thirds of the variance between
# them, and the interval comes out too narrow when seeds differ much. That is why the ledger wants every seed to have
# the sign besides: the last column is how often its rule (interval above 0, every seed above 0) would hold where
# nothing is true, which should be at most 2.5 %.

# %%
from llama2lib.recipes import by_scale


def coverage(n_seeds: int, seed_sd: float, n_prompts: int = 100) -> tuple[float, float]:
    "Shares of experiments without an effect whose interval holds 0, and in which the ledger's rule is met."
    random, covered, held = np.random.default_rng(0), [], []
    for _ in range(by_scale(smoke=20, laptop=400, a100=2000)):
        seeds, prompts = random.normal(0, seed_sd, (n_seeds, 1)), random.normal(0, 0.5, n_prompts)
        difference = seeds + prompts + random.normal(0, 0.7, (n_seeds, n_prompts))
        interval = paired_interval(difference, np.zeros_like(difference), n_resamples=400)
        covered.append(interval.low <= 0 <= interval.high)
        held.append(interval.low > 0 and bool((difference.mean(1) > 0).all()))
    return np.mean(covered), np.mean(held)


print("seeds  sd between seeds  holds the truth  false 'holds'")
for n_seeds in (3, 5):
    for seed_sd in (0, 0.05, 0.2, 1):
        covered, held = coverage(n_seeds, seed_sd)
        print(f"{n_seeds:5d}  {seed_sd:16.2f}  {covered:15.1%}  {held:13.1%}")

# %% [markdown]
# The standard error from 100 prompts is about 0.06 here. Seeds that differ less than that do no harm, and the interval
# is even a little wide. Where they differ much more (last rows), three seeds give an interval that misses the truth one
# time in four, and the rule comes down to its second half: three signs agree by chance one time in eight, far more
# often than the 2.5 % that the interval promises. A verdict from three seeds whose means lie far apart is a reason to
# add seeds. Five bring the rule back to its promise: their signs agree by chance one time in 32.

# %% [markdown]
# ### Do the raters agree?
#
# Section A.3.7 of the paper reports Gwet's AC1 (categories) and AC2 (ordered ratings): agreement beyond chance, where
# chance is measured in a way that stays sane when nearly all items fall in one category. The known Python package,
# irrCAC, pins old versions of NumPy and SciPy, and `agreement` gives no interval; so this is Gwet's formula (2014,
# chapters 4 and 5; the variance is that of 2008), and the tests compare it with irrCAC's output.

# %%
#| export stats
WEIGHTS = {  # agreement of two ratings x, y on a scale of width w; for 'ordinal', x and y are ranks and w = Q - 1
    "identity": lambda x, y, w: (x == y) * 1.0,
    "linear": lambda x, y, w: 1 - abs(x - y) / w,
    "quadratic": lambda x, y, w: 1 - ((x - y) / w) ** 2,
    "ordinal": lambda x, y, w: 1 - abs(x - y) * (abs(x - y) + 1) / (w * (w + 1)),
}


def _rating_counts(ratings, categories) -> tuple[np.ndarray, list]:
    "How many raters put each rated item in each category [items, categories], and the categories in order."
    rows = [list(row) for row in ratings]
    if len({len(row) for row in rows}) != 1 or len(rows[0]) < 2:
        raise ValueError("ratings are a table [items, raters] of two raters or more; None or NaN where one is missing")
    rows = [[x for x in row if x is not None and x == x] for row in rows]
    used = {x for row in rows for x in row}
    categories = sorted(used) if categories is None else list(categories)
    if not used <= set(categories):
        raise ValueError(f"ratings {sorted(used - set(categories), key=repr)} are not in the categories {categories}")
    counts = np.array([[row.count(category) for category in categories] for row in rows if row], dtype=float)
    if (counts.sum(1) >= 2).sum() < 1 or len(counts) < 2:
        raise ValueError("agreement needs two rated items or more, and an item that two raters rated")
    return counts, categories


def gwet_ac2(ratings, weights: str = "quadratic", categories=None, confidence: float = 0.95) -> Interval:
    """Gwet's AC2 (2014), with the interval for these raters and other items; 1 is full agreement, 0 is chance.

    ratings: table [items, raters]; None or NaN is missing. Items that one rater rated count towards chance only, items
    without ratings not at all. `categories` lists the scale in order (default: the ratings that occur; pass the whole
    scale if some do not, as AC depends on their number). Numbers are spaced as their values, other categories evenly.
    `weights` is one of WEIGHTS. With one category there is no chance to correct for, and the result is (1, 1, 1).
    ValueError: fewer than two raters or rated items, no item rated twice, or a rating outside the categories.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r} is not one of {', '.join(WEIGHTS)}")
    counts, categories = _rating_counts(ratings, categories)
    n, q = counts.shape
    if q == 1:
        return Interval(1.0, 1.0, 1.0)
    numbers = weights != "ordinal" and all(isinstance(c, int | float | np.number) for c in categories)
    x = np.array(categories if numbers else range(q), dtype=float)
    agreement = WEIGHTS[weights](x[:, None], x[None, :], np.ptp(x))
    raters, chance = counts.sum(1), agreement.sum() / (q * (q - 1))
    twice = raters >= 2
    observed_i = (counts * (counts @ agreement - 1)).sum(1) / np.where(twice, raters * (raters - 1), 1)
    observed = observed_i[twice].mean()
    share = (counts / raters[:, None]).mean(0)
    expected = chance * (share * (1 - share)).sum()
    value = (observed - expected) / (1 - expected)
    expected_i = chance * (counts @ (1 - share)) / raters
    value_i = n / twice.sum() * np.where(twice, observed_i - expected, 0) / (1 - expected)
    value_i -= 2 * (1 - value) * (expected_i - expected) / (1 - expected)
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * np.sqrt(((value_i - value) ** 2).sum() / (n * (n - 1)))
    return Interval(float(value), float(value - half), float(min(value + half, 1)))


def gwet_ac1(ratings, categories=None, confidence: float = 0.95) -> Interval:
    "Gwet's AC1 (2008): AC2 where two ratings agree only if they are equal; categories need no order."
    return gwet_ac2(ratings, "identity", categories, confidence)


# %% [markdown]
# Gwet's own example (2014, page 55): four raters, twelve units, five categories, seven ratings missing; he finds
# 0.7754.

# %%
_ = None
UNITS = [
    [1, 1, _, 1], [2, 2, 3, 2], [3, 3, 3, 3], [3, 3, 3, 3], [2, 2, 2, 2], [1, 2, 3, 4],
    [4, 4, 4, 4], [1, 1, 2, 1], [2, 2, 2, 2], [_, 5, 5, 5], [_, _, 1, 1], [_, _, 3, _],
]  # fmt: skip
assert round(gwet_ac1(UNITS).value, 4) == 0.7754
print("AC1", gwet_ac1(UNITS))
print("AC2", gwet_ac2(UNITS))

# %% [markdown]
# ## Launch: several processes from a cell
#
# Training on several GPUs is started with PyTorch's `torchrun`. A launcher cell prints the command, to be copied into a
# shell at the repository root, and runs it as well when it can: two processes on a CPU always, GPUs only if
# `LLAMA2_LAUNCH=1` says that they are there. (`torchrun` is `python -m torch.distributed.run` of the same environment;
# the cell runs the second spelling, and adds only flags for logs.)

# %%
#| export launch
import os
import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from llama2lib.recipes import ROOT


def torchrun_arguments(module: str, *args, nproc: int = 2, nnodes: int = 1) -> list[str]:
    """Arguments of torchrun for a module (`llama2lib.sft`) or a script (a path that ends in .py).

    One node finds a free port by itself. With more, the same command is started on every node, and they meet at port
    29500 of `$HEAD_NODE`, which the shell fills in.
    """
    meeting = ["--standalone"]
    if nnodes > 1:
        meeting = [f"--nnodes={nnodes}", "--rdzv-backend=c10d", "--rdzv-id=llama2", "--rdzv-endpoint=$HEAD_NODE:29500"]
    program = [module] if module.endswith(".py") else ["-m", module]
    return [*meeting, f"--nproc-per-node={nproc}", *program, *map(str, args)]


# %%
print("torchrun", shlex.join(torchrun_arguments("llama2lib.sft", "--steps", 3)))

# %% [markdown]
# When one rank fails, the others are stopped, and what torchrun prints last is a summary without the reason. The reason
# is in the log of the rank that failed first. A program whose main function is decorated with PyTorch's `@record` also
# leaves it in an error file, written before its peers can notice; without one, we take the first log that ends with a
# traceback.

# %%
#| export launch
import json


def first_failure(logs: Path) -> str:
    "The traceback of the rank that failed first, from a `--log-dir` of torchrun; '' if no rank left one."
    errors = sorted(logs.glob("**/error.json"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        message = json.loads(errors[0].read_text("utf-8"))["message"]
        text = message if isinstance(message, str) else message["extraInfo"]["py_callstack"]
        return f"rank {errors[0].parent.name} failed:\n{text.strip()}"
    for path in sorted(logs.glob("**/stderr.log"), key=lambda path: path.stat().st_mtime_ns):
        text = path.read_text("utf-8", "replace")
        if "Traceback (most recent call last)" in text:
            return f"rank {path.parent.name} failed:\n{text[text.index('Traceback') :].strip()}"
    return ""


def launch(module: str, *args, nproc: int = 2, nnodes: int = 1, gpus: bool = False, env: dict | None = None) -> bool:
    """Print the torchrun command for a module or script, and run it if this machine can; True if it ran.

    CPU commands on one node run; with `gpus`, only if `LLAMA2_LAUNCH=1`; on several nodes, never (a cell is on one).
    `env` is added to the environment. Output appears as it is written, each line with its rank; the working folder is
    the repository root. RuntimeError, with the traceback of the first rank that failed, if the command fails; an
    interrupt stops the processes.
    """
    added = {key: str(value) for key, value in (env or {}).items()}
    if not gpus and "OMP_NUM_THREADS" not in os.environ:  # the processes share the cores
        added.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // nproc)))
    arguments = torchrun_arguments(module, *args, nproc=nproc, nnodes=nnodes)
    words = [f"{key}={shlex.quote(value)}" for key, value in added.items()]
    words += ["torchrun", *(f'"{word}"' if "$HEAD_NODE" in word else shlex.quote(word) for word in arguments)]
    print("$", " ".join(words))
    if nnodes > 1:
        print(f"Not run here: start it on each of the {nnodes} nodes.")
        return False
    if gpus and os.environ.get("LLAMA2_LAUNCH") != "1":
        print(f"Not run here: it needs {nproc} GPU{'s' * (nproc > 1)}. Where they are, set LLAMA2_LAUNCH=1.")
        return False
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with TemporaryDirectory(prefix="torchrun-") as logs:
        flags = ["--log-dir", logs, "--tee=3", "--role=rank"]  # files for us, a copy for the cell, lines as "[rank0]:"
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *flags, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path} | added,
            start_new_session=True,  # an interrupt reaches this process, which then stops the others in order
        )  # fmt: skip
        try:
            tail = []
            for line in process.stdout:
                if line.startswith("[rank"):  # torchrun's own lines matter only if no rank explains a failure
                    print(line, end="", flush=True)
                tail = [*tail[-40:], line]
            code = process.wait()
        except BaseException:
            process.terminate()  # torchrun stops its workers, by force after 30 s
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
        if code:
            raise RuntimeError(f"{module}: {first_failure(Path(logs)) or 'torchrun failed:' + chr(10) + ''.join(tail)}")
    return True


# %% [markdown]
# Commands for one node of eight GPUs, and for 64 such nodes, are shown and wait for the hardware.

# %%
launch("llama2lib.sft", "--model", "7B", nproc=8, gpus=True)
launch("llama2lib.pretrain", "--model", "70B", nproc=8, nnodes=64, gpus=True)

# %%
from llama2lib.recipes import cache_folder, write_atomic

script = cache_folder() / "hello.py"
write_atomic(script, "import os\nprint('hello from', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])\n")
assert launch(os.path.relpath(script, ROOT))

# %% [markdown]
# A failure names the rank and shows its traceback.

# %%
from contextlib import redirect_stdout
from io import StringIO

write_atomic(script, "import os\nassert os.environ['RANK'] == '0', 'this rank has a bug'\n")
try:
    with redirect_stdout(StringIO()):
        launch(os.path.relpath(script, ROOT))
except RuntimeError as error:
    lines = str(error).splitlines()
    print(lines[0], "...", lines[-1], sep="\n")
assert lines[0].endswith("rank 1 failed:") and lines[-1] == "AssertionError: this rank has a bug"
