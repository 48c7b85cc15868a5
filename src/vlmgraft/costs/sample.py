"""Length of a VLM's answers: measured on a few questions, if the model is local and this takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmgraft.costs.cost import answering
from vlmgraft.costs.device import Device
from vlmgraft.costs.models import Model
from vlmgraft.data.questions import Question
from vlmgraft.errors import InputError, VlmgraftError
from vlmgraft.merging.plan import ASSUMED_RATE
from vlmgraft.storage.resources import out_of_memory

SAMPLED, WORTH = 8, 10.0
"""How many questions are sampled, and the most seconds that this may take by the cost model."""


def longest_answer(
    model: Model, folder: Path, questions: Sequence[Question], prompt: int, limit: int, device: Device, place: Any
) -> int | None:
    """Tokens of the longest answer to a few questions, at most `limit`; None if the folder has no weights, answering
    would take too long, or memory runs out. place: the torch device and dtype. Raises CheckpointError if the model
    cannot be loaded, DataError if it cannot read a question."""
    chosen = questions[:: max(1, -(-len(questions) // SAMPLED))]
    seconds = answering(model, device, len(chosen), prompt, limit, SAMPLED)[1] + 2 * model.parameters / ASSUMED_RATE
    if seconds > WORTH or not chosen or not any(folder.glob("*.safetensors")):
        return None
    from vlmgraft.hf.batches import batches, generate_batch
    from vlmgraft.hf.models import load_processor, load_vlm

    try:
        with out_of_memory("asking a few questions", "free some"):
            loaded, processor = load_vlm(folder, place[1], place[0]), load_processor(folder)
            answers = [generate_batch(loaded, processor, [chosen[i] for i in batch], limit)[0]
                       for batch in batches(chosen, SAMPLED)]  # fmt: skip
    except InputError:
        raise
    except VlmgraftError:  # out of memory: others use the device now, and the merge may find room later
        return None
    return max(len(answer) for batch in answers for answer in batch)
