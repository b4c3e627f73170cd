"The scale, atomic files and the cache: a stale or half-written result must never be returned."

import dataclasses
import json
import linecache
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from llama2lib import recipes
from llama2lib.model import LLAMA2, ModelConfig
from llama2lib.recipes import cache_folder, cached, data_file, scale, seeds, source_digest, write_atomic


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA2_CACHE", str(tmp_path / "cache"))
    for name in ("LLAMA2_SCALE", "LLAMA2_SEEDS", "LLAMA2_DATA"):
        monkeypatch.delenv(name, raising=False)


def entries() -> list[Path]:
    return sorted(cache_folder().glob("*.safetensors"))


# ---------- environment


def test_scale_defaults_and_names_the_choices(monkeypatch):
    assert scale() == "laptop"
    monkeypatch.setenv("LLAMA2_SCALE", "labtop")
    with pytest.raises(ValueError, match=r"'labtop'.*smoke, laptop, a100.*mean 'laptop'"):
        scale()


def test_seeds(monkeypatch):
    assert seeds() == (0, 1, 2) and seeds((7,)) == (7,)
    monkeypatch.setenv("LLAMA2_SEEDS", "3, 4,5")
    assert seeds() == (3, 4, 5)
    for bad in ("3,,4", "a", "1.5", "-1", "3,3"):
        monkeypatch.setenv("LLAMA2_SEEDS", bad)
        with pytest.raises(ValueError, match="LLAMA2_SEEDS"):
            seeds()


def test_data_file(monkeypatch, tmp_path):
    assert data_file("x.txt") is None
    monkeypatch.setenv("LLAMA2_DATA", str(tmp_path))
    assert data_file("x.txt") is None
    (tmp_path / "x.txt").write_text("x")
    assert data_file("x.txt") == tmp_path / "x.txt"
    monkeypatch.setenv("LLAMA2_DATA", str(tmp_path / "absent"))
    with pytest.raises(NotADirectoryError, match="LLAMA2_DATA"):
        data_file("x.txt")


# ---------- atomic files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "a.txt"
    write_atomic(path, "öld")
    assert path.read_bytes() == "öld".encode()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_text("utf-8") == "öld" and os.listdir(path.parent) == ["a.txt"]


def test_a_write_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    steps, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: steps.append("flush") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *names: steps.append("rename") or replace(*names))
    write_atomic(tmp_path / "a.txt", "text")
    assert steps == ["flush", "rename"]


# ---------- digests


def test_digest_ignores_comments_and_layout_only():
    assert source_digest("a = 1") == source_digest("# %% [markdown]\n# prose\n\na = 1    # why\n\n")
    different = ["a = 1", "a = 2", "a = '# 1'", "a = '# 2'", "a = '''x\n\ny'''", "a = '''x\ny'''", "a = '''x \ny'''"]
    assert len({source_digest(source) for source in different}) == len(different)


@pytest.fixture
def package(tmp_path, monkeypatch):
    "A llama2lib of two modules, where outer imports inner."
    folder = tmp_path / "llama2lib"
    folder.mkdir()
    (folder / "inner.py").write_text("X = 1  # one\n")
    (folder / "outer.py").write_text("from llama2lib.inner import X\n")
    monkeypatch.setattr(recipes, "ROOT", tmp_path)
    return folder


@pytest.mark.parametrize(
    "source",
    ["from llama2lib.outer import X", "import llama2lib.outer", "from llama2lib import outer",
     "def f():\n    from llama2lib import outer", "launch('llama2lib.outer')", "llama2lib.outer.X"],
)  # fmt: skip
def test_digest_follows_imports(package, source):
    before = source_digest(source)
    (package / "inner.py").write_text("X = 1  # still one\n")
    assert source_digest(source) == before
    (package / "inner.py").write_text("X = 2  # one\n")
    assert source_digest(source) != before


# ---------- what is stored


def test_round_trip_is_exact_and_the_first_call_equals_the_next():
    value = {
        "int": 2**70, "float": 0.1, "negative zero": -0.0, "inf": math.inf, "text": "é\n\ud800",
        "flag": True, "none": None,
        "nested": {"list": [1, (2.5, "x"), {}], "empty": []},
        "bf16": torch.randn(2, 3).bfloat16(), "scalar": torch.tensor(3),
        "no rows": torch.zeros(0, 4, dtype=torch.int16),
        "bool": torch.tensor([True, False]), "transposed": torch.arange(6).reshape(2, 3).T,
        "grad": torch.ones(2, requires_grad=True),
        "array": np.arange(6, dtype=np.uint16).reshape(2, 3)[:, ::2], "0-d": np.array(2.0, dtype=np.float32),
    }  # fmt: skip
    first, again = (cached("values", {}, ValueOf(value)) for _ in range(2))
    for result in (first, again):
        assert json.dumps({k: v for k, v in result.items() if not hasattr(v, "dtype")}) == json.dumps(
            {k: v for k, v in value.items() if not hasattr(v, "dtype")}
        )
        assert math.copysign(1, result["negative zero"]) == -1 and result["nested"]["list"][1] == [2.5, "x"]
        for key, expected in value.items():
            if hasattr(expected, "dtype"):
                assert type(result[key]) is type(expected)
                assert result[key].dtype == expected.dtype and result[key].shape == expected.shape
                assert (result[key] == expected).all()
    assert not first["grad"].requires_grad


def ValueOf(value):
    "A function that returns a value the key cannot see: the tests' way round the refusal of unknown state."
    box.value = value
    return from_box


class box:
    value = None


def from_box(config):
    return sys.modules["test_recipes_box"].value


sys.modules["test_recipes_box"] = box  # looked up at run time, out of the cache's sight


def test_a_state_dict_comes_back_as_a_dict():
    weights = torch.nn.Linear(2, 3).state_dict()
    assert type(weights) is not dict
    result = cached("weights", {}, ValueOf({"weights": weights}))["weights"]
    assert list(result) == list(weights) and all(torch.equal(result[name], weights[name]) for name in weights)


def test_nan_is_kept():
    for _ in range(2):
        assert math.isnan(cached("nan", {}, ValueOf({"loss": float("nan")}))["loss"])


@pytest.mark.parametrize(
    ("bad", "where"),
    [({"a": {"b": object()}}, r"\['a'\]\['b'\].*object"), ({"a": {1: 2}}, r"\['a'\].*key 1"), ({"s": {1, 2}}, "set"),
     ({"t": [np.array(["x"])]}, r"\['t'\]\[0\]"), ({"c": torch.zeros(2, dtype=torch.complex128)}, "complex128"),
     ({"__tensor__": "0"}, "__tensor__")],
)  # fmt: skip
def test_what_cannot_be_stored_names_the_key(bad, where):
    with pytest.raises(ValueError, match=f"cached 'bad': result.*{where}"):
        cached("bad", {}, ValueOf(bad))
    assert entries() == []


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "swap", "garbage"])
def test_a_damaged_entry_is_built_again(damage, capsys):
    weights = torch.arange(1000.0)
    cached("weights", {}, ValueOf({"w": weights, "note": "fine"}))
    (path,) = entries()
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
    elif damage == "swap":
        data = data.replace(b"fine", b"fake")
    path.write_bytes({"truncate": bytes(data[:-100]), "empty": b"", "garbage": b"x" * 200}.get(damage, bytes(data)))
    result = cached("weights", {}, ValueOf({"w": weights, "note": "fine"}))
    assert torch.equal(result["w"], weights) and result["note"] == "fine"
    assert "damaged" in capsys.readouterr().out
    assert cached("weights", {}, ValueOf(None))["note"] == "fine" and not capsys.readouterr().out


def run(folder: Path, code: str, **kwargs) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(recipes.ROOT)}
    (folder / "script.py").write_text(textwrap.dedent(code))
    return subprocess.Popen([sys.executable, str(folder / "script.py")], env=env, text=True, **kwargs)


def test_a_kill_leaves_no_entry_or_a_whole_one(tmp_path):
    "A process writes 20 MB entries and is killed in the midst; no entry was ever seen, or is left, that is not whole."
    code = """
        import torch
        from llama2lib.recipes import cached
        def big(config):
            return {"w": torch.zeros(5_000_000)}
        for i in range(1000):
            cached("big", {"i": i}, big)
    """
    process = run(tmp_path, code)
    sizes = set()  # what a kill at that moment would have left
    while len(entries()) < 4 or not list(cache_folder().glob(".*.tmp")):
        sizes.update(path.stat().st_size for path in entries())
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(sizes) == 1
    for path in entries():
        assert recipes._read_entry(path)["w"].shape == (5_000_000,)


def test_concurrent_writers_both_succeed(tmp_path):
    code = """
        import torch
        from llama2lib.recipes import cached
        def ones(config):
            return {"w": torch.full((1000,), 1.0)}
        for i in range(20):
            assert cached("same", {"i": i}, ones)["w"].sum() == 1000
    """
    processes = [run(tmp_path, code, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    for process in processes:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "damaged" not in out, out
    assert len(entries()) == 20


# ---------- what makes a new entry


def key_of(source: str, config=None, name: str = "f") -> str:
    "Name of the entry made by `fn`, after running the source as a notebook would."
    source, file = textwrap.dedent(source), f"<cell {len(linecache.cache)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    space = {"__name__": "__main__", "torch": torch, "np": np}
    exec(compile(source, file, "exec"), space)
    before = set(entries())
    cached(name, config, space["fn"])
    new = set(entries()) - before
    for path in new:
        path.unlink()
    return new.pop().name


BASE = """
    import llama2lib.optim as optim
    def helper(x):
        return x + 3
    def fn(config, n=2):
        return {"y": [helper(i) for i in range(n)]}
"""


def test_comments_and_layout_do_not_make_a_new_entry():
    commented = "\n\n# a comment\n" + textwrap.dedent(BASE).replace("x + 3", "x + 3  # sum\n\n")
    assert commented.count("#") == 2 and key_of(BASE) == key_of(commented)


@pytest.mark.parametrize(
    ("old", "new"),
    [("x + 3", "x + 4"), ("x + 3", "x - 3"), ("n=2", "n=3"), ("helper(i)", "helper(i + 1)"), ('"y"', '"z"'),
     ("helper(i)", "optim.cosine_lr(i, 1, 1, 9)")],
)  # fmt: skip
def test_any_code_it_reaches_makes_a_new_entry(old, new):
    assert old in BASE and key_of(BASE) != key_of(BASE.replace(old, new))


def test_defaults_count_by_value():
    assert len({key_of(f"N = {n}\ndef fn(config, n=N):\n    return {{'n': n}}") for n in (1, 2)}) == 2


def test_the_version_of_pytorch_counts(monkeypatch):
    before = key_of(BASE)
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert key_of(BASE) != before


@pytest.mark.parametrize(
    "source",
    ["STEPS = 3\ndef fn(config):\n    return {'x': STEPS}",
     "config = 1\ndef fn(_):\n    return {'x': config}",
     "g = torch.Generator()\ndef fn(config):\n    return {'x': torch.randn(1, generator=g)}",
     "m = torch.nn.Linear(1, 1)\ndef fn(config):\n    return {'x': [m(torch.ones(1)) for _ in range(2)]}",
     "r = np.random.default_rng()\nd = r.random\ndef fn(config):\n    return {'x': d()}",
     "from llama2lib.pretrain import PRETRAIN\ndef fn(config):\n    return {'x': PRETRAIN['7B'].steps}",
     "class C:\n    x = 1\n    def run(self, config):\n        return {}\ndef fn(config):\n    return {'x': C.x}",
     "class C:\n    def run(self, config):\n        return {}\nfn = C().run",
     "def make(n):\n    def fn(config):\n        return {'n': n}\n    return fn\nfn = make(1)",
     "def make(n):\n    def f():\n        return n\n    return f\nf = make(1)\ndef fn(config):\n    return {'n': f()}",
     "import functools\ndef twice(f):\n    @functools.wraps(f)\n    def g(c):\n        return f(c)\n    return g\n"
     "@twice\ndef fn(config):\n    return {}",
     "from functools import partial\ndef f(a, config):\n    return {}\nfn = partial(f, 1)",
     "fn = lambda config: {'x': 1}"],
)  # fmt: skip
def test_data_that_the_key_cannot_see_is_refused(source):
    with pytest.raises(ValueError, match="cached: "):
        key_of(source)


@pytest.mark.parametrize(
    "source",
    ["from llama2lib.outer import f as fn", "from llama2lib.outer import f\ndef fn(config):\n    return f(config)",
     "def fn(config):\n    from llama2lib.outer import f\n    return f(config)",
     "from llama2lib.outer import f\ndef g(x):\n    return f(x)\ndef fn(config):\n    return g(config)",
     "from llama2lib.outer import f\ndef fn(config):\n    with torch.no_grad():\n        return f(config)",
     "def fn(config):\n    return {'ran': 'llama2lib.outer'}",
     "import llama2lib.outer as outer\ndef fn(config):\n    return outer.f(config)"],
)  # fmt: skip
def test_library_code_it_reaches_makes_a_new_entry(package, source, monkeypatch):
    import llama2lib

    (package / "outer.py").write_text("from llama2lib.inner import X\ndef f(config):\n    return {'x': X}\n")
    monkeypatch.setattr(llama2lib, "__path__", [str(package)])
    try:
        before = key_of(source)
        (package / "outer.py").write_text("from llama2lib.inner import X\n# f\ndef f(config):\n    return {'x': X}\n")
        assert key_of(source) == before
        (package / "inner.py").write_text("X = 2\n")
        assert key_of(source) != before
    finally:
        for name in ("inner", "outer"):
            sys.modules.pop(f"llama2lib.{name}", None)
            vars(llama2lib).pop(name, None)


def test_configuration_and_scale_count(monkeypatch):
    assert key_of(BASE, {"a": 1, "b": 2}) == key_of(BASE, {"b": 2, "a": 1})
    assert key_of(BASE, LLAMA2["7B"]) == key_of(BASE, ModelConfig()) != key_of(BASE, LLAMA2["13B"])
    values = [1, 1.0, True, "1", None, [1], (1,), {1: 2}, {"1": 2}, ["a", 2], {"a": 2}, Path("1")]
    values += [LLAMA2["7B"], {"x": LLAMA2["7B"]}, {"x": LLAMA2["13B"]}, torch.ones(1), torch.zeros(1), np.ones(1)]
    assert len({key_of(BASE, {"a": value}) for value in values}) == len(values)
    before = key_of(BASE)
    monkeypatch.setenv("LLAMA2_SCALE", "smoke")
    assert key_of(BASE) != before


def test_the_code_of_a_dataclass_in_the_configuration_counts(tmp_path, monkeypatch):
    plain = "def fn(config):\n    return {}"
    with_shape, without = key_of(plain, {"shape": LLAMA2["7B"]}), key_of(plain)
    (tmp_path / "llama2lib").mkdir()
    (tmp_path / "llama2lib" / "model.py").write_text("changed = 1\n")
    monkeypatch.setattr(recipes, "ROOT", tmp_path)
    monkeypatch.setenv("LLAMA2_CACHE", str(tmp_path / "cache"))
    assert key_of(plain, {"shape": LLAMA2["7B"]}) != with_shape and key_of(plain) == without


@dataclasses.dataclass
class Recipe:
    steps: int = 3


@pytest.mark.parametrize("config", [Recipe(), {"a": [Recipe()]}, {"a": object()}, {"a": torch.nn.Linear(1, 1)}])
def test_a_configuration_that_hides_code_or_state_is_refused(config):
    with pytest.raises(ValueError, match="cached: config"):
        key_of(BASE, config)


def test_the_key_is_the_same_in_another_process(tmp_path, monkeypatch):
    code = """
        import dataclasses, torch
        from llama2lib.recipes import cached
        def fn(config):
            return {"x": "a" in {"a", "b", "c"}, "y": config["b"]}
        cached("stable", {"b": 1, "a": [2]}, fn)
    """
    for hash_seed in "01":
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
        assert run(tmp_path, code).wait(60) == 0
    assert len(entries()) == 1


def test_a_bad_name_is_refused():
    with pytest.raises(ValueError, match="file name"):
        cached("a/b", {}, from_box)
