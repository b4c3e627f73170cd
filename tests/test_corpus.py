"""Text in, tokens out: the packaged domains, named sources, shares, the mix, the stream."""

import gzip
import itertools
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2lib.corpus import (
    PACKAGED,
    Source,
    Stream,
    check_shares,
    cut,
    describe,
    documents_of,
    encoded,
    mix,
    packaged_sources,
    path_documents,
    read_documents,
    records,
    shares,
    token_stream,
)
from llama2lib.dialog import read_dialogs
from llama2lib.preferences import read_preferences
from llama2lib.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def sources():
    return packaged_sources()


def test_four_real_domains_come_with_the_installation(sources):
    assert set(sources) == set(PACKAGED)
    assert all(source.characters > 100_000 for source in sources.values())
    assert sources["conversations"].documents[0].startswith("A: ")
    assert sum(shares(sources).values()) == pytest.approx(1)


def test_docstrings_do_not_leak_into_the_code(sources):
    "They would be trained on in one source and held out in the other."
    code = "".join(sources["source code"].documents)
    lines = [line.strip() for text in sources["docstrings"].split()[1] for line in text.split("\n")]
    lines = [line for line in lines if len(line) > 60]
    assert len(lines) > 100 and sum(line in code for line in lines) < 0.05 * len(lines)


def test_factual_sources_are_upsampled(sources):
    plain = {name: replace(source, upsampling=1) for name, source in sources.items()}
    assert shares(sources)["manual"] > 5 * shares(plain)["manual"]
    assert shares(sources)["docstrings"] > 2 * shares(plain)["docstrings"]


def test_held_out_documents_are_never_trained_on(sources):
    for source in sources.values():
        train, held_out = source.split()
        assert len(held_out) < 0.1 * len(train)
        assert held_out and not set(train) & set(held_out)
        assert sorted(train + held_out) == sorted(source.documents)


@pytest.mark.parametrize("documents", [("a", "b"), ("a", "b", "a"), tuple("abcdefgh")])
def test_a_small_source_holds_out_at_least_one_text_with_its_copies(documents):
    train, held_out = Source(documents).split()
    assert train and held_out and not set(train) & set(held_out)


def test_a_single_text_cannot_be_split():
    with pytest.raises(ValueError, match="2 documents, 1 of them different"):
        Source(("a", "a")).split()


def test_the_digest_tells_texts_apart():
    assert Source(("ab", "c")).digest != Source(("a", "bc")).digest
    assert Source(("ab", "c")).digest == Source(("ab", "c"), upsampling=3).digest


def test_a_table_describes_every_source_in_a_line():
    "Documents, characters, multiplier, share (12 of 60, since 1,200 count a twenty-fifth), and the digest."
    sources = {"large": Source(("a" * 7, "b" * 5), upsampling=1), "small one": Source(("x" * 1200,), upsampling=0.04)}
    head, *lines = describe(sources).splitlines()
    assert head.split() == ["source", "documents", "characters", "up-sampled", "share", "sha256"]
    assert lines[0].split() == ["large", "2", "12", "1×", "20.0%", sources["large"].digest[:12]]
    assert lines[1].split() == ["small", "one", "1", "1,200", "0.04×", "80.0%", sources["small one"].digest[:12]]
    assert len({line.index("%") for line in lines}) == 1  # the columns stand below each other


def test_the_mix_keeps_the_shares_and_repeats_small_sources():
    texts = {"big": ["x" * 100] * 50, "small": ["y" * 30, "z" * 50]}
    drawn = list(itertools.islice(mix(texts, {"big": 0.25, "small": 0.75}, seed=1), 400))
    sizes = {name: sum(len(d) for n, d in drawn if n == name) for name in texts}
    assert sizes["small"] / sum(sizes.values()) == pytest.approx(0.75, abs=0.01)
    assert drawn == list(itertools.islice(mix(texts, {"big": 0.25, "small": 0.75}, seed=1), 400))


def test_an_epoch_shows_every_document_once():
    texts = {"only": [f"document {i}" for i in range(20)]}
    drawn = [d for _, d in itertools.islice(mix(texts, {"only": 1.0}, seed=3), 40)]
    assert sorted(drawn[:20]) == sorted(drawn[20:]) == sorted(texts["only"]) and drawn[:20] != drawn[20:]


def test_empty_sources_are_named(tmp_path):
    with pytest.raises(ValueError, match="source 'b' has no text"):
        next(mix({"a": ["x"], "b": []}, {"a": 0.5, "b": 0.5}))
    with pytest.raises(ValueError, match="no documents"):
        token_stream(train_tokenizer(["text"] * 5, 264, tmp_path / "t.model"), [])


@given(st.lists(st.text(alphabet="ab\n", max_size=60)).map("\n\n".join))
def test_cutting_loses_nothing(text):
    pieces = cut(text, size=20)
    assert "".join(pieces).replace("\n", "") == text.replace("\n", "")
    assert all(piece.strip() for piece in pieces)


def test_text_without_blank_lines_is_cut_at_lines():
    pieces = cut("a line of text\n" * 1000, size=100)
    assert len(pieces) > 50 and all(piece.endswith("\n") for piece in pieces)


def test_files_and_folders_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("first\n\nsecond", "utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "third"}) + "\n\n" + json.dumps({"text": "fourth"}) + "\n")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    assert read_documents(tmp_path) == ["first\n\nsecond", "third", "fourth"]
    assert read_documents(tmp_path / "a.txt") == ["first\n\nsecond"]
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "object").write_bytes(b"\xff")
    (tmp_path / "c.jsonl").write_text('{"text": "fifth\u2028line"}\r\n', "utf-8")
    assert read_documents(tmp_path)[-1] == "fifth\u2028line"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "fine\ncafé".encode("latin-1"), r"latin\.txt: byte 8 is not UTF-8"),
        ("empty.txt", b" \n", r"empty\.txt: no text in 1 file"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"rows\.jsonl:2: expected an object with a string"),
        ("rows.jsonl", b'{"text": "a"}\n\n{oops\n', r"rows\.jsonl:3: not JSON"),
    ],
)
def test_bad_files_stop_with_file_and_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


MESSAGES = {"messages": [{"role": "user", "content": "hi"}]}
COMPARED = {"chosen": "yes", "rejected": "no", "rating": None, "safety": None, "source": ""}
GOOD = json.dumps({"text": "a"} | MESSAGES | COMPARED).encode()


@pytest.mark.parametrize("read", [read_documents, read_dialogs, read_preferences])
@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"text": }', r"not JSON (Expecting value, column 10)"),
        (b'{"text": "\xff"}', r"byte 10 is not UTF-8 text (invalid start byte)"),
    ],
)
def test_a_line_that_is_no_json_is_named_in_the_same_words_by_every_reader(tmp_path, read, line, told):
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([GOOD, line, GOOD]))
    with pytest.raises(ValueError) as error:
        read(tmp_path / "x.jsonl")
    assert str(error.value) == f"{tmp_path / 'x.jsonl'}:2: {told}"


def test_records_are_lines_or_a_list_gzipped_or_not(tmp_path):
    rows = [{"text": "one\u2028line"}, ["two"], 3]
    lines, whole = "\r\n".join(map(json.dumps, rows)).encode(), json.dumps(rows, indent=1).encode()
    for name, content in (("x.jsonl", lines), ("x.json", whole)):
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        for path in (tmp_path / name, str(tmp_path / f"{name}.gz")):
            assert list(records(path)) == [(1, rows[0]), (2, rows[1]), (3, rows[2])]
    (tmp_path / "blank.jsonl").write_bytes(b"\n1\n \n2\n")
    assert list(records(tmp_path / "blank.jsonl", skip_blank=True)) == [(2, 1), (4, 2)]


PACKED = gzip.compress(b"1\n" * 1000, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.json", b'[{"text": "a"},\n {"text": }]', "2: not JSON (Expecting value, column 11)"),
        ("x.json", b'["\xff"]', "1: byte 2 is not UTF-8 text"),
        ("x.jsonl", b"1\n\n2", "2: not JSON (Expecting value, column 1)"),
        ("x.jsonl.gz", b"1\n", "1: not gzip"),
        ("x.jsonl.gz", PACKED[:-8], "1001: not gzip"),
        ("x.jsonl.gz", PACKED[:10] + b"\xff" * 10, "1: not gzip"),
        ("x.json.gz", PACKED[:-8], "1: not gzip"),
    ],
)
def test_damaged_files_are_named_with_the_line(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        list(records(tmp_path / name))
    assert str(error.value).startswith(f"{tmp_path / name}:{told}")


def test_a_missing_path_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_documents(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no text in 0 files"):
        read_documents(tmp_path)


def test_one_bos_and_one_eos_around_every_document(tmp_path):
    tokenizer = train_tokenizer(["some words to learn from"] * 5, 280, tmp_path / "t.model")
    stream = token_stream(tokenizer, ["some words", "to", "learn"])
    assert stream.dtype == np.uint16 and stream[0] == 1 and stream[-1] == 2
    pairs = list(zip(stream[:-1].tolist(), stream[1:].tolist(), strict=True))
    assert pairs.count((2, 1)) == 2 and (1, 1) not in pairs and (2, 2) not in pairs
    assert len(token_stream(tokenizer, ["some words"] * 9, limit=10)) == 10


@pytest.mark.parametrize("wrong", [dict(documents=()), dict(documents=("", "")), dict(documents=("a",), upsampling=0)])
def test_sources_without_text_are_refused(wrong):
    with pytest.raises(ValueError, match="a source of"):
        Source(**wrong)


def test_a_corpus_larger_than_memory_is_read_a_document_at_a_time(tmp_path):
    import tracemalloc

    line = "a line of a text that is much longer than the reader needs at once\n"
    (tmp_path / "long.txt").write_text(line * 200_000, "utf-8")
    (tmp_path / "rows.jsonl").write_text((json.dumps({"text": line * 50}) + "\n") * 3000, "utf-8")
    tracemalloc.start()
    characters = sum(map(len, path_documents(tmp_path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert characters == len(line) * (200_000 + 150_000) and peak < characters / 20


def test_a_stream_gives_the_documents_of_the_list(tmp_path):
    (tmp_path / "a.txt").write_text("some\r\nwords\n\n" * 3000 + "e\u0301nd\x0bof\u2028it", "utf-8", newline="")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": " "}\n{"text": "two"}', "utf-8")
    whole = (tmp_path / "a.txt").read_bytes().decode().replace("\r\n", "\n")
    assert read_documents(tmp_path) == [*cut(whole), "one", "two"]
    stream = Stream(str(tmp_path))
    assert list(stream) == list(stream) == read_documents(tmp_path)
    assert stream.characters == sum(map(len, stream))


def test_half_a_surrogate_pair_in_a_file_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n{"text": "ab\\ud800"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: character 2 of 'text' is half a surrogate pair"):
        read_documents(tmp_path)


def test_sources_are_named_by_strings(sources, tmp_path):
    (tmp_path / "a.txt").write_text("words")
    assert list(documents_of("source code")) == list(sources["source code"].documents)
    assert list(documents_of(str(tmp_path / "a.txt"))) == ["words"]
    with pytest.raises(FileNotFoundError, match=r"'manaul': expected one of conversations, manual.*hub:owner/name"):
        list(documents_of("manaul"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A data set folder as `datasets` reads it: two splits, and rows with other fields than 'text'."
    pytest.importorskip("datasets", reason="needs datasets (extra 'hub')")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        rows = [{"content": f"{split} {i}", "text": " " * (i == 1) or f"text {i}", "number": i} for i in range(3)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"hub:{folder}"


def test_hub_data_sets_stream_with_split_and_field(hub):
    assert list(documents_of(hub)) == ["text 0", "text 2"]
    assert list(documents_of(f"{hub},split=test,field=content")) == ["test 0", "test 1", "test 2"]
    with pytest.raises(ValueError, match="row 0 has no text in 'number'; fields with text: content, text"):
        list(documents_of(f"{hub},field=number"))
    with pytest.raises(ValueError, match="cannot read 'splitt=test'; expected config=…, split=… or field=…"):
        list(documents_of(f"{hub},splitt=test"))


def test_the_hub_is_asked_for_a_stream(monkeypatch):
    "A set larger than the disk must not be downloaded."
    datasets = pytest.importorskip("datasets", reason="needs datasets (extra 'hub')")
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return iter([{"text": "row"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(documents_of("hub:allenai/c4,config=en")) == ["row"]
    assert asked == [(("allenai/c4", "en"), {"split": "train", "streaming": True})]


def test_a_missing_library_gives_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"hub:a/b needs the package datasets: pip install -e '\.\[hub\]'"):
        list(documents_of("hub:a/b"))


@pytest.mark.parametrize(
    ("given_shares", "message"),
    [
        ({"a": 0.5, "b": 0.4}, "shares sum to 0.9, not to 1: a 0.5, b 0.4"),
        ({"a": 1.5, "b": -0.5}, "source 'b' has the share -0.5"),
        ({"a": 0.5, "b": float("nan")}, "source 'b' has the share nan"),
        ({"a": 1.0}, "shares of a: expected one for each of a, b"),
    ],
)
def test_shares_that_make_no_mix_are_refused(given_shares, message):
    with pytest.raises(ValueError, match=message):
        check_shares(given_shares, ["a", "b"])
    with pytest.raises(ValueError, match=message):
        next(mix({"a": ["x"], "b": ["y"]}, given_shares))


@pytest.mark.parametrize("factor", [0, -1, float("nan"), float("inf")])
def test_a_multiplier_that_makes_no_share_is_named(tmp_path, factor):
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(ValueError, match=f"source 'a': 5 characters, up-sampled {factor}×"):
        shares({"a": Stream(str(tmp_path / "a.txt"), factor)})


def test_a_share_of_nothing_leaves_a_source_out():
    drawn = {name for name, _ in itertools.islice(mix({"a": ["x"], "b": ["y"]}, {"a": 1, "b": 0}), 20)}
    assert drawn == {"a"}


def test_a_stream_is_mixed_as_a_list_is_but_shuffled_in_a_window(tmp_path):
    texts = [f"document {i:04}" for i in range(500)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stream = Stream(str(tmp_path / "a.jsonl"))
    assert shares({"a": stream, "b": Stream("manual", 2)})["a"] < 0.02

    def draw(window):
        endless = mix({"a": stream, "b": ["y" * 13] * 3}, {"a": 0.5, "b": 0.5}, seed=2, window=window)
        return [text for name, text in itertools.islice(endless, 2000) if name == "a"]

    drawn = draw(50)
    assert drawn == draw(50) and len(drawn) == 1000
    assert sorted(drawn[:500]) == sorted(drawn[500:]) == texts and drawn[:500] != drawn[500:]
    assert all(texts.index(text) < place + 50 for place, text in enumerate(drawn[:500]))


def test_a_source_that_can_be_read_only_once_is_refused():
    with pytest.raises(ValueError, match="source 'a' can be gone through only once"):
        next(mix({"a": iter(["x"])}, {"a": 1.0}))


def test_the_stream_is_what_the_tokenizer_gives_document_by_document(sources, tmp_path):
    "Batches, threads and the splitting of an array change nothing."
    tokenizer = train_tokenizer(sources["manual"].documents, 512, tmp_path / "t.model")
    documents = [*sources["docstrings"].documents[:60], "", "\u2581 sign \u2581", "naïve 🦙"]
    expected = [tokenizer.encode(document, bos=True, eos=True) for document in documents]
    assert [ids.tolist() for _, ids in encoded(tokenizer, documents)] == expected
    assert token_stream(tokenizer, documents).tolist() == list(itertools.chain(*expected))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 5, 97, 2], "ids from 1 to 97: the vocabulary has ids 0 to 96"),
        ([-1, 5, 2], "ids from -1 to 5"),
        ([1, 1, 5, 2], "holds BOS or EOS"),
        ([1, 5, 2, 6, 2], "holds BOS or EOS"),
    ],
)
def test_ids_outside_the_vocabulary_and_double_boundaries_are_refused(ids, message):
    class Wrong:
        vocab_size, bos_id, eos_id = 97, 1, 2

        def encode_batch(self, texts, bos, eos):
            return [ids for _ in texts]

    with pytest.raises(ValueError, match=message):
        token_stream(Wrong(), ["text"])
