"""The cost model: operations, bytes and memory of every stage. Formulas are explained in docs/scale.md.

Notation: P parameters, M elements of the merged matrices, A those that a token meets (M but for experts), L layers,
m × n a matrix with its longer side first, r directions kept, T tokens of a batch, h hidden width, q width of the
queries, V vocabulary. A multiplication and an addition are two operations. Work on a device follows from its published
peak rates and the shares of them that are assumed here.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlmgraft.merging.plan import ASSUMED_RATE
from vlmgraft.scale.models import Model, kept
from vlmgraft.spectral.decompose import matrix_cost
from vlmgraft.training.distribution import TOP_K
from vlmgraft.training.memory import Rank, Shapes, memory_of
from vlmgraft.training.projections import Backend, choose_backend


@dataclass(frozen=True)
class Device:
    """Published peaks: bf16 and double precision (tensor cores, dense) in operations per second; memory, its bytes and
    bytes per second. Assumed: the shares of them that training and reading (`products`), writing answers a token at a
    time (`stream`), and decompositions (`eigen`: eigenvectors are no matrix products) get."""

    name: str
    bf16: float
    double: float
    bandwidth: float
    memory: float
    products: float = 0.4
    stream: float = 0.6
    eigen: float = 0.03


A100 = Device("A100 80 GB", 312e12, 19.5e12, 2.039e12, 80e9)
H100 = Device("H100 SXM 80 GB", 989e12, 67e12, 3.35e12, 80e9)


@dataclass(frozen=True)
class Work:
    """What is done. Defaults: FRISM as docs/gpus.md has it.

    questions are learned from, `held_out` measured on; `prompt` tokens each, images included, and `answer` tokens; so
    many steps of `batch` questions on each GPU; `asked` questions of an evaluation with `said` tokens of answer.
    """

    rank: Rank = "full"
    gpus: int = 1
    questions: int = 512
    held_out: int = 128
    prompt: int = 1000
    answer: int = 64
    batch: int = 8
    steps: int = 200
    checkpointing: bool = True
    asked: int = 1000
    said: int = 256


@dataclass(frozen=True)
class Stage:
    """One stage. operations: all GPUs together; read, written: bytes of disk; memory: bytes on one GPU (of `merge` and
    `fold` in the host); seconds: predicted, of the disk at 1 GB/s for `merge` and `fold`."""

    name: str
    operations: float
    read: float
    written: float
    memory: float
    seconds: float


def forward(model: Model, tokens: int, length: int, heads: int = 0) -> float:
    """Operations of a pass of `tokens` tokens in sequences of `length` through the decoder, and the head on `heads` of
    them: 2AT, attention 4·T·length·q·L (a kernel that skips what is masked does half), 2hV per row of the head."""
    shapes = model.shapes
    attention = 4 * tokens * length * shapes.width("q_proj") * shapes.layers
    return 2.0 * model.active * tokens + attention + 2.0 * shapes.hidden * shapes.vocabulary * heads


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

    Per matrix 4T(mn + r(m + n)) factored or 6Tmn + 4mnr rebuilt; of experts 6Tmn for each that a token takes and 4mnr
    for all; attention 4·T·length·q forward and 2.5 times that backward; the head 2hV per answer forward and backward.
    With checkpointing the decoder once more forward.
    """
    attention = 4.0 * tokens * length * shapes.width("q_proj")
    layer, again = 3.5 * attention, attention
    for _, out, inner in shapes.projections:
        r = kept(out, inner, rank)
        if choose_backend(tokens, (out, inner), r, backend) == "factored":
            layer += 4.0 * tokens * (out * inner + r * (out + inner))
            again += 2.0 * tokens * (out * inner + r * (out + inner))
        else:
            layer += 6.0 * tokens * out * inner + 4.0 * out * inner * r
            again += 2.0 * out * inner * (tokens + r)
    for count, out, inner in shapes.experts:
        r = kept(out, inner, rank)
        layer += out * inner * (6.0 * tokens * shapes.active + 4.0 * count * r)
        again += 2.0 * out * inner * (tokens * shapes.active + count * r)
    head = 4.0 * shapes.hidden * shapes.vocabulary * answers
    return shapes.layers * (layer + (again if checkpointing else 0.0)) + head


def answering(model: Model, device: Device, questions: int, prompt: int, said: int, batch: int) -> tuple[float, float]:
    """(operations, seconds on one device) of greedy answers: prompts are read at the bf16 rate, answers written a
    token at a time, every step of which reads all weights once for the batch (all experts: a batch meets most)."""
    tokens = questions * prompt
    tower = 2.0 * model.tower * 4 * tokens  # four patches to a token, nearly all tokens of the image
    reading = forward(model, tokens, prompt, questions) + tower
    writing = forward(model, questions * said, prompt + said, questions * said)
    steps = -(-questions // batch) * said
    seconds = reading / (device.bf16 * device.products)
    seconds += steps * 2.0 * model.parameters / (device.bandwidth * device.stream)
    return reading + writing, seconds


def decomposition_memory(out: int, inner: int, on_gpu: bool = False) -> float:
    """Bytes while one matrix is decomposed in full: τ, its copy in double precision, B and U (4, 8, 4, 4 per element);
    the Gram matrix, eigenvectors and the solver's workspace (8 each, the workspace two), V twice (4 each)."""
    long, short = max(out, inner), min(out, inner)
    return 20.0 * long * short + (8 * 4 + 8) * short * short


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
    asked = work.questions + work.held_out
    answered, answer_seconds = answering(model, device, asked, work.prompt, work.answer, work.batch)
    again = forward(model, asked * (work.prompt + work.answer), work.prompt + work.answer, asked * work.answer)
    cached = asked * work.answer * (4 * (TOP_K + 1) + 4 * TOP_K)
    length = work.prompt + work.answer
    tokens, answers = work.batch * length, work.batch * work.answer
    step = gate_step(model.shapes, tokens, length, answers, rank=work.rank, checkpointing=work.checkpointing)
    training = memory_of(
        model.shapes,
        rank=work.rank,
        tokens=tokens,
        answer_tokens=answers,
        gpus=work.gpus,
        checkpointing=work.checkpointing,
    )
    kv = 4.0 * model.shapes.layers * model.keys
    said, said_seconds = answering(model, device, work.asked, work.prompt, work.said, 32)
    products = device.bf16 * device.products
    folding = sum(2.0 * count * out * inner * kept(out, inner, work.rank) for count, out, inner in model.matrices)
    return [
        Stage("merge", 3.0 * model.merged, weights + 2 * merged, weights, 40e6, (2 * weights + 2 * merged) / rate),
        Stage(
            "decompose", operations, 2 * merged, stored, decomposing,
            operations / (device.double * device.eigen) / work.gpus + (2 * merged + stored) / rate,
        ),
        Stage(
            "teacher", answered + again, weights, cached, weights + kv * work.batch * length,
            (answer_seconds + again / products) / work.gpus,
        ),
        Stage("gates", work.gpus * work.steps * step, weights + 2 * factors, 4.0 * gates, training.total,
              work.steps * step / products),
        Stage("fold", folding, weights + 4 * factors, weights, 64.0 * whole, (2 * weights + 4 * factors) / rate),
        Stage("evaluate", said, weights, 0.0, weights + kv * 32 * (work.prompt + work.said), said_seconds / work.gpus),
    ]  # fmt: skip
