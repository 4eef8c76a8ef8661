"""Laws between the columns of cost.parquet: each product is told from both of its sides, alike."""

import pandas as pd

from analysis.storage.table_checks import COUNTABLE, Rule
from quant.site import PRODUCT, WEIGHT_TENSORS

_OWNERS = (*WEIGHT_TENSORS, "query", "attention", PRODUCT)  # the side of a product that has its MACs (SiteInfo.macs)


def _products(cost: pd.DataFrame) -> pd.DataFrame:
    """Each product from each of its sides: site, other, macs of `site`, whether `site` owns it; index of the row."""
    sides = pd.DataFrame(
        {
            "site": cost["module"] + ":" + cost["tensor"],
            "other": [list(edges) for edges in cost["edges"]],
            "macs": cost["macs"].astype(float),
            "owns": cost["tensor"].isin(_OWNERS),
        }
    )
    return sides.explode("other")


def _any_side(sides: pd.DataFrame, wrong: pd.Series) -> pd.Series:
    return wrong.groupby(sides.index).any()


def _no_product(cost: pd.DataFrame) -> pd.Series:
    """No product at all, one with a site that there is not, twice the same, or one that both sides own, or neither.

    What is of no site is a product with itself.
    """
    sides = _products(cost)
    owns = sides.drop_duplicates("site").set_index("site")["owns"]
    alone = (sides["site"] == sides["other"]) & cost["tensor"].eq(PRODUCT).reindex(sides.index)
    wrong = (sides["other"].map(owns) != ~sides["owns"]) & ~alone
    return _any_side(sides, sides.duplicated(["site", "other"]) | wrong)


def _one_sided(cost: pd.DataFrame) -> pd.Series:
    sides = _products(cost)
    told = pd.MultiIndex.from_frame(sides[["site", "other"]])
    answered = pd.MultiIndex.from_frame(sides[["other", "site"]]).isin(told)
    return _any_side(sides, pd.Series(~answered, index=sides.index))


def _wrong_macs(cost: pd.DataFrame) -> pd.Series:
    """The side that does not own its products has the MACs of all that do."""
    sides = _products(cost)
    macs = sides.drop_duplicates("site").set_index("site")["macs"]
    owned = sides["other"].map(macs).groupby(sides.index).sum()
    return ~cost["tensor"].isin(_OWNERS) & (owned != cost["macs"])


def _wrong_elements(cost: pd.DataFrame) -> pd.Series:
    weight, given = cost["tensor"].isin(WEIGHT_TENSORS), cost["elements_per_image"]
    return given.notna().where(weight, given != cost["numel"])


def _unknown_tensor(cost: pd.DataFrame) -> pd.Series:
    return cost["same_tensor"].notna() & ~cost["same_tensor"].isin(cost["module"] + ":" + cost["tensor"])


def _uncountable(name: str) -> Rule:
    return Rule(
        column=name, needs=(name,), expected="all rows to add up to less than 2^53",
        broken=lambda table: table[name].astype(float).cumsum() > COUNTABLE,
    )  # fmt: skip


COST_RULES = (
    Rule(column="numel", needs=("numel", "quantizable"), expected="1 or more, for the site can be quantized",
         broken=lambda table: table["quantizable"] & (table["numel"] < 1)),
    Rule(column="elements_per_image", needs=("tensor", "numel", "elements_per_image"), broken=_wrong_elements,
         expected="none for a weight, numel for an activation"),
    Rule(column="edges", needs=("module", "tensor", "edges", "macs"), broken=_no_product,
         expected="sites of this table (module:tensor) that this one is multiplied with, each once"),
    Rule(column="edges", needs=("module", "tensor", "edges", "macs"), broken=_one_sided,
         expected="sites whose edges name this one in turn"),
    Rule(column="macs", needs=("module", "tensor", "edges", "macs"), broken=_wrong_macs,
         expected="the sum of those of its edges"),
    Rule(column="same_tensor", needs=("module", "tensor", "same_tensor"), broken=_unknown_tensor,
         expected="a site of this table (module:tensor), or none"),
    _uncountable("numel"), _uncountable("macs"),
)  # fmt: skip
