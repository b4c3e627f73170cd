"""Contamination: exact beside a program by the letter, an index that survives kills, Table 51's statistic by hand."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2lib import contamination, suffix_index
from llama2lib.contamination import (
    ContaminationConfig,
    Subset,
    affected,
    collides,
    contaminated_tokens,
    covered,
    largest_affected,
    mostly_known,
    run,
    spans,
    subsets,
    sweep,
    z_score,
)
from llama2lib.recipes import ROOT
from llama2lib.shards import Shards, write_shards
from llama2lib.suffix_index import CorpusIndex, build_index, read_index
from llama2lib.tokenizer import train_tokenizer


def by_definition(sample, documents, min_len=10, skip_budget=4):
    "A token counts if any allowed span of any two equally long windows covers it: ends anywhere, so no greed."
    marked = set()
    for document in documents:
        for i in range(len(sample)):
            for j in range(len(document)):
                for length in range(min_len + 1, min(len(sample) - i, len(document) - j) + 1):
                    unequal = [t for t in range(length) if sample[i + t] != document[j + t]]
                    if len(unequal) <= skip_budget and not any(t < 10 or t == length - 1 for t in unequal):
                        marked.update(range(i, i + length))
                    elif len(unequal) > skip_budget or any(t < 10 for t in unequal):
                        break
    return [place in marked for place in range(len(sample))]


@st.composite
def cases(draw):
    "A sample, documents of which some hold a changed piece of it, and a vocabulary of two or four bytes an id."
    letters = draw(st.sampled_from([1, 2, 3, 300]))
    tokens = st.integers(0, letters - 1)
    sample = draw(st.lists(tokens, max_size=45))
    documents = []
    for _ in range(draw(st.integers(1, 3))):
        start, stop = sorted((draw(st.integers(0, len(sample))), draw(st.integers(0, len(sample)))))
        piece = sample[start:stop]
        for place in draw(st.lists(st.integers(0, 44), max_size=7)):
            if place < len(piece):
                piece[place] = (piece[place] + draw(st.integers(1, 2))) % letters
        documents.append(draw(st.lists(tokens, max_size=8)) + piece + draw(st.lists(tokens, max_size=8)))
    if not any(documents):
        documents.append([0])
    return sample, documents, draw(st.sampled_from([300, 2**16 - 1, 2**16, 10**6]))


@pytest.fixture(params=["as it is", "every run counts as frequent"], scope="module")
def thresholds(request):
    "Both ways to go on from a run: from each of its places, and from those that the rarest tokens name."
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "as it is":
            patch.setattr(contamination, "FREQUENT", 0)
            patch.setattr(contamination, "BEGINS", 0)
        yield


@settings(max_examples=80, deadline=None)
@given(case=cases(), min_len=st.sampled_from([0, 5, 9, 10, 11, 20, 30]), skip_budget=st.sampled_from([0, 1, 4, 7]),
       part_tokens=st.sampled_from([1, 13, 10**6]))
def test_the_definition_by_the_letter(thresholds, case, min_len, skip_budget, part_tokens):
    "In parts down to one token, and past 65,535 ids."
    sample, documents, vocab_size = case
    index = build_index(documents, vocab_size=vocab_size, part_tokens=part_tokens)
    found = contaminated_tokens(sample, index, min_len, skip_budget)
    assert found.dtype == bool and found.tolist() == by_definition(sample, documents, min_len, skip_budget)


def planted(*changes: int, size: int = 40, min_len: int = 10, skip_budget: int = 4) -> str:
    "What is found of a sample whose copy in the corpus has changes at these places: one character for each token."
    sample = np.arange(100, 100 + size)
    copy = sample.copy()
    copy[list(changes)] = 7
    index = build_index([[5, *copy, 6]], vocab_size=200)
    found = contaminated_tokens(sample, index, min_len, skip_budget)
    return "".join("x" if one else "." for one in found)


def test_a_span_by_hand(thresholds):
    assert planted() == "x" * 40
    assert planted(size=10) == "." * 10 and planted(size=11) == "x" * 11  # longer than ten
    assert planted(20, 22, 24, 26) == "x" * 40  # four differences, marked themselves
    assert planted(20, 22, 24, 26, 28) == "x" * 28 + "." + "x" * 11  # a fifth ends it; behind it eleven are left
    assert planted(20, 22, 24, 26, 29) == "x" * 29 + "." * 11  # and here ten, with none before that may begin one
    assert planted(11, 13, 15, 17) == "x" * 40
    assert planted(11, 12, 13, 14, *range(16, 40)) == "x" * 16 + "." * 24  # the last that agrees is as far as it goes
    assert planted(9, 10, 11) == "." * 12 + "x" * 28  # not among the first ten
    assert planted(10, size=12) == "x" * 12 and planted(11, size=12) == "x" * 11 + "."  # not at the end
    assert planted(10, 11, size=12) == "." * 12  # ten, and nothing behind that agrees
    assert planted(9, 20, size=21) == "." * 21  # runs of nine and ten
    assert planted(20, size=40, skip_budget=0) == "x" * 20 + "." + "x" * 19


def test_longer_minimum_lengths(thresholds):
    "The span must be longer than L, and its first ten tokens exact whatever L is."
    assert planted(12, size=40, min_len=39) == "x" * 40 and planted(12, size=40, min_len=40) == "." * 40
    assert planted(9, size=40, min_len=29) == "." * 10 + "x" * 30 and planted(9, size=40, min_len=30) == "." * 40
    assert planted(15, 20, size=40, min_len=20) == "x" * 40
    assert planted(5, size=12, min_len=4) == "xxxxx.xxxxxx" and planted(5, size=12, min_len=5) == "......xxxxxx"


def test_a_span_stays_in_one_document_and_may_cross_parts(thresholds):
    sample = np.arange(30)
    assert not contaminated_tokens(sample, build_index([sample[:10], sample[10:20], sample[20:]], vocab_size=50)).any()
    halves = contaminated_tokens(sample, build_index([sample[:11], sample[11:]], vocab_size=50))
    assert halves.all()  # eleven and nineteen, each by itself
    next_one = build_index([sample[:11], [sample[12], 40]], vocab_size=50)  # what agrees there is another document's
    assert contaminated_tokens(sample, next_one).tolist() == [True] * 11 + [False] * 19
    assert contaminated_tokens(sample, build_index([sample], vocab_size=50, part_tokens=7)).all()


def test_an_id_is_not_found_between_two_others():
    "0x0102 0x0304 holds the bytes of 0x0203; id 0 ends strings in C, and 65,534 is one less than a border."
    corpus = [0x0102, 0x0304] * 12
    assert not contaminated_tokens([0x0203, 0x0401] * 12, build_index([corpus])).any()
    for ids in ([0] * 12, [65_534] * 12, [0, 256, 1, 65_280] * 3):
        index = build_index([[9, *ids, 9]])
        assert contaminated_tokens(ids, index).all() and index.counts(ids, 12).tolist() == [1]
    large = [70_000, 2**16, 4464] * 4
    assert contaminated_tokens(large, build_index([large], vocab_size=10**5)).all()
    assert not contaminated_tokens([4464] * 12, build_index([large], vocab_size=10**5)).any()
    assert contaminated_tokens([65_535] * 12, build_index([[65_535] * 12], vocab_size=2**16)).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=30), min_size=1, max_size=4), st.integers(1, 6),
       st.sampled_from([3, 100]))
def test_counts_of_runs(documents, n, part_tokens):
    "Every run of a document is counted as often as it stands in all of them, but not across two."
    index = build_index([*documents, [0]], vocab_size=3, part_tokens=part_tokens)
    sample = documents[0]
    runs = [tuple(d[i : i + n]) for d in [*documents, [0]] for i in range(len(d) - n + 1)]
    wanted = [runs.count(tuple(sample[i : i + n])) for i in range(len(sample) - n + 1)]
    assert index.counts(sample, n).tolist() == wanted


def test_a_line_that_stands_everywhere():
    "30,000 places of a frame of twelve tokens, and samples that begin with it: all of the longest spans are right."
    random = np.random.default_rng(0)
    frame = np.arange(12) + 50
    documents = [np.concatenate([frame, random.integers(0, 40, 30)]) for _ in range(30_000)]
    samples = [np.concatenate([frame, documents[place][12:]]) for place in random.integers(0, 30_000, 60)]
    for sample in samples[:40]:
        sample[random.choice(np.arange(14, 42), 5, replace=False)] = 45
    index = build_index(documents, vocab_size=100)
    found = spans(samples, index)
    corpus = np.stack(documents)
    for sample, lengths in zip(samples[20:50], found[20:50], strict=True):
        equal = corpus == sample
        allowed = np.cumsum(~equal, axis=1) <= 4
        assert lengths[0] == (equal & allowed).nonzero()[1].max() + 1


def test_many_samples_are_as_one_by_one(thresholds):
    random = np.random.default_rng(1)
    documents = [random.integers(0, 3, 200) for _ in range(5)]
    samples = [random.integers(0, 3, size) for size in (50, 0, 9, 10, 80, 1, 300)]
    samples += [documents[2][:50], documents[2][50:150]]  # what stands before the second belongs to the first
    index = build_index(documents, vocab_size=3)
    alone = [spans([sample], index)[0].tolist() for sample in samples]
    assert [lengths.tolist() for lengths in spans(samples, index)] == alone
    assert [len(lengths) for lengths in alone] == [50, 0, 9, 10, 80, 1, 300, 50, 100]
    assert spans([], index) == [] and covered(np.zeros(0, int)).tolist() == []


def test_older_rules():
    "GPT-3: one run of 13; PaLM: 70 % of the runs of 8. A sample shorter than a run has none."
    sample = np.arange(27)
    def index(changed):
        return build_index([np.where(np.isin(sample, changed), 40, sample)], vocab_size=50)
    assert collides(sample, index([13])) and not collides(sample[:25], index([12, 20]))
    assert mostly_known(sample, index([2, 26])) and not mostly_known(sample, index([2, 25, 26, 20]))
    assert mostly_known(sample, index([5])) and not mostly_known(sample, index([6]))  # 14 of 20 runs, and 13
    assert not collides(sample[:12], index([])) and not mostly_known(sample[:7], index([]))


def test_subsets_and_z_by_hand():
    shares, scores = np.array([0.1, 0.2, 0.79, 0.8, 1.0, 0.0]), np.array([0, 0, 1, 1, 1, 0])
    table = subsets(shares, scores)
    assert {name: row.n for name, row in table.items()} == {"clean": 2, "not clean": 4, "not dirty": 4, "dirty": 2}
    assert table["not clean"] == Subset(pytest.approx(2.79 / 4), 4, 0.75, 0.5, pytest.approx(0.25 / (0.25 / 4) ** 0.5))
    assert table["dirty"].z == pytest.approx(0.5 / (0.25 / 2) ** 0.5) and table["clean"].z == -table["dirty"].z
    graded = subsets(np.array([0, 0.5, 1]), np.array([1.0, 2.0, 6.0]))  # not of 0 and 1: the scores' own deviation
    assert graded["dirty"].z == pytest.approx((6 - 3) / (14 / 3) ** 0.5)
    nothing = subsets(np.zeros(3), np.ones(3))
    assert nothing["dirty"].n == 0 and np.isnan(nothing["dirty"].score)
    assert nothing["clean"].z == nothing["dirty"].z == 0
    assert z_score(80.0, 82.5, 100 * (0.825 * 0.175) ** 0.5, 7391) == pytest.approx(-5.66, abs=0.005)


def test_affected_needs_all_four_with_their_signs():
    found = {"clean": -2.1, "not clean": 2.1, "not dirty": -2.1, "dirty": 2.1}
    assert affected(found)
    for name, z in found.items():
        assert not affected(found | {name: -z}), name
        assert not affected(found | {name: 2.0 if z > 0 else -2.0}), name
    assert not affected({name: -z for name, z in found.items()})


def test_the_largest_length_that_shows_a_benefit():
    "Spans of 25 tokens: contaminated for L = 10 and 20, not for 30."
    lengths = [np.array([25] + [0] * 24)] * 40 + [np.zeros(25, int)] * 40
    tables = sweep(lengths, np.array([1.0] * 40 + [0.0] * 40))
    assert list(tables) == [10, 20, 30, 40, 50] and tables[20]["dirty"].n == 40 and tables[30]["dirty"].n == 0
    assert largest_affected(tables) == 20
    assert largest_affected(sweep(lengths, np.array([0.0] * 40 + [1.0] * 40))) is None


def files(folder) -> dict:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_killed_build_goes_on_and_is_the_same(tmp_path, monkeypatch):
    "Killed before each of its writes, and begun again."
    random = np.random.default_rng(2)
    documents = [random.integers(0, 9, 40).tolist() for _ in range(5)]
    whole = files(build_index(documents, tmp_path / "whole", 9, part_tokens=60).folder)
    assert len(whole) == 6
    replace, kills, sorted_parts = os.replace, set(), []

    def dying(temporary, file):
        written = file.name, file.name == "index.json" and len(list(file.parent.glob("suffixes*")))
        if written not in kills:
            kills.add(written)
            raise KeyboardInterrupt
        replace(temporary, file)

    sort_part = suffix_index._sort_part
    monkeypatch.setattr(suffix_index, "_sort_part", lambda *a: sorted_parts.append(a[2]) or sort_part(*a))
    monkeypatch.setattr(os, "replace", dying)
    for _ in range(20):
        try:
            index = build_index(documents, tmp_path / "index", 9, part_tokens=60)
            break
        except KeyboardInterrupt:
            if (tmp_path / "index" / "index.json").exists():
                with pytest.raises(ValueError, match=r"not finished, \d parts are missing"):
                    CorpusIndex(tmp_path / "index")
    assert {name: text for name, text in files(tmp_path / "index").items() if name[0] != "."} == whole
    assert len(kills) == 10 and sorted_parts == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]  # no finished part a fourth time
    index.verify()
    sorted_parts.clear()
    assert len(build_index(documents, tmp_path / "index", 9)) == 205 and not sorted_parts  # opened, not made again


@pytest.fixture
def small(tmp_path):
    return build_index([[1, 2, 3] * 20], tmp_path / "index", 5, part_tokens=25).folder


@pytest.mark.parametrize("name", ["tokens.bin", "suffixes-00001.bin"])
def test_damage_is_named(small, name):
    content = (small / name).read_bytes()
    (small / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"{name}: expected [\d,]+ bytes, found"):
        CorpusIndex(small)
    (small / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{name}: its sha256 differs"):
        CorpusIndex(small).verify()
    (small / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: expected .* bytes, found no file"):
        CorpusIndex(small)


def test_foreign_folders_are_refused(small, tmp_path):
    with pytest.raises(ValueError, match=r"begun with corpus '.*another corpus"):
        build_index([[1, 2, 4] * 20], small, 5)
    with pytest.raises(ValueError, match="begun with vocab_size 5, not 6"):
        build_index([[1, 2, 3] * 20], small, 6)
    (small / "index.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match=r"index\.json: not the header of an index \(KeyError: 'tokens'\)"):
        read_index(small)
    (small / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json: not the header"):
        build_index([[1]], small, 5)
    (small / "index.json").unlink()
    with pytest.raises(ValueError, match="expected an index, or a new or empty folder"):
        build_index([[1]], small, 5)
    with pytest.raises(FileNotFoundError, match=r"index\.json: expected the header"):
        CorpusIndex(tmp_path)


def test_wrong_ids_are_named():
    with pytest.raises(ValueError, match="document 1: id 9 at place 2, expected ids from 0 to 8"):
        build_index([[1], [2, 3, 9]], vocab_size=9)
    with pytest.raises(ValueError, match="document 0: id -1 at place 0"):
        build_index([[-1]], vocab_size=9)
    with pytest.raises(ValueError, match="document 0: expected a list of token ids, found float64"):
        build_index([[0.5]], vocab_size=9)
    with pytest.raises(ValueError, match="without tokens"):
        build_index([], vocab_size=9)
    index = build_index([[1, 2]], vocab_size=9)
    with pytest.raises(ValueError, match="sample 1: id 70000 at place 1, expected ids from 0 to 8"):
        spans([[1], [1, 70_000]], index)
    for settings_, message in (({"min_len": -1}, "min_len -1"), ({"skip_budget": -1}, "skip_budget -1")):
        with pytest.raises(ValueError, match=message):
            contaminated_tokens([1], index, **settings_)
    with pytest.raises(ValueError, match="runs of 65 tokens"):
        index.counts([1], 65)
    for shares, scores in (([0.5], [1, 2]), ([], []), ([1.5], [1]), ([0.5], [np.nan])):
        with pytest.raises(ValueError, match="expected"):
            subsets(shares, scores)
    with pytest.raises(ValueError, match="part_tokens 0"):
        build_index([[1]], vocab_size=9, part_tokens=0)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydivsufsort", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[contamination\]'"):
        build_index([[1]])


TEXTS = [f"{a} {b} saw the {c} of {a} when {b} and the {c} went to the far {d} of the old {c} near a {d} with {a}"
         for a in ("ann", "bob", "cid") for b in ("dan", "eve") for c in ("cat", "dog", "hen") for d in ("sea", "hill")]


@pytest.fixture
def corpus(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 280, tmp_path / "tokenizer.model")
    write_shards(tmp_path / "shards", tokenizer, TEXTS[:20], shard_tokens=300)
    shutil.copy(tokenizer.path, tmp_path / "shards")
    return tmp_path


def test_shards_are_indexed_as_their_documents_are(corpus):
    "BOS and EOS match nothing, and no span goes over them."
    shards = Shards(corpus / "shards")
    ids = shards.read(0, len(shards)).astype(int)
    index = build_index(shards, corpus / "index", part_tokens=100)
    assert len(index) == len(ids) and build_index(shards, corpus / "index").folder == corpus / "index"
    border = np.isin(ids, (shards.header["bos_id"], shards.header["eos_id"]))
    assert border.sum() == 40 and contaminated_tokens(ids, index).tolist() == (~border).tolist()
    pieces = [piece[piece > 2] for piece in np.split(ids, np.flatnonzero(border))]
    same = build_index([piece for piece in pieces if len(piece)], vocab_size=280)
    odd = np.concatenate([ids[:50], [270], ids[60:130], ids[::3]])
    assert contaminated_tokens(odd, index).tolist() == contaminated_tokens(odd, same).tolist()
    (corpus / "more").mkdir()
    other = write_shards(corpus / "other", train_tokenizer(TEXTS, 280, corpus / "more" / "t.model"), TEXTS[3:])
    with pytest.raises(ValueError, match="another corpus"):
        build_index(other, corpus / "index")


def test_the_command_writes_shares_and_goes_on_after_a_kill(corpus):
    "A killed process leaves an index that the same command finishes; its shares are those of the functions."
    samples = corpus / "samples.jsonl"
    rows = [{"text": text, "score": 1} for text in TEXTS[:20]] + [{"tokens": [270] * 12, "score": 0}] * 20
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shards = str(corpus / "shards")
    command = [sys.executable, "-m", "llama2lib.contamination", "--data", shards, "--samples", str(samples)]
    command += ["--part-tokens", "40"]
    killed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (corpus / "shards" / "index" / "index.json").exists() and killed.poll() is None:
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in (corpus / "samples.contamination.jsonl").read_text().splitlines()]
    assert [row["score"] for row in lines] == [1] * 20 + [0] * 20 and lines[25]["tokens"] == 12
    assert [row["contaminated"]["10"] for row in lines] == [1.0] * 20 + [0.0] * 20
    assert "40 samples in 1,8" in ran.stdout and ran.stdout.endswith("\naffected, up to L = 50\n")
    table = [line.split() for line in ran.stdout.splitlines() if line.startswith("  10  dirty")]
    assert table == [["10", "dirty", "100.0%", "20", "1", "0.5", "+4.47"]]


def test_a_file_without_scores_gives_shares_only(corpus, capsys):
    samples = corpus / "samples.jsonl"
    samples.write_text(json.dumps({"text": TEXTS[0]}) + "\n")
    tables = run(ContaminationConfig(corpus / "shards", samples, out=corpus / "out.jsonl", min_lens=(10,)))
    assert tables[10]["dirty"].n == 1
    row = json.loads((corpus / "out.jsonl").read_text())
    assert row["contaminated"] == {"10": 1.0} and "score" not in row
    printed = capsys.readouterr().out
    assert "affected" not in printed and " Z" not in printed and "10  clean               –          0" in printed


@pytest.mark.parametrize(("lines", "message"), [
    (['{"text": "a", "tokens": [1]}'], "1: expected an object with either"),
    (['{"text": "a"}', "[]"], "2: expected an object"),
    (['{"text": "a"}', "{"], "2: not JSON"),
    (['{"text": 3}'], "1: expected 'text' to be a string, found 3"),
    (['{"tokens": [280]}'], "1: id 280 at place 0, expected ids from 0 to 279"),
    (['{"tokens": []}'], "1: a sample without tokens"),
    (['{"text": "a", "score": "x"}'], "1: expected 'score' to be a number"),
    (['{"text": "a", "score": NaN}'], "1: expected 'score' to be a number"),
    (['{"text": "a", "score": 1}', '{"text": "a"}'], "2: expected a 'score' in every line or in none"),
    ([], ": no samples"),
])
def test_a_bad_line_is_named(corpus, lines, message):
    samples = corpus / "samples.jsonl"
    samples.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(ValueError, match=rf"samples\.jsonl:? ?{message}"):
        run(ContaminationConfig(corpus / "shards", samples))
    assert not (corpus / "samples.contamination.jsonl").exists() and not (corpus / "shards" / "index").exists()


def test_another_tokenizer_is_refused_and_none_is_asked_for(corpus):
    samples = corpus / "samples.jsonl"
    samples.write_text('{"text": "a"}\n')
    other = train_tokenizer(TEXTS[:5], 276, corpus / "other.model")
    with pytest.raises(ValueError, match="made with tokenizer"):
        run(ContaminationConfig(corpus / "shards", samples, tokenizer=other.path))
    (corpus / "shards" / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="'text' needs a tokenizer"):
        run(ContaminationConfig(corpus / "shards", samples))
    with pytest.raises(ValueError, match="min_lens"):
        ContaminationConfig(corpus / "shards", samples, min_lens=(3,))


def test_copies_that_are_not_found_are_an_error(monkeypatch):
    monkeypatch.setattr(contamination, "covered", lambda lengths: np.zeros(len(lengths), bool))
    with pytest.raises(ValueError, match="0% of the copies found, and 0% of the others"):
        contamination.cost(10_000, 10)


def test_the_peak_of_memory_is_not_the_parents():
    "A process that one of a gigabyte has started has not used a gigabyte itself, but the quarter that it holds."
    child = "from llama2lib.contamination import peak_memory as peak; held = bytes(b'1' * 2**28); print(peak())"
    parent = "import subprocess, sys; held = bytes(b'1' * 2**30); subprocess.run([sys.executable, '-c', sys.argv[1]])"
    alone = int(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout)
    started = subprocess.run([sys.executable, "-c", parent, child], capture_output=True, text=True, check=True)
    assert abs(int(started.stdout) - alone) < 2**28 < alone
