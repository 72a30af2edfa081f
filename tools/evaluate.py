"""The table of results: VoxKrikri beside its own Whisper and everything else it must be told apart from.

    python -m tools.evaluate data/test/manifest.jsonl --model runs/fusion --speech runs/speech-further \\
        --corrector runs/corrector --random runs/random --out docs/results

* Whisper listens to every clip once; all rows of one model decode from the same hypotheses and states.
* Word error rates are the headline of metrics/greek_wer (lower case, final sigma folded, no punctuation, accents kept)
  with 95 % bootstrap intervals; the raw rate stands beside it. Reductions are relative to row 1, paired.
* Writes results.md, results.json, results.png and every row's texts (texts.jsonl) into --out.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import pyplot
from tqdm import tqdm
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

from metrics.greek_wer.greek_wer import bootstrap, character_error_rate, paired_bootstrap, word_error_rate
from training.trainer import correction_prompts
from voxkrikri import VoxKrikriForConditionalGeneration, VoxKrikriProcessor
from voxkrikri.generation_voxkrikri import VoxKrikriAudio
from voxkrikri.processing_voxkrikri import load_audio


@dataclass
class Row:
    """One system: its name and what it wrote for every clip."""

    name: str
    texts: list[str]


def load(folder: str) -> tuple[VoxKrikriForConditionalGeneration, VoxKrikriProcessor]:
    model = VoxKrikriForConditionalGeneration.from_pretrained(folder).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model, VoxKrikriProcessor.from_pretrained(folder)


class Transcriber:
    """One model and what its Whisper heard in the clips."""

    def __init__(self, folder: str, clips: list, batch_size: int, language: str | None):
        self.model, self.processor = load(folder)
        self.batches = []
        for start in tqdm(range(0, len(clips), batch_size), desc=f"listening with {folder}", unit="batch"):
            features = self.processor(audio=clips[start : start + batch_size], sampling_rate=16_000).input_features
            self.batches.append(self.model.listen(features, language))

    def hypotheses(self) -> list[str]:
        return [self.processor.decode_hypothesis(ids) for batch in self.batches for ids in batch.hypothesis_ids]

    def transcribe(
        self, name: str, shift: int = 0, corrector: VoxKrikriForConditionalGeneration | None = None, **options
    ) -> list[str]:
        """The fused texts; with `shift`, from the states that another clip of the batch gave; a corrector's from none."""
        texts, model = [], corrector or self.model
        for batch in tqdm(self.batches, desc=name, unit="batch"):
            heard = VoxKrikriAudio(**{key: value.roll(shift, dims=0) for key, value in batch.items()})
            hypotheses = [self.processor.decode_hypothesis(ids) for ids in heard.hypothesis_ids]
            counts = torch.tensor(self.processor.hypothesis_token_counts(hypotheses), device=model.device)
            inputs = self.processor.draft(hypotheses)
            if corrector is not None:
                heard["audio_states"] = torch.zeros_like(heard.audio_states)
                inputs |= self.processor(prompt=correction_prompts(hypotheses)).to(model.device)
            ids = model.generate(**heard, **inputs, hypothesis_token_counts=counts, **options)
            texts += self.processor.batch_decode(ids)
        return texts


def whisper_texts(folder: str, clips: list, batch_size: int, language: str | None) -> list[str]:
    """What a Whisper by itself writes, greedily."""
    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    tokenizer = WhisperTokenizer.from_pretrained(folder)
    texts = []
    for start in tqdm(range(0, len(clips), batch_size), desc=folder, unit="batch"):
        batch = extractor(clips[start : start + batch_size], sampling_rate=16_000, return_tensors="pt")
        features = batch.input_features.to(model.device, model.dtype)
        ids = model.generate(features, language=language, task="transcribe", return_timestamps=False)
        texts += [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return texts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path, help=".jsonl with audio (relative to it) and text")
    parser.add_argument("--model", required=True, help="the VoxKrikri, rows 1, 4, 5 and 6")
    parser.add_argument("--speech", help="the Whisper trained further on the fusion's audio: row 2")
    parser.add_argument("--corrector", help="the LLM trained to correct the hypothesis without states: row 3")
    parser.add_argument("--random", help="the fusion trained with an LLM of random weights: row 7")
    parser.add_argument("--out", type=Path, required=True, help="folder for the table, the plot and the texts")
    parser.add_argument("--language", default="el", help="of the speech")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, help="only the first clips")
    args = parser.parse_args(argv)

    entries = [json.loads(line) for line in args.manifest.open(encoding="utf-8")][: args.limit]
    clips = [load_audio(args.manifest.parent / entry["audio"]) for entry in entries]
    references = [entry["text"] for entry in entries]

    fused = Transcriber(args.model, clips, args.batch_size, args.language)
    lookahead = fused.model.config.alignment_lookahead
    rows = [Row("1 Whisper", fused.hypotheses())]
    if args.speech:
        texts = whisper_texts(args.speech, clips, args.batch_size, args.language)
        rows.append(Row("2 Whisper, trained further", texts))
    if args.corrector:
        texts = fused.transcribe("correction", corrector=load(args.corrector)[0], fusion_mode="full")
        rows.append(Row("3 text-only correction", texts))
    rows += [
        Row("4 VoxKrikri, full", fused.transcribe("full", fusion_mode="full")),
        Row(f"5 VoxKrikri, causal, k = {lookahead}", fused.transcribe("causal", fusion_mode="causal")),
        Row("5 VoxKrikri, causal, k = 0", fused.transcribe("k = 0", fusion_mode="causal", alignment_lookahead=0)),
        Row("6 full, another clip's states", fused.transcribe("shuffled", shift=1, fusion_mode="full")),
    ]
    if args.random:
        untaught = Transcriber(args.random, clips, args.batch_size, args.language)
        rows.append(Row("7 full, LLM of random weights", untaught.transcribe("random", fusion_mode="full")))

    results = []
    for row in rows:
        reduction = paired_bootstrap(references, rows[0].texts, row.texts)
        results.append(
            {
                "row": row.name,
                "wer": bootstrap(references, row.texts)._asdict(),
                "raw_wer": word_error_rate(references, row.texts, raw=True),
                "cer": character_error_rate(references, row.texts),
                "reduction": reduction._asdict(),
            }
        )
    args.out.mkdir(parents=True, exist_ok=True)
    write_table(args.out, args.manifest.parent.name, results, len(references))
    with (args.out / "texts.jsonl").open("w", encoding="utf-8") as file:
        for index, entry in enumerate(entries):
            texts = {row.name: row.texts[index] for row in rows}
            file.write(
                json.dumps({"audio": entry["audio"], "reference": entry["text"]} | texts, ensure_ascii=False) + "\n"
            )


def write_table(out: Path, data: str, results: list[dict], clips: int) -> None:
    """results.json, results.md and results.png in the folder `out`; `data` names what was transcribed."""

    def percent(interval: dict) -> str:
        return f"{100 * interval['value']:.1f} ({100 * interval['low']:.1f} to {100 * interval['high']:.1f})"

    lines = ["| row | WER % (95 %) | fewer errors than row 1, % (95 %) | raw WER % | CER % |", "|---|---|---|---|---|"]
    for result in results:
        reduction = "" if result is results[0] else percent(result["reduction"])
        rates = f"{100 * result['raw_wer']:.1f} | {100 * result['cer']:.1f}"
        lines.append(f"| {result['row']} | {percent(result['wer'])} | {reduction} | {rates} |")
    table = "\n".join(lines) + "\n"
    content = {"data": data, "clips": clips, "rows": results}
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (out / "results.md").write_text(table, encoding="utf-8")
    print(table)

    names, values = [result["row"] for result in results], [100 * result["wer"]["value"] for result in results]
    errors = [
        [value - 100 * result["wer"]["low"] for value, result in zip(values, results, strict=True)],
        [100 * result["wer"]["high"] - value for value, result in zip(values, results, strict=True)],
    ]
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(names) + 1.2), layout="constrained")
    axes.barh(names, values, xerr=errors, color="#4878a8", ecolor="#333333", capsize=3)
    axes.axvline(values[0], color="#333333", linewidth=0.8, linestyle="--")
    axes.set_xlabel(f"word error rate, % ({clips} clips)")
    axes.invert_yaxis()
    figure.savefig(out / "results.png", dpi=120)


if __name__ == "__main__":
    main()
