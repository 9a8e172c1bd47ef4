"""The papers' tables with results in them: laid out as printed, judged by the rule, and nothing from outside acts."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedsieve.recipes.papers import Published
from fedsieve.recipes.papers.parts import PaperPart, find_part, paper_parts
from fedsieve.report.paper_tables import paper_table
from fedsieve.runs.comparison import Comparison
from fedsieve.runs.record import RunRecord
from fedsieve.runs.reproduction.results import RowResult
from fedsieve.types import InputError
from paper_results import every_kind, record, result, rows_of

HOSTILE = "a|b</td><script>x</script> <!-- end --> \\end{table} $x_1^2$ 100% #1 *b* [c](http://d) `e` \x1b[2J\u202e~&"
NUMBERED = [part for part in paper_parts() if any(isinstance(row, Published) for row in part.runs)]


def grid(markdown: str) -> list[str]:
    return [line for line in markdown.splitlines() if line.startswith("|")]


def test_a_table_is_laid_out_as_printed_with_ours_beneath() -> None:
    part = find_part("flash", "table4")
    text = paper_table(part, every_kind(part), "md", {"flash_table4/2": "A cause.", "flash_table4/4": "A cause."})
    first = text[: text.index("**FLASH, Table 4: the runs**")]
    assert grid(first) == [
        "| Dataset | Data Distribution | Max Client Density | Hetero-FLASH Acc % |",
        "| --- | --- | --- | --- |",
        "| MNIST | IID (α = 1000) | 0.2 | 98.29 ± 0.05<br>**98.20 ± 0.20 (n = 3)** |",
        "|  | non-IID (α = 1.0) | 0.2 | 98.29 ± 0.09<br>**98.50 (n = 1)** ↑<sup>1</sup> |",
        "|  | non-IID (α = 0.1) | 0.2 | 97.63 ± 0.22 |",
        "| CIFAR-10 | IID (α = 1000) | 0.2 | 87.19 ± 0.26<br>**80.00 (n = 1)** ↓ †<sup>1</sup> |",
        "|  | non-IID (α = 1.0) | 0.2 | 86.16 ± 0.04<br>*300 of 50,000 training examples* |",
        "|  | non-IID (α = 0.1) | 0.2 | 75.23 ± 1.26 |",
        "| FEMNIST | non-IID | 0.2 | 82.58 ± 0.24 |",
    ]
    assert "\n1 A cause.\n" in first
    assert "more than two standard deviations" in first


def test_titles_over_several_columns_and_what_is_printed_beside() -> None:
    part = find_part("zerofl", "table2")
    head, _, *body = grid(paper_table(part, [], "md"))
    assert head == (
        "| Sparsity Level | Mask Ratio | Full Model, NIID | Top-K-W., NIID | Diff. Top-K-W., NIID | "
        "Top-K-W. Diff, NIID | File Size | Comms. Savings |"
    )
    assert body == [
        "| 90 % | — | 83.38 | – | – | – | 43.7 | 1× |",
        "|  | 0.0 | – | 83.22 | 82.14 | 83.43 | 10.1 | 4.3× |",
        "|  | 0.1 | – | 84.01 | 81.58 | 83.60 | 18.7 | 2.3× |",
        "|  | 0.2 | – | 83.67 | 83.29 | 82.79 | 27.3 | 1.6× |",
        "| 95 % | — | 80.69 | – | – | – | 43.7 | 1× |",
        "|  | 0.0 | – | 81.11 | 80.67 | 80.45 | 5.9 | 7.4× |",
        "|  | 0.1 | – | 81.02 | 80.29 | 80.09 | 14.4 | 3.0× |",
        "|  | 0.2 | – | 83.30 | 81.35 | 81.25 | 23.0 | 1.9× |",
    ]


@pytest.mark.parametrize(
    ("name", "line"),
    {
        "zerofl table1": "|  |  | 0.1 | – | – | 82.14 ± 0.58 | 79.84 ± 0.62 | 82.64 ± 0.49 | 79.58 ± 1.09 | "
        "82.32 ± 0.75 | 80.17 ± 0.48 | 18.7 | 2.3× |",
        "zerofl table3": "| 95 % | — | 85.17 ± 1.16 | 83.21 ± 1.88 | – | – | – | – | – | – | 43.7 | 1× |",
        "zerofl figure1": "| 95 % | 91.21 |",
        "flash table2": "|  |  | 0.05 | – | 91.66 ± 1.74 | 91.06 ± 1.10 | 95.70 ± 0.37 |",
        "flash table3": "| FEMNIST | non-IID | ZeroFL | 0.05 | 77.16 ± 2.07 | 1× | 17.7× |",
        "sparsefedpp figure1": "|  | 0.999 | – | 31.79 | 17.66 | 35.05 | 51.39 |",
    }.items(),
)
def test_a_line_of_each_table_is_that_of_the_paper(name: str, line: str) -> None:
    assert line in grid(paper_table(find_part(*name.split()), [], "md"))


@pytest.mark.parametrize("part", NUMBERED, ids=lambda part: part.label)
def test_every_printed_number_stands_in_its_table_once(part: PaperPart) -> None:
    cells = [cell for line in grid(paper_table(part, [], "md")) for cell in line.strip("| ").split(" | ")]
    numbers = [cell for cell in cells if re.fullmatch(r"\d\d\.\d\d( ± \d\.\d\d)?", cell)]
    assert sorted(numbers) == sorted(row.printed.partition(",")[0] for row in rows_of(part))


@pytest.mark.parametrize(
    ("printed", "std", "values", "verdict"),
    [
        (97.0, 0.3, (97.6,), "within"),  # .6 is twice .3: not beyond
        (97.0, 0.3, (97.61,), "above"),
        (97.0, 0.3, (96.39,), "below"),
        (97.0, 0.3, (97.5, 97.9, 98.3), "within"),  # .9 against twice the root of .09 + .16
        (97.0, 0.3, (97.7, 98.1, 98.5), "above"),  # 1.1 against 1
        (97.0, None, (98.0, 98.0, 98.3), "above"),  # theirs unknown: 1.1 against twice .17
        (97.0, None, (98.0,), "not judged"),
        (97.0, 0.3, (), ""),
    ],
)
def test_a_difference_counts_beyond_two_standard_deviations(
    printed: float, std: float | None, values: tuple[float, ...], verdict: str
) -> None:
    row = Published("flash_table2", 1, "flash.mnist", (), printed, std)
    assert Comparison(row, "" if values else "not run", values).verdict == verdict


def test_the_second_table_has_a_line_a_row_that_was_run() -> None:
    part = find_part("zerofl", "table1")
    row = rows_of(part)[2]
    sizes = {"paper_bytes_up": 10_342_400, "csr_bytes_up": 11_200_000, "upload_bytes": 5_600_000, "uploads": 10}
    sums = {"bytes_dense_up": 448e6, "bytes_up": 56e6, "bytes_dense_down": 448e6, "bytes_down": 112e6}
    records = [
        record(row, 76.5 + seed, seed, **sizes, **sums, density=0.1 + seed / 50, seconds=3600.0 + 120 * seed)
        for seed in range(2)
    ]
    *_, line = grid(paper_table(part, [result(row, records)], "md"))
    assert line.strip("| ").split(" | ") == [
        "zerofl_table1/3",
        "zerofl.cifar10_iid<br>sparsity=0.9<br>upload=top_weights<br>r_mask=0.0",
        "**77.00 ± 0.71**<br>*+0.48, within*",
        "10.3 MB<br>*4.3×*<br>*10.1 MB of 1,024,000 B*",
        "11.2 MB<br>*4.0×*",
        "5.60 MB",
        "8.0×",
        "4.0×",
        "10.1 MB<br>4.3× up",
        "11.0 %",
        "1 h 1 min",
        "2",
        "CPU 1",
        "012345678+",
    ]


def test_what_a_run_did_not_measure_is_a_dash() -> None:
    part = find_part("flash", "table2")
    row = rows_of(part)[0]
    bare = RunRecord(Path("x.json"), {"run": {}, "hardware": 3}, [], None, [], None)
    line = grid(paper_table(part, [RowResult(row, Comparison(row, "what it is"), (bare,), False)], "md"))[-1]
    assert line.strip("| ").split(" | ")[2:] == ["**–**<br>*what it is*", *"––––––––", "1", "–", "–"]


def test_a_figure_without_numbers_is_refused() -> None:
    with pytest.raises(InputError, match="flash figure2 prints no numbers: draw it"):
        paper_table(find_part("flash", "figure2"), [], "md")


class Tables(HTMLParser):
    """The tables of a fragment: of each the places that its cells cover, row by row, and all tags and texts."""

    def __init__(self, fragment: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tables: list[list[list[tuple[int, int]]]] = []
        self.feed(fragment)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        assert len(values) == len(attributes), "an attribute twice"
        self.tags.append(tag)
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append((int(values.get("rowspan") or 1), int(values.get("colspan") or 1)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def widths(rows: list[list[tuple[int, int]]]) -> set[int]:
    """Return how many places each row covers, with those that cells above it cover."""
    covered = [0] * (len(rows) + 20)
    for i, row in enumerate(rows):
        for down, across in row:
            for k in range(down):
                covered[i + k] += across
    assert not any(covered[len(rows) :]), "a cell reaches below the table"
    return {*covered[: len(rows)]}


@pytest.mark.parametrize("part", NUMBERED, ids=lambda part: part.label)
def test_the_cells_of_html_cover_every_place_once(part: PaperPart) -> None:
    row = rows_of(part)[-1]
    columns = len(grid(paper_table(part, [], "md"))[1].split("|")) - 2
    first, second = Tables(paper_table(part, [result(row, [record(row, 50.0)])], "html")).tables
    assert widths(first) == {columns}
    assert widths(second) == {14}


def test_hostile_results_stay_text_in_html() -> None:
    part, about = find_part("flash", "table4"), {"hardware": {"cpu": HOSTILE}, "commit": HOSTILE}
    plain, hostile = (Tables(paper_table(part, every_kind(part, own), "html")) for own in (None, about))
    assert plain.tags == hostile.tags
    assert any("<script>x</script>" in text for text in hostile.texts)
    assert not any(not letter.isprintable() and letter != "\n" for text in hostile.texts for letter in text)


def test_hostile_results_stay_text_in_markdown() -> None:
    part, about = find_part("flash", "table4"), {"hardware": {"cpu": HOSTILE}, "commit": HOSTILE}
    plain, hostile = (grid(paper_table(part, every_kind(part, own), "md")) for own in (None, about))
    assert [line.count("|") for line in plain] == [line.count("|") for line in hostile]
    text = "\n".join(hostile)
    assert not re.search(r"<(?!br>|sup>|/sup>)|`|\]\(|//d|\*b\*", text.replace("<br>**", "").replace("<br>*", ""))


def latex_rows(text: str) -> list[list[str]]:
    """Return the cells of every row of the tabulars of a document."""
    bodies = re.findall(r"\\begin\{tabular\}\{l+\}\n(.*?)\\end\{tabular\}", text, re.S)
    lines = [line for body in bodies for line in body.splitlines() if line.endswith(r" \\")]
    return [re.split(r"(?<!\\)&", line.removesuffix(r" \\")) for line in lines]


@pytest.mark.parametrize("hostile", [False, True])
def test_latex_is_balanced_and_uses_known_commands_alone(hostile: bool) -> None:
    part = find_part("flash", "table4")
    about = {"hardware": {"cpu": HOSTILE}, "commit": HOSTILE} if hostile else None
    text = paper_table(part, every_kind(part, about), "tex", {"flash_table4/1": HOSTILE if hostile else "A cause."})
    assert text.isascii()
    environments = re.findall(r"\\(begin|end)\{(\w+\*?)\}", text)
    inner = [("begin", "adjustbox"), ("begin", "tabular"), ("end", "tabular"), ("end", "adjustbox")]
    assert environments == [("begin", "table*"), *inner, ("end", "table*")] * 2
    bare = re.sub(r"\\[&%$#_{}]", "", text)
    for line in bare.splitlines()[1:]:
        assert line.count("{") == line.count("}"), line
        assert line.count("$") % 2 == 0, line
        assert not re.search(r"[%#~]", line), line
        outside = re.sub(r"\$[^$]*\$", "", line)
        assert not re.search(r"[_^<>|\"]", outside), line
    known = {"begin", "end", "centering", "scriptsize", "setlength", "tabcolsep", "caption", "toprule", "midrule"}
    known |= {"bottomrule", "cmidrule", "multirow", "multicolumn", "shortstack", "textbf", "textit", "par", "smallskip"}
    known |= {"parbox", "linewidth", "pm", "times", "alpha", "uparrow", "downarrow", "dagger", "textendash", "dots"}
    known |= {
        "textwidth",
        "textbackslash",
        "textasciitilde",
        "textasciicircum",
        "textbar",
        "textless",
        "textgreater",
        "usepackage",
    }
    assert {*re.findall(r"\\([a-z]+)", text)} <= known | {"textasciigrave", "textemdash"}


@pytest.mark.parametrize("part", NUMBERED, ids=lambda part: part.label)
def test_every_row_of_latex_has_all_columns(part: PaperPart) -> None:
    row = rows_of(part)[-1]
    text = paper_table(part, [result(row, [record(row, 50.0)])], "tex")
    first, second = text.split(r"\end{table*}")[:2]
    columns = len(grid(paper_table(part, [], "md"))[1].split("|")) - 2
    for document, many in ((first, columns), (second, 14)):
        spans = [
            [int((re.search(r"multicolumn\{(\d+)\}", c) or ["", 1])[1]) for c in row] for row in latex_rows(document)
        ]
        assert {sum(row) for row in spans} == {many}
        assert f"\\begin{{tabular}}{{{'l' * many}}}" in document


def test_a_table_of_many_runs_is_parted_into_pages_of_latex() -> None:
    part = find_part("flash", "table2")
    rows = rows_of(part)
    text = paper_table(part, [result(row, [record(row, 90.0)]) for row in rows], "tex")
    first, *runs = text.split(r"\begin{table*}")[1:]
    assert first.count("(n = 1)") == len(rows) == 49
    assert len(runs) > 1
    assert [name.replace(r"\_", "_") for page in runs for name in re.findall(r"^flash\S+", page, re.M)] == [
        row.name for row in rows
    ]
    heights = [sum(1 + max(cell.count(r"\\ ") for cell in row) for row in latex_rows(page)[2:]) for page in runs]
    assert max(heights) <= 60
    assert min(heights[:-1]) > 55  # no row has more than five lines
    assert [page.count("continued") for page in runs] == [0] + [1] * (len(runs) - 1)
    assert [page.count("One upload:") for page in runs] == [0] * (len(runs) - 1) + [1]
