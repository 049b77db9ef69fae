"""The thin helper of the notebooks: one noun a module, and the names that a visitor needs, imported when asked for.

    import nb_utils as tv
    task, model = tv.load_task("antonyms"), tv.load_model("gemma-3-270m")
    bench = tv.prepare(model, tv.load_sae(model, "shipped", 12), task, layers=(8, 10, 12))
    best = min(tv.prune(bench), key=lambda found: found.validation_loss)
    tv.evaluate(bench.trial, best), tv.export(bench.trial, best)
"""

import importlib

NAMES = {
    "load_task": "tasks.load", "split": "tasks.split", "load_model": "models.load", "load_sae": "saes.load",
    "separators": "vectors.separators", "task_vector": "vectors.task_vector",
    "centred_task_vector": "vectors.centred_task_vector", "decompose": "vectors.contrast_codes",
    "prepare": "workbench.prepare", "prune": "workbench.prune", "clean": "workbench.clean",
    "evaluate": "workbench.loss", "export": "workbench.export",
}  # fmt: skip
__all__ = list(NAMES)


def __getattr__(name: str) -> object:
    if name not in NAMES:
        raise AttributeError(f"module 'nb_utils' has no attribute {name!r}")
    module, function = NAMES[name].split(".")
    return getattr(importlib.import_module(f"nb_utils.{module}"), function)
