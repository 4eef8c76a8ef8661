"""What a report says of trainings: first and last figures, gradient norms, settings, and whose plan is another."""

import pandas as pd

from analysis.page.cells import Cell, Table, number, plain, text
from analysis.page.content import RunContent, Training, oscillating_shares
from quant.bit_plan import BitPlan

_HASH = 64  # letters of a plan's hash in the record; uniform bits stand there as w3a4


def of_other_plans(content: RunContent) -> tuple[str, ...]:
    """A sentence for each training whose plan was another than the one that plan.json now holds."""
    return tuple(filter(None, (_of_other_plan(content, training) for training in content.trainings)))


def _of_other_plan(content: RunContent, training: Training) -> str:
    step = content.record.steps.get(training.name)
    given = None if step is None else step.inputs.get("plan")
    if content.plan is None or not isinstance(given, str) or len(given) != _HASH or given == content.plan.sha256:
        return ""  # uniform bits and floating point are no plan of the run
    own = {} if training.plan is None else training.plan.bits
    now = content.plan.bits
    differing = sum(own.get(site) != bits for site, bits in now.items())
    if own.keys() == now.keys() and not differing:
        return ""  # the same bits within another budget
    return (
        f"{training.name} was trained with another plan than plan.json now holds: {differing} of its {len(now)} sites "
        "have other bits. Train again with `qvw train --overwrite` to have the accuracy of this plan."
    )


def trained(content: RunContent) -> Table | None:
    """First and last figures of each training on the validation images."""
    if not content.trainings:
        return None
    columns = (
        "training", "status", "weight bits", "activation bits", "steps", "loss at the start", "loss at the end",
        "top-1 at the start (%)", "top-1 at the end (%)", "best top-1 (%)", "oscillating (%)", "oscillating, EMA (%)",
    )  # fmt: skip
    rows = [_trained_row(training) for training in content.trainings]
    return Table(caption=f"{content.name}: trainings, on validation images", columns=columns, rows=tuple(rows))


def gradient_norms(content: RunContent) -> Table | None:
    """Norms of the gradient of each term of the loss, where they were last measured in each training."""
    found: dict[str, dict[str, float]] = {}
    for training in content.trainings:
        norms = training.history.filter(regex="^grad_").dropna(how="all")
        if len(norms):
            found[training.name] = norms.iloc[-1].dropna().to_dict()
    if not found:
        return None
    names = list(dict.fromkeys(name for norms in found.values() for name in norms))
    rows = [(text(name), *(number(norms.get(term), "{:.3g}") for term in names)) for name, norms in found.items()]
    columns = ("training", *(term.removeprefix("grad_") for term in names))
    caption = f"{content.name}: gradient norm of each term, last measured"
    return Table(caption=caption, columns=columns, rows=tuple(rows))


def configuration(content: RunContent) -> Table | None:
    """The settings of each training, a row a setting."""
    configs = {training.name: training.config for training in content.trainings if training.config}
    if not configs:
        return None
    keys = list(dict.fromkeys(key for config in configs.values() for key in config))
    rows = [(text(key), *(text(plain(config.get(key))) for config in configs.values())) for key in keys]
    caption = f"{content.name}: configuration of each training"
    return Table(caption=caption, columns=("setting", *configs), rows=tuple(rows))


def _trained_row(training: Training) -> tuple[Cell, ...]:
    history = training.history.sort_values("step", kind="stable")
    validated = history[history["split"] == "val"]
    loss, top1 = validated["loss"].dropna(), 100 * validated["top1"].dropna()
    last = {} if training.oscillation is None else oscillating_shares(training.oscillation).iloc[-1].to_dict()
    if history["step"].max() < training.config.get("oscillation_window", 0):
        last.pop("oscillating", None)  # the window was never full
    return (
        text(training.name),
        text("finished" if training.finished else "not finished"),
        *(number(bits, "{:.2f}") for bits in _mean_bits(training.plan)),
        number(history["step"].max(), "{:,.0f}"),
        *(number(value, "{:.3f}") for value in _ends(loss)),
        *(number(value, "{:.1f}") for value in _ends(top1)),
        number(top1.max() if len(top1) else None, "{:.1f}"),
        *(number(100 * last[name] if name in last else None, "{:.2f}") for name in ("oscillating", "oscillating_ema")),
    )


def _mean_bits(plan: BitPlan | None) -> tuple[float | None, float | None]:
    return (32.0, 32.0) if plan is None else (plan.totals.weight_bits, plan.totals.activation_bits)


def _ends(values: pd.Series) -> tuple[float | None, float | None]:
    return (float(values.iloc[0]), float(values.iloc[-1])) if len(values) else (None, None)
