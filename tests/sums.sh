#!/usr/bin/env bash
# RL with verifiable rewards on toy/sums: pass@1 to pass@16 after SFT, rejection sampling, GRPO, DAPO, RLOO and PPO,
# each from the same SFT model and with about as many sampled answers (60 iterations of 64, to which DAPO adds
# refills):  tests/sums.sh [OUT]
# SEEDS, ALGOS: words, "1 2 3" and "grpo dapo rloo ppo"; PYTHON: the interpreter. A command that is finished is not run
# again. Rejection sampling answers 480 prompts 8 times, and imitates one right answer to each.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
out="${1:-out/sums}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

train() {
    "$python" train.py --seed "$seed" --forgetting_data none "$@"
}

measure() {                             # measure NAME: 16 answers to each of 100 prompts of test
    "$python" train.py --task sample --data toy/sums --seed "$seed" --init "$out/$1-s$seed" --num_generations 16 \
        --eval_items 100 --out "$out/pass/$1-s$seed"
}

for seed in ${SEEDS:-1 2 3}; do
    sft="$out/sft-s$seed"
    train --data toy/sums_chat --method full --epochs 4 --out "$sft"
    measure sft
    "$python" train.py --task sample --data toy/sums --seed "$seed" --init "$sft" --num_generations 8 \
        --eval_items 480 --at_least 1 --out "$out/best-s$seed"
    train --data "$out/best-s$seed" --init "$sft" --out "$out/rejection-s$seed"
    measure rejection
    for algo in ${ALGOS:-grpo dapo rloo ppo}; do
        train --task ppo --algo "$algo" --data toy/sums --init "$sft" --out "$out/$algo-s$seed"
        measure "$algo"
    done
done
"$python" train.py --task table --runs "$out/pass" --metric pass@1,pass@4,pass@16
