"""Bad inputs of commands that read records: rows of `bad_inputs.py`."""

from bad_rows import Bad

REPORTS = [
    Bad(["compare", "nowhere"], "no such folder: nowhere"),
    Bad(["compare", "few.npz", "{run}"], r"few\.npz is a file"),
    Bad(["compare", "empty"], "empty holds no run"),
    Bad(["compare", "{run}"], "is no study with several variants, so name two runs, variants or studies"),
    Bad(["compare", "{run}", "{run}"], "has no scores; lamabench evaluate computes them"),
    Bad(["compare", "{run}", "{run}", "{run}"], "compare takes one study, or two runs, .* not 3"),
    Bad(["report", "nowhere", "--out", "out"], "no such folder: nowhere"),
    Bad(["report", "few.npz", "--out", "out"], r"few\.npz is a file"),
    Bad(["report", "empty", "--out", "out"], "empty holds no run"),
    Bad(["report", "{run}", "--out", "few.npz"], r"few\.npz is a file"),
    Bad(["report", "{run}", "--out", "few.npz/below"], "cannot write a report"),
    Bad(["report", "{run}", "--out", "images"], "neither empty nor an earlier report"),
    Bad(["report", "{run}", "--out", "out", "--baseline", "nope"], "nope"),
    Bad(["report", "{run}", "--out", "out", "--published", "no.yaml"], "cannot read no.yaml: No such file"),
    Bad(
        ["report", "{run}", "--out", "out", "--published", "mine.yaml"],
        r"mine\.yaml: imagenet_256 row 1 \(A\): unknown field 'fdi' \(did you mean 'fid'\?\); choices: model, source, ",
        {"mine.yaml": "imagenet_256: [{model: A, fdi: 2}]"},
    ),
    Bad(["report", "{run}", "--table", "sumary"], r"no table 'sumary' \(did you mean summary\?\); choices: summary, "),
    Bad(["report", "{run}", "--table", "kernels"], "the table kernels has no rows: no operator was timed alone"),
    Bad(["report", "{run}", "--table", "runs", "--out", "out"], "writes nothing: leave out --out"),
    Bad(["report", "{run}", "--table", "runs", "--format", "pdf"], "invalid choice: 'pdf'"),
    Bad(["report", "{run}", "--out", "out", "--format", "csv"], "--format csv is for --table NAME"),
    Bad(["report", "{run}", "--out", "out", "--watch", "--json"], "leave out --json"),
    Bad(["report", "{long}", "--out", "out"], "File name too long"),
    Bad(["report", "{run}", "--out", "{long}"], "File name too long"),
    Bad(["report", "odd", "--out", "out"], r"odd/config\.json is not JSON", {"odd/config.json": "{"}),
    Bad(["report", "odd", "--out", "out"], r"odd/config\.json was not written by", {"odd/config.json": "[]"}),
    Bad(["report", "odd", "--out", "out"], r"odd/\.study\.json is not JSON", {"odd/.study.json": ""}),
]
