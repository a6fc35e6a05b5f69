"""One page (Markdown, SVG plots) from what the benchmarks left in `bench/out`; `--publish`: to `docs/benchmarks/`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pygal
from form import OUT, shown

PUBLISHED = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"


def page(found: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the page's parts."""
    machine = found[0]["machine"]
    yield "# Benchmarks\n"
    yield "From one run of `make bench`, by `bench/report.py`. Machines differ and are shared: read the ratios.\n"
    yield ", ".join(f"{key}: {value}" for key, value in machine.items()) + "\n"
    for entry in found:
        yield f"## {entry['title']}\n"
        yield "| " + " | ".join(entry["columns"]) + " |"
        yield "|" + "---|" * len(entry["columns"])
        for row in entry["rows"]:
            yield "| " + " | ".join(shown(value) for value in row) + " |"
        yield ""
        yield from (f"- {note}" for note in entry["notes"])
        yield from (f"\n![{plot['title']}]({file_name(entry, plot)})" for plot in entry["plots"])
        yield ""


def file_name(entry: dict[str, Any], plot: dict[str, Any]) -> str:
    return f"{entry['name']}-{entry['plots'].index(plot)}.svg"


def drawn(entry: dict[str, Any], plot: dict[str, Any]) -> bytes:
    """Return one plot as SVG."""
    columns = entry["columns"]
    x, y = columns.index(plot["x"]), columns.index(plot["y"])
    series = [columns.index(name) for name in plot["series"]]
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in entry["rows"]:
        if row[y] > 0 or not plot["log"]:
            lines.setdefault(" ".join(str(row[index]) for index in series), []).append((row[x], row[y]))
    chart = pygal.XY(
        title=plot["title"], x_title=plot["x"], logarithmic=plot["log"], js=(), width=900, height=450,
        legend_at_bottom=True,
    )  # fmt: skip
    for name, points in lines.items():
        chart.add(name, points)
    rendered: bytes = chart.render()
    return rendered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--publish", action="store_true", help="write to docs/benchmarks instead of bench/out")
    args = parser.parse_args()
    found = [json.loads(path.read_text()) for path in sorted(OUT.glob("*.json"))]
    if not found:
        raise SystemExit("bench/out holds no results: run make bench first")
    target = PUBLISHED if args.publish else OUT
    target.mkdir(parents=True, exist_ok=True)
    (target / "README.md").write_text("\n".join(page(found)) + "\n")
    for entry in found:
        for plot in entry["plots"]:
            (target / file_name(entry, plot)).write_bytes(drawn(entry, plot))
    print(f"report: {target / 'README.md'}")


if __name__ == "__main__":
    main()
