"""data/results/predict.py: what a model answers to texts without answers, for --task predict and --task chat.

    trained on   a text is asked as                   prediction
    label        text + question, or a head           label, and the probability of each label
    tags         text + question, or a head           a tag for each word
    chat         one user message, or its messages    an answer

The probabilities are p(label) = softmax over the labels of log p(label word | question), or those of the
head. Predictions are rows in the format of training, all of a file in one, so that it can be --data again;
what a row had as its answer becomes "reference". What does not fit the context or --max_new_tokens is cut, and
counted in a note.

Public: question_row, predict_rows, prediction_text, metrics_of, row_type_of_model, refuse_unread, open_row, input_rows,
KINDS
"""
from data.batches.few_shot import fit_shots
from data.results import evaluate
from data.runtime.files import DataError, UserError
from data.runtime.run_folder import log_progress
from data.text import entities
from data.text.bpe import compile_pattern

KINDS = {"label": "a label", "tags": "tags", "chat": "a text"}          # what a model answers with
# As rows have them: punctuation stands alone. Python's \w lacks accents and vowel signs that are marks of their own.
WORD = r"(?:\w\p{M}*)+(?:[-'’.&](?:\w\p{M}*)+)*|[^\w\s]"
SHOWN = 5                                           # labels whose probability is printed


def row_type_of_model(ctx, stored):
    """The row type that a model is asked in: that of the rows of its training (run.json)."""
    row_type = stored.get("row_type", "label" if ctx.text.labels else "chat")
    return row_type if row_type in KINDS and (ctx.text.labels or row_type == "chat") else "chat"


def refuse_unread(cfg, row_type):
    """Raises UserError for a flag of generated answers, where the model generates none of this kind."""
    unread = set()
    if row_type != "chat":
        unread |= {"temperature", "top_k", "top_p"}
    if row_type == "label":                             # tags may be generated, greedily
        unread |= {"max_new_tokens"}
    given = sorted(cfg.given & unread)
    if given:
        raise UserError(f"--{given[0]} is for generated answers, and {cfg.init} answers with {KINDS[row_type]}; "
                        "leave it out")


def open_row(turns):
    """A conversation whose last answer is still to be given."""
    return {"messages": [*turns, {"role": "assistant", "content": ""}]}


def question_row(ctx, row_type, text):
    """A text as a row of this type, whose answer is still to be given."""
    if row_type == "label":
        return {"text": text, "label": ctx.text.labels[0]}
    if row_type == "tags":
        words = compile_pattern(WORD).findall(text)
        return {"tokens": words, "tags": [ctx.text.labels[0]] * len(words)}
    return open_row([{"role": "user", "content": text}])


def input_rows(ctx, row_type, rows, source):
    """(rows of this type, the answer of each or None) of rows of any type that has one text or prompt.

    Raises DataError for a row without the text that the model reads.
    """
    found = []
    references = []
    for row in rows:
        if row_type == "chat" and ("messages" in row or "prompt" in row):
            turns = row["messages"][:-1] if "messages" in row else row["prompt"]
            found.append(open_row(turns))
            references.append(row["messages"][-1]["content"] if "messages" in row else row.get("answer"))
        elif row_type == "tags" and "tokens" in row:
            found.append(question_row(ctx, row_type, "")
                         | {"tokens": row["tokens"], "tags": [ctx.text.labels[0]] * len(row["tokens"])})
            references.append(row["tags"])
        elif "text" in row:
            found.append(question_row(ctx, row_type, row["text"]))
            references.append(row.get("label"))
        else:
            keys = ", ".join(key for key in row if key != "line")
            raise DataError(f"{row.get('line', source)}: the model answers with {KINDS[row_type]} and reads "
                            f'rows with "text"; this one has {keys}')
    return found, references


def predict_rows(ctx, row_type, rows):
    """A prediction for each row, as dicts in the format of training."""
    if row_type == "label":
        return predict_labels(ctx, rows)
    if row_type == "tags":
        return predict_tags(ctx, rows)
    answers = generated(ctx, rows)
    predictions = []
    single = all(len(row["messages"]) == 2 for row in rows)         # one format for all rows
    for row, answer in zip(rows, answers):
        turns = row["messages"][:-1]
        if single:
            predictions.append({"prompt": turns[0]["content"], "completion": answer})
        else:
            predictions.append({"messages": [*turns, {"role": "assistant", "content": answer}]})
    return predictions


def generated(ctx, rows):
    """The model's answer to each row, as text, and notes about what is cut."""
    prompts = [ctx.prompt_ids(row) for row in rows]
    note_cut(count_cut(ctx, rows, prompts), rows,
             "prompts are longer than what leaves room for an answer: their beginning is not read")
    answers = evaluate.sample(ctx, prompts)
    ends = ctx.end_tokens()
    note_cut(sum(ids[-1] not in ends for ids in answers), rows,
             f"answers are cut: --max_new_tokens {ctx.max_new_tokens}, or the context, ends before they do")
    return [ctx.text.decode_answer(ids) for ids in answers]


def count_cut(ctx, rows, prompts):
    """How many of these prompts, as ids, lack a part of their row."""
    return sum(len(ids) < len(ctx.text.prompt_ids(row)) for row, ids in zip(rows, prompts))


def note_cut(count, rows, what):
    if count:
        log_progress(f"{count} of {len(rows)} {what}")


def predict_labels(ctx, rows):
    labels = ctx.text.labels
    prompts = [fit_shots(ctx, row, ())[0] for row in rows]
    note_cut(count_cut(ctx, rows, prompts), rows,
             "texts are longer than the context: their beginning is not read")
    scores = evaluate.label_scores(ctx, prompts)                                            # (N, labels)
    predictions = []
    for row, p in zip(rows, (-scores).softmax(1).tolist()):
        ranked = sorted(zip(p, labels), key=lambda pair: -pair[0])
        probabilities = {label: round(value, 6) for value, label in ranked}
        predictions.append({"text": row["text"], "label": ranked[0][1], "probabilities": probabilities})
    return predictions


def predict_tags(ctx, rows):
    if ctx.text.classifier == "head":
        block = ctx.block_size()
        tags = evaluate.word_tags(ctx, ctx.text.encode(rows, block)[0])
        note_cut(sum(len(some) < len(row["tokens"]) for some, row in zip(tags, rows)), rows,
                 f"texts are longer than {block} tokens: the words behind are not read, and get the tag O")
        tags = [some + ["O"] * (len(row["tokens"]) - len(some)) for some, row in zip(tags, rows)]
    else:
        answers = generated(ctx, rows)
        tags = [entities.tags_of(entities.parse_entities(text, row["tokens"]), len(row["tokens"]))
                for text, row in zip(answers, rows)]
    return [{"tokens": row["tokens"], "tags": some} for row, some in zip(rows, tags)]


def prediction_text(prediction):
    """A prediction as one text."""
    if "label" in prediction:
        shown = [f"{label} {p:.3f}" for label, p in list(prediction["probabilities"].items())[:SHOWN]]
        more = ", ..." if len(prediction["probabilities"]) > SHOWN else ""
        return f"{prediction['label']}  ({', '.join(shown)}{more})"
    if "tags" in prediction:
        return entities.format_entities(prediction["tokens"], prediction["tags"])
    return prediction["completion"] if "completion" in prediction else prediction["messages"][-1]["content"]


def metrics_of(predictions):
    """The number of rows, and how sure a classifier was: the mean probability of the label it chose."""
    metrics = {"rows": len(predictions)}
    if "probabilities" in predictions[0]:
        top = [prediction["probabilities"][prediction["label"]] for prediction in predictions]
        metrics["mean_probability"] = sum(top) / len(top)
    return metrics
