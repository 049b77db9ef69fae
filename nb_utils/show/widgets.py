"""Widgets of the interactive page: precomputed tables in the static book, the same controls live with a kernel.

Each is an anywidget that carries its tables in one trait. Its browser side greets the kernel; only then is a model
loaded, so that building the book needs neither torch nor weights. Every answer is data; the browser side writes it
with text nodes, so nothing that a user types or a model emits can become markup.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path

import anywidget
import numpy as np
import pandas as pd
import traitlets
from IPython.display import HTML, display

from nb_utils import tasks
from nb_utils.record import tables
from nb_utils.statistics import rows, survivors
from nb_utils.text import verbatim

FRONT = Path(__file__).with_name("front")
N_TEST = 16  # prompts that a mean loss is taken over
N_EXAMPLES = 3  # of them can be looked at one by one
N_TOKENS = 4  # of a continuation
WHOLE = -1  # stands for the pruned vector, all its features together; smaller numbers for random directions
KEPT = 10  # features of the pruned vector
ABSENT = (
    "<p>A control stands here, which JavaScript draws: without that, text and figures are complete. In a saved "
    "notebook it is gone with its kernel: choose Run &gt; Run All Cells to have it back.</p>"
    # JupyterLab's own "model not found" would stand below that: a control that is not there has no elements.
    "<style>.jp-OutputArea:has([data-words]:not([hidden])) .jupyter-widgets:not(:has(*)) { display: none }</style>"
)
LIVE_SCALES = tuple(round(-1 + 0.05 * i, 2) for i in range(51))  # of the mean residual norm


class WidgetError(ValueError):
    """Something asked of a widget that it cannot do; the message says what to do instead."""


class Backend:
    """The model and SAEs behind the widgets of a page, loaded when first asked for and shared by them."""

    def __init__(self, model: str = tables.MODEL, sae_set: str = "shipped"):
        self.name, self.sae_set = model, sae_set
        self.sae = lru_cache(maxsize=None)(self._sae)
        self.prompt = lru_cache(maxsize=64)(self._prompt)
        self.test = lru_cache(maxsize=8)(self._test)
        self.plain = lru_cache(maxsize=8)(lambda task: self.test(task).unsteered())

    @cached_property
    def model(self):
        """The model; raises ModelError if it cannot be had."""
        from nb_utils import models

        return models.load(self.name)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        from nb_utils import saes

        return saes.layers(self.model, self.sae_set)

    def layer(self, layer: object) -> int:
        """Return a layer that has an SAE; raises WidgetError for any other."""
        if type(layer) is not int or layer not in self.layers:
            raise WidgetError(f"There is no SAE after block {layer}: choose one of {', '.join(map(str, self.layers))}.")
        return layer

    def _sae(self, layer: int):
        from nb_utils import saes

        return saes.load(self.model, self.sae_set, layer)

    def _prompt(self, text: str, answer: str):
        """Read a typed prompt and prepare its site."""
        from nb_utils import engine
        from nb_utils.show import microscope

        read = microscope.prompt(self.model.tokenizer, text, answer)
        return engine.Site.prepare(self.model, [read], answer_tokens=2)

    def _test(self, task: str):
        """Prepare the site of a task's first test prompts."""
        from nb_utils import engine, prompts

        pairs = tasks.split(tasks.load(task)).test[:N_TEST]
        return engine.Site.prepare(self.model, prompts.zero_shot(self.model.tokenizer, pairs), answer_tokens=2)

    def direction(self, task: str, layer: int, latent: int):
        """Return a unit direction [d_model]: of a latent, or of all pruned features of a task together (`WHOLE`)."""
        from nb_utils.show import microscope

        if latent != WHOLE:
            return microscope.direction(self.sae(layer), latent)
        vector = pruned_vector(task, layer, self.sae(layer), self.name)
        return vector / vector.norm()

    def steering_vector(self, task: str, layer: int, latent: int, scale: float):
        """Return a direction [1, d_model], ``scale`` times the mean residual norm at the task's separators long."""
        self.layer(layer)
        if type(latent) is not int:  # true is an int too
            raise WidgetError("Choose a feature, or type the number of a latent.")
        if type(scale) not in (int, float) or not math.isfinite(scale):
            raise WidgetError("The scale is a finite number: type one, such as 0.5.")
        norm = self.test(task).at(layer).norm(dim=1).mean()
        return (float(scale) * norm * self.direction(task, layer, latent))[None]


def offered(task: str, model: str = tables.MODEL) -> pd.DataFrame:
    """Return a task's features, as `statistics.survivors` finds them: layer, latent, weight (raw units), method."""
    frame = rows(tables.load("02_cleanup_features", model), task=task)
    found = survivors(frame, k=KEPT)[["layer", "latent", "weight"]]
    pruned = pd.MultiIndex.from_frame(_pruned(frame)[["layer", "latent"]])
    kept = pd.MultiIndex.from_frame(found[["layer", "latent"]]).isin(pruned)
    return found.assign(method=["pruned" if one else "cleaned" for one in kept])


def _pruned(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the features of the pruned vector of the first seed, of both signs."""
    frame = rows(frame, method="prune_contrast", k=KEPT, seed=0)
    return frame[frame["after"] != 0]


def pruned_vector(task: str, layer: int, sae, model: str = tables.MODEL):
    """Add up the pruned features of a task at a layer [d_model]; raises WidgetError if there are none."""
    import torch

    found = _pruned(rows(tables.load("02_cleanup_features", model), task=task, layer=layer))
    if found.empty:
        raise WidgetError(f"No pruned features are stored for block {layer}: choose a single latent.")
    return torch.tensor(found["after"].to_numpy()) @ sae.W_dec[torch.tensor(found["latent"].to_numpy())]


class _Live(anywidget.AnyWidget):
    """A widget whose browser side asks questions; a wrong one is answered by a sentence."""

    _css = (FRONT / "widgets.css").read_text()
    data = traitlets.Unicode("{}").tag(sync=True)
    mark = traitlets.Unicode().tag(sync=True)  # by which the browser side finds the words that it takes the place of

    def __init__(self, data: object, backend: Backend | None):
        super().__init__(data=_json(data))
        self.mark = self.model_id
        self.backend = backend
        self.on_msg(lambda _, content, buffers: self._receive(content))

    def words(self) -> str:
        """Say as HTML what the control shows first."""
        return ""

    def _ipython_display_(self) -> None:
        """Show words, then the control, which hides them: where it cannot be drawn they stay."""
        display(HTML(f'<div data-words="{self.mark}">{ABSENT}{self.words()}</div>'))
        display(self._repr_mimebundle_()[0], raw=True)

    def answer(self, question: Mapping) -> dict:
        """Answer a question of the browser side; raises a ValueError whose message is shown as it is."""
        raise NotImplementedError

    def greet(self) -> dict:
        """Load what live answers need, and say what they offer."""
        return {}

    def _receive(self, content: Mapping) -> None:
        if content.get("what") == "hello":
            if self.backend is not None:
                self.send({"kind": "loading"})
                try:
                    self.send({"kind": "live", "model": self.backend.model.name, **self.greet()})
                except Exception as error:
                    self.send({"kind": "refused", "error": _sentence(error)})
            return
        try:
            reply = self.answer(content)
        except Exception as error:
            reply = {"error": _sentence(error)}
        self.send({"id": content.get("id"), **reply})


def _sentence(error: Exception) -> str:
    """Return the message of our own errors; log any other, and name it: a control must never wait in vain."""
    if isinstance(error, ValueError) and type(error).__module__.startswith("nb_utils"):
        return " ".join(str(error).split())
    logging.getLogger(__name__).exception("a widget's question failed", exc_info=error)
    return f"This could not be computed ({type(error).__name__}: {str(error)[:200]}); change it and try again."


def _listed(head: str, said: list[str]) -> str:
    return f"<p>{head}</p><ul>{''.join(f'<li>{each}</li>' for each in said)}</ul>" if said else ""


def _front(name: str) -> str:
    return (FRONT / "dom.js").read_text() + (FRONT / name).read_text()


def _json(data: object) -> str:
    """Write JSON that may stand in a script element of a page, whatever text it holds."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, default=_plain).replace("<", "\\u003c")


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


class Steering(_Live):
    """The steering control: what one feature, at one scale, does to the next token."""

    _esm = _front("steering.js")

    def words(self) -> str:
        data = json.loads(self.data)
        titles = {task["name"]: task["title"] for task in data["tasks"]}
        said = []
        for task, zero in data["zero"].items():
            own = {key: cell for key, cell in data["cells"].items() if key.startswith(f"{task}|")}
            loss, scale, key = min((*min(zip(c["loss"], c["scales"], strict=True)), key) for key, c in own.items())
            _, layer, latent = key.split("|")
            what = "the pruned vector" if int(latent) == WHOLE else f"feature {latent}"
            said.append(f"{verbatim(titles.get(task, task))}: {zero['loss']:.2f} nats unsteered; at best {loss:.2f}, "
                        f"with {what} after block {layer} at scale {scale:g}")  # fmt: skip
        return _listed(f"Stored in it, means over {data['n_test']} test prompts:", said)

    def greet(self) -> dict:
        self.backend.test(next(iter(tables.names("02_cleanup_features", self.backend.name)), "antonyms"))
        return {"layers": list(self.backend.layers), "scales": LIVE_SCALES}

    def answer(self, question: Mapping) -> dict:
        what = question.get("what")
        layer, latent = question.get("layer"), question.get("latent")
        if what == "evidence":
            found = evidence(self.backend.name, {(layer, latent)})
            return {"evidence": next(iter(found.values()), None)}
        import torch

        from nb_utils import interventions
        from nb_utils.show import microscope

        vector = self.backend.steering_vector(question["task"], layer, latent, question["scale"])
        if what == "mean":
            return self._mean(question["task"], vector, layer)
        text, answer = self._asked(question)
        site = self.backend.prompt(text, answer)
        both = torch.cat([torch.zeros_like(vector), vector])  # side by side they cost little more than one
        if what == "continuation":
            steered = interventions.Intervention({layer: interventions.add(both)})
            return _pair(interventions.continuations(self.backend.model, site.prompts[0], steered, N_TOKENS))
        if what != "view":
            raise WidgetError(f"The steering control knows no question {what!r}.")
        return _pair(self._shown(views[0], bool(answer.strip())) for views in microscope.views(site, both, layer))

    def _asked(self, question: Mapping) -> tuple[str, str]:
        if "example" in question:
            pair = tasks.split(tasks.load(question["task"])).test[question["example"]]
            return f"{pair.x} ->", pair.y
        return str(question["prompt"]), str(question.get("answer", ""))

    def _mean(self, task: str, vector, layer: int) -> dict:
        site = self.backend.test(task)
        scores, plain = site.evaluate(vector, layer), self.backend.plain(task)
        return {
            "loss": scores.loss().mean().item(), "accuracy": scores.accepted.float().mean().item(),
            "zero": plain.loss().mean().item(), "zero_accuracy": plain.accepted.float().mean().item(),
        }

    def _shown(self, view, known: bool) -> dict:
        from nb_utils.show import microscope

        return {
            "tokens": microscope.pieces(self.backend.model.tokenizer, [token for token, _ in view.top]),
            "shares": [share for _, share in view.top],
            "loss": view.loss if known else None, "rank": view.rank if known else None,
        }


def _pair(found) -> dict:
    return dict(zip(("before", "after"), found, strict=True))


def evidence(model: str, wanted: set[tuple[int, int]]) -> dict[str, dict]:
    """Return what the table of features says of each (layer, latent), keyed "layer:latent"; nothing without a table."""
    try:
        layers, latents = (sorted(set(each)) for each in zip(*wanted, strict=True)) if wanted else ((), ())
        frame = tables.load("features", model, filters=[("layer", "in", layers), ("latent", "in", latents)])
    except tables.TableError:
        return {}
    keys = pd.MultiIndex.from_frame(frame[["layer", "latent"]])
    try:
        named = tables.load("labels", model, columns=["layer", "latent", "label"])
        label = dict(zip(zip(named["layer"], named["latent"], strict=True), named["label"], strict=True))
    except tables.TableError:
        label = {}
    return {
        f"{row['layer']}:{row['latent']}": {
            "label": label.get((row["layer"], row["latent"])),
            "density": row["density"], "max_activation": row["largest"],
            "promoted": [token["token"] for token in row["promoted"]],
            "suppressed": [token["token"] for token in row["suppressed"]],
            "examples": [dict(example) for example in list(row["examples"])[:4]],
        }
        for row in frame[keys.isin(list(wanted))].to_dict("records")
    }


def steering(
    model: str = tables.MODEL, backend: Backend | None = None, ticks: Mapping[str, str] | None = None
) -> Steering:
    """Build the steering control from the tables explore_steering, 02_cleanup_features and features.

    Without ``backend`` it stays precomputed even where a kernel answers. ``ticks``: what the vector of each task is
    shown to be, in words, by the task's name.
    """
    return Steering({**steering_data(model), "ticks": dict(ticks or {})}, backend)


def steering_data(model: str = tables.MODEL) -> dict:
    """Lay the grid out as the control reads it: cells "task|layer|latent", token texts stored once."""
    try:
        grid = tables.load("explore_steering", model)
    except tables.TableError:
        grid = pd.DataFrame(columns=["task", "target", "layer", "latent", "scale", "loss", "accuracy", "examples"])
    seen, cells, zero = {}, {}, {}
    own = grid[grid["task"] == grid["target"]]
    for task, part in own[own["scale"] == 0].groupby("task"):
        zero[task] = {"loss": part["loss"].iloc[0], "accuracy": part["accuracy"].iloc[0]}
    random = own[own["latent"] < WHOLE].groupby(["task", "layer", "scale"])["loss"].mean().round(4).reset_index()
    own = own[own["latent"] >= WHOLE]
    elsewhere = {key: part for key, part in grid.groupby(["task", "layer", "latent"])}
    for (task, layer, latent), part in own.groupby(["task", "layer", "latent"]):
        best = elsewhere[task, layer, latent].sort_values("loss").drop_duplicates("target")
        cells[f"{task}|{layer}|{latent}"] = {
            "scales": part["scale"].tolist(), "loss": part["loss"].round(4).tolist(),
            "accuracy": part["accuracy"].round(4).tolist(),
            "views": [[_packed(e, seen) for e in examples] for examples in part["examples"]],
            "elsewhere": {r.target: [r.scale, round(r.loss, 4), zero[r.target]["loss"]] for r in best.itertuples()
                if r.target in zero},
        }
    listed = [_entry(task, model) for task in tables.names("02_cleanup_features", model) if task in tasks.names()]
    shown = {(int(layer), int(latent)) for layer, latent in own[["layer", "latent"]].drop_duplicates().to_numpy()}
    return {
        "model": model, "n_test": N_TEST, "tasks": listed, "scales": sorted(own["scale"].unique().tolist()),
        "zero": zero, "cells": cells, "tokens": list(seen), "evidence": evidence(model, shown),
        "random": {f"{task}|{layer}": part[["scale", "loss"]].to_numpy().tolist()
                   for (task, layer), part in random.groupby(["task", "layer"])},
    }


def _packed(example: Mapping, seen: dict[str, int]) -> list:
    places = [seen.setdefault(token, len(seen)) for token in example["tokens"]]
    loss, shares = round(float(example["loss"]), 4), [round(float(s), 3) for s in example["shares"]]
    return [loss, int(example["rank"]), example["continuation"], places, shares]


def _entry(name: str, model: str) -> dict:
    """Describe one task for the control: its title, its example prompts and, by layer, its features."""
    task, found = tasks.load(name), offered(name, model)
    examples = [[pair.x, pair.y] for pair in tasks.split(task).test[:N_EXAMPLES]]
    features = {}
    for layer, part in found.groupby("layer"):
        part = part.sort_values("weight", ascending=False)
        size = part["weight"].max()
        whole = bool(part["method"].eq("pruned").any())
        features[str(layer)] = [{"latent": WHOLE, "method": "pruned", "weight": 1.0}] * whole + [
            {"latent": int(r.latent), "method": r.method, "weight": round(r.weight / size, 2)}
            for r in part.itertuples()
        ]
    return {"name": name, "title": task.title, "examples": examples, "features": features}


class Glance(_Live):
    """One slider: a task's features together, added to prompts that show no example."""

    _esm = _front("glance.js")

    def words(self) -> str:
        data = json.loads(self.data)
        said = [
            f"{verbatim(one['title'])}: {one['accuracy'][one['scales'].index(0.0)]:.0%} right without the vector, "
            f"{max(one['accuracy']):.0%} with it"
            for one in data["tasks"].values()
        ]
        return _listed(f"Stored in it, over {data['n_test']} test words:", said)


def glance(model: str = tables.MODEL) -> Glance:
    """Build the slider from the grid of the steering control: of each task the block where its vector does best."""
    data = steering_data(model)
    pairs = {task["name"]: task for task in data["tasks"]}
    found = {}
    for name in data["zero"]:
        wanted = (f"{name}|", f"|{WHOLE}")
        cells = [cell for key, cell in data["cells"].items() if key.startswith(wanted[0]) and key.endswith(wanted[1])]
        if cells:
            found[name] = _glanced(min(cells, key=lambda cell: min(cell["loss"])), pairs[name], data["tokens"])
    return Glance({"n_test": data["n_test"], "tasks": found}, None)


def _glanced(cell: Mapping, task: Mapping, tokens: list[str]) -> dict:
    """Keep what the slider shows of a cell: scales from 0 on and, of each example, the likeliest token."""
    scales, kept = cell["scales"], [i for i, scale in enumerate(cell["scales"]) if scale >= 0]
    start = min(kept, key=lambda i: cell["loss"][i])
    views = [[[tokens[view[3][0]], view[4][0], view[1] == 1] for view in cell["views"][i]] for i in kept]
    return {
        "title": task["title"], "examples": task["examples"], "start": scales[start], "views": views,
        "scales": [scales[i] for i in kept], "loss": [cell["loss"][i] for i in kept],
        "accuracy": [cell["accuracy"][i] for i in kept],
    }


class Workbench(_Live):
    """The control that cleans a vector from pairs; without a kernel it only says what it needs."""

    _esm = _front("workbench.js")

    def __init__(self, data: object, backend: Backend | None):
        super().__init__(data, backend)
        self.trial, self.running, self.stopped = None, None, threading.Event()

    def greet(self) -> dict:
        return {"layers": list(self.backend.layers)}

    def answer(self, question: Mapping) -> dict:
        what = question.get("what")
        if what == "clean":
            return self._start(question)
        if what == "stop":
            self.stopped.set()
            return {}
        if what == "import":
            return self._import(str(question["folder"]))
        if self.trial is None:
            raise WidgetError("There is no vector yet: clean one, or load an exported folder.")
        from nb_utils import exports, workbench

        weighted = self._weighted(question)
        if what == "loss":
            return {"loss": workbench.loss(self.trial, weighted)}
        if what == "export":
            exported = workbench.pack(self.trial, weighted)
            return {"folder": str(exports.save(exported, str(question["folder"]).strip())), "loss": exported.card.loss}
        raise WidgetError(f"The workbench knows no question {what!r}.")

    def _start(self, question: Mapping) -> dict:
        """Check what can be checked at once, then clean in a thread: the kernel stays free for a stop."""
        if self.running is not None and self.running.is_alive():
            raise WidgetError("A cleaning is running: stop it, or wait for its end.")
        from nb_utils import workbench

        path = str(question.get("path", "")).strip()
        task = tasks.load(path) if path else tasks.parse(str(question.get("pairs", "")))
        if question.get("method") not in workbench.METHODS:
            raise WidgetError(f"The method is one of {', '.join(workbench.METHODS)}.")
        workbench.check(task)
        self.backend.layer(question.get("layer"))
        self.stopped.clear()
        asked = (task, question["layer"], question["method"])
        self.running = threading.Thread(target=self._run, args=asked, daemon=True)
        self.running.start()
        return {"started": True}

    def _run(self, task: tasks.Task, layer: int, method: str) -> None:
        try:
            self.send({"kind": "cleaned", **self.clean(task, layer, method)})
        except Exception as error:
            self.send({"kind": "failed", "error": _sentence(error)})

    def clean(self, task: tasks.Task, layer: int, method: str) -> dict:
        """Clean a task at a layer and describe the result, telling the browser side of each step."""
        from nb_utils import workbench

        def tell(done: int, of: int, text: str = "cleaning") -> bool:
            self.send({"kind": "progress", "done": done, "of": of, "text": text})
            return self.stopped.is_set()

        tell(0, 1, "collecting separators")
        bench = workbench.prepare(task, layer, self.backend.model, self.backend.sae(layer), self.backend.layers)
        tell(0, 1, "the task vector, layer by layer")
        curve = workbench.curve(bench)
        path = workbench.METHODS[method](bench, progress=tell)
        self.trial = bench.trial
        return {
            "title": task.title, "layer": layer, "curve": curve, "few_shot": bench.few_shot, **self._offered(path),
            "stopped": self.stopped.is_set(),
        }

    def _offered(self, path) -> dict:
        from nb_utils import workbench

        return {
            "zero_shot": self.trial.zero_shot, "n_test": len(self.trial.pairs),
            "path": [
                {
                    "features": list(zip(w.latents, w.weights, strict=True)), "bias": w.bias,
                    "loss": workbench.loss(self.trial, w),
                    "validation": None if np.isnan(w.validation_loss) else w.validation_loss,
                }
                for w in path
            ],
        }

    def _weighted(self, question: Mapping):
        from nb_utils import workbench

        features = [(int(latent), float(weight)) for latent, weight in question["features"]]
        if not all(math.isfinite(weight) for _, weight in features):
            raise WidgetError("A weight is a finite number: move its slider, or clean again.")
        latents, weights = zip(*features, strict=True) if features else ((), ())
        return workbench.Weighted(latents, weights, bool(question.get("bias")), float("nan"))

    def _import(self, folder: str) -> dict:
        from nb_utils import exports, workbench

        layer = exports.load(folder, self.backend.model).card.layer
        self.backend.layer(layer)
        found = exports.load(folder, self.backend.model, self.backend.sae(layer))
        self.trial, weighted = workbench.restore(found, self.backend.model, self.backend.sae(layer))
        return {"title": found.card.task, "layer": layer, "card_loss": found.card.loss, **self._offered([weighted])}


def workbench(model: str = tables.MODEL, backend: Backend | None = None) -> Workbench:
    """Build the control that cleans your own vector, filled with the pairs of the table explore_cleaning."""
    try:
        pairs = tables.load("explore_cleaning", model)["pairs"].iloc[0]
    except tables.TableError:
        pairs = []
    return Workbench({"model": model, "pairs": "\n".join(pairs)}, backend)


class TokenStrip(_Live):
    """Where a detector and an executor fire in a few-shot prompt."""

    _esm = _front("strip.js")

    def words(self) -> str:
        said = [
            f"{verbatim(entry['title'])}, block {layer}: "
            + ", ".join(f"{role} {one['latent']} ({one['share']:.0%})" for role, one in at["roles"].items())
            for entry in json.loads(self.data)["tasks"].values() for layer, at in entry["layers"].items()
        ]  # fmt: skip
        return _listed("Stored in it, with their share of activation on outputs and on arrows:", said)

    def greet(self) -> dict:
        return {"layers": list(self.backend.layers)}

    def answer(self, question: Mapping) -> dict:
        from nb_utils import prompts
        from nb_utils.show import microscope

        model, layer = self.backend.model, self.backend.layer(question.get("layer"))
        latents = question.get("latents")
        if not isinstance(latents, list) or not latents or not all(type(latent) is int for latent in latents):
            raise WidgetError("Type the numbers of a detector's and an executor's latent.")
        read = microscope.prompt(model.tokenizer, str(question.get("prompt", "")))
        found = microscope.activations(model, self.backend.sae(layer), read, latents)
        return {
            "tokens": microscope.pieces(model.tokenizer, read.ids[: len(found)]),
            "kinds": prompts.token_types(read)[: len(found)],
            "activations": [[None if np.isnan(a) else a for a in column] for column in found.T.tolist()],
        }


def token_strip(model: str = tables.MODEL, backend: Backend | None = None) -> TokenStrip:
    """Build the strip from the table explore_tokens."""
    try:
        frame = tables.load("explore_tokens", model)
    except tables.TableError:
        frame = pd.DataFrame(columns=["task", "layer", "role"])
    entries: dict = {}
    for (task, layer), part in frame.groupby(["task", "layer"]):
        roles = {role: one.sort_values("position") for role, one in part.groupby("role")}
        first = next(iter(roles.values()))
        entries.setdefault(task, {"title": tasks.load(task).title, "layers": {}})["layers"][str(layer)] = {
            "tokens": first["token"].tolist(), "kinds": first["kind"].tolist(),
            "roles": {
                role: {
                    "latent": int(one["latent"].iloc[0]), "share": round(float(one["share"].iloc[0]), 4),
                    "activations": [None if np.isnan(a) else round(a, 2) for a in one["activation"]],
                }
                for role, one in roles.items()
            },
        }
    return TokenStrip({"model": model, "tasks": entries}, backend)
