"""Supervised fine-tuning: what counts in the loss, how rows are filled, and a run that can stop and be divided."""

import json
import math
import random
import sys
from collections import Counter
from dataclasses import replace
from itertools import chain, combinations, islice
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from conftest import dies_after, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2lib import paper
from llama2lib import sft as module
from llama2lib.checkpoint import load_checkpoint, save_checkpoint, save_meta
from llama2lib.dialog import encode_dialog, write_dialogs
from llama2lib.distributed import Parallel, StateFolder
from llama2lib.launch import torchrun_arguments
from llama2lib.optim import adamw, cosine_lr
from llama2lib.sft import (
    IGNORE,
    SFT,
    Batches,
    SFTConfig,
    cli,
    closest_sum,
    fill_rows,
    pack,
    rank_parts,
    read_examples,
    run,
    sft,
)
from llama2lib.tokenizer import train_tokenizer

WORDS = "one two three four five six seven eight nine ten and the fox plus minus is what makes".split()
CONFIG = SFTConfig(lr=3e-3, batch_rows=4, max_seq_len=48, epochs=2, micro_batch=2)


def conversation(random: random.Random) -> list[dict]:
    "One to three turns of random words; questions and answers of very different lengths."
    turns = [" ".join(random.choices(WORDS, k=random.choice((1, 2, 3, 12)))) for _ in range(2 * random.randint(1, 3))]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


DIALOGS = [conversation(random.Random(number)) for number in range(40)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [message["content"] for messages in DIALOGS for message in messages] + ["[INST] [/INST] [INST]\n"] * 99
    return train_tokenizer(texts, 330, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def examples(tokenizer):
    return [encode_dialog(tokenizer, messages) for messages in DIALOGS]


@pytest.fixture(scope="module")
def short(examples):
    "Those that fit into a row of 48."
    return [example for example in examples if len(example[0]) <= 49]


def model_for(tokenizer):
    return random_model(vocab_size=tokenizer.vocab_size)


def learned(examples) -> Counter:
    "(token before, token to learn) of all examples, by how often."
    pairs = Counter()
    for tokens, mask in examples:
        pairs.update((tokens[i - 1], tokens[i]) for i in range(len(tokens)) if mask[i])
    return pairs


def asked_for(rows) -> Counter:
    "The same, read off rows."
    keep = rows.targets != IGNORE
    return Counter(zip(rows.tokens[keep].tolist(), rows.targets[keep].tolist(), strict=True))


examples_of_any_kind = st.lists(
    st.integers(2, 12).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(3, 96), min_size=n, max_size=n),
            st.lists(st.integers(0, 1), min_size=n - 2, max_size=n - 2).map(lambda mask: [0, *mask, 1]),
        )
    ),
    min_size=1,
    max_size=12,
)

# ---------- rows


@settings(deadline=None)
@given(examples=examples_of_any_kind, length=st.integers(1, 20))
def test_concatenation_is_one_stream_in_which_only_masked_tokens_are_targets(examples, length):
    rows = pack(examples, length)
    stream = [token for tokens, _ in examples for token in tokens]
    counts = [m for _, mask in examples for m in mask]
    size = len(stream) - 1
    assert rows.documents is None and rows.tokens.shape == rows.targets.shape == (math.ceil(size / length), length)
    assert rows.tokens.flatten()[:size].tolist() == stream[:-1]
    expected = [stream[i + 1] if counts[i + 1] else IGNORE for i in range(size)]
    assert rows.targets.flatten()[:size].tolist() == expected
    assert rows.targets.flatten()[size:].eq(IGNORE).all()
    assert asked_for(rows) == learned(examples)


@settings(deadline=None)
@given(examples=examples_of_any_kind, length=st.integers(11, 40))
def test_whole_examples_stand_side_by_side_and_only_masked_tokens_are_targets(examples, length):
    rows = pack(examples, length, block_diagonal=True)
    found = []
    for tokens, targets, documents in zip(*(part.tolist() for part in rows), strict=True):
        filled = length - documents.count(-1)
        assert documents[filled:] == [-1] * (length - filled) and targets[filled:] == [IGNORE] * (length - filled)
        assert documents[:filled] == sorted(documents[:filled])
        for document in range(documents[filled - 1] + 1):
            place = [i for i, d in enumerate(documents) if d == document]
            found.append(([tokens[i] for i in place], [targets[i] for i in place]))
    expected = [
        (list(tokens[:-1]), [token if m else IGNORE for token, m in zip(tokens[1:], mask[1:], strict=True)])
        for tokens, mask in examples
    ]
    assert sorted(found) == sorted(expected)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 12), max_size=9), total=st.integers(0, 30))
def test_the_sum_that_comes_closest_is_found(sizes, total):
    chosen = closest_sum(sizes, total)
    assert not Counter(chosen) - Counter(sizes)
    all_sums = {sum(some) for count in range(len(sizes) + 1) for some in combinations(sizes, count)}
    assert sum(chosen) == max(s for s in all_sums if s <= total)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 30), max_size=60), seed=st.integers(0, 9))
def test_rows_hold_everything_and_nothing_would_have_fitted_into_an_earlier_one(sizes, seed):
    rows = fill_rows(sizes, 30)
    assert sorted(number for row in rows for number in row) == list(range(len(sizes)))
    room = 30
    for row in rows:
        assert all(sizes[number] > 30 - room for number in row) or room == 30
        room = min(room, sum(sizes[number] for number in row))
        assert sum(sizes[number] for number in row) <= 30
    mixed = random.Random(seed).sample(sizes, len(sizes))
    assert len(fill_rows(mixed, 30)) == len(rows)  # so that every epoch has as many steps


@pytest.mark.parametrize("block_diagonal", [False, True])
def test_packing_wastes_at_most_a_hundredth_of_conversations_as_short_as_the_mini_worlds(block_diagonal):
    sizes = np.random.default_rng(0).gamma(9, 5, 6000).astype(int) + 10
    packed = pack([(range(n), [0] + [1] * (n - 1)) for n in sizes], 256, block_diagonal)
    empty = (packed.targets == IGNORE).sum() - (0 if block_diagonal else len(sizes) - 1)  # a first token is no target
    assert 0 <= empty / packed.tokens.numel() <= 0.01


@pytest.mark.parametrize("block_diagonal", [False, True])
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (([1, 2, 3], [0, 1]), "3 tokens, and a mask of 2"),
        (([1, 2, 3], [0, 0, 0]), "none of its 3 tokens are an answer's"),
        (([1, 2, 3], [1, 0, 1]), "its first token counts"),
        (([], []), "none of its 0 tokens"),
    ],
)
def test_examples_that_teach_nothing_are_refused_by_number(block_diagonal, wrong, reason):
    good = ([1, 2, 3], [0, 1, 1])
    with pytest.raises(ValueError, match=f"example 1: {reason}"):
        pack([good, wrong, good], 8, block_diagonal)
    with pytest.raises(ValueError, match=f"example 1: {reason}"):  # before the order is shuffled
        Batches([good, wrong, *[good] * 20], replace(CONFIG, block_diagonal=block_diagonal))
    with pytest.raises(ValueError, match="no examples"):
        pack([], 8, block_diagonal)


def test_an_example_longer_than_a_row_is_refused_whole_and_goes_on_in_the_next_row_otherwise():
    examples = [([1, 5], [0, 1]), (list(range(10)), [0] * 4 + [1] * 6)]
    with pytest.raises(ValueError, match="example 1: 10 tokens do not fit into a row of 8"):
        pack(examples, 8, block_diagonal=True)
    assert pack(examples, 9, block_diagonal=True).tokens.shape == (2, 9)  # the last token is only a target
    assert asked_for(pack(examples, 8)) == learned(examples)


# ---------- steps


@pytest.mark.parametrize("block_diagonal", [False, True])
def test_every_epoch_shows_every_example_once_in_another_order(short, block_diagonal):
    config = replace(CONFIG, batch_rows=5, epochs=3, block_diagonal=block_diagonal)
    batches = Batches(short, config)
    assert len(batches) == 3 * math.ceil(batches.rows_per_epoch / 5) and batches.rows_per_epoch % 5
    epochs = []
    for epoch in range(3):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        rows = [batches.rows(step) for step in steps]
        assert [len(r.tokens) for r in rows[:-1]] == [5] * (len(rows) - 1) and 0 < len(rows[-1].tokens) < 5
        assert sum((asked_for(r) for r in rows), Counter()) == learned(short)
        begins = [epoch * batches.rows_per_epoch + 5 * i for i in range(len(rows))]
        assert [batches.rows_before(step) for step in steps] == begins
        epochs.append(torch.cat([r.tokens for r in rows]))
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    again, other = Batches(short, config), Batches(short, replace(config, seed=1))
    late = 2 * batches.steps_per_epoch + 1  # a run that resumes in a later epoch
    assert torch.equal(again.rows(late).tokens, batches.rows(late).tokens)
    assert torch.equal(again.rows(0).tokens, batches.rows(0).tokens)
    assert not torch.equal(other.rows(0).tokens, batches.rows(0).tokens)


def test_rows_of_whole_examples_are_not_in_the_order_of_their_lengths():
    sizes = [40] * 20 + [6] * 160
    batches = Batches([(range(n), [0] + [1] * (n - 1)) for n in sizes], replace(CONFIG, block_diagonal=True))
    long = (batches.packed.documents.max(1).values == 1).tolist()  # 39 + 5 of 48: two documents
    assert sorted(long) != long != sorted(long, reverse=True)


def test_the_summary_counts_what_is_cut(short):
    for block_diagonal, ending in ((True, "all of them whole"), (False, r"go on in the next row")):
        batches = Batches(short, replace(CONFIG, block_diagonal=block_diagonal))
        line = batches.summary()
        assert line.startswith(f"{len(short)} examples with {sum(sum(mask) for _, mask in short)} tokens to learn, ")
        assert f"{batches.rows_per_epoch} rows of 48" in line and line.endswith(ending)
    examples = [([1, 2, 3, 4], [0, 1, 1, 1])] * 4  # rows of 4: the tokens 0-3, 4-7, … each with the next as target
    assert Batches(examples, replace(CONFIG, max_seq_len=4)).summary().endswith("; 0 go on in the next row")
    assert Batches(examples, replace(CONFIG, max_seq_len=5)).summary().endswith("; 2 go on in the next row")


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 1), (1, 3), (2, 2), (3, 1), (5, 4)])
def test_ranks_have_the_rows_between_them_and_as_many_passes(short, ranks, micro_batch):
    for block_diagonal in (False, True):
        rows = Batches(short, replace(CONFIG, batch_rows=7, block_diagonal=block_diagonal)).rows(0)
        share = math.ceil(7 / ranks)
        parts = [rank_parts(rows, share, rank, micro_batch) for rank in range(ranks)]
        assert {len(p) for p in parts} == {math.ceil(share / micro_batch)}
        kinds = [torch.cat(kind) for kind in zip(*chain(*parts), strict=True)]
        assert len(kinds) == 2 + block_diagonal
        for kind, whole, filling in zip(kinds, rows, (0, IGNORE, -1), strict=False):
            assert len(kind) == share * ranks and torch.equal(kind[:7], whole) and kind[7:].eq(filling).all()


@torch.no_grad()
def mean_loss_of_answers(model, stream: list[int], counts: list[int], rows: range, length: int) -> float:
    "By hand: of some rows of a stream, nats per token that counts."
    total, number = 0.0, 0
    for row in rows:
        tokens, place = stream[row * length : (row + 1) * length], row * length
        logs = model(torch.tensor([tokens]))[0].log_softmax(-1)
        for i in range(len(tokens)):
            if place + i + 1 < len(stream) and counts[place + i + 1]:
                total, number = total - logs[i, stream[place + i + 1]].item(), number + 1
    return total / number


def test_the_loss_is_the_mean_over_answer_tokens_of_the_whole_step(tokenizer, examples):
    "An independent reading of tokens and masks, from the conversations on; a learning rate of 0 keeps the weights."
    stream, counts = [], []
    from llama2lib.shards import shuffled

    for i in shuffled(np.arange(len(DIALOGS)), len(DIALOGS), (CONFIG.seed, 0)):
        for user, answer in zip(DIALOGS[i][::2], DIALOGS[i][1::2], strict=True):
            prompt = [1, *tokenizer.encode(f"[INST] {user['content']} [/INST]")]
            pair = [1, *tokenizer.encode(f"[INST] {user['content']} [/INST] {answer['content']} "), 2]
            stream, counts = stream + pair, counts + [0] * len(prompt) + [1] * (len(pair) - len(prompt))
    model = model_for(tokenizer)
    steps = list(sft(model, examples, replace(CONFIG, lr=0.0, weight_decay=0.0, epochs=1)))
    rows = math.ceil((len(stream) - 1) / 48)
    assert len(steps) == math.ceil(rows / 4) and [s.tokens for s in steps] == [
        48 * min(4 * (i + 1), rows) for i in range(len(steps))
    ]
    for step in steps:
        expected = mean_loss_of_answers(model, stream, counts, range(rows)[4 * step.step : 4 * step.step + 4], 48)
        assert step.loss == pytest.approx(expected, rel=1e-5)


def test_accumulation_does_not_change_the_training(tokenizer, examples):
    "Micro-batches with very different numbers of targets: their sums count, not their means."
    runs = []
    for micro_batch in (4, 3, 1):
        model = model_for(tokenizer)
        for parameter in model.parameters() if runs else ():
            parameter.grad = torch.ones_like(parameter)  # left over by somebody else
        runs.append(([s.loss for s in sft(model, examples, replace(CONFIG, micro_batch=micro_batch))], model))
    for losses, model in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-5)
        for a, b in zip(model.parameters(), runs[0][1].parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-4)


def test_the_schedule_is_the_recipes(tokenizer, examples):
    config = replace(CONFIG, warmup=0.2, final_lr=0.3)
    steps = list(sft(model_for(tokenizer), examples, config))
    count = len(steps)
    assert [s.lr for s in steps] == [cosine_lr(i, 3e-3, round(0.2 * count), count, 0.3) for i in range(count)]
    assert steps[-1].lr == pytest.approx(0.9e-3) and [s.step for s in steps] == list(range(count))
    assert steps[-1].loss < steps[0].loss - 0.5


def test_a_step_without_targets_is_no_number_over_nothing():
    model = random_model()
    examples = [([1, *[7] * 98, 9], [0] * 99 + [1])]
    losses = [s.loss for s in sft(model, examples, replace(CONFIG, max_seq_len=10, batch_rows=1, epochs=1))]
    assert losses[:-1] == [0.0] * 9 and losses[-1] > 0
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_loss_that_is_not_finite_names_the_step_and_its_rows(tokenizer, examples):
    model = model_for(tokenizer)
    loop = sft(model, examples, CONFIG)
    next(loop)
    with torch.no_grad():
        model.output.weight[3, 0] = torch.inf
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match=r"step 1: .*; rows 4 to 7, of .* in an epoch"):
        next(loop)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_later_start_goes_on_where_an_earlier_part_stopped(tokenizer, examples):
    whole, parts = model_for(tokenizer), model_for(tokenizer)
    expected = list(sft(whole, examples, CONFIG))
    optimizer = adamw(parts, CONFIG.lr, CONFIG.betas, CONFIG.eps, CONFIG.weight_decay)
    stop = len(expected) // 2 + 2  # in the second epoch
    first = list(islice(sft(parts, examples, CONFIG, optimizer), stop))
    assert first + list(sft(parts, examples, CONFIG, optimizer, start=stop)) == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


# ---------- runs


@pytest.fixture(scope="module")
def recipe(tokenizer, tmp_path_factory) -> SFTConfig:
    "A pretrained folder and a file of conversations."
    folder = tmp_path_factory.mktemp("sft")
    save_checkpoint(model_for(tokenizer), folder / "base", tokenizer)
    write_dialogs(folder / "dialogs.jsonl", DIALOGS)
    return replace(CONFIG, model=str(folder / "base"), data=folder / "dialogs.jsonl", batch_rows=7, save_every=3)


def log(folder: Path, what: str = "loss") -> list[float]:
    return [json.loads(line)[what] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(recipe, one_thread, tmp_path_factory) -> Path:
    "A run of one process."
    out = tmp_path_factory.mktemp("alone")
    assert run(replace(recipe, out=out)) == out / "model"
    return out


def test_a_run_is_its_loop_from_the_weights_of_the_folder(recipe, alone, examples, tokenizer):
    model = load_checkpoint(recipe.model)
    steps = list(sft(model, examples, recipe))
    assert log(alone) == [s.loss for s in steps] and log(alone, "step") == [*range(len(steps))]
    saved = dict(load_checkpoint(alone / "model").named_parameters())
    assert all(torch.allclose(p, saved[name], atol=1e-6) for name, p in model.named_parameters())
    assert (alone / "model" / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes()


def test_a_run_begins_with_metas_layout_too_and_a_tokenizer_that_lies_elsewhere(recipe, alone, tokenizer, tmp_path):
    save_meta(load_checkpoint(recipe.model), tmp_path / "meta", shards=2)
    meta = replace(recipe, model=str(tmp_path / "meta"), tokenizer=tokenizer.path, epochs=1, out=tmp_path / "out")
    run(meta)
    assert log(tmp_path / "out")[0] == pytest.approx(log(alone)[0], rel=1e-6)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(recipe, alone, tmp_path, monkeypatch):
    loop, stop = module.sft, len(log(alone)) - 2
    monkeypatch.setattr(module, "sft", dies_after(loop, stop))
    with pytest.raises(RuntimeError, match="told to die"):
        run(replace(recipe, out=tmp_path))
    assert 0 < int(StateFolder(tmp_path).latest().name[5:]) < stop == len(log(tmp_path))
    monkeypatch.setattr(module, "sft", loop)
    run(replace(recipe, out=tmp_path))
    assert log(tmp_path) == log(alone) and log(tmp_path, "lr") == log(alone, "lr")
    for file in (alone / "model").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "model" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("change", "named"),
    [({"lr": 1.0}, "lr"), ({"data": "other"}, "data digest"), ({"epochs": 3}, "epochs"), ({"seed": 1}, "seed")],
)
def test_a_run_of_another_recipe_or_other_data_is_not_continued(recipe, alone, tmp_path, change, named):
    if "data" in change:
        write_dialogs(tmp_path / "other.jsonl", DIALOGS[1:])
        change = {"data": tmp_path / "other.jsonl"}
    with pytest.raises(ValueError, match=f"another configuration .*{named}"):
        run(replace(recipe, out=alone, **change))


def torchrun(recipe: SFTConfig, out: Path, *options, nproc: int = 2):
    "The command a reader would give."
    options = ["--model", recipe.model, "--data", recipe.data, "--out", out, "--lr", recipe.lr, *options]
    options += ["--batch-rows", recipe.batch_rows, "--max-seq-len", recipe.max_seq_len, "--micro-batch", 1]
    options += ["--block-diagonal" if recipe.block_diagonal else "--no-block-diagonal"]
    return conftest.torchrun(*torchrun_arguments("llama2lib.sft", "mini", *options, nproc=nproc))


def test_two_processes_learn_what_one_learns(recipe, alone, tmp_path):
    "Seven rows on two ranks: they have different numbers of answer tokens, and one has a row less."
    told = torchrun(recipe, tmp_path)
    assert told.count("40 examples with") == 1
    assert log(alone)[-1] < log(alone)[0] - 0.5
    assert log(tmp_path) == pytest.approx(log(alone), rel=1e-5)
    assert log(tmp_path, "grad_norm") == pytest.approx(log(alone, "grad_norm"), rel=1e-5)
    saved = dict(load_checkpoint(tmp_path / "model").named_parameters())
    for name, weight in load_checkpoint(alone / "model").named_parameters():
        assert torch.allclose(weight, saved[name], atol=1e-5), name


def test_a_conversation_without_a_last_answer_or_too_long_is_refused_with_its_line(tokenizer, tmp_path):
    path = tmp_path / "d.jsonl"
    write_dialogs(path, [DIALOGS[0], DIALOGS[1] + DIALOGS[1][:1]])
    with pytest.raises(ValueError, match=r"d\.jsonl:2: message \d: a user's comes last"):
        read_examples(path, tokenizer)
    long = [{"role": "user", "content": "one " * 99}, {"role": "assistant", "content": "two"}]
    write_dialogs(path, [DIALOGS[0], long])
    assert len(read_examples(path, tokenizer)) == 2
    with pytest.raises(ValueError, match=r"d\.jsonl:2: \d+ tokens do not fit into a row of 100"):
        read_examples(path, tokenizer, 100)


def test_an_empty_answer_teaches_to_say_nothing(tokenizer, tmp_path):
    write_dialogs(tmp_path / "d.jsonl", [[{"role": "user", "content": "one"}, {"role": "assistant", "content": " \n"}]])
    ((tokens, mask),) = read_examples(tmp_path / "d.jsonl", tokenizer)
    assert mask[-1] == 1 and tokens[-1] == tokenizer.eos_id
    assert tokenizer.decode([1, *(t for t, m in zip(tokens, mask, strict=True) if m)]).strip() == ""


def test_the_command_says_what_is_wrong_in_one_line(recipe, tmp_path, monkeypatch):
    for arguments, reason in (
        (["--data", str(tmp_path / "none.jsonl"), "--model", recipe.model], "FileNotFoundError.*none.jsonl"),
        (["--data", str(recipe.data), "--model", str(tmp_path)], "tokenizer.model: expected a SentencePiece"),
    ):
        monkeypatch.setattr(sys, "argv", ["sft", "mini", *arguments, "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit, match=reason):
            cli()


@pytest.mark.parametrize(
    "wrong",
    [
        dict(batch_rows=0),
        dict(epochs=0),
        dict(max_seq_len=0),
        dict(micro_batch=0),
        dict(warmup=1.0),
        dict(warmup=-0.1),
        dict(max_seq_len=31, parallel=Parallel(tp=2)),
        dict(parallel=Parallel(tp=0)),
    ],
)
def test_recipes_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        replace(CONFIG, **wrong)


def test_the_papers_recipe():
    constants, config = paper.TEXT["Section 3.1"], SFT["paper"]
    assert (config.lr, config.weight_decay, config.epochs) == (2e-5, 0.1, 2) and not config.block_diagonal
    assert (config.batch_rows, config.max_seq_len) == (constants["batch_size"], constants["max_seq_len"]) == (64, 4096)


# ---------- documents that share a row


def test_a_packed_conversation_has_the_logits_it_has_alone_and_a_leak_changes_them(tokenizer, short):
    model, rows = model_for(tokenizer), pack(short, 48, block_diagonal=True)
    alone = {tuple(tokens[:-1]): model(torch.tensor([tokens[:-1]]))[0] for tokens, _ in short}
    apart, leaking = model(rows.tokens, documents=rows.documents), model(rows.tokens)
    checked = 0
    for row, documents in enumerate(rows.documents):
        for document in range(int(documents.max()) + 1):
            place = documents == document
            expected = alone[tuple(rows.tokens[row, place].tolist())]
            assert torch.allclose(apart[row, place], expected, atol=1e-4)
            assert torch.allclose(leaking[row, place], expected, atol=1e-4) == (document == 0)
            checked += 1
    assert checked == len(short) > len(rows.tokens)


def test_the_loss_of_whole_conversations_is_that_of_each_alone(tokenizer, short):
    "Mean over the answer tokens of an epoch of one step, with a learning rate of 0."
    model = model_for(tokenizer)
    config = replace(CONFIG, lr=0.0, weight_decay=0.0, epochs=1, batch_rows=99, block_diagonal=True)
    ((_, loss, *_),) = sft(model, short, config)
    alone = [
        -model(torch.tensor([tokens]))[0].log_softmax(-1)[i - 1, tokens[i]].item()
        for tokens, mask in short
        for i in range(len(tokens))
        if mask[i]
    ]
    assert loss == pytest.approx(sum(alone) / len(alone), rel=1e-5)


@pytest.mark.parametrize("parallel", [[], ["--tp", 2]])
def test_two_processes_learn_what_one_learns_from_whole_conversations(recipe, tmp_path, parallel):
    write_dialogs(tmp_path / "short.jsonl", [messages for messages in DIALOGS if len(messages) == 2])
    recipe = replace(recipe, data=tmp_path / "short.jsonl", max_seq_len=64, block_diagonal=True, out=tmp_path / "one")
    run(recipe)
    torchrun(recipe, tmp_path / "two", "--block-diagonal", *parallel)
    assert log(tmp_path / "two") == pytest.approx(log(tmp_path / "one"), rel=1e-5)
