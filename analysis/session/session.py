"""A measurement in a run folder: what is measured, on which data, and what fixes the result."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from analysis.runs import Run
from analysis.storage.run_record import ModelRecord, StepRecord, typed_command
from analysis.task import Task
from quant.network import Network
from quant.site import SiteInfo


@dataclass(frozen=True, kw_only=True)
class Source:
    """The batches of a measurement, always the same ones in the same order.

    `read(first, every)` yields the batches number `first`, `first + every`, ... on the device, each with the names of
    its samples; it adds the names of samples that cannot be read to `skipped`, which leaves an empty list of names.
    """

    read: Callable[[int, int], Iterator[tuple[Any, Sequence[str]]]]
    batches: int
    unit: str
    samples: int | None = None  # None where they are not counted before they are read
    batch_size: int | None = None  # of all batches but the last
    names: Collection[str] = ()  # of samples that may be skipped
    skipped: list[str] = field(default_factory=list)
    nothing: str = "`data` holds no sample."  # what is told where not one can be read
    at_end: Callable[[], None] = lambda: None  # warns of what was skipped


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a measurement needs of its run folder, whether a live network or the command line asks for it.

    `inputs` fix the result of a step: a step of other inputs is another step. `identity` is all that fixes the values
    of unfinished work beside them, such as versions. `options` and `remembered` are noted in run.json.
    """

    run: Run
    network: Network
    task: Task
    record: ModelRecord
    source: Source | None  # None: weights alone
    inputs: Mapping[str, Any]
    identity: Mapping[str, Any]
    bar: Callable[..., tqdm]  # (total, what, unit, done=0)
    say: Callable[[str], None]
    warn: Callable[[str], None]
    device: str
    options: Mapping[str, Any] = field(default_factory=dict)
    remembered: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    overwrite: bool = False

    @property
    def sites(self) -> list[SiteInfo]:
        """What is known of each site, in network order."""
        return self.network.infos

    @contextmanager
    def step(
        self,
        name: str,
        files: Sequence[str],
        options: Mapping[str, Any],
        inputs: Mapping[str, Any] | None = None,
        *,
        seed: int | None = None,
        temporary: Sequence[str] = (),
        instead: str = "run",
        renew: bool = False,
    ) -> Iterator[None]:
        """Note in run.json the model, the data and that a step runs; the context notes how it ended.

        Refuses to mix it with another model or other inputs. `files` are what it writes; `overwrite` removes them
        first, or with `renew` leaves them until they are written again. `options` are those of the step's own,
        `inputs` what else than model and data fixes its result, `seed` its own seed where that is not the one that
        chose the data, `temporary` files for resuming alone, `instead` the option that keeps both results. Samples that
        were skipped are named in the step's options as `skipped_images`.
        """
        run = self.run
        run.set_model(self.record, overwrite=self.overwrite)
        fixed, before = {**self.inputs, **(inputs or {})}, run.record.steps.get(name)
        with run.start_step(
            name, command=typed_command(), options={**self.options, **options}, inputs=fixed,
            seed=self.seed if seed is None else seed, device=self.device, files=files, temporary=temporary,
            instead=instead, overwrite=self.overwrite and not renew, renew=self.overwrite and renew,
        ):  # fmt: skip
            run.set_data(self.remembered)
            yield
        self._note_skipped(name, before)

    def _note_skipped(self, name: str, before: StepRecord | None) -> None:
        """Name in run.json the samples that a step left out; `before` is its record as it stood at the start."""
        step = self.run.record.steps[name]
        # A resumed step has rows of earlier passes, which skipped what they could not read.
        earlier = before is not None and not self.overwrite and before.inputs == step.inputs
        skipped = list(before.options.get("skipped_images", [])) if before is not None and earlier else []
        skipped += [path for path in ([] if self.source is None else self.source.skipped) if path not in skipped]
        if skipped:
            self.run.note_step(name, replace(step, options={**step.options, "skipped_images": skipped}))
