"""One set of validation images in many spellings: the accuracy is the same, or the spelling is refused."""

import shutil
import subprocess
import sys

import pytest
import torch

from analysis.data import batches, load_data, resolve_input
from analysis.models import ModelSource, load_model
from quant.errors import InputError

IMAGES = 100
SLASH = chr(92)  # of Windows


@pytest.fixture(scope="module")
def network(shared):
    """ResNet-20, and how its images are prepared."""
    weights = shared / "weights" / "cifar10_resnet20.safetensors"
    source = ModelSource(model=f"{shared / 'models.py'}:cifar10_resnet20", weights=str(weights))
    model = load_model(source).eval()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return model, resolve_input(model, "folder", mean=mean, std=std, input_size=(3, 32, 32))


@pytest.fixture(scope="module")
def images(shared, tmp_path_factory):
    """VAL/CLASS/*, in the plain order of the classes, which is that of the network's head."""
    root = tmp_path_factory.mktemp("cifar")
    tool = shared / "tools" / "unpack_cifar10.py"
    subprocess.run([sys.executable, str(tool), str(root), "--train", "10", "--val", str(IMAGES)], check=True)
    return root / "val"


def top1(network, spec, **options):
    """The share of right answers on all images of the validation split."""
    model, config = network
    data = load_data(spec, split="val", images=None, seed=0, input_config=config, num_classes=10, holdout=0, **options)
    with torch.inference_mode():
        right = [(model(x).argmax(1) == y).sum().item() for x, y in batches(data, batch_size=50)]
    assert len(data.dataset) == IMAGES
    return sum(right) / IMAGES


def classes_of(images):
    """The names of the classes in the head's order."""
    return sorted(path.name for path in images.iterdir())


def numbered(images, root):
    """Folders 1 to 10 in the head's order as `sorted` gives it: 1, 10, 2, ..."""
    for number, name in zip(sorted(map(str, range(1, 11))), classes_of(images), strict=True):
        shutil.copytree(images / name, root / number)


def split_folders(images, root):
    """Train/ and Test/ instead of train/ and val/."""
    shutil.copytree(images, root / "Test")
    for name in classes_of(images):
        (root / "Train" / name).mkdir(parents=True)
        shutil.copy(next((images / name).iterdir()), root / "Train" / name)


def linked(images, root):
    """Half of each class behind a link."""
    for name in classes_of(images):
        (root / "data" / name).mkdir(parents=True)
        (root / "more" / name).mkdir(parents=True)
        for i, file in enumerate(sorted((images / name).iterdir())):
            shutil.copy(file, root / ("more" if i % 2 else "data") / name)
        (root / "data" / name / "more").symlink_to(root / "more" / name)


def rows(images, label):
    """`file` and what `label` makes of the class's name and index."""
    names = classes_of(images)
    return [(path, label(name, i)) for i, name in enumerate(names) for path in sorted((images / name).iterdir())]


def test_every_spelling_gives_the_accuracy_or_is_refused(network, images, tmp_path):
    """Folders plain, numbered, split and linked; lists by index, by name, with other separators, splits and paths."""
    expected = top1(network, f"folder:{images}")
    assert 0.7 < expected < 0.9

    numbered(images, tmp_path / "numbered")
    assert top1(network, f"folder:{tmp_path / 'numbered'}", class_order="plain") == expected
    assert top1(network, f"folder:{tmp_path / 'numbered'}", class_order="natural") < 0.2  # what was guessed before
    with pytest.raises(InputError, match="--class-order"):
        top1(network, f"folder:{tmp_path / 'numbered'}")
    order = tmp_path / "order.txt"
    order.write_text("\n".join(sorted(map(str, range(1, 11)))))
    assert top1(network, f"folder:{tmp_path / 'numbered'}", class_order=order) == expected

    split_folders(images, tmp_path / "splits")
    assert top1(network, f"folder:{tmp_path / 'splits'}") == expected
    linked(images, tmp_path / "linked")
    assert top1(network, f"folder:{tmp_path / 'linked' / 'data'}") == expected
    for fold in ("fold0", "fold1"):
        shutil.copytree(images, tmp_path / "folds" / fold)
    with pytest.raises(InputError, match="fold0"):
        top1(network, f"folder:{tmp_path / 'folds'}")

    lists = {
        "index.csv": "file,class_index\n" + "".join(f"{p},{v}\n" for p, v in rows(images, lambda _, i: i)),
        "floats.csv": "file,label\n" + "".join(f"{p},{v}\n" for p, v in rows(images, lambda _, i: f"{i}.0")),
        "names.csv": "\ufeffFile ; Label\r\n" + "".join(f"{p};{v}\r\n" for p, v in rows(images, lambda n, _: n)),
        "quoted.csv": '"file","label"\n' + "".join(f'"{p}","{v}"\n' for p, v in rows(images, lambda n, _: n)),
        "tabs.csv": "file\tclass_index\n" + "".join(f"{p}\t{v}\n" for p, v in rows(images, lambda _, i: i)),
        "split.csv": f"file,label,split\n{images}/cat/none.jpg,cat,Train\n"
        + "".join(f"{p},{v},validation\n" for p, v in rows(images, lambda n, _: n)),
        "windows.csv": "file,label\n"
        + "".join(
            f"{'val' + chr(92) + p.parent.name + chr(92) + p.name},{v}\n" for p, v in rows(images, lambda n, _: n)
        ),
    }
    for name, text in lists.items():
        path = (images.parent if name == "windows.csv" else tmp_path) / name
        path.write_bytes(text.encode())
        assert top1(network, f"csv:{path}") == expected, name
    one_based = tmp_path / "one_based.csv"
    one_based.write_text("file,label\n" + "".join(f"{p},{i}\n" for p, i in rows(images, lambda _, i: i + 1)))
    with pytest.raises(InputError, match="label 10"):
        top1(network, f"csv:{one_based}")
