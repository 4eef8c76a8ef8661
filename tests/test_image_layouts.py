"""Laws of image folders and lists: labels are those of an independent reader, or an InputError names the file."""

import csv
import os
import re
import shutil
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.inputs.image_folder import list_folder
from analysis.inputs.image_list import list_csv
from quant.errors import InputError

EXAMPLES = int(os.environ.get("QVW_LAYOUT_EXAMPLES", "2000"))
CLASSES = ["cat", "Dog", "dog", "1", "2", "10", "n02", "train", "a b", "é"]
FILES = ["a.png", "b.JPG", "c.jfif", "d.webp", "e.tif", "notes.txt", ".hidden.png", "sub/f.png", "sub/deep/g.jpeg"]
IMAGES = (".png", ".jpg", ".jfif", ".webp", ".tif", ".jpeg")
SPLITS = ["train", "Training", "train_set", "val", "Valid", "validation", "Test", "fold0", "fold1", "extra"]
TRAIN, VAL, TEST = r"train(ing)?([ _]set)?", r"val(id(ation)?)?", r"test"


def read_or_refused(path, read):
    """What is read; None where it is refused, with the path in the message."""
    try:
        return read()
    except InputError as error:
        if str(path) not in str(error):
            raise AssertionError(f"{error} does not name {path}") from error
        return None


folders = st.dictionaries(st.sampled_from(CLASSES), st.sets(st.sampled_from(FILES), max_size=4), max_size=4)
layouts = st.one_of(
    folders.map(lambda classes: {"": classes}),
    st.dictionaries(st.sampled_from(SPLITS), folders, min_size=1, max_size=4),
)
orders = st.sampled_from([None, "plain", "natural"])
splits = st.sampled_from(["train", "val"])


def write_tree(root, layout):
    """Empty files: SPLIT/CLASS/FILE, or CLASS/FILE where the split has no name."""
    for split, classes in layout.items():
        (root / split).mkdir(parents=True, exist_ok=True)
        for name, files in classes.items():
            (root / split / name).mkdir(exist_ok=True)
            for file in files:
                path = root / split / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()


def loose(folder):
    """Whether images lie in the folder itself."""
    return any(p.is_file() and p.suffix.lower() in IMAGES and p.name[0] != "." for p in folder.iterdir())


def images_below(folder):
    """The images that a person would count: not hidden, known suffixes, at any depth."""
    found = []
    for place, _, names in os.walk(folder):
        found += [Path(place, n) for n in names if n.lower().endswith(IMAGES) and not n.startswith(".")]
    return found


def natural(name):
    """Numbers by value, letters without regard to case."""
    return [int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", name.lower())], name


def labels_by_hand(root, layout, split, order):
    """File -> label, read independently of the package from what was written; None where no reading is certain."""
    if "" in layout and len(layout) == 1:
        parts, roots = [root], [root]
    else:
        kinds = {"train": TRAIN, "val": VAL, "test": TEST}
        by_kind = {k: [s for s in layout if re.fullmatch(p, s.lower())] for k, p in kinds.items()}
        train, val = by_kind["train"], by_kind["val"] or by_kind["test"]
        wanted = train if split == "train" else val
        if max(map(len, by_kind.values())) > 1 or len(wanted) != 1:
            return None
        roots, parts = [root / s for s in train + val], [root / wanted[0]]
    names = {d.name for r in roots for d in r.iterdir() if d.is_dir()}
    plain, nat = sorted(names), sorted(names, key=natural)
    if order is None and plain != nat:
        return None
    index = {name: i for i, name in enumerate(nat if order == "natural" else plain)}
    return {
        path.relative_to(root).as_posix(): index[path.relative_to(part).parts[0]]
        for part in parts
        for path in images_below(part)
    }


@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(layout=layouts, split=splits, order=orders)
def test_a_folder_has_the_labels_of_an_independent_reader_or_is_refused(layout, split, order):
    """Whatever the folder: the labels a person would read off it, or an InputError that names the folder."""
    root = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        write_tree(root, layout)
        found = read_or_refused(root, lambda: list_folder(root, split, order))
        if found is None:
            return
        assert dict(zip(found.names, found.labels, strict=True)) == labels_by_hand(root, layout, split, order)
        assert len(set(found.names)) == len(found.names)
    finally:
        shutil.rmtree(root)


cells = st.sampled_from(
    ["", "-1", "nan", "0", "1", "3", "3.0", "10", "2.5", "-2", "cat", "Dog", "dog", "cat 10", "cat 9"]
)
one_kind = st.one_of(
    st.lists(st.sampled_from(["0", "1", "3.0", "10", "", "-1"]), max_size=5),
    st.lists(st.sampled_from(["cat", "bird", "nan", ""]), max_size=5),
    st.lists(cells, max_size=5),
)
headers = st.sampled_from([["file", "label"], ["File ", " Label"], ["file", "class_index"], ["file", "label", "split"],
                           ["x", "file", "class_index"], ["file"], ["name", "label"]])  # fmt: skip
split_cells = st.sampled_from(["train", "Train", "val", "test", "fold3", ""])


@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(
    header=headers, values=one_kind, split_values=st.lists(split_cells, min_size=5, max_size=5), split=splits,
    order=orders, sign=st.sampled_from([",", ";", "\t"]), bom=st.booleans(), crlf=st.booleans(), quoted=st.booleans(),
    windows=st.booleans(), short=st.booleans(),
)  # fmt: skip
def test_a_list_has_the_labels_of_an_independent_reader_or_is_refused(
    header, values, split_values, split, order, sign, bom, crlf, quoted, windows, short
):
    """Whatever the spelling: the labels that were meant, or an InputError that names the file."""
    root = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        column = {"file": [f"{'d' + chr(92) if windows else 'd/'}{i}.png" for i in range(len(values))],
                  "label": values, "class_index": values, "split": split_values, "x": ["u"] * 5}  # fmt: skip
        names = [name.strip().lower() for name in header]
        rows = [[column.get(name, ["?"] * 5)[i] for name in names] for i in range(len(values))]
        if short and rows and len(header) > 1:
            rows[-1] = rows[-1][:-1]
        (root / "d").mkdir()
        path = root / "list.csv"
        with path.open("w", newline="", encoding="utf-8-sig" if bom else "utf-8") as file:
            writer = csv.writer(file, delimiter=sign, lineterminator="\r\n" if crlf else "\n",
                                quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL)  # fmt: skip
            writer.writerows([header, *rows])
        found = read_or_refused(path, lambda: list_csv(path, split, order))
        if found is None:
            return
        assert not (short and rows and len(header) > 1)
        assert dict(zip(found.names, found.labels, strict=True)) == meant(names, values, split_values, split, order)
    finally:
        shutil.rmtree(root)


def meant(names, values, split_values, split, order):
    """File -> label as a person reads the list."""
    labelled = "label" in names or "class_index" in names
    missing = ["", "-1", "nan"]
    real = [v for v in values if v not in missing]
    if not labelled:
        labels = [-1] * len(values)
    elif all(re.fullmatch(r"\d+(\.0)?", v) for v in real):
        labels = [-1 if v in missing else int(float(v)) for v in values]
    else:
        assert not any(re.fullmatch(r"-?\d+(\.\d+)?", v) for v in real)
        assert "class_index" not in names
        plain, nat = sorted(set(real)), sorted(set(real), key=natural)
        assert order is not None or plain == nat
        ordered = nat if order == "natural" else plain
        labels = [-1 if v in missing else ordered.index(v) for v in values]
    rows = range(len(values))
    if "split" in names:
        kinds = ["val" if s.lower() == "val" else s.lower() for s in split_values[: len(values)]]
        wanted = split if split == "train" or "val" in kinds else "test"
        rows = [i for i in rows if kinds[i] == wanted]
    return {f"d/{i}.png": labels[i] for i in rows}
