"""The package as it is installed: a wheel that works far from the checkout, and a source archive that builds it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import vlmgraft

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that succeeds."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    ran = subprocess.run([*map(str, command)], cwd=cwd, env=clean | environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout by pip."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT, cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_holds_what_it_should(wheel: Path) -> None:
    assert wheel.name == f"vlmgraft-{vlmgraft.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 15_000_000
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"vlmgraft-{vlmgraft.__version__}.dist-info"
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE", "vlmgraft/py.typed"} <= names
    assert {f"vlmgraft/lab/weights/{model}/model.safetensors" for model in ("base", "vlm", "donor")} <= names
    ours = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == ours
    assert not [name for name in names if "__pycache__" in name or name.startswith(("tests", "docs", "benchmarks"))]


def test_the_wheel_runs_the_demo_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=work)
    where = "import sys, vlmgraft; print(vlmgraft.__file__, vlmgraft.__version__)"
    # -P, and PYTHONPATH before an editable install: only the wheel can be what is imported
    said = run(sys.executable, "-c", where, cwd=work, PYTHONPATH=str(site)).split()
    assert said == [str(site / "vlmgraft" / "__init__.py"), vlmgraft.__version__]
    script = site / "bin" / "vlmgraft"
    assert run(script, "--version", cwd=work, PYTHONPATH=str(site)) == f"vlmgraft {vlmgraft.__version__}\n"
    run(script, "demo", "--quick", cwd=work, PYTHONPATH=str(site))
    rows = {row["method"]: row for row in map(json.loads, (work / "demo" / "results.jsonl").read_text().splitlines())}
    assert rows["merged folder, reloaded"]["reasoning"]["mean"] > rows["VLM"]["reasoning"]["mean"]
    recipe = (work / "demo" / "recipe.yaml").read_text()
    assert str(site) in recipe and str(ROOT) not in recipe
    assert (work / "demo" / "merged" / "receipt.json").is_file()


def test_the_source_archive_holds_sources_only(tmp_path: Path) -> None:
    code = f"from hatchling.build import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    made = tmp_path / run(sys.executable, "-c", code, cwd=ROOT).strip()
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "NOTICE", "README.md", "src/vlmgraft/py.typed"} <= names
    assert not [name for name in names if "_cache/" in name or name.endswith((".pyc", ".whl"))]
    assert made.stat().st_size < 15_000_000
