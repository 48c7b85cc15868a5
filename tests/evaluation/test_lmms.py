"""The bridge to lmms-eval. `lmms_logs/` was written by lmms-eval 0.7.3 with the embedded VLM on two small tasks of our
own, through `vlmgraft evaluate --data lmms:lab_tiny,lab_facts`; the rows below imitate how other tasks log."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from vlmgraft.errors import DataError, InputError, OutputError, VlmgraftError
from vlmgraft.evaluation import evaluate, lmms
from vlmgraft.evaluation.lmms import read_samples, sample_files, task_of, translate
from vlmgraft.evaluation.summary import summarise

LOGS = Path(__file__).with_name("lmms_logs")


def test_a_recorded_log_becomes_records_with_the_harness_scores() -> None:
    """The harness printed exact 0.75 for lab_facts and 0.3333 for lab_tiny."""
    files = sample_files(LOGS)
    assert [task_of(file) for file in files] == ["lab_facts", "lab_tiny"]
    facts, tiny = (read_samples(file) for file in files)
    assert [record.score for record in facts] == [1, 1, 1, 0]
    assert [record.output for record in facts] == ["7", "17", "red blue", "17"]
    assert (
        facts[3].expected == ("16",) and facts[3].prompt == "what is 8 + 9 ?" and facts[0].metric == "lmms_eval exact"
    )
    found = summarise([*facts, *tiny])
    means = {task.task: task.score.mean for task in found.tasks if task.score}
    assert means == {"lab_facts": 0.75, "lab_tiny": pytest.approx(1 / 3)}
    assert all(record.tokens in (4, 5) for record in facts + tiny)


def sample(**more: Any) -> dict[str, Any]:
    return {"doc_id": 3, "target": "yes", "filtered_resps": "Yes.", "doc_hash": "x", "input": "Is there a dog?", **more}


def test_a_task_that_logs_an_object_per_measure() -> None:
    """As pope does."""
    scored = {"question_id": "1", "score": 1.0, "prediction": "yes", "ground_truth": "yes"}
    record = translate(sample(pope_accuracy=scored, pope_f1_score=scored), "pope")
    assert (record.score, record.kind, record.metric, record.answer) == (1.0, "perception", "pope", "yes")
    assert summarise([record]).tasks[0].others["F1"] == 1


@pytest.mark.parametrize(
    ("said", "target", "score"),
    [("<think>B</think>The answer is C.", "C", 1.0), ("<think>C", "C", 0.0), ("12.0", "12", 1.0)],
)
def test_without_a_score_of_the_harness_ours_is_taken(said: str, target: str, score: float) -> None:
    """As tasks do that ask a judge, which nobody here can."""
    logged = {"gpt_eval_score": {"question_id": "1", "prediction": said}, "submission": {"a": 1}}
    record = translate(sample(filtered_resps=[said], target=target, **logged), "mathvista_testmini_cot")
    assert (record.score, record.kind, record.metric, record.state) == (score, "reasoning", "mathvista", "scored")


def test_scores_beyond_one_and_missing_targets_are_not_taken() -> None:
    assert translate(sample(total={"score": 80}), "mme").metric == "auto"
    assert translate(sample(target=""), "own").state == "unscored"
    assert translate(sample(resps=[["first", "second"]]), "own").output == "first"


NO_SAMPLES = ('{"target": "a"}', '{"doc_id": 1}', '{"resps": "a"}', '{"doc_id": [], "resps": 1}', "[]", '"a"', "null")


@pytest.mark.parametrize("line", [*NO_SAMPLES, '{"a": ', "[" * 100_000, "9" * 5000])
def test_lines_that_are_no_samples_are_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "20260101_000000_samples_x.jsonl"
    file.write_text(json.dumps(sample()) + f"\n{line}\n")
    with pytest.raises(DataError, match=r"samples_x.jsonl, line 2: no sample of lmms-eval \(.*\); remove the log"):
        read_samples(file)


@pytest.mark.parametrize("counts", [None, [], [None], {}, "5", [{"output_tokens": "5"}], [{"output_tokens": None}], 5])
def test_a_sample_without_a_count_of_tokens_has_none(tmp_path: Path, counts: Any) -> None:
    file = tmp_path / "samples_x.jsonl"
    file.write_text(json.dumps(sample(token_counts=counts)))
    assert read_samples(file)[0].tokens == 0


@pytest.mark.parametrize("error", [KeyError, TypeError, ValueError, AttributeError])
def test_a_mistake_of_ours_is_no_bad_log(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise error("ours")

    monkeypatch.setattr(lmms, "translate", broken)
    with pytest.raises(error, match="ours"):
        read_samples(sample_files(LOGS)[0])


def test_the_newest_log_of_a_task_counts(tmp_path: Path) -> None:
    for name in (
        "20260101_000000_samples_x.jsonl",
        "20260102_000000_samples_x.jsonl",
        "20260101_000000_samples_a_b.jsonl",
    ):
        (tmp_path / name).write_text("")
    assert [file.name[:8] for file in sample_files(tmp_path)] == ["20260101", "20260102"]


def test_without_the_harness_the_way_to_install_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vlmgraft: Any, trio: Path
) -> None:
    monkeypatch.delenv(lmms.PYTHON, raising=False)
    monkeypatch.setattr(lmms.importlib.util, "find_spec", lambda name: None)
    ran = vlmgraft("evaluate", trio / "vlm", "--data", "lmms:pope", "--out", tmp_path / "e")
    assert ran.code == 2 and "lmms/bin/pip install lmms-eval" in ran.err and lmms.PYTHON in ran.err
    assert not (tmp_path / "e").exists()
    monkeypatch.setenv(lmms.PYTHON, "/nowhere/python")
    with pytest.raises(InputError, match="/nowhere/python: no such file"):
        evaluate.evaluate(trio / "vlm", "lmms:pope", tmp_path / "e")


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the harness's Python: writes the recorded logs where it is told to, or fails."""
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\n"
        "import json, shutil, sys, pathlib\n"
        f"pathlib.Path({str(tmp_path / 'said.json')!r}).write_text(json.dumps(sys.argv))\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--output_path') + 1], 'model')\n"
        "if 'broken' in sys.argv[sys.argv.index('--tasks') + 1]:\n"
        "    print('ValueError: no such task'); sys.exit(0)\n"
        f"shutil.copytree({str(LOGS)!r}, out)\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv(lmms.PYTHON, str(script))
    monkeypatch.setenv(lmms.ARGUMENTS, "--include_path 'my tasks'")
    return tmp_path


def test_the_harness_is_run_on_the_folder_and_its_logs_are_kept(harness: Path, trio: Path) -> None:
    found = evaluate.evaluate(trio / "vlm", "lmms:lab_tiny,lab_facts", harness / "e", limit=6, batch_size=2)
    assert [task.task for task in found.tasks] == ["lab_facts", "lab_tiny"]
    said = json.loads((harness / "said.json").read_text())
    assert said[1:5] == ["-m", "lmms_eval", "--model", "qwen2_5_vl"] if said[0] == "-m" else "qwen2_5_vl" in said
    assert f"pretrained={trio / 'vlm'}" in said[said.index("--model_args") + 1]
    assert said[said.index("--limit") + 1] == "6" and said[-2:] == ["--include_path", "my tasks"]
    assert len((harness / "e" / "records.jsonl").read_text().splitlines()) == 10
    (harness / "said.json").unlink()
    assert (
        evaluate.evaluate(trio / "vlm", "lmms:lab_tiny,lab_facts", harness / "e", limit=6, batch_size=2, resume=True)
        == found
    )
    assert not (harness / "said.json").exists()


def test_a_harness_that_fails_without_saying_so_is_noticed(harness: Path, trio: Path) -> None:
    """lmms-eval 0.7.3 ends with exit code 0 after an error; only the missing log tells."""
    with pytest.raises(VlmgraftError, match=r"ended with 0: ValueError: no such task; see .*harness.log"):
        evaluate.evaluate(trio / "vlm", "lmms:broken", harness / "e")


def test_the_harness_does_not_mix_with_other_data(tmp_path: Path, trio: Path) -> None:
    with pytest.raises(InputError, match="cannot be mixed"):
        evaluate.evaluate(trio / "vlm", ["lmms:pope", "lab"], tmp_path / "e")
    (tmp_path / "e").mkdir()
    with pytest.raises(OutputError, match="exists"):
        evaluate.evaluate(trio / "vlm", "lab", tmp_path / "e")
