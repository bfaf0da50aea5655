"""What `icl` makes of damaged files, bad inputs and servers that refuse: programs that count, and tests that try a sample of each."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # the tests' helpers, which pytest finds by its `pythonpath`
