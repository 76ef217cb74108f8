"""
docs/own-data.md and config/own.py: EXIF, the examples of rows, the flags.

    python -m pytest tests/test_own_data.py
"""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image as transformers_load_image

import evaluate
import train
from benchmarks.common import Question
from data import load_image
from engine.rows import parse_instruction, parse_pair
from test_evaluate import put, scripted  # noqa: F401: scripted is a fixture

ROOT = Path(train.__file__).parent
PAGE = (ROOT / "docs/own-data.md").read_text(encoding="utf-8")


def photo(path, orientation=None, **save):
    """Red on the left, blue on the right, as the sensor saw it."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20, 0] = pixels[:, 20:, 2] = 255
    image, exif = Image.fromarray(pixels), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
        save["exif"] = exif
    image.save(path, **save)
    return path


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_a_photo_is_turned_as_transformers_turns_it(tmp_path, orientation):
    path = photo(tmp_path / "a.jpg", orientation, quality=95)
    ours = load_image(str(path))
    assert (np.asarray(ours) == np.asarray(transformers_load_image(str(path)))).all()
    assert ours.size == ((20, 40) if orientation and orientation > 4 else (40, 20))
    assert (np.asarray(load_image(str(path), official=True)) == np.asarray(Image.open(path).convert("RGB"))).all()


def test_pictures_without_the_note_and_damaged_notes_are_as_they_were(tmp_path):
    path = photo(tmp_path / "a.png")
    assert (np.asarray(load_image(str(path))) == np.asarray(Image.open(path).convert("RGB"))).all()
    path = photo(tmp_path / "a.jpg", exif=b"Exif\0\0garbage that is no TIFF header")
    assert load_image(str(path)).size == (40, 20)
    path = photo(tmp_path / "b.jpg", orientation=77)
    assert load_image(str(path)).size == (40, 20)


def test_own_questions_are_about_upright_photos_and_official_ones_are_not(scripted, tmp_path):  # noqa: F811
    (tmp_path / "photos").mkdir()
    photo(tmp_path / "photos/a.jpg", orientation=6, quality=95)
    put(tmp_path / "q.jsonl", [{"question_id": 1, "image": "a.jpg", "text": "What?"}])
    own = ["--benchmark=own", f"--questions={tmp_path / 'q.jsonl'}", f"--image_dir={tmp_path / 'photos'}", f"--out_dir={tmp_path / 'own'}"]
    code, model = scripted({"<image>\nWhat?": "a"}, *own, "--crop")
    assert code == 0
    upright = model.pixels[0][0]                                       # (3, 28, 28): red above, blue below
    assert upright[0, 3, 14] > 1 > upright[0, 24, 14] and upright[2, 24, 14] > 1

    (tmp_path / "vizwiz/val").mkdir(parents=True)
    photo(tmp_path / "vizwiz/val/a.jpg", orientation=6, quality=95)
    put(tmp_path / "vizwiz/val.json", [{"image": "a.jpg", "question": "What?", "answers": [{"answer": "a"}] * 10}])
    from benchmarks.vizwiz import VizWiz
    code, model = scripted({f"<image>\nWhat?\n{VizWiz.suffix}": "a"}, "--benchmark=vizwiz", f"--data={tmp_path}",
                           f"--out_dir={tmp_path / 'official'}", "--crop")
    lying = model.pixels[0][0]
    assert code == 0 and lying[0, 14, 3] > 1 > lying[0, 14, 24]

    content = (tmp_path / "vizwiz/val/a.jpg").read_bytes()             # as a row of MMBench or ObjHal ships it
    assert torch.equal(evaluate.load_pixels(content, Question(1, "What?", content, "row 1"), 28, crop=True), lying)


def test_official_pictures_are_converted_and_no_more(tmp_path):
    """A transparent pixel keeps its hidden color there, as in the official scripts; elsewhere it is white."""
    path = str(tmp_path / "a.png")
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(path)
    assert load_image(path, official=True).getpixel((0, 0)) == (255, 0, 0) and load_image(path).getpixel((0, 0)) == (255, 255, 255)
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(path)
    assert (np.asarray(load_image(path, official=True)) == np.asarray(Image.open(path).convert("RGB"))).all()
    assert load_image(path).getpixel((0, 0)) == (156, 156, 156)       # 40,000 of 65,535


def test_the_rows_of_the_page_are_read():
    examples = [json.loads(line) for block in re.findall(r"```json\n(.*?)```", PAGE, flags=re.S)
                for line in re.sub(r"\n    ", " ", block).strip().splitlines()]
    assert len(examples) == 4
    for example in examples:
        names, conversations = (parse_pair if "chosen" in example else parse_instruction)(example)
        assert names == ([example["image"]] if isinstance(example.get("image"), str) else example.get("image", []))


def test_the_flags_of_the_page(monkeypatch):
    monkeypatch.chdir(ROOT)
    for flags in re.findall(r"\| [\d,]+ \| `(--[^`]+)`", PAGE):
        config = train.configure(["config/own.py", *flags.split()])
        assert config.batch_size % config.micro_batch_size == 0 and config.val_rows >= config.batch_size // 8
    for stage, more in [("d2d", []), ("d2s", [])]:
        train.configure(["config/own.py", f"--stage={stage}", "--teacher=out/teacher/sft", *more])


def test_everything_in_an_out_dir_is_in_the_table(world, tmp_path):
    from test_train import flags
    rows = json.loads((world / "rows.json").read_text()) + [{"id": "wrong"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    train.main(flags(world, "sft", tmp_path / "out", data=tmp_path / "rows.json", skip_bad_rows=True, max_steps=1))
    table = PAGE.split("## 5.")[1]
    for path in (tmp_path / "out").iterdir():
        name = "tokenizer*" if path.name.startswith("tokenizer") else "model*.safetensors" if path.suffix == ".safetensors" else path.name
        assert f"`{name}`" in table or f"`{name}/`" in table, path.name
