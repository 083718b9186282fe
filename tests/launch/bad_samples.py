"""More rows of the table of bad inputs (bad_inputs.py): those of samples."""

from bad_rows import Bad

SAMPLES = [
    Bad(["sample", "{run}", "--to"], "expected one argument"),
    Bad(["sample", "{run}", "--to", "x.zip"], r"--to x\.zip is neither a FILE\.npz nor a folder for PNG files"),
    Bad(["sample", "{run}", "--to", "plain"], "--to plain is a file", {"plain": ""}),
    Bad(["sample", "{run}", "--to", "images"], "--to images holds a, which is not of these samples"),
    Bad(["sample", "{run}", "--to", "few.npz/below.npz"], r"few\.npz is a file"),
    Bad(["sample", "{run}", "--to", "{long}.npz"], "File name too long"),
    Bad(["sample", "{run}", "--to", "a\0b"], "NUL"),
    Bad(
        ["sample", "{run}", "sample.labels=balancd"], r"unknown sample\.labels 'balancd' \(did you mean 'balanced'\?\)"
    ),
    Bad(["sample", "{run}", "sample.labels=null"], "labels"),
    Bad(["sample", "{run}", "sample.timesteps=leading"], r"unknown sample\.timesteps 'leading'; choices: even, ddim"),
    Bad(
        ["sample", "{run}", "sample.timesteps=ddim", "sample.steps=600"],
        "no k gives sample.steps 600; nearest: 500, 1000",
    ),
    Bad(["sample", "{run}", "sample.timesteps=ddim", "sample.steps=1"], "no k gives sample.steps 1; nearest: 2"),
    Bad(["evaluate", "{run}", "--to", "x.npz"], "unrecognized arguments"),
]
