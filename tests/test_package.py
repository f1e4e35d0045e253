"""What users install: the wheel and the sdist, outside the checkout; names, versions, messages."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import kvpress
from kvpress import errors, ops
from kvpress.ops import build_cpu, versions

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = SETTINGS["tool"]["setuptools"]["package-dir"]
MADE = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis",
    ".coverage*",
)  # fmt: skip
BUILD = "import sys; from setuptools import build_meta as b; print(b.build_{0}(sys.argv[1]))"
PROGRAM = """
import json, pathlib, sys
sys.path.append(sys.argv[1])
import helpers, kvpress, kvpress.csrc, kvpress.policies, torch
from kvpress import ops
from kvpress.ops import build_cpu
for module in (kvpress, kvpress.csrc, kvpress.policies):
    assert pathlib.Path(module.__path__[0]).is_relative_to(sys.prefix), module
model, ids = helpers.tiny(initializer_range=0.3), helpers.prompt(2, 72)
tokens = {}
for recipe in ("full", "d2o:budget=0.5", "sale:threshold=0.01,least=1+h2o+quant:residual=4"):
    with kvpress.attach(model, recipe) as engine:
        cache = engine.new_cache(max_new_tokens=4)
        tokens[recipe] = helpers.greedy(model, ids, torch.ones_like(ids), 4, cache).tolist()
library = str(build_cpu.build()) if ops.backends()["cpu"] == "cpu" else ""
print(json.dumps({"tokens": tokens, "library": library}))
"""


def call(*command: object, where: Path, **variables: str) -> str:
    """What a command prints on stdout. Fails with what it said."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=where, env={**os.environ, **variables}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist, made in a copy of the checkout, where no older build can help."""
    copy, out = tmp_path_factory.mktemp("copy") / "tree", tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, copy, ignore=MADE)
    call(sys.executable, "-c", BUILD.format("sdist"), out, where=copy)
    (packed,) = out.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(out, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return out / packed.name.removesuffix(".tar.gz")


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made from the sdist."""
    copy, out = tmp_path_factory.mktemp("copy") / "tree", tmp_path_factory.mktemp("wheel")
    shutil.copytree(sdist, copy)
    call(sys.executable, "-c", BUILD.format("wheel"), out, where=copy)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="session")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel, which shares everything else with this one.

    The path file names folders only: the editable install of this environment is not seen.
    """
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    call(
        sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python,
        "install", "--quiet", "--no-deps", "--no-index", wheel, where=folder,
    )  # fmt: skip
    (packages,) = folder.glob("lib/python*/site-packages")
    shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "shared.pth").write_text("\n".join(shared))
    return python


def sources() -> set[str]:
    """Every file of the packages in the checkout, by its place below `kvpress/`."""
    found = set()
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT / folder)
            if path.is_file() and not {"__pycache__", "results"} & set(inside.parts):
                found.add("/".join((*package.split("."), *inside.parts)))
    return found


def test_the_wheel_holds_every_source(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == sources()


def test_the_sdist_holds_all_that_the_tests_need(sdist: Path) -> None:
    wanted = {
        path.relative_to(ROOT)
        for folder in ("bench", "csrc", "docs", "kvpress", "policies", "scripts", "tests", ".ci")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    alone = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml")
    wanted |= {Path(name) for name in alone}
    held = {path.relative_to(sdist) for path in sdist.rglob("*") if path.is_file()}
    assert not wanted - held
    assert os.access(sdist / "scripts" / "test", os.X_OK)


def test_the_wheel_compiles_and_decodes_as_the_references_do(fresh: Path, tmp_path: Path) -> None:
    """The key of a build is made of the sources: the same key means that none is missing."""
    command = (fresh, "-I", "-c", PROGRAM, ROOT / "tests" / "tools")
    wanted = json.loads(call(*command, where=tmp_path, KVPRESS_BACKEND="reference"))
    given = json.loads(call(*command, where=tmp_path, KVPRESS_BACKEND=""))
    assert given["tokens"] == wanted["tokens"]
    if ops.backends()["cpu"] == "cpu":
        assert given["library"] == str(build_cpu.build())


def test_the_sdist_runs_its_tests(sdist: Path, fresh: Path) -> None:
    """All can be collected; some run, with the wheel."""
    pytest_of_sdist = (fresh, "-I", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    collected = call(*pytest_of_sdist, "--collect-only", where=sdist)
    assert int(re.search(r"(\d+) tests collected", collected)[1]) > 1000
    call(*pytest_of_sdist, "tests/test_architecture.py", "tests/policy/test_budget.py", where=sdist)


def test_python_m_kvpress_and_its_version(fresh: Path, tmp_path: Path) -> None:
    said = call(fresh, "-m", "kvpress", "--version", where=tmp_path)
    assert said.split() == ["kvpress-engine", kvpress.__version__]
    assert "Usage: kvpress" in call(fresh, "-m", "kvpress", "--help", where=tmp_path)
    assert call(fresh.with_name("kvpress"), "--version", where=tmp_path) == said


def test_the_metadata_says_who_and_what(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    text = archive.read(name).decode()
    for field in ("Author", "Keywords", "Classifier", "License-Expression", "Requires-Python"):
        assert f"\n{field}: " in text, field
    assert f"\nVersion: {kvpress.__version__}\n" in text
    for minor in range(10, 14):
        assert f"\nClassifier: Programming Language :: Python :: 3.{minor}\n" in text


def test_public_names_are_listed_and_have_homes() -> None:
    assert set(kvpress.__all__) <= set(dir(kvpress))
    assert all(getattr(kvpress, name) is not None for name in kvpress.__all__)
    raised = {name for name in vars(errors) if name.endswith("Error")}
    assert raised <= set(kvpress.__all__)
    tree = ast.parse(Path(kvpress.__file__).read_text(encoding="utf-8"))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    homes = {
        alias.name: line.module.removeprefix("kvpress.")
        for line in typed.body
        for alias in line.names
    }
    assert homes == kvpress._HOMES
    assert set(kvpress.__all__) == {"__version__", *homes, *raised}


def test_help_shows_what_users_call() -> None:
    shown = call(sys.executable, "-c", "import kvpress; help(kvpress)", where=ROOT, PAGER="cat")
    assert "attach(" in shown and "class Engine" in shown and "class CacheError" in shown


def test_proven_versions_are_those_of_the_settings_and_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, (oldest, newest) in versions.PROVEN.items():
        assert f"{name} {oldest} to {newest}" in readme
    assert f'"transformers>={versions.PROVEN["transformers"][0]},<6"' in (
        ROOT / "pyproject.toml"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("version", "word"),
    [("2.13.1+cpu", ""), ("2.10.0", ""), ("2.14.0", "newer"), ("3.0", "newer"), ("2.9.1", "older")],
)
def test_other_versions_are_noticed(
    version: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "installed", lambda name: version if name == "torch" else None)
    said = versions.unproven("torch")
    assert word in said and bool(said) == bool(word)


def test_newer_versions_are_said_once() -> None:
    program = (
        "import torch; from kvpress import ops; from kvpress.ops import versions"
        "; versions.PROVEN['torch'] = ('1.0', '1.1')"
        "; x = torch.ones(1, 1, 1, 4); ops.match_keys(x, x, torch.ones(1, 1, 1, dtype=torch.bool))"
        "; ops.channel_scores(x, x, torch.ones(1, 1, 1, dtype=torch.bool))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is newer than the engine knows") == 1
