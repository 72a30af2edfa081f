"""What training saves: states kept on the disk, batches filled by seconds, a loss in chunks.

    python -m benchmarks.training --out docs/results                # a small random model, on the CPU
    python -m benchmarks.training --full-size --out docs/results    # Whisper-large-v3 and an 8 B LLM, on a GPU

Weights are random: they cost the same. A random Whisper never stops, so that hypotheses have a length of their own.

* Clips a second: Whisper listening (encoder, greedy hypothesis, states), against the same states read from a shard.
* Batches of clips of 1 to 30 s: seconds computed per second of speech, and clips a second of a step of the LLM.
* The loss and its gradient from hidden states: the most memory at a time, and the largest difference of gradients.
"""

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import LlamaConfig, WhisperConfig, logging

from tools.parameters import paper_config
from training.trainer import BudgetBatches
from voxkrikri import VoxKrikriConfig, VoxKrikriForConditionalGeneration


STATES_A_SECOND, TOKENS_A_SECOND = 6.8, 6.5  # Greek speech: Whisper's tokens, and those of a Greek LLM
REPEATS = 5


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors made within it that were alive at a time."""

    def __enter__(self):
        self.alive = self.peak = 0
        self.known = weakref.WeakSet()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for value in tree_iter(output):
            if isinstance(value, torch.Tensor) and value.untyped_storage() not in self.known:
                storage, size = value.untyped_storage(), value.untyped_storage().nbytes()
                self.known.add(storage)
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self.free, size)
        return output

    def free(self, size: int) -> None:
        self.alive -= size


def small_config() -> VoxKrikriConfig:
    speech = WhisperConfig(
        vocab_size=1108,
        d_model=192,
        encoder_layers=4,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=768,
        decoder_ffn_dim=768,
        max_source_positions=500,
        pad_token_id=1000,
        bos_token_id=1000,
        eos_token_id=1000,
        decoder_start_token_id=1001,
    )
    text = LlamaConfig(
        vocab_size=8000, hidden_size=256, intermediate_size=624, num_hidden_layers=6, num_attention_heads=4
    )
    return VoxKrikriConfig(speech_config=speech, text_config=text, injection_layers=[4], fusion_heads=4)


def build(full_size: bool) -> VoxKrikriForConditionalGeneration:
    config = paper_config() if full_size else small_config()
    torch.manual_seed(0)
    with torch.device("cuda" if full_size else "cpu"):
        dtype = torch.bfloat16 if full_size else torch.float32
        model = VoxKrikriForConditionalGeneration._from_config(config, dtype=dtype)
    model.speech_model.generation_config.decoder_start_token_id = config.speech_config.decoder_start_token_id
    model.speech_model.generation_config.eos_token_id = config.speech_config.eos_token_id
    model.freeze_backbones()
    return model


def seconds_of(work: Callable[[], object]) -> list[float]:
    """Those of REPEATS runs after one to warm up."""
    times = []
    for _ in range(REPEATS + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return times[1:]


def measure_states(model: VoxKrikriForConditionalGeneration, clips: int = 16) -> dict:
    """Listening to a batch of clips, and reading what was heard."""
    config = model.config.speech_config
    window = 2 * config.max_source_positions / 100
    tokens = int(window * STATES_A_SECOND)
    features = torch.randn(clips, config.num_mel_bins, 2 * config.max_source_positions, device=model.device)

    def listen():
        return model.listen(features, min_new_tokens=tokens, max_new_tokens=tokens)

    heard = listen()
    if heard.audio_states.shape[1] != tokens + 1:
        raise RuntimeError(f"the hypotheses have {heard.audio_states.shape[1] - 1} tokens, not {tokens}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "states.safetensors"
        save_file({"audio_states": heard.audio_states.flatten(0, 1).bfloat16().cpu()}, path)
        size = path.stat().st_size

        def read():
            with safe_open(path, "pt") as shard:
                for index in range(clips):
                    states = shard.get_slice("audio_states")[index * (tokens + 1) : (index + 1) * (tokens + 1)]
                    states.to(model.device).float()

        live, kept = statistics.median(seconds_of(listen)), statistics.median(seconds_of(read))
    return {
        "listening, clips a second": clips / live,
        "states from a shard, clips a second": clips / kept,
        "times as many": live / kept,
        "MB of states an hour": size / (clips * window) * 3600 / 1e6,
    }


def measure_batches(
    model: VoxKrikriForConditionalGeneration, mostly_short: bool, clips: int = 256, budget: float = 240.0
) -> dict:
    """Batches of eight clips in any order, and batches filled up to `budget` seconds.

    Clips have even lengths of 1 to 30 s or, as in most corpora, half of them are shorter than 5.5 s (log-uniform).
    """
    rng = random.Random(0)
    seconds = [30 ** rng.random() if mostly_short else rng.uniform(1, 30) for _ in range(clips)]
    order = rng.sample(range(clips), clips)
    count = round(budget / 30)
    plain = [order[start : start + count] for start in range(0, clips, count)]
    budgeted = list(BudgetBatches(seconds, budget))
    states = model.config.speech_config.d_model

    def step(batch: list[int]) -> None:
        longest = max(seconds[index] for index in batch)
        rows = int(longest * TOKENS_A_SECOND) + 2
        ids = torch.randint(1, 1000, (len(batch), rows), device=model.device)
        audio = torch.randn(len(batch), int(longest * STATES_A_SECOND) + 1, states, device=model.device)
        lengths = torch.tensor([int(seconds[i] * STATES_A_SECOND) + 1 for i in batch], device=model.device)
        labels = ids.clone()
        for row, index in enumerate(batch):
            labels[row, int(seconds[index] * TOKENS_A_SECOND) + 2 :] = -100
        model(input_ids=ids, labels=labels, audio_states=audio, state_lengths=lengths).loss.backward()
        model.zero_grad()

    results = {}
    for name, batches in (("batches of eight", plain), ("batches of seconds", budgeted)):
        padded = sum(max(seconds[index] for index in batch) * len(batch) for batch in batches)
        started = time.perf_counter()
        for batch in batches:
            step(batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took = time.perf_counter() - started
        results[f"{name}: seconds computed per second of speech"] = padded / sum(seconds)
        results[f"{name}: clips a second"] = clips / took
    results["times as many"] = (
        results["batches of seconds: clips a second"] / results["batches of eight: clips a second"]
    )
    return results


def measure_loss(model: VoxKrikriForConditionalGeneration, rows: int = 2048, chunk_size: int = 64) -> dict:
    """The loss of `rows` labelled rows and its gradient in the hidden states, from all logits and in chunks."""
    text = model.config.text_config
    hidden = torch.randn(1, rows, text.hidden_size, device=model.device, dtype=model.dtype, requires_grad=True)
    labels = torch.randint(0, text.vocab_size, (1, rows), device=model.device)
    gradients, peaks = [], []

    def whole() -> torch.Tensor:
        return model.loss_function(model.get_output_embeddings()(hidden).float(), labels, vocab_size=text.vocab_size)

    def chunked() -> torch.Tensor:
        return model._chunked_loss(hidden, labels, chunk_size, None)

    for loss in (whole, chunked):
        hidden.grad = None
        if hidden.is_cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            loss().backward()
            peaks.append(torch.cuda.max_memory_allocated() - before)
        else:
            with PeakMemory() as memory:
                loss().backward()
            peaks.append(memory.peak)
        gradients.append(hidden.grad.float())
    return {
        "all logits, MB": peaks[0] / 1e6,
        f"chunks of {chunk_size} rows, MB": peaks[1] / 1e6,
        "times less": peaks[0] / peaks[1],
        "largest difference of gradients": (gradients[0] - gradients[1]).abs().max().item(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full-size", action="store_true", help="Whisper-large-v3 and an 8 B LLM; needs a GPU")
    parser.add_argument("--out", type=Path, required=True, help="folder for training.json and training.md")
    args = parser.parse_args(argv)
    if args.full_size and not torch.cuda.is_available():
        parser.error("--full-size needs a GPU with 40 GB or more")

    logging.set_verbosity_error()
    model = build(args.full_size)
    results = {
        "States kept on the disk": measure_states(model),
        "Batches filled by seconds, clips of all lengths alike": measure_batches(model, mostly_short=False),
        "Batches filled by seconds, mostly short clips": measure_batches(model, mostly_short=True),
        "A loss in chunks": measure_loss(model),
    }
    machine = torch.cuda.get_device_name() if args.full_size else f"{torch.get_num_threads()} CPU threads"
    facts = {"machine": f"{machine}, {platform.machine()}", "torch": torch.__version__, "full size": args.full_size}
    lines = ["| what | measured |", "|---|---|"]
    for part, rows in results.items():
        lines += [f"| **{part}** | |", *(f"| {name} | {value:,.3g} |" for name, value in rows.items())]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "training.json").write_text(json.dumps(facts | results, indent=1) + "\n", encoding="utf-8")
    (args.out / "training.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
