"""`lamabench encode`: what it prints, and several processes that write one cache."""

import json
import signal

import pytest
from lamabench.launch.cli import main

from ..autoencoders import save_kl

WORDS = ["data=digits", "data.channels=3", "run.device=cpu"]  # 1,797 images in four shards


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kl")
    save_kl(folder)
    return folder


@pytest.fixture(scope="module")
def alone(kl, tmp_path_factory):
    """The cache of one process."""
    target = tmp_path_factory.mktemp("alone") / "cache"
    assert main(["encode", *WORDS, f"encoder={kl}", "--to", str(target)]) == 0
    return target


def command(kl, *words):
    return ["encode", *WORDS, f"encoder={kl}", "--to", "cache", *words]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_several_processes_write_the_bytes_of_one(start, kl, alone, tmp_path):
    run = start(tmp_path, command=command(kl), count=2)
    assert run.codes == [0, 0], run.text("err")
    assert content(tmp_path / "cache") == content(alone)
    assert "encode 1797/1797" in run.text("err") and run.text("err", 1) == run.text("out", 1) == ""


def test_commands_beside_each_other_share_the_work(start, kl, alone, tmp_path):
    """And one makes up for another that is killed."""
    runs = [start(tmp_path / name, command=[*command(kl)[:-1], "../cache"]) for name in ("one", "two")]
    signs = [tmp_path / "cache" / name for name in (".encoding/claims.jsonl", "index.json")]
    runs[0].until(lambda: any(sign.exists() for sign in signs))
    runs[1].kill(signal.SIGKILL, 0)
    assert runs[1].codes in ([-signal.SIGKILL], [0])  # it may have been the faster one
    assert runs[0].codes == [0], runs[0].text("err")
    assert content(tmp_path / "cache") == content(alone)


def test_what_it_prints(kl, alone, capsys):
    words = ["encode", *WORDS, f"encoder={kl}", "--to", str(alone)]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{alone}: latents 4 x 4 x 4 of 1,797 images, float32, 4 shards"
    assert lines[1].startswith("encoder: AutoencoderKL ") and lines[1].endswith(f"scale 0.18215, shift 0, {kl}")
    assert lines[-1] == f"next: lamabench train model=dit_s_2 encoder={alone}"
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["images"], facts["shards"], facts["encoder"]["side"]) == (1797, 4, 4)


def test_a_test_split_is_not_proposed_for_training(kl, tmp_path, capsys):
    target = tmp_path / "cache" / "test"
    assert main(["encode", *WORDS, "data.split=test", f"encoder={kl}", "--to", str(target)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{target}: latents 4 x 4 x 4 of 225 images, float32, 1 shard"
    assert not any(line.startswith("next:") for line in lines)


def test_a_failure_in_another_process_is_one_line(start, kl, tmp_path):
    """Both processes have the same error in the same place, which the first one says."""
    run = start(tmp_path, command=command(kl, "data.channels=1"), count=2)
    assert run.codes == [2, 2] and not (tmp_path / "cache").exists()
    assert run.text("err").splitlines()[-1].startswith("lamabench encode: error: data.channels is 1, but")
