"""The receipt in words, sample answers side by side, and the recipe to copy."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmgraft.data.images import open_picture
from vlmgraft.report.charts import Heat
from vlmgraft.report.collect import Document, Run
from vlmgraft.report.gate_folder import layer_and_projection
from vlmgraft.report.sections import Figure, Filter, Section, Table
from vlmgraft.report.text import escape, number

MAX_ANSWERS = 24
MAX_SIDE = 384
IMAGE_BYTES = 1_200_000


def receipt(document: Document) -> Section:
    """What a merge did, tensor by tensor."""
    receipt = document.content
    tensors = receipt["tensors"]
    counts = Counter(tensor["verdict"] for tensor in tensors)
    merged = [tensor for tensor in tensors if tensor["verdict"] == "merged"]
    versions = ", ".join(f"{name} {version}" for name, version in receipt["versions"].items())
    text = [
        f"Method {receipt['method']}: {counts['merged']} of {len(tensors)} tensors merged, "
        f"{counts['excluded']} left out by the recipe, {counts['kept']} kept as they were (vision tower, projector and "
        f"what the donor does not have). It took {number(receipt['seconds'], 2)} s and "
        f"{receipt['peak_memory'] / 1e9:.1f} GB at most. {versions}.",
        *receipt.get("notes", []),
    ]
    shares = {
        (at[1], at[0]): tensor["added"] / tensor["task_vector"]
        for tensor in merged
        if tensor.get("task_vector") and (at := layer_and_projection(tensor["name"]))
    }
    figures = []
    if shares:
        heat = Heat.by_layer(shares, reach=max(1.0, *shares.values()), one_sided=True)
        caption = "Length of what was added, as a share of ‖τ‖"
        figures.append(Figure(caption, heat, "1 would be the whole task vector"))
    rows = [
        (tensor["name"], tensor["verdict"], tensor.get("added"), tensor.get("task_vector"), tensor["reason"])
        for tensor in tensors
    ]
    table = Table("receipt", ("tensor", "verdict", "norm added", "norm of τ", "reason"), rows)
    added, whole = (math.hypot(*(tensor[key] or 0.0 for tensor in merged)) for key in ("added", "task_vector"))
    title = f"The merge changed {counts['merged']} of {len(tensors)} tensors" + (
        f" and took {100 * added / whole:.0f} % of the task vector's length" if whole else ""
    )
    return Section("receipt", "receipt", title, text, figures, [table])


def answers(run: Run) -> Section:
    """The same questions answered by several models, with images and verdicts."""
    rows = run.rows[:MAX_ANSWERS]
    right: Counter[str] = Counter()
    for row in rows:
        right.update({answer["model"]: int(answer["right"]) for answer in row["answers"]})
    budget = IMAGE_BYTES
    cards = []
    for row in rows:
        image = _image(run.folder / row["image"]) if row.get("image") else ""
        budget -= len(image)
        cards.append(_card(row, image if budget > 0 else ""))
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    title = f"{len(rows)} questions answered side by side: " + ", ".join(
        f"{model} {count} right" for model, count in right.items()
    )
    note = " Some images were left out to keep the page small." if budget <= 0 else ""
    text = ["The first questions of every task, not picked." + note]
    table = Table(
        "answers",
        ("task", "question", "expected", *right),
        [(row["task"], row["question"], row["expected"], *(_answer_of(row, model) for model in right)) for row in rows],
        [{"kind": row["kind"]} for row in rows],
    )
    filters = [Filter("kind", "show", {kind: kind for kind in kinds})] if len(kinds) > 1 else []
    extra = f'<div class="answers">{"".join(cards)}</div>'
    return Section("answers", "answers", title, text, (), [table], filters, extra)


def _answer_of(row: Mapping[str, Any], model: str) -> str:
    return next((answer["said"] for answer in row["answers"] if answer["model"] == model), "")


def _card(row: Mapping[str, Any], image: str) -> str:
    picture = f'<img alt="image of the question" src="{image}">' if image else ""
    lines = "".join(
        f"<dt>{escape(answer['model'])}</dt>"
        f'<dd class="{"right" if answer["right"] else "wrong"}">{escape(answer["said"])}</dd>'
        for answer in row["answers"]
    )
    return (
        f'<div class="answer" data-kind="{escape(row["kind"])}"><b>{escape(row["question"])}</b>{picture}'
        f"<dl><dt>expected</dt><dd>{escape(row['expected'])}</dd>{lines}</dl></div>"
    )


def _image(path: Path) -> str:
    """The image as a data URL, at most 384 pixels a side; empty if the file is missing. Raises DataError."""
    if not path.is_file():
        return ""
    image = open_picture(path, str(path))
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    made = io.BytesIO()
    small = image.width * image.height <= 128 * 128
    image.save(made, "PNG" if small else "JPEG", **({} if small else {"quality": 80}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(made.getvalue()).decode()}"


def recipes(documents: Sequence[Document]) -> list[Section]:
    """Recipes to copy, in one section."""
    if not documents:
        return []
    blocks = []
    for index, document in enumerate(documents):
        button = f"<button type='button' data-copy='recipe-{index}'>copy</button>"
        head = f"<h3>{escape(document.folder.name)}/recipe.yaml</h3><p>{button}</p>"
        blocks.append(f"{head}<pre id='recipe-{index}' tabindex='0'>{escape(document.content.strip())}</pre>")
    title = "This recipe replays the merge" if len(blocks) == 1 else "These recipes replay the merges"
    command = "<p><code>vlmgraft merge recipe.yaml --out merged</code></p>"
    return [Section("recipe", "recipe", title, extra=command + "".join(blocks))]
