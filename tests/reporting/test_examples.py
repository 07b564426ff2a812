"""The examples of docs/tables.md, as they stand there, on a study of the command line."""

import re
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "tables.md").read_text()
EXAMPLES = re.findall(r"### ([^\n]+)\n\n```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def mine(train, tmp_path, monkeypatch):
    """runs/mine, and the folder that has it."""
    swept = ["norm=bn,gn", "batch=2,8", "seed=0,1", "protocol=ghost", "protocol.sgd_batch=16"]
    done = train("-m", *swept, "study=mine", "recipe.epochs=2")
    assert done.status == 0, done.err
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")


def test_the_examples_of_the_page(mine, capfd):
    assert len(EXAMPLES) == 3
    made = {}
    for title, code in EXAMPLES:
        exec(compile(code, title, "exec"), made.setdefault(title, {}))
    table, cost, curves = made.values()
    assert list(table["table"].index) == ["bn", "gn"]
    assert (table["table"]["count"] == 2).all(axis=None)
    assert (cost["cost"] > 0).all(axis=None)
    assert curves["curves"].shape == (2, 2)
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
    assert "count" in capfd.readouterr().out
    mpl.pyplot.close("all")
    assert isinstance(table["runs"], pd.DataFrame)
