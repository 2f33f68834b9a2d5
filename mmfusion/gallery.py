"""The galleries of a run's report, from its records: queries with the photos of their first products, view by view."""

import numpy as np
import pyarrow.compute as pc

from mmfusion.retrieval.examples import FIRST_PRODUCTS, choose, held_against, main_metric, shown_at_first
from mmfusion.retrieval.exclusive import TITLE
from mmfusion.retrieval.records import Records, part

Product = tuple[str, bytes | None]  # caption, JPEG


def example_queries(records: Records, split: str) -> dict[str, str]:
    """Query ids, and the titles of the report's galleries that show them."""
    views, primary = records.results[split], records.results["run"]["primary"]
    metric, against = main_metric(views[primary]), held_against(primary, views)
    tables = [part(records.per_query, split=split, view=view) for view in (primary, against) if view]
    chosen = choose(*(table[metric].to_numpy().astype(np.float64) for table in tables))
    found: dict[str, list[str]] = {}
    for title, rows in chosen.galleries(primary, against).items():
        for row in rows:
            found.setdefault(tables[0]["query_id"][row].as_py(), []).append(title)
    for query in records.results.get("exclusive", {}).get(split, {}).get("most", []):
        found.setdefault(query, []).append(TITLE)
    return {query: ", ".join(titles) for query, titles in found.items()}


def example_views(records: Records, split: str) -> list[str]:
    """Those that the report shows before a reader asks for others."""
    return [view for view in records.results[split] if shown_at_first(view)]


def first_products(records: Records, split: str, queries: list[str]) -> dict[tuple[str, str], list[Product]]:
    """By query id and view, best first; a caption says `rank · label · title`, with one label per label column.

    Where there is no photo it says `no photo`; `photo not kept` where the catalogue has one and the records do not.
    """
    shown = part(records.rankings, split=split, query_id=queries, view=example_views(records, split))
    shown = shown.filter(pc.less_equal(shown["rank"], FIRST_PRODUCTS)).sort_by("rank")
    kept = pc.is_in(records.products["product_id"], shown["product_id"].combine_chunks())
    products = {row["product_id"]: row for row in records.products.filter(kept).to_pylist()}
    labels = [name for name in shown.column_names if name.startswith("label/")]
    found: dict[tuple[str, str], list[Product]] = {}
    for row in shown.to_pylist():
        product, judged = products[row["product_id"]], "/".join(row[name] or "not judged" for name in labels)
        said = [str(row["rank"]), judged, product["title"]]
        if product["photo"] is None:
            said.append("photo not kept" if product["has_photo"] else "no photo")
        found.setdefault((row["query_id"], row["view"]), []).append((" · ".join(said), product["photo"]))
    return found
