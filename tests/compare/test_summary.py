"""Aggregation against figures worked out by hand, ranks, and what is left out."""

import json

import numpy as np
import pytest
import yaml
from fake_run import make_row, write_config, write_job
from sklearn.metrics import roc_auc_score

from anomalib_mvfa.compare.bootstrap import Scores, bootstrap
from anomalib_mvfa.compare.paper import paper_table
from anomalib_mvfa.compare.summary import lacking, read_outcome, shots, summarise, tabulate


def tables(run, metric="image_AUROC", k_shot=4, paper=None):
    outcome = read_outcome(run)
    return tabulate(summarise(run, outcome.rows, resamples=20), outcome, metric, k_shot, paper)


def line(table, method):
    return next(line for line in table.lines if line.method == method)


def test_mean_spread_and_average_over_seeds(tmp_path):
    write_config(tmp_path, ["A"])
    for category, seed, value in (("Brain", 0, 0.7), ("Brain", 1, 0.8), ("Chest", 0, 0.5), ("Chest", 1, 0.9)):
        write_job(tmp_path, make_row("A", "few_shot", category, 4, seed, image=value))
    only = line(tables(tmp_path), "A")
    assert only.cells["Brain"].figure.mean == pytest.approx(0.75)
    assert only.cells["Brain"].figure.spread == pytest.approx(0.0707107)  # 0.1 / sqrt(2)
    assert only.average.figure.mean == pytest.approx(0.725)
    assert only.average.figure.spread == pytest.approx(0.1767767)  # of 0.6 and 0.85
    assert only.cells["Brain"].figure.interval is None  # there are no scores


def test_one_seed_of_one_method_has_no_spread_and_is_not_the_best(tmp_path):
    write_config(tmp_path, ["A"], seeds=[0])
    write_job(tmp_path, make_row("A", "few_shot", "Brain", 4, 0, image=0.7))
    cell = line(tables(tmp_path), "A").cells["Brain"]
    assert (cell.figure.spread, cell.rank) == (None, None)


def test_the_interval_is_that_of_all_seeds_and_follows_groups(tmp_path):
    rng = np.random.default_rng(0)
    labels = [0, 1] * 10
    paths = [f"p{index // 4}_{index}.png" for index in range(20)]
    runs = [Scores(paths, labels, (rng.random(20) + 0.5 * np.array(labels)).tolist()) for _ in range(2)]
    rows = [
        make_row("A", "few_shot", "Brain", 4, seed, image=roc_auc_score(labels, scores.values))
        for seed, scores in enumerate(runs)
    ]
    write_config(tmp_path, ["A"])
    for row, scores in zip(rows, runs, strict=True):
        write_job(tmp_path, row, scores)
    for group_by in (None, r"p\d+"):
        (cell,) = summarise(tmp_path, rows, group_by, resamples=50)
        assert list(cell.figures["image_AUROC"].interval) == bootstrap(runs, group_by, 50)["image_AUROC"]
    assert cell.images == {"normal": 10, "abnormal": 10, "groups": 5}


def test_test_images_of_one_kind_give_no_figure_rather_than_nan(tmp_path):
    row = make_row("A", "few_shot", "Brain", 4, 0, image=float("nan"), pixel=0.5)
    write_config(tmp_path, ["A"])
    write_job(tmp_path, row, Scores(["a.png", "b.png"], [1, 1], [0.1, 0.2]))
    (cell,) = summarise(tmp_path, [row], resamples=5)
    assert list(cell.figures) == ["pixel_AUROC"]


def test_best_and_second_of_each_column_and_ties_share(tmp_path):
    values = {"A": (0.9, 0.8), "B": (0.95, 0.8), "C": (0.7, 0.700001), "D": (0.6, 0.7)}
    write_config(tmp_path, [*values])
    for method, pair in values.items():
        for category, value in zip(("Brain", "Chest"), pair, strict=True):
            write_job(tmp_path, make_row(method, "few_shot", category, 4, 0, image=value))
    table = tables(tmp_path)
    ranks = {line.method: [cell.rank for cell in (*line.cells.values(), line.average)] for line in table.lines}
    assert ranks == {"A": [2, 1, 2], "B": [1, 1, 1], "C": [None, 2, None], "D": [None, 2, None]}


def test_random_weights_are_ranked_only_among_themselves(tmp_path):
    random = {"A": True, "B": False, "C": False}
    write_config(tmp_path, [*random])
    for method, value in (("A", 0.9), ("B", 0.8), ("C", 0.7)):
        row = make_row(method, "few_shot", "Brain", 4, 0, image=value, random_weights=random[method])
        write_job(tmp_path, row)
    mixed = {line.method: line.cells["Brain"].rank for line in tables(tmp_path).lines}
    assert mixed == {"A": None, "B": 1, "C": 2}
    for path in tmp_path.glob("jobs/*/row.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"random_weights": True}))
    assert [line.cells["Brain"].rank for line in tables(tmp_path).lines] == [1, 2, None]


def test_methods_tested_on_other_images_are_not_ranked(tmp_path):
    write_config(tmp_path, ["A", "B"])
    for category in ("Brain", "Chest"):
        write_job(tmp_path, make_row("A", "few_shot", category, 4, 0, image=0.9))
        other = {"test_set": "other"} if category == "Chest" else {}
        write_job(tmp_path, make_row("B", "few_shot", category, 4, 0, image=0.8, **other))
    table = tables(tmp_path)
    assert table.unlike == ["Chest"]
    ranks = [[cell.rank for cell in (*line.cells.values(), line.average)] for line in table.lines]
    assert ranks == [[1, None, None], [2, None, None]]


def test_test_images_may_depend_on_the_seed(tmp_path):
    write_config(tmp_path, ["A", "B"])
    for method, value in (("A", 0.9), ("B", 0.8)):
        for seed in (0, 1):
            write_job(tmp_path, make_row(method, "few_shot", "Brain", 4, seed, image=value, test_set=f"of {seed}"))
    table = tables(tmp_path)
    assert table.unlike == []
    assert [line.cells["Brain"].rank for line in table.lines] == [1, 2]


def test_methods_without_shots_are_in_the_table_of_every_k_and_order_is_by_protocol(tmp_path):
    write_config(tmp_path, ["M", "P", "W"])
    write_job(tmp_path, make_row("P", "full_normal", "Brain", None, 0, image=0.9))
    write_job(tmp_path, make_row("W", "zero_shot", "Brain", None, 0, image=0.6))
    for k_shot in (2, 4):
        write_job(tmp_path, make_row("M", "few_shot", "Brain", k_shot, 0, image=0.8 + k_shot / 100))
    outcome = read_outcome(tmp_path)
    summaries = summarise(tmp_path, outcome.rows)
    assert shots(summaries) == [2, 4]
    for k_shot, value in ((2, 0.82), (4, 0.84)):
        table = tabulate(summaries, outcome, "image_AUROC", k_shot)
        assert [line.method for line in table.lines] == ["P", "M", "W"]
        assert line(table, "M").cells["Brain"].figure.mean == pytest.approx(value)
    assert shots([cell for cell in summaries if cell.k_shot is None]) == [None]


def test_an_average_needs_all_categories(tmp_path):
    write_config(tmp_path, ["A", "B"])
    write_job(tmp_path, make_row("A", "few_shot", "Brain", 4, 0, image=0.9))
    write_job(tmp_path, make_row("B", "few_shot", "Brain", 4, 0, image=0.8))
    write_job(tmp_path, make_row("B", "few_shot", "Chest", 4, 0, image=0.8))
    average = line(tables(tmp_path), "A").average
    assert (average.figure, average.missing) == (None, 1)


def test_what_the_config_no_longer_asks_for_is_left_out(tmp_path):
    write_config(tmp_path, ["A"], categories=["Chest", "Brain"], seeds=[0, 1], k_shots=[4])
    for method, category, k_shot, seed in (
        ("A", "Brain", 4, 0),
        ("A", "Chest", 4, 1),
        ("gone", "Brain", 4, 0),
        ("A", "Liver", 4, 0),
        ("A", "Brain", 8, 0),
        ("A", "Brain", 4, 7),
    ):
        write_job(tmp_path, make_row(method, "few_shot", category, k_shot, seed, image=0.9))
    outcome = read_outcome(tmp_path)
    assert [(row.category, row.k_shot, row.seed) for row in outcome.rows] == [("Chest", 4, 1), ("Brain", 4, 0)]
    assert lacking(outcome) == [("A", "Chest", 4, [0]), ("A", "Brain", 4, [1])]


def test_a_method_for_some_categories_lacks_no_others(tmp_path):
    methods = {"A": {"categories": ["Brain"]}, "B": None, "C": {"categories": ["Liver"]}, "D": None}
    write_config(tmp_path, ["A", "B", "C", "D"], categories=["Brain", "Chest"], seeds=[0], k_shots=[4])
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "methods": methods}))
    for method, category in (("A", "Brain"), ("A", "Chest"), ("B", "Brain")):
        write_job(tmp_path, make_row(method, "few_shot", category, 4, 0, image=0.9))
    outcome = read_outcome(tmp_path)
    assert [(row.method, row.category) for row in outcome.rows] == [("A", "Brain"), ("B", "Brain")]
    assert lacking(outcome) == [("B", "Chest", 4, [0]), ("D", None, None, [0])]  # without a job, it lacks all


def test_the_paper_stands_beside_its_own_k_and_protocol_and_never_beside_random_weights(tmp_path):
    paper = paper_table("table1")
    methods = {"MVFA": "few_shot", "Patchcore": "full_normal", "WinCLIP": "few_normal", "DRA": "leave_one_out"}
    write_config(tmp_path, [*methods])
    for method, protocol in methods.items():
        for category in ("Brain", "Chest"):
            for k_shot in (2, 4) if protocol.startswith("few") else (None,):
                random = method == "WinCLIP"
                row = make_row(method, protocol, category, k_shot, 0, image=0.9, random_weights=random)
                write_job(tmp_path, row)

    def figures(k_shot):
        lines = tables(tmp_path, k_shot=k_shot, paper=paper).lines
        return {line.method: [cell.paper for cell in (*line.cells.values(), line.average)] for line in lines}

    none = [None, None, None]
    patchcore = pytest.approx([0.9155, 0.7517, 0.8336])
    assert figures(4) == {
        "MVFA": pytest.approx([0.9244, 0.8195, 0.871950]),
        "Patchcore": patchcore,
        "WinCLIP": none,
        "DRA": none,  # the paper's has another protocol
    }
    assert figures(2) == {"MVFA": none, "Patchcore": patchcore, "WinCLIP": none, "DRA": none}


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "There is no folder"), ("empty", "holds no comparison"), ("failed", "No job in .* 1 failed.*out of")],
)
def test_a_folder_without_results_is_one_clear_error(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    write_config(tmp_path / "failed", ["A"])
    write_job(tmp_path / "failed", make_row("A", "few_shot", "Brain", 4, 0, error="out of memory"))
    with pytest.raises((FileNotFoundError, ValueError), match=f"(?s){message}"):
        read_outcome(tmp_path / name)
