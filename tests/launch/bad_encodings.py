"""Bad inputs of `lamabench encode` that need no autoencoder. tests/harness/test_encoding.py has the others."""

from bad_rows import Bad


def encode(*words: str) -> list[str]:
    return ["encode", "data=digits", "data.channels=3", *words]


ENCODE = [
    Bad(["encode", "encoder=vae", "--to", "c"], "encode needs data: data=NAME; choices: cifar10"),
    Bad(encode("--to", "c"), "encode needs one autoencoder: encoder=FOLDER, .* such as stabilityai/sd-vae-ft-ema"),
    Bad(encode("encoder=", "--to", "c"), "encode needs one autoencoder"),
    Bad(encode("encoder=pixels", "--to", "c"), "encode needs one autoencoder"),
    Bad(encode("encoder=a", "encoder=b", "--to", "c"), "encode needs one autoencoder"),
    Bad(encode("encoder=empty"), "encode needs the folder of the cache: --to FOLDER"),
    Bad(encode("encoder=empty", "--to", "c", "train.lr=1"), "encode takes .* settings of data and run, not 'train.lr"),
    Bad(encode("encoder=empty", "--to", "c", "data.chanels=3"), r"did you mean 'channels'\?"),
    Bad(encode("encoder=empty", "--to", "c", "--dtype", "float8"), "invalid choice: 'float8'"),
    Bad(encode("encoder=empty", "--to", "c", "--dowload"), r"did you mean --download\?"),
    Bad(encode("encoder=empty", "--to", "c"), r"autoencoder empty has no config\.json"),
    Bad(encode("encoder=few.npz", "--to", "c"), r"autoencoder few\.npz is a file; give its folder"),
    Bad(encode("encoder=nowhere", "--to", "c"), "autoencoder nowhere does not exist; give a folder, or owner/name"),
    Bad(encode("encoder=./no/where", "--to", "c"), r"autoencoder \./no/where does not exist"),
    Bad(encode("encoder=no/where", "--to", "c"), "no/where is neither a folder nor in the cache of huggingface-hub"),
    Bad(encode("encoder=a b/c", "--to", "c"), "a b/c does not exist and is no id of the Hugging Face hub"),
    Bad(encode("encoder=empty", "--to", "few.npz"), r"--to few\.npz is a file; give a folder"),
    Bad(encode("encoder=empty", "--to", "images"), r"--to images has other files \(a\) and no cache of latents"),
    Bad(encode("encoder=empty", "--to", "few.npz/c"), r"few\.npz/c"),
    Bad(encode("encoder=empty", "--to", "{long}"), "File name too long"),
    Bad(encode("encoder=empty", "--to", "c", "run.device=tpu"), r"unknown run\.device 'tpu'"),
]
