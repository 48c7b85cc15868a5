"""Figures, names and lists on the pages are those of the code and of the committed results."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from scipy import stats

from experiments.pretrained.results import chosen, marks
from vlmgraft.alignment.distance import Distance
from vlmgraft.costs.cost import Work, stages
from vlmgraft.costs.models import MODELS
from vlmgraft.evaluation.intervals import score_interval
from vlmgraft.evaluation.presets import PRESETS
from vlmgraft.evaluation.records import Record
from vlmgraft.merging.receipt import Receipt, TensorReceipt
from vlmgraft.methods.frism import DEFAULT_RANK
from vlmgraft.recipe.schema import json_schema
from vlmgraft.recipe.tune import TuneRecipe
from vlmgraft.storage.jsonl import read_rows

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PRETRAINED = ROOT / "experiments" / "pretrained" / "results"


def text(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_every_field_of_a_recipe_is_described() -> None:
    for schema in (json_schema(), TuneRecipe.model_json_schema()):
        methods = schema["properties"].get("method", {}).get("oneOf", [])[1:]
        for part in (schema, *methods, *schema["$defs"].values()):
            for name, field in part.get("properties", {}).items():
                described = field.get("description") or "const" in field or "$ref" in field
                assert described, f"{part['title']}.{name}: write what it is below the field"


def test_every_preset_is_listed_with_its_home() -> None:
    page = text("evaluate.md")
    for name, preset in PRESETS.items():
        assert f"`{name}`" in page and f"`{preset.source}`" in page, name


def test_the_number_of_cases_and_the_speeds_are_the_committed_ones() -> None:
    page = text("evaluate.md")
    cases = (ROOT / "tests" / "evaluation" / "cases.jsonl").read_text(encoding="utf-8").splitlines()
    assert f"holds {len(cases)} outputs" in page
    measured = json.loads((RESULTS / "evaluate.json").read_text())
    for size in ("8", "32", "128"):
        rate, times = measured["items_per_second"][size], measured["times_one_by_one"][size]
        assert re.search(rf"{rate:.0f} in\s+batches of {size}\b.*?\({times:.1f} ×\)", page, re.DOTALL), size
    assert measured["times_one_by_one"]["32"] >= 5 and not any(measured["differing_answers"].values())


def test_the_script_of_drift_is_ten_lines() -> None:
    blocks = re.findall(r"```python\n(.*?)```", text("drift.md"), re.DOTALL)
    script = next(block for block in blocks if "SFTTrainer" in block)
    assert len([line for line in script.splitlines() if line.strip()]) <= 10


def test_keys_of_files_are_those_that_are_written() -> None:
    page = text("reference/files.md")

    def listed(after: str) -> list[str]:
        return re.findall(r"`(\w+)`", re.split(r"\.(?:\s|$)", page.split(after, 1)[1])[0])

    def names(cls: Any) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]

    assert listed("Keys of `receipt.json`:") == names(Receipt)
    assert listed("Keys of one\ntensor:") == names(TensorReceipt)
    row = page.split("| `inspect --distances --out` | `distances.jsonl` |", 1)[1].splitlines()[0]
    assert set(names(Distance)) <= set(re.findall(r"`(\w+)`", row))
    record = text("evaluate.md").split("## What a record says", 1)[1].split("\n## ", 1)[0]
    told = set(re.findall(r"`(\w+)`", record)) - {"scored", "unscored", "failed"}
    assert {"state", "cut", "found", "repeated"} <= told & set(names(Record))


def test_the_tables_of_the_lab_are_the_rows() -> None:
    page = text("papers/frism.md")
    seeds = [list(read_rows(RESULTS / "lab" / f"seed-{seed}.jsonl")) for seed in (0, 1, 2)]
    for method in ("FRISM, energy term", "FRISM, donor matching", "control: shuffled singular vectors"):
        above = [next(row for row in rows if row["method"] == method) for rows in seeds]
        cells = (row["above_task_arithmetic_at_equal_kl"] for row in above)
        said = (f"{100 * c['mean']:+.1f} [{100 * c['low']:+.1f}, {100 * c['high']:+.1f}]" for c in cells)
        assert f"| {method} | {' | '.join(said)} |" in page
    for row in seeds[0]:
        line = f"| {row['method']} | {row['setting']} |"
        if line in page:
            rest = page.split(line, 1)[1].splitlines()[0]
            kl = f"{row['kl']:.4f}" if row["kl"] else "0"
            figures = f" {100 * row['reasoning']['mean']:.1f} | {100 * row['perception']['mean']:.1f} | {kl} |"
            assert rest == figures, line


def test_the_tables_of_drift_are_what_its_command_prints() -> None:
    files = sorted((RESULTS / "lab").glob("drift-*.jsonl"))
    command = [sys.executable, str(ROOT / "benchmarks" / "lab_drift.py"), "--summarise", *map(str, files)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tables = [line for line in said.splitlines() if line.startswith("|")]
    assert len(tables) > 25 and set(tables) <= set(text("drift.md").splitlines())


ESTIMATE = re.compile(r"([-+−]?\d+\.\d) ?\[([-+−]?\d+\.\d), ([-+−]?\d+\.\d)\]")


def estimates(written: str) -> set[tuple[float, ...]]:
    """All "mean [low, high]" of a text."""
    return {tuple(float(one.replace("−", "-")) for one in found) for found in ESTIMATE.findall(written)}


def test_estimates_on_the_pages_about_papers_are_in_the_results() -> None:
    """Differences may be told the other way round."""
    known = estimates("\n".join(path.read_text(encoding="utf-8") for path in RESULTS.rglob("*.md")))
    known |= estimates(text("drift.md"))  # its tables are held against the rows above
    for seed in (0, 1, 2):
        for row in read_rows(RESULTS / "lab" / f"seed-{seed}.jsonl"):
            above = row["above_task_arithmetic_at_equal_kl"]
            known |= {tuple(round(100 * above[key], 1) for key in ("mean", "low", "high"))} if above else set()
    known |= {(-mean, -high, -low) for mean, low, high in known}
    known |= estimates(text("measured.md").split("Over three base seeds", 1)[0])  # what `vlmgraft demo` prints
    for page in (ROOT / "docs" / "measured.md", *sorted((ROOT / "docs" / "papers").glob("*.md"))):
        told = estimates(page.read_text(encoding="utf-8"))
        assert told <= known, f"{page.name}: {sorted(told - known)}"


def test_the_readme_is_short_and_its_tables_are_the_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(re.sub(r"[|`]", " ", readme).split()) <= 800
    toy = {
        row["method"]: f"{100 * row['reasoning']['mean']:.1f} %" for row in read_rows(RESULTS / "lab" / "seed-0.jsonl")
    }
    assert toy["task arithmetic, chosen"] in readme and toy["FRISM, energy term"] in readme
    measured = json.loads((PRETRAINED / "seed-0-vlm-replay-donor.json").read_text())
    on_test = {(row["method"], row["setting"]): row for row in measured["rows"] if row["split"] == "test"}
    named = {"its VLM": ("VLM", ""), "task arithmetic, λ 0.3": ("task arithmetic", "λ 0.3")}
    for name, method in (("FRISM, donor matching", "FRISM donor"), ("task arithmetic, chosen", "task arithmetic")):
        named[name] = method, chosen(measured["rows"])[method]["setting"]
    for name, key in named.items():
        row = on_test[key]
        scores = [score_interval([marks(row["right"][part])]).percent() for part in ("sums", "perception")]
        kl = f"{row['kl']:.3f}" if row["kl"] else "0"
        assert f"| {name} | {scores[0]} | {scores[1]} | {kl} |" in readme
    tables = [(PRETRAINED / f"seed-{seed}-vlm-replay-donor.md").read_text() for seed in range(4)]
    above = [re.findall(r"^\| FRISM donor \|.*?\| \+([\d.]+) \[", table, re.M)[0] for table in tables]
    *first, last = above
    assert f"FRISM is {', '.join(first)} and {last} points above task arithmetic, on four seeds" in readme
    models = {model.name.removeprefix("Qwen2.5-VL-"): model for model in MODELS}
    for size in ("3B", "7B", "32B"):
        stage = {stage.name: stage for stage in stages(models[size], Work(rank=DEFAULT_RANK))}
        figures = stage["gates"].memory, stage["teacher"].memory, stage["decompose"].written, stage["fold"].written
        assert f"| {size} | {' | '.join(f'{figure / 1e9:.1f} GB' for figure in figures)} |" in readme


def test_the_spread_over_pretrained_trios_is_that_of_their_tables() -> None:
    """Mean and Student's interval of the leads over task arithmetic's curve, of as many seeds as have them."""
    page = text("explanation/pretrained.md")
    for method, count, said in (
        ("FRISM donor", 4, "{} points (four, Student's t [{}, {}])"),
        ("FRISM energy", 3, "{} (three, [{}, {}])"),
    ):
        files = [PRETRAINED / f"seed-{seed}-vlm-replay-donor.md" for seed in range(count)]
        row = re.compile(rf"^\| {method} \|.*?\| ([+-][\d.]+) \[", re.M)
        leads = [float(row.findall(file.read_text(encoding="utf-8"))[0]) for file in files]
        error = statistics.stdev(leads) / count**0.5
        low, high = stats.t.interval(0.95, count - 1, statistics.mean(leads), error)
        assert said.format(*(f"{x:.1f}" for x in (statistics.mean(leads), low, high))) in page


def test_the_rooms_and_the_files_that_contributing_names_are_there() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    package = ROOT / "src" / "vlmgraft"
    rooms = {path.name for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    named = set(re.findall(r"^\| `(\w+)/` \|", contributing, re.M)) - {"experiments"}
    assert named == rooms
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("```text", 1)[1].split("```", 1)[0]
    assert rooms <= set(re.findall(r"\w+", tree))
    answers = contributing.split("## Where is …", 1)[1].split("\n## ", 1)[0]
    rows = [
        re.findall(r"`((?:src|tests)/[^`]+)`", line)
        for line in answers.splitlines()
        if line.startswith("| a") or "?" in line
    ]
    assert len(rows) == 8 and all(1 <= len(files) <= 3 for files in rows)
    assert [file for files in rows for file in files if not (ROOT / file).is_file()] == []
