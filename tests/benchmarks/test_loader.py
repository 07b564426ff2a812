import gc
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import loader
from data.decoding import decode
from data.transforms import cut, random_resized, scale

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


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # timm leaves files to the collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_every_loader_is_measured(call, photographs, tmp_path, workers):
    status, _ = call("loader", photographs, "--rounds", 1, "--batch", 4, "--workers", workers)
    gc.collect()  # here, where the warnings are ignored
    assert status == 0
    result = json.loads((tmp_path / "out" / "loader.json").read_text())
    assert list(result) == ["command", "environment", "setting", "rows", "parts"]
    assert str(photographs) not in json.dumps(result)
    assert result["setting"]["photographs"] == 8
    assert {"cpu", "threads", "torch", "torchvision", "timm", "pillow"} <= set(
        result["environment"]
    )
    assert [row["loader"] for row in result["rows"]] == LOADERS
    assert all(row["images_per_core_second"] > 0 for row in result["rows"])
    assert result["rows"][0]["smallbatch_to_this"] == 1
    assert len(result["parts"]) == 4
    text = (tmp_path / "out" / "README.md").read_text()
    assert all(f"\n| {name} |" in text for name in (*LOADERS, *result["parts"]))


def test_a_window_is_torchvisions_to_a_tenth_of_a_grey_level(photographs):
    """What the pipelines are compared on is the same work."""
    from torchvision.transforms import functional

    for i, file in enumerate(sorted(photographs.rglob("*.JPEG"))):
        with Image.open(file) as opened:
            theirs = opened.convert("RGB")
        x, y, w, h = box = random_resized(*theirs.size, np.random.default_rng([0, i]))
        expected = functional.pil_to_tensor(functional.resized_crop(theirs, y, x, h, w, [224, 224]))
        found = scale(cut(decode(file), box), 224, 224)
        assert (found.int() - expected.int()).abs().float().mean() < 0.1


def test_rates_are_images_by_seconds_of_every_process(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(loader, "clock", lambda: next(now) * 0.5)
    passes = {"smallbatch": lambda epoch: 10 + epoch, "other": lambda epoch: 5 + epoch}
    rates = {
        name: {"core": np.array([loader.passed(whole, epochs)["core"] for _ in range(3)])}
        | {"wall": np.ones(3)}
        for name, whole in passes.items()
        for epochs in [iter(range(0, 30, 10))]
    }
    assert rates["smallbatch"]["core"].tolist() == [20, 40, 60]  # each pass is another epoch
    rows = loader.summary(rates, rates)
    assert [row["smallbatch_to_this"] for row in rows] == [1, round(40 / 30, 3)]
    assert rows[0]["images_per_core_second"] == 40


def test_batches_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"batches of torch.float64, \(2, 3, 9, 9\)"):
        loader.consume([(loader.torch.zeros(2, 3, 9, 9, dtype=loader.torch.float64), [0, 1])])


@pytest.mark.parametrize(
    ("args", "status", "told"),
    [
        ((), 1, "0 photographs; expected at least 2"),
        (("--batch", 0), 2, "expected whole numbers from 1"),
        (("--workers", -1), 1, "expected a whole number from 0"),
    ],
)
def test_mistakes_get_one_line(call, tmp_path, args, status, told):
    (tmp_path / "empty").mkdir()
    found, err = call("loader", tmp_path / "empty", *args)
    assert found == status
    assert told in err


def test_more_in_a_batch_than_there_are(call, photographs):
    status, err = call("loader", photographs, "--batch", 9)
    assert status == 1
    assert "--batch 9: expected at most the 8 photographs" in err
