"""
Answer benchmarks with a checkpoint, score the answers the way the official scorers do, and report the numbers.

    python evaluate.py --model=out/pd --benchmark=pope,gqa --data=data/eval --out_dir=out/eval     answer and score
    python evaluate.py --answers=a.jsonl --benchmark=pope --data=data/eval --out_dir=out/eval      only score
    torchrun --nproc_per_node=8 evaluate.py --model=out/pd --benchmark=mme ...                     on 8 GPUs

A benchmark is three things: questions about images, a prompt, and a rule that turns free text into a score. The rule is
where the numbers of different papers diverge: POPE reads "None" as *yes*, MME reads "Not sure" as *no*, ScienceQA
rejects "A." and accepts "A. rock". Such rules look arbitrary, but a number is comparable with a published one only if
it was made by the same rule. So every rule here is the official one, oddities included. Each benchmark is one file in
benchmarks/, which names its oddities where they happen; docs/benchmarks.md says which files go where below --data.

out_dir receives
    NAME/answers.jsonl  {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}, one line per question
    NAME/scored.jsonl   how the rule read it: {"question_id", "text", "parsed", "gold", "score"}
    results.json        the numbers (percentages out of 100), each with the protocol that made it
    results.md          our numbers, below the paper's if the files are the official ones
The same command continues an interrupted run. An out_dir belongs to one model; several evaluations of that model may
write to it at once.
"""
from configurator import (POSITIVE, NON_NEGATIVE, Config, Stopped, UserError, check_uses, check_values, expected, load_config,
                          run, shorten, user_file)                   # first: from here on, Ctrl-C ends in one line

import difflib
import hashlib
import importlib
import json
import os
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from itertools import accumulate
from pathlib import Path

import torch

from benchmarks.common import Benchmark, Question, decode_image, need
from benchmarks.paper import markdown, other_files, our_row
from data import as_text, load_image, render, transform_image
from engine import prefix
from engine.distributed import Dist, init_distributed
from engine.files import (MARK, claim, digest_of_folder, disk_errors, lock, parse_json, read_json, read_rows, refuse_inputs,
                          release, write_json, write_lines, write_text)
from engine.hf import NOT_A_FOLDER, require_finite, require_tokenizer
from model import Llava

DEFAULTS = dict(
    benchmark="",               # one name of BENCHMARKS, or several separated by commas
    data="",                    # folder of the benchmark files (LLaVA's playground/data/eval)
    out_dir="",
    model="",                   # checkpoint folder that answers the questions
    answers="",                 # score this answer file instead; needs neither a model nor images
    # answering
    batch_size=16,              # questions per forward pass and rank; in fp32 the answers do not depend on it
    device="",                  # cpu | cuda; empty: cuda if there is one
    dtype="",                   # float32 | bfloat16 | float16; empty: bfloat16 on a GPU, else float32
    max_new_tokens=0,           # 0: the official limit of each benchmark, 128 or 1024
    crop=False,                 # center crop instead of padding to a square, as some official scripts do
    # single benchmarks
    questions="",               # own: a file of your own questions (benchmarks/own.py), instead of --data
    image_dir="",               # own: the folder of its images
    ocr=True,                   # textvqa: the prompt lists the reference OCR tokens, as in the paper
    vizwiz_split="val",         # val | test: test writes the submission to the official server and scores nothing
    mmhal_short=True,           # mmhal: ask for short answers, as the authors' script does
    objhal_extract=False,       # objhal: a chat model extracts the objects from each response, as in the paper
    # the chat model of mmhal (judge) and objhal (extraction)
    judge_url="",               # OpenAI-compatible endpoint, such as http://localhost:8000/v1
    judge_model="",             # its name there
    judge_key_env="",           # environment variable that holds the endpoint's key
)

# name -> class, in a module of benchmarks/ that is imported only if needed. A new benchmark is one file and one line.
BENCHMARKS = {
    "gqa": "gqa.GQA",
    "vizwiz": "vizwiz.VizWiz",
    "scienceqa": "scienceqa.ScienceQA",
    "textvqa": "textvqa.TextVQA",
    "mme": "mme.MME",
    "mmbench": "mmbench.MMBench",
    "mmbench_cn": "mmbench.MMBenchCN",
    "pope": "pope.POPE",
    "objhal": "objhal.ObjHal",
    "mmhal": "mmhal.MMHal",
    "amber": "amber.AMBER",
    "own": "own.Own",
}


def main(argv: list[str]) -> None:
    config = load_config(DEFAULTS, argv)
    check(config)
    benchmarks = [open_benchmark(name, config) for name in config.benchmark.split(",")]
    try:
        if config.answers:
            score_file(benchmarks[0], config)
        else:
            answer_and_score(benchmarks, config)
    except KeyboardInterrupt:
        raise Stopped(f"interrupted; the answers so far are kept in {config.out_dir}, the same command continues",
                      exit_code=130) from None


def check(config: Config) -> None:
    names = config.benchmark.split(",")
    for name in names:
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(name, BENCHMARKS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(BENCHMARKS)}"
            raise UserError(f"--benchmark: found {name!r}, {hint}")
    if "own" in names and not config.questions:
        raise UserError("--questions is missing; give --questions=FILE, your questions")
    for key in ("out_dir", *["data"] * (names != ["own"])):
        if not config[key]:
            raise UserError(f"--{key} is missing; give --{key}=DIR")
    if bool(config.model) == bool(config.answers):
        raise UserError("give either --model=DIR to answer the questions or --answers=FILE to score answers")
    if config.answers and "," in config.benchmark:
        raise UserError(f"--answers belongs to one benchmark, found --benchmark={config.benchmark}")
    if bool(config.judge_url) != bool(config.judge_model):
        raise UserError("--judge_url and --judge_model go together: the chat model's endpoint, and its name there")
    if config.objhal_extract and not config.judge_url:
        raise UserError("--objhal_extract=True needs the chat model: give --judge_url and --judge_model")
    if not re.fullmatch("([A-Za-z_][A-Za-z0-9_]*)?", config.judge_key_env):      # perhaps a key, so it is not repeated
        raise UserError("--judge_key_env: expected the name of an environment variable that holds the key, and not the key")
    check_values(config, {
        "batch_size": POSITIVE, "max_new_tokens": NON_NEGATIVE, "vizwiz_split": ["val", "test"],
        "device": ["", "cpu", "cuda"], "dtype": ["", "float32", "bfloat16", "float16"]})
    check_uses(config, DEFAULTS, [
        (["batch_size", "device", "dtype", "max_new_tokens", "crop"], config.model, "answering, with --model"),
        (["questions", "image_dir"], "own" in names, "own"),
        (["data"], names != ["own"], "the other benchmarks"),
        (["ocr"], "textvqa" in names, "textvqa"),
        (["vizwiz_split"], "vizwiz" in names, "vizwiz"),
        (["mmhal_short"], "mmhal" in names, "mmhal"),
        (["objhal_extract"], "objhal" in names, "objhal"),
        (["judge_url", "judge_model", "judge_key_env"], "mmhal" in names or config.objhal_extract, "mmhal, and objhal_extract"),
    ])
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no GPU here; use --device=cpu")
    check_out_dir(config)


def check_out_dir(config: Config) -> None:
    """UserError if a file of the user's, or one that this run reads, would be overwritten."""
    out_dir = Path(config.out_dir)
    for name in config.benchmark.split(","):
        refuse_inputs(out_dir / name / "scored.jsonl", [(key, config[key]) for key in ("answers", "questions")])
    found = [name for name in ("results.json", "results.md") if (out_dir / name).exists()]
    if found and not (out_dir / "results.lock").exists():            # `report` makes it first
        raise UserError(f"{out_dir}: holds files that evaluate.py did not write ({', '.join(found)}); choose another "
                        "--out_dir")


def claim_folder(folder: Path, model: dict, config: Config) -> None:
    """Make OUT/NAME this run's own until `release`."""
    scored = folder.name in read_results(config.out_dir, folder.name, model) and (folder / "scored.jsonl").exists()
    if scored and not (folder / MARK).exists():                      # earlier versions scored without leaving the mark
        write_text(folder / MARK, "evaluate.py\n")
    claim(folder, "evaluate.py", {"model": config.model})


def open_benchmark(name: str, config: Config) -> Benchmark:
    """Read and check all files of a benchmark; images are only looked at when a model answers."""
    module, class_name = BENCHMARKS[name].split(".")
    return getattr(importlib.import_module(f"benchmarks.{module}"), class_name)(name, config)


def score_file(benchmark: Benchmark, config: Config) -> None:
    texts, name = read_answers(config.answers, benchmark)
    settings = settings_of(config.answers)
    model = {"name": name, "digest": settings["model_digest"] if settings else None}
    folder = Path(config.out_dir) / benchmark.name
    claim_folder(folder, model, config)
    report(benchmark, texts, model, settings or f"{config.answers}, made elsewhere", config)
    release(folder)


def settings_of(answers: str) -> dict | None:
    """The settings.json next to an answer file; None unless evaluate.py made both: other programs have such files, too."""
    try:
        settings = read_json(Path(answers).with_name("settings.json"))
    except UserError:                                                # none, or not JSON
        return None
    return settings if {"model_digest", "questions"} <= settings.keys() else None


def answer_and_score(benchmarks: list[Benchmark], config: Config) -> None:
    """Answer on all ranks, score on rank 0."""
    dist = init_distributed(config.device, gradients=False)
    config.dtype = config.dtype or ("bfloat16" if dist.device.type == "cuda" else "float32")
    with dist.sync_errors():                                         # the ranks of a machine share its files
        model = {"name": str(Path(config.model)), "digest": digest_of_model(config)} if dist.local_rank == 0 else {}
    model = dist.assert_same(model)
    llava = None                                                     # loaded when there is something to answer
    for benchmark in benchmarks:
        folder = Path(config.out_dir) / benchmark.name
        with dist.sync_errors():
            if dist.rank == 0:
                claim_folder(folder, model, config)
            jobs = [job_id(question, benchmark) for question in benchmark.questions]
        todo = open_jobs(benchmark, jobs, folder, model, config, dist)
        if todo:
            with dist.sync_errors():
                llava = llava or load_model(config, dist.device)
            generate_answers(benchmark, llava, todo, folder, config, dist)
            dist.barrier()                                           # now all partial files are complete
        dist.broadcast_from_rank0(lambda: finish(benchmark, jobs, folder, model, config))


def load_model(config: Config, device: torch.device) -> Llava:
    llava = Llava.from_pretrained(config.model, getattr(torch, config.dtype), device).eval()
    require_tokenizer(llava, config.model)
    require_finite(llava, config.model)
    return llava


# -----------------------------------------------------------------------------
# Answering. A job is one (image, prompt) pair. Each rank appends to its own answers.partial.RANK.jsonl; what is found
# in such files at the start is not answered again.

def job_id(question: Question, benchmark: Benchmark) -> str:
    """
    Questions with the same images and prompt are one job: POPE's 8,910 questions are 5,127 jobs.

    -> "DIGEST-SIZE-SIZE...", the sizes of the image files: a cheap sign that they are the same pictures, wherever they are.
    UserError if one of them is not there.
    """
    digests, sizes = b"", ""
    for image in question.images or [b""]:
        if isinstance(image, Path):
            if not image.is_file():
                raise UserError(f"{question.where}: image {image} does not exist; {benchmark.image_hint}")
            sizes += f"-{image.stat().st_size}"
            image = os.path.relpath(image, benchmark.root).encode()
        digests += hashlib.sha256(image).digest()
    return hashlib.sha256(digests + question.model_prompt.encode()).hexdigest()[:32] + sizes


def digest_of_model(config: Config) -> str:
    """What the model is: the content of its folder, whatever its name and its files' times."""
    read_json(Path(config.model) / "config.json", hint=NOT_A_FOLDER.format(config.model))
    return digest_of_folder(config.model)


def answer_settings(benchmark: Benchmark, jobs: list[str], model: dict, config: Config) -> dict:
    """
    All that the answers depend on, kept next to them in settings.json. An interrupted run is continued, and finished
    answers are reused, only if nothing here has changed, the weights and the questions included.
    """
    without_sizes = [job.partition("-")[0] for job in jobs]
    return {"model": model["name"], "model_digest": model["digest"],
            "questions": hashlib.sha256("".join(without_sizes).encode()).hexdigest()[:12],
            "images": hashlib.sha256("".join(jobs).encode()).hexdigest()[:12],
            "suffix": benchmark.suffix, **benchmark.prompt_settings, "crop": config.crop,
            "pictures": "official" if benchmark.questions[0].official else "upright", "beams": 1, "temperature": 0,
            "max_new_tokens": benchmark.max_new_tokens, "dtype": config.dtype}


def open_jobs(benchmark: Benchmark, jobs: list[str], folder: Path, model: dict, config: Config,
              dist: Dist) -> dict[str, Question]:
    """{job: question} still to be answered, the same on every rank; {} if answers.jsonl is complete.

    jobs: that of each question.
    """
    settings = dist.assert_same(answer_settings(benchmark, jobs, model, config))
    path = folder / "settings.json"
    with dist.sync_errors():
        earlier = {"images": settings["images"]} | read_json(path) if path.exists() else settings    # once it was not recorded
        done = (folder / "answers.jsonl").exists()
        for key in settings | earlier:
            # Another name of the same model is no change. Until all is answered, the jobs of changed images are done again.
            may_change = key == "model" or key == "images" and not done
            if not may_change and settings.get(key) != earlier.get(key):
                raise UserError(f"{folder}: holds answers made with {key} {shorten(earlier.get(key))}, this run has "
                                f"{shorten(settings.get(key))}; remove the folder or choose another --out_dir")
        read_results(config.out_dir, benchmark.name, model)
    if done:
        if dist.rank == 0:
            print(f"{benchmark.name}: already answered in {folder / 'answers.jsonl'}")
        return {}

    def merge() -> dict[str, str]:
        write_json(path, settings)
        return merge_partial_answers(folder)

    answered = dist.broadcast_from_rank0(merge)                      # by now every rank has read the earlier settings
    distinct = dict(zip(jobs, benchmark.questions))
    todo = {job: question for job, question in distinct.items() if job not in answered}
    if dist.rank == 0:
        earlier = f", {len(distinct) - len(todo):,} of them answered earlier" if len(todo) < len(distinct) else ""
        print(f"{benchmark.name}: {len(jobs):,} questions, {len(distinct):,} distinct{earlier}", flush=True)
    return todo


@torch.no_grad()
def generate_answers(benchmark: Benchmark, llava: Llava, todo: dict[str, Question], folder: Path, config: Config,
                     dist: Dist) -> None:
    """
    Batched greedy decoding; this rank takes every `world_size`-th batch. Questions about one image share a batch, and what
    their prompts begin with is read once (engine/prefix.py). Rows of a batch do not influence each other.
    """
    model, tokenizer = llava.config, llava.tokenizer
    batch_size = 1 if model.pad_token_id is None else config.batch_size   # unequal lengths need padding
    rows = []
    for job, question in todo.items():
        prompt = "<image>\n" * len(question.images) + as_text(question.model_prompt)     # a literal <image> in it is text
        ids, _ = render([{"from": "human", "value": prompt}], tokenizer, model.template, model.image_tokens)
        rows.append((ids, job, question))
    batches = make_batches(rows, batch_size)[dist.rank::dist.world_size]
    answered_before = list(accumulate(map(len, batches), initial=0))

    started = last_print = time.time()
    path = folder / f"answers.partial.{dist.rank}.jsonl"
    with ThreadPoolExecutor() as pool:
        loading = start_loading(pool, batches[0], model.vision.image_size, config.crop) if batches else {}
        for i, batch in enumerate(batches):
            pixels = {image: future.result() for image, future in loading.items()}
            if i + 1 < len(batches):                                 # while the model is busy with this batch
                loading = start_loading(pool, batches[i + 1], model.vision.image_size, config.crop)
            prompts, images = [ids for ids, _, _ in batch], [question.images for _, _, question in batch]
            output = prefix.generate(llava, prompts, images, pixels, benchmark.max_new_tokens)   # (B, new)

            with disk_errors(path, note="make room; what is answered is kept, the same command continues"), \
                    open(path, "a", encoding="utf-8") as partial:
                for (_, job, _), new in zip(batch, output.tolist()):
                    text = tokenizer.decode(new, skip_special_tokens=True).strip()   # end token and padding are special
                    partial.write(json.dumps({"job": job, "text": text}, ensure_ascii=False) + "\n")

            if dist.rank == 0 and (time.time() - last_print > 5 or i + 1 == len(batches)):
                last_print, seconds = time.time(), time.time() - started
                share = answered_before[i + 1] / answered_before[-1]     # this rank's, and about that of the others
                speed, left = len(rows) * share / seconds, timedelta(seconds=round(seconds / share - seconds))
                print(f"{benchmark.name}: {round(len(rows) * share):,}/{len(rows):,} answered, {speed:.1f}/s, {left} left",
                      flush=True)


def make_batches(rows: list[tuple], batch_size: int) -> list[list[tuple]]:
    """(ids, job, question) of all rows -> batches. The rows of an image stay together, as long as they fit into one.

    The largest groups and the longest prompts come first: little padding, and a batch size that does not fit into memory
    fails at once.
    """
    groups = {}
    for row in sorted(rows, key=lambda row: -len(row[0])):
        groups.setdefault(tuple(row[2].images), []).append(row)
    pieces = [group[i:i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
    pieces.sort(key=lambda piece: (-len(piece), -len(piece[0][0])))
    batches = [[]]
    for piece in pieces:
        if len(batches[-1]) + len(piece) > batch_size:
            batches.append([])
        batches[-1] += piece
    return [batch for batch in batches if batch]


def start_loading(pool: ThreadPoolExecutor, batch: list[tuple], size: int, crop: bool) -> dict[Path | bytes, Future]:
    """Start to read and resize the images of a batch, each of them once, in threads."""
    images = {image: question for _, _, question in batch for image in question.images}
    return {image: pool.submit(load_pixels, image, question, size, crop) for image, question in images.items()}


def load_pixels(image: Path | bytes, question: Question, size: int, crop: bool) -> torch.Tensor:
    if isinstance(image, Path):
        image = load_image(str(image), official=question.official)
    else:
        image = decode_image(image, question.where)
    return transform_image(image, size, pad=not crop)                # (3, S, S)


def read_partial_answers(path: Path) -> dict[str, str]:
    """{job: text}. The last line of a killed run may be cut off. A line that is no answer is done again."""
    answers = {}
    with user_file(path) as file:
        text = file.read().decode(errors="replace")
    for line in text.split("\n"):
        try:
            row = parse_json(line, str(path))
            answers[need(row, "job", str, "")] = need(row, "text", str, "")
        except UserError:
            continue
    return answers


def merge_partial_answers(folder: Path) -> dict[str, str]:
    """Replace the partial files of however many ranks by one, answers.partial.jsonl -> {job: text}."""
    answers, paths = {}, sorted(folder.glob("answers.partial*.jsonl"))
    for path in paths:
        answers |= read_partial_answers(path)
    merged = folder / "answers.partial.jsonl"
    write_lines(merged, [{"job": job, "text": text} for job, text in answers.items()])
    for path in paths:
        if path != merged:
            path.unlink()
    return answers


def finish(benchmark: Benchmark, jobs: list[str], folder: Path, model: dict, config: Config) -> None:
    """All jobs are answered: write the answers and their scores."""
    if not (folder / "answers.jsonl").exists():
        write_answers(benchmark, jobs, folder, config)
    texts, _ = read_answers(folder / "answers.jsonl", benchmark)
    report(benchmark, texts, model, read_json(folder / "settings.json"), config)
    release(folder)


def write_answers(benchmark: Benchmark, jobs: list[str], folder: Path, config: Config) -> None:
    """The partial files become answers.jsonl, one line per question."""
    answered, rows = merge_partial_answers(folder), []
    if missing := set(jobs) - answered.keys():
        raise UserError(f"{folder}/answers.partial.*: lack {len(missing):,} of {len(set(jobs)):,} answers; the folder must be one "
                        "that all machines share")
    for i, (job, question) in enumerate(zip(jobs, benchmark.questions)):
        text = benchmark.clean(question, answered[job])
        rows.append({"question_id": question.id, "prompt": question.prompt, "text": text,
                     "answer_id": f"{benchmark.name}-{i}", "model_id": str(Path(config.model)), "metadata": {},
                     **benchmark.extra_columns(question)})
    write_lines(folder / "answers.jsonl", rows)
    (folder / "answers.partial.jsonl").unlink()


# -----------------------------------------------------------------------------
# Scoring and reporting

def read_answers(path: str | Path, benchmark: Benchmark) -> tuple[dict[object, str], str | None]:
    """
    An answer file -> {question key: text}, and the model_id if all rows have the same. Answers may be missing; an
    answer without its question is an error.
    """
    known = {question.key for question in benchmark.questions}
    texts, first_at, models = {}, {}, set()
    for i, (where, row) in enumerate(read_rows(path)):
        key, text = benchmark.read_answer(row, where, i)
        shown = " ".join(key) if isinstance(key, tuple) else key
        if key in texts:
            raise UserError(f"{where}: question {shown} has its answer in {first_at[key]} already; keep one")
        if key not in known:
            raise UserError(f"{where}: question {shown} is none of the {len(known):,} of {benchmark.name}; "
                            "is this the answer file of another benchmark or release?")
        texts[key], first_at[key] = text, where
        models.add(str(row.get("model_id", "")))
    return texts, models.pop() or None if len(models) == 1 else None


def report(benchmark: Benchmark, texts: dict[object, str], model: dict, answered_with: dict | str,
           config: Config) -> None:
    """Score one benchmark: scored.jsonl, its entry in results.json, results.md, and a line on the screen."""
    out_dir, questions = Path(config.out_dir), benchmark.questions
    read_results(out_dir, benchmark.name, model)                     # before a judge is paid
    missing = [question.id for question in questions if question.key not in texts]
    entry = {"rows": len(questions), "missing": len(missing), "model": model}
    if missing:                                                      # an average over the answers present is no result
        entry["refused"] = (f"{len(missing):,} of {len(questions):,} questions have no answer "
                            f"(first: question_id {missing[0]!r})")
    else:
        entry = score(benchmark, [texts[question.key] for question in questions], out_dir / benchmark.name) | entry
    entry["protocol"] = {"files": benchmark.files, **benchmark.protocol, "answers": answered_with}

    with lock(out_dir / "results.lock", wait=True):                # several evaluations may add their numbers
        results = read_results(out_dir, benchmark.name, model) | {benchmark.name: entry}
        row = our_row(results)
        if "AVG" in row:
            results["average"] = row["AVG"]
        write_json(out_dir / "results.json", results)
        write_text(out_dir / "results.md", markdown(row, other_files(results)))

    if missing:
        source = config.answers or out_dir / benchmark.name / "answers.jsonl"
        raise UserError(f"{source}: {entry['refused']}; no {benchmark.name} number without them")
    rates = [f"{name} {value:.2f}" for name, value in entry.items() if isinstance(value, float)]
    rates += [f"no {name}, since no row counts for it" for name, value in entry.items() if value is None]
    counts = f"{entry['rows']:,} rows, {entry['unparsed']:,} unparsed"
    print(f"{benchmark.name}: {entry.get('note') or ', '.join(rates)} ({counts})", flush=True)


def read_results(out_dir: str | Path, name: str, model: dict) -> dict[str, dict]:
    """The entries of results.json. They make one row, so the answers to the benchmark `name` must be of their model."""
    path = Path(out_dir) / "results.json"
    results = read_json(path) if path.exists() else {}
    results.pop("average", None)
    for other in [key for key in results if key in BENCHMARKS and key != name]:
        if not isinstance(results[other], dict):
            raise expected(f"{path}: {other}", results[other], "a JSON object; remove the file")
        theirs = results[other].get("model")
        if isinstance(theirs, dict) and not same_model(theirs, model):
            raise UserError(f"{path}: holds {other} of the model {theirs.get('name')}, and {name} is of "
                            f"{model['name']}, or its files have changed; choose another --out_dir")
    return results


def same_model(a: dict, b: dict) -> bool:
    """By content if both folders were here, else by name; a model without a name may be any."""
    for key in ("digest", "name"):
        if a.get(key) and b.get(key):
            return a[key] == b[key]
    return True


def score(benchmark: Benchmark, texts: list[str], folder: Path) -> dict:
    """Apply the rule to one text per question, write what it makes of each, return the numbers."""
    numbers, readings = benchmark.score(texts)
    write_lines(folder / "scored.jsonl", [
        {"question_id": question.id, "text": text, "parsed": parsed, "gold": gold, "score": points}
        for question, text, (parsed, gold, points) in zip(benchmark.questions, texts, readings)])
    for name, content in benchmark.submission(texts).items():
        write_text(folder / name, content)
    return numbers


if __name__ == "__main__":
    run(main, __doc__, DEFAULTS)
