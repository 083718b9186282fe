"""The rows of the tables of bad inputs: the words of a command, what its one line says (a regular expression), and the
files that it reads. `{run}` is the folder of a training with samples, `{long}` a name of 400 letters."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

BASE = """question: q
base: {model: dit_nano, model.depth: 1, model.hidden_size: 16, model.num_heads: 2, data: digits, data.size: 8,
  train.steps: 2, train.batch_size: 2, train.precision: float32, sample.count: 12, sample.method: ddim, sample.steps: 2,
  evaluate.metrics: [fd], evaluate.reference_count: 12}
stages: [cost, train, sample, evaluate]
"""
STUDY = BASE + "variants: {a: {}}\n"
# A list of ten lists of ten lists, and so on, nine levels deep: a billion values.
BOMB = "question: q\nclaim:\n- &a [1,1,1,1,1,1,1,1,1,1]\n"
BOMB += "".join(f"- &{two} [{','.join([f'*{one}'] * 10)}]\n" for one, two in zip("abcdefgh", "bcdefghi", strict=True))


class Bad(NamedTuple):
    words: list[str]
    message: str
    files: Mapping[str, str] = MappingProxyType({})


def train(*settings: str) -> list[str]:
    return ["train", "model=dit_nano", "data=digits", "data.size=8", "train.steps=2", *settings]


def sweep(action: str, *words: str) -> list[str]:
    return ["sweep", action, "st.yaml", *words]


def of_study(text: str, message: str, action: str = "plan") -> Bad:
    return Bad(sweep(action), message, {"st.yaml": text})


def with_study(words: list[str], message: str) -> Bad:
    return Bad(words, message, {"st.yaml": STUDY})
