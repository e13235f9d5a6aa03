"""data/results/report.py: what a run prints before it starts (--dry_run), at its end, about a soft prompt.

Every metric stands with its unit (data/results/metrics.py). Of a preference all answers are shown. A sample
shows what the model was asked: the message, or with a system message or earlier turns the conversation.

A soft prompt of embeddings is described by the tokens nearest to each virtual token, and by how far training
moved it. Two cosines of the same embedding say how near is near: of a random direction with its nearest
word, and of a word with the other word that is nearest to it. Keys and values have no nearest tokens: for them
there are norms and distances, by layer.

Public: describe_plan, report, prompt_text, describe_virtual_tokens, print_virtual_tokens
"""
import math
import shlex
import sys
import textwrap

import torch
import torch.nn.functional as F

from data.batches.examples import display
from data.results import cost_model
from data.results.layout import print_wrapped, terminal_width, wrapped
from data.results.metrics import HIDDEN, unit
from data.results.pass_at_k import interval_of, is_shown
from data.results.runs import PROPORTIONS, proportion_interval
from data.runtime.run_folder import fit, log_progress, print_result
from data.text.messages import as_text

READING = "How to read the cosines:"
BRIEF = ("task", "method", "seed", "params_trainable", "adapter_bytes", "model_bytes", "steps", "seconds",
         "tokens_per_second")


# ------------------------------------------------------------------------------------------- before a run

def describe_plan(ctx, plan, base, examples):
    """Print a plan's trainable parameters, memory and arithmetic, and examples with the loss mask. Returns 0.

    plan      a cost_model.Plan            base   number of parameters of the base model
    examples  of data/batches/examples.py; targets are printed as [[targets]]
    """
    size = {part: f"{n / 1e6:,.0f} MB" for part, n in cost_model.memory(ctx.model.config, plan).items()}
    trunk = f" + {size['trunk']} that enter block {plan.shared_blocks}" if plan.kept_tokens else ""
    gflops = cost_model.flops(ctx.model.config, plan) / 1e9
    print_result(f"{plan.trainable:,} of {base:,} parameters are trainable ({plan.trainable / base:.2%})")
    print_wrapped(f"memory, about: {size['total']} = {size['weights']} frozen + {size['trainable']} trainable "
                  f"(with gradients and moments) + {size['activations']} activations + {size['peak']} logits "
                  f"or gradients, of {plan.tokens:,} tokens in rows of {plan.row}{trunk}")
    print_result(f"arithmetic, about: {gflops:.3g} GFLOP for each token trained on")
    for example in examples:
        for title, ids, mask in display(example):
            print_result("\n" + "-" * 40 + f" [[supervised]]{title}")
            print_result(fit(mark_targets(ids, mask, ctx.text.tokenizer), sys.stdout))
    return 0


def mark_targets(ids, mask, tokenizer):
    """The text of ids, with [[ ]] around each stretch of tokens whose mask is true."""
    text = ""
    inside = False
    stream = tokenizer.decoder(special=True)            # a character may have several tokens
    for token, is_target in zip(ids, mask):
        if is_target and not inside:
            text += "[["
        elif inside and not is_target:
            text += "]]"
        text += stream.push(token)
        inside = is_target
    text += stream.flush()
    return text + "]]" if inside else text


# ------------------------------------------------------------------------------------------- a soft prompt

def describe_virtual_tokens(ctx, start, nearest):
    """A trained soft prompt as lines of text.

    start     the prompt before training, or None if it cannot be made again
    nearest   prompts.nearest_tokens
    """
    prompt = ctx.prompt
    if prompt.holds == "embeddings":
        return describe_embeddings(ctx, start, nearest)
    lines = ["keys and values (no nearest tokens): mean norm of a virtual token | moved from start"]
    past = ctx.past()
    start_past = [None] * len(past) if start is None else start.eval()(ctx.model)
    for number, (layer, start_layer) in enumerate(zip(past, start_past)):
        if layer is None:                               # a prompt may leave layers out
            continue
        parts = []
        for i, name in enumerate("kv"):                 # (1, nkv, P, hs)
            moved = "unknown"
            if start_layer is not None:
                moved = f"{mean_norm(layer[i] - start_layer[i]):.2f}"
            parts.append(f"{name} {mean_norm(layer[i]):.2f} | {moved}")
        lines.append(f"layer {number}  {'   '.join(parts)}")
    return lines


def describe_embeddings(ctx, start, nearest):
    embeddings = ctx.prompt.prompt_embeddings().detach()                    # (P, C)
    start_embeddings = None if start is None else start.prompt_embeddings().detach()
    tokenizer = ctx.text.tokenizer
    lines = ["virtual tokens: nearest words by cosine | by dot product | norm | moved from start"]
    for i, row in enumerate(nearest(ctx.prompt, ctx.model, 3, start_embeddings)):
        columns = []
        for measure in ("cosine", "dot"):
            columns.append(" ".join(f"{tokenizer.decode([token], special=True)!r} {value:.2f}"
                                    for token, value in row[measure]))
        moved = "unknown" if start is None else f"{row['moved']:.2f}"
        lines.append(f"{i:3}  {' | '.join(columns)} | {embeddings[i].norm():.2f} | {moved}")
    of_random, of_words = usual_cosines(ctx.model)
    lines.append(f"{READING} in this model a random direction has {of_random:.2f} with its nearest word, a "
                 f"word {of_words:.2f} with the nearest other word (medians). Near the first, often 0.2 to 0.4, "
                 "a virtual token stands for no word: it works as a direction; near the second it can be read "
                 "as the words beside it.")
    return lines


@torch.no_grad()
def usual_cosines(model, count=200):
    """(of random directions with their nearest word, of words with the nearest other word), medians."""
    device = model.wte.weight.device
    V = model.config.vocab_size
    table = F.normalize(model.embed(torch.arange(V, device=device)).float(), dim=1)         # (V, C)
    generator = torch.Generator().manual_seed(0)
    random = F.normalize(torch.randn(count, table.size(1), generator=generator), dim=1).to(device)
    chosen = torch.arange(0, V, max(1, V // count), device=device)
    between = table[chosen] @ table.T                                                       # (words, V)
    between[torch.arange(len(chosen), device=device), chosen] = -1                          # not with itself
    return tuple(cosines.max(1).values.median().item() for cosines in (random @ table.T, between))


def print_virtual_tokens(lines):
    """The lines of describe_virtual_tokens, as wide as the terminal; the last one, a sentence, is narrower."""
    for line in lines:
        is_sentence = line.startswith(READING)
        print_result(fit(line, sys.stdout, "" if is_sentence else " " * 5, 110 if is_sentence else 10 ** 6))


def mean_norm(tensor):
    """(1, nkv, P, hs) -> the mean norm of a virtual token, all heads together."""
    return tensor.detach().float().transpose(1, 2).flatten(2).norm(dim=2).mean().item()


# ------------------------------------------------------------------------------------------- after a run

def report(result, folder):
    """Print the end of a run on stdout: metrics, samples, the next command, one line of key=value. Returns 0.

    result    result.json of the run that is in `folder` now, perhaps of an earlier version, which had fewer
              keys; its "next_command" uses what the run made, and names the folder that is "out" there.
              "virtual_tokens" are lines of text
    """
    before = without_hidden(result.get("baseline_metrics", {}))
    after = without_hidden(result["metrics"])
    trained = bool(before and result.get("steps"))      # otherwise nothing changed between before and after
    print_metrics(before if trained else None, after, metric_notes(result))
    if trained and is_far_worse(before.get("loss"), after.get("loss")):
        log_progress("training has made the model worse: the loss on test was "
                     f"{before['loss']:.4g} before and is {after['loss']:.4g} now; --lr is too high, or training too long")
    for sample in result.get("samples", ()):
        print_result()
        print_sample(sample, trained)
    if "virtual_tokens" in result:
        print_result()
        print_virtual_tokens(result["virtual_tokens"])
    if result.get("next_command") is not None:
        print_result("\n" + relocated(result["next_command"], result.get("out", folder), folder))
    if result.get("steps") and "seconds" in result:
        steps = "1 step" if result["steps"] == 1 else f"{result['steps']:,} steps"
        print_result(f"{steps} took {result['seconds']:,.1f} s, evaluation not included")
    # of training alone
    shown = [name for name in BRIEF if result.get("steps") or name != "tokens_per_second"]
    brief = {name: result[name] for name in shown if name in result}
    brief.update({name: round(value, 4) for name, value in after.items()})
    brief["out"] = folder
    line = " ".join(f"{name}={value}" for name, value in brief.items())
    print_result(wrapped(line) if sys.stdout.isatty() else line)        # a file or a pipe gets one line
    return 0


def is_far_worse(before, after):
    """Whether a loss is far above that before training: by a quarter of it and half a nat, or no number."""
    if before is None or after is None or not math.isfinite(before):
        return False
    return not after <= 1.25 * before + 0.5


def relocated(command, old, new):
    """Command lines with the folder `new` in place of `old`."""
    old = f" {shlex.quote(str(old))} "
    new = f" {shlex.quote(str(new))} "
    return "\n".join(f"{line} ".replace(old, new).strip() for line in command.split("\n"))


def prompt_text(text, row):
    """What a row asks of a model, as text. text: a Text of data/batches/examples.py."""
    if "tags" in row and text.classifier == "head":       # which reads the words, and is asked nothing
        return " ".join(row["tokens"])
    turns = text.turns(row)[:-1]
    if text.system and not any(turn["role"] == "system" for turn in turns):
        turns = [{"role": "system", "content": text.system}, *turns]
    return as_text(turns)


def without_hidden(metrics):
    """The metrics that a reader sees; of pass@1 to pass@n a few."""
    return {name: value for name, value in metrics.items() if name not in HIDDEN and is_shown(name, metrics)}


def metric_notes(result):
    """{metric: its unit, and the 95 % interval of a proportion of test items or of a mean over prompts}."""
    notes = {}
    for name in {**result.get("baseline_metrics", {}), **result["metrics"]}:
        parts = [unit(name, result["metrics"])]
        if name in PROPORTIONS:
            found = proportion_interval(result, name)
        else:
            found = interval_of(result.get("generations"), name)
        if found:
            parts.append("95 %: [{:.3f}, {:.3f}]".format(*found))
        notes[name] = ", ".join(filter(None, parts))
    return notes


def print_metrics(before, after, notes):
    """One line for each metric, its note behind it; two columns of numbers unless `before` is None."""
    names = list(after)
    sides = [after]
    if before is not None:
        names += [name for name in before if name not in after]
        sides = [before, after]
    width = max(16, 1 + max(map(len, names), default=0))
    if before is not None:
        print_result(" " * width + f"{'before':>12}{'after':>12}")
    for name in names:
        cells = "".join(format_number(side.get(name)) for side in sides)
        line = f"{name:{width}}{cells}  {notes[name]}".rstrip()
        print_result(fit(line, sys.stdout, " " * (width + len(cells) + 2)))


def format_number(x):
    """A cell of twelve columns; empty for None."""
    if x is None:
        return " " * 12
    if isinstance(x, int):
        return f"{x:12,}"
    if abs(x) < 1e6:
        return f"{x + 0.0:12.4f}"                       # + 0.0 turns -0.0 into 0.0
    return f"{x:12.4g}"


def print_sample(sample, trained):
    """The texts of a sample, wrapped, each behind its label."""
    width = max(40, min(94, terminal_width() - 12))
    labels = {"prompt": "prompt", "reference": "reference", "before": "before", "after": "after"}
    if not trained:
        labels = {"prompt": "prompt", "reference": "reference", "after": "answer"}
    for key, label in labels.items():
        if key not in sample:
            continue
        lines = []
        for line in sample[key].strip().splitlines() or [""]:
            lines += textwrap.wrap(line, width) or [""]
        print_result(f"  {label:10}" + ("\n" + " " * 12).join(lines))
