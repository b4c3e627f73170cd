"""Generated from chapters/09_evaluation.py by chapters/export.py; edit the chapter."""

__all__ = [
    "gsm8k_rows",
    "nq_rows",
    "agieval_rows",
    "bbh_rows",
    "truthfulqa_rows",
    "CHOICE",
    "OPEN",
    "mini_rows",
    "right",
    "CODE",
    "MINI",
    "mini_task",
    "Source",
    "LOCAL",
    "TASKS",
    "SHOTS",
    "one_file",
    "from_files",
    "local_task",
    "tasks_of",
    "ask",
    "TOP_P",
    "FEW",
    "MANY",
    "programmer",
    "read_problems",
    "EvaluateConfig",
    "programs_scored",
    "lines_of",
    "earlier",
    "run",
    "cli",
]


# ---------- chapters/09_evaluation.py · Tasks from files

import csv
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from llama2lib.checkpoint import load_checkpoint, read_tensors
from llama2lib.continuations import over_ranks, written_until
from llama2lib.distributed import compute_dtype, processes
from llama2lib.grammar import fill, wordings, written
from llama2lib.judge import read_answer, read_task
from llama2lib.launch import one_line_errors
from llama2lib.model import Llama
from llama2lib.programs import Problem, json_rows, pass_rate, read_humaneval, read_mbpp, solve
from llama2lib.recipes import write_atomic
from llama2lib.safety import read_truthfulqa
from llama2lib.synthetic import HELPFUL, pick, question
from llama2lib.tokenizer import Tokenizer
from llama2lib.world import VALUES, holds, truth


def gsm8k_rows(path: Path) -> list[dict]:
    "Questions of GSM8K. ValueError, here and below, with file and line for another format."
    return json_rows(path, question=str, answer=str)


def nq_rows(path: Path) -> list[dict]:
    "Questions of NaturalQuestions' open version, with their right answers."
    return json_rows(path, question=str, answer=list)


def agieval_rows(path: Path) -> list[dict]:
    "Questions of an exam of AGIEval in its zero-shot wording, `query`, with `choices` and the right ones, `gold`."
    found = []
    for number, row in enumerate(json_rows(path, question=str, options=list, label=str), 1):
        last, letters = "ABCDEFG"[len(row["options"]) - 1 : len(row["options"])], "ABCDEFG"[: len(row["options"])]
        if not last or row["label"] not in letters:
            raise ValueError(f"{path}:{number}: label {row['label']!r} of {len(row['options'])} options; expected one")
        asked = f"{row.get('passage') or ''}Q: {row['question']} Answer Choices: {' '.join(row['options'])}"
        query = f"{asked}\nA: Among A through {last}, the answer is"
        found.append({"query": query, "choices": row["options"], "gold": [letters.index(row["label"])]})
    return found


def bbh_rows(path: Path) -> list[dict]:
    "Questions of a task of BIG-Bench Hard."
    try:
        examples = json.loads(path.read_text("utf-8"))["examples"]
        rows = [{"input": row["input"], "target": row["target"]} for row in examples]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected JSON with a list `examples` of input and target ({error!r:.80})") from None
    if not rows:
        raise ValueError(f"{path}: no examples")
    return rows


def truthfulqa_rows(path: Path) -> list[dict]:
    "TruthfulQA's questions with choices: the best answer and the wrong ones (MC1), all right and wrong ones (MC2)."
    with open(path, encoding="utf-8-sig", newline="") as file:
        best = [row.get("Best Answer") for row in csv.DictReader(file)]
    found = []
    for number, (one, right) in enumerate(zip(read_truthfulqa(path), best, strict=True), 1):
        if not right:
            raise ValueError(f"{path}: row {number} lacks a best answer")
        sets = {"mc1": ([right], one.wrong), "mc2": (one.right, one.wrong)}
        found.append({"question": one.text} | {
            f"{name}_targets": {"choices": [*good, *bad], "labels": [1] * len(good) + [0] * len(bad)}
            for name, (good, bad) in sets.items()
        })  # fmt: skip
    return found

CHOICE = {"person": 5, "animal": 2, "thing": 2, "opposite": 1, "category": 1}
OPEN = {kind: HELPFUL[kind] for kind in (*CHOICE, "list", "sum", "count", "copy", "howto")}


def mini_rows(kinds: dict[str, float], count: int, split: str) -> list[dict]:
    "Questions of the mini world; those of CHOICE with four statements, of which number `gold` is true."
    random, rows = np.random.default_rng([9, split == "test", count]), []
    while len(rows) < count:
        kind = pick(random, kinds)
        text, relation, subject, _ = question(random, kind, split)
        row = {"question": text, "kind": kind, "expected": truth(relation, subject) or ""}
        if kind in CHOICE:
            wrong = [value for value in VALUES[relation] if value != row["expected"]]
            values = random.permutation([row["expected"], *random.choice(wrong, 3, replace=False)]).tolist()
            wording = pick(random, wordings(f"say {relation}", split))
            row["choices"] = [written(fill(wording, relation, subject, v=value)) for value in values]
            row["gold"] = values.index(row["expected"])
        rows.append(row)
    return rows


def right(asked: str, answer: str) -> bool:
    "Whether an answer to a question of the mini world claims what was asked, and only what is true of it."
    task = read_task([{"role": "user", "content": asked}])
    claims = [claim for said in read_answer(task, answer) for claim in said.claims]
    claims = [claim for claim in claims if claim[:2] == (task.relation, task.subject)]
    return bool(claims) and all(map(holds, claims))


CODE = ("humaneval", "mbpp")
MINI = {
    "mini_choice": {
        "output_type": "multiple_choice", "doc_to_text": "question", "doc_to_choice": "choices",
        "doc_to_target": "gold", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "mini_open": {
        "output_type": "generate_until", "doc_to_text": "question", "doc_to_target": "expected",
        "process_results": lambda row, answers: {"acc": float(right(row["question"], answers[0]))},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 48, "do_sample": False},
    },
}  # fmt: skip


def mini_task(name: str, count: int = 400):
    "A task of MINI for the harness. ValueError for another name."
    if name not in MINI:
        raise ValueError(f"task {name!r}: expected one of {', '.join(MINI)}")
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    kinds = {"mini_choice": CHOICE, "mini_open": OPEN}[name]

    def rows(**_):
        return {split: Dataset.from_list(mini_rows(kinds, count, split)) for split in ("train", "test")}

    source = {"custom_dataset": rows, "test_split": "test", "fewshot_split": "train", "fewshot_delimiter": " "}
    return ConfigurableTask(config={"task": name, "num_fewshot": 0, "metadata": {"version": 1}} | source | MINI[name])


class Source(NamedTuple):
    "A task of the harness: its file below the package's tasks, the files of its questions by split, and their reader."

    definition: str
    files: dict[str, str]
    reader: str  # a function of this module
    fields: dict | None = None  # of the definition, to be replaced as well


LOCAL = {  # name of a task -> where it comes from; {0} is what the group in the name holds, {1} that with - for _
    "gsm8k": Source("gsm8k/gsm8k.yaml", {"test": "gsm8k/test*.jsonl", "train": "gsm8k/train*.jsonl"}, "gsm8k_rows"),
    "nq_open": Source(
        "nq_open/nq_open.yaml",
        {"test": "nq_open/NQ-open.dev*.jsonl", "train": "nq_open/NQ-open.train*.jsonl"}, "nq_rows",
    ),
    "agieval_(.+)": Source(
        "agieval/{1}.yaml", {"test": "agieval/{1}.jsonl"}, "agieval_rows",
        {"fewshot_config": {"doc_to_target": "{{choices[gold[0]]}}"}},  # the harness has no solved examples of it
    ),
    "bbh_fewshot_(.+)": Source(
        "bbh/fewshot/{0}.yaml", {"test": "bbh/{0}.json"}, "bbh_rows", {"fewshot_split": None}
    ),
    "(truthfulqa_mc[12])": Source(
        "truthfulqa/{0}.yaml", {"test": "truthfulqa/TruthfulQA.csv"}, "truthfulqa_rows", {"fewshot_split": None}
    ),
}  # fmt: skip
TASKS = {  # of the groups of Table 3
    "code": CODE,
    "commonsense": (
        "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "commonsense_qa"
    ),
    "world": ("nq_open", "triviaqa"), "reading": ("squadv2", "boolq"), "math": ("gsm8k", "minerva_math"),
    "mmlu": ("mmlu",), "bbh": ("bbh_fewshot",), "agi": ("agieval_en",), "mini": tuple(MINI),
}  # fmt: skip
SHOTS = {  # section 2.3 and Tables 19 to 25, by the beginning of a task's name; others: the harness's own number
    "gsm8k": 8, "nq_open": 5, "triviaqa": 5, "agieval": 5, "bbh_fewshot": 3, "mmlu": 5, "commonsense_qa": 7,
    "minerva_math": 4, "mbpp": 3,
}  # fmt: skip


def one_file(folder: Path, pattern: str) -> Path | None:
    "The file of a folder that a pattern fits, or none. ValueError where several do."
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        raise ValueError(f"{folder}: {', '.join(file.name for file in found)} all fit {pattern}; expected one of them")
    return found[0] if found else None


def from_files(reader: str, files: dict[str, str], **_) -> dict:
    "The questions of a task by split; the harness calls it, by the name in the definition that `local_task` writes."
    from datasets import Dataset

    return {split: Dataset.from_list(globals()[reader](Path(file))) for split, file in files.items()}


def local_task(name: str, folder: Path):
    "The harness's task of a name with its questions from a folder of files; None where there is no file for it."
    found = ((re.fullmatch(pattern, name), source) for pattern, source in LOCAL.items())
    match, source = next((pair for pair in found if pair[0]), (None, None))
    if match is None:
        return None
    import lm_eval
    from lm_eval.tasks import TaskManager

    part = (match[1], match[1].replace("_", "-")) if match.groups() else ()
    files = {split: one_file(folder, pattern.format(*part)) for split, pattern in source.files.items()}
    definition = Path(lm_eval.__file__).parent / "tasks" / source.definition.format(*part)
    if files["test"] is None or not definition.exists():
        return None
    given = {split: str(file.resolve()) for split, file in files.items() if file}
    fields = {
        "include": str(definition), "task": name, "training_split": None, "validation_split": None,
        "test_split": "test", "fewshot_split": "train" if "train" in given else "test",
        "dataset_kwargs": {"reader": source.reader, "files": given},
    } | (source.fields or {})  # fmt: skip
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items()]  # JSON is YAML
    lines.append("custom_dataset: !function llama2lib.evaluate.from_files")
    with tempfile.TemporaryDirectory() as place:
        write_atomic(Path(place) / "task.yaml", "\n".join(lines))
        return TaskManager(include_path=place, include_defaults=False).load([name])["tasks"][name]


def tasks_of(names: Sequence[str], folder: Path | None, shots: int | None = None) -> dict[str, dict]:
    """What the harness has to do for each name, as its `evaluate` takes it: own tasks, tasks from files, its own.

    ValueError for a name that nobody knows, or whose questions cannot be had.
    """
    found, manager = {}, None
    for name in names:
        task = mini_task(name) if name in MINI else local_task(name, folder) if folder else None
        if task is not None:
            found[name] = {"tasks": {name: task}}
        else:
            from lm_eval.tasks import TaskManager

            manager = manager or TaskManager()
            if name not in manager.all_tasks:
                close = get_close_matches(name, [*TASKS, *MINI, *CODE, *manager.all_tasks], n=3)
                raise ValueError(f"task {name!r}: expected {', '.join(TASKS)}, {', '.join(CODE)} or a task of the "
                                 f"harness; near it are {', '.join(close) or 'none'}")  # fmt: skip
            try:
                found[name] = manager.load([name])
            except Exception as error:  # of the hub, the network, or a package that the task needs
                files = [re.sub("{.}", "*", one.files["test"]) for key, one in LOCAL.items() if re.fullmatch(key, name)]
                place = f"no file {files[0]} in {folder}, and " if files else ""
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                raise ValueError(f"task {name}: {place}the harness cannot load it ({reason})") from None
        for one, task in found[name]["tasks"].items():
            paper = next((number for start, number in SHOTS.items() if one.startswith(start)), None)
            number, examples = paper if shots is None else shots, getattr(task, "fewshot_cfg", None)
            solved = task.has_training_docs() or (examples and (examples.split or examples.samples))
            if shots and not solved:
                raise ValueError(f"task {one}: {shots} shots, but it has no solved examples; expected 0")
            if number is not None and (solved or not number):
                task.set_config(key="num_fewshot", value=number)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=1234)  # as the harness does
    return found


def ask(lm, unit: dict, limit: int | None = None, chat: bool = False) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """Scores of the tasks of `tasks_of` for a `LlamaLM`, and what was asked and answered, both by task.

    A score is {'n': questions, 'shots': …, 'metrics': {name: {'value': …, 'stderr': …}}}; groups of tasks have one as
    well. `limit`: the first so many questions; `chat`: prompts as messages of a user.
    """
    from lm_eval.evaluator import evaluate

    try:
        found = evaluate(
            lm, unit, limit=limit, bootstrap_iters=1000, apply_chat_template=chat, fewshot_as_multiturn=chat
        )
    except AssertionError as error:  # such as more shots than a task has
        reason = str(error).split("\n")[0][:200] or "it does not say why"
        raise ValueError(f"task {', '.join(unit['tasks'])[:80]}: the harness refuses ({reason})") from None
    scores = {}
    for name, row in {**found["results"], **found.get("groups", {})}.items():
        pairs = [key.split(",") for key in row if "," in key and "_stderr," not in key]
        metrics = {}
        for metric, kind in pairs:
            error = row.get(f"{metric}_stderr,{kind}")
            known = isinstance(error, float) and np.isfinite(error)  # the harness writes 'N/A'
            label = metric if kind == "none" else f"{metric}, {kind}"
            metrics[label] = {"value": float(row[f"{metric},{kind}"]), "stderr": float(error) if known else None}
        number = found["n-samples"].get(name, {}).get("effective", row.get("sample_len"))
        scores[name] = {"n": number, "shots": found["n-shot"].get(name), "metrics": metrics}
    return scores, found["samples"]

TOP_P, FEW, MANY = 0.95, 0.1, 0.8  # section A.2.2: of programs; temperatures for pass@1, and for pass@100 or pass@80


def programmer(
    model: Llama, tokenizer: Tokenizer, temperature: float, seed: int = 0, max_new_tokens: int = 512, batch: int = 64
) -> Callable[[Sequence[Problem], int], list[list[str]]]:
    """What `solve` generates with: a model's programs at a temperature, top-p 0.95 (section A.2.2).

    `max_new_tokens`: at most half of the model's context; a longer prompt than what is left loses its beginning.
    """
    longest = min(max_new_tokens, model.config.max_seq_len // 2)
    settings = {"max_new_tokens": longest, "temperature": temperature, "top_p": TOP_P, "batch": batch}

    def written_rows(rows):
        prompts, seeds, until = zip(*rows, strict=True) if rows else ((), (), ((),))
        return written_until(model, tokenizer, prompts, until[0], seeds=seeds, **settings)

    def generate(problems: Sequence[Problem], samples: int) -> list[list[str]]:
        rows = []
        for number, problem in enumerate(problems):
            tokens = tokenizer.encode(problem.prompt, bos=True)[longest - model.config.max_seq_len :]
            seeds = np.random.SeedSequence([seed, number]).generate_state(samples).tolist()
            rows += [(tokens, one, problem.until) for one in seeds]
        texts = over_ranks(rows, written_rows)
        return [texts[n : n + samples] for n in range(0, len(texts), samples)]

    return generate


def read_problems(name: str, folder: Path | None, shots: int | None = None) -> list[Problem]:
    "The problems of a task of CODE from a folder of files. ValueError without them, and for another name."
    if name not in CODE:
        raise ValueError(f"task {name!r}: expected one of {', '.join(CODE)}")
    pattern = {"humaneval": "humaneval/HumanEval*.jsonl*", "mbpp": "mbpp/mbpp*.jsonl"}[name]
    file = one_file(folder, pattern) if folder else None
    if file is None:
        where = f"no {pattern} in {folder}" if folder else "no folder of files"
        raise ValueError(f"task {name}: {where}; expected its authors' file there, see --data")
    if name == "humaneval" and shots:
        raise ValueError(f"task humaneval: {shots} shots; expected none, it has no solved examples")
    return read_humaneval(file) if name == "humaneval" else read_mbpp(file, 3 if shots is None else shots)


# ---------- chapters/09_evaluation.py · The command

@dataclass(frozen=True)
class EvaluateConfig:
    "Benchmarks for a model (section 2.3)."

    model: Path  # checkpoint folder with its tokenizer, Hugging Face's layout or Meta's
    tasks: str  # names with commas: mini, gsm8k, humaneval, a group of Table 3 such as commonsense, or the harness's
    out: Path  # JSON file for the scores; tasks that it already holds are not run again
    data: Path | None = None  # folder of the questions, in the layout of chapter 09; none: that of LLAMA2_DATA
    shots: int | None = None  # solved examples in front of a question; none: as many as in the paper
    limit: int | None = None  # the first so many questions of each task
    chat: bool = False  # give prompts as messages of a user, in the chat format
    samples: int = 1  # programs for a problem, at temperature 0.1; from 100 on (mbpp: 80) as many more at 0.8, pass@100
    log: bool = False  # write all questions and answers too, to OUT's name with the task's, .jsonl
    batch_tokens: int = 8192  # read together
    batch: int = 64  # texts written together
    seed: int = 0  # of sampled answers and programs


def programs_scored(config: EvaluateConfig, name: str, model: Llama, tokenizer: Tokenizer, problems: Sequence[Problem]):
    "The score of a task of CODE, as `ask` has it, and each problem with how many of its programs pass."
    many, samples = {"humaneval": 100, "mbpp": 80}[name], config.samples
    metrics, log = {}, [{"doc_id": problem.name} for problem in problems]
    for k, temperature in (1, FEW), (many, MANY):
        if k <= samples:
            generate = programmer(model, tokenizer, temperature, config.seed, batch=config.batch)
            counts = solve(problems, generate, samples)
            metrics[f"pass@{k}"] = dict(zip(("value", "stderr"), pass_rate(counts, samples, k), strict=True))
            for row, count in zip(log, counts, strict=True):
                row[f"passed of {samples} at temperature {temperature}"] = count
    shots = {"humaneval": 0, "mbpp": 3 if config.shots is None else config.shots}[name]
    return {name: {"n": len(problems), "shots": shots, "metrics": metrics}}, {name: log}


def lines_of(scores: dict[str, dict]) -> list[str]:
    "Rows of the table of scores."
    rows = []
    for name, score in scores.items():
        for metric, found in score["metrics"].items():
            error = "" if found["stderr"] is None else f"± {found['stderr']:.4f}"
            counted = f"{score['n'] or ''!s:>7}{'' if score['shots'] is None else score['shots']!s:>7}"
            rows.append(f"{name:<36}{metric:<32}{found['value']:>9.4f} {error:<9}{counted}")
    return rows


def earlier(config: EvaluateConfig) -> dict:
    "What the file of scores holds; ValueError where it was made with other settings, or is none."
    kept = ("model", "shots", "limit", "chat", "samples", "seed")
    settings = {name: value for name, value in asdict(config).items() if name in kept}
    settings = json.loads(json.dumps(settings, default=str))
    if not config.out.exists():
        return {"settings": settings, "tasks": {}}
    try:
        state = json.loads(config.out.read_text("utf-8"))
        before = state["settings"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{config.out}: no scores of this command; expected another --out") from None
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if changed:
        other = (f"{name} {before.get(name)}, now {settings[name]}" for name in changed)
        raise ValueError(f"{config.out} was made with {'; '.join(other)}: expected the same, or another --out")
    return state


def run(config: EvaluateConfig) -> dict[str, dict]:
    """Run tasks as `config` says; the scores by name, on every process.

    ValueError, before the weights are loaded, for a task, a file or a setting that is wrong.
    """
    given = [name.strip() for name in config.tasks.split(",") if name.strip()]
    names = list(dict.fromkeys(one for name in given for one in TASKS.get(name, [name])))
    if not names or (config.shots or 0) < 0 or (config.limit is not None and config.limit < 1) or config.samples < 1:
        found = f"tasks {config.tasks!r}, shots {config.shots}, limit {config.limit}, samples {config.samples}"
        raise ValueError(f"{found}: expected names, and positive numbers")
    if config.chat and (code := [name for name in names if name in CODE]):
        raise ValueError(f"task {code[0]}: a model continues its programs, which messages are not; expected no --chat")
    folder = config.data or (Path(os.environ["LLAMA2_DATA"]) if os.environ.get("LLAMA2_DATA") else None)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one with questions")
    state = earlier(config)
    missing = [name for name in names if name not in state["tasks"]]
    problems = {name: read_problems(name, folder, config.shots)[: config.limit] for name in missing if name in CODE}
    read_tensors(config.model)  # an error now and not after the harness is read
    with processes() as device:
        from llama2lib.harness import LlamaLM

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        units = tasks_of([name for name in missing if name not in CODE], folder, config.shots)
        model, tokenizer = load_checkpoint(config.model, device, compute_dtype(device)), Tokenizer(config.model)
        lm = LlamaLM(model, tokenizer, config.batch_tokens, config.batch, config.seed)
        first = not dist.is_initialized() or dist.get_rank() == 0
        if first:
            print(f"{'task':<36}{'metric':<32}{'value':>9}   stderr   {'n':>6}{'shots':>7}")
        for name in names:
            if name in missing:
                before = lm.shortened
                if name in CODE:
                    scores, log = programs_scored(config, name, model, tokenizer, problems[name])
                else:
                    scores, log = ask(lm, units[name], config.limit, config.chat)
                state["tasks"][name] = {"shortened": lm.shortened - before, "scores": scores}
            if not first:
                continue
            print("\n".join(lines_of(state["tasks"][name]["scores"])), flush=True)
            if short := state["tasks"][name]["shortened"]:
                print(f"    {short} prompts were longer than the context of {lm.max_length}, and lost their beginning")
            if name in missing:
                for task, rows in log.items() if config.log else ():
                    text = "".join(json.dumps(row, default=str, ensure_ascii=False) + "\n" for row in rows)
                    write_atomic(config.out.with_name(f"{config.out.stem}.{task}.jsonl"), text)
                write_atomic(config.out, json.dumps(state, indent=1, ensure_ascii=False) + "\n")
        if dist.is_initialized():
            dist.barrier()
    return {name: state["tasks"][name]["scores"] for name in names}


@record
@one_line_errors()
def cli(prog: str = "python -m llama2lib.evaluate"):
    "python -m llama2lib.evaluate --model FOLDER --tasks NAMES --out FILE: benchmarks; under torchrun, on all ranks."
    import tyro

    run(tyro.cli(EvaluateConfig, prog=prog))


if __name__ == "__main__":
    cli()
