"""`python -m data.toy --out DIR`: write the toy world as JSONL files, one folder per task."""
from data.toy.tasks import main

main()
