"""Generated from chapters/14_human_evaluation.py by chapters/export.py; edit the chapter."""

__all__ = [
    "NOT_STATED",
    "STAGES",
    "Run",
    "Facts",
    "shown",
    "tokenizer_digest",
    "training_runs",
    "read_facts",
    "META_TOKENIZER",
    "LICENCE",
    "POLICY",
    "NOTICE",
    "LLAMA_2",
    "SHAPE",
    "meta_signs",
    "licence",
    "SAFETY",
    "Result",
    "as_others",
    "read_results",
    "program_results",
    "CardConfig",
    "stated",
    "footprint",
    "terms",
    "card_rows",
    "hub_header",
    "sealed",
    "card",
    "run",
    "cli",
]


# ---------- chapters/14_human_evaluation.py · A model card

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llama2lib.carbon import KG_PER_KWH, PUE, Energy, emissions, grid
from llama2lib.checkpoint import read_tensors
from llama2lib.distributed import StateFolder
from llama2lib.formats import without_memory
from llama2lib.launch import one_line_errors
from llama2lib.ledger import table
from llama2lib.model import LLAMA2, Llama, ModelConfig
from llama2lib.pretrain import is_reward_folder
from llama2lib.recipes import write_atomic
from llama2lib.reward import RewardModel

NOT_STATED = "not stated"


# ---------- chapters/14_human_evaluation.py · What a folder knows

STAGES = {  # the setting that gives a run's stage away, and its unit
    "batch_tokens": ("pretraining", "tokens"),
    "batch_rows": ("fine-tuning", "rows"),
    "batch_pairs": ("reward modelling", "pairs"),
    "batch": ("PPO", "prompts"),
}


class Run(NamedTuple):
    "A training run whose state lies beside the weights."

    origin: str  # what it began with: a size of LLAMA2, for new weights, or a folder
    text: str  # for the card


class Facts(NamedTuple):
    "What a folder says of its model."

    config: ModelConfig
    context: int | None  # tokens; none: the layout does not say
    dtype: str
    parameters: int
    layout: str
    reward: bool  # whether it is a reward model
    tokenizer: str | None  # SHA-256 of tokenizer.model
    runs: list[Run]  # newest first
    energy: Energy | None


def shown(path: str) -> str:
    "The end of a path: a card does not tell the tree of somebody's disk."
    return "/".join(Path(path).parts[-2:])


def tokenizer_digest(folder: str | Path) -> str | None:
    "SHA-256 of the folder's tokenizer.model, if there is one."
    file = Path(folder).expanduser() / "tokenizer.model"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def training_runs(folder: Path) -> list[Run]:
    """The runs that the weights in OUT/model come from, newest first, as far back as their folders are there.

    ValueError for a checkpoint that is damaged, as of `distributed.StateFolder`.
    """
    found, seen = [], set()
    while (folder := folder.expanduser().resolve()).name == "model" and folder not in seen:
        states, log = StateFolder(folder.parent), folder.parent / "log.jsonl"
        if not states.latest():
            break
        facts = states.facts()
        settings, origin = facts["settings"], facts["settings"]["model"]
        stage, unit = next((about for key, about in STAGES.items() if key in settings), ("training", ""))
        size = next((f" of {settings[key]:,} {unit}" for key in STAGES if key in settings), "")
        lines = [line for line in log.read_text("utf-8").splitlines() if line[-1:] == "}"] if log.exists() else []
        loss = json.loads(lines[-1]).get("loss") if lines else None
        began = f"new weights ({origin})" if origin in LLAMA2 else shown(origin)
        text = f"{stage} from {began}: {facts['step']:,} step{'s' * (facts['step'] != 1)}{size}"
        text += f", {facts['tokens']:,} tokens, learning rate {settings['lr']:g}"
        text += "" if loss is None else f", loss {loss:.3f} at the end"
        found.append(Run(origin, f"{text}, data of SHA-256 {settings['data digest'][:12]}…"))
        seen.add(folder)
        folder = Path(origin)
    return found


def read_facts(folder: Path) -> Facts:
    """What a folder of weights, Hugging Face's layout or Meta's, and the run that made it say.

    Energy is that of `energy.json`, the fields of `carbon.Energy`, in the folder or beside it. ValueError or
    FileNotFoundError, naming the file, for weights or files that are damaged.
    """
    kind = RewardModel if is_reward_folder(folder) else Llama
    config, dtype, _ = read_tensors(folder, kind)
    meta, energy = not any(folder.glob("model*.safetensors*")), None
    silent = meta and json.loads((folder / "params.json").read_text("utf-8")).get("max_seq_len") is None
    for file in (folder.resolve().parent / "energy.json", folder / "energy.json"):
        if file.exists():
            try:
                energy = Energy(**json.loads(file.read_text("utf-8")))
                str(energy)  # are they numbers?
            except (TypeError, ValueError) as error:
                raise ValueError(f"{file}: expected the fields of llama2lib.carbon.Energy ({error})") from None
    parameters = sum(p.numel() for p in without_memory(config, kind).parameters())
    return Facts(
        config, None if silent else config.max_seq_len, str(dtype).removeprefix("torch."), parameters,
        "Meta's" if meta else "Hugging Face's", kind is RewardModel, tokenizer_digest(folder), training_runs(folder),
        energy,
    )  # fmt: skip


# ---------- chapters/14_human_evaluation.py · Whose weights are they?

META_TOKENIZER = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"  # SHA-256 of Llama 2's on the hub
LICENCE = "[Llama 2 Community License](https://ai.meta.com/llama/license/)"
POLICY = "[Acceptable Use Policy](https://ai.meta.com/llama/use-policy)"
NOTICE = (  # the words are those of the licence, section 1.b.iii
    "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved."
)
LLAMA_2 = re.compile(r"llama[-_ ]?2(?=$|[-_ /:])", re.IGNORECASE)  # in a model's name
SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim")


def meta_signs(config: ModelConfig, tokenizer: str | None, origins: Sequence[str] = ()) -> list[str]:
    "What says that weights are Meta's or derive from them: `tokenizer`, its SHA-256, shape, what they began with."
    found = ["tokenizer.model is the file of Llama 2 (and of Llama 1)"] if tokenizer == META_TOKENIZER else []
    for size in ("7B", "13B", "34B", "70B"):
        same = all(getattr(config, name) == getattr(LLAMA2[size], name) for name in SHAPE)
        if same and 32_000 <= config.vocab_size <= 32_128:  # a few pieces may be added, or be padding
            found.append(f"the shape is that of Llama 2 {size}")
    metas = (name for name in origins if LLAMA_2.search(shown(name)) or tokenizer_digest(name) == META_TOKENIZER)
    return found + [f"it is built on {shown(name)}" for name in metas]


def licence(signs: Sequence[str], stated: str | None, built_on: str | None) -> str | None:
    """The licence that a card names, as the hub's identifier; None: not stated.

    ValueError for another licence than Meta's where there are signs of Meta's weights, and nothing says what they are
    built on instead, or it says Llama 2.
    """
    if not signs or stated == "llama2":
        return stated
    if stated and (built_on is None or any(sign.startswith("it is built on") for sign in signs)):
        raise ValueError(f"license {stated!r}, but {'; '.join(signs)}: expected llama2, or --built-on something else")
    return stated or "llama2"


# ---------- chapters/14_human_evaluation.py · What was measured

SAFETY = re.compile(r"truthful_?qa|toxigen|bold|xstest|crows|bbq|violation|safety", re.IGNORECASE)  # tasks and metrics


class Result(NamedTuple):
    "A number of an evaluation."

    task: str
    metric: str
    value: float
    error: float | None  # standard error


def as_others(content):
    "The results of `llama2lib.evaluate` in the layout of lm-eval; others as they are."
    if not isinstance(content, dict) or "settings" not in content:
        return content
    results: dict[str, dict] = {}
    for part in content["tasks"].values():
        for task, score in part["scores"].items():
            for label, found in score["metrics"].items():
                name, _, kind = label.partition(",")
                results.setdefault(task, {}).update({label: found["value"], f"{name}_stderr,{kind}": found["stderr"]})
    return {"model": content["settings"]["model"], "results": results}


def read_results(path: Path, folder: Path) -> list[Result]:
    """The results in a JSON file of `llama2lib.evaluate`, or of another program.

    Those are {"results": {task: {metric: value, metric_stderr: value}}}, or the tasks alone, metrics named as lm-eval
    does, "acc,none", or plainly; what is no number is left out. ValueError, naming the file, for another layout, and
    for the results of another model than the one in `folder`.
    """
    expected = f'{path}: expected {{"results": {{task: {{metric: number}}}}}}'
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{expected} ({error})") from None
    try:
        content = as_others(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not as llama2lib.evaluate writes it ({error!r})") from None
    tasks = content.get("results", content) if isinstance(content, dict) else None
    if not isinstance(tasks, dict) or not tasks or not all(isinstance(part, dict) for part in tasks.values()):
        raise ValueError(expected)
    model = content.get("model")
    if isinstance(model, str) and Path(model).is_dir() and Path(model).resolve() != folder.resolve():
        raise ValueError(f"{path} is of the model in {model}, not of that in {folder}")
    found = []
    for task, metrics in tasks.items():
        numbers = {key: float(x) for key, x in metrics.items() if type(x) in (int, float)}
        for key, value in numbers.items():
            name, _, kind = key.partition(",")
            if not name.endswith("stderr") and name != "sample_len":
                errors = (f"{name}_stderr,{kind}", f"{name}_stderr", "stderr")
                found.append(Result(task, name, value, next((numbers[e] for e in errors if e in numbers), None)))
    return found


def program_results(folder: Path) -> list[Result]:
    "What chapter 05's program has measured of the version that ended in this folder, V…/…/model."
    version = folder.resolve().parent.parent
    ends = sorted(version.glob("*/done.json"), key=lambda file: int(file.parent.name.partition("-")[0]))
    if not re.fullmatch(r"V\d+", version.name) or not (version / "metrics.json").exists() or not ends:
        return []
    if Path(json.loads(ends[-1].read_text("utf-8"))["model"]).parts[-3:] != folder.resolve().parts[-3:]:
        return []
    numbers = json.loads((version / "metrics.json").read_text("utf-8"))[version.name]
    return [Result("held-out prompts of the RLHF program", k, x, None) for k, x in numbers.items() if x is not None]


# ---------- chapters/14_human_evaluation.py · The card

@dataclass(frozen=True)
class CardConfig:
    """A model card (A.7). What the folder of the weights does not tell, and is not given here, is 'not stated'.

    ValueError for watts without hours, and for a licence or language that is no identifier of the hub.
    """

    model: Path  # the folder of the weights, Hugging Face's layout or Meta's; its README.md is written
    name: str | None = None  # of the model; none: the folder's
    developer: str = NOT_STATED
    dates: str = NOT_STATED  # when it was trained
    status: str = NOT_STATED  # whether it will change
    comments: str = NOT_STATED  # where to send them
    intended_use: str = NOT_STATED
    out_of_scope: str = NOT_STATED
    training_factors: str = NOT_STATED  # libraries and hardware
    data: str = NOT_STATED  # what it learned from
    freshness: str = NOT_STATED  # the newest data
    limitations: str = NOT_STATED  # and ethical considerations
    language: tuple[str, ...] = ()  # codes of two or three letters
    license: str | None = None  # the hub's identifier, such as apache-2.0, llama2, other
    built_on: str | None = None  # the model that it began with: the hub's name, or a folder; scratch: none
    gpu_hours: float | None = None  # of all GPUs together
    watts: float | None = None  # of a GPU, its cap
    pue: float = PUE  # of the data centre
    country: str | None = None  # ISO code of the grid; none: the paper's 0.385 kg/kWh
    results: tuple[Path, ...] = ()  # JSON files of llama2lib.evaluate, llama2lib.safety or lm-eval

    def __post_init__(self):
        if self.watts is not None and self.gpu_hours is None:
            raise ValueError(f"watts {self.watts:g} without gpu_hours: expected both")
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise ValueError(f"license {self.license!r}: expected the hub's identifier, such as mit, apache-2.0, other")
        for code in self.language:
            if not re.fullmatch(r"[a-z]{2,3}", code):
                raise ValueError(f"language {code!r}: expected a code of two or three small letters, such as en")

def stated(parts: Sequence[str], between: str = ". ") -> str:
    "The parts that are stated, as one text."
    return between.join(part for part in parts if part != NOT_STATED) or NOT_STATED


def footprint(config: CardConfig, energy: Energy | None) -> str:
    "The row on carbon: energy as metered, hours as stated."
    hours, amount = NOT_STATED, ""
    if config.watts is not None:
        factor = KG_PER_KWH if config.country is None else grid(config.country)
        kg = 1000 * emissions(config.gpu_hours, config.watts, config.pue, factor)
        amount = f"{kg / 1000:,.2f} t" if kg >= 1000 else f"{kg:.3g} kg"
        amount = f" at {config.watts:g} W, PUE {config.pue:g}, {factor:.3g} kg/kWh: {amount} of CO2 equivalent"
    if config.gpu_hours is not None:
        hours = f"{config.gpu_hours:,.10g} GPU hours{amount}"
    return stated([f"measured: {energy}" if energy else NOT_STATED, hours], "; ")


def terms(config: CardConfig, facts: Facts, license: str | None, signs: Sequence[str]) -> str:
    "The row on the licence, with what Meta's asks for where it holds."
    metas = license == "llama2"
    parts = [f"{LICENCE}, with its {POLICY}" if metas else license or NOT_STATED]
    if signs:
        parts.append(f"Signs of Llama 2: {'; '.join(signs)}")
        if not metas:
            origin = f"built on {shown(config.built_on)}"
            parts.append(f"The author states that it is {origin}; for files of Meta's {LICENCE} and {POLICY} hold")
    if metas or facts.tokenizer == META_TOKENIZER:
        copies = sorted(file.name for file in config.model.glob("LICENSE*"))
        parts += [f"The text is in {', '.join(copies)}" if copies else "The text is missing here: add it", NOTICE]
    return ". ".join(parts)


def card_rows(
    config: CardConfig, facts: Facts, license: str | None, signs: Sequence[str], safe: bool
) -> dict[str, dict[str, str]]:
    "Table 52's rows by its headings; `safe`: whether its safety was measured."
    c = facts.config
    queries = "" if c.n_kv_heads == c.n_heads else f" with {c.n_kv_heads} for keys and values"
    tokenizer = "" if facts.tokenizer else ", no tokenizer in the folder"
    origin = f"Built on {shown(config.built_on)}" if config.built_on else NOT_STATED
    forbidden = f"What the law, the licence or the {POLICY} forbids, and improving other language models than Llama 2"
    risks = "What a model says may be false, biased or harmful, and no test covers it all: test it for the use at hand"
    unmeasured = NOT_STATED if safe else "No measurement of its safety is given here"
    return {
        "Model details": {
            "Developer": config.developer,
            "Variations": f"{facts.parameters:,} parameters in {facts.dtype}, {facts.layout} layout",
            "Input": f"text, at most {facts.context:,} tokens" if facts.context else "text; context length not stated",
            "Output": "a score of a conversation's last answer" if facts.reward else "text",
            "Architecture": f"auto-regressive transformer, Llama 2's: width {c.dim:,}, {c.n_layers} layers, "
            f"{c.n_heads} heads{queries}, SwiGLU of {c.hidden_dim:,}, vocabulary of {c.vocab_size:,} pieces{tokenizer}",
            "Dates": config.dates,
            "Status": config.status,
            "Licence": terms(config, facts, license, signs),
            "Where to send comments": config.comments,
        },
        "Intended use": {
            "Intended use": config.intended_use,
            "Out of scope": stated([config.out_of_scope, forbidden if license == "llama2" else NOT_STATED]),
        },
        "Hardware and software": {
            "Training factors": stated([config.training_factors, *(run.text for run in facts.runs), origin]),
            "Carbon footprint": footprint(config, facts.energy),
        },
        "Training data": {"Overview": config.data, "Freshness": config.freshness},
        "Evaluation results": {},
        "Ethical considerations and limitations": {"By the author": config.limitations,
                                                   "In general": stated([unmeasured, risks])},
    }  # fmt: skip

def hub_header(config: CardConfig, name: str, facts: Facts, license: str | None, results: Sequence[Result]) -> str:
    "The YAML that the hub reads. ImportError, in one line, without huggingface_hub."
    try:
        from huggingface_hub import EvalResult, ModelCardData
    except ImportError:
        raise ImportError("huggingface_hub is not installed: pip install -e '.[hub]'") from None
    task, base = "text-classification" if facts.reward else "text-generation", config.built_on or ""
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    finite = (r for r in results if math.isfinite(r.value))
    scores = [EvalResult(task, re.sub(r"[^\w.-]+", "-", r.task), r.task, r.metric, r.value) for r in finite]
    data = ModelCardData(
        language=list(config.language) or None, license=license, pipeline_tag=task, model_name=name if scores else None,
        base_model=base if hub else None, library_name="transformers" if facts.layout != "Meta's" else None,
        eval_results=scores or None,
        tags=["llama2lib", *["reward-model"] * facts.reward, *["llama-2"] * (license == "llama2")],
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n"


def sealed(text: str) -> str:
    "A card with its digest as the last line, by which it is known to be ours and unchanged."
    return f"{text}\n<!-- llama2lib.card {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def card(config: CardConfig) -> str:
    "The card as Markdown. ValueError, FileNotFoundError or ImportError as of the parts."
    folder, facts = config.model, read_facts(config.model)
    name = config.name or shown(str(folder.resolve())).removesuffix("/model").rpartition("/")[2]
    origins = [run.origin for run in facts.runs if run.origin not in LLAMA2] + [config.built_on] * bool(config.built_on)
    signs = meta_signs(facts.config, facts.tokenizer, origins)
    license = licence(signs, config.license, config.built_on)
    results = program_results(folder) + [result for path in config.results for result in read_results(path, folder)]
    safe, text = any(SAFETY.search(f"{r.task} {r.metric}") for r in results), f"# {name}\n"
    for heading, parts in card_rows(config, facts, license, signs, safe).items():
        text += f"\n## {heading}\n" + "".join(f"\n**{row}:** {x}\n" for row, x in parts.items())
        if heading == "Evaluation results":
            lines = [[f"{x:.4g}" if isinstance(x, float) else x for x in result] for result in results]
            found = table(["Task", "Metric", "Value", "Standard error"], lines) if results else f"{NOT_STATED}\n"
            text += f"\n{found}"
    return sealed(hub_header(config, name, facts, license, results) + text)


def run(config: CardConfig) -> Path:
    """Write the card, and the 'Notice' where Meta's licence asks for it; returns the card's path.

    FileExistsError for a README.md that is not ours, or was edited, and for a Notice without Meta's sentence.
    """
    text, path, notice = card(config), config.model / "README.md", config.model / "Notice"
    if path.exists():
        found = path.read_text("utf-8")
        if found != sealed(found.rpartition("\n<!-- llama2lib.card ")[0]):
            raise FileExistsError(f"{path} was not written by this command, or was edited: move it away to have a card")
    if NOTICE in text:
        if not notice.exists():
            write_atomic(notice, NOTICE + "\n")
        elif NOTICE not in " ".join(notice.read_text("utf-8").split()):
            raise FileExistsError(f"{notice}: expected it to hold the sentence {NOTICE!r}")
    write_atomic(path, text)
    return path


# ---------- chapters/14_human_evaluation.py · The card of Meta's weights

@one_line_errors()
def cli(prog: str = "python -m llama2lib.card"):
    "python -m llama2lib.card --model FOLDER …: write the model card of a folder of weights (A.7)."
    import tyro

    print(run(tyro.cli(CardConfig, prog=prog)))


if __name__ == "__main__":
    cli()
