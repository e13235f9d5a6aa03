"""data: everything around the algorithms, in six packages. `from data import Tokenizer, load`."""


def __getattr__(name):                          # imported on first use: reading weights needs no tokenizer
    if name == "load":
        from data.text.formats import load
        return load
    if name == "Tokenizer":
        from data.text.tokenizer import Tokenizer
        return Tokenizer
    raise AttributeError(f"module data has no {name}; it has Tokenizer and load")
