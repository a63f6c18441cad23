"""Asks a model about videos and images; prints the answer as it comes, then time to first token and tokens a second.

    python -m experiments.generate --model=DIR --video=clip.mp4 --prompt="What happens?"
    python -m experiments.generate --model=DIR --video=clip.mp4 --prompt="What happens?" --prompt="And at the end?"
    python -m experiments.generate --model=DIR --image=a.png --image=b.png --prompt="What differs?" --temperature=0.7

DIR is a Hugging Face folder of Qwen2.5-VL or VideoNSA. With NSA, all prompts are asked of one encoded video; a dense
model encodes it again for each. The first figures include compilation. Exit status: 0 done, 1 an unexpected error, 2
something in the command or the files that you can mend (one sentence says what).
"""

import argparse
import sys
import time
from collections.abc import Sequence

import videonsa_jax as vn
from videonsa_jax.generation import CHUNK_SIZE
from videonsa_jax.training.errors import UsageError, usage_errors

EXIT_DONE, EXIT_USAGE = 0, 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--video", action="append", default=[], metavar="FILE", help="repeatable")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="repeatable; after the videos")
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="repeatable")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0, help="0 (default) keeps all tokens")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--fps", type=float, default=4.0, help="frames sampled per second of video")
    parser.add_argument("--max-frames", type=int, metavar="N", help="longer videos are sampled uniformly")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="largest area of a resized frame or image")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--chunk-size", type=int, default=CHUNK_SIZE, metavar="N", help="visual tokens in the decoder at a time"
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback for errors that you can mend, too")
    return parser


class _Watch:
    """Prints an answer's text as it comes, and when its tokens came."""

    def __init__(self) -> None:
        self.start, self.times = time.perf_counter(), []

    def on_token(self, _row: int, _token: int, text: str) -> None:
        """Takes one token."""
        self.times.append(time.perf_counter() - self.start)
        print(text, end="", flush=True)

    def report(self, encoding: float) -> str:
        """What was measured; `encoding` seconds were spent before this answer was asked for."""
        if not self.times:
            return "[no token before the stop token]"
        first, more = self.times[0], len(self.times) - 1
        of_encoding = f", of which {encoding:.3f} s encoding" if encoding else ""
        line = f"time to first token {first + encoding:.3f} s{of_encoding}"
        return f"[{line}; {more / (self.times[-1] - first):.1f} tokens/s]" if more else f"[{line}]"


def _ask(options: argparse.Namespace) -> None:
    media = [{"type": "video", "video": path} for path in options.video]
    media += [{"type": "image", "image": path} for path in options.image]
    reading = {"fps": options.fps, "max_frames": options.max_frames, "max_pixels": options.max_pixels}
    model, processor = vn.load_pretrained(options.model, dtype=options.dtype)

    def conversation(prompt: str) -> list[dict]:
        return [{"role": "user", "content": [*media, {"type": "text", "text": prompt}]}]

    start, encoded = time.perf_counter(), None
    if media and model.config.nsa is not None and model.config.nsa.dialect == "paper":
        first = conversation(options.prompt[0])
        encoded = vn.encode_visual(model, processor, first, chunk_size=options.chunk_size, **reading)
        print(encoded, file=sys.stderr)
    encoding = time.perf_counter() - start if encoded else 0.0
    for prompt in options.prompt:
        watch = _Watch()
        vn.generate(
            model,
            processor,
            conversation(prompt),
            options.max_new_tokens,
            options.temperature,
            encoded,
            top_p=options.top_p,
            top_k=options.top_k,
            seed=options.seed,
            on_token=watch.on_token,
            chunk_size=options.chunk_size,
            **reading,
        )
        print(f"\n{watch.report(encoding)}", flush=True)
        encoding = 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        with usage_errors():
            _ask(options)
    except UsageError as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
