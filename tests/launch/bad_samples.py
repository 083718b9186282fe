"""More rows of the table of bad inputs (bad_inputs.py): those of samples, our own and other people's."""

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
    Bad(["export"], "name one run folder"),
    Bad(["export", "{run}"], "export needs a place: --to FOLDER, or --to hf:owner/name"),
    Bad(["export", "nowhere", "--to", "mine"], "nowhere is not a run folder"),
    Bad(["export", "{run}", "sample.steps=3", "--to", "mine"], r"export takes a run, sample\.at=\[STEP\] and"),
    Bad(["export", "{run}", "sample.at=all", "--to", "mine"], "export takes the weights of one step"),
    Bad(["export", "{run}", "sample.at=[7]", "--to", "mine"], "step 7 was not kept; the nearest kept"),
    Bad(["export", "{run}", "sample.weights=ema@0.3", "--to", "mine"], "has no weights ema@0.3"),
    Bad(["export", "{run}", "--to", "images"], "--to images holds a, which is no part of an export"),
    Bad(["export", "{run}", "--to", "few.npz"], r"--to few\.npz is a file: give a new folder"),
    Bad(["export", "{run}", "--to", "{long}"], "File name too long"),
    Bad(["export", "{run}", "--to", "hf:mine"], "--to hf:mine is no repository: write hf:owner/name"),
    Bad(["sample", "{run}", "sample.guidance=nan"], "sample.guidance must be finite"),
    Bad(["sample", "{run}", "sample.guidance=inf"], "sample.guidance must be finite"),
    Bad(["sample", "{run}", "sample.guidance_channels=9"], "sample.guidance_channels 9 is more than"),
    Bad(["sample", "{run}", "sample.guidance_interval=3"], r"guidance_interval must be \[low, high\], .* not 3"),
    Bad(["sample", "{run}", "sample.guidance_interval=[1,2,3]"], r"guidance_interval must be \[low, high\]"),
    Bad(["sample", "{run}", "sample.guidance_interval=[null,3]"], r"guidance_interval must be \[low, high\]"),
    Bad(["sample", "{run}", "sample.guidance_interval=[0,inf]"], r"guidance_interval must be .* or \[0.28, null\]"),
    Bad(["sample", "{run}", "sample.guidance_interval=[a,b]"], r"guidance_interval must be \[low, high\]"),
    Bad(["sample", "{run}", "sample.guidance_interval=[3,2]"], "guidance_interval must be .* the smaller one first"),
    Bad(["sample", "{run}", "sample.guidance_interval=[-1,2]"], "guidance_interval must be two numbers of at least 0"),
    Bad(
        ["sample", "{run}", "sample.guide=nowhere", "sample.guidance=2"], "sample.guide: .*nowhere is not a run folder"
    ),
    Bad(["sample", "{run}", "sample.guide={run}", "sample.guidance=2"], "has the weights that are sampled.*guide_at=N"),
    Bad(["sample", "{run}", "sample.guide={run}", "sample.guide_at=7"], "sample.guide .*: step 7 was not kept"),
    Bad(["sample", "{run}", "sample.guide_at=soon"], "sample.guide_at must be last or a step, not 'soon'"),
    Bad(["sample", "{run}", "sample.guide_weights=best"], "unknown sample.guide_weights 'best'"),
]

THEIRS = ["--as", "edm", "data=digits", "data.size=8", "run.device=cpu"]
FOREIGN = [
    Bad(["evaluate", "few.npz", *THEIRS], "fd needs at least 2 samples, 1 given; kid needs at least 100 samples"),
    Bad(["evaluate", "four.npz", *THEIRS, "evaluate.metrics=[kid]"], "kid needs at least 100 samples, 8 given"),
    Bad(["evaluate", "four.npz", *THEIRS, "data.size=16"], r"samples are \[8, 8, 1\] .*images are \[16, 16, 1\]"),
    Bad(["evaluate", "float.npz", *THEIRS], r"`images` in float\.npz must be uint8 \[N, H, W, C\], not float32"),
    Bad(["evaluate", "bare.npz", *THEIRS], "bare.npz has no array `images` or `arr_0`"),
    Bad(["evaluate", "cut.npz", *THEIRS], r"cut\.npz"),
    Bad(["evaluate", "empty.npz", *THEIRS], r"empty\.npz holds no images; supported are \.jpg, \.jpeg, \.png"),
    Bad(["evaluate", "pipe.npz", *THEIRS], "pipe.npz .*neither a file nor a folder"),
    Bad(["evaluate", "nowhere", *THEIRS], "nowhere does not exist: name an .npz of images, or a folder"),
    Bad(["evaluate", "plain", *THEIRS], "plain is neither an .npz nor a folder", {"plain": ""}),
    Bad(["evaluate", "empty", *THEIRS], "empty holds no images"),
    Bad(["evaluate", "images", *THEIRS], r"unreadable image images/a/broken\.png"),
    Bad(
        ["evaluate", "sizes", *THEIRS], r"several sizes: 8\.png has 8 × 8 pixels, 9\.png has 9 × 8; give them one size"
    ),
    Bad(["evaluate", "{run}", *THEIRS], "is a folder of lamabench, .*: --as is for other images"),
    Bad(["evaluate", *THEIRS], "name one run folder"),
    Bad(["evaluate", "four.npz", "--as", "a/b", "data=digits"], "--as takes a name of letters, digits .*not 'a/b'"),
    Bad(["evaluate", "four.npz", "--as", ".a", "data=digits"], "--as takes a name .*not beginning with a dot"),
    Bad(["evaluate", "four.npz", "--as", "", "data=digits"], "--as takes a name"),
    Bad(["evaluate", "four.npz", "--as", "{long}", "data=digits"], "--as takes a name .*at most 100 bytes"),
    Bad(["evaluate", "four.npz", "--as"], "expected one argument"),
    Bad(
        ["evaluate", "four.npz", *THEIRS, "--study", "trian"], "unknown study below runs 'trian' .did you mean 'train'"
    ),
    Bad(["evaluate", "four.npz", *THEIRS, "--generation", "stesp=3"], "unknown field of --generation 'stesp' .*steps"),
    Bad(["evaluate", "four.npz", *THEIRS, "--generation", "steps=x"], "--generation: steps must be a whole number"),
    Bad(["evaluate", "four.npz", *THEIRS, "--generation", ""], "--generation is empty"),
    Bad(
        ["evaluate", "four.npz", "--generation", "steps=3", "data=digits"], "--generation and --study .*give --as NAME"
    ),
    Bad(["evaluate", "{run}", "--neighbours", "--as", "edm"], "--neighbours records no scores, so .* no --as"),
    Bad(["evaluate", "{run}", "--neighbours", "4", "--study", "train"], "--neighbours records no scores"),
    Bad(["evaluate", "{run}", "--study", "train"], "--generation and --study .*give --as NAME"),
    Bad(["evaluate", "empty"], "empty is not a run folder: it has no config.json; --as NAME scores a folder of images"),
]
