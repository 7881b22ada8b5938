"""The benchmark of the tables: it runs, its networks keep to their sizes, and its images are what they say."""

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import assert_close, must_fail
from torch import Generator, Tensor

from gmcompress import GMError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_every_row_runs_and_is_taken_over(modules: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables, rows = modules("tables"), modules("table_models").ROWS
    output = tmp_path / "tables.jsonl"
    arguments = ["--smoke", "--output", str(output)]
    assert tables.main(arguments) == 0
    first = modules("rows").read_rows(output)
    assert [(each["table"], each["row"]) for each in first] == [(row.table, row.name) for row in rows]
    for line, row in zip(first, rows, strict=True):
        assert line["most"] is None or line["parameters"] <= line["most"]
        assert line["parameters"] == sum(each.numel() for each in row.build().parameters())
        assert math.isfinite(line["loss"])
        assert 0 <= line["accuracy"] <= 100
        assert line["published"]
        assert str(tmp_path) not in line["command"]
    said = capsys.readouterr().out
    assert all(row.name in said for row in rows)
    again = ["--smoke", "--tables", "rectangles", "noise", "--resume", "--output", str(output)]
    assert tables.main(again) == 0
    assert modules("rows").read_rows(output) == first
    assert tables.main([*again, "--seeds", "0", "1"]) == 0
    assert [each["seed"] for each in modules("rows").read_rows(output)[len(first) :]] == [1, 1]


def test_the_rows_of_the_results_would_be_taken_over(modules: Any) -> None:
    """Unless their own command says otherwise, the recipes are those of the table."""
    tables, rows = modules("tables"), modules("table_models").ROWS
    found = modules("rows").read_rows(BENCHMARKS / "results" / "tables.jsonl")
    assert found
    for line in found:
        row = next(each for each in rows if (each.table, each.name) == (line["table"], line["row"]))
        options = tables.parse(["--smoke", "--epochs", str(line["recipe"]["epochs"])])
        options.smoke = line["smoke"]
        assert line.items() >= json.loads(json.dumps(tables.settings(row, options))).items()


def test_a_seed_is_one_result(modules: Any, tmp_path: Path) -> None:
    tables = modules("tables")
    for seed in ("0", "0", "1"):
        arguments = ["--smoke", "--tables", "rectangles", "--seeds", seed, "--output", str(tmp_path / "x.jsonl")]
        assert tables.main(arguments) == 0
    first, same, other = (each["loss"] for each in modules("rows").read_rows(tmp_path / "x.jsonl"))
    assert first == same != other


def test_what_the_command_line_refuses(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = modules("tables")
    with pytest.raises(SystemExit):
        tables.main(["--tables", "noise"])
    for arguments, said in (
        (["--smoke", "--tables", "noise", "--rows", "nine layers"], "is called 'nine layers'"),
        (["--data", str(tmp_path), "--tables", "noise"], "there is no file"),
        (["--smoke", "--tables", "noise", "--held-out", "40"], "40 cannot be held out"),
    ):
        assert tables.main([*arguments, "--output", str(tmp_path / "y.jsonl")]) == 2
        assert said in capsys.readouterr().err
    row = modules("dataclasses").replace(modules("table_models").ROWS[-1], most=10)
    monkeypatch.setattr(tables, "ROWS", (row,))
    assert tables.main(["--smoke", "--tables", "rectangles", "--output", str(tmp_path / "y.jsonl")]) == 2
    assert "more than 10" in capsys.readouterr().err
    assert not (tmp_path / "y.jsonl").exists()


def assert_outlines(pixels: Tensor, labels: Tensor) -> None:
    for image, label in zip(pixels[:, 0], labels, strict=True):
        rows, columns = image.any(1).nonzero()[:, 0], image.any(0).nonzero()[:, 0]
        tall, wide = (int(each[-1] - each[0]) + 1 for each in (rows, columns))
        assert abs(tall - wide) >= 3
        assert int(label) == (tall > wide)
        assert int((image > 0).sum()) == tall * wide - max(0, tall - 2) * max(0, wide - 2)


def test_rectangles_are_outlines_named_by_their_longer_side(modules: Any) -> None:
    data = modules("table_data")
    task = data.rectangles(data.made_up(150))
    assert_outlines(task.train.pixels, task.train.labels)
    assert_outlines(task.test.pixels, task.test.labels)
    assert 0.3 < float(task.test.labels.float().mean()) < 0.7
    must_fail(assert_outlines, task.train.pixels, 1 - task.train.labels)


def sources(data: ModuleType, count: int) -> Any:
    """A bar on black in place of every digit, and photographs of a light ramp."""
    pixels = torch.zeros(2 * count, 1, 28, 28, dtype=torch.uint8)
    pixels[:, :, 6:22, 12:16] = 200
    images = data.Images(pixels, torch.arange(2 * count) % 10)
    scenes = [torch.arange(50).mul(2).add(20).to(torch.uint8).repeat(40, 1)]
    return data.Sources(lambda _: images, lambda: images, lambda: scenes, (count, count))


def test_variations_are_made_from_the_digits(modules: Any) -> None:
    data = modules("table_data")
    given = sources(data, 40)
    noise = data.variation(given, "noise")
    bar = given.digits().pixels[0]
    assert bool((noise.train.pixels >= bar).all())
    assert int(noise.test.pixels[..., :6, :].float().std()) > 60
    turned = data.variation(given, "rotated")
    mass = turned.train.pixels.float().sum((1, 2, 3))
    assert_close(mass / float(bar.sum()), torch.ones(40), slack=3000)
    assert len({tuple(each.flatten().tolist()) for each in turned.train.pixels}) == 40
    behind = data.variation(given, "rotated-backgrounds")
    assert bool((behind.train.pixels >= turned.train.pixels).all())
    corner = behind.train.pixels[:, 0, 0, :2].long()
    assert bool((corner[:, 1] - corner[:, 0] == 2).all())  # the ramp of the photograph
    assert torch.equal(turned.train.labels, behind.train.labels)
    plain = data.Sources(given.cifar, given.digits, lambda: [torch.full((40, 40), 90, dtype=torch.uint8)], (40, 40))
    with pytest.raises(GMError, match="livelier"):
        data.variation(plain, "rotated-backgrounds")


def test_images_held_out_are_not_learned_from(modules: Any) -> None:
    data = modules("table_data")
    task = data.cifar(data.made_up(30), "cifar")
    kept = task.held_out(10)
    seen = {tuple(each.flatten().tolist()) for each in kept.train.pixels}
    judged = {tuple(each.flatten().tolist()) for each in kept.test.pixels}
    every = {tuple(each.flatten().tolist()) for each in task.train.pixels}
    assert (len(seen), len(judged)) == (20, 10)
    assert seen | judged == every
    assert len(kept.first(7).train.labels) == 7


@pytest.mark.parametrize("kind", ["channel", "image"])
def test_scaled_pixels_have_mean_zero_and_deviation_one(modules: Any, kind: str, generator: Generator) -> None:
    pixels = torch.randint(0, 256, (300, 2, 4, 4), generator=generator, dtype=torch.uint8)
    pixels[:, 1] //= 4
    scaled = modules("table_training").Scaling(pixels, kind)(pixels).double()
    over = (0,) if kind == "image" else (0, 2, 3)
    assert_close(scaled.mean(over), torch.zeros_like(scaled.mean(over)), slack=1e8)
    assert_close(scaled.std(over, correction=0), torch.ones_like(scaled.std(over)), slack=1e8)


def test_augmented_images_are_those_the_recipe_names(modules: Any, generator: Generator) -> None:
    training = modules("table_training")
    pixels = torch.randint(0, 256, (200, 1, 6, 6), generator=generator, dtype=torch.uint8)
    torch.manual_seed(0)

    def kinds(recipe: Any, *images: Tensor) -> None:
        """Each of these is what some image became, and every image became one of these."""
        found = training.augmented(pixels, recipe)
        same = torch.stack([(found == each).flatten(1).all(1) for each in images])
        assert bool(same.any(0).all())
        assert bool(same.any(1).all())

    recipe = training.Recipe(1)
    kinds(recipe, pixels)
    kinds(training.Recipe(1, flip=True), pixels, pixels.flip(3))
    kinds(training.Recipe(1, flip_rows=True), pixels, pixels.flip(2))
    kinds(training.Recipe(1, turns="quarter"), *(pixels.rot90(turn, (2, 3)) for turn in range(4)))
    must_fail(kinds, training.Recipe(1, flip=True), pixels)
    assert_close(training.rotated(pixels.float(), torch.full((200,), math.pi / 2)), pixels.rot90(1, (2, 3)).float())
    with pytest.raises(GMError, match="turns is one of"):
        training.Recipe(1, turns="half")


def test_a_row_learns_its_task(modules: Any) -> None:
    data, training = modules("table_data"), modules("table_training")
    row = modules("table_models").ROWS[-1]
    task = data.rectangles(data.made_up(160))
    torch.manual_seed(0)
    model = row.build()
    recipe = training.Recipe(epochs=6, batch_size=16, flip=True, flip_rows=True)
    scaling, _ = training.train(model, task.train, recipe, seed=0)
    judge = modules("cifar").accuracy
    assert judge(model, task.test, prepare=scaling) > 85
    assert judge(row.build(), task.test, prepare=scaling) < 75
    with pytest.raises(GMError, match="smaller learning rate"):
        training.train(model, task.train, modules("dataclasses").replace(recipe, lr=math.inf), seed=0)
