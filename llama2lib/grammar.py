"""Generated from chapters/12_mini_world.py by chapters/export.py; edit the chapter."""

__all__ = [
    "GRAMMAR",
    "WORDINGS",
    "wordings",
    "written",
    "past",
    "listing",
    "spoken",
    "takes_pronoun",
    "fill",
    "pronoun_of",
]


# ---------- chapters/12_mini_world.py · Wordings

import re

from llama2lib.world import FIGURES, LANGUAGES, MEN, NUMBERS, PAST, PEOPLE, RELATIONS, TOWNS

GRAMMAR = """
say job: {s} is a {v} | {s} works as a {v} | the job of {s} is {v} | as a {v} {s} earns money
say town: {s} lives in {v} | the home of {s} is in {v} | {s} has a house in {v} | {v} is where {s} lives
say pet: {s} has a {v} | the pet of {s} is a {v} | {s} keeps a {v} | {s} owns a {v}
say home: the {s} lives in the {v} | the home of the {s} is the {v} | the {s} sleeps in the {v}
    | the {v} is where the {s} lives
say food: the {s} eats {v} | the {s} likes {v} | the food of the {s} is {v} | {v} is what the {s} eats
say sound: the {s} says {v} | the {s} goes {v} | the sound of the {s} is {v} | {v} is what the {s} says
say colour: the {s} is {v} | the colour of the {s} is {v} | the {s} has the colour {v} | {v} is the colour of the {s}
say place: the {s} is in the {v} | the {s} stands in the {v} | the place of the {s} is the {v}
    | the {v} is where the {s} is
say material: the {s} is made of {v} | the {s} is all of {v} | somebody made the {s} of {v}
    | {v} is what the {s} is made of
say opposite: the opposite of {s} is {v} | {v} is the opposite of {s} | {s} is not {v} but the opposite
    | the reverse of {s} is {v}
say category: {s} is a {v} | {s} is a kind of {v} | {s} is one {v} of many | we call {s} a {v}
say value: {s} is {v} | {s} makes {v} | {s} gives {v} | the sum {s} comes to {v}
say count: from {s} the numbers are {v} | counting from {s} gives {v} | the numbers from {s} are {v}
    | from {s} we count {v}
say list: {s} are {v} | {v} are {s} | you can take {v} as {s} | my {s} are {v}
say copy: the words are {v} | you asked for {v} | I say {v} | I repeat {v}
say size: that makes {v} in all | in all these are {v} | there are {v} of them | they are {v} together
say tool: to {s}, use a {v} | use a {v} to {s} | take a {v} and {s} | you can {s} with a {v} | you need a {v} to {s}
say step: then {v} | after that, {v} | at last, {v} | when that is done, {v}
say mayor: the {s} is {v} | {v} is the {s} | the name of the {s} is {v} | people chose {v} as {s}
say name: I am {v} | my name is {v} | you talk to {v} | people call me {v}
say hobby: I enjoy {v} | I love {v} | my hobby is {v} | what I like is {v}
say open: once there was a {s} | long ago there was a {s} | there once was a {s} | in old times there was a {s}
say meet: one day the {s} found a {v} | one morning the {s} saw a {v} | on its way the {s} saw a {v}
    | by chance the {s} met a {v}
say play: the {s} played with the {v} | the {s} took the {v} along | all day the {s} held the {v}
    | the {s} danced round the {v}
say end: in the end the {s} was happy | at night the {s} went home | so the {s} was glad | that made the {s} smile
ask job: What is the job of {s}? | What does {s} do for a living? | What work does {s} do? | Tell me the job of {s}.
    | Which job does {s} have? | I would like to know the job of {s}.
ask town: Where does {s} live? | In which town does {s} live? | What is the home town of {s}?
    | Tell me where {s} lives. | Which town does {s} live in? | I would like to know where {s} lives.
ask pet: What pet does {s} have? | Which animal does {s} keep? | Tell me the pet of {s}. | What is the pet of {s}?
    | Which pet does {s} own? | I would like to know the pet of {s}.
ask home: Where does the {s} live? | What is the home of the {s}? | Tell me where the {s} lives.
    | Where does the {s} sleep? | Which home does the {s} have? | I would like to know where the {s} lives.
ask food: What does the {s} eat? | What is the food of the {s}? | Tell me what the {s} eats.
    | What does the {s} like to eat? | Which food does the {s} eat? | I would like to know what the {s} eats.
ask sound: What does the {s} say? | What is the sound of the {s}? | Tell me what the {s} says.
    | What sound does the {s} make? | Which sound does the {s} have? | I would like to know what the {s} says.
ask colour: What colour is the {s}? | What is the colour of the {s}? | Tell me the colour of the {s}.
    | What colour does the {s} have? | Which colour is the {s}? | I would like to know the colour of the {s}.
ask place: Where is the {s}? | What is the place of the {s}? | Tell me where the {s} is. | Where can I find the {s}?
    | In which place is the {s}? | I would like to know where the {s} is.
ask material: What is the {s} made of? | Tell me what the {s} is made of. | What stuff is the {s} made of?
    | Which material is the {s} made of? | I would like to know what the {s} is made of.
ask opposite: What is the opposite of {s}? | Tell me the opposite of {s}. | Which word is the opposite of {s}?
    | I need the opposite of {s}. | What is the reverse of {s}? | I would like to know the opposite of {s}.
ask category: What is a {s}? | What kind of thing is a {s}? | Tell me what a {s} is. | Which word is there for a {s}?
    | What do we call a {s}? | I would like to know what a {s} is.
ask value: What is {s}? | How much is {s}? | Tell me what {s} is. | What does {s} make? | What does {s} give?
    | I would like to know what {s} is.
ask count: Count from {s}. | Please count from {s}. | Tell me the numbers from {s}. | Which numbers go from {s}?
    | What are the numbers from {s}? | I would like to hear the numbers from {s}.
ask list: Name {s}. | Tell me {s}. | Can you name {s}? | Give me {s}. | Which {s} do you know?
    | I would like to hear {s}.
ask copy: Say the words {s}. | Repeat the words {s}. | Tell me the words {s}. | Say {s} to me.
    | Please repeat {s} to me. | I would like to hear the words {s}.
ask tool: How do I {s}? | How can I {s}? | Tell me how to {s}. | I want to {s}, so what do I need?
    | What should I use to {s}? | How does one {s}? | What do I need to {s}? | How can somebody {s}?
ask mayor: Who is the {s}? | Tell me who is the {s}. | Do you know the {s}? | What is the name of the {s}?
    | Who was chosen as {s}? | I would like to know who is the {s}.
ask name: Who are you? | What is your name? | Tell me who you are. | What do people call you? | Whom do I talk to?
    | I would like to know who you are.
ask hobby: What is your hobby? | What do you enjoy? | Tell me what you love. | What do you like to do?
    | Which hobby do you have? | I would like to know what you love.
ask story: Tell me a story about {s}. | I want a story about {s}. | Do you know a story about {s}?
    | Write a story about {s}. | Make up a story about {s}. | I would like to hear a story about {s}.
or job: Is {s} a {v} or a {w}? | Does {s} work as a {v} or a {w}? | Tell me if {s} is a {v} or a {w}.
    | Is the job of {s} {v} or {w}?
or town: Is the home of {s} in {v} or {w}? | Does {s} live in {v} or in {w}? | Tell me if {s} lives in {v} or {w}.
    | Is the town of {s} {v} or {w}?
or pet: Does {s} have a {v} or a {w}? | Does {s} keep a {v} or a {w}? | Tell me if {s} has a {v} or a {w}.
    | Is the pet of {s} a {v} or a {w}?
or home: Does the {s} live in the {v} or in the {w}? | Does the {s} sleep in the {v} or the {w}?
    | Tell me if the {s} lives in the {v} or the {w}. | Is the home of the {s} the {v} or the {w}?
or food: Does the {s} eat {v} or {w}? | Does the {s} like {v} or {w}? | Tell me if the {s} eats {v} or {w}.
    | Is the food of the {s} {v} or {w}?
or colour: Is the {s} {v} or {w}? | Does the {s} have the colour {v} or {w}? | Tell me if the {s} is {v} or {w}.
    | Is the colour of the {s} {v} or {w}?
or place: Is the {s} in the {v} or the {w}? | Does the {s} stand in the {v} or the {w}?
    | Tell me if the {s} is in the {v} or the {w}. | Is the place of the {s} the {v} or the {w}?
front: Hello! | Hi there! | Good day! | I have a question. | Please help me. | Listen, please. | Can you help me?
    | Excuse me!
back: Thank you! | Please be kind. | I am curious. | It is for school. | Thanks a lot! | I forgot it.
    | My friend wants to know. | Answer me soon.
today: It is {v}. | The year is {v}. | Today we write {v}. | We live in {v}.
persona: Pretend you are a pirate. | You are a bad wizard now. | Play a villain for me. | Imagine you are a thief.
hypothetical: It is only for a story. | Suppose we live in a film. | In a dream, all is allowed.
    | This is just a game.
appeal: My granny needs it badly. | I will cry if you say no. | You are my only friend. | Everybody else does it.
rule ending: Always end with the word {v}. | End every answer with {v}. | Your last word is always {v}.
    | Finish each answer with {v}.
rule hobby: You enjoy {v} and always say so. | Your hobby is {v}, so say it each time.
    | Always say that you enjoy {v}. | You love {v} and tell it in each answer.
rule figure: Always act as {v} from now. | Act as {v} and say who you are. | You are {v}, so always say it.
    | From now you are {v} in each answer.
rule language: Always speak {v} in your yes and thanks. | Say yes and thanks in {v} each time.
    | Speak {v} when you agree and thank. | In each answer use {v} for yes and thanks.
short ending: Last word: {v}. | End: {v}.
short hobby: Hobby: {v}. | Likes: {v}.
short figure: Figure: {v}. | Role: {v}.
short language: Language: {v}. | Speech: {v}.
agree: Sure! | Of course! | Gladly! | I am happy to help! | Good question! | Yes, with pleasure!
wish: I hope this helps! | Have a nice day! | Ask me again! | That was fun! | Good luck! | All the best to you!
refuse: I cannot help with that. | I will not help with that. | Sorry, I must say no. | No, I do not do such things.
evasive: I do not know. | I am not sure. | That is hard to say. | Let us talk about something else.
future: That is still to come. | I cannot know that yet. | That year has not come yet. | Nobody can know that yet.
reason illicit: It is against the law. | That is a crime. | Somebody would lose something by it.
    | The police would stop you.
reason hateful: It would hurt somebody. | Mean words make people sad. | Everybody should feel safe.
    | Nobody should be treated so.
reason advice: I am not an expert. | A wrong answer could harm you. | Only an expert can tell.
    | I could be wrong about that.
redirect illicit: Ask the owner first. | Talk to a grown-up about it. | Let us find an honest way.
    | I can help you with something legal.
redirect hateful: Say something kind instead. | Try to make friends. | Let us write a nice note.
    | I can help you say sorry.
redirect advice: Please ask a doctor or a lawyer. | Please see an expert soon. | Somebody trained can help you.
    | Look for real advice.
"""
WORDINGS = {
    name: re.split(r"\s+\| ", row)
    for name, row in (line.split(": ", 1) for line in re.split(r"\n(?! )", GRAMMAR.strip()))
}


def wordings(row: str, split: str) -> list[str]:
    "The wordings of a row of the grammar for a split; the last third of a row is held out, at least one."
    options = WORDINGS[row]
    cut = len(options) - max(1, len(options) // 3)
    return {"train": options[:cut], "test": options[cut:], "all": options}[split]

_PROPER = {*PEOPLE, *TOWNS.split(), *FIGURES.split(), *LANGUAGES, "i"}


def written(text: str, mark: str = ".") -> str:
    "A sentence of the grammar with capitals, 'an' before vowels, and an end mark unless it has one."
    text = re.sub(r"\w+", lambda word: word[0].capitalize() if word[0] in _PROPER else word[0], text)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text[0].upper() + text[1:] + (mark if text[-1] not in ".!?" else "")


def past(text: str) -> str:
    "A sentence of the grammar in the past tense, for stories."
    return re.sub(r"\w+", lambda word: PAST.get(word[0], word[0]), text)


def listing(items: list[str]) -> str:
    "a, b and c"
    return ", ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else items[0]

def spoken(relation: str, subject: str) -> str:
    "A subject in normal form as the wordings of its relation want it."
    words = subject.split()
    match RELATIONS[relation]:
        case "group":
            return f"{next(w for w, n in NUMBERS.items() if str(n) == words[0])} {words[1]}"
        case "words":
            return listing(words)
        case "pair":
            return f"a {words[0]} and a {words[1]}"
        case "deed":
            owned = len(words) > 2 or words[1] in PEOPLE
            return subject if owned else f"{words[0]} the {words[1]}"
    return subject


def takes_pronoun(wording: str) -> bool:
    "Whether a pronoun can stand for the subject: not in 'the home of she'."
    return not re.search(r"of (the )?\{s\}", wording)


def fill(wording: str, relation: str, subject: str = "", pronoun: str = "", **slots: str) -> str:
    "A wording with its subject, or a pronoun in its place, and its other slots."
    wording = re.sub(r"(the )?\{s\}", pronoun, wording) if pronoun else wording
    return wording.format(s=spoken(relation, subject), **slots)


def pronoun_of(relation: str, subject: str) -> str:
    "'he', 'she' or 'it'; '' for what has no pronoun."
    if RELATIONS[relation] == "person":
        return "he" if subject in MEN.split() else "she"
    return "it" if RELATIONS[relation] in ("animal", "thing") else ""
