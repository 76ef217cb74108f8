"""
Answers the paper's benchmarks with a checkpoint, and scores answers the way the official scorers do.

    python evaluate.py --model=out/pd --benchmark=pope,gqa --data=data/eval --out_dir=out/eval        # answer and score
    python evaluate.py --answers=answers.jsonl --benchmark=pope --data=data/eval --out_dir=out/eval   # only score
    torchrun --nproc_per_node=8 evaluate.py --model=out/pd --benchmark=mme ...                        # answer on 8 GPUs

A benchmark is three things: questions about images, a prompt, and a rule that turns free text into a score. The model
hardly matters for the first two, and the rule is where numbers of different papers part: POPE reads "None" as *yes*,
MME reads "Not sure" as *no*, ScienceQA fails "A." and accepts "A. rock". Nobody would invent these rules, but a number
stands beside the published one only if it obeys them. So every rule here is the official one, oddities included, and the
oddities are spelled out where they happen.

Files. `--data` is the folder that LLaVA's evaluation package unpacks to, one folder per benchmark. For benchmark NAME,
    OUT/NAME/answers.jsonl   one line per question: {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    OUT/NAME/scored.jsonl    the same questions read by the scorer: {"question_id", "text", "parsed", "gold", "score"}
    OUT/results.json         the numbers, each with the protocol that produced it; OUT/results.md beside the paper's
A run that was interrupted continues where it stopped. Percentages are out of 100.

Read top-down: 1. the command line, 2. answering, 3. reading files, 4. the normaliser of the VQA family, 5. nouns and COCO
objects in text, 6. asking a chat model, 7. the benchmarks, 8. the report.
"""
import argparse
import base64
import binascii
import csv
import difflib
import hashlib
import io
import json
import os
import re
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import requests
import torch
import torch.distributed as dist

from data import DataError, load_image, render, transform_image
from model import CheckpointError, Llava


class EvaluationError(ValueError):
    """The user's files, flags or endpoint are wrong; one line says where, what was found and what to do."""

# ----------------------------------------------------------------------------------------------------------------------
# 1. The command line


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its usage and exit; we say one line like everywhere
        raise EvaluationError(message)


def yes_or_no(text):
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected True or False")
    return text == "True"


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number from 1")
    return int(text)


def parse_arguments(argv):
    parser = Parser(prog="evaluate.py", allow_abbrev=False, description=__doc__.strip().splitlines()[0])
    parser.add_argument("--benchmark", required=True, help=f"one or several, with commas: {', '.join(BENCHMARKS)}")
    parser.add_argument("--data", required=True, type=Path, help="folder of the benchmark files (LLaVA's playground/data/eval)")
    parser.add_argument("--out_dir", required=True, type=Path)
    parser.add_argument("--model", type=Path, help="checkpoint folder that answers the questions")
    parser.add_argument("--answers", type=Path, help="score this answer file instead; needs neither model nor images")
    parser.add_argument("--batch_size", type=positive, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--max_new_tokens", type=positive, help="default: the official 128 or 1024 of each benchmark")
    parser.add_argument("--crop", type=yes_or_no, default=False, help="centre crop, as some official scripts do, for padding")
    parser.add_argument("--ocr", type=yes_or_no, default=True, help="textvqa: give the reference OCR tokens (the paper does)")
    parser.add_argument("--vizwiz_split", choices=["val", "test"], default="val", help="test has no answers: submission file only")
    parser.add_argument("--mmhal_short", type=yes_or_no, default=True, help="mmhal: ask for short answers (the authors' script)")
    parser.add_argument("--objhal_extract", type=yes_or_no, default=False, help="objhal: a chat model lists the objects")
    parser.add_argument("--judge_url", help="OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    parser.add_argument("--judge_model", help="name of the chat model there")
    parser.add_argument("--judge_key_env", help="environment variable that holds the endpoint's key")
    args, unknown = parser.parse_known_args(argv)

    if unknown:
        flag = unknown[0].split("=")[0]
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(flag, known, n=1)
        raise EvaluationError(f"{unknown[0]}: no such flag" + (f", did you mean {near[0]}?" if near else "; see --help"))
    args.benchmark = args.benchmark.split(",")
    for name in args.benchmark:
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(name, BENCHMARKS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(BENCHMARKS)}"
            raise EvaluationError(f"--benchmark: found {name!r}, {hint}")
    if (args.model is None) == (args.answers is None):
        raise EvaluationError("give --model=DIR to answer the questions, or --answers=FILE to score existing answers; one of the two")
    if args.answers and len(args.benchmark) > 1:
        raise EvaluationError(f"--answers holds the answers of one benchmark, found --benchmark={','.join(args.benchmark)}")
    if bool(args.judge_url) != bool(args.judge_model):
        raise EvaluationError("--judge_url and --judge_model go together: where the chat model is, and which one it is")
    if args.objhal_extract and not args.judge_url:
        raise EvaluationError("--objhal_extract=True needs the chat model: give --judge_url and --judge_model")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args

# ----------------------------------------------------------------------------------------------------------------------
# 2. Answering


@dataclass
class Question:
    id: str | int                  # copied to the answers file as it is: a number stays a number
    key: object                    # what answers are joined on; the id, unless a benchmark's ids are not unique
    prompt: str                    # what the answers file records as the question
    asked: str                     # what the model reads after the image: the prompt, mostly with a suffix
    image: Path | bytes | None     # a file, the file's bytes (benchmarks that ship base64), or no image
    where: str                     # file and row, for messages
    gold: object = None            # the benchmark's own
    about: dict | None = None      # whatever else its scorer needs: category, group, ...


def start_ranks():
    """-> (rank, world size). Under torchrun the ranks only meet at barriers and talk through files, so gloo will do."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=1))  # a rank may wait long for a slower one
    return int(os.environ.get("RANK", 0)), world


def wait_for_all(world):
    if world > 1:
        dist.barrier()


def checkpoint_stamp(folder):
    """When the weights were written: answers of a checkpoint that has been trained on since are not reused."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise EvaluationError(f"--model: {folder} holds no *.safetensors file; give the folder of a checkpoint")
    newest = max(file.stat().st_mtime for file in files)
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(newest))


def job_of(question):
    """Questions with the same image and words are one job, answered once (POPE has 9,000 questions and 5,127 jobs)."""
    image = hashlib.sha256(question.image).hexdigest() if isinstance(question.image, bytes) else str(question.image)
    return hashlib.sha256(json.dumps([image, question.asked]).encode()).hexdigest()[:32]


def load_pixels(question, size, crop):
    if isinstance(question.image, Path):
        image = load_image(str(question.image))
    else:
        try:
            image = load_image(io.BytesIO(question.image))
        except DataError:
            raise EvaluationError(f"{question.where}: the base64 text is not a readable image; replace the file") from None
    return transform_image(image, size, pad=not crop)  # (3, S, S)


def answer(benchmark, llava, args, rank, world):
    """
    Answer every question of the benchmark and write answers.jsonl (rank 0). `llava` is a function that gives the model, so that
    nothing is loaded when nothing is left to do.

    Each rank takes every `world`-th batch and appends to a file of its own, answers.partial.RANK.jsonl; that is what a later
    run picks up. Jobs are sorted by length, so that a batch needs little padding and the longest come first: a model that
    does not fit into memory says so at once. Greedy decoding of a row depends on no other row of its batch.
    """
    folder, questions = args.out_dir / benchmark.name, benchmark.questions
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / "answers.jsonl"
    settings = {"checkpoint": checkpoint_stamp(args.model), "crop": args.crop, "dtype": args.dtype,
                "max_new_tokens": benchmark.max_new_tokens, **benchmark.switches}
    if final.exists():
        _, found = read_answers(final, benchmark)
        if found != settings:
            raise EvaluationError(f"{final}: holds answers made with {found}, this run would make them with {settings}; "
                                  "remove the file or choose another --out_dir")
        if rank == 0:
            print(f"{benchmark.name}: already answered in {final}")
        return

    for question in questions:
        if isinstance(question.image, Path) and not question.image.is_file():
            raise EvaluationError(f"{question.where}: image {question.image} does not exist; check --data")

    if rank == 0:
        collect_partial_answers(folder, settings)
    wait_for_all(world)
    answered = read_partial_answers(folder / "answers.partial.jsonl", settings)
    wait_for_all(world)

    jobs = {job_of(question): question for question in questions}
    todo = {job: question for job, question in jobs.items() if job not in answered}
    if rank == 0:
        kept = f", {len(jobs) - len(todo):,} of them answered earlier" if len(todo) < len(jobs) else ""
        print(f"{benchmark.name}: {len(questions):,} questions, {len(jobs):,} distinct{kept}", flush=True)
    if todo:
        answer_jobs(benchmark, llava(), args, todo, settings, folder, rank, world)
    wait_for_all(world)

    if rank == 0:
        collect_partial_answers(folder, settings)
        answered = read_partial_answers(folder / "answers.partial.jsonl", settings)
        rows = []
        for i, question in enumerate(questions):
            rows.append({"question_id": question.id, "prompt": question.prompt,
                         "text": benchmark.tidy(question, answered[job_of(question)]),
                         "answer_id": f"{benchmark.name}-{i}", "model_id": str(args.model), "metadata": settings})
        write_lines(final, rows)
        (folder / "answers.partial.jsonl").unlink()
    wait_for_all(world)


@torch.no_grad()
def answer_jobs(benchmark, llava, args, todo, settings, folder, rank, world):
    config, tokenizer = llava.config, llava.tokenizer
    image_size, pad = config.vision.image_size, config.pad_token_id
    if pad is None:
        pad = config.eos_token_id

    work = []
    for job, question in todo.items():
        asked = question.asked if question.image is None else "<image>\n" + question.asked
        ids, _ = render([{"from": "human", "value": asked}], tokenizer, config.template, config.image_tokens)
        work.append((ids, job, question))
    work.sort(key=lambda item: (-len(item[0]), str(item[2].where)))
    batches = [work[i:i + args.batch_size] for i in range(0, len(work), args.batch_size)][rank::world]

    started = told = time.time()
    with ThreadPoolExecutor() as pool, open(folder / f"answers.partial.{rank}.jsonl", "a", encoding="utf-8") as partial:
        def start_loading(batch):  # images of the next batch are read and resized while the model is busy with this one
            return [pool.submit(load_pixels, question, image_size, args.crop) for _, _, question in batch if question.image is not None]

        ahead = start_loading(batches[0]) if batches else []
        for n, batch in enumerate(batches):
            loading, ahead = ahead, start_loading(batches[n + 1]) if n + 1 < len(batches) else []
            pixels = torch.stack([each.result() for each in loading]).to(args.device) if loading else None  # (N, 3, S, S)
            longest = len(batch[0][0])
            input_ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _, _ in batch], device=args.device)  # (B, T)
            output = llava.generate(input_ids, pixels, max_new_tokens=benchmark.max_new_tokens)  # (B, new)

            for (_, job, _), new in zip(batch, output.tolist()):
                if config.eos_token_id in new:
                    new = new[:new.index(config.eos_token_id)]
                text = tokenizer.decode(new, skip_special_tokens=True).strip()
                partial.write(json.dumps({"job": job, "text": text, "settings": settings}, ensure_ascii=False) + "\n")
            partial.flush()

            if rank == 0 and (time.time() - told > 5 or n + 1 == len(batches)):
                told, seconds = time.time(), time.time() - started
                left = seconds / (n + 1) * (len(batches) - n - 1)
                done = min((n + 1) * args.batch_size * world, len(work))
                print(f"{benchmark.name}: {done:,}/{len(work):,} answered, {done / seconds:.1f}/s, "
                      f"{timedelta(seconds=round(left))} left", flush=True)


def read_partial_answers(path, settings):
    """-> {job: text}. The last line may be torn, where a run was killed; answers made with other settings do not count."""
    answers = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["settings"] == settings:
            answers[row["job"]] = row["text"]
    return answers


def collect_partial_answers(folder, settings):
    """All answers.partial.*.jsonl, of however many ranks, become one answers.partial.jsonl."""
    rows = {}
    paths = sorted(folder.glob("answers.partial*.jsonl"))
    for path in paths:
        rows.update(read_partial_answers(path, settings))
    write_lines(folder / "answers.partial.jsonl",
                [{"job": job, "text": text, "settings": settings} for job, text in rows.items()])
    for path in paths:
        if path.name != "answers.partial.jsonl":
            path.unlink()

# ----------------------------------------------------------------------------------------------------------------------
# 3. Reading files. They come from many places, so each is checked while it is read.


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror}); check --data, the README says which files go where") from None
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{path} line {error.lineno}: malformed JSON, {error.msg}") from None
    except ValueError:
        raise EvaluationError(f"{path}: not UTF-8 text") from None


def read_lines(path):
    """JSON Lines -> [("file line 3", row), ...]; blank lines do not count."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror}); check --data, the README says which files go where") from None
    except ValueError:
        raise EvaluationError(f"{path}: not UTF-8 text") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append((f"{path} line {number}", json.loads(line)))
            except ValueError as error:
                raise EvaluationError(f"{path} line {number}: malformed JSON, {' '.join(str(error).split())}") from None
    return rows


def need(row, key, kind, where):
    """row[key], which has to be there and of that type."""
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        found = json.dumps(row.get(key) if isinstance(row, dict) else row, default=repr, ensure_ascii=False)
        names = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise EvaluationError(f'{where}: "{key}" should be {names}, found {found[:60]}')
    return value


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_lines(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_answers(path, benchmark):
    """
    An answer file -> ({key: text}, settings). JSON Lines, or a JSON list where a benchmark's official format is one.
    `settings` is how the answers were made, if the file says so in every line's metadata, as ours do; else None.
    """
    is_list = path.is_file() and path.read_text(encoding="utf-8", errors="replace").lstrip().startswith("[")
    if is_list:
        rows = [(f"{path} row {i}", row) for i, row in enumerate(read_json(path))]
    else:
        rows = read_lines(path)
    known = {question.key for question in benchmark.questions}
    texts, first_at, settings = {}, {}, []
    for i, (where, row) in enumerate(rows):
        key, text = benchmark.read_answer(row, where, i)
        shown = key[0] if isinstance(key, tuple) else key
        if key in texts:
            raise EvaluationError(f"{where}: question {shown} is already answered in {first_at[key]}; keep one of the two")
        if key not in known:
            raise EvaluationError(f"{where}: question {shown} is not among the {len(known):,} of {benchmark.name}; "
                                  "is this the answer file of another benchmark or release?")
        texts[key], first_at[key] = text, where
        settings.append(row.get("metadata"))
    same = settings and settings[0] and all(each == settings[0] for each in settings)
    return texts, settings[0] if same else None

# ----------------------------------------------------------------------------------------------------------------------
# 4. The normaliser of the VQA family ("EvalAI" or "M4C" processor), and soft accuracy

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
           "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
# A word that lacks one of its apostrophes gets it back: dont -> don't, couldnt've and couldn'tve -> couldn't've.
CONTRACTED = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm I've isn't it'd
    it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's
    someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll they're they've 'twas
    wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're
    why's won't would've wouldn't y'all you'd you'll you're you've
    couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
    there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
    y'all'd've 'ow's'at""".split()
CONTRACTIONS = {word[:i] + word[i + 1:]: word for word in CONTRACTED for i, letter in enumerate(word) if letter == "'"}
CONTRACTIONS |= {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}  # sic


def normalise(text: str) -> str:
    """
    >>> normalise("The 1,000 dogs."), normalise("red,white"), normalise("a.m."), normalise("What's"), normalise("top-left - two")
    ('1000 dogs', 'redwhite', 'am', "what 's", 'topleft 2')

    The order of the steps is part of the rule: commas are gone before punctuation is looked at, so none becomes a space.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    before = text
    for symbol in PUNCTUATION:  # beside a space anywhere in the text: deleted everywhere; else it becomes a space
        beside_space = symbol + " " in before or " " + symbol in before
        text = text.replace(symbol, "" if beside_space else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)  # 32: the official code passes the flag re.UNICODE as the count
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def soft_accuracy(answer: str, golds: list[str]) -> float:
    """
    Mean over annotators of min(matches among the *other* annotators / 3, 1). With ten annotators of whom k agree with the answer:
    k = 0, 1, 2, 3, 4 gives 0, 0.3, 0.6, 0.9, 1. All strings normalised already.
    """
    scores = []
    for i in range(len(golds)):  # left out by position: equal answers of two annotators are still two answers
        others = golds[:i] + golds[i + 1:]
        scores.append(min(others.count(answer) / 3, 1))
    return sum(scores) / len(scores)

# ----------------------------------------------------------------------------------------------------------------------
# 5. Nouns and COCO objects in a text (Object HalBench, AMBER)

# The official scorers look nouns up in WordNet. We have no WordNet, so a noun is known if the benchmark's own vocabulary has it,
# which is all that scoring needs. Endings are WordNet's. Its surprises come along: "men" is a word of its own there and
# never becomes "man", "vases" becomes "vas" (a duct), the shortest candidate.
ENDINGS = [("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y")]
IRREGULAR = {"children": "child", "geese": "goose", "knives": "knife", "mice": "mouse", "oxen": "ox",
             "men": "men", "vases": "vas", "sports": "sport"}


def lemma(word: str, vocabulary) -> str:
    """The singular of a noun if the vocabulary has one, else the word itself: buses -> bus, women -> woman, men -> men."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    candidates = [word[:len(word) - len(end)] + new for end, new in ENDINGS if word.endswith(end)]
    candidates = [candidate for candidate in [word] + candidates if candidate in vocabulary]
    return min(candidates, key=len, default=word)


def word_tokens(text: str) -> list[str]:
    """Lower-case words and punctuation marks, each a token: a comma between two words keeps them from becoming one object."""
    return re.findall(r"[^\W_]+(?:[-/][^\W_]+)*|'s\b|[^\w\s]", text.lower())


# The 80 categories of COCO in its own order, each followed by words that mean it. Ours; a `synonyms.txt` of this very format
# in the benchmark's folder takes its place, which is what numbers for publication should use.
SYNONYMS = """
person, man, woman, boy, girl, child, children, kid, baby, toddler, infant, people, adult, teenager, lady, gentleman, guy, male, female, mother, father, brother, sister, son, daughter, grandmother, grandfather, pedestrian, passenger, rider, driver, cyclist, bicyclist, biker, skier, snowboarder, skateboarder, surfer, skater, swimmer, player, batter, pitcher, catcher, umpire, athlete, spectator, student, teacher, worker, policeman, policewoman, officer, cop, soldier, fireman, firefighter, chef, cook, waiter, waitress, farmer, cowboy, bride, groom, doctor, nurse, customer, shopper, tourist, traveler, hiker
bicycle, bike, tricycle, unicycle
car, automobile, sedan, suv, van, minivan, hatchback, coupe, jeep, limousine, limo, taxi, cab, taxicab
motorcycle, motorbike, motor bike, motor cycle, scooter, moped
airplane, aeroplane, plane, air plane, aircraft, jet, jetliner, airliner, biplane, seaplane
bus, minibus, trolley
train, locomotive, tram
truck, pickup, lorry, firetruck
boat, ship, sailboat, motorboat, speedboat, rowboat, canoe, kayak, yacht, ferry, raft, dinghy, gondola
traffic light, street light, traffic signal, stop light, streetlight, stoplight
fire hydrant, hydrant
stop sign
parking meter
bench, pew
bird, duck, goose, swan, gull, seagull, pigeon, dove, parrot, owl, eagle, hawk, ostrich, penguin, flamingo, crow, sparrow, turkey, chicken, rooster, hen, peacock
cat, kitten, kitty
dog, puppy, pup
horse, pony, foal, colt, mare, stallion
sheep, lamb, ram, ewe, goat
cow, cattle, calf, bull, ox, heifer
elephant
bear, panda, polar bear, teddy
zebra
giraffe
backpack, knapsack, rucksack
umbrella, parasol
handbag, purse, wallet
tie, necktie, bow, bow tie
suitcase, suit case, luggage
frisbee
skis, ski
snowboard
sports ball, ball, baseball, basketball, football, volleyball
kite
baseball bat
baseball glove, mitt
skateboard
surfboard, longboard
tennis racket, racket, racquet
bottle
wine glass, wineglass
cup, mug, glass
fork
knife, pocketknife
spoon, teaspoon
bowl
banana
apple
sandwich, burger, hamburger, cheeseburger, sub
orange
broccoli
carrot
hot dog, hotdog
pizza
donut, doughnut, bagel
cake, cupcake, cheesecake, brownie
chair, stool, seat
couch, sofa, recliner, loveseat, futon
potted plant, houseplant
bed
dining table, table, desk, coffee table
toilet, commode
tv, television, monitor
laptop, notebook, netbook, macbook
mouse
remote, remote control
keyboard
cell phone, mobile phone, cellphone, smartphone, phone
microwave
oven, stove, stove top oven
toaster
sink
refrigerator, fridge, freezer
book
clock
vase
scissors
teddy bear, teddybear
hair drier, hairdryer, hair dryer
toothbrush
"""


class CocoWords:
    """
    Finds COCO objects in text: "two dogs and a baby elephant" -> ["dog", "elephant"]. Made from a synonym table, one category a line.

    `double` joins two neighbouring words before any single word is looked at. A hot dog is then no dog, a train track no train,
    and the seat of a toilet no chair. Only pairs are joined: "stove top oven" never is, and its words count one by one.
    """

    def __init__(self, table: str):
        self.category, self.double = {}, {"home plate": "home plate", "train track": "train track"}
        for line in table.strip().splitlines():
            words = [word.strip() for word in line.split(",") if word.strip()]
            for word in words:
                self.category[word] = words[0]
                if " " in word:
                    self.double[word] = word
        for animal in "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split():
            self.double[f"baby {animal}"] = self.double[f"adult {animal}"] = animal
        for vehicle in ("jet", "train"):
            self.double[f"passenger {vehicle}"] = vehicle
        self.double |= {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}
        self.known = {part for word in [*self.category, *self.double] for part in word.split()}

    def lemmas(self, text: str) -> list[str]:
        return [lemma(token, self.known) for token in word_tokens(text)]

    def join_doubles(self, words: list[str]) -> list[str]:
        joined, i = [], 0
        while i < len(words):
            pair = " ".join(words[i:i + 2])
            joined.append(self.double.get(pair, words[i]))
            i += 2 if pair in self.double else 1
        return joined

    def categories(self, words: list[str]) -> list[str]:
        """Words, doubles joined -> the category of each that has one. A word that comes twice counts twice."""
        if "toilet" in words and "seat" in words:
            words = [word for word in words if word != "seat"]
        return [self.category[word] for word in words if word in self.category]

    def in_text(self, text: str) -> list[str]:
        return self.categories(self.join_doubles(self.lemmas(text)))

    def in_list(self, objects: list[str]) -> list[str]:
        """
        Objects that a chat model listed -> categories. Each string is read as a noun phrase: its double words if it has any, else each
        run of nouns as *one* object, so that an office chair is not a chair; every object counts once. The official code finds
        nouns with a language model, we take every word for a noun that is not in the short list NOT_NOUNS.
        """
        found = []
        for phrase in objects:
            words = self.lemmas(phrase)
            names = [self.double[pair] for pair in map(" ".join, zip(words, words[1:])) if pair in self.double]
            if not names:
                runs = " ".join("|" if word in NOT_NOUNS or not word[0].isalnum() else word for word in words).split("|")
                names = [run.strip() for run in runs if run.strip()]
            found += [name for name in dict.fromkeys(names) if name not in found]
        return self.categories(found)


NOT_NOUNS = set("""
    a an the this that these those some any several many few two three four five six seven eight nine ten one other another its his her their
    of in on at by with without near under over behind beside between and or for from to
    red green blue yellow black white brown gray grey pink purple orange-colored golden silver dark light bright colorful
    big small large little tiny huge tall short long wide narrow old young new empty full open closed round square
    wooden metallic leather-bound striped spotted parked standing sitting walking running playing smiling""".split())

# ----------------------------------------------------------------------------------------------------------------------
# 6. Asking a chat model (MMHal's judge, Object HalBench's extraction)


class ChatModel:
    """
    An OpenAI-compatible endpoint. Every reply is appended to `path` as soon as it is there, and a prompt that has its reply in
    that file is never sent again. Without an endpoint, the file is all there is: replies that came by other means can be put there.
    """

    def __init__(self, args, path, temperature):
        self.url, self.model, self.path, self.temperature = args.judge_url, args.judge_model, path, temperature
        self.headers = {}
        if args.judge_key_env:
            if not os.environ.get(args.judge_key_env):
                raise EvaluationError(f"--judge_key_env: the environment variable {args.judge_key_env} is not set; put the key there")
            self.headers["Authorization"] = f"Bearer {os.environ[args.judge_key_env]}"
        self.replies, self.models = {}, set()
        for where, row in read_lines(path) if path.exists() else []:
            prompt, reply = need(row, "prompt", str, where), row.get("reply")
            if reply is not None and (self.model is None or row.get("model") == self.model):
                self.replies[prompt] = need(row, "reply", str, where)
                self.models.add(row.get("model"))

    def ask(self, prompt: str) -> str:
        if prompt not in self.replies:
            self.replies[prompt] = self.send(prompt)
            self.models.add(self.model)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"model": self.model, "prompt": prompt, "reply": self.replies[prompt]}, ensure_ascii=False) + "\n")
        return self.replies[prompt]

    def send(self, prompt):
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}],
                "temperature": self.temperature, "max_tokens": 512}
        url = self.url.rstrip("/") + "/chat/completions"
        for pause in (1, 2, 4, 8, None):
            try:
                response = requests.post(url, json=body, headers=self.headers, timeout=60)
                if response.status_code == 200:
                    reply = response.json()["choices"][0]["message"]["content"]
                    if isinstance(reply, str):
                        return reply
                    trouble = "the reply has no text"
                else:
                    trouble = f"HTTP {response.status_code} {' '.join(response.text.split())[:100]}"
                    if response.status_code < 500 and response.status_code not in (408, 429):
                        break  # a wrong key or model name does not get better by waiting
            except requests.exceptions.Timeout:
                trouble = "no reply within 60 s"
            except requests.exceptions.InvalidJSONError:
                trouble = "the reply is not JSON"
            except requests.exceptions.RequestException as error:
                trouble = f"{type(error).__name__}, no connection"
            except (ValueError, KeyError, IndexError, TypeError):
                trouble = "the reply is not a chat completion"
            if pause:
                time.sleep(pause)
        raise EvaluationError(f"--judge_url={self.url}: {trouble}; {len(self.replies)} replies are kept in {self.path}, "
                              "run the same command again to go on")
