"""Reports: their numbers, and the forms in which they are shown."""

from __future__ import annotations

import builtins
import json
import math
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lossgrad import (
    MSE,
    Accumulation,
    BatchError,
    BatchResult,
    EvaluationReport,
    Huber,
    InvalidRequest,
    SmoothL1,
    Throughput,
)
from lossgrad.accumulation import summary_of
from lossgrad_api.exact_sums import ExactSum
from lossgrad_api.loss_totals import LossTotal

LOSSES = (SmoothL1(beta=0.5), MSE(reduction="sum"))


def total(*losses: float, weights: float | None = None) -> LossTotal:
    """Return the total of a few losses, whose weights add up to `weights`."""
    return LossTotal(
        ExactSum(losses),
        ExactSum([float(len(losses)) if weights is None else weights]),
        len(losses),
        sum(not math.isfinite(loss) for loss in losses),
        min((loss for loss in losses if not math.isnan(loss)), default=math.inf),
        max((loss for loss in losses if not math.isnan(loss)), default=-math.inf),
    )


GROUPS = {
    "cat": (total(1.0, 2.0), total(10.0, 20.0)),
    "<b>dog</b>": (total(3.0, weights=0.5), total(30.0, weights=0.5)),
    "": (total(math.nan), total(math.inf)),
}


def report_of(groups: Any = GROUPS, losses: Any = LOSSES, **more: Any) -> EvaluationReport:
    count = sum(each[0].element_count for each in groups.values())
    return EvaluationReport(Accumulation.of_groups(losses, groups, element_count=count), **more)


REPORT = report_of(
    batches=tuple(
        BatchResult(
            index, "cat", tuple(summary_of(loss, each) for loss, each in zip(LOSSES, GROUPS["cat"], strict=True))
        )
        for index in range(3)
    ),
    errors=(BatchError(7, InvalidRequest("x < y & z", reason="SHAPE_MISMATCH", field="target.shape")),),
    throughput=Throughput(2.0, 3, 4, 3_000_000, 6 << 20),
)


def test_a_summary_is_what_its_total_says() -> None:
    cat, dog = REPORT.groups["cat"], REPORT.groups["<b>dog</b>"]
    assert (cat[0].mean, cat[0].sum, cat[0].min, cat[0].max, cat[0].element_count) == (1.5, 3.0, 1.0, 2.0, 2)
    assert (dog[0].mean, dog[0].weight_sum, dog[0].value) == (6.0, 0.5, 6.0)
    assert dog[1].value == dog[1].sum == 30.0
    assert math.isnan(REPORT[0].mean)
    assert REPORT[0].nonfinite_count == 1
    assert REPORT[1].sum == math.inf
    assert len(REPORT) == 2
    assert [summary.loss for summary in REPORT] == list(LOSSES)


def test_a_denominator_divides_the_whole_and_its_groups() -> None:
    report = report_of({"a": (total(1.0),), "b": (total(3.0, 5.0),)}, [Huber(denominator=2.0)])
    assert report[0].mean == 4.5
    assert [each[0].mean for each in report.groups.values()] == [0.5, 4.0]


def test_there_are_no_groups_where_none_were_named() -> None:
    assert report_of({"": GROUPS["cat"]}).groups == {}
    assert report_of({}).groups == {}
    assert list(REPORT.groups) == ["", "<b>dog</b>", "cat"]


def test_nothing_at_all_is_a_report_too() -> None:
    empty = report_of({})
    assert math.isnan(empty[0].mean)
    assert (empty[0].sum, empty[0].element_count, empty[0].min) == (0.0, 0, math.inf)
    assert "nan" in repr(empty)
    assert empty._repr_html_()


def test_the_dictionary_has_everything_and_the_json_is_json() -> None:
    plain = REPORT.to_dict()
    assert plain["losses"][0]["name"] == "smooth_l1"
    assert plain["losses"][0]["beta"] == 0.5
    assert plain["groups"]["cat"][1]["sum"] == 30.0
    assert [batch["index"] for batch in plain["batches"]] == [0, 1, 2]
    assert plain["errors"] == [
        {
            "index": 7,
            "error": "InvalidRequest",
            "reason": "SHAPE_MISMATCH",
            "field": "target.shape",
            "message": "x < y & z",
        }
    ]
    assert plain["throughput"]["elements_per_second"] == 1_500_000.0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads(REPORT.to_json(), parse_constant=refuse)
    assert read["losses"][0]["mean"] == "NaN"
    assert read["losses"][1]["sum"] == "Infinity"
    assert read["groups"][""][0]["min"] == "Infinity"
    assert read["groups"]["cat"] == plain["groups"]["cat"]


def test_the_text_is_a_table_that_leaves_out_what_is_too_much() -> None:
    lines = repr(REPORT).splitlines()
    assert lines[0].startswith(
        "EvaluationReport: 3 groups, 3 batches, 1 failed and left out, 3,000,000 elements in 2 s, 1.5 M"
    )
    assert lines[1].split() == ["loss", "group", "mean", "sum", "elements", "min", "max", "non-finite"]
    assert lines[2].split() == ["SmoothL1(beta=0.5)", "all", "nan", "nan", "4", "1", "3", "1"]
    assert [line.split()[0] for line in lines[3:6]] == ["(none)", "<b>dog</b>", "cat"]
    many = report_of({f"g{number:03}": GROUPS["cat"] for number in range(500)})
    assert len(repr(many).splitlines()) == 2 + 2 * 11 + 1
    assert repr(many).endswith("and 490 more groups: report.groups, report.to_pandas()")
    assert "group" not in repr(report_of({"": GROUPS["cat"]})).splitlines()[1]


def test_the_html_escapes_what_callers_named() -> None:
    html = REPORT._repr_html_()
    assert "&lt;b&gt;dog&lt;/b&gt;" in html
    assert "<b>dog" not in html
    assert "x &lt; y &amp; z" in html
    assert html.count("<tr") == html.count("</tr>") == 1 + 2 * 4 + 1
    assert "<script" not in html


def test_pandas_gets_a_row_for_each_loss_of_each_group() -> None:
    frame = REPORT.to_pandas()
    assert len(frame) == 2 * 4
    assert frame["group"].isna().sum() == 2
    assert frame.loc[(frame["group"] == "cat") & (frame["name"] == "mse"), "sum"].tolist() == [30.0]
    batches = REPORT.to_pandas("batches")
    assert batches["batch"].tolist() == [0, 0, 1, 1, 2, 2]
    assert isinstance(batches, pd.DataFrame)
    with pytest.raises(ValueError, match="what is 'rows'"):
        REPORT.to_pandas("rows")


@pytest.mark.parametrize(
    "report",
    [
        REPORT,
        report_of({"": GROUPS["cat"]}),
        report_of({}),
        report_of({f"a long name {n} of a group": (total(float(n)), total(1.0)) for n in range(40)}),
    ],
)
def test_every_report_can_be_drawn(report: EvaluationReport, tmp_path: Path) -> None:
    figure = report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    columns = max(1, bool(report.groups) + bool(report.batches))
    assert len(figure.axes) == 2 * columns
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[0].startswith("smooth_l1(beta=0.5), mean")
    assert titles[columns].startswith("mse, sum")


def test_the_largest_groups_are_drawn_largest_first() -> None:
    report = report_of({str(n): (total(float(n)), total(1.0)) for n in range(40)})
    labels = [text.get_text() for text in report.plot().axes[0].get_yticklabels()]
    assert labels == [str(number) for number in range(24, 40)]


@pytest.mark.parametrize(("call", "package"), [("to_pandas", "pandas"), ("plot", "matplotlib")])
def test_what_is_not_installed_is_named(call: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **options)

    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {package}"):
        getattr(REPORT, call)()
