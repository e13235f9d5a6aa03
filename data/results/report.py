"""data/results/report.py: runs, for people: what is about to run, what a run has found, what a soft prompt has become.

A soft prompt is read by its neighbours: the words that each embedding is near to, and how far it went.
Keys and values have no neighbours: there the norms and the way, by layer, are all there is to say.

Public: describe, report, virtual
"""
import textwrap

from data.results import cost_model
from data.batches.examples import shown
from data.runtime.run_folder import say


def describe(kit, plan, base, examples):
    """--dry_run: what would learn, about what memory and arithmetic it takes; what the model would see."""
    need = {part: f"{n / 1e6:,.0f} MB" for part, n in cost_model.memory(kit.model.config, plan).items()}
    say(f"{plan.learn:,} of {base:,} parameters learn ({plan.learn / base:.2%})")
    say(f"memory, about: {need['total']} = {need['weights']} frozen + {need['learning']} learning (with "
        f"gradients and moments) + {need['activations']} activations + {need['peak']} logits or gradients, "
        f"of {plan.tokens:,} tokens in rows of {plan.row}")
    say(f"arithmetic, about: {cost_model.flops(kit.model.config, plan) / 1e9:.3g} GFLOP for each token trained on")
    for e in examples:
        say("\n" + "-" * 40 + " [[supervised]]")
        (ids, mask), out = shown(e), ""
        for i, (token, on) in enumerate(zip(ids, mask)):
            out += "[[" * (on and not mask[i - 1]) + kit.text.tokenizer.decode([token], special=True)
            out += "]]" * (on and (i + 1 == len(ids) or not mask[i + 1]))
        say(out)
    return 0


def virtual(kit, start, nearest):
    """A soft prompt as lines of text. start: the prompt before training, or None; nearest: nearest_tokens."""
    prompt, lines = kit.prompt, []
    if hasattr(prompt, "embed"):
        table, begun = prompt.table().detach(), None if start is None else start.table().detach()
        lines.append("virtual tokens: nearest words by cosine | by dot product | norm | moved from its start")
        for j, found in enumerate(nearest(prompt, kit.model, 3, begun)):
            near = (" ".join(f"{kit.text.tokenizer.decode([i], special=True)!r} {value:.2f}"
                             for i, value in found[how]) for how in ("cosine", "dot"))
            moved = "unknown" if start is None else f"{found['moved']:.2f}"
            lines.append(f"{j:3}  {' | '.join(near)} | {table[j].norm():.2f} | {moved}")
        return lines
    lines.append("keys and values, with no words near them: mean norm of a virtual token | moved from start")
    now, was = kit.past(), start and start.eval()(kit.model)
    for i, layer in enumerate(now):
        parts = []
        for j, name in enumerate("kv"):                                     # (1, nkv, P, hs)
            moved = "unknown" if was is None else f"{size(layer[j] - was[i][j]):.2f}"
            parts.append(f"{name} {size(layer[j]):.2f} | {moved}")
        lines.append(f"layer {i}  {'   '.join(parts)}")
    return lines


def size(t):
    """(1, nkv, P, hs) -> the mean norm of a virtual token, all heads together."""
    return t.detach().float().transpose(1, 2).flatten(2).norm(dim=2).mean().item()


def number(x):
    """A cell of twelve columns."""
    if x is None:
        return " " * 12
    return f"{x:12,}" if isinstance(x, int) else f"{x + 0.0:12.4f}" if abs(x) < 1e6 else f"{x:12.4g}"


def report(result, folder):
    """The end of a run on stdout: before and after, samples, how to go on, one line for machines."""
    before, after = result.get("baseline_metrics", {}), result["metrics"]
    shown = {name: value for name, value in after.items() if name != "targets"}
    two = before and result["steps"]                    # what was only measured has no two sides
    names = [*shown, *(name for name in before if two and name not in after)]
    wide = max(16, 1 + max(map(len, names)))
    if two:
        say(" " * wide + f"{'before':>12}{'after':>12}")
    for name in names:
        cells = [number(side.get(name)) for side in ((before, shown) if two else (shown,))]
        say(f"{name:{wide}}" + "".join(cells).rstrip())
    labels = dict(prompt="prompt", wanted="wanted", before="before", after="after") if two else \
        dict(prompt="prompt", wanted="wanted", after="said")
    for sample in result["samples"]:
        say()
        for key in [key for key in labels if key in sample]:
            lines = sample[key].strip().splitlines() or [""]
            lines = [part for line in lines for part in textwrap.wrap(line, 96) or [""]]
            say(f"  {labels[key]:8}" + ("\n" + " " * 10).join(lines))
    for line in ["", *result["virtual"]] if "virtual" in result else ():
        say(line)
    if result["task"] == "reward":
        say(f"\npython train.py --task ppo --init {result['init']} --reward {folder}")
    elif result["task"] == "sample":
        say(f"\npython train.py --init {result['init']} --data {folder}")
    elif result["method"] != "none":                    # a head judges; some models only read, both ways
        how = "chat" if result.get("speaks", True) else "eval"
        say(f"\npython train.py --task {how} --init {folder}" + f" --data {result['data']}" * (how == "eval"))
    brief = {name: result[name] for name in ("task", "method", "seed", "params_trainable", "adapter_bytes",
                                             "steps", "seconds", "tokens_per_second")}
    brief.update({name: round(value, 4) for name, value in shown.items()}, out=folder)
    say(" ".join(f"{name}={value}" for name, value in brief.items()))
    return 0
