"""`attention`: how much each layer of a VLM looks at the image, as FRANK's recipe wants it."""

from __future__ import annotations

from pathlib import Path

from vlmgraft.analysis.attention import visual_attention
from vlmgraft.hf.data import Progress, load_questions
from vlmgraft.lab.asked import LabExam
from vlmgraft.studies.questions import LAB, open_vlm


def attention(
    model: str | Path,
    data: str | Path = LAB,
    *,
    samples: int = 64,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> tuple[float, ...]:
    """The share of attention that text gives to visual tokens, one number per decoder layer; see `analysis.attention`.

    Args:
        data: a question file with images, answers are not read; or `lab`. samples: the first so many.
    Raises:
        DataError, CheckpointError, AlignmentError: as loading and measuring say.
    """
    questions = None if str(data) == LAB else load_questions(data, need_images=True, limit=samples)
    loaded, processor = open_vlm(model)
    asked = LabExam(processor, sums=1, each=1).prompts(samples) if questions is None else questions
    return visual_attention(loaded, processor, asked, batch_size=batch_size, progress=progress)
