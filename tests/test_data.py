"""Loaders: the digits, folders and tars of images, and what is said about the ones that cannot be read."""

import sys
import tarfile

import numpy as np
import pytest
import timm
import torch
from conftest import assert_close, must_fail
from PIL import Image
from torch import nn

from gmcompress.data import Images, find_split, input_size, make_calibration_loader, make_loader, make_loaders
from gmcompress.errors import GMError

GREY, COLOUR = nn.Conv2d(1, 8, 3), nn.Conv2d(3, 8, 3)  # models of which only the number of channels matters
PLAIN = {"batch_size": 2, "workers": 0, "img_size": 8}


def write_images(folder, classes, *, count=2, suffix=".png", value=128):
    """Images of one colour, the number of their class added to it."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for each in range(count):
            pixels = np.full((8, 8, 3), value + number, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{each}{suffix}", lossless=True)


def write_tar(path, folder):
    with tarfile.open(path, "w") as file:
        file.add(folder, arcname=".")


@pytest.fixture
def place(tmp_path):
    """A data folder with both splits, three classes."""
    for split in ("train", "validation"):
        write_images(tmp_path / split, ["cat", "dog", "eel"])
    return tmp_path


def everything(loader):
    parts = [(inputs, labels) for inputs, labels in loader]
    return torch.cat([each[0] for each in parts]), torch.cat([each[1] for each in parts])


# ---------------------------------------------------------------------------------------------------------------------
# The digits


def test_digits_are_split_once_and_for_all():
    train, validation = make_loaders(Images(dataset="digits", no_aug=True), GREY)
    assert (len(train.dataset), len(validation.dataset)) == (1437, 360)
    again = make_loader(Images(dataset="digits"), GREY).dataset
    assert torch.equal(validation.dataset.images, again.images)
    assert sorted(set(again.labels.tolist())) == list(range(10))


def test_no_digit_is_in_both_splits():
    sklearn = pytest.importorskip("sklearn.datasets")
    labels = torch.tensor(sklearn.load_digits().target)
    train, validation = make_loaders(Images(dataset="digits"), GREY)
    held_out = torch.arange(len(labels)) % 5 == 0
    assert torch.equal(validation.dataset.labels, labels[held_out])
    assert torch.equal(train.dataset.labels, labels[~held_out])


def test_digits_are_normalised_by_the_training_images():
    train, _ = make_loaders(Images(dataset="digits", no_aug=True), GREY)
    pixels = train.dataset.images
    assert pixels.shape == (1437, 1, 32, 32)
    assert_close(pixels.mean(), torch.tensor(0.0))
    assert_close(pixels.std(), torch.tensor(1.0))
    given, _ = make_loaders(Images(dataset="digits", no_aug=True, mean=(0.0,), std=(1.0,)), GREY)
    assert 0 <= float(given.dataset.images.min()) < float(given.dataset.images.max()) <= 1


def assert_shifted(found, original, most):
    """Whether the first is the second, moved by at most so many pixels over its background."""
    padded = torch.nn.functional.pad(original, (most,) * 4, value=float(original.min()))
    height, width = original.shape[-2:]
    moves = [
        padded[..., down : down + height, right : right + width]
        for down in range(2 * most + 1)
        for right in range(2 * most + 1)
    ]
    assert any(torch.equal(found, each) for each in moves)


def test_training_digits_are_shifted_by_up_to_a_tenth():
    shifted, _ = make_loaders(Images(dataset="digits"), GREY)
    original = shifted.dataset.images
    found = [shifted.dataset[index][0] for index in range(20)]
    for index, each in enumerate(found):
        assert_shifted(each, original[index], 3)
    assert not all(torch.equal(each, original[index]) for index, each in enumerate(found))
    must_fail(assert_shifted, found[0], original[1], 3)


def assert_same_epochs(loader, seeds):
    epochs = []
    for seed in seeds:
        torch.manual_seed(seed)
        epochs.append(everything(loader))
    assert all(torch.equal(a, b) for a, b in zip(*epochs, strict=True))


def test_an_epoch_of_digits_follows_the_seed():
    loader = make_loader(Images(dataset="digits", img_size=8), GREY, training=True)
    assert_same_epochs(loader, (1, 1))
    must_fail(assert_same_epochs, loader, (1, 2))


def test_digits_in_another_size_and_in_colour():
    images = Images(dataset="digits", img_size=8, batch_size=3)
    inputs, labels = next(iter(make_loader(images, COLOUR)))
    assert inputs.shape == (3, 3, 8, 8)
    assert labels.shape == (3,)
    assert torch.equal(inputs[:, 0], inputs[:, 2])


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(GMError, match=r"gmcompress\[demo\]"):
        make_loader(Images(dataset="digits"), GREY)


# ---------------------------------------------------------------------------------------------------------------------
# Folders and tars


@pytest.mark.parametrize("suffix", [".png", ".webp"])
@pytest.mark.parametrize("packed", [False, True])
def test_folders_and_tars(tmp_path, suffix, packed):
    for split in ("train", "validation"):
        write_images(tmp_path / "all" / split, ["cat", "dog"], suffix=suffix)
        if packed:
            write_tar(tmp_path / f"{split}.tar", tmp_path / "all" / split)
    root = tmp_path if packed else tmp_path / "all"
    train, validation = make_loaders(Images(data_dir=str(root), **PLAIN), COLOUR)
    assert len(train.dataset) == len(validation.dataset) == 4
    inputs, labels = everything(validation)
    assert inputs.shape == (4, 3, 8, 8)
    assert labels.tolist() == [0, 0, 1, 1]


def test_normalisation_is_the_models_unless_given(place):
    model = timm.create_model("test_resnet", num_classes=3)  # mean and deviation 0.5
    inputs, labels = everything(make_loader(Images(data_dir=str(place), **PLAIN), model))
    assert_close(inputs[:, 0, 0, 0], ((128 + labels) / 255 - 0.5) / 0.5)
    given = Images(data_dir=str(place), mean=(0.25,), std=(2.0,), **PLAIN)
    inputs, labels = everything(make_loader(given, model))
    assert_close(inputs[:, 2, 0, 0], ((128 + labels) / 255 - 0.25) / 2)


def test_a_network_for_grey_images_gets_them(place):
    model = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    inputs, _ = everything(make_loader(Images(data_dir=str(place), **PLAIN), model))
    assert inputs.shape == (6, 1, 8, 8)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_epoch_with_workers_follows_the_seed(place):
    loader = make_loader(Images(data_dir=str(place), **PLAIN | {"workers": 1}), COLOUR, training=True)
    assert not loader.persistent_workers
    assert_same_epochs(loader, (1, 1))
    must_fail(assert_same_epochs, loader, (1, 2))


@pytest.mark.parametrize(
    ("held", "split", "found"),
    [
        ("val", "validation", "val"),
        ("test.tar", "validation", "test.tar"),
        ("training", "train", "training"),
        ("mine.tar", "mine", "mine.tar"),
        ("cat", "validation", "."),
    ],
)
def test_splits_are_found_by_their_names(tmp_path, held, split, found):
    (tmp_path / held).mkdir()
    assert find_split(str(tmp_path), split) == tmp_path / found


def test_a_class_that_validation_lacks_keeps_its_number(tmp_path):
    write_images(tmp_path / "train", ["cat", "dog", "eel"])
    write_images(tmp_path / "val", ["cat", "eel"])
    _, validation = make_loaders(Images(data_dir=str(tmp_path), **PLAIN), COLOUR)
    assert everything(validation)[1].tolist() == [0, 0, 2, 2]


def test_input_size_is_the_models_unless_given():
    vit = timm.create_model("test_vit", in_chans=1)
    assert input_size(Images(), vit) == (1, 160, 160)
    assert input_size(Images(img_size=64), vit) == (1, 64, 64)


# ---------------------------------------------------------------------------------------------------------------------
# For calibration


def calibration(images, model, **options):
    """The images of a calibration loader, in its order."""
    return everything(make_calibration_loader(images, model, **{"samples": 4, "seed": 0} | options))


def assert_all_among(found, known):
    """Every image is one of these, and none comes twice."""
    places = [[torch.equal(image, each) for each in known] for image in found]
    assert all(map(any, places))
    assert len({place.index(True) for place in places}) == len(found)


def test_calibration_images_are_those_of_training_prepared_for_validation(place):
    write_images(place / "train" / "more", ["fox"], value=140)
    augmented = Images(data_dir=str(place), train_crop_mode="rrc", reprob=1.0, hflip=1.0, **PLAIN)
    found = calibration(augmented, COLOUR, samples=100)[0]
    wanted = everything(make_loader(Images(data_dir=str(place / "train"), **PLAIN), COLOUR))[0]
    assert len(found) == len(wanted) == 8
    assert found[:, 0, 0, 0].sort().values.tolist() == wanted[:, 0, 0, 0].sort().values.tolist()
    must_fail(
        assert_close, found, make_loader(augmented, COLOUR, training=True).dataset[0][0][None].expand(8, -1, -1, -1)
    )


def test_calibration_digits_are_training_digits_as_they_are():
    train, validation = make_loaders(Images(dataset="digits", img_size=8, no_aug=True), GREY)
    found = calibration(Images(dataset="digits", img_size=8), GREY, samples=40)[0]
    assert len(found) == 40
    assert_all_among(found, train.dataset.images)
    must_fail(assert_all_among, found, validation.dataset.images)


def assert_same_images(images, model, first, second):
    assert torch.equal(calibration(images, model, **first)[0], calibration(images, model, **second)[0])


@pytest.mark.parametrize("digits", [True, False])
def test_calibration_images_follow_the_seed_alone(place, digits):
    images = Images(dataset="digits", img_size=8) if digits else Images(data_dir=str(place), **PLAIN)
    model = GREY if digits else COLOUR
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert_same_images(images, model, {"seed": 1}, {"seed": 1})
    assert torch.equal(torch.get_rng_state(), before)  # and leave torch's own stream alone
    must_fail(assert_same_images, images, model, {"seed": 1}, {"seed": 2})


def test_calibration_batches_are_of_moderate_size():
    large = make_calibration_loader(Images(dataset="digits", batch_size=512), GREY, samples=100, seed=0)
    small = make_calibration_loader(Images(dataset="digits", batch_size=3), GREY, samples=100, seed=0)
    assert (large.batch_size, small.batch_size) == (32, 3)


@pytest.mark.parametrize(
    ("splits", "change", "said"),
    [
        ({"val": ["a"]}, {}, "holds val, but no train"),
        ({"a": ["x"], "b": ["x"]}, {}, "no training images apart from those for validation"),
        ({"train": ["a"], "val": ["a"]}, {"train_split": "val", "val_split": "val"}, "no training images apart"),
    ],
)
def test_calibration_never_sees_what_is_judged_on(tmp_path, splits, change, said):
    images = Images(**with_split(tmp_path, **splits), **PLAIN, **change)
    with pytest.raises(GMError, match=said):
        make_calibration_loader(images, COLOUR, samples=4, seed=0)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be read


def with_split(tmp_path, **splits):
    for split, classes in splits.items():
        (tmp_path / split).mkdir()
        write_images(tmp_path / split, classes)
    return {"data_dir": str(tmp_path)}


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda _: {}, "there are no images"),
        (lambda p: {"data_dir": str(p / "nowhere")}, "nowhere does not exist"),
        (lambda p: with_split(p, train=[], validation=[]), "timm finds no images in .*train"),
        (lambda p: with_split(p, train=["a", "b", "c"]), "holds train, but no validation"),
        (lambda p: with_split(p, a=["b", "c", "d"]), "would read the same images"),
        (lambda p: with_split(p, train=["a", "b"], val=["a", "b"]), "train has 2 classes, the model 3"),
        (lambda p: with_split(p, train=["a", "b", "c"], val=["a", "x"]), "has classes that .*train has not: x"),
        (lambda p: with_split(p, train=["a", "b", "c"], val=["a"]) | {"batch_size": 9}, "fewer than one batch of 9"),
        (lambda _: {"dataset": "cifar"}, "dataset 'cifar' is unknown"),
        (lambda p: {"dataset": "torch/nothing", "data_dir": str(p)}, "timm finds no images in torch/nothing"),
        (lambda _: {"dataset": "digits"}, "digits has 10 classes, the model 3"),
        (lambda p: with_split(p, train=["a", "b", "c"], val=["a"]) | {"mean": (1.0, 2.0)}, "mean has 2 values"),
        (lambda _: {"batch_size": 0}, "batch_size must be at least 1"),
        (lambda _: {"scale": (1.0,)}, "scale is a pair"),
        (lambda _: {"hflip": 2.0}, "hflip is a probability"),
    ],
)
def test_unusable_images_are_named(tmp_path, prepare, said):
    model = timm.create_model("test_resnet", num_classes=3)
    with pytest.raises(GMError, match=said):
        make_loaders(Images(**{**PLAIN, **prepare(tmp_path)}), model)


def test_a_file_that_is_no_tar(tmp_path):
    (tmp_path / "x.zip").touch()
    with pytest.raises(GMError, match="neither a folder nor"):
        find_split(str(tmp_path / "x.zip"), "train")


def test_a_tar_without_images(tmp_path):
    write_tar(tmp_path / "x.tar", tmp_path)
    with pytest.raises(GMError, match=r"timm finds no images in .*x\.tar"):
        make_loader(Images(data_dir=str(tmp_path / "x.tar")), COLOUR)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(GMError, match="needs the package 'datasets'"):
        make_loader(Images(dataset="hfds/some/thing"), COLOUR)
