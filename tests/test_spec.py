"""What a sweep's file may say, and what is said of one that is wrong."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

import data.sources
import data.splits
import models
from sweeps import config, edits, specfiles
from sweeps.config import TrialConfig
from sweeps.errors import SpecError
from sweeps.space import Range
from sweeps.spec import SweepSpec

SMALL: dict[str, Any] = {
    "question": "Which?",
    "train": {"dataset": "digits", "epochs": 10, "norm": "group", "num_groups": 2},
    "each": {"global_batch_size": [80, 320]},
    "search": {
        "peak_lr": {"low": 0.01, "high": 1.0, "log": True},
        "warmup_epochs": {"low": 0.0, "high": 5.0, "step": 0.5},
        "clip_grad_norm": {"choices": ["off", 1.0]},
    },
    "try": [{"label": "known", "peak_lr": 0.1, "when": {"global_batch_size": 80}}],
    "budget": {"trials": 5},
}


def build(**changes: Any) -> SweepSpec:
    return SweepSpec.from_table({**SMALL, **changes}, name="small")


def study_names(made: SweepSpec) -> list[str]:
    return [made.study_name(cell) for cell in made.cells]


def write(path: Path, table: dict[str, Any]) -> str:
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    return str(path)


def test_names_are_those_of_the_leaves() -> None:
    assert config.DATASETS == data.sources.DATASETS
    assert config.SPLITS == data.splits.SPLITS
    assert config.ASSIGNMENTS == data.splits.ASSIGNMENTS
    assert config.MODELS == models.MODELS
    assert config.NORMS == models.NORMS


def test_every_setting_is_described_and_accepts_its_default() -> None:
    for name, setting in TrialConfig.settings().items():
        assert setting.doc.endswith("."), name
        assert setting.check(name, getattr(TrialConfig(), name)) == getattr(TrialConfig(), name)


@pytest.mark.parametrize("name", specfiles.presets())
@pytest.mark.parametrize("quick", [False, True])
def test_presets_are_sound(name: str, quick: bool) -> None:
    loaded = specfiles.load(name, quick=quick)
    assert loaded.title
    assert loaded.question.endswith("?")
    assert loaded.source
    assert SweepSpec.from_dict(loaded.as_dict()) == loaded


def test_largebatch_presets_search_what_the_experiments_vary() -> None:
    for name in ("fixup-largebatch", "groupnorm-largebatch"):
        loaded = specfiles.load(name)
        assert [cell["global_batch_size"] for cell in loaded.cells] == [128, 1024, 2048]
        assert set(loaded.search) == {
            "peak_lr", "warmup_start_factor", "warmup_epochs", "clip_grad_norm",
        }  # fmt: skip
        assert "off" in loaded.search["clip_grad_norm"].choices
        for cell in loaded.cells:
            made = loaded.config(cell, loaded.lowest_params())
            assert (made.model, made.dataset, made.epochs) == ("resnet18", "cifar10", 100)
            assert (made.num_devices, made.split, made.classes_per_device) == (10, "classes", 2)


def test_one_study_for_each_value() -> None:
    assert study_names(build()) == ["small/global_batch_size=80", "small/global_batch_size=320"]


def test_each_may_be_a_product_or_a_list_of_cells() -> None:
    train = {"dataset": "digits", "num_groups": 2}
    axes = {"norm": ["batch", "group"], "split": ["iid", "classes"]}
    product = build(train=train, each=axes, **{"try": []})
    assert len(product.cells) == 4
    cells = [{"norm": "batch", "split": "iid"}, {"norm": "group", "split": "classes"}]
    listed = build(train=train, each=cells, **{"try": []})
    assert [dict(cell) for cell in listed.cells] == cells
    assert study_names(listed)[0] == "small/norm=batch,split=iid"


def test_without_each_the_study_is_called_as_the_sweep() -> None:
    loaded = build(each={}, **{"try": []})
    assert study_names(loaded) == ["small"]


def test_the_batch_size_may_be_searched() -> None:
    search = {**SMALL["search"], "global_batch_size": {"low": 64, "high": 1024, "log": True}}
    loaded = build(each={}, search=search, **{"try": []})
    assert loaded.config({}, {**loaded.lowest_params()}).global_batch_size == 64


LOG_RANGES = st.tuples(st.floats(1e-4, 1e2), st.floats(1.1, 100)).map(
    lambda pair: {"low": pair[0], "high": pair[0] * pair[1], "log": True}
)
CLIPS = st.lists(st.one_of(st.just("off"), st.floats(0.1, 10)), min_size=1, max_size=4, unique=True)
values = st.one_of(
    st.tuples(st.just("peak_lr"), LOG_RANGES),
    st.tuples(st.just("momentum"), st.just({"low": 0.0, "high": 0.99})),
    st.tuples(st.just("plateau_patience"), st.just({"low": 1, "high": 9, "step": 2})),
    st.tuples(st.just("clip_grad_norm"), CLIPS.map(lambda choices: {"choices": choices})),
)


@given(st.lists(values, min_size=1, max_size=4, unique_by=lambda pair: pair[0]))
def test_a_spec_survives_json_and_toml(search: list[tuple[str, dict[str, Any]]]) -> None:
    made = build(search=dict(search), **{"try": []})
    assert SweepSpec.from_dict(made.as_dict()) == made
    assert SweepSpec.from_dict(json.loads(json.dumps(made.as_dict()))) == made
    assert SweepSpec.from_dict(tomllib.loads(tomli_w.dumps(made.as_dict()))) == made


def test_a_step_of_whole_numbers_may_be_written_with_a_point() -> None:
    made = build(search={"plateau_patience": {"low": 2, "high": 9, "step": 2.0}}, **{"try": []})
    space = made.search["plateau_patience"]
    assert repr(space) == repr(Range(low=2, high=8, step=2))


def test_step_lowers_high_as_optuna_does() -> None:
    made = build(search={"warmup_epochs": {"low": 0.0, "high": 5.0, "step": 0.75}}, **{"try": []})
    assert made.search["warmup_epochs"].high == 4.5
    assert made.search["warmup_epochs"].contains(2.25)
    assert not made.search["warmup_epochs"].contains(2.0)


WRONG = [
    ({"trian": {}}, "'train'"),
    ({"train": {"epoch": 3}}, "did you mean 'epochs'"),
    ({"train": {"epochs": 0}}, "accepted: a whole number from 1"),
    ({"train": {"epochs": 2.5}}, "accepted: a whole number"),
    ({"train": {"epochs": True}}, "epochs = True"),
    ({"train": {"epochs": float("inf")}}, "epochs = inf"),
    ({"train": {"epochs": float("nan")}}, "epochs = nan"),
    ({"train": {"epochs": 10**400}}, "accepted: a whole number from 1, and no more than 1e18"),
    ({"train": {"norm": "grop"}}, "did you mean 'group'"),
    ({"train": {"momentum": float("nan")}}, "momentum = nan"),
    ({"train": {"dataset": "cifar10", "noise_std": 1.0}}, "noise_std"),
    ({"train": 3}, "not a table"),
    ({"each": {"global_batch_sizes": [1]}}, "did you mean 'global_batch_size'"),
    ({"each": {"global_batch_size": 80}}, "not a list"),
    ({"each": {"global_batch_size": [80, 80]}}, "twice"),
    ({"each": {"global_batch_size": [5]}, "try": []}, "too small"),
    ({"each": [{"norm": "group"}, {"split": "iid"}]}, "same keys"),
    ({"search": {"peak_rl": {"low": 0.1, "high": 1.0}}}, "did you mean 'peak_lr'"),
    ({"search": {"peak_lr": {"low": 1.0, "high": 0.1}}}, "not below"),
    ({"search": {"peak_lr": {"low": 0.1}}}, "lacks high"),
    ({"search": {"peak_lr": {"low": 0.1, "high": 1.0, "stpe": 1}}}, "did you mean 'step'"),
    ({"search": {"warmup_epochs": {"low": 0.0, "high": 5.0, "log": True}}}, "above 0"),
    ({"search": {"peak_lr": {"low": 0.1, "high": 1.0, "step": 0.1, "log": True}}}, "exclude"),
    ({"search": {"peak_lr": {"low": 0.1, "high": 1.0, "step": 2.0}}}, "longer"),
    ({"search": {"peak_lr": {"low": 0.1, "high": 1.0, "step": 5e-324}}}, "too short"),
    ({"search": {"peak_lr": {"low": -1.0, "high": 1.0}}}, "above 0"),
    ({"search": {"norm": {"low": 0, "high": 1}}}, "choices"),
    ({"search": {"norm": {"choices": ["group", "grp"]}}}, "did you mean 'group'"),
    ({"search": {"clip_grad_norm": {"low": "off", "high": 1.0}}}, "choices"),
    ({"search": {"peak_lr": {"choices": [0.1], "low": 0.1}}}, "stand alone"),
    ({"search": {"epochs": {"low": 1, "high": 5}}}, "the same in all trials"),
    ({"search": {"warmup_epochs": {"low": 0.0, "high": 50.0}}, "try": []}, "longer than the"),
    ({"search": {"global_batch_size": {"low": 80, "high": 320}}}, "keep one"),
    ({"search": {"norm": {"choices": ["group", "layer"]}}}, "keep one"),
    ({"try": [{"peak_lrs": 0.1}]}, "did you mean 'peak_lr'"),
    ({"try": [{"label": "x", "peak_lr": 3.0}]}, "0.01 to 1 (log)"),
    ({"try": [{"warmup_epochs": 0.3}]}, "in steps of 0.5"),
    ({"try": [{"clip_grad_norm": 2.0}]}, "one of off, 1.0"),
    ({"try": [{"peak_lr": 0.1, "when": {"global_batch_size": 81}}]}, "no study"),
    ({"try": [{"peak_lr": 0.1, "when": {"epochs": 10}}]}, "global_batch_size"),
    ({"try": [{"label": "a"}, {"label": "a"}]}, "twice"),
    ({"budget": {"trails": 3}}, "did you mean 'trials'"),
    ({"budget": {"trials": 0}}, "whole number from 1"),
    ({"budget": {"trials": 10**13}}, "whole number from 1 to 1000000000000"),
    ({"budget": {"hours": 1e7}}, "above 0 to 1e+06"),
    ({"budget": {"trials": 1}, "try": [{"label": "a"}, {"label": "b"}]}, "fewer"),
    ({"workers": {"thread": 1}}, "did you mean 'threads'"),
    ({"sampler": {"seed": -1}}, "whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), WRONG, ids=lambda value: str(value)[:60])
def test_a_mistake_is_refused_and_explained(change: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        build(**change)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_contradiction_within_the_space_is_found() -> None:
    """Neither at its lowest nor at its highest corner: many devices with a small batch."""
    search = {
        "num_devices": {"choices": [2, 40]},
        "global_batch_size": {"choices": [16, 64]},
    }
    with pytest.raises(SpecError, match=r"too small.*reaches num_devices = 40"):
        build(each={}, search=search, **{"try": []})


def test_a_mistake_in_quick_shows_without_quick(tmp_path: Path) -> None:
    table = {**SMALL, "quick": {"train": {"epcohs": 3}}}
    with pytest.raises(SpecError, match="did you mean 'epochs'"):
        specfiles.load(write(tmp_path / "mine.toml", table))


def test_overrides_reach_any_key(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.toml", SMALL)
    made = specfiles.load(
        path,
        overrides=[
            "epochs=7", "norm=fixup", "trials=9", "each.global_batch_size=[80]",
            "search.peak_lr.high=0.5", "search.clip_grad_norm={choices=['off']}",
            "sampler.type=RandomSampler", "pruner.n_warmup_steps = 4", "title=Mine",
            "search.warmup_epochs.step=0.25",
        ],
    )  # fmt: skip
    assert made.train["epochs"] == 7
    assert made.train["norm"] == "fixup"
    assert made.budget.trials == 9
    assert made.search["peak_lr"].high == 0.5
    assert made.search["clip_grad_norm"].choices == ("off",)
    assert made.sampler["type"] == "RandomSampler"
    assert made.pruner["n_warmup_steps"] == 4
    assert made.title == "Mine"


def test_a_whole_section_may_be_overridden(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.toml", SMALL)
    made = specfiles.load(
        path, overrides=["try=[]", "each={ norm = ['group'] }", "train={ epochs = 8 }"]
    )
    assert study_names(made) == ["mine/norm=group"]
    assert made.tries == ()
    assert dict(made.train) == {"epochs": 8}


def test_enumerating_less_drops_the_tries_of_what_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.toml", SMALL)
    assert specfiles.load(path, overrides=["each.global_batch_size=[320]"]).tries == ()
    assert len(specfiles.load(path, overrides=["each.global_batch_size=[80]"]).tries) == 1


def test_enumerating_less_than_what_is_extended_leaves_its_other_tries_out(tmp_path: Path) -> None:
    def path(name: str, table: dict[str, Any]) -> str:
        return write(tmp_path / f"{name}.toml", table)

    def tried(size: int) -> dict[str, Any]:
        return {"label": f"at {size}", "when": {"global_batch_size": size}, "peak_lr": 0.1}

    def labels(name: str, **given: Any) -> list[str]:
        return [t.label for t in specfiles.load(str(tmp_path / f"{name}.toml"), **given).tries]

    path("mine", {**SMALL, "try": [tried(80), tried(320)]})
    few = {"extends": "mine.toml", "each": {"global_batch_size": [320]}}
    path("few", few)
    path("above", {"extends": "few.toml"})
    for name in ("few", "above"):
        assert labels(name) == ["at 320"]
        assert labels(name, overrides=["each.global_batch_size=[80]"]) == ["at 80"]
        assert labels(name, overrides=["each.global_batch_size=[80, 320]"]) == ["at 80", "at 320"]
    with pytest.raises(SpecError, match="'at 80': no study of"):
        specfiles.load(path("own", {**few, "try": [tried(80)]}))

    path("quick", {**few, "quick": {"each": {"global_batch_size": [80]}}})
    assert (labels("quick"), labels("quick", quick=True)) == (["at 320"], ["at 80"])
    path("slow", {**SMALL, "try": [tried(80)], "quick": {"try": [tried(80), tried(320)]}})
    path("small", {**few, "extends": "slow.toml"})
    assert (labels("small"), labels("small", quick=True)) == ([], ["at 320"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epochs", "key=value"),
        ("epcohs=3", "did you mean 'epochs'"),
        ("trian.epochs=3", "did you mean 'train'"),
        ("global_batch_size=80", "each.global_batch_size"),
        ("peak_lr=0.1", "search.peak_lr"),
        ("train.epochs.x=3", "not a table"),
        ("budget.trials=many", "whole number"),
        ("epochs=3\nnorm='fixup'", "epochs = "),
        ("epochs=" + "9" * 5000, "accepted: a whole number"),
        ("each=" + "[" * 5000 + "]" * 5000, "neither a table"),
    ],
)
def test_a_wrong_override_is_explained(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SpecError, match=None) as caught:
        specfiles.load(write(tmp_path / "mine.toml", SMALL), overrides=[text])
    assert said in str(caught.value)


def test_quick_overrides_and_renames(tmp_path: Path) -> None:
    table = {
        **SMALL,
        "quick": {
            "train": {"epochs": 6},
            "each": {"global_batch_size": [40]},
            "search": {"peak_lr": {"choices": [0.1, 0.2]}},
            "try": [{"label": "short", "peak_lr": 0.2}],
            "budget": {"trials": 2},
        },
    }
    path = write(tmp_path / "mine.toml", table)
    full, quick = specfiles.load(path), specfiles.load(path, quick=True)
    assert (full.name, quick.name) == ("mine", "mine-quick")
    assert full.train["epochs"] == 10
    assert quick.train == {**full.train, "epochs": 6}
    assert study_names(quick) == ["mine-quick/global_batch_size=40"]
    assert quick.search["peak_lr"].choices == (0.1, 0.2)
    assert quick.search["warmup_epochs"] == full.search["warmup_epochs"]
    assert [t.label for t in quick.tries] == ["short"]
    assert quick.budget.trials == 2


def test_quick_mistakes_are_explained(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no \\[quick\\] table"):
        specfiles.load(write(tmp_path / "mine.toml", SMALL), quick=True)
    table = {**SMALL, "quick": {"trian": {}}}
    with pytest.raises(SpecError, match="did you mean 'train'"):
        specfiles.load(write(tmp_path / "mine.toml", table), quick=True)


def test_what_is_no_sweep_is_explained(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="did you mean 'fixup-largebatch'"):
        specfiles.load("fixup-largebtach")
    with pytest.raises(SpecError, match="cannot read"):
        specfiles.load(str(tmp_path / "none.toml"))
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(SpecError, match="not TOML"):
        specfiles.load(str(tmp_path / "bad.toml"))
    for number in ("[" * 5000 + "]" * 5000, "9" * 5000):
        (tmp_path / "bad.toml").write_text(f"a = {number}")
        with pytest.raises(SpecError, match=r"deeply|not TOML"):
            specfiles.load(str(tmp_path / "bad.toml"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(SpecError, match="UTF-8"):
        specfiles.load(str(tmp_path / "bytes.toml"))
    with pytest.raises(SpecError, match="cannot be called"):
        specfiles.load(write(tmp_path / "a b.toml", SMALL))
    with pytest.raises(SpecError, match="cannot be called ''"):
        specfiles.load(write(tmp_path / "mine.toml", SMALL), rename="")


def test_a_sweep_is_not_called_as_a_confirmation_is(tmp_path: Path) -> None:
    file = write(tmp_path / "mine-confirm.toml", SMALL)
    refused = "names that end in -confirm are those of what sweep confirm writes"
    with pytest.raises(SpecError, match=refused):
        specfiles.load(file)
    with pytest.raises(SpecError, match=refused):
        specfiles.load("fixup-largebatch", rename="mine-confirm")
    mine = specfiles.load(file, rename="mine")
    with pytest.raises(SpecError, match=refused):
        specfiles.changed(mine, rename="mine-confirm")
    # What another sweep starts from is not what is run, nor is one of old to be given up.
    (tmp_path / "next.toml").write_text('extends = "mine-confirm.toml"')
    assert specfiles.load(str(tmp_path / "next.toml")).search == mine.search
    old = SweepSpec.from_dict({**mine.as_dict(), "name": "old-confirm"})
    assert specfiles.changed(old, ["trials=50"]).budget.trials == 50


def test_differences_name_dotted_keys() -> None:
    changed = build(train={**SMALL["train"], "epochs": 11}, budget={"trials": 6})
    assert edits.differences(build(), changed) == {
        "train.epochs": (10, 11),
        "budget.trials": (5, 6),
    }


BASE = """
question = "base?"
[train]
dataset = "digits"
epochs = 4
[search]
peak_lr = { low = 0.01, high = 0.3, log = true }
[budget]
trials = 4
[quick.train]
epochs = 2
[quick.budget]
trials = 2
"""


def test_a_sweep_extends_another_as_quick_overrides_it(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "own.toml").write_text(
        'extends = "base.toml"\nquestion = "own?"\n[train]\nnorm = "layer"\n'
        "[search]\npeak_lr = { low = 0.1, high = 0.2 }\n[quick.budget]\nseeds = 2\n"
    )
    own, base = (specfiles.load(str(tmp_path / f"{name}.toml")) for name in ("own", "base"))
    assert (own.name, own.question) == ("own", "own?")
    assert own.train == {**base.train, "norm": "layer"}
    assert own.search["peak_lr"] == Range(low=0.1, high=0.2)
    quick = specfiles.load(str(tmp_path / "own.toml"), quick=True)
    assert quick.train["epochs"] == 2
    assert (quick.budget.trials, quick.budget.seeds) == (2, 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('extends = "own.toml"', "cannot extend itself"),
        ('extends = "other.toml"', "cannot read"),
        ('extends = "fixup-largebach"', "fixup-largebatch"),
        ("extends = 3", "extends = 3"),
        ('extends = "../{folder}/own.toml"', "cannot extend itself"),
        ('extends = "a\\u0000.toml"', "null byte"),
        ('extends = "fixup-largebatch"\neach = [1]', "1, which is not a table"),
    ],
)
def test_what_cannot_be_extended_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "own.toml").write_text(text.replace("{folder}", tmp_path.name))
    with pytest.raises(SpecError, match=said):
        specfiles.load(str(tmp_path / "own.toml"))


def test_what_a_sweep_moves_to_another_section_leaves_the_one_it_had(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "own.toml").write_text(
        'extends = "base.toml"\n[train]\npeak_lr = 0.1\n'
        "[search]\nmomentum = { low = 0.1, high = 0.9 }"
    )
    own = specfiles.load(str(tmp_path / "own.toml"))
    assert (own.train["peak_lr"], set(own.search)) == (0.1, {"momentum"})
