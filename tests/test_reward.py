"""Reward models: where the score is read, what the loss compares, and a run that can stop and be divided."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from conftest import dies_after, random_model

from llama2lib import reward as module
from llama2lib import sft
from llama2lib.checkpoint import load_checkpoint, save_checkpoint, save_meta
from llama2lib.dialog import encode_dialog, write_dialogs
from llama2lib.distributed import Parallel, StateFolder
from llama2lib.judge import RATINGS
from llama2lib.launch import torchrun_arguments
from llama2lib.preferences import write_preferences
from llama2lib.reward import (
    MARGINS,
    REWARD,
    RewardConfig,
    RewardModel,
    accuracy,
    choose,
    encode_pair,
    forked,
    load_scorer,
    micro_batches,
    padded,
    pair_losses,
    pair_rows,
    ranking_loss,
    read_pairs,
    right,
    run,
    safety_losses,
    score,
    score_pairs,
    train_reward,
)
from llama2lib.tokenizer import train_tokenizer

WORDS = "one two three four five six seven eight nine ten and the fox plus minus is what makes".split()
CONFIG = RewardConfig(lr=3e-3, batch_pairs=8, max_seq_len=96, micro_batch=2, min_warmup=0)


def comparison(random: random.Random) -> dict:
    "A conversation of one to three turns; the chosen answer says yes, the rejected one no, among words of any number."
    count = 2 * random.randint(0, 2) + 1
    turns = [" ".join(random.choices(WORDS, k=random.choice((1, 2, 3, 9)))) for _ in range(count)]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    answers = [f"{word} {' '.join(random.choices(WORDS, k=random.randint(1, 7)))}." for word in ("yes", "no")]
    row = {"messages": messages, "chosen": answers[0], "rejected": answers[1], "source": "test"}
    labels = random.choice(["chosen_safe", "both_safe", "both_unsafe", None])
    return row | {"rating": random.choice([*RATINGS, None]), "safety": labels}


ROWS = [comparison(random.Random(number)) for number in range(44)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [m["content"] for row in ROWS for m in row["messages"]] + ["[INST] [/INST] [INST]\n"] * 99
    texts += [row[name] for row in ROWS for name in ("chosen", "rejected")]
    return train_tokenizer(texts, 340, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def pairs(tokenizer):
    return [encode_pair(tokenizer, row, "small", 96) for row in ROWS]


def chat_model(tokenizer):
    return random_model(vocab_size=tokenizer.vocab_size)


def scoring_model(tokenizer):
    "A reward model whose head is not zero."
    model = RewardModel.of(chat_model(tokenizer))
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    return model


def dialogs(rows=ROWS):
    return [[*row["messages"], {"role": "assistant", "content": row["chosen"]}] for row in rows]


# ---- the score


def test_the_score_is_the_heads_product_with_the_last_tokens_state(tokenizer):
    model = scoring_model(tokenizer)
    for messages, found in zip(dialogs(), score(model, tokenizer, dialogs()), strict=True):
        tokens, _ = encode_dialog(tokenizer, messages)
        assert tokens[-1] == tokenizer.eos_id
        state = model.hidden(torch.tensor([tokens]))[0, -1]
        assert found == pytest.approx((state @ model.score.weight[0]).item(), abs=1e-4)


def test_a_score_depends_on_no_neighbour_no_filling_and_no_batch_size(tokenizer):
    model = scoring_model(tokenizer)
    together = score(model, tokenizer, dialogs())
    alone = [score(model, tokenizer, [messages])[0] for messages in dialogs()]
    small = score(model, tokenizer, dialogs()[::-1], batch=1)[::-1]
    assert np.allclose(together, alone, atol=1e-4) and np.allclose(together, small, atol=1e-5)
    assert np.std(together) > 0.1


def test_filling_stands_behind_the_last_token_and_changes_nothing(tokenizer):
    model, rows = scoring_model(tokenizer), [encode_dialog(tokenizer, messages)[0] for messages in dialogs()[:6]]
    tokens, filled, last = padded(rows), padded(rows, 8), torch.tensor([[len(row) - 1] for row in rows])
    assert [row[: n + 1].tolist() for row, n in zip(tokens, last, strict=True)] == rows
    assert filled.shape[1] % 8 == 0 and tokens.shape[1] == max(map(len, rows))
    for row, n in zip(filled, last, strict=True):
        row[n + 1 :] = tokenizer.eos_id  # a model that looks for the last EOS would find these
    assert torch.allclose(model(tokens, last), model(filled, last), atol=1e-4)
    end = tokens.clone()
    end[torch.arange(6), last[:, 0]] = 5
    assert (model(end, last) - model(tokens, last)).abs().min() > 1e-4  # it is read at EOS itself


def test_the_two_answers_of_a_row_do_not_see_each_other(tokenizer, pairs):
    "Scores of forked rows are those of two rows, whatever the other answer is and however long."
    model = scoring_model(tokenizer)
    together = model(*pair_rows(pairs, 8))
    apart = [score(model, tokenizer, [[*row["messages"], {"role": "assistant", "content": row[name]}] for row in ROWS])
             for name in ("chosen", "rejected")]  # fmt: skip
    assert np.allclose(together.detach().T, apart, atol=1e-4)
    assert np.allclose(score_pairs(model, tokenizer, ROWS, batch=5), apart, atol=1e-4)
    swapped = model(*pair_rows([pair._replace(chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]))
    assert torch.allclose(swapped.flip(1), together, atol=1e-4)
    other = model(*pair_rows([pair._replace(chosen=[9, 8, 7]) for pair in pairs]))
    assert torch.allclose(other[:, 1], together[:, 1], atol=1e-4)
    assert (other[:, 0] - together[:, 0]).abs().median() > 1e-2


def test_a_row_of_two_answers_may_be_longer_than_the_context_a_conversation_may_not(tokenizer):
    "One answer after the other is more than the context holds, beside a row that is mostly filling."
    longest = max(ROWS, key=lambda row: len(encode_pair(tokenizer, row).chosen))
    pair = encode_pair(tokenizer, longest)
    context = max(len(pair.prompt + pair.chosen), len(pair.prompt + pair.rejected))
    short = min(ROWS, key=lambda row: encode_pair(tokenizer, row).size)
    model = RewardModel.of(random_model(vocab_size=tokenizer.vocab_size, max_seq_len=context))
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    assert pair.size > context
    together = score_pairs(model, tokenizer, [longest, short])
    apart = np.hstack([score_pairs(model, tokenizer, [row]) for row in (longest, short)])
    assert np.allclose(together, apart, atol=1e-4)
    for name, scores in zip(("chosen", "rejected"), together, strict=True):
        alone = score(model, tokenizer, [[*longest["messages"], {"role": "assistant", "content": longest[name]}]])
        assert np.allclose(alone, scores[0], atol=1e-4)
    with pytest.raises(ValueError, match=f"tokens with the conversation, more than max_seq_len {context}"):
        score_pairs(model, tokenizer, [longest | {"chosen": longest["chosen"] + " the fox" * 3}])


def test_forked_positions_and_masks_by_hand():
    positions, mask = forked(torch.tensor([[2, 3], [1, 3]]), 6)
    assert positions.tolist() == [[0, 1, 2, 2, 3, 4], [0, 1, 2, 1, 2, 3]]
    reads = [["".join(str(int(x)) for x in row) for row in m[0]] for m in mask]
    assert reads[0] == ["100000", "110000", "111000", "110100", "110110", "110111"]
    assert reads[1] == ["100000", "110000", "111000", "100100", "100110", "100111"]


def test_transformers_gives_the_same_scores_from_the_saved_folder(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = scoring_model(tokenizer)
    save_checkpoint(model, tmp_path / "rm", tokenizer)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert theirs.num_labels == 1
    rows = [encode_dialog(tokenizer, messages)[0] for messages in dialogs()]
    tokens, last = padded(rows), torch.tensor([[len(row) - 1] for row in rows])
    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits, model(tokens, last), atol=1e-4)
    theirs.save_pretrained(tmp_path / "again")
    again = load_checkpoint(tmp_path / "again", kind=RewardModel)
    assert torch.allclose(again(tokens, last), model(tokens, last), atol=1e-4)


def test_a_reward_model_is_not_taken_for_a_language_model(tokenizer, tmp_path):
    save_checkpoint(scoring_model(tokenizer), tmp_path / "rm")
    save_checkpoint(chat_model(tokenizer), tmp_path / "lm")
    with pytest.raises(ValueError, match=r"rm.config\.json: architectures .* expected a language model"):
        load_checkpoint(tmp_path / "rm")
    with pytest.raises(ValueError, match=r"lm.config\.json: architectures .* expected a reward model"):
        load_checkpoint(tmp_path / "lm", kind=RewardModel)
    save_meta(chat_model(tokenizer), tmp_path / "meta")
    with pytest.raises(ValueError, match="meta: Meta's layout holds language models"):
        load_checkpoint(tmp_path / "meta", kind=RewardModel)
    with pytest.raises(ValueError, match="save a reward model with save_checkpoint"):
        save_meta(scoring_model(tokenizer), tmp_path / "x")


def test_a_reward_model_begins_with_the_chat_models_weights_and_prefers_nothing(tokenizer, pairs):
    chat = chat_model(tokenizer)
    model = RewardModel.of(chat)
    weights = dict(chat.named_parameters())
    assert [n for n, _ in model.named_parameters() if n not in weights] == ["score.weight"]
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
    chat.norm.weight.data += 1  # a copy: the chat model can go on
    assert not torch.equal(model.norm.weight, chat.norm.weight)
    first = next(train_reward(model, [pair._replace(margin=0.0) for pair in pairs], CONFIG))
    assert first.loss == pytest.approx(math.log(2), rel=1e-6)


def test_only_an_answer_can_be_scored(tokenizer):
    with pytest.raises(ValueError, match="dialog 1 ends with the user: expected an answer"):
        score(scoring_model(tokenizer), tokenizer, [dialogs()[0], ROWS[0]["messages"]])


def test_any_reward_models_folder_is_a_scorer(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = scoring_model(tokenizer)
    save_checkpoint(model, tmp_path / "ours", tokenizer)
    expected = score(model, tokenizer, dialogs())
    assert np.allclose(load_scorer(tmp_path / "ours")(dialogs()), expected, atol=1e-4)
    save_checkpoint(model, tmp_path / "theirs", tokenizer)
    (tmp_path / "theirs" / "tokenizer.model").unlink()  # opened by transformers, with its tokenizer and our template
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    words.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    words.save_pretrained(tmp_path / "theirs")
    single = [messages for messages in dialogs() if len(messages) == 2]
    theirs, ours = load_scorer(tmp_path / "theirs")(single), score(model, tokenizer, single)
    assert np.corrcoef(theirs, ours)[0, 1] > 0.95  # the templates differ in a blank
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    network = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**config | {"num_labels": 3}))
    network.save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="three has 3 outputs; a reward model has one"):
        load_scorer(tmp_path / "three")


def test_a_chat_model_is_asked_in_both_orders(tokenizer):
    "A model that likes one letter, whatever stands there, prefers neither answer; swapping the answers turns the sign."
    model = chat_model(tokenizer)
    rows = [row | {"messages": row["messages"][-1:]} for row in ROWS[:9]]
    found = choose(model, tokenizer, rows, batch=4)
    swapped = choose(model, tokenizer, [r | {"chosen": r["rejected"], "rejected": r["chosen"]} for r in rows])
    assert np.allclose(found, -swapped, atol=1e-4) and np.std(found) > 1e-3
    by_hand = []
    for first, second in (("chosen", "rejected"), ("rejected", "chosen")):
        text = f"{rows[0]['messages'][0]['content']}\n\nA: {rows[0][first]}\n\nB: {rows[0][second]}\n\n"
        question = text + "Choose the best answer between A and B."
        tokens, _ = encode_dialog(tokenizer, [{"role": "user", "content": question}])
        a, b = (model(torch.tensor([tokens]))[0, -1, tokenizer.encode(letter)[-1]].item() for letter in "AB")
        by_hand.append(a - b)
    assert found[0] == pytest.approx((by_hand[0] - by_hand[1]) / 2, abs=1e-4)


# ---- the losses


def test_equation_1_and_2_by_hand():
    chosen, rejected = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1.0, 0.0, 1.0])
    by_hand = [math.log(1 + math.exp(-d)) for d in (1, 0, -2)]
    assert pair_losses(chosen, rejected).tolist() == pytest.approx(by_hand)
    assert ranking_loss(chosen, rejected).item() == pytest.approx(sum(by_hand) / 3)
    margin = torch.tensor([1.0, 2 / 3, 0.0])
    by_hand = [math.log(1 + math.exp(-d)) for d in (0, -2 / 3, -2)]
    assert ranking_loss(chosen, rejected, margin).item() == pytest.approx(sum(by_hand) / 3)
    assert ranking_loss(chosen, rejected, 3.0).item() > ranking_loss(chosen, rejected, 1.0).item()


@pytest.mark.parametrize(
    "shapes", [((4, 1), (4, 1), (4,)), ((4,), (4, 1), ()), ((4,), (4,), (4, 1)), ((4,), (3,), (3,))]
)
def test_scores_and_margins_that_would_broadcast_are_refused(shapes):
    chosen, rejected, margin = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="expected a number for each pair"):
        ranking_loss(chosen, rejected, margin)


def test_margins_are_those_of_table_27():
    assert {tuple(MARGINS[name].values()) for name in ("small", "large")} == {(1, 2 / 3, 1 / 3, 0), (3, 2, 1, 0)}
    assert all(list(margins) == list(RATINGS) for margins in MARGINS.values())


def test_the_safety_loss_is_the_cross_entropy_of_what_is_known():
    losses = safety_losses(torch.tensor([2.0, 2.0, 2.0]), torch.tensor([1.0, 0.0, -1.0]))
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-2)), math.log(1 + math.exp(2)), 0.0])


# ---- pairs and steps


def test_a_pair_has_the_conversation_with_each_answer_its_margin_and_its_labels(tokenizer):
    row = ROWS[0] | {"rating": "better", "safety": "chosen_safe"}
    pair = encode_pair(tokenizer, row, "large", 96)
    for name, tokens in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        messages = [*row["messages"], {"role": "assistant", "content": row[name]}]
        assert pair.prompt + tokens == encode_dialog(tokenizer, messages)[0]
    assert (pair.margin, pair.safe) == (2, (1, 0))
    assert encode_pair(tokenizer, row | {"rating": None, "safety": None}, "large", 96)[3:] == (0, (-1, -1))
    with pytest.raises(ValueError, match=r"chosen: \d+ tokens with the conversation, more than max_seq_len 8"):
        encode_pair(tokenizer, row, "large", 8)


@pytest.mark.parametrize("count", [1, 3, 44])
def test_micro_batches_hold_every_pair_once_chosen_first(pairs, count):
    found, multiple = [], 4
    for tokens, last, forks, margins, safe, weights in micro_batches(pairs, count, multiple):
        assert tokens.shape[1] % multiple == 0 and len(tokens) == len(last) == len(safe) == len(margins)
        assert weights.tolist() == [1.0] * len(margins)
        for i, row in enumerate(tokens.tolist()):
            (a, b), (one, two) = forks[i].tolist(), last[i].tolist()
            assert one + 1 == b and not any(row[two + 1 :])
            parts = row[:a], row[a:b], row[b : two + 1]
            found.append((*parts, pytest.approx(margins[i].item()), tuple(safe[i].tolist())))
    assert sorted(found, key=lambda f: f[:3]) == sorted(map(tuple, pairs), key=lambda p: p[:3])


def by_hand(model, pairs, auxiliary=0.0, center=0.0):
    "Loss and accuracy of pairs, one at a time."
    losses, right = [], []
    for pair in pairs:
        rows = [pair.prompt + answer for answer in (pair.chosen, pair.rejected)]
        scores = [model(torch.tensor([row]), torch.tensor([[len(row) - 1]]))[0] for row in rows]
        loss = -torch.nn.functional.logsigmoid(scores[0] - scores[1] - pair.margin)
        for value, safe in zip(scores, pair.safe, strict=True):
            if safe >= 0:
                loss = loss + auxiliary * -torch.nn.functional.logsigmoid(value if safe else -value) / 2
        losses.append(loss + center * (scores[0] + scores[1]) ** 2)
        right.append((scores[0] > scores[1]).item())
    return torch.cat(losses).mean(), np.mean(right)


@pytest.mark.parametrize(("auxiliary", "center"), [(0.0, 0.0), (0.7, 0.0), (0.0, 0.3)])
@pytest.mark.parametrize("micro_batch", [1, 3, 64])
def test_a_step_is_the_mean_over_its_pairs_however_it_is_cut(tokenizer, pairs, micro_batch, auxiliary, center):
    config = replace(CONFIG, batch_pairs=44, micro_batch=micro_batch, auxiliary=auxiliary, center=center)
    model, other = scoring_model(tokenizer), scoring_model(tokenizer)
    [step] = train_reward(model, pairs, config)
    loss, right = by_hand(other, pairs, auxiliary, center)
    assert step.loss == pytest.approx(loss.item(), rel=1e-5) and step.accuracy == pytest.approx(right)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in other.parameters()])
    assert step.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    assert step.tokens == sum(len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)


def test_accuracy_never_uses_the_margin(tokenizer, pairs):
    found = []
    for margin in (0.0, 50.0):
        wide = [pair._replace(margin=margin) for pair in pairs]
        [step] = train_reward(scoring_model(tokenizer), wide, replace(CONFIG, batch_pairs=44))
        found.append(step.accuracy)
    assert found[0] == found[1] > 0


def test_it_learns_which_answer_is_better_and_epochs_see_every_pair_once(tokenizer, pairs):
    model, config = RewardModel.of(chat_model(tokenizer)), replace(CONFIG, epochs=4)
    steps = list(train_reward(model, pairs, config))
    assert len(steps) == config.steps(44) == 24 and steps[5].tokens * 4 == steps[-1].tokens
    assert accuracy(score_pairs(model, tokenizer, ROWS), ROWS)["all"] > 0.95
    assert [s.lr for s in steps[-1:]] == pytest.approx([CONFIG.lr * 0.1])


def test_a_compiled_model_learns_the_same(tokenizer, pairs):
    plain, compiled = (
        [s.loss for s in train_reward(RewardModel.of(chat_model(tokenizer)), pairs, replace(CONFIG, parallel=parallel))]
        for parallel in (Parallel(), Parallel(compile=True))
    )
    assert compiled == pytest.approx(plain, rel=1e-5) and plain[-1] != plain[0]


def test_warm_up_has_at_least_the_steps_that_are_asked_for(tokenizer, pairs):
    steps = list(train_reward(RewardModel.of(chat_model(tokenizer)), pairs, replace(CONFIG, min_warmup=5)))
    assert [s.lr / CONFIG.lr for s in steps[:5]] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and len(steps) == 6


def test_accuracy_by_rating_counts_ties_half():
    rows = [{"rating": rating} for rating in ("better", "better", "slightly better", None)]
    found = accuracy(np.array([[1.0, 0, 2, 3], [0, 0, 3, 1]]), rows)
    assert found == {"better": 0.75, "slightly better": 0.0, "all": 0.625}
    assert right(np.array([[[1.0, 0], [0, 0]], [[2, 3], [4, 1]]])).tolist() == [[1, 0.5], [0, 1]]


def test_a_loss_that_is_not_finite_stops_with_step_and_pairs(tokenizer, pairs):
    model = scoring_model(tokenizer)
    model.score.weight.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"step 0: loss .*; pairs .* of 44"):
        next(train_reward(model, pairs, CONFIG))
    with pytest.raises(ValueError, match="no pairs"):
        next(train_reward(model, [], CONFIG))


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_pairs", 0), ("warmup", 1.0), ("min_warmup", -1),
     ("margin", "huge"), ("auxiliary", -1.0), ("center", -0.1)],
)  # fmt: skip
def test_a_recipe_that_cannot_work_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} '?{value}"):
        replace(CONFIG, **{name: value})


def test_the_papers_recipe():
    for name, lr in (("paper", 1e-5), ("paper-70B", 5e-6)):
        config = REWARD[name]
        assert (config.lr, config.batch_pairs, config.epochs, config.warmup, config.min_warmup, config.final_lr) == (
            lr, 512, 1, 0.03, 5, 0.1,
        )  # fmt: skip
        assert (config.betas, config.eps, config.weight_decay, config.grad_clip) == ((0.9, 0.95), 1e-5, 0.1, 1.0)


# ---- the run


@pytest.fixture(scope="module")
def recipe(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_preferences(folder / "pairs.jsonl", ROWS)
    save_checkpoint(chat_model(tokenizer), folder / "chat", tokenizer)
    return replace(CONFIG, model=str(folder / "chat"), data=folder / "pairs.jsonl", auxiliary=0.5, save_every=2)


def log(out: Path, name: str = "loss") -> list:
    return [json.loads(line)[name] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(recipe, one_thread, tmp_path_factory):
    "A run of one process."
    out = tmp_path_factory.mktemp("alone")
    assert run(replace(recipe, out=out)) == out / "model"
    return out


def test_a_run_is_its_loop_from_the_chat_models_weights(recipe, alone, pairs, tokenizer):
    model = RewardModel.of(load_checkpoint(recipe.model))
    steps = list(train_reward(model, pairs, recipe))
    for name in ("loss", "accuracy", "tokens"):
        assert log(alone, name) == [getattr(step, name) for step in steps]
    saved = load_checkpoint(alone / "model", kind=RewardModel)
    expected = score_pairs(model, tokenizer, ROWS)
    assert np.allclose(score_pairs(saved, tokenizer, ROWS), expected, atol=1e-4) and np.std(expected) > 0.1


def test_a_run_that_was_stopped_ends_as_one_that_was_not(recipe, alone, tmp_path, monkeypatch):
    loop, stop = module.train_reward, len(log(alone)) - 1
    monkeypatch.setattr(module, "train_reward", dies_after(loop, stop))
    with pytest.raises(RuntimeError, match="told to die"):
        run(replace(recipe, out=tmp_path))
    assert 0 < int(StateFolder(tmp_path).latest().name[5:]) < stop == len(log(tmp_path))
    monkeypatch.setattr(module, "train_reward", loop)
    run(replace(recipe, out=tmp_path))
    for name in ("loss", "lr", "tokens", "accuracy"):
        assert log(tmp_path, name) == log(alone, name)
    for file in (alone / "model").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "model" / file.name).read_bytes()


def torchrun(recipe: RewardConfig, out: Path, *options):
    "The command a reader would give."
    options = ["--model", recipe.model, "--data", recipe.data, "--out", out, "--lr", recipe.lr, *options]
    options += ["--batch-pairs", recipe.batch_pairs, "--max-seq-len", recipe.max_seq_len, "--micro-batch", 1]
    options += ["--min-warmup", 0, "--auxiliary", recipe.auxiliary, "--center", recipe.center]
    return conftest.torchrun(*torchrun_arguments("llama2lib.reward", "mini", *options, nproc=2))


@pytest.mark.parametrize("options", [(), ("--tp", 2)], ids=["data parallel", "tensor parallel"])
def test_two_processes_learn_what_one_learns(recipe, tmp_path, options):
    "Seven pairs a step do not divide among two ranks, and the last step has two; passes are of unequal lengths."
    recipe = replace(recipe, batch_pairs=7)
    run(replace(recipe, out=tmp_path / "one"))
    told = torchrun(recipe, tmp_path / "two", *options)
    assert told.count("44 pairs, the longest") == 1
    for name in ("loss", "grad_norm", "accuracy", "tokens"):
        one, two = (log(tmp_path / out, name) for out in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-5 if name == "loss" else 1e-4), name
    assert log(tmp_path / "one")[-1] < log(tmp_path / "one")[0]


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_run_goes_on_from_a_reward_model(recipe, alone, tokenizer, pairs, tmp_path, nproc):
    "Public comparisons first, then one's own (section 3.2.2): the score that was learned is kept."
    again = replace(recipe, model=str(alone / "model"), lr=1e-4)
    if nproc == 1:
        run(replace(again, out=tmp_path))
    else:
        torchrun(again, tmp_path)
    steps = list(train_reward(load_checkpoint(again.model, kind=RewardModel), pairs, again))
    assert log(tmp_path) == pytest.approx([step.loss for step in steps], rel=1e-5)
    assert steps[0].loss < 0.9 * log(alone)[0]
    write_dialogs(tmp_path / "d.jsonl", dialogs())
    with pytest.raises(ValueError, match="expected a language model"):
        sft.run(replace(sft.SFT["mini"], model=again.model, data=tmp_path / "d.jsonl", out=tmp_path / "sft"))


@pytest.mark.parametrize("kind", ["score", "load_scorer", "Hugging Face", "score_pairs"])
def test_an_answer_is_never_cut_in_silence(tokenizer, tmp_path, kind):
    "What exceeds the context is an error that names the conversation; with `cut` it is read up to there."
    model, asked = scoring_model(tokenizer), [{"role": "user", "content": "what is the fox"}]
    long, longer = ([*asked, {"role": "assistant", "content": "yes " * count}] for count in (300, 400))
    if kind == "score_pairs":
        rows = [ROWS[0], ROWS[0] | {"messages": asked, "chosen": longer[-1]["content"]}]
        with pytest.raises(ValueError, match=r"comparison 1: chosen: \d+ tokens with the conversation, more than"):
            score_pairs(model, tokenizer, rows)
        return
    save_checkpoint(model, tmp_path / "model", tokenizer)
    if kind == "Hugging Face":
        pytest.importorskip("transformers")
        (tmp_path / "model" / "tokenizer.model").unlink()
    if kind == "score":
        plain, cutting = (lambda told, cut=cut: score(model, tokenizer, told, cut=cut) for cut in (False, True))
    else:
        plain, cutting = (load_scorer(tmp_path / "model", cut=cut) for cut in (False, True))
    with pytest.raises(ValueError, match=r"dialog 1, 'what is the fox': \d+ tokens with the answer, more than .* 128"):
        plain([dialogs()[0], long])
    with pytest.raises(ValueError, match="dialog 1 ends with the user: expected an answer"):
        cutting([dialogs()[0], asked])
    assert np.equal(*cutting([long, longer])) and plain([dialogs()[0]]) == pytest.approx(cutting([dialogs()[0]]))


def test_a_divided_model_scores_with_its_newest_weights(tokenizer, tmp_path):
    "Two ranks: after a look without gradients the weights change, and the next look sees it."
    save_checkpoint(scoring_model(tokenizer), tmp_path / "model", tokenizer)
    write_preferences(tmp_path / "rows.jsonl", ROWS[:8])
    worker = Path(__file__).with_name("worker.py")
    conftest.torchrun("--standalone", "--nproc-per-node=2", worker, "scored", tmp_path)


def test_bad_rows_stop_with_file_line_and_field(recipe, tokenizer, tmp_path):
    lines = [json.dumps(row) for row in ROWS[:3]]
    bad = json.dumps(ROWS[3] | {"rating": "much better"})
    (tmp_path / "x.jsonl").write_text("\n".join([*lines, bad]) + "\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:4: rating: 'much better' is unknown; expected"):
        read_pairs(tmp_path / "x.jsonl", tokenizer, CONFIG)
    write_preferences(tmp_path / "y.jsonl", ROWS[:3])
    with pytest.raises(ValueError, match=r"y\.jsonl:1: chosen: \d+ tokens"):
        read_pairs(tmp_path / "y.jsonl", tokenizer, replace(CONFIG, max_seq_len=4))
