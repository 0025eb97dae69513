"""What README.md tells people to type is something that works."""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from commands import Command, run
from helpers import write_spec
from PIL import Image

from models import build_model
from sweeps import reference, search, specfiles
from sweeps.assembly import Assembly, open_dataset
from sweeps.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S)
    return [block for kind, block in found if kind == language]


def page_text(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def shell_lines() -> list[list[str]]:
    lines = [line for block in blocks("") for line in block.splitlines()]
    lines += re.findall(r"`(sweep [^`]+)`", README)
    parts = [part for line in lines for part in line.split("#")[0].split("&&")]
    return [shlex.split(part) for part in parts if part.strip()]


SWEEP_LINES = [line[1:] for line in shell_lines() if line[0] == "sweep"]
PAGES = sorted((ROOT / "docs").glob("*.md"))
PAGE_LINES = [
    (page.name, shlex.split(line.split("#")[0])[1:])
    for page in PAGES
    for block in blocks("", page_text(page.name))
    for line in block.splitlines()
    if line.startswith("sweep ")
]


def test_the_two_commands_stand_on_top() -> None:
    first = blocks("")[0].splitlines()
    assert first == [
        "pip install . && sweep start fixup-largebatch --quick",
        "pip install '.[test]' && pytest",
    ]
    assert README.index(first[0]) < 200


@pytest.mark.parametrize("line", SWEEP_LINES, ids=" ".join)
def test_a_command_in_the_readme_is_one_that_parses(line: list[str]) -> None:
    assert_parses(line)


@pytest.mark.parametrize(("page", "line"), PAGE_LINES, ids=lambda part: str(part)[:60])
def test_a_command_in_a_page_is_one_that_parses(page: str, line: list[str]) -> None:
    assert_parses(line)


def assert_parses(line: list[str]) -> None:
    group = typer.main.get_command(app)
    found = group.commands[line[0]]  # type: ignore[attr-defined]
    arguments = line[1 : line.index(">")] if ">" in line else line[1:]
    if found.name == "start" and not any(not a.startswith("-") for a in arguments):
        arguments = ["fixup-largebatch", *arguments]
    found.make_context(line[0], arguments)


@pytest.mark.parametrize("script", blocks("bash", page_text("slurm.md")))
def test_a_job_script_is_one(tmp_path: Path, script: str) -> None:
    (tmp_path / "job.sh").write_text(script, encoding="utf-8")
    for name, body in (("srun", 'exit "$STATUS"'), ("scontrol", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    for status, said in ((0, ""), (1, ""), (130, "requeue 7\n")):
        done = subprocess.run(
            ["bash", tmp_path / "job.sh"], capture_output=True, text=True, check=False,
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "STATUS": str(status),
                 "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "2"},
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (status, said, "")
    (line,) = re.findall(r"^srun sweep (.*)$", script, flags=re.M)
    assert_parses(shlex.split(line))


def test_every_page_is_in_the_readme_and_every_link_leads_somewhere() -> None:
    for page in PAGES:
        assert f"(docs/{page.name})" in README
    for page in [ROOT / "README.md", *PAGES]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


ENDLESS = ("serve", "dashboard")
"""Commands that do not end by themselves."""


def one_worker(arguments: list[str]) -> list[str]:
    """The same command with one worker, where it leaves their number open."""
    if arguments[0] in ("start", "confirm") and not {"--workers", "--on"} & {*arguments}:
        return [*arguments, "--workers", "1"]
    return arguments


def run_page(name: str, cwd: Path, change: Callable[[str], str] = lambda line: line) -> None:
    """Run every command of a page, in its order, but for those that do not end."""
    lines = [shlex.join(line) for page, line in PAGE_LINES if page == name]
    assert lines
    for line in [line for line in lines if line.split()[0] not in ENDLESS]:
        arguments = one_worker(shlex.split(change(line)))
        target = arguments[arguments.index(">") + 1] if ">" in arguments else None
        done = run(*(arguments[: arguments.index(">")] if target else arguments), cwd=cwd)
        assert done.returncode == 0, (line, done.stderr)
        if target is not None:
            (cwd / target).write_text(done.stdout, encoding="utf-8")


def test_the_commands_of_own_sweep_run(tmp_path: Path) -> None:
    write_spec(
        tmp_path / "my-sweep.toml", budget={"trials": 1}, each={"global_batch_size": [80]},
        train={"epochs": 1, "global_batch_size": None},
    )  # fmt: skip
    run_page("own-sweep.md", tmp_path, lambda line: line.replace("epochs=60", "epochs=2"))
    assert (tmp_path / "other.toml").exists()


def test_the_commands_of_own_data_run(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 2)):
        for name in ("cat", "dog", "newt", "yak"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 255, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    write_spec(
        tmp_path / "groupnorm-largebatch.toml", budget={"trials": 1},
        train={"epochs": 1, "num_devices": 2, "global_batch_size": 8, "model": "resnet8",
               "validation_fraction": 0.5},
    )  # fmt: skip

    def small(line: str) -> str:
        """The same on a small sweep, with the same photos under their other name."""
        line = line.replace("start groupnorm-largebatch", "start groupnorm-largebatch.toml")
        return line.replace("image_size=64", "image_size=16").replace("/mnt/photos", "elsewhere")

    (tmp_path / "elsewhere").symlink_to(tmp_path / "photos")
    run_page("own-data-and-model.md", tmp_path, small)


def test_the_commands_of_move_run(tmp_path: Path) -> None:
    write_spec(tmp_path / "my-sweep.toml", budget={"trials": 2}, train={"epochs": 1})
    begun = run("start", "my-sweep.toml", "--workers", "1", cwd=tmp_path)
    assert begun.returncode == 0, begun.stderr
    run_page("move.md", tmp_path)
    assert (tmp_path / "runs.db").exists()


def test_the_commands_of_serve_run(tmp_path: Path) -> None:
    pytest.importorskip("grpc", reason="gRPC is not installed")
    write_spec(tmp_path / "my-sweep.toml", budget={"trials": 2}, train={"epochs": 1})
    local = "sqlite:///sweep.db"
    arguments = ("start", "my-sweep.toml", "--workers", "1", "--set", "budget.epochs_total=1")
    begun = run(*arguments, cwd=tmp_path)
    assert begun.returncode == 0, begun.stderr
    with Command("serve", "--storage", local, "--port", "0", cwd=tmp_path) as server:
        found = re.search(r"grpc://127\.0\.0\.1:(\d+);", server.line("serving"))
        assert found is not None

        def to_it(line: str) -> str:
            return line.replace("13000", found[1])

        run_page("serve.md", tmp_path, to_it)
        address = f"grpc://localhost:{found[1]}"
        with Command("dashboard", "--storage", address, "--port", "0", cwd=tmp_path) as dashboard:
            assert "http://" in dashboard.line("http://")
    done = run("status", "my-sweep", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["studies"][0]["counts"]["complete"] == 2


def test_the_network_of_ones_own_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_text("own-data-and-model.md")
    (code,), (text,) = blocks("python", page), blocks("toml", page)
    (tmp_path / "my_networks.py").write_text(code, encoding="utf-8")
    (tmp_path / "own.toml").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    made = specfiles.load(str(tmp_path / "own.toml"))
    config = made.config({}, made.lowest_params())
    model = build_model(
        config.model, norm=config.norm, num_groups=config.num_groups, num_classes=10, seed=0
    )
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_reference_is_that_of_the_code() -> None:
    assert page_text("toml.md") == reference.markdown(), "python -m sweeps.reference > docs/toml.md"


def test_the_postgresql_pages_commands_run(tmp_path: Path, postgres: Callable[[], str]) -> None:
    """Everything but the dashboard, which does not end by itself."""
    server, moved = postgres(), postgres()
    write_spec(tmp_path / "my-sweep.toml", budget={"trials": 2}, train={"epochs": 1})
    page = page_text("postgresql.md")
    lines = re.findall(r"^sweep (.*)$", page, flags=re.M)
    assert {line.split()[0] for line in lines} >= {"start", "worker", "export", "import"}
    local = f"sqlite:///{tmp_path / 'sweep.db'}"
    for line in lines:
        arguments = shlex.split(line)
        if arguments[0] == "dashboard":
            continue
        if arguments[0] == "export":  # the page moves a sweep that was begun on a file
            done = run("start", "my-sweep.toml", "--workers", "1", "--storage", local, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
        arguments = [
            moved if a.startswith("postgresql") else local if a.startswith("sqlite") else a
            for a in arguments
        ]
        if "--storage" not in arguments:
            arguments += ["--storage", server]
        done = run(*one_worker(arguments), cwd=tmp_path)
        assert done.returncode == 0, (line, done.stderr)


def test_every_command_is_in_the_readme() -> None:
    group = typer.main.get_command(app)
    named = {line[0] for line in SWEEP_LINES}
    assert named == set(group.commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", [README, page_text("own-sweep.md")], ids=["README", "own-sweep"])
def test_the_example_of_a_sweep_is_sound(tmp_path: Path, text: str) -> None:
    (text,) = blocks("toml", text)
    (tmp_path / "my-sweep.toml").write_text(text, encoding="utf-8")
    made = specfiles.load(str(tmp_path / "my-sweep.toml"))
    search.check(made)
    for cell in made.cells:
        config = made.config(cell, made.lowest_params())
        Assembly(open_dataset(config, None), torch.device("cpu")).check(config)


def test_the_tour_runs(tmp_path: Path) -> None:
    """The five minutes of the README, on a sweep of seconds."""
    write_spec(tmp_path / "tiny.toml", budget={"trials": 1})
    assert run("list", cwd=tmp_path).returncode == 0
    assert run("start", "tiny.toml", cwd=tmp_path).returncode == 0
    assert run("status", "tiny", cwd=tmp_path).returncode == 0
    shown = run("show", "tiny", cwd=tmp_path)
    (tmp_path / "my-sweep.toml").write_text(shown.stdout, encoding="utf-8")
    mine = run(
        "start", "my-sweep.toml", "--workers", "2", "--storage", "sqlite:///runs.db", cwd=tmp_path
    )
    assert mine.returncode == 0, mine.stderr
    assert (tmp_path / "runs.db").exists()


def test_every_override_of_the_readme_works_on_its_preset() -> None:
    overrides = [shlex.split(text)[0] for text in re.findall(r"`--set ([^`]+)`", README)]
    assert len(overrides) >= 3
    for override in overrides:
        specfiles.load("fixup-largebatch", overrides=[override])
