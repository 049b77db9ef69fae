"""Puts the data among the modules of a built package; all else is said in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

DATA = sorted(Path("data").glob("*/*.json"))


class WithData(build_py):
    """Copies ``data/<kind>/*.json`` to ``nb_utils/data``, where `nb_utils.files` looks outside a clone."""

    def run(self) -> None:
        super().run()
        for path in () if self.editable_mode else DATA:
            target = Path(self.build_lib, "nb_utils", path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *map(str, DATA)]  # an sdist has them, too


setup(cmdclass={"build_py": WithData})
