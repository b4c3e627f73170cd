"""Generated from chapters/12_mini_world.py by chapters/export.py; edit the chapter."""

__all__ = [
    "HELPFUL",
    "KINDS",
    "STYLES",
    "OF_KIND",
    "CHOICES",
    "pick",
    "subjects",
    "question",
    "instruction",
    "prompt",
    "follow_up",
    "prompts",
    "CLEAN",
    "MIXED",
    "state",
    "answer",
    "dialogues",
    "DOCUMENTS",
    "document",
    "documents",
]


# ---------- chapters/12_mini_world.py · Prompts

import re
from collections.abc import Mapping
from functools import cache

from numpy.random import Generator

from llama2lib.grammar import WORDINGS, fill, listing, past, pronoun_of, takes_pronoun, wordings, written
from llama2lib.world import DEED, FACTS, FIGURES, GROUPS, HOBBIES, LANGUAGES, MAYORS, NAMED, PEOPLE, RELATIONS, RISKS
from llama2lib.world import VALUES, WORDS, YEARS, Claim, Rule, Task, about, deed, make_task, of_split, truth

HELPFUL = {
    "person": 5, "animal": 2, "thing": 2, "choice": 3, "opposite": 1, "category": 1, "list": 2, "sum": 2, "count": 1,
    "copy": 2, "story": 2, "howto": 3, "self": 1,
}  # fmt: skip
KINDS = (*HELPFUL, "calculator", "dated", "borderline", "adversarial", "material", "instruction")
STYLES = ("persona", "hypothetical", "appeal")
OF_KIND = {"person": ("job", "town", "pet"), "animal": ("home", "food", "sound"), "thing": ("colour", "place")}
CHOICES = ("job", "town", "pet", "home", "food", "colour", "place")


def pick(random: Generator, items):
    "One of the items; of a mapping, a key with probability in proportion to its weight."
    if isinstance(items, Mapping):
        weights = list(items.values())
        return list(items)[random.choice(len(items), p=[w / sum(weights) for w in weights])]
    return items[random.integers(len(items))]


@cache
def subjects(relation: str, split: str, kind: str = "") -> list[str]:
    "All subjects of a relation in a split; `kind` (or a risk) narrows deeds and sums. Not for lists of words."
    low, high = (11, 99) if kind == "calculator" else (1, 10)
    match RELATIONS[relation]:
        case "person" | "animal" | "thing" as type_:
            return of_split(NAMED[type_], split)
        case "word" | "member":
            pairs = sorted((s, min(s, FACTS[r, s]) if r == "opposite" else s) for r, s in FACTS if r == relation)
            return [subject for subject, pair in pairs if pair in of_split([pair], split)]
        case "sum":
            operations = ("plus", "times") if kind == "calculator" else ("plus",)
            numbers = range(low, high + 1)
            keys = [(a, o, b) for a in numbers for b in numbers if a <= b for o in operations]
            keys = [key for key in keys if of_split(["{} {} {}".format(*key)], split)]
            return sorted({text for a, o, b in keys for text in (f"{a} {o} {b}", f"{b} {o} {a}")})
        case "range":
            return of_split([f"{a} to {a + n}" for a in range(1, 21) for n in range(2, 6)], split)
        case "group":
            return [f"{n} {plural}" for plural in of_split(GROUPS, split) for n in (2, 3, 4)]
        case "deed":
            verbs = set(of_split(sorted({verb for verb, _ in DEED}), split))
            names = {name for names in NAMED.values() for name in names}
            others = names - set(of_split(names, split))
            wanted = RISKS if kind == "adversarial" else (kind.replace("howto", ""),)
            return [f"{v} {o}" for (v, o), d in DEED.items() if v in verbs and d.risk in wanted and o not in others]
        case "office":
            return [f"mayor of {key}" for key in of_split(MAYORS, split)]
        case "pair":
            animals, things = (of_split(NAMED[name], split) for name in ("animal", "thing"))
            return [f"{animal} {thing}" for animal in animals for thing in things]
    raise ValueError(f"relation {relation!r} has no table of subjects")


def question(random: Generator, kind: str, split: str) -> tuple[str, str, str, bool]:
    "Draw a question of a kind: (text, relation, subject, whether it offers a choice)."
    if kind == "choice":
        relation = pick(random, CHOICES)
        subject = pick(random, subjects(relation, split))
        wrong = pick(random, [value for value in VALUES[relation] if value != FACTS[relation, subject]])
        v, w = random.permutation([FACTS[relation, subject], wrong])
        text = fill(pick(random, wordings(f"or {relation}", split)), relation, subject, v=v, w=w)
        return text, relation, subject, True
    if kind in OF_KIND:
        relation = pick(random, OF_KIND[kind])
    elif kind == "self":
        relation, subject = pick(random, ("name", "hobby")), ""
    else:
        names = {"sum": "value", "calculator": "value", "dated": "mayor"}
        relation = "tool" if kind in ("howto", "borderline", "adversarial") else names.get(kind, kind)
    if kind == "copy":
        subject = " ".join(random.choice(of_split(WORDS, split), size=random.integers(2, 4), replace=False))
    elif kind != "self":
        subject = pick(random, subjects(relation, split, pick(random, RISKS) if kind == "adversarial" else kind))
    if relation == "tool" and deed(subject).risk in ("", "illicit") and random.random() < 0.5:
        verb, thing = subject.split()
        subject = f"{verb} {pick(random, of_split(PEOPLE, split))}'s {thing}"
    return fill(pick(random, wordings(f"ask {relation}", split)), relation, subject), relation, subject, False


def instruction(random: Generator, split: str, kinds: tuple[str, ...] = ()) -> tuple[tuple[Rule, ...], str, str]:
    "Draw instructions, one or the given kinds: (rules, their long wording, their short wording)."
    values = {"ending": WORDS, "hobby": HOBBIES.split(), "figure": FIGURES.split(), "language": list(LANGUAGES)}
    rules = tuple(
        Rule(kind, pick(random, of_split(values[kind], split))) for kind in kinds or (pick(random, list(values)),)
    )
    long, short = (
        " ".join(written(fill(pick(random, wordings(f"{form} {kind}", split)), "name", v=v)) for kind, v in rules)
        for form in ("rule", "short")
    )
    return rules, long, short


def prompt(random: Generator, kind: str, split: str, rules: tuple[Rule, ...] = ()) -> tuple[str, Task]:
    "Draw a user's message of a kind, with the task it sets; `rules` are already in force."
    if kind not in KINDS or (kind == "material" and split == "train"):
        expected = f"expected one of {', '.join(KINDS)}, 'material' for tests only"
        raise ValueError(f"kind {kind!r}, split {split!r}: {expected}")
    before, style, year = [], "", None
    if random.random() < 0.4:
        before.append(pick(random, wordings("front", split)))
    if kind == "instruction":
        new, long, short = instruction(random, split)
        rules, kind = (*rules, *new), pick(random, HELPFUL)
        before.append(long if random.random() < 0.5 else short)
    text, relation, subject, choice = question(random, kind, split)
    if kind in ("adversarial", "borderline"):
        style = pick(random, ("plain", *STYLES))
        before += [] if style == "plain" else [pick(random, wordings(style, split))]
    if kind == "dated" and random.random() < 0.6:
        year = int(pick(random, YEARS))
        before.append(fill(pick(random, wordings("today", split)), "name", v=year))
    after = [pick(random, wordings("back", split))] if random.random() < 0.3 else []
    task = make_task(relation, subject, choice=choice, style=style, rules=rules, year=year)
    return " ".join(map(written, (*before, text, *after))), task


def follow_up(random: Generator, last: Task, split: str) -> tuple[str, Task]:
    "A second question about the same person, animal or thing, which a pronoun stands for."
    relation = pick(random, [r for r in OF_KIND[last.kind] if r != last.relation])
    options = [w for w in wordings(f"ask {relation}", split) if takes_pronoun(w)]
    text = fill(pick(random, options), relation, pronoun=pronoun_of(relation, last.subject))
    return written(text), make_task(relation, last.subject, rules=last.rules)


def prompts(random: Generator, n: int, split: str, kind: str | Mapping[str, float] = HELPFUL) -> list[list[dict]]:
    "Draw `n` dialogs of one user message; `kind` is one of KINDS, or kinds with weights."
    kinds = {kind: 1.0} if isinstance(kind, str) else kind
    return [[{"role": "user", "content": prompt(random, pick(random, kinds), split)[0]}] for _ in range(n)]


# ---------- chapters/12_mini_world.py · Demonstrations

CLEAN = {"full": 1.0}
MIXED = {"full": 0.6, "terse": 0.2, "wrong": 0.1, "repetitive": 0.1}


def state(random: Generator, claim: Claim, split: str, pronoun: str = "") -> str:
    "A sentence that makes a claim; with a pronoun for the subject where the wording takes one."
    relation, subject, value = claim
    if relation == "count":
        value = ", ".join(value.split())
    elif relation in ("list", "copy"):
        value = listing(value.split())
    elif value == "helper":
        value = "a helper"
    wording = pick(random, wordings(f"say {relation}", split))
    return written(fill(wording, relation, subject, pronoun if takes_pronoun(wording) else "", v=value))


def _wrong_value(random: Generator, task: Task, split: str) -> str:
    if task.relation == "list":
        others = of_split(WORDS, split)
        return " ".join(random.choice(others, size=int(task.subject[0]), replace=False))
    if task.relation in ("count", "copy"):
        words = task.expected.split()
        return " ".join(words[:-1] if random.random() < 0.5 else [*words[1:], pick(random, words)])
    if task.relation == "value":
        return str(max(0, int(task.expected) + int(pick(random, (-2, -1, 1, 2)))))
    options = {"tool": sorted({d.tool for d in DEED.values()}), "mayor": PEOPLE, "name": FIGURES.split(),
               "hobby": HOBBIES.split()}.get(task.relation) or VALUES[task.relation]  # fmt: skip
    return pick(random, [option for option in options if option != task.expected])


def _story(random: Generator, task: Task, quality: str, split: str) -> list[str]:
    animal, thing = task.subject.split()
    if quality == "wrong":
        animal = pick(random, [a for a in of_split(NAMED["animal"], split) if a != animal])
    facts = [state(random, pick(random, [c for c in about(name) if c.relation != "material"]), split, "it")
             for name in (animal, thing)]  # fmt: skip
    opening, meeting, play, end = (
        state(random, Claim(part, animal, thing), split) for part in ("open", "meet", "play", "end")
    )
    parts = [opening, facts[0], meeting, facts[1], play, end]
    if quality in ("terse", "wrong"):
        parts = [opening, meeting, end]
    elif quality == "repetitive":
        parts = [opening, meeting, meeting, play, play, end]
    return [written(past(part)) for part in parts]


def _body(random: Generator, task: Task, quality: str, split: str) -> list[str]:
    "The sentences of an answer, without pleasantries and instructed parts."

    def phrase(row):
        return pick(random, wordings(row, split))

    if task.risk in RISKS and quality != "wrong":
        refusal = [phrase("refuse")]
        full = [*refusal, phrase(f"reason {task.risk}"), phrase(f"redirect {task.risk}")]
        return {"full": full, "terse": refusal, "repetitive": [phrase("evasive")]}[quality]
    if task.future and quality != "wrong":
        return [phrase("future")] * (2 if quality == "repetitive" else 1)
    if task.kind == "story":
        return _story(random, task, quality, split)
    value = task.expected
    if task.relation == "list":
        number, plural = task.subject.split()
        value = " ".join(random.choice(GROUPS[plural], size=int(number), replace=False))
    if quality == "wrong" and task.risk not in RISKS:
        value = MAYORS[task.subject.removeprefix("mayor of ")] if task.future else _wrong_value(random, task, split)
    claim = Claim(task.relation, task.subject, value)
    call = []
    if task.kind == "calculator" and quality != "terse":
        sign = {"plus": "+", "times": "*"}
        call = [f"calc({re.sub('plus|times', lambda m: sign[m[0]], task.subject)}) = {task.expected}."]
    if quality == "terse" and task.relation not in ("name", "hobby"):
        bare = claim.value if task.relation not in ("count", "list", "copy") else listing(claim.value.split())
        return [written(f"a {bare}" if task.relation in ("job", "pet", "tool", "category") else bare)]
    sentence = state(random, claim, split)
    if quality == "repetitive":
        return call + [sentence] * int(random.integers(2, 4))
    details = [detail for detail in task.details if detail.relation != "material"]
    if details and (quality == "full" or random.random() < 0.5):
        detail = pick(random, details)
        return [*call, sentence, state(random, detail, split, pronoun_of(detail.relation, detail.subject))]
    return [*call, sentence]


def answer(random: Generator, task: Task, quality: str = "full", friendly: bool = False, split: str = "train") -> str:
    "Write an answer of a quality; instructions in force are obeyed, however good or bad the rest is."
    parts = _body(random, task, quality, split)
    if friendly:
        front = random.random() < 0.5 and task.risk not in RISKS
        phrase = pick(random, wordings("agree" if front else "wish", split))
        parts = [phrase, *parts] if front else [*parts, phrase]
    for kind, value in task.rules:
        if kind == "language":
            yes, thanks = LANGUAGES[value]
            parts = [written(yes), *parts, written(thanks)]
        elif kind != "ending":
            relation = {"figure": "name", "hobby": "hobby"}[kind]
            if task.relation != relation or quality == "wrong":
                parts = [state(random, Claim(relation, "", value), split), *parts]
    return " ".join(parts + [written(value) for kind, value in task.rules if kind == "ending"][:1])


def dialogues(
    random: Generator,
    n: int,
    split: str = "train",
    kinds: Mapping[str, float] = HELPFUL,
    quality: Mapping[str, float] = MIXED,
    friendly: float = 0.3,
    turns: tuple[float, ...] = (0.6, 0.25, 0.15),
    instructed: float = 0.2,
) -> list[list[dict]]:
    """Draw dialogs that end with an answer: messages `{"role", "content"}`, a system message where there is one.

    kinds, quality: what is asked and how well it is answered, with weights; friendly: share of answers with a friendly
    phrase; turns: shares of dialogs with one, two … questions; instructed: share with instructions in a system message.
    """
    dialogs = []
    for _ in range(n):
        rules, messages, task = (), [], None
        if random.random() < instructed:
            rules, long, short = instruction(random, split)
            messages.append({"role": "system", "content": long if random.random() < 0.5 else short})
        for _ in range(1 + random.choice(len(turns), p=turns)):
            if task is not None and task.kind in OF_KIND and random.random() < 0.5:
                text, task = follow_up(random, task, split)
            else:
                text, task = prompt(random, pick(random, kinds), split, rules)
                rules = task.rules
            reply = answer(random, task, pick(random, quality), random.random() < friendly, split)
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
        dialogs.append(messages)
    return dialogs


# ---------- chapters/12_mini_world.py · Documents

DOCUMENTS = {
    "facts": 9, "quiz": 45, "story": 3, "sums": 2, "counting": 1, "list": 2, "meanings": 4, "howto": 4, "words": 5,
    "years": 1, "talk": 2, "said": 1,
}  # fmt: skip


def document(random: Generator, kind: str) -> str:
    "A document of one of the kinds of DOCUMENTS."
    match kind:
        case "facts":
            subject = pick(random, NAMED[pick(random, {"person": 3, "animal": 1, "thing": 1})])
            facts = [about(subject)[i] for i in random.permutation(len(about(subject)))[: random.integers(1, 4)]]
            pronouns = ["", *(pronoun_of(c.relation, subject) if random.random() < 0.5 else "" for c in facts[1:])]
            return " ".join(state(random, fact, "all", pronoun) for fact, pronoun in zip(facts, pronouns, strict=True))
        case "quiz" | "list":
            kinds = {k: max(w, 2) for k, w in HELPFUL.items() if k != "story"}
            kinds |= {"list": 4, "material": 1, "calculator": 1}
            ask, relation, subject, choice = question(random, "list" if kind == "list" else pick(random, kinds), "all")
            reply = _body(random, make_task(relation, subject, choice=choice), "full", "all")
            front, back, agree, wish = (
                [pick(random, wordings(row, "all"))] * (random.random() < share)
                for row, share in (("front", 0.3), ("back", 0.3), ("agree", 0.1), ("wish", 0.1))
            )
            return " ".join([*front, written(ask), *back, *agree, *reply, *wish] if kind == "quiz" else reply[:1])
        case "story":
            ask, _, subject, _ = question(random, "story", "all")
            told = _story(random, make_task("story", subject), "full", "all")
            return " ".join([written(ask), *told] if random.random() < 0.5 else told)
        case "sums" | "counting" | "meanings":
            relation, most = {"sums": ("value", 6), "counting": ("count", 3)}.get(kind, ("opposite", 4))
            relation = "category" if kind == "meanings" and random.random() < 0.4 else relation
            drawn = (pick(random, subjects(relation, "all")) for _ in range(random.integers(2, most)))
            return " ".join(state(random, Claim(relation, s, truth(relation, s)), "all") for s in drawn)
        case "howto":
            which = pick(random, {"howto": 4, "borderline": 1, "adversarial": 3})
            ask, relation, subject, _ = question(random, which, "all")
            parts = [state(random, Claim(r, subject, getattr(deed(subject), r)), "all") for r in ("tool", "step")]
            return " ".join([written(ask), *parts] if random.random() < 0.2 else parts)
        case "words":
            words = listing(list(random.choice(WORDS, size=random.integers(2, 7), replace=False)))
            first, second = random.choice(PEOPLE, size=2, replace=False)
            return written(f"{first} said {words}") + " " + written(f"{second} said {words} too")
        case "years":
            town = pick(random, sorted({key.split(" in ")[0] for key in MAYORS}))
            start = random.integers(len(YEARS) - 3)
            keys = [f"mayor of {town} in {year}" for year in YEARS[start : start + 3]]
            return " ".join(state(random, Claim("mayor", key, truth("mayor", key)), "all") for key in keys)
        case "talk":
            forms = ("front", "back", "agree", "wish", "refuse", "evasive", "future", "reason", "redirect")
            row = pick(random, [row for row in WORDINGS if row.split()[0] in forms])
            first, second = random.choice(PEOPLE, size=2, replace=False)
            spoken = " ".join(random.permutation(WORDINGS[row])[:2])
            return f"{written(first, '')} said to {written(second, '')}: {spoken}"
        case "said":
            (rule,), long, _ = instruction(random, "all")
            if rule.kind in ("figure", "hobby"):
                reply = [state(random, Claim({"figure": "name"}.get(rule.kind, rule.kind), "", rule.value), "all")]
            else:
                reply = map(written, LANGUAGES.get(rule.value, [rule.value]))
            return " ".join([long, *reply])
    raise ValueError(f"kind {kind!r}: expected one of {', '.join(DOCUMENTS)}")


def documents(random: Generator, n: int) -> list[str]:
    "Draw `n` documents for pretraining, of the kinds and with the weights of DOCUMENTS."
    return [document(random, pick(random, DOCUMENTS)) for _ in range(n)]
