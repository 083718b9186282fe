#!/usr/bin/env bash
# Shows that several GPUs of one host do what one does: `launch/several_gpus.sh GPUS FOLDER`. FOLDER/fsdp and FOLDER/ddp are a
# training each way. In FOLDER/continued, a process is killed in mid-training, and half of the GPUs go on. Samples of that
# training are drawn on one GPU and on all, in FOLDER/sampled-on-1 and -GPUS; the last lines are the hashes of their images.
set -uo pipefail
GPUS=$1 ROOT=$2 BATCH=${BATCH:-$((128 * $1))} LARGE=${LARGE:-dit_xl_2} SMALL=${SMALL:-dit_b_2} COUNT=${COUNT:-2000}
mkdir -p "$ROOT"
run() { # PROCESSES WORDS…
  torchrun --standalone --nproc-per-node "$1" --no-python lamabench "${@:2}"
}
train=(train data=synthetic train.noise=gpu train.compile=auto train.batch_size="$BATCH" run.log_every=10)
for parallel in fsdp ddp; do
  run "$GPUS" "${train[@]}" model="$LARGE" train.steps=60 run.parallel=$parallel run.root="$ROOT/$parallel"
  rm -rf "$ROOT/$parallel"/trainings/*/checkpoints
done
train+=(model="$SMALL" train.steps="${STEPS:-400}" run.checkpoint_every=100 run.parallel=fsdp run.root="$ROOT/continued")
run "$GPUS" "${train[@]}" &
torchrun=$!
until grep -q "\"step\": ${KILLED:-250}," "$ROOT"/continued/trainings/*/metrics.jsonl 2>/dev/null || ! kill -0 $torchrun; do
  sleep 0.1
done
for process in $(pgrep -f "lamabench train .*run.root=$ROOT/continued"); do
  tr '\0' '\n' <"/proc/$process/environ" | grep -qx LOCAL_RANK=1 && kill -9 "$process" && echo "killed $process"
done
wait $torchrun && exit 1
run $((GPUS / 2)) "${train[@]}" || exit
for count in 1 "$GPUS"; do
  cp -r "$ROOT/continued" "$ROOT/sampled-on-$count"
  run "$count" sample "$ROOT/sampled-on-$count"/trainings/* sample.count="$COUNT" sample.method=ddim sample.steps=25 \
    sample.batch_size="${SAMPLES:-250}" sample.precision=bfloat16 sample.compile=eager || exit
done
for count in 1 "$GPUS"; do
  cat $(find "$ROOT/sampled-on-$count"/trainings/*/samples -name '*.npy' | sort) | sha256sum
done
