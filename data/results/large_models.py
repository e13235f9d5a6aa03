"""data/results/large_models.py: the cost model's numbers for models of 1B, 8B and 70B parameters, as a table.

    python -m data.results.large_models [FLOP_A_SECOND]

Shapes of Llama 3, bf16 on GPUs, micro-batches of 4096 tokens in rows of 1024, a quarter of them supervised,
and the defaults of the methods. FLOP_A_SECOND is the bf16 rate that one GPU reaches, an assumption: 4e14 by
default.

Public: SHAPES, example_plans, main
"""
import sys

from data.results.cost_model import Plan, Shape, cache_bytes, count_lora, count_weights, flops, memory

SHAPES = {"1B": Shape(128256, 16, 2048, 32, 8, 64, 8192, tied=True),    # Llama 3: 3.2, 3.1 and 3.1
          "8B": Shape(128256, 32, 4096, 32, 8, 128, 14336),
          "70B": Shape(128256, 80, 8192, 64, 8, 128, 28672)}
HEAD = ("model", "`--method`", "GB", "with `--gradient_checkpointing`", "fits GB", "8 GPUs", "64 GPUs",
        "GFLOP a token", "10^9 tokens on 1, 8, 64 GPUs")
WORDS = ("q", "v", "up", "down")
VIRTUAL_TOKENS = 20


def example_plans(c):
    """{value of --method: Plan} for a Shape."""
    batch = {"tokens": 4096, "row": 1024, "supervised": 1024}
    prompt_numbers = VIRTUAL_TOKENS * cache_bytes(c, 1, 1)
    lora = Plan("lora", count_lora(c, WORDS, 8), targets=WORDS, **batch)
    return {"full": Plan("full", count_weights(c)[1], **batch),
            "lora": lora,
            "lora --quant nf4": lora._replace(quant="nf4"),
            "p_tuning_v2": Plan("prompt", prompt_numbers, prefix_len=VIRTUAL_TOKENS, **batch)}


def cells(name, c, label, plan, flops_a_second):
    """One row of the table."""
    checkpointing = plan._replace(gradient_checkpointing=True)
    needed = memory(c, checkpointing)["total"] / 1e9
    fits = [str(gb) for gb in (24, 80) if needed + 1 < gb]              # 1: the CUDA context
    sharded = ["same", "same"]
    if plan.kind == "full":
        plans = [checkpointing._replace(processes=n, shard=True) for n in (8, 64)]
        sharded = [f"{memory(c, one)['total'] / 1e9:,.0f}" for one in plans]
    work = flops(c, checkpointing)
    hours = ", ".join(f"{work * 1e9 / flops_a_second / n / 3600:,.1f}" for n in (1, 8, 64))
    return [name, f"`{label}`", f"{memory(c, plan)['total'] / 1e9:,.0f}", f"{needed:,.0f}",
            ", ".join(fits) or "neither", *sharded, f"{work / 1e9:,.1f}", f"{hours} h"]


def main(flops_a_second=4e14):
    """Print the table in Markdown."""
    print(f"| {' | '.join(HEAD)} |")
    print("|---" * len(HEAD) + "|")
    for name, c in SHAPES.items():
        for label, plan in example_plans(c).items():
            print(f"| {' | '.join(cells(name, c, label, plan, flops_a_second))} |")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
