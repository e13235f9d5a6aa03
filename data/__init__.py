"""data: everything that reads or measures text. `from data import Tokenizer, load`."""
from data.formats import load
from data.tokenizer import Tokenizer

__all__ = ["Tokenizer", "load"]
