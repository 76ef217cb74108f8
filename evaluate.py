"""
Answers the paper's benchmarks with a checkpoint, and scores answers the way the official scorers do.

    python evaluate.py --model=out/pd --benchmark=pope,gqa --data=data/eval --out_dir=out/eval      # answer and score
    python evaluate.py --answers=a.jsonl --benchmark=pope --data=data/eval --out_dir=out/eval       # only score
    torchrun --nproc_per_node=8 evaluate.py --model=out/pd --benchmark=mme ...                      # on 8 GPUs

A benchmark is three things: questions about images, a prompt, and a rule that turns free text into a score. The model
hardly matters for the first two, and the rule is where numbers of different papers part: POPE reads "None" as *yes*,
MME reads "Not sure" as *no*, ScienceQA fails "A." and accepts "A. rock". Nobody would invent these rules today, but a
number stands beside the published one only if it obeys them. So every rule here is the official one, oddities
included, and each oddity is named where it happens.

`--data` is the folder that LLaVA's evaluation package unpacks to, with one folder per benchmark. `--out_dir` gets
    NAME/answers.jsonl  {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}, a line per question
    NAME/scored.jsonl   the scorer's view: {"question_id", "text", "parsed", "gold", "score"}
    results.json        the numbers (percentages out of 100), each with the protocol that made it
    results.md          the numbers below the paper's
A run that was interrupted continues where it stopped.

Read top-down: 1. the command line, 2. answering, 3. files, 4. the normaliser of the VQA family, 5. nouns and objects
in a text, 6. asking a chat model, 7. the benchmarks, 8. the report.
"""
import argparse
import base64
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

from configurator import UserError
from data import load_image, render, transform_image
from model import Llava


# ----------------------------------------------------------------------------------------------------------------------
# 1. The command line


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its usage and exit; we say one line like everywhere
        raise UserError(message)


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
    add("--mmhal_short", type=yes_or_no, default=True, help="mmhal: ask for short answers, as the authors do")
    add("--objhal_extract", type=yes_or_no, default=False, help="objhal: a chat model lists the objects named")
    add("--judge_url", help="OpenAI-compatible endpoint of the chat model, such as http://localhost:8000/v1")
    add("--judge_model", help="name of the chat model there")
    add("--judge_key_env", help="environment variable that holds the endpoint's key")
    args, unknown = parser.parse_known_args(argv)

    if unknown:
        flag = unknown[0].split("=")[0]
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(flag, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "see --help"
        raise UserError(f"{unknown[0]}: no such flag, {hint}")
    args.benchmark = args.benchmark.split(",")
    for name in args.benchmark:
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(name, BENCHMARKS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(BENCHMARKS)}"
            raise UserError(f"--benchmark: found {name!r}, {hint}")
    if (args.model is None) == (args.answers is None):
        raise UserError("give either --model=DIR to answer the questions or --answers=FILE to score answers")
    if args.answers and len(args.benchmark) > 1:
        raise UserError(f"--answers is of one benchmark, found --benchmark={','.join(args.benchmark)}")
    if bool(args.judge_url) != bool(args.judge_model):
        raise UserError("--judge_url and --judge_model go together: where the chat model is, and which it is")
    if args.objhal_extract and not args.judge_url:
        raise UserError("--objhal_extract=True needs the chat model: give --judge_url and --judge_model")
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
    """-> (rank, world size). Under torchrun the ranks meet at barriers only and talk through files: gloo will do."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=1))  # a rank may wait long for a slower one
    return int(os.environ.get("RANK", 0)), world


def wait_for_all(world):
    if world > 1:
        dist.barrier()


def load_pixels(question, size, crop):
    if isinstance(question.image, Path):
        image = load_image(str(question.image))
    else:
        try:
            image = load_image(io.BytesIO(question.image))
        except UserError:
            raise UserError(f"{question.where}: the base64 is not a readable image; replace the file") from None
    return transform_image(image, size, pad=not crop)  # (3, S, S)


def settings_of(benchmark, args):
    """
    All that the answers depend on. It is kept in settings.json beside them: an interrupted run is continued, and
    finished answers are used again, only if nothing here has changed, the weights and the questions included.
    """
    weights = sorted(args.model.glob("*.safetensors"))
    if not weights:
        raise UserError(f"--model: {args.model} holds no *.safetensors file; give the folder of a checkpoint")
    written = time.gmtime(max(file.stat().st_mtime for file in weights))
    questions = hashlib.sha256("".join(benchmark.job(question) for question in benchmark.questions).encode())
    return {"model": str(args.model), "weights_written": time.strftime("%Y-%m-%d %H:%M:%S", written),
            "questions": questions.hexdigest()[:12], "suffix": benchmark.suffix, **benchmark.switches,
            "crop": args.crop, "beams": 1, "temperature": 0, "max_new_tokens": benchmark.max_new_tokens,
            "dtype": args.dtype}


def answer(benchmark, llava, args, rank, world):
    """
    Answer every question of the benchmark; rank 0 writes answers.jsonl. `llava` is a function that gives the model,
    so that nothing is loaded when nothing is left to do.

    Each rank appends to a file of its own, answers.partial.RANK.jsonl, which is what a later run continues from.
    """
    folder, questions = args.out_dir / benchmark.name, benchmark.questions
    settings = settings_of(benchmark, args)
    if (folder / "settings.json").exists() and read_json(folder / "settings.json") != settings:
        found = read_json(folder / "settings.json")
        changed = next(key for key in settings | found if settings.get(key) != found.get(key))
        raise UserError(f"{folder}: holds answers made with {changed} {found.get(changed)!r}, this run has "
                              f"{settings.get(changed)!r}; remove the folder or choose another --out_dir")
    if (folder / "answers.jsonl").exists():
        if rank == 0:
            print(f"{benchmark.name}: already answered in {folder / 'answers.jsonl'}")
        return
    for question in questions:
        if isinstance(question.image, Path) and not question.image.is_file():
            raise UserError(f"{question.where}: image {question.image} does not exist; check --data")

    wait_for_all(world)  # every rank has seen the settings of an earlier run, if any
    if rank == 0:
        write_text(folder / "settings.json", json.dumps(settings, indent=1) + "\n")
        collect_partial_answers(folder)
    wait_for_all(world)
    answered = read_partial_answers(folder / "answers.partial.jsonl")
    jobs = {benchmark.job(question): question for question in questions}
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
            text = benchmark.tidy(question, answered[benchmark.job(question)])
            rows.append({"question_id": question.id, "prompt": question.prompt, "text": text,
                         "answer_id": f"{benchmark.name}-{i}", "model_id": str(args.model), "metadata": {},
                         **benchmark.extra_columns(question)})
        write_lines(folder / "answers.jsonl", rows)
        (folder / "answers.partial.jsonl").unlink()
    wait_for_all(world)


@torch.no_grad()
def answer_jobs(benchmark, llava, args, todo, folder, rank, world):
    """
    Greedy decoding in batches, every `world`-th batch on this rank. Sorted by length, so that a batch needs little
    padding and the longest come first: a batch that does not fit into memory says so at once. No row sees another.
    """
    config, tokenizer = llava.config, llava.tokenizer
    size = 1 if config.pad_token_id is None else args.batch_size  # nothing to pad with: rows of unequal length cannot meet
    work = []
    for job, question in todo.items():
        asked = question.asked if question.image is None else "<image>\n" + question.asked
        ids, _ = render([{"from": "human", "value": asked}], tokenizer, config.template, config.image_tokens)
        work.append((ids, job, question))
    work.sort(key=lambda item: -len(item[0]))
    batches = [work[i:i + size] for i in range(0, len(work), size)][rank::world]

    started = told = time.time()
    path = folder / f"answers.partial.{rank}.jsonl"
    with ThreadPoolExecutor() as pool, open(path, "a", encoding="utf-8") as partial:
        def start_loading(batch):  # images of the next batch are read and resized while the model is busy with this one
            shown = [question for _, _, question in batch if question.image is not None]
            return [pool.submit(load_pixels, question, config.vision.image_size, args.crop) for question in shown]

        ahead = start_loading(batches[0]) if batches else []
        for n, batch in enumerate(batches):
            loading, ahead = ahead, start_loading(batches[n + 1]) if n + 1 < len(batches) else []
            pixels = None
            if loading:
                pixels = torch.stack([each.result() for each in loading]).to(args.device)  # (N, 3, S, S)
            longest = len(batch[0][0])
            padded = [ids + [config.pad_token_id] * (longest - len(ids)) for ids, _, _ in batch]
            input_ids = torch.tensor(padded, device=args.device)  # (B, T)
            output = llava.generate(input_ids, pixels, benchmark.max_new_tokens)  # (B, new)

            for (_, job, _), new in zip(batch, output.tolist()):
                text = tokenizer.decode(new, skip_special_tokens=True).strip()  # end token and padding are special
                partial.write(json.dumps({"job": job, "text": text}, ensure_ascii=False) + "\n")
            partial.flush()

            if rank == 0 and (time.time() - told > 5 or n + 1 == len(batches)):
                told, seconds = time.time(), time.time() - started
                left = timedelta(seconds=round(seconds / (n + 1) * (len(batches) - n - 1)))
                done = min((n + 1) * size * world, len(work))
                speed = f"{done / seconds:.1f}/s, {left} left"
                print(f"{benchmark.name}: {done:,}/{len(work):,} answered, {speed}", flush=True)


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
# 3. Reading and writing files. Benchmark files come from many places, so each is checked while it is read.


def read_text(path):
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        hint = "check --data, the README says what goes where"
        raise UserError(f"{path}: cannot be read ({error.strerror}); {hint}") from None
    except ValueError:
        raise UserError(f"{path}: is not UTF-8 text; replace the file") from None


def read_json(path):
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: malformed JSON, {error.msg}; replace the file") from None


def read_rows(path):
    """A JSON list or JSON Lines, told apart by the first character -> [("where", row)]."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        return [(f"{path} row {i}", row) for i, row in enumerate(read_json(path))]
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append((f"{path} line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number}: malformed JSON, {error.msg}; correct the line") from None
    return rows


def need(row, key, kind, where):
    """row[key], which has to be there and of that type."""
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        names = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        found = value if isinstance(row, dict) and key in row else row
        found = json.dumps(found, default=repr, ensure_ascii=False)[:60]
        raise UserError(f'{where}: "{key}" should be there as {names}, found {found}; correct the row')
    return value


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8", newline="")
    os.replace(beside, path)


def write_lines(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_answers(path, benchmark):
    """An answer file -> {key of the question: text}. A question may lack its answer, but no answer its question."""
    known = {question.key for question in benchmark.questions}
    texts, first_at = {}, {}
    for i, (where, row) in enumerate(read_rows(path)):
        key, text = benchmark.read_answer(row, where, i)
        shown = " ".join(key) if isinstance(key, tuple) else key
        if key in texts:
            raise UserError(f"{where}: question {shown} has its answer in {first_at[key]} already; keep one")
        if key not in known:
            raise UserError(f"{where}: question {shown} is none of the {len(known):,} of {benchmark.name}; "
                                  "is this the answer file of another benchmark or release?")
        texts[key], first_at[key] = text, where
    return texts

# ----------------------------------------------------------------------------------------------------------------------
# 4. The normaliser of the VQA family ("EvalAI" or "M4C" processor), and soft accuracy

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
           "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
# A word that lacks one of its apostrophes gets it back: dont -> don't, couldnt've and couldn'tve -> couldn't've.
CONTRACTED = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm
    I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've
    shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
    there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're
    you've
    couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
    y'all'd've 'ow's'at""".split()
CONTRACTIONS = {word[:i] + word[i + 1:]: word for word in CONTRACTED for i, letter in enumerate(word) if letter == "'"}
CONTRACTIONS |= {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}  # sic


def normalise(text: str) -> str:
    """
    "The 1,000 dogs." -> "1000 dogs", "red,white" -> "redwhite", "a.m." -> "am", "What's" -> "what 's"

    The order of the steps is part of the rule: commas go before punctuation is looked at, so none becomes a space.
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
    The mean over annotators of min(matches among the *others* / 3, 1), for normalised strings. If k of ten annotators
    gave the answer, k = 0, 1, 2, 3, 4 scores 0, 0.3, 0.6, 0.9, 1.
    """
    scores = []
    for i in range(len(golds)):  # left out by position: equal answers of two annotators are still two answers
        others = golds[:i] + golds[i + 1:]
        scores.append(min(others.count(answer) / 3, 1))
    return sum(scores) / len(scores)

# ----------------------------------------------------------------------------------------------------------------------
# 5. Nouns and COCO objects in a text (Object HalBench, AMBER)

# The official scorers look nouns up in WordNet. We have none, so a noun is known if the benchmark's own vocabulary
# has it, and that is all that scoring asks. Endings are WordNet's, and its surprises come along: "men" is a word of
# its own there and never becomes "man"; of several singulars it takes the shortest, which turns "vases" into "vas", a
# duct.
ENDINGS = [("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
           ("men", "man"), ("ies", "y")]
IRREGULAR = {"children": "child", "geese": "goose", "knives": "knife", "mice": "mouse", "oxen": "ox", "calves": "calf",
             "men": "men", "vases": "vas", "sports": "sport"}


def lemma(word: str, vocabulary: set[str]) -> str:
    """The singular that the vocabulary knows, else the word itself: buses -> bus, women -> woman, men -> men."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    candidates = [word] + [word.removesuffix(end) + new for end, new in ENDINGS if word.endswith(end)]
    return min((candidate for candidate in candidates if candidate in vocabulary), key=len, default=word)


def word_tokens(text: str) -> list[str]:
    """Words in lower case, and punctuation marks: a comma between two words keeps them from becoming one object."""
    return re.findall(r"[^\W_]+(?:[-/][^\W_]+)*|'s\b|[^\w\s]", text.lower())


# COCO's 80 categories in its order, each with words that mean it. The table is ours. A `synonyms.txt` of this format
# in the benchmark's folder takes its place, and for a number beside the paper's, it should.
SYNONYMS = """
person, man, woman, boy, girl, child, children, kid, baby, toddler, infant, people, adult, teenager, lady, gentleman, \
guy, male, female, mother, father, brother, sister, son, daughter, pedestrian, passenger, rider, driver, cyclist, \
bicyclist, biker, skier, snowboarder, skateboarder, surfer, skater, swimmer, player, batter, pitcher, catcher, \
umpire, athlete, spectator, student, teacher, worker, policeman, policewoman, officer, cop, soldier, fireman, \
firefighter, chef, cook, waiter, waitress, farmer, cowboy, bride, groom, doctor, nurse, customer, shopper, tourist, \
traveler, hiker
bicycle, bike, tricycle, unicycle
car, automobile, sedan, suv, van, minivan, hatchback, coupe, jeep, limousine, limo, taxi, cab, taxicab
motorcycle, motorbike, motor bike, motor cycle, scooter, moped
airplane, aeroplane, plane, air plane, aircraft, jet, jetliner, airliner, biplane, seaplane
bus, minibus, trolley
train, locomotive, tram
truck, pickup, lorry, firetruck
boat, ship, sailboat, motorboat, speedboat, rowboat, canoe, kayak, yacht, ferry, raft, dinghy, gondola
traffic light, traffic signal, street light, stop light, streetlight, stoplight
fire hydrant, hydrant
stop sign
parking meter
bench, pew
bird, duck, goose, swan, gull, seagull, pigeon, dove, parrot, owl, eagle, hawk, ostrich, penguin, flamingo, crow, \
sparrow, turkey, chicken, rooster, hen, peacock
cat, kitten, kitty
dog, puppy, pup
horse, pony, foal, colt, mare, stallion
sheep, lamb, ram, ewe, goat
cow, cattle, calf, bull, ox, heifer
elephant
bear, panda, polar bear
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
cup, mug
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
teddy bear, teddybear, teddy
hair drier, hair dryer, hairdryer
toothbrush
"""

# What a chat model may put around a noun when it lists objects. Any other word passes for a noun.
NOT_NOUNS = set("""
    a an the this that these those some any several many few one two three four five six seven eight nine ten other
    another of in on at by with without near under over behind beside between and or for from to its his her their
    red green blue yellow black white brown gray grey pink purple golden dark light bright colorful colourful
    big small large little tiny huge tall short long wide narrow old young new empty full open closed round square
    wooden metallic striped spotted parked standing sitting walking running playing smiling""".split())


class CocoWords:
    """
    Finds COCO's objects: "Two dogs, a hot dog and a baby elephant." -> ["dog", "hot dog", "elephant"].

    Two neighbouring words that are one thing are joined first, so that a hot dog is no dog, a train track no train,
    and a toilet seat no chair. Only pairs are joined: "stove top oven" never is, and its words count one by one.
    """

    def __init__(self, table: str):
        self.category = {}  # word -> COCO category
        self.double = {"home plate": "home plate", "train track": "train track"}  # pair -> the thing it stands for
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
        self.vocabulary = {part for word in [*self.category, *self.double] for part in word.split()}

    def lemmas(self, text: str) -> list[str]:
        return [lemma(token, self.vocabulary) for token in word_tokens(text)]

    def categories(self, words: list[str]) -> list[str]:
        """Those of the words, doubles joined, that stand for something. A word that comes twice counts twice."""
        if "toilet" in words and "seat" in words:
            words = [word for word in words if word != "seat"]
        return [self.category[word] for word in words if word in self.category]

    def in_text(self, text: str) -> list[str]:
        words, joined, i = self.lemmas(text), [], 0
        while i < len(words):
            pair = " ".join(words[i:i + 2])
            joined.append(self.double.get(pair, words[i]))
            i += 2 if pair in self.double else 1
        return self.categories(joined)

    def in_list(self, objects: list[str]) -> list[str]:
        """
        The same for a list of objects from a chat model. A string counts for its double words if it has any, else for
        each run of nouns as *one* thing, so that an office chair is no chair; and nothing counts twice. The official
        code finds nouns with a language package, we with NOT_NOUNS.
        """
        found = {}  # a dict for its order
        for phrase in objects:
            words = self.lemmas(phrase)
            names = [self.double[pair] for pair in map(" ".join, zip(words, words[1:])) if pair in self.double]
            if not names:
                marked = ["|" if word in NOT_NOUNS or not word[0].isalnum() else word for word in words]
                names = [run.strip() for run in " ".join(marked).split("|") if run.strip()]
            found |= dict.fromkeys(names)
        return self.categories(list(found))

# ----------------------------------------------------------------------------------------------------------------------
# 6. Asking a chat model (MMHal's judge, Object HalBench's extraction)


class ChatModel:
    """
    An OpenAI-compatible endpoint and the file of its replies. A reply is in the file as soon as it is there, and what
    has its reply in the file is never asked again. Without an endpoint the file is all there is: replies may be
    written into it.
    """

    def __init__(self, args, path, temperature):
        self.url, self.model, self.path, self.temperature = args.judge_url, args.judge_model, path, temperature
        self.headers = {}
        if args.judge_key_env:
            if not os.environ.get(args.judge_key_env):
                raise UserError(f"--judge_key_env: the environment variable {args.judge_key_env} is not set")
            self.headers["Authorization"] = f"Bearer {os.environ[args.judge_key_env]}"
        self.replies = {}  # prompt -> (model, reply)
        for where, row in read_rows(path) if path.exists() else []:
            prompt = need(row, "prompt", str, where)
            if row.get("reply") is not None and self.model in (None, row.get("model")):
                self.replies[prompt] = row.get("model"), need(row, "reply", str, where)

    def ask(self, prompt):
        if prompt not in self.replies:
            self.replies[prompt] = self.model, self.send(prompt)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                row = {"model": self.model, "prompt": prompt, "reply": self.replies[prompt][1]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return self.replies[prompt][1]

    def write_down(self, prompts):
        """The file without an endpoint: what has its reply, and what waits for one."""
        rows = [{"model": model, "prompt": prompt, "reply": reply} for prompt, (model, reply) in self.replies.items()]
        write_lines(self.path, rows + [{"model": None, "prompt": prompt, "reply": None} for prompt in prompts])

    def send(self, prompt):
        url = self.url.rstrip("/") + "/chat/completions"
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 512,
                "temperature": self.temperature}
        for pause in (1, 2, 4, 8, None):  # seconds to wait, while the trouble may pass
            try:
                response = requests.post(url, json=body, headers=self.headers, timeout=60)
            except requests.Timeout:
                trouble = "no reply within 60 s"
            except requests.RequestException as error:
                trouble = f"no reply ({type(error).__name__})"
            else:
                try:
                    reply = response.json()["choices"][0]["message"]["content"]
                except (ValueError, KeyError, IndexError, TypeError):
                    reply = None
                if response.status_code == 200 and isinstance(reply, str):
                    return reply
                said = " ".join(response.text.split())[:80]
                trouble = f"HTTP {response.status_code} and no chat completion: {said!r}"
                if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
                    break  # a wrong key or model name does not get better by waiting
            if pause:
                time.sleep(pause)
        raise UserError(f"--judge_url: {url} gave {trouble}; {len(self.replies)} replies are kept in "
                              f"{self.path}, run the same command again to go on")

# ----------------------------------------------------------------------------------------------------------------------
# 7. The benchmarks

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"


class Benchmark:
    """
    What all eleven share. A subclass says where its files are and what the official settings are, and defines
        load()                  -> [Question], from the official files, with the gold answers
        score(questions, texts) -> (numbers, [(parsed, gold, score)]), one triple per question
    """
    folder = ""
    max_new_tokens = 128
    suffix = SHORT  # of the prompt

    def __init__(self, name, args):
        self.name, self.args, self.root = name, args, args.data / self.folder
        self.max_new_tokens = args.max_new_tokens or self.max_new_tokens
        self.files = {}     # file -> number of rows,           all three for the protocol:
        self.switches = {}  # what changes the question that the model reads
        self.protocol = {}  # what changes the score of an answer
        self.set_up()
        self.questions = self.load()
        first_at = {}
        for question in self.questions:
            if question.key in first_at:
                raise UserError(f"{question.where}: question_id {question.id!r} stands already in "
                                      f"{first_at[question.key]}; every question needs its own")
            first_at[question.key] = question.where
        if not self.questions:
            raise UserError(f"{self.root}: the question file of {name} is empty; check --data")

    def set_up(self):
        pass

    def json(self, name, kind):
        """The content of a JSON file, which has to be a list or a dict."""
        content = read_json(self.root / name)
        if not isinstance(content, kind):
            raise UserError(f"{self.root / name}: should hold a JSON {kind.__name__}, found "
                                  f"a {type(content).__name__}; replace the file")
        self.files[name] = len(content)
        return content

    def rows(self, name):
        """JSON Lines, or a JSON list -> [("where", row)]."""
        rows = read_rows(self.root / name)
        self.files[name] = len(rows)
        return rows

    def llava_questions(self, name, image_folder):
        """The question files of LLaVA's evaluation package; their text ends with the prompt suffix already."""
        questions = []
        for where, row in self.rows(name):
            id, text = need(row, "question_id", (str, int), where), need(row, "text", str, where)
            image = self.root / image_folder / need(row, "image", str, where)
            questions.append(Question(id, str(id), text, text, image, where, about=row))
        return questions

    def job(self, question):
        """Questions with the same image and words are one job, done once: POPE's 9,000 questions are 5,127 jobs."""
        image = question.image or b""
        if isinstance(image, Path):
            image = os.path.relpath(image, self.root).encode()
        return hashlib.sha256(hashlib.sha256(image).digest() + question.asked.encode()).hexdigest()[:32]

    def read_answer(self, row, where, index):
        """A row of an answer file -> (key of its question, text)."""
        return str(need(row, "question_id", (str, int), where)), need(row, "text", str, where)

    def tidy(self, question, text):
        """The model's words -> the text in the answer file."""
        return text

    def extra_columns(self, question):
        """Of the answer file, where the official format has more than the usual six."""
        return {}

    def submission(self, questions, texts):
        """{file name: content}, for an official server or tool."""
        return {}


def question_of(prompt):
    return prompt.removesuffix(SHORT).rstrip()


def percent(part, whole):
    return 100 * part / whole if whole else 0.0


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def accuracy(scores):
    return {"accuracy": 100 * mean(scores), "correct": int(sum(scores)), "rows": len(scores)}


def decode_base64(text, where):
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise UserError(f"{where}: the image should be base64, found {text[:40]!r}; replace the file") from None

# --- GQA --------------------------------------------------------------------------------------------------------------


class GQA(Benchmark):
    """Test-dev, balanced: 12,578 questions. The answer has to equal the gold string."""
    folder = "gqa"

    def load(self):
        questions = self.llava_questions("llava_gqa_testdev_balanced.jsonl", "data/images")
        file = "data/testdev_balanced_questions.json"
        golds = self.json(file, dict)
        for id, gold in golds.items():
            need(gold, "answer", str, f"{self.root / file} {id!r}")
        for question in questions:
            question.gold = golds.get(question.key)
            if question.gold is None:
                raise UserError(f"{question.where}: question_id {question.id!r} is not in {self.root / file}; "
                                      "take both files of the same release")
        balanced = {id for id, gold in golds.items() if gold.get("isBalanced")}
        lacking = balanced - {question.key for question in questions}
        if lacking:
            raise UserError(f"{self.root / file}: {len(lacking):,} balanced questions are not in the question "
                                  f"file (first: {min(lacking)}); take both files of the same release")
        return questions

    def score(self, questions, texts):
        """Full stops at the end go, and case, and no more: "Yes." is yes, but "yes ." leaves "yes " and is wrong."""
        triples, by_type = [], defaultdict(list)
        for question, text in zip(questions, texts):
            parsed, gold = text.rstrip(".").lower(), question.gold["answer"]
            triples.append((parsed, gold, float(parsed == gold)))
            if question.gold.get("isBalanced"):
                types = question.gold.get("types", {})
                for kind in ["all", "open" if types.get("structural") == "query" else "binary",
                             f"structural: {types.get('structural')}", f"semantic: {types.get('semantic')}"]:
                    by_type[kind].append(float(parsed == gold))
        everything = by_type.pop("all", [])
        return {"accuracy": 100 * mean(everything), "correct": int(sum(everything)), "balanced_rows": len(everything),
                "by_type": {kind: accuracy(scores) for kind, scores in sorted(by_type.items())},
                "unparsed": sum(parsed == "" for parsed, _, _ in triples)}, triples

# --- VizWiz -----------------------------------------------------------------------------------------------------------


class VizWiz(Benchmark):
    """
    Photos taken by blind people. The paper's number comes from a server, which alone has the answers of the test
    images; `test` writes the file to submit. `val` (4,319 questions) is scored here, under a name of its own: another
    split.
    """
    folder = "vizwiz"
    suffix = f"When the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}"

    def set_up(self):
        self.switches = {"split": self.args.vizwiz_split}

    def load(self):
        if self.args.vizwiz_split == "test":
            return self.llava_questions("llava_test.jsonl", "test")
        questions = []
        for i, (where, row) in enumerate(self.rows("val.json")):  # its rows have no id: they are numbered from 0
            prompt = f"{need(row, 'question', str, where)}\n{self.suffix}"
            image = self.root / "val" / need(row, "image", str, where)
            golds = [need(each, "answer", str, where) for each in need(row, "answers", list, where)]
            questions.append(Question(i, str(i), prompt, prompt, image, where, golds, row))
        return questions

    def score(self, questions, texts):
        parsed = [normalise(text) for text in texts]
        numbers = {"unparsed": parsed.count("")}
        if self.args.vizwiz_split == "test":
            return numbers | {"note": "no public answers, so no score; submit submission.json to the VizWiz server"}, \
                   [(text, None, None) for text in parsed]
        golds = [[normalise(answer) for answer in question.gold] for question in questions]
        triples = [(text, answers, soft_accuracy(text, answers)) for text, answers in zip(parsed, golds)]
        return numbers | {"val_accuracy": 100 * mean(score for _, _, score in triples)}, triples

    def submission(self, questions, texts):
        rows = [{"image": question.about["image"], "answer": normalise(text)}
                for question, text in zip(questions, texts)]
        return {"submission.json": json.dumps(rows, ensure_ascii=False)}

# --- ScienceQA --------------------------------------------------------------------------------------------------------


class ScienceQA(Benchmark):
    """School questions with 2 to 5 choices, 4,241 in the test split; the headline is the 2,017 with an image."""
    folder = "scienceqa"
    max_new_tokens = 1024
    suffix = LETTER

    def load(self):
        problems = self.json("problems.json", dict)
        test = set(map(str, need(self.json("pid_splits.json", dict), "test", list, self.root / "pid_splits.json")))
        questions = []
        for where, row in self.rows("llava_test_CQM-A.json"):
            id = need(row, "id", (str, int), where)
            problem = problems.get(str(id))
            if problem is None or str(id) not in test:
                raise UserError(f"{where}: id {id!r} is no test problem of problems.json and pid_splits.json; "
                                      "take all three files of the same release")
            turns, in_problems = need(row, "conversations", list, where), f"{self.root / 'problems.json'} {id!r}"
            asked = need(turns[0] if turns else {}, "value", str, where).replace("<image>", "").strip() + f"\n{LETTER}"
            prompt, image = asked, None
            if row.get("image") is not None:
                prompt, image = f"<image>\n{asked}", self.root / "images/test" / need(row, "image", str, where)
            choices, right = need(problem, "choices", list, in_problems), need(problem, "answer", int, in_problems)
            if not 0 <= right < len(choices) <= 5:
                raise UserError(f"{in_problems}: answer {right} of {len(choices)} choices, expected at most 5")
            about = {"choices": len(choices), "has_image": problem.get("image") is not None}
            questions.append(Question(id, str(id), prompt, asked, image, where, "ABCDE"[right], about))
        lacking = test - {question.key for question in questions}
        if lacking:
            raise UserError(f"{self.root / 'llava_test_CQM-A.json'}: {len(lacking):,} problems of the test split "
                                  f"are not there (first: {min(lacking)}); take all three files of the same release")
        return questions

    @staticmethod
    def parse(text):
        """
        "A" and "A. rock" are A; "The answer is B." is B, and so is "The answer is Bananas". "A.", "(A)", "a" and a
        text with two verdicts are failures, None.
        """
        text = text.strip()
        if re.fullmatch("[A-E]", text):
            return text
        if re.match(r"[A-E]\. ", text):
            return text[0]
        verdicts = re.findall(r"The answer is ([A-Z]).", text)
        return verdicts[0] if len(verdicts) == 1 else None

    def score(self, questions, texts):
        triples, with_image = [], []
        for question, text in zip(questions, texts):
            parsed = self.parse(text)  # a letter beyond the choices is simply wrong
            triples.append((parsed, question.gold, float(parsed == question.gold)))
            if question.about["has_image"]:
                with_image.append(triples[-1][2])
        everything = accuracy([score for _, _, score in triples])
        beyond = sum(parsed is not None and ord(parsed) - ord("A") >= question.about["choices"]
                     for question, (parsed, _, _) in zip(questions, triples))
        return {"accuracy": 100 * mean(with_image), "correct": int(sum(with_image)), "image_rows": len(with_image),
                "accuracy_all": everything["accuracy"], "correct_all": everything["correct"], "beyond_choices": beyond,
                "unparsed": sum(parsed is None for parsed, _, _ in triples)}, triples

# --- TextVQA ----------------------------------------------------------------------------------------------------------


class TextVQA(Benchmark):
    """
    Text in photos: 5,000 validation questions. The prompt may list what an OCR program read in the image. LLaVA lists
    it, and so does the paper; without it (--ocr=False) scores fall by about ten points.
    """
    folder = "textvqa"

    def set_up(self):
        self.switches = {"ocr_tokens": self.args.ocr}

    def load(self):
        file, golds = "TextVQA_0.5.1_val.json", {}
        for i, row in enumerate(need(self.json(file, dict), "data", list, self.root / file)):
            where = f"{self.root / file} row {i}"
            answers = need(row, "answers", list, where)
            if len(answers) != 10 or not all(isinstance(answer, str) for answer in answers):
                raise UserError(f"{where}: found {len(answers)} answers, expected ten strings")
            golds[str(need(row, "image_id", (str, int), where)), need(row, "question", str, where).lower()] = answers
        self.files[file] = len(golds)

        questions = self.llava_questions("llava_textvqa_val_v051_ocr.jsonl", "train_images")
        for question in questions:
            asked = self.question_in(question.prompt, question.where)
            question.key = (str(question.id), asked)  # the id is the image's, so it does not suffice
            question.gold = golds.get(question.key)
            if question.gold is None:
                raise UserError(f"{question.where}: image {question.id} with the question {asked!r} is not in "
                                      f"{self.root / file}; take both files of the same release")
            if not self.args.ocr:
                lines = [line for line in question.prompt.split("\n") if not line.startswith("Reference OCR token:")]
                question.prompt = question.asked = "\n".join(lines)
        return questions

    @staticmethod
    def question_in(prompt, where):
        """The question, in lower case: prompts have 3 lines with the OCR line, 2 without, 1 in the form of old."""
        lines = prompt.split("\n")
        one_line = re.search(r"Question: (.*?) Short answer:", prompt)
        if prompt.startswith("OCR tokens: ") and one_line:
            return one_line[1].lower()
        if len(lines) == 3 and lines[0].startswith("Reference OCR token:"):
            return lines[1].lower()
        if len(lines) == 2 or len(lines) == 3 and lines[1].startswith("Reference OCR token:"):
            return lines[0].lower()
        raise UserError(f"{where}: cannot tell the question in the prompt {prompt[:60]!r}; expected the "
                              'question, perhaps a line "Reference OCR token: ...", and the suffix')

    def read_answer(self, row, where, index):
        id, prompt = need(row, "question_id", (str, int), where), need(row, "prompt", str, where)
        return (str(id), self.question_in(prompt, where)), need(row, "text", str, where)

    def score(self, questions, texts):
        triples = []
        for question, text in zip(questions, texts):
            parsed, golds = normalise(text), [normalise(answer) for answer in question.gold]
            triples.append((parsed, golds, soft_accuracy(parsed, golds)))
        return {"accuracy": 100 * mean(score for _, _, score in triples),
                "unparsed": sum(parsed == "" for parsed, _, _ in triples)}, triples

# --- MME --------------------------------------------------------------------------------------------------------------


class MME(Benchmark):
    """Two questions about each of 1,187 images, one to answer with yes and one with no, in 14 categories."""
    folder = "MME"
    release = "MME_Benchmark_release_version"
    perception = "existence count position color posters celebrity scene landmark artwork OCR".split()
    cognition = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()

    def load(self):
        questions = self.llava_questions("llava_mme.jsonl", self.release)
        golds = {}
        for folder in {question.image.parent for question in questions}:
            texts = folder.with_name("questions_answers_YN") if folder.name == "images" else folder
            for path in sorted(texts.glob("*.txt")):
                for number, line in enumerate(read_text(path).split("\n"), start=1):
                    asked, _, gold = line.strip().lower().partition("\t")
                    if line.strip() and gold not in ("yes", "no"):
                        raise UserError(f"{path} line {number}: found {line[:60]!r}, expected a question, "
                                              "a tab, and Yes or No")
                    golds[folder / path.stem, asked] = gold
        self.files[f"{self.release}/*/*.txt"] = len(golds)

        for question in questions:
            question.key = (str(question.id), question_of(question.prompt))  # the id is the image's
            category = question.about.get("category")
            if category not in self.perception + self.cognition:
                raise UserError(f"{question.where}: found the category {category!r}, expected one of "
                                      f"{', '.join(self.perception + self.cognition)}")
            for spaces in (" ", "  "):  # the official question, in place of our suffix; some have two spaces
                asked = f"{question.key[1]}{spaces}Please answer yes or no.".lower()
                question.gold = question.gold or golds.get((question.image.with_suffix(""), asked))
            if question.gold is None:
                raise UserError(f'{question.where}: no line "{question.key[1]} Please answer yes or no." in the '
                                      f"official text file of {question.image}; check the folder {self.release}")
        return questions

    def read_answer(self, row, where, index):
        id, prompt = need(row, "question_id", (str, int), where), need(row, "prompt", str, where)
        return (str(id), question_of(prompt)), need(row, "text", str, where)

    @staticmethod
    def parse(text):
        """
        The first four characters decide: "Nope", "None", "Not sure" and "Snow" are no; "Y", "Yeah" and "The answer is
        yes" are other, which is always wrong.
        """
        start = text.lower()[:4]
        return "yes" if "yes" in start else "no" if "no" in start else "other"

    def score(self, questions, texts):
        """Of a category: 100 * right questions / questions + 100 * images with both right / images. So 200 at best."""
        triples, by_category = [], defaultdict(lambda: defaultdict(list))
        for question, text in zip(questions, texts):
            parsed = self.parse(text)
            triples.append((parsed, question.gold, float(parsed == question.gold)))
            by_category[question.about["category"]][question.id].append(triples[-1][2])
        categories = {}
        for name, images in by_category.items():
            scores = [score for pair in images.values() for score in pair]
            right, rows, both = sum(scores), len(scores), sum(all(pair) for pair in images.values())
            categories[name] = {"score": percent(right, rows) + percent(both, len(images)),
                                "correct": int(right), "rows": rows, "both_correct": both, "images": len(images)}
        perception = [category["score"] for name, category in categories.items() if name in self.perception]
        cognition = [category["score"] for name, category in categories.items() if name in self.cognition]
        # With all ten categories this is the paper's MME column, perception / 2000; cognition is not in it.
        self.protocol = {"percentage": f"perception of {len(perception)} categories / {200 * len(perception)}"}
        return {"percentage": percent(sum(perception), 200 * len(perception)), "perception": sum(perception),
                "cognition": sum(cognition), "categories": categories,
                "unparsed": sum(parsed == "other" for parsed, _, _ in triples)}, triples

    def submission(self, questions, texts):
        files = defaultdict(str)  # for the official tool, which splits lines at tabs
        for question, text in zip(questions, texts):
            cells = [question.image.stem + ".txt", question.key[1], question.gold.capitalize(), " ".join(text.split())]
            files[f"official/{question.about['category']}.txt"] += "\t".join(cells) + "\n"
        return files

# --- MMBench ----------------------------------------------------------------------------------------------------------


class MMBench(Benchmark):
    """
    Multiple choice, each question asked once for every rotation of its options: rows i, i + 1,000,000, i + 2,000,000
    ... of the file, all of which have to be right. So one pass over the file is the "circular" evaluation.
    """
    folder = "mmbench"
    max_new_tokens = 1024
    suffix = LETTER
    releases = ["mmbench_dev_en_20231003.tsv", "mmbench_dev_20230712.tsv"]  # the authors' file, or else LLaVA's
    # What pandas reads as an empty cell, as the official code does. An option "None" so ends the list of options.
    empty = ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
             "NA", "NULL", "NaN", "None", "n/a", "nan", "null"]
    refusals = ["Sorry, I can't help with images of people yet.", "I can't process this file.",
                "I'm sorry, but without the image provided", "Cannot determine the answer"]

    def load(self):
        file = next((name for name in self.releases if (self.root / name).exists()), self.releases[0])
        csv.field_size_limit(1 << 30)  # a cell holds a whole image
        table = csv.DictReader(io.StringIO(read_text(self.root / file), newline=""), delimiter="\t")
        questions = []
        for number, row in enumerate(table, start=1):
            where = f"{self.root / file} row {number}"
            for column in ("index", "question", "A", "B", "answer", "image"):
                if not row.get(column):
                    raise UserError(f"{where}: the column {column} is missing or empty")
            if not row["index"].isdigit():
                raise UserError(f"{where}: the index should be a whole number, found {row['index'][:40]!r}")
            options = {}
            for letter in "ABCD":
                if self.is_empty(row.get(letter)):
                    break
                options[letter] = row[letter]
            if row["answer"] not in options:
                raise UserError(f"{where}: found the answer {row['answer'][:40]!r}, expected one of "
                                      f"{', '.join(options)}")
            hint = [] if self.is_empty(row.get("hint")) else [row["hint"]]
            choices = [f"{letter}. {option}" for letter, option in options.items()]
            prompt = "\n".join(hint + [row["question"]] + choices)
            index, image = int(row["index"]), decode_base64(row.pop("image"), where)
            questions.append(Question(index, str(index), prompt, f"{prompt}\n{self.suffix}", image, where,
                                      row["answer"], row | {"options": options}))
        self.files[file] = len(questions)
        return questions

    def is_empty(self, cell):
        return cell is None or cell in self.empty or cell.strip().lower() in ("nan", "none")

    def parse(self, text, options):
        """
        The letter of an option, if exactly one stands alone in the text: "B", "(B)", "B: red". An article passes for
        the letter A, so "A red one, not B" holds two. Without exactly one, exactly one option's text in the answer
        decides. Else None; Z is a refusal.
        """
        if any(refusal in text for refusal in self.refusals):
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

        circular, parts = [], {"category": defaultdict(list), "l2-category": defaultdict(list)}
        for rotations in groups.values():
            circular.append(float(all(score for _, score in rotations)))
            for column, by_name in parts.items():
                by_name[rotations[0][0].about.get(column)].append(circular[-1])
        vanilla = [score for question, (_, _, score) in zip(questions, triples) if question.id < 1_000_000]
        self.protocol = {"accuracy": "circular, every rotation right", "vanilla_accuracy": "the first rotation alone"}
        return {"accuracy": 100 * mean(circular), "correct": int(sum(circular)), "questions": len(circular),
                "vanilla_accuracy": 100 * mean(vanilla), "vanilla_correct": int(sum(vanilla)),
                "vanilla_rows": len(vanilla),
                **{f"by_{column}": {name: accuracy(scores) for name, scores in by_name.items() if name}
                   for column, by_name in parts.items()},
                "unparsed": sum(parsed in (None, "Z") for parsed, _, _ in triples)}, triples

    def submission(self, questions, texts):
        """The table for the official server, which wants it as .xlsx: pandas.read_table(...).to_excel(...)."""
        dropped = ("hint", "category", "source", "comment", "l2-category", "options")
        columns = [name for name in questions[0].about if name not in dropped]
        columns.insert(6, "prediction")
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, delimiter="\t", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for question, text in zip(questions, texts):
            writer.writerow(question.about | {"prediction": text})
        return {"submission.tsv": table.getvalue()}


class MMBenchCN(MMBench):
    """The same in Chinese. The indices are those of the English file, so the two must not share answers."""
    suffix = LETTER_CN
    releases = ["mmbench_dev_cn_20231003.tsv"]

# --- POPE -------------------------------------------------------------------------------------------------------------


class POPE(Benchmark):
    """
    "Is there a kite in the image?" Half of the time there is. What is not there was drawn at random, from the popular
    objects, or from those that mostly come with what is there (adversarial). Positive means yes.
    """
    folder = "pope"

    def load(self):
        questions = self.llava_questions("llava_pope_test.jsonl", "val2014")
        labels = {}
        for question in questions:
            category = need(question.about, "category", str, question.where)
            file = f"coco/coco_pope_{category}.json"
            if file not in self.files:
                for where, row in self.rows(file):
                    label = need(row, "label", str, where)
                    if label not in ("yes", "no"):
                        raise UserError(f'{where}: found the label {label[:40]!r}, expected "yes" or "no"')
                    labels[category, need(row, "image", str, where), need(row, "text", str, where)] = label
            # The random split was released twice, with other questions. The official scorer pairs answers and labels
            # by position, and the wrong release costs 40 points of F1 without a word. So we join on what was asked.
            asked, image = question_of(question.prompt), question.about["image"]
            question.gold = labels.get((category, image, asked))
            if question.gold is None:
                raise UserError(f"{question.where}: {asked!r} about {image} has no label in {self.root / file}, "
                                      "which is of another release; LLaVA's question file needs the random split of "
                                      "2,910 rows, not the one of 3,000")
        return questions

    @staticmethod
    def parse(text):
        """
        No, if No, no or not is among the words before the first full stop; else yes. The words are split at single
        spaces, and so "Not really", "NO", "No!", "isn't", "None" and silence are yes.
        """
        words = text.split(".")[0].replace(",", "").split(" ")
        return "no" if {"No", "no", "not"} & set(words) else "yes"

    @staticmethod
    def rates(pairs):
        """
        [(parsed, gold)] -> accuracy, precision, recall, F1. Try it on 3 true yes, 1 false yes, 2 false no, 4 true no:
        precision 3/4, recall 3/5, F1 = 2 * 3 / (2 * 3 + 1 + 2) = 2/3, accuracy 7/10.
        """
        count = Counter(pairs)
        tp, fp, fn, tn = (count[pair] for pair in [("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no")])
        return {"f1": percent(2 * tp, 2 * tp + fp + fn), "accuracy": percent(tp + tn, len(pairs)),
                "precision": percent(tp, tp + fp), "recall": percent(tp, tp + fn),
                "yes_ratio": percent(tp + fp, len(pairs)), "gold_yes_ratio": percent(tp + fn, len(pairs)),
                "true_yes": tp, "false_yes": fp, "false_no": fn, "true_no": tn, "rows": len(pairs)}

    def score(self, questions, texts):
        triples, by_split = [], defaultdict(list)
        for question, text in zip(questions, texts):
            parsed = self.parse(text)
            triples.append((parsed, question.gold, float(parsed == question.gold)))
            by_split[question.about["category"]].append((parsed, question.gold))
        splits = {name: self.rates(pairs) for name, pairs in by_split.items()}
        means = {rate: mean(split[rate] for split in splits.values())
                 for rate in ("f1", "accuracy", "precision", "recall", "yes_ratio", "gold_yes_ratio")}
        self.protocol = {"headline": f"mean over {', '.join(splits)}", "labels": "joined on image and question"}
        neither = sum(not re.search(r"\b(yes|no|not)\b", text.lower()) for text in texts)  # yes, by the rule
        pooled = self.rates([pair for pairs in by_split.values() for pair in pairs])
        return {**means, "splits": splits, "pooled": pooled, "unparsed": neither}, triples

# --- Object HalBench --------------------------------------------------------------------------------------------------


class ObjHal(Benchmark):
    """
    CHAIR on 300 COCO images: which objects does a description name that are not there? Lower is better, and saying
    little is a way to get there, so recall and length stand beside it. True is what an annotator outlined or a
    caption names.
    """
    folder = "objhal"
    max_new_tokens = 1024
    suffix = ""

    def load(self):
        path = self.root / "synonyms.txt"
        self.coco = CocoWords(read_text(path) if path.exists() else SYNONYMS)
        source = "synonyms.txt" if path.exists() else "built in"
        self.protocol["vocabulary"] = f"{source}, {len(self.coco.category)} words"
        questions = []
        for where, row in self.rows("obj_halbench_300_with_image.jsonl"):
            id, prompt = need(row, "image_id", int, where), need(row, "question", str, where)
            image = decode_base64(need(row, "image", str, where), where)
            questions.append(Question(row.get("question_id", id), str(id), prompt, prompt, image, where, set()))

        golds, annotated = {question.key: question.gold for question in questions}, set()
        for split in ("train2014", "val2014"):
            file = f"annotations/instances_{split}.json"
            content, where = self.json(file, dict), self.root / file
            names = {need(row, "id", int, where): need(row, "name", str, where)
                     for row in need(content, "categories", list, where)}
            annotated |= {str(need(row, "id", int, where)) for row in need(content, "images", list, where)}
            for row in need(content, "annotations", list, where):
                gold = golds.get(str(need(row, "image_id", int, where)))
                if gold is not None:
                    gold.add(names.get(need(row, "category_id", int, where)))
            self.files[file] = len(content["annotations"])

            file = f"annotations/captions_{split}.json"
            content, where = self.json(file, dict), self.root / file
            for row in need(content, "annotations", list, where):
                gold = golds.get(str(need(row, "image_id", int, where)))
                if gold is not None:
                    gold.update(self.coco.in_text(need(row, "caption", str, where)))
            self.files[file] = len(content["annotations"])
        for question in questions:
            if question.key not in annotated:
                raise UserError(f"{question.where}: image_id {question.key} is among the images of neither "
                                      f"instances_train2014.json nor instances_val2014.json of {self.root}/annotations")
        return questions

    def extra_columns(self, question):
        return {"image_id": int(question.key)}

    def read_answer(self, row, where, index):
        key = "image_id" if isinstance(row, dict) and "image_id" in row else "question_id"
        return str(need(row, key, (int, str), where)), need(row, "text", str, where)

    def score(self, questions, texts):
        chat, kind = None, ""  # two ways to find the objects, two names for the result
        if self.args.objhal_extract:
            chat = ChatModel(self.args, self.args.out_dir / self.name / "extracted.jsonl", temperature=0.2)
            kind = "_extracted"
        triples, total, lengths = [], Counter(), []
        for question, text in zip(questions, texts):
            text = text.replace("Assistant:", "")
            mentions = self.coco.in_list(self.extract(chat, question, text)) if chat else self.coco.in_text(text)
            wrong = [mention for mention in mentions if mention not in question.gold]
            total.update(mentions=len(mentions), hallucinated_mentions=len(wrong),
                         responses_with_mention=len(mentions) > 0, hallucinated_responses=len(wrong) > 0,
                         gold_objects=len(question.gold), found_objects=len(question.gold & set(mentions)))
            lengths.append(len(text.split()))
            triples.append((mentions, sorted(question.gold), float(not wrong)))
        self.protocol["objects"] = f"listed by {self.args.judge_model}" if chat else "words of the response"
        return {f"chair_s{kind}": percent(total["hallucinated_responses"], total["responses_with_mention"]),
                f"chair_i{kind}": percent(total["hallucinated_mentions"], total["mentions"]),
                f"chair_s_all{kind}": percent(total["hallucinated_responses"], len(texts)),
                f"recall{kind}": percent(total["found_objects"], total["gold_objects"]), "mean_words": mean(lengths),
                **total, "unparsed": len(texts) - total["responses_with_mention"]}, triples

    def extract(self, chat, question, text):
        """The objects that a chat model finds in the response. The paper's way, with a model that is gone by now."""
        if len(text.split()) <= 3:
            return []
        reply = chat.ask(EXTRACT_PROMPT.format(question.prompt, text))
        try:
            objects = json.loads(reply[reply.index("["):reply.rindex("]") + 1])
        except ValueError:
            objects = None
        if not isinstance(objects, list) or not all(isinstance(name, str) for name in objects):
            raise UserError(f"{chat.path}: the reply for image_id {question.key} should be a JSON list of "
                                  f"strings, found {reply[:60]!r}; remove its line and run again, or take another "
                                  "--judge_model")
        return objects


EXTRACT_PROMPT = """\
List the objects that the answer below says are in the image. Take only what it names itself, as nouns in the
singular, without colours or other attributes; leave out what it says is absent and what it only guesses. Reply with a
JSON list of strings and nothing else, such as ["dog", "traffic light"].

Question: {}
Answer: {}"""

# --- MMHal-Bench ------------------------------------------------------------------------------------------------------


class MMHal(Benchmark):
    """
    96 open questions; a chat model that cannot see, but reads what is in the image, rates each answer from 0 to 6.
    Ratings by two judges do not compare, nor do long and short answers: the authors' script asks for short ones, the
    original benchmark does not (--mmhal_short=False).
    """
    folder = "mmhal"
    max_new_tokens = 1024

    def set_up(self):
        self.suffix = SHORT if self.args.mmhal_short else ""

    def load(self):
        questions = []
        for i, (where, row) in enumerate(self.rows("response_template.json")):  # the order is the key
            prompt = need(row, "question", str, where)
            name = need(row, "image_file" if "image_file" in row else "image_src", str, where).rsplit("/", 1)[-1]
            gold = {"contents": need(row, "image_content", list, where), "answer": need(row, "gt_answer", str, where),
                    "type": need(row, "question_type", str, where)}
            asked = f"{prompt}\n{self.suffix}" if self.suffix else prompt
            questions.append(Question(i, str(i), prompt, asked, self.root / "images" / name, where, gold))
        return questions

    def read_answer(self, row, where, index):
        if isinstance(row, dict) and "model_answer" in row:  # the official template, filled in
            return str(index), need(row, "model_answer", str, where)
        return super().read_answer(row, where, index)

    @staticmethod
    def parse(reply):
        """The one n of "rating: n" in the reply, 0 to 6; else None. "Rating:4" has none, and "Rating: 10" is 1."""
        ratings = [n for n in range(7) if f"rating: {n}" in reply.lower()]
        return ratings[0] if len(ratings) == 1 else None

    def score(self, questions, texts):
        path = self.root / "judge_prompt.txt"  # takes the place of ours, with its four {} in our order
        template = read_text(path) if path.exists() else JUDGE_PROMPT
        prompts = []
        for question, text in zip(questions, texts):
            contents = ", ".join(map(str, question.gold["contents"]))
            prompts.append(template.format(contents, question.prompt, question.gold["answer"], text))
        judge = ChatModel(self.args, self.args.out_dir / self.name / "judge.jsonl", temperature=0)
        waiting = [prompt for prompt in prompts if prompt not in judge.replies]
        if waiting and not judge.url:
            judge.write_down(waiting)
            note = (f"{len(waiting)} answers wait to be judged: give --judge_url and --judge_model, or write each "
                    f'"reply" and the judge\'s name as "model" into {judge.path}; then run again')
            return {"note": note, "unparsed": 0}, [(None, question.gold["answer"], None) for question in questions]

        triples, by_type = [], defaultdict(list)
        for question, prompt in zip(questions, prompts):
            parsed = self.parse(judge.ask(prompt))
            triples.append((parsed, question.gold["answer"], float(parsed or 0)))  # an unclear reply counts as 0
            by_type[question.gold["type"]].append(triples[-1][2])
        ratings = [rating for _, _, rating in triples]
        self.protocol = {"judge": ", ".join(sorted({judge.replies[prompt][0] or "unnamed" for prompt in prompts})),
                         "judge_prompt": path.name if path.exists() else "built in"}
        hallucinated = sum(rating < 3 for rating in ratings)
        return {"score": mean(ratings), "hallucination_rate": percent(hallucinated, len(ratings)),
                "informativeness": 100 * mean(rating - 3 if rating >= 3 else rating for rating in ratings) / 3,
                "by_type": {kind: mean(ratings) for kind, ratings in by_type.items()},
                "unparsed": sum(parsed is None for parsed, _, _ in triples)}, triples


JUDGE_PROMPT = """\
You judge whether the answer of a vision-language model to a question about an image is hallucinated: whether it says
something that the image does not support. You cannot see the image. You get a list of what is in it, the question, the
answer of a person, and the answer to judge. What agrees with the list or with the person's answer, or follows from
them, is supported, and so is general knowledge. An answer may be right without naming everything.

First explain your view in a few sentences. Then end with a line "Rating: n", where n is
6: very informative with good analysis or reasoning, no hallucination
5: very informative, no hallucination
4: somewhat informative, no hallucination
3: not informative, no hallucination
2: very informative, with hallucination
1: somewhat informative, with hallucination
0: not informative, with hallucination

Example 1
Image contents: Dog, Frisbee, Grass
Question: What colour is the dog's collar?
Person's answer: The dog wears no collar.
Answer to judge: The collar is red.
Explanation: There is no collar, so its colour is invented, and nothing else is said.
Rating: 0

Example 2
Image contents: Bus, Street, Person
Question: How many people stand at the bus stop?
Person's answer: Three people wait there.
Answer to judge: Three people stand at the stop, waiting for the bus that comes down the street.
Explanation: The number agrees with the person's answer, and the bus and the street are in the list.
Rating: 5

Example 3
Image contents: Table, Cup, Book
Question: What is to the left of the cup?
Person's answer: A book lies to the left of the cup.
Answer to judge: There is something there.
Explanation: That is true, but of no use.
Rating: 3

Example 4
Image contents: Kitchen, Oven, Woman
Question: Describe the image.
Person's answer: A woman stands in a kitchen beside an oven.
Answer to judge: A woman is in a kitchen with an oven, and a cat sleeps on the floor.
Explanation: The woman, the kitchen and the oven are there. No cat is in the list or in the person's answer.
Rating: 2

Example 5
Image contents: Surfboard, Man, Sea, Clouds
Question: Why might the man be carrying the board?
Person's answer: He is going to surf, as he walks towards the sea.
Answer to judge: He is about to surf: he carries a board near the sea, and the clouds suggest wind, which brings waves.
Explanation: This agrees with the person, uses what is in the image, and reasons well from the clouds.
Rating: 6

Now judge this one.
Image contents: {}
Question: {}
Person's answer: {}
Answer to judge: {}
"""

# --- AMBER ------------------------------------------------------------------------------------------------------------


class AMBER(Benchmark):
    """
    1,004 descriptions and 14,216 yes/no questions. The official scorer finds nouns with a tagger, and takes words for
    the same if their vectors are similar. Here every word of AMBER's association lists is a noun, and words are the
    same if equal or associated there. So CHAIR is a little higher than the official one and Cover lower; yes/no is
    the same.
    """
    folder = "AMBER"
    max_new_tokens = 1024
    kinds = {
        "existence": ["discriminative-hallucination"],
        "attribute": [f"discriminative-attribute-{each}" for each in ("state", "number", "action")],
        "state": ["discriminative-attribute-state"], "number": ["discriminative-attribute-number"],
        "action": ["discriminative-attribute-action"], "relation": ["discriminative-relation", "relation"],
    }

    def load(self):
        self.associated = self.json("data/relation.json", dict)
        lists = [need(self.associated, word, list, self.root / "data/relation.json") for word in self.associated]
        self.vocabulary = set(self.associated).union(*lists)
        self.safe = set(read_text(self.root / "data/safe_words.txt").split())
        golds = self.rows("data/annotations.json")
        questions = []
        for where, row in self.rows("data/query/query_all.json"):
            id, query = need(row, "id", int, where), need(row, "query", str, where)
            if not 1 <= id <= len(golds):
                raise UserError(f"{where}: id {id} has no entry in data/annotations.json, of {len(golds):,}")
            gold_where, gold = golds[id - 1]  # by position
            if need(gold, "type", str, gold_where) == "generative":
                for word in need(gold, "truth", list, gold_where) + need(gold, "hallu", list, gold_where):
                    if word not in self.associated:
                        raise UserError(f"{gold_where}: {word!r} has no entry in data/relation.json")
            elif need(gold, "truth", str, gold_where) not in ("yes", "no"):
                raise UserError(f'{gold_where}: "truth" should be yes or no, found {gold["truth"][:40]!r}')
            asked = query if gold["type"] == "generative" else f"{query}\n{SHORT}"
            image = self.root / "image" / need(row, "image", str, where)
            questions.append(Question(id, str(id), query, asked, image, where, gold))
        return questions

    def read_answer(self, row, where, index):
        if isinstance(row, dict) and "response" in row:  # the official format
            return str(need(row, "id", int, where)), need(row, "response", str, where)
        return super().read_answer(row, where, index)

    def tidy(self, question, text):
        """The scorer takes exactly "Yes" or "No", so the answer file gets the one or the other."""
        if question.gold["type"] == "generative":
            return text
        return "Yes" if "yes" in text.lower() else "No" if "no" in text.lower() else text

    def score(self, questions, texts):
        total, triples = Counter(), []
        by_kind = {"all": [], **{kind: [] for kind in self.kinds}}
        for question, text in zip(questions, texts):
            if question.gold["type"] == "generative":
                triples.append(self.score_description(question.gold, text, total))
                continue
            parsed, gold = {"Yes": "yes", "No": "no"}.get(text, "other"), question.gold["truth"]
            triples.append((parsed, gold, float(parsed == gold)))
            for kind, types in self.kinds.items():
                if question.gold["type"] in types:
                    by_kind[kind].append(triples[-1])
            by_kind["all"].append(triples[-1])

        numbers = {"chair": self.rate(total["hallucinated"], total["nouns"]),
                   "cover": self.rate(total["covered"], total["truth"]),
                   "hal": round(100 - self.rate(total["clean"], total["descriptions"], digits=9), 1),
                   "cog": self.rate(total["remembered"], total["hallu"]), "counts": dict(total)}
        parts = {kind: self.score_choices(rows, nudge=0.001 if kind == "existence" else 0.0001)
                 for kind, rows in by_kind.items()}
        numbers |= parts.pop("all")
        numbers |= {"by_type": parts, "amber_score": (100 - numbers["chair"] + numbers["f1"]) / 2,
                    "unparsed": sum(parsed == "other" for parsed, _, _ in triples)}
        self.protocol = {"nouns": "words of relation.json, equal or associated"}
        return numbers, triples

    @staticmethod
    def rate(part, whole, digits=1):
        """In percent. All official counters start at 0.001, which shows in small samples: 0 of 1 is 0.1."""
        return round(100 * (part + 0.001) / (whole + 0.001), digits)

    def score_choices(self, rows, nudge):
        """Accuracy, precision, recall, F1; positive means *no*. F1 is of the rounded two, its divisor nudged."""
        right = sum(parsed == gold == "no" for parsed, gold, _ in rows)
        precision = self.rate(right, sum(parsed == "no" for parsed, _, _ in rows))
        recall = self.rate(right, sum(gold == "no" for _, gold, _ in rows))
        f1 = round(2 * precision * recall / (precision + recall + 100 * nudge), 1)
        return {"accuracy": self.rate(sum(score for _, _, score in rows), len(rows)), "precision": precision,
                "recall": recall, "f1": f1, "rows": len(rows)}

    def score_description(self, gold, text, total):
        """A noun is safe, or stands for a true object and covers it, or is hallucinated, perhaps as was expected."""
        lemmas = [lemma(token, self.vocabulary) for token in word_tokens(text)]
        nouns = [noun for noun in lemmas if noun in self.vocabulary]
        covered, remembered, hallucinated = set(), set(), []
        for noun in nouns:
            if noun in self.safe:
                continue
            true, expected = self.find(noun, gold["truth"]), self.find(noun, gold["hallu"])
            if true is not None:
                covered.add(true)
            else:
                hallucinated.append(noun)
                remembered |= {expected} - {None}
        total.update(nouns=len(nouns), hallucinated=len(hallucinated), covered=len(covered), truth=len(gold["truth"]),
                     remembered=len(remembered), hallu=len(gold["hallu"]), clean=not hallucinated, descriptions=1)
        return nouns, gold["truth"], float(not hallucinated)

    def find(self, noun, objects):
        """
        The position of the object that a noun stands for, or None. All associations come before the objects
        themselves: of [boat, ship] with ship associated to boat, "ship" covers the boat, and the ship can never be
        covered.
        """
        for i, word in enumerate(objects):
            if noun in self.associated[word]:
                return i
        return objects.index(noun) if noun in objects else None


BENCHMARKS = {"gqa": GQA, "vizwiz": VizWiz, "scienceqa": ScienceQA, "textvqa": TextVQA, "mme": MME, "mmbench": MMBench,
              "mmbench_cn": MMBenchCN, "pope": POPE, "objhal": ObjHal, "mmhal": MMHal, "amber": AMBER}

# ----------------------------------------------------------------------------------------------------------------------
# 8. The report

COLUMNS = {  # of the paper's tables -> (benchmark, key in results.json)
    "GQA": ("gqa", "accuracy"), "VizWiz": ("vizwiz", "val_accuracy"), "SQA-I": ("scienceqa", "accuracy"),
    "TextVQA": ("textvqa", "accuracy"), "MME": ("mme", "percentage"), "MMB": ("mmbench", "accuracy"),
    "MMB-CN": ("mmbench_cn", "accuracy"), "AVG": None,
    "ObjHal resp": ("objhal", "chair_s"), "ObjHal ment": ("objhal", "chair_i"), "POPE F1": ("pope", "f1"),
    "MMHal": ("mmhal", "score"), "MMHal hall": ("mmhal", "hallucination_rate"),
}
PAPER = {
    "teacher, Qwen-1.5-7B": "62.3 40.7 70.9 55.3 72.1 68.5 64.9 62.1 50.1 24.8 84.9 2.60 20.7",
    "teacher, Qwen-2-7B": "62.5 37.9 73.2 57.2 78.0 71.6 71.1 64.5 29.7 23.4 85.7 2.88 14.5",
    "2B, Qwen-1.5-1.8B": "58.7 39.2 68.0 58.5 66.7 66.3 61.9 59.9 11.4 7.2 87.0 2.76 17.2",
    "2B, Qwen-1.5-1.8B, mimic only": "59.3 40.0 68.4 58.7 68.4 65.1 61.5 60.2 39.1 22.6 86.7 2.75 17.8",
    "2B, Qwen-2-1.5B": "58.8 40.4 69.2 59.9 69.2 68.9 64.4 61.6 11.2 5.9 87.2 2.91 13.8",
    "1B, Qwen-1.5-0.5B": "56.2 31.6 62.8 53.9 65.3 58.8 50.4 54.1",
    "1B, Qwen-2-0.5B": "56.6 35.1 61.1 57.1 67.0 58.7 54.1 55.7",
}
NOTES = """\
MME is perception as a percentage of its maximum. ObjHal and MMHal hall: lower is better. The paper's VizWiz comes from
the official server (test-dev), ours is the local val score; the paper's ObjHal lets a chat model list the objects, ours
does with --objhal_extract=True. How each of our numbers was made stands in results.json.
"""


def our_row(results):
    """results.json -> {column: number}, as far as there are headlines."""
    row = {}
    for column, (name, key) in ((column, place) for column, place in COLUMNS.items() if place):
        entry = results.get(name, {})
        if f"{key}_extracted" in entry or key in entry:
            row[column] = entry.get(f"{key}_extracted", entry.get(key))
    averaged = list(COLUMNS)[:list(COLUMNS).index("AVG")]
    if all(column in row for column in averaged):
        row["AVG"] = mean(row[column] for column in averaged)
    return row


def markdown(row):
    """Our numbers below the paper's: comprehension, then hallucination."""
    names = list(COLUMNS)
    text, cut = "", names.index("AVG") + 1
    for columns, part in [(names[:cut], slice(None, cut)), (names[cut:], slice(cut, None))]:
        text += f"| model | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}\n"
        for model, numbers in PAPER.items():
            if numbers.split()[part]:
                text += f"| paper: {model} | {' | '.join(numbers.split()[part])} |\n"
        ours = [f"{row[column]:.2f}" if column in row else "" for column in columns]
        text += f"| **ours** | {' | '.join(ours)} |\n\n"
    return text + NOTES


def report(benchmark, texts, answered_with, args):
    """Score one benchmark: scored.jsonl, its entry in results.json, results.md, and a line on the screen."""
    folder, questions = args.out_dir / benchmark.name, benchmark.questions
    missing = [question.id for question in questions if question.key not in texts]
    entry = {"rows": len(questions), "missing": len(missing)}
    refusal = None
    if missing:  # an average over the answers that happen to be there is no result
        refusal = f"{len(missing):,} of {len(questions):,} questions have no answer (first: question_id {missing[0]!r})"
        entry["refused"] = refusal
    else:
        answers = [texts[question.key] for question in questions]
        numbers, triples = benchmark.score(questions, answers)
        entry = numbers | entry
        write_lines(folder / "scored.jsonl", [
            {"question_id": question.id, "text": text, "parsed": parsed, "gold": gold, "score": score}
            for question, text, (parsed, gold, score) in zip(questions, answers, triples)])
        for name, content in benchmark.submission(questions, answers).items():
            write_text(folder / name, content)
    entry["protocol"] = {"files": benchmark.files, **benchmark.protocol, "answers": answered_with}

    path = args.out_dir / "results.json"
    results = read_json(path) if path.exists() else {}
    results[benchmark.name] = entry
    results.pop("average", None)
    row = our_row(results)
    if "AVG" in row:
        results["average"] = row["AVG"]
    write_text(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_text(args.out_dir / "results.md", markdown(row))
    if refusal:
        raise UserError(f"{args.answers or folder / 'answers.jsonl'}: {refusal}; no {benchmark.name} number "
                              "without them")
    rates = [f"{name} {value:.2f}" for name, value in numbers.items() if isinstance(value, float)]
    counts = f"{entry['rows']:,} rows, {entry['unparsed']:,} unparsed"
    print(f"{benchmark.name}: {entry.get('note') or ', '.join(rates)} ({counts})", flush=True)


def evaluate(args):
    benchmarks = [BENCHMARKS[name](name, args) for name in args.benchmark]  # checks every file before any work
    if args.answers:
        settings = args.answers.parent / "settings.json"  # ours have one
        answered_with = read_json(settings) if settings.exists() else f"{args.answers}, made elsewhere"
        report(benchmarks[0], read_answers(args.answers, benchmarks[0]), answered_with, args)
        return

    rank, world = start_ranks()
    if world > 1 and args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    loaded = []

    def llava():  # loaded when the first question needs it, then kept
        if not loaded:
            loaded.append(Llava.from_pretrained(args.model, getattr(torch, args.dtype), args.device).eval())
        return loaded[0]

    for benchmark in benchmarks:
        answer(benchmark, llava, args, rank, world)
        if rank == 0:
            folder = args.out_dir / benchmark.name
            texts = read_answers(folder / "answers.jsonl", benchmark)
            report(benchmark, texts, read_json(folder / "settings.json"), args)


def main(argv: list[str] | None = None) -> int:
    try:
        evaluate(parse_arguments(sys.argv[1:] if argv is None else argv))
        return 0
    except UserError as error:
        print(f"evaluate.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
