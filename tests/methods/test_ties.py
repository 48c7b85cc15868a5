"""TIES against its formula on whole tensors, against PEFT, and its threshold against a sort."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_merge import Fake, models, run
from peft.utils import merge_utils
from pydantic import TypeAdapter
from torch import Tensor

from vlmgraft.errors import RecipeError
from vlmgraft.methods.ties import Ties

Tensors = dict[str, Tensor]


def naive_trim(tau: Tensors, density: float, whole: bool) -> Tensors:
    kept = {}
    for name, one in tau.items():
        pool = torch.cat([t.flatten() for t in tau.values()]) if whole else one.flatten()
        least = sorted(pool.abs().tolist(), reverse=True)[max(1, round(density * len(pool))) - 1]
        kept[name] = one * (one.abs() >= least)
    return kept


def naive(fake: Fake, recipe: Ties, density: dict[str, float]) -> Tensors:
    """Entry by entry in Python."""
    trimmed = []
    for key in ("vlm", "donor"):
        one = {share: naive_trim(fake.tau(key), share, recipe.trim == "global") for share in set(density.values())}
        trimmed.append({name: one[density[name]][name] for name in fake.names})
    merged = {}
    for name, base in fake.models["vlm_base"].items():
        entries = []
        for pair in zip(*(one[name].flatten().tolist() for one in trimmed), strict=True):
            vote = {
                "weighted": sum(w * x for w, x in zip(recipe.weights, pair, strict=True)),
                "frequency": sum(x > 0 for x in pair) - sum(x < 0 for x in pair),
                "unweighted": sum(pair),
            }[recipe.election]
            voted = [w * x if recipe.election == "weighted" else x for w, x in zip(recipe.weights, pair, strict=True)]
            agreeing = [(w, x) for w, x, y in zip(recipe.weights, pair, voted, strict=True) if y * vote > 0]
            if recipe.combine == "max":
                entries.append(max((w * x for w, x in agreeing), key=abs, default=0.0))
                continue
            total = sum(w * x for w, x in agreeing)
            count = {"sum": 1.0, "mean": float(len(agreeing)), "weighted_mean": float(sum(w for w, _ in agreeing))}
            entries.append(total / (count[recipe.combine] or 1.0))
        merged[name] = base + recipe.scale * torch.tensor(entries).reshape(base.shape)
    return merged


@pytest.mark.parametrize("trim", ["global", "tensor"])
@pytest.mark.parametrize("election", ["unweighted", "weighted", "frequency"])
@pytest.mark.parametrize("combine", ["mean", "weighted_mean", "sum", "max"])
def test_it_is_the_formula(trim: Any, election: Any, combine: Any) -> None:
    for density, weights, chunk in (
        (0.2, (1.6, 0.2), 16),
        (0.5, (1.0, 1.0), 1),
        (1.0, (0.5, 2.0), 10**6),
        (0.5, (1.0, -0.5), 16),
    ):
        recipe = Ties(density, weights, 0.7, trim, election=election, combine=combine)
        fake = Fake(models(), chunk)
        expected = naive(fake, recipe, dict.fromkeys(fake.names, density))
        for name, merged in run(recipe, fake).items():
            torch.testing.assert_close(merged, expected[name], atol=1e-6, rtol=1e-5, msg=f"{name} at density {density}")


def test_the_donors_density_may_be_another() -> None:
    """Each task vector is trimmed to its share; the signs and the mean are those of what is left."""
    for trim in ("global", "tensor"):
        fake, recipe = Fake(models()), Ties(0.2, trim=trim, donor_density=0.6)  # type: ignore[arg-type]
        vlm, donor = (naive_trim(fake.tau(k), share, trim == "global") for k, share in (("vlm", 0.2), ("donor", 0.6)))
        for name, merged in run(recipe, fake).items():
            pairs = zip(vlm[name].flatten().tolist(), donor[name].flatten().tolist(), strict=True)
            agreeing = [[x for x in pair if x * sum(pair) > 0] for pair in pairs]
            mean = torch.tensor([sum(xs) / max(1, len(xs)) for xs in agreeing]).reshape(merged.shape)
            torch.testing.assert_close(merged, fake.models["vlm_base"][name] + mean, atol=1e-6, rtol=1e-5)
    with pytest.raises(RecipeError, match="donor_density"):
        Ties(0.2, donor_density={"mlp": 0.5})


def test_a_density_over_depth_when_every_tensor_has_its_threshold() -> None:
    fake, recipe = Fake(models()), Ties([0.2, 0.6], trim="tensor")
    shares = {name: (0.2, 0.4, 0.6)[int(name.split(".")[2])] for name in fake.names}
    expected = naive(fake, recipe, shares)
    for name, merged in run(recipe, fake).items():
        torch.testing.assert_close(merged, expected[name], atol=1e-6, rtol=1e-5)
    with pytest.raises(RecipeError, match="trim: tensor"):
        Ties([0.2, 0.6])


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_per_tensor_it_is_pefts(density: float) -> None:
    """On values that all differ: PEFT breaks ties at the threshold by position."""
    fake = Fake(models(low=False, shapes={"model.layers.0.mlp.up_proj.weight": (20, 10)}))
    (name,) = fake.names
    taus, weights = [fake.tau(key)[name] for key in ("vlm", "donor")], torch.tensor([1.6, 0.2])
    expected = merge_utils.ties([tau.clone() for tau in taus], weights, density)
    merged = run(Ties(density, (1.6, 0.2), trim="tensor"), fake)[name]
    torch.testing.assert_close(merged, fake.models["vlm_base"][name] + expected)


def test_the_threshold_does_not_depend_on_chunks() -> None:
    for trim in ("global", "tensor"):
        found = [Ties(0.3, trim=trim).prepare(Fake(models(), chunk)).thresholds for chunk in (1, 7, 10**6)]
        assert found[0] == found[1] == found[2]
    assert set(found[0]) == set(models()["vlm"])


def test_equal_magnitudes_at_the_threshold_are_kept_together() -> None:
    tau = torch.tensor([3.0, 1.0, -1.0, 1.0, 0.5, 0.0])
    zero = {"model.layers.0.mlp.up_proj.weight": torch.zeros(6)}
    given_ = {"model.layers.0.mlp.up_proj.weight": tau}
    merged = run(Ties(2 / 6), Fake({"vlm": given_, "vlm_base": zero, "donor": zero, "donor_base": zero}))
    assert merged["model.layers.0.mlp.up_proj.weight"].tolist() == [3, 1, -1, 1, 0, 0]


def test_identities() -> None:
    """Without the donor's task vector, untrimmed, TIES is the VLM; at scale zero it is the VLM's base."""
    found = models()
    alone = Fake({**found, "donor": found["donor_base"]})
    for name, merged in run(Ties(1.0), alone).items():
        torch.testing.assert_close(merged, found["vlm"][name], atol=1e-6, rtol=0)
    for name, merged in run(Ties(scale=0.0), Fake(found)).items():
        assert merged.equal(found["vlm_base"][name])


def test_inputs_are_not_changed() -> None:
    fake = Fake(models(), 10**6)
    pieces = {key: model[fake.names[0]].clone() for key, model in fake.models.items()}
    Ties().prepare(fake).apply(pieces, fake.context(fake.names[0]))
    assert all(piece.equal(fake.models[key][fake.names[0]]) for key, piece in pieces.items())


@pytest.mark.parametrize("options", [{"density": 0.0}, {"density": 1.5}, {"weights": (float("nan"), 1.0)}])
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        Ties(**options)


def test_the_recipe_validates() -> None:
    found = TypeAdapter(Ties).validate_python({"weights": [1.6, {"mlp": 0.2, "attention": 0.1}], "trim": "tensor"})
    assert found.weights == (1.6, {"mlp": 0.2, "attention": 0.1})
    assert TypeAdapter(Ties).dump_python(Ties(), mode="json")["weights"] == [1.0, 1.0]
