#!/usr/bin/env bash
# Everything that wants a CUDA device. Run from anywhere; the package must be installed. Writes to benchmarks/results/, the
# GPU's name in front: what each command measured as JSON and markdown, and all that it printed as .txt, as it comes.
# Without a part all of them run, in this order; each can also run alone:
#   --tests      the tests, and compute-sanitizer over a part of them where it is installed
#   --operators  every operator beside its floor, and what a call costs the host
#   --attacks    PGD beside other libraries, and whether bf16 attacks are as strong
#   --steps      whole training steps of every method, the published way and ours; a profile; what each choice gains
#   --scaling    cost per image against sizes, with figures
#   --training   with --data-dir: PreActResNet-18 on CIFAR-10, 30 epochs of four methods; else a short one on digits
# Two parts run only where they are asked for:
#   --speedrun SECONDS  three networks for CIFAR-10, each trained in 60, 120 or 300 seconds, then AutoAttack; the same
#                       command goes on with those that are there; may be given once for each budget
#   --studies SECONDS   the next part of the queue of docs/atlas_study.md, four runs beside each other
# --data-dir DIR: where CIFAR-10 lies. --results DIR: in place of benchmarks/results. --seconds N: a part ends after so
# many; what it has measured until then is kept.
# A command that fails or is cut off does not stop the others. Which they were is said at the end, with exit status 1.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
known=(tests operators attacks steps scaling training)
data_dir="" folder=benchmarks/results seconds=0 studies=0 parts=() budgets=() failed=()
while (($#)); do
  case $1 in
    --data-dir) data_dir=${2:?--data-dir needs a folder}; shift 2 ;;
    --results) folder=${2:?--results needs a folder}; shift 2 ;;
    --seconds) seconds=${2:?--seconds needs a number}; shift 2
      [[ $seconds =~ ^[1-9][0-9]*$ ]] || { echo "--seconds takes a whole number above 0, got $seconds" >&2; exit 2; } ;;
    --speedrun)
      [[ ${2:?--speedrun needs a number} =~ ^[1-9][0-9]*$ ]] || {
        echo "--speedrun takes a whole number of seconds, got $2" >&2; exit 2; }
      ((${#budgets[@]})) || parts+=(speedrun)
      budgets+=("$2"); shift 2 ;;
    --studies) studies=${2:?--studies needs a number of seconds}; shift 2; parts+=(studies)
      [[ $studies =~ ^[1-9][0-9]*$ ]] || { echo "--studies takes a whole number above 0, got $studies" >&2; exit 2; } ;;
    --tests | --operators | --attacks | --steps | --scaling | --training) parts+=("${1#--}"); shift ;;
    *) echo "unknown option $1 (known: --data-dir DIR --results DIR --seconds N ${known[*]/#/--}" \
      "--speedrun SECONDS --studies SECONDS)" >&2; exit 2 ;;
  esac
done
((${#parts[@]})) || parts=("${known[@]}")
gpu=$(python -c 'import re, torch; print(re.sub(r"[^\w.-]", "-", torch.cuda.get_device_name(0)))' 2>/dev/null) || {
  echo "torch sees no CUDA device here: this script needs one; \`python -m atlas_kernels\` says why" >&2; exit 1; }
mkdir -p "$folder" && python -m atlas_kernels || exit
results=$folder/$gpu
data=(${data_dir:+--data-dir "$data_dir"})
stems=$(python -c 'from atlas_kernels.schema import OPERATORS; print(*OPERATORS)') || exit

# run NAME COMMAND...: within what is left of the part's time; what it prints is in a file of its own as well.
run() {
  local name=$1 left=$((seconds ? deadline - SECONDS : 0)) began=$SECONDS status
  shift
  if ((seconds && left <= 0)); then failed+=("$name was not begun, for its part had no time left"); return; fi
  echo "== $name: $*"
  timeout --kill-after=20 "$left" "$@" 2>&1 | tee "$results-$name.txt"
  status=${PIPESTATUS[0]}
  if ((seconds && SECONDS - began >= left && (status == 124 || status == 137))); then
    failed+=("$name was cut off after $left seconds")
  elif ((status)); then
    failed+=("$name ended with status $status")
  fi
}

# What was reached, beside what is to be; takes no time.
show_targets() {
  python benchmarks/targets.py "$results" || failed+=("targets ended with status $?")
}

run_tests() {
  local workers=()
  python -c 'import xdist' 2>/dev/null && workers=(-n 8)
  run tests python -m pytest -q "${workers[@]}" --failures="$results-failures.txt"
  if command -v compute-sanitizer >/dev/null; then
    run memcheck env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
      python -m pytest -q $(printf 'tests/test_%s.py ' $stems) \
      -k "cuda and (layouts or per_sample or buffer or classes or sizes or bits)"
  fi
}

run_operators() {
  run operators python -m pytest --benchmark-only -q $(printf 'benchmarks/bench_%s.py ' $stems) --results="$results.json"
  run host-time python benchmarks/host_time.py
  show_targets
}

run_attacks() {
  run attacks python benchmarks/bench_attacks.py --results "$results-attacks.json"
  local how=(--dataset digits)
  [[ -z $data_dir ]] || how=(--dataset cifar10 --data-dir "$data_dir")
  run attack-precision python benchmarks/attack_precision.py "${how[@]}" --results "$results-attack-precision.json"
}

run_steps() {
  run training-step python benchmarks/bench_training_step.py --network preact_resnet18 --batch-size 128 --rounds 5 \
    --row-seconds 20 --graphs "${data[@]}" --results "$results-training-step.json"
  run training-step-compiled python benchmarks/bench_training_step.py --network preact_resnet18 --batch-size 128 \
    --rounds 5 --row-seconds 20 --methods atlas,trades --graphs --compile "${data[@]}" \
    --results "$results-training-step-compiled.json"
  show_targets
  run profile python benchmarks/profile_step.py --method trades --batch-size 128 "${data[@]}" \
    --results "$results-profile.json"
  run choices python benchmarks/choices.py --batch-size 128 --steps 10 --compile --results "$results-choices.json"
}

run_scaling() {
  run scaling python benchmarks/scaling.py --results "$results-scaling.json" --plots docs/figures
}

run_training() {
  local runs=runs/on-gpu train=(--dataset digits) method
  if [[ -n $data_dir ]]; then
    train=(--config benchmarks/cifar10-gpu.json "${data[@]}")
  fi
  run training python -m atlas_train train --device cuda --out-dir "$runs" "${train[@]}"
  [[ -n $data_dir ]] || return
  for method in "$runs"/*/; do
    run "training-$(basename "$method")-pgd-50-10" python -m atlas_train evaluate "$method" --size 1000 --steps 50 \
      --restarts 10 "${data[@]}"
  done
}

run_speedrun() {
  local budget
  for budget in "${budgets[@]}"; do
    run "speedrun-$budget" python benchmarks/speedrun.py "$budget" "${data[@]}" --runs "runs/speedrun-$gpu" \
      --results "$results-speedrun-$budget.json"
  done
}

run_studies() {
  run studies python benchmarks/studies/run_queue.py "$studies" --parallel 4 --results "$folder/atlas-study" "${data[@]}"
}

for part in "${parts[@]}"; do
  deadline=$((SECONDS + seconds))
  "run_$part"
done
((${#failed[@]} == 0)) || { printf '%s\n' "" "Not all went well:" "${failed[@]/#/- }" >&2; exit 1; }
