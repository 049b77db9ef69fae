"""Keep what the claims come to today as a version of the book, before something changes that they rest on.

    python -m workflow.versions 3_first_saes "What is different afterwards, in a sentence."

The page of changes holds each version against the next, and the last against today. Without arguments, today's claims
go beside the built pages, as claims.json, and a card for each page, as cards/NN_name.json.
"""

import argparse
import datetime
import json
import re
import sys
from pathlib import Path

from book.ledger import cards, ledger, versions
from book.ledger.claims import Book
from nb_utils import files
from nb_utils.record import tables

PUBLISHED = tables.ROOT / "book/_extra/claims.json"
CARDS = cards.folder()


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    with files.whole(path) as scratch:
        scratch.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; an error is one line and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m workflow.versions", description="Keep today's verdicts.")
    parser.add_argument("name", nargs="?", help="a number and words: versions stand in the order of their names")
    parser.add_argument("what", nargs="?", help="what is different afterwards, in a sentence")
    args = parser.parse_args(argv)
    if args.name is None:
        book = Book()
        judged = ledger.judged(book=book)
        _write(PUBLISHED, {"model": tables.MODEL, "claims": versions.current(judged)})
        for old in CARDS.glob("*.json"):
            old.unlink()  # of a page that is no longer there
        for card in cards.cards(book, judged):
            _write(CARDS / f"{card['page']}.json", card)
        return 0
    if not args.what:
        print("Say what is different afterwards, in a sentence.", file=sys.stderr)
        return 1
    if not re.fullmatch(r"\d+_[a-z0-9_]+", args.name):
        print(f"A version is called by a number and words, like 3_first_saes, not {args.name!r}.", file=sys.stderr)
        return 1
    path = versions.FOLDER / f"{args.name}.json"
    if path.exists():
        print(f"{path.name} is kept already: versions do not change.", file=sys.stderr)
        return 1
    kept = {"name": args.name, "date": f"{datetime.date.today()}", "what": args.what, "claims": versions.current()}
    _write(path, kept)
    print(f"{len(kept['claims'])} claims are kept in {path.name}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
