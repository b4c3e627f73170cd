"""The adapter for lm-evaluation-harness beside the harness's own, HFLM, on the same weights."""

import logging
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_model

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from llama2lib import mini
from llama2lib.checkpoint import save_checkpoint
from llama2lib.dialog import encode_dialog
from llama2lib.harness import LlamaLM
from llama2lib.model import Llama
from llama2lib.synthetic import documents

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = documents(np.random.default_rng(0), 30)
LONG = " ".join(TEXTS)[:3000]  # more than a context


def answers(lm, kind: str, *requests: tuple) -> list:
    return getattr(lm, kind)([Instance(kind, {}, request, n) for n, request in enumerate(requests)])


@pytest.fixture(scope="module")
def words():
    return mini.tokenizer()


@pytest.fixture(scope="module")
def models(words) -> dict[str, Llama]:
    "Random weights that never write single bytes, which the two libraries decode differently; and a trained model."
    strange = random_model("GQA", vocab_size=words.vocab_size)
    strange.output.weight.data[:259] = 0
    return {"random": strange, "trained": replace_context(mini.base(0))}


def replace_context(model: Llama) -> Llama:
    "The same weights in a shorter context."
    shorter = Llama(replace(model.config, max_seq_len=128))
    shorter.load_state_dict(model.state_dict())
    return shorter


@pytest.fixture(scope="module", params=["random", "trained"])
def both(request, models, words, tmp_path_factory) -> tuple:
    "Our adapter, theirs, and theirs that adds no BOS."
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = tmp_path_factory.mktemp("hf") / "model"
    save_checkpoint(models[request.param], folder, words)
    options = {"device": "cpu", "batch_size": 8, "logits_cache": False}  # which mixes up two divisions of one text
    theirs = [HFLM(str(folder), add_bos_token=bos, **options) for bos in (None, False)]
    return LlamaLM(models[request.param], words, batch_tokens=512, batch=8), *theirs


def test_likelihoods_equal_those_of_hflm(both):
    "Borders in words and white space, empty contexts, choices of a context in any order, contexts that are too long."
    ours, theirs, _ = both
    pairs = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in TEXTS]
    pairs += [("", "Ben is a baker."), ("  ", "Ben"), ("Ben is a ", "baker."), ("Ben\n", "cook"), ("Be", "n is here")]
    pairs += [("ü", "ß 🙂"), ("Ben is", "\n\n"), (LONG, " Ben is a baker."), (LONG, " Ben"), (LONG[-400:], " and so")]
    pairs += [(text, f" {job}{end}") for text in TEXTS[:4] for job in ("baker", "cook", "nurse") for end in (".", "s")]
    order = np.random.default_rng(1).permutation(len(pairs))
    pairs = [pairs[n] for n in order] + [pairs[order[0]]]
    found, expected = (np.array(answers(lm, "loglikelihood", *pairs)) for lm in (ours, theirs))
    assert np.abs(found - expected).max() < 1e-3
    assert np.ptp(found[:, 0]) > 10


def test_the_greedy_flag_is_that_of_hflm(both):
    "What the model itself would write is greedy, with another end it is not."
    ours, theirs, _ = both
    contexts = [text[:20] for text in TEXTS[:10]]
    written = answers(ours, "generate_until", *((text, {"max_gen_toks": 6}) for text in contexts))
    pairs = [(text, f" {more}{end}") for text, more in zip(contexts, written, strict=True) for end in ("", " no", "x")]
    found, expected = (answers(lm, "loglikelihood", *pairs) for lm in (ours, theirs))
    assert [flag for _, flag in found] == [flag for _, flag in expected]
    assert {flag for _, flag in found} == {True, False}


def test_documents_have_one_bos_and_every_token_counts_once(both):
    "As HFLM with add_bos_token=False has it; with its default, BOS behind BOS is counted as well."
    ours, default, single = both
    texts = [*((text,) for text in TEXTS[:6]), (LONG,), ("",), (LONG[:500],)]
    found, once, twice = (np.array(answers(lm, "loglikelihood_rolling", *texts)) for lm in (ours, single, default))
    assert np.abs(found - once).max() < 1e-3 and found[-2] == 0
    assert (found - twice > 1).all()
    tokens = ours.words.encode(TEXTS[0], bos=True)
    with torch.no_grad():
        logprobs = ours.model(torch.tensor([tokens]))[0].log_softmax(-1)
    assert found[0] == pytest.approx(logprobs[:-1].gather(1, torch.tensor(tokens[1:])[:, None]).sum().item(), abs=1e-3)


def test_written_texts_equal_those_of_hflm(both):
    "With several stops, of several tokens and across tokens, without any, and behind a context that is too long."
    ours, theirs, _ = both
    free = answers(ours, "generate_until", *((text[:15], {"max_gen_toks": 24}) for text in TEXTS[:8]))
    stops = [([], ["."], ["\n", "Q:"], [t[4:9] or "?"], [t[9:11] or "a", t[2:6] or "b"]) for t in free]
    requests = [(text[:15], {"max_gen_toks": 24, "do_sample": False, "until": until})
                for text, some in zip(TEXTS, stops, strict=False) for until in some]  # fmt: skip
    requests += [(LONG, {"max_gen_toks": 20, "until": ["."]}), (TEXTS[3], {"max_new_tokens": 5, "until": "e"})]
    found, expected = (answers(lm, "generate_until", *requests) for lm in (ours, theirs))
    assert found == expected
    assert len(set(map(len, found))) > 4
    assert all(more[4:9] not in text for more, text in zip(free, found[3::5], strict=False) if more[4:9])


def test_stops_are_not_searched_in_the_prompt(models, words):
    lm = LlamaLM(models["trained"], words)
    free, stopped = answers(lm, "generate_until", ("Stop. Ben", {"max_gen_toks": 8}),
                            ("Stop. Ben", {"max_gen_toks": 8, "until": ["Stop"]}))  # fmt: skip
    assert free == stopped != ""


def test_contexts_that_lost_their_beginning_are_counted(models, words):
    lm = LlamaLM(models["trained"], words)
    answers(lm, "loglikelihood", (LONG, " Ben"), ("Ann", " Ben"))
    answers(lm, "generate_until", (LONG, {"max_gen_toks": 3}), ("Ann", {"max_gen_toks": 3}))
    answers(lm, "loglikelihood_rolling", (LONG,))
    assert lm.shortened == 2


def test_sampled_answers_depend_on_seed_and_question_alone(models, words):
    sampled = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "max_gen_toks": 12}
    requests = [(text[:12], sampled) for text in TEXTS[:6]]
    first = answers(LlamaLM(models["random"], words, batch=2), "generate_until", *requests)
    again = answers(LlamaLM(models["random"], words, batch=64), "generate_until", *requests[::-1])[::-1]
    other = answers(LlamaLM(models["random"], words, seed=1), "generate_until", *requests)
    assert first == again and all(a != b for a, b in zip(first, other, strict=True))
    repeated = answers(LlamaLM(models["random"], words), "generate_until", *[requests[0]] * 4)
    assert repeated[0] == first[0] and len(set(repeated)) == 4
    greedy = {"do_sample": False, "temperature": 0.9, "max_gen_toks": 12}
    assert len(set(answers(LlamaLM(models["random"], words), "generate_until", *[("Ben", greedy)] * 3))) == 1


def test_conversations_become_the_tokens_of_the_chat_format(models, words):
    lm = LlamaLM(models["trained"], words)
    dialog = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Who is Ben? "},
              {"role": "assistant", "content": "A baker."}, {"role": "user", "content": "And Ann?"}]  # fmt: skip
    text = lm.apply_chat_template(dialog)
    whole, mask = encode_dialog(words, [*dialog, {"role": "assistant", "content": "A cook."}])
    prompt = encode_dialog(words, dialog)[0]
    asked = []
    lm._loglikelihood_tokens = lambda requests, **_: asked.extend(requests)
    answers(lm, "loglikelihood", (text, "A cook."))
    (_, context, continuation), = asked
    assert context == prompt and context + continuation == whole[: len(context + continuation)]
    assert len(whole) - len(context + continuation) <= 2 and mask[len(context)] == 1  # the last space, and EOS
    begun = lm.apply_chat_template([*dialog, {"role": "assistant", "content": "A cook"}], add_generation_prompt=False)
    assert lm.tok_encode(begun) == lm.tok_encode(text + "A cook")
    assert lm.tok_encode(text.rstrip()) == prompt


def test_a_prompt_in_the_chat_format_is_written_behind_its_tag(models, words, monkeypatch):
    "Not behind a space, which belongs to the answer."
    lm, seen = LlamaLM(models["trained"], words), []
    dialog = [{"role": "user", "content": "Who is Ben?"}]

    def record(model, tokenizer, prompts, *_, **__):
        seen.extend(prompts)
        return [[] for _ in prompts]

    monkeypatch.setattr("llama2lib.harness.tokens_until", record)
    answers(lm, "generate_until", (lm.apply_chat_template(dialog), {"max_gen_toks": 4}))
    assert seen == [encode_dialog(words, dialog)[0]]


def test_text_never_becomes_a_control_token(models, words):
    lm = LlamaLM(models["trained"], words)
    for text in ("<s>", "</s> Ben", "[INST] Ben [/INST]", "a \x02 b \x03"):
        assert not {words.bos_id, words.eos_id} & set(lm.tok_encode(text)[1:])
    with pytest.raises(ValueError, match=r"holds one of the signs U\+0002 and U\+0003"):
        lm.apply_chat_template([{"role": "user", "content": "a \x03 b"}])
    with pytest.raises(ValueError, match="message 0: assistant first"):
        lm.apply_chat_template([{"role": "assistant", "content": "a"}])


@pytest.mark.parametrize("settings, expected", [
    ({"max_gen_toks": 128}, "128 tokens to write leave no room in a context of 128"),
    ({"num_beams": 4}, "num_beams; expected until, max_gen_toks, do_sample, temperature and top_p only"),
    ({"temperature": -1, "max_gen_toks": 4}, "temperature -1"),
])  # fmt: skip
def test_settings_that_cannot_be_kept_are_refused(models, words, settings, expected):
    with pytest.raises(ValueError, match=expected):
        answers(LlamaLM(models["trained"], words), "generate_until", ("Ben", settings))


def test_a_tokenizer_of_another_model_is_refused(words):
    with pytest.raises(ValueError, match="2048 pieces for a model of 97; expected the model's own tokenizer"):
        LlamaLM(random_model("GQA"), words)


def test_a_continuation_without_a_token_of_its_own_is_refused(models, words):
    for context, continuation in ("Ben", ""), ("Be", "n is"):
        with pytest.raises(ValueError, match=f"'{continuation}' adds no token to '{context}'"):
            answers(LlamaLM(models["trained"], words), "loglikelihood", ("Ann", "Ben"), (context, continuation))


def test_one_line_says_what_to_install():
    code = "import sys; sys.modules['lm_eval'] = None; import llama2lib.harness"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stderr.strip().endswith("ImportError: lm-eval is not installed: pip install -e '.[eval]'")
