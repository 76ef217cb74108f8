"""
Talk to a checkpoint about an image.

    python sample.py --model=out/tiny/pd --image=photo.png --prompt="Describe the image."
    python sample.py --model=out/tiny/pd --image=photo.png          a conversation, until an empty line

Text appears as it is generated. Without --image the conversation is about text alone.
"""
import argparse
import sys

import torch

from configurator import UserError
from data import load_image, render, transform_image
from model import Llava


def answer(llava: Llava, conversation: list[dict], pixel_values: torch.Tensor | None, max_new_tokens: int,
           temperature: float) -> str:
    """Print the reply to the conversation's last turn token by token, and return it."""
    ids, _ = render(conversation, llava.tokenizer, llava.config.template, llava.config.image_tokens)
    input_ids = torch.tensor([ids], device=llava.adaptor.linear_1.weight.device)      # (1, T)
    new, shown = [], ""
    for token in llava.stream(input_ids, pixel_values, max_new_tokens, temperature):
        new.append(int(token))
        # Decode everything again each time: a character may be made of several tokens, and until the last of them is
        # there it decodes to the replacement character.
        text = llava.tokenizer.decode(new, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            print(text[len(shown):], end="", flush=True)
            shown = text
    print()
    return shown.strip()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Talk to a checkpoint about an image.")
    parser.add_argument("--model", required=True, help="a LLaVA folder, for example the out_dir of a training run")
    parser.add_argument("--image", help="an image file")
    parser.add_argument("--prompt", help="ask this and stop; without it, a conversation")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    image = load_image(args.image) if args.image else None           # a bad path ends here, before the weights are read
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    llava = Llava.from_pretrained(args.model, dtype=dtype, device=args.device).eval()
    if llava.tokenizer is None or llava.config.template is None:
        raise UserError(f'{args.model}: needs a tokenizer.json, and "template": "vicuna" or "chatml" in its '
                              "config.json")
    pixel_values = None
    if image is not None:
        pixel_values = transform_image(image, llava.config.vision.image_size)[None]   # (1, 3, S, S)

    conversation = []
    while True:
        prompt = args.prompt if args.prompt is not None else input("> ").strip()
        if not prompt:
            return
        first = "<image>\n" if image is not None and not conversation else ""
        conversation.append({"from": "human", "value": first + prompt})
        reply = answer(llava, conversation, pixel_values, args.max_new_tokens, args.temperature)
        conversation.append({"from": "gpt", "value": reply})
        if args.prompt is not None:
            return


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (EOFError, KeyboardInterrupt):
        print()
