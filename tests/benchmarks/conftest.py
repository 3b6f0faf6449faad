"""The benchmarks' own modules lie beside the scripts, in no package."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
