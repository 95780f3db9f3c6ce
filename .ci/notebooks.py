"""Execute notebooks, each in an empty folder of its own, as a reader on another machine would.

Cells tagged `skip-execution` (the ones that install) are left out. Usage: python notebooks.py FOLDER
"""

import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

SECONDS_PER_CELL = 900


def execute(path: Path) -> None:
    """Run every cell of one notebook; raises at the first cell that fails."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=SECONDS_PER_CELL,
            kernel_name="python3",
            skip_cells_with_tag="skip-execution",
            resources={"metadata": {"path": folder}},
        ).execute()


def main(folder: Path) -> int:
    """Execute all notebooks of a folder and return the number that failed (or 1 if there is none)."""
    notebooks = sorted(folder.glob("*.ipynb"))
    if not notebooks:
        print(f"no notebook in {folder}/", file=sys.stderr)
        return 1
    failed = 0
    for path in notebooks:
        began = time.monotonic()
        try:
            execute(path)
        except CellExecutionError as error:
            failed += 1
            print(f"{path}: FAILED\n{error}", file=sys.stderr)
        else:
            print(f"{path}: executed in {time.monotonic() - began:.0f} s")
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
