"""What an ablation trains: networks, arms and seeds, read from a YAML file."""

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from analysis.planning.uniform import parse_uniform
from analysis.storage.yaml_text import YamlText, read_text, read_yaml
from analysis.training.training_options import checked_config
from quant.choices import Layout
from quant.config import QATConfig
from quant.errors import InputError, first_line

_STRICT = ConfigDict(extra="forbid")
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,39}"
_UNSET = re.compile(r"\$\{?(\w+)")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to quantize and train: at most one of `uniform` and `like`; neither is the floating-point network."""

    __pydantic_config__ = _STRICT

    title: str  # in table and figure
    uniform: str | None = None  # w2a2
    like: str | None = None  # the planner's bits at the budget of these uniform ones
    against: str | None = None  # the arm that it is compared with, seed by seed; the ablation's baseline where None
    per_head: bool = True  # False: one scale a tensor wherever the default scheme has one a head
    layout: Layout = "paper"
    settings: dict[str, Any] = field(default_factory=dict)  # of QATConfig


Patterns = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network and its images; options are named as on the command line, what is None is the model's or a default."""

    __pydantic_config__ = _STRICT

    model: str
    data: str
    pretrained: bool = False
    weights: str | None = None
    model_kwargs: dict[str, Any] | None = None
    include: Patterns = ()
    exclude: Patterns = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    input_size: tuple[int, int, int] | None = None
    class_map: str | None = None
    class_order: str | None = None
    white_level: int | None = None
    holdout: float | None = None
    images: Annotated[int, Field(ge=1)] | None = None  # to train on
    val_images: Annotated[int, Field(ge=1)] | None = None
    sweep_images: Annotated[int, Field(ge=2)] = 512  # of the sweep behind the planner's bits
    sweep_bits: tuple[int, ...] = (2, 3, 4, 6, 8)
    arms: tuple[str, ...] | None = None  # all where None
    seeds: tuple[int, ...] | None = None  # those of the ablation where None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training: which network, which arm, which seed, with all its settings."""

    subject: str
    arm: str
    seed: int
    config: QATConfig
    fixed: dict[str, Any]  # all that fixes its result, as JSON has it

    @property
    def name(self) -> str:
        """The training's name in its run folder."""
        return f"{self.arm}-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Every arm on every network with every seed; settings of the arm win over those of the network, and they over all.

    `baseline` is the arm that the others are compared with where they do not name another.
    """

    __pydantic_config__ = _STRICT

    subjects: dict[str, Subject]
    arms: dict[str, Arm]
    baseline: str
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32, strict=True)], ...] = (0, 1, 2)
    settings: dict[str, Any] = field(default_factory=dict)

    def jobs(self) -> Iterator[Job]:
        """All trainings, seed by seed, so that an unfinished ablation has each arm about equally often."""
        most = max(len(self.seeds), *(len(s.seeds or ()) for s in self.subjects.values()))
        for i in range(most):
            for name, subject in self.subjects.items():
                seeds = self.seeds if subject.seeds is None else subject.seeds
                for arm in self.arms if subject.arms is None else subject.arms:
                    if i < len(seeds):
                        config = self._config(name, arm, seeds[i])
                        fixed = self._fixed(name, arm) | {f"config.{key}": v for key, v in asdict(config).items()}
                        yield Job(subject=name, arm=arm, seed=seeds[i], config=config, fixed=fixed)

    def _fixed(self, subject: str, arm: str) -> dict[str, Any]:
        free = {"arms", "seeds", "settings", "title", "against"}
        both = {"subject": asdict(self.subjects[subject]), "arm": asdict(self.arms[arm])}
        plain = json.loads(json.dumps(both, default=str))
        return {f"{of}.{key}": value for of, some in plain.items() for key, value in some.items() if key not in free}

    def _config(self, subject: str, arm: str, seed: int) -> QATConfig:
        values = self.settings | self.subjects[subject].settings | self.arms[arm].settings | {"seed": seed}
        return checked_config(values, dict.fromkeys(map(str, values), f"arm {arm} of {subject}"))


def read_ablation(path: Path) -> Ablation:
    """The ablation in a YAML file, every training's settings checked; `$NAME` in it is the environment's.

    Paths are as on the command line. InputError for anything that cannot be.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise InputError(f"The ablation {path} cannot be read: {first_line(error)}.") from error
    expanded = os.path.expandvars(text)
    unset = _UNSET.search(expanded)
    if unset:
        raise InputError(f"{path} names ${unset[1]}, which the environment does not set: export {unset[1]}=... first.")
    file = read_yaml(path, expanded)
    try:
        found = TypeAdapter(Ablation).validate_python(file.value)
    except ValidationError as error:
        raise InputError(_described(error, file)) from error
    for kind, names in (("subject", found.subjects), ("arm", found.arms)):
        _check_names(path, kind, names)
    against = [arm.against for arm in found.arms.values() if arm.against is not None]
    for name in (found.baseline, *against, *(arm for s in found.subjects.values() for arm in s.arms or ())):
        if name not in found.arms:
            near = difflib.get_close_matches(name, found.arms, n=1, cutoff=0.0)[0]
            raise InputError(f"{path} has no arm {name!r}; the nearest is {near}.")
    for subject_name, subject in found.subjects.items():
        arms = found.arms if subject.arms is None else subject.arms
        if not arms or len(set(arms)) < len(arms):
            place = file.place("subjects", subject_name, "arms")
            raise InputError(f"{place}: the arms {list(arms)} must be one or more, each of them once.")
    for seeds in (found.seeds, *(s.seeds for s in found.subjects.values() if s.seeds is not None)):
        if not seeds or len(set(seeds)) < len(seeds):
            raise InputError(f"{path}: the seeds {list(seeds)} must be one or more, each of them once.")
    for name, arm in found.arms.items():
        if arm.uniform is not None and arm.like is not None:
            place = file.place("arms", name, "like")
            raise InputError(f"{place}: arm {name} has both `uniform` and `like`; leave out one of them.")
        for key in ("uniform", "like"):
            if getattr(arm, key) is not None:
                parse_uniform(getattr(arm, key), f"{file.place('arms', name, key)}: {key}")
    named: list[tuple[tuple[str, ...], Mapping[str, Any]]] = [((), found.settings)]
    named += [(("subjects", name), subject.settings) for name, subject in found.subjects.items()]
    named += [(("arms", name), arm.settings) for name, arm in found.arms.items()]
    for above, settings in named:  # every setting is checked before hours are spent
        if "seed" in settings:
            place = file.place(*above, "settings", "seed")
            raise InputError(f"{place}: the seed of each training is one of `seeds`; leave it out of the settings.")
        checked_config(settings, {str(key): file.place(*above, "settings", key) for key in settings})
    return found


def _check_names(path: Path, kind: str, names: Mapping[str, object]) -> None:
    if not names:
        raise InputError(f"{path} has no {kind}.")
    bad = [name for name in names if not re.fullmatch(_NAME, name)]
    if bad:
        raise InputError(f"{path}: {kind} {bad[0]!r} is no name of a folder; use letters, digits, - and _.")


def _described(error: ValidationError, file: YamlText) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"])) or "the file"
    line = file.place(*first["loc"])
    allowed = {"subjects": Subject, "arms": Arm}.get(str(first["loc"][0]) if first["loc"] else "", Ablation)
    known = ", ".join(f.name for f in fields(allowed))
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        near = difflib.get_close_matches(str(first["loc"][-1]), [f.name for f in fields(allowed)], n=1, cutoff=0.0)[0]
        return f"{line}: {place} is unknown; the nearest is {near}. Known: {known}."
    return f"{line}: {place}: {first['msg'][0].lower()}{first['msg'][1:]}. Known: {known}."
