"""The report: all of it is there, in one page that needs nothing else and takes no name for markup."""

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from fake_run import EVIL, make_row, write_config, write_job, write_run

from anomalib_mvfa.compare import report as module
from anomalib_mvfa.compare.report import report

RESAMPLES = 20


class Page(HTMLParser):
    """Elements by tag, with their attributes, and the page's text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.cells, self._quiet = [], "", [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._quiet = tag in ("style", "title")
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        self._quiet = False

    def handle_data(self, data):
        if not self._quiet:
            self.text += data
            if self.cells:
                self.cells[-1] += data

    def every(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, paper="table1", group_by=r"patient\d+")
    report(folder, RESAMPLES)
    return folder


@pytest.fixture(scope="module")
def html(run):
    return (run / "report" / "index.html").read_text()


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def one_job(folder, **others):
    write_config(folder, ["A"], k_shots=[4], seeds=[0])
    write_job(folder, make_row("A", "few_shot", "Brain", 4, 0, image=0.9, **others))


def test_the_page_refers_to_nothing_outside(html, page):
    assert not re.search(r"https?:|url\((?!#)|@import|src=\"(?!data:)", html)
    assert not page.every("script")
    links = {entry["href"] for tag in ("a", "link") for entry in page.every(tag)}
    assert {link for link in links if not link.startswith("#")} == {
        "data:,",
        "results.csv",
        "results.md",
        "../config.yaml",
    }
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    inside = {link[1:] for link in links if link.startswith("#")}
    inside |= {use["href"][1:] for use in page.every("use")} | set(re.findall(r"url\(#([^)]*)\)", html))
    assert inside <= {*identifiers}


def test_names_are_text(run, html, page):
    assert "<script" not in html
    assert EVIL in page.text.replace("\u200b", "")
    assert "<b>" not in html
    markdown = (run / "report" / "results.md").read_text()
    assert "<script" not in markdown
    assert "R&amp;D &lt;script&gt;" in markdown


def test_failed_jobs_are_listed_with_their_error(run, page):
    assert "OutOfMemoryError: <b>no</b> memory" in page.text
    assert re.search(r"27 finished,\s*1 failed", " ".join(page.text.split()))
    assert "MVFA, Chest, K = 4, seed 1: OutOfMemoryError" in (run / "report" / "results.md").read_text()


def test_random_weights_are_marked_and_without_the_papers_figures(run, page):
    assert "8 of 27 jobs (marked †)" in page.text
    _, _, table = (
        (run / "report" / "results.md").read_text().partition("## Image AUROC (AC, anomaly classification), K = 4")
    )
    rows = {line.split(" | ")[1]: line for line in table.partition("## ")[0].splitlines() if line.startswith("| F")}
    assert "WinCLIP †" in rows
    assert "(" not in rows["WinCLIP †"]
    assert "(92.44)" in rows["MVFA"]
    assert "(91.55)" in rows["PatchCore"]


def test_figures_in_the_tables_are_means_in_percent(run, page):
    table = pd.read_csv(run / "report" / "results.csv")
    of_mvfa = table[(table.method == "MVFA") & (table.k_shot == 4) & (table.category == "Brain")]
    for metric in ("image_AUROC", "pixel_AUROC"):
        values = 100 * of_mvfa[f"metrics.{metric}"]
        mean, spread = f"{values.mean():.2f}", f"±\xa0{values.std():.2f}"
        assert any(mean in cell and spread in cell for cell in page.cells)


def test_the_csv_has_a_line_a_job(run):
    table = pd.read_csv(run / "report" / "results.csv")
    assert len(table) == 28
    assert table.error.notna().sum() == 1
    assert {"k_shot", "metrics.image_AUROC", "images.test", "seconds.fit", "versions.torch"} <= {*table.columns}


def test_pictures_have_texts_and_tables_have_scopes(page):
    images = page.every("img")
    assert all(image["alt"] and image["src"].startswith("data:image/jpeg;base64,") for image in images)
    # Brain has ground truth: 3 images, 4 methods; levels of MVFA on the one abnormal image, 2 and all.
    assert len(images) == 3 * (2 + 4) + (2 + 3) + 3 * (1 + 4) + (1 + 3)
    assert all(header.get("scope") in ("row", "col", "rowgroup") for header in page.every("th"))


def test_charts_and_features_are_drawn_in_the_pages_colours(html, page):
    labels = [entry["aria-label"] for entry in page.every("div") if entry.get("role") == "img"]
    assert sum("against K" in label for label in labels) == 3  # image AUROC of two categories, pixel AUROC of one
    assert sum("t-SNE" in label for label in labels) == 4
    drawings = re.findall(r"<svg viewBox.*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) >= 7
    assert all(set(re.findall(r"#[0-9a-f]{6}\b", drawing)) <= {"#000000"} for drawing in drawings)
    assert any("currentColor" in drawing for drawing in drawings)


def test_the_same_run_gives_the_same_three_files(run, html):
    assert report(run, RESAMPLES).read_text() == html
    assert sorted(path.name for path in (run / "report").iterdir()) == ["index.html", "results.csv", "results.md"]


def test_a_single_job_is_a_report(tmp_path):
    one_job(tmp_path)
    page = Page(report(tmp_path).read_text())
    assert "90.00" in page.text
    for absent in ("AUROC against K", "±", "(best)", "Features before", "Failed and missing"):
        assert absent not in page.text
    assert not page.every("img")


def test_what_was_not_run_is_said(tmp_path):
    write_config(tmp_path, ["A"])
    write_job(tmp_path, make_row("A", "few_shot", "Brain", 4, 0, image=0.9))
    text = " ".join(Page(report(tmp_path).read_text()).text.split())
    assert "3 not yet run" in text
    assert "A, Brain, K = 2, seeds 0, 1" in text.replace("\xa0", " ")
    assert "1 of 2 seeds" in text


def test_other_test_images_are_said_and_not_ranked(tmp_path):
    write_config(tmp_path, ["A", "B"], k_shots=[4], seeds=[0])
    for method, digest in (("A", "one"), ("B", "two")):
        write_job(tmp_path, make_row(method, "few_shot", "Brain", 4, 0, image=0.9, test_set=digest))
    text = Page(report(tmp_path).read_text()).text
    assert "Not all jobs on Brain were tested on the same images" in text
    assert "(best)" not in text


def test_a_method_without_a_map_of_an_image_leaves_its_place_empty(tmp_path):
    write_run(tmp_path)
    folder = next(tmp_path.glob("jobs/MVFA-Brain-k4-s0"))
    with np.load(folder / "pictures.npz") as saved:
        arrays = dict(saved)
    arrays["paths"][0] = "another.png"
    np.savez(folder / "pictures.npz", **arrays)
    for path in tmp_path.glob("jobs/*/features.npz"):
        path.unlink()
    assert report(tmp_path, RESAMPLES).read_text().count('class="none"') == 1


def test_a_report_that_fails_leaves_the_last_one(tmp_path, monkeypatch):
    one_job(tmp_path)
    page = report(tmp_path)
    before = page.read_text()

    def fail(*arguments):
        msg = "no more"
        raise RuntimeError(msg)

    monkeypatch.setattr(module, "render", fail)
    with pytest.raises(RuntimeError, match="no more"):
        report(tmp_path)
    assert page.read_text() == before


@pytest.mark.parametrize(
    ("config", "resamples", "message"),
    [({"paper": "table9"}, 1, "paper='table9'"), ({}, 0, "resamples=0 must be at least 1")],
)
def test_mistakes_are_clear_errors(tmp_path, config, resamples, message):
    one_job(tmp_path)
    write_config(tmp_path, ["A"], **config)
    with pytest.raises(ValueError, match=message):
        report(tmp_path, resamples)
