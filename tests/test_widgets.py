"""The widgets without a browser: what the kernel answers, and what the page carries."""

import json
import subprocess
import sys
import time
from functools import partial

import pytest

from nb_utils import tasks
from nb_utils.record import tables
from nb_utils.show import widgets

PAIRS = "\n".join(f"{'x' * (i % 3)}{i} -> yes{i % 2}" for i in range(20))


@pytest.fixture(scope="module")
def backend():
    return widgets.Backend("tiny", "random")


def heard(widget):
    """Collect what the widget sends to its browser side."""
    said = []
    widget.send = lambda content, buffers=None: said.append(json.loads(json.dumps(content)))
    return said


def asked(widget, **question):
    said = heard(widget)
    widget._handle_custom_msg({"id": "7", **question}, [])
    assert said[0]["id"] == "7"
    return said[0]


BUILDERS = (widgets.steering, widgets.workbench, widgets.token_strip)


@pytest.mark.parametrize("build", BUILDERS)
def test_a_greeting_is_answered_once_the_model_is_there(build, backend):
    widget = build("tiny", backend)
    said = heard(widget)
    widget._handle_custom_msg({"what": "hello"}, [])
    assert [reply["kind"] for reply in said] == ["loading", "live"]
    assert said[1]["model"] == "tiny" and said[1]["layers"] == list(range(6))


@pytest.mark.parametrize("build", BUILDERS)
def test_without_a_backend_or_a_model_the_page_stays_precomputed(build):
    silent = build("tiny", None)
    said = heard(silent)
    silent._handle_custom_msg({"what": "hello"}, [])
    assert not said
    broken = build("tiny", widgets.Backend("no-such-model"))
    said = heard(broken)
    broken._handle_custom_msg({"what": "hello"}, [])
    assert said[-1]["kind"] == "refused" and "Unknown model 'no-such-model'" in said[-1]["error"]


STEER = {"what": "view", "task": "antonyms", "layer": 2, "latent": 3, "scale": 0.5, "example": 0}


@pytest.mark.parametrize(
    "change, says",
    [
        ({"prompt": ""}, "The prompt is empty"), ({"prompt": "hot"}, "no separator"),
        ({"prompt": "a<bos> ->"}, "special token <bos>"), ({"latent": 64}, "There is no latent 64"),
        ({"latent": None}, "type the number of a latent"), ({"layer": 9}, "There is no SAE after block 9"),
        ({"latent": -1}, "no tables of 02_cleanup_features"), ({"task": "antonym"}, "Did you mean 'antonyms'"),
        ({"what": "weather"}, "knows no question 'weather'"), ({"scale": "wide"}, "is a finite number"),
        ({"scale": float("nan")}, "is a finite number"), ({"scale": float("inf")}, "is a finite number"),
        ({"scale": True}, "is a finite number"), ({"latent": True}, "type the number of a latent"),
        ({"layer": True}, "There is no SAE after block True"),
    ],
)  # fmt: skip
def test_a_wrong_question_to_the_steering_control_is_answered_by_a_sentence(backend, change, says):
    question = {**STEER, **change}
    if "prompt" in change:
        question.pop("example")
    reply = asked(widgets.steering("tiny", backend), **question)
    assert says in reply["error"] and "\n" not in reply["error"]


@pytest.mark.parametrize("build", BUILDERS)
def test_words_stand_where_a_control_cannot_be_drawn(build, monkeypatch):
    shown = []
    monkeypatch.setattr(widgets, "display", lambda found, raw=False: shown.append(found))
    widget = build()
    widget._ipython_display_()
    words, control = shown
    assert "Run &gt; Run All Cells" in words.data and f'data-words="{widget.mark}"' in words.data
    assert control["application/vnd.jupyter.widget-view+json"]["model_id"] == widget.mark
    numbers = {widgets.steering: " nats unsteered; at best ", widgets.token_strip: "detector ", widgets.workbench: ""}
    assert numbers[build] in words.data


def test_the_steering_control_answers_what_the_modules_compute(backend):
    from nb_utils.show import microscope

    widget = widgets.steering("tiny", backend)
    reply = asked(widget, **STEER)
    pair = tasks.split(tasks.load("antonyms")).test[0]
    site = backend.prompt(f"{pair.x} ->", pair.y)
    norm = backend.test("antonyms").at(2).norm(dim=1).mean()
    view = microscope.views(site, (0.5 * norm * backend.sae(2).decoder_directions[3])[None], 2)[0][0]
    assert (reply["after"]["loss"], reply["after"]["rank"]) == (pytest.approx(view.loss), view.rank)
    assert reply["before"]["loss"] != pytest.approx(view.loss, abs=1e-3)
    mean = asked(widget, **{**STEER, "what": "mean", "scale": 0})
    assert mean["loss"] == pytest.approx(mean["zero"], abs=1e-5)
    assert set(asked(widget, **{**STEER, "what": "continuation"})) == {"id", "before", "after"}
    assert asked(widget, **{**STEER, "what": "evidence"})["evidence"] is None


def test_without_an_expected_answer_there_is_no_loss_and_no_rank(backend):
    question = {**STEER, "prompt": "hot ->", "answer": " "}
    question.pop("example")
    reply = asked(widgets.steering("tiny", backend), **question)
    assert reply["after"]["loss"] is None and reply["after"]["rank"] is None and len(reply["after"]["tokens"]) == 5


@pytest.mark.parametrize(
    "question, says",
    [
        ({"pairs": "hot -> cold"}, "1 pairs and a task needs 20"), ({"pairs": PAIRS + "\nhot ->"}, "non-empty string"),
        ({"pairs": "\n".join(f"a{i} -> b" for i in range(10_000))}, "10,000 pairs are more"),
        ({"pairs": PAIRS, "path": "no/such.json"}, "There is no file no/such.json"),
        ({"pairs": PAIRS, "layer": 17}, "There is no SAE after block 17"),
        ({"pairs": PAIRS, "method": "magic"}, "The method is one of"),
        ({"what": "loss", "features": []}, "There is no vector yet"),
        ({"what": "export", "features": [], "folder": "x"}, "There is no vector yet"),
        ({"what": "import", "folder": "no/such/folder"}, "There is no no/such/folder"),
    ],
)  # fmt: skip
def test_a_wrong_question_to_the_workbench_is_answered_by_a_sentence(backend, question, says):
    widget = widgets.workbench("tiny", backend)
    reply = asked(widget, **{"what": "clean", "layer": 2, "method": "prune", **question})
    assert says in reply["error"] and "\n" not in reply["error"]
    assert widget.running is None


def until(said, kind, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := [reply for reply in said if reply.get("kind") in (kind, "failed")]:
            return found[0]
        time.sleep(0.02)
    raise AssertionError(f"no {kind} within {seconds} seconds")


def test_the_workbench_cleans_exports_and_loads(backend, tmp_path):
    widget = widgets.workbench("tiny", backend)
    said = heard(widget)
    widget._handle_custom_msg({"id": "1", "what": "clean", "pairs": PAIRS, "layer": 2, "method": "prune"}, [])
    found = until(said, "cleaned")
    assert [reply["done"] for reply in said if reply.get("kind") == "progress"][-1] > 10
    step = found["path"][-1]
    assert asked(widget, what="loss", features=step["features"])["loss"] == pytest.approx(step["loss"], abs=1e-5)
    half = [[latent, weight / 2] for latent, weight in step["features"][1:]]
    changed = asked(widget, what="loss", features=half)["loss"]
    assert changed != pytest.approx(step["loss"], abs=1e-4)
    assert asked(widget, what="export", features=half, folder=str(tmp_path / "v"))["loss"] == changed
    loaded = asked(widgets.workbench("tiny", backend), what="import", folder=str(tmp_path / "v"))
    assert loaded["card_loss"] == changed
    assert loaded["path"][0]["loss"] == pytest.approx(changed, abs=1e-4)
    assert loaded["path"][0]["features"] == [[latent, pytest.approx(weight)] for latent, weight in half]


def test_a_running_cleaning_can_be_stopped_and_refuses_a_second(backend, monkeypatch):
    from nb_utils import workbench

    monkeypatch.setitem(workbench.METHODS, "prune", partial(workbench.prune, steps=100_000))
    widget = widgets.workbench("tiny", backend)
    said = heard(widget)
    question = {"what": "clean", "pairs": PAIRS, "layer": 2, "method": "prune"}
    widget._handle_custom_msg({"id": "1", **question}, [])
    end = time.monotonic() + 60
    while not any(reply.get("text") == "cleaning" for reply in said) and time.monotonic() < end:
        time.sleep(0.02)
    widget._handle_custom_msg({"id": "2", **question}, [])
    widget._handle_custom_msg({"id": "3", "what": "stop"}, [])
    found = until(said, "cleaned")
    assert found["stopped"] and len(found["path"]) == 1
    assert "is running" in next(reply for reply in said if reply.get("id") == "2")["error"]


def test_the_strip_answers_with_raw_activations_at_every_token(backend):
    widget = widgets.token_strip("tiny", backend)
    reply = asked(widget, what="strip", prompt="up -> down\nhot ->", layer=2, latents=[3, 5])
    assert len(reply["tokens"]) == len(reply["kinds"]) == len(reply["activations"][0])
    assert reply["activations"][0][0] is None and max(reply["activations"][1][1:]) > 0
    wrongs = {"empty": {"prompt": ""}, "Type the numbers": {"latents": [None, 5]}, "no latent 64": {"latents": [3, 64]}}
    for says, change in wrongs.items():
        wrong = {"what": "strip", "prompt": "hot ->", "layer": 2, "latents": [3, 5], **change}
        assert says in asked(widget, **wrong)["error"]


def test_the_page_carries_the_grid_of_the_tables_and_no_markup():
    data = json.loads(widgets.steering().data)
    grid = tables.load("explore_steering")
    own = grid[grid["task"] == grid["target"]]
    for key, points in data["random"].items():
        task, layer = key.split("|")
        part = own[(own["task"] == task) & (own["layer"] == int(layer)) & (own["latent"] < widgets.WHOLE)]
        assert part["latent"].nunique() >= 5
        for scale, loss in points:
            assert loss == pytest.approx(part[part["scale"] == scale]["loss"].mean(), abs=1e-4)
    own = own[own["latent"] >= widgets.WHOLE]
    assert len(data["random"]) == len(own.groupby(["task", "layer"])) and not any("|-2" in key for key in data["cells"])
    for row in own.sample(40, random_state=0).itertuples():
        cell = data["cells"][f"{row.task}|{row.layer}|{row.latent}"]
        at = cell["scales"].index(row.scale)
        assert cell["loss"][at] == pytest.approx(row.loss, abs=1e-4)
        for view, example in zip(cell["views"][at], row.examples, strict=True):
            assert view[1] == example["rank"] and view[2] == example["continuation"]
            assert [data["tokens"][token] for token in view[3]] == list(example["tokens"])
    for build in BUILDERS:
        assert "<" not in build().data
    assert widgets._json({"a": "</script><!--"}) == '{"a": "\\u003c/script>\\u003c!--"}'


def test_the_browser_sides_never_write_markup():
    for path in widgets.FRONT.glob("*.js"):
        source = path.read_text()
        for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert way not in source, path.name


def test_building_the_page_needs_neither_torch_nor_a_model():
    code = "import sys\nfrom nb_utils.show import widgets\n" + "\n".join(
        f"widgets.{build.__name__}(backend=widgets.Backend('no-such-model'))" for build in BUILDERS
    ) + "\nassert not {'torch', 'transformers', 'sae_lens'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_slider_of_the_first_page_shows_cells_of_the_grid():
    grid, found = tables.load("explore_steering"), json.loads(widgets.glance().data)
    assert set(found["tasks"]) == set(grid["task"])
    for name, one in found["tasks"].items():
        own = grid[(grid["task"] == name) & (grid["target"] == name) & (grid["latent"] == widgets.WHOLE)]
        part = own[(own["layer"] == own.loc[own["loss"].idxmin(), "layer"]) & (own["scale"] >= 0)].sort_values("scale")
        assert one["scales"] == part["scale"].tolist() and one["scales"][0] == 0
        assert one["loss"] == pytest.approx(part["loss"].tolist(), abs=1e-4)
        assert one["start"] == part.loc[part["loss"].idxmin(), "scale"]
        for views, examples in zip(one["views"], part["examples"], strict=True):
            assert [view[0] for view in views] == [example["tokens"][0] for example in examples]
            assert [view[2] for view in views] == [example["rank"] == 1 for example in examples]
    assert "right without the vector" in widgets.glance().words()


def test_without_a_grid_the_first_page_says_so():
    assert json.loads(widgets.glance("tiny").data)["tasks"] == {} and widgets.glance("tiny").words() == ""
