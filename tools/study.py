"""
The findings, re-run with seeds and error bars.

    python -m tools.study                        every arm on its counted seeds: hours; the same command continues
    python -m tools.study --arms=sft,kd --seeds=0-2         some of it
    python -m tools.study --report               docs/study.md and its figures from docs/study.jsonl, running nothing

A seed is a world of its own: scenes, base models, teacher, and a warm student that all arms of the seed start from,
trained until it is past the point where yes/no questions are learned (`train_warm`).
Within a seed the arms share all of it, the order of the data included, so what is reported is the paired difference
of two arms. Arms and questions are plain data (study_arms.py), the statistics are in study_report.py.

Seeds from 100 on are for tuning: they are judged on validation scenes, and the report has them in a table of their own.

Every step is a command that can be typed as it stands in OUT_DIR/seed_N/logs/NAME.log. It runs in a forked copy of
this process, which has torch and the programs loaded already: starting Python anew for each would take as long as the
training. OUT_DIR/seed_N/jobs/NAME.json says what is done and how much CPU time it took.
"""
import ctypes
import importlib
import json
import os
import re
import runpy
import shutil
import signal
import string
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import torch

import evaluate
import tiny.__main__
import tools.answer
import train
from benchmarks.common import percent
from configurator import NON_NEGATIVE, Config, UserError, check_uses, check_values, load_config, run, spell
from data import collate
from engine.files import claim, atomic, read_json, read_rows, write_json
from engine.index import InstructionData
from losses import forward_kl
from model import Llava
from tiny.benchmarks import GQA_TYPES
from tiny.rows import chosen_rows, write_rows
from tiny.study import better_answers, read_scenes
from tools import plan
from tools.look import is_number
from tools.study_arms import ARMS, DATA_MAKERS, SHARED
from tools.study_report import require_line, write_report

DEFAULTS = dict(
    arms="",                    # names with commas; empty: all
    seeds="",                   # "0-9" or "100,101"; empty: those that each arm counts
    jobs=0,                     # processes at a time, of one thread each; 0: as many as there are cores
    out_dir="out/study",
    results="docs/study.jsonl",
    report=False,               # only write the report
    page="docs/study.md",       # what --report writes
    assets="assets",            # and where its figures go
    scale=1.0,                  # of the numbers of scenes and steps; below 1 for tests
)
WARM_STEPS = [450, 600, 800, 1100, 1500]
WARM_ACCURACY = 70.0            # percent of the check set's yes/no questions; chance is 50. The last run counts in any case
TUNING = 100                    # seeds from here on are judged on validation scenes
MAX_SEEDS = 1000                # in one command
ROOT = Path(__file__).resolve().parents[1]
IN_WORLD = {"world": "", "vision": "base/vision", "llm_teacher": "base/llm_teacher", "llm_student": "base/llm_student"}
JUDGES = "--benchmark=pope,gqa,objhal --batch_size=256 --max_new_tokens=40 --device=cpu"
PROGRAMS = {"train.py": "train.py", "evaluate.py": "evaluate.py", "tiny": "tiny/__main__.py", "tools.answer": "tools/answer.py"}
PRELOADED = (evaluate, tiny.__main__, tools.answer, train)        # forked copies need not import them again


def main(argv: list[str]) -> None:
    config = load_config(DEFAULTS, argv)
    check_values(config, {"jobs": NON_NEGATIVE, "scale": tiny.__main__.SCALE})
    check_uses(config, DEFAULTS, [
        (["arms", "seeds", "jobs", "out_dir", "scale"], not config.report, "runs without --report"),
        (["page", "assets"], config.report, "--report")])
    if config.report:
        return write_report(Path(config.results), Path(config.page), Path(config.assets))
    config.jobs = config.jobs or count_cores()
    study, chosen = Study(config), chosen_runs(config)
    claim(config.out_dir, "python -m tools.study")
    wanted = [(seed, arm) for seed, arm in chosen if (arm, seed) not in study.lines]
    for seed, arm in wanted:
        study.add_judging(seed, arm)
    print(f"{len(wanted)} runs to do, {len(study.lines)} are in {config.results}; {config.jobs} at a time", flush=True)
    importlib.import_module("torch._dynamo")   # AdamW imports it, for a second: here once, and not in every forked copy
    study.run()


def count_cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def chosen_runs(config: Config) -> list[tuple[int, str]]:
    """[(seed, arm)], seed by seed: wherever the study is stopped, what is there can be compared."""
    names = config.arms.split(",") if config.arms else [name for name, arm in ARMS.items() if arm.seeds]
    for name in names:
        if name not in ARMS:
            raise UserError(f"--arms: found {name!r}, expected some of {', '.join(ARMS)}")
    counted = range(max(arm.seeds for arm in ARMS.values()))
    runs = []
    for seed in parse_seeds(config.seeds) if config.seeds else counted:
        runs += [(seed, name) for name in names if seed >= len(counted) or seed < ARMS[name].seeds]
    return runs


def parse_seeds(text: str) -> list[int]:
    """ "0-2,100" -> [0, 1, 2, 100] """
    seeds = []
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        new = range(int(found[1]), int(found[2] or found[1]) + 1) if found else []
        if not new or len(seeds) + len(new) > MAX_SEEDS:
            raise UserError(f"--seeds: found {spell(text)}, expected numbers and ranges, such as 0-9 or 0,1,100-102, of at "
                            f"most {MAX_SEEDS:,} seeds")
        seeds += new
    return seeds


# -----------------------------------------------------------------------------
# From an arm to its commands

@dataclass
class Job:
    """Commands that run one after the other, when the jobs that they need are done."""
    seed: int
    name: str                                  # of a model or of rows ("teacher", "kd"), or "judge NAME"
    commands: list[list[str]]
    needs: list[str]                           # names of jobs of the same seed
    cpu_s: list[float] = field(default_factory=list)     # of the commands that are done
    wall_s: list[float] = field(default_factory=list)


def names_in(text: str) -> list[str]:
    """ "--student={warm} --teacher={teacher}" -> ["warm", "teacher"] """
    return [name for _, name, _, _ in string.Formatter().parse(text) if name]


class Study:
    def __init__(self, config: Config):
        self.config = config
        self.jobs: dict[tuple[int, str], Job] = {}             # in an order in which they can run
        self.lines = read_lines(config)

    # Folders

    def seed_dir(self, seed: int) -> Path:
        return Path(self.config.out_dir) / f"seed_{seed}"

    def folder(self, seed: int, name: str) -> Path:
        if name in IN_WORLD:
            return self.seed_dir(seed) / "world" / IN_WORLD[name]
        return self.seed_dir(seed) / name

    # Jobs

    def add_judging(self, seed: int, arm: str) -> None:
        """The job that judges an arm, and all that it needs."""
        if (seed, f"judge {arm}") in self.jobs:
            return
        self.add_making(seed, arm)
        if arm != "teacher":                                   # agreement is measured with its answers
            self.add_judging(seed, "teacher")
        model, judged = self.folder(seed, arm), self.seed_dir(seed) / "judged" / arm
        commands = [["evaluate.py", f"--model={model}", f"--data={self.folder(seed, 'world')}/{bench}",
                     f"--out_dir={judged}/{bench}", *JUDGES.split()] for bench in ("bench", "bench_unseen")]
        needs = [arm] + ["judge teacher"] * (arm != "teacher")
        self.add(Job(seed, f"judge {arm}", [*commands, ["measure"]], needs))

    def add_making(self, seed: int, name: str) -> None:
        """The job that makes a model or rows, and all that it needs."""
        if (seed, name) in self.jobs:
            return
        texts = self.texts(name)
        names = dict.fromkeys(other for text in texts for other in names_in(text))
        needs = [other for other in names if other in (SHARED | ARMS) and other != name]
        for other in needs:
            self.add_making(seed, other)
        commands = [self.command_line(seed, name, text, i, len(texts)) for i, text in enumerate(texts)]
        if name == "samples":
            commands.append(["pairs"])
        if name == "warm":
            commands = [["warm", *commands[0]]]
        self.add(Job(seed, name, commands, needs))

    def texts(self, name: str) -> list[str]:
        """What makes it, as in study_arms.py, with what an arm's stages have in common written out."""
        if name in SHARED:
            return SHARED[name]
        arm, texts = ARMS[name], []
        for i, text in enumerate(arm.stages):
            stage, *flags = text.split()
            start = f"{name}_{i}" if i else arm.start          # its own earlier stage
            rows = "pd" if stage == "pd" else "arm"
            common = ["--student={%s}" % start, "--data={world}/train/%s.json" % rows]
            common += ["--teacher={teacher}"] * (stage != "sft")
            given = [flag.split("=")[0] for flag in flags]
            common = [flag for flag in common if flag.split("=")[0] not in given]
            texts.append(" ".join([f"config/study/{stage}.py", *common, *flags]))
        return texts

    def command_line(self, seed: int, name: str, text: str, stage: int, stages: int) -> list[str]:
        """One command, as it could be typed."""
        folders = {other: self.folder(seed, other) for other in names_in(text)}
        program, *flags = text.format(**folders).split()
        world, images = self.folder(seed, "world"), f"--image_dir={self.folder(seed, 'world')}/train/images"
        if program == "tiny":
            preset = "tuning" if seed >= TUNING else "study"
            return ["-m", "tiny", f"--out_dir={world}", f"--preset={preset}", f"--seed={seed}",
                    f"--scale={self.config.scale}", *flags]
        if program == "answer":
            return ["-m", "tools.answer", images, "--max_new_tokens=40",
                    "--batch_size=64", "--device=cpu", *flags]
        out_dir = self.folder(seed, name) if stage == stages - 1 else self.seed_dir(seed) / f"{name}_{stage + 1}"
        settings = [os.path.relpath(ROOT / program), images, f"--out_dir={out_dir}", f"--seed={seed}", "--device=cpu", *flags]
        if self.config.scale != 1:
            steps = load_config(train.DEFAULTS, settings).max_steps
            settings.append(f"--max_steps={max(2, round(self.config.scale * steps))}")
        return ["train.py", *settings]

    def add(self, job: Job) -> None:
        """Remember the job, and what of it was done earlier."""
        record = self.record_path(job)
        if record.is_file():
            found = read_json(record)
            times = [found.get(key) for key in ("cpu_s", "wall_s")]
            whole = all(isinstance(some, list) and len(some) <= len(job.commands) and all(map(is_number, some))
                        for some in times)
            if not whole or found.get("commands") != job.commands:
                raise UserError(f"{record}: was made by other commands than today's, or is damaged; choose another "
                                f"--out_dir, or delete {self.seed_dir(job.seed)}")
            job.cpu_s, job.wall_s = times
        self.jobs[job.seed, job.name] = job

    def record_path(self, job: Job) -> Path:
        return self.seed_dir(job.seed) / "jobs" / f"{job.name.replace(' ', '_')}.json"

    def is_done(self, seed: int, name: str) -> bool:
        job = self.jobs[seed, name]
        return len(job.cpu_s) == len(job.commands)

    # Running

    def run(self) -> None:
        """Start jobs whenever there is a free slot, in order, each when what it needs is done."""
        for job in self.jobs.values():                         # judged before the study was killed, but not yet written
            if job.name.startswith("judge ") and self.is_done(job.seed, job.name):
                self.append_line(job)
        waiting = [job for job in self.jobs.values() if not self.is_done(job.seed, job.name)]
        running: dict[int, tuple[Job, float]] = {}             # pid -> job, when its command began
        failed: dict[tuple[int, str], str] = {}
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            while waiting or running:
                for job in list(waiting):
                    lost = [need for need in job.needs if (job.seed, need) in failed]
                    if lost:
                        waiting.remove(job)
                        failed[job.seed, job.name] = f"needs {lost[0]}"
                    elif len(running) < self.config.jobs and all(self.is_done(job.seed, need) for need in job.needs):
                        waiting.remove(job)
                        running[self.start(job)] = job, time.time()
                if not running:
                    break
                pid, status, usage = os.wait4(-1, 0)
                job, began = running.pop(pid)
                if status:
                    failed[job.seed, job.name] = f"ended with exit code {os.waitstatus_to_exitcode(status)}, see {self.log_path(job)}"
                    print(f"seed {job.seed} {job.name}: {failed[job.seed, job.name]}", file=sys.stderr, flush=True)
                    continue
                self.finish_command(job, usage.ru_utime + usage.ru_stime, time.time() - began)
                if not self.is_done(job.seed, job.name):
                    running[self.start(job)] = job, time.time()
                elif job.name.startswith("judge "):
                    self.append_line(job)
                    self.say_progress(job, waiting, running)
        finally:
            for pid in running:
                os.kill(pid, signal.SIGTERM)                   # train.py ends its step and saves
            for pid in running:
                os.waitpid(pid, 0)
        if failed:
            names = ", ".join(f"seed {seed} {name} ({why})" for (seed, name), why in list(failed.items())[:4])
            raise UserError(f"{len(failed)} jobs are missing: {names}; mend it and repeat the command")

    def start(self, job: Job) -> int:
        """Fork a process for the job's next command."""
        command, log = job.commands[len(job.cpu_s)], self.log_path(job)
        log.parent.mkdir(parents=True, exist_ok=True)
        if command[:2] == ["-m", "tools.answer"]:
            self.folder(job.seed, job.name).mkdir(parents=True, exist_ok=True)
        action = {"pairs": lambda: self.make_pairs(job.seed),
                  "warm": lambda: self.train_warm(job.seed, command[1:]),
                  "measure": lambda: self.measure(job.seed, job.name.removeprefix("judge "))}.get(command[0])
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            run_command(command, log, action)
        return pid

    def log_path(self, job: Job) -> Path:
        return self.seed_dir(job.seed) / "logs" / f"{job.name.replace(' ', '_')}.log"

    def finish_command(self, job: Job, cpu_s: float, wall_s: float) -> None:
        for argument in job.commands[len(job.cpu_s)]:
            if argument.startswith("--out_dir="):              # of a finished run nothing will be resumed
                shutil.rmtree(Path(argument.removeprefix("--out_dir=")) / "state", ignore_errors=True)
        job.cpu_s.append(round(cpu_s, 2))
        job.wall_s.append(round(wall_s, 2))
        write_json(self.record_path(job), {"commands": job.commands, "cpu_s": job.cpu_s, "wall_s": job.wall_s})

    def say_progress(self, job: Job, waiting: list[Job], running: dict) -> None:
        times = defaultdict(list)                              # seconds by the name of the job, over all seeds
        for other in self.jobs.values():
            if self.is_done(other.seed, other.name):
                times[other.name].append(sum(other.wall_s))
        average = mean(seconds for some in times.values() for seconds in some)
        left = sum(mean(times.get(other.name, [average])) for other in waiting) / self.config.jobs
        todo = sum(other.name.startswith("judge ") for other in [*waiting, *(job for job, _ in running.values())])
        line = self.lines[job.name.removeprefix("judge "), job.seed]
        print(f"seed {job.seed} {line['arm']}: score {line['scores']['score']:.1f}, KL {line['scores']['kl']:.3f}; {todo} "
              f"runs and {left / 60:.0f} min left", flush=True)

    # What is more than a command

    def train_warm(self, seed: int, command: list[str]) -> None:
        """The warm student: the first of ever longer runs that answers enough yes/no questions of a check set.

        When a student gets from chance to that differs by a factor of three between seeds; below it, arms would be
        compared by who is lucky enough to get there.
        """
        warm = self.folder(seed, "warm")
        arguments = [argument for argument in command[1:] if not argument.startswith(("--out_dir=", "--max_steps="))]
        for steps in WARM_STEPS:
            folder = self.seed_dir(seed) / f"warm_{steps}"
            train_arguments = [*arguments, f"--out_dir={folder}", f"--max_steps={max(2, round(self.config.scale * steps))}"]
            judge_arguments = [f"--model={folder}", f"--data={self.folder(seed, 'world')}/check", f"--out_dir={folder}_judged",
                               "--benchmark=pope", *JUDGES.split()[1:]]
            print("$ python train.py", *train_arguments, flush=True)
            train.main(train_arguments)
            print("$ python evaluate.py", *judge_arguments, flush=True)
            evaluate.main(judge_arguments)
            if read_json(Path(f"{folder}_judged") / "results.json")["pope"]["accuracy"] >= WARM_ACCURACY:
                break
        shutil.rmtree(warm, ignore_errors=True)
        shutil.copytree(folder, warm, ignore=shutil.ignore_patterns("state"))

    def make_pairs(self, seed: int) -> None:
        folder = self.folder(seed, "samples")
        first, second = ([row for _, row in read_rows(folder / f"{i}.json")] for i in (1, 2))
        pairs = better_answers(first, second, read_scenes(self.folder(seed, "world") / "train/scenes.jsonl"))
        write_rows(folder / "chosen.json", chosen_rows(pairs))
        write_rows(folder / "pairs.json", pairs)
        print(f"{len(pairs)} pairs from {len(first)} questions")

    def measure(self, seed: int, arm: str) -> None:
        """All numbers of a judged arm, as a file for `append_line`."""
        world, judged, teacher = (self.folder(seed, "world"), self.seed_dir(seed) / "judged" / arm,
                                  self.seed_dir(seed) / "judged" / "teacher")
        scores = read_scores(judged / "bench", teacher / "bench", world / "bench")
        unseen = read_scores(judged / "bench_unseen", teacher / "bench_unseen", world / "bench_unseen")
        scores |= held_out_kl(self.folder(seed, arm), self.folder(seed, "teacher"), world / "train")
        scores |= {f"unseen_{name}": value for name, value in unseen.items()}
        commands = [command for job in self.stages_of(seed, arm) for command in job.commands]
        write_json(judged / "measured.json", {"scores": scores, "flops": sum(map(flops, commands))})

    def stages_of(self, seed: int, arm: str) -> list[Job]:
        """The jobs that are an arm's own work: from the warm student on, with the making of its rows."""
        if arm in DATA_MAKERS:
            return [self.jobs[seed, arm]]
        if arm not in ARMS or not ARMS[arm].stages:
            return []
        job = self.jobs[seed, arm]
        earlier = {ARMS[arm].start, *(name for name in job.needs if name in DATA_MAKERS)}
        return [other for name in sorted(earlier) for other in self.stages_of(seed, name)] + [job]

    def needed(self, seed: int, name: str) -> dict[str, Job]:
        """All jobs behind a job, itself included."""
        found = {name: self.jobs[seed, name]}
        for need in self.jobs[seed, name].needs:
            found |= self.needed(seed, need)
        return found

    def append_line(self, job: Job) -> None:
        arm = job.name.removeprefix("judge ")
        if (arm, job.seed) in self.lines:
            return
        measured = read_json(self.seed_dir(job.seed) / "judged" / arm / "measured.json")
        own = self.stages_of(job.seed, arm)
        shared = [other for name, other in self.needed(job.seed, job.name).items()
                  if name in SHARED and other not in own]
        cpu_s = {"training": sum(sum(other.cpu_s) for other in own), "judging": sum(job.cpu_s),
                 "shared": {other.name: round(sum(other.cpu_s), 1) for other in sorted(shared, key=lambda job: job.name)}}
        self.lines[arm, job.seed] = {
            "arm": arm, "seed": job.seed, "settings": settings(arm, self.config),
            "scores": {name: None if value is None else round(value, 4)      # None: a mean over nothing
                       for name, value in measured["scores"].items()},
            "flops": measured["flops"],
            "cpu_s": {key: value if key == "shared" else round(value, 1) for key, value in cpu_s.items()}}
        order = list(ARMS)                                     # the file does not depend on which run ended first
        lines = sorted(self.lines.values(), key=lambda line: (line["seed"], order.index(line["arm"])))
        with atomic(self.config.results) as tmp:
            tmp.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def settings(arm: str, config: Config) -> dict:
    """What an arm is, whichever version of the code ran it."""
    return {"start": ARMS[arm].start, "stages": ARMS[arm].stages, "scale": config.scale}


def read_lines(config: Config) -> dict[tuple[str, int], dict]:
    """{(arm, seed): its line of the results}."""
    lines = {}
    for where, line in read_rows(config.results) if Path(config.results).exists() else []:
        require_line(where, line, lines)
        if line.get("settings") != settings(line["arm"], config):
            raise UserError(f"{where}: arm {line['arm']} was run with other settings than today's; choose another "
                            "--results, or remove the line to run it again")
        lines[line["arm"], line["seed"]] = line
    return lines


def run_command(command: list[str], log: Path, action: Callable | None) -> None:
    """In a forked process: what `python COMMAND` would do, with the output in a file. Does not return."""
    code = 1
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)         # PR_SET_PDEATHSIG: not to outlive a killed study
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)           # Ctrl-C reaches all; the study tells when to end
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        print("$ OMP_NUM_THREADS=1 python", *command, flush=True)
        torch.set_num_threads(1)
        if action is not None:
            action()
        else:
            sys.argv = command[1:] if command[0] == "-m" else command
            runpy.run_path(str(ROOT / PROGRAMS[sys.argv[0]]), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# -----------------------------------------------------------------------------
# The numbers of a run

def read_scores(judged: Path, teacher: Path, bench: Path) -> dict[str, float]:
    """What evaluate.py has measured, how often the answer is the teacher's, and how often a missing partner is named."""
    results = read_json(judged / "results.json")
    pope, kinds, captions = results["pope"], results["gqa"]["by_type"], results["objhal"]
    scores = {"f1": pope["f1"], "yes_no": pope["accuracy"], "yes_rate": pope["yes_ratio"]}
    scores |= {name: kinds[f"semantic: {GQA_TYPES[kind]}"]["accuracy"] for name, kind in
               (("existence", "exist"), ("color", "color"), ("count", "count"), ("which", "which"))}
    scores |= {"resp": captions["chair_s"], "ment": captions["chair_i"], "coverage": captions["recall"]}
    scores["mean4"] = mean(scores[name] for name in ("existence", "color", "count", "which"))
    scores["score"] = mean(scores[name] for name in ("yes_no", "existence", "color"))

    same = {1.0: [], 0.0: []}                                  # the teacher's answer is right, wrong
    for name in ("pope", "gqa"):
        ours, theirs = ([row for _, row in read_rows(folder / name / "scored.jsonl")] for folder in (judged, teacher))
        for our, their in zip(ours, theirs, strict=True):
            same[their["score"]].append(our["parsed"] == their["parsed"])
    scores |= {name: percent(sum(hits), len(hits)) for name, hits in (("agree_right", same[1.0]), ("agree_wrong", same[0.0]))}
    scores["teacher_wrong"] = len(same[0.0])

    scenes, named = read_scenes(bench / "scenes.jsonl"), []
    for _, row in read_rows(judged / "objhal" / "scored.jsonl"):
        partner, _ = scenes[f"objhal/{row['question_id']}"].missing_partner()
        if partner:
            named.append(partner in row["parsed"])
    return scores | {"phantom": percent(sum(named), len(named))}


@torch.no_grad()
def held_out_kl(student: Path, teacher: Path, folder: Path) -> dict[str, float]:
    """KL(teacher || student) in nats per response token, of questions and of captions."""
    student, teacher = Llava.from_pretrained(student).eval(), Llava.from_pretrained(teacher).eval()
    model, path = student.config, folder / "held_out.json"
    rows = InstructionData([(str(path), 1.0)], str(folder / "images"), student.tokenizer, model.template,
                           model.image_tokens, model.vision.image_size, 128)
    is_caption = torch.tensor([row["id"].endswith("caption") for _, row in read_rows(path)])
    values = {"kl": [], "kl_caption": []}
    for start in range(0, len(rows), 64):
        numbers = range(start, min(start + 64, len(rows)))
        batch = collate([rows[number] for number in numbers], model.pad_token_id)
        at = batch["mask"][:, 1:]                              # (B, T-1) the next token belongs to a response
        logits = [llava(batch["input_ids"], batch["pixel_values"])[:, :-1][at] for llava in (student, teacher)]
        kl = forward_kl(*logits)                               # (N,)
        caption = is_caption[numbers.start:numbers.stop][torch.where(at)[0]]
        values["kl"].append(kl[~caption])
        values["kl_caption"].append(kl[caption])
    return {name: torch.cat(parts).mean().item() for name, parts in values.items()}


ANSWER_TOKENS = 4               # of an average row with its end token; the output head is 1 % of the arithmetic


def flops(command: list[str]) -> float:
    """What a command computes, by tools/plan.py's arithmetic."""
    if command[0] == "train.py":
        config = train.configure(command[1:])
        student, teacher = plan.build(config)
        lengths, steps = plan.measure_rows(config)
        tokens = float(lengths.mean())
        targets = {"response": ANSWER_TOKENS, "all": tokens - student.config.image_tokens,
                   "response+image": student.config.image_tokens + ANSWER_TOKENS}[config.kd_tokens]
        step = plan.flops(student, teacher, config, plan.Batch.of(config, config.batch_size, tokens, targets))
        return steps * sum(parts.total() for parts in step.values())
    if command[:2] == ["-m", "tools.answer"]:
        config = load_config(tools.answer.DEFAULTS, command[2:])
        rows = [row for _, row in read_rows(config.data)]
        llava = plan.describe(config.model)
        described = Config(train.DEFAULTS, stage="sft", student=config.model, data=config.data, image_dir=config.image_dir,
                           max_length=config.max_length, batch_size=1, micro_batch_size=1)
        lengths, _ = plan.measure_rows(described)
        batch = plan.Batch.of(described, len(rows), float(lengths.mean()), ANSWER_TOKENS)
        llava.requires_grad_(False)
        step = plan.flops(llava, None, described, batch)
        return step["ViT"].total() + step["student forward"].total()
    return 0.0


if __name__ == "__main__":
    run(main, __doc__, DEFAULTS)
