"""Supply chain and safety: no pickles, no code of others' repositories, pinned packages, servers on loopback."""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from nb_utils.record import tables
from workflow import audit

ROOT = Path(__file__).resolve().parents[1]
CODE = sorted(path for part in ("nb_utils", "book", "workflow", "benchmarks") for path in (ROOT / part).rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "book").rglob("*.ipynb"))
UNSAFE = re.compile(
    r"^(torch\.load|(c?pickle|cloudpickle|dill|joblib|marshal|shelve)\.\w+|pd\.read_pickle|yaml\.(load|unsafe_load)"
    r"|eval|exec|os\.system|os\.popen)$"
)
DATA = ("saes", "data", "results/tables", "book/_assets")


def sources():
    for path in CODE:
        yield path, path.read_text()
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        lines = "\n".join(cell.source for cell in cells if cell.cell_type == "code").splitlines()
        yield path, "\n".join(line for line in lines if not line.startswith(("%", "!")))


def complaints(text):
    """List the calls in a piece of code that could run what is not ours."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            remote = given.get("trust_remote_code", "False") != "False"
            shell = given.get("shell", "False") != "False" or given.get("allow_pickle", "False") != "False"
            if UNSAFE.match(name) or remote or shell:
                found.append(f"{name}, line {node.lineno}")
    return found


def pinned(file):
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


def test_no_code_reads_pickles_or_runs_what_is_not_ours():
    for path, text in sources():
        assert not complaints(text), path


@pytest.mark.parametrize(
    "text",
    [
        "torch.load('x.pt', weights_only=True)", "pickle.loads(data)", "eval(text)", "yaml.load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)", "subprocess.run(words, shell=True)",
        "np.load(path, allow_pickle=True)", "AutoModel.from_pretrained(name, trust_remote_code=wanted)",
    ],
)  # fmt: skip
def test_such_a_call_is_found(text):
    assert complaints(f"def f():\n    return {text}")


def test_models_by_name_are_loaded_from_safetensors_only():
    """Of two calls for a model, one reads the GGUF whose hash is pinned, the other safetensors."""
    text = (ROOT / "nb_utils/models.py").read_text()
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    loads = [c for c in calls if ast.unparse(c.func) == "AutoModelForCausalLM.from_pretrained"]
    given = [{word.arg: ast.unparse(word.value) for word in call.keywords} for call in loads]
    assert len(given) == 2
    assert all(words.get("use_safetensors") == "True" or "gguf_file" in words for words in given)


def test_shipped_weights_are_safetensors_with_the_hash_that_their_card_and_the_table_state():
    hashes = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (ROOT / "saes").rglob("*.safetensors")}
    for weights, digest in hashes.items():
        assert digest in (weights.parent / "README.md").read_text(), weights
    for model in sorted({path.parents[1] for path in (ROOT / "saes").glob("*/*/*.safetensors")}):
        measured = tables.load("saes", model.name).set_index("layer")["sae_sha256"]
        shipped = {int(path.parent.name.split(".")[1]): hashes[path] for path in model.glob("*/*.safetensors")}
        assert shipped == measured.to_dict(), model
    kinds = {path.suffix for part in DATA for path in (ROOT / part).rglob("*") if path.is_file()}
    assert not kinds & {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".h5"}


@pytest.mark.parametrize(
    "file", ["requirements.txt", "constraints.txt", "benchmarks/requirements.txt", "workflow/requirements-data.txt"]
)
def test_every_package_is_pinned_to_one_version(file):
    for package in pinned(file):
        (one,) = package.specifier
        assert one.operator == "==" and "*" not in one.version and not package.url, package


def minors():
    """List the versions of Python that will do."""
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    return [f"3.{minor}" for minor in range(30) if f"3.{minor}.9" in SpecifierSet(asked)]


@pytest.mark.parametrize("python", minors())
def test_the_constraints_hold_every_package_that_the_requirements_bring_along(python):
    """On every version of Python, as far as the packages that are installed say what they need there."""
    versions = {canonicalize_name(package.name): str(package.specifier) for package in pinned("constraints.txt")}
    todo, seen = pinned("requirements.txt"), set()
    for package in todo:
        assert versions[canonicalize_name(package.name)] == str(package.specifier), package
    while todo:
        package = todo.pop()
        name = canonicalize_name(package.name)
        assert name in versions, f"{name} is not in constraints.txt: run make constraints"
        try:
            suits = SpecifierSet(metadata.metadata(name).get("Requires-Python") or "")
        except metadata.PackageNotFoundError:  # needed on another version than this one
            continue
        assert f"{python}.9" in suits, f"{name} on {python}"
        extras = package.extras or {""}
        for text in metadata.requires(name) or [] if (name, *sorted(extras)) not in seen else []:
            other, here = Requirement(text), {"python_version": python, "python_full_version": f"{python}.9"}
            if other.marker is None or any(other.marker.evaluate(here | {"extra": extra}) for extra in extras):
                todo.append(other)
        seen.add((name, *sorted(extras)))
    assert len({name for name, *_ in seen}) > 100


def test_actions_of_the_hosted_ci_are_pinned_to_a_commit():
    used = re.findall(r"uses: (.+)", (ROOT / ".github/workflows/ci.yml").read_text())
    assert used and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}  # v[\d.]+", action) for action in used), used


def test_make_installs_nothing_that_is_not_pinned():
    lines = [line for line in (ROOT / "Makefile").read_text().splitlines() if "pip install" in line]
    assert len(lines) >= 5
    for line in lines:
        what = line.split("pip install")[1].replace("--quiet", "").replace("--disable-pip-version-check", "")
        assert re.search(r"-c constraints\.txt|requirements-(?:data|tools)\.txt|==\d|--no-deps -e \.", what), line


def test_make_takes_the_newest_python_that_runs_and_will_do(tmp_path):
    """Stand-ins that say another version; the newest is a command that has nothing behind it, as pyenv's may be."""
    lies = "import sys; sys.version_info = ({}); exec(sys.argv.pop(1))"
    said = {"python3.12": "3, 12", "python3.11": "3, 11, 7", "python3": "3, 14", "python": "2, 7"}
    for name, version in said.items():
        run = f"shift; exec '{sys.executable}' -c '{lies.format(version)}' \"$@\""
        (tmp_path / name).write_text(f"#!/bin/sh\n{run}\n")
    (tmp_path / "python3.13").write_text("#!/bin/sh\nexit 127\n")
    for path in list(tmp_path.iterdir()):
        path.chmod(0o755)
    (tmp_path / "show.mk").write_text("include Makefile\nshow:\n\techo $(PYTHON)\n")

    def taken():
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = ["make", "-s", "-f", tmp_path / "show.mk", "show"]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True).stdout.strip()

    assert taken() == "python3.12"
    for name in ("python3.12", "python3.11"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 127\n")
    assert taken() == ""  # one is too new, one too old


def test_the_hosted_ci_runs_every_version_of_python_that_will_do():
    matrix = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    assert minors() == matrix["python"]
    assert all(f"python{version}" in (ROOT / "Makefile").read_text() for version in minors())


def test_servers_listen_on_loopback_and_keep_their_token():
    makefile = (ROOT / "Makefile").read_text()
    servers = [line for line in makefile.splitlines() if re.search(r"http\.server|jupyter lab", line)]
    assert len(servers) == 2
    assert "--bind 127.0.0.1" in servers[0] and "--ip 127.0.0.1" in servers[1]
    everything = "\n".join([makefile, *(text for _, text in sources())])
    open_doors = r"0\.0\.0\.0|IdentityProvider\.token|--no-auth|allow_origin|ServerApp\.(token|password)"
    assert not re.search(open_doors, everything)


def test_an_audit_names_flaws_and_never_calls_sound_what_it_could_not_ask_for():
    flaw = {"id": "PYSEC-1", "fix_versions": ["2.20.0"], "aliases": [], "description": ""}
    bad = {"name": "requests", "version": "2.19.0", "vulns": [flaw]}
    good, unknown = {"name": "idna", "version": "3.10", "vulns": []}, {"name": "torch", "skip_reason": "not found"}
    assert audit.judge({"dependencies": [good]}) == (0, "None of 1 packages has a known vulnerability.")
    code, said = audit.judge({"dependencies": [good, bad, unknown]})
    assert code == 1 and "requests 2.19.0: PYSEC-1, mended in 2.20.0" in said
    code, said = audit.judge({"dependencies": [good, unknown]})
    assert code == 2 and "1 of 2 packages could not be audited" in said


@pytest.mark.parametrize(
    "prints, code, said",
    [
        (json.dumps({"dependencies": [{"name": "a", "skip_reason": "not found"}], "fixes": []}), 2, "not reachable"),
        ("", 2, "Nothing was audited"),
    ],
)
def test_the_audit_command_says_in_one_line_when_there_is_no_data(tmp_path, prints, code, said):
    program = tmp_path / "pip-audit"
    program.write_text('#!/bin/sh\ncat "$0.said"\n')  # a path with a space can't stand behind #!
    program.with_name("pip-audit.said").write_text(f"{prints}\n")
    program.chmod(0o755)
    done = subprocess.run([sys.executable, "-m", "workflow.audit", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and said in done.stderr and done.stderr.count("\n") == 1
