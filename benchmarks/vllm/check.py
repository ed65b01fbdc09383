"""Perplexity of model folders in vLLM, offline and on a CPU. Runs inside vLLM's environment.

    python check.py FOLDER [FOLDER ...] --text FILE [--window 512] [--windows 8] [--dtype auto]

Imports nothing of Poise: what it measures is what a stranger's vLLM makes of a folder. The text is cut with
the folder's own tokenizer into consecutive windows, each opened as the tokenizer opens a text; vLLM returns
the log-probability of every token of a prompt, and the perplexity is over all but the first of each window.
Prints one line of JSON a folder.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import time
from pathlib import Path

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; by default half of the machine's memory
    "VLLM_CPU_INT4_W4A8": "0",  # else CPUs with AMX round the activations of 4-bit weights to 8 bits
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process a model, so that it ends with it
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Set for the process of a model unless the caller has set them."""


def windows_of(folder: str, text: str, length: int, limit: int | None) -> list[list[int]]:
    """Consecutive windows of ``length`` tokens; what is left at the end is dropped."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    opening = tokenizer("")["input_ids"][:1]
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    step = length - len(opening)
    starts = range(0, len(tokens) - step + 1, step)
    return [[*opening, *tokens[start : start + step]] for start in starts][:limit]


def measure(folder: str, text: str, window: int, windows: int | None, dtype: str) -> dict[str, object]:
    """Loads a folder in vLLM and scores the windows of a text."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams, __version__

    cut = windows_of(folder, text, window, windows)
    start = time.perf_counter()
    engine = LLM(
        model=folder,
        dtype=dtype,
        max_model_len=window + 1,
        max_num_seqs=1,
        max_num_batched_tokens=window + 1,
        enforce_eager=True,  # compiling takes longer than the few windows
        enable_prefix_caching=False,
    )
    loaded = time.perf_counter()
    prompts = [{"prompt_token_ids": tokens} for tokens in cut]
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    scores = [
        [known[token].logprob for known, token in zip(output.prompt_logprobs[1:], tokens[1:], strict=True)]
        for output, tokens in zip(outputs, cut, strict=True)
    ]
    values = [score for window_scores in scores for score in window_scores]
    return {
        "model": Path(folder).name,
        "vllm": __version__,
        "dtype": str(engine.model_config.dtype).removeprefix("torch."),
        "perplexity": math.exp(-sum(values) / len(values)),
        "windows": [math.exp(-sum(one) / len(one)) for one in scores],
        "tokens": len(values),
        "tokens_hash": hashlib.sha256(json.dumps(cut).encode()).hexdigest(),
        "load_seconds": round(loaded - start, 2),
        "score_seconds": round(time.perf_counter() - loaded, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--window", type=int, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=None, help="score no more than these")
    parser.add_argument("--dtype", default="auto", help="what vLLM computes in")
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    context = multiprocessing.get_context("spawn")
    for folder in options.folders:
        with context.Pool(1) as pool:  # vLLM frees a model's memory only with its process
            task = (folder, text, options.window, options.windows, options.dtype)
            print(json.dumps(pool.apply(measure, task)), flush=True)


if __name__ == "__main__":
    main()
