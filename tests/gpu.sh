#!/usr/bin/env bash
# Checks on a machine with a CUDA device, in less than 8 minutes:  tests/gpu.sh [OUT]
# The tests of the GPU path, a few real commands, speed and memory of GPT-2 124M and a Llama of 1.1 billion. OUT keeps
# the log, the results and speed.json.
# PYTHON names the interpreter (default python3). Exit code: 0 if everything passed.
set -uo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
out="${1:-$(mktemp -d)}"
device="${DEVICE:-cuda}"
mkdir -p "$out"
export PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
exec > >(tee "$out/gpu.log") 2>&1
failed=0

check() {                               # check SECONDS COMMAND ...: one line of outcome, the log if it failed
    local limit="$1"
    shift
    local began=$SECONDS
    if timeout "$limit" "$@" > "$out/last.log" 2>&1
    then
        echo "pass  $((SECONDS - began)) s  $*"
        tail -n 1 "$out/last.log"
    else
        echo "FAIL  code $?, $((SECONDS - began)) s  $*"
        tail -n 40 "$out/last.log"
        failed=1
    fi
}

"$python" -c "
import platform, torch
name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or 'cpu'
print(f'device {name}, torch {torch.__version__}, CUDA {torch.version.cuda}, python {platform.python_version()}')
"
"$python" -c "import numpy, tiktoken, tqdm, pytest" || "$python" -m pip install -q numpy tiktoken tqdm pytest

train=("$python" train.py --device "$device")
check 200 env DEVICE="$device" "$python" -m pytest -q tests/test_cuda.py
check 50 "${train[@]}" --steps 100 --out "$out/lora"
check 30 "${train[@]}" --method full --steps 100 --dtype bf16 --gradient_checkpointing --out "$out/full"
check 30 "${train[@]}" --method p_tuning_v2 --steps 100 --out "$out/p_tuning_v2"
check 30 "${train[@]}" --quant nf4 --steps 20 --out "$out/nf4"
check 30 "${train[@]}" --dtype fp16 --steps 100 --out "$out/fp16"
check 60 "${train[@]}" --compile --steps 50 --out "$out/compile"
check 60 "${train[@]}" --task ppo --data toy/prompts --init data/base --reward data.toy:gold --steps 3 --out "$out/ppo"
check 30 "${train[@]}" --task eval --init "$out/lora" --eval_items 64 --out "$out/eval"
check 20 "${train[@]}" --task chat --init "$out/lora" --prompt "Where does Fay live?" --temperature 0

# What time is left, for speed and memory beside their estimates; with PEERS=PYTHON beside peft.
left=$((440 - SECONDS))
"$python" tests/gpu_speed.py --device "$device" $([ "$device" = cuda ] || echo --tiny) --out "$out/speed.json" \
    --seconds "$((left > 30 ? left : 30))" || failed=1

rm -f "$out/last.log"
echo "$SECONDS seconds, $([ $failed = 0 ] && echo all passed || echo something failed)"
exit $failed
