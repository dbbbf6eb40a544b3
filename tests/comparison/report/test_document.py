"""Tables of the report's page: no sentence makes them wider than the page."""

from pathlib import Path

from foundry_ext.comparison.report.document import ReportDocument, Table, format_html


def test_sentences_break_lines_and_intervals_do_not(tmp_path: Path):
    sentence = "it would need at least 3 seeds of each method, and more items <b>"
    row = ["full", "0.620 [0.559, 0.689]", sentence]
    page = format_html(ReportDocument("t", [Table(["", "a", "b"], [row], "c")]), tmp_path)
    assert "<td>0.620 [0.559,\u00a00.689]</td>" in page
    assert f'<td class="sentence">{sentence.replace("<b>", "&lt;b&gt;")}</td>' in page
    assert "figure td { white-space: normal; }" in page
