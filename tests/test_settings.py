"""Settings of runs: names, types and defaults, as YAML, and as the recipe of fine-tuning."""

import pytest

from gmcompress import GMError
from gmcompress.runs import Settings, setting_defaults, setting_kinds, typed
from gmcompress.runs.settings import RECIPE, read_budget, read_yaml, write_yaml
from gmcompress.tuning import Recipe


def test_settings_are_flat_outside_and_come_back(tmp_path):
    given = {"model": "resnet18", "override": ["a=C4"], "scale": [0.5, 1], "lr": "1e-3", "batch_size": 7}
    settings = Settings.read(given)
    assert (settings.lr, settings.override, settings.images.scale) == (1e-3, ("a=C4",), (0.5, 1.0))
    assert Settings.read(settings.flat()) == settings
    write_yaml(tmp_path / "args.yaml", settings)
    assert Settings.read(read_yaml(tmp_path / "args.yaml")) == settings
    assert setting_defaults() == Settings.read({}).flat()
    assert list(setting_defaults()) == list(setting_kinds())


def test_settings_default_to_the_recipe_of_fine_tuning():
    assert Settings().recipe() == Recipe(epochs=10)
    assert Settings(minutes=2.5).recipe() == Recipe(minutes=2.5)
    assert Settings(epochs=0).recipe() == Recipe()


def test_settings_as_a_recipe():
    given = {"opt": "adamw", "warmup_epochs": 3, "clip_grad": 0, "model_ema": True, "model_ema_decay": 0.9, "amp": True}
    found = Settings.read(given | {"amp_dtype": "float16", "recalibrate": "never", "epochs": 4}).recipe()
    expected = {"optimizer": "adamw", "warmup": 3.0, "clip": None, "ema": 0.9, "amp": "fp16", "recalibrate": False}
    assert found == Recipe(epochs=4, **expected)
    same = {"features": 0.5, "blocks": ["a"], "anneal": 0.25, "decay": "factors", "trial_lrs": [0.1], "trial_steps": 7}
    assert Settings.read(same | {"epochs": 4}).recipe() == Recipe(epochs=4, **same)
    assert Settings.read({"amp": False}).recipe().amp == "no"


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (int, "3", 3),
        (float, 2, 2.0),
        (float | None, None, None),
        (tuple[float, ...] | None, 0.5, (0.5,)),
        (tuple[str, ...], ["a", "b"], ("a", "b")),
        (bool | None, True, True),
    ],
)
def test_values_become_their_types(kind, given, expected):
    assert typed("x", kind, given) == expected


@pytest.mark.parametrize(
    ("kind", "given"), [(int, 1.5), (int, True), (int, "x"), (float, []), (bool, 1), (str, 3), (str, None), (int, None)]
)
def test_values_of_other_types_are_refused(kind, given):
    with pytest.raises(GMError, match="x is "):
        typed("x", kind, given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"learning_rate": 1}, "no setting 'learning_rate'"),
        ({"lr": "fast"}, "lr is a number, not 'fast'"),
        ({"override": ["a"]}, "an override is PATTERN=VALUE"),
        ({"override": ["a=C2", "a=C4"]}, "each pattern once"),
        ({"amp_dtype": "int8"}, "amp_dtype is bfloat16 or float16"),
        ({"model_ema": True, "model_ema_decay": 1}, "model_ema_decay is a number between"),
        ({"budget": ["25%"], "rank": 1}, "budget and rank do not go together"),
        ({"rank": 0, "plan": "plan.json"}, "rank and plan do not go together"),
        ({"compressed": "small", "budget": ["25%"]}, "budget and compressed do not go together"),
        ({"residual": "lowrank"}, "it goes with rank"),
        ({"ties": ["a"], "rank": 1}, "they do not go with rank"),
        ({"plan": "plan.json", "exclude": ["a"]}, "so exclude does not go with it"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"budget": 0.25}, "budget is text, not 0.25"),
        ({"epochs": -1}, "epochs must be at least 0"),
        ({"epochs": 1, "minutes": 1}, "epochs or minutes, not both"),
    ],
)
def test_unusable_settings_are_named(given, said):
    def use():
        settings = Settings.read(given)
        return settings.recipe(), settings.compression()

    with pytest.raises(GMError, match=said):
        use()


@pytest.mark.parametrize("text", ["[1, 2", "- a\n- b", "1: 2", "\x00"])
def test_a_file_that_is_no_yaml_of_settings(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(GMError, match=r"x\.yaml"):
        read_yaml(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["25%"], ["25 % of the parameters"]),
        (["0.25"], ["25 % of the parameters"]),
        (["params=100000", "bytes=33.3%"], ["at most 100,000 parameters", "33.3 % of the bytes"]),
        (["macs=1e6"], ["at most 1,000,000 multiply-adds"]),
    ],
)
def test_budgets_as_they_are_written(texts, expected):
    assert [str(each) for each in read_budget(texts)] == expected
    assert Settings.read({"budget": texts}).compression()["budget"] == read_budget(texts)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["25"], "25 of what\\? write params=25, or a share of the parameters such as 25%"),
        (["1"], "1 of what"),
        (["nan"], "nan of what"),
        (["small"], "a budget is a share such as 25%, or limits such as .*, not 'small'"),
        (["params="], "not 'params='"),
        (["25%", "params=10%"], "limits each kind once, but 'params=10%' is the second for params"),
        (["parms=25%"], "no cost is called 'parms'; the nearest are 'params'"),
        (["125%"], "up to 100 %"),
        (["bytes=0"], "at least 1, not 0"),
        (["=5"], "no cost is called ''"),
    ],
)
def test_budgets_that_are_none(texts, said):
    with pytest.raises(GMError, match=said):
        Settings.read({"budget": texts})


def test_one_way_to_choose_the_structures():
    assert Settings().compression()["budget"] is None  # the default of compress
    literal = Settings(rank=0).compression()
    assert (literal["rank"], literal["residual"]) == (0, "displacement")
    assert "budget" not in literal
    assert Settings(ties=("a",)).compression()["ties"] == ("a",)


def test_the_settings_of_training():
    from gmcompress.cli import flags

    assert set(RECIPE) == set(flags.TRAINING)
