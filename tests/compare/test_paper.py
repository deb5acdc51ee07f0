"""The paper's figures: averages that it prints agree with what they are over."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from anomalib_mvfa.compare.paper import SETS, TITLES, paper_table
from anomalib_mvfa.data.bmad import CATEGORIES

SHARED = Path(__file__).parents[3] / "shared" / "paper_results.yaml"
WITH_MASKS = [name for name, category in CATEGORIES.items() if category.has_masks]


def average(table, level, method="MVFA", protocol="few_shot", k_shot=4):
    categories = [*CATEGORIES] if level == "image" else WITH_MASKS
    return paper_table(table).figure(f"{level}_AUROC", method, protocol, k_shot, categories)


def test_every_table_is_there_and_names_categories_that_there_are():
    for name in TITLES:
        table = paper_table(name).figures.set_index(["table", "method", "alias", "protocol", "k_shot", "level"])
        assert {*table} == {*CATEGORIES, *SETS}
        assert table.index.is_unique
        assert table.stack().dropna().between(30, 100).all()


def test_printed_averages_are_those_of_table_1():
    assert average("table5", "image") == average("table3", "image") == pytest.approx(0.8897)
    assert average("table1", "image") == pytest.approx(0.8897, abs=1e-4)
    assert average("table5", "pixel") == pytest.approx(average("table1", "pixel"), abs=1e-4)


def test_figure_3_agrees_with_table_1_at_k_4():
    for level, categories in (("image", CATEGORIES), ("pixel", WITH_MASKS)):
        for category in categories:
            figures = [
                paper_table(name).figure(f"{level}_AUROC", "MVFA", "few_shot", 4, [category])
                for name in ("table1", "figure3")
            ]
            assert 0 < figures[0] == figures[1]


def test_adapters_are_mvfa_of_table_2():
    for level in ("image", "pixel"):
        assert average("table4", level, protocol="leave_one_out", k_shot=None) == average(
            "table2", level, protocol="leave_one_out", k_shot=None
        )


def test_a_printed_average_is_for_all_the_categories_that_it_is_over():
    table = paper_table("table5")
    assert np.isnan(table.figure("image_AUROC", "MVFA", "few_shot", 4, ["Brain"]))


@pytest.mark.parametrize("name", ["April-GAN", "april gan", "APRIL_GAN"])
def test_spelling_of_methods_does_not_matter(name):
    assert paper_table("table1").figure("image_AUROC", name, "few_shot", 4, ["Liver"]) == pytest.approx(0.5305)


def test_an_unknown_table_is_one_clear_error():
    with pytest.raises(ValueError, match=r"paper='table9' .* table1, table2, table3, table4, table5, figure3, or null"):
        paper_table("table9")


@pytest.mark.skipif(not SHARED.is_file(), reason="the paper's tables are not there")
def test_figures_are_those_of_the_paper():
    source = yaml.safe_load(SHARED.read_text())
    order = source["order"]
    groups = source["table1_few_shot_k4"]
    expected = {"table1": {name: entry for group in groups.values() for name, entry in group.items()}}
    expected["table2"] = source["table2_zero_shot_leave_one_out"]
    expected["table4"] = source["table4_zero_shot_ablation"]
    for table, methods in expected.items():
        figures = paper_table(table).figures.set_index(["method", "level"])
        found = {key: row[[*CATEGORIES]].dropna().to_dict() for key, row in figures.iterrows()}
        for method, entry in methods.items():
            image = {name: value for name, value in zip(order, entry["ac"], strict=True) if value is not None}
            assert found[method, "image"] == image
            assert found[method, "pixel"] == entry["as"]
        assert len(found) == 2 * len(methods)
