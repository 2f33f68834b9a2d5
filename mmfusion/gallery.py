"""Sample queries of an evaluation with the photos of their first products under several views, from a run's records."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmfusion.retrieval.records import Records

VIEWS = ("text", "image", "fused", "bm25")  # those with a row of photos
PHOTOS = 5  # products of a row

Product = tuple[str, bytes | None]  # caption, JPEG


def example_queries(records: Records, split: str, metric: str, count: int) -> dict[str, str]:
    """Query ids, and why each is shown: a third best and a third worst against text, the others spread between them.

    Where text is the primary view, or there is none, best and worst are the view's own values. Queries whose products'
    photos found no room in the records are left out as long as others have photos.
    """
    primary = records.results["run"]["primary"]
    against = "text" if primary != "text" and "text" in records.results[split] else None
    table = rows_of(records.per_query, split, view=[primary])
    value = table[metric].to_numpy()
    if against:  # the views of a split hold the same queries in the same order
        value = value - rows_of(records.per_query, split, view=[against])[metric].to_numpy()
    pictured = np.isin(table["query_id"].to_pylist(), _pictured(records, split, primary))
    usable = ~np.isnan(value) & (pictured | ~pictured.any())
    order = np.flatnonzero(usable)[np.argsort(value[usable], kind="stable")]
    count = min(count, len(order))
    third = count // 3
    middle = order[third : len(order) - third]
    spread = middle[np.linspace(0, len(middle) - 1, count - 2 * third).round().astype(int)]
    beside = f" against {against}" if against else ""
    groups = {f"best{beside}": order[::-1][:third], f"worst{beside}": order[:third], "between": spread}
    return {table["query_id"][int(row)].as_py(): why for why, rows in groups.items() for row in rows}


def first_products(records: Records, split: str, queries: list[str]) -> dict[tuple[str, str], list[Product]]:
    """By query id and view, best first; a caption says `rank · label · title`, with one label per label column."""
    shown = rows_of(records.rankings, split, query_id=queries, view=list(VIEWS))
    shown = shown.filter(pc.less_equal(shown["rank"], PHOTOS)).sort_by("rank")
    kept = pc.is_in(records.products["product_id"], shown["product_id"].combine_chunks())
    products = {row["product_id"]: row for row in records.products.filter(kept).to_pylist()}
    labels = [name for name in shown.column_names if name.startswith("label/")]
    found: dict[tuple[str, str], list[Product]] = {}
    for row in shown.to_pylist():
        product, judged = products[row["product_id"]], "/".join(row[name] or "not judged" for name in labels)
        caption = f"{row['rank']} · {judged} · {product['title']}"
        found.setdefault((row["query_id"], row["view"]), []).append((caption, product["photo"]))
    return found


def rows_of(table: pa.Table, split: str, **among: list[str]) -> pa.Table:
    """The rows of a split whose named columns hold one of the given values."""
    kept = pc.equal(table["split"], split)
    for name, values in among.items():
        kept = pc.and_(kept, pc.is_in(table[name], pa.array(values, pa.string())))
    return table.filter(kept)


def _pictured(records: Records, split: str, view: str) -> list[str]:
    """Queries with a photo among their first products."""
    pictures = records.products.filter(pc.is_valid(records.products["photo"]))["product_id"].to_pylist()
    shown = rows_of(records.rankings, split, view=[view], product_id=pictures)
    return shown.filter(pc.less_equal(shown["rank"], PHOTOS))["query_id"].unique().to_pylist()
