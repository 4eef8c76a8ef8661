"""A folder of images by class: its splits, its classes, and the files of each. Nothing is decoded."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from analysis.inputs.class_names import ordered_classes
from analysis.inputs.split_names import chosen_splits, is_numbered_part, kind_of_split
from quant.errors import InputError

SUFFIXES = (".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
_SYSTEM_FILES = ("thumbs.db", "desktop.ini")


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """The images of one split: names relative to the folder, labels, and the class of each label."""

    names: list[str]
    labels: list[int]
    classes: dict[int, str]
    one_split: bool
    remarks: tuple[str, ...] = ()  # on what was left out


def folder_splits(path: Path, split: str | None = None) -> dict[str, str]:
    """The subfolders that are splits, `train` and `val`; none where the subfolders are classes.

    Subfolders are splits by their names (`train`, `Training`, `val_set`, `Test`, ...). InputError where the folder is
    not there, lacks `split`, and where its subfolders may be splits or classes: they hold nothing but folders, of the
    same names in several of them, as in `a/cat` and `b/cat`, or are a single one, or called such as `fold0`.
    """
    if not path.is_dir():
        raise InputError(f"There is no folder {path}. Check `--data folder:PATH`.")
    inside = {name: set(_folders(path / name)) for name in _folders(path)}
    named = [name for name in inside if kind_of_split(name)]
    others = [name for name in inside if name not in named]
    if others and not _share_a_name(inside[name] for name in named):
        if any(inside[name] for name in named):
            raise InputError(
                f"{path} has {_some(named)}, as splits are called, beside {_some(others)}, which may be classes. "
                "Keep the splits in a folder of their own, or rename them."
            )
        named = []  # a class of trains, say
    if not named:
        above = [name for name in inside if inside[name] and not _loose(path / name)]  # hold folders alone
        if (
            _share_a_name(inside[name] for name in above)
            or any(map(is_numbered_part, above))
            or (above and len(inside) == 1)
        ):
            raise InputError(
                f"{path} has {_some(above)} with nothing but folders in them, as splits have, but they are not called "
                f"train and val. Rename them, or give one of them alone: `--data folder:{path / min(above)}`."
            )
        return {}
    mixed = sorted(name for name in named if inside[name] and _loose(path / name))
    if mixed:
        raise InputError(
            f"{path / mixed[0]} has images beside folders: it may be a split or a class. Move the images into class "
            "folders, or rename it."
        )
    splits = chosen_splits(named, str(path))
    if split is not None and split not in splits:
        other = next(iter(splits.values()))
        raise InputError(
            f"{path} has {other}/ but no {split}/. Add it, use `--split {next(iter(splits))}` where the command has "
            f"that option, or let `--data folder:{path / other}` be divided in two."
        )
    return splits


def folder_classes(path: Path, splits: Mapping[str, str], order: str | None) -> list[str]:
    """The classes by rising label, of all splits together: one without images in a split must not shift the others."""
    found = {name for part in splits.values() or ["."] for name in _folders(path / part)}
    return ordered_classes(found, order, str(path))


def list_folder(path: Path, split: str, order: str | None) -> ImageFolder:
    """The images of PATH/SPLIT/CLASS/*, or of PATH/CLASS/* where there are no splits; links are followed.

    `order` is that of `ordered_classes`. Raises InputError as `folder_splits`, and for a class without an image.
    """
    splits = folder_splits(path, split)
    folder = path / splits.get(split, ".")
    classes = dict(enumerate(folder_classes(path, splits, order)))
    names: list[str] = []
    labels: list[int] = []
    skipped: Counter[str] = Counter()
    for label, name in classes.items():
        files = sorted(_image_files(folder / name, skipped)) if (folder / name).is_dir() else []
        if not files and (folder / name).is_dir():
            raise InputError(
                f"The class folder {folder / name} has no image ({' '.join(SUFFIXES)}). Remove or fill it."
            )
        names += [Path(os.path.relpath(file, path)).as_posix() for file in files]
        labels += [label] * len(files)
    if not names:
        raise InputError(f"{folder} has no class folders with images. Expected {folder}/CLASS/*.jpg, or use csv:FILE.")
    loose = _loose(folder)
    remarks = []
    if skipped:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(skipped.items()))
        remarks.append(f"{sum(skipped.values())} files in {folder} are no images and are left out: {kinds}.")
    if loose:
        remarks.append(f"{loose} images in {folder} are in no class folder and are left out.")
    if splits:
        unused = sorted(name for name in _folders(path) if name not in splits.values())
        if unused:
            remarks.append(f"{_some(unused)} in {path} are not used: its splits are {', '.join(splits.values())}.")
        elif kind_of_split(splits.get(split, "")) == "test":
            remarks.append(f"{path} has no validation split: {splits[split]} serves.")
    return ImageFolder(names=names, labels=labels, classes=classes, one_split=not splits, remarks=tuple(remarks))


def _image_files(folder: Path, skipped: Counter[str], above: tuple[str, ...] = ()) -> Iterator[Path]:
    """The image files in a folder and below it, links followed; `skipped` counts other files by suffix.

    Hidden files and folders are left out, and a link to a folder that holds it.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in _entries(folder):
        if entry.name.startswith("."):
            if entry.name.lower().endswith(SUFFIXES) and not entry.is_dir():
                skipped["hidden"] += 1
        elif entry.is_dir():
            yield from _image_files(folder / entry.name, skipped, (*above, real))
        elif _is_image(entry.name):
            yield folder / entry.name
        elif entry.name.lower() not in _SYSTEM_FILES:
            skipped[Path(entry.name).suffix.lower() or "without suffix"] += 1


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _folders(path: Path) -> list[str]:
    return [entry.name for entry in _entries(path) if entry.is_dir() and not entry.name.startswith(".")]


def _loose(path: Path) -> int:
    """How many images lie in the folder itself."""
    return sum(not entry.is_dir() and _is_image(entry.name) for entry in _entries(path))


def _entries(path: Path) -> list[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        return list(entries)


def _share_a_name(folders: Iterable[set[str]]) -> bool:
    """Whether two of the folders have a subfolder of one name."""
    seen = Counter(name for names in folders for name in names)
    return any(count > 1 for count in seen.values())


def _some(names: list[str]) -> str:
    """Three of the names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more
