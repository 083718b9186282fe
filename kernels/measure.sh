#!/usr/bin/env bash
# The measurements of the tables of these pages, on one GPU that nothing else uses, in one sitting: `kernels/measure.sh
# run.root=FOLDER`. Every command gets the settings that are given. A second call measures the models that are missing,
# and the operators again. AHEAD=16 compiles first, so many models at a time (eleven minutes on 32 cores, where one
# after the other takes an hour). PRINT=1 prints the commands.
set -uo pipefail
read -r -d '' MEASUREMENTS <<'LINES' || true
bench dit_xl_2 lamamba_xl_release lamamba_xl bench.modes=[forward] bench.compile=[reduce-overhead] bench.input_sizes=[32] bench.batch_size=256
bench dit_xl_2 lamamba_xl_release lamamba_xl bench.modes=[train] bench.compile=[whole-step] bench.input_sizes=[32] bench.batch_size=256
bench dit_xl_2 bench.modes=[train] bench.compile=[whole-step] bench.input_sizes=[32] bench.batch_size=128
bench lamamba_xl bench.modes=[train] bench.compile=[whole-step] bench.input_sizes=[32] bench.batch_size=[256,128] backend.selective_scan=cuda_kept
bench dit_s_2 lamamba_s bench.modes=[train] bench.compile=[whole-step] bench.batch_size=256
bench lamamba_s d_state=1 bench.modes=[train] bench.compile=[whole-step] bench.batch_size=256
bench-kernels lamamba_xl lamamba_xl_release bench.batch_size=64
bench-kernels lamamba_xl lamamba_xl_release lamamba_s --operator selective_scan bench.batch_size=256
bench dit_xl_2 lamamba_xl_release lamamba_xl bench.modes=[forward] bench.compile=[reduce-overhead] bench.input_sizes=[64] bench.batch_size=128
bench dit_xl_2 lamamba_xl_release lamamba_xl bench.modes=[forward] bench.compile=[reduce-overhead] bench.input_sizes=[16] bench.batch_size=512
bench dit_xl_2 lamamba_xl_release lamamba_xl bench.modes=[forward] bench.compile=[reduce-overhead] bench.input_sizes=[128] bench.batch_size=16
bench dit_xl_2 lamamba_xl_release lamamba_xl bench.modes=[train] bench.compile=[whole-step] bench.input_sizes=[128] bench.batch_size=4
bench dit_xl_2 lamamba_xl_release lamamba_xl bench.modes=[forward] bench.compile=[reduce-overhead] bench.input_sizes=[256] bench.batch_size=4
bench dit_xl_2 bench.modes=[forward] bench.compile=[reduce-overhead] bench.input_sizes=[32] bench.batch_size=256 backend.modulated_norm=torch
bench dit_xl_2 lamamba_xl_release lamamba_xl bench.modes=[train] bench.compile=[whole-step] bench.input_sizes=[64] bench.batch_size=16
bench dit_xl_2 lamamba_xl_release lamamba_xl bench.modes=[train] bench.compile=[whole-step] bench.input_sizes=[16] bench.batch_size=256
bench dit_xl_2 bench.modes=[forward] bench.compile=[max-autotune] bench.input_sizes=[32] bench.batch_size=256
bench dit_xl_2 bench.modes=[train] bench.compile=[max-autotune] bench.input_sizes=[32] bench.batch_size=128
LINES
if [ -n "${AHEAD:-}" ] && [ -z "${PRINT:-}" ]; then
  left=$(mktemp)
  while read -ra words; do
    settings=()
    for word in "${words[@]:1}"; do
      [[ $word == *=* ]] && settings+=("$word")
    done
    for model in "${words[@]:1}"; do
      # What is autotuned needs the GPU for itself, and operators compile in seconds.
      if [[ $model == *=* || ${words[0]} != bench || ${words[*]} == *max-autotune* ]]; then continue; fi
      echo "$model ${settings[*]}" >>"$left"
    done
  done <<<"$MEASUREMENTS"
  # Each holds the memory of a step while its backward pass compiles. Those that fail come again, fewer at a time.
  for most in "$AHEAD" $(((AHEAD + 3) / 4)) 1; do
    mapfile -t models <"$left"
    : >"$left"
    for model in "${models[@]}"; do
      while (($(jobs -rp | wc -l) >= most)); do wait -n; done
      read -ra words <<<"$model"
      { nice lamabench bench --ahead "${words[@]}" "$@" </dev/null || echo "$model" >>"$left"; } &
    done
    wait
  done
  sed 's/^/not compiled ahead: /' "$left" >&2
  rm "$left"
fi
status=0
while read -ra words; do
  if [ -n "${PRINT:-}" ]; then
    echo "lamabench ${words[*]} $*"
  else
    lamabench "${words[@]}" "$@" </dev/null || status=$?
  fi
done <<<"$MEASUREMENTS"
exit "$status"
