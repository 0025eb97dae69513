"""The arrows between packages, and where they were imported from."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import data
import models
import storage
import sweeps

PACKAGES = {
    package.__name__: Path(package.__file__).parent for package in (data, models, storage, sweeps)
}

# What each leaf may import of ours; everything else in `sweeps` sits above.
ALLOWED = {
    "data": {"data"},
    "models": {"models"},
    "storage": {"storage"},
    "sweeps.training": {"sweeps.training"},
    "sweeps.assembly": {
        "data", "models", "sweeps.config", "sweeps.execution", "sweeps.training",
    },
    "sweeps.epochs": {"storage", "sweeps.objective", "sweeps.training"},
    "sweeps.footprint": {"sweeps.assembly", "sweeps.config", "sweeps.machine"},
    "sweeps.errors": set(),
    "sweeps.execution": {"models", "sweeps.config"},
    "sweeps.failures": set(),
    "sweeps.files": set(),
    "sweeps.holding": {
        "storage", "sweeps.errors", "sweeps.limits", "sweeps.stopping", "sweeps.studies",
    },
    "sweeps.transfer_checks": {
        "storage", "sweeps.attributes", "sweeps.carrying", "sweeps.edits", "sweeps.errors",
        "sweeps.merging", "sweeps.spec", "sweeps.status", "sweeps.studies",
    },
    "sweeps.provenance": set(),
    "sweeps.stopping": set(),
    "sweeps.config": {"sweeps.errors"},
    "sweeps.space": {"sweeps.config", "sweeps.errors"},
    "sweeps.sections": {"sweeps.config", "sweeps.errors", "sweeps.space"},
    "sweeps.spec": {"sweeps.config", "sweeps.errors", "sweeps.space", "sweeps.sections"},
    "sweeps.specfiles": {"sweeps.config", "sweeps.errors", "sweeps.sections", "sweeps.spec"},
    "sweeps.search": {
        "sweeps.config", "sweeps.errors", "sweeps.space", "sweeps.spec", "sweeps.pruning",
    },
    "sweeps.planning.shapes": {"sweeps.config", "sweeps.errors", "sweeps.space", "sweeps.spec"},
    "sweeps.pruning": {"sweeps.config", "sweeps.attributes"},
    "sweeps.attributes": set(),
}  # fmt: skip


def first_party_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [node.module or ""]
            if node.module == "sweeps":
                names = [f"sweeps.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name for name in names if name.split(".")[0] in PACKAGES}
    return found


def modules() -> list[tuple[str, Path]]:
    found = []
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found.append((".".join((package, *parts)).removesuffix(".__init__"), path))
    return found


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: str(value))
def test_imports_follow_the_arrows(module: str, path: Path) -> None:
    for prefix, allowed in ALLOWED.items():
        if module == prefix or module.startswith(f"{prefix}."):
            for imported in first_party_imports(path):
                assert any(
                    imported == ok or imported.startswith(f"{ok}.") for ok in (*allowed, module)
                ), f"{module} imports {imported}"


def test_the_modules_of_storage_import_each_other_in_one_direction() -> None:
    arrows = {
        module: first_party_imports(path)
        for module, path in modules()
        if module.startswith("storage.")
    }
    TopologicalSorter(arrows).prepare()


def test_the_packages_come_from_one_place() -> None:
    assert len({folder.parent for folder in PACKAGES.values()}) == 1


def test_a_folder_of_the_users_does_not_stand_in_for_a_package(tmp_path: Path) -> None:
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('shadowed')")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "sweeps.cli", "list"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_help_imports_neither_torch_nor_optuna() -> None:
    code = (
        "import sys; sys.argv = ['sweep', '--help']\n"
        "from sweeps.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'optuna', 'sqlalchemy', 'plotly', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
