"""report.py: runs, for people: what is about to run, and what a run has found.

Public: describe, report
"""
from data.runs import say


def describe(kit, learn, base, examples):
    """--dry_run: what would learn, about what memory it would take, and what the model would see."""
    n, c = sum(p.numel() for p in learn.values()), kit.model.config
    frozen = sum(p.numel() * p.element_size() for p in kit.model.parameters() if not p.requires_grad)
    kept = kit.micro * c.n_layer * (12 * c.n_embd + 3 * c.n_inner) * kit.dtype.itemsize
    say(f"{n:,} of {base:,} parameters learn ({n / base:.2%})")
    say(f"memory, about: {frozen / 2**20:.0f} MB frozen + {16 * n / 2**20:.0f} MB learning (with gradients "
        f"and moments) + {kept / 2**20:.0f} MB activations of {kit.micro} tokens")
    for ids, mask in examples:
        say("\n" + "-" * 40 + " [[supervised]]")
        mask, out = mask if isinstance(mask, list) else [False] * len(ids), ""
        for i, (token, on) in enumerate(zip(ids, mask)):
            out += "[[" * (on and not mask[i - 1]) + kit.text.tokenizer.decode([token], special=True)
            out += "]]" * (on and (i + 1 == len(ids) or not mask[i + 1]))
        say(out)
    return 0


def report(result, folder):
    """The end of a run on stdout: before and after, samples, how to go on, one line for machines."""
    before, after = result.get("baseline_metrics", {}), result["metrics"]
    shown = {name: value for name, value in after.items() if name != "targets"}
    say(f"{'':16}{'before':>10}{'after':>10}")
    for name in [*shown, *(name for name in before if name not in after)]:
        two = [f"{side[name]:10.4f}" if name in side else " " * 10 for side in (before, shown)]
        say(f"{name:16}" + "".join(two))
    for sample in result["samples"]:
        say()
        for key in [key for key in ("prompt", "wanted", "before", "after") if key in sample]:
            lines = sample[key].strip().splitlines() or [""]
            say(f"  {key:8}" + ("\n" + " " * 10).join(lines))
    if result["task"] == "reward":
        say(f"\npython train.py --task ppo --init {result['init']} --reward {folder}")
    elif result["method"] != "none":
        say(f"\npython train.py --task chat --init {folder}")
    brief = {name: result[name] for name in ("task", "method", "seed", "params_trainable", "adapter_bytes",
                                             "steps", "seconds", "tokens_per_second")}
    brief.update({name: round(value, 4) for name, value in shown.items()}, out=folder)
    say(" ".join(f"{name}={value}" for name, value in brief.items()))
    return 0
