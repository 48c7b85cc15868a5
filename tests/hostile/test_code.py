"""Nothing opens a pickle, loads YAML with tags, or lets a checkpoint's code run; chat templates are sandboxed."""

from __future__ import annotations

import ast
import re
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vlmgraft
from vlmgraft.data.questions import Question
from vlmgraft.errors import VlmgraftError
from vlmgraft.hf import templates
from vlmgraft.hf.batches import encode
from vlmgraft.hf.models import load_processor, load_vlm

SOURCE = Path(vlmgraft.__file__).parent
PICKLES = ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
READERS = ("AutoConfig", "AutoProcessor", "AutoTokenizer", "auto")


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                yield f"{file.relative_to(SOURCE)}:{node.lineno}", ast.unparse(node.func), node


def test_no_pickle_is_ever_opened() -> None:
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & set(PICKLES), file
    for where, name, node in calls():
        assert name not in ("torch.load", "pandas.read_pickle", "eval", "exec", "__import__"), where
        if name in ("numpy.load", "np.load"):
            assert not any(one.arg == "allow_pickle" and getattr(one.value, "value", 1) for one in node.keywords), where


def test_yaml_is_loaded_without_tags() -> None:
    """Texts from outside go through `parse_yaml`; `yaml.safe_load` reads our own recipe of the lab only."""
    found = [(where, name) for where, name, _ in calls() if re.match(r"yaml\.\w*load\w*$", name)]
    assert {(where.partition(":")[0], name) for where, name in found} == {
        ("lab/demo.py", "yaml.safe_load"),
        ("storage/yaml_text.py", "yaml.safe_load"),
    }


def test_every_model_is_read_with_its_code_refused() -> None:
    found = [(where, name, node) for where, name, node in calls() if name.endswith(".from_pretrained")]
    assert len(found) >= 4
    for where, name, node in found:
        given = {one.arg: getattr(one.value, "value", None) for one in node.keywords}
        if name != "PreTrainedTokenizerFast.from_pretrained":  # a class of transformers itself
            assert given.get("trust_remote_code") is False, where
        if name.startswith("auto."):
            assert given.get("use_safetensors") is True, where


BAD_TEMPLATES = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
    "subclasses": "{{ ().__class__.__base__.__subclasses__() }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "changes": "{{ messages.append(1) }}",
    "range": "{% for n in range(1000000000) %}x{% endfor %}",
    "syntax": "{% for %}",
    "raises": "{{ raise_exception('no') }}",
    "divides": "{{ 1 / 0 }}",
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a long text": "{{ 'x' * 10 ** 12 }}",
    "a text beyond the limit": "{{ ('x' * (3 * 10 ** 9))|length }}",
    "a text that doubles": "{% set n = namespace(s='x') %}{% for a in range(60) %}{% set n.s = n.s~n.s %}{% endfor %}",
    "a list that doubles": "{% set n = namespace(s=[1]) %}{% for a in range(60) %}{% set n.s = n.s+n.s %}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


def peak() -> int:
    """Bytes that this process had at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.fixture(scope="module")
def processor(trio: Path) -> Any:
    return load_processor(trio / "vlm")


@pytest.mark.parametrize("template", BAD_TEMPLATES)
def test_templates_are_sandboxed(
    template: str, processor: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(processor, "chat_template", BAD_TEMPLATES[template])
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    monkeypatch.setattr(templates, "MEMORY", 50_000_000)
    monkeypatch.chdir(tmp_path)
    before, limits = peak(), resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(VlmgraftError, match=r"chat template cannot be rendered .*take another release") as said:
        encode(processor, [Question("what?")])
    assert said.value.exit_code == 2 and not list(tmp_path.iterdir())
    assert peak() - before < 200_000_000 and resource.getrlimit(resource.RLIMIT_AS) == limits
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_remote_code_is_not_asked_about(trio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers, left to itself, asks at the terminal, and runs the code after a y."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    (tmp_path / "model.safetensors").symlink_to(trio / "vlm" / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}')
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(VlmgraftError, match=r"auto_map .*never run; take"):
        load_vlm(tmp_path)
    assert not (tmp_path / "ran").exists()
