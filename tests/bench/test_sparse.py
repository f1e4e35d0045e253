"""`kvpress bench sparse` and `kvpress calibrate`: states of any length, totals, commands."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress.bench.calibrate import commands
from kvpress.bench.common import models
from kvpress.bench.sparse import measure
from kvpress.bench.sparse.captured import Captured, CaptureError
from typer.testing import CliRunner

from kvpress.cli import app
from kvpress.hf import calibration


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Any:
    return models.load(str(tiny_model), device="cpu")[0]


def ids(tokens: int) -> torch.Tensor:
    return torch.randint(2, 90, (1, tokens), generator=torch.Generator().manual_seed(4))


def test_parts_are_turned_to_where_they_stand(tiny: Any) -> None:
    text = ids(300)
    captured = Captured(tiny, [text[:, :150], text[:, 150:]], {0})
    whole = Captured(tiny, [text], {0})  # the states of layer 0 depend on no context
    for tokens in (80, 150, 260, 300):
        given = captured.of_length(0, tokens)
        for one, other in zip(given[:3], whole.layers[0], strict=False):
            torch.testing.assert_close(one, other[:, :, :tokens], rtol=1e-4, atol=1e-5)
    with pytest.raises(CaptureError, match="read more parts"):
        captured.of_length(0, 301)


def test_beyond_the_context_positions_turn_as_in_yarn(tiny: Any) -> None:
    context = tiny.config.max_position_embeddings
    try:
        tiny.config.max_position_embeddings = 100
        text = ids(300)
        captured = Captured(tiny, [text[:, :100], text[:, 100:200], text[:, 200:]], {0})
        near, far = captured.of_length(0, 100), captured.of_length(0, 300)
        # Attention is sharper by YaRN's factor; where nothing turns, that is all there is.
        factor = (0.1 * torch.tensor(3.0).log() + 1).item()
        torch.testing.assert_close(far.key_BHQD[:, :, 0], near.key_BHQD[:, :, 0] * factor)
        torch.testing.assert_close(
            far.key_BHQD.norm(dim=-1),
            Captured(tiny, [text], {0}).layers[0][1].norm(dim=-1) * factor,
        )
        assert not torch.allclose(far.key_BHQD[:, :, 50], near.key_BHQD[:, :, 50] * factor)
        tiny.config.rope_parameters["rope_type"] = "linear"
        with pytest.raises(CaptureError, match="at most 100 tokens"):
            captured.of_length(0, 300)
    finally:
        tiny.config.rope_parameters["rope_type"] = "default"
        tiny.config.max_position_embeddings = context


def test_a_model_without_rotation_has_its_own_length(tiny: Any) -> None:
    text = ids(100)
    captured = Captured(tiny, [text, text], {0})
    captured._model = torch.nn.Module()
    captured._model.base_model = None
    assert captured.of_length(0, 100).key_BHQD.shape[2] == 100
    with pytest.raises(CaptureError, match="up to 100 tokens"):
        captured.of_length(0, 101)


def test_totals_are_of_layers_in_the_same_round() -> None:
    rows = [
        measure.Row(0, 100, [4.0, 8.0, 6.0], [1.0, 1.0, 1.0], [1.0, 3.0, 2.0], 0.2, 0.01, 8),
        measure.Row(9, 100, [2.0, 2.0, 2.0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], 0.4, 0.03, 8),
    ]
    total = measure.total(rows)
    assert (total.exact, total.estimate, total.attend) == (8.0, 1.5, 2.5)
    assert total.gain == 2.0 and (total.low, total.high) == (2.0, 2.0)
    assert (total.density, total.error) == (pytest.approx(0.3), pytest.approx(0.02))


def test_the_command(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "sparse.json"
    words = ["bench", "sparse", "--model", str(tiny_model), "--policy", "sale:threshold=1.0"]
    more = ["--read", "300", "--tokens", "300", "--tokens", "500", "--layers", "2"]
    result = CliRunner().invoke(app, [*words, *more, "--rounds", "1", "--out", str(out)])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    found = [(row["tokens"], row["layer"]) for row in rows]
    assert found == [(300, 0), (300, 2), (500, 0), (500, 2)]
    assert all(0 < row["density"] < 1 and row["error"] > 0 for row in rows)
    page, picture = tmp_path / "sparse.html", tmp_path / "sparse.svg"
    for given in (
        ["report", str(out), "--out", str(page)],
        ["plot", str(out), "--out", str(picture)],
    ):
        shown = CliRunner().invoke(app, given)
        assert shown.exit_code == 0, shown.output
    assert page.read_text().count("<tr>") == 2 + 1 + 4 + 1 and "<svg" in picture.read_text()
    refused = CliRunner().invoke(app, [*words[:4], "--policy", "full", *more])
    assert refused.exit_code != 0 and "computes all" in str(refused.exception)


def umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_a_length_that_never_paid_is_not_called_the_one_from_which_it_pays(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tau_LN = torch.zeros(1, 2)
    commands.show(tau_LN, {512: 0.9, 1024: 1.5, 2048: 0.8}, 4096, Path("x.safetensors"))
    said = capsys.readouterr().out
    assert "not faster" in said and "4,096" not in said
    commands.show(tau_LN, {512: 0.9, 1024: 1.5, 2048: 1.8}, 1024, Path("x.safetensors"))
    assert "Sparse from 1,024 new tokens on." in capsys.readouterr().out


def test_calibrating(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "made.safetensors"
    words = ["calibrate", "sale", "--model", str(tiny_model), "--tokens", "512"]
    words += ["--samples", "1", "--out", str(out)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "Thresholds" in result.output and str(out.name) in result.output.replace("\n", "")
    model = models.load(str(tiny_model), device="cpu")[0]
    found = calibration.read(out, model)
    assert len(found.done) == len(found.tau_LN) and found.least in (512, 1024)
    assert out.stat().st_mode & 0o777 == 0o666 & ~umask()  # for others too
    second = CliRunner().invoke(app, words)
    assert second.exit_code == 0 and "Nothing was measured" in second.output.replace("\n", " ")
    assert calibration.read(out, model).least == found.least
    again = CliRunner().invoke(app, [*words, "--error", "0.5"])
    assert again.exit_code != 0 and "holds a search with" in str(again.exception)
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    refused = CliRunner().invoke(app, [*words, "--text", str(short)])
    assert refused.exit_code != 0 and "Give a longer text" in str(refused.exception)
