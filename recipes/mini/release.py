"""Puts a trained mini at the repository's root, where the clone is also the checkpoint.

    python -m recipes.mini.release runs/fusion

* The weights are stored in bfloat16, in one shard a part; the configuration says float32, which is what loads.
* The folders of the backbones on the machine that trained them are forgotten: the checkpoint is whole without them.
* Every file is made in a folder beside the root first, then moved: the root never holds half a checkpoint.
"""

import argparse
import json
import tempfile
from pathlib import Path

from voxkrikri import VoxKrikriForConditionalGeneration, VoxKrikriProcessor


ROOT = Path(__file__).parent.parent.parent
LIMITS = {"speech": 10, "text": 10, "fusion": 3}  # MB a shard may have: every retrained one stays in git for good


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder that train.py wrote")
    parser.add_argument("--root", type=Path, default=ROOT)
    args = parser.parse_args(argv)

    model = VoxKrikriForConditionalGeneration.from_pretrained(args.checkpoint).bfloat16()
    for name in ("speech_model_id", "speech_model_revision", "text_model_id", "text_model_revision"):
        setattr(model.config, name, None)
    args.root.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.root, prefix=".release-") as staged:
        staged = Path(staged)
        model.save_pretrained(staged, light=False)
        VoxKrikriProcessor.from_pretrained(args.checkpoint).save_pretrained(staged)
        path = staged / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for part, limit in LIMITS.items():
            size = (staged / f"model-{part}.safetensors").stat().st_size / 1e6
            if size > limit:
                raise ValueError(
                    f"the {part} shard has {size:.1f} MB, more than the {limit} MB it may add to the history"
                )
        for path in sorted(file for file in staged.rglob("*") if file.is_file() and file.suffix != ".py"):
            target = args.root / path.relative_to(staged)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
            print(target)


if __name__ == "__main__":
    main()
