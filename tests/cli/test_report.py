"""The report: self-contained, nothing lost, text escaped."""

from __future__ import annotations

import json
import math
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


def test_what_a_row_costs_elsewhere_is_in_a_table_of_its_own(page):
    table = page[page.index("What it does beside that") :]
    assert "<th>python &lt;3&gt;: perplexity (6,789 tokens)</th>" in table
    rows = dict(re.findall(r"<tr[^>]*><td>([^<]*)</td>(.*?)</tr>", table))
    base, joint = math.exp(3 - 0.44), math.exp(3 - 0.362)
    assert rows["base"] == f"<td>1.00</td><td>0.00</td><td>{base:.2f}</td>"
    change = f"{joint:.2f} ({100 * (joint / base - 1):+.1f} %)"
    assert rows["joint"] == f"<td>{math.exp(0.78):.2f}</td><td>0.78</td><td>{change}</td>"


def test_the_datastore_is_set_against_the_weights_of_what_was_trained(page):
    rows = dict(re.findall(r"<tr[^>]*><td>([^<]*)</td>(.*?)</tr>", page.split("beside that")[0]))
    ratio = f"<td>{24_490_368 / (2 * 1_377_408):.2f}</td>"
    for name in ("memory", "joint", "joint, adaptive lmbda", "fine-tuned &lt;base&gt;"):
        assert ratio in rows[name]
    assert ratio not in rows["base"]
    assert ratio not in rows["kNN-LM"]


def test_the_pictures_are_there_in_the_text_colour(page):
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 3
    labels = ("perplexity", "perplexity over that of base", "train split")
    for drawing, label in zip(drawings, labels, strict=True):
        assert label in drawing
        assert "currentColor" in drawing
        assert "#010203" not in drawing


def test_a_build_adds_its_training_and_its_seconds(evaluation, tmp_path):
    curve = [
        {"epoch": epoch, "nll": nll, "joint_nll": joint, "score": joint}
        for epoch, nll, joint in [(0.0, 8.0, 4.0), (1.0, 5.0, 3.0), (2.0, 4.0, 3.1)]
    ]
    seconds = {"adapt": 100.0, "datastore": 20.0, "targets": 3.0, "train": 4321.5}
    for name, value in seconds.items():
        with stage(tmp_path / name, name, {}, {}) as writer:
            writer.write("curve.json", lambda file: file.write(json.dumps(curve).encode()))
            writer.finish({"seconds": value})
    write_report(evaluation, tmp_path / "page.html", build=tmp_path)
    page = (tmp_path / "page.html").read_text()
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 4
    assert "perplexity on validation" in drawings[2]
    rows = dict(re.findall(r"<tr[^>]*><td>([^<]*)</td>(.*?)</tr>", page.split("beside that")[0]))
    for name in ("memory", "joint", "joint, adaptive lmbda"):
        assert "<td>4,321.5</td><td>123.0</td>" in rows[name]
    assert "<td></td><td>120.0</td>" in rows["kNN-LM"]
    assert "<td></td><td></td>" in rows["base"]
    with pytest.raises(MemdecError, match=r"expected a directory of train"):
        write_report(evaluation, tmp_path / "page.html", build=evaluation)


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
    assert len(drawings) == 3
    assert not any("kNN" in drawing for drawing in drawings)
    assert "Prompts" not in path.read_text()


def test_without_a_text_outside_the_domain(tmp_path):
    found = results()
    for row in found["rows"]:
        row["outside"] = {}
    path = tmp_path / "report.html"
    write_report(write_evaluation(tmp_path / "eval", **{**found, "outside": {}}), path)
    assert len(re.findall(r"<svg", path.read_text())) == 2
    assert "outside the domain" not in path.read_text().lower()


def test_an_infinite_gain_is_shown(tmp_path):
    found = results()
    found["rows"][2]["tail_gain"] = None
    path = tmp_path / "report.html"
    write_report(write_evaluation(tmp_path / "eval", **found), path)
    assert "<td>memory</td><td>\N{INFINITY}</td>" in path.read_text()


def test_an_infinite_perplexity_outside_is_shown_and_not_drawn(tmp_path):
    found = results()
    for row in found["rows"]:
        row["outside"]["python <3>"] |= {"nll": None, "perplexity": None}
    found["curves"]["joint"]["outside-python <3>"] = [None, 800.0, 2.7, 3.0, 5.0]
    path = tmp_path / "report.html"
    write_report(write_evaluation(tmp_path / "eval", **found), path)
    assert path.read_text().count("<td>\N{INFINITY}</td></tr>") == len(found["rows"])


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


@pytest.mark.parametrize("name", ["base", "joint, adaptive lmbda"])
def test_a_row_that_gives_a_token_no_probability_is_drawn_as_far_as_it_goes(tmp_path, name):
    found = results()
    (row,) = (row for row in found["rows"] if row["name"] == name)
    for one in (row, *row["outside"].values()):
        one["nll"] = one["perplexity"] = None
    if name == "base":  # which is the mixture at a lmbda of 0
        for curve in found["curves"]["joint"].values():
            curve[0] = None
    path = tmp_path / "report.html"
    write_report(write_evaluation(tmp_path / "eval", **found), path)
    page = path.read_text()
    assert "<td>\u221e</td>" in page
    assert len(re.findall(r"<svg", page)) == 3
