#!/usr/bin/env bash
# Everything that wants a CUDA device, in one go: the tests (compute-sanitizer over a part of them), the benchmarks and a
# short training. Run from anywhere; the package must be installed. Writes benchmarks/results/<gpu>.json and
# <gpu>-training.txt beside it. Options: --data-dir DIR (CIFAR-10; without it the training is on digits).
set -euo pipefail
cd "$(dirname "$0")/.."
data_dir=""
while (($#)); do
  case $1 in
    --data-dir) data_dir=${2:?--data-dir needs a folder}; shift 2 ;;
    *) echo "unknown option $1 (known: --data-dir DIR)" >&2; exit 2 ;;
  esac
done
gpu=$(python -c 'import torch; print(torch.cuda.get_device_name(0).replace(" ", "-"))' 2>/dev/null) || {
  echo "torch sees no CUDA device here: this script needs one; \`python -m atlas_kernels\` says why" >&2; exit 1; }
python -m atlas_kernels
pytest -q
if command -v compute-sanitizer >/dev/null; then
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
    python -m pytest -q tests/test_perturb.py tests/test_perturb_norms.py tests/test_losses.py tests/test_objectives.py \
    tests/test_pairwise.py tests/test_augment.py -k "cuda and (layouts or per_sample or buffer or classes or sizes or bits)"
fi
mkdir -p benchmarks/results
pytest --benchmark-only -q --results "benchmarks/results/$gpu.json"
if [[ -n $data_dir ]]; then
  train=(--config benchmarks/cifar10.json --data-dir "$data_dir" --autoattack 0)  # every method
else
  train=(--dataset digits)
fi
atlas train --device cuda --out-dir "runs/on-gpu" "${train[@]}" | tee "benchmarks/results/$gpu-training.txt"
