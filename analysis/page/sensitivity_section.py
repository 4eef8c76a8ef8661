"""The tables of a report about sensitivity: the sites that cost most, and how proxies rank them."""

from dataclasses import replace

from analysis.page.cells import Cell, Table, finite, measured, number, text
from analysis.page.content import RunContent

MOST_SENSITIVE = 10


def most_sensitive(content: RunContent) -> Table | None:
    """The ten sites whose quantization to the lowest bit-width that was measured changes the answers most (KL)."""
    if content.sensitivity is None:
        return None
    lowest = content.sensitivity["bit_width"].min()
    rows = content.sensitivity[content.sensitivity["bit_width"] == lowest]
    top = rows.nlargest(MOST_SENSITIVE, "divergence" if rows["divergence"].notna().any() else "delta_loss")
    columns = (
        "module", "tensor", "KL (nats)", "loss increase (nats)", "top-1 change (points)", "SQNR of the tensor (dB)",
        "SQNR of the output (dB)",
    )  # fmt: skip
    cells = [
        (
            text(row["module"]),
            text(row["tensor"]),
            measured(row["divergence"], row["divergence_se"], digits=4),
            measured(row["delta_loss"], row["delta_loss_se"], digits=4),
            number(100 * row["delta_top1"], "{:+.2f}"),
            number(row["sqnr_db"], "{:.1f}"),
            number(row["sqnr_output_db"], "{:.1f}"),
        )
        for row in top.to_dict("records")
    ]
    many = f"{len(top)} most sensitive of {len(rows)} sites"
    return Table(caption=f"{content.name}: the {many} at {lowest} bits", columns=columns, rows=tuple(cells))


def all_sites(content: RunContent) -> Table | None:
    """A row a site in network order: its KL at each bit-width, and at the lowest one its loss increase and SQNR."""
    if content.sensitivity is None:
        return None
    rows = content.sensitivity
    widths = sorted(rows["bit_width"].unique())
    cells = []
    for (module, tensor), site in rows.groupby(["module", "tensor"], sort=False):
        at = site.drop_duplicates("bit_width").set_index("bit_width").reindex(widths)
        lowest = at.iloc[0]
        cells.append(
            (
                text(module),
                text(tensor),
                text(site["kind"].iloc[0]),
                *(_with_error(kl, error) for kl, error in zip(at["divergence"], at["divergence_se"], strict=True)),
                _with_error(lowest["delta_loss"], lowest["delta_loss_se"]),
                number(lowest["sqnr_db"], "{:.1f}"),
            )
        )
    columns = (
        "module", "tensor", "kind", *(f"KL at {bits} bit (nats)" for bits in widths),
        f"loss increase at {widths[0]} bit (nats)", f"SQNR at {widths[0]} bit (dB)",
    )  # fmt: skip
    return Table(caption=f"{content.name}: all {len(cells)} sites", columns=columns, rows=tuple(cells))


def _with_error(value: float, error: float) -> Cell:
    """A figure of three digits; its standard error is in the file of the table alone."""
    return replace(number(value, "{:.3g}"), error=finite(error))


def proxy_ranks(content: RunContent) -> Table | None:
    """How each proxy ranks the sites beside the measured KL, a row a proxy and a column a bit-width."""
    if content.proxies is None:
        return None
    _, correlation = content.proxies
    rows = correlation[correlation["tensors"] == "all"]
    if rows.empty:
        return None
    widths = sorted(rows["bit_width"].unique())
    cells: list[tuple[Cell, ...]] = []
    for proxy in rows["proxy"].drop_duplicates():
        own = rows[rows["proxy"] == proxy].set_index("bit_width")["spearman"].reindex(widths)
        cells.append((text(proxy), *(number(value, "{:.2f}") for value in own)))
    ceiling = rows.groupby("bit_width")["ceiling"].max().reindex(widths)
    cells.append((text("what the noise of the sweep allows"), *(number(value, "{:.2f}") for value in ceiling)))
    return Table(
        caption=f"{content.name}: Spearman's correlation of each proxy with the measured KL of all sites",
        columns=("proxy", *(f"{bits} bit" for bits in widths)), rows=tuple(cells),
    )  # fmt: skip
