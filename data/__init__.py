"""data: everything that reads or measures text. `from data import Tokenizer, load`."""


def __getattr__(name):                          # on first use: reading weights must not import a tokenizer
    if name == "load":
        from data.text.formats import load
        return load
    if name == "Tokenizer":
        from data.text.tokenizer import Tokenizer
        return Tokenizer
    raise AttributeError(f"data has Tokenizer and load, not {name}")
