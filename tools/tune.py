"""Finds the copy bias that writes validation clips best: how much more likely the hypothesis's next token is made.

    python -m tools.tune data/validation/manifest.jsonl --model runs/fusion

Whisper listens once; then the clips are written with every bias. Prints the word error rates, marks the least, and keeps
it in the checkpoint's config.json. Take validation clips: on what it was found, the error rate flatters.
"""

import argparse
import json
from pathlib import Path

from metrics.greek_wer.greek_wer import word_error_rate
from tools.evaluate import Transcriber
from voxkrikri import VoxKrikriProcessor
from voxkrikri.processing_voxkrikri import SAMPLE_RATE, load_audio


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path, help=".jsonl with audio (relative to it) and text")
    parser.add_argument("--model", required=True, help="folder of a VoxKrikri with copy_hypothesis")
    parser.add_argument("--biases", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5, 2.0, 3.0], help="nats")
    parser.add_argument("--corrector", action="store_true", help="it was trained with data.task=correction")
    parser.add_argument("--language", default="el", help="of the speech")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args(argv)

    path = Path(args.model) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if not config.get("copy_hypothesis"):
        parser.error(f"{args.model} was trained without copy_hypothesis")
    entries = [json.loads(line) for line in args.manifest.open(encoding="utf-8")]
    pairs = [(load_audio(args.manifest.parent / entry["audio"]), entry["text"]) for entry in entries]
    window = VoxKrikriProcessor.from_pretrained(args.model).feature_extractor.n_samples
    fitting = [(audio, text) for audio, text in pairs if len(audio) <= window]
    if not fitting:
        parser.error(f"{args.manifest} has no clip that fits Whisper's window of {window / SAMPLE_RATE:g} s")
    if len(fitting) < len(pairs):
        print(f"left out: {len(pairs) - len(fitting)} clips longer than Whisper's window")
    clips, references = zip(*fitting, strict=True)

    fused = Transcriber(args.model, list(clips), args.batch_size, args.language)
    corrector = fused.model if args.corrector else None
    rates = {
        bias: word_error_rate(references, fused.transcribe(f"{bias:g}", corrector=corrector, copy_bias=bias))
        for bias in args.biases
    }
    best = min(rates, key=rates.get)
    print(f"Whisper: {100 * word_error_rate(references, fused.hypotheses()):.1f} %")
    for bias, rate in rates.items():
        print(f"bias {bias:g}: {100 * rate:.1f} %{' <- kept' if bias == best else ''}")
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(config | {"copy_bias": best}, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
