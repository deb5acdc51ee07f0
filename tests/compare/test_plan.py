"""What a comparison consists of, and which images each protocol learns from and tests on."""

from dataclasses import replace

import pytest
import yaml

from anomalib_mvfa.compare.plan import Comparison
from anomalib_mvfa.compare.results import write_row, writing
from anomalib_mvfa.data import FewShot, FullNormal, LeaveOneOut

PROTOCOLS = ("full_normal", "few_normal", "few_shot", "leave_one_out", "zero_shot")


def methods(*protocols):
    return {protocol: {"protocol": protocol, "model": {"class_path": "Padim"}} for protocol in protocols}


def test_jobs_are_all_combinations_and_shots_count_only_where_there_are_some(comparison):
    plan = comparison(methods=methods("full_normal", "few_shot"), k_shots=[1, 2], seeds=[0, 5])
    jobs = plan.jobs()
    assert [(job.name, job.category, job.k_shot, job.seed) for job in jobs[:6]] == [
        ("full_normal", "Brain", None, 0),
        ("few_shot", "Brain", 1, 0),
        ("full_normal", "Chest", None, 0),
        ("few_shot", "Chest", 1, 0),
        ("few_shot", "Brain", 2, 0),
        ("few_shot", "Chest", 2, 0),
    ]
    assert len(jobs) == 12
    assert [job.is_first for job in jobs] == [True] * 6 + [False] * 6
    assert len({job.folder for job in jobs}) == len({job.digest for job in jobs}) == 12


@pytest.mark.parametrize("category", ["Brain", "Chest"])
def test_every_protocol_tests_the_same_images_and_learns_from_its_own(comparison, category):
    plan = comparison(methods=methods(*PROTOCOLS))
    data = {job.name: job.datamodule() for job in plan.jobs() if job.category == category}
    for datamodule in data.values():
        datamodule.setup()
    tested = {name: list(datamodule.test_data.samples.image_path) for name, datamodule in data.items()}
    assert len(tested["few_shot"]) == 6
    assert all(paths == tested["few_shot"] for paths in tested.values())
    labels = {name: sorted(datamodule.train_data.samples.label_index) for name, datamodule in data.items()}
    assert labels["full_normal"] == [0, 0, 0]
    assert labels["few_normal"] == labels["zero_shot"] == [0, 0]
    assert labels["few_shot"] == [0, 0, 1, 1]
    assert labels["leave_one_out"] == [0, 0, 0, 1, 1, 1]
    other = {"Brain": "Chest", "Chest": "Brain"}[category]
    assert all(f"/{other}/" in path for path in data["leave_one_out"].train_data.samples.image_path)
    assert [type(data[name]) for name in PROTOCOLS] == [FullNormal, FewShot, FewShot, LeaveOneOut, FewShot]
    assert {datamodule.num_workers for datamodule in data.values()} == {0}  # the source's own


def test_images_of_sources_without_validation_are_the_same_too(comparison, tmp_path, two_categories):
    source = {
        "class_path": "Folder",
        "init_args": {
            "name": "own",
            "root": str(two_categories / "Brain"),
            "normal_dir": "train/good/img",
            "normal_test_dir": "test/good/img",
            "abnormal_dir": "test/Ungood/img",
            "mask_dir": "test/Ungood/label",
            "num_workers": 0,
        },
    }
    other = {**source, "init_args": {**source["init_args"], "name": "other", "root": str(two_categories / "Chest")}}
    del other["init_args"]["mask_dir"]
    plan = comparison(data=[source, other], categories=None, methods=methods(*PROTOCOLS), k_shots=[1])
    assert list(plan.sources()) == ["own", "other"]
    tested = []
    for job in plan.jobs():
        datamodule = job.datamodule()
        datamodule.setup()
        if job.category == "own":
            tested.append(sorted(datamodule.test_data.samples.image_path))
    assert len(tested) == len(PROTOCOLS)
    assert all(paths == tested[0] for paths in tested)
    assert 0 < len(tested[0]) < 6


def test_a_method_may_be_for_some_categories(comparison, caplog):
    before = {job.folder: job.digest for job in comparison().jobs()}
    changed = comparison(seeds=[0, 1])
    changed.methods["PatchCore"].categories = ["Brain"]
    jobs = changed.jobs()
    assert [(job.name, job.category) for job in jobs] == 2 * [
        ("PatchCore", "Brain"),
        ("MVFA", "Brain"),
        ("MVFA", "Chest"),
    ]
    assert all(before[job.folder] == job.digest for job in jobs if job.seed == 0)  # what has finished stays so
    assert caplog.text == ""


def test_categories_of_a_method_that_are_not_compared_are_named(comparison, caplog):
    changed = comparison(categories=["Chest"])
    changed.methods["PatchCore"].categories = ["Brain", "Chest"]
    assert [job.name for job in changed.jobs()] == ["PatchCore", "MVFA"]
    assert "methods.PatchCore.categories: ['Brain'] not compared; Chest are." in caplog.text


def test_a_comparison_survives_its_file(comparison, tmp_path):
    plan = comparison(weights={"MVFA": None}, title="Ä & <b>", group_by=r"p(\d)")
    plan.save(tmp_path / "config.yaml")
    assert Comparison.load(tmp_path / "config.yaml") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert list(yaml.safe_load((tmp_path / "config.yaml").read_text())["methods"]) == ["PatchCore", "MVFA"]
    assert Comparison.load(tmp_path / "config.yaml", seeds=[3]) == replace(plan, seeds=[3])


def test_a_changed_job_has_another_digest_and_the_others_keep_theirs(comparison):
    before = {job.folder: job.digest for job in comparison(seeds=[0]).jobs()}
    more = {job.folder: job.digest for job in comparison(seeds=[0, 1], title="more", accelerator="auto").jobs()}
    assert before.items() <= more.items()
    changed = comparison()
    changed.methods["MVFA"].trainer["max_epochs"] = 2
    after = {job.folder: job.digest for job in changed.jobs()}
    assert {name for name in before if before[name] != after[name]} == {"MVFA-Brain-k2-s0", "MVFA-Chest-k2-s0"}


def test_another_weight_file_makes_another_job(comparison, tmp_path):
    file = tmp_path / "weights.pt"
    file.write_bytes(b"1")
    plan = comparison(weights={"MVFA": str(file)})
    before = [job.digest for job in plan.jobs()]
    file.write_bytes(b"2")
    same = [one == other for one, other in zip(before, (job.digest for job in plan.jobs()), strict=True)]
    assert same == [True, False, True, False]


def test_names_of_folders_are_plain_and_stay_apart(comparison):
    names = ["a/b", "a b", "../up", ".hidden", "<script>"]
    plan = comparison(methods={name: methods("few_shot")["few_shot"] for name in names}, categories=["Brain"])
    folders = [job.folder for job in plan.jobs()]
    assert len(set(folders)) == len(names)
    assert not [folder for folder in folders if set(folder) & set("/ <>") or folder.startswith(".")]


@pytest.mark.parametrize("name", ["A" * 300, "\u4e2d" * 100])
def test_names_fit_on_disks(comparison, name):
    method = {"protocol": "few_normal", "model": {"class_path": "Padim"}}
    first, second = (comparison(methods={name + end: method}, weights={}).jobs()[0].folder for end in "ab")
    assert first != second
    assert len(first.encode()) <= 207


def test_a_job_has_finished_once_its_own_row_is_there(comparison, tmp_path):
    job, *_ = comparison().jobs()
    assert job.finished(tmp_path) is None
    for changes, counts in (({}, True), ({"error": "ValueError"}, False), ({"digest": "another"}, False)):
        with writing(tmp_path, job.folder) as folder:
            write_row(folder, replace(job.row(), **changes))
        assert (job.finished(tmp_path) is not None) == counts


def method(**changes):
    """Return a change of the methods to a single one."""
    return {"methods": {"A": {"protocol": "few_shot", "model": {"class_path": "Padim"}, **changes}}}


MISTAKES = [
    (method(protocol="one_shot"), "must be one of: full"),
    ({"methods": {"A": {"protocol": "few_shot"}}}, r"methods.A: missing \['model'\]"),
    (method(model={}), "must be a mapping with class_path"),
    (method(epochs=3), r"unknown \['epochs'\]"),
    (method(categories=[]), r"methods.A.categories=\[\] must be a list with at least one"),
    (method(categories="Brain"), "methods.A.categories='Brain' must be a list"),
    (
        method(model={"class_path": "Padim", "init_arg": {}}),
        r"methods\.A\.model names \['init_arg'\], to choose from are: class_path, init_args",
    ),
    (method(trainer={"devices": 2}), r"methods\.A\.trainer names \['devices'\], to choose from are: accumulate_grad"),
    (
        method(data={"k_shot": 2}),
        r"methods\.A\.data names \['k_shot'\], to choose from are: augmentations, eval_batch_size",
    ),
    ({"group_by": "("}, r"group_by='\(' is no regular expression"),
    ({"accelerator": "gpuu"}, "accelerator='gpuu' must be one of: auto, gpu, .*cpu"),
    ({"paper": "table9"}, "paper='table9' is not a table of the paper"),
    ({"weights": {"MVFA": 5}}, r"weights=.* must be a mapping from names, each to text or null"),
    ({"weights": {"PatchCroe": None}}, r"\['PatchCroe'\], which are no methods of this comparison: PatchCore"),
    ({"methods": {}}, "methods=.* must name at least one"),
    ({"methods": ["MVFA"]}, r"methods=\['MVFA'\] must be a mapping"),
    ({"seeds": []}, "seeds=.* must name at least one"),
    ({"seeds": 0}, r"seeds=0 must be a list of whole numbers from 0 on"),
    ({"seeds": ["a"]}, r"seeds=\['a'\] must be a list of whole numbers"),
    ({"k_shots": [0]}, r"k_shots=\[0\] must be a list of whole numbers from 1 on"),
    ({"k_shots": [2, 2]}, "none twice"),
    ({"categories": "Brain"}, "categories='Brain' must be a list of names"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_mistakes_are_named(comparison, changes, message):
    with pytest.raises(ValueError, match=message):
        comparison(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": ["Lungs"]}, "BMAD has no category 'Lungs'"),
        ({"categories": ["Brain", "Brain"]}, "two data sets called 'Brain'"),
        ({"categories": ["Brain"], "methods": methods("leave_one_out")}, "needs at least two categories"),
        ({"data": {"class_path": "BMADOneClass", "init_args": {"folder": "x"}}}, "do not suit BMADOneClass"),
        ({"data": {"class_path": "Foldr"}}, r"data\.class_path='Foldr' is no datamodule of anomalib or this package"),
        ({"data": {"root": "x"}, "categories": None}, "must be a mapping with class_path"),
    ],
)
def test_mistakes_in_data_are_named(comparison, changes, message):
    with pytest.raises(ValueError, match=message):
        comparison(**changes).jobs()


@pytest.mark.parametrize(
    ("text", "message"),
    [("methods: [", "is no YAML file"), ("- a", r"missing \['data', 'methods'\]"), ("", "missing")],
)
def test_what_is_no_comparison_is_refused(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Comparison.load(tmp_path / "a.yaml")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        Comparison.load(tmp_path / "b.yaml")
