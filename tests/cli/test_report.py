"""The report: self-contained, nothing lost, text escaped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fake_evaluation import results, write_evaluation

from memdec.data.artefact import stage
from memdec.errors import MemdecError
from memdec.report import Continuation, write_report

PROMPT = Continuation("The <yield>", "original text", "base text", "joint text")


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> Path:
    return write_evaluation(tmp_path_factory.mktemp("report") / "eval")


@pytest.fixture(scope="module")
def page(evaluation) -> str:
    path = evaluation.parent / "report.html"
    write_report(evaluation, path, [PROMPT], title="A & B")
    return path.read_text()


def test_nothing_is_loaded_from_elsewhere(page):
    # The namespaces of SVG look like addresses, but nothing loads them.
    assert not re.search(r"<(script|link|img|iframe)|@import|src=|url\((?!#)", page)


def test_the_table_has_every_row(page):
    for row in results()["rows"]:
        assert f"<td>{row['perplexity']:.2f}</td>" in page
    assert "fine-tuned &lt;base&gt;" in page
    assert "<td>2.5</td>" in page  # joint's seconds, from timing.json


def test_both_pictures_are_there_in_the_text_colour(page):
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 2
    for drawing, label in zip(drawings, ("lmbda", "train split"), strict=True):
        assert label in drawing
        assert "currentColor" in drawing
        assert "#010203" not in drawing


def test_the_training_is_drawn_where_it_is_given(evaluation, tmp_path):
    curve = [
        {"epoch": epoch, "nll": nll, "joint_nll": joint, "score": joint}
        for epoch, nll, joint in [(0.0, 8.0, 4.0), (1.0, 5.0, 3.0), (2.0, 4.0, 3.1)]
    ]
    with stage(tmp_path / "train", "train", {}, {}) as writer:
        writer.write("curve.json", lambda file: file.write(json.dumps(curve).encode()))
        writer.finish()
    write_report(evaluation, tmp_path / "page.html", training=tmp_path / "train")
    page = (tmp_path / "page.html").read_text()
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 3
    assert "perplexity on validation" in drawings[1]
    with pytest.raises(MemdecError, match=r"expected a directory of train"):
        write_report(evaluation, tmp_path / "page.html", training=evaluation)


def test_a_bucket_without_positions_is_left_out(page):
    assert "(820)" in page
    assert "(0)" not in page


def test_the_passage_keeps_its_text_and_colours_gains(page):
    passage = re.search(r'<p class="passage">(.*?)</p>', page, flags=re.DOTALL)[1]
    text = re.sub(r"<[^>]*>", "", passage)
    assert text == "The &lt;b&gt;yield expression↵\nis \u201cused\u201d"
    colours = re.findall(r"background:rgba\((\d+),\d+,\d+,([\d.]+)\)", passage)
    assert len(colours) == 6
    gained, lost, same = colours[2], colours[4], colours[5]
    assert (gained[0], lost[0]) == ("0", "213")
    assert float(gained[1]) > float(lost[1]) > float(same[1]) == 0
    underlined = [index for index, span in enumerate(passage.split("<span ")[1:]) if "less" in span]
    assert underlined == [0, 4]  # a colour is not the only sign of a loss
    assert "base 0.01 %\nmemory 60 %\njoint 30 %" in passage


def test_prompts_are_shown_escaped(page):
    assert "The &lt;yield&gt;" in page
    for text in ("original text", "base text", "joint text"):
        assert text in page


def test_without_knn_and_without_prompts(tmp_path):
    found = results()
    found["rows"] = [row for row in found["rows"] if row["name"] != "kNN-LM"]
    del found["curves"]["kNN-LM"], found["lmbda"]["kNN-LM"]
    for bucket in found["frequency"]:
        del bucket["nll"]["kNN-LM"]
    path = tmp_path / "report.html"
    write_report(write_evaluation(tmp_path / "eval", **found), path)
    # The passage's own file still has the kNN-LM; the pictures must not.
    drawings = re.findall(r"<svg.*?</svg>", path.read_text(), flags=re.DOTALL)
    assert len(drawings) == 2
    assert not any("kNN" in drawing for drawing in drawings)
    assert "Prompts" not in path.read_text()


def test_a_report_on_validation(tmp_path):
    found = results()
    found["split"] = "validation"
    del found["curves"]["joint"]["test"], found["curves"]["kNN-LM"]["test"]
    write_report(write_evaluation(tmp_path / "eval", **found), tmp_path / "report.html")


def test_the_same_files_give_the_same_page(evaluation, tmp_path, page):
    write_report(evaluation, tmp_path / "again.html", [PROMPT], title="A & B")
    assert (tmp_path / "again.html").read_text() == page


def test_a_directory_that_is_no_evaluation(tmp_path):
    with pytest.raises(MemdecError, match=r"expected a directory of eval"):
        write_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
