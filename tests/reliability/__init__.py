"""Programs that try damaged files, bad inputs and failing servers on `icl` and count the outcomes, and tests of a sample of each."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # the tests' helpers, which pytest finds by its `pythonpath`
