"""Judge every claim once more under each reasonable other choice: ``python -m workflow.choices`` (under a minute).

The table is made anew only if a table that it reads, the claims or their code have changed, or if there are tables that
were not there: a claim that waited for them may be judged.
"""

from pathlib import Path

from book.ledger import ledger
from book.ledger.claims import Book
from nb_utils.record import sources, tables

NAME = "claims"  # the one table of the stem


def origin(book: Book, stems: list[str]) -> dict[str, object]:
    """Return the provenance of what follows from the tables of ``stems``: their content, model and SAEs."""
    read = [one for stem in stems for one in tables.origins(stem, book.model, book.folder)]
    saes = {int(layer): sha256 for one in read for layer, sha256 in one["sae_sha256"].items()}
    inputs = {stem: tables.fingerprint(stem, book.model, book.folder) for stem in stems}
    there = {path.parent for path in Path(book.folder or tables.ROOT / tables.FOLDER).glob("*/*/*.parquet")}
    settings = {
        "claims": {claim.id: f"{claim.number} {claim.holds}" for claim in ledger.entries()},
        "tables": sorted(f"{path.parent.name}/{path.name}" for path in there if path.parent.name != ledger.CHOICES),
    }
    return tables.provenance(settings, read[0]["model_sha256"] if read else "", saes, inputs)


def is_new(book: Book) -> bool:
    """Say whether the stored table is what would be made today."""
    found = tables.origins(ledger.CHOICES, book.model, book.folder)
    if not found:
        return False
    today = origin(book, list(found[0]["inputs"])) | {"code": sources.code(Path(__file__))}
    return found[0] == today


def main() -> None:
    """Write the table of the book's model, unless it is new."""
    book = Book()
    if is_new(book):
        return
    found = ledger.otherwise(book)
    tables.save(found, ledger.CHOICES, NAME, origin(book, book.stems), book.folder, book.model)
    print(f"{found['claim'].nunique()} claims under {found['choice'].nunique()} choices", flush=True)


if __name__ == "__main__":
    main()
