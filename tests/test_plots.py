import matplotlib

matplotlib.use("agg")

import itertools
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Text

from nb_utils import prompts
from nb_utils.record.tables import ROOT
from nb_utils.show import plots

STORY = [
    "zero_shot", "few_shot", "task_vector", "centred_best_scale", "learned_vector", "reconstruct", "gradient_pursuit",
    "clean", "prune_contrast",
]  # fmt: skip
# Machado et al. 2009, full severity, on linear RGB.
VISIONS = {
    "usual": np.eye(3),
    "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritan": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def layers_of(method="task_vector", mode="add", means=(6, 4, 5), **columns):
    frame = pd.DataFrame({"method": method, "mode": mode, "layer": [4, 8, 12][: len(means)], "mean": means})
    return frame.assign(**columns)


def levels():
    return pd.DataFrame(
        {"method": ["zero_shot", "few_shot"], "mode": "none", "layer": -1, "mean": [9.0, 2.0], "l0": np.nan}
    )


def texts(ax):
    return [text.get_text() for text in ax.texts]


def drawn(ax):
    return [line for line in ax.lines if len(line.get_xdata()) > 2]


# --- the palette ---


def test_every_method_of_the_modules_has_a_colour_and_a_name():
    source = "".join((ROOT / "nb_utils" / f"{module}.py").read_text() for module in ("vectors", "cleaning"))
    public = set(re.findall(r"^def ([a-z]\w+)\(at: Streams, layer: int, sae", source, re.M))
    assert {"reconstruct", "gradient_pursuit", "random_support"} <= public
    assert public <= set(plots.COLORS)
    assert set(plots.COLORS) | set(plots.DICTIONARIES) == set(plots.LABELS)


def test_no_two_methods_share_a_colour_or_a_name():
    assert len({to_hex(color) for color in plots.COLORS.values()}) == len(plots.COLORS)
    assert len(set(plots.LABELS.values())) == len(plots.LABELS)


def lab(color, vision):
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]]
    xyz = np.array(to_xyz) @ np.clip(np.array(VISIONS[vision]) @ linear, 0, 1) / [0.9505, 1, 1.0888]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISIONS)
def test_the_main_colours_can_be_told_apart_by_every_eye(vision):
    distance = {
        (a, b): np.linalg.norm(lab(plots.COLORS[a], vision) - lab(plots.COLORS[b], vision))
        for a, b in itertools.combinations(STORY, 2)
    }
    assert min(distance.values()) > 12, min(distance, key=distance.get)
    assert np.linalg.norm(lab(plots.GREW, vision) - lab(plots.SHRANK, vision)) > 20


def near(a, b):
    return min(np.linalg.norm(lab(a, vision) - lab(b, vision)) for vision in VISIONS) <= 12


def test_methods_whose_colours_are_near_for_anyone_have_different_markers():
    references = {"zero_shot", "few_shot", "dummy_shot"}  # dotted lines, never with a marker
    shape = {m: "dotted" if m in references else plots.MARKERS.get(m, "o") for m in plots.COLORS}
    alike = [pair for pair in itertools.combinations(plots.COLORS, 2) if near(*map(plots.COLORS.get, pair))]
    assert not [pair for pair in itertools.combinations(plots.CYCLE, 2) if near(*pair)]
    assert alike and not [(a, b) for a, b in alike if shape[a] == shape[b]]
    frame = pd.concat([layers_of(method) for method in plots.COLORS])
    drawn = [line.get_marker() for line in plots.loss_by_layer(frame).lines]
    assert set(plots.MARKERS.values()) < set(drawn), "the markers are not drawn"
    legend = plots.method_legend(plt.figure(), list(plots.MARKERS))
    assert [line.get_marker() for line in legend.legend_handles] == list(plots.MARKERS.values())


def test_the_lines_and_bars_of_the_widgets_can_be_told_apart_by_every_eye():
    for path in (ROOT / "nb_utils/show/front").glob("*.js"):
        for a, b in itertools.combinations(set(re.findall(r"#[0-9A-Fa-f]{6}", path.read_text())), 2):
            assert not near(a, b), f"{path.name}: {a} {b}"


def test_names_are_readable_and_carry_their_number_of_latents():
    assert plots.label("prune_contrast", 20) == "pruned, contrast codes (20)"
    assert plots.label("task_vector", pd.NA) == plots.label("task_vector") == "task vector"
    assert plots.label("my_own") == "my own"
    assert plots.title("en_es") == "English to Spanish"
    assert plots.title("my_task") == "my task"


# --- what all functions keep to ---

FEATURES = pd.DataFrame({"latent": [7, 3, 5, 9], "before": [10.0, 4.0, 1.0, 0.0], "after": [2.0, 0.0, 4.0, 0.0]})
TASKS = pd.DataFrame(
    {
        "task": ["antonyms", "antonyms", "en_es", "en_es"], "method": ["zero_shot", "few_shot"] * 2,
        "accuracy": [0.1, 0.7, 0.0, 0.5], "rel_loss": [0.0, -0.6, 0.2, -0.4],
    }
)  # fmt: skip
PATH = pd.DataFrame(
    {"method": "clean", "mode": "add", "penalty": [0.0, 1.0, 10.0], "l0": [60.0, 20.0, 5.0], "mean": [3.0, 3.5, 4.0]}
)
CALLS = {
    "loss_by_layer": (plots.loss_by_layer, layers_of()),
    "loss_vs_l0": (plots.loss_vs_l0, PATH),
    "lambda_path": (plots.lambda_path, PATH),
    "task_heatmap": (plots.task_heatmap, TASKS),
    "feature_weights": (plots.feature_weights, FEATURES),
    "accuracy_dots": (plots.accuracy_dots, TASKS),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_figure_is_drawn_on_the_axes_it_is_given_and_leaves_the_frame_alone(name):
    draw, frame = CALLS[name]
    figure, ax = plt.subplots()
    before = frame.copy(deep=True)
    assert draw(frame, ax=ax) is ax
    assert plt.get_fignums() == [figure.number]
    pd.testing.assert_frame_equal(frame, before)


@pytest.mark.parametrize("name", CALLS)
def test_a_figure_makes_its_own_axes_and_neither_shows_nor_saves(name, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("plots show and save nothing")

    monkeypatch.setattr(plt, "show", forbidden)
    monkeypatch.setattr(plt.Figure, "savefig", forbidden)
    draw, frame = CALLS[name]
    ax = draw(frame)
    assert ax.has_data()
    assert plt.get_fignums() == [ax.figure.number]


@pytest.mark.parametrize("name", ["loss_by_layer", "loss_vs_l0", "lambda_path"])
def test_axes_name_their_unit(name):
    draw, frame = CALLS[name]
    ax = draw(frame)
    assert ax.get_ylabel() == "loss (nats, first 2 answer tokens)"
    assert ax.get_xlabel()


# --- loss by layer ---


def test_colour_is_the_method_and_line_style_the_mode():
    ax = plots.loss_by_layer(pd.concat([layers_of(mode=mode, means=means) for mode, means in
                                        (("add", (6, 4, 5)), ("replace", (3, 2, 3)))]))  # fmt: skip
    add, replace = drawn(ax)
    assert add.get_color() == replace.get_color() == plots.COLORS["task_vector"]
    assert add.get_linestyle() == "-"
    assert replace.get_linestyle() == "--"
    assert {"task vector, add", "task vector, replace"} == set(texts(ax))


def test_unsteered_losses_are_level_lines_with_their_names():
    ax = plots.loss_by_layer(pd.concat([levels(), layers_of()]))
    flat = {line.get_ydata()[0] for line in ax.lines if len(set(line.get_ydata())) == 1}
    assert flat == {9.0, 2.0}
    assert set(texts(ax)) == {"zero-shot", "few-shot", "task vector"}
    assert ax.get_xticks().tolist() == [4, 8, 12]


def test_layers_that_a_method_lacks_are_left_out():
    ax = plots.loss_by_layer(pd.concat([layers_of(), layers_of("clean", means=(3, 2))]))
    assert [len(line.get_xdata()) for line in ax.lines] == [3, 2]


def test_layers_in_any_order_make_the_same_line():
    ax = plots.loss_by_layer(layers_of().iloc[::-1])
    assert ax.lines[0].get_xdata().tolist() == [4, 8, 12]


def test_intervals_are_bands_where_the_frame_has_them():
    assert not plots.loss_by_layer(layers_of()).collections
    band = plots.loss_by_layer(layers_of(low=[5, 3, 4], high=[7, 5, 6])).collections[0]
    assert band.get_paths()[0].vertices[:, 1].min() == 3
    assert band.get_paths()[0].vertices[:, 1].max() == 7


def test_sizes_of_one_method_are_lines_of_their_own():
    frame = pd.concat([layers_of("gradient_pursuit", k=k) for k in (5, 40)]).astype({"k": "Int64"})
    assert set(texts(plots.loss_by_layer(frame))) == {"gradient pursuit (5)", "gradient pursuit (40)"}


def test_names_at_line_ends_do_not_overlap():
    many = ["task_vector", "centred", "reconstruct", "clean", "prune_contrast", "prune_codes", "learned_vector"]
    ax = plots.loss_by_layer(pd.concat([layers_of(m, means=(6, 5, 4 + i / 100)) for i, m in enumerate(many)]))
    ax.figure.canvas.draw()
    extents = [Text.get_window_extent(text) for text in ax.texts]  # without the arrows
    boxes = sorted((extent.y0, extent.y1) for extent in extents)
    assert len(boxes) == 7
    assert all(top <= bottom for (_, top), (bottom, _) in itertools.pairwise(boxes))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12).map(sorted))
def test_heights_are_moved_apart_in_order_and_no_more_than_needed(wanted):
    placed = plots._spread(wanted, 0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(placed))
    assert np.mean(placed) == pytest.approx(np.mean(wanted))
    if all(b - a >= 0.1 for a, b in itertools.pairwise(wanted)):
        assert placed == pytest.approx(wanted)


def test_points_that_average_fewer_tasks_do_not_bend_a_line():
    ax = plots.loss_by_layer(layers_of(tasks=[26, 3, 26]))
    assert ax.lines[0].get_xdata().tolist() == [4, 12]


# --- loss against L0 and the penalty ---


def test_dense_methods_are_levels_and_sparse_ones_paths_over_l0():
    dense = pd.DataFrame({"method": ["task_vector"], "mode": ["add"], "l0": [np.nan], "mean": [5.0]})
    ax = plots.loss_vs_l0(pd.concat([PATH, dense]))
    path, level = drawn(ax)[0], next(line for line in ax.lines if len(line.get_xdata()) == 2)
    assert path.get_xdata().tolist() == [5, 20, 60]
    assert set(level.get_ydata()) == {5.0}
    assert ax.get_xscale() == "log"
    assert set(texts(ax)) == {"cleaned", "task vector"}


def test_only_dense_methods_still_make_a_figure():
    ax = plots.loss_vs_l0(levels())
    assert set(texts(ax)) == {"zero-shot", "few-shot"}


def test_the_penalty_axis_names_every_penalty_and_zero_is_leftmost():
    ax = plots.lambda_path(PATH)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "1", "10"]
    assert np.all(np.diff(ax.get_xticks()) > 0)


def test_the_l0_of_a_method_without_penalty_is_a_level():
    reference = pd.DataFrame({"method": ["reconstruct", "task_vector"], "penalty": np.nan, "l0": [80.0, np.nan],
                              "mean": [7.0, 6.0]})  # fmt: skip
    frame = pd.concat([PATH, reference])
    assert set(texts(plots.lambda_path(frame, "l0"))) == {"cleaned", "reconstruction"}
    assert set(texts(plots.lambda_path(frame))) == {"cleaned", "reconstruction", "task vector"}
    assert plots.lambda_path(frame, "l0").get_ylabel() == "active latents (L0)"


# --- tasks ---


def test_flagged_tasks_stand_last_in_the_heat_map():
    frame = pd.concat([TASKS, TASKS.assign(task="location_religion", rel_loss=[-0.9, -0.9, -0.9, -0.9])])
    ax = plots.task_heatmap(frame, flagged=("location_religion", "not_measured"))
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [
        "Antonyms", "English to Spanish", "Country to main religion"
    ]  # fmt: skip
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["zero-shot", "few-shot"]
    assert {"−.60", "+.20", "−.90"} <= set(texts(ax))


def test_a_cell_without_a_measurement_stays_empty():
    ax = plots.task_heatmap(TASKS.iloc[:3])
    assert len(ax.texts) == 3


def test_a_heat_map_is_white_at_no_change_whatever_its_numbers():
    ax = plots.task_heatmap(TASKS.assign(rel_loss=[-0.9, -0.9, -0.5, 4.0]))
    norm = ax.images[0].norm
    assert norm(0) == 0.5
    assert norm.vmax == 1.0


def test_dots_are_ordered_by_the_last_method():
    ax = plots.accuracy_dots(TASKS)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["English to Spanish", "Antonyms"]
    assert [line.get_color() for line in ax.lines] == [plots.COLORS["zero_shot"], plots.COLORS["few_shot"]]


def test_dots_of_a_loss_have_its_unit_and_room_for_it():
    ax = plots.accuracy_dots(TASKS.assign(loss=TASKS["accuracy"] * 10), value="loss")
    assert ax.get_xlim()[1] > 7 and ax.get_xlabel() == plots.UNITS["loss"]
    assert ax.lines[1].get_xdata().max() == 7


def test_seeds_are_averaged_in_dots():
    twice = pd.concat([TASKS, TASKS.assign(accuracy=TASKS["accuracy"] + 0.2)])
    ax = plots.accuracy_dots(twice)
    assert ax.lines[1].get_xdata().tolist() == pytest.approx([0.6, 0.8])


# --- features ---


def bars(ax):
    before, after = ax.containers
    return [bar.get_height() for bar in before], [(bar.get_height(), to_hex(bar.get_facecolor())) for bar in after]


def test_weights_are_shares_of_the_largest_of_their_set_ordered_by_before():
    before, after = bars(plots.feature_weights(FEATURES))
    assert before == [1.0, 0.4, 0.1, 0.0]
    assert [height for height, _ in after] == [0.5, 0.0, 1.0, 0.0]


def test_survivors_are_green_when_they_grew_red_when_they_shrank_and_named():
    ax = plots.feature_weights(FEATURES)
    _, after = bars(ax)
    assert after[0][1] == to_hex(plots.SHRANK)
    assert after[2][1] == to_hex(plots.GREW)
    assert set(texts(ax)) == {"7", "5"}


def test_signed_weights_keep_their_sign():
    before, after = bars(plots.feature_weights(FEATURES.assign(before=[-10, 4, 1, 0], after=[-4, 0, 2, 0])))
    assert before[0] == -1.0
    assert after[0][0] == -1.0


def test_every_survivor_is_shown_however_small_it_was():
    many = pd.DataFrame({"latent": range(100), "before": np.arange(100, 0, -1.0), "after": 0.0})
    many.loc[99, "after"] = 1.0
    before, after = bars(plots.feature_weights(many, most=10))
    assert len(before) == 11
    assert after[-1][0] == 1.0


def test_a_vector_with_nothing_left_still_makes_a_figure():
    before, _ = bars(plots.feature_weights(FEATURES.assign(after=0.0)))
    assert before[0] == 1.0


def test_figures_that_need_no_labels_get_a_legend_in_the_colours_of_the_methods():
    figure = plt.figure()
    legend = plots.method_legend(figure, ["few_shot", "clean"])
    assert [text.get_text() for text in legend.get_texts()] == ["few-shot", "cleaned"]
    assert [line.get_color() for line in legend.get_lines()] == [plots.COLORS["few_shot"], plots.COLORS["clean"]]


def test_the_style_is_plain_data():
    with plt.rc_context():
        plots.use_style()
        assert not plt.rcParams["axes.spines.top"]
        json.dumps([plt.rcParams["font.size"], plt.rcParams["figure.figsize"]])


def test_a_table_is_formatted_the_same_at_every_build():
    frame = pd.DataFrame({"loss": [1.234, np.nan], "share": [0.5, 0.25]}, index=["a", "b"]).rename_axis(columns="nats")
    page = plots.table(frame, {"share": "{:.0%}"}, index=True).to_html()
    cells = re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", page)
    cells = [cell for cell in cells if cell != "&nbsp;"]
    assert cells == ["nats", "loss", "share", "a", "1.23", "50%", "b", "–", "25%"]
    assert plots.table(frame, {"share": "{:.0%}"}, index=True).to_html() == page
    assert 'class="dataframe"' in page
    assert ">a</th>" not in plots.table(frame).to_html()


# --- layers, scales and single features ---


def test_a_map_of_heads_has_blocks_across_and_a_scale_that_is_even_around_zero():
    heads = [(layer, head) for layer in (2, 5) for head in (0, 1, 2)]
    frame = pd.DataFrame([dict(layer=layer, head=head, effect=layer - 2 * head) for layer, head in heads])
    ax = plots.head_map(frame)
    (image,) = ax.images
    assert image.get_array().tolist() == [[2, 5], [0, 3], [-2, 1]] and image.norm.vmax == -image.norm.vmin == 5
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["2", "5"]
    assert plots.head_map(frame, bound=9).images[0].norm.vmax == 9


def test_layer_grids_share_one_scale_and_write_what_is_measured():
    grid = pd.DataFrame([[3.0, np.nan], [np.nan, 24.0]], index=[4, 6], columns=[8, 10])
    figure = plots.layer_grids({"clean": grid, "centred": grid / 2}, largest=25)
    assert [texts(ax) for ax in figure.axes] == [["3", "24"], ["2", "12"]]
    assert {ax.images[0].get_clim() for ax in figure.axes} == {(0, 25)}
    assert [ax.get_title() for ax in figure.axes] == ["cleaned", "centred"]


def test_grids_of_templates_share_one_scale_around_zero_and_are_named_by_how_prompts_read():
    names = ["arrow", "question"]
    grid = pd.DataFrame([[-0.8, 0.1], [4.0, np.nan]], index=names, columns=names)
    figure = plots.template_grids({"clean": grid, "centred": grid / 2})
    assert [texts(ax) for ax in figure.axes] == [["−.80", "+.10", "+4.00"], ["−.40", "+.05", "+2.00"]]
    assert {ax.images[0].get_clim() for ax in figure.axes} == {(-1, 1)}, "a broken cell must not fade the others"
    assert [tick.get_text() for tick in figure.axes[1].get_xticklabels()] == ["x -> y", "Q: x ⏎ A: y"]
    assert set(plots.TEMPLATES) == set(prompts.TEMPLATES)


def test_a_matrix_of_tasks_keeps_its_order_and_names_both_sides():
    grid = pd.DataFrame([[-0.9, 0.0], [5.0, -0.5]], index=["en_es", "antonyms"], columns=["antonyms", "en_es"])
    ax = plots.task_matrix(grid)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["English to Spanish", "Antonyms"]
    assert ax.images[0].get_array().tolist() == grid.to_numpy().tolist() and ax.images[0].get_clim() == (-1, 1)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("prompts of", "vector of")


def test_points_of_methods_stand_in_the_order_of_the_frame_with_their_intervals():
    frame = pd.DataFrame(
        {"method": ["prune_contrast", "clean"], "k": pd.array([20, None], "Int64"), "mean": [1.0, 2.0],
         "low": [0.5, 1.0], "high": [2.0, 2.5]}
    )  # fmt: skip
    ax = plots.method_points(frame, "KL (nats)")
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["pruned, contrast codes (20)", "cleaned"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the first stands on top"
    assert [bar.get_segments()[0][:, 0].tolist() for bar in ax.collections] == [[0.5, 2.0], [1.0, 2.5]]
    colors = [to_hex(line.get_color()) for line in ax.lines]
    assert colors[:2] == [plots.COLORS[method].lower() for method in frame["method"]]


def test_a_sweep_has_a_line_a_feature_and_random_directions_in_grey():
    frame = pd.DataFrame({"latent": [5, 5, 9, 9, -1, -1], "scale": [0.1, 1.0] * 3, "loss": [5, 2, 5, 4, 5, 6.0]})
    ax = plots.scale_sweep(frame)
    colors = [to_hex(line.get_color()) for line in ax.lines]
    assert colors.count(plots.COLORS["random_support"].lower()) == 1 and len(set(colors)) == 3
    assert texts(ax) == ["random directions", "feature 5", "feature 9"]
    assert ax.get_xscale() == "log"


def test_loss_by_scale_lets_the_whole_vector_stand_out_from_features_and_random_directions():
    frame = pd.DataFrame({"latent": [-2, -2, -1, -1, 5, 5], "scale": [0.0, 1.0] * 3, "loss": [4, 6, 4, 1, 4, 3.0]})
    drawn = plots.loss_by_scale(frame, whole=-1).lines
    assert [(list(line.get_ydata()), line.get_linestyle()) for line in drawn[:3]] == [
        ([4, 6], "--"), ([4, 1], "-"), ([4, 3], "-")]  # fmt: skip
    assert len({to_hex(line.get_color()) for line in drawn[:3]}) == 3
    assert set(drawn[3].get_ydata()) == {4}, "the unsteered loss"


def test_heat_maps_of_steering_mark_where_a_feature_was_found():
    at = dict(index=[7, 8, -1], columns=["antonyms", "en_es"])
    none = [False, False]
    raw = pd.DataFrame([[-0.5, 3.0], [0.0, -0.2], [0.1, 0.3]], **at)
    gain = pd.DataFrame([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], **at)
    in_raw = pd.DataFrame([[True, True], none, none], **at)
    in_clean = pd.DataFrame([[True, False], [True, False], none], **at)
    above, below = plots.steering_heatmaps(raw, gain, in_raw, in_clean).axes[:2]
    assert above.images[0].get_array().max() == 1, "clipped as in the post"
    hollow, full = (marks.get_offsets().tolist() for marks in above.collections)
    assert hollow == [[1, 0]] and full == [[0, 0], [0, 1]]
    assert [tick.get_text() for tick in above.get_yticklabels()] == ["7", "8", "random"]
    assert [line.get_ydata()[0] for ax in (above, below) for line in ax.lines] == [1.5, 1.5], "random ones under a line"
    assert below.images[0].get_array().tolist() == [[1, 0], [0, 1], [0, 0]]
    assert not plots.steering_heatmaps(*(frame[:2] for frame in (raw, gain, in_raw, in_clean))).axes[0].lines


def test_loss_by_prompts_has_a_panel_per_method_and_a_line_for_each_thing_that_generalises():
    judges = ("validation", "train")
    rows = itertools.product(("clean", "prune_contrast"), ("6", "all"), ("test", "train"), judges, "ab")
    frame = pd.DataFrame(rows, columns=["method", "prompts", "on", "choice", "task"])
    axes = plots.loss_by_prompts(frame.assign(loss=range(len(frame)))).axes
    assert [ax.get_title() for ax in axes] == ["cleaned", "pruned, contrast codes"]
    assert [text.get_text() for text in axes[0].get_xticklabels()] == ["6", "all"]
    first = frame.assign(loss=range(len(frame)))
    for ax, method in zip(axes, ("clean", "prune_contrast"), strict=True):
        drawn = [line for line in ax.lines if len(line.get_xdata()) == 2]
        own = first[first["method"] == method].groupby(["on", "choice", "prompts"])["loss"].mean()
        wanted = [own[pair].tolist() for pair in (("test", "validation"), ("test", "train"), ("train", "validation"))]
        assert [list(line.get_ydata()) for line in drawn] == wanted
        assert {to_hex(line.get_color()) for line in drawn} == {plots.COLORS[method].lower()}


def steered(methods=("icv", "fv_centred"), places=("ff", "block")):
    frame = pd.DataFrame([
        {"method": method, "place": place, "layer": layer, "kl": kl, "effect": kl * (2 - 3 * (layer > 0))}
        for method, place, layer in zip(methods, places, (-1, 10), strict=True) for kl in (1.0, 0.1, 0.3)
    ])  # fmt: skip
    return frame.assign(strength=frame["kl"] / 10)


def test_effects_stand_over_their_cost_in_order_and_say_where_a_vector_stands():
    ax = plots.effect_by_cost(steered(), "words")
    first, second = drawn(ax)
    assert list(first.get_xdata()) == [0.1, 0.3, 1.0] and list(first.get_ydata()) == pytest.approx([0.2, 0.6, 2.0])
    assert to_hex(second.get_color()) == plots.COLORS["fv_centred"].lower() and ax.get_xscale() == "log"
    assert set(texts(ax)) == {"in-context vector, behind the MLP's norm", "function vector, block 10"}
    other = plots.effect_by_cost(steered(("icv", "icv"), ("mlp", "resid")), "words")
    assert all(line.is_dashed() for line in drawn(other)) and not any(line.is_dashed() for line in drawn(ax))


def test_grids_of_strengths_have_a_map_a_measure_and_white_at_zero():
    figure = plots.strength_grids(steered(("icv", "icv"), ("ff", "mlp")), {"kl": "cost", "effect": "words"})
    assert [ax.get_title() for ax in figure.axes] == ["cost", "words"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["behind the MLP's norm", "MLP's output"]
    assert texts(figure.axes[1])[:3] == ["0.2", "0.6", "2"] and all(ax.images[0].norm(0) == 0.5 for ax in figure.axes)


# --- where a vector stands ---


def test_a_strip_says_of_every_token_what_is_done_to_it_and_is_as_wide_as_its_text():
    tokens, touched = ["<bos>", "a", " ->", "\n"], {"last": [0, 0, 1, 0], "fading": [0, 0.5, 1, 0.25]}
    ax = plots.token_strip(tokens, touched)
    assert texts(ax) == ["<bos>", "a", "->", "⏎"] * 2 and [t.get_text() for t in ax.get_yticklabels()] == list(touched)
    shares = [share for row in touched.values() for share in row]
    dark = {share: sum(bar.get_facecolor()[:3]) for bar, share in zip(ax.patches, shares, strict=True)}
    assert sorted(dark, key=dark.get) == [1, 0.5, 0.25, 0]
    widths = [bar.get_width() for bar in ax.patches[:4]]
    assert widths[0] > widths[2] > widths[1] == widths[3]
    assert [t.get_color() for t in ax.texts[:4]].count("white") == 1
    with pytest.raises(ValueError, match="zip"):
        plots.token_strip(tokens, {"short": [1]})


def test_effect_stands_against_cost_and_a_ring_marks_what_validates_best():
    frame = pd.DataFrame({"method": "centred", "scale": [2.0, 1.0, 3.0], "kl": [0.2, 0.1, 0.9], "loss": [3.0, 5.0, 4.0],
                          "best": [True, False, False]})  # fmt: skip
    ax = plots.loss_by_cost(frame)
    line, ring = ax.lines
    assert line.get_xdata().tolist() == [0.1, 0.2, 0.9] and ring.get_xydata().tolist() == [[0.2, 3]]
