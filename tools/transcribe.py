"""Transcribes files: Whisper's hypothesis, the fused text and, where a .txt lies beside the audio, the reference.

python -m tools.transcribe examples/*.flac
python -m tools.transcribe interview.mp3 --model you/your-voxkrikri --fusion-mode causal --json
"""

import argparse
import json
from pathlib import Path

from tqdm import tqdm
from transformers import pipeline


ROOT = Path(__file__).parent.parent


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audio", nargs="+", help="audio files")
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id (default: the mini of this repository)")
    parser.add_argument("--fusion-mode", choices=("full", "causal"), help="instead of the checkpoint's default")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of text")
    args = parser.parse_args(argv)

    asr = pipeline("automatic-speech-recognition", model=args.model, trust_remote_code=True)
    options = {} if args.fusion_mode is None else {"fusion_mode": args.fusion_mode}
    for audio in tqdm(args.audio, unit="file", disable=len(args.audio) < 2, leave=False):
        result = asr(audio, return_hypothesis=True, generate_kwargs=options)
        reference = Path(audio).with_suffix(".txt")
        if reference.exists():
            result["reference"] = reference.read_text(encoding="utf-8").strip()
        if args.json:
            tqdm.write(json.dumps({"audio": audio} | result, ensure_ascii=False))
            continue
        rows = (("Whisper", "hypothesis"), ("VoxKrikri", "text"), ("reference", "reference"))
        lines = [f"  {label:<10} {result[key]}" for label, key in rows if key in result]
        tqdm.write("\n".join([audio, *lines, ""]))


if __name__ == "__main__":
    main()
