"""Write the table of contents that the book is built by: that of _toc.yml, without findings that have no tables.

    python -m workflow.contents _build/_toc.yml
"""

import sys
from pathlib import Path

import yaml

from book.ledger import contents
from nb_utils import files


def main() -> None:
    """Write the file, and say what was left out."""
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write(target, yaml.safe_dump(contents.listed(), sort_keys=False).encode())
    if waiting := contents.left_out():
        numbers = ",".join(dict.fromkeys(str(int(name[:2])) for name in waiting))
        print(f"Left out, as their tables are not made yet: {', '.join(waiting)} (make report EXPERIMENTS={numbers}).")


if __name__ == "__main__":
    main()
