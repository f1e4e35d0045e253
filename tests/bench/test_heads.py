"""`kvpress calibrate heads`: what it finds out, that it goes on, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from kvpress.bench.calibrate import heads_command, texts
from kvpress.bench.calibrate.heads import scores
from kvpress.bench.common.text import TextError

import kvpress
from kvpress.errors import PolicyError
from kvpress.hf import learned

QUERIES = {"query_LND", "length_LNF"}


def calibrated(model: Any, ids: list[torch.Tensor], out: Path, stop: int | None = None) -> Any:
    found = heads_command.begin(out, model, {"texts": len(ids)})
    found = heads_command.look(model, helpers.characters(), ids[:stop], found, out)
    if stop is None:
        heads_command.finish(model, helpers.characters(), ids, found, out)
    return learned.read(out, model, "heads")


def test_a_calibration_goes_on_and_serves_its_policies(tmp_path: Path) -> None:
    model = helpers.sharp("llama")
    ids = [helpers.prompt(1, 70, seed=seed) for seed in range(3)]
    whole = calibrated(model, ids, tmp_path / "whole.safetensors")
    out = tmp_path / "parts.safetensors"
    begun = calibrated(model, ids, out, stop=2)
    assert (begun.done, begun.finished) == (2, False)
    with pytest.raises(PolicyError, match="unfinished"):
        kvpress.attach(model, f"zap:calibration={out}")
    done = calibrated(model, ids, out)
    assert done.finished and done.tensors.keys() == {"share_LHX", "ridge_LXH", *QUERIES}
    for name, tensor in done.tensors.items():
        torch.testing.assert_close(tensor, whole.tensors[name])
    for spec in (
        f"zap:calibration={out}",
        f"triattention:calibration={out},interval=4",
        f"h2o:budget=0.25+heads:calibration={out}",
    ):
        with kvpress.attach(model, spec) as engine:
            engine.generate(ids[0], max_new_tokens=3, do_sample=False)
            assert engine.cache.check_integrity()
    with pytest.raises(PolicyError, match="Give another"):
        heads_command.begin(out, model, {"texts": 5})


def test_a_file_of_an_earlier_version_gets_what_it_lacks(tmp_path: Path) -> None:
    model, ids = helpers.sharp("llama"), [helpers.prompt(1, 70, seed=seed) for seed in range(2)]
    out = tmp_path / "heads.safetensors"
    whole = calibrated(model, ids, out)
    less = {name: x for name, x in whole.tensors.items() if name not in QUERIES}
    learned.write(out, model, "heads", whole._replace(tensors=less))
    with pytest.raises(PolicyError, match="Run it again"):
        kvpress.attach(model, f"triattention:calibration={out}")
    again = calibrated(model, ids, out)
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(again.tensors[name], tensor)


@pytest.mark.parametrize("family", ["deepseek_v2", "jamba", "smollm3"])
def test_what_cannot_be_found_out_is_left_out_and_said(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = helpers.tiny(family, max_position_embeddings=512)
    out = tmp_path / "heads.safetensors"
    found = calibrated(model, [helpers.prompt(1, 60)], out)
    assert found.finished and "share_LHX" in found.tensors
    said = capsys.readouterr().err
    assert ("Without what queries are" in said) == ("query_LND" not in found.tensors)


def test_scores_do_not_depend_on_what_is_kept() -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(1, 70)
    score_LHT = scores(model, helpers.characters(), ids)
    assert score_LHT.shape == (3, 2, 70) and bool((score_LHT > 0).all())
    assert kvpress.engine_of(model) is None


def test_texts_ship_and_short_ones_are_refused(tmp_path: Path) -> None:
    shipped = texts.texts(None, 0)
    assert [text.name for text in shipped] == ["prose.txt", "code.txt", "records-0"]
    assert texts.records(1) == texts.records(1) != texts.records(2)
    tokenizer, model = helpers.characters(), helpers.tiny()
    assert all(texts.ids(model, tokenizer, text, 300).shape == (1, 300) for text in shipped)
    path = tmp_path / "short.txt"
    path.write_text("too short")
    with pytest.raises(TextError, match="needs 256"):
        texts.ids(model, tokenizer, texts.texts([path], 0)[0], 1280)
