"""The iterated program: stages in order, a program that can be killed at any time, people and simulated annotators."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tyro
from conftest import NUMBER_PROMPTS

from llama2lib import pairs, ppo, rejection, reward, rlhf, sft
from llama2lib.checkpoint import save_checkpoint
from llama2lib.desk import Desk, unblind
from llama2lib.judge import read_task
from llama2lib.preferences import comparison, read_preferences, write_preferences
from llama2lib.rejection import read_best
from llama2lib.rlhf import RLHF, STAGES, VALUES, RLHFConfig, flags, judged, measure, run
from llama2lib.rollout import read_prompts, write_prompts
from llama2lib.synthetic import answer, prompts

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = replace(
    RLHF["mini"], batch=12, best=6,
    versions=("collect reward reject tune", "collect reward bag tune ppo"),
    pairs=replace(pairs.PAIRS["mini"], max_new_tokens=12, chunk=4, temperatures=(1.0,)),
    reward=replace(reward.REWARD["mini"], batch_pairs=2, max_seq_len=64, save_every=2),
    rejection=replace(
        rejection.REJECTION["mini"], samples=2, max_new_tokens=12, chunk=2, temperatures=(0.9, 1.1), tune=2
    ),
    sft=replace(sft.SFT["mini"], max_seq_len=64, batch_rows=1, save_every=2),
    ppo=replace(ppo.PPO["mini"], iterations=3, batch=4, minibatch=2, max_new_tokens=12, save_every=1, every=2),
)  # fmt: skip


def by_length(items, value, _, source):
    "Annotators who like long answers; both are safe."
    rows = []
    for item in items:
        first, second = item["answers"]
        rows.append(comparison(item["messages"], item["answers"], int(len(second) > len(first)), source))
        rows[-1] |= {"rating": "better", "safety": "both_safe" if value == "safety" else None}
    return rows


def simulate(patch: pytest.MonkeyPatch):
    "Annotators and gold scores for conversations that are not of the mini world."
    patch.setattr(rlhf, "judged", by_length)
    patch.setattr(rlhf, "scores", lambda dialogs, _: np.zeros((len(dialogs), 2)))


@pytest.fixture
def simulated(monkeypatch):
    simulate(monkeypatch)


def small_program(place: Path, chat, tokenizer) -> RLHFConfig:
    "SMALL, with its files in a folder."
    save_checkpoint(chat, place / "chat", tokenizer)
    write_prompts(place / "prompts.jsonl", NUMBER_PROMPTS)
    write_prompts(place / "held-out.jsonl", NUMBER_PROMPTS[:4])
    return replace(
        SMALL, model=str(place / "chat"), prompts=place / "prompts.jsonl", held_out=place / "held-out.jsonl",
        out=place / "program",
    )  # fmt: skip


@pytest.fixture
def config(chat, tokenizer, tmp_path):
    return small_program(tmp_path, chat, tokenizer)


def contents(folder: Path) -> dict:
    "What a program made: weights and data by name, without names of folders or times."
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".jsonl") and "step-" not in str(p))
    found = {str(p.relative_to(folder)): p.read_bytes() for p in files if p.name != "log.jsonl"}
    return found | {str(p.relative_to(folder)): json.loads(p.read_text()) for p in folder.rglob("metrics.json")}


@pytest.fixture(scope="module")
def done(chat, tokenizer, tmp_path_factory):
    "A program of SMALL that nobody killed, and what it made."
    config = small_program(tmp_path_factory.mktemp("program"), chat, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        simulate(patch)
        run(config)
    return config, contents(config.out)


def main(kept: str, stage: str, write: str):
    "A program that is killed at its n-th write to disk in a stage of V2."
    config = pickle.loads(Path(kept).read_bytes())
    simulate(pytest.MonkeyPatch())
    work, left, put = STAGES[stage], [int(write)], os.replace

    def replacing(*args):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return put(*args)

    def dying(config, folder, state):
        if "V2" in str(folder):
            os.replace = replacing
        return work(config, folder, state)

    STAGES[stage] = dying
    run(config)


@pytest.mark.parametrize(("stage", "write"), [("collect", 4), ("reward", 8), ("bag", 5), ("tune", 5), ("ppo", 7)])
def test_a_killed_program_goes_on_where_it_was(done, simulated, stage, write):
    "Versions and finished stages stay as they are, to the last bit, and the end is that of a program nobody killed."
    config, whole = done
    names = SMALL.versions[1].split()
    for place, name in enumerate(names, 1):  # as if this stage were to come
        if place > names.index(stage):
            shutil.rmtree(config.out / "V2" / f"{place}-{name}")
    for name in ("answers.jsonl", "metrics.json"):
        (config.out / "V2" / name).unlink()
    kept = config.out.with_name("config")
    kept.write_bytes(pickle.dumps(config))
    command, one = [sys.executable, __file__, kept, stage, str(write)], {"OMP_NUM_THREADS": "1"}
    died = subprocess.run(command, capture_output=True, text=True, env=os.environ | one)
    assert died.returncode == -signal.SIGKILL, died.stderr[-3000:]
    finished = [p.parent for p in config.out.glob("V*/*/done.json")]
    assert len(finished) == 4 + names.index(stage)
    written = {p: p.stat().st_mtime_ns for folder in finished for p in folder.rglob("*.*")}
    run(config)
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    found = contents(config.out)
    assert found.keys() == whole.keys()
    assert [name for name in found if found[name] != whole[name]] == []


def test_stages_work_on_what_earlier_stages_made(done):
    config, _ = done
    out = config.out
    state = json.loads((out / "V2" / "5-ppo" / "done.json").read_text())
    first = str(out / "V1" / "4-tune" / "model")
    assert state["versions"] == [first] and state["model"] == str(out / "V2" / "5-ppo" / "model")

    def settings(folder):
        return json.loads((out / folder / "settings.json").read_text())

    assert settings("V1/1-collect/answers")["models"] == [config.model]
    assert settings("V2/1-collect/answers")["models"] == [first, config.model]  # two variants
    assert settings("V1/3-reject")["model"] == config.model and settings("V2/3-bag")["model"] == first
    assert settings("V1/3-reject")["earlier"] == []
    digest = hashlib.sha256((out / "V1" / "3-reject" / "best.jsonl").read_bytes()).hexdigest()
    assert settings("V2/3-bag")["earlier"] == [digest]
    assert settings("V2/3-bag")["helpfulness"] == str(out / "V2" / "2-reward" / "helpfulness" / "model")
    old, new = (read_preferences(out / f"V{n}" / "2-reward" / "safety.jsonl") for n in (1, 2))
    assert {row["source"] for row in old} == {"batch 1"} and {row["source"] for row in new} == {"batch 1", "batch 2"}
    assert len(read_best(out / "V2/3-bag/best.jsonl")) > 3
    asked = [read_prompts(out / f"V{n}" / "1-collect" / "prompts.jsonl") for n in (1, 2)]
    assert len(asked[0]) == 12 and asked[0] != asked[1]
    metrics = json.loads((out / "V2" / "metrics.json").read_text())
    assert list(metrics) == ["V0", "V1", "V2"] and metrics["V0"]["helpfulness"] is not None


def test_a_program_can_be_given_further_versions_but_no_other_settings(config, simulated):
    short = replace(config, versions=config.versions[:1])
    folder = run(short)
    made = contents(config.out)
    with pytest.raises(ValueError, match="batch 12, now 13"):
        run(replace(short, batch=13))
    kept = config.held_out.read_bytes()
    write_prompts(config.held_out, NUMBER_PROMPTS[:3])
    with pytest.raises(ValueError, match="held_out"):
        run(short)
    config.held_out.write_bytes(kept)
    with pytest.raises(ValueError, match="versions"):
        run(replace(short, versions=("collect reward",)))
    assert run(replace(short, versions=(*short.versions, "collect"))) == folder  # a version of the same model
    assert made.items() <= contents(config.out).items()
    assert run(short) == folder
    with pytest.raises(ValueError, match="versions"):  # the shorter one did not make it forget
        run(replace(short, versions=(*short.versions, "reject")))


def test_every_fine_tuning_can_begin_with_the_base_model(config, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(rlhf, "call", lambda config, module, recipe: seen.append(recipe) or Path("made"))
    state = {"model": "newest", "best": ["older", "newest.jsonl"]}
    assert STAGES["tune"](config, tmp_path, state)["model"] == "made"
    STAGES["tune"](replace(config, base="base"), tmp_path, state)
    assert [(recipe.model, str(recipe.data)) for recipe in seen] == [
        ("newest", "newest.jsonl"), ("base", "newest.jsonl")
    ]  # fmt: skip


@pytest.mark.parametrize(("public", "mixed"), [(False, True), (True, True), (True, False), (False, False)])
def test_reward_models_begin_anew(done, config, monkeypatch, tmp_path, public, mixed):
    "With the newest version; for helpfulness, with one model of public comparisons, which stay in the mixture."
    seen = []
    monkeypatch.setattr(rlhf, "call", lambda config, module, recipe: seen.append(recipe) or Path("made"))
    batches = [str(done[0].out / "V1" / "1-collect")]
    rows = [row | {"source": "public"} for row in read_preferences(Path(batches[0]) / "helpfulness.jsonl")]
    write_preferences(tmp_path / "public.jsonl", rows)
    config = replace(config, public=tmp_path / "public.jsonl" if public else None, mixed=mixed, renew=0.0)
    state = {"model": "newest", "batches": batches}
    for _ in range(2):
        state = STAGES["reward"](config, tmp_path, state)
    begun = [(recipe.model, recipe.out.name) for recipe in seen]
    again = [("made" if public else "newest", "helpfulness"), ("newest", "safety")]
    assert begun == [(config.model, "public")] * public + again * 2
    mixture = read_preferences(tmp_path / "helpfulness.jsonl")
    assert any(row["source"] == "public" for row in mixture) == public
    assert any(row["safety"] for row in mixture) == mixed


def test_reward_models_can_go_on_with_the_newest_comparisons(done, config, monkeypatch, tmp_path):
    "They learn from all new ones and as many others, of older batches and of public ones; anew at first."
    seen = []
    monkeypatch.setattr(rlhf, "call", lambda config, module, recipe: seen.append(recipe) or recipe.out / "model")
    batches = [str(done[0].out / "V1" / "1-collect"), str(tmp_path / "second"), str(tmp_path / "third")]
    first = {value: read_preferences(Path(batches[0]) / f"{value}.jsonl") for value in VALUES}
    for batch in batches[1:]:
        for value, rows in first.items():
            write_preferences(Path(batch) / f"{value}.jsonl", [row | {"source": Path(batch).name} for row in rows])
    write_preferences(tmp_path / "public.jsonl", [row | {"source": "public"} for row in first["helpfulness"]])
    config = replace(config, public=tmp_path / "public.jsonl", mixed=False, renew=0.25)
    state = STAGES["reward"](config, tmp_path / "1", {"model": "V0", "batches": batches[:1]})
    state = STAGES["reward"](config, tmp_path / "2", state | {"model": "V1", "batches": batches})
    begun = [recipe.model for recipe in seen]
    made = [str(tmp_path / "1" / name / "model") for name in ("public", *VALUES)]
    assert begun == [config.model, made[0], "V0", *made[1:]]
    assert [recipe.lr / config.reward.lr for recipe in seen] == [1, 1, 1, 0.25, 0.25]
    for value, rows in first.items():
        count = Counter(row["source"] for row in read_preferences(tmp_path / "2" / f"{value}.jsonl"))
        assert count["second"] == len(rows)
        older = count["batch 1"] + count["public"]
        assert 0 < older <= 2 * len(rows) and (older == 2 * len(rows) or value == "safety")
    with pytest.raises(ValueError, match="put 'collect' in front"):
        STAGES["reward"](config, tmp_path / "3", state)


def test_a_program_can_begin_with_comparisons(done, config, simulated, tmp_path):
    "They are its first batch, and other ones are another program's."
    (tmp_path / "earlier").mkdir()
    for value in VALUES:
        shutil.copy(done[0].out / "V1" / "1-collect" / f"{value}.jsonl", tmp_path / "earlier")
    config = replace(config, comparisons=tmp_path / "earlier", versions=("reward",))
    run(config)
    state = json.loads((config.out / "V1" / "1-reward" / "done.json").read_text())
    assert state["batches"] == [str(tmp_path / "earlier")] and state["learned"] == 1
    changed = tmp_path / "earlier" / "safety.jsonl"
    write_preferences(changed, read_preferences(changed)[1:])
    with pytest.raises(ValueError, match="safety comparisons"):
        run(config)


@pytest.mark.parametrize(("model", "versions", "variants"), [
    ("V0", [], ["V0"]),
    ("V2", ["V1", "V2"], ["V2", "V1"]),
    ("V3 tuned", ["V1", "V2"], ["V3 tuned", "V2"]),  # in the middle of a version
    ("V1", ["V1", "V1"], ["V1", "V0"]),  # a version that only collected
])  # fmt: skip
def test_the_newest_two_models_are_compared(config, monkeypatch, tmp_path, model, versions, variants):
    def call(_, module, recipe):
        assert list(recipe.models) == variants
        raise RuntimeError("seen")

    monkeypatch.setattr(rlhf, "call", call)
    state = {"model": model, "versions": versions, "batches": [], "best": []}
    with pytest.raises(RuntimeError, match="seen"):
        STAGES["collect"](replace(config, model="V0"), tmp_path, state)


def test_stages_in_an_order_that_cannot_work_are_refused(config, simulated):
    for versions, told in (
        (("reward",), "put 'collect' in front"), (("reject",), "put 'reward' in front"),
        (("ppo",), "put 'reward' in front"), (("tune",), "put 'reject' in front"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            run(replace(config, versions=versions, out=config.out / versions[0]))
    with pytest.raises(ValueError, match=r"V2: 'rejct' is no stage of collect.*did you mean 'reject'"):
        replace(config, versions=("collect", "collect rejct"))
    with pytest.raises(ValueError, match="batch 0"):
        replace(config, batch=0)


def test_prompts_without_tags_are_refused(config, simulated):
    config.prompts.write_text('{"messages": [{"role": "user", "content": "one"}]}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl:1: is_safety: found None"):
        run(config)
    write_prompts(config.prompts, [prompt for prompt in NUMBER_PROMPTS if not prompt.is_safety])
    with pytest.raises(ValueError, match=r"another configuration \(prompts"):
        run(config)
    with pytest.raises(ValueError, match="no two answers to compare for safety"):
        run(replace(config, out=config.out.with_name("other")))


def test_people_annotate_and_the_program_goes_on(config, simulated):
    people = replace(config, annotator="people", versions=("collect reward",))
    with pytest.raises(SystemExit, match=r"To be annotated .*helpfulness.sqlite, .*safety.sqlite"):
        run(people)
    folder = config.out / "V1" / "1-collect"
    for value in VALUES:
        desk = Desk(folder / f"{value}.sqlite")
        while task := desk.next_task("ann"):
            desk.submit(task, unblind(task, 0, (True, True) if value == "safety" else None))  # the left one, always
    run(people)
    for value, safety in (("helpfulness", None), ("safety", "both_safe")):
        rows = read_preferences(folder / f"{value}.jsonl")
        assert {(row["rating"], row["safety"], row["source"]) for row in rows} == {
            ("significantly better", safety, "batch 1")
        }
    metrics = json.loads((config.out / "V1" / "metrics.json").read_text())
    assert "gold helpfulness" not in metrics["V0"]


def test_simulated_annotators_judge_the_two_answers():
    "They prefer what the judge of the mini world does, and both of its values can be asked for."
    random = np.random.default_rng(0)
    asked = [messages for messages in prompts(random, 200, "train") if read_task(messages).kind != "story"][:40]
    items = [{"messages": m, "answers": [answer(random, read_task(m), q) for q in ("wrong", "full")]} for m in asked]
    rows = judged(items, "helpfulness", 0, "batch 7")
    assert len(rows) > 30 and {(row["safety"], row["source"]) for row in rows} == {(None, "batch 7")}
    by_prompt = {json.dumps(item["messages"]): item["answers"] for item in items}
    good = [by_prompt[json.dumps(row["messages"])] == [row["rejected"], row["chosen"]] for row in rows]
    assert np.mean(good) > 0.9
    assert {row["safety"] for row in judged(items, "safety", 0, "")} == {"both_safe"}


def test_metrics_are_means_over_the_prompts_of_their_value(config, monkeypatch):
    config.out.joinpath("V0").mkdir(parents=True)
    said = [{"answer": "x" * n * n, "finished": n > 1} for n in range(4)]
    rows = [prompt._asdict() | answer for prompt, answer in zip(NUMBER_PROMPTS, said, strict=False)]
    (config.out / "V0" / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load(factor, _, cut):
        assert cut  # an answer that did not end may fill the context
        return lambda dialogs: int(factor) * np.array([len(messages[-1]["content"]) for messages in dialogs])

    monkeypatch.setattr(rlhf, "load_scorer", load)
    monkeypatch.setattr(rlhf, "scores", lambda _, replies: np.array([(len(text), end) for text, end in replies]))
    measure(config, 0, {"versions": [], "helpfulness": "1", "safety": "10"})
    assert json.loads((config.out / "V0" / "metrics.json").read_text())["V0"] == {
        "finished": 0.5, "helpfulness": 2.5, "safety": 45.0, "gold helpfulness": 2.5, "gold safety": 0.5,
    }  # fmt: skip


def test_a_launcher_starts_the_commands_with_all_their_options(config, simulated, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = replace(config, versions=("collect reward reject tune ppo",))
    run(replace(config, out=config.out.with_name("here")))
    run(replace(config, launcher=sys.executable))
    here, there = contents(config.out.with_name("here")), contents(config.out)
    assert here.keys() == there.keys() and [name for name in here if here[name] != there[name]] == []
    with pytest.raises(RuntimeError, match=r"llama2lib\.pairs failed"):
        run(replace(config, launcher=sys.executable, out=config.out.with_name("bad"), model="nowhere"))


@pytest.mark.parametrize("module", [pairs, reward, rejection, sft, ppo])
def test_options_of_a_command_line_give_back_the_recipe(module):
    known = next(x for n, x in vars(module).items() if n.isupper() and isinstance(x, dict) and "paper" in x)
    for recipe in known.values():
        recipes = {"paper": ("", known["paper"])}
        settings = dict(args=["paper", *flags(recipe)], config=(tyro.conf.OmitArgPrefixes,))
        assert tyro.extras.overridable_config_cli(recipes, **settings) == recipe


def test_the_command_line_reaches_into_the_recipes_of_stages():
    ran = subprocess.run([sys.executable, "-m", "llama2lib.rlhf", "paper", "--help"], capture_output=True, text=True)
    assert ran.returncode == 0 and "--ppo.beta" in ran.stdout and "--sft.parallel.tp" in ran.stdout
    command = [sys.executable, "-m", "llama2lib.rlhf", "mini", "--versions", "colect"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode and "did you mean 'collect'" in ran.stderr and "Traceback" not in ran.stderr


def test_the_papers_program():
    "Five versions; PPO in the last one alone, and the bag of all iterations from V4 on."
    assert [names.count("ppo") for names in RLHFConfig().versions] == [0, 0, 0, 0, 1]
    assert ["bag" in names for names in RLHFConfig().versions] == [False, False, False, True, True]
    assert all("collect reward" in names for names in RLHFConfig().versions)


if __name__ == "__main__":
    main(*sys.argv[1:])
