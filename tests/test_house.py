"""The house: from a module's place follows what it may import, and its core is small enough to know."""

import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

import nb_utils
from workflow import map as house

ORDER = list(house.ROOMS)
# A model is tested, when it is loaded, by the engine that runs it: the one import that waits for a call and points up.
AT_LOAD = ("nb_utils.models", "nb_utils.engine")


@pytest.fixture(scope="module")
def found():
    return house.imports()


def test_no_room_imports_from_one_above_it(found):
    wrong = [(module, other) for module, others in found.items() for other in others
             if ORDER.index(house.room(other)) < ORDER.index(house.room(module))]  # fmt: skip
    assert not wrong


def test_no_module_imports_itself_through_others(found):
    graph = {module: {other for other in others if (module, other) != AT_LOAD} for module, others in found.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_core_is_small_enough_to_know(found):
    core = [module for module in found if house.room(module) == "nb_utils"]
    assert 10 < len(core) <= 16


def test_what_points_up_is_found_wherever_it_stands(tmp_path):
    (tmp_path / "nb_utils/show").mkdir(parents=True)
    (tmp_path / "nb_utils/show/plots.py").write_text("import pandas\nfrom nb_utils import text\n")
    (tmp_path / "nb_utils/text.py").write_text("def f():\n    from nb_utils.show.plots import table\n")
    assert house.imports(tmp_path) == {
        "nb_utils.show.plots": {"nb_utils.text": False}, "nb_utils.text": {"nb_utils.show.plots": True},
    }  # fmt: skip


def test_the_picture_has_every_module_and_is_the_one_of_today(found):
    drawn = house.drawn(found)
    assert all(f">{module.rpartition('.')[2]}</text>" in drawn for module in found)
    assert (house.ROOT / "book/_assets/house.svg").read_text() == drawn, "run make map"


def test_the_names_of_the_package_are_imported_when_they_are_asked_for():
    for name in nb_utils.__all__:
        assert callable(getattr(nb_utils, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        nb_utils.nothing  # noqa: B018
    script = "import sys, nb_utils; nb_utils.load_task; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
