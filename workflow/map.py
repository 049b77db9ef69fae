"""Draw which of our modules imports which, and time what a notebook imports first: ``python -m workflow.map``.

A room is a package; what a module imports stands below it. A dotted line is an import that waits for a call.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# From the top of the picture to the bottom, with the colour of each; a room may import from those below it alone.
ROOMS = {
    "workflow": "#e8e8e8", "book.ledger": "#f6dcc8", "nb_utils.show": "#d9e8d3", "nb_utils.record": "#efe3b5",
    "nb_utils": "#cfe0f0",
}  # fmt: skip
WIDE, HIGH, ROW, GAP, LEFT = 124, 22, 46, 10, 110
MOST = 7  # modules in a row
STYLE = (
    "text{font:12px sans-serif;text-anchor:middle}.room{text-anchor:start;font-weight:bold}"
    "path{fill:none;stroke:#555;stroke-opacity:.35}"
)
FIRST = ("nb_utils", "nb_utils.tasks", "nb_utils.engine")  # a visitor's import, one without and one with torch


def room(module: str) -> str:
    """Return the room that a module stands in: its package, or the one around it."""
    return max((name for name in ROOMS if module.startswith(f"{name}.")), key=len)


def imports(root: Path = ROOT) -> dict[str, dict[str, bool]]:
    """Return {module: {module of ours that it imports: whether only when something is called}}."""
    paths = {path for name in ROOMS for path in (root / name.replace(".", "/")).rglob("*.py")}
    files = {".".join(path.relative_to(root).with_suffix("").parts): path for path in paths if path.stem != "__init__"}
    found = {}
    for module, path in sorted(files.items()):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        at_once = {part for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)
                   for part in ast.walk(node)}  # fmt: skip
        found[module] = {}
        for node in ast.walk(tree):
            for name in _named(node):
                if name in files and name != module:
                    found[module][name] = found[module].get(name, True) and node not in at_once
    return found


def _named(node: ast.AST) -> Iterator[str]:
    """Yield what an import may name: a module, or a name in one."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom) and node.module:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rows(found: dict[str, dict[str, bool]]) -> list[list[str]]:
    """Lay modules in rows from top to bottom: room by room, and in a room each above what it imports."""

    @cache
    def depth(module: str) -> int:
        here = [name for name, late in found[module].items() if not late and room(name) == room(module)]
        return 1 + max(map(depth, here), default=0)

    laid = []
    for name in ROOMS:
        inside = [module for module in found if room(module) == name]
        for level in range(max(map(depth, inside), default=0), 0, -1):
            row = [module for module in inside if depth(module) == level]
            laid += [row[i : i + MOST] for i in range(0, len(row), MOST)]
    return laid


def drawn(found: dict[str, dict[str, bool]]) -> str:
    """Return the picture as SVG."""
    laid = rows(found)
    width = LEFT + max(map(len, laid)) * (WIDE + GAP) + GAP
    height = GAP + len(laid) * ROW
    at = {}
    for i, row in enumerate(laid):
        start = (LEFT + width - len(row) * (WIDE + GAP)) / 2
        at |= {module: (round(start + j * (WIDE + GAP)), GAP + i * ROW) for j, module in enumerate(row)}
    lines = [_line(at[module], at[other], late) for module, others in found.items() for other, late in others.items()]
    tops = {room(row[0]): GAP + i * ROW for i, row in reversed(list(enumerate(laid)))}
    named = [f'<text class="room" x="{GAP}" y="{y + 15}">{name}</text>' for name, y in tops.items()]
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    ground = f'<rect width="{width}" height="{height}" fill="#fff"/>'
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{STYLE}</style>", ground]
    return "\n".join([*head, *lines, *(_box(module, *at[module]) for module in at), *named, "</svg>\n"])


def _box(module: str, x: int, y: int) -> str:
    name, colour = module.rpartition(".")[2], ROOMS[room(module)]
    rect = f'<rect x="{x}" y="{y}" width="{WIDE}" height="{HIGH}" rx="4" fill="{colour}"/>'
    return f'{rect}<text x="{x + WIDE // 2}" y="{y + 15}">{name}</text>'


def _line(start: tuple[int, int], end: tuple[int, int], late: bool) -> str:
    (x, y), (to_x, to_y) = start, end
    y, to_y = (y + HIGH, to_y) if to_y > y else (y, to_y + HIGH)
    bend, across = (to_y - y) // 2, to_x - x
    dots = ' stroke-dasharray="2 3"' if late else ""
    return f'<path d="M{x + WIDE // 2},{y}c0,{bend} {across},{bend} {across},{to_y - y}"{dots}/>'


def seconds(module: str) -> float:
    """Return how long a new process takes to import a module, less what it takes to start."""

    def taken(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
        return time.perf_counter() - start

    return max(0.0, taken(f"import {module}") - taken("pass"))


def main() -> None:
    """Write the picture, and print how many modules each room has and how long the first imports take."""
    parser = argparse.ArgumentParser(prog="python -m workflow.map", description="Draw who imports whom.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to draw")
    parser.add_argument("--out", type=Path, default=ROOT / "book/_assets/house.svg")
    args = parser.parse_args()
    found = imports(args.root)
    args.out.write_text(drawn(found), encoding="utf-8")
    print(f"{args.out.name}: " + ", ".join(f"{name} {sum(room(m) == name for m in found)}" for name in ROOMS))
    if args.root == ROOT:
        print(", ".join(f"import {module}: {seconds(module):.1f} s" for module in FIRST))


if __name__ == "__main__":
    main()
