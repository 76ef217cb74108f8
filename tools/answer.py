"""
Teacher-made data: a model writes every answer of a data set anew, and a student is then trained on its answers.

    python -m tools.answer --model=out/tiny/teacher --data=rows.json --image_dir=images --out=answered.json
    torchrun --nproc_per_node=8 -m tools.answer ...                  the rows divided among 8 GPUs

This is sequence-level distillation (Kim and Rush, arXiv 1606.07947), the fourth axis of LLaVADI (arXiv 2407.19409):

    data        USER: <image> question 1 ASSISTANT: answer 1        USER: question 2 ASSISTANT: answer 2
    answered    USER: <image> question 1 ASSISTANT: model's answer  USER: question 2 ASSISTANT: model's answer

The model reads its own earlier answers, never the data's. Questions, images, all other keys and the order of the rows
stay, so every stage can train on the result. The default is sampling at temperature 1, as in LLaVADI. Random numbers
are a function of (seed, row, turn): the batch size and the number of ranks do not change what is sampled.

A conversation ends before the first question whose prompt and max_new_tokens exceed max_length; a row without any
answer is left out. Both are counted, and so are the answers cut off at max_new_tokens, whose text is kept as it is.

Files next to OUT: OUT.settings.json says how the answers were made, and is locked while a run writes there.
OUT.partial.RANK.jsonl hold the rows answered so far, until OUT is written; the same command continues from them after an
interruption. A row whose image has been replaced by one of another size meanwhile is answered again.
"""
import glob
import hashlib
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from benchmarks.common import need
from configurator import (GREEDY_OR_TEMPERATURE, NON_NEGATIVE, POSITIVE, Config, UserError, check_values, load_config, run,
                          user_file)
from data import IMAGE, check_turns, image_bytes, load_image, render, transform_image
from engine import prefix
from engine.distributed import Dist, init_distributed
from engine.files import (check_output, digest_of_folder, disk_errors, lock, parse_json, sha256_of_file, write_json,
                          write_lines)
from engine.hf import describe_llava, require_finite, require_tokenizer
from engine.index import scan_rows, row_name
from engine.rows import image_names, llava_row, parse_instruction, without_images
from model import Llava

DEFAULTS = dict(
    model="",                   # checkpoint folder of the model that answers
    data="",                    # conversations, FILE.json or FILE.jsonl; only their questions are read
    image_dir="",
    out="",                     # the same rows with the model's answers, FILE.json or FILE.jsonl
    temperature=1.0,            # 0: greedy
    max_new_tokens=128,         # longest answer
    max_length=2048,            # longest conversation in tokens, image tokens included
    batch_size=16,              # rows per forward pass and rank
    seed=0,
    device="",                  # cpu | cuda; empty: cuda if there is one
    dtype="",                   # float32 | bfloat16 | float16; empty: bfloat16 on a GPU, else float32
)


def main(argv: list[str]) -> None:
    config = load_config(DEFAULTS, argv)
    check(config)
    dist = init_distributed(config.device, gradients=False)
    config.dtype = config.dtype or ("bfloat16" if dist.device.type == "cuda" else "float32")
    with dist.sync_errors():
        require_tokenizer(describe_llava(Path(config.model)), config.model)
        rows, image_sizes = read_data(config)
        settings = answer_settings(config, image_sizes) if dist.local_rank == 0 else {}    # the others share its files
        record = open_record(config) if dist.rank == 0 else None     # locked until it is closed at the end of this function
    settings = dist.assert_same(settings)
    answered = dist.broadcast_from_rank0(lambda: begin_or_resume(config, settings, image_sizes, record))
    if answered is None:
        return
    todo = [number for number in range(len(rows)) if number not in answered]
    if todo:
        with dist.sync_errors():
            llava = Llava.from_pretrained(config.model, getattr(torch, config.dtype), dist.device).eval()
            require_finite(llava, config.model)
        answer_rows(llava, rows, image_sizes, todo, config, dist)
        dist.barrier()                                               # now all partial files are complete
    dist.broadcast_from_rank0(lambda: write_out(rows, config))


# -----------------------------------------------------------------------------
# Before the model is loaded

def check(config: Config) -> None:
    if not config.model:
        raise UserError("--model is missing; give --model=DIR")
    for key in ("data", "out"):
        if not config[key].endswith((".json", ".jsonl")):
            raise UserError(f"--{key}: found {config[key]!r}, expected FILE.json or FILE.jsonl")
    check_values(config, {
        "temperature": GREEDY_OR_TEMPERATURE, "max_new_tokens": POSITIVE, "max_length": POSITIVE, "batch_size": POSITIVE,
        "seed": NON_NEGATIVE, "device": ["", "cpu", "cuda"], "dtype": ["", "float32", "bfloat16", "float16"]})
    if config.max_new_tokens >= config.max_length:
        raise UserError(f"max_new_tokens is {config.max_new_tokens}, expected less than max_length, which is "
                        f"{config.max_length}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no GPU here; use --device=cpu")
    if not Path(config.out).parent.is_dir():
        raise UserError(f"--out: the folder {Path(config.out).parent} does not exist; create it, or correct the path")
    for path in (f"{config.out}.settings.json", config.out):
        check_output(path, [("data", config.data)])


def read_data(config: Config) -> tuple[list[dict], list[list[int]]]:
    """All rows, each of them checked, and the bytes of each row's images: they tell that other pictures have taken their
    names."""
    rows, image_sizes, known = [], [], {}                            # known: image -> its bytes
    for number, (_, _, row) in enumerate(scan_rows(config.data)):
        try:
            row = llava_row(row)
            names, _ = parse_instruction(row)
            json.dumps(row, ensure_ascii=False).encode()             # half a surrogate pair cannot be written
            for name in names:
                if name not in known:
                    known[name] = image_bytes(os.path.join(config.image_dir, name))
        except (UserError, UnicodeEncodeError) as error:
            raise UserError(f"{row_name(config.data, number, row)}: {error}") from None
        rows.append(row)
        image_sizes.append([known[name] for name in names])
    if not rows:
        raise UserError(f"{config.data}: has no rows; check the file")
    return rows, image_sizes


def questions_of(row: dict) -> list[dict]:
    return row["conversations"][0::2]


def answer_settings(config: Config, image_sizes: list[list[int]]) -> dict:
    """All that the answers depend on. A run is continued only if nothing here has changed, but see `begin_or_resume`."""
    return {"model": config.model, "model_digest": digest_of_folder(config.model),
            "data": config.data, "data_sha256": sha256_of_file(config.data),
            "image_sizes": hashlib.sha256(json.dumps(image_sizes).encode()).hexdigest(),
            **{key: config[key] for key in ("temperature", "max_new_tokens", "max_length", "seed", "dtype")}}


def open_record(config: Config) -> TextIO:
    """OUT.settings.json, locked: two runs must not write to one OUT."""
    path, found = Path(f"{config.out}.settings.json"), find_earlier_files(config)
    if found and not path.exists():
        raise UserError(f"{found[0]}: exists without {path.name}, which says how it was made; choose another --out")
    return lock(path, place=config.out)


def begin_or_resume(config: Config, settings: dict, image_sizes: list[list[int]], record: TextIO) -> set[int] | None:
    """The numbers of the rows that the interrupted run has answered; None if the run is finished.

    Images may be replaced until then, such as a damaged one that stopped it: each row's record tells of its own.
    """
    record.seek(0)
    earlier = parse_json(record.read() or "{}", str(record.name))
    if earlier != {} and not (isinstance(earlier, dict) and "model_digest" in earlier):
        raise UserError(f"{record.name}: is there, and was not written by this program; choose another --out")
    found, finished = find_earlier_files(config), os.path.exists(config.out)
    if found:
        for key, value in settings.items():
            may_change = key == "image_sizes" and key in earlier and not finished
            if earlier.get(key) != value and not may_change:
                raise UserError(f"{found[0]}: was made with {key}={earlier.get(key)!r}, this run has {value!r}; choose "
                                f"another --out, or remove {config.out} and all {config.out}.*")
    if finished:
        remove_partial_files(config)                                 # a run may be killed between its last two steps
        print(f"{config.out}: this run is finished already; nothing to do")
        return None
    if earlier != settings:
        with disk_errors(Path(record.name)):                         # in place: a new file would not be locked
            record.truncate(0)
            record.write(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
            record.flush()
            os.fsync(record.fileno())
    written = read_partial_files(config)
    records = {number: each for number, each in written.items()
               if number in range(len(image_sizes)) and each["image_sizes"] == image_sizes[number]}
    if len(records) < len(written):                                  # some rows have other images now
        whole = Path(f"{config.out}.partial.0.jsonl")
        write_lines(whole, list(records.values()))
        for path in find_partial_files(config):
            if path != whole:
                path.unlink()
    if records:
        print(f"{config.out}: continues, {len(records):,} rows were answered earlier", flush=True)
    return set(records)


# -----------------------------------------------------------------------------
# Answering

def answer_rows(llava: Llava, rows: list[dict], image_sizes: list[list[int]], todo: list[int], config: Config,
                dist: Dist) -> None:
    """Answer this rank's part of the rows, batch by batch, and append them to its partial file."""
    # The rows of a batch have as many questions and images, and texts of similar length: little padding, and no row
    # ends early. Rows with the same images follow each other, so that they share what their prompts begin with. The
    # largest come first: a batch size that does not fit into memory fails at once.
    def kind(number: int) -> tuple:
        return row_size(rows[number])[:2], tuple(image_names(rows[number].get("image")))

    largest = {}
    for number in todo:
        largest[kind(number)] = max(row_size(rows[number]), largest.get(kind(number), (0, 0, 0)))
    todo = sorted(todo, key=lambda number: (largest[kind(number)], kind(number), row_size(rows[number])), reverse=True)
    batch_size = 1 if llava.config.pad_token_id is None else config.batch_size   # unequal lengths need padding
    batches = [todo[i:i + batch_size] for i in range(0, len(todo), batch_size)][dist.rank::dist.world_size]
    questions = np.cumsum([sum(len(questions_of(rows[number])) for number in batch) for batch in batches])

    started = last_print = time.time()
    load = partial(load_pixels, rows, config, llava.config.vision.image_size)
    with ThreadPoolExecutor() as pool:
        loading = start_loading(pool, load, rows, batches[0]) if batches else {}
        for i, batch in enumerate(batches):
            pixels = {name: future.result() for name, future in loading.items()}
            if i + 1 < len(batches):                                 # while the model is busy with this batch
                loading = start_loading(pool, load, rows, batches[i + 1])
            records = answer_batch(llava, rows, batch, pixels, config)
            records = [record | {"image_sizes": image_sizes[record["row"]]} for record in records]
            append_records(Path(f"{config.out}.partial.{dist.rank}.jsonl"), records)

            if dist.rank == 0 and (time.time() - last_print > 5 or i + 1 == len(batches)):
                last_print, seconds = time.time(), time.time() - started
                done = min((i + 1) * batch_size * dist.world_size, len(todo))
                left = timedelta(seconds=round(seconds * (questions[-1] / questions[i] - 1)))
                print(f"{done:,}/{len(todo):,} rows answered, {done / seconds:.1f} rows/s, {left} left", flush=True)


def row_size(row: dict) -> tuple[int, int, int]:
    """Questions, images, characters."""
    texts = [turn["value"] for turn in questions_of(row)]
    return len(texts), len(image_names(row.get("image"))), sum(map(len, texts))


def start_loading(pool: ThreadPoolExecutor, load: Callable, rows: list[dict], batch: list[int]) -> dict[str, Future]:
    """Start to read and resize the images of a batch, each of them once."""
    first = {}                                                       # image -> the first row that shows it
    for number in batch:
        for name in image_names(rows[number].get("image")):
            first.setdefault(name, number)
    return {name: pool.submit(load, name, number) for name, number in first.items()}


def load_pixels(rows: list[dict], config: Config, size: int, name: str, number: int) -> torch.Tensor:
    """(3, S, S)"""
    try:
        return transform_image(load_image(os.path.join(config.image_dir, name)), size)
    except UserError as error:
        raise UserError(f"{row_name(config.data, number, rows[number])}: {error}") from None


def answer_batch(llava: Llava, rows: list[dict], batch: list[int], pixels: dict[str, torch.Tensor],
                 config: Config) -> list[dict]:
    """
    Answer the rows with these numbers: all their first questions at once, then all their second ones, and so on.

    -> a record per row: {"row", "conversations", "unfinished": answers without an end token}.
    """
    model, device = llava.config, llava.decoder.embedding.weight.device
    ends = set(model.eos_token_id if isinstance(model.eos_token_id, list) else [model.eos_token_id])
    questions = [questions_of(rows[number]) for number in batch]
    records = [{"row": number, "conversations": [], "unfinished": 0} for number in batch]
    for turn in range(max(map(len, questions))):
        prompts, images = {}, {}                                     # place in the batch -> ids, names of images
        for i, turns in enumerate(record["conversations"] for record in records):
            if turn < len(questions[i]) and len(turns) == 2 * turn:  # not complete, and not ended by max_length
                asked, names = [*turns, questions[i][turn]], image_names(rows[batch[i]].get("image"))
                ids, _ = render(asked if names else without_images(asked), llava.tokenizer, model.template, model.image_tokens)
                if len(ids) + config.max_new_tokens <= config.max_length:
                    shown = ids.count(model.image_token_id) // model.image_tokens
                    prompts[i], images[i] = ids, names[:shown]
        if not prompts:
            break
        uniforms = np.stack([np.random.default_rng([config.seed, batch[i], turn]).random(config.max_new_tokens)
                             for i in prompts])                                                      # (B, new)
        new = prefix.generate(llava, list(prompts.values()), list(images.values()), pixels, config.max_new_tokens,
                              temperature=config.temperature, uniforms=torch.from_numpy(uniforms).to(device),
                              banned=llava.unanswerable_ids())
        for i, ids in zip(prompts, new.tolist()):
            answer = llava.tokenizer.decode(ids, skip_special_tokens=True).strip()
            # The token <image> is banned, but several others can spell it, and an answer must not contain it.
            answer = {"from": "gpt", "value": answer.replace(IMAGE, "(image)")}
            records[i]["conversations"] += [questions[i][turn], answer]
            records[i]["unfinished"] += ends.isdisjoint(ids)
    return records


# -----------------------------------------------------------------------------
# Files

def find_partial_files(config: Config) -> list[Path]:
    return sorted(map(Path, glob.glob(f"{glob.escape(config.out)}.partial.*.jsonl")))


def find_earlier_files(config: Config) -> list[Path]:
    return [Path(config.out)] * os.path.exists(config.out) + find_partial_files(config)


def remove_partial_files(config: Config) -> None:
    for path in find_partial_files(config):
        path.unlink()


def append_records(path: Path, records: list[dict]) -> None:
    # First a line break: a killed run or a full disk may have left half a line.
    text = "\n" + "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with disk_errors(path, note="the rows answered so far are kept: make room and repeat the same command"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)


def read_partial_files(config: Config) -> dict[int, dict]:
    """{row number: its record}, from however many ranks. Half a line, or what is no record, is skipped; its row is
    answered again."""
    records = {}
    for path in find_partial_files(config):
        with user_file(path) as file:
            lines = file.read().decode(errors="replace").split("\n")
        for line in lines:
            try:
                record = parse_json(line, str(path))
                for key, kind in {"row": int, "image_sizes": list, "conversations": list, "unfinished": int}.items():
                    need(record, key, kind, str(path))
                if record["conversations"]:                          # none if the first question did not fit
                    check_turns(record["conversations"])
            except UserError:
                continue
            records[record["row"]] = record
    return records


def write_out(rows: list[dict], config: Config) -> None:
    """All rows are answered: the partial files become `out`."""
    records = read_partial_files(config)
    if len(records) < len(rows):
        raise UserError(f"{config.out}.partial.*: hold {len(records):,} of {len(rows):,} rows; the folder must be one "
                        "that all machines share")
    answered, answers, ended_early = [], 0, 0
    for number, row in enumerate(rows):
        turns, names = records[number]["conversations"], image_names(row.get("image"))
        shown = sum(turn["value"].count(IMAGE) for turn in turns)
        if shown < len(names):                                       # the others belong to questions without an answer
            row = row | {"image": names[:shown]}
        if turns:
            answered.append(row | {"conversations": turns})
            answers += len(turns) // 2
            ended_early += len(turns) // 2 < len(questions_of(row))
    unfinished = sum(record["unfinished"] for record in records.values())

    (write_lines if config.out.endswith(".jsonl") else write_json)(config.out, answered)
    remove_partial_files(config)
    print(f"{config.out}: {len(answered):,} rows with {answers:,} answers")
    print(f"{unfinished:,} answers were cut off at max_new_tokens={config.max_new_tokens}; for max_length="
          f"{config.max_length}, {ended_early:,} rows end early and {len(rows) - len(answered):,} are left out")


if __name__ == "__main__":
    run(main, __doc__, DEFAULTS)
