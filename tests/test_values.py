"""Figures whose values can be read: what is drawn is what is told."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from nb_utils.show import plots, values

LINES = pd.DataFrame({
    "method": ["task_vector"] * 3 + ["clean"] * 3 + ["few_shot"], "mode": ["add"] * 6 + ["none"],
    "layer": [4, 8, 11] * 2 + [-1], "mean": [3.0, 2.0, 1.5, 2.5, np.nan, 1.25, 0.5],
})  # fmt: skip


def test_lines_are_told_point_by_point_and_levels_once():
    told = values.of(plots.loss_by_layer(LINES).figure)
    swept = LINES[LINES["layer"].ge(0) & LINES["mean"].notna()]
    drawn = told[told["x"].ne("")]
    assert list(zip(drawn["series"], drawn["x"], drawn["y"].astype(float), strict=True)) == [
        (plots.label(row.method), str(row.layer), row.mean) for row in swept.itertuples()
    ]
    assert told.loc[told["x"].eq(""), ["series", "y"]].to_numpy().tolist() == [[plots.label("few_shot"), "0.5"]]


def test_cells_of_a_map_are_told_by_the_names_of_row_and_column():
    grid = pd.DataFrame([[0.0, 12.0], [np.nan, 3.0]], index=[4, 8], columns=[9, 11])
    told = values.of(plots.layer_grids({"clean": grid}, largest=12))
    assert told[["panel", "y", "x", "value"]].to_numpy().tolist() == [
        [plots.label("clean"), *cell] for cell in (["4", "9", 0], ["4", "11", 12], ["8", "11", 3])
    ]


def test_parts_of_a_bar_are_told_by_what_it_stands_for():
    ax = pd.DataFrame({"outputs": [0.7, 0.2], "inputs": [0.1, 0.5]}, ["head 3", "head 2"]).plot.barh(stacked=True)
    told = values.of(ax.figure)
    assert told[["series", "y"]].agg(tuple, axis=1).tolist() == [
        ("outputs", "head 3"), ("outputs", "head 2"), ("inputs", "head 3"), ("inputs", "head 2")]  # fmt: skip
    assert told["value"].round(6).tolist() == [0.7, 0.2, 0.1, 0.5]
    assert "head 3 · 0.7" in values.show(ax, "bars").data


def test_every_spot_has_its_words_and_no_id_meets_another_figures():
    pages = [values.show(plots.loss_by_layer(LINES.assign(mean=LINES["mean"] + i)), "Loss").data for i in range(2)]
    assert [page.count('class="nb-spot"') for page in pages] == [5, 5]
    assert "<title>task vector · layer (output of block) 8 · loss (nats, first 2 answer tokens) 2.0</title>" in pages[0]
    ids = [set(re.findall(r'\bid="([^"]+)"', page)) for page in pages]
    used = [set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) for page in pages]
    assert not ids[0] & ids[1] and used[0] <= ids[0] and used[1] <= ids[1]
    assert pages[0] == values.show(plots.loss_by_layer(LINES), "Loss").data, "a build is not like the next"


def test_a_point_outside_the_frame_is_in_the_table_alone():
    ax = plots.loss_by_layer(LINES)
    ax.set_ylim(1.75, 4)
    assert len(values.of(ax.figure)) == 6
    page = values.show(ax, "Loss").data
    assert page.count('class="nb-spot"') == 3 and "The 6 values" in page


def test_words_of_a_figure_are_text():
    ax = plt.subplots()[1]
    ax.plot([1], [2], "o", label="<b>&")
    page = values.show(ax, '<i>"alt"').data
    assert "<b>" not in page and "<i>" not in page and "&lt;b&gt;&amp;" in page


def test_lines_that_seaborn_draws_have_their_names():
    frame = pd.DataFrame([
        {"method": "clean", "prompts": count, "on": on, "choice": choice, "task": task, "loss": loss}
        for count in (6, 24) for task in "ab"
        for on, choice, loss in (("test", "validation", 2.0), ("test", "train", 3.0), ("train", "validation", 1.0))
    ])  # fmt: skip
    told = values.of(plots.loss_by_prompts(frame))
    means = told.groupby("series")["y"].agg(lambda y: set(y.astype(float)))
    assert means.to_dict() == {
        "test, step chosen on validation": {2.0}, "test, step chosen on training prompts": {3.0},
        "training prompts": {1.0},
    }  # fmt: skip
