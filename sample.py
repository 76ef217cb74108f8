"""
Talk to a checkpoint about an image.

    python sample.py --model=out/tiny/pd --image=photo.png --prompt="Describe the image."
    python sample.py --model=out/tiny/pd --image=photo.png          a conversation, until an empty line

Text appears as it is generated. Without --image the conversation is about text alone.
"""
from configurator import GREEDY_OR_TEMPERATURE, POSITIVE, UserError, check_values, load_config, run     # first: from here
                                                                                               # on, Ctrl-C ends in one line

import sys
from os.path import commonprefix

import torch
from tokenizers import Tokenizer

from benchmarks.common import SHORT
from data import as_text, load_image, render, transform_image
from engine.hf import require_tokenizer
from model import KVCache, Llava

DEFAULTS = dict(
    model="",                   # a LLaVA folder, for example the out_dir of a training run
    image="",                   # an image file; empty: none
    prompt="",                  # one question; empty: a conversation
    short=False,                # end each question with the benchmarks' "Answer the question using a single word or phrase."
    max_new_tokens=512,
    temperature=0.0,            # 0 is greedy
    device="",                  # cpu | cuda; empty: cuda if there is one
)


def answer(llava: Llava, conversation: list[dict], pixel_values: torch.Tensor | None, known: list[int], cache: KVCache,
           max_new_tokens: int, temperature: float) -> str:
    """Print the reply to the conversation's last turn token by token, and return it.

    `known`: the tokens that the earlier turns have left in the cache. What the conversation begins with is not read again.
    """
    ids, _ = render(conversation, llava.tokenizer, llava.config.template, llava.config.image_tokens)
    start = len(commonprefix([known, ids[:-1]]))
    cache.truncate(start)
    if llava.config.image_token_id not in ids[start:]:
        pixel_values = None
    input_ids = torch.tensor([ids[start:]], device=llava.adaptor.linear_1.weight.device)      # (1, T)
    new, shown = [], ""
    for token in llava.stream(input_ids, pixel_values, max_new_tokens, temperature, cache=cache):
        new.append(int(token))
        # Decode all of it each time: a character may take several tokens, and decodes to the replacement character
        # until the last of them is there.
        text = llava.tokenizer.decode(new, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            print(text[len(shown):], end="", flush=True)
            shown = text
    print()
    known[:] = ids + new[:-1]                                        # the last token was not read
    return shown.strip()


def main(argv: list[str]) -> None:
    config = load_config(DEFAULTS, argv)
    check_values(config, {"max_new_tokens": POSITIVE, "temperature": GREEDY_OR_TEMPERATURE, "device": ["", "cpu", "cuda"]})
    if not config.model:
        raise UserError("model is empty, expected a LLaVA folder: --model=out/tiny/pd")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no GPU here; use --device=cpu")
    image = load_image(config.image) if config.image else None       # before the weights: a bad path ends at once

    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    llava = Llava.from_pretrained(config.model, dtype=dtype, device=device).eval()
    require_tokenizer(llava, config.model)
    pixel_values = None
    if image is not None:
        pixel_values = transform_image(image, llava.config.vision.image_size)[None]   # (1, 3, S, S)

    conversation, known, cache = [], [], llava.make_cache(rows=1)
    while True:
        prompt = config.prompt or next_question()
        if not prompt:
            return
        unknown = unknown_words(prompt, llava.tokenizer)
        if unknown:
            print(f"warning: the tokenizer does not know {', '.join(unknown)}: the model cannot read that", file=sys.stderr)
        first = "<image>\n" if image is not None and not conversation else ""
        last = f"\n{SHORT}" if config.short else ""
        conversation.append({"from": "human", "value": first + as_text(prompt) + last})
        reply = answer(llava, conversation, pixel_values, known, cache, config.max_new_tokens, config.temperature)
        conversation.append({"from": "gpt", "value": reply})
        if config.prompt:
            return


def unknown_words(text: str, tokenizer: Tokenizer) -> list[str]:
    """The words of a text that the tokenizer replaces by its unknown token. Qwen's has none: it can spell everything."""
    unknown = tokenizer.token_to_id(tokenizer.model.unk_token or "")
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return list(dict.fromkeys(text[start:end] for id, (start, end) in zip(encoding.ids, encoding.offsets) if id == unknown))


def next_question() -> str:
    """A line of the user's; empty at the end of the input."""
    try:
        return input("> ").strip()
    except (EOFError, RuntimeError):                                 # RuntimeError: there is no standard input, as with <&-
        print()
        return ""
    except UnicodeDecodeError:
        raise UserError("the question is not text in the terminal's encoding") from None


if __name__ == "__main__":
    run(main, __doc__, DEFAULTS)
