"""Generated from chapters/10_toolbox.py by chapters/export.py; edit the chapter."""

__all__ = [
    "PAPER",
    "SIZES",
    "TEXT",
]


# ---------- chapters/10_toolbox.py · Section 2: pretraining

from llama2lib.appendix import APPENDIX
from llama2lib.grids import Grid, parse

PAPER: dict[str, Grid] = parse("""
# Contexts as printed (2k, 4k); gqa 1 = yes; tokens in trillions.
Table 1     | context_k gqa tokens_T lr
Llama 1 7B  | 2 0 1.0 3.0e-4
Llama 1 13B | 2 0 1.0 3.0e-4
Llama 1 33B | 2 0 1.4 1.5e-4
Llama 1 65B | 2 0 1.4 1.5e-4
Llama 2 7B  | 4 0 2.0 3.0e-4
Llama 2 13B | 4 0 2.0 3.0e-4
Llama 2 34B | 4 1 2.0 1.5e-4
Llama 2 70B | 4 1 2.0 1.5e-4

Table 2 | gpu_hours watts tco2eq
7B      |  184320 400  31.22
13B     |  368640 400  62.44
34B     | 1038336 350 153.90
70B     | 1720320 400 291.42
Total   | 3311616   - 539.00

Table 3, Table 11, Table 19 | Code Commonsense World Reading Math MMLU BBH AGI | TruthfulQA ToxiGen |
                            | | | Humanities STEM Social Other Avg
MPT 7B                      | 20.5 57.4 41.0 57.5  4.9 26.8 31.0 23.5 | 29.13 22.32 | 26.7 25.3 27.1 28.2 26.8
MPT 30B                     | 28.9 64.9 50.0 64.7  9.1 46.9 38.0 33.8 | 35.25 22.61 | 44.5 39.0 52.8 52.9 46.9
Falcon 7B                   |  5.6 56.1 42.8 36.0  4.6 26.2 28.0 21.2 | 25.95 14.53 | 26.4 26.2 24.7 27.4 26.2
Falcon 40B                  | 15.2 69.2 56.7 65.7 12.6 55.4 37.1 37.0 | 40.39 23.44 | 49.3 45.5 65.4 65.0 55.4
Llama 1 7B                  | 14.1 60.8 46.2 58.5 6.95 35.1 30.3 23.9 | 27.42 23.00 | 34.0 30.5 38.3 38.1 35.1
Llama 1 13B                 | 18.9 66.1 52.6 62.3 10.9 46.9 37.0 33.9 | 41.74 23.08 | 45.0 35.8 53.8 53.3 46.9
Llama 1 33B                 | 26.0 70.0 58.4 67.6 21.4 57.8 39.8 41.7 | 44.19 22.57 | 55.8 46.0 66.7 63.4 57.8
Llama 1 65B                 | 30.7 70.7 60.5 68.6 30.8 63.4 43.5 47.6 | 48.71 21.77 | 61.8 51.7 72.9 67.4 63.4
Llama 2 7B                  | 16.8 63.9 48.9 61.3 14.6 45.3 32.6 29.3 | 33.29 21.25 | 42.9 36.4 51.2 52.2 45.3
Llama 2 13B                 | 24.5 66.9 55.4 65.8 28.7 54.8 39.4 39.1 | 41.86 26.10 | 52.8 44.1 62.6 61.1 54.8
Llama 2 34B                 | 27.8 69.9 58.7 68.0 24.2 62.6 44.1 43.4 | 43.45 21.19 | 59.4 52.1 71.8 69.2 62.6
Llama 2 70B                 | 37.5 71.9 63.6 69.4 35.2 68.9 51.2 54.2 | 50.18 24.60 | 65.0 58.0 80.3 74.6 68.9

Table 4          | GPT-3.5 GPT-4 PaLM PaLM-2-L Llama-2-70B
MMLU 5-shot      | 70.0 86.4 69.3 78.3 68.9
TriviaQA 1-shot  |    -    - 81.4 86.1 85.0
NQ 1-shot        |    -    - 29.3 37.5 33.0
GSM8K 8-shot     | 57.1 92.0 56.5 80.7 56.8
HumanEval 0-shot | 48.1 67.0 26.2    - 29.9
BBH 3-shot       |    -    - 52.3 65.7 51.2

Figure 5            | 7B   13B  34B  70B
nats per token, end | 1.74 1.67 1.57 1.50
""")


# ---------- chapters/10_toolbox.py · Section 3: preferences, rewards, Ghost Attention, human evaluation

PAPER |= parse("""
Table 6            | comparisons turns tokens_example tokens_prompt tokens_response
Anthropic Helpful  |  122387 3.0 251.5  17.7  88.4
Anthropic Harmless |   43966 3.0 152.5  15.7  46.4
OpenAI Summarize   |  176625 1.0 371.1 336.0  35.1
OpenAI WebGPT      |   13333 1.0 237.2  48.3 188.9
StackExchange      | 1038480 1.0 440.2 200.1 240.2
Stanford SHP       |   74882 1.0 338.3 199.5 138.8
Synthetic GPT-J    |   33139 1.0 123.3  13.0 110.3
Meta               | 1418091 3.9 798.5  31.4 234.1
Total              | 2919326 1.6 595.7 108.2 216.9

Table 7        | Meta-Helpful Meta-Safety Anthropic-Helpful Anthropic-Harmless OpenAI-Summ SHP Avg
SteamSHP-XL    | 52.8 43.8 66.8 34.2 54.7 75.7 55.3
OpenAssistant  | 53.8 53.4 67.7 68.4 71.7 55.0 63.0
GPT-4          | 58.6 58.1    -    -    -    -    -
Safety RM      | 56.2 64.5 55.4 74.7 71.7 65.2 64.3
Helpfulness RM | 63.2 62.8 72.0 71.0 75.5 80.0 70.6

Table 8                        | significantly better slightly negligibly Avg
Safety RM on Meta Safety       | 94.3 76.3 65.7 55.3 64.5
Helpfulness RM on Meta Safety  | 89.9 73.2 63.8 54.5 62.8
Safety RM on Meta Helpful      | 64.6 57.5 53.8 52.2 56.2
Helpfulness RM on Meta Helpful | 80.7 67.5 60.9 54.7 63.2

Table 26 | comparisons turns tokens_example tokens_prompt tokens_response
1        |    5561 4.4  547.1 25.2 159.3
2        |   17072 4.0  554.6 22.4 170.7
3        |   30146 3.9  603.3 19.6 195.5
4        |   36206 3.9  652.8 45.3 182.9
5        |   49375 3.7  603.9 46.7 163.1
6        |   57746 4.1  654.5 28.2 198.1
7        |   84388 3.9  662.2 27.5 210.0
8        |   95235 3.6  670.4 32.9 212.1
9        |  127235 3.6  674.9 31.3 214.8
10       |  136729 3.7  723.9 30.5 230.2
11       |  136868 3.8  811.9 32.2 251.1
12       |  181293 3.9  817.0 30.8 250.9
13       |  210881 4.2  905.9 30.3 255.6
14       |  249356 4.3 1008.0 31.6 258.9
total    | 1418091 3.9  798.5 31.4 234.1

Table 27 | significantly better slightly negligibly
small    | 1 2/3 1/3 0
large    | 3 2 1 0

Table 28 | significantly better slightly negligibly Avg
none     | 79.1 66.9 59.8 54.5 62.5
small    | 80.4 67.3 60.4 55.0 63.0
large    | 80.7 67.5 60.5 54.3 62.9

Table 29    | Avg safe_over_unsafe both_safe both_unsafe unsafe_recall
baseline    | 63.7 93.0 56.0 59.5 73.0
+ auxiliary | 64.5 94.3 56.9 59.9 90.4

Table 30 | baseline GAtt
2        | 100 100
4        |  10 100
6        |   0 100
20       |   0 100

Table 32 | single multi
ChatGPT  | 1917 2256
PaLM     | 1869 2143
Falcon   | 1917 1960
MPT      | 1917 1293
Vicuna   | 1917 1390
""")

PAPER |= parse("""
Figure 1, Figure 12 single, Figure 12 multi | win tie loss     | win tie loss     | win tie loss
7B vs MPT-7B-chat                           | 61.1 20.9 18.0 | 61.6 18.5 19.8 | 60.4 23.7 15.9
13B vs Vicuna-13B                           | 45.4 29.8 24.9 | 44.2 28.0 27.8 | 47.2 32.7 19.8
34B vs Vicuna-33B                           | 37.2 31.6 31.2 | 35.6 30.2 34.3 | 38.6 32.7 28.4
34B vs Falcon-40B-instruct                  | 76.3 14.6  9.1 | 83.0 10.1  6.9 | 62.9 23.3 13.6
70B vs PaLM-Bison                           | 53.0 24.6 22.4 | 51.7 23.9 24.3 | 54.3 25.4 20.5
70B vs ChatGPT-0301                         | 35.9 31.5 32.5 | 36.0 31.0 33.0 | 35.8 32.1 32.1

# The opponent's win rate against 70B-chat, judged by GPT-4.
Figure 2            | helpfulness safety
ChatGPT-0301        | 46 33
PaLM-Bison          | 34 10
Falcon-40B-instruct |  5  4

# Accuracy per weekly batch, on all test pairs and on the 'significantly better' ones.
Figure 6 |    1    2    3    4    5    6    7    8    9   10   11   12   13   14
all 7B   | .514 .534 .562 .562 .577 .584 .586 .591 .596 .600 .606 .606 .606 .610
all 13B  | .512 .572 .581 .588 .591 .597 .593 .604 .599 .609 .609 .608 .614 .603
all 70B  | .512 .552 .583 .588 .607 .610 .614 .619 .623 .623 .626 .622 .635 .632
sig 7B   | .502 .567 .623 .629 .665 .675 .687 .684 .705 .705 .725 .738 .734 .738
sig 13B  | .492 .655 .674 .688 .692 .708 .716 .724 .735 .735 .745 .757 .755 .755
sig 70B  | .508 .610 .686 .714 .747 .757 .764 .777 .777 .785 .790 .798 .813 .810

Figure 6 lines | all significant
GPT-4          | .586 .743
OpenAssistant  | .538 .586

Figure 7 |    1    2    4    8   16   20
max      | .542 .585 .618 .643 .664 .669
median   | .542 .542 .545 .546 .546 .546

# Best reward of N samples, a row per model and temperature.
Figure 8 |    1    2    4    8   16   32   64  100
SFT 0.6  |  .37    -    -    - .561 .584 .610 .624
SFT 0.8  | .381 .451    -    -    -    -    -  .64
SFT 0.9  | .372 .443 .499 .546    -    -    -  .64
SFT 1.0  | .359 .431 .489 .537 .576 .609 .637 .652
SFT 1.1  | .334 .404 .465 .521 .561 .595 .624 .641
SFT 1.2  | .268 .347 .417 .475 .523 .561 .593 .611
SFT 1.3  | .178 .246 .313 .376 .429 .476 .516 .539
SFT 1.4  | .099 .146 .200 .253 .307 .360 .404 .428
SFT 1.5  | .060 .090 .125 .165 .208 .252 .293 .320
RLHF 0.6 |  .54    - .612 .640 .658 .676 .685 .694
RLHF 0.8 |    -    -    -    -    - .684 .701 .709
RLHF 0.9 | .544    -    -    -    - .687 .703 .715
RLHF 1.0 | .541    -    -    -    -    - .706 .716
RLHF 1.1 | .534 .589 .630 .660    -    -    -  .72
RLHF 1.2 | .524 .581 .627    -    -    - .706  .72
RLHF 1.3 | .499 .570 .618 .654 .681 .703 .721 .731
RLHF 1.4 | .441 .530 .592 .637 .670 .694 .713 .724
RLHF 1.5 | .337 .439 .525 .589 .634 .667 .694 .708

# Win rate against ChatGPT; left: our reward models judge, right: GPT-4 does.
Figure 11 left, Figure 11 right | helpful harmless | helpful harmless
SFT-v1                          | 38.9 21.9 | 13.1 10.1
SFT-v2                          | 54.0 47.8 | 33.6 32.2
RLHF-v1                         | 61.2 47.9 | 41.8 43.2
RLHF-v2                         | 62.7 44.6 | 42.2 31.9
RLHF-v3                         | 65.2 53.7 | 48.5 38.1
RLHF-v4                         | 66.9 59.5 | 47.5 46.1
RLHF-v5 no PPO                  | 70.2 67.6 | 55.4 55.3
RLHF-v5 + PPO                   | 78.4 75.8 | 67.4 61.2
""")

PAPER |= parse("""
Figure 25     |    1    2    3    4    5    6    7    8    9   10   11   12   13   14
significantly | 18.4 15.4 11.5 11.9 11.6 11.0 11.7 10.4  9.8  9.2  9.4  8.9  9.1  9.1
better        | 27.7 28.8 30.5 29.3 24.9 25.4 26.2 24.5 24.5 22.8 22.8 20.5 23.0 21.2
slightly      | 29.0 27.7 33.3 33.6 31.3 30.7 30.5 30.2 30.4 30.7 29.9 30.2 31.2 31.3
negligibly    | 24.9 28.2 24.8 25.4 32.2 33.0 31.5 34.9 35.4 37.3 37.9 40.4 36.8 38.4

Figure 26 |    1    2   12
max       | .806 .813 .657
median    | .680 .689 .443

# Share (%) of scores in a bin 0.02 wide: at 0, in the middle, near 1.
Figure 27 | bottom middle top
none      |   -   - 1.8
small     | 1.3   - 2.4
large     | 3.7 0.4 8.3

# Mean reward score by the median human rating, 1 to 7.
Figure 29      |    1    2    3    4    5    6    7
Helpfulness RM | .239 .320 .337 .404 .446 .500 .552
Safety RM      | .288 .426 .470 .557 .642 .717 .778

# 70B against ChatGPT; the two rows on the system prompt have their win rates in the text too.
Figure 30             |  win  tie loss
without system prompt |   44 29.5 26.5
with system prompt    |   36 31.5 32.5
dialogue              | 37.3 30.9 31.4
writing               | 29.8 30.9 38.9
factual questions     | 39.8 32.5 27.4
language assistance   | 33.1 25.2 41.3
recommendations       | 35.1 39.8 25.0

Figure 31          |    1  2  3    4  5
win, word quintile | 32.5 36 32 37.5 36
""")


# ---------- chapters/10_toolbox.py · Sections 4 and 5: safety, temperature, tools

PAPER |= parse("""
# Share (%) of documents; in 9b `any` is the axis's share of documents, the others are shares within the axis.
Table 9a | gendered she he unspecified any_person first second third
all      | 75.23 28.45 50.73 86.38 94.47 70.71 61.80 93.07

Table 9b       |  any  female male feminine transgender masculine
gender and sex |  5.91 50.0 39.1 5.4 4.2 3.1
Table 9b       |  any  gay lesbian lgbt lgbtq queer
orientation    |  6.67 14.8 4.3 4.0 3.6 3.5
Table 9b       |  any  american indian chinese korean mexican
nationality    | 14.83 69.4 16.5 16.3 5.1 4.9
Table 9b       |  any  european african asian latin indigenous
race           | 19.51 20.7 11.5 7.4 6.2 3.7
Table 9b       |  any  christian religious spiritual catholic jewish
religion       |  7.93 33.2 28.8 20.6 15.4 13.0

Table 10 | en unknown de fr sv zh es ru nl it ja pl pt vi uk ko ca sr id cs fi hu no ro bg da sl hr
% | 89.70 8.38 .17 .16 .15 .13 .13 .13 .12 .11 .10 .09 .09 .08 .07 .06 .04 .04 .03 .03 .03 .03 .03 .03 .02 .02 .01 .01

Table 14           | TruthfulQA ToxiGen
ChatGPT            | 78.46  0.20
Falcon-instruct 7B | 28.03  7.89
MPT-instruct 7B    | 29.99 16.33
Llama 2-Chat 7B    | 57.04  0.00
Llama 2-Chat 13B   | 62.18  0.00
Llama 2-Chat 34B   | 67.20  0.02
Llama 2-Chat 70B   | 64.14  0.01

Table 15     | ASDiv SVAMP MAWPS
OPT-66B      |  6.0  4.9  7.9
GPT-J        |  7.5  5.2  9.9
GPT-J + CC   |  9.6  5.0  9.3
GPT-3        | 14.0 10.0 19.8
Toolformer   | 40.4 29.4 44.0
Llama 2-Chat | 67.1 69.2 82.4

# Scores of one prompt's answer as the safety data grows (% of it); the first answer of Table 36 is blank.
Table 35           | safety helpfulness
Ponzi explanation  | .21 .98
car fraud, refused | .95 .20

Table 36, Table 37, Table 38 | safety helpfulness | safety helpfulness | safety helpfulness
0                            |   -   - | .58 .84 | .53 .18
1                            | .05 .65 | .63 .92 | .47 .18
10                           | .18 .66 | .62 .83 | .73 .14
25                           | .91 .48 | .74 .91 | .83 .11
50                           | .94 .41 | .44 .81 | .89 .09
100                          | .93 .38 | .70 .04 | .92 .07

Figure 13 | first_bin toxic
fraction  | 0.3 0.002

# By percent of the safety data: mean scores of the two reward models, and false refusals (%) on two prompt sets.
Figure 15, Figure 33 | safety helpfulness | helpfulness_set borderline_set
0                    | .680 .586 | .0064 15.0
1                    | .693 .586 | .0128 16.7
10                   | .724 .584 | .0256 17.8
25                   | .739 .585 | .0256 21.7
50                   | .763 .584 | .0512 23.3
100                  | .774 .583 | .0512 27.2

Figure 16a         |   Q1 median   Q3
base               |  .52    .75  .89
generic preprompt  |  .68    .82 .905
template preprompt | .715    .87  .93

# Violation % with its 95 % bar and the mean rating; then violation % by kind of dialogue.
Figure 17, Figure 18 | violation low high rating | single multi
Llama 2-Chat 7B      |  3.2  2.4  3.9 4.59 |  1.5  6.5
Llama 2-Chat 13B     |  3.2  2.4  3.9 4.55 |  2.4  4.3
Llama 2-Chat 34B     |  7.0  5.8  8.2 4.45 |  3.3 14.3
Llama 2-Chat 70B     |  3.9  3.0  4.8 4.58 |  1.7  8.2
MPT-chat 7B          | 20.5 18.8 22.3 3.79 | 13.5 35.9
Vicuna 13B           | 25.2 23.2 27.4 3.69 | 18.3 41.3
Vicuna 33B           | 37.8 35.5 40.2 3.40 | 31.7 50.0
Falcon-instruct 40B  |  7.5  6.3  8.7 3.88 |  0.2 24.6
PaLM-Bison           | 28.5 26.5 30.5 3.63 | 23.2 41.1
ChatGPT-0301         |  6.8  5.8  7.9 4.21 |  3.2 14.4

Figure 19        | unqualified
Llama 2-Chat 7B  |  6.5
Llama 2-Chat 13B |  8.5
Llama 2-Chat 34B | 11.5
Llama 2-Chat 70B |  7

# Self-BLEU by temperature.
Figure 21    |  0.4  0.5  0.6  0.7  0.8  0.9  1.0  1.1  1.2  1.3  1.4
factual SFT  | 94.8 95.6 94.0 93.0 92.5 91.7 89.8 87.4 83.4 81.1 77.0
factual v1   | 97.1 96.9 96.2 95.2 94.6 94.4 93.5 92.6 88.4 87.0 83.0
factual v2   | 98.1 97.6 96.9 96.8 96.7 96.2 95.0 95.2 92.5 90.3 87.7
factual v3   | 97.6 98.4 97.5 97.9 97.3 96.9 96.8 96.4 95.4 95.6 93.3
creative SFT | 93.2 93.1 91.8 91.3 89.6 89.5 87.6 84.8 82.5 77.2 75.6
creative v1  | 94.7 94.0 93.9 93.7 92.4 91.3 88.8 88.5 86.6 83.1 80.3
creative v2  | 95.5 95.2 94.5 94.4 94.3 93.0 91.9 91.0 88.5 86.6 82.5
creative v3  | 95.9 95.7 95.1 94.9 93.8 93.7 93.2 91.8 91.1 88.6 85.4

Figure 32    | safety helpfulness
safe, peak   | .7  .35
unsafe, peak | .05 .25
""")
PAPER["Figure 3"] = PAPER["Figure 17"]      # the same bars, shown twice


# ---------- chapters/10_toolbox.py · Appendix A.4 and A.6: truthfulness, toxicity, sentiment, contamination

PAPER |= APPENDIX


# ---------- chapters/10_toolbox.py · Constants stated in the text

SIZES = ("7B", "13B", "34B", "70B")

TEXT: dict[str, dict] = {
    "Section 2.2": {
        "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.1, "grad_clip": 1.0,
        "warmup_steps": 2000, "final_lr": 0.1,                      # cosine, down to this share of the peak
        "batch_tokens": 4_000_000, "tokens": 2_000_000_000_000, "max_seq_len": 4096, "vocab_size": 32_000,
        "lr": {size: PAPER["Table 1"][f"Llama 2 {size}"]["lr"] for size in SIZES},
        "gqa": {size: bool(PAPER["Table 1"][f"Llama 2 {size}"]["gqa"]) for size in SIZES},
    },
    "Section 2.2.1": {"gpu_hours_M": 3.3, "tco2eq": 539, "tdp_watts": (400, 350), "max_gpus": 2000, "gbps": 200},
    "Section 3.1": {
        "annotations": 27_540, "audited": 180,
        "lr": 2e-5, "weight_decay": 0.1, "batch_size": 64, "max_seq_len": 4096, "epochs": 2,
    },
    "Section 3.2.1": {"safety_bins": {"chosen_safe": 0.18, "both_safe": 0.47, "both_unsafe": 0.35}},
    "Section 3.2.2": {
        "epochs": 1, "lr": {"7B": 1e-5, "13B": 1e-5, "34B": 1e-5, "70B": 5e-6}, "final_lr": 0.1,
        "warmup": 0.03, "min_warmup_steps": 5, "batch_pairs": 512, "batch_rows": 1024, "held_out_per_batch": 1000,
        "helpfulness_mix": {"Meta Helpful": 0.5, "Meta Safety and open data": 0.5},
        "safety_mix": {"Meta Safety and Anthropic Harmless": 0.9, "helpfulness data": 0.1},
    },
    "Section 3.2.3": {
        "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.1, "grad_clip": 1.0, "lr": 1e-6,
        "batch_size": 512, "minibatch_size": 64, "steps_per_minibatch": 1, "clip": 0.2,
        "kl_beta": {"7B": 0.01, "13B": 0.01, "34B": 0.005, "70B": 0.005}, "iterations": (200, 400),
        "seconds_per_iteration": {"70B": 330}, "generation_slowdown": 20,
        "safety_gate": 0.15, "gate_precision": 0.89, "gate_recall": 0.55, "best_temperature": (1.2, 1.3),
    },
    "Section 3.3": {"gatt_turns": 20, "short_instructions": 0.5},
    "Section 3.4.1": {"safety_prompts": 1586, "helpfulness_prompts": 584, "raters": 3, "likert": 7,
                      "ahead_of_chatgpt_from": "RLHF-v3", "wins_by_gpt4_above": 60},
    "Section 3.4.2": {"ac2": (0.37, 0.55), "prompts": 4000, "raters": 3, "likert": 7,
                      "wins_above": {"34B vs Vicuna-33B": 75, "34B vs Falcon-40B-instruct": 75},
                      "wins": {"7B vs MPT-7B-chat": 60}},
    "Section 4.1": {"toxic_documents": 0.002, "toxicity_threshold": 0.5, "sample": 0.1, "language_threshold": 0.5,
                    "temperature": 0.1, "top_p": 0.9},
    "Section 4.2.3": {"helpfulness_samples": 900_000, "safety_samples": 100_000, "epochs": 2,
                      "safety_data": (0, 0.01, 0.1, 0.25, 0.5, 1)},
    "Section 4.3": {"people": 350, "violations_per_hour": (1.8, 0.45), "rejected_again": 0.9, "risk_points": 5},
    "Section 4.4": {"single_turn": 1351, "multi_turn": 623, "categories": (935, 728, 311), "violation_at_most": 2,
                    "raters": 3, "agreement": (0.70, 0.95), "ac2": 0.92},
    "Section 5.1": {"prompts": {"creative": 10, "factual": 10}, "samples": 25, "time_examples": 1000},
    "Section A.2.1": {"tokens": 150_000_000_000, "kv_heads": {"MQA": 1, "GQA": 8},
                      "ffn_factor": {"MQA": 1.33, "GQA": 1.3}, "output_tokens": 128},
    "Section A.2.2": {"top_p": 0.95, "temperature": {"pass@1": 0.1, "pass@100": 0.8}},
    "Section A.4.5": {"borderline_prompts": 210},
    "Section A.4.7": {"truthfulqa_questions": 817, "truthfulqa_categories": 38, "truthfulqa_shots": 6,
                      "toxigen_groups": 13, "bold_prompts": 23_679, "bold_domains": 5, "bold_subgroups": 43},
    "Section A.6": {"min_len": 10, "skip_budget": 4, "exact_prefix": 10, "clean_below": 0.2, "dirty_from": 0.8,
                    "lengths": (10, 20, 30, 40, 50), "z": 2, "hours": 7, "cores": 1500,
                    "overall_delta": -0.9},
}
