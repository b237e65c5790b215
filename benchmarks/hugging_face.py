"""A tiny Llama of transformers reads a long prompt in chunks: under "sdpa", and under this package.

    python benchmarks/hugging_face.py --json FILE

Random weights, float32 and bfloat16. The two take turns; each continues the prompt: with the same tokens?
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from perceiver_kernels.cli.machine import provenance
from perceiver_kernels.cli.measure import DTYPES, summary
from perceiver_kernels.cli.report import Result, out, progress, write_json
from perceiver_kernels.integrations.transformers import NAME, register

IMPLEMENTATIONS = ("sdpa", NAME)
SIZES = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1 << 17,
}  # fmt: skip


@torch.no_grad()
def read(model: LlamaForCausalLM, prompt: Tensor, chunk: int) -> tuple[float, Any, Tensor]:
    """Seconds to read the prompt (1, N), the cache, and the logits (1, 1, V) of what follows it."""
    cache = DynamicCache(config=model.config)
    begin = time.perf_counter()
    for part in prompt.split(chunk, dim=1):
        logits = model(part, cache=cache, logits_to_keep=1).logits
    return time.perf_counter() - begin, cache, logits


@torch.no_grad()
def write(model: LlamaForCausalLM, cache: Any, logits: Tensor, count: int) -> list[int]:
    """The likeliest ``count`` tokens, one after the other."""
    tokens = []
    for _ in range(count):
        token = logits.argmax(-1)
        tokens.append(int(token))
        logits = model(token, cache=cache).logits
    return tokens


def compare(dtype: str, length: int, chunk: int, repeat: int, advance: Any) -> dict[str, Any]:
    """Both implementations in turns on one model and prompt."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(DTYPES[dtype]).eval()
    prompt = torch.randint(SIZES["vocab_size"], (1, length))
    samples: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    tokens = {}
    for _ in range(repeat):
        for name in IMPLEMENTATIONS:
            model.set_attn_implementation(name)
            seconds, cache, logits = read(model, prompt, chunk)
            samples[name].append(seconds)
            tokens.setdefault(name, write(model, cache, logits, 32))
            advance()
    rows = {name: summary(seconds) for name, seconds in samples.items()}
    medians = [rows[name]["median_s"] for name in IMPLEMENTATIONS]
    return {
        "dtype": dtype,
        "length": length,
        "chunk": chunk,
        "speedup": medians[0] / medians[1],
        "same_tokens": tokens["sdpa"] == tokens[NAME],
        "seconds": rows,
    }


def main() -> None:
    """Measure, print, write what was measured, however far it gets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=8192, help="tokens of the prompt (default 8192)")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of one forward (default 512)")
    parser.add_argument("--repeat", type=int, default=7, help="samples of each implementation (default 7)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    register()
    command = shlex.join(["python", "benchmarks/hugging_face.py", *sys.argv[1:]])
    result: Result = {
        **provenance(),
        "command": command,
        "transformers": transformers.__version__,
        "model": SIZES,
        "rows": [],
    }
    dtypes = ("float32", "bfloat16")
    try:
        with progress() as bar:
            task = bar.add_task("Prefill", total=2 * len(dtypes) * args.repeat)
            for dtype in dtypes:
                row = compare(dtype, args.length, args.chunk, args.repeat, lambda: bar.advance(task))
                result["rows"].append(row)
                theirs, ours = (row["seconds"][name]["median_s"] for name in IMPLEMENTATIONS)
                out.print(
                    f"{dtype}: sdpa {theirs:.2f} s, {NAME} {ours:.2f} s, {row['speedup']:.2f}x, "
                    f"{'the same' if row['same_tokens'] else 'OTHER'} tokens"
                )
    finally:
        if args.json:
            write_json(args.json, result)


if __name__ == "__main__":
    main()
