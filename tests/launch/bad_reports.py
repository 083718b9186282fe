"""Bad inputs of commands that read records: rows of `bad_inputs.py`."""

from bad_rows import Bad

REPORTS = [
    Bad(["compare", "nowhere"], "no such folder: nowhere"),
    Bad(["compare", "few.npz", "{run}"], r"few\.npz is a file"),
    Bad(["compare", "empty"], "empty holds no run"),
    Bad(["compare", "{run}"], "is no study with several variants, so name two runs, variants or studies"),
    Bad(["compare", "{run}", "{run}"], "has no scores; lamabench evaluate computes them"),
    Bad(["compare", "{run}", "{run}", "{run}"], "compare takes one study, or two runs, .* not 3"),
    Bad(["runs", "nowhere"], "'nowhere' is no folder and no condition"),
    Bad(["runs", "no/where"], "no such folder: no/where"),
    Bad(["runs", "run.root=nowhere"], "no such folder: nowhere"),
    Bad(["runs", "few.npz"], r"few\.npz is a file"),
    Bad(["runs", "empty"], "empty holds no run"),
    Bad(
        ["runs", "famly=dit"], r"unknown field of runs 'famly' \(did you mean 'family'\?\); choices: study, run, model"
    ),
    Bad(["runs", "sort=stat"], r"unknown field of runs 'stat' \(did you mean 'state'\?\)"),
    Bad(["runs", "params>many"], r"params>many: 'many' is no number"),
    Bad(["runs", "state=done", "--jsn"], r"unrecognized arguments: --jsn \(did you mean --json\?\)"),
    Bad(["studies", "nowhere"], "'nowhere' is no folder"),
    Bad(["studies", "empty"], "empty holds no run"),
    Bad(["studies", "state=done"], "studies takes folders and run.root=FOLDER, not state=done"),
    Bad(["report", "nowhere", "--out", "out"], "no such folder: nowhere"),
    Bad(["report", "few.npz", "--out", "out"], r"few\.npz is a file"),
    Bad(["report", "empty", "--out", "out"], "empty holds no run"),
    Bad(["report", "{run}", "--out", "few.npz"], r"few\.npz is a file"),
    Bad(["report", "{run}", "--out", "few.npz/below"], "cannot write a report"),
    Bad(["report", "{run}", "--out", "images"], "neither empty nor an earlier report"),
    Bad(["report", "{run}", "--out", "out", "--baseline", "nope"], "nope"),
    Bad(["report", "{long}", "--out", "out"], "File name too long"),
    Bad(["report", "{run}", "--out", "{long}"], "File name too long"),
    Bad(["report", "odd", "--out", "out"], r"odd/config\.json is not JSON", {"odd/config.json": "{"}),
    Bad(["report", "odd", "--out", "out"], r"odd/config\.json was not written by", {"odd/config.json": "[]"}),
    Bad(["report", "odd", "--out", "out"], r"odd/\.study\.json is not JSON", {"odd/.study.json": ""}),
]
