"""Token shards: killed and restarted, damaged, mismatched, full disks; rows that every epoch shows once."""

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2lib import shards as module
from llama2lib.corpus import token_stream
from llama2lib.shards import HEADER, Packed, Shards, ShardsConfig, make_shards, shuffled, write_shards
from llama2lib.tokenizer import train_tokenizer

SIZE = dict(shard_tokens=300)


def documents(count: int = 120) -> list[str]:
    rng = random.Random(0)
    words = ["some", "words", "to", "learn"]
    return [" ".join(rng.choice(words) for _ in range(rng.randrange(30))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(documents(), 280, tmp_path_factory.mktemp("tokenizer") / "t.model")


@pytest.fixture
def folder(tokenizer, tmp_path) -> Path:
    write_shards(tmp_path / "data", tokenizer, documents(), **SIZE)
    return tmp_path / "data"


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def header(folder: Path) -> dict:
    return json.loads((folder / HEADER).read_text())


def test_the_shards_hold_the_stream_and_end_with_documents(folder, tokenizer):
    stream = token_stream(tokenizer, documents())
    data = Shards(folder, tokenizer)
    data.verify()
    assert len(data) == len(stream) and np.array_equal(data.read(0, len(data)), stream)
    assert data.header["documents"] == 120 and data.header["complete"] and len(data.header["shards"]) > 5
    for shard in data.header["shards"]:
        ids = np.frombuffer((folder / shard["file"]).read_bytes(), "<u2")
        assert ids[0] == 1 and ids[-1] == 2 and len(ids) == shard["tokens"]
        assert (ids == 1).sum() == (ids == 2).sum() == shard["documents"]
    assert all(shard["tokens"] >= 300 for shard in data.header["shards"][:-1])


@settings(deadline=None)
@given(st.data())
def test_any_range_is_read_across_the_borders(stored, data):
    shards, stream = stored
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert np.array_equal(shards.read(start, stop), stream[start:stop])


@pytest.fixture(scope="module")
def stored(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    return write_shards(folder, tokenizer, documents(), **SIZE), token_stream(tokenizer, documents())


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4), (0, 10**9)])
def test_ranges_outside_the_data_are_refused(stored, start, stop):
    with pytest.raises(IndexError, match=f"tokens {start} to {stop}"):
        stored[0].read(start, stop)


def test_a_budget_stops_with_the_document_that_reaches_it(tokenizer, tmp_path):
    data = write_shards(tmp_path, tokenizer, itertools.cycle(documents()), tokens=5000, **SIZE)
    longest = max(len(tokenizer.encode(d, bos=True, eos=True)) for d in documents())
    assert 5000 <= len(data) < 5000 + longest
    assert np.array_equal(data.read(0, 5000), token_stream(tokenizer, itertools.cycle(documents()), 5000))


def test_a_large_vocabulary_takes_four_bytes(tmp_path, monkeypatch, tokenizer):
    class Large:
        vocab_size, bos_id, eos_id, digest, path = 70_000, 1, 2, "large", tmp_path

        def encode_batch(self, texts, bos, eos):
            return [[1, 69_999, 2] for _ in texts]

    data = write_shards(tmp_path, Large(), ["a", "b"])
    assert data.read(0, 6).tolist() == [1, 69_999, 2] * 2 and (tmp_path / "shard-00000.bin").stat().st_size == 24
    data.verify()


def in_a_child(task) -> int:
    "Run a task in a forked process; the signal that killed it, or 0."
    child = os.fork()
    if not child:
        code = 1
        try:
            task()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_killed_before_or_after_any_file_operation_it_goes_on_to_the_same_bytes(folder, tokenizer, tmp_path, call):
    "Every place where a kill could leave a file without its header, or a header without its file."
    again, kills = tmp_path / "again", 0
    real = getattr(os, call)

    def write(deadline: int, after: bool):
        calls = itertools.count()

        def deadly(*arguments):
            last = next(calls) == deadline
            if last and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*arguments)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, call, deadly)
        write_shards(again, tokenizer, documents(), **SIZE)

    for number in itertools.count():
        if not in_a_child(partial(write, number % 3, after=bool(number % 2))):
            break
        kills += 1
        assert kills < 200
    assert kills > 5 and files(again) == files(folder)


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(folder, tokenizer, tmp_path):
    again = tmp_path / "again"
    script = f"""
import time
from llama2lib.shards import write_shards
from llama2lib.tokenizer import Tokenizer
from test_shards import SIZE, documents

def slow():
    for document in documents():
        time.sleep(0.02)
        yield document

tokenizer = Tokenizer({str(tokenizer.path)!r})
print("begins", flush=True)
write_shards({str(again)!r}, tokenizer, slow(), **SIZE)
"""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    rng, kills = random.Random(1), 0
    while True:
        child = subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
        )
        with child:
            assert child.stdout.readline() == b"begins\n"
            if kills == 3:
                assert child.wait() == 0
                break
            time.sleep(rng.uniform(0, 1.5))
            kills += child.poll() is None
            child.kill()
    assert files(again) == files(folder)


class Countdown:
    "An iterator of documents that fails after so many."

    def __init__(self, count: int):
        self.documents, self.left = iter(documents()), count

    def __iter__(self):
        return self

    def __next__(self):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return next(self.documents)


@pytest.fixture
def one_by_one(monkeypatch):
    "No document is read ahead, so that an interruption comes where it is meant to."
    monkeypatch.setattr("llama2lib.corpus._batches", lambda documents: ([document] for document in documents))


def test_finished_shards_are_not_tokenised_again(folder, tokenizer, tmp_path, monkeypatch, one_by_one):
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "again", tokenizer, Countdown(100), **SIZE)
    done = header(tmp_path / "again")
    assert 50 < done["documents"] <= 100 and not done["complete"]
    encoded = []
    real = type(tokenizer).encode_batch
    monkeypatch.setattr(
        type(tokenizer), "encode_batch", lambda self, texts, **kw: encoded.extend(texts) or real(self, texts, **kw)
    )
    write_shards(tmp_path / "again", tokenizer, documents(), **SIZE)
    assert len(encoded) == 120 - done["documents"] and files(tmp_path / "again") == files(folder)


def test_a_finished_folder_is_left_as_it_is(folder, tokenizer):
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    write_shards(folder, tokenizer, documents(), **SIZE)
    assert before == {file: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_an_unfinished_folder_is_not_read(tokenizer, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, tokenizer, Countdown(100), **SIZE)
    with pytest.raises(ValueError, match="not finished; run the command that began it again"):
        Shards(tmp_path)


@pytest.mark.parametrize("place", ["write", "fsync", "replace"])
@pytest.mark.parametrize("shard", [0, 3])
def test_a_full_disk_leaves_what_was_finished(folder, tokenizer, tmp_path, monkeypatch, place, shard):
    "And a restart completes it."
    again, full = tmp_path / "again", OSError(errno.ENOSPC, "No space left on device")
    if place == "write":
        real = Path.open

        class Full:
            def __init__(self, file):
                self.file = file

            def write(self, data):
                self.file.write(bytes(data)[:3])
                raise full

            def __getattr__(self, name):
                return getattr(self.file, name)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                self.file.close()

        def opened(path, mode="r", *args, **kwargs):
            file = real(path, mode, *args, **kwargs)
            return Full(file) if f"shard-{shard:05}" in path.name and "w" in mode else file

        monkeypatch.setattr(Path, "open", opened)
    else:
        real, calls = getattr(os, place), itertools.count()

        def failing(*arguments):
            if next(calls) == 1 + 2 * shard:  # a header, then a shard and a header each
                raise full
            return real(*arguments)

        monkeypatch.setattr(os, place, failing)
    with pytest.raises(OSError, match="No space left"):
        write_shards(again, tokenizer, documents(), **SIZE)
    monkeypatch.undo()
    finished = header(again)
    assert len(finished["shards"]) == shard and not list(again.glob(".*"))
    assert sorted(f.name for f in again.glob("*.bin")) == [s["file"] for s in finished["shards"]]
    write_shards(again, tokenizer, documents(), **SIZE)
    assert files(again) == files(folder)


def test_a_folder_is_not_continued_with_anything_else(folder, tokenizer, tmp_path):
    other = train_tokenizer(documents(), 279, tmp_path / "other.model")
    for arguments, changes, message in [
        ((other, documents()), {}, "begun with tokenizer"),
        ((tokenizer, documents()), dict(shard_tokens=400), "begun with shard_tokens 300, not 400"),
        ((tokenizer, documents()), dict(tokens=9), "begun with limit None, not 9"),
        ((tokenizer, documents()), dict(recipe="other"), "begun with recipe '', not 'other'"),
        ((tokenizer, ["x", *documents()]), {}, r"shard-00000\.bin was made of other documents"),
        ((tokenizer, documents()[:3]), {}, r"shard-00000\.bin was made of other documents"),
    ]:
        before = files(folder)
        with pytest.raises(ValueError, match=message):
            write_shards(folder, *arguments, **SIZE | changes)
        assert files(folder) == before


@pytest.mark.parametrize("empty", [[], iter(())])
def test_a_source_without_documents_is_refused_and_can_be_tried_again(tokenizer, tmp_path, empty):
    with pytest.raises(ValueError, match="no documents to make tokens of"):
        write_shards(tmp_path, tokenizer, empty)
    assert len(write_shards(tmp_path, tokenizer, ["some words"])) > 2


def test_a_truncated_or_missing_shard_is_named_with_its_sizes(folder):
    tokens = header(folder)["shards"][2]["tokens"]
    file = folder / "shard-00002.bin"
    file.write_bytes(file.read_bytes()[:-2])
    message = rf"shard-00002\.bin: expected {2 * tokens} bytes \({tokens} tokens\), found {2 * tokens - 2}"
    with pytest.raises(ValueError, match=message):
        Shards(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"shard-00002\.bin: expected .* found no file"):
        Shards(folder)


def test_a_damaged_shard_is_not_continued(tokenizer, tmp_path, one_by_one):
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, tokenizer, Countdown(100), shard_tokens=20)
    (tmp_path / "shard-00000.bin").write_bytes(b"")
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"shard-00000\.bin: expected"):
        write_shards(tmp_path, tokenizer, documents(), shard_tokens=20)
    assert files(tmp_path) == before


def test_verify_finds_a_changed_byte_and_an_id_out_of_the_vocabulary(folder):
    file = folder / "shard-00001.bin"
    content = bytearray(file.read_bytes())
    content[4] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00001\.bin: its sha256 differs"):
        Shards(folder).verify()
    content[4:6] = (280).to_bytes(2, "little")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00001\.bin: id 280 in a vocabulary of 280"):
        Shards(folder).verify()


def test_another_tokenizer_is_named(folder, tokenizer, tmp_path):
    other = train_tokenizer(documents(), 279, tmp_path / "other.model")
    with pytest.raises(ValueError, match=rf"made with tokenizer {tokenizer.digest[:12]}…, not with .*other\.model"):
        Shards(folder, other)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{oops", "not a header of token shards"), ('{"format": 1}', "KeyError"), ("[]", "TypeError")],
)
def test_a_header_that_cannot_be_read_is_named(folder, content, message):
    (folder / HEADER).write_text(content)
    with pytest.raises(ValueError, match=message):
        Shards(folder)
    (folder / HEADER).unlink()
    with pytest.raises(FileNotFoundError, match="expected the header of a folder of token shards"):
        Shards(folder)


def test_a_header_of_a_later_format_is_refused(folder):
    (folder / HEADER).write_text(json.dumps(header(folder) | {"format": 2}))
    with pytest.raises(ValueError, match="format 2, expected 1"):
        Shards(folder)


def test_the_digest_is_that_of_the_tokens(folder, tokenizer, tmp_path):
    same = write_shards(tmp_path / "same", tokenizer, documents(), **SIZE)
    other = write_shards(tmp_path / "other", tokenizer, documents()[1:], **SIZE)
    assert Shards(folder).digest == same.digest != other.digest


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 100))
def test_the_shuffle_is_one_to_one(size, seed, epoch):
    out = shuffled(np.arange(size), size, (seed, epoch))
    assert np.array_equal(np.sort(out), np.arange(size))


@settings(deadline=None)
@given(st.integers(2**20, 2**40), st.integers(0, 10**6), st.data())
def test_the_shuffle_of_a_large_range_stays_inside_without_collisions(size, seed, data):
    numbers = data.draw(st.lists(st.integers(0, size - 1), unique=True, min_size=1, max_size=50))
    out = shuffled(np.array(numbers), size, (seed, 0))
    assert len(set(out.tolist())) == len(numbers) and 0 <= out.min() <= out.max() < size
    for number, place in zip(numbers, out, strict=True):
        assert shuffled(np.array([number]), size, (seed, 0))[0] == place


def test_the_shuffle_looks_random():
    "Neighbours part, epochs differ, and every row lands in every tenth of the data about as often."
    size, first = 10_000, shuffled(np.arange(10_000), 10_000, (1, 0))
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(first, np.arange(size))[0, 1]) < 0.05
    assert (first == shuffled(np.arange(size), size, (1, 1))).sum() < 10
    places = np.array([shuffled(np.arange(3), size, (seed, 0)) for seed in range(2000)])
    for row in range(3):
        counts = np.bincount(places[:, row] // 1000, minlength=10)
        assert ((counts - 200) ** 2 / 200).sum() < 30  # chi-square, 9 degrees of freedom: p < 0.001


def test_every_row_comes_once_an_epoch_and_neighbours_share_a_token(stored):
    shards, stream = stored
    natural = Packed(stream, 16).rows(0, len(Packed(stream, 16)))
    assert natural[:, 1:].flatten().tolist() == stream[1 : natural.shape[0] * 16 + 1].tolist()
    assert (natural[:-1, -1] == natural[1:, 0]).all()
    packed = Packed(shards, 16, seed=5)
    epochs = [packed.rows(epoch * len(packed), len(packed)) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(natural.tolist())
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


@settings(deadline=None)
@given(st.integers(1, 700), st.none() | st.integers(0, 99), st.integers(0, 10**7), st.integers(0, 60))
def test_rows_do_not_depend_on_how_they_are_asked_for(stored, length, seed, first, count):
    "From shards or an array, in one piece or by ranks and batches: the position is one number."
    shards, stream = stored
    packed = Packed(shards, length, seed)
    rows = packed.rows(first, count)
    assert rows.shape == (count, length + 1) and rows.dtype == torch.int64
    assert torch.equal(rows, Packed(stream, length, seed).rows(first, count))
    for size in (1, 7):
        pieces = [packed.rows(first + i, min(size, count - i)) for i in range(0, count, size)]
        assert torch.equal(torch.cat([*pieces, rows[:0]]), rows)


def test_two_ranks_read_what_one_reads_and_four_go_on(stored):
    packed, batch = Packed(stored[0], 16, seed=3), 8

    def steps(world: int, start: int, stop: int) -> torch.Tensor:
        share = batch // world
        rows = [packed.rows(s * batch + r * share, share) for s in range(start, stop) for r in range(world)]
        return torch.cat(rows)

    alone = steps(1, 0, 100)
    assert 100 * batch > 2 * len(packed)  # several epochs
    assert torch.equal(torch.cat([steps(2, 0, 37), steps(4, 37, 100)]), alone)


@pytest.mark.parametrize("length", [8, 100, 0])
def test_data_that_does_not_fill_a_row_is_refused(length):
    with pytest.raises(ValueError, match=f"8 tokens do not fill one row of {length} and its target"):
        Packed(np.arange(8), length, seed=0)
    assert Packed(np.arange(8), 7).rows(0, 1).tolist() == [list(range(8))]


def test_negative_rows_are_refused():
    with pytest.raises(ValueError, match="expected numbers that are not negative"):
        Packed(np.arange(8), 2).rows(-1, 1)


@pytest.fixture
def texts(tmp_path):
    for name in ("a", "b"):
        rows = [json.dumps({"text": f"{name} {text}"}) + "\n" for text in documents(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    return tuple(str(tmp_path / f"{name}.jsonl") for name in ("a", "b"))


def test_the_command_mixes_trains_a_tokenizer_and_continues(texts, tmp_path):
    config = ShardsConfig(
        tmp_path / "out", texts, shares=(0.25, 0.75), tokens=6000, vocab_size=280, shard_tokens=1000, seed=1
    )
    data = make_shards(config)
    before = files(config.folder)
    assert make_shards(config).digest == data.digest and files(config.folder) == before
    assert (config.folder / "tokenizer.model").exists() and data.header["vocab_size"] == 280
    for changes, message in [
        (dict(seed=2), "begun with recipe"),
        (dict(shares=(0.5, 0.5)), "begun with recipe"),
        (dict(vocab_size=281), "tokenizer.model has 280 pieces, not vocab_size 281"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_shards(replace(config, **changes))


def test_without_a_budget_every_document_comes_once(texts, tokenizer, tmp_path):
    data = make_shards(ShardsConfig(tmp_path / "out", texts, tokenizer=tokenizer.path))
    assert data.header["documents"] == 120


def test_the_command_cleans_all_sources_against_each_other(texts, tokenizer, tmp_path, capsys, monkeypatch):
    Path(texts[1]).write_text(Path(texts[1]).read_text() + Path(texts[0]).read_text())
    config = ShardsConfig(tmp_path / "out", texts, tokenizer=tokenizer.path, clean=True)
    data = make_shards(config)
    lines = [line for path in texts for line in Path(path).read_text().splitlines()]
    assert data.header["documents"] <= len(set(lines)) < len(lines)
    assert "near copies, removed" in capsys.readouterr().out
    monkeypatch.setattr(module, "clean", None)  # a restart does not clean again
    (config.folder / HEADER).unlink()
    assert make_shards(config).digest == data.digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(shares=(0.5,)), "shares .* expected one for each of"),
        (dict(shares=(0.5, 0.6)), "shares sum to 1.1, not to 1"),
        (dict(upsampling=(1, 2), tokens=None), "need tokens: a mix has no end"),
        (dict(shares=(0.5, 0.5), upsampling=(1, 2)), "expected one of them"),
        (dict(sources=()), "expected at least one"),
        (dict(sources=("manual", "manual")), "each once"),
    ],
)
def test_commands_that_cannot_work_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        ShardsConfig(tmp_path, **dict(sources=("manual", "docstrings"), tokens=10) | changes)


def test_the_command_line_explains_itself_and_fails_in_one_line(tmp_path):
    command = [sys.executable, "-m", "llama2lib.shards"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True).stdout
    assert all(option in shown for option in ("--sources", "--shares", "--upsampling", "--tokens", "--clean", "hub:"))
    failed = subprocess.run([*command, str(tmp_path / "out"), "--sources", "nowhere"], capture_output=True, text=True)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "'nowhere': expected one of conversations" in failed.stderr
