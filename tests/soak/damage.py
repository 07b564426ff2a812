"""Random damage to the files of a study, then the same command, the table and the board: what is
lost is said, and nothing else is."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.data.folders import noise
from tests.soak import harness
from tests.soak.harness import Child, Outcome, Part, different, snapshot

COMMAND = ["train.py", "-m", "runtime.runs=runs", "runtime.threads=1", "study=s", "seed=0,1"]
COMMAND += ["data=folder", "data.root=../photos", "data.size=8", "data.cache=cache", "batch=8"]
COMMAND += ["model=resnet8", "recipe=digits", "recipe.epochs=3", "checkpoint.every_updates=4"]
TABLE, BOARD = ["scripts/table.py", "runs/s"], ["scripts/study.py", "runs/s"]
# Nobody's result: traces for whoever watches, and what is written anew.
UNIMPORTANT = ("events", "hydra.yaml", "overrides.yaml", "table.md", "table.csv", "table.tex")

# Keys of result.json that are compared with other files.
TOLD = ("status", "top1", "top5", "test_loss", "updates", "batch_size", "seed", "protocol", "data")
TOLD += ("recipe", "identity")


def content(rng: random.Random) -> bytes:
    return rng.choice(
        [b"", b"{", b"{}", b"[]", b"[1, 2]", b"null", b"0", b"NaN", b"a: b: c", b"\xff\xfe\x00",
         b"PK\x03\x04", b"epoch,update\n", b'{"status": "finished"}', b"a\nb\nc\n", b"\x80\x02."]
    )  # fmt: skip


def damage(file: Path, other: Path, rng: random.Random) -> str:
    """Of one kind; returns which."""
    data = file.read_bytes()

    def truncate() -> None:
        file.write_bytes(data[: rng.randrange(len(data) or 1)])

    def zero() -> None:
        start = rng.randrange(len(data) or 1)
        file.write_bytes(data[:start] + bytes(len(data) - start))

    def flip() -> None:
        place = rng.randrange(len(data) or 1)
        file.write_bytes(data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :])

    def another_type() -> None:
        file.write_bytes(content(rng))

    def another_value() -> None:
        """Of a key of JSON or a field of a table."""
        value = rng.choice([None, True, "x", -1, [], {}, 1e308, ""])
        try:
            found = json.loads(data)
            found[rng.choice(list(found))] = value
            file.write_text(json.dumps(found))
        except (ValueError, TypeError, AttributeError, IndexError):
            words = data.split(b",")
            words[rng.randrange(len(words))] = str(value).encode()
            file.write_bytes(b",".join(words))

    def foreign() -> None:
        # What belongs to the study has no like in another run.
        shutil.copy(other, file) if other.is_file() and other != file else file.unlink()

    def folder() -> None:
        file.unlink()
        file.mkdir()

    def link() -> None:
        file.unlink()
        file.symlink_to("nowhere")

    kinds: list[tuple[str, Callable[[], object]]] = [
        ("truncated", truncate), ("zeroed", zero), ("a byte", flip), ("other type", another_type),
        ("other value", another_value), ("foreign", foreign), ("a folder", folder),
        ("a dangling link", link), ("gone", file.unlink), ("unreadable", lambda: file.chmod(0)),
        ("read-only", lambda: file.chmod(0o444)),
        ("in a read-only folder", lambda: file.parent.chmod(0o555)),
    ]  # fmt: skip
    name, act = rng.choice(kinds)
    act()
    return name


def study(home: Path) -> Path:
    """One run finished, one that was killed in its last epoch."""
    whole = home / "whole"
    whole.mkdir()
    done = Child(COMMAND, whole).wait()
    assert done.status == 0, done
    template = home / "template"
    shutil.copytree(whole, template)
    killed = next(template.glob("runs/s/bn-b8-s1*"))
    (killed / "result.json").unlink()
    shutil.copy(killed / "previous.pt", killed / "last.pt")
    rows = (killed / "metrics.csv").read_text().splitlines(keepends=True)
    (killed / "metrics.csv").write_text("".join(rows[:-1]))
    told = {"update": 28, "updates": 30, "seconds": 1.5, "pid": 0}
    (killed / "progress.json").write_text(json.dumps(told))
    return template


def unchecked(file: Path, before: Any) -> bool:
    """Whether all that changed in a result.json are keys that stand in no other file."""
    now = harness.content(file, file.parent)
    if file.name != "result.json" or not isinstance(now, dict) or now.keys() != before.keys():
        return False
    return not any(now[key] != before[key] for key in TOLD)


def said(outcomes: list[Outcome], file: Path) -> bool:
    """Whether somebody says that something is the matter with the file or its run."""
    words = ("cannot", "damaged", "error", "another", "not the data", "no ", "going on", "changed")
    words += ("is taken to hold the same",)  # where data.json is gone
    words += ("waiting",) if file.name == "commands.txt" else ()  # for runs of a changed line
    lines = [line for o in outcomes for line in (o.out + o.err).splitlines()]
    names = (file.name, file.parent.name, file.parent.parent.name)
    return any(any(n in line for n in names) and any(w in line for w in words) for line in lines)


def run(part: Part, count: int, only: int | None) -> None:
    noise(part.home / "photos", train=40, test=8)
    template = study(part.home)
    right = snapshot(part.home / "whole")
    for rng, folder in part.tries(count, only):
        shutil.copytree(template, folder, dirs_exist_ok=True, symlinks=True)
        files = sorted(f for f in folder.glob("runs/**/*") if f.is_file())
        file = rng.choice(files)
        runs = sorted(folder.glob("runs/s/bn-*"))
        name = str(file)
        other = Path(name.replace(runs[0].name, runs[1].name))
        if runs[1].name in name:
            other = Path(name.replace(runs[1].name, runs[0].name))
        kind = damage(file, other, rng)
        part.tried[kind] += 1
        what = f"{kind}: {file.relative_to(folder)}"
        first = [] if rng.random() < 0.8 else [Child(BOARD, folder).wait()]
        outcomes = [*first, *(Child(words, folder).wait() for words in (COMMAND, TABLE, BOARD))]
        if file.name == "last.pt":  # of a finished run nobody else reads it
            outcomes.append(Child(["scripts/evaluate.py", str(file.parent)], folder).wait())
        for outcome in outcomes:
            if found := outcome.wrong(one_line=outcome.words is not COMMAND):
                part.fault(f"{what}: {', '.join(found)}", outcome)
        differ = [f for f in different(right, snapshot(folder)) if not f.endswith(UNIMPORTANT)]
        own = str(file.relative_to(folder))
        differ = [f for f in differ if f != own or not unchecked(file, right[own])]
        differ = [f for f in differ if "/table/" not in f and not f.endswith((".png", ".svg"))]
        if differ and not said(outcomes, file):
            told = "\n".join(map(str, outcomes))
            part.fault(f"{what}: silently not as undisturbed: {', '.join(differ)}", told)
