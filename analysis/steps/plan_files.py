"""Where a bit plan lies, and what is made with it: its table and figures, its front, its verification."""

from dataclasses import dataclass
from pathlib import Path

from analysis.inputs.task_option import check_task
from analysis.planning.plan_request import PlanRequest
from analysis.planning.user_tables import LATENCY_COLUMNS, SCORE_COLUMNS, check_csv
from analysis.runs import Run
from analysis.session.requested import check_device
from quant.bit_plan import BitPlan
from quant.errors import InputError

NAME = "plan"  # of the run's own plan, and of the step that makes it


@dataclass(frozen=True)
class PlanFiles:
    """The files of one plan of a run. The run's own is plan.json; another one, FILE.json, keeps its tables apart."""

    run: Run
    out: Path

    @property
    def is_own(self) -> bool:
        """Whether this is the plan that the run's page shows."""
        return self.out.resolve() == (self.run.path / f"{NAME}.json").resolve()

    @property
    def name(self) -> str:
        """`plan` for the run's own, `plan-STEM` for another: the name of its step and of the folder of its tables."""
        if self.is_own:
            return NAME
        return self.out.stem if self.out.stem.startswith(f"{NAME}-") else f"{NAME}-{self.out.stem}"

    def in_run(self, file: str) -> str:
        """The name of a table or figure of this plan, relative to the run folder."""
        return file if self.is_own else f"{self.name}/{file}"

    @property
    def beside(self) -> list[Path]:
        """The plan, its table and its figure."""
        return [self.out.with_suffix(suffix) for suffix in (".json", ".csv", ".png", ".svg")]

    @property
    def files(self) -> list[str]:
        """All that planning may write into the run folder."""
        from analysis.figures.panels import figure_files  # here: it brings matplotlib, which `check` does not need

        inside = self.out.resolve().parent == self.run.path.resolve()
        tables = ("pareto.parquet", "pareto_uniform.parquet", *figure_files("pareto"))
        return [*(path.name for path in self.beside if inside), *map(self.in_run, tables)]

    def check(self) -> None:
        """InputError for a file that the plan, its table or its figure must not replace."""
        out, run = self.out, self.run
        if out.suffix != ".json":
            raise InputError(
                f"--out {out} is not the name of a plan: end it with .json. Its table and figure lie beside it."
            )
        inside = out.resolve().parent == run.path.resolve()
        if not inside and (out.parent / "run.json").exists():
            raise InputError(f"--out {out} lies in the run folder of another model or sweep; choose another folder.")
        others = {file for name, step in run.record.steps.items() if name != self.name for file in step.files}
        taken = {path.name for path in self.beside if inside} & (others | {"run.json"})
        if taken:
            raise InputError(f"--out {out} would replace {sorted(taken)[0]} of the run; choose another name.")
        if out.is_file():  # nothing but a plan is replaced
            BitPlan.from_json(out.read_text(encoding="utf-8", errors="replace"), source=str(out))


def checked_files(run: Path, request: PlanRequest) -> PlanFiles:
    """The files of the plan that is asked for; InputError for what is wrong by names, paths and heads of files alone.

    That is: a run folder without a sweep or model, tables of the user's that cannot be read, a plan file that must not
    be replaced, an unknown device.
    """
    folder = Run(run)
    for table in ("sensitivity", "cost"):
        folder.existing(f"{table}.parquet")
    if folder.record.model is None:
        raise InputError(f"No model is recorded in {run / 'run.json'}. Make the run with `qvw sensitivity`.")
    if request.interactions:
        folder.existing("proxy_images.parquet")
    for path, columns in ((request.latency, LATENCY_COLUMNS), (request.scores, SCORE_COLUMNS)):
        if path is not None:
            check_csv(path, columns)
    if request.verify:
        check_device(request.device)
    if request.task is not None:
        check_task(request.task)
    files = PlanFiles(folder, run / f"{NAME}.json" if request.out is None else request.out)
    files.check()
    return files
