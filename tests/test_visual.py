"""The visual model: its grids, what is patched in it, and training that may stop and go on."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from book.ledger.claims import NUMBERS, Book, ClaimError
from book.ledger.numbers import visual_task_vectors
from nb_utils import cleaning, files, saes
from nb_utils.record import tables
from nb_utils.show import plots
from workflow import see, stale, training, visual
from workflow.visual import KINDS, OPERATIONS, PLACES, SIDE, Spec, VisualError

SMALL = {"blocks": 3, "d_model": 16, "heads": 2, "batch": 8, "steps": 6, "stages": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model():
    """An untrained model: what holds by construction holds for it."""
    found = visual.fresh(Spec(**SMALL))
    found.net.requires_grad_(False)
    return found


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NB_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("visual")
        see.see(Spec(**SMALL), folder)
        return folder


def drawn(n=4, task="rotate", seed=0, **more):
    kinds, asked = visual.numbered([visual.TASKS[task]], n)
    return visual.grids(visual.figures().split[1], kinds, asked, torch.Generator().manual_seed(seed), **more)


# Figures and grids


def test_figures_are_split_once_and_for_all_and_none_is_there_twice():
    found = visual.figures()
    known, held = found.split
    assert len(known) + len(held) == len(found) and 0.1 < len(held) / len(found) < 0.3
    both = torch.cat([known.masks, held.masks]).flatten(1)
    assert len(both.unique(dim=0)) == len(both) and both.min() >= 0 and both.max() <= 1
    assert len(visual.figures("shapes")) > 100


def circle(path, size, colour):
    y, x = np.mgrid[:size, :size] - size / 2
    alpha = np.where(np.hypot(x, y) < size / 3, 255, 0).astype(np.uint8)
    Image.fromarray(np.dstack([np.full((size, size, 3), colour, np.uint8), alpha])).save(path)


def test_a_folder_of_pictures_gives_their_figures_and_other_files_are_passed_over(tmp_path):
    for i in range(12):
        y, x = np.mgrid[:40, :40]
        alpha = np.where((x > 5) & (x < 12 + 2 * i) & (y > 8) & (y < 30), 255, 0).astype(np.uint8)
        Image.fromarray(np.dstack([np.zeros((40, 40, 3), np.uint8), alpha])).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    found = visual.figures(str(tmp_path))
    assert 10 <= len(found) <= 12 and found.masks.shape[1:] == (3, SIDE, SIDE)
    held = visual.grids(found, *visual.numbered([("clean", "mirror")], 3), torch.Generator().manual_seed(0))
    assert held.answer.shape == (3, 3, SIDE, SIDE)


def test_a_folder_that_is_none_or_has_too_few_figures_is_one_sentence(tmp_path):
    with pytest.raises(VisualError, match="is no folder of pictures: give one, or take glyphs or shapes"):
        visual.figures(str(tmp_path / "nowhere"))
    for i in range(3):
        circle(tmp_path / f"{i}.png", 40 + 10 * i, 9 * i)
    with pytest.raises(VisualError, match="figures that can be used, and 10 are needed: give more pictures") as caught:
        visual.figures(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_operations_are_what_they_are_called():
    painted = visual.paint(visual.figures(), 5, torch.Generator().manual_seed(0))
    kinds = torch.full((5,), KINDS.index("dark"))
    made = dict(zip(OPERATIONS, painted.made(kinds), strict=True))
    dark, whole = 0.35 * painted.clean, painted.figure
    torch.testing.assert_close(made["copy"], dark)
    assert made["restore"].equal(painted.clean) and made["segment"][:, 1].equal(whole[:, 0])
    assert made["invert"].equal(1 - made["copy"]) and made["cut_out"].equal(made["copy"] * whole)
    assert made["mirror"][2, 1, 3, 0] == made["copy"][2, 1, 3, 15]
    assert made["rotate"][2, 1, 15, 4] == made["copy"][2, 1, 4, 0]  # a quarter to the left
    full = whole[:, 0] > 0.99
    assert full.any() and made["edges"][:, 0][full].max() < 0.01 and made["edges"].max() > 0.5


def test_kinds_show_a_picture_as_they_say_and_a_hole_is_a_black_square():
    painted = visual.paint(visual.figures(), 4, torch.Generator().manual_seed(1))
    clean, dark, grey, hole = painted.shown(torch.arange(4))
    assert clean.equal(painted.clean[0]) and dark.equal(painted.clean[1] * 0.35)
    assert grey[0].equal(grey[1]) and grey[0].equal(grey[2]) and not grey.equal(painted.clean[2])
    gone = (hole == 0).all(0) & (painted.clean[3] > 0).any(0)
    y, x = gone.nonzero().T
    assert gone.sum() == 25 and y.max() - y.min() == 4 and x.max() - x.min() == 4


def test_a_query_does_not_tell_the_operation():
    """The same draw gives the same query for whatever is asked: the example and the answer alone differ."""
    first, second = (drawn(task=task) for task in ("rotate", "segmentation"))
    assert first.query.equal(second.query) and first.example[:, 0].equal(second.example[:, 0])
    assert not first.example[:, 1].equal(second.example[:, 1]) and not first.answer.equal(second.answer)


def test_another_operation_gives_something_else_and_rivals_do_too():
    kinds, asked = visual.numbered(visual.TRAINED, 40)
    other = visual.another(kinds, asked, torch.Generator().manual_seed(0))
    pairs = {(KINDS[k], OPERATIONS[a], OPERATIONS[o]) for k, a, o in torch.stack([kinds, asked, other], 1).tolist()}
    assert all(a != b and not (kind == "clean" and {a, b} == {"copy", "restore"}) for kind, a, b in pairs)
    assert len(visual.TRAINED) == 31 and set(visual.TASKS.values()) <= set(visual.TRAINED)
    assert not {"identity", "dark_copy", "low_light"} & set(visual.rivals("identity"))
    assert {"inpainting", "identity"} <= set(visual.rivals("rotate")) and "inpainting" not in visual.rivals("low_light")


def test_nearest_is_right_for_the_answer_itself_and_wrong_for_another():
    of = drawn(6)
    assert visual.nearest(of.answer, of).all()
    inverted = of.answers[OPERATIONS.index("invert")]
    assert not visual.nearest(inverted, of).any()
    assert visual.nearest(inverted, of, torch.full((6,), OPERATIONS.index("invert"))).all()
    copied, restored = of.answers[:2]
    assert visual.nearest(copied, replace(of, asked=torch.ones(6, dtype=torch.long))).all() and copied.equal(restored)


# The model


def test_pictures_are_cut_and_put_together_again():
    shown = torch.rand(2, 3, SIDE, SIDE)
    cut = visual.patches(shown)
    assert visual.pictures(cut).equal(shown)
    assert cut[1, 5].equal(shown[1, :, 4:8, 4:8].flatten())  # the second of the second row


def test_the_last_block_of_which_a_part_is_left_out_paints_what_the_whole_one_does(model):
    of = drawn()
    x = model.net.embed(of.query, of.example)
    for block in model.net.blocks:
        x = block(x, 0, None)
    torch.testing.assert_close(model.net.read(x), visual.seen(model, of.query, of.example))


def test_a_picture_of_another_size_is_one_sentence(model):
    with pytest.raises(VisualError, match=r"Pictures are 3 by 16 by 16 .*, not 3 by 24 by 24: scale them first."):
        visual.seen(model, torch.zeros(1, 3, 24, 24))


def test_what_a_head_gives_is_put_in_its_place_and_nowhere_else(model):
    of = drawn(1)
    sites = visual.sites(model.spec)
    assert len(sites) == 10 and (2, 0, 0) not in sites
    own, _ = visual.means(model, of, example=False)  # of one grid: its own values
    plain = visual.seen(model, of.query)
    for mask in (torch.zeros(1, 10), torch.ones(1, 10), torch.full((1, 10), 0.5)):
        torch.testing.assert_close(visual.patched(model, of.query, own, mask), plain)
    values = torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[float(site == (1, 1, 0)) for site in sites]])

    def put(number, z):
        if number == 1:
            z = z.clone()
            z[:, :PLACES, 1] = values[1, :PLACES, 1]
        return z

    expected = visual.seen(model, of.query, heads=put)
    torch.testing.assert_close(visual.patched(model, of.query, values, mask), expected)
    assert not torch.allclose(expected, plain)


def test_means_are_of_the_query_s_and_the_answer_s_tokens(model):
    of = drawn(3)
    heads, streams = visual.means(model, of)
    assert heads.shape == (3, 2 * PLACES, 2, 8) and streams.shape == (3, 2 * PLACES, 16)
    x = model.net.run(model.net.embed(of.query, of.example), 0, 2)
    torch.testing.assert_close(streams[1], x[:, -2 * PLACES :].mean(0))
    assert streams[2, :PLACES].eq(0).all() and heads[2, :PLACES].eq(0).all() and heads[2, PLACES:].ne(0).any()


def test_a_reward_tries_every_mask_on_the_grid_whose_turn_it_is(model):
    of = visual.joined([drawn(2), drawn(1, "invert")])
    values = torch.stack([visual.means(model, drawn(4, task))[0] for task in ("rotate", "rotate", "invert")])
    masks = torch.rand(5, 10, generator=torch.Generator().manual_seed(0)).round()
    unit = torch.tensor([1.0, 1.0, 2.0])
    found = visual.in_turns(model, of, values, unit)(masks)
    assert (~found.isnan()).nonzero().tolist() == [[0, 0], [1, 1], [2, 2], [3, 0], [4, 1]]
    whole = visual.closer(model, of[[0, 1]], values[0], masks)
    torch.testing.assert_close(found[[0, 3, 1, 4], [0, 0, 1, 1]], whole[[0, 3, 1, 4], [0, 0, 1, 1]])
    torch.testing.assert_close(found[2, 2], visual.closer(model, of[[2]], values[2], masks[2:3])[0, 0] / 2)


def test_greed_takes_the_head_that_helps_most_beside_those_before(model):
    of, values = drawn(3), visual.means(model, drawn(8))[0]
    first, second = visual.greedily(model, of, values, 2)
    alone = visual.closer(model, of, values, torch.eye(10)).mean(1)
    assert first.sum() == 1 and first.argmax() == alone.argmax()
    pairs = visual.closer(model, of, values, torch.maximum(first, torch.eye(10))).mean(1)
    assert second.sum() == 2 and pairs[(second - first).argmax()] == pairs[first == 0].max()


def test_a_pair_of_vectors_is_added_to_every_token_and_learns_the_task(model):
    of = drawn(4)
    problem = visual.Painted(model, 1, of, drawn(4, seed=1))
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))

    def add(number, x):
        return x + torch.cat([v.expand(PLACES, 16) for v in vectors[1].split(16)]) if number == 1 else x

    torch.testing.assert_close(problem.paint(vectors, of.query)[1], visual.seen(model, of.query, stream=add))
    torch.testing.assert_close(
        problem.train_loss(vectors, 0)[1], visual.error(problem.paint(vectors, of.query)[1], of.answer).mean())
    (tuned,) = cleaning.learned_vector(problem, vectors[:1] / 10, lr=0.3, steps=20)
    assert tuned.validation_loss < problem.validation_loss(vectors[:1] / 10)
    with pytest.raises(VisualError, match="After block 2 no block is left to use a vector in: take one below 2"):
        visual.Painted(model, 2, of, of)


def test_the_sae_of_a_pair_codes_each_of_both():
    generator = torch.Generator().manual_seed(0)
    weights = {"W_enc": (4, 6), "b_enc": (6,), "W_dec": (6, 4), "b_dec": (4,), "threshold": (6,)}
    given = {name: torch.randn(size, generator=generator).abs() for name, size in weights.items()}
    one = saes.Sae("s", "s", "blocks.1.hook_resid_post", 1, "jumprelu", **given, k=None, sha256="")
    both, x = visual.pair(one), torch.randn(3, 8, generator=generator)
    left, right = x.split(4, dim=1)
    codes = both.encode(x)
    torch.testing.assert_close(codes, torch.cat([one.encode(left), one.encode(right)], 1))
    halves = [one.decode(one.encode(half)) for half in (left, right)]
    torch.testing.assert_close(both.decode(codes), torch.cat(halves, 1))


# Training and files


def test_a_model_learns_from_its_grids():
    model = visual.fresh(Spec(**{**SMALL, "steps": 40, "rate": 1e-2}))
    optimizers = see.optimized(model)
    before = [loss.item() for loss in see.losses(model, drawn(32, "segmentation"))]
    for step in range(40):
        see._step(model, optimizers, step)
    after = [loss.item() for loss in see.losses(model, drawn(32, "segmentation"))]
    assert all(b < 0.7 * a for a, b in zip(before, after, strict=True))
    rows = {(row["shown"], row["on"]): row for row in visual.measured(model, 1)}
    assert set(rows) == {("right", "own"), ("none", "own"), ("wrong", "own"), ("wrong", "other")}


def test_a_training_that_stopped_goes_on_from_its_checkpoint_and_gives_the_same_files(tmp_path, monkeypatch, shelf):
    step, calls = see._step, []

    def stops(*args):
        calls.append(args[-1])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(see, "_step", stops)
    with pytest.raises(KeyboardInterrupt):
        see.see(Spec(**SMALL), tmp_path / "stopped", checkpoint_seconds=-1)
    assert not (tmp_path / "stopped").exists()
    see.see(Spec(**SMALL), tmp_path / "stopped", checkpoint_seconds=-1)
    assert calls == [0, 1, 2, 3, 4, 4, 5]  # only the step that was not finished is done again
    folders = (folder / "grids" for folder in (shelf, tmp_path / "stopped"))
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first == second and set(first) == {training.WEIGHTS, training.CARD, files.MANIFEST}
    see.see(Spec(**SMALL), tmp_path / "stopped")
    assert len(calls) == 7  # one that is there stays
    assert "After 6 steps of 8 grids" in (tmp_path / "stopped/README.md").read_text()


def test_a_saved_model_is_the_trained_one_but_for_rounding(shelf):
    found = visual.load("grids", shelf)
    assert found.spec == Spec(**SMALL) and {row["step"] for row in found.history} == {3, 6}
    now = {(row["shown"], row["on"]): row["mse"] for row in visual.measured(found, visual.SHOWN)}
    then = {(row["shown"], row["on"]): row["mse"] for row in found.history if row["step"] == 6}
    assert now == pytest.approx(then, abs=0.002)


def spoil(folder, what):
    """Damage a copy of a model, or its card."""
    if what == "weights":
        path = folder / "grids" / training.WEIGHTS
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    elif what == "gone":
        shutil.rmtree(folder / "grids")
    else:
        card = json.loads((folder / "grids" / training.CARD).read_text())
        card["spec"] = what if "family" in what else card["spec"] | what
        (folder / "grids" / training.CARD).write_text(json.dumps(card))
        files.describe(folder / "grids", [training.CARD, training.WEIGHTS])


@pytest.mark.parametrize(
    "what, complaint",
    [
        ("weights", "model.safetensors is damaged or incomplete: take it from git again"),
        ("gone", "There is no visual model .*: `make visual` trains it"),
        ({"family": "offset"}, "holds no visual model"),  # a checkpoint of another family
        ({"name": "other"}, "holds the model other, which is another"),
        ({"blocks": 4}, "has weights of another model"),
        ({"heads": 3}, "16 dimensions are not 3 heads of one size"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_what_was_asked_for_is_one_sentence(shelf, tmp_path, what, complaint):
    shutil.copytree(shelf, tmp_path / "visual")
    spoil(tmp_path / "visual", what)
    with pytest.raises(VisualError, match=complaint) as caught:
        visual.load("grids", tmp_path / "visual")
    assert "\n" not in str(caught.value)


def test_other_weights_make_tables_stale(shelf, tmp_path):
    shutil.copytree(shelf, tmp_path / "visual")
    parameters = {"task": "rotate", "model": "grids", "visual_dir": str(tmp_path / "visual")}
    origin = {"parameters": parameters, "model_sha256": visual.sha256(tmp_path / "visual")}
    assert list(stale._weights(origin)) == []
    path = tmp_path / "visual/grids" / training.WEIGHTS
    path.write_bytes(path.read_bytes() + b" ")
    assert list(stale._weights(origin)) == ["other weights of the model"]
    path.unlink()
    assert list(stale._weights(origin)) == []  # what is not here cannot be compared


# Claims


@pytest.fixture
def book(tmp_path):
    """Tables by hand: an error of .2 without example, .1 with it, on two tasks."""
    columns = ("method", "values", "on", "mse", "nearest")
    given = [
        ("none", None, "test", 0.2, 0.1), ("example", None, "test", 0.1, 0.9), ("none", None, "elsewhere", 0.3, 0.1),
        ("example", None, "elsewhere", 0.1, 0.9), ("example_wrong", None, "test", 0.3, 0.1),
        ("example_wrong", None, "follows", 0.1, 0.7), ("reward", "own", "elsewhere", 0.2, 0.5),
        ("reward", "none", "test", 0.15, 0.5), ("reward", "wrong", "test", 0.3, 0.0),
        ("mean_answer", None, "test", 0.17, 0.1), ("random", "own", "test", 0.19, 0.2),
        ("causal", "own", "test", 0.14, 0.5),
        ("greedy", "own", "test", 0.11, 0.9), ("mask_alone", "none", "test", 0.16, 0.5),
        ("shared", "own", "test", 0.12, 0.8), ("shared", "wrong", "test", 0.4, 0.1),
        ("shared", "wrong", "follows", 0.1, 0.6), ("foreign", "own", "test", 0.13, 0.7),
    ]  # fmt: skip
    rows = [dict(zip(columns, one, strict=True)) | {"seed": 0, "layer": -1} for one in given]
    rows += [{"method": "reward", "values": "own", "on": "test", "mse": mse, "nearest": 0.9, "seed": seed, "layer": -1}
             for seed, mse in enumerate((0.1, 0.14))]  # fmt: skip
    rows += [{"method": "residual", "on": "test", "mse": mse, "validation_loss": loss, "layer": layer, "seed": 0}
             for layer, (mse, loss) in enumerate([(0.18, 0.1), (0.1, 0.2)])]  # fmt: skip
    pruned = (("prune_contrast", 20, 0.13), ("prune_contrast", 5, 0.19), ("prune_random", 20, 0.18))
    rows += [{"method": method, "on": "test", "mse": mse, "k": k, "seed": 0, "layer": 1} for method, k, mse in pruned]
    for task in ("rotate", "invert"):
        frame = pd.DataFrame(rows).assign(task=task)
        tables.save(frame, visual_task_vectors.VISUAL, task, {"parameters": {"task": task}}, folder=tmp_path)
    return Book(folder=str(tmp_path))


@pytest.mark.parametrize(
    "number, expected",
    [
        ("example_is_used", 0.8),
        ("wrong_example_is_followed", 0.7),
        ("visual_heads_replace_the_example", 0.8),  # both seeds count
        ("visual_heads_beat_the_example", -0.2),
        ("visual_reward_beats_causes", 0.2),
        ("visual_reward_beats_greed", -0.1),
        ("visual_reward_beats_chance", 0.7),
        ("visual_mask_alone_does_it", 0.4),
        ("visual_found_mask_needs_the_vector", 0.3),
        ("visual_shared_mask_does_it", 0.8),
        ("visual_foreign_mask_does_it", 0.7),
        ("visual_vector_decides", 2.8),
        ("visual_wrong_vector_is_followed", 0.6),
        ("visual_heads_beat_the_residual", 0.6),  # at the block that validates best, not at the best on test
        ("visual_heads_beat_the_mean_answer", 0.5),
        ("visual_few_latents_do_it", 0.7),
        ("visual_strangers_do_less", 0.5),
        ("visual_choice_transfers", 0.5),  # of what the example takes off there
    ],
)
def test_claims_on_visual_vectors_are_decided_by_these_rows(book, number, expected):
    assert NUMBERS[number](book).mean == pytest.approx(expected, abs=1e-6)


def test_pictures_stand_in_the_row_of_their_task_and_the_column_of_what_they_are():
    shades = {("rotate", "query"): 10, ("rotate", "answer"): 20, ("invert", "query"): 30, ("invert", "answer"): 40}
    rows = [{"task": task, "what": what, "pixels": [shade] * 12} for (task, what), shade in shades.items()]
    frame = pd.DataFrame(rows)
    axes = plots.picture_grid(frame, 2, rows="task").axes
    assert [ax.images[0].get_array().max() for ax in axes] == [10, 20, 30, 40]
    assert [ax.get_title() for ax in axes[:2]] == ["query", "answer"] and axes[2].get_ylabel() == "invert"


def test_what_experiment_23_lacks_is_no_number(book):
    with pytest.raises(ClaimError, match="Experiment 23 has no such gradient"):
        visual_task_vectors.seen(book, "gradient")
