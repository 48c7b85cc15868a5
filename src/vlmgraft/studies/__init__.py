"""The functions behind `inspect --distances`, `knockout`, `ranks`, `sweep` and `front`: recipes in, folders of rows
out; and `drift`, which has no command."""

from vlmgraft.studies.bands import ranks
from vlmgraft.studies.drifting import drift
from vlmgraft.studies.fronts import front
from vlmgraft.studies.grids import sweep
from vlmgraft.studies.inspection import Inspection, inspect_weights
from vlmgraft.studies.layers import knockout
from vlmgraft.studies.looking import attention
from vlmgraft.studies.questions import Asked

__all__ = ["Asked", "Inspection", "attention", "drift", "front", "inspect_weights", "knockout", "ranks", "sweep"]
