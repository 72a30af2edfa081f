"""What each way of loading takes: memory by part, and seconds a clip for Whisper and for the LLM.

    python -m benchmarks.memory --out docs/results                # this repository's mini, on the CPU
    python -m benchmarks.memory --full-size --out docs/results    # Whisper-large-v3 and an 8 B LLM, on a GPU

At full size the weights are random: saved once (20 GB of disk), then loaded in every setting as a user loads them.
Features are random too, and both texts have a length of their own, that of a window full of speech. Greedy decoding of
one clip without a draft; the median of five runs after one to warm up, with the fastest and the slowest.

The peak is of weights and all else while a clip is transcribed: on a GPU what torch allocated there, on the CPU the
weights and the tensors made. The rows of a GPU have been written without one at hand, and not measured yet.
"""

import argparse
import gc
import json
import platform
import statistics
import tempfile
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, logging

from benchmarks.training import STATES_A_SECOND, TOKENS_A_SECOND, PeakMemory, build, seconds_of
from voxkrikri import VoxKrikriForConditionalGeneration


ON_CPU = {"float32": {"dtype": torch.float32}, "bfloat16": {"dtype": torch.bfloat16}}
FOUR_BITS = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
ON_GPU = {
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16, LLM in 4 bits": {"dtype": torch.bfloat16, "quantization_config": FOUR_BITS},
    "bfloat16, LLM in 4 bits, Whisper offloaded": {"dtype": torch.bfloat16, "quantization_config": FOUR_BITS},
}


def weights_by_part(model: VoxKrikriForConditionalGeneration) -> dict[str, float]:
    """GB of each part, the scales of quantised weights included; tied ones once."""
    parts = {"speech_model": "Whisper, GB", "language_model": "LLM, GB"}
    sizes, seen = dict.fromkeys([*parts.values(), "fusion, GB"], 0.0), set()
    for name, value in model.state_dict().items():
        if value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            sizes[parts.get(name.split(".")[0], "fusion, GB")] += value.nbytes / 1e9
    return sizes


def measure(folder: str, device: str, offloaded: bool, **options) -> dict[str, float | list[float]]:
    """One row of the table."""
    model = VoxKrikriForConditionalGeneration.from_pretrained(folder, device_map=device, **options)
    if offloaded:
        model.offload_speech()
    config = model.config.speech_config
    window = 2 * config.max_source_positions / 100
    features = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions)
    states, tokens = int(window * STATES_A_SECOND), int(window * TOKENS_A_SECOND)

    def listen():
        return model.listen(features, min_new_tokens=states, max_new_tokens=states)

    def write():
        return model.generate(**heard, min_new_tokens=tokens, max_new_tokens=tokens)

    sizes = weights_by_part(model)
    gc.collect()  # the model before
    if device == "cpu":
        with PeakMemory() as memory:
            heard = listen()
            write()
        peak = sum(sizes.values()) + memory.peak / 1e9
    else:
        torch.cuda.reset_peak_memory_stats()
        heard = listen()
        write()
        peak = torch.cuda.max_memory_allocated() / 1e9
    return sizes | {
        "peak, GB": peak,
        "Whisper, s a clip": seconds_of(listen),
        "LLM, s a clip": seconds_of(write),
    }


def cell(value: float | list[float]) -> str:
    if isinstance(value, list):
        return f"{statistics.median(value):.3g} ({min(value):.3g} to {max(value):.3g})"
    return f"{value:.3g}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent.parent), help="default: the mini")
    parser.add_argument("--full-size", action="store_true", help="random weights of the paper's size; needs a GPU")
    parser.add_argument("--out", type=Path, required=True, help="folder for memory.json and memory.md")
    args = parser.parse_args(argv)
    if args.full_size and not torch.cuda.is_available():
        parser.error("--full-size needs a GPU with 40 GB or more")

    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        if args.full_size:
            model = build(full_size=True)
            model.config.speech_generation_config = model.speech_model.generation_config.to_dict()
            model.save_pretrained(folder)
            del model
        source, device = (folder, "cuda:0") if args.full_size else (args.model, "cpu")
        rows = {
            setting: measure(source, device, "offloaded" in setting, **options)
            for setting, options in (ON_GPU if args.full_size else ON_CPU).items()
        }
    machine = torch.cuda.get_device_name() if args.full_size else f"{torch.get_num_threads()} CPU threads"
    facts = {"machine": f"{machine}, {platform.machine()}", "torch": torch.__version__, "full size": args.full_size}
    columns = list(next(iter(rows.values())))
    lines = [f"| setting | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {setting} | {' | '.join(cell(row[name]) for name in columns)} |" for setting, row in rows.items()]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "memory.json").write_text(json.dumps(facts | {"settings": rows}, indent=1) + "\n", encoding="utf-8")
    (args.out / "memory.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
