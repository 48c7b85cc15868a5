"""Choose: compare the rules that fit a model pair at equal KL, and write the recipe of the best one.

1. Every rule is set to the strength at which its KL from the VLM, on the same prompts, is just within the budget.
2. The rules answer the validation questions in rounds. After each round but the last, a rule is dropped if its
   reasoning is significantly below the leader's: the paired bootstrap interval of the difference, at level 1 − 0.05/m
   for m rules (Bonferroni), lies below zero.
3. The remaining rule that reasons best on all validation questions wins. All m rules that remain are measured on test
   questions, not used to choose; differences from the winner are paired, with intervals at level 1 − 0.05/(m − 1).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from vlmgraft.analysis.bench import REMEDY, Bench, load_bench
from vlmgraft.analysis.contenders import Contenders, fitting
from vlmgraft.analysis.eval_data import EvalData, SuiteEvaluator
from vlmgraft.analysis.in_memory import Rebuilder, swapped
from vlmgraft.analysis.scores import Scores, change, from_marks
from vlmgraft.data.sources import registered_source
from vlmgraft.errors import DataError
from vlmgraft.methods.frism import GatedMethod, check_budget
from vlmgraft.recipe.model import dump_recipe
from vlmgraft.recipe.resolve import RecipeSource, pair, read_questions, read_recipe
from vlmgraft.storage.jsonl import write_rows, write_text
from vlmgraft.storage.listed import listed
from vlmgraft.storage.locks import at_work
from vlmgraft.storage.progress import Progress

ROUNDS = 4
ALPHA = 0.05
VLM = "VLM"
Row = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """rows: the VLM's, then one per rule. winner: name of the best rule; None where no rule met the budget. recipe:
    the file that merges with the winner."""

    rows: tuple[Row, ...]
    winner: str | None
    recipe: Path | None


def choose(
    recipe: RecipeSource,
    out: str | Path,
    data: EvalData | None = None,
    *,
    budget: float = 0.01,
    rules: Sequence[str] | None = None,
    rounds: int = ROUNDS,
    overrides: Sequence[str] = (),
    resume: bool = False,
    progress: Progress | None = None,
) -> Choice:
    """Compare the rules that fit a recipe; rows in `out`/choose.jsonl, the best rule's recipe in `out`/winner.yaml.

    Args:
        recipe: gives models, modules and layers; its method takes part when it learns gates.
        data: questions of reasoning and perception. Registered sources are asked in their splits "validation" and
            "test"; of other data, every other question of a task is for validation. The KL is measured on the prompts
            of `drift`, or of a registered source's split "divergence".
        budget: KL from the VLM, nats per token, to which the strength of every rule is set.
        rules: names of `contenders.RULES`; default: all that fit.
        rounds: number of validation rounds; rules are dropped after each but the last, so that 1 measures all of them.
    Raises:
        RecipeError, DataError, CheckpointError, AlignmentError, OutputError: before the first rule is measured.
    """
    data, out = data or EvalData(), Path(out)
    check_budget(budget, "budget")
    loaded = read_recipe(recipe, overrides, need_method=False)
    names = fitting(loaded, None if rules is None else listed(rules))
    alignment = pair(loaded)
    with Rebuilder(alignment) as rebuilder, at_work(out, "choosing", REMEDY, loaded.models, ["strengths.*", *names]):
        contenders = Contenders(loaded, alignment, rebuilder, budget, out, progress)
        contenders.check(names)
        calibration = read_questions(loaded).digests if isinstance(loaded.method, GatedMethod) else ()
        settings = {"recipe": dump_recipe(loaded), "budget": budget, "calibration": calibration}
        models = [checkpoint.path for checkpoint in alignment.opened.values()]
        more: dict[str, Any] = {"settings": settings, "models": models, "resume": resume, "progress": progress}
        bench = load_bench(alignment.vlm.path, data, out, **more)
        if bench.kl_from is None:
            raise DataError("choose: there are no prompts for the KL; name a question file as drift")
        race = Race(bench, contenders, *_splits(data, bench))
        choice = race.run(names, rounds)
        write_rows(out / "choose.jsonl", choice.rows)
    return choice


def _splits(data: EvalData, bench: Bench) -> tuple[SuiteEvaluator, SuiteEvaluator]:
    """Validation and test questions: two splits of registered sources, else halves of every task."""
    evaluator: Any = bench.evaluator
    sources = [registered_source(name) for name in data.data]
    if data.split is None and all(source and {"validation", "test"} <= set(source[0].splits) for source in sources):
        return evaluator, replace(data, split="test").evaluator(bench.processor)
    return evaluator.part(0, 2), evaluator.part(1, 2)


@dataclass(frozen=True)
class Race:
    """The comparison: one model on its bench, the contenders, and the validation and test questions."""

    bench: Bench
    contenders: Contenders
    validation: SuiteEvaluator
    test: SuiteEvaluator

    def run(self, names: Sequence[str], rounds: int = ROUNDS) -> Choice:
        """Find the strengths, run the validation rounds and the test; results measured before are reused."""
        levels = {row["rule"]: row for row in self._levels(names)}
        alive = [name for name in names if levels[name]["strength"] is not None]
        marks: dict[str, dict[str, str]] = {name: {} for name in (VLM, *alive)}
        fate = {name: "over the budget at every strength" for name in names if name not in alive}
        for number in range(rounds):
            part = self.validation.part(number, rounds)
            for row in self._answers("validation", number, part, [VLM, *alive], levels):
                of_rule = marks[row["rule"]]
                marks[row["rule"]] = {task: of_rule.get(task, "") + text for task, text in row["right"].items()}
            scores = {name: from_marks(marks[name], self.validation) for name in alive}
            for name in dominated(scores, self.validation.reasoning, len(names)) if number < rounds - 1 else ():
                alive.remove(name)
                fate[name] = f"dropped after round {number + 1} of {rounds}"
        winner = max(alive, key=lambda name: scores[name].reasoning.mean, default=None)
        tested = {row["rule"]: row for row in self._answers("test", 0, self.test, [VLM, *alive], levels)}
        rows = []
        for name in (VLM, *names):
            row = {
                "method": name,
                "setting": "",
                "order": 0,
                "fate": fate.get(name, "winner" if name == winner else ""),
            }
            row |= {key: levels.get(name, {}).get(key) for key in ("strength", "kl", "seconds")}
            if marks.get(name):
                row["validation"] = asdict(from_marks(marks[name], self.validation).reasoning)
            if name in tested:
                row |= {kind: tested[name][kind] for kind in ("reasoning", "perception")}
                if winner and name not in (VLM, winner):
                    level = 1 - ALPHA / max(1, len(alive) - 1)
                    pair_of = tested[winner]["right"], tested[name]["right"]
                    row["behind"] = asdict(change(*pair_of, self.test.reasoning, level))
            rows.append(row)
        return Choice(tuple(rows), winner, self._write(winner, levels) if winner else None)

    def _levels(self, names: Sequence[str]) -> list[Row]:
        """The strength and KL of every rule."""

        def kl_of(weights: Mapping[str, Any]) -> float:
            with swapped(self.bench.parameters, weights):
                return self.bench.kl_from(self.bench.model) if self.bench.kl_from else 0.0

        def level(cell: Mapping[str, Any]) -> Row:
            began = time.perf_counter()
            strength, kl = self.contenders.strength_within(cell["rule"], kl_of)
            return {"strength": strength, "kl": kl, "seconds": time.perf_counter() - began}

        return list(self.bench.measure("strengths", ("rule",), [{"rule": name} for name in names], level))

    def _answers(
        self, split: str, number: int, evaluator: SuiteEvaluator, names: Sequence[str], levels: Mapping[str, Row]
    ) -> list[Row]:
        """The results of these rules on one part of the questions, logged in `split-number.jsonl`."""
        bench = replace(self.bench, evaluator=evaluator, kl_from=None)

        def ask(cell: Mapping[str, Any]) -> Row:
            name = cell["rule"]
            weights = {} if name == VLM else self.contenders.weights(name, levels[name]["strength"])
            with swapped(bench.parameters, weights):
                return bench.ask()

        return list(bench.measure(f"{split}-{number}", ("rule",), [{"rule": name} for name in names], ask))

    def _write(self, winner: str, levels: Mapping[str, Row]) -> Path:
        path = self.bench.folder / "winner.yaml"
        recipe = dump_recipe(self.contenders.keep(winner, levels[winner]["strength"]))
        write_text(path, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
        return path


def dominated(scores: Mapping[str, Scores], tasks: Sequence[str], rules: int) -> list[str]:
    """The rules whose reasoning is below the leader's: the interval of the paired difference lies below zero."""
    if len(scores) < 2:
        return []
    leader = max(scores, key=lambda name: scores[name].reasoning.mean)
    level = 1 - ALPHA / rules
    return [
        name
        for name, of_rule in scores.items()
        if name != leader and change(scores[leader].right, of_rule.right, tasks, level).high < 0
    ]
