"""Entry point of `python -m icl`, and of the processes that `icl` starts itself.

Python puts a folder first on the import path: the working folder with `-m`, and the folder of this file if it runs as a script. A file
`random.py` in that folder would be imported instead of Python's module. So we remove the folder from the path before we import
anything else.
"""

import os
import sys


def _working_folder() -> str:
    """Return the working folder as it appears in `sys.path`, or an empty string if the folder was deleted (`icl.cli` reports this later)."""
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:
        return ""


if __name__ == "__main__":
    _script_folder = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 (`pathlib` is not imported yet)
    if sys.path[:1] in ([""], [_script_folder], [_working_folder()]):
        del sys.path[0]
    if not __package__:  # run as a script, so this Python may not know where `icl` is
        sys.path.append(os.path.dirname(_script_folder))  # noqa: PTH120

    from icl.cli import main

    sys.exit(main())
