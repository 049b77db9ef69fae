"""Grown models: their tasks, what a vector does in them, and training that may stop and go on."""

import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy

from book.ledger.claims import NUMBERS, Book, ClaimError
from book.ledger.numbers import grown_vectors
from nb_utils import cleaning, files
from nb_utils.record import tables
from workflow import grow, grown, stale, training
from workflow.grown import SEPARATOR, SIZE, GrownError, Spec

SMALL = {"d_model": 16, "d_mlp": 32, "heads": 2, "batch": 8, "steps": 6, "stages": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model():
    """An untrained model: what holds by construction holds for it."""
    return grown.fresh(Spec("offset", **SMALL))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder with a model of two families."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NB_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("grown")
        grow.grow_all([Spec(name, **SMALL) for name in ("offset", "linear")], folder)
        return folder


def drawn(model, n=3, **more):
    tasks = torch.arange(n) % len(model.family.maps)
    return grown.draw(model.family, tasks, model.spec.pairs, torch.Generator().manual_seed(0), **more)


# Tasks


@pytest.mark.parametrize("name", grown.FAMILIES)
def test_the_tasks_of_a_family_differ_and_make_symbols_of_symbols(name):
    of = grown.family(name)
    assert of.maps.shape[1] == SIZE and len(of.maps.unique(dim=0)) == len(of.maps)
    assert of.maps.min() >= 0 and of.maps.max() < SIZE
    assert len(of.trained) >= 8 and len(of.trained) + int(of.held.sum()) == len(of.maps)


def test_tasks_are_what_they_are_called():
    offset, table, linear = map(grown.family, grown.FAMILIES)
    assert offset.maps[5, 20] == 1 and offset.chance == pytest.approx(1 / 18)
    assert table.maps.sort(1).values.equal(torch.arange(SIZE).expand(grown.TABLES, SIZE)) and not table.held.any()
    assert {(0, 23), (23, 0)} <= {(int(one[0]), int(one[-1])) for one in linear.maps}  # the identity, and its mirror
    steps = linear.maps.diff(dim=1)
    assert all((one.min() >= -1 and one.max() <= 0) or (one.min() >= 0 and one.max() <= 1) for one in steps)


def test_chance_knows_the_query_and_not_the_task():
    maps = torch.zeros(3, SIZE, dtype=torch.long)
    maps[2] = 1  # of two tasks that are trained on, both answer 0; the third is held out
    assert grown.Family("toy", maps, torch.tensor([False, False, True])).chance == 1
    assert grown.Family("toy", maps, torch.tensor([False, True, False])).chance == 0.5


def test_a_prompt_shows_no_query_twice_and_its_answers_are_the_task_s(model):
    shown = drawn(model, 24)
    assert torch.cat([shown.x, shown.rest], 1).sort(1).values.equal(torch.arange(SIZE).expand(24, SIZE))
    assert shown.y.equal((shown.x + shown.tasks[:, None]) % SIZE)
    assert shown.ids[0].tolist() == [
        token for x, y in zip(shown.x[0], shown.y[0], strict=True) for token in (int(x), SEPARATOR, int(y))
    ]


def test_noise_spares_the_answer_that_is_asked_for(model):
    clean, noisy = drawn(model, 24), drawn(model, 24, noise=0.5)
    wrong = noisy.y != model.family.maps[noisy.tasks].gather(1, noisy.x)
    assert not wrong[:, -1].any() and 0.3 < wrong[:, :-1].float().mean() < 0.6
    assert clean.x.equal(noisy.x)


# Vectors


def test_running_blocks_one_by_one_is_the_model_of_transformers(model):
    ids = drawn(model).ids
    torch.testing.assert_close(model.logits(grown.streams(model, ids)[-1]), model.hf(ids).logits)


@pytest.mark.parametrize("block", [0, 2])
def test_a_vector_in_place_is_a_hook_on_a_plain_pass(model, block):
    vector = torch.randn(16, generator=torch.Generator().manual_seed(1))

    def put(module, args, out):
        return torch.cat([out[:, :1], vector.expand(len(out), 1, -1)], 1)

    handle = model.hf.model.layers[block].register_forward_hook(put)
    try:
        ids = torch.stack([torch.arange(SIZE), torch.full((SIZE,), SEPARATOR)], 1)
        expected = model.hf(ids).logits[:, 1]
    finally:
        handle.remove()
    torch.testing.assert_close(grown.prompted(model, vector[None], block)[0], expected)
    asked = torch.tensor([3, 1])
    torch.testing.assert_close(grown.prompted(model, vector[None], block, queries=asked)[0], expected[asked])


def test_nothing_added_and_the_own_stream_in_place_change_nothing(model):
    two = model.two(1)
    plain = model.logits(model.run(two, 2)[:, 1])
    torch.testing.assert_close(grown.prompted(model, torch.zeros(1, 16), 1, "add")[0], plain)
    own = torch.stack([grown.prompted(model, two[x : x + 1, 1], 1, queries=torch.tensor([x]))[0, 0] for x in (0, 7)])
    torch.testing.assert_close(own, plain[[0, 7]])


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_the_second_loss_asks_every_separator_but_the_first_for_a_query_of_its_own(mode):
    model = grown.fresh(Spec("offset", mode=mode, **SMALL))
    shown = drawn(model)
    middle = grown.streams(model, shown.ids)[model.spec.at]
    by_hand = []
    for row in range(3):
        for i in range(1, model.spec.pairs):
            query = shown.rest[row, i - 1]
            assert query not in shown.x[row]
            said = grown.prompted(model, middle[row, 3 * i + 1][None], model.spec.at, mode, query[None])[0]
            by_hand.append(cross_entropy(said, model.family.maps[shown.tasks[row], query][None]))
    in_context, by_vector = grown.losses(model, shown)
    torch.testing.assert_close(by_vector, torch.stack(by_hand).mean())
    said = model.hf(shown.ids).logits[:, 1::3]
    torch.testing.assert_close(in_context, cross_entropy(said.flatten(0, 1), shown.y.flatten()))


def test_a_model_that_has_learnt_its_tasks_by_a_vector_is_measured_so(monkeypatch):
    """One task, which needs no example: every separator that has learnt it says it, alone and in context."""
    monkeypatch.setattr(grow, "WARM", 5)
    model = grown.fresh(Spec("offset", seed=1, **{**SMALL, "steps": 80, "rate": 2e-2}))
    one = replace(model.family, maps=model.family.maps[[3, 3]], held=torch.tensor([False, False]))
    model.__dict__["family"] = one
    optimizer = torch.optim.AdamW(model.hf.parameters())
    before = [float(loss) for loss in grow._step(model, optimizer, 0)]
    for step in range(1, 80):
        after = [float(loss) for loss in grow._step(model, optimizer, step)]
    assert min(before) > 2.5 and max(after) < 0.5
    rows = [*grown.in_context(model, 4), *grown.by_vector(model, 4)]
    found = {(row["method"], row["on"], row["layer"]): row["accuracy"] for row in rows}
    assert found["in_context", "train", -1] > 0.9 and found["mean", "train", 1] > 0.9
    assert ("mean", "held_out", 1) not in found


def test_all_that_is_measured_of_a_model_has_its_place(model):
    rows = list(grown.in_context(model, 2))
    assert {(row["on"], row["shots"]) for row in rows} == {
        ("train", 1), ("train", 7), ("longer", 15), ("noise 0.25", 7), ("noise 0.5", 7), ("held_out", 7)
    }  # fmt: skip
    rows = list(grown.by_vector(model, 2, ("mean", "one", "centred"), singles=2))
    assert len(rows) == 2 * model.spec.blocks * 3
    asked = {(row["on"], row["method"]): row["n"] for row in rows}
    assert asked["train", "mean"] == 18 * SIZE and asked["held_out", "one"] == 2 * 6 * SIZE


# Sparse codes


def test_vectors_of_several_tasks_are_cleaned_at_once_each_on_its_own_answers(model):
    halves = torch.arange(SIZE).split(SIZE // 2)
    asked = grown.Asked(model, 1, torch.tensor([2, 5]), *halves, common=torch.ones(16))
    vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    expected = torch.stack(
        [cross_entropy(grown.prompted(model, (v + 1)[None], 1, queries=halves[1])[0], (halves[1] + task) % SIZE)
         for v, task in zip(vectors, (2, 5), strict=True)]
    )  # fmt: skip
    torch.testing.assert_close(asked.validation_loss(vectors), expected)
    asked = replace(asked, validation=halves[0])
    tuned = cleaning.learned_vector(asked, vectors, lr=0.1, steps=10)
    assert all(one.validation_loss < first for one, first in zip(tuned, asked.train_loss(vectors, 0), strict=True))


def test_a_dictionary_finds_the_directions_that_streams_are_made_of():
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(12, 16, generator=generator), dim=1)
    codes = (torch.rand(4096, 12, generator=generator) < 0.15) * 3.0
    sae = grown.dictionary(codes @ directions, 1, 24, 2, 150, seed=0)
    nearest = (sae.decoder_directions @ directions.T).max(0).values
    assert nearest.median() > 0.9
    x = codes[:512] @ directions
    assert (sae.decode(sae.encode(x)) - x).pow(2).sum() < 0.3 * (x - x.mean(0)).pow(2).sum()


# Training and files


def test_a_training_that_stopped_goes_on_from_its_checkpoint_and_gives_the_same_files(tmp_path, monkeypatch):
    spec = Spec("table", **SMALL)
    grow.grow(spec, tmp_path / "whole")
    step, calls = grow._step, []

    def stops(*args):
        calls.append(args[-1])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(grow, "_step", stops)
    with pytest.raises(KeyboardInterrupt):
        grow.grow(spec, tmp_path / "stopped", checkpoint_seconds=-1)
    assert not (tmp_path / "stopped").exists()
    grow.grow(spec, tmp_path / "stopped", checkpoint_seconds=-1)
    assert calls == [0, 1, 2, 3, 4, 4, 5]  # only the step that was not finished is done again
    folders = (tmp_path / name / spec.name for name in ("whole", "stopped"))
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first == second and set(first) == {training.WEIGHTS, training.CARD, files.MANIFEST}
    assert not list((tmp_path / "cache/training").glob("*.checkpoint"))


def test_a_model_that_is_there_stays_and_one_grown_otherwise_is_replaced(tmp_path, monkeypatch):
    spec = Spec("offset", **SMALL)
    (folder,) = {grow.grow(spec, tmp_path) for _ in range(2)}
    before = (folder / training.WEIGHTS).stat().st_mtime_ns
    grow.grow(spec, tmp_path)
    assert (folder / training.WEIGHTS).stat().st_mtime_ns == before
    grow.grow(replace(spec, steps=7), tmp_path)
    assert grown.load("offset", "grown", 0, tmp_path).spec.steps == 7


def test_what_starts_from_another_model_comes_after_it_and_begins_with_its_weights(tmp_path):
    wanted = grown.planned(1, ("table",), **SMALL)
    assert [spec.name for spec in wanted][:2] == ["table/plain.0", "table/grown.0"]
    assert {spec.variant for spec in wanted} == set(grown.VARIANTS)
    start = next(spec for spec in wanted if spec.start)
    with pytest.raises(GrownError, match="There is no grown model"):
        grow.grow(start, tmp_path)
    grow.grow_all([replace(start, steps=2, rate=0.0), wanted[0]], tmp_path)
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert [line.split(" | ")[1] for line in lines if line.startswith("| table")] == ["afterwards", "plain"]
    first, second = (grown.load("table", variant, 0, tmp_path).hf for variant in ("plain", "afterwards"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_saved_model_is_the_trained_one_but_for_rounding(shelf):
    found = grown.load("linear", "grown", 0, shelf)
    assert found.spec == Spec("linear", **SMALL) and {row["step"] for row in found.history} == {3, 6}
    now = {(row["on"], row["shots"]): row["loss"] for row in grown.in_context(found, grown.SHOWN)}
    then = {(row["on"], row["shots"]): row["loss"] for row in found.history
            if row["step"] == 6 and row["method"] == "in_context"}  # fmt: skip
    assert now == pytest.approx(then, abs=0.01) and len(then) == 6


def spoil(folder, what):
    """Damage a copy of a model, or put another one in its place."""
    if what == "weights":
        path = folder / "offset/grown.0" / training.WEIGHTS
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    elif what == "manifest":
        (folder / "offset/grown.0" / files.MANIFEST).write_text("[")
    elif what == "family":
        shutil.rmtree(folder / "offset/grown.0")
        shutil.copytree(folder / "linear/grown.0", folder / "offset/grown.0")
    elif what == "gone":
        shutil.rmtree(folder / "offset")
    else:  # a manifest that agrees with a card that does not agree with the weights
        card = json.loads((folder / "offset/grown.0" / training.CARD).read_text())
        card["spec"] |= what
        (folder / "offset/grown.0" / training.CARD).write_text(json.dumps(card))
        files.describe(folder / "offset/grown.0", [training.CARD, training.WEIGHTS])


@pytest.mark.parametrize(
    "what, complaint",
    [
        ("weights", "model.safetensors is damaged or incomplete: take it from git again"),
        ("manifest", "manifest.json is damaged: take it from git again"),
        ("family", "holds the model linear/grown.0, which is another"),
        ("gone", "There is no grown model .*: `make grow` trains it"),
        ({"blocks": 6}, "has weights of another model"),
        ({"height": 6}, "holds no grown model"),
        ({"at": 3}, "would have no block left"),
    ],
)
def test_a_model_that_is_not_what_was_asked_for_is_one_sentence(shelf, tmp_path, what, complaint):
    shutil.copytree(shelf, tmp_path / "grown")
    spoil(tmp_path / "grown", what)
    with pytest.raises(GrownError, match=complaint) as caught:
        grown.load("offset", "grown", 0, tmp_path / "grown")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words, complaint", [
    (["--families", "ofset"], "There is no family 'ofset': there are offset, table, linear."),
    (["--steps", "many"], "invalid int value"),
])  # fmt: skip
def test_the_command_says_what_is_wrong_in_one_sentence(tmp_path, capsys, words, complaint):
    with pytest.raises(SystemExit) as caught:
        grow.main([*words, "--out", str(tmp_path)])
    assert complaint in f"{caught.value}{capsys.readouterr().err}"
    assert not list(tmp_path.glob("*/*"))


# Claims


@pytest.fixture
def book(tmp_path):
    """Tables by hand: a plain and a grown model of one family, two seeds, with a guess at .1 and vectors at block 1."""

    def rows(variant, *given, **more):
        columns = ("method", "layer", "on", "shots", "accuracy")
        told = {"task": "offset", "variant": variant, "grown_at": 1, "chance": 0.1, **more}
        return [told | {"seed": seed} | dict(zip(columns, one, strict=True)) for one in given for seed in (0, 1)]

    main = rows(
        "plain", ("in_context", -1, "train", 1, 0.2), ("in_context", -1, "train", 7, 0.9),
        ("in_context", -1, "held_out", 7, 0.3), ("in_context", -1, "longer", 15, 0.8),
        ("in_context", -1, "noise 0.25", 7, 0.7), ("mean", 1, "train", 7, 0.1), ("centred", 2, "train", 7, 0.15),
    ) + rows(
        "grown", ("in_context", -1, "train", 1, 0.2), ("in_context", -1, "train", 7, 0.6),
        ("in_context", -1, "held_out", 7, 0.2), ("in_context", -1, "longer", 15, 0.6),
        ("in_context", -1, "noise 0.25", 7, 0.5), ("mean", 1, "train", 7, 0.58), ("mean", 2, "train", 7, 0.9),
        ("swapped", 1, "other", 7, 0.55), ("swapped", 2, "other", 7, 0.99), ("mean", 1, "test", 7, 0.6),
    )  # fmt: skip
    for penalty, accuracy, loss in ((0.3, 0.5, 1.0), (3.0, 0.7, 2.0)):
        main += rows("grown", ("clean", 1, "test", 7, accuracy), validation_loss=loss, penalty=penalty)
    places = [{"task": "offset", "variant": variant, "seed": seed, "grown_at": 1, "chance": 0.1, "layer": layer,
               "position": 4, "accuracy": accuracy}
              for variant, layer, accuracy in (("plain", 3, 0.18), ("grown", 1, 0.6), ("grown", 2, 0.12))
              for seed in (0, 1)]  # fmt: skip
    stages = [("plain", 100, 0.55, 0.1, 0.5), ("plain", 200, 0.9, 0.3, 0.8), ("grown", 200, 0.6, 0.2, 0.6)]
    timeline = [one for variant, step, train, held, longer in stages for one in rows(
        variant, ("in_context", -1, "train", 1, 0.0), ("in_context", -1, "train", 7, train),
        ("in_context", -1, "held_out", 7, held), ("in_context", -1, "longer", 15, longer), step=step)]  # fmt: skip
    for part, frame in (("", main), ("_places", places), ("_timeline", timeline)):
        origin = {"parameters": {"task": "offset", "seeds": 2}}
        tables.save(pd.DataFrame(frame), f"{grown_vectors.GROWN}{part}", "offset", origin, folder=tmp_path)
    return Book(folder=str(tmp_path))


@pytest.mark.parametrize(
    "number, expected",
    [
        ("plain_has_none", 0.08),  # the best of all vectors and places
        ("grown_is_there", 0.48),
        ("grown_only_there", 0.02),
        ("vector_carries_it_all", 0.02),
        ("vector_decides", 0.55),
        ("growing_costs", -0.3),
        ("growing_helps_held_out", -0.1),
        ("growing_helps_noise", -0.2),
        ("growing_helps_longer", -0.2),
        ("cleaning_recovers_the_vector", -0.1),  # at the penalty that validates best, not at the best on test
    ],
)
def test_claims_on_grown_models_are_decided_by_these_rows(book, number, expected):
    assert NUMBERS[number](book).mean == pytest.approx(expected, abs=1e-6)


def test_at_equal_skill_a_grown_model_is_held_against_an_earlier_plain_one(book):
    """The plain model of step 100 is as good in context as the grown one at its end, the one of step 200 is not."""
    assert grown_vectors.at_equal_skill(book, "held_out").tolist() == pytest.approx([0.1, 0.1])
    assert grown_vectors.at_equal_skill(book, "longer").tolist() == pytest.approx([0.1, 0.1])


def test_what_no_family_holds_out_is_no_number(book):
    with pytest.raises(ClaimError, match="no such rows of grown models"):
        grown_vectors.with_examples(book, "grown", "elsewhere")


def test_other_weights_make_tables_stale(shelf, tmp_path):
    shutil.copytree(shelf, tmp_path / "grown")
    parameters = {"task": "linear", "model": "grown", "seeds": 1, "grown_dir": str(tmp_path / "grown")}
    with pytest.raises(GrownError, match=r"There is no grown model .*plain"):
        grown.sha256("linear", 1, tmp_path / "grown")
    assert stale._grown(parameters) is None  # what is not here cannot be compared
    shutil.copytree(shelf / "linear/grown.0", tmp_path / "grown/linear/plain.0")
    origin = {"parameters": parameters, "model_sha256": grown.sha256("linear", 1, tmp_path / "grown")}
    assert list(stale._weights(origin)) == []
    path = tmp_path / "grown/linear/plain.0" / training.WEIGHTS
    path.write_bytes(path.read_bytes() + b" ")
    assert list(stale._weights(origin)) == ["other weights of the model"]


@pytest.mark.parametrize("name", grown.FAMILIES)
def test_the_models_of_the_book_are_there_and_do_what_their_cards_say(name):
    for spec in (spec for spec in grown.planned() if spec.family == name):
        model = grown.load(spec.family, spec.variant, spec.seed)
        assert model.spec == spec
        if spec.seed:
            continue  # one of each sort is measured
        kept = pd.DataFrame(model.history).query("step == @spec.steps and method == 'in_context'")
        now = pd.DataFrame(grown.in_context(model, grown.SHOWN))
        both = kept.merge(now, on=["on", "shots"], suffixes=("", "_now"))
        assert len(both) == len(now) and (both["accuracy"] - both["accuracy_now"]).abs().max() < 0.02, spec.name
