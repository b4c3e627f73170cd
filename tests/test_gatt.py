"""Ghost Attention: one learned span, the instruction once, a run that can be killed, conversations, attention."""

import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llama2lib import gatt, sft
from llama2lib.chat import Reply
from llama2lib.checkpoint import load_checkpoint
from llama2lib.dialog import encode_dialog, read_dialogs, write_dialogs
from llama2lib.gatt import (
    GATT,
    Context,
    Instruction,
    answered,
    ask_values,
    attention_map,
    attention_mass,
    attention_weights,
    build_gatt_example,
    combined,
    contexts,
    converse,
    joined,
    listed,
    newest_turns,
    obeying,
    read_gatt,
    read_instructions,
    run,
    stage,
)  # fmt: skip
from llama2lib.rollout import Reward
from llama2lib.sft import SFTConfig, pack

pytestmark = pytest.mark.usefixtures("one_thread")

TALK = [
    {"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3"},
    {"role": "user", "content": "4"}, {"role": "assistant", "content": "5 6"},
    {"role": "user", "content": "7"}, {"role": "assistant", "content": "8"},
]  # fmt: skip


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


def test_exactly_one_span_is_learned_and_the_instruction_stands_once(tokenizer):
    for turns in (1, 2, 3):
        dialog = TALK[: 2 * turns]
        tokens, mask = build_gatt_example(tokenizer, dialog, "nine ten")
        spans = np.flatnonzero(np.diff([0, *mask, 0]))
        assert len(spans) == 2 and spans[1] == len(tokens)  # one, and it reaches the end
        learned = tokenizer.decode(tokens[spans[0] :]).strip()
        assert learned == dialog[-1]["content"]
        assert tokens[-1] == tokenizer.eos_id and mask[-1] == 1
        assert tokenizer.decode(tokens).count("nine ten") == 1
        assert tokens == encode_dialog(tokenizer, [{"role": "system", "content": "nine ten"}, *dialog])[0]


def test_earlier_answers_do_not_count(chat, tokenizer):
    "Other targets in the place of an earlier answer change neither loss nor gradients; of the last answer, they do."
    tokens, mask = build_gatt_example(tokenizer, TALK, "nine ten")
    rows = pack([(tokens, mask)], 128)

    def loss(labels):
        targets = torch.where(rows.targets == -100, -100, labels[:, 1 : rows.targets.shape[1] + 1])
        return F.cross_entropy(chat(rows.tokens).flatten(0, 1), targets.flatten(), ignore_index=-100).item()

    labels = F.pad(torch.tensor([tokens]), (0, 129 - len(tokens)))
    first, counted = mask.index(1), encode_dialog(tokenizer, TALK)[1]
    assert sum(counted) > sum(mask)  # chapter 03's rule counts the earlier answers too
    changed, last = labels.clone(), labels.clone()
    changed[0, :first] = 7
    last[0, first] = 7
    assert loss(changed) == loss(labels) != loss(last)


def test_the_instruction_is_joined_to_every_message_of_the_user():
    found = joined([{"role": "system", "content": "s"}, *TALK[:3]], "Say no.")
    assert [message["content"] for message in found] == ["s", "Say no. 1 2", "3", "Say no. 4"]
    assert TALK[0]["content"] == "1 2"  # the conversation itself stays


def test_dialogs_that_cannot_be_examples_are_refused(tokenizer):
    for dialog in ([], TALK[:3], [{"role": "system", "content": "s"}, *TALK[:2]]):
        with pytest.raises(ValueError, match="expected the user first, and an answer at the end"):
            build_gatt_example(tokenizer, dialog, "one")


def test_lists_are_read_as_models_write_them():
    text = "Sure!\n\n1. Tennis\n2) Rock climbing.\n3: **Chess** (a game)"
    assert listed(text) == ["Tennis", "Rock climbing", "Chess"]
    assert listed("- French\n* German: a language\n• Welsh") == ["French", "German", "Welsh"]
    assert listed("Napoleon, Oscar Wilde and Caesar.") == ["Napoleon", "Oscar Wilde", "Caesar"]
    assert listed("Golf\nJudo") == ["Golf", "Judo"] and listed("") == []
    assert listed("1. I am a helpful assistant and cannot do this for you\n2. Yoga") == ["Yoga"]


def test_a_model_is_asked_for_values(monkeypatch):
    "Those named most often come first; a model that knows no list is an error that says what it said."
    said = {"hobbies": ["1. Golf\n2. Chess", "1. chess\n2. Judo"], "languages": ["French, Welsh"] * 2,
            "figures": ["Newton and Caesar"] * 2}  # fmt: skip

    def respond(model, tokenizer, dialogs, *_, num_samples, **__):
        texts = next(texts for name, texts in said.items() if name in dialogs[0][0]["content"])
        return [Reply(text, True) for text in texts[:num_samples]]

    monkeypatch.setattr(gatt, "respond", respond)
    found = ask_values(None, None, 3, tries=2)
    assert found["hobby"][0] == "Chess" and set(found["hobby"]) == {"Chess", "Golf", "Judo"}
    assert found["figure"] == ["Newton", "Caesar"] and len(ask_values(None, None, 2, tries=2)["hobby"]) == 2
    said["languages"] = ["The home of Vic is in Cairo"] * 2
    with pytest.raises(ValueError, match="'language', the model says 'The home of Vic is in Cairo'"):
        ask_values(None, None, 3, tries=2)


def test_constraints_are_combined_at_random():
    values = {"hobby": ["golf"], "language": ["French"], "figure": ["Newton"]}
    drawn = combined(values, 300, seed=0)
    counts = np.bincount([row.short.count(":") for row in drawn])
    assert counts[0] == 0 and len(counts) == 4 and min(counts[1:]) > 50
    assert Instruction("You enjoy golf. Always speak in French.", "Hobby: golf. Language: French.") in drawn
    assert all(row.long.count(".") == row.short.count(":") for row in drawn)
    for wrong in ({"hobby": []}, {"colour": ["red"]}):
        with pytest.raises(ValueError, match="expected some, of hobby, language, figure"):
            combined(wrong, 1, seed=0)


def test_conversations_are_cut_anywhere_and_half_of_the_instructions_are_short(tokenizer):
    instructions = [Instruction("one two three", "one"), Instruction("four five six", "four")]
    cuts = contexts([TALK] * 400, instructions, tokenizer, 500)
    lengths = np.bincount([len(cut.messages) for cut in cuts], minlength=6)
    assert lengths[[0, 2, 4]].sum() == 0 and min(lengths[[1, 3, 5]]) > 90  # each ends with a message of the user
    assert {cut.instruction for cut in cuts} == {"one two three", "four five six"}
    short = np.mean([cut.system in ("one", "four") for cut in cuts])
    assert 0.4 < short < 0.6 and all(cut.system.split()[0] == cut.instruction.split()[0] for cut in cuts)


def test_a_conversation_without_room_loses_its_oldest_turns_and_not_the_instruction(tokenizer):
    instructions = [Instruction("one two three", "one")]
    longest = len(encode_dialog(tokenizer, joined(TALK[:5], "one two three"))[0])
    cuts = contexts([TALK] * 60, instructions, tokenizer, longest - 1)
    assert TALK[2:5] in [cut.messages for cut in cuts] and TALK[:5] not in [cut.messages for cut in cuts]
    for cut in cuts:
        assert len(encode_dialog(tokenizer, joined(cut.messages, cut.instruction))[0]) < longest
    with pytest.raises(ValueError, match="conversation 0: the last message and the instruction exceed 5 tokens"):
        contexts([TALK], instructions, tokenizer, 5)
    with pytest.raises(ValueError, match="conversation 1 has a system message"):
        contexts([TALK, [{"role": "system", "content": "s"}, *TALK]], instructions, tokenizer, 500)


def test_the_best_sample_answers_the_joined_conversation(chat, tokenizer):
    "Sampling sees the instruction on every message; what is kept does not, and a cut without an answer is missing."
    cuts = [Context(TALK[:3], "nine", "ten"), Context(TALK[:1], "eight", "seven")]
    seen = []

    def scorer(dialogs):
        seen.extend(dialogs)
        return np.arange(len(dialogs), dtype=np.float32)

    rows = answered(chat, tokenizer, cuts, Reward(newest_turns(scorer, 0)), 4, 1.0, 1.0, 12, [1, 2])
    assert {cut for cut, _, _ in map(lambda row: (row[0].system, *row[1:]), rows)} <= {"ten", "seven"} and rows
    assert all(m["content"].startswith(("nine ", "eight ")) for d in seen for m in d if m["role"] == "user")
    best_of = {dialog[0]["content"]: dialog[-1]["content"] for dialog in seen}  # the last of each has the highest score
    for cut, text, _ in rows:
        assert text == best_of[f"{cut.instruction} {cut.messages[0]['content']}"]
    assert not answered(chat, tokenizer, cuts, Reward(scorer), 2, 1.0, 1.0, 1, [1, 2])  # nothing ends in one token


def test_earlier_answers_become_those_under_the_instruction(chat, tokenizer, monkeypatch):
    "In the share that is drawn, all of them and nothing else; as many turns as have room."
    cuts = [Context(TALK[: 1 + 2 * (number % 3)], "nine", f"ten {number}") for number in range(60)]
    asked = []

    def respond(model, tokenizer, dialogs, *_, **__):
        asked.extend(dialogs)
        return [Reply(f"seven {len(dialog)}", True) for dialog in dialogs]

    monkeypatch.setattr(gatt, "respond", respond)
    assert obeying(chat, tokenizer, cuts, 0.0, 100, 12, 1.0) == cuts and not asked
    found = obeying(chat, tokenizer, cuts, 0.5, 100, 12, 1.0)
    assert [cut[1:] for cut in found] == [cut[1:] for cut in cuts] and TALK[1]["content"] != "seven 1"
    changed = 0
    for cut, before in zip(found, cuts, strict=True):
        assert cut.messages[::2] == before.messages[::2]
        if cut != before:
            changed += 1
            assert [m["content"] for m in cut.messages[1::2]] == ["seven 1", "seven 3"][: len(cut.messages) // 2]
    assert 12 <= changed <= 28  # of the 40 that have earlier answers
    assert all(m["content"].startswith("nine ") for dialog in asked for m in dialog if m["role"] == "user")
    every = obeying(chat, tokenizer, cuts, 1.0, 100, 12, 1.0)
    whole = len(encode_dialog(tokenizer, joined(every[2].messages, "nine"))[0])
    assert obeying(chat, tokenizer, cuts[2:3], 1.0, whole - 1, 12, 1.0)[0].messages == every[2].messages[2:]


def test_earlier_answers_are_fixed_by_their_seed(chat, tokenizer):
    cuts = [Context(TALK[:5], "nine", "ten"), Context(TALK[:3], "eight", "seven")]
    one, again, other = (obeying(chat, tokenizer, cuts, 1.0, 100, 12, 1.0, seed) for seed in (3, 3, 4))
    assert one == again != other and all(a.messages != b.messages for a, b in zip(one, cuts, strict=True))


def test_the_reward_model_can_be_shown_the_newest_turns():
    shown = []
    newest_turns(shown.extend, 2)([TALK, TALK[:2]])
    assert shown == [TALK[2:], TALK[:2]]
    newest_turns(shown.extend, 0)([TALK])
    assert shown[-1] == TALK


@pytest.fixture
def recipe(folders):
    numbers = "one two three four five six seven eight nine ten".split()
    dialogs = [[user(numbers[n]), answer(numbers[-n]), user(numbers[n + 1]), answer("one")] for n in range(1, 8)]
    write_dialogs(folders / "dialogs.jsonl", dialogs)
    rows = [{"long": "one two", "short": "two"}, {"long": "three four", "short": "four"}]
    (folders / "instructions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(
        GATT["mini"], model=str(folders / "chat"), helpfulness=str(folders / "helpful"),
        dialogs=folders / "dialogs.jsonl", instructions=folders / "instructions.jsonl", out=folders / "gatt", chunk=2,
        max_new_tokens=12, samples=3, temperature=1.0,
        sft=SFTConfig(max_seq_len=100, block_diagonal=True, batch_rows=1, micro_batch=1, lr=1e-3, save_every=2),
    )  # fmt: skip


def test_the_command_makes_data_and_trains_on_the_last_answers(recipe, tokenizer):
    place = run(recipe)
    rows = [json.loads(line) for line in (recipe.out / "gatt.jsonl").open()]
    assert rows and all(row["messages"][0]["role"] == "system" for row in rows)
    assert {row["messages"][0]["content"] for row in rows} <= {"one two", "two", "three four", "four"}
    assert not any("one two" in m["content"] or "three four" in m["content"] for r in rows for m in r["messages"][1:-1])
    examples = read_gatt(recipe.out / "gatt.jsonl", tokenizer)
    lines = [json.loads(line) for line in (recipe.out / "log.jsonl").open()]
    assert len(lines) == len(sft.Batches(examples, replace(recipe.sft, seed=recipe.seed)))
    before, after = load_checkpoint(recipe.model), load_checkpoint(place)
    assert not torch.equal(before.output.weight, after.output.weight)


def test_the_command_samples_a_share_of_the_earlier_answers(recipe, monkeypatch):
    monkeypatch.setattr(gatt, "train", lambda *_: None)
    written = {dialog[0]["content"]: dialog[1]["content"] for dialog in read_dialogs(recipe.dialogs)}
    for share in (0.0, 1.0):
        place = recipe.out.with_name(f"share {share}")
        run(replace(recipe, obeying=share, out=place))
        longer = [dialog for dialog in read_dialogs(place / "gatt.jsonl") if len(dialog) > 3]
        assert longer
        kept = [written[dialog[1]["content"]] == dialog[2]["content"] for dialog in longer]
        assert all(kept) if share == 0 else not any(kept)
    with pytest.raises(ValueError, match=r"obeying 1.5: expected a share"):
        replace(recipe, obeying=1.5)


def test_rehearsal_counts_all_answers(recipe, tmp_path, capsys):
    write_dialogs(tmp_path / "keep.jsonl", [[user("one"), answer("two"), user("three"), answer("four five six")]] * 5)
    run(recipe)
    alone = capsys.readouterr().out
    run(replace(recipe, rehearsal=tmp_path / "keep.jsonl", out=recipe.out.with_name("more")))
    together = capsys.readouterr().out
    count = [int(text.split(" examples with")[0].split()[-1]) for text in (alone, together)]
    assert count[1] == count[0] + 5


def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(recipe):
    "SIGKILL while it samples, and while it trains."
    whole = run(replace(recipe, out=recipe.out.with_name("whole")))
    code = """
import os, pickle, signal, sys
from llama2lib import gatt, sft
recipe, when = pickle.loads(sys.stdin.buffer.read())
inner, count = getattr(gatt, when), [0]
def dying(*args, **kwargs):
    result = inner(*args, **kwargs)
    if when == "sft":
        return killed(result)
    count[0] += 1
    if count[0] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
def killed(steps):
    for step in steps:
        yield step
        if step.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
setattr(gatt, when, dying)
gatt.run(recipe)
"""
    for when in ("answered", "sft"):
        ran = subprocess.run(
            [sys.executable, "-c", code], input=pickle.dumps((recipe, when)), capture_output=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)},
        )  # fmt: skip
        assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()[-2000:]
        assert len(list((recipe.out / "chunks").glob("*.jsonl"))) == (1 if when == "answered" else 4)
    place = run(recipe)
    assert (recipe.out / "gatt.jsonl").read_bytes() == (whole.parent / "gatt.jsonl").read_bytes()
    one, two = (load_checkpoint(folder).state_dict() for folder in (whole, place))
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(ValueError, match="samples 3, now 4"):
        run(replace(recipe, samples=4))


def test_two_processes_end_as_one(recipe, folders):
    import conftest

    from llama2lib.launch import torchrun_arguments

    place = run(recipe)
    options = ["--model", recipe.model, "--helpfulness", recipe.helpfulness, "--dialogs", recipe.dialogs]
    options += ["--instructions", recipe.instructions, "--out", folders / "two", "--chunk", 2, "--max-new-tokens", 12]
    options += ["--samples", 3, "--temperature", 1.0, "--sft.max-seq-len", 100, "--sft.lr", 1e-3, "--sft.save-every", 2]
    told = conftest.torchrun(*torchrun_arguments("llama2lib.gatt", "mini", *options, nproc=2))
    assert told.count("conversations with an answer") == 1
    one, two = (read_dialogs(folder / "gatt.jsonl") for folder in (recipe.out, folders / "two"))
    assert one == two
    one, two = (load_checkpoint(folder).state_dict() for folder in (place, folders / "two" / "model"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


def test_lists_are_asked_for_once(recipe, monkeypatch):
    "What the model listed stays when the run goes on."
    values = {"hobby": ["one"], "language": ["two"], "figure": ["three"]}
    monkeypatch.setattr(gatt, "ask_values", lambda *_: values)
    monkeypatch.setattr(gatt, "train", lambda *_: None)
    run(replace(recipe, instructions=None))
    built = (recipe.out / "instructions.jsonl").read_text()
    assert "You enjoy one." in built and len(read_instructions(recipe.out / "instructions.jsonl")) == 1000
    values["hobby"] = ["four"]
    run(replace(recipe, instructions=None))
    assert (recipe.out / "instructions.jsonl").read_text() == built


def test_bad_files_are_named(recipe, tokenizer, tmp_path):
    for text, told in (
        ("", "no instructions"),
        ('{"long": "a"}\n', r":1: expected an object with two texts, 'long' and 'short'"),
        ('{"long": "a", "short": "b"}\n{"long": "a", "short": " "}\n', ":2: expected an object"),
    ):
        (tmp_path / "i.jsonl").write_text(text)
        with pytest.raises(ValueError, match=told):
            read_instructions(tmp_path / "i.jsonl")
    write_dialogs(tmp_path / "g.jsonl", [TALK])
    with pytest.raises(ValueError, match=r"g\.jsonl:1: the first message is no system message"):
        read_gatt(tmp_path / "g.jsonl", tokenizer)
    write_dialogs(tmp_path / "g.jsonl", [[{"role": "system", "content": "s"}, *TALK]])
    with pytest.raises(ValueError, match=r"g\.jsonl:1: .* do not fit into a row of 20"):
        read_gatt(tmp_path / "g.jsonl", tokenizer, 20)
    for change, told in (
        ({"samples": 0}, "samples 0"), ({"short": 1.5}, "short 1.5"), ({"temperature": 0.0}, "temperature 0.0"),
        ({"judged_turns": -1}, "judged_turns -1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            replace(recipe, **change)


def test_a_stage_of_the_program(recipe, monkeypatch):
    "Behind V3 the stage takes the newest model and reward model, and hands its model on."
    asked = []
    monkeypatch.setattr(gatt, "run", lambda config: asked.append(config) or Path("made"))
    state = {"model": "V3", "helpfulness": "RM", "safety": "other", "versions": ["V1"]}
    found = stage(recipe)(replace(recipe, seed=5), Path("place"), state)
    assert found == state | {"model": "made"}
    assert asked == [replace(recipe, model="V3", helpfulness="RM", out=Path("place"), seed=5)]


def test_conversations_go_on_with_the_instruction_in_its_place(chat, tokenizer):
    questions = [["one", "two", "three"], ["four", "five"]]
    for repeat in (False, True):
        dialogs = converse(chat, tokenizer, questions, ["nine", "ten"], 12, repeat=repeat)
        again = converse(chat, tokenizer, questions[1:], ["ten"], 12, repeat=repeat)
        assert again == dialogs[1:]  # a conversation does not depend on its neighbours
        users = [m["content"] for m in dialogs[0] if m["role"] == "user"]
        assert users == (["nine one", "nine two", "nine three"] if repeat else questions[0])
        assert (dialogs[0][0] == {"role": "system", "content": "nine"}) == (not repeat)
        assert [m["role"] for m in dialogs[0]][-6:] == ["user", "assistant"] * 3
        assert [len(dialog) for dialog in dialogs] == ([6, 4] if repeat else [7, 5])
    assert converse(chat, tokenizer, [], []) == []


def test_a_full_context_loses_turns_and_keeps_the_system_message(chat, tokenizer, monkeypatch):
    asked = []

    def respond(model, tokenizer, dialogs, *_, **__):
        asked.extend(dialogs)
        return [Reply("five six seven", True) for _ in dialogs]

    monkeypatch.setattr(gatt, "respond", respond)
    (dialog,) = converse(chat, tokenizer, [["one two three"] * 20], ["nine ten"], 12)
    room = chat.config.max_seq_len - 12
    assert len(dialog) == 41 and all(d[0] == {"role": "system", "content": "nine ten"} for d in asked)
    sizes = [len(encode_dialog(tokenizer, d)[0]) for d in asked]
    assert max(sizes) <= room and len(asked[-1]) < 41  # the first turns went, and only when they had to
    assert all(before["content"] == "one two three" for before in asked[-1][1::2])
    fits = [len(encode_dialog(tokenizer, dialog[: 2 * n])[0]) <= room for n in range(1, 21)]
    assert [len(d) == 2 * n for n, d in enumerate(asked, 1)] == fits


@pytest.mark.parametrize("shape", ["MHA", "GQA", "MQA"])
def test_attention_weights_are_those_of_the_model(shape):
    "Applied to the values, they give what the model's own attention gives."
    from conftest import random_model

    model, tokens = random_model(shape), [3, 14, 15, 92, 65, 35, 89]
    found, given, made = list(attention_weights(model, tokens)), [], []
    for layer in model.layers:
        layer.attention.register_forward_hook(lambda _, inputs, output: given.append(inputs[0]) or made.append(output))
    with torch.no_grad():
        model(torch.tensor([tokens]))
    assert len(found) == len(model.layers)
    for weights, layer, x, out in zip(found, model.layers, given, made, strict=True):
        attention = layer.attention
        v = attention.wv(x).unflatten(-1, (-1, attention.head_dim))[0].transpose(0, 1)
        v = v.repeat_interleave(len(weights) // len(v), 0)
        read = attention.wo((weights @ v).transpose(0, 1).flatten(-2))
        torch.testing.assert_close(read, out[0], atol=1e-5, rtol=1e-4)
        assert torch.all(weights.triu(1) == 0)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))


def test_maps_and_masses_of_attention():
    from conftest import random_model

    model, tokens = random_model("GQA"), [3, 14, 15, 92, 65, 35, 89]
    layers = torch.stack(list(attention_weights(model, tokens)))  # (L N T T)
    whole = layers.amax((0, 1))
    assert torch.equal(attention_map(model, tokens), whole)
    binned = attention_map(model, tokens, 3)
    assert binned.shape == (3, 3) and binned[1, 0] == whole[3:6, :3].max() and binned[2, 2] == whole[6, 6]
    mass = attention_mass(model, tokens, slice(1, 3))
    assert torch.equal(mass, layers[..., 1:3].sum(-1).amax((0, 1))) and mass[0] == 0 and mass.max() <= 1
    with pytest.raises(ValueError, match="context"):
        attention_map(model, [1] * 200)
    assert not any(layer.attention._forward_pre_hooks for layer in model.layers)
