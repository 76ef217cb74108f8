"""
Nothing is overwritten or removed that the program did not write: who owns a folder, and what a run reads.

    python -m pytest tests/robustness/test_ownership.py
"""
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tiny.__main__ as tiny
import train
from configurator import UserError
from engine import files, resume
from engine.files import atomic, check_owner, claim, digest_of_folder, release
from engine.teacher_cache import OWNER, TeacherCache
from processes import FORK, ROOT, ended, script, start
from test_train import flags


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    return folder


# What a user may keep in a folder: names that the program writes itself, names like them, and any other.
USERS = {
    "names of a checkpoint": ["tokenizer.json", "config.json"],
    "weights": ["model_of_mine.safetensors", "model.safetensors"],
    "temporary files": ["notes.tmp", "state/step_00000001.pt.tmp"],
    "a log": ["log.jsonl"],
    "a hidden file": [".keep"],
    "only a folder": ["bench/mine.txt"],
    "a file named lock": ["lock", "thesis.tex"],
    "an empty file named lock": ["lock", "thesis.tex"],
    "a run.json": ["run.json"],
    "states": ["state/step_00000001.pt"],
}


@pytest.mark.parametrize("kind", USERS)
def test_every_program_refuses_a_folder_of_the_users(world, tmp_path, kind):
    folder = write(tmp_path / "mine", *USERS[kind])
    if kind.startswith("an empty"):
        (folder / "lock").write_text("")
    (tmp_path / "link").symlink_to(folder)
    before = contents(folder)
    for place in (folder, tmp_path / "link"):
        for command in (
                lambda: train.main(flags(world, "align", place, max_steps=1)),
                lambda: train.main(flags(world, "d2d", tmp_path / "out", max_steps=1, teacher_cache=place)),
                lambda: tiny.main([f"--out_dir={place}", "--part=world", "--scale=0.001"]),
                lambda: claim(place, "evaluate.py", {"model": world / "dense"})):
            with pytest.raises(UserError) as caught:
                command()
            assert str(place) in str(caught.value) and "\n" not in str(caught.value)
    assert contents(folder) == before
    assert {path.name for path in folder.iterdir()} == {name.split("/")[0] for name in USERS[kind]}   # no lock either


@pytest.mark.parametrize("owner, other", [("train.py", "evaluate.py"), ("python -m tiny", "train.py"), (OWNER, "train.py")])
def test_a_folder_of_another_program_is_refused(tmp_path, owner, other):
    claim(tmp_path, owner)
    release(tmp_path)
    with pytest.raises(UserError, match=f"was made by {owner}; choose another folder"):
        check_owner(tmp_path, other)
    check_owner(tmp_path, owner)


@pytest.mark.parametrize("spelling", ["plain", "link", "dots", "slash"])
@pytest.mark.parametrize("key", ["student", "teacher", "vision", "llm"])
def test_an_input_is_never_the_output(world, clip_folder, qwen_folder, tmp_path, key, spelling):
    source = {"student": world / "dense", "teacher": world / "teacher", "vision": clip_folder, "llm": qwen_folder}[key]
    folder = shutil.copytree(source, tmp_path / "input")
    (folder / "lock").write_text(f"{resume.OWNER}\n")                # even where an earlier run made it
    (tmp_path / "link").symlink_to(folder)
    out = {"plain": folder, "link": tmp_path / "link", "dots": folder / ".." / "input", "slash": f"{folder}/"}[spelling]
    settings = {key: folder}
    if key in ("vision", "llm"):
        settings = dict(student="", vision=clip_folder, llm=qwen_folder) | settings
    before = contents(folder)
    with pytest.raises(UserError, match=f"is also the {key} of this run"):
        train.main(flags(world, "d2d" if key == "teacher" else "align", out, max_steps=1, **settings))
    assert contents(folder) == before


def test_the_cache_is_neither_the_teacher_nor_the_run(world, tmp_path):
    teacher = shutil.copytree(world / "teacher", tmp_path / "teacher")
    before = contents(teacher)
    with pytest.raises(UserError, match="did not write"):
        train.main(flags(world, "d2d", tmp_path / "out", teacher=teacher, teacher_cache=teacher))
    assert contents(teacher) == before
    with pytest.raises(UserError, match="are one folder, or one lies in the other"):
        train.main(flags(world, "d2d", tmp_path / "both", max_steps=1, teacher_cache=tmp_path / "both"))


def test_files_that_a_user_adds_to_a_run_stay(world, tmp_path):
    """The same command again, after an interruption: it sweeps its own half-written files and no others."""
    arguments = flags(world, "align", tmp_path / "out", max_steps=2, save_every=1)
    train.main(arguments)
    run = tmp_path / "out" / "run.json"
    run.write_text(run.read_text().replace('"finished": true', '"finished": false'))
    (tmp_path / "out" / "state" / "step_00000002.pt").unlink()
    names = ["notes.tmp", "model_of_mine.safetensors", "model-best.safetensors", "mine.safetensors.tmp", "state/mine.tmp",
             "state/step_best.pt", "thesis.tex"]
    write(tmp_path / "out", *names)
    write(tmp_path / "out", "state/step_00000009.pt.tmp", "model-00001-of-00002.safetensors.tmp")
    train.main(arguments)
    assert all((tmp_path / "out" / name).read_text() == "mine" for name in names)
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.tmp")) == ["mine.safetensors.tmp", "mine.tmp", "notes.tmp"]


def test_a_kill_while_the_folder_is_made_leaves_it_usable(tmp_path):
    (tmp_path / "lock").write_text("")                               # made, and not yet marked
    claim(tmp_path, "train.py")
    assert (tmp_path / "lock").read_text() == "train.py\n"


def test_one_process_at_a_time(tmp_path):
    """The second is refused, or waits; a process that dies holds nothing."""
    script = ("import sys, time; from engine.files import claim\n"
              "claim(sys.argv[1], 'train.py'); print('claimed', flush=True); time.sleep(60)")
    first = subprocess.Popen([sys.executable, "-c", script, tmp_path / "out"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "claimed\n"
    with pytest.raises(UserError, match="another run is writing there"):
        claim(tmp_path / "out", "train.py")

    def second(rank):
        claim(tmp_path / "out", "train.py", wait=True)
        write(tmp_path, "second")
    ranks = start(1, second)
    ranks[0].join(0.5)
    assert ranks[0].exitcode is None and not (tmp_path / "second").exists()
    first.kill()
    first.wait()
    first.stdout.close()
    codes, [errors] = ended(ranks)
    assert codes == [0] and "waiting for it" in errors and (tmp_path / "second").exists()


def test_parts_of_a_world_may_be_made_at_once(tmp_path):
    """As speedrun.sh does: several processes find the folder absent, empty or just marked, and all of them own it."""
    barrier = FORK.Barrier(4)

    def work(rank):
        barrier.wait()
        for i in range(20):
            claim(tmp_path / str(i), "python -m tiny", wait=True)
            release(tmp_path / str(i))
            write(tmp_path / str(i), f"part{rank}")
    codes, errors = ended(start(4, work))
    assert codes == [0] * 4, errors
    for i in range(20):
        assert sorted(os.listdir(tmp_path / str(i))) == ["lock", *[f"part{rank}" for rank in range(4)]]
        assert (tmp_path / str(i) / "lock").read_text() == "python -m tiny\n"


@pytest.mark.parametrize("seeds, codes", [((0, 1), [0, 2]), ((3, 3), [0, 0])])
def test_one_world_is_made_once(tmp_path, seeds, codes):
    """Two processes make the same part at once: the second waits, and then looks at what the first has made."""
    commands = [[f"--out_dir={tmp_path}", "--part=world", "--scale=0.01", f"--seed={seed}"] for seed in seeds]
    ranks = start(2, script("tiny/__main__.py", *commands))
    found, errors = ended(ranks)
    assert sorted(found) == codes, errors
    record = json.loads((tmp_path / "world.json").read_text())
    assert record["seed"] == seeds[found.index(0)] and ("was made with seed=" in "".join(errors)) == (2 in codes)
    said = "".join(Path(rank.output.name).read_text() for rank in ranks)
    assert said.count("seconds") == 1 and not (tmp_path / "world.tmp").exists()
    tiny.main([f"--out_dir={tmp_path / 'alone'}", "--part=world", "--scale=0.01", f"--seed={record['seed']}"])
    for name in ("train/teacher.json", "bench/scenes.jsonl"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_not_another_run(tmp_path, monkeypatch, capsys, number):
    """As Lustre mounted without flock, or NFS without its lock daemon: one line, and the run goes on."""
    def lockf(file, flags):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(files.fcntl, "lockf", lockf)
    claim(tmp_path / "out", "train.py")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "out: its file system has no locks" in said and "another run is writing" not in said
    assert (tmp_path / "out" / "lock").read_text() == "train.py\n"
    release(tmp_path / "out")


def test_two_runs_that_fill_one_cache(tmp_path):
    """The second waits, and then finds nothing missing."""
    barrier = FORK.Barrier(4)

    def work(rank):
        barrier.wait()
        cache = TeacherCache(tmp_path / "cache", 10, {"data": "x"})
        for path, _ in cache.claim_missing():
            with atomic(path) as tmp:
                save_file({"row_offsets": torch.arange(11)}, tmp)
            write(tmp_path, f"filled by {rank}")
        cache.release()
    codes, errors = ended(start(4, work))
    assert codes == [0] * 4, errors
    assert len(list(tmp_path.glob("filled by *"))) == 1


# -----------------------------------------------------------------------------
# What a folder was made from

def test_the_digest_is_of_every_byte_and_of_nothing_else(tmp_path):
    folder = tmp_path / "a"
    write(folder, "config.json", "tokenizer.json", "generation_config.json", "model.safetensors.index.json")
    size = 5 * 2**20
    (folder / "model.safetensors").write_bytes(bytes(size))
    first = digest_of_folder(folder)
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    os.utime(moved / "model.safetensors", (0, 0))
    write(moved, "log.jsonl", "run.json", "lock", "state/step_00000001.pt", "README.md")
    assert digest_of_folder(moved) == first                          # neither place nor time nor what is not read

    stat = (folder / "model.safetensors").stat()
    for position in (0, 2**20, size // 2, size - 2**20 - 1, size - 1):      # the same size, within the same second
        content = bytearray(size)
        content[position] = 1
        (folder / "model.safetensors").write_bytes(content)
        os.utime(folder / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert digest_of_folder(folder) != first
    (folder / "model.safetensors").write_bytes(bytes(size))
    assert digest_of_folder(folder) == first
    for name in ("config.json", "tokenizer.json", "generation_config.json", "model.safetensors.index.json"):
        (folder / name).write_text("other")
        assert digest_of_folder(folder) != first
        (folder / name).write_text("mine")
    (folder / "config.json").rename(folder / "other.bin")
    assert digest_of_folder(folder) != first
