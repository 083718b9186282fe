"""The table of bad inputs of every command."""

from bad_data import DATA
from bad_models import CONVERT, MODELS, USAGE
from bad_objectives import OBJECTIVES
from bad_reports import REPORTS
from bad_rows import BASE, BOMB, STUDY, Bad, of_study, sweep, train, with_study

TRAIN = [
    Bad(["train", "data=digits"], "train needs a model: model=NAME; choices: "),
    Bad(["train", "model=dit"], "unknown model 'dit'"),
    Bad(["train", "model=dit_nano", "data=digit"], "unknown data 'digit'"),
    Bad(
        train("recipe=ditt"),
        r"unknown recipe 'ditt' \(did you mean 'dit'\?\); choices: adm, adm_64, dit, lamamba, none",
    ),
    Bad(train("recipe=dit"), "sample.guidance_channels 3 is more than the model's 1 channels; .*recipe=dit"),
    Bad(train("train.stesp=3"), r"unknown key in train 'stesp' \(did you mean 'steps'\?\)"),
    Bad(train("tarin.steps=3"), "unknown key 'tarin'"),
    Bad(train("train.steps"), "is not an override"),
    Bad(train("train=3"), "train is a section; set one of its keys"),
    Bad(train("+train.lr=1"), "is not an override"),
    Bad(train("~train.lr"), "is not an override"),
    Bad(train("train.lr=1,2"), "gives several values"),
    Bad(train("train.steps=[1"), "cannot read the override"),
    Bad(train("train.steps=many"), "train.steps: Value 'many'"),
    Bad(train("train.steps=0"), "train.steps must be above 0"),
    Bad(train("train.steps=1.5"), r"train\.steps"),
    Bad(train("train.batch_size=0"), "train.batch_size must be above 0"),
    Bad(train("train.lr=0"), "train.lr must be above 0"),
    Bad(train("train.lr=-inf"), "train.lr must be"),
    Bad(train("train.warmup=-1"), "train.warmup must be 0 or more and at most"),
    Bad(train("train.warmup=0.5"), r"train\.warmup"),
    Bad(train("train.betas=0.9"), r"train.betas must be two numbers of at least 0 and below 1, not \[0.9\]"),
    Bad(train("train.betas=[0.9,1]"), "train.betas must be two numbers"),
    Bad(train("train.betas=[0.9,nan]"), "train.betas must be two numbers"),
    Bad(train("train.clip=0"), "train.clip must be above 0"),
    Bad(train("train.clip=inf"), "train.clip must be above 0 and finite"),
    Bad(train("train.ema_decay=1"), "train.ema_decay must be at least 0 and below 1"),
    Bad(train("train.ema_decay=nan"), "train.ema_decay must be"),
    Bad(train("train.ema_decays=[1]"), "train.ema_decays must be at least 0, below 1 and other than .* 0.9999, not 1"),
    Bad(train("train.ema_decays=0.9999"), "train.ema_decays must be .* other than train.ema_decay 0.9999"),
    Bad(train("train.ema_decays=[nan]"), "train.ema_decays must be"),
    Bad(train("train.ema_decays=[{a: 1}]"), "train.ema_decays must be a list of numbers"),
    Bad(train("train.ema_powers=[[0.05]]"), r"train.ema_powers must be a list of numbers, not \[\[0.05\]\]"),
    Bad(
        train("train.ema_powers=[0.3]"), "train.ema_powers: a relative width must be above 0 and at most 0.288, not 0.3"
    ),
    Bad(train("train.ema_powers=[nan]"), "train.ema_powers: a relative width must be"),
    Bad(train("train.ema_rampup=soon"), r"train\.ema_rampup"),
    Bad(train("train.class_dropout=1.5"), "train.class_dropout must be"),
    Bad(train("train.precision=float16"), "train.precision=float16 is not supported"),
    Bad(train("train.precision=fp8"), r"unknown train\.precision 'fp8'"),
    Bad(train("train.noise=tpu"), r"unknown train\.noise 'tpu'.*; choices: cpu, gpu"),
    Bad(
        train("train.noise=gpu", "run.device=cpu"),
        "train.noise=gpu cannot be drawn on the device cpu: Triton needs a GPU .*train.noise=cpu is drawn everywhere",
    ),
    Bad(train("train.compile=fast"), r"unknown train\.compile 'fast'"),
    Bad(train("train.snapshots=[0]"), "train.snapshots must be"),
    Bad(train("seed=-1"), "seed must be 0 or more and below 2.64"),
    Bad(train("seed=18446744073709551616"), "seed must be 0 or more and below 2.64"),
    Bad(train("seed=x"), "seed"),
    Bad(train("model.depht=1"), "did you mean 'depth'"),
    Bad(train("model.num_heads=5"), "num_heads 5"),
    Bad(
        train("model.rope=true", "model.num_heads=16"),
        "model.rope needs heads of a multiple of 4 channels, not 6: change",
    ),
    Bad(train("model.rope=2d"), r"model\.rope"),
    Bad(["train", "model=uvit_nano", "data=digits", "model.depth=4"], "model.depth must be odd, .* U-ViT, not 4"),
    Bad(["train", "model=uvit", "data=digits"], r"unknown model 'uvit'"),
    Bad(train("model.dropout=1"), "model.dropout must be at least 0 and below 1, not 1"),
    Bad(train("model.dropout=nan"), "model.dropout must be"),
    Bad(train("model.input_size=16"), "does not fit data.size 8"),
    Bad(
        ["train", "model=adm_64", "data=synthetic", "data.size=64", "data.num_classes=1000"],
        "model adm_64 is trained with the cosine noise schedule, not linear: set objective.schedule=cosine",
    ),
    Bad(train("encoder.kind=vae"), "'vae'"),
    Bad(train("encoder=nowhere"), "unknown encoder 'nowhere'; choices: pixels, the folder of a cache"),
    Bad(train("encoder=."), "is no complete cache of latents: it has no index.json"),
    Bad(train("encoder.scale=2"), "encoder.scale is a setting of latents, and encoder.kind is pixels: encoder=FOLDER"),
    Bad(train("encoder.kind=latents"), "encoder.identity of latents is not set: encoder=FOLDER takes it"),
    Bad(train("backend.selective_scan=pallas"), "unknown selective_scan backend 'pallas'"),
    Bad(train("backend.ssd=fla"), "unknown ssd backend 'fla'; choices: auto, torch, mamba_ssm, reference"),
    Bad(train("backend.nope=x"), "unknown key in backend 'nope'"),
    Bad(train("run.device=tpu"), r"unknown run\.device 'tpu'.*; choices: auto, cpu"),
    Bad(train("run.device="), r"run\.device"),
    Bad(train("run.device=CUDA"), r"unknown run\.device 'CUDA'"),
    Bad(train("run.device=cuda:99"), r"run\.device"),
    Bad(train("run.workers=-1"), "run.workers must be 0 or more"),
    Bad(train("run.workers=many"), "run.workers must be 0 or more and at most 256, or auto, not many"),
    Bad(train("run.workers=true"), "run.workers must be 0 or more and at most 256, or auto, not True"),
    Bad(train("run.log_every=0"), "run.log_every must be above 0"),
    Bad(train("run.micro_batch=0"), "run.micro_batch must be above 0"),
    Bad(train("run.parallel=fsdp2"), "unknown run.parallel 'fsdp2'"),
    Bad(train("run.parallel=fsdp", "train.compile=whole-step"), "needs whole weights in each process"),
    Bad(train("run.log_to=[tensorboard,mlflow]"), "unknown run.log_to 'mlflow'; choices: tensorboard, wandb, trackio"),
    Bad(train("run.log_to=tensorbord"), r"unknown run.log_to 'tensorbord' \(did you mean 'tensorboard'\?\)"),
    Bad(train("run.preview_every=-1"), r"run.preview_every must be 0 \(no previews\) or more, not -1"),
    Bad(train("run.new_backends=maybe"), r"run\.new_backends"),
    Bad(train("run.root=few.npz"), r"few\.npz"),
    Bad(train("run.root=few.npz/below"), r"few\.npz"),
    Bad(train("run.root=/proc/nowhere"), "/proc/nowhere"),
    Bad(train("run.root={long}"), "File name too long"),
    Bad(train("plugins=[no.py]"), r"no\.py"),
    Bad(train("plugins=[bad.py]"), r"bad\.py", {"bad.py": "1 / 0\n"}),
    Bad(train("plugins=[no_such_module]"), "no_such_module"),
    Bad(train("sample.count=0"), "sample.count must be above 0"),
    Bad(train("sample.at=never"), "sample.at must be"),
    Bad(train("sample.keep=image"), r"unknown sample\.keep 'image'.*; choices: images, features"),
    Bad(train("sample.weights=best"), r"unknown sample\.weights 'best'; choices: ema, live, ema@DECAY"),
    Bad(train("sample.weights=ema@x"), r"unknown sample\.weights 'ema@x'"),
    Bad(
        train("sample.weights=power@x"), r"unknown sample\.weights 'power@x'.*; choices: ema, live, ema@DECAY, power@W"
    ),
    Bad(train("sample.weights=power@0"), "sample.weights=power@0: a relative width must be above 0 and at most 0.288"),
    Bad(
        train("sample.weights=power@0.1"), r"sample.weights=power@0.1 is computed from .*train.ema_powers=\[0.05,0.1\]"
    ),
    Bad(train("sample.weights=ema@0.5"), "unknown sample.weights of this training 'ema@0.5'.*; choices: ema, live$"),
    Bad(["sample", "{run}", "sample.weights=ema@0.5"], "unknown sample.weights of this training 'ema@0.5'"),
    Bad(["sample", "{run}", "sample.weights=power@0.1"], "power@0.1 is computed from .* this one keeps ema, live$"),
    Bad(train("sample.seed=-1"), "sample.seed must be"),
    Bad(train("sample.guidance_channels=9"), "sample.guidance_channels 9 is more than"),
    Bad(train("train.compile=whole-step", "run.device=cpu"), "error: train.compile=whole-step needs a GPU"),
    Bad(
        ["bench", "dit_nano", "bench.modes=[train]", "bench.compile=[whole-step]", "run.device=cpu"],
        "error: bench.compile=whole-step needs a GPU",
    ),
    Bad(train("evaluate.metrics=fid"), r"unknown evaluate\.metrics 'fid' \(did you mean 'fd'\?\)"),
    Bad(train("evaluate.metrics=[]"), "evaluate.metrics is empty"),
    Bad(train("evaluate.features=vgg"), r"unknown evaluate\.features 'vgg'"),
    Bad(train("evaluate.reference_count=0"), "evaluate.reference_count must be above 0"),
]
RUNS = [
    Bad(["sample"], "name one run folder"),
    Bad(["sample", "nowhere"], "nowhere is not a run folder"),
    Bad(["sample", "few.npz"], r"few\.npz"),
    Bad(["sample", "{run}", "{run}"], "name one run folder"),
    Bad(["sample", "runs"], "runs is not a run folder"),
    Bad(["sample", "{long}"], "File name too long"),
    Bad(["sample", "{run}", "train.lr=2"], "would make another training of it; sections to set here: sample"),
    Bad(["sample", "{run}", "sample.count=many"], "count"),
    Bad(["sample", "{run}", "sample.count=0"], "sample.count must be above 0"),
    Bad(["sample", "{run}", "sample.stesp=1"], "did you mean 'steps'"),
    Bad(["sample", "{run}", "sample.at=[7]"], "sample.at 7 is beyond the end of the training"),
    Bad(["sample", "{run}", "sample.seed=18446744073709551616"], "sample.seed must be"),
    Bad(["evaluate"], "name one run folder"),
    Bad(["evaluate", "nowhere"], "nowhere is not a run folder"),
    Bad(["evaluate", "nowhere.npz", "data=digits"], r"nowhere\.npz does not exist"),
    Bad(["evaluate", "few.npz", "data=digits", "data.size=8", "evaluate.metrics=[fd]"], "fd needs at least 2 samples"),
    Bad(["evaluate", "few.npz", "data=digits", "evaluate.metrics=[fid]"], "'fid'"),
    Bad(["evaluate", "plain.npz", "data=digits"], r"plain\.npz is not a readable \.npz"),
    Bad(["evaluate", "float.npz", "data=digits"], r"`images` in float\.npz must be uint8"),
    Bad(["evaluate", "object.npz", "data=digits"], r"object\.npz"),
    Bad(["evaluate", "huge.npz", "data=digits"], r"huge\.npz"),
    Bad(["evaluate", "bare.npz", "data=digits"], r"bare\.npz has no array `images`"),
    Bad(["evaluate", "few.npz", "data=digits", "evaluate.reference_count=9999"], "is more than the 1797 images"),
    Bad(["evaluate", "{run}", "sample.count=13"], "has no samples to score; draw them first"),
    Bad(["evaluate", "{run}", "train.lr=2"], "would make another training of it"),
    Bad(["evaluate", "{run}", "evaluate.metrics=[fid]"], r"unknown evaluate\.metrics 'fid'"),
    Bad(["evaluate", "{run}", "backend.attention=torch"], "sections to set here: sample, evaluate, run"),
]
STUDIES = [
    Bad(["sweep", "run", "dmeo"], r"unknown study 'dmeo' \(did you mean 'demo'\?\)"),
    Bad(["sweep", "plan", "no.yaml"], r"no\.yaml"),
    Bad(["sweep", "plan", "empty"], "unknown study 'empty'"),
    Bad(["sweep", "plan", "{long}"], "{long}|too long"),
    of_study("", "st.yaml"),
    of_study("[]", "st.yaml"),
    of_study("question: [", r"st\.yaml is not YAML"),
    of_study("variants: {a: {model: dit_nano}}", "question"),
    of_study("question: q\nvariant: {a: {}}", r"unknown key in st\.yaml 'variant' \(did you mean 'variants'\?\)"),
    of_study(BASE, "variants|axes"),
    of_study(BASE + "variants: {a: {}}\naxes: {train.lr: [1]}", "axes|variants"),
    of_study(BASE + "variants: [a]", "variants"),
    of_study(BASE + "axes: {train.lr: 3}", r"axes|train\.lr"),
    of_study(BASE + "axes: {train.lr: []}", r"axes|train\.lr"),
    of_study(BASE + "variants: {a: {}}\nseeds: x", "seeds"),
    of_study(BASE + "variants: {a: {}}\nseeds: [-1]", "seed"),
    of_study(STUDY.replace("stages: [cost", "stages: [fly"), "fly"),
    of_study(BASE + "variants: {a: {}}\nextends: nope", "nope"),
    of_study(BASE + "variants: {a: {}, b: {}}", "b and a are the same run"),
    of_study(BASE + "variants: {report: {}}", "a run cannot be called 'report'"),
    of_study(BASE + "variants: {a: {train.lr: fast}}", r"train\.lr"),
    of_study(BASE + "variants: {a: {train.stesp: 3}}", "did you mean 'steps'"),
    of_study(BASE + "variants: {a: {model: dit}}", "unknown model 'dit'"),
    of_study(
        BASE + "variants: {a: {run.root: x}, b: {run.root: y, train.lr: 1}}", "all runs must have the same run.root"
    ),
    of_study(BASE + "variants: {'': {}}", "variant"),
    of_study(BASE + "variants: {a/b: {}}", "variant|a/b"),
    of_study(BASE + "variants: {..: {}}", r"variant|\.\."),
    of_study(BASE + "variants: {a: {}, a: {train.lr: 1}}", "twice"),
    Bad(["sweep", "plan", "models.yaml"], "a study cannot be called 'models'", {"models.yaml": STUDY}),
    with_study(sweep("plan", "train.lr=fast"), r"train\.lr"),
    with_study(sweep("plan", "train.lr=-1"), r"train\.lr must be above 0"),
    with_study(sweep("plan", "--stages", "fly"), "unknown stage of st 'fly'"),
    with_study(sweep("plan", "--stages", ""), "unknown stage of st ''"),
    with_study(sweep("plan", "--stages", "train,"), "unknown stage of st ''"),
    with_study(sweep("run", "--stages", ""), "unknown stage of st ''"),
    with_study(sweep("submit", "--stages", "", "cluster=slurm"), "unknown stage of st ''"),
    with_study(sweep("collect", "--stages", ""), "--stages is for plan, .* and status, not for collect"),
    with_study(sweep("plan", "--only", "x*"), r"no variant is called 'x\*'; variants: a"),
    with_study(sweep("plan", "--only", ""), "no variant is called ''; variants: a"),
    with_study(sweep("run", "--only", ""), "no variant is called ''"),
    with_study(sweep("cancel", "--only", ""), "no variant is called ''"),
    with_study(sweep("prune", "--only", ""), "--only is for"),
    with_study(sweep("plan", "--parallel", "0"), "must be a whole number above 0"),
    with_study(sweep("plan", "--dirty"), "--dirty is for submit and retry, not for plan"),
    with_study(sweep("run", "--watch"), "--watch is for status, not for run"),
    with_study(sweep("run", "--yes"), "--yes is for prune"),
    with_study(sweep("status", "--checkpoints"), "--checkpoints is for prune"),
    with_study(sweep("plan", "--out", "x"), "--out is for collect"),
    with_study(sweep("plan", "--debug"), "debug"),
    with_study(sweep("plan", "cluster=nope"), "unknown cluster 'nope'"),
    with_study(sweep("plan", "cluster=no.yaml"), "unknown cluster"),
    with_study(sweep("status", "cluster=nope"), "unknown cluster 'nope'"),
    with_study(sweep("plan", "cluster.time_min=0"), "cluster.time_min must be above 0"),
    with_study(sweep("plan", "cluster.tiem_min=5"), "did you mean 'time_min'"),
    with_study(
        sweep("plan", "cluster.stage.evalute.gpus=0"), r"'evalute' \(did you mean 'evaluate'\?\); choices: cost,"
    ),
    with_study(sweep("plan", "cluster.stage.sample.gpu=1"), r"'gpu' \(did you mean 'gpus'\?\); choices: partition"),
    with_study(sweep("plan", "cluster.stage.sample=1"), "cluster.stage.sample is a section; set a key of a stage"),
    with_study(sweep("plan", "cluster.stage.sample.gpus=-1"), "stage sample: cluster.gpus must be 0 or more"),
    with_study(sweep("status", "cluster.stage.sample.kind=local"), "unknown key in cluster.stage.sample 'kind'"),
    of_study(BASE + "variants: {a: {cluster: {stage: {evaluate: {gpu: 0}}}}}", "unknown key in cluster.stage.evaluate"),
    with_study(
        sweep("submit", "cluster=slurm", "run.device=cuda", "cluster.gpus=2", "cluster.stage.evaluate.gpus=0"),
        r"run.device=cuda, but stage evaluate has no GPU \(cluster.stage.evaluate.gpus=0\)",
    ),
    with_study(sweep("plan", "cluster.options=[x]"), "cluster.options are options of sbatch"),
    with_study(sweep("plan", "cluster.signal_s=99999"), "cluster.signal_s 99999 is not before the end"),
    with_study(sweep("run", "cluster=slurm"), "sweep run works on this machine"),
    with_study(
        sweep("run", "cluster=local", "cluster.gpus=2"), "one GPU of this machine, .*cluster.gpus=2 is for sweep"
    ),
    with_study(sweep("submit"), "name the cluster to submit to"),
    with_study(sweep("submit", "cluster=local"), "cluster local has no queue"),
    with_study(sweep("submit", "cluster=slurm", "cluster.nodes=3"), "cluster.tasks_per_node and cluster.nodes"),
    with_study(
        sweep("submit", "cluster=slurm", "cluster.gpus=3"), "multiple of the 3 .*cluster.gpus and cluster.nodes"
    ),
    with_study(sweep("collect"), "nothing of the study ran yet"),
    with_study(sweep("collect", "--out", "no/x.jsonl"), "no such folder: no"),
    with_study(sweep("collect", "--out", "empty"), "empty is a folder, but --out must name a file"),
    with_study(sweep("cancel"), "nothing of the study ran yet"),
    with_study(sweep("retry", "train.lr=1"), "would not repeat a run but make another one"),
    with_study(sweep("run", "run.root=few.npz"), r"few\.npz"),
    with_study(sweep("run", "run.root={long}"), "File name too long"),
    Bad(sweep("plan", "cluster=c.yaml"), "unknown key 'tiem_min'", {"st.yaml": STUDY, "c.yaml": "tiem_min: 3"}),
    Bad(
        sweep("plan", "cluster=c.yaml"), "c.yaml: unknown stage", {"st.yaml": STUDY, "c.yaml": "stage: {s: {gpus: 0}}"}
    ),
    Bad(sweep("plan", "cluster=c.yaml"), "a cluster is a mapping", {"st.yaml": STUDY, "c.yaml": "[]"}),
    Bad(sweep("plan", "cluster=c.yaml"), "is not YAML", {"st.yaml": STUDY, "c.yaml": "a: ["}),
]
# What can be known of a study before anything is written.
KNOWN = [
    with_study(sweep(action, *words, setting), message)
    for action, words in (("run", ()), ("submit", ("cluster=slurm",)))
    for setting, message in (
        ("run.device=tpu", r"unknown run\.device 'tpu'"),
        ("run.device=CUDA", r"unknown run\.device 'CUDA'"),
        ("data.size=16384", "a: data 'digits': 1,797 images of data.size 16384 would take"),
        ("data=cifar10", r"a: data\.path is not set; data 'cifar10' needs it"),
        ("data=npz", r"a: data\.path is not set"),
        ("evaluate.metrics=[fd,kid]", "a: kid needs at least 100 samples, 12 given"),
        ("sample.count=1", "a: fd needs at least 2 samples, 1 given"),
        ("evaluate.reference_count=1", "a: fd needs at least 2 reference images, 1 given"),
        ("evaluate.reference_count=9999", "a: evaluate.reference_count 9999 is more than the 1797 images"),
        ("evaluate.features_path=no.pt", r"a: evaluate\.features_path no\.pt has no effect"),
        ("evaluate.reference=no.npz", r"a: evaluate\.reference no\.npz does not exist or is not a file"),
    )
]
KNOWN += [
    with_study(
        sweep(action, *words, *settings, f"data.num_classes={classes}"),
        f"a: data.num_classes is {classes}, but .* has {actual}",
    )
    for action, words in (("run", ()), ("submit", ("cluster=slurm",)))
    for settings, classes, actual in (
        (("data=folder", "data.path=two"), 1000, "2 classes; set it to 2"),
        (("data=folder", "data.path=two"), 1, "2 classes; set it to 2"),
        (("data=npz", "data.path=four.npz", "data.channels=1"), 1000, "4 classes; set it to 4"),
        (("data=npz", "data.path=four.npz", "data.channels=1"), 3, "4 classes; set it to 4"),
    )
]
KNOWN += [with_study(sweep("run", "run.device=cuda:99"), r"run\.device=cuda:99 asks for a GPU")]

# Numbers that are no numbers, or too large.
NUMBERS = [
    Bad(train("train.lr=nan"), "train.lr must be above 0"),
    Bad(train("train.lr=inf"), "train.lr must be above 0 and finite"),
    Bad(train("train.lr=1e999"), "train.lr must be above 0 and finite"),
    Bad(train("train.weight_decay=-1"), "train.weight_decay must be 0 or more"),
    Bad(train("train.weight_decay=nan"), "train.weight_decay must be"),
    Bad(train("train.weight_decay=inf"), "train.weight_decay must be"),
    Bad(train("train.batch_size=100000000"), "train.batch_size must be at most"),
    Bad(train("run.workers=1000000"), "run.workers must be 0 or more and at most"),
    Bad(train("sample.guidance=nan"), "sample.guidance must be finite"),
    Bad(train("sample.guidance=-inf"), "sample.guidance must be finite"),
    Bad(train("sample.guidance=2", "data.num_classes=0"), "sample.guidance 2.0 needs classes"),
    Bad(train("data.size=1000000000000"), "data.size must be at most"),
    Bad(["bench", "dit_nano", "--ahead", "bench.batch_size=auto"], "--ahead needs numbers in bench.batch_size"),
    Bad(["bench", "dit_nano", "--ahead", "--profile"], "argument --profile: not allowed with argument --ahead"),
    Bad(["bench", "dit_nano", "bench.seconds=nan"], "bench.seconds must be above 0"),
    Bad(["bench", "dit_nano", "bench.seconds=inf"], "bench.seconds must be above 0 and finite"),
    Bad(["bench", "dit_nano", "bench.warmup=100000000000000000000"], r"bench\.warmup"),
    Bad(["bench", "dit_nano", "bench.input_sizes=[100000]"], r"bench\.input_sizes must be at most"),
    Bad(["cost", "dit_nano", "input_size=1000000000000"], "input_size|memory"),
    with_study(sweep("plan", "train.lr=nan"), "train.lr must be above 0"),
    with_study(sweep("plan", "train.weight_decay=-1"), "train.weight_decay must be 0 or more"),
    with_study(sweep("submit", "cluster=slurm", "sample.guidance=nan"), "sample.guidance must be finite"),
    with_study(sweep("run", "sample.guidance=2", "data.num_classes=0"), "sample.guidance 2.0 needs classes"),
]
# What a word, a study or a cluster may hold.
TEXTS = [
    Bad(["sample", "{run}", "run.root=${x}/r"], "'x' not found"),
    Bad(["sample", "{run}", "run.device=tpu"], r"unknown run\.device 'tpu'"),
    Bad(["sample", "{run}", "sample.count=13", "run.root=few.npz"], r"few\.npz"),
    Bad(["sample", "{run}", "sample.count=13", "run.root={long}"], "File name too long"),
    Bad(["sample", "no=such/run"], "run folder"),
    Bad(["data", "check", "data=folder", "data.path=nowhere"], "data.path nowhere does not exist"),
    Bad(["data", "check", "data=npz", "data.path=plain.npz"], r"plain\.npz is not a readable \.npz"),
    Bad(["data", "check", "data=nope"], "unknown data 'nope'"),
    Bad(["data", "fly"], "invalid choice: 'fly'"),
    Bad(
        train("data=npz", "data.channels=1", "data.path=gaps.npz", "data.num_classes=4"), "classes without an image: 0"
    ),
    of_study("question: q\naxes: &a {train.lr: *a}", "alias"),
    of_study("question: q\nbase: &a {b: [*a]}\nvariants: {a: {}}", "alias"),
    of_study(BOMB + "axes: {train.lr: *i}", "values, with those that aliases repeat"),
    of_study("question: " + "[" * 3000 + "]" * 3000, "levels of lists and mappings"),
    of_study(BASE + f"axes: {{{', '.join(f'k{i}: {list(range(50))}' for i in range(6))}}}", "runs; at most"),
    of_study(BASE + "variants: {a: {train.steps: !!int x}}", "st.yaml"),
    of_study(BASE + "variants: {a: {data.name: 2020-01-01}}", "timestamp"),
    of_study(BASE + "variants: {a: {1: 1}}", "is not a text"),
    of_study(BASE + 'variants: {"\\ud800": {}}', "variant|half a character"),
    of_study(BASE + 'variants: {"a\\nb": {}}', "printable"),
    of_study(BASE + f"variants: {{{'a' * 250}: {{}}}}", "at most 200 bytes"),
    with_study(sweep("plan", "cluster=slurm", "cluster.gpus=4"), "is no multiple of the 4 processes"),
    with_study(sweep("submit", "cluster=slurm", "cluster.gpus=4"), "is no multiple of the 4 processes"),
    with_study(sweep("submit", "cluster=slurm", 'cluster.options=["--comment=it\'s"]'), "quotes|cluster.options"),
    with_study(sweep("plan", "cluster=slurm", 'cluster.options=["--comment=it\'s"]'), "quotes|cluster.options"),
    Bad(sweep("plan", "cluster=c.yaml"), "occurs twice", {"st.yaml": STUDY, "c.yaml": "time_min: 3\ntime_min: 4"}),
    Bad(sweep("plan", "cluster=c.yaml"), "alias", {"st.yaml": STUDY, "c.yaml": "setup: &a [*a]"}),
    *(
        Bad(sweep(action, "cluster=c.yaml"), f"cluster.{key} ", {"st.yaml": STUDY, "c.yaml": text})
        for action in ("plan", "submit")
        for key in ("partition", "account")
        for text in (f'{key}: "a\\n#SBATCH --exclusive"', f'{key}: "a\\rb"', f'{key}: "a\\x07b"')
    ),
]
# Weights as a killed copy, another program or another model leaves them (`damaged` in test_bad_inputs.py).
WEIGHTS = [
    Bad(["sample", f"damaged/{kind}/train/{{name}}", "sample.count=3", *more], "step-00000002")
    for kind in ("cut", "empty", "plain", "list", "missing", "extra", "shape")
    for more in ([], ["sample.weights=live"])
]

TABLE = [*USAGE, *MODELS, *CONVERT, *OBJECTIVES, *TRAIN, *DATA, *RUNS, *REPORTS, *STUDIES, *KNOWN, *NUMBERS, *TEXTS]
TABLE += WEIGHTS
