"""The command `icl` as `python -m icl`, and as the script that `icl` starts for itself.

Python puts a folder in front of the path for either: the working folder, or the one that this file lies in. A `random.py`
there would be imported in place of Python's, so that folder is taken away before anything is imported.
"""

import os
import sys


def _working_folder() -> str:
    """Return the working folder as Python puts it on the path, or nothing if it has been deleted; `icl.cli` then says so."""
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:
        return ""


if __name__ == "__main__":
    _own = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 (`pathlib` is not imported yet)
    if sys.path[:1] in ([""], [_own], [_working_folder()]):
        del sys.path[0]
    if not __package__:  # as a script, which need not be installed where the program that started it was found
        sys.path.append(os.path.dirname(_own))  # noqa: PTH120

    from icl.cli import main

    sys.exit(main())
