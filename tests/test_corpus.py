"""The corpus's pure steps: cleaning, cutting, splitting, capping; no network and no packages."""

import io
import zipfile

import pytest

from workflow import build_corpus as corpus

SOURCE = corpus.SOURCES[0]


def test_markup_becomes_paragraphs_and_code_keeps_its_lines():
    page = ("<head><title>no</title></head><!-- no --><p>Tom &amp;\n  <b>Jerry</b></p><script>no()</script>"
            "<pre>def f():\n    <i>return</i> 1</pre><p>end</p>")
    assert corpus.clean(corpus.strip_markup(page)) == "Tom & Jerry\n\ndef f():\n    return 1\n\nend"


def test_hard_wrapped_prose_is_joined_and_verse_is_not():
    prose = "It was the best of times, it was the worst of times, it was\nthe age of wisdom."
    verse = "Tyger Tyger, burning bright,\nIn the forests of the night;"
    assert corpus.unwrap(f"{prose}\n \n{verse}") == f"{prose.replace(chr(10), ' ')}\n\n{verse}"


def test_cleaning_drops_addresses_and_needless_white_space():
    dirty = "See (https://example.org/a?b=1) or  write to <ann.o@example.org>.\r\n\r\n\r\n\tnext\u00ad \x07line  \n"
    assert corpus.clean(dirty) == "See or write to .\n\n\tnext line"


def test_a_paragraph_is_kept_once_across_texts():
    seen = set()
    assert corpus.unseen(["a", "b", "a", " "], seen) == ["a", "b"]
    assert corpus.unseen(["b", "c"], seen) == ["c"]


def test_documents_hold_whole_paragraphs_and_never_exceed_the_limit():
    paragraphs = ["x" * 40, "y" * 40, "z" * 40]
    assert list(corpus.chunk(paragraphs, 100)) == ["x" * 40 + "\n\n" + "y" * 40, "z" * 40]


def test_a_long_paragraph_breaks_after_a_sentence_and_loses_nothing():
    sentence = "This sentence has just thirty. "
    pieces = list(corpus.chunk([sentence * 20, "w" * 250], 100))
    assert all(len(piece) <= 100 for piece in pieces)
    assert all(piece.endswith(".") for piece in pieces if "w" not in piece)
    assert "".join("".join(pieces).split()) == "".join((sentence * 20).split()) + "w" * 250


@pytest.mark.parametrize(("text", "kept"), [("word " * 50, True), ("word " * 10, False), ("12.5 | 7.25 " * 50, False)])
def test_short_or_numeric_documents_are_dropped(text, kept):
    assert corpus.worth_keeping(text) is kept


def test_the_split_of_a_group_never_changes_and_takes_the_stated_share():
    assert [i for i in range(50) if corpus.split_of(f"austen-emma.txt/{i}") == "heldout"] == [35, 42, 47]
    held_out = sum(corpus.split_of(str(i)) == "heldout" for i in range(10_000))
    assert abs(held_out / 10_000 - corpus.HELDOUT) < 0.01


def test_neighbouring_documents_of_a_text_share_a_split(tmp_path):
    archive = tmp_path / "speeches-1-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as bundle:
        words = [f"{chr(97 + i % 26)}{chr(97 + i // 26)}word" for i in range(20)]
        text = "\n\n".join(" ".join([word] * 600) for word in words)
        bundle.writestr("speeches/one.txt", text)
        bundle.writestr("other/one.md", text)
    found = list(corpus.documents(SOURCE, archive, set()))
    assert [d.group for d in found] == [f"one.txt/{i // corpus.BLOCK}" for i in range(20)]


def test_a_source_is_capped_by_whole_groups_whatever_the_order():
    found = [corpus.Document(SOURCE, str(i // 2), f"{i:010}") for i in range(40)]
    kept = corpus.cap(found, 105)
    assert 80 <= sum(len(d.text) for d in kept) <= 105
    assert all([d.group for d in kept].count(d.group) == 2 for d in kept)
    assert sorted(corpus.cap(found[::-1], 105), key=lambda d: d.text) == kept


def test_no_package_exceeds_its_share_of_what_remains():
    sizes = {"large": 900, "b": 100, "c": 100, "d": 100, "e": 100, "f": 100}
    limit = corpus.shared_limit(sizes, 0.2)
    assert limit == pytest.approx(125, abs=2)  # 125 / (125 + 500) = 0.2
    assert corpus.shared_limit(dict.fromkeys("abcdef", 10), 0.2) == 10


def test_wordnet_lines_become_readable_entries():
    line = b"00976953 04 n 02 foray 0 surprise_raid 0 001 @ 00975452 n 0000 | a sudden short attack  \n"
    assert list(corpus.read_wordnet([("x/data.noun", b"  1 licence\n" + line)], "")) == [
        ("data.noun", "foray, surprise raid: a sudden short attack")]


def test_catalogue_messages_split_alike_in_every_language():
    long = {f"Original number {i} " + "of some length " * 6: f"Traduction {i} " + "assez longue " * 6 for i in range(9)}
    file = [("locale/fr/LC_MESSAGES/game.mo", _catalogue(long | {"short": "court"}))]
    french, english = (dict(corpus.read_messages(file, language)) for language in ("fr", "en"))
    assert french.keys() == english.keys()
    assert "court" not in "".join(french.values())
    assert set("\n\n".join(french.values()).split("\n\n")) == {t for t in long.values()}


def test_a_missing_client_is_named_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(corpus.CorpusError, match="no apt-get here; run `apt-get update` on a Debian system"):
        corpus.fetch("deb", "dict-devil", None, tmp_path)


def test_a_package_already_there_is_not_downloaded_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    archive = tmp_path / "dict-devil_1%3a1.0-13_all.deb"
    archive.touch()
    assert corpus.fetch("deb", "dict-devil", None, tmp_path) == archive
    assert corpus.version_of(archive) == "1:1.0-13"


def test_the_manifest_adds_up_and_its_hash_is_of_the_texts():
    found = [corpus.Document(SOURCE, "g", "ab"), corpus.Document(corpus.SOURCES[1], "g", "cdef")]
    versions = {d.source.package: "1" for d in found}
    manifest = corpus.describe(found, versions)
    assert (manifest["documents"], manifest["characters"]) == (2, 6)
    assert sum(s["share"] for s in manifest["sources"]) == pytest.approx(1, abs=1e-3)
    assert manifest["sha256"] != corpus.describe(found[::-1], versions)["sha256"]
    assert SOURCE.package not in manifest["left_out"]


def _catalogue(messages: dict[str, str]) -> bytes:
    """Return a little-endian .mo file."""
    messages = dict(sorted(({"": "Content-Type: text/plain; charset=UTF-8\n"} | messages).items()))
    columns = [[k.encode() for k in messages], [v.encode() for v in messages.values()]]
    out, tables, start = io.BytesIO(), b"", 28 + 16 * len(messages)
    for column in columns:
        for item in column:
            tables += len(item).to_bytes(4, "little") + (start + out.tell()).to_bytes(4, "little")
            out.write(item + b"\0")
    head = [0x950412DE, 0, len(messages), 28, 28 + 8 * len(messages), 0, 0]
    return b"".join(n.to_bytes(4, "little") for n in head) + tables + out.getvalue()
