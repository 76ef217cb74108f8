"""
Check training files before training: every row, and every mistake in one pass.

    python -m tools.check --data=rows.json --image_dir=images              the rows, and that their images are there
    python -m tools.check --data=rows.json --image_dir=images --decode     and that every image can be read
    python -m tools.check --data=a.json,b.jsonl --model=out/tiny/pd        and how long the rows are in its tokens

The rules are those of training (engine/rows.py: `parse_pair` for a file with preference pairs, else `parse_instruction`).
The first wrong rows are shown, all are counted by kind and written to --out, one per line: {"file", "row", "error"}. Exit
code 1 if there are any. Mend them; or write the right ones to another file with --keep; or train without them: train.py
--skip_bad_rows, which leaves out what is wrong here without --decode.
"""
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from configurator import POSITIVE, Config, Stopped, UserError, check_uses, check_values, cut, load_config, run
from data import image_bytes, load_image
from engine.files import check_output, write_lines
from engine.hf import describe_llava, require_tokenizer
from engine.index import measure, parse_sources, scan_rows, row_name
from engine.rows import parse_instruction, parse_pair

DEFAULTS = dict(
    data="",                    # as in train.py: files, separated by commas; weights do not matter
    image_dir="",
    decode=False,               # read and decode every image: about 100 a second and core
    model="",                   # a LLaVA folder whose tokenizer measures the rows
    max_length=2048,            # with --model: how many rows are longer?
    out="wrong_rows.jsonl",     # FILE.jsonl that lists all wrong rows
    keep="",                    # FILE.jsonl for the rows that are right, as they are; empty: none is written
)
SHOWN = 20
AHEAD = 256                     # images that are decoded at once


def main(argv: list[str]) -> None:
    config = load_config(DEFAULTS, argv)
    check_values(config, {"max_length": POSITIVE})
    check_uses(config, DEFAULTS, [(["max_length"], config.model, "--model")])
    if not config.data:
        raise UserError("--data is missing; give --data=FILE.json or FILE.jsonl")
    sources = parse_sources(config.data)
    if config.keep and (len(sources) > 1 or not config.keep.endswith(".jsonl") or os.path.lexists(config.keep)):
        raise UserError(f"--keep={config.keep}: expected a new FILE.jsonl, for the rows of one data file")
    if not config.out.endswith(".jsonl"):
        raise UserError(f"--out={config.out}: expected FILE.jsonl")
    inputs = [("data", path) for path, _ in sources]
    check_output(config.out, inputs)
    if config.keep:
        check_output(config.keep, [*inputs, ("list of wrong rows (--out)", config.out)])
    wrong, rows = [], 0
    for path, _ in sources:
        found, lines = check_file(path, config)
        wrong += found
        rows += lines.pop("rows")
        print(f"{path}: {'; '.join(lines.values())}")
    for each in wrong[:SHOWN]:
        print(f"  {each['error']}")
    if config.keep:
        numbers = {each["row"] for each in wrong}
        write_lines(config.keep, [row for i, (_, _, row) in enumerate(scan_rows(path, lenient=True)) if i not in numbers])
        print(f"{config.keep}: {rows - len(numbers):,} rows")
    if not wrong:
        print(f"{rows:,} rows, none is wrong")
        return
    if len(wrong) > SHOWN:
        print(f"  and {len(wrong) - SHOWN:,} more")
    for kind, count in Counter(kind_of(each["error"]) for each in wrong).most_common():
        print(f"{count:>7,}  {kind}")
    write_lines(config.out, wrong)
    wrong_rows = len({(each["file"], each["row"]) for each in wrong})
    raise Stopped(f"{wrong_rows:,} of {rows:,} rows are wrong; all of them are listed in {config.out}", 1)


def check_file(path: str, config: Config) -> tuple[list[dict], dict]:
    """A data file -> its wrong rows, and what to say about it."""
    wrong, pictures, lengths, with_image, number = [], {}, [], 0, -1      # pictures: path -> the rows that name it
    llava = open_model(config)
    parse, reported = None, time.time()
    for number, (_, _, row) in enumerate(scan_rows(path, lenient=True)):
        try:
            if isinstance(row, UserError):
                raise row
            parse = parse or parser_of(row)
            names, conversations = (parse or parse_instruction)(row)
            check_text(row)
            for image in dict.fromkeys(os.path.join(config.image_dir, name) for name in names):
                if image not in pictures:
                    image_bytes(image)                               # is it there?
                pictures.setdefault(image, []).append(number)
            with_image += bool(names)
            if llava is not None:
                lengths.append(max(measure(turns, llava.tokenizer, llava.config.template, llava.config.image_tokens)[0]
                                   for turns in conversations))
        except UserError as error:
            text = str(error) if error is row else f"{row_name(path, number, row)}: {error}"
            wrong.append({"file": path, "row": number, "error": text})
        if time.time() - reported > 5:
            reported = time.time()
            print(f"{path}: {number + 1:,} rows so far", file=sys.stderr)
    if config.decode:
        wrong += [{"file": path, "row": row, "error": f"{path} row {row}: image {image!r}: {str(error).removeprefix(f'{image}: ')}"}
                  for image, error in undecodable(list(pictures)) for row in pictures[image]]
    lines = {"rows": number + 1, "what": f"{number + 1:,} {'pairs' if parse is parse_pair else 'rows'}, {with_image:,} with images",
             "images": f"{len(pictures):,} image files" + ", all decoded" * config.decode}
    if lengths:
        long = int((np.array(lengths) > config.max_length).sum())
        lines["length"] = (f"{np.mean(lengths):,.0f} tokens on average, {max(lengths):,} at most, {long:,} rows longer than "
                           f"max_length={config.max_length:,}")
    return sorted(wrong, key=lambda each: each["row"]), lines


def parser_of(row: object) -> Callable | None:
    """How the rows of a file are read, by its first row that has the key of a kind; None: this row has none."""
    keys = row.keys() if isinstance(row, dict) else set()
    if "chosen" in keys:
        return parse_pair
    if keys & {"conversations", "messages"}:
        return parse_instruction
    return parse_pair if "rejected" in keys else None


def open_model(config: Config):
    """The tokenizer, template and image size that rows are measured with; None without --model."""
    if not config.model:
        return None
    llava = describe_llava(Path(config.model))
    require_tokenizer(llava, config.model)
    return llava


def check_text(row: dict) -> None:
    """Half of a surrogate pair, which JSON can spell, is no text for a tokenizer."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError("the text has a lone surrogate (\\ud800 to \\udfff), not a character; remove it") from None


def undecodable(paths: list[str]) -> Iterator[tuple[str, UserError]]:
    """The images that cannot be read, and why."""
    started = reported = time.time()
    with ThreadPoolExecutor() as pool:                               # Pillow decodes outside of Python's lock
        for start in range(0, len(paths), AHEAD):
            for path, error in zip(paths[start:start + AHEAD], pool.map(decode, paths[start:start + AHEAD])):
                if error is not None:
                    yield path, error
            if time.time() - reported > 5:
                reported = time.time()
                speed = (start + AHEAD) / (reported - started)
                print(f"{start + AHEAD:,} of {len(paths):,} images decoded, {speed:,.0f} a second", file=sys.stderr)


def decode(path: str) -> UserError | None:
    try:
        load_image(path)
    except UserError as error:
        return error


def kind_of(error: str) -> str:
    """A message without what differs from row to row: where it is, and what was found."""
    text = error.split(": ", 1)[1] if ": " in error else error
    text = re.sub(r'"[^"]*"|\'[^\']*\'|\{.*\}|\[.*\]|\d+', "…", text)
    return cut(text, 100)


if __name__ == "__main__":
    run(main, __doc__, DEFAULTS)
