"""The thin helper of the notebooks: one noun a module, and the names that a visitor needs, imported when asked for.

    import nb_utils as tv
    model = tv.load_model("gemma-3-270m")
    found = tv.clean("antonyms", layer=10, model=model)
    found.losses, found.features(), found.export("antonyms-block-10")
    with tv.steer(model, found.vector, layer=10):
        ...
"""

import importlib

NAMES = {
    "load_model": "models.load", "load_sae": "saes.load", "load_task": "tasks.load", "prepare": "workbench.prepare",
    "clean": "workbench.clean", "prune": "workbench.prune", "features": "workbench.features",
    "evaluate": "workbench.evaluate", "steer": "engine.steer", "export": "workbench.export",
}  # fmt: skip
__all__ = list(NAMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *NAMES})


def __getattr__(name: str) -> object:
    if name not in NAMES:
        raise AttributeError(f"module 'nb_utils' has no attribute {name!r}")
    module, function = NAMES[name].split(".")
    return getattr(importlib.import_module(f"nb_utils.{module}"), function)
