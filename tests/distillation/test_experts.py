"""FRISM over the fused experts of a mixture: gradients, identities, and the whole way from recipe to folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import vlmgraft as vg
from experiments.lab.models import build_processor
from vlmgraft.distillation.curvature import estimate_curvature
from vlmgraft.distillation.distill import Distiller
from vlmgraft.distillation.gated_layers import GatedExperts, gated
from vlmgraft.distillation.projections import RebuiltStack
from vlmgraft.errors import AlignmentError, RecipeError
from vlmgraft.export.lora import write_lora
from vlmgraft.hf.batches import Question, encode, load_questions
from vlmgraft.hf.models import load_processor, load_vlm
from vlmgraft.hf.modules import ExpertSlice, ExpertStack
from vlmgraft.spectral.factor_store import open_store
from vlmgraft.spectral.factors import Factors, factorize
from vlmgraft.spectral.gate_store import load_gates
from vlmgraft.spectral.gates import Gates
from vlmgraft.storage.jsonl import write_rows

EXPERTS: dict[str, Any] = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_the_rebuilt_stack_has_autograds_gradient() -> None:
    U, Vh, weight = (draw(*shape, dtype=torch.float64) for shape in ((3, 5, 4), (3, 4, 6), (3, 5, 6)))
    spectrum = draw(3, 4, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: RebuiltStack.apply(weight, U, c, Vh), spectrum)
    assert torch.allclose(RebuiltStack.apply(weight, U, spectrum, Vh), weight + (U * spectrum[:, None]) @ Vh)


class Experts(nn.Module):
    """Every token through every expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(draw(3, 6, 4))
        self.down = nn.Parameter(draw(3, 4, 6, seed=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x @ self.up.mT).relu() @ self.down.mT).sum(0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()


def table(experts: Experts, transposed: bool = False) -> dict[str, Factors]:
    taus = {"up": draw(3, 6, 4, seed=2), "down": draw(3, 4, 6, seed=3)}
    return {key: factorize(tau.mT if transposed else tau, key, key) for key, tau in taus.items()}


@pytest.mark.parametrize("transposed", [False, True])
def test_open_experts_are_task_arithmetic_and_closed_ones_the_model(transposed: bool) -> None:
    model, x = Model(), draw(5, 4, seed=5)
    before, factors = model.experts(x), table(model.experts, transposed)
    wrapper = GatedExperts(model.experts, factors)
    for share in (0.0, 0.7):
        for key, stack in wrapper.gated.items():
            stack.spectrum = share * factors[key].s
        expected = Experts()
        for key in factors:
            tau = factors[key].update()
            getattr(expected, key).data += share * (tau.mT if transposed else tau)
        assert torch.allclose(wrapper(x), expected(x), atol=1e-3)
        assert share or wrapper(x).equal(before)


def test_a_misfit_is_named_and_the_model_is_left_alone() -> None:
    model = Model()
    wrong = {"up": factorize(draw(3, 6, 5), "up", "up")}
    with (
        pytest.raises(AlignmentError, match="up: factors of shape"),
        gated(model, {"up": ExpertStack(model.experts, "up")}, wrong),
    ):
        pass
    assert isinstance(model.experts, Experts)


LINEAR_ATTENTION = {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 8,
                    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4,
                    "linear_value_head_dim": 4}  # fmt: skip


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory, questions: list[Question]) -> dict[str, Any]:
    """Recipe of a tiny Qwen3-VL-MoE, a donor and its base, and eight image questions."""
    return built(tmp_path_factory.mktemp("mixture"), questions, "Qwen3VLMoe", "Qwen3Moe", "Qwen3Moe")


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory, questions: list[Question]) -> dict[str, Any]:
    """The same of Qwen3.5-MoE, whose files keep every expert's matrices by themselves."""
    root = tmp_path_factory.mktemp("one_by_one")
    return built(root, questions, "Qwen3_5Moe", "Qwen3_5Moe", "Qwen3_5MoeText", **LINEAR_ATTENTION)


def built(
    root: Path, questions: list[Question], family: str, donor: str, text_kind: str, **more: Any
) -> dict[str, Any]:
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    processor = build_processor()
    ids = {f"{name}_token_id": processor.tokenizer.convert_tokens_to_ids(f"<|{word}|>")
           for name, word in (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
                              ("vision_end", "vision_end"))}  # fmt: skip
    special = {"pad_token_id": processor.tokenizer.pad_token_id, "eos_token_id": processor.tokenizer.eos_token_id}
    text: dict[str, Any] = {
        "vocab_size": len(processor.tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 128, **EXPERTS,
        "tie_word_embeddings": False, "bos_token_id": None, **special, **more,
    }  # fmt: skip
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [0, 1, 1]}}
    tower = {"depth": 2, "hidden_size": 8, "out_hidden_size": 16, "num_heads": 2, "patch_size": 8,
             "intermediate_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}  # fmt: skip
    config = getattr(T, f"{family}Config")(
        text_config={**text, **rope}, vision_config=tower, tie_word_embeddings=False, **ids
    )
    models = {
        "vlm": getattr(T, f"{family}ForConditionalGeneration")(config),
        **{
            name: getattr(T, f"{donor}ForCausalLM")(getattr(T, f"{text_kind}Config")(**text))
            for name in ("donor", "base")
        },
    }
    for name, model in models.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        model.generation_config.eos_token_id = special["eos_token_id"]
        model.save_pretrained(root / name)
    processor.save_pretrained(root / "vlm")
    torch.random.set_rng_state(torch_state)
    rows = []
    for number, question in enumerate(questions[:8]):
        question.images[0].save(root / f"{number}.png")  # type: ignore[call-arg]
        rows.append({"question": question.question, "image": f"{number}.png"})
    write_rows(root / "questions.jsonl", rows)
    calibration = {"data": str(root / "questions.jsonl"), "samples": 6, "held_out": 2, "max_new_tokens": 4}
    method = {"name": "frism", "steps": 6, "learning_rate": 0.5, "inject_weight": 1.0, "calibration": calibration}
    return {
        "vlm": str(root / "vlm"), "donor": str(root / "donor"), "donor_base": str(root / "base"), "method": method
    }  # fmt: skip


def test_from_recipe_to_folder(mixture: dict[str, Any], tmp_path: Path) -> None:
    """The folder that a merge writes is the gated model: experts' gates are learned, folded, and read again."""
    receipt = vg.merge(mixture, tmp_path / "merged", workdir=tmp_path / "work")
    merged = {row.name for row in receipt.tensors if row.verdict == "merged"}
    assert any(name.endswith("experts.gate_up_proj") for name in merged)
    gates, store = load_gates(tmp_path / "work" / "gates"), open_store(tmp_path / "work" / "factors")
    stacks = {name: logits for name, logits in gates.logits.items() if ".experts." in name}
    assert len(stacks) == 4 and all(logits.ndim == 2 and len(logits) == 3 for logits in stacks.values())
    assert all(float(logits.abs().max()) > 0.1 for logits in stacks.values()), "the experts' gates have moved"
    vlm, processor = load_vlm(mixture["vlm"], torch.float32), load_processor(mixture["vlm"])
    asked = load_questions(mixture["method"]["calibration"]["data"], need_images=True)
    batch = encode(processor, asked)
    again = load_vlm(tmp_path / "merged", torch.float32)
    with torch.no_grad():
        before = vlm(**batch).logits
        with Distiller(vlm, processor, store, asked[:2], max_new_tokens=2).applied(gates) as model:
            gated_logits = model(**batch).logits
        assert torch.equal(vlm(**batch).logits, before), "nothing of the gates remains in the model"
        after = again(**batch).logits
    keep = batch["attention_mask"].bool()
    assert float((after - gated_logits)[keep].norm()) < 1e-3 * float((gated_logits - before)[keep].norm())

    report = write_lora(mixture["vlm"], store, gates, tmp_path / "lora", 16, torch.float32)
    assert report.error < 1e-6 and set(report.errors) == set(gates.logits)
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(vlm, tmp_path / "lora").eval()(**batch).logits
    assert float((adapted - gated_logits)[keep].norm()) < 1e-3 * float((gated_logits - before)[keep].norm())


def test_curvature_sees_into_experts(mixture: dict[str, Any], tmp_path: Path) -> None:
    """Opened in curvature order up to the budget, every expert by itself; h is what moving one direction costs."""
    method = {"name": "curvature", "kl_budget": 0.02, "calibration": mixture["method"]["calibration"]}
    vg.merge({**mixture, "method": method}, tmp_path / "merged", workdir=tmp_path / "work")
    gates, store = load_gates(tmp_path / "work" / "gates"), open_store(tmp_path / "work" / "factors")
    stacks = [name for name in gates.logits if ".experts." in name]
    assert len(stacks) == 4 and all(gates.logits[name].shape == store[name].s.shape for name in stacks)
    assert 0 < gates.settings["energy"] < 1 and 0 < gates.settings["held_out_kl"] <= 0.02
    asked = load_questions(mixture["method"]["calibration"]["data"], need_images=True)
    vlm, processor = load_vlm(mixture["vlm"], torch.float32), load_processor(mixture["vlm"])
    distiller = Distiller(vlm, processor, store, asked[:4], max_new_tokens=4)
    found = estimate_curvature(distiller, draws=20)
    name = max(stacks, key=lambda stack: float(found.h[stack].max()))
    expert, direction = divmod(int(found.h[name].argmax()), found.h[name].shape[1])
    logits = {key: torch.full_like(value, -math.inf) for key, value in found.h.items()}
    logits[name][expert, direction] = math.inf
    kl = distiller.keep_kl(Gates(logits, 0.2), distiller.targets)
    assert kl == pytest.approx(0.5 * 0.2**2 * float(found.h[name].max()), rel=0.5)


def test_curvature_of_experts_that_files_keep_one_by_one(one_by_one: dict[str, Any], tmp_path: Path) -> None:
    method = {"name": "curvature", "kl_budget": 0.02, "calibration": one_by_one["method"]["calibration"]}
    vg.merge({**one_by_one, "method": method}, tmp_path / "merged", workdir=tmp_path / "work")
    gates = load_gates(tmp_path / "work" / "gates")
    assert sum(".experts." in name for name in gates.logits) == 2 * 3 * 3
    assert 0 < gates.settings["energy"] < 1 and 0 < gates.settings["held_out_kl"] <= 0.02


def test_experts_that_files_keep_one_by_one_have_gates(one_by_one: dict[str, Any], tmp_path: Path) -> None:
    """Every expert's gate, up and down have gates of their own, and the gated model is the folder that is written."""
    receipt = vg.merge(one_by_one, tmp_path / "merged", workdir=tmp_path / "work")
    merged = {row.name for row in receipt.tensors if row.verdict == "merged"}
    experts = {name for name in merged if ".experts." in name}
    assert len(experts) == 2 * 3 * 3 and any(name.endswith("experts.2.up_proj.weight") for name in experts)
    gates, store = load_gates(tmp_path / "work" / "gates"), open_store(tmp_path / "work" / "factors")
    assert experts <= gates.logits.keys()
    assert sum(float(gates.logits[name].abs().max()) > 0.1 for name in experts) > len(experts) / 2, "gates have moved"
    vlm, processor = load_vlm(one_by_one["vlm"], torch.float32), load_processor(one_by_one["vlm"])
    asked = load_questions(one_by_one["method"]["calibration"]["data"], need_images=True)
    batch = encode(processor, asked)
    again = load_vlm(tmp_path / "merged", torch.float32)
    weights = {
        name: tensor for file in (tmp_path / "merged").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    distiller = Distiller(vlm, processor, store, asked[:2], max_new_tokens=2)
    with torch.no_grad():
        before = vlm(**batch).logits
        after = again(**batch).logits
        for what in (gates, {name: weights[name].float() for name in gates.logits}):
            with distiller.applied(what) as model:
                changed = model(**batch).logits
            assert torch.equal(vlm(**batch).logits, before), "nothing of the gates remains in the model"
            keep = batch["attention_mask"].bool()
            assert float((after - changed)[keep].norm()) < 1e-3 * float((changed - before)[keep].norm())
    with pytest.raises(RecipeError, match="keep one by one are not exported"):
        write_lora(one_by_one["vlm"], store, gates, tmp_path / "lora", 16)


def test_factors_that_do_not_fit_an_expert_are_named() -> None:
    model = Model()
    part = ExpertSlice(ExpertStack(model.experts, "up"), 1, 0, 2)
    with (
        pytest.raises(AlignmentError, match=r"experts\.1: factors of shape"),
        gated(model, {"experts.1": part}, {"experts.1": factorize(draw(6, 4), "experts.1", "experts.1")}),
    ):
        pass
    assert isinstance(model.experts, Experts)
