import json

import pytest

from benchmarks import inference


def test_every_scheme_has_a_row(call, tmp_path):
    assert call("inference", "--quick", "--channels-last") == (0, "")
    text = (tmp_path / "out" / "README.md").read_text()
    result = json.loads((tmp_path / "out" / "inference.json").read_text())
    assert list(result) == ["command", "environment", "setting", "rows"]
    assert set(result["environment"]) == {"cpu", "threads", "python", "torch"}
    assert result["setting"] == {
        "model": "resnet8",
        "batch": 4,
        "size": 32,
        "rounds": 2,
        "device": "cpu",
        "channels_last": True,
    }
    rows = {r["norm"]: r for r in result["rows"]}
    assert list(rows) == inference.SCHEMES
    for name, row in rows.items():
        assert text.count(f"\n| {name} |") == 1
        for kind in ("unfolded", "folded"):
            assert row[f"{kind}_ms"] > 0
            low, high = (row[f"ratio_to_bn_{kind}_{end}"] for end in ("min", "max"))
            assert 0 < low <= row[f"ratio_to_bn_{kind}"] <= high
    assert rows["bn"]["ratio_to_bn_unfolded"] == rows["bn"]["ratio_to_bn_folded"] == 1
    left = {name: row["norm_layers_left"] for name, row in rows.items()}
    assert left == dict.fromkeys(inference.SCHEMES, 7) | dict.fromkeys(
        ("bn", "mabn", "brn", "ws_bn"), 0
    ) | {"pws": 2, "evonorm_s0": 4}


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--quick", "nothing"), "error: norm=nothing: unknown"),
        (("--model", "resnet9"), "error: model.name=resnet9: unknown"),
        (("--device", "tpu"), "error: device=tpu: expected auto, cpu"),
    ],
)
def test_mistakes_get_one_line(call, args, told):
    found, err = call("inference", *args)
    assert found == 1
    assert told in err
