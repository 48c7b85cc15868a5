"""Coverage-guided fuzzing of one target by atheris: `python tests/fuzz/run.py header -max_total_time=600 CORPUS`.

The options behind the target are libFuzzer's; the kept corpus is always read, new cases go to the first folder given.
A finding is written as crash-*, timeout-* or oom-* (see -artifact_prefix); keep it in corpus/TARGET once it is fixed.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import atheris

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
warnings.simplefilter("ignore")

PARSERS = (
    "vlmgraft.alignment",
    "vlmgraft.checkpoint",
    "vlmgraft.data",
    "vlmgraft.hf.limits",
    "vlmgraft.recipe",
    "vlmgraft.evaluation",
    "vlmgraft.spectral",
    "vlmgraft.storage",
    "yaml",
    "json",
    "PIL",
)


def main() -> None:
    """Instrument what is imported from here on, then fuzz."""
    name, *options = sys.argv[1:]
    with atheris.instrument_imports(include=list(PARSERS)):
        from targets import TARGETS
    kept = HERE / "corpus" / name
    new = [] if any(not option.startswith("-") for option in options) else [tempfile.mkdtemp()]
    arguments = [sys.argv[0], f"-dict={HERE / 'words.dict'}", *options, *new, str(kept)]
    atheris.Setup(arguments, TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
