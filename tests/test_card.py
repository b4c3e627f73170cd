"""Model cards: nothing invented, Meta's licence on Meta's weights, files of others left alone, the hub's reader."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import random_model

from llama2lib import sft
from llama2lib.carbon import Energy, grid
from llama2lib.card import (
    META_TOKENIZER,
    NOT_STATED,
    NOTICE,
    CardConfig,
    Result,
    card,
    licence,
    meta_signs,
    program_results,
    read_facts,
    read_results,
    run,
    training_runs,
)
from llama2lib.checkpoint import load_checkpoint, save_checkpoint, save_meta
from llama2lib.dialog import write_dialogs
from llama2lib.model import LLAMA2
from llama2lib.reward import RewardModel

ROWS = (
    "Developer", "Variations", "Input", "Output", "Architecture", "Dates", "Status", "Licence",
    "Where to send comments", "Intended use", "Out of scope", "Training factors", "Carbon footprint", "Overview",
    "Freshness", "By the author", "In general",
)  # fmt: skip


def rows(text: str) -> dict[str, str]:
    "The rows of a card, in their order."
    lines = (line[2:].split(":** ", 1) for line in text.splitlines() if line.startswith("**"))
    return {name: content for name, content in lines}


@pytest.fixture
def folder(tmp_path, tokenizer):
    "A small model with its tokenizer."
    save_checkpoint(random_model("GQA", vocab_size=tokenizer.vocab_size), tmp_path / "small", tokenizer)
    return tmp_path / "small"


@pytest.fixture
def derived(tmp_path, real_tokenizer_file):
    "A folder in Meta's layout with Meta's own tokenizer."
    save_meta(random_model("MQA", vocab_size=32_000), tmp_path / "derived")
    shutil.copyfile(real_tokenizer_file, tmp_path / "derived" / "tokenizer.model")
    return tmp_path / "derived"


def test_nothing_is_invented(folder):
    "A.7's rows, in order; of a bare folder only what its files tell."
    text = card(CardConfig(folder))
    found = rows(text)
    assert tuple(found) == ROWS and str(folder.parent) not in text and "mit" not in text.split("---")[1]
    told = {"Variations", "Input", "Output", "Architecture", "In general"}
    assert {name for name, content in found.items() if content != NOT_STATED} == told
    assert "\n## Evaluation results\n\nnot stated\n" in text and "license" not in text.split("---")[1]
    assert "No measurement of its safety" in found["In general"]
    assert "8 heads with 2 for keys" in found["Architecture"] and found["Input"] == "text, at most 128 tokens"


def test_shape_and_format_are_the_files_own(tmp_path, folder, tokenizer):
    "Counted from the tensors; Meta's params.json has no context length, unless somebody wrote one into it."
    model = random_model("MHA").to(torch.bfloat16)
    save_meta(model, tmp_path / "meta", shards=2)
    facts, count = read_facts(tmp_path / "meta"), sum(p.numel() for p in model.parameters())
    assert (facts.parameters, facts.dtype, facts.context, facts.layout) == (count, "bfloat16", None, "Meta's")
    text = card(CardConfig(tmp_path / "meta"))
    assert f"{count:,} parameters in bfloat16, Meta's layout" in text and "context length not stated" in text
    assert "no tokenizer in the folder" in text and "library_name" not in text
    params = tmp_path / "meta" / "params.json"
    params.write_text(json.dumps(json.loads(params.read_text()) | {"max_seq_len": 2048}))
    assert read_facts(tmp_path / "meta").context == 2048
    reward = RewardModel.of(random_model("GQA", vocab_size=tokenizer.vocab_size))
    save_checkpoint(reward, tmp_path / "reward", tokenizer)
    facts, text = read_facts(tmp_path / "reward"), card(CardConfig(tmp_path / "reward"))
    assert facts.reward and facts.parameters == sum(p.numel() for p in reward.parameters())
    assert "pipeline_tag: text-classification" in text and "- reward-model" in text
    assert "**Output:** a score of a conversation's last answer" in text
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        card(CardConfig(folder))


def test_runs_are_read_back_to_the_first(tmp_path, folder, one_thread):
    "Two rounds of fine-tuning, one upon the other: steps, tokens and loss are those of state and log; newest first."
    dialog = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
    write_dialogs(tmp_path / "sft.jsonl", [dialog] * 24)
    recipe = sft.SFTConfig(
        str(folder), lr=3e-3, batch_rows=2, max_seq_len=48, epochs=1, micro_batch=1, data=tmp_path / "sft.jsonl",
        out=tmp_path / "first",
    )  # fmt: skip
    sft.run(recipe)
    sft.run(replace(recipe, model=str(tmp_path / "first" / "model"), lr=1e-3, out=tmp_path / "second"))
    found = training_runs(tmp_path / "second" / "model")
    assert [one.origin for one in found] == [str(tmp_path / "first" / "model"), str(folder)]
    log = tmp_path / "second" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    with log.open("a") as file:
        file.write('{"step": 9, "lo')  # a kill
    text = card(CardConfig(tmp_path / "second" / "model", training_factors="a laptop"))
    told = rows(text)["Training factors"]
    assert told.startswith("a laptop. fine-tuning from first/model: ") and told.index("0.001") < told.index("0.003")
    assert f"{len(lines)} steps of 2 rows, {lines[-1]['tokens']:,} tokens" in told and text.count("# second\n") == 1
    assert f"loss {lines[-1]['loss']:.3f} at the end" in told and str(tmp_path) not in text
    assert "license" not in text.split("---")[1]
    folder.rename(tmp_path / "Llama-2-7b")
    [facts] = (tmp_path / "first").glob("step-*/run.json")
    facts.write_text(facts.read_text().replace(str(folder), str(tmp_path / "Llama-2-7b")))
    assert "it is built on" in card(CardConfig(tmp_path / "second" / "model"))  # two runs ago
    shutil.rmtree(tmp_path / "first")
    assert len(training_runs(tmp_path / "second" / "model")) == 1 and training_runs(tmp_path / "Llama-2-7b") == []


@pytest.mark.parametrize(
    "change, signs",
    [
        ({}, 1), ({"vocab_size": 32_001}, 1), ({"max_seq_len": 2048, "rope_theta": 1e6}, 1),
        ({"vocab_size": 50_000}, 0), ({"n_layers": 31}, 0), ({"n_kv_heads": 8}, 0),
    ],
)  # fmt: skip
def test_a_released_shape_is_recognised(change, signs):
    for size in ("7B", "13B"):
        assert len(meta_signs(replace(LLAMA2[size], **change), None)) == signs
    assert meta_signs(LLAMA2["70B"], META_TOKENIZER)[1] == "the shape is that of Llama 2 70B"


@pytest.mark.parametrize(
    "name, metas",
    [
        ("meta-llama/Llama-2-7b-hf", True), ("/disk/llama-2-70b-chat", True), ("weights/Llama2", True), ("7B", False),
        ("cache/llama2lib/tour", False), ("llama-3-8b", False), ("llama-20b", False), ("scratch", False),
        ("Llama-2-runs/tour/of/mine", False),
    ],
)  # fmt: skip
def test_what_it_began_with_is_recognised_by_name(name, metas):
    assert bool(meta_signs(LLAMA2["debug"], None, [name])) == metas


@pytest.mark.parametrize(
    "signs, stated, built_on, named",
    [
        ([], None, None, None), ([], "mit", None, "mit"), (["shape"], None, None, "llama2"),
        (["shape"], "llama2", "x/y", "llama2"), (["shape"], None, "x/y", "llama2"), (["shape"], "mit", "x/y", "mit"),
        (["shape"], "mit", None, None), (["it is built on x/Llama-2"], "mit", "scratch", None),
    ],
)  # fmt: skip
def test_signs_of_meta_are_stronger_than_silence(signs, stated, built_on, named):
    "Never MIT without a word on what the weights are built on, nor against what the run itself tells."
    if signs and stated == "mit" and named is None:
        with pytest.raises(ValueError, match=r"license 'mit', but .*: expected llama2, or --built-on something else"):
            licence(signs, stated, built_on)
    else:
        assert licence(signs, stated, built_on) == named


def test_weights_of_meta_carry_its_terms(derived):
    text = run(CardConfig(derived)).read_text("utf-8")
    told = rows(text)
    assert "\nlicense: llama2\n" in text.split("---")[1] and "Community License" in told["Licence"]
    assert "Acceptable Use Policy" in told["Licence"] and "Acceptable Use Policy" in told["Out of scope"]
    assert NOTICE in text and "The text is missing here" in text
    assert (derived / "Notice").read_text("utf-8") == NOTICE + "\n"
    with pytest.raises(ValueError, match=r"license 'apache-2\.0', but tokenizer\.model is the file of Llama 2"):
        card(CardConfig(derived, license="apache-2.0"))
    (derived / "LICENSE.txt").write_text("…", "utf-8")
    assert "The text is in LICENSE.txt" in run(CardConfig(derived)).read_text("utf-8")
    text = card(CardConfig(derived, license="apache-2.0", built_on="scratch"))  # the tokenizer stays Meta's
    assert "license: apache-2.0" in text and NOTICE in text and "- llama-2" not in text
    assert "for files of Meta's [Llama 2 Community License]" in text
    (derived / "Notice").write_text("Ours.\n", "utf-8")
    with pytest.raises(FileExistsError, match=r"Notice: expected it to hold the sentence"):
        run(CardConfig(derived))


def test_weights_that_began_with_metas_carry_its_terms_too(folder, derived, monkeypatch):
    "By the name that is given, and by the tokenizer that lies where it began."
    for origin in ("meta-llama/Llama-2-7b-hf", str(derived)):
        with pytest.raises(ValueError, match="it is built on"):
            card(CardConfig(folder, license="mit", built_on=origin))
        assert "license: llama2" in card(CardConfig(folder, built_on=origin))
    assert "base_model: meta-llama/Llama-2-7b-hf" in card(CardConfig(folder, built_on="meta-llama/Llama-2-7b-hf"))
    monkeypatch.chdir(derived.parent.parent)  # a folder can look like a name on the hub
    assert "base_model" not in card(CardConfig(folder, built_on=f"{derived.parent.name}/{derived.name}"))


def test_files_of_others_are_left_alone(folder):
    "A card is written anew while it is as it was written; what people wrote or edited stays."
    path = run(CardConfig(folder))
    before = path.read_bytes()
    assert run(CardConfig(folder)).read_bytes() == before != run(CardConfig(folder, name="other")).read_bytes()
    ours = path.read_text("utf-8")
    for text in ("# Mine\n", "", ours.replace("# other", "# My own"), ours + "More.\n", "More.\n" + ours):
        path.write_text(text, "utf-8")
        with pytest.raises(FileExistsError, match=r"README\.md was not written by this command, or was edited"):
            run(CardConfig(folder))
        assert path.read_text("utf-8") == text
    with pytest.raises(FileExistsError, match="not ours to replace"):  # nor are a published folder's weights
        save_checkpoint(load_checkpoint(folder), folder)


LM_EVAL = {
    "results": {
        "mmlu": {"alias": "mmlu", "acc,none": 0.45, "acc_stderr,none": 0.004, "sample_len": 9},
        "gsm8k": {"em,strict": 0.1, "em_stderr,strict": "N/A", "em,flexible": 0.2},
    },
    "model": "hf", "config": {"batch_size": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    "content, found",
    [
        (LM_EVAL, [("mmlu", "acc", 0.45, 0.004), ("gsm8k", "em", 0.1, None), ("gsm8k", "em", 0.2, None)]),
        ({"results": {"boolq": {"acc": 0.5, "stderr": 0.1}}}, [("boolq", "acc", 0.5, 0.1)]),
        ({"truthfulqa": {"truthful": 1, "easy": True}}, [("truthfulqa", "truthful", 1.0, None)]),
    ],
)  # fmt: skip
def test_results_are_read(tmp_path, content, found):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content), "utf-8")
    assert read_results(path, tmp_path) == [Result(*row) for row in found]


def test_results_of_our_own_command_are_read(tmp_path, folder):
    metrics = {"exact_match, strict": {"value": 0.25, "stderr": 0.03}, "acc": {"value": 0.5, "stderr": None}}
    scores = {"gsm8k": {"n": 8, "shots": 8, "metrics": metrics}}
    content = {"settings": {"model": str(folder)}, "tasks": {"gsm8k": {"shortened": 0, "scores": scores}}}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content), "utf-8")
    assert read_results(path, folder) == [Result("gsm8k", "exact_match", 0.25, 0.03), Result("gsm8k", "acc", 0.5, None)]
    with pytest.raises(ValueError, match="is of the model in"):
        read_results(path, tmp_path)
    content["tasks"]["gsm8k"] = {"acc": 1}
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(ValueError, match=r"results\.json: not as llama2lib\.evaluate writes it"):
        read_results(path, folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"results": {"mmlu": 0.4}}', '{"results": []}', '{"acc": 1}'])
def test_results_of_another_layout_or_model_are_refused(tmp_path, folder, text):
    path = tmp_path / "results.json"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r'results\.json: expected {"results"'):
        read_results(path, tmp_path)
    path.write_text(json.dumps({"model": str(folder), "results": {"mmlu": {"acc": 1}}}), "utf-8")
    assert len(read_results(path, folder)) == 1
    with pytest.raises(ValueError, match=r"is of the model in .*small, not of that in"):
        read_results(path, tmp_path)


def test_the_programs_own_numbers_are_found(tmp_path, folder):
    "Of the version that ended in this folder, and of no other."
    version = tmp_path / "V2"
    for place, name in (("2-tune", "2-tune"), ("10-ppo", "10-ppo")):
        shutil.copytree(folder, version / place / "model")
        (version / place / "done.json").write_text(json.dumps({"model": f"elsewhere/V2/{name}/model"}), "utf-8")
    metrics = {"V1": {"finished": 0.1}, "V2": {"finished": 0.9, "safety": 1.5, "helpfulness": None}}
    (version / "metrics.json").write_text(json.dumps(metrics), "utf-8")
    found = program_results(version / "10-ppo" / "model")
    assert [(row.metric, row.value) for row in found] == [("finished", 0.9), ("safety", 1.5)]
    assert program_results(version / "2-tune" / "model") == program_results(folder) == []
    assert "No measurement of its safety" not in card(CardConfig(version / "10-ppo" / "model"))


def test_the_hub_reads_it(tmp_path, folder):
    "YAML's traps: the language of Norway, colons, quotes; a task with a bar; a value that is no number."
    hub = pytest.importorskip("huggingface_hub")
    path, name = tmp_path / "results.json", "a: 'model' #1"
    path.write_text('{"results": {"two | parts": {"acc": 0.5, "acc_stderr": 0.25, "loss": NaN}}}', "utf-8")
    config = CardConfig(folder, name, language=("no", "en"), license="apache-2.0", results=(path,), data="a: b\n---\nc")
    read = hub.ModelCard.load(run(config))
    assert (read.data.language, read.data.license, read.data.model_name) == (["no", "en"], "apache-2.0", name)
    [score] = read.data.eval_results
    assert (score.dataset_name, score.metric_type, score.metric_value) == ("two | parts", "acc", 0.5)
    assert r"| two \| parts | acc | 0.5 | 0.25 |" in read.text and r"| loss | nan |" in read.text
    assert read.data.tags == ["llama2lib"] and read.data.library_name == "transformers"


def test_carbon_is_stated_or_measured(folder):
    "7B's row of Table 2; a meter's energy.json beside the folder, and one in the folder, which is nearer."
    told = rows(card(CardConfig(folder, gpu_hours=184_320, watts=400)))["Carbon footprint"]
    assert told == "184,320 GPU hours at 400 W, PUE 1.1, 0.385 kg/kWh: 31.22 t of CO2 equivalent"
    told = rows(card(CardConfig(folder, gpu_hours=100, watts=10, pue=1.5, country="USA")))["Carbon footprint"]
    kg = grid("USA")
    assert told == f"100 GPU hours at 10 W, PUE 1.5, {kg:.3g} kg/kWh: {1.5 * kg:.3g} kg of CO2 equivalent"
    assert rows(card(CardConfig(folder, gpu_hours=2)))["Carbon footprint"] == "2 GPU hours"
    beside, inside = Energy(10.0, 0.001, 0.002, 0.0, 0.4), Energy(20.0, 0.001, 0.002, 0.0, 0.4)
    for place, energy in ((folder.parent, beside), (folder, inside)):
        (place / "energy.json").write_text(json.dumps(asdict(energy)), "utf-8")
        assert rows(card(CardConfig(folder)))["Carbon footprint"] == f"measured: {energy}"
    for damaged in ("{", "{}", '{"seconds": 1, "cpu_kwh": "x", "gpu_kwh": 0, "ram_kwh": 0, "kg_per_kwh": 0}', "[1]"):
        (folder / "energy.json").write_text(damaged, "utf-8")
        with pytest.raises(ValueError, match=r"energy\.json: expected the fields of llama2lib\.carbon\.Energy"):
            card(CardConfig(folder))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"watts": 400.0}, "watts 400 without gpu_hours: expected both"),
        ({"license": "MIT"}, "license 'MIT': expected the hub's identifier"),
        ({"language": ("English",)}, "language 'English': expected a code"),
    ],
)
def test_what_the_hub_does_not_know_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        CardConfig(Path("x"), **wrong)


def test_the_command(folder):
    command = [sys.executable, "-m", "llama2lib.card", "--model", str(folder)]
    options = ["--developer", "Ada", "--language", "en"]
    ran = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and ran.stdout.strip() == str(folder / "README.md")
    assert rows((folder / "README.md").read_text("utf-8"))["Developer"] == "Ada"
    (folder / "README.md").write_text("# Mine\n", "utf-8")
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1 and "was not written by this command" in ran.stderr and "Traceback" not in ran.stderr
