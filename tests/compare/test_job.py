"""Which jobs there are, which images each protocol learns from and tests on, and what a result belongs to."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from anomalib_mvfa.compare.job import finished_result, identify, jobs_of
from anomalib_mvfa.compare.results import writing
from anomalib_mvfa.data import FewShot, FullNormal, LeaveOneOut
from recipe import write_support_list

SOURCE = {"class_path": "BMADOneClass"}
PROTOCOLS = ("full_normal", "few_normal", "few_shot", "leave_one_out", "zero_shot")


def methods(*protocols):
    return {protocol: {"protocol": protocol, "model": {"class_path": "Padim"}} for protocol in protocols}


def test_jobs_are_all_combinations_and_shots_count_only_where_there_are_some(comparison):
    jobs = jobs_of(comparison(methods=methods("full_normal", "few_shot"), k_shots=[1, 2], seeds=[0, 5]))
    assert [(job.name, job.category, job.k_shot, job.seed) for job in jobs[:6]] == [
        ("full_normal", "Brain", None, 0),
        ("few_shot", "Brain", 1, 0),
        ("full_normal", "Chest", None, 0),
        ("few_shot", "Chest", 1, 0),
        ("few_shot", "Brain", 2, 0),
        ("few_shot", "Chest", 2, 0),
    ]
    assert len({job.folder for job in jobs}) == len(jobs) == 12


@pytest.mark.parametrize("category", ["Brain", "Chest"])
def test_every_protocol_tests_the_same_images_and_learns_from_its_own(comparison, category):
    jobs = jobs_of(comparison(methods=methods(*PROTOCOLS), group_by=".*"))
    data = {job.name: job.datamodule() for job in jobs if job.category == category}
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
    assert {datamodule.group_by for datamodule in data.values()} == {".*"}


def test_images_of_sources_without_validation_are_the_same_too(comparison, two_categories):
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
    for job in jobs_of(plan):
        datamodule = job.datamodule()
        datamodule.setup()
        if job.category == "own":
            tested.append(sorted(datamodule.test_data.samples.image_path))
    assert len(tested) == len(PROTOCOLS)
    assert all(paths == tested[0] for paths in tested)
    assert 0 < len(tested[0]) < 6


def test_a_method_may_be_for_some_categories(comparison, caplog):
    plan = comparison(seeds=[0, 1])
    plan.methods["PatchCore"].categories = ["Brain"]
    expected = [("PatchCore", "Brain"), ("MVFA", "Brain"), ("MVFA", "Chest")]
    assert [(job.name, job.category) for job in jobs_of(plan)] == 2 * expected
    assert caplog.text == ""
    plan.methods["PatchCore"].categories = ["Liver", "Chest"]
    assert len(jobs_of(plan)) == 6
    assert "methods.PatchCore.categories: ['Liver'] not compared; Brain, Chest are." in caplog.text


def test_categories_choose_among_data_sets_of_a_list(comparison):
    data = [{"class_path": "FewShotFolder", "init_args": {"name": name, "root": "x"}} for name in ("A", "B", "C")]
    plan = comparison(data=data, categories=["C", "A"])
    assert [(job.name, job.category) for job in jobs_of(plan)] == [
        (name, category) for category in ("C", "A") for name in ("PatchCore", "MVFA")
    ]
    with pytest.raises(ValueError, match=r"categories='D' is unknown; choose one of: A, B, C\."):
        jobs_of(comparison(data=data, categories=["A", "D"]))


@pytest.mark.parametrize("end", ["/b", " b", "../up", ".hidden", "<script>", "A" * 300, "\u4e2d" * 100])
def test_names_of_folders_are_plain_short_and_stay_apart(comparison, end):
    names = [f"{end}{last}" for last in "ab"]
    plan = comparison(methods={name: methods("few_shot")["few_shot"] for name in names}, categories=["Brain"])
    folders = [job.folder for job in jobs_of(plan)]
    assert len(set(folders)) == 2
    assert not [folder for folder in folders if set(folder) & set("/ <>") or folder.startswith(".")]
    assert max(len(folder.encode()) for folder in folders) <= 207


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": ["Lungs"]}, "BMAD has no category 'Lungs'"),
        ({"data": [SOURCE, SOURCE], "categories": None}, "two data sets called 'BMADOneClass'"),
        ({"categories": ["Brain"], "methods": methods("leave_one_out")}, "needs at least two categories"),
        ({"data": {"class_path": "BMADOneClass", "init_args": {"folder": "x"}}}, "do not suit BMADOneClass"),
        ({"data": {"class_path": "Foldr"}}, r"data\.class_path='Foldr' is no datamodule of anomalib or this package"),
    ],
)
def test_mistakes_in_data_are_named(comparison, changes, message):
    with pytest.raises(ValueError, match=message):
        identify(jobs_of(comparison(**changes)))


def test_a_result_counts_if_its_job_has_finished_and_depends_on_the_same(comparison, tmp_path):
    job, *_ = jobs_of(comparison())
    assert finished_result(tmp_path, job.folder, "1") is None
    for changes, counts in (({}, True), ({"status": "failed"}, False), ({"digest": "2"}, False)):
        with writing(tmp_path, job.folder) as folder:
            job.result(**{"digest": "1", **changes}).write(folder)
        assert (finished_result(tmp_path, job.folder, "1") is not None) == counts


class Desk:
    """A comparison of one method whose every part is a file that a test may change."""

    def __init__(self, folder: Path, make, data: Path, config: Path) -> None:
        self.data, self.make = folder / "data", make
        shutil.copytree(data, self.data)
        self.files = {name: folder / name for name in ("weights.pt", "clip.json", "adapters.pth", "other.json")}
        for name, file in self.files.items():
            shutil.copy(config, file) if file.suffix == ".json" else file.write_bytes(name.encode())
        write_support_list(folder, "Brain", ["000.png", "001.png"], ["000.png", "001.png"])
        self.model = {"backbone": str(self.files["clip.json"]), "adapters": str(self.files["adapters.pth"])}
        self.source = {"root": str(self.data), "num_workers": 0}
        self.method, self.trainer = {}, {}
        self.plan = {"weights": {"A": str(self.files["weights.pt"])}, "support_list": str(folder)}

    def digest(self) -> str:
        model = {"class_path": "Mvfa", "init_args": self.model}
        method = {"protocol": "few_shot", "model": model, "data": self.method, "trainer": self.trainer}
        data = {"class_path": "BMADOneClass", "init_args": self.source}
        jobs = jobs_of(self.make(methods={"A": method}, data=data, categories=["Brain"], **self.plan))
        return identify(jobs)[jobs[0].folder]

    def image(self, part: str) -> Path:
        return sorted((self.data / "Brain").glob(part))[0]


def paint(path: Path) -> None:
    with Image.open(path) as image:
        ImageOps.invert(image).save(path)


def swap(desk: Desk) -> None:
    """Take another image into the support."""
    write_support_list(Path(desk.plan["support_list"]), "Brain", ["002.png", "001.png"], ["000.png", "001.png"])


def move(desk: Desk) -> None:
    """Move data, weights and backbone, and change nothing in them."""
    desk.source["root"] = str(desk.data.rename(desk.data.with_name("moved")))
    for name in ("weights.pt", "clip.json"):
        desk.files[name] = desk.files[name].rename(desk.files[name].with_name(f"moved_{name}"))
    desk.plan["weights"] = {"A": str(desk.files["weights.pt"])}
    desk.model["backbone"] = str(desk.files["clip.json"])


def edit_json(desk: Desk) -> None:
    config = json.loads(desk.files["clip.json"].read_text())
    desk.files["clip.json"].write_text(json.dumps({**config, "embed_dim": 1}))


CHANGES = {
    "contents of the support list": swap,
    "a support image": lambda desk: paint(desk.image("valid/good/img/000.png")),
    "a support mask": lambda desk: paint(desk.image("valid/Ungood/label/000.png")),
    "a test image": lambda desk: paint(desk.image("test/good/img/*")),
    "a test mask": lambda desk: paint(desk.image("test/Ungood/label/*")),
    "one test image less": lambda desk: desk.image("test/good/img/*").unlink(),
    "contents of the adapters file": lambda desk: desk.files["adapters.pth"].write_bytes(b"other"),
    "contents of the weights": lambda desk: desk.files["weights.pt"].write_bytes(b"other"),
    "random weights": lambda desk: desk.plan.update(weights={"A": None}),
    "contents of the backbone JSON": edit_json,
    "an argument of the model": lambda desk: desk.model.update(max_epochs=3),
    "an argument of the trainer": lambda desk: desk.trainer.update(max_steps=3),
    "the training batch size": lambda desk: desk.method.update(train_batch_size=2),
    "the seed": lambda desk: desk.plan.update(seeds=[1]),
    "K": lambda desk: desk.plan.update(k_shots=[1], support_list=None),
    "choosing the epoch on the test": lambda desk: desk.plan.update(select_epoch_on_test=True),
}
NO_CHANGES = {
    "workers": lambda desk: desk.source.update(num_workers=3),
    "evaluation batch size": lambda desk: desk.source.update(eval_batch_size=3),
    "workers and evaluation batch size of the method": lambda desk: desk.method.update(
        num_workers=3, eval_batch_size=3
    ),
    "progress bars": lambda desk: desk.trainer.update(enable_progress_bar=True),
    "a default, written out": lambda desk: desk.model.update(residual_ratio=0.1),
    "places of files": move,
    "times of files": lambda desk: [path.touch() for path in desk.data.rglob("*.png")],
    "an image of no part": lambda desk: paint(desk.image("train/good/img/*")),
    "title, reference and accelerator": lambda desk: desk.plan.update(title="B", reference="A", accelerator="auto"),
    "another seed beside": lambda desk: desk.plan.update(seeds=[0, 1]),
    "another category beside": lambda desk: desk.plan.update(paper="table1"),
}


@pytest.mark.parametrize(
    ("what", "changes"), [*((what, True) for what in CHANGES), *((what, False) for what in NO_CHANGES)]
)
def test_what_a_result_belongs_to(what, changes, comparison, two_categories, tiny_config, tmp_path):
    desk = Desk(tmp_path, comparison, two_categories, tiny_config)
    before = desk.digest()
    assert desk.digest() == before
    (CHANGES | NO_CHANGES)[what](desk)
    assert (desk.digest() != before) == changes


def test_weights_seed_and_protocol_count_where_the_model_has_no_argument_for_them(comparison, tmp_path):
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"1")
    write_support_list(tmp_path, "Brain", ["000.png", "001.png"], ["000.png", "001.png"])  # whatever the seed

    def digest(protocol="full_normal", seed=0):
        method = {"protocol": protocol, "model": {"class_path": "Patchcore"}}
        support = {"support_list": str(tmp_path), "categories": ["Brain"]}
        plan = comparison(methods={"A": method}, weights={"A": str(weights)}, seeds=[seed], **support)
        return identify(jobs_of(plan))[jobs_of(plan)[0].folder]

    before = digest()
    assert digest() == before != digest(seed=1)
    assert digest("zero_shot") != digest("few_normal")  # with the same images
    weights.write_bytes(b"2")
    assert digest() != before


def test_arguments_of_the_data_count_such_as_the_window_of_scans(comparison):
    jobs = jobs_of(comparison(categories=["Brain"]))
    expected = [{"class_path": "BMADOneClass", "init_args": {"category": "Brain"}}]  # neither root nor workers
    assert all(job.depends_on({})["sources"] == expected for job in jobs)


OWN = """
from anomalib.models import Padim

class Own(Padim):
    pass
"""


def test_the_source_of_a_model_of_ones_own_counts(comparison, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    own = {"own": {"protocol": "few_normal", "model": {"class_path": "own_digest.Own"}}}
    digests = []
    for text in (OWN, OWN, f"{OWN}# changed"):
        (tmp_path / "own_digest.py").write_text(text)
        jobs = jobs_of(comparison(methods=own, categories=["Brain"]))
        digests.append(identify(jobs)[jobs[0].folder])
    assert digests[0] == digests[1] != digests[2]


def test_leave_one_out_depends_on_the_other_categories(comparison, two_categories, tmp_path):
    shutil.copytree(two_categories, tmp_path / "data")
    data = {"class_path": "BMADOneClass", "init_args": {"root": str(tmp_path / "data"), "num_workers": 0}}
    plan = comparison(methods=methods("leave_one_out", "few_shot"), data=data)

    def digests():
        return identify(jobs_of(plan))

    before = digests()
    for path in (tmp_path / "data" / "Chest").rglob("*.png"):
        paint(path)
    after = digests()
    assert {name for name in before if before[name] != after[name]} == {
        "leave_one_out-Brain-s0",
        "leave_one_out-Chest-s0",
        "few_shot-Chest-k2-s0",
    }
