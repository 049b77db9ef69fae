"""The grid of the interactive page, on the tiny model."""

import pandas as pd
import torch

from nb_utils import engine, files, interventions, models, prompts, saes, tasks
from nb_utils.record import tables
from nb_utils.show import microscope
from workflow import explore_grid, stale

LAYER = 2


def test_every_direction_is_steered_at_every_scale_with_examples_on_its_own_task(tiny, monkeypatch):
    sae = saes.random(tiny, LAYER)
    listed = pd.DataFrame({"layer": LAYER, "latent": [-1, 3, -2], "weight": [1.0, 2.0, 0.5], "method": "pruned"})
    units = torch.eye(tiny.d_model)[:3]
    monkeypatch.setattr(explore_grid, "directions", lambda task, layer, sae: (listed, units))
    sites = {
        task: engine.Site.prepare(tiny, prompts.zero_shot(tiny.tokenizer, tasks.split(tasks.load(task)).test[:4]))
        for task in ("antonyms", "en_es")
    }
    grid = explore_grid.steering(tiny, "antonyms", LAYER, sites, sae)
    own, other = (grid[grid["target"] == task] for task in sites)
    assert len(own) == 3 * len(explore_grid.SCALES) and len(other) == 3 * len(explore_grid.ELSEWHERE)
    assert own[own["scale"] == 0].groupby("latent")["loss"].first().nunique() == 1
    at = own[own["latent"].eq(3) & own["scale"].eq(0.5)].iloc[0]
    vector = 0.5 * at["norm"] * units[1][None]
    assert abs(sites["antonyms"].evaluate(vector, LAYER).loss().mean().item() - at["loss"]) < 1e-4
    assert len(at["examples"]) == explore_grid.N_EXAMPLES and not own[own["latent"].eq(-2)]["examples"].map(len).any()
    what = interventions.Intervention({LAYER: interventions.add(vector)})
    for prompt, example in zip(sites["antonyms"].prompts, at["examples"], strict=False):
        assert example["continuation"] == interventions.continuations(tiny, prompt, what, explore_grid.N_TOKENS)[0]
    view = microscope.views(sites["antonyms"].take(torch.arange(1)), vector, LAYER)[0][0]
    assert abs(view.loss - at["examples"][0]["loss"]) < 1e-4


def test_a_call_that_was_killed_goes_on_where_it_was(monkeypatch, tmp_path):
    lm, made = models.load(tables.MODEL), []
    monkeypatch.setattr(models, "load", lambda name: lm)
    known = [tables.file("02_cleanup_features", task) for task in ("antonyms", "en_fr")]
    monkeypatch.setenv("NB_TABLES", str(tmp_path))
    for path in known:
        files.write(tables.file("02_cleanup_features", path.stem), path.read_bytes())
    frame = pd.DataFrame({"task": explore_grid.TASKS, "loss": 1.0})

    def steering(lm, task, layer, sites, sae):
        made.append(task)
        return frame.assign(task=task)

    monkeypatch.setattr(explore_grid, "steering", steering)
    for name in ("strips", "cleaning"):
        monkeypatch.setattr(explore_grid, name, lambda *given, name=name: made.append(name) or frame)
    explore_grid.main([])
    assert set(made) == {"strips", "cleaning", "antonyms", "en_fr"}
    made.clear()
    tables.file("explore_steering", "en_fr").unlink()
    explore_grid.main([])
    assert set(made) == {"en_fr"}
    made.clear()
    monkeypatch.setattr(stale, "_fingerprint", lambda *given: "other rows")
    explore_grid.main([])
    assert set(made) == {"antonyms", "en_fr"}, "features that are chosen anew are not shown"
