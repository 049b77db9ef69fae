"""Feature pages: which features have one, what stands on it, and that text stays text."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nb_utils import statistics
from nb_utils.record import tables
from nb_utils.show import evidence
from workflow import feature_pages

NASTY = ["<script>alert(1)</script>", "&lt;", "`code`", "$x$", "*a*_b_", "# h", "{{ x }}", "]]>", "|"]
NASTY += ["\n\n", "\u202e", "\t"]


def save(frame, stem, name, folder):
    tables.save(pd.DataFrame(frame), stem, name, {}, folder)


def latents(task, ids, layer=10, method="prune_contrast", after=1.0):
    k, penalty = (10, None) if method == "prune_contrast" else (None, 3.0)
    return [
        {"task": task, "layer": layer, "method": method, "seed": 0, "penalty": penalty, "k": k, "latent": i,
         "before": 1.0, "after": after}
        for i in ids
    ]  # fmt: skip


def steered(task, kind, latent, rel_loss, which="best", scale=0.5, layer=10, own=True):
    return {
        "task": task, "layer": layer, "method": "steer", "mode": "add", "kind": kind, "latent": latent, "which": which,
        "scale": scale, "loss": 6.0 * (1 + rel_loss), "rel_loss": rel_loss, "accuracy": 0.25, "in_raw": True,
        "in_clean": own, "losses": [1.0, 2.0],
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Tables of two tasks, in the schema of the experiments: five features, one of them an executor and a detector."""
    for task, ids in (("antonyms", [3, 4]), ("en_es", [4, 5])):
        made = latents(task, ids) + latents(task, [7], after=0.0) + latents(task, [3], method="clean", after=0.5)
        save(made, "02_cleanup_features", task, tmp_path)
        made = latents(task, [9], layer=6) + latents(task, [9], layer=6, method="clean")
        save(made, "04_detectors_features", task, tmp_path)
        fires = {"task": task, "kind": "detector", "layer": 6, "latent": 9, "density": 0.1}
        shares = {"output": 0.75, "arrow": 0.25}
        token_mass = [fires | {"token_type": kind, "mass": share} for kind, share in shares.items()]
        save(token_mass, "04_detectors_mass", task, tmp_path)
    save(
        [
            steered("antonyms", "executor", 3, -0.5, scale=0.87), steered("antonyms", "executor", 4, 0.2),
            steered("antonyms", "executor", 3, -0.9, which="fixed"), steered("antonyms", "executor", -1, -0.95),
            steered("antonyms", "detector", 9, -0.1, layer=6), steered("antonyms", "executor", 8, 0.3, own=False),
        ],
        "05_cross_task_steering", "antonyms", tmp_path,
    )  # fmt: skip
    harmed = [steered("en_es", "executor", 3, 0.4), steered("en_es", "executor", 4, 0.1)]
    save(harmed, "05_cross_task_steering", "en_es", tmp_path)
    example = [
        {"before": f"{text} before ", "token": text, "after": f" after {text}", "activation": 12.0, "source": "sotu",
         "language": "en"}
        for text in NASTY
    ]  # fmt: skip
    lens = [{"token": text, "logit": 1.0} for text in NASTY]
    save(
        {"layer": 10, "latent": np.arange(10), "n_tokens": 1000, "density": 0.001, "largest": 12.0,
         "examples": [example] * 10, "promoted": [lens] * 10, "suppressed": [lens] * 10},
        "features", "blocks.10", tmp_path,
    )  # fmt: skip
    return tmp_path


@pytest.fixture
def features(folder):
    return {found.name: found for found in evidence.load(folder=folder)}


class Text(HTMLParser):
    """Collect what a browser would show, and the elements it would make."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.text, self.tags, self.marked, self.inside = "", set(), [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.inside = tag == "mark"

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        self.text += data
        if self.inside:
            self.marked.append(data)


def test_features_that_vectors_keep_or_that_were_steered_with_have_a_page(features):
    assert list(features) == ["6_9", "10_3", "10_4", "10_5", "10_8"]
    assert features["10_4"].kept[["kind", "task"]].values.tolist() == [["executor", "antonyms"], ["executor", "en_es"]]
    assert features["10_8"].kept["task"].tolist() == [""]


def test_the_first_sentence_is_the_largest_help_at_its_best_scale(features):
    said = Text(evidence.summary(features["10_3"])).text
    assert said == (
        "Of 2 tasks it helps Antonyms most: added at the separator, 0.87 of the mean residual norm long, "
        "it changes the loss by −50 % (6.00 to 3.00 nats)."
    )
    said = Text(evidence.summary(features["10_4"])).text
    assert said.startswith("Alone, it helps none of 2 tasks; ") and "+10 %" in said and "is harmed least" in said
    assert "at the dummy output" in evidence.summary(features["6_9"])
    assert evidence.summary(features["10_5"]).startswith("No causal test")


def test_a_task_is_never_named_without_a_causal_number_or_the_lack_of_one(features):
    assert evidence.kept(features["10_3"]) == "Antonyms (executor, −50 %); English to Spanish (executor, +40 %)"
    assert evidence.kept(features["10_5"]) == "English to Spanish (executor, no causal test)"
    assert evidence.kept(features["10_4"], most=1).endswith("; 1 more")
    assert evidence.kept(features["10_8"]) == "none"


def test_tasks_of_which_the_same_is_said_are_listed_together(features):
    kept = pd.DataFrame({"kind": ["executor", "detector", "executor"], "task": ["en_it", "en_fr", "de_en"]})
    found = replace(features["10_5"], kept=pd.concat([features["10_5"].kept[["kind", "task"]], kept]))
    assert evidence.kept(found) == (
        "English to French (detector, no causal test); "
        "German to English, English to Spanish, English to Italian (executor, no causal test)"
    )
    assert evidence.kept(found, most=2).endswith("; German to English (executor, no causal test); 2 more")


def test_random_directions_and_fixed_scales_are_no_features(features):
    assert all(found.latent >= 0 for found in features.values())
    assert features["10_3"].steering["scale"].tolist() == [0.87, 0.5]


@pytest.mark.parametrize("text", NASTY)
def test_text_shows_as_itself_in_examples_and_tokens(features, text):
    shown = evidence.show(text)
    assert unescape(shown) == text.replace("\n", "↵").replace("\t", "⇥").replace("\u202e", "[U+202E]")
    assert not re.search(r"[<>\n]", shown)
    block = evidence.html(features["10_3"])
    seen = Text(block)
    assert unescape(shown) in seen.marked
    assert not seen.tags & {"script", "code", "em", "h1"} - {"em"}
    assert "\n" not in block


def test_density_is_said_with_the_number_of_tokens(features):
    said = evidence.density(features["10_3"])
    assert said == "<p>It fires on 0.1 % of 1,000 held-out tokens, one in 1,000; its largest activation is 12.</p>"


def test_the_source_of_every_example_is_named(features):
    assert evidence.examples(features["10_3"]).count("<cite>sotu, en</cite>") == len(NASTY)


def test_mass_and_steering_are_tables_of_numbers(features):
    assert "75%" in evidence.mass(features["6_9"]) and "25%" in evidence.mass(features["6_9"])
    shown = Text(evidence.steering(features["10_3"])).text
    assert shown.index("Antonyms") < shown.index("English to Spanish")  # helped before harmed
    assert "−50 %" in shown and "+40 %" in shown and "25%" in shown
    assert shown.count("−95 %") == 1, "the random direction of one task; the other has none"


def test_a_missing_table_is_said_in_its_section(features, tmp_path_factory):
    alone = tmp_path_factory.mktemp("alone")
    save(latents("antonyms", [3]) + latents("antonyms", [3], method="clean"), "02_cleanup_features", "antonyms", alone)
    (found,) = evidence.load(folder=alone)
    whole = evidence.html(found)
    for sentence in ("No held-out text", "not measured", "No causal test", "not read through the unembedding"):
        assert sentence in whole
    assert "not measured" in evidence.mass(features["10_3"])


def test_without_any_table_there_is_a_list_without_features(tmp_path):
    assert evidence.load(folder=tmp_path) == []
    assert "There are no features yet" in feature_pages.index([], [])


def test_a_damaged_table_is_not_taken_for_a_missing_one(folder):
    path = next((folder / "05_cross_task_steering").rglob("antonyms.parquet"))
    path.write_bytes(b"PAR1 torn")
    with pytest.raises(tables.TableError, match="damaged"):
        evidence.load(folder=folder)


def test_a_link_is_made_only_to_a_page_that_there_is(folder, monkeypatch):
    monkeypatch.setenv("NB_TABLES", str(folder))
    assert evidence.page(10, 3) == "../features/10_3.html"
    assert evidence.page(10, 7) is None  # cleaned away
    assert evidence.link(np.int32(10), np.int64(3)) == '<a href="../features/10_3.html">3</a>'
    assert evidence.link(10, 7) == "7"
    assert evidence.link(10, 7, "<b>") == "&lt;b&gt;"
    assert evidence.links(10, [3, 7]).endswith('<p>Block 10: <a href="../features/10_3.html">3</a> · 7</p></div>')
    with pytest.raises(evidence.EvidenceError, match="feature 7 of block 10"):
        evidence.feature(10, 7, folder=folder)


@pytest.fixture
def labelled(folder):
    """The same with labels of features 3 and 4, a second seed, and another experiment that tried features alone."""
    places = [{"before": "", "token": text, "after": "", "activation": 3.0, "source": "sotu", "language": "en",
               "quantile": 5 - i % 5} for i, text in enumerate(NASTY)]  # fmt: skip
    named = pd.DataFrame({
        "layer": 10, "latent": [3, 4], "label": [f"promotes {NASTY[0]}", "no label"], "fires": [NASTY, []],
        "promotes": [NASTY, []], "quantiles": [places, []], "detection": [0.9, np.nan], "intruder": 0.25,
        "detection_shuffled": 0.5, "output": 0.8, "output_shuffled": 0.45, "prediction": np.nan,
        "prediction_shuffled": np.nan,
    })  # fmt: skip
    save(named, "labels", "blocks.10", folder)
    again = {"layer": 10, "latent": 3, "second": "second_seed", "match": 1, "match_active": 2, "correlation": 0.6}
    save([again | {"first": "shipped", "cosine": 0.7}, again | {"first": "first_seed", "cosine": 0.1}],
         "stability", "blocks.10", folder)  # fmt: skip
    alone = [steered("antonyms", "executor", 3, 0.9), steered("antonyms", "executor", 5, -0.2),
             steered("antonyms", "executor", -1, -0.15)]  # fmt: skip
    save(alone, "15_labels", "antonyms", folder)
    return folder


def test_a_label_stands_with_its_scores_its_quantiles_and_a_second_seed_and_stays_text(labelled, monkeypatch):
    features = {found.name: found for found in evidence.load(folder=labelled)}
    shown = Text(evidence.label(features["10_3"]))
    assert shown.text == f"Label: promotes {NASTY[0]}." and not shown.tags & {"script"}
    scores = Text(evidence.scores(features["10_3"])).text
    assert "0.90" in scores and "0.50" in scores and "–" in scores
    assert Text(evidence.quantiles(features["10_3"])).text.startswith("5/5")
    assert "cosine of 0.70" in evidence.stability(features["10_3"]) and "0.60" in evidence.stability(features["10_3"])
    for said in (evidence.label, evidence.scores, evidence.stability, evidence.quantiles):
        assert "nb-none" in said(features["6_9"])
    monkeypatch.setenv("NB_TABLES", str(labelled))
    assert Text(evidence.link(10, 3)).text == f"3 promotes {NASTY[0]}"
    listed = feature_pages.index(list(features.values()), [])
    assert evidence.show(NASTY[0]) in listed and NASTY[0] not in listed and "0.70" in listed


def test_a_feature_that_experiment_05_has_not_tried_has_its_causal_test_from_12(labelled):
    features = {found.name: found for found in evidence.load(folder=labelled)}
    tried = features["10_5"].steering
    assert tried[["task", "rel_loss", "random"]].values.tolist() == [["antonyms", -0.2, -0.15]]
    assert features["10_3"].steering["rel_loss"].tolist() == [-0.5, 0.4], "what 05 has tried counts"


def test_every_page_and_the_list_are_written_and_old_ones_go(features, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("features")
    sources = [
        {"package": "sotu", "version": "1", "licence": "public domain", "language": "en", "showable": True},
        {"package": "secret", "version": "1", "licence": "GPL", "language": "en", "showable": False},
    ]
    (tmp_path / "6_1.md").write_text("# old")
    assert feature_pages.write(list(features.values()), sources, tmp_path) == 5
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted([*features, "index"])
    listed = (tmp_path / "index.md").read_text()
    assert "sotu" in listed and "public domain" in listed and "secret" not in listed
    assert re.findall(r'href="(\w+)\.html"', listed) == list(features)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    feature_pages.write(list(features.values()), sources, tmp_path)
    assert first == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_the_title_of_a_page_is_neutral_and_its_html_is_never_cut_by_a_blank_line(features):
    text = feature_pages.page(features["10_3"])
    assert text.startswith("# Feature 3 of block 10\n\n<div")
    for block in text.split("\n\n"):
        if "<" in block:
            assert block.strip().startswith('<div class="nb-feature ') and block.strip().endswith("</div>")


def test_all_sources_that_may_be_shown_are_on_the_list():
    sources = json.loads(feature_pages.CORPUS.read_text())["sources"]
    listed = feature_pages.index([], sources)
    for source in sources:
        assert (f"<td>{source['package']}</td>" in listed) == any(
            other["showable"] for other in sources if other["package"] == source["package"]
        )


def test_a_strict_build_leaves_all_text_as_it_is(features, tmp_path_factory):
    home = tmp_path_factory.mktemp("book")
    shutil.copy(tables.ROOT / "_config.yml", home)
    for part in ("_assets", "_extra", "_templates", "references.bib"):
        (home / "book").mkdir(exist_ok=True)
        (home / "book" / part).symlink_to(tables.ROOT / "book" / part)
    contents = "format: jb-book\nroot: book/features/index\nchapters: [{glob: book/features/*_*}]\n"
    (home / "_toc.yml").write_text(contents)
    feature_pages.write(list(features.values()), [], home / "book/features")
    command = [Path(sys.executable).with_name("jupyter-book"), "build", home, "--all", "-W", "-n", "--keep-going"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    page = (home / "_build/html/book/features/10_3.html").read_text()
    assert Text(page).marked == [unescape(evidence.show(text)) for text in NASTY]
    assert "alert(1)</script>" not in page


def test_a_dashboard_holds_what_the_table_knows_and_its_pieces_fit_together():
    data = json.loads(json.dumps(evidence.dashboard(10, [2763, 5])))
    assert (data["model_id"], data["layer"]) == ("gemma-3-270m", 10)
    table = tables.load("features", columns=["layer", "latent", "density", "promoted", "largest", "examples"])
    for one, latent in zip(data["features"], (2763, 5), strict=True):
        row = statistics.rows(table, layer=10, latent=latent).iloc[0]
        assert one["feature_index"] == latent and one["frac_nonzero"] == pytest.approx(float(row["density"]))
        assert one["pos_str"] == [token["token"] for token in row["promoted"]]
        assert len(one["neg_str"]) == len(one["neg_values"]) and one["vector"] == []
        assert len(one["activations"]) == len(row["examples"])
        for shown in one["activations"]:
            assert len(shown["tokens"]) == len(shown["values"]) == 3
            peak = shown["values"][shown["qualifying_token_index"]]
            assert 0 < peak == max(shown["values"]) <= shown["bin_max"] * 1.01, "examples are rounded"


@pytest.mark.parametrize("layer, latent, says", [(3, 1, "run `make evidence`"), (10, 99999, "no feature 99999")])
def test_a_dashboard_that_cannot_be_is_refused_in_a_sentence(layer, latent, says):
    with pytest.raises(evidence.EvidenceError, match=says):
        evidence.dashboard(layer, [latent])
