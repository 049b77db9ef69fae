"""Get a model ready before the runs need it: python -m workflow.fetch_model gemma-3-270m"""

import sys
import time

from nb_utils import models


def main(name: str) -> int:
    """Load the model once, converting an embedded one on first use, and say under which terms it comes."""
    if name in models.EMBEDDED:
        spec = models.EMBEDDED[name]
        print(f"Model {name}, from the package {spec.package}. Licence: {spec.licence}.")
        if spec.terms:
            folder = models.cache_dir() / "models" / name
            print(f"By using it you accept these terms, which lie beside the weights in {folder}.")
    start = time.monotonic()
    try:
        model = models.load(name)
    except models.ModelError as error:
        print(error, file=sys.stderr)
        return 1
    seconds = time.monotonic() - start
    print(f"Model {name} is ready: {model.n_layers} layers of width {model.d_model} ({seconds:.0f} s).")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
