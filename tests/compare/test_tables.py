"""Tables against figures worked out by hand, verdicts, what is left out, and names in each format."""

import csv
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_run import drawn_scores, make_result, write_config, write_job, write_run
from sklearn.metrics import f1_score, roc_auc_score

from anomalib_mvfa.compare.tables import cells, load, to_latex, to_markdown
from anomalib_mvfa.io import to_csv

NASTY = ["=1+1|a_b", "R&D 100 % #1", "-x* <b>`y`</b>"]


def cell(run, method="A", category="Brain", metric="image_AUROC", k_shot=4, resamples=20):
    table = cells(load(run), resamples)
    chosen = (table.method == method) & (table.category == category) & (table.metric == metric)
    return table[chosen & (table.k_shot.isna() | (table.k_shot == k_shot))].iloc[0]


def write_values(run, values, **config):
    """Write jobs by method, category and seed, with an image AUROC alone."""
    names = list(dict.fromkeys(name for name, *_ in values))
    write_config(run, names, **config)
    for (name, category, seed), value in values.items():
        write_job(run, make_result(name, "few_shot", category, 4, seed, image=value))


def write_scored(run, shifts, seeds=3, **config):
    """Write methods whose drawn scores separate normal and abnormal images by a shift, the same images for all."""
    write_config(run, list(shifts), ["Brain"], seeds=list(range(seeds)), **config)
    for place, (name, shift) in enumerate(shifts.items()):
        for seed in range(seeds):
            scores = drawn_scores(np.random.default_rng([place, seed]), 80, shift + 0.2 * seed * (name == "B"))
            metrics = {
                "image_AUROC": roc_auc_score(scores.label, scores.score),
                "image_F1Score": f1_score(scores.label, scores.predicted),
            }
            write_job(run, make_result(name, "few_shot", "Brain", 4, seed, metrics=metrics), scores)


def test_mean_spread_and_average_over_seeds(tmp_path):
    write_values(
        tmp_path, {("A", "Brain", 0): 0.7, ("A", "Brain", 1): 0.8, ("A", "Chest", 0): 0.5, ("A", "Chest", 1): 0.9}
    )
    brain, average = cell(tmp_path), cell(tmp_path, category="Average")
    assert (brain["mean"], brain.sd) == pytest.approx((0.75, 0.0707107))  # 0.1 / sqrt(2)
    assert (average["mean"], average.sd) == pytest.approx((0.725, 0.1767767))  # of 0.6 and 0.85
    assert (brain.seeds, brain.verdict, brain.sentence) == (2, "", "")


def test_mean_interval_and_difference_can_be_recomputed_from_the_file_of_images(tmp_path):
    """With NumPy and pandas alone, for two methods on the same seeds, of which one's differ much."""
    write_scored(tmp_path, {"A": 0.1, "B": 0.3}, reference="A")
    images = pd.read_csv(io.StringIO(to_csv(load(tmp_path).images)))
    rng = np.random.default_rng(1)
    draws = [np.arange(80), *(rng.integers(80, size=80) for _ in range(250))]

    def auroc(label, score):  # the share of pairs in the right order; no two scores are equal
        return (score[label == 1].to_numpy()[:, None] > score[label == 0].to_numpy()).mean()

    areas = {}
    for name, table in images.groupby("method"):
        wide = table.set_index(["image", "label", "seed"]).score.unstack().reset_index()  # noqa: PD010
        areas[name] = np.array([[auroc(wide.label[d], wide[seed][d]) for d in draws] for seed in range(3)])

    def variance_and_critical_value(metric):
        covariance = np.cov(metric[:, 1:])
        between, shared = metric[:, 0].var(ddof=1) / 3, covariance[~np.eye(3, dtype=bool)].mean()
        critical = (between * 4.3027 + shared * 1.9905) / (between + shared)  # t with 2 and 79 degrees of freedom
        return between + shared, critical

    found, other = cell(tmp_path, "B", resamples=1000), areas["B"] - areas["A"]
    variance, critical = variance_and_critical_value(other)
    assert found.difference == pytest.approx(other[:, 0].mean())
    assert (found.difference_high - found.difference_low) / 2 == pytest.approx(critical * variance**0.5, rel=0.08)
    variance, critical = variance_and_critical_value(areas["B"])
    assert found["mean"] == pytest.approx(areas["B"][:, 0].mean())
    for end in (found.low, found.high):  # Wilson's: where the distance is so many standard errors of the truth's
        error = np.sqrt(variance * end * (1 - end) / (found["mean"] * (1 - found["mean"])))
        assert abs(end - found["mean"]) == pytest.approx(critical * error, rel=0.08)


def test_f1_stands_beside_that_of_calling_everything_abnormal(tmp_path):
    write_scored(tmp_path, {"A": 0.4}, seeds=1)
    found = cell(tmp_path, metric="image_F1Score")
    assert found.trivial == f1_score([0, 1], [1, 1])
    assert found.low < found["mean"] < found.high
    assert np.isnan(cell(tmp_path).trivial)


def test_one_seed_of_one_method_is_an_interval_over_images_and_no_verdict(tmp_path):
    write_scored(tmp_path, {"A": 0.4}, seeds=1)
    found = cell(tmp_path)
    assert np.isnan(found.sd)
    assert found.low < found["mean"] < found.high
    assert (found.reference, found.verdict, found.seeds) == ("", "", 1)
    assert not cells(load(tmp_path), 20).sentence.any()


def test_intervals_follow_groups(tmp_path):
    write_scored(tmp_path, {"A": 0.4}, seeds=1)
    assert load(tmp_path).images.group.nunique() == 80
    write_config(tmp_path, ["A"], ["Brain"], seeds=[0], group_by=r"patient\d+")
    assert load(tmp_path).images.group.nunique() == 40
    assert cell(tmp_path).low > 0


def test_the_best_is_the_reference_and_all_pairs_count(tmp_path):
    write_scored(tmp_path, {"A": 0.1, "C": 2.0, "D": 0.8, "E": 0.8})
    table = cells(load(tmp_path), 200)
    rows = table[table.metric == "image_AUROC"].set_index("method")
    assert list(rows.reference) == ["C"] * 4
    assert list(rows.verdict[["A", "C"]]) == ["below", "reference"]
    assert (rows.difference[["A", "D", "E"]] < 0).all()
    write_config(tmp_path, [*"ACDE"], ["Brain"], seeds=[0, 1, 2], reference="C")
    named = cells(load(tmp_path), 200).query("metric == 'image_AUROC'").set_index("method")
    assert named.p["A"] < rows.p["A"] < 0.05  # adjusted for three comparisons rather than six
    assert rows.sentence["A"].startswith(f"A is below C by {-100 * rows.difference['A']:.1f} points [")


def test_a_named_reference_that_is_not_there_or_random_is_compared_with_nothing(tmp_path):
    write_values(tmp_path, {(name, "Brain", 0): 0.9 for name in "ABC"}, group_by="patient", reference="B", seeds=[0])
    assert cell(tmp_path).verdict == "not comparable"
    assert cell(tmp_path).sentence == "A is not comparable with B: there are too few test images."  # all of one patient
    write_job(tmp_path, make_result("B", "few_shot", "Brain", 4, 0, image=0.8, random_weights=True))
    assert "random weights" in cell(tmp_path).sentence
    (tmp_path / "jobs" / "B-Brain-k4-s0" / "result.json").unlink()
    assert "B has no figure here" in cell(tmp_path).sentence


def test_random_weights_are_compared_only_among_themselves(tmp_path):
    random = {"A": True, "B": False, "C": False}
    write_scored(tmp_path, {"A": 2, "B": 0.5, "C": 0.1}, seeds=1)

    def verdicts():
        for name, is_random in random.items():
            result = next(job for job in load(tmp_path).results if job.method == name)
            result.random_weights = is_random
            result.write(tmp_path / "jobs" / result.job)
        return [cell(tmp_path, name, resamples=100).verdict for name in random]

    assert verdicts()[:2] == ["not comparable", "reference"]
    random |= {"B": True, "C": True}
    assert verdicts()[0] == "reference"


def test_seeds_with_other_test_images_are_not_paired(tmp_path):
    write_scored(tmp_path, {"A": 0.9, "B": 0.1})
    for seed, digest in ((1, "other"), (2, "other")):
        result = next(job for job in load(tmp_path).results if (job.method, job.seed) == ("A", seed))
        result.test_set = digest
        result.write(tmp_path / "jobs" / result.job)
    assert "as there is one seed" in cell(tmp_path, "B").sentence
    for path in tmp_path.glob("jobs/A-*-s0/result.json"):
        path.write_text(path.read_text().replace("digest of Brain", "other"))
    assert "no seed has the same test images" in cell(tmp_path, "B").sentence


def test_a_method_with_seeds_missing_is_paired_on_the_others(tmp_path):
    write_scored(tmp_path, {"A": 0.9, "B": 0.1})
    (tmp_path / "jobs" / "B-Brain-k4-s1" / "result.json").unlink()
    found = cell(tmp_path, "B", resamples=100)
    assert found.seeds == 2
    assert load(tmp_path).progress == "5 finished, 1 missing"


def test_an_undefined_metric_is_not_averaged_and_said_to_be_undefined(tmp_path):
    write_config(tmp_path, ["A"], seeds=[0])
    for category, value in (("Brain", float("nan")), ("Chest", 0.5)):
        scores = drawn_scores(np.random.default_rng(0)).assign(label=1)
        write_job(tmp_path, make_result("A", "few_shot", category, 4, 0, image=value, pixel=0.9), scores)
    found = cell(tmp_path)
    assert np.isnan([found["mean"], found.low]).all()
    assert (found.seeds, found.sentence[:9]) == (0, "undefined")
    table = cells(load(tmp_path), 20)
    assert list(table.category) == ["Brain", "Chest", "Brain", "Chest", "Average"]  # of pixel AUROC alone
    assert "| n/a |" in to_markdown(load(tmp_path), table)


def test_an_average_needs_all_categories(tmp_path):
    write_values(tmp_path, {("A", "Brain", 0): 0.9, ("B", "Brain", 0): 0.8, ("B", "Chest", 0): 0.6}, seeds=[0])
    found = cell(tmp_path, "A", "Average")
    assert np.isnan(found["mean"])
    assert found.sentence == "not all categories"
    assert cell(tmp_path, "B", "Average")["mean"] == pytest.approx(0.7)


def test_methods_without_shots_are_in_the_table_of_every_k_and_order_is_by_protocol(tmp_path):
    write_config(tmp_path, {"M": "few_shot", "P": "full_normal", "W": "zero_shot"}, ["Brain"], k_shots=[2, 4])
    write_job(tmp_path, make_result("P", "full_normal", "Brain", None, 0, image=0.9))
    write_job(tmp_path, make_result("W", "zero_shot", "Brain", None, 0, image=0.6))
    for k_shot in (2, 4):
        write_job(tmp_path, make_result("M", "few_shot", "Brain", k_shot, 0, image=0.8 + k_shot / 100))
    table = cells(load(tmp_path), 20)
    assert list(table.method) == [*"PMW", *"PMW"]
    assert list(table.k_shot) == [2, 2, 2, 4, 4, 4]
    assert list(table["mean"]) == pytest.approx([0.9, 0.82, 0.6, 0.9, 0.84, 0.6])
    for path in tmp_path.glob("jobs/M*/result.json"):
        path.unlink()
    assert cells(load(tmp_path), 20).k_shot.isna().all()


def test_what_the_config_no_longer_asks_for_is_left_out(tmp_path):
    methods = {
        "A": "few_shot",
        "B": {"protocol": "few_shot", "categories": ["Brain"]},
        "C": {"protocol": "few_shot", "categories": ["Liver"]},
    }
    write_config(tmp_path, methods, ["Chest", "Brain"])
    for name, category, k_shot, seed in (
        ("A", "Brain", 4, 0),
        ("A", "Chest", 4, 1),
        ("B", "Brain", 4, 0),
        ("B", "Chest", 4, 0),
        ("gone", "Brain", 4, 0),
        ("A", "Liver", 4, 0),
        ("A", "Brain", 8, 0),
        ("A", "Brain", 4, 7),
    ):
        write_job(tmp_path, make_result(name, "few_shot", category, k_shot, seed, image=0.9))
    jobs = load(tmp_path).jobs.groupby("status").job.agg(set)
    assert jobs["finished"] == {"A-Brain-k4-s0", "B-Brain-k4-s0", "A-Chest-k4-s1"}
    assert jobs["missing"] == {"A-Chest-k4-s0", "A-Brain-k4-s1", "B-Brain-k4-s1"}


def test_the_paper_stands_beside_its_own_k_and_protocol_and_never_beside_random_weights(tmp_path):
    protocols = {"MVFA": "few_shot", "Patchcore": "full_normal", "WinCLIP": "few_normal", "DRA": "leave_one_out"}
    write_config(tmp_path, protocols, k_shots=[2, 4], paper="table1")
    for name, protocol in protocols.items():
        for category in ("Brain", "Chest"):
            for k_shot in (2, 4) if protocol.startswith("few") else (None,):
                random = {"random_weights": name == "WinCLIP"}
                write_job(tmp_path, make_result(name, protocol, category, k_shot, 0, image=0.9, **random))
    outcome = load(tmp_path)
    table = cells(outcome, 20)
    texts = [to_markdown(outcome, table), to_latex(outcome, table)]
    assert all("took the epoch that is best on the test set" in text for text in texts)
    figures = {key: list(rows.paper) for key, rows in table.groupby(["k_shot", "method"], observed=True)}
    assert figures[4, "MVFA"] == pytest.approx([0.9244, 0.8195, 0.871950])
    assert figures[4, "Patchcore"] == figures[2, "Patchcore"] == pytest.approx([0.9155, 0.7517, 0.8336])
    assert np.isnan([figures[2, "MVFA"], figures[4, "WinCLIP"], figures[4, "DRA"]]).all()  # DRA's has another protocol


def test_an_epoch_chosen_on_the_test_images_is_marked(tmp_path):
    write_values(tmp_path, {("A", "Brain", 0): 0.9}, select_epoch_on_test=True)
    assert "optimistic" in to_markdown(load(tmp_path), cells(load(tmp_path), 20))


def test_names_are_text_in_every_format(tmp_path):
    write_scored(tmp_path, dict.fromkeys(NASTY, 0.3), seeds=1)
    outcome = load(tmp_path)
    table = cells(outcome, 20)
    markdown, latex = to_markdown(outcome, table), to_latex(outcome, table)
    assert "| =1+1\\|a\\_b |" in markdown
    assert "-x\\* &lt;b&gt;\\`y\\`&lt;/b&gt;" in markdown
    assert r"=1+1|a\_b &" in latex
    assert r"R\&D 100 \% \#1 &" in latex
    assert latex.count(r"\toprule") == 2
    read = list(csv.DictReader(io.StringIO(to_csv(outcome.images))))
    assert {row["method"] for row in read} == {"'=1+1|a_b", "R&D 100 % #1", "'-x* <b>`y`</b>"}
    text = to_csv(pd.DataFrame({"number": [-0.5], "text": ["@x"], "mixed": [None]}))
    assert text == "number,text,mixed\n-0.5,'@x,\n"


def test_a_whole_run_has_all_tables_and_its_failed_job(tmp_path):
    write_run(tmp_path, paper="table1", group_by=r"patient\d+")
    outcome = load(tmp_path)
    table = cells(outcome, 20)
    markdown = to_markdown(outcome, table)
    titles = [line for line in markdown.splitlines() if line.startswith("## ")]
    assert titles[:2] == [f"## Image AUROC (AC, anomaly classification), K = {k}" for k in (2, 4)]
    assert (len(titles), to_latex(outcome, table).count(r"\midrule")) == (9, 8)
    assert "MVFA-Chest-k4-s1: OutOfMemoryError: &lt;b&gt;no&lt;/b&gt; memory" in markdown
    assert len(pd.read_csv(io.StringIO(to_csv(outcome.jobs)))) == 28


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "There is no folder 'nowhere"), ("failed", "No job in .*1 failed.*out of"), ("none", "1 finished")],
)
def test_a_folder_without_results_is_one_clear_error(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    write_config(Path("failed"), ["A"])
    failed = make_result("A", "few_shot", "Brain", 4, 0, status="failed", error="out of memory")
    write_job(Path("failed"), failed)
    write_config(Path("none"), ["A"])
    write_job(Path("none"), make_result("A", "few_shot", "Brain", 4, 0))  # no metrics
    with pytest.raises((FileNotFoundError, ValueError), match=f"(?s){message}"):
        load(Path(name))
