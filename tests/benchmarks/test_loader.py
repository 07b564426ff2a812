import gc
import json
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import loader

LOADERS = ["smallbatch", "torchvision", "timm", "timm, prefetcher"]


@pytest.fixture
def photographs(tmp_path):
    """Eight of them, smooth, in two folders of whatever meaning."""
    rng = np.random.default_rng(0)
    for i in range(8):
        place = tmp_path / "photographs" / "xy"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        colours = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        picture = colours.resize((300 + i, 260), Image.Resampling.BICUBIC)
        picture.save(place / f"{i}.JPEG", quality=95)
    return tmp_path / "photographs"


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """`python benchmarks/loader.py ARGS…` in this process: exit status, stderr."""

    def run(*args):
        out = ["--out", str(tmp_path / "out")]
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # restored after the test
        monkeypatch.setattr(sys, "argv", ["loader.py", *map(str, args), *out])
        try:
            loader.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, capfd.readouterr().err

    return run


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # timm leaves files to the collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_every_loader_is_measured(call, photographs, tmp_path, workers):
    status, _ = call(photographs, "--rounds", 1, "--batch", 4, "--workers", workers)
    gc.collect()  # here, where the warnings are ignored
    assert status == 0
    result = json.loads((tmp_path / "out" / "loader.json").read_text())
    assert list(result) == ["command", "environment", "setting", "rows", "parts", "differences"]
    assert str(photographs) not in json.dumps(result)
    assert result["setting"]["photographs"] == 8
    assert {"cpu", "threads", "torch", "torchvision", "timm", "pillow"} <= set(
        result["environment"]
    )
    assert [row["loader"] for row in result["rows"]] == LOADERS
    assert all(row["images_per_core_second"] > 0 for row in result["rows"])
    assert result["rows"][0]["smallbatch_to_this"] == 1
    assert len(result["parts"]) == 4
    assert result["differences"]["decoded"] == {"mean": 0, "largest": 0}
    for kind in ("window", "evaluation"):
        assert result["differences"][kind]["mean"] < 0.1
    text = (tmp_path / "out" / "README.md").read_text()
    assert all(f"\n| {name} |" in text for name in (*LOADERS, *result["parts"]))


def test_rates_are_images_by_seconds_of_every_process(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(loader, "clock", lambda: next(now) * 0.5)
    rates = loader.measure({"smallbatch": lambda epoch: 10, "other": lambda epoch: 5}, 3)
    assert rates["smallbatch"]["core"].tolist() == [20, 20, 20]
    rows = loader.summary(rates, rates)
    assert [row["smallbatch_to_this"] for row in rows] == [1, 2]
    assert rows[1]["ms_per_image"] == 100


def test_batches_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"batches of torch.float64, \(2, 3, 9, 9\)"):
        loader.consume([(loader.torch.zeros(2, 3, 9, 9, dtype=loader.torch.float64), [0, 1])])


@pytest.mark.parametrize(
    ("args", "status", "told"),
    [
        ((), 1, "0 photographs; expected at least 2"),
        (("--batch", 0), 2, "expected whole numbers from 1"),
        (("--workers", -1), 2, "--workers from 0"),
    ],
)
def test_mistakes_get_one_line(call, tmp_path, args, status, told):
    (tmp_path / "empty").mkdir()
    found, err = call(tmp_path / "empty", *args)
    assert found == status
    assert told in err


def test_more_in_a_batch_than_there_are(call, photographs):
    status, err = call(photographs, "--batch", 9)
    assert status == 1
    assert "--batch 9: expected at most the 8 photographs" in err
