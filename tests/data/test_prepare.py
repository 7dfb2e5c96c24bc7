"""Preparation: the same store however it comes about, and nothing lost, mixed or overwritten."""

import collections
import csv
import dataclasses
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

from hirescam_jax.cli import main as cli
from hirescam_jax.data.organs.sources import RegionMasks
from hirescam_jax.data.prepare.plan import shards_of, split_studies
from hirescam_jax.data.prepare.prepare import prepare
from hirescam_jax.data.store.store import Store
from hirescam_jax.data.study import ANYWHERE, Reject, Study
from hirescam_jax.data.volume import Volume
from hirescam_jax.errors import UserError

GRID = {"spacing_mm": (3.0, 3.0, 3.0), "shape": (10, 12, 14)}
REGIONS = ("left", ANYWHERE, "right")
# Axes right -> left, anterior -> posterior, superior -> inferior.
AFFINE = np.diag([-3.0, -3.0, -3.0, 1.0])


@dataclasses.dataclass
class Fake:
    """A reader whose study i is a volume of noise of seed i; what is in `bad` cannot be read."""

    path: Path
    size: int = 10
    bad: tuple[int, ...] = ()
    deadly: tuple[int, ...] = ()
    huge: tuple[int, ...] = ()
    labels: tuple[str, ...] = ("a", "b")
    regions: tuple[str, ...] = REGIONS
    rejects: list[Reject] = dataclasses.field(default_factory=list)

    @property
    def studies(self) -> list[Study]:
        return [self.study(i) for i in range(self.size)]

    def study(self, i: int) -> Study:
        path = self.path / f"{i}.raw"
        if not path.exists():
            path.write_text(str(i))
        findings = np.random.default_rng(i).integers(0, 2, (2, 3)).astype(np.uint8)
        return Study(f"study_{i}", f"patient_{i // 2}", None, (path,), findings)

    def read(self, study: Study) -> Volume:
        i = int(study.files[0].read_text())
        if i in self.bad:
            raise UserError(f"{study.files[0]}: truncated:\n copy it again")
        if i in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if i in self.huge:
            np.ones(2**31)
        voxels = np.random.default_rng(i).integers(-1000, 1000, (14, 12, 10)).astype(np.int16)
        return Volume(voxels, AFFINE, study.files[0])


@dataclasses.dataclass
class Halves:
    """The two halves of the volume, in another order than the reader's."""

    regions: tuple[str, ...] = ("right", "left")

    def masks(self, study: Study, volume: Volume) -> RegionMasks:
        masks = np.zeros((2, *volume.voxels.shape), np.uint8)
        masks[0, :7], masks[1, 7:] = 1, 1
        odd = int(study.id.split("_")[1]) == 3
        return RegionMasks(masks, "no lungs" if odd else None, odd)


@pytest.fixture
def raw(tmp_path):
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw"


def run(raw: Path, out: Path, reader: Fake | None = None, **options):
    options = {**GRID, "workers": 0, "shards": 2, **options}
    return prepare(reader or Fake(raw), Halves(), out, **options)


def contents(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir())}


def ids(out: Path) -> dict[str, list[str]]:
    splits = json.loads((out / "store.json").read_text())["splits"]
    return {name: [id for s in shards for id in s["ids"]] for name, shards in splits.items()}


# -- splits ---------------------------------------------------------------------------------------


def some_studies(count: int, own: dict[int, str] | None = None) -> list[Study]:
    nothing = np.zeros((1, 1), np.uint8)
    rng = np.random.default_rng(0)
    return [
        Study(f"s{i}", f"p{rng.integers(count // 2)}", (own or {}).get(i), (), nothing)
        for i in range(count)
    ]


def test_splits_never_part_a_patient_and_lose_nobody():
    studies = some_studies(200)
    for seed in range(5):
        splits = split_studies(studies, seed, (0.7, 0.2, 0.1))
        patients = [{study.patient for study in part} for part in splits.values()]
        assert sum(map(len, splits.values())) == 200
        assert sum(map(len, patients)) == len(set.union(*patients))
        count = len(set.union(*patients))
        assert [len(p) for p in patients[1:]] == [int(count * 0.2), int(count * 0.1)]


def test_split_is_a_function_of_the_seed_and_not_of_the_order():
    studies = some_studies(50)

    def of(studies, seed):
        parts = split_studies(studies, seed, (0.6, 0.2, 0.2))
        return {name: {study.id for study in part} for name, part in parts.items()}

    assert of(studies, 0) == of(studies[::-1], 0)
    assert of(studies, 0) != of(studies, 1)


@pytest.mark.parametrize(("patients", "sizes"), [(1, [1, 0, 0]), (2, [2, 0, 0]), (3, [1, 1, 1])])
def test_few_patients(patients, sizes):
    nothing = np.zeros((1, 1), np.uint8)
    studies = [Study(f"s{i}", f"p{i}", None, (), nothing) for i in range(patients)]
    splits = split_studies(studies, 0, (0.8, 0.1, 0.1))
    assert [len(part) for part in splits.values()] == sizes


def test_the_data_sets_own_split_is_kept():
    nothing = np.zeros((1, 1), np.uint8)
    own = [
        Study("a", "p", "test", (), nothing),
        Study("b", "p", None, (), nothing),  # follows its patient
        Study("c", "q", "val", (), nothing),
    ]
    splits = split_studies(own, 0, (0.8, 0.1, 0.1))
    assert {k: [s.id for s in v] for k, v in splits.items()} == {
        "train": [],
        "val": ["c"],
        "test": ["a", "b"],
    }
    with pytest.raises(UserError, match="x: patient 'p' is in the splits test and train"):
        split_studies([*own, Study("x", "p", "train", (), nothing)], 0, (0.8, 0.1, 0.1))


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.8, 0.3, -0.1), (0.8, 0.1, 0.2), (0, 0, 0)])
def test_fractions_that_are_none(fractions):
    with pytest.raises(UserError, match="three from 0 to 1 whose sum is 1"):
        split_studies(some_studies(4), 0, fractions)


def test_shards_are_neighbours_and_even():
    plan = shards_of({"train": some_studies(70), "val": some_studies(2), "test": []})
    assert [len(shard.studies) for shard in plan] == [23, 23, 24, 2]
    assert [study.id for shard in plan[:3] for study in shard.studies] == [
        f"s{i}" for i in range(70)
    ]
    assert plan[1].file == "train-00001-of-00003.array_record"
    assert len(shards_of({"val": some_studies(4)}, shards=9)) == 4


# -- a store --------------------------------------------------------------------------------------


def test_volumes_findings_masks_and_provenance(raw, tmp_path):
    reader = Fake(raw)
    result = run(raw, tmp_path / "out")
    assert (result.whole, result.rejects, result.fallbacks) == (True, [], 1)
    assert sum(result.counts.values()) == 10
    seen = collections.Counter()
    patients = []
    for split in ("train", "val", "test"):
        source = Store(tmp_path / "out", split, (10, 12, 14))
        assert (source.labels, source.regions) == (reader.labels, REGIONS)
        assert (source.shape, source.spacing_mm) == (GRID["shape"], GRID["spacing_mm"])
        patients.append(set())
        for n, name in enumerate(source.ids):
            study = reader.study(int(name.split("_")[1]))
            scan = reader.read(study)
            item, record = source[n], source.record(n)
            np.testing.assert_array_equal(item["volume"], scan.voxels.transpose(2, 1, 0))
            np.testing.assert_array_equal(item["findings"], study.findings)
            regions = item["regions"]
            assert regions[1].all()
            assert regions[2, :, :, :7].all()
            assert not regions[2, :, :, 7:].any()
            np.testing.assert_array_equal(regions[0], 1 - regions[2])
            assert (record.id, record.patient) == (study.id, study.patient)
            np.testing.assert_allclose(record.affine[:3, 3], 0, atol=1e-9)
            assert record.source == {
                "path": str(study.files[0]),
                "shape": [14, 12, 10],
                "affine": AFFINE.tolist(),
            }
            seen[name] += 1
            patients[-1].add(study.patient)
    assert seen == {f"study_{i}": 1 for i in range(10)}
    assert not patients[0] & patients[1]
    assert not patients[0] & patients[2]
    header = json.loads((tmp_path / "out" / "store.json").read_text())
    assert header["fallbacks"] == {"study_3": "no lungs"}
    assert header["region_fallbacks"] == 1
    assert header["counts"] == result.counts
    for i in range(10):
        file = raw / f"{i}.raw"
        wanted = {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}
        assert header["sources"][f"study_{i}"] == wanted


def test_regions_without_masks_are_refused(raw, tmp_path):
    reader = Fake(raw, regions=("left", "spleen", "right"))
    with pytest.raises(UserError, match="in region 'spleen', and no masks of it"):
        run(raw, tmp_path / "out", reader)
    assert not (tmp_path / "out").exists()


def test_no_region_source_where_all_is_anywhere(raw, tmp_path):
    reader = Fake(raw, size=3, regions=(ANYWHERE,) * 3)
    prepare(reader, None, tmp_path / "out", **GRID, workers=0)
    assert Store(tmp_path / "out", "train", (5, 6, 7))[0]["regions"].all()


def test_parts_make_the_same_store(raw, tmp_path):
    run(raw, tmp_path / "whole")
    first = run(raw, tmp_path / "parts", shard=(0, 2))
    assert not first.whole
    with pytest.raises(UserError, match="no whole store: finish it"):
        Store(tmp_path / "parts", "train", (1, 1, 1))
    second = run(raw, tmp_path / "parts", shard=(1, 2))
    assert second.whole
    assert sum(second.counts.values()) == 10
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_parts_that_are_none(raw, tmp_path, shard):
    with pytest.raises(UserError, match="count from 0"):
        run(raw, tmp_path / "out", shard=shard)


@pytest.mark.slow
def test_processes_make_the_same_store(raw, tmp_path):
    reader = Fake(raw, bad=(4,))
    assert run(raw, tmp_path / "one", reader).counts == (
        run(raw, tmp_path / "two", reader, workers=2).counts
    )
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_whole_store_is_left_as_it_is(raw, tmp_path):
    first = run(raw, tmp_path / "out")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.array_record")}
    assert run(raw, tmp_path / "out") == first
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.array_record")}
    assert after == before


# -- nothing is overwritten -----------------------------------------------------------------------


def test_other_options_do_not_overwrite(raw, tmp_path):
    out = tmp_path / "out"
    run(raw, out)
    before = contents(out)
    for options in ({"split_seed": 9}, {"spacing_mm": (2.0, 2.0, 2.0)}, {"shards": 1}):
        with pytest.raises(UserError, match=r"holds another store.*--overwrite"):
            run(raw, out, **options)
        assert contents(out) == before
    (out / "notes.txt").write_text("precious")
    run(raw, out, split_seed=9, shards=1, overwrite=True)
    run(raw, tmp_path / "fresh", split_seed=9, shards=1)
    assert (out / "notes.txt").read_text() == "precious"
    (out / "notes.txt").unlink()
    assert contents(out) == contents(tmp_path / "fresh")


def test_overwrite_prepares_again_what_is_whole(raw, tmp_path):
    run(raw, tmp_path / "out")
    before = contents(tmp_path / "out")
    (raw / "0.raw").write_text("77")
    run(raw, tmp_path / "out")
    assert contents(tmp_path / "out") == before  # the same files by name are not read again
    run(raw, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") != before


def test_a_part_overwrites_other_plans_but_not_its_fellows(raw, tmp_path):
    run(raw, tmp_path / "out", split_seed=5)
    run(raw, tmp_path / "out", shard=(0, 2), overwrite=True)
    assert not (tmp_path / "out" / "store.json").exists()
    assert run(raw, tmp_path / "out", shard=(1, 2), overwrite=True).whole
    run(raw, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# -- rejects --------------------------------------------------------------------------------------


def rejects_in(out: Path) -> list[list[str]]:
    with (out / "rejects.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_a_broken_volume_does_not_stop_the_others(raw, tmp_path):
    reader = Fake(raw, bad=(2, 5), rejects=[Reject("ghost", "no volume of this id")])
    result = run(raw, tmp_path / "out", reader)
    assert result.whole
    assert sum(result.counts.values()) == 8
    assert {reject.id for reject in result.rejects} == {"ghost", "study_2", "study_5"}
    header, *rows = rejects_in(tmp_path / "out")
    assert header == ["id", "reason"]
    assert dict(rows) == {
        "ghost": "no volume of this id",
        "study_2": f"{raw / '2.raw'}: truncated: copy it again",
        "study_5": f"{raw / '5.raw'}: truncated: copy it again",
    }
    kept = [name for part in ids(tmp_path / "out").values() for name in part]
    assert sorted(kept) == [f"study_{i}" for i in range(10) if i not in (2, 5)]
    assert json.loads((tmp_path / "out" / "store.json").read_text())["rejects"] == 3


def test_an_error_nobody_foresaw_is_a_reject_too(raw, tmp_path):
    (raw / "1.raw").write_text("no number")
    result = run(raw, tmp_path / "out")
    (reject,) = result.rejects
    assert reject.id == "study_1"
    assert reject.reason.startswith(f"{raw / '1.raw'}: ValueError: invalid literal")


def test_strict_stops_at_the_first(raw, tmp_path):
    with pytest.raises(UserError, match=r"study_2: .*truncated"):
        run(raw, tmp_path / "out", Fake(raw, bad=(2,)), strict=True)
    assert not (tmp_path / "out" / "store.json").exists()
    with pytest.raises(UserError, match="ghost: no volume"):
        run(raw, tmp_path / "new", Fake(raw, rejects=[Reject("ghost", "no volume")]), strict=True)
    assert not (tmp_path / "new").exists()


def test_no_studies_at_all(raw, tmp_path):
    reader = Fake(raw, size=0, rejects=[Reject("ghost", "no volume of this id")])
    with pytest.raises(UserError, match="1 without; the first, no volume of this id"):
        run(raw, tmp_path / "out", reader)


def test_a_mended_volume_is_taken_in(raw, tmp_path):
    run(raw, tmp_path / "whole")
    reader = Fake(raw)
    for i in range(10):
        reader.study(i)
    (raw / "2.raw").write_text("broken")
    assert [reject.id for reject in run(raw, tmp_path / "out").rejects] == ["study_2"]
    assert [reject.id for reject in run(raw, tmp_path / "out").rejects] == ["study_2"]
    (raw / "2.raw").write_text("2")
    assert run(raw, tmp_path / "out").rejects == []
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.long
def test_a_volume_that_kills_its_process_or_needs_too_much_memory(raw, tmp_path):
    reader = Fake(raw, size=5, deadly=(1,), huge=(3,))
    result = run(raw, tmp_path / "out", reader, workers=1, worker_gib=1.0)
    reasons = {reject.id: reject.reason for reject in result.rejects}
    assert set(reasons) == {"study_1", "study_3"}
    assert "its process was killed" in reasons["study_1"]
    assert "needs more than 1 GiB: raise --worker-gib" in reasons["study_3"]
    assert sum(result.counts.values()) == 3


# -- interruptions --------------------------------------------------------------------------------


SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from tests.data.test_prepare import Fake, Halves, GRID
from hirescam_jax.data.prepare.prepare import prepare

class Slow(Fake):
    def read(self, study):
        time.sleep(0.15)
        return super().read(study)

if __name__ == "__main__":
    Slow.__name__ = "Fake"  # the same plan
    raw, out = map(Path, sys.argv[1:])
    prepare(Slow(raw, size=24), Halves(), out, **GRID, workers={workers}, shards=6)
"""


def ends(group: int) -> bool:
    """No process of the group is left after ten seconds."""
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "kills"), [(0, (1, 3)), pytest.param(2, (1,), marks=pytest.mark.long)]
)
def test_killed_and_continued_is_the_same_store(raw, tmp_path, workers, kills):
    whole, out = tmp_path / "whole", tmp_path / "out"
    reader = Fake(raw, size=24)
    run(raw, whole, reader, shards=6)
    script = tmp_path / "slow.py"
    script.write_text(SLOW.format(tests=str(Path(__file__).parents[2]), workers=workers))
    arguments = [sys.executable, str(script), str(raw), str(out)]
    for finished in kills:
        process = subprocess.Popen(arguments, start_new_session=True)
        deadline = time.monotonic() + 60
        while len(list(out.glob("*.json"))) < finished and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)  # into the next shard
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert ends(process.pid)
        done = {p.name: p.read_bytes() for p in out.glob("train*.json")}
        assert len(done) >= 1
        with pytest.raises(UserError, match="no whole store: finish it"):
            Store(out, "train", (1, 1, 1))
        for name in done:  # what has a header is whole
            data = (whole / name).with_suffix(".array_record").read_bytes()
            assert (out / name).with_suffix(".array_record").read_bytes() == data
    assert [p for p in out.iterdir() if p.name.startswith(".")]  # the half shard
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("[!.]*.array_record")}
    assert run(raw, out, reader, shards=6).whole
    assert {n: (out / n).stat().st_mtime_ns for n in before} == before
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("damage", ["cut", "missing", "no header", "half a header"])
def test_a_shard_that_is_not_whole_is_prepared_again(raw, tmp_path, damage):
    out = tmp_path / "out"
    run(raw, out)
    wanted = contents(out)
    shard = out / "train-00001-of-00002.array_record"
    header = shard.with_suffix(".json")
    (out / "store.json").unlink()
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "missing":
        shard.unlink()
    elif damage == "no header":
        header.unlink()
    else:
        header.write_text(header.read_text()[:50])
    if damage == "half a header":  # whose it is nobody knows
        with pytest.raises(UserError, match="another store"):
            run(raw, out)
        header.unlink()
    run(raw, out)
    assert contents(out) == wanted


def test_full_disk(raw, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(raw, tmp_path / "whole")
    writes = []

    def full(file: int) -> None:
        writes.append(file)
        if len(writes) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match=r"train-00001.*: cannot be written \(No space left"):
            run(raw, out)
    names = {"train-00000-of-00002.array_record", "train-00000-of-00002.json"}
    assert set(contents(out)) == names
    run(raw, out)
    assert contents(out) == contents(tmp_path / "whole")


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def nifti(tmp_path):
    """Two blocky chests of 4 mm and a table; a third row without a file."""
    folder = tmp_path / "nifti"
    folder.mkdir()
    for i in range(3):
        voxels = np.full((40, 30, 24), -1000, np.int16)
        voxels[4:36, 4:26] = 40 + i
        image = nibabel.Nifti1Image(voxels, np.diag([-4.0, -4.0, -4.0, 1.0]))
        image.header.set_sform(image.affine, code="scanner")
        nibabel.save(image, folder / f"ct_{i}.nii.gz")
    (folder / "labels.csv").write_text("id,mass\nct_0,1\nct_1,0\nct_2,1\n")
    return folder


def command(nifti, out, *options) -> list[str]:
    grid = ["--spacing", "4", "4", "4", "--shape", "24", "30", "40", "--workers", "0"]
    return ["prepare", "nifti", str(nifti), "--out", str(out), *grid, *options]


def test_command(nifti, tmp_path, capsys):
    cli.main(command(nifti, tmp_path / "out"))
    assert f"{tmp_path / 'out'}: 1 train, 1 val, 1 test; 0 of them" in capsys.readouterr().out
    (name,) = ids(tmp_path / "out")["train"]
    volume = Store(tmp_path / "out", "train", (1, 1, 1))[0]["volume"]
    assert volume.max() == 40 + int(name[-1])
    before = contents(tmp_path / "out")
    with pytest.raises(SystemExit) as caught:
        cli.main(command(nifti, tmp_path / "out", "--spacing", "5", "5", "5"))
    assert caught.value.code == 2
    assert "holds another store" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_exit_codes(nifti, tmp_path, capsys):
    data = (nifti / "ct_1.nii.gz").read_bytes()
    (nifti / "ct_1.nii.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(SystemExit) as caught:
        cli.main(command(nifti, tmp_path / "out"))
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert f"1 left out: see {tmp_path / 'out' / 'rejects.csv'}" in printed.err
    assert rejects_in(tmp_path / "out")[1][0] == "ct_1"
    with pytest.raises(SystemExit) as caught:
        cli.main(command(nifti, tmp_path / "strict", "--strict"))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "ct_1.nii.gz: " in error
    assert error.count("\n") == 1


def test_folder_without_permission(nifti, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    for out in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/none")):
        with pytest.raises(SystemExit) as caught:
            cli.main(command(nifti, out))
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert str(out) in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tree", "fixed"], "--tree: nifti has no such option"),
        (["--crop-lungs"], "--crop-lungs: nifti has no such option"),
        (["--shard", "1"], "--shard 1: give i/n"),
        (["--shard", "2/2"], "count from 0"),
        (["--regions", "/nowhere"], "/nowhere"),
        (["--region-suffix", "_seg"], "need --regions FOLDER"),
        (["--split-fractions", "1", "1", "1"], "whose sum is 1"),
        (["--label-regions", "/nowhere.json"], "/nowhere.json: not readable as JSON"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_work(nifti, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as caught:
        cli.main(command(nifti, tmp_path / "out", *options))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_label_map_regions_by_command(nifti, tmp_path):
    """Ids of a label map and regions of labels, both from JSON files."""
    folder = tmp_path / "maps"
    folder.mkdir()
    for i in range(3):
        labels = np.zeros((40, 30, 24), np.uint8)
        labels[:20] = 7
        image = nibabel.Nifti1Image(labels, np.diag([-4.0, -4.0, -4.0, 1.0]))
        image.header.set_sform(image.affine, code="scanner")
        nibabel.save(image, folder / f"ct_{i}_seg.nii.gz")
    (tmp_path / "ids.json").write_text('{"side": [7]}')
    (tmp_path / "where.json").write_text('{"mass": ["side"]}')
    options = ["--regions", folder, "--region-map", tmp_path / "ids.json"]
    options += ["--region-suffix", "_seg", "--label-regions", tmp_path / "where.json"]
    cli.main(command(nifti, tmp_path / "out", *map(str, options)))
    source = Store(tmp_path / "out", "test", (24, 30, 40))
    side = source[0]["regions"][source.regions.index("side")]
    assert side[:, :, :20].all()
    assert not side[:, :, 20:].any()
