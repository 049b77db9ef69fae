"""Draw the README's figure from the committed tables: ``python -m workflow.readme_figure``."""

import matplotlib

matplotlib.use("Agg")
import pandas as pd

from nb_utils import statistics
from nb_utils.record import tables
from nb_utils.show import plots
from nb_utils.statistics import rows


def main():
    """Average the loss by layer over the tasks that count, and write book/_assets/cleanup.png."""
    plots.use_style()
    plain, cleaned = tables.load("01_reconstruction_loss"), tables.load("02_cleanup")
    frame = pd.concat([plain, cleaned], ignore_index=True)
    frame = frame[frame["task"].isin(plain["task"]) & frame["task"].isin(cleaned["task"])]
    frame = rows(frame[frame["task"].map(statistics.solved(frame))], on="test")
    frame = frame[frame["mode"].isin(["add", "none"])]
    dense = frame[frame["method"].isin(["zero_shot", "few_shot", "task_vector", "reconstruct", "centred_best_scale"])]
    chosen = statistics.choose(rows(frame, method="clean")).assign(k=pd.NA)
    parts = pd.concat([dense, chosen, rows(frame, method="prune_contrast", k=20)])
    axes = plots.loss_by_layer(statistics.averages(parts, ["method", "mode", "k", "layer"]))
    axes.set_title(f"Mean over {frame['task'].nunique()} tasks, vectors added at one token")
    axes.figure.savefig(tables.ROOT / "book/_assets/cleanup.png", dpi=150)


if __name__ == "__main__":
    main()
