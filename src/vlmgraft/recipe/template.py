"""The commented recipe that `vlmgraft init` writes."""

from __future__ import annotations

import yaml

_MODELS = """\
# What is merged into what: local folders, or hub ids such as organisation/name@revision.
vlm: {vlm}
donor: {donor}
# The model that the donor was tuned from; its difference from the donor is what is injected.
{base}
"""
_ARITHMETIC = """\
# Adds the whole difference, times scale. `vlmgraft sweep` measures a row of scales.
method:
  name: task_arithmetic
  scale: 0.2
# With questions that show images (a line each: {"image": "a.jpg", "question": "…"}, no answers), FRISM learns how much
# of every singular direction the VLM's own answers allow. On a GPU; `--dry-run` says what it takes:
# method:
#   name: frism
#   scale: 1.0
#   kl_budget: 0.01          # how far the answers may move, in nats per token
#   calibration: {data: questions.jsonl, samples: 512, held_out: 128}
"""
_FRISM = """\
# Learns how much of every singular direction of the difference the VLM's own answers allow.
method:
  name: frism
  scale: 1.0
  kl_budget: 0.01            # how far the answers may move, in nats per token
  calibration:
    data: {data}             # a line each: {{"image": "a.jpg", "question": "…"}}; answers are not read
    samples: {samples:<15} # learned from
    held_out: {held_out:<14} # others, on which the budget is measured
    batch_size: 8            # lower it where memory runs out
"""
_REST = """\
# Groups of tensors (attention, mlp, norm, bias, embeddings, head) or patterns on their names.
modules: [attention, mlp]
layers: all                  # or a range such as 8-27
# All keys, their defaults and the other methods: `vlmgraft merge --schema`.
"""


def shares(questions: int) -> tuple[int, int]:
    """Split a number of questions into calibration set and held-out ones: 512 and 128; of fewer than 640, a third (at
    most 128) is held out."""
    held_out = min(128, questions // 3)
    return min(512, questions - held_out), held_out


def recipe_template(
    vlm: str | None, donor: str | None, donor_base: str | None, data: str | None = None, questions: int = 640
) -> str:
    """A recipe as YAML with comments: task arithmetic, or FRISM if `data` names a file with this number of `questions`.

    A model that is not given becomes a hub id to be replaced, a base that is not known a comment.
    """
    models = {"vlm": _scalar(vlm or "organisation/vlm"), "donor": _scalar(donor or "organisation/donor")}
    models["base"] = f"donor_base: {_scalar(donor_base)}" if donor_base else "# donor_base: organisation/name"
    samples, held_out = shares(questions)
    frism = _FRISM.format(data=_scalar(data or ""), samples=samples, held_out=held_out)
    return _MODELS.format(**models) + (frism if data else _ARITHMETIC) + _REST


def _scalar(text: str) -> str:
    """A text as YAML writes it, quoted where it must be."""
    return yaml.safe_dump(text, allow_unicode=True, width=10_000).removesuffix("\n").removesuffix("\n...")
