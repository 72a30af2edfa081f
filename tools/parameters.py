"""Counts the parameters of the paper's model, Whisper-large-v3 with Llama-Krikri-8B, without loading any weight.

    python -m tools.parameters

The paper reports 744 M trained of 9.8 B (7.53 %). The table stands beside that with the gap as it is: the paper does
not say what its new weights are, and fusion (Eq. 5) and LoRA alone explain a fifteenth of them.
"""

from collections import Counter

from transformers import LlamaConfig, WhisperConfig

from training.plan import build_on_meta, count_parameters
from voxkrikri import VoxKrikriConfig


PAPER_TRAINED, PAPER_TOTAL, PAPER_SHARE = 744e6, 9.8e9, 0.0753


def paper_config() -> VoxKrikriConfig:
    """Backbones and LoRA as the paper gives them; Eq. 5 as it is written: Q, K and V alone, without norm or prior."""
    return VoxKrikriConfig(
        speech_config=WhisperConfig(
            vocab_size=51_866,
            num_mel_bins=128,
            d_model=1280,
            encoder_layers=32,
            decoder_layers=32,
            encoder_attention_heads=20,
            decoder_attention_heads=20,
            encoder_ffn_dim=5120,
            decoder_ffn_dim=5120,
        ),
        text_config=LlamaConfig(
            vocab_size=149_248,
            hidden_size=4096,
            intermediate_size=14_336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
        injection_layers=[21],
        fusion_norm=False,
        lora={"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": "all-linear"},
    )


def table(counts: Counter) -> str:
    total = counts.total()
    rows = {
        "Whisper-large-v3": ("Whisper's encoder", "Whisper's decoder"),
        "Llama-Krikri-8B without its output head": ("LLM",),
        "its output head": ("the LLM's head",),
        "LoRA, r = 8, on every linear layer": ("LoRA",),
        "fusion: Q, K, V of Eq. 5": ("fusion",),
    }
    lines = [f"{label:<42}{sum(counts[part] for part in parts) / 1e6:>10,.1f} M" for label, parts in rows.items()]
    lines.append(f"{'total':<42}{total / 1e6:>10,.1f} M   paper {PAPER_TOTAL / 1e6:,.0f} M")
    for label, parts in (
        ("fusion, LoRA", ("fusion", "LoRA")),
        ("fusion, LoRA, head", ("fusion", "LoRA", "the LLM's head")),
    ):
        trained = sum(counts[part] for part in parts)
        lines.append(
            f"{f'trained: {label}':<42}{trained / 1e6:>10,.1f} M   {trained / total:.2%} of all; "
            f"paper {PAPER_TRAINED / 1e6:,.0f} M, {PAPER_SHARE:.2%}; "
            f"unexplained {(PAPER_TRAINED - trained) / 1e6:,.1f} M"
        )
    return "\n".join(lines)


def main() -> None:
    total, _ = count_parameters(build_on_meta(paper_config()))
    print(table(total))


if __name__ == "__main__":
    main()
