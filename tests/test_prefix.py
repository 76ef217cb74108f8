"""
engine/prefix.py: answers from a shared prefix are those of each prompt alone, and the prefix is read once.

    python -m pytest tests/test_prefix.py
"""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data import pad_right
from engine import prefix
from model import Llava

IMAGE = -1                            # stands for the model's image token; an image is 4 of them


@pytest.fixture(scope="module", params=["dense", "sparse"])
def llava(world, request):
    return Llava.from_pretrained(world / request.param).eval()


@pytest.fixture(scope="module")
def pixels():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(3, 28, 28, generator=generator) for name in "abc"}


def with_images(prompts, llava):
    return [[llava.config.image_token_id if token == IMAGE else token for token in prompt] for prompt in prompts]


def alone(llava, prompt, names, pixels, new, **settings):
    """The prompt in a batch of its own, without prefix.py."""
    stacked = torch.stack([pixels[name] for name in names]) if names else None
    ids = llava.generate(torch.tensor([prompt]), stacked, new, **settings)[0].tolist()
    return ids + [llava.config.pad_token_id] * (new - len(ids))


A = [IMAGE] * 4
CASES = {
    "questions about two images": ([[1, 2, *A, 3, 4], [1, 2, *A, 3, 5, 6, 7], [1, 2, *A, 8], [1, 2, *A, 3, 4, 9]],
                                   ["a", "a", "a", "b"]),
    "one question each": ([[1, *A, 5], [1, *A, 6, 7], [1, *A, 8]], ["a", "b", "c"]),
    "one prompt begins the other": ([[1, *A, 5], [1, *A, 5, 6]], ["a", "a"]),
    "the same prompt twice": ([[1, *A, 5, 6], [1, *A, 5, 6]], ["a", "a"]),
    "a prompt that ends with its image": ([[1, 2, *A], [1, 2, *A, 3]], ["a", "a"]),
    "text alone": ([[1, 2, 3], [1, 2, 4, 5], [1, *A, 6]], ["", "", "a"]),
    "nothing in common": ([[1, 2], [3, 4]], ["", ""]),
    "two images, text between them differs": ([[1, *A, 2, *A, 3], [1, *A, 4, 5, *A, 6], [1, *A, 2]], ["ab", "ab", "a"]),
    "two images in common": ([[1, *A, *A, 3], [1, *A, *A, 6]], ["ab", "ab"]),
    "the same images in another order": ([[1, *A, *A, 3], [1, *A, *A, 3]], ["ab", "ba"]),
}


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_each_prompt_alone(llava, pixels, case):
    prompts, images = CASES[case]
    prompts, images = with_images(prompts, llava), [list(names) for names in images]
    new = prefix.generate(llava, prompts, images, pixels, 6).tolist()
    for ids, prompt, names in zip(new, prompts, images):
        expected = alone(llava, prompt, names, pixels, 6)
        assert ids == expected[:len(ids)] and set(expected[len(ids):]) <= {llava.config.pad_token_id}


def test_sampling_uses_each_rows_own_numbers(llava, pixels):
    prompts, images = CASES["questions about two images"]
    prompts, images = with_images(prompts, llava), [list(names) for names in images]
    uniforms = torch.rand(4, 5, generator=torch.Generator().manual_seed(1))
    settings = dict(temperature=1.0, banned=[llava.config.image_token_id])
    new = prefix.generate(llava, prompts, images, pixels, 5, uniforms=uniforms, **settings).tolist()
    for ids, prompt, names, row in zip(new, prompts, images, uniforms):
        assert ids == alone(llava, prompt, names, pixels, 5, uniforms=row[None], **settings)[:len(ids)]


def test_a_prefix_is_read_once(llava, pixels, monkeypatch):
    """Ten questions about one image: the ViT sees it once, the decoder reads its prompt's beginning once."""
    prompts = with_images([[1, 2, *A, 3, 10 + i] for i in range(10)], llava)
    seen, read, encode, embed = [], [], llava.encode_images, llava.embed
    monkeypatch.setattr(llava, "encode_images", lambda images: (seen.append(0 if images is None else len(images)), encode(images))[1])
    monkeypatch.setattr(llava, "embed", lambda ids, features: (read.append(tuple(ids.shape)), embed(ids, features))[1])
    prefix.generate(llava, prompts, [["a"]] * 10, pixels, 3)
    assert sum(seen) == 1
    assert read == [(1, 7), (10, 1)]                                 # system, image and the question's first token; the rest


def test_a_cache_continues_where_it_is_cut(llava, pixels):
    """Hidden states from a cache equal those of reading everything, 1e-5; rows of unequal length, copied and cut."""
    prompts = with_images([[1, 2, *A, 3, 4, 5], [1, *A, 7]], llava)
    images = torch.stack([pixels["a"], pixels["b"]])
    cache = llava.make_cache(2)
    llava.read(pad_right(prompts, llava.config.pad_token_id), images, cache)
    cache = cache.copy_rows(torch.tensor([1, 0, 0]), more=5)
    more = [[8, 9, 10, 11], [12], [13, 14]]
    states = llava.read(pad_right(more, llava.config.pad_token_id), None, cache)                 # (3, D)
    for row, (source, rest) in enumerate(zip([1, 0, 0], more)):
        expected = llava.read(torch.tensor([prompts[source] + rest]), images[source:source + 1], llava.make_cache(1))
        torch.testing.assert_close(states[row], expected[0], atol=1e-5, rtol=1e-5)

    cache = cache.copy_rows(torch.tensor([0]), more=3)
    cache.truncate(7)                                                # 1, the image, 7 and 8
    again = llava.read(torch.tensor([[15, 16]]), None, cache)
    expected = llava.read(torch.tensor(with_images([[1, *A, 7, 8, 15, 16]], llava)), images[1:], llava.make_cache(1))
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)


def test_answering_does_not_load_torchs_compiler(world):
    """It takes seconds, and many a run of evaluate.py and sample.py would be shorter than that."""
    program = ("import sys, torch, evaluate, sample\n"
               f"llava = sample.Llava.from_pretrained({str(world / 'sparse')!r})\n"
               "llava.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2)\n"
               "assert 'torch._dynamo' not in sys.modules")
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(prefix.__file__).parents[1])
