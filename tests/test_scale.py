"""Two processes train as one: whole models side by side (DDP), and one model in pieces (FSDP2)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import back_to_checkpoint, trained_weights

import train


ROOT = Path(__file__).parent.parent
PLAIN = [
    "data.fusion_modes=[full]",
    "data.input_noise=0",
    "model.lora.lora_dropout=0",
    "training.logging_steps=1",
    "training.dataloader_drop_last=true",
]

# accelerate shards on accelerators alone: on a CPU it would silently be DDP. So it is told that these are GPUs.
SHARDED = """
import sys
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
import train

plain = PartialState.__init__

def on_gpus(self, *args, **kwargs):
    plain(self, *args, **kwargs)
    if self.distributed_type is DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU

class Watched(train.FusionTrainer):
    def save_model(self, *args, **kwargs):
        for name, value in self.model.named_parameters():
            whole = name.startswith(("speech_model.", "language_model.lm_head."))
            assert isinstance(value, DTensor) != whole, name
        super().save_model(*args, **kwargs)

PartialState.__init__ = on_gpus
train.FusionTrainer = Watched
train.main(sys.argv[1:])
"""


def run(workshop, output: Path, command: list[str], clips: int) -> list[float]:
    """The losses of four steps of the workshop's recipe."""
    overrides = [
        *PLAIN,
        f"training.per_device_train_batch_size={clips}",
        f"training.output_dir={output}",
        f"prepared={output}-states",
    ]
    subprocess.run(
        [sys.executable, *command, str(workshop / "recipe.yaml"), *overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=True,
    )
    state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def one(workshop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return run(workshop, folder, ["train.py"], 4), trained_weights(folder)


def test_two_processes_train_as_one(workshop, one, tmp_path):
    """The same clips a step, halved: the same losses and weights, and a checkpoint that one process reads."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    losses = run(workshop, tmp_path / "two", launch, 2)
    assert len(losses) == 4 and losses == pytest.approx(one[0], abs=1e-5)
    weights = trained_weights(tmp_path / "two")
    for name, value in one[1].items():
        assert torch.allclose(value, weights[name], atol=1e-5), name
    model, _ = train.load_model({"init_from": str(tmp_path / "two")})
    assert torch.equal(model.fusion[0].v_proj.weight, weights["fusion.0.v_proj.weight"])


def test_a_model_in_pieces_trains_as_a_whole_one_and_is_resumed_exactly(workshop, one, tmp_path):
    """recipes/launch/fsdp2.yaml, on two CPU processes: DTensors, the same losses and weights; the saved model is whole."""
    settings = yaml.safe_load((ROOT / "recipes/launch/fsdp2.yaml").read_text())
    settings |= {"use_cpu": True, "num_processes": 2, "mixed_precision": "no"}
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "sharded.py").write_text(SHARDED)
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "launch.yaml")]
    launch, output = [*launcher, str(tmp_path / "sharded.py")], tmp_path / "pieces"
    losses = run(workshop, output, launch, 2)
    assert len(losses) == 4 and losses == pytest.approx(one[0], abs=1e-4)
    weights = trained_weights(output)
    for name, value in one[1].items():
        assert torch.allclose(value, weights[name], atol=1e-4), name

    back_to_checkpoint(output, 2)
    overrides = [*PLAIN, "training.per_device_train_batch_size=2", f"training.output_dir={output}"]
    with pytest.raises(ValueError, match="saved under FSDP"):
        train.main([str(workshop / "recipe.yaml"), *overrides, f"prepared={output}-states"])
    run(workshop, output, launch, 2)
    for name, value in trained_weights(output).items():
        assert torch.equal(value, weights[name]), name
