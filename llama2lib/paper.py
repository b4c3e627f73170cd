"""Generated from chapters/10_toolbox.py by chapters/export.py; edit the chapter."""

__all__ = [
    "Grid",
    "number",
    "parse",
    "PAPER",
    "SIZES",
    "TEXT",
    "Item",
    "inventory",
    "ITEMS",
    "column",
]


# ---------- chapters/10_toolbox.py · The paper's numbers, once

from typing import NamedTuple

Grid = dict[str, dict[str, float | None]]


def number(text: str) -> float | None:
    "A printed cell as a number: `-` is an empty cell, `2/3` a fraction, a cell of digits an int."
    if text == "-":
        return None
    if "/" in text:
        top, bottom = text.split("/")
        return int(top) / int(bottom)
    return int(text) if text.isdigit() else float(text)

def parse(text: str) -> dict[str, Grid]:
    """Read grids, as {table: {row: {column: value}}}.

    A header line is `Table 7, Table 8 | columns of 7 | columns of 8`; one without a name continues it. Lines that start
    with `#` are remarks. A row that comes twice, or has more or fewer cells than the header, raises ValueError.
    """
    tables: dict[str, Grid] = {}
    names, header = [], []
    for line in filter(None, text.splitlines()):
        row, *groups = (part.strip() for part in line.split("|"))
        cells = [group.split() for group in groups]
        if line.startswith("#"):
            continue
        if not row:
            header = [above + more for above, more in zip(header, cells, strict=True)]
        elif row.startswith(("Table ", "Figure ")):
            names, header = row.split(", "), cells
        elif [len(group) for group in cells] != [len(group) for group in header] or len(cells) != len(names):
            raise ValueError(f"{row}: expected as many cells as columns in {names}, {header}, found {line!r}")
        else:
            for name, columns, values in zip(names, header, cells, strict=True):
                grid = tables.setdefault(name, {})
                if row in grid:
                    raise ValueError(f"{name}: the row {row!r} comes twice")
                grid[row] = dict(zip(columns, map(number, values), strict=True))
    return tables


# ---------- chapters/10_toolbox.py · Section 2: pretraining

PAPER: dict[str, Grid] = {}

PAPER |= parse("""
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


# ---------- chapters/10_toolbox.py · Appendix A.2: ablations and benchmarks

PAPER |= parse("""
Table 16 | NarrativeQA Qasper QuALITY QMSum-R1 QMSum-R2 QMSum-RL ContractNLI SQuAD-EM SQuAD-F1
2k       |  0.21  0.71 26.1  0.13 0.01  0.12 11.76 57.23 62.89
4k       | 17.26 18.52 29.6 15.08 3.55 12.16 16.33 57.99 64.46

Table 17 | HellaSwag NQ TQA GSM8K HumanEval
2k       | 75.1 25.5 53.7 4.9 7.9
4k       | 74.8 25.5 52.2 6.5 7.3

Table 18 | BoolQ PIQA SIQA HellaSwag ARC-e ARC-c NQ TQA MMLU GSM8K HumanEval
MHA      | 71.0 79.3 48.2 75.1 71.2 43.0 12.4 44.7 28.0 4.9 7.9
MQA      | 70.6 79.0 47.9 74.5 71.6 41.9 14.5 42.8 26.5 4.8 7.3
GQA      | 69.4 78.8 48.6 75.4 72.1 42.5 14.0 46.2 26.9 5.3 7.9

# The last point of each curve before memory runs out.
Figure 24    | latency_ms QPS batch
256, MHA     |  89 45    512
256, MQA/GQA | 160 50   1024
2k, MHA      | 124 4.05   64
2k, MQA      | 215 4.6   128
2k, GQA      | 224 4.45  128

Table 20, Table 21, Table 25 | BoolQ PIQA SIQA HellaSwag WinoGrande ARC-e ARC-c OBQA CSQA MMLU | |
                             | | HumanEval@1 HumanEval@100 MBPP@1 MBPP@80 | GSM8K MATH
MPT 7B                       | 75.0 80.6 48.5 76.4 68.3 70.2 42.6 51.4 21.3 26.8 | 18.3    - 22.6    - |  6.8  3.0
MPT 30B                      | 79.0 81.9 48.9 79.9 71.0 76.5 50.6 52.0 58.2 46.9 | 25.0    - 32.8    - | 15.2  3.1
Falcon 7B                    | 67.5 76.7 47.2 74.1 66.3 70.0 42.4 51.6 20.8 26.2 |  0.0    - 11.2    - |  6.8  2.3
Falcon 40B                   | 83.1 82.4 50.1 83.6 76.9 79.2 54.5 56.6 70.4 55.4 |  0.6    - 29.8    - | 19.6  5.5
Llama 1 7B                   | 76.5 79.8 48.9 76.1 70.1 72.8 47.6 57.2 33.6 35.1 | 10.5 36.5 17.7 56.2 | 11.0  2.9
Llama 1 13B                  | 78.1 80.1 50.4 79.2 73.0 74.8 52.7 56.4 62.0 46.9 | 15.8 52.5 22.0 64.0 | 17.8  3.9
Llama 1 33B                  | 83.1 82.3 50.4 82.8 76.0 80.0 57.8 58.6 72.5 57.8 | 21.7 70.7 30.2 73.4 | 35.6  7.1
Llama 1 65B                  | 85.3 82.8 52.3 84.2 77.0 78.9 56.0 60.2 74.0 63.4 | 23.7 79.3 37.7 76.8 | 50.9 10.6
Llama 2 7B                   | 77.4 78.8 48.3 77.2 69.2 75.2 45.9 58.6 57.8 45.3 | 12.8 45.6 20.8 62.8 | 14.6  2.5
Llama 2 13B                  | 81.7 80.5 50.3 80.7 72.8 77.3 49.4 57.0 67.3 54.8 | 18.3 60.2 30.6 69.0 | 28.7  3.9
Llama 2 34B                  | 83.7 81.9 50.9 83.3 76.7 79.4 54.5 58.2 74.3 62.6 | 22.6 77.2 33.0 76.1 | 42.2 6.24
Llama 2 70B                  | 85.0 82.8 50.7 85.3 80.2 80.2 57.4 60.2 78.5 68.9 | 29.9 89.0 45.0 81.4 | 56.8 13.5
""")

PAPER |= parse("""
Table 22, Table 23 | NQ-0 NQ-1 NQ-5 NQ-64 TQA-0 TQA-1 TQA-5 TQA-64 | SQuAD-0 SQuAD-1 SQuAD-4 SQuAD-5 QuAC-0 QuAC-1
MPT 7B             | 11.6 17.8 20.8 22.7 55.7 59.6 61.2 61.6 | 59.5 62.8 62.6 62.7 38.0 37.7
MPT 30B            | 15.8 23.0 26.6 29.3 68.0 71.3 73.3 73.6 | 74.7 74.2 72.4 74.2 40.4 41.1
Falcon 7B          | 15.7 18.1 21.0 24.0 52.6 56.8 64.6 61.1 | 16.4 16.0 16.9 17.5 24.0 18.8
Falcon 40B         | 26.3 29.5 33.5 35.5 74.6 78.6 79.9 79.6 | 72.9 73.1 71.7 71.0 41.2 43.3
Llama 1 7B         | 16.8 18.7 22.0 26.1 63.3 67.4 70.4 71.0 | 60.0 62.3 63.3 62.8 38.9 32.0
Llama 1 13B        | 20.1 23.4 28.1 31.9 70.1 74.4 77.1 77.9 | 68.9 68.4 66.4 66.7 39.9 36.5
Llama 1 33B        | 24.9 28.3 32.9 36.0 78.7 80.7 83.8 83.6 | 75.5 77.0 76.3 75.6 44.1 40.3
Llama 1 65B        | 23.8 31.0 35.0 39.9 81.7 84.5 85.9 86.0 | 79.4 80.0 78.3 77.9 41.0 39.8
Llama 2 7B         | 16.4 22.7 25.7 29.5 65.8 68.9 72.1 73.7 | 67.2 72.3 72.6 72.5 39.4 39.7
Llama 2 13B        | 16.1 28.0 31.2 34.6 73.1 77.2 79.6 79.4 | 72.9 72.1 70.6 71.3 42.7 44.8
Llama 2 34B        | 25.1 30.0 32.8 39.9 81.0 83.3 84.5 84.6 | 77.4 78.8 77.5 77.5 42.9 44.4
Llama 2 70B        | 25.3 33.0 39.5 44.3 82.4 85.0 87.6 87.5 | 80.7 82.6 81.9 81.9 42.4 49.3

Table 24    | Avg AQuA LogiQA LSAT-AR LSAT-LR LSAT-RC SAT-en SAT-en-no-passage SAT-math
MPT 7B      | 23.5 27.6 23.0 18.7 21.2 20.8 25.2 32.5 23.6
MPT 30B     | 33.8 28.0 28.7 23.9 35.1 37.9 63.1 36.9 27.7
Falcon 7B   | 21.2 21.7 22.3 16.1 17.3 20.4 26.2 23.8 26.4
Falcon 40B  | 37.0 18.5 36.4 19.6 40.2 45.7 58.7 58.7 32.7
Llama 1 7B  | 23.9 18.9 24.6 26.1 19.2 21.9 33.0 32.5 22.3
Llama 1 13B | 33.9 20.1 34.9 22.2 31.6 39.8 52.9 45.1 29.5
Llama 1 33B | 41.7 18.9 37.3 18.7 48.0 59.5 74.8 44.7 35.0
Llama 1 65B | 47.6 23.6 42.1 23.9 56.7 63.6 83.0 48.1 41.8
Llama 2 7B  | 29.3 23.2 31.0 23.9 22.4 32.7 43.2 37.4 28.2
Llama 2 13B | 39.1 21.7 38.1 23.0 41.0 54.6 62.1 46.1 27.3
Llama 2 34B | 43.4 19.3 40.7 21.3 47.5 62.1 77.2 49.0 32.7
Llama 2 70B | 54.2 23.2 48.8 25.7 70.2 76.6 86.9 53.4 41.8
""")


# ---------- chapters/10_toolbox.py · Appendix A.4 and A.6: truthfulness, toxicity, sentiment, contamination

PAPER |= parse("""
Table 45           | Asian Mexican Muslim physical Jewish Middle-Eastern
                   | Chinese mental Latino Native-American Women Black LGBTQ
MPT 7B             | 15.40 33.55 23.54 17.09 26.12 23.20 16.25 17.63 28.40 19.52 24.34 25.04 20.03
MPT 30B            | 15.74 31.49 19.04 21.68 26.82 30.60 13.87 24.36 16.51 32.68 15.56 25.21 20.32
Falcon 7B          |  9.06 18.30 17.34  8.29 19.40 12.99 10.07 10.26 18.03 15.34 17.32 16.75 15.73
Falcon 40B         | 19.59 29.61 25.83 13.54 29.85 23.40 25.55 29.10 23.20 17.31 21.05 23.11 23.52
Llama 1 7B         | 16.65 30.72 26.82 16.58 26.49 22.27 17.16 19.71 28.67 21.71 29.80 23.01 19.37
Llama 1 13B        | 18.80 32.03 25.18 14.72 28.54 21.11 18.76 15.71 30.42 20.52 27.15 25.21 21.85
Llama 1 33B        | 16.87 32.24 21.53 16.24 28.54 22.04 19.91 18.27 29.88 18.13 25.90 24.53 19.37
Llama 1 65B        | 14.27 31.59 21.90 14.89 23.51 22.27 17.16 18.91 28.40 19.32 28.71 22.00 20.03
Llama 2 7B         | 16.53 31.15 22.63 15.74 26.87 19.95 15.79 19.55 25.03 18.92 21.53 22.34 20.20
Llama 2 13B        | 21.29 37.25 22.81 17.77 32.65 24.13 21.05 20.19 35.40 27.69 26.99 28.26 23.84
Llama 2 34B        | 16.76 29.63 23.36 14.38 27.43 19.49 18.54 17.31 26.38 18.73 22.78 21.66 19.04
Llama 2 70B        | 21.29 32.90 25.91 16.92 30.60 21.35 16.93 21.47 30.42 20.12 31.05 28.43 22.35
ChatGPT            |   .23   .22   .18     0   .19     0   .46     0   .13     0   .47     0   .66
MPT-instruct 7B    | 15.86 28.76 11.31  9.64 18.84 14.62 15.33 16.51  25.3 13.94 12.95 17.94 11.26
Falcon-instruct 7B |  6.23  9.15  6.02  7.28 11.19  6.73  8.01  7.53  8.61  8.57  9.05  7.78  6.46
Llama 2-Chat 7B    |     0     0     0     0     0     0     0     0     0     0     0     0     0
Llama 2-Chat 13B   |     0     0     0     0     0     0     0     0     0     0     0     0     0
Llama 2-Chat 34B   |   .11     0     0   .17     0     0     0     0     0     0     0     0     0
Llama 2-Chat 70B   |     0     0     0     0     0     0     0     0     0     0   .16     0     0

Table 44, Table 46, Table 47, Table 48 | both true informative | Asian African European Hispanic | actors actresses |
                                       | | | | Judaism Christianity Islam Buddhism Sikhism
MPT 7B                                 | 29.13 36.72 92.04 | .38 .34 .25 .39 | .30 .43 | .39 .38 .31 .27 .07
MPT 30B                                | 35.25 40.27 94.74 | .38 .28 .23 .33 | .29 .41 | .33 .28 .20 .30 .19
Falcon 7B                              | 25.95 29.01 96.08 | .36 .29 .26 .47 | .21 .33 | .25 .35 .20 .25 .22
Falcon 40B                             | 40.39 44.80 95.23 | .36 .32 .29 .48 | .29 .37 | .26 .28 .26 .31 .19
Llama 1 7B                             | 27.42 32.31 94.86 | .41 .32 .28 .46 | .31 .46 | .37 .30 .24 .38 .17
Llama 1 13B                            | 41.74 45.78 95.72 | .40 .32 .26 .45 | .29 .43 | .36 .26 .30 .37 .13
Llama 1 33B                            | 44.19 48.71 95.23 | .39 .32 .26 .46 | .26 .44 | .35 .27 .29 .20 .18
Llama 1 65B                            | 48.71 51.29 96.82 | .41 .34 .27 .44 | .30 .44 | .37 .27 .20 .30 .19
Llama 2 7B                             | 33.29 39.53 93.02 | .38 .33 .27 .43 | .29 .42 | .34 .28 .30 .24 .16
Llama 2 13B                            | 41.86 45.65 96.08 | .42 .31 .28 .45 | .32 .44 | .29 .33 .35 .33 .19
Llama 2 34B                            | 43.45 46.14  96.7 | .40 .34 .28 .42 | .25 .45 | .31 .24 .32 .34 .28
Llama 2 70B                            | 50.18 53.37 96.21 | .42 .34 .28 .52 | .28 .44 | .42 .29 .34 .37 .20
ChatGPT                                | 78.46 79.92 98.53 | .18 .16 .15 .19 | .55 .65 | .19 .16 .21 .17 .17
MPT-instruct 7B                        | 29.99 35.13 94.37 | .38 .32 .29 .32 | .31 .38 | .35 .29 .33 .41 .14
Falcon-instruct 7B                     | 28.03 41.00 85.68 | .40 .34 .30 .36 | .32 .36 | .34 .26 .30 .33 .29
Llama 2-Chat 7B                        | 57.04 60.59 96.45 | .55 .43 .40 .49 | .48 .56 | .55 .50 .48 .45 .62
Llama 2-Chat 13B                       | 62.18 65.73 96.45 | .51 .40 .38 .49 | .46 .53 | .40 .50 .71 .40 .62
Llama 2-Chat 34B                       |  67.2 70.01 97.06 | .46 .40 .35 .39 | .44 .47 | .44 .54 .63 .53 .53
Llama 2-Chat 70B                       | 64.14 67.07 97.06 | .51 .43 .40 .49 | .44 .49 | .47 .52 .50 .55 .50

Table 49           | left right communism socialism democracy liberalism
                   | populism conservatism nationalism anarchism capitalism fascism
MPT 7B             | .20 .31 .20 .33 .31 .59 .19 .52 .26 .10 .35 -.15
MPT 30B            | .19 .29 .12 .31 .26 .59 .40 .61 .25 .24 .30 -.17
Falcon 7B          | .05 .18 .16 .28 .28 .40 .18 .51 .23 .21 .27  .11
Falcon 40B         | .24 .18 .29 .25 .30 .51 .10 .50 .25 .19 .28 -.13
Llama 1 7B         | .16 .22 .17 .35 .30 .35 .15 .37 .18 .17 .20 -.23
Llama 1 13B        | .18 .09 .26 .29 .26 .53 .10 .49 .20 .16 .15 -.21
Llama 1 33B        | .22 .18 .26 .27 .28 .50 .06 .55 .26 .09 .29 -.26
Llama 1 65B        | .11 .20 .27 .35 .31 .52 .21 .59 .25 .19 .33 -.25
Llama 2 7B         | .15 .30 .12 .35 .25 .43 .18 .38 .16 .12 .29 -.13
Llama 2 13B        | .14 .35 .23 .29 .23 .57 .20 .52 .22 .12 .29 -.17
Llama 2 34B        | .12 .16 .18 .36 .35 .52 .10 .54 .28 .11 .30 -.19
Llama 2 70B        | .16 .21 .17 .35 .30 .60 .18 .67 .26 .12 .30 -.10
ChatGPT            | .15 .22 .05 .24 .31 .35 .09 .42 .19 .09 .23  .06
MPT-instruct 7B    | .13 .29 .12 .34 .35 .53 .28 .56 .27 .02 .32 -.12
Falcon-instruct 7B | .11 .21 .21 .28 .34 .23 .31 .45 .23 .22 .29 -.27
Llama 2-Chat 7B    | .28 .51 .29 .44 .59 .75 .28 .75 .55 .26 .50 -.19
Llama 2-Chat 13B   | .35 .49 .45 .49 .49 .72 .30 .67 .54 .36 .50  .16
Llama 2-Chat 34B   | .30 .51 .36 .48 .56 .76 .28 .75 .53 .34 .54  .02
Llama 2-Chat 70B   | .34 .56 .28 .56 .64 .78 .27 .76 .55 .34 .57 -.01
""")

PAPER |= parse("""
Table 50           | metalworking sewing healthcare computer film artistic scientific entertainer dance
                   | nursing writing drivers engineering mental-health theatre corporate industrial railway
MPT 7B             | .24 .28 .38 .53 .35 .36 .23 .33 .33 .53 .32 .13 .22 .29 .43 .59 .36 .38
MPT 30B            | .23 .18 .34 .48 .37 .30 .24 .31 .31 .45 .32 .17 .21 .29 .38 .46 .29 .24
Falcon 7B          | .22 .23 .35 .42 .35 .32 .22 .30 .26 .46 .31 .23 .20 .32 .37 .52 .19 .26
Falcon 40B         | .24 .27 .30 .44 .41 .36 .25 .32 .31 .47 .29 .05 .25 .40 .44 .57 .30 .29
Llama 1 7B         | .27 .26 .34 .54 .36 .39 .26 .28 .33 .45 .33 .17 .24 .31 .44 .57 .39 .35
Llama 1 13B        | .24 .24 .31 .52 .37 .37 .23 .28 .31 .50 .27 .10 .24 .27 .41 .55 .34 .25
Llama 1 33B        | .23 .26 .34 .50 .36 .35 .24 .33 .34 .49 .31 .12 .23 .30 .41 .60 .28 .27
Llama 1 65B        | .25 .26 .34 .46 .36 .40 .25 .32 .32 .48 .31 .11 .25 .30 .43 .60 .39 .34
Llama 2 7B         | .28 .25 .29 .50 .36 .37 .21 .34 .32 .50 .28 .19 .26 .32 .44 .51 .30 .25
Llama 2 13B        | .24 .25 .35 .50 .41 .36 .24 .39 .35 .48 .31 .18 .27 .34 .46 .66 .35 .28
Llama 2 34B        | .27 .24 .33 .56 .41 .36 .26 .32 .36 .53 .33 .07 .26 .30 .45 .56 .26 .35
Llama 2 70B        | .31 .29 .35 .51 .41 .45 .27 .34 .40 .52 .36 .12 .28 .31 .45 .65 .33 .20
ChatGPT            | .65 .62 .64 .84 .77 .75 .53 .71 .73 .75 .73 .54 .55 .69 .71 .82 .57 .57
MPT-instruct 7B    | .22 .19 .28 .44 .27 .26 .19 .28 .30 .46 .24 .05 .20 .39 .33 .48 .20 .19
Falcon-instruct 7B | .36 .31 .48 .62 .48 .45 .31 .47 .40 .57 .43 .19 .30 .56 .47 .63 .49 .48
Llama 2-Chat 7B    | .44 .42 .45 .71 .54 .54 .33 .54 .53 .55 .62 .29 .36 .58 .53 .61 .36 .37
Llama 2-Chat 13B   | .37 .37 .41 .52 .44 .45 .29 .46 .49 .50 .48 .29 .31 .58 .41 .58 .33 .40
Llama 2-Chat 34B   | .40 .37 .43 .59 .54 .49 .32 .48 .50 .58 .53 .25 .34 .60 .50 .63 .44 .40
Llama 2-Chat 70B   | .47 .43 .49 .67 .60 .55 .38 .54 .56 .61 .58 .28 .39 .67 .56 .70 .43 .47

# Contamination: subset size n, mean score of the subset, mean and z-score under random subsets of that size.
Table 51                        | min_len contaminated n score mu z
HellaSwag, 70B, clean           | 40     0  7391 80.0 82.5 -5.73
HellaSwag, 70B, not clean       | 40  67.5  2651 89.5 82.4  9.56
HellaSwag, 70B, not dirty       | 40  11.5  9194 81.6 82.5 -2.27
HellaSwag, 70B, dirty           | 40  86.1   848 92.2 82.5  7.42
HellaSwag, 7B, clean            | 40     0  7391 70.5 73.3 -5.46
HellaSwag, 7B, not clean        | 40  67.5  2651 81.3 73.4  9.17
HellaSwag, 7B, not dirty        | 40  11.5  9194 72.4 73.4 -2.06
HellaSwag, 7B, dirty            | 40  86.1   848 83.7 73.3  6.84
MMLU-Humanities, 70B, clean     | 50  0.05  3996 62.2 65.3 -4.08
MMLU-Humanities, 70B, not clean | 50 85.12   709 82.7 65.3  9.71
MMLU-Humanities, 70B, not dirty | 50  2.73  4185 62.7 65.3 -3.50
MMLU-Humanities, 70B, dirty     | 50  94.5   520 85.8 65.3  9.80
MMLU-Humanities, 7B, clean      | 50  0.05  3996 40.8 42.9 -2.75
MMLU-Humanities, 7B, not clean  | 50  85.2   709 54.9 42.8  6.50
MMLU-Humanities, 7B, not dirty  | 50  2.73  4185 41.1 42.9 -2.25
MMLU-Humanities, 7B, dirty      | 50  94.5   520 56.9 42.8  6.49
MMLU-Overall, 70B, clean        | 50  0.02 11862 68.0 68.9 -2.00
MMLU-Overall, 70B, not clean    | 50  84.7  2180 73.5 68.9  4.64
MMLU-Overall, 70B, not dirty    | 50  3.18 12506 67.7 68.9 -2.75
MMLU-Overall, 70B, dirty        | 50  94.4  1536 78.2 68.9  7.87

Table 52   | gpu_hours_M tco2eq tokens_T annotations_M
all models | 3.3 539 2 1
""")


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
    "Section 3.4.1": {"safety_prompts": 1586, "helpfulness_prompts": 584, "raters": 3, "likert": 7},
    "Section 3.4.2": {"ac2": (0.37, 0.55), "prompts": 4000, "raters": 3, "likert": 7},
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
                    "lengths": (10, 20, 30, 40, 50), "z": 2, "hours": 7, "cores": 1500},
}


# ---------- chapters/10_toolbox.py · What there is to reproduce

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

def column(grid: Grid, name: str) -> dict[str, float | None]:
    "One column of a grid, {row: cell}; rows whose header lacks the column are left out."
    return {row: cells[name] for row, cells in grid.items() if name in cells}
