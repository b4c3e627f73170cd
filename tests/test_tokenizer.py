"""The tokenizer: lossless, digits apart, control tokens out of reach; Meta's own file when it is at hand."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama2lib.recipes import data_file
from llama2lib.tokenizer import Tokenizer, train_tokenizer

TEXT = ["the quick brown fox jumps over the lazy dog, 1024 times\n", "a naïve café — 3.14 and 2023\n" * 3] * 20


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return train_tokenizer(TEXT, 350, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@settings(max_examples=300, deadline=None)
@given(st.text())
@example("\u2581")
@example(" \u2581 a\u2581\u2581b \n\u2581\n")
@example("  two  spaces  ")
@example("\r\n\t\0\x7f\u00a0\u200b\ufeff")
@example("e\u0301 é ﬁ Å")
@example("\U0010ffff🦙👩‍👩‍👧")
@example("<s>[INST]</s><unk><0x41>")
def test_any_unicode_survives_the_round_trip_and_never_becomes_a_control_token(small, text):
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert not {0, small.bos_id, small.eos_id} & set(ids)


@settings(deadline=None)
@given(
    st.lists(st.text(st.sampled_from("\u2581ab 1\n🦙é") | st.characters(codec="utf-8"))), st.booleans(), st.booleans()
)
@example(["\u2581", "", "x\u2581\u2581y", "\u2581\n\u2581 "], True, True)
@example([], True, False)
def test_a_batch_is_encoded_as_its_texts_are(small, texts, bos, eos):
    assert small.encode_batch(texts, bos=bos, eos=eos) == [small.encode(text, bos=bos, eos=eos) for text in texts]
    assert small.encode_batch(iter(texts), bos=bos, eos=eos) == small.encode_batch(texts, bos=bos, eos=eos)


def test_the_digest_is_that_of_the_file(small, tmp_path):
    (tmp_path / "copy.model").write_bytes(small.path.read_bytes())
    other = train_tokenizer(TEXT, 340, tmp_path / "other.model")
    assert Tokenizer(tmp_path / "copy.model").digest == small.digest != other.digest


def test_every_digit_is_a_piece(small):
    assert len(small.encode("a 20231024")) == len(small.encode("a ")) + 8


def test_runs_of_spaces_are_pieces_of_their_own(tmp_path):
    "Indented code would otherwise cost a piece for every space."
    tokenizer = train_tokenizer(["        return x\n    def y\n" * 30] * 9, 285, tmp_path / "t.model")
    assert len(tokenizer.encode(" " * 7)) < 5


def test_bos_and_eos_are_ids_that_the_caller_adds(small):
    assert small.encode("fox", bos=True, eos=True) == [1, *small.encode("fox"), 2]
    assert small.decode(small.encode("fox", bos=True, eos=True)) == "fox"
    assert (small.bos_id, small.eos_id, small.pad_id, small.vocab_size) == (1, 2, -1, 350)


def test_a_continuation_keeps_its_first_space(small):
    front, rest = small.encode("the quick", bos=True), small.encode("brown fox", eos=True)
    assert small.continuation(front, rest) == " brown fox" and small.decode(rest) == "brown fox"
    assert small.continuation(front, []) == "" and small.continuation([], rest) == "brown fox"


def test_long_lines_are_trained_on(tmp_path):
    "SentencePiece's default drops a line of more than 4,192 bytes without a word."
    tokenizer = train_tokenizer(["zyzzyva " * 2000], 268, tmp_path / "t.model")
    assert len(tokenizer.encode("zyzzyva")) < 4


def test_a_folder_stands_for_its_tokenizer_file(small):
    assert Tokenizer(small.path.parent).encode("the fox") == small.encode("the fox")


@pytest.mark.parametrize("texts", [[], [""], [" \n\t\n"]])
def test_no_text_is_refused(tmp_path, texts):
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer(texts, 300, tmp_path / "t.model")


@pytest.mark.parametrize("vocab_size", [100, 5000])
def test_a_vocabulary_that_the_text_cannot_give_is_refused(tmp_path, vocab_size):
    with pytest.raises(ValueError, match=f"vocab_size {vocab_size}"):
        train_tokenizer(TEXT, vocab_size, tmp_path / "t.model")
    assert not list(tmp_path.iterdir())


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        Tokenizer(tmp_path / "missing.model")
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"broken\.model: not a SentencePiece model"):
        Tokenizer(tmp_path / "broken.model")


@pytest.mark.parametrize("token", [-1, 350])
def test_ids_outside_the_vocabulary_are_refused(small, token):
    with pytest.raises(ValueError, match=rf"ids\[1\] is {token}"):
        small.decode([5, token])


def test_half_a_surrogate_pair_is_refused(small):
    with pytest.raises(ValueError, match="position 2 of the text"):
        small.encode("ab\ud800")
    with pytest.raises(ValueError, match="position 2 of text 1"):
        small.encode_batch(["fine", "ab\ud800"])


def test_metas_file_gives_the_47_golden_tokenizations(real_tokenizer_file):
    tokenizer = Tokenizer(real_tokenizer_file)
    texts = data_file("llama2-tokenizer/golden.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    golden = data_file("llama2-tokenizer/golden.out").read_text().split("\n")
    assert len(golden) == len(texts) == 47
    for text, ids in zip(texts, golden, strict=True):
        assert tokenizer.encode(text) == [int(i) for i in ids.split()], repr(text)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 2, -1, 32_000)


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_metas_file_is_lossless_too(text):
    file = data_file("llama2-tokenizer/tokenizer.model")
    if file is None:
        pytest.skip("needs llama2-tokenizer/tokenizer.model under LLAMA2_DATA")
    tokenizer = Tokenizer(file)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_packaged_llama_style_file_loads():
    "Mistral's first tokenizer has Llama 2's format, and comes with a package."
    package = pytest.importorskip("mistral_common", reason="needs mistral-common (extra 'test')")
    from pathlib import Path

    tokenizer = Tokenizer(Path(package.__file__).parent / "data" / "tokenizer.model.v1")
    ids = tokenizer.encode("Hello 2024 </s>\u2581!", bos=True)
    assert tokenizer.vocab_size == 32_000 and ids[0] == 1 and 2 not in ids
    assert tokenizer.decode(ids) == "Hello 2024 </s>\u2581!"
