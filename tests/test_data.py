"""Laws of the images: a fixed, balanced choice, splits that share none, one message for what cannot be used."""

import csv
import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from analysis.data import batches, load_data, resolve_input, shared_batches
from analysis.inputs.listing import InputConfig
from quant.errors import InputError

GREY = InputConfig(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,), interpolation="bilinear")
COLOUR = InputConfig(input_size=(3, 32, 32), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
FIRST_VALIDATION_DIGITS = [21, 24, 28, 34, 35, 37]
DIGITS_SHA256 = "9bc7af2951bc3ce3b50402e4052e64e2a4eaf98c452191ed4e2c4d211ddca379"
# Python 3.12 and newer warn where a process with threads forks, as torch's loader does.
forks = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


def load(spec, *, split="train", images=None, seed=0, config=COLOUR, classes=None, **options):
    """Load data with the arguments that do not matter here filled in."""
    return load_data(spec, split=split, images=images, seed=seed, input_config=config, num_classes=classes, **options)


def write_digits(folder, *, per_class=4, classes=range(10)):
    """Write digits as FOLDER/CLASS/*.png, grey, 8 x 8."""
    pixels, labels = load_digits(return_X_y=True)
    for label in classes:
        (folder / f"digit{label}").mkdir(parents=True)
        for i, image in enumerate(pixels[labels == label][:per_class]):
            Image.fromarray((image * 15).astype(np.uint8).reshape(8, 8)).save(folder / f"digit{label}" / f"{i}.png")
    return folder


def write_csv(path, rows):
    """Write rows of dictionaries as a CSV file."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return f"csv:{path}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Undivided data: ten classes of four digits each; not to be changed."""
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def divided(tmp_path):
    """Data in train/ and val/, three classes; a test may change it."""
    write_digits(tmp_path / "train", per_class=3, classes=range(3))
    write_digits(tmp_path / "val", per_class=2, classes=range(3))
    return tmp_path


def test_digits_are_divided_as_they_always_were():
    """1,347 images train, 450 validate, in the shares of the classes; together they are the 1,797 of scikit-learn."""
    train, val = (load("digits", split=split, config=GREY, classes=10) for split in ("train", "val"))
    assert (train.images, val.images) == (1347, 450)
    assert set(train.dataset.names).isdisjoint(val.dataset.names)
    assert len({*train.dataset.names, *val.dataset.names}) == 1797
    counts = np.bincount(val.dataset.labels)
    assert counts.min() >= 43
    assert counts.max() <= 46
    assert train.classes == tuple("0123456789")
    assert train.labelled
    assert train.sha256 != val.sha256
    # The split is part of the results of every run: another one would be another data set.
    assert sorted(int(name.split("/")[1]) for name in val.dataset.names)[:6] == FIRST_VALIDATION_DIGITS


def test_digits_are_upsampled_and_normalised():
    """A digit's image is (pixels / 16 at 32 x 32 - mean) / std, in each channel where there are three."""
    pixels, labels = load_digits(return_X_y=True)
    data = load("digits", split="val", images=5, config=GREY)
    for i, name in enumerate(data.dataset.names):
        index = int(name.split("/")[1])
        image, label = data.dataset[i]
        grey = torch.tensor(pixels[index] / 16, dtype=torch.float32).reshape(1, 1, 8, 8)
        large = nn.functional.interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(image, (large - 0.5) / 0.5)
        assert image.dtype == torch.float32
        assert label == labels[index]
    colour = load("digits", split="val", images=5, config=COLOUR)
    torch.testing.assert_close(colour.dataset[0][0], (data.dataset[0][0] / 2 / 0.25).expand(3, -1, -1))


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_prefix_is_balanced(split):
    """The first n images hold each class n / 10 times, rounded down or up; a smaller choice begins a larger one."""
    data = load("digits", split=split, images=200, config=GREY)
    for n in range(1, 201):
        counts = np.bincount(data.dataset.labels[:n], minlength=10)
        assert counts.max() - counts.min() <= 1
    fewer = load("digits", split=split, images=37, config=GREY)
    assert fewer.dataset.names == data.dataset.names[:37]


def test_the_choice_depends_on_the_seed_alone(folder):
    """The same seed chooses the same images with the same hash, another seed others, and the place does not count."""
    first, again, other = (load(f"folder:{folder}", images=10, seed=seed) for seed in (0, 0, 1))
    assert first.dataset.names == again.dataset.names
    assert first.sha256 == again.sha256
    assert first.dataset.names != other.dataset.names
    assert first.sha256 != other.sha256
    moved = load(f"folder:{folder.parent}/./{folder.name}", images=10)
    assert moved.sha256 == first.sha256
    assert first.dataset.names[0].startswith("digit")
    assert load("digits", images=20, config=GREY).sha256 == DIGITS_SHA256  # on every machine


def test_too_many_images_are_told(folder):
    """Fewer images than asked for is an error with both numbers, not a smaller choice."""
    with pytest.raises(InputError, match=r"`--images` 451, but digits has 450 in its split 'val'"):
        load("digits", split="val", images=451, config=GREY)
    with pytest.raises(InputError, match=r"`--images` 0 is below 1"):
        load(f"folder:{folder}", images=0)


@forks
def test_batches_are_the_same_whatever_the_workers(folder):
    """Order, values and labels depend neither on worker processes nor on the batch size; the random state is left."""
    data = load(f"folder:{folder}", classes=10)
    state = torch.get_rng_state()
    alone = list(batches(data, batch_size=7))
    helped = list(batches(data, batch_size=7, num_workers=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(labels) for _, labels in alone] == [7, 7, 6]
    for (x, y), (u, v) in zip(alone, helped, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    single = torch.cat([images for images, _ in batches(data, batch_size=1)])
    assert torch.equal(single, torch.cat([images for images, _ in alone]))
    assert single.shape == (20, 3, 32, 32)
    assert single.dtype == torch.float32
    assert alone[0][1].dtype == torch.int64
    with pytest.raises(InputError, match="`--batch-size` 0"):
        next(batches(data, batch_size=0))


def test_file_images_are_prepared_as_timm_does(folder):
    """A grey image is one channel or three equal ones, scaled to [0, 1] and normalised."""
    grey = load(f"folder:{folder}", config=InputConfig(input_size=(1, 8, 8), mean=(0.5,), std=(0.25,)))
    pixels = np.asarray(Image.open(folder / grey.dataset.names[0]), dtype=np.float32) / 255
    torch.testing.assert_close(grey.dataset[0][0], (torch.tensor(pixels)[None] - 0.5) / 0.25)
    colour = InputConfig(input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.25,) * 3)
    torch.testing.assert_close(
        load(f"folder:{folder}", config=colour).dataset[0][0], grey.dataset[0][0].expand(3, -1, -1)
    )


@pytest.mark.parametrize("holdout", [0.25, 0.5, 0.75])
def test_undivided_data_is_divided_by_class(folder, holdout):
    """The splits share no image, together are all, and hold each class in the share `holdout`; the note says so."""
    train, val = (load(f"folder:{folder}", split=split, holdout=holdout) for split in ("train", "val"))
    assert set(train.dataset.names).isdisjoint(val.dataset.names)
    assert train.images + val.images == 40
    assert np.bincount(val.dataset.labels).tolist() == [int(4 * holdout)] * 10
    assert f"val is {val.images} of 40 images (holdout {holdout:g}, seed 0)" in val.note
    other = load(f"folder:{folder}", split="val", holdout=holdout, seed=1)
    assert set(other.dataset.names) != set(val.dataset.names)


def test_unequal_classes_are_divided_in_their_shares(tmp_path):
    """A rare class is in both halves; the split does not depend on how many images are asked for."""
    write_digits(tmp_path, per_class=12, classes=[0])
    write_digits(tmp_path, per_class=4, classes=[1])
    halves = [load(f"folder:{tmp_path}", split=split) for split in ("train", "val")]
    assert [np.bincount(half.dataset.labels).tolist() for half in halves] == [[6, 2], [6, 2]]
    few = load(f"folder:{tmp_path}", split="val", images=3)
    assert set(few.dataset.names) <= set(halves[1].dataset.names)


def test_holdout_0_lets_all_images_serve_both(folder):
    """With holdout 0 both splits are all images, and the note says that they are the same."""
    train, val = (load(f"folder:{folder}", split=split, holdout=0) for split in ("train", "val"))
    assert train.images == val.images == 40
    assert "the same images serve train and val" in train.note
    with pytest.raises(InputError, match=r"`--holdout` 1 is not in \[0, 1\)"):
        load(f"folder:{folder}", holdout=1)


def test_one_image_cannot_be_divided(tmp_path):
    """A split that would be empty is told."""
    write_digits(tmp_path, per_class=1, classes=[0])
    with pytest.raises(InputError, match=r"no image in its split 'val'.*`--holdout`"):
        load(f"folder:{tmp_path}", split="val")


def test_folders_with_splits(divided):
    """train/ and val/ are taken as they are, without a note; labels are those of both together."""
    train, val = (load(f"folder:{divided}", split=split, classes=3) for split in ("train", "val"))
    assert (train.images, val.images) == (9, 6)
    assert (train.note, train.classes) == ("", ("digit0", "digit1", "digit2"))
    assert set(train.dataset.names) == {f"train/digit{c}/{i}.png" for c in range(3) for i in range(3)}
    for file in (divided / "val" / "digit0").iterdir():
        file.unlink()
    (divided / "val" / "digit0").rmdir()
    assert load(f"folder:{divided}", split="val", classes=3).classes == ("digit1", "digit2")


def test_classes_are_in_the_order_that_is_asked_for(tmp_path):
    """Plain or natural where they differ, or as a file says; nothing is guessed, and what is left out is counted."""
    for name in ("digit10", "digit2", ".hidden"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
        (tmp_path / name / "notes.txt").write_text("no image")
        (tmp_path / name / "._a.png").write_text("what macOS leaves")
    with pytest.raises(InputError, match=r"0 digit10, 1 digit2.*0 digit2, 1 digit10.*--class-order"):
        load(f"folder:{tmp_path}", holdout=0)
    ours = load(f"folder:{tmp_path}", holdout=0, class_order="natural")
    assert ours.class_names == {0: "digit2", 1: "digit10"}
    assert sorted(ours.dataset.names) == ["digit10/a.png", "digit2/a.png"]
    assert any("4 files" in remark and "2 .txt" in remark for remark in ours.remarks)
    assert load(f"folder:{tmp_path}", holdout=0, class_order="plain").class_names == {0: "digit10", 1: "digit2"}
    (tmp_path / "order.txt").write_text("other\ndigit2\ndigit10\n")
    assert load(f"folder:{tmp_path}", holdout=0, class_order=tmp_path / "order.txt").class_names == {
        1: "digit2", 2: "digit10"
    }  # fmt: skip
    (tmp_path / "order.json").write_text('{"digit10": 0, "digit2": 3}')
    by_json = load(f"folder:{tmp_path}", holdout=0, class_order=tmp_path / "order.json")
    assert by_json.class_names == {0: "digit10", 3: "digit2"}
    assert by_json.first_classes(1) == "0 digit10, ..."


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, r"no class folders with images"),
        (lambda p: p.rmdir(), r"There is no folder"),
        (lambda p: Image.new("L", (2, 2)).save(p / "a.png"), r"no class folders with images.*csv:FILE"),
        (lambda p: [(p / "train" / c).mkdir(parents=True) for c in "ab"], r"class folder .*train/a has no image"),
    ],
)
def test_folders_without_images_are_told(tmp_path, make, message):
    """A missing or empty folder, and a class without images, are each told."""
    path = tmp_path / "data"
    path.mkdir()
    make(path)
    with pytest.raises(InputError, match=message):
        load(f"folder:{path}")


def test_a_missing_split_is_told(divided):
    """Data with train/ alone has no validation images; none are taken from train/ in silence."""
    shutil.rmtree(divided / "val")
    with pytest.raises(InputError, match=r"has train/ but no val/.*`--split train` where.*`--data folder:\S+/train`"):
        load(f"folder:{divided}", split="val")


@pytest.mark.parametrize("spec", ["digitz", "/some/path", "imagenet", "cifar10", ""])
def test_unknown_data_are_told(spec):
    """A data string of no known form lists the forms."""
    with pytest.raises(InputError, match=r"is unknown\. It is digits, folder:PATH, csv:FILE, or a timm data set"):
        load(spec)


def test_classes_that_do_not_match_the_head_are_told(folder):
    """Another number of classes than the head's names both; without a head there is nothing to match."""
    with pytest.raises(InputError, match=r"has 10 classes, the model's head has 1000.*`--class-map FILE`"):
        load(f"folder:{folder}", classes=1000)
    with pytest.raises(InputError, match=r"digits has 10 classes, the model's head has 7"):
        load("digits", config=GREY, classes=7)
    assert load(f"folder:{folder}", classes=None).labelled


def test_a_class_map_gives_the_heads_indices(divided):
    """Lines `class` number the head's classes from 0, lines `class,index` say the index."""
    names = divided / "map.txt"
    names.write_text("cat\ndigit2\ndigit0\ndog\ndigit1\n")
    data = load(f"folder:{divided}", classes=5, class_map=names)
    assert data.classes == ("digit2", "digit0", "digit1")
    index = {"digit2": 1, "digit0": 2, "digit1": 4}
    assert [index[name.split("/")[1]] for name in data.dataset.names] == data.dataset.labels.tolist()
    indexed = divided / "map.csv"
    indexed.write_text("digit0,2\ndigit1,4\ndigit2,1\n")
    assert load(f"folder:{divided}", classes=5, class_map=indexed).sha256 == data.sha256


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("map.txt", "digit0\ndigit1\n", r"no line for 'digit2' of .* \(1 such\)"),
        ("map.csv", "digit0,0\ndigit1,1\ndigit2,9\n", r"label 9, the model's head has 5 classes \(0 to 4\)"),
        ("map.csv", "digit0,0\ndigit1\n", r"must have lines `class` or `class,index` throughout"),
        ("map.csv", "digit0,zero\n", r"must have lines `class` or `class,index` throughout"),
        ("map.csv", "digit0,0\ndigit0,1\n", r"names a class twice"),
        ("map.txt", "", r"is empty"),
        ("map.pkl", "", r"must be"),
    ],
)
def test_wrong_class_maps_are_told(divided, file, text, message):
    """A class map that lacks a class, goes beyond the head or is malformed is told."""
    (divided / file).write_text(text)
    with pytest.raises(InputError, match=message):
        load(f"folder:{divided}", classes=5, class_map=divided / file)


def test_a_missing_class_map_is_told(divided):
    """The class map's path is checked."""
    with pytest.raises(InputError, match=r"gone\.txt cannot be read"):
        load(f"folder:{divided}", class_map="gone.txt")


def test_csv_with_class_indices(folder):
    """Files lie relative to the list; `class_index` is the label, `label` its name; other columns are ignored."""
    rows = [
        {"wnid": "n", "file": f"digit{c}/{i}.png", "class_index": 2 * c, "label": f"d{c}"}
        for c in range(3)
        for i in range(4)
    ]
    data = load(write_csv(folder / "indices.csv", rows), classes=1000, holdout=0)
    assert data.classes == ("d0", "d1", "d2")
    assert all(label == 2 * int(name[5]) for name, label in zip(data.dataset.names, data.dataset.labels, strict=True))
    assert next(batches(data, batch_size=12))[0].shape == (12, 3, 32, 32)
    with pytest.raises(InputError, match=r"label 4, the model's head has 4 classes"):
        load(f"csv:{folder}/indices.csv", classes=4)
    half = load(f"csv:{folder}/indices.csv", split="val")
    assert "val is 6 of 12 images" in half.note


def test_csv_with_labels(folder, tmp_path):
    """`label` is a class name, sorted into indices or looked up in the class map; whole numbers are indices."""
    rows = [{"file": f"digit{c}/0.png", "label": name} for c, name in enumerate(["zebra", "ant", "cow"])]
    data = load(write_csv(folder / "names.csv", rows), classes=3, holdout=0)
    assert data.classes == ("ant", "cow", "zebra")
    assert dict(zip(data.dataset.names, data.dataset.labels.tolist(), strict=True)) == {
        "digit0/0.png": 2, "digit1/0.png": 0, "digit2/0.png": 1,
    }  # fmt: skip
    (tmp_path / "map.txt").write_text("cow\nbee\nant\nzebra\n")
    mapped = load(f"csv:{folder}/names.csv", classes=4, holdout=0, class_map=tmp_path / "map.txt")
    assert mapped.classes == ("cow", "ant", "zebra")
    with pytest.raises(InputError, match="has 3 classes, the model's head has 4"):
        load(f"csv:{folder}/names.csv", classes=4)
    numbers = [{"file": f"digit{c}/0.png", "label": 7 - c} for c in range(3)]
    data = load(write_csv(folder / "numbers.csv", numbers), classes=10, holdout=0)
    assert sorted(data.dataset.labels.tolist()) == [5, 6, 7]


def test_csv_without_labels(folder):
    """Files without a label are unlabelled images, -1 each."""
    data = load(write_csv(folder / "plain.csv", [{"file": f"digit{c}/0.png"} for c in range(4)]), classes=10, holdout=0)
    assert not data.labelled
    assert data.classes == ()
    assert next(batches(data, batch_size=4))[1].tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"path,label\na.png,x\n", r"has the columns path, label; expected `file`"),
        (b"", r"has the columns none; expected `file`"),
        (b"file,class_index\na.png,one\n", r"row 2: class_index of 'a\.png' is 'one'"),
        (b"file,class_index\na.png,0\n\nb.png,-2\n", r"row 4: class_index of 'b\.png' is '-2'"),
        (b"file,label\na.png,0\nb.png,cat\n", r"row 3: label of 'b\.png' is 'cat'"),
        (b"file,label\na.png,2.5\n", r"row 2: label of 'a\.png' is '2\.5'"),
        (b"file,class_index\na.png\n", r"row 2: it has 1 cells, the header 2"),
        (b"file,label,label\na.png,x,y\n", r"label more than once"),
        (b"file,class_index,label\na.png,0,x\nb.png,0,y\n", r"row 3: class_index 0 is 'y'"),
        (b"file,label,split\na.png,x,fold1\n", r"row 2: split is 'fold1'"),
        (b"file,class_index\n", r"has no image in its split"),
        (b"file\n\xff\xfe\n", r"cannot be read as a CSV file"),
    ],
)
def test_wrong_lists_are_told(tmp_path, text, message):
    """A list without files, with labels that are no indices, or that is no text is told."""
    (tmp_path / "list.csv").write_bytes(text)
    with pytest.raises(InputError, match=message):
        load(f"csv:{tmp_path}/list.csv", holdout=0)
    with pytest.raises(InputError, match=r"gone\.csv cannot be read"):
        load(f"csv:{tmp_path}/gone.csv")


def cut(path):
    """Keep the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BREAK = {
    "truncated": cut,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no image"),
    "missing": lambda path: path.unlink(),
}


@forks
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("how", BREAK)
def test_a_broken_image_is_named(divided, how, num_workers):
    """An image that cannot be read ends the pass with its path in one line, from worker processes too."""
    data = load(f"folder:{divided}")
    path = divided / "train" / "digit1" / "2.png"
    BREAK[how](path)
    with pytest.raises(
        InputError, match=r"The image .*train/digit1/2\.png cannot be read: .*`--skip-broken`"
    ) as caught:
        list(batches(data, batch_size=4, num_workers=num_workers))
    assert len(str(caught.value).splitlines()) == 1


COLOURS = np.array([[[250, 10, 30], [40, 200, 60]], [[70, 80, 220], [0, 255, 128]]], dtype=np.uint8)
GREYS = np.array([[3, 90], [180, 255]], dtype=np.uint8)
ALPHA = np.array([[0, 255], [128, 1]], dtype=np.uint8)
DEEP = np.array([[0, 255], [256, 65535]], dtype=np.uint16)  # 65535 is white


def with_alpha(image, *, alpha=ALPHA):
    """The image with a channel of transparency."""
    image = image.copy()
    image.putalpha(Image.fromarray(alpha))
    return image


def palette(**options):
    """An image of four colours by their number in a palette."""
    image = Image.new("P", (2, 2))
    image.putdata(range(4))
    image.putpalette(COLOURS.reshape(-1).tolist())
    return image, options


COLOUR_IMAGE, GREY_IMAGE = Image.fromarray(COLOURS), Image.fromarray(GREYS)
# Name of the file -> image with the options of `save`; the mode in which Pillow reads it; its pixels (None: COLOURS).
MODES = {
    "colour.png": ((COLOUR_IMAGE, {}), "RGB", None),
    "grey.png": ((GREY_IMAGE, {}), "L", GREYS),
    "grey-alpha.png": ((with_alpha(GREY_IMAGE), {}), "LA", GREYS),
    "colour-alpha.png": ((with_alpha(COLOUR_IMAGE), {}), "RGBA", None),
    "palette.png": (palette(), "P", None),
    "palette-one-transparent.png": (palette(transparency=2), "P", None),
    "palette-transparencies.png": (palette(transparency=bytes([0, 255, 128, 1])), "P", None),
    "one-bit.png": ((Image.fromarray(GREYS > 100), {}), "1", np.where(GREYS > 100, 255, 0)),
    "sixteen-bit.png": ((Image.fromarray(DEEP), {}), "I;16", (DEEP / 257).round()),
    "sixteen-bit.tif": ((Image.fromarray(DEEP), {}), "I;16", (DEEP / 257).round()),
    "sixteen-bit-big-endian.tif": ((Image.fromarray(DEEP.astype(">u2")), {}), "I;16B", (DEEP / 257).round()),
    "sixteen-bit.pgm": ((Image.fromarray(DEEP), {}), "I", (DEEP / 257).round()),
    # (255 - ink) * (255 - black) / 255 for each of cyan, magenta, yellow
    "print.tif": ((Image.new("CMYK", (2, 2), (55, 155, 255, 51)), {}), "CMYK", np.full((2, 2, 3), (160, 80, 0))),
}  # fmt: skip


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """One folder with an image in every mode, and one of another size."""
    root = tmp_path_factory.mktemp("mixed")
    (root / "all").mkdir()
    for name, ((image, options), mode, _) in MODES.items():
        image.save(root / "all" / name, **options)
        with Image.open(root / "all" / name) as read:
            assert read.mode == mode  # else the case would not be what it says
    Image.new("CMYK", (40, 24)).save(root / "all" / "print.jpg")  # nothing printed: white
    return root


@forks
@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_of_all_modes_become_rgb(mixed, num_workers):
    """Stored colours count, without transparency; 16-bit grey is scaled, not clipped; sizes may differ."""
    config = InputConfig(input_size=(3, 2, 2), mean=(0.0,) * 3, std=(1.0,) * 3, white_level=65535)
    data = load(f"folder:{mixed}", holdout=0, config=config)
    images = torch.cat([x for x, _ in batches(data, batch_size=4, num_workers=num_workers)])
    pixels = dict(zip(data.dataset.names, (255 * images).permute(0, 2, 3, 1).numpy(), strict=True))
    assert len(pixels) == len(MODES) + 1
    for name, (_, _, expected) in MODES.items():
        expected = COLOURS if expected is None else expected
        rgb = expected if expected.ndim == 3 else expected[..., None].repeat(3, axis=-1)
        np.testing.assert_allclose(pixels[f"all/{name}"], rgb, atol=1e-3, err_msg=name)
    np.testing.assert_allclose(pixels["all/print.jpg"], 255, atol=1)


def test_images_of_all_modes_become_grey(mixed):
    """For a network of one channel, colours become their brightness (ITU-R 601), grey stays what it was."""
    data = load(
        f"folder:{mixed}",
        holdout=0,
        config=InputConfig(input_size=(1, 2, 2), mean=(0.0,), std=(1.0,), white_level=65535),
    )
    images, _ = next(batches(data, batch_size=len(data.dataset)))
    pixels = dict(zip(data.dataset.names, (255 * images[:, 0]).numpy(), strict=True))
    brightness = COLOURS @ [0.299, 0.587, 0.114]
    for name, (_, _, expected) in MODES.items():
        if expected is None or expected.ndim == 2:
            wanted = brightness if expected is None else expected
            np.testing.assert_allclose(pixels[f"all/{name}"], wanted, atol=0.501, err_msg=name)


def test_timm_reads_modes_as_we_do(mixed, tmp_path):
    """An image folder that timm opens gives the same pixels, also of 16 bits, which torchvision's loader clips."""
    config = InputConfig(input_size=(3, 2, 2), mean=(0.0,) * 3, std=(1.0,) * 3, white_level=65535)
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "a").symlink_to(mixed / "all")
    theirs = load("torch/image_folder", split="val", data_root=tmp_path, config=config)
    ours = load(f"folder:{mixed}", holdout=0, config=config)
    pixels = {Path(name).name: theirs.dataset[i][0] for i, name in enumerate(theirs.dataset.names)}
    assert set(MODES) < set(pixels)
    for i, name in enumerate(ours.dataset.names):
        assert torch.equal(ours.dataset[i][0], pixels[Path(name).name]), name


@pytest.mark.parametrize(
    ("pixels", "level", "expected"),
    [
        (np.full((8, 8), 4095, dtype=np.uint16), 4095, 1.0),
        (np.full((8, 8), 4095, dtype=np.uint16), 65535, 16 / 255),
        (np.full((8, 8), 100_000, dtype=np.int32), 200_000, 128 / 255),
        (np.full((8, 8), 0.5, dtype=np.float32), 1, 128 / 255),
        (np.full((8, 8), 70000, dtype=np.int32), 65535, 1.0),
    ],
)
def test_what_is_white_in_deep_images_is_asked_for(tmp_path, pixels, level, expected):
    """Samples of more than 8 bits are scaled to a white that is given; without it they are refused, not skipped."""
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "0.tif")
    config = InputConfig(input_size=(1, 8, 8), mean=(0.0,), std=(1.0,))
    with pytest.raises(InputError, match=r"0\.tif.*--white-level"):
        list(batches(load(f"folder:{tmp_path}", holdout=0, config=config, skip_broken=True), batch_size=1))
    data = load(f"folder:{tmp_path}", holdout=0, config=dataclasses.replace(config, white_level=level))
    np.testing.assert_allclose(data.dataset[0][0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(tmp_path, orientation):
    """The orientation that a camera noted is applied: all eight give the same picture as the upright file."""
    turn = [None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_270][orientation - 1]  # fmt: skip
    upright = Image.fromarray(COLOURS)
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    (upright if turn is None else upright.transpose(turn)).save(tmp_path / "a" / "0.png", exif=exif)
    config = InputConfig(input_size=(3, 2, 2), mean=(0.0,) * 3, std=(1.0,) * 3)
    image = load(f"folder:{tmp_path}", holdout=0, config=config).dataset[0][0]
    np.testing.assert_allclose(255 * image.permute(1, 2, 0).numpy(), COLOURS, atol=1e-3)


def test_links_are_followed_once(tmp_path):
    """A linked subfolder counts, a link to a folder that holds it does not, other suffixes of JPEG do."""
    for name in ("cat", "elsewhere/more"):
        (tmp_path / name).mkdir(parents=True)
    for file in ("cat/0.png", "cat/1.jfif", "elsewhere/more/2.webp", "elsewhere/more/3.tif"):
        Image.fromarray(COLOURS).save(tmp_path / file, {"jfif": "JPEG"}.get(file.split(".")[1]))
    (tmp_path / "data").mkdir()
    (tmp_path / "cat").rename(tmp_path / "data" / "cat")
    (tmp_path / "data" / "cat" / "linked").symlink_to(tmp_path / "elsewhere" / "more")
    (tmp_path / "data" / "cat" / "loop").symlink_to(tmp_path / "data")
    data = load(f"folder:{tmp_path}/data", holdout=0)
    assert sorted(data.dataset.names) == ["cat/0.png", "cat/1.jfif", "cat/linked/2.webp", "cat/linked/3.tif"]


def test_a_truncated_jpeg_is_named(tmp_path):
    """JPEG decoders are content with half a picture; a cut file is told all the same."""
    (tmp_path / "a").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a" / "x.jpg")
    cut(tmp_path / "a" / "x.jpg")
    with pytest.raises(InputError, match=r"a/x\.jpg cannot be read: .*truncated"):
        list(batches(load(f"folder:{tmp_path}", holdout=0), batch_size=1))


@forks
@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_can_be_skipped(divided, num_workers):
    """With skip_broken the rest is given in the same order, and each broken file is noted once."""
    data = load(f"folder:{divided}", skip_broken=True)
    whole = {name: data.dataset[i][0] for i, name in enumerate(data.dataset.names)}
    broken = [data.dataset.names[0], data.dataset.names[5]]
    for name in broken:
        cut(divided / name)
    for _ in range(2):
        got = torch.cat([images for images, _ in batches(data, batch_size=2, num_workers=num_workers)])
        assert torch.equal(got, torch.stack([whole[name] for name in data.dataset.names if name not in broken]))
        assert data.skipped == broken
    for name in data.dataset.names:
        (divided / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"None of the 9 images of .* can be read"):
        list(batches(data, batch_size=2))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_shares_are_the_batches_of_one_process(folder, world):
    """Batch i goes to process i % world with the images that it always has; a process may have none."""
    data = load(f"folder:{folder}")
    alone = list(shared_batches(data, batch_size=8))
    assert [len(batch.paths) for batch in alone] == [8, 8, 4]
    assert [path for batch in alone for path in batch.paths] == [str(folder / name) for name in data.dataset.names]
    for rank in range(world):
        share = list(shared_batches(data, batch_size=8, first=rank, every=world))
        assert [batch.paths for batch in share] == [batch.paths for batch in alone[rank::world]]
        for mine, theirs in zip(share, alone[rank::world], strict=True):
            assert torch.equal(mine.images, theirs.images)
            assert torch.equal(mine.labels, theirs.labels)


def test_a_broken_image_changes_no_other_batch(divided):
    """Skipped images leave their batch smaller, or empty, so that every process knows where it is."""
    data = load(f"folder:{divided}", skip_broken=True)
    names = [str(divided / name) for name in data.dataset.names]
    for i in (1, 3, 4, 5):
        cut(Path(names[i]))
    paths = [batch.paths for batch in shared_batches(data, batch_size=3)]
    assert paths == [[names[0], names[2]], [], names[6:]]
    assert data.skipped == [data.dataset.names[i] for i in (1, 3, 4, 5)]


def test_timm_data_sets(divided):
    """A data set that timm opens is read, named and labelled as the folder itself."""
    data = load("torch/image_folder", split="val", data_root=divided, classes=3)
    ours = load(f"folder:{divided}", split="val", classes=3)
    assert data.dataset.names == ours.dataset.names
    assert data.sha256 == ours.sha256
    assert data.classes == ours.classes
    assert torch.equal(next(batches(data, batch_size=6))[0], next(batches(ours, batch_size=6))[0])
    cut(divided / data.dataset.names[0])
    with pytest.raises(InputError, match=r"val/digit\d/\d\.png cannot be read"):
        list(batches(data, batch_size=6))


def test_timm_data_sets_that_cannot_be_opened_are_told(folder):
    """A missing root, an unknown name, a missing library and undivided data are each told."""
    with pytest.raises(InputError, match=r"torch/cifar10 needs `--data-root DIR`"):
        load("torch/cifar10")
    with pytest.raises(
        InputError, match=r"cannot open the data set torch/cifar11 \(train\): .*cifar11.*Check its name"
    ):
        load("torch/cifar11", data_root=folder)
    with pytest.raises(InputError, match=r"has no split folders; `--data folder:"):
        load("torch/image_folder", data_root=folder)
    with pytest.raises(InputError, match=r"cannot open the data set wds/no_such_set"):
        load("wds/no_such_set", split="val", data_root=folder)


def cnn(channels=3):
    """A user's model, which says nothing about its images."""
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Flatten())


def test_input_of_a_timm_model():
    """What timm knows of a model is taken; options win over it; the constructor's img_size and in_chans count."""
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1))
    config = resolve_input(model, "folder:x")
    assert config == InputConfig(
        input_size=(3, 224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_pct=0.9
    )
    config = resolve_input(model, "folder:x", mean=(0.5,), std=(0.1, 0.2, 0.3), input_size=(3, 64, 64), crop_pct=1)
    assert config == InputConfig(input_size=(3, 64, 64), mean=(0.5,) * 3, std=(0.1, 0.2, 0.3))
    small = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, patch_size=8)
    assert resolve_input(small, "folder:x").input_size == (3, 32, 32)
    grey = timm.create_model("resnet10t", in_chans=1)
    assert resolve_input(grey, "folder:x", mean=(0.5,), std=(0.5,)).input_size[0] == 1
    with pytest.raises(InputError, match=r"mean is .*expected one number for each of 1 channels"):
        resolve_input(grey, "folder:x")


def test_digits_bring_their_own_input():
    """Digits are (1, 32, 32) with mean and std 0.5 also for models of timm, but for what the user says."""
    for model in (timm.create_model("resnet10t", in_chans=1), cnn(1)):
        assert resolve_input(model, "digits") == GREY
        assert resolve_input(model, "digits", input_size=(1, 8, 8), std=(1,)).input_size == (1, 8, 8)
        assert resolve_input(model, "digits", std=(1,)).std == (1,)


@pytest.mark.parametrize("given", [{}, {"mean": (0.5,)}, {"mean": (0.5,), "std": (0.5,)}, {"input_size": (3, 32, 32)}])
def test_a_model_that_says_nothing_needs_the_options(given):
    """No normalisation is guessed: the message names the three options."""
    with pytest.raises(InputError, match=r"Give `--mean`, `--std` and `--input-size`"):
        resolve_input(cnn(), "folder:x", **given)


@pytest.mark.parametrize(("side", "crop"), [(32, 1.0), (64, 1.0), (65, 0.875), (224, 0.875)])
def test_small_images_are_not_cropped(side, crop):
    """Where nobody says, images up to 64 pixels are used whole, larger ones cropped as timm does."""
    config = resolve_input(cnn(), "folder:x", mean=(0.5,), std=(0.5,), input_size=(3, side, side))
    assert config.crop_pct == crop


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5, 0.5)}, r"mean is \(0\.5, 0\.5\), expected one number for each of 3 channels"),
        ({"std": (0.5, 0.0, 0.5)}, r"std is .*expected one number above 0"),
        ({"mean": (123.7, 116.3, 103.5)}, r"from 0 to 255.*--mean 0\.4851,0\.4561,0\.4059"),
        ({"mean": (float("nan"),)}, r"mean is \(nan"),
        ({"input_size": (3, 0, 32)}, r"`--input-size` \(3, 0, 32\) is not channels, height, width"),
        ({"input_size": (32, 32)}, r"`--input-size` \(32, 32\) is not channels"),
        ({"crop_pct": 1.5}, r"`--crop-pct` 1\.5 is not in \(0, 1\]"),
    ],
)
def test_wrong_input_options_are_told(options, message):
    """Options that make no image are told."""
    fits = {"mean": (0.5,), "std": (0.5,), "input_size": (3, 32, 32)}
    with pytest.raises(InputError, match=message):
        resolve_input(cnn(), "folder:x", **{**fits, **options})


def test_wrong_channels_are_told(folder):
    """Images of other channels than the model's first convolution takes are told before anything runs."""
    with pytest.raises(InputError, match=r"takes images of 3 channels, digits would give 1.*--input-size 3,32,32"):
        resolve_input(timm.create_model("resnet10t"), "digits")
    with pytest.raises(InputError, match=r"takes images of 1 channels, folder:x would give 3"):
        resolve_input(cnn(1), "folder:x", mean=(0.5,), std=(0.5,), input_size=(3, 8, 8))
    assert resolve_input(timm.create_model("resnet10t"), "digits", input_size=(3, 32, 32)).mean == (0.5,) * 3
    four = InputConfig(input_size=(4, 8, 8), mean=(0.5,) * 4, std=(0.5,) * 4)
    with pytest.raises(InputError, match="takes 4 channels; image files give 3, or 1"):
        load(f"folder:{folder}", config=four)


def test_cifar_images(shared, tmp_path):
    """CIFAR-10 as an image folder: forty images of ten classes, balanced, in colour."""
    tool = shared / "tools" / "unpack_cifar10.py"
    subprocess.run([sys.executable, str(tool), str(tmp_path), "--train", "40", "--val", "40"], check=True)
    data = load(f"folder:{tmp_path}", images=30, classes=10)
    assert np.bincount(data.dataset.labels).tolist() == [3] * 10
    assert data.classes[0] == "airplane"
    images, labels = next(batches(data, batch_size=30))
    assert images.shape == (30, 3, 32, 32)
    assert images.std() > 0.5
    pixels = np.asarray(Image.open(tmp_path / data.dataset.names[0]).convert("RGB"), dtype=np.float32) / 255
    torch.testing.assert_close(images[0], (torch.tensor(pixels).permute(2, 0, 1) - 0.5) / 0.25)
    assert labels[0] == data.classes.index(Path(data.dataset.names[0]).parent.name)


def test_the_imagenet_list_works_as_it_is(shared):
    """A list of one image for each of 1,000 classes is halved and read; its labels are the indices of the file."""
    spec = f"csv:{shared / 'data' / 'imagenet_samples' / 'index.csv'}"
    train, val = (load(spec, split=split, classes=1000) for split in ("train", "val"))
    assert (train.images, val.images) == (500, 500)
    assert set(train.dataset.names).isdisjoint(val.dataset.names)
    few = load(spec, split="val", images=4, classes=1000)
    assert next(batches(few, batch_size=4))[0].shape == (4, 3, 32, 32)
    with pytest.raises(InputError, match="the model's head has 10 classes"):
        load(spec, classes=10)
