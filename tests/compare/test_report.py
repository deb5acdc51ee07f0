"""The report: all of it is there, in one page that needs nothing else and takes no name for markup."""

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from fake_run import EVIL, drawn_scores, make_result, write_config, write_job, write_run
from sklearn.metrics import roc_auc_score

from anomalib_mvfa.compare import report as module
from anomalib_mvfa.compare.report import report

RESAMPLES = 20
FILES = ["index.html", "results.csv", "results.md", "results.tex", "scores.csv"]


class Page(HTMLParser):
    """Elements by tag, with their attributes, and the page's text."""

    def __init__(self, path):
        super().__init__()
        self.html = path.read_text()
        self.elements, self.text, self.cells, self._quiet = [], "", [], False
        self.feed(self.html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._quiet = tag in ("style", "title")
        if tag in ("td", "th", "li"):
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

    def plain(self):
        return " ".join(self.text.split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, paper="table1", group_by=r"patient\d+")
    report(folder, RESAMPLES)
    return folder


@pytest.fixture(scope="module")
def page(run):
    return Page(run / "report" / "index.html")


def write_jobs(folder, *jobs, **config):
    """Write finished jobs with drawn scores, given as what differs from method A, seed 0; return the page."""
    write_config(folder, [job.get("method", "A") for job in jobs], ["Brain"], **{"seeds": [0], **config})
    for index, job in enumerate(jobs):
        default = {"method": "A", "protocol": "few_shot", "category": "Brain", "k_shot": 4, "seed": 0, "image": 0.9}
        write_job(folder, make_result(**default | job), drawn_scores(np.random.default_rng(index)))
    return Page(report(folder, RESAMPLES))


def test_the_page_refers_to_nothing_outside(page):
    assert not re.search(r"https?:|url\(|@import|src=\"(?!data:)", page.html)
    assert not page.every("script")
    links = {entry["href"] for tag in ("a", "link") for entry in page.every(tag)}
    outside = {link for link in links if not link.startswith("#")}
    assert outside == {"data:,", "../config.yaml", *FILES[1:]}
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    assert {link[1:] for link in links - outside} <= {*identifiers}


def test_names_are_text(run, page):
    for name in ("index.html", "results.md"):
        text = (run / "report" / name).read_text()
        assert "<script" not in text
        assert "<b>" not in text
    assert EVIL in page.text


def test_verdicts_come_first_and_say_how_sure(page):
    headings = [page.html.index(f'id="{name}"') for name in ("verdicts", "tables", "shots", "pictures", "statistics")]
    assert headings == sorted(headings)
    assert any(re.search(r"MVFA.*points \[.*\]", cell) for cell in page.cells)
    assert any("WinCLIP" in cell and "random weights" in cell for cell in page.cells)


def test_failed_jobs_are_listed_with_their_error(page):
    assert any("MVFA, Chest" in cell and "OutOfMemoryError: <b>no</b> memory" in cell for cell in page.cells)
    assert "27 finished, 1 failed" in page.plain()


def test_random_weights_are_marked_and_without_the_papers_figures(page):
    assert "8 of 27 jobs (marked †)" in page.plain()
    assert page.text.count("paper 92.44") == 1  # of MVFA with K = 4
    assert page.text.count("paper 91.55") == 2  # of PatchCore, in the tables of both K
    assert "paper 66.85" not in page.text  # of WinCLIP


def test_figures_are_means_in_percent_that_the_scores_give(run, page):
    scores = pd.read_csv(run / "report" / "scores.csv")
    of_mvfa = scores[(scores.method == "MVFA") & (scores.k_shot == 4) & (scores.category == "Brain")]
    areas = [100 * roc_auc_score(part.label, part.score) for _, part in of_mvfa.groupby("seed")]
    mean, deviation = f"{np.mean(areas):.2f}", f"±\xa0{np.std(areas, ddof=1):.2f}"
    assert any(mean in cell and deviation in cell for cell in page.cells)


def test_settings_and_epochs_are_told(page):
    assert any("MVFA" in cell and "model.image_size: 240" in cell and "epochs: 50" in cell for cell in page.cells)


def test_pictures_have_texts_and_tables_have_scopes(page):
    images = page.every("img")
    assert all(image["alt"] and image["src"].startswith("data:image/jpeg;base64,") for image in images)
    # Brain has ground truth: 3 images, 4 methods, 2 blocks of MVFA.
    assert len(images) == 3 * (2 + 4 + 2) + 3 * (1 + 4 + 2)
    assert all(header.get("scope") in ("row", "col", "rowgroup") for header in page.every("th"))


def test_charts_and_features_are_drawn_in_the_pages_colours(page):
    labels = [entry["aria-label"] for entry in page.every("svg") if entry.get("role") == "img"]
    assert sum("against K" in label for label in labels) == 4  # image AUROC of two and of both, pixel AUROC of one
    assert sum("t-SNE" in label for label in labels) == 4
    drawings = re.findall(r"<svg.*?</svg>", page.html, flags=re.DOTALL)
    assert not any(re.search(r"#[0-9a-f]{3}|nan", drawing, re.IGNORECASE) for drawing in drawings)


def test_the_same_run_gives_the_same_files(run, page):
    assert report(run, RESAMPLES).read_text() == page.html
    assert sorted(path.name for path in (run / "report").iterdir()) == FILES


def test_a_single_job_is_a_report(tmp_path):
    page = write_jobs(tmp_path, {})
    assert "90.00" in page.text
    assert "There is one seed" in page.text
    for absent in ("AUROC against K", "±", "Features before", "The same command again", "None", "nan"):
        assert absent not in page.text
    assert not page.every("img")


def test_what_was_not_run_is_said(tmp_path):
    page = write_jobs(tmp_path, {}, k_shots=[2, 4], seeds=[0, 1])
    assert "3 missing, 1 finished" in page.plain()
    assert "A, Brain, K = 2, seeds 0, 1: missing" in page.plain()
    assert "1 of 2 seeds" in page.text


def test_other_test_images_are_not_compared(tmp_path):
    page = write_jobs(tmp_path, {"test_set": "one"}, {"method": "B", "test_set": "two"})
    assert any("test images" in cell and "A" in cell and "B" in cell for cell in page.cells)
    assert not page.html.count('class="forest"')


def test_epochs_chosen_on_test_images_are_said_to_be_optimistic(tmp_path):
    assert "optimistic" in write_jobs(tmp_path, {}, select_epoch_on_test=True).text


def test_a_method_without_a_map_of_an_image_leaves_its_place_empty(tmp_path):
    write_run(tmp_path)
    folder = tmp_path / "jobs" / "MVFA-Brain-k4-s0"
    with np.load(folder / "pictures.npz") as saved:
        arrays = dict(saved)
    arrays["paths"][0] = "another.png"
    np.savez(folder / "pictures.npz", **arrays)
    for path in tmp_path.glob("jobs/*/features.npz"):
        path.unlink()
    assert report(tmp_path, RESAMPLES).read_text().count('class="none"') == 3  # of MVFA and its blocks


def test_a_report_that_fails_leaves_the_last_one(tmp_path, monkeypatch):
    before = write_jobs(tmp_path, {}).html

    def fail(*arguments):
        msg = "no more"
        raise RuntimeError(msg)

    monkeypatch.setattr(module, "render", fail)
    with pytest.raises(RuntimeError, match="no more"):
        report(tmp_path)
    assert (tmp_path / "report" / "index.html").read_text() == before


def test_mistakes_are_clear_errors(tmp_path):
    with pytest.raises(ValueError, match="paper='table9'"):
        write_jobs(tmp_path, {}, paper="table9")
    with pytest.raises(ValueError, match="resamples=0 must be at least 1"):
        report(tmp_path, 0)


def test_costs_are_medians_to_three_digits():
    assert module.median(pd.Series([60, 90, None, 96]), 60) == "1.5"
    assert module.median(pd.Series([427_123_456]), 1e6) == "427"
    assert module.median(pd.Series([np.nan]), 60) == "\N{EN DASH}"
