"""Generated from chapters/10_toolbox.py by chapters/export.py; edit the chapter."""

__all__ = [
    "Item",
    "inventory",
    "ITEMS",
]


# ---------- chapters/10_toolbox.py · What there is to reproduce

from typing import NamedTuple


class Item(NamedTuple):
    title: str
    section: str
    source: str     # 'printed', 'chart' (approximate) or 'none'


def inventory(kind: str, text: str) -> dict[str, Item]:
    "Lines `number | section | source | title` as {'Table 1': Item, ...}."
    rows = [[part.strip() for part in line.split("|")] for line in text.strip().splitlines()]
    return {f"{kind} {n}": Item(title, f"Section {section}", source) for n, section, source, title in rows}

ITEMS: dict[str, Item] = inventory("Table", """
 1 | 2.2   | printed | The model family: context, attention, tokens, learning rate
 2 | 2.2.1 | printed | GPU hours, power and carbon of pretraining
 3 | 2.3   | printed | Base models on grouped academic benchmarks
 4 | 2.3   | printed | The 70B base model beside closed models
 5 | 3.1   | none    | One helpfulness and one safety annotation for SFT
 6 | 3.2.1 | printed | Preference datasets: sizes and lengths
 7 | 3.2.2 | printed | Reward models against baselines, by test set
 8 | 3.2.2 | printed | Reward model accuracy by preference rating
 9 | 4.1   | printed | Pronouns and identity terms in the pretraining data
10 | 4.1   | printed | Languages of the pretraining data
11 | 4.1   | printed | Truthfulness and toxicity of base models
12 | 4.2.3 | none    | A scam e-mail request before and after safety RLHF
13 | 4.2.4 | none    | Context distillation: generic preprompt or answer template
14 | 4.4   | printed | Truthfulness and toxicity of fine-tuned models
15 | 5.1   | printed | Arithmetic word problems with a calculator
16 | A.2.1 | printed | Context 2k or 4k: tasks with long inputs
17 | A.2.1 | printed | Context 2k or 4k: general tasks
18 | A.2.1 | printed | Multi-head, multi-query and grouped-query attention
19 | A.2.2 | printed | MMLU by category
20 | A.2.2 | printed | Commonsense and knowledge benchmarks one by one
21 | A.2.2 | printed | HumanEval and MBPP
22 | A.2.2 | printed | NaturalQuestions and TriviaQA by number of shots
23 | A.2.2 | printed | SQuAD and QuAC by number of shots
24 | A.2.2 | printed | AGIEval, English tasks
25 | A.2.2 | printed | GSM8K and MATH
26 | A.3.1 | printed | Meta's preference data by weekly batch
27 | A.3.3 | printed | Margin m(r) by preference rating
28 | A.3.3 | printed | Ablation of the margin in the ranking loss
29 | A.3.4 | printed | Ablation of the auxiliary safety loss
30 | A.3.5 | printed | Ghost Attention: recall by dialogue turn
31 | A.3.7 | none    | System prompts of the human evaluation
32 | A.3.7 | printed | Prompts of the human evaluation, counted
33 | A.3.7 | none    | Helpfulness prompts, examples
34 | A.3.7 | none    | Five models answer one prompt
35 | A.4.1 | printed | Two answers on which the reward models disagree
36 | A.4.2 | printed | Roast jokes: answers as safety data grows
37 | A.4.2 | printed | Pizza persona: answers as safety data grows
38 | A.4.2 | printed | A dessert with a suspicious name: answers as safety data grows
39 | A.4.4 | none    | Safety preprompts for context distillation
40 | A.4.5 | none    | Errors of context distillation
41 | A.4.5 | none    | False refusals, examples
42 | A.4.6 | none    | Safety evaluation prompts by risk category
43 | A.4.6 | none    | Four models answer one adversarial prompt
44 | A.4.8 | printed | TruthfulQA: truthful, informative, both
45 | A.4.8 | printed | ToxiGen by group
46 | A.4.8 | printed | BOLD sentiment by race
47 | A.4.8 | printed | BOLD sentiment by gender
48 | A.4.8 | printed | BOLD sentiment by religion
49 | A.4.8 | printed | BOLD sentiment by political ideology
50 | A.4.8 | printed | BOLD sentiment by profession
51 | A.6   | printed | Benchmarks that contamination may have helped
52 | A.7   | printed | Model card
""")

ITEMS |= inventory("Figure", """
 1 | 1     | printed | Human judgement of helpfulness, six pairings
 2 | 1     | chart   | GPT-4 judges helpfulness and safety
 3 | 1     | chart   | Human judgement of safety violations
 4 | 1     | none    | From pretraining to Llama 2-Chat, a diagram
 5 | 2.2   | chart   | Training loss over 2T tokens
 6 | 3.2.2 | chart   | Reward model accuracy by data and model size
 7 | 3.2.3 | chart   | Maximum and median reward of N samples
 8 | 3.2.3 | chart   | Best reward of N samples by temperature, SFT and RLHF
 9 | 3.3   | none    | An emoji instruction without and with Ghost Attention
10 | 3.3   | none    | Attention maps without and with Ghost Attention
11 | 3.4.1 | chart   | Win rates of eight model versions against ChatGPT
12 | 3.4.2 | chart   | Human judgement by single and multiple turns
13 | 4.1   | chart   | Toxicity of pretraining documents
14 | 4.2.3 | none    | Reward scores before and after safety RLHF
15 | 4.2.3 | chart   | Reward scores by amount of safety data
16 | 4.2.4 | chart   | Safety scores under context distillation
17 | 4.4   | chart   | Safety violations and ratings of ten models
18 | 4.4   | chart   | Safety violations by single and multiple turns
19 | 4.4   | chart   | Safety violations by risk category
20 | 5.1   | none    | Reward distribution from SFT to RLHF
21 | 5.1   | chart   | Self-BLEU by temperature, factual and creative prompts
22 | 5.1   | none    | Answers that depend on a stated year
23 | 5.1   | none    | A chain of tool calls without training for it
24 | A.2.1 | chart   | Throughput and latency of attention variants
25 | A.3.1 | chart   | Preference ratings by weekly batch
26 | A.3.2 | chart   | Reward of samples by annotation batch
27 | A.3.3 | chart   | Reward distribution by margin
28 | A.3.5 | none    | Ghost Attention on unseen constraints
29 | A.3.6 | chart   | Reward score by human rating
30 | A.3.7 | chart   | Effect of ChatGPT's system prompt; wins by category
31 | A.3.7 | chart   | Win rate by number of turns and of words
32 | A.4.1 | chart   | Safety score against helpfulness score
33 | A.4.5 | chart   | False refusals by amount of safety data
""")
ITEMS |= inventory("Equation", """
 1 | 3.2.2 | none | Ranking loss of the reward model
 2 | 3.2.2 | none | Ranking loss with a margin
 3 | 3.2.3 | none | Objective of reinforcement learning
 4 | 3.2.3 | none | Reward with a KL penalty
""")
