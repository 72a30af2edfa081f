"""Trains the mini's two vocabularies from one byte-level BPE: Whisper's pieces are the LLM's, or its first merges.

    python -m recipes.mini.vocabularies --text lm_train.txt speech_train.txt --out data/vocabularies

Every LLM token is then a run of whole Whisper tokens; by default it is one. A small fusion learns to spell from few
pairs, and how pieces of one kind spell the other's costs it most of them (docs/LOG.md). Both tokenizers set a space before the first word, so that a word has one spelling wherever it stands.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, WhisperTokenizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES


# Whisper's own order: WhisperTokenizer counts from <|startoftranscript|> to find a language.
SPEECH_SPECIALS = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    *(f"<|{language}|>" for language in LANGUAGES),
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
)


def train_bpe(texts: list[Path], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges in the order learnt: 256 bytes, then one new piece a merge."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train([str(path) for path in texts], trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet))
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def first_pieces(vocabulary: dict[str, int], merges: list, size: int) -> tuple[dict[str, int], list]:
    """The BPE that training would have stopped at with `size` pieces."""
    pieces = {piece: index for piece, index in vocabulary.items() if index < size}
    return pieces, [merge for merge in merges if "".join(merge) in pieces][: size - 256]


def speech_tokenizer(vocabulary: dict[str, int], merges: list) -> WhisperTokenizer:
    vocabulary = vocabulary | {token: len(vocabulary) + index for index, token in enumerate(SPEECH_SPECIALS)}
    return WhisperTokenizer(
        vocab=vocabulary,
        merges=merges,
        add_prefix_space=True,
        language="el",
        task="transcribe",
        extra_special_tokens=list(SPEECH_SPECIALS[1:]),
    )


def text_tokenizer(vocabulary: dict[str, int], merges: list) -> PreTrainedTokenizerFast:
    specials = ("<s>", "</s>", "<pad>")
    vocabulary = vocabulary | {token: len(vocabulary) + index for index, token in enumerate(specials)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="UTF-8 text files")
    parser.add_argument("--out", type=Path, required=True, help="folder for speech/ and text/")
    parser.add_argument("--speech-size", type=int, default=1000, help="pieces of Whisper's vocabulary")
    parser.add_argument("--text-size", type=int, default=1000, help="pieces of the LLM's vocabulary")
    args = parser.parse_args(argv)
    vocabulary, merges = train_bpe(args.text, args.text_size)
    speech_tokenizer(*first_pieces(vocabulary, merges, args.speech_size)).save_pretrained(args.out / "speech")
    text_tokenizer(vocabulary, merges).save_pretrained(args.out / "text")


if __name__ == "__main__":
    main()
