"""Pages in a real browser: what they draw, that nothing hostile runs, and that a reader finds queries."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mmfusion.retrieval.comparison import compare_runs
from mmfusion.retrieval.html import write_comparison, write_report
from tests.mmfusion.retrieval.run_folder import HOSTILE_QUERY, HOSTILE_TITLE, Folder

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install chromium)")

# notes errors from the first script on, acts as a reader and leaves what it saw in an attribute for --dump-dom
WATCH = """<script>
  window.problems = [];
  addEventListener("error", event => problems.push(event.message));
  addEventListener("securitypolicyviolation", event => problems.push(event.violatedDirective + " " + event.blockedURI));
  window.alert = text => problems.push("alert " + text);
</script>"""
PROBE = """<script>
  const seen = selector => [...document.querySelectorAll(selector)];
  const open = () => seen(".plot").filter(plot => !plot.closest("details:not([open])"));
  const look = left => {
    if (left && !open().every(plot => plot.querySelector(".main-svg"))) return setTimeout(look, 100, left - 1);
    const report = act(seen);
    report.problems = problems;
    report.title = document.title;
    report.drawn = seen(".plot").filter(plot => plot.querySelector(".main-svg")).length;
    report.waiting = seen(".plot").length - report.drawn;
    document.body.dataset.seen = JSON.stringify(report);
  };
  const act = seen => { ACT };
  setTimeout(look, 500, 250);
</script>"""
FIGURES = ("loss", "ndcg", "gates", *("calibration",) * 4, "slice")
CARD = 'seen("#chosen h4").map(one => one.textContent)'


def browse(page: Path, act: str, address: str = "", size: str = "1280,12000") -> dict[str, Any]:
    """Opens a copy of the page in which `act`, a function's body, looks around: what it returned, what went wrong."""
    text = page.read_text(encoding="utf-8")
    watched = page.with_name("watched.html")
    watched.write_text(
        text.replace("<title>", WATCH + "<title>", 1).replace("</body>", PROBE.replace("ACT", act) + "</body>")
    )
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={size}",
         "--enable-logging=stderr",
         f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=30000", "--dump-dom",
         f"{watched.as_uri()}{address}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert not re.findall(r".*CONSOLE.*", done.stderr)
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, f"the page's scripts did not end:\n{done.stderr[-2000:]}"
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(Folder(unkept=(2,)).write(tmp_path_factory.mktemp("runs") / "moe" / "1"))


def test_a_report_draws_everything_and_runs_nothing_of_a_catalogue(report: Path) -> None:
    seen = browse(report, """
        const images = seen(".frame img");
        return {
          decoded: images.every(image => image.complete && image.naturalWidth === 96), images: images.length,
          missing: [...new Set(seen(".missing").map(one => one.textContent))].sort(),
          cards: seen("[data-gallery] .card .row").length,
          captions: seen(".tile figcaption").map(one => one.textContent),
          headings: seen("[data-gallery] h4").map(one => one.textContent),
          marks: [...new Set(seen(".tile .mark").map(one => one.textContent))].sort(),
          ticks: seen(".ytick text").map(one => one.textContent),
          wide: document.documentElement.scrollWidth > innerWidth,
        };
    """)  # fmt: skip
    assert seen["problems"] == []
    assert seen["title"] == "moe / 1"
    assert seen["drawn"] == len(FIGURES)
    assert seen["waiting"] == 2, "those in closed details"
    assert seen["decoded"]
    assert seen["images"] > 100
    assert seen["missing"] == ["no photo", "photo not kept"]
    assert HOSTILE_TITLE in seen["captions"]
    assert HOSTILE_QUERY in seen["headings"]
    assert seen["marks"] == ["C", "E", "I", "S", "–"]
    assert any("<b>2 words</b>  n = 2" in tick for tick in seen["ticks"])
    assert not seen["wide"]


def test_a_link_opens_a_query(report: Path) -> None:
    seen = browse(report, f"""
        const seenAt = address => {{
          history.replaceState(null, "", address);
          dispatchEvent(new Event("hashchange"));
          return {CARD};
        }};
        return {{
          first: {CARD}, rows: seen("#chosen .row").length,
          others: ["#q=SOCKS", "#results", "#q=nothing+like+it", "#q=shirt+blue"].map(seenAt),
        }};
    """, "#q=red+shirt")  # fmt: skip
    assert seen["problems"] == []
    assert seen["first"] == ["red shirt"]
    assert seen["rows"] == 4
    assert seen["others"] == [["warm socks"], ["warm socks"], [], ["blue shirt"]]


def test_search_by_keyboard(report: Path) -> None:
    seen = browse(report, """
        const box = document.getElementById("search");
        const press = key => box.dispatchEvent(new KeyboardEvent("keydown", {key, cancelable: true}));
        box.value = "shirt";
        box.dispatchEvent(new Event("input"));
        const matches = seen("#matches li span:first-child").map(one => one.textContent);
        press("ArrowDown"); press("ArrowDown");
        const active = document.getElementById(box.getAttribute("aria-activedescendant")).textContent;
        press("Enter");
        return {matches, active, card: seen("#chosen h4")[0].textContent, open: box.getAttribute("aria-expanded"),
                hash: location.hash, values: seen("#chosen td").length};
    """)  # fmt: skip
    assert sorted(seen["matches"]) == ["blue shirt", "red shirt"]
    assert seen["card"] == seen["matches"][1]
    assert seen["active"].startswith(seen["card"])
    assert seen["open"] == "false"
    assert seen["hash"] == "#q=" + seen["card"].replace(" ", "+")
    assert seen["values"] == 4 * 5


def test_rows_and_labels_are_chosen(tmp_path: Path) -> None:
    columns: dict[str, dict[str, float] | None] = {"relevance": {"E": 1.0, "I": 0.0}, "price": None}
    page = write_report(Folder(columns=columns).write(tmp_path / "run"))
    seen = browse(page, """
        const letters = () => [...new Set(seen(".tile .mark").map(one => one.textContent))].sort();
        const before = letters();
        seen("[data-column='1']")[0].click();
        seen("[data-row='0']")[0].click();
        const rows = seen("[data-gallery] .row-name").map(one => one.firstChild.data);
        return {before, after: letters(), rows: [...new Set(rows)]};
    """)  # fmt: skip
    assert seen["before"] == ["E", "I", "–"]
    assert seen["after"] == ["0", "0.5", "2", "–"]
    assert seen["rows"] == ["image", "fused", "bm25"]


@pytest.mark.parametrize("size", ["1280,9000", "800,9000"])
def test_a_comparison_sorts_and_filters_queries(tmp_path: Path, size: str) -> None:
    runs = [Folder(seed=seed).write(tmp_path / str(seed) / "v") for seed in (1, 2)]
    page = write_comparison(compare_runs(runs), tmp_path / "compare.html")
    seen = browse(page, """
        const column = place => seen(`#per-query tbody tr :nth-child(${place})`).map(one => one.textContent);
        const first = column(4);
        seen("#per-query thead th")[3].click();
        const turned = column(4);
        const filter = document.getElementById("filter");
        filter.value = "SHIRT red";
        filter.dispatchEvent(new Event("input"));
        const link = seen("#per-query .link")[0];
        link.click();
        return {first, turned, left: seen("#per-query .link").map(one => one.textContent),
                card: seen("#chosen h4")[0].textContent,
                dots: seen(".scatterlayer .point").length, wide: document.documentElement.scrollWidth > innerWidth};
    """, size=size)  # fmt: skip
    assert seen["problems"] == []
    assert not seen["wide"]
    numbers = [float(one.replace("−", "-")) for one in seen["first"] if one != "–"]
    assert len(numbers) == 3
    assert numbers == sorted(numbers, reverse=True)
    assert seen["turned"] == [*reversed(seen["first"][:3]), "–"]
    assert seen["left"] == ["red shirt"] == [seen["card"]]
    assert seen["dots"] == 3
