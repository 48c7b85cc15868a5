"""The functions behind `inspect --distances`, `knockout`, `ranks` and `sweep`: recipes in, folders of rows out."""

from vlmgraft.studies.inspection import Inspection, inspect_weights
from vlmgraft.studies.knockout import knockout
from vlmgraft.studies.questions import Asked
from vlmgraft.studies.ranks import ranks
from vlmgraft.studies.sweep import sweep

__all__ = ["Asked", "Inspection", "inspect_weights", "knockout", "ranks", "sweep"]
