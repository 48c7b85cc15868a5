"""Exception tree. Every message names the file, the tensor or key, the offending value, and the remedy.

The command line maps the tree to exit codes: `InputError` → 2 (nothing was started), any other `VlmgraftError` → 1.
"""


class VlmgraftError(Exception):
    """Base of every error that vlmgraft raises on purpose."""

    exit_code = 1


class InputError(VlmgraftError):
    """The recipe or an input is wrong; nothing was started and nothing was written."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe has an unknown key, a value out of range, or asks for something its method cannot do."""


class CheckpointError(InputError):
    """A checkpoint folder is missing, truncated, inconsistent or in a format that is not read."""


class AlignmentError(InputError):
    """The checkpoints do not pair: another family, another shape, or a task vector that is zero."""


class DataError(InputError):
    """A question file or an image cannot be used."""


class OutputError(InputError):
    """The output folder exists, equals an input, or cannot be written."""


class NumericalError(VlmgraftError):
    """A computation met values it cannot carry: NaN, infinity, overflow on the cast, no convergence."""


class WeightsError(NumericalError, CheckpointError):
    """An input tensor holds NaN or infinity; the message names tensor and file."""

    exit_code = 2
