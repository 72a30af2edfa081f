"""The whole project on a real Whisper, a real LLM and real Greek speech: one command, one 24 GB card, one evening.

    python -m tools.check_real                        # whisper-small, EuroLLM-1.7B, half an hour of Fleurs Greek
    python -m tools.check_real --out runs/check --minutes 60

Needs the internet (about 5 GB from the Hub). It trains the fusion, the same Whisper on the same audio and the same LLM as a
corrector of text; scores the five rows on Fleurs' test set; and leaves `results/` in --out, with the machine's
description, to be sent back. Started again, it goes on.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import datasets
import soundfile
import torch
import transformers
from tqdm import tqdm

import train
from recipes.mini import speech_model
from tools import evaluate, tune
from training.recipe import read_recipe
from voxkrikri.processing_voxkrikri import SAMPLE_RATE, load_audio


ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "check_real.yaml"
DATASET, LANGUAGE = "google/fleurs", "el_gr"
SHARES = {"train": 1.0, "validation": 0.25, "test": 0.5}  # minutes of each part for a minute of training


def export_clips(split: str, seconds: float, folder: Path) -> None:
    """The first `seconds` of a split of Fleurs as FLAC files and a manifest in `folder`."""
    manifest = folder / "manifest.jsonl"
    if manifest.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = datasets.load_dataset(DATASET, LANGUAGE, split=split, streaming=True)
    rows = rows.cast_column("audio", datasets.Audio(decode=False))
    lines, total = [], 0.0
    with tqdm(total=round(seconds), unit="s", desc=f"Fleurs {split}") as progress:
        for index, row in enumerate(rows):
            samples = load_audio(row["audio"])
            duration = len(samples) / SAMPLE_RATE
            soundfile.write(folder / f"{index:04d}.flac", samples, SAMPLE_RATE)
            entry = {"audio": f"{index:04d}.flac", "text": row["raw_transcription"], "duration": duration}
            lines.append(json.dumps(entry, ensure_ascii=False))
            total += duration
            progress.update(round(duration))
            if total >= seconds:
                break
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(out: Path, overrides: list[str], whisper: list[str]) -> None:
    """Trains and scores everything on the clips under `out`/data.

    Args:
        overrides: of the recipe, for every run of train.py.
        whisper: further arguments of speech_model.
    """

    def fuse(name: str, *more: str) -> None:
        if not (out / name / "metrics.json").exists():
            train.main([str(RECIPE), *common, f"training.output_dir={out / name}", *more])

    common = [
        *overrides,
        f"data.train=[{{path: {out / 'data/train/manifest.jsonl'}}}]",
        f"data.validation.path={out / 'data/validation/manifest.jsonl'}",
        f"prepared={out / 'prepared'}",
    ]
    validation = str(out / "data/validation/manifest.jsonl")
    fuse("fusion")
    tune.main([validation, "--model", str(out / "fusion"), "--batch-size", "8"])
    fuse("correction", "data.task=correction", "data.fusion_modes=[full]")
    tune.main([validation, "--model", str(out / "correction"), "--corrector", "--batch-size", "8"])
    speech = read_recipe(RECIPE, common).model["speech"]
    if not (out / "whisper" / "config.json").exists():
        folders = ["--train", str(out / "data/train"), "--validation", str(out / "data/validation")]
        speech_model.main(["--init", speech, *folders, "--out", str(out / "whisper"), *whisper])
    rows = ["--model", str(out / "fusion"), "--speech", str(out / "whisper"), "--corrector", str(out / "correction")]
    evaluate.main([str(out / "data/test/manifest.jsonl"), *rows, "--batch-size", "8", "--out", str(out / "results")])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/check_real"))
    parser.add_argument("--minutes", type=float, default=30, help="of speech to train on")
    args = parser.parse_args(argv)

    started = time.monotonic()
    for split, share in SHARES.items():
        export_clips(split, 60 * args.minutes * share, args.out / "data" / split)
    steps = max(50, int(15 * args.minutes))
    run(args.out, [], ["--steps", str(steps), "--batch-size", "8", "--learning-rate", "1e-5", "--save-steps", "100"])
    gpu = torch.cuda.is_available()
    machine = {
        "minutes_of_speech": args.minutes,
        "hours": (time.monotonic() - started) / 3600,
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "peak_gpu_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    path = args.out / "results" / "machine.json"
    path.write_text(json.dumps(machine, indent=1) + "\n", encoding="utf-8")
    print(f"Please send back the folder {path.parent}")


if __name__ == "__main__":
    main()
