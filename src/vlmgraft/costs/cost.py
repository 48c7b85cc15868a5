"""The cost model: operations, bytes and memory of every stage. Formulas are explained in docs/scale.md.

Notation: P parameters, M elements of the merged matrices, A those that one token uses (M in a dense model), L layers,
m × n a matrix with its longer side first, r directions kept, T tokens of a batch, h hidden width, q width of the
queries, V vocabulary. A multiplication and an addition are two operations. Times follow from a device's published peak
rates and from assumed shares of them (`Device`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmgraft.costs.device import H100, Device
from vlmgraft.costs.models import Model, kept
from vlmgraft.distillation.memory import Memory, Rank, Shapes, memory_of
from vlmgraft.distillation.projections import Backend, choose_backend
from vlmgraft.distillation.targets import DONOR_BATCH, TOP_K
from vlmgraft.distillation.trainer import WATCHED, Training
from vlmgraft.merging.plan import ASSUMED_RATE
from vlmgraft.spectral.svd import matrix_cost

LANDING = 3
"""Measurements of all held-out prompts after the last step (two or three in seven training runs of the lab)."""


@dataclass(frozen=True)
class Work:
    """The work of a merge with gates. Defaults: FRISM as in docs/gpus.md.

    questions: to train on; held_out: to measure the KL on; each has `prompt` tokens, images included, and `answer`
    answer tokens, and `answered` of them are answered at once. steps: training steps, each of `batch` questions on
    every GPU. budget: whether there is a KL budget, observed every `observe_every` steps. With donor matching, each
    step also has `DONOR_BATCH` of the `matched` text questions, of `text_prompt` tokens with `text_answer` answer
    tokens. An evaluation has `eval_questions`, with `eval_answer` answer tokens each. served, donor_served: a server
    answers; its time is not counted.
    """

    rank: Rank = "full"
    gpus: int = 1
    questions: int = 512
    held_out: int = 128
    prompt: int = 1000
    answer: int = 64
    batch: int = 8
    answered: int = 32
    steps: int = 200
    checkpointing: bool = True
    offload: bool = False
    budget: bool = False
    observe_every: int = Training().observe_every
    matched: int = 0
    text_prompt: int = 100
    text_answer: int = 64
    served: bool = False
    donor_served: bool = False
    eval_questions: int = 1000
    eval_answer: int = 256


@dataclass(frozen=True)
class Stage:
    """One stage. operations: of all GPUs; read, written: bytes of disk; memory: bytes on one GPU (for `merge` and
    `fold`: on the host); seconds: predicted (for `merge` and `fold`: of the disk at 1 GB/s)."""

    name: str
    operations: float
    read: float
    written: float
    memory: float
    seconds: float


def forward(model: Model, tokens: int, length: int, heads: int = 0) -> float:
    """Operations of a pass of `tokens` tokens in sequences of `length` through the decoder, and the head on `heads` of
    them: 2AT, attention 4·T·length·q·L (a kernel that skips masked positions does half), 2hV per row of the head."""
    shapes = model.shapes
    attention = 4 * tokens * length * shapes.width("q_proj") * shapes.layers
    return 2.0 * model.active * tokens + attention + 2.0 * shapes.hidden * shapes.vocabulary * heads


def gated_forward(shapes: Shapes, tokens: int, length: int, *, rank: Rank = "full", backend: Backend = "auto") -> float:
    """Operations of a pass of `tokens` tokens in sequences of `length` through the gated decoder: per matrix
    2T(mn + r(m + n)) factored or 2mn(T + r) rebuilt; for experts 2Tmn for each that a token uses and 2mnr for all;
    attention as in `forward`."""
    layer = 4.0 * tokens * length * shapes.width("q_proj")
    for _, out, inner in shapes.projections:
        r = kept(out, inner, rank)
        if choose_backend(tokens, (out, inner), r, backend) == "factored":
            layer += 2.0 * tokens * (out * inner + r * (out + inner))
        else:
            layer += 2.0 * out * inner * (tokens + r)
    for count, out, inner in shapes.experts:
        layer += 2.0 * out * inner * (tokens * shapes.active + count * kept(out, inner, rank))
    return shapes.layers * layer


def gate_step(
    shapes: Shapes,
    tokens: int,
    length: int,
    answers: int,
    *,
    rank: Rank = "full",
    checkpointing: bool = False,
    backend: Backend = "auto",
) -> float:
    """Operations of one training step on `tokens` tokens in sequences of `length`, of which `answers` count.

    The forward pass is `gated_forward`, twice with checkpointing. The backward pass takes the same, except for rebuilt
    matrices and experts, which take 4Tmn + 2mnr, and attention, which takes 2.5 times as much. The head takes 2hV per
    answer token, forward and backward each.
    """
    forwards = gated_forward(shapes, tokens, length, rank=rank, backend=backend)
    backward = forwards + 1.5 * 4.0 * tokens * length * shapes.width("q_proj") * shapes.layers
    for _, out, inner in shapes.projections:
        if choose_backend(tokens, (out, inner), kept(out, inner, rank), backend) == "rebuilt":
            backward += shapes.layers * 2.0 * tokens * out * inner
    backward += sum(shapes.layers * 2.0 * tokens * shapes.active * out * inner for _, out, inner in shapes.experts)
    return (2 if checkpointing else 1) * forwards + backward + 4.0 * shapes.hidden * shapes.vocabulary * answers


def budget_batches(held_out: int, batch: int, steps: int, every: int) -> int:
    """Forward passes on held-out batches for a KL budget: all batches at first, a part of them `every` so many steps,
    and all of them for each of the `LANDING` measurements at the end."""
    whole, part = -(-held_out // batch), -(-min(held_out, WATCHED) // batch)
    return whole * (1 + LANDING) + part * max(0, -(-steps // every) - 1)


def answering(
    model: Model, device: Device, questions: int, prompt: int, answer: int, batch: int
) -> tuple[float, float]:
    """(operations, seconds on one device) of greedy answers: prompts are processed at the bf16 rate. Answers are
    decoded a token at a time; every step reads all weights once per batch (all experts: a batch uses most of them)."""
    tokens = questions * prompt
    tower = 2.0 * model.tower * 4 * tokens  # four patches per token; nearly all tokens are of the image
    reading = forward(model, tokens, prompt, questions) + tower
    writing = forward(model, questions * answer, prompt + answer, questions * answer)
    steps = -(-questions // batch) * answer
    seconds = reading / (device.bf16 * device.products)
    seconds += steps * 2.0 * model.parameters / (device.bandwidth * device.stream)
    return reading + writing, seconds


def decomposition_memory(out: int, inner: int) -> float:
    """Bytes while one matrix is decomposed in full: τ, its copy in double precision, B and U (4, 8, 4, 4 per element);
    the Gram matrix, eigenvectors and the solver's workspace (8 each, the workspace two), V twice (4 each)."""
    long, short = max(out, inner), min(out, inner)
    return 20.0 * long * short + (8 * 4 + 8) * short * short


def training_memory(model: Model, work: Work, width: int = 2) -> Memory:
    """Bytes of one GPU while gates are learned, `width` bytes per weight."""
    return memory_of(
        model.shapes,
        rank=work.rank,
        tokens=work.batch * (work.prompt + work.answer),
        answer_tokens=work.batch * work.answer,
        gpus=work.gpus,
        checkpointing=work.checkpointing,
        offload=work.offload,
        width=width,
    )


def _answering_memory(model: Model, work: Work) -> float:
    """Bytes on one GPU while the teacher answers: weights (on several GPUs its shards and two gathered layers; with
    offloading the layer being copied); the KV cache of all tokens; and one layer's activations: its input twice, gate,
    up and their product."""
    shapes, tokens = model.shapes, work.answered * (work.prompt + work.answer)
    held = memory_of(shapes, rank=0, gpus=work.gpus, offload=work.offload)
    layer = 2.0 * tokens * (2 * shapes.hidden + 3 * shapes.width("gate_proj"))
    return held.weights + held.gathered + 4.0 * shapes.layers * model.keys * tokens + layer


def _matching(model: Model, work: Work, device: Device) -> tuple[float, float, float]:
    """What donor matching adds: operations of its batches in all steps; operations and seconds of its answers."""
    if not work.matched:
        return 0.0, 0.0, 0.0
    count, length = min(DONOR_BATCH, work.matched), work.text_prompt + work.text_answer
    options: dict[str, Any] = {"rank": work.rank, "checkpointing": work.checkpointing}
    step = gate_step(model.shapes, count * length, length, count * work.text_answer, **options)
    donor_answers = answering(model, device, work.matched, work.text_prompt, work.text_answer, work.answered)
    return work.gpus * work.steps * step, *((0.0, 0.0) if work.donor_served else donor_answers)


def _copying(model: Model, work: Work, device: Device) -> tuple[float, float]:
    """Seconds spent on copying offloaded layers to each GPU, without overlap with its work: for answers, once per
    decoded token of a batch, for its prompts and for its targets; and for training, forward and backward."""
    if not work.offload:
        return 0.0, 0.0
    prompts, answered = work.questions + work.held_out, work.answered
    answers = -(-prompts // answered) * (1 + work.answer) + -(-prompts // work.batch)
    answers += -(-work.matched // answered) * (1 + work.text_answer)
    steps = work.gpus * work.steps * 2 * (2 if work.matched else 1)
    observed = work.held_out, work.batch, work.steps, work.observe_every
    steps += budget_batches(*observed) if work.budget else 0
    layers = device.width * model.shapes.layers * model.shapes.layer_parameters
    whole = layers + device.width * model.factors(work.rank)
    rate = device.link * device.copies * work.gpus * work.gpus  # passes and shards are divided among the GPUs
    return answers * layers / rate, steps * whole / rate


def stages(model: Model, work: Work, device: Device = H100, *, rate: float = ASSUMED_RATE) -> list[Stage]:
    """The stages of a FRISM merge, and of task arithmetic (`merge`) and an evaluation beside them.

    rate: bytes per second of the disk.
    """
    weights, merged = 2.0 * model.parameters, 2.0 * model.merged
    factors, gates = model.factors(work.rank), model.directions(work.rank)
    stored = (4 + 2) * factors + 4.0 * gates
    whole = max(out * inner for _, out, inner in model.matrices)  # two threads hold four such matrices each in the fold
    decomposing = max(decomposition_memory(out, inner) for _, out, inner in model.matrices)
    operations = sum(count * matrix_cost((out, inner), work.rank) for count, out, inner in model.matrices)
    prompts = work.questions + work.held_out
    own = answering(model, device, prompts, work.prompt, work.answer, work.answered)
    answered, answer_seconds = (0.0, 0.0) if work.served else own
    again = forward(model, prompts * (work.prompt + work.answer), work.prompt + work.answer, prompts * work.answer)
    features = prompts * work.prompt * model.shapes.hidden * device.width  # an upper bound: prompts also have text
    cached = features + prompts * work.answer * (4 * (TOP_K + 1) + 4 * TOP_K)
    length = work.prompt + work.answer
    tokens, answers = work.batch * length, work.batch * work.answer
    step = gate_step(model.shapes, tokens, length, answers, rank=work.rank, checkpointing=work.checkpointing)
    learning = work.gpus * work.steps * step
    if work.budget:
        passes = gated_forward(model.shapes, tokens, length, rank=work.rank)
        passes += 2.0 * model.shapes.hidden * model.shapes.vocabulary * answers
        learning += passes * budget_batches(work.held_out, work.batch, work.steps, work.observe_every)
    matching, donor, donor_seconds = _matching(model, work, device)
    learning, answered, answer_seconds = learning + matching, answered + donor, answer_seconds + donor_seconds
    copying = _copying(model, work, device)
    kv = 4.0 * model.shapes.layers * model.keys
    evaluated, evaluation_seconds = answering(model, device, work.eval_questions, work.prompt, work.eval_answer, 32)
    cache = kv * 32 * (work.prompt + work.eval_answer)
    products = device.bf16 * device.products
    folding = sum(2.0 * count * out * inner * kept(out, inner, work.rank) for count, out, inner in model.matrices)
    return [
        Stage("merge", 3.0 * model.merged, weights + 2 * merged, weights, 40e6, (2 * weights + 2 * merged) / rate),
        Stage(
            "decompose", operations, 2 * merged, stored, decomposing,
            operations / (device.double * device.eigen) / work.gpus + (2 * merged + stored) / rate,
        ),
        Stage(
            "teacher", answered + again, weights + merged, cached, _answering_memory(model, work),
            (answer_seconds + again / products) / work.gpus + (weights + merged + features) / rate + copying[0],
        ),
        Stage(
            "gates", learning, 2 * factors, 4.0 * gates, training_memory(model, work).total,
            learning / work.gpus / products + copying[1],
        ),
        Stage("fold", folding, weights + 4 * factors, weights, 64.0 * whole, (2 * weights + 4 * factors) / rate),
        Stage("evaluate", evaluated, weights, 0.0, weights + cache, evaluation_seconds / work.gpus),
    ]  # fmt: skip
