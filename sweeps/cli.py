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
import time
from contextlib import AbstractContextManager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sweeps.errors import SpecError, SweepError, nearest
from sweeps.exits import is_full_disk, told_of
from sweeps.options import (
    AUTO,
    DEFAULT_STORAGE,
    DataDir,
    GpusPerWorker,
    Json,
    Name,
    On,
    Overrides,
    PlannedWorkers,
    Quick,
    Storage,
    Workers,
    WorkersOfRuns,
    wanted,
)

if TYPE_CHECKING:
    from rich.console import Console

    from sweeps.launch import Place
    from sweeps.spec import SweepSpec
    from sweeps.stopping import StopRequest


class PictureFormat(StrEnum):
    """What `sweep report --format` takes."""

    PNG = "png"
    SVG = "svg"
    PDF = "pdf"


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Hyperparameter sweeps for training without Batch Normalization on non-IID data.",
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib import metadata

        typer.echo(f"sweep {metadata.version('sweep')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar="",
            callback=_print_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Hyperparameter sweeps for training without Batch Normalization on non-IID data."""


@app.command(rich_help_panel="Run")
def start(
    sweep: Annotated[str, typer.Argument(help="A preset, a TOML file, or a sweep in the store.")],
    quick: Quick = False,
    overrides: Overrides = None,
    name: Name = None,
    workers: Workers = AUTO,
    on: On = "local",
    gpus_per_worker: GpusPerWorker = None,
    add_trials: Annotated[
        int | None,
        typer.Option(
            "--add-trials",
            min=1,
            metavar="K",
            show_default=False,
            help="Extend each study of a stored sweep by K trials.",
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", metavar="", help="Do not ask before a run of more than a day.")
    ] = False,
    storage_url: Storage = DEFAULT_STORAGE,
    data_dir: DataDir = None,
) -> None:
    """Run a sweep, or go on with it: create its studies, launch workers, show the answer."""
    placed = _place(on, gpus_per_worker)
    spec = _load(sweep, storage_url, quick, overrides, name)
    again = ["sweep", *sys.argv[1:]]
    with placed as place:
        _expect(place, spec, wanted(workers), storage_url, data_dir)
        # After the spec, so that a mistake in it shows before PyTorch has loaded.
        with _stderr().status("loading PyTorch and Optuna"):
            from sweeps.run import run_sweep

        code = run_sweep(
            spec, storage_url, data_dir=data_dir, workers=wanted(workers), place=place,
            add_trials=add_trials or 0, again=shlex.join(again), yes=yes, out=_stdout(),
            err=_stderr(),
        )  # fmt: skip
    raise typer.Exit(code)


@app.command(rich_help_panel="Run")
def confirm(
    sweep: Annotated[str, typer.Argument(help="The name of a sweep in the store.")],
    top: Annotated[
        int,
        typer.Option(
            min=1, metavar="K", help="How many of the best trials of each study to confirm."
        ),
    ] = 1,
    seeds: Annotated[
        int,
        typer.Option(
            min=2, max=1000, metavar="S", help="Runs of each configuration, one seed each."
        ),
    ] = 5,
    workers: WorkersOfRuns = AUTO,
    on: On = "local",
    gpus_per_worker: GpusPerWorker = None,
    storage_url: Storage = DEFAULT_STORAGE,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Train the best and the known configurations with other seeds; score the test images."""
    placed = _place(on, gpus_per_worker)
    with _stderr().status("loading PyTorch and Optuna"):
        from sweeps.confirm import confirm_sweep

    again = ["sweep", *sys.argv[1:]]
    with placed as place:
        code = confirm_sweep(
            sweep, storage_url, top=top, seeds=seeds, data_dir=data_dir, workers=wanted(workers),
            place=place, again=shlex.join(again), out=_stdout(), err=_stderr(),
            print_json=_print_json if as_json else None,
        )  # fmt: skip
    raise typer.Exit(code)


@app.command(rich_help_panel="Run")
def plan(
    sweep: Annotated[str, typer.Argument(help="A preset, a TOML file, or a sweep in the store.")],
    quick: Quick = False,
    overrides: Overrides = None,
    name: Name = None,
    workers: PlannedWorkers = AUTO,
    device: Annotated[
        str | None, typer.Option(help="PyTorch's name of the device. Default: a GPU if any.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each worker. Default: the sweep's.")
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(min=0, help="How long to measure, about; 0 only counts."),
    ] = 20.0,
    storage_url: Storage = DEFAULT_STORAGE,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Say what a sweep, or what is left of it, takes: trials, epochs, disk, measured time."""
    began = time.perf_counter()
    spec = _load(sweep, storage_url, quick, overrides, name)
    with _stderr().status("loading PyTorch and Optuna"):
        from sweeps.planning.words import plan_lines, plan_table
        from sweeps.preflight import plan_sweep
        from sweeps.progress import print_line

    planned = plan_sweep(
        spec, storage_url, data_dir=data_dir, workers=wanted(workers), device=device,
        threads=threads, seconds=seconds, began=began, err=_stderr(),
    )  # fmt: skip
    if as_json:
        _print_json(planned.as_dict())
        return
    out = _stdout()
    print_line(out, f"{spec.name}: {spec.question}")
    out.print(plan_table(planned))
    for line in plan_lines(planned):
        print_line(out, line)


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
    gpu_memory: Annotated[int | None, typer.Option("--gpu-memory", hidden=True)] = None,
    hold: Annotated[bool, typer.Option("--hold", hidden=True)] = False,
) -> None:
    """Join a sweep that was started: pull trials until its budget is met."""
    from sweeps.join import run_worker
    from sweeps.stopping import StopRequest

    if hold:
        import optuna.storages._rdb.storage  # noqa: F401 - what a store needs, while there is time

        if not os.read(0, 1):  # whoever started it has gone
            raise typer.Exit

    stop = StopRequest()
    received: list[int] = []

    def on_signal(number: int, _frame: object) -> None:
        # A launcher's own request may come twice, from it and from whoever stopped it.
        if received and not child:
            os._exit(130)
        received.append(number)
        # Of SIGTERM, too: a cluster that starts again what was interrupted has to know of it.
        stop.set(130)

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
        gpu_memory=gpu_memory,
        err=None if child else _stderr(),
    )
    raise typer.Exit(stop.exit_code)


@app.command(rich_help_panel="Run")
def stop(
    sweep: Annotated[str, typer.Argument(help="The name of a sweep in the store.")],
    storage_url: Storage = DEFAULT_STORAGE,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait until no trial is running.")
    ] = 30.0,
) -> None:
    """Ask a sweep's workers, on every machine, to put their trials back and end."""
    from sweeps.stop import stop_sweep

    _quiet_libraries()
    raise typer.Exit(stop_sweep(sweep, storage_url, wait=wait, err=_stderr()))


@app.command(rich_help_panel="Move")
def export(
    sweep: Annotated[str, typer.Argument(help="The name of a sweep in the store.")],
    file: Annotated[Path, typer.Argument(help="The file to write.")],
    storage_url: Storage = DEFAULT_STORAGE,
    force: Annotated[
        bool, typer.Option("--force", metavar="", help="Replace the file if it exists.")
    ] = False,
) -> None:
    """Write a sweep to one file, while workers run: trials, curves, checkpoints, spec."""
    from sweeps.transfer import export_sweep

    _quiet_libraries()
    typer.echo(export_sweep(sweep, file, storage_url, overwrite=force))


@app.command("import", rich_help_panel="Move")
def import_(
    file: Annotated[Path, typer.Argument(help="A file that sweep export wrote.")],
    storage_url: Storage = DEFAULT_STORAGE,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge", metavar="", help="Keep what both have computed where both have gone on."
        ),
    ] = False,
    name: Name = None,
) -> None:
    """Bring the sweep of a file into the store; sweep start goes on with it."""
    from sweeps.transfer import import_sweep

    _quiet_libraries()

    def say(line: str) -> None:
        typer.echo(line, err=True)

    typer.echo(import_sweep(file, storage_url, merge=merge, rename=name, say=say))


@app.command(rich_help_panel="Move")
def delete(
    sweep: Annotated[str, typer.Argument(help="The name of a sweep in the store.")],
    yes: Annotated[bool, typer.Option("--yes", metavar="", help="Do not ask.")] = False,
    storage_url: Storage = DEFAULT_STORAGE,
) -> None:
    """Remove a sweep, its confirmation and their checkpoints, for good."""
    from sweeps.delete import delete_sweep

    _quiet_libraries()
    raise typer.Exit(delete_sweep(sweep, storage_url, yes=yes, err=_stderr()))


@app.command(rich_help_panel="Run")
def serve(
    storage_url: Storage = DEFAULT_STORAGE,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 13000,
) -> None:
    """Let workers on other machines reach the store, as grpc://HOST:PORT."""
    from sweeps.serve import run_server

    raise typer.Exit(run_server(storage_url, host, port, typer.echo))


@app.command("list", rich_help_panel="Look")
def list_(storage_url: Storage = DEFAULT_STORAGE, as_json: Json = False) -> None:
    """List the presets, and the sweeps that the store holds, with how far they are."""
    from sweeps import specfiles
    from sweeps.listing import listed_table, presets_table, read_listed
    from sweeps.progress import print_line
    from sweeps.studies import shown_url, store_to_read

    presets = {}
    for preset in specfiles.presets():
        presets[preset] = str(specfiles.read_table(preset)[0].get("question", ""))
    store = store_to_read(storage_url)
    stored = read_listed(store) if store else []
    if as_json:
        rows = [{"name": n, "question": q} for n, q in presets.items()]
        _print_json({"presets": rows, "stored": [sweep.as_dict() for sweep in stored]})
        return
    _stdout().print(presets_table(presets))
    if stored:
        _stdout().print()
        _stdout().print(f"in {shown_url(storage_url)}", style="dim", markup=False, highlight=False)
        _stdout().print(listed_table(stored))
        for sweep in stored:
            if sweep.error:
                print_line(_stdout(), f"{sweep.name} cannot be read here: {sweep.error}")


@app.command(rich_help_panel="Look")
def show(
    sweep: Annotated[str, typer.Argument(help="A preset, a TOML file, or a sweep in the store.")],
    quick: Quick = False,
    overrides: Overrides = None,
    name: Name = None,
    storage_url: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Print a sweep as TOML; a file to start your own from.

    Unchanged, a preset or a file is shown as it is written, comments included; with `--quick`,
    `--set` or `extends`, what comes of it.
    """
    from sweeps.specfiles import written_alone

    spec = _load(sweep, storage_url, quick, overrides, name)
    if as_json:
        _print_json(spec.as_dict())
        return
    text = None if quick or overrides else written_alone(sweep)
    typer.echo(spec.as_toml() if text is None else text, nl=False)


@app.command(rich_help_panel="Look")
def status(
    sweep: Annotated[str | None, typer.Argument(help="One sweep. Default: all.")] = None,
    storage_url: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            metavar="",
            help="Follow one sweep until it is done; with --json, a line for each change.",
        ),
    ] = False,
    trials: Annotated[
        bool, typer.Option("--trials", metavar="", help="Every trial, in the place of the answer.")
    ] = False,
) -> None:
    """Say how far the store's sweeps are, and the best trial of each study."""
    if watch and sweep is None:
        raise typer.BadParameter("--watch follows one sweep; give its name")
    if watch and trials:
        raise typer.BadParameter("--watch shows how far the trials are; leave one of the two out")
    import gc

    if not watch:
        gc.disable()  # over before there is any: looking for it takes a fifth of the time
    from storage.engine import open_storage
    from sweeps.confirmation import read_answer
    from sweeps.progress import print_line
    from sweeps.report import answer_table, disk_line, outcome_lines, trials_table
    from sweeps.studies import shown_url, stored_sweep, stored_sweeps

    _quiet_libraries()
    if watch:
        from sweeps.watch import watch_sweep

        assert sweep is not None
        watch_sweep(sweep, storage_url, out=_stdout(), as_json=as_json)
        if as_json:
            return
    store = open_storage(storage_url, read_only=True)
    sweeps, unreadable = ([stored_sweep(store, sweep)], {}) if sweep else stored_sweeps(store)
    for name, error in unreadable.items():
        print_line(_stderr(), f"sweep: {name} cannot be read here: {error}")
    statuses = [read_answer(store, s) for s in sweeps]
    if as_json:
        told = [found.as_dict(trials=trials) for found in statuses]
        told += [{"name": name, "error": str(error)} for name, error in unreadable.items()]
        _print_json(told[0] if sweep else told)
        return
    if not statuses and not unreadable:
        raise SweepError(f"{shown_url(storage_url)} holds no sweep; sweep start NAME begins one")
    out = _stdout()
    for found in statuses:
        out.print(trials_table(found) if trials else answer_table(found))
        for line in (*outcome_lines(found), disk_line(found.name, storage_url)):
            print_line(out, line)


@app.command(rich_help_panel="Look")
def report(
    sweeps: Annotated[
        list[str], typer.Argument(metavar="SWEEP...", help="Sweeps in the store, one or more.")
    ],
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="The folder to write to. Default: NAME-report, here."),
    ] = None,
    formats: Annotated[
        list[PictureFormat] | None,
        typer.Option(
            "--format",
            show_default=False,
            help="Each figure as a file too; repeatable. Needs kaleido and Chrome or Chromium.",
        ),
    ] = None,
    storage_url: Storage = DEFAULT_STORAGE,
) -> None:
    """Write the answer as a page: in words, in tables, in figures. Several sweeps share them."""
    import gc

    # All that is read stays until the end: looking for garbage in it takes a third of the time.
    gc.disable()
    from storage.engine import open_storage
    from sweeps.dashboard import keep_figures
    from sweeps.figures import make_figures
    from sweeps.findings import read_findings
    from sweeps.page import default_folder, write_report
    from sweeps.pictures import check_pictures, write_pictures
    from sweeps.studies import stored_sweep

    _quiet_libraries()
    endings = [picture.value for picture in dict.fromkeys(formats or ())]
    if endings:
        check_pictures()
    store = open_storage(storage_url, read_only=True)
    names = list(dict.fromkeys(sweeps))
    found = [stored_sweep(store, name) for name in names]
    for confirmed in (s.spec.confirms for s in found if s.spec.confirms):
        raise SweepError(f"a confirmation stands in its sweep's report: sweep report {confirmed}")
    findings = [read_findings(store, one) for one in found]
    folder = folder or default_folder(names)
    figures = make_figures(findings)
    typer.echo(write_report(findings, figures, folder))
    if endings:
        for picture in write_pictures(figures, folder, endings):
            typer.echo(picture)
    try:
        for sweep in findings:
            keep_figures(
                storage_url, sweep, figures if len(findings) == 1 else make_figures([sweep])
            )
    except SweepError as error:
        # The report is there; whoever may only read the store needs no more.
        typer.echo(f"sweep: {error}", err=True)


@app.command(rich_help_panel="Look")
def best(
    sweep: Annotated[str, typer.Argument(help="The name of a sweep in the store.")],
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="The folder to write to. Default: NAME-best, here."),
    ] = None,
    storage_url: Storage = DEFAULT_STORAGE,
    data_dir: DataDir = None,
) -> None:
    """Write the best trial of each study to files: its weights, and its settings as TOML."""
    with _stderr().status("loading PyTorch and Optuna"):
        from sweeps.best import default_folder, write_best

    _quiet_libraries()
    code = write_best(
        sweep,
        storage_url,
        folder=folder or default_folder(sweep),
        data_dir=data_dir,
        say=typer.echo,
        warn=lambda line: typer.echo(f"sweep: {line}", err=True),
    )
    raise typer.Exit(code)


@app.command(rich_help_panel="Look")
def dashboard(
    storage_url: Storage = DEFAULT_STORAGE,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    writable: Annotated[
        bool,
        typer.Option(
            "--writable", metavar="", help="Let whoever reaches it change and delete studies."
        ),
    ] = False,
) -> None:
    """Open optuna-dashboard on the store."""
    from sweeps.dashboard import make_dashboard

    try:
        server = make_dashboard(storage_url, host, port, writable=writable)
    except OSError as error:
        raise SweepError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another --port, "
            "or an address of this machine for --host"
        ) from None
    with server:
        bound, port = server.server_address[:2]
        mode = "anyone who reaches it can change and delete studies" if writable else "read-only"
        typer.echo(f"optuna-dashboard on http://{bound!s}:{port}/ ({mode}); Ctrl-C ends it")
        server.serve_forever()


def main() -> None:
    """The console entry: errors become one line on stderr and an exit status."""
    # Python has None for a stream that was closed before it began.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    # SIGTERM ends a command as Ctrl-C does, also before it has a handler of its own.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = app(prog_name="sweep", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output went away, as `head` does.
        _drop_output()
        sys.exit(1)
    except Exception as error:
        told = told_of(error)
        if told is None:
            raise
        if is_full_disk(error):
            _drop_output()
        message, code = told
        if message is None:
            sys.exit(code)
        _fail(message, code)
    sys.exit(code if isinstance(code, int) else 0)


def _drop_output() -> None:
    # What Python still holds for the output would fail again at the end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: object, code: int) -> None:
    # A path or a value may hold line breaks of its own.
    print(f"sweep: {' '.join(str(message).splitlines())}", file=sys.stderr)
    sys.exit(code)


def _place(on: str, gpus_per_worker: float | None) -> AbstractContextManager[Place]:
    """Where workers are to run."""
    from sweeps.launch import open_place

    try:
        return open_place(on, gpus_per_worker)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _expect(
    place: Place, spec: SweepSpec, workers: int | None, storage_url: str, data_dir: Path | None
) -> None:
    """Let a place begin to start workers, where it is plain what they will be."""
    from sweeps.launch import worker_command
    from sweeps.machine import expected_slots

    trials = spec.budget.trials * len(spec.cells)
    slots = expected_slots(workers, spec.workers.threads, trials)
    place.expect(slots, worker_command(spec.name, data_dir), {"SWEEP_STORAGE": storage_url})


def _load(
    sweep: str, storage_url: str, quick: bool, overrides: list[str] | None, name: str | None
) -> SweepSpec:
    """A preset or a file; failing these, a sweep that the store has under this name.

    What is stored has taken its `--quick` into its settings, and has none any more.
    """
    from sweeps import specfiles
    from sweeps.studies import shown_url, store_to_read, stored_names, stored_sweep

    if not sweep.endswith(".toml") and sweep not in specfiles.presets():
        store = store_to_read(storage_url)
        names = stored_names(store) if store else []
        if sweep not in names:
            hint = nearest(sweep, [*specfiles.presets(), *names])
            raise SpecError(
                f"there is no preset {sweep!r}, and no sweep of this name in "
                f"{shown_url(storage_url)}; {hint}; a file of your own ends in .toml"
            )
        if quick:
            raise SpecError(
                f"{sweep} is a sweep in {shown_url(storage_url)}, and has no [quick] there; leave "
                "--quick out"
            )
        assert store is not None
        kept = stored_sweep(store, sweep).spec
        if not overrides and name is None:
            return kept
        return specfiles.changed(kept, overrides or (), name)
    return specfiles.load(sweep, quick=quick, overrides=overrides or (), rename=name)


def _stop_with_parent(stop: StopRequest) -> None:
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
