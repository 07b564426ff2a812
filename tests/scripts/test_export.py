import json
import sys

import pytest
import torch
from omegaconf import OmegaConf

import data
import norms
from scripts import export
from training import restore

FOLDED = {
    "bn": "0 standardized convolutions became plain; of 7 norms 7 disappeared, 0 remain",
    "mabn": "7 standardized convolutions became plain; of 7 norms 7 disappeared, 0 remain",
    "pws": "7 standardized convolutions became plain; of 2 norms 0 disappeared, 2 remain",
    "bcn": "7 standardized convolutions became plain; of 7 norms 0 disappeared, 7 remain",
}


@pytest.fixture
def call(monkeypatch, capfd):
    """`python scripts/export.py ARGS…` in this process: exit status, stdout, stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, args)])
        capfd.readouterr()
        try:
            export.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capfd.readouterr()

    return run


@pytest.mark.parametrize("norm", FOLDED)
def test_the_program_takes_pixels_and_answers_like_the_run(train, call, norm):
    run = train(f"norm={norm}", "batch=8").run()
    status, out, err = call(run)
    assert (status, err) == (0, "")
    assert FOLDED[norm] in out
    assert "uint8 images (N, 1, 8, 8) -> 10 logits" in out
    assert sorted(p.name for p in run.glob("model*")) == ["model.pt2"]

    program = torch.export.load(run / "model.pt2").module()
    model, _, result = restore.load(run)
    cfg = OmegaConf.load(run / ".hydra" / "config.yaml")
    training, test = data.read(data.resolve(cfg.data, 8, cfg.recipe), cfg.data)
    pixels = training.images.double() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    assert result["pixels"] == {
        "mean": pytest.approx(mean.tolist(), rel=1e-9),
        "std": pytest.approx(std.tolist(), rel=1e-9),
        "reversed": False,
    }
    with torch.no_grad():
        for size in (1, 2, 3, len(test)):
            images = test.images[:size]
            expected = model(((images / 255 - mean[:, None, None]) / std[:, None, None]).float())
            logits = program(images)
            assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    right = (logits.argmax(1) == test.labels).double().mean().item()
    assert 100 * right == pytest.approx(result["top1"], abs=0.3)  # one of the 359 images


def test_mistakes_get_one_line_and_leave_nothing(train, call, tmp_path, monkeypatch):
    run = train().run()
    whole = {name: (run / name).read_bytes() for name in ("result.json", "last.pt")}
    result = json.loads(whole["result.json"])

    def refused(*args):
        status, out, err = call(*args)
        assert (status, out) == (1, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert not list(tmp_path.rglob("*.pt2*"))
        return err

    assert "not a run" in refused(tmp_path)
    assert "not a run" in refused(tmp_path / "nowhere")
    assert "expected the name of a .pt2 file" in refused(run, "--out", tmp_path / "model.pt")
    assert "in an existing folder" in refused(run, "--out", tmp_path / "nowhere" / "model.pt2")

    (run / "last.pt").write_bytes(whole["last.pt"][:-100])
    assert "last.pt: cannot be read" in refused(run)
    (run / "last.pt").unlink()
    assert "last.pt: cannot be read" in refused(run)
    (run / "last.pt").write_bytes(whole["last.pt"])

    (run / "result.json").write_text(json.dumps(result | {"status": "diverged"}))
    assert "diverged" in refused(run)
    (run / "result.json").write_text(json.dumps(result | {"classes": 7}))
    assert "of another network" in refused(run)
    (run / "result.json").write_text("{")
    assert "result.json: cannot be read" in refused(run)
    (run / "result.json").unlink()
    assert "not finished" in refused(run)
    (run / "result.json").write_bytes(whole["result.json"])

    for factor in (1.01, float("nan")):

        def wrong(model, factor=factor, fold=norms.fold):
            folded = fold(model)
            folded.fc.weight *= factor
            return folded

        with monkeypatch.context() as patch:
            patch.setattr(norms, "fold", wrong)
            assert "deviates by" in refused(run)

    status, out, _ = call(run, "--out", tmp_path / "mine.pt2")
    assert status == 0
    assert f"{tmp_path / 'mine.pt2'}: 0." in out
    assert not (run / "model.pt2").exists()
