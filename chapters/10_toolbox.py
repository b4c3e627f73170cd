# %% [markdown]
# # The toolbox
#
# > The paper's numbers as data, a ledger of verdicts, intervals, a cache, a launcher, one style for figures: what every
# > other chapter leans on.
#
# Nothing here is a language model. `paper` states what was printed, `ledger` sets our measurement beside it and
# computes the verdict, `plots` draws both so that nobody mixes them up. `recipes` keeps what was trained, `stats` says
# how sure we are, and `launch` starts several processes from a cell.

# %% [markdown]
# ## The paper's numbers, once
#
# A number typed twice will differ one day. So each table and figure is transcribed here once, under its own name
# (`"Table 9a"`, `"Figure 7"`), as the printed grid: a header line with the name and the columns, a line per row, and
# `-` where the paper leaves the cell empty. Tables over the same rows stand side by side, parted by `|`.

# %%
#| export grids
Grid = dict[str, dict[str, float | None]]


def number(text: str) -> float | None:
    "A printed cell as a number: `-` is an empty cell, `2/3` a fraction, a cell of digits an int."
    if text == "-":
        return None
    if "/" in text:
        top, bottom = text.split("/")
        return int(top) / int(bottom)
    return int(text) if text.isdigit() else float(text)

# %%
#| export grids
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

# %%
parse("""
Table 21, Table 25 | HumanEval MBPP | GSM8K
Llama 2 7B         |      12.8 20.8 |  14.6
Falcon 7B          |       0.0 11.2 |     -
""")

# %% [markdown]
# One helper reads a column.

# %%
#| export grids
def column(grid: Grid, name: str) -> dict[str, float | None]:
    "One column of a grid, {row: cell}; rows whose header lacks the column are left out."
    return {row: cells[name] for row, cells in grid.items() if name in cells}

# %% [markdown]
# `PAPER` holds them all and grows section by section. What is read off a chart carries an error of about ±0.3 points
# for bars and ±0.5 % of the axis for lines; `ITEMS`, further down, says which values those are.
#
# ### Section 2: pretraining
#
# Beside Table 3 stand the tables that share its rows: 11 (truthfulness, toxicity) and 19 (MMLU by category).

# %%
#| export paper
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

# %%
column(PAPER["Table 2"], "tco2eq")

# %% [markdown]
# ### Section 3: preferences, rewards, Ghost Attention, human evaluation

# %%
#| export paper
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

# %% [markdown]
# Figures 1 and 12 count wins, ties and losses of Llama 2-Chat against another model. Figure 8's empty cells are points
# hidden where its curves overlap.

# %%
#| export paper
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

# %%
#| export paper
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

# %% [markdown]
# ### Sections 4 and 5: safety, temperature, tools

# %%
#| export paper
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

# %% [markdown]
# ### Appendix A.2: ablations and benchmarks

# %%
#| export appendix
from llama2lib.grids import Grid, parse

APPENDIX: dict[str, Grid] = parse("""
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

# %%
#| export appendix
APPENDIX |= parse("""
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

# %% [markdown]
# ### Appendix A.4 and A.6: truthfulness, toxicity, sentiment, contamination

# %%
#| export appendix
APPENDIX |= parse("""
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

# %%
#| export appendix
APPENDIX |= parse("""
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

# %%
#| export paper
PAPER |= APPENDIX

# %% [markdown]
# ### Constants stated in the text
#
# Settings that stand in prose rather than in a table, by section. The batch is printed as 4M tokens; 1,024 sequences of
# 4,096 tokens would be 4,194,304.

# %%
#| export paper
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

# %% [markdown]
# ### What there is to reproduce
#
# All 52 tables, 33 figures and 4 numbered equations, each with its section and the source of the numbers held here:
# `printed` in the paper, read off a `chart` (so approximate), or `none` (an example, a schematic, a formula).

# %%
#| export inventory
from typing import NamedTuple


class Item(NamedTuple):
    title: str
    section: str
    source: str     # 'printed', 'chart' (approximate) or 'none'


def inventory(kind: str, text: str) -> dict[str, Item]:
    "Lines `number | section | source | title` as {'Table 1': Item, ...}."
    rows = [[part.strip() for part in line.split("|")] for line in text.strip().splitlines()]
    return {f"{kind} {n}": Item(title, f"Section {section}", source) for n, section, source, title in rows}

# %%
#| export inventory
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

# %%
#| export inventory
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

# %%
kinds = [item.split()[0] for item in ITEMS]
assert [kinds.count(kind) for kind in ("Table", "Figure", "Equation")] == [52, 33, 4]
held = {" ".join(key.split()[:2]).rstrip("ab") for key in PAPER}
assert held == {item for item, (_, _, source) in ITEMS.items() if source != "none"}

# %% [markdown]
# ### Does the transcription hold together?
#
# The paper's tables repeat and sum up one another, so many digits can be checked against others. Where two disagree and
# both are as printed, the slip is the paper's, and worth knowing before anything is measured. First, repeated columns.

# %%
for model, cells in PAPER["Table 3"].items():
    assert cells["MMLU"] == PAPER["Table 19"][model]["Avg"] == PAPER["Table 20"][model]["MMLU"]
    assert cells["AGI"] == PAPER["Table 24"][model]["Avg"]
for key in ("Table 11", "Table 14"):
    assert all(cells["TruthfulQA"] == PAPER["Table 44"][model]["both"] for model, cells in PAPER[key].items())
assert PAPER["Table 26"]["total"] == PAPER["Table 6"]["Meta"]
assert PAPER["Table 4"]["HumanEval 0-shot"]["Llama-2-70B"] == PAPER["Table 21"]["Llama 2 70B"]["HumanEval@1"]

# %% [markdown]
# Table 3 averages the benchmarks of appendix A.2.2. All its groups come out, to rounding, except *Math* of Llama 2 7B
# and 13B: there the paper prints the GSM8K score alone.

# %%
PARTS = {
    "Code": (("Table 21", "HumanEval@1"), ("Table 21", "MBPP@1")),
    "Commonsense": tuple(("Table 20", name) for name in
                         ("PIQA", "SIQA", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA", "CSQA")),
    "World": (("Table 22", "NQ-5"), ("Table 22", "TQA-5")),
    "Reading": (("Table 23", "SQuAD-0"), ("Table 23", "QuAC-0"), ("Table 20", "BoolQ")),
    "Math": (("Table 25", "GSM8K"), ("Table 25", "MATH")),
}
odd = {}
for model, cells in PAPER["Table 3"].items():
    for group, parts in PARTS.items():
        mean = sum(PAPER[key][model][name] for key, name in parts) / len(parts)
        if abs(mean - cells[group]) > 0.0501:
            odd[model, group] = round(mean, 2)
assert odd == {("Llama 2 7B", "Math"): 8.55, ("Llama 2 13B", "Math"): 16.3}
assert all(PAPER["Table 3"][model]["Math"] == PAPER["Table 25"][model]["GSM8K"] for model, _ in odd)
odd

# %% [markdown]
# Sums: Table 26 adds up to its total, Tables 2 and 6 do not, by 0.02 t and by 1,577 comparisons. One constant explains
# every row of Table 2: 1.1 × 0.385 = 0.4235 kg of CO2 per kWh.

# %%
sums = {key: sum(list(column(PAPER[key], name).values())[:-1])
        for key, name in (("Table 2", "tco2eq"), ("Table 6", "comparisons"), ("Table 26", "comparisons"))}
assert sums["Table 26"] == PAPER["Table 26"]["total"]["comparisons"]
assert sums["Table 6"] == PAPER["Table 6"]["Total"]["comparisons"] + 1577 == 2_920_903
assert round(sums["Table 2"], 2) == 538.98 != PAPER["Table 2"]["Total"]["tco2eq"]
assert sum(PAPER["Table 2"][size]["gpu_hours"] for size in SIZES) == PAPER["Table 2"]["Total"]["gpu_hours"]
for size in SIZES:
    row = PAPER["Table 2"][size]
    assert abs(row["gpu_hours"] * row["watts"] * 0.4235e-6 - row["tco2eq"]) < 0.01
sums

# %% [markdown]
# Weighted averages: MMLU's weights are the questions per category (4,705, 3,153, 3,077, 3,107), AGIEval's the questions
# per task. The counts are the benchmarks' own; Llama 1's MMLU rows miss by up to 0.2 points. Falcon
# 40B misses its AGIEval average by a point; its *SAT-en without passage* repeats the cell before it. Table 7's last
# column is no plain mean, and no weighting is stated.

# %%
def weighted(cells, weights):
    return sum(cells[name] * weight for name, weight in weights.items()) / sum(weights.values())

MMLU = {"Humanities": 4705, "STEM": 3153, "Social": 3077, "Other": 3107}
AGI = {"AQuA": 254, "LogiQA": 651, "LSAT-AR": 230, "LSAT-LR": 510, "LSAT-RC": 269, "SAT-en": 206,
       "SAT-en-no-passage": 206, "SAT-math": 220}
subsets = [PAPER["Table 51"][f"MMLU-Overall, 70B, {subset}"]["n"] for subset in ("clean", "not clean")]
assert sum(MMLU.values()) == sum(subsets) == 14042
mmlu_off = {model: abs(weighted(cells, MMLU) - cells["Avg"]) for model, cells in PAPER["Table 19"].items()}
assert max(mmlu_off.values()) < 0.21 and max(mmlu_off[f"Llama 2 {size}"] for size in SIZES) < 0.05
off = {model: round(weighted(cells, AGI), 1) for model, cells in PAPER["Table 24"].items()
       if abs(weighted(cells, AGI) - cells["Avg"]) > 0.1}
assert off == {"Falcon 40B": 38.1}
for cells in PAPER["Table 7"].values():
    *scores, average = cells.values()
    assert None in scores or 0.05 < abs(sum(scores) / 6 - average) < 1.5

# %% [markdown]
# Human evaluation: Figure 1 pools the single and multi-turn shares of Figure 12 by the prompt counts of Table 32, but
# for one count, and the text claims a win rate that the figure does not have. Chapter 14 shows both.
#
# Contamination: with a standard error of sqrt(p (1 - p) / n) every z of Table 51 comes back to within 0.15.

# %%
for cells in PAPER["Table 51"].values():
    p = cells["mu"] / 100
    z = (cells["score"] / 100 - p) / (p * (1 - p) / cells["n"]) ** 0.5
    assert abs(z - cells["z"]) < 0.15

# %% [markdown]
# Three large tables check themselves. TruthfulQA has 817 questions, so every cell of Table 44 is a multiple of
# 1/817. The overall ToxiGen score of Tables 11 and 14 is the plain mean of the 13 groups of Table 45. Two
# complementary subsets of Table 51 pool to the mean of the whole.

# %%
for cells in PAPER["Table 44"].values():
    assert all(abs(score * 8.17 - round(score * 8.17)) < 0.06 for score in cells.values())
for model, cells in (PAPER["Table 11"] | PAPER["Table 14"]).items():
    assert abs(sum(PAPER["Table 45"][model].values()) / 13 - cells["ToxiGen"]) < 0.0051
for half, other in (("clean", "not clean"), ("not dirty", "dirty")):
    for dataset in {name.rsplit(", ", 1)[0] for name in PAPER["Table 51"]}:
        one, two = (PAPER["Table 51"][f"{dataset}, {subset}"] for subset in (half, other))
        assert abs((one["n"] * one["score"] + two["n"] * two["score"]) / (one["n"] + two["n"]) - one["mu"]) < 0.06

# %% [markdown]
# Table 6 gives averages too. Where every dialogue has one turn, prompt and response make up the example; over all rows,
# weighted by comparisons, there are 2.5 turns, not the 1.6 of the total.

# %%
*rows, total = PAPER["Table 6"].values()
assert all(abs(r["tokens_prompt"] + r["tokens_response"] - r["tokens_example"]) < 0.11 for r in rows if r["turns"] == 1)
turns = sum(r["turns"] * r["comparisons"] for r in rows) / sum(r["comparisons"] for r in rows)
assert round(turns, 1) == 2.5 != total["turns"]

# %% [markdown]
# The rest, one line each: the ratings of a batch sum to 100 % (Figure 25); throughput is batch / (128 × latency)
# (Figure 24); the 7B model's gains in section 4.1 are relative, one of them off by 0.04; the *large* margin of Table 28
# is not quite the helpfulness model of Table 8; borderline refusals come in 180ths, though the text counts 210 prompts
# (Figure 33); the prompts of the three risk categories are the single- and multi-turn ones; a refusal appears at 25 %
# of the safety data, before the 50 % the text names (Table 36).

# %%
assert all(abs(sum(grid[b] for grid in PAPER["Figure 25"].values()) - 100) < 0.3 for b in map(str, range(1, 15)))
assert all(abs(c["batch"] / 128 / (c["latency_ms"] / 1e3) / c["QPS"] - 1) < 0.02 for c in PAPER["Figure 24"].values())
llama1, llama2 = PAPER["Table 11"]["Llama 1 7B"], PAPER["Table 11"]["Llama 2 7B"]
assert round(100 * (llama2["TruthfulQA"] / llama1["TruthfulQA"] - 1), 2) == 21.41      # text: 21.37
assert round(100 * (1 - llama2["ToxiGen"] / llama1["ToxiGen"]), 2) == 7.61
final, large = PAPER["Table 8"]["Helpfulness RM on Meta Helpful"], PAPER["Table 28"]["large"]
assert {name for name in final if final[name] != large[name]} == {"slightly", "negligibly", "Avg"}
refusals = [cell / 100 * 180 for cell in column(PAPER["Figure 33"], "borderline_set").values()]
assert [round(n) for n in refusals] == [27, 30, 32, 39, 42, 49] and all(abs(n - round(n)) < 0.07 for n in refusals)
assert TEXT["Section 4.4"]["single_turn"] + TEXT["Section 4.4"]["multi_turn"] == sum(TEXT["Section 4.4"]["categories"])
assert PAPER["Table 36"]["25"]["safety"] > 0.9 > PAPER["Table 36"]["10"]["safety"]

# %% [markdown]
# ## The ledger
#
# One row per claim: what the paper says, what we measured, by which criterion, and where the evidence lies. The
# verdict is computed from the rest, so that it cannot be typed in. The criterion is written before the run, in a
# small language:
#
# | criterion | needs | verdict |
# |---|---|---|
# | `= paper`, `= paper ± 0.01` | ours, recomputed | exact, or slip |
# | `preset` | ours equal to paper; evidence names the line | preset |
# | `> 0`, `< 0.05` | a difference with its 95 % interval, and its value for each seed | holds, fails or unclear |
# | `runs at scale` | evidence names a test | runs at scale |
# | `illustrated` | evidence is a file under figures/ | illustrated |
# | `not reproducible: why` | a reason | not reproducible |
#
# A claim in words that the paper's own tables can settle is an `= paper` too, with `True` on both sides.

# %%
#| export ledger
import hashlib
import json
import math
import os
import re
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tyro

from llama2lib.inventory import ITEMS
from llama2lib.recipes import ROOT, cache_folder, scale, write_atomic

STATUSES = (
    "exact", "slip", "preset", "holds", "fails", "unclear", "runs at scale", "illustrated", "not reproducible",
)
FIELDS = ("item", "claim", "criterion", "status", "paper", "ours", "interval", "seeds", "evidence", "measured")
Row = dict[str, Any]

# %% [markdown]
# ### From a measurement to a verdict
#
# A bound is met when the whole interval lies beyond it and so does every one of at least three seeds; it is missed
# when the whole interval lies on the other side. Anything else stays open.

# %%
#| export ledger
def compare_to_bound(relation: str, bound: float, interval: list[float], seeds: dict[str, float]) -> str:
    "'holds', 'fails' or 'unclear': is the effect `relation` ('>' or '<') the bound, by its interval and every seed?"
    def beyond(x: float) -> bool:
        return x > bound if relation == ">" else x < bound

    if len(seeds) < 3:
        return "unclear"
    if all(map(beyond, interval)) and all(map(beyond, seeds.values())):
        return "holds"
    return "unclear" if any(map(beyond, interval)) else "fails"

# %%
three = {"0": 0.2, "1": 0.1, "2": 0.3}
assert compare_to_bound(">", 0, [0.05, 0.35], three) == "holds"
assert compare_to_bound(">", 0, [0.05, 0.35], three | {"3": -0.01}) == "unclear"
assert compare_to_bound(">", 0.4, [0.05, 0.35], three) == "fails"
assert compare_to_bound("<", 0.4, [0.05, 0.35], {"0": 0.2}) == "unclear"

# %% [markdown]
# Recomputed values may be numbers, words, or lists and dictionaries of them; a tolerance applies to every number
# inside.

# %%
#| export ledger
def agree(paper: Any, ours: Any, tolerance: float) -> bool:
    "Whether two plain values have the same shape and differ by at most `tolerance`, and float rounding, per number."
    if isinstance(paper, dict) and isinstance(ours, dict):
        return paper.keys() == ours.keys() and all(agree(paper[key], ours[key], tolerance) for key in paper)
    if isinstance(paper, list) and isinstance(ours, list):
        return len(paper) == len(ours) and all(agree(p, o, tolerance) for p, o in zip(paper, ours, strict=True))
    if {type(paper), type(ours)} <= {int, float}:
        return abs(paper - ours) <= tolerance + 1e-12 * max(abs(paper), abs(ours))
    return type(paper) is type(ours) and paper == ours

# %%
assert agree(539.00, 538.98, 0.02) and not agree(539.00, 538.98, 0.01)
assert agree({"7B": [1, 2.0]}, {"7B": [1, 2]}, 0) and not agree({"7B": 1}, {"70B": 1}, 9)
assert agree(True, True, 0) and not agree(True, 1, 0)

# %%
#| export ledger
NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?"
GRAMMAR = (
    "= paper", "= paper ± 0.01", "preset", "> 0", "< 0.05", "runs at scale", "illustrated", "not reproducible: why",
)


def status_of(row: Row) -> str:
    "The verdict a row's criterion and measurement imply; ValueError when the row lacks what its criterion needs."
    criterion, paper, ours, evidence = row["criterion"], row["paper"], row["ours"], row["evidence"]

    def need(met: bool, what: str) -> None:
        if not met:
            raise ValueError(f"{row['item']}, {row['claim']!r}: the criterion {criterion!r} needs {what}")

    need(evidence is not None or criterion.startswith("not reproducible"), "evidence: 'path' or 'path::name'")
    if match := re.fullmatch(rf"= paper(?: ± ({NUMBER}))?", criterion):
        need(paper is not None and ours is not None, "paper and ours")
        return "exact" if agree(paper, ours, float(match[1] or 0)) else "slip"
    if match := re.fullmatch(rf"([<>]) (-?{NUMBER})", criterion):
        need(type(ours) in (int, float), f"ours to be one number, not {ours!r}")
        need(bool(row["interval"] and row["seeds"]), "an interval, and seeds as {seed: its effect}")
        low, high = row["interval"]
        need(low - 1e-9 <= ours <= high + 1e-9, f"ours inside its interval, not {ours!r} and {row['interval']}")
        effects = row["seeds"].values()
        need(min(effects) - 1e-9 <= ours <= max(effects) + 1e-9, f"ours among its seeds, not {ours!r}, {row['seeds']}")
        return compare_to_bound(match[1], float(match[2]), row["interval"], row["seeds"])
    if criterion == "preset":
        need(paper is not None and agree(paper, ours, 0), f"ours equal to paper, not {ours!r} and {paper!r}")
        need("::" in evidence, f"evidence that names the line, as in 'llama2lib/optim.py::eps', not {evidence!r}")
        return "preset"
    if criterion == "runs at scale":
        need(bool(re.fullmatch(r"tests/(\w+/)*test_\w+\.py::test_\w+", evidence)),
             f"evidence like 'tests/test_x.py::test_y', not {evidence!r}")
        return "runs at scale"
    if criterion == "illustrated":
        need(bool(re.fullmatch(r"figures/[\w.-]+", evidence)),
             f"evidence like 'figures/figure_09.png', not {evidence!r}")
        return "illustrated"
    if re.fullmatch(r"not reproducible: \S.*", criterion):
        return "not reproducible"
    raise ValueError(f"{row['item']}, {row['claim']!r}: unknown criterion {criterion!r}; expected one like {GRAMMAR}")

# %% [markdown]
# ### Evidence
#
# Evidence is `path` or `path::name` inside the repository, where `name` stands in the file as a word of its own.

# %%
#| export ledger
def missing_evidence(row: Row) -> str | None:
    "What a row's evidence names and the repository lacks, as one line; None when all is there."
    if row["evidence"] is None:
        return None
    path, _, name = row["evidence"].partition("::")
    file = (ROOT / path).resolve()
    if not file.is_relative_to(ROOT.resolve()) or Path(path).is_absolute():
        return f"{path} lies outside the repository"
    if not file.is_file():
        return f"there is no file {path}"
    left, right = (r"(?<!\w)" if name[:1].isalnum() else ""), (r"(?!\w)" if name[-1:].isalnum() else "")
    if name and not re.search(left + re.escape(name) + right, file.read_text("utf-8")):
        return f"{path} does not mention {name!r}"
    return None

# %% [markdown]
# ### Recording
#
# Chapters and long runs call `record`. It checks everything, computes the verdict and puts the row, one file each,
# into the cache; only `make ledger` carries rows from there into the repository. At the smoke scale nothing is
# stored.

# %%
#| export ledger
def plain(value: Any, what: str) -> Any:
    "`value` as JSON has it; 0-d arrays, tensors and tuples are welcome, other types, NaN and infinity a ValueError."
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    if value is None or isinstance(value, bool | str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return [plain(part, what) for part in value]
    if isinstance(value, dict) and all(hasattr(key, "__index__") or isinstance(key, str) for key in value):
        return {str(key): plain(part, what) for key, part in value.items()}
    raise ValueError(f"{what}: expected finite numbers, text, or lists and dictionaries of them, found {value!r}")


def judged(row: Row) -> Row:
    "`row` with its status computed; ValueError, saying what was expected, when a field is not of its kind."
    if list(row) != list(FIELDS):
        raise ValueError(f"expected a row with the fields {', '.join(FIELDS)}, found {', '.join(row)}")
    item, where = row["item"], f"{row['item']}, {row['claim']!r}"
    if item not in ITEMS and not re.fullmatch(r"Section ([1-7]|A)(\.\d+){0,2}", str(item)):
        raise ValueError(f"item: expected one like 'Table 9', 'Figure 13', 'Equation 2', 'Section 2.2', found {item!r}")
    for name in ("claim", "criterion", "evidence", "measured"):
        text = row[name]
        one_line = isinstance(text, str) and text.strip() and "\n" not in text
        if not one_line and not (name == "evidence" and text is None):
            raise ValueError(f"{where}: expected {name} to be one line of text, found {text!r}")
    interval, seeds = row["interval"], row["seeds"]
    if interval is not None and not (
        isinstance(interval, list) and [type(x) in (int, float) for x in interval] == [True, True]
        and interval[0] <= interval[1]
    ):
        raise ValueError(f"{where}: expected interval to be (low, high), found {interval!r}")
    if seeds is not None and not (isinstance(seeds, dict) and all(type(x) in (int, float) for x in seeds.values())):
        raise ValueError(f"{where}: expected seeds to be {{seed: its effect}}, found {seeds!r}")
    return row | {"status": status_of(row)}

# %%
#| export ledger
def rows_folder() -> Path:
    "Where rows wait to be merged; runs with seeds of their own (`LLAMA2_SEEDS`) have a folder of their own."
    chosen = os.environ.get("LLAMA2_SEEDS", "")
    return cache_folder() / ("ledger" + "-".join(["", *re.findall(r"\d+", chosen)]))


def row_file(item: str, claim: str) -> Path:
    "The cache file of one row: readable item, hash of the key."
    digest = hashlib.sha256(f"{item}\n{claim}".encode()).hexdigest()[:12]
    return rows_folder() / f"{re.sub(r'[^a-z0-9]+', '-', item.lower())}-{digest}.json"


def record(item: str, claim: str, criterion: str, paper: Any, ours: Any, interval: tuple[float, float] | None = None,
           seeds: dict[int, float] | None = None, evidence: str | None = None) -> Row:
    """Judge one claim, store its row in the cache (except at the smoke scale), and return the row.

    `ours`, `interval` (95 %, of the paired difference) and `seeds` ({seed: effect}) are in the unit of the bound.
    ValueError when a field does not fit the criterion, or when the evidence is not there.
    """
    values = {"item": item, "claim": claim, "criterion": criterion, "status": None, "paper": paper, "ours": ours,
              "interval": interval, "seeds": seeds, "evidence": evidence,
              "measured": datetime.now(UTC).isoformat(timespec="seconds")}
    row = judged({name: plain(value, f"{item}, {claim!r}: {name}") for name, value in values.items()})
    smoke = scale() == "smoke"
    gone = missing_evidence(row)
    if gone and not (smoke and row["evidence"].startswith("figures/")):     # smoke draws no figures
        raise ValueError(f"{item}, {claim!r}: {gone}")
    if not smoke:
        write_atomic(row_file(item, claim), as_json([row]))
    return row


def as_json(rows: list[Row]) -> str:
    "Rows as text: one field a line, so that a changed verdict is a changed line."
    return "[\n" + ",\n".join(
        "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in row.items()) + "\n}"
        for row in rows
    ) + "\n]\n"

# %% [markdown]
# Table 6 makes a first row: its counts do not add up to the printed total.

# %%
from llama2lib import ledger
from llama2lib.grids import column
from llama2lib.paper import PAPER

*parts, printed = column(PAPER["Table 6"], "comparisons").values()
row = ledger.record("Table 6", "the counts add up to the printed total", "= paper", paper=printed, ours=sum(parts),
                    evidence="tests/test_paper.py::test_sums")
assert row["status"] == "slip"
{name: row[name] for name in ("item", "criterion", "paper", "ours", "status")}

# %% [markdown]
# ### Merging
#
# `figures/ledger.json` is the committed ledger. Reading it judges every row again: a status edited by hand is an error.

# %%
#| export ledger
def read_rows(path: Path) -> dict[tuple[str, str], Row]:
    "The rows of a file by (item, claim); ValueError naming the file when it is damaged or a status does not follow."
    try:
        rows = json.loads(path.read_text("utf-8"))
        for row in rows:
            if judged(row)["status"] != row["status"]:
                raise ValueError(f"{row['claim']!r} has the status {row['status']!r}, its measurement another")
        keyed = {(row["item"], row["claim"]): row for row in rows}
        if len(keyed) != len(rows):
            raise ValueError(f"a claim comes twice in {sorted(row['claim'] for row in rows)}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error}); restore it, or delete it and record again") from error
    return keyed


def in_order(row: Row) -> tuple:
    "Sort key: tables, figures, equations, sections, each by number, then by claim, numbers in it by size."
    kind, number = row["item"].split(" ", 1)
    parts = [(part.isalpha(), part if part.isalpha() else int(part)) for part in number.split(".")]
    pieces = filter(None, re.split(r"(\d+)", row["claim"]))
    claim = [(piece.isdigit(), int(piece) if piece.isdigit() else piece) for piece in pieces]
    return ("Table", "Figure", "Equation", "Section").index(kind), parts, claim


def load() -> list[Row]:
    "All rows of figures/ledger.json, in order; empty before the first merge."
    path = ROOT / "figures" / "ledger.json"
    return sorted(read_rows(path).values(), key=in_order) if path.exists() else []

# %% [markdown]
# A newer row replaces the older one of the same claim. One that only repeats the old result keeps the old date, so
# that a second run of a chapter changes nothing. A row whose evidence is gone drops out, with a message. One whose cell
# is gone does so when all chapters have run (`since`); until then a test names it.

# %%
#| export ledger
def merge(compare: bool = False, since: str | None = None) -> list[Row]:
    """Merge the recorded rows into figures/ledger.json and rewrite figures/README.md and the README's ledger block.

    Args:
        compare: only report the verdicts that would flip, and write nothing.
        since: all chapters ran since this UTC time (ISO 8601); rows that none of them recorded are dropped.
    """
    book, current = {(row["item"], row["claim"]): row for row in load()}, set()
    for path in sorted(rows_folder().glob("*-????????????.json")):
        for key, row in read_rows(path).items():
            old = book.get(key)
            current |= {key} if since is None or row["measured"] >= since else set()
            if old and (row["measured"] < old["measured"] or row | {"measured": old["measured"]} == old):
                continue
            if old and old["status"] != row["status"]:
                print(f"{row['item']}, {row['claim']!r}: {old['status']} -> {row['status']}")
            book[key] = row
    for key, row in list(book.items()):
        if gone := missing_evidence(row) or (since and key not in current and "no chapter records it any more"):
            print(f"left out {row['item']}, {row['claim']!r}: {gone}")
            del book[key]
    rows = sorted(book.values(), key=in_order)
    if compare or scale() == "smoke":
        print(f"{len(rows)} rows compared, nothing written")
        return rows
    readme = with_block(ROOT / "README.md", summary(rows))
    write_atomic(ROOT / "figures" / "ledger.json", as_json(rows))
    write_atomic(ROOT / "figures" / "README.md", gallery(rows))
    write_atomic(ROOT / "README.md", readme)
    print(f"{len(rows)} rows in figures/ledger.json")
    return rows


def cli() -> None:
    "python -m llama2lib.ledger [--compare] [--since TIME]"
    tyro.cli(merge)

# %% [markdown]
# ### Showing it
#
# Two generated pages: a block of the README with a count per verdict and a line per row, and a gallery that puts each
# figure beside the claim it bears on.

# %%
#| export ledger
def cell(value: Any) -> str:
    "A value as the text of one Markdown table cell, at most about 80 characters."
    if isinstance(value, float | int) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
    if isinstance(value, list):
        text = ", ".join(map(cell, value))
    elif isinstance(value, dict):
        text = ", ".join(f"{key}: {cell(part)}" for key, part in value.items())
    else:
        text = {None: "–", True: "yes", False: "no"}.get(value, str(value))
    text = re.sub(r"(?<!\\)\|", r"\\|", text)
    return text if len(text) <= 80 or isinstance(value, str) else text[:79] + "…"


def table(header: list[str], lines: list[list[Any]]) -> str:
    "A Markdown table."
    rows = [header, ["---"] * len(header), *([cell(value) for value in line] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"

# %%
#| export ledger
def summary(rows: list[Row]) -> str:
    "The README's block: how many rows have each status."
    counts = Counter(row["status"] for row in rows)
    covered = len({row["item"] for row in rows} & ITEMS.keys())
    return (
        f"[{len(rows)} claims](figures/README.md) on {covered} of the paper's {len(ITEMS)} tables, figures and "
        "equations, each with our measurement and its verdict:\n\n"
        + table([*filter(counts.get, STATUSES)], [[*filter(None, map(counts.get, STATUSES))]])
    )


def with_block(path: Path, block: str, name: str = "ledger") -> str:
    "The text of `path` with `block` between the two markers of this name; ValueError when it lacks them."
    text = path.read_text("utf-8") if path.exists() else ""
    before, start, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not (start and end):
        raise ValueError(f"{path.name}: expected the two lines <!-- {name} --> and <!-- /{name} -->")
    return before + start + block + end + after

# %%
#| export ledger
def gallery(rows: list[Row]) -> str:
    "figures/README.md: every figure with the verdicts it bears on, then all rows, item by item."
    def title(item: str) -> str:
        return f"{item} · {ITEMS[item].title} ({ITEMS[item].section})" if item in ITEMS else item

    def shows(name: str) -> list[Row]:
        match = re.match(r"(table|figure|equation)_0*(\d+)(?!\d)", name)
        item = f"{match[1].title()} {match[2]}" if match else None
        return [row for row in rows if row["item"] == item or row["evidence"] == f"figures/{name}"]

    text = "# Figures and verdicts\n\nWritten by `make ledger`. Criteria precede the runs; verdicts are computed.\n"
    names = [path.name for path in (ROOT / "figures").glob("*") if path.suffix in (".png", ".svg")]
    for name in sorted(names):
        text += f"\n## {Path(name).stem.replace('_', ' ')}\n\n![{Path(name).stem}]({name})\n\n"
        for chapter in (ROOT / "chapters").glob(f"{name[:2]}_*.ipynb"):
            text += f"Drawn and explained in [{chapter.stem}](../chapters/{chapter.name}).\n\n"
        text += "".join(f"- {row['item']}: {cell(row['claim'])}: **{row['status']}**\n" for row in shows(name))
    text += "\n# All rows\n"
    for item in dict.fromkeys(row["item"] for row in rows):
        text += f"\n### {title(item)}\n\n" + table(
            ["claim", "criterion", "paper", "ours", "95 % interval", "seeds", "verdict", "evidence", "measured"],
            [[row["claim"], f"`{row['criterion']}`", row["paper"], row["ours"], row["interval"], row["seeds"],
              f"**{row['status']}**", row["evidence"] and f"[{row['evidence']}](../{row['evidence'].split('::')[0]})",
              row["measured"][:10]] for row in rows if row["item"] == item])
    return text

# %%
print(ledger.summary([row]))

# %% [markdown]
# ## One style for figures
#
# Our runs are solid, the paper's values hollow `RINGS`, so that nobody takes one for the other. A model size keeps its
# colour through the book; the outcomes of a comparison and the kinds of attention have colours of their own. A figure
# saved twice is the same file, byte for byte: it carries no date and no version.

# %%
#| export plots
import io
import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from llama2lib import recipes

STYLE = {
    "figure.figsize": (5.6, 3.4), "figure.dpi": 110, "figure.constrained_layout.use": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.titlesize": "medium", "axes.titlelocation": "left", "legend.frameon": False,
    "svg.fonttype": "none", "svg.hashsalt": "llama2",
}
COLORS = {"7B": "#e69f00", "13B": "#009e73", "34B": "#56b4e9", "70B": "#0072b2", "ours": "#d55e00"}
OUTCOMES = {"win": "#7fbf7b", "tie": "0.82", "loss": "#af8dc3"}
ATTENTION = {"MHA": "#332288", "GQA": "#cc6677", "MQA": "#999933"}
RINGS = {"linestyle": "none", "marker": "o", "markersize": 7, "markerfacecolor": "none", "color": "0.35"}

# %%
#| export plots
def save(figure: Figure, name: str) -> None:
    "Write figures/`name`, a plain name ending in .png or .svg (else ValueError); at the smoke scale write nothing."
    if "/" in name or not name.endswith((".png", ".svg")):
        raise ValueError(f"expected a plain name like 'figure_07.png' or 'table_02.svg', found {name!r}")
    anonymous = {"Software": None} if name.endswith(".png") else {"Creator": None, "Date": None}
    buffer = io.BytesIO()
    with plt.rc_context({key: value for key, value in STYLE.items() if key.startswith("svg.")}):
        figure.savefig(buffer, format=name[-3:], metadata=anonymous)
    if recipes.scale() != "smoke":
        recipes.write_atomic(recipes.ROOT / "figures" / name, buffer.getvalue())

# %%
#| export plots
def texts(name: str, title: str, rows: Sequence[tuple[str, str]], indent: float = 0.15) -> None:
    "Save a figure of labelled texts, one below the other: answers side by side. `indent`: of the texts, of its width."
    lines = [(label, textwrap.wrap(text, 95) or [""]) for label, text in rows]
    below = sum(len(part) + 0.4 for _, part in lines)
    figure, ax = plt.subplots(figsize=(8, 0.5 + 0.2 * below), dpi=80)
    ax.axis("off")
    place = below
    for label, part in lines:
        ax.text(0, place, label, va="top", fontsize=8, weight="bold")
        ax.text(indent, place, "\n".join(part), va="top", fontsize=8)
        place -= len(part) + 0.4
    ax.set(ylim=(0, below + 0.5), xlim=(0, 1), title=title)
    save(figure, name)

# %% [markdown]
# An example with the paper's numbers alone: the GPU hours of Table 2 per parameter (chapter 01 counts the parameters).

# %%
params = {"7B": 6.738, "13B": 13.016, "34B": 33.744, "70B": 68.977}
hours = {size: PAPER["Table 2"][size]["gpu_hours"] / params[size] / 1000 for size in SIZES}
with plt.rc_context(STYLE):
    figure, ax = plt.subplots()
    for size in SIZES:
        ax.plot(params[size], hours[size], **RINGS | {"color": COLORS[size]})
        ax.annotate(size, (params[size], hours[size]), (9, -4), textcoords="offset points", color=COLORS[size])
    ax.set(xscale="log", xticks=list(params.values()), xticklabels=[f"{n:.0f}" for n in params.values()], ylim=(0, 35),
           xlim=(5, 100), xlabel="parameters, billions", ylabel="A100 hours per million parameters",
           title="34B cost the most GPU time per parameter, 70B the least")
    ax.minorticks_off()
{size: round(rate, 1) for size, rate in hours.items()}

# %%
assert max(hours, key=hours.get) == "34B" and min(hours, key=hours.get) == "70B"

# %% [markdown]
# ## Recipes: scale and cache
#
# Every chapter runs at one of three scales, and keeps what it trained so that a second run costs seconds. This module
# knows nothing of what is trained; each stage defines its own recipe.

# %%
#| export recipes
import os
from difflib import get_close_matches
from pathlib import Path
from secrets import token_hex
from typing import TypeVar

import llama2lib

ROOT = Path(llama2lib.__file__).resolve().parent.parent  # the repository: figures/, chapters/ and the cache live here
SCALES = ("smoke", "laptop", "a100")


def scale() -> str:
    "The scale of this run, from `LLAMA2_SCALE`: 'smoke', 'laptop' (default) or 'a100'. ValueError if misspelt."
    value = os.environ.get("LLAMA2_SCALE", "laptop")
    if value not in SCALES:
        close = get_close_matches(value.lower(), SCALES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"LLAMA2_SCALE={value!r} is not one of {', '.join(SCALES)}{hint}")
    return value


# %%
#| export recipes
def cache_folder() -> Path:
    "Where trained models and results are kept: `LLAMA2_CACHE`, or .cache/llama2lib in the repository. May not exist."
    return Path(os.environ.get("LLAMA2_CACHE") or ROOT / ".cache" / "llama2lib").expanduser()


# %%
#| export recipes
def write_atomic(path: str | Path, data: str | bytes) -> None:
    "Write a file (text as UTF-8) whole or not at all: a kill leaves the old content. Makes the folder if needed."
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

# %%
assert scale() in SCALES and (ROOT / "llama2lib").is_dir()
write_atomic(cache_folder() / "example.txt", "whole or not at all\n")
(cache_folder() / "example.txt").read_text()

# %% [markdown]
# A value that depends on the scale is written with its three choices side by side. Experiments take their seeds from
# `LLAMA2_SEEDS`, so that a claim can be judged again on seeds that were not looked at before.

# %%
#| export recipes
_Value = TypeVar("_Value")


def by_scale(*, smoke: _Value, laptop: _Value, a100: _Value) -> _Value:
    "The value for this run's scale. ValueError as of `scale`."
    return {"smoke": smoke, "laptop": laptop, "a100": a100}[scale()]


def seeds(default: tuple[int, ...] = (0, 1, 2)) -> tuple[int, ...]:
    "Seeds of this run: `LLAMA2_SEEDS`, such as '3,4,5', or the default. ValueError if not distinct integers >= 0."
    text = os.environ.get("LLAMA2_SEEDS")
    if not text:
        return tuple(default)
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len({int(part) for part in parts}) < len(parts):
        raise ValueError(f"LLAMA2_SEEDS={text!r} must be distinct whole numbers separated by commas, such as '3,4,5'")
    return tuple(int(part) for part in parts)


# %%
print(f"{scale()}: {by_scale(smoke=10, laptop=300, a100=500_000)} steps, seeds {seeds()}")

# %% [markdown]
# Real data is optional: `LLAMA2_DATA` names a folder, and a cell that finds nothing there says so in a line and goes
# on. A folder that was named but does not exist is a mistake, and stops.

# %%
#| export recipes
def data_file(relative: str) -> Path | None:
    """A file below the folder `LLAMA2_DATA`; None if that is unset or the file is absent.

    NotADirectoryError if `LLAMA2_DATA` is set and is no folder.
    """
    folder = os.environ.get("LLAMA2_DATA")
    if not folder:
        return None
    if not Path(folder).expanduser().is_dir():
        raise NotADirectoryError(f"LLAMA2_DATA={folder!r} is not a folder; unset it to run without real data")
    path = Path(folder).expanduser() / relative
    return path if path.is_file() else None


# %%
print(data_file("no/such/file.jsonl") or "no/such/file.jsonl is not there; this cell would use the synthetic task")

# %% [markdown]
# ### What code is this?
#
# A cached result is worth keeping only while the code that made it is the code we have. The digest of a source covers
# its own text and every `llama2lib` module it imports, directly or not. Comments and layout do not count; docstrings
# and all other strings do. Comments are found as tokens, so a `#` inside a string stays.

# %%
#| export recipes
import ast
import functools
import hashlib
import io
import json
import re
import tokenize


@functools.cache
def _code_text(source: str) -> str:
    "The source without comments, trailing blanks and blank lines; lines of multi-line strings are left alone."
    lines, in_string = source.split("\n"), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (row, column), (last_row, _) = token.start, token.end
        in_string.update(range(row, last_row))
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column]
    kept = (line if row in in_string else line.rstrip() for row, line in enumerate(lines, 1))
    return "\n".join(line for row, line in enumerate(kept, 1) if line or row in in_string)


@functools.cache
def _library_modules(source: str) -> set[str]:
    "Names of the llama2lib modules that a source imports, or names in a string (as a launcher does)."
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names.update(alias.name for alias in node.names)
            case ast.ImportFrom(module="llama2lib") | ast.ImportFrom(module=None, level=1):
                names.update(f"llama2lib.{alias.name}" for alias in node.names)
            case ast.ImportFrom(level=1):
                names.add(f"llama2lib.{node.module}")
            case ast.ImportFrom(module=str(module)):
                names.add(module)
            case ast.Attribute(value=ast.Name(id="llama2lib"), attr=name):
                names.add(f"llama2lib.{name}")
            case ast.Constant(value=str(text)) if re.fullmatch(r"llama2lib(\.\w+)+", text):
                names.add(text)
    found = {name.split(".")[1] for name in names if name.startswith("llama2lib.")}
    return {name for name in found if (ROOT / "llama2lib" / f"{name}.py").exists()}


def source_digest(source: str) -> str:
    """SHA-256 of a source text and, transitively, of the llama2lib modules it imports; comments do not count.

    The text must be Python (a py:percent chapter is: its prose is comments). SyntaxError or tokenize.TokenError if not.
    """
    texts, todo = {"": _code_text(source)}, set(_library_modules(source))
    while todo:
        name = todo.pop()
        text = (ROOT / "llama2lib" / f"{name}.py").read_text("utf-8")
        texts[name] = _code_text(text)
        todo |= _library_modules(text) - texts.keys()
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()


# %%
assert source_digest("x = 1  # one") == source_digest("# a number\n\nx = 1\n")
assert source_digest("x = '# one'") != source_digest("x = '# two'")
assert source_digest("x = '''a\n\nb'''") != source_digest("x = '''a\nb'''")
source_digest("from llama2lib.recipes import cached")[:16]

# %% [markdown]
# ### What can be kept?
#
# Results are dicts of tensors, arrays and plain values. Everything that is not a tensor becomes JSON; tensors and
# arrays go beside it into one safetensors file whose header holds that JSON and a checksum. One file means that there
# is no half of an entry: it is written under another name, then renamed.

# %%
#| export recipes
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save


def _pack(value, tensors: dict[str, torch.Tensor], where: str):
    "The JSON form of a value; its tensors and arrays are added to `tensors`. ValueError names what cannot be stored."
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.generic) and type(value.item()) in (bool, int, float):
        return value.item()
    if isinstance(value, torch.Tensor | np.ndarray):
        kind = "__tensor__" if isinstance(value, torch.Tensor) else "__array__"
        try:
            tensor = torch.from_numpy(value.copy()) if kind == "__array__" else value.detach().cpu()
            tensor = tensor.clone(memory_format=torch.contiguous_format)
            save({"": tensor.reshape(-1)[:0]})
        except (TypeError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"{where}: cannot store a {type(value).__name__} of {value.dtype} ({error})") from error
        tensors[str(len(tensors))] = tensor
        return {kind: str(len(tensors) - 1)}
    if type(value) in (list, tuple):
        return [_pack(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if type(key) is not str or key in ("__tensor__", "__array__"):
                raise ValueError(f"{where}: the key {key!r} cannot be stored; keys are strings")
        return {key: _pack(item, tensors, f"{where}[{key!r}]") for key, item in value.items()}
    raise ValueError(f"{where}: cannot store a {type(value).__name__}; use tensors, arrays, dicts, lists, plain values")


def _unpack(value, tensors: dict[str, torch.Tensor]):
    "Undo `_pack`."
    match value:
        case {"__tensor__": name}:
            return tensors[name]
        case {"__array__": name}:
            return tensors[name].numpy()
        case dict():
            return {key: _unpack(item, tensors) for key, item in value.items()}
        case list():
            return [_unpack(item, tensors) for item in value]
    return value


def _checksum(text: str, tensors: dict[str, torch.Tensor]) -> str:
    "SHA-256 of a packed value: its JSON, and name, type, shape and bytes of its tensors."
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read_entry(path: Path):
    "The result stored in a cache entry; ValueError if the entry is damaged."
    try:
        with safe_open(path, framework="pt") as file:
            stored, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}
        if stored["sha256"] != _checksum(stored["result"], tensors):
            raise ValueError("its checksum differs")
        return _unpack(json.loads(stored["result"]), tensors)
    except Exception as error:  # the reader's errors are of many types, and all of them mean: rebuild
        raise ValueError(f"{type(error).__name__}: {error}") from error


# %% [markdown]
# ### Which code made it?
#
# `cached(name, config, fn)` keeps `fn(config)`. The key of an entry covers the configuration by content, the scale,
# PyTorch's version, and the code: for the library that is every module which `fn` reaches, for a notebook the source of
# `fn` and of the notebook's functions that it calls. To keep that list complete, `fn` may take data from nowhere but
# its configuration: a global variable, a closure, a bound method or a lambda is refused. Files, the environment and the
# state of random generators are not seen either; put what matters into the configuration, and seed inside `fn`.

# %%
#| export recipes
import dataclasses
import dis
import inspect
import textwrap
import types
from collections.abc import Callable


def _spelled(value, tensors: dict[str, torch.Tensor], where: str) -> str:
    """A configuration as text that differs where its contents do; tensors and arrays are added to `tensors`.

    A dataclass brings the code of its llama2lib module with it. ValueError names what cannot be stored.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        if not kind.__module__.startswith("llama2lib."):
            raise ValueError(f"{where} is a {kind.__name__}, not of llama2lib; pass its fields as a dict")
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return f"{kind.__qualname__} {source_digest(f'import {kind.__module__}')} {_spelled(fields, tensors, where)}"
    if isinstance(value, dict):
        items = sorted(value.items(), key=lambda pair: repr(pair[0]))
        parts = (f"{key!r}: {_spelled(item, tensors, f'{where}[{key!r}]')}" for key, item in items)
        return f"{{{', '.join(parts)}}}"
    if type(value) in (list, tuple):
        parts = (_spelled(item, tensors, f"{where}[{i}]") for i, item in enumerate(value))
        return f"{type(value).__name__}[{', '.join(parts)}]"
    return f"path {str(value)!r}" if isinstance(value, Path) else json.dumps(_pack(value, tensors, where))


def _fingerprint(value, where: str) -> str:
    "Checksum of a configuration by content; ValueError if it has state that cannot be stored."
    tensors: dict[str, torch.Tensor] = {}
    return _checksum(_spelled(value, tensors, f"cached: {where}"), tensors)


def _names_read(code: types.CodeType) -> set[str]:
    "Global names that a code object reads, those of functions and comprehensions inside it included."
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_names_read(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


def _code_of(fn, seen: dict[int, list]) -> dict[int, list]:
    "Sources and digests of all that a function reaches, by the function's id; ValueError for what hides data."
    where = getattr(fn, "__qualname__", repr(fn))
    if not isinstance(fn, types.FunctionType) or re.search(r"<lambda>|<locals>", where):
        raise ValueError(f"cached: {where} is not a function defined with def at the top level, which the key can see")
    if fn.__module__.startswith("llama2lib."):
        seen[id(fn)] = [source_digest(f"import {fn.__module__}")]
        return seen
    if hasattr(fn, "__wrapped__"):
        raise ValueError(f"cached: {where} is decorated; use the decorator inside it, where the key can see it")
    try:
        source = textwrap.dedent(inspect.getsource(fn))
    except OSError:
        raise ValueError(f"cached: the source of {where} cannot be found") from None
    defaults = _fingerprint([fn.__defaults__ or (), fn.__kwdefaults__ or {}], f"defaults of {where}")
    seen[id(fn)] = parts = [where, _code_text(source), defaults]
    modules = {f"llama2lib.{name}" for name in _library_modules(source)}
    for name in sorted(_names_read(fn.__code__) & fn.__globals__.keys()):
        value = fn.__globals__[name]
        home = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None) or ""
        code = inspect.ismodule(value) or isinstance(value, type) or inspect.isroutine(value)
        if not code or inspect.ismethod(value) or (isinstance(value, type) and home == fn.__module__):
            kind = f"the class {name}" if isinstance(value, type) else f"{name}, a {type(value).__name__}"
            raise ValueError(f"cached: {where} reads {kind}, from around it; pass what it needs in the configuration")
        if home.startswith("llama2lib."):
            modules.add(home)
        elif isinstance(value, types.FunctionType) and home == fn.__module__ and id(value) not in seen:
            _code_of(value, seen)
    parts += [source_digest(f"import {module}") for module in sorted(modules)]
    return seen


# %%
#| export recipes
def cached(name: str, config, fn: Callable[..., dict]) -> dict:
    """`fn(config)`, kept in `cache_folder()` as name-<hash>.safetensors, and read from there the next time.

    `config`: a llama2lib dataclass, dict or plain value; tensors and arrays count by content. `fn`: a function defined
    with def, in llama2lib or in a notebook, that takes all its data from `config`.
    Results are (nested) dicts and lists of tensors, numpy arrays, str, int, float (NaN and infinities kept), bool and
    None. Tensors come back detached, contiguous and on the CPU, tuples as lists, numpy scalars as Python numbers, also
    on the first call. A damaged entry is rebuilt, with a message; of concurrent writers the last one stays.
    ValueError: a bad name, a function whose data the key cannot see, or a result that cannot be stored.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"cached: the name {name!r} is part of a file name; use letters, digits, '_', '-' and '.'")
    key = [scale(), torch.__version__, _fingerprint(config, "config"), list(_code_of(fn, {}).values())]
    path = cache_folder() / f"{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]}.safetensors"
    if path.exists():
        try:
            return _read_entry(path)
        except ValueError as error:
            print(f"cached: {path.name} is damaged and is built again ({error})")
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_pack(fn(config), tensors, f"cached {name!r}: result"))
    write_atomic(path, save(tensors, {"result": text, "sha256": _checksum(text, tensors)}))
    return _unpack(json.loads(text), tensors)


# %%
def squares(config: dict) -> dict:
    print("computing")
    return {"squares": torch.arange(config["n"]) ** 2}


first = cached("example", {"n": 4}, squares)
again = cached("example", {"n": 4}, squares)  # prints nothing: the same code, the same configuration
assert torch.equal(first["squares"], again["squares"])

# %%
generator = torch.Generator()


def noise(config: dict) -> dict:
    return {"noise": torch.randn(config["n"], generator=generator)}


try:
    cached("example", {"n": 4}, noise)
except ValueError as error:
    print(error)

# %% [markdown]
# ## Stats: intervals and agreement
#
# The ledger judges a claim by an interval, not by a number. Every function here returns the estimate with its interval.
#
# ### How often does one model win?
#
# The paper's Figures 2 and 11 show win / (win + loss), so ties are left out by default. Figures 1 and 12 show ties too:
# counted, a tie is half a win for each side. The interval is Wilson's, which stays within 0 and 1 and is sound for
# small counts. Ties vary less than wins do, so with ties it is a little too wide.

# %%
#| export stats
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    "An estimate and the ends of its confidence interval, in the estimate's unit."

    value: float
    low: float
    high: float


def win_rate_interval(wins: float, losses: float, ties: float = 0, confidence: float = 0.95) -> Interval:
    """Win rate (wins + ties / 2) / (wins + losses + ties) with Wilson's score interval; all in 0..1.

    Counts may be fractional: a printed share of so many prompts, or a half for each side. Leave `ties` out for the
    paper's win / (win + loss), Figures 2 and 11. ValueError: a negative count, or all are 0.
    """
    n = wins + losses + ties
    if min(wins, losses, ties) < 0 or n == 0:
        raise ValueError(f"win rate of {wins} wins, {losses} losses, {ties} ties: counts must be >= 0 and not all 0")
    rate, z = (wins + ties / 2) / n, stats.norm.ppf((1 + confidence) / 2)
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    return Interval(rate, float(max(centre - half, 0)), float(min(centre + half, 1)))


# %%
for wins, losses in [(0, 5), (7, 3), (1500, 1100), (40, 0)]:  # SciPy has the formula for whole counts, without ties
    expected = stats.binomtest(wins, wins + losses).proportion_ci(method="wilson")
    assert np.allclose(win_rate_interval(wins, losses)[1:], expected)
win_rate_interval(60, 40), win_rate_interval(60, 40, ties=100)

# %% [markdown]
# ### Is a better than b?
#
# Scores of two models on the same prompts, for several training seeds, form two tables with a row per seed and a column
# per prompt. Their difference varies for two reasons: another seed would have trained other models, and other prompts
# could have been asked. The variance of the mean is therefore the seeds' part plus the prompts' part; what varies in
# single cells is in both and comes off once. With three seeds the variance itself is badly known, so the interval uses
# Student's t, with degrees of freedom by Satterthwaite's rule (1946): two when seeds make all the difference, as many
# as prompts when they make none.

# %%
#| export stats
def _t_interval(mean: float, variance: float, uncertainty: float, confidence: float) -> Interval:
    "Student's interval of a mean; Satterthwaite's degrees of freedom are variance² / uncertainty."
    half = stats.t.ppf((1 + confidence) / 2, variance**2 / uncertainty) * variance**0.5 if uncertainty else 0.0
    return Interval(mean, float(mean - half), float(mean + half))


def paired_interval(a, b, confidence: float = 0.95) -> Interval:
    """Mean of a - b with its interval over seeds and prompts: two-way random effects, Satterthwaite's t.

    a, b: scores [seeds, prompts] of the same prompts, or [prompts] for one seed (the interval then says nothing about
    seeds). ValueError: unequal shapes, fewer than two scores, one that is not finite.
    """
    a, b = (np.atleast_2d(np.asarray(x, dtype=np.float64)) for x in (a, b))
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"paired scores are [seeds, prompts] and of one shape, not {a.shape} and {b.shape}")
    if a.size < 2 or not np.isfinite(a - b).all():
        raise ValueError("paired scores must be finite and at least two; drop a prompt from both tables, on purpose")
    difference, (seeds, prompts) = a - b, a.shape
    mean = difference.mean()
    by_seed = difference.mean(1, keepdims=True) - mean
    by_prompt = difference.mean(0, keepdims=True) - mean
    cells = difference - mean - by_seed - by_prompt
    # variance of the mean from each part, and its degrees of freedom
    parts = [(by_seed, seeds * (seeds - 1), seeds - 1), (by_prompt, prompts * (prompts - 1), prompts - 1)]
    parts += [(cells, difference.size * (seeds - 1) * (prompts - 1), (seeds - 1) * (prompts - 1))]
    (s, s_df), (p, p_df), (c, c_df) = (((x**2).sum() / max(n, 1), max(df, 1)) for x, n, df in parts)
    variance = max(s + p - c, s, p)
    uncertainty = s**2 / s_df + p**2 / p_df + (c**2 / c_df if variance == s + p - c else 0)
    return _t_interval(float(mean), variance, uncertainty, confidence)


# %% [markdown]
# Two groups of prompts, say those with clear and with close answers, have no pairs. Each seed then has a difference of
# two means, whose variances add up; and where each seed has prompts of its own, seeds differ by no less than that.

# %%
#| export stats
def unpaired_interval(a, b, confidence: float = 0.95) -> Interval:
    """Mean over seeds of mean(a) - mean(b) with its interval; for one seed this is Welch's.

    a, b: for each seed a list of scores, of any length, of prompts that no other seed has; a score in `a` has none in
    `b` that belongs to it. ValueError: other numbers of seeds, a list of fewer than two scores, one that is not finite.
    """
    seeds = [tuple(np.asarray(part, dtype=np.float64) for part in pair) for pair in zip(a, b, strict=True)]
    parts = [part for pair in seeds for part in pair]
    if not parts or min(map(len, parts)) < 2 or not all(np.isfinite(part).all() for part in parts):
        raise ValueError("unpaired scores must be finite, and at least two of each seed in both groups")
    effects = np.array([one.mean() - other.mean() for one, other in seeds])
    s, s_df = effects.var(ddof=1) / len(seeds) if len(seeds) > 1 else 0.0, max(len(seeds) - 1, 1)
    within = np.array([part.var(ddof=1) / len(part) for part in parts]) / len(seeds) ** 2
    uncertainty = s**2 / s_df + (within**2 / [len(part) - 1 for part in parts]).sum()
    return _t_interval(float(effects.mean()), max(s, within.sum()), uncertainty, confidence)


# %%
random = np.random.default_rng(0)
scores = random.normal(size=(3, 200))
better = paired_interval(scores + 0.1 + random.normal(0, 0.3, (3, 200)), scores)
assert better.low < better.value < better.high
assert np.allclose(paired_interval(scores, scores + 0.25), -0.25)  # no spread in, no spread out
expected = stats.ttest_ind(scores[0], scores[1, :50], equal_var=False).confidence_interval()
assert np.allclose(unpaired_interval(scores[:1], scores[1:2, :50])[1:], expected)
better

# %% [markdown]
# Does a 95 % interval hold the truth 95 times in 100? We draw experiments whose true difference is 0, with more and
# more variation between seeds, and count, beside the interval that is more often used: the bootstrap that draws seeds
# and then prompts with replacement. The last two columns count how often the ledger would say 'holds' (interval above
# 0, and every seed above 0) where nothing is true. It should be 2.5 % at most.

# %%
from llama2lib.recipes import by_scale


def bootstrap_interval(difference: np.ndarray, random, resamples: int = 400):
    "Percentiles of the mean when seeds, and prompts shared by the seeds, are drawn with replacement."
    drawn = [random.multinomial(n, [1 / n] * n, resamples) / n for n in difference.shape]
    return np.quantile(np.einsum("rs,sp,rp->r", drawn[0], difference, drawn[1], optimize=True), [0.025, 0.975])


def coverage(n_seeds: int, seed_sd: float, n_prompts: int = 100) -> np.ndarray:
    "Shares of experiments without an effect: (t, bootstrap) hold 0, (t, bootstrap) meet the ledger's rule."
    random, counts = np.random.default_rng(0), []
    for _ in range(by_scale(smoke=20, laptop=1000, a100=5000)):
        seeds, prompts = random.normal(0, seed_sd, (n_seeds, 1)), random.normal(0, 0.5, n_prompts)
        difference = seeds + prompts + random.normal(0, 0.7, (n_seeds, n_prompts))
        ends = paired_interval(difference, 0 * difference)[1:], bootstrap_interval(difference, random)
        same_sign = bool((difference.mean(1) > 0).all())
        counts.append([low <= 0 <= high for low, high in ends] + [low > 0 and same_sign for low, _ in ends])
    return np.mean(counts, 0)


print("seeds  sd between seeds   holds the truth: t  bootstrap   false 'holds': t  bootstrap")
for n_seeds in (3, 5):
    for seed_sd in (0, 0.05, 0.2, 1):
        t, bootstrap, false_t, false_bootstrap = coverage(n_seeds, seed_sd)
        print(f"{n_seeds:5d}  {seed_sd:16.2f}  {t:19.1%} {bootstrap:10.1%}  {false_t:17.1%} {false_bootstrap:10.1%}")

# %% [markdown]
# The standard error from 100 prompts is about 0.06 here. While seeds differ less than that, both intervals are sound.
# Where they differ much more (last rows), a bootstrap over three seeds misses the truth one time in four and would call
# chance a finding far more often than the 2.5 % it promises. That is why the ledger's intervals are t intervals.
# They come near their promise and do not quite keep it: with three seeds that differ, they hold the truth 92 to 93 % of
# the time, and chance is called a finding in 3 to 4 % of the experiments.

# %% [markdown]
# ### A claim
#
# Nearly all claims that the book tests on trained models are a difference of two lists of scores, with a list for each
# seed. `compare` makes a row of the ledger of them, `recomputed` of what follows from the paper's own numbers, and
# `illustrated` of a figure that stands beside one of the paper's. Scores at the same place of two lists are of the same
# prompt. Where they are of two groups of prompts (`paired=False`), the means of the groups are compared, not pairs.
# All three return the row; their arguments have the names of `ledger.record`, and what may be left out comes last.


# %%
#| export claims
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from llama2lib import ledger
from llama2lib.recipes import scale
from llama2lib.stats import paired_interval, unpaired_interval


def compare(
    item: str,
    claim: str,
    criterion: str,
    more: Sequence[Float[np.ndarray, "N"]],
    less: Sequence[Float[np.ndarray, "N"]],
    paper=None,
    *,
    seeds: Sequence[int],
    evidence: str,
    paired: bool = True,
) -> dict | None:
    """Record the mean of `more` minus `less`, scores for each of the `seeds`, print its verdict, and return the row.

    item, claim, criterion, paper, evidence: as in `ledger.record`. paired: the scores at a place of the two lists of a
    seed are of the same prompt; else they are of two groups of prompts. Seeds have the same prompts where they have as
    many, and otherwise prompts of their own. None at the smoke scale, where nothing is learned, and for a single score,
    which has no interval. ValueError for paired lists of different lengths, and as of `stats` and `ledger.record`.
    """
    more, less = ([np.asarray(part, float) for part in parts] for parts in (more, less))
    for seed, one, other in zip(seeds, more, less, strict=True):
        if paired and len(one) != len(other):
            raise ValueError(f"{claim}, seed {seed}: expected pairs of scores, found {len(one)} and {len(other)}")
    if scale() == "smoke":
        return None
    if paired:
        more = [one - other for one, other in zip(more, less, strict=True)]
        less = [0 * part for part in more]
    effects = {seed: float(one.mean() - other.mean()) for seed, one, other in zip(seeds, more, less, strict=True)}
    if sum(map(len, more)) == 1:
        print(f"{claim}: {effects}, {criterion}: not judged, one score has no interval")
        return None
    same_prompts = paired and len({*map(len, more)}) == 1
    gap = (paired_interval if same_prompts else unpaired_interval)(more, less)
    row = ledger.record(
        item, claim, criterion, paper, gap.value, interval=gap[1:], seeds=effects, evidence=evidence
    )
    print(f"{claim}: {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], {criterion}: {row['status']}")
    return row


def recomputed(item: str, claim: str, paper, ours, criterion: str = "= paper", *, evidence: str) -> dict:
    "Record what the paper's own numbers say of a claim, print its verdict, and return the row; as `ledger.record`."
    row = ledger.record(item, claim, criterion, paper, ours, evidence=evidence)
    print(f"{item}, {claim}: {ours} against {paper}: {row['status']}")
    return row


def illustrated(item: str, claim: str, figure: str, paper=None, ours=None) -> dict | None:
    "Record that figures/`figure` stands beside the paper's, and return the row; None at the smoke scale, without one."
    if scale() == "smoke":
        return None
    return ledger.record(item, claim, "illustrated", paper, ours, evidence=f"figures/{figure}")


# %% [markdown]
# ### Do the raters agree?
#
# Sections 3.4.2 and 4.4 of the paper report Gwet's AC1 (categories) and AC2 (ordered ratings): agreement beyond chance,
# where chance is measured in a way that stays sane when nearly all items fall in one category. The known Python
# package, irrCAC, pins old versions of NumPy and SciPy, and `agreement` gives no interval; so this is Gwet's formula
# (2014, chapters 4 and 5; the variance is that of 2008), and the tests compare it with irrCAC's output.

# %%
#| export stats
WEIGHTS = {  # agreement of two ratings x, y on a scale of width w; for 'ordinal', x and y are ranks and w = Q - 1
    "identity": lambda x, y, w: (x == y) * 1.0,
    "linear": lambda x, y, w: 1 - abs(x - y) / w,
    "quadratic": lambda x, y, w: 1 - ((x - y) / w) ** 2,
    "ordinal": lambda x, y, w: 1 - abs(x - y) * (abs(x - y) + 1) / (w * (w + 1)),
}


def _rating_counts(ratings, categories) -> tuple[np.ndarray, list]:
    "How many raters put each rated item in each category [items, categories], and the categories in order."
    rows = [list(row) for row in ratings]
    if len({len(row) for row in rows}) != 1 or len(rows[0]) < 2:
        raise ValueError("ratings are a table [items, raters] of two raters or more; None or NaN where one is missing")
    rows = [[x for x in row if x is not None and x == x] for row in rows]
    used = {x for row in rows for x in row}
    categories = sorted(used) if categories is None else list(categories)
    if not used <= set(categories):
        raise ValueError(f"ratings {sorted(used - set(categories), key=repr)} are not in the categories {categories}")
    counts = np.array([[row.count(category) for category in categories] for row in rows if row], dtype=float)
    if (counts.sum(1) >= 2).sum() < 1 or len(counts) < 2:
        raise ValueError("agreement needs two rated items or more, and an item that two raters rated")
    return counts, categories


def gwet_ac2(ratings, weights: str = "quadratic", categories=None, confidence: float = 0.95) -> Interval:
    """Gwet's AC2 (2014), with the interval for these raters and other items; 1 is full agreement, 0 is chance.

    ratings: table [items, raters]; None or NaN is missing. Items that one rater rated count towards chance only, items
    without ratings not at all. `categories` lists the scale in order (default: the ratings that occur; pass the whole
    scale if some do not, as AC depends on their number). Numbers are spaced as their values, other categories evenly.
    `weights` is one of WEIGHTS. With one category there is no chance to correct for, and the result is (1, 1, 1).
    ValueError: fewer than two raters or rated items, no item rated twice, or a rating outside the categories.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r} is not one of {', '.join(WEIGHTS)}")
    counts, categories = _rating_counts(ratings, categories)
    n, q = counts.shape
    if q == 1:
        return Interval(1.0, 1.0, 1.0)
    numbers = weights != "ordinal" and all(isinstance(c, int | float | np.number) for c in categories)
    x = np.array(categories if numbers else range(q), dtype=float)
    agreement = WEIGHTS[weights](x[:, None], x[None, :], np.ptp(x))
    raters, chance = counts.sum(1), agreement.sum() / (q * (q - 1))
    twice = raters >= 2
    observed_i = (counts * (counts @ agreement - 1)).sum(1) / np.where(twice, raters * (raters - 1), 1)
    observed = observed_i[twice].mean()
    share = (counts / raters[:, None]).mean(0)
    expected = chance * (share * (1 - share)).sum()
    value = (observed - expected) / (1 - expected)
    expected_i = chance * (counts @ (1 - share)) / raters
    value_i = n / twice.sum() * np.where(twice, observed_i - expected, 0) / (1 - expected)
    value_i -= 2 * (1 - value) * (expected_i - expected) / (1 - expected)
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * np.sqrt(((value_i - value) ** 2).sum() / (n * (n - 1)))
    return Interval(float(value), float(value - half), float(min(value + half, 1)))


def gwet_ac1(ratings, categories=None, confidence: float = 0.95) -> Interval:
    "Gwet's AC1 (2008): AC2 where two ratings agree only if they are equal; categories need no order."
    return gwet_ac2(ratings, "identity", categories, confidence)


# %% [markdown]
# Gwet's own example (2014, page 55): four raters, twelve units, five categories, seven ratings missing; he finds
# 0.7754.

# %%
_ = None
UNITS = [
    [1, 1, _, 1], [2, 2, 3, 2], [3, 3, 3, 3], [3, 3, 3, 3], [2, 2, 2, 2], [1, 2, 3, 4],
    [4, 4, 4, 4], [1, 1, 2, 1], [2, 2, 2, 2], [_, 5, 5, 5], [_, _, 1, 1], [_, _, 3, _],
]  # fmt: skip
assert round(gwet_ac1(UNITS).value, 4) == 0.7754
print("AC1", gwet_ac1(UNITS))
print("AC2", gwet_ac2(UNITS))

# %% [markdown]
# ## Launch: several processes from a cell
#
# Training on several GPUs is started with PyTorch's `torchrun`. A launcher cell prints the command, to be copied into a
# shell at the repository root, and runs it as well when it can: two processes on a CPU always, GPUs only if
# `LLAMA2_LAUNCH=1` says that they are there. (`torchrun` is `python -m torch.distributed.run` of the same environment;
# the cell runs the second spelling, and adds only flags for logs.)

# %%
#| export launch
import os
import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from llama2lib.recipes import ROOT


def torchrun_arguments(module: str, *args, nproc: int = 2, nnodes: int = 1, max_restarts: int = 0) -> list[str]:
    """Arguments of torchrun for a module (`llama2lib.sft`) or a script (a path that ends in .py).

    One node finds a free port by itself. With more, the same command is started on every node, and they meet at port
    29500 of `$HEAD_NODE`, which the shell fills in. After a failure all processes are started again, at most
    `max_restarts` times.
    """
    meeting = ["--standalone"]
    if nnodes > 1:
        meeting = [f"--nnodes={nnodes}", "--rdzv-backend=c10d", "--rdzv-id=llama2", "--rdzv-endpoint=$HEAD_NODE:29500"]
    again = [f"--max-restarts={max_restarts}"] if max_restarts else []
    program = [module] if module.endswith(".py") else ["-m", module]
    return [*meeting, f"--nproc-per-node={nproc}", *again, *program, *map(str, args)]


# torchrun otherwise keeps one store over its restarts, in which new processes find the addresses of dead ones
RESTARTABLE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def slurm_script(module: str, *args, nnodes: int, nproc: int = 8, hours: int = 24, max_restarts: int = 3) -> str:
    "A Slurm batch script, for `sbatch`: one torchrun on each of `nnodes` nodes of `nproc` GPUs, meeting at the first."
    words = torchrun_arguments(module, *args, nproc=nproc, nnodes=nnodes, max_restarts=max_restarts)
    words = [word.replace("--rdzv-id=llama2", "--rdzv-id=$SLURM_JOB_ID") for word in words]
    command = " ".join(f'"{word}"' if word.startswith("--rdzv") else shlex.quote(word) for word in words)
    name = Path(module).stem if module.endswith(".py") else module.rpartition(".")[2]
    return "\n".join([
        "#!/bin/bash",
        f"#SBATCH --job-name={name}",
        f"#SBATCH --nodes={nnodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --gpus-per-node={nproc}",
        "#SBATCH --exclusive",
        f"#SBATCH --time={hours}:00:00",
        "#SBATCH --requeue",
        *(f"export {name}={value}" for name, value in RESTARTABLE.items()),
        'export HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"srun --kill-on-bad-exit=1 torchrun {command}",
        "",
    ])  # fmt: skip


# %%
print("torchrun", shlex.join(torchrun_arguments("train.py", "--steps", 3)))

# %% [markdown]
# When one rank fails, the others are stopped, and what torchrun prints last is a summary without the reason. The reason
# is in the log of the rank that failed first. A program whose main function is decorated with PyTorch's `@record` also
# leaves it in an error file, written before its peers can notice; without one, we take the first log that ends with a
# traceback.

# %%
#| export launch
import json


def first_failure(logs: Path) -> str:
    "The traceback of the rank that failed first, from a `--log-dir` of torchrun; '' if no rank left one."
    errors = sorted(logs.glob("**/error.json"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        message = json.loads(errors[0].read_text("utf-8"))["message"]
        text = message if isinstance(message, str) else message["extraInfo"]["py_callstack"]
        return f"rank {errors[0].parent.name} failed:\n{text.strip()}"
    for path in sorted(logs.glob("**/stderr.log"), key=lambda path: path.stat().st_mtime_ns):
        text = path.read_text("utf-8", "replace")
        if "Traceback (most recent call last)" in text:
            return f"rank {path.parent.name} failed:\n{text[text.index('Traceback') :].strip()}"
    return ""


def launch(
    module: str,
    *args,
    nproc: int = 2,
    nnodes: int = 1,
    gpus: bool = False,
    env: dict | None = None,
    max_restarts: int = 0,
) -> bool:
    """Print the torchrun command for a module or script, and run it if this machine can; True if it ran.

    CPU commands on one node run; with `gpus`, only if `LLAMA2_LAUNCH=1`; on several nodes, never (a cell is on one).
    `env` is added to the environment. Output appears as it is written, each line with its rank; the working folder is
    the repository root. RuntimeError, with the traceback of the first rank that failed, if the command fails; an
    interrupt stops the processes.
    """
    added = {key: str(value) for key, value in (env or {}).items()} | (RESTARTABLE if max_restarts else {})
    if not gpus and "OMP_NUM_THREADS" not in os.environ:  # the processes share the cores
        added.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // nproc)))
    arguments = torchrun_arguments(module, *args, nproc=nproc, nnodes=nnodes, max_restarts=max_restarts)
    words = [f"{key}={shlex.quote(value)}" for key, value in added.items()]
    words += ["torchrun", *(f'"{word}"' if "$HEAD_NODE" in word else shlex.quote(word) for word in arguments)]
    print("$", " ".join(words))
    if nnodes > 1:
        print(f"Not run here: start it on each of the {nnodes} nodes.")
        return False
    if gpus and os.environ.get("LLAMA2_LAUNCH") != "1":
        print(f"Not run here: it needs {nproc} GPU{'s' * (nproc > 1)}. Where they are, set LLAMA2_LAUNCH=1.")
        return False
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with TemporaryDirectory(prefix="torchrun-") as logs:
        flags = ["--log-dir", logs, "--tee=3", "--role=rank"]  # files for us, a copy for the cell, lines as "[rank0]:"
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *flags, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path} | added,
            start_new_session=True,  # an interrupt reaches this process, which then stops the others in order
        )  # fmt: skip
        try:
            tail = []
            for line in process.stdout:
                if line.startswith("[rank"):  # torchrun's own lines matter only if no rank explains a failure
                    print(line, end="", flush=True)
                tail = [*tail[-40:], line]
            code = process.wait()
        except BaseException:
            process.terminate()  # torchrun stops its workers, by force after 30 s
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
        if code:
            raise RuntimeError(f"{module}: {first_failure(Path(logs)) or 'torchrun failed:' + chr(10) + ''.join(tail)}")
    return True


# %% [markdown]
# Commands for one node of eight GPUs, and for 64 such nodes, are shown and wait for the hardware (`train.py` stands for
# any script or module).

# %%
launch("train.py", "--model", "7B", nproc=8, gpus=True)
_ = launch("train.py", "--model", "70B", nproc=8, nnodes=64, gpus=True)

# %% [markdown]
# On a cluster with Slurm the same command comes in a batch script, which names the first node for the meeting and, with
# `--requeue` and restarts, brings the run back after a failure.

# %%
print(slurm_script("train.py", "--model", "70B", nnodes=64))
assert subprocess.run(["bash", "-n"], input=slurm_script("train.py", nnodes=2), text=True).returncode == 0

# %%
from llama2lib.recipes import cache_folder, write_atomic

script = cache_folder() / "hello.py"
write_atomic(script, "import os\nprint('hello from', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])\n")
assert launch(os.path.relpath(script, ROOT))

# %% [markdown]
# A failure names the rank and shows its traceback.

# %%
from contextlib import redirect_stdout
from io import StringIO

write_atomic(script, "import os\nassert os.environ['RANK'] == '0', 'this rank has a bug'\n")
try:
    with redirect_stdout(StringIO()):
        launch(os.path.relpath(script, ROOT))
except RuntimeError as error:
    lines = str(error).splitlines()
    print(lines[0], "...", lines[-1], sep="\n")
assert lines[0].endswith("rank 1 failed:") and lines[-1] == "AssertionError: this rank has a bug"

# %% [markdown]
# ## Side by side
#
# A model of a million parameters gains little from a second core. Independent trainings do: each takes one core, and
# two of them on two cores are done earlier than one after the other on both.

# %%
#| export launch
from collections.abc import Sequence
from unittest.mock import patch

from tqdm import tqdm


def side_by_side(calls: Sequence[tuple], title: str, workers: int | None = None) -> list:
    """Results of calls, each a function and its arguments, in order; several at a time, in processes of one thread.

    Functions are those that another process can import; what they take and return is pickled. title: of the one
    progress bar. workers: processes, by default one for each core; a single one, as for a single call, is this process
    with all its threads. The longest calls should come first. The first error of a call is raised here, and no other
    call begins.
    """
    from joblib import Parallel, delayed, parallel_config

    workers = min(workers or os.cpu_count(), len(calls))
    silent = patch.dict(os.environ, TQDM_DISABLE="1")  # the processes show no bars of their own
    with silent, parallel_config("loky", n_jobs=workers, inner_max_num_threads=1):
        results = Parallel(return_as="generator")(delayed(function)(*arguments) for function, *arguments in calls)
        return [*tqdm(results, total=len(calls), desc=title)]


# %%
from math import comb

from llama2lib.launch import side_by_side

side_by_side([(comb, 4, 2), (comb, 5, 2), (comb, 6, 2)], "combinations")

# %% [markdown]
# ## Errors of a command
#
# A file that is not there or a value that cannot be is the user's to mend: a command says so in one line. All other
# errors are ours, and keep their traceback.

# %%
#| export launch
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_line_errors(*more: type[Exception]) -> Iterator[None]:
    """Errors that a user can mend (files, values, packages, lost gradients; `more`) end the program with one line.

    Under torchrun they are raised: it wants to know which rank failed where.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, FloatingPointError, *more) as error:
        if "RANK" in os.environ:
            raise
        raise SystemExit(f"{type(error).__name__}: {error}") from None


# %%
try:
    with one_line_errors():
        Path("nowhere.jsonl").read_text()
except SystemExit as ended:
    print(ended)

# %% [markdown]
# ## What it took
#
# - Typing numbers is easy to get wrong, and the paper checks the typist: it repeats, sums and averages its own tables.
#   Nearly all of it fits to the last digit. What does not is the paper's own: *Math* of two models in Table 3, the
#   total of Table 6, Falcon's prompts in Table 32, the 75 % against Vicuna-33B, and a few more, each a `slip` in the
#   ledger.
# - A verdict is computed from a criterion that was there before the run. That is little code; most of the ledger
#   refuses what does not fit, and reads every row again.
# - Three seeds say little about how much seeds differ. A bootstrap over three hides that, Student's t does not, and the
#   price is many verdicts that stay open.
# - A result may be kept only while everything it depends on is in its key. Hence a function that reads data from around
#   it is refused; files and random states still have to be watched by hand.

# %% [markdown]
# ## Exercises
#
# 1. Seeds differ with a standard deviation of 0.2, scores of single prompts with 0.7, and there are 100 prompts. How
#    large must an effect be, so that the ledger says 'holds' in at least half of the experiments? With five seeds?
# 2. Section 4.4 reports an AC2 of 0.92 for ratings that are nearly all 'safe'. Why Gwet's coefficient, and not the
#    better known kappa?
# 3. Table 8 has accuracies by rating and an average, Figure 25 has the shares of the ratings in each weekly batch. Can
#    any weights of the batches give that average?

# %% [markdown]
# With three seeds it must be more than twice as large as seeds differ, with five hardly one and a half times. Two more
# seeds do more than any number of prompts: the quantile of Student's t falls from 4.3 to 2.8.

# %%
import numpy as np

from llama2lib.ledger import compare_to_bound
from llama2lib.stats import paired_interval


def power(n_seeds: int, effect: float, experiments: int = 200) -> float:
    "Share of experiments in which an effect is found."
    random, found = np.random.default_rng(0), []
    for _ in range(experiments):
        scores = effect + random.normal(0, 0.2, (n_seeds, 1)) + random.normal(0, 0.7, (n_seeds, 100))
        interval = paired_interval(scores, 0 * scores)[1:]
        found.append(compare_to_bound(">", 0, interval, dict(enumerate(scores.mean(1)))) == "holds")
    return float(np.mean(found))


for n_seeds in (3, 5):
    print(n_seeds, "seeds:", ", ".join(f"{power(n_seeds, e):.0%} of effects of {e}" for e in (0.1, 0.3, 0.5, 0.7)))
assert power(3, 0.3) < 0.5 < power(5, 0.3) and power(3, 0.7) > 0.5

# %% [markdown]
# Kappa takes for chance what two raters would share if each threw a die with the shares seen. Where nearly all is safe,
# that chance is nearly one, and raters of the same care get a low kappa. Gwet's chance is small there. The two agree
# where both categories are equally frequent.

# %%
import numpy as np

from llama2lib.stats import gwet_ac1

random, found = np.random.default_rng(0), {}
for unsafe in (0.5, 0.1, 0.02):
    truth = random.random(4000) < unsafe
    ratings = truth[:, None] ^ (random.random((4000, 3)) < 0.03)  # three raters, who err in 3 % of the items
    votes = ratings.sum(1)
    agreed = np.mean((votes * (votes - 1) + (3 - votes) * (2 - votes)) / 6)
    chance = ratings.mean() ** 2 + (1 - ratings.mean()) ** 2
    found[unsafe] = (agreed - chance) / (1 - chance), gwet_ac1(ratings.astype(int), categories=(0, 1)).value
    kappa, ac1 = found[unsafe]
    print(f"{unsafe:.0%} unsafe: two raters agree on {agreed:.1%}; Fleiss' kappa {kappa:.2f}, AC1 {ac1:.2f}")
assert abs(found[0.5][0] - found[0.5][1]) < 0.01 and found[0.02][0] < 0.5 < 0.9 < found[0.02][1]

# %% [markdown]
# For the helpfulness tests, yes: some batches give more, others less. For the safety tests every batch gives too much,
# and so does any mean of them. Pairs about safety must be closer calls than Meta's comparisons as a whole.

# %%
from llama2lib.paper import PAPER

shares = PAPER["Figure 25"]
for row, cells in PAPER["Table 8"].items():
    means = [
        sum(cells[rating] * share[batch] for rating, share in shares.items()) / 100 for batch in shares["significantly"]
    ]
    print(f"{row:<32}{min(means):.1f} to {max(means):.1f} by batch, {cells['Avg']} printed")
    if row.endswith("Meta Helpful"):
        assert min(means) < cells["Avg"] < max(means)
    else:
        assert cells["Avg"] < min(means) - 1
