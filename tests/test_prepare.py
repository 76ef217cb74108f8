"""
tools/prepare.py on a miniature of the paper's folders: archives, parquet and JSON made here, and the dry runs of all stages.

    python -m pytest tests/test_prepare.py        (the parquet file itself needs pyarrow, and is skipped without it)
"""
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from configurator import UserError
from engine.index import InstructionData, PreferenceData
from engine.files import lock
from processes import ended, start
from test_data import qwen_tokenizer, turns
from tools import download, plan, prepare

ROOT = Path(train.__file__).parent


def jpeg(seed):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def zipped(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(name, jpeg(i))


def rows(image, n, start=0):
    return [{"id": f"{image} {i}", "image": image, "conversations": turns(f"<image>\nWhat is {i}?", f"Answer {i}.")}
            for i in range(start, start + n)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in content) if path.suffix == ".jsonl" else json.dumps(content)
    path.write_text(text)


PAIRS = [{"ds_name": "RLAIF-V", "image": {"bytes": jpeg(90 + i), "path": None}, "question": f"What is {i}?", "chosen": "A cat.",
          "rejected": "A dog.", "origin_dataset": "OK-VQA", "origin_split": "{}", "idx": i, "image_path": f"part{i % 2}/{i}.jpg"}
         for i in range(5)]


@pytest.fixture
def data(tmp_path):
    """What a user has after downloading: archives and JSON files, nothing unpacked."""
    data = tmp_path / "data"
    zipped(data / "align/images.zip", ["00000/1.jpg", "00001/2.jpg"])
    zipped(data / "archives/coco/train2017.zip", ["train2017/1.jpg", "train2017/2.jpg"])
    zipped(data / "archives/allava/images_0.zip", ["some/where/3.jpeg"])
    zipped(data / "archives/vg/images.zip", ["VG_100K/4.jpg"])
    zipped(data / "archives/internvl/ChartQA Dataset.zip", ["ChartQA Dataset/train/png/5.png"])
    for name in ("svit_tune", "lvis_tune", "lrv_tune"):
        zipped(data / f"archives/moe_llava/{name}.zip", [f"{name}/6.jpg"])
    zipped(data / "archives/moe_llava/LA.zip", ["LA/7.jpg"])
    (data / "archives/sam").mkdir(parents=True)
    with tarfile.open(data / "archives/sam/sa_000000.tar", "w") as archive:
        info = tarfile.TarInfo("./sa_8.jpg")
        info.size = len(jpeg(8))
        archive.addfile(info, io.BytesIO(jpeg(8)))
    with tarfile.open(data / "archives/internvl/docvqa_train.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("train/documents/9.png")
        info.size = len(jpeg(9))
        archive.addfile(info, io.BytesIO(jpeg(9)))

    write(data / "align/blip_laion_cc_sbu_558k.json", rows("00000/1.jpg", 300))
    write(data / "teacher/llava_v1_5_mix665k.json", rows("coco/train2017/1.jpg", 150) + [{"id": "t", "conversations": turns("Hi", "Ho")}])
    write(data / "d2d/allava_laion/ALLaVA-Caption-LAION-4V.json", rows("allava_laion/images/3.jpeg", 40))
    write(data / "d2d/share-captioner_coco_lcs_sam_1246k_1107.json",
          rows("sam/images/sa_8.jpg", 40) + rows("llava/llava_pretrain/images/00001/2.jpg", 40))
    for name, image in [("svit_tune_157k", "svit_tune"), ("lvis_tune_220k_", "lvis_tune"), ("lrv_tune_331k", "lrv_tune"),
                        ("la_tune_256k", "mimicit_tune/LA")]:
        write(data / f"d2d/train_json/{name}.json", rows(f"{image}/{'7' if 'LA' in image else '6'}.jpg", 10))
    for name in prepare.WHOLE:
        write(data / "d2s" / name, rows("coco/train2017/2.jpg", 12))
    filler = rows("coco/train2017/1.jpg", 200) + rows("ScienceQA/train/10/image.png", 7) + rows("sbu/11.jpg", 30) + \
        [{"id": "text", "conversations": turns("Hi", "Ho")}]
    write(data / "d2s" / prepare.FILLER, filler)
    return data


def prepared(data, monkeypatch, *flags):
    monkeypatch.setattr(prepare, "parquet_rows", lambda path: iter(PAIRS))
    has_mixture = not {"--only=unpack", "--only=preferences"} & set(flags)
    prepare.main([f"--data={data}", *["--d2s_rows=180"] * has_mixture, *flags])


def test_from_archives_to_what_the_configs_name(data, tmp_path, monkeypatch, capsys):
    (data / "pd").mkdir()
    (data / "pd/RLAIF-V-Dataset_000.parquet").write_bytes(b"read by the line above")
    prepared(data, monkeypatch)
    for name in ["align/images/00000/1.jpg", "images/coco/train2017/1.jpg", "images/allava_laion/images/3.jpeg", "images/sam/images/sa_8.jpg",
                 "images/vg/VG_100K/4.jpg", "images/chartqa/train/png/5.png", "images/docvqa/train/documents/9.png",
                 "images/svit_tune/6.jpg", "images/mimicit_tune/LA/7.jpg", "images/llava/llava_pretrain/images/00001/2.jpg",
                 "teacher/images/coco/train2017/1.jpg", "pd/images/part1/3.jpg"]:
        assert (data / name).is_file(), name
    assert (data / "images/coco/train2017/2.jpg").read_bytes() == jpeg(1)

    mixed = [json.loads(line) for line in (data.parent / prepare.MIXTURE).read_text().splitlines()]
    folders = [prepare.first_folder(row) for row in mixed]
    assert len(mixed) == 180 and len({json.dumps(row) for row in mixed}) == 180 - 7 * 12    # the 8 whole files are alike here
    assert folders.count("scienceqa") == 7 and "sbu" not in folders and mixed[:12] == rows("coco/train2017/2.jpg", 12)
    said = capsys.readouterr().out
    assert "mix_1400k.jsonl: 180 rows, 180 expected" in said and "rlaif_v.json: 5 rows, 83,132 expected" in said
    assert "archives/gqa/images.zip: absent; from https://downloads.cs.stanford.edu" in said
    assert "train2017.zip: 2 files in " + str(data / "images/coco") + ", 118,287 expected" in said

    tokenizer, settings = qwen_tokenizer(), ("vicuna", 4, 28, 200)
    pairs = PreferenceData([(str(data / "pd/rlaif_v.json"), 1.0)], str(data / "pd/images"), tokenizer, *settings)
    assert len(pairs) == 5 and len(pairs[0]["images"]) == 1
    for stage in ("align", "teacher_sft", "d2d"):
        config = train.configure([str(ROOT / "config" / f"{stage}.py")])
        files = [(str(data.parent / path), 1.0) for path in config.data.split(",")]
        found = InstructionData(files, str(data.parent / config.image_dir), tokenizer, *settings)
        assert found.notes == [] and found[len(found) - 1]["input_ids"]

    before = {path: path.stat().st_mtime_ns for path in data.rglob("*") if path.is_file()}
    prepared(data, monkeypatch)                                        # again: nothing is written
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*") if path.is_file() and path in before} == before
    assert "unpacked earlier" in capsys.readouterr().out


def test_an_interrupted_unpacking_goes_on(data, monkeypatch, capsys):
    """The first of two files is there whole, the second in half: only that one is written."""
    target = data / "images/coco/train2017"
    target.mkdir(parents=True)
    (target / "1.jpg").write_bytes(jpeg(0))
    (target / "2.jpg").write_bytes(jpeg(1)[:20])
    prepared(data, monkeypatch, "--only=unpack")
    assert "train2017.zip: 2 files in " + str(data / "images/coco") + ", 1 of them new" in capsys.readouterr().out
    assert (target / "2.jpg").read_bytes() == jpeg(1)


def test_archives_that_are_cut_off_or_lead_out_of_the_folder(data, monkeypatch):
    path = data / "archives/coco/train2017.zip"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="train2017.zip: is not a whole archive .*; fetch it again"):
        prepared(data, monkeypatch, "--only=unpack")
    zipped(path, ["../../escaped.jpg", "/tmp/escaped.jpg", "train2017/1.jpg"])
    prepared(data, monkeypatch, "--only=unpack")
    assert (data / "images/coco/train2017/1.jpg").is_file() and not list(data.parent.rglob("escaped.jpg"))


def change(path, *changes):
    content = bytearray(path.read_bytes())
    for place, byte in changes:
        content[place] = byte
    path.write_bytes(content)


def with_header(path, place, byte):
    """Change a byte of the first file's two headers; in the second all places are 2 bytes later."""
    change(path, (place, byte), (path.read_bytes().find(b"PK\1\2") + place + 2, byte))


def in_place_of(path, make):
    path.unlink()
    make(path)


TAR_GZ = "archives/internvl/docvqa_train.tar.gz"
DAMAGED = {
    "encrypted": ("align/images.zip", lambda path: with_header(path, 6, 1), "is encrypted"),
    "another compression": ("align/images.zip", lambda path: with_header(path, 8, 93), "compression"),
    "another checksum of a file": ("align/images.zip", lambda path: change(path, (80, 7)), "CRC"),
    "another checksum at the end": (TAR_GZ, lambda path: change(path, (-7, path.read_bytes()[-7] ^ 1)), "CRC"),
    "cut off": (TAR_GZ, lambda path: path.write_bytes(path.read_bytes()[:-9]), "end-of-stream"),
    "other bytes": (TAR_GZ, lambda path: change(path, *((place, 255) for place in range(60, 80))), ""),
    "a web page": (TAR_GZ, lambda path: path.write_text("<html>Sign in</html>"), "a web page, not the file itself"),
    "a pipe": (TAR_GZ, lambda path: in_place_of(path, os.mkfifo), "a pipe or a device, not a file"),
    "a zip that is a pipe": ("align/images.zip", lambda path: in_place_of(path, os.mkfifo), "a pipe or a device, not a"),
    "a zip that is a folder": ("align/images.zip", lambda path: in_place_of(path, os.mkdir), "a folder, not a file"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_nothing_of_a_damaged_archive_is_unpacked(data, monkeypatch, kind):
    name, damage, reason = DAMAGED[kind]
    damage(data / name)
    with pytest.raises(UserError) as caught:
        prepared(data, monkeypatch, "--only=unpack")
    line = str(caught.value)
    assert line.startswith(f"{data / name}: is not a whole archive") and reason in line and "\n" not in line
    assert line.endswith("; fetch it again") and not (data / f"{name}.unpacked").exists()
    assert not (data / ("images/docvqa" if name == TAR_GZ else "align/images/00000/1.jpg")).exists()
    assert not list(data.rglob("*.tmp"))


def test_a_users_own_files_are_left_alone(data, monkeypatch):
    """In the place of a picture, and under names that a copy in progress might have."""
    folder = data / "align/images"
    for name in ("00000/1.jpg", "00001/2.jpg.part", "00001/2.jpg.tmp", "victim"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")
    (folder / "00000/1.jpg.part").symlink_to(folder / "victim")
    (folder / "00001/2.jpg").symlink_to("nowhere")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"00000/1.jpg: is another file than the one in .*images.zip.* \(1 more like it\);"):
        prepared(data, monkeypatch, "--only=unpack")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (folder / "00000/1.jpg").unlink()
    (folder / "00001/2.jpg").unlink()
    prepared(data, monkeypatch, "--only=unpack")
    assert (folder / "00000/1.jpg").read_bytes() == jpeg(0) and (folder / "00001/2.jpg").read_bytes() == jpeg(1)
    assert all((folder / name).read_text() == f"mine: {name}" for name in ("victim", "00001/2.jpg.part", "00001/2.jpg.tmp"))

    own = data / "pd/images/part1/3.jpg"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    (data / "pd/RLAIF-V-Dataset_000.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="part1/3.jpg: is another picture than the one in .*parquet; move it away"):
        prepared(data, monkeypatch, "--only=preferences")
    assert own.read_text() == "mine" and not (data / "pd/rlaif_v.json").exists()


def test_an_archive_that_holds_a_name_twice(data, monkeypatch):
    zipped(data / "archives/coco/train2017.zip", ["train2017/1.jpg", "train2017/./1.jpg", "train2017/2.jpg"])
    for _ in range(2):
        prepared(data, monkeypatch, "--only=unpack")
        assert (data / "images/coco/train2017/1.jpg").read_bytes() == jpeg(0)
        (data / "archives/coco/train2017.zip.unpacked").unlink()


@pytest.mark.parametrize("record", [{}, {"files": "many"}, {"files": None}, [1], "x"])
def test_an_odd_record_of_an_unpacked_archive(data, record):
    (data / "align/images.zip.unpacked").write_text(json.dumps(record))
    with pytest.raises(UserError, match="images.zip.unpacked.* found|images.zip.unpacked: the key .files. is missing"):
        prepare.main([f"--data={data}", "--only=check"])


def test_one_run_at_a_time_and_no_setting_without_effect(data, monkeypatch):
    def work(rank):
        prepare.main([f"--data={data}", "--only=mixture", "--d2s_rows=180"])
    with lock(data / "prepare.lock"):
        codes, _ = ended(start(1, work))
        assert codes == [1] and not (data.parent / prepare.MIXTURE).exists()
        prepare.main([f"--data={data}", "--only=check"])             # only reads
    prepared(data, monkeypatch, "--only=mixture")
    with pytest.raises(UserError, match="mix_1400k.jsonl: is there with 180 rows, this run has d2s_rows=170; .*remove"):
        prepare.main([f"--data={data}", "--only=mixture", "--d2s_rows=170"])
    for part in ("unpack", "link", "preferences"):
        with pytest.raises(UserError, match="d2s_rows=7: belongs to the parts mixture and check"):
            prepare.main([f"--data={data}", f"--only={part}", "--d2s_rows=7"])
    prepare.main([f"--data={data / 'nowhere'}"])
    assert not (data / "nowhere").exists()


def test_the_mixture_is_the_same_every_time_and_says_what_it_lacks(data, monkeypatch, capsys):
    prepared(data, monkeypatch, "--only=mixture")
    first = (data.parent / prepare.MIXTURE).read_bytes()
    (data.parent / prepare.MIXTURE).unlink()
    prepared(data, monkeypatch, "--only=mixture")
    assert (data.parent / prepare.MIXTURE).read_bytes() == first
    (data.parent / prepare.MIXTURE).unlink()
    with pytest.raises(UserError, match=r"9,904 rows are wanted of it, and it has 7 of ScienceQA and 201 others"):
        prepare.main([f"--data={data}", "--only=mixture", "--d2s_rows=10000"])
    (data / "d2s" / prepare.FILLER).unlink()
    prepare.main([f"--data={data}", "--only=mixture"])
    assert f"not yet, absent: {data / 'd2s' / prepare.FILLER}" in capsys.readouterr().out and not (data.parent / prepare.MIXTURE).exists()


def test_rlaif_vs_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    (tmp_path / "pd").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(PAIRS), tmp_path / "pd/RLAIF-V-Dataset_000.parquet")
    prepare.main([f"--data={tmp_path}", "--only=preferences"])
    found = json.loads((tmp_path / "pd/rlaif_v.json").read_text())
    assert [pair["question"] for pair in found] == [pair["question"] for pair in PAIRS] and found[3]["image"] == "part1/3.jpg"
    assert (tmp_path / "pd/images/part1/3.jpg").read_bytes() == PAIRS[3]["image"]["bytes"]
    (tmp_path / "pd/rlaif_v.json").unlink()
    parquet.write_table(pyarrow.Table.from_pylist([{"question": "x"}]), tmp_path / "pd/RLAIF-V-Dataset_001.parquet")
    with pytest.raises(UserError, match="RLAIF-V-Dataset_001.parquet: has no column ds_name, found question"):
        prepare.main([f"--data={tmp_path}", "--only=preferences"])
    in_place_of(tmp_path / "pd/RLAIF-V-Dataset_000.parquet", os.mkfifo)
    with pytest.raises(UserError, match="RLAIF-V-Dataset_000.parquet: cannot be read .*a pipe or a device, not a file"):
        prepare.main([f"--data={tmp_path}", "--only=preferences"])
    assert not (tmp_path / "pd/rlaif_v.json").exists()


# -----------------------------------------------------------------------------
# Plans of the configs as they are shipped

CONFIGS = sorted(path.stem for path in (ROOT / "config").glob("*.py") if path.stem != "own")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dry_run_of_every_shipped_config(name, tmp_path, monkeypatch, capsys):
    """No weights, no data: students and teachers are known from the configs that will make them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "16")
    train.main([str(ROOT / "config" / f"{name}.py"), "--dry_run"])
    said = capsys.readouterr().out
    assert "on 16 GPUs" in said and "80 GB: fits" in said and "absent" in said


def test_what_a_config_will_make():
    student, teacher = plan.build(train.configure([str(ROOT / "config/pd.py")]))
    assert student.config.decoder.num_experts == 4 and len(student.config.decoder.sparse_layers) == 12
    assert student.config.decoder.n_embd == plan.DECODERS["Qwen/Qwen1.5-1.8B"].n_embd
    assert teacher.config.decoder.n_embd == plan.DECODERS["Qwen/Qwen1.5-7B"].n_embd
    table = plan.table_row("d2s", ["--student=Qwen/Qwen1.5-1.8B", "--teacher=Qwen/Qwen1.5-7B"], 16)
    assert plan.table_row("d2s", [], 16) == table                      # the same as by the published names


def test_the_chain():
    lines = plan.chain().splitlines()
    names = [line.split(" | ")[0].strip("| ") for line in lines[2:]]
    assert names == [*plan.CHAIN, "evaluation, 42,597 questions", "all"]
    hours = [float(line.split(" | ")[-2].strip("| ")) for line in lines[2:]]     # of the arithmetic
    assert hours[-1] == pytest.approx(sum(hours[:-1]), abs=4) and 0.1 < hours[-2] < 20


def test_the_benchmarks_files_are_listed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/eval/pope/coco").mkdir(parents=True)
    download.main(["--manifest=eval"])
    said = capsys.readouterr().out
    assert "pope: data/eval/pope/coco\n" in said and "gqa: data/eval/gqa/data/images  (absent)" in said
    listed = {entry["path"].split("/")[0] for entry in json.loads((ROOT / "config/eval.json").read_text())["files"]}
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert listed == {"gqa", "vizwiz", "scienceqa", "textvqa", "MME", "mmbench", "pope", "objhal", "mmhal", "AMBER"}
    assert all(f"\n{folder}/\n" in page for folder in listed)


def test_every_archive_of_the_manifest_has_a_place_that_the_rows_name():
    manifest = json.loads(prepare.ARCHIVES.read_text())
    assert all(list(entry) == ["archive", "to", "strip", "images", "gb", "from"] for entry in manifest["archives"])
    assert all(not path.startswith("/") for path in manifest["links"])


def test_every_command_of_the_page_is_a_run_that_begins(monkeypatch):
    """Of docs/paper.md and docs/scale.md: no unknown key, none that would be ignored, no contradiction."""
    monkeypatch.chdir(ROOT)
    commands = [line.split("#")[0].split("train.py ")[1].split() for page in ("paper.md", "scale.md")
                for line in (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines() if line.startswith("torchrun") and "train.py config" in line]
    assert len(commands) > 20
    outputs = {train.configure(command).out_dir for command in commands}
    page = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    assert all(f"out/{name}" in outputs for name in ("2b/dense", "2b/e4t1", "2b/d2s_all", "2b/d2s_weak", "2b/sft_sparse"))
    assert "A100-hours" in page
