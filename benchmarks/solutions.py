"""Someone else's chains of thought as a corpus, to calibrate on where RAC takes the model's own.

    python benchmarks/solutions.py gsm8k MODEL OUT.jsonl     # the solutions people wrote for GSM8K's training questions
    python benchmarks/solutions.py STORE MODEL OUT.jsonl     # another model's traces, from the store that holds them

Each text is the question in MODEL's chat template and the solution after it. Then, in a recipe: calibration.arm =
"corpus", calibration.corpus = "OUT.jsonl".
"""

import gzip
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer

from secateurs.models import model_path
from secateurs.prompts import chat_text
from secateurs.questions.jsonl import DATA
from secateurs.traces import read_traces


def human(tokenizer) -> Iterator[str]:
    """GSM8K without its calculator marks, in the words "The answer is N." at the end."""
    with gzip.open(DATA / "gsm8k_train.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            solution, answer = re.sub(r"<<.*?>>", "", row["answer"]).split("\n#### ")
            asked = chat_text(tokenizer, [("user", row["question"])])
            yield f"{asked}{solution}\nThe answer is {answer}.{tokenizer.eos_token}"


def traced(store: Path, tokenizer) -> Iterator[str]:
    """The traces of a store, made with the same tokenizer."""
    for trace in read_traces(store):
        yield tokenizer.decode(trace.prompt_ids + trace.completion_ids)


def main() -> None:
    source, model, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    tokenizer = AutoTokenizer.from_pretrained(model_path(model))
    texts = human(tokenizer) if source == "gsm8k" else traced(Path(source), tokenizer)
    out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


if __name__ == "__main__":
    main()
