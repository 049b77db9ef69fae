"""Figures whose values can be read: on hovering, with the arrow keys, and in a table behind each."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

SVG, LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
COLUMNS = ["panel", "series", "x", "y", "value"]


def show(drawn: Axes | Figure, alt: str) -> HTML:
    """Return a figure as a picture in the page, with its values behind, and close it.

    ``alt``: what is drawn, for who does not see it. Every point of a line or cloud, every cell of a map and every bar
    says its value when the mouse is on it; with the script of the book, the arrow keys go from one to the next.
    """
    figure = drawn.figure if isinstance(drawn, Axes) else drawn
    points = list(_points(figure))
    told = {}
    for i, ax in enumerate(figure.axes):
        seen = [(at, words) for where, at, words, _ in points if where is ax and at is not None and _inside(ax, *at)]
        if seen:
            ax.autoscale(False)
            ax.plot(*zip(*(at for at, _ in seen), strict=True), "o", ms=11, alpha=0, gid=f"spots-{i}", zorder=99)
            told[f"spots-{i}"] = [words for _, words in seen]
    with io.StringIO() as file, plt.rc_context({"svg.hashsalt": alt}):
        figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
        picture = file.getvalue()
    plt.close(figure)
    table = pd.DataFrame([row for *_, row in points], columns=COLUMNS)
    return HTML(f'<figure class="nb-values">{_titled(picture, told, alt)}{_behind(table)}</figure>')


def of(figure: Figure) -> pd.DataFrame:
    """Return what a figure draws: panel (its title), series (its name), x, y, and value (of a cell of a map)."""
    return pd.DataFrame([row for *_, row in _points(figure)], columns=COLUMNS)


def _points(figure: Figure) -> Iterator[tuple[Axes, tuple[float, float] | None, str, tuple]]:
    """Yield all that is drawn: its axes, its place in them (None: a level line), words, and row of the table."""
    for ax in figure.axes:
        for artist, (*at, number) in _drawn(ax):
            if np.isfinite(number):
                yield _point(ax, artist, *at, number)


def _drawn(ax: Axes) -> Iterator[tuple[Artist | BarContainer, tuple]]:
    """Yield what is drawn in axes: (x, y) of lines and clouds, (None, y) of level lines, (x, y, value) of maps.

    Of a bar likewise, its middle and its length.
    """
    for line in ax.lines:
        if line.get_transform() == ax.transData:
            yield from ((line, at) for at in zip(*map(np.atleast_1d, line.get_data()), strict=True))
        elif _name(line) and len(set(line.get_ydata())) == 1:
            yield line, (None, line.get_ydata()[0])
    for cloud in (one for one in ax.collections if isinstance(one, PathCollection)):
        yield from ((cloud, at) for at in np.ma.filled(cloud.get_offsets(), np.nan))
    for image in ax.images:
        grid = np.ma.filled(image.get_array().astype(float), np.nan)
        yield from ((image, (j, i, number)) for (i, j), number in np.ndenumerate(grid))
    for bars in (one for one in ax.containers if isinstance(one, BarContainer)):
        length = Rectangle.get_height if bars.orientation == "vertical" else Rectangle.get_width
        yield from ((bars, (*bar.get_center(), length(bar))) for bar in bars)


def _name(artist: Artist | BarContainer) -> str:
    """Return the name of what is drawn; matplotlib gives those that have none one that starts with _."""
    name = str(artist.get_label())
    return "" if name.startswith("_") else name


def _point(ax: Axes, artist: Artist | BarContainer, x: float | None, y: float, value: float | None = None) -> tuple:
    across, up = "" if x is None else _said(ax.xaxis, float(x)), _said(ax.yaxis, float(y))
    panel = ax.get_title() or ax.get_title(loc="left")
    told = [panel, _name(artist)]
    told += [f"{axis.get_label_text()} {text}".strip() for axis, text in ((ax.xaxis, across), (ax.yaxis, up)) if text]
    told += [] if value is None else [f"{value:.3g}"]
    row = (panel, _name(artist), across, up, value)
    return ax, None if x is None else (x, y), " · ".join(part for part in told if part), row


def _said(axis, at: float) -> str:
    """Write a place on an axis: the label of its tick where it has one that is no number, else the number."""
    for place, tick in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False):
        if np.isclose(place, at) and tick.get_text():
            return tick.get_text()
    return f"{at:.3g}"


def _inside(ax: Axes, x: float, y: float) -> bool:
    """Say whether a point is in the frame: a marker outside the picture is not written."""
    (x0, x1), (y0, y1) = sorted(ax.get_xlim()), sorted(ax.get_ylim())
    return bool(x0 <= x <= x1 and y0 <= y <= y1)


def _titled(picture: str, told: dict[str, list[str]], alt: str) -> str:
    """Give the invisible spots of a picture their words, and all its ids a prefix that no other picture has.

    ``told``: of every group of spots, by its id, what each says.
    """
    for prefix, space in (("", SVG), ("xlink", LINK)):
        ElementTree.register_namespace(prefix, space)
    root = ElementTree.fromstring(picture)
    for group in root.iter(f"{{{SVG}}}g"):
        if group.get("id") in told:
            for spot, words in zip(group.iter(f"{{{SVG}}}use"), told[group.get("id")], strict=True):
                ElementTree.SubElement(spot, f"{{{SVG}}}title").text = words
                spot.set("class", "nb-spot")
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    width = float(root.attrib.pop("width").removesuffix("pt"))
    root.attrib.pop("height")
    root.attrib |= {"role": "img", "aria-label": alt, "style": f"width: {width * 4 / 3:.0f}px"}
    text = ElementTree.tostring(root, encoding="unicode")
    key = f"v{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}", text)


def _behind(table: pd.DataFrame) -> str:
    """Return the table behind a figure; columns without content are left out."""
    kept = table.loc[:, table.replace("", np.nan).notna().any()]
    shown = kept.to_html(index=False, border=0, na_rep="", float_format="{:.3g}".format, classes="nb-table")
    return f'<details><summary>The {len(kept)} values</summary><div tabindex="0">{shown}</div></details>'
