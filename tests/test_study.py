"""
The study: its arithmetic against numbers worked by hand, its world, its arms, its report; and a toy study of two arms
and two seeds, run to the end, killed and continued.

    python -m pytest tests/test_study.py
"""
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import mean, stdev

import pytest

import evaluate
import train
from configurator import UserError, load_config
from tiny import __main__ as tiny
from tiny.language import SHORT, caption, training_caption
from tiny.rows import conversation
from tiny.scene import Scene, make_scene, splits_of
from tiny.study import better_answers, caption_mistakes, read_scenes, scene_rows, shuffle_pictures
from tools import study
from tools.study import DEFAULTS, Study, chosen_runs, parse_seeds
from tools.study_arms import ARMS, DATA_CURVE, DATA_MAKERS, OWN_SEEDS, QUESTIONS, SHARED, Claim
from tools.study_report import (BEGIN, END, LABELS, T_975, compare, holm, interval, read_results, sign_test, verdict,
                                write_report)

ROOT = Path(__file__).resolve().parents[1]


def config(tmp_path, **more):
    return study.Config(DEFAULTS | {"out_dir": str(tmp_path / "out"), "results": str(tmp_path / "raw.jsonl")} | more)


# -- arithmetic --


def test_interval_by_hand():
    """1, 2, 3, 4: mean 2.5, variance 5/3, standard error sqrt(5/12) = 0.6455, t of 3 degrees of freedom 3.1824."""
    assert interval([1, 2, 3, 4]) == pytest.approx((2.5, 2.5 - 2.0543, 2.5 + 2.0543), abs=1e-4)
    assert interval([5.0]) == (5, -math.inf, math.inf)
    _, low, high = interval([1, 2, 3, 4] * 10)                      # beyond the table: at least as wide as with its end
    assert (high - low) / 2 == pytest.approx(2.0452 * math.sqrt(50 / 39 / 40), abs=1e-4)


def test_t_quantiles_cut_off_a_fortieth_of_the_density():
    for degrees, t in enumerate(T_975, start=1):
        scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
        density = lambda x: scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)    # noqa: E731
        steps = 2000                                           # Simpson's rule from 0 to t
        inside = sum(density(t * i / steps) * (1 if i in (0, steps) else 4 if i % 2 else 2) for i in range(steps + 1))
        assert inside * t / steps / 3 == pytest.approx(0.475, abs=2e-5)


def test_sign_test_by_hand():
    assert sign_test([1] * 6) == 2 / 64
    assert sign_test([1] * 10) == 2 / 1024
    assert sign_test([-1, 1, 1, 1, 1, 1]) == 2 * (1 + 6) / 64
    assert sign_test([-1, -1, 1]) == 1                         # 2 * (1 + 3) / 8
    assert sign_test([0, 0, 1, 1, 1]) == 2 / 8                 # zeros say nothing
    assert sign_test([0.0]) == 1


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])     # x3; x1 but not below; x2
    assert holm([0.5, 0.9]) == [1, 1]
    assert holm([0.02]) == [0.02] and holm([]) == []


def test_verdicts_follow_the_interval():
    assert verdict(0.1, 2, 1) == "reproduced" and verdict(-2, -0.1, -1) == "reproduced"
    assert verdict(-2, -0.1, 1) == "opposite" and verdict(0.1, 2, -1) == "opposite"
    assert {verdict(-1, 1, sign) for sign in (-1, 0, 1)} == {"undecided"}
    assert verdict(0.1, 2, 0) == "higher" and verdict(-2, -0.1, 0) == "lower"


def test_comparisons_are_paired_and_corrected_within_their_question():
    line = lambda score, kl=1.0: {"scores": {"score": score, "kl": kl}}      # noqa: E731
    lines = {}
    for seed in range(6):
        lines["sft", seed] = line(10 * seed)                   # seeds differ by far more than arms
        lines["kd", seed] = line(10 * seed + 1 + 0.1 * (seed % 2), 0.5)
        lines["warm", seed] = line(10 * seed - 1)
    lines["kd", 6] = line(0)                                   # without a partner: not used
    claims = [Claim("kd", "sft", "a paper", 1), Claim("warm", "sft", sign=1), Claim("kd", "sft", metric="kl"),
              Claim("teacher", "sft")]
    first, second, third = compare(claims, lines, range(10))
    assert first.n == 6 and first.mean == pytest.approx(1.05) and first.wins == 6 and first.verdict == "reproduced"
    assert first.high - first.mean == pytest.approx(2.5706 * math.sqrt(0.003) / math.sqrt(6), abs=1e-6)
    assert (first.p, first.p_holm) == (2 / 64, 3 * 2 / 64)
    assert second.wins == 0 and second.verdict == "opposite"
    assert third.wins == 6 and third.verdict == "lower"        # of a KL, lower is better
    assert compare(claims[:1], lines, range(1, 3))[0].n == 2


# -- the world --

def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def test_the_speedruns_world_is_what_it_was(tmp_path):
    """Pictures apart, whose bytes depend on Pillow. The digests are of the files before the study was added."""
    tiny.make("world", tmp_path, seed=1, scale=0.01)
    assert json.loads((tmp_path / "world.json").read_text()).keys() == {"part", "seed", "scale", "scenes", "seconds"}
    for path in (tmp_path / "bench/objhal").glob("*.jsonl"):
        path.unlink()                                          # holds pictures
    assert [digest(tmp_path / name)[:16] for name in ("train", "bench", "bench_unseen/pope")] == [
        "4039694e75b4d1fb", "a23d0e4486abb863", "078f4d0c967d0d81"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study_world")
    tiny.make("world", folder, seed=1, scale=0.01, preset="study")
    tiny.make("world", folder / "tuning", seed=1, scale=0.01, preset="tuning")
    return folder


def load(path):
    return json.loads(path.read_text())


def test_world_files(world):
    rows = {name: load(world / f"train/{name}.json") for name in
            ("arm", "arm_half", "arm_double", "arm_noise30", "warm", "held_out", "teacher", "teacher_shuffled")}
    assert rows["arm_double"][:len(rows["arm"])] == rows["arm"]
    assert rows["arm"][:len(rows["arm_half"])] == rows["arm_half"]
    assert len(rows["arm_double"]) == 2 * len(rows["arm"]) == 4 * len(rows["arm_half"])
    images = [{row["image"] for row in rows[name]} for name in ("arm_double", "warm", "held_out", "teacher")]
    assert len(set.union(*images)) == sum(map(len, images))
    with pytest.raises(UserError, match="preset=study"):
        tiny.make("world", world, seed=1, scale=0.01)


def test_final_and_validation_scenes_are_different_test_scenes(world):
    for folder, split in ((world, "final"), (world / "tuning", "validation")):
        for bench in ("bench", "bench_unseen"):
            scenes = read_scenes(folder / bench / "scenes.jsonl").values()
            assert {tuple(splits_of(scene)) for scene in scenes} == {("test", split)}
        trained = {image: scene for image, scene in read_scenes(folder / "train/scenes.jsonl").items()}
        assert {split for image, scene in trained.items() if not image.startswith("held_out")
                for split in splits_of(scene)} == {"train", "preference"}
    rng = random.Random(0)
    counts = Counter(splits_of(make_scene(rng, "test"))[1] for _ in range(1000))
    assert abs(counts["final"] - 500) < 65                     # standard deviation 16


def test_noise_only_changes_answers_and_grows():
    rng = random.Random(0)
    scenes = {f"{i}.png": make_scene(rng, "train") for i in range(300)}
    clean, ten, thirty = (scene_rows(scenes, noise, seed=3) for noise in (0.0, 0.1, 0.3))
    wrong = Counter()
    for rows in zip(clean, ten, thirty):
        asked = {row["conversations"][0]["value"] for row in rows}
        true, some, many = (row["conversations"][1]["value"] for row in rows)
        assert len(asked) == 1 and len({row["id"] for row in rows}) == 1
        if SHORT not in asked.pop():
            assert true == some == many                        # captions
            continue
        wrong["asked"] += 1
        wrong["ten"] += some != true
        wrong["thirty"] += many != true
        assert many != true or some == true                    # wrong at 10 % is wrong at 30 %
    # A question about a missing partner, about 1 in 10, has a bias of its own in place of noise.
    assert 0.07 < wrong["ten"] / wrong["asked"] < 0.11 and 0.22 < wrong["thirty"] / wrong["asked"] < 0.32


def test_shuffled_pictures_are_other_pictures():
    rows = [{"image": f"{i // 2}.png", "id": i} for i in range(200)]
    shuffled = shuffle_pictures(rows, random.Random(0))
    assert [row["id"] for row in shuffled] == [row["id"] for row in rows]
    assert Counter(row["image"] for row in shuffled) == Counter(row["image"] for row in rows)
    assert sum(a["image"] != b["image"] for a, b in zip(rows, shuffled)) > 180


def test_mistakes_of_a_caption():
    scene = Scene([("red", "kite", 1), ("blue", "traffic light", 4)], (7, 12))
    assert caption(scene) == "a red kite and a blue traffic light and a label with 7 ."
    assert caption_mistakes(caption(scene), scene) == 0
    assert caption_mistakes("a blue traffic light and a label with 7 and a red kite", scene) == 0     # the order is free
    assert caption_mistakes("a red kite and a blue traffic light .", scene) == 1                     # one missing
    assert caption_mistakes(caption(scene).replace(" .", " and a red cup ."), scene) == 1             # one invented
    assert caption_mistakes(caption(scene).replace("red", "blue"), scene) == 2                        # a wrong color
    assert caption_mistakes("a red kite and " + caption(scene), scene) == 1                          # one repeated
    rng = random.Random(0)
    for _ in range(200):
        scene = make_scene(rng, "preference")
        text = training_caption(scene, rng)
        assert caption_mistakes(text, scene) == (text != caption(scene))


def test_the_better_of_two_answers_is_chosen():
    scenes = {"a.png": Scene([("red", "kite", 1)]), "b.png": Scene([("blue", "cup", 1)])}
    row = lambda image, answer, ask="Describe the image.": {                               # noqa: E731
        "id": image, "image": image, "conversations": conversation(ask, answer)}
    first = [row("a.png", "a red kite ."), row("b.png", "a red cup ."), row("a.png", "a cup ."),
             row("a.png", "no", f"Is there a kite?\n{SHORT}")]
    second = [row("a.png", "a red kite and a red cup ."), row("b.png", "a blue cup ."), row("a.png", "a kite ."),
              row("a.png", "yes", f"Is there a kite?\n{SHORT}")]
    pairs = better_answers(first, second, scenes)              # the third is a tie, the fourth no caption
    assert [(pair["chosen"][1]["value"], pair["rejected"][1]["value"]) for pair in pairs] == [
        ("a red kite .", "a red kite and a red cup ."), ("a blue cup .", "a red cup .")]
    assert all(pair["chosen"][0] == pair["rejected"][0] for pair in pairs)


# -- arms --


def test_arms_and_questions_name_what_exists():
    for text in [text for texts in [*SHARED.values(), *(arm.stages for arm in ARMS.values())] for text in texts]:
        assert set(study.names_in(text)) <= set(SHARED | ARMS), text
    assert {arm.start for arm in ARMS.values()} <= set(SHARED | ARMS) and set(DATA_MAKERS) <= set(SHARED)
    judged = {name for name, arm in ARMS.items() if arm.seeds} | {"own"}          # on seeds of its own
    for question in QUESTIONS:
        for claim in question.claims:
            assert {claim.arm, claim.reference} <= judged and claim.metric in LABELS
            assert claim.sign == 0 or claim.says
    assert {arm for arms in DATA_CURVE.values() for arm in arms} <= judged
    used = {name for question in QUESTIONS for claim in question.claims for name in (claim.arm, claim.reference)}
    assert judged - used <= {"teacher", "warm"}                # an arm answers a question


def test_every_command_of_the_study_is_accepted(tmp_path):
    runs = Study(config(tmp_path))
    for name, arm in ARMS.items():
        runs.add_judging(3, name)
    done, seed_dir = set(), runs.seed_dir(3)
    for (_, name), job in runs.jobs.items():
        assert set(job.needs) <= done                          # in an order in which they can run
        done.add(name)
        for command in job.commands:
            for flag in command[1:]:
                key, _, value = flag.partition("=")
                if value.startswith(f"{seed_dir}/") and key not in ("--out", "--out_dir"):
                    read = Path(value).relative_to(seed_dir).parts[0]
                    assert read in runs.needed(3, name) or read == f"{name}_1", (name, flag)      # is made before
            if command[0] == "train.py":
                settings = train.configure(command[1:])
                assert settings.seed == 3 and settings.device == "cpu" and "seed_3" in settings.out_dir
    commands = {name: job.commands for (_, name), job in runs.jobs.items()}
    assert "--teacher=" in commands["sft_sparse"][0] and "--kd_weight=0" in commands["sft_sparse"][0]
    assert f"--student={tmp_path}/out/seed_3/weak_then_strong_1" in commands["weak_then_strong"][1]
    assert f"--teacher={tmp_path}/out/seed_3/weak" in commands["weak_then_strong"][0]
    assert f"--out_dir={tmp_path}/out/seed_3/weak_then_strong_1" in commands["weak_then_strong"][0]
    assert [job.name for job in runs.stages_of(3, "dpo_sampled")] == ["d2d_first", "paper", "samples", "dpo_sampled"]


def test_which_runs(tmp_path):
    runs = chosen_runs(config(tmp_path))
    assert len(runs) == sum(arm.seeds for arm in ARMS.values())
    assert runs == sorted(runs, key=lambda run: run[0])        # seed by seed
    assert chosen_runs(config(tmp_path, arms="jsd,kd", seeds="5-6,100")) == [
        (5, "jsd"), (5, "kd"), (6, "kd"), (100, "jsd"), (100, "kd")]     # jsd counts six seeds
    assert parse_seeds("0-2,100") == [0, 1, 2, 100]
    with pytest.raises(UserError, match="--arms: found 'sftt'"):
        chosen_runs(config(tmp_path, arms="sftt"))
    for wrong in ("1-", "", "²", "5-3", "1,,2", "-1", "9" * 5000, "0-99999999999", "0-300000000", "0-500,0-500"):
        with pytest.raises(UserError, match=f"--seeds: found '{wrong[:20]}.*at most 1,000 seeds"):
            parse_seeds(wrong)
    with pytest.raises(UserError, match="scale is 1e.308, expected a positive number, at most 10"):
        study.main(["--scale=1e308"])


def test_a_line_of_other_settings_is_refused(tmp_path):
    line = make_lines()[0] | {"arm": "kd", "seed": 0,
                              "settings": {"start": "warm", "stages": ["d2d --max_steps=9"], "scale": 1.0}}
    (tmp_path / "raw.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match="raw.jsonl line 1: arm kd was run with other settings"):
        Study(config(tmp_path))
    for other in ({}, {"a": 1}, 1, "x", line | {"scores": {}}):
        (tmp_path / "raw.jsonl").write_text(json.dumps(other) + "\n")
        with pytest.raises(UserError, match="raw.jsonl line 1: expected a run of a known arm"):
            Study(config(tmp_path))
    with pytest.raises(UserError, match="a folder, not a file"):
        Study(config(tmp_path, results=str(tmp_path)))


def test_a_damaged_record_of_a_job_is_named(tmp_path):
    plans = Study(config(tmp_path))
    plans.add_making(0, "world")
    job = plans.jobs[0, "world"]
    whole = {"commands": job.commands, "cpu_s": [1.0], "wall_s": [2.0]}
    record = plans.record_path(job)
    record.parent.mkdir(parents=True)
    for wrong in ({"cpu_s": None}, {"wall_s": ["x"]}, {"cpu_s": [1.0] * 9}, {"commands": []}, {"commands": None}):
        record.write_text(json.dumps(whole | wrong))
        with pytest.raises(UserError, match="jobs/world.json: was made by other commands than today's, or is damaged"):
            plans.add(job)
    record.write_text(json.dumps(whole))
    plans.add(job)
    assert job.cpu_s == [1.0] and plans.is_done(0, "world")


# -- the report --


def make_lines():
    """Made-up scores of all arms: each arm has an effect of its own, each seed a level."""
    rng, lines = random.Random(0), []
    for seed in [*range(10), *OWN_SEEDS, 100, 101]:
        level = rng.gauss(0, 3)
        for name, arm in ARMS.items():
            if seed < arm.seeds or seed in (100, 101) or seed in OWN_SEEDS and name in ("own", "paper", "dpo_sampled"):
                scores = {metric: 80 + level + len(name) / 3 + rng.gauss(0, 0.5) for metric in LABELS}
                scores |= {"kl": 0.1 + rng.random() / 100, "kl_caption": 0.2 + rng.random() / 100}
                lines.append({"arm": name, "seed": seed, "settings": study.settings(name, study.Config(DEFAULTS)),
                              "scores": scores, "flops": 1e12 * (arm.stages != []),
                              "cpu_s": {"training": 30.0 if seed in OWN_SEEDS else 20.0, "judging": 10.0, "shared": {"world": 30.0}}})
    return lines


def test_the_report_is_made_from_the_lines_alone_and_twice_the_same(tmp_path):
    pytest.importorskip("matplotlib")
    raw, page, assets = tmp_path / "raw.jsonl", tmp_path / "page.md", tmp_path / "assets"
    raw.write_text("".join(json.dumps(line) + "\n" for line in make_lines()))
    page.write_text(f"# Title\n\nby hand\n\n{BEGIN}\nold\n{END}\nalso by hand\n")
    contents = []
    for _ in range(2):
        study.main([f"--results={raw}", f"--page={page}", f"--assets={assets}", "--report"])
        contents.append({path.name: path.read_bytes() for path in [page, *assets.iterdir()]})
    assert contents[0] == contents[1] and set(contents[0]) == {"page.md", "study_findings.svg", "study_data.svg"}
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# Title\n\nby hand\n\n{BEGIN}\n") and text.endswith(f"{END}\nalso by hand\n")
    assert "old" not in text
    for question in QUESTIONS:
        assert f"## {question.title}" in text
        for claim in question.claims:
            assert f"| {claim.arm} − {claim.reference}" in text
    lines = read_results(raw)
    finding = compare([Claim("kd", "sft")], lines, range(10))[0]
    assert finding.n == 10
    assert "| kd | 10 |" in text and "| sft_lr5e-4 | 2 |" in text       # all arms; the tuning seed apart
    first, fresh = text.split("The same on the seeds 20 to 29:")        # arms that have both kinds of seeds
    assert "| paper | 10 |" in first and "| own | 10 |" in fresh and "| own | 10 |" not in first
    scores = [lines["paper", seed]["scores"]["score"] for seed in range(10)]
    row = next(line for line in text.split("## The operating point")[1].splitlines() if line.startswith("| paper |"))
    assert f"| {mean(scores):.1f} ± {stdev(scores):.1f} |" in row
    times = {line.split(" | ")[0]: line.split(", ")[-2:] for line in text.splitlines() if " − " in line and line.endswith(" s |")}
    assert times["| dpo_sampled − paper, halluc. resp."] == ["20 s", "20 s |"] and times["| own − paper"] == ["30 s", "30 s |"]
    assert f"| {finding.mean:+.1f} |".replace("-", "−") in text


def test_the_report_says_what_it_would_ignore_and_writes_the_page_last(tmp_path):
    pytest.importorskip("matplotlib")
    for flag in ("--arms=sft", "--seeds=0", "--jobs=3", "--out_dir=x", "--scale=0.5"):
        with pytest.raises(UserError, match="here it would be ignored"):
            study.main(["--report", flag])
    for flag in ("--page=x.md", "--assets=x"):
        with pytest.raises(UserError, match="belongs to --report"):
            study.main([flag])
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(line) + "\n" for line in make_lines()))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="study_findings.svg: cannot be written"):
        write_report(tmp_path / "raw.jsonl", tmp_path / "page.md", tmp_path / "file")
    with pytest.raises(UserError, match="a folder, not a file"):
        write_report(tmp_path / "raw.jsonl", Path(""), tmp_path / "assets")
    assert sorted(os.listdir(tmp_path)) == ["file", "raw.jsonl"]


def test_a_damaged_raw_file_or_page_is_one_line(tmp_path):
    raw, page = tmp_path / "raw.jsonl", tmp_path / "page.md"
    lines = make_lines()[:1]
    for bad in (lines * 2, [{"arm": "kd"}], [lines[0] | {"arm": "unheard_of"}], ["text"], [lines[0] | {"scores": {}}],
                [lines[0] | {"cpu_s": {}}], [lines[0] | {"flops": "x"}], [lines[0] | {"seed": None}],
                [lines[0] | {"scores": lines[0]["scores"] | {"kl": math.inf}}]):
        raw.write_text("".join(json.dumps(line) + "\n" for line in bad))
        with pytest.raises(UserError, match="expected a run of a known arm"):
            write_report(raw, page, tmp_path)
    raw.write_text(json.dumps(lines[0]) + "\n")
    page.write_text("no markers")
    with pytest.raises(UserError, match="page.md: lacks the line"):
        write_report(raw, page, tmp_path)
    with pytest.raises(UserError, match="run python -m tools.study first"):
        write_report(tmp_path / "none.jsonl", page, tmp_path)


@pytest.mark.parametrize("accuracies, steps", [([71.0], 450), ([50.0, 69.9, 70.0], 800), ([50.0] * 5, 1500)])
def test_the_warm_student_is_the_first_that_is_past_chance(tmp_path, monkeypatch, accuracies, steps):
    """Or the last one, if none is."""
    def fake_train(arguments):
        settings = dict(argument.removeprefix("--").split("=") for argument in arguments[1:])
        folder = tmp_path / settings["out_dir"]
        (folder / "state").mkdir(parents=True)
        (folder / "steps").write_text(settings["max_steps"])

    def fake_evaluate(arguments):
        folder = tmp_path / next(argument for argument in arguments if "out_dir" in argument).removeprefix("--out_dir=")
        folder.mkdir()
        accuracy = accuracies[len(list(tmp_path.rglob("*_judged"))) - 1]
        (folder / "results.json").write_text(json.dumps({"pope": {"accuracy": accuracy}}))

    monkeypatch.setattr(train, "main", fake_train)
    monkeypatch.setattr(evaluate, "main", fake_evaluate)
    plans = Study(load_config(DEFAULTS, [f"--out_dir={tmp_path}", f"--results={tmp_path}/none.jsonl"]))
    plans.add_making(0, "warm")
    [(first, *command)] = plans.jobs[0, "warm"].commands
    assert first == "warm" and f"--student={tmp_path}/seed_0/warm_align" in command
    plans.train_warm(0, command)
    assert (tmp_path / "seed_0/warm/steps").read_text() == str(steps)
    assert len(list(tmp_path.rglob("*_judged"))) == len(accuracies) and not (tmp_path / "seed_0/warm/state").exists()


# -- a toy study, from nothing to its lines --

TOY = ["--scale=0.01", "--arms=sft,kd", "--seeds=0-1", "--results=raw.jsonl", "--out_dir=out"]


def start_study(folder, *flags):
    """In a forked process, which need not load torch again -> its number."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.chdir(folder)
            sys.stdout = sys.stderr = open("output.txt", "w")
            study.main([*TOY, *flags])
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return pid


def wait_for_study(folder, pid):
    """-> what it printed."""
    _, status = os.waitpid(pid, 0)
    output = (folder / "output.txt").read_text()
    assert status == 0, output
    return output


def raw_lines(folder):
    """Without the CPU seconds, which differ from run to run."""
    return [json.loads(line) | {"cpu_s": None} for line in (folder / "raw.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    wait_for_study(folder, start_study(folder))
    return folder


def test_toy_study(toy):
    lines = raw_lines(toy)
    assert [(line["seed"], line["arm"]) for line in lines] == [
        (seed, arm) for seed in (0, 1) for arm in ("teacher", "sft", "kd")]
    for line in lines:
        assert line["settings"] == {"start": line["arm"] if line["arm"] == "teacher" else "warm", "scale": 0.01,
                                    "stages": {"teacher": [], "sft": ["sft"], "kd": ["d2d"]}[line["arm"]]}
        scores = line["scores"]
        assert set(LABELS) | {"unseen_f1", "unseen_phantom"} <= set(scores)
        assert scores["score"] == pytest.approx((scores["yes_no"] + scores["existence"] + scores["color"]) / 3, abs=1e-3)
        if line["arm"] == "teacher":
            assert scores["kl"] == 0 and scores["agree_right"] in (0, 100) and line["flops"] == 0
        else:
            assert scores["kl"] > 0.01 and line["flops"] > 0
    assert lines[2]["flops"] > 1.2 * lines[1]["flops"]         # the teacher's forward passes
    numbers = [json.loads(line)["cpu_s"] for line in (toy / "raw.jsonl").read_text().splitlines()]
    assert set(numbers[0]["shared"]) == {"world", "vision", "llm_teacher", "teacher_align", "teacher"}
    assert set(numbers[1]["shared"]) == {*numbers[0]["shared"], "llm_student", "warm_align", "warm"}
    assert numbers[1]["training"] > 0 and numbers[1]["judging"] > 0

    before = (toy / "raw.jsonl").read_bytes()                  # again: nothing to do
    assert "0 runs to do, 6 are in raw.jsonl" in wait_for_study(toy, start_study(toy))
    assert (toy / "raw.jsonl").read_bytes() == before


def test_the_flops_of_commands_that_toy_arms_do_not_have(toy, monkeypatch):
    """Answering a row costs the teacher about a forward pass; own answers cost more than the data's."""
    monkeypatch.chdir(toy)
    plans = Study(load_config(DEFAULTS, TOY))
    for name in ("answers", "on_policy", "kd"):
        plans.add_making(0, name)
    answers, own, kd = (study.flops(plans.jobs[0, name].commands[0]) for name in ("answers", "on_policy", "kd"))
    rows, steps = len(load(toy / "out/seed_0/world/train/arm.json")), 2
    assert 0.3 < (answers / rows) / (kd / (steps * 32)) < 1    # a step: teacher 1, student 3 passes of a third of the width
    assert 1.1 * kd < own < 2 * kd


def test_a_forked_command_does_what_the_typed_one_does(toy):
    """The command of the log, with python in front."""
    log = (toy / "out/seed_0/logs/sft.log").read_text().splitlines()[0]
    typed = log.removeprefix("$ OMP_NUM_THREADS=1 python ").split()
    typed = [str(ROOT / "train.py"), *(flag.replace("seed_0/sft", "seed_0/typed") for flag in typed[1:])]
    subprocess.run([sys.executable, *typed], cwd=toy, check=True, capture_output=True)
    weights = [(toy / f"out/seed_0/{name}/model.safetensors").read_bytes() for name in ("sft", "typed")]
    assert weights[0] == weights[1]


def test_a_killed_study_goes_on_to_the_same_lines(toy, tmp_path):
    folder = tmp_path.parent / "killed"                        # as deep as toy: the commands are the same
    shutil.copytree(toy, folder)
    seed = folder / "out/seed_1"
    for name in ("sft", "kd"):
        shutil.rmtree(seed / name)
        shutil.rmtree(seed / "judged" / name)
        for job in (name, f"judge_{name}"):
            (seed / "jobs" / f"{job}.json").unlink()
    lines = (folder / "raw.jsonl").read_text().splitlines(keepends=True)
    (folder / "raw.jsonl").write_text("".join(lines[:3]))      # seed 0; the teacher of seed 1 is judged, not written
    pid = start_study(folder, "--jobs=1")
    deadline = time.time() + 120
    while len(raw_lines(folder)) < 5 and time.time() < deadline:         # teacher and sft of seed 1
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert len(raw_lines(folder)) == 5
    assert "1 runs to do, 5 are in raw.jsonl" in wait_for_study(folder, start_study(folder))
    assert raw_lines(folder) == raw_lines(toy)
