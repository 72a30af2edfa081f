"""What drafts and compiled passes save: passes of the LLM and seconds, and what all of it costs beside Whisper alone.

    python -m benchmarks.decoding data/test/manifest.jsonl --clips 32 --out docs/results   # the mini
    python -m benchmarks.decoding --full-size --compile --out docs/results/full_size       # random weights, on a GPU
    python -m benchmarks.decoding --out results                     # the same with a small random model, on the CPU

* Drafts are the tokens of plain greedy decoding with a share of their words replaced, left out or doubled up, the
  hypothesis itself, and another clip's text. In float32 every drafted text must equal the plain one; in bfloat16 the
  largest margin between the two likeliest tokens is told at which one did not.
* Stages: Whisper's hypothesis as transformers decodes it, and compiled; with its states; with the fused text, drafted
  and not; and with a correction by the same LLM, which reads the hypothesis and writes as many tokens (transformers' own
  greedy decoding).
* Random weights cost the same. Such a Whisper never stops, and the LLM is made to write a chain of tokens from a first
  one that is the clip's own: hypotheses and texts have the lengths of ten seconds of Greek, 25 words, each of one or two
  tokens, and the hypothesis stands for a draft with as many words wrong as on the mini's test set.
* Seconds are medians of `--repeats` after one run to warm up, all ways in turn on the same clips, with the spread of
  their ratios. With --compile nothing may be compiled after the warm-up.
* Writes decoding.md, decoding.json and decoding.png into --out.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib import pyplot
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import CompileConfig

from benchmarks.training import STATES_A_SECOND, build
from tools.evaluate import load
from voxkrikri.processing_voxkrikri import load_audio


SHARES = (0.0, 0.05, 0.1, 0.2, 0.4)
SEEN_SHARE = 0.16  # words of the hypothesis that the mini writes otherwise (docs/results/texts.jsonl)
SECONDS = 10.0  # of a random model's clip
WORDS = 5 * [2, 1, 2, 1, 2]  # tokens of each word of its text
ROOT = Path(__file__).parent.parent


def edit_words(words: list[list[int]], share: float, others: list[list[int]], rng: random.Random) -> list[list[int]]:
    """`words` with about a share of them replaced by others, left out, or followed by another."""
    edited = []
    for word in words:
        kind = rng.choice(["replace", "leave out", "insert"]) if rng.random() < share else "keep"
        other = rng.choice(others)
        edited += {"keep": [word], "replace": [other], "leave out": [], "insert": [word, other]}[kind]
    return edited


def draft_of(texts: list[list[list[int]]], end: int) -> dict[str, torch.Tensor]:
    """The draft of a batch of texts, each a list of words, each a list of tokens."""
    ids = [torch.tensor([token for word in words for token in word] + [end]) for words in texts]
    starts = [
        torch.tensor([place == 0 for word in words for place in range(len(word))] + [True], dtype=torch.bool)
        for words in texts
    ]
    return {
        "draft_ids": pad_sequence(ids, batch_first=True, padding_value=-1),
        "draft_word_starts": pad_sequence(starts, batch_first=True),
    }


@torch.no_grad()
def chain_tokens(model) -> None:
    """Makes an LLM of random weights, which would repeat itself, follow every token with another one.

    Embeddings that outweigh what the layers add, and the head's rows are those embeddings in another order.
    """
    generator = torch.Generator().manual_seed(0)
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embeddings.copy_(100 * torch.randn(embeddings.shape, generator=generator))
    head[torch.randperm(len(head), generator=generator).to(head.device)] = embeddings


class Bench:
    """One model, clips in batches, what its Whisper heard, and the texts of plain greedy decoding.

    Args:
        processor: None for random weights, whose texts have lengths of their own.
        features: a batch each, `(batch, mel bins, frames)`.
    """

    def __init__(self, model, processor, features: list[torch.Tensor], mode: str, language: str | None, caching: dict):
        self.model, self.processor, self.features, self.language = model, processor, features, language
        self.mode, self.caching, self.batches, self.hypotheses = mode, caching, [], []
        self.hypothesis_options, self.text_options = {}, {}
        if processor is None:
            states = int(SECONDS * STATES_A_SECOND)
            self.hypothesis_options = {"min_new_tokens": states, "max_new_tokens": states}
            self.text_options = {"max_new_tokens": sum(WORDS)}
        for batch in tqdm(features, desc="listening", unit="batch"):
            heard = model.listen(batch, language, **self.hypothesis_options)
            if processor is None:
                hypotheses, counts = None, [self.text_options["max_new_tokens"]] * len(batch)
            else:
                hypotheses = [processor.decode_hypothesis(ids) for ids in heard.hypothesis_ids]
                counts = processor.hypothesis_token_counts(hypotheses)
            starts = torch.full((len(batch), 1), model.start_token_id)
            if processor is None:
                starts = torch.randint(model.config.text_config.vocab_size, starts.shape)
            more = {"hypothesis_token_counts": torch.tensor(counts), "input_ids": starts}
            self.batches.append({**heard} | {name: value.to(model.device) for name, value in more.items()})
            self.hypotheses.append(hypotheses)
        self.plain = [self.decode(batch) for batch in self.batches]
        self.words = [[self.split_words(ids) for ids in output.sequences.tolist()] for output in self.plain]

    def split_words(self, ids: list[int]) -> list[list[int]]:
        """The tokens of a text, word by word, without its end."""
        if self.processor is None:
            return [word.tolist() for word in torch.tensor(ids).split(WORDS)]
        words = []
        for token in ids:
            if token in self.model.end_token_ids:
                break
            if not words or self.model.text_bytes[token][0] == ord(" "):
                words.append([])
            words[-1].append(token)
        return words

    def drafts(self, batch_size: int) -> dict[str, list[dict]]:
        """Drafts of every kind, a batch each."""
        flat, end, rng = (
            [words for batch in self.words for words in batch],
            self.model.end_token_ids[0],
            random.Random(0),
        )
        others, shifted = [word for words in flat for word in words], flat[1:] + flat[:1]

        def edited(share: float) -> list[dict]:
            return [draft_of([edit_words(words, share, others, rng) for words in batch], end) for batch in self.words]

        drafts = {f"{share:.0%} of the words wrong": edited(share) for share in SHARES}
        if self.processor is None:
            drafts["the hypothesis"] = edited(SEEN_SHARE)
        else:
            drafts["the hypothesis"] = [self.processor.draft(texts) for texts in self.hypotheses]
        starts = range(0, len(flat), batch_size)
        drafts["another clip's text"] = [draft_of(shifted[start : start + batch_size], end) for start in starts]
        return drafts

    def decode(self, batch: dict, draft: dict | None = None, **caching):
        options = {"fusion_mode": self.mode, "return_dict_in_generate": True} | self.text_options | caching
        return self.model.generate(**batch, **(draft or {}), **options)

    def widest_divergence(self, drafted: list) -> float | None:
        """The largest margin of the two likeliest tokens at which a clip's drafted text leaves the plain one."""
        margins = []
        for batch, plain, output in zip(self.batches, self.plain, drafted, strict=True):
            ids = torch.cat([batch["input_ids"], plain.sequences], dim=1)
            differs = (plain.sequences != output.sequences[:, : plain.sequences.shape[1]]).int()
            for clip in differs.any(-1).nonzero().flatten().tolist():
                own = {name: value[clip : clip + 1] for name, value in batch.items() if name != "input_ids"}
                text = ids[clip : clip + 1, : int(differs[clip].argmax()) + 1]
                positions = torch.arange(text.shape[1], device=text.device)[None]
                with torch.no_grad():
                    logits = self.model(
                        input_ids=text, text_positions=positions, fusion_mode=self.mode, logits_to_keep=1, **own
                    ).logits
                first, second = logits[0, -1].float().topk(2).values.tolist()
                margins.append(first - second)
        return max(margins, default=None)

    def compare(self, name: str, drafts: list[dict], repeats: int) -> dict:
        """Passes and seconds with these drafts beside plain decoding's.

        Raises:
            ValueError: if a draft changed a token in float32.
        """
        pairs = list(zip(self.batches, drafts, strict=True))
        outputs = [self.decode(*pair, **self.caching) for pair in pairs]
        margin = self.widest_divergence(outputs)
        if margin is not None and self.model.dtype == torch.float32:
            raise ValueError(f"the draft {name!r} changed the text: decoding is not exact")
        ways = {
            "plain": [lambda batch=batch: self.decode(batch, **self.caching) for batch in self.batches],
            "drafted": [lambda pair=pair: self.decode(*pair, **self.caching) for pair in pairs],
        }
        seconds = time_in_turn(ways, repeats)
        return {
            "draft": name,
            "passes": statistics.mean(output.passes for output in outputs),
            "plain_passes": statistics.mean(output.passes for output in self.plain),
            "drafted": sum(int(output.drafted.sum()) for output in outputs),
            "accepted": sum(int(output.accepted.sum()) for output in outputs),
            "widest_divergence": margin,
        } | ratio(seconds["plain"], seconds["drafted"])

    def stages(self, drafts: list[dict], repeats: int) -> list[dict]:
        """Seconds of Whisper alone, of the whole path, and of a correction by the same LLM."""
        model, language = self.model, self.language

        def hypothesis(batch: int, **caching) -> torch.Tensor:
            encoder_outputs = model.speech_model.model.encoder(self.features[batch].to(model.device, model.dtype))
            prefix_ids = model.speech_prefix(encoder_outputs, language)
            return model.generate_hypothesis(encoder_outputs, prefix_ids, **self.hypothesis_options, **caching)

        def transcribe(batch: int, draft: bool) -> torch.Tensor:
            heard = model.listen(self.features[batch], language, **self.hypothesis_options, **self.caching)
            whole = self.batches[batch] | {**heard}
            return self.decode(whole, drafts[batch] if draft else None, **self.caching).sequences

        def correct(batch: int) -> torch.Tensor:
            hypothesis(batch, **self.caching)
            texts = [ids[ids >= 0] for ids in drafts[batch]["draft_ids"]]  # the hypotheses in the LLM's tokens
            ids = pad_sequence(texts, batch_first=True, padding_value=-1, padding_side="left").to(model.device)
            prompt = torch.cat([ids, self.batches[batch]["input_ids"]], dim=-1)
            tokens = self.plain[batch].sequences.shape[1]
            return model.language_model.generate(
                prompt.clamp(min=0),
                attention_mask=(prompt >= 0).long(),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=model.end_token_ids[0],
                **self.caching,
            )

        def of_all(way: Callable) -> list[Callable]:
            return [lambda batch=batch: way(batch) for batch in range(len(self.features))]

        ways = {
            "Whisper alone, as transformers decodes it": of_all(hypothesis),
            "Whisper alone": of_all(lambda batch: hypothesis(batch, **self.caching)),
            "Whisper, its states": of_all(
                lambda batch: model.listen(self.features[batch], language, **self.hypothesis_options, **self.caching)
            ),
            "Whisper, its states, plain greedy": of_all(lambda batch: transcribe(batch, False)),
            "Whisper, its states, the hypothesis as draft": of_all(lambda batch: transcribe(batch, True)),
            "Whisper, a correction by the same LLM": of_all(correct),
        }
        seconds = time_in_turn(ways, repeats)
        alone = seconds["Whisper alone"]
        return [{"stage": name} | ratio(alone, times) for name, times in seconds.items()]

    def check_whisper(self) -> dict:
        """How near the states of compiled steps are to transformers' own: hypotheses alike, least cosine, difference."""
        alike, cosine, difference = True, 1.0, 0.0
        for features, plain in zip(self.features, self.batches, strict=True):
            heard = self.model.listen(features, self.language, **self.hypothesis_options, **self.caching)
            if not torch.equal(heard.hypothesis_ids, plain["hypothesis_ids"]):
                alike = False
                continue
            real = torch.arange(heard.audio_states.shape[1], device=self.model.device) < heard.state_lengths[:, None]
            first, second = heard.audio_states[real].float(), plain["audio_states"][real].float()
            cosine = min(cosine, float(torch.cosine_similarity(first, second, dim=-1).min()))
            difference = max(difference, float((first - second).abs().max()))
        return {"same_hypotheses": alike, "least_cosine": cosine, "largest_difference": difference}


def time_in_turn(ways: dict[str, list[Callable]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every way over all batches, `repeats` times after one run to warm up; batch by batch in turn.

    Raises:
        RuntimeError: if something was compiled after the warm-up.
    """

    def synchronise() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    graphs, seconds = None, {name: [0.0] * (repeats + 1) for name in ways}
    for repeat in range(repeats + 1):
        for batch in zip(*ways.values(), strict=True):
            for name, work in zip(ways, batch, strict=True):
                synchronise()
                started = time.perf_counter()
                work()
                synchronise()
                seconds[name][repeat] += time.perf_counter() - started
        if repeat == 0:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    if compiled:
        raise RuntimeError(f"{compiled} graphs were compiled after the warm-up: the seconds are not those of decoding")
    return {name: times[1:] for name, times in seconds.items()}


def ratio(reference: list[float], times: list[float]) -> dict:
    """How many times as fast as the reference, with the spread over the repeats."""
    ratios = [first / second for first, second in zip(reference, times, strict=True)]
    return {
        "seconds": statistics.median(times),
        "times_as_fast": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path, nargs="?", help="clips; random weights and noise if left out")
    parser.add_argument("--model", default=str(ROOT), help="default: the mini")
    parser.add_argument("--full-size", action="store_true", help="random Whisper-large-v3 and 8 B LLM, on a GPU")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--fusion-mode", default="full")
    parser.add_argument("--language", default="el")
    parser.add_argument("--compile", action="store_true", help="static caches and compiled passes, on a CPU too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    if args.manifest is None:
        model, processor, language = build(args.full_size), None, None
        model.merge_lora()
        chain_tokens(model)
        config, generator = model.config.speech_config, torch.Generator().manual_seed(0)
        shape = config.num_mel_bins, 2 * config.max_source_positions
        clips = list(torch.randn(args.clips, *shape, generator=generator))
        seconds = args.clips * SECONDS
    else:
        (model, processor), language = load(args.model), args.language
        entries = [json.loads(line) for line in args.manifest.open(encoding="utf-8")][: args.clips]
        samples = [load_audio(args.manifest.parent / entry["audio"]) for entry in entries]
        clips = [processor(audio=[clip], sampling_rate=16_000).input_features[0] for clip in samples]
        seconds = sum(map(len, samples)) / 16_000
    caching = {}
    if args.compile:
        caching = {"cache_implementation": "static"}
        if model.device.type == "cpu":
            caching["compile_config"] = CompileConfig(fullgraph=True)
            caching["compile_config"]._compile_all_devices = True
    rows, stages, whisper = [], [], []
    for size in args.batch_sizes:
        features = [torch.stack(clips[start : start + size]) for start in range(0, len(clips) - size + 1, size)]
        bench = Bench(model, processor, features, args.fusion_mode, language, caching)
        drafts = bench.drafts(size)
        for name, batches in tqdm(drafts.items(), desc=f"batches of {size}"):
            rows.append({"batch_size": size} | bench.compare(name, batches, args.repeats))
        whisper.append({"batch_size": size} | bench.check_whisper())
        listened = seconds * len(features) * size / len(clips)
        for stage in bench.stages(drafts["the hypothesis"], args.repeats):
            stages.append({"batch_size": size} | stage | {"times_real_time": listened / stage["seconds"]})

    weights = "the mini" if Path(args.model).resolve() == ROOT.resolve() else Path(args.model).resolve().name
    weights = "random" if processor is None else weights
    machine = torch.cuda.get_device_name() if model.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    facts = {
        "machine": f"{machine}, {platform.machine()}",
        "torch": torch.__version__,
        "weights": weights,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype),
        "compiled": args.compile,
        "clips": len(clips),
        "seconds_a_clip": seconds / len(clips),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    results = facts | {"rows": rows, "stages": stages, "whisper": whisper}
    (args.out / "decoding.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page = markdown(facts, rows, stages, whisper)
    (args.out / "decoding.md").write_text(page, encoding="utf-8")
    print(page)
    plot(rows, stages, args.batch_sizes, args.out / "decoding.png")


def markdown(facts: dict, rows: list[dict], stages: list[dict], whisper: list[dict]) -> str:
    def spread(row: dict) -> str:
        return f"{row['times_as_fast']:.2f} ({row['spread'][0]:.2f} to {row['spread'][1]:.2f})"

    lines = [
        f"{facts['parameters'] / 1e6:,.0f} M parameters ({facts['weights']}, {facts['dtype'].removeprefix('torch.')}), "
        f"{facts['machine']}, {'' if facts['compiled'] else 'not '}compiled; {facts['clips']} clips of "
        f"{facts['seconds_a_clip']:.1f} s.",
        "",
        "| batch | draft | passes of the LLM | without | times as fast (spread) |",
        "|---|---|---|---|---|",
        *(
            f"| {row['batch_size']} | {row['draft']} | {row['passes']:.1f} | {row['plain_passes']:.1f} | {spread(row)} |"
            for row in rows
        ),
        "",
        "| batch | stages | times real time | times as fast as Whisper alone (spread) |",
        "|---|---|---|---|",
        *(
            f"| {stage['batch_size']} | {stage['stage']} | {stage['times_real_time']:.1f} | {spread(stage)} |"
            for stage in stages
        ),
        "",
    ]
    for row in whisper:
        same = "the same hypotheses" if row["same_hypotheses"] else "OTHER hypotheses"
        lines.append(
            f"Batches of {row['batch_size']}: Whisper so decoded and as transformers does it: {same}, states with a cosine "
            f"of at least {row['least_cosine']:.6f}, at most {row['largest_difference']:.1e} apart."
        )
    margins = [row["widest_divergence"] for row in rows if row["widest_divergence"] is not None]
    lines.append(
        f"Drafted texts that left the plain one did so at a margin of at most {max(margins):.4f} between two tokens."
        if margins
        else "Every drafted text is the plain one, token by token."
    )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], stages: list[dict], batch_sizes: list[int], path: Path) -> None:
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 3.8), layout="constrained", width_ratios=[1, 1, 1.3])
    for size in batch_sizes:
        own = [row for row in rows if row["batch_size"] == size][: len(SHARES)]
        shares = [100 * share for share in SHARES]
        axes[0].plot(shares, [row["passes"] for row in own], marker="o")
        axes[1].plot(shares, [row["times_as_fast"] for row in own], marker="o", label=f"batch {size}")
    axes[0].set_ylabel("passes of the LLM")
    axes[1].set_ylabel("times as fast as plain greedy")
    axes[1].axhline(1, color="#333333", linewidth=0.8)
    axes[1].legend()
    for axis in axes[:2]:
        axis.set_xlabel("words of the draft that are wrong, %")
        axis.set_ylim(bottom=0)
    names = list(dict.fromkeys(stage["stage"] for stage in stages))[::-1]
    for index, size in enumerate(batch_sizes):
        speeds = {s["stage"]: s["times_real_time"] for s in stages if s["batch_size"] == size}
        places = [place + 0.4 - 0.8 * (index + 0.5) / len(batch_sizes) for place in range(len(names))]
        axes[2].barh(places, [speeds[name] for name in names], height=0.8 / len(batch_sizes))
    axes[2].set_yticks(range(len(names)), names)
    axes[2].set_xlabel("seconds of speech a second")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
