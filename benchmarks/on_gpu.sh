#!/usr/bin/env bash
# Everything that wants a CUDA device. Run from anywhere; the package must be installed. Writes to benchmarks/results/, the
# GPU's name in front. Without a part all of them run, in this order; each can also run alone:
#   --tests      the tests, and compute-sanitizer over a part of them where it is installed
#   --operators  every operator beside its floor, and what a call costs the host
#   --attacks    PGD beside other libraries, and whether bf16 attacks are as strong
#   --steps      whole training steps of every method, the published way and ours; what each choice gains; a profile
#   --scaling    cost per image against sizes, with figures
#   --training   with --data-dir: PreActResNet-18 on CIFAR-10, 30 epochs of four methods; else a short one on digits
# --data-dir DIR: where CIFAR-10 lies.
set -euo pipefail
cd "$(dirname "$0")/.."
known=(tests operators attacks steps scaling training)
data_dir="" parts=()
while (($#)); do
  case $1 in
    --data-dir) data_dir=${2:?--data-dir needs a folder}; shift 2 ;;
    --tests | --operators | --attacks | --steps | --scaling | --training) parts+=("${1#--}"); shift ;;
    *) echo "unknown option $1 (known: --data-dir DIR ${known[*]/#/--})" >&2; exit 2 ;;
  esac
done
((${#parts[@]})) || parts=("${known[@]}")
gpu=$(python -c 'import torch; print(torch.cuda.get_device_name(0).replace(" ", "-"))' 2>/dev/null) || {
  echo "torch sees no CUDA device here: this script needs one; \`python -m atlas_kernels\` says why" >&2; exit 1; }
results=benchmarks/results/$gpu
data=(${data_dir:+--data-dir "$data_dir"})
stems=$(python -c 'from atlas_kernels.schema import OPERATORS; print(*OPERATORS)')
mkdir -p benchmarks/results
python -m atlas_kernels

run_tests() {
  pytest -q
  if command -v compute-sanitizer >/dev/null; then
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
      python -m pytest -q $(printf 'tests/test_%s.py ' $stems) \
      -k "cuda and (layouts or per_sample or buffer or classes or sizes or bits)"
  fi
}

run_operators() {
  pytest --benchmark-only -q $(printf 'benchmarks/bench_%s.py ' $stems) --results "$results.json"
  python benchmarks/host_time.py
}

run_attacks() {
  python benchmarks/bench_attacks.py --results "$results-attacks.json"
  local how=(--dataset digits)
  [[ -z $data_dir ]] || how=(--dataset cifar10 --data-dir "$data_dir")
  python benchmarks/attack_precision.py "${how[@]}" --results "$results-attack-precision.json"
}

run_steps() {
  python benchmarks/bench_training_step.py --network preact_resnet18 --batch-size 128 --rounds 5 --row-seconds 20 --graphs \
    "${data[@]}" --results "$results-training-step.json"
  python benchmarks/choices.py --batch-size 128 --steps 10 --compile --results "$results-choices.json"
  python benchmarks/profile_step.py --method trades --batch-size 128 "${data[@]}" --results "$results-profile.json"
}

run_scaling() {
  python benchmarks/scaling.py --results "$results-scaling.json" --plots docs/figures
}

run_training() {
  local run=runs/on-gpu train=(--dataset digits)
  if [[ -n $data_dir ]]; then
    train=(--config benchmarks/cifar10-gpu.json "${data[@]}")
    python -c 'import pyautoattack' 2>/dev/null || train+=(--autoattack 0)
  fi
  atlas train --device cuda --out-dir "$run" "${train[@]}" | tee "$results-training.txt"
  [[ -n $data_dir ]] || return 0
  local method
  for method in "$run"/*/; do
    atlas evaluate "$method" --size 1000 --steps 50 --restarts 10 "${data[@]}"
  done | tee "$results-training-pgd-50-10.txt"
}

for part in "${parts[@]}"; do "run_$part"; done
