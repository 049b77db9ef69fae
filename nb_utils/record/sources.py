"""Sources: what of our own code a table comes from, as one hash.

Only what can change a measurement counts: the code cells of the experiment's notebook, and the definitions that these
use, directly or through others. Comments, docstrings, layout, the defaults of parameters (a table records those that it
was made with), drawing and storing do not.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("nb_utils", "book", "workflow", "benchmarks")
AFTER_MEASURING = ("nb_utils.files", "nb_utils.show.plots", "nb_utils.record.tables", "nb_utils.text", "workflow.stale")
LOOSE = "(statements)"
# Tables that no experiment makes, and what does.
SCRIPTS = {
    "13_ground_truth": "workflow/ground_truth.py",
    "benchmarks": "benchmarks/measure.py", "choices": "workflow/choices.py", "features": "workflow/collect_evidence.py",
    "explore_cleaning": "workflow/explore_grid.py", "explore_steering": "workflow/explore_grid.py",
    "explore_tokens": "workflow/explore_grid.py", "labels": "workflow/label_features.py",
    "saes": "workflow/measure_saes.py", "stability": "workflow/stability.py",
}  # fmt: skip


def maker(stem: str) -> Path | None:
    """Return the notebook or script that makes the tables of a stem: ``02_cleanup_features`` is 02_cleanup's."""
    notebooks = (ROOT / "book/experiments").glob("*.ipynb")
    found = [path for path in notebooks if stem == path.stem or stem.startswith(f"{path.stem}_")]
    if found:
        return max(found, key=lambda path: len(path.stem))
    script = SCRIPTS.get(stem)
    return ROOT / script if script and (ROOT / script).is_file() else None


def code(path: Path) -> str:
    """Hash a notebook or script with everything of ours that it reaches."""
    digest = hashlib.sha256()
    for name, source in sorted(reached(path).items()):
        digest.update(f"{name}\0{source}\0".encode())
    return digest.hexdigest()


def reached(path: Path) -> dict[str, str]:
    """Return the source of all that a notebook or script reaches, by name: itself, and definitions of our modules.

    Sources are written anew from their syntax trees, without docstrings.
    """
    start = _module(path.name, path)
    found = {path.name: ast.unparse(start.tree)}
    modules: dict[str, Module] = {path.name: start}
    todo = list(start.used(start.tree))
    while todo:
        name, wanted = todo.pop()
        key = f"{name}.{wanted}" if wanted else name
        if name in (path.name, *AFTER_MEASURING) or key in found:
            continue
        if name not in modules:
            modules[name] = _module(name, _file(name))
            todo += [(name, LOOSE)]
        nodes = modules[name].parts(wanted)
        if not nodes and wanted in modules[name].imports:  # only handed on from a third module
            todo.append(modules[name].imports[wanted])
        found[key] = "\n".join(map(ast.unparse, nodes))
        todo += [use for node in nodes for use in modules[name].used(node)]
    return found


@dataclass
class Module:
    """A module by its parts: definitions by name, and what the names that it imports from us stand for."""

    name: str
    tree: ast.Module

    @cached_property
    def definitions(self) -> dict[str, list[ast.stmt]]:
        found: dict[str, list[ast.stmt]] = {}
        for node in self.tree.body:
            for name in _names(node):
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def imports(self) -> dict[str, tuple[str, str | None]]:
        """(module, name in it, or None for the module itself) for every name that is imported anywhere."""
        found = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    target = (whole, None) if _file(whole) else (node.module, alias.name)
                    found |= {alias.asname or alias.name: target} if _file(target[0]) else {}
        return found

    def parts(self, wanted: str | None) -> list[ast.stmt]:
        """Return the statements that define a name; all statements for None; for `LOOSE` those that define nothing."""
        if wanted is None:
            return self.tree.body
        if wanted == LOOSE:
            imports = (ast.Import, ast.ImportFrom)
            return [node for node in self.tree.body if not _names(node) and not isinstance(node, imports)]
        return self.definitions.get(wanted, [])

    def used(self, node: ast.AST) -> Iterator[tuple[str, str | None]]:
        """Yield (module, name) for all that a piece of this module uses, of its own and of other modules of ours."""
        qualified = set()
        for part in ast.walk(node):
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                module, inside = self.imports.get(part.value.id, (None, None))
                if module and inside is None:
                    qualified.add(part.value)
                    yield module, part.attr
        for part in _globals(node):
            if part.id in self.definitions:
                yield self.name, part.id
            elif part.id in self.imports and part not in qualified:
                yield self.imports[part.id]


def _globals(node: ast.AST, local: frozenset[str] = frozenset()) -> Iterator[ast.Name]:
    """Yield the names in a piece of code that no function around them binds."""
    if isinstance(node, ast.Name) and node.id not in local:
        yield node
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        bound = [part.arg for part in ast.walk(node.args) if isinstance(part, ast.arg)]
        inner = [part for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
        local = local.union(bound, (part.id for part in inner))
    for child in ast.iter_child_nodes(node):
        yield from _globals(child, local)


def _names(node: ast.stmt) -> list[str]:
    """Return the names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
    return []


def _without_docstrings(node: ast.stmt) -> ast.stmt:
    for part in ast.walk(node):
        if isinstance(part, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(part) is not None:
            part.body = part.body[1:] or [ast.Pass()]
    return node


def _module(name: str, path: Path) -> Module:
    return _parsed(name, path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _parsed(name: str, path: Path, changed: int) -> Module:
    """Parse a module, or the code cells of a notebook but the parameters; once, until the file is ``changed``."""
    if path.suffix != ".ipynb":
        tree = ast.parse(path.read_text())
    else:
        import nbformat

        cells = nbformat.read(path, as_version=4).cells
        code = [c.source for c in cells if c.cell_type == "code" and "parameters" not in c.metadata.get("tags", ())]
        lines = "\n".join(code).splitlines()
        tree = ast.parse("\n".join(line for line in lines if not line.startswith(("%", "!"))))
    return Module(name, _without_docstrings(tree))


def _file(module: str) -> Path | None:
    path = ROOT / f"{module.replace('.', '/')}.py"
    return path if module.split(".")[0] in PACKAGES and path.is_file() else None
