"""Text of users, files and models: shown as itself wherever it stands, and mapped to names that any file can have."""

from __future__ import annotations

import hashlib
import re
import sys
import unicodedata

MARKS = {"\n": "↵", "\t": "⇥"}
JOINERS = "\u200c\u200d"  # invisible, and part of how words and emoji are written
SIGN = re.compile(r"(?!(?<=[A-Za-z0-9])_[A-Za-z0-9])[!-/:-@\[-`{-~]")  # in a word, _ means nothing
STEM, DIGITS = 40, 8  # length of a name, and of the hash behind it


def visible(text: str) -> str:
    """Return text on one line, with what does not show shown: line ends as ↵, characters without a glyph by number."""
    return "".join(c if _shows(c) else MARKS.get(c) or f"[U+{ord(c):04X}]" for c in str(text))


def _shows(c: str) -> bool:
    return c.isprintable() or c in JOINERS or unicodedata.category(c) == "Zs"


def verbatim(text: object) -> str:
    """Return text that shows as itself in Markdown, in HTML, and in pages where MathJax looks for formulas.

    Every sign that could mean something there becomes its number; the two that begin a formula stand in an element of
    their own, because MathJax reads the text of an element after it was decoded.
    """
    return SIGN.sub(lambda found: _numbered(found[0]), visible(str(text)))


def _numbered(sign: str) -> str:
    return f"<span>&#{ord(sign)};</span>" if sign in "$\\" else f"&#{ord(sign)};"


def slug(name: str, content: bytes) -> str:
    """Return a name of letters, digits, ``_`` and ``-`` that is like ``name``, a dot, and the hash of ``content``.

    What has other content has another slug, whatever it is called; none is a name without a dot, as ours are.
    """
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    stem = re.sub(r"[^A-Za-z0-9_]+", "-", plain)[:STEM].strip("-") or "own"
    return f"{stem}.{hashlib.sha256(content).hexdigest()[:DIGITS]}"


def print_anything() -> None:
    """Let this process print to any terminal: what that has no character for becomes a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
