"""How many printed numbers are filled and agree, and the causes of those that do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedsieve.recipes.papers.parts import find_part
from fedsieve.report.paper_tables import all_results, count_results, counts_in_words, read_causes, results_summary
from fedsieve.types import InputError
from paper_results import every_kind, record, result, rows_of


def test_every_printed_number_counts_once() -> None:
    part = find_part("flash", "table4")
    first, *others = every_kind(part)  # in agreement; above, not run, stale and below, of other data
    far = [result(row, [record(row, 10.0)]) for row in rows_of(part)[5:]]
    causes = {"flash_table4/2": "Why.", "flash_table4/4": "A stale one's.", "flash_table4/7": "Why."}
    counts = count_results([first, *others, *far], causes)
    assert counts == {
        **{"printed": 7, "filled": 5, "in agreement": 1, "above": 1, "below": 2, "not judged": 0, "stale": 1},
        **{"explained": 2, "other data or protocol": 1},
    }
    assert counts_in_words(counts) == (
        "5 of 7 printed accuracies are filled by runs of their data and protocol: 1 in agreement, 1 above, 2 below, "
        "1 stale, 2 of the misses explained; 1 more was run on other data or by another protocol."
    )


def test_a_number_without_any_spread_is_filled_and_not_judged() -> None:
    row = rows_of(find_part("sparsefedpp", "figure1"))[0]
    counts = count_results([result(row, [record(row, 10.0)])], {})
    assert (counts["filled"], counts["not judged"], counts["below"]) == (1, 1, 0)
    assert "1 without a known spread." in counts_in_words(counts)


def test_an_implementation_that_is_not_the_papers_fills_nothing() -> None:
    row = next(row for row in rows_of(find_part("sparsefedpp", "figure1")) if row.variant)
    assert count_results([result(row, [])], {})["other data or protocol"] == 0
    assert count_results([result(row, [record(row, 10.0)])], {})["other data or protocol"] == 1


def test_the_summary_adds_tables_and_papers() -> None:
    table2, table4, other = (find_part(*name.split()) for name in ("flash table2", "flash table4", "zerofl table2"))
    results = {other: [result(row, []) for row in rows_of(other)], table2: [], table4: every_kind(table4)}
    lines = [line for line in results_summary(results, "md", {}).splitlines() if line.startswith("|")]
    assert [line.strip("| ") for line in lines[2:]] == [
        "ZeroFL | Table 2 | 20 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0",
        "FLASH | Table 2 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0",
        "Table 4 | 5 | 3 | 1 | 1 | 0 | 0 | 1 | 0 | 1",
        "all | 5 | 3 | 1 | 1 | 0 | 0 | 1 | 0 | 1",
        "all |  | 25 | 3 | 1 | 1 | 0 | 0 | 1 | 0 | 1",
    ]


def test_kept_results_of_all_seeds_are_read(tmp_path: Path) -> None:
    row = find_part("flash", "table2").runs[13]
    for seed in (0, 7):
        run = record(row, 97.0 + seed / 10, seed)  # type: ignore[arg-type]
        columns = {"round": [400], "accuracy": [0.97 + seed / 1000]}
        content = {"run": run.manifest, "summary": run.summary, "columns": columns, "arithmetic": 1}
        path = tmp_path / f"flash/results/flash_table2-14-seed{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    results = all_results(tmp_path)
    assert sum(map(len, results.values())) == 281
    ran = [one for rows in results.values() for one in rows if one.records]
    assert [one.row.name for one in ran] == ["flash_table2/14"]
    assert ran[0].comparison.values == pytest.approx((97.0, 97.7))


def test_causes_name_rows_of_the_papers(tmp_path: Path) -> None:
    assert read_causes(tmp_path) == {}
    (tmp_path / "causes.toml").write_text('"flash_table2/3" = "Since."\n')
    assert read_causes(tmp_path) == {"flash_table2/3": "Since."}
    for text, said in (
        ("flash_table2/3 = ", "is no TOML"),
        ('"flash_table2/99" = "Since."', "flash_table2/99 is no row"),
        ('"flash_table2/3" = 3', "flash_table2/3 is no row of a paper with a sentence"),
    ):
        (tmp_path / "causes.toml").write_text(text)
        with pytest.raises(InputError, match=said):
            read_causes(tmp_path)
