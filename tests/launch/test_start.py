"""How soon a training starts: its process imports nothing that takes long and that training does not need."""

import subprocess
import sys

SLOW = ("sklearn", "scipy", "pandas", "matplotlib", "torchvision", "torch_fidelity", "timm", "fvcore", "mamba_ssm")
CODE = f"""
import sys
from lamabench.launch.cli import main
code = main(sys.argv[1:])
print("imported:", *sorted(set(sys.modules) & {set(SLOW)}), file=sys.stderr)
sys.exit(code)
"""


def test_a_training_imports_little(tmp_path):
    words = ["train", "model=dit_nano", "model.depth=1", "data=digits", "train.steps=1", "train.batch_size=8"]
    command = [sys.executable, "-c", CODE, *words, "run.device=cpu"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stderr.splitlines()[-1] == "imported:"
