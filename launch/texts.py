"""Examples and longer texts of `lamabench --help`."""

EPILOG = """examples
  lamabench models                                       every model, with parameters and MACs
  lamabench cost lamamba_xl dit_xl_2 input_size=64       multiply-adds by part, at 512 px
  lamabench train model=lamamba_nano data=digits train.steps=200 train.batch_size=32
  lamabench sample runs/train/lamamba_nano-digits-KEY sample.count=160 sample.method=ddim sample.steps=25
  lamabench evaluate runs/train/lamamba_nano-digits-KEY sample.count=160 sample.method=ddim sample.steps=25
  lamabench bench dit_nano lamamba_nano bench.batch_size=8
  lamabench bench-kernels lamamba_xl bench.batch_size=64 every backend of the scan, the attention and so on
  lamabench sweep run demo                               three backbones, from training to a report
  lamabench report runs/demo --out out/demo
  lamabench compare runs/block_mix                       is any variant better or worse than the first one?
  lamabench runs state=done sort=fd                      every finished run, best first; studies lists the studies

Settings are written key=value, as in Hydra: model=NAME and data=NAME select a model and data, train.lr=1e-3 sets a
value. Run the same command again to continue where it stopped."""

SWEEP = """lamabench sweep plan demo                               list the runs; writes nothing
  lamabench sweep run demo                                do what is missing, on this machine
  lamabench sweep submit demo cluster=slurm --parallel 8  queue what is missing, 8 jobs at a time; returns at once
  lamabench sweep status demo --watch                     show the state of every run, here and on SLURM
  lamabench sweep retry demo cluster.mem_gb=64            queue failed runs again, with more memory
  lamabench sweep cancel demo                             end the jobs; a running job saves first
  lamabench sweep collect demo                            write all records of the study's runs to one file
  lamabench sweep prune demo                              delete folders that no study names any more"""

REPORT = """lamabench report runs/demo --out out/demo                tables, figures and index.html
  lamabench report runs/demo --table speed --format latex  print one table
  lamabench report runs/demo --out out/demo --watch        keep them current while a sweep runs"""
COMPARE = """lamabench compare runs/block_mix/ssm runs/block_mix/window    two variants over their training seeds
  lamabench compare runs/block_mix                           each variant with the first one"""
RUNS = """lamabench runs family=lamamba state=done sort=fd    finished runs of a family, best first
  lamabench runs 'flops<1e10' 'model=dit*' sort=-final_loss
  lamabench runs run.root=FOLDER state!=done --json         every field of a run"""
QUERY = (
    "field=value (a text, a number or a pattern), field!=value, 'field<value', 'field>value', sort=field, sort=-field; "
    "fields: study, run, model, family, seed, state (planned, running, unfinished, done, failed, oom, diverged, wrong, "
    "unreadable), axes, params, macs, flops (counts), final_loss, scores by name or its first word, changed (a date) "
    "and others, which --json lists. FOLDER: of runs, studies or roots (default: run.root=runs)"
)
DATA = "lamabench data check data=folder data.path=images"
