"""The other distribution that owns the import name is noticed, with a message that helps."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def try_import(where: Path) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; sys.path.insert(0, {str(where)!r}); import kvpress; print(kvpress.__file__)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=where)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "kvpress", tmp_path / "kvpress")
    return tmp_path


def test_alone_it_imports(copy: Path) -> None:
    done = try_import(copy)
    assert done.returncode == 0, done.stderr
    assert str(copy) in done.stdout


def test_files_of_the_other_distribution_are_noticed(copy: Path) -> None:
    (copy / "kvpress" / "presses").mkdir()
    (copy / "kvpress" / "presses" / "__init__.py").touch()
    done = try_import(copy)
    assert done.returncode != 0
    assert "ImportClashError" in done.stderr and "pip uninstall -y kvpress" in done.stderr


def test_an_installed_distribution_of_that_name_is_noticed(copy: Path) -> None:
    (copy / "kvpress-0.5.5.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: kvpress\nVersion: 0.5.5\n"
    (copy / "kvpress-0.5.5.dist-info" / "METADATA").write_text(metadata)
    done = try_import(copy)
    assert done.returncode != 0
    assert "ImportClashError" in done.stderr and "virtual environment" in done.stderr
