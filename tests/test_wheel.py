"""The package as it is installed: a wheel that works far from the checkout, and a source archive that builds it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import vlmgraft

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
QUICK = ("--set", "method.steps=20")
"""For the test's time; `init` has counted the 192 questions of the quick demo."""


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


def test_a_strangers_first_hour_with_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """Far from the checkout, with the README's words alone: the demo, an own recipe from `init`, what it would take,
    the merge, its check, a report and a model card."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=work)
    where = "import sys, vlmgraft; print(vlmgraft.__file__, vlmgraft.__version__)"
    # -P, and PYTHONPATH before an editable install: only the wheel can be what is imported
    said = run(sys.executable, "-c", where, cwd=work, PYTHONPATH=str(site)).split()
    assert said == [str(site / "vlmgraft" / "__init__.py"), vlmgraft.__version__]
    script = site / "bin" / "vlmgraft"
    assert run(script, "--version", cwd=work, PYTHONPATH=str(site)).startswith(f"vlmgraft {vlmgraft.__version__}\n")
    run(script, "demo", "--quick", cwd=work, PYTHONPATH=str(site))
    rows = {row["method"]: row for row in map(json.loads, (work / "demo" / "results.jsonl").read_text().splitlines())}
    assert rows["merged folder, reloaded"]["reasoning"]["mean"] > rows["VLM"]["reasoning"]["mean"]
    recipe = (work / "demo" / "recipe.yaml").read_text()
    assert str(site) in recipe and str(ROOT) not in recipe
    assert (work / "demo" / "merged" / "receipt.json").is_file()
    trio = Path(run(script, "lab", "path", cwd=work, PYTHONPATH=str(site)).strip())
    pair = ("--vlm", trio / "vlm", "--donor", trio / "donor", "--donor-base", trio / "base")
    steps: dict[str, tuple[str | Path, ...]] = {
        "vlmgraft init --vlm": ("init", *pair, "--data", "demo/data/calibration.jsonl"),
        "vlmgraft inspect recipe.yaml": ("inspect", "recipe.yaml"),
        "vlmgraft merge recipe.yaml --out merged --dry-run": ("merge", "recipe.yaml", "--out", "merged", "--dry-run"),
        "vlmgraft merge recipe.yaml --out merged ": ("merge", "recipe.yaml", "--out", "merged"),
        "vlmgraft verify merged": ("verify", "merged"),
        "report](docs/report.md)": ("report", "merged", "demo", "--out", "report.html"),
    }
    for words, arguments in steps.items():
        assert words in readme, f"the README does not say it: {words}"
        quick = QUICK if arguments[0] == "merge" else ()
        run(script, *arguments, *quick, cwd=work, PYTHONPATH=str(site), HF_HUB_OFFLINE="1")
    assert {"gates.json", "training.jsonl"} <= {path.name for path in (work / "merged" / "gates").iterdir()}
    page, card = ((work / name).read_text() for name in ("report.html", "merged/README.md"))
    assert all(f'<section id="{name}"' in page for name in ("tradeoff", "gates", "receipt", "recipe"))
    assert "| KL from the VLM on" in card and "library_name: transformers" in card
    texts = [path for path in (work / "merged").rglob("*") if path.suffix in (".md", ".json", ".jsonl", ".yaml")]
    said = "".join(path.read_text() for path in texts)
    assert str(work) not in said and str(site) not in said, "no file says where anything lies here"


def test_the_source_archive_holds_sources_only(tmp_path: Path) -> None:
    code = f"from hatchling.build import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    made = tmp_path / run(sys.executable, "-c", code, cwd=ROOT).strip()
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "NOTICE", "README.md", "src/vlmgraft/py.typed"} <= names
    assert not [name for name in names if "_cache/" in name or name.endswith((".pyc", ".whl"))]
    assert not [name for name in names if name.startswith(("tests", "docs", "benchmarks", "experiments", "recipes"))]
    assert made.stat().st_size < 15_000_000


def test_the_container_without_a_daemon(tmp_path: Path) -> None:
    """The Dockerfile's own steps in a folder: what it copies, the README's install of it (without the dependencies,
    which are here), and its entry point."""
    steps = [line.split(maxsplit=1) for line in (ROOT / "Dockerfile").read_text().splitlines() if line[:1].isupper()]
    assert [word for word, _ in steps] == ["FROM", "COPY", "COPY", "RUN", "WORKDIR", "ENTRYPOINT"]
    assert steps[0][1].startswith("python:3.1")
    ignored = {name.rstrip("/") for name in (ROOT / ".dockerignore").read_text().split()}
    for *names, target in (rest.split() for word, rest in steps if word == "COPY"):
        for name in names:
            place = tmp_path / target.strip("/")
            place = place if (ROOT / name).is_dir() else place / name  # COPY puts a folder's content there, and a file
            place.parent.mkdir(parents=True, exist_ok=True)
            assert name not in ignored
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, place)
    install = steps[3][1]
    assert install == "pip install --no-cache-dir /src" and "\npip install .\n" in (ROOT / "README.md").read_text()
    words = install.replace("/src", str(tmp_path / "src")).split()[2:]
    bare = ("--no-deps", "--no-build-isolation", "--target", tmp_path / "site")
    run(sys.executable, "-m", "pip", "install", "-q", *bare, *words, cwd=tmp_path)
    (entry,) = json.loads(steps[5][1])
    said = run(tmp_path / "site" / "bin" / entry, "lab", "path", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert Path(said.strip()) == tmp_path / "site" / "vlmgraft" / "lab" / "weights"
