"""Clips to be corrected by hand, and then trained on: audio is cut at its quietest points and transcribed.

    python -m tools.review interview.mp3 lecture.flac --out data/review

Writes FLAC clips and manifest.jsonl: a line a clip with "audio", "text", "hypothesis", "confidence", the least certain
first, and "reviewed": false. Correct the text of a line and set "reviewed" to true; `train.py` takes the manifest as it
is, and leaves out every line that nobody has reviewed. What was reviewed is never written over.
"""

import argparse
import json
from pathlib import Path

import soundfile
from tqdm import tqdm
from transformers import pipeline

from tools.transcribe import ROOT
from voxkrikri.processing_voxkrikri import SAMPLE_RATE, load_audio


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audio", nargs="+", type=Path, help="audio files of any length")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id (default: the mini of this repository)")
    args = parser.parse_args(argv)
    if args.out.exists():
        parser.error(f"{args.out} exists: its lines may be reviewed already; choose another folder")
    recordings = [load_audio(str(path)) for path in args.audio]

    asr = pipeline("automatic-speech-recognition", model=args.model, trust_remote_code=True)
    args.out.mkdir(parents=True)
    lines = []
    for number, (path, samples) in enumerate(zip(tqdm(args.audio, unit="file"), recordings, strict=True)):
        result = asr({"array": samples, "sampling_rate": SAMPLE_RATE}, return_segments=True)
        for index, segment in enumerate(result["segments"]):
            clip = args.out / f"{number:03d}-{path.stem}-{index:04d}.flac"
            first, last = (round(segment[key] * SAMPLE_RATE) for key in ("start", "end"))
            soundfile.write(clip, samples[first:last], SAMPLE_RATE)
            known = {key: segment[key] for key in ("text", "hypothesis", "confidence")}
            lines.append({"audio": clip.name, **known, "reviewed": False})
    lines.sort(key=lambda line: line["confidence"])
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (args.out / "manifest.jsonl").write_text(text, encoding="utf-8")
    print(f"{len(lines)} clips to review: {args.out / 'manifest.jsonl'}")


if __name__ == "__main__":
    main()
