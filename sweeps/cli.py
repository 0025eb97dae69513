"""The `sweep` command: parse, call, print, exit.

PyTorch and Optuna are imported inside the commands that need them, so that `sweep --help`
answers at once. Exit status: 0 done, 1 failed, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sweeps.errors import SpecError, SweepError

if TYPE_CHECKING:
    from rich.console import Console

    from sweeps.spec import SweepSpec
    from sweeps.studies import StoredSweep

DEFAULT_STORAGE = "sqlite:///sweep.db"

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Hyperparameter sweeps for training without Batch Normalization on non-IID data.",
)

Storage = Annotated[
    str,
    typer.Option(
        "--storage", envvar="SWEEP_STORAGE", help="The store: SQLAlchemy URL of a database."
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        envvar="SWEEP_DATA_DIR",
        help="Where the data set is (or goes): for `images`, the folder or zip itself.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override any key of the sweep; repeatable."),
]
Quick = Annotated[bool, typer.Option("--quick", help="The sweep's small version, for a CPU.")]
Name = Annotated[str | None, typer.Option("--name", help="Keep the sweep under this name.")]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command(rich_help_panel="Run")
def start(
    sweep: Annotated[str, typer.Argument(help="A preset's name, or the path of a TOML file.")],
    quick: Quick = False,
    overrides: Overrides = None,
    name: Name = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            help="Worker processes. Default: one a GPU, or else as many as there are cores for.",
        ),
    ] = None,
    storage_url: Storage = DEFAULT_STORAGE,
    data_dir: DataDir = None,
) -> None:
    """Run a sweep, or go on with it: create its studies, launch workers, show the answer."""
    spec = _load(sweep, storage_url, quick, overrides, name)
    # After the spec, so that a mistake in it shows before PyTorch has loaded.
    from sweeps.run import run_sweep

    again = ["sweep", *sys.argv[1:]]
    code = run_sweep(
        spec, storage_url, data_dir=data_dir, workers=workers, again=shlex.join(again),
        out=_stdout(), err=_stderr(),
    )  # fmt: skip
    raise typer.Exit(code)


@app.command(rich_help_panel="Run")
def worker(
    sweep: Annotated[str, typer.Argument(help="The name of a sweep in the store.")],
    storage_url: Storage = DEFAULT_STORAGE,
    data_dir: DataDir = None,
    device: Annotated[
        str | None, typer.Option(help="PyTorch's name of the device. Default: a GPU if any.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. Default: all cores.")
    ] = None,
    lease_seconds: Annotated[
        float,
        typer.Option(min=0.5, help="A trial whose worker is silent for this long goes to another."),
    ] = 60.0,
    child: Annotated[bool, typer.Option("--child", hidden=True)] = False,
) -> None:
    """Join a sweep that was started: pull trials until its budget is met."""
    from sweeps.run import run_worker

    stop = threading.Event()
    received: list[int] = []

    def on_signal(number: int, _frame: object) -> None:
        if received:
            os._exit(130)
        received.append(number)
        stop.set()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    if child:
        threading.Thread(target=_stop_with_parent, args=(stop,), daemon=True).start()
    run_worker(
        sweep,
        storage_url,
        data_dir=data_dir,
        device=device,
        threads=threads,
        lease_seconds=lease_seconds,
        stop=stop,
    )
    raise typer.Exit(130 if signal.SIGINT in received else 0)


@app.command("list", rich_help_panel="Look")
def list_(storage_url: Storage = DEFAULT_STORAGE, as_json: Json = False) -> None:
    """List the presets, and the sweeps that the store holds."""
    from rich.table import Table

    from sweeps import spec
    from sweeps.studies import shown_url

    presets = {}
    for preset in spec.presets():
        presets[preset] = str(spec.read_table(preset)[0].get("question", ""))
    stored = _stored_or_none(storage_url)
    if as_json:
        found = [
            {"name": s.spec.name, "question": s.spec.question, "studies": len(s.studies)}
            for s in stored.values()
        ]
        rows = [{"name": n, "question": q} for n, q in presets.items()]
        _print_json({"presets": rows, "stored": found})
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("preset", no_wrap=True)
    table.add_column("question")
    for preset, question in presets.items():
        table.add_row(preset, question)
    _stdout().print(table)
    if stored:
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column(f"in {shown_url(storage_url)}", no_wrap=True)
        table.add_column("studies", justify="right")
        for kept in stored.values():
            table.add_row(kept.spec.name, str(len(kept.studies)))
        _stdout().print()
        _stdout().print(table)


@app.command(rich_help_panel="Look")
def show(
    sweep: Annotated[str, typer.Argument(help="A preset, a TOML file, or a sweep in the store.")],
    quick: Quick = False,
    overrides: Overrides = None,
    name: Name = None,
    storage_url: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Print a sweep as TOML, resolved; a file to start your own from."""
    spec = _load(sweep, storage_url, quick, overrides, name)
    if as_json:
        _print_json(spec.as_dict())
    else:
        typer.echo(spec.as_toml(), nl=False)


@app.command(rich_help_panel="Look")
def status(
    sweep: Annotated[str | None, typer.Argument(help="One sweep. Default: all.")] = None,
    storage_url: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Say how far the store's sweeps are, and the best setting of each study."""
    from storage.engine import open_storage
    from sweeps.report import answer_table, outcome_lines
    from sweeps.status import read_status
    from sweeps.studies import shown_url, stored_sweep, stored_sweeps

    _quiet_libraries()
    store = open_storage(storage_url, read_only=True)
    sweeps = [stored_sweep(store, sweep)] if sweep else list(stored_sweeps(store).values())
    statuses = [read_status(store, s) for s in sweeps]
    if as_json:
        _print_json(statuses[0].as_dict() if sweep else [s.as_dict() for s in statuses])
        return
    if not statuses:
        raise SweepError(f"{shown_url(storage_url)} holds no sweep; sweep start NAME begins one")
    out = _stdout()
    for found in statuses:
        out.print(answer_table(found))
        for line in outcome_lines(found):
            out.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command(rich_help_panel="Look")
def dashboard(
    storage_url: Storage = DEFAULT_STORAGE,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    writable: Annotated[
        bool,
        typer.Option("--writable", help="Let whoever reaches it change and delete studies."),
    ] = False,
) -> None:
    """Open optuna-dashboard on the store."""
    from sweeps.dashboard import make_dashboard

    try:
        server = make_dashboard(storage_url, host, port, writable=writable)
    except OSError as error:
        raise SweepError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --port"
        ) from None
    with server:
        bound, port = server.server_address[:2]
        mode = "anyone who reaches it can change and delete studies" if writable else "read-only"
        typer.echo(f"optuna-dashboard on http://{bound!s}:{port}/ ({mode}); Ctrl-C ends it")
        server.serve_forever()


def main() -> None:
    """The console entry: errors become one line on stderr and an exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    # Typer does not export the class of all usage errors, only this child of it.
    usage_error = typer.BadParameter.__base__
    assert usage_error is not None
    try:
        code = app(prog_name="sweep", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except SpecError as error:
        _fail(error, 2)
    except SweepError as error:
        _fail(error, 1)
    except BrokenPipeError:
        # The reader of our output went away, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if isinstance(error, usage_error):
            message = str(error.format_message())  # type: ignore[attr-defined]
            _fail(f"{message.rstrip('.')}; sweep --help lists what there is", 2)
        if type(error).__name__ in ("StorageError", "DataError", "CheckpointError"):
            _fail(error, 1)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: object, code: int) -> None:
    print(f"sweep: {message}", file=sys.stderr)
    sys.exit(code)


def _load(
    sweep: str, storage_url: str, quick: bool, overrides: list[str] | None, name: str | None
) -> SweepSpec:
    """A preset or a file; failing these, a sweep that the store has under this name."""
    from sweeps import spec

    if not sweep.endswith(".toml") and sweep not in spec.presets():
        stored = _stored_or_none(storage_url)
        if sweep in stored and not (quick or overrides or name):
            return stored[sweep].spec
    return spec.load(sweep, quick=quick, overrides=overrides or (), rename=name)


def _stored_or_none(storage_url: str) -> dict[str, StoredSweep]:
    """The sweeps of the store; none where there is no store yet."""
    from storage.engine import StorageError, open_storage, sqlite_path
    from sweeps.studies import stored_sweeps

    path = sqlite_path(storage_url)
    if path is not None and not path.exists():
        return {}
    _quiet_libraries()
    try:
        return stored_sweeps(open_storage(storage_url, read_only=True))
    except StorageError as error:
        if "holds no sweep yet" in str(error):
            return {}
        raise


def _stop_with_parent(stop: threading.Event) -> None:
    """The launching process holds the other end of stdin: its end is ours."""
    # The raw descriptor: a thread inside a buffered reader would block the interpreter's end.
    while os.read(0, 1024):
        pass
    stop.set()


def _quiet_libraries() -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _stdout() -> Console:
    from rich.console import Console

    # A pipe has no width; tables keep their lines whole in it.
    return Console() if sys.stdout.isatty() else Console(width=160)


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


if __name__ == "__main__":
    main()
