"""Stages a trained VoxKrikri for the Hub: the model's repository with its card and, if wanted, a Space that shows it.

    python -m tools.publish runs/fusion --repo you/voxkrikri-el --license apache-2.0 --results docs/results/results.json
    python -m tools.publish ... --space you/voxkrikri-demo --upload

Without --upload nothing leaves the machine: it writes --out, loads what it wrote in a clean process, and lists it. Look
at the files, mend the card, then call it again with --upload: what lies in --out is sent.
A card states what the backbones' licences ask for; a model built on Llama must carry its name and its notice.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, RepoCard

from training.plan import licence_of
from voxkrikri import VoxKrikriConfig


ROOT = Path(__file__).parent.parent
REQUIREMENTS = "torch>=2.6\ntransformers>=5.10.4,<6\nsoundfile>=0.12\nsoxr>=0.5\npeft>=0.18\n"
VERIFY = """
import sys
from transformers import AutoModel, AutoProcessor, pipeline
folder = sys.argv[1]
AutoModel.from_pretrained(folder, trust_remote_code=True)
AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert "voxkrikri" not in sys.modules
print(type(pipeline("automatic-speech-recognition", model=folder, trust_remote_code=True)).__name__)
"""
LLAMA_NOTICE = "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.\n"
CARD = """# {name}

{description}{duties}

```python
from transformers import pipeline

asr = pipeline("automatic-speech-recognition", model="{repo}", trust_remote_code=True)
print(asr("speech.flac", return_hypothesis=True))
```

A frozen Whisper listens; the states of its decoder are fused by cross-attention into {layers} of a decoder-only
LLM, which writes the text ([arXiv 2509.15667](https://arxiv.org/abs/2509.15667)).

| part | model | licence |
|---|---|---|
| Whisper | {speech} | {speech_licence} |
| LLM | {text} | {text_licence} |
{results}"""


def read_results(path: Path) -> tuple[list[EvalResult], str]:
    """Results of tools.evaluate, as the card's model-index and as its table."""
    content = json.loads(path.read_text(encoding="utf-8"))
    fused = [row for row in content["rows"] if row["row"].startswith(("4", "5"))]
    common = {"task_type": "automatic-speech-recognition", "dataset_type": "test", "dataset_name": content["data"]}
    index = [
        EvalResult(
            metric_type="wer", metric_name=f"WER, {row['row'][2:]}", metric_value=100 * row["wer"]["value"], **common
        )
        for row in fused
    ]
    return index, f"\n## Results ({content['clips']} clips)\n\n" + (path.parent / "results.md").read_text(
        encoding="utf-8"
    )


def stage_model(args: argparse.Namespace, folder: Path) -> None:
    """The model's repository in `folder`: what loading needs, the requirements, the card."""
    config = VoxKrikriConfig.from_pretrained(args.checkpoint)
    backbones = [config.speech_model_id, config.text_model_id]
    for source in backbones:
        if source is not None and config.light and Path(source).exists():
            raise ValueError(
                f"a light checkpoint needs its backbones on the Hub, and {source} is a folder: save it whole"
            )
    names = [source if source and not Path(source).exists() else None for source in backbones]
    licences = [licence_of(source) if source else "part of this repository" for source in names]
    on_llama = licences[1].startswith("llama") or "llama" in (names[1] or "").lower()
    if on_llama and not args.repo.split("/")[-1].lower().startswith("llama"):
        raise ValueError(f"the licence of {names[1]} asks for a name that begins with Llama: choose another --repo")
    wanted = [
        "config.json",
        "generation_config.json",
        "model*.safetensors*",
        "*_voxkrikri.py",
        "processor_config.json",
    ]
    wanted += [
        "preprocessor_config.json",
        "tokenizer*",
        "special_tokens_map.json",
        "chat_template*",
        "vocab*",
        "merges*",
    ]
    for path in sorted({path for pattern in wanted for path in args.checkpoint.glob(pattern)}):
        shutil.copyfile(path, folder / path.name)
    shutil.copytree(args.checkpoint / "speech_tokenizer", folder / "speech_tokenizer")
    (folder / "requirements.txt").write_text(REQUIREMENTS, encoding="utf-8")
    if on_llama:
        (folder / "NOTICE").write_text(LLAMA_NOTICE, encoding="utf-8")
    index, table = read_results(args.results) if args.results else (None, "")
    name = args.repo.split("/")[-1]
    data = ModelCardData(
        language=args.language,
        license=args.license,
        library_name="transformers",
        pipeline_tag="automatic-speech-recognition",
        tags=["speech-llm", "whisper", "fusion"],
        base_model=[source for source in names if source] or None,
        datasets=args.dataset or None,
        metrics=["wer", "cer"] if index else None,
        model_name=name if index else None,
        eval_results=index,
    )
    text = CARD.format(
        name=name,
        description=args.description,
        duties="\n\n**Built with Llama.**" if on_llama else "",
        repo=args.repo,
        layers=f"layer{'s' * (len(config.injection_layers) > 1)} {', '.join(map(str, config.injection_layers))}",
        speech=names[0] or "in this repository",
        text=names[1] or "in this repository",
        speech_licence=licences[0],
        text_licence=licences[1],
        results=table,
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")


def stage_space(args: argparse.Namespace, folder: Path) -> None:
    """The Space's repository in `folder`: the page, its requirements, the recordings."""
    shutil.copyfile(ROOT / "app.py", folder / "app.py")
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "requirements.txt").write_text(REQUIREMENTS, encoding="utf-8")
    front = f"title: {args.space.split('/')[-1]}\nsdk: gradio\nsdk_version: {args.gradio}\napp_file: app.py\n"
    front += f"models:\n- {args.repo}\nlicense: apache-2.0\n"
    page = f"Transcribes with [{args.repo}](https://huggingface.co/{args.repo}), named by the variable MODEL_ID.\n"
    (folder / "README.md").write_text(f"---\n{front}---\n\n{page}", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder that train.py wrote")
    parser.add_argument("--repo", required=True, help="of the model on the Hub, owner/name")
    parser.add_argument(
        "--license", required=True, help="of the weights, as the Hub writes it: apache-2.0, cc-by-sa-4.0 ..."
    )
    parser.add_argument("--space", help="of the page on the Hub, owner/name")
    parser.add_argument("--language", nargs="+", default=["el"])
    parser.add_argument("--dataset", nargs="*", help="Hub ids of what it was trained on")
    parser.add_argument("--description", default="Speech to text with a language model inside.", help="first sentence")
    parser.add_argument("--results", type=Path, help="results.json of tools.evaluate")
    parser.add_argument("--gradio", default="6.0.0", help="version that the Space runs")
    parser.add_argument("--out", type=Path, default=Path("runs/publish"))
    parser.add_argument(
        "--upload", action="store_true", help="send it to the Hub, with the token you are logged in with"
    )
    args = parser.parse_args(argv)

    ready = args.out.exists() and any(args.out.iterdir())
    if ready and not args.upload:
        parser.error(f"{args.out} is not empty: add --upload to send what it holds, or remove it")
    staged = [("model", args.repo, args.out / "model", stage_model)]
    if args.space:
        staged.append(("space", args.space, args.out / "space", stage_space))
    for _, _, folder, stage in [] if ready else staged:
        folder.mkdir(parents=True)
        stage(args, folder)
    subprocess.run([sys.executable, "-c", VERIFY, str((args.out / "model").resolve())], check=True, cwd=args.out)
    for kind, repo, folder, _ in staged:
        print(f"{kind} {repo}")
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            print(f"  {path.stat().st_size / 1e6:>10.2f} MB  {path.relative_to(folder)}")
    if not args.upload:
        print("Nothing was uploaded: look at the files, then add --upload")
        return
    api = HfApi()
    for kind, repo, folder, _ in staged:
        RepoCard.load(folder / "README.md").validate(repo_type=kind)
        api.create_repo(repo, repo_type=kind, space_sdk="gradio" if kind == "space" else None, exist_ok=True)
        api.upload_folder(repo_id=repo, repo_type=kind, folder_path=folder)
    if args.space:
        api.add_space_variable(args.space, "MODEL_ID", args.repo)


if __name__ == "__main__":
    main()
