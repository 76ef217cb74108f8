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
    add = parser.add_argument
    add("--benchmark", required=True, help=f"one or several, with commas: {', '.join(BENCHMARKS)}")
    add("--data", required=True, type=Path, help="folder of the benchmark files (LLaVA's playground/data/eval)")
    add("--out_dir", required=True, type=Path)
    add("--model", type=Path, help="checkpoint folder that answers the questions")
    add("--answers", type=Path, help="score this answer file instead; needs neither model nor images")
    add("--batch_size", type=positive, default=16)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU, else float32")
    add("--max_new_tokens", type=positive, help="default: each benchmark's official 128 or 1024")
    add("--crop", type=yes_or_no, default=False, help="centre crop in place of padding, as some official scripts do")
    add("--ocr", type=yes_or_no, default=True, help="textvqa: show the reference OCR tokens, as the paper does")
    add("--vizwiz_split", choices=["val", "test"], default="val", help="test: only a file for the official server")
    add("--mmhal_short", type=yes_or_no, default=True, help="mmhal: ask for short answers, as the authors' script does")
    add("--objhal_extract", type=yes_or_no, default=False, help="objhal: a chat model lists the objects named")
    add("--judge_url", help="OpenAI-compatible endpoint of the chat model, such as http://localhost:8000/v1")
    add("--judge_model", help="name of the chat model there")
    add("--judge_key_env", help="environment variable that holds the endpoint's key")
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
        raise EvaluationError("give either --model=DIR to answer the questions or --answers=FILE to score answers")
    if args.answers and len(args.benchmark) > 1:
        raise EvaluationError(f"--answers is of one benchmark, found --benchmark={','.join(args.benchmark)}")
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


def settings_of(benchmark, args):
    """
    All that the answers depend on. It is kept in settings.json beside them: an interrupted run is continued, and finished
    answers are used again, only if nothing here has changed, the weights and the questions included.
    """
    weights = sorted(args.model.glob("*.safetensors"))
    if not weights:
        raise EvaluationError(f"--model: {args.model} holds no *.safetensors file; give the folder of a checkpoint")
    written = time.gmtime(max(file.stat().st_mtime for file in weights))
    questions = hashlib.sha256("".join(job_of(question) for question in benchmark.questions).encode())
    return {"model": str(args.model), "weights_written": time.strftime("%Y-%m-%d %H:%M:%S", written),
            "questions": questions.hexdigest()[:12], "crop": args.crop, "dtype": args.dtype, "beams": 1, "temperature": 0,
            "max_new_tokens": benchmark.max_new_tokens, "suffix": benchmark.suffix, **benchmark.switches}


def answer(benchmark, llava, args, rank, world):
    """
    Answer every question of the benchmark; rank 0 writes answers.jsonl. `llava` is a function that gives the model, so that
    nothing is loaded when nothing is left to do.

    Each rank appends to a file of its own, answers.partial.RANK.jsonl, which is what a later run continues from.
    """
    folder, questions = args.out_dir / benchmark.name, benchmark.questions
    settings = settings_of(benchmark, args)
    if (folder / "settings.json").exists() and read_json(folder / "settings.json") != settings:
        found = read_json(folder / "settings.json")
        changed = next(key for key in settings | found if settings.get(key) != found.get(key))
        raise EvaluationError(f"{folder}: holds answers made with {changed} {found.get(changed)!r}, this run has "
                              f"{settings.get(changed)!r}; remove the folder or choose another --out_dir")
    if (folder / "answers.jsonl").exists():
        if rank == 0:
            print(f"{benchmark.name}: already answered in {folder / 'answers.jsonl'}")
        return
    for question in questions:
        if isinstance(question.image, Path) and not question.image.is_file():
            raise EvaluationError(f"{question.where}: image {question.image} does not exist; check --data")

    wait_for_all(world)  # every rank has seen the settings of an earlier run, if any
    if rank == 0:
        write_text(folder / "settings.json", json.dumps(settings, indent=1) + "\n")
        collect_partial_answers(folder)
    wait_for_all(world)
    answered = read_partial_answers(folder / "answers.partial.jsonl")
    jobs = {job_of(question): question for question in questions}
    todo = {job: question for job, question in jobs.items() if job not in answered}
    if rank == 0:
        earlier = f", {len(jobs) - len(todo):,} of them answered earlier" if len(todo) < len(jobs) else ""
        print(f"{benchmark.name}: {len(questions):,} questions, {len(jobs):,} distinct{earlier}", flush=True)
    if todo:
        answer_jobs(benchmark, llava(), args, todo, folder, rank, world)
    wait_for_all(world)

    if rank == 0:
        answered = collect_partial_answers(folder)
        rows = []
        for i, question in enumerate(questions):
            text = benchmark.tidy(question, answered[job_of(question)])
            rows.append({"question_id": question.id, "prompt": question.prompt, "text": text,
                         "answer_id": f"{benchmark.name}-{i}", "model_id": str(args.model), "metadata": {}})
        write_lines(folder / "answers.jsonl", rows)
        (folder / "answers.partial.jsonl").unlink()
    wait_for_all(world)


@torch.no_grad()
def answer_jobs(benchmark, llava, args, todo, folder, rank, world):
    """
    Greedy decoding in batches, every `world`-th batch on this rank. Sorted by length, so that a batch needs little padding
    and the longest come first: a batch that does not fit into memory says so at once. No row sees another.
    """
    config, tokenizer = llava.config, llava.tokenizer
    pad = config.eos_token_id if config.pad_token_id is None else config.pad_token_id
    work = []
    for job, question in todo.items():
        asked = question.asked if question.image is None else "<image>\n" + question.asked
        ids, _ = render([{"from": "human", "value": asked}], tokenizer, config.template, config.image_tokens)
        work.append((ids, job, question))
    work.sort(key=lambda item: -len(item[0]))
    batches = [work[i:i + args.batch_size] for i in range(0, len(work), args.batch_size)][rank::world]

    started = told = time.time()
    with ThreadPoolExecutor() as pool, open(folder / f"answers.partial.{rank}.jsonl", "a", encoding="utf-8") as partial:
        def start_loading(batch):  # the next batch's images are read and resized while the model is busy with this one
            shown = [question for _, _, question in batch if question.image is not None]
            return [pool.submit(load_pixels, question, config.vision.image_size, args.crop) for question in shown]

        ahead = start_loading(batches[0]) if batches else []
        for n, batch in enumerate(batches):
            loading, ahead = ahead, start_loading(batches[n + 1]) if n + 1 < len(batches) else []
            pixels = torch.stack([each.result() for each in loading]).to(args.device) if loading else None  # (N, 3, S, S)
            longest = len(batch[0][0])
            padded = [ids + [pad] * (longest - len(ids)) for ids, _, _ in batch]
            output = llava.generate(torch.tensor(padded, device=args.device), pixels, benchmark.max_new_tokens)  # (B, new)

            for (_, job, _), new in zip(batch, output.tolist()):
                if config.eos_token_id in new:
                    new = new[:new.index(config.eos_token_id)]
                text = tokenizer.decode(new, skip_special_tokens=True).strip()
                partial.write(json.dumps({"job": job, "text": text}, ensure_ascii=False) + "\n")
            partial.flush()

            if rank == 0 and (time.time() - told > 5 or n + 1 == len(batches)):
                told, seconds = time.time(), time.time() - started
                left = timedelta(seconds=round(seconds / (n + 1) * (len(batches) - n - 1)))
                done = min((n + 1) * args.batch_size * world, len(work))
                print(f"{benchmark.name}: {done:,}/{len(work):,} answered, {done / seconds:.1f}/s, {left} left", flush=True)


def read_partial_answers(path):
    """-> {job: text}. Where a run was killed, the last line may be torn; its job is done again."""
    answers = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
            answers[row["job"]] = row["text"]
        except json.JSONDecodeError:
            continue
    return answers


def collect_partial_answers(folder):
    """The answers.partial files of however many ranks become one, answers.partial.jsonl -> {job: text}."""
    answers, paths = {}, sorted(folder.glob("answers.partial*.jsonl"))
    for path in paths:
        answers |= read_partial_answers(path)
    one = folder / "answers.partial.jsonl"
    write_lines(one, [{"job": job, "text": text} for job, text in answers.items()])
    for path in paths:
        if path != one:
            path.unlink()
    return answers

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

# ----------------------------------------------------------------------------------------------------------------------
# 7. The benchmarks

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"


class Benchmark:
    """
    What the eleven share. Each subclass says where its files are, and defines
        load()                  -> [Question], from the official files, gold answers attached
        score(questions, texts) -> (numbers, [(parsed, gold, score), ...]), one triple per question
    """
    folder = ""
    max_new_tokens = 128           # the official setting
    suffix = SHORT                 # for the protocol; what the model reads is in each Question
    columns = {}                   # column of the report -> key of `numbers`

    def __init__(self, name, args):
        self.name, self.args, self.root = name, args, args.data / self.folder
        self.max_new_tokens = args.max_new_tokens or self.max_new_tokens
        self.files = {}            # file -> its rows, for the protocol
        self.switches = {}         # options of this benchmark that change what the model reads
        self.protocol = {}         # options that change how it is scored
        self.set_up()
        self.questions = self.load()
        first_at = {}
        for question in self.questions:
            if question.key in first_at:
                raise EvaluationError(f"{question.where}: question_id {question.id!r} stands already in {first_at[question.key]}")
            first_at[question.key] = question.where
        if not self.questions:
            raise EvaluationError(f"{self.root}: found no {name} question; check --data")

    def set_up(self):
        pass

    def json(self, name):
        content = read_json(self.root / name)
        self.files[str(name)] = len(content)
        return content

    def lines(self, name):
        rows = read_lines(self.root / name)
        self.files[str(name)] = len(rows)
        return rows

    def llava_questions(self, name, image_folder):
        """The question files of LLaVA's evaluation package, which carry the prompt suffix already."""
        questions = []
        for where, row in self.lines(name):
            id = need(row, "question_id", (str, int), where)
            text = need(row, "text", str, where)
            image = self.root / image_folder / need(row, "image", str, where)
            questions.append(Question(id, str(id), text, text, image, where, about=row))
        return questions

    def read_answer(self, row, where, index):
        """A row of an answer file -> (key of its question, text)."""
        return str(need(row, "question_id", (str, int), where)), need(row, "text", str, where)

    def tidy(self, question, text):
        """The model's words -> what goes into the answer file."""
        return text

    def submission(self, questions, texts):
        """{file name: content} for an official server or tool, written beside the answers."""
        return {}


def question_of(prompt):
    return prompt.removesuffix(SHORT).rstrip()


def percent(part, whole):
    return 100 * part / whole if whole else 0.0


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0

# --- GQA --------------------------------------------------------------------------------------------------------------


class GQA(Benchmark):
    """Test-dev, balanced: 12,578 questions; the answer has to equal the gold string."""
    folder = "gqa"
    columns = {"GQA": "accuracy"}

    def load(self):
        questions = self.llava_questions("llava_gqa_testdev_balanced.jsonl", "data/images")
        golds = self.json("data/testdev_balanced_questions.json")
        for question in questions:
            question.gold = golds.get(str(question.id))
            if question.gold is None:
                raise EvaluationError(f"{question.where}: question_id {question.id!r} is not in {self.root / 'data/testdev_balanced_questions.json'}; "
                                      "both files must be of the same release")
            need(question.gold, "answer", str, f"testdev_balanced_questions.json {question.id!r}")
        lacking = [id for id, gold in golds.items() if gold.get("isBalanced") and id not in {str(q.id) for q in questions}]
        if lacking:
            raise EvaluationError(f"{self.root}: {len(lacking):,} balanced questions of testdev_balanced_questions.json are not in "
                                  f"llava_gqa_testdev_balanced.jsonl (first: {lacking[0]}); both must be of the same release")
        return questions

    def score(self, questions, texts):
        """Full stops at the end go, and case, and nothing else: "Yes." is yes, but "yes ." stays "yes " and is wrong."""
        triples, by_type = [], defaultdict(list)
        for question, text in zip(questions, texts):
            parsed, gold = text.rstrip(".").lower(), question.gold["answer"]
            triples.append((parsed, gold, float(parsed == gold)))
            if question.gold.get("isBalanced"):
                types = question.gold.get("types", {})
                by_type["all"].append(triples[-1][2])
                by_type["open" if types.get("structural") == "query" else "binary"].append(triples[-1][2])
                for kind in ("structural", "semantic"):
                    by_type[f"{kind} {types.get(kind)}"].append(triples[-1][2])
        parts = {name: {"accuracy": 100 * mean(scores), "correct": int(sum(scores)), "rows": len(scores)}
                 for name, scores in sorted(by_type.items())}
        everything = parts.pop("all")
        return {"accuracy": everything["accuracy"], "correct": everything["correct"], "balanced_rows": everything["rows"],
                "by_type": parts, "unparsed": sum(parsed == "" for parsed, _, _ in triples)}, triples

# --- VizWiz -----------------------------------------------------------------------------------------------------------

INSUFFICIENT = "When the provided information is insufficient, respond with 'Unanswerable'."


class VizWiz(Benchmark):
    """
    Photos by blind people. The paper's number comes from a server that alone has the answers of the test images: `test` writes the
    file to submit. `val` (4,319 questions) can be scored here, under a name of its own: the two are not interchangeable.
    """
    folder = "vizwiz"
    suffix = f"{INSUFFICIENT}\n{SHORT}"
    columns = {"VizWiz": "val_accuracy"}

    def set_up(self):
        self.switches = {"split": self.args.vizwiz_split}

    def load(self):
        if self.args.vizwiz_split == "test":
            return self.llava_questions("llava_test.jsonl", "test")
        questions = []
        for i, row in enumerate(self.json("val.json")):
            where = f"{self.root / 'val.json'} row {i}"
            prompt = f"{need(row, 'question', str, where)}\n{self.suffix}"
            golds = [need(each, "answer", str, where) for each in need(row, "answers", list, where)]
            image = self.root / "val" / need(row, "image", str, where)
            questions.append(Question(i, str(i), prompt, prompt, image, where, golds, row))
        return questions

    def score(self, questions, texts):
        triples = []
        for question, text in zip(questions, texts):
            parsed, golds, score = normalise(text), None, None
            if question.gold is not None:
                golds = [normalise(gold) for gold in question.gold]
                score = soft_accuracy(parsed, golds)
            triples.append((parsed, golds, score))
        numbers = {"unparsed": sum(parsed == "" for parsed, _, _ in triples)}
        if self.args.vizwiz_split == "val":
            numbers = {"val_accuracy": 100 * mean(score for _, _, score in triples), **numbers}
        else:
            numbers["note"] = "no public answers: submit submission.json to the VizWiz server"
        return numbers, triples

    def submission(self, questions, texts):
        rows = [{"image": question.about["image"], "answer": normalise(text)} for question, text in zip(questions, texts)]
        return {"submission.json": json.dumps(rows, ensure_ascii=False)}

# --- ScienceQA --------------------------------------------------------------------------------------------------------


class ScienceQA(Benchmark):
    """School questions with 2 to 5 choices: 4,241 in the test split, of which 2,017 have an image; the latter are the headline."""
    folder = "scienceqa"
    max_new_tokens = 1024
    suffix = LETTER
    columns = {"SQA-I": "accuracy"}

    def load(self):
        problems, splits = self.json("problems.json"), self.json("pid_splits.json")
        test = need(splits, "test", list, self.root / "pid_splits.json")
        questions = []
        for i, row in enumerate(self.json("llava_test_CQM-A.json")):
            where = f"{self.root / 'llava_test_CQM-A.json'} row {i}"
            id = need(row, "id", (str, int), where)
            problem = problems.get(str(id))
            if problem is None or str(id) not in map(str, test):
                raise EvaluationError(f"{where}: id {id!r} is not a test problem of problems.json and pid_splits.json")
            turns = need(row, "conversations", list, where)
            text = need(turns[0] if turns else None, "value", str, where).replace("<image>", "").strip()
            asked = f"{text}\n{LETTER}"
            image = self.root / "images/test" / need(row, "image", str, where) if row.get("image") else None
            choices = len(need(problem, "choices", list, f"problems.json {id!r}"))
            gold = "ABCDE"[need(problem, "answer", int, f"problems.json {id!r}")]
            questions.append(Question(id, str(id), asked if image is None else f"<image>\n{asked}", asked, image, where, gold,
                                      {"choices": choices, "has_image": bool(problem.get("image"))}))
        lacking = set(map(str, test)) - {question.key for question in questions}
        if lacking:
            raise EvaluationError(f"{self.root / 'llava_test_CQM-A.json'}: {len(lacking):,} problems of the test split are missing (first: {min(lacking)})")
        return questions

    @staticmethod
    def parse(text):
        """
        "A" and "A. rock" are A; "The answer is B." is B, and so is "The answer is Bananas". "A.", "(A)", "a" and two
        verdicts in one answer are failures (None).
        """
        text = text.strip()
        if text in tuple("ABCDE"):
            return text
        if len(text) >= 3 and text[0] in "ABCDE" and text[1:3] == ". ":
            return text[0]
        verdicts = re.findall(r"The answer is ([A-Z]).", text)
        return verdicts[0] if len(verdicts) == 1 else None

    def score(self, questions, texts):
        triples = []
        for question, text in zip(questions, texts):
            parsed = self.parse(text)  # a letter beyond the choices is just wrong
            triples.append((parsed, question.gold, float(parsed == question.gold)))
        with_image = [score for question, (_, _, score) in zip(questions, triples) if question.about["has_image"]]
        everything = [score for _, _, score in triples]
        beyond = sum(parsed is not None and "ABCDEFGHIJKLMNOPQRSTUVWXYZ".index(parsed) >= question.about["choices"]
                     for question, (parsed, _, _) in zip(questions, triples))
        return {"accuracy": 100 * mean(with_image), "correct": int(sum(with_image)), "image_rows": len(with_image),
                "accuracy_all": 100 * mean(everything), "correct_all": int(sum(everything)),
                "beyond_choices": beyond, "unparsed": sum(parsed is None for parsed, _, _ in triples)}, triples

# --- TextVQA ----------------------------------------------------------------------------------------------------------


class TextVQA(Benchmark):
    """
    Reading text in photos: 5,000 validation questions. The prompt may list what an OCR program read in the image; LLaVA, and so the
    paper, lists it, and without it scores fall by about ten points.
    """
    folder = "textvqa"
    columns = {"TextVQA": "accuracy"}

    def set_up(self):
        self.switches = {"ocr_tokens": self.args.ocr}

    def load(self):
        file = "TextVQA_0.5.1_val.json"
        golds = {}
        content = self.json(file)
        for i, row in enumerate(need(content, "data", list, self.root / file)):
            where = f"{self.root / file} row {i}"
            answers = need(row, "answers", list, where)
            if len(answers) != 10:
                raise EvaluationError(f"{where}: {len(answers)} answers, expected ten")
            golds[str(need(row, "image_id", (str, int), where)), need(row, "question", str, where).lower()] = answers
        self.files[file] = len(golds)

        questions = self.llava_questions("llava_textvqa_val_v051_ocr.jsonl", "train_images")
        for question in questions:
            question.key = (str(question.id), self.question_in(question.prompt, question.where))  # the id is the image's
            if question.key not in golds:
                raise EvaluationError(f"{question.where}: image {question.key[0]} with the question {question.key[1]!r} is not in {self.root / file}")
            question.gold = golds[question.key]
            if not self.args.ocr:
                lines = [line for line in question.prompt.split("\n") if not line.startswith("Reference OCR token:")]
                question.prompt = question.asked = "\n".join(lines)
        return questions

    @staticmethod
    def question_in(prompt, where):
        """The question, lower-cased, out of a prompt of three lines (with OCR tokens), two (without) or the one-line form of old."""
        lines = prompt.split("\n")
        old = re.search(r"Question: (.*?) Short answer:", prompt) if prompt.startswith("OCR tokens: ") else None
        if old:
            return old.group(1).lower()
        if len(lines) == 3 and "Reference OCR token:" in prompt:
            return lines[1 if lines[0].startswith("Reference OCR token:") else 0].lower()
        if len(lines) == 2:
            return lines[0].lower()
        raise EvaluationError(f"{where}: cannot tell the question in the prompt {prompt[:60]!r}; expected question, "
                              "perhaps a line \"Reference OCR token: ...\", and the suffix")

    def read_answer(self, row, where, index):
        id, prompt = need(row, "question_id", (str, int), where), need(row, "prompt", str, where)
        return (str(id), self.question_in(prompt, where)), need(row, "text", str, where)

    def score(self, questions, texts):
        triples = []
        for question, text in zip(questions, texts):
            parsed, golds = normalise(text), [normalise(gold) for gold in question.gold]
            triples.append((parsed, golds, soft_accuracy(parsed, golds)))
        return {"accuracy": 100 * mean(score for _, _, score in triples),
                "unparsed": sum(parsed == "" for parsed, _, _ in triples)}, triples

# --- MME --------------------------------------------------------------------------------------------------------------

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()


class MME(Benchmark):
    """Two yes/no questions about each of 1,187 images, one of each answer, in 14 categories."""
    folder = "MME"
    columns = {"MME": "percentage"}

    def load(self):
        release = "MME_Benchmark_release_version"
        questions = self.llava_questions("llava_mme.jsonl", release)
        golds = {}
        for folder in {question.image.parent for question in questions}:
            texts = folder.with_name("questions_answers_YN") if folder.name == "images" else folder
            for path in sorted(texts.glob("*.txt")):
                for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                    if line.strip():
                        asked, tab, gold = line.partition("\t")
                        if gold.strip().lower() not in ("yes", "no"):
                            raise EvaluationError(f"{path} line {number}: found {line[:60]!r}, expected a question, a tab, and Yes or No")
                        golds[folder, path.stem, asked] = gold.strip().lower()
        self.files[f"{release}/*/*.txt"] = len(golds)

        for question in questions:
            question.key = (str(question.id), question_of(question.prompt))  # two questions share the id of their image
            category = need(question.about, "category", str, question.where)
            if category not in PERCEPTION + COGNITION:
                raise EvaluationError(f"{question.where}: unknown category {category!r}, expected one of {', '.join(PERCEPTION + COGNITION)}")
            for spaces in (" ", "  "):  # some official lines have two
                gold = golds.get((question.image.parent, question.image.stem, f"{question.key[1]}{spaces}Please answer yes or no."))
                question.gold = question.gold or gold
            if question.gold is None:
                raise EvaluationError(f"{question.where}: no line \"{question.key[1]} Please answer yes or no.\" in the text file of {question.image}")
        return questions

    def read_answer(self, row, where, index):
        id, prompt = need(row, "question_id", (str, int), where), need(row, "prompt", str, where)
        return (str(id), question_of(prompt)), need(row, "text", str, where)

    @staticmethod
    def parse(text):
        """Only the first four characters count: "Nope", "Not sure" and "Snow" are no; "The answer is yes" and "Y" are other."""
        text = text.lower()
        if text in ("yes", "no"):
            return text
        return "yes" if "yes" in text[:4] else "no" if "no" in text[:4] else "other"

    def score(self, questions, texts):
        """Per category: 100 x (right questions / questions) + 100 x (images with both right / images), so 200 at best."""
        triples, by_category = [], defaultdict(lambda: defaultdict(list))
        for question, text in zip(questions, texts):
            parsed = self.parse(text)
            triples.append((parsed, question.gold, float(parsed == question.gold)))
            by_category[question.about["category"]][str(question.id)].append(triples[-1][2])

        categories = {}
        for category in PERCEPTION + COGNITION:
            if category in by_category:
                images = list(by_category[category].values())
                right, both = sum(map(sum, images)), sum(all(image) for image in images)
                rows = sum(map(len, images))
                categories[category] = {"score": percent(right, rows) + percent(both, len(images)), "correct": int(right), "rows": rows,
                                        "both_correct": both, "images": len(images)}
        perception = [categories[name]["score"] for name in PERCEPTION if name in categories]
        cognition = [categories[name]["score"] for name in COGNITION if name in categories]
        # The paper's MME percentage is perception / 2000; a folder with fewer categories has a lower maximum.
        self.protocol = {"categories": list(categories), "percentage": f"perception / {200 * len(perception)}, cognition left out"}
        return {"percentage": percent(sum(perception), 200 * len(perception)), "perception": sum(perception), "cognition": sum(cognition),
                "categories": categories, "unparsed": sum(parsed == "other" for parsed, _, _ in triples)}, triples

    def submission(self, questions, texts):
        files = defaultdict(str)  # lines for the official tool, which splits them at tabs
        for question, text in zip(questions, texts):
            words = [f"{question.image.stem}.txt", question.key[1], question.gold.capitalize(), " ".join(text.split())]
            files[f"official/{question.about['category']}.txt"] += "\t".join(words) + "\n"
        return files

# --- MMBench ----------------------------------------------------------------------------------------------------------

EMPTY_CELLS = set("#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null|".split("|"))
REFUSALS = ["Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer"]


class MMBench(Benchmark):
    """
    Multiple choice, asked once for every rotation of the options: row i and rows i + 1,000,000 x n of the file are one question, right
    only if all its rows are. One pass over the file is that "circular" evaluation.
    """
    folder = "mmbench"
    max_new_tokens = 1024
    suffix = LETTER
    columns = {"MMB": "accuracy"}
    candidates = ["mmbench_dev_en_20231003.tsv", "mmbench_dev_20230712.tsv"]  # the authors' file, LLaVA's

    def load(self):
        file = next((name for name in self.candidates if (self.root / name).exists()), self.candidates[0])
        path = self.root / file
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            raise EvaluationError(f"{path}: cannot be read; check --data, the README says which files go where") from None
        csv.field_size_limit(1 << 30)
        questions = []
        for number, row in enumerate(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t"), start=2):
            where = f"{path} row {number}"
            for column in ("index", "question", "A", "B", "answer", "image"):
                if not row.get(column):
                    raise EvaluationError(f"{where}: the column {column} is missing or empty")
            if not row["index"].isdigit():
                raise EvaluationError(f"{where}: index should be a whole number, found {row['index'][:60]!r}")
            options = {}
            for letter in "ABCD":
                if self.is_empty(row.get(letter)):
                    break  # so an option "None" ends the list
                options[letter] = row[letter]
            if row["answer"] not in options:
                raise EvaluationError(f"{where}: the answer {row['answer'][:60]!r} is none of the options {', '.join(options)}")
            hint = [] if self.is_empty(row.get("hint")) else [row["hint"]]
            prompt = "\n".join(hint + [row["question"]] + [f"{letter}. {option}" for letter, option in options.items()])
            try:
                image = base64.b64decode(row["image"], validate=True)
            except (binascii.Error, ValueError):
                raise EvaluationError(f"{where}: the column image should be a base64 JPEG, found {row['image'][:40]!r}") from None
            index = int(row["index"])
            about = {name: cell for name, cell in row.items() if name != "image"} | {"options": options}
            questions.append(Question(index, str(index), prompt, f"{prompt}\n{self.suffix}", image, where, row["answer"], about))
        self.files[file] = len(questions)
        return questions

    @staticmethod
    def is_empty(cell):
        return cell is None or cell in EMPTY_CELLS or cell.strip().lower() in ("nan", "none")

    @staticmethod
    def parse(text, options):
        """
        The letter that stands alone in the text, if just one does: "B", "(B)", "B: red". An article counts as the letter A,
        so "A red one, not B" has two and is undecided; then the text of an option may settle it. None: undecided.
        """
        if any(refusal in text for refusal in REFUSALS):
            return "Z"
        tokens = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
        letters = [letter for letter in options if letter in tokens]
        if len(letters) == 1:
            return letters[0]
        if not letters and "Z" in tokens:
            return "Z"
        named = [letter for letter, option in options.items() if option.lower() in text.lower()]
        return named[0] if len(named) == 1 else None

    def score(self, questions, texts):
        triples, groups = [], defaultdict(list)
        for question, text in zip(questions, texts):
            parsed = self.parse(text, question.about["options"])
            triples.append((parsed, question.gold, float(parsed == question.gold)))
            groups[question.id % 1_000_000].append((question, triples[-1][2]))

        circular = {index: float(all(score for _, score in rows)) for index, rows in groups.items()}
        parts = {}
        for column in ("category", "l2-category"):
            by_name = defaultdict(list)
            for index, rows in groups.items():
                by_name[rows[0][0].about.get(column)].append(circular[index])
            parts[column] = {name: {"accuracy": 100 * mean(scores), "correct": int(sum(scores)), "questions": len(scores)}
                             for name, scores in by_name.items() if name}
        vanilla = [score for question, (_, _, score) in zip(questions, triples) if question.id < 1_000_000]
        self.protocol = {"accuracy": "circular: every rotation right", "vanilla_accuracy": "unrotated rows only"}
        return {"accuracy": 100 * mean(circular.values()), "correct": int(sum(circular.values())), "questions": len(circular),
                "vanilla_accuracy": 100 * mean(vanilla), "vanilla_correct": int(sum(vanilla)), "vanilla_rows": len(vanilla),
                "by_category": parts["category"], "by_l2_category": parts["l2-category"],
                "unparsed": sum(parsed in (None, "Z") for parsed, _, _ in triples)}, triples

    def submission(self, questions, texts):
        columns = [name for name in questions[0].about if name not in ("hint", "category", "source", "comment", "l2-category", "options")]
        columns.insert(6, "prediction")
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, delimiter="\t", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for question, text in zip(questions, texts):
            writer.writerow(question.about | {"prediction": text})
        return {"submission.tsv": table.getvalue()}


class MMBenchCN(MMBench):
    """The same questions in Chinese. They have the indices of the English file, so the two must not share answers."""
    suffix = LETTER_CN
    columns = {"MMB-CN": "accuracy"}
    candidates = ["mmbench_dev_cn_20231003.tsv"]

# --- POPE -------------------------------------------------------------------------------------------------------------


class POPE(Benchmark):
    """
    "Is there a kite in the image?", half of the time there is. What is not there was drawn at random, from the popular
    objects, or from those that usually come with what is there (adversarial). Positive is yes.
    """
    folder = "pope"
    columns = {"POPE F1": "f1"}

    def load(self):
        questions = self.llava_questions("llava_pope_test.jsonl", "val2014")
        labels = {}
        for question in questions:
            category = need(question.about, "category", str, question.where)
            file = f"coco/coco_pope_{category}.json"
            if file not in self.files:
                for where, row in self.lines(file):
                    label = need(row, "label", str, where)
                    if label not in ("yes", "no"):
                        raise EvaluationError(f'{where}: found the label {label[:60]!r}, expected "yes" or "no"')
                    labels[category, need(row, "image", str, where), need(row, "text", str, where)] = label
            # The random split was released twice with other questions. The official scorer pairs lines by position, and with the
            # wrong release F1 falls by 40 points without a word. So: join on what was asked, and fail on a miss.
            key = category, question.about["image"], question_of(question.prompt)
            if key not in labels:
                raise EvaluationError(f"{question.where}: {key[2]!r} about {key[1]} has no label in {self.root / file}; "
                                      "it is of another release than the question file (random has one of 2,910 rows, which fits "
                                      "LLaVA's questions, and one of 3,000)")
            question.gold = labels[key]
        return questions

    @staticmethod
    def parse(text):
        """
        No, if the words before the first full stop include No, no or not; yes otherwise. Split at single spaces, so "Not really",
        "NO", "No!", "isn't", "None" and silence are yes.
        """
        words = text.split(".")[0].replace(",", "").split(" ")
        return "no" if any(word in ("No", "no", "not") for word in words) else "yes"

    @staticmethod
    def counts(pairs):
        """
        (parsed, gold) pairs -> accuracy, precision, recall, F1. By hand: 3 true yes, 1 false yes, 2 false no, 4 true no
        gives precision 3/4, recall 3/5, F1 = 2 * 3 / (2 * 3 + 1 + 2) = 2/3, accuracy 7/10.
        """
        count = Counter(pairs)
        tp, fp = count["yes", "yes"], count["yes", "no"]
        fn, tn = count["no", "yes"], count["no", "no"]
        return {"f1": percent(2 * tp, 2 * tp + fp + fn), "accuracy": percent(tp + tn, len(pairs)), "precision": percent(tp, tp + fp),
                "recall": percent(tp, tp + fn), "yes_ratio": percent(tp + fp, len(pairs)), "gold_yes_ratio": percent(tp + fn, len(pairs)),
                "true_yes": tp, "false_yes": fp, "false_no": fn, "true_no": tn, "rows": len(pairs)}

    def score(self, questions, texts):
        triples, by_split = [], defaultdict(list)
        for question, text in zip(questions, texts):
            parsed = self.parse(text)
            triples.append((parsed, question.gold, float(parsed == question.gold)))
            by_split[question.about["category"]].append((parsed, question.gold))
        splits = {name: self.counts(pairs) for name, pairs in by_split.items()}
        rates = ["f1", "accuracy", "precision", "recall", "yes_ratio", "gold_yes_ratio"]
        numbers = {rate: mean(split[rate] for split in splits.values()) for rate in rates}
        self.protocol = {"headline": f"mean over the splits {', '.join(splits)}", "labels": "joined on image and question"}
        pooled = self.counts([(parsed, gold) for parsed, gold, _ in triples])
        vague = sum(not re.search(r"\b(yes|no|not)\b", text.lower()) for text in texts)
        return {**numbers, "splits": splits, "pooled": pooled, "unparsed": vague}, triples  # vague ones count as yes all the same

# --- Object HalBench --------------------------------------------------------------------------------------------------


class ObjHal(Benchmark):
    """
    CHAIR on 300 COCO images: which objects does a description name that are not there? Lower is better, and saying little is a way
    to get there: recall and length stand beside it. True is what an annotator outlined or one of five captions names.
    """
    folder = "objhal"
    max_new_tokens = 1024
    suffix = ""

    @property
    def columns(self):
        kind = "_extracted" if self.args.objhal_extract else ""
        return {"ObjHal resp": f"chair_s{kind}", "ObjHal ment": f"chair_i{kind}"}

    def load(self):
        path = self.root / "synonyms.txt"
        self.words = CocoWords(path.read_text(encoding="utf-8") if path.exists() else SYNONYMS)
        self.protocol["vocabulary"] = "synonyms.txt" if path.exists() else "built in"
        self.protocol["words"] = len(self.words.category)

        questions = []
        for where, row in self.lines("obj_halbench_300_with_image.jsonl"):
            image_id, prompt = need(row, "image_id", int, where), need(row, "question", str, where)
            try:
                image = base64.b64decode(need(row, "image", str, where), validate=True)
            except (binascii.Error, ValueError):
                raise EvaluationError(f"{where}: \"image\" should be a base64 image, found {row['image'][:40]!r}") from None
            questions.append(Question(row.get("question_id", image_id), str(image_id), prompt, prompt, image, where, set(), {"image_id": image_id}))

        golds, annotated = {question.about["image_id"]: question.gold for question in questions}, set()
        for split in ("train2014", "val2014"):
            instances, captions = f"annotations/instances_{split}.json", f"annotations/captions_{split}.json"
            content = self.json(instances)
            names = {need(row, "id", int, instances): need(row, "name", str, instances) for row in need(content, "categories", list, self.root / instances)}
            annotated |= {need(row, "id", int, instances) for row in need(content, "images", list, self.root / instances)}
            for row in need(content, "annotations", list, self.root / instances):
                if row["image_id"] in golds:
                    golds[row["image_id"]].add(names[row["category_id"]])
            self.files[instances] = len(content["annotations"])
            content = self.json(captions)
            for row in need(content, "annotations", list, self.root / captions):
                if row["image_id"] in golds:
                    golds[row["image_id"]].update(self.words.in_text(need(row, "caption", str, captions)))
            self.files[captions] = len(content["annotations"])
        for question in questions:
            if question.about["image_id"] not in annotated:
                raise EvaluationError(f"{question.where}: image_id {question.about['image_id']} is in neither of the instances files of {self.root / 'annotations'}")
        return questions

    def read_answer(self, row, where, index):
        id = row.get("image_id", row.get("question_id")) if isinstance(row, dict) else None
        if not isinstance(id, int):
            need(row, "image_id", int, where)
        return str(id), need(row, "text", str, where)

    def score(self, questions, texts):
        chat = None
        if self.args.objhal_extract:
            chat = ChatModel(self.args, self.args.out_dir / self.name / "extracted.jsonl", temperature=0.2)
        triples, totals, lengths = [], Counter(), []
        for question, text in zip(questions, texts):
            text = text.replace("Assistant:", "")
            mentions = self.words.in_list(self.extract(chat, question, text)) if chat else self.words.in_text(text)
            wrong = [mention for mention in mentions if mention not in question.gold]
            totals.update(mentions=len(mentions), hallucinated_mentions=len(wrong), responses_with_mention=bool(mentions),
                          responses_hallucinated=bool(wrong), gold_objects=len(question.gold), found_objects=len(set(mentions) & question.gold))
            lengths.append(len(text.split()))
            triples.append((mentions, sorted(question.gold), float(not wrong)))
        kind = "_extracted" if chat else ""
        self.protocol["objects"] = f"listed by {self.args.judge_model}" if chat else "the words of the response"
        return {f"chair_s{kind}": percent(totals["responses_hallucinated"], totals["responses_with_mention"]),
                f"chair_i{kind}": percent(totals["hallucinated_mentions"], totals["mentions"]),
                f"chair_s_all{kind}": percent(totals["responses_hallucinated"], len(texts)),
                f"recall{kind}": percent(totals["found_objects"], totals["gold_objects"]), "mean_words": mean(lengths),
                **totals, "unparsed": len(texts) - totals["responses_with_mention"]}, triples

    def extract(self, chat, question, text):
        if len(text.split()) <= 3:
            return []
        prompt = ("List the objects that the answer below says are in the image. Give only objects that it names itself, in the singular, "
                  "without colours or other attributes; leave out what it says is absent and what is only a guess. "
                  'Reply with a JSON list of strings and nothing else, such as ["dog", "traffic light"].\n\n'
                  f"Question: {question.prompt}\nAnswer: {text}")
        reply = chat.ask(prompt)
        try:
            objects = json.loads(reply[reply.index("["):reply.rindex("]") + 1])
        except ValueError:
            objects = None
        if not isinstance(objects, list) or not all(isinstance(name, str) for name in objects):
            raise EvaluationError(f"{chat.path}: the reply of {chat.model} for image_id {question.key} should be a JSON list of "
                                  f"strings, found {reply[:60]!r}; remove its line and run again, or take another --judge_model")
        return objects

# --- MMHal-Bench ------------------------------------------------------------------------------------------------------

JUDGE_PROMPT = """\
You judge whether the answer of a vision-language model to a question about an image is hallucinated, that is, says something that the \
image does not support. You cannot see the image. You get a list of what is in it, the question, an answer that a person wrote, \
and the answer to judge. Whatever agrees with the list, with the person's answer or follows from them is supported, and so is general \
knowledge. An answer may be right without naming everything.

First explain your view in a few sentences. Then end with a line "Rating: n" where n is
6, very informative with good analysis or reasoning, no hallucination
5, very informative, no hallucination
4, somewhat informative, no hallucination
3, not informative, no hallucination
2, very informative, with hallucination
1, somewhat informative, with hallucination
0, not informative, with hallucination

Example 1
Image contents: Dog, Frisbee, Grass
Question: What colour is the dog's collar?
Human answer: The dog wears no collar.
Answer to judge: The collar is red.
Explanation: The person says that there is no collar, so its colour is invented, and nothing else is said.
Rating: 0

Example 2
Image contents: Bus, Street, Person
Question: How many people stand at the bus stop?
Human answer: Three people wait there.
Answer to judge: Three people stand at the stop, waiting for the bus that is coming down the street.
Explanation: The number agrees with the person's answer, and the bus and the street are in the list.
Rating: 5

Example 3
Image contents: Table, Cup, Book
Question: What is to the left of the cup?
Human answer: A book lies to the left of the cup.
Answer to judge: There is something there.
Explanation: That is true but says nothing of use.
Rating: 3

Example 4
Image contents: Kitchen, Oven, Woman
Question: Describe the image.
Human answer: A woman stands in a kitchen beside an oven.
Answer to judge: A woman is in a kitchen with an oven, and a cat sleeps on the floor.
Explanation: The woman, the kitchen and the oven are there, but no cat is in the list or in the person's answer.
Rating: 2

Example 5
Image contents: Surfboard, Man, Sea, Clouds
Question: Why might the man be carrying the board?
Human answer: He is going to surf, as he is walking towards the sea.
Answer to judge: He probably is about to surf: he carries a surfboard and is near the sea. The clouds suggest wind, which brings waves.
Explanation: The answer agrees with the person's, draws on what is in the image, and reasons well from the clouds.
Rating: 6

Now judge this one.
Image contents: {}
Question: {}
Human answer: {}
Answer to judge: {}
"""


class MMHal(Benchmark):
    """
    96 open questions, judged by a chat model that reads a list of what is in the image. Scores under different judges are not comparable,
    nor are long and short answers: the authors' script asks for short ones, the original benchmark does not (--mmhal_short=False).
    """
    folder = "mmhal"
    max_new_tokens = 1024
    columns = {"MMHal": "score", "MMHal hall": "hallucination_rate"}

    def set_up(self):
        self.switches = {"short_answers": self.args.mmhal_short}
        self.suffix = SHORT if self.args.mmhal_short else ""

    def load(self):
        questions = []
        rows = self.json("response_template.json")
        for i, row in enumerate(rows if isinstance(rows, list) else [rows]):
            where = f"{self.root / 'response_template.json'} row {i}"
            prompt = need(row, "question", str, where)
            name = row.get("image_file") or need(row, "image_src", str, where)
            image = self.root / "images" / name.rsplit("/", 1)[-1]
            gold = {"contents": need(row, "image_content", list, where), "answer": need(row, "gt_answer", str, where),
                    "type": need(row, "question_type", str, where)}
            asked = f"{prompt}\n{SHORT}" if self.args.mmhal_short else prompt
            questions.append(Question(i, str(i), prompt, asked, image, where, gold))
        return questions

    def read_answer(self, row, where, index):
        if isinstance(row, dict) and "model_answer" in row:  # the official template, filled in: its order is the key
            return str(index), need(row, "model_answer", str, where)
        return super().read_answer(row, where, index)

    @staticmethod
    def parse(reply):
        """The one n of "rating: n", 0 to 6; none or several different ones count as 0. So "Rating: 10" is 1, "Rating:4" is 0."""
        ratings = [n for n in range(7) if f"rating: {n}" in reply.lower()]
        return ratings[0] if len(ratings) == 1 else None

    def score(self, questions, texts):
        path = self.root / "judge_prompt.txt"  # a template with four {}: image contents, question, human answer, answer to judge
        template = path.read_text(encoding="utf-8") if path.exists() else JUDGE_PROMPT
        judge = ChatModel(self.args, self.args.out_dir / self.name / "judge.jsonl", temperature=0)
        prompts = [template.format(", ".join(question.gold["contents"]), question.prompt, question.gold["answer"], text)
                   for question, text in zip(questions, texts)]
        waiting = [prompt for prompt in prompts if prompt not in judge.replies]
        if waiting and not judge.url:
            kept = [{"model": judge.model, "prompt": prompt, "reply": reply} for prompt, reply in judge.replies.items()]
            write_lines(judge.path, kept + [{"model": None, "prompt": prompt, "reply": None} for prompt in waiting])
            return {"note": f"{len(waiting)} answers wait for their judge: give --judge_url and --judge_model and run again, or put a "
                            f"\"reply\" (and the judge's name as \"model\") into each line of {judge.path} and run again",
                    "unparsed": 0}, [(None, question.gold["answer"], None) for question in questions]

        triples = []
        for question, prompt in zip(questions, prompts):
            parsed = self.parse(judge.ask(prompt))
            triples.append((parsed, question.gold["answer"], float(parsed or 0)))
        ratings = [rating for _, _, rating in triples]
        types = dict.fromkeys(question.gold["type"] for question in questions)
        self.protocol = {"judge": ", ".join(sorted(map(str, judge.models))), "judge_prompt": "judge_prompt.txt" if path.exists() else "built in"}
        return {"score": mean(ratings), "hallucination_rate": percent(sum(rating < 3 for rating in ratings), len(ratings)),
                "informativeness": mean(rating - 3 if rating >= 3 else rating for rating in ratings) / 3 * 100,
                "by_type": {kind: mean(rating for question, rating in zip(questions, ratings) if question.gold["type"] == kind) for kind in types},
                "unparsed": sum(parsed is None for parsed, _, _ in triples)}, triples

    def submission(self, questions, texts):
        rows = [row | {"model_answer": text} for row, text in zip(self.json("response_template.json"), texts)]
        return {"responses.json": json.dumps(rows, ensure_ascii=False, indent=1)}

# --- AMBER ------------------------------------------------------------------------------------------------------------


class AMBER(Benchmark):
    """
    1,004 descriptions and 14,216 yes/no questions. The official scorer tags nouns and compares them by word vectors with two
    language packages; here a noun is any word of AMBER's own association lists, and words match when they are equal or listed as
    associated. So CHAIR comes out a little higher and Cover lower than there; the yes/no half is the same.
    """
    folder = "AMBER"
    max_new_tokens = 1024

    def load(self):
        self.associated = self.json("data/relation.json")
        self.vocabulary = set(self.associated).union(*self.associated.values())
        self.safe = set((self.root / "data/safe_words.txt").read_text(encoding="utf-8").split())
        golds, questions = self.json("data/annotations.json"), []
        for i, row in enumerate(self.json("data/query/query_all.json")):
            where = f"{self.root / 'data/query/query_all.json'} row {i}"
            id, query = need(row, "id", int, where), need(row, "query", str, where)
            if not 1 <= id <= len(golds):
                raise EvaluationError(f"{where}: id {id} has no entry in data/annotations.json, which has {len(golds):,}")
            gold = golds[id - 1]  # by position
            asked = query if gold["type"] == "generative" else f"{query}\n{SHORT}"
            questions.append(Question(id, str(id), query, asked, self.root / "image" / need(row, "image", str, where), where, gold))
        return questions

    def read_answer(self, row, where, index):
        if isinstance(row, dict) and "response" in row:  # the official format
            return str(need(row, "id", int, where)), need(row, "response", str, where)
        return super().read_answer(row, where, index)

    def tidy(self, question, text):
        """The scorer takes exactly "Yes" or "No", so "yes, it is" has to become the one and "there is none" the other before."""
        if question.gold["type"] == "generative":
            return text
        return "Yes" if "yes" in text.lower() else "No" if "no" in text.lower() else text

    def score(self, questions, texts):
        totals, triples = Counter(), []
        for question, text in zip(questions, texts):
            if question.gold["type"] == "generative":
                triples.append(self.score_description(question.gold, text, totals))
            else:
                truth = question.gold["truth"].capitalize()
                parsed = text if text in ("Yes", "No") else "other"
                triples.append((parsed.lower(), truth.lower(), float(parsed == truth)))

        def ratio(part, whole):  # all official counters start at 0.001, which shows in tiny samples
            return 100 * (part + 0.001) / (whole + 0.001)

        chair = round(ratio(totals["hallucinated"], totals["nouns"]), 1)
        numbers = {"chair": chair, "cover": round(ratio(totals["covered"], totals["truth"]), 1),
                   "hal": round(100 - ratio(totals["clean"], totals["descriptions"]), 1),
                   "cog": round(ratio(totals["cog"], totals["hallu"]), 1), "counts": dict(totals)}

        attribute = ["discriminative-attribute-state", "discriminative-attribute-number", "discriminative-attribute-action"]
        kinds = {"all": None, "existence": ["discriminative-hallucination"], "attribute": attribute,
                 "state": attribute[:1], "number": attribute[1:2], "action": attribute[2:], "relation": ["discriminative-relation", "relation"]}
        for name, types in kinds.items():
            rows = [triple for question, triple in zip(questions, triples)
                    if question.gold["type"] != "generative" and (types is None or question.gold["type"] in types)]
            correct_no = sum(parsed == gold == "no" for parsed, gold, _ in rows)
            precision = round(ratio(correct_no, sum(parsed == "no" for parsed, _, _ in rows)), 1)  # positive is no
            recall = round(ratio(correct_no, sum(gold == "no" for _, gold, _ in rows)), 1)
            nudge = 0.001 if name == "existence" else 0.0001
            f1 = round(2 * precision * recall / (precision + recall + 100 * nudge), 1)
            part = {"accuracy": round(ratio(sum(score for _, _, score in rows), len(rows)), 1), "precision": precision,
                    "recall": recall, "f1": f1, "rows": len(rows)}
            numbers |= part if name == "all" else {name: part}
        numbers["amber_score"] = (100 - chair + numbers["f1"]) / 2
        numbers["unparsed"] = sum(parsed == "other" for parsed, _, _ in triples)
        self.protocol = {"nouns": "words of data/relation.json; equal or associated, no word vectors"}
        return numbers, triples

    def score_description(self, gold, text, totals):
        for word in gold["truth"] + gold["hallu"]:
            if word not in self.associated:
                raise EvaluationError(f"{self.root / 'data/relation.json'}: no entry for {word!r}, which data/annotations.json names")

        def owner(noun, objects):
            """Position of the object that a noun stands for: associations of all objects first, then the objects themselves."""
            for i, word in enumerate(objects):
                if noun in self.associated[word]:
                    return i
            return objects.index(noun) if noun in objects else None

        nouns = [noun for noun in (lemma(token, self.vocabulary) for token in word_tokens(text)) if noun in self.vocabulary]
        covered, cog, hallucinated = set(), set(), []
        for noun in nouns:
            if noun in self.safe:
                continue
            if owner(noun, gold["truth"]) is not None:
                covered.add(owner(noun, gold["truth"]))
                continue
            if owner(noun, gold["hallu"]) is not None:
                cog.add(owner(noun, gold["hallu"]))
            hallucinated.append(noun)
        totals.update(nouns=len(nouns), hallucinated=len(hallucinated), covered=len(covered), truth=len(gold["truth"]), cog=len(cog),
                      hallu=len(gold["hallu"]), clean=not hallucinated, descriptions=1)
        return nouns, gold["truth"], float(not hallucinated)

    def submission(self, questions, texts):
        return {"responses.json": json.dumps([{"id": question.id, "response": text} for question, text in zip(questions, texts)], ensure_ascii=False)}


BENCHMARKS = {"gqa": GQA, "vizwiz": VizWiz, "scienceqa": ScienceQA, "textvqa": TextVQA, "mme": MME, "mmbench": MMBench,
              "mmbench_cn": MMBenchCN, "pope": POPE, "objhal": ObjHal, "mmhal": MMHal, "amber": AMBER}

# ----------------------------------------------------------------------------------------------------------------------
# 8. The report

# Tables 1, 2 and 5 of the paper.
COMPREHENSION = ["GQA", "VizWiz", "SQA-I", "TextVQA", "MME", "MMB", "MMB-CN", "AVG"]
HALLUCINATION = ["ObjHal resp", "ObjHal ment", "POPE F1", "MMHal", "MMHal hall"]
PAPER = {
    "teacher, Qwen-1.5-7B": [62.3, 40.7, 70.9, 55.3, 72.1, 68.5, 64.9, 62.1, 50.1, 24.8, 84.9, 2.60, 20.7],
    "teacher, Qwen-2-7B": [62.5, 37.9, 73.2, 57.2, 78.0, 71.6, 71.1, 64.5, 29.7, 23.4, 85.7, 2.88, 14.5],
    "2B, Qwen-1.5-1.8B": [58.7, 39.2, 68.0, 58.5, 66.7, 66.3, 61.9, 59.9, 11.4, 7.2, 87.0, 2.76, 17.2],
    "2B, Qwen-2-1.5B": [58.8, 40.4, 69.2, 59.9, 69.2, 68.9, 64.4, 61.6, 11.2, 5.9, 87.2, 2.91, 13.8],
    "1B, Qwen-1.5-0.5B": [56.2, 31.6, 62.8, 53.9, 65.3, 58.8, 50.4, 54.1],
    "1B, Qwen-2-0.5B": [56.6, 35.1, 61.1, 57.1, 67.0, 58.7, 54.1, 55.7],
    "2B, Qwen-1.5-1.8B, mimic only": [59.3, 40.0, 68.4, 58.7, 68.4, 65.1, 61.5, 60.2, 39.1, 22.6, 86.7, 2.75, 17.8],
}


def report(benchmark, texts, settings, args):
    """Score one benchmark; write scored.jsonl, its entry of results.json, and results.md."""
    missing = [question for question in benchmark.questions if question.key not in texts]
    questions = [question for question in benchmark.questions if question.key in texts]
    answers = [texts[question.key] for question in questions]
    folder = args.out_dir / benchmark.name

    entry = {"rows": len(benchmark.questions), "missing": len(missing)}
    numbers, triples = benchmark.score(questions, answers)
    write_lines(folder / "scored.jsonl", [
        {"question_id": question.id, "text": text, "parsed": parsed, "gold": gold, "score": score}
        for question, text, (parsed, gold, score) in zip(questions, answers, triples)])
    if missing:  # an average over what happens to be there is no result
        refusal = f"{len(missing):,} of {len(benchmark.questions):,} questions have no answer (first: question_id {missing[0].id!r})"
        entry["refused"] = refusal
    else:
        for name, content in benchmark.submission(questions, answers).items():
            write_text(folder / name, content)
        entry = {**numbers, **entry}
    entry["protocol"] = {"files": benchmark.files, "suffix": benchmark.suffix, "beams": 1, "temperature": 0,
                         **benchmark.switches, **benchmark.protocol}
    if args.answers:
        entry["protocol"] = {"files": benchmark.files, "answers": str(args.answers), **benchmark.protocol}
    entry["protocol"]["answering"] = settings or "not recorded in the answer file"

    path = args.out_dir / "results.json"
    results = read_json(path) if path.exists() else {}
    results[benchmark.name] = entry
    results.pop("average", None)
    row = our_row(results)
    if all(name in row for name in COMPREHENSION[:-1]):
        results["average"] = row["AVG"] = mean(row[name] for name in COMPREHENSION[:-1])
    write_text(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_text(args.out_dir / "results.md", markdown(row))
    if missing:
        raise EvaluationError(f"{args.answers or folder / 'answers.jsonl'}: {refusal}; no {benchmark.name} number without all of them")
    shown = ", ".join(f"{name} {value:.2f}" for name, value in numbers.items() if isinstance(value, float))
    print(f"{benchmark.name}: {numbers.get('note') or shown} ({entry['rows']:,} rows, {entry['unparsed']:,} unparsed) -> {folder / 'scored.jsonl'}")


def our_row(results):
    """results.json -> {column: number}, of the headlines that are there."""
    row = {}
    for name, kind in BENCHMARKS.items():
        names = kind.columns
        if name == "objhal":  # two modes, two names; the extracted one is the paper's
            names = {"ObjHal resp": "chair_s", "ObjHal ment": "chair_i"}
            if "chair_s_extracted" in results.get(name, {}):
                names = {column: f"{key}_extracted" for column, key in names.items()}
        for column, key in names.items():
            if key in results.get(name, {}):
                row[column] = results[name][key]
    return row


def markdown(row):
    """Our numbers under the paper's, as two tables."""
    text = ""
    for first, columns in [(0, COMPREHENSION), (len(COMPREHENSION), HALLUCINATION)]:
        text += f"| model | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}\n"
        for name, numbers in PAPER.items():
            cells = numbers[first:first + len(columns)]
            if cells:
                text += f"| paper: {name} | {' | '.join(f'{number:.2f}' if number < 5 else f'{number:.1f}' for number in cells)} |\n"
        cells = [f"{row[column]:.2f}" if column in row else "" for column in columns]
        text += f"| **ours** | {' | '.join(cells)} |\n\n"
    return text + ("MME is the perception score as a percentage of its maximum. ObjHal and MMHal hall: lower is better. Our VizWiz is the "
                   "local val score, the paper's comes from the server. How each of ours was made stands in results.json.\n")


def evaluate(args):
    benchmarks = [BENCHMARKS[name](name, args) for name in args.benchmark]  # reads and checks every file before any work
    if args.answers:
        texts, settings = read_answers(args.answers, benchmarks[0])
        report(benchmarks[0], texts, settings, args)
        return

    rank, world = start_ranks()
    if world > 1 and args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    loaded = []

    def llava():  # loaded when the first question needs it, then kept
        if not loaded:
            loaded.append(Llava.from_pretrained(args.model, dtype=getattr(torch, args.dtype), device=args.device).eval())
        return loaded[0]

    for benchmark in benchmarks:
        answer(benchmark, llava, args, rank, world)
        if rank == 0:
            texts, settings = read_answers(args.out_dir / benchmark.name / "answers.jsonl", benchmark)
            report(benchmark, texts, settings, args)
    wait_for_all(world)


def main(argv: list[str] | None = None) -> int:
    try:
        evaluate(parse_arguments(sys.argv[1:] if argv is None else argv))
        return 0
    except (EvaluationError, DataError, CheckpointError) as error:
        print(f"evaluate.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
